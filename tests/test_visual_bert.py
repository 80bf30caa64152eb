"""The VisualBERT student: parity with transformers' models, its inputs, loading of stock checkpoints."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from region_students import (
    CLOSE,
    LABELS,
    TEXT,
    BoxRegions,
    change,
    inputs_of,
    run,
    student_folder,
    visual_bert,
    weighty,
)
from torch.testing import assert_close
from transformers import VisualBertForMultipleChoice as StockForMultipleChoice
from transformers import VisualBertForPreTraining, VisualBertForQuestionAnswering, VisualBertModel

from tdlib.data.examples import Reference, TextPart
from tdlib.students.base import StudentError
from tdlib.students.convert import convert
from tdlib.students.registry import load_student
from tdlib.students.visual_bert import (
    VisualBertEncoder,
    VisualBertForClassification,
    VisualBertForMultipleChoice,
)


@pytest.fixture(scope="module")
def stock() -> VisualBertModel:
    return weighty(visual_bert, kind=VisualBertModel)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory, stock) -> Path:
    """The stock model with a tokenizer beside it."""
    return student_folder(tmp_path_factory, tokenizer_folder, stock)


@pytest.fixture(scope="module")
def student(folder) -> VisualBertForMultipleChoice:
    return load_student(str(folder)).eval()


@pytest.fixture(scope="module")
def encoder(folder) -> VisualBertEncoder:
    return VisualBertEncoder(str(folder), 40, BoxRegions())


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
    stock = weighty(visual_bert, kind=StockForMultipleChoice)
    student = VisualBertForMultipleChoice(stock.config).eval()
    student.visual_bert.load_state_dict(stock.visual_bert.state_dict())
    student.classifier[1].load_state_dict(stock.cls.state_dict())
    inputs = inputs_of()
    rows = {name: v.unflatten(0, (3, 2)) for name, v in stock_inputs(inputs, aligned=False).items()}
    inputs["objects"] = torch.full_like(inputs["objects"], -1)
    with torch.inference_mode():
        assert_close(run(student, inputs).logits, stock(**rows).logits, **CLOSE)


def test_label_scores_are_the_stock_question_answering_models():
    stock = weighty(visual_bert, kind=VisualBertForQuestionAnswering, id2label=dict(enumerate(LABELS)))
    student = VisualBertForClassification(stock.config).eval()
    kept = student.visual_bert.load_state_dict(stock.visual_bert.state_dict(), strict=False)
    assert not kept.missing_keys and all("pooler" in name for name in kept.unexpected_keys)
    student.classifier[1].load_state_dict(stock.cls.state_dict())
    inputs = inputs_of(choices=1)
    with torch.inference_mode():
        expected = stock(**stock_inputs(inputs, aligned=True)).logits
    assert expected.shape == (3, 3)
    assert_close(run(student, inputs).logits, expected, **CLOSE)


# Inputs


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
    model = weighty(visual_bert, kind=kind)
    model.save_pretrained(tmp_path)
    first, same, other = (load_student(str(tmp_path), seed, labels) for seed in (1, 1, 2))
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


def test_a_model_without_states_of_regions_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bypass")
    change(tmp_path / "bypass", bypass_transformer=True)
    with pytest.raises(StudentError, match="bypass_transformer=true"):
        load_student(str(tmp_path / "bypass"))


def test_a_tokenizer_is_put_beside_a_stock_checkpoint(stock, tokenizer_folder, tmp_path):
    bare, folder = tmp_path / "bare", tmp_path / "student"
    weighty(visual_bert, kind=VisualBertForQuestionAnswering).save_pretrained(bare)
    convert("visual-bert", str(bare), folder, tokenizer_folder)
    encoder, student = VisualBertEncoder(str(folder), 40, BoxRegions()), load_student(str(folder)).eval()
    assert encoder.tokenizer.tokenize("rain")[0] != encoder.tokenizer.unk_token
    own = student.visual_bert.state_dict()
    theirs = weighty(visual_bert, kind=VisualBertForQuestionAnswering).visual_bert.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    with pytest.raises(StudentError, match="is not empty"):
        convert("visual-bert", str(bare), folder, tokenizer_folder)
    with pytest.raises(StudentError, match=r"tokenizer .*nothing.* cannot be loaded"):
        convert("visual-bert", str(bare), tmp_path / "new", tmp_path / "nothing")
    change(bare, vocab_size=300, visual_embedding_dim=7)
    with pytest.raises(StudentError, match=re.escape(str(bare))):
        convert("visual-bert", str(bare), tmp_path / "new", tokenizer_folder)
    weighty(visual_bert, kind=VisualBertModel, vocab_size=301).save_pretrained(tmp_path / "other")
    with pytest.raises(StudentError, match=r"has 300 tokens, but .*other has 301"):
        convert("visual-bert", str(tmp_path / "other"), tmp_path / "new", tokenizer_folder)
    assert not (tmp_path / "new").exists()
