"""Makes each view of an example of a finished run, and opens what a view needs.

``VIEWS`` is the table that ``05_tokens`` and ``widgets`` offer. A view needs records, and some also the
teacher's cache, the trained student or the data. The views themselves are in the modules beside this one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tdlib.core.facts import title, token_names
from tdlib.core.paths import resolve
from tdlib.core.records import END, TargetRecord
from tdlib.data.examples import Example, TextPart, low_shot
from tdlib.data.pictures import open_picture
from tdlib.data.tasks import splits_of
from tdlib.method.alignment import align, aligned_targets, patch_shares
from tdlib.method.clip_td import choose_tokens
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.method.selection import SELECTORS, SelectionOptions, token_scores
from tdlib.method.weighting import TOKEN_WEIGHTS
from tdlib.students import attention as student_attentions
from tdlib.students.registry import load_student
from tdlib.teacher import attention as teacher_attentions
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.pipeline import teacher_tokens, token_centres
from tdlib.training.prepare import (
    PreparedData,
    add_to_cache,
    encoder_of,
    prepare,
    read_split,
    regions_cache,
    teacher_cache,
)
from tdlib.training.recording import preview_targets
from tdlib.views.alignment import alignment_view, teacher_positions, tokens_of
from tdlib.views.attention import attention_view, heads_view, relevance_view, rollout_view
from tdlib.views.compare import comparison, difference_view, sheets_view
from tdlib.views.evolution import evolution_view, instance_view, of_statement
from tdlib.views.figures.style import Figure
from tdlib.views.index import SELECTIONS, ExplorerError, Run, read_instances
from tdlib.views.lesson import lesson_view
from tdlib.views.sheet import value_sheet
from tdlib.views.view import View

MODALITIES = ("both", "text", "visual")
DRAWN_EXAMPLES = 2_000  # most whose instance weights are drawn together
DRAWN_WORDS = 3  # most whose conditioned targets are drawn below each other


@dataclass(frozen=True)
class ViewRequest:
    """An example of a run, with every setting that a view of it can depend on.

    ``choice`` None is the right one (the first, where none is known to be right). ``step`` is a recorded step
    or END. The view "two runs" compares with ``second`` at its ``second_step``. ``layers`` () are all layers;
    negative ones count from the last. ``head`` None averages the heads. ``modality`` is one of
    ``MODALITIES``. ``mass`` and ``temperature`` None are the run's; other values select anew, see
    ``reselected``. ``word`` picks the words of "conditioned targets" by their letters.
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
    word: str = ""

    def record(self) -> TargetRecord:
        """The statement in the first run at its step."""
        return _statement(self, self.run, self.step)

    def method(self) -> str:
        """The run's name, with the settings that differ from those it was trained with."""
        changed = {"mass": self.mass, "temperature": self.temperature}
        parts = [f"{name} {value:g} instead" for name, value in changed.items() if value is not None]
        return ", ".join([self.run.name, *parts])


def _statement(request: ViewRequest, run: Run, step: int) -> TargetRecord:
    records = run.records(request.split, request.example_id, [step])
    record = of_statement(records, request.example_id, request.choice, request.split)[-1]
    return reselected(run, record, request.mass, request.temperature)


