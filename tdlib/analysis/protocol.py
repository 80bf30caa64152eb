"""The paper's protocol: few examples, domain shift, all examples, and a verdict on each of its claims.

Chooses which comparisons (``compare``) stand for a condition, before looking at them, and says in words
what they show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdlib.analysis.compare import CELL, USUAL, number_of_worlds, worlds_in_words
from tdlib.analysis.statistics import ALPHA, FOUND, pairs_needed
from tdlib.data.tasks import TASKS

CONTROLS = ("balanced",)  # tests of what was learned, which are no shift and so count for no claim

# The abstract of arXiv 2201.05729: relative improvement over finetuning, "up to".
CLAIMS = {
    ("VCR", "low-shot"): 0.519,
    ("VCR", "domain shift"): 0.713,
    ("VCR", "fully supervised"): 0.02,
    ("SNLI-VE", "low-shot"): 0.066,
    ("SNLI-VE", "fully supervised"): 0.03,
    ("VQA", "low-shot"): 0.09,
    ("VQA", "fully supervised"): 0.013,
}
# Our reading of the paper, and the method that adds re-pairing to it.
METHODS = ("clip_td", "clip_td_repaired")
FINDINGS = {
    "better": "shown", "worse": "contrary", "not distinguishable": "not shown",
    "too few pairs": "too few pairs", "not tested": "not tested",
}  # fmt: skip


# Tables.


def together(compared: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of all worlds together, and for an arm that was not run in all, those of its worlds.

    In these the other arms stand too, so that the arm is seen beside means of the same worlds. A world by
    itself is left out unless it is all that some arm of the cell has.
    """
    shown = pd.MultiIndex.from_frame(_of_most_worlds(compared)[[*_test_columns(compared), "world"]])
    return compared[pd.MultiIndex.from_frame(compared[shown.names]).isin(shown)]


def _of_most_worlds(compared: pd.DataFrame) -> pd.DataFrame:
    """Keep of each arm on each test the rows of most worlds."""
    worlds = compared["world"].map(number_of_worlds)
    keys = [compared[name] for name in (*_test_columns(compared), "arm")]
    return compared[worlds == worlds.groupby(keys, dropna=False).transform("max")]


def _test_columns(compared: pd.DataFrame) -> list[str]:
    return [name for name in (*CELL, "measure", "split", "stratum") if name in compared]


def main_measure(compared: pd.DataFrame) -> pd.DataFrame:
    """Rows of the measure that a task is named for: of task "vcr" Q->AR, without its parts."""
    return compared[compared["measure"] == compared["task"].map({name: TASKS[name].metric for name in TASKS})]


def shots_table(compared: pd.DataFrame) -> pd.DataFrame:
    """Selects accuracy over the number of training examples on the usual test; worlds as in ``together``."""
    whole = main_measure(together(compared))
    usual = whole[whole["test"] == USUAL]
    return _sorted(usual, ["task", "setting", "world", "arm", "train_examples"], compared)


def shift_table(compared: pd.DataFrame) -> pd.DataFrame:
    """Selects every arm on every test, the usual one first, for the figure of shifts.

    Per task and setting, the size with most tests; of several, the one with most pairs, so that a size that
    has hardly begun does not stand for one that is done; then the one with most examples. Worlds as in
    ``together``.
    """
    whole = main_measure(together(compared))
    of_cell = whole.groupby(CELL)
    sizes = whole.assign(
        _tests=of_cell["test"].transform("nunique"), _pairs=of_cell["pairs"].transform("max")
    )
    order = ["_tests", "_pairs", "train_examples"]
    sizes = sizes.sort_values(order, ascending=False, kind="stable")
    chosen = sizes["shots"] == sizes.groupby(["task", "setting"])["shots"].transform("first")
    return _sorted(sizes[chosen], ["task", "setting", "world", "test", "arm"], compared)


