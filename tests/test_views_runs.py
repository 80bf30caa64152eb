"""Views of several records: two runs, a training, two tokenisations, measures; and that they are safe."""

import math
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from html_page import problems
from hypothesis import given
from hypothesis.extra.numpy import arrays
from records import EVIL, SIZE, SPANS, drawn_record

from tdlib.analysis.masking import Curves
from tdlib.core.records import END, TargetRecord
from tdlib.teacher import attention as teacher_attentions
from tdlib.views import alignment, compare, evolution, measures
from tdlib.views import attention as attention_views
from tdlib.views.view import View

STEPS = (0, 10, 20, END)


# Two runs


def test_the_difference_of_a_run_with_itself_is_zero(image):
    record = drawn_record(image)
    view = compare.difference_view(record, replace(record, step=3))
    data = view.table()
    assert not data["difference"].any() and set(data["change"]) == {"both", ""}
    assert "0 gained, 0 lost; 0.0 % of the weight moved" in repr(view)


def test_a_difference_is_second_minus_first_and_turns_its_sign(image):
    a, b = drawn_record(image), drawn_record(image, seed=1)
    data = compare.difference_view(a, b).table()
    np.testing.assert_allclose(data["difference"], b.weight - a.weight)
    np.testing.assert_array_equal(data["change"] == "gained", b.selected & ~a.selected)
    np.testing.assert_array_equal(data["change"] == "lost", a.selected & ~b.selected)
    turned = compare.difference_view(b, a).table()
    np.testing.assert_allclose(turned["difference"], -data["difference"])
    html = compare.difference_view(a, b, names=("naive", "clip_td")).to_html()
    for row in data[(data["kind"] == "text") & (data["change"] != "")].itertuples():
        sign = "+" if row.difference > 0 else "−"
        assert f"{sign}{100 * abs(row.difference):.1f}" in html
    assert "clip_td − naive" in html


def test_what_cannot_be_compared_is_refused(image):
    record = drawn_record(image)
    with pytest.raises(ValueError, match="different statements"):
        compare.difference_view(record, replace(record, choice=2))
    with pytest.raises(ValueError, match="different tokens"):
        compare.difference_view(record, replace(record, boxes=record.boxes * 0.9))
    with pytest.raises(ValueError, match="1 names"):
        compare.difference_view(record, record, names=("a",))


# Training


@given(arrays(bool, 6), arrays(bool, 6))
def test_turnover_is_a_distance_in_the_unit_interval(a, b):
    found = evolution.turnover(a, b)
    assert 0 <= found <= 1 and found == evolution.turnover(b, a)
    assert (found == 0) == np.array_equal(a, b)
    if (a | b).any():
        assert found == pytest.approx(1 - len({*np.flatnonzero(a)} & {*np.flatnonzero(b)})
                                      / len({*np.flatnonzero(a)} | {*np.flatnonzero(b)}))  # fmt: skip


