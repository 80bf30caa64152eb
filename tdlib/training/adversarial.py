"""Adversarial finetuning of any student (VILLA, Gan et al. 2020, arXiv 2006.06195).

Perturbs the input embeddings in the direction that raises the loss, and penalises how far the prediction
moves. Works with every arm (CLIP itself: on pictures); ``adversarial_steps`` enables it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.students.base import StudentOutput

PICTURES = ("region_features", "pixel_values")


@contextmanager
def moved_words(student: PreTrainedModel, delta: Tensor | None) -> Iterator[None]:
    """While open, ``delta`` (batch * choices, text_tokens, width) is added to the word embeddings."""
    if delta is None:
        yield
        return
    hook = student.get_input_embeddings().register_forward_hook(
        lambda _module, _args, words: words + delta.to(words)
    )
    try:
        yield
    finally:
        hook.remove()


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) in nats, (batch,), of softmaxes over logits (batch, choices)."""
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    return ((first.exp() - second.exp()) * (first - second)).sum(-1)


def adversarial_loss(
    student: PreTrainedModel,
    inputs: dict[str, Any],
    batch: dict[str, Tensor],
    task_loss: Callable[[Tensor, dict[str, Tensor], int], Tensor],
    config: RunConfig,
    examples: int,
) -> tuple[StudentOutput, dict[str, Tensor]]:
    """The clean output, and the loss at K moved inputs as the term "adversarial".

    Perturbations start at 0 and take K - 1 steps of ascent, each of one length per text and per picture,
    on word embeddings, on the visual input (region features, or pixels: our reading for students
    without regions) or on both. At each of the K places the loss is (task + w * (KL(adv || clean) +
    KL(clean || adv))) / K, as the authors' code has it (FreeLB, Zhu et al. 2020, with a divergence);
    gradients reach the clean output too. The graphs of all K + 1 passes are in memory at once.

    In ``config``, ``adversarial_steps`` is K, ``adversarial_weight`` w and ``adversarial_rate`` the L2 norm
    of a step. ``inputs`` are the student's of the ``batch``; ``examples`` is what sums are divided by.
    """
    seen = next(name for name in PICTURES if name in inputs)
    words = inputs["input_ids"].flatten(0, 1)
    clean = student(**inputs)
    clean.logits = clean.logits.float()  # whatever the precision of the student
    deltas: dict[str, Tensor] = {}
    if config.adversarial_on != "visual":
        table = student.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        real = inputs["attention_mask"].flatten(0, 1)[..., None]
        deltas["words"] = torch.zeros(*words.shape, table.embedding_dim, device=words.device)
    if config.adversarial_on != "text":
        deltas["visual"] = torch.zeros_like(inputs[seen])
    total = clean.logits.new_zeros(())
    for step in range(config.adversarial_steps):
        deltas = {name: delta.detach().requires_grad_() for name, delta in deltas.items()}
        moved = inputs | {"output_hidden_states": False}
        if "visual" in deltas:
            moved[seen] = inputs[seen] + deltas["visual"]
        with moved_words(student, deltas["words"] * real if "words" in deltas else None):
            logits = student(**moved).logits.float()
        divergence = symmetric_divergence(logits, clean.logits).sum() / examples
        if "soft" in batch:  # VQA: the task loss is a sum over answers, and so is the authors' divergence
            divergence = divergence * logits.shape[-1]
        loss = task_loss(logits, batch, examples) + config.adversarial_weight * divergence
        total = total + loss / config.adversarial_steps
        if step + 1 < config.adversarial_steps:
            gradients = torch.autograd.grad(loss, list(deltas.values()), retain_graph=True)
            for name, gradient in zip(list(deltas), gradients, strict=True):
                unit = F.normalize(gradient.flatten(1), dim=-1).view_as(gradient)  # per text, per picture
                deltas[name] = deltas[name] + config.adversarial_rate * unit
    return clean, {"adversarial": total}
