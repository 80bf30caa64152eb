"""Chooses settings for each arm with equal effort and without a test.

Reads a finished batch whose runs were evaluated on pictures set aside (``held_out``), ranks the settings
that each arm has tried, and writes the chosen ones to ``tuned.json`` in the batch's folder; a batch with
``tuned: NAME`` trains with them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tdlib.analysis.scores import ProtocolError, read_runs, read_scores
from tdlib.analysis.statistics import pooled_mean
from tdlib.arms import ARMS
from tdlib.config import arm_settings, parameters_with
from tdlib.core.files import write_json
from tdlib.core.pages import is_missing
from tdlib.core.provenance import canonical_json
from tdlib.data.tasks import HELD_OUT, TASKS
from tdlib.runs.report import recorded_runs

TUNED = "tuned.json"
# Parameters that define a comparison; settings are chosen separately for each combination of them.
CONTEXT = (*parameters_with(prepares="all"), *parameters_with(prepares="arm"), "arm")


def rank_settings(folder: Path, split: str = "", uneven: bool = False, resamples: int = 2000) -> pd.DataFrame:
    """Ranks the settings that the finished batch in a folder has tried, best first within each arm.

    Columns: the parameters of ``CONTEXT`` in which runs differ (task, arm, ...), those that were tuned
    (missing where the arm sets them itself), settings (that the arm has tried), seeds, mean, low, high
    (on the examples set aside, over seeds and pictures), chosen (the highest mean; of equals the one that
    the batch names first), and edge: tuned parameters of which the chosen value is the smallest or
    largest of three or more, so that a better one may lie beyond.

    ``split`` names the evaluated split, where that is no part of the training split, such as a test of a
    MiniWorld that is used for tuning alone; never a test that is reported. ``uneven`` allows arms
    that have tried different numbers of settings.

    Raises:
        ProtocolError: runs are not done, were evaluated on something else, differ in no setting, or arms
            or settings had unequal effort.
        FileNotFoundError: no batch was ever run in the folder.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    undone = int((runs["state"] != "done").sum())
    if undone:
        raise ProtocolError(
            f"{folder}: {undone} of {len(runs)} runs are not done; `tdlib batch resume {folder.name}` goes on"
        )
    entries = recorded_runs(folder).set_index("run")
    output = str(entries["output"].iloc[0])
    parameters = {run: dict(known) for run, known in entries["parameters"].items()}
    names = [name for name in next(iter(parameters.values())) if name not in ("seed", output)]
    varied = [n for n in names if len({canonical_json(known.get(n)) for known in parameters.values()}) > 1]
    context = [name for name in varied if name in CONTEXT]
    tuned = [name for name in varied if name not in CONTEXT]
    if not tuned:
        raise ProtocolError(f"{folder}: its runs differ in no setting that could be chosen")
    scores = _held_out_scores(folder, runs, split)
    settings = {run: _setting(known, tuned) for run, known in parameters.items()}
    groups: dict[str, dict[str, list[str]]] = {}
    for run, known in parameters.items():
        where = canonical_json([known[name] for name in context])
        groups.setdefault(where, {}).setdefault(settings[run], []).append(run)
    _check_effort(folder, context, groups, parameters, uneven)
    rows = []
    for where, tried in groups.items():
        ranked, used = [], []
        for setting, own in tried.items():
            row = dict(zip(context, json.loads(where), strict=True)) | json.loads(setting)
            measured = _measured(folder, scores[scores["run"].isin(own)], resamples)
            ranked.append(row | {"settings": len(tried), "seeds": len(own)} | measured)
            used.append(parameters[own[0]] | _fixed(parameters[own[0]]))
        order = sorted(range(len(ranked)), key=lambda i: -ranked[i]["mean"])
        for i in order:
            best = i == order[0]
            rows.append(ranked[i] | {"chosen": best, "edge": _edge(used[i], used, tuned) if best else ""})
    columns = [*context, *tuned, "settings", "seeds", "mean", "low", "high", "chosen", "edge"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _measured(folder: Path, scores: pd.DataFrame, resamples: int) -> dict[str, float]:
    """Computes mean and interval of one setting's runs."""
    wide = scores.pivot(index="run", columns="id", values="score")
    if wide.isna().any(axis=None):
        raise ProtocolError(f"{folder}: runs {', '.join(wide.index)} were evaluated on different examples")
    pictures = scores.drop_duplicates("id").set_index("id")["image"][wide.columns].to_numpy()
    mean, low, high = pooled_mean([(wide.to_numpy(dtype=float), pictures)], resamples=resamples)
    return {"mean": mean, "low": low, "high": high}


def write_tuned(folder: Path, ranked: pd.DataFrame) -> Path:
    """Writes the settings that ``rank_settings`` chose to ``tuned.json`` in a batch's folder; returns that.

    It holds the batch's name, the seeds of the tuning, and ``chosen``: a list of ``settings`` with their mean
    and the comparison that they are for (``where``: task, student and the parameters of ``CONTEXT`` in which
    runs differ). Settings that suit one student are none for another.
    """
    names = list(ranked.columns)[: list(ranked.columns).index("settings")]
    context = [name for name in names if name in CONTEXT]
    tuned = [name for name in names if name not in CONTEXT]
    known = list(recorded_runs(folder)["parameters"])
    shared = {name: known[0][name] for name in ("task", "student") if name in known[0]}
    chosen = [
        {
            "where": shared | {name: row[name] for name in context},
            "settings": {name: row[name] for name in tuned if not is_missing(row[name])},
            "mean": row["mean"],
        }
        for row in ranked[ranked["chosen"]].astype(object).to_dict("records")
    ]
    seeds = sorted({parameters["seed"] for parameters in known})
    target = Path(folder) / TUNED
    write_json(target, {"batch": Path(folder).name, "seeds": seeds, "chosen": chosen})
    return target


def _setting(parameters: Mapping[str, Any], tuned: Sequence[str]) -> str:
    """Returns the tuned parameters of a run as JSON, without those that its arm sets itself."""
    fixed = _fixed(parameters)
    return canonical_json({name: parameters[name] for name in tuned if name not in fixed})


def _fixed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return arm_settings(ARMS.get(parameters["arm"], {}), parameters)


def _held_out_scores(folder: Path, runs: pd.DataFrame, split: str) -> pd.DataFrame:
    scores = read_scores(folder, runs)
    tasks = scores["run"].map(runs.set_index("run")["task"])
    scores = scores[scores["measure"] == tasks.map(lambda task: TASKS[task].metric)]
    splits = sorted(scores["split"].unique())
    wanted = [name for name in splits if name == split or (not split and name.endswith(HELD_OUT))]
    if not wanted or (not split and wanted != splits):
        raise ProtocolError(
            f"{folder}: its runs were evaluated on {', '.join(splits) or 'nothing'}; settings are chosen on "
            + (f"{split!r}" if split else "pictures set aside from the training: set held_out, to 0.2 say")
        )
    held = scores[scores["split"].isin(wanted)]
    if without := sorted(set(runs["task"][~runs["run"].isin(held["run"])])):
        raise ProtocolError(
            f"{folder}: runs of {', '.join(without)} were not evaluated on {', '.join(wanted)}"
        )
    return held


def _check_effort(
    folder: Path, context: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[str]]],
    parameters: Mapping[str, Mapping[str, Any]], uneven: bool,
) -> None:  # fmt: skip
    """Raises ProtocolError unless settings have the same seeds, each once, and arms as many settings."""
    tried_with = set()
    for runs in (runs for tried in groups.values() for runs in tried.values()):
        seeds = sorted(parameters[run]["seed"] for run in runs)
        tried_with.add(str(seeds))
        if len(set(seeds)) < len(seeds):
            raise ProtocolError(
                f"{folder}: runs {', '.join(runs)} are the same setting with the same seed (arm "
                f"{parameters[runs[0]]['arm']!r} may set by itself what differs); exclude all but one"
            )
    if len(tried_with) > 1:
        listed = ", ".join(sorted(tried_with))
        raise ProtocolError(f"{folder}: settings were tried with different seeds: {listed}")
    efforts: dict[str, dict[str, int]] = {}
    for where, tried in groups.items():
        compared = dict(zip(context, json.loads(where), strict=True))
        arm = compared.pop("arm", "")
        efforts.setdefault(canonical_json(compared), {})[arm] = len(tried)
    for where, numbers in efforts.items():
        if len(set(numbers.values())) > 1 and not uneven:
            listed = ", ".join(f"{arm} {number}" for arm, number in numbers.items())
            raise ProtocolError(
                f"{folder}: {where}: arms have tried different numbers of settings ({listed}), which favours "
                "those with more; give all the same number, or say uneven"
            )


def _edge(best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]], tuned: Sequence[str]) -> str:
    """Names the tuned parameters at an edge of what was tried; an arm's weight counts where it applied."""
    at = []
    for name in tuned:
        values = {row[name] for row in tried if isinstance(row[name], int | float)}
        if len(values) > 2 and best[name] in (min(values), max(values)):
            at.append(name)
    return ", ".join(at)
