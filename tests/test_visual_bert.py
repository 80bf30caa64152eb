"""The VisualBERT student: parity with transformers' models, its inputs, loading of stock checkpoints."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    VisualBertConfig,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
    VisualBertModel,
)
from transformers import VisualBertForMultipleChoice as StockForMultipleChoice

from tdlib.data.examples import Example, Reference, TextPart
from tdlib.data.vcr import VcrReader
from tdlib.make.vocabulary import train_wordpiece_tokenizer
from tdlib.regions.computed import Regions
from tdlib.students.base import StudentError
from tdlib.students.visual_bert import (
    VisualBertEncoder,
    VisualBertForClassification,
    VisualBertForMultipleChoice,
    convert_visual_bert,
    load_visual_bert,
)

CLOSE = {"rtol": 0, "atol": 1e-5}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "objects")
LABELS = ("no", "yes", "maybe")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, captions_texts) -> Path:
    folder = tmp_path_factory.mktemp("visual_bert") / "tokenizer"
    train_wordpiece_tokenizer(captions_texts, 300).save_pretrained(folder)
    return folder


def stock_model(kind, **settings):
    """A stock model of two layers with random weights, large enough that every part of it counts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "visual_embedding_dim": 6,
    }  # fmt: skip
    model = kind(VisualBertConfig(**sizes | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def stock() -> VisualBertModel:
    return stock_model(VisualBertModel)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, stock) -> Path:
    """The stock model with a tokenizer beside it."""
    folder = tokenizer_folder.parent / "student"
    shutil.copytree(tokenizer_folder, folder)
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(folder) -> VisualBertForMultipleChoice:
    return load_visual_bert(str(folder)).eval()


class BoxRegions:
    """The whole picture and every object of an example, each seen as its geometry."""

    dim = 6

    def __call__(self, example: Example) -> Regions:
        boxes = torch.tensor([(0.0, 0.0, 1.0, 1.0), *example.boxes])
        return Regions(torch.cat([boxes, boxes[:, :2]], dim=1), boxes, torch.arange(-1, len(example.boxes)))


@pytest.fixture(scope="module")
def encoder(folder) -> VisualBertEncoder:
    return VisualBertEncoder(str(folder), 40, BoxRegions())


@pytest.fixture(scope="module")
def examples(world):
    return VcrReader(world, "train").read()[:5]


def inputs_of(batch: int = 3, choices: int = 2, length: int = 7, regions: int = 4, seed: int = 0) -> dict:
    """Random inputs; texts and regions of several lengths, all padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (batch, choices, length), generator=generator)
    texts = torch.randint(3, length + 1, (batch, choices, 1), generator=generator)
    seen = torch.randint(2, regions + 1, (batch, 1), generator=generator)
    attention = (torch.arange(length) < texts).long()
    mask = (torch.arange(regions) < seen).long()
    corners = torch.rand(batch, regions, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    found = torch.arange(-1, regions - 1).expand(batch, -1)
    return {
        "input_ids": ids * attention,
        "attention_mask": attention,
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator) * attention,
        "region_features": torch.randn(batch, regions, 6, generator=generator) * mask[..., None],
        "region_boxes": corners * mask[..., None],
        "region_mask": mask,
        "region_objects": found.masked_fill(mask == 0, -1),
        "objects": torch.randint(-1, 3, ids.shape, generator=generator).masked_fill(attention == 0, -1),
    }


def run(student, inputs, **options):
    with torch.inference_mode():
        return student(**inputs, output_hidden_states=True, **options)


def stock_inputs(inputs, aligned: bool) -> dict[str, torch.Tensor]:
    """One row per choice; ``aligned`` with the positions of each region's words, found one by one."""
    choices = inputs["input_ids"].shape[1]
    rows = {name: inputs[name].flatten(0, 1) for name in TEXT if name != "objects"}
    rows["visual_embeds"] = inputs["region_features"].repeat_interleave(choices, 0)
    rows["visual_attention_mask"] = inputs["region_mask"].repeat_interleave(choices, 0)
    # As the authors' code does where a data set gives no types (visualbert/models/model.py); stock takes 1.
    rows["visual_token_type_ids"] = torch.zeros_like(rows["visual_attention_mask"])
    if aligned:
        found = inputs["region_objects"].repeat_interleave(choices, 0)
        words = inputs["objects"].flatten(0, 1)
        length = words.shape[1]
        rows["image_text_alignment"] = torch.tensor([
            [
                [i if region >= 0 and row[i] == region else -1 for i in range(length)]
                for region in regions.tolist()
            ]
            for row, regions in zip(words.tolist(), found, strict=True)
        ])  # fmt: skip
    return rows


# Parity


@pytest.mark.parametrize("aligned", [True, False], ids=["references", "no references"])
def test_states_and_pooled_output_are_the_stock_models(student, stock, aligned):
    inputs = inputs_of()
    if not aligned:
        inputs["objects"] = torch.full_like(inputs["objects"], -1)
    rows = stock_inputs(inputs, aligned)
    assert aligned == bool((rows.get("image_text_alignment", torch.tensor(-1)) >= 0).any())
    with torch.inference_mode():
        theirs = stock(**rows, output_hidden_states=True)
        logits = student.classifier(theirs.pooler_output).view(3, 2)
        pooled = student.visual_bert.pooler(run(student, inputs).hidden_states[-1].flatten(0, 1))
    ours = run(student, inputs)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    real = ours.attention_mask.bool()
    for own, layer in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(own[real], layer.view_as(own)[real], **CLOSE)
    assert_close(pooled, theirs.pooler_output, **CLOSE)
    assert_close(ours.logits, logits, **CLOSE)


def test_scores_are_the_stock_multiple_choice_models():
    stock = stock_model(StockForMultipleChoice)
    student = VisualBertForMultipleChoice(stock.config).eval()
    student.visual_bert.load_state_dict(stock.visual_bert.state_dict())
    student.classifier[1].load_state_dict(stock.cls.state_dict())
    inputs = inputs_of()
    rows = {name: v.unflatten(0, (3, 2)) for name, v in stock_inputs(inputs, aligned=False).items()}
    inputs["objects"] = torch.full_like(inputs["objects"], -1)
    with torch.inference_mode():
        assert_close(run(student, inputs).logits, stock(**rows).logits, **CLOSE)


def test_label_scores_are_the_stock_question_answering_models():
    stock = stock_model(VisualBertForQuestionAnswering, id2label=dict(enumerate(LABELS)))
    student = VisualBertForClassification(stock.config).eval()
    kept = student.visual_bert.load_state_dict(stock.visual_bert.state_dict(), strict=False)
    assert not kept.missing_keys and all("pooler" in name for name in kept.unexpected_keys)
    student.classifier[1].load_state_dict(stock.cls.state_dict())
    inputs = inputs_of(choices=1)
    with torch.inference_mode():
        expected = stock(**stock_inputs(inputs, aligned=True)).logits
    assert expected.shape == (3, 3)
    assert_close(run(student, inputs).logits, expected, **CLOSE)


# Padding and places


def test_what_stands_in_the_padding_does_not_matter(student):
    inputs, noise = inputs_of(), inputs_of(seed=1)
    text, seen = inputs["attention_mask"] == 1, inputs["region_mask"] == 1
    assert not text.all() and not seen.all()
    filled = dict(inputs)
    for name in ("input_ids", "token_type_ids", "objects"):
        filled[name] = torch.where(text, inputs[name], 1)
    for name in ("region_features", "region_boxes"):
        filled[name] = torch.where(seen[..., None], inputs[name], noise[name] + 9)
    output = run(student, filled)
    for b, c in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        alone = {
            name: value[b : b + 1, c : c + 1, text[b, c]] if name in TEXT else value[b : b + 1, seen[b]]
            for name, value in inputs.items()
        }
        expected, real = run(student, alone), output.attention_mask[b, c].bool()
        assert_close(expected.logits[0, 0], output.logits[b, c], **CLOSE)
        for own, layer in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close(own[b, c, real], layer[0, 0], **CLOSE)


def test_choices_and_the_order_of_regions_do_not_matter(student):
    inputs = inputs_of(choices=3)
    logits = run(student, inputs).logits
    order = torch.tensor([2, 0, 1])
    text = {name: inputs[name][:, order] for name in TEXT}
    assert_close(run(student, {**inputs, **text}).logits, logits[:, order], **CLOSE)
    turned = {name: inputs[name].flip(1) for name in inputs if name not in TEXT}
    assert_close(run(student, {**inputs, **turned}).logits, logits, **CLOSE)


def test_output_says_where_tokens_are(student):
    inputs = inputs_of()
    spans = torch.randint(0, 50, (3, 2, 7, 2))
    output = run(student, inputs, spans=spans)
    assert torch.equal(output.spans[:, :, :7], spans) and not output.spans[:, :, 7:].any()
    assert not output.boxes[:, :, :7].any()
    for choice in range(2):
        assert torch.equal(output.boxes[:, choice, 7:], inputs["region_boxes"])
        assert torch.equal(output.attention_mask[:, choice, 7:], inputs["region_mask"])
    assert torch.equal(output.attention_mask[:, :, :7], inputs["attention_mask"])
    assert [state.shape for state in output.hidden_states] == [(3, 2, 11, 32)] * 3
    assert student(**inputs).hidden_states is None


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
def test_gradients_reach_regions_and_every_parameter(folder, labels):
    student = load_visual_bert(str(folder), labels=labels).eval()
    inputs = inputs_of(choices=1 if labels else 2)
    inputs["region_features"].requires_grad_()
    student(**inputs).logits.square().sum().backward()
    gradient = inputs["region_features"].grad.abs().sum(-1)
    assert torch.equal(gradient > 0, inputs["region_mask"] == 1)
    for name, parameter in student.named_parameters():
        if name.endswith("self.key.bias"):  # the softmax over keys ignores it
            continue
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_word_embedding_can_be_hooked(student):
    inputs, seen = inputs_of(), []
    handle = student.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape))
    logits = run(student, inputs).logits
    handle.remove()
    assert seen == [(6, 7, 32)]
    handle = student.get_input_embeddings().register_forward_hook(lambda *args: 2 * args[2])
    disturbed = run(student, inputs).logits
    handle.remove()
    assert not torch.allclose(disturbed, logits, atol=0.01)


