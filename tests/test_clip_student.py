"""CLIP with a fusion head as a student: it starts as the teacher, both towers learn, it is stored whole."""

import copy
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from region_students import BROKEN_FOLDERS, CLOSE, LABELS, change
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig

from tdlib.data.examples import Reference, TextPart
from tdlib.data.pictures import open_picture
from tdlib.data.vcr import PERSON_TOKENS, VcrReader
from tdlib.students.base import StudentError, load_checkpoint
from tdlib.students.clip import (
    ClipFusionConfig,
    ClipFusionEncoder,
    ClipFusionForClassification,
    ClipFusionForMultipleChoice,
    fused,
    open_teacher_as_student,
)
from tdlib.students.registry import load_student
from tdlib.students.vilt import ViltForMultipleChoice
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import TeacherError
from tdlib.training.data import EncodedExamples, collate

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EVERY_POSITION = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
FAMILIES = {
    "vit": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {
        "embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1] * 4, "width": 8, "head_width": 64},
        "text_cfg": TEXT,
    },
    "sigmoid": {
        "embed_dim": 64, "vision_cfg": TRUNK, "text_cfg": EVERY_POSITION, "custom_text": True,
        "init_logit_bias": -10.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["folder", *FAMILIES])
def spec(request, teacher_folder, tmp_path_factory):
    """Name and weights of a teacher of each family; "folder" has a tokenizer of its own."""
    if request.param == "folder":
        yield f"local-dir:{teacher_folder}", ""
        return
    config = copy.deepcopy(FAMILIES[request.param])
    torch.manual_seed(0)
    make = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = make(**config)
    with torch.no_grad():  # so that norms and biases do something, and statistics are no model's first ones
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 0.3 * torch.rand_like(buffer)
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(model.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", {request.param: copy.deepcopy(FAMILIES[request.param])})
        yield request.param, str(path)


@pytest.fixture(scope="module")
def own(spec) -> Teacher:
    return Teacher(*spec)


@pytest.fixture(scope="module")
def mini(teacher_folder) -> str:
    return f"local-dir:{teacher_folder}"


@pytest.fixture(scope="module")
def encoder(teacher) -> ClipFusionEncoder:
    return ClipFusionEncoder(teacher)


@pytest.fixture(scope="module")
def examples(world):
    return list(VcrReader(world, "train").read()[:4])


def statements_only(examples):
    return [replace(example, choices=()) for example in examples]


def batch_of(encoder, examples) -> dict[str, torch.Tensor]:
    dataset = EncodedExamples(examples, encoder)
    return collate([dataset[i] for i in range(len(dataset))], encoder)


def logits_of(student, batch) -> torch.Tensor:
    with torch.inference_mode():
        return student(**{name: batch[name] for name in student.inputs}).logits


def gradients(student, batch) -> dict[str, float]:
    """The gradient's norm under the task loss, by tower and by part of the head."""
    student.train()
    logits = student(**{name: batch[name] for name in student.inputs}).logits
    F.cross_entropy(logits, batch["labels"] % logits.shape[1]).backward()
    norms = dict.fromkeys(("image", "text", "head", "last"), 0.0)
    for name, parameter in student.named_parameters():
        part = "image" if ".visual." in name else "text"
        if name.startswith("classifier."):
            part = "last" if name.startswith("classifier.3") else "head"
        if parameter.grad is not None and "logit_" not in name:
            norms[part] += float(parameter.grad.norm())
    return norms


# What it starts from


def zero_shot(teacher: Teacher, examples) -> torch.Tensor:
    pictures = teacher.encode_pictures([open_picture(example.image) for example in examples])
    rows = []
    for example, picture in zip(examples, pictures, strict=True):
        texts = teacher.encode_texts([statement.text for statement in example.statements()])
        rows.append(torch.stack([teacher.logit_scale * picture.pooled @ text.pooled for text in texts]))
    return torch.stack(rows)


def test_an_untrained_student_is_the_zero_shot_teacher(spec, own, examples):
    """With no limit but CLIP's context, which one prompt exceeds."""
    examples = [*examples, replace(examples[0], prompt=TextPart("a red cup in the rain " * 9))]
    student, encoder = open_teacher_as_student(*spec), ClipFusionEncoder(own, max_text_tokens=500)
    logits = logits_of(student, batch_of(encoder, examples))
    assert logits.shape == (5, 4) and logits[:4].std(1).min() > 1e-3
    assert_close(logits, zero_shot(own, examples), **CLOSE)


def test_an_activation_that_the_weights_force_is_kept(mini, examples, monkeypatch):
    """OpenAI's tags force QuickGELU on architectures whose configuration does not name it."""
    plain = zero_shot(Teacher(mini), examples)
    monkeypatch.setattr("tdlib.teacher.model._activation", lambda *_: {"force_quick_gelu": True})
    expected = zero_shot(Teacher(mini), examples)
    assert (expected - plain).abs().max() > 1e-4
    batch = batch_of(ClipFusionEncoder(Teacher(mini), max_text_tokens=500), examples)
    assert_close(logits_of(open_teacher_as_student(mini), batch), expected, **CLOSE)


def test_a_student_is_a_trainable_copy_that_shares_nothing(spec, own):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    student = open_teacher_as_student(*spec)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = dict(own.model.named_parameters())
    assert weights.keys() == {name.removeprefix("clip.") for name, _ in student.clip.named_parameters()}
    for name, parameter in student.clip.named_parameters():
        assert parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name])
        assert parameter.data_ptr() != weights[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in own.model.parameters())
    assert student.config.hidden_size == own.dim
    assert student.config.max_position_embeddings == own.tokenize.tokenizer.context_length