def reselected(
    run: Run, record: TargetRecord, mass: float | None = None, temperature: float | None = None
) -> TargetRecord:
    """Selects and weighs the record's tokens anew, with another mass or temperature.

    Score, selection and token weights are computed by the method's functions from the recorded relevance and
    prior; nothing is trained. Raises an ExplorerError if the run's selector or token weight is a function
    that this process has not registered.
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
    selected, weight = choose_tokens(
        scores, tokens, valid, config.selector, options, config.token_weight, generator
    )
    return replace(record, score=scores.numpy(), selected=selected.numpy(), weight=weight.numpy())


# Views.


def targeted(request: ViewRequest) -> View:
    """Shows the weights of one statement: on its words and its picture, or on one of them."""
    words, picture = request.modality != "visual", request.modality != "text"
    return comparison(
        request.record(), method=request.method(), labels=request.run.labels, words=words, picture=picture
    )


def choices(request: ViewRequest) -> View:
    """Shows all statements of a question below each other, on one scale."""
    records = request.run.records(request.split, request.example_id, [request.step])
    changed = [reselected(request.run, record, request.mass, request.temperature) for record in records]
    return comparison(changed, method=request.method(), labels=request.run.labels)


def two_runs(request: ViewRequest) -> View:
    """Shows a statement in two runs or at two steps, with the difference where both have the same tokens."""
    if request.second is None:
        raise ExplorerError("choose a second run (or the same run at another step) to compare with")
    first, second = request.record(), _statement(request, request.second, request.second_step)
    if first.text != second.text:
        raise ExplorerError(
            f"{request.example_id} in {request.split} reads {first.text!r} in {request.run.name} but "
            f"{second.text!r} in {request.second.name}: the runs are of different data"
        )
    if request.run.labels != request.second.labels:
        raise ExplorerError(
            f"{request.run.name} and {request.second.name} have other answers to choose from "
            f"({len(request.run.labels)} and {len(request.second.labels)}): look at each by itself"
        )
    names = [
        f"{run.name}{'' if step == END else f', step {step}'}"
        for run, step in ((request.run, request.step), (request.second, request.second_step))
    ]
    try:
        return difference_view(first, second, names, request.run.labels)
    except ValueError:  # students with other tokens: side by side, without a difference per token
        return comparison([first, second], names, "two students", request.run.labels)


def evolution(request: ViewRequest) -> View:
    """Shows one statement over the training."""
    if len(request.run.steps) < 2:
        raise ExplorerError(
            f"{request.run.name} recorded its selections only once; train it with probe_every above 0"
        )
    records = request.run.records(request.split, request.example_id)
    choice = _statement(request, request.run, request.run.steps[-1]).choice
    return evolution_view(
        of_statement(records, request.example_id, choice, request.split), request.run.labels
    )


def instance_weights(request: ViewRequest) -> View:
    """Shows p_T, p_S and c of the example over training, and of all examples of its split (at most 2,000)."""
    index = request.run.index
    rows = index[index["split"] == request.split]
    place = int(np.flatnonzero(rows["example_id"] == request.example_id)[0])
    start = max(0, min(place - DRAWN_EXAMPLES // 2, len(rows) - DRAWN_EXAMPLES))
    ids = rows["example_id"].iloc[start : start + DRAWN_EXAMPLES]
    instances = read_instances(request.run.folder / SELECTIONS, request.split, ids)
    return instance_view(instances, request.example_id)


def lesson(request: ViewRequest) -> View:
    """Shows what CLIP and the student make of the texts with another picture, before and after training."""
    return lesson_view(request.run.records(request.split, request.example_id), request.run.labels)


def alignment(request: ViewRequest) -> View:
    """Shows the tokens of student and teacher and how they overlap."""
    record = request.record()
    positions = teacher_positions(teacher_cache(request.run.config), record)
    return alignment_view(record, *positions, labels=request.run.labels)


def conditioned_targets(request: ViewRequest) -> View:
    """Shows the patches that the targets of words are mixed from, in a run with conditioned targets.

    It draws words that contain ``word``, or the selected ones without it: at most ``DRAWN_WORDS``, those that
    weigh most. Table: a row per word and patch of the statement, ``share`` of the word's target.
    """
    run, record = request.run, request.record()
    if not run.config.conditioned_targets:
        raise ExplorerError(
            f"{run.name} mixes no word's target from patches; train it with conditioned_targets=True"
        )
    shares, names = conditioned_shares(run, record), token_names(record)
    words = np.flatnonzero(record.is_text & (shares.sum(1) > 0))
    patches = np.flatnonzero(shares[words].sum(0) > 0)
    data = pd.DataFrame(
        [(i, names[i], j, names[j], shares[i, j]) for i in words for j in patches],
        columns=["position", "token", "patch_position", "patch", "share"],
    )
    asked = request.word.strip().lower()
    drawn = [i for i in words if (asked in names[i].lower() if asked else record.selected[i])]
    if not drawn:
        said = f"contains {request.word!r}" if asked else "is selected; ask for one by its letters"
        raise ExplorerError(f"no word with a target in {record.text!r} {said}")
    drawn = sorted(drawn, key=lambda i: -record.weight[i])[:DRAWN_WORDS]
    sheets = [value_sheet(record, shares[i], f"“{names[i]}”", "of the word's target") for i in drawn]
    # one scale, or a word that all patches share alike would look as dark as one with a single patch
    scale = max((sheet.scale for sheet in sheets), key=lambda scale: scale.end)
    sheets = [replace(sheet, scale=scale) for sheet in sheets]
    heading = f"{title(record, run.labels)}: patches that the targets of words are mixed from"
    return sheets_view(heading, sheets, data, words=False, note=run.name)


def student_attention(request: ViewRequest) -> View:
    """Shows what the trained student's answer attends to."""
    maps = _student_maps(request, request.layers)
    return attention_view(maps, request.head, request.run.labels)


def student_heads(request: ViewRequest) -> View:
    """Shows every head of the trained student as a tile."""
    return heads_view(_student_maps(request, request.layers), request.run.labels)


def student_rollout(request: ViewRequest) -> View:
    """Shows the trained student's attention, rolled out through all layers."""
    return rollout_view(_student_maps(request, ()), request.run.labels)


