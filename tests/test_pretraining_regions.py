"""Pretraining of the mini region students: what is seen, said and learned, and the folders that come out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.data.examples import Example, Reference, TextPart
from tdlib.make.detector import train_mini_detector
from tdlib.make.pretraining import note_figures, train_wordpiece_tokenizer
from tdlib.make.regions import (
    KINDS,
    CaptionHeads,
    caption_losses,
    caption_texts,
    choose_captions,
    evaluate_region_student,
    named_people,
    pretrain_region_student,
    read_captions,
    see_scenes,
    text_inputs,
)
from tdlib.miniworld.drawing import SIZE, draw
from tdlib.miniworld.writers import captioned_scene, false_caption, scene_at
from tdlib.regions.backbones import load_detector
from tdlib.regions.computed import open_regions
from tdlib.students.base import StudentOutput
from tdlib.students.uniter import UniterConfig, UniterEncoder
from tdlib.students.visual_bert import VisualBertEncoder
from tdlib.students.vlbert import VlBertEncoder, load_vlbert

ENCODERS = {"uniter": UniterEncoder, "vl-bert": VlBertEncoder, "visual-bert": VisualBertEncoder}
TINY = {"scenes": 24, "steps": 3, "batch": 8, "readings": 2, "vocabulary_texts": 400}

each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "detector"
    train_mini_detector(folder, scenes=24, steps=2, batch=8, size=48)
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory, detector) -> dict[str, tuple[Path, dict[str, list[float]]]]:
    """By kind, the folder that pretraining wrote, and its losses."""
    home = tmp_path_factory.mktemp("students")
    return {
        kind: (home / kind, pretrain_region_student(kind, home / kind, detector, **TINY)) for kind in KINDS
    }


@pytest.fixture(scope="module")
def tokenizer(captions_texts):
    return train_wordpiece_tokenizer(captions_texts, 300)


@pytest.fixture(scope="module")
def seen(detector):
    return see_scenes(load_detector(detector), 0, 24)


def example_of(index: int, folder: Path) -> Example:
    """A curated scene as VCR lists its objects: people, then held things, then others."""
    scene = scene_at(0, "curated", index)
    picture = draw(scene)
    path = folder / f"{index}.png"
    picture.image.save(path)
    drawn = [*picture.people, *filter(None, picture.held), *picture.things]
    names = ("person",) * len(scene.people) + ("thing",) * (len(drawn) - len(scene.people))
    choices = tuple(map(named_people, ("Casey is happy.", "Riley is not.", "It is raining.", "No.")))
    boxes = tuple(tuple(float(side) / SIZE for side in shape.box) for shape in drawn)
    return Example("a", path, boxes, names, TextPart("How does somebody feel?"), choices, 0, "")


# What is seen


def test_regions_of_the_corpus_are_those_of_the_source(seen, detector, tmp_path):
    """As a set: only the order of things may differ."""
    source, some_people = open_regions(f"boxes+grid:{detector}"), set()
    for index in range(8):
        example = example_of(index, tmp_path)
        expected, real = source(example), seen.mask[index]
        people = example.names.count("person")
        some_people.add(people)
        assert int(seen.people[index]) == people
        objects = seen.objects[index][real]
        assert objects.tolist() == expected.objects.tolist()
        assert_close(seen.boxes[index][real][: 1 + people], expected.boxes[: 1 + people])
        own, theirs = (
            torch.cat([boxes, features.float()], dim=1)
            for boxes, features in (
                (seen.boxes[index][real], seen.features[index][real]),
                (expected.boxes, expected.features),
            )
        )
        rounded = [sorted(rows[:, :4].mul(1e4).round().tolist()) for rows in (own, theirs)]
        assert rounded[0] == rounded[1]
        distances = torch.cdist(own.double(), theirs.double())
        assert distances.min(0).values.max() < 0.02 and distances.min(1).values.max() < 0.02
    assert len(some_people) > 1
    assert seen.features.dtype == torch.half and not seen.features[~seen.mask].any()


def test_a_bare_picture_hides_its_objects_and_nothing_else(seen):
    index, bare = torch.tensor([3, 4]), torch.tensor([True, False])
    given = seen.inputs(index, bare)
    shown = given["region_mask"].bool()
    assert torch.equal(shown[0], seen.mask[3] & (seen.objects[3] < 0)) and torch.equal(shown[1], seen.mask[4])
    assert int(shown[0].sum()) == 1 + 36 < int(seen.mask[3].sum())
    assert given["region_objects"][0].eq(-1).all()
    assert torch.equal(given["region_objects"][1], seen.objects[4])
    assert torch.equal(given["region_features"], seen.features[index].float())


# What is said


def test_the_vocabulary_is_a_function_of_the_texts(tokenizer, captions_texts):
    again = train_wordpiece_tokenizer(captions_texts, 300)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 300
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    text = captions_texts[0]
    read = tokenizer(text)["input_ids"]
    assert [tokenizer.decode(read[i]) for i in (0, -1)] == ["[CLS]", "[SEP]"]
    assert tokenizer(text.upper())["input_ids"] == read and tokenizer.unk_token_id not in read


def test_captions_come_with_their_false_twins(tokenizer):
    texts = caption_texts(0, 12, 2)
    assert texts[5 * 4 + 1] == captioned_scene("curated", 0, 5, 1)[1]
    assert texts[5 * 4 + 3] == false_caption(0, 5, 1)
    read = read_captions(tokenizer, texts, 2, 62)
    assert read.ids.shape == read.objects.shape == read.replaced.shape and len(read.ids) == 48
    true = torch.arange(48) % 4 < 2
    assert not read.replaced[true].any() and read.replaced[~true].any(1).float().mean() > 0.8
    for row in range(48):
        length = int(read.lengths[row])
        assert read.ids[row, length - 1] == tokenizer.sep_token_id
        assert read.ids[row, length:].eq(tokenizer.pad_token_id).all()
        assert not read.replaced[row, length:].any() and read.objects[row, length:].eq(-1).all()


def test_a_name_refers_to_a_person_that_the_picture_shows(tokenizer):
    assert named_people("A man and Riley, near Casey.").references == (
        Reference(10, 15, (1,)),
        Reference(22, 27, (0,)),
    )
    text = "Jessie and Casey wave."
    read = read_captions(tokenizer, [text, text], 1, 62)
    words = tokenizer.convert_ids_to_tokens(read.ids[0])
    named = [tokenizer.tokenize(name) for name in ("Jessie", "and", "Casey")]
    expected = [-1, *[2] * len(named[0]), *[-1] * len(named[1]), *[0] * len(named[2])]
    assert words[1 : 1 + len(named[0])] == named[0]
    assert read.objects[0, : len(expected)].tolist() == expected
    assert read.objects[0, len(expected) :].eq(-1).all()
    both = text_inputs(read.ids, read.objects, torch.tensor([3, 1]), tokenizer)
    assert torch.equal(both["objects"][0, 0], read.objects[0])
    assert set(both["objects"][1, 0].tolist()) == {-1, 0}  # there is no third person


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_half_of_the_captions_do_not_match(share):
    index = torch.randperm(400)
    rows, match, false = choose_captions(index, share, 3, torch.Generator().manual_seed(0))
    scene, place = rows // 6, rows % 6
    assert abs(match.float().mean() - 0.5) < 0.1 and not (match & false).any()
    assert abs(false.float().sum() / (~match).sum() - share) < 0.1
    assert torch.equal(scene == index, match | false)
    assert torch.equal(place >= 3, false) and set(place.tolist()) == set(range(6 if share else 3))


# What is learned


def test_losses_ask_only_what_is_known():
    """Masked words of true captions, truth of all words."""
    torch.manual_seed(0)
    config = UniterConfig(vocab_size=11, hidden_size=8)
    heads, table = CaptionHeads(config), torch.randn(11, 8)
    output = StudentOutput(
        logits=torch.tensor([[2.0], [-1.0], [-3.0]]),
        hidden_states=tuple(torch.randn(3, 1, 7, 8) for _ in range(3)),
    )
    match = torch.tensor([True, False, False])
    read = torch.ones(3, 4, dtype=torch.bool)
    labels, replaced = torch.full((3, 4), 5), torch.zeros(3, 4, dtype=torch.bool)

    def losses(labels=labels, replaced=replaced, match=match, read=read):
        with torch.no_grad():
            return caption_losses(output, heads, table, labels, replaced, read, match)

    plain = losses()
    assert float(plain["matched"]) == 1 and all(value.isfinite() for value in plain.values())
    expected = -torch.log(torch.sigmoid(torch.tensor([2.0, 1.0, 3.0]))).mean()
    assert_close(plain["matching"], expected)
    others = labels.clone()
    others[1:] = 7
    assert_close(losses(labels=others), plain)
    for row in range(3):
        changed = replaced.clone()
        changed[row, 2] = True
        assert losses(replaced=changed)["truth"] != plain["truth"]
    padded = read.clone()
    padded[:2, 2] = False
    changed = replaced.clone()
    changed[:2, 2] = True
    assert_close(losses(replaced=changed, read=padded)["truth"], losses(read=padded)["truth"])
    nothing = losses(labels=torch.full((3, 4), -100), read=torch.zeros_like(read))
    assert float(nothing["words"]) == float(nothing["truth"]) == 0


@each_kind
def test_the_folder_loads_and_answers(kind, students, detector, tmp_path):
    folder, history = students[kind]
    assert {len(values) for values in history.values()} == {3} and np.isfinite(list(history.values())).all()
    assert (folder / "model.safetensors").stat().st_size < 2.5e6
    made = json.loads((folder / "provenance.json").read_text())
    assert made["corpus"] == "curated" and made["steps"] == 3 and made["final"].keys() == history.keys()
    encoder = ENCODERS[kind](str(folder), 40, open_regions(f"boxes+grid:{detector}"))
    model = KINDS[kind].load(str(folder)).eval()
    example = example_of(3, tmp_path)
    for shown in (example, replace(example, boxes=(), names=())):
        text, visual = encoder.text(shown), encoder.pad_visual([encoder.visual(shown)])
        batch = {name: getattr(text, name)[None] for name in vars(text)} | visual
        with torch.inference_mode():
            output = model(**{name: value for name, value in batch.items() if name in model.inputs})
        assert output.logits.shape == (1, 4) and output.logits.isfinite().all()
        assert len(set(output.logits[0].tolist())) == 4


@each_kind
def test_types_that_captions_lack_start_as_their_own(kind, students):
    folder, _ = students[kind]
    rows = load_file(folder / "model.safetensors")[KINDS[kind].types]
    assert len(rows) == len(KINDS[kind].met)
    for row, source in zip(rows, KINDS[kind].met, strict=True):
        assert torch.equal(row, rows[source])
    assert len(rows.unique(dim=0)) == len(set(KINDS[kind].met))


def test_a_classifier_of_vlbert_starts_from_the_word_predictor(students):
    folder, _ = students["vl-bert"]
    kept = load_file(folder / "model.safetensors")["classifier.0.dense.weight"]
    labelled = [load_vlbert(str(folder), seed, labels=("no", "yes")) for seed in (0, 1)]
    for model in labelled:
        assert torch.equal(model.classifier[0].dense.weight, kept.float())
    assert not torch.equal(labelled[0].classifier[2].weight, labelled[1].classifier[2].weight)


@each_kind
def test_a_seed_gives_the_same_bytes(kind, students, detector, tmp_path):
    folder, history = students[kind]
    assert pretrain_region_student(kind, tmp_path, detector, **TINY) == history
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@each_kind
def test_figures_are_shares(kind, students, detector):
    folder, _ = students[kind]
    figures = evaluate_region_student(kind, folder, detector, scenes=10)
    assert figures == evaluate_region_student(kind, folder, detector, scenes=10)
    assert set(figures) == {f"matching{hard}{bare}" for hard in ("", "_hard") for bare in ("", "_bare")}
    assert all(0 <= value <= 1 for value in figures.values())
    note_figures(folder, figures)
    made = json.loads((folder / "provenance.json").read_text())
    assert made["held_out"] == figures and made["weights"] == "model.safetensors"


def test_padding_of_captions_does_not_matter(students, seen):
    """Evaluation reads all captions at one length."""
    folder, _ = students["uniter"]
    model = KINDS["uniter"].load(str(folder)).eval()
    given = seen.inputs(torch.arange(2), torch.tensor([True, False]))
    ids = torch.randint(5, 300, (2, 1, 9))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    longer = {name: F.pad(value, (0, 5)) for name, value in text.items()}
    with torch.inference_mode():
        short, long = (
            model(**{name: value for name, value in (given | said).items() if name in model.inputs}).logits
            for said in (text, longer)
        )
    assert_close(short, long, rtol=0, atol=1e-5)
