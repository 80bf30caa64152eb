"""Writes the MiniWorld as VQA v2 and as VQA-CP v2: questions with ten annotators' answers.

Answers of one kind of question are skewed towards a few (each kind has its own order of answers);
shifted splits turn that around, or have all answers equally often.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tdlib.data.examples import DataError
from tdlib.miniworld import worlds
from tdlib.miniworld.language import causes, char_spans, definite, references, referred, true_values
from tdlib.miniworld.scenes import HELD, MOODS, PLACES, ROLES, THINGS, Scene, pick, reserved_people
from tdlib.miniworld.worlds import USUAL_SIZE, Deck, Size

# VQA v2's types that our questions have; a question's type is the longest one that it starts with.
QUESTION_TYPES = (
    "what", "what is the", "what color is the", "what is the person", "what animal is", "what sport is",
    "what time", "what does the", "where is the", "how", "how many", "how many people are", "why is the",
    "which", "is the", "is the person", "is there a", "is it", "is this", "are the",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A question about a scene. ``key`` is what it asks, whoever it is about: it has one prior.

    ``named`` are the concepts that the question names or that it turns on, ``meant`` those of its answer.
    """

    key: str
    text: str  # with the words that decide in <...>
    answer: str
    regions: tuple[str, ...]
    named: tuple[str, ...] = ()
    meant: tuple[str, ...] = ()


_DOING = {
    "umbrella": "standing in rain", "book": "reading", "cup": "drinking", "ball": "playing ball",
    "kite": "flying kite", "cake": "carrying cake", "banana": "eating banana", "phone": "talking on phone",
    "suitcase": "carrying suitcase", "racket": "playing tennis", "teddy": "hugging teddy bear",
    "flowers": "bringing flowers", "surfboard": "carrying surfboard", "guitar": "playing guitar",
    "balloons": "holding balloons", "pizza": "eating pizza",
}  # fmt: skip
_NEXT = {
    "book": "turn page", "cup": "drink", "ball": "throw ball", "kite": "pull string",
    "cake": "blow out candles",
    "phone": "hang up", "suitcase": "travel", "racket": "hit ball", "teddy": "sleep", "flowers": "fill vase",
    "surfboard": "surf", "guitar": "sing", "balloons": "party", "pizza": "wipe fingers",
}  # fmt: skip
_PLACE = {name: name for name in PLACES} | {"station": "bus stop", "camp": "campsite"}
_FEELING = {name: name for name in MOODS} | {"sleepy": "tired"}
_WEATHER = {"sunny": "sunny", "rainy": "rainy", "snowy": "snowy"}  # night is no weather
_CAUSE = {
    "sunny": "sun", "rainy": "rain", "snowy": "snow", "night": "night", "birthday": "birthday",
    "party": "party", "departure": "leaving", "call": "phone call",
}  # fmt: skip
_NEED = {"sunny": "sun cream", "rainy": "dry clothes", "snowy": "gloves", "night": "lamp"}
_SPORT = {"racket": "tennis", "ball": "soccer", "surfboard": "surfing"}
_ANIMALS = ("dog", "cat", "bird", "horse", "cow")
SYNONYMS = {
    "happy": "glad", "sad": "unhappy", "angry": "mad", "tired": "sleepy", "chef": "cook",
    "police officer": "policeman",
    "builder": "construction worker", "street": "road", "bus stop": "bus station", "campsite": "camping",
    "phone": "cell phone", "bicycle": "bike", "soccer": "football", "farm": "barn", "rainy": "rain",
    "sunny": "sun",
    "purple": "violet", "kite": "kites", "sleep": "go to bed", "teddy bear": "toy", "beach": "sea",
}  # fmt: skip


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _plain(marked: str) -> str:
    return marked.replace("<", "").replace(">", "")


def asks(scene: Scene, about: list[int] | None = None) -> Iterator[Ask]:
    """Every question that this scene can answer; about some people only, where given."""
    for index in about or range(len(scene.people)):
        for kind, who in references(scene, index).items():
            yield from _about_person(scene, index, kind, who.replace("the only person here", "the person"))
    if about is None:
        yield from _about_scene(scene)


