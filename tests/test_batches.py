"""Batches of notebooks: what is planned is right, what runs survives whatever happens to it.

Templates here are plain Python and take a second; kernels, workers and runners are real and are really
killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from tdlib.core.paths import ROOT, ConfigError
from tdlib.core.provenance import code_version
from tdlib.runs import report as batch_reports
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch, open_results
from tdlib.runs.engines import GpuLeases, LocalEngine, Resources
from tdlib.runs.plan import RunConfig, check_parameters, expand, plan_batch, read_batch
from tdlib.training.provenance import data_manifest

PARAMETERS = """\
a: int = 1  # of the result
mode: str = "fine"  # fine, or how it ends
seconds: float = 0.0  # that it takes
seed: int = 0  # of the result
runs_dir: str = ""  # results go here
"""
WORK = """\
import json, os, time
from pathlib import Path
home = Path(runs_dir)
with (home.parent.parent / "begun.txt").open("a") as file:
    file.write(f"{home.parent.name}\\n")
time.sleep(seconds)
"""
END = """\
if mode == "raise":
    raise ValueError(f"no good: {seed}")
if mode == "die":
    os.kill(os.getpid(), 9)
if mode == "leave":
    os._exit(3)
if mode == "fill" and not (home.parent.parent / "filled").exists():
    (home.parent.parent / "filled").touch()
    Path(os.environ["TDLIB_TEST_FULL"]).touch()
"""
RESULT = """\
folder = home / f"a{a}-seed{seed}"
folder.mkdir()
gpus = os.environ["CUDA_VISIBLE_DEVICES"]
text = json.dumps({"accuracy": {"val": a / 4 + seed}, "seed": seed, "gpus": gpus})
(folder / "metrics.json").write_text(text[:20] if mode == "half" else text)
if a == 3:
    import pandas
    pandas.DataFrame({"id": ["x", "y"], "score": [3.0, 0.0]}).to_parquet(folder / "predictions.parquet")
"""
# Seen by every process that the tests start. A dependency of a dependency takes a second and a half to
# import, for a check of addresses that no notebook needs; and the disk is full while a file is there.
CUSTOM = {
    "rfc3987_syntax.py": "raise ImportError\n",
    "sitecustomize.py": """\
import errno, os
replace = os.replace
def full(source, target, **options):
    if os.path.exists(os.environ["TDLIB_TEST_FULL"]):
        raise OSError(errno.ENOSPC, "No space left on device")
    return replace(source, target, **options)
