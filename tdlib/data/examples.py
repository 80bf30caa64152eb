"""Defines the one example type of all tasks, and subsets of examples: few per stratum, or by picture."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from tdlib.core.files import write_json
from tdlib.core.places import GROUND_TRUTH, Box, Reference, Span

log = logging.getLogger(__name__)

MANY_FOLDERS = 50  # if pictures lie in so many folders, whole folders are set aside


class DataError(ValueError):
    """Bad input data; the message names the place, what was expected there, and the remedy."""


@dataclass(frozen=True)
class TextPart:
    """A raw string with its references; ``relevant`` are the spans that decide the answer, if known."""

    text: str
    references: tuple[Reference, ...] = ()
    relevant: tuple[Span, ...] = ()


def join_parts(first: TextPart, second: TextPart) -> TextPart:
    """Two parts as one string with a space between, spans shifted along."""
    shift = len(first.text) + 1
    return TextPart(
        f"{first.text} {second.text}",
        (
            *first.references,
            *(Reference(r.start + shift, r.end + shift, r.objects) for r in second.references),
        ),
        (*first.relevant, *((start + shift, end + shift) for start, end in second.relevant)),
    )


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    ``boxes`` are xyxy normalised to the picture ([0, 1]), one per object, with class ``names``.
    ``choices`` are the candidate answers (empty where the task has a fixed label set). ``label`` is
    an index into them or into the label set; None in test files without labels, and where the
    right answer is not in the vocabulary. ``stratum`` is what low-shot subsets balance.
    ``question`` is the id of the question that this example is a ``part`` of, where one question gives
    several (VCR: "" chooses an answer, "r" a rationale given the right one, "r0" to "r3" given each);
    "" where it is the only one: then its own id counts (``Examples.questions``).
    ``annotators`` are the answers that people gave (VQA), ``answer_type`` their kind, and
    ``soft_label`` what each of the vocabulary's answers is worth, as (index, score in [0, 1]).
    ``given`` is the character of the prompt at which a given answer starts (VCR's QA->R), 0 without one.
    ``truth`` names the origin of the relevant spans and boxes: ground truth, or a proxy (``data.truth``).
    """

    id: str
    image: Path
    boxes: tuple[Box, ...]
    names: tuple[str, ...]
    prompt: TextPart
    choices: tuple[TextPart, ...]
    label: int | None
    stratum: str
    relevant_boxes: tuple[Box, ...] = field(default=())
    annotators: tuple[str, ...] = ()
    answer_type: str = ""
    soft_label: tuple[tuple[int, float], ...] = ()
    given: int = 0
    truth: str = GROUND_TRUTH
    question: str = ""
    part: str = ""

    def statements(self) -> tuple[TextPart, ...]:
        """Lists the texts that are read with the picture: the prompt with each choice, or alone."""
        return tuple(join_parts(self.prompt, choice) for choice in self.choices) or (self.prompt,)


