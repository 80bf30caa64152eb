"""Reads Visual Commonsense Reasoning from its official files (Zellers et al. 2019).

Reads ``{split}.jsonl`` and ``vcr1images/`` (pictures and metadata JSON); renders references as
text. Also reads the MiniWorld's side files if they lie beside a split: ``*.relevance.jsonl`` (token
indices and boxes that decide the answer) and ``*.types.jsonl`` (question types).
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdlib.data.examples import Box, DataError, Example, Examples, Reference, Span, TextPart, join_parts
from tdlib.data.json_files import Records, read_json
from tdlib.data.pictures import PictureHeader, read_header, upright_boxes
from tdlib.data.reading import (
    Reader,
    SideFile,
    all_labelled,
    index_records,
    is_number,
    missing_file,
    need,
    normalise_boxes,
)
from tdlib.data.vcr_shifts import MASK, MASKED_TAG

# The gender-neutral names of the authors' baseline (r2c, dataloaders/vcr.py); "Peyton" is there twice.
NEUTRAL_NAMES = [
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall",
    "Peyton", "Skyler", "Frankie", "Pat", "Quinn",
]  # fmt: skip
PERSON_TOKENS = [f"person_{i}" for i in range(81)]  # UNITER's, ids 28,996 onwards in its vocabulary


def neutral_name(index: int, name: str) -> str:
    """r2c: people get a neutral name by their index, other objects their class name."""
    return NEUTRAL_NAMES[index % len(NEUTRAL_NAMES)] if name == "person" else name


def person_token(index: int, name: str) -> str:
    """UNITER: people are special tokens by their index (the last one for all beyond 80)."""
    return PERSON_TOKENS[min(index, len(PERSON_TOKENS) - 1)] if name == "person" else name


# How an object is named, and what stands between the objects of one reference.
REFERENCE_SCHEMES: dict[str, tuple[Callable[[int, str], str], str]] = {
    "names": (neutral_name, " and "),
    "person_tokens": (person_token, " "),
    "category": (lambda _index, name: name, " and "),
}

_NO_SPACE_BEFORE = {".", ",", "?", "!", ":", ";", "'s", "n't", "'re", "'m", "'ll", "'ve", "'d"}
_AFTER_APOSTROPHE = {"s", "t", "re", "m", "ll", "ve", "d"}


def _contracted(tokens: Sequence[Any]) -> set[int]:
    """Finds the tokens that no space precedes as they end a contraction.

    The published files divide "1's" and "doesn't" into [0], "'", "s" and "doesn", "'", "t". CLIP and its kind
    have pieces of their own for "'s" and "'t", which two words "'" and "s" would not become.
    """
    joined: set[int] = set()
    for place in range(1, len(tokens) - 1):
        before, mark, ending = tokens[place - 1 : place + 2]
        word = isinstance(before, list) or (
            isinstance(before, str) and (before == MASK or before[-1:].isalnum())
        )
        if word and mark in ("'", "’") and isinstance(ending, str) and ending.lower() in _AFTER_APOSTROPHE:
            joined |= {place, place + 1}
    return joined


def render(
    tokens: Sequence[str | list[int]],
    names: Sequence[str],
    scheme: str = "names",
    decisive: Sequence[int] = (),
) -> TextPart:
    """Renders a mixed token list as one string, with the characters of references and decisive tokens.

    The names of a token that lists several objects are joined by the scheme's words; each name refers to its
    object and the words between to nothing, as in the code of VL-BERT's and VisualBERT's authors. A masked
    object (10,000 + its index, as in Ye and Kovashka's sets) becomes "[MASK]" and refers to nothing.

    Raises:
        IndexError: an object or a decisive token does not exist.
        TypeError: a token is neither a string nor a list of object indices.
    """
    name_of, between = REFERENCE_SCHEMES[scheme]
    text = ""
    spans: list[Span] = []
    references: list[Reference] = []
    contracted = _contracted(tokens)
    for place, token in enumerate(tokens):
        if isinstance(token, list):
            if not token or not all(type(i) is int for i in token):
                raise TypeError(f"a reference is a non-empty list of integers, found {token!r}")
            for i in token:
                if not 0 <= i % MASKED_TAG < len(names) or not 0 <= i < 2 * MASKED_TAG:
                    raise IndexError(f"reference to object {i}, but the picture has {len(names)} objects")
            words = ["[MASK]" if i >= MASKED_TAG else name_of(i, names[i]) for i in token]
        elif isinstance(token, str):
            words = [token]
        else:
            raise TypeError(f"a token is a string or a list of object indices, found {token!r}")
        word = between.join(words)
        if text and word not in _NO_SPACE_BEFORE and place not in contracted:
            text += " "
        spans.append((len(text), len(text) + len(word)))
        if isinstance(token, list):
            start = len(text)
            for i, name in zip(token, words, strict=True):
                if i < MASKED_TAG:
                    references.append(Reference(start, start + len(name), (i,)))
                start += len(name) + len(between)
        text += word
    for i in decisive:
        if not 0 <= i < len(spans):
            raise IndexError(f"token {i} is marked as decisive, but there are {len(spans)} tokens")
    return TextPart(text, tuple(references), tuple(_merge([spans[i] for i in sorted(decisive)], text)))


def _merge(spans: Sequence[Span], text: str) -> list[Span]:
    """Merges neighbouring spans that have only white space between them."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and not text[merged[-1][1] : start].strip():
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True)
class _Picture:
    """A picture and its metadata file: objects, and the size in pixels that their boxes are measured in."""

    image: Path
    header: PictureHeader
    size: tuple[float, float]
    names: tuple[str, ...]
    boxes: tuple[Box, ...]  # normalised, of the upright picture

    @classmethod
    def read(cls, path: Path, image: Path, where: str) -> "_Picture":
        where = f"{path} (used by {where})"
        metadata = read_json(path, where, "unpack vcr1images.zip again")
        if not isinstance(metadata, dict):
            raise DataError(f"{where}: found {type(metadata).__name__}, expected a VCR metadata object")
        width: Any = metadata.get("width")
        height: Any = metadata.get("height")
        if not (is_number(width) and is_number(height) and min(width, height) > 0):
            raise DataError(
                f"{where}: width={width!r}, height={height!r}, expected positive numbers of pixels"
            )
        names = metadata.get("names")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{where}: names={names!r}, expected a list of class names")
        boxes = normalise_boxes(metadata.get("boxes"), width, height, where)
        if len(names) != len(boxes):
            raise DataError(f"{where}: {len(names)} names but {len(boxes)} boxes; expected one name per box")
        try:
            header = read_header(image)
        except DataError:  # opening the picture will raise this; its metadata can be used without it
            header = PictureHeader(int(width), int(height), 1)
        boxes = upright_boxes(boxes, (width, height), header, where)
        return cls(image, header, (width, height), tuple(names), boxes)

    def places(self, boxes: list[Any], where: str) -> tuple[Box, ...]:
        """Normalises boxes in pixels of the metadata's size, as ``self.boxes`` are."""
        return upright_boxes(normalise_boxes(boxes, *self.size, where), self.size, self.header, where)


