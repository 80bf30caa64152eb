"""Views: safe and self-contained HTML and tables that say exactly what the record says."""

import re
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from PIL import Image
from records import (
    EVIL,
    PATCHES,
    SPANS,
    bare,
    each_variant,
    each_view,
    evil_record,
    make_record,
    picture_view,
    text_view,
    without_selection,
)

from tdlib.core import facts
from tdlib.core.records import TargetRecord
from tdlib.views import compare
from tdlib.views.figures import style
from tdlib.views.picture import embedded, number_labels
from tdlib.views.scale import Scale
from tdlib.views.sheet import value_sheet, weight_sheet, words_of
from tdlib.views.view import sheets_html


@pytest.fixture
def record(image) -> TargetRecord:
    return make_record(image)


@pytest.mark.parametrize(
    "html",
    [
        "<script>1</script>", "<style>b {}</style>", "<svg></svg>", "<p>", "<div>", "</div>",
        "<b onclick='x'>1</b>",
        "<b id='x'>1</b>", '<b style="color: hsl(1, 2%, 3%)">1</b>', '<b style="color: red">1</b>',
        '<b style="background: url(x)">1</b>', '<img src="https://example.org/x.png">', "<!-- x -->",
    ],
)  # fmt: skip
def test_the_page_check_notices_what_is_not_allowed(html):
    assert Page(html).problems


@each_view
@each_variant
def test_html_holds_only_allowed_tags_styles_and_hex_colours(record, variant, view):
    html = view(variant(record)).to_html()
    assert not Page(html).problems
    assert "<script" not in html.lower()


@each_view
def test_names_and_methods_are_escaped_and_still_readable(record, view):
    html = view(evil_record(record), method=EVIL, labels=[EVIL, "b", EVIL]).to_html()
    page = Page(html)
    assert not page.problems
    assert f"{EVIL}\x01$y$ ({EVIL})" in ["".join(text) for _, _, text in page.elements]
    assert EVIL in ["".join(text) for tag, _, text in page.elements if tag == "b"]


def test_row_names_are_escaped_and_must_match_the_records(record):
    assert not Page(compare.comparison([record, record], names=[EVIL, "b"]).to_html()).problems
    with pytest.raises(ValueError, match="1 names for 2 records"):
        compare.comparison([record, record], names=["a"])
    with pytest.raises(ValueError, match="no records"):
        compare.comparison([])


def test_each_token_shows_its_weight_colour_and_borders(record):
    drawn = Page(text_view(record).to_html()).tokens()
    assert [text for text, _, _ in drawn] == list(record.tokens[1:12])
    for i, (_, rules, number) in enumerate(drawn, start=1):
        chosen = bool(record.selected[i])
        assert number == (f"{100 * record.weight[i]:.1f}" if chosen else "")
        expected = Scale(0.4).on_white(record.weight[i]) if chosen else ("#ffffff", None)
        assert rules["background-color"] == expected[0]
        assert (rules["border-bottom"] == "3px solid #1b1b1b") == chosen
        assert (rules["border-top"] == "2px dotted #1b1b1b") == (i in (4, 7, 8, 9, 10))
        assert (rules["color"] == "#6b6b6b") == (i == 1), "grey is for tokens without a teacher target"


def test_references_carry_the_numbers_of_their_objects(record):
    html = text_view(record).to_html()
    assert re.search(r">Casey</span><small [^>]*>\[0\]</small><small [^>]*>\[1\]</small>", html)
    assert html.count("<small") == 2


