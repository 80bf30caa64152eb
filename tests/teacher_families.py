"""A small teacher of every family of open_clip's, with random weights."""

import copy
from functools import cache

import pytest
import timm
import torch
from open_clip import factory
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import Tower

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


def random_teacher(config: dict, seed: int = 0, name: str = "tiny") -> Teacher:
    """A teacher of an architecture that open_clip is told of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {name: copy.deepcopy(config)})
        return Teacher(name, random_weights=seed)


@cache
def teacher_of(name: str) -> Teacher:
    return unsettle(random_teacher(FAMILIES[name], 1, name))


def pixels_of(teacher: Teacher, pictures) -> torch.Tensor:
    return torch.stack([teacher.preprocess(picture) for picture in pictures])


def towers_of(teacher: Teacher, pictures) -> list[tuple[Tower, torch.Tensor]]:
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    return [(teacher.image, pixels_of(teacher, pictures)), (teacher.text, ids)]
