"""Figures: pictures, bars and lines that hold exactly the numbers of the record or table."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from html_page import Page
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from records import (
    PATCHES,
    each_variant,
    each_view,
    evil_record,
    make_record,
    picture_view,
    without_selection,
)

from tdlib.core.records import TargetRecord
from tdlib.views import compare
from tdlib.views.figures import runs, style, targets


@pytest.fixture
def record(image) -> TargetRecord:
    return make_record(image)


# Figures.


@each_variant
@pytest.mark.filterwarnings("error")
def test_every_record_can_be_drawn(record, variant):
    assert compare.comparison(variant(record)).to_png(dpi=40).startswith(b"\x89PNG\r\n\x1a\n")


@each_view
def test_png_and_svg_of_every_view(record, view, tmp_path):
    shown = view(evil_record(record))
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
    patches = picture_view(record).figure().axes[0].patches
    drawn = [(patch.get_bbox().extents.round(6).tolist(), to_hex(patch.get_edgecolor())) for patch in patches]
    for box, colour in [
        *((box, targets.OBJECT["edgecolor"]) for box in record.object_boxes),
        *((box, "#000000") for box in [*record.relevant_boxes, PATCHES[0], PATCHES[4]]),
    ]:
        assert (np.round(box, 6).tolist(), colour) in drawn
    dashed = [patch.get_bbox().extents for patch in patches if patch.get_linestyle() not in ("-", "solid")]
    np.testing.assert_allclose(dashed, record.relevant_boxes)


def test_the_picture_fills_the_axes_in_its_own_proportions(record):
    axes = picture_view(record).figure().axes[0]
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
    figure = picture_view(many).figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    key = figure.axes[0].xaxis.label.get_window_extent(renderer)
    legend = figure.subfigs[0].legends[0].get_window_extent(renderer)
    assert legend.y1 < key.y0 < key.y1 < figure.axes[0].get_window_extent(renderer).y0


def test_dollars_are_not_read_as_formulas(record):
    figure = compare.comparison(evil_record(record)).figure()
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
