"""Takes the image and text towers of open_clip's model families apart, as ``towers.Tower``.

One function per family names the blocks and the way of pooling. ``check_tower`` compares this reading with
the model's output, so a family that pools in another way is refused instead of misread.
"""

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, VisionTransformer, text_global_pool
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from tdlib.teacher.towers import Pooling, TeacherError, Tower, attention_weights, by_heads, joined_heads

# Pooling


def _at(position: int) -> Callable[[Tensor, Tensor], Tensor]:
    """All weight on one position."""

    def weights(hidden: Tensor, _inputs: Tensor) -> Tensor:
        chosen = hidden.new_zeros(len(hidden), 1, hidden.shape[1])
        chosen[..., position] = 1
        return chosen

    return weights


def _uniform(prefix: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Equal weights on all positions behind the first ``prefix``."""

    def weights(hidden: Tensor, _inputs: Tensor) -> Tensor:
        even = hidden.new_zeros(len(hidden), 1, hidden.shape[1])
        even[..., prefix:] = 1 / (hidden.shape[1] - prefix)
        return even

    return weights


def _linear(projection: nn.Module | Tensor | None) -> Callable[[Tensor], Tensor]:
    if projection is None:
        return nn.Identity()
    return projection if isinstance(projection, nn.Module) else lambda x: x @ projection


def _pooled(output: Tensor | tuple) -> Tensor:
    """Selects the pooled embedding from the output of a tower that may also return its tokens."""
    return output[0] if isinstance(output, tuple) else output


# Image towers


@torch.inference_mode()
def check_tower(tower: Tower, inputs: Tensor) -> None:
    """Raises TeacherError where this reading of a tower does not give the model's own pooled embedding."""
    try:
        seen = tower.see(inputs)
        pooled = tower.pooling.pool(seen.hidden, tower.pooling.weights(seen.hidden, inputs)).float()
        tokens = tower.encode(inputs)[1]["value"]
        # Half precision alone differs a hundred times less than this.
        tolerance = 0.02 * float(seen.pooled.float().norm()) + 1e-6
        wrong = "" if (pooled - seen.pooled.float()).norm() <= tolerance else "it pools in another way"
        wrong = wrong or ("" if tokens.dim() == 3 else f"its tokens have shape {tuple(tokens.shape)}")
    except torch.OutOfMemoryError:  # a RuntimeError too, but not a matter of the family
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        kind = f"tower of {type(tower.blocks[-1]).__name__}s" if tower.blocks else "tower"
        raise TeacherError(
            f"teacher {tower.name}: its {kind} is not read here ({wrong[:200]}); choose a ViT, "
            "ResNet, ConvNeXt, SigLIP, CoCa, EVA or MobileCLIP of open_clip's"
        )


def image_tower(visual: nn.Module, name: str) -> Tower:
    """Takes the image tower of an open_clip model apart."""
    if isinstance(visual, VisionTransformer):
        return _vision_transformer(visual, name)
    if isinstance(visual, ModifiedResNet):
        return _resnet(visual, name)
    if isinstance(visual, TimmModel):
        if all(hasattr(visual.trunk, part) for part in ("blocks", "num_prefix_tokens", "fc_norm")):
            return _timm_transformer(visual, name)
        return _timm_map(visual, name)
    raise TeacherError(f"teacher {name}: image tower {type(visual).__name__} is of no family known here")


def _vision_transformer(visual: VisionTransformer, name: str) -> Tower:
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None or visual.pool_type != "tok":
            raise TeacherError(
                f"teacher {name}: attentional pooling {visual.attn_pool_type or visual.pool_type!r} does not "
                "end in one token; only attentional_pool=true with pool_type='tok' is supported"
            )
        pooling = _attentional_pooling(visual.attn_pool, lambda x: visual.ln_post(x) @ visual.proj)
    elif visual.pool_type == "none":
        raise TeacherError(
            f"teacher {name}: its image tower does not pool (pool_type='none'); set 'tok' or 'avg'"
        )
    else:
        before, after = (
            (nn.Identity(), visual.ln_post) if visual.final_ln_after_pool else (visual.ln_post, nn.Identity())
        )
        pooling = Pooling(
            before, _at(0) if visual.pool_type == "tok" else _uniform(1), lambda x: after(x) @ visual.proj
        )
    return Tower(
        name, lambda pixels: (_pooled(visual(pixels)), None), visual.transformer.resblocks, pooling, prefix=1,
        patch=visual.patch_size,
    )  # fmt: skip


def _attentional_pooling(pooler: AttentionalPooler, finish: Callable[[Tensor], Tensor]) -> Pooling:
    """Reads CoCa's pooling; its first query makes the pooled embedding, the others feed the text decoder."""
    attention = pooler.attn
    if attention.in_proj_weight is not None:
        matrices = attention.in_proj_weight.chunk(3)
    else:
        matrices = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    (q_matrix, k_matrix, v_matrix), (q_bias, k_bias, v_bias) = matrices, attention.in_proj_bias.chunk(3)

    def weights(hidden: Tensor, _inputs: Tensor) -> Tensor:
        q = F.linear(pooler.ln_q(pooler.query[:1]), q_matrix, q_bias)
        k = F.linear(pooler.ln_k(hidden), k_matrix, k_bias)
        return attention_weights(by_heads(q, attention.num_heads), by_heads(k, attention.num_heads)).squeeze(
            -2
        )

    return Pooling(
        lambda hidden: F.linear(pooler.ln_k(hidden), v_matrix, v_bias), weights,
        lambda x: finish(attention.out_proj(x)), attends=True,
    )  # fmt: skip


def _resnet(visual: ModifiedResNet, name: str) -> Tower:
    """Positions are the mean of the last map and its cells, with the pooling's position embeddings.

    Tokens are the cells through value and output projection (MaskCLIP; DenseCLIP, Rao et al. 2022);
    there is no block before the pooling, so the value path is the same.
    """
    attention = visual.attnpool
    heads = attention.num_heads

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        positions = cells.flatten(2).transpose(1, 2)
        positions = torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1)
        return attention(cells), positions + attention.positional_embedding

    def weights(hidden: Tensor, _inputs: Tensor) -> Tensor:
        q, k = attention.q_proj(hidden[:, :1]), attention.k_proj(hidden)
        return attention_weights(by_heads(q, heads), by_heads(k, heads)).squeeze(-2)

    def value_value(hidden: Tensor) -> Tensor:
        """CLIP Surgery for ResNets: normalised values, scores eight times as large."""
        v = by_heads(attention.v_proj(hidden), heads)
        unit = F.normalize(v, dim=-1)
        return attention.c_proj(joined_heads(attention_weights(8 * unit, unit) @ v))

    return Tower(
        name, run, [], Pooling(attention.v_proj, weights, attention.c_proj, attends=True), prefix=1,
        value_value=value_value,
    )  # fmt: skip


