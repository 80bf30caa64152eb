"""Figures for papers and notebooks: targeted tokens, arms side by side, training curves.

Owns everything that matplotlib draws, and is the only module that imports it. Uses no pyplot, so
figures hold no global state and need no closing. Does not own numbers: what it draws is in a
``TargetRecord`` or in the table handed in. Colours are safe for colour-blind readers, and nothing
is told by colour alone. Strings from the data are never read as formulas ("$").
"""

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image, ImageEnhance

from tdlib.core.records import TargetRecord
from tdlib.data.examples import Box, DataError
from tdlib.data.pictures import open_picture
from tdlib.views.view import facts, ground_truth, highest_weight, percent, title, token_name, truth_name

COLOURS = "cividis_r"  # small is light, as in ``views``
# Okabe and Ito's colours, darkest first, so that the first ones also differ in grey print.
LINE_COLOURS = ["#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LINE_STYLES = ["-", "--", "-.", ":"]
REFERENCE_STYLES = {"chance": "--", "teacher zero-shot": ":"}  # rows of a table of arms drawn as lines
ROWS_PER_COLUMN = 30  # tokens in a column of bars
SMALL, TEXT, LARGE = 7.5, 8.5, 10  # points
GREY, BAND = "#6b6b6b", "#dddddd"
OBJECT: dict[str, Any] = {"edgecolor": "#c24e00", "linewidth": 1.3}
GROUND_TRUTH: dict[str, Any] = {"edgecolor": "black", "linewidth": 1.8, "linestyle": (0, (2.5, 1.2))}
SCORE: dict[str, Any] = {
    "color": "black", "marker": "o", "markersize": 3, "markerfacecolor": "white", "linestyle": "none",
}  # fmt: skip
CENTRED: dict[str, Any] = {"fontsize": SMALL, "ha": "center", "va": "center"}


class Figure(MatplotlibFigure):
    """A matplotlib Figure that shows itself in a notebook without pyplot."""

    def _repr_png_(self) -> bytes:
        return to_png(self, dpi=110)


def to_png(figure: MatplotlibFigure, path: Path | str | None = None, dpi: int = 200) -> bytes:
    """The figure as PNG, nothing cut off; also written to ``path`` if there is one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.05)
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def to_svg(figure: MatplotlibFigure, path: Path | str | None = None) -> str:
    """The figure as SVG with letters as outlines, the same text for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tdlib", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    if path is not None:
        Path(path).write_text(buffer.getvalue(), encoding="utf-8")
    return buffer.getvalue()


# Targeted tokens.


def plot_targets(record: TargetRecord, highest: float | None = None, labels: Sequence[str] = ()) -> Figure:
    """Draw the picture with its patch weights and the statement's tokens with theirs.

    ``highest`` ends the colour scale (a weight; default: the record's highest), so that figures can
    share one. ``labels`` names the label set of a task without choices.
    """
    figure = Figure(figsize=(_width(record), _height(record)), layout="constrained")
    _draw_targets(figure, record, _scale_end(record, highest), title(record, labels), labels)
    _legend_below(figure, [record])
    return _settled(figure)


def plot_comparison(
    records: Sequence[TargetRecord], names: Sequence[str] = (), labels: Sequence[str] = ()
) -> Figure:
    """Draw ``plot_targets`` of several records below each other, on one colour scale."""
    heights = [_height(record) for record in records]
    figure = Figure(figsize=(max(map(_width, records)), sum(heights)), layout="constrained")
    rows = figure.subfigures(len(records), 1, height_ratios=heights, squeeze=False)[:, 0]
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        heading = f"{names[i]}: {title(record, labels)}" if names else title(record, labels)
        _draw_targets(row, record, highest_weight(records), heading, labels)
    _legend_below(rows[-1], records)
    return _settled(figure)


def plot_picture(
    record: TargetRecord, highest: float | None = None, labels: Sequence[str] = (), bare: bool = False
) -> Figure:
    """Draw the left part of ``plot_targets`` alone; ``bare`` leaves out what HTML says around it."""
    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    _draw_picture(figure.add_subplot(), record, _scale_end(record, highest))
    if not bare:
        figure.suptitle(_plain(title(record, labels)), fontsize=LARGE)
        _legend_below(figure, [record], words=False)
    return _settled(figure)


def plot_words(record: TargetRecord, highest: float | None = None, labels: Sequence[str] = ()) -> Figure:
    """Draw the right part of ``plot_targets`` alone."""
    figure = Figure(figsize=(max(4.2, _width(record) - 3.4), _height(record)), layout="constrained")
    _draw_words(
        list(figure.subplots(1, _columns(record), squeeze=False)[0]), record, _scale_end(record, highest)
    )
    figure.suptitle(_plain(title(record, labels)), fontsize=LARGE)
    _legend_below(figure, [record], picture=False)
    return _settled(figure)


def _draw_targets(
    figure: MatplotlibFigure | SubFigure,
    record: TargetRecord,
    highest: float,
    heading: str,
    labels: Sequence[str],
) -> None:
    ratios = [3.4] + [(_width(record) - 3.4) / _columns(record)] * _columns(record)
    picture, *columns = figure.subplots(1, len(ratios), width_ratios=ratios)
    _draw_picture(picture, record, highest)
    _draw_words(columns, record, highest)
    symbols = {"p_T": "$p_T$", "p_S": "$p_S$", "c": "$c$"}
    numbers = [f"{symbols.get(name, name)} {_plain(value)}" for name, value in facts(record, labels).items()]
    figure.suptitle(f"{_plain(heading)}\n{'   '.join(numbers)}", fontsize=LARGE)


def _scale_end(record: TargetRecord, highest: float | None) -> float:
    return (highest_weight([record]) if highest is None else highest) or 1.0


def _width(record: TargetRecord) -> float:
    """Width in inches of a figure with the picture and the columns of words."""
    return 3.4 + max(3.8, 2.4 * _columns(record))


def _height(record: TargetRecord) -> float:
    """Height in inches that leaves a line for every token of a column."""
    return max(4.2, 1.4 + 0.17 * min(len(_word_tokens(record)), ROWS_PER_COLUMN))


def _columns(record: TargetRecord) -> int:
    return max(1, -(-len(_word_tokens(record)) // ROWS_PER_COLUMN))


def _draw_picture(axes: Axes, record: TargetRecord, highest: float) -> None:
    """The picture in normalised coordinates (so boxes need no scaling), tokens over it, boxes over them."""
    picture = _open(record)
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), anchor="N")
    visual = np.flatnonzero(record.is_visual & ~record.is_text)
    heading = _count("picture", record, visual) if len(visual) else "no visual tokens"
    axes.set_title(heading, fontsize=TEXT, loc="left")
    overlay = _overlay(axes, record, visual, highest)
    for box in record.relevant_boxes:
        _frame(axes, box, picture.width / picture.height)
    for box in record.object_boxes:
        _outline(axes, box, **OBJECT)
    _write_numbers(axes, record, visual[record.selected[visual]])
    names = ", ".join(f"[{i}]\u00a0{_plain(name)}" for i, name in enumerate(record.object_names))
    axes.set_xlabel("\n".join(textwrap.wrap(names, 52)), fontsize=TEXT)
    if record.selected[visual].any():
        bar = axes.inset_axes((1.03, 0, 0.045, 1))
        axes.figure.colorbar(ScalarMappable(overlay.norm, overlay.cmap), cax=bar)
        bar.set_ylabel("weight (%)", fontsize=TEXT)
        bar.tick_params(labelsize=SMALL)


def _open(record: TargetRecord) -> Image.Image:
    """The picture, paler and greyer than it is, so that the weights' colours can be read over it."""
    try:
        picture = open_picture(record.image)
    except DataError as error:
        raise DataError(
            f"picture of {record.example_id}: {error} "
            "(are the data where they were when the record was made?)"
        ) from None
    picture.thumbnail((1024, 1024))
    greyer = ImageEnhance.Color(picture).enhance(0.5)
    return Image.blend(greyer, Image.new("RGB", picture.size, "white"), 0.2)


def _overlay(axes: Axes, record: TargetRecord, visual: np.ndarray, highest: float) -> PatchCollection:
    """The visual tokens as rectangles, selected ones coloured by weight (in %)."""
    overlay = PatchCollection([_rectangle(record.boxes[i]) for i in visual], cmap=COLOURS, alpha=0.65)
    overlay.set_norm(Normalize(0, 100 * highest))
    overlay.set_array(np.ma.masked_array(100 * record.weight[visual], ~record.selected[visual]))
    overlay.set(edgecolor="white", linewidth=0.4)
    axes.add_collection(overlay, autolim=False)
    return overlay


def _write_numbers(axes: Axes, record: TargetRecord, chosen: np.ndarray) -> None:
    """Outline the selected tokens, write their weights and the objects' numbers, off each other."""
    taken: list[tuple[float, float]] = []
    halo = [withStroke(linewidth=2, foreground="white")]
    for i in chosen:
        _outline(axes, record.boxes[i], edgecolor="black", linewidth=1.0)
        left, top, right, bottom = record.boxes[i]
        if right - left > 0.09:  # else the number is wider than the token
            x, y = _free(_places(record.boxes[i], record.relevant_boxes), taken)
            axes.text(x, y, percent(record.weight[i]), weight="bold", path_effects=halo, **CENTRED)
    ground = {"facecolor": OBJECT["edgecolor"], "edgecolor": "white", "linewidth": 0.6, "pad": 1.2}
    for number, (left, top, right, bottom) in enumerate(record.object_boxes):
        middle, centre = (left + right) / 2, (top + bottom) / 2
        places = [(x, y) for y in (top, bottom, centre) for x in (left, right, middle)]
        x, y = _free([(min(max(x, 0.03), 0.97), min(max(y, 0.03), 0.97)) for x, y in places], taken)
        axes.text(x, y, str(number), weight="bold", color="white", bbox=ground, **CENTRED)


def _places(box: np.ndarray, frames: Sequence[Box]) -> list[tuple[float, float]]:
    """Where a token's number can stand in it: first where no line of a frame runs through the number."""
    left, top, right, bottom = map(float, box)
    middle, centre = (left + right) / 2, (top + bottom) / 2
    across = [middle, *([left + 0.045, right - 0.045] if right - left > 0.12 else [])]
    down = [centre, *([bottom - 0.04, top + 0.04] if bottom - top > 0.09 else [])]
    places = [(x, y) for y in down for x in across]
    return sorted(places, key=lambda place: any(_runs_through(frame, *place) for frame in frames))


def _runs_through(frame: Box, x: float, y: float, more: float = 0.0) -> bool:
    """Whether a frame's line crosses a number at (x, y), 0.09 wide and 0.05 high and ``more`` around it."""
    left, top, right, bottom = frame
    wide, high = 0.045 + more, 0.025 + more
    meets = left - wide - 0.01 < x < right + wide + 0.01 and top - high - 0.01 < y < bottom + high + 0.01
    inside = left + wide - 0.01 < x < right - wide + 0.01 and top + high - 0.01 < y < bottom - high + 0.01
    return meets and not inside


def _free(places: list[tuple[float, float]], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Take the first place where a number hides no earlier one, or the first of all."""
    taken.append((_not_taken(places, taken) or places)[0])
    return taken[-1]


def _not_taken(
    places: list[tuple[float, float]], taken: list[tuple[float, float]], wide: float = 0.085
) -> list[tuple[float, float]]:
    """The places where a number of this width hides no earlier one."""
    return [(x, y) for x, y in places if all(abs(x - u) > wide or abs(y - v) > 0.055 for u, v in taken)]


def _rectangle(box: Sequence[float] | np.ndarray, **style: Any) -> Rectangle:
    left, top, right, bottom = map(float, box)
    return Rectangle((left, top), right - left, bottom - top, **style)


def _outline(axes: Axes, box: Sequence[float] | np.ndarray, **style: Any) -> None:
    """A box in a line that shows on any ground: cased in white."""
    casing = [withStroke(linewidth=style["linewidth"] + 1, foreground="white")]
    axes.add_patch(_rectangle(box, fill=False, clip_on=False, path_effects=casing, **style))


def _frame(axes: Axes, box: Sequence[float], aspect: float) -> None:
    """A ground-truth box, drawn a little outside its edges: it often is an object's box as well."""
    left, top, right, bottom = box
    for style in ({"edgecolor": "white", "linewidth": GROUND_TRUTH["linewidth"] + 0.8}, GROUND_TRUTH):
        axes.add_patch(
            FancyBboxPatch((left, top), right - left, bottom - top, boxstyle="square,pad=0.011",
                           mutation_aspect=aspect, fill=False, clip_on=False, **style)
        )  # fmt: skip


def _word_tokens(record: TargetRecord) -> np.ndarray:
    """Tokens that have a bar: those of the text in its order, then selected ones with no place at all."""
    elsewhere = record.selected & ~record.is_text & ~record.is_visual
    return np.concatenate([np.flatnonzero(record.is_text), np.flatnonzero(elsewhere)])


def _count(name: str, record: TargetRecord, tokens: np.ndarray) -> str:
    chosen = tokens[record.selected[tokens]]
    share = percent(float(record.weight[chosen].sum()))
    return f"{name}: {len(chosen)} of {len(tokens)} selected, {share} % of the weight"


def _draw_words(columns: list[Axes], record: TargetRecord, highest: float) -> None:
    tokens = _word_tokens(record)
    limit = 100 * max(float(record.weight[tokens].max(initial=0)), float(record.score[tokens].max(initial=0)))
    for axes, part in zip(columns, np.array_split(tokens, len(columns)), strict=True):
        _draw_bars(axes, record, part, highest)
        axes.set_xlim(0, 1.25 * (limit or 1))
    columns[0].set_title(
        _count("words", record, tokens) if len(tokens) else "no words", fontsize=TEXT, loc="left"
    )


def _draw_bars(axes: Axes, record: TargetRecord, tokens: np.ndarray, highest: float) -> None:
    rows = np.arange(len(tokens))
    weights = 100 * np.where(record.selected[tokens], record.weight[tokens], 0)
    colours = matplotlib.colormaps[COLOURS](Normalize(0, 100 * highest)(weights))
    axes.barh(rows, weights, color=colours, edgecolor="black", linewidth=0.6, height=0.72)
    axes.plot(100 * record.score[tokens], rows, **SCORE)
    truth = ground_truth(record)
    axes.set_yticks(rows, [_plain(_short(token_name(record, i))) for i in tokens], fontsize=TEXT)
    for row, (i, name) in enumerate(zip(tokens, axes.get_yticklabels(), strict=True)):
        name.set(
            weight="bold" if record.selected[i] else "normal", color="black" if record.distilled[i] else GREY
        )
        if truth[i]:
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, linewidth=0)
        if record.selected[i]:
            axes.text(
                0.99, row, percent(record.weight[i]), fontsize=SMALL, ha="right", va="center",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
    axes.set_ylim(max(len(tokens), 14) - 0.4, -0.6)
    axes.set_xlabel("weight, score (%)", fontsize=TEXT)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if not len(tokens):
        axes.set_axis_off()


def _legend_below(
    figure: MatplotlibFigure | SubFigure,
    records: Sequence[TargetRecord],
    picture: bool = True,
    words: bool = True,
) -> None:
    """What boxes, bars, dots and bands mean, as far as these records show them."""
    handles: list[Patch | Line2D] = []
    if any(record.selected.any() for record in records):
        handles.append(Patch(facecolor="#948e77", edgecolor="black", label="selected token, its weight"))
    if words:
        handles.append(Line2D([], [], **SCORE, label="score (% of all words)"))
    if picture and any(record.object_boxes for record in records):
        handles.append(Patch(fill=False, **OBJECT, label="object"))
    if picture and any(record.relevant_boxes for record in records):
        line = {"color" if key == "edgecolor" else key: value for key, value in GROUND_TRUTH.items()}
        handles.append(Line2D([], [], **line, label=f"{truth_name(records)} (box)"))
    if words and any(record.relevant_spans for record in records):
        handles.append(Patch(facecolor=BAND, label=f"{truth_name(records)} (words)"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5 if words and picture else 2, fontsize=SMALL,
            frameon=False, handlelength=1.8, columnspacing=1.2,
        )  # fmt: skip


# Arms and histories.


def plot_arms(arms: pd.DataFrame) -> Figure:
    """Draw the accuracy of each arm with its interval, one panel per split.

    ``arms`` has a row per arm and split: ``arm``, ``split``, ``mean``, ``low``, ``high`` (accuracies
    in [0, 1]; the interval may be missing) and ``n`` (how many runs or examples the mean is over).
    Arms named "chance" or "teacher zero-shot" are drawn as lines; without a split, in every panel.
    Raises ValueError for a missing column or an empty table.
    """
    _need(arms, ["arm", "split", "mean", "low", "high", "n"], "plot_arms")
    is_line = arms["arm"].map(_line_name).isin(REFERENCE_STYLES)
    dots, lines = arms[~is_line], arms[is_line]
    if dots.empty:
        raise ValueError(
            f"plot_arms: only lines of reference ({', '.join(REFERENCE_STYLES)}); add rows of arms"
        )
    names, splits = list(dict.fromkeys(dots["arm"])), list(dict.fromkeys(dots["split"]))
    figure, panels = _panels(len(splits), 1.1 + 0.36 * len(names), sharex=False, sharey=True)
    for axes, split in zip(panels, splits, strict=True):
        rows = dots[dots["split"] == split]
        _draw_arms(axes, rows, names)
        for row in lines[(lines["split"] == split) | lines["split"].isna()].itertuples():
            name = _line_name(row.arm)
            axes.axvline(
                100 * row.mean, color="black", linewidth=1, linestyle=REFERENCE_STYLES[name], label=name
            )
        counts = rows["n"].dropna().unique()
        axes.set_title(_plain(f"{split} (n = {_join(counts)})" if len(counts) else split), fontsize=LARGE)
    _shared_legend(figure, panels)
    return _settled(figure)


def _draw_arms(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for row in rows.itertuples():
        y = names.index(row.arm)
        axes.plot(
            [100 * row.low, 100 * row.high], [y, y], color="#0072b2", linewidth=2, solid_capstyle="butt"
        )
        axes.plot(100 * row.mean, y, "o", color="#0072b2", markersize=6)
        axes.annotate(f"{100 * row.mean:.1f}", (100 * row.mean, y), (0, 5), textcoords="offset points",
                      ha="center", va="bottom", fontsize=SMALL)  # fmt: skip
    axes.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=TEXT)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlabel("accuracy (%)", fontsize=TEXT)
    axes.tick_params(labelsize=TEXT)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def plot_history(history: pd.DataFrame) -> Figure:
    """Draw how each term went while training: a panel per term, a line per arm.

    ``history`` has a row per logged value: ``step``, ``term``, ``value``, ``arm``, ``seed``. Seeds are
    thin lines, their mean (where every seed has a value) a thick one. Raises ValueError for a missing
    column or an empty table.
    """
    _need(history, ["step", "term", "value", "arm", "seed"], "plot_history")
    arms, terms = list(dict.fromkeys(history["arm"])), list(dict.fromkeys(history["term"]))
    figure, panels = _panels(len(terms), 2.4, sharex=True, sharey=False)
    for axes, term in zip(panels, terms, strict=True):
        for i, arm in enumerate(arms):
            rows = history[(history["term"] == term) & (history["arm"] == arm)].dropna(subset=["value"])
            style = {
                "color": LINE_COLOURS[i % len(LINE_COLOURS)],
                "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
            }
            _draw_curves(axes, rows, _plain(arm), style)
        axes.set_title(_plain(term), fontsize=LARGE)
        axes.set_xlabel("step", fontsize=TEXT)
        axes.tick_params(labelsize=SMALL, labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    _shared_legend(figure, panels)
    return _settled(figure)


def _draw_curves(axes: Axes, rows: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    by_seed = rows.pivot_table(index="step", columns="seed", values="value").sort_index()
    if by_seed.shape[1] > 1:
        for seed in by_seed:
            curve = by_seed[seed].dropna()
            axes.plot(curve.index, curve, linewidth=0.6, alpha=0.5, **style)
    mean = by_seed.dropna().mean(axis=1)
    axes.plot(mean.index, mean, linewidth=1.8, label=label, **style)


# Shared.


def _settled(figure: Figure) -> Figure:
    """Lay the figure out and keep it so; one pass is not enough where a picture has a fixed aspect."""
    for _ in range(2):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _plain(text: object) -> str:
    """Text from the data, as one line that matplotlib does not read as a formula."""
    printable = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return printable.replace("$", r"\$")


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _need(table: pd.DataFrame, columns: list[str], function: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{function}: no column {', '.join(missing)}; expected {', '.join(columns)}, "
                         f"found {', '.join(map(str, table.columns))}")  # fmt: skip
    if table.empty:
        raise ValueError(f"{function}: the table has no rows; are there finished runs?")


def _line_name(arm: str) -> str:
    return str(arm).replace("_", " ").replace("zero shot", "zero-shot")


def _join(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _panels(count: int, height: float, sharex: bool, sharey: bool) -> tuple[Figure, list[Axes]]:
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.2, 1.4 + 2.4 * columns), 0.5 + rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def _shared_legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend below all panels, each label once."""
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if entries:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 4}
        figure.legend(list(entries.values()), list(entries), fontsize=TEXT, frameon=False, **place)
