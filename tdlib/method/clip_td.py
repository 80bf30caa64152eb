"""CLIP-TD from tokens to loss: the steps in their order. Read this file first.

The paper (arXiv 2201.05729) gives no formulas for selection and weighting; this is our reading of it.
For every student token i of an example b, text or visual:

    1  alignment        A[i, j]: the teacher tokens that lie where it lies             ``alignment``
    2  target           u[i] = normalise(A t)                                          ``alignment``
    3  relevance        r[i]: what it has to do with the other modality                ``relevance``
    4  prior            how much its word, or its place, tells before any picture      ``priors``
    5  score            s[i] = softmax(r / temperature) * prior^prior_weight           ``selection``
    6  selection        which tokens are distilled                                     ``selection``
    7  token weight     w[i] = s[i] / sum over the selected                            ``weighting``
    8  instance weight  c[b]: how far the teacher is to be followed                    ``weighting``
    9  loss             mean_b c[b] * sum_i w[i] * D(phi(h[i]), u[i])                  ``losses``

One token's weight, from top to bottom (``student`` and ``teacher`` are tokens of a batch of examples)::

    scored = score_tokens(student, teacher, prior)                                  # 1, 2, 3, 5
    selected, weights = choose_tokens(scored.scores, student, scored.valid)         # 6, 7
    instance = weigh_examples(teacher_logits, student_logits, labels)               # 8
    places = places_of(selected & scored.valid & (weights != 0), student)
    on_words, on_places = distillation_loss(
        hidden, phi, scored.vectors, weights, instance, places
    )                                                                               # 9
    loss = on_words + on_places

Steps 1 to 5 depend on the example and the frozen teacher alone; relevance variants that compare the student
with its targets are recomputed as it learns (``score_by_student``). Steps 6 to 9 depend on the student too.
Beyond the paper, ``pairing`` teaches from pairs of text and picture that the data do not hold, and ``terms``
has further terms of the loss.

Steps 1 to 7 take one example (choices, tokens, ...) or a batch of them (batch, choices, tokens, ...), a prior
is of one example, steps 8 and 9 take batches.
Training calls steps 1 to 5 in ``training.targets``, for text and pictures separately, which is faster and
gives the same because they do not mix before step 7; it calls steps 6 to 9 in ``training.objective``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tdlib.method.alignment import align, aligned_targets
from tdlib.method.losses import weighted_distance
from tdlib.method.priors import PRIORS, Idf, referred_prior
from tdlib.method.registry import check_result, is_users, need_several
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.method.selection import DEFAULTS, SelectionOptions, select, token_scores
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.method.weighting import INSTANCE_WEIGHTS, LABEL_FREE, TOKEN_WEIGHTS

PerToken = Float[Tensor, "*#batch tokens"]
Mask = Bool[Tensor, "*#batch tokens"]
Vectors = Float[Tensor, "*#batch tokens teacher_dim"]


@dataclass(frozen=True)
class ScoredTokens:
    """The result of steps 1 to 5: the target of each student token, and its score.

    ``valid`` marks the tokens that have a target; their ``vectors`` have unit length, all others are zero.
    ``relevance`` is 0 where it depends on the student (``score_by_student``). ``prior`` and ``scores`` lie
    in [0, 1]; scores sum to 1 over the valid tokens of each modality.
    """

    vectors: Vectors
    valid: Mask
    relevance: PerToken
    prior: PerToken
    scores: PerToken


def token_prior(
    texts: Sequence[str],
    spans: Int[Tensor, "choices text_tokens 2"],
    boxes: Float[Tensor, "visual_tokens 4"],
    idf: Idf | None,
    prior: str = "idf",
    referred: Sequence[Float[Tensor, "objects 4"]] | None = None,
) -> Float[Tensor, "choices tokens"]:
    """Step 4: the prior of each token of several statements about one picture, text then visual.

    ``prior`` names one of ``PRIORS`` for words. ``referred`` are the boxes that each statement points at;
    with None all visual tokens have the prior 1.
    """
    need_several(texts, "texts")
    length = spans.shape[1]
    priors = torch.ones(len(texts), length + len(boxes))
    for row, text in enumerate(texts):
        of_words = PRIORS[prior](text, spans[row], idf)
        check_result(f"prior {prior!r}", of_words, (length,))
        priors[row, :length] = of_words
        if referred is not None:
            priors[row, length:] = referred_prior(boxes, referred[row])
    return priors


def score_tokens(
    student: Tokens,
    teacher: TeacherTokens,
    prior: PerToken,
    relevance: str = "value",
    temperature: float = 0.03,
    prior_weight: float = 1.0,
    centres: tuple[Float[Tensor, " teacher_dim"], Float[Tensor, " teacher_dim"]] | None = None,
) -> ScoredTokens:
    """Steps 1, 2, 3 and 5 for the student's tokens; ``prior`` is step 4.

    ``relevance`` names one of ``RELEVANCE`` or ``STUDENT_RELEVANCE``. ``centres`` are the mean teacher
    tokens of texts and of pictures, where targets are centred.
    """
    alignment = align(student, teacher.tokens)  # 1
    vectors = aligned_targets(alignment, teacher.projected)  # 2
    valid = torch.linalg.vector_norm(vectors, dim=-1) != 0  # faster than (vectors != 0).any(-1)
    if centres is not None:
        # After ``valid``: centring turns targets, it must not decide which tokens have one.
        of_modality = torch.where(student.is_text.unsqueeze(-1), centres[0], centres[1])
        vectors = aligned_targets(alignment, teacher.projected, of_modality)
    if relevance in STUDENT_RELEVANCE:  # 3: computed at every update instead, ``score_by_student``
        relevances = torch.zeros_like(prior)
    else:
        relevances = RELEVANCE[relevance](alignment, student, teacher)
        if is_users(RELEVANCE[relevance]):  # the project's expand an axis of length 1
            check_result(f"relevance {relevance!r}", relevances, alignment.shape[:-1])
    scores = token_scores(relevances, prior, student, valid, temperature, prior_weight)  # 5
    return ScoredTokens(vectors, valid, relevances, prior, scores)


def score_by_student(
    projected: Vectors,
    vectors: Vectors,
    prior: PerToken,
    student: Tokens,
    valid: Mask,
    relevance: str,
    temperature: float = 0.03,
    prior_weight: float = 1.0,
) -> tuple[PerToken, PerToken]:
    """Steps 3 and 5 for a relevance that compares the student's tokens ``phi(h)`` with their targets."""
    relevances = STUDENT_RELEVANCE[relevance](projected, vectors, student, valid)
    check_result(f"relevance {relevance!r}", relevances, projected.shape[:-1])
    return relevances, token_scores(relevances, prior, student, valid, temperature, prior_weight)


