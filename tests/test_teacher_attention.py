"""What teachers of every open_clip family attend to: rows, rollout, value-value paths, relevance of pairs."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from teacher_families import TEXTS, TOLERANCE, pixels_of, readable, teacher_of, towers_of
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import EXTRAS, TeacherError, Tower, attention_weights, take_apart


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_weights_are_those_of_multihead_attention(causal):
    torch.manual_seed(0)
    block = open_clip.transformer.ResidualAttentionBlock(32, 4)
    hidden = torch.randn(2, 6, 32)
    mask = torch.full((6, 6), -torch.inf).triu(1) if causal else None
    normed = block.ln_1(hidden)
    with torch.inference_mode():
        output, expected = block.attn(
            normed, normed, normed, need_weights=True, average_attn_weights=False, attn_mask=mask
        )
        parts = take_apart(block)
        q, k, v = parts.qkv(normed)
        found = attention_weights(q, k, mask)
        assert_close(found, expected, **TOLERANCE)
        assert_close(parts.out(found @ v, normed), output, **TOLERANCE)


@readable
def test_attending_anew_gives_the_same_pooled_feature(name, pictures):
    """Every block's weights, recomputed one by one, and the pooling's."""
    for tower, given in towers_of(teacher_of(name), pictures):
        with torch.no_grad():
            seen = tower.see(given, len(tower.blocks))
        attended = tower.attend(seen)
        assert_close(attended.pooled.detach(), seen.pooled, rtol=1e-4, atol=1e-5)
        assert len(attended.maps) == len(tower.blocks)
        for weights in (*attended.maps, attended.weights):
            assert_close(weights.detach().sum(-1), torch.ones(weights.shape[:-1]))


def blocks_attention(tower: Tower, given: torch.Tensor) -> list[torch.Tensor]:
    """Head means of open_clip's plain blocks, by nn.MultiheadAttention itself."""
    maps = []
    for block, (hidden, mask) in zip(tower.blocks, tower.see(given, len(tower.blocks)).entered, strict=True):
        normed = block.ln_1(hidden)
        maps.append(block.attn(normed, normed, normed, need_weights=True, attn_mask=mask)[1])
    return maps


