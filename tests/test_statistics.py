"""Intervals over seeds and clusters of examples, tests over paired seeds, and what may be said of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.analysis import statistics
from tdlib.analysis.statistics import (
    PairedDifference,
    _Draws,
    _pooled,
    adjusted_together,
    bootstrap_interval,
    chance_corrected,
    holm,
    pairs_needed,
    pooled_difference,
    pooled_mean,
    sign_flip_test,
    smallest_p,
)


def hits(seeds: int, examples: int, share: float = 0.6, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, examples)) < share).astype(float)


@contextmanager
def intervals_of(level: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LEVEL", level)
        yield


def width(correct: np.ndarray, clusters: np.ndarray, **options) -> float:
    low, high = bootstrap_interval(correct, clusters, resamples=500, **options)
    return high - low


def test_the_interval_holds_the_mean_and_stays_within_the_values():
    for seed in range(5):
        correct = hits(4, 60, seed=seed)
        low, high = bootstrap_interval(correct, np.arange(60), resamples=500)
        assert 0 <= low < correct.mean() < high <= 1


@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
def test_constants_have_an_interval_of_width_zero(value):
    low, high = bootstrap_interval(np.full((3, 10), value), np.arange(10) // 2, resamples=50)
    assert low == pytest.approx(value) and high == pytest.approx(value)


def test_a_shift_shifts_the_interval():
    correct = hits(3, 40)
    low, high = bootstrap_interval(correct, np.arange(40), resamples=200)
    shifted = bootstrap_interval(correct + 2, np.arange(40), resamples=200)
    assert shifted == pytest.approx((low + 2, high + 2))


def test_fewer_seeds_give_a_wider_interval():
    correct = np.tile([[1.0], [-1.0]], (6, 50)) + 0.1 * hits(12, 50)  # seeds differ more than examples do
    widths = [width(correct[:seeds], np.arange(50)) for seeds in (12, 6, 2)]
    assert widths == sorted(widths) and 1.5 * widths[0] < widths[2]
    assert widths[2] > 1.9  # both draws may be of one seed


def test_more_of_the_level_is_wider():
    correct = hits(4, 60)
    widths = []
    for level in (0.5, 0.99):
        with intervals_of(level):
            widths.append(width(correct, np.arange(60)))
    assert widths[0] < widths[1]


def test_questions_that_share_a_picture_count_once():
    """Five identical answers per picture: as wide as with one, wider than if independent."""
    once = hits(1, 30)
    five = np.repeat(once, 5, axis=1)
    pictures = np.repeat(np.arange(30), 5)
    clustered = bootstrap_interval(five, pictures, resamples=500)
    assert clustered == pytest.approx(bootstrap_interval(once, np.arange(30), resamples=500))
    assert clustered[1] - clustered[0] > 1.5 * width(five, np.arange(150))


def test_a_large_cluster_counts_by_its_size():
    correct = np.array([[1.0] * 98 + [0.0, 0.0]])
    clusters = np.array([0] * 98 + [1, 2])
    with intervals_of(0.2):
        low, high = bootstrap_interval(correct, clusters, resamples=500)
    assert 0.95 < low <= high  # a mean of the clusters' means would lie about 1/3
    low, high = bootstrap_interval(correct, clusters, resamples=500)
    assert low == 0 and 0.98 < high <= 1  # drawn never, or several times


def test_clusters_are_any_labels_in_any_order():
    correct, pictures = hits(3, 20), np.arange(20) // 2
    order = np.random.default_rng(0).permutation(20)
    named = np.array([f"picture-{number:02d}" for number in pictures])
    expected = bootstrap_interval(correct, pictures, resamples=100)
    assert bootstrap_interval(correct[:, order], named[order], resamples=100) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval():
    correct = hits(3, 20)
    first, again, other = (
        bootstrap_interval(correct, np.arange(20), seed=s, resamples=100) for s in (1, 1, 2)
    )
    assert first == again != other


def test_about_nineteen_of_twenty_intervals_hold_the_truth():
    """100 simulated studies: 8 seeds, 30 pictures of 3 questions, all three sources of noise."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.arange(30), 3)
    covered = []
    for _ in range(100):
        seeds = 0.05 * rng.normal(size=(8, 1))
        values = seeds + 0.2 * rng.normal(size=30)[pictures] + 0.3 * rng.normal(size=(8, 90))
        low, high = bootstrap_interval(values, pictures, resamples=200)
        covered.append(low <= 0 <= high)
    assert 0.88 <= np.mean(covered) <= 0.995