os.replace = full
""",
}


@pytest.fixture(autouse=True, scope="session")
def quick(tmp_path_factory):
    home = tmp_path_factory.mktemp("custom")
    for name, text in CUSTOM.items():
        (home / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
        patch.setenv("TDLIB_TEST_FULL", str(home / "full"))
        yield home


@pytest.fixture(autouse=True)
def no_orphans(tmp_path):
    yield
    own = str(tmp_path.resolve())
    left = [p for p in psutil.process_iter() if environment_of(p).get(run_states.MARK, "").startswith(own)]
    assert not left, "processes of a run outlived the test"


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def write_template(folder: Path, result: str = RESULT, parameters: str = PARAMETERS) -> Path:
    new = nbformat.v4.new_code_cell
    cells = [new(parameters, metadata={"tags": ["parameters"]}), new(WORK), new(END), new(result)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Prose"), *cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "template.ipynb")
    return folder / "template.ipynb"


def make_batch(folder: Path, **description) -> Batch:
    folder.mkdir(exist_ok=True)
    if not (folder / "template.ipynb").exists():
        write_template(folder)
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"template": "template.ipynb"} | description))
    return Batch(file, reports=folder / "batches")


def command(batch: Batch, action: str, *more: str) -> subprocess.Popen:
    words = ["batch", action, str(batch.file), *more, "--folder", str(batch.reports)]
    return subprocess.Popen(
        [sys.executable, "-m", "tdlib.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.03)


def states_of(batch: Batch) -> list[str]:
    return [state["state"] for state in batch.states().values()]


def results_of(batch: Batch) -> dict[str, object]:
    """What the runs have written, by place; with the executed notebooks' outputs."""
    found: dict[str, object] = {}
    for path in sorted(batch.folder.glob("*/output/**/*")):
        if path.is_file():
            found[str(path.relative_to(batch.folder))] = path.read_bytes()
    for path in batch.folder.glob("*/notebook.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        found[path.parent.name] = [c.outputs for c in cells if c.cell_type == "code"]
    return found


# Plans.


def test_every_mistake_is_listed_before_anything_starts(tmp_path):
    batch = make_batch(
        tmp_path,
        parametres={}, parameters={"aa": 1, "runs_dir": "here"}, grid={"a": [1, "2"]},
        zip={"seconds": [0.5, 1.0], "seed": [1]}, include=[{"sed": 1}], exclude={"a": 3}, seeds=2, retries=-1,
        resources={"cpus": "many", "memory": "4 elephants", "tme": 3},
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        batch.run()
    for expected in (
        "parametres: unknown key; did you mean 'parameters'?",
        "parameters.aa: unknown parameter of template.ipynb; did you mean 'a'?",
        "runs_dir: is set by the batch", "grid.a='2': expected int", "exclude={'a': 3}: expected a list",
        "different lengths", "include[0].sed: unknown", "did you mean 'seed'?", "seeds and in zip",
        "retries=-1", "resources.cpus='many'", "4 elephants", "resources.tme: unknown; did you mean 'time'?",
    ):  # fmt: skip
        assert expected in str(error.value), expected
    assert not batch.folder.exists()


def test_settings_of_the_training_template_are_checked_too(tmp_path):
    description = {
        "template": "04_distill",
        "parameters": {"data_dir": "data/nowhere", "mass": 1.5, "shotz": 3},
        "grid": {"arm": ["finetune", "clip_dt"], "selector": ["nucleus", "nuclei"]},
        "zip": {"task": ["vcr_qa", "vqa_v2"], "shift": ["prior", "prior"]},
    }
    found = "\n".join(plan_batch(description, "b").problems)
    for expected in (
        "'shots'",
        "data_dir='data/nowhere': there is no",
        "mass=1.5",
        "arm='clip_dt'",
        "nuclei",
    ):
        assert expected in found, expected
    description |= {"parameters": {}, "grid": {"arm": ["finetune"]}}
    assert "shift='prior' does not apply to task='vcr_qa'" in "\n".join(plan_batch(description, "b").problems)


def test_gpus_that_runs_need_must_be_among_their_resources():
    def problems(parameters: dict, gpus: float) -> str:
        description = {"template": "04_distill", "parameters": parameters, "resources": {"gpus": gpus}}
        return "\n".join(plan_batch(description, "b").problems)

    assert "processes=4: each needs a GPU; set resources.gpus to 4" in problems({"processes": 4}, 2)
    assert "precision='fp16' needs a GPU" in problems({"precision": "fp16"}, 0)
    for parameters, gpus in (({"processes": 4}, 4), ({"processes": 4}, 0), ({"precision": "fp16"}, 0.5)):
        assert not problems(parameters, gpus)


def test_splits_that_a_data_set_lacks_are_found_before_anything_starts(world):
    def problems(**parameters) -> str:
        named = {"data_dir": str(world)} | parameters
        return "\n".join(plan_batch({"template": "04_distill", "parameters": named}, "b").problems)

    assert not problems() and not problems(eval_splits=["val", "val_rule_singular", "test"])
    assert not (Path(world) / "val_rule_singular.jsonl").exists(), "nothing is made by looking"
    assert "val_nowhere.jsonl: no such file" in problems(eval_splits=["val", "val_nowhere"])
    assert "training.jsonl: no such file" in problems(train_split="training")
    assert "tdlib data mask" in problems(eval_splits=["val_rmtop1"])
    assert "snli_ve_train.jsonl: no such file" in problems(task="snli_ve")


def test_resources_can_be_others_for_once(tmp_path):
    file = make_batch(tmp_path, grid={"a": [1]}, resources={"cpus": 1, "memory": "2GB"}).file
    here, there = Batch(file), Batch(file, resources={"gpus": 0.25, "memory": "8GB"})
    assert there.plan.resources == Resources(1, 0.25, 2**33) and here.plan.resources == Resources(1, 0, 2**31)
    assert [run.id for run in here.plan.runs] == [run.id for run in there.plan.runs]
    assert "resources.gpu: unknown" in "\n".join(Batch(file, resources={"gpu": 1}).problems)


def write_choice(reports: Path, chosen: list[tuple[dict, dict]], seeds=(100,), name: str = "tune") -> Path:
    entries = [{"where": where, "settings": settings, "mean": 0.5} for where, settings in chosen]
    folder = reports / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"batch": name, "seeds": list(seeds), "chosen": entries})
    (folder / "tuned.json").write_text(text)
    return reports