def _timm_transformer(visual: TimmModel, name: str) -> Tower:
    trunk = visual.trunk
    prefix, pool = trunk.num_prefix_tokens, getattr(trunk, "attn_pool", None)
    # timm's EVA (PE-Core is one) attends to the class token when it pools, its ViT only if told so
    everything = getattr(trunk, "pool_include_prefix", isinstance(trunk, Eva) and pool is not None)
    skipped = 0 if everything else prefix

    def head(x: Tensor) -> Tensor:
        return visual.head(trunk.head(trunk.fc_norm(x)))

    if isinstance(pool, AttentionPoolLatent) and pool.latent_len == 1 and pool.pos_embed is None:
        pooling = _latent_pooling(trunk.norm, pool, head, skipped)
    elif pool is None and trunk.global_pool in ("token", "avg"):
        pooling = Pooling(trunk.norm, _at(0) if trunk.global_pool == "token" else _uniform(skipped), head)
    else:
        kind = trunk.global_pool if pool is None else type(pool).__name__
        raise TeacherError(
            f"teacher {name}: timm pooling {kind!r} has no reading per token; supported are 'token', 'avg' "
            "and 'map' with one latent and no position embedding"
        )
    return Tower(
        name, lambda pixels: (visual(pixels), None), list(trunk.blocks), pooling, prefix,
        patch=trunk.patch_embed.patch_size if isinstance(trunk.patch_embed, PatchEmbed) else None,
    )  # fmt: skip


def _latent_pooling(
    norm: nn.Module, pool: AttentionPoolLatent, head: Callable[[Tensor], Tensor], skipped: int
) -> Pooling:
    """Reads SigLIP's attention pooling by a learned query, with output projection and MLP residual."""

    def weights(hidden: Tensor, _inputs: Tensor) -> Tensor:
        q = pool.q_norm(by_heads(pool.q(pool.latent), pool.num_heads))
        k = pool.k_norm(by_heads(pool.kv(norm(hidden[:, skipped:])).chunk(2, dim=-1)[0], pool.num_heads))
        return F.pad(attention_weights(q, k).squeeze(-2), (skipped, 0))

    def finish(x: Tensor) -> Tensor:
        x = pool.proj(x)
        return head(x if pool.mlp is None else x + pool.mlp(pool.norm(x)))

    return Pooling(lambda hidden: pool.kv(norm(hidden)).chunk(2, dim=-1)[1], weights, finish, attends=True)