def _decisive_tokens(line: tuple[dict[str, Any], str] | None) -> dict[str, list[int]]:
    """Reads the indices of the decisive tokens of each text, by its name, from a line of a relevance file."""
    if line is None:
        return {}
    record, where = line
    texts = {"question": record.get("question", [])}
    for key in ("answer_choices", "rationale_choices"):
        if key in record:
            choices = need(record, key, list, where, "relevance")
            texts |= {f"{key}[{i}]": indices for i, indices in enumerate(choices)}
    for name, indices in texts.items():
        if not (isinstance(indices, list) and all(type(i) is int for i in indices)):
            raise DataError(f"{where}: {name} is {indices!r}, expected a list of token indices")
    return texts


_LABELS = {
    "qa": ("answer_label",), "qar": ("rationale_label",), "both": ("answer_label", "rationale_label")
}  # fmt: skip


class VcrReader(Reader):
    """Reads one split of a VCR folder for one of its subtasks.

    Args:
        folder: holds ``{split}.jsonl`` and ``vcr1images/``.
        split: "train", "val", "test", or the stem of any other file of the same schema
            (for instance "val_shortcut").
        subtask: "qa" (choose the answer), "qar" (choose the rationale given the right answer), or
            "both" (examples of both kinds, for one model, as in UNITER). If labels are missing (test),
            each question gives four examples of rationales, one for each answer, as the leaderboard needs.
        references: how object references become text, a key of ``REFERENCE_SCHEMES``.
        file: another file to read the questions from, in place of ``{split}.jsonl``.

    Ids: ``annot_id``; if a question gives several examples, ``annot_id:r`` is its rationale and
    ``annot_id:r0`` to ``:r3`` are its rationales given each answer.

    Raises:
        DataError: the folder lacks the split or its pictures.
    """

    what = "VCR"

    def __init__(
        self,
        folder: Path | str,
        split: str,
        subtask: str = "qa",
        references: str = "names",
        file: Path | None = None,
    ):
        self.folder = Path(folder)
        self.path = file or self.folder / f"{split}.jsonl"
        self.images = self.folder / "vcr1images"
        if not self.path.is_file():
            raise missing_file(
                self.path, "*.jsonl", "a VCR folder holds {train,val,test}.jsonl and vcr1images"
            )
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such folder; unpack vcr1images.zip there")
        self.subtask, self.references = subtask, references
        self._pictures: dict[tuple[Path, Path], _Picture] = {}  # several questions share a picture

    def open(self, report: Callable[[str], None] | None = None) -> Examples:
        records = Records.lines(self.path, self.what)
        types = self._types()
        label_keys = _LABELS[self.subtask]

        def labels_of(record: dict[str, Any], identifier: str, where: str) -> tuple[str, ...] | None:
            if types and identifier not in types:
                raise DataError(
                    f"{where} ({identifier}): its *.types.jsonl has no line for it; complete that file "
                    "or remove it"
                )
            lacking = [key for key in label_keys if key not in record]
            if 0 < len(lacking) < len(label_keys):
                raise DataError(
                    f"{where} ({identifier}): no {lacking[0]}, but the other label is there; expected "
                    "both (train, val) or none (test)"
                )
            return None if lacking else label_keys

        lines = index_records(records, "annot_id", str, labels_of, report)
        labelled = all_labelled(self.path, records, lines, label_keys[0])
        parts = parts_of(self.subtask, labelled)
        relevance = SideFile(self.folder / f"{self.path.stem}.relevance.jsonl", "annot_id", self.what)
        positions = [position for position, _ in lines.values()]
        questions = [question for question in lines for _ in parts]
        strata = [types.get(question, "all") for question in questions]
        # A part is named only where a question gives several examples.
        named = [*(parts if len(parts) > 1 else ("",))] * len(lines)
        ids = [f"{q}:{part}" if part else q for q, part in zip(questions, named, strict=True)]
        strata = [sys.intern(f"{s} rationale" if part else s) for s, part in zip(strata, named, strict=True)]

        def make(index: int) -> Example:
            position = positions[index // len(parts)]
            record, where = records[position], records.where(position)
            marks = relevance.find(record["annot_id"], position)
            example = self._example(record, where, marks, strata[index], parts[index % len(parts)])
            return replace(example, id=ids[index], part=named[index])

        return Examples(ids, strata, make, labelled, questions, named)

    def _types(self) -> dict[str, str]:
        """Reads question types by annot_id; a reworded split (val_shortcut) has those of its source (val)."""

        def type_of(record: dict[str, Any], _identifier: str, where: str) -> str:
            return sys.intern(need(record, "type", str, where, self.what))

        for stem in (self.path.stem, self.path.stem.split("_")[0]):
            path = self.folder / f"{stem}.types.jsonl"
            if path.is_file():
                types = index_records(Records.lines(path, self.what), "annot_id", str, type_of)
                if types:
                    return {identifier: kind for identifier, (_, kind) in types.items()}
        return {}

    def _file(self, record: dict[str, Any], key: str, where: str) -> Path:
        """Resolves a file of ``vcr1images/`` that a record names."""
        name = need(record, key, str, where, self.what)
        path = self.images / name
        if not os.path.isfile(path):
            raise DataError(
                f"{where}: {key}={name!r}: no such file in {self.images}; unpack vcr1images.zip again"
            )
        return path

    def _picture(self, record: dict[str, Any], where: str) -> _Picture:
        """Reads a record's picture and metadata; checks them against each other and the record's objects."""
        paths = self._file(record, "metadata_fn", where), self._file(record, "img_fn", where)
        if paths not in self._pictures:
            if len(self._pictures) >= 4096:  # bounds memory; questions about one picture follow each other
                self._pictures.clear()
            self._pictures[paths] = _Picture.read(*paths, where)
        picture = self._pictures[paths]
        if list(picture.names) != need(record, "objects", list, where, self.what):
            raise DataError(
                f"{where}: 'objects' differs from the names in {paths[0]}; files of different releases?"
            )
        return picture

    def _example(
        self,
        record: dict[str, Any],
        where: str,
        marks: tuple[dict[str, Any], str] | None,
        stratum: str,
        part: str,
    ) -> Example:
        where = f"{where} ({record['annot_id']})"
        picture = self._picture(record, where)
        decisive = _decisive_tokens(marks)

        def text(name: str, tokens: Any) -> TextPart:
            if not isinstance(tokens, list):
                raise DataError(
                    f"{where}: {name} is {tokens!r}, expected a list of tokens; is this a VCR file?"
                )
            try:
                part = render(tokens, picture.names, self.references, decisive.get(name, []))
            except (IndexError, TypeError) as error:
                raise DataError(f"{where}: {name}: {error}; files of different releases?") from None
            if not part.text.strip():
                raise DataError(f"{where}: {name} is empty; complete it or remove the line")
            return part

        def choices_of(key: str) -> tuple[TextPart, ...]:
            choices = need(record, key, list, where, self.what)
            if len(choices) != 4:
                raise DataError(f"{where}: {key} has {len(choices)} entries, expected 4; is this a VCR file?")
            return tuple(text(f"{key}[{i}]", choice) for i, choice in enumerate(choices))

        def label_of(key: str) -> int | None:
            if key not in record:
                return None
            label = need(record, key, int, where, self.what)
            if not 0 <= label < 4:
                raise DataError(f"{where}: {key}={label}, expected 0 to 3; is this a VCR file?")
            return label

        prompt = text("question", need(record, "question", list, where, self.what))
        choices = choices_of("answer_choices")
        label = label_of("answer_label")
        start = 0
        if part:
            start = len(prompt.text) + 1
            given = int(part[1:]) if part[1:] else label
            if given is None:
                raise DataError(
                    f"{where}: QA->R is conditioned on the right answer, but there is no answer_label"
                )
            prompt, label = join_parts(prompt, choices[given]), label_of("rationale_label")
            choices = choices_of("rationale_choices")
        return Example(
            id=record["annot_id"],
            question=record["annot_id"],
            image=picture.image,
            boxes=picture.boxes,
            names=picture.names,
            prompt=prompt,
            choices=choices,
            label=label,
            stratum=stratum,
            given=start,
            relevant_boxes=picture.places(marks[0].get("boxes", []), marks[1]) if marks else (),
        )


def parts_of(subtask: str, labelled: bool) -> tuple[str, ...]:
    """Lists the parts of one question: "" its answers, "r" its rationales, "rK" those given answer K."""
    rationales = ("r",) if labelled else ("r0", "r1", "r2", "r3")
    return {"qa": ("",), "qar": rationales, "both": ("", *rationales)}[subtask]


REFERRED_OBJECTS = "referred objects"


def with_referred_objects(example: Example) -> Example:
    """Replaces relevant spans and boxes by the boxes of the objects to which the right statement refers.

    This is a proxy for what decides the answer (our reading), and sets ``truth``. VCR's annotators tagged the
    objects of every question and right answer, but nobody has marked which words or which of these objects
    decide. Without a label, or without references, nothing is relevant.
    """
    objects: set[int] = set()
    if example.label is not None:
        references = example.statements()[example.label].references
        objects = {i for reference in references for i in reference.objects}
    return replace(
        example,
        prompt=replace(example.prompt, relevant=()),
        choices=tuple(replace(choice, relevant=()) for choice in example.choices),
        relevant_boxes=tuple(example.boxes[i] for i in sorted(objects)),
        truth=REFERRED_OBJECTS,
    )
