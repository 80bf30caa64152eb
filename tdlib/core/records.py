"""Records of what the method did to one statement, as plain arrays that files, tables and views share.

Owns the record and its file; ``training.recording`` fills records while a run trains.
"""

from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tdlib.core.places import GROUND_TRUTH, Box, Reference, Span

END = -1  # the step of a record made when training was over


@dataclass(frozen=True)
class TargetRecord:
    """The targeted tokens of one (example, choice): everything the views show.

    Arrays run over the student's tokens. ``spans`` are characters of ``text`` ((0, 0) for tokens
    that are not text), ``boxes`` normalised xyxy (all zero for tokens that are not visual).
    ``relevance`` is what the run's variant gives, a cosine by default; ``prior`` and ``score`` lie in [0, 1]
    (scores sum to 1 over each modality's valid tokens), ``weight`` sums to 1 over the selected tokens of
    both modalities.
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
    truth: str = GROUND_TRUTH  # where the relevant spans and boxes come from; else the name of a proxy
    # A re-paired lesson, where the run has such: the same text with another picture. Probabilities of this
    # statement among those that CLIP judges, of CLIP and of the student, with the example's picture and
    # with the other one; ``lesson_weight`` is the weight of the pair in the loss.
    other_image: Path | None = None
    teacher_choice: float | None = None
    student_choice: float | None = None
    teacher_other: float | None = None
    student_other: float | None = None
    lesson_weight: float | None = None

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
    """Makes the table that ``selections.parquet`` holds: a row per record, arrays as lists."""
    rows = []
    for record in records:
        row = {}
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            elif field.name == "references":
                value = [[r.start, r.end, *r.objects] for r in value]
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [list(item) if isinstance(item, tuple) else item for item in value]
            row[field.name] = value
        rows.append(row)
    table = pd.DataFrame(rows, columns=[field.name for field in fields(TargetRecord)])
    return table.astype({"label": "Int64", "prediction": "Int64"})  # whole numbers also beside missing ones


EXAMPLES_PER_GROUP = 32  # their records, of all steps, are decoded together when those of one are read


def write_records(records: Sequence[TargetRecord], path: Path) -> None:
    """Writes records as one Parquet file, every ``EXAMPLES_PER_GROUP`` examples as a row group.

    Examples are sorted by their id within each split, so that a group's range of ids tells whether it holds
    an example; an example's records keep their order. So one example is read without most of the others,
    and what is the same at every step is stored nearly once.
    Measured with 54 tokens a statement, 64 statements (MiniWorld, ViLT): 1,060 bytes for a statement's
    first record (4.3 kB per example of four choices), 16 for each further step, 700 where the
    relevance depends on the student.
    """
    splits = {name: place for place, name in enumerate(dict.fromkeys(record.split for record in records))}
    examples = sorted({(splits[record.split], record.example_id) for record in records})
    places = {example: place for place, example in enumerate(examples)}
    groups: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        place = places[splits[record.split], record.example_id]
        groups.setdefault(place // EXAMPLES_PER_GROUP, []).append(row)
    table = pa.Table.from_pandas(records_table(records), preserve_index=False)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _, rows in sorted(groups.items()):
            writer.write_table(table.take(rows), row_group_size=len(rows))


def read_records(
    path: Path,
    steps: Collection[int] | None = None,
    examples: Collection[tuple[str, str]] | None = None,
) -> list[TargetRecord]:
    """Reads the records of a ``selections.parquet``, in the file's order.

    Columns that a file of an older run lacks take their defaults (``step``: END).

    Args:
        path: the file.
        steps: reads only records of these steps.
        examples: reads only records of these (split, example_id); other row groups are not decoded.
    """
    wanted = pc.scalar(True)
    if steps is not None:
        has_step = "step" in pq.read_schema(path).names
        wanted &= pc.field("step").isin(list(steps)) if has_step else pc.scalar(END in steps)
    if examples is not None:
        matches = [(pc.field("split") == split) & (pc.field("example_id") == id_) for split, id_ in examples]
        wanted &= reduce(or_, matches, pc.scalar(False))
    return [_record(row) for row in pq.read_table(path, filters=wanted).to_pylist()]


def _record(row: dict[str, Any]) -> TargetRecord:
    """Makes a record of a row of the file."""
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
        elif field.name in ("image", "other_image"):
            value = None if value is None else Path(value)
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[field.name] = value
    return TargetRecord(**values)