def choose_tokens(
    scores: PerToken,
    student: Tokens,
    valid: Mask,
    selector: str = "nucleus",
    options: SelectionOptions = DEFAULTS,
    token_weight: str = "score",
    generator: Generator | None = None,
) -> tuple[Mask, PerToken]:
    """Steps 6 and 7: the selected tokens and their weights, which sum to 1 over both modalities."""
    selected = select(scores, student, valid, selector, options, generator)
    weights = TOKEN_WEIGHTS[token_weight](scores, selected)
    check_result(f"token_weight {token_weight!r}", weights, selected.shape)
    return selected, weights.masked_fill(~selected, 0)


def places_of(distilled: Mask, student: Tokens) -> dict[str, Int[Tensor, " places"]]:
    """The numbers of the marked tokens of "text" and "visual", counted through all sequences of the batch.

    Counting them waits for the device that the marks are on.
    """
    masks = {"text": distilled & student.is_text, "visual": distilled & ~student.is_text}
    return {name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()}


def all_places(mask: Mask, text_tokens: int) -> dict[str, Int[Tensor, " places"]]:
    """The numbers of all tokens of a batch whose sequences begin with ``text_tokens`` of text.

    In place of ``places_of`` where the loss may as well read every token; those that are not distilled have
    a weight and a target of zero.
    """
    numbers = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return {"text": numbers[..., :text_tokens].flatten(), "visual": numbers[..., text_tokens:].flatten()}


def weigh_examples(
    teacher_logits: Float[Tensor, "batch choices"],
    student_logits: Float[Tensor, "batch choices"],
    labels: Int[Tensor, " batch"],
    instance_weight: str = "ratio",
) -> Float[Tensor, " batch"]:
    """Step 8, from the probabilities of teacher and student; carries no gradient.

    0 for an example whose right answer is not in the label set (-1): there is no p_T. Weights that read no
    label (``LABEL_FREE``) count there too.
    """
    teacher, student = teacher_logits.softmax(-1), student_logits.detach().softmax(-1)
    weights = INSTANCE_WEIGHTS[instance_weight](teacher, student, labels.clamp_min(0))
    check_result(f"instance weight {instance_weight!r}", weights, labels.shape)
    return weights if instance_weight in LABEL_FREE else weights * (labels >= 0)


def distillation_loss(
    hidden: Float[Tensor, "batch choices tokens student_dim"],
    phi: Mapping[str, Callable[[Tensor], Tensor]],
    vectors: Vectors,
    weights: PerToken,
    instance: Float[Tensor, " batch"],
    places: Mapping[str, Int[Tensor, " places"]],
    distance: str = "cosine",
    num_sequences: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Step 9, the text's part and the picture's; the loss is their sum.

    ``mean_b c[b] * sum_i w[b, i] * D(phi(h[b, i]), u[b, i])``, the mean running over all sequences (examples
    times choices), also those without a selected token. Gradients reach ``hidden`` and ``phi`` alone.
    ``phi`` holds the maps "text" and "visual" into CLIP's space. ``places`` are those (``places_of``) of the
    selected tokens that have a target and a weight; only these are read, mapped and compared.
    ``num_sequences``: divide by this number, that of a whole accumulation window, instead of batch times
    choices.
    """
    sequences = num_sequences or hidden.shape[0] * hidden.shape[1]
    share = weights * instance[:, None, None] / sequences

    def part(name: str) -> Float[Tensor, ""]:
        states, targets, shares = (
            values.flatten(0, 2).index_select(0, places[name]) for values in (hidden, vectors, share)
        )
        return weighted_distance(phi[name](states), targets, shares, distance)

    return part("text"), part("visual")
