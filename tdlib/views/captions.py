"""Joins a figure or table with its number and caption, so that a printed page does not part them."""

from dataclasses import dataclass
from html import escape

import pandas as pd

from tdlib.core.pages import table_html
from tdlib.views.figures.style import Figure, to_png
from tdlib.views.html import page, source, style
from tdlib.views.scale import GREY
from tdlib.views.view import View

PIXELS = 106  # on the screen, per inch of a figure: its type is then as large as the text around it


@dataclass(frozen=True, repr=False)
class Captioned:
    """A view, figure or table (``shown``) with its label ("Figure 1") and its caption."""

    shown: View | Figure | pd.DataFrame
    label: str
    caption: str

    def __repr__(self) -> str:
        return f"{self.label}. {self.caption}"

    def _repr_html_(self) -> str:
        below = style(color=GREY, font_size="13px", margin_top="4px", page_break_before="avoid")
        caption = f"<div {below}><b>{escape(self.label)}.</b> {escape(self.caption)}</div>"
        tall = isinstance(self.shown, View) and len(self.shown.sheets) > 1  # paper may part its rows
        whole = style(page_break_inside="auto" if tall else "avoid", margin="6px 0 10px 0")
        return f"<div {whole}>{self._shown()}{page(caption)}</div>"

    def _shown(self) -> str:
        if isinstance(self.shown, View):
            return self.shown.to_html()
        if isinstance(self.shown, pd.DataFrame):
            return page(table_html(self.shown, inline=True))
        look = style(width=f"{PIXELS * self.shown.get_figwidth():.0f}px", max_width="100%")
        return page(f'<img src="{source(to_png(self.shown, dpi=200))}" alt="{escape(self.caption)}" {look}>')
