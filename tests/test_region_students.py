"""What holds for every student that reads regions: padding, places, loading, inputs, conversion."""

import pickle
import re
import shutil
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import region_students as small
import torch
from region_students import CLOSE, LABELS, TEXT, BoxRegions, change, cut, inputs_of, places_of, run
from torch.testing import assert_close
from transformers import AutoConfig

from tdlib.students.base import StudentError, load_checkpoint
from tdlib.students.convert import convert
from tdlib.students.registry import ARCHITECTURES, load_student


@dataclass(frozen=True)
class Kind:
    """One architecture with a small student of it in a folder."""

    name: str
    folder: Path
    student: Any

    @property
    def architecture(self):
        return ARCHITECTURES[self.name]

    def encoder(self, folder: Path | None = None, tokens: int = 40, whole: bool = True):
        return self.architecture.encoder(str(folder or self.folder), tokens, BoxRegions(whole))

    def load(self, folder: Path, seed: int = 0, labels=()):
        """As one architecture's checkpoint, whatever the folder says that it is."""
        kind = self.architecture.labels if labels else self.architecture.choices
        return load_checkpoint(kind, str(folder), seed, labels)

    def inputs(self, **sizes):
        return inputs_of(**sizes, objects="objects" in self.student.inputs)


@pytest.fixture(scope="module", params=["uniter", "vl-bert", "visual_bert"])
def kind(request, tmp_path_factory, tokenizer_folder) -> Kind:
    make = {"uniter": small.uniter, "vl-bert": small.vlbert, "visual_bert": small.visual_bert}
    model = small.weighty(make[request.param])
    folder = small.student_folder(tmp_path_factory, tokenizer_folder, model)
    return Kind(request.param, folder, load_student(str(folder)).eval())


def run_on(student, text, visual):
    """One example's output."""
    own = {name: getattr(text, name)[None] for name in (*TEXT, "spans")} | visual
    return run(student, {name: own[name] for name in student.inputs})


# Padding and places


def test_what_stands_in_the_padding_does_not_matter(kind):
    """So padding is as good as moving regions up to the end of each text, as the authors do."""
    inputs, noise = kind.inputs(), kind.inputs(seed=1)
    text, seen = inputs["attention_mask"] == 1, inputs["region_mask"] == 1
    assert not text.all() and not seen.all()
    filled = dict(inputs)
    for name in inputs.keys() & {"input_ids", "token_type_ids", "objects"}:
        filled[name] = torch.where(text, inputs[name], 1)
    for name in ("region_features", "region_boxes"):
        filled[name] = torch.where(seen[..., None], inputs[name], noise[name] + 9)
    output = run(kind.student, filled)
    for b, c in places_of(inputs):
        alone, real = run(kind.student, cut(inputs, b, c)), output.attention_mask[b, c].bool()
        assert_close(alone.logits[0, 0], output.logits[b, c], **CLOSE)
        for own, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert_close(own[b, c, real], expected[0, 0], **CLOSE)


def test_the_order_of_choices_examples_and_objects_does_not_matter(kind):
    inputs = kind.inputs(choices=3)
    logits = run(kind.student, inputs).logits
    order = torch.tensor([2, 0, 1])
    text = {name: inputs[name][:, order] for name in inputs if name in TEXT}
    assert_close(run(kind.student, {**inputs, **text}).logits, logits[:, order], **CLOSE)
    rows = {name: value[order] for name, value in inputs.items()}
    assert_close(run(kind.student, rows).logits, logits[order], **CLOSE)
    turned = {name: inputs[name][:, [0, 3, 2, 1]] for name in inputs if name not in TEXT}
    assert_close(run(kind.student, {**inputs, **turned}).logits, logits, **CLOSE)


def test_output_says_where_tokens_are(kind):
    inputs = kind.inputs()
    spans = torch.randint(0, 50, (3, 2, 7, 2))
    output = run(kind.student, inputs, spans=spans)
    assert torch.equal(output.spans[:, :, :7], spans) and not output.spans[:, :, 7:].any()
    assert not run(kind.student, inputs).spans.any()
    assert not output.boxes[:, :, :7].any()
    for choice in range(2):
        assert torch.equal(output.boxes[:, choice, 7:], inputs["region_boxes"])
        assert torch.equal(output.attention_mask[:, choice, 7:], inputs["region_mask"])
    assert torch.equal(output.attention_mask[:, :, :7], inputs["attention_mask"])
    assert [state.shape for state in output.hidden_states] == [(3, 2, 11, 32)] * 3
    assert kind.student(**inputs).hidden_states is None


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
def test_gradients_reach_regions_and_every_parameter(kind, labels):
    student, inputs = kind.load(kind.folder, labels=labels).eval(), kind.inputs(choices=1 if labels else 2)
    inputs["region_features"].requires_grad_()
    student(**inputs).logits.square().sum().backward()
    gradient = inputs["region_features"].grad.abs().sum(-1)
    assert torch.equal(gradient > 0, inputs["region_mask"] == 1)
    types = {"uniter": 4, "vl-bert": 3, "visual_bert": 2}[kind.name]
    for name, parameter in student.named_parameters():
        if name.endswith("self.key.bias"):  # the softmax over keys ignores it
            continue
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert "token_type_embeddings" not in name or len(parameter) in (types, 2)


def test_a_student_can_be_pickled(kind):
    """As ``torch.save`` and processes that are spawned do."""
    again = pickle.loads(pickle.dumps(kind.student))
    assert_close(again.state_dict(), kind.student.state_dict(), rtol=0, atol=0)
    assert_close(run(again, kind.inputs()).logits, run(kind.student, kind.inputs()).logits, **CLOSE)