@pytest.mark.parametrize("labels", [(), LABELS])
def test_the_head_is_drawn_from_the_seed(mini, labels):
    first, same, other = (open_teacher_as_student(mini, seed=seed, labels=labels) for seed in (1, 1, 2))
    for left, right in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(first.classifier[0].weight, other.classifier[0].weight)
    assert first.classifier[3].weight.any() == bool(labels)
    assert first.classifier[3].out_features == (len(labels) or 1)


def test_the_head_reads_both_embeddings_their_product_and_their_distance():
    image, text = torch.tensor([[1.0, -2.0]]), torch.tensor([[[3.0, 4.0], [1.0, -2.0]]])
    expected = [[1.0, -2.0, 3.0, 4.0, 3.0, -8.0, 2.0, 6.0], [1.0, -2.0, 1.0, -2.0, 1.0, 4.0, 0.0, 0.0]]
    assert fused(image, text).tolist() == [expected]


# Learning


def test_gradients_reach_both_towers(spec, own, examples):
    """The head's last layer starts at zero, so nothing behind it learns from the first update."""
    encoder = ClipFusionEncoder(own)
    norms = gradients(open_teacher_as_student(*spec), batch_of(encoder, examples))
    assert norms["image"] > 1e-4 and norms["text"] > 1e-4 and norms["last"] > 1e-4 and norms["head"] == 0
    student = open_teacher_as_student(*spec, labels=LABELS)
    norms = gradients(student, batch_of(encoder, statements_only(examples)))
    assert min(norms.values()) > 1e-5


