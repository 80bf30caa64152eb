"""The UNITER student: parity with the published equations, its inputs, conversion of official files."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import region_students as small
import torch
from region_students import CLOSE, LABELS, TEXT, BoxRegions, change, gelu, inputs_of, linear, norm, run
from safetensors.torch import load_file
from torch.testing import assert_close

from tdlib.data.examples import TextPart
from tdlib.data.vcr import PERSON_TOKENS
from tdlib.students.base import StudentError
from tdlib.students.convert import FORMATS, official_weights
from tdlib.students.convert import convert as convert_checkpoint
from tdlib.students.convert import main as convert_command
from tdlib.students.registry import load_student
from tdlib.students.uniter import (
    UniterConfig,
    UniterEncoder,
    UniterForClassification,
    UniterForMultipleChoice,
    UniterModel,
)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    return small.student_folder(tmp_path_factory, tokenizer_folder, small.weighty(small.uniter))


@pytest.fixture(scope="module")
def student(folder) -> UniterForMultipleChoice:
    return load_student(str(folder)).eval()


@pytest.fixture(scope="module")
def encoder(folder) -> UniterEncoder:
    return UniterEncoder(str(folder), 40, BoxRegions())


# Parity with the equations, in double precision, one token sequence at a time, from the weights alone


def equations(weights, ids, types, features, boxes, heads=4):
    """Hidden states and pooled [CLS] of one unpadded sequence (Chen et al. 2020; Devlin et al. 2019)."""
    table = {k.removeprefix("uniter."): v.double() for k, v in weights.items()}
    words, places, kinds = (
        table[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    text = [words[token] + places[i] + kinds[t] for i, (token, t) in enumerate(zip(ids, types, strict=True))]
    text = norm(torch.stack(text), table, "embeddings.LayerNorm")
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    place = torch.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], dim=-1)
    image = "img_embeddings"
    seen = norm(linear(features.double(), table, f"{image}.img_linear"), table, f"{image}.img_layer_norm")
    place = norm(linear(place, table, f"{image}.pos_linear"), table, f"{image}.pos_layer_norm")
    regions = norm(seen + place + kinds[1], table, f"{image}.LayerNorm")
    states = small.layer_states(torch.cat([text, regions]), table, "encoder", heads)
    return states, torch.tanh(linear(states[-1][0], table, "pooler.dense"))


def head(weights, pooled, activation):
    table = {k: v.double() for k, v in weights.items()}
    return linear(norm(activation(linear(pooled, table, "classifier.0")), table, "classifier.2"), table,
                  "classifier.3")  # fmt: skip


def rows_of(inputs):
    """Each example and choice with its real tokens alone: its place, and what ``equations`` takes."""
    for b, c in torch.cartesian_prod(*map(torch.arange, inputs["input_ids"].shape[:2])).tolist():
        text, seen = inputs["attention_mask"][b, c].bool(), inputs["region_mask"][b].bool()
        yield (b, c), (
            inputs["input_ids"][b, c, text].tolist(), inputs["token_type_ids"][b, c, text].tolist(),
            inputs["region_features"][b, seen], inputs["region_boxes"][b, seen],
        )  # fmt: skip


def test_states_and_scores_are_those_of_the_equations(student):
    inputs, weights = inputs_of(objects=False), student.state_dict()
    output = run(student, inputs)
    for (b, c), row in rows_of(inputs):
        states, pooled = equations(weights, *row)
        real = output.attention_mask[b, c].bool()
        for own, expected in zip(output.hidden_states, states, strict=True):
            assert_close(own[b, c, real].double(), expected, **CLOSE)
        wrong, right = head(weights, pooled, torch.relu)
        assert_close(output.logits[b, c].double(), right - wrong, **CLOSE)


def test_label_scores_are_those_of_the_equations(folder):
    torch.manual_seed(1)
    student = load_student(str(folder), labels=LABELS).eval()
    assert isinstance(student, UniterForClassification)
    inputs, weights = inputs_of(choices=1, objects=False), student.state_dict()
    logits = run(student, inputs).logits
    assert logits.shape == (3, 3) and student.config.id2label == dict(enumerate(LABELS))
    for (b, _), row in rows_of(inputs):
        assert_close(logits[b].double(), head(weights, equations(weights, *row)[1], gelu), **CLOSE)


def test_the_authors_loss_is_the_binary_cross_entropy_of_the_score(student):
    pair = torch.randn(5, 2, dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0, 1])
    expected = torch.nn.functional.cross_entropy(pair, target)
    score = student.classifier[4](pair)[:, 0]
    assert_close(torch.nn.functional.binary_cross_entropy_with_logits(score, target.double()), expected)


# Inputs


def test_token_types_are_the_authors(encoder, examples):
    prompt = "why is it raining ? rain"
    example = replace(
        examples[0], prompt=TextPart(prompt), given=len("why is it raining ? "), choices=(TextPart("sun"),)
    )
    text = encoder.text(example)
    parts = {prompt[: example.given]: 0, "rain": 2, "sun": 3}
    statement = f"{prompt} sun"
    for (start, end), kind in zip(text.spans[0].tolist(), text.token_type_ids[0].tolist(), strict=True):
        if end > start:
            assert kind == (3 if start > len(prompt) else 2 if start >= example.given else 0)
            assert any(statement[start:end] in part for part, own in parts.items() if own == kind)
    assert text.token_type_ids[0, 0] == 0 and text.token_type_ids[0].unique().tolist() == [0, 2, 3]
    assert encoder.text(replace(example, given=0)).token_type_ids.unique().tolist() == [0, 2]
    assert not encoder.text(replace(example, given=0, choices=())).token_type_ids.any()


def test_choices_need_their_token_types(folder, tmp_path, examples):
    copy = tmp_path / "uniter"
    shutil.copytree(folder, copy)
    change(copy, type_vocab_size=2)
    encoder = UniterEncoder(str(copy), 40, BoxRegions())
    assert not encoder.text(replace(examples[0], choices=())).token_type_ids.any()
    with pytest.raises(StudentError, match=rf"2 token types.*{examples[0].id}.*--vcr"):
        encoder.text(examples[0])


# Loading


def test_a_checkpoint_without_head_gets_one_from_the_seed(student, tmp_path):
    student.uniter.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, same, other = (load_student(str(tmp_path), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.classifier[0].weight, same.classifier[0].weight)
    assert first.classifier[0].weight.std() > 0 and not first.classifier[0].bias.any()
    assert not torch.equal(first.classifier[0].weight, other.classifier[0].weight)
    for name, parameter in student.uniter.named_parameters():
        assert torch.equal(first.uniter.get_parameter(name), parameter), name


# Conversion


def official_shapes(words, width, inner, layers, positions=512, types=2, regions=2048) -> dict[str, tuple]:
    """Parameters of the authors' pretraining model (ChenRocks/UNITER, model/{model,layer,pretrain}.py)."""

    shapes = {
        "uniter.embeddings.word_embeddings.weight": (words, width),
        "uniter.embeddings.position_embeddings.weight": (positions, width),
        "uniter.embeddings.token_type_embeddings.weight": (types, width),
        **small.scale("uniter.embeddings.LayerNorm", width),
        **small.dense("uniter.img_embeddings.img_linear", width, regions),
        **small.scale("uniter.img_embeddings.img_layer_norm", width),
        **small.scale("uniter.img_embeddings.pos_layer_norm", width),
        **small.dense("uniter.img_embeddings.pos_linear", width, 7),
        "uniter.img_embeddings.mask_embedding.weight": (2, regions),
        **small.scale("uniter.img_embeddings.LayerNorm", width),
    }
    return {
        **shapes,
        **small.layer_shapes("uniter.encoder", width, inner, layers),
        **small.dense("uniter.pooler.dense", width, width),
        "cls.predictions.bias": (words,),
        **small.dense("cls.predictions.transform.dense", width, width),
        **small.scale("cls.predictions.transform.LayerNorm", width),
        "cls.predictions.decoder.weight": (words, width),
        "feat_regress.weight": (width, regions),
        "feat_regress.bias": (regions,),
        **small.dense("feat_regress.net.0", width, width),
        **small.scale("feat_regress.net.2", width),
        **small.dense("region_classifier.net.0", width, width),
        **small.scale("region_classifier.net.2", width),
        **small.dense("region_classifier.net.3", 1601, width),
        **small.dense("itm_output", 2, width),
    }


