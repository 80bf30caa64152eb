"""Chooses the statements that CLIP judges about a text and any picture, and draws other pictures.

For re-pairing (``method.pairing``) each task needs a reading: which statements CLIP compares, and to which
outputs of the student they belong. The example's label is never read.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlib.data.examples import Example
from tdlib.students.base import StudentEncoder
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.posterior import AnswerPosterior


class StatementJudge:
    """The statements that CLIP judges about an example, whatever the picture: embeddings and outputs.

    - Choices (VCR): the question with each choice; they stand for the student's outputs in order.
    - Verdicts (SNLI-VE): the text, which is true or false; these stand for the labels that say so, here
      "entailment" and "contradiction". "neutral" is not judged, see ``method.pairing.judge_truth``.
    - A label set (VQA): the question with each of its frequent answers, judged by how well it fits among
      those that questions of its type have, see ``AnswerPosterior``. Their prior is flat: how frequent each
      is can be learned from the labels, and is what a shift such as VQA-CP's turns round. The student's
      distribution over these answers alone is compared.

    Args:
        cache: holds the statements' embeddings; those of ``answers`` are added where they are missing.
        answers: says which answers are judged, where there is a label set without verdicts.
        verdicts: the labels for a text that is true of its picture, and false, where there are such.
    """

    def __init__(
        self, cache: TeacherCache, answers: AnswerPosterior | None = None, verdicts: Sequence[int] = ()
    ):
        self.cache, self.answers, self._verdicts = cache, answers, verdicts

    def __call__(self, example: Example) -> tuple[Tensor, Tensor, Tensor]:
        """What CLIP's logits for any picture are made of, for each statement that is judged.

        Global embeddings times the logit scale (judged, teacher_dim), the logarithm of each statement's
        prior probability (judged,), and the student's outputs (judged,) that they stand for; of verdicts
        there is one statement and prior, and two outputs.
        """
        if answers := self.answers:
            answers.prepare([example])
            texts, outputs = answers.statements(example), answers.judged(example)
            prior, sharpness = answers.log_prior(example, flat=True), answers.sharpness
        else:
            texts = [statement.text for statement in example.statements()]
            outputs = [*self._verdicts] or [*range(len(texts))]
            prior, sharpness = torch.zeros(len(texts)), 1.0
        embeddings = torch.stack([self.cache.pooled(text) for text in texts])
        return sharpness * self.cache.teacher.logit_scale * embeddings, prior, torch.tensor(outputs)


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
