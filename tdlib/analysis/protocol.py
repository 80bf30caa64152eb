"""The paper's protocol from the folders of finished batches: few examples, domain shift, all examples.

Reads what runs have left (through ``batch_reports.open_results``), pairs arms, and makes tables. Owns
the rules of pairing and the form of the tables; the statistics are ``statistics``', the figures
``protocol_plots``'. Trains nothing and scrapes no notebook.

A *cell* is what arms are compared within: one batch, task, setting (whatever else differs between
runs) and size of the training subset. Two runs are a pair where they are of one cell and one seed; they
must then have learned from the same examples and be tested on the same.
"""

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tdlib.analysis.compare import joint_predictions
from tdlib.analysis.statistics import (
    ALPHA,
    PairedDifference,
    adjusted_together,
    bootstrap_interval,
    chance_corrected,
    paired_difference,
    pairs_needed,
)
from tdlib.core.files import whole_file, whole_path, write_json
from tdlib.core.pages import Section, link, page_html, table_html
from tdlib.data.tasks import TASKS
from tdlib.runs.report import batch_record, open_results, recorded_runs

if TYPE_CHECKING:
    pass

CELL = ["batch", "task", "setting", "shots"]
RUN_COLUMNS = [
    "batch", "run", "state", "reason", "task", "shots", "arm", "seed", "setting", "train_examples", "subset",
    "tuned",
]  # fmt: skip
SCORE_COLUMNS = ["batch", "run", "split", "id", "image", "score", "chance"]
USUAL = "usual"  # the test that is not shifted
CONTROLS = (
    "balanced",
)  # tests beside the usual one that are no shift: what is learned there, not what breaks

# "Up to" so much better than finetuning, relative: the abstract of arXiv 2201.05729. None: no claim.
CLAIMS: dict[str, dict[str, float | None]] = {
    "VCR": {"low-shot": 0.519, "domain shift": 0.713, "fully supervised": 0.02},
    "SNLI-VE": {"low-shot": 0.066, "domain shift": None, "fully supervised": 0.03},
    "VQA": {"low-shot": 0.09, "domain shift": None, "fully supervised": 0.013},
}
BENCHMARKS = {
    "vcr_qa": "VCR", "vcr_qar": "VCR", "vcr": "VCR", "snli_ve": "SNLI-VE", "e_snli_ve": "SNLI-VE",
    "vqa_v2": "VQA", "vqa_cp_v2": "VQA",
}  # fmt: skip


class ProtocolError(ValueError):
    """Runs that cannot be compared: names them, what differs, and what was expected."""


# What the runs have left.


def read_runs(folder: Path) -> pd.DataFrame:
    """Every run of a batch, finished or not.

    Columns: batch, run, state, reason, task, shots, arm, seed, setting, train_examples, subset, tuned.
    ``setting`` names the other parameters in which runs of one task differ; ``tuned`` those that were
    chosen for each arm, and so are part of it; ``subset`` is a digest of the ids in manifest.json, empty
    for runs that are not done. Of a run that never began, and that the
    batch's file no longer describes, only batch, run and state are known.

    Raises:
        FileNotFoundError: no batch was ever run in the folder.
        ProtocolError: the batch's template does not train arms, or a finished run has no manifest.
    """
    folder = Path(folder)
    rows, given = [], {}
    tuned = batch_record(folder).get("tuned", [])
    for entry in recorded_runs(folder).to_dict("records"):
        row: dict[str, Any] = {"batch": folder.name, "subset": "", "tuned": ""}
        row |= {name: entry[name] for name in ("run", "state", "reason")}
        parameters = entry["parameters"]
        if parameters is not None:
            lacking = [name for name in ("task", "shots", "arm", "seed") if name not in parameters]
            if lacking:
                raise ProtocolError(
                    f"{folder}: its template has no parameter {', '.join(lacking)}; "
                    "expected a batch of 04_distill or of a notebook with its parameters"
                )
            row |= {name: parameters[name] for name in ("task", "shots", "arm", "seed")}
            row["tuned"] = ", ".join(f"{name}={json.dumps(parameters.get(name))}" for name in tuned)
            hidden = ("task", "shots", "arm", "seed", "interactive", entry["output"], *tuned)
            given[entry["run"]] = {n: json.dumps(v) for n, v in parameters.items() if n not in hidden}
        if entry["state"] == "done":
            ids = _training_ids(folder / entry["run"])
            digest = hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:12]
            row |= {"train_examples": len(ids), "subset": digest}
        rows.append(row)
    table = pd.DataFrame(rows, columns=RUN_COLUMNS)
    settings: dict[str, str] = {}
    for _, own in table.groupby("task"):
        parameters = {run: given[run] for run in own["run"]}
        names = dict.fromkeys(name for known in parameters.values() for name in known)
        varied = [n for n in names if len({known.get(n) for known in parameters.values()}) > 1]
        for run, known in parameters.items():
            settings[run] = ", ".join(f"{name}={known.get(name)}" for name in varied)
    table["setting"] = [settings.get(run, "") for run in table["run"]]
    return table


