"""Reads tokens from a tower of a CLIP, in one way for all model families.

A tower's blocks turn positions into hidden states; its pooling mixes what it reads at the positions
and a head carries the mixture into the joint space. The vector of a token is what the tower would
pool if that token stood alone (our reading): for a class or end token and for averages this is the
final norm and projection; for attention pooling (ResNet, SigLIP, CoCa) the pooling's value path
(MaskCLIP, Zhou et al. 2022, arXiv 2112.01071) with whatever follows it. Which blocks and poolings the
models of a family have is in ``families``; the sums over attention maps here serve students too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn
from torch.nn import functional as F

EXTRAS = ("vv", "attention", "rollout")  # signals that are computed only on request
SURGERY_BLOCKS = 6  # depth of the value-value path, as in CLIP Surgery's code


class TeacherError(ValueError):
    """A teacher cannot be loaded or used; the message names the model, the reason and the remedy."""


# Blocks


@dataclass(frozen=True)
class Parts:
    """A pre-norm transformer block taken apart: ``x += out(A v); x += feed(x)``, q, k, v of ``norm(x)``."""

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # each (batch, heads, positions, head_dim)
    out: Callable[[Tensor, Tensor], Tensor]  # of A v by heads, and of norm(x), which a gate reads
    feed: Callable[[Tensor], Tensor]


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(..., positions, width) as (..., heads, positions, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def joined_heads(x: Tensor) -> Tensor:
    """(..., heads, positions, head_dim) as (..., positions, width)."""
    return x.transpose(-3, -2).flatten(-2)


def take_apart(block: nn.Module) -> Parts | None:
    """Takes a block of open_clip's or of timm's plain ViT apart; None for any other."""
    attention = getattr(block, "attn", None)
    if isinstance(block, ResidualAttentionBlock) and isinstance(attention, nn.MultiheadAttention):
        return Parts(block.ln_1, lambda x: _open_clip_qkv(attention, x),
                     lambda mixed, _: block.ls_1(attention.out_proj(joined_heads(mixed))),
                     lambda x: block.ls_2(block.mlp(block.ln_2(x))))  # fmt: skip
    if isinstance(block, CustomResidualAttentionBlock) and block.attn.logit_scale is None:
        return Parts(block.ln_1, lambda x: _open_clip_qkv(block.attn, x),
                     lambda mixed, _: block.ls_1(block.ln_attn(_custom_out(block.attn, mixed))),
                     lambda x: block.ls_2(block.mlp(block.ln_2(x))))  # fmt: skip
    if type(block) is TimmBlock and type(attention) is TimmAttention:
        return Parts(block.norm1, lambda x: _timm_qkv(attention, x),
                     lambda mixed, x: block.ls1(_timm_out(attention, mixed, x)),
                     lambda x: block.ls2(block.mlp(block.norm2(x))))  # fmt: skip
    return None


def _open_clip_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (by_heads(part, attention.num_heads) for part in projected.chunk(3, dim=-1))
    if isinstance(attention, nn.MultiheadAttention):
        return q, k, v
    return attention.ln_q(q), attention.ln_k(k), v


def _custom_out(attention: Any, mixed: Tensor) -> Tensor:
    if attention.head_scale is not None:
        mixed = mixed * attention.head_scale
    return attention.out_proj(attention.ln_inner(joined_heads(mixed)))


def _timm_qkv(attention: TimmAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (by_heads(part, attention.num_heads) for part in attention.qkv(x).chunk(3, dim=-1))
    return attention.q_norm(q), attention.k_norm(k), v


def _timm_out(attention: TimmAttention, mixed: Tensor, x: Tensor) -> Tensor:
    mixed = attention.norm(joined_heads(mixed))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj(mixed)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim) + mask)``, (batch, heads, queries, keys).

    ``mask`` is additive, (queries, keys) or (batch * heads, queries, keys).
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + (mask.view_as(scores) if mask.dim() == 3 else mask)
    return scores.softmax(dim=-1)


def rolled_out(row: Tensor, maps: Iterable[Tensor]) -> Tensor:
    """Computes a row of ``prod_l (A_l + I) / 2``, heads averaged (Abnar & Zuidema 2020), (batch, positions).

    ``row`` is that row before the last layer's product: 1 at the position that is read, or its pooling's
    weights. ``maps`` come from the last layer to the first, (batch, heads, positions, positions).
    """
    for attention in maps:
        row = ((row.unsqueeze(1) @ attention.mean(dim=1)).squeeze(1) + row) / 2
    return row


def relevancy(row: Tensor, maps: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """A row of R in ``R = I; R += mean_heads((gradient * A)+) R`` (Chefer et al. 2021, eq. 5 and 6).

    ``row`` (batch, positions) is that of the position that is read; ``maps`` come from the first layer to
    the last, (batch, heads, positions, positions), ``gradients`` with them; None where a map has none.
    """
    for attention, gradient in reversed(list(zip(maps, gradients, strict=True))):
        if gradient is not None:
            product = (gradient * attention).clamp(min=0).mean(dim=1)
            row = row + (row.unsqueeze(1) @ product).squeeze(1)
    return row


def each_alone(block: nn.Module, hidden: Tensor) -> Tensor:
    """Runs the value path of any block: every token is a separate sequence, (batch, positions, width).

    A softmax over one key is 1, so attention passes on that token's value, and patch tokens stay local
    (MaskCLIP, Zhou et al. 2022).
    """
    if isinstance(block, RelPosBlock | ResPostRelPosBlock):  # position biases need all of a picture's tokens
        with _passing_values(block.attn):
            return block(hidden)
    hugging_face = type(block).__module__.startswith("transformers.")
    options = {"attention_mask": None} if hugging_face else {}
    output = block(hidden.reshape(-1, 1, hidden.shape[-1]), **options)
    return (output[0] if isinstance(output, tuple) else output).view_as(hidden)


@contextmanager
def _passing_values(attention: RelPosAttention) -> Iterator[None]:
    """Makes an attention pass on every token's value, as if it attended to itself alone."""

    def forward(x: Tensor, **_options: Any) -> Tensor:
        return attention.proj(attention.qkv(x).chunk(3, dim=-1)[2])

    try:
        attention.forward = forward  # type: ignore[assignment]
        yield
    finally:
        del attention.forward


