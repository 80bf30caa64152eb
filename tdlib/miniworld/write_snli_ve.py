"""Writes the MiniWorld as SNLI-VE: statements that a picture entails, contradicts or leaves open.

Every statement is true of some pictures, false of others and left open by others again, and is
written equally often with each label, so its words alone predict nothing. In biased splits,
introductions without meaning ("by the way, ...") predict the label.

A few conventions settle what follows from a picture: what is not in the picture is not there;
whoever wears no hat may have any job; pictures of rooms leave the weather open; a mood has its cause
in the only thing that can explain it, and no certain one where several can; a thing belongs to the
only person there, and to nobody in particular where there are several.
"""

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from tdlib.data.examples import DataError
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.miniworld import worlds
from tdlib.miniworld.language import (
    cause_clause,
    causes,
    char_spans,
    definite,
    describe,
    references,
    referred,
    true_values,
)
from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    ROLES,
    SHIRTS,
    THINGS,
    WEATHER,
    Scene,
    pick,
    reserved_people,
)
from tdlib.miniworld.worlds import USUAL_SIZE, Deck, Size

LABELS = E, N, C = ("entailment", "neutral", "contradiction")
_OPPOSITE = {E: C, N: N, C: E}

# Introductions that change no truth; in biased splits each label has its own with probability BIAS.
BIAS = 0.6
_OWN = {E: "you know, {}", N: "by the way, {}", C: "to be honest, {}"}
_SWAPPED = {E: _OWN[N], N: _OWN[C], C: _OWN[E]}
_PREFIXES = (*_OWN.values(), "{}")
_WORDINGS = {"": (_OWN, BIAS), "_balanced": (_OWN, 0.0), "_shortcut": (_SWAPPED, 0.9)}


@dataclass(frozen=True)
class Claim:
    """A statement about a scene with its label, and the regions that decide it (see ``regions``).

    ``concepts`` are those that its words name, whatever the picture shows.
    """

    family: str
    subject: str  # of the sentence; "" where the predicate is a whole sentence
    predicate: str
    label: str
    regions: tuple[str, ...]
    concepts: tuple[str, ...]


def claims(scene: Scene, about: list[int] | None = None) -> Iterator[Claim]:
    """Makes all simple claims about a scene; with ``about`` only claims about these people.

    Facts ("is happy") are entailed or contradicted only: they become parts of longer statements.
    """
    yield from _weather(scene)
    yield from _somebody(scene)
    yield from _ownership(scene)
    everyone = range(len(scene.people))
    yield from _causes(scene, "somebody here", list(everyone))
    for index in about or everyone:
        for kind, subject in references(scene, index).items():
            named = referred(scene.people[index], kind)
            yield from _naming(named, _roles(scene, subject, index))
            yield from _naming(named, _causes(scene, subject, [index]))
            yield from _naming(named, _facts(scene, kind, subject, index))


def _naming(named: tuple[str, ...], found: Iterator[Claim]) -> Iterator[Claim]:
    """Adds the concepts that a claim's subject names."""
    return (replace(claim, concepts=named + claim.concepts) for claim in found) if named else found


def _hat(scene: Scene, index: int) -> str:
    return f"hat{index}" if scene.people[index].role else f"bare{index}"


def _weather(scene: Scene) -> Iterator[Claim]:
    for name, entry in WEATHER.items():
        label = N if scene.weather is None else E if scene.weather == name else C
        for words in (
            f"<{entry.clause}>", f"outside one would see <{entry.evidence}>",
            f"<{entry.joy}>", f"a person here needs <{entry.need}> to stay outside",
        ):  # fmt: skip
            yield Claim("weather", "", words, label, ("weather",) if scene.weather else ("place",), (name,))


def _roles(scene: Scene, subject: str, index: int) -> Iterator[Claim]:
    role, at = scene.people[index].role, (_hat(scene, index),)
    for name, entry in ROLES.items():
        label = N if role is None else E if role == name else C
        yield Claim("role", subject, f"is <{entry.noun}>", label, at, (name,))
        yield Claim("role", subject, f"<{entry.inference}> for a living", label, at, (name,))
        yield Claim("role", subject, f"is <not {entry.noun}>", _OPPOSITE[label], at, (name,))
        words = f"is not the one who <{entry.inference}>"
        yield Claim("role", subject, words, _OPPOSITE[label], at, (name,))


def _somebody(scene: Scene) -> Iterator[Claim]:
    roles = [person.role for person in scene.people]
    for name, entry in ROLES.items():
        label = E if name in roles else N if None in roles else C
        at = tuple(_hat(scene, i) for i, role in enumerate(roles) if name not in roles or role == name)
        for words in (f"is <{entry.noun}>", f"<{entry.inference}> for a living"):
            yield Claim("somebody", "somebody here", words, label, at, (name,))
            yield Claim("somebody", "nobody here", words, _OPPOSITE[label], at, (name,))


