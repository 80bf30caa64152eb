"""Turns examples into batches: encodes each once, pads them together, divides them among processes.

``students`` encode one example, ``pipeline`` reads its teacher features; this module joins both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from tdlib.config import RunConfig
from tdlib.core.devices import usual_workers
from tdlib.data.examples import Example, TextPart
from tdlib.students.base import EncodedText, StudentEncoder, pad_last
from tdlib.teacher.probe import soft_target
from tdlib.training.judging import PicturePool, drawn, picture_number
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.targets import TeacherFeatures, pack

UNLABELLED = "unlabelled."  # prefix of the entries that are a second batch, of ``UnlabelledExamples``


class EncodedExamples(Dataset):
    """Examples as the student's inputs, with the teacher's features if a ``feature_reader`` is given.

    Encoded examples are kept as long as they fit into ``memory`` bytes, but not by a loader's workers; all
    others are encoded again in every epoch. Their texts alone are not kept: tokenizing four
    choices takes 0.4 of the 3 to 5 ms that encoding such an example takes for the mini students, about 2 %
    of its share of a training step (`make bench` prints it). ``num_labels`` is the size of the label set
    where examples have no choices, ``soft_labels`` says that it is learned what each of its labels is worth
    (``Task.has_soft_labels``). ``modality`` "text" blanks the picture and "image" every word: controls
    that show what can be answered without the other.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: StudentEncoder,
        feature_reader: TeacherFeatureReader | None = None,
        memory: int = 2**29,
        num_labels: int = 0,
        modality: str = "both",
        soft_labels: bool = False,
    ):
        self.examples, self.encoder, self.feature_reader = examples, encoder, feature_reader
        self.num_labels, self.modality, self.soft_labels = num_labels, modality, soft_labels
        self._kept: dict[int, dict[str, Any]] = {}
        self._memory = self._room = memory

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        item = {**self._encode(self.examples[index]), "row": index}
        size = _nbytes(item)
        # A loader's worker ends with the epoch, in which it reads an example once (an unlabelled one rarely
        # again), so it would keep it for nothing.
        if size <= self._room and get_worker_info() is None:
            self._room -= size
            self._kept[index] = item
        return item

    def workers(self, asked: int, processes: int = 1) -> int:
        """Returns how many processes make batches: ``asked``, or as data and machine ask if that is -1.

        None are of use where all examples are likely to fit into memory together, judged by the first one.
        ``processes`` share the machine, each with workers of its own.
        """
        if asked >= 0:
            return asked
        if usual_workers() == 0 or not len(self):
            return 0
        return 0 if len(self) * _nbytes(self[0]) <= self._memory else usual_workers(processes)

    def text_length(self, index: int) -> int:
        """Returns the number of text tokens of an example once encoded, without opening its picture."""
        if index in self._kept:
            return self._kept[index]["input_ids"].shape[1]
        return self.encoder.text(self._shown(self.examples[index])).input_ids.shape[1]

    def check_pictures(self) -> None:
        """Encodes one example of each distinct picture, so that a missing or damaged one is reported early.

        Raises whatever encoding raises. The encoded examples are kept as always.
        """
        seen = set()
        for index in range(len(self)):
            example = self.examples[index]
            if (example.image, example.boxes) not in seen:  # regions depend on the objects too
                seen.add((example.image, example.boxes))
                _ = self[index]

    def _shown(self, example: Example) -> Example:
        """Blanks the words where ``modality`` is "image"."""
        if self.modality != "image":
            return example
        nothing = TextPart("")
        return replace(example, prompt=nothing, choices=(nothing,) * len(example.choices))

    def _encode(self, example: Example) -> dict[str, Any]:
        example = self._shown(example)
        text = self.encoder.text(example)
        visual = self.encoder.visual(example)
        if self.modality == "text":
            visual = self.encoder.blank(visual)
        teacher = None
        if self.feature_reader is not None:
            teacher = self.feature_reader.features(example, text.spans, self.encoder.visual_boxes(visual))
        label = -1 if example.label is None else example.label
        item = {**vars(text), "visual": visual, "label": label, "teacher": teacher}
        if teacher is not None and teacher.statements is not None:
            item["picture"] = picture_number(example.image)
        if self.soft_labels:
            item["soft"] = soft_target(example, self.num_labels)
        return item


