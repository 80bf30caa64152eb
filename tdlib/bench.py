"""Speed and memory as ratios measured in one run: ``make bench``."""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from tdlib.arms import apply_arm
from tdlib.cache import TeacherCache
from tdlib.config import RunConfig
from tdlib.examples import low_shot
from tdlib.experiments import prepare
from tdlib.objective import TargetedDistillation
from tdlib.students.base import student_inputs
from tdlib.targets import TargetBuilder
from tdlib.teacher import open_picture
from tdlib.training import (
    EncodedExamples,
    Materials,
    class_logits,
    collate,
    load_student,
    make_trainer,
    predict,
)


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
    module = TargetedDistillation(load_student(config, materials), config, teacher.dim)
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
        batch = collate([encoded[i] for i in chosen], encoded.encoder)
        loss = module(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

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


def trainer_share(base: RunConfig, epochs: int = 3) -> float:
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

    def bare() -> None:
        student = load_student(config, materials).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        loader = DataLoader(
            encoded, config.batch_size, True, collate_fn=partial(collate, encoder=encoded.encoder)
        )
        for _ in range(epochs):
            for batch in loader:
                logits = student(**student_inputs(student, batch)).logits
                loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()

    seconds = medians({"ours": ours, "bare": bare}, 5)
    return seconds["bare"] / seconds["ours"]


_OPEN = """
import sys, time
from tdlib.config import RunConfig
from tdlib.tasks.catalogue import reader

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
            writers.write_vcr(folder / "vcr", 0, writers.VcrSize(**many, **small))
            entailment = writers.SnliVeSize(**many, dev=30, test=30, shifted=30)
            writers.write_snli_ve(folder / "snli_ve", 0, entailment)
            writers.write_vqa(folder / "vqa_v2", 0, writers.VqaSize(**many, **small))
            for task, split in (("vcr_qa", "train"), ("snli_ve", "train"), ("vqa_v2", "train2014")):
                place = folder / task.removesuffix("_qa")
                command = [sys.executable, "-c", _OPEN, task, str(place), split]
                print(
                    f"{task:<8}",
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout,
                    end="",
                )


def main() -> None:
    open_large()
    base = RunConfig.from_parameters(shots=16)
    materials = prepare(base, whole_splits=False)
    assert materials.builder is not None
    teacher = materials.builder.cache.teacher
    arms = {arm: apply_arm(base.model_copy(update={"arm": arm})) for arm in ("finetune", "naive", "clip_td")}
    steps = {arm: _step(config, materials) for arm, config in arms.items()}
    steps["clip_td, live teacher"] = _step(arms["clip_td"], materials, live_teacher=True)
    seconds = medians(steps)
    rows = [
        (f"training step, {name} / finetune", value / seconds["finetune"]) for name, value in seconds.items()
    ]

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
    rows.append(
        ("inference, distilled / baseline (equal parameters)", inference["distilled"] / inference["baseline"])
    )

    rows.append(("examples/s, our trainer / bare loop", trainer_share(base)))
    arms_of_all = ["finetune", "naive", "naive_global", "clip_td", "clip_input", "clip_finetune"]
    for task in ("vcr_qa", "vqa_v2"):
        rows += arm_steps("data/models/mini-uniter", task, arms_of_all)

    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), teacher, checked_records=0)
        example = materials.train[0]
        cache.add([s.text for s in example.statements()], [example.image])
        text = example.statements()[0].text
        reads = {"picture": lambda: cache.picture(example.image), "text": lambda: cache.text(text)}
        read = medians(reads, 200)
    width = max(len(name) for name, _ in rows)
    for name, ratio in rows:
        print(f"{name:<{width}}  {ratio:.2f}")
    print(f"finetune step of {base.batch_size} questions: {seconds['finetune'] * 1e3:.0f} ms")
    print(f"cache read: picture {read['picture'] * 1e6:.0f} us, text {read['text'] * 1e6:.0f} us")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; MiniWorld seed {base.world_seed}")


if __name__ == "__main__":
    main()
