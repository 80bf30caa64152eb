"""Measures whether the targeting falls on the tokens that decide, where the data know these.

Each measure stands beside baselines that look at one modality alone. Data that do not say what decides
are measured by ``masking``, in the same tables.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import pandas as pd

from tdlib.analysis.statistics import bootstrap_interval
from tdlib.core.facts import relevant_tokens
from tdlib.core.records import TargetRecord

if TYPE_CHECKING:
    from tdlib.method.priors import Idf


def decisive_tokens(record: TargetRecord) -> np.ndarray:
    """Marks the ``relevant_tokens`` that have a teacher target, and so can be targeted: (tokens,)."""
    return record.distilled & relevant_tokens(record)


def targeting_lift(records: Sequence[TargetRecord]) -> dict[str, float]:
    """Divides the weight on decisive tokens by their share of all distilled tokens; means per modality.

    1 is what equal weights on all tokens reach; 0 means that no decisive token, or none at all, was selected.
    Records without decisive tokens of a modality are left out of it; ``*_n`` counts the others.
    """
    lifts: dict[str, list[float]] = {"text": [], "visual": []}
    for record in records:
        decisive = decisive_tokens(record)
        for name, modality in (("text", record.is_text), ("visual", record.is_visual)):
            present = modality & record.distilled
            weight = record.weight[present].sum()
            if decisive[present].any():
                share = record.weight[present & decisive].sum() / weight if weight > 0 else 0.0
                lifts[name].append(float(share / decisive[present].mean()))
    means = {
        f"{name}_lift": float(np.mean(values)) if values else float("nan") for name, values in lifts.items()
    }
    return means | {f"{name}_n": float(len(values)) for name, values in lifts.items()}


# Ranking and overlap.


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Computes the probability that a decisive token scores above another (Mann and Whitney 1947).

    Ties count half. ``scores`` and boolean ``positive`` are (tokens,). In [0, 1]; nan where one of
    the two kinds is missing.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    m, n = int(positive.sum()), len(positive)
    if m in (0, n):
        return float("nan")
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # mean rank of tied scores, from 1
    return float((ranks[positive].sum() - m * (m + 1) / 2) / (m * (n - m)))


def expected_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Computes average precision ``sum_n (R_n - R_(n-1)) P_n`` as its mean over all orders of tied tokens.

    A score that says nothing so gets what a random order gets, not the share of decisive tokens.
    Arguments as in ``roc_auc``. In [0, 1]; nan without a decisive token.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    if not positive.any():
        return float("nan")
    total, before, hits = 0.0, 0, 0
    for value in np.unique(scores)[::-1]:
        tied = positive[scores == value]
        size, good = len(tied), int(tied.sum())
        k = np.arange(1, size + 1)  # a decisive token at place k has on average so many before it
        earlier = (k - 1) * (good - 1) / max(1, size - 1)
        total += float((good / size * (hits + 1 + earlier) / (before + k)).sum())
        before, hits = before + size, hits + good
    return total / hits


def pointing(scores: np.ndarray, positive: np.ndarray) -> float:
    """1 if the highest token is decisive, else 0 (the pointing game, Zhang et al. 2018).

    Where several tie, the share of them that are: what drawing one gives on average. nan without tokens.
    """
    highest = np.asarray(positive, dtype=bool)[scores == np.max(scores, initial=-np.inf)]
    return float(highest.mean()) if len(highest) else float("nan")


def area_iou(boxes: np.ndarray, others: np.ndarray) -> float:
    """Computes intersection over union of the areas that two sets of boxes cover, each set's overlaps once.

    Both (boxes, 4) xyxy in one unit. In [0, 1]; nan where neither covers anything.
    """
    both = [np.asarray(part, dtype=float).reshape(-1, 4) for part in (boxes, others)]
    edges = [np.unique(np.concatenate([part[:, axis::2].ravel() for part in both])) for axis in (0, 1)]
    widths, heights = (np.diff(edge) for edge in edges)
    if not len(widths) or not len(heights):
        return float("nan")
    x, y = (edge[:-1] for edge in edges)  # cells between neighbouring edges are inside or outside as a whole
    covered = []
    for part in both:
        across = (part[:, None, 0] <= x) & (x < part[:, None, 2])
        down = (part[:, None, 1] <= y) & (y < part[:, None, 3])
        covered.append((down[:, :, None] & across[:, None, :]).any(0))
    area = heights[:, None] * widths
    union = area[covered[0] | covered[1]].sum()
    return float(area[covered[0] & covered[1]].sum() / union) if union > 0 else float("nan")


def precision_recall(scores: np.ndarray, positive: np.ndarray, size: int) -> tuple[float, float]:
    """Computes precision and recall of the ``size`` highest tokens, on average over the order of ties.

    A set without tokens has precision 0; recall is nan without a decisive token.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    if not size:
        return 0.0, 0.0 if positive.any() else float("nan")
    limit = np.sort(scores)[::-1][size - 1]
    above, tied = scores > limit, scores == limit
    hits = positive[above].sum() + (size - above.sum()) * positive[tied].mean()
    return float(hits / size), float(hits / positive.sum()) if positive.any() else float("nan")


