"""The controls without a browser: what is chosen is what is listed and shown, and mistakes are said."""

import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from records import EVIL, drawn_record
from test_explorer import fake_run

from tdlib.core.records import END
from tdlib.views import controls, explorer, widgets
from tdlib.views.controls import PAGE, row_text
from tdlib.views.index import Filter, find_runs
from tdlib.views.scale import Scale
from tdlib.views.widgets import Explorer, OwnExample

COUNT = 34


@pytest.fixture(scope="module")
def runs(image, tmp_path_factory):
    """Two runs of 34 questions with two statements at two steps; the second lacks the first question."""
    home = tmp_path_factory.mktemp("runs")
    for number, (name, arm) in enumerate({"a": "clip_td", "b": "naive"}.items()):
        records = [
            drawn_record(
                image, seed=number, step=step, example_id=f"val-{i}", choice=choice, label=1,
                prediction=i % 2, instance_weight=i / COUNT, teacher_probability=0.9,
                student_probability=0.9 - 0.8 * i / COUNT, split="val" if i < 20 else "shifted",
            )
            for step in (0, END)
            for i in range(number, COUNT)
            for choice in (0, 1)
        ]  # fmt: skip
        fake_run(home / name, records, arm=arm)
    return find_runs([home])


LINK = Explorer._link


@pytest.fixture(autouse=True)
def nothing_is_linked(monkeypatch):
    """Links need a teacher, which these runs have not."""
    monkeypatch.setattr(Explorer, "_link", lambda self, view: None)


@pytest.fixture
def drawn(monkeypatch):
    """What is asked of the views, beside what is fetched ahead."""
    asked = []

    def show(self, look, view):
        asked.append((look, view))
        return (
            explorer.show(look, view)
            if view in widgets.RECORDED
            else explorer.note(f"{view} of {look.example_id}")
        )

    monkeypatch.setattr(Explorer, "_make", show)
    return asked


@pytest.fixture
def panel(runs, drawn) -> Explorer:
    return Explorer(runs)


def listed(panel: Explorer) -> list[int]:
    return [position for position, _ in panel.list.rows]


def shown(panel: Explorer) -> str:
    """The example whose sheet stands there."""
    assert panel.request is not None and panel.message.value == ""
    (sheet,) = panel.shown.sheets
    assert sheet.about[0].startswith(f"{panel.request.example_id}, choice ")
    assert panel.stage.html == panel.shown.to_html() and sheet.about[0] in panel.stage.html
    return panel.request.example_id


def test_it_starts_with_the_first_example_and_another_arm(panel, runs, drawn):
    (look, view), (ahead, _) = drawn
    assert view == "statement and picture"
    assert (look.run, look.second, look.split, look.example_id) == (runs[0], runs[1], "val", "val-0")
    assert (look.step, look.second_step, look.choice, look.layers, look.head) == (END, END, None, (), None)
    assert (look.mass, look.temperature) == (None, None), "the run's own settings"
    assert ahead == replace(look, example_id="val-1"), "the next one is fetched ahead"
    assert shown(panel) == "val-0" and panel.list.total == COUNT
    for slider in (panel.step, panel.second_step, panel.layer, panel.mass, panel.temperature):
        assert slider.layout.width != "auto", "without a width a slider has no track to drag along"


def test_the_list_holds_one_page_wherever_it_stands(panel):
    for position in (1, 9, 10, 33, 0):
        panel.list.position = position
        start = position // PAGE * PAGE
        assert listed(panel) == list(range(start, min(start + PAGE, COUNT)))
        assert shown(panel) == f"val-{position}"
        assert f"val-{position}  c {position / COUNT:.2f}" in panel.list.rows[position - start][1]