TUNING = {"template": "04_distill", "grid": {"arm": ["finetune", "clip_td"]}, "seeds": 2, "tuned": "tune"}


@pytest.fixture
def reports_with_tuned(tmp_path) -> Path:
    """What `tdlib batch best tune` would have left: for every task and arm the learning rate of its own."""
    tune = Batch("tune").plan
    rates = {(run.parameters["task"], run.parameters["arm"]): 2.5e-4 for run in tune.runs}
    return write_choice(
        tmp_path,
        [({"task": task, "arm": arm}, {"learning_rate": rate}) for (task, arm), rate in rates.items()],
    )


def test_a_batch_takes_the_settings_chosen_for_each_arm(tmp_path):
    reports = write_choice(
        tmp_path,
        [
            ({"arm": "finetune", "task": "vcr_qa"}, {"learning_rate": 1e-3}),
            ({"arm": "clip_td", "task": "vcr_qa"}, {"learning_rate": 2e-4, "distill_weight": 5.0}),
        ],
    )
    plan = plan_batch(TUNING, "b", reports=reports)
    assert not plan.problems and plan.tuned == ["learning_rate", "distill_weight"]
    for run in plan.runs:
        ours = run.parameters["arm"] == "clip_td"
        assert run.parameters["learning_rate"] == (2e-4 if ours else 1e-3)
        assert run.parameters["distill_weight"] == (5.0 if ours else 1.0)
    before = {run.id for run in plan.runs}
    write_choice(tmp_path, [({"arm": "finetune"}, {"learning_rate": 1e-3}), ({"arm": "clip_td"}, {})])
    after = plan_batch(TUNING, "b", reports=reports)
    assert len(before & {run.id for run in after.runs}) == 2, "another choice makes other runs"
    by_path = plan_batch(TUNING | {"tuned": "tune/tuned.json"}, "b", tmp_path)
    assert [run.id for run in by_path.runs] == [run.id for run in after.runs]
    batch = Batch(TUNING, name="b", reports=reports)
    assert batch._description()["tuned"] == ["learning_rate"]


def test_a_choice_that_does_not_fit_is_found_before_anything_starts(tmp_path):
    def problems(chosen=None, seeds=(100,), **changes) -> str:
        reports = write_choice(tmp_path, chosen, seeds) if chosen is not None else tmp_path / "none"
        return "\n".join(plan_batch(TUNING | changes, "b", tmp_path, reports).problems)

    every = [({"arm": arm}, {"learning_rate": 1e-3}) for arm in ("finetune", "clip_td")]
    assert not problems(every)
    assert "`tdlib batch best NAME` writes it" in problems()
    assert "nothing was chosen for {'arm': 'clip_td'}" in problems(every[:1])
    assert "seeds: [1] were tuned with" in problems(every, seeds=(1, 100))
    for place in ("parameters", "grid"):
        entry = [5e-4] if place == "grid" else 5e-4
        given = {place: TUNING.get(place, {}) | {"learning_rate": entry}}
        assert "learning_rate: is set here and by tuned" in problems(every, **given)
    assert "tuned.learning_rate='much': expected float" in problems([({}, {"learning_rate": "much"})])
    assert "tuned.learning_rat: unknown parameter" in problems([({}, {"learning_rat": 1e-3})])
    assert "learning_rate=-1.0" in problems([({}, {"learning_rate": -1.0})])
    for text in ("{", "[]", '{"chosen": 3, "seeds": []}', '{"chosen": [{"where": {}}], "seeds": []}'):
        (tmp_path / "tune" / "tuned.json").write_text(text)
        found = plan_batch(TUNING, "b", tmp_path, tmp_path).problems
        assert len(found) == 1 and "is not what `tdlib batch best` writes" in found[0], text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks" / "batches").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_batches_that_come_along_are_right(path, reports_with_tuned):
    plan = Batch(path, reports=reports_with_tuned).plan
    assert not plan.problems and plan.runs and not plan.repeated
    assert {"finetune", "clip_td"} <= {run.parameters["arm"] for run in plan.runs}
    for run in plan.runs:
        assert run.parameters["arm"] and set(run.overrides) <= set(RunConfig.model_fields)


