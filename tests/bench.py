"""What distilling costs, as ratios measured in one run: `make bench`, on a GPU `make bench ARGS=full`.

One table: training steps over plain finetuning's, the trainer over a bare loop, inference, bytes of a step,
the teacher's cache. Other costs by name, see ``bench_more``: `make bench ARGS='opening recording'`.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ViltConfig, ViltImageProcessor

from tdlib.config import RunConfig, apply_arm
from tdlib.core.devices import in_threads, usable_cores, usual_device, usual_workers
from tdlib.core.paths import ROOT
from tdlib.data.examples import Example, low_shot
from tdlib.data.pictures import open_picture
from tdlib.data.tasks import task_of
from tdlib.students.base import student_inputs
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.vilt import ViltForMultipleChoice
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher, TeacherRecord
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import PreparedData, class_logits, load_student, prepare, read_split
from tdlib.training.targets import PACKED, TeacherFeatures, make_targets, pack
from tdlib.training.trainer import make_trainer

GPU = torch.cuda.is_available()
# On the processor its own seconds count, so that other work on the machine does not.
clock = time.perf_counter if GPU else time.process_time


def paired(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each action, and median of its ratios to the first one in the same round.

    The actions take turns, so that drifts of the machine hit all alike.
    """
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            if GPU:
                torch.cuda.synchronize()
            start = clock()
            action()
            if GPU:
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    first = next(iter(seconds.values()))
    return {
        name: (
            statistics.median(values),
            statistics.median(value / base for value, base in zip(values, first, strict=True)),
        )
        for name, values in seconds.items()
    }


def encoded_subset(config: RunConfig, prepared: PreparedData, memory: int = 2**30) -> EncodedExamples:
    """A run's examples with what their targets are made of, if its arm has any; encoded already."""
    subset = low_shot(prepared.train, config.shots, config.seed)
    feature_reader = None
    if config.distill_weight or config.choice_weight:
        logits = class_logits(config, prepared, subset)
        feature_reader = TeacherFeatureReader(prepared.cache, prepared.idf, config, logits)
    encoded = EncodedExamples(
        subset,
        prepared.encoder,
        feature_reader,
        memory,
        len(prepared.labels),
        soft_labels=task_of(config).has_soft_labels,
    )
    for index in range(len(encoded) if memory else 0):
        encoded[index]
    return encoded


