"""A batch of experiments from Python or the command line: plan it, run it, look at it.

Its runs are folders under ``reports/batches/NAME/``.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

from tdlib.core.files import write_json
from tdlib.core.paths import ROOT, ConfigError, did_you_mean
from tdlib.core.provenance import canonical_json
from tdlib.runs import states as run_states
from tdlib.runs.engines import ENGINES, Engine
from tdlib.runs.plan import Plan, PlannedRun, matches, plan_batch, read_batch, unmatched
from tdlib.runs.runner import POLL, Runner

if TYPE_CHECKING:
    import pandas as pd

# States of the runs that each command starts. A failed run is not resumed: it would fail again.
BEGIN = ("queued",)
RESUME = ("queued", "killed", "lost")
RETRY = ("failed", "timed_out")


class Batch:
    """A batch of experiments, with the commands of ``tdlib batch`` as methods.

    Args:
        source: a YAML file, or its content as a dict (see ``plan``).
        name: of the batch; the file's stem if "".
        reports: holds the folders of batches; ``reports/batches`` if None.
        resources: of each run; they override those in the file (and change no result).

    Raises:
        ConfigError: the file is missing or not YAML. Mistakes in it are in ``problems``.
    """

    def __init__(
        self, source: Path | str | Mapping[str, Any], name: str = "", reports: Path | None = None,
        resources: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        if isinstance(source, Mapping):
            self.file, description, home = None, dict(source), Path.cwd()
        else:
            self.file = find_batch(source)
            description, home = read_batch(self.file), self.file.parent
        given = description.get("resources") or {}
        if resources and isinstance(given, Mapping):
            description["resources"] = {**given, **resources}
        stem = self.file.stem if self.file else "batch"
        self.reports = Path(reports) if reports else ROOT / "reports" / "batches"
        self.plan: Plan = plan_batch(description, name or stem, home, self.reports)
        self.folder = (self.reports / self.plan.name).resolve()

    @property
    def problems(self) -> list[str]:
        """Every mistake in the description."""
        return self.plan.problems

    def check(self, engine: Engine | None = None) -> None:
        """Raises ConfigError with every mistake, also resources that the engine cannot give."""
        problems = self.problems + (engine.check(self.plan.resources) if engine else [])
        if problems:
            name = self.file or self.plan.name
            raise ConfigError(f"{name}: nothing was started:\n" + "\n".join(f"- {p}" for p in problems))

    def folder_of(self, run: PlannedRun) -> Path:
        return self.folder / run.id

    def states(self) -> dict[str, dict[str, Any]]:
        """Returns the state of every run by its id, in the plan's order."""
        return {run.id: run_states.current_state(self.folder_of(run)) for run in self.plan.runs}

    def estimates(self) -> dict[str, tuple[float, list[str]]]:
        """Estimates the seconds of each run from finished runs of the same template, in any batch.

        It is the median of those that share most parameters with it; beside it stand the parameters, but
        for the seed, in which all of them differ from it.
        """
        earlier = []
        for file in self.reports.glob(f"*/*/{run_states.PARAMETERS}"):
            state = run_states.recorded_state(file.parent)
            with suppress(OSError, ValueError, KeyError):
                began = json.loads(file.read_text(encoding="utf-8"))
                if state["state"] == "done" and Path(began["template"]).name == self.plan.template.name:
                    earlier.append((began["parameters"], state["seconds"]))
        expected = {}
        for run in self.plan.runs if earlier else ():
            alike = [sum(p.get(n) == value for n, value in run.parameters.items()) for p, _ in earlier]
            most = max(alike)
            nearest = [one for n, one in zip(alike, earlier, strict=True) if n == most]
            unlike = [
                name for name, value in run.parameters.items()
                if name != "seed" and all(p.get(name, value) != value for p, _ in nearest)
            ]  # fmt: skip
            expected[run.id] = median_high(seconds for _, seconds in nearest), unlike
        return expected

    def done_otherwise(self) -> list[str]:
        """Says how many planned runs were done before with other code, data or template, and are new now."""
        waiting = {
            canonical_json(run.overrides): run.identity
            for run in self.plan.runs
            if run_states.recorded_state(self.folder_of(run))["state"] != "done"
        }
        names = {"parameters": "defaults"}
        changes: dict[str, set[str]] = {}  # by what they were planned with: the parts of the identity
        for file in self.folder.glob(f"*/{run_states.PARAMETERS}") if waiting else ():
            with suppress(OSError, ValueError, KeyError):
                began = json.loads(file.read_text(encoding="utf-8"))
                now = waiting.get(key := canonical_json(began["overrides"]))
                if now and run_states.recorded_state(file.parent)["state"] == "done":
                    changes[key] = {
                        names.get(p, p) for p in now if p != "id" and now[p] != began["identity"][p]
                    }
        if not changes:
            return []
        parts = " and ".join(sorted(set().union(*changes.values())))
        return [
            f"{len(changes)} of these runs are done in {self.folder} with other {parts}: those stay as they "
            "are, these are new runs"
        ]

    def planned(self, where: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """One row per run like ``where``: id, state, the parameters in which runs differ, ``estimates``."""
        import pandas as pd

        from tdlib.runs.report import column_of

        expected, states = self.estimates(), self.states()
        rows = [
            {"run": run.id, "state": states[run.id]["state"]}
            | {column_of(name): run.parameters[name] for name in self.plan.varied}
            | dict(zip(("expected_seconds", "unlike"), expected.get(run.id, (None, [])), strict=True))
            for run in self.like(where or {})
        ]
        return pd.DataFrame(rows)

    def table(self) -> "pd.DataFrame":
        """One row per run, failures first; columns as in ``report.results_table``."""
        from tdlib.runs import report as batch_reports  # loads pandas, which planning does not need

        return batch_reports.results_table(self.plan, self.states())

    def write_reports(self) -> Path | None:
        """Writes results.parquet and index.html; returns the page, None where it cannot be written."""
        from tdlib.runs import report as batch_reports

        try:
            return batch_reports.write_reports(self.folder, self.plan, self.states(), self.file)
        except OSError as error:  # such as a full disk; the runs have written their results
            print(f"{self.folder}: no page was written: {error}", file=sys.stderr)
            return None

    def run(
        self, engine: str | Engine = "local", where: Mapping[str, Any] | None = None, **options: Any
    ) -> "pd.DataFrame":
        """Executes what has not begun; returns the table.

        Args:
            engine: "local", "ray" or an engine.
            where: executes only runs with these values of parameters; a list means any of them.
            options: of the engine (cpus, gpus; address).

        Raises:
            ConfigError: mistakes in the batch, or no run is like ``where``, before anything starts.
        """
        return self._run(BEGIN, engine, options, self.like(where or {}))

    def resume(
        self, engine: str | Engine = "local", where: Mapping[str, Any] | None = None, **options: Any
    ) -> "pd.DataFrame":
        """Executes what has not begun, was killed or was lost, of those like ``where``; returns the table."""
        return self._run(RESUME, engine, options, self.like(where or {}))

    def like(self, where: Mapping[str, Any]) -> list[PlannedRun]:
        """Returns the runs with these values of parameters (all for none); ConfigError if there is none."""
        self.check()
        chosen = [run for run in self.plan.runs if matches(run.parameters, where)]
        if none := unmatched([run.parameters for run in self.plan.runs], where):
            known = dict.fromkeys(name for run in self.plan.runs for name in run.parameters)
            there = [
                f"{name} is {', '.join(dict.fromkeys(repr(run.parameters[name]) for run in self.plan.runs))}"
                if name in known
                else f"there is no {name}{did_you_mean(name, known)}"
                for name in where
            ]
            raise ConfigError(f"{none}: no run of {self.plan.name} is like that: {'; '.join(there)}")
        return chosen

    def retry(
        self, only: Sequence[str] = (), engine: str | Engine = "local", **options: Any
    ) -> "pd.DataFrame":
        """Executes what failed or ran out of time again (or the runs with these ids); returns the table."""
        states = tuple(set(run_states.FINAL) - {"done"}) if only else RETRY
        return self._run(states, engine, options, self.to_retry(only) if only else self.plan.runs)

    def to_retry(self, only: Sequence[str] = ()) -> list[PlannedRun]:
        """Returns the runs whose ids begin like that, or without any those that failed or ran out of time.

        Raises:
            ConfigError: no run's id begins like one of ``only``.
        """
        unknown = [start for start in only if not any(run.id.startswith(start) for run in self.plan.runs)]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: no such run in {self.plan.name}")
        if only:
            return [run for run in self.plan.runs if run.id.startswith(tuple(only))]
        states = self.states()
        return [run for run in self.plan.runs if states[run.id]["state"] in RETRY]

    def cancel(self, patience: float = 30.0) -> list[str]:
        """Stops the batch, whoever runs it; returns the runs that did not end within ``patience`` seconds.

        Also runs that the batch's file, edited since they were started, describes no longer.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "cancel.json", {"time": time.time()})
        until = time.monotonic() + patience
        while True:
            begun = [file.parent for file in self.folder.glob("*/state.json")]
            running = [run.name for run in begun if run_states.current_state(run)["state"] == "running"]
            for name in running:
                (self.folder / name / "stop").touch()
            if not running or time.monotonic() > until:
                return running
            time.sleep(POLL)

    def open(self, start: str) -> Path:
        """Writes a notebook with a run's parameters, to execute in JupyterLab; its results go beside it.

        Raises:
            ConfigError: no run's id begins with ``start``, or several do.
        """
        self.check()
        matching = [run for run in self.plan.runs if start and run.id.startswith(start)]
        if len(matching) != 1:
            ids = ", ".join(run.id for run in self.plan.runs)
            raise ConfigError(f"{start!r}: {len(matching)} runs begin like that; expected one of {ids}")
        from tdlib.runs.notebook import write_prepared

        folder = self.folder_of(matching[0]) / "interactive"
        folder.mkdir(parents=True, exist_ok=True)
        parameters = dict(matching[0].overrides)
        if self.plan.output:
            parameters[self.plan.output] = str(folder)
        if "interactive" in matching[0].parameters:
            parameters["interactive"] = True
        target = folder / self.plan.template.name
        write_prepared(self.plan.template, target, parameters)
        return target

    def _run(
        self, states: Sequence[str], engine: str | Engine, options: dict[str, Any],
        chosen: list[PlannedRun],
    ) -> "pd.DataFrame":  # fmt: skip
        self.check()
        if isinstance(engine, str) and engine not in ENGINES:
            raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
        where: Engine = ENGINES[engine](**options) if isinstance(engine, str) else engine
        try:
            self.check(where)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "batch.json", self._description())
            make_worlds(self.plan)
            for note in self.done_otherwise():
                print(f"note: {note}", flush=True)
            Runner(self.plan, self.folder, where, states, chosen, _live_table(self)).run()
        finally:
            if isinstance(engine, str):
                where.close()
        self.write_reports()
        return self.table()

    def _description(self) -> dict[str, Any]:
        return {
            "name": self.plan.name, "file": str(self.file or ""), "template": str(self.plan.template),
            "runs": [run.id for run in self.plan.runs], "resources": self.plan.resources.model_dump(),
            "tuned": self.plan.tuned, "variants": self.plan.variants,
        }  # fmt: skip


def _live_table(batch: Batch) -> Callable[[], None]:
    """In a notebook shows a table of the runs and returns the function that renews it; else a no-op."""
    from IPython import get_ipython

    if not hasattr(get_ipython(), "kernel"):
        return lambda: None
    from IPython.display import display

    from tdlib.runs.report import column_of

    def table() -> "pd.DataFrame":
        whole = batch.table()
        varied = map(column_of, batch.plan.varied)
        return whole[["run", "state", *varied, "seconds", "reason"]].dropna(axis=1, how="all")

    handle = display(table(), display_id=True)
    return lambda: handle.update(table())


def find_batch(name: Path | str) -> Path:
    """Finds a batch file by its path, with or without .yaml, or by its name in notebooks/batches/."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path.resolve()
    home = ROOT / "notebooks" / "batches" if path.name == str(name) else path.resolve().parent
    return home / f"{path.name}.yaml"


def make_worlds(plan: Plan) -> None:
    """Writes the MiniWorlds that the runs will read, so that runs side by side do not each write them."""
    if "RunConfig" not in plan.template.read_text(encoding="utf-8"):
        return
    from tdlib.config import RunConfig
    from tdlib.data.tasks import MINIWORLDS
    from tdlib.miniworld.writers import ensure_data

    wanted = {
        (run.parameters["task"], run.parameters.get("world_seed", 0))
        for run in plan.runs
        if "task" in run.parameters and not run.parameters.get("data_dir")
    }
    for task, seed in sorted(wanted):
        while True:
            with run_states.claimed(MINIWORLDS) as free:
                if free:
                    ensure_data(RunConfig.from_parameters(task=task, world_seed=seed))
                    break
            time.sleep(POLL)