@pytest.mark.parametrize(
    ("correct", "clusters"),
    [
        (np.ones(4), np.arange(4)),
        (np.ones((2, 4)), np.arange(3)),
        (np.ones((4, 2)), np.arange(4)),
        (np.ones((0, 4)), np.arange(4)),
        (np.ones((2, 0)), np.arange(0)),
        (np.ones((2, 4)), np.zeros((4, 1))),
        (np.ones((2, 4)), 4),
        (np.array([[1.0, np.nan]]), np.arange(2)),
        (np.array([[1.0, np.inf]]), np.arange(2)),
    ],
)
def test_bad_shapes_and_values_fail(correct, clusters):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(correct, clusters, resamples=10)


@pytest.mark.parametrize(
    ("accuracy", "chance", "expected"), [(0.25, 0.25, 0), (1, 0.25, 1), (0.625, 0.25, 0.5), (0, 0.5, -1)]
)
def test_chance_corrected(accuracy, chance, expected):
    assert chance_corrected(accuracy, chance) == pytest.approx(expected)


# BCa.


def textbook_bca(values: np.ndarray, resamples: int, level: float) -> tuple[float, float]:
    """Efron 1987 for the mean of one sample, step by step, on the draws of seed 0."""
    rng, normal, number = np.random.default_rng(0), NormalDist(), len(values)
    rng.integers(1, size=(resamples, 1))  # the only seed
    means = [values[drawn].mean() for drawn in rng.integers(number, size=(resamples, number))]
    below = np.mean(
        [(mean < values.mean() - 1e-12) + 0.5 * (abs(mean - values.mean()) <= 1e-12) for mean in means]
    )
    bias = normal.inv_cdf(below)
    left_out = np.array([np.delete(values, i).mean() for i in range(number)])
    gaps = left_out.mean() - left_out
    acceleration = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    limits = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = normal.inv_cdf(share)
        limits.append(normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return tuple(np.quantile(means, limits))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_bca_of_one_sample_is_the_textbooks(level):
    values = np.random.default_rng(1).exponential(size=12)
    with intervals_of(level):
        found = bootstrap_interval(values[None], np.arange(12), resamples=400)
    assert found == pytest.approx(textbook_bca(values, 400, level))


def percentile_interval(values, clusters, resamples=2000):
    """The plain quantiles of the resampled means."""
    level = statistics.LEVEL
    means = _Draws.of([values], clusters, resamples, 0).resampled[0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def test_without_skew_or_bias_bca_is_the_percentile_interval():
    """Mirrored values: no acceleration, and as many resamples above as below but for chance."""
    half = hits(4, 30) - 0.5
    mirrored = np.concatenate([half, -half])
    plain = percentile_interval(mirrored, np.arange(30))
    assert bootstrap_interval(mirrored, np.arange(30)) == pytest.approx(plain, abs=0.01)


def test_bca_reaches_further_where_the_values_do():
    values = np.random.default_rng(3).exponential(size=(1, 25)) ** 2
    low, high = bootstrap_interval(values, np.arange(25))
    plain_low, plain_high = percentile_interval(values, np.arange(25))
    assert plain_low < low and plain_high < high


def test_mirrored_values_have_a_mirrored_interval():
    values = np.random.default_rng(5).exponential(size=(5, 20))
    low, high = bootstrap_interval(values, np.arange(20))
    assert bootstrap_interval(-values, np.arange(20)) == pytest.approx((-high, -low), abs=1e-9)


def test_both_limits_of_a_skewed_mean_miss_more_alike():
    """200 samples of 30: the percentile interval lies below a skewed truth far more often than above."""
    rng, sides = np.random.default_rng(0), {"bca": [], "percentile": []}
    for _ in range(200):
        values = rng.exponential(size=(1, 30)) ** 1.5
        for interval, missed in zip((bootstrap_interval, percentile_interval), sides.values(), strict=True):
            with intervals_of(0.9):
                low, high = interval(values, np.arange(30), resamples=300)
            missed.append((high < 1.32934) - (low > 1.32934))  # the gamma function at 2.5
    assert 0 < np.sum(sides["bca"]) < np.sum(sides["percentile"])
    assert np.mean(np.abs(sides["bca"])) < 0.2


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    """Large splits are resampled in parts: about the same interval, and no more memory."""
    correct = hits(3, 50)
    whole = bootstrap_interval(correct, np.arange(50))
    monkeypatch.setattr("tdlib.analysis.statistics.DRAWN_AT_ONCE", 60)
    assert bootstrap_interval(correct, np.arange(50)) == pytest.approx(whole, abs=0.02)


def test_no_resamples_fail():
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_interval(np.eye(3), np.arange(3), resamples=0)


# Sign flips.

numbers = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0], 1.0),
        ([1, 2, 3], 2 / 8),
        ([3, -1], 1.0),
        ([4, 3, -1], 4 / 8),  # |sum| 6; 8, 6 and their mirrors
        ([0, 0, 0], 1.0),
        ([0.1] * 5, 2 / 32),
        ([0.1] * 6, 2 / 64),
        ([-0.1] * 14, 2 / 2**14),
    ],
)
def test_exact_p_values(differences, expected):
    assert sign_flip_test(differences) == pytest.approx(expected)


