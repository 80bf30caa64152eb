"""Batches of notebooks: what is planned is right, what runs survives whatever happens to it.

Templates here are plain Python and take a second; kernels, workers and runners are real and are really
killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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

from tdlib.arms import ARMS
from tdlib.config import apply_arm
from tdlib.core import provenance
from tdlib.core.paths import ROOT, ConfigError
from tdlib.core.provenance import code_version, executed_code
from tdlib.runs import report as batch_reports
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch
from tdlib.runs.checks import RunConfig, check_parameters, differences
from tdlib.runs.engines import GpuLeases, LocalEngine, Resources
from tdlib.runs.plan import PlannedRun, expand, plan_batch, read_batch
from tdlib.runs.report import open_results
from tdlib.runs.template import UNKNOWN, declared_in, read_template
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
# Seen by every process that the tests start: the disk is full while a file is there.
FULL = """\
import errno, os
replace = os.replace
def full(source, target, **options):
    if os.path.exists(os.environ["TDLIB_TEST_FULL"]):
        raise OSError(errno.ENOSPC, "No space left on device")
    return replace(source, target, **options)
os.replace = full
"""


@pytest.fixture(autouse=True, scope="module")
def quick(quick_start):
    (quick_start / "sitecustomize.py").write_text(FULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDLIB_TEST_FULL", str(quick_start / "full"))
        yield quick_start
    (quick_start / "sitecustomize.py").unlink()


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


def wait_until_left(batch: Batch, run: PlannedRun) -> None:
    """Waits until nobody has the run: a dying process loses its environment, by which it is known, first."""
    folder = batch.folder_of(run)
    wait_for(lambda: not run_states.processes(folder), 15)
    wait_for(lambda: run_states.current_state(folder)["state"] != "running", 15)


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
    arms = ("finetune", "naive", "clip_td", "clip_td_repaired")
    write_choice(tmp_path, [({"arm": arm}, {"epochs": 16}) for arm in arms], name="repair_tune")
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
    assert "finetune" in {run.parameters["arm"] for run in plan.runs}
    for run in plan.runs:
        assert run.parameters["arm"] and set(run.overrides) <= set(RunConfig.model_fields)


def training_template(folder: Path, own: str, name: str = "own.ipynb") -> Path:
    """The training template with a cell of one's own behind the parameters."""
    template = nbformat.read(ROOT / "notebooks" / "04_distill.ipynb", as_version=4)
    (place,) = [n for n, cell in enumerate(template.cells) if cell.source == "# your own functions"]
    template.cells[place].source = own
    nbformat.write(template, folder / name)
    return folder / name


OWN_SELECTOR = """\
from tdlib.method.selection import SELECTORS

def above_mean(scores, valid, options, generator=None):
    mean = (scores * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return valid & (scores > mean)

SELECTORS["above_mean"] = above_mean
"""


def test_a_function_that_the_template_registers_may_be_named(tmp_path):
    training_template(tmp_path, OWN_SELECTOR)
    description = {"template": "own.ipynb", "grid": {"selector": ["nucleus", "above_mean"]}}
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and not plan.notes and len(plan.runs) == 2
    # its prose shows the recipe, but no cell of the template itself registers anything
    elsewhere = {"template": "04_distill", "parameters": {"selector": "best_three"}}
    (problem,) = plan_batch(elsewhere, "b").problems
    assert problem.startswith("selector='best_three': expected one of nucleus, ")


@pytest.mark.parametrize(
    "own",
    ["SELECTORS.update(mine=f)", "for f in (mine,):\n    SELECTORS[f.__name__] = f", "SELECTORS |= found"],
)
def test_a_function_that_code_may_register_is_a_note(tmp_path, own):
    training_template(tmp_path, f"from tdlib.method.selection import SELECTORS\n{own}")
    plan = plan_batch({"template": "own.ipynb", "parameters": {"selector": "mine"}}, "b", tmp_path)
    assert not plan.problems and len(plan.notes) == 1 and plan.notes[0].startswith("selector='mine': nothing")
    assert plan_batch({"template": "own.ipynb", "parameters": {"prior": "mine"}}, "b", tmp_path).problems


def test_an_arm_that_the_template_registers_may_be_named(tmp_path):
    training_template(
        tmp_path, 'from tdlib.arms import ARMS\nARMS["mine"] = {"selector": "first", "mass": 2.0}'
    )
    problems = plan_batch({"template": "own.ipynb", "parameters": {"arm": "mine"}}, "b", tmp_path).problems
    assert len(problems) == 1 and problems[0].startswith("mass=2.0"), "its settings are checked"


