"""The style of every figure, and its export to files.

One matplotlib style, as an rc context that ``styled`` puts around every function that draws; in a paper
(``drawn(..., paper=True)``) type is smaller and the heading is left to the caption. No pyplot, so that
figures hold no global state and need no closing. Strings from the data are never read as formulas ("$").
"""

import functools
import io
import textwrap
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patheffects import withStroke

from tdlib.core.records import END
from tdlib.views.scale import DARKEST, HUE, LESS, MORE

STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "figure.titlesize": 10,
    "figure.constrained_layout.use": True,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "tdlib",  # the same file for the same figure
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and set in the page's type
    "pdf.fonttype": 42,
}
# Columns of most papers are set in 9 or 10 points; figures are made at their printed size.
PAPER: dict[str, Any] = STYLE | {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3,
}
_rules: ContextVar[Any] = ContextVar("rules", default=STYLE)

GREY, BAND, BLUE = "#6b6b6b", "#dddddd", "#0072b2"
# Okabe and Ito's colours, darkest first, so that the first ones also differ in grey print.
LINE_COLOURS = ["#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LINE_STYLES = ["-", "--", "-.", ":"]
MARKS = ["o", "s", "^", "D", "v", "P", "X"]
HALO = [withStroke(linewidth=2, foreground="white")]


def _ramp(name: str, *stops: tuple[float, tuple[int, int, int], float]) -> LinearSegmentedColormap:
    """A colour map of (place, hue, alpha)."""
    colours = [(place, (*(channel / 255 for channel in hue), alpha)) for place, hue, alpha in stops]
    return LinearSegmentedColormap.from_list(name, colours)


# The colours of ``views.scale``: over a picture the alpha is the value, on white they are a tint.
WEIGHTS = _ramp("weight", (0, HUE, 0), (1, HUE, DARKEST))
DIFFERENCES = _ramp("difference", (0, LESS, DARKEST), (0.5, LESS, 0), (0.5, MORE, 0), (1, MORE, DARKEST))


class Figure(MatplotlibFigure):
    """A matplotlib Figure that shows itself in a notebook without pyplot."""

    def _repr_png_(self) -> bytes:
        return to_png(self, dpi=110)


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Makes a function draw under the style's rules, and lays its figure out once and for all."""

    @functools.wraps(plot)
    def draw(*arguments: Any, **options: Any) -> Figure:
        with matplotlib.rc_context(_rules.get()):
            figure = plot(*arguments, **options)
            for _ in range(2):  # one pass is not enough where a picture has a fixed aspect
                figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return draw


def drawn(plot: Callable[..., Figure], arguments: Mapping[str, Any], paper: bool = False) -> Figure:
    """Draws ``plot``; ``paper``: in small type and without the heading, which the caption says."""
    if not paper:
        return plot(**arguments)
    before = _rules.set(PAPER)
    try:
        figure = plot(**arguments)
    finally:
        _rules.reset(before)
    figure.suptitle("")
    return figure


def small() -> float:
    """Size of small letters in points, on the screen or in a paper."""
    return float(matplotlib.rcParams["xtick.labelsize"])


def _saved(figure: MatplotlibFigure, path: Path | str | None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_rules.get()):
        figure.savefig(buffer, bbox_inches="tight", pad_inches=0.05, **options)
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def to_png(figure: MatplotlibFigure, path: Path | str | None = None, dpi: int = 300) -> bytes:
    """The figure as PNG, nothing cut off; also written to ``path`` if there is one."""
    return _saved(figure, path, format="png", dpi=dpi)


def to_svg(figure: MatplotlibFigure, path: Path | str | None = None) -> str:
    """The figure as SVG with text as text, the same file for the same figure."""
    return _saved(figure, path, format="svg", metadata={"Date": None}).decode()


def to_pdf(figure: MatplotlibFigure, path: Path | str | None = None) -> bytes:
    """The figure as PDF with text as text (TrueType), the same file for the same figure."""
    return _saved(figure, path, format="pdf", metadata={"CreationDate": None})


# Text and axes.


def line_style(place: int) -> dict[str, Any]:
    """Colour and dashes of the line in this place, so that nothing is told by colour alone."""
    colour, dashes = LINE_COLOURS[place % len(LINE_COLOURS)], LINE_STYLES[place % len(LINE_STYLES)]
    return {"color": colour, "linestyle": dashes}


def plain(text: object) -> str:
    """Text from the data, as one line that matplotlib does not read as a formula."""
    printable = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return printable.replace("$", r"\$")


def mark(place: int) -> str:
    """The mark of the arm in this place; when colours begin anew, each comes with another mark."""
    return MARKS[(place + place // len(LINE_COLOURS)) % len(MARKS)]


def wrapped(text: object, letters: int = 40) -> str:
    """The text as ``plain`` has it, in lines: panels stand side by side, and settings are long."""
    return "\n".join(textwrap.wrap(plain(text), letters, break_on_hyphens=False))


def short(text: str, length: int = 22) -> str:
    """The text as ``plain`` has it, cut where it is longer than ``length``."""
    return plain(text if len(text) <= length else f"{text[: length - 1]}…")


def step_name(step: int) -> str:
    """A step for an axis: its number, or "end"."""
    return "end" if step == END else str(step)


def step_axis(axes: Axes, labels: list[str]) -> None:
    """Names recorded steps along the axis: as many as fit, the first and the last always."""
    every = max(1, -(-len(labels) // 14))
    chosen = sorted({*range(0, len(labels), every), len(labels) - 1})
    if len(chosen) > 1 and chosen[-1] - chosen[-2] < every:
        chosen.pop(-2)
    axes.set_xticks(chosen, [labels[i] for i in chosen])
    axes.set_xlabel("training step (updates)")
    axes.tick_params(length=2)


def panels(count: int, height: float, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes, two or three beside each other, ``height`` inches each."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.2, 1.4 + 2.4 * columns), 0.5 + rows * height))
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def shared_legend(figure: Any, axes: list[Axes]) -> None:
    """One legend below all axes, each label once."""
    entries = {
        label: handle
        for part in axes
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True)
    }
    if entries:
        widest = 0.5 + 0.075 * max(map(len, entries))  # inches
        columns = max(1, min(4, int(figure.get_figwidth() / widest)))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def need(table: Any, columns: list[str], function: str) -> None:
    """Raises a ValueError for a missing column or a table without rows."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{function}: no column {', '.join(missing)}; expected {', '.join(columns)}, "
                         f"found {', '.join(map(str, table.columns))}")  # fmt: skip
    if table.empty:
        raise ValueError(f"{function}: the table has no rows; are there finished runs?")
