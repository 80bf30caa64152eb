"""Writes the MiniWorld as VCR, with its shifts: reworded twins of val, a new style, new combinations."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdlib.data.examples import DataError
from tdlib.miniworld import worlds
from tdlib.miniworld.drawing import SIZE, Drawn
from tdlib.miniworld.language import (
    Marked,
    Question,
    answer,
    family_values,
    mark,
    questions,
    rationale,
    true_values,
)
from tdlib.miniworld.scenes import HELD, THINGS, Scene, pick, reserved_people
from tdlib.miniworld.worlds import USUAL_SIZE, Size

_ECHO = (0.55, 0.45)  # how often a right and a wrong answer repeats words and tags of the question
_BALANCED = (0.5, 0.5)
_REVERSED = (0.0, 1.0)


@dataclass
class _Scene:
    """A scene as VCR stores it, with its objects and the boxes of its regions."""

    scene: Scene
    names: list[str]
    image_file: str
    boxes: dict[str, list[float]]
    asked: int = 0  # questions so far

    @classmethod
    def write(cls, scene: Scene, images: Path, image_file: str) -> "_Scene":
        """Draws a scene; writes its picture and metadata."""
        path = images / image_file
        picture = worlds.save_picture(scene, path)
        names = ["person"] * len(scene.people)
        drawn = list(picture.people)
        for person, held in zip(scene.people, picture.held, strict=True):
            if person.held and held and HELD[person.held].coco:
                names.append(HELD[person.held].coco or "")
                drawn.append(held)
        for thing, shape in zip(scene.things, picture.things, strict=True):
            if THINGS[thing].coco:
                names.append(THINGS[thing].coco or "")
                drawn.append(shape)
        path.with_suffix(".json").write_text(json.dumps(_metadata(names, drawn)))
        return cls(scene, names, image_file, worlds.regions(scene, picture))

    def box(self, question: Question) -> list[float]:
        """Returns the box (pixels, xyxy) that decides a question."""
        of_person = question.region in ("face", "hat", "held")
        return self.boxes[f"{question.region}{question.person}" if of_person else question.region]


def _inside(value: float) -> float:
    """Clips a coordinate of an outline to the picture."""
    return round(min(max(value, 0.0), float(SIZE)), 1)


def _metadata(names: list[str], drawn: list[Drawn]) -> dict:
    return {
        "boxes": [[*shape.box, 1.0] for shape in drawn],
        "segms": [
            [[[_inside(x), _inside(y)] for x, y in points] for points in shape.polygons] for shape in drawn
        ],
        "names": names,
        "width": SIZE,
        "height": SIZE,
    }


def _askable(scene: Scene, about: list[int] | None = None) -> dict[str, list[Question]]:
    """Lists questions about a scene by type; with ``about`` only those about these people."""
    by_type: dict[str, list[Question]] = {}
    for question in questions(scene):
        if len(family_values(question.family)) - len(true_values(scene, question.family)) < 3:
            continue  # too few answers are false of this picture
        if about is None or question.person in about:
            by_type.setdefault(question.type, []).append(question)
    return by_type


def _choose_questions(
    rng: np.random.Generator, by_type: dict[str, list[Question]], count: int
) -> list[Question]:
    """Chooses questions about a scene, of different types; half of the time rare types come first."""
    rarity = {"role": 0, "explanation": 1}
    kinds = sorted(by_type, key=lambda kind: (rarity.get(kind, 2), rng.random()))
    order = kinds if rng.random() < 0.5 else [str(kind) for kind in rng.permutation(kinds)]
    return [pick(rng, by_type[kind]) for kind in order[:count]]


def _wrong_values(
    rng: np.random.Generator, question: Question, scene: Scene, pool: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Chooses three answers of other scenes to the same kind of question that are false here.

    Similar to VCR's adversarial matching: they are plausible as texts.
    """
    taken = true_values(scene, question.family)
    chosen: list[tuple[str, int]] = []
    while len(chosen) < 3:  # ends, because ``_matchable`` has removed questions without three
        value, source = pick(rng, pool)
        if value not in taken:
            taken = taken | {value}
            chosen.append((value, source))
    return chosen


def _pools(asked: list[tuple[int, Question]]) -> dict[str, list[tuple[str, int]]]:
    pools: dict[str, list[tuple[str, int]]] = {}
    for position, (_, question) in enumerate(asked):
        pools.setdefault(question.family, []).append((question.value, position))
    return pools


def _matchable(asked: list[tuple[int, Question]], scenes: list[_Scene]) -> list[tuple[int, Question]]:
    """Removes the questions for which a small split has no three wrong answers."""
    while True:  # a removed question takes its answer from the pools of others, so check again
        values = {family: {value for value, _ in pool} for family, pool in _pools(asked).items()}
        kept = [
            (index, question)
            for index, question in asked
            if len(values[question.family] - true_values(scenes[index].scene, question.family)) >= 3
        ]
        if len(kept) == len(asked):
            return kept
        asked = kept


def _raw(text: Marked) -> str:
    """Joins tokens as in question_orig: one string, people by 1-based numbers."""
    return " ".join(" and ".join(str(i + 1) for i in t) if isinstance(t, list) else t for t in text.tokens)