def test_a_cell_that_overrides_what_is_planned_is_found_before_anything_starts(tmp_path):
    training_template(tmp_path, OWN_SELECTOR + 'selector = "above_mean"\n')
    description = {"template": "own.ipynb", "grid": {"selector": ["nucleus", "above_mean"]}}
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("selector='nucleus': a cell of own.ipynb sets selector = 'above_mean'")
    assert "(1 of 2 runs)" in problem
    description |= {"grid": {"selector": ["above_mean"]}}
    assert not plan_batch(description, "b", tmp_path).problems


def test_a_parameter_that_nothing_reads_is_found(tmp_path):
    path = training_template(tmp_path, "")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source += "\nlr: float = 1e-3  # of nothing"
    nbformat.write(notebook, path)
    (problem,) = plan_batch({"template": "own.ipynb", "parameters": {"lr": 0.1}}, "b", tmp_path).problems
    assert problem.startswith("lr=0.1: nothing in own.ipynb reads this parameter")


# What a run would have written: selector and mass as a cell has set them, whatever was planned.
CONFIG = """\
from tdlib.config import RunConfig, apply_arm
import json
from pathlib import Path
{own}
config = apply_arm(RunConfig.from_notebook(globals()))
folder = Path(runs_dir) / "run"
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps(config.model_dump()))
(folder / "metrics.json").write_text("{{}}")
(folder / "student").mkdir()
(folder / "student" / "config.json").write_text('{{"hidden_size": 3, "selector": "none"}}')
"""
SETTINGS = """\
arm: str = "clip_td"  # an arm
selector: str = "nucleus"  # a selector
mass: float = 0.6  # of the nucleus
shots: float = 48  # examples
runs_dir: str = ""  # results go here
"""


def config_template(folder: Path, own: str) -> Path:
    new = nbformat.v4.new_code_cell
    cells = [new(SETTINGS, metadata={"tags": ["parameters"]}), new(CONFIG.format(own=own))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "template.ipynb")
    return folder / "template.ipynb"


def test_a_run_that_was_not_run_as_planned_has_failed(tmp_path):
    config_template(tmp_path, 'if selector == "nucleus":\n    selector, mass = "top_k", mass + 0.1')
    batch = make_batch(tmp_path, grid={"selector": ["nucleus", "first"]}, parameters={"shots": 24.0})
    batch.run()
    (changed, state), (kept, other) = by_run(batch)
    assert (changed.overrides["selector"], kept.overrides["selector"]) == ("nucleus", "first")
    assert (state["state"], other["state"]) == ("failed", "done"), state
    assert "selector: planned 'nucleus', run with 'top_k'" in state["reason"]
    assert "mass: planned 0.6, run with 0.7" in state["reason"] and "arm:" not in state["reason"]


def test_settings_of_an_arm_are_as_planned(tmp_path):
    template = read_template(config_template(tmp_path, ""))
    planned = template.defaults | {"arm": "naive"}
    for arm, selector, expected in (
        ("naive", "all", []),
        ("naive", "nucleus", ["selector: planned 'all', run with 'nucleus'"]),
        ("clip_td", "nucleus", ["arm: planned 'naive', run with 'clip_td'"]),
    ):
        ran = RunConfig(arm=arm).model_dump() | ARMS[arm] | {"selector": selector}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps(ran))
        found = differences(template, planned, tmp_path / "run")
        assert [line.partition(" (")[0] for line in found] == expected
    assert differences(template, planned, tmp_path / "run", since=time.time() + 60) == []
    (tmp_path / "run" / "config.json").write_text('{"arm": ')
    assert "is not whole JSON" in differences(template, planned, tmp_path / "run")[0]


