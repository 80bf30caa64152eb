"""Views: safe and self-contained HTML, figures and tables that say exactly what the record says."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex

from tdlib.core import facts
from tdlib.core.records import TargetRecord
from tdlib.data.examples import Reference
from tdlib.views import compare
from tdlib.views.figures import runs, style, targets
from tdlib.views.picture import number_labels
from tdlib.views.scale import Scale
from tdlib.views.scene import sheet_of
from tdlib.views.sheet import value_sheet, weight_sheet, words_of

EVIL = '<script>alert("1")</script>'
TEXT = "Why is Casey angry? The heat is unbearable."
SPANS = [
    (0, 3),
    (4, 6),
    (7, 12),
    (13, 18),
    (18, 19),
    (20, 23),
    (24, 28),
    (29, 31),
    (32, 34),
    (34, 42),
    (42, 43),
]
PATCHES = [(c / 3, r / 3, (c + 1) / 3, (r + 1) / 3) for r in range(3) for c in range(3)]


def per_token(values: dict[int, float]) -> np.ndarray:
    array = np.zeros(len(SPANS) + 2 + len(PATCHES))
    array[list(values)] = list(values.values())
    return array


def make_record(image, **changes) -> TargetRecord:
    """[CLS], 11 text tokens, [SEP], 9 patches; selected: "angry", "heat", "un", patches 0 and 4."""
    weight = per_token({4: 0.125, 7: 0.25, 9: 0.125, 13: 0.1, 17: 0.4})
    record = TargetRecord(
        example_id="val-12", choice=2, label=2, prediction=1, text=TEXT,
        references=(Reference(7, 12, (0, 1)),),
        image=image, object_names=("person", "cat"),
        object_boxes=((0.25, 0.25, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)),
        tokens=("[CLS]", *(TEXT[start:end] for start, end in SPANS), "[SEP]", *[""] * len(PATCHES)),
        spans=np.array([(0, 0), *SPANS, *[(0, 0)] * 10]),
        boxes=np.array([(0.0, 0.0, 0.0, 0.0)] * 13 + PATCHES),
        distilled=~per_token({0: 1, 12: 1, 1: 1}).astype(bool),
        relevance=np.linspace(-0.3, 0.3, 22), prior=np.linspace(0, 1, 22), score=weight / 2,
        selected=weight > 0, weight=weight, instance_weight=0.5,
        teacher_probability=0.75, student_probability=0.25,
        relevant_spans=((13, 18), (24, 42)), relevant_boxes=((0.35, 0.02, 0.45, 0.12),),
    )  # fmt: skip
    return replace(record, **changes)


@pytest.fixture
def record(image) -> TargetRecord:
    return make_record(image)


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


VARIANTS = {
    "full": lambda record: record,
    "unknown": bare,
    "nothing selected": without_selection,
    "no visual tokens": lambda record: only(record, ~record.is_visual),
    "no text tokens": lambda record: only(record, record.is_visual),
    "regions": lambda record: replace(record, boxes=record.boxes * 0.9 + 0.05 * record.is_visual[:, None]),
    "[CLS] selected": lambda record: replace(record, selected=record.selected | (np.arange(22) == 0)),
    "evil": lambda record: make_evil(record),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
VIEWS = {"text": compare.text_view, "picture": compare.picture_view, "comparison": compare.comparison}
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def make_evil(record: TargetRecord) -> TargetRecord:
    text = f'{EVIL} $x$ & "it\'s"'
    spans = record.spans.copy()
    spans[1:12] = [(0, len(EVIL)), (len(EVIL) + 1, len(EVIL) + 4), *[(len(text) - 4, len(text))] * 9]
    return replace(  # \x01 is not allowed in XML
        record, text=text, spans=spans, tokens=(EVIL,) * 22, example_id=f"{EVIL}\x01$y$",
        object_names=(f"{EVIL}$", "$a_b$"), references=(Reference(0, 3, (0,)),),
    )  # fmt: skip


# HTML: only what JupyterLab leaves in an untrusted notebook.

TAGS = {"div", "span", "b", "small", "br", "img", "table", "thead", "tbody", "tr", "td", "th", "p"}
ATTRIBUTES = {"style", "title", "src", "alt", "width", "class", "data-v"}  # the last is dropped without harm
NUMBER = r"(0|\d+(\.\d+)?(px|%)?)"
HEX = r"#[0-9a-f]{6}"
ALPHA = r"rgba\(\d+, \d+, \d+, [01](\.\d+)?\)"
STYLES = {
    "background-color": f"{HEX}|{ALPHA}",
    "background-clip": "padding-box",
    "color": HEX,
    "border": rf"\d+px (solid|dashed|dotted) {HEX}",
    "border-top": rf"\d+px (solid|dotted|dashed) {HEX}",
    "border-left": rf"\d+px (solid|dashed) {HEX}",
    "border-bottom": rf"\d+px (solid|dotted) {HEX}",
    "box-sizing": "border-box",
    "flex": r"\d \d \d+px",
    "flex-wrap": "wrap",
    "gap": r"\d+px",
    "height": NUMBER,
    "left": f"-?{NUMBER}",
    "max-width": NUMBER,
    "outline": rf"1px solid {HEX}",
    "page-break-inside": "avoid",
    "position": "relative|absolute",
    "top": f"-?{NUMBER}",
    "border-collapse": "collapse",
    "display": "inline-block|block|flex",
    "font-family": "sans-serif",
    "font-size": NUMBER,
    "font-weight": "bold|normal",
    "line-height": NUMBER,
    "margin": rf"{NUMBER}( {NUMBER})*",
    "margin-bottom": NUMBER,
    "padding": rf"{NUMBER}( {NUMBER})*",
    "text-align": "left|center",
    "vertical-align": "top",
    "white-space": "nowrap",
    "width": NUMBER,
}


class Page(HTMLParser):
    """Elements as (tag, attributes, own text), and what is not on the lists above."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.problems: list[str] = []
        self.feed(html)
        self.close()
        if self.open:
            self.problems.append(f"left open: {[tag for tag, _, _ in self.open]}")

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in TAGS:
            self.problems.append(f"tag {tag}")
        for name, value in attrs:
            if name not in ATTRIBUTES:
                self.problems.append(f"attribute {name}")
            elif name == "src" and not re.match(r"data:image/(png|jpeg);base64,", value):
                self.problems.append(f"src {value[:40]}")
            elif name == "style":
                self.problems += [f"style {rule}" for rule in value.split("; ") if not self._is_allowed(rule)]
        if tag not in ("br", "img"):
            self.open.append(element)

    @staticmethod
    def _is_allowed(rule: str) -> bool:
        name, _, value = rule.partition(": ")
        return name in STYLES and re.fullmatch(STYLES[name], value) is not None

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.problems.append(f"stray end of {tag}")

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def handle_comment(self, data):
        self.problems.append("comment")

    def handle_decl(self, decl):
        self.problems.append("declaration")

    def tokens(self) -> list[tuple[str, dict[str, str], str]]:
        """Drawn tokens: text, style rules, and the number below."""
        styled = [
            ("".join(text), dict(rule.split(": ") for rule in attributes["style"].split("; ")))
            for tag, attributes, text in self.elements
            if tag == "span" and "style" in attributes
        ]
        below = [text.strip() for text, style in styled if style.get("font-size") == "11px"]
        drawn = [(text, style) for text, style in styled if "font-weight" in style]
        return [(text, style, number) for (text, style), number in zip(drawn, below, strict=True)]


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
    html = view(make_evil(record), method=EVIL, labels=[EVIL, "b", EVIL]).to_html()
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
    drawn = Page(compare.text_view(record).to_html()).tokens()
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
    html = compare.text_view(record).to_html()
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
    full = compare.text_view(record, method="my method").to_html()
    assert all(part in full for part in ("my method", "ground truth", "in the picture", "no teacher target"))
    less = compare.text_view(bare(without_selection(record)), method="my method").to_html()
    assert "my method" in less and "ground truth" not in less and "selected</b>" not in less