def test_a_comparison_shows_every_record_and_its_numbers_on_one_scale(record, image):
    other = make_record(image, example_id="val-13", instance_weight=0.125, weight=record.weight / 2)
    text = re.sub(r"<[^>]+>", " ", compare.comparison([record, other], names=["naive", "clip_td"]).to_html())
    words = " ".join(text.split())
    assert "naive val-12, choice 2 (true) label 2 prediction 1 (wrong) p_T 0.750 p_S 0.250 c 0.500" in words
    assert "clip_td val-13, choice 2 (true) label 2 prediction 1 (wrong) p_T 0.750 p_S 0.250 c 0.125" in words
    assert "0.0 10.0 20.0 30.0 40.0 weight in %" in words
    drawn = Page(compare.comparison([record, other]).to_html()).tokens()
    heat = [style["background-color"] for word, style, _ in drawn if word == "heat"]
    assert heat == [Scale(0.4).on_white(0.25)[0], Scale(0.4).on_white(0.125)[0]]


def test_the_legend_names_the_method_and_only_what_is_shown(record):
    full = text_view(record, method="my method").to_html()
    assert all(part in full for part in ("my method", "ground truth", "in the picture", "no teacher target"))
    less = text_view(bare(without_selection(record)), method="my method").to_html()
    assert "my method" in less and "ground truth" not in less and "selected</b>" not in less


def test_the_picture_says_its_numbers_in_words(record):
    page = Page(picture_view(record).to_html())
    (alt,) = [attributes["alt"] for tag, attributes, _ in page.elements if tag == "img"]
    assert "box 33,33 to 67,67 %: 40.0 %; box 0,0 to 33,33 %: 10.0 %" in alt
    assert "nothing is selected" in picture_view(without_selection(record)).to_html()


def test_a_picture_is_shown_once_it_is_there(tmp_path):
    path = tmp_path / "a.png"
    assert embedded(path)[0] == b"" and "a.png" in embedded(path)[1]
    Image.new("RGB", (8, 8)).save(path)
    assert embedded(path)[0] and not embedded(path)[1]


@settings(deadline=None)
@given(
    st.text(st.sampled_from("ab <\n"), max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=6),
)
def test_every_character_and_every_token_is_drawn_once(text, stretches):
    spans = np.array([(0, 0), *((start, start + length) for start, length in stretches)])
    size = len(spans)
    record = replace(
        make_record(None), text=text, spans=spans, boxes=np.zeros((size, 4)), tokens=("¤",) * size,
        references=(), weight=np.zeros(size), selected=np.zeros(size, bool), distilled=np.ones(size, bool),
        score=np.zeros(size), relevance=np.zeros(size), prior=np.zeros(size),
    )  # fmt: skip
    pieces = [piece for word in words_of(record) for piece in word]
    assert "".join(piece.text for piece in pieces if piece.text != "¤") == "".join(text.split())
    assert {piece.token for piece in pieces} - {None} == set(range(1, size))
    assert not Page(text_view(record).to_html()).problems


@pytest.mark.parametrize(
    ("text", "written"),
    [("למה הוא כועס?", "rtl"), ("[1] لماذا", "rtl"), ("Why does שלום cry", "ltr"), ("Why [1]?", "")],
)
def test_a_text_is_written_in_the_direction_of_its_script(image, text, written):
    spans = np.array([(i, i + 1) for i in range(len(text))])
    size = len(text)
    record = replace(
        make_record(image), text=text, spans=spans, boxes=np.zeros((size, 4)), tokens=tuple(text),
        references=(), relevant_spans=(), weight=np.zeros(size), selected=np.zeros(size, bool),
        distilled=np.ones(size, bool), score=np.zeros(size), relevance=np.zeros(size), prior=np.zeros(size),
    )  # fmt: skip
    page = Page(text_view(record).to_html())
    assert not page.problems
    directions = [attributes["dir"] for _, attributes, _ in page.elements if "dir" in attributes]
    assert directions == ([written, *["auto"] * len(text.split())] if written else [])


def test_a_shared_character_belongs_to_the_first_token_and_the_other_follows_its_word(record):
    spans = record.spans.copy()
    spans[1:5] = [(0, 3), (2, 6), (8, 9), (7, 12)]  # "Why", " is" and one more letter, "C" within "Casey"
    spans[5] = (8, 9)  # nothing of its own: "a" is taken
    pieces = [
        [(piece.text, piece.token) for piece in word] for word in words_of(replace(record, spans=spans))[:3]
    ]
    assert pieces == [[("Why", 1)], [("is", 2)], [("Casey", 4), (record.tokens[3], 3), (record.tokens[5], 5)]]


