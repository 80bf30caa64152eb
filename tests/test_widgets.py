"""The controls without a browser: what is chosen is what is listed and shown, and mistakes are said."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_explorer import EVIL, fake_run
from test_views_runs import make_record, problems

from tdlib.core.records import END
from tdlib.views import explorer, widgets
from tdlib.views.explorer import Filter, find_runs
from tdlib.views.widgets import PAGE, Explorer, OwnExample, row_text

COUNT = 34


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.new("RGB", (60, 40), "#88aaff").save(path)
    return path


@pytest.fixture(scope="module")
def runs(image, tmp_path_factory):
    """Two runs of 34 questions with two statements at two steps; the second lacks the first question."""
    home = tmp_path_factory.mktemp("runs")
    for number, (name, arm) in enumerate({"a": "clip_td", "b": "naive"}.items()):
        records = [
            make_record(
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


@pytest.fixture
def drawn(monkeypatch):
    """What is asked of the views, and a cheap answer to it."""
    asked = []

    def show(look, view):
        asked.append((look, view))
        return explorer.note(f"{view} of {look.example_id}")

    monkeypatch.setattr(explorer, "show", show)
    return asked


@pytest.fixture
def panel(runs, drawn) -> Explorer:
    return Explorer(runs)


def listed(panel: Explorer) -> list[int]:
    return [position for position, _ in panel.list.rows]


def shown(panel: Explorer) -> str:
    """The example whose view stands there."""
    assert panel.look is not None
    assert panel.output.value == explorer.note(f"{panel.view.value} of {panel.look.example_id}").to_html()
    return panel.look.example_id


def test_it_starts_with_the_first_example_and_another_arm(panel, runs, drawn):
    (look, view), *more = drawn
    assert not more and view == "statement and picture"
    assert (look.run, look.second, look.split, look.example_id) == (runs[0], runs[1], "val", "val-0")
    assert (look.step, look.second_step, look.choice, look.layers, look.head) == (END, END, None, (), None)
    assert panel.output.value == explorer.note("statement and picture of val-0").to_html()
    assert panel.list.total == COUNT and panel.message.value == ""


def test_the_list_holds_one_page_wherever_it_stands(panel):
    for position in (1, 9, 10, 33, 0):
        panel.list.position = position
        start = position // PAGE * PAGE
        assert listed(panel) == list(range(start, min(start + PAGE, COUNT)))
        assert shown(panel) == f"val-{position}"
        assert f"val-{position}  c {position / COUNT:.2f}" in panel.list.rows[position - start][1]


def test_filters_start_the_list_anew(panel):
    panel.list.position = 25
    panel.correct.value = False
    assert panel.list.position == 0 and panel.list.total == COUNT // 2 and shown(panel) == "val-0"
    panel.split.value = "shifted"
    assert shown(panel) == "val-20" and panel.list.total == 7
    panel.search.value = "val-24"
    assert panel.list.total == 1 and "val-24" in panel.list.rows[0][1]
    panel.disagreement.value = 0.7
    assert panel.list.total == 0 and panel.list.rows == [] and panel.output.value == ""
    assert panel.message.value == "No example passes these filters."
    for control, value in (
        (panel.disagreement, 0.0),
        (panel.search, ""),
        (panel.split, ""),
        (panel.correct, None),
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
    look = drawn[-1][0]
    assert (look.run, look.example_id, look.split) == (runs[1], "val-21", "shifted")
    panel.first.value = "a"
    panel.list.position = 0
    panel.first.value = "b"  # which has no val-0
    assert panel.list.position == 0 and drawn[-1][0].example_id == "val-1"


def test_steps_choice_modality_layer_and_head_reach_the_view(panel, drawn):
    panel.step.value, panel.second_step.value, panel.modality.value = 0, 0, "text"
    panel.choice.value, panel.layer.value, panel.view.value = 0, 1, "student: attention"
    look, view = drawn[-1]
    assert view == "student: attention"
    assert (look.step, look.second_step, look.modality, look.choice, look.layers) == (0, 0, "text", 0, (1,))
    panel.list.position = 3
    assert drawn[-1][0] == replace(look, example_id="val-3")


def test_what_was_drawn_is_kept(panel, drawn):
    for position in (1, 0, 1, 0):
        panel.list.position = position
    assert len(drawn) == 2


def test_a_mistake_is_said_where_the_view_would_be(runs, monkeypatch):
    panel = Explorer(runs, example="val-2")
    assert "val-2" in panel.output.value and problems(panel.output.value) == []

    def fail(look, view):
        raise OSError(f"gone {EVIL}")

    monkeypatch.setattr(explorer, "show", fail)
    panel.view.value = "evolution"
    assert panel.output.value == "" and panel.message.value.startswith("OSError: gone &lt;img")


def test_it_starts_where_it_is_told(runs, drawn):
    panel = Explorer(runs, runs[1], "val-30", "two runs", Filter(split="shifted", correct=False))
    assert panel.first.value == "b" and panel.second.value == "a"
    assert (panel.split.value, panel.correct.value, panel.list.total) == ("shifted", False, 7)
    assert drawn == [(panel.look, "two runs")] and panel.look.example_id == "val-30"


def test_a_row_is_one_line(panel):
    row = panel.matches.iloc[1].to_dict()
    assert row_text(row) == "✓ val val-1  c 0.03  Why is Casey angry? The heat is unbearable."
    assert row_text(row | {"label": None, "c": np.nan, "answer": None}).startswith("? val val-1  c  –    Why")
    assert row_text(row | {"answer": "neutral"}, ["neutral"]).endswith("unbearable. → neutral")
    long = row_text(row | {"answer": "a\nb " * 100})
    assert len(long) == 110 and "\n" not in long and long.endswith("…")


def test_nothing_of_the_data_becomes_markup_in_the_list():
    assert "innerHTML" not in widgets._LIST and "insertAdjacent" not in widgets._LIST
    assert "://" not in widgets._LIST + widgets._LOOK


def test_an_example_of_ones_own(runs, image, monkeypatch):
    asked = []
    monkeypatch.setattr(
        explorer, "own_view", lambda run, materials, own: asked.append(own) or explorer.note(own.prompt.text)
    )
    panel = OwnExample(runs[0], None, image, "Why?", ["a", "b"])
    panel.show()
    assert [choice.text for choice in asked[0].choices] == ["a", "b"] and asked[0].image == image
    assert "Why?" in panel.output.value and panel.message.value == ""
    content = image.read_bytes()
    panel.upload.value = ({"name": "../../my.png", "type": "image/png", "size": len(content),
                           "content": memoryview(content), "last_modified": datetime.now()},)  # fmt: skip
    assert Path(panel.path.value).read_bytes() == content and Path(panel.path.value).parent != image.parent
    panel.answers.value = ""
    panel.show()
    assert asked[1].image == Path(panel.path.value).resolve() and asked[1].choices == ()
    for control, value, said in ((panel.path, "no/such.png", "missing"), (panel.text, "  ", "no text")):
        control.value = value
        panel.show()
        assert said in panel.message.value and panel.output.value == ""
