"""The teacher: parity with open_clip, the value path, character offsets, patch boxes, errors."""

import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.teacher.model import Teacher, choice_logits, patch_boxes
from tdlib.teacher.towers import TeacherError

TEXTS = [
    "a person in a red shirt holds an umbrella",
    "Why is Casey smiling? Because it's raining.",
    "two dogs",
    "the suitcase stands at the bus stop, and Riley is about to travel; balloons are blue.",
]
TOLERANCE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((64, 64), (90, 50), (40, 77))
    ]


def pixels_of(teacher: Teacher, pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([teacher.preprocess(picture) for picture in pictures])


def full_ids(teacher: Teacher, texts: list[str]) -> torch.Tensor:
    return teacher.tokenize.tokenizer(texts)


# Parity with open_clip


def test_projected_tokens_are_projected_normed_intermediates(teacher, pictures):
    model = teacher.model
    with torch.inference_mode():
        output = model.forward_intermediates(
            pixels_of(teacher, pictures), full_ids(teacher, TEXTS), image_indices=1, text_indices=1,
            image_output_fmt="NLC", image_output_extra_tokens=True, normalize_intermediates=True,
        )  # fmt: skip
        patches = F.normalize(output["image_intermediates"][-1] @ model.visual.proj, dim=-1)
        words = F.normalize(output["text_intermediates"][-1] @ model.text_projection, dim=-1)
    for record, expected in zip(teacher.encode_pictures(pictures), patches, strict=True):
        assert record.projected.shape == (16, teacher.dim)
        assert_close(record.projected, expected, **TOLERANCE)
    for record, expected in zip(teacher.encode_texts(TEXTS), words, strict=True):
        assert_close(
            record.projected, expected[1 : 1 + len(record.positions)], **TOLERANCE
        )  # [0] is the start


def test_the_projected_end_and_class_tokens_are_the_pooled_features(teacher, pictures):
    model, ids = teacher.model, full_ids(teacher, TEXTS)
    with torch.inference_mode():
        pooled, signals = teacher.text.encode(ids)
        output = model.visual.forward_intermediates(
            pixels_of(teacher, pictures), indices=1, normalize_intermediates=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        image = model.encode_image(pixels_of(teacher, pictures))
    assert_close(signals["projected"][torch.arange(len(ids)), ids.argmax(-1)], pooled, **TOLERANCE)
    assert_close(output["image_intermediates_prefix"][-1][:, 0] @ model.visual.proj, image, **TOLERANCE)


def test_batches_keep_the_order_and_give_the_same(teacher, pictures, monkeypatch):
    whole = teacher.encode_texts(TEXTS), teacher.encode_pictures(pictures)
    monkeypatch.setattr("tdlib.teacher.model.TEXTS_AT_ONCE", 1)
    monkeypatch.setattr("tdlib.teacher.model.PICTURES_AT_ONCE", 2)
    parts = teacher.encode_texts(TEXTS), teacher.encode_pictures(pictures)
    for small, large in zip(parts, whole, strict=True):
        for a, b in zip(small, large, strict=True):
            assert_close(a.positions, b.positions)
            assert_close(a.projected, b.projected, **TOLERANCE)
            assert_close(a.value, b.value, **TOLERANCE)


def test_the_model_is_frozen(teacher):
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_text_without_words_has_no_tokens_but_a_pooled_feature(teacher):
    (record,) = teacher.encode_texts(["  "])
    assert record.projected.shape == (0, teacher.dim) and record.positions.shape == (0, 2)
    assert_close(record.pooled.norm(), torch.tensor(1.0))


# Boxes of patches


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("input_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("size", [(256, 256), (301, 173), (97, 211), (50, 333), (20, 20)])
def test_patches_lie_where_the_preprocessing_takes_them_from(size, input_size, mode):
    """A picture whose red and green say where a pixel lies, pushed through open_clip's own transform."""
    (width, height), (rows, columns) = size, (input_size[0] // 8, input_size[1] // 8)
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    picture = np.stack([50 + 200 * x, 50 + 200 * y, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)
    config = PreprocessCfg(
        size=input_size, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation="bilinear"
    )
    pixels = image_transform_v2(config, is_train=False)(Image.fromarray(picture)) * 255
    drawn = (pixels[2:] > 250).float()  # the rest is padding
    share = F.avg_pool2d(drawn, 8).flatten()
    centres = ((F.avg_pool2d(pixels[:2] * drawn, 8).flatten(1) / share).T - 50) / 200
    boxes = patch_boxes(size, input_size, (rows, columns), mode)
    if mode == "longest":
        extent = torch.stack([drawn.amax(1).sum(), drawn.amax(2).sum()])  # of the resized picture, pixels
        assert_close((boxes[:, 2:] - boxes[:, :2]).prod(-1), share * 64 / extent.prod(), rtol=0, atol=1e-6)
    else:
        extent = 8 / (boxes[0, 2:] - boxes[0, :2])
        assert (share == 1).all()
    real = share > 0
    found = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert_close((found * extent)[real], (centres * extent)[real], rtol=0, atol=0.25)  # a quarter of a pixel


def test_records_of_pictures_carry_those_boxes(teacher, pictures):
    for picture, record in zip(pictures, teacher.encode_pictures(pictures), strict=True):
        assert_close(record.positions, patch_boxes(picture.size, (32, 32), (4, 4), "shortest"))


def test_resize_mode_is_read_from_the_models_settings(teacher_folder, tmp_path, pictures):
    folder = changed_copy(
        teacher_folder, tmp_path, lambda config: config["preprocess_cfg"].update(resize_mode="squash")
    )
    record = Teacher(f"local-dir:{folder}").encode_pictures([pictures[1]])[0]
    assert_close(record.positions, patch_boxes((90, 50), (32, 32), (4, 4), "squash"))


# Fingerprint and loading


def changed_copy(source, target, change=lambda config: None, weights=lambda state: None):
    """A copy of the teacher's folder with other settings or weights."""
    folder = target / "clip"
    shutil.copytree(source, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    change(config)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = load_file(folder / "open_clip_model.safetensors")
    weights(state)
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def test_fingerprint_changes_with_any_weight(teacher, teacher_folder):
    other = Teacher(f"local-dir:{teacher_folder}")
    for name, parameter in other.model.named_parameters():
        before = parameter.view(-1)[-1].clone()
        parameter.view(-1)[-1] = before + 1e-3
        assert other._fingerprint() != teacher.fingerprint, name
        parameter.view(-1)[-1] = before
    assert other._fingerprint() == teacher.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model_cfg"].update(quick_gelu=True),
        lambda config: config["model_cfg"]["vision_cfg"].update(head_width=8),
        lambda config: config["preprocess_cfg"].update(interpolation="bilinear"),
        lambda config: config["preprocess_cfg"].update(resize_mode="squash"),
        lambda config: config["model_cfg"]["vision_cfg"].update(pool_type="avg"),
    ],
    ids=["activation", "heads", "interpolation", "resize_mode", "pooling"],
)
def test_fingerprint_changes_with_what_the_weights_do_not_tell(teacher, teacher_folder, tmp_path, change):
    folder = changed_copy(teacher_folder, tmp_path, change)
    assert Teacher(f"local-dir:{folder}").fingerprint != teacher.fingerprint


def test_openai_weights_get_their_activation(monkeypatch):
    """A full-size model is not built: the arguments tell."""
    seen = {}

    def stop(name, **options):
        seen[name] = options
        raise RuntimeError("stopped")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", stop)
    for name, pretrained in (("ViT-B-16", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(TeacherError, match="stopped"):
            Teacher(name, pretrained)
    assert seen["ViT-B-16"].get("force_quick_gelu") is True
    assert not seen["ViT-B-32"].get("force_quick_gelu")
    assert seen["ViT-B-16"]["pretrained"] == "openai"


def drop_last_layer(state):
    for name in [name for name in state if "resblocks.1." in name]:
        del state[name]


def widen(state):
    state["text_projection"] = torch.zeros(32, 25)


BAD_FOLDERS = {
    "layers are missing": (None, drop_last_layer),
    "another shape": (None, widen),
    "another block": (lambda config: config["model_cfg"]["vision_cfg"].update(qk_norm=True), None),
    "unknown setting": (lambda config: config["model_cfg"].update(bogus=1), None),
    "missing setting": (lambda config: config["model_cfg"].pop("embed_dim"), None),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_do_not_fit_are_refused(teacher_folder, tmp_path, case):
    change, weights = BAD_FOLDERS[case]
    folder = changed_copy(teacher_folder, tmp_path, change or (lambda c: None), weights or (lambda s: None))
    with pytest.raises(TeacherError, match=re.escape(str(folder))):
        Teacher(f"local-dir:{folder}")


def test_damaged_folders_are_refused(teacher_folder, tmp_path):
    folder = changed_copy(teacher_folder, tmp_path)
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:1000], b"no weights at all" * 10):
        weights.write_bytes(content)
        with pytest.raises(TeacherError, match="cannot be loaded"):
            Teacher(f"local-dir:{folder}")
    weights.unlink()
    with pytest.raises(TeacherError, match="weights"):
        Teacher(f"local-dir:{folder}")
    weights.write_bytes(whole)
    (folder / "open_clip_config.json").write_text('{"model_cfg": ')
    with pytest.raises(TeacherError, match="cannot be loaded"):
        Teacher(f"local-dir:{folder}")
    weights.with_name("open_clip_config.json").unlink()
    with pytest.raises(TeacherError, match="config"):
        Teacher(f"local-dir:{folder}")


def test_another_tokenizer_makes_another_teacher(teacher_folder, tmp_path):
    """Its features must not be taken from the cache of the first: the same weights read other words."""
    shutil.copytree(teacher_folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    state = json.loads(file.read_text())
    known = state["model"]["vocab"]
    one, two = [piece for piece in known if piece.isalpha()][-2:]
    known[one], known[two] = known[two], known[one]
    file.write_text(json.dumps(state))
    first, second = (Teacher(f"local-dir:{folder}") for folder in (teacher_folder, tmp_path / "other"))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == Teacher(f"local-dir:{teacher_folder}").fingerprint


def test_unpickled_checkpoints_are_refused(tmp_path, monkeypatch):
    """A checkpoint that would run code on loading ends in an error, and its code does not run."""
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"tiny": TINY})
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return ran.write_text, ("x",)

    torch.save({"weights": Evil()}, path)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        Teacher("tiny", str(path))
    assert not ran.exists()


TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def test_a_name_with_a_checkpoint_file(tmp_path, monkeypatch):
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"tiny": TINY})
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    teacher = Teacher("tiny", str(tmp_path / "tiny.pt"))
    ids = SimpleTokenizer(context_length=8)(["two dogs"])
    with torch.inference_mode():
        expected = model.eval().encode_text(ids, normalize=True)[0]
    assert_close(teacher.encode_texts(["two dogs"])[0].pooled, expected, **TOLERANCE)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        Teacher("tiny", str(tmp_path / "other.pt"))
    with pytest.raises(TeacherError, match="weights"):
        Teacher("tiny")


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("ViT-Nothing", ""),
        ("ViT-Nothing", "openai"),
        ("ViT-B-16", "no_such_tag"),
        ("local-dir:/no/such/folder", ""),
        ("local-dir:", ""),
    ],
)
def test_unknown_teachers_are_refused(name, pretrained):
    with pytest.raises(TeacherError, match=re.escape(repr(name))):
        Teacher(name, pretrained)


def test_a_checkpoint_that_would_be_ignored_is_refused(teacher_folder):
    with pytest.raises(TeacherError, match="ignored"):
        Teacher(f"local-dir:{teacher_folder}", "openai")


# Choices


def test_choice_logits_are_clips_scaled_cosines(teacher, pictures):
    image = teacher.encode_pictures(pictures[:1])[0].pooled
    text = torch.stack([record.pooled for record in teacher.encode_texts(TEXTS)])
    with torch.inference_mode():
        expected = teacher.model.get_logits(pixels_of(teacher, pictures[:1]), full_ids(teacher, TEXTS))[0][0]
    assert_close(choice_logits(image, text, teacher.logit_scale), expected, rtol=0, atol=1e-4)
    batch = choice_logits(image.expand(2, -1), text.expand(2, -1, -1), teacher.logit_scale)
    assert_close(batch[1], expected, rtol=0, atol=1e-4)
