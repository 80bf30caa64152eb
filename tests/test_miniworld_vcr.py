"""VCR of the MiniWorld: the official format, answers that are true or false, shortcuts and shifts."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from miniworld_helpers import SEED, read

from tdlib.miniworld.drawing import SIZE, draw
from tdlib.miniworld.language import TYPES, answer, mark, questions, rationale, true_values
from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    ROLES,
    STYLES,
    THINGS,
    WEATHER,
    Scene,
    reserved,
    reserved_people,
)
from tdlib.miniworld.worlds import TRAIN_STYLES, read_concepts
from tdlib.miniworld.writers import Size, scene_at, write_vcr

OWN = ("train", "val", "test", "val_style", "val_composition")  # splits with pictures of their own
TWINS = ("val_shortcut", "val_balanced")  # val in other words
SPLITS = (*OWN, *TWINS)

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


def test_the_pictures_are_the_drawn_scenes(vcr, records):
    for split in OWN:
        for record in records[split][::40]:
            image, buffer = draw(scene_of(record, split)).image, io.BytesIO()
            assert image.size == (SIZE, SIZE) and image.mode == "RGB"
            image.save(buffer, format="JPEG", quality=92)
            assert (vcr / "vcr1images" / record["img_fn"]).read_bytes() == buffer.getvalue()


def test_splits_share_no_picture(vcr):
    owners = defaultdict(set)
    for path in (vcr / "vcr1images").rglob("*.jpg"):
        owners[hashlib.sha256(path.read_bytes()).hexdigest()].add(path.name)
    assert len(owners) == 60 + 200 + 40 + 2 * 40  # nor is a picture twice in one split


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


def test_one_style_is_kept_for_the_shift(records):
    assert set(STYLES) - set(TRAIN_STYLES) == {"noir"}
    for split in OWN:
        expected = {"noir"} if split == "val_style" else set(TRAIN_STYLES)
        assert {scene_of(record, split).style for record in records[split]} == expected


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