# Colours.


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of a hex colour."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(*colours: str) -> float:
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scale", [Scale(0.4), Scale(0.4, signed=True)], ids=["weights", "differences"])
@pytest.mark.parametrize("sign", [1, -1])
def test_colours_are_transparent_at_0_and_one_hue_that_darkens(scale, sign):
    if sign < 0 and not scale.signed:
        assert scale.rgba(-0.1)[3] == 0
        return
    colours = style.DIFFERENCES if scale.signed else style.WEIGHTS
    assert scale.rgba(0)[3] == 0 and scale.on_white(0)[0] == "#ffffff"
    hue, previous = scale.rgba(sign * 0.4)[:3], 1.001
    for value in sign * np.linspace(0.01, 0.4, 40):
        background, text = scale.on_white(value)
        assert scale.rgba(value)[:3] == hue
        place = (value / 0.4 + 1) / 2 if scale.signed else value / 0.4
        drawn = np.array(colours(place))
        np.testing.assert_allclose(drawn[:3], np.array(hue) / 255, atol=0.01)  # figures and HTML agree
        assert drawn[3] == pytest.approx(scale.rgba(value)[3], abs=0.01)
        assert contrast(background, text) >= 4.5, "WCAG AA"
        assert luminance(background) < previous
        previous = luminance(background)
    assert scale.css(sign * 9) == scale.css(sign * 0.4), "beyond the ends as at the ends"


def test_both_signs_are_equally_dark_and_a_largest_weight_is_darker_than_either():
    less, more = (luminance(Scale(1, signed=True).on_white(end)[0]) for end in (-1, 1))
    assert abs(less - more) < 0.05
    assert luminance(Scale(1).on_white(1)[0]) < min(less, more)


# Numbers.


def test_the_table_is_the_record(record):
    table = text_view(record).table()
    assert list(table["token"]) == list(record.tokens)
    assert list(table["kind"]) == ["special"] + ["text"] * 11 + ["special"] + ["visual"] * 9
    assert list(table["span"][1:12]) == SPANS and table["span"][0] is None and table["span"][13] is None
    assert list(table["box"][13:]) == PATCHES and table["box"][1] is None
    for name in ("distilled", "relevance", "prior", "score", "selected", "weight"):
        np.testing.assert_array_equal(table[name], getattr(record, name))
    assert set(table["example_id"]) == {"val-12"} and set(table["choice"]) == {2}
    assert len(compare.comparison([record, record]).table()) == 44


def test_ground_truth_of_words_and_patches(record):
    truth = facts.table(record)["ground_truth"]
    assert list(truth[truth.fillna(False)].index) == [4, 7, 8, 9, 10, 14]  # 14: the box lies in this patch
    assert truth[[0, 12]].isna().all(), "special tokens"
    whole = facts.table(replace(record, relevant_boxes=((0, 0, 1, 0.6),)))["ground_truth"]
    assert list(whole[13:]) == [True] * 6 + [False] * 3
    assert facts.table(bare(record))["ground_truth"].isna().all(), "unknown is not False"