def test_a_batch_tunes_the_weight_that_an_arm_starts_at(tmp_path):
    template = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    description = {
        "template": "04_distill", "parameters": {"repair_share": 0.5},
        "grid": {"arm": ["clip_td_repaired"], "repair_weight": [1.0, 3.0, 10.0]},
    }  # fmt: skip
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and not plan.notes
    assert len({run.id for run in plan.runs}) == 3 and plan.varied == ["repair_weight"]
    file = tmp_path / "config.json"
    for run in plan.runs:
        settings = {n: v for n, v in run.parameters.items() if n in template.settings}
        config = apply_arm(RunConfig.from_parameters(**settings))
        assert (config.repair_weight, config.repair_share) == (run.overrides["repair_weight"], 0.5)
        file.write_text(config.model_dump_json())
        assert differences(template, run.parameters, tmp_path) == []
        file.write_text(config.model_copy(update={"repair_weight": 7.0}).model_dump_json())
        assert len(differences(template, run.parameters, tmp_path)) == 1


def test_values_that_arms_replace_are_told_and_make_no_second_run(tmp_path):
    description = {
        "template": "04_distill",
        "grid": {"arm": ["finetune", "clip_td_repaired"], "repair_weight": [1.0, 10.0]},
    }
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("repair_weight=1.0, 10.0: arm='finetune' sets") and "(2 of 4 runs)" in problem
    description["exclude"] = [{"arm": "finetune", "repair_weight": 10.0}]
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and len(plan.runs) == 3
    (note,) = plan.notes
    assert note.startswith("repair_weight=1.0: has no effect, because arm='finetune' sets")
    usual = {"template": "04_distill", "grid": {"arm": ["clip_td_repaired"], "repair_weight": [0.0, 3.0]}}
    (problem,) = plan_batch(usual, "b", tmp_path).problems
    assert problem.startswith("repair_weight=0.0, 3.0: arm='clip_td_repaired'"), "0 is the arm's own, 3"


def test_every_arm_of_the_tuning_batches_has_as_many_settings():
    for name in ("tune", "repair_tune"):
        plan = plan_batch(read_batch(ROOT / f"notebooks/batches/{name}.yaml"), name)
        assert not plan.problems
        assert len(set(Counter(run.parameters["arm"] for run in plan.runs).values())) == 1


def test_variants_are_parameters(tmp_path):
    description = {
        "template": "04_distill",
        "parameters": {"arm": "repair_only"},
        "variants": ["repair_shar"],
    }
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("variants: repair_shar: unknown") and "repair_share" in problem


def test_a_variable_that_has_a_parameter_s_name_is_not_a_setting(tmp_path):
    """05_tokens calls the modality of its views so, whose values a run's modality does not have."""
    tokens = read_template(ROOT / "notebooks" / "05_tokens.ipynb")
    assert tokens.builds_config and "modality" not in tokens.settings
    check_parameters(tokens, {"modality": "visual", "example": "1500000", "runs": ["reports/runs/tok*"]})
    assert "modality" in read_template(ROOT / "notebooks" / "04_distill.ipynb").settings


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("00_start_here", {"arms": ["finetune", "clip_dt"]}, "arm='clip_dt': expected one of"),
        ("00_start_here", {"seeds": [0, -1]}, "seed=-1"),
        ("02_data", {"tasks": ["vcr", "snli"]}, "did you mean 'snli_ve'?"),
        ("03_students", {"students": ["data/models/mini-vlt"]}, "did you mean 'data/models/mini-vilt'?"),
        ("04_distill", {"arm": "clip_dt"}, "did you mean 'clip_td'?"),
        ("04_distill", {"task": "vcr_q"}, "did you mean 'vcr_qa'?"),
        ("04_distill", {"student": "data/models/mini-vlt"}, "there is no"),
        ("04_distill", {"student": "mini-vilt"}, "did you mean 'data/models/mini-vilt'?"),
        ("04_distill", {"student": "reports/runs/nothing/student"}, "there is no"),
        ("04_distill", {"teacher": "ViT-B16"}, "open_clip knows no model of that name; did you mean 'ViT-B"),
        ("04_distill", {"teacher": "data/models/mini-clip"}, "'local-dir:data/models/mini-clip'"),
        ("04_distill", {"teacher": "local-dir:data/models/mini-clp"}, "did you mean 'local-dir:data/models/"),
        ("04_distill", {"regions": "boxes:data/models/mini-detectr"}, "did you mean 'boxes:data/models/"),
        ("04_distill", {"data_dir": "nowhere"}, "there is no"),
        ("04_distill", {"shift": "prior"}, "does not apply to task='vcr_qa'"),
        ("04_distill", {"shots": 1.0}, "Write 1 for one, 0 for all"),
        ("06_targeting", {"relevances": ["valu"]}, "did you mean 'value'?"),
    ],
)
def test_what_only_a_kernel_used_to_find_is_found_before_it_starts(name, given, expected):
    template = read_template(ROOT / "notebooks" / f"{name}.ipynb")
    with pytest.raises(ConfigError) as error:
        check_parameters(template, given)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"teacher": "ViT-B-16", "teacher_pretrained": "openai"}, {"teacher": "ViT-B/32"},
        {"teacher": "hf-hub:laion/CLIP-ViT-B-32"}, {"student": "dandelin/vilt-b32-mlm"},
        {"student": "teacher"}, {"regions": "clip"}, {"shots": 0.1}, {"shots": 24.0},
        {"relevance": "entropy"}, {"eval_splits": ["val", "val_style"]},
    ],
)  # fmt: skip
def test_what_is_right_passes(given):
    assert check_parameters(read_template(ROOT / "notebooks" / "04_distill.ipynb"), given) == []


