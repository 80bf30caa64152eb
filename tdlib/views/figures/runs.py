"""Figures of several runs and of training: differences, evolution, instance weights, attention.

Draws what ``run_views`` and ``attention_views`` hand in and owns no numbers of its own. Beside
``plots``, whose style it shares, the only module that imports matplotlib. Nothing is told by colour
alone: signs are written, selected cells carry a mark.
"""

import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from tdlib.core.records import END, TargetRecord
from tdlib.views.figures.targets import (
    BAND,
    CENTRED,
    COLOURS,
    GREY,
    LARGE,
    LINE_COLOURS,
    LINE_STYLES,
    SMALL,
    TEXT,
    Figure,
    _frame,
    _not_taken,
    _open,
    _outline,
    _places,
    _plain,
    _rectangle,
    _runs_through,
    _settled,
    _short,
)
from tdlib.views.view import ground_truth, percent, token_name

# Blue, white, orange: equally dark at both ends, so signs are written too. As in ``run_views``.
DIVERGING = LinearSegmentedColormap.from_list(
    "difference", [(33 / 255, 102 / 255, 172 / 255), (1, 1, 1), (179 / 255, 88 / 255, 6 / 255)]
)
TEXT_LINE: dict[str, Any] = {"color": "#000000", "marker": "o", "linestyle": "-"}
VISUAL_LINE: dict[str, Any] = {
    "color": "#d55e00", "marker": "s", "linestyle": "--", "markerfacecolor": "white",
}  # fmt: skip
MANY_STEPS = 12  # beyond, a cell is too narrow for its number
HALO = [withStroke(linewidth=2, foreground="white")]
GROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of a number on a line


def step_name(step: int) -> str:
    """A step for an axis: its number, or "end"."""
    return "end" if step == END else str(step)


# Two runs.