@settings(max_examples=80, deadline=None)
@given(numbers, st.randoms(use_true_random=False), st.sampled_from([-3.0, -1.0, 0.01, 7.0]))
def test_order_scale_and_direction_do_not_matter_to_a_p_value(differences, random, scale):
    p_value = sign_flip_test(differences)
    shuffled = random.sample(differences, len(differences))
    assert sign_flip_test([scale * value for value in shuffled]) == pytest.approx(p_value)
    assert smallest_p(len(differences)) <= p_value <= 1
    by_hand = [
        abs(sum(d if number >> i & 1 else -d for i, d in enumerate(differences))) >= abs(sum(differences))
        for number in range(2 ** len(differences))
    ]
    assert p_value == pytest.approx(np.mean(by_hand))


def test_drawn_patterns_come_close_to_all_of_them(monkeypatch):
    differences = np.random.default_rng(2).normal(0.4, 1, size=15)
    patterns = 2 * (np.arange(2**15)[:, None] >> np.arange(15) & 1) - 1
    exact = np.mean(np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-9)
    assert 0.02 < exact < 0.5
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(differences) == sign_flip_test(differences)
    monkeypatch.setattr(statistics, "FLIPS", 99)
    assert sign_flip_test([1.0] * 40) == pytest.approx(1 / 100), "never 0"


def test_luck_is_called_a_difference_as_often_as_alpha_says():
    rng = np.random.default_rng(0)
    p_values = np.array([sign_flip_test(rng.normal(size=8)) for _ in range(600)])
    for alpha in (0.05, 0.1, 0.3):
        assert np.mean(p_values <= alpha) < alpha + 0.03
    assert np.mean(p_values <= 0.3) > 0.2


@pytest.mark.parametrize("differences", [[], [[1.0]], [np.nan], [np.inf, 1.0]])
def test_what_is_no_list_of_differences_fails(differences):
    with pytest.raises(ValueError, match="expected"):
        sign_flip_test(differences)


# Holm.


def test_holms_own_steps():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02]) and not len(holm([]))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_holm_is_between_no_correction_and_bonferronis(p_values, random):
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all()
    assert (adjusted <= np.minimum(1, len(p_values) * np.array(p_values)) + 1e-12).all()
    order = random.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[i] for i in order]) == pytest.approx(adjusted[order])
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()


# Pairs.


def paired_difference(arm, baseline, clusters, chance: float = 0.0, **options: Any) -> PairedDifference:
    """In a single world."""
    return pooled_difference([(arm, baseline, clusters)], chance, **options)


