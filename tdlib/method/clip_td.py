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

Steps 1 to 5 depend on the example and the frozen teacher alone (``score_tokens``; the relevance variants
that look at the student are redone as it learns, ``score_by_student``), 6 to 9 on the student too. Beyond
the paper, ``pairing`` teaches from pairs that the data do not hold.

Every function takes one example (choices, tokens, ...) or a batch of them (batch, choices, tokens, ...).
Text and pictures do not mix before step 7 (but in conditioned targets): a batch does steps 1 to 5 for each
by itself (``score_apart``), and what no text changes of a picture once for all its texts. Who calls them:
``training.targets`` the first half, ``training.objective`` the second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tdlib.method.alignment import align, aligned_targets, image_conditioned_targets
from tdlib.method.losses import Distance, distance_named
from tdlib.method.priors import PRIORS, Idf, referred_prior
from tdlib.method.registry import is_users
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.method.selection import DEFAULTS, SelectionOptions, Selector, select, token_scores
from tdlib.method.tokens import TeacherTokens, Tokens, join
from tdlib.method.weighting import INSTANCE_WEIGHTS, TOKEN_WEIGHTS

PerToken = Float[Tensor, "*#batch tokens"]
Mask = Bool[Tensor, "*#batch tokens"]
Vectors = Float[Tensor, "*#batch tokens teacher_dim"]


@dataclass(frozen=True)
class ScoredTokens:
    """Steps 1 to 5: what each student token is drawn to, and how much it deserves to be.

    ``vectors`` have unit length, or are zero where a token is not distilled; ``valid`` marks the others.
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
    None: all places are alike.
    """
    length = spans.shape[1]
    whole = torch.ones(len(texts), length + len(boxes))
    for row, text in enumerate(texts):
        whole[row, :length] = PRIORS[prior](text, spans[row], idf)
        if referred is not None:
            whole[row, length:] = referred_prior(boxes, referred[row])
    return whole


def score_tokens(
    student: Tokens,
    teacher: TeacherTokens,
    prior: PerToken,
    relevance: str = "value",
    temperature: float = 0.03,
    prior_weight: float = 1.0,
    centres: tuple[Float[Tensor, " teacher_dim"], Float[Tensor, " teacher_dim"]] | None = None,
    conditioned: bool = False,
) -> ScoredTokens:
    """Steps 1, 2, 3 and 5 for the student's tokens; ``prior`` is step 4.

    ``relevance`` names one of ``RELEVANCE`` or ``STUDENT_RELEVANCE``. ``centres`` are the mean teacher
    tokens of texts and of pictures, where targets are centred; ``conditioned``: words are drawn to the
    patches that agree with them.
    """
    alignment = align(student, teacher.tokens)  # 1
    vectors = aligned_targets(alignment, teacher.projected)  # 2
    valid = torch.linalg.vector_norm(vectors, dim=-1) != 0  # quicker than to ask every number
    if centres is not None:  # only the direction of a target changes, not which tokens have one
        of_modality = torch.where(student.is_text.unsqueeze(-1), centres[0], centres[1])
        vectors = aligned_targets(alignment, teacher.projected, of_modality)
    if conditioned:
        vectors = image_conditioned_targets(vectors, student, temperature)
    if relevance in STUDENT_RELEVANCE:  # 3
        relevances = torch.zeros_like(prior)
    else:
        relevances = RELEVANCE[relevance](alignment, student, teacher)
    scores = token_scores(relevances, prior, student, valid, temperature, prior_weight)  # 5
    return ScoredTokens(vectors, valid, relevances, prior, scores)