def test_legends_name_what_stands_in_for_ground_truth(record):
    proxy = replace(record, truth="referred <objects>")
    for shown, name in ((record, "ground truth"), (proxy, "referred &lt;objects&gt;")):
        html = compare.comparison([shown]).to_html()
        assert html.count(f"({name})") == 2 and ("(ground truth)" in html) == (shown is record)
    (legend,) = compare.comparison(proxy).figure().subfigs[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert "referred <objects> (box)" in labels and not any("ground truth" in label for label in labels)


@pytest.mark.parametrize(
    ("changes", "labels", "expected"),
    [
        ({}, (), "val-12, choice 2 (true)"),
        ({"label": 1}, (), "val-12, choice 2 (false)"),
        ({"label": None}, (), "val-12, choice 2"),
        ({"choice": 0}, ("no", "maybe", "yes"), "val-12 (yes)"),
        ({"choice": 0, "label": None}, ("no", "maybe", "yes"), "val-12"),
    ],
)
def test_titles(record, changes, labels, expected):
    changed = replace(record, **changes)
    assert facts.title(changed, labels) == expected
    figure = text_view(changed, labels=labels).figure()
    assert figure.subfigs[0].get_suptitle().split("\n")[0] == expected


def test_facts_hold_what_is_known(record):
    known = {"label": "2", "prediction": "1 (wrong)", "p_T": "0.750", "p_S": "0.250", "c": "0.500"}
    assert facts.facts(record) == known
    assert facts.facts(replace(record, prediction=2))["prediction"] == "2 (right)"
    assert facts.facts(record, ["no", "maybe", "yes"])["prediction"] == "maybe (wrong)"
    assert facts.facts(bare(record)) == {"label": "unknown"}
    assert facts.facts(replace(record, label=None))["prediction"] == "1"


def test_notebooks_get_numbers_and_html(record):
    view = text_view(record)
    bundle, _ = DisplayFormatter().format(view)
    assert bundle == {"text/plain": repr(view), "text/html": view.to_html()}
    shown = [float(value) for value in re.findall(r" (\d+\.\d) ", repr(view))]
    assert shown == sorted((100 * record.weight[record.selected]).tolist(), reverse=True)
    assert "p_T 0.750" in repr(view)


def test_a_token_says_all_its_numbers_where_the_mouse_rests(record):
    page = Page(compare.comparison(record).to_html())
    titles = {attributes.get("title") for _, attributes, _ in page.elements}
    for i in range(1, 12):
        note = f"relevance {record.relevance[i]:.3f}, prior {record.prior[i]:.3f}, score"
        assert any(title and note in title for title in titles)
    for i in range(13, 22):  # also boxes that are not selected
        numbers = f"prior {record.prior[i]:.3f}, score {50 * record.weight[i]:.1f} %"
        assert any(title and title.startswith("box ") and numbers in title for title in titles)


def test_every_token_says_its_place_to_the_explorers_page(record):
    page = Page(compare.comparison(record).to_html())
    titles = {int(a["data-token"]): a["title"] for _, a, _ in page.elements if "data-token" in a}
    assert set(titles) == {*range(1, 12), *range(13, 22)}
    assert all(note.startswith(f"{facts.token_name(record, i)}: ") for i, note in titles.items())


def test_values_of_all_tokens_mark_the_largest(record):
    values = np.arange(22) / np.arange(22).sum()
    sheet = value_sheet(record, values, "m", "of it")
    assert sheet.scale.end == values.max() and sheet.marked[[13, 21]].tolist() == [True, True]
    assert sheet.marked[1:12].sum() == 10 and not sheet.marked[1], "the ten largest words"
    assert sheet.coloured.sum() == 21 and "picture" in sheet.below
    legend = sheets_html([sheet])
    assert legend.count("largest</") == 2 and "selected</" not in legend, "nothing is selected by attention"


@pytest.mark.parametrize("seed", range(4))
def test_numbers_on_overlapping_boxes_do_not_hide_each_other(record, seed):
    corners = np.random.default_rng(seed).random((9, 2, 2))
    boxes = np.concatenate([np.zeros((13, 4)), np.concatenate([corners.min(1), corners.max(1)], axis=1)])
    boxes[13] = (0, 0, 1, 1)
    chosen = np.arange(22) > 12
    crowded = replace(record, boxes=boxes, selected=chosen, weight=chosen / 9)
    labels = number_labels(weight_sheet(crowded, 1 / 9))
    assert len(labels) > 3
    for n, (_, x, y) in enumerate(labels):
        for _, u, v in labels[:n]:
            assert abs(x - u) > 0.074 or abs(y - v) > 0.055
