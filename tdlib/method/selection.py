"""Selects the tokens of an example that are distilled: from relevance to scores to a selection.

``relevance`` and ``priors`` compute what a score is made of, ``weighting`` what selected tokens weigh.

A selector is a function ``(scores, valid, options, generator) -> selected``, all over the last
axis; add one with ``SELECTORS["mine"] = my_selector``. It is called once with the words of each text as its
``valid`` tokens and once with the places of each picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tdlib.method.registry import Named, check_result
from tdlib.method.tokens import Tokens

Scores = Float[Tensor, "*batch tokens"]
Mask = Bool[Tensor, "*batch tokens"]

# A mass or a threshold counts as reached this (relative) bit early, so that rounding does not decide.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class SelectionOptions:
    """Numbers that selectors read; each selector says which.

    ``mass`` in (0, 1]: share of a modality's score to cover. ``count`` >= 1: tokens per modality.
    ``fraction`` in (0, 1]: share of a modality's valid tokens. ``deviations``: standard deviations
    above the mean. Raises ValueError for a number outside its range.
    """

    mass: float = 0.6
    count: int = 5
    fraction: float = 0.3
    deviations: float = 1.0

    def __post_init__(self):  # cells make these by hand, where a mass of 60 would silently select everything
        if not 0 < self.mass <= 1:
            raise ValueError(f"selection mass is {self.mass}; expected a share of the score in (0, 1]")
        if not (self.count >= 1 and self.count % 1 == 0):
            raise ValueError(f"selection count is {self.count}; expected a whole number, at least 1")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"selection fraction is {self.fraction}; expected a share of tokens in (0, 1]")
        if not math.isfinite(self.deviations):
            raise ValueError(f"selection deviations is {self.deviations}; expected a finite number")


Selector = Callable[[Tensor, Tensor, SelectionOptions, Generator | None], Tensor]
DEFAULTS = SelectionOptions()


def modalities(student: Tokens, valid: Mask) -> tuple[Mask, Mask]:
    """Split the valid tokens into text and visual; a token with both a span and a box counts as text."""
    return valid & student.is_text, valid & student.is_visual & ~student.is_text


def token_scores(
    relevance: Float[Tensor, "*#batch tokens"],
    prior: Float[Tensor, "*#batch tokens"],
    student: Tokens,
    valid: Bool[Tensor, "*#batch tokens"],
    temperature: float,
    prior_weight: float,
) -> Float[Tensor, "*#batch tokens"]:
    """Score how much each token deserves to be distilled, within its own modality.

    ``s = softmax(relevance / temperature) * prior ** prior_weight``, renormalised so that the
    valid tokens of each modality sum to 1 (our reading of CLIP-TD). Valid tokens are real ones whose
    row of the alignment is not zero. Prior in [0, 1]; scores in [0, 1], 0 for tokens that are not
    valid or have no position. A modality that has no valid token or only priors of 0 sums to 0.
    Carries no gradient. Raises ValueError for a bad coefficient.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"relevance temperature is {temperature}; expected a finite number above 0")
    if not 0 <= prior_weight < math.inf:
        raise ValueError(f"prior_weight is {prior_weight}; expected a finite number of at least 0")
    # In the log domain the product cannot underflow, and 0 ** 0 = 1 as xlogy(0, 0) = 0.
    log_prior = torch.xlogy(torch.full_like(prior, prior_weight), prior)
    log_scores = (relevance / temperature + log_prior).detach()
    text, visual = modalities(student, valid)
    return _masked_softmax(log_scores, text) + _masked_softmax(log_scores, visual)


def select(
    scores: Scores,
    student: Tokens,
    valid: Mask,
    selector: str = "nucleus",
    options: SelectionOptions = DEFAULTS,
    generator: Generator | None = None,
) -> Mask:
    """Apply the selector of this name in ``SELECTORS`` to each modality; return the union.

    Our reading of CLIP-TD: words and regions never compete with each other, so a selector sees scores of 0
    outside its modality, and what it marks there does not count. ``generator`` is read by the selectors that
    draw; without it they use torch's global one. Raises ValueError for a selector that returns no boolean
    mask of the scores' shape.
    """
    marked = []
    for own in modalities(student, valid):
        selected = SELECTORS[selector](scores.masked_fill(~own, 0), own, options, generator)
        check_result(f"selector {selector!r}", selected, own.shape, mask=True)
        marked.append(selected & own)
    return marked[0] | marked[1]