def test_the_picture_says_its_numbers_in_words(record):
    page = Page(compare.picture_view(record).to_html())
    (alt,) = [attributes["alt"] for tag, attributes, _ in page.elements if tag == "img"]
    assert "box 33,33 to 67,67 %: 40.0 %; box 0,0 to 33,33 %: 10.0 %" in alt
    assert "nothing is selected" in compare.picture_view(without_selection(record)).to_html()


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
    assert not Page(compare.text_view(record).to_html()).problems


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
    table = compare.text_view(record).table()
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
    figure = compare.text_view(changed, labels=labels).figure()
    assert figure.subfigs[0].get_suptitle().split("\n")[0] == expected


def test_facts_hold_what_is_known(record):
    known = {"label": "2", "prediction": "1 (wrong)", "p_T": "0.750", "p_S": "0.250", "c": "0.500"}
    assert facts.facts(record) == known
    assert facts.facts(replace(record, prediction=2))["prediction"] == "2 (right)"
    assert facts.facts(record, ["no", "maybe", "yes"])["prediction"] == "maybe (wrong)"
    assert facts.facts(bare(record)) == {"label": "unknown"}
    assert facts.facts(replace(record, label=None))["prediction"] == "1"


def test_notebooks_get_numbers_and_html(record):
    view = compare.text_view(record)
    bundle = view._repr_mimebundle_()
    assert (
        set(bundle) == {"text/plain", "text/html"}
        and bundle["text/html"] == view._repr_html_() == view.to_html()
    )
    shown = [float(value) for value in re.findall(r" (\d+\.\d) ", bundle["text/plain"])]
    assert shown == sorted((100 * record.weight[record.selected]).tolist(), reverse=True)
    assert repr(view) == bundle["text/plain"] and "p_T 0.750" in repr(view)


