"""Draws sheets (a picture and a statement with a value per token) and aligned tokens.

Nothing is told by colour alone: numbers are written, selected tokens outlined and bold.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke

from tdlib.core.facts import percent, token_name, truth_name
from tdlib.core.records import TargetRecord
from tdlib.data.examples import Box
from tdlib.views.figures.style import (
    BAND,
    BLUE,
    DIFFERENCES,
    GREY,
    HALO,
    WEIGHTS,
    Figure,
    plain,
    short,
    small,
    styled,
)  # fmt: skip
from tdlib.views.picture import find_picture, number_labels, object_labels
from tdlib.views.scale import Scale
from tdlib.views.sheet import Sheet, marks_of

ROWS_PER_COLUMN = 30  # tokens in a column of bars
OBJECT: dict[str, Any] = {"edgecolor": "#c24e00", "linewidth": 1.3}
GROUND_TRUTH: dict[str, Any] = {"edgecolor": "black", "linewidth": 1.8, "linestyle": (0, (2.5, 1.2))}
SCORE: dict[str, Any] = {
    "color": "black", "marker": "o", "markersize": 3, "markerfacecolor": "white", "linestyle": "none",
}  # fmt: skip
GROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of a number


@styled
def plot_sheets(
    sheets: Sequence[Sheet], heading: str = "", words: bool = True, picture: bool = True
) -> Figure:
    """Draw sheets below each other: the picture with its tokens' values, and the words' values as bars.

    Sheets of one scale have the same colours and the same axis. ``words`` and ``picture`` say which half is
    drawn.
    """
    parts = [(words, picture and bool(sheet.record.is_visual.any())) for sheet in sheets]
    heights = [
        _height(sheet) if has_words else 4.2 for sheet, (has_words, _) in zip(sheets, parts, strict=True)
    ]
    width = max(_width(sheet, *part) for sheet, part in zip(sheets, parts, strict=True))
    figure = Figure(figsize=(width, sum(heights)))
    rows = figure.subfigures(len(sheets), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, sheet, part in zip(rows, sheets, parts, strict=True):
        limit = max(_largest(other) for other in sheets if other.scale == sheet.scale)
        _draw_sheet(row, sheet, *part, limit)
    _legend(rows[-1], sheets, words, picture)
    figure.suptitle(plain(heading) if len(sheets) > 1 else "")
    return figure


def _largest(sheet: Sheet) -> float:
    """The end of the words' axis: the largest value or score, and above 0 where there is none."""
    tokens = _word_tokens(sheet)
    scores = 0 if sheet.scores is None else float(sheet.scores[tokens].max(initial=0))
    return max(float(np.abs(sheet.values[tokens]).max(initial=0)), scores) or 0.01


def _draw_sheet(figure: Any, sheet: Sheet, words: bool, picture: bool, limit: float) -> None:
    columns = _columns(sheet)
    ratios = [3.4] * picture + [(_width(sheet, True, False)) / columns] * (columns * words)
    panels = list(figure.subplots(1, max(1, len(ratios)), width_ratios=ratios or None, squeeze=False)[0])
    if picture:
        _draw_picture(panels.pop(0), sheet)
    if words:
        tokens = _word_tokens(sheet)
        for axes, part in zip(panels, np.array_split(tokens, len(panels)), strict=True):
            _draw_bars(axes, sheet, part)
            axes.set_xlim(-100 * limit * 1.35 if sheet.scale.signed else 0, 100 * limit * 1.3)
        panels[0].set_title(_caption(sheet, "words", tokens) if len(tokens) else "no words")
    elif not picture:
        panels[0].set_axis_off()
    first, *numbers = [part for part in (sheet.name, *sheet.about) if part] or [""]
    if sheet.name and sheet.about:
        first, numbers = f"{sheet.name}: {numbers[0]}", numbers[1:]
    line = "   ".join(re.sub(r"^(p_T|p_S|c) ", r"$\1$ ", plain(number)) for number in numbers)
    figure.suptitle("\n".join(filter(None, [textwrap.fill(plain(first), 90), line])))