class Examples(Sequence[Example]):
    """A sequence of examples that are made only when they are accessed; ids and strata are there at once.

    ``make`` makes the example at a position. A test split is not ``labelled``. ``questions`` are ids of the
    questions of which the examples are ``parts`` (see ``Example.part``); None if each is a whole question.
    """

    def __init__(
        self,
        ids: Sequence[str],
        strata: Sequence[str],
        make: Callable[[int], Example],
        labelled: bool = True,
        questions: Sequence[str] | None = None,
        parts: Sequence[str] | None = None,
    ):
        self.ids, self.strata, self._make, self.labelled = ids, strata, make, labelled
        self.questions: Sequence[str] = ids if questions is None else questions
        self.parts: Sequence[str] = [""] * len(ids) if parts is None else parts
        if not len(ids) == len(strata) == len(self.questions) == len(self.parts):
            raise ValueError(
                f"{len(ids)} ids, {len(strata)} strata, {len(self.questions)} questions and "
                f"{len(self.parts)} parts; expected one of each for every example"
            )

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """Wraps examples that exist already."""
        if isinstance(examples, Examples):
            return examples
        return cls(
            [e.id for e in examples], [e.stratum for e in examples], examples.__getitem__,
            any(e.label is not None for e in examples), [e.question or e.id for e in examples],
            [e.part for e in examples],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.at(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._make(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self._make(index) for index in range(len(self)))

    def at(self, positions: Sequence[int]) -> "Examples":
        """Selects the examples at these positions, in this order."""
        return Examples(
            [self.ids[i] for i in positions], [self.strata[i] for i in positions],
            lambda i: self._make(positions[i]), self.labelled,
            [self.questions[i] for i in positions], [self.parts[i] for i in positions],
        )  # fmt: skip

    def mapped(self, change: Callable[[Example], Example]) -> "Examples":
        """Makes each example as ``change`` alters it; ids, strata and parts stay."""
        return Examples(
            self.ids, self.strata, lambda i: change(self._make(i)), self.labelled, self.questions, self.parts
        )


def spread(number: int, most: int) -> list[int]:
    """Draws ``most`` of ``number`` positions, in order; all where there are no more.

    The draw is the same everywhere. It has no period: every n-th example of VCR can be an answer, and none a
    rationale.
    """
    return sorted(random.Random(0).sample(range(number), min(number, most)))


def path_names(paths: Sequence[Path]) -> list[str]:
    """Gives each path a name that no other of these paths has, and that is the same on every machine.

    It is the file's name if no other path has it, else preceded by as many of the last folders as are needed
    to tell the paths apart: "clipA/000.jpg" and "clipB/000.jpg".
    """
    same: dict[str, set[Path]] = {}
    for path in paths:
        same.setdefault(path.name, set()).add(path)
    names: dict[Path, str] = {}
    for name, group in same.items():
        length = 1
        while len({path.parts[-length:] for path in group}) < len(group):
            length += 1
        names |= {path: "/".join(path.parts[-length:]) if length > 1 else name for path in group}
    return [names[path] for path in paths]


def divide_by_picture(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Divides examples into those to learn from and those of about ``share`` of the pictures, set aside.

    The division is the same for every seed and on every machine: a hash of the picture's name
    (``path_names``) decides, or of its folder's name if pictures lie in ``MANY_FOLDERS`` or more. (VCR has a
    folder for each film clip, and a clip's pictures look alike.) Every example is made once to get its
    picture.
    """
    pictures = [example.image for example in examples]
    by_folder = len({picture.parent for picture in pictures}) >= MANY_FOLDERS
    names = path_names([picture.parent for picture in pictures] if by_folder else pictures)
    aside = {
        name for name in set(names) if int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 < share
    }
    parts = [[i for i, name in enumerate(names) if (name in aside) == side] for side in (False, True)]
    if not all(parts):
        raise ValueError(
            f"held_out={share}: {len(aside)} of {len(set(names))} pictures (or folders of them) are set "
            "aside, which leaves one part without examples"
        )
    return examples.at(parts[0]), examples.at(parts[1])


def _rank(seed: int, question: str) -> bytes:
    """Returns the sort key of a question in a seed's order; the parts of one question share it."""
    return hashlib.sha256(f"{seed}:{question}".encode()).digest()


def low_shot(examples: Sequence[Example], shots: int | float, seed: int) -> Examples:
    """Selects a seeded subset: ``shots`` per stratum (int), a fraction of each (float), or all (0).

    All examples of a stratum with fewer are taken, with a warning: VQA's rare question types must not limit
    the number of the others.

    Subsets of one seed are nested: a larger one contains every smaller one, and adding examples
    to the data set never reorders the others (each is ranked by a hash of seed and question). No example
    needs to be made for the choice.

    Raises:
        ValueError: ``shots`` is out of range.
    """
    examples = Examples.of(examples)
    if shots == 0:
        return examples
    fraction = isinstance(shots, float)
    if (fraction and not 0 < shots <= 1) or (not fraction and shots < 1):
        raise ValueError(
            f"shots={shots!r}: expected an integer >= 1 (per stratum), a fraction in (0, 1], or 0 for all"
        )
    strata: dict[str, list[int]] = {}
    for position, stratum in enumerate(examples.strata):
        strata.setdefault(stratum, []).append(position)
    chosen: list[int] = []
    short: list[str] = []
    for stratum, members in strata.items():
        count = max(1, round(shots * len(members))) if fraction else int(shots)
        if count > len(members):
            short.append(f"{stratum!r} ({len(members)})")
        chosen += sorted(members, key=lambda i: _rank(seed, examples.questions[i]))[:count]
    if short:
        log.warning("shots=%s: all there are of %s, which have fewer", shots, ", ".join(short))
    return examples.at(sorted(chosen))


def save_manifest(path: Path, examples: Sequence[Example], shots: int | float, seed: int) -> None:
    """Writes which examples a run used, so that another run can use the same."""
    write_json(path, {"shots": shots, "seed": seed, "ids": list(Examples.of(examples).ids)})