def test_a_token_says_all_its_numbers_where_the_mouse_rests(record):
    page = Page(compare.comparison(record).to_html())
    titles = {attributes.get("title") for _, attributes, _ in page.elements}
    for i in range(1, 12):
        note = f"relevance {record.relevance[i]:.3f}, prior {record.prior[i]:.3f}, score"
        assert any(title and note in title for title in titles)
    for i in range(13, 22):  # also boxes that are not selected
        numbers = f"prior {record.prior[i]:.3f}, score {50 * record.weight[i]:.1f} %"
        assert any(title and title.startswith("box ") and numbers in title for title in titles)


def test_the_explorers_page_gets_the_same_numbers(record):
    sheet = weight_sheet(record, 0.4)
    data = sheet_of(sheet)
    assert [text for word in data["words"] for text, _, _ in word] == list(record.tokens[1:12])
    for i, token in enumerate(data["tokens"]):
        assert token["value"] == (f"{100 * record.weight[i]:.1f}" if record.selected[i] else "")
        assert token["marked"] == record.selected[i] and token["distilled"] == record.distilled[i]
        assert token["fill"] == (Scale(0.4).css(record.weight[i]) if record.selected[i] else "")
    assert {i: tuple(box) for i, *box in data["boxes"]} == {
        i: tuple(np.round(record.boxes[i], 5)) for i in range(13, 22)
    }
    assert [name for name, *_ in data["objects"]] == ["person", "cat"] and len(data["truths"]) == 1


def test_values_of_all_tokens_mark_the_largest(record):
    values = np.arange(22) / np.arange(22).sum()
    sheet = value_sheet(record, values, "m", "of it")
    assert sheet.scale.end == values.max() and sheet.marked[[13, 21]].tolist() == [True, True]
    assert sheet.marked[1:12].sum() == 10 and not sheet.marked[1], "the ten largest words"
    assert sheet.coloured.sum() == 21 and "picture" in sheet.below


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


# Figures.


@each_variant
@pytest.mark.filterwarnings("error")
def test_every_record_can_be_drawn(record, variant):
    assert compare.comparison(variant(record)).to_png(dpi=40).startswith(b"\x89PNG\r\n\x1a\n")


