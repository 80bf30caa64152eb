"""The type of every view: HTML for a notebook, a figure for a paper, a table for everything else.

A view is a heading, a note, a figure with its arguments, and a table of every number that it shows; one
template makes the HTML. Only where words and boxes are drawn as HTML (``sheets_html``) does it bring its
own body; all others embed their figure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdlib.core.facts import token_name, truth_name
from tdlib.core.pages import table_html
from tdlib.views.figures.style import Figure, drawn, to_pdf, to_png, to_svg
from tdlib.views.html import page, source, style
from tdlib.views.picture import WIDTH, picture_html
from tdlib.views.scale import BLACK, GREY, OBJECT, Scale
from tdlib.views.sheet import Sheet, marks_of
from tdlib.views.statement import statement_html

METHOD = "CLIP-TD (our reading)"
ROWS = 30  # tokens of a sheet that are listed where a view is printed as text; its table has all


@dataclass(frozen=True, repr=False)
class View:
    """A view of records.

    ``plot`` with ``arguments`` draws the figure. ``data`` holds every number of the view, unrounded;
    ``rows`` is the short, rounded table that stands under the figure and in the printed view. ``body``, if
    not empty, is HTML of ``sheets`` that replaces figure and rows.
    """

    heading: str
    plot: Callable[..., Figure]
    arguments: Mapping[str, Any]
    data: pd.DataFrame
    rows: pd.DataFrame
    note: str = ""
    body: str = ""
    sheets: tuple[Sheet, ...] = field(default=(), compare=False)

    def figure(self, paper: bool = False) -> Figure:
        """The view as a matplotlib figure; ``paper``: in a paper's type and without the heading."""
        return drawn(self.plot, self.arguments, paper)

    def table(self) -> pd.DataFrame:
        """Every number that the view shows."""
        return self.data.copy()

    def to_html(self) -> str:
        """Self-contained HTML: no scripts, no style sheets, nothing to load."""
        return self._html

    def to_png(self, path: Path | str | None = None, dpi: int = 300, paper: bool = False) -> bytes:
        """The view as a raster figure; also written to ``path`` if there is one."""
        return to_png(self.figure(paper), path, dpi)

    def to_svg(self, path: Path | str | None = None, paper: bool = False) -> str:
        """The view as a vector figure with text as text; also written to ``path`` if there is one."""
        return to_svg(self.figure(paper), path)

    def to_pdf(self, path: Path | str | None = None, paper: bool = True) -> bytes:
        """The view as a vector figure for a paper: its type, no heading (a caption says it), text as text."""
        return to_pdf(self.figure(paper), path)

    @cached_property
    def _html(self) -> str:
        note = f" <span {style(color=GREY)}>{escape(self.note)}</span>" if self.note else ""
        head = f"<div {style(margin_bottom='6px')}><b>{escape(self.heading)}</b>{note}</div>"
        if self.body:
            return page(head + self.body)
        content, look = source(to_png(self.figure(), dpi=110)), style(max_width="100%")
        image = f'<div><img src="{content}" alt="{escape(self.heading)}" {look}></div>'
        return page(head + image + table_html(self.rows, inline=True))

    def __repr__(self) -> str:
        head = f"{self.heading}. {self.note}" if self.note else self.heading
        return f"{head}\n{self.rows.to_string(index=False)}" if len(self.rows) else head

    def _repr_html_(self) -> str:
        return self._html


# Sheets below each other.


def sheets_html(sheets: Sequence[Sheet], words: bool = True, picture: bool = True) -> str:
    """Draws each sheet as a row of facts, picture and words; below them stands a legend for each scale.

    What one legend explains, the next does not repeat. Classes and ``data-`` attributes are for the page of
    the explorer (``static/stage.js``): each token's place, and each sheet's statement and tokenisation.
    """
    rows = "".join(_sheet_row(sheet, words, picture) for sheet in sheets)
    scales: dict[Scale, list[Sheet]] = {}
    for sheet in sheets:
        scales.setdefault(sheet.scale, []).append(sheet)
    look = style(font_size="12px", line_height="1.8", border_top="1px solid #cccccc")
    explained: set[str] = set()
    for scale, drawn_on in scales.items():
        entries = [one for one in _legend(scale, drawn_on, words, picture) if one not in explained]
        explained.update(entries)
        rows += f"<div {look}>{' &nbsp;·&nbsp; '.join(entries)}</div>" if entries else ""
    return rows