def official_state(words=300, **sizes) -> dict[str, torch.Tensor]:
    """Random weights under the official names: two layers, 64 wide."""
    state = small.random_state(official_shapes(words, 64, 96, 2, positions=48, regions=6, **sizes))
    state["cls.predictions.decoder.weight"] = state["uniter.embeddings.word_embeddings.weight"]  # tied
    state["feat_regress.weight"] = state["uniter.img_embeddings.img_linear.weight"]
    return state


def convert(state, tmp_path, tokenizer_folder, **options):
    """Converts a state dict; the folder, and the names that were dropped."""
    # The form that torch wrote in 2020, when the official files were made.
    torch.save(state, tmp_path / "uniter.pt", _use_new_zipfile_serialization=False)
    folder = tmp_path / "converted"
    return folder, convert_checkpoint("uniter", tmp_path / "uniter.pt", folder, tokenizer_folder, **options)


@pytest.mark.parametrize("width, layers, count", [(768, 12, 111_082_752), (1024, 24, 337_800_192)])
def test_official_sizes_are_recognised(width, layers, count):
    shapes = official_shapes(28996, width, 4 * width, layers)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config, weights, dropped = official_weights(FORMATS["uniter"], state, "uniter.pt")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        width, layers, width // 64,
    )  # fmt: skip
    assert (config.vocab_size, config.img_dim, config.type_vocab_size) == (28996, 2048, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (4 * width, 512)
    assert set(dropped) == {
        name for name in state if not name.startswith("uniter.") or "mask_embedding" in name
    }
    assert weights.keys() == state.keys() - set(dropped)


def test_a_converted_checkpoint_computes_the_equations(tmp_path, tokenizer_folder):
    state = official_state()
    folder, dropped = convert(state, tmp_path, tokenizer_folder)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == {name for name in state if name.startswith("uniter.")} - set(dropped)
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    student = load_student(str(folder)).eval()
    inputs = {**inputs_of(objects=False), "token_type_ids": torch.zeros(3, 2, 7, dtype=torch.long)}
    output = run(student, inputs)
    for (b, c), row in rows_of(inputs):
        states, _ = equations(state, *row, heads=1)
        assert_close(output.hidden_states[-1][b, c, output.attention_mask[b, c].bool()].double(),
                     states[-1], **CLOSE)  # fmt: skip
    encoder = UniterEncoder(str(folder), 48, BoxRegions())
    assert len(encoder.tokenizer) == encoder.config.vocab_size == 300


def renamed(state):
    """As older files have it."""
    names = {
        name: re.sub(r"(LayerNorm|layer_norm)\.weight$", r"\1.gamma",
                     re.sub(r"(LayerNorm|layer_norm)\.bias$", r"\1.beta", name)).replace("uniter.", "bert.")
        for name in state
    }  # fmt: skip
    return {names[name]: value for name, value in state.items()}


@pytest.mark.parametrize(
    "form",
    [renamed, lambda state: {"model_state": state}, lambda state: {k: v.half() for k, v in state.items()}],
    ids=["old names", "nested", "half precision"],
)
def test_other_forms_of_a_checkpoint_say_the_same(tmp_path, tokenizer_folder, form):
    state = official_state()
    folder, dropped = convert(form(state), tmp_path, tokenizer_folder)
    stored = load_file(folder / "model.safetensors")
    assert len(stored) + len(dropped) == len(state)
    for name, value in stored.items():
        assert value.dtype == torch.float32
        assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def test_vcr_adds_token_types_and_people(tmp_path, tokenizer_folder, examples):
    state = official_state()
    folder, _ = convert(state, tmp_path, tokenizer_folder, vcr=True)
    stored = load_file(folder / "model.safetensors")
    types = stored["uniter.embeddings.token_type_embeddings.weight"]
    given = state["uniter.embeddings.token_type_embeddings.weight"]
    assert torch.equal(types, given[[0, 1, 0, 0]])
    words = stored["uniter.embeddings.word_embeddings.weight"]
    assert torch.equal(words[:300], state["uniter.embeddings.word_embeddings.weight"])
    assert words.shape == (381, 64) and 0.019 < words[300:].std() < 0.021
    encoder = UniterEncoder(str(folder), 48, BoxRegions())
    assert encoder.tokenizer.convert_tokens_to_ids(PERSON_TOKENS) == list(range(300, 381))
    text = encoder.text(replace(examples[0], prompt=TextPart("is person_12 near person_1 's umbrella?")))
    people = text.input_ids[0] >= 300
    assert text.input_ids[0, people].tolist() == [312, 301]
    assert text.spans[0, people].tolist() == [[3, 12], [18, 26]]
    student = load_student(str(folder))
    batch = encoder.pad_visual([encoder.visual(examples[0])])
    own = {name: getattr(text, name)[None] for name in (*TEXT, "spans")} | batch
    assert run(student, {name: own[name] for name in student.inputs}).logits.isfinite().all()


def test_new_rows_are_the_same_each_time(tmp_path, tokenizer_folder):
    rows, random = [], torch.random.get_rng_state()
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        folder, _ = convert(official_state(), place, tokenizer_folder, vcr=True)
        rows.append(load_file(folder / "model.safetensors")["uniter.embeddings.word_embeddings.weight"][300:])
    assert torch.equal(rows[0], rows[1]) and 0 < rows[0].std(0).min()
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_pretraining_on_vcr_has_learnt_is_kept(tmp_path, tokenizer_folder):
    state = official_state(words=381, types=4)
    folder, _ = convert(state, tmp_path, tokenizer_folder, vcr=True)
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, state[name]), name
    assert len(UniterEncoder(str(folder), 48, BoxRegions()).tokenizer) == 381