@each_view
def test_png_and_svg_of_every_view(record, view, tmp_path):
    shown = view(make_evil(record))
    png = shown.to_png(tmp_path / "view.png", dpi=50)
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and (tmp_path / "view.png").read_bytes() == png
    svg = shown.to_svg(tmp_path / "view.svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert (tmp_path / "view.svg").read_text("utf-8") == svg
    written = "".join(ElementTree.fromstring(svg).itertext())
    assert "EVIL" not in written and "script" in written, "text stays text, and only text"
    pdf = shown.to_pdf(tmp_path / "view.pdf")
    assert pdf.startswith(b"%PDF") and (tmp_path / "view.pdf").read_bytes() == pdf
    assert b"/Type3" not in pdf and b"/Subtype /Type0" in pdf, "letters are those of a font, not drawings"


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_overlay_holds_the_weights_of_the_selected_patches(record):
    picture = compare.comparison(record).figure().axes[0]
    (overlay,) = [child for child in picture.collections if isinstance(child, PatchCollection)]
    values = overlay.get_array()
    np.testing.assert_allclose(values.data, 100 * record.weight[13:])
    np.testing.assert_array_equal(values.mask, ~record.selected[13:])
    assert overlay.cmap is style.WEIGHTS and overlay.get_clim() == (0, 40)
    corners = np.array([path.get_extents().extents for path in overlay.get_paths()])
    np.testing.assert_allclose(sorted(corners.tolist()), sorted(PATCHES))
    assert texts(picture) == ["10.0", "40.0", "0", "1"], "weights, then objects"
    assert picture.get_xlabel() == "[0]\u00a0person, [1]\u00a0cat"
    assert picture.get_title(loc="left") == "picture: 2 of 9 selected, 50.0 % of the weight"


def test_boxes_of_objects_selected_tokens_and_ground_truth_lie_where_the_record_says(record):
    patches = compare.picture_view(record).figure().axes[0].patches
    drawn = [(patch.get_bbox().extents.round(6).tolist(), to_hex(patch.get_edgecolor())) for patch in patches]
    for box, colour in [
        *((box, targets.OBJECT["edgecolor"]) for box in record.object_boxes),
        *((box, "#000000") for box in [*record.relevant_boxes, PATCHES[0], PATCHES[4]]),
    ]:
        assert (np.round(box, 6).tolist(), colour) in drawn
    dashed = [patch.get_bbox().extents for patch in patches if patch.get_linestyle() not in ("-", "solid")]
    np.testing.assert_allclose(dashed, record.relevant_boxes)


def test_the_picture_fills_the_axes_in_its_own_proportions(record):
    axes = compare.picture_view(record).figure().axes[0]
    assert axes.get_aspect() == pytest.approx(40 / 60)
    assert axes.images[0].get_extent() == [*axes.get_xlim(), *axes.get_ylim()] == [0, 1, 1, 0]


def test_bars_are_the_weights_and_dots_the_scores(record):
    figure = compare.comparison(record).figure()
    words = figure.axes[1]
    bars = words.containers[0]
    np.testing.assert_allclose([bar.get_width() for bar in bars], 100 * record.weight[1:12])
    np.testing.assert_allclose(words.lines[0].get_xdata(), 100 * record.score[1:12])
    assert [label.get_text() for label in words.get_yticklabels()] == list(record.tokens[1:12])
    bold = [label.get_text() for label in words.get_yticklabels() if label.get_weight() == "bold"]
    assert bold == ["angry", "heat", "un"] and texts(words) == ["12.5", "25.0", "12.5"]
    bands = sorted(patch.get_y() + 0.5 for patch in words.patches if patch.get_height() == 1)
    assert bands == [3, 6, 7, 8, 9], "rows of the ground truth"
    assert (
        figure.subfigs[0].get_suptitle().startswith("val-12, choice 2 (true)\nlabel 2   prediction 1 (wrong)")
    )


def test_long_statements_get_more_columns_and_lose_no_token(record):
    size = 70
    text = " ".join(["word"] * size)
    spans = np.array([(5 * i, 5 * i + 4) for i in range(size)])
    weight = np.full(size, 1 / size)
    long = replace(
        record, text=text, spans=spans, boxes=np.zeros((size, 4)), tokens=("word",) * size, weight=weight,
        selected=weight > 0, score=weight, distilled=weight > 0, relevance=weight, prior=weight,
        references=(),
    )  # fmt: skip
    columns = compare.comparison(long).figure().axes
    assert len(columns) == 3 and sum(len(axes.containers[0]) for axes in columns) == size


def test_without_a_selection_there_are_no_bars_and_no_colour_bar(record):
    figure = compare.comparison(without_selection(record)).figure()
    picture, words = figure.axes
    assert not picture.child_axes and len(compare.comparison(record).figure().axes[0].child_axes) == 1
    assert not np.any([bar.get_width() for bar in words.containers[0]])
    assert words.get_title(loc="left") == "words: 0 of 11 selected, 0.0 % of the weight"


def test_a_comparison_shares_one_scale(record):
    half = replace(record, weight=record.weight / 2)
    figure = compare.comparison([record, half], names=["a", "b"]).figure()
    scales = [axes.collections[0].get_clim() for part in figure.subfigs for axes in part.axes[:1]]
    assert scales == [(0, 40), (0, 40)]
    assert figure.subfigs[1].get_suptitle().startswith("b: val-12")


def test_the_key_of_objects_and_the_legend_stay_apart(record):
    many = replace(record, object_names=("person",) * 30, object_boxes=record.object_boxes * 15)
    figure = compare.picture_view(many).figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    key = figure.axes[0].xaxis.label.get_window_extent(renderer)
    legend = figure.subfigs[0].legends[0].get_window_extent(renderer)
    assert legend.y1 < key.y0 < key.y1 < figure.axes[0].get_window_extent(renderer).y0


def test_dollars_are_not_read_as_formulas(record):
    figure = compare.comparison(make_evil(record)).figure()
    assert r"\$a_b\$" in figure.axes[0].get_xlabel() and r"\$y\$" in figure.subfigs[0].get_suptitle()


def test_a_missing_picture_leaves_its_name_boxes_and_numbers(record, tmp_path):
    view = compare.comparison(replace(record, image=tmp_path / "gone.jpg"))
    page = Page(view.to_html())
    assert not page.problems and not any(tag == "img" for tag, _, _ in page.elements)
    text = "".join("".join(part) for _, _, part in page.elements)
    assert "gone.jpg" in text and "missing" in text and "40.0" in text and "Casey" in text
    axes = view.figure().axes[0]
    assert "gone.jpg" in "".join(texts(axes)).replace("\n", "") and {"10.0", "40.0"} <= {*texts(axes)}
    assert view.to_png(dpi=40).startswith(b"\x89PNG")


def test_a_paper_has_smaller_type_and_no_heading(record):
    view = compare.comparison([record, record], names=["a", "b"], method="my method")
    screen, paper = view.figure(), view.figure(paper=True)
    assert screen.get_suptitle() == "my method" and paper.get_suptitle() == ""
    sizes = [figure.axes[0].title.get_fontsize() for figure in (screen, paper)]
    assert sizes == [style.STYLE["axes.titlesize"], style.PAPER["axes.titlesize"]] and sizes[1] < sizes[0]
    assert "my method" not in view.to_svg(paper=True) and "my method" in view.to_svg()


def test_figures_show_themselves_without_pyplot_and_are_reproducible(record):
    view = compare.comparison(record)
    assert view.figure()._repr_png_().startswith(b"\x89PNG")
    assert view.to_svg() == compare.comparison(record).to_svg()
    assert view.to_pdf() == compare.comparison(record).to_pdf()


def test_views_load_matplotlib_only_for_pictures():
    code = "import sys, tdlib.views.view; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ARMS = pd.DataFrame(
    [
        ("finetune", "val", 0.4, 0.35, 0.45, 6),
        ("clip_td", "val", 0.5, 0.45, 0.55, 6),
        ("finetune", "val_style", 0.3, np.nan, np.nan, 6),
        ("clip_td", "val_style", 0.35, 0.3, 0.4, 4),
        ("teacher_zero_shot", "val", 0.6, np.nan, np.nan, np.nan),
        ("chance", None, 0.25, np.nan, np.nan, np.nan),
    ],
    columns=["arm", "split", "mean", "low", "high", "n"],
)


