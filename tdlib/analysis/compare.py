"""Compares arms: each arm's mean with its interval, and its paired difference to the baseline.

A *cell* is what arms are compared within: one task, setting (whatever else differs between runs) and size
of the training subset, of all batches that are read together. Two runs are a pair where they are of one
cell, one world and one seed; they must then have learned from the same examples and be tested on the same.
Several worlds (MiniWorlds of different seeds) are compared apart and together: see
``statistics.pooled_difference``. Means of several worlds stand beside each other only where they are of the
same ones, because worlds differ in how hard they are: an arm that was not run in all of them has rows of its
worlds, with the other arms in these.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tdlib.analysis.scores import ProtocolError, joint_predictions
from tdlib.analysis.statistics import (
    ALPHA,
    UNTESTED,
    PairedDifference,
    adjusted_together,
    chance_corrected,
    pooled_difference,
    pooled_mean,
)
from tdlib.arms import ARMS
from tdlib.core.paths import did_you_mean
from tdlib.data.tasks import TASKS

CELL = ["task", "setting", "shots"]
BASELINE = "finetune"  # the arm that the others are compared with
USUAL = "usual"  # the test that is not shifted
ALL_WORLDS = "all"  # worlds in which there are finished runs of the task and setting
COLUMNS = [
    *CELL, "world", "train_examples", "measure", "split", "test", "examples", "pictures", "arm", "seeds",
    "mean", "low", "high", "chance", "over_chance", "pairs", "baseline_mean", "difference", "difference_low",
    "difference_high", "relative", "relative_low", "relative_high", "gain_over_chance", "p_value",
    "p_adjusted", "arms_tested", "verdict", "unpaired",
]  # fmt: skip


@dataclass(frozen=True)
class Tested:
    """Arms on one test of one world: scores (seeds, examples) of each, and the examples' pictures."""

    arms: Mapping[str, pd.DataFrame]
    clusters: np.ndarray

    def of(self, arms: Collection[str]) -> "Tested":
        """The same test with these arms alone."""
        return Tested({arm: scores for arm, scores in self.arms.items() if arm in arms}, self.clusters)

    def seeds(self, arm: str) -> pd.Index:
        return self.arms[arm].index if arm in self.arms else pd.Index([], dtype=int)


def check_arms(runs: pd.DataFrame, **asked: Sequence[str]) -> None:
    """Refuses names that are neither arms of the library nor of these runs (with their variants).

    Raises:
        ProtocolError: names the list, the unknown arm and those that there are.
    """
    there = sorted(set(runs["arm"].dropna()))
    for listed, names in asked.items():
        for name in names:
            if name not in there and name not in ARMS:
                raise ProtocolError(
                    f"{listed}: unknown {name}{did_you_mean(name, [*there, *ARMS])}; the runs have the arms "
                    f"{', '.join(there) or 'of no batch'}"
                )


