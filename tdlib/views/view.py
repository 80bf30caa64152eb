"""Which words, boxes and patches CLIP-TD targeted, as HTML that also shows in an untrusted notebook.

Owns the HTML of the views and the table of numbers behind each. Does not own figures: ``plots`` draws
them and is imported only when a picture is asked for. JupyterLab's sanitiser drops scripts, style
sheets, SVG and any colour but hex, rgb or a name, so everything here is plain tags with inline hex
colours and embedded PNGs, and every string from the data is escaped. Objects and choices carry their
index in the data (from 0); weights and scores are shown in %.
"""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tdlib.core.facts import (
    facts,
    ground_truth,
    highest_weight,
    kinds,
    percent,
    shares,
    table,
    title,
    token_name,
    truth_name,
)
from tdlib.core.records import TargetRecord

if TYPE_CHECKING:
    from tdlib.views.figures.targets import Figure

METHOD = "CLIP-TD (our reading)"
# matplotlib's cividis, reversed (small is light, so that "not selected" can be white), at 0, 0.1, ... 1.
CIVIDIS = [
    (254, 232, 56), (229, 207, 82), (200, 184, 102), (174, 163, 113), (148, 142, 119), (124, 123, 120),
    (102, 105, 112), (79, 87, 108), (53, 69, 108), (8, 51, 112), (0, 34, 78),
]  # fmt: skip
# A cell of the tables that hold whole views.
CELL = {"padding": "6px", "vertical_align": "top", "text_align": "left", "border_top": "1px solid #cccccc"}
WHITE, BLACK, GREY, OBJECT = "#ffffff", "#1b1b1b", "#6b6b6b", "#c24e00"


def summary(record: TargetRecord, labels: Sequence[str] = ()) -> str:
    """The numbers of a record as plain text: its facts and its selected tokens, heaviest first."""
    lines = [title(record, labels), record.text, shares(record)]
    lines.append(", ".join(f"{name} {value}" for name, value in facts(record, labels).items()))
    chosen = np.flatnonzero(record.selected)
    for i in chosen[np.argsort(-record.weight[chosen], kind="stable")]:
        lines.append(f"  {percent(float(record.weight[i])):>5} %  {token_name(record, int(i))}")
    return "\n".join(lines)


# What the views return.


@dataclass(frozen=True, repr=False)
class View:
    """A view of records: HTML in a notebook, a figure for a paper, a table for everything else."""

    html: str
    records: tuple[TargetRecord, ...]
    figure: Callable[[], "Figure"]
    labels: tuple[str, ...] = ()
    data: pd.DataFrame | None = None  # what the view shows, where that is not a row per token
    text: str = ""  # the view in words, where that is not a summary per record

    def to_html(self) -> str:
        """Self-contained HTML: no scripts, no style sheets, nothing to load."""
        return self.html

    def table(self) -> pd.DataFrame:
        """What the view shows: its own data, or one row per token of every record (see ``views.table``)."""
        return table(self.records) if self.data is None else self.data.copy()

    def to_png(self, path: Path | str | None = None, dpi: int = 200) -> bytes:
        """The view as a raster figure; also written to ``path`` if there is one."""
        from tdlib.views.figures import targets as plots

        return plots.to_png(self.figure(), path, dpi)

    def to_svg(self, path: Path | str | None = None) -> str:
        """The view as a vector figure; also written to ``path`` if there is one."""
        from tdlib.views.figures import targets as plots

        return plots.to_svg(self.figure(), path)

    def __repr__(self) -> str:
        return self.text or "\n\n".join(summary(record, self.labels) for record in self.records)

    def _repr_html_(self) -> str:
        return self.html

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.html}


def text_view(record: TargetRecord, method: str = METHOD, labels: Sequence[str] = ()) -> View:
    """The statement in running text, each token coloured by its weight."""

    def figure() -> "Figure":
        from tdlib.views.figures import targets as plots

        return plots.plot_words(record, labels=labels)

    return View(token_html(record, method, labels), (record,), figure, tuple(labels))