def compared(pairs: int, gain: float = 0.2) -> PairedDifference:
    baseline = hits(pairs, 40, 0.4, seed=1)
    more, fewer = np.maximum(baseline, hits(pairs, 40, gain, seed=2)), baseline * hits(pairs, 40, 0.5, 3)
    return paired_difference(more if gain > 0 else fewer, baseline, np.arange(40) // 2, resamples=200)


def test_gains_absolute_relative_and_over_chance():
    arm, baseline = np.array([[1, 1, 1, 0]] * 2), np.array([[1, 1, 0, 0]] * 2)
    found = paired_difference(arm, baseline, np.arange(4), chance=0.25, resamples=100)
    assert (found.mean, found.baseline, found.difference) == (0.75, 0.5, 0.25)
    assert found.relative == pytest.approx(0.5) and found.gain_over_chance == pytest.approx(0.25 / 0.75)
    assert found.pairs == 2 and found.p_value == pytest.approx(0.5)


def test_what_arm_and_baseline_share_cancels():
    """Pictures and seeds of very different difficulty, a constant gain: no uncertainty is left."""
    baseline = np.outer([0.2, 0.5, 0.8], [0.1, 0.5, 0.9, 0.3])
    found = paired_difference(baseline + 0.1, baseline, np.arange(4), resamples=200)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    low, high = bootstrap_interval(baseline, np.arange(4), resamples=200)
    assert high - low > 0.2
    tripled = paired_difference(3 * baseline, baseline, np.arange(4), resamples=200)
    assert (tripled.relative, tripled.relative_low, tripled.relative_high) == pytest.approx((2, 2, 2))


def test_a_baseline_that_has_nothing_right_has_no_relative_gain():
    nothing = paired_difference(np.ones((2, 3)), np.zeros((2, 3)), np.arange(3), resamples=50)
    assert np.isnan([nothing.relative, nothing.relative_low, nothing.relative_high]).all()
    assert nothing.difference == 1
    little = paired_difference(np.ones((2, 3)), np.eye(3)[:2], np.arange(3), resamples=50)
    assert little.relative == pytest.approx(2) and np.isnan(little.relative_low)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_fewer_than_six_pairs_are_never_called_significant(pairs):
    found = replace(compared(pairs), p_value=0.001, p_adjusted=0.001)  # whatever a test says
    assert found.verdict() == "too few pairs" == found.verdict(alpha=0.5)


def test_six_pairs_can_tell_one_arm_but_not_two():
    alone = compared(6)
    assert alone.p_value == pytest.approx(2 / 64) and alone.verdict() == "better"
    assert compared(6, gain=-1).verdict() == "worse"
    two = adjusted_together({"a": alone, "b": compared(6, gain=0.3)})
    assert two["a"].p_adjusted == pytest.approx(4 / 64) and two["a"].arms == 2
    assert two["a"].verdict() == "too few pairs"
    seven = adjusted_together({"a": compared(7), "b": compared(7, gain=0.3)})
    assert {found.verdict() for found in seven.values()} == {"better"}


def test_fewer_pairs_beside_arms_that_pass_are_found_where_holm_finds_them():
    three = {"a": compared(14), "b": compared(14), "c": compared(6)}
    few = adjusted_together(three)["c"]
    assert few.p_adjusted == pytest.approx(2 / 64) and few.verdict() == "better"


def test_pairs_needed():
    assert [pairs_needed(arms) for arms in (1, 2, 3, 4, 12)] == [6, 7, 7, 8, 9]
    assert pairs_needed(1, alpha=0.5) == 6 and pairs_needed(1, alpha=0.001) == 11
    for arms in range(1, 20):
        assert arms * smallest_p(pairs_needed(arms)) <= 0.05


def test_no_gain_is_not_distinguishable():
    rng = np.random.default_rng(4)
    arm, baseline = (rng.random((2, 8, 30)) < 0.5).astype(float)
    found = paired_difference(arm, baseline, np.arange(30), resamples=200)
    assert found.verdict() == "not distinguishable" and found.low < 0 < found.high


@pytest.mark.parametrize("shape", [(2, 4), (3, 5)])
def test_pairs_of_other_shapes_fail(shape):
    with pytest.raises(ValueError, match="expected"):
        paired_difference(np.ones((3, 4)), np.ones(shape), np.arange(4))


# Several worlds.


def worlds(gain: float, number: int = 2, seeds: int = 7) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Arm, baseline and clusters of worlds with other examples; the arm turns some wrong answers right."""
    found = []
    for world in range(number):
        baseline = hits(seeds, 40 + 20 * world, 0.4, seed=world)
        more = np.random.default_rng(100 + world).random(baseline.shape) < gain
        found.append((np.maximum(baseline, more), baseline, np.arange(baseline.shape[1]) // 2))
    return found


def test_one_world_pooled_is_the_world():
    ((arm, _, clusters),) = worlds(0.2, number=1)
    mean, *limits = pooled_mean([(arm, clusters)], resamples=300)
    assert mean == pytest.approx(arm.mean())
    assert tuple(limits) == bootstrap_interval(arm, clusters, resamples=300)


def test_worlds_count_alike_and_their_pairs_together():
    both = worlds(0.2)
    found = pooled_difference(both, 0.25, resamples=500)
    apart = [paired_difference(*world, 0.25, resamples=500) for world in both]
    assert found.difference == pytest.approx(np.mean([one.difference for one in apart]))
    assert found.mean == pytest.approx(np.mean([one.mean for one in apart]))
    assert found.relative == pytest.approx(found.mean / found.baseline - 1)
    assert found.pairs == 14 and found.p_value == 2 / 2**14, "all 14 differences have one sign"
    assert found.low < found.difference < found.high
    assert found.high - found.low < min(one.high - one.low for one in apart)
    assert pooled_mean([(arm, clusters) for arm, _, clusters in both], resamples=100)[0] == pytest.approx(
        found.mean
    )


def test_a_verdict_has_the_sign_of_the_difference_that_was_tested():
    """A world with one pair counts as much as one with eight, in the difference and in its test."""
    clusters, many, one = np.arange(50), np.full((8, 50), 0.5), np.full((1, 50), 0.5)
    found = pooled_difference([(many + 0.02, many, clusters), (one - 0.021, one, clusters)], resamples=50)
    assert found.difference == pytest.approx(-0.0005)
    assert found.p_value > 0.5 and found.verdict() == "not distinguishable"


def test_what_is_left_out_of_one_world_leaves_the_other_whole():
    both = worlds(0.2, seeds=3)
    draws = _pooled([([arm, baseline], clusters) for arm, baseline, clusters in both], 50)
    seeds_of_first, clusters_of_first, seeds_of_second, _ = draws.left_out
    (first, _, of_first), (second, *_) = both
    assert seeds_of_first[0] == pytest.approx(
        [(np.delete(first, seed, 0).mean() + second.mean()) / 2 for seed in range(3)]
    )
    assert seeds_of_second[0] == pytest.approx(
        [(first.mean() + np.delete(second, seed, 0).mean()) / 2 for seed in range(3)]
    )
    assert clusters_of_first[0][5] == pytest.approx((first[:, of_first != 5].mean() + second.mean()) / 2)


def test_pooled_intervals_hold_the_truth_as_often_as_they_say():
    """90 % intervals of a gain that each example has or has not, in two worlds, hold it in 80 to 97 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(150):
        drawn = []
        for share in (0.3, 0.6):
            hard = rng.random(60) >= share  # the same examples for every seed, and most of what varies
            baseline = (rng.random((8, 60)) < 0.02) | ~hard
            arm = baseline | (hard & (rng.random(60) < 0.5))
            drawn.append((arm.astype(float), baseline.astype(float), np.arange(60)))
        with intervals_of(0.9):
            found = pooled_difference(drawn, resamples=200)
        held += found.low <= 0.5 * 0.98 * (0.7 + 0.4) / 2 <= found.high
    assert 0.80 < held / 150 < 0.97
