"""Pages and tables of results as HTML: one look for the whole project, on screen and on paper.

A page loads nothing and follows the system's light or dark mode. Everything that is put into it is
escaped, except what is marked as ``Html``.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

LONGEST = 160  # letters of a cell; longer text is cut, the CSV or Parquet file beside the page has all

STYLE = """:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--faint:#5f5f5f;--line:#c8c8c8;
--head:#f0f0f0;--accent:#1f5fbf;--bad:#fbe9e0;--busy:#e7f0fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181b;--faint:#a8a8a8;--line:#44484d;
--head:#24272b;--accent:#8ab4f8;--bad:#47291b;--busy:#1d2f45}}
body{font:14px/1.5 system-ui,sans-serif;margin:0 auto;padding:1.2em;max-width:1160px;color:var(--ink);
background:var(--paper);overflow-wrap:break-word}a{color:var(--accent)}h1{font-size:1.6em}h2{font-size:1.25em;
margin-top:1.8em}h3{font-size:1.05em}nav ul{columns:2;padding-left:1.2em}
.table{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;margin:.6em 0;font-size:13px}th,td{padding:3px 8px;text-align:left;
border-top:1px solid var(--line);vertical-align:top}th{background:var(--head)}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
pre{background:var(--head);padding:8px;overflow-x:auto}img{max-width:100%;height:auto;background:#fff}
figure{margin:1em 0}figcaption,.note{color:var(--faint)}svg{max-width:100%;height:auto}summary{cursor:pointer}
.failed,.timed_out,.killed,.lost{background:var(--bad)}.running{background:var(--busy)}th.sorts{cursor:pointer}
@media print{body{font-size:10px;max-width:none;padding:0}table{font-size:8px}.table{overflow:visible}
th,td{padding:2px 3px}h1,h2,h3,figcaption{break-after:avoid}figure,tr{break-inside:avoid}}"""

# A click on a column's head sorts by it: numbers as numbers, empty cells last.
SCRIPT = """document.querySelectorAll('th.sorts').forEach(h=>h.onclick=()=>{
const t=h.closest('table'),i=h.cellIndex,b=t.tBodies[0],d=h.dataset.d=h.dataset.d==='1'?'-1':'1';
const v=r=>{const x=r.cells[i].dataset.v??r.cells[i].textContent;return x!==''&&!isNaN(x)?+x:x};
[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);if(x==='')return 1;if(y==='')return -1;
return d*(typeof x===typeof y?(x>y)-(x<y):typeof x==='number'?-1:1)}).forEach(r=>b.append(r))});"""


class Html(str):
    """Markup that enters a table or page as it is; any other text is escaped."""


def link(address: str, label: str) -> Html:
    """Makes a link to a file beside the page."""
    return Html(f'<a href="{escape(address, quote=True)}">{escape(label)}</a>')


def is_missing(value: Any) -> bool:
    """True for None, NaN and pandas' missing value."""
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


# Tables.

_NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e-?\d+)?)(?: \[[^\]]*\])?$")
_INLINE = {
    "table": "border-collapse: collapse; color: #1b1b1b; font-size: 12px",
    "tr": "background-color: #ffffff",
    "td": "padding: 2px 8px; text-align: left; border-top: 1px solid #cccccc",
}


def table_html(
    table: pd.DataFrame,
    percent: Collection[str] = (),
    markup: Collection[str] = (),
    sorts: bool = False,
    row_class: Callable[[dict[str, Any]], str] | None = None,
    inline: bool = False,
) -> Html:
    """Makes a table without its index; numbers are aligned to the right, missing values are empty.

    Args:
        table: cells are text or numbers.
        percent: columns of shares, shown times 100 with one decimal and "%" in the head.
        markup: columns whose cells are HTML already (pandas turns ``Html`` into text); others are escaped.
        sorts: a click on a head sorts by the column (needs ``SCRIPT``, which ``page_html`` brings).
        row_class: the CSS class of a row, given its cells by name.
        inline: styles as attributes, for outputs of notebooks: JupyterLab removes style sheets, and its
            themes colour the rows of tables.
    """
    if table.empty:
        return Html("<p>none</p>")
    look = {name: f' style="{style}"' if inline else "" for name, style in _INLINE.items()}
    heads = [f"{name} (%)" if name in percent else str(name) for name in table]
    opening = f'<th class="sorts"{look["td"]}>' if sorts else f"<th{look['td']}>"
    head = "".join(f"{opening}{escape(name)}</th>" for name in heads)
    body = []
    for record in table.to_dict("records"):
        cells = "".join(
            f"<td{look['td']}>{value}</td>" if name in markup else _cell(value, name in percent, look["td"])
            for name, value in record.items()
        )
        named = f' class="{escape(row_class(record), quote=True)}"' if row_class else ""
        body.append(f"<tr{named}{look['tr']}>{cells}</tr>")
    head = f"<thead><tr{look['tr']}>{head}</tr></thead>"
    whole = f"<table{look['table']}>{head}<tbody>{''.join(body)}</tbody></table>"
    return Html(whole if inline else f'<div class="table">{whole}</div>')


def _cell(value: Any, percent: bool, look: str) -> str:
    if is_missing(value):
        return f'<td data-v=""{look}></td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{100 * value:.1f}" if percent else f"{value:.6g}"
        return f'<td class="n" data-v="{value}"{look}>{shown}</td>'
    text = str(value)
    if number := _NUMBER.match(text):  # with its interval: sorts by the number and stays on one line
        return f'<td class="n" data-v="{number[1]}"{look}>{escape(text)}</td>'
    return f"<td{look}>{escape(text if len(text) <= LONGEST else text[:LONGEST] + '…')}</td>"


# Charts.