def score_apart(
    text: tuple[Tokens, TeacherTokens, Float[Tensor, "batch choices text_tokens"]],
    visual: tuple[Tokens, TeacherTokens, Float[Tensor, "*#shown visual_tokens"]],
    relevance: str = "value",
    temperature: float = 0.03,
    prior_weight: float = 1.0,
    centres: tuple[Float[Tensor, " teacher_dim"], Float[Tensor, " teacher_dim"]] | None = None,
    conditioned: bool = False,
) -> ScoredTokens:
    """``score_tokens`` of a batch whose text and pictures come apart: student, teacher and prior of each.

    Text is (batch, choices, tokens, ...), pictures (batch, 1, tokens, ...): their alignment and targets
    are the same for every text about them. The result runs over text, then picture, (batch, choices, ...).

    A user's own relevance was written for whole sequences of one example, (choices, tokens, ...), and is
    called so, example by example, which is slower.
    """
    score = partial(
        score_tokens, relevance=relevance, temperature=temperature, prior_weight=prior_weight, centres=centres
    )
    student = Tokens(join(text[0].spans, visual[0].spans, 2), join(text[0].boxes, visual[0].boxes, 2))
    if relevance in RELEVANCE and is_users(RELEVANCE[relevance]):
        teacher, prior = TeacherTokens.cat(text[1], visual[1]), join(text[2], visual[2], 2)
        rows = [score(student[row], teacher[row], prior[row]) for row in range(len(prior))]
        scored = {f.name: torch.stack([getattr(row, f.name) for row in rows]) for f in fields(ScoredTokens)}
    else:
        words, places = score(*text), score(*visual)
        scored = {f.name: join(getattr(words, f.name), getattr(places, f.name), 2) for f in fields(words)}
    if conditioned:  # the one step in which words read patches
        scored["vectors"] = image_conditioned_targets(scored["vectors"], student, temperature)
    return ScoredTokens(**scored)


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
    """Steps 3 and 5 anew, for a relevance that looks at the student: ``projected`` is ``phi(h)``."""
    relevances = STUDENT_RELEVANCE[relevance](projected, vectors, student, valid)
    return relevances, token_scores(relevances, prior, student, valid, temperature, prior_weight)


def choose_tokens(
    scores: PerToken,
    student: Tokens,
    valid: Mask,
    selector: str | Selector = "nucleus",
    options: SelectionOptions = DEFAULTS,
    token_weight: str = "score",
    generator: Generator | None = None,
) -> tuple[Mask, PerToken]:
    """Steps 6 and 7: the selected tokens and their weights, which sum to 1 over both modalities."""
    selected = select(scores, student, valid, selector, options, generator)
    return selected, TOKEN_WEIGHTS[token_weight](scores, selected)


def places_of(distilled: Mask, student: Tokens) -> dict[str, Int[Tensor, " places"]]:
    """Where the marked tokens of "text" and "visual" are, counted through all sequences of the batch.

    Waits for the device once, to count them. Do it before the student's pass, when there is little to wait
    for. Sorting marks finds the same places in the same order as ``nonzero``, which would wait each time.
    """
    marks = torch.stack([distilled & student.is_text, distilled & ~student.is_text]).flatten(1)
    order = marks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    counts = marks.sum(1).tolist()
    return {"text": order[0, : counts[0]], "visual": order[1, : counts[1]]}


def weigh_examples(
    teacher_logits: Float[Tensor, "batch choices"],
    student_logits: Float[Tensor, "batch choices"],
    labels: Int[Tensor, " batch"],
    instance_weight: str = "ratio",
) -> Float[Tensor, " batch"]:
    """Step 8, from the probabilities of teacher and student; carries no gradient.

    0 for an example whose right answer is not in the label set (-1): there is no p_T.
    """
    weight = INSTANCE_WEIGHTS[instance_weight]
    teacher, student = teacher_logits.softmax(-1), student_logits.detach().softmax(-1)
    return weight(teacher, student, labels.clamp_min(0)) * (labels >= 0)


def distillation_loss(
    hidden: Float[Tensor, "batch choices tokens student_dim"],
    phi: Mapping[str, Callable[[Tensor], Tensor]],
    vectors: Vectors,
    weights: PerToken,
    instance: Float[Tensor, " batch"],
    places: Mapping[str, Int[Tensor, " places"]],
    distance: str | Distance = "cosine",
    num_sequences: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Step 9, the text's part and the picture's; the loss is their sum.

    ``phi`` holds the maps "text" and "visual" into CLIP's space. ``places`` are those (``places_of``) of the
    selected tokens that have a target and a weight; only these are read, mapped and compared.
    ``num_sequences``: divide by this number, that of a whole accumulation window, instead of batch times
    choices.
    """
    measure = distance_named(distance)
    sequences = num_sequences or hidden.shape[0] * hidden.shape[1]
    share = (weights * instance[:, None, None]).detach() / sequences

    def part(name: str) -> Float[Tensor, ""]:
        states, targets, shares = (
            values.flatten(0, 2).index_select(0, places[name]) for values in (hidden, vectors.detach(), share)
        )
        return (shares * measure(phi[name](states), targets)).sum()

    return part("text"), part("visual")