def picture_view(record: TargetRecord, method: str = METHOD, labels: Sequence[str] = ()) -> View:
    """The picture with the weights of its patches or regions."""

    def figure() -> "Figure":
        from tdlib.views.figures import targets as plots

        return plots.plot_picture(record, labels=labels)

    return View(picture_html(record, method, labels), (record,), figure, tuple(labels))


def comparison(
    records: TargetRecord | Sequence[TargetRecord],
    names: Sequence[str] = (),
    method: str = METHOD,
    labels: Sequence[str] = (),
) -> View:
    """A row per record (choices of a question, or arms, or examples): numbers, picture, statement.

    All rows share one colour scale. ``names`` (of arms, say) head the rows.
    """
    records = (records,) if isinstance(records, TargetRecord) else tuple(records)
    if not records:
        raise ValueError("comparison: no records; expected at least one TargetRecord")
    if names and len(names) != len(records):
        raise ValueError(f"{len(names)} names for {len(records)} records: give one name per record, or none")
    highest = highest_weight(records)
    rows = [
        _comparison_row(record, name, highest, labels)
        for record, name in zip(records, names or [""] * len(records), strict=True)
    ]
    whole = _style(border_collapse="collapse", width="100%", color=BLACK)
    body = f"<table {whole}><tbody>{''.join(rows)}</tbody></table>"

    def figure() -> "Figure":
        from tdlib.views.figures import targets as plots

        return plots.plot_comparison(records, names=names, labels=labels)

    return View(_page(body + _legend(records, highest, method)), records, figure, tuple(labels))


# HTML.


def token_html(record: TargetRecord, method: str = METHOD, labels: Sequence[str] = ()) -> str:
    """The statement in running text: weight as colour and number, selection and ground truth as borders."""
    highest = highest_weight([record])
    return _page(
        f"{_heading(record, labels)}{_statement(record, highest)}{_note(record)}"
        f"{_legend([record], highest, method, picture=False)}"
    )


def picture_html(record: TargetRecord, method: str = METHOD, labels: Sequence[str] = ()) -> str:
    """The picture of ``plots.plot_picture`` as an embedded PNG, with its numbers as alternative text."""
    highest = highest_weight([record])
    return _page(
        f"{_heading(record, labels)}{_image(record, highest, width=460)}{_note(record)}"
        f"{_legend([record], highest, method, words=False)}"
    )


