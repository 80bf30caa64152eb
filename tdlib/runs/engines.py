"""Engines execute runs on this machine or on a Ray cluster; they lease processors, memory and GPUs.

An engine starts a worker process for a run folder and can stop it. How the run ended is read from its
state, not from the engine. A run learns its GPUs from CUDA_VISIBLE_DEVICES, which is empty for runs
without one.
"""

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

import psutil
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tdlib.core.devices import usable_cores
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs import states as run_states

BUSY = 75  # exit status (EX_TEMPFAIL) of a worker whose run another worker has claimed
ELSEWHERE = "another worker has the run"


_UNITS = {"": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
_TIMES = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _quantity(units: Mapping[str, float]) -> BeforeValidator:
    def number(value: Any) -> float:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        unit = match[2].lower().replace("ib", "b") if match else ""
        if not match or unit not in units:
            raise ValueError("no quantity")
        return float(match[1]) * units[unit]

    return BeforeValidator(number)


def _whole_or_part(gpus: float) -> float:
    if gpus > 1 and gpus % 1:
        raise ValueError("no whole number")
    return gpus


class Resources(BaseModel):
    """Limits of one run, as a batch file's ``resources`` gives them, with or without units.

    Memory is in bytes, time in seconds; 0 is no limit. A field's description says what an error expects.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: Annotated[float, _quantity({"": 1})] = Field(default=1, gt=0, description="a number above 0")
    gpus: Annotated[float, _quantity({"": 1}), AfterValidator(_whole_or_part)] = Field(
        default=0, description="a whole number, or a part of one GPU"
    )
    memory: Annotated[float, _quantity(_UNITS)] = Field(
        default=0, description="bytes, or a number and one of KB, MB, GB, TB"
    )
    time: Annotated[float, _quantity(_TIMES)] = Field(
        default=0, description="seconds, or a number and one of s, m, min, h, d"
    )


class Started(Protocol):
    """A worker that an engine has started."""

    def ended(self) -> bool: ...

    def ending(self) -> str:
        """Says how it ended, in words; ``ELSEWHERE`` if another worker has claimed the run."""

    def stop(self) -> None:
        """Asks it to end the run and to write that in its state."""

    def kill(self) -> None:
        """Kills it and its children at once."""


def _status_words(status: int) -> str:
    if status == BUSY:
        return ELSEWHERE
    return f"it ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"


class Engine(Protocol):
    """Starts workers."""

    claims: bool  # True if the worker inherits the runner's claim; else it claims for itself

    def check(self, wanted: Resources) -> list[str]:
        """Lists the resources that it could never give to a run."""

    def at_once(self, wanted: Resources) -> int:
        """Returns how many such runs it executes at the same time."""

    def has_room(self, wanted: Resources) -> bool: ...

    def start(self, folder: Path, wanted: Resources, lock: int | None) -> Started: ...

    def close(self) -> None: ...


def worker_environment(folder: Path, wanted: Resources, gpus: str) -> dict[str, str]:
    """Makes a worker's environment variables: libraries use as many threads as the run has processors."""
    threads = str(max(1, int(wanted.cpus)))
    # JPY_* tell a kernel who its parent is: a batch that is started in a notebook must not pass them on.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JPY_")}
    return inherited | {
        run_states.MARK: str(folder.resolve()), run_states.RUNNER: str(os.getpid()),
        "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }  # fmt: skip


def visible_gpus() -> list[str]:
    """Names the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=20)
        return [str(n) for n, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
    return []


class GpuLeases:
    """Shares GPUs among the runs of one runner, and locks those in use against other runners here."""

    # Of this user on this machine, whatever checkout a runner is started from.
    folder = Path(tempfile.gettempdir()) / f"tdlib-gpus-{os.getuid()}"

    def __init__(self, gpus: Sequence[str]):
        self.free = dict.fromkeys(gpus, 1.0)
        self._locks: dict[str, int] = {}

    def take(self, share: float) -> list[str] | None:
        """Leases GPUs and names them: none for no share, one for a fraction; None if too few are free."""
        if share <= 0:
            return []
        count, part = (1, share) if share < 1 else (round(share), 1.0)
        fitting = [gpu for gpu, free in self.free.items() if free + 1e-9 >= part]
        fitting.sort(key=lambda gpu: self.free[gpu])  # fill a GPU that is in use before opening another
        taken: list[str] = []
        for gpu in fitting:
            if len(taken) < count and self._lock(gpu):
                taken.append(gpu)
                self.free[gpu] -= part
        if len(taken) < count:
            self.give_back(taken, share)
            return None
        return taken

    def give_back(self, gpus: Sequence[str], share: float) -> None:
        for gpu in gpus:
            self.free[gpu] = min(1.0, self.free[gpu] + min(share, 1.0))
            if self.free[gpu] > 1 - 1e-6:
                self.free[gpu] = 1.0
                os.close(self._locks.pop(gpu))

    def _lock(self, gpu: str) -> bool:
        if gpu in self._locks:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / f"{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if not run_states.take_lock(lock):
            os.close(lock)
            return False
        self._locks[gpu] = lock
        return True

    def any_free(self, share: float) -> bool:
        """True if ``take`` would give such a share now."""
        if (gpus := self.take(share)) is not None:
            self.give_back(gpus, share)
        return gpus is not None


class LocalEngine:
    """Starts worker processes on this machine, as many at once as their resources allow.

    Args:
        cpus: processors to use; all that this process may use if None.
        gpus: GPUs to use, as CUDA_VISIBLE_DEVICES names them; all that are visible if None.

    Raises:
        ConfigError: cpus or gpus that this machine does not have: runs would train on the processor.
    """

    claims = True

    def __init__(self, cpus: float | None = None, gpus: Sequence[str] | None = None):
        self.cpus = usable_cores() if cpus is None else cpus
        if not 0 < self.cpus < math.inf:
            raise ConfigError(f"cpus={cpus}: expected a number above 0")
        self.memory = psutil.virtual_memory().total
        there = visible_gpus()
        self.gpus = list(dict.fromkeys(there if gpus is None else gpus))
        # A GPU or a part of one can also be named by its identifier ("GPU-...", "MIG-...").
        if unknown := [gpu for gpu in self.gpus if gpu not in there and not (there and "-" in gpu)]:
            raise ConfigError(
                f"gpus={','.join(self.gpus)}: there is no {', '.join(unknown)}; this machine has "
                f"{', '.join(there) or 'none'}"
            )
        self.leases = GpuLeases(self.gpus)
        self.free_cpus, self.free_memory = self.cpus, self.memory
        self.command = [sys.executable, "-m", "tdlib.runs.worker"]

    def check(self, wanted: Resources) -> list[str]:
        limits = (
            ("cpus", wanted.cpus, self.cpus), ("gpus", wanted.gpus, len(self.gpus)),
            ("memory, in GiB", wanted.memory / 2**30, self.memory / 2**30),
        )  # fmt: skip
        return [
            f"resources.{name}: {needed:.4g}, but this machine has {there:.4g} to give"
            for name, needed, there in limits
            if needed > there
        ]

    def at_once(self, wanted: Resources) -> int:
        rooms = [self.cpus / wanted.cpus]
        if wanted.memory:
            rooms.append(self.memory / wanted.memory)
        if wanted.gpus:  # no run has parts of two GPUs
            each = int(1 / wanted.gpus + 1e-9)
            rooms.append(len(self.gpus) * each if each else len(self.gpus) / wanted.gpus)
        return max(1, int(min(rooms) + 1e-9))

    def has_room(self, wanted: Resources) -> bool:
        room = self.free_cpus + 1e-9 >= wanted.cpus and self.free_memory >= wanted.memory
        return room and self.leases.any_free(wanted.gpus)

    def start(self, folder: Path, wanted: Resources, lock: int | None) -> "LocalWorker":
        """Starts a worker, which inherits the claim; BlockingIOError where no GPU is free now."""
        gpus = self.leases.take(wanted.gpus)
        if gpus is None:
            raise BlockingIOError("no GPU is free")
        try:
            with (folder / run_states.LOG).open("ab") as log:
                process = subprocess.Popen(
                    [*self.command, str(folder), *([] if lock is None else [str(lock)])],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=worker_environment(folder, wanted, ",".join(gpus)), start_new_session=True,
                    pass_fds=[] if lock is None else [lock],
                )  # fmt: skip
        except BaseException:
            self.leases.give_back(gpus, wanted.gpus)
            raise
        self.free_cpus -= wanted.cpus
        self.free_memory -= wanted.memory
        return LocalWorker(self, folder, wanted, process, gpus)

    def close(self) -> None:
        pass


class LocalWorker:
    """A worker process on this machine and what it has leased."""

    def __init__(
        self, engine: LocalEngine, folder: Path, wanted: Resources, process: subprocess.Popen, gpus: list[str]
    ):
        self.engine, self.folder, self.wanted, self.process, self.gpus = engine, folder, wanted, process, gpus
        self._held = True

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        if self._held:
            self._held = False
            run_states.end_processes(self.folder)  # a killed worker leaves its kernel behind
            self.engine.leases.give_back(self.gpus, self.wanted.gpus)
            self.engine.free_cpus += self.wanted.cpus
            self.engine.free_memory += self.wanted.memory
        return True

    def ending(self) -> str:
        return _status_words(self.process.wait())

    def stop(self) -> None:
        with suppress(OSError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        run_states.end_processes(self.folder)
        self.process.wait()


def _on_node(folder: Path, wanted: Resources) -> int:
    """Runs one worker process as a task of a Ray cluster; returns its exit status."""
    import ray

    gpus = ",".join(str(gpu) for gpu in ray.get_gpu_ids()) if wanted.gpus else ""
    with (folder / run_states.LOG).open("ab") as log:
        return subprocess.run(
            [sys.executable, "-m", "tdlib.runs.worker", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=worker_environment(folder, wanted, gpus),
        ).returncode  # fmt: skip


class RayEngine:
    """Starts workers on the nodes of a Ray cluster, which share the project's folder and its environment.

    Ray's own retries are off, because they would repeat a run that is out of memory three times: a batch's
    ``retries`` count.

    Args:
        address: of the cluster, as ``ray.init`` takes it; "" starts one on this machine.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    claims = False

    def __init__(self, address: str = "", **options: Any):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "engine 'ray' needs the extra 'ray': pip install 'clip-td-workbench[ray]'"
            ) from None
        self.ray, self._own = ray, not ray.is_initialized()
        if self._own:
            try:
                ray.init(
                    address=address or None, log_to_driver=False, include_dashboard=False,
                    configure_logging=False, **options,
                )  # fmt: skip
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"--address {address}: no Ray cluster answers ({error})") from None
        self.active = 0

    def check(self, wanted: Resources) -> list[str]:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        needs = self._needs(wanted)
        if any(all(node.get(name, 0) >= need for name, need in needs.items()) for node in nodes):
            return []
        return [f"resources: no node of the Ray cluster has {needs}"]

    @staticmethod
    def _needs(wanted: Resources) -> dict[str, float]:
        needs = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": wanted.memory}
        return {name: need for name, need in needs.items() if need}

    def at_once(self, wanted: Resources) -> int:
        total = self.ray.cluster_resources()
        rooms = [total.get(name, 0) / need for name, need in self._needs(wanted).items()]
        return max(1, int(min(rooms) + 1e-9))

    def has_room(self, wanted: Resources) -> bool:
        return self.active < self.at_once(wanted)

    def start(self, folder: Path, wanted: Resources, lock: int | None) -> "RayWorker":
        options: dict[str, Any] = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "max_retries": 0}
        if wanted.memory:
            options["memory"] = int(wanted.memory)
        task = self.ray.remote(_on_node).options(**options)
        self.active += 1
        return RayWorker(self, folder, task.remote(folder, wanted))

    def close(self) -> None:
        if self._own:
            self.ray.shutdown()


class RayWorker:
    """A worker on some node; a file in the shared folder asks it to stop, as signals reach no other node."""

    def __init__(self, engine: RayEngine, folder: Path, task: Any):
        self.engine, self.folder, self.task, self._held = engine, folder, task, True

    def ended(self) -> bool:
        ready, _ = self.engine.ray.wait([self.task], timeout=0)
        if ready and self._held:
            self._held = False
            self.engine.active -= 1
        return bool(ready)

    def ending(self) -> str:
        try:
            return _status_words(self.engine.ray.get(self.task))
        except Exception as error:  # Ray raises errors of many kinds for a task that died with its node
            lines = str(error).strip().splitlines()  # of a task that raised, the last one says what
            return f"Ray says: {type(error).__name__}: {lines[-1] if lines else ''}"

    def stop(self) -> None:
        (self.folder / "stop").touch()
        with suppress(Exception):  # a task that still waits in Ray must never start
            self.engine.ray.cancel(self.task, force=False)

    def kill(self) -> None:
        (self.folder / "stop").touch()
        with suppress(Exception):
            self.engine.ray.cancel(self.task, force=True)


ENGINES = {"local": LocalEngine, "ray": RayEngine}
