"""Chooses the statements that CLIP judges about a text and any picture, and draws other pictures.

For re-pairing (``method.pairing``) each task needs a reading: which statements CLIP compares, and to which
outputs of the student they belong. The example's label is never read.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlib.data.examples import Example
from tdlib.students.base import StudentEncoder
from tdlib.teacher.cache import TeacherCache

JUDGED_ANSWERS = 32  # of a VQA question


class StatementJudge:
    """The statements that CLIP judges about an example, whatever the picture: embeddings and outputs.

    - Choices (VCR): the question with each choice; they stand for the student's outputs in order.
    - Verdicts (SNLI-VE): the text, which is true or false; these stand for the labels that say so, here
      "entailment" and "contradiction". "neutral" is not judged, see ``method.pairing.judge_truth``.
    - A label set (VQA): the question followed by an answer, for the ``JUDGED_ANSWERS`` answers that are most
      frequent among the training subset's questions of its type, and then among all. The student's
      distribution over these alone is compared; the teacher's cache stores the global embedding of each,
      without tokens (1 kB for a teacher of 512 dimensions).

    Args:
        cache: stores the statements' embeddings; missing ones are added.
        examples: the training subset, whose answers are counted.
        labels: the label set, where examples have no choices.
        verdicts: its labels for a text that is true of its picture, and false (``Task.verdicts``).
    """

    def __init__(
        self, cache: TeacherCache, examples: Sequence[Example], labels: Sequence[str] = (),
        verdicts: tuple[str, str] | None = None,
    ):  # fmt: skip
        self.cache, self.labels = cache, labels
        self._verdicts = [labels.index(label) for label in verdicts or ()]
        self._answers: dict[str, list[int]] = {}
        if labels and verdicts is None:
            self._answers = _frequent_answers(examples, len(labels))
            self.prepare(examples)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Adds to the cache in large batches what these examples lack (calling adds one by one)."""
        if self._answers:
            self.cache.add_pooled(text for example in examples for text in self._statements(example)[0])

    def _statements(self, example: Example) -> tuple[list[str], list[int]]:
        if not self.labels:
            return [statement.text for statement in example.statements()], [*range(len(example.choices))]
        if self._verdicts:
            return [example.prompt.text], self._verdicts
        answers = self._answers.get(example.stratum, self._answers[""])
        return [f"{example.prompt.text.strip()} {self.labels[answer]}" for answer in answers], answers

    def __call__(self, example: Example) -> tuple[Tensor, Tensor]:
        """Global embeddings times the logit scale (statements, teacher_dim), and outputs (judged,)."""
        texts, outputs = self._statements(example)
        self.prepare([example])
        embeddings = torch.stack([self.cache.pooled(text) for text in texts])
        return self.cache.teacher.logit_scale * embeddings, torch.tensor(outputs)


def _frequent_answers(examples: Sequence[Example], num_labels: int) -> dict[str, list[int]]:
    """The labels that are judged for each stratum, most frequent first; "" holds those of all strata."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for example in examples:
        if example.label is not None:
            counts[example.stratum][example.label] += 1
    overall: Counter[int] = sum(counts.values(), Counter())
    by_frequency = [label for label, _ in overall.most_common()]
    by_frequency += [label for label in range(num_labels) if label not in overall]  # for equal lengths
    size = min(JUDGED_ANSWERS, num_labels)
    ordered = {
        stratum: [*dict.fromkeys([label for label, _ in counted.most_common()] + by_frequency)][:size]
        for stratum, counted in counts.items()
    }
    return ordered | {"": by_frequency[:size]}


def picture_number(picture: Path) -> int:
    """A number that identifies a picture, the same in every process (Python's ``hash`` is not)."""
    return int.from_bytes(hashlib.sha256(str(picture).encode()).digest()[:7])


def drawn(key: str, rows: Sequence[int], total: int, count: int) -> list[int]:
    """Draws ``count`` of ``total`` numbers for the batch of these rows.

    They depend on the key and the batch's examples alone, so that an interrupted run, or one whose batches
    are made by other processes, draws the same.
    """
    state = hashlib.sha256(f"{key} {list(rows)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(state[:7]))
    return torch.randperm(total, generator=generator)[:count].tolist()


class PicturePool:
    """Pictures without labels that texts are shown with, beside those of the batch; see ``drawn``.

    Args:
        examples: their pictures; the first example of each says what its objects are.
        encoder: of the student.
        cache: holds the teacher's features of the pictures.
        seed: of the draws.
        seen_as: the example as the teacher sees it (controls).
    """

    def __init__(
        self, examples: Sequence[Example], encoder: StudentEncoder, cache: TeacherCache, seed: int,
        seen_as: Callable[[Example], Example] = lambda example: example,
    ):  # fmt: skip
        first: dict[Path, Example] = {}  # filled one by one: all examples of VCR would take gigabytes
        for example in examples:
            first.setdefault(example.image, example)
        self.examples = [*first.values()]
        self.encoder, self.cache, self.seed, self.seen_as = encoder, cache, seed, seen_as
        self._encoded: dict[int, dict[str, Any]] = {}
        self._room = 2**28

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, rows: Sequence[int], count: int) -> dict[str, Tensor]:
        """Draws ``count`` pictures for the batch of these examples, as entries with the prefix "pool_"."""
        chosen = drawn(str(self.seed), rows, len(self.examples), count)
        seen = [self.seen_as(self.examples[place]).image for place in chosen]
        visual = self.encoder.pad_visual([self._visual(place) for place in chosen])
        numbers = [picture_number(self.examples[place].image) for place in chosen]
        return {
            **{f"pool_{name}": value for name, value in visual.items()},
            "pool_picture": torch.tensor(numbers),
            "pool_image": torch.stack([self.cache.picture(image).pooled.float() for image in seen]),
        }

    def _visual(self, place: int) -> dict[str, Any]:
        if place in self._encoded:
            return self._encoded[place]
        visual = self.encoder.visual(self.examples[place])
        size = sum(value.nbytes for value in visual.values() if isinstance(value, Tensor))
        if size <= self._room:
            self._room -= size
            self._encoded[place] = visual
        return visual
