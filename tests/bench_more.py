"""Costs beside those of a step: opening data, other arms, records, checkpoints, batches. See ``bench``."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
from bench import paired, training_step
from jupyter_client.manager import start_new_kernel

from tdlib.config import RunConfig, apply_arm
from tdlib.core.devices import usual_device
from tdlib.core.records import write_records
from tdlib.data.examples import low_shot
from tdlib.runs.batch import Batch
from tdlib.training import checkpoints
from tdlib.training.data import EncodedExamples
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import class_logits, load_student, prepare
from tdlib.training.recording import ProbeRecorder
from tdlib.training.trainer import CheckpointKeeper, make_trainer


def arm_steps(student: str, task: str, arms: Sequence[str]) -> list[tuple[str, float]]:
    """Step time of each arm over plain finetuning's, from the cache and with a live teacher."""
    base = RunConfig.from_parameters(task=task, student=student, shots=12)
    steps: dict[str, Callable[[], None]] = {}
    for arm in arms:
        config = apply_arm(base.model_copy(update={"arm": arm}))
        prepared = prepare(config, whole_splits=False)
        steps[arm] = training_step(config, prepared)
        if config.distill_weight or config.choice_weight:
            steps[f"{arm}, live teacher"] = training_step(config, prepared, live_teacher=True)
    villa = apply_arm(base.model_copy(update={"arm": "finetune", "adversarial_steps": 3}))
    steps["finetune with 3 adversarial steps"] = training_step(villa, prepare(villa, whole_splits=False))
    kind = Path(student).name
    return [
        (f"{task}, {kind}, step of {name} / finetune", ratio) for name, (_, ratio) in paired(steps, 9).items()
    ]


_OPEN = """
import sys, time
from tdlib.config import RunConfig
from tdlib.data.tasks import reader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

config = RunConfig.from_parameters(task=sys.argv[1], data_dir=sys.argv[2])
before, start = anonymous(), time.perf_counter()
examples = reader(config, sys.argv[3]).open()
opened, after, start = time.perf_counter() - start, anonymous(), time.perf_counter()
for index in range(0, len(examples), len(examples) // 1000):
    examples[index]
made = (time.perf_counter() - start) / 1000
print(f"{len(examples):,} examples: opened in {opened:.2f} s, {after - before:.0f} MiB for the index "
      f"({(after - before) * 2**20 / len(examples):.0f} bytes an example), one made in {made * 1e6:.0f} us; "
      f"after 1,000 of them {anonymous() - before:.0f} MiB")
"""


def open_large(sizes: tuple[int, ...] = (10_000, 250_000)) -> None:
    """Writes training splits with few pictures; prints what opening them costs, each in its own process."""
    from tdlib.miniworld import writers

    small = {"val": 30, "test": 30, "shifted": 30}
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            many = {"train": 60, "train_examples": size}
            writers.write_vcr(folder / "vcr", 0, writers.Size(**many, **small))
            entailment = writers.Size(**many, val=30, test=30, shifted=30)
            writers.write_snli_ve(folder / "snli_ve", 0, entailment)
            writers.write_vqa(folder / "vqa_v2", 0, writers.Size(**many, **small))
            for task, split in (("vcr_qa", "train"), ("snli_ve", "train"), ("vqa_v2", "train2014")):
                place = folder / task.removesuffix("_qa")
                command = [sys.executable, "-c", _OPEN, task, str(place), split]
                print(
                    f"{task:<8}",
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout,
                    end="",
                )


def recording_cost(base: RunConfig, probes: int = 16, every: int = 50) -> list[tuple[str, str]]:
    """What it costs to record the selections of ``probes`` examples every ``every`` updates."""
    config = apply_arm(base.model_copy(update={"arm": "clip_td", "probe_examples": probes}))
    prepared = prepare(config, whole_splits=False)
    step = training_step(config, prepared)
    cache = prepared.cache
    subset = low_shot(prepared.train, config.shots, config.seed)
    logits = class_logits(config, prepared, subset)
    feature_reader = TeacherFeatureReader(cache, prepared.idf, config, logits)
    examples = next(iter(prepared.evaluated.values()))[:probes]
    encoded = EncodedExamples(examples, prepared.encoder, feature_reader, num_labels=len(prepared.labels))
    module = TargetedDistillation(load_student(config, prepared), config, cache.teacher.dim)
    module.to(usual_device())
    recorder = ProbeRecorder(encoded, module)
    seconds = paired({"step": step, "record": lambda: recorder.record(0)}, 9)
    recorder.records = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(21):
            recorder.record(number * every)
            if number in (0, 20):
                write_records(recorder.records, Path(folder) / "selections.parquet")
                sizes.append((Path(folder) / "selections.parquet").stat().st_size / probes)
    share = seconds["record"][0] / (every * seconds["step"][0])
    kind, name = Path(config.student).name, f"{probes} probes every {every} updates"
    return [
        (f"{config.task}, {kind}, recording {name}, of training time", f"{share:.2%}"),
        (f"{config.task}, {kind}, bytes per probe: first record", f"{sizes[0]:,.0f}"),
        (f"{config.task}, {kind}, bytes per probe: each further", f"{(sizes[1] - sizes[0]) / 20:,.0f}"),
    ]