def _about_person(scene: Scene, index: int, kind: str, who: str) -> Iterator[Ask]:
    person = scene.people[index]
    told = referred(person, kind)

    def ask(text: str, answer: str, at: str, named: tuple[str, ...] = (), meant: tuple[str, ...] = ()) -> Ask:
        key = _plain(text.replace("*", "the person"))
        return Ask(key, text.replace("*", who), answer, (at,), told + named, meant)

    if person.held and kind != "held":
        noun, at, meant = definite(HELD[person.held].noun), f"held{index}", (person.held,)
        yield ask("what is * <doing>?", _DOING[person.held], at, meant=meant)
        yield ask("what is * <holding>?", noun, at, meant=meant)
        if person.held in _NEXT:
            yield ask("what will * do <next>?", _NEXT[person.held], at, meant=meant)
    if kind != "shirt" and scene.style != "noir":
        meant = (person.shirt,)
        yield ask("what <color> is the <shirt> of *?", person.shirt, f"person{index}", meant=meant)
    if person.role:
        job, meant = definite(ROLES[person.role].noun), (person.role,)
        yield ask("what is the <job> of *?", job, f"hat{index}", meant=meant)
        for name, entry in ROLES.items():
            yield ask(f"is * <{entry.noun}>?", _yes(name == person.role), f"hat{index}", (name,))
    if person.role != "king":  # is a crown a hat?
        head = f"hat{index}" if person.role else f"bare{index}"
        yield ask("is * wearing a <hat>?", _yes(person.role is not None), head)
    yield ask("is * <waving>?", _yes(person.pose == "waving"), f"person{index}", ("waving",))
    yield ask("how is * <feeling>?", _FEELING[person.mood], f"face{index}", meant=(person.mood,))
    for name in MOODS:
        yield ask(f"is * <{_FEELING[name]}>?", _yes(name == person.mood), f"face{index}", (name,))
    yield ask("<where> is *?", _PLACE[scene.place], "place", meant=(scene.place,))
    if scene.weather:
        meant = (scene.weather,)
        yield ask("what does * <need> outside?", _NEED[scene.weather], "weather", meant=meant)
    pleasant = MOODS[person.mood].pleasant
    if len(true_values(scene, "joy" if pleasant else "trouble")) == 1:
        ((cue, region),) = causes(scene, pleasant).items()
        text = f"<why> is {who} <{_FEELING[person.mood]}>?"
        key = "why are they glad?" if pleasant else "why are they not?"
        yield Ask(key, text, _CAUSE.get(cue, cue), (region,), (*told, person.mood), (cue,))


def _about_scene(scene: Scene) -> Iterator[Ask]:
    def ask(text: str, answer: str, *at: str, about: str = "", meant: str = "") -> Ask:
        named, means = ((name,) if name else () for name in (about, meant))
        return Ask(_plain(text), text, answer, at, named, means)

    people = list(enumerate(scene.people))
    faces = [f"face{i}" for i, _ in people]
    heads = [f"hat{i}" if person.role else f"bare{i}" for i, person in people]
    bodies, roles = [f"person{i}" for i, _ in people], [person.role for _, person in people]
    animals = [name for name in scene.things if name in _ANIMALS]
    yield ask("how many <people> are there?", str(len(people)), *bodies)
    if "king" not in roles:  # is a crown a hat?
        yield ask("how many people are wearing <hats>?", str(len(people) - roles.count(None)), *heads)
    waving = str(sum(p.pose == "waving" for _, p in people))
    yield ask("how many people are <waving>?", waving, *bodies, about="waving")
    yield ask("how many <animals> are there?", str(len(animals)), *(animals or ["all"]))
    for mood in ("happy", "sad", "angry"):
        counted = str(sum(p.mood == mood for _, p in people))
        yield ask(f"how many people are <{mood}>?", counted, *faces, about=mood)
    for name, entry in THINGS.items():
        if name != "tree" or scene.place not in ("park", "camp"):  # they grow in the background
            there = name in scene.things
            yield ask(f"is there <{entry.noun}>?", _yes(there), name if there else "all", about=name)
    if len(animals) == 1:
        yield ask("what <animal> is in the picture?", animals[0], animals[0], meant=animals[0])
    sports = [(i, p.held) for i, p in people if p.held in _SPORT]
    if len(sports) == 1:
        index, held = sports[0][0], str(sports[0][1])
        yield ask("what <sport> is the equipment for?", _SPORT[held], f"held{index}", meant=held)
    yield ask("is this <outdoors>?", _yes(PLACES[scene.place].outdoor), "place")
    if scene.weather:
        time = "night" if scene.weather == "night" else "day"
        yield ask("what <time> of day is it?", time, "weather", about="night")
        if scene.weather in _WEATHER:
            yield ask("what is the <weather> like?", _WEATHER[scene.weather], "weather", meant=scene.weather)
        asked = {"rainy": "raining", "snowy": "snowing", "sunny": "sunny", "night": "night"}
        for name, words in asked.items():
            yield ask(f"is it <{words}>?", _yes(scene.weather == name), "weather", about=name)
    if len(people) == 1:
        for side, thing in zip(("right", "left"), scene.things, strict=False):
            noun = definite(THINGS[thing].noun)
            for name in ("left", "right"):
                key, text = f"is it to the {name}?", f"is the {noun} to the <{name}> of the person?"
                yield Ask(key, text, _yes(side == name), (thing, "person0"), (thing,))
    if len(people) == 2:
        yield from _comparisons(scene)