def test_a_function_of_the_templates_own_may_be_named(tmp_path):
    template = nbformat.read(ROOT / "notebooks" / "04_distill.ipynb", as_version=4)
    template.cells.append(nbformat.v4.new_code_cell('SELECTORS["mine"] = lambda *given: given'))
    nbformat.write(template, tmp_path / "own.ipynb")
    description = {"template": "own.ipynb", "parameters": {"selector": "mine"}}
    assert not plan_batch(description, "b", tmp_path).problems
    assert plan_batch(description | {"template": "04_distill"}, "b", tmp_path).problems


def test_numbers_of_a_file_are_numbers(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(
        "parameters: {a: 5e-4, b: 1E+3, c: 2.5e-4, d: -1e2, e: 12, f: 1.5, g: e5, h: 5e, i: '1e3'}"
    )
    assert list(read_batch(file)["parameters"].values()) == [
        5e-4, 1000.0, 2.5e-4, -100.0, 12, 1.5, "e5", "5e", "1e3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [(None, "no such batch; there are: small"), ("a: [", "is not YAML"), ("- 1", "expected keys such as")],
)
def test_a_file_that_is_none(tmp_path, source, expected):
    make_batch(tmp_path)
    file = tmp_path / "other.yaml"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ConfigError, match=expected):
        Batch(file)


def test_types_of_parameters(tmp_path):
    template = write_template(tmp_path)
    check_parameters(template, {"a": 2, "seconds": 1, "mode": "x"})
    for wrong in ({"a": 1.5}, {"a": True}, {"mode": 3}, {"seconds": "1"}, {"modus": "x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            check_parameters(template, wrong)


values = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
entry = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.dictionaries(st.sampled_from("ab"), values), rows=st.integers(1, 3), zipped=st.booleans(),
    exclude=st.lists(entry, max_size=2), include=st.lists(entry, max_size=2),
    seeds=st.none() | values, base=st.dictionaries(st.sampled_from("abe"), st.integers(0, 3)),
)  # fmt: skip
def test_expansion(grid, rows, zipped, exclude, include, seeds, base):
    pairs = {"c": list(range(rows)), "d": list(range(rows))} if zipped else {}
    parts = {"grid": grid, "zip": pairs, "exclude": exclude, "include": include, "seeds": seeds}
    runs, repeated = expand(parts | {"parameters": base})
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs), "a run stands there twice"
    sides = 1
    for axis in grid.values():
        sides *= len(axis)
    if zipped:
        sides *= rows
    if include and not grid and not zipped:
        sides = 0
    assert len(runs) + repeated <= (sides + len(include)) * len(seeds or [0])
    if not exclude:
        assert len(runs) + repeated == (sides + len(include)) * len(seeds or [0])
    included = [base | given for given in include]
    for run in runs:
        assert all(name in run for name in base)
        assert ("seed" in run) == (seeds is not None)
        plain = {name: value for name, value in run.items() if name != "seed"}
        if plain not in included:
            assert all(run[name] in axis for name, axis in grid.items())
            assert not zipped or run["c"] == run["d"]
            assert not any(all(run.get(n, ...) == v for n, v in given.items()) for given in exclude)
    assert all(any(given.items() <= run.items() for run in runs) for given in included)
    if seeds and runs:
        order = [run["seed"] for run in runs]
        assert order == sorted(order, key=seeds.index), "one seed after the other"


def test_hours_are_estimated_from_the_runs_most_alike(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2]}, seeds=1)
    assert batch.planned()["expected_seconds"].isna().all()
    for a, seconds in ((1, 100.0), (2, 300.0)):
        folder = batch.reports / "earlier" / f"run{a}"
        folder.mkdir(parents=True)
        known = {"template": "/elsewhere/template.ipynb", "parameters": {"a": a, "mode": "fine", "seed": 9}}
        (folder / "parameters.json").write_text(json.dumps(known))
        run_states.write_state(folder, {"state": "done", "seconds": seconds})
    assert list(batch.planned()["expected_seconds"]) == [100, 300]


# Identity, claims and states.


