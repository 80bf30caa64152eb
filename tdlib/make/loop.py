"""The training loop of all makers: phases by share of the time, one schedule, checkpoints, progress lines."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tdlib.core.files import file_digest, whole_path, write_json
from tdlib.core.provenance import code_of, digest
from tdlib.data.examples import DataError

log = logging.getLogger("tdlib.make")

PEAK = 1e-3  # highest learning rate
WEIGHT_DECAY = 0.05  # of matrices
SAVE_EVERY, LOG_EVERY = 180, 30  # seconds between checkpoints, and between lines of progress
APART = ("__main__.py", "detector.py", "measure.py", "page.py")  # modules that no checkpoint depends on


@cache
def multiplies_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 clearly faster than float32, by a trial of a few milliseconds.

    Its flags are not enough: processors that have instructions for it can still be slower with them.
    """

    def seconds(dtype: torch.dtype) -> float:
        rows, layer = torch.ones(2048, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
        times = []
        for _ in range(7):
            started = time.thread_time()
            rows @ layer
            times.append(time.thread_time() - started)
        return min(times)

    return seconds(torch.bfloat16) < 0.75 * seconds(torch.float32)


def mixed_precision(device: str = "cpu") -> torch.autocast:
    """Returns an autocast to bfloat16 if the machine multiplies it faster, else one without effect."""
    on_cpu = device == "cpu"
    enabled = multiplies_bfloat16() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)


def learning_rate(step: int, progress: float) -> float:
    """Computes the learning rate: linear warm-up over 100 steps, times half a cosine over the run.

    ``progress`` is the share of the run that is done, 0 to 1.
    """
    return PEAK * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model: nn.Module, fused: bool = True) -> torch.optim.AdamW:
    """Makes an AdamW that decays matrices only; the learning rate is set at every step."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)


class Job(Protocol):
    """A model with its data and losses: everything of a training but the loop.

    ``module`` holds all parameters; ``phases`` are names with shares of the run that sum to 1. A checkpoint
    belongs to the job if its ``settings`` are equal. ``memory`` is the state between steps that a checkpoint
    must keep (JSON).
    """

    settings: dict[str, Any]
    memory: dict[str, Any]

    @property
    def module(self) -> nn.Module: ...

    @property
    def phases(self) -> Sequence[tuple[str, float]]: ...

    def loss(self, phase: str, place: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of step ``place`` of a phase, and figures to report.

        Data and random choices are functions of these arguments and of ``memory`` alone.
        """
        ...


@dataclass
class Position:
    """The progress of a run. ``averages`` are of reported figures, over about the last hundred steps."""

    step: int = 0
    seconds: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)  # by phase
    averages: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    planned: list[str] = field(default_factory=list)  # lengths that were asked for, one after the other

    def note(self, phase: str, figures: dict[str, Tensor]) -> None:
        """Adds a step's figures to the averages, except those that are not finite (a mean over nothing)."""
        for name, value in figures.items():
            now, past = float(value), self.averages.get(f"{phase} {name}")
            if math.isfinite(now):
                self.averages[f"{phase} {name}"] = now if past is None else 0.98 * past + 0.02 * now

    def line(self, phase: str, done: float) -> str:
        """Formats a line of progress; ``done`` is a share of the run."""
        shown = {k.split()[1]: round(v, 3) for k, v in self.averages.items() if k.startswith(phase)}
        return (
            f"{phase} step {self.step} ({100 * done:.0f} %) {shown}, {self.seconds / 60:.1f} min, "
            f"{self.seconds * max(0, 1 / done - 1) / 60:.1f} min left"
        )


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, position: Position,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Writes parameters, optimizer and position as one safetensors file, atomically."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_path(path) as partial:
        text = {"position": json.dumps(asdict(position)), "settings": json.dumps(settings)}
        save_file(tensors, partial, metadata=text)


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Position:
    """Restores parameters and optimizer from a checkpoint; refuses one of other settings."""
    with safe_open(path, framework="pt") as file:
        text = file.metadata()
        found, expected = json.loads(text["settings"]), json.loads(json.dumps(settings))
        if found != expected:
            unlike = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            raise DataError(
                f"{path}: a checkpoint of a run with other {', '.join(unlike)} "
                f"({', '.join(str(found.get(k)) for k in unlike)}; asked for "
                f"{', '.join(str(expected.get(k)) for k in unlike)}); give the same options to continue it, "
                "or delete it"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k[0] == "m"})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Position(**json.loads(text["position"]))


@cache
def maker_code() -> str:
    """Hash of the code that decides what a maker trains: makers and students, without docstrings.

    A checkpoint holds it: after a change of a loss, the weights of the loss before are neither continued
    nor taken for the result.
    """
    home = Path(__file__).parents[1]
    sources = [*sorted((home / "make").glob("*.py")), *sorted((home / "students").glob("*.py"))]
    return digest([[path.name, code_of(path)] for path in sources if path.name not in APART])


def phase_at(phases: Sequence[tuple[str, float]], progress: float) -> str:
    """Returns the phase of a run after a share of it is done."""
    total = 0.0
    for name, share in phases:
        total += share
        if progress < total - 1e-9:
            return name
    return phases[-1][0]