def _caption(sheet: Sheet, name: str, tokens: np.ndarray) -> str:
    share = percent(float(sheet.values[tokens].sum()))
    if sheet.scale.signed:
        return name
    if sheet.scores is None:
        return f"{name}: {share} %"
    chosen = int(sheet.marked[tokens].sum())
    return f"{name}: {chosen} of {len(tokens)} selected, {share} % of the weight"


def _width(sheet: Sheet, words: bool, picture: bool) -> float:
    """Inches: 3.4 for the picture (4.2 if it stands alone), and the width of the columns of words."""
    of_words = max(3.8, 2.4 * _columns(sheet)) if words else 0
    return max(4.2, (3.4 if picture else 0) + of_words)


def _height(sheet: Sheet) -> float:
    """Inches that leave a line for every token of a column."""
    return max(4.2, 1.4 + 0.17 * min(len(_word_tokens(sheet)), ROWS_PER_COLUMN))


def _columns(sheet: Sheet) -> int:
    return max(1, -(-len(_word_tokens(sheet)) // ROWS_PER_COLUMN))


def _word_tokens(sheet: Sheet) -> np.ndarray:
    """Tokens that have a bar: words in their order, then tokens with a value but without a place ([CLS])."""
    record = sheet.record
    elsewhere = sheet.coloured & ~record.is_text & ~record.is_visual
    return np.concatenate([np.flatnonzero(record.is_text), np.flatnonzero(elsewhere)])


def draw_background(axes: Axes, path: Path) -> float:
    """Draw a picture in normalised coordinates, so that boxes need no scaling; return width over height.

    If the file cannot be read, a grey ground says so.
    """
    picture, missing = find_picture(path)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), anchor="N")
    axes.spines[:].set_visible(True)
    if picture is None:
        axes.set_facecolor("#eeeeee")
        axes.set_aspect(0.75)
        text = "\n".join(textwrap.wrap(plain(missing), 44))
        axes.text(0.5, 0.03, text, ha="center", va="top", fontsize=small(), zorder=0)
        return 4 / 3
    picture.thumbnail((1024, 1024))
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
    return picture.width / picture.height


def draw_boxes(axes: Axes, sheet: Sheet) -> None:
    """Draw the visual tokens of a sheet over its picture; marked ones are outlined and numbered."""
    record, scale = sheet.record, sheet.scale
    aspect = draw_background(axes, record.image)
    shade = _shade(scale)
    overlay = PatchCollection(
        [rectangle(record.boxes[i]) for i in sheet.regions], cmap=shade.cmap, norm=shade.norm,
        edgecolor="none", linewidth=0,
    )  # fmt: skip
    overlay.set_array(np.ma.masked_array(100 * sheet.values[sheet.regions], ~sheet.coloured[sheet.regions]))
    axes.add_collection(overlay, autolim=False)
    for box in record.relevant_boxes:
        _frame(axes, box, aspect)
    for box in record.object_boxes:
        outline(axes, box, **OBJECT)
    for i in np.flatnonzero(sheet.marked & record.is_region).tolist():
        line = ":" if sheet.dotted[i] else "-"
        outline(axes, record.boxes[i], edgecolor="black", linewidth=0.8, linestyle=line)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": small(), "zorder": 4}
    for i, x, y in number_labels(sheet):
        axes.text(x, y, scale.number(float(sheet.values[i])), bbox=GROUND, **style)
    ground = {"facecolor": OBJECT["edgecolor"], "edgecolor": "white", "linewidth": 0.6, "pad": 1.2}
    for number, x, y in object_labels(record.object_boxes):
        axes.text(x, y, str(number), weight="bold", color="white", bbox=ground, **style)


def _shade(scale: Scale) -> ScalarMappable:
    """The colours of values in % or points."""
    end = 100 * (scale.end or 1)
    return ScalarMappable(
        Normalize(-end if scale.signed else 0, end), DIFFERENCES if scale.signed else WEIGHTS
    )