def _sorted(table: pd.DataFrame, by: Sequence[str], compared: pd.DataFrame) -> pd.DataFrame:
    """Sorts rows: tasks, tests and arms in the order in which they stand, rows of most worlds first, other
    columns by value.
    """
    worlds = sorted(compared["world"].unique(), key=lambda world: (-number_of_worlds(world), world))
    orders = {
        "task": list(TASKS), "test": [USUAL, *compared["test"]], "arm": list(compared["arm"]),
        "world": worlds,
    }  # fmt: skip

    def places(values: pd.Series) -> pd.Series:
        if values.name not in orders:
            return values
        order = dict.fromkeys(orders[str(values.name)])
        return values.map({value: place for place, value in enumerate(order)})

    table = table[compared.columns]
    return table.sort_values(list(by), key=places, kind="stable", ignore_index=True)


# The claims.

CLAIM_COLUMNS = [
    "benchmark", "task", "setting", "condition", "arm", "paper", "relative", "relative_low", "relative_high",
    "difference", "difference_low", "difference_high", "verdict", "finding", "worlds", "pairs", "where",
    "largest", "cells", "shots", "split",
]  # fmt: skip


def claims_table(compared: pd.DataFrame, methods: Sequence[str] = METHODS) -> pd.DataFrame:
    """Compares the runs with each claim of the paper's abstract: a row per task, condition and method.

    ``paper`` is the abstract's relative gain over finetuning ("up to"; missing where it claims none). Each
    row is one cell that is fixed before looking, all of the method's worlds together: *low-shot* the fewest
    training examples on the usual test, *domain shift* the task's own shift (``TASKS[task].shift``) in the
    cell that ``shift_table`` shows, *fully supervised* all examples. ``finding`` is "shown" where the arm is
    better by the paired test, "contrary" where it is worse, "not shown" where neither, "not run" without a
    finished pair; ``worlds`` are those in which the same test, alone, finds what is shown or contrary.
    ``largest`` is the largest relative gain among the condition's ``cells`` cells: what "up to" says, and by
    its choice too good. Compared with another baseline, a method's rows are what it adds to that.
    """
    rows = []
    whole = main_measure(_of_most_worlds(compared))
    tasks = compared[["task", "setting"]].drop_duplicates().itertuples(index=False)
    for task, setting in sorted(tasks, key=lambda known: (list(TASKS).index(known[0]), known[1])):
        here = whole[(whole["task"] == task) & (whole["setting"] == setting) & (whole["pairs"] > 0)]
        for method in methods:
            for condition, (cells, ordered) in _conditions(here[here["arm"] == method], task).items():
                benchmark = TASKS[task].benchmark
                row: dict[str, Any] = {
                    "benchmark": benchmark, "task": task, "setting": setting, "condition": condition,
                    "arm": method, "paper": CLAIMS.get((benchmark, condition)), "verdict": "not run",
                    "finding": "not run", "worlds": "", "pairs": 0, "cells": 0,
                }  # fmt: skip
                if len(ordered):
                    row |= _claim(ordered.iloc[0], cells, compared)
                rows.append(row)
    return pd.DataFrame(rows, columns=CLAIM_COLUMNS)


