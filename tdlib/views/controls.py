"""Parts of the explorer's controls: the list, the stage that shows views, and small helpers.

The list holds one page of rows, however many examples there are; their texts reach the page as text nodes.
"""

import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import traitlets

from tdlib.core.records import END
from tdlib.views.index import Run

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PAGE = 10  # rows of the list
LINE = 110  # letters of a row; the list is narrower on most screens


class ExampleList(anywidget.AnyWidget):
    """Shows one page of a list. ``rows`` are [position, text] of the page that holds ``position``."""

    _esm = STATIC / "list.js"
    _css = STATIC / "explorer.css"
    rows: Any = traitlets.List().tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)
    total = traitlets.Int(0).tag(sync=True)
    page = traitlets.Int(PAGE).tag(sync=True)


class Stage(anywidget.AnyWidget):
    """Shows the HTML of a view. ``agreement`` are the cosines of its first sheet's tokens: float32 bytes."""

    _esm = STATIC / "stage.js"
    _css = STATIC / "explorer.css"
    html = traitlets.Unicode().tag(sync=True)
    agreement = traitlets.Bytes().tag(sync=True)


def row_text(row: dict[str, Any], labels: Sequence[str] = ()) -> str:
    """Describes an example in one line: right or wrong, id, c, and its question."""
    verdict = "?" if pd.isna(row["label"]) else "✓" if row["correct"] else "✗"
    weight = "c  –  " if pd.isna(row["c"]) else f"c {row['c']:.2f}"
    text = row["answer"] if isinstance(row["answer"], str) and not labels else row["text"].split("\n")[0]
    label = f" → {row['answer']}" if labels and isinstance(row["answer"], str) else ""
    line = f"{verdict} {row['split']} {row['example_id']}  {weight}  {text}{label}"
    line = " ".join(line.split("\n"))
    return line if len(line) <= LINE else f"{line[: LINE - 1]}…"


def named(name: str, control: Any, width: str = "auto") -> Any:
    """Puts a name beside a control and keeps it within its column."""
    control.description = name
    control.style.description_width = "initial"
    control.layout.width, control.layout.max_width = width, "98%"
    return control


def dropdown(name: str, options: Sequence[Any] = (), value: Any = None) -> Any:
    """Makes a named dropdown; None as a value would leave it blank."""
    chosen = {} if value is None else {"value": value}
    return named(name, ipywidgets.Dropdown(options=options, **chosen))


def beside(*controls: Any) -> Any:
    """Lays controls beside each other; they wrap where there is no room."""
    return ipywidgets.HBox(controls, layout={"flex_flow": "row wrap"})


def described(error: Exception) -> str:
    """Writes an error as a sentence of HTML."""
    log.debug("cannot be shown", exc_info=error)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return escape(f"{kind}{error}")


def step_options(run: Run) -> list[tuple[str, int]]:
    """Lists the recorded steps as options of a control, the end last."""
    return [("end" if step == END else str(step), step) for step in run.steps]


def offer(control: Any, options: Sequence[tuple[str, Any]]) -> None:
    """Gives a control new options; keeps its value if that is among them, else takes the first."""
    values = [one for _, one in options]
    kept = control.value
    if tuple(control.options) != tuple(options):
        control.options = options
    control.value = kept if kept in values else values[0]