def _draw_picture(axes: Axes, sheet: Sheet) -> None:
    visual = np.flatnonzero(sheet.record.is_region)
    draw_boxes(axes, sheet)
    axes.set_title(_caption(sheet, "picture", visual) if len(visual) else "no visual tokens")
    names = ", ".join(f"[{i}]\u00a0{plain(name)}" for i, name in enumerate(sheet.record.object_names))
    axes.set_xlabel("\n".join(textwrap.wrap(names, 52)))
    if sheet.coloured.any():
        bar = axes.inset_axes((1.03, 0, 0.045, 1))
        axes.figure.colorbar(_shade(sheet.scale), cax=bar)
        bar.set_ylabel("\n".join(textwrap.wrap(plain(sheet.scale.name), 40)))


def rectangle(box: Sequence[float] | np.ndarray, **style: Any) -> Rectangle:
    """A box (xyxy) as a patch."""
    left, top, right, bottom = map(float, box)
    return Rectangle((left, top), right - left, bottom - top, **style)


def outline(axes: Axes, box: Sequence[float] | np.ndarray, **style: Any) -> None:
    """Draw a box in a line that is cased in white, so that it shows on any ground."""
    casing = [withStroke(linewidth=style["linewidth"] + 1, foreground="white")]
    axes.add_patch(rectangle(box, fill=False, clip_on=False, path_effects=casing, **style))


def _frame(axes: Axes, box: Box, aspect: float) -> None:
    """Draw a ground-truth box a little outside its edges, as it often is an object's box as well."""
    left, top, right, bottom = box
    for style in ({"edgecolor": "white", "linewidth": GROUND_TRUTH["linewidth"] + 0.8}, GROUND_TRUTH):
        axes.add_patch(
            FancyBboxPatch((left, top), right - left, bottom - top, boxstyle="square,pad=0.011",
                           mutation_aspect=aspect, fill=False, clip_on=False, **style)
        )  # fmt: skip


