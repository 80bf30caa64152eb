"""Teachers of every open_clip family, small and random: pooled and token features, relevance signals."""

import copy
import json
import logging
import shutil
from functools import cache

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip import factory
from PIL import Image
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.make.vocabulary import train_wordpiece_tokenizer
from tdlib.teacher.families import text_tower
from tdlib.teacher.model import EXTRAS, Teacher, TeacherError, choice_logits, patch_boxes
from tdlib.teacher.towers import Tower, attention_weights, take_apart

TEXTS = ["a red cup", "two dogs and a bench in the rain", ""]
TOLERANCE = {"rtol": 0, "atol": 2e-6}
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
DECODER = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}


def trunk(name: str, pool: str, proj: str, size: int = 160) -> dict:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


def model(vision: dict, text: dict = TEXT, dim: int = 24, **settings) -> dict:
    return {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text, **settings}


BIDIRECTIONAL = TEXT | {"no_causal_mask": True, "pool_type": "last"}
CUSTOM = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
FAMILIES = {
    "vit": model(VISION),
    "vit-average": model(VISION | {"pool_type": "avg"}, BIDIRECTIONAL),
    "clipa": model(
        VISION | {"pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5},
        TEXT | {"pool_type": "eos", "eos_id": 49407},
    ),
    "custom-blocks": model(
        VISION | CUSTOM, BIDIRECTIONAL | {"pool_type": "first", "proj_bias": True}, custom_text=True
    ),
    "resnet": model({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}),
    "sigmoid": model(
        trunk("test_vit", "map", "none"), BIDIRECTIONAL | {"proj_bias": True}, 64, custom_text=True,
        init_logit_bias=-10.0,
    ),
    "sigmoid-no-projection": model(
        trunk("test_vit", "map", "none"), BIDIRECTIONAL | {"proj_type": "none", "width": 64}, 64,
        custom_text=True,
    ),
    "timm-token": model(trunk("test_vit", "token", "linear"), custom_text=True),
    "timm-average": model(trunk("test_vit", "avg", "linear")),
    "timm-map-mlp": model(trunk("test_vit3", "", "mlp")),
    "eva": model(trunk("eva02_tiny_patch14_224", "token", "linear", 224), custom_text=True),
    "convnext": model(trunk("test_convnext", "", "mlp")),
    "timm-resnet": model(trunk("test_resnet", "avg", "linear")),
    "coca": model(
        VISION | POOLER | {"output_tokens": True}, TEXT | {"embed_cls": True, "output_tokens": True}, 32,
        custom_text=True, multimodal_cfg=DECODER,
    ),
    "coca-wider": model(
        VISION | POOLER | {"output_tokens": True}, TEXT | {"embed_cls": True, "output_tokens": True}, 24,
        custom_text=True, multimodal_cfg=DECODER,
    ),
}  # fmt: skip
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TRUNKS = {  # of timm's, small; those that its own names give are of full size
    "relpos": (VisionTransformerRelPos, {"class_token": True, "global_pool": "token"}),
    "relpos_average": (VisionTransformerRelPos, {"class_token": True, "fc_norm": True}),
    "relpos_post": (VisionTransformerRelPos, {"block_fn": ResPostRelPosBlock}),
    "pe_core": (Eva, {"global_pool": "map", "attn_type": "rope", "use_rot_pos_emb": True}),
    "distilled": (VisionTransformerDistilled, {}),
    "beit": (Beit, {"use_rel_pos_bias": True}),
    "cait": (Cait, {}),
}


def _small(name: str):
    def build(pretrained=False, num_classes=0, global_pool=None, **_options):
        make, settings = TRUNKS[name]
        chosen = {} if global_pool is None else {"global_pool": global_pool}
        trunk = make(**{**SMALL, **settings, "num_classes": num_classes, **chosen})
        trunk.default_cfg = {}
        return trunk

    build.__name__ = f"small_{name}"
    build.__module__ = __name__
    timm.models.register_model(build)
    return model(trunk(build.__name__, "", "linear", 32), custom_text=True)


UNREAD = {name: _small(name) for name in ("distilled", "beit", "cait")}
FAMILIES |= {name.replace("_", "-"): _small(name) for name in TRUNKS if name not in UNREAD}
READABLE = [
    name
    for name in FAMILIES
    if name not in ("eva", "convnext", "timm-resnet", "pe-core") and "relpos" not in name
]
families = pytest.mark.parametrize("name", FAMILIES)
readable = pytest.mark.parametrize("name", READABLE)


def unsettle(teacher: Teacher) -> Teacher:
    """Moves every parameter, so that norms, biases and zero initialisations do something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in teacher.model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return teacher


@cache
def teacher_of(name: str) -> Teacher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {name: copy.deepcopy(FAMILIES[name])})
        return unsettle(Teacher(name, random_weights=1))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(2)]


def pixels_of(teacher: Teacher, pictures) -> torch.Tensor:
    return torch.stack([teacher.preprocess(picture) for picture in pictures])


def towers_of(teacher: Teacher, pictures) -> list[tuple[Tower, torch.Tensor]]:
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    return [(teacher.image, pixels_of(teacher, pictures)), (teacher.text, ids)]


# Pooled and token features


def assert_pooled(teacher: Teacher, pictures) -> None:
    with torch.inference_mode():
        image = teacher.model.encode_image(pixels_of(teacher, pictures), normalize=True)
        text = teacher.model.encode_text(teacher.tokenize.tokenizer(TEXTS), normalize=True)
    assert_close(torch.stack([r.pooled for r in teacher.encode_pictures(pictures)]), image, **TOLERANCE)
    assert_close(torch.stack([r.pooled for r in teacher.encode_texts(TEXTS)]), text, **TOLERANCE)


@families
def test_pooled_features_are_the_models_own(name, pictures):
    assert_pooled(teacher_of(name), pictures)


@torch.inference_mode()
def assert_decomposes(tower: Tower, given: torch.Tensor) -> None:
    """Pooled is the head of the weighted values; a token is that with all weight on it."""
    seen = tower.see(given)
    weights = tower.pooling.weights(seen.hidden, given)
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert_close(tower.pooling.pool(seen.hidden, weights), seen.pooled, rtol=1e-4, atol=1e-5)
    tokens = tower.pooling.project(seen.hidden)
    for position in (0, seen.hidden.shape[1] - 1):
        alone = torch.zeros_like(weights)
        alone[..., position] = 1
        assert_close(tower.pooling.pool(seen.hidden, alone), tokens[:, position], rtol=1e-4, atol=1e-5)
    assert_close(tower.encode(given)[1]["projected"], tokens[:, tower.prefix :])


@families
def test_tokens_go_the_way_of_the_pooled_feature(name, pictures):
    for tower, given in towers_of(teacher_of(name), pictures):
        assert_decomposes(tower, given)


@families
def test_records_are_unit_vectors_with_positions(name, pictures):
    teacher = teacher_of(name)
    for record in teacher.encode_pictures(pictures) + teacher.encode_texts(TEXTS):
        assert len(record.projected) == len(record.value) == len(record.positions)
        for vectors in (record.projected, record.value, record.pooled):
            assert vectors.shape[-1] == teacher.dim
            assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
        assert record.vv is record.attention is record.rollout is None


@families
def test_texts_give_the_same_alone_and_together(name):
    teacher = teacher_of(name)
    for text, record in zip(TEXTS, teacher.encode_texts(TEXTS), strict=True):
        (alone,) = teacher.encode_texts([text])
        for field in ("projected", "value", "pooled"):
            assert_close(getattr(alone, field), getattr(record, field), rtol=0, atol=1e-5)


def test_average_pooling_averages_its_tokens(pictures):
    """Norm and projection come before the average, so tokens average to the pooled feature."""
    for name in ("vit-average", "timm-resnet"):
        tower, pixels = towers_of(teacher_of(name), pictures)[0]
        with torch.inference_mode():
            pooled, signals = tower.encode(pixels)
        assert_close(signals["projected"].mean(dim=1), pooled, rtol=1e-4, atol=1e-5)


def test_a_resnet_that_attends_evenly_averages_its_tokens(pictures):
    """Without queries the attention is even; then the pooled feature is linear in its cells' tokens."""
    name = "resnet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {name: copy.deepcopy(FAMILIES[name])})
        teacher = unsettle(Teacher(name, random_weights=1))
    attention = teacher.model.visual.attnpool
    attention.q_proj.weight.zero_(), attention.q_proj.bias.zero_()
    pixels = pixels_of(teacher, pictures)
    with torch.inference_mode():
        tokens = teacher.image.pooling.project(teacher.image.see(pixels).hidden)
        assert tokens.shape == (2, 5, 24)  # the mean and four cells
        assert_close(tokens.mean(dim=1), teacher.model.encode_image(pixels), rtol=1e-4, atol=1e-5)
        signals = teacher.image.encode(pixels)[1]
    assert_close(signals["projected"], tokens[:, 1:], **TOLERANCE)
    assert signals["value"] is signals["projected"]


@torch.inference_mode()
def test_a_sigmoid_models_token_is_pooled_as_if_it_were_the_only_one(pictures):
    teacher = teacher_of("timm-map-mlp")
    visual, pixels = teacher.model.visual, pixels_of(teacher, pictures)
    features = visual.trunk.forward_features(pixels)
    record = teacher.encode_pictures(pictures)[0]
    for patch in (0, 7, 99):
        position = visual.trunk.num_prefix_tokens + patch
        pooled = visual.trunk.attn_pool(features[:1, position : position + 1])
        expected = visual.head(visual.trunk.head(visual.trunk.fc_norm(pooled)))[0]
        assert_close(record.projected[patch], F.normalize(expected, dim=-1), **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["coca", "coca-wider"])
def test_a_coca_token_is_pooled_as_if_it_were_the_only_one(name, pictures):
    teacher = teacher_of(name)
    visual = teacher.model.visual
    hidden = visual.transformer(visual._embeds(pixels_of(teacher, pictures)))
    record = teacher.encode_pictures(pictures)[0]
    for patch in (0, 15):
        expected = visual._pool(hidden[:1, patch + 1 : patch + 2])[0] @ visual.proj
        assert_close(record.projected[patch], F.normalize(expected[0], dim=-1), **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["custom-blocks", "sigmoid", "timm-average", "coca"])
def test_the_value_path_attends_to_itself_alone(name, pictures):
    for tower, given in towers_of(teacher_of(name), pictures):
        hidden = tower.see(given).entered[0][0]
        diagonal = torch.full((hidden.shape[1],) * 2, -torch.inf).fill_diagonal_(0)
        after = tower.blocks[-1](hidden, attn_mask=diagonal)
        expected = tower.pooling.project(after[:, tower.prefix :])
        assert_close(tower.encode(given)[1]["value"], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["relpos", "relpos-post"])
def test_the_value_path_of_relative_positions_leaves_their_bias_out(name, pictures):
    tower, pixels = towers_of(teacher_of(name), pictures)[0]
    block, hidden = tower.blocks[-1], tower.see(pixels).entered[0][0]
    length = hidden.shape[1]
    alone = torch.full((block.attn.num_heads, length, length), -torch.inf)
    alone.diagonal(dim1=1, dim2=2).zero_()
    with pytest.MonkeyPatch.context() as patch:  # in place of the bias
        patch.setattr(block.attn.rel_pos, "get_bias", lambda: alone)
        expected = tower.pooling.project(block(hidden)[:, tower.prefix :])
    assert_close(tower.encode(pixels)[1]["value"], expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(block.attn), "the model is left as it was"


@torch.inference_mode()
def test_a_perception_encoder_pools_its_class_token_too(pictures):
    tower, pixels = towers_of(teacher_of("pe-core"), pictures)[0]
    weights = tower.pooling.weights(tower.see(pixels).hidden, pixels)
    assert tower.prefix == 1 and weights.shape[-1] == 17 and weights[..., 0].min() > 1e-3
    assert tower.encode(pixels, ["attention"])[1]["attention"].shape == (2, 16)


@pytest.mark.parametrize("name", UNREAD)
def test_a_tower_that_is_not_read_is_refused_by_name(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {name: copy.deepcopy(UNREAD[name])})
        with pytest.raises(TeacherError, match=rf"teacher '{name}': .*(choose|supported|no reading)"):
            Teacher(name, random_weights=1)


# Attention


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


# Boxes and logits


def test_patches_leave_the_margin_out_that_the_tower_leaves_out(pictures):
    """An input of 36 pixels and patches of 8: four columns, and four pixels that nobody sees."""
    boxes = patch_boxes((72, 72), (36, 36), (4, 4), "squash", patch=(8, 8))
    assert_close(boxes[0], torch.tensor([0, 0, 8 / 36, 8 / 36]))
    assert_close(boxes[-1], torch.tensor([24 / 36, 24 / 36, 32 / 36, 32 / 36]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {"margin": model(VISION | {"image_size": 36})})
        teacher = Teacher("margin", random_weights=0)
    square = pictures[0].resize((72, 72))
    assert_close(teacher.encode_pictures([square])[0].positions, boxes)


@families
def test_boxes_tile_the_cropped_picture(name, pictures):
    record = teacher_of(name).encode_pictures(pictures)[0]
    areas = (record.positions[:, 2:] - record.positions[:, :2]).prod(-1)
    assert areas.sum().item() == pytest.approx(70 / 90, abs=0.03)  # the centre of a 90 x 70 picture
    assert len(record.positions.unique(dim=0)) == len(record.positions)


def test_a_sigmoid_models_bias_cancels_over_choices(pictures):
    teacher = teacher_of("sigmoid")
    bias = float(teacher.model.logit_bias)
    assert bias != 0
    with torch.inference_mode():
        logits = teacher.model.get_logits(
            pixels_of(teacher, pictures[:1]), teacher.tokenize.tokenizer(TEXTS)
        )[0]
    found = choice_logits(
        teacher.encode_pictures(pictures[:1])[0].pooled,
        torch.stack([record.pooled for record in teacher.encode_texts(TEXTS)]),
        teacher.logit_scale,
    )
    assert_close(found + bias, logits[0], rtol=0, atol=1e-4)
    assert_close(found.softmax(-1), logits[0].softmax(-1), rtol=0, atol=1e-5)


# Text towers of transformers, and their tokenizers


@pytest.fixture(scope="module")
def word_piece(captions_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece_tokenizer(captions_texts, 300).save_pretrained(folder)
    return folder


def local_teacher(folder, tokenizer, text: dict, hugging_face=None, **settings) -> Teacher:
    shutil.copytree(tokenizer, folder)
    if hugging_face is not None:
        hugging_face.save_pretrained(folder / "text")
        text = {"hf_model_name": str(folder / "text"), **text}
    config = model(VISION, {"hf_tokenizer_name": "own", "context_length": 16, **text}, **settings)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return unsettle(Teacher(f"local-dir:{folder}", random_weights=0))


def text_config(kind: str, size: int):
    import transformers

    common = {"vocab_size": size, "pad_token_id": 0}
    bert = common | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 32,
    }  # fmt: skip
    return {
        "bert": lambda: transformers.BertConfig(**bert),
        "roberta": lambda: transformers.RobertaConfig(**bert),
        "mt5": lambda: transformers.MT5Config(
            **common, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2
        ),
        "m2m_100": lambda: transformers.M2M100Config(
            **common, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        ),
    }[kind]()  # fmt: skip


HUGGING_FACE = [
    ("bert", "cls_pooler", "linear"),
    ("bert", "cls_last_hidden_state_pooler", "mlp"),
    ("roberta", "mean_pooler", "mlp"),
    ("mt5", "mean_pooler", "linear"),
    ("m2m_100", "cls_pooler", "linear"),
]


@pytest.mark.parametrize(("kind", "pooler", "projection"), HUGGING_FACE)
def test_text_towers_of_transformers(kind, pooler, projection, word_piece, tmp_path, pictures):
    size = len(json.loads((word_piece / "tokenizer.json").read_text())["model"]["vocab"])
    teacher = local_teacher(
        tmp_path / "clip", word_piece, {"hf_pooler_type": pooler, "hf_proj_type": projection},
        text_config(kind, size),
    )  # fmt: skip
    assert_pooled(teacher, pictures)
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    assert_decomposes(teacher.text, ids)
    words = teacher.encode_texts(TEXTS)
    assert len(words[0].projected) >= 3 and len(words[2].projected) == 0
    assert (words[0].value - words[0].projected).norm(dim=-1).min() > 1e-3
    with torch.inference_mode():  # a softmax over one key: a text of one token attends to itself
        single = teacher.text.encode(ids[:, :1])[1]
        assert_close(single["value"], single["projected"], **TOLERANCE)
    with pytest.raises(TeacherError, match=r"'rollout'.*possible are projected, value"):
        teacher.encode_texts(TEXTS, extras=("rollout",))


def test_padding_and_separators_are_those_of_the_models_tokenizer(word_piece, tmp_path, pictures):
    """A tower without mask reads the padding too: it has to be open_clip's own, to the last token."""
    text = TEXT | {"vocab_size": 400, "no_causal_mask": True, "pool_type": "last"}
    teacher = local_teacher(
        tmp_path / "clip", word_piece, text | {"tokenizer_kwargs": {"strip_sep_token": True}}
    )
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    assert torch.equal(ids, teacher.tokenize.tokenizer(TEXTS))
    assert_pooled(teacher, pictures)


def test_poolings_without_a_reading_per_token_are_refused(word_piece, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        parallel = FAMILIES["coca"] | {
            "vision_cfg": VISION | POOLER | {"attentional_pool": "parallel", "output_tokens": True}
        }
        none = model(VISION | {"pool_type": "none"})
        patch.setattr(factory, "_MODEL_CONFIGS", {"parallel": parallel, "none": none})
        with pytest.raises(TeacherError, match=r"parallel.*does not end in one token"):
            Teacher("parallel", random_weights=0)
        with pytest.raises(TeacherError, match=r"none.*does not pool"):
            Teacher("none", random_weights=0)
    silent = open_clip.CLIP(**model(VISION, TEXT | {"pool_type": "none"}))
    with pytest.raises(TeacherError, match=r"text tower does not pool \(pool_type='none'\)"):
        text_tower(silent, "silent")
    with pytest.raises(TeacherError, match=r"tokenizer_mode 'clips'"):
        local_teacher(tmp_path / "clips", word_piece, TEXT | {"tokenizer_mode": "clips"})


# Random weights, activations


def test_random_weights_are_drawn_from_their_seed(teacher, teacher_folder):
    name = f"local-dir:{teacher_folder}"
    before = torch.random.get_rng_state()
    first, same, other = (Teacher(name, random_weights=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, teacher.fingerprint}) == 3
    assert str(first.preprocess) == str(teacher.preprocess)
    assert first.tokenize(TEXTS[0]) == teacher.tokenize(TEXTS[0])
    record, random = teacher.encode_texts(TEXTS)[0], first.encode_texts(TEXTS)[0]
    assert torch.equal(record.positions, random.positions)
    assert (record.projected - random.projected).norm(dim=-1).min() > 0.1


def test_random_weights_of_a_coca_are_determined():
    """Its decoder, which no feature passes, is not initialised by open_clip."""
    teachers = []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factory, "_MODEL_CONFIGS", {"coca": copy.deepcopy(FAMILIES["coca"])})
            teachers.append(Teacher("coca", random_weights=5))
        teachers[-1].model.text_decoder.text_projection.fill_(len(teachers))
    assert teachers[0]._fingerprint() == teachers[1]._fingerprint()


@pytest.mark.parametrize(
    ("change", "part"), [("final_ln_after_pool", "vision_cfg"), ("no_causal_mask", "text_cfg")]
)
def test_fingerprint_tells_settings_apart_that_share_weights(change, part):
    prints = set()
    for setting in (False, True):
        config = copy.deepcopy(FAMILIES["vit"])
        config[part][change] = setting
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factory, "_MODEL_CONFIGS", {"vit": config})
            prints.add(Teacher("vit", random_weights=0).fingerprint)
    assert len(prints) == 2


def test_weights_trained_with_another_activation_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": False})
    with pytest.raises(TeacherError, match=r"trained without QuickGELU; name the architecture 'ViT-B-32'"):
        Teacher("ViT-B-32-quickgelu", "laion2b")


def test_a_checkpoint_file_of_unknown_activation_is_warned_of(tmp_path, monkeypatch, caplog):
    quick = FAMILIES["vit"] | {"quick_gelu": True}
    configs = {"tiny": FAMILIES["vit"], "tiny-quickgelu": quick, "alone": FAMILIES["vit"]}
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", copy.deepcopy(configs))
    torch.save(open_clip.CLIP(**FAMILIES["vit"]).state_dict(), tmp_path / "tiny.pt")
    records = {}
    for name in configs:
        with caplog.at_level(logging.WARNING, logger="tdlib.teacher.model"):
            caplog.clear()
            records[name] = Teacher(name, str(tmp_path / "tiny.pt")).encode_texts(TEXTS)[0]
        assert ("need the name tiny-quickgelu, not tiny" in caplog.text) == (name == "tiny")
    assert torch.equal(records["tiny"].pooled, records["alone"].pooled)
    assert (records["tiny"].pooled - records["tiny-quickgelu"].pooled).norm() > 1e-4


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_an_archive_of_openais_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {"tiny": copy.deepcopy(FAMILIES["vit"])})
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "archive.pt"))
    with pytest.raises(TeacherError, match="TorchScript: use the tag 'openai'"):
        Teacher("tiny", str(tmp_path / "archive.pt"))
