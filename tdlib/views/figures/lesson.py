"""Draws a re-paired lesson: two pictures, and how CLIP and the student judge texts with them."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from tdlib.views.figures.style import BLUE, Figure, plain, shared_legend, small, styled
from tdlib.views.figures.targets import draw_background

BARS: dict[str, dict[str, Any]] = {  # by who says it
    "CLIP": {"color": BLUE, "hatch": ""},
    "student before": {"color": "white", "edgecolor": "#d55e00", "hatch": "////"},
    "student": {"color": "#d55e00", "hatch": ""},
}
LINE = 44  # letters


@styled
def plot_lesson(pictures: dict[str, Path], texts: Sequence[str], table: pd.DataFrame, heading: str) -> Figure:
    """Draw both pictures, and below each a bar for the probability that everyone gives each text.

    ``pictures`` are the example's picture and the other one, by name; ``texts`` has one text per statement,
    in the order of their numbers. ``table`` has ``picture`` (a name), ``choice`` (that number), ``who``
    (a key of ``BARS``) and ``probability``.
    """
    who = [name for name in BARS if (table["who"] == name).any()]
    labels = ["\n".join(wrap(plain(text), LINE)) for text in texts]
    tall = sum(max(0.2 * len(who) + 0.15, 0.17 * (label.count("\n") + 1) + 0.1) for label in labels)
    figure = Figure(figsize=(9.4, 3.0 + 0.6 + tall))
    grid = figure.subplots(2, 2, height_ratios=[2.6, tall + 0.3], squeeze=False)
    for column, (name, path) in enumerate(pictures.items()):
        draw_background(grid[0, column], path)
        grid[0, column].set_title(f"{plain(name)}: {plain(path.name)}")
        _draw_bars(grid[1, column], table[table["picture"] == name], who, len(texts))
    grid[1, 0].set_yticks(range(len(labels)), labels)
    grid[1, 1].set_yticks(range(len(labels)), [""] * len(labels))
    shared_legend(figure, list(grid[1]))
    figure.suptitle(plain(heading))
    return figure


def _draw_bars(axes: Axes, table: pd.DataFrame, who: Sequence[str], texts: int) -> None:
    height = 0.8 / len(who)
    for place, name in enumerate(who):
        rows = table[table["who"] == name]
        at = rows["choice"] + (place - (len(who) - 1) / 2) * height
        axes.barh(at, 100 * rows["probability"], height=0.9 * height, label=name, **BARS[name])
        for y, value in zip(at, rows["probability"], strict=True):
            axes.annotate(f"{100 * value:.0f}", (100 * value, y), (3, 0), textcoords="offset points",
                          va="center", fontsize=small())  # fmt: skip
    axes.set(xlim=(0, 112), ylim=(texts - 0.5, -0.5), xlabel="probability (%)")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(axis="x")
    axes.set_axisbelow(True)
