"""Re-pairing: what CLIP makes of an example's text with another example's picture. Beyond the paper.

A dual encoder's tokens see one modality each, so matching them cannot teach whether a statement is true
of a picture. CLIP's judgement of *pairs* can, and it needs no label: n texts and m pictures are n x m
lessons. Relatives: KDDAug (Chen et al. 2022, arXiv 2207.08739: a VQA teacher answers randomly composed
image-question pairs) and function matching (Beyer et al. 2021, arXiv 2106.05237: a wider support than the
data, and patience). New here: CLIP's zero-shot judgement as the teacher, and the weight by its certainty.

This module computes CLIP's distribution over the statements of a re-paired example, and chooses the other
picture. The loss is ``losses.choice_distribution_loss`` with one of ``weighting.INSTANCE_WEIGHTS``.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

Judgements = Float[Tensor, "batch pictures judged"]
Logits = Float[Tensor, "batch judged"]
Allowed = Bool[Tensor, "batch pictures"]
Places = Int[Tensor, " batch"]

NEVER = -1e4  # a logit that a softmax in single precision makes exactly 0, and whose product with 0 is 0


def judge_choices(
    statements: Float[Tensor, "batch judged teacher_dim"],
    pictures: Float[Tensor, "pictures teacher_dim"],
    log_prior: Logits | None = None,
) -> Judgements:
    """CLIP's logits over the statements of each text, for every picture: scaled cosines, and a prior.

    ``logits[b, j, k] = statement[b, k] . picture[j] + log_prior[b, k]``; statements are global embeddings
    times the logit scale, pictures unit vectors. For tasks in which exactly one of several statements is
    true; None takes all to be alike likely.
    """
    fits = torch.einsum("bkd,jd->bjk", statements.detach(), pictures.detach())
    return fits if log_prior is None else fits + log_prior.unsqueeze(1)


def judge_truth(
    statements: Float[Tensor, "batch 1 teacher_dim"],
    pictures: Float[Tensor, "pictures teacher_dim"],
    distinct: Bool[Tensor, " pictures"] | None = None,
) -> Judgements:
    """CLIP's logits of "true" and "false" of one statement, for every picture, both judged side by side.

    ``p[j] = softmax over the pictures of the scaled cosines``: a statement is taken to be true of the
    picture that it fits best, and of at most one (our reading); the logits are ``log p`` and
    ``log (1 - p)``. It needs no threshold, which a cosine alone would. What it costs: a statement that
    is true of two of the pictures is called half true of each, and how sure p is depends on how many
    pictures there are. Beside a single picture nothing can be said: p is 1/2, whose certainty is 0.

    Entailment is "true" and contradiction "false". CLIP cannot judge "neutral", what a picture neither
    shows nor excludes: the student's probability of it is left out of the comparison (its other two are
    renormalised), so that re-pairing neither teaches nor unteaches it.
    """
    fits = torch.einsum("bkd,jd->bjk", statements.detach(), pictures.detach())[..., 0]
    if distinct is None:
        distinct = torch.ones_like(fits[0], dtype=torch.bool)
    # a picture that is there twice counts once
    log_true = fits - fits.masked_fill(~distinct, -math.inf).logsumexp(dim=-1, keepdim=True)
    # log(1 - p) = log of the other pictures' share; -expm1 keeps it exact where p is small
    log_false = torch.log(-torch.expm1(log_true.clamp_max(-1e-7)))
    logits = torch.stack([log_true, log_false], dim=-1).clamp_min(NEVER)
    return torch.where(distinct.sum() > 1, logits, -math.log(2))


def other_pictures(
    own: Int[Tensor, " batch"], pictures: Int[Tensor, " pictures"]
) -> Bool[Tensor, "batch pictures"]:
    """Mark the pictures that are not an example's own; numbers tell pictures apart."""
    return own.unsqueeze(1) != pictures.unsqueeze(0)


def any_other(
    judged: Judgements, own: Logits, student: Logits, allowed: Allowed, generator: Generator | None = None
) -> Places:
    """Draw one of the allowed pictures for each example, all alike likely; -1 where there is none.

    Args:
        judged: CLIP's logits for every picture.
        own: CLIP's logits for the example's own picture.
        student: the student's logits for the example's own picture, over the same statements.
        allowed: the pictures that an example may be shown with.
        generator: of the draws; torch's global one if None.
    """
    return _highest(_noise(allowed, generator), allowed)


def changed_answer(
    judged: Judgements, own: Logits, student: Logits, allowed: Allowed, generator: Generator | None = None
) -> Places:
    """Draw among the pictures with which CLIP's best statement is another; of all, where none is so.

    Such a pair cannot be answered from the text alone. Arguments as in ``any_other``.
    """
    changes = allowed & (judged.argmax(dim=-1) != own.argmax(dim=-1, keepdim=True))
    usable = torch.where(changes.any(dim=1, keepdim=True), changes, allowed)
    return _highest(_noise(allowed, generator), usable)


def most_disagreement(
    judged: Judgements, own: Logits, student: Logits, allowed: Allowed, generator: Generator | None = None
) -> Places:
    """Take the picture with which CLIP departs most from what the student says of the text so far.

    ``argmax_j KL(CLIP(. | text, picture j) || student(. | text, its own picture))`` (our reading): the
    student's answer for the other picture would cost a pass for each, its answer for the text's own is
    there already, and what a student that looks at texts alone gets most wrong is the same. Arguments
    as in ``any_other``; ties go to the earlier picture.
    """
    teacher = judged.log_softmax(dim=-1)
    expected = student.detach().to(teacher.dtype).log_softmax(dim=-1).unsqueeze(1)
    return _highest((teacher.exp() * (teacher - expected)).sum(dim=-1), allowed)


def _noise(allowed: Tensor, generator: Generator | None) -> Float[Tensor, "batch pictures"]:
    device = generator.device if generator is not None else allowed.device
    return torch.rand(allowed.shape, generator=generator, device=device).to(allowed.device, non_blocking=True)


def _highest(keys: Tensor, allowed: Tensor) -> Int[Tensor, " batch"]:
    """The column of the highest allowed key in each row, -1 in rows that allow none."""
    if not allowed.shape[1]:
        return torch.full(allowed.shape[:1], -1, device=allowed.device)
    best = keys.masked_fill(~allowed, -math.inf).argmax(dim=1)
    return torch.where(allowed.any(dim=1), best, -1)


PictureChoice = Callable[[Tensor, Tensor, Tensor, Tensor, Generator | None], Tensor]

PICTURE_CHOICES: dict[str, PictureChoice] = {
    "random": any_other,
    "changed": changed_answer,
    "disagreement": most_disagreement,
}