def _conditions(arm: pd.DataFrame, task: str) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Lists an arm's cells of each condition, and the cells that may represent it, the chosen one first.

    The task's own shift is the MiniWorld's, or where that was not tested, that of a user's own data.
    """
    usual = arm["test"] == USUAL
    twins = arm["split"].str.startswith(f"{TASKS[task].evaluated}_")  # and not, say, the test or train split
    shifted = arm[twins & ~arm["test"].isin(CONTROLS)]
    tests = shifted.groupby(CELL)["test"].transform("nunique")
    own = next((name for name in TASKS[task].shift if name in set(shifted["test"])), "")
    main = shifted.assign(_tests=tests)[shifted["test"] == own]
    by_tests = main.sort_values(["_tests", "pairs", "train_examples"], ascending=False, kind="stable")
    few, every = arm[usual & (arm["shots"] > 0)], arm[usual & (arm["shots"] == 0)]
    return {
        "low-shot": (few, few.sort_values("train_examples", kind="stable")),
        "domain shift": (shifted, by_tests),
        "fully supervised": (every, every),
    }


def _claim(chosen: pd.Series, cells: pd.DataFrame, compared: pd.DataFrame) -> dict[str, Any]:
    same = [*CELL, "arm", "measure", "split", "verdict"]
    worlds = compared["world"].map(number_of_worlds)
    alone = compared[(compared[same] == chosen[same]).all(axis=1) & (worlds == 1)]
    test = [*CELL, "measure", "split"]
    most = worlds[(compared[test] == chosen[test]).all(axis=1)].max()
    apart = f", {worlds_in_words(chosen['world'])}" if number_of_worlds(chosen["world"]) < most else ""
    limits = [f"{name}{end}" for name in ("relative", "difference") for end in ("", "_low", "_high")]
    return {name: chosen[name] for name in (*limits, "verdict", "pairs", "shots", "split")} | {
        "finding": FINDINGS[chosen["verdict"]],
        "worlds": ", ".join(alone["world"]) if chosen["verdict"] in FOUND else "",
        "where": f"{chosen['train_examples']:.0f} examples, {chosen['split']}{apart}",
        "largest": cells["relative"].max(),
        "cells": len(cells),
    }


def claim_sentences(
    claims: pd.DataFrame, added: pd.DataFrame | None = None, kinds: pd.DataFrame | None = None,
    over: str = METHODS[0],
) -> list[str]:  # fmt: skip
    """Writes a paragraph (Markdown) per claim of the abstract, seven in all, with what the runs show.

    ``claims`` are of ``claims_table``, methods against finetuning; ``added`` with another method, ``over``,
    as the baseline: what re-pairing adds to it. ``kinds`` are comparisons within kinds of examples
    (``compare.compare_within``): what known and unknown concepts gain is said of each claim.
    """
    paragraphs = []
    for claim, paper in CLAIMS.items():
        said = [_claim_words(row) + _kinds_words(row, kinds) for row in _of_claim(claims, claim)]
        said += [
            f"re-pairing adds {_points(row)} to {over} on {_placed(row)} ({row.verdict})"
            for row in ([] if added is None else _of_claim(added, claim))
            if row.pairs > 0 and _repaired(row)
        ]
        head = f"**{', '.join(claim)}**: the paper says up to {100 * paper:+.1f} % relative."
        paragraphs.append(f"{head} Here: {'; '.join(said) or 'not run'}.")
    return paragraphs


def _repaired(row: Any) -> bool:
    """Whether a row is of the method that goes beyond the paper, whatever a batch varies in it."""
    return row.arm.split(", ")[0] == METHODS[1]


def _of_claim(table: pd.DataFrame, claim: tuple[str, str]) -> list[Any]:
    return [row for row in table.itertuples() if (row.benchmark, row.condition) == claim]


def _claim_words(row: Any) -> str:
    arm = row.arm + (", which the paper does not have," if _repaired(row) else "")
    if not row.pairs:
        return f"{arm} on {_placed(row)}: not run"
    relative = f"{100 * row.relative:+.1f} % relative" if row.relative == row.relative else "relative to 0 %"
    each = "each of the worlds" if ", " in row.worlds else "world"
    worlds = f", in {each} {row.worlds} by itself" if row.worlds else ""
    gain = f"{relative}, {_points(row)}, {row.pairs} pairs"
    return f"{arm} on {_placed(row)}: **{row.finding}**{worlds}: {gain}"


def _kinds_words(row: Any, kinds: pd.DataFrame | None) -> str:
    """Writes the gain on known and on unknown concepts in a claim's cell, all worlds together."""
    if kinds is None or kinds.empty or not row.pairs:
        return ""
    whole = main_measure(_of_most_worlds(kinds[kinds["stratum"].str.startswith("concept: ")]))
    same = [*CELL, "split", "arm"]
    here = whole[np.logical_and.reduce([whole[name] == getattr(row, name) for name in same])]
    said = [
        f"{one.stratum.removeprefix('concept: ')} concepts {_points(one)}"
        for one in here[here["pairs"] > 0].itertuples()
    ]
    return f" ({'; '.join(said)})" if said else ""