# Baselines: scores of tokens that look at one modality alone.


PLACES = 5  # decimals: boxes that differ by rounding alone are ties


def _nothing(record: TargetRecord, idf: "Idf | None") -> np.ndarray:
    """Scores all tokens alike, which makes the order random."""
    return np.zeros(len(record.tokens))


def _size(record: TargetRecord, idf: "Idf | None") -> np.ndarray:
    """Scores text tokens by the letters of their word, visual tokens by their area."""
    from tdlib.method.priors import WORD  # the method's modules load torch

    words = [match.span() for match in WORD.finditer(record.text)]
    letters = np.zeros(len(record.tokens))
    for i in np.flatnonzero(record.is_text):
        start, end = record.spans[i]
        letters[i] = max((b - a for a, b in words if a < end and b > start), default=0)
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    return np.where(record.is_text, letters, sides.prod(1).round(PLACES))


def _frequency(record: TargetRecord, idf: "Idf | None") -> np.ndarray:
    """Scores text tokens by the rareness of their word (``idf``; else the record's prior); others 0."""
    if idf is None:
        return np.where(record.is_text, record.prior, 0)
    import torch  # here, because tables of results must not load it

    from tdlib.method.priors import idf_prior

    return np.where(record.is_text, idf_prior(record.text, torch.as_tensor(record.spans), idf).numpy(), 0)


def _centre(record: TargetRecord, idf: "Idf | None") -> np.ndarray:
    """Scores visual tokens by their nearness to the picture's centre; others 0."""
    middle = (record.boxes[:, :2] + record.boxes[:, 2:]) / 2
    return np.where(record.is_text, 0, -np.linalg.norm(middle - 0.5, axis=1).round(PLACES))


Baseline = Callable[[TargetRecord, Optional["Idf"]], np.ndarray]
BASELINES: dict[str, dict[str, Baseline]] = {
    "text": {"random": _nothing, "longest words": _size, "frequency": _frequency},
    "visual": {"random": _nothing, "largest": _size, "centre": _centre},
}


# Against the ground truth.

DRAWS = 32  # orders of a baseline's tied tokens, for the overlap of areas


