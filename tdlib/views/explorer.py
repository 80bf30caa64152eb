"""Looking into finished runs: which there are, which of their examples pass a filter, and each view of one.

Owns the index of run folders and the table of views that ``05_tokens`` and ``widgets`` offer. Does not
own the views (``views``, ``run_views``, ``attention_views``) nor any control. An index holds a row per
example, whatever the number of steps and choices; records and models are read when a view needs them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from glob import escape as escape_glob
from glob import glob
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from tdlib.config import RunConfig
from tdlib.core.paths import ROOT, resolve
from tdlib.core.records import END, TargetRecord, read_records
from tdlib.data.examples import Example, TextPart
from tdlib.data.tasks import task_of
from tdlib.views.runs import (
    alignment_view,
    difference_view,
    evolution_view,
    in_order,
    instance_view,
    of_statement,
    teacher_positions,
)
from tdlib.views.view import View, _page, comparison, picture_view, text_view

if TYPE_CHECKING:
    from tdlib.teacher.cache import TeacherCache
    from tdlib.training.prepare import Materials
    from tdlib.views.attention import Attention
    from tdlib.views.figures.targets import Figure

SELECTIONS = "selections.parquet"
MODALITIES = ("both", "text", "visual")
DRAWN_EXAMPLES = 2_000  # most whose instance weights are drawn together


class ExplorerError(ValueError):
    """What was asked for cannot be shown: says why, and what would have to be there."""


# Runs.


@dataclass(frozen=True)
class Run:
    """A run folder that holds selections. ``name`` is unique among the runs that it was found with."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The run's parameters, not validated anew: it may name functions that only its notebook had."""
        return RunConfig.model_construct(**json.loads((self.folder / "config.json").read_text("utf-8")))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The label set of a task without choices, as the stored student has it; else empty."""
        if task_of(self.config).data_set == "vcr":
            return ()
        known = json.loads((self.folder / "student" / "config.json").read_text("utf-8"))["id2label"]
        return tuple(known[str(i)] for i in range(len(known)))

    @cached_property
    def _shape(self) -> tuple[int, int]:
        stored = json.loads((self.folder / "student" / "config.json").read_text("utf-8"))
        return stored.get("num_hidden_layers", 0), stored.get("num_attention_heads", 0)

    @property
    def layers(self) -> int:
        """The stored student's layers with attention."""
        return self._shape[0]

    @property
    def heads(self) -> int:
        """The heads of each."""
        return self._shape[1]

    @cached_property
    def index(self) -> pd.DataFrame:
        """See ``read_index``."""
        return read_index(self.folder / SELECTIONS, self.labels)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The recorded steps, END last."""
        return recorded_steps(self.folder / SELECTIONS)

    def records(self, split: str, example_id: str, steps: Sequence[int] | None = None) -> list[TargetRecord]:
        """The records of one example, read from the file now; by step, the end last.

        Raises:
            ExplorerError: the run has none.
        """
        found = read_records(self.folder / SELECTIONS, steps, [(split, example_id)])
        if not found:
            at = "" if steps is None else f" at step {', '.join(map(str, steps))}"
            raise ExplorerError(f"{self.name} recorded nothing of {example_id!r} in {split!r}{at}")
        return in_order(found)


def find_runs(patterns: Sequence[str | Path], home: Path = ROOT) -> list[Run]:
    """The runs with selections under these paths or globs, each once, in the order given.

    Relative ones start at ``home``. A folder that is no run is searched for runs (so a batch's, or
    ``reports/runs``, names all in it).

    Raises:
        ExplorerError: a pattern fits nothing, or nothing that recorded selections.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A folder of this very name goes before a glob: "runs[v2]" is a name that people give.
        hits = [home / path] if (home / path).exists() else []
        if not hits:
            start = "" if path.is_absolute() else f"{escape_glob(str(home))}/"
            hits = sorted(map(Path, glob(f"{start}{path}", recursive=True)))
        if not hits:
            raise ExplorerError(f"{pattern}: no such folder (looked in {home}); give run folders or globs")
        found = [file.parent for hit in hits for file in _selections(hit)]
        if not found:
            raise ExplorerError(
                f"{pattern}: no run in it recorded selections ({SELECTIONS}); arms without a teacher have "
                "none, others need probe_examples above 0"
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [Run(name, folder) for name, folder in zip(short_names([*folders]), folders, strict=True)]


def _selections(folder: Path) -> list[Path]:
    """Selections in a folder or below it; hidden folders are unfinished runs."""
    own = folder / SELECTIONS
    if own.is_file():
        return [own]
    every = sorted(folder.rglob(SELECTIONS)) if folder.is_dir() else []
    return [f for f in every if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that tell it from the others."""
    names = []
    for folder in folders:
        for count in range(1, len(folder.parts) + 1):
            end = folder.parts[-count:]
            if sum(other.parts[-count:] == end for other in folders) == 1:
                break
        names.append("/".join(end).removeprefix("//"))
    return names


def run_named(runs: Sequence[Run], name: str) -> Run:
    """The run of this name.

    Raises:
        ExplorerError: there is none.
    """
    for run in runs:
        if run.name == name:
            return run
    raise ExplorerError(f"no run {name!r}; there are {', '.join(run.name for run in runs)}")


def companion(runs: Sequence[Run], first: Run) -> Run | None:
    """The run to compare with: of the same task, best of another arm, the same seed and the same student."""

    def likeness(run: Run) -> tuple[bool, ...]:
        a, b = first.config, run.config
        return a.student == b.student, a.arm != b.arm, a.seed == b.seed

    others = [run for run in runs if run is not first and run.config.task == first.config.task]
    return max(others, key=likeness, default=None)


# Examples.


def recorded_steps(path: Path) -> tuple[int, ...]:
    """The steps in a file of selections, END last."""
    if "step" not in pq.read_schema(path).names:
        return (END,)
    steps = pq.read_table(path, columns=["step"])["step"].unique().to_pylist()
    return tuple(sorted(steps, key=lambda step: (step == END, step)))


def read_index(path: Path, labels: Sequence[str] = ()) -> pd.DataFrame:
    """One row per example of a file of selections, as its last step has it, in the file's order.

    Columns ``split``, ``example_id``, ``label`` and ``prediction`` (indices), ``answer`` (the right
    choice's statement, or the label's name), ``correct``, ``p_T``, ``p_S``, ``c``, ``disagreement``
    (``|p_T - p_S|``), and ``text`` (all statements, a line each). Missing where there is no label.
    """
    last = recorded_steps(path)[-1]
    has_step = "step" in pq.read_schema(path).names
    query = f"""
        SELECT split, example_id, any_value(label) AS label, any_value(prediction) AS prediction,
            any_value(teacher_probability) AS "p_T", any_value(student_probability) AS "p_S",
            any_value(instance_weight) AS c, string_agg(text, chr(10) ORDER BY choice) AS text,
            any_value(text) FILTER (choice = label) AS answer
        FROM read_parquet(?, file_row_number = true) {"WHERE step = ?" if has_step else ""}
        GROUP BY split, example_id ORDER BY min(file_row_number)
    """
    with duckdb.connect() as database:
        index = database.execute(query, [escape_glob(str(path)), *([last] if has_step else [])]).df()
    index = index.astype({"label": "Int64", "prediction": "Int64"})
    index = index.astype({"p_T": float, "p_S": float, "c": float})
    if labels:
        index["answer"] = [None if pd.isna(label) else labels[label] for label in index["label"]]
    index["correct"] = index["label"] == index["prediction"]
    index["disagreement"] = (index["p_T"] - index["p_S"]).abs()
    return index


@dataclass(frozen=True)
class Filter:
    """Which examples of an index to show. An example without a number passes only where it is not asked for.

    ``text``: words that all occur (in any case) in id, statements or answer. ``label``: an index, or a
    label's name. ``correct``: whether the student is right. ``weight``: lowest and highest c.
    ``disagreement``: the least ``|p_T - p_S|``.
    """

    text: str = ""
    label: str = ""
    split: str = ""
    correct: bool | None = None
    weight: tuple[float, float] = (0.0, float("inf"))
    disagreement: float = 0.0

    def choose(self, index: pd.DataFrame) -> pd.DataFrame:
        """The rows that pass, in their order, numbered anew from 0."""
        keep = np.ones(len(index), dtype=bool)
        if self.text.split():
            texts = (
                index["example_id"] + "\n" + index["text"] + "\n" + index["answer"].fillna("")
            ).str.lower()
            for word in self.text.lower().split():
                keep &= texts.str.contains(word, regex=False).to_numpy(dtype=bool)
        if self.label:
            named = index["answer"].fillna("").to_numpy(dtype=object) == self.label
            keep &= named | (index["label"].astype("string").fillna("") == self.label).to_numpy(dtype=bool)
        if self.split:
            keep &= (index["split"] == self.split).to_numpy(dtype=bool)
        if self.correct is not None:
            keep &= (index["correct"] == self.correct).fillna(False).to_numpy(dtype=bool)
        low, high = self.weight
        if low > 0 or high < float("inf"):
            keep &= index["c"].between(low, high).to_numpy(dtype=bool)
        if self.disagreement > 0:
            keep &= (index["disagreement"] >= self.disagreement).to_numpy(dtype=bool)
        return index[keep].reset_index(drop=True)


# Views.


@dataclass(frozen=True)
class Look:
    """What to look at: an example of a run, and all that a view of it depends on.

    ``choice`` None: the right one (else the first). ``step``: a recorded one, or END; ``second`` and its
    ``second_step`` are what it is compared with. ``layers`` () are all, negative ones from the last;
    ``head`` None averages. ``modality``: one of ``MODALITIES``.
    """

    run: Run
    split: str
    example_id: str
    second: Run | None = None
    step: int = END
    second_step: int = END
    choice: int | None = None
    modality: str = "both"
    layers: tuple[int, ...] = ()
    head: int | None = None

    def record(self) -> TargetRecord:
        """The statement in the first run at its step."""
        return _statement(self, self.run, self.step)

    def names(self) -> tuple[str, str]:
        """What heads the two that are compared: run, and step where it is not the end."""
        assert self.second is not None
        pairs = (self.run, self.step), (self.second, self.second_step)
        first, second = (f"{run.name}{'' if step == END else f', step {step}'}" for run, step in pairs)
        return first, second


def _statement(look: Look, run: Run, step: int | None = None) -> TargetRecord:
    records = run.records(look.split, look.example_id, None if step is None else [step])
    try:
        return of_statement(records, look.example_id, look.choice, look.split)[-1]
    except ValueError as error:
        raise ExplorerError(str(error)) from None


def targeted(look: Look) -> View:
    """One statement: words and picture with their weights, or one of them."""
    record, name, labels = look.record(), look.run.name, look.run.labels
    if look.modality == "text":
        return text_view(record, name, labels)
    if look.modality == "visual":
        return picture_view(record, name, labels)
    return comparison(record, method=name, labels=labels)


def choices(look: Look) -> View:
    """All statements of a question below each other, on one scale."""
    records = look.run.records(look.split, look.example_id, [look.step])
    return comparison(records, method=look.run.name, labels=look.run.labels)


def two_runs(look: Look) -> View:
    """The same statement in two runs or at two steps, with the difference where they share tokens."""
    if look.second is None:
        raise ExplorerError("choose a second run (or the same run at another step) to compare with")
    first, second = look.record(), _statement(look, look.second, look.second_step)
    if first.text != second.text:
        raise ExplorerError(
            f"{look.example_id} in {look.split} reads {first.text!r} in {look.run.name} but "
            f"{second.text!r} in {look.second.name}: the runs are of different data"
        )
    try:
        return difference_view(first, second, look.names(), look.run.labels)
    except ValueError:  # students with other tokens: side by side, without a difference per token
        return comparison([first, second], look.names(), "two students", look.run.labels)


def evolution(look: Look) -> View:
    """One statement over the training."""
    if len(look.run.steps) < 2:
        raise ExplorerError(
            f"{look.run.name} recorded its selections only once; train it with probe_every above 0"
        )
    records = look.run.records(look.split, look.example_id)
    own = of_statement(records, look.example_id, look.record().choice, look.split)
    return evolution_view(own, look.run.labels)


def instance_weights(look: Look) -> View:
    """p_T, p_S and c of the example over training, and of all examples of its split (at most 2,000)."""
    index = look.run.index
    own = index[index["split"] == look.split]
    place = int(np.flatnonzero(own["example_id"] == look.example_id)[0])
    start = max(0, min(place - DRAWN_EXAMPLES // 2, len(own) - DRAWN_EXAMPLES))
    ids = own["example_id"].iloc[start : start + DRAWN_EXAMPLES]
    records = read_instances(look.run.folder / SELECTIONS, look.split, ids)
    try:
        return instance_view(records, look.example_id)
    except ValueError as error:
        raise ExplorerError(str(error)) from None


def read_instances(path: Path, split: str, ids: Sequence[str]) -> list[TargetRecord]:
    """A record per example and step with its probabilities and instance weight, and no tokens.

    Reads four narrow columns instead of decoding every token of every example.
    """
    has_step = "step" in pq.read_schema(path).names
    numbers = ["teacher_probability", "student_probability", "instance_weight"]
    columns = ["split", "example_id", "choice", *numbers, *(["step"] if has_step else [])]
    table = pq.read_table(path, columns=columns, filters=[("split", "=", split)]).to_pandas()
    table = table[table["example_id"].isin(list(ids))].drop_duplicates(
        ["example_id", *(["step"] if has_step else [])]
    )
    none: dict[str, Any] = dict.fromkeys(("relevance", "prior", "score", "weight"), np.zeros(0))
    none |= dict.fromkeys(("distilled", "selected"), np.zeros(0, dtype=bool))
    blank = TargetRecord(
        example_id="", choice=0, label=None, prediction=None, text="", references=(), image=Path(),
        object_boxes=(), object_names=(), tokens=(), spans=np.zeros((0, 2), dtype=int),
        boxes=np.zeros((0, 4)), teacher_probability=None, student_probability=None, instance_weight=None,
        split=split, **none,
    )  # fmt: skip
    rows = []
    for row in table.to_dict("records"):
        known: dict[str, Any] = {name: None if pd.isna(row[name]) else float(row[name]) for name in numbers}
        rows.append(replace(blank, example_id=row["example_id"], step=int(row.get("step", END)), **known))
    return rows


def alignment(look: Look) -> View:
    """Tokens of student and teacher and how they overlap."""
    record, cache = look.record(), open_teacher(look.run)
    cache.add(texts=[record.text], pictures=[record.image])
    return alignment_view(record, *teacher_positions(cache, record), labels=look.run.labels)


def student_attention(look: Look) -> View:
    """What the trained student's answer attends to."""
    from tdlib.views.attention import attention_view

    return attention_view(_student_maps(look, look.layers), head=look.head)


def student_heads(look: Look) -> View:
    """Every head of the trained student as a tile."""
    from tdlib.views.attention import heads_view

    return heads_view(_student_maps(look, look.layers))


def student_rollout(look: Look) -> View:
    """The trained student's attention, rolled out through all layers."""
    from tdlib.views.attention import rollout_view

    return rollout_view(_student_maps(look, ()))


def student_gradient(look: Look) -> View:
    """What brings about the trained student's logit of the statement, or of the label."""
    from tdlib.views.attention import attention_modules, gradient_relevance, named_record, relevance_view

    student, batch, record, tokenizer = _student_input(look)
    values = gradient_relevance(student, batch, record)
    last = len(attention_modules(student)) - 1
    answer = (record.prediction or 0) if record.label is None else record.label
    goal = f"label {look.run.labels[answer]}" if look.run.labels else f"choice {record.choice}"
    named = named_record(record, batch, tokenizer, len(values))
    return relevance_view(named, values, f"{look.run.name}: gradient relevance, layers 0 to {last}, {goal}")


def teacher_attention(look: Look) -> View:
    """What the teacher's pooled position attends to: in the picture, or in the text (modality "text")."""
    from tdlib.views.attention import attention_view
    from tdlib.views.attention import teacher_attention as read

    tower = "text" if look.modality == "text" else "image"
    maps = read(open_teacher(look.run).teacher, look.record(), tower, look.layers or None)
    return attention_view(maps, head=look.head)


def teacher_gradient(look: Look) -> View:
    """What brings text and picture together in the teacher."""
    from tdlib.views.attention import relevance_view, teacher_relevance

    values, record = teacher_relevance(open_teacher(look.run).teacher, look.record())
    return relevance_view(record, values, "teacher: gradient relevance of text and picture, all layers")


VIEWS: dict[str, Callable[[Look], View]] = {
    "statement and picture": targeted,
    "all choices": choices,
    "two runs": two_runs,
    "evolution": evolution,
    "instance weights": instance_weights,
    "alignment": alignment,
    "student: attention": student_attention,
    "student: heads": student_heads,
    "student: rollout": student_rollout,
    "student: gradient": student_gradient,
    "teacher: attention": teacher_attention,
    "teacher: gradient": teacher_gradient,
}


def show(look: Look, view: str) -> View:
    """One of ``VIEWS``.

    Raises:
        ExplorerError: the view is unknown, or what it shows is not there.
    """
    if view not in VIEWS:
        raise ExplorerError(f"view={view!r}: expected one of {', '.join(VIEWS)}")
    if look.modality not in MODALITIES:
        raise ExplorerError(f"modality={look.modality!r}: expected one of {', '.join(MODALITIES)}")
    for run, step in ((look.run, look.step), (look.second, look.second_step)):
        if run is not None and step not in run.steps:
            known = ", ".join("-1 (end)" if s == END else str(s) for s in run.steps)
            raise ExplorerError(f"{run.name} has no step {step}; it recorded {known}")
    return VIEWS[view](look)


def shown(look: Look, view: str) -> View:
    """As ``show``; where that cannot be shown, a view that says why, so that a page can go on."""
    from tdlib.teacher.model import TeacherError
    from tdlib.views.attention import AttentionError

    try:
        return show(look, view)
    except (ExplorerError, AttentionError, TeacherError) as error:
        return note(f"{view}: {error}")


def note(text: str) -> View:
    """A sentence in the frame of a view."""

    def figure() -> "Figure":
        raise ExplorerError(f"nothing is drawn: {text}")

    return View(_page(f"<div>{escape(text)}</div>"), (), figure, (), pd.DataFrame({"note": [text]}), text)


# Models of a run.


def open_teacher(run: Run) -> "TeacherCache":
    """The teacher's cache of a run, and with it the teacher."""
    from tdlib.training.prepare import teacher_cache

    return teacher_cache(run.config)


@lru_cache(maxsize=2)
def _open_student(run: Run) -> tuple[Any, Any]:
    from tdlib.students.registry import load_student
    from tdlib.training.prepare import encoder_of

    folder = run.folder
    cache = open_teacher(run) if "clip" in (run.config.regions, run.config.student) else None
    encoder = encoder_of(run.config, cache, str(folder / "student"))
    return load_student(str(folder / "student"), labels=run.labels).eval(), encoder


def example_of(run: Run, split: str, example_id: str) -> Example:
    """The example itself, from the run's data.

    Raises:
        ExplorerError: the data have no such example (any more).
    """
    from tdlib.training.prepare import read_split

    examples = read_split(run.config, split)
    try:
        return examples[list(examples.ids).index(example_id)]
    except ValueError:
        where = resolve(run.config.data_dir) or f"the MiniWorld of seed {run.config.world_seed}"
        raise ExplorerError(
            f"{example_id!r} is not in {split!r} of {where}: are the data those of {run.name}?"
        ) from None


def _student_input(look: Look) -> tuple[Any, Any, TargetRecord, Any]:
    """Student, batch of the example, record and tokenizer."""
    from tdlib.training.data import EncodedExamples, collate

    run, record = look.run, look.record()
    student, encoder = _open_student(run)
    example = example_of(run, look.split, look.example_id)
    encoder.prepare([example])
    data = EncodedExamples([example], encoder, num_labels=len(run.labels), modality=run.config.modality)
    return student, collate([data[0]], encoder), record, encoder.tokenizer


def _student_maps(look: Look, layers: Sequence[int]) -> "Attention":
    from tdlib.views.attention import student_attention as read

    student, batch, record, tokenizer = _student_input(look)
    return read(student, batch, record, layers or None, look.run.name, tokenizer)


# An example of one's own.


def own_example(picture: Path | str, text: str, answers: Sequence[str] = ()) -> Example:
    """A picture and a text of one's own: a statement, or a question with its ``answers``.

    Raises:
        ExplorerError: there is no text, or an answer is empty.
        DataError: the picture is missing or does not decode.
    """
    from tdlib.data.pictures import open_picture

    if not text.strip():
        raise ExplorerError("no text: write a statement, or a question with its answers")
    if any(not answer.strip() for answer in answers):
        raise ExplorerError(f"answers={list(answers)}: one of them is empty")
    path = Path(resolve(str(picture))).expanduser().resolve()
    open_picture(path)
    parts = tuple(TextPart(answer.strip()) for answer in answers)
    return Example(
        id=path.name, image=path, boxes=(), names=(), prompt=TextPart(text.strip()), choices=parts,
        label=None, stratum="own",
    )  # fmt: skip


def own_view(run: Run, materials: "Materials", example: Example) -> View:
    """What a run's method would select in an example of one's own, before any training.

    Args:
        run: whose settings count.
        materials: of ``experiments.prepare`` with these settings.
        example: see ``own_example``; of a task with labels, a statement alone.

    Raises:
        ExplorerError: answers in a task that has a label set.
    """
    from tdlib.training.recording import preview_targets

    if materials.labels and example.choices:
        raise ExplorerError(
            f"task {run.config.task} chooses from {len(materials.labels)} labels: give a text without answers"
        )
    records = preview_targets(run.config, materials, [example])
    return comparison(records, method=f"{run.name}, untrained student", labels=materials.labels)