def test_no_control_is_blank_and_those_without_use_are_grey(panel):
    """A dropdown whose value is None shows nothing."""
    controls = [
        value for value in vars(panel).values() if hasattr(value, "options") and hasattr(value, "index")
    ]
    assert len(controls) > 9
    for control in controls:
        assert control.value is not None and control.index is not None
        assert None not in [option[1] if isinstance(option, tuple) else option for option in control.options]
    useless = {
        "all choices": "choice",
        "evolution": "mass",
        "statement and picture": "head",
        "alignment": "step",
    }
    for view, name in useless.items():
        panel.view.value = view
        assert getattr(panel, name).disabled and (view == "all choices") == (
            not panel.mass.disabled and panel.choice.disabled
        )
    panel.view.value = "student: attention"
    assert not panel.layer.disabled and not panel.head.disabled and panel.second.disabled


def test_a_view_that_takes_a_moment_never_stands_under_another_example(panel, monkeypatch):
    panel.view.value = "evolution"
    assert "evolution of val-0" in panel.stage.html
    seen = []
    monkeypatch.setattr(
        Explorer, "_make", lambda self, look, view: seen.append(panel.stage.html) or explorer.note("x")
    )
    panel.list.position = 1
    assert seen == [""] and "val-0" not in panel.stage.html


