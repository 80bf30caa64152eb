"""The explorer's controls in JupyterLab: a list of examples for keyboard and mouse, filters, views, export.

``explorer`` makes the views, and a notebook shows the same ones without controls. The list holds one page of
rows, however many examples there are. Strings from the data reach the page as text nodes or escaped by the
views.
"""

import hashlib
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from tdlib.core.records import END
from tdlib.views import explorer
from tdlib.views.controls import (
    PAGE,
    ExampleList,
    Stage,
    beside,
    described,
    dropdown,
    named,
    offer,
    row_text,
    step_options,
)  # fmt: skip
from tdlib.views.explorer import VIEWS, ViewRequest
from tdlib.views.index import ORDERS, Filter, Run, companion
from tdlib.views.view import View

log = logging.getLogger(__name__)

MOST_NAMES = 50  # labels and layers offered; others can be typed or given as parameters
ANY, ALL = "any", -1  # values of controls: None as a value leaves a dropdown blank
VERDICTS = {ANY: None, "right": True, "wrong": False}
RECORDED = ("statement and picture", "all choices", "two runs")  # views that need no model
FILES = {"png": "image/png", "svg": "image/svg+xml", "pdf": "application/pdf", "csv": "text/csv",
         "html": "text/html"}  # fmt: skip


