"""What the method did to one statement, as plain arrays that files, tables and views share.

Owns the record, its file, and the recorder that fills records while a run trains. Does not own what
is recorded: which tokens are chosen and what they weigh is the run's module's business.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tdlib.data.examples import GROUND_TRUTH, Box, Example, Reference, Span

if TYPE_CHECKING:
    from tdlib.training.objective import TargetedDistillation

END = -1  # the step of a record made when training was over


@dataclass(frozen=True)
class TargetRecord:
    """The targeted tokens of one (example, choice): everything the views show.

    Arrays run over the student's tokens. ``spans`` are characters of ``text`` ((0, 0) for tokens
    that are not text), ``boxes`` normalised xyxy (all zero for tokens that are not visual).
    ``relevance`` is a cosine, ``prior`` and ``score`` lie in [0, 1] (scores sum to 1 over each
    modality's valid tokens), ``weight`` sums to 1 over the selected tokens of both modalities.
    """

    example_id: str
    choice: int  # 0 for tasks without choices
    label: int | None
    prediction: int | None  # of the student, over choices
    text: str
    references: tuple[Reference, ...]
    image: Path
    object_boxes: tuple[Box, ...]
    object_names: tuple[str, ...]
    tokens: tuple[str, ...]  # the student's text tokens as written; "" for visual ones
    spans: np.ndarray  # (tokens, 2) int
    boxes: np.ndarray  # (tokens, 4) float
    distilled: np.ndarray  # (tokens,) bool: has a teacher target
    relevance: np.ndarray  # (tokens,) float
    prior: np.ndarray
    score: np.ndarray
    selected: np.ndarray  # (tokens,) bool
    weight: np.ndarray
    teacher_probability: float | None  # p_T of the true label
    student_probability: float | None  # p_S of the true label
    instance_weight: float | None  # c
    relevant_spans: tuple[Span, ...] = ()  # ground truth, if known
    relevant_boxes: tuple[Box, ...] = ()
    split: str = ""
    step: int = END  # updates done when it was recorded (0: before the first), or END
    truth: str = GROUND_TRUTH  # what the relevant spans and boxes are, or what stands in for it

    @property
    def is_text(self) -> np.ndarray:
        return self.spans[:, 1] > self.spans[:, 0]

    @property
    def is_visual(self) -> np.ndarray:
        return (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])

    @property
    def is_region(self) -> np.ndarray:
        """Visual tokens that are not text as well: a token with both a span and a box counts as text."""
        return self.is_visual & ~self.is_text


def records_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """One row per record, arrays as lists: what ``selections.parquet`` holds."""
    rows = []
    for record in records:
        row = {}
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            elif field.name == "references":
                value = [[r.start, r.end, *r.objects] for r in value]
            elif field.name == "image":
                value = str(value)
            elif isinstance(value, tuple):
                value = [list(item) if isinstance(item, tuple) else item for item in value]
            row[field.name] = value
        rows.append(row)
    table = pd.DataFrame(rows, columns=[field.name for field in fields(TargetRecord)])
    return table.astype({"label": "Int64", "prediction": "Int64"})  # whole numbers also beside missing ones


EXAMPLES_PER_GROUP = 32  # whose records, of all steps, are decoded together when one's are read


def write_records(records: Sequence[TargetRecord], path: Path) -> None:
    """Writes records as one Parquet file, every ``EXAMPLES_PER_GROUP`` examples as a row group.

    Within a group they keep their order. So what is the same at every step is stored nearly once, and
    one example is read without most of the others.
    Measured with 54 tokens a statement, 64 statements (MiniWorld, ViLT): 1,060 bytes for a statement's
    first record (4.3 kB per example of four choices), 16 for each further step, 700 where the
    relevance depends on the student.
    """
    places: dict[tuple[str, str], int] = {}
    groups: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        place = places.setdefault((record.split, record.example_id), len(places))
        groups.setdefault(place // EXAMPLES_PER_GROUP, []).append(row)
    table = pa.Table.from_pandas(records_table(records), preserve_index=False)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for rows in groups.values():
            writer.write_table(table.take(rows), row_group_size=len(rows))


def read_records(
    path: Path,
    steps: Collection[int] | None = None,
    examples: Collection[tuple[str, str]] | None = None,
) -> list[TargetRecord]:
    """The records of a ``selections.parquet``, in the file's order.

    Columns that a file of an older run lacks take their defaults (``step``: END).

    Args:
        path: the file.
        steps: only those of these steps.
        examples: only those of these (split, example_id); the rest of the file is not decoded but for
            the names in it.
    """
    with pq.ParquetFile(path) as file:
        rows = None
        if steps is not None or examples is not None:
            rows = _rows_of(file, steps, examples)
        table = file.read() if rows is None else _take(file, rows)
    return [_record(row) for row in table.to_pylist()]


def _rows_of(
    file: pq.ParquetFile, steps: Collection[int] | None, examples: Collection[tuple[str, str]] | None
) -> np.ndarray:
    """The numbers of the rows that are asked for, from the columns that name them."""
    has_step = "step" in file.schema_arrow.names
    names = file.read(columns=["split", "example_id", *(["step"] if has_step else [])])
    wanted = np.ones(len(names), dtype=bool)
    if steps is not None:
        step = names["step"].to_numpy() if has_step else np.full(len(names), END)
        wanted &= np.isin(step, list(steps))
    if examples is not None:
        own = zip(*(names[name].to_pylist() for name in ("split", "example_id")), strict=True)
        asked = set(examples)
        wanted &= np.fromiter((pair in asked for pair in own), dtype=bool, count=len(names))
    return np.flatnonzero(wanted)


def _take(file: pq.ParquetFile, rows: np.ndarray) -> pa.Table:
    """These rows (ascending), decoding only the row groups that hold one."""
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    groups, place = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
    if not len(groups):
        return file.schema_arrow.empty_table()
    starts = np.concatenate([[0], np.cumsum([sizes[i] for i in groups])])[:-1]  # within what is decoded
    first = np.array([ends[i] - sizes[i] for i in groups])
    return file.read_row_groups(groups.tolist()).take(starts[place] + rows - first[place])


def _record(row: dict[str, Any]) -> TargetRecord:
    """A row of the file as a record."""
    shapes = {"spans": (-1, 2), "boxes": (-1, 4)}
    values = {}
    for field in fields(TargetRecord):
        if field.name not in row and field.default is not MISSING:
            continue
        value = row[field.name]
        if field.type is np.ndarray:
            kind = bool if field.name in ("distilled", "selected") else None
            value = np.array(value, dtype=kind).reshape(shapes.get(field.name, (-1,)))
        elif field.name == "references":
            value = tuple(Reference(r[0], r[1], tuple(r[2:])) for r in value)
        elif field.name == "image":
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[field.name] = value
    return TargetRecord(**values)


# Recording.


class Probes(Protocol):
    """Examples with their encoding and targets, such as ``training.EncodedExamples`` with a builder."""

    examples: Sequence[Example]

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ProbeRecorder:
    """Records what a run targets in a fixed set of examples, as often as it is asked to.

    A call costs the student's forward on the probes, without gradient; the targets are those that
    ``probes`` keep. It changes nothing: neither weights nor random numbers, so that a run with and
    one without a recorder are the same. Records gather in ``records``, for ``write_records``.

    Args:
        probes: what is recorded; examples and their encoding, with targets.
        collate: makes a batch of several of their items.
        module: the run's student and settings; it must distil tokens.
        split: the name of the probes' split.
        batch_size: examples per forward.

    Raises:
        ValueError: the module distils nothing, so that nothing is targeted.
    """

    def __init__(
        self,
        probes: Probes,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
        module: "TargetedDistillation",
        split: str = "",
        batch_size: int = 32,
    ):
        if module.phi is None:
            raise ValueError("a run with distill_weight=0 targets no tokens: there is nothing to record")
        self.probes, self.collate, self.module = probes, collate, module
        self.split, self.batch_size = split, batch_size
        self.records: list[TargetRecord] = []

    @torch.no_grad()
    def record(self, step: int = END) -> list[TargetRecord]:
        """Appends, and returns, a record for each statement of each probe.

        ``step`` is the number of updates done, or END. In evaluation mode (no dropout).
        """
        module, was_training = self.module, self.module.training
        drawn = module.generator.get_state()
        module.eval()
        found = []
        try:
            for start in range(0, len(self.probes.examples), self.batch_size):
                examples = self.probes.examples[start : start + self.batch_size]
                items = [self.probes[start + i] for i in range(len(examples))]
                found += self._batch(examples, items, step)
        finally:
            module.train(was_training)
            module.generator.set_state(drawn)
        self.records += found
        return found

    def _batch(
        self, examples: Sequence[Example], items: list[dict[str, Any]], step: int
    ) -> list[TargetRecord]:
        module = self.module
        device = next(module.student.parameters()).device
        batch = {name: value.to(device) for name, value in self.collate(items).items()}
        output = module.student(**module._inputs(batch))
        hidden = output.hidden_states[module.settings.distill_layer]
        relevance, scores = module.scores(batch, hidden)
        selected, weight = module.choose_tokens(batch, hidden)
        columns = {"relevance": relevance, "score": scores, "selected": selected, "weight": weight}
        arrays = {name: value.cpu().numpy() for name, value in columns.items()}
        teacher, student = (
            logits.float().softmax(-1).cpu().numpy() for logits in (batch["teacher_logits"], output.logits)
        )
        instance = module.instance_weights(batch, output.logits).float().cpu().numpy()
        length = batch["input_ids"].shape[2]
        records = []
        for row, (example, item) in enumerate(zip(examples, items, strict=True)):
            targets, texts = item["targets"], item["input_ids"].shape[1]
            # the example's own tokens in the padded batch
            own = np.r_[:texts, length : length + targets.valid.shape[1] - texts]
            label, p = example.label, student[row]
            teacher_p = student_p = weight_of_example = None
            if label is not None:
                teacher_p, student_p = float(teacher[row, label]), float(p[label])
                weight_of_example = float(instance[row])
            for choice, statement in enumerate(example.statements()):
                spans = targets.tokens.spans[choice].numpy()
                records.append(
                    TargetRecord(
                        example_id=example.id, choice=choice, label=label, prediction=int(p.argmax()),
                        text=statement.text, references=statement.references, image=example.image,
                        object_boxes=example.boxes, object_names=example.names,
                        tokens=tuple(statement.text[start:end] for start, end in spans), spans=spans,
                        boxes=targets.tokens.boxes[choice].numpy(), distilled=targets.valid[choice].numpy(),
                        prior=targets.prior[choice].numpy(), relevant_spans=statement.relevant,
                        relevant_boxes=example.relevant_boxes, truth=example.truth,
                        split=self.split, step=step,
                        teacher_probability=teacher_p, student_probability=student_p,
                        instance_weight=weight_of_example,
                        **{name: array[row, choice, own] for name, array in arrays.items()},
                    )
                )  # fmt: skip
        return records