def targeting_scores(
    records: Sequence[TargetRecord], idf: "Idf | None" = None, draws: int = DRAWS
) -> pd.DataFrame:
    """Measures how well each record's targeting finds the decisive tokens, beside baselines.

    One row per record, modality, ``metric`` and ``source`` ("targeting", or a baseline), with its
    ``value``; ``example_id``, ``choice`` and ``image`` name the record, ``truth`` what its decisive
    tokens come from. Tokens are those with a teacher target; decisive ones as in ``decisive_tokens``.
    Metrics: "auc", "ap" and "pointing" rank tokens by weight (0 where not selected) and, as source "score",
    by what the selector saw; "precision" and "recall" are of the selected set; "iou" is that of the areas of
    the selected visual tokens and of the relevant boxes. Baselines choose as many tokens as the record does.
    Tied tokens count as in a random order, on average ("random" is nothing but ties): exactly, but for the
    baselines' "iou", a mean over ``draws`` orders. A modality without a decisive token, or with no other,
    is left out.
    """
    rng = np.random.default_rng(0)
    rows = []
    for record in records:
        decisive = decisive_tokens(record)
        for modality, tokens in modality_tokens(record).items():
            truth = decisive[tokens]
            if truth.all() or not truth.any():  # also without any token
                continue
            selected = record.selected[tokens]
            size, boxes, relevant = int(selected.sum()), record.boxes[tokens], np.array(record.relevant_boxes)
            targeted = _ranking(record.weight[tokens], truth) | _chosen(selected, truth, size)
            by_source = {"targeting": targeted, "score": _ranking(record.score[tokens], truth)}
            if modality == "visual":
                targeted["iou"] = area_iou(boxes[selected], relevant)
            for name, baseline in BASELINES[modality].items():
                scores = baseline(record, idf)[tokens]
                by_source[name] = _ranking(scores, truth) | _chosen(scores, truth, size)
                if modality == "visual":
                    orders = [np.lexsort((rng.random(len(tokens)), -scores)) for _ in range(draws)]
                    areas = [area_iou(boxes[order[:size]], relevant) for order in orders]
                    by_source[name]["iou"] = float(np.mean(areas))
            rows += score_rows(record, modality, by_source, record.truth)
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def modality_tokens(record: TargetRecord) -> dict[str, np.ndarray]:
    """Lists the positions of the tokens that can be targeted, by modality."""
    return {
        "text": np.flatnonzero(record.is_text & record.distilled),
        "visual": np.flatnonzero(record.is_region & record.distilled),
    }


def _ranking(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "auc": roc_auc(scores, truth),
        "ap": expected_average_precision(scores, truth),
        "pointing": pointing(scores, truth),
    }


def _chosen(scores: np.ndarray, truth: np.ndarray, size: int) -> dict[str, float]:
    precision, recall = precision_recall(scores, truth, size)
    return {"precision": precision, "recall": recall}


SCORE_COLUMNS = ["example_id", "choice", "image", "truth", "modality", "metric", "source", "value"]


def score_rows(
    record: TargetRecord, modality: str, found: dict[str, dict[str, float]], truth: str = ""
) -> list[tuple]:
    """Makes rows with ``SCORE_COLUMNS`` of one record and modality, from values by source and metric."""
    name = record.example_id, record.choice, str(record.image), truth, modality
    return [(*name, metric, source, v) for source, own in found.items() for metric, v in own.items()]


