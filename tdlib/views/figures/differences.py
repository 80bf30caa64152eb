"""Draws differences to a baseline, which is what a comparison asks; scores themselves are in other figures.

Marks are filled where the paired test found a difference, so that nothing is told by colour alone, and small
where it was not asked.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from tdlib.analysis.compare import worlds_in_words
from tdlib.analysis.statistics import FOUND, UNTESTED
from tdlib.views.figures.style import (
    GREY,
    LINE_COLOURS,
    Figure,
    mark,
    need,
    panels,
    plain,
    shared_legend,
    styled,
    wrapped,
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
    looks: dict[str, dict[str, Any]] = {
        arm: {"color": LINE_COLOURS[place % len(LINE_COLOURS)], "marker": mark(place)}
        for place, arm in enumerate(arms, start=1)
    }
    keys = [name for name in panel if name in drawn]
    groups = list(drawn.groupby(keys, sort=False)) if keys else [((), drawn)]
    most = max(rows[row].nunique() for _, rows in groups)
    figure, grid = panels(len(groups), 0.9 + most * (0.2 + 0.16 * len(arms)))
    for axes, (key, rows) in zip(grid, groups, strict=True):
        places = list(dict.fromkeys(rows[row]))
        for one in rows.to_dict("records"):
            look, arm = looks[one["arm"]], arms.index(one["arm"])
            y = places.index(one[row]) + (arm - (len(arms) - 1) / 2) * 0.7 / len(arms)
            low, high = 100 * one["difference_low"], 100 * one["difference_high"]
            axes.hlines(y, low, high, color=look["color"], linewidth=1.5)
            filled = look["color"] if one["verdict"] in FOUND else "white"
            size = 3 if one["verdict"] == UNTESTED else 5.5
            axes.plot(100 * one["difference"], y, markerfacecolor=filled, markersize=size, **look)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(places)), [plain(str(place)) for place in places])
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xlabel(wrapped(f"difference to {baseline} (points)"))
        named = zip(keys, key, strict=True)
        parts = [worlds_in_words(part) if name == "world" else str(part) for name, part in named]
        axes.set_title(wrapped(", ".join(part for part in parts if part)))
        axes.grid(axis="both")
    for name, look in looks.items():
        grid[0].add_line(Line2D([], [], label=plain(name), markerfacecolor="white", **look))
    notes = []
    if any(drawn["verdict"].isin(FOUND)):
        notes.append(("filled: found by the test", GREY, 4))
    if any(drawn["verdict"] == UNTESTED):
        notes.append(("small: not tested", "white", 3))
    for label, face, size in notes:
        look = {"color": GREY, "marker": "o", "linestyle": "", "markerfacecolor": face, "markersize": size}
        grid[0].add_line(Line2D([], [], label=label, **look))
    shared_legend(figure, grid)
    return figure