def test_an_id_changes_with_what_a_result_depends_on_and_with_nothing_else(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("{}\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    parameters = {"a": 1, "data_dir": str(data), "student": str(model), "runs_dir": "x", "interactive": False}
    template = write_template(tmp_path)

    def name(**changed) -> str:
        return run_states.identity(template.read_bytes(), parameters | changed, "runs_dir")["id"]

    first = name()
    assert first == name(runs_dir="y", interactive=True) and first != name(a=2)
    notebook = nbformat.read(template, as_version=4)
    notebook.cells[0].source = "Other prose"
    nbformat.write(notebook, template)
    (data / "notes.txt").write_text("not data")
    assert name() == first
    for change in (
        lambda: (data / "train.jsonl").write_text("{}\n{}\n"),
        lambda: (model / "weights").write_bytes(b"2"),
        lambda: write_template(tmp_path, RESULT + "\n"),
    ):
        before = name()
        change()
        assert name() != before
    assert data_manifest({"data_dir": "", "world_seed": 3})[0][::2] == ["miniworld", 3]
    training = (ROOT / "notebooks" / "04_distill.ipynb").read_bytes()
    code = run_states.identity(training, {})["code"]
    assert code == code_version() and not run_states.identity(template.read_bytes(), {})["code"]


def test_a_claim_is_exclusive_and_ends_with_its_owner(tmp_path):
    lock = run_states.claim(tmp_path / "run")
    assert lock is not None and run_states.claim(tmp_path / "run") is None
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    os.close(lock)
    with run_states.claimed(tmp_path / "run") as free:
        assert not free, "a worker inherits its runner's claim"
    heir.kill()
    heir.wait()
    with run_states.claimed(tmp_path / "run") as free:
        assert free


def test_states_that_cannot_be_true_are_lost(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "metrics.json").write_text("{}")
    assert run_states.current_state(tmp_path)["state"] == "queued"
    run_states.write_state(tmp_path, {"state": "running", "host": run_states.socket.gethostname()})
    assert run_states.current_state(tmp_path)["state"] == "lost"
    lock = run_states.claim(tmp_path)
    assert run_states.current_state(tmp_path)["state"] == "running"
    os.close(lock)
    elsewhere = {"state": "running", "host": "another", "heartbeat": time.time()}
    run_states.write_state(tmp_path, elsewhere)
    assert run_states.current_state(tmp_path)["state"] == "running"
    run_states.write_state(tmp_path, elsewhere | {"heartbeat": time.time() - 2 * run_states.STALE})
    assert run_states.current_state(tmp_path)["state"] == "lost"
    run_states.write_state(tmp_path, {"state": "done", "files": run_states.file_sizes(tmp_path)})
    assert run_states.current_state(tmp_path)["state"] == "done"
    whole = (tmp_path / "state.json").read_bytes()
    (tmp_path / "output" / "metrics.json").write_text("{")
    assert "metrics.json has 1 bytes" in run_states.current_state(tmp_path)["reason"]
    for broken in (whole[: len(whole) // 2], b"", b"3", b'{"state": "great"}'):
        (tmp_path / "state.json").write_bytes(broken)
        assert run_states.current_state(tmp_path)["state"] == "lost"


def test_gpus_are_leased_in_parts_and_against_other_runners(tmp_path):
    first, second = GpuLeases(["0", "1"], tmp_path), GpuLeases(["0", "1"], tmp_path)
    assert first.take(0) == []
    assert first.take(0.5) == first.take(0.5) == ["0"], "a GPU is filled before another is opened"
    assert second.take(0.3) == ["1"] and first.take(0.5) is None and first.take(2) is None
    second.give_back(["1"], 0.3)
    assert first.take(1) == ["1"] and second.take(0.1) is None
    first.give_back(["0"], 0.5)
    assert first.take(0.6) is None and first.take(0.5) == ["0"]


def test_resources_that_are_not_there_are_a_mistake(tmp_path):
    batch = make_batch(tmp_path, resources={"cpus": 2, "gpus": 1, "memory": "900TB", "time": "1.5h"})
    assert batch.plan.resources == Resources(2, 1, 900 * 2**40, 5400)
    with pytest.raises(ConfigError) as error:
        batch.run(LocalEngine(cpus=1, gpus=[]))
    assert all(f"resources.{name}" in str(error.value) for name in ("cpus", "gpus", "memory"))
    engine = LocalEngine(cpus=8, gpus=["0", "1"])
    assert engine.at_once(Resources(2)) == 4 and engine.at_once(Resources(1, gpus=0.25)) == 8
    assert engine.at_once(Resources(1, gpus=2)) == 1


# Runs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
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


def by_run(batch: Batch):
    states = batch.states()
    return [(run, states[run.id]) for run in batch.plan.runs]


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


def test_what_is_done_is_not_repeated_and_what_changed_is_not_reused(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1]})
    batch.run()
    (first,) = batch.plan.runs
    (state,) = batch.states().values()
    assert state["state"] == "done"
    before = results_of(batch)
    again = make_batch(tmp_path, grid={"a": [1]})
    assert list(again.run()["attempt"]) == list(again.resume()["attempt"]) == [1]
    assert again.states()[first.id]["started"] == state["started"]
    # a changed parameter and a changed template are other runs
    assert states_of(make_batch(tmp_path, grid={"a": [1, 2]})) == ["done", "queued"]
    write_template(tmp_path, RESULT.replace("a / 4", "a / 2"))
    changed = make_batch(tmp_path, grid={"a": [1]})
    assert states_of(changed) == ["queued"]
    assert list(changed.run()["accuracy.val"]) == [0.5]
    assert results_of(batch).items() > before.items(), "the older run is as it was"
    # a result that was truncated later is made again, and is the same
    metrics = batch.folder / first.id / "output" / "a1-seed0" / "metrics.json"
    metrics.write_text(metrics.read_text()[:10])
    assert states_of(batch) == ["lost"] and "accuracy.val" not in batch.table()
    write_template(tmp_path)
    assert list(batch.resume()["attempt"]) == [2]
    assert before.items() <= results_of(batch).items()
    assert (batch.folder / first.id / "attempt-1" / "state.json").is_file()


def test_the_same_run_of_another_batch_is_taken_over_if_it_is_whole(tmp_path):
    first = make_batch(tmp_path, grid={"a": [1, 2, 3]}, name="first")
    first.run()
    one, two, three = first.plan.runs
    damaged = first.folder / one.id / "output" / "a1-seed0" / "metrics.json"
    damaged.write_text(damaged.read_text()[:10])
    second = make_batch(tmp_path, grid={"a": [1, 2, 4]}, name="second")
    second.run()
    assert states_of(second) == ["done"] * 3
    begun = (second.folder / "begun.txt").read_text().split()
    assert sorted(begun) == sorted(run.id for run in second.plan.runs if run.id != two.id)
    assert second.states()[two.id]["adopted_from"] == str(first.folder / two.id)
    taken = {name: value for name, value in results_of(second).items() if name.startswith(two.id)}
    assert taken.items() <= results_of(first).items() and len(taken) == 2
    assert not (second.folder / three.id).exists()


def test_a_part_of_a_batch_can_be_run_by_itself(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2, 4]}, seeds=[0, 5])
    assert command(batch, "run", "-w", "a", "[1, 4]", "-w", "seed", "5").wait(120) == 1, "not all are done"
    done = [run.overrides for run in batch.plan.runs if batch.states()[run.id]["state"] == "done"]
    assert done == [{"seed": 5, "a": 1}, {"seed": 5, "a": 4}]
    with pytest.raises(ConfigError, match=r"\{'a': 3\}: no run of small is like that"):
        batch.run(where={"a": 3})


