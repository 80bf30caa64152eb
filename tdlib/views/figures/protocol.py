"""Draws accuracy over training examples. Arms differ by mark and line style, not by colour alone."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from tdlib.views.figures.targets import (
    GREY,
    LARGE,
    LINE_COLOURS,
    LINE_STYLES,
    SMALL,
    TEXT,
    Figure,
    _need,
    _panels,
    _plain,
    _settled,
    _shared_legend,
)

MARKS = ["o", "s", "^", "D", "v", "P", "X"]
TICKS = 8  # sizes beyond which not every one is written below the axis


def plot_shots(shots: pd.DataFrame) -> Figure:
    """Draw accuracy over the number of training examples: a panel per task, a line per arm.

    ``shots`` is a table of ``protocol.shots_table``: task, setting, arm, train_examples, mean, low, high
    and chance (shares in [0, 1]). Intervals are upright lines, arms stand beside each other at each size.
    Chance is dashed. Raises ValueError for a missing column or an empty table.
    """
    columns = ["task", "setting", "arm", "train_examples", "mean", "low", "high", "chance"]
    _need(shots, columns, "plot_shots")
    arms = list(dict.fromkeys(shots["arm"]))
    groups = list(shots.groupby(["task", "setting"], sort=False))
    figure, panels = _panels(len(groups), 2.9, sharex=False, sharey=False)
    for axes, (key, rows) in zip(panels, groups, strict=True):
        sizes = sorted(rows["train_examples"].unique())
        for place, arm in enumerate(arms):
            own = rows[rows["arm"] == arm].sort_values("train_examples")
            apart = 1 + 0.02 * (place - (len(arms) - 1) / 2)
            x = own["train_examples"] * apart
            style = _style(place)
            axes.vlines(x, 100 * own["low"], 100 * own["high"], color=style["color"], linewidth=1)
            axes.plot(x, 100 * own["mean"], label=_plain(arm), linewidth=1.5, markersize=5, **style)
        axes.axhline(100 * rows["chance"].mean(), color=GREY, linewidth=1, linestyle="--", label="chance")
        axes.set_xscale("log")
        axes.minorticks_off()
        shown = sizes if len(sizes) <= TICKS else [sizes[0], sizes[-1]]
        axes.set_xticks(shown, [f"{size:.0f}" for size in shown])
        axes.margins(x=0.15)
        axes.set_xlabel("training examples", fontsize=TEXT)
        axes.set_ylabel("accuracy (%)", fontsize=TEXT)
        _finish(axes, _heading(key, rows))
    _shared_legend(figure, panels)
    return _settled(figure)


def _style(place: int) -> dict[str, Any]:
    return {
        "color": LINE_COLOURS[place % len(LINE_COLOURS)], "marker": MARKS[place % len(MARKS)],
        "linestyle": LINE_STYLES[place % len(LINE_STYLES)],
    }  # fmt: skip


def _heading(key: Any, rows: pd.DataFrame) -> str:
    task, setting = key
    name = f"{task}{', ' + setting if setting else ''}"
    if "seeds" not in rows:
        return name
    fewest, most = rows["seeds"].min(), rows["seeds"].max()
    return f"{name} ({fewest:g} to {most:g} seeds)" if fewest < most else f"{name} ({most:g} seeds)"


def _finish(axes: Axes, heading: str) -> None:
    axes.set_title(_plain(heading), fontsize=LARGE)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
