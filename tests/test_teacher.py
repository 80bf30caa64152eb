"""The teacher: parity with open_clip, the value path, character offsets, patch boxes, errors."""

import itertools
import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.data.examples import DataError
from tdlib.data.pictures import open_picture
from tdlib.teacher.model import (
    Teacher,
    TeacherError,
    choice_logits,
    encode_text_tokens,
    patch_boxes,
)
from tdlib.teacher.text import TextTokenizer, open_tokenizer, spans_in_raw

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


@pytest.fixture(scope="module")
def simple() -> TextTokenizer:
    """With offsets over open_clip's own byte-level tokenizer."""
    return TextTokenizer(SimpleTokenizer(), "simple")


def pixels_of(teacher: Teacher, pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([teacher.preprocess(picture) for picture in pictures])


def full_ids(teacher: Teacher, texts: list[str]) -> torch.Tensor:
    return teacher.tokenize.tokenizer(texts)


# Parity with open_clip


def test_pooled_features_are_the_models_own(teacher, pictures):
    with torch.inference_mode():
        image = teacher.model.encode_image(pixels_of(teacher, pictures), normalize=True)
        text = teacher.model.encode_text(full_ids(teacher, TEXTS), normalize=True)
    assert_close(torch.stack([r.pooled for r in teacher.encode_pictures(pictures)]), image, **TOLERANCE)
    assert_close(torch.stack([r.pooled for r in teacher.encode_texts(TEXTS)]), text, **TOLERANCE)


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
        pooled, tokens = encode_text_tokens(model, ids)
        output = model.visual.forward_intermediates(
            pixels_of(teacher, pictures), indices=1, normalize_intermediates=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        image = model.encode_image(pixels_of(teacher, pictures))
    assert_close(tokens[torch.arange(len(ids)), ids.argmax(-1)], pooled, **TOLERANCE)
    assert_close(output["image_intermediates_prefix"][-1][:, 0] @ model.visual.proj, image, **TOLERANCE)


def test_cut_padding_changes_nothing(teacher):
    ids = full_ids(teacher, TEXTS)
    together = teacher.encode_texts(TEXTS)
    with torch.inference_mode():
        whole = F.normalize(encode_text_tokens(teacher.model, ids)[0], dim=-1)
        assert_close(whole, teacher.model.encode_text(ids, normalize=True), **TOLERANCE)
    for text, record, pooled in zip(TEXTS, together, whole, strict=True):
        alone = teacher.encode_texts([text])[0]
        for name in ("projected", "value", "positions", "pooled"):
            assert_close(getattr(alone, name), getattr(record, name), **TOLERANCE)
        assert_close(alone.pooled, pooled, **TOLERANCE)


def test_batches_keep_the_order_and_give_the_same(teacher, pictures):
    for small, large in (
        (teacher.encode_texts(TEXTS, batch_size=1), teacher.encode_texts(TEXTS)),
        (teacher.encode_pictures(pictures, batch_size=2), teacher.encode_pictures(pictures)),
    ):
        for a, b in zip(small, large, strict=True):
            assert_close(a.positions, b.positions)
            assert_close(a.projected, b.projected, **TOLERANCE)
            assert_close(a.value, b.value, **TOLERANCE)


def test_records_are_unit_vectors_of_a_frozen_model(teacher, pictures):
    for record in teacher.encode_texts(TEXTS) + teacher.encode_pictures(pictures):
        for vectors in (record.projected, record.value, record.pooled):
            assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
        assert len(record.projected) == len(record.value) == len(record.positions)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_text_without_words_has_no_tokens_but_a_pooled_feature(teacher):
    (record,) = teacher.encode_texts(["  "])
    assert record.projected.shape == (0, teacher.dim) and record.positions.shape == (0, 2)
    assert_close(record.pooled.norm(), torch.tensor(1.0))


# The value path


def with_own_attention(block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The residual block when every token may attend to itself alone: softmax over one entry is 1."""
    length = hidden.shape[1]
    diagonal = torch.full((length, length), -torch.inf).fill_diagonal_(0)
    return block(hidden, attn_mask=diagonal)


def test_value_path_of_pictures_attends_to_itself_alone(teacher, pictures):
    visual = teacher.model.visual
    with torch.inference_mode():
        before = visual.forward_intermediates(
            pixels_of(teacher, pictures), indices=[0], output_fmt="NLC", output_extra_tokens=True
        )
        hidden = torch.cat([before["image_intermediates_prefix"][0], before["image_intermediates"][0]], dim=1)
        after = visual.ln_post(with_own_attention(visual.transformer.resblocks[1], hidden)) @ visual.proj
    expected = F.normalize(after[:, 1:], dim=-1)
    for record, value in zip(teacher.encode_pictures(pictures), expected, strict=True):
        assert_close(record.value, value, **TOLERANCE)
        assert (record.value - record.projected).norm(dim=-1).min() > 1e-3


def test_value_path_of_texts_attends_to_itself_alone(teacher):
    model = teacher.model
    for text, record in zip(TEXTS, teacher.encode_texts(TEXTS), strict=True):
        ids = torch.tensor([teacher.tokenize(text)[0]])
        length = ids.shape[1]
        with torch.inference_mode():
            hidden = model.token_embedding(ids) + model.positional_embedding[:length]
            hidden = model.transformer.resblocks[0](hidden, attn_mask=model.attn_mask[:length, :length])
            after = model.ln_final(with_own_attention(model.transformer.resblocks[1], hidden))
        expected = F.normalize(after[0] @ model.text_projection, dim=-1)
        assert_close(record.value, expected[1:-1], **TOLERANCE)


# Characters of text tokens

AWKWARD = [
    "I'm sure they'd've gone, wouldn't they?", "CAFÉ  naïve\tco-op\n2024", "a &amp; b &lt;3 &copy; c",
    "👩‍👩‍👧 fun 🎉!!", "ＦＵＬＬ width ﬁne “quotes” … – ½", "x" * 30, "İstanbul ẞ straße",
    "<start_of_text> in the text",
    "", "  ", "日本語のテキスト", "schÃ¶n", "e\u0301clair", "a\u200bb\xa0c\ufeff", "</w> <pad>", "1234.56%",
]  # fmt: skip
few = settings(deadline=None, max_examples=80)
entities = ["&amp;", "&#39;", "'s ", "n't", "  ", "Ã©", "<end_of_text>"]
pieces = [*"abcDE '.,&;#0123<>\n\té½ﬁ…“’İß👍🏽\u0301\u200d\xad", *entities]
texts = st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=40).map("".join)


def check_spans(text: str, ids: list[int], spans: list[tuple[int, int]]) -> None:
    assert len(ids) == len(spans) and spans[0] == spans[-1] == (0, 0)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    inner = spans[1:-1]
    assert all(a <= b and c <= d for (a, c), (b, d) in itertools.pairwise(inner))


def assert_open_clips_ids(tokenize: TextTokenizer, text: str, ids: list[int]) -> None:
    expected = tokenize.tokenizer(text)[0].tolist()  # padded with 0
    assert ids == expected[: len(ids)]
    assert not any(expected[len(ids) :])


@given(texts)
@few
def test_simple_tokenizer_gives_open_clips_ids(simple, text):
    ids, spans = simple(text)
    assert_open_clips_ids(simple, text, ids)
    check_spans(text, ids, spans)


@pytest.mark.parametrize("text", [*TEXTS, *AWKWARD])
def test_both_tokenizers_give_open_clips_ids(simple, teacher, text):
    for tokenize in (simple, teacher.tokenize):
        ids, spans = tokenize(text)
        assert_open_clips_ids(tokenize, text, ids)
        check_spans(text, ids, spans)


@given(text=texts)
@few
def test_hugging_face_tokenizer_gives_open_clips_ids(teacher, text):
    assert isinstance(teacher.tokenize.tokenizer, HFTokenizer)
    ids, spans = teacher.tokenize(text)
    assert_open_clips_ids(teacher.tokenize, text, ids)
    check_spans(text, ids, spans)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
@example("it's  a   test")
@example("R&D AT&T;")
@few
def test_spans_hold_the_pieces_of_plain_text(simple, text):
    """Where cleaning only lowers and joins white space, each span holds exactly its piece."""
    if "&" in text or "<" in text:  # html entities and special tokens are cleaned or read whole
        text = text.replace("&", "+").replace("<", "(")
    for token, (start, end) in list(zip(*simple(text), strict=True))[1:-1]:
        piece = simple.tokenizer.decoder[token].removesuffix("</w>")
        assert text[start:end].lower() == piece


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Cats &amp; dogs", ["Cats", "&", "dogs"]),
        ("a   red\n\numbrella", ["a", "red", "umbrella"]),
        ("“Yes” it's", ['“', "Yes", "”", "it", "'s"]),
        ("the ﬁsh", ["the", "ﬁsh"]),
        ("café!", ["café", "!"]),
        ("  it’s", ["it", "’s"]),
    ],
)  # fmt: skip
def test_spans_point_into_the_raw_text(simple, text, words):
    _, spans = simple(text)
    found = [text[start:end] for start, end in spans[1:-1]]
    for word in words:
        assert word in found or any(word.startswith(piece) for piece in found), (word, found)
    whole = "".join(found)
    assert re.sub(r"\s|amp;", "", text) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q\u0307\u0323 x", ["q\u0307\u0323", "x"]),  # marks in the order that normalisation changes
        ("a\u0302\u0323b cats", ["a\u0302\u0323", "b", "cats"]),
        ("n\u0303o\u0308 end", ["n\u0303", "o\u0308", "end"]),
        ("a  Ｃｕｐ　ｏｆ tea", ["a", "Ｃｕｐ", "ｏｆ", "tea"]),  # full width, with its own space
        ("ﾊﾞｽ  bus", ["ﾊﾞ", "ｽ", "bus"]),  # half width, the mark a letter of its own
        ("＆ ！ ａｂ", ["＆", "！", "ａｂ"]),
        ("the  oﬃce", ["the", "oﬃ", "ﬃce"]),  # one character of three letters, of which a token holds one
        ("\u212bngstro\u0308m", ["\u212b", "ngstr", "o\u0308", "m"]),
    ],
)
def test_letters_that_cleaning_rewrites_keep_their_place(simple, text, words):
    ids, spans = simple(text)
    assert_open_clips_ids(simple, text, ids)
    pieces = [text[start:end] for start, end in spans[1:-1]]
    assert all(pieces), "a token lost its place"
    starts = {start for start, _ in spans[1:-1]} | {len(text)}
    for word in words[:-1] if "ﬃ" in text else words:
        start = text.index(word)
        assert start in starts, (word, pieces)
        assert any(piece in word or word in piece for piece in pieces)
    covered = "".join(text[i] for i in range(len(text)) if any(a <= i < b for a, b in spans[1:-1]))
    assert covered == re.sub(r"\s", "", text)


def test_every_byte_piece_of_a_character_has_its_span(simple):
    text = "a 👍 b"
    _, spans = simple(text)
    inner = [text[start:end] for start, end in spans[1:-1]]
    assert inner[0] == "a" and inner[-1] == "b"
    assert set(inner[1:-1]) == {"👍"}


def test_mini_tokenizers_spans_hold_its_pieces(teacher):
    tokenizer = teacher.tokenize.tokenizer.tokenizer
    for text in TEXTS:
        ids, spans = teacher.tokenize(text)
        for token, (start, end) in list(zip(ids, spans, strict=True))[1:-1]:
            piece = tokenizer.convert_ids_to_tokens(token).removesuffix("</w>")
            assert piece in (text[start:end].lower(), "<unk>")


def test_long_texts_are_cut_at_the_context_length(simple, teacher):
    text = "word " * 200
    for tokenize, length in ((simple, 77), (teacher.tokenize, 48)):
        ids, spans = tokenize(text)
        assert len(ids) == len(spans) == length
        assert_open_clips_ids(tokenize, text, ids)
        check_spans(text, ids, spans)
    (record,) = teacher.encode_texts([text])
    assert len(record.positions) == 46


def test_what_is_cut_at_the_context_length_is_counted(simple, teacher):
    for number in (1, 75, 76, 200):
        assert simple.read("cup " * number).cut == max(0, number - 75)
    whole = teacher.tokenize.tokenizer.tokenizer
    for text in (*TEXTS, "a cup and a dog " * 20):
        tokens = len(whole(text, add_special_tokens=False)["input_ids"])
        assert teacher.tokenize.read(text).cut == teacher.encode_texts([text])[0].cut == max(0, tokens - 46)


def test_a_tokenizer_opens_without_the_weights(teacher, teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    tokenize = open_tokenizer(f"local-dir:{folder}")
    assert [tokenize(text) for text in TEXTS] == [teacher.tokenize(text) for text in TEXTS]
    assert open_tokenizer("ViT-B-16").tokenizer.context_length == 77
    for name in ("local-dir:/no/such/folder", "ViT-Nothing"):
        with pytest.raises(TeacherError, match=re.escape(repr(name))):
            open_tokenizer(name)


@given(st.text(max_size=30), st.text(max_size=30))
@few
def test_spans_in_raw_are_ordered_and_in_range(raw, cleaned):
    spans = spans_in_raw(raw, cleaned, [(i, i + 1) for i in range(len(cleaned))])
    assert all(0 <= start <= end <= len(raw) for start, end in spans)
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(spans))


def test_tokenizers_without_offsets_are_refused():
    with pytest.raises(TeacherError, match="no character offsets"):
        TextTokenizer(object(), "siglip")  # type: ignore[arg-type]


# Boxes of patches


@pytest.mark.parametrize(
    ("size", "mode", "first", "last"),
    [
        ((100, 100), "shortest", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((200, 100), "shortest", (0.25, 0, 0.5, 0.5), (0.5, 0.5, 0.75, 1)),
        ((100, 200), "shortest", (0, 0.25, 0.5, 0.5), (0.5, 0.5, 1, 0.75)),
        ((200, 100), "squash", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((100, 200), "squash", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((200, 100), "longest", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((100, 200), "longest", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
        ((100, 100), "longest", (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)),
    ],
)
def test_patch_boxes_of_a_two_by_two_grid(size, mode, first, last):
    boxes = patch_boxes(size, (32, 32), (2, 2), mode)
    assert_close(boxes[0], torch.tensor(first).float())
    assert_close(boxes[-1], torch.tensor(last).float())


def test_patches_of_the_padding_have_no_area():
    boxes = patch_boxes((200, 100), (32, 32), (4, 4), "longest").view(4, 4, 4)
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    assert (areas[[0, 3]] == 0).all()
    assert_close(areas[1:3], torch.full((2, 4), 1 / 8))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("input_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("size", [(256, 256), (301, 173), (97, 211), (50, 333), (20, 20), (333, 325)])
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


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(120, 80), (80, 120), (100, 100)])
def test_a_painted_square_lights_up_its_patch(size, mode):
    transform = image_transform_v2(PreprocessCfg(size=32, resize_mode=mode), is_train=False)
    boxes = patch_boxes(size, (32, 32), (4, 4), mode)
    for patch in (5, 6, 9, 10):
        picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        left, top, right, bottom = (boxes[patch] * torch.tensor([*size, *size])).round().int().tolist()
        picture[top:bottom, left:right] = 255
        brightness = F.avg_pool2d(transform(Image.fromarray(picture)).mean(0)[None], 8).flatten()
        assert int(brightness.argmax()) == patch
        assert brightness.topk(2).values.diff() < -1  # well ahead of the next


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


def test_the_same_teacher_has_the_same_fingerprint(teacher, teacher_folder):
    assert Teacher(f"local-dir:{teacher_folder}").fingerprint == teacher.fingerprint


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


# Pictures and choices


def test_pictures_of_every_mode_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA", "I;16"):
        path = tmp_path / f"picture-{mode}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, (5, 4)).save(path)
        picture = open_picture(path)
        assert picture.mode == "RGB" and picture.size == (5, 4)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        open_picture(path)


def test_missing_pictures_and_folders_are_named(tmp_path):
    for path in (tmp_path / "nothing.jpg", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path))):
            open_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.data())
@settings(deadline=None, max_examples=120)
def test_damaged_pictures_give_a_picture_or_a_named_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(path, format=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert open_picture(path).mode == "RGB"
    except DataError as error:
        assert str(path) in str(error)


def test_choice_logits_are_clips_scaled_cosines(teacher, pictures):
    image = teacher.encode_pictures(pictures[:1])[0].pooled
    text = torch.stack([record.pooled for record in teacher.encode_texts(TEXTS)])
    with torch.inference_mode():
        expected = teacher.model.get_logits(pixels_of(teacher, pictures[:1]), full_ids(teacher, TEXTS))[0][0]
    assert_close(choice_logits(image, text, teacher.logit_scale), expected, rtol=0, atol=1e-4)
    batch = choice_logits(image.expand(2, -1), text.expand(2, -1, -1), teacher.logit_scale)
    assert_close(batch[1], expected, rtol=0, atol=1e-4)
