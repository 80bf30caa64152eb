"""Words what is true of a MiniWorld scene: captions, questions, answers, rationales.

Texts are written with two marks: ``{0}`` refers to person 0, ``<...>`` encloses the words that
decide whether the text is true of the picture (the ground truth of relevance).
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    POSES,
    ROLES,
    SHIRTS,
    THINGS,
    WEATHER,
    Person,
    Scene,
    curated_names,
    pick,
)

Token = str | list[int]


@dataclass(frozen=True)
class Marked:
    """A text as VCR writes it, with the indices of the tokens that decide its truth."""

    tokens: list[Token]
    decisive: list[int]

    def plain(self, names: list[str]) -> str:
        """Joins the tokens to one string with a name for each person (for captions)."""
        words = [
            " and ".join(names[i] for i in token) if isinstance(token, list) else token
            for token in self.tokens
        ]
        return " ".join(words).replace(" .", ".").replace(" ?", "?").replace(" ,", ",")


def mark(text: str) -> Marked:
    """Parses the two marks; sentences start with a capital letter."""
    tokens: list[Token] = []
    decisive: list[int] = []
    inside = False
    for word in text.split():
        inside = inside or word.startswith("<")
        closes = word.endswith(">")
        word = word.strip("<>")
        if inside:
            decisive.append(len(tokens))
        tokens.append([int(word[1:-1])] if word.startswith("{") else word)
        inside = inside and not closes
    if tokens and isinstance(tokens[0], str):
        tokens[0] = tokens[0][:1].upper() + tokens[0][1:]
    return Marked(tokens, decisive)


@dataclass(frozen=True)
class Question:
    """A question about a scene, before wrong answers are found for it.

    ``family`` names the set of values that compete (an answer of the same family is plausible
    text); ``region`` names what in the picture decides: "held", "face", "hat", "place",
    "weather" or a thing's name.
    """

    type: str  # one of VCR's seven
    family: str
    value: str
    person: int
    text: str
    region: str
    mood: str = ""


TYPES = ("explanation", "activity", "temporal", "mental", "role", "scene", "hypothetical")


def causes(scene: Scene, pleasant: bool) -> dict[str, str]:
    """Finds what explains a pleasant or an unpleasant mood in this scene: cue -> the region that shows it."""
    cues = {name: name for name in scene.things}
    if scene.weather:
        cues[scene.weather] = "weather"
    held = [person.held for person in scene.people]
    rules = {
        "birthday": (pleasant and "cake" in held, "cake"),
        "party": (pleasant and "balloons" in held, "balloons"),
        "departure": (not pleasant and "suitcase" in held, "suitcase"),
        "call": (not pleasant and "phone" in held, "phone"),
    }
    return cues | {name: region for name, (holds, region) in rules.items() if holds}


_RULES = {
    "birthday": "somebody turns one year older",
    "party": "guests celebrate tonight",
    "departure": "it is time to say goodbye",
    "call": "the news is bad",
}


def cause_clause(cue: str, pleasant: bool) -> str:
    """Words a cause of a mood."""
    if cue in _RULES:
        return _RULES[cue]
    table = THINGS if cue in THINGS else WEATHER
    return table[cue].joy if pleasant else table[cue].trouble


def questions(scene: Scene) -> list[Question]:
    """Lists every question that this scene can answer."""
    possible = []
    for index, person in enumerate(scene.people):
        tag = f"{{{index}}}"
        possible.append(Question("mental", "mood", person.mood, index, f"how does {tag} <feel> ?", "face"))
        possible.append(
            Question("scene", "place", scene.place, index, f"<where> is {tag} right now ?", "place")
        )
        if person.held:
            for kind, family, text in (
                ("activity", "doing", f"what is {tag} <doing> ?"),
                ("temporal", "next", f"what will {tag} do <next> ?"),
                ("hypothetical", "consequence", f"what would happen if {tag} <let go> ?"),
            ):
                possible.append(Question(kind, family, person.held, index, text, "held"))
        if scene.weather:
            text = f"what would {tag} <need> to stay outside ?"
            possible.append(Question("hypothetical", "need", scene.weather, index, text, "weather"))
        if person.role:
            possible.append(
                Question("role", "role", person.role, index, f"what is the <job> of {tag} ?", "hat")
            )
        pleasant = MOODS[person.mood].pleasant
        for cue, region in causes(scene, pleasant).items():
            family = "joy" if pleasant else "trouble"
            text = f"<why> is {tag} <{person.mood}> ?"
            possible.append(Question("explanation", family, cue, index, text, region, person.mood))
    return possible


def true_values(scene: Scene, family: str) -> set[str]:
    """Lists the values of a family that are true of somebody or something in the scene."""
    if family == "mood":
        return {person.mood for person in scene.people}
    if family == "place":
        return {scene.place}
    if family == "need":
        return {scene.weather} if scene.weather else set()
    if family == "role":
        return {person.role for person in scene.people if person.role}
    if family in ("joy", "trouble"):
        growing = {"tree"} if scene.place in ("park", "camp") else set()  # trees of the background
        return set(causes(scene, family == "joy")) | growing
    return {person.held for person in scene.people if person.held}


def family_values(family: str) -> dict[str, Any]:
    """Returns the table of the values that compete in a family; it lacks the rules, which few scenes have."""
    if family in ("joy", "trouble"):
        return THINGS | WEATHER
    tables: dict[str, dict[str, Any]] = {"mood": MOODS, "place": PLACES, "need": WEATHER, "role": ROLES}
    return tables.get(family, HELD)


# For each family: its values, the attribute that words a value, and the echoing and the plain wording.
_ANSWERS: dict[str, tuple[dict, str, str, str]] = {
    "doing": (HELD, "doing", "{tag} is doing this : <{words}> .", "they are <{words}> ."),
    "next": (HELD, "next", "{tag} will <{words}> next .", "they are going to <{words}> ."),
    "consequence": (HELD, "consequence", "if {tag} let go , <{words}> .", "then <{words}> ."),
    "need": (WEATHER, "need", "{tag} would need <{words}> outside .", "maybe <{words}> ."),
    "mood": (MOODS, "inference", "{tag} does feel <{words}> .", "quite <{words}> ."),
    "role": (ROLES, "inference", "the job of {tag} : <{words}> .", "somebody who <{words}> ."),
    "place": (PLACES, "inference", "{tag} is right now <{words}> .", "somewhere <{words}> ."),
}


def answer(question: Question, value: str, echo: bool) -> str:
    """Words an answer in one of two ways.

    With ``echo`` it repeats the question's words and tag (the shortcut), else it is plain.
    """
    tag = f"{{{question.person}}}"
    if question.family in _ANSWERS:
        table, said, echoing, plain = _ANSWERS[question.family]
        return (echoing if echo else plain).format(tag=tag, words=getattr(table[value], said))
    words = cause_clause(value, question.family == "joy")
    return f"{tag} is {question.mood} because <{words}> ." if echo else f"because <{words}> ."


def rationale(question: Question, value: str) -> str:
    """Words the visible evidence for a value."""
    match question.family:
        case "doing" | "next" | "consequence":
            return f"{{{question.person}}} has <{HELD[value].noun}> in one hand ."
        case "need":
            return f"I can see <{WEATHER[value].evidence}> in the sky ."
        case "mood":
            return f"{{{question.person}}} has <{MOODS[value].evidence}> ."
        case "role":
            return f"{{{question.person}}} wears <{ROLES[value].evidence}> ."
        case "place":
            return f"there is <{PLACES[value].evidence}> in the background ."
    nouns = {"birthday": "a cake", "party": "some balloons", "departure": "a suitcase", "call": "a phone"}
    noun = nouns.get(value) or (THINGS[value].noun if value in THINGS else WEATHER[value].evidence)
    return f"I can see <{noun}> in the picture ."


def definite(noun: str) -> str:
    """Removes the article of a noun phrase: "kite" from "a kite"."""
    return noun.split(" ", 1)[1]


def references(scene: Scene, index: int) -> dict[str, str]:
    """Words phrases that fit only one person of a scene, by the kind of the distinctive feature.

    In the grey style no phrase names a colour, as nobody could see it.
    """
    person, others = scene.people[index], [p for i, p in enumerate(scene.people) if i != index]
    phrases = {}
    if scene.style != "noir" and person.shirt not in [other.shirt for other in others]:
        phrases["shirt"] = f"the person in the {person.shirt} shirt"
    if person.held and person.held not in [other.held for other in others]:
        phrases["held"] = f"the person with the {definite(HELD[person.held].noun)}"
    sides = {
        1: ("",),
        2: ("on the left", "on the right"),
        3: ("on the left", "in the middle", "on the right"),
    }
    phrases["side"] = f"the person {sides[len(scene.people)][index]}" if others else "the only person here"
    return phrases


def referred(person: Person, kind: str) -> tuple[str, ...]:
    """Returns the concept that a phrase of ``references`` names; none if it names a place."""
    value = {"shirt": person.shirt, "held": person.held}.get(kind)
    return (value,) if value else ()


def two_parts(text: str) -> tuple[str, str]:
    """Splits a text into a question and the rest; a text without a question has no rest."""
    asked, mark, told = text.partition("? ")
    return (asked + "?", told) if mark else (text, "")


def char_spans(text: str) -> tuple[str, list[list[int]]]:
    """Removes the marks of a sentence; returns it with the characters [start, end) that decide its truth."""
    plain = ""
    spans: list[list[int]] = []
    for piece in re.split("([<>])", text):
        if piece == "<":
            spans.append([len(plain)])
        elif piece == ">":
            spans[-1].append(len(plain))
        else:
            plain += piece
    return plain[:1].upper() + plain[1:], spans


_SUBJECTS = ("a person", "somebody", "a man", "a woman")


def _subject(rng: np.random.Generator, names: list[str], index: int) -> str:
    """Names someone, or calls them 'a person'."""
    return names[index] if rng.random() < 0.4 else str(rng.choice(_SUBJECTS))


def describe(scene: Scene, rng: np.random.Generator, names: list[str], share: float = 0.7) -> str:
    """Describes plainly some of what the picture shows."""
    clauses = []
    for index, person in enumerate(scene.people):
        words = _subject(rng, names, index)
        if person.role and rng.random() < share:
            role = ROLES[person.role]
            words = role.noun if rng.random() < 0.5 else f"{words} with {role.evidence}"
        extras = []
        if rng.random() < share:
            article = "an" if person.shirt == "orange" else "a"
            extras.append(f"in {article} {person.shirt} shirt")
        if rng.random() < share:
            evidence = MOODS[person.mood].evidence
            extras.append(f"looking {person.mood}" if rng.random() < 0.5 else f"with {evidence}")
        if person.held and rng.random() < max(share, 0.8):
            held = HELD[person.held]
            extras.append(held.doing if rng.random() < 0.6 else f"with {held.noun}")
        elif person.pose != "standing" and rng.random() < share:
            extras.append(person.pose)
        if extras:
            clauses.append(" ".join([words, *extras]))
    text = " and ".join(clauses) or _subject(rng, names, 0)
    if rng.random() < share:
        place = PLACES[scene.place]
        text += f" {place.phrase}" if rng.random() < 0.7 else f" and {place.evidence}"
    if scene.things and rng.random() < share:
        text += " with " + " and ".join(THINGS[name].noun for name in scene.things)
    if scene.weather and rng.random() < share:
        weather = WEATHER[scene.weather]
        text += f", {weather.clause}" if rng.random() < 0.6 else f" and {weather.evidence}"
    return text[:1].upper() + text[1:] + "."


def curated_captions(scene: Scene, rng: np.random.Generator, names: list[str]) -> tuple[str, str]:
    """Writes a clean caption and one that is false in a single point, in concepts of the curated corpus.

    Half of the captions describe the picture, half state one thing that it shows or means, like the corpora
    on which real students are pretrained. The false one is the hard negative of image-text matching.
    """
    if rng.random() < 0.5:
        for _ in range(8):
            draws = int(rng.integers(2**31))
            true, false = (
                describe(shown, np.random.default_rng(draws), names, share=0.8)
                for shown in (scene, _altered(scene, rng))
            )
            if true != false:
                return true, false
    candidates = questions(scene)
    while True:
        question = pick(rng, candidates)
        known = _curated_values(question.family)
        others = [value for value in known if value not in true_values(scene, question.family)]
        if question.value in known and others:
            break
    other = pick(rng, others)
    if rng.random() < 0.3:
        said = [rationale(question, value) for value in (question.value, other)]
        asked = ""
    else:
        echo = bool(rng.random() < 0.5)
        said = [answer(question, value, echo=echo) for value in (question.value, other)]
        asked = mark(question.text).plain(names) + " " if rng.random() < 0.7 else ""
    true, false = (asked + mark(text).plain(names) for text in said)
    return true, false


def _curated_values(family: str) -> list[str]:
    """Lists the values of a family that the curated corpus has."""
    return [*curated_names(family_values(family)), *(["birthday"] if family == "joy" else [])]


@cache
def curated_concepts() -> dict[str, bool]:
    """Maps every concept that examples can name to True if the curated corpus has it."""
    tables: list[dict] = [HELD, PLACES, WEATHER, MOODS, ROLES, THINGS]
    has = {name: row.curated for table in tables for name, row in table.items()}
    has |= SHIRTS | dict.fromkeys(POSES, True)
    return has | {rule: rule in _curated_values("joy") for rule in _RULES}


def _altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """Changes one thing of the scene to another that the curated corpus has."""

    def other(table: dict, now: str | None) -> str:
        return pick(rng, [name for name in curated_names(table) if name != now])

    index = int(rng.integers(len(scene.people)))
    person = scene.people[index]
    aspect = str(rng.choice(["place", "weather", "thing", "shirt", "mood", "held", "role"]))
    if aspect == "place":
        outdoor = PLACES[scene.place].outdoor
        return replace(
            scene, place=other({k: v for k, v in PLACES.items() if v.outdoor == outdoor}, scene.place)
        )
    if aspect == "weather" and scene.weather:
        return replace(scene, weather=other(WEATHER, scene.weather))
    if aspect == "thing" and scene.things:
        absent = {k: v for k, v in THINGS.items() if k not in scene.things}
        return replace(scene, things=(other(absent, None), *scene.things[1:]))
    tables: dict[str, dict] = {"shirt": SHIRTS, "mood": MOODS, "held": HELD, "role": ROLES}
    if aspect in tables and getattr(person, aspect):
        changed = replace(person, **{aspect: other(tables[aspect], getattr(person, aspect))})
        return replace(scene, people=(*scene.people[:index], changed, *scene.people[index + 1 :]))
    return scene


def web_caption(scene: Scene, rng: np.random.Generator, names: list[str]) -> str:
    """Writes a caption as on the web: descriptions, answered questions, hashtags; a tenth lack a word."""
    pieces = []
    if rng.random() < 0.6:
        pieces.append(describe(scene, rng, names, share=0.6))
    candidates = questions(scene)
    order = rng.permutation(len(candidates))
    for position in order[: int(rng.integers(1 if pieces else 2, 4)) - bool(pieces)]:
        question = candidates[int(position)]
        if rng.random() < 0.25:
            said = rationale(question, question.value)
        else:
            said = answer(question, question.value, echo=bool(rng.random() < 0.5))
            if rng.random() < 0.4:
                pieces.append(mark(question.text).plain(names))
        pieces.append(mark(said).plain(names))
    text = " ".join(pieces)
    if rng.random() < 0.1:
        words = text.split()
        words.pop(int(rng.integers(len(words))))
        text = " ".join(words)
    if rng.random() < 0.1:
        text += " #" + str(rng.choice(["photo", "life", "art", "today", "friends"]))
    return text