def test_examples_are_sorted(panel, runs):
    panel.order.value = "highest c"
    assert list(panel.matches["example_id"][:2]) == ["val-33", "val-32"] and shown(panel) == "val-33"
    panel.order.value = "wrong first"
    assert not panel.matches["correct"][: COUNT // 2].any()
    assert list(panel.matches["example_id"][:2]) == ["val-0", "val-2"], "otherwise as recorded"
    with pytest.raises(explorer.ExplorerError, match="expected one of"):
        Filter(order="by colour").choose(runs[0].index)


def test_reset_returns_to_the_start(runs, drawn):
    start = Filter(split="val", correct=True, order="lowest c")
    panel = Explorer(runs, filter=start)
    assert panel.filter == start and panel.list.total == 10
    panel.search.value, panel.correct.value, panel.order.value = "val-3", "wrong", "highest c"
    panel.mass.value, panel.temperature.index, panel.step.value = 0.9, 0, 0
    panel.weight.value = (0.2, 0.4)
    panel.reset.click()
    assert panel.filter == start and panel.list.total == 10
    assert (panel.request.mass, panel.request.temperature, panel.request.step) == (None, None, END)


def test_mass_and_temperature_select_anew(panel, runs):
    before = panel.shown.sheets[0]
    panel.mass.value = 0.05
    assert panel.request.mass == 0.05 and "mass 0.05 instead" in panel.stage.html
    assert panel.shown.sheets[0].marked.sum() == 2, "the first word and the first patch"
    assert before.marked.sum() != 2
    record = panel.request.record()
    assert record.weight.sum() == pytest.approx(1) and record.selected.sum() == 2


def test_two_runs_share_one_scale_for_words_and_pictures(panel):
    panel.list.position = 1  # the second run lacks the first question
    panel.view.value = "two runs"
    sheets = panel.shown.sheets
    assert [sheet.name for sheet in sheets] == ["a", "b", "b − a"]
    records = [replace(panel.request, run=run, second=None).record() for run in panel.runs.values()]
    highest = max(float(record.weight[record.selected].max()) for record in records)
    assert sheets[0].scale == sheets[1].scale == Scale(highest) and sheets[2].scale.signed


def test_what_stands_there_is_saved(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(panel.stage, "send", lambda message, buffers: sent.append((message, buffers[0])))
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "csv": b"split,example_id", "html": b"<div"}
    for kind, start in starts.items():
        panel.export[kind].click()
        message, content = sent.pop()
        assert message["name"] == f"val-0-statement-and-picture-a.{kind}" and content.startswith(start)
        assert panel.message.value == f"saved {message['name']}"
    panel.search.value = "nothing at all"
    assert all(button.disabled for button in panel.export.values())


def test_filters_start_the_list_anew(panel):
    panel.list.position = 25
    panel.correct.value = "wrong"
    assert panel.list.position == 0 and panel.list.total == COUNT // 2 and shown(panel) == "val-0"
    panel.split.value = "shifted"
    assert shown(panel) == "val-20" and panel.list.total == 7
    panel.search.value = "val-24"
    assert panel.list.total == 1 and "val-24" in panel.list.rows[0][1]
    panel.disagreement.value = 0.7
    assert panel.list.total == 0 and panel.list.rows == [] and panel.stage.html == ""
    assert panel.message.value == "No example passes these filters."
    for control, value in (
        (panel.disagreement, 0.0),
        (panel.search, ""),
        (panel.split, ""),
        (panel.correct, "any"),
    ):
        control.value = value
    assert panel.list.total == COUNT and panel.filter == Filter()
    panel.weight.value = (0.5, 0.6)
    expected = [i for i in range(COUNT) if 0.5 <= i / COUNT <= 0.6]
    assert list(panel.matches["example_id"]) == [f"val-{i}" for i in expected]
    panel.label.value = "0"
    assert panel.list.total == 0


def test_another_run_keeps_the_example(panel, runs, drawn):
    panel.list.position = 21
    panel.first.value = "b"
    assert panel.list.total == COUNT - 1 and panel.list.position == 20
    look = panel.request
    assert (look.run, look.example_id, look.split) == (runs[1], "val-21", "shifted")
    panel.first.value = "a"
    panel.list.position = 0
    panel.first.value = "b"  # which has no val-0
    assert panel.list.position == 0 and shown(panel) == "val-1"


def test_steps_choice_modality_layer_and_head_reach_the_view(panel, drawn):
    panel.step.value, panel.second_step.value, panel.modality.value = 0, 0, "text"
    panel.choice.value, panel.layer.value, panel.view.value = 0, 1, "student: attention"
    look, view = drawn[-1]
    assert view == "student: attention"
    assert (look.step, look.second_step, look.modality, look.choice, look.layers) == (0, 0, "text", 0, (1,))
    panel.list.position = 3
    assert (replace(look, example_id="val-3"), view) in drawn


def test_what_was_drawn_is_kept(panel, drawn):
    for position in (1, 0, 1, 0):
        panel.list.position = position
    assert len(drawn) == 3, "the two, and the one that is fetched ahead"


def test_what_agrees_in_one_example_never_lights_up_in_the_next(panel, monkeypatch):
    """Also if it becomes known while the next one's page is on its way."""
    known, first = threading.Event(), panel.stage.html
    started, send = [], panel.stage.send_state

    def late(run, record):
        assert known.wait(60)
        return np.ones((len(record.tokens),) * 2)

    def sent(key=None):
        if panel.stage.html != first and not known.is_set():
            known.set()
            started[0].join()
        send(key)

    class Thread(threading.Thread):
        def start(self):
            started.append(self)
            super().start()

    monkeypatch.setattr(explorer, "agreement", late)
    monkeypatch.setattr(widgets.threading, "Thread", Thread)
    monkeypatch.setattr(panel.stage, "send_state", sent)
    LINK(panel, panel.shown)
    panel.list.position = 1
    assert len(started) == 1 and known.is_set() and panel.stage.agreement == b""
    LINK(panel, panel.shown)
    started[1].join()
    assert len(panel.stage.agreement) == 4 * len(panel.shown.sheets[0].record.tokens) ** 2


def test_a_mistake_is_said_where_the_view_would_be(runs, monkeypatch):
    panel = Explorer(runs, example="val-2")
    assert shown(panel) == "val-2"

    def fail(self, look, view):
        raise OSError(f"gone {EVIL}")

    monkeypatch.setattr(Explorer, "_make", fail)
    panel.view.value = "evolution"
    assert panel.stage.html == "" and panel.message.value.startswith("OSError: gone &lt;script")


def test_it_starts_where_it_is_told(runs, drawn):
    filter = Filter(split="shifted", correct=False)
    panel = Explorer(runs, runs[1], "val-30", "two runs", filter)
    assert panel.first.value == "b" and panel.second.value == "a"
    assert (panel.split.value, panel.correct.value, panel.list.total) == ("shifted", "wrong", 7)
    assert drawn[0] == (panel.request, "two runs") and panel.request.example_id == "val-30"
    assert Explorer(runs, runs[1], second=runs[1]).second.value == "b"


def test_examples_are_chosen_by_what_the_data_say_of_them(runs, drawn, monkeypatch):
    known = runs[0].index.assign(concept=["known", "unknown"] * (COUNT // 2), style="flat")
    monkeypatch.setitem(runs[0].__dict__, "index", known)
    panel = Explorer(runs, filter=Filter(concept="known", split="val"))
    assert panel.concept.value == "known" and panel.style.value == "" and panel.list.total == 10
    panel.concept.value = "unknown"
    assert panel.list.total == 10 and shown(panel) == "val-1"
    panel.style.value = "flat"
    assert panel.list.total == 10
    assert panel.filter == Filter(concept="unknown", style="flat", split="val")


def test_a_row_is_one_line(panel):
    row = panel.matches.iloc[1].to_dict()
    assert row_text(row) == "✓ val val-1  c 0.03  Why is Casey angry? The heat is unbearable."
    assert row_text(row | {"label": None, "c": np.nan, "answer": None}).startswith("? val val-1  c  –    Why")
    assert row_text(row | {"answer": "neutral"}, ["neutral"]).endswith("unbearable. → neutral")
    long = row_text(row | {"answer": "a\nb " * 100})
    assert len(long) == 110 and "\n" not in long and long.endswith("…")


def test_nothing_of_the_data_becomes_markup_in_the_list():
    """But for a view's HTML, in which every string is escaped, texts are text nodes; nothing is loaded."""
    words = ("outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import ", "://")
    for name in ("list.js", "stage.js", "explorer.css"):
        source = (controls.STATIC / name).read_text("utf-8")
        source = source.replace('root.innerHTML = model.get("html");', "")
        for word in ("innerHTML", *words):
            assert word not in source, f"{name}: {word}"


def test_an_example_of_ones_own(runs, image, monkeypatch):
    asked = []
    monkeypatch.setattr(
        explorer, "own_view", lambda run, own: asked.append((run, own)) or explorer.note(own.prompt.text)
    )
    panel = OwnExample(runs[0], image, "Why?", ["a", "b"])
    panel.show()
    assert [choice.text for choice in asked[0][1].choices] == ["a", "b"] and asked[0][1].image == image
    assert "Why?" in panel.output.value and panel.message.value == ""
    content = image.read_bytes()
    panel.upload.value = ({"name": "../../my.png", "type": "image/png", "size": len(content),
                           "content": memoryview(content), "last_modified": datetime.now()},)  # fmt: skip
    assert Path(panel.path.value).read_bytes() == content and Path(panel.path.value).parent != image.parent
    panel.answers.value = ""
    panel.show()
    own = asked[1][1]
    assert own.image == Path(panel.path.value).resolve() and own.choices == ()
    assert own.id == "my.png", "it keeps the name that it was uploaded under"
    for control, value, said in ((panel.path, "no/such.png", "missing"), (panel.text, "  ", "no text")):
        control.value = value
        panel.show()
        assert said in panel.message.value and panel.output.value == ""


def test_ones_own_example_is_that_of_the_run_chosen_in_the_explorer(runs, image, drawn, monkeypatch):
    asked = []
    monkeypatch.setattr(explorer, "own_view", lambda run, own: asked.append(run) or explorer.note("x"))
    chooser = Explorer(runs)
    panel = OwnExample(chooser, image, "A hat.")
    for name in ("a", "b"):
        chooser.first.value = name
        panel.show()
    assert asked == [runs[0], runs[1]]