def test_a_correction_of_the_zero_shot_score_is_learned(mini, encoder, examples):
    student, batch = open_teacher_as_student(mini), batch_of(encoder, examples)
    before = logits_of(student, batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        gradients(student, batch)
        optimizer.step()
    losses = [F.cross_entropy(x, batch["labels"]) for x in (before, logits_of(student.eval(), batch))]
    assert losses[1] < losses[0] / 2
    assert student.classifier[3].weight.any() and gradients(student, batch)["head"] > 0


def test_a_resnets_statistics_stay_those_of_the_teacher(spec, own, examples):
    student = open_teacher_as_student(*spec)
    batch = batch_of(ClipFusionEncoder(own), examples[:1])  # no statistics of one picture
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    expected = logits_of(student, batch)
    gradients(student, batch)
    assert student.training and student.clip.visual.training and student.classifier.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
    assert_close(logits_of(student, batch), expected, **CLOSE)


# Inputs


def test_a_batch_gives_the_logits_of_each_example_alone(spec, own, examples):
    """Statements of several lengths, and padding behind the longest."""
    encoder = ClipFusionEncoder(own)
    short = replace(examples[0], prompt=TextPart("rain"), choices=(TextPart("no"), TextPart("a red cup")))
    mixed = [short, *(replace(example, choices=example.choices[:2]) for example in examples[1:])]
    for labels, chosen in (((), mixed), (LABELS, statements_only(mixed))):
        student = open_teacher_as_student(*spec, labels=labels)
        batch = batch_of(encoder, chosen)
        lengths = batch["attention_mask"].sum(-1)
        assert lengths.min() < lengths.max() == batch["input_ids"].shape[-1]
        alone = torch.cat([logits_of(student, batch_of(encoder, [example])) for example in chosen])
        together = logits_of(student, batch)
        assert together.shape == (4, len(labels) or 2)
        assert_close(together, alone, **CLOSE)
        room = student.config.max_position_embeddings - batch["input_ids"].shape[-1]
        longer = F.pad(batch["input_ids"], (0, room), value=encoder.tokenizer.pad_token_id)
        assert_close(logits_of(student, batch | {"input_ids": longer}), together, **CLOSE)


def test_a_picture_is_encoded_once_per_example_and_a_text_once_per_choice(mini, encoder, examples):
    student, seen = open_teacher_as_student(mini), []
    for part in (student.clip.visual, student.clip.transformer):
        part.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    logits_of(student, batch_of(encoder, examples))
    assert seen == [4, 16]


def test_tokens_and_patches_are_the_teachers(own, examples):
    encoder = ClipFusionEncoder(own, max_text_tokens=77)
    for example in examples:
        text, visual = encoder.text(example), encoder.visual(example)
        for row, statement in enumerate(example.statements()):
            ids, spans = own.tokenize(statement.text)
            assert text.input_ids[row, : len(ids)].tolist() == ids
            assert text.spans[row, : len(ids)].tolist() == [list(span) for span in spans]
            assert text.attention_mask[row].tolist() == [1] * len(ids) + [0] * (
                text.input_ids.shape[1] - len(ids)
            )
            assert (text.input_ids[row, len(ids) :] == encoder.tokenizer.pad_token_id).all()
            assert not text.spans[row, len(ids) :].any()
        (record,) = own.encode_pictures([open_picture(example.image)])
        assert torch.equal(encoder.visual_boxes(visual), record.positions)
        assert torch.equal(visual["pixels"], own.preprocess(open_picture(example.image)))
        blank = encoder.blank(visual)
        assert not blank["pixels"].any() and torch.equal(blank["boxes"], visual["boxes"])


def test_tokens_know_the_objects_that_they_refer_to(encoder, examples):
    prompt = TextPart("why is he here", (Reference(7, 9, (2, 0)),))
    text = encoder.text(replace(examples[0], prompt=prompt, choices=(TextPart("rain"),)))
    spans, objects = text.spans[0].tolist(), text.objects[0].tolist()
    assert {found for (start, end), found in zip(spans, objects, strict=True) if 7 <= start < end <= 9} == {2}
    assert {
        found for (start, end), found in zip(spans, objects, strict=True) if not 7 <= start < end <= 9
    } == {-1}


def test_long_texts_are_cut_as_the_teacher_does_and_shorter_ones_on_demand(own, examples):
    long = replace(examples[0], prompt=TextPart("rain " * 100), choices=())
    whole = own.tokenize(long.prompt.text)[0]
    context = own.tokenize.tokenizer.context_length
    assert ClipFusionEncoder(own, 500).text(long).input_ids[0].tolist() == whole and len(whole) == context
    short = ClipFusionEncoder(own, 10).text(long)
    assert short.input_ids[0].tolist() == [*whole[:9], whole[-1]]
    assert short.spans.shape == (1, 10, 2) and not short.spans[0, -1].any()


def test_nothing_to_read_and_nothing_to_see(mini, encoder, examples):
    student = open_teacher_as_student(mini)
    for modality in ("text", "image"):
        dataset = EncodedExamples(examples, encoder, modality=modality)
        batch = collate([dataset[i] for i in range(4)], encoder)
        assert logits_of(student, batch).isfinite().all()
        if modality == "image":
            assert_close(logits_of(student, batch).std(1), torch.zeros(4), **CLOSE)


# Storing


def stored(folder, student, encoder):
    student.save_pretrained(folder)
    encoder.save(folder)
    return str(folder)


@pytest.mark.parametrize("labels", [(), LABELS])
def test_save_and_load_give_the_same_logits(spec, own, examples, labels, tmp_path):
    student, encoder = open_teacher_as_student(*spec, labels=labels), ClipFusionEncoder(own)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    name = stored(tmp_path, student, encoder)
    again, its_encoder = load_student(name, seed=3, labels=labels), ClipFusionEncoder(name)
    assert (tmp_path / "model.safetensors").is_file() and not again.training
    assert type(again) is type(student) and again.config.hidden_size == student.config.hidden_size
    assert again.state_dict().keys() == student.state_dict().keys()
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in student.named_parameters() if p.requires_grad
    }
    chosen = statements_only(examples) if labels else examples
    batch, its_batch = batch_of(encoder, chosen), batch_of(its_encoder, chosen)
    assert batch.keys() == its_batch.keys() and all(torch.equal(batch[x], its_batch[x]) for x in batch)
    assert torch.equal(logits_of(again, its_batch), logits_of(student, batch))
    assert torch.equal(its_encoder.visual(chosen[0])["boxes"], encoder.visual(chosen[0])["boxes"])


