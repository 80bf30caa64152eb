"""What came out of a batch: a table, results.parquet, a page that loads nothing, and SQL over it all.

Reads states and run folders only; notebooks' outputs are not scraped.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tdlib.core.files import whole_file, whole_path
from tdlib.runs.plan import Plan, plan_batch, read_batch
from tdlib.runs.states import FINAL, LOG, NOTEBOOK, OUTPUT, current_state

if TYPE_CHECKING:
    import duckdb

_ORDER = ("failed", "timed_out", "killed", "lost", "running", "queued", "done")  # as shown


def results_table(plan: Plan, states: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run: run, state, every parameter, metrics, seconds, peak_memory_mib, attempt, reason.

    A metric that repeats a parameter is left out; one with another column's name is ``metric.NAME``.
    Runs that failed stand first.
    """
    taken = {"run", "state", "seconds", "peak_memory_mib", "attempt", "reason"}
    rows = []
    for run in plan.runs:
        state = states[run.id]
        row: dict[str, Any] = {"run": run.id, "state": state["state"]}
        row |= {name: _cell(value) for name, value in run.parameters.items() if name != plan.output}
        for name, value in (state.get("metrics") or {}).items():
            if state["state"] == "done" and not (name in run.parameters and run.parameters[name] == value):
                row[f"metric.{name}" if name in taken | set(run.parameters) else name] = value
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
    return table.sort_values("state", key=lambda column: column.map(_ORDER.index), kind="stable").reset_index(
        drop=True
    )


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def failures(states: Mapping[str, Mapping[str, Any]]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Runs that came to the same end, most frequent first: their ids and the state of one of them.

    Two are the same if cell and traceback agree but for numbers, addresses and quoted words.
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


def command_to_open(plan: Plan, file: Path | None, run: str) -> str:
    """The command that opens one run in JupyterLab."""
    if file is None:
        return f"Batch(...).open({run!r})"
    return f"tdlib batch open {shlex.quote(os.path.relpath(file))} {run}"


def summary(plan: Plan, states: Mapping[str, Mapping[str, Any]], file: Path | None, folder: Path) -> str:
    """Counts by state, and every kind of failure with its cell and the command that opens one."""
    found = [state["state"] for state in states.values()]
    counts = ", ".join(f"{found.count(name)} {name}" for name in _ORDER[::-1] if name in found)
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
        lines.append(f"  open: {command_to_open(plan, file, names[0])}")
        lines.append(f"  log:  {folder / names[0] / LOG}")
    return "\n".join(lines)


def write_reports(
    folder: Path, plan: Plan, states: Mapping[str, Mapping[str, Any]], file: Path | None
) -> Path:
    """Writes results.parquet and index.html, each whole; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(plan, states)
    with whole_path(folder / "results.parquet") as partial:
        table.to_parquet(partial, index=False)
    page = folder / "index.html"
    with whole_file(page) as out:
        out.write(page_html(folder, plan, table, states, file))
    return page


def means_over_seeds(plan: Plan, table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of every metric over the seeds of finished runs, one row per setting."""
    settings = [name for name in plan.varied if name != "seed"]
    done = table[table["state"] == "done"] if len(table) else table
    metrics = _metrics(plan, table)
    if "seed" not in plan.varied or not len(done) or not metrics:
        return pd.DataFrame()
    rows = []
    groups = done.groupby(settings, sort=False, dropna=False) if settings else [((), done)]
    for key, part in groups:
        row: dict[str, Any] = dict(zip(settings, key, strict=True)) | {"seeds": len(part)}
        for name in metrics:
            values = part[name].dropna()
            if len(values):
                spread = f" ± {values.std():.3g}" if len(values) > 1 else ""
                row[name] = f"{values.mean():.4g}{spread}"
        rows.append(row)
    return pd.DataFrame(rows)


def _metrics(plan: Plan, table: pd.DataFrame) -> list[str]:
    """Columns of the table with numbers that a run has measured."""
    run = plan.runs[0].parameters if plan.runs else {}
    known = {"run", "state", "peak_memory_mib", "attempt", "reason", "seconds", *run}
    return [
        name
        for name in table
        if name not in known and pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool
    ]


STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em;color:#222}
table{border-collapse:collapse;margin:1em 0}th,td{padding:4px 9px;text-align:left;border-top:1px solid #ccc}
th{white-space:nowrap;background:#f2f2f2}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f6f6f6;padding:8px;overflow-x:auto}.failed,.timed_out,.killed,.lost{background:#fbe9e0}
.running{background:#e7f0fa}"""
SCRIPT = """document.querySelectorAll('th').forEach(h=>h.onclick=()=>{
const t=h.closest('table'),i=h.cellIndex,b=t.tBodies[0],d=h.dataset.d=h.dataset.d==='1'?'-1':'1';
const v=r=>{const x=r.cells[i].dataset.v??r.cells[i].textContent;return x!==''&&!isNaN(x)?+x:x};
[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);if(x==='')return 1;if(y==='')return -1;
return d*(typeof x===typeof y?(x>y)-(x<y):typeof x==='number'?-1:1)}).forEach(r=>b.append(r))});"""


def page_html(
    folder: Path, plan: Plan, table: pd.DataFrame, states: Mapping[str, Mapping[str, Any]], file: Path | None
) -> str:
    """The batch as one page: failures, means over seeds, every run. Columns sort by a click on their head."""
    found = [state["state"] for state in states.values()]
    counts = ", ".join(f"{found.count(name)} {name}" for name in _ORDER if name in found)
    parts = [f"<h1>{escape(plan.name)}</h1><p>{len(found)} runs: {escape(counts)}</p>"]
    for names, state in failures(states):
        error = state.get("error") or {}
        cell = f", cell {error['cell']}" if error.get("cell") is not None else ""
        parts.append(
            f"<h3>{len(names)} {state['state']}{cell}: {escape(str(state.get('reason', ''))[:300])}</h3>"
        )
        if error:
            parts.append(f"<pre>{escape(str(error.get('source', '')))}</pre>")
            parts.append(
                f"<details><summary>traceback</summary><pre>{escape(error['traceback'])}</pre></details>"
            )
        links = ", ".join(f'<a href="{name}/{LOG}">{name}</a>' for name in names)
        parts.append(f"<p>{links}<br><code>{escape(command_to_open(plan, file, names[0]))}</code></p>")
    means = means_over_seeds(plan, table)
    if len(means):
        parts.append("<h2>Mean ± standard deviation over seeds</h2>" + _html_table(means, folder))
        if "arm" in plan.varied:
            command = f"tdlib run 07_protocol -p batches {shlex.quote(json.dumps([plan.name]))}"
            parts.append(f"<p>Paired differences, intervals and tests: <code>{escape(command)}</code></p>")
    columns = ["run", "state", *plan.varied, *_metrics(plan, table), "seconds", "peak_memory_mib", "reason"]
    parts.append("<h2>Runs</h2>" + _html_table(table[[c for c in columns if c in table]], folder))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(plan.name)}</title>'
        f"<style>{STYLE}th{{cursor:pointer}}</style></head><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def _html_table(table: pd.DataFrame, folder: Path) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in table)
    body = []
    for record in table.to_dict("records"):
        cells = "".join(_html_cell(str(name), value, folder) for name, value in record.items())
        body.append(f'<tr class="{escape(str(record.get("state", "")))}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html_cell(name: str, value: Any, folder: Path) -> str:
    if name == "run":
        links = [value]
        for label, file in (("notebook", NOTEBOOK), ("log", LOG), ("output", OUTPUT)):
            if (folder / value / file).exists():
                links.append(f'<a href="{value}/{file}">{label}</a>')
        return f'<td data-v="{escape(value)}">{" ".join(links)}</td>'
    if value is None or (isinstance(value, float) and value != value):
        return '<td data-v=""></td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n" data-v="{value}">{value:.6g}</td>'
    text = str(value)
    return f"<td>{escape(text if len(text) < 160 else text[:160] + '…')}</td>"


def batch_record(folder: Path) -> dict[str, Any]:
    """What ``batch.json`` in a batch's folder says of it.

    Raises:
        FileNotFoundError: no batch was ever run there.
    """
    file = Path(folder) / "batch.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; no batch was run there") from None


def recorded_runs(folder: Path) -> pd.DataFrame:
    """The runs of a batch's folder as they stand now, whether or not its file still describes them.

    Columns: run, state, reason, parameters (a dict; None for a run that never began and that the
    batch's file no longer describes), output (name of the parameter that says where results go).

    Raises:
        FileNotFoundError: no batch was ever run there.
    """
    folder, known = Path(folder), batch_record(folder)
    planned: dict[str, Any] = {}
    rows = []
    for run in known["runs"]:
        state = current_state(folder / run)
        try:
            began = json.loads((folder / run / "parameters.json").read_text(encoding="utf-8"))
            parameters, output = began["parameters"], began["output"]
        except (OSError, ValueError, KeyError):  # queued, or what was written is damaged
            if not planned and Path(known["file"]).is_file():
                file = Path(known["file"])
                plan = plan_batch(read_batch(file), known["name"], file.parent, folder.parent)
                planned = {entry.id: entry.parameters for entry in plan.runs} | {"": plan.output}
            parameters, output = planned.get(run), planned.get("", "")
        rows.append(
            {"run": run, "state": state["state"], "reason": state.get("reason") or "",
             "parameters": parameters, "output": output}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["run", "state", "reason", "parameters", "output"])


def open_results(folder: Path, runs: pd.DataFrame | None = None) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection with views over a batch: ``runs`` (results.parquet) and ``predictions``.

    ``predictions`` has the rows of every finished run's ``predictions.parquet`` and its id as ``run``;
    it is not there if no run wrote one. ``runs``, a table with columns run and state, stands in for
    results.parquet where that is not there yet or old.

    Raises:
        FileNotFoundError: the folder holds no results.parquet.
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
    files = [
        file
        for (run,) in done
        for file in sorted((folder / run / OUTPUT).rglob("predictions.parquet"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
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
    return "'" + str(path).replace("'", "''") + "'"
