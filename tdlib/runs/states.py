"""A run of a batch as a folder: its identity, the claim of the worker that executes it, and its state.

Knows nothing of notebooks' execution, engines or tables. ``state.json`` is the truth about a run,
whatever the notebook says; it is written last. Needs POSIX (flock).
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tdlib.config import parameters_with
from tdlib.core.files import remove_tree, sync, whole_path
from tdlib.core.provenance import code_version, digest
from tdlib.runs.template import Template
from tdlib.training.checkpoints import HOME as CHECKPOINTS
from tdlib.training.checkpoints import UNEVALUATED
from tdlib.training.provenance import data_manifest

# queued: not begun. running: a worker executes it. done: finished. failed: a cell raised, or the files
# written are no result. killed: stopped from outside (signal, out of memory, disk full, cancelled).
# timed_out: over its time limit. lost: its worker ended without writing a state, or files are damaged.
STATES = ("queued", "running", "done", "failed", "killed", "timed_out", "lost")
FINAL = ("done", "failed", "killed", "timed_out", "lost")

HEARTBEAT = 5.0  # seconds between heartbeats of a running run
STALE = 60.0  # seconds without one after which a worker elsewhere counts as dead: twelve were missed
MARK = "TDLIB_RUN"  # environment variable of every process of a run: the run's folder
RUNNER = "TDLIB_RUNNER"  # environment variable with the process id of the runner that started a worker
NOTEBOOK, LOG, OUTPUT, PARAMETERS = "notebook.ipynb", "log.txt", "output", "parameters.json"

# Identity: what a result depends on.


def identity(
    template: Template, parameters: dict[str, Any], output: str = "", code: str | None = None
) -> dict[str, str]:
    """Hashes all that results depend on: "parameters", "template", "data", "code", and "id" of these.

    Args:
        template: its code counts (``Template.code``). The library's sources count where it uses them.
        parameters: all of them, defaults included.
        output: name of the parameter that says where results go, which does not count; neither do
            ``interactive`` and the parameters of the machine (``RunConfig``'s roles), such as
            ``loader_workers`` and ``checkpoint_every``.
        code: the library's ``code_version``; computed if None.
    """
    apart = (output, "interactive", *parameters_with(role="machine"))
    counted = {name: value for name, value in parameters.items() if name not in apart}
    library = any("tdlib" in source for source in template.sources)
    parts = {
        "parameters": digest(counted),
        "template": template.code,
        "data": digest(data_manifest(counted)),
        "code": (code or code_version()) if library else "",
    }
    return {"id": digest(parts)[:12], **parts}


# Claim: the holder of the lock owns the run. The kernel frees the lock when the owner dies, however it
# dies, so no stale lock file has to be judged.


def claim(folder: Path) -> int | None:
    """Claims a run; returns the lock's file descriptor, or None if another process holds it.

    The lock lasts as long as any process has the descriptor open: a worker inherits it from its runner.

    Raises:
        OSError: nobody can claim it: the folder is read-only, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if take_lock(lock):
            return lock
    except OSError as error:
        os.close(lock)
        raise OSError(
            error.errno, f"its file system cannot lock files ({error.strerror})", str(folder)
        ) from None
    os.close(lock)
    return None


def take_lock(lock: int, shared: bool = False) -> bool:
    """Locks an open file; False if another process has locked it. OSError where the system has no locks."""
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second from some network file systems
        return False
    return True


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Claims a run for a ``with`` block; yields False if another process holds it."""
    lock = claim(folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def unclaimed(folder: Path) -> Iterator[bool]:
    """Yields True, and keeps others from claiming the run, if none has; writes nothing, to look at a run."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    free = True
    try:
        with suppress(OSError):
            free = take_lock(lock, shared=True)
        yield free
    finally:
        os.close(lock)


# State.


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``state.json`` and waits until it is on the disk; on error the older one stays."""
    with whole_path(folder / "state.json") as partial:
        partial.write_text(json.dumps(state, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(partial)


def recorded_state(folder: Path) -> dict[str, Any]:
    """Reads the state as it was last written: "queued" if none was, "lost" if it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "queued"}
    except (OSError, ValueError) as error:
        return {"state": "lost", "reason": f"state.json cannot be read: {error}"}
    if not isinstance(state, dict) or state.get("state") not in STATES:
        return {"state": "lost", "reason": "state.json holds no state"}
    return state


def current_state(folder: Path) -> dict[str, Any]:
    """Returns the true state: also "lost" if the worker is dead or a finished run's files are damaged."""
    state = recorded_state(folder)
    if state["state"] == "running":
        with unclaimed(folder) as free:
            if not free:
                return state
            state = recorded_state(folder)  # read again: it may have ended before the lock was free
            if state["state"] == "running" and not is_stale(state):
                return state
        if state["state"] == "running":
            return state | {"state": "lost", "reason": "its worker is gone"}
    if state["state"] == "done" and (damage := damaged(folder, state)):
        return state | {"state": "lost", "reason": damage}
    return state


