"""Reports on a batch: a table, results.parquet, a page that loads nothing, and SQL over its runs.

Reads states and run folders, never the outputs of notebooks.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from glob import escape as escape_glob
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tdlib.core import pages
from tdlib.core.files import visible_files, whole_file, whole_path
from tdlib.core.pages import Html, interval_chart, table_html
from tdlib.core.paths import ConfigError
from tdlib.core.provenance import canonical_json
from tdlib.runs.plan import Plan, plan_batch, read_batch
from tdlib.runs.states import FINAL, LOG, NOTEBOOK, OUTPUT, PARAMETERS, current_state

if TYPE_CHECKING:
    import duckdb

_ORDER = ("failed", "timed_out", "killed", "lost", "running", "queued", "done")  # as shown
_OF_RUNS = ("run", "state", "seconds", "peak_memory_mib", "attempt", "reason")


def results_table(plan: Plan, states: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Makes a table with a row per run, those that failed first.

    Columns: run, state, every parameter, metrics, seconds, peak_memory_mib, attempt, reason. A
    metric that repeats a parameter is left out; one with another column's name is ``metric.NAME``, and a
    parameter ``parameter.NAME`` (see ``column_of``).
    """
    rows = []
    for run in plan.runs:
        state = states[run.id]
        row: dict[str, Any] = {"run": run.id, "state": state["state"]}
        given = {name: value for name, value in run.parameters.items() if name != plan.output}
        row |= {column_of(name): _cell(value) for name, value in given.items()}
        for name, value in (state.get("metrics") or {}).items():
            if state["state"] == "done" and not (name in run.parameters and run.parameters[name] == value):
                row[f"metric.{name}" if name in (*_OF_RUNS, *run.parameters) else name] = value
        peak = state.get("peak_memory")
        row |= {
            "seconds": state.get("seconds"), "peak_memory_mib": round(peak / 2**20, 1) if peak else None,
            "attempt": state.get("attempt"), "reason": state.get("reason"),
        }  # fmt: skip
        rows.append(row)
    table = pd.DataFrame(rows)
    if not rows:
        return table
    last = ["seconds", "peak_memory_mib", "attempt", "reason"]
    table = table[[name for name in table if name not in last] + last]
    order = table["state"].map(_ORDER.index).argsort(kind="stable")
    return table.iloc[order].reset_index(drop=True)


def column_of(parameter: str) -> str:
    """Names the column of a parameter in tables; those of the same name tell how runs went."""
    return f"parameter.{parameter}" if parameter in _OF_RUNS else parameter


def _cell(value: Any) -> Any:
    return canonical_json(value) if isinstance(value, list | dict) else value