def plot_difference(
    left: TargetRecord, right: TargetRecord, names: Sequence[str], heading: str, bare: bool = False
) -> Figure:
    """Draw the pictures of two records and of their difference, and their words as pairs of dots.

    Weights and differences are in % of all selected tokens; a difference is right minus left. ``bare``
    leaves out the words and the heading.
    """
    words = np.array([], dtype=int) if bare else np.flatnonzero(left.is_text)
    columns = max(1, -(-len(words) // 24))
    rows = -(-len(words) // columns)
    heights = [3.1] if bare else [3.0, 0.75 + 0.17 * max(4, rows)]
    figure = Figure(figsize=(9.2, sum(heights) + 0.3), layout="constrained")
    top, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = top.subplots(1, 3)
    visual = left.is_visual & ~left.is_text
    highest = max(float(r.weight[r.selected & visual].max(initial=0)) for r in (left, right)) or 1.0
    for axes, record, name in zip(panels[:2], (left, right), names, strict=True):
        shade = draw_boxes(axes, record, np.where(record.selected, record.weight, np.nan), highest)
        axes.set_title(_plain(name), fontsize=TEXT)
    _bar(top, shade, panels[:2], "weight (%)", location="bottom", aspect=40)
    gap = right.weight * right.selected - left.weight * left.selected
    either = left.selected | right.selected
    extent = float(np.abs(gap[visual]).max(initial=0)) or 1.0
    shade = draw_boxes(panels[2], left, np.where(either, gap, np.nan), extent, diverging=True)
    panels[2].set_title(f"{_plain(names[1])} − {_plain(names[0])}", fontsize=TEXT)
    _bar(top, shade, panels[2], "difference (points)", location="bottom", aspect=20)
    if not (visual & either).any():
        panels[2].set_xlabel("no visual token selected in either", fontsize=SMALL)
    if below:
        axes_row = below[0].subplots(1, columns, squeeze=False)[0]
        limit = 100 * max(float(left.weight[words].max(initial=0)), float(right.weight[words].max(initial=0)))
        for axes, part in zip(axes_row, np.array_split(words, columns), strict=True):
            _draw_pairs(axes, left, right, gap, part, float(np.abs(gap[words]).max(initial=0)) or 1.0)
            axes.set_xlim(-0.03 * (limit or 1), 1.3 * (limit or 1))
        handles: list[Any] = [
            Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="none",
                   label=_plain(names[0])),
            Line2D([], [], color="black", marker="s", linestyle="none", label=_plain(names[1])),
        ]  # fmt: skip
        if any(ground_truth(left)):
            handles.append(Patch(facecolor=BAND, edgecolor="black", linestyle="--", label=left.truth))
        below[0].legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
        figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


def _draw_pairs(
    axes: Axes, left: TargetRecord, right: TargetRecord, gap: np.ndarray, part: np.ndarray, extent: float
) -> None:
    truth = ground_truth(left)
    for row, i in enumerate(part):
        if truth[i]:
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, linewidth=0)
        a, b = (100 * float(r.weight[i] * r.selected[i]) for r in (left, right))
        chosen = left.selected[i] or right.selected[i]
        if chosen:
            colour = DIVERGING(0.5 + 0.5 * float(gap[i]) / extent)
            axes.plot([a, b], [row, row], color="black", linewidth=5, solid_capstyle="butt", zorder=1)
            axes.plot([a, b], [row, row], color=colour, linewidth=4, solid_capstyle="butt", zorder=2)
            axes.plot(a, row, "o", color="black", markerfacecolor="white", markersize=5, zorder=3)
            axes.plot(b, row, "s", color="black", markersize=3.5, zorder=4)
            axes.text(0.99, row, signed(float(gap[i])), fontsize=SMALL, ha="right", va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(part)), [_plain(_short(token_name(left, int(i)))) for i in part], fontsize=TEXT)
    for label, i in zip(axes.get_yticklabels(), part, strict=True):
        label.set(
            weight="bold" if left.selected[i] or right.selected[i] else "normal",
            color="black" if left.distilled[i] else GREY,
        )
    axes.set_ylim(len(part) - 0.4, -0.6)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("weight (%), difference (points)", fontsize=TEXT)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def signed(share: float) -> str:
    """A difference of shares in percentage points with its sign; 0.0 where there is none."""
    text = percent(abs(share))
    return text if text == "0.0" else f"{'+' if share > 0 else '−'}{text}"


def draw_boxes(
    axes: Axes,
    record: TargetRecord,
    values: np.ndarray,
    extent: float,
    diverging: bool = False,
    most: int | None = None,
) -> ScalarMappable:
    """The picture with its visual tokens coloured by ``values`` (tokens,), in %; nan is left open.

    The scale runs from 0, or from ``-extent``, to ``extent``. ``most`` outlines and numbers only so
    many boxes, and lets the picture show through the lighter others. A number that would hide another
    is left out. Returns what a colour bar needs.
    """
    picture = _open(record)
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    visual = np.flatnonzero(record.is_visual & ~record.is_text)
    norm = Normalize(-100 * extent if diverging else 0, 100 * extent)
    colours = DIVERGING if diverging else matplotlib.colormaps[COLOURS]
    overlay = PatchCollection([_rectangle(record.boxes[i]) for i in visual], cmap=colours, alpha=0.7)
    overlay.set_norm(norm)
    shown = 100 * values[visual]
    overlay.set_array(np.ma.masked_invalid(shown))
    overlay.set(edgecolor="white", linewidth=0.3)
    marked = visual[np.isfinite(shown)]
    if most is not None:
        above = np.nan_to_num(shown - np.nanmin(shown)) / (float(np.ptp(shown[np.isfinite(shown)])) or 1)
        overlay.set_alpha(0.1 + 0.5 * above)
        marked = marked[np.argsort(-values[marked], kind="stable")][:most]
    axes.add_collection(overlay, autolim=False)
    for box in record.relevant_boxes:
        _frame(axes, box, picture.width / picture.height)
    taken: list[tuple[float, float]] = []
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    for i in sorted(marked, key=lambda i: float(sides[i].prod())):  # a large box has more room for its number
        _outline(axes, record.boxes[i], edgecolor="black", linewidth=0.7)
        wide, high = map(float, sides[i])
        free = _not_taken(_places(record.boxes[i], record.relevant_boxes), taken, 0.14)
        if free and wide > 0.1 and high > 0.05:
            number = signed(float(values[i])) if diverging else percent(float(values[i]))
            x, y = free[0]
            taken.append((x, y))
            crossed = any(_runs_through(frame, x, y, 0.04) for frame in record.relevant_boxes)
            axes.text(x, y, number, path_effects=HALO, bbox=GROUND if crossed else None, **CENTRED)
    return ScalarMappable(norm, colours)