class Explorer(ipywidgets.VBox):
    """Shows runs, filters, the list of examples, and beside it a view of the chosen example.

    Args:
        runs: the runs that can be chosen, from ``index.find_runs``.
        first: the run that is shown first; the first of ``runs`` if None.
        example: id of the example that is shown first; the first that passes the filter if empty.
        view: the view that is shown first, a key of ``explorer.VIEWS``.
        filter: the list starts with it, and "reset" returns to it.
        second: the run that it is compared with first; ``index.companion`` if None.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        first: Run | None = None,
        example: str = "",
        view: str = "statement and picture",
        filter: Filter = Filter(),  # noqa: B008 (frozen)
        second: Run | None = None,
    ):
        first = first or runs[0]
        self.runs = {run.name: run for run in runs}
        self.matches = first.index.iloc[:0]
        self._start, self._models = filter, threading.Lock()
        self._quiet = 0
        self._made = lru_cache(maxsize=64)(lambda request, view: self._make(request, view))
        self._make_controls(runs, first, second or companion(runs, first), view)
        self.list, self.stage = ExampleList(), Stage()
        self.message = ipywidgets.HTML()
        self.shown: View | None = None
        with self._silence():
            self._load(filter)
            if example and example in set(self.matches["example_id"]):
                self.list.position = int((self.matches["example_id"] == example).to_numpy().argmax())
        super().__init__(self._arranged())
        self.add_class("tdlib-explorer")
        self._watch()
        self._turn()

    def _make_controls(self, runs: Sequence[Run], first: Run, other: Run | None, view: str) -> None:
        names = list(self.runs)
        self.first = dropdown("run", names, first.name)
        self.second = dropdown("compared with", names, other.name if other else first.name)
        self.search = named("search", ipywidgets.Text(placeholder="words of id, text, answer"), "270px")
        self.label = named("label", ipywidgets.Combobox(placeholder=ANY), "220px")
        self.split = dropdown("split")
        self.correct = dropdown("student", list(VERDICTS), ANY)
        self.concept, self.style = dropdown("concept"), dropdown("style")
        self.order = dropdown("order", list(ORDERS), "as recorded")
        self.weight = named("c", ipywidgets.FloatRangeSlider(min=0, max=1, step=0.01), "300px")
        self.disagreement = named("|p_T − p_S| ≥", ipywidgets.FloatSlider(min=0, max=1, step=0.01), "300px")
        for control in (self.search, self.label, self.weight, self.disagreement):
            control.continuous_update = False
        self.reset = ipywidgets.Button(description="reset", tooltip="filters, order and sliders as at first")
        self.view = dropdown("view", list(VIEWS), view)
        self.modality = dropdown("modality", explorer.MODALITIES)
        self.choice = dropdown("choice", [("the right one", ALL)])
        self.step, self.second_step = (
            named(name, ipywidgets.SelectionSlider(options=[("end", END)]), "240px")
            for name in ("step", "second step")
        )  # a slider of the width "auto" has no track to be dragged along
        self.layer = named("layer", ipywidgets.SelectionSlider(options=[("all", ALL)]), "200px")
        self.head = dropdown("head", [("mean", ALL)])
        self.word = named("word", ipywidgets.Text(placeholder="letters; empty: selected ones"), "240px")
        self.word.continuous_update = False
        # Values from a list, the run's own among them: JupyterLab moves any other to a slider's next step.
        self.mass = named("mass", ipywidgets.SelectionSlider(options=[1.0]), "280px")
        self.temperature = named("temperature", ipywidgets.SelectionSlider(options=[1.0]), "280px")
        self.settings = {  # of a view, by the names in VIEWS
            "second": self.second, "second_step": self.second_step, "step": self.step, "choice": self.choice,
            "modality": self.modality, "layers": self.layer, "head": self.head, "mass": self.mass,
            "temperature": self.temperature, "word": self.word,
        }  # fmt: skip
        self.paper = ipywidgets.Checkbox(description="for a paper", indent=False, layout={"width": "auto"})
        self.export = {
            kind: ipywidgets.Button(
                description=kind, tooltip=f"save this view as {kind}", layout={"width": "56px"}
            )
            for kind in FILES
        }

    def _arranged(self) -> list[Any]:
        left = ipywidgets.VBox(
            [
                self.list, beside(self.order, self.reset), self.search,
                beside(self.label, self.split, self.correct), beside(self.concept, self.style),
                self.weight, self.disagreement,
            ]
        )  # fmt: skip
        right = ipywidgets.VBox(
            [
                beside(self.view, self.modality, self.choice), beside(self.step, self.mass, self.temperature),
                beside(self.second, self.second_step), beside(self.layer, self.head, self.word),
                beside(ipywidgets.Label("save as"), *self.export.values(), self.paper),
                self.message, self.stage,
            ]
        )  # fmt: skip
        both = ipywidgets.Box([left, right])
        for box, name in ((both, "beside"), (left, "left"), (right, "right")):
            box.add_class(f"tdlib-{name}")
        return [beside(self.first), both]

    # State.

    @property
    def run(self) -> Run:
        return self.runs[self.first.value]

    @property
    def filter(self) -> Filter:
        """The filter that the controls are set to; a slider over the whole range of c filters nothing."""
        weight = self.weight.value if self.weight.value != (self.weight.min, self.weight.max) else None
        condition = {} if weight is None else {"weight": weight}
        return Filter(
            text=self.search.value, label=self.label.value, split=self.split.value,
            correct=VERDICTS[self.correct.value], disagreement=self.disagreement.value,
            order=self.order.value, concept=self.concept.value, style=self.style.value, **condition,
        )  # fmt: skip

    @property
    def request(self) -> ViewRequest | None:
        """The view that the controls ask for; None if no example passes the filter."""
        return None if self.matches.empty else self._request_at(self.list.position)

    def _request_at(self, position: int) -> ViewRequest:
        row = self.matches.iloc[position]
        changed = {
            name: control.value
            for name, control in (("mass", self.mass), ("temperature", self.temperature))
            if not control.disabled and control.value != getattr(self.run.config, name)
        }
        return ViewRequest(
            self.run, row["split"], row["example_id"], self.runs[self.second.value], self.step.value,
            self.second_step.value, None if self.choice.value == ALL else self.choice.value,
            self.modality.value, () if self.layer.value == ALL else (self.layer.value,),
            None if self.head.value == ALL else self.head.value, word=self.word.value, **changed,
        )  # fmt: skip

    # Reactions.

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Lets several controls be set without a reaction to each of them."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def _watch(self) -> None:
        def on(call: Callable[[], None], *controls: Any, name: str = "value") -> None:
            for control in controls:
                control.observe(lambda _: None if self._quiet else call(), name)

        on(self._change_run, self.first)
        on(self._change_second, self.second)
        on(
            self._change_filter, self.search, self.label, self.split, self.correct, self.weight,
            self.disagreement, self.order, self.concept, self.style,
        )  # fmt: skip
        on(self._change_view, self.view)
        on(self._draw, *(control for name, control in self.settings.items() if name != "second"))
        on(self._turn, self.list, name="position")
        self.reset.on_click(lambda _: self._reset())
        for kind, button in self.export.items():
            button.on_click(lambda _, kind=kind: self.save(kind))

    def _change_run(self) -> None:
        kept = self.request
        with self._silence():
            self._load(self.filter)
            if kept is not None:  # the same example, where the other run has it too
                same = (self.matches["split"] == kept.split) & (self.matches["example_id"] == kept.example_id)
                self.list.position = int(same.to_numpy().argmax()) if same.any() else 0
        self._turn()

    def _change_second(self) -> None:
        with self._silence():
            offer(self.second_step, step_options(self.runs[self.second.value]))
            self._enable()
        self._draw()

    def _change_filter(self) -> None:
        with self._silence():
            self._filter()
        self._turn()

    def _change_view(self) -> None:
        self._enable()
        self._draw()

    def _reset(self) -> None:
        with self._silence():
            self._load(self._start)
            for control in (self.choice, self.layer, self.head, self.modality):
                control.index = 0
            self.step.value = self.second_step.value = END
            self.word.value = ""
        self._turn()

    def _load(self, filter: Filter) -> None:
        """Fills the controls from a run: steps, splits, labels, range of c, settings, examples that pass."""
        run, index = self.run, self.run.index
        offer(self.step, step_options(run))
        offer(self.second_step, step_options(self.runs[self.second.value]))
        offer(self.layer, [("all", ALL), *((str(i), i) for i in range(min(run.layers, MOST_NAMES)))])
        offer(self.head, [("mean", ALL), *((str(i), i) for i in range(min(run.heads, MOST_NAMES)))])
        masses = sorted({*(round(0.05 * step, 2) for step in range(1, 21)), run.config.mass})
        heats = [run.config.temperature * 2.0**power for power in range(-4, 7)]
        for control, values, chosen in (
            (self.mass, masses, run.config.mass), (self.temperature, heats, run.config.temperature),
        ):  # fmt: skip
            control.options = [(f"{value:.3g}", value) for value in values]
            control.value = chosen
        self.search.value, self.label.value, self.order.value = filter.text, filter.label, filter.order
        self.correct.value = next(name for name, value in VERDICTS.items() if value == filter.correct)
        self.disagreement.value = filter.disagreement
        for control, column in ((self.split, "split"), (self.concept, "concept"), (self.style, "style")):
            names, wanted = [name for name in index[column].unique() if name], getattr(filter, column)
            control.options = [(ANY, ""), *((name, name) for name in names)]
            control.value = wanted if wanted in names else ""
            control.disabled = not names
        counts = index["answer" if run.labels else "label"].value_counts()
        self.label.options = [str(name) for name in counts.index[:MOST_NAMES]]
        highest = float(index["c"].max()) if index["c"].notna().any() else 1.0
        low, high = filter.weight
        self.weight.max = max(1.0, -(-highest // 0.01) * 0.01)
        self.weight.value = (min(low, self.weight.max), min(high, self.weight.max))
        self._filter()
        self._enable()

    def _filter(self) -> None:
        self.matches = self.filter.choose(self.run.index)
        self.list.position, self.list.total = 0, len(self.matches)

    def _enable(self) -> None:
        """Greys out the controls that change nothing in this view, run and second run."""
        _, used = VIEWS[self.view.value]
        for name, control in self.settings.items():
            control.disabled = name not in used
        for control in (self.step, self.second_step, self.choice, self.layer):
            control.disabled |= len(control.options) < 2
        # only the nucleus selector has a mass; other selectors would show the same at every position
        self.mass.disabled |= self.run.config.selector != "nucleus"

    def _turn(self) -> None:
        """Shows the page of the list that holds the position, then the view."""
        start = self.list.position // PAGE * PAGE
        page = self.matches.iloc[start : start + PAGE].to_dict("records")
        self.list.rows = [[start + i, row_text(row, self.run.labels)] for i, row in enumerate(page)]
        if not self.matches.empty:
            with self._silence():
                count = len(self.matches.iloc[self.list.position]["text"].split("\n"))
                statements = [] if self.run.labels else [(str(i), i) for i in range(count)]
                offer(self.choice, [("the right one", ALL), *statements])
                self._enable()
        self._draw()
        self._prefetch()

    # Drawing.

    def _make(self, request: ViewRequest, view: str) -> View:
        if view in RECORDED:
            return explorer.show(request, view)
        with self._models:  # ``_link`` uses the same cache in a thread, and it is not made for two
            return explorer.show(request, view)

    def _draw(self) -> None:
        request = self.request
        if request is None:
            self._show(None, "No example passes these filters.")
            return
        if self.view.value not in RECORDED:  # what takes a moment must not leave another example's view
            self._show(None, "drawing …")
        try:
            self._show(self._made(request, self.view.value))
        except Exception as error:  # JupyterLab shows none that a callback raises
            self._show(None, described(error))

    def _show(self, view: View | None, message: str = "") -> None:
        html = "" if view is None else view.to_html()
        self.shown = view  # from here on ``_link`` sends nothing for the view before
        with self.stage.hold_sync():
            self.stage.html, self.stage.agreement = html, b""
        self.message.value = message
        for button in self.export.values():
            button.disabled = view is None
        if view is not None and view.sheets and view.sheets[0].record.is_region.any():
            self._link(view)

    def _prefetch(self) -> None:
        """Makes the next example's view while this one is looked at."""
        if self.view.value not in RECORDED or self.list.position + 1 >= len(self.matches):
            return
        try:
            self._made(self._request_at(self.list.position + 1), self.view.value)
        except Exception as error:
            log.debug("cannot be fetched ahead", exc_info=error)

    def _link(self, view: View) -> None:
        """Computes the cosines of tokens in the background, and sends them if the view is still the same.

        This opens the run's teacher.
        """
        run = self.run

        def work() -> None:
            try:
                with self._models:
                    if self.shown is not view:
                        return
                    cosines = explorer.agreement(run, view.sheets[0].record).astype("<f4").tobytes()
            except Exception as error:  # no teacher, no picture: nothing lights up
                log.debug("no agreement of tokens", exc_info=error)
                return
            if self.shown is view:
                self.stage.agreement = cosines

        threading.Thread(target=work, daemon=True).start()

    # Export.

    def save(self, kind: str) -> None:
        """Hands the shown view to the browser as a file, which it saves where it saves downloads.

        ``kind`` is a key of ``FILES``. The buttons are grey while no view is shown.
        """
        view, request = self.shown, self.request
        assert view is not None and request is not None
        self.message.value = f"drawing {kind} …"
        try:
            if kind == "csv":
                content = view.table().to_csv(index=False)
            else:
                paper = {} if kind == "html" else {"paper": self.paper.value}
                content = getattr(view, f"to_{kind}")(**paper)
        except Exception as error:
            self.message.value = described(error)
            return
        name = re.sub(r"[^\w.-]+", "-", f"{request.example_id} {self.view.value} {request.run.name}")
        name = f"{name.strip('-.')}.{kind}"
        content = content.encode() if isinstance(content, str) else content
        self.stage.send({"name": name, "kind": FILES[kind]}, [content])
        self.message.value = f"saved {escape(name)}"


