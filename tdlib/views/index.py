"""Finds runs that recorded selections, and filters and sorts their examples.

An index holds one row per example, however many steps and choices were recorded, so that a list of 20,000
examples opens at once; the records themselves are read when a view needs them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from glob import escape, glob
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from tdlib.config import RunConfig
from tdlib.core.files import file_state
from tdlib.core.paths import ROOT
from tdlib.core.records import END, TargetRecord, read_records
from tdlib.data.examples import path_names
from tdlib.data.tasks import data_folder, task_of
from tdlib.miniworld.worlds import STRATA, strata_by_row
from tdlib.views.evolution import in_order

SELECTIONS = "selections.parquet"
ORDERS = {  # the column, and whether it ascends
    "as recorded": ("", True), "highest c": ("c", False), "lowest c": ("c", True),
    "largest disagreement": ("disagreement", False), "wrong first": ("correct", True),
    "right first": ("correct", False),
}  # fmt: skip


class ExplorerError(ValueError):
    """Raised when a view cannot be made; its message says why and what is missing."""


@dataclass(frozen=True)
class Run:
    """A run folder that holds selections; ``find_runs`` gives each of its runs another ``name``.

    ``written`` is the state of its selections: a run that was trained again is another run to every cache.
    """

    name: str
    folder: Path
    written: tuple[int, int] | None = None

    @cached_property
    def config(self) -> RunConfig:
        """The run's parameters, not validated: they may name functions that only its notebook defined."""
        return RunConfig.model_construct(**json.loads((self.folder / "config.json").read_text("utf-8")))

    @cached_property
    def _student(self) -> dict:
        return json.loads((self.folder / "student" / "config.json").read_text("utf-8"))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels of a task that has no choices, from the stored student; empty for other tasks."""
        if task_of(self.config).has_choices:
            return ()
        names = self._student["id2label"]
        return tuple(names[str(i)] for i in range(len(names)))

    @property
    def layers(self) -> int:
        """Number of layers of the stored student."""
        return self._student.get("num_hidden_layers", 0)

    @property
    def heads(self) -> int:
        """Number of attention heads of each layer."""
        return self._student.get("num_attention_heads", 0)

    @cached_property
    def index(self) -> pd.DataFrame:
        """``read_index``, with the ``STRATA`` of each example; "" where the data lack them or are gone."""
        index = read_index(self.folder / SELECTIONS, self.labels)
        questions, folder = index["example_id"].str.removesuffix(":r"), data_folder(self.config)
        strata = [
            strata_by_row(folder, str(split), own)
            for split, own in questions.groupby(index["split"], sort=False)
        ]
        return index.join(pd.concat(strata) if strata else pd.DataFrame(columns=STRATA))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The recorded steps, END last."""
        steps = pq.read_table(self.folder / SELECTIONS, columns=["step"])["step"].unique().to_pylist()
        return tuple(sorted(steps, key=lambda step: (step == END, step)))

    def records(self, split: str, example_id: str, steps: Sequence[int] | None = None) -> list[TargetRecord]:
        """The records of one example by step, the end last.

        All steps are read together and cached, as a slider of steps asks for one after the other.
        """
        records = _records_of(self.folder / SELECTIONS, self.written, split, example_id)
        chosen = [record for record in records if steps is None or record.step in steps]
        if not chosen:
            at = "" if steps is None else f" at step {', '.join(map(str, steps))}"
            raise ExplorerError(f"{self.name} recorded nothing of {example_id!r} in {split!r}{at}")
        return chosen


@lru_cache(maxsize=32)
def _records_of(
    path: Path, _state: tuple[int, int] | None, split: str, example_id: str
) -> list[TargetRecord]:
    return in_order(read_records(path, examples=[(split, example_id)]))


