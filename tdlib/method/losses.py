"""The two losses of distillation: on targeted tokens, and on the distribution over choices.

No gradient reaches the teacher through either loss.

A distance is a function from ``(student_projected, targets)`` of all tokens of a modality to one number
per token, which does not depend on the length of the vectors. Add one with
``DISTANCES["mine"] = my_distance``.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tdlib.method.registry import Named, check_result

Vectors = Float[Tensor, "*batch tokens teacher_dim"]
PerToken = Float[Tensor, "*batch tokens"]
Distance = Callable[[Tensor, Tensor], Tensor]


def cosine_distance(student_projected: Vectors, targets: Vectors) -> PerToken:
    """Measure ``1 - cos(student, target)``: in [0, 2], and 1 where one of them is the zero vector."""
    student, targets = _at_least_float32(student_projected), _at_least_float32(targets)
    # Scales the products, not the vectors: two passes over all numbers less in each direction.
    scale = _length(student).reciprocal() * _length(targets).reciprocal()
    return 1 - (student * targets).sum(dim=-1) * scale


def l1_distance(student_projected: Vectors, targets: Vectors) -> PerToken:
    """Measure ``mean_d |x_d|`` with ``x = sqrt(teacher_dim) * (unit student - unit target)``: in [0, 2].

    The factor gives the unit vectors elements of size 1, so that the distance (and the bend of
    ``smooth_l1_distance``) does not depend on the width.
    """
    return _difference(student_projected, targets).abs().mean(dim=-1)


def smooth_l1_distance(student_projected: Vectors, targets: Vectors) -> PerToken:
    """Measure ``mean_d h(x_d)``, ``x`` as in ``l1_distance``, ``h(x) = x^2 / 2 if |x| < 1 else |x| - 1/2``.

    In [0, 2]. ``h`` is the smooth L1 of Fast R-CNN (Girshick 2015, Eq. 3).
    """
    difference = _difference(student_projected, targets)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none").mean(dim=-1)


def mse_distance(student_projected: Vectors, targets: Vectors) -> PerToken:
    """Measure the squared distance of the unit vectors: ``mean_d x_d^2 = 2 - 2 cos``, in [0, 4]."""
    return _difference(student_projected, targets).square().mean(dim=-1)


def info_nce_distance(student_projected: Vectors, targets: Vectors, temperature: float = 0.1) -> PerToken:
    """Tell a token's target from those of the others: ``-log softmax_j(cos(s_i, t_j) / temperature)_i``.

    InfoNCE (van den Oord et al. 2018; for distilling CLIP: Yang et al. 2024, CLIP-KD). In training the
    others are all selected tokens of the batch, of the same modality. A target that equals the token's
    own (cosine above 0.999: the same word elsewhere) is no negative. In [0, log n + 2 / temperature],
    in nats; 0 where there is no other target.
    """
    student, target = _unit(student_projected), _unit(targets)
    logits = student @ target.transpose(-1, -2) / temperature
    own = torch.eye(target.shape[-2], dtype=torch.bool, device=target.device)
    same = target @ target.transpose(-1, -2) > 0.999
    absent = (target == 0).all(dim=-1).unsqueeze(-2)
    logits = logits.masked_fill((same | absent) & ~own, -math.inf)
    return logits.logsumexp(dim=-1) - logits.diagonal(dim1=-2, dim2=-1)


DISTANCES: Named[Distance] = Named(
    cosine=cosine_distance,
    l1=l1_distance,
    smooth_l1=smooth_l1_distance,
    mse=mse_distance,
    info_nce=info_nce_distance,
)


def weighted_distance(
    student_projected: Float[Tensor, "tokens teacher_dim"],
    targets: Float[Tensor, "tokens teacher_dim"],
    weights: Float[Tensor, " tokens"],
    distance: str = "cosine",
) -> Float[Tensor, ""]:
    """Pull tokens towards the teacher: ``sum_i w[i] * D(student[i], target[i])``, D a key of ``DISTANCES``.

    A target of zeros is none and adds nothing, also where the distance to it is no number. Raises ValueError
    for a distance that does not return one number per token.
    """
    absent = (targets == 0).all(dim=-1)
    student = student_projected.masked_fill(absent.unsqueeze(-1), 0)  # keeps back a gradient that is none
    per_token = DISTANCES[distance](student, targets.detach())
    check_result(f"distance {distance!r}", per_token, weights.shape)
    return (weights.detach() * per_token.masked_fill(absent, 0)).sum()


def choice_distribution_loss(
    student_logits: Float[Tensor, "*batch choices"],
    teacher_logits: Float[Tensor, "*batch choices"],
    temperature: float = 1.0,
    num_examples: int | None = None,
    instance_weights: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Match the teacher's distribution over the choices: ``T^2 * mean_b c[b] KL(teacher || student)``.

    In nats. Both are ``softmax(logits / T)``; the factor keeps the size of the gradients (Hinton et al.
    2015, section 2). ``instance_weights`` are c, 1 if None; with ``weighting.wsld_weight`` these are the
    weighted soft labels of Zhou et al. 2021. ``num_examples``: divide by this number, that of a whole
    accumulation window, instead of the number given here. Raises ValueError for a bad temperature.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"choice temperature is {temperature}; expected a finite number above 0")
    teacher = (_at_least_float32(teacher_logits.detach()) / temperature).softmax(dim=-1)
    student = (_at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none").sum(dim=-1)
    if instance_weights is not None:
        divergence = instance_weights.detach().expand(divergence.shape) * divergence
    return temperature**2 * divergence.sum() / (num_examples or divergence.numel())


def _difference(student_projected: Tensor, targets: Tensor) -> Vectors:
    return math.sqrt(targets.shape[-1]) * (_unit(student_projected) - _unit(targets))


def _unit(vectors: Tensor) -> Float[Tensor, "*batch teacher_dim"]:
    """L2-normalise in float32 or better; vectors that are too short (``_length``) become 0."""
    vectors = _at_least_float32(vectors)
    return vectors / _length(vectors).unsqueeze(-1)


def _length(vectors: Tensor, smallest: float = 1e-6) -> PerToken:
    """L2 norms; infinite for vectors shorter than ``smallest``, whose gradient is then 0.

    F.normalize would multiply their gradient by up to 1e12 instead.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1)
    return length.masked_fill(length < smallest, math.inf)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
