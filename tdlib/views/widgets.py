"""The explorer's controls in JupyterLab: a list moved through by keyboard and mouse, filters, views.

Owns the only widgets of the project; what they show is ``explorer``'s, and a notebook shows the same
without them. The list holds one page of rows, however many examples there are. Data reach the page as
text nodes or through the views' own escaping.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets
import pandas as pd
import traitlets

from tdlib.core.records import END
from tdlib.views import explorer
from tdlib.views.explorer import VIEWS, Filter, Look, Run

if TYPE_CHECKING:
    from tdlib.training.prepare import Materials

log = logging.getLogger(__name__)

PAGE = 10  # rows of the list
MOST_NAMES = 50  # labels and layers offered; others can be typed or given as parameters
ANY = "any"

# A list that has the focus moves by arrow keys, j and k, page keys, Home and End; it takes keys from
# nothing else, and JupyterLab's own shortcuts stay away from it.
_LIST = """
function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "tdlib-list";
  root.tabIndex = 0;
  root.setAttribute("role", "listbox");
  root.setAttribute("aria-label", "examples");
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  const bar = document.createElement("div");
  const rows = document.createElement("div");
  const count = document.createElement("span");
  const jump = document.createElement("input");
  jump.type = "range";
  jump.min = "0";
  jump.title = "jump to an example";
  const move = (position) => {
    const last = model.get("total") - 1;
    const next = Math.max(0, Math.min(last, position));
    if (last < 0 || next === model.get("position")) return;
    model.set("position", next);
    model.save_changes();
  };
  const button = (label, title, step) => {
    const node = document.createElement("button");
    node.textContent = label;
    node.title = title;
    node.addEventListener("click", () => move(model.get("position") + step));
    return node;
  };
  bar.append(button("\\u25c0", "previous example (left, k)", -1),
             button("\\u25b6", "next example (right, j)", 1), count, jump);
  root.append(bar, rows);
  jump.addEventListener("change", () => move(Number(jump.value)));
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === jump) return;
    const page = model.get("page"), at = model.get("position");
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, j: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
                 k: at - 1, PageDown: at + page, PageUp: at - page, Home: 0,
                 End: model.get("total") - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    move(to);
  });
  const draw = () => {
    const at = model.get("position"), total = model.get("total");
    const number = (value) => value.toLocaleString("en");
    count.textContent = total ? ` ${number(at + 1)} of ${number(total)} ` : " none ";
    jump.max = String(Math.max(0, total - 1));
    jump.value = String(at);
    jump.disabled = total < 2;
    rows.replaceChildren(...model.get("rows").map(([position, text]) => {
      const row = document.createElement("div");
      row.className = "tdlib-row";
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(position === at));
      row.textContent = text;
      row.addEventListener("click", () => { root.focus(); move(position); });
      return row;
    }));
  };
  for (const name of ["rows", "position", "total"]) model.on(`change:${name}`, draw);
  draw();
  el.append(root);
}
export default { render };
"""
_LOOK = """
.tdlib-list { border: 1px solid #999999; padding: 4px; background-color: #ffffff; color: #1b1b1b;
  font-family: sans-serif; font-size: 13px; }
