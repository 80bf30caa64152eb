"""The VL-BERT student: parity with the published equations, its inputs, conversion of official files."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import region_students as small
import torch
from PIL import ExifTags, Image
from region_students import CLOSE, LABELS, TEXT, BoxRegions, gelu, inputs_of, linear, norm, run
from safetensors.torch import load_file
from torch.testing import assert_close

from tdlib.data.examples import Reference, TextPart
from tdlib.data.vcr import render
from tdlib.regions.computed import Regions
from tdlib.students.base import StudentError
from tdlib.students.convert import FORMATS, official_weights
from tdlib.students.convert import convert as convert_checkpoint
from tdlib.students.registry import load_student
from tdlib.students.vlbert import (
    VlBertConfig,
    VlBertEncoder,
    VlBertForClassification,
    VlBertForMultipleChoice,
    geometry,
    referents,
)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    return small.student_folder(tmp_path_factory, tokenizer_folder, small.weighty(small.vlbert))


@pytest.fixture(scope="module")
def student(folder) -> VlBertForMultipleChoice:
    return load_student(str(folder)).eval()


@pytest.fixture(scope="module")
def encoder(folder) -> VlBertEncoder:
    return VlBertEncoder(str(folder), 40, BoxRegions())


# Parity with the equations, in double precision, one token sequence at a time, from the weights alone


def place(box) -> list[float]:
    """2048 numbers of one box, one by one (the authors' ``coordinate_embeddings``)."""
    x1, y1, x2, y2 = box
    numbers = [100 * (x1 + x2) / 2, 100 * (y1 + y2) / 2, 100 * (x2 - x1), 100 * (y2 - y1)]
    return [
        wave(number / 1000 ** (i / 256)) for number in numbers for wave in (math.sin, math.cos)
        for i in range(256)
    ]  # fmt: skip


def equations(table, ids, types, objects, features, boxes, found, heads=4):
    """Hidden states, [END] last, of one unpadded sequence (Su et al. 2020; Devlin et al. 2019)."""
    words, places, kinds = (
        table[f"vlbert.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    where = torch.tensor([place(box) for box in boxes.double().tolist()], dtype=torch.double)
    seen = torch.relu(
        linear(
            torch.cat([where, features.double()], dim=1), table, "image_feature_extractor.obj_downsample.1"
        )
    )
    for_text, for_region = (norm(seen, table, f"vlbert.visual_ln_{name}") for name in ("text", "object"))
    sequence = []
    for i, (token, kind, named) in enumerate(zip(ids, types, objects, strict=True)):
        region = found.tolist().index(named) if named >= 0 and named in found.tolist() else 0
        sequence.append(words[token] + for_text[region] + places[i] + kinds[kind])
    word = table["object_linguistic_embeddings.weight"][0]
    sequence += [word + region + places[len(ids)] + kinds[2] for region in for_region]
    sequence.append(table["vlbert.end_embedding.weight"][0] + places[len(ids) + 1] + kinds[2])
    embedded = norm(torch.stack(sequence), table, "vlbert.embedding_LayerNorm")
    return small.layer_states(embedded, table, "vlbert.encoder", heads)


def double(weights):
    return {name: value.double() for name, value in weights.items()}


def rows_of(inputs):
    """Each example and choice with its real tokens alone: its place, and what ``equations`` takes."""
    for b, c in torch.cartesian_prod(*map(torch.arange, inputs["input_ids"].shape[:2])).tolist():
        text, seen = inputs["attention_mask"][b, c].bool(), inputs["region_mask"][b].bool()
        yield (b, c), (
            *(inputs[name][b, c, text].tolist() for name in ("input_ids", "token_type_ids", "objects")),
            *(inputs[name][b, seen] for name in ("region_features", "region_boxes", "region_objects")),
        )  # fmt: skip


def test_states_and_scores_are_those_of_the_equations(student):
    inputs, table = inputs_of(), double(student.state_dict())
    absent = (inputs["objects"][..., None] == inputs["region_objects"][:, None, None]).any(-1)
    assert (~absent & (inputs["objects"] >= 0)).any() and (absent & (inputs["objects"] >= 0)).any()
    output = run(student, inputs)
    for (b, c), row in rows_of(inputs):
        states = equations(table, *row)
        real = output.attention_mask[b, c].bool()
        for own, expected in zip(output.hidden_states, states, strict=True):
            assert_close(own[b, c, real].double(), expected[:-1], **CLOSE)  # without [END]
        pooled = torch.tanh(linear(states[-1][0], table, "vlbert.pooler.dense"))
        score = linear(pooled, table, "classifier.1")[0]
        assert_close(output.logits[b, c].double(), score, **CLOSE)


def test_label_scores_are_those_of_the_equations(folder):
    student = load_student(str(folder), labels=LABELS).eval()
    assert isinstance(student, VlBertForClassification)
    inputs, table = inputs_of(choices=1), double(student.state_dict())
    logits = run(student, inputs).logits
    assert logits.shape == (3, 3) and student.config.id2label == dict(enumerate(LABELS))
    for (b, _), row in rows_of(inputs):
        slot = equations(table, *row)[-1][len(row[0]) - 2]
        inner = norm(gelu(linear(slot, table, "classifier.0.dense")), table, "classifier.0.LayerNorm")
        assert_close(logits[b].double(), linear(inner, table, "classifier.2"), **CLOSE)


def test_geometry_is_that_of_the_authors():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.125, 0.5, 0.25, 0.625]], dtype=torch.double)
    expected = torch.tensor([place(box) for box in boxes.tolist()], dtype=torch.double)
    assert_close(geometry(boxes), expected)
    assert geometry(boxes.view(2, 1, 4)).shape == (2, 1, 2048)