def targeting_quality(scores: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Computes means over records with 95 % bootstrap intervals over pictures, and the gain over baselines.

    ``scores`` are of ``targeting_scores`` or ``faithfulness_scores``. A row per modality, metric and source:
    ``truth`` (what decisive tokens come from; "" where the measure needs none), ``value``, ``low``,
    ``high``, ``n`` (records) and ``pictures``; beside a baseline also ``gain`` (targeting minus baseline,
    paired by record) with ``gain_low`` and ``gain_high``. For "sufficiency" and "deletion" less is better, so
    that a gain below 0 speaks for the targeting.

    Raises:
        ValueError: there are no rows, as no record knows its decisive tokens; or they are measured
            against several kinds of truth, or hold a statement twice (records of several steps or splits).
    """
    if scores.empty:
        raise ValueError("no scores: none of the records knows its decisive tokens (ground truth)")
    truths = scores["truth"].unique()
    if len(truths) > 1:
        raise ValueError(
            f"scores against {' and '.join(truths)}: expected one kind of truth, as their mean says nothing; "
            "measure the records of each by themselves"
        )
    rows = []
    for (modality, metric), part in scores.groupby(["modality", "metric"], sort=False):
        one = ["image", "example_id", "choice"]
        if part.duplicated([*one, "source"]).any():
            raise ValueError("scores hold a statement twice: measure records of one step and split at a time")
        wide = part.pivot(index=one, columns="source", values="value")
        pictures = wide.index.get_level_values("image").to_numpy()
        targeting = wide["targeting"]
        for source in part["source"].unique():
            row = {"truth": truths[0], "modality": modality, "metric": metric, "source": source}
            row |= _interval(("value", "low", "high"), wide[source], pictures, resamples)
            row |= {"n": len(wide), "pictures": len(np.unique(pictures))}
            if source != "targeting":
                gain = targeting - wide[source]
                row |= _interval(("gain", "gain_low", "gain_high"), gain, pictures, resamples)
            rows.append(row)
    return pd.DataFrame(rows)


LESS_IS_BETTER = ("sufficiency", "deletion")
FEWEST = 6  # pictures; with fewer, no interval is taken as evidence
# Measures whose chance is near 0: a few pictures without a hit all look alike, and their bootstrap, which has
# no spread, calls even a random order worse than chance. Below ``MANY`` pictures nothing is "worse" by them.
SKEWED, MANY = ("ap", "pointing", "precision", "recall", "iou"), 100


def _advantage(row: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the interval of a gain, negated where less is better."""
    low, high = row["gain_low"], row["gain_high"]
    return (-high, -low) if row["metric"] in LESS_IS_BETTER else (low, high)


def quality_table(quality: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Writes values with intervals as text for a table: a row per ``by``, a column per metric.

    "0.62 [0.55, 0.70] *": the star says that the targeting is better than a random choice of as many
    tokens, by the interval of their paired difference over at least ``FEWEST`` pictures; each star stands by
    itself, so that of many some come by chance. Baselines have rows if ``by`` names "source";
    ``quality`` may be of several settings if columns of ``by`` tell them apart.
    """
    keys = [*(name for name in by if name != "source"), "metric"]
    chance = {
        tuple(row[name] for name in keys): row
        for row in quality[quality["source"] == "random"].to_dict("records")
    }
    rows = quality if "source" in by else quality[quality["source"] == "targeting"]
    texts = []
    for row in rows.to_dict("records"):
        random = chance.get(tuple(row[name] for name in keys))
        enough = row["source"] == "targeting" and row["pictures"] >= FEWEST
        star = enough and random and _advantage(random)[0] > 0
        texts.append(f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" + (" *" if star else ""))
    table = rows.assign(figure=texts).set_index([*by, "metric"])["figure"].unstack("metric", sort=False)
    return table[list(rows["metric"].unique())].fillna("")


def verdicts(quality: pd.DataFrame, by: Sequence[str] = ("truth", "modality")) -> pd.DataFrame:
    """Compares the targeting with the strongest of its baselines: a row per ``by`` and metric.

    ``verdict`` is "better" or "worse" where the interval of the paired gain lies on one side of 0 ("worse" by
    ``SKEWED`` measures only from ``MANY`` pictures on), "undecided" where it does not, and "too few pictures"
    below ``FEWEST`` of them. The strongest baseline is chosen by the same figures, which favours it: a
    "better" is earned, a "worse" is not. The method's own score,
    which ranks tokens before selection, is no baseline.
    """
    rows = []
    for key, part in quality.groupby([*by, "metric"], sort=False):
        targeting = part[part["source"] == "targeting"].iloc[0]
        less = targeting["metric"] in LESS_IS_BETTER
        others = part[~part["source"].isin(["targeting", "score"])]
        best = others.sort_values("value", ascending=less, kind="stable").iloc[0]
        low, high = _advantage(best)
        surely = targeting["metric"] not in SKEWED or targeting["pictures"] >= MANY
        verdict = "better" if low > 0 else "worse" if high < 0 and surely else "undecided"
        rows.append(
            dict(zip([*by, "metric"], key, strict=True))
            | {
                "targeting": f"{targeting['value']:.3f} [{targeting['low']:.3f}, {targeting['high']:.3f}]",
                "strongest baseline": f"{best['source']} {best['value']:.3f}",
                "gain": f"{best['gain']:+.3f} [{best['gain_low']:+.3f}, {best['gain_high']:+.3f}]",
                "pictures": int(targeting["pictures"]),
                "verdict": verdict if targeting["pictures"] >= FEWEST else "too few pictures",
            }
        )
    return pd.DataFrame(rows)


def _interval(
    names: Sequence[str], values: pd.Series, pictures: np.ndarray, resamples: int
) -> dict[str, float]:
    numbers = values.to_numpy(dtype=float)
    limits = bootstrap_interval(numbers[None], pictures, resamples=resamples)
    return dict(zip(names, (float(numbers.mean()), *limits), strict=True))