def compare_arms(runs: pd.DataFrame, scores: pd.DataFrame, baseline: str = BASELINE,
                 tested: Sequence[str] = (), alpha: float = ALPHA, resamples: int = 2000
                 ) -> pd.DataFrame:  # fmt: skip
    """Scores every arm in every cell on every test, and its paired difference to the baseline.

    Columns: those of a cell, world (the worlds that the row is of: one, "all" together, or some together,
    as "0, 2"), train_examples (mean over runs), measure, split, test ("usual", or the shift), examples and
    pictures (tested, in all of these worlds), arm, seeds (of these worlds), mean, low, high (over all seeds
    of the arm), chance, over_chance; then over the pairs alone: pairs, baseline_mean, difference,
    difference_low, difference_high, relative, relative_low, relative_high, gain_over_chance, p_value,
    p_adjusted (Holm over the tested arms), arms_tested, verdict, and unpaired: seeds of arm or baseline that
    have no partner yet. ``runs`` are of one or several batches (``scores.read_runs``), ``scores`` theirs
    (``scores.read_scores``).

    ``tested`` are the arms whose difference is tested, all of the cell if empty; choose them before looking,
    as every further arm needs more pairs (``statistics.pairs_needed``). They count for Holm's correction in
    every cell, test and world, also where some have no pair yet: what is found must not depend on how far the
    runs are. Others get intervals and the verdict "not tested". ``alpha`` is the level of the verdicts,
    ``resamples`` the number of bootstrap samples. Intervals are of 95 %.

    An arm has rows of several worlds together only if each of them has pairs of it with the baseline (of an
    arm without any pair: has its runs). The combinations are the largest one of each arm.

    Raises:
        ProtocolError: an arm to be tested, or the baseline, is unknown; ``alpha`` is no level; two runs of a
            cell and world have the same arm and seed; or a pair learned from or was tested on other examples.
    """
    check_arms(runs, baseline=[baseline], tested=tested)
    if not 0 < alpha < 1:
        raise ProtocolError(f"alpha={alpha}: expected a level between 0 and 1, such as 0.05")
    done = runs[runs["state"] == "done"]
    rows: list[dict[str, Any]] = []
    every_world = {key: set(own["world"]) for key, own in done.groupby(["task", "setting"])}
    for key, cell in done.groupby(CELL, sort=False):
        where = dict(zip(CELL, key, strict=True))
        options = baseline, tested or list(dict.fromkeys(cell["arm"])), alpha, resamples
        for world, own in cell.groupby("world", sort=False):
            _check_runs(_place(where, own, str(world)), own, baseline)
        of_cell = scores[scores["run"].isin(cell["run"])]
        for (measure, split), part in of_cell.groupby(["measure", "split"], sort=False):
            shared = where | {
                "train_examples": float(cell["train_examples"].mean()), "measure": measure, "split": split,
                "test": name_of_test(str(where["task"]), str(split)),
            }  # fmt: skip
            worlds = {
                str(world): _tested(f"{_place(where, own)}, split {split!r}", own, part)
                for world, own in cell.groupby("world", sort=False)
                if own["run"].isin(part["run"]).any()
            }
            chances = part.groupby(part["run"].map(cell.set_index("run")["world"]))["chance"].mean()
            worlds_of = _worlds_of_arms(worlds, baseline)
            for together in [(world,) for world in worlds] + _combinations(worlds_of):
                # Each world counts alike, however many runs it has.
                chance = float(np.mean([chances[world] for world in together]))
                of_all = len(together) > 1 and set(together) == every_world[key[:2]]
                shared["world"] = ALL_WORLDS if of_all else ", ".join(together)
                # An arm of fewer worlds has no row here, so its p must not stand in the correction either.
                arms = {arm for arm in worlds_of if len(together) == 1 or worlds_of[arm].issuperset(together)}
                compared = [worlds[world].of(arms) for world in together]
                rows += [shared | row for row in arm_rows(compared, chance, *options)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _worlds_of_arms(worlds: Mapping[str, Tested], baseline: str) -> dict[str, set[str]]:
    """The worlds that each arm's means may be taken over: those with pairs of it and the baseline."""
    found: dict[str, set[str]] = {}
    for arm in dict.fromkeys(arm for tested in worlds.values() for arm in tested.arms):
        ran = {world for world, tested in worlds.items() if arm in tested.arms}
        paired = {w for w in ran if len(worlds[w].seeds(arm).intersection(worlds[w].seeds(baseline)))}
        found[arm] = paired or ran
    return found


def _combinations(worlds_of: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Every arm's worlds where they are several, in order."""
    several = {tuple(sorted(worlds)) for worlds in worlds_of.values() if len(worlds) > 1}
    return sorted(several, key=lambda worlds: (-len(worlds), worlds))


def number_of_worlds(world: str) -> float:
    """Counts the worlds in the column ``world`` of ``compare_arms``; infinity for all of them."""
    return float("inf") if world == ALL_WORLDS else 1 + world.count(", ")


def worlds_in_words(world: str) -> str:
    """A row's ``world`` for a title: "all worlds", "world 0", "worlds 0, 2"; "" for a user's own data."""
    if not world:
        return ""
    if world == ALL_WORLDS:
        return "all worlds"
    return f"world{'s' if number_of_worlds(world) > 1 else ''} {world}"


def compare_within(runs: pd.DataFrame, scores: pd.DataFrame, by: str, **options: Any) -> pd.DataFrame:
    """``compare_arms`` (with its options) on each kind of examples, named by the column ``stratum``.

    ``by`` is the column of ``scores`` with the kind, such as ``concept``; rows without one are left out.
    Holm's correction is over the arms within each kind.
    """
    columns = ["stratum", *COLUMNS]
    frames = [
        compare_arms(runs, rows, **options).assign(stratum=f"{by}: {kind}")[columns]
        for kind, rows in scores[scores[by].fillna("") != ""].groupby(by, sort=True)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def summarise(predictions: pd.DataFrame) -> pd.DataFrame:
    """Mean score per arm and split with 95 % intervals, and the paired difference to finetuning.

    Columns: arm, split, mean, low, high, n (seeds), pairs (seeds that finetuning has too), difference,
    difference_low, difference_high, and the verdict, corrected for the number of arms on the same split.
    Splits without labels are left out; for task "vcr" the score is Q->AR. ``predictions``
    (``scores.read_predictions``) are of one setting.
    """
    rows: list[dict[str, Any]] = []
    labelled = predictions.groupby("split")["score"].transform("count") > 0
    for split, part in joint_predictions(predictions[labelled]).groupby("split", sort=False):
        pictures = part.drop_duplicates("id").set_index("id")["image"]
        arms = {
            str(arm): own.pivot(index="seed", columns="id", values="score")[pictures.index].astype(float)
            for arm, own in part.groupby("arm", sort=False)
        }
        compared = arm_rows([Tested(arms, pictures.to_numpy())], float("nan"))
        rows += [{"split": split, "n": row["seeds"]} | row for row in compared]
    columns = ["arm", "split", "mean", "low", "high", "n", "pairs", "difference", "difference_low"]
    return pd.DataFrame(rows, columns=[*columns, "difference_high", "verdict"])


def arm_rows(worlds: Sequence[Tested], chance: float, baseline: str = BASELINE, tested: Sequence[str] = (),
             alpha: float = ALPHA, resamples: int = 2000) -> list[dict[str, Any]]:  # fmt: skip
    """Makes a row per arm on the same test of several worlds: mean and interval over its seeds, and the
    paired difference to the baseline. ``chance`` is what guessing scores; the rest as in ``compare_arms``.
    """
    arms = list(dict.fromkeys(arm for world in worlds for arm in world.arms))
    differences: dict[str, PairedDifference] = {}
    for arm in arms:
        pairs = [
            (*(world.arms[name].loc[seeds].to_numpy() for name in (arm, baseline)), world.clusters)
            for world in worlds
            if arm != baseline and len(seeds := world.seeds(arm).intersection(world.seeds(baseline)))
        ]
        if pairs:
            differences[arm] = pooled_difference(pairs, chance, resamples=resamples)
    family = {*(tested or arms)} - {baseline}
    compared = {arm: one for arm, one in differences.items() if arm in family}
    differences |= adjusted_together(compared, len(family))
    rows = []
    for arm in arms:
        of_arm = [(world.arms[arm].to_numpy(), world.clusters) for world in worlds if arm in world.arms]
        mean, low, high = pooled_mean(of_arm, resamples=resamples)
        tests = [clusters for _, clusters in of_arm]
        row: dict[str, Any] = {
            "examples": sum(map(len, tests)), "pictures": sum(len(np.unique(one)) for one in tests),
            "arm": arm, "seeds": sum(len(values) for values, _ in of_arm), "mean": mean, "low": low,
            "high": high, "chance": chance, "over_chance": chance_corrected(mean, chance), "pairs": 0,
            "verdict": "", "unpaired": "",
        }  # fmt: skip
        if arm != baseline:
            alone = {
                int(seed)
                for world in worlds
                for seed in world.seeds(arm).symmetric_difference(world.seeds(baseline))
            }
            verdict = "too few pairs" if arm in family else UNTESTED
            row |= {"verdict": verdict, "unpaired": ", ".join(map(str, sorted(alone)))}
        if gain := differences.get(arm):
            row |= {
                "pairs": gain.pairs, "baseline_mean": gain.baseline, "difference": gain.difference,
                "difference_low": gain.low, "difference_high": gain.high, "relative": gain.relative,
                "relative_low": gain.relative_low, "relative_high": gain.relative_high,
                "gain_over_chance": gain.gain_over_chance, "verdict": UNTESTED,
            }  # fmt: skip
            if arm in compared:
                row |= {
                    "p_value": gain.p_value, "p_adjusted": gain.p_adjusted, "arms_tested": gain.arms,
                    "verdict": gain.verdict(alpha),
                }  # fmt: skip
        rows.append(row)
    return rows


# What cannot be compared is refused.


def _check_runs(place: str, runs: pd.DataFrame, baseline: str) -> None:
    """Raises ProtocolError where one arm and seed come twice, or a pair learned from other examples."""
    twice = runs[runs.duplicated(["arm", "seed"], keep=False)]
    if len(twice):
        named = ", ".join(f"{r.run} ({r.arm}, seed {int(r.seed)})" for r in twice.itertuples())
        raise ProtocolError(f"{place}: several runs of one arm and seed: {named}; expected one")
    usual = runs[runs["arm"] == baseline].set_index("seed")
    for run in runs[runs["seed"].isin(usual.index)].itertuples():
        partner = usual.loc[run.seed]
        if run.subset != partner["subset"]:
            raise ProtocolError(
                f"{place}, seed {int(run.seed)}: {run.arm} (run {run.run}) learned from "
                f"{run.train_examples:g} examples, digest {run.subset}, but {baseline} "
                f"(run {partner['run']}) from {partner['train_examples']:g}, digest {partner['subset']}; "
                "a pair needs the same"
            )


def _tested(place: str, runs: pd.DataFrame, scores: pd.DataFrame) -> Tested:
    """Makes tables of one world's scores; ProtocolError unless all runs were tested on the same examples."""
    scores = scores[scores["run"].isin(runs["run"])]
    first: pd.Series | None = None
    for run, rows in scores.groupby("run", sort=False):
        pictures = rows.set_index("id")["image"].sort_index()
        if first is None:
            first, first_run = pictures, run
        elif not pictures.equals(first):
            one, other = set(pictures.items()), set(first.items())
            lone = sorted(str(name) for name, _ in one ^ other) or ["the same ids more than once"]
            raise ProtocolError(
                f"{place}: runs {first_run} ({len(first)} examples) and {run} ({len(pictures)}) were tested "
                f"on different examples (first: {lone[0]!r}); a pair needs the same"
            )
    assert first is not None
    if not first.index.is_unique:
        raise ProtocolError(f"{place}: run {first_run} has several rows of one example")
    wide = scores.pivot(index="run", columns="id", values="score")[first.index].astype(float)
    arms = {
        str(arm): wide.loc[own["run"]].set_axis(own["seed"].astype(int).to_numpy(), axis="index").sort_index()
        for arm, own in runs[runs["run"].isin(wide.index)].groupby("arm", sort=False)
    }
    return Tested(arms, first.to_numpy())


def _place(where: Mapping[str, Any], runs: pd.DataFrame, world: str = "") -> str:
    batches = ", ".join(dict.fromkeys(runs["batch"]))
    setting = f", {where['setting']}" if where["setting"] else ""
    in_world = f", world {world}" if world else ""
    return f"batch {batches}, {where['task']}, shots {where['shots']:g}{setting}{in_world}"


def name_of_test(task: str, split: str) -> str:
    """Names the test of a split: "usual", or the shift."""
    usual = TASKS[task].evaluated
    return USUAL if split == usual else split.removeprefix(f"{usual}_")
