"""VQA v2 and VQA-CP of the MiniWorld: their fields, true answers, priors that the shifts turn around."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from miniworld_helpers import SEED, inside, read, who

from tdlib.miniworld.scenes import ROLES, Scene
from tdlib.miniworld.write_vqa import QUESTION_TYPES, asks, prior
from tdlib.miniworld.writers import Size, scene_at, write_vqa, write_vqa_cp

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