WORDS = "uniter.embeddings.word_embeddings.weight"
TYPES = "uniter.embeddings.token_type_embeddings.weight"
REFUSED = small.refused("", "uniter") | {
    "not finite": (lambda s: s[WORDS].fill_(float("nan")), "no finite numbers"),
    "quantised": (lambda s: s.update({WORDS: s[WORDS].to(torch.int8)}), r"holds torch\.int8"),
    "twice": (
        lambda s: s.update({f"bert.{WORDS.removeprefix('uniter.')}": s[WORDS]}),
        rf"two parameters would be {re.escape(WORDS)}",
    ),
    "unknown": (lambda s: s.update({"own_head.bias": torch.ones(2)}), r"1 unknown \(own_head.bias\).*--drop"),
    "no matrix": (lambda s: s.update({WORDS: torch.ones(3)}), rf"no matrix: {re.escape(WORDS)} \(3,\)"),
    "three types": (
        lambda s: s.update({TYPES: torch.ones(3, 64)}), "3 token types .*expected .* 2 or 4 types"
    ),
    "vocabulary of VCR": (
        lambda s: s.update({WORDS: torch.ones(381, 64)}), r"has 300 tokens, but .* has 381.*vcr=True"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, tokenizer_folder, case):
    spoil, message = REFUSED[case]
    state = official_state()
    spoil(state)
    with pytest.raises(StudentError, match=message) as error:
        convert(state, tmp_path, tokenizer_folder)
    assert "uniter.pt" in str(error.value)
    assert not (tmp_path / "converted").exists()


def test_a_finetuned_checkpoint_is_converted_without_its_head(tmp_path, tokenizer_folder, monkeypatch):
    """The authors' heads are known; others are named, also to the command."""
    heads = {"vqa_output.0.weight": torch.ones(128, 64), "vcr_output.3.bias": torch.ones(2)}
    backbone = {name: value for name, value in official_state().items() if name.startswith("uniter.")}
    folder, dropped = convert({**backbone, **heads}, tmp_path, tokenizer_folder)
    assert set(dropped) == {*heads, "uniter.img_embeddings.mask_embedding.weight"}
    torch.save({**backbone, "ITM.weight": torch.ones(2, 64), "own.bias": torch.ones(2)}, tmp_path / "own.pt")
    arguments = ["convert", "uniter", str(tmp_path / "own.pt"), str(tmp_path / "own"), "--tokenizer",
                 str(tokenizer_folder), "--drop", "ITM.", "--drop", "own."]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    convert_command()
    same, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "own"))
    assert same.keys() == other.keys() and all(torch.equal(same[name], other[name]) for name in same)


def test_the_config_is_that_of_the_authors():
    config = UniterConfig()
    with torch.device("meta"):
        names = {f"uniter.{name}": tuple(v.shape) for name, v in UniterModel(config).state_dict().items()}
    official = official_shapes(28996, 768, 3072, 12)
    pretraining = "uniter.img_embeddings.mask_embedding.weight"
    assert names == {k: v for k, v in official.items() if k.startswith("uniter.") and k != pretraining}
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (config.layer_norm_eps, config.hidden_act, config.model_type) == (1e-12, "gelu", "uniter")