def train(job: Job, checkpoint: Path, steps: int | None, minutes: float) -> Position:
    """Trains a job to its end, from its checkpoint where there is one.

    Phases and learning rate follow the share that is done of a number of ``steps`` (then the result is a
    function of the settings), or of ``minutes``. A continuation may have another number than the start.

    Args:
        job: what is trained.
        checkpoint: file to continue from and to write every ``SAVE_EVERY`` seconds.
        steps: of the whole run, or None for
        minutes: of the processor's time (on a GPU, of the clock's).

    Raises:
        DataError: the checkpoint is of other settings or other code, or of more steps.
        FloatingPointError: a loss or a gradient is not finite.
        ValueError: the length is not above 0.
    """
    if not 0 < (minutes if steps is None else steps) < math.inf:
        raise ValueError(f"steps={steps}, minutes={minutes}: expected a length above 0")
    module = job.module.train()
    optimizer = make_optimizer(module)
    settings = job.settings | {"code": maker_code()}
    position = Position(memory=job.memory)
    if checkpoint.is_file():
        position = load_checkpoint(checkpoint, module, optimizer, settings)
        job.memory = position.memory
        log.info("continues at step %d, after %.0f s", position.step, position.seconds)
    if steps is not None and position.step > steps:
        raise DataError(
            f"{checkpoint}: is at step {position.step}, beyond steps={steps}; delete it to begin anew"
        )
    # On a CPU its own time counts, not the wall's: other work beside it slows a run down but does not
    # shorten it. (With several threads their times add up. A GPU's work is not in the process's time.)
    clock = time.monotonic if next(module.parameters()).is_cuda else time.process_time
    began = clock() - position.seconds
    logged = saved = time.monotonic()

    def progress() -> float:
        return position.step / steps if steps is not None else position.seconds / (60 * minutes)

    length = f"{minutes:g} minutes" if steps is None else f"{steps} steps"
    if progress() < 1 and length not in position.planned[-1:]:
        position.planned.append(length)
    while (share := progress()) < 1:
        phase = phase_at(job.phases, share)
        _update(job, phase, optimizer, position, share)
        now = time.monotonic()
        position.seconds = clock() - began
        done = progress()
        if now - logged > LOG_EVERY or done >= 1:
            logged = now
            log.info("%s", position.line(phase, done))
        if now - saved > SAVE_EVERY or done >= 1:
            saved = now
            save_checkpoint(checkpoint, module, optimizer, position, settings)
    return position


def _update(job: Job, phase: str, optimizer: torch.optim.Optimizer, position: Position, share: float) -> None:
    """Takes one step of a phase and advances ``position``. Raises FloatingPointError for a bad loss."""
    place = position.steps.get(phase, 0)
    loss, figures = job.loss(phase, place, share)
    if not loss.isfinite():
        raise FloatingPointError(f"step {position.step} ({phase}): the loss is {float(loss.detach())}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(position.step, share)
    step_safely(optimizer, job.module, f"step {position.step} ({phase})")
    position.note(phase, figures)
    position.step += 1
    position.steps[phase] = place + 1


def step_safely(optimizer: torch.optim.Optimizer, module: nn.Module, where: str) -> None:
    """Takes a step along gradients of a norm of at most 1; FloatingPointError if it is not finite."""
    norm = nn.utils.clip_grad_norm_(list(module.parameters()), 1.0)
    if not norm.isfinite():
        raise FloatingPointError(f"{where}: the gradient is {float(norm)}")
    optimizer.step()


def provenance(made_by: Callable[..., Any], corpus: str, job: Job, position: Position) -> dict[str, Any]:
    """Describes how a finished model was made, for the file beside its weights.

    ``planned`` is there if a run was continued with another length: its phases had other shares then.
    """
    planned = {"planned": position.planned} if len(position.planned) > 1 else {}
    return {
        "made_by": f"{made_by.__module__}.{made_by.__qualname__}", "corpus": corpus, **job.settings,
        "peak_learning_rate": PEAK, "steps": position.steps, **planned,
        "minutes": round(position.seconds / 60, 1),
        "final": {name: round(value, 3) for name, value in position.averages.items()},
        "machine": machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Describes the machine on which a model is made."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    described = {
        "processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "bfloat16": multiplies_bfloat16(),
    }  # fmt: skip
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def check_weights(folder: Path) -> None:
    """Raises DataError if a folder's weights are not those that its provenance tells of."""
    made = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    weights = next(folder.glob("*.safetensors"))
    if "sha256" in made and made["sha256"] != file_digest(weights):
        raise DataError(f"{weights}: not the weights of provenance.json (sha256); make them with tdlib.make")


def note_figures(folder: Path, figures: dict[str, Any], command: str = "") -> None:
    """Adds held-out figures, the weights' checksum and the command to a model folder's provenance."""
    path = folder / "provenance.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    weights = next(folder.glob("*.safetensors"))
    made |= {"held_out": figures, "weights": weights.name, "sha256": file_digest(weights)}
    write_json(path, made | ({"command": command} if command else {}))
