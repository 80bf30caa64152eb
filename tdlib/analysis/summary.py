"""Summarises a few runs of one setting in sentences and short tables, for a page read in a minute."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tdlib.analysis.compare import BASELINE, summarise
from tdlib.analysis.scores import joint_predictions
from tdlib.analysis.statistics import ALPHA, FOUND, pairs_needed
from tdlib.core.facts import signed

TOO_FEW = "too few pairs"


def summarise_within(predictions: pd.DataFrame, by: str) -> pd.DataFrame:
    """Applies ``compare.summarise`` to each kind of examples; adds columns ``by`` and ``examples``.

    ``by`` is a column with the kind, such as ``concept``; rows with "" are left out. ``examples`` is the
    number of questions of the kind in the split.
    """
    frames = []
    for kind, rows in predictions[predictions[by].fillna("") != ""].groupby(by, sort=True):
        table, asked = summarise(rows), joint_predictions(rows).groupby("split")["id"].nunique()
        frames.append(table.assign(**{by: kind, "examples": table["split"].map(asked)}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[by, "split", "arm"])


def answer(table: pd.DataFrame, tests: Mapping[str, str]) -> str:
    """Says in a sentence how far each arm is from finetuning, and then what that proves (Markdown).

    ``table`` is of ``compare.summarise``; ``tests`` says what each split is called in a sentence, such as
    {"val": "the usual test"}.
    """
    table = table.assign(test=table["split"].map(lambda split: tests.get(split, split)))
    gains = table.dropna(subset=["difference"])
    if gains.empty:
        return f"Nothing was compared: that takes {BASELINE!r} and another arm with the same seeds."
    changes = [
        f"`{arm}` by "
        + " and ".join(
            f"**{signed(r.difference)} points** {_limits(r)} on {r.test}" for r in rows.itertuples()
        )
        for arm, rows in gains.groupby("arm", sort=False)
    ]
    usual = table[table["arm"] == BASELINE].itertuples()
    few = ", over pictures alone: there is one seed" if gains["pairs"].max() == 1 else ""
    alone = " and ".join(f"{100 * row.mean:.1f} % on {row.test}" for row in usual)
    return (
        f"Against `{BASELINE}` (right in {alone}) accuracy changes with {'; with '.join(changes)} (95 % "
        f"intervals{few}). {_proves(gains)}"
    )


def _limits(row: Any) -> str:
    return f"[{signed(row.difference_low)}, {signed(row.difference_high)}]"


def _proves(gains: pd.DataFrame) -> str:
    """Says what was significant; where no outcome could be, how many seeds that would take."""
    arms, pairs = gains["arm"].nunique(), int(gains["pairs"].max())
    if (gains["verdict"] == TOO_FEW).all():
        return (
            f"**Not significant at this size**: the test over {pairs} seeds and {arms} arms cannot reach "
            f"p < {ALPHA:g} whatever they show; {pairs_needed(arms)} seeds are the fewest that can."
        )
    significant = gains[gains["verdict"].isin(FOUND)]
    if significant.empty:
        return f"**Not significant at this size**: no difference passes the paired test over {pairs} seeds."
    named = ", ".join(f"`{row.arm}` {row.verdict} on {row.test}" for row in significant.itertuples())
    rest = "; **the others are not significant**" if len(significant) < len(gains) else ""
    return f"The paired test over {pairs} seeds finds: {named}{rest}."


def score_table(table: pd.DataFrame, reference: pd.DataFrame, tests: Mapping[str, str]) -> pd.DataFrame:
    """Makes a table of scores with intervals and of differences: a row per arm, two columns per test.

    ``table`` and ``tests`` as in ``answer``; ``reference`` holds scores that need no training: arm, split
    and mean (``training.reference``).
    """
    rows: dict[str, dict[str, str]] = {}
    for row in [*reference.reindex(columns=table.columns).itertuples(), *table.itertuples()]:
        name = tests.get(str(row.split), str(row.split))
        limits = "" if pd.isna(row.low) else f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        change = "" if pd.isna(row.difference) else f"{signed(row.difference)} {_limits(row)}"
        cells = rows.setdefault(str(row.arm), {"arm": str(row.arm)})
        cells |= {f"{name}: score (%)": f"{100 * row.mean:.1f}{limits}"}
        cells |= {f"{name}: difference (points)": change}
    scores = pd.DataFrame(list(rows.values()))
    columns = [name for test in tests.values() for name in scores if name.startswith(f"{test}: ")]
    return scores[["arm", *columns]].fillna("")