def test_arms_are_dots_with_intervals_and_reference_lines():
    val, shifted = runs.plot_arms(ARMS).axes
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in val.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [(40, 0), (50, 1)])
    intervals = [line.get_xdata() for line in val.lines if line.get_linewidth() == 2]
    np.testing.assert_allclose(intervals, [(35, 45), (45, 55)])
    lines = {line.get_label(): (line.get_xdata()[0], line.get_linestyle()) for line in val.lines[-2:]}
    assert lines == {"teacher zero-shot": (60, ":"), "chance": (25, "--")}
    assert [line.get_label() for line in shifted.lines if line.get_linestyle() in ("--", ":")] == ["chance"]
    assert (
        val.get_title(loc="left") == "val (n = 6)" and shifted.get_title(loc="left") == "val_style (n = 6, 4)"
    )
    assert [label.get_text() for label in val.get_yticklabels()] == ["finetune", "clip_td"]
    assert texts(val) == ["40.0", "50.0"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (ARMS.drop(columns="low"), "no column low"),
        (ARMS[:0], "no rows"),
        (ARMS[4:], "only lines of reference"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        runs.plot_arms(table)


def test_histories_have_a_panel_per_term_and_a_line_per_arm():
    rows = [
        (step, term, (1 + seed) / step, arm, seed)
        for term in ("loss", "distill")
        for arm in ("finetune", "clip_td")
        for seed in (0, 1)
        for step in (1, 2, 4)
        if (term, arm) != ("distill", "finetune") and (seed, step) != (1, 4)
    ]
    history = pd.DataFrame(rows, columns=["step", "term", "value", "arm", "seed"])
    figure = runs.plot_history(history)
    loss, distill = figure.axes
    assert [axes.get_title(loc="left") for axes in (loss, distill)] == ["loss", "distill"]
    means = {line.get_label(): line.get_xydata() for line in loss.lines if line.get_linewidth() > 1}
    assert set(means) == {"finetune", "clip_td"}
    np.testing.assert_allclose(means["clip_td"], [(1, 1.5), (2, 0.75)])  # step 4 misses a seed
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 2
    assert [len(line.get_xdata()) for line in loss.lines if line.get_linewidth() < 1] == [3, 2, 3, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["finetune", "clip_td"]
    with pytest.raises(ValueError, match="no column value"):
        runs.plot_history(history.drop(columns="value"))
