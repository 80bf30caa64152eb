"""Relevance variants: how much a student token has to do with the other modality, in the teacher's eyes.

Variants in ``RELEVANCE`` read the teacher's cached tokens; those in ``STUDENT_RELEVANCE`` compare the student
with its targets while it trains. ``selection`` turns relevance and prior into scores.

The functions here take whole batches, in which an axis may have length 1. A function that a user adds is
called with one example at a time: ``alignment`` (choices, student_tokens, teacher_tokens), text then picture.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tdlib.method.registry import Named
from tdlib.method.tokens import TeacherTokens, Tokens

SMALLEST = 1e-8  # a vector shorter than this has no direction


def relevance_projected(
    alignment: Float[Tensor, "*#batch student_tokens teacher_tokens"], student: Tokens, teacher: TeacherTokens
) -> Float[Tensor, "*#batch student_tokens"]:
    """Compare the aligned teacher token with CLIP's global embedding of the other modality.

    ``r[i] = cos(A t, g_image)`` for a text token, ``cos(A t, g_text)`` for a visual one (our
    reading of CLIP-TD), with ``t`` the tower's projected tokens. In [-1, 1]; 0 where the row of
    ``alignment`` is zero. Known trap: raw patch tokens of CLIP are noisy and often point at the
    background, which is what ``relevance_value`` is for.
    """
    return _cosine_with_other_modality(alignment, teacher.projected, student, teacher)


def relevance_value(
    alignment: Float[Tensor, "*#batch student_tokens teacher_tokens"], student: Tokens, teacher: TeacherTokens
) -> Float[Tensor, "*#batch student_tokens"]:
    """Compare as ``relevance_projected`` does, with the tokens of the value path of the last attention.

    Same formula, range and zeros; ``t`` are the tokens with the last attention block replaced by
    its value path (the idea of MaskCLIP, Zhou et al. 2022), which keeps each token's own content.
    """
    return _cosine_with_other_modality(alignment, teacher.value, student, teacher)


def relevance_vv(
    alignment: Float[Tensor, "*#batch student_tokens teacher_tokens"], student: Tokens, teacher: TeacherTokens
) -> Float[Tensor, "*#batch student_tokens"]:
    """Compare as ``relevance_projected`` does, with the tokens of value-value attention.

    Same formula, range and zeros; ``t`` are the tokens of CLIP Surgery's second path (Li et al. 2023),
    on which a token reads others by the likeness of their values.
    """
    if teacher.vv is None:
        raise ValueError("the teacher's tokens have no 'vv'; encode them with extras=('vv',)")
    return _cosine_with_other_modality(alignment, teacher.vv, student, teacher)


def relevance_saliency(
    alignment: Float[Tensor, "*#batch student_tokens teacher_tokens"], student: Tokens, teacher: TeacherTokens
) -> Float[Tensor, "*#batch student_tokens"]:
    """Mix the teacher's scalars of the tokens that a student token is aligned with, as its target is mixed.

    ``r[i] = sum_j A[i, j] a[j]``, in [0, 1]; 0 where the row of ``alignment`` is zero. The variant decides
    what ``a`` is: "attention" of the pooled position in the last layer, "rollout" of attention
    through the layers (Abnar & Zuidema 2020), or "gradient", the relevancy for the cosine of this text
    with this picture (Chefer et al. 2021). Only the last depends on the other modality.
    """
    if teacher.saliency is None:
        raise ValueError("the teacher's tokens have no 'saliency'; fill it with the variant's scalars")
    scalars = teacher.saliency.detach().to(alignment.dtype)
    return (alignment.detach() @ scalars.unsqueeze(-1)).squeeze(-1)


def relevance_entropy(
    projected: Float[Tensor, "*batch tokens teacher_dim"],
    targets: Float[Tensor, "*batch tokens teacher_dim"],
    student: Tokens,
    valid: Bool[Tensor, "*batch tokens"],
    temperature: float = 0.1,
) -> Float[Tensor, "*batch tokens"]:
    """Measure how unsure the student is which of the targets a token stands for (our reading).

    ``r[i] = H(softmax_j cos(phi(h[i]), u[j]) / temperature) / log n``, over the n valid targets j of
    the token's modality. In [0, 1]; 1 for a token that is equally near to all of them, 0 for one that
    has found one, for tokens that are not valid, and where n < 2. No gradient.

    Args:
        projected: the student's tokens in the joint space, ``phi(h)``, of any length.
        targets: their targets u.
        student: says which tokens are text and which are visual.
        valid: which tokens have a target.
        temperature: of the softmax over cosines, above 0.

    Raises:
        ValueError: the temperature is no finite number above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"entropy temperature is {temperature}; expected a finite number above 0")
    cosine = F.normalize(projected.detach(), dim=-1) @ F.normalize(targets.detach(), dim=-1).transpose(-1, -2)
    same = student.is_text.unsqueeze(-1) == student.is_text.unsqueeze(-2)
    candidates = same & valid.unsqueeze(-1) & valid.unsqueeze(-2)
    logits = (cosine / temperature).masked_fill(~candidates, -torch.inf)
    logits = logits.masked_fill(~valid.unsqueeze(-1), 0)  # no softmax over nothing
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~candidates, 0)).sum(dim=-1)
    several = candidates.sum(dim=-1)
    return torch.where(several > 1, entropy / several.clamp(min=2).log(), 0).clamp(0, 1)


def relevance_disagreement(
    projected: Float[Tensor, "*batch tokens teacher_dim"],
    targets: Float[Tensor, "*batch tokens teacher_dim"],
    student: Tokens,
    valid: Bool[Tensor, "*batch tokens"],
) -> Float[Tensor, "*batch tokens"]:
    """Measure how far the student still is from a token's target: ``r[i] = 1 - cos(phi(h[i]), u[i])``.

    In [0, 2]; 0 for tokens that are not valid. No gradient. Arguments as in ``relevance_entropy``.
    """
    cosine = F.cosine_similarity(projected.detach(), targets.detach(), dim=-1)
    return torch.where(valid, 1 - cosine, 0).clamp(0, 2)


def _cosine_with_other_modality(
    alignment: Float[Tensor, "*#batch student_tokens teacher_tokens"],
    teacher_vectors: Float[Tensor, "*#batch teacher_tokens teacher_dim"],
    student: Tokens,
    teacher: TeacherTokens,
) -> Float[Tensor, "*#batch student_tokens"]:
    mixed = alignment.detach() @ teacher_vectors.detach().to(alignment.dtype)
    # A length of 0 counts as SMALLEST, so a zero row has the cosine 0. Not F.cosine_similarity, which would
    # repeat a picture's tokens for each of its texts.
    length = mixed.norm(dim=-1).clamp_min(SMALLEST)
    to_image, to_text = (
        torch.einsum("...nd,...d->...n", mixed, F.normalize(pooled.detach().to(mixed.dtype), dim=-1)) / length
        for pooled in (teacher.image_global, teacher.text_global)
    )
    return torch.where(student.is_text, to_image, to_text)


RELEVANCE = Named(
    projected=relevance_projected,
    value=relevance_value,
    vv=relevance_vv,
    attention=relevance_saliency,
    rollout=relevance_saliency,
    gradient=relevance_saliency,
)

# Computed anew at each step, from the student's tokens and their targets.
STUDENT_RELEVANCE = Named(entropy=relevance_entropy, disagreement=relevance_disagreement)