# Inputs


class WholeLast(BoxRegions):
    def __call__(self, example):
        regions = super().__call__(example)
        order = [*range(1, len(regions.boxes)), 0]
        return Regions(regions.features[order], regions.boxes[order], regions.objects[order])


def test_the_whole_picture_comes_first(folder, examples):
    """And it ends where the authors' does: at pixel (width - 1, height - 1), counted from 0."""
    example, last = examples[0], torch.tensor([0, 0, 255 / 256, 255 / 256])
    encoder = VlBertEncoder(str(folder), 40, WholeLast())
    given, moved = encoder.regions(example), encoder.visual(example)
    assert Image.open(example.image).size == (256, 256)
    assert moved["region_boxes"][0, 2:].tolist() == [255 / 256, 255 / 256]
    given = replace(given, boxes=given.boxes.minimum(torch.tensor(255 / 256)))
    for name in ("features", "boxes", "objects"):
        value = getattr(given, name)
        assert torch.equal(moved[f"region_{name}"], torch.cat([value[-1:], value[:-1]]))
    without = VlBertEncoder(str(folder), 40, BoxRegions(whole=False))
    given, added = without.regions(example), without.visual(example)
    assert torch.equal(added["region_features"], torch.cat([given.features.mean(0)[None], given.features]))
    assert torch.equal(added["region_boxes"][0], last) and added["region_objects"][0] == -1
    assert torch.equal(added["region_boxes"][1:], given.boxes.minimum(torch.tensor(255 / 256)))
    assert torch.equal(added["region_objects"][1:], given.objects)
    nothing = without.visual(replace(example, boxes=()))
    assert torch.equal(nothing["region_boxes"], last[None]) and not nothing["region_features"].any()
    # An object may fill the picture: it is still not what texts without an object show.
    filling = without.visual(replace(example, boxes=((0.0, 0.0, 1.0, 1.0),)))
    assert filling["region_objects"].tolist() == [-1, 0]
    for visual in (moved, added):
        blank = encoder.blank(visual)
        assert {name: len(value) for name, value in blank.items()} == dict.fromkeys(visual, 1)
        assert torch.equal(blank["region_boxes"], visual["region_boxes"][:1])
        assert not blank["region_features"].any()


def test_boxes_end_within_the_pixels_of_their_picture(folder, tmp_path, examples):
    """Of a picture of 200 x 50, upright, whether the source of the regions knows its size or not."""
    Image.new("RGB", (200, 50)).save(tmp_path / "wide.jpg")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 200)).save(tmp_path / "turned.jpg", exif=turned)
    boxes = ((0.0, 0.0, 0.5, 0.5), (0.9, 0.9, 1.0, 1.0))
    expected = torch.tensor([[0, 0, 0.995, 0.98], [0, 0, 0.5, 0.5], [0.9, 0.9, 0.995, 0.98]])
    encoder = VlBertEncoder(str(folder), 40, BoxRegions(whole=False))
    for name in ("wide.jpg", "turned.jpg"):
        example = replace(examples[0], image=tmp_path / name, boxes=boxes)
        assert_close(encoder.visual(example)["region_boxes"], expected, **CLOSE)
    missing = replace(example, image=tmp_path / "missing.jpg")
    assert encoder.visual(missing)["region_boxes"][0].tolist() == [0, 0, 1, 1]  # not known, so not cut
    known = replace(encoder.regions(missing), size=(200, 50))
    assert_close(encoder.arrange(known, missing).boxes, expected, **CLOSE)


