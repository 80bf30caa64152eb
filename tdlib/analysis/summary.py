"""What a few runs of one setting say, for a page that is read in a minute: sentences and short tables."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tdlib.analysis.compare import summarise
from tdlib.analysis.statistics import ALPHA, pairs_needed

TOO_FEW = "too few pairs"


def summarise_within(predictions: pd.DataFrame, by: str) -> pd.DataFrame:
    """``compare.summarise`` for each kind of examples by itself, with columns ``by`` and ``examples``.

    Args:
        predictions: see there; rows where ``by`` is empty are left out.
        by: a column that tells kinds of examples apart, such as ``concept`` (``scores.add_strata``).
    """
    frames = [
        summarise(rows).assign(**{by: kind, "examples": rows.groupby("split")["id"].nunique().max()})
        for kind, rows in predictions[predictions[by].fillna("") != ""].groupby(by, sort=True)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[by, "split", "arm"])


def answer(table: pd.DataFrame, tests: Mapping[str, str], baseline: str = "finetune") -> str:
    """Say in a sentence how far each arm is from the baseline, and then what that proves (Markdown).

    Args:
        table: as ``compare.summarise`` gives it.
        tests: what each split is called in a sentence: {"val": "the usual test"}.
        baseline: the arm that the table's differences are to.
    """
    gains = table.dropna(subset=["difference"])
    if gains.empty:
        return f"Nothing was compared: that takes {baseline!r} and another arm with the same seeds."
    changes = [
        f"`{arm}` by " + " and ".join(_change(row, tests) for row in rows.itertuples())
        for arm, rows in gains.groupby("arm", sort=False)
    ]
    usual = table[table["arm"] == baseline]
    alone = " and ".join(f"{100 * row.mean:.1f} % on {_test(row, tests)}" for row in usual.itertuples())
    return (
        f"Against `{baseline}` (right in {alone}) accuracy changes with {'; with '.join(changes)} (95 % "
        f"intervals). {_proves(gains, tests)}"
    )


def _change(row: Any, tests: Mapping[str, str]) -> str:
    return f"**{points(row.difference)}** {_limits(row)} on {_test(row, tests)}"


def _test(row: Any, tests: Mapping[str, str]) -> str:
    return tests.get(str(row.split), str(row.split))


def points(difference: float) -> str:
    """A difference of shares in words: "+1.2 points"."""
    return f"{_signed(difference)} points"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def _limits(row: Any) -> str:
    return f"[{_signed(row.difference_low)}, {_signed(row.difference_high)}]"


def _proves(gains: pd.DataFrame, tests: Mapping[str, str]) -> str:
    """The verdicts in words; where no outcome could be significant, that and how many seeds could."""
    arms, pairs = gains["arm"].nunique(), int(gains["n"].max())
    if (gains["verdict"] == TOO_FEW).all():
        return (
            f"**Not significant at this size**: the test over {pairs} seeds and {arms} arms cannot reach "
            f"p < {ALPHA:g} whatever they show; {pairs_needed(arms)} seeds are the fewest that can."
        )
    found = gains[gains["verdict"].isin(["better", "worse"])]
    if found.empty:
        return f"**Not significant at this size**: no difference passes the paired test over {pairs} seeds."
    named = ", ".join(f"`{row.arm}` {row.verdict} on {_test(row, tests)}" for row in found.itertuples())
    rest = "; **the others are not significant**" if len(found) < len(gains) else ""
    return f"The paired test over {pairs} seeds finds: {named}{rest}."


def score_table(table: pd.DataFrame, reference: pd.DataFrame, tests: Mapping[str, str]) -> pd.DataFrame:
    """Scores with intervals and differences as they are read: a row per arm, two columns per test.

    Args:
        table: as ``compare.summarise`` gives it.
        reference: what is reached without a student: arm, split, mean (``training.reference``).
        tests: what each split is called.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in [*reference.itertuples(), *table.itertuples()]:
        name = tests.get(str(row.split), str(row.split))
        score = f"{100 * row.mean:.1f}"
        if hasattr(row, "low"):
            score += f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        own = rows.setdefault(str(row.arm), {"arm": str(row.arm)})
        own[f"{name}: score (%)"] = score
        if hasattr(row, "difference"):
            apart = row.difference == row.difference
            own[f"{name}: difference (points)"] = f"{_signed(row.difference)} {_limits(row)}" if apart else ""
    found = pd.DataFrame(list(rows.values()))
    columns = [name for test in tests.values() for name in found if name.startswith(f"{test}: ")]
    return found[["arm", *columns]].fillna("")
