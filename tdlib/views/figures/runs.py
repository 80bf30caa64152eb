"""Figures of training runs: tokens over the steps, instance weights, loss curves."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tdlib.views.figures.style import (
    BLUE,
    GREY,
    WEIGHTS,
    Figure,
    line_style,
    need,
    panels,
    plain,
    shared_legend,
    short,
    small,
    step_axis,
    step_name,
    styled,
)  # fmt: skip
from tdlib.views.figures.targets import draw_boxes
from tdlib.views.sheet import Sheet

TEXT_LINE: dict[str, Any] = {"color": "#000000", "marker": "o", "linestyle": "-"}
VISUAL_LINE: dict[str, Any] = {
    "color": "#d55e00", "marker": "s", "linestyle": "--", "markerfacecolor": "white",
}  # fmt: skip
MANY_STEPS = 12  # with more, a cell is too narrow for its number


# One statement over training.


@styled
def plot_evolution(
    tokens: pd.DataFrame,
    steps: pd.DataFrame,
    shown: Sequence[Sheet],
    heading: str,
    hidden: str,
    decisive: Collection[int],
    truth: str,
    highest: float,
) -> Figure:
    """Draw tokens x steps as a heat map, and below it set size, turnover and pictures, on one scale.

    ``tokens`` is ``evolution.evolution_table`` of one statement, of the tokens to draw; ``steps`` its
    rows of ``turnover_table``; ``shown`` the sheets whose pictures are drawn; ``hidden`` heads the
    visual tokens and says how many are drawn, ``decisive`` are positions to mark, which ``truth`` names;
    ``highest`` ends the scale.
    """
    labels = [step_name(step) for step in steps["step"]]
    is_visual = tokens["kind"] == "visual"
    parts = [part for part in (tokens[~is_visual], tokens[is_visual]) if len(part)]
    rows = [part["position"].nunique() for part in parts]
    tall = 0.17 * sum(rows) + 0.5 + 0.4 * len(parts)
    ratios = [tall, 1.9, *([2.0] if shown else [])]
    figure = Figure(figsize=(max(6.4, min(9.0, 3.0 + 0.42 * len(labels))), sum(ratios) + 0.4))
    upper, middle, *lower = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    if parts:
        maps = list(upper.subplots(len(parts), 1, height_ratios=[n + 1 for n in rows], squeeze=False)[:, 0])
        for axes, part in zip(maps, parts, strict=True):
            image = _draw_heat(axes, part, labels, decisive, highest or 1.0)
            axes.set_title("words" if part["kind"].iloc[0] == "text" else hidden)
        scale = upper.colorbar(image, ax=maps, shrink=0.8, pad=0.01, aspect=max(10, 4 * tall))
        scale.set_label("weight (%)")
        note = f"; * decides the answer ({truth})" if decisive else ""
        maps[-1].set_xlabel(f"training step (updates){note}")
    else:
        upper.text(0.5, 0.5, "no words, and no visual token was ever selected", ha="center", va="center")
    sizes, changes = middle.subplots(1, 2)
    _draw_steps(sizes, steps, "selected", "selected tokens", labels)
    _draw_steps(changes, steps, "turnover", "turnover (1 − Jaccard)", labels)
    changes.set_ylim(-0.05, 1.05)
    middle.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    if lower:
        for panel, sheet in zip(lower[0].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw_boxes(panel, sheet)
            step = step_name(sheet.record.step)
            panel.set_title(step if step == "end" else f"step {step}")
    figure.suptitle(plain(heading))
    return figure


def _draw_heat(
    axes: Axes, tokens: pd.DataFrame, labels: list[str], decisive: Collection[int], highest: float
) -> Any:
    """Draws tokens x steps; cells are white where a token is not selected."""
    weights = tokens.pivot(index="position", columns="order", values="weight")
    selected = tokens.pivot(index="position", columns="order", values="selected").to_numpy(dtype=bool)
    names = tokens.drop_duplicates("position").set_index("position")["token"].loc[weights.index]
    values = np.ma.masked_array(100 * weights.to_numpy(), ~selected)
    image = axes.imshow(values, cmap=WEIGHTS, vmin=0, vmax=100 * highest, aspect="auto", interpolation="none")
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
        value = float(values[row, column])
        colour = "white" if value > 50 * highest else "black"
        if len(labels) <= MANY_STEPS:
            axes.text(
                column, row, f"{value:.1f}", fontsize=0.87 * small(), ha="center", va="center", color=colour
            )
        else:
            axes.plot(column, row, ".", color=colour, markersize=2)
    rows = [f"{'* ' if place in decisive else ''}{short(name)}" for place, name in names.items()]
    axes.set_yticks(range(len(rows)), rows, fontsize=small())
    step_axis(axes, labels)
    axes.set_xlabel("")
    axes.spines[:].set_visible(True)
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="#e4e4e4", linewidth=0.4)
    return image


def _draw_steps(axes: Axes, steps: pd.DataFrame, value: str, name: str, labels: list[str]) -> None:
    """Draws two lines over the steps: ``{value}_text`` and ``{value}_visual``."""
    for kind, style in (("text", TEXT_LINE), ("visual", VISUAL_LINE)):
        axes.plot(steps["order"], steps[f"{value}_{kind}"], label=f"{kind} tokens", **style)
    axes.set_ylim(0, 1.1 * max(1.0, float(steps[[f"{value}_text", f"{value}_visual"]].max().max())))
    axes.set_title(name)
    step_axis(axes, labels)
    axes.grid(axis="y")


# Instance weights.

INSTANCE_LINES: dict[str, dict[str, Any]] = {
    "p_T": {"color": BLUE, "linestyle": "--", "marker": "^"},
    "p_S": {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    "c": {"color": "#000000", "linestyle": "-.", "marker": "s", "markerfacecolor": "white"},
}


@styled
def plot_instances(table: pd.DataFrame, example_id: str | None, heading: str) -> Figure:
    """Draw p_T, p_S and c of an example over training, c's distribution per step, and p_T against p_S.

    ``table`` is that of ``evolution.instance_view``. Without ``example_id`` the first panel is left out;
    with a single example, the other two are.
    """
    steps = table.drop_duplicates("order").sort_values("order")
    labels = [step_name(step) for step in steps["step"]]
    chosen = table[table["example_id"] == example_id].sort_values("order")
    several = table["example_id"].nunique() > 1
    draw = [_draw_example] if len(chosen) else []
    draw += [_draw_distribution, _draw_pairs] if several else []
    figure = Figure(figsize=(0.6 + 3.1 * max(1, len(draw)), 3.2))
    grid = figure.subplots(1, max(1, len(draw)), squeeze=False)[0]
    for axes, panel in zip(grid, draw, strict=False):
        panel(axes, table, chosen, labels)
    figure.suptitle(plain(heading))
    return figure


def _draw_example(axes: Axes, table: pd.DataFrame, chosen: pd.DataFrame, labels: list[str]) -> None:
    for name, style in INSTANCE_LINES.items():
        axes.plot(chosen["order"], chosen[name], label=f"${name}$", **style)
        last = chosen["order"].iloc[-1], chosen[name].iloc[-1]
        axes.annotate(
            f"{last[1]:.2f}", last, (6, 0), textcoords="offset points", fontsize=small(), va="center"
        )
    step_axis(axes, labels)
    axes.set_ylim(-0.03, max(1.03, 1.05 * chosen[list(INSTANCE_LINES)].max().max()))
    axes.margins(x=0.12)
    axes.set_title(short(str(chosen["example_id"].iloc[0]), 30))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _draw_distribution(axes: Axes, table: pd.DataFrame, chosen: pd.DataFrame, labels: list[str]) -> None:
    orders = sorted(table["order"].unique())
    boxes = [table.loc[table["order"] == order, "c"].to_numpy() for order in orders]
    line = {"color": BLUE}
    axes.boxplot(
        boxes, positions=orders, widths=0.6, whis=(0, 100), manage_ticks=False, boxprops=line, capprops=line,
        whiskerprops=line, medianprops={"color": "black", "linewidth": 1.8},
    )  # fmt: skip
    if len(chosen):
        axes.plot(chosen["order"], chosen["c"], **INSTANCE_LINES["c"], linewidth=0.9, label="example")
    step_axis(axes, labels)
    axes.set_ylim(-0.03, max(1.03, 1.05 * table["c"].max()))
    axes.set_title(f"$c$: range, quartiles, median (n = {table['example_id'].nunique()})")


def _draw_pairs(axes: Axes, table: pd.DataFrame, chosen: pd.DataFrame, labels: list[str]) -> None:
    last = table[table["order"] == table["order"].max()]
    spread = axes.scatter(
        last["p_S"], last["p_T"], c=last["c"], cmap=WEIGHTS, vmin=0, vmax=max(1.0, last["c"].max()), s=26,
        edgecolor="black", linewidth=0.6,
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    if len(chosen):
        marked = chosen[chosen["order"] == chosen["order"].max()]
        axes.plot(marked["p_S"], marked["p_T"], "o", markersize=11, markerfacecolor="none",
                  markeredgecolor="black")  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="$p_S$", ylabel="$p_T$")
    step = step_name(int(last["step"].iloc[0]))
    axes.set_title(f"all examples, {'end' if step == 'end' else f'step {step}'}")
    bar = axes.inset_axes((1.04, 0, 0.05, 0.9))
    axes.figure.colorbar(spread, cax=bar)
    bar.set_title("$c$")


# Histories.


@styled
def plot_history(history: pd.DataFrame) -> Figure:
    """Draw each term of the loss over the training: a panel per term, a line per arm.

    ``history`` has a row per logged value: ``step``, ``term``, ``value``, ``arm``, ``seed``. Seeds are
    thin lines, their mean (where every seed has a value) a thick one. Raises ValueError for a missing
    column or an empty table.
    """
    need(history, ["step", "term", "value", "arm", "seed"], "plot_history")
    arms, terms = list(dict.fromkeys(history["arm"])), list(dict.fromkeys(history["term"]))
    figure, grid = panels(len(terms), 2.4, sharex=True)
    for axes, term in zip(grid, terms, strict=True):
        for i, arm in enumerate(arms):
            rows = history[(history["term"] == term) & (history["arm"] == arm)].dropna(subset=["value"])
            _draw_curves(axes, rows, plain(arm), line_style(i))
        axes.set_title(plain(term))
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    shared_legend(figure, grid)
    return figure


def _draw_curves(axes: Axes, rows: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    by_seed = rows.pivot_table(index="step", columns="seed", values="value").sort_index()
    if by_seed.shape[1] > 1:
        for seed in by_seed:
            curve = by_seed[seed].dropna()
            axes.plot(curve.index, curve, linewidth=0.6, alpha=0.5, **style)
    mean = by_seed.dropna().mean(axis=1)
    axes.plot(mean.index, mean, linewidth=1.8, label=label, **style)