def test_a_template_that_changes_between_plan_and_start_is_noticed(tmp_path):
    batch = make_batch(tmp_path)
    write_template(tmp_path, "pass")
    table = batch.run()
    assert table["state"][0] == "failed" and "template changed since" in table["reason"][0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, quick):
    batch = make_batch(tmp_path_factory.mktemp("undisturbed"), grid={"a": [2]}, parameters={"seconds": 0.7})
    batch.run()
    return results_of(batch)


def running(batch: Batch, cell: bool) -> Callable[[], bool]:
    """Whether the batch's run has begun; whether its kernel is in a cell."""
    if cell:
        return (batch.folder / "begun.txt").exists
    return lambda: run_states.recorded_state(batch.folder_of(batch.plan.runs[0]))["state"] == "running"


@pytest.mark.parametrize(
    ("victim", "cell"),
    [
        ("runner", False), ("worker", False), ("runner and worker", False),
        ("runner", True), ("worker", True), ("kernel", True), ("runner and worker", True),
    ],
)  # fmt: skip
def test_whoever_is_killed_the_run_is_made_once_and_is_the_same(tmp_path, undisturbed, victim, cell):
    batch = make_batch(tmp_path, grid={"a": [2]}, parameters={"seconds": 0.7})
    (run,) = batch.plan.runs
    runner = command(batch, "run")
    wait_for(running(batch, cell))
    worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
    victims = {"runner": [psutil.Process(runner.pid)], "worker": [worker], "kernel": worker.children()}
    for process in [p for name in victim.split(" and ") for p in victims[name]]:
        process.kill()
    runner.communicate()
    wait_for(lambda: not run_states.processes(batch.folder_of(run)), 15)
    assert states_of(batch)[0] in (["lost"] if victim == "runner and worker" else ["killed"])
    assert list(batch.run()["state"]) != ["done"], "only resume goes on with what was killed"
    assert list(batch.resume()["state"]) == ["done"]
    assert results_of(batch) == undisturbed
    assert batch.states()[run.id]["attempt"] == 2


