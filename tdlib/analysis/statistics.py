"""Intervals, paired tests and gains of accuracies over seeds and examples.

Arrays in, numbers out; knows no runs, arms or files. Rows are seeds: each is one training subset, one
head and one data order. Columns are examples, which come in clusters (those that share a picture).
Several worlds, each with its own seeds and examples, are pooled as strata: see ``pooled_difference``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TypeVar

import numpy as np

MINIMUM_PAIRS = 6  # with five pairs the exact sign-flip test cannot reach 0.05: 2 / 2^5 is 0.0625
EXACT_PAIRS = 14  # up to here all 2^n sign patterns are enumerated (16,384)
ALPHA = 0.05
LEVEL = 0.95  # of every interval
FLIPS = 20_000  # sign patterns drawn beyond ``EXACT_PAIRS``: a p-value about 0.05 is then right to 0.003
FOUND = ("better", "worse")  # verdicts of a difference that the paired test found
UNTESTED = "not tested"  # that of an arm which the test was not asked about
DRAWN_AT_ONCE = 400_000  # members of resamples in memory at once: bounds it for splits of any size

_NORMAL = NormalDist()
_Key = TypeVar("_Key")


# Intervals.


def bootstrap_interval(
    correct: np.ndarray, clusters: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval (``LEVEL``) of the mean of ``correct`` (seeds, examples), resampled on two levels.

    Seeds are drawn with replacement, and so are ``clusters`` of examples (those that share a
    picture stay together). Works as well for differences of two arms that share seeds and examples.

    The interval is bias-corrected and accelerated (BCa; Efron 1987, Better bootstrap confidence
    intervals): the limits are the resampled means' quantiles at
    ``Φ(z0 + (z0 + z) / (1 - a (z0 + z)))``, where ``Φ(z)`` is the limit's nominal share, ``Φ(z0)``
    the share of resampled means below the observed one (half of the equal ones), and ``a`` the
    acceleration from leaving out each seed and each cluster: for independent samples i of n_i members,
    ``a = Σ_i Σ_j (l_ij / n_i)³ / (6 (Σ_i Σ_j (l_ij / n_i)²)^(3/2))`` with the jackknife's influences
    ``l_ij`` (Davison and Hinkley 1997, section 5.3.2). A level with a single member has none; without
    any, ``a`` is 0 and the interval bias-corrected only.

    With few seeds every bootstrap is too narrow: it knows only the seeds that were run.

    Raises:
        ValueError: shapes disagree, there is nothing to resample, or a value is not finite.
    """
    return _Draws.of([correct], clusters, resamples, seed).interval(lambda means: means[0])


def pooled_mean(
    worlds: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Computes the mean over several worlds, each counting alike, and its interval, with worlds as strata.

    ``worlds`` are scores (seeds, examples) and clusters (examples,) of each.
    """
    draws = _pooled([([values], clusters) for values, clusters in worlds], resamples)
    return float(draws.observed[0]), *draws.interval(lambda means: means[0])


@dataclass(frozen=True)
class _Draws:
    """Means of tables that share seeds and clusters: observed, resampled alike, and with one left out.

    Each array's first axis is the tables': (tables,), (tables, resamples), then (tables, seeds) and
    (tables, clusters) for those that have more than one member.
    """

    observed: np.ndarray
    resampled: np.ndarray
    left_out: list[np.ndarray]

    @classmethod
    def of(cls, tables: Sequence[np.ndarray], clusters: np.ndarray, resamples: int, seed: int) -> "_Draws":
        shapes = {np.shape(table) for table in tables}
        shape = next(iter(shapes))
        if len(shapes) > 1 or len(shape) != 2 or 0 in shape or np.shape(clusters) != shape[1:]:
            found = " and ".join(str(shape) for shape in sorted(shapes))
            raise ValueError(
                f"correct is {found} and clusters {np.shape(clusters)}; "
                "expected (seeds, n) and (n,), not empty"
            )
        values = np.stack([np.asarray(table, dtype=float) for table in tables])
        if not np.isfinite(values).all():
            raise ValueError("correct holds NaN or infinity; expected one finite value per seed and example")
        if resamples < 1:
            raise ValueError(f"resamples={resamples}: expected 1 or more")
        _, index = np.unique(clusters, return_inverse=True)
        number, seeds = int(index.max()) + 1, shape[0]
        sums = np.stack([[np.bincount(index, row, number) for row in table] for table in values])
        sizes = np.bincount(index, minlength=number)
        rng = np.random.default_rng(seed)
        resampled = np.empty((len(values), resamples))
        at_once = max(1, DRAWN_AT_ONCE // (seeds + number))
        for start in range(0, resamples, at_once):
            part = min(at_once, resamples - start)
            drawn, counts = _drawn(rng, part, seeds), _drawn(rng, part, number)
            totals = np.einsum("tsp,ps->tp", sums @ counts.T, drawn)
            resampled[:, start : start + part] = totals / (seeds * (counts @ sizes))
        left_out = []
        by_seed = sums.sum(-1) / sizes.sum()
        if seeds > 1:
            left_out.append((by_seed.sum(-1, keepdims=True) - by_seed) / (seeds - 1))
        if number > 1:
            by_cluster = sums.mean(1)
            rest = by_cluster.sum(-1, keepdims=True) - by_cluster
            left_out.append(rest / (sizes.sum() - sizes))
        return cls(by_seed.mean(-1), resampled, left_out)

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Limits of a statistic of the tables' means (first axis)."""
        observed, resampled = statistic(self.observed), statistic(self.resampled)
        shares = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        shares = _bca_shares(observed, resampled, [statistic(means) for means in self.left_out], shares)
        low, high = np.quantile(resampled, shares)
        return float(low), float(high)


def _pooled(worlds: Sequence[tuple[Sequence[np.ndarray], np.ndarray]], resamples: int) -> _Draws:
    """Resamples the mean over worlds (tables and clusters of each), each world by itself.

    Leaving out a member of one world leaves the others whole.
    """
    # A seed for each world: its draws must be independent of the others'.
    draws = [_Draws.of(*world, resamples, seed) for seed, world in enumerate(worlds)]
    if len(draws) == 1:
        return draws[0]
    number, total = len(draws), np.sum([world.observed for world in draws], axis=0)
    left_out = [
        ((total - world.observed)[:, None] + means) / number for world in draws for means in world.left_out
    ]
    return _Draws(total / number, np.mean([world.resampled for world in draws], axis=0), left_out)


def _drawn(rng: np.random.Generator, resamples: int, members: int) -> np.ndarray:
    """Counts of each member in each resample, (resamples, members); rows sum to ``members``."""
    drawn = rng.integers(members, size=(resamples, members)) + members * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * members).reshape(resamples, members)