def test_what_was_loaded_can_be_stored_again(mini, encoder, examples, tmp_path):
    first = stored(tmp_path / "first", open_teacher_as_student(mini), encoder)
    second = stored(tmp_path / "second", load_student(first), ClipFusionEncoder(first))
    shutil.rmtree(first)
    batch = batch_of(ClipFusionEncoder(second), examples)
    assert torch.equal(
        logits_of(load_student(second), batch), logits_of(open_teacher_as_student(mini), batch)
    )


@pytest.mark.parametrize("stored_labels", [(), ("no", "yes")])
def test_a_head_for_other_labels_is_drawn_anew(mini, encoder, examples, stored_labels, tmp_path):
    name = stored(tmp_path, open_teacher_as_student(mini, labels=stored_labels), encoder)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    load = partial(load_checkpoint, ClipFusionForClassification, name, labels=LABELS)
    first, same, other = load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(first.classifier[3].weight, same.classifier[3].weight)
    assert 0 < first.classifier[3].weight.std() < 1
    assert not torch.equal(first.classifier[3].weight, other.classifier[3].weight)
    for name, parameter in open_teacher_as_student(mini).clip.named_parameters():
        assert torch.equal(first.clip.get_parameter(name), parameter)
    assert logits_of(first, batch_of(encoder, statements_only(examples))).shape == (4, 3)


def test_a_stored_students_configuration_is_found_by_its_type(mini, encoder, tmp_path):
    config = AutoConfig.from_pretrained(stored(tmp_path, open_teacher_as_student(mini), encoder))
    assert isinstance(config, ClipFusionConfig) and config.model_type == "clip-fusion"
    assert config.clip == json.loads((tmp_path / "open_clip_config.json").read_text())


# Bad input


def test_hidden_states_are_refused(mini, encoder, examples):
    student, batch = open_teacher_as_student(mini), batch_of(encoder, examples)
    with pytest.raises(StudentError, match=r"nothing to distil CLIP into.*distill_weight=0"):
        student(**{name: batch[name] for name in student.inputs}, output_hidden_states=True)


def test_texts_beyond_the_context_are_refused(mini, encoder, examples):
    student, batch = open_teacher_as_student(mini), batch_of(encoder, examples)
    with pytest.raises(StudentError, match=r"49 tokens.*context of 48"):
        student(torch.zeros(4, 4, 49, dtype=torch.long), batch["pixel_values"])