def training_step(
    config: RunConfig, prepared: PreparedData, live_teacher: bool = False
) -> Callable[[], None]:
    """One training step: batch from encoded examples, forward, backward, update."""
    encoded = encoded_subset(config, prepared, 0 if live_teacher else 2**30)
    teacher, device = prepared.cache.teacher, torch.device(usual_device())
    module = TargetedDistillation(load_student(config, prepared), config, teacher.dim).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=GPU or None)
    number = 0

    def step() -> None:
        nonlocal number
        chosen = [(number + i) % len(encoded) for i in range(config.batch_size)]
        number += config.batch_size
        if live_teacher:
            examples = [encoded.examples[i] for i in chosen]
            teacher.encode_pictures([open_picture(example.image) for example in examples])
            teacher.encode_texts([s.text for example in examples for s in example.statements()])
        batch = {k: v.to(device) for k, v in collate([encoded[i] for i in chosen], encoded.encoder).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = module(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def trained(config: RunConfig, prepared: PreparedData, encoded: EncodedExamples) -> Callable[[], None]:
    """A whole training by our trainer."""
    dim = prepared.cache.teacher.dim if encoded.feature_reader else None

    def train() -> None:
        module = TargetedDistillation(load_student(config, prepared), config, dim)
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(module, config, encoded, Path(folder)).train()

    return train


def bare_loop(config: RunConfig, prepared: PreparedData, encoded: EncodedExamples) -> Callable[[], None]:
    """The same training of plain finetuning by torch alone."""
    device = torch.device(usual_device())

    def train() -> None:
        student = load_student(config, prepared).train().to(device)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=GPU or None)
        gather = partial(collate, encoder=encoded.encoder)
        loader = DataLoader(encoded, config.batch_size, True, collate_fn=gather, pin_memory=GPU)
        for _ in range(config.epochs):
            for batch in loader:
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = student(**student_inputs(student, batch)).logits
                loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()

    return train


class Operators(TorchDispatchMode):
    """Counts the operators that run while it is open."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def inference(prepared: PreparedData, config: RunConfig, repeats: int) -> tuple[float, str]:
    """Seconds of a distilled student's pass over a finetuned one's, and their numbers of operators."""
    encoded = encoded_subset(apply_arm(config.model_copy(update={"arm": "finetune"})), prepared)
    device = torch.device(usual_device())
    items = [encoded[index] for index in range(config.batch_size)]
    batch = {name: value.to(device) for name, value in collate(items, prepared.encoder).items()}
    students, counts = {}, {}
    for arm in ("finetune", "clip_td"):
        settings = apply_arm(config.model_copy(update={"arm": arm}))
        dim = prepared.cache.teacher.dim if arm == "clip_td" else None
        student = TargetedDistillation(load_student(settings, prepared), settings, dim).student
        students[arm] = student.to(device).eval()

    @torch.inference_mode()
    def answer(arm: str) -> None:
        students[arm](**student_inputs(students[arm], batch))

    for arm in students:
        with Operators() as operators:
            answer(arm)
        counts[arm] = operators.count
    found = paired({arm: partial(answer, arm) for arm in students}, repeats)
    assert counts["finetune"] == counts["clip_td"], counts
    return found["clip_td"][1], f"{counts['clip_td']} operators in both"


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def step_bytes(batch: dict[str, Tensor], config: RunConfig) -> str:
    """What a batch carries for its targets, and the targets themselves as a batch could carry them."""
    packed = nbytes(value for name, value in batch.items() if name.startswith(PACKED))
    made = make_targets(batch, config)
    dense = nbytes(value.contiguous() for name, value in made.items() if name not in batch)
    return f"{packed / 1e6:.2f} of {dense / 1e6:.2f} MB = {packed / dense:.2f}"


def bytes_at_full_size(examples: int = 16, choices: int = 4, dim: int = 512) -> str:
    """The same at the paper's sizes, of random numbers: 40 words and 240 places, 196 patches, 20 words."""

    def record(positions: Tensor) -> TeacherRecord:
        vectors = torch.randn(2, len(positions), dim).half()
        return TeacherRecord(vectors[0], vectors[1], positions, torch.randn(dim).half())

    words, spans = torch.stack([torch.arange(20), torch.arange(1, 21)], dim=1), torch.ones(choices, 40, 2)
    features = [
        TeacherFeatures(
            tuple(record(words) for _ in range(choices)),
            tuple(bytes([row, choice]) for choice in range(choices)),
            record(torch.rand(196, 4)), bytes([row]), torch.rand(240, 4), torch.rand(choices, 40),
            torch.randn(choices), torch.tensor(1.0),
        )
        for row in range(examples)
    ]  # fmt: skip
    return step_bytes(pack(features, 40) | {"spans": spans.long().expand(examples, -1, -1, -1)}, RunConfig())


def filling(teacher: Teacher, examples: Sequence[Example], repeats: int) -> dict[str, str]:
    """Filling the teacher's cache over a bare loop of stock encoding, with the same decoding; its size."""
    pictures = [*dict.fromkeys(example.image for example in examples)]
    texts = [*dict.fromkeys(s.text for example in examples for s in example.statements())]
    context = teacher.tokenize.tokenizer.context_length

    @torch.inference_mode()
    def bare_pictures() -> None:
        for start in range(0, len(pictures), 128):
            opened = in_threads(open_picture, pictures[start : start + 128])
            pixels = torch.stack(in_threads(teacher.preprocess, opened)).to(teacher.device)
            teacher.model.encode_image(pixels).cpu()

    @torch.inference_mode()
    def bare_texts() -> None:
        for start in range(0, len(texts), 256):
            encoded = [teacher.tokenize.read(text).ids for text in texts[start : start + 256]]
            ids = torch.zeros(len(encoded), context, dtype=torch.long)
            for row, tokens in enumerate(encoded):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            teacher.model.encode_text(ids.to(teacher.device)).cpu()

    def fill(**sources: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            TeacherCache(folder, teacher).add(**sources)

    rows = {}
    for name, bare, sources in (
        ("pictures", bare_pictures, {"pictures": pictures}),
        ("texts", bare_texts, {"texts": texts}),
    ):
        seconds = paired({"filling": partial(fill, **sources), "bare": bare}, repeats)
        with tempfile.TemporaryDirectory() as folder:
            cache = TeacherCache(folder, teacher)
            cache.add(**sources)
            shards = [path.stat().st_size for path in cache.store.folder.glob(f"{name}-*")]
            size = sum(shards) / cache.store.count(name)
        rows[f"cache of {name}: speed of filling / bare encoding"] = (
            f"{seconds['bare'][1]:.2f} ({cache.store.count(name) / seconds['filling'][0]:.0f} a second, "
            f"{size / 1000:.1f} kB each)"
        )
    return rows


def making(config: RunConfig, prepared: PreparedData, step: float, repeats: int) -> dict[str, str]:
    """Making a batch that memory does not keep, in one process, beside decoding its pictures alone.

    ``step`` are the seconds of a training step. Regions are read, not found, and their students decode
    nothing.
    """
    encoded, rows = encoded_subset(config, prepared, memory=0), range(config.batch_size)
    examples = [encoded.examples[row] for row in rows]
    found = paired(
        {
            "decoder": lambda: [open_picture(example.image) for example in examples],
            "loader": lambda: collate([encoded[row] for row in rows], encoded.encoder),
            "text": lambda: [encoded.encoder.text(example) for example in examples],
        },
        repeats,
    )
    speeds = {name: len(rows) / seconds for name, (seconds, _) in found.items()}
    return {
        "pictures a second: loader without memory / bare decoder": (
            f"{speeds['loader']:.0f} / {speeds['decoder']:.0f} = {1 / found['loader'][1]:.2f}"
        ),
        "encoding a batch's text anew, of a step": f"{found['text'][0] / step:.1%}",
    }


def column(base: RunConfig, repeats: int, epochs: int) -> dict[str, str]:
    """One student's column of the table."""
    arms = {arm: apply_arm(base.model_copy(update={"arm": arm})) for arm in ("finetune", "naive", "clip_td")}
    arms = {arm: config.model_copy(update={"epochs": epochs}) for arm, config in arms.items()}
    prepared = prepare(base, whole_splits=False)
    steps = {arm: training_step(config, prepared) for arm, config in arms.items()}
    steps["clip_td, live teacher"] = training_step(arms["clip_td"], prepared, live_teacher=True)
    found = paired(steps, repeats)
    seconds = found["finetune"][0]
    rows = {
        f"step of finetune ({base.batch_size} questions)": f"{seconds * 1e3:.0f} ms",
        **{f"step of {arm} / finetune": f"{found[arm][1]:.2f}" for arm in steps if arm != "finetune"},
    }
    steps.clear()
    rows |= making(arms["clip_td"], prepared, found["clip_td"][0], repeats)
    encoded = {arm: encoded_subset(arms[arm], prepared) for arm in ("finetune", "clip_td")}
    loops = {
        "bare": bare_loop(arms["finetune"], prepared, encoded["finetune"]),
        "ours": trained(arms["finetune"], prepared, encoded["finetune"]),
    }
    rows["training by our trainer / bare loop"] = f"{paired(loops, 3)['ours'][1]:.2f}"
    if GPU:
        workers = {"loader_workers": max(1, usual_workers())}
        runs = {arm: trained(arms[arm].model_copy(update=workers), prepared, encoded[arm]) for arm in encoded}
        shared = paired(runs, 3)["clip_td"][1]
        rows[f"training of clip_td / finetune, {workers['loader_workers']} workers"] = f"{shared:.2f}"
    ratio, operators = inference(prepared, base, repeats)
    rows["inference, distilled / finetuned"] = f"{ratio:.2f} ({operators})"
    items = [encoded["clip_td"][index] for index in range(base.batch_size)]
    rows["bytes a step for targets, of the targets'"] = step_bytes(
        collate(items, prepared.encoder), arms["clip_td"]
    )
    return rows


def full_size(folder: Path, shots: int = 16) -> dict[str, dict[str, Any]]:
    """Parameters of runs with the paper's sizes and random weights: UNITER-base and ViLT-base, ViT-B-16.

    UNITER reads 36 regions of 2048 numbers, as a detector gives them; ViLT pictures of 384 pixels.
    """
    base = RunConfig.from_parameters(shots=shots)
    (folder / "regions").mkdir(exist_ok=True)
    for example in low_shot(read_split(base, "train"), shots, 0):
        numbers = np.random.default_rng(0)
        corners = np.sort(numbers.uniform(0, 256, (36, 2, 2)), axis=1).reshape(36, 4)
        np.savez(
            folder / "regions" / f"{example.image.name}.npz", x=numbers.random((36, 2048), np.float32),
            bbox=corners, num_bbox=36, image_w=256, image_h=256,
        )  # fmt: skip
    mini = ROOT / "data" / "models" / "mini-vilt"
    torch.manual_seed(0)
    UniterForMultipleChoice(UniterConfig(type_vocab_size=4)).save_pretrained(folder / "uniter-base")
    ViltForMultipleChoice(ViltConfig(type_vocab_size=2)).save_pretrained(folder / "vilt-base")
    ViltImageProcessor(size={"shortest_edge": 384}).save_pretrained(folder / "vilt-base")
    for name in ("uniter-base", "vilt-base"):
        AutoTokenizer.from_pretrained(mini).save_pretrained(folder / name)
    common = {"teacher": "ViT-B-16", "teacher_control": "random_weights", "shots": shots}
    common |= {"shift": "", "probe_examples": 0}
    regions = f"npz:{folder / 'regions'}"
    return {
        "UNITER-base": common | {"student": str(folder / "uniter-base"), "regions": regions},
        "ViLT-base": common | {"student": str(folder / "vilt-base")},
    }


def table(full: bool) -> None:
    """Measures and prints the table: of the mini models, or at the paper's sizes."""
    with tempfile.TemporaryDirectory() as temporary:
        if full:
            kinds = {
                f"{name}, {precision}": parameters | {"precision": precision}
                for name, parameters in full_size(Path(temporary)).items()
                for precision in ("fp32", "bf16")
            }
        else:
            common = {"shots": 8, "shift": "", "probe_examples": 0}
            kinds = {
                f"mini {name}": common | {"student": f"data/models/mini-{name.lower()}"}
                for name in ("ViLT", "UNITER")
            }
        columns = {}
        for name, parameters in kinds.items():
            base = RunConfig.from_parameters(**parameters)
            columns[name] = column(base, 9 if full else 5, 5 if full else 1)
            print(f"measured: {name}", file=sys.stderr, flush=True)
            if GPU:
                torch.cuda.empty_cache()
        prepared = prepare(base, whole_splits=False)
        subset = low_shot(prepared.train, base.shots, 0)
        shared = filling(prepared.cache.teacher, subset, 3)
    shared["bytes a step for targets, of the targets', at the paper's sizes"] = bytes_at_full_size()
    labels = [*dict.fromkeys(label for rows in columns.values() for label in rows)]
    print("\n| |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for label in labels:
        print(f"| {label} |", " | ".join(rows.get(label, "") for rows in columns.values()), "|")
    for label, value in shared.items():
        print(f"| {label} | {value} |" + " |" * (len(columns) - 1))


def machine() -> str:
    """What the numbers were measured with, and how."""
    name = torch.cuda.get_device_name() if GPU else "processor, whose own seconds count"
    return (
        f"{name}; {usable_cores()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; MiniWorld seed 0; ratios are medians over rounds in which "
        f"all take turns; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )


def main(arguments: Sequence[str]) -> None:
    from bench_more import SECTIONS

    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"mini, full, {', '.join(SECTIONS)}")
    names = parser.parse_args(arguments).sections or ["mini"]
    if unknown := [name for name in names if name not in (*SECTIONS, "mini", "full")]:
        parser.error(f"unknown {', '.join(unknown)}; expected mini, full, {', '.join(SECTIONS)}")
    if "full" in names and not GPU:
        parser.error("full: there is no GPU to be seen")
    for name in names:
        began = time.perf_counter()
        if name in ("mini", "full"):
            table(name == "full")
        else:
            print(f"[{name}]", flush=True)
            rows = SECTIONS[name]()
            width = max((len(label) for label, _ in rows), default=0)
            for label, value in rows:
                print(f"{label:<{width}}  {value}", flush=True)
        print(f"\n{machine()}; took {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