# Inputs


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
def test_encoder_and_student_fit(encoder, folder, examples, labels):
    student = load_visual_bert(str(folder), labels=labels).eval()
    examples = [replace(e, choices=() if labels else e.choices) for e in examples]
    texts, visuals = [encoder.text(e) for e in examples], [encoder.visual(e) for e in examples]
    batch = encoder.pad_visual(visuals)
    for b, (text, example) in enumerate(zip(texts, examples, strict=True)):
        own = {name: getattr(text, name)[None] for name in (*TEXT, "spans")}
        own |= {name: value[b : b + 1] for name, value in batch.items()}
        output = run(student, {name: own[name] for name in student.inputs})
        assert output.logits.shape == (1, len(labels or example.choices)) and output.logits.isfinite().all()
        boxes = output.boxes[0, 0, text.input_ids.shape[1] :]
        assert_close(boxes[: len(example.boxes) + 1], encoder.visual_boxes(visuals[b]))


def test_regions_take_the_positions_of_their_words(encoder, student, examples):
    """A reference changes its region's embedding and no other."""
    plain = replace(examples[0], prompt=TextPart(examples[0].prompt.text))
    named = replace(plain, prompt=replace(plain.prompt, references=(Reference(0, 2, (1,)),)))
    visual = encoder.pad_visual([encoder.visual(plain)])
    states = []
    for example in (plain, named):
        text = encoder.text(example)
        own = {name: getattr(text, name)[None] for name in (*TEXT, "spans")} | visual
        states.append(run(student, {name: own[name] for name in student.inputs}).hidden_states[0][0])
    differs = (states[0] != states[1]).any(-1)
    expected = torch.zeros_like(differs)
    expected[:, text.input_ids.shape[1] + visual["region_objects"][0].tolist().index(1)] = True
    assert torch.equal(differs, expected)


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_encoders_that_do_not_fit_are_refused(folder, student_folder, tmp_path):
    with pytest.raises(StudentError, match=r"is a vilt; expected .* a VisualBERT"):
        VisualBertEncoder(str(student_folder), 40, BoxRegions())
    copy = tmp_path / "visual_bert"
    shutil.copytree(folder, copy)
    change(copy, visual_embedding_dim=512)
    with pytest.raises(StudentError, match=r"width 512, but these have 6"):
        VisualBertEncoder(str(copy), 40, BoxRegions())