@pytest.fixture(scope="module")
def training(world, teacher_folder, student_folder):
    """Parameters of the template that trains: 40 updates, a checkpoint after each."""
    return {
        "data_dir": str(world), "teacher": f"local-dir:{teacher_folder}", "student": str(student_folder),
        "shots": 0.5, "epochs": 20, "batch_size": 10, "selector": "sample", "shift": "",
        "probe_examples": 1, "checkpoint_every": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory, quick):
    batch = make_batch(tmp_path_factory.mktemp("trained"), template="04_distill", parameters=training)
    batch.run()
    return output_of(batch)


def output_of(batch: Batch) -> Path:
    (run,) = batch.plan.runs
    return batch.folder_of(run) / "output" / "clip_td-seed0"


@pytest.mark.parametrize("victim", ["runner", "kernel", "runner and worker and kernel"])
def test_a_training_that_is_killed_in_a_batch_goes_on_from_its_checkpoint(
    tmp_path, training, trained, victim
):
    batch = make_batch(tmp_path, template="04_distill", parameters=training)
    (run,) = batch.plan.runs
    runner = command(batch, "run")
    wait_for(lambda: list(output_of(batch).parent.glob(".checkpoints/*/step-*")), 120)
    worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
    victims = {"runner": [psutil.Process(runner.pid)], "worker": [worker], "kernel": worker.children()}
    for process in [p for name in victim.split(" and ") for p in victims[name]]:
        process.kill()
    runner.communicate()
    wait_for(lambda: not run_states.processes(batch.folder_of(run)), 15)
    assert not output_of(batch).exists()
    assert list(batch.resume()["state"]) == ["done"]
    around = json.loads((output_of(batch) / "environment.json").read_text())
    assert 0 < around["resumed_after_updates"][0] < 40
    for name in ("student/model.safetensors", "history.jsonl", "manifest.json"):
        assert (output_of(batch) / name).read_bytes() == (trained / name).read_bytes(), name
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(output_of(batch) / name), pd.read_parquet(trained / name), check_exact=True
        )


def test_a_full_disk_harms_nothing_that_is_written(tmp_path, quick):
    batch = make_batch(tmp_path, include=[{"a": 2}, {"mode": "fill"}, {"a": 4}])
    runner = command(batch, "run", "--cpus", "1")
    text = runner.communicate()[0]
    assert runner.returncode == 1 and "No space left" in text
    assert states_of(batch) == ["done", "lost", "queued"]
    before = results_of(batch)
    (quick / "full").unlink()
    assert list(batch.resume(cpus=1)["state"]) == ["done"] * 3
    assert before.items() <= results_of(batch).items()
    begun = (batch.folder / "begun.txt").read_text().split()
    assert [begun.count(run.id) for run in batch.plan.runs] == [1, 2, 1]


def test_two_runners_execute_each_run_once(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2, 3]}, parameters={"seconds": 0.3})
    runners = [command(batch, "run", "--cpus", "1") for _ in range(2)]
    texts = [runner.communicate()[0] for runner in runners]
    assert states_of(batch) == ["done"] * 3, texts
    begun = (batch.folder / "begun.txt").read_text().split()
    assert sorted(begun) == sorted(run.id for run in batch.plan.runs), texts


def test_a_time_limit_ends_a_run(tmp_path):
    batch = make_batch(tmp_path, parameters={"seconds": 600.0}, resources={"time": "3s"}, retries=1)
    batch.run()
    (state,) = batch.states().values()
    assert (state["state"], state["attempt"]) == ("timed_out", 1) and "3 s" in state["reason"]
    assert list(batch.resume()["attempt"]) == [1], "resume leaves it, retry would not"