def test_tokens_show_the_object_that_they_refer_to(encoder, student, examples):
    """A reference changes what its words show and nothing else, before the layers mix it."""
    start = examples[0].prompt.text.index(" ") + 1
    plain = replace(examples[0], prompt=TextPart(examples[0].prompt.text))
    named = replace(plain, prompt=replace(plain.prompt, references=(Reference(start, start + 2, (1,)),)))
    visual = encoder.pad_visual([encoder.visual(plain)])
    states = []
    for example in (plain, named):
        text = encoder.text(example)
        own = {name: getattr(text, name)[None] for name in (*TEXT, "spans")} | visual
        states.append(run(student, {name: own[name] for name in student.inputs}).hidden_states[0][0])
    differs = (states[0] != states[1]).any(-1)
    assert torch.equal(differs[:, : text.objects.shape[1]] & (text.objects >= 0), text.objects == 1)
    assert differs.sum() == (text.objects == 1).sum() == len(example.choices)


def test_each_of_several_names_shows_its_own_object(encoder, examples):
    """ "and" shows the whole picture, as in the authors' vcr.py; VisualBERT aligns the same objects."""
    names = ["person", "person", "person"]
    spoken = render(["What", "are", [1, 2], "talking", "about", "?"], names)
    example = replace(examples[0], prompt=spoken, choices=(), boxes=((0, 0, 1, 1),) * 3, names=tuple(names))
    text = encoder.text(example)
    which = referents(text.objects[None], torch.tensor([[-1, 0, 1, 2]])).long().argmax(-1)[0, 0]

    def regions(word: str) -> set[int]:
        start, end = spoken.text.index(word), spoken.text.index(word) + len(word)
        inside = (text.spans[0, :, 0] < end) & (text.spans[0, :, 1] > start)
        return set(which[inside].tolist())

    assert [regions(word) for word in ("are", "Riley", "and", "Jessie", "talking")] == [
        {0},
        {2},
        {0},
        {3},
        {0},
    ]


def test_texts_are_those_of_the_authors(encoder, examples):
    prompt = "why is it raining ? rain"
    example = replace(examples[0], prompt=TextPart(prompt), given=0, choices=(TextPart("sun"),))
    text = encoder.text(example)
    ids = encoder.tokenizer(prompt, "sun", return_token_type_ids=True)
    assert text.input_ids[0].tolist() == ids["input_ids"]
    assert text.token_type_ids[0].tolist() == ids["token_type_ids"]
    given = encoder.text(replace(example, given=len("why is it raining ? ")))  # no separator of its own
    assert torch.equal(given.input_ids, text.input_ids) and torch.equal(given.spans, text.spans)
    assert torch.equal(given.token_type_ids, text.token_type_ids)


def test_a_question_without_choices_ends_in_a_mask(encoder, examples):
    example = replace(examples[0], prompt=TextPart("is it raining ?"), choices=())
    text = encoder.text(example)
    ids = encoder.tokenizer("is it raining ?", "[MASK]", return_token_type_ids=True)
    assert text.input_ids[0].tolist() == ids["input_ids"]
    assert text.token_type_ids[0].tolist() == ids["token_type_ids"]
    assert text.input_ids[0, -2] == encoder.tokenizer.mask_token_id
    assert not text.spans[0, -2:].any() and (text.objects[0, -2:] == -1).all()
    assert int(text.spans.max()) <= len(example.prompt.text)
    long = encoder.text(replace(example, prompt=TextPart("rain " * 60)))  # cut before the mask
    assert long.input_ids.shape == (1, 40) and long.input_ids[0, -2] == encoder.tokenizer.mask_token_id


def test_regions_and_the_end_need_positions(folder):
    with pytest.raises(StudentError, match=r"64 positions.*max_text_tokens=63"):
        VlBertEncoder(str(folder), 63, BoxRegions())
    VlBertEncoder(str(folder), 62, BoxRegions())


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
def test_the_longest_text_has_positions(folder, labels):
    student = load_student(str(folder), labels=labels).eval()
    inputs = inputs_of(batch=1, choices=1, length=62)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert run(student, inputs).logits.isfinite().all()


