"""Teachers of every open_clip family, small and random: pooled and token features, text towers, weights."""

import copy
import json
import logging
import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher_families import (
    FAMILIES,
    POOLER,
    TEXT,
    TEXTS,
    TOLERANCE,
    UNREAD,
    VISION,
    families,
    model,
    pixels_of,
    random_teacher,
    teacher_of,
    towers_of,
    unsettle,
)
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.core.paths import ConfigError
from tdlib.make.vocabulary import train_clip_tokenizer
from tdlib.teacher import model as teacher_model
from tdlib.teacher.convert import convert
from tdlib.teacher.families import text_tower
from tdlib.teacher.model import Teacher, choice_logits, patch_boxes
from tdlib.teacher.towers import TeacherError, Tower


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(2)]


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
    teacher = unsettle(random_teacher(FAMILIES["resnet"]))
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
@pytest.mark.parametrize("name", ["vit", "custom-blocks", "sigmoid", "timm-average", "coca"])
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
    with pytest.raises(TeacherError, match=rf"teacher '{name}': .*(choose|supported|no reading)"):
        random_teacher(UNREAD[name], name=name)


# Boxes and logits


def test_patches_leave_the_margin_out_that_the_tower_leaves_out(pictures):
    """An input of 36 pixels and patches of 8: four columns, and four pixels that nobody sees."""
    boxes = patch_boxes((72, 72), (36, 36), (4, 4), "squash", patch=(8, 8))
    assert_close(boxes[0], torch.tensor([0, 0, 8 / 36, 8 / 36]))
    assert_close(boxes[-1], torch.tensor([24 / 36, 24 / 36, 32 / 36, 32 / 36]))
    teacher = random_teacher(model(VISION | {"image_size": 36}))
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
def test_text_towers_of_transformers(kind, pooler, projection, tokenizer_folder, tmp_path, pictures):
    size = len(json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"])
    teacher = local_teacher(
        tmp_path / "clip", tokenizer_folder, {"hf_pooler_type": pooler, "hf_proj_type": projection},
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


def test_padding_and_separators_are_those_of_the_models_tokenizer(tokenizer_folder, tmp_path, pictures):
    """A tower without mask reads the padding too: it has to be open_clip's own, to the last token."""
    text = TEXT | {"vocab_size": 400, "no_causal_mask": True, "pool_type": "last"}
    teacher = local_teacher(
        tmp_path / "clip", tokenizer_folder, text | {"tokenizer_kwargs": {"strip_sep_token": True}}
    )
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    assert torch.equal(ids, teacher.tokenize.tokenizer(TEXTS))
    assert_pooled(teacher, pictures)


def test_poolings_without_a_reading_per_token_are_refused(tokenizer_folder, tmp_path):
    parallel = VISION | POOLER | {"attentional_pool": "parallel", "output_tokens": True}
    with pytest.raises(TeacherError, match=r"parallel.*does not end in one token"):
        random_teacher(FAMILIES["coca"] | {"vision_cfg": parallel})
    with pytest.raises(TeacherError, match=r"tiny.*does not pool"):
        random_teacher(model(VISION | {"pool_type": "none"}))
    silent = open_clip.CLIP(**model(VISION, TEXT | {"pool_type": "none"}))
    with pytest.raises(TeacherError, match=r"text tower does not pool \(pool_type='none'\)"):
        text_tower(silent, "silent")
    with pytest.raises(TeacherError, match=r"tokenizer_mode 'clips'"):
        local_teacher(tmp_path / "clips", tokenizer_folder, TEXT | {"tokenizer_mode": "clips"})


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
        teachers.append(random_teacher(FAMILIES["coca"], seed=5))
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
        prints.add(random_teacher(config).fingerprint)
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


# Teachers that transformers has saved


@pytest.fixture
def saved_clip(tmp_path, captions_texts):
    """A function that saves a small CLIPModel with its tokenizer, and returns it and its folder."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = train_clip_tokenizer(captions_texts, 300)

    def save(act="quick_gelu", eos=tokenizer.eos_token_id, preprocess=None, **vision):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 80, "hidden_act": act}
        words = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "num_attention_heads": 4}
        ends = {"eos_token_id": eos, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
        sees = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2} | vision
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=sizes | words | ends, vision_config=sizes | sees, projection_dim=24
            )
        ).eval()  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "saved")
        tokenizer.save_pretrained(tmp_path / "saved")
        if preprocess:
            (tmp_path / "saved" / "preprocessor_config.json").write_text(json.dumps(preprocess))
        return model, tmp_path / "saved"

    return save


def test_a_processor_of_transformers_says_how_pictures_are_prepared(saved_clip, tmp_path, caplog):
    """``CLIPProcessor.save_pretrained`` writes no preprocessor_config.json."""
    from transformers import CLIPImageProcessorPil

    way = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3, "resample": 2, "size": {"height": 32}}
    way["size"]["width"] = 32
    _, folder = saved_clip("gelu")
    convert(folder, tmp_path / "unknown")
    assert "does not say how pictures are prepared" in caplog.text
    known = CLIPImageProcessorPil(**way, do_center_crop=False).to_dict()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": known}, default=str))
    teacher = Teacher(f"local-dir:{convert(folder, tmp_path / 'teacher')}")
    told = teacher.model.visual.preprocess_cfg
    assert (tuple(told["mean"]), told["interpolation"], told["resize_mode"]) == (
        (0.5, 0.4, 0.3), "bilinear", "squash",
    )  # fmt: skip
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": known | {"rescale_factor": 1 / 127.5}}, default=str)
    )
    with pytest.raises(TeacherError, match="rescale_factor"):
        convert(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("PE-Core-T-16-384", ((0.5, 0.5, 0.5), "bilinear", "squash")),
        ("ViT-H-14-CLIPA", ((0.485, 0.456, 0.406), "bilinear", "squash")),
        ("MobileCLIP-S1", ((0.0, 0.0, 0.0), "bilinear", "shortest")),
    ],
)
def test_pictures_for_a_weights_file_are_prepared_as_for_the_architectures_tags(name, way):
    found = teacher_model._preprocessing(name, "weights.pt")
    assert (found["image_mean"], found["image_interpolation"], found["image_resize_mode"]) == way


def test_tags_that_differ_are_told(caplog):
    assert teacher_model._preprocessing("ViT-L-14", "weights.pt") == {}
    assert "published weights of ViT-L-14 differ" in caplog.text
    assert teacher_model._preprocessing("ViT-L-14", "openai") == {}


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", None), ("gelu", 2)])
def test_a_model_of_transformers_becomes_a_teacher_that_sees_the_same(
    saved_clip, tmp_path, pictures, act, eos
):
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3, "resample": 2, "size": 32}
    given = {} if eos is None else {"eos": eos}
    original, folder = saved_clip(act, preprocess=settings, **given)
    with pytest.raises(TeacherError, match=r"python -m tdlib\.teacher\.convert"):
        Teacher(f"local-dir:{folder}")
    teacher = Teacher(f"local-dir:{convert(folder, tmp_path / 'teacher')}")
    pixels = torch.stack([teacher.preprocess(picture) for picture in pictures])
    records = teacher.encode_pictures(pictures), teacher.encode_texts(TEXTS)
    ids = teacher.text_ids([teacher.tokenize(text)[0] for text in TEXTS])
    with torch.no_grad():
        seen = original.visual_projection(original.vision_model(pixels).pooler_output)
        read = original.text_projection(original.text_model(ids).pooler_output)
    for found, expected in zip(records, (seen, read), strict=True):
        pooled = torch.stack([record.pooled for record in found])
        assert_close(pooled, F.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert teacher.logit_scale == pytest.approx(float(original.logit_scale.detach().exp()))
    cfg = teacher.model.visual.preprocess_cfg
    assert (*cfg["mean"], *cfg["std"]) == (0.5, 0.4, 0.3, 0.2, 0.2, 0.2)
    assert cfg["interpolation"] == "bilinear" and cfg["resize_mode"] == "shortest"


def test_weights_are_those_of_the_index_and_not_of_a_file_that_lies_beside(saved_clip, tmp_path):
    original, folder = saved_clip()
    whole = load_file(folder / "model.safetensors")
    save_file({name: value * 0 for name, value in whole.items()}, folder / "model_old.safetensors")
    first = dict.fromkeys(list(whole)[:3], "model-00001-of-00002.safetensors")
    place = dict.fromkeys(whole, "model-00002-of-00002.safetensors") | first
    found = [Teacher(f"local-dir:{convert(folder, tmp_path / 'whole')}")]
    for file in set(place.values()):
        save_file({name: whole[name] for name in whole if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    (folder / "model.safetensors").unlink()
    found.append(Teacher(f"local-dir:{convert(folder, tmp_path / 'parts')}"))
    for teacher in found:
        assert_close(teacher.model.text_projection, original.text_projection.weight.T.detach())


def test_what_open_clip_cannot_be_told_is_refused(saved_clip, tmp_path):
    def problem(change=None, **settings):
        _, folder = saved_clip(**settings)
        if change:
            change(folder)
        with pytest.raises(TeacherError) as caught:
            convert(folder, tmp_path / "teacher")
        assert not (tmp_path / "teacher").exists()
        return str(caught.value)

    assert "hidden_act ['relu']" in problem(act="relu")
    assert "layer_norm_eps" in problem(layer_norm_eps=1e-6)
    assert "size {'shortest_edge': 40}" in problem(preprocess={"size": {"shortest_edge": 40}})
    assert "do_normalize false" in problem(preprocess={"do_normalize": False})
    assert "no tokenizer.json" in problem(lambda folder: (folder / "tokenizer.json").unlink())
    assert "0 tensors" in problem(lambda folder: (folder / "model.safetensors").unlink())
    assert "cannot be read" in problem(shutil.rmtree)
    with pytest.raises(ConfigError, match="not made here"):
        convert(folder := saved_clip()[1], folder)