def is_stale(state: dict[str, Any]) -> bool:
    """True if the worker of a run whose lock is free is dead.

    The lock of a worker on another machine may be invisible here; there only a missing heartbeat tells.
    """
    if state.get("host") == socket.gethostname():
        return True
    return time.time() - state.get("heartbeat", 0) > STALE


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the sizes in bytes of what a run has written: its notebook and everything in ``output``."""
    files = [folder / NOTEBOOK, *sorted((folder / OUTPUT).rglob("*"))]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.is_file()}


def damaged(folder: Path, state: dict[str, Any]) -> str:
    """Compares a finished run's files with their sizes at its end; returns what is wrong, or "".

    The notebook only has to be there: whoever opens it in JupyterLab saves it, with another size. What the
    run was, in ``parameters.json``, must be readable.
    """
    try:
        json.loads((folder / PARAMETERS).read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PARAMETERS} cannot be read: {error}"
    for name, size in state.get("files", {}).items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size and name != NOTEBOOK:
            return f"{name} has {actual} bytes, expected {size}"
    return ""


def clear_for_attempt(folder: Path) -> int:
    """Makes room for an attempt and returns its number, from 1. The caller has claimed the run.

    State, log and notebook of an earlier attempt move to ``attempt-N``. Its partial output is deleted,
    except checkpoints of its trainings and trained students that were not evaluated, and every process that
    it has left behind is killed.
    """
    end_processes(folder)
    scratch = recorded_state(folder).get("scratch", "")
    if Path(scratch).name.startswith("tdlib-"):
        shutil.rmtree(scratch, ignore_errors=True)  # sockets of a kernel that was killed
    number = next_attempt(folder)
    if (folder / "state.json").exists():
        kept = folder / f"attempt-{number - 1}"
        kept.mkdir(exist_ok=True)
        # The state last: until then this attempt counts as not archived.
        for name in (NOTEBOOK, LOG, "state.json"):
            with suppress(FileNotFoundError):
                os.replace(folder / name, kept / name)
    for name in ("stop", f".{NOTEBOOK}"):
        (folder / name).unlink(missing_ok=True)
    _clear_output(folder / OUTPUT)
    return number


def _clear_output(folder: Path) -> None:
    """Removes what an attempt has written, except what the next one continues from.

    That is: checkpoints, and run folders with a trained student whose evaluation failed.
    """
    if not folder.is_dir() or folder.is_symlink():
        return remove_tree(folder)
    if (folder / UNEVALUATED).is_file():
        return
    for path in folder.iterdir():
        if path.name == CHECKPOINTS and not path.is_symlink():
            continue
        if path.is_dir() and not path.is_symlink():
            if any(path.rglob(CHECKPOINTS)) or any(path.rglob(UNEVALUATED)):
                _clear_output(path)
            else:
                remove_tree(path)
        else:
            path.unlink()


def next_attempt(folder: Path) -> int:
    """Returns the number of a new attempt, from 1."""
    earlier = [int(p.name.partition("-")[2]) for p in folder.glob("attempt-*") if (p / "state.json").exists()]
    return max(earlier, default=0) + 1 + (folder / "state.json").exists()


def reuse_finished_run(folder: Path) -> Path | None:
    """Copies the same run from another batch where it is done and whole; returns that run's folder, or None.

    A run's id hashes all that its results depend on, so the other batch's results are the same. The caller
    has claimed ``folder``, which holds nothing but what a killed runner has left. The state is written last.
    """
    for other in sorted(folder.parent.parent.glob(f"*/{folder.name}")):
        state = recorded_state(other)
        if other == folder or state["state"] != "done" or damaged(other, state):
            continue
        not_copied = shutil.ignore_patterns(".lock", "state.json", "stop", "attempt-*", "interactive")
        remove_tree(folder / OUTPUT)
        shutil.copytree(other, folder, ignore=not_copied, dirs_exist_ok=True)
        write_state(folder, state | {"adopted_from": str(other)})
        return other
    return None


# Processes.


def processes(folder: Path) -> list[psutil.Process]:
    """Finds every process of a run on this machine by its environment.

    Their parents would not tell: children of a killed worker are adopted by another process.
    """
    mark, of_run = str(folder.resolve()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                of_run.append(process)
    return of_run


def end_processes(folder: Path) -> None:
    """Kills every process of a run on this machine and waits until they are gone."""
    for _ in range(5):  # a process may start another between the look and its end
        alive = processes(folder)
        if not alive:
            return
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