def test_retries_repeat_what_was_killed_but_not_what_failed(tmp_path):
    batch = make_batch(tmp_path, include=[{"mode": "die"}, {"mode": "raise"}], retries=1)
    batch.run(cpus=2)
    assert [(state["state"], state["attempt"]) for state in batch.states().values()] == [
        ("killed", 2), ("failed", 1),
    ]  # fmt: skip


def test_a_run_that_failed_is_tried_again_on_request(tmp_path):
    batch = make_batch(tmp_path, parameters={"mode": "raise"})
    (run,) = batch.plan.runs
    batch.folder_of(run).mkdir(parents=True)
    run_states.write_state(batch.folder_of(run), {"state": "failed", "attempt": 1})
    assert list(batch.resume()["attempt"]) == list(batch.run()["attempt"]) == [1]
    batch.retry()
    (state,) = batch.states().values()
    assert (state["state"], state["attempt"]) == ("failed", 2)
    with pytest.raises(ConfigError, match="no such run"):
        batch.retry(["zzz"])


@pytest.mark.parametrize("how", ["cancel", "twice", "once"])
def test_cancel_and_ctrl_c_leave_nothing_behind(tmp_path, how):
    batch = make_batch(tmp_path, grid={"a": [1, 2]}, parameters={"seconds": 60.0})
    runner = command(batch, "run", "--cpus", "1")
    wait_for((batch.folder / "begun.txt").exists)
    if how == "cancel":
        assert batch.cancel() == []
    else:
        runner.send_signal(signal.SIGINT)
        if how == "twice":
            time.sleep(0.1)
            runner.send_signal(signal.SIGINT)
    text = runner.communicate(timeout=30)[0]
    assert runner.returncode == 1 and "Traceback" not in text, text
    assert states_of(batch) == ["killed", "queued"]
    assert not any(run_states.processes(batch.folder_of(run)) for run in batch.plan.runs)


def test_a_batch_without_a_file(tmp_path):
    template = write_template(tmp_path)
    batch = Batch({"template": str(template), "seeds": [5]}, "mine", reports=tmp_path / "batches")
    assert batch.folder.name == "mine" and list(batch.planned()["state"]) == ["queued"]


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


# A cluster.

ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")


def test_without_ray_its_engine_says_what_to_install(tmp_path):
    if find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(ConfigError, match=r"clip-td-workbench\[ray\]"):
        make_batch(tmp_path).run("ray")


@ray
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("victim", ["task", "worker", "kernel", "task and worker and kernel"])
def test_whoever_is_killed_on_ray_the_run_is_made_once(tmp_path, undisturbed, victim, cell):
    batch = make_batch(tmp_path, grid={"a": [2]}, parameters={"seconds": 0.7}, retries=1)
    (run,) = batch.plan.runs

    killed = []

    def kill() -> None:
        wait_for(running(batch, cell))
        worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
        victims = {"task": [worker.parent()], "worker": [worker], "kernel": worker.children()}
        for process in [p for name in victim.split(" and ") for p in victims[name]]:
            process.kill()
            killed.append(process)

    thread = Thread(target=kill)
    thread.start()
    table = batch.run("ray", num_cpus=1)
    thread.join()
    assert list(table["state"]) == ["done"] and results_of(batch) == undisturbed
    if cell or victim != "kernel":  # else its kernel may not have been there yet
        assert killed and list(table["attempt"]) == [2]


@ray
def test_a_batch_survives_the_loss_of_a_node(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # its nodes say that they have one
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        batch = make_batch(
            tmp_path, grid={"a": [1, 2, 3]}, parameters={"seconds": 3.0}, retries=2,
            resources={"cpus": 1, "gpus": 1},
        )  # fmt: skip

        def lose() -> None:
            wait_for(lambda: states_of(batch).count("running") == 2)
            cluster.remove_node(node, allow_graceful=False)

        thread = Thread(target=lose)
        thread.start()
        table = batch.run("ray", address=cluster.address)
        thread.join()
        assert list(table["state"]) == ["done"] * 3
        assert set(table["gpus"]) == {"0"} and max(table["attempt"]) == 2
    finally:
        cluster.shutdown()