def test_words_can_be_added(kind):
    """As ``references="person_tokens"`` does; words that were there are read as before."""
    student, inputs = kind.load(kind.folder).eval(), kind.inputs()
    before = run(student, inputs).logits
    student.resize_token_embeddings(305, mean_resizing=False)
    assert student.get_input_embeddings().num_embeddings == student.config.vocab_size == 305
    assert_close(run(student, inputs).logits, before, **CLOSE)
    inputs["input_ids"][..., 1] = 304
    assert not torch.allclose(run(student, inputs).logits, before)


def test_the_word_embedding_can_be_hooked(kind):
    inputs, seen = kind.inputs(), []
    words = kind.student.get_input_embeddings()
    handle = words.register_forward_hook(lambda *args: seen.append(args[2].shape))
    logits = run(kind.student, inputs).logits
    handle.remove()
    assert seen == [(6, 7, 32)]
    handle = words.register_forward_hook(lambda *args: 2 * args[2])
    disturbed = run(kind.student, inputs).logits
    handle.remove()
    assert not torch.allclose(disturbed, logits, atol=0.01)


# Inputs


@pytest.mark.parametrize("labels", [(), LABELS], ids=["choices", "labels"])
def test_encoder_and_student_fit(kind, examples, labels):
    student, encoder = kind.load(kind.folder, labels=labels).eval(), kind.encoder()
    examples = [replace(e, choices=() if labels else e.choices) for e in examples]
    texts, visuals = [encoder.text(e) for e in examples], [encoder.visual(e) for e in examples]
    batch = encoder.pad_visual(visuals)
    for b, (text, example) in enumerate(zip(texts, examples, strict=True)):
        output = run_on(student, text, {name: value[b : b + 1] for name, value in batch.items()})
        assert output.logits.shape == (1, len(labels or example.choices)) and output.logits.isfinite().all()
        boxes = output.boxes[0, 0, text.input_ids.shape[1] :]
        assert_close(boxes[: len(example.boxes) + 1], encoder.visual_boxes(visuals[b]))
        assert not boxes[len(example.boxes) + 1 :].any()


def test_encoders_that_do_not_fit_are_refused(kind, student_folder, tmp_path):
    with pytest.raises(StudentError, match=rf"is a vilt; expected .* a {kind.architecture.encoder.kind}"):
        kind.encoder(student_folder)
    with pytest.raises(StudentError, match=r"at most 64.*max_text_tokens=65"):
        kind.encoder(tokens=65)
    width = "img_dim" if kind.name == "uniter" else "visual_embedding_dim"
    shutil.copytree(kind.folder, tmp_path / "copy")
    change(tmp_path / "copy", **{width: 2048})
    with pytest.raises(StudentError, match=r"width 2048, but these have 6"):
        kind.encoder(tmp_path / "copy")
    change(tmp_path / "copy", **{width: 6}, vocab_size=301)
    if kind.name != "uniter":
        with pytest.raises(StudentError, match=r"301 words, but its tokenizer 300"):
            kind.encoder(tmp_path / "copy")


# Loading


def test_save_and_load(kind, tmp_path):
    kind.student.save_pretrained(tmp_path)
    again = load_student(str(tmp_path), seed=5).eval()
    assert type(again) is type(kind.student)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    inputs, stored = kind.inputs(), kind.student.state_dict()
    # To rounding: where a file puts the weights in memory decides in which order products are summed.
    assert_close(run(again, inputs).logits, run(kind.student, inputs).logits, **CLOSE)
    assert again.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in again.state_dict().items())


def test_a_model_stored_in_half_precision_is_trained_in_single(kind, tmp_path):
    deepcopy(kind.student).half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_student(str(tmp_path)).parameters()} == {torch.float32}


def test_a_head_comes_from_the_seed(kind):
    """And leaves the caller's random numbers alone."""
    state = torch.random.get_rng_state()
    first, same, other = (
        load_student(str(kind.folder), seed, LABELS).classifier[-1].weight for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.std() > 0 and torch.equal(first, same) and not torch.equal(first, other)


def test_folders_that_do_not_fit_are_refused(kind, student_folder, tmp_path):
    shutil.copytree(kind.folder, tmp_path / "width")
    change(tmp_path / "width", **{"img_dim" if kind.name == "uniter" else "visual_embedding_dim": 7})
    for folder in (tmp_path / "width", student_folder, tmp_path / "nothing"):
        with pytest.raises(StudentError, match=re.escape(str(folder))):
            kind.load(folder)


# Conversion: what is refused of every kind of checkpoint


@pytest.mark.parametrize("official", ["uniter", "vl-bert"])
def test_files_that_cannot_be_read_are_refused(official, tokenizer_folder, tmp_path):
    path, target = tmp_path / "official.pt", tmp_path / "converted"
    for write, message in (
        (lambda: None, r"official\.pt cannot be read"),
        (lambda: path.write_bytes(b"no checkpoint"), r"official\.pt cannot be read"),
        # An object: loading it would run code.
        (lambda: torch.save({"config": Path("x")}, path), r"official\.pt cannot be read \(damaged, or"),
        (lambda: torch.save({"epoch": 3}, path), "is not a state dict"),
        (lambda: torch.save({}, path), "missing.*word_embeddings"),
    ):
        write()
        with pytest.raises(StudentError, match=message):
            convert(official, path, target, tokenizer_folder)
    assert not target.exists()


@pytest.mark.parametrize("official", ["uniter", "vl-bert", "visual-bert"])
def test_nothing_is_overwritten(official, tokenizer_folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(StudentError, match="is not empty"):
        convert(official, tokenizer_folder, tmp_path, tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
