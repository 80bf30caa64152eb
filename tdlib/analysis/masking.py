"""Measures targeting without ground truth: what masking the targeted tokens does to a student's answer.

Perturbation curves (Petsiuk et al. 2018) and faithfulness (DeYoung et al. 2020) of any scorer of masks,
and the scorer that a trained student is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tdlib.analysis.targeting import BASELINES, SCORE_COLUMNS, modality_tokens, score_rows
from tdlib.core.records import TargetRecord
from tdlib.method.priors import Idf

Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Curves:
    """Scores while tokens are removed (``deletion``) and while they are added (``insertion``), highest first.

    All (points,): ``fraction`` of the tokens that are removed, or added, from 0 to 1. The curves share their
    ends: ``deletion[0] = insertion[-1]`` is the score of all tokens.
    """

    fraction: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def deletion_area(self) -> float:
        """Mean height of the curve; low where the first tokens matter."""
        return float(np.trapezoid(self.deletion, self.fraction))

    @property
    def insertion_area(self) -> float:
        """Mean height of the curve; high where the first tokens suffice."""
        return float(np.trapezoid(self.insertion, self.fraction))


def perturbation_curves(
    scorer: Scorer, order: Sequence[int] | np.ndarray, tokens: int, points: int = 11
) -> Curves:
    """Deletion and insertion (Petsiuk et al. 2018) of tokens in an order.

    ``scorer`` gives the scores (variants,) of masks (variants, tokens) that are True on tokens that are kept.
    ``order`` has the positions of the tokens in the order of removal or addition; all others are always kept.
    The curves have ``points`` points, both ends included; fewer where there are fewer tokens.
    """
    order = np.asarray(order, dtype=int)
    counts = np.unique(np.linspace(0, len(order), points).round().astype(int))
    # Both curves in one call, so that the student's passes are full batches.
    keep = np.ones((2, len(counts), tokens), dtype=bool)
    for row, count in enumerate(counts):
        keep[0, row, order[:count]] = False
        keep[1, row, order[count:]] = False
    scores = np.asarray(scorer(keep.reshape(-1, tokens)), dtype=float).reshape(2, -1)
    return Curves(counts / max(1, len(order)), *scores)


def faithfulness(scorer: Scorer, chosen: np.ndarray, candidates: np.ndarray) -> tuple[float, float]:
    """Comprehensiveness and sufficiency of chosen tokens (DeYoung et al. 2020, ERASER, section 4.2).

    ``p(all) - p(all but chosen)``, high where they are needed, and ``p(all) - p(chosen alone)``, low
    where they are enough. ``chosen`` and ``candidates`` (tokens that may be masked at all) are (tokens,)
    boolean; ``scorer`` as in ``perturbation_curves``.
    """
    whole = np.ones_like(chosen, dtype=bool)
    everything, without, alone = scorer(
        np.stack([whole, ~(chosen & candidates), ~candidates | (chosen & candidates)])
    )
    return float(everything - without), float(everything - alone)


def faithfulness_scores(
    records: Sequence[TargetRecord],
    scorer_of: Callable[[TargetRecord], Scorer],
    points: int = 11,
    idf: Idf | None = None,
    draws: int = 4,
) -> pd.DataFrame:
    """Measures what masking the targeted tokens does to a student's answer, beside baselines.

    Rows as ``targeting_scores`` gives them, for ``targeting_quality``. Metrics, all in units of
    the scorer: "comprehensiveness" and "sufficiency" of the selected tokens (see ``faithfulness``),
    "deletion" and "insertion", the mean heights of the curves (see ``perturbation_curves``) in the
    order of the targeting: selected tokens by weight, then the others by score.
    A modality at a time is masked, of the tokens with a teacher target. Baselines mask as many tokens;
    ties are broken at random, and values averaged over ``draws`` orders, the same ones in every call. Records
    without a selected token of a modality are left out of it. ``idf`` are word statistics of the training
    split; without them the record's prior counts.
    """
    rng = np.random.default_rng(0)
    rows = []
    for record in records:
        scorer, parts = scorer_of(record), modality_tokens(record)
        for modality in ("text", "visual"):
            size = int(record.selected[parts[modality]].sum())
            if not size:
                continue
            values = {}
            for name, orders in _orders(record, modality, idf, draws, rng).items():
                measured = [_masked(scorer, len(record.tokens), order, size, points) for order in orders]
                values[name] = pd.DataFrame(measured).mean().to_dict()
            rows += score_rows(record, modality, values)
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def _orders(
    record: TargetRecord, modality: str, idf: Idf | None, draws: int, rng: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """Orders a modality's tokens by when they are masked; ``draws`` orders of each baseline."""
    tokens = modality_tokens(record)[modality]
    keys = (record.score, record.weight, record.selected.astype(float))  # the last one counts first
    orders = {"targeting": [tokens[np.lexsort([-values[tokens] for values in keys])]]}
    for name, baseline in BASELINES[modality].items():
        scores = baseline(record, idf)[tokens]
        orders[name] = [tokens[np.lexsort((rng.random(len(tokens)), -scores))] for _ in range(draws)]
    return orders