def student_gradient(request: ViewRequest) -> View:
    """Shows which tokens bring about the trained student's logit of the statement, or of the label."""
    student, batch, record, tokenizer = _student_input(request)
    values = student_attentions.gradient_relevance(student, batch, record)
    last = len(student_attentions.attention_modules(student)) - 1
    answer = (record.prediction or 0) if record.label is None else record.label
    goal = f"label {request.run.labels[answer]}" if request.run.labels else f"choice {record.choice}"
    named = student_attentions.named_record(record, batch, tokenizer, len(values))
    method = f"{request.run.name}: gradient relevance, layers 0 to {last}, {goal}"
    return relevance_view(named, values, method, request.run.labels)


def teacher_attention(request: ViewRequest) -> View:
    """Shows what the teacher's pooled position attends to: in the picture, or with "text" in the text."""
    tower = "text" if request.modality == "text" else "image"
    teacher = teacher_cache(request.run.config).teacher
    maps = teacher_attentions.teacher_attention(teacher, request.record(), tower, request.layers or None)
    return attention_view(maps, request.head, request.run.labels)


def teacher_gradient(request: ViewRequest) -> View:
    """Shows which tokens bring text and picture together in the teacher."""
    teacher = teacher_cache(request.run.config).teacher
    values, record = teacher_attentions.teacher_relevance(teacher, request.record())
    method = "teacher: gradient relevance of text and picture, all layers"
    return relevance_view(record, values, method, request.run.labels)


# Each view, with the fields of a request that it depends on beside run and example. The explorer's controls
# of all other fields are greyed out.
VIEWS: dict[str, tuple[Callable[[ViewRequest], View], set[str]]] = {
    "statement and picture": (targeted, {"step", "choice", "modality", "mass", "temperature"}),
    "all choices": (choices, {"step", "mass", "temperature"}),
    "two runs": (two_runs, {"second", "second_step", "step", "choice", "mass", "temperature"}),
    "evolution": (evolution, {"choice"}),
    "instance weights": (instance_weights, set()),
    "re-paired lesson": (lesson, set()),
    "alignment": (alignment, {"choice"}),
    "conditioned targets": (conditioned_targets, {"choice", "word"}),
    "student: attention": (student_attention, {"choice", "layers", "head"}),
    "student: heads": (student_heads, {"choice", "layers"}),
    "student: rollout": (student_rollout, {"choice"}),
    "student: gradient": (student_gradient, {"choice"}),
    "teacher: attention": (teacher_attention, {"choice", "modality", "layers", "head"}),
    "teacher: gradient": (teacher_gradient, {"choice"}),
}


def show(request: ViewRequest, view: str) -> View:
    """Makes one of ``VIEWS``; raises a ValueError if it is unknown, or if the run lacks what it shows."""
    if view not in VIEWS:
        raise ExplorerError(f"view={view!r}: expected one of {', '.join(VIEWS)}")
    if request.modality not in MODALITIES:
        raise ExplorerError(f"modality={request.modality!r}: expected one of {', '.join(MODALITIES)}")
    for run, step in ((request.run, request.step), (request.second, request.second_step)):
        if run is not None and step not in run.steps:
            recorded = ", ".join("-1 (end)" if s == END else str(s) for s in run.steps)
            raise ExplorerError(f"{run.name} has no step {step}; it recorded {recorded}")
    return VIEWS[view][0](request)


def shown(request: ViewRequest, view: str) -> View:
    """As ``show``, but an error becomes a view that names it, so that the rest of a page is still made."""
    return attempted(view, lambda: show(request, view))


def attempted(what: str, make: Callable[[], View]) -> View:
    """Makes a view; if data or models are gone, one that says so."""
    try:
        return make()
    except (ValueError, OSError) as error:  # all errors of data and models are ValueErrors
        return note(f"{what}: {error}")


def note(text: str) -> View:
    """A sentence in the frame of a view."""
    return View(text, _nothing, {"text": text}, pd.DataFrame({"note": [text]}), pd.DataFrame(), body=" ")


def _nothing(text: str) -> Figure:
    raise ExplorerError(f"nothing is drawn: {text}")


# Models and data of a run.


@lru_cache(maxsize=2)
def _open_student(run: Run) -> tuple[Any, Any]:
    folder = run.folder
    cache = regions_cache(run.config) if "clip" in (run.config.regions, run.config.student) else None
    encoder = encoder_of(run.config, cache, str(folder / "student"))
    return load_student(str(folder / "student"), labels=run.labels).eval(), encoder