def test_the_heat_map_is_the_records(history):
    own = evolution.of_statement(history, "val-3")
    assert [record.step for record in own] == list(STEPS)
    data = evolution.evolution_view(own).table()
    assert len(data) == len(STEPS) * SIZE
    for order, record in enumerate(own):
        part = data[data["order"] == order]
        assert set(part["step"]) == {record.step}
        np.testing.assert_array_equal(part["weight"], record.weight)
        np.testing.assert_array_equal(part["selected"], record.selected)
    figure = evolution.evolution_view(own).figure()
    images = [image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    words = next(image for image in images if image.get_array().shape == (len(SPANS), len(STEPS)))
    drawn = words.get_array()
    for column, record in enumerate(own):
        chosen = record.selected[1:12]
        np.testing.assert_array_equal(~np.ma.getmaskarray(drawn)[:, column], chosen)
        np.testing.assert_allclose(drawn[chosen, column], 100 * record.weight[1:12][chosen])
    numbers = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {f"{100 * w:.1f}" for r in own for w in r.weight[1:12][r.selected[1:12]]} <= numbers
    highlights = [replace(record, truth="e-SNLI highlights") for record in own]
    below = [axes.get_xlabel() for axes in evolution.evolution_view(highlights).figure().axes]
    assert "training step (updates); * decides the answer (e-SNLI highlights)" in below


def test_turnover_compares_each_step_with_the_one_before(history):
    for example in ("val-3", "val-4"):
        own = evolution.of_statement(history, example)
        data = evolution.turnover_table(own).set_index("step")
        assert math.isnan(data.loc[0, "turnover_text"])
        for before, after in pairwise(own):
            row = data.loc[after.step]
            text = evolution.turnover(before.selected[:12], after.selected[:12])
            visual = evolution.turnover(before.selected[12:], after.selected[12:])
            assert row["turnover_visual"] == visual
            assert row["turnover_text"] == text and row["selected_text"] == after.selected[:12].sum()
            assert row["selected_visual"] == after.selected[12:].sum()
            assert row["p_S"] == after.student_probability and row["c"] == after.instance_weight


def test_records_of_two_runs_are_not_one_evolution(history, image):
    with pytest.raises(ValueError, match="two records of"):
        evolution.evolution_view([*evolution.of_statement(history, "val-3"), drawn_record(image, step=10)])
    with pytest.raises(ValueError, match="no records"):
        evolution.evolution_view([])
    with pytest.raises(ValueError, match="different statements"):
        evolution.evolution_view(history)
    with pytest.raises(ValueError, match="there are val-3, val-4"):
        evolution.of_statement(history, "val-9")


def test_instance_weights_are_the_records(history):
    unlabelled = replace(history[0], label=None, instance_weight=None, example_id="val-5")
    view = evolution.instance_view([*history, unlabelled], "val-4")
    data = view.table()
    assert len(data) == len(history)
    for record in history:
        row = data[(data["example_id"] == record.example_id) & (data["step"] == record.step)].iloc[0]
        assert (row["p_T"], row["p_S"], row["c"]) == (0.7, record.student_probability, record.instance_weight)
    assert data.groupby("step")["order"].first().to_dict() == {0: 0, 10: 1, 20: 2, END: 3}
    assert "c of val-4" in view.to_html()
    with pytest.raises(ValueError, match="no record has an instance weight"):
        evolution.instance_view([unlabelled])
    with pytest.raises(ValueError, match="'val-9'; there are val-3, val-4"):
        evolution.instance_view(history, "val-9")


# Alignment

TEACHER_SPANS = np.array(
    [(0, 3), (4, 6), (7, 9), (9, 12), (13, 18), (18, 19), (20, 23), (24, 28), (29, 31), (32, 42)]
)


TEACHER_BOXES = np.array([(c / 2, r / 2, (c + 1) / 2, (r + 1) / 2) for r in range(2) for c in range(2)])


def test_alignment_says_which_tokens_overlap(image):
    record = drawn_record(image)
    view = alignment.alignment_view(record, TEACHER_SPANS, TEACHER_BOXES)
    data = view.table()
    sums = data.groupby("position")["share"].sum()
    assert np.allclose(sums, 1) and set(sums.index) == {*range(1, 11), *range(12, 21)}, "'.' has no target"
    casey = data[data["token"] == "Casey"].set_index("teacher_token")["share"]
    assert casey.to_dict() == pytest.approx({"Ca": 0.4, "sey": 0.6})
    for part in ("un", "bearable"):
        assert data[data["token"] == part]["teacher_token"].tolist() == ["unbearable"]
    corner = data[data["position"] == 12]
    assert corner["teacher_position"].tolist() == [10] and set(corner["kind"]) == {"visual"}
    middle = data[data["position"] == 16]
    assert middle["share"].tolist() == pytest.approx([0.25] * 4)
    html = unescape(view.to_html())
    assert "Ca 40 %, sey 60 %" in html and "1 of the student's without a target" in html


# Every view


def evil(record: TargetRecord) -> TargetRecord:
    text = f"{EVIL} $x$ {EVIL}" + " " * 10
    text = text + "." * (43 - len(text)) if len(text) < 43 else text
    spans = record.spans.copy()
    spans[1] = (0, len(EVIL))
    return replace(
        record, text=text, spans=spans, tokens=(EVIL,) * SIZE, example_id=f"{EVIL}$y$ {record.example_id}"
    )


def quality(source: str) -> pd.DataFrame:
    numbers = {"value": 0.5, "low": 0.4, "high": 0.7, "n": 8, "pictures": 4}
    rows = [
        {"modality": "text", "metric": metric, "source": name, **numbers}
        for metric in ("auc", "ap")
        for name in ("targeting", source)
    ]
    return pd.DataFrame(rows).assign(gain=[np.nan, 0.1] * 2, gain_low=-0.1, gain_high=0.3)


def test_measures_are_shown_as_they_are(image):
    view = measures.quality_view(quality("random"))
    pd.testing.assert_frame_equal(view.table(), quality("random"))
    assert "0.500 [0.400, 0.700]" in view.to_html() and "+0.100 [-0.100, +0.300]" in view.to_html()
    curve = np.array([1.0, 0.5, 0.0])
    curves = measures.curves_view(
        drawn_record(image), {"targeting": Curves(np.array([0, 0.5, 1]), curve, curve)}
    )
    assert curves.table()["deletion"].tolist() == [1.0, 0.5, 0.0]
    assert re.search(r"targeting +0\.5 +0\.5", repr(curves))
    with pytest.raises(ValueError, match="no rows"):
        measures.quality_view(quality("random")[:0])


def all_views(history: list[TargetRecord]) -> dict[str, View]:
    own = [record for record in history if record.example_id == history[0].example_id]
    ordered = evolution.in_order(own)
    record = own[0]
    maps = np.full((2, 3, SIZE, SIZE), 1 / SIZE)
    attention = teacher_attentions.Attention(maps, (0, 1), record, 0, EVIL)
    return {
        "difference": compare.difference_view(ordered[0], ordered[-1], names=(EVIL, "b")),
        "evolution": evolution.evolution_view(ordered),
        "instances": evolution.instance_view(history, record.example_id),
        "alignment": alignment.alignment_view(record, TEACHER_SPANS, TEACHER_BOXES),
        "attention": attention_views.attention_view(attention),
        "rollout": attention_views.rollout_view(attention),
        "heads": attention_views.heads_view(attention),
        "relevance": attention_views.relevance_view(record, np.arange(SIZE), EVIL),
        "quality": measures.quality_view(quality(EVIL), EVIL),
        "curves": measures.curves_view(record, {EVIL: Curves(*[np.linspace(0, 1, 5)] * 3)}),
    }


def test_every_view_is_safe_html_figure_and_table(history):
    """With markup in every string of the data."""
    for name, view in all_views([evil(record) for record in history]).items():
        html = view.to_html()
        assert not problems(html), name
        assert "<script" not in html.lower() and "&lt;script&gt;" in html
        assert isinstance(view.table(), pd.DataFrame) and len(view.table())
        assert EVIL in repr(view)
        if name in ("difference", "heads"):
            assert view.to_png(dpi=30).startswith(b"\x89PNG") and view.to_svg().startswith("<?xml")


def test_records_without_picture_tokens_or_selection_can_be_viewed(history):
    nothing = [
        replace(r, selected=r.selected & False, weight=r.weight * 0, relevant_boxes=(), relevant_spans=())
        for r in history
    ]
    blind = [replace(r, boxes=r.boxes * 0) for r in history]
    for records in (nothing, blind):
        own = evolution.of_statement(records, "val-3")
        difference = compare.difference_view(own[0], own[-1])
        assert not problems(difference.to_html()) and difference.to_png(dpi=20)
        assert not problems(evolution.evolution_view(own).to_html())
        aligned = alignment.alignment_view(own[0], TEACHER_SPANS, TEACHER_BOXES)
        assert not problems(aligned.to_html())


def test_records_without_words_can_be_viewed(history):
    for records in (history, [replace(r, selected=r.selected & False, weight=r.weight * 0) for r in history]):
        mute = [replace(r, text="", spans=r.spans * 0, relevant_spans=(), references=()) for r in records]
        for name, view in all_views(mute).items():
            assert not problems(view.to_html()), name
            assert isinstance(view.table(), pd.DataFrame)