.tdlib-list:focus { outline: 2px solid #0072b2; }
.tdlib-list input[type=range] { width: 40%; vertical-align: middle; }
.tdlib-row { padding: 1px 4px; cursor: pointer; white-space: pre; overflow: hidden;
  text-overflow: ellipsis; border-left: 4px solid #ffffff; font-variant-numeric: tabular-nums; }
.tdlib-row:hover { background-color: #eeeeee; }
.tdlib-row[aria-selected=true] { background-color: #dde8f3; border-left-color: #0072b2; font-weight: bold; }
"""


class ExampleList(anywidget.AnyWidget):
    """One page of a list. ``rows`` are [position, text] of the page that holds ``position``."""

    _esm = _LIST
    _css = _LOOK
    rows: Any = traitlets.List().tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)
    total = traitlets.Int(0).tag(sync=True)
    page = traitlets.Int(PAGE).tag(sync=True)


def row_text(row: dict[str, Any], labels: Sequence[str] = (), length: int = 110) -> str:
    """An example in one line: right or wrong, id, c, what it asks."""
    verdict = "?" if pd.isna(row["label"]) else "✓" if row["correct"] else "✗"
    weight = "c  –  " if pd.isna(row["c"]) else f"c {row['c']:.2f}"
    text = row["answer"] if isinstance(row["answer"], str) and not labels else row["text"].split("\n")[0]
    label = f" → {row['answer']}" if labels and isinstance(row["answer"], str) else ""
    line = f"{verdict} {row['split']} {row['example_id']}  {weight}  {text}{label}"
    line = " ".join(line.split("\n"))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _named(name: str, control: Any, width: str = "auto") -> Any:
    control.description = name
    control.style.description_width = "initial"
    control.layout.width = width
    return control


class Explorer(ipywidgets.VBox):
    """Runs, filters, the list of examples, and a view of the chosen one.

    Args:
        runs: what can be looked at, of ``explorer.find_runs``.
        first: the run that is shown first; the first of ``runs`` if None.
        example: its id, where another than the first is meant.
        view: the view shown first, of ``explorer.VIEWS``.
        filter: what the list starts with.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        first: Run | None = None,
        example: str = "",
        view: str = "statement and picture",
        filter: Filter = Filter(),  # noqa: B008 (frozen)
    ):
        first = first or runs[0]
        self.runs = {run.name: run for run in runs}
        self.matches = first.index.iloc[:0]
        names = list(self.runs)
        other = explorer.companion(runs, first)
        control = ipywidgets
        self.first = _named("run", control.Dropdown(options=names, value=first.name))
        self.step = _named("step", control.Dropdown())
        self.second = _named(
            "compared with", control.Dropdown(options=names, value=other.name if other else first.name)
        )
        self.second_step = _named("step", control.Dropdown())
        self.search = _named("search", control.Text(filter.text, placeholder="words of id, text, answer"))
        self.search.continuous_update = False
        self.label = _named("label", control.Combobox(value=filter.label, placeholder=ANY), "220px")
        self.label.continuous_update = False
        self.split = _named("split", control.Dropdown())
        verdicts = [(ANY, None), ("right", True), ("wrong", False)]
        self.correct = _named("student", control.Dropdown(options=verdicts, value=filter.correct))
        self.weight = _named("c", control.FloatRangeSlider(min=0, max=1, step=0.01), "300px")
        self.disagreement = _named(
            "|p_T − p_S| ≥", control.FloatSlider(filter.disagreement, min=0, max=1, step=0.01), "280px"
        )
        for slider in (self.weight, self.disagreement):
            slider.continuous_update = False
        self.view = _named("view", control.Dropdown(options=list(VIEWS), value=view))
        self.modality = _named("modality", control.Dropdown(options=list(explorer.MODALITIES)))
        self.choice = _named("choice", control.Dropdown(options=[("the right one", None)]))
        self.layer = _named("layer", control.Dropdown(options=[("all", None)]))
        self.head = _named("head", control.Dropdown(options=[("mean", None)]))
        self.list = ExampleList()
        self.message = control.HTML()
        self.output = control.HTML()
        self.output.add_class("tdlib-view")
        self._quiet = False
        self._drawn = lru_cache(maxsize=64)(lambda look, view: explorer.show(look, view).to_html())
        self._load(filter)
        if example and example in set(self.matches["example_id"]):
            self.list.position = int((self.matches["example_id"] == example).to_numpy().argmax())
        super().__init__(
            [
                control.HBox([self.first, self.step, self.second, self.second_step]),
                control.HBox([self.search, self.label, self.split, self.correct]),
                control.HBox([self.weight, self.disagreement]),
                self.list,
                control.HBox([self.view, self.modality, self.choice, self.layer, self.head]),
                self.message,
                self.output,
            ]
        )
        for row in (self.children[0], self.children[1], self.children[2], self.children[4]):
            row.layout.flex_flow = "row wrap"
        self._watch()
        self._turn()

    # State.

    @property
    def run(self) -> Run:
        return self.runs[self.first.value]

    @property
    def filter(self) -> Filter:
        """What the controls say; the whole range of c is no condition."""
        weight = self.weight.value if self.weight.value != (self.weight.min, self.weight.max) else None
        condition = {} if weight is None else {"weight": weight}
        return Filter(
            text=self.search.value, label=self.label.value, split=self.split.value,
            correct=self.correct.value, disagreement=self.disagreement.value, **condition,
        )  # fmt: skip

    @property
    def look(self) -> Look | None:
        """What is looked at now; None where no example passes."""
        if self.matches.empty:
            return None
        row = self.matches.iloc[self.list.position]
        return Look(
            self.run, row["split"], row["example_id"], self.runs[self.second.value], self.step.value,
            self.second_step.value, self.choice.value, self.modality.value,
            () if self.layer.value is None else (self.layer.value,), self.head.value,
        )  # fmt: skip

    # Reactions.

    def _watch(self) -> None:
        def on(controls: Sequence[Any], call: Callable[[], None]) -> None:
            for control in controls:
                control.observe(lambda _: None if self._quiet else call(), "value")

        on([self.first], self._change_run)
        on([self.second], self._change_second)
        on(
            [self.search, self.label, self.split, self.correct, self.weight, self.disagreement],
            self._change_filter,
        )
        on(
            [self.step, self.second_step, self.view, self.modality, self.choice, self.layer, self.head],
            self._draw,
        )
        self.list.observe(lambda _: None if self._quiet else self._turn(), "position")

    def _change_run(self) -> None:
        kept, filter = self.look, self.filter
        self._quiet = True
        self._load(filter)
        if kept is not None:  # the same example, where the other run has it too
            same = (self.matches["split"] == kept.split) & (self.matches["example_id"] == kept.example_id)
            self.list.position = int(same.to_numpy().argmax()) if same.any() else 0
        self._quiet = False
        self._turn()

    def _change_second(self) -> None:
        self._quiet = True
        _offer(self.second_step, _step_options(self.runs[self.second.value]))
        self._quiet = False
        self._draw()

    def _change_filter(self) -> None:
        self._quiet = True
        self.matches = self.filter.choose(self.run.index)
        self.list.position, self.list.total = 0, len(self.matches)
        self._quiet = False
        self._turn()

    def _load(self, filter: Filter) -> None:
        """Takes over a run: its steps, splits, labels, range of c, and the examples that pass."""
        index, self._quiet = self.run.index, True
        _offer(self.step, _step_options(self.run))
        _offer(self.second_step, _step_options(self.runs[self.second.value]))
        _offer(self.split, [(ANY, ""), *((name, name) for name in index["split"].unique())], filter.split)
        counts = index["answer" if self.run.labels else "label"].value_counts()
        self.label.options = [str(name) for name in counts.index[:MOST_NAMES]]
        highest = float(index["c"].max()) if index["c"].notna().any() else 1.0
        self.weight.max = max(1.0, -(-highest // 0.01) * 0.01)
        low, high = filter.weight
        self.weight.value = (min(low, self.weight.max), min(high, self.weight.max))
        most = int(self.run.layers)
        _offer(self.layer, [("all", None), *((str(i), i) for i in range(min(most, MOST_NAMES)))])
        _offer(self.head, [("mean", None), *((str(i), i) for i in range(min(self.run.heads, MOST_NAMES)))])
        self.matches = self.filter.choose(index)
        self.list.position, self.list.total = 0, len(self.matches)
        self._quiet = False

    def _turn(self) -> None:
        """Shows the page of the list that holds the position, then the view."""
        start = self.list.position // PAGE * PAGE
        page = self.matches.iloc[start : start + PAGE].to_dict("records")
        self.list.rows = [[start + i, row_text(row, self.run.labels)] for i, row in enumerate(page)]
        look = self.look
        if look is not None:
            self._quiet = True
            count = len(self.matches.iloc[self.list.position]["text"].split("\n"))
            options: list[tuple[str, int | None]] = [("the right one", None)]
            options += [] if self.run.labels else [(str(i), i) for i in range(count)]
            _offer(self.choice, options)
            self._quiet = False
        self._draw()

    def _draw(self) -> None:
        look = self.look
        if look is None:
            self.output.value, self.message.value = "", "No example passes these filters."
            return
        self.message.value = "drawing …"
        try:
            self.output.value = self._drawn(look, self.view.value)
            self.message.value = ""
        except Exception as error:  # JupyterLab shows none that a callback raises
            self.output.value, self.message.value = "", _what(error)


def _what(error: Exception) -> str:
    log.debug("cannot be shown", exc_info=error)
    named = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return escape(f"{named}{error}")


def _step_options(run: Run) -> list[tuple[str, int]]:
    return [("end" if step == END else str(step), step) for step in reversed(run.steps)]


def _offer(control: Any, options: Sequence[tuple[str, Any]], value: Any = None) -> None:
    """New options; keeps what is chosen where it is still there, else takes ``value`` or the first."""
    values = [own for _, own in options]
    kept = control.value if control.options else value
    if tuple(control.options) != tuple(options):
        control.options = options
    control.value = kept if kept in values else values[0]


class OwnExample(ipywidgets.VBox):
    """A picture and a text of one's own, and what a run's method would select in it.

    Args:
        run: whose settings count.
        materials: of these settings.
        picture: shown first; likewise ``text`` and ``answers``.
    """

    def __init__(
        self,
        run: Run,
        materials: "Materials",
        picture: Path | str = "",
        text: str = "",
        answers: Sequence[str] = (),
    ):
        control = ipywidgets
        self.run, self.materials = run, materials
        self._folder = tempfile.TemporaryDirectory(prefix="tdlib-own-")
        self.path = _named("picture", control.Text(str(picture), placeholder="a path"), "480px")
        self.upload = control.FileUpload(accept="image/*", description="or a file of yours")
        self.upload.layout.width = "auto"
        self.text = _named("text", control.Textarea(text, rows=2), "640px")
        self.answers = _named(
            "answers",
            control.Textarea("\n".join(answers), rows=4, placeholder="one a line, or none"),
            "640px",
        )
        self.button = control.Button(description="Show what is selected")
        self.message, self.output = control.HTML(), control.HTML()
        self.output.add_class("tdlib-own")
        self.upload.observe(lambda _: self._keep(), "value")
        self.button.on_click(lambda _: self.show())
        super().__init__(
            [control.HBox([self.path, self.upload]), self.text, self.answers, self.button, self.message,
             self.output]
        )  # fmt: skip

    def _keep(self) -> None:
        """Stores an uploaded picture under its content's name and puts its path into the box."""
        if self.upload.value:
            given = self.upload.value[0]
            content = bytes(given["content"])
            suffix = Path(given["name"]).suffix or ".png"
            path = Path(self._folder.name) / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
            path.write_bytes(content)
            self.path.value = str(path)

    def show(self) -> None:
        """Selects and draws; what is wrong with the input is said instead."""
        self.message.value, self.output.value = "selecting …", ""
        lines = [line.strip() for line in self.answers.value.splitlines() if line.strip()]
        try:
            example = explorer.own_example(self.path.value, self.text.value, lines)
            self.output.value = explorer.own_view(self.run, self.materials, example).to_html()
            self.message.value = ""
        except Exception as error:
            self.message.value = _what(error)