def find_runs(patterns: Sequence[str | Path], home: Path = ROOT) -> list[Run]:
    """Finds the runs with selections under these paths or globs, each once, in the order of the patterns.

    Relative paths start at ``home``. A folder stands for all runs in it, such as a batch's or
    ``reports/runs``. A path that exists is no glob, even if it contains brackets. Raises an ExplorerError if
    a pattern matches nothing, or nothing that recorded selections.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        names = [path] if (home / path).exists() else sorted(glob(str(path), root_dir=home, recursive=True))
        hits = [home / name for name in names]
        if not hits:
            raise ExplorerError(f"{pattern}: no such folder (looked in {home}); give run folders or globs")
        run_folders = [
            file.parent
            for hit in hits
            for file in sorted(hit.rglob(SELECTIONS))
            if not any(part.startswith(".") for part in file.relative_to(hit).parts)  # unfinished runs
        ]
        if not run_folders:
            raise ExplorerError(
                f"{pattern}: no run in it recorded selections ({SELECTIONS}); arms without a teacher have "
                "none, others need probe_examples above 0"
            )
        folders |= dict.fromkeys(folder.resolve() for folder in run_folders)
    return [
        Run(name, folder, file_state(folder / SELECTIONS))
        for name, folder in zip(path_names([*folders]), folders, strict=True)
    ]


def run_named(runs: Sequence[Run], name: str) -> Run:
    """Returns the run of this name; raises an ExplorerError that lists the runs if there is none."""
    for run in runs:
        if run.name == name:
            return run
    raise ExplorerError(f"no run {name!r}; there are {', '.join(run.name for run in runs)}")


def companion(runs: Sequence[Run], first: Run) -> Run | None:
    """Chooses a run of the same task to compare with; prefers the same student, another arm, equal seeds."""

    def likeness(run: Run) -> tuple[bool, ...]:
        a, b = first.config, run.config
        return a.student == b.student, a.arm != b.arm, a.seed == b.seed

    others = [run for run in runs if run is not first and run.config.task == first.config.task]
    return max(others, key=likeness, default=None)


# Examples.


def read_index(path: Path, labels: Sequence[str] = ()) -> pd.DataFrame:
    """Reads one row per example of a file of selections, as it was at the end, in the file's order.

    Columns ``split``, ``example_id``, ``label`` and ``prediction`` (indices), ``answer`` (the right
    choice's statement, or the label's name), ``correct``, ``p_T``, ``p_S``, ``c``, ``disagreement``
    (``|p_T - p_S|``), and ``text`` (all statements, a line each). Numbers that need a label are missing
    where an example has none.
    """
    query = """
        SELECT split, example_id, any_value(label) AS label, any_value(prediction) AS prediction,
            any_value(teacher_probability) AS "p_T", any_value(student_probability) AS "p_S",
            any_value(instance_weight) AS c, string_agg(text, chr(10) ORDER BY choice) AS text,
            any_value(text) FILTER (choice = label) AS answer
        FROM read_parquet(?, file_row_number = true) WHERE step = ?
        GROUP BY split, example_id ORDER BY min(file_row_number)
    """
    if lacking := {"split", "step", "label", "prediction"} - {*pq.read_schema(path).names}:
        raise ExplorerError(
            f"{path}: of an earlier version, without {', '.join(sorted(lacking))}; train the run again"
        )
    with duckdb.connect() as database:
        index = database.execute(query, [escape(str(path)), END]).df()  # duckdb reads paths as globs
    index = index.astype({"label": "Int64", "prediction": "Int64", "p_T": float, "p_S": float, "c": float})
    if labels:
        index["answer"] = [None if pd.isna(label) else labels[label] for label in index["label"]]
    index["correct"] = index["label"] == index["prediction"]
    index["disagreement"] = (index["p_T"] - index["p_S"]).abs()
    return index


def read_instances(path: Path, split: str, ids: Sequence[str]) -> pd.DataFrame:
    """Reads ``split``, ``example_id``, ``step``, ``p_T``, ``p_S`` and ``c`` of examples at every step.

    Only these columns are read: decoding every token of thousands of examples would take minutes.
    """
    names = {"teacher_probability": "p_T", "student_probability": "p_S", "instance_weight": "c"}
    columns = ["split", "example_id", "step", *names]
    chosen = [("split", "=", split), ("example_id", "in", set(ids))]
    table = pd.read_parquet(path, columns=columns, filters=chosen).rename(columns=names)
    return table.drop_duplicates(["example_id", "step"]).astype({"p_T": float, "p_S": float, "c": float})


@dataclass(frozen=True)
class Filter:
    """Conditions that examples of an index must meet, and their ``order`` (one of ``ORDERS``).

    ``text``: words that must all occur, in any case, in id, statements or answer. ``label``: a label's
    name, or an index if none is named so. ``correct``: True keeps examples that the student gets right.
    ``weight``: lowest and highest c. ``disagreement``: the least ``|p_T - p_S|``. ``concept``: "known" or
    "unknown" to the mini students' corpus; ``style``: of the picture. An example without c, p_T or p_S is
    dropped only by a condition on it.
    """

    text: str = ""
    label: str = ""
    split: str = ""
    correct: bool | None = None
    weight: tuple[float, float] = (0.0, float("inf"))
    disagreement: float = 0.0
    order: str = "as recorded"
    concept: str = ""
    style: str = ""

    def choose(self, index: pd.DataFrame) -> pd.DataFrame:
        """Returns the rows that meet all conditions, sorted, with a new index from 0."""
        if self.order not in ORDERS:
            raise ExplorerError(f"order={self.order!r}: expected one of {', '.join(ORDERS)}")
        keep = np.ones(len(index), dtype=bool)
        if self.text.split():
            texts = index["example_id"] + "\n" + index["text"] + "\n" + index["answer"].fillna("")
            texts = texts.str.lower()
            for word in self.text.lower().split():
                keep &= texts.str.contains(word, regex=False).to_numpy(dtype=bool)
        if self.label:
            named = index["answer"].fillna("").to_numpy(dtype=object) == self.label
            numbered = (index["label"].astype("string").fillna("") == self.label).to_numpy(dtype=bool)
            keep &= named if named.any() else numbered  # VQA has answers such as "2"
        for column in ("split", "concept", "style"):
            if wanted := getattr(self, column):
                keep &= (index[column] == wanted).to_numpy(dtype=bool)
        if self.correct is not None:
            keep &= (index["correct"] == self.correct).fillna(False).to_numpy(dtype=bool)
        low, high = self.weight
        if low > 0 or high < float("inf"):
            keep &= index["c"].between(low, high).to_numpy(dtype=bool)
        if self.disagreement > 0:
            keep &= (index["disagreement"] >= self.disagreement).to_numpy(dtype=bool)
        column, ascending = ORDERS[self.order]
        rows = index[keep]
        rows = rows.sort_values(column, ascending=ascending, kind="stable") if column else rows
        return rows.reset_index(drop=True)
