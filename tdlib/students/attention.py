"""Reads a student's attention in one statement: its maps, and the gradient relevance that follows from them.

The student stays as it is: for one forward pass its layers compute attention explicitly, whatever kernel
they were loaded with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdlib.core.records import TargetRecord
from tdlib.students.base import student_inputs
from tdlib.teacher.attention import Attention, AttentionError, chosen_layers
from tdlib.teacher.towers import attention_weights, relevancy


def attention_modules(student: nn.Module) -> list[Any]:
    """Finds the self-attention module of each layer of a student, first to last."""
    parts = ("query", "key", "value", "num_attention_heads")
    modules = [module for module in student.modules() if all(hasattr(module, part) for part in parts)]
    if not modules:
        raise AttentionError(
            f"{type(student).__name__} has no self-attention with query, key and value, as BERT's and ViLT's "
            "have; of CLIP look at teacher_attention"
        )
    return modules


@contextmanager
def _explicit(modules: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Makes these modules compute attention explicitly; yields their maps (batch, heads, tokens, tokens)."""
    maps: list[Tensor] = []

    def forward_of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any):
            heads = module.num_attention_heads
            q, k, v = (
                part(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in (module.query, module.key, module.value)
            )
            if attention_mask is not None and attention_mask.dtype == torch.bool:  # sdpa's; others are added
                added = torch.zeros_like(attention_mask, dtype=q.dtype)
                attention_mask = added.masked_fill(~attention_mask, torch.finfo(q.dtype).min)
            weights = attention_weights(q, k, attention_mask)
            maps.append(weights)
            return (weights @ v).transpose(1, 2).flatten(2), weights

        return forward

    # Patches the instances, not their class: other students of the class stay as they are.
    try:
        for module in modules:
            module.forward = forward_of(module)
        yield maps
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def readout_position(student: Any, batch: Mapping[str, Tensor], choice: int = 0) -> int:
    """Returns the position of the token that a student's head reads.

    It is [CLS], or in classifiers without a pooler (VL-BERT, VisualBERT) the [MASK] before the last text
    token.
    """
    if getattr(student, "with_pooler", True):
        return 0
    return int(batch["attention_mask"][0, choice].sum()) - 2


def _inputs(student: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if len(batch["input_ids"]) != 1:
        raise AttentionError(f"a batch of {len(batch['input_ids'])} examples; expected one, the record's")
    device = next(student.parameters()).device
    return {name: value.to(device) for name, value in student_inputs(student, batch).items()}


def _check_tokens(maps: Sequence[Tensor], record: TargetRecord) -> None:
    """Refuses maps over other tokens than the record's; one more is VL-BERT's [END], behind the others."""
    if not 0 <= maps[0].shape[-1] - len(record.tokens) <= 1:
        raise AttentionError(
            f"{record.example_id}: the student has {maps[0].shape[-1]} tokens, the record "
            f"{len(record.tokens)}; make the batch of the record's example with the record's encoder"
        )


def named_record(
    record: TargetRecord, batch: Mapping[str, Tensor], tokenizer: Any, tokens: int
) -> TargetRecord:
    """Names the record's tokens that have no place, such as [CLS]; adds [END] until there are ``tokens``."""
    ids = batch["input_ids"][0, record.choice].tolist()
    words = tokenizer.convert_ids_to_tokens(list(ids)) if tokenizer is not None else ["[special]"] * len(ids)
    names = [
        name if text else "" if visual else words[place] if place < len(ids) else "[IMG]"
        for place, (name, text, visual) in enumerate(
            zip(record.tokens, record.is_text, record.is_visual, strict=True)
        )
    ]
    more = tokens - len(record.tokens)
    arrays: dict[str, Any] = {}
    for name in ("spans", "boxes", "distilled", "relevance", "prior", "score", "selected", "weight"):
        value = getattr(record, name)
        arrays[name] = np.concatenate([value, np.zeros((more, *value.shape[1:]), value.dtype)])
    return replace(record, tokens=(*names, *["[END]"] * more), **arrays)


def student_attention(
    student: Any,
    batch: Mapping[str, Tensor],
    record: TargetRecord,
    layers: Sequence[int] | None = None,
    name: str = "student",
    tokenizer: Any = None,
) -> Attention:
    """Computes a student's attention maps in one statement.

    Args:
        student: any student with self-attention over text and picture; evaluation mode.
        batch: one example as the student's inputs, from ``training.data.collate`` of one item.
        record: of the same example and student; its choice is the statement.
        layers: numbers of the layers, negative ones from the last; None for all.
        name: names the student in figures.
        tokenizer: the encoder's, to name special tokens in figures.

    Raises:
        AttentionError: the student has no attention that can be read here; a layer does not exist; the
            batch has other tokens than the record.
    """
    modules = attention_modules(student)
    chosen = chosen_layers(layers, len(modules), type(student).__name__)
    inputs = _inputs(student, batch)
    student.eval()
    with _explicit([modules[layer] for layer in chosen]) as maps, torch.inference_mode():
        student(**inputs)
    _check_tokens(maps, record)
    of_statement = torch.stack([layer[record.choice] for layer in maps]).float().cpu().numpy()
    named = named_record(record, batch, tokenizer, of_statement.shape[-1])
    return Attention(of_statement, chosen, named, readout_position(student, batch, record.choice), name)


def gradient_relevance(student: Any, batch: Mapping[str, Tensor], record: TargetRecord) -> np.ndarray:
    """Measures how much each token contributes to a logit (Chefer et al. 2021, eq. 5 and 6).

    It is the logit of the record's choice or, if the task has a label set, of its label (else prediction).

    ``R = I; R += mean_heads((gradient * A)+) R`` over all layers. Returns the row (tokens,) of the token that
    the head reads, without that token's initial 1, scaled so that the largest entry is 1; all 0 if no
    attention contributes.

    Arguments and errors as in ``student_attention``.
    """
    modules = attention_modules(student)
    inputs = _inputs(student, batch)
    answer = record.prediction if record.label is None else record.label
    target = record.choice if batch["input_ids"].shape[1] > 1 else answer
    student.eval()
    with _explicit(modules) as maps, torch.enable_grad():
        logits = student(**inputs).logits
        if not logits.requires_grad:
            raise AttentionError("the student's parameters are frozen; call student.requires_grad_(True)")
        gradients = torch.autograd.grad(logits[0, target], maps, allow_unused=True)
    _check_tokens(maps, record)
    query = readout_position(student, batch, record.choice)
    start = torch.zeros_like(maps[0][:1, 0, 0])
    start[0, query] = 1
    mine = [attention[record.choice][None] for attention in maps]
    theirs = [None if gradient is None else gradient[record.choice][None] for gradient in gradients]
    row = relevancy(start, mine, theirs)[0].detach().float()
    row[query] -= 1  # the identity that R starts from: it is the same for every statement
    values = row.clamp_min(0).cpu().numpy()
    return values / values.max() if values.max() > 0 else values
