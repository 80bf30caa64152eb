"""Further terms of the loss, beyond the paper: where an objective of one's own is added.

A term is a function from what an update knows of its batch (``TermInputs``) to one number per example. The
arms ``clip_td_extra`` and ``extra_only`` have the one that the parameter ``extra_term`` names. Add one with
``EXTRA_TERMS["mine"] = my_term``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tdlib.method.registry import Named
from tdlib.method.tokens import Tokens

PerToken = Float[Tensor, "batch choices tokens"]
PerExample = Float[Tensor, " batch"]


@dataclass(frozen=True)
class TermInputs:
    """What a term may read of one batch; gradients reach the student through ``logits`` and the states.

    Tokens are the student's: text, then picture; ``tokens`` says which is what and where. Tasks without
    choices have one "choice", and ``logits`` over labels. A batch is one of an accumulation window, and of
    several processes that train together each has its own.
    """

    logits: Float[Tensor, "batch classes"]  # over the choices, or the labels
    hidden: Float[Tensor, "batch choices tokens student_dim"]  # the state at ``distill_layer``, float32
    hidden_states: tuple[Tensor, ...]  # all of them, from the embeddings up, in the precision of the run
    tokens: Tokens  # (batch, choices, tokens)
    labels: Int[Tensor, " batch"]  # -1 where the right answer is not in the label set
    teacher_logits: Float[Tensor, "batch classes"]
    teacher_knows: PerExample  # 0 where CLIP had to cut a text: its logits tell nothing, else 1
    targets: Float[Tensor, "batch choices tokens teacher_dim"]  # step 2: unit vectors, or zeros
    valid: Bool[Tensor, "batch choices tokens"]  # tokens that have a target
    scores: PerToken  # step 5
    selected: Bool[Tensor, "batch choices tokens"]  # step 6
    weights: PerToken  # step 7
    instance_weights: PerExample  # step 8; 0 where ``teacher_knows`` is


Term = Callable[[TermInputs], Tensor]


def token_cka(inputs: TermInputs) -> PerExample:
    """Give the tokens the relations that CLIP sees among them: ``c[b] * (1 - CKA)``, in [0, c].

    Linear CKA (Kornblith et al. 2019, eq. 3, in the form of Gram matrices) with the tokens' scores as masses,
    so that it needs no map into CLIP's space. (A selection often leaves one or two words, which have no
    relations.) Words and places apart, because CLIP keeps the two modalities in different places of its
    space; the mean of both and of the choices. A modality with fewer than two tokens adds 0.
    """
    parts = [
        1 - _weighted_cka(inputs.hidden, inputs.targets, inputs.scores * (inputs.valid & of_modality))
        for of_modality in (inputs.tokens.is_text, inputs.tokens.is_visual)
    ]
    return inputs.instance_weights * torch.stack(parts).mean(dim=(0, 2))


def reverse_divergence(inputs: TermInputs) -> PerExample:
    """Measure ``KL(student || CLIP)`` over the choices (or labels), in nats; 0 where CLIP cut a text.

    The student is drawn to what CLIP holds likely and not made to cover all of it (MiniLLM, Gu et al. 2024);
    the term "choice" is the other direction.
    """
    student, teacher = inputs.logits.log_softmax(-1), inputs.teacher_logits.log_softmax(-1)
    return inputs.teacher_knows * (student.exp() * (student - teacher)).sum(-1)


EXTRA_TERMS: Named[Term] = Named(token_cka=token_cka, reverse_divergence=reverse_divergence)


def _weighted_cka(
    x: Float[Tensor, "*batch tokens one"], y: Float[Tensor, "*batch tokens other"], weights: PerToken
) -> Float[Tensor, "*batch"]:
    """Linear CKA of two sets of vectors whose tokens have masses; 1 where either has no spread."""

    def gram(vectors: Tensor) -> Tensor:
        centred = vectors - (masses * vectors).sum(dim=-2, keepdim=True)
        scaled = masses.sqrt() * centred
        return scaled @ scaled.transpose(-1, -2)

    total = weights.sum(dim=-1, keepdim=True)
    masses = (weights / total.masked_fill(total == 0, 1)).unsqueeze(-1).detach()
    first, second = gram(x), gram(y.detach())
    sizes = first.square().sum(dim=(-1, -2)) * second.square().sum(dim=(-1, -2))
    flat = sizes < 1e-12  # the root has no gradient at 0
    alike = (first * second).sum(dim=(-1, -2)) / sizes.masked_fill(flat, 1).sqrt()
    return alike.masked_fill(flat, 1)