# Pooling


@dataclass(frozen=True)
class Pooling:
    """The pooling of a tower: ``head(sum_j weights[j] values[j])``, summed per attention head.

    ``values`` reads (batch, positions, width) as (batch, positions, inner); ``weights`` takes the same
    and the tower's input and gives (batch, heads, positions) that sum to 1; ``head`` maps (..., inner)
    to (..., teacher_dim). ``attends`` is True if the weights are an attention, not a fixed choice.
    """

    values: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    attends: bool = False

    def project(self, hidden: Tensor) -> Tensor:
        """Maps each position to the joint space, as if it were pooled alone."""
        return self.head(self.values(hidden))

    def pool(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Computes the pooled embedding (batch, teacher_dim) with these weights."""
        values = by_heads(self.values(hidden), weights.shape[1])
        return self.head((weights.unsqueeze(-2) @ values).flatten(1))


# Towers


@dataclass(frozen=True)
class Seen:
    """Hidden states of one pass through a tower: at the entry of its last blocks, and before pooling."""

    inputs: Tensor  # pixels or ids
    entered: list[tuple[Tensor, Tensor | None]]  # hidden states and mask at the entry of each watched block
    hidden: Tensor  # (batch, positions, width)
    pooled: Tensor  # (batch, teacher_dim), as the model computes it

    def repeated(self, times: int) -> "Seen":
        """Repeats a batch of one, which has no masks, ``times`` times."""

        def expand(x: Tensor) -> Tensor:
            return x.expand(times, *x.shape[1:])

        entered = [(expand(hidden), mask) for hidden, mask in self.entered]
        return Seen(expand(self.inputs), entered, expand(self.hidden), expand(self.pooled))


@dataclass(frozen=True)
class Tower:
    """A tower taken apart.

    ``run`` is the model's forward pass: it returns the pooled embedding, and the hidden states before pooling
    if the tower has no blocks to watch. ``prefix`` leading positions are no tokens (class, registers, a
    ResNet's mean). ``patch`` is height and width of an image tower's patches in pixels, None if it has none.
    """

    name: str
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    blocks: Sequence[nn.Module]
    pooling: Pooling
    prefix: int = 0
    patch: tuple[int, int] | None = None
    value_value: Callable[[Tensor], Tensor] | None = None  # of the pooling, where there are no blocks
    cut: bool = False  # True for a text tower that gives the same features without padding

    @property
    def surgery_blocks(self) -> int:
        """Depth of the value-value path: six blocks as published, half of them in towers of under 12."""
        return min(SURGERY_BLOCKS, (len(self.blocks) + 1) // 2)

    def grid(self, height: int, width: int, tokens: int) -> tuple[int, int]:
        """Returns rows and columns of an image tower's tokens for an input of this many pixels."""
        if self.patch is not None:
            rows, columns = height // self.patch[0], width // self.patch[1]
        else:
            rows = max(1, round((tokens * height / width) ** 0.5))
            columns = tokens // rows
        if rows * columns != tokens:
            raise TeacherError(
                f"teacher {self.name}: {tokens} image tokens are no grid of {rows} x {columns} for an "
                f"input of {height} x {width} pixels"
            )
        return rows, columns

    def check(self, extra: str) -> None:
        """Raises TeacherError if this tower cannot give a signal of ``EXTRAS`` or "gradient"."""
        apart = [take_apart(block) is not None for block in self.blocks]
        available = {
            "vv": all(apart) if apart else self.value_value is not None,
            "attention": self.pooling.attends or (bool(apart) and apart[-1]),
            "rollout": all(apart) and (bool(apart) or self.pooling.attends),
        }
        available["gradient"] = available["rollout"]
        if extra not in available:
            raise TeacherError(f"teacher {self.name}: no signal {extra!r}; there are {', '.join(available)}")
        if not available[extra]:
            possible = ["projected", "value", *(name for name in available if available[name])]
            raise TeacherError(
                f"teacher {self.name}: relevance {extra!r} cannot be computed, as its attention is not read "
                f"here or there is none; possible are {', '.join(possible)}"
            )

    def see(self, inputs: Tensor, blocks: int = 1) -> Seen:
        """Runs the model and keeps what entered its last ``blocks`` blocks."""
        entered: list[tuple[Tensor, Tensor | None]] = []
        left: list[Tensor] = []  # by the last block

        def entering(_block: nn.Module, args: tuple, kwargs: dict) -> None:
            entered.append((args[0] if args else kwargs["hidden_states"], kwargs.get("attn_mask")))

        def leaving(_block: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            left.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for block in self.blocks[len(self.blocks) - blocks :]:
                hooks.enter_context(block.register_forward_pre_hook(entering, with_kwargs=True))
            if self.blocks:
                hooks.enter_context(self.blocks[-1].register_forward_hook(leaving))
            pooled, hidden = self.run(inputs)
        return Seen(inputs, entered, left[0] if hidden is None else hidden, pooled)

    def encode(self, inputs: Tensor, extras: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes pooled embeddings and signals of tokens, not normalised.

        Returns (batch, teacher_dim), and under "projected", "value" and "vv" (batch, tokens, teacher_dim),
        under "attention" and "rollout" (batch, tokens).
        """
        for extra in extras:
            self.check(extra)
        depth = {"vv": self.surgery_blocks, "rollout": len(self.blocks)}
        seen = self.see(inputs, max([1, *(depth.get(extra, 1) for extra in extras)]))
        signals = {"projected": self.pooling.project(seen.hidden[:, self.prefix :])}
        # A ResNet has no attention block before its pooling, so its tokens are local already.
        signals["value"] = self._value(seen) if self.blocks else signals["projected"]
        for extra in extras:
            signals[extra] = getattr(self, f"_{extra}")(seen)[:, self.prefix :]
        return seen.pooled, signals

    def _value(self, seen: Seen) -> Tensor:
        alone = each_alone(self.blocks[-1], seen.entered[-1][0])
        return self.pooling.project(alone[:, self.prefix :])

    def _vv(self, seen: Seen) -> Tensor:
        """Value-value attention on a second path without MLPs (CLIP Surgery, Li et al. 2023, 2304.05653).

        ``path += out(softmax(v v^T / sqrt(d)) v)`` over the last blocks, with v of the original path.
        Text towers keep their mask (our reading; the paper treats pictures alone).
        """
        if not self.blocks:
            assert self.value_value is not None
            return self.value_value(seen.hidden)
        depth = self.surgery_blocks
        path = seen.entered[-depth][0]
        for block, (hidden, mask) in zip(self.blocks[-depth:], seen.entered[-depth:], strict=True):
            parts = self._parts(block)
            normed = parts.norm(hidden)
            v = parts.qkv(normed)[2]  # of the original path, so that both paths stay in step
            path = path + parts.out(attention_weights(v, v, mask) @ v, normed)
        return self.pooling.project(path)

    def _attention(self, seen: Seen) -> Tensor:
        """Computes the pooled position's attention in the last layer, heads averaged, (batch, positions).

        A pooling that attends is itself the last layer. A tower that averages its tokens averages their rows.
        """
        row = self.pooling.weights(seen.hidden, seen.inputs).mean(dim=1)
        if self.pooling.attends:
            return row
        return (row.unsqueeze(1) @ self.attention_map(seen, -1).mean(dim=1)).squeeze(1)

    def _rollout(self, seen: Seen) -> Tensor:
        """Computes the pooled position's row of the rollout through all blocks, (batch, positions)."""
        row = self.pooling.weights(seen.hidden, seen.inputs).mean(dim=1)
        layers = reversed(range(len(self.blocks)))
        return rolled_out(row, (self.attention_map(seen, layer) for layer in layers))

    def attention_map(self, seen: Seen, layer: int) -> Tensor:
        """Recomputes the attention of one block, (batch, heads, positions, positions)."""
        parts = self._parts(self.blocks[layer])
        hidden, mask = seen.entered[layer]
        q, k, _ = parts.qkv(parts.norm(hidden))
        return attention_weights(q, k, mask)

    def _parts(self, block: nn.Module) -> Parts:
        parts = take_apart(block)
        assert parts is not None, "check() lets no other block through"
        return parts

    def attend(self, seen: Seen) -> "Attended":
        """Recomputes the pooled embedding through attention maps for which a gradient can be taken."""
        maps = []
        hidden = seen.entered[0][0] if self.blocks else seen.hidden
        for block, (_, mask) in zip(self.blocks, seen.entered, strict=True):
            parts = self._parts(block)
            normed = parts.norm(hidden)
            q, k, v = parts.qkv(normed)
            maps.append(_differentiable(attention_weights(q, k, mask)))
            hidden = hidden + parts.out(maps[-1] @ v, normed)
            hidden = hidden + parts.feed(hidden)
        weights = _differentiable(self.pooling.weights(hidden, seen.inputs))
        return Attended(self.pooling.pool(hidden, weights), maps, weights)

    def relevancy(self, attended: "Attended", goal: Tensor) -> Tensor:
        """Measures each token's contribution to a scalar, (batch, tokens): the pooled row of ``relevancy``.

        A pooling that attends is the last layer, with the same product of gradient and weights.
        """
        # The graph is kept because both towers take gradients of the same cosine, one after the other.
        *gradients, last = torch.autograd.grad(goal, [*attended.maps, attended.weights], retain_graph=True)
        row = attended.weights
        # A fixed pooling (class token, mean) is where the reading starts; one that attends is a layer that
        # the scalar may use or not, so it counts by its gradient as the others do.
        if self.pooling.attends:
            row = (last * row).clamp(min=0)
        row = row.mean(dim=1)
        return relevancy(row, attended.maps, gradients)[:, self.prefix :].detach()


@dataclass(frozen=True)
class Attended:
    """A pooled embedding with the graph that leads to it."""

    pooled: Tensor  # (batch, teacher_dim)
    maps: list[Tensor]  # of the blocks, first to last, (batch, heads, positions, positions)
    weights: Tensor  # of the pooling, (batch, heads, positions)


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.requires_grad_()
