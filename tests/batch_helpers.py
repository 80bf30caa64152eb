"""A template that takes a second, batches of it, and how their runs stand: what tests of batches share."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import yaml

from tdlib.core.paths import ROOT
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch
from tdlib.runs.plan import PlannedRun, plan_batch

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


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    """A notebook of prose, a cell of parameters and other cells of code."""
    new = nbformat.v4.new_code_cell
    code = [new(parameters, metadata={"tags": ["parameters"]}), *map(new, cells)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Prose"), *code])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def write_template(folder: Path, result: str = RESULT, parameters: str = PARAMETERS) -> Path:
    return write_notebook(folder / "template.ipynb", parameters, WORK, END, result)


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


def by_run(batch: Batch):
    states = batch.states()
    return [(run, states[run.id]) for run in batch.plan.runs]


def running(batch: Batch, cell: bool) -> Callable[[], bool]:
    """Whether the batch's run has begun; whether its kernel is in a cell."""
    if cell:
        return (batch.folder / "begun.txt").exists
    return lambda: run_states.recorded_state(batch.folder_of(batch.plan.runs[0]))["state"] == "running"


def problems_of(description: dict, folder: Path = ROOT) -> str:
    """All that is wrong with a batch's description."""
    return "\n".join(plan_batch(description, "b", folder).problems)


def kill(names: str, **processes: psutil.Process) -> list[psutil.Process]:
    """Kills those of the processes of a run that are named, as in "runner and worker", and its "kernel"."""
    victims = {name: [process] for name, process in processes.items()}
    victims["kernel"] = processes["worker"].children()
    chosen = [process for name in names.split(" and ") for process in victims[name]]
    for process in chosen:
        process.kill()
    return chosen