def test_a_stock_checkpoint_without_tokenizer_is_refused(stock, tmp_path):
    """As the authors' repositories are: transformers then makes up a tokenizer that knows no words."""
    stock.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=rf"{re.escape(str(tmp_path))}.*300 words, but its tokenizer"):
        VisualBertEncoder(str(tmp_path), 40, BoxRegions())


# Loading


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
@pytest.mark.parametrize(
    "kind",
    [VisualBertModel, VisualBertForPreTraining, StockForMultipleChoice, VisualBertForQuestionAnswering],
)
def test_stock_checkpoints_load(tmp_path, kind, labels):
    model = stock_model(kind)
    model.save_pretrained(tmp_path)
    first, same, other = (load_visual_bert(str(tmp_path), seed, labels) for seed in (1, 1, 2))
    assert torch.equal(first.classifier[1].weight, same.classifier[1].weight)
    assert first.classifier[1].weight.std() > 0
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)
    assert first.classifier[1].weight.shape == (len(labels) or 1, 32)
    base = getattr(model, "visual_bert", model).state_dict()
    own = first.visual_bert.state_dict()
    assert all(torch.equal(own[name], base[name]) for name in own)
    assert {name for name in base if name not in own} == (
        {"pooler.dense.weight", "pooler.dense.bias"} if labels else set()
    )