def _sheet_row(sheet: Sheet, words: bool, picture: bool) -> str:
    record = sheet.record
    first, *more = [part for part in (sheet.name, *sheet.about) if part] or [""]
    lines = "".join(f"<br><span {style(color=GREY)}>{escape(line)}</span>" for line in more)
    parts = [f"<div {style(flex='1 1 130px', max_width='190px')}><b>{escape(first)}</b>{lines}</div>"]
    if picture and record.is_visual.any():
        parts.append(f"<div {style(flex='1 1 260px', max_width=f'{WIDTH}px')}>{picture_html(sheet)}</div>")
    fine = style(color=GREY, font_size="12px", margin="2px 0")
    below = f'<div class="tdlib-line" {fine}>{escape(sheet.below)}</div>'
    said = statement_html(sheet) if words else ""
    parts.append(f"<div {style(flex='2 1 260px')}>{said}{below}</div>")
    look = style(
        display="flex", flex_wrap="wrap", gap="12px", padding="6px 0", border_top="1px solid #cccccc",
        page_break_inside="avoid",
    )  # fmt: skip
    key = escape(f"{record.split} {record.example_id} {record.choice} {len(record.tokens)}")
    return f'<div class="tdlib-sheet" data-key="{key}" {look}>{"".join(parts)}</div>'


def _legend(scale: Scale, sheets: Sequence[Sheet], words: bool, picture: bool) -> list[str]:
    """Explains the colours, borders and numbers that occur in these sheets."""
    marks, truth = marks_of(sheets, words, picture), escape(truth_name([sheet.record for sheet in sheets]))
    entries = []
    if steps := scale.steps():
        swatches = "".join(_swatch(scale, step) for step in steps)
        less = " (blue, −: the first weighs more)" if scale.signed else ""
        entries.append(f"{swatches} {escape(scale.name)}{less}")
    underlined = f"<b {style(border_bottom=f'3px solid {BLACK}')}>"
    of_words = {
        "selected": f"{underlined}selected</b>, its number below",
        "largest": f"{underlined}largest</b> values, with their number below",
        "first alone": f"<b {style(border_bottom=f'3px dotted {BLACK}')}>dotted</b> only by the first",
        "decisive word": f"<span {style(border_top=f'2px dotted {BLACK}')}>dotted</span> "
        f"decides the answer ({truth})",
        "no target": f"<span {style(color=GREY)}>grey</span> has no teacher target",
        "reference": "[0] the object's number in the picture",
    }
    of_picture = {
        "selected": _boxed(f"1px solid {BLACK}", "selected") + " with its number",
        "largest": _boxed(f"1px solid {BLACK}", "largest") + " with their number",
        "object": _boxed(f"2px solid {OBJECT}", "object"),
        "decisive box": _boxed(f"2px dashed {BLACK}", "decides the answer") + f" ({truth})",
    }
    for is_drawn, texts in ((words, of_words), (picture, of_picture)):
        entries += [text for mark, text in texts.items() if is_drawn and mark in marks]
    return entries


def _boxed(line: str, text: str) -> str:
    return f"<span {style(border=line, padding='0 3px')}>{text}</span>"


def _swatch(scale: Scale, value: float) -> str:
    background, colour = scale.on_white(value)
    look = style(background_color=background, color=colour, padding="1px 5px")
    return f"<span {look}>{scale.number(value)}</span>"


def token_rows(sheets: Sequence[Sheet]) -> pd.DataFrame:
    """Lists the marked tokens of each sheet, the largest values first, at most ``ROWS`` of them."""
    rows = []
    for sheet in sheets:
        of = " ".join(part for part in (sheet.name, *sheet.about) if part)
        places = sorted(np.flatnonzero(sheet.marked).tolist(), key=lambda i: -abs(sheet.values[i]))
        unit = "points" if sheet.scale.signed else "%"
        rows += [
            {"of": of, unit: sheet.scale.number(float(sheet.values[i])), "token": token_name(sheet.record, i)}
            for i in places[:ROWS]
        ]
    return pd.DataFrame(rows)