def _draw_bars(axes: Axes, sheet: Sheet, tokens: np.ndarray) -> None:
    record, rows = sheet.record, np.arange(len(tokens))
    values = 100 * np.where(sheet.coloured[tokens], sheet.values[tokens], 0)
    axes.barh(
        rows, values, color=_shade(sheet.scale).to_rgba(values), edgecolor="black", linewidth=0.6, height=0.72
    )
    if sheet.scores is not None:
        axes.plot(100 * sheet.scores[tokens], rows, **SCORE)
    if sheet.scale.signed:
        axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(rows, [short(token_name(record, i)) for i in tokens])
    for row, (i, name) in enumerate(zip(tokens, axes.get_yticklabels(), strict=True)):
        has_target = sheet.scores is None or record.distilled[i]
        name.set(weight="bold" if sheet.marked[i] else "normal", color="black" if has_target else GREY)
        if sheet.truth[i]:
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, linewidth=0)
        if sheet.marked[i]:
            number = sheet.scale.number(float(sheet.values[i]))
            axes.text(0.99, row, number, fontsize=small(), ha="right", va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylim(max(len(tokens), 14) - 0.4, -0.6)
    unit = "difference (points)" if sheet.scale.signed else "share (%)"
    axes.set_xlabel(unit if sheet.scores is None else "weight, score (%)")
    axes.tick_params(axis="y", length=0)
    if not len(tokens):
        axes.set_axis_off()


def _legend(figure: Any, sheets: Sequence[Sheet], words: bool, picture: bool) -> None:
    """Explains the boxes, bars, dots and bands that occur in these sheets."""
    truth = truth_name([sheet.record for sheet in sheets])
    line = {"color" if key == "edgecolor" else key: value for key, value in GROUND_TRUTH.items()}
    texts: dict[str, Patch | Line2D] = {
        "selected": Patch(facecolor=WEIGHTS(0.5), edgecolor="black", label="selected token, its weight"),
        "score": Line2D([], [], **SCORE, label="score (% of all words)"),
        "object": Patch(fill=False, **OBJECT, label="object"),
        "decisive box": Line2D([], [], **line, label=f"{truth} (box)"),
        "decisive word": Patch(facecolor=BAND, label=f"{truth} (words)"),
    }
    marks = marks_of(sheets, words, picture)
    if handles := [handle for mark, handle in texts.items() if mark in marks]:
        figure.legend(handles=handles, loc="outside lower center", ncols=5 if words and picture else 2,
                      handlelength=1.8, columnspacing=1.2)  # fmt: skip


# Alignment.


@styled
def plot_alignment(
    record: TargetRecord, shares: np.ndarray, teacher_names: Sequence[str], teacher_boxes: np.ndarray,
    heading: str, token: int | None = None,
) -> Figure:  # fmt: skip
    """Draw which teacher tokens each student token covers: words as a matrix, boxes on the picture.

    ``shares`` (student tokens, teacher tokens) is the alignment; ``token`` is a visual student token that is
    marked together with the teacher's patches that it covers.
    """
    words = np.flatnonzero(record.is_text & (shares.sum(1) > 0))
    theirs = np.flatnonzero(shares[words].sum(0) > 0) if len(words) else np.array([], dtype=int)
    size = max(3.0, 0.2 * len(words) + 1.2), max(3.2, 0.2 * len(theirs) + 1.2)
    has_picture = bool(record.is_visual.any())
    figure = Figure(figsize=(size[1] + (3.6 if has_picture else 0), max(size[0], 3.4)))
    ratios = [size[1], *([3.4] if has_picture else [])]
    axes, *rest = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    part = shares[np.ix_(words, theirs)]
    if part.size:
        axes.imshow(np.ma.masked_equal(100 * part, 0), cmap=WEIGHTS, vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(part), strict=True):
        value = 100 * part[row, column]
        axes.text(column, row, f"{value:.0f}", fontsize=0.8 * small(), ha="center", va="center",
                  color="white" if value > 55 else "black")  # fmt: skip
    axes.set_yticks(range(len(words)), [short(record.tokens[i]) for i in words])
    axes.set_xticks(range(len(theirs)), [short(teacher_names[j]) for j in theirs], rotation=90)
    axes.set(ylabel="student's tokens", xlabel="teacher's tokens", title="share of each teacher token (%)")
    axes.spines[:].set_visible(True)
    for panel in rest:
        _draw_grids(panel, record, shares, teacher_boxes, token)
    figure.suptitle(plain(heading))
    return figure


def _draw_grids(
    axes: Axes, record: TargetRecord, shares: np.ndarray, teacher_boxes: np.ndarray, token: int | None
) -> None:
    draw_background(axes, record.image)
    has_area = (teacher_boxes[:, 2:] > teacher_boxes[:, :2]).all(1)
    for box in teacher_boxes[has_area]:
        axes.add_patch(rectangle(box, fill=False, edgecolor=BLUE, linewidth=0.7, linestyle=":"))
    for i in np.flatnonzero(record.is_region):
        axes.add_patch(rectangle(record.boxes[i], fill=False, edgecolor="black", linewidth=0.7))
    if token is not None:
        for j in np.flatnonzero(shares[token]):
            left, top, right, bottom = teacher_boxes[j]
            shade = 0.25 + 0.5 * float(shares[token, j])
            axes.add_patch(rectangle(teacher_boxes[j], facecolor=BLUE, alpha=shade))
            axes.text((left + right) / 2, (top + bottom) / 2, f"{100 * shares[token, j]:.0f}", ha="center",
                      va="center", fontsize=small(), path_effects=HALO)  # fmt: skip
        outline(axes, record.boxes[token], edgecolor="black", linewidth=2.2)
    handles = [
        Line2D([], [], color="black", linewidth=1, label="student's"),
        Line2D([], [], color=BLUE, linewidth=1, linestyle=":", label="teacher's"),
    ]
    axes.legend(handles=handles, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.01))
    axes.set_title("visual tokens" if token is None else "visual tokens, shares of one (%)")