def _split(folder: Path, split: str, number: int, seed: int, examples: int | None = None) -> None:
    """Writes pictures, metadata and questions of one split, and the reworded twins of val."""
    rng = np.random.default_rng([seed, worlds.STREAMS[split], 2**31])
    scenes: list[_Scene] = []
    askable: list[dict[str, list[Question]]] = []
    for index in range(number):
        name = f"miniworld_{split}_{index // 500:03d}/{split}_{seed}_{index:06d}.jpg"
        drawn = worlds.scene_at(seed, split, index)
        scenes.append(_Scene.write(drawn, folder / "vcr1images", name))
        askable.append(_askable(drawn, reserved_people(drawn) or None))
    asked: list[tuple[int, Question]] = []
    while number and (not asked or len(asked) < (examples or 0)):
        for index in range(number):
            asked += [(index, question) for question in _choose_questions(rng, askable[index], 2)]
    asked = _matchable(asked[:examples], scenes)
    if number and not asked:
        raise DataError(
            f"{split}: {number} pictures are too few, no question has three wrong answers; ask for 30 or more"
        )
    pools = _pools(asked)
    twins = {"": _ECHO}
    if split == "val":
        twins |= {"_shortcut": _REVERSED, "_balanced": _BALANCED}
    with worlds.writing_lines(folder) as write:
        for position, (index, question) in enumerate(asked):
            scene = scenes[index]
            wrong = _wrong_values(rng, question, scene.scene, pools[question.family])
            values = [(question.value, position), *wrong]
            orders = [[int(i) for i in rng.permutation(4)] for _ in range(2)]
            ids = {
                "img_id": f"{split}-{index}",
                "question_number": scene.asked,
                "annot_id": f"{split}-{position}",
                "match_fold": f"{split}-0",
                "match_index": position,
            }
            scene.asked += 1
            for twin, shares in twins.items():
                echoed = [bool(rng.random() < shares[min(i, 1)]) for i in range(4)]
                record, decisive = _record(scene, question, values, orders, echoed)
                if split == "test":  # as in the official test file
                    for text in ("answer", "rationale"):
                        for field in ("label", "orig", "sources", "match_iter"):
                            del record[f"{text}_{field}"]
                write(f"{split}{twin}.jsonl", record | ids)
                write(f"{split}{twin}.relevance.jsonl", {"annot_id": ids["annot_id"], **decisive})
            write(f"{split}.types.jsonl", {"annot_id": ids["annot_id"], "type": question.type})
            right, *others = [[value] for value, _ in values]
            line = worlds.concepts(f"{split}-{position}", scene.scene, question.family, right, others)
            write(f"{split}.concepts.jsonl", line)


def _record(
    scene: _Scene,
    question: Question,
    values: list[tuple[str, int]],
    orders: list[list[int]],
    echoed: list[bool],
) -> tuple[dict, dict]:
    """Makes one question as VCR writes it, and the tokens and box that decide it.

    ``values`` are the right answer, then the wrong ones, each with the question from which it comes;
    ``orders`` are the orders in which answers and rationales show them; ``echoed`` is True for each that
    repeats the question.
    """
    order, rationale_order = orders
    asked = mark(question.text)
    answers = [mark(answer(question, values[i][0], echoed[i])) for i in order]
    rationales = [mark(rationale(question, values[i][0])) for i in rationale_order]
    label, rationale_label = order.index(0), rationale_order.index(0)
    record = {
        "movie": "MINIWORLD",
        "objects": scene.names,
        "interesting_scores": [1] * len(scene.names),
        "answer_likelihood": "likely",
        "img_fn": scene.image_file,
        "metadata_fn": scene.image_file.removesuffix(".jpg") + ".json",
        "answer_orig": _raw(answers[label]),
        "question_orig": _raw(asked),
        "rationale_orig": _raw(rationales[rationale_label]),
        "question": asked.tokens,
        "answer_match_iter": order,
        "answer_sources": [values[i][1] for i in order],
        "answer_choices": [text.tokens for text in answers],
        "answer_label": label,
        "rationale_choices": [text.tokens for text in rationales],
        "rationale_sources": [values[i][1] for i in rationale_order],
        "rationale_match_iter": rationale_order,
        "rationale_label": rationale_label,
    }
    decisive = {
        "question": asked.decisive,
        "answer_choices": [text.decisive for text in answers],
        "rationale_choices": [text.decisive for text in rationales],
        "boxes": [scene.box(question)],
    }
    return record, decisive


def write_vcr(folder: Path, seed: int = 0, size: Size = USUAL_SIZE) -> Path:
    """Writes a VCR folder: {train,val,test}.jsonl, vcr1images/, and the MiniWorld's side files.

    Side files: ``*.relevance.jsonl`` (which tokens and boxes decide each example),
    ``*.types.jsonl`` (question types, which VCR does not publish) and ``*.concepts.jsonl`` (what the
    answers are about, and whether students met it: see ``read_concepts``). Shifts: ``val_shortcut`` and
    ``val_balanced`` are val with other wordings (the wrong answers repeat the question and the right
    one does not; or all equally often), ``val_style`` and ``val_composition`` have other pictures.

    Raises:
        DataError: the folder holds something else, for instance the real VCR; or a split has so
            few pictures that no question about them finds three wrong answers.
    """

    def fill(partial: Path) -> None:
        for split in ("train", "val", "test"):
            examples = size.train_examples if split == "train" else None
            _split(partial, split, getattr(size, split), seed, examples)
        for split in ("val_style", "val_composition"):
            _split(partial, split, size.shifted, seed)

    return worlds.write_world(folder, worlds.describe_world("vcr", seed, size), fill)