# Loading


def test_a_new_student_starts_without_the_picture():
    student = small.vlbert().eval()
    assert not student.vlbert.visual_ln_text.weight.any() and not student.vlbert.visual_ln_object.weight.any()
    inputs = inputs_of()
    other = {"region_features": inputs["region_features"] + 1}
    assert torch.equal(run(student, inputs).logits, run(student, {**inputs, **other}).logits)


# Conversion


def official_shapes(words, width, inner, layers, positions=512, features=2048, prefix="module.") -> dict:
    """Parameters of the authors' pretraining model, from features that are computed in advance.

    (jackroos/VL-BERT, common/visual_linguistic_bert.py, common/fast_rcnn.py and
    pretrain/modules/resnet_vlbert_for_pretraining_multitask.py, cfgs/pretrain/base_prec_4x16G_fp32.yaml)
    """

    shapes = {
        **small.dense("image_feature_extractor.obj_downsample.1", width, 2048 + features),
        "object_linguistic_embeddings.weight": (1, width),
        "object_mask_visual_embedding.weight": (1, 2048),
        "object_mask_word_embedding.weight": (1, width),
        "aux_text_visual_embedding.weight": (1, width),
        "vlbert.word_embeddings.weight": (words, width),
        "vlbert.end_embedding.weight": (1, width),
        "vlbert.position_embeddings.weight": (positions, width),
        "vlbert.token_type_embeddings.weight": (3, width),
        **small.scale("vlbert.embedding_LayerNorm", width),
        **small.scale("vlbert.visual_ln_text", width),
        **small.scale("vlbert.visual_ln_object", width),
    }
    shapes |= small.layer_shapes("vlbert.encoder", width, inner, layers)
    word_head = "vlbert.mlm_head.predictions"
    shapes |= {f"{word_head}.bias": (words,), f"{word_head}.decoder.weight": (words, width)}
    shapes |= small.dense(f"{word_head}.transform.dense", width, width) | small.scale(
        f"{word_head}.transform.LayerNorm", width
    )
    shapes |= small.dense("vlbert.mvrc_head.transform.dense", width, width)
    shapes |= small.dense("vlbert.mvrc_head.region_cls_pred", 1601, width)
    return {prefix + name: shape for name, shape in shapes.items()}


DETECTOR = {  # some of what an end-to-end checkpoint has of its detector, by its kinds
    "module.image_feature_extractor.backbone.layer1.0.conv1.weight": (64, 64, 1, 1),
    "module.image_feature_extractor.backbone.bn1.num_batches_tracked": (),
    "module.image_feature_extractor.roi_head_feature_extractor.0.conv1.weight": (5, 10, 1, 1),
    "module.image_feature_extractor.head.0.0.conv1.weight": (5, 10, 1, 1),
    "module.image_feature_extractor.regularizing_predictor.weight": (81, 20),
}
PRETRAINING = re.compile(r"object_mask|aux_text|mlm_head\.predictions\.(bias|decoder)|mvrc_head")


def official_state(words=300, **sizes) -> dict[str, torch.Tensor]:
    """Random weights under the official names: two layers, 64 wide."""
    return small.random_state(official_shapes(words, 64, 96, 2, positions=48, features=6, **sizes))


def convert(state, tmp_path, tokenizer_folder, **options):
    """Converts a state dict; the folder, and the names that were left out."""
    whole = {"state_dict": state, "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.ones(2)}}},
             "validation_monitor": {"best_epoch": 3, "best_val": 0.7}}  # fmt: skip
    # The form that torch wrote in 2019, when the official files were made.
    torch.save(whole, tmp_path / "vl-bert.model", _use_new_zipfile_serialization=False)
    folder = tmp_path / "converted"
    return folder, convert_checkpoint(
        "vl-bert", tmp_path / "vl-bert.model", folder, tokenizer_folder, **options
    )


@pytest.mark.parametrize("width, layers", [(768, 12), (1024, 24)])
@pytest.mark.parametrize("detector", [{}, DETECTOR], ids=["prec", "e2e"])
def test_official_sizes_are_recognised(width, layers, detector):
    shapes = official_shapes(30522, width, 4 * width, layers) | detector
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config, weights, left_out = official_weights(FORMATS["vl-bert"], state, "vl-bert.model")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        width, layers, width // 64,
    )  # fmt: skip
    assert (config.vocab_size, config.visual_embedding_dim, config.type_vocab_size) == (30522, 2048, 3)
    assert (config.intermediate_size, config.max_position_embeddings) == (4 * width, 512)
    assert set(left_out) == {name for name in state if PRETRAINING.search(name)} | detector.keys()
    assert len(weights) + len(left_out) == len(state)


