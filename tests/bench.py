"""Speed and memory as ratios measured in one run: ``make bench``, or ``python tests/bench.py SECTION...``."""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from jupyter_client.manager import start_new_kernel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ViltConfig, ViltImageProcessor

from tdlib.config import RunConfig, apply_arm
from tdlib.core.devices import usual_device
from tdlib.core.paths import ROOT
from tdlib.core.records import write_records
from tdlib.data.examples import low_shot
from tdlib.data.pictures import open_picture
from tdlib.runs.batch import Batch
from tdlib.students.base import student_inputs
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.vilt import ViltForMultipleChoice
from tdlib.teacher.cache import TeacherCache
from tdlib.training import checkpoints
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import predict
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TargetBuilder
from tdlib.training.prepare import Materials, class_logits, load_student, prepare, read_split
from tdlib.training.recording import ProbeRecorder
from tdlib.training.trainer import CheckpointKeeper, make_trainer


def medians(actions: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Median seconds of each action; the actions take turns, so that drifts of the machine hit all alike."""
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(config: RunConfig, materials: Materials, live_teacher: bool = False) -> Callable[[], None]:
    """One training step: batch from encoded examples, forward, backward, update."""
    subset = low_shot(materials.train, config.shots, config.seed)
    assert materials.builder is not None
    logits = class_logits(config, materials, subset)
    builder = TargetBuilder(materials.builder.cache, materials.builder.idf, config, logits)
    encoded = EncodedExamples(
        subset, materials.encoder, builder if config.distill_weight or config.choice_weight else None,
        memory=0 if live_teacher else 2**30, num_labels=len(materials.labels),
    )  # fmt: skip
    teacher = materials.builder.cache.teacher
    device = torch.device(usual_device())
    module = TargetedDistillation(load_student(config, materials), config, teacher.dim).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    number = 0

    def step() -> None:
        nonlocal number
        chosen = [(number + i) % len(encoded) for i in range(config.batch_size)]
        number += config.batch_size
        if live_teacher:
            examples = [subset[i] for i in chosen]
            teacher.encode_pictures([open_picture(example.image) for example in examples])
            teacher.encode_texts([s.text for example in examples for s in example.statements()])
        batch = {k: v.to(device) for k, v in collate([encoded[i] for i in chosen], encoded.encoder).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = module(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for i in range(len(encoded)):
        encoded[i]
    return step


def arm_steps(student: str, task: str, arms: Sequence[str]) -> list[tuple[str, float]]:
    """Step time of each arm over plain finetuning's, from the cache and with a live teacher."""
    base = RunConfig.from_parameters(task=task, student=student, shots=12)
    steps: dict[str, Callable[[], None]] = {}
    for arm in arms:
        config = apply_arm(base.model_copy(update={"arm": arm}))
        materials = prepare(config, whole_splits=False)
        steps[arm] = _step(config, materials)
        if config.distill_weight or config.choice_weight:
            steps[f"{arm}, live teacher"] = _step(config, materials, live_teacher=True)
    villa = base.model_copy(update={"arm": "finetune", "adversarial_steps": 3})
    steps["finetune with 3 adversarial steps"] = _step(apply_arm(villa), prepare(villa, whole_splits=False))
    seconds = medians(steps, 9)
    kind = Path(student).name
    return [
        (f"{task}, {kind}, step of {name} / finetune", s / seconds["finetune"]) for name, s in seconds.items()
    ]


def trainer_share(base: RunConfig, epochs: int = 3, repeats: int = 5) -> float:
    """Examples per second of our trainer over those of a bare loop with the same student and batches."""
    config = apply_arm(base.model_copy(update={"arm": "finetune", "epochs": epochs}))
    materials = prepare(config, whole_splits=False)
    subset = low_shot(materials.train, config.shots, config.seed)
    encoded = EncodedExamples(subset, materials.encoder, num_labels=len(materials.labels))
    for i in range(len(encoded)):
        encoded[i]

    def ours() -> None:
        module = TargetedDistillation(load_student(config, materials), config, None)
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(module, config, encoded, Path(folder)).train()

    device = torch.device(usual_device())

    def bare() -> None:
        student = load_student(config, materials).train().to(device)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        loader = DataLoader(
            encoded, config.batch_size, True, collate_fn=partial(collate, encoder=encoded.encoder)
        )
        for _ in range(epochs):
            for batch in loader:
                batch = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = student(**student_inputs(student, batch)).logits
                loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()

    seconds = medians({"ours": ours, "bare": bare}, repeats)
    return seconds["bare"] / seconds["ours"]


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
    materials = prepare(config, whole_splits=False)
    step = _step(config, materials)
    assert materials.builder is not None
    cache = materials.builder.cache
    subset = low_shot(materials.train, config.shots, config.seed)
    logits = class_logits(config, materials, subset)
    builder = TargetBuilder(cache, materials.builder.idf, config, logits)
    examples = next(iter(materials.evaluated.values()))[:probes]
    encoded = EncodedExamples(examples, materials.encoder, builder, num_labels=len(materials.labels))
    module = TargetedDistillation(load_student(config, materials), config, cache.teacher.dim)
    module.to(usual_device())
    recorder = ProbeRecorder(encoded, partial(collate, encoder=materials.encoder), module)
    seconds = medians({"step": step, "record": lambda: recorder.record(0)}, 9)
    recorder.records = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(21):
            recorder.record(number * every)
            if number in (0, 20):
                write_records(recorder.records, Path(folder) / "selections.parquet")
                sizes.append((Path(folder) / "selections.parquet").stat().st_size / probes)
    share = seconds["record"] / (every * seconds["step"])
    kind, name = Path(config.student).name, f"{probes} probes every {every} updates"
    return [
        (f"{config.task}, {kind}, recording {name}, of training time", f"{share:.2%}"),
        (f"{config.task}, {kind}, bytes per probe: first record", f"{sizes[0]:,.0f}"),
        (f"{config.task}, {kind}, bytes per probe: each further", f"{(sizes[1] - sizes[0]) / 20:,.0f}"),
    ]


def checkpoint_cost(base: RunConfig, every: int = 100) -> list[tuple[str, str]]:
    """What a checkpoint costs, and its share of training time at one every ``every`` updates."""
    config = apply_arm(base.model_copy(update={"arm": "finetune", "epochs": 1}))
    materials = prepare(config, whole_splits=False)
    subset = low_shot(materials.train, config.shots, config.seed)
    encoded = EncodedExamples(subset, materials.encoder, num_labels=len(materials.labels))
    size = updates = 0

    def train(checkpoint_every: int) -> None:
        nonlocal size, updates
        own = config.model_copy(update={"checkpoint_every": checkpoint_every})
        module = TargetedDistillation(load_student(own, materials), own, None)
        with tempfile.TemporaryDirectory() as folder:
            home = checkpoints.checkpoints_of(Path(folder) / "run")
            trainer = make_trainer(module, own, encoded, checkpoints.staging(home))
            if checkpoint_every:
                trainer.add_callback(CheckpointKeeper(trainer, home, {}, []))
            trainer.train()
            updates = trainer.state.global_step
            for place in home.glob("step-*"):
                size = sum(path.stat().st_size for path in place.iterdir())

    seconds = medians({"with": lambda: train(1), "without": lambda: train(0)}, 3)
    each = (seconds["with"] - seconds["without"]) / updates
    step = seconds["without"] / updates
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


def _arms() -> list[tuple[str, str]]:
    base = RunConfig.from_parameters(shots=16)
    materials = prepare(base, whole_splits=False)
    assert materials.builder is not None
    teacher = materials.builder.cache.teacher
    arms = {arm: apply_arm(base.model_copy(update={"arm": arm})) for arm in ("finetune", "naive", "clip_td")}
    steps = {arm: _step(config, materials) for arm, config in arms.items()}
    steps["clip_td, live teacher"] = _step(arms["clip_td"], materials, live_teacher=True)
    seconds = medians(steps)
    rows = [
        (f"training step, {name} / finetune", f"{value / seconds['finetune']:.2f}")
        for name, value in seconds.items()
    ]
    rows.append((f"finetune step of {base.batch_size} questions", f"{seconds['finetune'] * 1e3:.0f} ms"))

    baseline, distilled = load_student(base, materials), load_student(base, materials)
    module = TargetedDistillation(distilled, arms["clip_td"], teacher.dim)
    same = sum(p.numel() for p in module.student.parameters()) == sum(
        p.numel() for p in baseline.parameters()
    )
    assert same, "the distilled student must have the baseline's parameters"
    split = EncodedExamples(next(iter(materials.evaluated.values()))[:64], materials.encoder)
    inference = medians(
        {"baseline": lambda: predict(baseline, split), "distilled": lambda: predict(distilled, split)}, 7
    )
    share = inference["distilled"] / inference["baseline"]
    return [*rows, ("inference, distilled / baseline (equal parameters)", f"{share:.2f}")]


def _trainer() -> list[tuple[str, str]]:
    students = ("data/models/mini-vilt", "data/models/mini-uniter")
    configs = [RunConfig.from_parameters(shots=16, student=student) for student in students]
    return [
        (f"examples/s, our trainer / bare loop, {Path(c.student).name}", f"{trainer_share(c):.2f}")
        for c in configs
    ]


def _students() -> list[tuple[str, str]]:
    arms = ["finetune", "naive", "naive_global", "clip_td", "clip_input", "clip_finetune"]
    found = [arm_steps("data/models/mini-uniter", task, arms) for task in ("vcr_qa", "vqa_v2")]
    return [(name, f"{ratio:.2f}") for rows in found for name, ratio in rows]


def full_size(folder: Path, shots: int = 16) -> dict[str, dict[str, Any]]:
    """Parameters of runs with the paper's sizes and random weights: UNITER-base and ViLT-base, ViT-B-16.

    UNITER reads 36 regions of 2048 numbers, as a detector gives them; ViLT pictures of 384 pixels.
    """
    base = RunConfig.from_parameters(shots=shots)
    for example in low_shot(read_split(base, "train"), shots, 0):
        numbers = np.random.default_rng(0)
        corners = np.sort(numbers.uniform(0, 256, (36, 2, 2)), axis=1).reshape(36, 4)
        (folder / "regions").mkdir(exist_ok=True)
        np.savez(
            folder / "regions" / f"{example.image.name}.npz", x=numbers.random((36, 2048), np.float32),
            bbox=corners, num_bbox=36, image_w=256, image_h=256,
        )  # fmt: skip
    mini = ROOT / "data" / "models" / "mini-vilt"
    torch.manual_seed(0)
    UniterForMultipleChoice(UniterConfig(type_vocab_size=4)).save_pretrained(folder / "uniter-base")
    ViltForMultipleChoice(ViltConfig(type_vocab_size=2)).save_pretrained(folder / "vilt-base")
    size = {"shortest_edge": 384}
    ViltImageProcessor(size=size).save_pretrained(folder / "vilt-base")
    for name in ("uniter-base", "vilt-base"):
        AutoTokenizer.from_pretrained(mini).save_pretrained(folder / name)
    common = {"teacher": "ViT-B-16", "teacher_control": "random_weights", "shots": shots}
    common |= {"shift": "", "probe_examples": 0}
    return {
        "UNITER-base": common
        | {"student": str(folder / "uniter-base"), "regions": f"npz:{folder / 'regions'}"},
        "ViLT-base": common | {"student": str(folder / "vilt-base")},
    }


def _full() -> list[tuple[str, str]]:
    """Steps at the paper's sizes on a GPU: over plain finetuning's, examples per second, memory."""
    if not torch.cuda.is_available():
        return [("steps at the paper's sizes", "not measured: no GPU")]
    rows = [("GPU", torch.cuda.get_device_name())]
    with tempfile.TemporaryDirectory() as temporary:
        for kind, parameters in full_size(Path(temporary)).items():
            for precision in ("fp32", "bf16"):
                base = RunConfig.from_parameters(**parameters, precision=precision)
                materials = prepare(base, whole_splits=False)
                steps, memory = {}, {}
                for arm in ("finetune", "naive", "clip_td"):
                    config = apply_arm(base.model_copy(update={"arm": arm}))
                    steps[arm] = _step(config, materials)
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                    steps[arm]()
                    memory[arm] = (torch.cuda.max_memory_allocated() - held) / 2**30
                steps["clip_td, live teacher"] = _step(config, materials, live_teacher=True)
                seconds = medians(steps, 9)
                for name, value in seconds.items():
                    used = f", {memory[name]:.1f} GiB beyond weights" if name in memory else ""
                    rows.append((
                        f"{kind}, {precision}, step of {name} / finetune",
                        f"{value / seconds['finetune']:.2f} ({value * 1e3:.0f} ms, "
                        f"{base.batch_size / value:.0f} questions/s{used})",
                    ))  # fmt: skip
                share = trainer_share(base, 5, 3)
                rows.append((f"{kind}, {precision}, examples/s, our trainer / bare loop", f"{share:.2f}"))
                steps.clear()
                torch.cuda.empty_cache()
    return rows


def _cache() -> list[tuple[str, str]]:
    materials = prepare(RunConfig.from_parameters(shots=16), whole_splits=False)
    assert materials.builder is not None
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), materials.builder.cache.teacher)
        example = materials.train[0]
        cache.add([s.text for s in example.statements()], [example.image])
        text = example.statements()[0].text
        reads = {"picture": lambda: cache.picture(example.image), "text": lambda: cache.text(text)}
        read = medians(reads, 200)
    return [(f"cache read, {name}", f"{value * 1e6:.0f} us") for name, value in read.items()]


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
    "arms": _arms,
    "trainer": _trainer,
    "students": _students,
    "full": _full,
    "cache": _cache,
    "recording": lambda: recording_cost(RunConfig.from_parameters(shots=16)),
    "checkpoints": lambda: checkpoint_cost(RunConfig.from_parameters(shots=16)),
    "explorer": _explorer,
    "batches": batch_cost,
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all"
    )
    names = parser.parse_args(arguments).sections or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    for name in names:
        print(f"[{name}]", flush=True)
        rows = SECTIONS[name]()
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            print(f"{label:<{width}}  {value}", flush=True)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; MiniWorld seed 0")


if __name__ == "__main__":
    main(sys.argv[1:])