# Training.


def plot_evolution(
    tokens: pd.DataFrame,
    steps: pd.DataFrame,
    shown: Sequence[TargetRecord],
    heading: str,
    hidden: str = "",
    decisive: Collection[int] = (),
    truth: str = "",
) -> Figure:
    """Draw tokens x steps as a heat map, and below it set size, turnover and pictures.

    ``tokens`` is ``run_views.evolution_table`` of one statement, of the tokens to draw; ``steps`` its
    rows of ``turnover_table``; ``shown`` the records whose pictures are drawn; ``hidden`` says which
    visual tokens are drawn, ``decisive`` are positions to mark, as ``truth`` has it (``views.truth_name``).
    """
    labels = [step_name(step) for step in tokens.drop_duplicates("order").sort_values("order")["step"]]
    is_visual = tokens["kind"] == "visual"
    parts = [part for part in (tokens[~is_visual], tokens[is_visual]) if len(part)]
    rows = [part["position"].nunique() for part in parts]
    tall = 0.17 * sum(rows) + 0.5 + 0.4 * len(parts)
    ratios = [tall, 1.9, *([2.0] if shown else [])]
    figure = Figure(figsize=(max(6.4, min(9.0, 3.0 + 0.42 * len(labels))), sum(ratios) + 0.4),
                    layout="constrained")  # fmt: skip
    upper, middle, *lower = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    maps = upper.subplots(len(parts), 1, height_ratios=[count + 1 for count in rows], squeeze=False)[:, 0]
    for axes, part in zip(maps, parts, strict=True):
        _draw_heat(axes, part, labels, decisive)
        axes.set_title("words" if part["kind"].iloc[0] == "text" else hidden, fontsize=TEXT, loc="left")
    note = f"; * decides the answer ({truth})" if len(decisive) else ""
    maps[-1].set_xlabel(f"training step (updates){note}", fontsize=SMALL)
    sizes, changes = middle.subplots(1, 2)
    draw_steps(sizes, steps, "selected", "selected tokens", labels)
    draw_steps(changes, steps, "turnover", "turnover (1 − Jaccard)", labels)
    changes.set_ylim(-0.05, 1.05)
    handles, entries = sizes.get_legend_handles_labels()
    middle.legend(handles, entries, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    if lower:
        end = max(float(r.weight[r.selected & r.is_visual].max(initial=0)) for r in shown) or 1.0
        for panel, record in zip(lower[0].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw_boxes(panel, record, np.where(record.selected, record.weight, np.nan), end)
            panel.set_title("end" if record.step == END else f"step {record.step}", fontsize=SMALL)
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


def _draw_heat(axes: Axes, tokens: pd.DataFrame, labels: Sequence[str], decisive: Collection[int]) -> None:
    """Tokens x steps on a scale of their own; white where not selected."""
    weights = tokens.pivot(index="position", columns="order", values="weight")
    selected = tokens.pivot(index="position", columns="order", values="selected").to_numpy(dtype=bool)
    names = tokens.drop_duplicates("position").set_index("position")["token"].loc[weights.index]
    values = np.ma.masked_array(100 * weights.to_numpy(), ~selected)
    highest = float(values.max()) if selected.any() else 1.0
    image = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=highest, aspect="auto", interpolation="none")
    _mark_cells(axes, values, highest, len(labels))
    rows = [f"{'* ' if place in decisive else ''}{_plain(_short(name))}" for place, name in names.items()]
    axes.set_yticks(range(len(rows)), rows, fontsize=SMALL)
    _step_axis(axes, labels)
    axes.set_xlabel("")
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="#e4e4e4", linewidth=0.4)
    _bar(axes.figure, image, axes, "weight (%)", pad=0.01, aspect=max(6, 1.2 * len(rows)))