def example_of(run: Run, split: str, example_id: str) -> Example:
    """Reads the example from the run's data; raises an ExplorerError if it is not there (any more)."""
    examples = read_split(run.config, split)
    try:
        place = list(examples.ids).index(example_id)
    except ValueError:
        where = resolve(run.config.data_dir) or f"the MiniWorld of seed {run.config.world_seed}"
        raise ExplorerError(
            f"{example_id!r} is not in {split!r} of {where}: are the data those of {run.name}?"
        ) from None
    return examples[place]  # a DataError of the example itself names its own remedy


def _student_input(request: ViewRequest) -> tuple[Any, Any, TargetRecord, Any]:
    """Returns the trained student, the example as its batch, the record and the tokenizer."""
    run, record = request.run, request.record()
    example = example_of(run, request.split, request.example_id)
    texts = [statement.text for statement in example.statements()]
    text = texts[record.choice] if record.choice < len(texts) else ""
    if [text[start:end] for start, end in record.spans] != list(record.tokens):  # as they were written
        raise ExplorerError(
            f"{request.example_id} in {request.split} reads {text!r} by now, and {record.text!r} when "
            f"{run.name} was trained: the data have changed since"
        )
    student, encoder = _open_student(run)
    encoder.prepare([example])
    data = EncodedExamples([example], encoder, num_labels=len(run.labels), modality=run.config.modality)
    return student, collate([data[0]], encoder), record, encoder.tokenizer


def _student_maps(request: ViewRequest, layers: Sequence[int]) -> teacher_attentions.Attention:
    student, batch, record, tokenizer = _student_input(request)
    read = student_attentions.student_attention
    return read(student, batch, record, layers or None, request.run.name, tokenizer)


def agreement(run: Run, record: TargetRecord) -> np.ndarray:
    """Measures how well the teacher's tokens behind each two student tokens agree, (tokens, tokens).

    ``cos(u_i, u_j)`` of the aligned tokens that the run's relevance reads (value tokens for "value",
    projected ones otherwise), in [-1, 1]; 0 for tokens without a target. Relevance compares a token with
    the whole other modality; this compares it with each of the other's tokens.
    """
    vectors = _targets(run, record, "value" if run.config.relevance == "value" else "projected")
    return (vectors @ vectors.T).numpy()


def conditioned_shares(run: Run, record: TargetRecord) -> np.ndarray:
    """Computes the share of each patch in the run's target of each word, see ``alignment.patch_shares``."""
    centres = _centres(run) if run.config.centred_targets else None
    vectors = _targets(run, record, "projected", centres)
    return patch_shares(vectors, tokens_of(record), run.config.temperature).numpy()


def _targets(
    run: Run, record: TargetRecord, signal: str, centres: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """The targets of a record's tokens, (tokens, teacher_dim), before words are drawn to patches."""
    cache = teacher_cache(run.config)
    cache.add(texts=[record.text], pictures=[record.image])
    teacher = teacher_tokens([cache.text(record.text)], cache.picture(record.image))
    student = tokens_of(record, batched=True)
    centre = None if centres is None else torch.where(student.is_text.unsqueeze(-1), *centres)
    return aligned_targets(align(student, teacher.tokens), getattr(teacher, signal), centre)[0]


@lru_cache(maxsize=2)
def _centres(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean teacher tokens of texts and pictures that the run's targets are centred by."""
    subset = low_shot(read_split(run.config, splits_of(run.config)[0]), run.config.shots, run.config.seed)
    cache = teacher_cache(run.config)
    add_to_cache(cache, subset)
    return token_centres(cache, subset)


# A picture and a text of the user.


def own_example(picture: Path | str, text: str, answers: Sequence[str] = ()) -> Example:
    """Makes an example of your picture and text: a statement, or a question with its ``answers``."""
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


def own_view(run: Run, example: Example) -> View:
    """Shows what a run's method selects in your example (``own_example``) with the run's trained student.

    Raises an ExplorerError if the example has answers but the task has a label set, and so takes a statement
    alone.
    """
    prepared = prepared_data_of(run)
    if prepared.labels and example.choices:
        raise ExplorerError(
            f"task {run.config.task} chooses from {len(prepared.labels)} labels: give a text without answers"
        )
    if run.config.relevance in STUDENT_RELEVANCE:
        raise ExplorerError(
            f"{run.name} took relevance={run.config.relevance!r} through maps of its student, which were "
            "dropped after training: what it targeted is in its records alone"
        )
    records = preview_targets(prepared.config, prepared, [example])
    return comparison(records, method=f"{run.name}, trained student", labels=prepared.labels)


@lru_cache(maxsize=2)
def prepared_data_of(run: Run) -> PreparedData:
    """Prepares again what a run needed, with its trained student: data, encoder, cache, word statistics."""
    student = str(run.folder / "student")
    return prepare(run.config.model_copy(update={"student": student}), whole_splits=False)