_ROW, _LETTER = 20, 6.6  # pixels: height of a row, width of a letter
_TICKS = 6
_LABEL = 64  # letters of a label; one that is longer is cut


def interval_chart(rows: pd.DataFrame, title: str, percent: bool = True, zero: bool = False) -> Html:
    """Draws values with intervals as SVG, a row each, group by group; its text stays text.

    Args:
        rows: columns ``label``, ``value``, ``low`` and ``high`` (missing: no interval); if there, ``group``
            (heads the rows below it) and ``filled`` (False: a hollow mark).
        title: what is drawn, with its unit; the drawing's name for screen readers.
        percent: values are shares, shown times 100.
        zero: the axis includes 0, which has a line: for differences.
    """
    scale = 100.0 if percent else 1.0
    rows = rows.dropna(subset=["value"])
    if rows.empty:
        return Html("<p>none</p>")
    values = rows[["value", "low", "high"]].astype(float) * scale
    lowest, highest = float(values.min().min()), float(values.max().max())
    if zero:
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = _tick_step(highest - lowest or abs(highest) or 1.0)
    lowest, highest = math.floor(lowest / step) * step, math.ceil(highest / step) * step
    highest = highest if highest > lowest else lowest + step
    left = _LETTER * min(_LABEL, max(len(str(label)) for label in rows["label"])) + 12
    width = 360.0
    end = left + width

    def x(value: float) -> float:
        return left + width * (value - lowest) / (highest - lowest)

    marks, y, group = [], 6.0, None
    records = rows.assign(**values).to_dict("records")
    for record in records:
        if record.get("group", "") != (group or ""):
            group = record["group"]
            y += _ROW
            marks.append(f'<text class="head" x="0" y="{y + 4:.0f}">{escape(str(group))}</text>')
        y += _ROW
        marks.append(_chart_row(record, x, y, left, end, zero))
    ticks = []
    for number in range(round((highest - lowest) / step) + 1):
        value = lowest + number * step
        strong = ' style="stroke:currentColor"' if zero and abs(value) < step / 1e6 else ""
        ticks.append(
            f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="8" y2="{y + 10:.0f}"{strong}/>'
            f'<text x="{x(value):.1f}" y="{y + 26:.0f}" text-anchor="middle">{value:g}</text>'
        )
    size = end + 26 + _LETTER * max(len(_numbers(record, zero)) for record in records), y + 34
    style = "text{font:12px system-ui,sans-serif;fill:currentColor}.grid{stroke:#9997;stroke-width:1}"
    # A heading may reach over the grid: a rim of the paper's colour keeps lines out of its letters.
    style += ".head{font-weight:600;paint-order:stroke;stroke:var(--paper,#fff);stroke-width:5px}"
    return Html(
        f'<svg role="img" aria-label="{escape(title, quote=True)}" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" '
        f'width="{size[0]:.0f}" height="{size[1]:.0f}"><style>{style}</style>{"".join(ticks + marks)}</svg>'
    )


def _numbers(record: dict[str, Any], signed: bool) -> str:
    """A value with its interval, if it has one."""
    sign = "+" if signed else ""
    value = f"{record['value']:{sign}.1f}"
    if is_missing(record["low"]):
        return value
    return f"{value} [{record['low']:{sign}.1f}, {record['high']:{sign}.1f}]"


def _chart_row(
    record: dict[str, Any], x: Callable[[float], float], y: float, left: float, end: float, signed: bool
) -> str:
    label, numbers, line = str(record["label"]), _numbers(record, signed), ""
    if len(label) > _LABEL:  # in the middle: arms of a batch often differ at their ends
        label = f"{label[: _LABEL // 2]}…{label[-(_LABEL // 2 - 1) :]}"
    if not is_missing(record["low"]):
        line = (
            f'<line x1="{x(record["low"]):.1f}" x2="{x(record["high"]):.1f}" y1="{y:.0f}" y2="{y:.0f}" '
            'stroke="var(--accent,#1f5fbf)" stroke-width="2"/>'
        )
    fill = "var(--accent,#1f5fbf)" if record.get("filled", True) else "var(--paper,#fff)"
    text = f'<text y="{y + 4:.0f}"'
    return (
        f"<g><title>{escape(str(record['label']))}: {numbers}</title>"
        f'{text} x="{left - 10:.0f}" text-anchor="end">{escape(label)}</text>{line}'
        f'<circle cx="{x(record["value"]):.1f}" cy="{y:.0f}" r="4.5" fill="{fill}" '
        f'stroke="var(--accent,#1f5fbf)" stroke-width="1.5"/>{text} x="{end + 14:.0f}">{numbers}</text></g>'
    )


def _tick_step(span: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that needs at most ``_TICKS`` steps."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * _TICKS >= span * (1 - 1e-9))


# Pages.


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading; ``folded`` ones open by a click."""

    title: str
    body: str  # HTML
    folded: bool = False


def _with_code(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def page_html(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Makes a whole page: its title, leading paragraphs, a list of contents, and the sections.

    Args:
        title: of the window and the page.
        lead: paragraphs; text, in which `backticks` mark code, or ``Html`` that stands as it is.
        sections: in their order.
    """
    first = [part if isinstance(part, Html) else f"<p>{_with_code(part)}</p>" for part in lead]
    entries = "".join(
        f'<li><a href="#part-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    contents = f'<nav aria-label="Contents"><ul>{entries}</ul></nav>' if len(sections) > 1 else ""
    parts = []
    for number, section in enumerate(sections, start=1):
        body = section.body
        if section.folded:
            body = f"<details><summary>show</summary>{body}</details>"
        parts.append(f'<section id="part-{number}"><h2>{escape(section.title)}</h2>{body}</section>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(first)}{contents}{''.join(parts)}<script>{SCRIPT}</script>"
        "</body></html>\n"
    )
