"""Each view of an example of a finished run, and what else can be asked of it.

Owns the table of views that ``05_tokens`` and ``widgets`` offer, and opens what they need: records, the
teacher's cache, the trained student, the data. It owns neither the views nor any control.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tdlib.core.paths import resolve
from tdlib.core.records import END, TargetRecord
from tdlib.data.examples import Example, TextPart
from tdlib.data.pictures import open_picture
from tdlib.method.alignment import align, aligned_targets
from tdlib.method.selection import SELECTORS, SelectionOptions, select, token_scores
from tdlib.method.weighting import TOKEN_WEIGHTS
from tdlib.students import attention as student_attentions
from tdlib.students.registry import load_student
from tdlib.teacher import attention as teacher_attentions
from tdlib.teacher.cache import TeacherCache
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.pipeline import teacher_tokens
from tdlib.training.prepare import PreparedData, encoder_of, prepare, read_split, teacher_cache
from tdlib.training.recording import preview_targets
from tdlib.views.alignment import alignment_view, teacher_positions, tokens_of
from tdlib.views.attention import attention_view, heads_view, relevance_view, rollout_view
from tdlib.views.compare import comparison, difference_view
from tdlib.views.figures.style import Figure
from tdlib.views.index import SELECTIONS, ExplorerError, Run, read_instances
from tdlib.views.lesson import lesson_view
from tdlib.views.training import evolution_view, instance_view, of_statement
from tdlib.views.view import View

MODALITIES = ("both", "text", "visual")
DRAWN_EXAMPLES = 2_000  # most whose instance weights are drawn together


@dataclass(frozen=True)
class Look:
    """What to look at: an example of a run, and all that a view of it depends on.

    ``choice`` None: the right one (else the first). ``step``: a recorded one, or END; ``second`` and its
    ``second_step`` are what it is compared with. ``layers`` () are all, negative ones from the last;
    ``head`` None averages. ``modality``: one of ``MODALITIES``. ``mass`` and ``temperature`` None are the
    run's; others select anew, see ``reselected``.
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
    mass: float | None = None
    temperature: float | None = None

    def record(self) -> TargetRecord:
        """The statement in the first run at its step."""
        return _statement(self, self.run, self.step)

    def names(self) -> tuple[str, str]:
        """What heads the two that are compared: run, and step where it is not the end."""
        assert self.second is not None
        pairs = (self.run, self.step), (self.second, self.second_step)
        first, second = (f"{run.name}{'' if step == END else f', step {step}'}" for run, step in pairs)
        return first, second

    def method(self) -> str:
        """The run, and what was changed of its settings."""
        changed = {"mass": self.mass, "temperature": self.temperature}
        parts = [f"{name} {value:g} instead" for name, value in changed.items() if value is not None]
        return ", ".join([self.run.name, *parts])


def _statement(look: Look, run: Run, step: int) -> TargetRecord:
    records = run.records(look.split, look.example_id, [step])
    try:
        record = of_statement(records, look.example_id, look.choice, look.split)[-1]
    except ValueError as error:
        raise ExplorerError(str(error)) from None
    return reselected(run, record, look.mass, look.temperature)


def reselected(
    run: Run, record: TargetRecord, mass: float | None = None, temperature: float | None = None
) -> TargetRecord:
    """The record as the run's method would have it with another mass or temperature.

    Score, selection and token weights are computed anew from the recorded relevance and prior by the
    method's functions; nothing is trained. Raises an ExplorerError where the run's selector or token weight
    is a function that is not known here.
    """
    if mass is None and temperature is None:
        return record
    config = run.config
    if config.selector not in SELECTORS or config.token_weight not in TOKEN_WEIGHTS:
        raise ExplorerError(
            f"{run.name} selects by {config.selector!r} and weighs by {config.token_weight!r}: register "
            "these functions first (SELECTORS, TOKEN_WEIGHTS)"
        )
    tokens = tokens_of(record)
    relevance, prior = (torch.as_tensor(part).float() for part in (record.relevance, record.prior))
    valid = torch.as_tensor(record.distilled).bool()
    options = SelectionOptions(
        config.mass if mass is None else mass, config.count, config.fraction, config.deviations
    )
    heat = config.temperature if temperature is None else temperature
    scores = token_scores(relevance, prior, tokens, valid, heat, config.prior_weight)
    generator = torch.Generator().manual_seed(config.seed)
    selected = select(scores, tokens, valid, config.selector, options, generator)
    weight = TOKEN_WEIGHTS[config.token_weight](scores, selected)
    return replace(record, score=scores.numpy(), selected=selected.numpy(), weight=weight.numpy())


# Views.