def test_save_and_load(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = load_visual_bert(str(tmp_path), seed=5).eval()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    inputs = inputs_of()
    # To rounding: where a file puts the weights in memory decides in which order products are summed.
    assert_close(run(again, inputs).logits, run(student, inputs).logits, **CLOSE)
    assert again.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())


def test_folders_that_do_not_fit_are_refused(folder, student_folder, tmp_path):
    copies = [tmp_path / "width", tmp_path / "bypass"]
    for copy, settings in zip(
        copies, ({"visual_embedding_dim": 7}, {"bypass_transformer": True}), strict=True
    ):
        shutil.copytree(folder, copy)
        change(copy, **settings)
    for name in (*copies, student_folder, tmp_path / "nothing"):
        with pytest.raises(StudentError, match=re.escape(str(name))):
            load_visual_bert(str(name))
    with pytest.raises(StudentError, match="bypass_transformer=true"):
        load_visual_bert(str(copies[1]))


def test_a_tokenizer_is_put_beside_a_stock_checkpoint(stock, tokenizer_folder, tmp_path):
    bare, folder = tmp_path / "bare", tmp_path / "student"
    stock_model(VisualBertForQuestionAnswering).save_pretrained(bare)
    convert_visual_bert(str(bare), folder, tokenizer_folder)
    encoder, student = VisualBertEncoder(str(folder), 40, BoxRegions()), load_visual_bert(str(folder)).eval()
    assert encoder.tokenizer.tokenize("rain")[0] != encoder.tokenizer.unk_token
    own = student.visual_bert.state_dict()
    theirs = stock_model(VisualBertForQuestionAnswering).visual_bert.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    with pytest.raises(StudentError, match="is not empty"):
        convert_visual_bert(str(bare), folder, tokenizer_folder)
    with pytest.raises(StudentError, match=r"tokenizer .*nothing.* cannot be loaded"):
        convert_visual_bert(str(bare), tmp_path / "new", tmp_path / "nothing")
    change(bare, vocab_size=300, visual_embedding_dim=7)
    with pytest.raises(StudentError, match=re.escape(str(bare))):
        convert_visual_bert(str(bare), tmp_path / "new", tokenizer_folder)
    stock_model(VisualBertModel, vocab_size=301).save_pretrained(tmp_path / "other")
    with pytest.raises(StudentError, match=r"has 300 tokens, but .*other has 301"):
        convert_visual_bert(str(tmp_path / "other"), tmp_path / "new", tokenizer_folder)
    assert not (tmp_path / "new").exists()
