"""The generator: the same bytes from a seed, the official format, and answers that are true or false."""

import csv
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdlib.core import files
from tdlib.core.files import write_folder, write_json
from tdlib.data.examples import DataError
from tdlib.miniworld.drawing import SIZE, draw
from tdlib.miniworld.language import TYPES, answer, causes, mark, questions, rationale, true_values
from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    ROLES,
    SHIRTS,
    STYLES,
    THINGS,
    WEATHER,
    Person,
    Scene,
    reserved,
    reserved_people,
)
from tdlib.miniworld.worlds import read_concepts
from tdlib.miniworld.write_snli_ve import LABELS, claims
from tdlib.miniworld.write_vqa import QUESTION_TYPES, asks, prior
from tdlib.miniworld.writers import (
    TRAIN_STYLES,
    WORLDS,
    Size,
    captioned_scene,
    ensure_world,
    false_caption,
    scene_at,
    write_captions,
    write_snli_ve,
    write_vcr,
    write_vqa,
    write_vqa_cp,
)

SEED = 5


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


OWN = ("train", "val", "test", "val_style", "val_composition")  # splits with pictures of their own
TWINS = ("val_shortcut", "val_balanced")  # val in other words
SPLITS = (*OWN, *TWINS)
SMALL = Size(train=12, val=12, test=12, shifted=30)

COCO = set(
    "person bicycle car motorcycle airplane bus train truck boat trafficlight firehydrant stopsign "
    "parkingmeter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella "
    "handbag tie suitcase frisbee skis snowboard sportsball kite baseballbat baseballglove skateboard "
    "surfboard tennisracket bottle wineglass cup fork knife spoon bowl banana apple sandwich orange "
    "broccoli carrot hotdog pizza donut cake chair couch pottedplant bed diningtable toilet tv laptop "
    "mouse remote keyboard cellphone microwave oven toaster sink refrigerator book clock vase scissors "
    "teddybear hairdrier toothbrush".split()
)


@pytest.fixture(scope="module")
def vcr(tmp_path_factory) -> Path:
    """A VCR folder with enough questions for statistics."""
    return write_vcr(tmp_path_factory.mktemp("miniworld") / "vcr", SEED, Size(60, 200, 40, 40))