def test_new_tokens_are_refused(encoder):
    with pytest.raises(StudentError, match=r"\[PERSON_0\].*references='names'"):
        encoder.tokenizer.add_tokens(["[PERSON_0]", *PERSON_TOKENS])
    assert len(encoder.tokenizer) == encoder.config.vocab_size


def test_teachers_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(TeacherError, match="no-such-model"):
        open_teacher_as_student("no-such-model")
    with pytest.raises(TeacherError, match=re.escape(str(tmp_path))):
        open_teacher_as_student(f"local-dir:{tmp_path}")


def another(tower: str, **settings):
    """Changes a tower's settings in a stored student's configuration."""

    def spoil(folder):
        clip = json.loads((folder / "config.json").read_text())["clip"]
        clip["model_cfg"][tower].update(settings)
        change(folder, clip=clip)

    return spoil


BROKEN_MODELS = BROKEN_FOLDERS | {
    "another width": another("vision_cfg", width=64),
    "one block more": another("text_cfg", layers=3),
    "no open_clip configuration": lambda folder: change(folder, clip=None),
    "half an open_clip configuration": lambda folder: change(folder, clip={"model_cfg": {}}),
}
BROKEN_ENCODERS = {
    "no config": BROKEN_MODELS["no config"],
    "malformed config": BROKEN_MODELS["malformed config"],
    "no open_clip configuration": BROKEN_MODELS["no open_clip configuration"],
    "another architecture": lambda folder: change(folder, model_type="vilt"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "malformed tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no open_clip_config.json": lambda folder: (folder / "open_clip_config.json").unlink(),
    "malformed open_clip_config.json": lambda folder: (folder / "open_clip_config.json").write_text("["),
}


@pytest.fixture
def folder(mini, encoder, tmp_path):
    return tmp_path / stored(tmp_path / "clip-student", open_teacher_as_student(mini), encoder)


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_checkpoints_that_do_not_fit_are_refused(folder, case):
    BROKEN_MODELS[case](folder)
    for labels in ((), LABELS):
        with pytest.raises(StudentError, match=re.escape(str(folder))):
            load_student(str(folder), labels=labels)


@pytest.mark.parametrize("case", BROKEN_ENCODERS)
def test_encoders_with_a_missing_or_malformed_file_are_refused(folder, case):
    BROKEN_ENCODERS[case](folder)
    with pytest.raises(StudentError, match=re.escape(str(folder))):
        ClipFusionEncoder(str(folder))


def test_other_architectures_and_teachers_are_no_stored_students(student_folder, teacher_folder, folder):
    for other in (student_folder, teacher_folder, folder / "nothing"):
        with pytest.raises(StudentError, match=re.escape(str(other))):
            load_checkpoint(ClipFusionForMultipleChoice, str(other), seed=0)
        with pytest.raises(StudentError, match=re.escape(str(other))):
            ClipFusionEncoder(str(other))
    with pytest.raises(StudentError, match=re.escape(str(folder))):
        load_checkpoint(ViltForMultipleChoice, str(folder), seed=0)


def test_a_head_for_labels_does_not_score_choices(mini, encoder, tmp_path):
    name = stored(tmp_path, open_teacher_as_student(mini, labels=LABELS), encoder)
    with pytest.raises(StudentError, match=re.escape(name)):
        load_checkpoint(ClipFusionForMultipleChoice, name, 0)


def test_pictures_of_any_size_become_one_batch(encoder):
    rng = np.random.default_rng(0)
    sizes = [(40, 90, 3), (33, 32, 3), (256, 256, 3)]
    pixels = [encoder.preprocess(Image.fromarray(rng.integers(0, 255, s, dtype=np.uint8))) for s in sizes]
    batch = encoder.pad_visual([{"pixels": p} for p in pixels])
    assert batch.keys() == {"pixel_values"} and batch["pixel_values"].shape == (3, 3, 32, 32)
