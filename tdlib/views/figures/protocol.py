"""Draws accuracy over training examples, and measures of the targeting beside their baselines.

Arms differ by mark and line style, not by colour alone; the targeting's own marks are filled.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from tdlib.analysis.compare import number_of_worlds, worlds_in_words
from tdlib.views.figures.style import (
    BLUE,
    GREY,
    Figure,
    line_style,
    mark,
    need,
    panels,
    plain,
    shared_legend,
    small,
    styled,
    wrapped,
)  # fmt: skip

TICKS = 8  # sizes beyond which not every one is written below the axis


@styled
def plot_shots(shots: pd.DataFrame) -> Figure:
    """Draw accuracy over the number of training examples: a panel per task and worlds, a line per arm.

    ``shots`` is a table of ``protocol.shots_table``: task, setting, world, arm, train_examples, mean, low,
    high and chance (shares in [0, 1]). Intervals are upright lines, arms stand beside each other at each
    size. Chance is dashed. Raises ValueError for a missing column or an empty table.
    """
    columns = ["task", "setting", "world", "arm", "train_examples", "mean", "low", "high", "chance"]
    need(shots, columns, "plot_shots")
    arms = list(dict.fromkeys(shots["arm"]))
    groups = list(shots.groupby(["task", "setting", "world"], sort=False))
    figure, grid = panels(len(groups), 2.9)
    for axes, (key, rows) in zip(grid, groups, strict=True):
        sizes = sorted(rows["train_examples"].unique())
        of_panel = [arm for arm in arms if arm in set(rows["arm"])]
        for column, arm in enumerate(of_panel):
            of_arm = rows[rows["arm"] == arm].sort_values("train_examples")
            # a factor, as the axis is logarithmic: intervals of arms would hide each other
            apart = 1 + 0.02 * (column - (len(of_panel) - 1) / 2)
            x = of_arm["train_examples"] * apart
            place = arms.index(arm)  # an arm looks alike in every panel
            style = line_style(place) | {"marker": mark(place)}
            axes.vlines(x, 100 * of_arm["low"], 100 * of_arm["high"], color=style["color"], linewidth=1)
            axes.plot(x, 100 * of_arm["mean"], label=plain(arm), linewidth=1.5, markersize=5, **style)
        axes.axhline(100 * rows["chance"].mean(), color=GREY, linewidth=1, linestyle="--", label="chance")
        axes.set_xscale("log")
        axes.minorticks_off()
        shown = sizes if len(sizes) <= TICKS else [sizes[0], sizes[-1]]
        axes.set_xticks(shown, [f"{size:.0f}" for size in shown])
        # Also around a single size, whose arms would otherwise fill the whole width.
        reach = 1.1 * (sizes[-1] / sizes[0]) ** 0.15
        axes.set_xlim(sizes[0] / reach, sizes[-1] * reach)
        axes.set_xlabel("training examples")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(wrapped(_heading(key, rows)))
        axes.grid(axis="both")
    shared_legend(figure, grid)
    return figure


def _heading(key: Any, rows: pd.DataFrame) -> str:
    task, setting, world = key
    name = ", ".join(part for part in (task, setting, worlds_in_words(world)) if part)
    if "seeds" not in rows:
        return name
    fewest, most = rows["seeds"].min(), rows["seeds"].max()
    counted = "seeds" if number_of_worlds(world) == 1 else "runs of an arm"  # a seed runs in every world
    return f"{name} ({fewest:g} to {most:g} {counted})" if fewest < most else f"{name} ({most:g} {counted})"


# Measures of the targeting.

FIRST_COLUMN = ("targeting", "score")  # sources drawn filled; baselines are drawn open


@styled
def plot_quality(quality: pd.DataFrame, heading: str) -> Figure:
    """Draw ``targeting.targeting_quality``: a row of panels per modality, a panel per metric."""
    modalities = list(dict.fromkeys(quality["modality"]))
    metrics = list(dict.fromkeys(quality["metric"]))
    sources = {m: list(dict.fromkeys(quality.loc[quality["modality"] == m, "source"])) for m in modalities}
    heights = [0.55 + 0.26 * len(sources[m]) for m in modalities]
    figure = Figure(figsize=(1.5 + 1.35 * len(metrics), sum(heights) + 0.5))
    grid = figure.subplots(len(modalities), len(metrics), height_ratios=heights, squeeze=False)
    for row, modality in enumerate(modalities):
        for column, metric in enumerate(metrics):
            axes = grid[row, column]
            rows = quality[(quality["modality"] == modality) & (quality["metric"] == metric)]
            if rows.empty:
                axes.set_axis_off()
                continue
            _draw_quality(axes, rows.set_index("source"), sources[modality])
            n = int(rows["n"].iloc[0])
            axes.set_title(f"{plain(metric)} (n = {n})" if row == 0 or column == 0 else plain(metric))
            if column:
                axes.set_yticklabels([])
        grid[row, 0].set_ylabel(modality)
    figure.suptitle(plain(heading))
    return figure


def _draw_quality(axes: Axes, rows: pd.DataFrame, sources: Sequence[str]) -> None:
    for y, source in enumerate(sources):
        if source not in rows.index:
            continue
        row = rows.loc[source]
        is_targeting = source in FIRST_COLUMN
        colour = BLUE if is_targeting else "#4d4d4d"
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(row["value"], y, "o" if is_targeting else "s", color=colour, markersize=4.5,
                  markerfacecolor=colour if is_targeting else "white")  # fmt: skip
        axes.annotate(f"{row['value']:.2f}", (row["value"], y), (0, 4), textcoords="offset points",
                      ha="center", fontsize=0.8 * small())  # fmt: skip
    if "targeting" in rows.index:
        axes.axvline(rows.loc["targeting", "value"], color=BLUE, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_yticks(range(len(sources)), [plain(source) for source in sources])
    axes.set_ylim(len(sources) - 0.5, -0.8)
    axes.tick_params(axis="x", labelsize=0.87 * small())
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.18)
    axes.locator_params(axis="x", nbins=4)


@styled
def plot_curves(curves: pd.DataFrame, areas: pd.DataFrame, heading: str) -> Figure:
    """Draw deletion and insertion: ``curves`` has ``source``, ``fraction``, ``deletion``, ``insertion``.

    ``areas`` holds the mean height of each curve, by source; it is written in the legend.
    """
    figure = Figure(figsize=(7.2, 3.3))
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for i, (source, rows) in enumerate(curves.groupby("source", sort=False)):
            axes.plot(
                100 * rows["fraction"], rows[part], **line_style(i), marker="os^Dvx+"[i % 7], markersize=3.5,
                linewidth=1.8 if source == "targeting" else 1.1,
                label=f"{plain(source)} ({areas.loc[source, part]:.3f})",
            )  # fmt: skip
        gone = "masked" if part == "deletion" else "shown"
        axes.set_xlabel(f"tokens {gone} (%), first the highest")
        axes.set_title(f"{part} (mean height)")
        axes.legend(fontsize=0.87 * small())
    figure.axes[0].set_ylabel("probability")
    figure.suptitle(plain(heading))
    return figure