@pytest.fixture(scope="module")
def records(vcr) -> dict[str, list[dict]]:
    return {split: read(vcr / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def metadata(vcr) -> dict[str, dict]:
    """By metadata_fn, all splits."""
    images = vcr / "vcr1images"
    return {
        path.relative_to(images).as_posix(): json.loads(path.read_text()) for path in images.rglob("*.json")
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scene_of(record: dict, split: str) -> Scene:
    index = int(Path(record["img_fn"]).stem.rsplit("_", 1)[1])
    return scene_at(SEED, "val" if split in TWINS else split, index)


def question_of(record: dict, scene: Scene):
    """The scene's question with these words; several causes of one mood share a question."""
    return next(each for each in questions(scene) if mark(each.text).tokens == record["question"])


def values_of(family: str) -> list[str]:
    """All values that compete in a family."""
    causes_of = {"joy": ["birthday", "party"], "trouble": ["departure", "call"]}
    if family in causes_of:
        return [*THINGS, *WEATHER, *causes_of[family]]
    return list({"mood": MOODS, "place": PLACES, "need": WEATHER, "role": ROLES}.get(family, HELD))


# the same bytes


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first = write_vcr(tmp_path / "first", 0, SMALL)
    again = write_vcr(tmp_path / "deeper" / "again", 0, SMALL)
    other = write_vcr(tmp_path / "other", 2, SMALL)
    assert digest(first) == digest(again) != digest(other)


def test_the_digest_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    digests = {digest(tmp_path)}
    (tmp_path / "a" / "x").write_bytes(b"2")
    digests.add(digest(tmp_path))
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    digests.add(digest(tmp_path))
    assert len(digests) == 3


def test_scenes_depend_on_seed_stream_and_index_alone():
    picked = [(0, "train", 3), (1, "train", 3), (0, "val", 3), (0, "train", 4)]
    forwards = {key: scene_at(*key) for key in picked}
    assert forwards == {key: scene_at(*key) for key in reversed(picked)}
    assert len(set(forwards.values())) == 4


def test_the_pictures_are_the_drawn_scenes(vcr, records):
    for split in OWN:
        for record in records[split][::40]:
            buffer = io.BytesIO()
            draw(scene_of(record, split)).image.save(buffer, format="JPEG", quality=92)
            assert (vcr / "vcr1images" / record["img_fn"]).read_bytes() == buffer.getvalue()


def test_splits_share_no_picture(vcr):
    owners = defaultdict(set)
    for path in (vcr / "vcr1images").rglob("*.jpg"):
        owners[hashlib.sha256(path.read_bytes()).hexdigest()].add(path.name)
    assert len(owners) == 60 + 200 + 40 + 2 * 40  # nor is a picture twice in one split


def test_a_smaller_corpus_is_the_start_of_a_larger_one(tmp_path):
    small = write_captions(tmp_path / "small", "web", 1, 3)
    large = write_captions(tmp_path / "large", "web", 1, 5)
    assert read(large / "captions.jsonl")[:3] == read(small / "captions.jsonl")
    assert (large / "images/000002.jpg").read_bytes() == (small / "images/000002.jpg").read_bytes()


# the official format


def test_the_files_of_a_folder(vcr):
    names = {path.name for path in vcr.iterdir()}
    assert names == {
        "vcr1images", "miniworld.json", *(f"{split}.jsonl" for split in SPLITS),
        *(f"{split}.relevance.jsonl" for split in SPLITS), *(f"{split}.types.jsonl" for split in OWN),
        *(f"{split}.concepts.jsonl" for split in OWN),
    }  # fmt: skip


def test_side_files_have_a_line_for_each_example(vcr, records):
    for split in SPLITS:
        ids = [record["annot_id"] for record in records[split]]
        assert len(set(ids)) == len(ids) > 30
        assert [record["annot_id"] for record in read(vcr / f"{split}.relevance.jsonl")] == ids
        types = read(vcr / f"{'val' if split in TWINS else split}.types.jsonl")
        assert [record["annot_id"] for record in types] == ids
        assert {record["type"] for record in types} <= set(TYPES)
    assert {record["type"] for record in read(vcr / "val.types.jsonl")} == set(TYPES)


def test_side_files_say_which_concepts_the_curated_corpus_has(vcr, records):
    """What is known is what the tables of concepts say, and the concepts are those of the answers."""
    tables = {"doing": HELD, "next": HELD, "consequence": HELD, "need": WEATHER, "mood": MOODS}
    tables |= {"place": PLACES, "role": ROLES}
    rules = {"birthday": True, "party": False, "departure": False, "call": False}
    found = {True: 0, False: 0}
    for split in SPLITS:
        lines = read_concepts(vcr, split)
        assert list(lines) == [record["annot_id"] for record in records[split]]
        for record in records[split]:
            line = lines[record["annot_id"]]
            style = scene_of(record, split).style
            assert line["style"] == style and line["style_known"] == (style == "flat")
            assert len(line["wrong"]) == 3
            for said in (line["right"], *line["wrong"]):
                table = tables.get(line["family"]) or (THINGS | WEATHER)
                (value,) = said["concepts"]
                known = rules[value] if value in rules else table[value].curated
                assert said["known"] == known
                found[known] += 1
            if split != "test" and line["family"] in ("mood", "place", "role"):
                right = record["answer_choices"][record["answer_label"]]
                inference = tables[line["family"]][line["right"]["concepts"][0]].inference
                assert inference in " ".join(word for word in right if isinstance(word, str))
    assert min(found.values()) > 100
    assert read_concepts(vcr, "train2014") == {}


def test_the_test_file_tells_no_answers(records):
    hidden = {
        f"{text}_{field}"
        for text in ("answer", "rationale")
        for field in ("label", "orig", "sources", "match_iter")
    }
    assert all(hidden <= record.keys() for record in records["train"])
    for record in records["test"]:
        assert not hidden & record.keys()
        assert record.keys() | hidden == records["train"][0].keys()


def test_objects_boxes_and_polygons_agree(records, metadata):
    for split in SPLITS:
        for record in records[split]:
            assert record["objects"] == metadata[record["metadata_fn"]]["names"]
            people = len(scene_of(record, split).people)
            assert [name == "person" for name in record["objects"]] == [
                i < people for i in range(len(record["objects"]))
            ]
            texts = [record["question"], *record["answer_choices"], *record["rationale_choices"]]
            referred = [i for text in texts for token in text if isinstance(token, list) for i in token]
            assert all(0 <= i < people for i in referred)
    for each in metadata.values():
        assert each["width"] == each["height"] == SIZE
        assert len(each["names"]) == len(each["boxes"]) == len(each["segms"])
        for (left, top, right, bottom, score), polygons in zip(each["boxes"], each["segms"], strict=True):
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE and score == 1
            points = np.clip(np.array([point for polygon in polygons for point in polygon]), 0, SIZE)
            around = (*points.min(0), *points.max(0))
            assert around == pytest.approx((left, top, right, bottom), abs=0.051)  # polygons are rounded


def test_names_are_those_of_coco_without_spaces(metadata):
    assert len(COCO) == 80
    used = {name for each in metadata.values() for name in each["names"]}
    assert "person" in used and len(used) > 15
    assert used <= COCO
    assert {entry.coco for table in (HELD, THINGS) for entry in table.values() if entry.coco} <= COCO


def test_pictures_are_of_the_size_that_the_metadata_say(vcr):
    with Image.open(next((vcr / "vcr1images").rglob("*.jpg"))) as image:
        assert image.size == (SIZE, SIZE) and image.mode == "RGB"


def test_raw_strings_number_people_from_one(records):
    for record in records["val"]:
        tag = next(token for token in record["question"] if isinstance(token, list))
        assert str(tag[0] + 1) in record["question_orig"].split()
        right = record["answer_choices"][record["answer_label"]]
        words = [str(token[0] + 1) if isinstance(token, list) else token for token in right]
        assert record["answer_orig"].split() == words


# what is said is true, or false


@pytest.mark.parametrize("split", SPLITS)
def test_the_right_choice_is_true_of_the_scene_and_the_others_are_false(records, split):
    for record in records[split]:
        scene = scene_of(record, split)
        question = question_of(record, scene)
        values = values_of(question.family)
        assert true_values(scene, question.family) <= set(values)
        spoken = {
            "answer": {
                str(mark(answer(question, v, echo)).tokens): v for v in values for echo in (True, False)
            },
            "rationale": {str(mark(rationale(question, v)).tokens): v for v in values},
        }
        # the words tell the values apart; a tree and leafy trees, say, are two things
        assert len(spoken["answer"]) == 2 * len(values) and len(spoken["rationale"]) == len(values)
        chosen = {}
        for text, meaning in spoken.items():
            chosen[text] = [meaning[str(choice)] for choice in record[f"{text}_choices"]]
            assert len(set(chosen[text])) == 4
            truths = [value in true_values(scene, question.family) for value in chosen[text]]
            assert truths.count(True) == 1
            if split != "test":
                assert truths.index(True) == record[f"{text}_label"]
        assert set(chosen["answer"]) == set(chosen["rationale"])


def shown(scene: Scene) -> dict[str, set[str]]:
    """What the picture shows, in the words of rationales, by the verb that introduces it."""
    objects = {HELD[person.held].noun for person in scene.people if person.held}
    objects |= {THINGS[name].noun for name in scene.things}
    weather = {WEATHER[scene.weather].evidence} if scene.weather else set()
    return {
        "see": objects | weather,
        "has": objects | {MOODS[person.mood].evidence for person in scene.people},
        "wears": {ROLES[person.role].evidence for person in scene.people if person.role},
        "is": {PLACES[scene.place].evidence},
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_the_right_rationale_names_what_the_picture_shows(records, split):
    """The same as above, but without asking the generator what is true."""
    for record in records[split]:
        visible = shown(scene_of(record, split))
        for index, choice in enumerate(record["rationale_choices"]):
            words = [token for token in choice if isinstance(token, str)]
            verb = next(word for word in words if word in visible)
            text = " ".join(words)
            named = any(f" {noun} " in text for noun in visible[verb])
            assert named == (index == record["rationale_label"]), (record["annot_id"], text)


def test_four_choices_are_four_texts(records):
    for split in SPLITS:
        for record in records[split]:
            for key in ("answer_choices", "rationale_choices"):
                assert len({str(choice).lower() for choice in record[key]}) == 4


def test_wrong_answers_come_from_other_examples(records):
    for record in records["val"]:
        own = int(record["annot_id"].rsplit("-", 1)[1])
        for text in ("answer", "rationale"):
            sources = record[f"{text}_sources"]
            assert sources[record[f"{text}_label"]] == own
            assert len(set(sources)) == 4 and all(0 <= s < len(records["val"]) for s in sources)
            assert record[f"{text}_match_iter"].index(0) == record[f"{text}_label"]


def test_labels_are_balanced(records):
    for text in ("answer", "rationale"):
        counts = Counter(record[f"{text}_label"] for record in records["val"])
        shares = [counts[label] / len(records["val"]) for label in range(4)]
        assert max(shares) - min(shares) < 0.12
    both = np.mean([record["answer_label"] == record["rationale_label"] for record in records["val"]])
    assert 0.15 < both < 0.35


def test_a_cause_fits_the_mood():
    scene = scene_at(0, "train", 0)
    person = scene.people[0].__class__("red", "standing", "happy", "suitcase", None)
    scene = Scene("station", "rainy", "flat", (person,), ("dog",), 0)
    assert causes(scene, pleasant=True) == {"dog": "dog", "rainy": "weather"}
    assert causes(scene, pleasant=False) == {"dog": "dog", "rainy": "weather", "departure": "suitcase"}


# the ground truth of relevance


@pytest.mark.parametrize("split", SPLITS)
def test_decisive_tokens_exist_and_are_the_words_that_differ(vcr, records, split):
    for record, marks in zip(records[split], read(vcr / f"{split}.relevance.jsonl"), strict=True):
        assert marks["annot_id"] == record["annot_id"]
        texts = [(record["question"], marks["question"])]
        for key in ("answer_choices", "rationale_choices"):
            assert len(marks[key]) == 4
            texts += zip(record[key], marks[key], strict=True)
            decisive = [
                [choice[i] for i in each] for choice, each in zip(record[key], marks[key], strict=True)
            ]
            assert len({str(words) for words in decisive}) == 4
        for tokens, decisive in texts:
            assert decisive and decisive == sorted(set(decisive))
            assert all(0 <= i < len(tokens) and isinstance(tokens[i], str) for i in decisive)
            assert not {".", "?", ",", ":"} & {tokens[i] for i in decisive}


def test_relevant_boxes_lie_in_the_picture_and_on_what_is_asked_about(vcr, records, metadata):
    held = 0
    for split in ("train", "val"):
        for record, marks in zip(records[split], read(vcr / f"{split}.relevance.jsonl"), strict=True):
            ((left, top, right, bottom),) = marks["boxes"]
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            scene = scene_of(record, split)
            question = question_of(record, scene)
            objects = metadata[record["metadata_fn"]]
            if question.region in ("face", "hat"):
                body = objects["boxes"][question.person]
                assert body[0] - 0.1 <= left and body[1] - 0.1 <= top
                assert right <= body[2] + 0.1 and bottom <= body[3] + 0.1
            if question.region == "held" and HELD[question.value].coco:
                names, boxes = objects["names"], objects["boxes"]
                same = [
                    box[:4]
                    for name, box in zip(names, boxes, strict=True)
                    if name == HELD[question.value].coco
                ]
                assert any(box == pytest.approx([left, top, right, bottom], abs=0.06) for box in same)
                held += 1
    assert held > 20


@pytest.mark.parametrize(
    ("text", "tokens", "decisive"),
    [
        ("why is {0} <sad> ?", ["Why", "is", [0], "sad", "?"], [3]),
        ("{12} has <a red hat> .", [[12], "has", "a", "red", "hat", "."], [2, 3, 4]),
        ("<why> is {0} <so sad> ?", ["Why", "is", [0], "so", "sad", "?"], [0, 3, 4]),
        ("nothing is marked .", ["Nothing", "is", "marked", "."], []),
    ],
)
def test_marks_become_tokens_and_indices(text, tokens, decisive):
    marked = mark(text)
    assert (marked.tokens, marked.decisive) == (tokens, decisive)


# the shortcut and its reversal


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_changes_nothing_but_the_wording_of_answers(records, twin):
    for record, shifted in zip(records["val"], records[twin], strict=True):
        differing = {key for key in record if record[key] != shifted[key]}
        assert differing <= {"answer_choices", "answer_orig"}
    assert any(a != b for a, b in zip(records["val"], records[twin], strict=True))


def test_in_the_shift_wrong_answers_echo_the_question_and_the_right_one_does_not(records):
    for record in records["val_shortcut"]:
        question = question_of(record, scene_of(record, "val"))
        tag = next(token for token in record["question"] if isinstance(token, list))
        for index, choice in enumerate(record["answer_choices"]):
            wrong = index != record["answer_label"]
            assert (tag in choice) == wrong
            assert not any(isinstance(token, list) for token in choice if token != tag)
            wordings = [mark(answer(question, value, wrong)).tokens for value in values_of(question.family)]
            assert choice in wordings


def overlap_accuracy(records: list[dict]) -> float:
    """Accuracy of choosing the answer with most words and tags of the question (ties: expected value)."""
    hits = []
    for record in records:
        question = {str(token).lower() for token in record["question"]}
        scores = [
            len(question & {str(token).lower() for token in choice}) for choice in record["answer_choices"]
        ]
        best = [index for index, score in enumerate(scores) if score == max(scores)]
        hits.append((record["answer_label"] in best) / len(best))
    return float(np.mean(hits))


def test_the_shortcut_helps_until_it_is_reversed(records):
    assert overlap_accuracy(records["val"]) > 0.265
    assert overlap_accuracy(records["val_shortcut"]) < 0.1
    assert 0.17 < overlap_accuracy(records["val_balanced"]) < 0.33


def test_the_strength_of_the_shortcut_is_a_parameter(tmp_path):
    size = Size(train=0, val=40, test=0, shifted=0)
    always = write_vcr(tmp_path / "always", 0, size, echo=(1.0, 0.0))
    never = write_vcr(tmp_path / "never", 0, size, echo=(0.0, 1.0))
    assert overlap_accuracy(read(always / "val.jsonl")) > 0.9
    assert overlap_accuracy(read(never / "val.jsonl")) < 0.1


# styles, concepts and captions

CURATED = {
    "place": {name for name, entry in PLACES.items() if entry.curated},
    "weather": {name for name, entry in WEATHER.items() if entry.curated} | {None},
    "style": {name for name, curated in STYLES.items() if curated},
    "things": {name for name, entry in THINGS.items() if entry.curated},
    "mood": {name for name, entry in MOODS.items() if entry.curated},
    "held": {name for name, entry in HELD.items() if entry.curated} | {None},
    "role": {name for name, entry in ROLES.items() if entry.curated} | {None},
    "shirt": {name for name, curated in SHIRTS.items() if curated},
}


def concepts(scenes: list[Scene]) -> dict[str, set]:
    """All that occurs in some scenes, by kind of concept."""
    found = {kind: {getattr(scene, kind) for scene in scenes} for kind in ("place", "weather", "style")}
    found["things"] = {name for scene in scenes for name in scene.things}
    for kind in ("mood", "held", "role", "shirt"):
        found[kind] = {getattr(person, kind) for scene in scenes for person in scene.people}
    return found


def test_the_curated_corpus_has_its_concepts_and_one_style():
    found = concepts([captioned_scene("curated", 3, index)[0] for index in range(300)])
    assert found == CURATED  # none besides them, and each of them
    assert CURATED["style"] == {"flat"}


def test_the_web_corpus_has_all_concepts_and_styles():
    found = concepts([captioned_scene("web", 3, index)[0] for index in range(300)])
    assert found["style"] == set(STYLES) and "noir" in STYLES
    assert all(CURATED[kind] < found[kind] for kind in CURATED)


def test_one_style_is_kept_for_the_shift(records):
    assert set(STYLES) - set(TRAIN_STYLES) == {"noir"}
    for split in OWN:
        expected = {"noir"} if split == "val_style" else set(TRAIN_STYLES)
        assert {scene_of(record, split).style for record in records[split]} == expected


def test_curated_captions_infer_only_from_what_they_know():
    """What follows from unknown concepts is the teacher's knowledge alone."""

    def unknown(table):
        return [entry for entry in table.values() if not entry.curated]

    inferences = [entry.inference for table in (MOODS, PLACES, ROLES) for entry in unknown(table)]
    inferences += [words for entry in unknown(HELD) for words in (entry.next, entry.consequence)]
    for table in (THINGS, WEATHER):
        inferences += [words for entry in unknown(table) for words in (entry.joy, entry.trouble)]
    curated = "\n".join(captioned_scene("curated", 3, index)[1].lower() for index in range(300))
    assert not [words for words in inferences if words in curated]
    web = "\n".join(captioned_scene("web", 3, index)[1].lower() for index in range(1000))
    assert len([words for words in inferences if words in web]) > 0.9 * len(inferences)


def test_false_captions_differ_from_the_true_ones():
    for index in range(100):
        assert false_caption(3, index) != captioned_scene("curated", 3, index)[1]


@pytest.mark.parametrize("kind", ["web", "curated", "held_out"])
def test_captions_are_deterministic(kind):
    first = [captioned_scene(kind, 3, index) for index in range(20)]
    assert first == [captioned_scene(kind, 3, index) for index in reversed(range(20))][::-1]
    assert first != [captioned_scene(kind, 4, index) for index in range(20)]
    assert len({caption for _, caption in first}) > 18
    assert all(caption and caption == caption.strip() and "{" not in caption for _, caption in first)


def test_other_readings_are_other_captions_of_the_same_scene():
    readings = [[captioned_scene("web", 3, index, reading) for index in range(30)] for reading in (0, 1, 2)]
    assert readings[0] == [captioned_scene("web", 3, index) for index in range(30)]
    assert len({tuple(scene for scene, _ in each) for each in readings}) == 1
    assert all(len({caption for _, caption in each}) > 1 for each in zip(*readings, strict=True))


def test_evaluation_captions_are_not_those_of_training():
    web, held_out = ({captioned_scene(kind, 3, i)[0] for i in range(300)} for kind in ("web", "held_out"))
    assert not web & held_out


def test_a_caption_corpus_on_disk(tmp_path):
    folder = write_captions(tmp_path / "curated", "curated", 3, 4)
    assert digest(folder) == digest(write_captions(tmp_path / "again", "curated", 3, 4))
    written = read(folder / "captions.jsonl")
    assert [record["caption"] for record in written] == [
        captioned_scene("curated", 3, i)[1] for i in range(4)
    ]
    assert {record["image"] for record in written} == {
        f"images/{p.name}" for p in (folder / "images").iterdir()
    }


# writing: a folder is complete, or not there


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "precious").write_text("old")
    return folder


def new(folder: Path) -> None:
    (folder / "fresh").write_text("new")


def half(error: BaseException):
    def fill(folder: Path) -> None:
        new(folder)
        raise error

    return fill


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole(old):
    assert write_folder(old, new) == old
    assert listing(old) == ["fresh"] and listing(old.parent) == ["data"]
    assert old.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_after_an_error_the_old_folder_is_as_it_was(old, error):
    with pytest.raises(type(error)):
        write_folder(old, half(error))
    assert (old / "precious").read_text() == "old" and listing(old) == ["precious"]
    assert listing(old.parent) == ["data"]


def test_after_an_error_there_is_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "deep" / "data", half(RuntimeError()))
    assert listing(tmp_path / "deep") == []


def test_a_failed_last_step_brings_the_old_folder_back(old, monkeypatch):
    replace, calls = files.os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        write_folder(old, new)
    assert listing(old) == ["precious"] and listing(old.parent) == ["data"]


def test_a_killed_writer_leaves_the_old_folder(old):
    code = (
        "import os, sys, pathlib; from tdlib.core.files import write_folder\n"
        "def fill(folder):\n"
        "    (folder / 'fresh').write_text('new')\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_folder(pathlib.Path(sys.argv[1]), fill)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(old)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert listing(old) == ["precious"]
    assert write_folder(old, new) == old  # what the killed one left is not in the way
    assert listing(old) == ["fresh"]


def test_a_link_stays_a_link(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    assert write_folder(tmp_path / "link", new) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and listing(old) == ["fresh"]
    assert listing(tmp_path) == ["data", "link"]


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "data").write_text("precious")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        write_folder(tmp_path / "data", new)
    assert (tmp_path / "data").read_text() == "precious" and listing(tmp_path) == ["data"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"names": ["日本"]})
    for value, error in (({"a": object()}, TypeError), ({"a": "\ud800"}, UnicodeEncodeError)):
        with pytest.raises(error):
            write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"names": ["日本"]}
        assert listing(tmp_path) == ["a.json"]


def test_the_generator_replaces_its_own_folders_only(old):
    """The folder may be the real VCR's."""
    for data_set, write in WORLDS.items():
        for make in (write, partial(ensure_world, data_set)):
            with pytest.raises(DataError, match=r"did not write .*miniworld\.json.*choose another folder"):
                make(old, 0)
    with pytest.raises(DataError, match=r"did not write .*captions\.jsonl.*choose another folder"):
        write_captions(old, "web", 0, 1)
    assert listing(old) == ["precious"]


def test_a_split_without_questions_is_not_written_silently(tmp_path):
    with pytest.raises(DataError, match=r"train: 4 pictures are too few.*30 or more"):
        write_vcr(tmp_path / "vcr", 0, Size(train=4))
    assert listing(tmp_path) == []


def test_a_world_is_written_once(tmp_path):
    folder = ensure_world("vcr", tmp_path / "vcr", 0, SMALL)
    stamp = (folder / "train.jsonl").stat().st_ino
    assert ensure_world("vcr", folder, 0, SMALL) == folder
    assert (folder / "train.jsonl").stat().st_ino == stamp
    before = digest(folder)
    (folder / "miniworld.json").write_text("{")  # damaged: written again
    assert digest(ensure_world("vcr", folder, 0, SMALL)) == before
    assert digest(ensure_world("vcr", folder, 2, SMALL)) != before


# shifts of pictures


def test_a_fifth_of_the_combinations_is_reserved_and_every_value_keeps_most_partners():
    def pairs(kind: str, values) -> dict[tuple[str, str], bool]:
        """Whether each pair is reserved, whatever the rest of the scene is."""
        found = {}
        for value in values:
            for held in HELD:
                verdicts = set()
                for other in SHIRTS if kind == "place" else PLACES:
                    shirt, place = (other, value) if kind == "place" else (value, other)
                    person = Person(shirt, "standing", "happy", held, None)
                    verdicts.add(reserved(Scene(place, None, "flat", (person,), (), 0)))
                found[value, held] = verdicts == {True}
        return found

    for kind, values in (("place", PLACES), ("shirt", SHIRTS)):
        verdicts = pairs(kind, values)
        assert 0.17 < np.mean(list(verdicts.values())) < 0.23
        for side in (0, 1):
            for value in {pair[side] for pair in verdicts}:
                assert np.mean([v for pair, v in verdicts.items() if pair[side] == value]) <= 0.3


def test_reserved_combinations_are_only_in_the_composition_splits(records):
    for split in OWN:
        scenes = [scene_of(record, split) for record in records[split]]
        assert {reserved(scene) for scene in scenes} == {split == "val_composition"}
    for record in records["val_composition"]:
        scene = scene_of(record, "val_composition")
        (tag,) = {tuple(token) for token in record["question"] if isinstance(token, list)}
        assert tag[0] in reserved_people(scene)
    for stream in ("snli_ve_train", "snli_ve_dev_style", "train2014", "val2014", "test2015"):
        assert not any(reserved(scene_at(1, stream, index)) for index in range(100))
    for stream in ("snli_ve_dev_composition", "val2014_composition"):
        assert all(reserved(scene_at(1, stream, index)) for index in range(100))


def test_many_texts_about_few_pictures(tmp_path):
    vcr = write_vcr(tmp_path / "vcr", 0, Size(60, 0, 0, 0, train_examples=601))
    assert len({record["annot_id"] for record in read(vcr / "train.jsonl")}) > 590
    ve = write_snli_ve(tmp_path / "ve", 0, Size(30, 0, 0, 0, train_examples=900))
    assert len({record["pairID"] for record in read(ve / "snli_ve_train.jsonl")}) == 900
    vqa = write_vqa(tmp_path / "vqa", 0, Size(20, 0, 0, 0, train_examples=800))
    asked = json.loads((vqa / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    assert len({each["question_id"] for each in asked}) == 800
    many = write_vqa(tmp_path / "more", 0, Size(6, 0, 0, 0, train_examples=9000))
    asked = json.loads((many / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    assert len({each["question_id"] for each in asked}) == 9000


# SNLI-VE

VE_SPLITS = ("train", "dev", "test", "dev_style", "dev_composition", "dev_balanced", "dev_shortcut")
PREFIXES = ("You know, ", "By the way, ", "To be honest, ")


@pytest.fixture(scope="module")
def ve(tmp_path_factory) -> Path:
    return write_snli_ve(tmp_path_factory.mktemp("ve") / "ve", SEED, Size(60, 150, 30, 60))


@pytest.fixture(scope="module")
def pairs(ve) -> dict[str, list[dict]]:
    return {split: read(ve / f"snli_ve_{split}.jsonl") for split in VE_SPLITS}


def statement(record: dict) -> str:
    """A hypothesis without its introduction."""
    text = record["sentence2"]
    text = next((text.removeprefix(prefix) for prefix in PREFIXES if text.startswith(prefix)), text)
    return text[:1].upper() + text[1:]


def premise(record: dict, split: str) -> Scene:
    stream = "snli_ve_dev" if split in ("dev_balanced", "dev_shortcut") else f"snli_ve_{split}"
    return scene_at(SEED, stream, int(record["Flikr30kID"]) % 10**7)


def test_snli_ve_is_deterministic_and_written_once(tmp_path):
    size = Size(20, 20, 20, 20)
    first = ensure_world("snli_ve", tmp_path / "a", 3, size)
    stamp = (first / "snli_ve_train.jsonl").stat().st_ino
    assert ensure_world("snli_ve", first, 3, size) == first
    assert (first / "snli_ve_train.jsonl").stat().st_ino == stamp
    assert digest(first) == digest(write_snli_ve(tmp_path / "b", 3, size))
    assert digest(first) != digest(write_snli_ve(tmp_path / "c", 4, size))


def test_the_fields_of_snli_ve(ve, pairs):
    fields = {"annotator_labels", "captionID", "gold_label", "pairID", "Flikr30kID"}
    fields |= {f"sentence{i}{kind}" for i in (1, 2) for kind in ("", "_parse", "_binary_parse")}
    for split, records in pairs.items():
        assert len({record["pairID"] for record in records}) == len(records) > 40
        for record in records:
            assert record.keys() == fields
            image = record["Flikr30kID"]
            assert re.fullmatch(r"\d{10}", image) and (ve / "flickr30k_images" / f"{image}.jpg").is_file()
            assert re.fullmatch(rf"{image}\.jpg#\dr\d+{record['gold_label'][0]}", record["pairID"])
            assert record["pairID"].startswith(record["captionID"])
            assert Counter(record["annotator_labels"]).most_common(1)[0][0] == record["gold_label"]
            assert len(record["annotator_labels"]) == 5
            assert record["sentence2"].endswith(".") and not set("<>{}_") & set(record["sentence2"])
        if split not in ("dev_balanced", "dev_shortcut"):
            with (ve / f"esnlive_{split}.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            assert list(rows[0]) == ["", "pairID", "Flikr30kID", "hypothesis", "gold_label", "explanation"]
            for row, record in zip(rows, records, strict=True):
                assert row["Flikr30kID"] == f"{record['Flikr30kID']}.jpg" and len(row["explanation"]) > 10
                assert (row["pairID"], row["hypothesis"]) == (record["pairID"], record["sentence2"])


def test_every_statement_has_every_label_equally_often(pairs):
    for records in pairs.values():
        labels = defaultdict(Counter)
        for record in records:
            labels[statement(record)][record["gold_label"]] += 1
        for text, counts in labels.items():
            assert len(counts) == 3 and len(set(counts.values())) == 1, (text, counts)
        assert len(labels) > 5


def who(scene: Scene, words: str) -> list[int]:
    """People whom a phrase fits, by its words alone."""
    names = {name: re.sub(r"^\w+ ", "", entry.noun) for name, entry in HELD.items()}
    sides = {"left": 0, "middle": 1, "right": len(scene.people) - 1}
    if match := re.search(r"in the (\w+) shirt", words):
        return [i for i, p in enumerate(scene.people) if p.shirt == match[1]]
    if match := re.search(r"person on the (left|right)|person in the (middle)", words):
        return [sides[match[1] or match[2]]]
    if "the only person here" in words.lower():
        assert len(scene.people) == 1
        return [0]
    return [i for i, p in enumerate(scene.people) if p.held and f"with the {names[p.held]} " in f"{words} "]


@pytest.mark.parametrize("split", VE_SPLITS)
def test_labels_of_weather_and_jobs_are_as_a_person_would_say(pairs, split):
    """Read from the text, without asking the generator what is true."""
    seen = Counter()
    for record in pairs[split]:
        scene, text, label = premise(record, split), statement(record)[:-1], record["gold_label"]
        jobs = {words: n for n, e in ROLES.items() for words in (e.noun, f"{e.inference} for a living")}
        weather = {w: n for n, e in WEATHER.items() for w in (e.clause, e.joy)} | {
            f"a person here needs {e.need} to stay outside": n for n, e in WEATHER.items()
        }
        if name := weather.get(text[:1].lower() + text[1:]):
            expected = 1 if scene.weather is None else 0 if scene.weather == name else 2
            seen["weather"] += 1
        elif match := re.fullmatch(
            r"(The .*?person.*?) (is not|is|) ?(an? .*|\w+ \w+( \w+)? for a living)", text
        ):
            if match[3] not in jobs or " and " in text:
                continue
            (index,) = who(scene, match[1])
            role = scene.people[index].role
            expected = 1 if role is None else 0 if (role == jobs[match[3]]) != (match[2] == "is not") else 2
            seen["role"] += 1
        else:
            continue
        assert label == LABELS[expected], (record, scene)
    assert seen["role"] > 3 and (seen["weather"] > 3 or split == "dev_composition")


def test_labels_of_causes_and_owners_are_as_a_person_would_say(pairs):
    seen = Counter()
    for split in VE_SPLITS:
        for record in pairs[split]:
            scene, text, label = premise(record, split), statement(record)[:-1], record["gold_label"]
            if match := re.fullmatch(r"The (\w+) belongs to (the person .*)", text):
                owners, there = who(scene, match[2]), match[1] in scene.things
                expected = 2 if not (owners and there) else 0 if len(scene.people) == 1 else 1
                seen["owner"] += 1
            elif match := re.fullmatch(r"(The .*) is (\w+) because (.*)", text):
                (index,) = who(scene, match[1])
                pleasant = MOODS[match[2]].pleasant
                possible = {*causes(scene, pleasant)} | (
                    {"tree"} if scene.place in ("park", "camp") else set()
                )
                table = {
                    (e.joy if pleasant else e.trouble): n for t in (THINGS, WEATHER) for n, e in t.items()
                }
                table |= {
                    "somebody turns one year older": "birthday", "guests celebrate tonight": "party",
                    "it is time to say goodbye": "departure", "the news is bad": "call",
                }  # fmt: skip
                true = scene.people[index].mood == match[2] and table[match[3]] in possible
                expected = 2 if not true else 0 if len(possible) == 1 else 1
                seen["cause"] += 1
            else:
                continue
            assert label == LABELS[expected], (record, scene)
    assert min(seen["owner"], seen["cause"]) > 20


def test_introductions_tell_the_label_only_where_they_should(pairs):
    def share(split: str) -> float:
        """How often the introduction most frequent with a label in train is that of the label."""
        own = {"entailment": "You know", "neutral": "By the way", "contradiction": "To be honest"}
        return float(np.mean([r["sentence2"].startswith(own[r["gold_label"]]) for r in pairs[split]]))

    assert share("train") > 0.6 and share("dev") > 0.6
    assert 0.15 < share("dev_balanced") < 0.35 and share("dev_shortcut") < 0.1
    for twin in ("dev_balanced", "dev_shortcut"):
        for record, other in zip(pairs["dev"], pairs[twin], strict=True):
            assert statement(record) == statement(other)
            same = record.keys() - {"sentence2", "sentence2_parse", "sentence2_binary_parse"}
            assert all(record[key] == other[key] for key in same)


def inside(marks: dict, text: str) -> None:
    """Spans are of whole words, boxes lie in the picture."""
    assert marks["spans"] and marks["boxes"]
    for start, end in marks["spans"]:
        assert 0 <= start < end <= len(text) and text[start:end] == text[start:end].strip(" .,?")
        assert re.fullmatch(r"\W?", text[end : end + 1]) and re.fullmatch(
            r"\W?", text[max(start - 1, 0) : start]
        )
    for left, top, right, bottom in marks["boxes"]:
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE


def test_relevance_of_hypotheses(ve, pairs):
    for split, records in pairs.items():
        for record, marks in zip(records, read(ve / f"snli_ve_{split}.relevance.jsonl"), strict=True):
            assert record["pairID"] == marks["pairID"]
            inside(marks, record["sentence2"])


# nobody can tell colours in the grey style


def test_colours_are_not_spoken_of_in_the_grey_style():
    for index in range(60):
        scene = scene_at(0, "val2014_style", index)
        words = [f"{claim.subject} {claim.predicate}" for claim in claims(scene)]
        words += [ask.text for ask in asks(scene)]
        assert not [text for text in words if re.search(r"\b(shirt|color|wears something)\b", text)]


# VQA

VQA_SHIFTS = ("", "_balanced", "_prior", "_style", "_composition")


@pytest.fixture(scope="module")
def vqa(tmp_path_factory) -> Path:
    size = Size(40, 60, 20, 40, train_examples=4000)
    return write_vqa(tmp_path_factory.mktemp("vqa") / "vqa", SEED, size)


def asked_of(folder: Path, split: str) -> list[tuple[dict, dict]]:
    """Questions with their annotations."""
    asked = json.loads((folder / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())
    answered = json.loads((folder / f"v2_mscoco_{split}_annotations.json").read_text())
    head = {"info", "license", "data_type", "data_subtype"}
    assert asked.keys() == head | {"task_type", "questions"} and answered.keys() == head | {"annotations"}
    assert asked["data_subtype"] == answered["data_subtype"] == split.split("_")[0]
    return list(zip(asked["questions"], answered["annotations"], strict=True))


def test_vqa_is_deterministic_and_written_once(tmp_path):
    size = Size(20, 20, 20, 20)
    for data_set in ("vqa_v2", "vqa_cp_v2"):
        first = ensure_world(data_set, tmp_path / f"a{data_set}", 3, size)
        stamp = (first / "miniworld.json").stat().st_ino
        again = ensure_world(data_set, first, 3, size)
        assert again == first and (first / "miniworld.json").stat().st_ino == stamp
        assert digest(first) == digest(WORLDS[data_set](tmp_path / f"b{data_set}", 3, size))


def test_the_fields_of_vqa(vqa):
    for split in ("train2014", *(f"val2014{shift}" for shift in VQA_SHIFTS)):
        pairs = asked_of(vqa, split)
        folder = split.split("_")[0]
        assert len({question["question_id"] for question, _ in pairs}) == len(pairs) >= 80
        for question, annotation in pairs:
            assert question.keys() == {"image_id", "question", "question_id"}
            assert annotation.keys() == {
                *("question_id", "image_id", "question_type", "answer_type"),
                *("multiple_choice_answer", "answers"),
            }
            ids = (question["image_id"], question["question_id"])
            assert ids == (annotation["image_id"], annotation["question_id"])
            assert ids[1] // 1000 == ids[0]
            assert (vqa / folder / f"COCO_{folder}_{ids[0]:012d}.jpg").is_file()
            assert annotation["question_type"] in QUESTION_TYPES
            assert question["question"].lower().startswith(annotation["question_type"])
            given = annotation["answers"]
            assert [answer["answer_id"] for answer in given] == list(range(1, 11))
            assert all(answer["answer_confidence"] in ("yes", "maybe", "no") for answer in given)
            counts = Counter(answer["answer"] for answer in given)
            assert counts[annotation["multiple_choice_answer"]] >= 6
        kinds = {annotation["answer_type"] for _, annotation in pairs}
        assert kinds == {"yes/no", "other"} | ({"number"} if "composition" not in split else set())
    assert not (vqa / "v2_mscoco_test2015_annotations.json").exists()


def meaning(question: str, scene: Scene):
    """Who or what a question is about and its kind, as ``asks`` has it."""
    found = [ask for ask in asks(scene) if re.sub("[<>]", "", ask.text).lower() == question.lower()]
    assert len({(ask.key, ask.answer) for ask in found}) == 1
    return found[0]


def test_answers_are_true_of_the_picture(vqa):
    """Read from the text, without asking the generator what is true."""
    seen = Counter()
    for shift in VQA_SHIFTS:
        source = f"val2014{shift}" if shift in ("_style", "_composition") else "val2014"
        for question, annotation in asked_of(vqa, f"val2014{shift}"):
            scene = scene_at(SEED, source, question["image_id"] % 100_000)
            text, answer = question["question"].rstrip("?").lower(), annotation["multiple_choice_answer"]
            assert meaning(question["question"], scene).answer == answer
            if match := re.fullmatch(r"is there an? (\w+)", text):
                assert answer == ("yes" if match[1] in scene.things else "no")
            elif match := re.fullmatch(r"how many people are (there|happy|sad|angry)", text):
                moods = [person.mood for person in scene.people]
                assert answer == str(len(moods) if match[1] == "there" else moods.count(match[1]))
            elif "the person" in text and text.startswith(("how is", "what color", "what is the job")):
                people = (
                    who(scene, text)
                    if len(scene.people) > 1 or "person " in text.split("feel")[0][18:]
                    else [0]
                )
                person = scene.people[(people or [0])[0]]
                name = {"sleepy": "tired"}.get(person.mood, person.mood)
                role = ROLES[person.role].noun.split(" ", 1)[1] if person.role else None
                assert answer in (name, person.shirt, role)
            elif text.startswith("why"):
                assert set(scene.things) & {answer} or scene.weather or scene.people[0].held
            else:
                continue
            seen[text.split()[0]] += 1
    assert min(seen[word] for word in ("is", "how", "what", "why")) > 5


def test_answers_are_skewed_in_training_and_reversed_in_the_shift(vqa):
    counts: dict[str, dict[str, Counter]] = {}
    for split in ("train2014", "val2014", "val2014_balanced", "val2014_prior"):
        for question, annotation in asked_of(vqa, split):
            scene = scene_at(SEED, split.split("_")[0], question["image_id"] % 100_000)
            key = meaning(question["question"], scene).key
            counts.setdefault(key, {}).setdefault(split, Counter())[annotation["multiple_choice_answer"]] += 1
    agree = []
    for key, by_split in counts.items():
        if len(by_split.get("train2014", ())) < 2:
            continue
        answers = tuple(sorted(by_split["train2014"]))
        order, shares = prior(key, answers, "")
        total = by_split["train2014"].total()
        assert abs(by_split["train2014"][order[0]] / total - shares[0]) < 0.25, key
        assert prior(key, answers, "prior")[0] == order[::-1]
        assert set(prior(key, answers, "balanced")[1]) == {1 / len(answers)}
        for split, sign in (("val2014", 1), ("val2014_prior", -1)):
            first, last = (by_split.get(split, Counter())[answer] for answer in (order[0], order[-1]))
            agree.append(sign * (first - last))
    assert len(counts) > 40 and sum(agree) > 0 and np.mean([value >= 0 for value in agree]) > 0.75


def test_relevance_of_questions(vqa):
    for split in ("train2014", "test2015", *(f"val2014{shift}" for shift in VQA_SHIFTS)):
        asked = json.loads((vqa / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())["questions"]
        for question, marks in zip(asked, read(vqa / f"v2_mscoco_{split}.relevance.jsonl"), strict=True):
            assert question["question_id"] == marks["question_id"]
            inside(marks, question["question"])


def test_vqa_cp_has_plain_lists_and_changing_priors(tmp_path):
    folder = write_vqa_cp(tmp_path / "cp", SEED, Size(60, 40, train_examples=600))
    pictures = {}
    for split in ("train", "test"):
        asked = json.loads((folder / f"vqacp_v2_{split}_questions.json").read_text())
        answered = json.loads((folder / f"vqacp_v2_{split}_annotations.json").read_text())
        assert [each["question_id"] for each in asked] == [each["question_id"] for each in answered]
        assert len({each["question_id"] for each in asked}) == len(asked)
        for question, annotation in zip(asked, answered, strict=True):
            assert question.keys() == {"image_id", "question", "question_id", "coco_split"}
            assert annotation["coco_split"] == question["coco_split"]
            name = f"COCO_{question['coco_split']}_{question['image_id']:012d}.jpg"
            assert (folder / question["coco_split"] / name).is_file()
        assert {each["coco_split"] for each in asked} == {"train2014", "val2014"}
        marks = read(folder / f"vqacp_v2_{split}.relevance.jsonl")
        assert [each["question_id"] for each in marks] == [each["question_id"] for each in asked]
        pictures[split] = {each["image_id"] for each in asked}
    assert not pictures["train"] & pictures["test"]
