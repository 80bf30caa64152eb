"""Hands a batch's runs to an engine, collects how they ended, and reacts to Ctrl-C and cancel.

Several runners may work on one batch at a time: each run belongs to the process that has claimed it.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlib.core.files import write_json
from tdlib.runs import states as run_states
from tdlib.runs.engines import ELSEWHERE, Engine, Started
from tdlib.runs.plan import Plan, PlannedRun

POLL = 0.2  # seconds between looks at the runs


@dataclass
class _Active:
    """A run that this runner has started."""

    run: PlannedRun
    started: Started
    tries: int


class Runner:
    """Starts the runs that are in one of ``states``, until none of them waits or is active.

    ``refresh`` is called after every line of the log: when runs start and end.
    """

    def __init__(
        self, plan: Plan, folder: Path, engine: Engine, states: Sequence[str], runs: Sequence[PlannedRun],
        refresh: Callable[[], None],
    ):  # fmt: skip
        self.plan, self.folder, self.engine, self.states, self.refresh = plan, folder, engine, states, refresh
        self.waiting = {run.id: run for run in runs}
        self.active: dict[str, _Active] = {}
        self.tries: Counter[str] = Counter()
        self.left_alone: Counter[str] = Counter()  # states of runs that this command does not touch
        self.began = time.time()
        self.stopping = ""  # the reason, once nothing more is to be started
        self.interrupts = 0
        self.crowded = False  # whether it was said that there is no room for a single run

    def run(self) -> None:
        at_once = self.engine.at_once(self.plan.resources)
        self.log(f"{self.plan.name}: {len(self.waiting)} runs, at most {at_once} at once; {self.folder}")
        with self._interruptible():
            try:
                while (self.waiting and not self.stopping) or self.active:
                    # One loop for everything, without threads: an order to stop finds nothing half-started.
                    self._handle_stop_requests()
                    progressed = self._start_some() if not self.stopping else False
                    self._collect()
                    if not self.active and self.waiting and not progressed:
                        if self._all_elsewhere():
                            break
                    if self.active or self.waiting:
                        time.sleep(POLL)
            finally:
                # Some are active here only after an error in this loop: without it they would be orphans.
                for active in self.active.values():
                    active.started.kill()
        self._log_left_alone()
        if self.stopping:
            self.log(f"stopped: {self.stopping}; `tdlib batch resume` goes on")

    def _start_some(self) -> bool:
        """Starts what there is room for; returns True if anything changed."""
        changed = False
        for run in list(self.waiting.values()):
            if not self.engine.has_room(self.plan.resources):
                if not self.active and not self.crowded:
                    self.crowded = True
                    self.log("waits: other runners here use the GPUs")
                break
            try:
                changed |= self._start(run)
            except BlockingIOError:
                break
            except OSError as error:  # such as a full disk, which the next run would meet too
                self.stopping = f"{run.id} could not be started: {error}"
                break
        return changed

    def _start(self, run: PlannedRun) -> bool:
        folder = self.folder / run.id
        # What was tried here may be tried again if it was killed, but not if another runner has done it.
        wanted = (*self.states, "killed", "lost") if self.tries[run.id] else self.states
        recorded = run_states.recorded_state(folder)["state"]
        if recorded not in (*wanted, "running", "done"):  # without a lock, which would make a folder
            return self._leave(run, recorded)
        lock = run_states.claim(folder)
        if lock is None:
            return False
        try:
            state = run_states.recorded_state(folder)
            if state["state"] == "running":  # its worker no longer holds the lock
                if not run_states.is_stale(state):
                    return False
                state = {"state": "lost"}
            elif state["state"] == "done" and run_states.damaged(folder, state):
                state = {"state": "lost"}
            if state["state"] not in wanted:
                return self._leave(run, state["state"])
            if state["state"] == "queued" and (other := run_states.reuse_finished_run(folder)):
                del self.waiting[run.id]
                self.log(f"{run.id} done: the same run as in batch {other.parent.name}")
                return True
            if self.engine.claims:
                attempt = run_states.clear_for_attempt(folder)
            else:
                attempt = run_states.next_attempt(folder)
                (folder / "stop").unlink(missing_ok=True)
            write_json(folder / run_states.PARAMETERS, specification(self.plan, run, attempt))
            if not self.engine.claims:
                os.close(lock)  # a worker on another machine cannot inherit it and claims the run itself
                lock = None
            started = self.engine.start(folder, self.plan.resources, lock)
        finally:
            if lock is not None:
                os.close(lock)  # the worker has inherited it and holds the claim
        del self.waiting[run.id]
        self.tries[run.id] += 1
        self.active[run.id] = _Active(run, started, self.tries[run.id])
        words = ", ".join(f"{name}={run.parameters[name]}" for name in self.plan.varied) or "one run"
        self.log(f"{run.id} started: {words}")
        return True

    def _leave(self, run: PlannedRun, state: str) -> bool:
        del self.waiting[run.id]
        self.left_alone[state] += 1
        return True

    def _log_left_alone(self) -> None:
        for states, command in ((("killed", "lost"), "resume"), (("failed", "timed_out"), "retry --failed")):
            counts = [f"{self.left_alone[state]} {state}" for state in states if self.left_alone[state]]
            if counts:
                self.log(f"left alone: {', '.join(counts)}; `tdlib batch {command}` executes them again")

    def _collect(self) -> None:
        for name, active in list(self.active.items()):
            if not active.started.ended():
                continue
            folder, ending = self.folder / name, active.started.ending()
            with run_states.claimed(folder) as free:
                state = run_states.recorded_state(folder)
                unfinished = state["state"] == "running" or (state["state"] == "queued" and not self.stopping)
                if unfinished and not free and ending != ELSEWHERE:
                    continue  # the worker is still writing its state
                if unfinished and free and ending == ELSEWHERE:  # who looked at the lock had it for a moment
                    self.waiting[name] = self.active.pop(name).run
                    continue
                if unfinished and free:
                    state |= {"state": "killed" if self.engine.claims else "lost", "ended": time.time()}
                    state["reason"] = (
                        self.stopping or f"its worker wrote no state; {ending}{last_line(folder)}"
                    )
                    with suppress(OSError):  # a run without a final state and a lock counts as lost anyway
                        run_states.write_state(folder, state)
            del self.active[name]
            self.log(f"{name} {state['state']}{': ' + state['reason'] if state.get('reason') else ''}")
            again = state["state"] in ("killed", "lost") and active.tries <= self.plan.retries
            if again and not self.stopping:
                self.waiting[name] = active.run

    def _handle_stop_requests(self) -> None:
        """Reacts to Ctrl-C and to ``tdlib batch cancel``."""
        if not self.stopping:
            with suppress(OSError, ValueError, KeyError):
                asked = json.loads((self.folder / "cancel.json").read_text(encoding="utf-8"))["time"]
                if asked >= self.began:
                    self.stopping = "cancelled"
            if self.interrupts:
                self.stopping = "interrupted"
            if self.stopping in ("cancelled", "interrupted") and self.active:
                self.log(f"{self.stopping}: {len(self.active)} runs are told to end; Ctrl-C kills them")
                for active in self.active.values():
                    active.started.stop()
        if self.interrupts > 1:
            for active in self.active.values():
                active.started.kill()

    def _all_elsewhere(self) -> bool:
        """True if another runner executes all that still waits here: then this one can end."""
        time.sleep(POLL)  # whoever looks at a lock holds it for a moment, which is no runner
        folders = [self.folder / run.id for run in self.waiting.values()]
        elsewhere = sum(run_states.current_state(folder)["state"] == "running" for folder in folders)
        if elsewhere == len(folders):
            self.log(f"{elsewhere} runs are in the hands of another runner")
            return True
        return False

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Counts signals that ask for the end instead of raising, so that each state is written whole."""
        # Python sets signal handlers in the main thread alone; a batch in another one ends by `cancel`.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(number: int, frame: Any) -> None:
            self.interrupts += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that was closed must not end the batch
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True, file=sys.stdout)
        self.refresh()


def last_line(folder: Path) -> str:
    """Quotes the end of a run's log, where a worker that broke before its first state says why."""
    with suppress(OSError), (folder / run_states.LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        if lines := log.read().decode("utf-8", "replace").strip().splitlines():
            return f"; its log ends: {lines[-1].strip()[-200:]}"
    return ""


def specification(plan: Plan, run: PlannedRun, attempt: int) -> dict[str, Any]:
    """Describes a run for its worker: the content of ``parameters.json``."""
    return {
        "template": str(plan.template), "parameters": run.parameters, "overrides": run.overrides,
        "output": plan.output, "identity": run.identity, "attempt": attempt,
        "resources": plan.resources.model_dump(),
    }  # fmt: skip