def _timm_map(visual: TimmModel, name: str) -> Tower:
    """Reads trunks that end in a map (ConvNeXt, FastViT, Swin): each cell passes the head alone."""
    trunk = visual.trunk
    pool = getattr(getattr(trunk, "head", trunk), "global_pool", getattr(trunk, "global_pool", None))
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    if getattr(pool, "pool_type", None) != "avg" or "pool" in dict(visual.head.named_children()):
        raise TeacherError(
            f"teacher {name}: timm trunk {type(trunk).__name__} does not average its last map; other pooling "
            "has no reading per token here"
        )

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = trunk.forward_features(pixels)
        positions = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        return visual.head(trunk.forward_head(features)), positions

    def head(x: Tensor) -> Tensor:
        single = x.reshape(-1, 1, 1, x.shape[-1])
        output = visual.head(trunk.forward_head(single if last else single.permute(0, 3, 1, 2)))
        return output.view(*x.shape[:-1], -1)

    return Tower(name, run, [], Pooling(nn.Identity(), _uniform(0), head))


# Text towers


def text_tower(model: nn.Module, name: str) -> Tower:
    """Takes the text tower of an open_clip model apart."""
    text: Any = getattr(model, "text", model)  # the plain CLIP class holds its text tower's parts itself
    if isinstance(text, HFTextEncoder):
        return _hugging_face_text(text, name)
    if getattr(text, "cls_emb", None) is not None:
        return _appended_class(text, name)
    pool_type, end = _text_pooling(text)
    if pool_type not in ("first", "last", "argmax", "eos"):
        raise TeacherError(f"teacher {name}: its text tower does not pool (pool_type={pool_type!r})")

    def weights(hidden: Tensor, ids: Tensor) -> Tensor:
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).unsqueeze(-1)
        chosen = text_global_pool(index, ids, pool_type, end).squeeze(-1)
        return F.one_hot(chosen, hidden.shape[1]).unsqueeze(1).to(hidden)

    pooling = Pooling(text.ln_final, weights, _linear(text.text_projection))
    return Tower(
        name, lambda ids: (encode_text_ids(model, ids), None), text.transformer.resblocks, pooling,
        cut=text.attn_mask is not None and pool_type != "last",
    )  # fmt: skip


def _text_pooling(text: Any) -> tuple[str, int | None]:
    """Returns how a text tower pools, and the id of its end token, where pool_type 'eos' pools."""
    if isinstance(text, open_clip.CLIP):
        return text.text_pool_type, text.text_eos_id
    return text.pool_type, text.eos_id


def encode_text_ids(model: nn.Module, ids: Tensor) -> Tensor:
    """Pooled text features (batch, teacher_dim) of open_clip's own text towers, before L2 normalisation.

    ``ids`` is (batch, tokens) with the padding id behind the end token. open_clip's ``encode_text`` takes
    the full context only; here ids may be cut to the longest text where the tower is causal and pools at
    the end token, because padding then changes nothing.
    """
    text: Any = getattr(model, "text", model)
    length = ids.shape[1]
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    hidden = text.token_embedding(ids) + text.positional_embedding[:length]
    hidden = text.ln_final(text.transformer(hidden, attn_mask=mask))
    return _linear(text.text_projection)(text_global_pool(hidden, ids, *_text_pooling(text)))


def _appended_class(text: Any, name: str) -> Tower:
    """Reads CoCa's text tower, which appends a class token and pools it."""
    pooling = Pooling(text.ln_final, _at(-1), _linear(text.text_projection))
    return Tower(name, lambda ids: (_pooled(text(ids)), None), text.transformer.resblocks, pooling)


def _hugging_face_text(text: HFTextEncoder, name: str) -> Tower:
    encoder = text.transformer
    holder = getattr(encoder, "encoder", encoder)
    blocks = next(
        (getattr(holder, part) for part in ("layer", "layers", "block") if hasattr(holder, part)), None
    )
    norm = getattr(holder, "final_layer_norm", getattr(holder, "layer_norm", nn.Identity()))
    if blocks is None or not isinstance(text.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler):
        raise TeacherError(
            f"teacher {name}: text tower {type(encoder).__name__} with {type(text.pooler).__name__} has no "
            "reading per token; supported are BERT-, T5- and M2M-like encoders with mean or class pooling"
        )
    dense = getattr(encoder, "pooler", None)

    def mean(hidden: Tensor, ids: Tensor) -> Tensor:
        mask = (ids != text.config.pad_token_id).to(hidden)
        return (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(1)

    def head(x: Tensor) -> Tensor:
        if isinstance(text.pooler, ClsPooler) and text.pooler.use_pooler_output and dense is not None:
            x = dense.activation(dense.dense(x))
        return text.proj(x)

    pooling = Pooling(norm, mean if isinstance(text.pooler, MeanPooler) else _at(0), head)
    return Tower(name, lambda ids: (_pooled(text(ids)), None), list(blocks), pooling, cut=True)