def pooled_rows(teacher: Teacher, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Class token's row over patches; end tokens' rows over words; both divided by their largest."""
    (image, text), rows = matrices, []
    rows += [row[0, 1:] for row in image]
    for caption, row in zip(TEXTS, text, strict=True):
        end = len(teacher.tokenize(caption)[0]) - 1
        rows.append(row[end, 1:end])
    return [row / row.max() if len(row) else row for row in rows]


@torch.inference_mode()
def test_attention_and_rollout_are_the_pooled_tokens_rows(pictures):
    teacher = teacher_of("vit")
    maps = [blocks_attention(tower, given) for tower, given in towers_of(teacher, pictures)]
    rollouts = []
    for own in maps:
        product = torch.eye(own[0].shape[-1])
        for attention in own:
            product = (0.5 * attention + 0.5 * torch.eye(attention.shape[-1])) @ product
        rollouts.append(product)
    extras = ("attention", "rollout")
    records = teacher.encode_pictures(pictures, extras=extras) + teacher.encode_texts(TEXTS, extras=extras)
    last = pooled_rows(teacher, [own[-1] for own in maps])
    for record, row, rolled in zip(records, last, pooled_rows(teacher, rollouts), strict=True):
        assert_close(record.attention, row, rtol=0, atol=1e-5)
        assert_close(record.rollout, rolled, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_resnets_attention_is_its_poolings(pictures):
    teacher = teacher_of("resnet")
    pool, hidden = teacher.model.visual.attnpool, teacher.image.see(pixels_of(teacher, pictures)).hidden
    x = hidden.transpose(0, 1)
    weights = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], pool.num_heads, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=True,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )[1]  # fmt: skip
    for row, record in zip(weights, teacher.encode_pictures(pictures, extras=EXTRAS), strict=True):
        assert_close(record.attention, row[0, 1:] / row[0, 1:].max(), rtol=0, atol=1e-5)
        assert torch.equal(record.rollout, record.attention)  # its only layer of attention
        assert record.vv.shape == record.projected.shape


@readable
def test_extras_are_added_and_change_nothing_else(name, pictures):
    teacher = teacher_of(name)
    for encode, inputs in ((teacher.encode_pictures, pictures), (teacher.encode_texts, TEXTS)):
        for plain, record in zip(encode(inputs), encode(inputs, extras=EXTRAS), strict=True):
            for field in ("projected", "value", "positions", "pooled"):
                assert_close(getattr(record, field), getattr(plain, field), rtol=0, atol=1e-5)
            assert_close(record.vv.norm(dim=-1), torch.ones(len(record.vv)))
            for scalars in (record.attention, record.rollout):
                assert scalars.shape == record.positions.shape[:1]
                assert len(scalars) == 0 or (scalars.min() >= 0 and scalars.max() == 1)


@torch.inference_mode()
def test_value_value_attention_is_a_second_path_without_mlp(pictures):
    """Depth 2 of 3 blocks: half of them, rounded up."""
    teacher = teacher_of("vit")
    for (tower, given), head in zip(towers_of(teacher, pictures), (1, 0), strict=True):
        maps = tower.see(given, 3).entered
        path = maps[1][0]
        for block, (hidden, mask) in zip(tower.blocks[1:], maps[1:], strict=True):
            width, attention = hidden.shape[-1], block.attn
            v = F.linear(
                block.ln_1(hidden), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
            )
            v = v.unflatten(-1, (2, 16)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(v, v, v, attn_mask=mask)
            path = path + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        expected = tower.pooling.project(path)[:, head:]
        assert_close(tower.encode(given, ("vv",))[1]["vv"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eva", "convnext", "timm-resnet"])
@pytest.mark.parametrize("extra", [*EXTRAS, "gradient"])
def test_towers_whose_attention_is_not_read_refuse_it(name, extra, pictures):
    teacher = teacher_of(name)
    with pytest.raises(TeacherError, match=rf"{name}.*'{extra}'.*possible are projected, value"):
        if extra == "gradient":
            teacher.pair_relevance(TEXTS, pictures[0])
        else:
            teacher.encode_pictures(pictures, extras=(extra,))


def test_an_unknown_signal_is_refused():
    with pytest.raises(TeacherError, match="no signal 'entropy'"):
        teacher_of("vit").encode_texts(TEXTS, extras=("entropy",))


# Relevance of pairs


def test_gradient_relevance_agrees_with_the_full_relevancy_matrix(pictures):
    """Chefer et al. with whole matrices, gradients of one pair at a time taken through a plain loop."""
    teacher = teacher_of("vit")
    found = teacher.pair_relevance(TEXTS, pictures[1])
    (image, pixels), _ = towers_of(teacher, pictures[1:])
    for text, (words, patches) in zip(TEXTS, found, strict=True):
        ids = torch.tensor([teacher.tokenize(text)[0]])
        pooled, maps = [], []
        for tower, given in ((teacher.text, ids), (image, pixels)):
            with torch.no_grad():
                entered = tower.see(given, 3).entered
            hidden, own = entered[0][0], []
            for block, (_, mask) in zip(tower.blocks, entered, strict=True):
                q, k, v = take_apart(block).qkv(block.ln_1(hidden))
                scores = torch.einsum("bhid,bhjd->bhij", q, k) / 4 + (0 if mask is None else mask)
                own.append(scores.softmax(-1).requires_grad_())
                mixed = torch.einsum("bhij,bhjd->bihd", own[-1], v).flatten(2)
                hidden = hidden + block.attn.out_proj(mixed)
                hidden = hidden + block.mlp(block.ln_2(hidden))
            position = ids.shape[1] - 1 if tower is teacher.text else 0
            pooled.append(F.normalize(tower.pooling.project(hidden[:, position]), dim=-1))
            maps.append(own)
        cosine = (pooled[0] * pooled[1]).sum()
        for own, relevance in zip(maps, (words, patches), strict=True):
            total = torch.eye(own[0].shape[-1])
            for attention, gradient in zip(
                own, torch.autograd.grad(cosine, own, retain_graph=True), strict=True
            ):
                total = total + (gradient * attention).clamp(min=0).mean(1)[0].detach() @ total
            row = total[-1, 1:-1] if own is maps[0] else total[0, 1:]
            row = row / row.max() if len(row) else row
            assert_close(relevance, row, rtol=1e-3, atol=1e-4)


@readable
def test_pairs_have_a_scalar_per_token_and_do_not_mix(name, pictures):
    teacher = teacher_of(name)
    together = teacher.pair_relevance(TEXTS, pictures[0])
    patches = len(teacher.encode_pictures(pictures[:1])[0].positions)
    for text, record, (words, cells) in zip(TEXTS, teacher.encode_texts(TEXTS), together, strict=True):
        assert words.shape == record.positions.shape[:1] and cells.shape == (patches,)
        assert not words.requires_grad and not cells.requires_grad
        assert cells.min() >= 0 and cells.max() == pytest.approx(1)
        ((alone_words, alone_cells),) = teacher.pair_relevance([text], pictures[0])
        assert_close(alone_words, words, rtol=0, atol=2e-3)
        assert_close(alone_cells, cells, rtol=0, atol=2e-3)


def test_gradient_relevance_depends_on_the_other_modality(pictures):
    teacher = teacher_of("vit")
    first, second = (teacher.pair_relevance(TEXTS[:2], picture) for picture in pictures)
    assert (first[0][1] - first[1][1]).abs().max() > 1e-3  # one picture, two texts
    assert (first[1][0] - second[1][0]).abs().max() > 1e-3  # one text, two pictures