class OwnExample(ipywidgets.VBox):
    """Takes your picture and text, and shows what a run's method selects in it with its trained student.

    Args:
        source: the run whose settings and student are used; or an explorer, whose chosen run is used.
        picture: fills the control at first, as do ``text`` and ``answers``.
    """

    def __init__(
        self, source: Run | Explorer, picture: Path | str = "", text: str = "", answers: Sequence[str] = ()
    ):
        control = ipywidgets
        self.source = source
        self._folder = tempfile.TemporaryDirectory(prefix="tdlib-own-")
        self.path = named("picture", control.Text(str(picture), placeholder="a path"), "480px")
        self.upload = control.FileUpload(accept="image/*", description="or a file of yours")
        self.upload.layout.width = "auto"
        self.text = named("text", control.Textarea(text, rows=2), "640px")
        lines = control.Textarea("\n".join(answers), rows=4, placeholder="one a line, or none")
        self.answers = named("answers", lines, "640px")
        self.button = control.Button(description="Show what is selected", layout={"width": "auto"})
        self.message, self.output = control.HTML(), control.HTML()
        self.output.add_class("tdlib-own")
        self.upload.observe(lambda _: self._keep(), "value")
        self.button.on_click(lambda _: self.show())
        first = beside(self.path, self.upload)
        super().__init__([first, self.text, self.answers, self.button, self.message, self.output])

    @property
    def run(self) -> Run:
        return self.source.run if isinstance(self.source, Explorer) else self.source

    def _keep(self) -> None:
        """Stores an uploaded picture under its name, and writes its path into the control.

        Its folder is named after the content: two pictures of one name stay apart in the caches.
        """
        if self.upload.value:
            uploaded = self.upload.value[0]
            content = bytes(uploaded["content"])
            folder = Path(self._folder.name) / hashlib.sha256(content).hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            name = re.sub(r"[^\w. -]+", "_", Path(uploaded["name"].replace("\\", "/")).name).strip(". ")
            path = folder / (name or "picture.png")
            path.write_bytes(content)
            self.path.value = str(path)

    def show(self) -> None:
        """Selects and draws; a mistake in the input is shown as a message instead."""
        run = self.run
        self.message.value, self.output.value = f"selecting by {escape(run.name)} …", ""
        lines = [line.strip() for line in self.answers.value.splitlines() if line.strip()]
        try:
            example = explorer.own_example(self.path.value, self.text.value, lines)
            self.output.value = explorer.own_view(run, example).to_html()
            self.message.value = ""
        except Exception as error:
            self.message.value = described(error)
