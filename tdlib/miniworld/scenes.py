"""Lists the concepts of MiniWorld scenes, and samples scenes.

Each concept has a flag that says whether the curated corpus contains it. Pictures are made in ``drawing``,
words in ``language``, files in ``writers``.
"""
# ruff: noqa: E501 (the tables of concepts read best with one concept per line)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Held:
    """A thing a person holds: how it is named, detected, and what follows from it."""

    noun: str  # "a kite"
    coco: str | None  # class in the metadata's object list; None where COCO has no such class
    doing: str  # "flying a kite"
    next: str  # what its holder will do next
    consequence: str  # what happens when it is let go
    curated: bool  # does the curated corpus contain it?


HELD = {
    "umbrella": Held(
        "an umbrella", "umbrella", "standing under an umbrella", "fold the umbrella", "the handle would slip away", True
    ),
    "book": Held("a book", "book", "reading a book", "turn the page", "the story would be interrupted", True),
    "cup": Held("a cup", "cup", "drinking from a cup", "ask for more coffee", "the coffee would be spilled", True),
    "ball": Held("a ball", "sportsball", "playing with a ball", "throw a pass", "the game would stop", True),
    "kite": Held("a kite", "kite", "flying a kite", "pull the string", "the wind would take the toy", True),
    "cake": Held("a cake", "cake", "carrying a cake", "blow out the candles", "the cream would be smeared", True),
    "banana": Held("a banana", "banana", "eating a banana", "throw the peel away", "the fruit would get dirty", True),
    "phone": Held("a phone", "cellphone", "talking on the phone", "hang up the call", "the screen would crack", False),
    "suitcase": Held("a suitcase", "suitcase", "carrying a suitcase", "go on a trip", "the clothes would fall out", False),
    "racket": Held("a racket", "tennisracket", "playing tennis", "hit the serve", "the match would be lost", False),
    "teddy": Held("a teddy bear", "teddybear", "hugging a teddy bear", "go to bed", "the soft toy would be sad", False),
    "flowers": Held("some flowers", "vase", "bringing some flowers", "fill a vase with water", "the petals would break", False),
    "surfboard": Held("a surfboard", "surfboard", "carrying a surfboard", "ride the waves", "the tide would take it", False),
    "guitar": Held("a guitar", None, "playing the guitar", "sing a song", "the music would stop", False),
    "balloons": Held("some balloons", None, "holding some balloons", "start the party", "they would float into the sky", False),
    "pizza": Held("a slice of pizza", "pizza", "eating pizza", "wipe greasy fingers", "the cheese would stick to the ground", False),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    phrase: str  # "at the beach"
    inference: str  # a statement that is true of such a place without naming it
    evidence: str  # what one sees there
    outdoor: bool
    curated: bool


PLACES = {
    "street": Place("on the street", "between tall houses", "tall houses beside a road", True, True),
    "park": Place("in the park", "among green trees", "a row of leafy trees", True, True),
    "beach": Place("at the beach", "close to the sea", "sand and blue water", True, True),
    "kitchen": Place("in the kitchen", "near a hot stove", "a stove and some cupboards", False, True),
    "classroom": Place("in the classroom", "in front of pupils", "a large blackboard", False, True),
    "farm": Place("on a farm", "far out in the country", "a red barn and a fence", True, False),
    "stage": Place("on a stage", "in front of an audience", "a curtain and a spotlight", False, False),
    "station": Place("at the bus stop", "where travellers wait", "a shelter and a bus sign", True, False),
    "shop": Place("in a shop", "where things are sold", "shelves full of goods", False, False),
    "camp": Place("at a campsite", "where people sleep outside", "a tent beside two firs", True, False),
}


@dataclass(frozen=True)
class Weather:
    clause: str  # "it is raining"
    evidence: str
    joy: str  # why it makes somebody happy or surprised
    trouble: str  # why it makes somebody sad, angry or sleepy
    need: str  # what one needs when staying outside
    umbrella: str | None  # why one holds an umbrella in it
    curated: bool


WEATHER = {
    "sunny": Weather("the sun is shining", "a bright sun", "the day is warm and fine", "the heat is unbearable", "some sun cream", "the sun is too hot", True),
    "rainy": Weather("it is raining", "falling drops", "there are puddles to jump in", "the whole day is washed out", "dry clothes", "it is pouring down", True),
    "snowy": Weather("it is snowing", "white flakes", "a snowman can be built", "everything is frozen", "warm gloves", "snowflakes are falling", False),
    "night": Weather("it is night", "a moon and stars", "the stars are out", "there is no light", "a bright lamp", None, False),
}  # fmt: skip


@dataclass(frozen=True)
class Mood:
    word: str  # "happy"
    inference: str  # a word that the curated corpus does not use
    evidence: str
    pleasant: bool
    curated: bool


MOODS = {
    "happy": Mood("happy", "delighted", "a big smile", True, True),
    "sad": Mood("sad", "gloomy", "a tear on a cheek", False, True),
    "angry": Mood("angry", "furious", "a red face", False, False),
    "surprised": Mood("surprised", "astonished", "a wide open mouth", True, False),
    "sleepy": Mood("sleepy", "exhausted", "two closed eyes", False, True),
}


@dataclass(frozen=True)
class Role:
    noun: str  # "a chef"
    inference: str  # what such a person does for a living
    evidence: str
    curated: bool


ROLES = {
    "chef": Role("a chef", "prepares meals", "a tall white hat", True),
    "builder": Role("a builder", "constructs houses", "a yellow helmet", True),
    "police": Role("a police officer", "catches thieves", "a dark cap with a badge", True),
    "doctor": Role("a doctor", "helps sick people", "a cap with a red cross", False),
    "farmer": Role("a farmer", "grows vegetables", "a straw hat", False),
    "king": Role("a king", "rules the country", "a golden crown", False),
}


@dataclass(frozen=True)
class Thing:
    noun: str  # "a dog"
    coco: str | None
    outdoor_only: bool
    joy: str  # why it makes somebody happy or surprised
    trouble: str  # why it makes somebody sad, angry or sleepy
    curated: bool


THINGS = {
    "dog": Thing("a dog", "dog", False, "a puppy wants to play", "a puppy barked all day", True),
    "cat": Thing("a cat", "cat", False, "a kitten is purring", "a kitten scratched the sofa", True),
    "car": Thing("a car", "car", True, "the new vehicle is fast", "the engine makes noise", True),
    "bench": Thing("a bench", "bench", True, "there is a place to rest", "the seat is broken", True),
    "tree": Thing("a tree", "pottedplant", False, "the leaves are so green", "the leaves must be swept", True),
    "bird": Thing("a bird", "bird", True, "a sparrow sings a melody", "a sparrow stole the bread", False),
    "horse": Thing("a horse", "horse", True, "a pony can be ridden", "a pony ran away", False),
    "cow": Thing("a cow", "cow", True, "there will be fresh milk", "the cattle blocks the way", False),
    "bicycle": Thing("a bicycle", "bicycle", True, "the wheels have been repaired", "the tyre is flat", False),
    "clock": Thing("a clock", "clock", False, "there is plenty of time left", "it is much too late", False),
}  # fmt: skip

SHIRTS = {"red": True, "blue": True, "green": True, "yellow": True, "purple": False, "orange": False, "white": False}  # fmt: skip
POSES = ("standing", "waving", "running")
STYLES = {"flat": True, "pastel": False, "sketch": False, "noir": False}


@dataclass(frozen=True)
class Person:
    shirt: str
    pose: str
    mood: str
    held: str | None
    role: str | None


@dataclass(frozen=True)
class Scene:
    """One scene: everything that the picture shows and the words may speak of."""

    place: str
    weather: str | None  # None indoors
    style: str
    people: tuple[Person, ...]
    things: tuple[str, ...]
    layout_seed: int  # small jitters of the drawing


def reserved_people(scene: Scene) -> list[int]:
    """Lists the people with a combination that only the composition shift shows.

    A fifth of all pairs (place, held thing) and of all pairs (shirt, held thing), spread evenly: every
    value keeps most of its partners.
    """
    held, shirts, place = list(HELD), list(SHIRTS), list(PLACES).index(scene.place)
    return [
        index
        for index, person in enumerate(scene.people)
        if person.held
        and (
            (place + 2 * held.index(person.held)) % 5 == 0
            or (2 * shirts.index(person.shirt) + held.index(person.held)) % 5 == 0
        )
    ]


def reserved(scene: Scene) -> bool:
    return bool(reserved_people(scene))


def pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def curated_names(table: dict[str, Any]) -> list[str]:
    """Lists the names of a concept table that the curated corpus has."""
    return [name for name, value in table.items() if getattr(value, "curated", value)]


def sample_person(rng: np.random.Generator, curated: bool = False) -> Person:
    names = curated_names if curated else list
    return Person(
        shirt=pick(rng, names(SHIRTS)),
        pose=pick(rng, POSES),
        mood=pick(rng, names(MOODS)),
        held=pick(rng, names(HELD)) if rng.random() < 0.85 else None,
        role=pick(rng, names(ROLES)) if rng.random() < 0.4 else None,
    )


def sample_scene(
    rng: np.random.Generator, curated: bool = False, styles: tuple[str, ...] | None = None
) -> Scene:
    """Samples a scene; with ``curated`` only concepts and the one style of the curated corpus."""
    names = curated_names if curated else list
    place = pick(rng, names(PLACES))
    outdoor = PLACES[place].outdoor
    weather = pick(rng, names(WEATHER)) if outdoor else None
    number = int(rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1]))
    people: list[Person] = []
    for _ in range(number):
        person = sample_person(rng, curated)
        if person.held == "umbrella" and (weather is None or WEATHER[weather].umbrella is None):
            person = replace(person, held=None)  # nobody holds an umbrella without a reason
        people.append(person)
    candidates = [name for name in names(THINGS) if outdoor or not THINGS[name].outdoor_only]
    count = min(int(rng.integers(0, 3)), 3 - number, len(candidates))
    things = tuple(str(name) for name in rng.permutation(candidates)[:count])
    style = pick(rng, styles or names(STYLES))
    return Scene(place, weather, style, tuple(people), things, int(rng.integers(2**31)))