def checkpoint_cost(base: RunConfig, every: int = 100) -> list[tuple[str, str]]:
    """What a checkpoint costs, and its share of training time at one every ``every`` updates."""
    config = apply_arm(base.model_copy(update={"arm": "finetune", "epochs": 1}))
    prepared = prepare(config, whole_splits=False)
    subset = low_shot(prepared.train, config.shots, config.seed)
    encoded = EncodedExamples(subset, prepared.encoder, num_labels=len(prepared.labels))
    size = updates = 0

    def train(checkpoint_every: int) -> None:
        nonlocal size, updates
        own = config.model_copy(update={"checkpoint_every": checkpoint_every})
        module = TargetedDistillation(load_student(own, prepared), own, None)
        with tempfile.TemporaryDirectory() as folder:
            home = checkpoints.checkpoints_of(Path(folder) / "run")
            trainer = make_trainer(module, own, encoded, checkpoints.staging(home))
            if checkpoint_every:
                trainer.add_callback(CheckpointKeeper(trainer, home, {}, []))
            trainer.train()
            updates = trainer.state.global_step
            for place in home.glob("step-*"):
                size = sum(path.stat().st_size for path in place.iterdir())

    seconds = paired({"with": lambda: train(1), "without": lambda: train(0)}, 3)
    each = (seconds["with"][0] - seconds["without"][0]) / updates
    step = seconds["without"][0] / updates
    kind = Path(config.student).name
    return [
        (
            f"{kind}, a checkpoint of {size / 2**20:.1f} MiB",
            f"{each * 1e3:.0f} ms, {each / step:.2f} updates",
        ),
        (f"{kind}, one every {every} updates, of training time", f"{each / (every * step):.2%}"),
    ]


_WORK = """\
import json, time
from pathlib import Path

began, total = time.process_time(), 0
for number in range(rounds):
    total += number * number % 7
folder = Path(runs_dir) / "run"
folder.mkdir(parents=True)
(folder / "metrics.json").write_text(json.dumps({"work": time.process_time() - began, "total": total}))
"""


def batch_cost(rounds: int = 40_000_000) -> list[tuple[str, str]]:
    """What a batch adds to a notebook that computes for some seconds, and what two at once gain."""
    parameters = (
        f"rounds: int = {rounds}  # of the loop\n"
        "seed: int = 0  # tells runs apart\n"
        'runs_dir: str = ""  # results'
    )
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(_WORK),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    began = time.perf_counter()
    manager, client = start_new_kernel()
    kernel = time.perf_counter() - began
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    walls, work = {}, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        nbformat.write(notebook, folder / "template.ipynb")
        for count in (1, 2):
            described = {
                "template": str(folder / "template.ipynb"), "resources": {"cpus": 1},
                "seeds": [10 * count + i for i in range(count)],  # the same run would be taken over
            }  # fmt: skip
            batch = Batch(described, f"of-{count}", folder)
            began = time.perf_counter()
            batch.run("local", cpus=2)
            walls[count] = time.perf_counter() - began
            states = batch.states().values()
            assert all(state["state"] == "done" for state in states), [
                state.get("reason") for state in states
            ]
            if count == 1:
                [file] = batch.folder.glob("*/output/run/metrics.json")
                work = json.loads(file.read_text())["work"]
    return [
        (
            "batch of one notebook: beyond its work and its kernel's start",
            f"{walls[1] - work - kernel:.2f} s",
        ),
        ("(its work; a kernel's start)", f"{work:.2f} s; {kernel:.2f} s"),
        ("two notebooks at once, of ideal", f"{walls[1] / walls[2]:.2f}"),
    ]


# Sections.


def _students() -> list[tuple[str, str]]:
    arms = ["finetune", "naive", "naive_global", "clip_td", "clip_input", "clip_finetune"]
    found = [arm_steps("data/models/mini-uniter", task, arms) for task in ("vcr_qa", "vqa_v2")]
    return [(name, f"{ratio:.2f}") for rows in found for name, ratio in rows]


def _explorer() -> list[tuple[str, str]]:
    """A step of the explorer, from the key to the drawn page, as its test in Chromium measures it."""
    test = Path(__file__).with_name("test_browser.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-qs", "-k", "explorer_follows", str(test)]
    found = re.search(
        r"(a step of the explorer): (.*)", subprocess.run(command, capture_output=True, text=True).stdout
    )
    return [(found[1], found[2]) if found else ("a step of the explorer", "not measured: see its test")]


def _opening() -> list[tuple[str, str]]:
    open_large()
    return []


SECTIONS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "opening": _opening,
    "students": _students,
    "recording": lambda: recording_cost(RunConfig.from_parameters(shots=16)),
    "checkpoints": lambda: checkpoint_cost(RunConfig.from_parameters(shots=16)),
    "explorer": _explorer,
    "batches": batch_cost,
}