def failures(states: Mapping[str, Mapping[str, Any]]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Groups runs that failed alike, most frequent first: their ids, and the state of one of them.

    Two failed alike if cell and traceback agree except for numbers, addresses and quoted words.
    """
    groups: dict[Any, list[str]] = {}
    for name, state in states.items():
        if state["state"] in FINAL and state["state"] != "done":
            error = state.get("error") or {}
            text = error.get("traceback") or state.get("reason", "")
            same = re.sub(r"0x[0-9a-f]+|\d+", "#", re.sub(r"'[^'\n]*'", "''", text))
            groups.setdefault((state["state"], error.get("cell"), same), []).append(name)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [(names, states[names[0]]) for names in ordered]


def command_to_open(file: Path | None, run: str) -> str:
    """Returns the command that opens one run in JupyterLab."""
    if file is None:
        return f"Batch(...).open({run!r})"
    return f"tdlib batch open {shlex.quote(os.path.relpath(file))} {run}"


def summary(plan: Plan, states: Mapping[str, Mapping[str, Any]], file: Path | None, folder: Path) -> str:
    """Counts runs by state, and describes each kind of failure with its cell and the command to open one."""
    reached = [state["state"] for state in states.values()]
    counts = ", ".join(f"{reached.count(name)} {name}" for name in _ORDER[::-1] if name in reached)
    lines = [f"{plan.name}: {len(states)} runs: {counts or 'none'}"]
    for names, state in failures(states):
        error = state.get("error") or {}
        lines.append(f"\n{len(names)} {state['state']}: {state.get('reason', '')}")
        lines.append(f"  runs: {', '.join(names)}")
        if error.get("cell") is not None:
            source = str(error.get("source", "")).strip().splitlines()
            lines.append(f"  cell {error['cell']}: {source[0] if source else ''}")
        if error.get("traceback"):
            lines += [f"    {line}" for line in error["traceback"].strip().splitlines()[-6:]]
        lines.append(f"  open: {command_to_open(file, names[0])}")
        lines.append(f"  log:  {folder / names[0] / LOG}")
    return "\n".join(lines)


def write_reports(
    folder: Path, plan: Plan, states: Mapping[str, Mapping[str, Any]], file: Path | None
) -> Path:
    """Writes results.parquet and index.html, each whole; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(plan, states)
    with whole_path(folder / "results.parquet") as partial:
        _of_one_type(table).to_parquet(partial, index=False)
    page = folder / "index.html"
    with whole_file(page) as out:
        out.write(page_html(folder, plan, table, states, file))
    return page


def _of_one_type(table: pd.DataFrame) -> pd.DataFrame:
    """Makes text of columns with values of several types, such as "auto" and 3: Parquet stores one type."""
    return table.assign(
        **{
            name: [
                value if isinstance(value, str) or pd.isna(value) else canonical_json(value)
                for value in table[name]
            ]
            for name in table
            if table[name].dtype == object and len({type(value) for value in table[name].dropna()}) > 1
        }
    )


def means_over_seeds(plan: Plan, table: pd.DataFrame) -> pd.DataFrame:
    """Computes mean and standard deviation of every metric over seeds of finished runs, a row per setting.

    Shares (see ``_is_share``) are in per cent. Empty where the batch varies no seed or nothing is done.
    """
    metrics = _metrics(plan, table)
    if "seed" not in plan.varied or not metrics:
        return pd.DataFrame()
    rows = []
    for setting, part in _done_by_setting(plan, table):
        row = setting | {"seeds": len(part)}
        for name in metrics:
            values = part[name].dropna() * (100 if _is_share(name) else 1)
            if len(values):
                spread = f" ± {values.std():.3g}" if len(values) > 1 else ""
                row[f"{name} (%)" if _is_share(name) else name] = f"{values.mean():.4g}{spread}"
        rows.append(row)
    return pd.DataFrame(rows)


def _is_share(metric: str) -> bool:
    """True for metrics in [0, 1] that pages show in per cent: all that a training run calls a score."""
    return any(part in ("accuracy", "measures", "detail", "teacher_accuracy") for part in metric.split("."))


def _metrics(plan: Plan, table: pd.DataFrame) -> list[str]:
    """Lists the columns of numbers that runs have measured; of equal ones, the first."""
    run = plan.runs[0].parameters if plan.runs else {}
    others = {*_OF_RUNS, *map(column_of, run)}
    measured = [
        name
        for name in table
        if name not in others and pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool
    ]
    # a task's main measure is its accuracy: the same column under two names
    return [n for i, n in enumerate(measured) if not any(table[n].equals(table[m]) for m in measured[:i])]


def _settings(plan: Plan, table: pd.DataFrame) -> list[str]:
    """Lists the parameters that tell runs apart beside the seed, without lists that follow from another one.

    Each task has its list of splits, which a batch varies along with it (``zip``) and which fills a table.
    """
    names = [name for name in map(column_of, plan.varied) if name != "seed" and name in table]
    kept: list[str] = []
    for name in names:
        listed = table[name].astype(str).str.startswith("[").all()
        if not listed or not any((table.groupby(o)[name].nunique(dropna=False) <= 1).all() for o in kept):
            kept.append(name)
    return kept


def _done_by_setting(plan: Plan, table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The finished runs of each combination of ``_settings``, with its values."""
    done = table[table["state"] == "done"] if len(table) else table
    settings = _settings(plan, table)
    if not settings and len(done):
        yield {}, done
    elif len(done):
        for key, part in done.groupby(settings, sort=False, dropna=False):
            yield dict(zip(settings, key, strict=True)), part


def _main_chart(plan: Plan, table: pd.DataFrame) -> Html:
    """Draws a score of every setting: means over seeds, the arms of a setting together.

    It is the accuracy on the task's usual test where the runs were evaluated on it, else the first score.

    Lines are 95 % intervals of the mean over seeds by Student's t, from three seeds on.
    """
    metrics = _metrics(plan, table)
    scores = [name for name in metrics if "accuracy" in name.split(".")] or metrics
    rows, drawn_scores = [], dict[str, None]()
    for setting, part in _done_by_setting(plan, table) if scores else ():
        score = _main_score(scores, part)
        drawn_scores[score] = None
        main = part[score].dropna().to_numpy(float)
        inner = "arm" if "arm" in setting else next(reversed(setting), "")
        group = ", ".join(f"{name} {value}" for name, value in setting.items() if name != inner)
        mean, low, high = seed_interval(main)
        label = str(setting.get(inner, plan.name))
        rows.append({"group": group, "label": label, "value": mean, "low": low, "high": high})
    if not rows:
        return Html("")
    drawn = pd.DataFrame(rows)
    drawn = drawn.sort_values("group", key=lambda c: c.map({g: i for i, g in enumerate(dict.fromkeys(c))}),
                              kind="stable")  # fmt: skip
    share = all(_is_share(name) for name in scores)
    names = ", ".join(name.rpartition("accuracy.")[2] for name in drawn_scores)
    said = f"{f'Accuracy on {names} (%)' if share else names}: means over seeds"
    chart = interval_chart(drawn, said, percent=share)
    note = "lines: 95 % interval over seeds (Student's t), from three seeds on."
    return Html(f"<figure>{chart}<figcaption>{escape(said)}; {note}</figcaption></figure>")


def _main_score(scores: Sequence[str], part: pd.DataFrame) -> str:
    """Chooses what is drawn of a setting's runs: their task's usual test, or the first score they have."""
    from tdlib.data.tasks import TASKS

    usual = TASKS[part["task"].iloc[0]].evaluated if "task" in part and part["task"].iloc[0] in TASKS else ""
    measured = [name for name in scores if part[name].notna().any()] or list(scores)
    return next((name for name in measured if name.rpartition("accuracy.")[2] == usual), measured[0])


# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond, the normal distribution's is near.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def seed_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Computes the mean over seeds and its 95 % interval ``mean ± t s / sqrt(n)``; nan below three seeds."""
    mean, number = float(np.mean(values)) if len(values) else float("nan"), len(values)
    if number < 3:
        return mean, float("nan"), float("nan")
    half = (_T[number - 2] if number <= len(_T) + 1 else 1.96) * float(np.std(values, ddof=1)) / number**0.5
    return mean, mean - half, mean + half


def page_html(
    folder: Path, plan: Plan, table: pd.DataFrame, states: Mapping[str, Mapping[str, Any]], file: Path | None
) -> str:
    """Makes the batch's page: a drawing of the main score, failures, means over seeds, every run."""
    reached = [state["state"] for state in states.values()]
    counts = ", ".join(f"{reached.count(name)} {name}" for name in _ORDER if name in reached)
    lead = [f"{len(reached)} runs: {counts}", _main_chart(plan, table)]
    failed = "".join(_failure_html(file, names, state) for names, state in failures(states))
    sections = [pages.Section("Runs that failed", failed)] if failed else []
    means = means_over_seeds(plan, table)
    if len(means):
        narrow = [name for name in means if not name.startswith("detail.")]
        body = table_html(means[narrow], sorts=True)
        if "arm" in plan.varied:
            command = f"tdlib run 07_protocol -p batches {shlex.quote(json.dumps([plan.name]))}"
            body = Html(
                f"{body}<p>Paired differences, intervals and tests: <code>{escape(command)}</code></p>"
            )
        sections.append(pages.Section("Mean ± standard deviation over seeds", body))
        if len(narrow) < len(means.columns):
            body = table_html(means, sorts=True)
            sections.append(pages.Section("The same by kind of question", body, folded=True))
    metrics = [name for name in _metrics(plan, table) if not name.startswith("detail.")]
    columns = ["run", "state", *map(column_of, plan.varied), *metrics, "seconds", "peak_memory_mib", "reason"]
    shown = table[[name for name in columns if name in table]].copy()
    if len(shown):
        shown["run"] = [_run_links(folder, run) for run in shown["run"]]
    shares = [name for name in metrics if _is_share(name)]
    every = table_html(shown, shares, ["run"], sorts=True, row_class=lambda row: str(row["state"]))
    sections.append(pages.Section("Runs", every, folded=len(reached) > 40))
    return pages.page_html(f"Batch {plan.name}", lead, sections)


def _failure_html(file: Path | None, names: Sequence[str], state: Mapping[str, Any]) -> str:
    error = state.get("error") or {}
    cell = f", cell {error['cell']}" if error.get("cell") is not None else ""
    parts = [f"<h3>{len(names)} {state['state']}{cell}: {escape(str(state.get('reason', ''))[:300])}</h3>"]
    if error:
        parts.append(f"<pre>{escape(str(error.get('source', '')))}</pre>")
        parts.append(
            f"<details><summary>traceback</summary><pre>{escape(error['traceback'])}</pre></details>"
        )
    links = ", ".join(pages.link(f"{name}/{LOG}", name) for name in names)
    parts.append(f"<p>{links}<br><code>{escape(command_to_open(file, names[0]))}</code></p>")
    return "".join(parts)


def _run_links(folder: Path, run: str) -> Html:
    """Makes a run's id with links to its notebook, log and output, where these exist."""
    there = [
        pages.link(f"{run}/{name}", label)
        for label, name in (("notebook", NOTEBOOK), ("log", LOG), ("output", OUTPUT))
        if (folder / run / name).exists()
    ]
    return Html(" ".join([escape(run), *there]))


def batch_record(folder: Path) -> dict[str, Any]:
    """Reads ``batch.json`` in a batch's folder; FileNotFoundError where no batch was ever run."""
    file = Path(folder) / "batch.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; no batch was run there") from None
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error}); `tdlib batch run` writes it anew") from None