def targeted(look: Look) -> View:
    """One statement: words and picture with their weights, or one of them."""
    words, picture = look.modality != "visual", look.modality != "text"
    return comparison(
        look.record(), method=look.method(), labels=look.run.labels, words=words, picture=picture
    )


def choices(look: Look) -> View:
    """All statements of a question below each other, on one scale."""
    records = look.run.records(look.split, look.example_id, [look.step])
    changed = [reselected(look.run, record, look.mass, look.temperature) for record in records]
    return comparison(changed, method=look.method(), labels=look.run.labels)


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
    choice = _statement(look, look.run, look.run.steps[-1]).choice
    return evolution_view(of_statement(records, look.example_id, choice, look.split), look.run.labels)


def instance_weights(look: Look) -> View:
    """p_T, p_S and c of the example over training, and of all examples of its split (at most 2,000)."""
    index = look.run.index
    rows = index[index["split"] == look.split]
    place = int(np.flatnonzero(rows["example_id"] == look.example_id)[0])
    start = max(0, min(place - DRAWN_EXAMPLES // 2, len(rows) - DRAWN_EXAMPLES))
    ids = rows["example_id"].iloc[start : start + DRAWN_EXAMPLES]
    instances = read_instances(look.run.folder / SELECTIONS, look.split, ids)
    try:
        return instance_view(instances, look.example_id)
    except ValueError as error:
        raise ExplorerError(str(error)) from None


def lesson(look: Look) -> View:
    """What CLIP and the student make of the texts with another picture, before and after training."""
    try:
        return lesson_view(look.run.records(look.split, look.example_id))
    except ValueError as error:
        raise ExplorerError(f"{look.run.name}: {error}") from None


def alignment(look: Look) -> View:
    """Tokens of student and teacher and how they overlap."""
    record = look.record()
    return alignment_view(record, *teacher_positions(open_teacher(look.run), record), labels=look.run.labels)


def student_attention(look: Look) -> View:
    """What the trained student's answer attends to."""
    return attention_view(_student_maps(look, look.layers), head=look.head)


def student_heads(look: Look) -> View:
    """Every head of the trained student as a tile."""
    return heads_view(_student_maps(look, look.layers))


def student_rollout(look: Look) -> View:
    """The trained student's attention, rolled out through all layers."""
    return rollout_view(_student_maps(look, ()))


def student_gradient(look: Look) -> View:
    """What brings about the trained student's logit of the statement, or of the label."""
    student, batch, record, tokenizer = _student_input(look)
    values = student_attentions.gradient_relevance(student, batch, record)
    last = len(student_attentions.attention_modules(student)) - 1
    answer = (record.prediction or 0) if record.label is None else record.label
    goal = f"label {look.run.labels[answer]}" if look.run.labels else f"choice {record.choice}"
    named = student_attentions.named_record(record, batch, tokenizer, len(values))
    return relevance_view(named, values, f"{look.run.name}: gradient relevance, layers 0 to {last}, {goal}")


def teacher_attention(look: Look) -> View:
    """What the teacher's pooled position attends to: in the picture, or in the text (modality "text")."""
    tower = "text" if look.modality == "text" else "image"
    teacher = open_teacher(look.run).teacher
    maps = teacher_attentions.teacher_attention(teacher, look.record(), tower, look.layers or None)
    return attention_view(maps, head=look.head)


def teacher_gradient(look: Look) -> View:
    """What brings text and picture together in the teacher."""
    values, record = teacher_attentions.teacher_relevance(open_teacher(look.run).teacher, look.record())
    return relevance_view(record, values, "teacher: gradient relevance of text and picture, all layers")


# Each view, and what of a look it depends on beside run and example; other controls are of no use to it.
VIEWS: dict[str, tuple[Callable[[Look], View], set[str]]] = {
    "statement and picture": (targeted, {"step", "choice", "modality", "mass", "temperature"}),
    "all choices": (choices, {"step", "mass", "temperature"}),
    "two runs": (two_runs, {"second", "second_step", "step", "choice", "mass", "temperature"}),
    "evolution": (evolution, {"choice"}),
    "instance weights": (instance_weights, set()),
    "re-paired lesson": (lesson, set()),
    "alignment": (alignment, {"choice"}),
    "student: attention": (student_attention, {"choice", "layers", "head"}),
    "student: heads": (student_heads, {"choice", "layers"}),
    "student: rollout": (student_rollout, {"choice"}),
    "student: gradient": (student_gradient, {"choice"}),
    "teacher: attention": (teacher_attention, {"choice", "modality", "layers", "head"}),
    "teacher: gradient": (teacher_gradient, {"choice"}),
}


def show(look: Look, view: str) -> View:
    """One of ``VIEWS``; an ExplorerError where it is unknown, or what it shows is not there."""
    if view not in VIEWS:
        raise ExplorerError(f"view={view!r}: expected one of {', '.join(VIEWS)}")
    if look.modality not in MODALITIES:
        raise ExplorerError(f"modality={look.modality!r}: expected one of {', '.join(MODALITIES)}")
    for run, step in ((look.run, look.step), (look.second, look.second_step)):
        if run is not None and step not in run.steps:
            known = ", ".join("-1 (end)" if s == END else str(s) for s in run.steps)
            raise ExplorerError(f"{run.name} has no step {step}; it recorded {known}")
    return VIEWS[view][0](look)


def shown(look: Look, view: str) -> View:
    """As ``show``; where that cannot be shown, a view that says why, so that a page can go on."""
    return attempted(view, lambda: show(look, view))


def attempted(what: str, make: Callable[[], View]) -> View:
    """The view; or one that says why there is none, such as data or models that are gone."""
    try:
        return make()
    except (ValueError, OSError) as error:  # ExplorerError, DataError, TeacherError and their like are such
        return note(f"{what}: {error}")


def note(text: str) -> View:
    """A sentence in the frame of a view."""
    return View(text, _nothing, {"text": text}, pd.DataFrame({"note": [text]}), pd.DataFrame(), body=" ")


def _nothing(text: str) -> Figure:
    raise ExplorerError(f"nothing is drawn: {text}")


# Models and data of a run.


def open_teacher(run: Run) -> TeacherCache:
    """The teacher's cache of a run, and with it the teacher."""
    return teacher_cache(run.config)


@lru_cache(maxsize=2)
def _open_student(run: Run) -> tuple[Any, Any]:
    folder = run.folder
    cache = open_teacher(run) if "clip" in (run.config.regions, run.config.student) else None
    encoder = encoder_of(run.config, cache, str(folder / "student"))
    return load_student(str(folder / "student"), labels=run.labels).eval(), encoder


def example_of(run: Run, split: str, example_id: str) -> Example:
    """The example itself, from the run's data; an ExplorerError if they have no such one (any more)."""
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
    run, record = look.run, look.record()
    example = example_of(run, look.split, look.example_id)
    student, encoder = _open_student(run)
    encoder.prepare([example])
    data = EncodedExamples([example], encoder, num_labels=len(run.labels), modality=run.config.modality)
    return student, collate([data[0]], encoder), record, encoder.tokenizer


def _student_maps(look: Look, layers: Sequence[int]) -> teacher_attentions.Attention:
    student, batch, record, tokenizer = _student_input(look)
    read = student_attentions.student_attention
    return read(student, batch, record, layers or None, look.run.name, tokenizer)


def agreement(run: Run, record: TargetRecord) -> np.ndarray:
    """How well the teacher's token of each student token agrees with that of each other, (tokens, tokens).

    ``cos(u_i, u_j)`` of the aligned targets that the run's relevance reads (value tokens for "value",
    projected ones otherwise), in [-1, 1]; 0 for tokens without a target. Relevance compares a token with
    the whole other modality; this is the same comparison token by token.
    """
    cache = open_teacher(run)
    cache.add(texts=[record.text], pictures=[record.image])
    teacher = teacher_tokens([cache.text(record.text)], cache.picture(record.image))
    tokens = teacher.value if run.config.relevance == "value" else teacher.projected
    vectors = aligned_targets(align(tokens_of(record, batched=True), teacher.tokens), tokens)[0]
    return (vectors @ vectors.T).numpy()


# An example of one's own.


def own_example(picture: Path | str, text: str, answers: Sequence[str] = ()) -> Example:
    """A picture and a text of yours: a statement, or a question with its ``answers``, none of them empty."""
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


def own_view(run: Run, example: Example, prepared: PreparedData | None = None) -> View:
    """What a run's method selects in an example of yours (``own_example``), with the run's trained student.

    ``prepared`` are of ``training.prepare.prepare`` with the run's settings; made if None. A task that has a
    label set takes a statement alone: an ExplorerError if there are answers.
    """
    prepared = prepared or prepared_data_of(run)
    if prepared.labels and example.choices:
        raise ExplorerError(
            f"task {run.config.task} chooses from {len(prepared.labels)} labels: give a text without answers"
        )
    config = run.config.model_copy(update={"student": str(run.folder / "student")})
    records = preview_targets(config, prepared, [example])
    return comparison(records, method=f"{run.name}, trained student", labels=prepared.labels)


@lru_cache(maxsize=2)
def prepared_data_of(run: Run) -> PreparedData:
    """What a run needed before it trained, prepared again: data, encoder, cache, word statistics."""
    return prepare(run.config, whole_splits=False)