def record_curves(
    record: TargetRecord,
    scorer: Scorer,
    modality: str,
    points: int = 11,
    idf: Idf | None = None,
    draws: int = 4,
) -> dict[str, Curves]:
    """Computes the curves of a record's tokens in the order of the targeting and of each baseline.

    Arguments as in ``faithfulness_scores``; a baseline's curves are means over its orders.

    Raises:
        ValueError: the record has no token of this modality with a teacher target.
    """
    rng = np.random.default_rng(0)
    curves = {}
    for name, orders in _orders(record, modality, idf, draws, rng).items():
        if not len(orders[0]):
            raise ValueError(f"{record.example_id}: no {modality} token has a teacher target")
        every = [perturbation_curves(scorer, order, len(record.tokens), points) for order in orders]
        means = [np.mean([getattr(c, part) for c in every], axis=0) for part in ("deletion", "insertion")]
        curves[name] = Curves(every[0].fraction, *means)
    return curves


def _masked(scorer: Scorer, tokens: int, order: np.ndarray, size: int, points: int) -> dict[str, float]:
    chosen, candidates = np.zeros((2, tokens), dtype=bool)
    chosen[order[:size]], candidates[order] = True, True
    comprehensiveness, sufficiency = faithfulness(scorer, chosen, candidates)
    curves = perturbation_curves(scorer, order, tokens, points)
    return {
        "comprehensiveness": comprehensiveness, "sufficiency": sufficiency,
        "deletion": curves.deletion_area, "insertion": curves.insertion_area,
    }  # fmt: skip


def masked_scorer(
    student: Any, batch: Mapping[str, Tensor], record: TargetRecord, mask_token_id: int, batch_size: int = 32
) -> Scorer:
    """Makes a scorer: a student's probability of a record's answer, with tokens masked.

    Text tokens become the tokenizer's mask, in the record's statement alone (so [CLS], [SEP] and
    the order stay); visual tokens become the mean colour of the student's normalisation (pixel value
    0) within their box, or a region without features. The probability is that of the record's choice,
    or of its label (else its prediction) where the task has a label set. ``batch`` is the record's example as
    the student's inputs (``training.data.collate``); the student is used in evaluation mode,
    ``batch_size`` variants at a time.

    Raises:
        ValueError: the batch holds several examples, or other tokens than the record.
    """
    texts = batch["input_ids"].shape[2]
    if len(batch["input_ids"]) != 1:
        raise ValueError(f"a batch of {len(batch['input_ids'])} examples; expected one, that of the record")
    if not np.array_equal(batch["spans"][0, record.choice].numpy(), record.spans[:texts]):
        raise ValueError(
            f"{record.example_id}: the batch has {texts} text tokens, the record others; make the batch of "
            "the record's example with the record's encoder"
        )
    has_choices = batch["input_ids"].shape[1] > 1
    target = record.choice if has_choices else record.label if record.label is not None else record.prediction
    device = next(student.parameters()).device
    inputs = {name: batch[name].to(device) for name in student.inputs}

    def variants(keep: np.ndarray) -> dict[str, Tensor]:
        gone = torch.as_tensor(~keep, device=device)
        masked = {name: value.expand(len(keep), *value.shape[1:]).clone() for name, value in inputs.items()}
        # The other choices stay whole: what is measured is this statement's probability among them.
        masked["input_ids"][:, record.choice][gone[:, :texts]] = mask_token_id
        if "region_features" in masked:
            masked["region_features"][gone[:, texts:]] = 0
        else:
            # Boxes are shares of the picture, which may be smaller than the padded pixels that it lies in.
            whole = torch.ones_like(batch["pixel_values"][0, 0])
            shown = batch["pixel_mask"][0].expand_as(whole) if "pixel_mask" in batch else whole
            height, width = int(shown.amax(1).sum()), int(shown.amax(0).sum())
            places = (record.boxes * [width, height, width, height]).round().astype(int)
            for row, token in zip(*np.nonzero(~keep[:, texts:]), strict=True):
                left, top, right, bottom = places[texts + token]
                masked["pixel_values"][row, :, top:bottom, left:right] = 0
        return masked

    @torch.inference_mode()
    def scorer(keep: np.ndarray) -> np.ndarray:
        student.eval()
        parts = [
            student(**variants(keep[start : start + batch_size])).logits.float().softmax(-1)[:, target]
            for start in range(0, len(keep), batch_size)
        ]
        return torch.cat(parts).cpu().numpy()

    return scorer