def recorded_runs(folder: Path) -> pd.DataFrame:
    """Lists the runs of a batch's folder with their present state, even if its file no longer describes them.

    Columns: run, state, reason, parameters (a dict; None for a run that never began and that the
    batch's file no longer describes), output (name of the parameter that says where results go), identity
    (what the id of a run that began stands for; else empty).
    """
    folder, record = Path(folder), batch_record(folder)
    planned: dict[str, Any] = {}
    rows = []
    for run in record["runs"]:
        state, identity = current_state(folder / run), {}
        try:
            began = json.loads((folder / run / PARAMETERS).read_text(encoding="utf-8"))
            parameters, output = began["parameters"], began["output"]
            identity = began.get("identity", {})
        except (OSError, ValueError, KeyError):  # queued, or what was written is damaged
            if not planned and Path(record["file"]).is_file():
                file = Path(record["file"])
                plan = plan_batch(read_batch(file), record["name"], file.parent, folder.parent)
                planned = {entry.id: entry.parameters for entry in plan.runs} | {"": plan.output}
            parameters, output = planned.get(run), planned.get("", "")
        rows.append(
            {"run": run, "state": state["state"], "reason": state.get("reason") or "",
             "parameters": parameters, "output": output, "identity": identity}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["run", "state", "reason", "parameters", "output", "identity"])


