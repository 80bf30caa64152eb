"""Draws attention heads. The attention of one token is a sheet, which ``figures.targets`` draws."""

import textwrap
from collections.abc import Sequence

import numpy as np

from tdlib.core.facts import percent
from tdlib.views.figures.style import WEIGHTS, Figure, plain, styled

GAP = 0.06  # between tiles, in widths of a tile
NAME = 0.2  # height of the line above a tile


@styled
def plot_heads(
    maps: np.ndarray, layers: Sequence[int], border: int, shares: np.ndarray, heading: str
) -> Figure:
    """Draw every head's attention map as a tile: a row of tiles per layer, a column per head.

    ``maps`` (layers, heads, queries, keys), rows sum to 1; ``border`` is the first visual position, drawn
    as lines where it is above 0, and ``shares`` (layers, heads) are then written beside the names.
    """
    count, heads = maps.shape[:2]
    side = float(np.clip(7.5 / max(heads, 1), 0.62, 1.7))
    figure = Figure(figsize=(1.3 + side * heads, 0.8 + (side + 0.2) * count))
    axes = figure.add_subplot()
    axes.set_axis_off()
    place = border / maps.shape[-1] * (1 - GAP)
    # All tiles share one pair of axes: laying out 144 pairs takes seconds.
    for row, layer in enumerate(layers):
        top = row * (1 + NAME)
        for head in range(heads):
            image = axes.imshow(
                np.sqrt(maps[row, head]), cmap=WEIGHTS, vmin=0, vmax=1, interpolation="none",
                extent=(head, head + 1 - GAP, top + 1 - GAP, top),
            )  # fmt: skip
            edges = [(head, top, 1 - GAP, 1 - GAP)]
            if border:
                edges += [(head, top, place, 1 - GAP), (head, top, 1 - GAP, place)]
            for x, y, wide, high in edges:
                axes.plot(
                    [x, x + wide, x + wide, x, x], [y, y, y + high, y + high, y], color="black", linewidth=0.5
                )
            share = f" · {percent(float(shares[row, head]))}" if border else ""
            axes.text(head, top - 0.03, f"{layer}.{head}{share}", fontsize=6.5)
    axes.set(xlim=(-0.02, heads), ylim=(count * (1 + NAME), -NAME), aspect="equal")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    ticks = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_ticks(list(np.sqrt(ticks)), labels=[f"{100 * t:g}" for t in ticks])
    bar.set_label("attention (%), square-root scale")
    figure.suptitle("\n".join(textwrap.wrap(plain(heading), max(40, int(14 * side * heads)))))
    return figure