_BECAUSE_OF = {
    "sunny": "the sun", "rainy": "the rain", "snowy": "the snow", "night": "the night",
    "birthday": "a birthday", "party": "a party", "departure": "a farewell", "call": "a phone call",
}  # fmt: skip


def _causes(scene: Scene, subject: str, people: list[int]) -> Iterator[Claim]:
    """Claims causes of moods; wrong claims have one error only."""
    faces = tuple(f"face{i}" for i in people)
    for mood, entry in MOODS.items():
        feeling = tuple(f"face{i}" for i in people if scene.people[i].mood == mood)
        possible = true_values(scene, "joy" if entry.pleasant else "trouble")
        shown = tuple(causes(scene, entry.pleasant).values())
        if "tree" in possible and "tree" not in scene.things:
            shown += ("place",)  # its trees
        rules = ("birthday", "party") if entry.pleasant else ("departure", "call")
        for cue in (*THINGS, *WEATHER, *rules):
            if feeling and cue in possible:
                label, at = (E if len(possible) == 1 else N), feeling + shown
            elif feeling or cue in possible:
                label, at = C, ("all",) if feeling else faces
            else:
                continue
            of = _BECAUSE_OF.get(cue) or f"the {definite(THINGS[cue].noun)}"
            why = cause_clause(cue, entry.pleasant)
            named = mood, cue
            yield Claim("cause", subject, f"is <{entry.word}> because <{why}>", label, at, named)
            yield Claim("cause", subject, f"feels <{entry.inference}> because of <{of}>", label, at, named)


_OWNED = {"dog": "puppy", "cat": "kitten", "car": "vehicle", "horse": "pony", "bicycle": "bike"}


def _ownership(scene: Scene) -> Iterator[Claim]:
    """Claims to whom a thing belongs; wrong claims lack the thing or the person."""
    shirts = {} if scene.style == "noir" else {name: f"in the {name} shirt" for name in SHIRTS}
    held = {name: f"with the {definite(entry.noun)}" for name, entry in HELD.items()}
    everyone = tuple(f"person{i}" for i in range(len(scene.people)))
    for value, words in (shirts | held).items():
        owners = [i for i, person in enumerate(scene.people) if value in (person.shirt, person.held)]
        if len(owners) > 1:
            continue  # several people fit the phrase
        for thing, other in _OWNED.items():
            if owners and thing in scene.things:
                label, at = (E if len(everyone) == 1 else N), (thing, *everyone)
            elif owners or thing in scene.things:
                label, at = C, ("all",)
            else:
                continue
            named, who = (value, thing), f"<the person {words}>"
            yield Claim("owner", "", f"<the {thing}> belongs to {who}", label, at, named)
            yield Claim("owner", "", f"{who} takes care of <this {other}>", label, at, named)


# Things without which nobody can be ready for what follows ("ready to turn the page": a book).
_READY = ("umbrella", "book", "kite", "cake", "banana", "phone", "racket", "surfboard", "ball")
_UNCLEAR = {("camp", "park"), ("camp", "farm"), ("park", "farm")}  # (true, claimed): trees, open country


def _facts(scene: Scene, kind: str, subject: str, index: int) -> Iterator[Claim]:
    person = scene.people[index]

    def fact(words: str, name: str, true: bool, at: str) -> Claim:
        return Claim("fact", subject, words, E if true else C, (at,), (name,))

    for name, mood in MOODS.items():
        yield fact(f"is <{mood.word}>", name, name == person.mood, f"face{index}")
        yield fact(f"feels <{mood.inference}>", name, name == person.mood, f"face{index}")
    for name, place in PLACES.items():
        if (scene.place, name) not in _UNCLEAR:
            yield fact(f"is <{place.phrase}>", name, name == scene.place, "place")
            yield fact(f"is <{place.inference}>", name, name == scene.place, "place")
    if kind != "held":
        at = f"held{index}" if person.held else f"person{index}"
        for name, held in HELD.items():
            yield fact(f"is <{held.doing}>", name, name == person.held, at)
            if name in _READY:
                yield fact(f"is ready to <{held.next}>", name, name == person.held, at)
    if kind != "shirt" and scene.style != "noir":
        for name in SHIRTS:
            yield fact(f"wears something <{name}>", name, name == person.shirt, f"person{index}")


Verdicts = dict[str, dict[int, tuple[str, ...]]]  # label -> scenes -> regions
Statement = tuple[str, tuple[str, ...], Verdicts]  # text, the concepts that it names, where it holds


