"""Weighs selected tokens, whole examples and the whole term in the targeted loss.

Token weights follow the scores, which stay what they are unless relevance reads the student or the selector
draws; instance weights change as the student learns; schedules weigh the term over the training. No weight
carries a gradient.

An instance weight is a function ``(teacher, student, labels)`` of probabilities over the choices to
[0, 1]; ``p_T`` and ``p_S`` stand for the probability of the true label. Add one with
``INSTANCE_WEIGHTS["mine"] = my_weight``.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tdlib.method.registry import Named

Probabilities = Float[Tensor, "*batch choices"]
Labels = Int[Tensor, "*batch"]
Weights = Float[Tensor, "*batch"]


def score_token_weights(
    scores: Float[Tensor, "*batch tokens"], selected: Bool[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Weigh each selected token by its score: ``w = s / sum over the selected of s``.

    Our reading of CLIP-TD. The sum runs over both modalities, so a row sums to 1; it is all zero
    where nothing with a positive score is selected.
    """
    kept = scores.detach().masked_fill(~selected, 0)
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, kept / total, 0.0)


def uniform_token_weights(
    scores: Float[Tensor, "*batch tokens"], selected: Bool[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Weigh all selected tokens alike: ``w = 1 / number selected``; all zero where none is selected."""
    return score_token_weights(torch.ones_like(scores), selected)


TOKEN_WEIGHTS = Named(score=score_token_weights, uniform=uniform_token_weights)


def ratio_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher as far as it beats the student: ``p_T / (p_T + p_S)`` (our reading of CLIP-TD).

    0 where both are 0: a teacher that rules out the truth is not followed.
    """
    p_teacher, p_student = _of_label(teacher, labels), _of_label(student, labels)
    total = p_teacher + p_student
    return torch.where(total > 0, p_teacher / total, 0.0)


def teacher_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher as far as it is right: ``p_T`` (our reading of CLIP-TD)."""
    return _of_label(teacher, labels)


def gap_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher only where it is ahead: ``max(0, p_T - p_S)`` (our reading of CLIP-TD)."""
    return (_of_label(teacher, labels) - _of_label(student, labels)).clamp_min(0)


def correct_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher where its best choice is the label: ``1[argmax_T = y]`` (our reading of CLIP-TD)."""
    return (teacher.argmax(dim=-1) == labels).to(teacher.dtype)


def focal_weight(
    teacher: Probabilities, student: Probabilities, labels: Labels, gamma: float = 2.0
) -> Weights:
    """Dwell on what the student finds hard: ``(1 - p_S) ** gamma`` (Lin et al. 2017, Eq. 4)."""
    # A softmax in low precision may exceed 1 by rounding, and a negative base has no power.
    return (1 - _of_label(student, labels)).clamp_min(0) ** gamma


def wsld_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Trust the teacher where its cross-entropy is small beside the student's.

    ``1 - exp(-CE_S / CE_T)``, ``CE = -log p`` in nats: the weight of weighted soft labels (Zhou et
    al. 2021, arXiv 2102.00650). Finite at probabilities of 0 and 1.
    """
    of_teacher = _cross_entropy(_of_label(teacher, labels)).clamp_min(1e-8)
    return 1 - torch.exp(-_cross_entropy(_of_label(student, labels)) / of_teacher)


def certainty_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher as far as it is sure: ``1 - H(teacher) / ln(choices)``; reads no label.

    1 where it gives all to one choice, 0 where all are alike to it (our reading; ``H`` in nats). 1 where
    there is one choice only.
    """
    teacher = teacher.detach()
    if teacher.shape[-1] < 2:
        return torch.ones_like(teacher[..., 0])
    entropy = -torch.xlogy(teacher, teacher).sum(dim=-1)
    return (1 - entropy / math.log(teacher.shape[-1])).clamp(0, 1)


def disagreement_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Follow the teacher where it is sure and the student says otherwise; reads no label.

    ``certainty * sum_k |p_T[k] - p_S[k]| / 2``, the second factor being the total variation, 0 where both
    agree and 1 where they exclude each other (our reading).
    """
    apart = (teacher.detach() - student.detach()).abs().sum(dim=-1) / 2
    return certainty_weight(teacher, student, labels) * apart.clamp(0, 1)


def uniform_weight(teacher: Probabilities, student: Probabilities, labels: Labels) -> Weights:
    """Weigh every example alike: 1 (naive distillation)."""
    return torch.ones_like(teacher[..., 0])


def constant_schedule(progress: float) -> float:
    """Distil all the time: 1."""
    return 1.0


def linear_schedule(progress: float) -> float:
    """Distil less and less: ``1 - progress``."""
    return 1 - progress


def hold_schedule(progress: float) -> float:
    """Distil in the first half, then less and less: 1 until half of the updates, then linearly to 0."""
    return min(1.0, 2 * (1 - progress))


def _of_label(probabilities: Tensor, labels: Tensor) -> Weights:
    """Probability of the true label, without gradient."""
    return probabilities.detach().gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)


def _cross_entropy(probability: Tensor) -> Weights:
    return -probability.float().clamp(torch.finfo(torch.float32).tiny, 1).log()


INSTANCE_WEIGHTS = Named(
    ratio=ratio_weight,
    teacher=teacher_weight,
    gap=gap_weight,
    correct=correct_weight,
    focal=focal_weight,
    wsld=wsld_weight,
    certainty=certainty_weight,
    disagreement=disagreement_weight,
    uniform=uniform_weight,
)
# Those that read no label, and so also weigh examples whose right answer is not known.
LABEL_FREE = ("certainty", "disagreement", "uniform")

# Functions from the share of updates done, in [0, 1), to the factor of a term's weight, in [0, 1].
# "learned": the factor is constant, but each term is divided by its learned uncertainty, see
# ``TargetedDistillation``.
SCHEDULES = Named(
    constant=constant_schedule,
    linear=linear_schedule,
    hold=hold_schedule,
    learned=constant_schedule,
)