def _mark_cells(axes: Axes, values: np.ma.MaskedArray, highest: float, steps: int) -> None:
    """A number in every selected cell, or a dot where cells are narrow."""
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
        value = float(values[row, column])
        colour = "white" if value > 0.5 * highest else "black"
        if steps <= MANY_STEPS:
            axes.text(column, row, f"{value:.1f}", fontsize=6.5, ha="center", va="center", color=colour)
        else:
            axes.plot(column, row, ".", color=colour, markersize=2)


def _step_axis(axes: Axes, labels: Sequence[str]) -> None:
    every = max(1, -(-len(labels) // 14))
    chosen = sorted({*range(0, len(labels), every), len(labels) - 1})
    if len(chosen) > 1 and chosen[-1] - chosen[-2] < every:
        chosen.pop(-2)
    axes.set_xticks(chosen, [labels[i] for i in chosen], fontsize=SMALL)
    axes.set_xlabel("training step (updates)", fontsize=SMALL)
    axes.tick_params(length=2)


def draw_steps(axes: Axes, steps: pd.DataFrame, value: str, name: str, labels: Sequence[str]) -> None:
    """Two lines over the steps: ``{value}_text`` and ``{value}_visual``, with quartiles where several."""
    for kind, style in (("text", TEXT_LINE), ("visual", VISUAL_LINE)):
        grouped = steps.groupby("order")[f"{value}_{kind}"]
        mean, low, high = grouped.mean(), grouped.quantile(0.25), grouped.quantile(0.75)
        axes.plot(mean.index, mean, markersize=3.5, linewidth=1.3, label=f"{kind} tokens", **style)
        if grouped.size().max() > 1:
            axes.fill_between(mean.index, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_title(name, fontsize=TEXT, loc="left")
    _step_axis(axes, labels)
    axes.tick_params(axis="y", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)


def plot_turnover(steps: pd.DataFrame, heading: str) -> Figure:
    """Draw mean size and turnover of the selected sets of many statements, quartiles as bands."""
    labels = [step_name(step) for step in steps.drop_duplicates("order").sort_values("order")["step"]]
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    sizes, changes = figure.subplots(1, 2)
    draw_steps(sizes, steps, "selected", "selected tokens, mean", labels)
    draw_steps(changes, steps, "turnover", "turnover (1 − Jaccard), mean", labels)
    changes.set_ylim(-0.05, 1.05)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=SMALL,
                  frameon=False)  # fmt: skip
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


INSTANCE_LINES: dict[str, dict[str, Any]] = {
    "p_T": {"color": "#0072b2", "linestyle": "--", "marker": "^"},
    "p_S": {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    "c": {"color": "#000000", "linestyle": "-.", "marker": "s", "markerfacecolor": "white"},
}


def plot_instances(table: pd.DataFrame, example_id: str | None, heading: str) -> Figure:
    """Draw p_T, p_S and c of an example over training, c's distribution per step, and p_T against p_S.

    ``table`` is ``run_views.instance_table``; without ``example_id``, or a single step, what needs
    them is left out.
    """
    steps = table.drop_duplicates("order").sort_values("order")
    labels = [step_name(step) for step in steps["step"]]
    own = table[table["example_id"] == example_id].sort_values("order")
    several = table["example_id"].nunique() > 1
    kinds = [*(["example"] if len(own) else []), *(["steps", "pairs"] if several else [])]
    figure = Figure(figsize=(0.6 + 3.1 * max(1, len(kinds)), 3.2), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(1, max(1, len(kinds)), squeeze=False)[0], strict=False))
    if "example" in panels:
        axes = panels["example"]
        for name, style in INSTANCE_LINES.items():
            label = f"${name}$"
            axes.plot(own["order"], own[name], markersize=4, linewidth=1.3, label=label, **style)
            axes.annotate(f"{own[name].iloc[-1]:.2f}", (own["order"].iloc[-1], own[name].iloc[-1]), (6, 0),
                          textcoords="offset points", fontsize=SMALL, va="center")  # fmt: skip
        _step_axis(axes, labels)
        axes.set_ylim(-0.03, max(1.03, 1.05 * own[list(INSTANCE_LINES)].max().max()))
        axes.margins(x=0.12)
        axes.set_title(_plain(_short(str(example_id), 30)), fontsize=TEXT, loc="left")
        axes.legend(fontsize=SMALL, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    if "steps" in panels:
        _draw_distribution(panels["steps"], table, own, labels)
    if "pairs" in panels:
        _draw_pairs_of_probabilities(panels["pairs"], table, own)
    for axes in panels.values():
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


def _draw_distribution(axes: Axes, table: pd.DataFrame, own: pd.DataFrame, labels: Sequence[str]) -> None:
    orders = sorted(table["order"].unique())
    boxes = [table.loc[table["order"] == order, "c"].to_numpy() for order in orders]
    axes.boxplot(
        boxes, positions=orders, widths=0.6, whis=(0, 100), manage_ticks=False,
        medianprops={"color": "black", "linewidth": 1.8}, boxprops={"color": "#0072b2"},
        whiskerprops={"color": "#0072b2"}, capprops={"color": "#0072b2"},
    )  # fmt: skip
    if len(own):
        axes.plot(own["order"], own["c"], **INSTANCE_LINES["c"], markersize=4, linewidth=0.9, label="example")
    _step_axis(axes, labels)
    axes.set_ylim(-0.03, max(1.03, 1.05 * table["c"].max()))
    examples = table["example_id"].nunique()
    axes.set_title(f"$c$: range, quartiles, median (n = {examples})", fontsize=TEXT, loc="left")


def _draw_pairs_of_probabilities(axes: Axes, table: pd.DataFrame, own: pd.DataFrame) -> None:
    last = table[table["order"] == table["order"].max()]
    spread = axes.scatter(
        last["p_S"], last["p_T"], c=last["c"], cmap=COLOURS, vmin=0, vmax=max(1.0, last["c"].max()), s=26,
        edgecolor="black", linewidth=0.6,
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    if len(own):
        marked = own[own["order"] == own["order"].max()]
        axes.plot(marked["p_S"], marked["p_T"], "o", markersize=11, markerfacecolor="none",
                  markeredgecolor="black")  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set_xlabel("$p_S$", fontsize=TEXT)
    axes.set_ylabel("$p_T$", fontsize=TEXT)
    step = step_name(int(last["step"].iloc[0]))
    axes.set_title(f"all examples, {'end' if step == 'end' else f'step {step}'}", fontsize=TEXT, loc="left")
    bar = axes.inset_axes((1.04, 0, 0.05, 0.9))
    axes.figure.colorbar(spread, cax=bar)
    bar.set_title("$c$", fontsize=TEXT)
    bar.tick_params(labelsize=SMALL)


# Alignment.


def plot_alignment(
    record: TargetRecord, shares: np.ndarray, teacher_names: Sequence[str], teacher_boxes: np.ndarray,
    heading: str, token: int | None = None,
) -> Figure:  # fmt: skip
    """Draw which teacher tokens each student token stands for: words as a matrix, boxes on the picture.

    ``shares`` (student tokens, teacher tokens) is the alignment; ``token`` a visual student token to
    mark with the teacher's patches that it covers.
    """
    words = np.flatnonzero(record.is_text & (shares.sum(1) > 0))
    theirs = np.flatnonzero(shares[words].sum(0) > 0) if len(words) else np.array([], dtype=int)
    size = max(3.0, 0.2 * len(words) + 1.2), max(3.2, 0.2 * len(theirs) + 1.2)
    has_picture = bool(record.is_visual.any())
    figure = Figure(figsize=(size[1] + (3.6 if has_picture else 0), max(size[0], 3.4)), layout="constrained")
    ratios = [size[1], *([3.4] if has_picture else [])]
    axes, *rest = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    part = shares[np.ix_(words, theirs)]
    axes.imshow(np.ma.masked_equal(100 * part, 0), cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(part), strict=True):
        value = 100 * part[row, column]
        axes.text(column, row, f"{value:.0f}", fontsize=6, ha="center", va="center",
                  color="white" if value > 55 else "black")  # fmt: skip
    axes.set_yticks(range(len(words)), [_plain(_short(record.tokens[i])) for i in words], fontsize=SMALL)
    axes.set_xticks(range(len(theirs)), [_plain(_short(teacher_names[j])) for j in theirs], fontsize=SMALL,
                    rotation=90)  # fmt: skip
    axes.set_ylabel("student's tokens", fontsize=TEXT)
    axes.set_xlabel("teacher's tokens", fontsize=TEXT)
    axes.set_title("share of each teacher token (%)", fontsize=TEXT, loc="left")
    for panel in rest:
        _draw_grids(panel, record, shares, teacher_boxes, token)
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


def _draw_grids(
    axes: Axes, record: TargetRecord, shares: np.ndarray, teacher_boxes: np.ndarray, token: int | None
) -> None:
    picture = _open(record)
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    has_area = (teacher_boxes[:, 2:] > teacher_boxes[:, :2]).all(1)
    for box in teacher_boxes[has_area]:
        axes.add_patch(_rectangle(box, fill=False, edgecolor="#0072b2", linewidth=0.7, linestyle=":"))
    for i in np.flatnonzero(record.is_visual & ~record.is_text):
        axes.add_patch(_rectangle(record.boxes[i], fill=False, edgecolor="black", linewidth=0.7))
    if token is not None:
        for j in np.flatnonzero(shares[token]):
            left, top, right, bottom = teacher_boxes[j]
            axes.add_patch(
                _rectangle(teacher_boxes[j], facecolor="#0072b2", alpha=0.25 + 0.5 * float(shares[token, j]))
            )
            axes.text((left + right) / 2, (top + bottom) / 2, f"{100 * shares[token, j]:.0f}",
                      path_effects=HALO, **CENTRED)  # fmt: skip
        _outline(axes, record.boxes[token], edgecolor="black", linewidth=2.2)
    handles = [
        Line2D([], [], color="black", linewidth=1, label="student's"),
        Line2D([], [], color="#0072b2", linewidth=1, linestyle=":", label="teacher's"),
    ]
    axes.legend(handles=handles, fontsize=SMALL, frameon=False, ncols=2, loc="upper center",
                bbox_to_anchor=(0.5, -0.01))  # fmt: skip
    what = "" if token is None else ", shares of one (%)"
    axes.set_title(f"visual tokens{what}", fontsize=TEXT, loc="left")


# Measures of the targeting.

FIRST_COLUMN = ("targeting", "score")  # sources drawn filled; baselines are drawn open


def plot_quality(quality: pd.DataFrame, heading: str) -> Figure:
    """Draw ``targeting.targeting_quality``: a row of panels per modality, a panel per metric."""
    modalities = list(dict.fromkeys(quality["modality"]))
    metrics = list(dict.fromkeys(quality["metric"]))
    sources = {m: list(dict.fromkeys(quality.loc[quality["modality"] == m, "source"])) for m in modalities}
    heights = [0.55 + 0.26 * len(sources[m]) for m in modalities]
    figure = Figure(figsize=(1.5 + 1.35 * len(metrics), sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(modalities), len(metrics), height_ratios=heights, squeeze=False)
    for row, modality in enumerate(modalities):
        for column, metric in enumerate(metrics):
            axes = grid[row, column]
            own = quality[(quality["modality"] == modality) & (quality["metric"] == metric)]
            if own.empty:
                axes.set_axis_off()
                continue
            _draw_quality(axes, own.set_index("source"), sources[modality])
            n = int(own["n"].iloc[0])
            axes.set_title(f"{_plain(metric)} (n = {n})" if row == 0 or column == 0 else _plain(metric),
                           fontsize=SMALL)  # fmt: skip
            if column:
                axes.set_yticklabels([])
        grid[row, 0].set_ylabel(modality, fontsize=TEXT)
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


def _draw_quality(axes: Axes, own: pd.DataFrame, sources: Sequence[str]) -> None:
    for y, source in enumerate(sources):
        if source not in own.index:
            continue
        row = own.loc[source]
        is_own = source in FIRST_COLUMN
        colour = "#0072b2" if is_own else "#4d4d4d"
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(row["value"], y, "o" if is_own else "s", color=colour, markersize=4.5,
                  markerfacecolor=colour if is_own else "white")  # fmt: skip
        axes.annotate(f"{row['value']:.2f}", (row["value"], y), (0, 4), textcoords="offset points",
                      ha="center", fontsize=6)  # fmt: skip
    if "targeting" in own.index:
        axes.axvline(own.loc["targeting", "value"], color="#0072b2", linewidth=0.7, linestyle=":", zorder=0)
    axes.set_yticks(range(len(sources)), [_plain(source) for source in sources], fontsize=SMALL)
    axes.set_ylim(len(sources) - 0.5, -0.8)
    axes.tick_params(axis="x", labelsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.18)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(curves: pd.DataFrame, areas: pd.DataFrame, heading: str, unit: str) -> Figure:
    """Draw deletion and insertion: ``curves`` has ``source``, ``fraction``, ``deletion``, ``insertion``.

    ``areas`` holds the mean height of each curve, by source; it is written in the legend.
    """
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for i, (source, own) in enumerate(curves.groupby("source", sort=False)):
            axes.plot(
                100 * own["fraction"], own[part], color=LINE_COLOURS[i % len(LINE_COLOURS)],
                linestyle=LINE_STYLES[i % len(LINE_STYLES)], marker="os^Dvx+"[i % 7], markersize=3.5,
                linewidth=1.8 if source == "targeting" else 1.1,
                label=f"{_plain(source)} ({areas.loc[source, part]:.3f})",
            )  # fmt: skip
        gone = "masked" if part == "deletion" else "shown"
        axes.set_xlabel(f"tokens {gone} (%), first the highest", fontsize=SMALL)
        axes.set_title(f"{part} (mean height)", fontsize=TEXT, loc="left")
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6.5, frameon=False)
    figure.axes[0].set_ylabel(unit, fontsize=SMALL)
    figure.suptitle(_plain(heading), fontsize=LARGE)
    return _settled(figure)


# Attention.


def plot_attention(record: TargetRecord, values: np.ndarray, query: str, method: str, heading: str) -> Figure:
    """Draw how much each token got: boxes on the picture, words as bars, in % of all tokens.

    ``values`` (tokens,) of the record's tokens, at least 0; ``method`` says of which layers and heads,
    ``query`` from which token.
    """
    words = np.flatnonzero(record.is_text)
    other = np.flatnonzero(~record.is_text & ~record.is_visual & (values > 0))
    has_picture = bool(record.is_visual.any())
    rows = np.concatenate([words, other]) if len(words) else words  # else the picture's caption has them
    height = max(3.6, 0.9 + 0.165 * len(rows))
    figure = Figure(figsize=(7.6 if has_picture and len(rows) else 4.2, height), layout="constrained")
    count = int(has_picture) + int(len(rows) > 0)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if has_picture:
        axes = panels.pop(0)
        visual = record.is_visual & ~record.is_text
        shown = np.where(visual, values, np.nan)
        shade = draw_boxes(axes, record, shown, float(np.nanmax(shown)) or 1.0, most=10)
        elsewhere = [
            f"{_plain(record.tokens[i] or f'token {i}')} {percent(float(values[i]))} %" for i in other
        ]
        beside = f"; {', '.join(elsewhere)}" if elsewhere and not len(words) else ""
        axes.set_title(
            f"picture: {percent(float(values[visual].sum()))} %{beside}", fontsize=TEXT, loc="left"
        )
        axes.set_anchor("N")
        bar = figure.colorbar(shade, cax=axes.inset_axes((0, -0.07, 1, 0.035)), orientation="horizontal")
        bar.set_label("share (%)", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    for axes in panels:
        limit = 100 * float(values[rows].max())
        colours = matplotlib.colormaps[COLOURS](100 * values[rows] / (limit or 1))
        axes.barh(range(len(rows)), 100 * values[rows], color=colours, edgecolor="black", linewidth=0.5,
                  height=0.72)  # fmt: skip
        for row, i in enumerate(rows):
            axes.text(0.99, row, percent(float(values[i])), fontsize=6.5, ha="right", va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        names = [_plain(_short(record.tokens[i] or f"token {i}")) for i in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=SMALL)
        axes.set_ylim(max(len(rows), 12) - 0.4, -0.6)
        axes.set_xlim(0, 1.2 * (limit or 1))
        axes.set_xlabel("share (%)", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"words: {percent(float(values[words].sum()))} %, other: "
                       f"{percent(float(values[other].sum()))} %", fontsize=TEXT, loc="left")  # fmt: skip
    lines = [heading, f"{method}; query {query}" if query else method]
    figure.suptitle("\n".join(_plain(line) for line in lines), fontsize=TEXT)
    return _settled(figure)


def plot_heads(
    maps: np.ndarray, layers: Sequence[int], border: int, shares: np.ndarray, heading: str
) -> Figure:
    """Draw every head's attention map as a tile: a row of tiles per layer, a column per head.

    ``maps`` (layers, heads, queries, keys), rows sum to 1; ``border`` is the first visual position, drawn
    as lines where it is above 0, and ``shares`` (layers, heads) are then written beside the names.
    """
    count, heads = maps.shape[:2]
    side = float(np.clip(7.5 / max(heads, 1), 0.62, 1.7))
    figure = Figure(figsize=(1.3 + side * heads, 0.8 + (side + 0.2) * count), layout="constrained")
    grid = figure.subplots(count, heads, squeeze=False)
    image = None
    for row, layer in enumerate(layers):
        for head in range(heads):
            axes, tile = grid[row, head], np.sqrt(maps[row, head])
            image = axes.imshow(tile, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="none")
            if border:
                axes.axhline(border - 0.5, color="black", linewidth=0.5)
                axes.axvline(border - 0.5, color="black", linewidth=0.5)
            axes.set(xticks=[], yticks=[])
            share = f" · {percent(float(shares[row, head]))}" if border else ""
            axes.set_title(f"{layer}.{head}{share}", fontsize=6.5, pad=1.5)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30)
        ticks = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
        bar.set_ticks(list(np.sqrt(ticks)), labels=[f"{100 * t:g}" for t in ticks], fontsize=SMALL)
        bar.set_label("attention (%), square-root scale", fontsize=SMALL)
    figure.suptitle("\n".join(textwrap.wrap(_plain(heading), max(40, int(14 * side * heads)))), fontsize=TEXT)
    return _settled(figure)


def _bar(figure: Any, shade: Any, axes: Any, name: str, **options: Any) -> None:
    """A colour bar in small letters."""
    bar = figure.colorbar(shade, ax=axes, shrink=0.8, **options)
    bar.set_label(name, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