def _comparisons(scene: Scene) -> Iterator[Ask]:
    first, second = scene.people
    faces = ("face0", "face1")
    yield Ask(
        "are the two people in the same mood?", "are the two people in the <same mood>?",
        _yes(first.mood == second.mood), faces,
    )  # fmt: skip
    for name in MOODS:
        if (first.mood == name) != (second.mood == name):
            text = f"which person is <{_FEELING[name]}>, the left or the right one?"
            answer = "left" if first.mood == name else "right"
            yield Ask("which person feels so?", text, answer, faces, (name,))
    for name, held in HELD.items():
        if (first.held == name) != (second.held == name):
            side = "left" if first.held == name else "right"
            text = f"which person has <{held.noun}>, the left or the right one?"
            region = "held0" if side == "left" else "held1"
            yield Ask("which person has it?", text, side, (region,), (name,))


@cache
def question_type(text: str) -> str:
    words = text.rstrip("?").split()
    matching = [kind for kind in QUESTION_TYPES if words[: len(kind.split())] == kind.split()]
    return max(matching, key=len, default="none of the above")


def answer_type(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


@cache
def ranked(key: str, answers: tuple[str, ...]) -> list[str]:
    """Orders the answers of a kind of question, most frequent first, by a hash with the kind's name."""
    return sorted(answers, key=lambda answer: hashlib.sha256(f"{key}|{answer}".encode()).digest())


def prior(key: str, answers: tuple[str, ...], shift: str) -> tuple[list[str], np.ndarray]:
    """Returns answers and their probabilities, which are proportional to 1 / rank.

    The shift "prior" reverses the ranking, "balanced" makes all equal.
    """
    order = ranked(key, answers)
    weights = np.ones(len(order)) if shift == "balanced" else 1 / np.arange(1, len(order) + 1)
    return (order[::-1] if shift == "prior" else order), weights / weights.sum()


Table = dict[str, dict[str, list[tuple[int, Ask]]]]  # key -> answer -> where that is the answer


def _sample(rng: np.random.Generator, table: Table, count: int, shift: str) -> Iterator[tuple[int, Ask]]:
    """Samples scenes with questions; kinds with more answers are asked more often."""
    priors = {key: prior(key, tuple(sorted(entry)), shift) for key, entry in table.items()}
    used: dict[int, int] = {}
    decks = {
        (key, answer): Deck(found, used) for key, entry in table.items() for answer, found in entry.items()
    }
    keys = list(table)
    weights = np.array([len(table[key]) for key in keys])  # about as many yes/no and numbers as in VQA
    for start in range(0, count, 4096):
        for which in rng.choice(len(keys), min(4096, count - start), p=weights / weights.sum()):
            key = keys[int(which)]
            order, shares = priors[key]
            answer = order[min(int(np.searchsorted(np.cumsum(shares), rng.random())), len(order) - 1)]
            yield decks[key, answer].deal(rng)


def annotators(rng: np.random.Generator, answer: str, others: list[str]) -> list[dict[str, Any]]:
    """Makes ten answers: at least six right ones, some in other words, some wrong.

    Where only one other answer exists (yes or no), the wrong ones agree: in 35 of the 189 such questions of
    seed 0's val2014, three or four of them give it an accuracy of 0.9 or 1.
    """
    answers = [answer] * 10
    confidence = ["yes"] * 10
    for place in rng.permutation(10)[: int(rng.choice(5, p=[0.4, 0.2, 0.2, 0.1, 0.1]))]:
        if answer in SYNONYMS and rng.random() < 0.6:
            answers[place] = SYNONYMS[answer]
        elif others:
            answers[place] = pick(rng, others)
            confidence[place] = pick(rng, ("maybe", "no", "yes"))
    return [{"answer": answers[i], "answer_confidence": confidence[i], "answer_id": i + 1} for i in range(10)]


_MOST = 100_000  # pictures of a split: so far apart are the ids of two splits


@dataclass
class _Shown:
    """A picture on disk, and how many questions were asked about it in the present file."""

    scene: Scene
    boxes: dict[str, list[float]]
    image_id: int
    coco_split: str
    asked: int = 0


def _pictures(folder: Path, split: str, number: int, seed: int) -> list[_Shown]:
    """Draws a split's pictures; those of a shifted split lie in its source's folder."""
    if number > _MOST:
        raise DataError(f"{split}: {number} pictures; there are ids for {_MOST}, ask for no more")
    coco_split = split.partition("_")[0]
    shown = []
    for index in range(number):
        scene, image_id = worlds.scene_at(seed, split, index), worlds.STREAMS[split] * _MOST + index
        picture = worlds.save_picture(scene, folder / coco_split / f"COCO_{coco_split}_{image_id:012d}.jpg")
        shown.append(_Shown(scene, worlds.regions(scene, picture), image_id, coco_split))
    return shown


def _table(shown: list[_Shown], composition: bool) -> Table:
    """Collects the kinds of questions that have two answers or more in these pictures."""
    table: Table = {}
    for index, each in enumerate(shown):
        for ask in asks(each.scene, reserved_people(each.scene) if composition else None):
            table.setdefault(ask.key, {}).setdefault(ask.answer, []).append((index, ask))
    return {key: entry for key, entry in table.items() if len(entry) > 1}


_INFO = {
    "description": "The MiniWorld, in the format of VQA v2.0.", "url": "", "version": "2.0", "year": 2017,
    "contributor": "tdlib", "date_created": "2017-04-26 17:07:13",
}  # fmt: skip
_LICENSE = {"url": "", "name": ""}


@contextmanager
def _array(path: Path, head: dict[str, Any], key: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes a JSON array entry by entry: under ``key`` of an object, or alone (None)."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + f', "{key}": [' if key else "[")
        separator = "\n"

        def write(record: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + json.dumps(record))
            separator = ",\n"

        yield write
        file.write("\n]}\n" if key else "\n]\n")


def _write_questions(
    folder: Path, split: str, seed: int, shown: list[_Shown], count: int, shift: str = "",
    changing_priors: bool = False,
) -> None:  # fmt: skip
    """Writes questions, annotations (not of test2015), relevance and concepts of one split."""
    if not shown:
        return
    table = _table(shown, split.endswith("composition"))
    if not table:
        raise DataError(
            f"{split}: {len(shown)} pictures are too few, no question has two answers; ask for 30 or more"
        )
    stem = f"vqacp_v2_{split}" if changing_priors else f"v2_mscoco_{split}"
    questions = f"{stem}_questions" if changing_priors else f"v2_OpenEnded_mscoco_{split}_questions"
    head = {"info": _INFO, "data_type": "mscoco", "data_subtype": shown[0].coco_split, "license": _LICENSE}
    rng = np.random.default_rng([seed, *stem.encode()])
    room = 1000 if count <= 300 * len(shown) else 10**6  # ids per picture; VQA has 1000
    for each in shown:
        each.asked = 0
    with ExitStack() as stack:
        ask_ = stack.enter_context(
            _array(
                folder / f"{questions}.json", {"task_type": "Open-Ended", **head},
                None if changing_priors else "questions",
            )
        )  # fmt: skip
        annotate = None
        if split != "test2015":
            path = folder / f"{stem}_annotations.json"
            annotate = stack.enter_context(_array(path, head, None if changing_priors else "annotations"))
        write = stack.enter_context(worlds.writing_lines(folder))
        for index, ask in _sample(rng, table, count, shift):
            each = shown[index]
            if each.asked == room:
                raise DataError(
                    f"{split}: more than {room} questions about one picture; ask for more pictures"
                )
            question_id = each.image_id * room + each.asked
            ids: dict[str, Any] = {"image_id": each.image_id, "question_id": question_id}
            each.asked += 1
            if changing_priors:
                ids["coco_split"] = each.coco_split
            text, spans = char_spans(ask.text)
            ask_({**ids, "question": text})
            marks = {"spans": spans, "boxes": [each.boxes[region] for region in ask.regions]}
            write(f"{stem}.relevance.jsonl", {"question_id": question_id, **marks})
            others = [found[0][1].meant for answer, found in table[ask.key].items() if answer != ask.answer]
            line = worlds.concepts(
                question_id, each.scene, ask.key, ask.named + ask.meant,
                [meant for meant in others if meant],
            )  # fmt: skip
            write(f"{stem}.concepts.jsonl", line)
            if annotate:
                annotate(ids | _annotation(rng, text, ask.answer, list(table[ask.key])))


def _annotation(rng: np.random.Generator, text: str, answer: str, answers: list[str]) -> dict[str, Any]:
    """Makes the fields of a question's annotation; ``answers`` are all that questions of its kind have."""
    return {
        "question_type": question_type(text.lower()),
        "answer_type": answer_type(answer),
        "multiple_choice_answer": answer,
        "answers": annotators(rng, answer, [other for other in answers if other != answer]),
    }


def write_vqa(folder: Path, seed: int = 0, size: Size = USUAL_SIZE) -> Path:
    """Writes VQA v2: questions and annotations of train2014, val2014 and test2015 (questions only).

    Side files: ``*.relevance.jsonl`` (characters of the question and boxes that decide) and
    ``*.concepts.jsonl`` (what question and answers name, and whether students met it: see
    ``read_concepts``). Shifts:
    ``val2014_balanced`` (all answers equally often) and ``val2014_prior`` (frequent ones rare) ask
    about val's pictures, ``val2014_style`` and ``val2014_composition`` about others in its folder.

    Raises:
        DataError: the folder holds something else, for instance the real data; or a split has too
            few or too many pictures, or too many questions about each.
    """

    def fill(partial: Path) -> None:
        train = _pictures(partial, "train2014", size.train, seed)
        _write_questions(partial, "train2014", seed, train, size.train_examples or 2 * size.train)
        val = _pictures(partial, "val2014", size.val, seed)
        for shift in ("", "balanced", "prior"):
            split = f"val2014_{shift}".rstrip("_")
            _write_questions(partial, split, seed, val, 2 * size.val, shift)
        for split, number in (
            ("test2015", size.test), ("val2014_style", size.shifted), ("val2014_composition", size.shifted),
        ):  # fmt: skip
            _write_questions(partial, split, seed, _pictures(partial, split, number, seed), 2 * number)

    return worlds.write_world(folder, worlds.describe_world("vqa_v2", seed, size), fill)


def write_vqa_cp(folder: Path, seed: int = 0, size: Size = USUAL_SIZE) -> Path:
    """Writes VQA-CP v2: train with skewed answers, test with the same ones turned around.

    Its pictures are those of ``write_vqa``'s train2014 and val2014, a quarter of both being the
    test's. (In the real VQA-CP, pictures occur in both splits; here in one.)
    """

    def fill(partial: Path) -> None:
        shown = _pictures(partial, "train2014", size.train, seed) + _pictures(
            partial, "val2014", size.val, seed
        )
        train, test = (
            [each for each in shown if (each.image_id % 4 == 0) == held_out] for held_out in (False, True)
        )
        count = size.train_examples or 2 * len(train)
        _write_questions(partial, "train", seed, train, count, changing_priors=True)
        _write_questions(partial, "test", seed, test, 2 * len(test), "prior", changing_priors=True)

    return worlds.write_world(folder, worlds.describe_world("vqa_cp_v2", seed, size), fill)