def weight_colour(weight: float, highest: float) -> tuple[str, str]:
    """Background and text colour (hex) of a weight on the scale 0 to ``highest``: cividis, light to dark."""
    place = float(np.clip(weight / highest if highest > 0 else 0, 0, 1)) * (len(CIVIDIS) - 1)
    red, green, blue = (
        round(np.interp(place, range(len(CIVIDIS)), channel)) for channel in zip(*CIVIDIS, strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}", ink(red, green, blue)


def ink(red: int, green: int, blue: int) -> str:
    """Black or white (hex), whichever is read better on this ground: a contrast of at least 4.5 (WCAG 2)."""
    linear = [
        (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))  # black and white are equal at 0.179
    return "#000000" if luminance > 0.179 else WHITE


def _style(**properties: str) -> str:
    rules = "; ".join(f"{name.replace('_', '-')}: {value}" for name, value in properties.items())
    return f'style="{rules}"'


def _page(body: str) -> str:
    """The frame of every view; states its colours, as a dark theme would otherwise choose the text's."""
    frame = _style(
        background_color=WHITE, color=BLACK, padding="8px", font_family="sans-serif", font_size="14px"
    )
    return f"<div {frame}>{body}</div>"


def _heading(record: TargetRecord, labels: Sequence[str]) -> str:
    numbers = ", ".join(f"{name} {value}" for name, value in facts(record, labels).items())
    return (
        f"<div {_style(margin_bottom='6px')}><b>{escape(title(record, labels))}</b> "
        f"<span {_style(color=GREY)}>{escape(numbers)}</span></div>"
    )


@dataclass(frozen=True)
class _Piece:
    """A stretch of a statement without white space, with its token, if any, and the objects it ends on."""

    text: str
    token: int | None
    objects: tuple[int, ...]


def _words(record: TargetRecord) -> list[list[_Piece]]:
    """The statement as words (between white space) of pieces (one token each), nothing left out or twice.

    A character belongs to the first token that covers it; a token that has none of its own (several
    byte-level tokens of one letter) follows its word in its own spelling.
    """
    tokens = sorted(np.flatnonzero(record.is_text).tolist(), key=lambda i: tuple(record.spans[i]))
    owners: list[int | None] = [None] * len(record.text)
    for i in reversed(tokens):
        start, end = record.spans[i].tolist()
        owners[start:end] = [i] * len(owners[start:end])
    places = [match.span() for match in re.finditer(r"\S+", record.text)] or [(0, 0)]
    words = [_pieces(record, owners, *place) for place in places]
    visible = {piece.token for word in words for piece in word}
    for i in tokens:
        if i not in visible:
            word = next((n for n, (_, end) in enumerate(places) if end > record.spans[i, 0]), -1)
            words[word].append(_Piece(record.tokens[i], i, ()))
    return words


def _pieces(record: TargetRecord, owners: Sequence[int | None], start: int, end: int) -> list[_Piece]:
    pieces = []
    for token, group in groupby(range(start, end), key=owners.__getitem__):
        first, *rest = group
        last = rest[-1] if rest else first
        objects = [o for r in record.references if first < r.end <= last + 1 for o in r.objects]
        pieces.append(_Piece(record.text[first : last + 1], token, tuple(objects)))
    return pieces


def _statement(record: TargetRecord, highest: float) -> str:
    truth = ground_truth(record)
    word_style = _style(
        display="inline-block", white_space="nowrap", vertical_align="top", margin="0 2px 4px 0"
    )
    words = [
        f"<span {word_style}>{''.join(_piece(record, piece, truth, highest) for piece in word)}</span>"
        for word in _words(record)
    ]
    return f"<div {_style(line_height='1.35', font_size='16px')}>{' '.join(words)}</div>"


def _piece(record: TargetRecord, piece: _Piece, truth: list[bool | None], highest: float) -> str:
    i = piece.token
    selected = i is not None and bool(record.selected[i])
    background, colour = weight_colour(float(record.weight[i]), highest) if selected else (WHITE, BLACK)
    if i is None or not record.distilled[i]:
        colour = colour if selected else GREY
    look = _style(
        background_color=background,
        background_clip="padding-box",  # or a dark token would hide its dotted border
        color=colour,
        border_top=f"2px dotted {BLACK if i is not None and truth[i] else WHITE}",
        border_bottom=f"3px solid {BLACK if selected else WHITE}",
        font_weight="bold" if selected else "normal",
        padding="0 1px",
    )
    numbers = "not a token of the student" if i is None else _numbers(record, i)
    objects = "".join(f"<small {_style(color=GREY)}>[{number}]</small>" for number in piece.objects)
    weight = percent(float(record.weight[i])) if selected else "&nbsp;"
    return (
        f"<span {_style(display='inline-block', text_align='center', vertical_align='top')}>"
        f'<span {look} title="{escape(numbers)}">{escape(piece.text)}</span>{objects}'
        f"<br><span {_style(font_size='11px', color=BLACK, padding='0 2px')}>{weight}</span></span>"
    )


def _numbers(record: TargetRecord, i: int) -> str:
    target = "" if record.distilled[i] else "no teacher target; "
    return (
        f"{target}relevance {record.relevance[i]:.3f}, prior {record.prior[i]:.3f}, "
        f"score {percent(float(record.score[i]))} %, weight {percent(float(record.weight[i]))} %"
    )


def _note(record: TargetRecord) -> str:
    """Below a statement: the shares, and selected tokens that stand neither in the text nor the picture."""
    special = [
        f"{token_name(record, i)} {percent(float(record.weight[i]))} %"
        for i, kind in enumerate(kinds(record))
        if kind == "special" and record.selected[i]
    ]
    note = f"{shares(record)}; also selected: {', '.join(special)}" if special else shares(record)
    return f"<div {_style(color=GREY, font_size='85%', margin='2px 0')}>{escape(note)}.</div>"


def _legend(
    records: Sequence[TargetRecord], highest: float, method: str, words: bool = True, picture: bool = True
) -> str:
    """The method's name and the meaning of all colours, borders and numbers that the records show."""
    entries = []
    if highest > 0:
        swatches = "".join(_swatch(step / 4 * highest, highest) for step in range(5))
        entries.append(f"{swatches} weight in % of all selected tokens, words and picture together")
    if words and highest > 0:
        entries.append(f"<b {_style(border_bottom=f'3px solid {BLACK}')}>selected</b>, its weight below")
    if words and any(record.relevant_spans for record in records):
        mark = f"<span {_style(border_top=f'2px dotted {BLACK}')}>dotted</span>"
        entries.append(f"{mark} decides the answer ({escape(truth_name(records))})")
    if words and any((~record.distilled & record.is_text).any() for record in records):
        entries.append(f"<span {_style(color=GREY)}>grey</span> has no teacher target")
    if words and any(record.references for record in records):
        entries.append("[0] the object's number in the picture")
    if picture and highest > 0:
        entries.append(_boxed("solid", BLACK, "selected") + " with its weight")
    if picture and any(record.object_boxes for record in records):
        entries.append(_boxed("solid", OBJECT, "object"))
    if picture and any(record.relevant_boxes for record in records):
        entries.append(_boxed("dashed", BLACK, "decides the answer") + f" ({escape(truth_name(records))})")
    parts = " &nbsp;·&nbsp; ".join([f"<b>{escape(method)}</b>", *entries])
    return f"<div {_style(font_size='12px', line_height='1.8', border_top='1px solid #cccccc')}>{parts}</div>"


def _boxed(line: str, colour: str, text: str) -> str:
    return f"<span {_style(border=f'2px {line} {colour}', padding='0 3px')}>{text}</span>"


def _swatch(weight: float, highest: float) -> str:
    background, colour = weight_colour(weight, highest)
    look = _style(background_color=background, color=colour, padding="1px 5px")
    return f"<span {look}>{percent(weight)}</span>"


def _image(record: TargetRecord, highest: float, width: int) -> str:
    from tdlib.views.figures import targets as plots

    data = base64.b64encode(plots.to_png(plots.plot_picture(record, highest, bare=True), dpi=110)).decode()
    chosen = np.flatnonzero(record.selected & record.is_visual & ~record.is_text)
    heaviest = chosen[np.argsort(-record.weight[chosen], kind="stable")][:5]
    names = [f"{token_name(record, int(i))}: {percent(float(record.weight[i]))} %" for i in heaviest]
    listing = f"the heaviest are {'; '.join(names)}" if names else "nothing is selected in it"
    text = f"Picture of {record.example_id} with its token weights; {listing}."
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}" width="{width}">'


def _comparison_row(record: TargetRecord, name: str, highest: float, labels: Sequence[str]) -> str:
    cell, first = _style(**CELL), _style(**CELL, width="16%")
    heading = f"<b>{escape(name)}</b><br>" if name else ""
    heading += f"<b>{escape(title(record, labels))}</b>"
    numbers = "".join(
        f"<br><span {_style(color=GREY)}>{escape(key)}</span> {escape(value)}"
        for key, value in facts(record, labels).items()
    )
    return (
        f"<tr {_style(background_color=WHITE)}><td {first}>{heading}{numbers}</td>"
        f"<td {cell}>{_image(record, highest, width=320)}</td>"
        f"<td {cell}>{_statement(record, highest)}{_note(record)}</td></tr>"
    )