def _placed(row: Any) -> str:
    setting = f", {row.setting}" if row.setting else ""
    return f"{row.task}{setting}" + (f" ({row.where})" if row.pairs else "")


def _points(row: Any) -> str:
    limits = f"[{100 * row.difference_low:+.1f}, {100 * row.difference_high:+.1f}]"
    return f"{100 * row.difference:+.1f} points {limits}"


# Words.


def runs_in_words(runs: pd.DataFrame) -> list[str]:
    """Says of each task which runs there are: what they all share, by which code, on which data."""
    told = []
    for task, own in runs[runs["state"] == "done"].groupby("task", sort=False):
        commits = ", ".join(sorted({*own["commit"]} - {""})) or "not recorded"
        worlds = ", ".join(sorted({*own["world"]} - {""}))
        data = f"; generated data, small beside the paper's (MiniWorld {worlds})" if worlds else ""
        shared = f"{own['shared'].iloc[0]}, all else default"
        told.append(f"{len(own)} finished runs of {task}: {shared}; code {commits}{data}.")
    return told


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """Lists the runs that are in no table: a row for those that differ in their seed alone.

    Columns: batch, state, reason ("" without one), task, shots, arm, world, setting, tuned (missing where
    nothing is known of a run), then runs (how many), seeds, and first, the id of one of them.
    """
    keys = ["batch", "state", "reason", "task", "shots", "arm", "world", "setting", "tuned"]
    left = runs[runs["state"] != "done"].fillna({"reason": ""}).groupby(keys, sort=False, dropna=False)
    return left.agg(
        runs=("run", "size"),
        seeds=("seed", lambda seeds: ", ".join(f"{int(seed)}" for seed in seeds.dropna())),
        first=("run", "first"),
    ).reset_index()


def power_note(compared: pd.DataFrame, alpha: float = ALPHA, tested: Sequence[str] = ()) -> str:
    """Says which comparisons have too few pairs for ``alpha``, and how many they need; "" if none has.

    Names the ``tested`` arms that have no row at all, but count in the correction.
    """
    few = compared["verdict"] == "too few pairs"
    alone, short = int((few & (compared["pairs"] == 0)).sum()), compared[few & (compared["pairs"] > 0)]
    have = "row has" if alone == 1 else "rows have"
    told = f"{alone} {have} no pair: the baseline was not run with their seeds and settings." if alone else ""
    if absent := [name for name in tested if name not in set(compared["arm"])]:
        told = f"{told} To be tested, but without a finished run: {', '.join(absent)}.".strip()
    if short.empty:
        return told
    arms = int(np.nanmax([1, *compared["arms_tested"].dropna()]))
    beside = f"{arms} arms tested together" if arms > 1 else "one arm tested"
    few_pairs = (
        f"{len(short)} comparisons have too few pairs (at most {int(short['pairs'].max())}): with "
        f"{beside}, {pairs_needed(arms, alpha)} pairs are the fewest whose sign-flip test can reach "
        f"{alpha:g} after Holm's correction. Their intervals stand; no word on significance."
    )
    return f"{told} {few_pairs}".strip()


def sentences(compared: pd.DataFrame) -> list[str]:
    """Writes each comparison in words (Markdown): difference, interval, relative gain, p-value, verdict."""
    told = []
    for row in compared[compared["pairs"] > 0].itertuples():
        place = f", {row.setting}" if row.setting else ""
        if row.world and (compared["world"] != row.world).any():
            place += f", {worlds_in_words(row.world)}"
        measure = "" if row.measure == TASKS[row.task].metric else f" {row.measure}"
        relative = f", relative {100 * row.relative:+.1f} %" if row.relative == row.relative else ""
        p_value = f", p = {row.p_adjusted:.3g} after Holm" if row.p_adjusted == row.p_adjusted else ""
        told.append(
            f"**{row.arm}** on {row.task}{measure}, {row.test} test, {row.train_examples:.0f} examples"
            f"{place}: {_points(row)}{relative}{p_value}, {row.pairs} pairs: **{row.verdict}**"
        )
    return told
