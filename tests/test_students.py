"""What all students share: their classifiers, the texts that they cut, files that are not read."""

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import region_students as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from region_students import LABELS
from torch.testing import assert_close

from tdlib.data.examples import Reference, TextPart
from tdlib.data.vcr import VcrReader
from tdlib.regions.computed import Regions
from tdlib.students.base import StudentError, report_cut
from tdlib.students.clip import ClipFusionEncoder
from tdlib.students.convert import main as convert_command
from tdlib.students.region_student import RegionEncoder
from tdlib.students.registry import load_student, open_encoder


@pytest.fixture(scope="module")
def uniter_folder(tmp_path_factory, tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("students") / "uniter"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    small.uniter(img_dim=4).save_pretrained(folder)
    return folder


@pytest.fixture(params=["vilt", "uniter"])
def folder(request, student_folder, uniter_folder) -> str:
    return str(student_folder if request.param == "vilt" else uniter_folder)


@pytest.fixture(scope="module")
def examples(world):
    return VcrReader(world, "train").read()


def boxes_as_features(example) -> Regions:
    boxes = torch.tensor(example.boxes)
    return Regions(boxes, boxes, torch.arange(len(boxes)))


boxes_as_features.dim = 4  # type: ignore[attr-defined]


# Classifiers


def stored(folder, tmp_path, labels):
    student = load_student(folder, 9, labels)
    with torch.no_grad():
        student.classifier[-1].bias.copy_(torch.arange(len(labels)))
    student.save_pretrained(tmp_path)
    return student.classifier[-1]


def test_a_classifier_keeps_each_label_its_output(folder, tmp_path, caplog):
    """Also where the labels come in another order, as from another run's vocabulary."""
    old = stored(folder, tmp_path, LABELS)
    same = load_student(str(tmp_path), 2, LABELS)
    assert torch.equal(same.classifier[-1].weight, old.weight) and not caplog.records
    caplog.clear()
    order = ("maybe", "NO", "yes")
    new = load_student(str(tmp_path), 2, order)
    assert torch.equal(new.classifier[-1].weight, old.weight[[2, 0, 1]])
    assert new.classifier[-1].bias.tolist() == [2, 0, 1]
    assert new.config.id2label == dict(enumerate(order))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("labels", [("no", "yes", "rain"), ("no", "yes"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_a_classifier_of_other_labels_is_drawn_anew(folder, tmp_path, caplog, labels):
    old = stored(folder, tmp_path, LABELS)
    first, same, other = (load_student(str(tmp_path), seed, labels) for seed in (1, 1, 2))
    weight = first.classifier[-1].weight
    assert weight.shape == (len(labels), old.in_features) and not first.classifier[-1].bias.any()
    assert not torch.isin(weight, old.weight).any() and 0 < weight.std() < 0.05
    assert torch.equal(weight, same.classifier[-1].weight)
    assert not torch.equal(weight, other.classifier[-1].weight)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert "drawn anew" in caplog.text


def test_outputs_without_names_are_not_taken_for_labels(uniter_folder, tmp_path):
    """UNITER's score of a choice has two outputs, too: wrong and right."""
    two = load_student(str(uniter_folder)).classifier[3]
    assert not torch.isin(
        load_student(str(uniter_folder), 1, ("no", "yes")).classifier[3].weight, two.weight
    ).any()


# Texts


words = st.text("rain umbrella\u00e9\u0327 ,.", max_size=60).map(lambda text: f"a {text}")


@pytest.fixture(scope="module", params=["vilt", "uniter", "clip"])
def short_encoder(request, student_folder, uniter_folder, teacher):
    """Reads 20 tokens of a statement."""
    if request.param == "clip":
        return ClipFusionEncoder(teacher, 20)
    folder = student_folder if request.param == "vilt" else uniter_folder
    return open_encoder(str(folder), 20, lambda: boxes_as_features)


@settings(max_examples=25, deadline=None)
@given(prompt=words, choices=st.lists(words, max_size=4), share=st.sampled_from([0, 0.5]))
def test_each_statement_is_encoded_as_if_it_were_alone(short_encoder, examples, prompt, choices, share):
    """And each distinct part of a region student's is read once."""
    encoder = short_encoder
    example = replace(
        examples[0], prompt=TextPart(prompt, (Reference(0, 1, (2,)), Reference(1, len(prompt), (1,)))),
        choices=tuple(map(TextPart, choices)), given=int(share * len(prompt)),
    )  # fmt: skip
    whole = encoder.text(example)
    statements = [replace(example, choices=(choice,)) for choice in example.choices] or [example]
    assert len(whole.input_ids) == len(statements)
    padding = {"input_ids": encoder.tokenizer.pad_token_id, "objects": -1}
    for row, statement in enumerate(statements):
        for name, alone in vars(encoder.text(statement)).items():
            value, length = getattr(whole, name)[row], alone.shape[1]
            assert value.dtype == torch.int64 and torch.equal(value[:length], alone[0]), name
            assert (value[length:] == padding.get(name, 0)).all(), name
    if isinstance(encoder, RegionEncoder):
        parts, asked, real = encoder._parts(example), [], encoder.tokenizer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                encoder, "tokenizer", lambda texts, **how: asked.extend(texts) or real(texts, **how)
            )
            encoder._pieces(parts)
        assert len(asked) == len(set(asked)) and set(asked) == {text for row in parts for text, _, _ in row}


@pytest.mark.parametrize("kind", ["vilt", "uniter", "clip"])
def test_what_is_cut_is_counted(kind, student_folder, uniter_folder, teacher, examples, caplog, monkeypatch):
    encoder = (
        ClipFusionEncoder(teacher)
        if kind == "clip"
        else open_encoder(
            str(student_folder if kind == "vilt" else uniter_folder), 40, lambda: boxes_as_features
        )
    )
    short = replace(examples[0], prompt=TextPart("rain"), choices=(TextPart("rain"), TextPart("rain rain")))
    long = replace(short, choices=(TextPart("rain"), TextPart("rain " * 30)))
    whole = [int(mask.sum()) for mask in encoder.text(short).attention_mask]
    assert encoder.lengths(short) == whole
    assert report_cut(encoder, [short, long], "val") == 1
    assert "1 of 4 statements (2 examples) of split val" in caplog.text
    assert int(encoder.text(long).attention_mask[1].sum()) == 40
    encoder.max_text_tokens = max(whole)
    caplog.clear()
    assert report_cut(encoder, [short], "val") == report_cut(encoder, [], "val") == 0 and not caplog.text
    encoder.max_text_tokens -= 1
    assert report_cut(encoder, [short], "val") == 1
    monkeypatch.setattr("tdlib.students.base.MOST_MEASURED", 2)
    assert report_cut(encoder, [short] * 5, "val") == 5
    # VCR's answers and rationales take turns, and only rationales are long
    monkeypatch.setattr("tdlib.students.base.MOST_MEASURED", 50)
    brief = replace(short, choices=())
    assert report_cut(encoder, [brief, short] * 100, "val") == pytest.approx(100, abs=30)


def test_what_clips_context_cuts_is_counted(teacher, examples, caplog):
    """The teacher of these tests reads 48 tokens."""
    long = replace(examples[0], prompt=TextPart("rain " * 60), choices=(TextPart("rain"),))
    assert report_cut(ClipFusionEncoder(teacher, 1000), [long], "val") == 1
    assert int(re.search(r"longest has (\d+) tokens", caplog.text)[1]) >= 63


@pytest.mark.parametrize(
    "text, words",
    [
        ("a q\u0307\u0323 rain", [(0, 1), (2, 5), (6, 10)]),  # marks in an order that normalisation turns
        ("is \uff52\uff41\uff49\uff4e here", [(0, 2), (3, 7), (8, 12)]),  # full-width letters
        ("cafe\u0301 rain", [(0, 5), (6, 10)]),
        ("caf\u00e9 rain", [(0, 4), (5, 9)]),
    ],
)
def test_tokens_lie_in_their_words_whatever_normalisation_does(folder, examples, text, words):
    encoder = open_encoder(folder, 40, lambda: boxes_as_features)
    spans = encoder.text(replace(examples[0], prompt=TextPart(text), choices=(TextPart("x"),))).spans[0]
    spans = [(start, end) for start, end in spans.tolist() if 0 < end <= len(text)]
    covered = {next(word for word in words if word[0] <= start < end <= word[1]) for start, end in spans}
    assert covered == set(words)
    assert all(any(start == word[0] for start, _ in spans) for word in words)


# Pictures


@pytest.mark.parametrize("size", [(4000, 8), (8, 4000), (1, 120), (120, 1), (1, 1), (30_000, 2)])
def test_the_longest_and_thinnest_pictures_become_patches(student_folder, examples, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    encoder = open_encoder(str(student_folder), 40)
    visual = encoder.visual(replace(examples[0], image=tmp_path / "thin.png"))
    sides = torch.tensor(visual["pixels"].shape[1:])
    assert (sides >= 16).all() and (sides % 16 == 0).all() and int(sides.max()) <= 80
    boxes = encoder.visual_boxes(visual)[1:]
    assert len(boxes) == sides.prod() // 256
    assert_close((boxes[:, 2:] - boxes[:, :2]).prod(1).sum(), torch.tensor(1.0))


# Files


def test_nobody_is_advised_to_load_code(tmp_path, student_folder, monkeypatch):
    """torch proposes to unpickle a file that holds more than tensors."""
    (tmp_path / "config.json").write_text((student_folder / "config.json").read_text())
    torch.save({"weight": torch.ones(1), "path": Path("x")}, tmp_path / "pytorch_model.bin")
    paths = str(tmp_path / "pytorch_model.bin"), str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["convert", "uniter", *paths, "--tokenizer", str(student_folder)])
    with pytest.raises(StudentError) as loading:
        load_student(str(tmp_path))
    with pytest.raises(SystemExit) as converting:
        convert_command()
    for message in map(str, (loading.value, converting.value)):
        assert "could run any code and are not read" in message
        assert "weights_only" not in message and "safe_globals" not in message
