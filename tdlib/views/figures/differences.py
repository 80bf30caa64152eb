"""Draws differences to a baseline, which is what a comparison asks; scores themselves are in other figures.

Marks are filled where the paired test found a difference, so that nothing is told by colour alone.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.lines import Line2D

from tdlib.analysis.compare import worlds_in_words
from tdlib.analysis.statistics import FOUND
from tdlib.views.figures.style import (
    GREY,
    LINE_COLOURS,
    MARKS,
    Figure,
    need,
    panels,
    plain,
    shared_legend,
    styled,
)


@styled
def plot_differences(
    table: pd.DataFrame,
    row: str = "split",
    panel: Sequence[str] = ("task", "setting", "world"),
    baseline: str = "finetune",
) -> Figure:
    """Draw each arm's paired difference to the baseline, in points, with its interval.

    ``table`` has columns ``arm``, ``difference``, ``difference_low``, ``difference_high`` (shares),
    ``verdict`` and those of ``row`` (each value is a line of the figure) and ``panel`` (each combination is a
    panel; columns that the table lacks do not count): ``compare.summarise`` or ``protocol.shift_table``
    give it. Rows without a difference, such as the baseline's, are not drawn. Raises ValueError for a
    missing column or a table without differences.
    """
    columns = [row, "arm", "verdict", "difference", "difference_low", "difference_high"]
    need(table, columns, "plot_differences")
    drawn = table.dropna(subset=["difference"])
    need(drawn, columns, "plot_differences")
    arms = list(dict.fromkeys(drawn["arm"]))
    # The first colour and mark are the baseline's in other figures.
    colours, marks = LINE_COLOURS[1:] + LINE_COLOURS[:1], MARKS[1:] + MARKS[:1]
    keys = [name for name in panel if name in drawn]
    groups = list(drawn.groupby(keys, sort=False)) if keys else [((), drawn)]
    most = max(rows[row].nunique() for _, rows in groups)
    figure, grid = panels(len(groups), 0.9 + most * (0.2 + 0.16 * len(arms)), sharex=False, sharey=False)
    for axes, (key, rows) in zip(grid, groups, strict=True):
        places = list(dict.fromkeys(rows[row]))
        for one in rows.to_dict("records"):
            arm = arms.index(one["arm"])
            y = places.index(one[row]) + (arm - (len(arms) - 1) / 2) * 0.7 / len(arms)
            colour, mark = colours[arm % len(colours)], marks[arm % len(marks)]
            low, high = 100 * one["difference_low"], 100 * one["difference_high"]
            axes.hlines(y, low, high, color=colour, linewidth=1.5)
            filled = colour if one["verdict"] in FOUND else "white"
            axes.plot(100 * one["difference"], y, mark, color=colour, markerfacecolor=filled, markersize=5.5)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(places)), [plain(str(place)) for place in places])
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xlabel(f"difference to {plain(baseline)} (points)")
        parts = [
            worlds_in_words(part) if k == "world" else str(part) for k, part in zip(keys, key, strict=True)
        ]
        heading = ", ".join(part for part in parts if part)
        axes.set_title(plain(heading))
        axes.grid(axis="both")
    for arm, name in enumerate(arms):
        colour, mark = colours[arm % len(colours)], marks[arm % len(marks)]
        line = Line2D([], [], label=plain(name), color=colour, marker=mark, markerfacecolor="white")
        grid[0].add_line(line)
    if any(drawn["verdict"].isin(FOUND)):
        line = Line2D([], [], label="filled: found by the test", color=GREY, marker="o", linestyle="")
        grid[0].add_line(line)
    shared_legend(figure, grid)
    return figure