def _bca_shares(
    observed: np.ndarray, resampled: np.ndarray, left_out: Sequence[np.ndarray], shares: Sequence[float]
) -> list[float]:
    """The shares at which BCa reads the resampled values, see ``bootstrap_interval``."""
    same = np.isclose(resampled, observed, rtol=0, atol=1e-12)  # equal but for rounding
    below = np.mean(np.where(same, 0.5, resampled < observed))
    edge = 0.5 / len(resampled)  # keeps the bias finite where all resamples lie on one side
    bias = _NORMAL.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    cubes = squares = 0.0
    for values in left_out:
        number = len(values)
        influence = (number - 1) * (values.mean() - values) / number
        cubes += float((influence**3).sum())
        squares += float((influence**2).sum())
    acceleration = cubes / (6 * squares**1.5) if squares > 1e-24 else 0.0
    adjusted = []
    for share in shares:
        moved = bias + _NORMAL.inv_cdf(share)
        scale = 1 - acceleration * moved
        # Where the formula has its pole the limit is the outermost resample.
        adjusted.append(_NORMAL.cdf(bias + moved / scale) if scale > 0 else float(moved > 0))
    return adjusted


# Tests.


def sign_flip_test(differences: Sequence[float] | np.ndarray) -> float:
    """Computes the two-sided p-value of paired differences: how often random signs give as large a mean.

    Under the hypothesis that arm and baseline are alike, each pair's difference is as likely to have
    the other sign (Fisher 1935; for language processing Dror et al. 2018, The hitchhiker's guide to
    testing statistical significance). ``p = #{s in {-1, 1}^n: |Σ s_i d_i| >= |Σ d_i|} / 2^n``, exact
    up to 14 pairs; beyond, ``FLIPS`` drawn sign patterns and the observed one.

    The smallest value that n pairs can reach is 2 / 2^n (``smallest_p``).

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"differences={differences!r}: expected at least one finite number, one per pair")
    number = len(values)
    # A pattern whose sum is equal but for rounding counts as equal.
    least = abs(values.sum()) - 1e-12 * max(1.0, float(np.abs(values).sum()))
    if number <= EXACT_PAIRS:
        patterns = np.arange(2**number)[:, None] >> np.arange(number) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ values) >= least))
    signs = np.random.default_rng(0).choice([-1, 1], size=(FLIPS, number))
    return float((1 + np.sum(np.abs(signs @ values) >= least)) / (1 + FLIPS))


def smallest_p(pairs: int) -> float:
    """Computes the smallest two-sided p-value of ``sign_flip_test``: 2 / 2^n, all signs alike."""
    return min(1.0, 2.0 ** (1 - pairs))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusts p-values so that alpha bounds the chance of any false rejection among them (Holm 1979).

    In ascending order, ``p~_(i) = max over j <= i of min(1, (m - j + 1) p_(j))``; each may be held
    against alpha by itself.
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, (len(values) - np.arange(len(values))) * values[order])
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


# Gains.


def chance_corrected(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 at chance, 1 when all is right; nan where guessing is right."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else float("nan")


@dataclass(frozen=True)
class PairedDifference:
    """An arm against the baseline with the same seeds, training subsets and examples.

    ``mean`` and ``baseline`` are accuracies over the ``pairs``; ``difference`` is mean - baseline,
    ``relative`` that divided by the baseline (nan where the baseline is 0), each with its interval;
    ``gain_over_chance`` is difference / (1 - chance). ``p_value`` is the sign-flip test's;
    ``p_adjusted`` is Holm's among the ``arms`` that were compared together.
    """

    pairs: int
    mean: float
    baseline: float
    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float
    gain_over_chance: float
    p_value: float
    p_adjusted: float
    arms: int = 1

    def verdict(self, alpha: float = ALPHA) -> str:
        """Returns "better", "worse", "not distinguishable" or "too few pairs".

        Too few: even if all differences had the same sign, the test alone could not reach ``alpha`` among so
        many arms. (Beside arms that pass, Holm asks less of the last: such a difference is found all the
        same.)
        """
        if self.pairs < MINIMUM_PAIRS:
            return "too few pairs"
        if self.p_adjusted <= alpha:
            return "better" if self.difference > 0 else "worse"
        return "too few pairs" if self.pairs < pairs_needed(self.arms, alpha) else "not distinguishable"


def pairs_needed(arms: int, alpha: float = ALPHA) -> int:
    """Counts the pairs that a difference among so many arms needs to reach ``alpha``; at least six."""
    pairs = MINIMUM_PAIRS
    while arms * smallest_p(pairs) > alpha:
        pairs += 1
    return pairs


def pooled_difference(
    worlds: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    chance: float = 0.0,
    resamples: int = 2000,
) -> PairedDifference:
    """Computes the gain of an arm over the baseline in one or several worlds, each counting alike.

    ``worlds`` are of each: the scores of arm and of baseline, both (seeds, examples) with the same rows and
    columns and in [0, 1], and the clusters (examples,) as in ``bootstrap_interval``. Both arms are resampled
    with the same draws, so that what a seed or a picture has in common cancels. Each world's seeds and
    pictures are resampled by themselves, as strata; the worlds themselves are not: a few of them cannot
    say how much a world matters. The sign-flip test takes the pairs of all worlds together, each divided by
    the number of its world's, so that it tests the difference that is reported. It flips seeds and keeps
    the examples: its verdict is of these questions, and the interval, which draws pictures too, can be
    wider. ``chance`` is the accuracy of guessing.

    Raises:
        ValueError: as ``bootstrap_interval``.
    """
    draws = _pooled([([arm, baseline], clusters) for arm, baseline, clusters in worlds], resamples)
    mean, usual = (float(value) for value in draws.observed)
    low, high = draws.interval(lambda means: means[0] - means[1])
    relative = relative_low = relative_high = float("nan")
    if (draws.resampled[1] > 0).all() and all((means[1] > 0).all() for means in draws.left_out):
        relative = mean / usual - 1
        relative_low, relative_high = draws.interval(lambda means: means[0] / means[1] - 1)
    elif usual > 0:  # no interval: the baseline has nothing right in some resamples
        relative = mean / usual - 1
    by_pair = [np.mean(np.asarray(arm, float) - np.asarray(other, float), axis=1) for arm, other, _ in worlds]
    p_value = sign_flip_test(np.concatenate([pairs / len(pairs) for pairs in by_pair]))
    return PairedDifference(
        pairs=sum(map(len, by_pair)), mean=mean, baseline=usual, difference=mean - usual, low=low, high=high,
        relative=relative, relative_low=relative_low, relative_high=relative_high,
        gain_over_chance=chance_corrected(mean, chance) - chance_corrected(usual, chance),
        p_value=p_value, p_adjusted=p_value,
    )  # fmt: skip


def adjusted_together(
    differences: Mapping[_Key, PairedDifference], arms: int = 0
) -> dict[_Key, PairedDifference]:
    """Sets Holm's adjusted p-values of arms that are compared together.

    ``arms`` counts all that are to be compared, if some have no difference yet: they count with p = 1.
    """
    missing = max(0, arms - len(differences))
    p_values = holm([difference.p_value for difference in differences.values()] + [1.0] * missing)
    return {
        name: replace(difference, p_adjusted=float(p_value), arms=len(p_values))
        for (name, difference), p_value in zip(differences.items(), p_values, strict=False)
    }
