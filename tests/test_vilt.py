"""The ViLT student: parity with transformers' model, positions of its tokens, loading."""

import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from region_students import BROKEN_FOLDERS, CLOSE, change, run
from torch.testing import assert_close
from transformers import BertConfig, BertModel, ViltConfig, ViltForMaskedLM, ViltModel

from tdlib.data.examples import TextPart
from tdlib.data.vcr import VcrReader
from tdlib.students.base import StudentError, pad_last
from tdlib.students.registry import load_student
from tdlib.students.vilt import ViltEncoder, ViltForMultipleChoice, embed_patches, pad_pictures

SIZES = {  # height and width in pixels of each picture of a batch
    "own": [(48, 48)],
    "wide": [(48, 80), (48, 80)],
    "mixed": [(48, 48), (32, 80), (64, 16), (48, 48)],
    "inside": [(64, 64), (32, 32)],
}


@pytest.fixture(scope="module")
def student(student_folder) -> ViltForMultipleChoice:
    """The tiny model with larger weights everywhere: its position embeddings would start at 0."""
    model = load_student(str(student_folder)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def encoder(student_folder) -> ViltEncoder:
    return ViltEncoder(str(student_folder))


@pytest.fixture(scope="module")
def examples(world):
    return VcrReader(world, "train").read()


def inputs_of(sizes, choices: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with some padding and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(3, h, w, generator=generator) for h, w in sizes]
    values, mask = pad_pictures(pixels)
    ids = torch.randint(5, 100, (len(sizes), choices, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[:, -1, length - 2 :] = 0
    return {
        "input_ids": ids.masked_fill(attention == 0, 0),
        "attention_mask": attention,
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": values,
        "pixel_mask": mask,
    }


def stock(student, inputs):
    """transformers' own model on one row per choice."""
    choices = inputs["input_ids"].shape[1]
    text = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "token_type_ids")}
    picture = {name: inputs[name].repeat_interleave(choices, 0) for name in ("pixel_values", "pixel_mask")}
    with torch.inference_mode():
        return student.vilt(**text, **picture, output_hidden_states=True)


# Parity


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_and_text_states_equal_the_stock_model(student, sizes):
    inputs = inputs_of(sizes)
    ours, theirs = run(student, inputs), stock(student, inputs)
    length = inputs["input_ids"].shape[-1]
    with torch.inference_mode():
        logits = student.classifier(theirs.pooler_output).view(len(sizes), -1)
    assert_close(ours.logits, logits, **CLOSE)
    real = inputs["attention_mask"].bool()
    layers = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
    assert len(ours.hidden_states) == len(layers) == 3
    for own, layer in zip(ours.hidden_states, layers, strict=True):
        layer = layer.view(*own.shape)
        assert_close(own[:, :, :length][real], layer[:, :, :length][real], **CLOSE)
        assert_close(own[:, :, length], layer[:, :, length], **CLOSE)  # the image's [CLS]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_patch_states_are_the_stock_models_in_another_order(student, sizes):
    inputs = inputs_of(sizes, choices=1)
    ours, theirs = run(student, inputs), stock(student, inputs)
    length = inputs["input_ids"].shape[-1]
    states = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
    for row, (height, width) in enumerate(sizes):
        number = height * width // 256
        for own, their in zip(ours.hidden_states, states, strict=True):
            a, b = own[row, 0, length + 1 :][:number], their[row, length + 1 :][:number]
            distances = torch.cdist(a, b)
            order = distances.argmin(1)
            assert sorted(order.tolist()) == list(range(number))
            assert_close(a, b[order], rtol=0, atol=2e-5)


def test_without_hidden_states_the_logits_are_the_same(student):
    inputs = inputs_of(SIZES["mixed"])
    with torch.inference_mode():
        output = student(**inputs)
    assert output.hidden_states is None and output.spans is None
    assert_close(output.logits, run(student, inputs).logits, rtol=0, atol=0)


def test_a_student_can_be_pickled(student):
    """As ``torch.save`` and processes that are spawned do."""
    again, inputs = pickle.loads(pickle.dumps(student)), inputs_of(SIZES["mixed"])
    assert_close(run(again, inputs).logits, run(student, inputs).logits, rtol=0, atol=0)


# Pictures


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_boxes_are_those_of_each_picture(student, encoder, sizes):
    inputs = inputs_of(sizes)
    output = run(student, inputs)
    length = inputs["input_ids"].shape[-1]
    assert not output.boxes[:, :, :length].any()
    for row, (height, width) in enumerate(sizes):
        boxes = encoder.visual_boxes({"pixels": torch.zeros(3, height, width)})
        for choice in range(2):
            found = output.boxes[row, choice, length:]
            assert_close(found[: len(boxes)], boxes, **CLOSE)
            assert not found[len(boxes) :].any()
            mask = output.attention_mask[row, choice, length:]
            assert mask.tolist() == [1] * len(boxes) + [0] * (len(found) - len(boxes))


def test_boxes_tile_the_picture(encoder):
    boxes = encoder.visual_boxes({"pixels": torch.zeros(3, 48, 80)})
    assert boxes.shape == (16, 4) and not boxes[0].any()
    assert_close(boxes[1], torch.tensor([0, 0, 1 / 5, 1 / 3]))
    assert_close(boxes[5], torch.tensor([4 / 5, 0, 1, 1 / 3]))
    assert_close(boxes[6], torch.tensor([0, 1 / 3, 1 / 5, 2 / 3]))
    assert_close((boxes[:, 2:] - boxes[:, :2]).prod(-1).sum(), torch.tensor(1.0))


@pytest.mark.parametrize("size", [(96, 96), (160, 96), (96, 128)])
def test_patches_stand_in_reading_order(student, encoder, size):
    """One square of a black picture is painted; the embedding that changes is the one whose box holds it."""
    black = Image.new("RGB", size)
    boxes = encoder.visual_boxes({"pixels": encoder.picture(black)})[1:]
    for patch in range(0, len(boxes), 2):
        painted = black.copy()
        left, top, right, bottom = (boxes[patch] * torch.tensor([*size, *size])).round().int().tolist()
        painted.paste((255, 255, 255), (left, top, right, bottom))
        values, mask = pad_pictures([encoder.picture(black), encoder.picture(painted)])
        with torch.inference_mode():
            embedded, _, found = embed_patches(student.vilt, values, mask)
        change = (embedded[1] - embedded[0]).norm(dim=-1)
        assert int(change.argmax()) == patch + 1
        assert_close(found[1, patch + 1], boxes[patch], **CLOSE)


def test_a_picture_is_embedded_once_per_example(student):
    inputs, seen = inputs_of([(48, 48), (48, 48)], choices=4), []
    hook = student.vilt.embeddings.patch_embeddings.register_forward_hook(
        lambda _module, args, _output: seen.append(len(args[0]))
    )
    run(student, inputs)
    hook.remove()
    assert seen == [2]


def test_pictures_are_normalised_and_fit_the_patches(encoder):
    for size in ((256, 256), (301, 173), (97, 211)):
        pixels = encoder.picture(Image.new("RGB", size, "white"))
        assert pixels.shape[0] == 3 and pixels.shape[1] % 16 == pixels.shape[2] % 16 == 0
        assert_close(pixels, torch.ones_like(pixels), **CLOSE)


# Padding


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_padding_changes_no_logits(student, sizes):
    inputs = inputs_of(sizes)
    expected = run(student, inputs).logits
    longer = {name: torch.nn.functional.pad(inputs[name], (0, 5)) for name in ("input_ids", "attention_mask")}
    longer["token_type_ids"] = torch.zeros_like(longer["input_ids"])
    assert_close(run(student, {**inputs, **longer}).logits, expected, **CLOSE)
    for row, (height, width) in enumerate(sizes):  # each picture alone, at its own size
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone["pixel_values"] = alone["pixel_values"][..., :height, :width]
        alone["pixel_mask"] = alone["pixel_mask"][..., :height, :width]
        assert_close(run(student, alone).logits, expected[row : row + 1], **CLOSE)


def test_what_is_drawn_in_the_padding_does_not_matter(student):
    inputs = inputs_of(SIZES["mixed"])
    expected = run(student, inputs).logits
    outside = inputs["pixel_mask"][:, None] == 0
    noise = {"pixel_values": inputs["pixel_values"].masked_fill(outside, 9.0)}
    assert_close(run(student, {**inputs, **noise}).logits, expected, **CLOSE)


def test_choices_and_examples_do_not_see_each_other(student):
    inputs = inputs_of(SIZES["mixed"], choices=3)
    logits = run(student, inputs).logits
    order = torch.tensor([2, 0, 1])
    text = {name: inputs[name][:, order] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert_close(run(student, {**inputs, **text}).logits, logits[:, order], **CLOSE)
    rows = torch.tensor([3, 1, 0, 2])
    assert_close(run(student, {name: v[rows] for name, v in inputs.items()}).logits, logits[rows], **CLOSE)


def test_pad_last_pads_one_axis():
    rows = [torch.ones(2, 3), torch.ones(2, 1)]
    assert pad_last(rows, 3, value=7).tolist() == [[[1, 1, 1]] * 2, [[1, 7, 7]] * 2]
    assert pad_last([torch.ones(1, 2, 2, dtype=torch.bool)], 3)[0].dtype == torch.bool


# Texts


def pieces(encoder: ViltEncoder, ids: torch.Tensor) -> list[str]:
    return [token.removeprefix("##") for token in encoder.tokenizer.convert_ids_to_tokens(ids.tolist())]


def test_spans_of_a_statement_hold_its_word_pieces(encoder, examples):
    seen = 0
    for example in examples:
        text = encoder.text(example)
        assert text.input_ids.shape == text.attention_mask.shape == text.spans.shape[:2]
        for row, statement in enumerate(example.statements()):
            for piece, (start, end) in zip(
                pieces(encoder, text.input_ids[row]), text.spans[row].tolist(), strict=True
            ):
                if piece in encoder.tokenizer.all_special_tokens and piece != "[UNK]":
                    assert (start, end) == (0, 0)
                else:
                    assert statement.text[start:end].lower() == piece or piece == "[UNK]"
                    seen += piece != "[UNK]"
    assert seen > 3000


def test_ids_are_the_tokenizers_own(encoder, examples):
    for example in examples[:10]:
        text = encoder.text(example)
        for row, choice in enumerate(example.choices):
            expected = encoder.tokenizer(example.prompt.text, choice.text)
            length = len(expected["input_ids"])
            assert text.input_ids[row, :length].tolist() == expected["input_ids"]
            assert not text.attention_mask[row, length:].any() and text.attention_mask[row, :length].all()
            assert not text.spans[row, length:].any()
            types = text.token_type_ids[row, :length].tolist()
            assert types == sorted(types) and set(types) == {0, 1}


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_spans_of_any_text_lie_in_their_part(encoder, examples, prompt, choices):
    example = replace(examples[0], prompt=TextPart(prompt), choices=tuple(map(TextPart, choices)))
    text = encoder.text(example)
    for row, statement in enumerate(example.statements()):
        second = text.token_type_ids[row] == 1
        for (start, end), is_second in zip(text.spans[row].tolist(), second.tolist(), strict=True):
            assert 0 <= start <= end <= len(statement.text)
            if end > start:
                assert statement.text[start:end].strip()
                assert start > len(prompt) if is_second else end <= len(prompt)


def test_long_statements_are_cut_in_both_parts(student_folder, examples):
    encoder = ViltEncoder(str(student_folder), max_text_tokens=12)
    long = TextPart("rain " * 30)
    text = encoder.text(replace(examples[0], prompt=long, choices=(long, TextPart("sun"))))
    assert text.input_ids.shape == (2, 12)
    assert text.attention_mask.all()
    statement = f"{long.text} {long.text}"
    words = {statement[start:end] for start, end in text.spans[0].tolist() if end > start}
    assert all("rain".startswith(word) or word in "rain" for word in words)


def test_output_hands_spans_on(student):
    inputs = inputs_of(SIZES["own"])
    spans = torch.randint(0, 50, (1, 2, 7, 2))
    output = run(student, inputs, spans=spans)
    assert torch.equal(output.spans[:, :, :7], spans) and not output.spans[:, :, 7:].any()
    assert not run(student, inputs).spans.any()
    assert output.attention_mask.shape == output.spans.shape[:3]


# Loading


def test_save_and_load(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = load_student(str(tmp_path), seed=5).eval()
    inputs = inputs_of(SIZES["mixed"])
    assert torch.equal(run(again, inputs).logits, run(student, inputs).logits)
    assert again.state_dict().keys() == student.state_dict().keys()


def test_encoder_saves_what_it_needs(encoder, tmp_path, student_folder, examples):
    encoder.save(tmp_path)
    shutil.copy(student_folder / "config.json", tmp_path)
    again = ViltEncoder(str(tmp_path))
    assert torch.equal(again.text(examples[0]).spans, encoder.text(examples[0]).spans)
    picture = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    assert torch.equal(again.picture(picture), encoder.picture(picture))


@pytest.mark.parametrize("kind", [ViltModel, ViltForMaskedLM])
def test_a_stock_checkpoint_gets_a_head_from_the_seed(student, student_folder, tmp_path, kind):
    torch.manual_seed(3)
    stock_model = kind(ViltConfig.from_pretrained(student_folder))
    stock_model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, same, other = (load_student(str(tmp_path), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers stay what they are
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert first.classifier.weight.std() > 0
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    base = getattr(stock_model, "vilt", stock_model)
    for name, parameter in base.named_parameters():
        if "pooler" not in name or kind is ViltModel:
            assert torch.equal(first.vilt.get_parameter(name), parameter), name


def drop_layer(folder):
    from safetensors.torch import load_file, save_file

    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1." not in k}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


BROKEN = BROKEN_FOLDERS | {
    "another width": lambda folder: change(folder, hidden_size=64),
    "another vocabulary": lambda folder: change(folder, vocab_size=77),
    "more layers": lambda folder: change(folder, num_hidden_layers=3),
    "a layer is missing": drop_layer,
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoints_that_do_not_fit_are_refused(student_folder, tmp_path, case):
    folder = tmp_path / "vilt"
    shutil.copytree(student_folder, folder)
    BROKEN[case](folder)
    with pytest.raises(StudentError, match=re.escape(str(folder))):
        load_student(str(folder))


def test_other_architectures_and_missing_folders_are_refused(tmp_path):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=50
    )
    BertModel(config).save_pretrained(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(StudentError, match=re.escape(name)):
            load_student(name)
        with pytest.raises(StudentError, match=re.escape(name)):
            ViltEncoder(name)


@pytest.mark.parametrize("content", [None, "{"])
@pytest.mark.parametrize("pattern", ["*processor_config.json", "tokenizer.json", "config.json"])
def test_encoders_with_a_missing_or_malformed_file_are_refused(student_folder, tmp_path, pattern, content):
    folder = tmp_path / "vilt"
    shutil.copytree(student_folder, folder)
    (path,) = folder.glob(pattern)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(StudentError, match=re.escape(str(folder))):
        ViltEncoder(str(folder))


def test_a_folder_without_any_tokenizer_is_refused(student_folder, tmp_path):
    """transformers makes one of five tokens, which reads every word as unknown."""
    folder = tmp_path / "vilt"
    shutil.copytree(student_folder, folder)
    for path in [*folder.glob("tokenizer*"), *folder.glob("provenance.json")]:
        path.unlink()
    with pytest.raises(StudentError, match=r"words, but its tokenizer 5; save the tokenizer"):
        ViltEncoder(str(folder))


def test_encoders_that_do_not_fit_the_model_are_refused(student_folder, tmp_path):
    with pytest.raises(StudentError, match=r"at most 64.*max_text_tokens=65"):
        ViltEncoder(str(student_folder), max_text_tokens=65)
    folder = tmp_path / "vilt"
    shutil.copytree(student_folder, folder)
    change(folder, patch_size=12)
    with pytest.raises(StudentError, match="size_divisor=16"):
        ViltEncoder(str(folder))
