"""Records of what was targeted, for several files of tests."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tdlib.core.records import TargetRecord
from tdlib.data.examples import Reference
from tdlib.views.compare import comparison

TEXT = "Why is Casey angry? The heat is unbearable."
SPANS = [
    (0, 3), (4, 6), (7, 12), (13, 18), (18, 19), (20, 23), (24, 28), (29, 31), (32, 34), (34, 42), (42, 43)
]  # fmt: skip
PATCHES = [(c / 3, r / 3, (c + 1) / 3, (r + 1) / 3) for r in range(3) for c in range(3)]
SIZE = 1 + len(SPANS) + len(PATCHES)
EVIL = '<script>alert("1")</script>'


def blank_record(image, closed: bool) -> TargetRecord:
    """[CLS], 11 text tokens, [SEP] if ``closed``, 9 patches; nothing is selected, every number is 0."""
    none = [(0, 0)] * closed
    spans = np.array([(0, 0), *SPANS, *none, *[(0, 0)] * len(PATCHES)])
    zeros = np.zeros(len(spans))
    return TargetRecord(
        example_id="val-3", choice=1, label=1, prediction=0, text=TEXT, references=(), image=image,
        object_boxes=(), object_names=(), spans=spans, split="val",
        tokens=("", *(TEXT[a:b] for a, b in SPANS), *[""] * closed, *[""] * len(PATCHES)),
        boxes=np.array([(0.0, 0.0, 0.0, 0.0)] * (len(spans) - len(PATCHES)) + PATCHES),
        distilled=np.arange(len(spans)) > 0, relevance=zeros, prior=zeros, score=zeros,
        selected=zeros > 0, weight=zeros, teacher_probability=None, student_probability=None,
        instance_weight=None,
    )  # fmt: skip


def make_record(image, **changes) -> TargetRecord:
    """With [SEP]; selected: "angry", "heat", "un", patches 0 and 4; all that may be known is known."""
    blank, weight = blank_record(image, closed=True), np.zeros(2 + len(SPANS) + len(PATCHES))
    weight[[4, 7, 9, 13, 17]] = 0.125, 0.25, 0.125, 0.1, 0.4
    record = replace(
        blank, example_id="val-12", choice=2, label=2, prediction=1, references=(Reference(7, 12, (0, 1)),),
        object_names=("person", "cat"), object_boxes=((0.25, 0.25, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)),
        tokens=("[CLS]", *blank.tokens[1:12], "[SEP]", *blank.tokens[13:]), split="",
        distilled=~np.isin(np.arange(22), (0, 1, 12)), relevance=np.linspace(-0.3, 0.3, 22),
        prior=np.linspace(0, 1, 22), score=weight / 2, selected=weight > 0, weight=weight,
        instance_weight=0.5, teacher_probability=0.75, student_probability=0.25,
        relevant_spans=((13, 18), (24, 42)), relevant_boxes=((0.35, 0.02, 0.45, 0.12),),
    )  # fmt: skip
    return replace(record, **changes)


def drawn_record(image, seed: int = 0, **changes) -> TargetRecord:
    """Without [SEP]; a selection and numbers drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    score = rng.random(SIZE)
    selected = (rng.random(SIZE) < 0.4) & (np.arange(SIZE) > 0)
    selected[4] = True
    weight = np.where(selected, score, 0) / score[selected].sum()
    record = replace(
        blank_record(image, closed=False), relevance=score, prior=score, score=score, selected=selected,
        weight=weight, teacher_probability=0.7, student_probability=float(rng.random()),
        instance_weight=float(rng.random()), relevant_spans=((13, 18),),
        relevant_boxes=((0.0, 0.0, 0.3, 0.3),),
    )  # fmt: skip
    return replace(record, **changes)


def without_selection(record: TargetRecord) -> TargetRecord:
    nothing = np.zeros_like(record.weight)
    return replace(record, selected=nothing.astype(bool), weight=nothing)


def bare(record: TargetRecord) -> TargetRecord:
    """All that may be unknown is unknown."""
    return replace(
        record, label=None, prediction=None, teacher_probability=None, student_probability=None,
        instance_weight=None, relevant_spans=(), relevant_boxes=(), references=(),
        object_boxes=(), object_names=(),
    )  # fmt: skip


def only(record: TargetRecord, mask: np.ndarray) -> TargetRecord:
    arrays = ["spans", "boxes", "distilled", "relevance", "prior", "score", "selected", "weight"]
    tokens = tuple(token for token, keep in zip(record.tokens, mask, strict=True) if keep)
    return replace(record, tokens=tokens, **{name: getattr(record, name)[mask] for name in arrays})


def evil_record(record: TargetRecord) -> TargetRecord:
    text = f'{EVIL} $x$ & "it\'s"'
    spans = record.spans.copy()
    spans[1:12] = [(0, len(EVIL)), (len(EVIL) + 1, len(EVIL) + 4), *[(len(text) - 4, len(text))] * 9]
    return replace(  # \x01 is not allowed in XML
        record, text=text, spans=spans, tokens=(EVIL,) * 22, example_id=f"{EVIL}\x01$y$",
        object_names=(f"{EVIL}$", "$a_b$"), references=(Reference(0, 3, (0,)),),
    )  # fmt: skip


VARIANTS = {
    "full": lambda record: record,
    "unknown": bare,
    "nothing selected": without_selection,
    "no visual tokens": lambda record: only(record, ~record.is_visual),
    "no text tokens": lambda record: only(record, record.is_visual),
    "regions": lambda record: replace(record, boxes=record.boxes * 0.9 + 0.05 * record.is_visual[:, None]),
    "[CLS] selected": lambda record: replace(record, selected=record.selected | (np.arange(22) == 0)),
    "evil": evil_record,
}
text_view, picture_view = partial(comparison, picture=False), partial(comparison, words=False)
VIEWS = {"text": text_view, "picture": picture_view, "comparison": comparison}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