def test_a_converted_checkpoint_computes_the_equations(tmp_path, tokenizer_folder):
    state = official_state()
    folder, left_out = convert(state, tmp_path, tokenizer_folder)
    stored = load_file(folder / "model.safetensors")
    transform = "vlbert.mlm_head.predictions.transform."
    kept = {
        name.removeprefix("module.").replace(transform, "classifier.0."): value
        for name, value in state.items() if name not in left_out
    }  # fmt: skip
    assert stored.keys() == kept.keys() and all(torch.equal(stored[name], kept[name]) for name in kept)
    inputs = inputs_of(choices=1)
    for student in (load_student(str(folder)), load_student(str(folder), labels=LABELS)):
        output = run(student.eval(), inputs)
        for (b, c), row in rows_of(inputs):
            states = equations(double(stored), *row, heads=1)
            real = output.attention_mask[b, c].bool()
            assert_close(output.hidden_states[-1][b, c, real].double(), states[-1][:-1], **CLOSE)
    for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        assert torch.equal(student.classifier[0].get_parameter(name), stored[f"classifier.0.{name}"])
    encoder = VlBertEncoder(str(folder), 40, BoxRegions())
    assert len(encoder.tokenizer) == encoder.config.vocab_size == 300


def test_finetuned_checkpoints_fit(tmp_path, tokenizer_folder):
    """VCR's wraps the model once more, and has a pooler and heads of its own; one GPU says no ``module.``."""
    state = {
        name.replace("vlbert.", "vlbert._module."): value
        for name, value in official_state(prefix="").items() if not PRETRAINING.search(name)
        and "mlm_head" not in name
    }  # fmt: skip
    pooler = {
        "vlbert._module.pooler.dense.weight": torch.eye(64),
        "vlbert._module.pooler.dense.bias": torch.ones(64),
    }
    heads = {"final_mlp.1.weight": torch.ones(1, 64), "cnn_loss_reg.2.bias": torch.ones(81)}
    folder, left_out = convert({**state, **pooler, **heads}, tmp_path, tokenizer_folder)
    assert left_out == sorted(heads)
    student = load_student(str(folder))
    assert torch.equal(student.vlbert.pooler.dense.weight, torch.eye(64))
    assert student.classifier[1].weight.std() > 0


def test_vcr_starts_answers_as_questions(tmp_path, tokenizer_folder):
    state = official_state()
    folder, _ = convert({k: v.half() for k, v in state.items()}, tmp_path, tokenizer_folder, vcr=True)
    stored = load_file(folder / "model.safetensors")
    given = state["module.vlbert.token_type_embeddings.weight"].half().float()
    assert torch.equal(stored["vlbert.token_type_embeddings.weight"], given[[0, 0, 2]])
    assert {value.dtype for value in stored.values()} == {torch.float32}


REFUSED = small.refused("module.", "vlbert") | {
    "two types": (
        lambda s: s.update({"module.vlbert.token_type_embeddings.weight": torch.ones(2, 64)}),
        "2 token types .* expected .* 3 types",
    ),
    "no geometry": (
        lambda s: s.update({"module.image_feature_extractor.obj_downsample.1.weight": torch.ones(64, 2048)}),
        "2048 numbers per region; expected .* more than 2048",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, tokenizer_folder, case):
    spoil, message = REFUSED[case]
    state = official_state()
    spoil(state)
    with pytest.raises(StudentError, match=message) as error:
        convert(state, tmp_path, tokenizer_folder)
    assert "vl-bert.model" in str(error.value)
    assert not (tmp_path / "converted").exists()


def test_the_config_is_that_of_the_authors():
    config = VlBertConfig()
    with torch.device("meta"):
        state = VlBertForMultipleChoice(config).state_dict()
    names = {
        f"module.{k}": tuple(v.shape)
        for k, v in state.items()
        if not k.startswith(("classifier", "vlbert.pooler"))
    }
    official = official_shapes(30522, 768, 3072, 12)
    assert names == {k: v for k, v in official.items() if not PRETRAINING.search(k) and "mlm_head" not in k}
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (config.layer_norm_eps, config.hidden_act, config.model_type) == (1e-12, "gelu", "vl-bert")