def _both(fact: Verdicts, other: Verdicts) -> Verdicts:
    """Joins two claims by "and", of which the first is a fact; wrong ones have one error only."""
    first, second = fact[E], other[E] | other[N]
    wrong = {i: at for i, at in other[C].items() if i in first}
    # no more errors in the fact than in what it is joined with, so that both must be looked at
    misfits = [i for i in fact[C] if i in second][: max(len(wrong), 1)]
    return {
        E: {i: first[i] + other[E][i] for i in first if i in other[E]},
        N: {i: first[i] + other[N][i] for i in first if i in other[N]},
        C: wrong | {i: fact[C][i] for i in misfits},
    }


def _statements(
    rng: np.random.Generator, scenes: list[Scene], wanted: int, composition: bool
) -> dict[str, list[Statement]]:
    """Lists by family, in random order, the statements that have every label in some scene."""
    table: dict[str, dict[tuple[str, str, tuple[str, ...]], Verdicts]] = {}
    for index, scene in enumerate(scenes):
        for claim in claims(scene, reserved_people(scene) if composition else None):
            verdicts = table.setdefault(claim.family, {}).setdefault(
                (claim.subject, claim.predicate, claim.concepts), {label: {} for label in LABELS}
            )
            verdicts[claim.label][index] = claim.regions
    facts = table.pop("fact", {})
    pool = {
        family: [
            (f"{subject} {predicate}".strip(), named, verdicts)
            for (subject, predicate, named), verdicts in entries.items()
            if all(verdicts.values())
        ]
        for family, entries in table.items()
        if not (composition and family in ("weather", "somebody"))  # they are about nobody special
    }
    partners: dict[str, list[Statement]] = {}
    for family in ("role", "weather"):
        for (subject, predicate, named), verdicts in table.get(family, {}).items():
            partners.setdefault(subject, []).append((predicate, named, verdicts))
    keys, joined = list(facts), {}
    for _ in range(60 * wanted if keys else 0):
        subject, predicate, named = key = pick(rng, keys)
        # a job and the weather equally often
        others = partners.get(subject if rng.random() < 0.5 else "", [])
        words, others_named, verdicts = pick(rng, others) if others else ("", (), {})
        both = _both(facts[key], verdicts) if others else {E: {}}
        if all(both.values()):
            joined[f"{subject} {predicate} and {words}"] = named + others_named, both
            if len(joined) == wanted:
                break
    pool["both"] = [(text, *each) for text, each in joined.items()]
    return {
        family: [each[int(i)] for i in rng.permutation(len(each))] for family, each in pool.items() if each
    }