def test_parameters_may_be_arithmetic_unannotated_and_beside_other_code():
    declared = declared_in(
        "import os\n%load_ext autoreload\n!ls\n"
        'a: int = 2 * 3  # of a\nhome = os.environ["HOME"]\nseed = 3\nrates = [1e-3, 2 ** -10]\n'
        'where: str = os.environ["DATA"]  # a folder\nnothing: int\nbad = 1 / 0\n'
    )
    assert list(declared) == ["a", "home", "seed", "rates", "where", "bad"]
    assert declared["a"].default == 6 and declared["a"].comment == "of a"
    assert declared["seed"].kind == "int" and declared["rates"].default == [1e-3, 2**-10]
    assert declared["home"].default is declared["where"].default is declared["bad"].default is UNKNOWN
    assert (
        declared["where"].problem(3)
        and not declared["where"].problem("x")
        and not declared["home"].problem(3)
    )


def test_a_default_that_only_a_kernel_can_tell_is_set_by_the_batch(tmp_path):
    parameters = PARAMETERS + 'import os\nhome = os.environ["HOME"]\n'
    write_template(tmp_path, "print(home)\n" + RESULT, parameters)
    (problem,) = make_batch(tmp_path).problems
    assert problem.startswith("home: its default, os.environ['HOME'], can be told only by a kernel")
    assert not make_batch(tmp_path, parameters={"home": str(tmp_path)}).problems


def test_a_cell_of_parameters_that_is_no_python_names_its_line(tmp_path):
    write_template(tmp_path, parameters="a: int = 1\nseed: int = = 3\n")
    (problem,) = make_batch(tmp_path).problems
    assert "line 2: invalid syntax: seed: int = = 3" in problem


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mode", "1500000", "1500000"), ("mode", "null", "null"), ("mode", '"x"', "x"),
        ("mode", "1e3", "1e3"),
        ("mode", "[1]", "[1]"), ("a", "3", 3), ("seconds", "5e-1", 0.5), ("a", "010", "010"), ("a", "x", "x"),
        ("other", "3", 3),
        ("other", "[finetune, clip_td]", ["finetune", "clip_td"]), ("other", "[a, 2]", ["a", 2]),
        ("other", "[a, [b]]", "[a, [b]]"),
    ],
)  # fmt: skip
def test_values_of_the_command_line_have_the_parameter_s_type(tmp_path, name, text, value):
    found = read_template(write_template(tmp_path)).from_text(name, text)
    assert found == value and type(found) is type(value)


def test_truth_may_be_spelt_as_python_does():
    template = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    assert [template.from_text("submission", text) for text in ("true", "True", "no")] == [True, True, "no"]
    with pytest.raises(ConfigError, match="eval_splits: 'a' stands 2 times in one object"):
        template.from_text("eval_splits", '[{"a": 1, "a": 2}]')


