"""Reads attention within one sequence of tokens: a teacher's in a text or a picture.

Kernels that keep no weights (sdpa, flash) do not return attention, so it is recomputed from the layers'
parameters and inputs, as softmax(q k^T / sqrt(head_dim) + mask). The model is left as it was. Layers are
counted from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tdlib.core.records import TargetRecord
from tdlib.data.pictures import open_picture
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import Tower, rolled_out, take_apart


class AttentionError(ValueError):
    """Attention cannot be read; the message names the model or layer and the remedy."""


@dataclass(frozen=True)
class Attention:
    """Attention within one sequence of tokens.

    ``maps`` (layers, heads, tokens, tokens): the weight of each token (column) for a token (row); rows sum
    to 1. ``layers`` are their numbers. ``record`` has the tokens' places; if it was made from another model's
    tokens, only these, its text and its picture are meaningful. ``readout`` is the token from which the
    model's answer is read. ``model`` names the model in figures.
    """

    maps: np.ndarray
    layers: tuple[int, ...]
    record: TargetRecord
    readout: int
    model: str

    def row(self, head: int | None = None) -> np.ndarray:
        """Averages what the readout attends to over layers, and over heads if None: (tokens,), sums to 1.

        Raises an AttentionError if there is no such head.
        """
        if head is not None and not 0 <= head < self.maps.shape[1]:
            raise AttentionError(f"{self.model} has heads 0 to {self.maps.shape[1] - 1}, but head={head}")
        maps = self.maps if head is None else self.maps[:, head : head + 1]
        return maps[:, :, self.readout].mean((0, 1))


def rollout(maps: np.ndarray, query: int) -> np.ndarray:
    """Returns the query's row of ``prod_l (A_l + I) / 2``, heads averaged (Abnar & Zuidema 2020), (tokens,).

    ``maps`` (layers, heads, tokens, tokens), first layer first. Sums to 1.
    """
    layers = torch.as_tensor(maps, dtype=torch.float64)
    row = torch.eye(maps.shape[-1], dtype=torch.float64)[query][None]
    return rolled_out(row, (layer[None] for layer in layers.flip(0)))[0].numpy()


def chosen_layers(layers: Sequence[int] | None, count: int, model: str) -> tuple[int, ...]:
    """Resolves the numbers of layers: from 0, negative ones from the last; None for all."""
    requested = range(count) if layers is None else layers
    outside = [layer for layer in requested if not -count <= layer < count]
    if outside or not requested:
        raise AttentionError(
            f"{model} has layers 0 to {count - 1} (or -{count} to -1), but layers={list(requested)}"
        )
    return tuple(sorted({layer % count for layer in requested}))


def teacher_attention(
    teacher: Teacher, record: TargetRecord, tower: str, layers: Sequence[int] | None = None
) -> Attention:
    """Computes a teacher's attention in one text or one picture.

    Args:
        teacher: the teacher.
        record: gives the text or the picture.
        tower: "text" or "image".
        layers: numbers of the blocks, negative ones from the last; None for all.

    Returns:
        Maps over the tower's positions; special ones (class, start, end, padding that the tower reads) have
        no place. A pooling that attends (SigLIP, CoCa, ResNet) is one more layer, after the blocks: all its
        rows are that of the pooled query. ``readout`` is the position that is pooled, the first one of the
        largest weight if several are.

    Raises:
        AttentionError: the tower's attention cannot be read here, or a layer does not exist.
        DataError: the picture cannot be read.
    """
    reader: Tower = getattr(teacher, tower)
    count = len(reader.blocks) + reader.pooling.attends
    if not count or any(take_apart(block) is None for block in reader.blocks):
        raise AttentionError(
            f"teacher {reader.name}: the {tower} tower has no attention that is read here; its tokens' "
            "relevance can be looked at instead (tdlib.method.relevance: projected, value)"
        )
    inputs, placed = _input(teacher, record, tower)
    chosen = chosen_layers(layers, count, f"teacher {reader.name} ({tower})")
    with torch.inference_mode():
        # A pooling that attends has one query for the whole sequence; as a layer, every row of it is that.
        seen = reader.see(inputs, len(reader.blocks))
        pooled = reader.pooling.weights(seen.hidden, seen.inputs)  # (1, heads, positions)
        every = pooled[0].unsqueeze(1).expand(-1, pooled.shape[-1], -1)
        maps = [
            every if layer == len(reader.blocks) else reader.attention_map(seen, layer)[0] for layer in chosen
        ]
    heads = {len(part) for part in maps}
    if len(heads) > 1:
        raise AttentionError(
            f"teacher {reader.name}: pooling and blocks have {heads} heads; ask for one kind by layers="
        )
    stacked = torch.stack(maps).float().cpu().numpy()
    readout, more = int(pooled[0].mean(0).argmax()), stacked.shape[-1] - len(placed.tokens)
    names = [*placed.tokens, *["[pad]"] * more]
    if readout >= len(placed.tokens):
        names[readout] = "[class]"
    places = [np.pad(part, ((0, more), (0, 0))) for part in (placed.spans, placed.boxes)]
    return Attention(stacked, chosen, _placed(record, names, *places), readout, f"teacher, {tower} tower")


def _input(teacher: Teacher, record: TargetRecord, tower: str) -> tuple[Tensor, TargetRecord]:
    """Prepares ids or pixels, and a record over the tower's positions without padding."""
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
    """Replaces the record's tokens by another model's, without scores, weights and selection."""
    zeros = np.zeros(len(names))
    none = zeros.astype(bool)
    return replace(
        record, tokens=tuple(names), spans=spans, boxes=boxes, distilled=none, selected=none,
        relevance=zeros, prior=zeros, score=zeros, weight=zeros,
    )  # fmt: skip


def teacher_relevance(teacher: Teacher, record: TargetRecord) -> tuple[np.ndarray, TargetRecord]:
    """Measures what brings the record's text and picture together in the teacher.

    See ``Teacher.pair_relevance``. Returns values (tokens,) in [0, 1], the largest of each modality being 1,
    and a record over the teacher's text tokens and patches.
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