def open_results(folder: Path, runs: pd.DataFrame | None = None) -> "duckdb.DuckDBPyConnection":
    """Opens a DuckDB connection with views of a batch: ``runs`` (results.parquet) and ``predictions``.

    ``predictions`` has the rows of every finished run's ``predictions.parquet`` and its id as ``run``;
    it is not there if no run wrote one. ``runs``, a table with columns run and state, is read in place of
    results.parquet where that is not there yet (else FileNotFoundError) or old.
    """
    import duckdb

    folder = Path(folder).resolve()
    results = folder / "results.parquet"
    connection = duckdb.connect()
    if runs is not None:
        connection.register("runs", runs)
    elif results.is_file():
        connection.execute(f"CREATE VIEW runs AS SELECT * FROM read_parquet({_quoted(results)})")
    else:
        raise FileNotFoundError(f"{results}: no such file; `tdlib batch status` writes it")
    done = connection.execute("SELECT run FROM runs WHERE state = 'done'").fetchall()
    files = [file for (run,) in done for file in visible_files(folder / run / OUTPUT, "predictions.parquet")]
    if files:
        listed = ", ".join(_quoted(file) for file in files)
        depth = len(folder.parts) + 1
        connection.execute(
            "CREATE VIEW predictions AS SELECT "
            f"string_split(filename, '/')[{depth}] AS run, * EXCLUDE (filename) "
            f"FROM read_parquet([{listed}], filename = true, union_by_name = true)"
        )
    return connection


def _quoted(path: Path) -> str:
    """Quotes a path for SQL; DuckDB would read a folder such as ``runs[v2]`` as a pattern."""
    return "'" + escape_glob(str(path)).replace("'", "''") + "'"