def _nbytes(item: dict[str, Any]) -> int:
    """Bytes of an encoded example's tensors."""
    parts = [*item.values(), *item["visual"].values()]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor | TeacherFeatures))


class UnlabelledExamples:
    """Training examples beside the labelled subset whose tokens are distilled too, without their labels.

    Args:
        examples: encoded with a ``feature_reader``.
        seed: of the draws, see ``judging.drawn``.
        share: number of examples drawn for each example of a batch.
    """

    def __init__(self, examples: EncodedExamples, seed: int, share: float):
        self.examples, self.seed, self.share = examples, seed, share

    def draw(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Draws a batch for the batch of these rows; ``UNLABELLED`` stands before each name."""
        count = max(1, round(self.share * len(rows)))
        chosen = drawn(f"{self.seed} unlabelled", rows, len(self.examples), count)
        batch = collate([self.examples[place] | {"label": -1} for place in chosen], self.examples.encoder)
        return {UNLABELLED + name: value for name, value in batch.items()}


def collate(
    items: Sequence[dict[str, Any]],
    encoder: StudentEncoder,
    pool: PicturePool | None = None,
    unlabelled: UnlabelledExamples | None = None,
) -> dict[str, Tensor]:
    """Makes one batch: texts are padded to the longest, pictures to the largest.

    A batch carries the teacher's features; ``targets.make_targets`` computes the targets on the student's
    device. With ``pool`` it also carries as many other pictures as it has examples, with ``unlabelled`` a
    second batch of unlabelled examples.
    """
    length = max(item["input_ids"].shape[1] for item in items)
    padding = {"input_ids": encoder.tokenizer.pad_token_id, "objects": -1}
    batch = {
        field.name: pad_last([item[field.name] for item in items], length, value=padding.get(field.name, 0))
        for field in fields(EncodedText)
    }
    batch |= encoder.pad_visual([item["visual"] for item in items])
    batch["labels"] = torch.tensor([item["label"] for item in items])
    batch["rows"] = torch.tensor([item["row"] for item in items])
    if "soft" in items[0]:
        batch["soft"] = torch.stack([item["soft"] for item in items])
    if items[0]["teacher"] is not None:
        batch |= pack([item["teacher"] for item in items], length)
    if "picture" in items[0]:  # what re-pairing reads
        batch["picture"] = torch.tensor([item["picture"] for item in items])
    if pool is not None:
        batch |= pool.draw([item["row"] for item in items], len(items))
    if unlabelled is not None:
        batch |= unlabelled.draw([item["row"] for item in items])
    return batch


def fitting_batches(dataset: EncodedExamples, config: RunConfig) -> DataLoader:
    """Batches for ``TargetedDistillation.fit_phi``, without the pictures or examples of a pool.

    They come in any order but the file's, which can be of one kind first. The loader has its own generator,
    so that the training's random numbers stay what they are.
    """
    order = torch.Generator().manual_seed(config.seed)
    batch = partial(collate, encoder=dataset.encoder)
    return DataLoader(dataset, config.batch_size, shuffle=True, generator=order, collate_fn=batch)


class EpochBatches(BatchSampler):
    """Batches of examples that are reshuffled every epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


class SharedBatches:
    """This process's share of every batch, so that N processes train on the batches that one would see.

    Process ``rank`` takes every ``processes``-th example of a batch, beginning with the ``rank``-th. A last
    batch of fewer examples than processes is joined to the batch before it if both belong to one update (of
    ``window`` batches). Otherwise every process takes all of it: sums and counts grow by the same factor.
    """

    def __init__(self, batch_sampler: EpochBatches, window: int, rank: int, processes: int):
        self.batch_sampler, self.window = batch_sampler, window
        self.rank, self.processes = rank, processes

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def _joins(self) -> bool:
        """True if the last batch is joined to the one before it."""
        rest = len(self.batch_sampler.sampler) % self.batch_sampler.batch_size  # type: ignore[arg-type]
        return 0 < rest < self.processes and (len(self.batch_sampler) - 1) % self.window != 0

    def __len__(self) -> int:
        return len(self.batch_sampler) - self._joins()

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batch_sampler)
        if self._joins():
            rest = batches.pop()
            batches[-1] = batches[-1] + rest
        for batch in batches:
            yield batch if len(batch) < self.processes else batch[self.rank :: self.processes]
