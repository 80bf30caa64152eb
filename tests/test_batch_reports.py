"""What is told of a batch that has run: states, tables, SQL, a page, and each kind of failure once."""

import json
import shutil
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from batch_helpers import PARAMETERS, RESULT, by_run, command, make_batch, wait_for, write_template
from nbclient import NotebookClient

from tdlib.cli import main
from tdlib.core.paths import ConfigError
from tdlib.runs import report as batch_reports
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch
from tdlib.runs.report import open_results, write_reports
from tdlib.runs.runner import specification

pytestmark = pytest.mark.usefixtures("no_orphans")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A batch that has run: every way to end, beside each other."""
    batch = make_batch(
        tmp_path_factory.mktemp("finished"),
        include=[
            {"a": 3, "seed": 0}, {"a": 3, "seed": 1}, {"mode": "raise"}, {"mode": "raise", "seed": 1},
            {"mode": "die"}, {"mode": "leave"}, {"mode": "half"},
        ],
    )  # fmt: skip
    return batch, batch.run(cpus=2)


def test_each_run_ends_by_itself_and_its_state_says_how(finished):
    batch, table = finished
    ends = {run.overrides.get("mode", "fine"): state for run, state in by_run(batch)}
    assert {mode: state["state"] for mode, state in ends.items()} == {
        "fine": "done", "raise": "failed", "die": "killed", "leave": "failed", "half": "failed"
    }  # fmt: skip
    assert "SIGKILL in cell 4" in ends["die"]["reason"] and "status 3" in ends["leave"]["reason"]
    assert "metrics.json: is not whole JSON" in ends["half"]["reason"]
    assert ends["raise"]["error"]["cell"] == 4 and ends["raise"]["error"]["name"] == "ValueError"
    assert list(table["state"])[:4] == ["failed"] * 4, "failures stand first"
    for run, state in by_run(batch):
        folder = batch.folder_of(run)
        for name in ("parameters.json", "environment.json", "notebook.ipynb", "log.txt"):
            assert (folder / name).is_file(), name
        assert state["peak_memory"] > 2**24 and state["seconds"] > 0 and state["attempt"] == 1
        assert "papermill" in json.loads((folder / "environment.json").read_text())["packages"]
    assert (batch.folder / "begun.txt").read_text().split().__len__() == 7


def test_tables_and_sql(finished):
    batch, table = finished
    stored = pd.read_parquet(batch.folder / "results.parquet")
    assert list(stored["run"]) == list(table["run"]) and len(stored) == 7
    done = table[table["state"] == "done"].sort_values("seed")
    assert list(done["accuracy.val"]) == [0.75, 1.75] and list(done["gpus"]) == ["", ""]
    assert table.loc[table["state"] != "done", "accuracy.val"].isna().all()
    assert (table["peak_memory_mib"] > 16).all()
    connection = open_results(batch.folder)
    query = "SELECT r.seed, sum(p.score) FROM runs r JOIN predictions p USING (run) GROUP BY 1 ORDER BY 1"
    assert connection.execute(query).fetchall() == [(0, 3.0), (1, 3.0)]
    with pytest.raises(FileNotFoundError, match="batch status"):
        open_results(batch.reports)


@pytest.mark.parametrize(("split", "drawn"), [("val", "val"), ("val_balanced", "val_shortcut")])
def test_the_drawing_shows_the_usual_test_and_names_what_it_shows(tmp_path, split, drawn):
    batch = Batch(
        {"template": "04_distill", "grid": {"arm": ["finetune", "clip_td"]}, "seeds": 3}, reports=tmp_path
    )
    accuracy = {"val_shortcut": 0.25, split: 0.75}
    metrics = {f"accuracy.{name}": value for name, value in accuracy.items()}
    states = {run.id: {"state": "done", "metrics": metrics} for run in batch.plan.runs}
    page = write_reports(batch.folder, batch.plan, states, None).read_text()
    figure = page.partition("<figure>")[2].partition("</figure>")[0]
    assert f"Accuracy on {drawn} (%)" in figure and f"{100 * accuracy[drawn]:.1f}" in figure


def test_tables_hold_values_of_several_types_and_parameters_of_any_name(tmp_path):
    parameters = PARAMETERS + 'state: str = "ohio"\nrun: int = 1\n'
    write_template(tmp_path, "print(state, run)\n" + RESULT, parameters)
    grid = {"state": ["ohio", "iowa"], "seconds": [0.1, 0.2]}
    batch = make_batch(tmp_path, grid=grid, seeds=3)
    metrics = [{"best": 3, "sure": True, "score": 0.5}, {"best": "none", "sure": 0.5, "score": 0.7}]
    states = {
        run.id: {"state": "done", "seconds": 7.0, "metrics": metrics[number % 2]}
        for number, run in enumerate(batch.plan.runs)
    }
    page = write_reports(batch.folder, batch.plan, states, None).read_text()
    stored = pd.read_parquet(batch.folder / "results.parquet")
    assert set(stored["state"]) == {"done"} and set(stored["parameter.state"]) == {"ohio", "iowa"}
    assert set(stored["seconds"]) == {7.0} and set(stored["parameter.seconds"]) == {0.1, 0.2}
    assert set(stored["best"]) == {"3", "none"} and set(stored["sure"]) == {"true", "0.5"}
    assert "parameter.state" in page and set(batch.planned()["parameter.state"]) == {"ohio", "iowa"}


def test_what_is_done_with_another_template_is_told(tmp_path, capsys):
    batch = make_batch(tmp_path, grid={"a": [1, 2]})
    for run in batch.plan.runs:
        batch.folder_of(run).mkdir(parents=True)
        (batch.folder_of(run) / "parameters.json").write_text(json.dumps(specification(batch.plan, run, 1)))
    run_states.write_state(batch.folder_of(batch.plan.runs[0]), {"state": "done", "files": {}})
    run_states.write_state(batch.folder_of(batch.plan.runs[1]), {"state": "killed"})
    assert not batch.done_otherwise()
    write_template(tmp_path, "x = 1\n" + RESULT)
    (note,) = make_batch(tmp_path, grid={"a": [1, 2]}).done_otherwise()
    assert note.startswith("1 of these runs are done in") and "with other template:" in note
    main(["batch", "plan", str(batch.file), "--folder", str(batch.reports)])
    assert f"note: {note}" in capsys.readouterr().out
    write_template(tmp_path, "x = 1\nprint(b)" + RESULT, PARAMETERS + "b: int = 1\n")
    assert "with other defaults and template:" in make_batch(tmp_path, grid={"a": [1]}).done_otherwise()[0]
    assert not make_batch(tmp_path, grid={"a": [3]}).done_otherwise()


def test_a_batch_whose_file_was_spoilt_can_be_looked_at_and_cancelled(tmp_path, capsys):
    batch = make_batch(tmp_path, grid={"a": [1]}, parameters={"seconds": 60.0})
    runner = command(batch, "run")
    wait_for((batch.folder / "begun.txt").exists)
    spoilt = make_batch(tmp_path, grid={"a": ["one"]})
    words = [str(spoilt.file), "--folder", str(spoilt.reports)]
    assert main(["batch", "status", *words]) == 1
    said = capsys.readouterr().out
    assert "1 runs: 1 running" in said and "grid.a='one': expected int" in said
    assert main(["batch", "cancel", *words]) == 0
    runner.communicate(timeout=30)
    assert run_states.current_state(batch.folder_of(batch.plan.runs[0]))["state"] == "killed"


def test_a_batch_s_folder_may_look_like_a_pattern(finished, tmp_path):
    batch, _ = finished
    for name in ("runs[v2]", "runsv"):  # the pattern fits the second, which must not be read
        shutil.copytree(batch.folder, tmp_path / name / "small")
    pd.DataFrame({"run": [], "state": []}).to_parquet(tmp_path / "runsv" / "small" / "results.parquet")
    connection = open_results(tmp_path / "runs[v2]" / "small")
    assert connection.execute("SELECT count(*) FROM runs").fetchone() == (7,)
    assert connection.execute("SELECT count(DISTINCT run) FROM predictions").fetchone() == (2,)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loads, self.rows, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "data") if name in given] + ["link"] * (tag == "link")
        self.rows += [given["class"]] if tag == "tr" and given.get("class") else []
        self.links += [given["href"]] if tag == "a" and not given["href"].startswith("#") else []


def test_the_page_is_whole_offline_and_shows_failures_first(finished):
    batch, _ = finished
    page, text = _Page(), (batch.folder / "index.html").read_text()
    page.feed(text)
    assert not page.loads and "http" not in text
    assert page.rows == ["failed"] * 4 + ["killed"] + ["done"] * 2
    assert page.links and all((batch.folder / link).exists() for link in page.links)
    assert "125 ± 70.7" in text, "mean and spread over seeds, in per cent"
    assert "no good: 0" in text and "tdlib batch open" in text


def test_equal_failures_are_told_once_with_the_command_that_opens_one(finished):
    batch, _ = finished
    groups = {state["reason"]: names for names, state in batch_reports.failures(batch.states())}
    assert sorted(map(len, groups.values())) == [1, 1, 1, 2]
    done = command(batch, "status")
    text = done.communicate()[0]
    assert done.returncode == 1 and "2 failed: ValueError: no good" in text and "cell 4: if mode ==" in text
    (one,) = [names[0] for reason, names in groups.items() if "no good" in reason]
    assert f"small.yaml {one}" in text
    notebook = batch.open(one)
    injected = [
        c for c in nbformat.read(notebook, 4).cells if "injected-parameters" in c.metadata.get("tags", [])
    ]
    assert 'mode = "raise"' in injected[0].source and str(notebook.parent) in injected[0].source
    with pytest.raises(ConfigError, match="0 runs begin like that"):
        batch.open("zzz")


def test_in_a_notebook_the_table_is_alive(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2]})
    source = (
        "from tdlib.runs.batch import Batch\n"
        f"Batch({str(batch.file)!r}, reports={str(batch.reports)!r}).run();"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (table,) = [out for out in notebook.cells[0].outputs if out.output_type == "display_data"]
    shown = table.data["text/html"]
    assert (
        shown.count("done") == 2 and "queued" not in shown and all(run.id in shown for run in batch.plan.runs)
    )
