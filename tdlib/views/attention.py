"""What student and teacher attend to in one example, by layer and head, and what follows from it.

Owns reading attention out of a model and its summaries (rollout, gradient relevance), with their views.
Attention is computed anew in the layers asked for, as softmax(q k^T / sqrt(head_dim) + mask), from the
layers' own parameters and inputs: kernels that keep no weights (sdpa, flash) need no other loading of
the model, which is left as it was. Does not own the models. Layers are counted from 0, and every figure
says which were used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tdlib.core.records import TargetRecord
from tdlib.data.pictures import open_picture
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import Tower, attention_weights, take_apart
from tdlib.views.runs import _embedded, _html_table
from tdlib.views.view import View, _page, percent, title, token_name

if TYPE_CHECKING:
    from tdlib.views.figures.targets import Figure


class AttentionError(ValueError):
    """Attention cannot be read: says of which model or layer, and the remedy."""


@dataclass(frozen=True)
class Attention:
    """Attention within one sequence of tokens.

    ``maps`` (layers, heads, tokens, tokens): how much a token (row) takes of each (column); rows sum to
    1. ``layers`` are the layers they are of. ``record`` has the tokens' places; where it was made from
    another model's tokens, only those, its text and its picture mean anything. ``readout`` is the token
    that the model's answer is read from. ``model`` names it in figures.
    """

    maps: np.ndarray
    layers: tuple[int, ...]
    record: TargetRecord
    readout: int
    model: str

    def row(self, query: int | None = None, head: int | None = None) -> np.ndarray:
        """What one token takes of each, (tokens,), averaged over the layers (and heads); sums to 1."""
        maps = self.maps if head is None else self.maps[:, head : head + 1]
        return maps[:, :, self.readout if query is None else query].mean((0, 1))


def name_layers(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0 to 5" or "layers 1, 3"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


# Students.


def attention_modules(student: nn.Module) -> list[Any]:
    """The self-attention of each layer of a student, first to last.

    Raises:
        AttentionError: there is none that is known here, as in CLIP with a fusion head.
    """
    parts = ("query", "key", "value", "num_attention_heads")
    modules = [module for module in student.modules() if all(hasattr(module, part) for part in parts)]
    if not modules:
        raise AttentionError(
            f"{type(student).__name__} has no self-attention with query, key and value, as BERT's and ViLT's "
            "have; of CLIP look at teacher_attention"
        )
    return modules


def _chosen(layers: Sequence[int] | None, count: int, model: str) -> tuple[int, ...]:
    wanted = range(count) if layers is None else layers
    outside = [layer for layer in wanted if not -count <= layer < count]
    if outside or not wanted:
        raise AttentionError(
            f"{model} has layers 0 to {count - 1} (or -{count} to -1); layers={list(wanted)} were asked for"
        )
    return tuple(sorted({layer % count for layer in wanted}))


@contextmanager
def _explicit(modules: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Lets these modules compute attention openly and collects their maps (batch, heads, tokens, tokens)."""
    maps: list[Tensor] = []

    def forward_of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any):
            heads = module.num_attention_heads
            q, k, v = (
                part(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in (module.query, module.key, module.value)
            )
            weights = attention_weights(q, k, _additive(attention_mask, q.dtype))
            maps.append(weights)
            return (weights @ v).transpose(1, 2).flatten(2), weights

        return forward

    try:
        for module in modules:
            module.forward = forward_of(module)
        yield maps
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Any attention's mask as one that is added: boolean (sdpa), (batch, keys) (flash), or added already."""
    if mask is None or (mask.dim() == 4 and mask.dtype != torch.bool):
        return mask
    kept = mask.bool() if mask.dim() == 4 else mask.bool()[:, None, None]
    return torch.zeros_like(kept, dtype=dtype).masked_fill(~kept, torch.finfo(dtype).min)


def readout_position(student: Any, batch: Mapping[str, Tensor], choice: int = 0) -> int:
    """The token that a student's head reads: [CLS], or the [MASK] before the last text token.

    The latter in classifiers without a pooler (VL-BERT, VisualBERT).
    """
    if getattr(student, "with_pooler", True):
        return 0
    return int(batch["attention_mask"][0, choice].sum()) - 2


def _inputs(student: Any, batch: Mapping[str, Tensor], record: TargetRecord) -> dict[str, Tensor]:
    if len(batch["input_ids"]) != 1:
        raise AttentionError(f"a batch of {len(batch['input_ids'])} examples; expected one, the record's")
    device = next(student.parameters()).device
    return {name: batch[name].to(device) for name in student.inputs}


def _check_tokens(maps: Sequence[Tensor], record: TargetRecord) -> None:
    """[END] (VL-BERT) stands behind the record's tokens."""
    if not 0 <= maps[0].shape[-1] - len(record.tokens) <= 1:
        raise AttentionError(
            f"{record.example_id}: the student has {maps[0].shape[-1]} tokens, the record "
            f"{len(record.tokens)}; make the batch of the record's example with the record's encoder"
        )


def named_record(
    record: TargetRecord, batch: Mapping[str, Tensor], tokenizer: Any, tokens: int
) -> TargetRecord:
    """The record with names for tokens that have no place, such as [CLS].

    Args:
        record: of the example in the batch.
        batch: as in ``student_attention``, likewise ``tokenizer``.
        tokenizer: the student's; None names all of them "[special]".
        tokens: that the student has; [END] is added where it has one more than the record.
    """
    ids = batch["input_ids"][0, record.choice].tolist()
    words = tokenizer.convert_ids_to_tokens(list(ids)) if tokenizer is not None else ["[special]"] * len(ids)
    names = [
        name if text else "" if visual else words[place] if place < len(ids) else "[IMG]"
        for place, (name, text, visual) in enumerate(
            zip(record.tokens, record.is_text, record.is_visual, strict=True)
        )
    ]
    return _longer(replace(record, tokens=tuple(names)), tokens)


def _longer(record: TargetRecord, tokens: int) -> TargetRecord:
    """The record with [END] behind its tokens, if there are more of them."""
    more = tokens - len(record.tokens)
    arrays: dict[str, Any] = {}
    for name in ("spans", "boxes", "distilled", "relevance", "prior", "score", "selected", "weight"):
        value = getattr(record, name)
        arrays[name] = np.concatenate([value, np.zeros((more, *value.shape[1:]), value.dtype)])
    return replace(record, tokens=(*record.tokens, *["[END]"] * more), **arrays)


def student_attention(
    student: Any,
    batch: Mapping[str, Tensor],
    record: TargetRecord,
    layers: Sequence[int] | None = None,
    name: str = "student",
    tokenizer: Any = None,
) -> Attention:
    """A student's attention in one statement.

    Args:
        student: any student with self-attention over text and picture; evaluation mode.
        batch: one example as the student's inputs, from ``training.collate`` of one item.
        record: of the same example and student; its choice is the statement.
        layers: which, negative ones from the last; None: all.
        name: of the student, in figures.
        tokenizer: the encoder's, to name special tokens in figures.

    Raises:
        AttentionError: no attention is known in this student; a layer does not exist; the batch holds
            other tokens than the record.
    """
    modules = attention_modules(student)
    chosen = _chosen(layers, len(modules), type(student).__name__)
    inputs = _inputs(student, batch, record)
    student.eval()
    with _explicit([modules[layer] for layer in chosen]) as maps, torch.inference_mode():
        student(**inputs)
    _check_tokens(maps, record)
    found = torch.stack([part[record.choice] for part in maps]).float().cpu().numpy()
    named = named_record(record, batch, tokenizer, found.shape[-1])
    return Attention(found, chosen, named, readout_position(student, batch, record.choice), name)


def rollout(maps: np.ndarray, query: int) -> np.ndarray:
    """The query's row of ``prod_l (A_l + I) / 2``, heads averaged (Abnar & Zuidema 2020), (tokens,).

    ``maps`` (layers, heads, tokens, tokens), first layer first. Sums to 1.
    """
    row = np.eye(maps.shape[-1])[query]
    for attention in maps.mean(1)[::-1]:
        row = (row @ attention + row) / 2
    return row


def gradient_relevance(
    student: Any, batch: Mapping[str, Tensor], record: TargetRecord, target: int | None = None
) -> np.ndarray:
    """How much each token brings about a logit (Chefer et al. 2021, eq. 5 and 6), (tokens,), largest 1.

    ``R = I; R += mean_heads((gradient * A)+) R`` over all layers; the row of the token that the head
    reads, without the token itself. All 0 where no attention speaks for the logit.

    Args:
        student: as in ``student_attention``; likewise ``batch`` and ``record``.
        target: the logit; None: of the record's choice, or of its label (else prediction).

    Raises:
        AttentionError: see ``student_attention``.
    """
    modules = attention_modules(student)
    inputs = _inputs(student, batch, record)
    if target is None:
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
    row = torch.zeros_like(maps[0][0, 0, 0])
    row[query] = 1
    for attention, gradient in reversed(list(zip(maps, gradients, strict=True))):
        if gradient is not None:
            own = (gradient[record.choice] * attention[record.choice]).clamp_min(0).mean(0)
            row = row + row @ own
    row = row.detach().float()
    row[query] -= 1
    values = row.clamp_min(0).cpu().numpy()
    return values / values.max() if values.max() > 0 else values


# Teacher.


def teacher_attention(
    teacher: Teacher, record: TargetRecord, tower: str, layers: Sequence[int] | None = None
) -> Attention:
    """A teacher's attention in one text or one picture.

    Args:
        teacher: the teacher.
        record: its text, or its picture, is looked at.
        tower: "text" or "image".
        layers: which blocks, negative ones from the last; None: all.

    Returns:
        Maps over the tower's own positions; special ones (class, start, end, padding that it reads) have
        no place. A pooling that attends (SigLIP, CoCa, ResNet) is one more layer, behind the blocks: its
        rows are all the pooled query's. ``readout`` is the position that is pooled (the first of most
        weight, where several are).

    Raises:
        AttentionError: the tower's attention is not read here, or a layer does not exist.
    """
    if tower not in ("text", "image"):
        raise AttentionError(f"tower={tower!r}: expected 'text' or 'image'")
    own: Tower = getattr(teacher, tower)
    given, placed = _teacher_input(teacher, record, tower)
    count = len(own.blocks) + own.pooling.attends
    if not count or any(take_apart(block) is None for block in own.blocks):
        raise AttentionError(
            f"teacher {own.name}: the {tower} tower has no attention that is read here; its tokens' "
            "relevance can be looked at instead (tdlib.method.relevance: projected, value)"
        )
    chosen = _chosen(layers, count, f"teacher {own.name} ({tower})")
    with torch.inference_mode():
        seen = own.see(given, len(own.blocks))
        pooled = own.pooling.weights(seen.hidden, seen.given)  # (1, heads, positions)
        maps = []
        for layer in chosen:
            if layer == len(own.blocks):
                maps.append(pooled[0].unsqueeze(1).expand(-1, pooled.shape[-1], -1))
                continue
            block, (hidden, mask) = own.blocks[layer], seen.entered[layer]
            parts = take_apart(block)
            assert parts is not None
            q, k, _ = parts.qkv(parts.norm(hidden))
            maps.append(attention_weights(q, k, mask)[0])
    heads = {len(part) for part in maps}
    if len(heads) > 1:
        raise AttentionError(
            f"teacher {own.name}: its pooling and its blocks have {heads} heads; ask for one kind by layers="
        )
    found = torch.stack(maps).float().cpu().numpy()
    readout, more = int(pooled[0].mean(0).argmax()), found.shape[-1] - len(placed.tokens)
    names = [*placed.tokens, *["[pad]"] * more]
    if readout >= len(placed.tokens):
        names[readout] = "[class]"
    places = [np.pad(part, ((0, more), (0, 0))) for part in (placed.spans, placed.boxes)]
    return Attention(found, chosen, _placed(record, names, *places), readout, f"teacher, {tower} tower")


def _teacher_input(teacher: Teacher, record: TargetRecord, tower: str) -> tuple[Tensor, TargetRecord]:
    """Ids or pixels, and a record over the tower's positions, without padding."""
    if tower == "text":
        ids, spans = teacher.tokenize(record.text)
        names = [record.text[a:b] or f"[{i}]" for i, (a, b) in enumerate(spans)]
        names[0] = names[0] if spans[0][1] else "[start]"
        names[-1] = names[-1] if spans[-1][1] else "[end]"
        placed = _placed(record, names, np.array(spans), np.zeros((len(ids), 4)))
        return teacher.text_ids([ids]), placed
    picture = open_picture(record.image)
    boxes = teacher.encode_pictures([picture])[0].positions.numpy()
    prefix = teacher.image.prefix
    names = ["[CLS]" if i == 0 else f"[{i}]" for i in range(prefix)] + [""] * len(boxes)
    grid = np.concatenate([np.zeros((prefix, 4)), boxes])
    placed = _placed(record, names, np.zeros((len(grid), 2), dtype=int), grid)
    return teacher.preprocess(picture)[None].to(teacher.device), placed


def _placed(record: TargetRecord, names: Sequence[str], spans: np.ndarray, boxes: np.ndarray) -> TargetRecord:
    """The record's text and picture with another model's tokens, of which nothing else is known."""
    zeros = np.zeros(len(names))
    none = zeros.astype(bool)
    return replace(
        record, tokens=tuple(names), spans=spans, boxes=boxes, distilled=none, selected=none,
        relevance=zeros, prior=zeros, score=zeros, weight=zeros,
    )  # fmt: skip


def teacher_relevance(teacher: Teacher, record: TargetRecord) -> tuple[np.ndarray, TargetRecord]:
    """What brings the record's text and picture together in the teacher (Chefer et al. 2021).

    Returns values (tokens,) in [0, 1], the largest of each modality 1, and a record over the teacher's
    text tokens and patches; see ``Teacher.pair_relevance``.

    Raises:
        TeacherError: a tower's attention cannot be read.
    """
    picture = open_picture(record.image)
    words, patches = teacher.pair_relevance([record.text], picture)[0]
    spans = teacher.encode_texts([record.text])[0].positions.numpy()
    boxes = teacher.encode_pictures([picture])[0].positions.numpy()
    names = [record.text[a:b] for a, b in spans] + [""] * len(boxes)
    placed = _placed(
        record, names, np.concatenate([spans, np.zeros((len(boxes), 2), dtype=int)]),
        np.concatenate([np.zeros((len(spans), 4)), boxes]),
    )  # fmt: skip
    return torch.cat([words, patches]).numpy(), placed


# Views.


def attention_view(attention: Attention, query: int | None = None, head: int | None = None) -> View:
    """What one token attends to, on the picture and in the statement, in % of all tokens.

    ``query`` None is the token that the answer is read from; ``head`` None averages the heads. The
    figure names layers, heads and query. Table: ``position``, ``token``, ``value``.
    """
    query = attention.readout if query is None else query
    heads = f"head {head}" if head is not None else f"mean of {attention.maps.shape[1]} heads"
    method = f"{attention.model}: attention of {name_layers(attention.layers)}, {heads}"
    return values_view(
        attention.record, attention.row(query, head), method, token_name(attention.record, query)
    )


def rollout_view(attention: Attention, query: int | None = None) -> View:
    """Attention rolled out through all layers (see ``rollout``), drawn as ``attention_view`` does.

    Raises:
        AttentionError: the attention is not that of consecutive layers from the first on.
    """
    if attention.layers != tuple(range(len(attention.layers))):
        raise AttentionError(
            f"rollout needs every layer from 0 on; these are {name_layers(attention.layers)}: read all layers"
        )
    query = attention.readout if query is None else query
    method = f"{attention.model}: attention rollout of {name_layers(attention.layers)}, heads averaged"
    return values_view(
        attention.record, rollout(attention.maps, query), method, token_name(attention.record, query)
    )


def relevance_view(record: TargetRecord, values: np.ndarray, method: str) -> View:
    """Gradient relevance (of ``gradient_relevance`` or ``teacher_relevance``) as shares of its sum.

    ``method`` names model, layers and goal, such as "student: gradient relevance, layers 0 to 3, choice 2".
    """
    values = np.asarray(values, dtype=float)
    if len(values) > len(record.tokens):
        record = _longer(record, len(values))
    total = values.sum()
    return values_view(record, values / total if total > 0 else values, method, "")


def values_view(record: TargetRecord, values: np.ndarray, method: str, query: str) -> View:
    """A number of at least 0 per token, on the picture and in the statement.

    Raises:
        ValueError: there is not one finite number per token.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(record.tokens),) or not np.isfinite(values).all():
        raise ValueError(
            f"values {values.shape} for {len(record.tokens)} tokens; expected one finite number each"
        )
    names = [token_name(record, i) for i in range(len(values))]
    data = pd.DataFrame({"position": range(len(values)), "token": names, "value": values})
    heading = title(record)

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_attention(record, values, query, method, heading)

    top = data.sort_values("value", ascending=False, kind="stable")[:8]
    rows = [[row.token, percent(row.value)] for row in top.itertuples()]
    line = f"{method}; query {query}" if query else method
    text = "\n".join([heading, line, *(f"  {number:>5} %  {token}" for token, number in rows)])
    html = _page(
        f"<div><b>{escape(heading)}</b></div><div>{escape(line)}</div>"
        f"{_embedded(figure, f'{heading}. {line}', 720)}{_html_table(['heaviest tokens', '%'], rows)}"
    )
    return View(html, (record,), figure, (), data, text)


def heads_view(attention: Attention) -> View:
    """Every head's map as a tile, a row of tiles per layer, text and picture parted by lines.

    The number over a tile is "layer.head · share": how much of their attention text tokens give to the
    picture (in %), where there are both. Table: ``layer``, ``head``, ``text_to_picture``,
    ``picture_to_text``, ``readout_to_picture`` (shares of 1), and ``entropy`` of the rows in nats.
    """
    record, maps = attention.record, attention.maps
    visual = record.is_visual & ~record.is_text
    border = int(np.argmax(visual)) if visual.any() and not visual.all() else 0
    has_text = bool(record.is_text.any())
    rows = []
    for place, layer in enumerate(attention.layers):
        for head in range(maps.shape[1]):
            own = maps[place, head]
            entropy = -(own * np.log(np.where(own > 0, own, 1))).sum(1).mean()
            cross = record.is_text, visual
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "text_to_picture": _between(own, *cross) if has_text else np.nan,
                    "picture_to_text": _between(own, *cross[::-1]) if visual.any() else np.nan,
                    "readout_to_picture": float(own[attention.readout, visual].sum()),
                    "entropy": float(entropy),
                }
            )
    data = pd.DataFrame(rows)
    heading = f"{title(record)}; {attention.model}, {name_layers(attention.layers)}; rows attend to columns"
    if has_text and border:
        heading += "; over each: layer.head · what text gives to the picture (%)"

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        both = has_text and border > 0
        shares = data["text_to_picture"].to_numpy().reshape(maps.shape[:2])
        return run_plots.plot_heads(maps, attention.layers, border if both else 0, shares, heading)

    cells = []
    for row in data.itertuples(index=False):
        numbers = ["" if np.isnan(value) else percent(value) for value in row[2:5]]
        cells.append([f"{row.layer}.{row.head}", *numbers, f"{row.entropy:.2f}"])
    header = ["layer.head", "text to picture (%)", "picture to text (%)", "readout to picture (%)", "entropy"]
    text = "\n".join([heading, ", ".join(header), *("  " + "  ".join(row) for row in cells)])
    html = _page(
        f"<div><b>{escape(heading)}</b></div>{_embedded(figure, heading, 760)}{_html_table(header, cells)}"
    )
    return View(html, (record,), figure, (), data, text)


def _between(own: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> float:
    return float(own[np.ix_(queries, keys)].sum(1).mean()) if queries.any() else float("nan")
