"""The process that executes one run: ``python -m tdlib.runs.worker RUN_FOLDER [LOCK]``.

Its main thread watches (heartbeat, limits, requests to stop, the runner's life), another executes the
notebook by papermill. It ends when its runner does, and takes the kernel with it.
"""

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from tdlib.core.files import flat, visible_files, write_json
from tdlib.core.provenance import git_version
from tdlib.runs import states as run_states
from tdlib.runs.checks import difference_reason, differences
from tdlib.runs.engines import BUSY
from tdlib.runs.notebook import ANSI, execute, scratch_folder
from tdlib.runs.states import LOG, NOTEBOOK, OUTPUT
from tdlib.runs.template import read_template

TICK = 0.25  # seconds between looks at the run
_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large"
    r"|unexpected pos \d+ vs \d+|PytorchStreamWriter failed"  # what torch.save says of it
)


class _Attempt:
    """One attempt at a run: what the executing and the watching thread share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spec = json.loads((folder / run_states.PARAMETERS).read_text(encoding="utf-8"))
        self.limits = self.spec["resources"]
        self.process: subprocess.Popen | None = None  # the kernel
        self.parent = int(os.environ.get(run_states.RUNNER) or os.getppid())
        self.began = time.monotonic()
        self.peak = 0
        self.scratch = scratch_folder()
        self.verdict: tuple[str, str] | None = None  # state and reason, if the watching thread ends it
        self.outcome: dict[str, Any] | None = None  # what the executing thread came to
        self._beat = 0.0
        self.state: dict[str, Any] = {
            "state": "running", "run": self.spec["identity"]["id"], "attempt": self.spec["attempt"],
            "host": socket.gethostname(), "pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "started": time.time(), "scratch": str(self.scratch),
        }  # fmt: skip

    # The executing thread.

    def execute(self) -> None:
        try:
            self.outcome = self._execute()
        except BaseException as error:
            self.outcome = _failure_of(error)

    def _execute(self) -> dict[str, Any]:
        template = read_template(Path(self.spec["template"]))
        now = run_states.identity(template, self.spec["parameters"], self.spec["output"])
        planned = self.spec["identity"]
        if changed := [name for name in planned if name != "id" and now[name] != planned[name]]:
            return {
                "state": "failed",
                "reason": f"{', '.join(changed)} changed since the batch was started; start it again: "
                "changed runs get new folders",
            }
        write_json(self.folder / "environment.json", describe_machine())
        # Without this jsonschema would spend 0.8 s on a grammar of IRIs, which no notebook's schema uses.
        sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
        from nbclient.exceptions import DeadKernelError
        from papermill import PapermillExecutionError

        def launched(process: subprocess.Popen | None) -> None:
            self.process = process

        parameters = dict(self.spec["overrides"])
        if self.spec["output"]:
            parameters[self.spec["output"]] = str(self.folder / OUTPUT)
        checked = self.scratch / "template.ipynb"
        checked.write_bytes(template.content)  # what was hashed above: the file may change meanwhile
        try:
            executed = execute(
                checked, self.folder / f".{NOTEBOOK}", parameters, self.scratch, launched,
                progress_bar=False, start_timeout=300, stdout_file=sys.stdout, stderr_file=sys.stderr,
            )  # fmt: skip
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback)
            return _failure(error.ename, str(error.evalue), trace, error.cell_index, error.source)
        except (DeadKernelError, RuntimeError) as error:
            return self._dead_kernel(error)
        not_executed = [
            index
            for index, cell in enumerate(executed.cells)
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None
        ]
        if not_executed:
            return {"state": "failed", "reason": f"the notebook left off before cell {not_executed[0]}"}
        if lines := differences(template, self.spec["parameters"], self.folder / OUTPUT):
            return {"state": "failed", "reason": difference_reason(lines)}
        return {"state": "done"}

    def _dead_kernel(self, error: Exception) -> dict[str, Any]:
        """Tells a kernel that was killed from outside from one that crashed or left, which has failed."""
        code = None
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(5)
        if code is None or (code == 0 and "died" not in str(error)):
            return _failure_of(error)
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        outside = code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return {
            "state": "killed" if outside else "failed",
            "reason": f"the kernel ended with {name}{self._place()}{hint}",
        }

    def _place(self) -> str:
        """Names the cell that was begun last, according to the notebook as papermill saved it."""
        with suppress(OSError, ValueError, KeyError):
            cells = json.loads((self.folder / f".{NOTEBOOK}").read_text(encoding="utf-8"))["cells"]
            begun = [i for i, c in enumerate(cells) if c["metadata"].get("papermill", {}).get("start_time")]
            return f" in cell {begun[-1]}" if begun else " before the first cell"
        return ""

    # The watching thread.

    def watch(self) -> None:
        """Measures memory once, ends the run if there is a reason, else renews the heartbeat."""
        used = self._memory()
        if 0 < self.limits["memory"] < used:  # counted exactly, which takes longer
            used = self._memory(shared_once=True)
        self.peak = max(self.peak, used)
        if self.verdict is None:
            limit, memory = self.limits["time"], self.limits["memory"]
            if os.getppid() != self.parent:  # an orphan would hold processors that nobody counts
                self.verdict = "killed", "its runner ended"
            elif (self.folder / "stop").exists():
                self.verdict = "killed", "cancelled"
            elif time.monotonic() - self._beat > run_states.HEARTBEAT and self.taken_over():
                self.verdict = "lost", "another worker has taken the run over"
            elif limit and time.monotonic() - self.began > limit:
                self.verdict = "timed_out", f"its time limit of {limit:g} s passed"
            elif memory and used > memory:
                self.verdict = "killed", f"it used {used / 2**30:.2f} GiB of memory, more than its limit"
        if self.verdict is not None:
            self.end_kernel()
        elif time.monotonic() - self._beat > run_states.HEARTBEAT:
            self._beat = time.monotonic()
            with suppress(OSError):  # a full disk must not end a run that writes nothing
                self.write({"heartbeat": time.time(), "peak_memory": self.peak})

    def _memory(self, shared_once: bool = False) -> int:
        """Sums the resident bytes of this process and all below it.

        Pages that they share, as loader processes share the data they were forked with, count for each of
        them, or once with ``shared_once`` (where the system tells; Linux does).
        """
        total = 0
        with suppress(psutil.Error):
            own = psutil.Process()
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.Error):
                    used = process.memory_full_info() if shared_once else process.memory_info()
                    total += getattr(used, "pss", used.rss)
        return total

    def end_kernel(self) -> None:
        """Kills the kernel, its process group and all below this process."""
        with suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
        if self.process is not None:
            with suppress(OSError):
                # The kernel leads its process group, which survives its leader.
                os.killpg(self.process.pid, signal.SIGKILL)

    def taken_over(self) -> bool:
        """True if another attempt has begun, as where this one was cut off from the files for a while."""
        with suppress(OSError, ValueError, KeyError):
            spec = json.loads((self.folder / run_states.PARAMETERS).read_text(encoding="utf-8"))
            return spec["attempt"] > self.spec["attempt"]
        return False

    def write(self, more: dict[str, Any]) -> None:
        self.state |= more
        run_states.write_state(self.folder, self.state)

    def conclude(self) -> str:
        """Renames the notebook, reads the metrics and writes the state last; returns the final state."""
        final: dict[str, Any] = self.outcome or {"state": "killed", "reason": "its kernel did not answer"}
        if self.verdict is not None and final["state"] != "done":
            final = {"state": self.verdict[0], "reason": self.verdict[1]}
        partial = self.folder / f".{NOTEBOOK}"
        try:
            if partial.exists():
                os.replace(partial, self.folder / NOTEBOOK)
            if final["state"] == "done":
                final["metrics"] = read_metrics(self.folder / OUTPUT)
        except OSError as error:
            final = _failure_of(error)
        except ValueError as error:
            final = {"state": "failed", "reason": str(error)}
        # Also what a kernel used between two looks; Linux counts in KiB, macOS in bytes.
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        self.peak = max(self.peak, largest * (1 if sys.platform == "darwin" else 1024))
        self.write(
            {"ended": time.time(), "heartbeat": time.time(), "peak_memory": self.peak,
             "seconds": round(time.monotonic() - self.began, 2),
             "files": run_states.file_sizes(self.folder), **final}
        )  # fmt: skip
        return final["state"]


def _failure(name: str, value: str, trace: str, cell: int | None = None, source: str = "") -> dict[str, Any]:
    """The state after an error: "killed" where the disk was full, so that it is repeated, else "failed"."""
    value, trace = ANSI.sub("", value), ANSI.sub("", trace)[-8000:]
    full = bool(_DISK_FULL.search(value))
    return {
        "state": "killed" if full else "failed",
        "reason": f"{'the disk is full: ' if full else ''}{name}: {value}",
        "error": {"name": name, "value": value, "cell": cell, "source": source, "traceback": trace},
    }


def _failure_of(error: BaseException) -> dict[str, Any]:
    return _failure(type(error).__name__, str(error), "".join(traceback.format_exception(error)))


def read_metrics(output: Path) -> dict[str, Any]:
    """Reads all numbers and words of the ``metrics.json`` files in a run's output; dots join nested names.

    Where there are several, the names of their folders come first. ValueError where a file is not whole.
    """
    metrics: dict[str, Any] = {}
    paths = visible_files(output, "metrics.json")
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is not whole JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected an object with metrics, found {type(values).__name__}")
        leaves = flat(values, path.parent.name if len(paths) > 1 else "")
        metrics |= {n: v for n, v in leaves.items() if v is None or isinstance(v, bool | int | float | str)}
    return metrics


def describe_machine() -> dict[str, Any]:
    """Describes this machine and the installed packages: the content of ``environment.json``."""
    packages = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {
        "host": socket.gethostname(), "python": platform.python_version(), "platform": platform.platform(),
        "commit": git_version(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": os.environ.get("OMP_NUM_THREADS"), "packages": dict(sorted(packages.items())),
    }  # fmt: skip


def work(folder: Path) -> str:
    """Executes the run of a claimed folder; returns its final state."""
    attempt = _Attempt(folder)

    def stop(number: int, frame: Any) -> None:
        attempt.verdict = attempt.verdict or ("killed", f"stopped ({signal.Signals(number).name})")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    (folder / OUTPUT).mkdir(exist_ok=True)
    attempt.write({"heartbeat": time.time()})
    thread = Thread(target=attempt.execute, daemon=True)
    thread.start()
    patience = 20.0  # seconds that the executing thread has left once the run is to end
    while thread.is_alive() and patience > 0:
        thread.join(TICK)
        attempt.watch()
        patience -= TICK if attempt.verdict else 0
    attempt.end_kernel()
    shutil.rmtree(attempt.scratch, ignore_errors=True)
    if attempt.taken_over():  # the folder is the other's
        return "lost"
    return attempt.conclude()


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    if len(arguments) > 1:
        # A kernel that outlives this process must not keep the claim.
        os.set_inheritable(int(arguments[1]), False)
    else:
        until = time.monotonic() + 3  # whoever looks at a run holds its lock for a moment
        while run_states.claim(folder) is None:
            if time.monotonic() > until:
                return BUSY
            time.sleep(TICK)
        spec = json.loads((folder / run_states.PARAMETERS).read_text(encoding="utf-8"))
        if spec["attempt"] != run_states.next_attempt(folder):
            return BUSY  # another worker has executed and ended this attempt since it was ordered
        run_states.clear_for_attempt(folder)
    state = work(folder)
    print(f"{LOG}: {state}", flush=True)
    return 0 if state == "done" else 1


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a stuck thread must not keep the lock