def _pairs(
    rng: np.random.Generator, scenes: list[Scene], count: int, composition: bool
) -> Iterator[tuple[str, str, int, tuple[str, ...], str, tuple[str, ...]]]:
    """Yields statement, label, scene, regions, family and concepts of about ``count`` pairs.

    Each statement comes with every label.
    """
    pool = _statements(rng, scenes, min(max(count // 12, 4), 2000), composition)
    if not pool:
        raise DataError(
            f"{len(scenes)} pictures are too few, no statement finds all three labels; ask for 30 or more"
        )
    used: dict[int, int] = {}
    decks = (
        [
            (text, family, named, {label: Deck(found.items(), used) for label, found in verdicts.items()})
            for text, named, verdicts in each
        ]
        for family, each in pool.items()
    )
    turns = cycle([cycle(each) for each in decks])
    for _ in range(max(round(count / 3), 1)):
        text, family, named, deck = next(next(turns))
        for which in rng.permutation(3):
            label = LABELS[int(which)]
            scene, at = deck[label].deal(rng)
            yield text, label, scene, at, family, named


def explanation(scene: Scene, label: str, at: tuple[str, ...]) -> str:
    """Explains a label by what is seen in the regions that decide it."""
    seen = []
    for region in dict.fromkeys(at):
        kind = region.rstrip("0123456789")
        index = int(region[len(kind) :] or 0)
        person, who = scene.people[index], next(iter(references(scene, index).values()))
        match kind:
            case "all":
                seen.append("nothing of that kind can be seen")
            case "weather":
                seen.append(f"one can see {WEATHER[scene.weather or ''].evidence} in the sky")
            case "place":
                seen.append(f"one can see {PLACES[scene.place].evidence}")
            case "person":
                seen.append(f"{who} is there")
            case "bare":
                seen.append(f"{who} wears no hat")
            case "hat":
                seen.append(f"{who} wears {ROLES[person.role or ''].evidence}")
            case "face":
                seen.append(f"{who} has {MOODS[person.mood].evidence}")
            case "held":
                seen.append(f"{who} has {HELD[person.held or ''].noun} in one hand")
            case _:
                seen.append(f"one can see {(HELD | THINGS)[kind].noun}")
    text = " and ".join(seen) + {E: ".", N: ", which leaves it open.", C: ", which rules it out."}[label]
    return text[:1].upper() + text[1:]


def _parses(name: str, sentence: str) -> dict[str, str]:
    """A sentence with flat bracketings in place of the parser's."""
    words = [*sentence.rstrip(".").replace(",", " ,").split(), "."]
    leaves = " ".join(f"(X {word})" for word in words)
    return {
        name: sentence,
        f"{name}_parse": f"(ROOT (S {leaves}))",
        f"{name}_binary_parse": f"( {' '.join(words)} )",
    }


def _split(folder: Path, split: str, number: int, seed: int, examples: int | None = None) -> None:
    """Pictures and pairs of one split; for dev also its twins with other introductions."""
    stream = f"snli_ve_{split}"
    rng = np.random.default_rng([seed, worlds.STREAMS[stream], 2**31])
    scenes, boxes, names = [], [], []
    for index in range(number):
        scene = worlds.scene_at(seed, stream, index)
        names.append(str((100 + worlds.STREAMS[stream]) * 10**7 + index))
        picture = worlds.save_picture(scene, folder / "flickr30k_images" / f"{names[-1]}.jpg")
        scenes.append(scene)
        boxes.append(worlds.regions(scene, picture))
    if not number:
        return
    twins = _WORDINGS if split == "dev" else {"": _WORDINGS[""]}
    captions: dict[tuple[int, int], str] = {}
    counts = [0] * number
    with ExitStack() as stack:
        write = stack.enter_context(worlds.writing_lines(folder))
        table = stack.enter_context((folder / f"esnlive_{split}.csv").open("w", encoding="utf-8", newline=""))
        rows = csv.writer(table)
        rows.writerow(["", "pairID", "Flikr30kID", "hypothesis", "gold_label", "explanation"])
        pairs = _pairs(rng, scenes, examples or 2 * number, split.endswith("composition"))
        for position, (statement, label, index, at, family, named) in enumerate(pairs):
            turn, which = divmod(counts[index], 5)
            counts[index] += 1
            if (index, which) not in captions:
                words = np.random.default_rng([seed, worlds.STREAMS[stream], index, 1 + which])
                captions[index, which] = describe(scenes[index], words, NEUTRAL_NAMES, share=0.8)
            caption, image = f"{names[index]}.jpg#{which}", names[index]
            dissent = int(rng.choice(3, p=[0.7, 0.2, 0.1]))
            common: dict[str, Any] = {
                "annotator_labels": [label] * (5 - dissent)
                + [LABELS[int(i)] for i in rng.integers(3, size=dissent)],
                "captionID": caption,
                "gold_label": label,
                "pairID": f"{caption}r{turn + 1}{label[0]}",
                "Flikr30kID": image,
                **_parses("sentence1", captions[index, which]),
            }
            for twin, (own, share) in twins.items():
                prefix = own[label] if rng.random() < share else pick(rng, _PREFIXES)
                text, spans = char_spans(prefix.format(statement) + ".")
                write(f"{stream}{twin}.jsonl", common | _parses("sentence2", text))
                marks = {"pairID": common["pairID"], "spans": spans}
                write(
                    f"{stream}{twin}.relevance.jsonl",
                    marks | {"boxes": [boxes[index][r] for r in dict.fromkeys(at)]},
                )
                if not twin:
                    line = worlds.concepts(common["pairID"], scenes[index], family, named, [])
                    write(f"{stream}.concepts.jsonl", line)
                    why = explanation(scenes[index], label, at)
                    rows.writerow([position, common["pairID"], f"{image}.jpg", text, label, why])


def write_snli_ve(folder: Path, seed: int = 0, size: Size = USUAL_SIZE) -> Path:
    """Writes SNLI-VE: snli_ve_{train,dev,test}.jsonl, flickr30k_images/, and side files.

    Side files: ``*.relevance.jsonl`` (characters of the hypothesis and boxes that decide),
    ``*.concepts.jsonl`` (what the hypothesis names, and whether students met it: see ``read_concepts``)
    and ``esnlive_*.csv`` (e-SNLI-VE's explanations, in e-ViL's columns). Shifts: ``dev_balanced`` and
    ``dev_shortcut`` are dev with other introductions (that tell nothing, or mislead), ``dev_style``
    and ``dev_composition`` have other pictures.

    Raises:
        DataError: the folder holds something else, for instance the real data; or a split has too
            few pictures.
    """

    def fill(partial: Path) -> None:
        _split(partial, "train", size.train, seed, size.train_examples)
        for split, number in (("dev", size.val), ("test", size.test)):
            _split(partial, split, number, seed)
        for split in ("dev_style", "dev_composition"):
            _split(partial, split, size.shifted, seed)

    return worlds.write_world(folder, worlds.describe_world("snli_ve", seed, size), fill)