def _training_ids(folder: Path) -> list[str]:
    found = sorted((folder / "output").rglob("manifest.json"))
    if len(found) != 1:
        raise ProtocolError(
            f"{folder}: a finished run with {len(found)} files manifest.json in its output; expected one"
        )
    return json.loads(found[0].read_text(encoding="utf-8"))["ids"]


def collect(reports: Path, batches: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Runs and scores of several batches, and a sentence for each that has nothing to show yet.

    Args:
        reports: folder under which the batches' own lie.
        batches: names of batches.

    Returns:
        ``read_runs`` and ``read_scores`` of all batches, and what is missing, each with its command.
    """
    runs, scores, missing = [], [], []
    for name in dict.fromkeys(batches):
        folder = Path(reports) / name
        if not (folder / "batch.json").is_file():
            missing.append(f"{name}: was not run here ({folder}); `tdlib batch run {name}` does it")
            continue
        own = read_runs(folder)
        left = int((own["state"] != "done").sum())
        if left:
            missing.append(
                f"{name}: {left} of {len(own)} runs are not done; `tdlib batch status {name}` says why, "
                f"`tdlib batch resume {name}` goes on"
            )
        runs.append(own)
        if left < len(own):
            scores.append(read_scores(folder, own))
    if not runs:
        return pd.DataFrame(columns=RUN_COLUMNS), pd.DataFrame(columns=SCORE_COLUMNS), missing
    every = pd.concat(scores, ignore_index=True) if scores else pd.DataFrame(columns=SCORE_COLUMNS)
    return pd.concat(runs, ignore_index=True), every, missing


def read_scores(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """What every finished run scored on every labelled example.

    Columns: batch, run, split, id, image, score in [0, 1], chance. For task "vcr" a row is a question, right
    if answer and rationale are (Q->AR). ``chance`` is what guessing scores on the example (``data.chance``),
    as the run has recorded it; missing where it did not and the task has a label set.

    Args:
        folder: of the batch.
        runs: as ``read_runs`` gives them.

    Raises:
        ProtocolError: a finished run has left no predictions, or has some scores missing.
    """
    with open_results(folder, runs[["run", "state"]]) as connection:
        there = connection.execute("SELECT view_name FROM duckdb_views()").fetchall()
        if ("predictions",) not in there:
            found = pd.DataFrame(columns=["run", "split", "id", "image", "label", "score", "chance"])
        else:
            columns = connection.execute("SELECT column_name FROM (DESCRIBE predictions)").fetchall()
            parts = [name for name in ("question", "part") if (name,) in columns]
            wanted = ", ".join(["run", "split", "id", *parts, "image", "label", "score"])
            found = connection.execute(f"SELECT {wanted}, {_chance_column(columns)} FROM predictions").df()
    done = runs[runs["state"] == "done"].set_index("run")
    without = sorted(set(done.index) - set(found["run"]))
    if without:
        raise ProtocolError(f"{folder}: finished without predictions.parquet: {', '.join(without)}")
    frames = []
    for (run, split), rows in found.groupby(["run", "split"], sort=False):
        known = rows["score"].notna()
        if not known.any():
            continue  # a test without labels
        if not known.all():
            raise ProtocolError(
                f"{folder / str(run)}: {(~known).sum()} of {len(rows)} scores of split {split!r} are missing "
                f"(first: {rows.loc[~known, 'id'].iloc[0]!r}); expected all of them, or none"
            )
        if done.at[run, "task"] == "vcr":
            rows = joint_predictions(rows.assign(arm=done.at[run, "arm"], seed=done.at[run, "seed"]))
        frames.append(rows.assign(batch=folder.name)[SCORE_COLUMNS])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=SCORE_COLUMNS)


def _chance_column(columns: Sequence[tuple[str]]) -> str:
    """Older runs have recorded no chance: where there are choices it is known all the same."""
    guessed = "CASE WHEN answer = '' THEN 1 / len(probabilities) END"
    return f"coalesce(chance, {guessed}) AS chance" if ("chance",) in columns else f"{guessed} AS chance"


# Comparisons.


def compare_arms(
    runs: pd.DataFrame,
    scores: pd.DataFrame,
    baseline: str = "finetune",
    tested: Sequence[str] = (),
    alpha: float = ALPHA,
    level: float = 0.95,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Every arm in every cell on every test: accuracy, and the paired difference to the baseline.

    Columns: those of a cell, train_examples (mean over runs), split, test ("usual", or the shift), arm,
    seeds, mean, low, high (over all seeds of the arm), chance, over_chance; then over the pairs alone:
    pairs, baseline_mean, difference, difference_low, difference_high, relative, relative_low,
    relative_high, gain_over_chance, p_value, p_adjusted (Holm over the tested arms of the cell and
    test), arms_tested, verdict, and unpaired: seeds of arm or baseline that have no partner yet.

    Args:
        runs: of one or several batches, see ``read_runs``.
        scores: theirs, see ``read_scores``.
        baseline: the arm that the others are held against.
        tested: arms whose difference is tested; all if empty. To be chosen before looking: every
            further arm costs pairs (see ``statistics.pairs_needed``). Others get intervals and the
            verdict "not tested".
        alpha: of the verdicts.
        level: of the intervals.
        resamples: of the bootstrap.

    Raises:
        ProtocolError: two runs of a cell have the same arm and seed, or a pair learned from or was
            tested on other examples.
    """
    done = runs[runs["state"] == "done"]
    rows: list[dict[str, Any]] = []
    for key, cell in done.groupby(CELL, sort=False):
        where = dict(zip(CELL, key, strict=True))
        twice = cell[cell.duplicated(["arm", "seed"], keep=False)]
        if len(twice):
            named = ", ".join(f"{r.run} ({r.arm}, seed {r.seed:g})" for r in twice.itertuples())
            raise ProtocolError(f"{_place(where)}: several runs of one arm and seed: {named}; expected one")
        _check_subsets(where, cell, baseline)
        own = scores[(scores["batch"] == where["batch"]) & scores["run"].isin(cell["run"])]
        for split, part in own.groupby("split", sort=False):
            shared = where | {
                "train_examples": float(cell["train_examples"].mean()),
                "split": split,
                "test": _test_of(str(where["task"]), str(split)),
            }
            rows += [
                shared | row
                for row in _compare_cell(
                    f"{_place(where)}, split {split!r}", cell, part, baseline, tested, alpha, level, resamples
                )
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    *CELL, "train_examples", "split", "test", "arm", "seeds", "mean", "low", "high", "chance", "over_chance",
    "pairs", "baseline_mean", "difference", "difference_low", "difference_high", "relative", "relative_low",
    "relative_high", "gain_over_chance", "p_value", "p_adjusted", "arms_tested", "verdict", "unpaired",
]  # fmt: skip


def _compare_cell(
    place: str,
    cell: pd.DataFrame,
    scores: pd.DataFrame,
    baseline: str,
    tested: Sequence[str],
    alpha: float,
    level: float,
    resamples: int,
) -> list[dict[str, Any]]:
    examples = _check_examples(place, cell, scores)
    clusters, chance = examples["image"].to_numpy(), float(scores["chance"].mean())
    wide = scores.pivot(index="run", columns="id", values="score")[examples.index].astype(float)
    tables = {
        arm: wide.loc[own["run"]].set_axis(own["seed"].astype(int).to_numpy(), axis="index").sort_index()
        for arm, own in cell.groupby("arm", sort=False)
        if own["run"].isin(wide.index).any()
    }
    differences: dict[str, PairedDifference] = {}
    usual = tables.get(baseline)
    for arm, table in tables.items():
        seeds = table.index.intersection(usual.index) if usual is not None else table.index[:0]
        if arm != baseline and usual is not None and len(seeds):
            differences[arm] = paired_difference(
                table.loc[seeds].to_numpy(), usual.loc[seeds].to_numpy(), clusters, chance, level, resamples
            )
    asked = {arm: found for arm, found in differences.items() if not tested or arm in tested}
    differences |= adjusted_together(asked)
    rows = []
    for arm, table in tables.items():
        mean = float(table.to_numpy().mean())
        low, high = bootstrap_interval(table.to_numpy(), clusters, level, resamples)
        row: dict[str, Any] = {
            "arm": arm, "seeds": len(table), "mean": mean, "low": low, "high": high, "chance": chance,
            "over_chance": chance_corrected(mean, chance), "pairs": 0, "verdict": "", "unpaired": "",
        }  # fmt: skip
        if arm != baseline:
            partners = usual.index if usual is not None else table.index[:0]
            alone = sorted(set(table.index) ^ set(partners))
            row |= {"verdict": "too few pairs", "unpaired": ", ".join(str(seed) for seed in alone)}
        if found := differences.get(arm):
            row |= {
                "pairs": found.pairs, "baseline_mean": found.baseline, "difference": found.difference,
                "difference_low": found.low, "difference_high": found.high, "relative": found.relative,
                "relative_low": found.relative_low, "relative_high": found.relative_high,
                "gain_over_chance": found.gain_over_chance, "verdict": "not tested",
            }  # fmt: skip
            if arm in asked:
                row |= {
                    "p_value": found.p_value, "p_adjusted": found.p_adjusted, "arms_tested": found.arms,
                    "verdict": found.verdict(alpha),
                }  # fmt: skip
        rows.append(row)
    return rows


def _check_subsets(where: Mapping[str, Any], cell: pd.DataFrame, baseline: str) -> None:
    """Raises ProtocolError where an arm of a seed learned from other examples than the baseline."""
    usual = cell[cell["arm"] == baseline].set_index("seed")
    for run in cell[cell["seed"].isin(usual.index)].itertuples():
        partner = usual.loc[run.seed]
        if run.subset != partner["subset"]:
            raise ProtocolError(
                f"{_place(where)}, seed {run.seed:g}: {run.arm} (run {run.run}) learned from "
                f"{run.train_examples:g} examples, digest {run.subset}, but {baseline} "
                f"(run {partner['run']}) from {partner['train_examples']:g}, digest {partner['subset']}; "
                "a pair needs the same"
            )


def _check_examples(place: str, cell: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The evaluated examples with their pictures; ProtocolError unless all runs have the same."""
    first: pd.Series | None = None
    for run, rows in scores.groupby("run", sort=False):
        images = rows.set_index("id")["image"].sort_index()
        if first is None:
            first, first_run = images, run
        elif not images.equals(first):
            one, other = set(images.items()), set(first.items())
            lone = sorted(str(name) for name, _ in one ^ other) or ["the same ids more than once"]
            raise ProtocolError(
                f"{place}: runs {first_run} ({len(first)} examples) and {run} ({len(images)}) were tested "
                f"on different examples (first: {lone[0]!r}); a pair needs the same"
            )
    assert first is not None
    if not first.index.is_unique:
        raise ProtocolError(f"{place}: run {first_run} has several rows of one example")
    return first.to_frame()


def _place(where: Mapping[str, Any]) -> str:
    setting = f", {where['setting']}" if where["setting"] else ""
    return f"batch {where['batch']}, {where['task']}, shots {where['shots']:g}{setting}"


def _test_of(task: str, split: str) -> str:
    usual = TASKS[task].evaluated
    return USUAL if split == usual else split.removeprefix(f"{usual}_")


# Tables.


def shots_table(compared: pd.DataFrame) -> pd.DataFrame:
    """Accuracy over the number of training examples, on the usual test: the numbers behind the curves.

    Per task and setting, the batch with most sizes; the first of several.
    """
    found = _richest(compared[compared["test"] == USUAL], ["batch", "task", "setting"], "shots")
    keys = found.assign(
        _task=_places(found["task"], TASKS), _arm=_places(found["arm"], compared["arm"])
    ).sort_values(["_task", "setting", "_arm", "train_examples"], kind="stable", ignore_index=True)
    return keys[compared.columns]


def shift_table(compared: pd.DataFrame) -> pd.DataFrame:
    """Every arm on every test, the usual one first: the numbers behind the figure of shifts.

    Per task and setting, the batch and size with most tests; of several, the one with most pairs, so that
    a size that has hardly begun does not stand for one that is done; then the one with most examples.
    """
    pairs = compared.groupby(CELL)["pairs"].transform("max")
    ordered = compared.assign(_pairs=pairs).sort_values(
        ["_pairs", "train_examples"], ascending=False, kind="stable"
    )
    found = _richest(ordered, CELL, "test")
    keys = found.assign(
        _task=_places(found["task"], TASKS), _test=_places(found["test"], [USUAL, *compared["test"]]),
        _arm=_places(found["arm"], compared["arm"]),
    ).sort_values(["_task", "setting", "_test", "_arm"], ignore_index=True)  # fmt: skip
    return keys[compared.columns]


def _places(values: pd.Series, order: Iterable[Any]) -> pd.Series:
    """Where each value first stands in an order."""
    return values.map({value: place for place, value in enumerate(dict.fromkeys(order))})


def _richest(table: pd.DataFrame, group: Sequence[str], counted: str) -> pd.DataFrame:
    """Per task and setting, the group of rows with most values of a column; the first of equals."""
    best: dict[Any, tuple[int, pd.DataFrame]] = {}
    for _, rows in table.groupby(list(group), sort=False):
        key = rows["task"].iloc[0], rows["setting"].iloc[0]
        number = rows[counted].nunique()
        if key not in best or number > best[key][0]:
            best[key] = number, rows
    return pd.concat([rows for _, rows in best.values()]) if best else table.iloc[:0]


def claims_table(compared: pd.DataFrame, method: str = "clip_td") -> pd.DataFrame:
    """The method's relative gain in the form of the paper's claims: a row per task and condition.

    Columns: benchmark, task, setting, condition, paper ("up to", relative), relative, relative_low,
    relative_high, difference, verdict, pairs, where, largest, cells. Each row is one cell that is fixed
    before looking: *low-shot* the fewest training examples on the usual test, *domain shift* the task's
    own shift (``TASKS[task].shift``) in the cell that ``shift_table`` shows, *fully supervised* all examples.
    ``largest`` is the largest relative gain among the condition's ``cells`` cells: what "up to" says,
    and by its choice too good. A condition without a finished pair has the verdict "not run".
    """
    rows = []
    own = compared[(compared["arm"] == method) & (compared["pairs"] > 0)]
    usual = own["test"] == USUAL
    tasks = compared[["task", "setting"]].drop_duplicates().itertuples(index=False)
    for task, setting in sorted(tasks, key=lambda known: (list(TASKS).index(known[0]), known[1])):
        here = (own["task"] == task) & (own["setting"] == setting)
        shifted = own[here & ~usual & ~own["test"].isin(CONTROLS)]
        tests = shifted.groupby(CELL)["test"].transform("nunique")
        main = shifted[shifted["test"] == TASKS[task].shift[0]]
        candidates: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = {}
        few = own[here & usual & (own["shots"] > 0)]
        candidates["low-shot"] = few, few.sort_values("train_examples", kind="stable")
        by_tests = main.assign(_tests=tests).sort_values(
            ["_tests", "pairs", "train_examples"], ascending=False, kind="stable"
        )
        candidates["domain shift"] = shifted, by_tests
        every = own[here & usual & (own["shots"] == 0)]
        candidates["fully supervised"] = every, every
        for condition, (cells, ordered) in candidates.items():
            row: dict[str, Any] = {
                "benchmark": BENCHMARKS[task], "task": task, "setting": setting, "condition": condition,
                "paper": CLAIMS[BENCHMARKS[task]][condition], "verdict": "not run", "pairs": 0, "cells": 0,
            }  # fmt: skip
            if len(ordered):
                chosen = ordered.iloc[0]
                row |= {name: chosen[name] for name in ("relative", "relative_low", "relative_high")}
                row |= {name: chosen[name] for name in ("difference", "verdict", "pairs")}
                row |= {
                    "where": f"{chosen['batch']}: {chosen['train_examples']:.0f} examples, {chosen['split']}",
                    "largest": cells["relative"].max(), "cells": len(cells),
                }  # fmt: skip
            rows.append(row)
    columns = [
        "benchmark", "task", "setting", "condition", "paper", "relative", "relative_low", "relative_high",
        "difference", "verdict", "pairs", "where", "largest", "cells",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that are in no table, with the state and reason of each."""
    return runs[runs["state"] != "done"].drop(columns=["train_examples", "subset"]).reset_index(drop=True)


def power_note(compared: pd.DataFrame, alpha: float = ALPHA) -> str:
    """What so many pairs and tested arms can show at all; "" if every comparison can reach ``alpha``."""
    short = compared[compared["verdict"] == "too few pairs"]
    if short.empty:
        return ""
    arms = int(np.nanmax([1, *compared["arms_tested"].dropna()]))
    together = f"{arms} arms tested together" if arms > 1 else "one arm tested"
    return (
        f"{len(short)} comparisons have too few pairs (at most {int(short['pairs'].max())}): with "
        f"{together}, {pairs_needed(arms, alpha)} seeds are the fewest whose sign-flip test can reach "
        f"{alpha:g} after Holm's correction. Their intervals stand; no word on significance."
    )


def sentences(compared: pd.DataFrame) -> list[str]:
    """Each comparison in words (Markdown): difference, interval, relative gain, p-value, verdict."""
    found = []
    for row in compared[compared["pairs"] > 0].itertuples():
        setting = f", {row.setting}" if row.setting else ""
        interval = f"[{100 * row.difference_low:+.1f}, {100 * row.difference_high:+.1f}]"
        relative = f", relative {100 * row.relative:+.1f} %" if row.relative == row.relative else ""
        p_value = f", p = {row.p_adjusted:.3g} after Holm" if row.p_adjusted == row.p_adjusted else ""
        found.append(
            f"**{row.arm}** on {row.task}, {row.test} test, {row.train_examples:.0f} examples{setting}: "
            f"{100 * row.difference:+.1f} points {interval}{relative}{p_value}, {row.pairs} pairs: "
            f"**{row.verdict}**"
        )
    return found


# What is kept.

MANY_ROWS = 40  # a page shows a larger table only when it is asked for
PERCENT = {
    "mean", "low", "high", "chance", "over_chance", "baseline_mean", "difference", "difference_low",
    "difference_high", "relative", "relative_low", "relative_high", "gain_over_chance", "paper", "largest",
}  # fmt: skip
SIGNED = {name for name in PERCENT if name.startswith(("difference", "relative"))} | {
    "gain_over_chance", "paper", "largest",
}  # fmt: skip
INTERVALS = {
    "mean": ("low", "high"), "difference": ("difference_low", "difference_high"),
    "relative": ("relative_low", "relative_high"),
}  # fmt: skip


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table for readers: shares in per cent, intervals beside their value, nothing constant and empty."""
    limits = {name for pair in INTERVALS.values() for name in pair}
    found: dict[str, list[str]] = {}
    for name in table:
        if name in limits and any(value in table and name in pair for value, pair in INTERVALS.items()):
            continue
        values = [_shown(name, value) for value in table[name]]
        pair = INTERVALS.get(name)
        if pair and set(pair) <= set(table.columns):
            bounds = zip(table[pair[0]], table[pair[1]], strict=True)
            values = [
                f"{value} [{_shown(name, low)}, {_shown(name, high)}]" if low == low else value
                for value, (low, high) in zip(values, bounds, strict=True)
            ]
        if name != "setting" or any(values):
            found[name.replace("_", " ")] = values
    return pd.DataFrame(found, index=table.index)


def _shown(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if name in PERCENT:
        return f"{100 * value:{'+' if name in SIGNED else ''}.1f}"
    if name.startswith("p_"):
        return f"{value:.3g}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_study(
    folder: Path,
    tables: Mapping[str, tuple[str, pd.DataFrame]],
    figures: Mapping[str, tuple[str, str, bytes, str]],
    title: str,
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes tables, figures and one page that loads nothing; returns the page.

    Each table becomes NAME.csv (full numbers), NAME.parquet and NAME.html (a fragment, readable), each
    figure NAME.png and NAME.svg. Every file appears whole; others in the folder are left alone.

    Args:
        folder: made if it is not there.
        tables: caption and table, by name.
        figures: caption, name of the table with its numbers, PNG and SVG, by name.
        title: of the page.
        notes: sentences below the title.
        facts: what the tables were made with; study.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, (caption, source, png, svg) in figures.items():
        with whole_path(folder / f"{name}.png") as partial:
            partial.write_bytes(png)
        with whole_file(folder / f"{name}.svg") as out:
            out.write(svg)
        image = b64encode(svg.encode()).decode()
        shown = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{image}">'
        numbers = link(f"{source}.csv", f"{source}.csv")
        parts.append(Section(caption, f"<figure>{shown}<figcaption>Numbers: {numbers}</figcaption></figure>"))
    for name, (caption, table) in tables.items():
        with whole_file(folder / f"{name}.csv") as out:
            table.to_csv(out, index=False)
        with whole_path(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial, index=False)
        body = table_html(readable(table), sorts=True)
        with whole_file(folder / f"{name}.html") as out:
            out.write(f"<h2>{escape(caption)}</h2>{body}\n")
        files = f"<p>{link(f'{name}.csv', 'CSV')}, {link(f'{name}.parquet', 'Parquet')}</p>"
        parts.append(Section(caption, body + files, folded=len(table) > MANY_ROWS))
    write_json(folder / "study.json", dict(facts or {}))
    page = folder / "index.html"
    with whole_file(page) as out:
        out.write(page_html(title, notes, parts))
    return page