def test_numbers_of_a_file_are_numbers(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(
        "parameters: {a: 5e-4, b: 1E+3, c: 2.5e-4, d: -1e2, e: 12, f: 1.5, g: e5, h: 5e, i: '1e3'}"
    )
    assert list(read_batch(file)["parameters"].values()) == [
        5e-4, 1000.0, 2.5e-4, -100.0, 12, 1.5, "e5", "5e", "1e3",
    ]  # fmt: skip


def test_a_file_is_read_as_yaml_1_2(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(
        "parameters:\n  [no, yes, on, Off, y, 1:30, 2026-01-02, 1_000, 0o17, 0x1F, true, False, ~, null, "
        ".inf, -.5, +3, '010', 190:20:30]\n"
    )
    assert read_batch(file)["parameters"] == [
        "no", "yes", "on", "Off", "y", "1:30", "2026-01-02", "1_000", 15, 31, True, False, None, None,
        float("inf"), -0.5, 3, "010", "190:20:30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grid: {a: [1]}\nseeds: 2\ngrid: {mode: [x]}\n", "b.yaml:3: 'grid' stands here and in line 1"),
        ("parameters:\n  a: 1\n  mode: x\n  a: 2\n", "b.yaml:4: 'a' stands here and in line 2"),
        ("include:\n  - {a: 1,\n     a: 1}\n", "b.yaml:3: 'a' stands here and in line 2"),
        ("parameters:\n  epochs: 010\n", "b.yaml:2: 010: a number with a leading zero; write 10, or '010'"),
        ("grid: {a: [1, -007]}\n", "b.yaml:1: -007: a number with a leading zero"),
    ],
)
def test_what_a_file_says_twice_or_in_two_ways_is_refused_with_its_line(tmp_path, text, expected):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_batch(tmp_path / "b.yaml")
    assert expected in str(error.value)


def test_parts_of_a_file_may_be_shared_by_an_anchor(tmp_path):
    (tmp_path / "b.yaml").write_text("parameters: &base {a: 1}\ninclude:\n  - {<<: *base, a: 2, mode: x}\n")
    assert read_batch(tmp_path / "b.yaml")["include"] == [{"a": 2, "mode": "x"}]


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
    template = read_template(write_template(tmp_path))
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


SOURCE = '"""Of a module."""\nimport math\n\n\ndef f(x):\n    """Doubles."""\n    return 2 * x  # why\n'


def test_the_code_of_an_id_is_what_is_executed():
    same = ['import math\ndef f(x):\n    """Twice."""\n\n    # another reason\n    return (2 *\n  x)']
    other = [SOURCE.replace("2 * x", "3 * x"), SOURCE.replace("import math", "")]
    other.append(SOURCE.replace("2 * x", '"2 * x"'))
    assert all(executed_code(text) == executed_code(SOURCE) for text in same)
    assert len({executed_code(text) for text in [SOURCE, *other]}) == 4


def test_an_id_depends_on_the_packages_that_can_change_a_result(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tdlib", tmp_path / "tdlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tdlib" / "core" / "provenance.py"))
    before = provenance.code_version()
    packages = {path.parent.name for path in (ROOT / "tdlib").glob("*/__init__.py")}
    assert packages >= set(provenance.RESULT_PACKAGES) and {"views", "analysis", "runs", "make"} <= packages
    files = [f"{package}/__init__.py" for package in sorted(packages)]
    for file in [*files, "cli.py", "config.py", "arms.py", *provenance.NO_RESULT]:
        with (tmp_path / "tdlib" / file).open("a") as source:
            source.write("\nCHANGED = 1\n")
        matters = file.partition("/")[0].removesuffix(".py") in (
            *provenance.RESULT_PACKAGES,
            "config",
            "arms",
        )
        after = provenance.code_version()
        assert (after != before) == (matters and file not in provenance.NO_RESULT), file
        before = after


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
    batch = make_batch(tmp_path, grid={"a": [1, 2, 4]}, parameters={"mode": "150"}, seeds=[0, 5])
    like = ["-w", "a", "[1, 4]", "-w", "seed", "5", "-w", "mode", "150"]
    assert command(batch, "run", *like).wait(120) == 1, "not all are done"
    done = [run.overrides for run in batch.plan.runs if batch.states()[run.id]["state"] == "done"]
    assert done == [{"seed": 5, "a": 1, "mode": "150"}, {"seed": 5, "a": 4, "mode": "150"}]
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
        ("worker", False), ("kernel", True), ("runner and worker", True),
        *(
            pytest.param(*victim, marks=pytest.mark.slow)
            for victim in [
                ("runner", False), ("runner and worker", False), ("runner", True), ("worker", True),
            ]
        ),
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
    wait_until_left(batch, run)
    assert states_of(batch)[0] in (["lost"] if victim == "runner and worker" else ["killed"])
    text = command(batch, "run").communicate()[0]
    assert "left alone: 1 " in text and "`tdlib batch resume` executes them again" in text, text
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


@pytest.mark.slow
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
    wait_until_left(batch, run)
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
