"""Measures what an arm's training costs, beside finetuning: passes through the student and seconds."""

import json
from pathlib import Path

import pandas as pd

from tdlib.analysis.compare import CELL

COLUMNS = [
    *CELL, "arm", "runs", "updates", "passes_per_update", "seconds_per_update", "train_seconds",
    "times_baseline",
]  # fmt: skip


def cost_table(runs: pd.DataFrame, reports: Path, baseline: str = "finetune") -> pd.DataFrame:
    """Computes the cost of training per arm within each cell (see ``compare``), to show beside its score.

    Columns: those of a cell, arm, runs (finished ones that recorded it), updates, passes_per_update (how
    often an example goes through the student at each, whatever the machine), seconds_per_update,
    train_seconds (medians over runs: they share their machine with whatever else there was) and
    times_baseline, train_seconds over the baseline's: an arm that trains longer costs more, although each of
    its updates may not. ``runs`` are of ``scores.read_runs``, their folders under ``reports``.
    """
    done = runs[runs["state"] == "done"]
    rows = [
        {name: getattr(run, name) for name in [*CELL, "arm"]} | metrics
        for run in done.itertuples()
        if (metrics := _recorded(Path(reports) / str(run.batch) / str(run.run)))
    ]
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    table = (
        pd.DataFrame(rows)
        .groupby([*CELL, "arm"], sort=False, dropna=False)
        .agg(runs=("updates", "size"), updates=("updates", "median"),
             passes_per_update=("passes_per_update", "median"),
             seconds_per_update=("seconds_per_update", "median"), train_seconds=("train_seconds", "median"))
        .reset_index()
    )  # fmt: skip
    usual = table[table["arm"] == baseline].set_index(CELL)["train_seconds"]
    of_cell = table[CELL].merge(usual.rename("usual").reset_index(), on=CELL, how="left")["usual"]
    return table.assign(times_baseline=table["train_seconds"] / of_cell.to_numpy())[COLUMNS]


def _recorded(folder: Path) -> dict[str, float]:
    """Reads a run's updates, passes and seconds; empty if it was not trained."""
    for file in sorted((folder / "output").rglob("metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        if metrics.get("updates"):
            return {
                "updates": metrics["updates"],
                "passes_per_update": metrics["passes_per_update"],
                "seconds_per_update": metrics["train_seconds"] / metrics["updates"],
                "train_seconds": metrics["train_seconds"],
            }
    return {}