def nucleus(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the smallest set of tokens whose score reaches ``mass`` of the valid tokens' score.

    ``argmin |V| such that sum_V s >= mass * sum s`` (top-p of Holtzman et al. 2020, used here on
    tokens of one example). Ties go to the earlier token. Never empty where a valid score is
    positive; a token with score 0 is never selected.
    """
    ordered, order = scores.masked_fill(~valid, 0).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    target = options.mass * (1 - TOLERANCE) * ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(valid).scatter(-1, order, before < target)


def top_k(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the ``count`` valid tokens of highest score (all, where there are fewer)."""
    return _highest(scores, valid, torch.full_like(valid.sum(dim=-1), options.count))


def top_fraction(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the highest ``fraction`` of the valid tokens, rounded up: ``ceil(fraction * valid tokens)``."""
    size = options.fraction * (1 - TOLERANCE) * valid.sum(dim=-1)
    return _highest(scores, valid, size.ceil().long())


def threshold(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the tokens that stand out: ``s >= mean + deviations * sd`` over the valid tokens.

    ``sd`` is the population's. May select nothing when ``deviations`` is above 1; a token with
    score 0 is never selected.
    """
    size = valid.sum(dim=-1, keepdim=True).clamp_min(1)
    mean = scores.masked_fill(~valid, 0).sum(dim=-1, keepdim=True) / size
    variance = ((scores - mean) ** 2).masked_fill(~valid, 0).sum(dim=-1, keepdim=True) / size
    limit = mean + options.deviations * variance.sqrt()
    return valid & (scores > 0) & (scores >= limit - TOLERANCE * limit.abs())


def all_valid(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select every valid token: the control without selection (naive distillation)."""
    return valid.clone()


def first(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the first valid tokens by position, as many as ``nucleus`` does: a control, see ``random``."""
    return _highest(torch.zeros_like(scores), valid, _nucleus_size(scores, valid, options))


def random(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select valid tokens uniformly at random, as many as ``nucleus`` selects: the control of selection.

    The same number of words and of places, but not the same balance of weight between them: with
    ``token_weight="score"`` weights are shares of the scores of all selected tokens, of which the nucleus
    has about the same part in either modality and a random choice any. "uniform" keeps the balance.
    """
    device = generator.device if generator is not None else scores.device
    noise = torch.rand(scores.shape, generator=generator, device=device)
    noise = noise.to(scores.device, non_blocking=True)
    return _highest(noise, valid, _nucleus_size(scores, valid, options))


def inverse(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Select the valid tokens of lowest score, as many as ``nucleus`` does: a control, see ``random``."""
    return _highest(-scores, valid, _nucleus_size(scores, valid, options))


def sample(scores: Scores, valid: Mask, options: SelectionOptions, generator: Generator | None) -> Mask:
    """Draw tokens without replacement in proportion to their score, as many as ``nucleus`` selects.

    Gumbel-top-k (Kool et al. 2019) takes the highest ``log s + Gumbel noise``; with ``e`` from
    Exp(1), ``-log e`` is Gumbel noise, so the highest ``s / e`` are the same tokens.
    """
    device = generator.device if generator is not None else scores.device
    noise = torch.empty(scores.shape, device=device).exponential_(generator=generator)
    noise = noise.to(scores.device, non_blocking=True)
    keys = scores / noise.clamp_min(torch.finfo(noise.dtype).tiny)
    return _highest(keys, valid, _nucleus_size(scores, valid, options))


def _nucleus_size(scores: Tensor, valid: Tensor, options: SelectionOptions) -> Int[Tensor, "*batch"]:
    return nucleus(scores, valid, options, None).sum(dim=-1)


def _highest(keys: Tensor, valid: Tensor, size: Int[Tensor, "*batch"]) -> Mask:
    """Mark the ``size`` valid tokens of highest key in each row; ties go to the earlier token."""
    order = keys.masked_fill(~valid, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return valid & (rank < size.unsqueeze(-1))


def _masked_softmax(logits: Tensor, mask: Tensor) -> Float[Tensor, "*#batch tokens"]:
    """Softmax over the tokens of ``mask`` whose logit is not -inf; a row that has none is all zero."""
    usable = mask & (logits != -math.inf)
    return logits.masked_fill(~usable, -math.inf).softmax(dim=-1).masked_fill(~usable, 0)


SELECTORS: Named[Selector] = Named(
    nucleus=nucleus,
    top_k=top_k,
    top_fraction=top_fraction,
    threshold=threshold,
    all=all_valid,
    first=first,
    random=random,
    inverse=inverse,
    sample=sample,
)
