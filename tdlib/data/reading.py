"""Large JSON files as sequences of records: only byte positions are held, records are parsed when asked for.

Shared by the readers of all tasks, with their common checks and their common base class.
"""

import codecs
import json
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tdlib.data.examples import Box, DataError, Example, Examples, TextPart
from tdlib.data.pictures import check_picture, read_header

_CHUNK = 2**22
_SPACE = " \t\n\r"
_MARK = codecs.BOM_UTF8  # some editors and spreadsheets put these three bytes before the text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of two members of one name without a word."""
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return members


_decode_json = json.JSONDecoder(object_pairs_hook=_unique).decode


def parse_json(raw: bytes) -> Any:
    """JSON text in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8 or not JSON, an object names a member twice, or a string holds half
            of a surrogate pair, which is no text and would fail later, in a tokenizer.
        RecursionError: it is nested too deeply.
    """
    value = _decode_json(raw.removeprefix(_MARK).decode("utf-8"))
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path, where: str = "", remedy: str = "copy it again") -> Any:
    """The value of a small JSON file.

    Raises:
        DataError: the file is missing, or is not JSON in UTF-8.
    """
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where or path}: not readable as JSON in UTF-8 ({error}); {remedy}") from None


class Records(Sequence[dict[str, Any]]):
    """The objects of one JSON file: lines of a JSONL file, or entries of an array.

    Args:
        path: the file; it must not change while it is in use.
        spans: (records, 2), first byte and end of each record.
        places: what to call each record in messages, in front of its number (from 1).
        numbers: line numbers, where they differ from the position + 1.
        what: name of the data set, for messages.
    """

    def __init__(
        self, path: Path, spans: np.ndarray, places: str, numbers: np.ndarray | None = None, what: str = ""
    ):
        self.path, self.spans, self._places, self._numbers, self.what = path, spans, places, numbers, what
        self._file = path.open("rb")  # read by position; workers of a loader may share it
        weakref.finalize(self, self._file.close)

    @classmethod
    def lines(cls, path: Path, what: str) -> "Records":
        """The non-empty lines of a JSONL file.

        Raises:
            DataError: there is no such file.
        """
        _need_file(path, "a JSONL file with one example per line")
        starts, ends, base = [np.zeros(1, np.int64)], [], 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                breaks = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10).astype(np.int64) + base
                starts.append(breaks + 1)
                ends.append(breaks)
                base += len(chunk)
        spans = np.stack([np.concatenate(starts), np.concatenate([*ends, [base]])], axis=1)
        spans[0, 0] = _start_of_text(path)
        keep = spans[:, 1] > spans[:, 0]
        with path.open("rb") as file:
            for index in np.flatnonzero(keep & (spans[:, 1] - spans[:, 0] < 16)):
                file.seek(spans[index, 0])
                keep[index] = bool(file.read(spans[index, 1] - spans[index, 0]).strip())
        numbers = None if keep[:-1].all() else np.flatnonzero(keep) + 1
        return cls(path, spans[keep], ":", numbers, what)

    @classmethod
    def entries(cls, path: Path, key: str | None, what: str) -> "Records":
        """The objects of the array ``key`` of a JSON object, or of a top-level array (None).

        Raises:
            DataError: there is no such file or array, or the file is truncated or no JSON.
        """
        _need_file(path, f"a JSON file of {what}")
        spans = np.array(list(_entry_spans(path, key, what)), dtype=np.int64).reshape(-1, 2)
        return cls(path, spans, f", entry of {key!r} " if key else ", entry ", what=what)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """File and line (or entry) of a record, counted from 1."""
        number = index + 1 if self._numbers is None else int(self._numbers[index])
        return f"{self.path}{self._places}{number}"

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        """One record.

        Raises:
            DataError: it is not valid JSON in UTF-8, or no object.
        """
        start, end = self.spans[index]
        try:
            raw = os.pread(self._file.fileno(), int(end - start), int(start))
            record = parse_json(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.where(index)}: not valid JSON in UTF-8 ({error}); "
                "the file may be truncated or damaged, copy it again"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(index)}: expected a JSON object, found {type(record).__name__}; "
                f"is this a {self.what} file?"
            )
        return record


def _need_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {expected}")


def _start_of_text(path: Path) -> int:
    """The number of bytes before the text: 3 with a byte order mark, else 0."""
    with path.open("rb") as file:
        return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


def _entry_spans(path: Path, key: str | None, what: str) -> Iterator[tuple[int, int]]:
    """Byte spans of an array's entries, read in pieces so that the file is never whole in memory."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    with path.open("rb") as file:
        text, position = "", 0
        base = file.seek(_start_of_text(path))  # the byte position of text[0]

        def bad(reason: str) -> DataError:
            return DataError(
                f"{path}: {reason} (near byte {base + len(text[:position].encode())}); "
                f"is this a {what} file? It may be truncated or damaged: copy it again"
            )

        def more() -> bool:
            """Drops what was read and appends the next piece; False at the end of the file."""
            nonlocal text, position, base
            try:
                piece = file.read(max(_CHUNK, len(text) - position))  # twice as much for what does not fit
                added = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise bad(f"not UTF-8 ({error})") from None
            base += len(text[:position].encode())
            text, position = text[position:] + added, 0
            return bool(piece)

        def peek() -> str:
            nonlocal position
            while True:
                while position < len(text) and text[position] in _SPACE:
                    position += 1
                if position < len(text):
                    return text[position]
                if not more():
                    return ""

        def take(expected: str) -> str:
            nonlocal position
            found = peek()
            if not found or found not in expected:
                raise bad(
                    f"expected one of {' '.join(expected)}, found {found!r}" if found else "it ends early"
                )
            position += 1
            return found

        def value() -> tuple[Any, int]:
            """The next value, and where it starts in ``text``."""
            nonlocal position
            peek()
            while True:
                try:
                    found, end = scan(text, position)
                except (ValueError, RecursionError) as error:
                    if isinstance(error, RecursionError) or not more():
                        raise bad(f"not valid JSON ({error})") from None
                    continue
                length = end - position
                if len(text) - end < 3 and more():  # a number may go on, as the 1 of 1e+5
                    continue
                start, position = position, position + length
                return found, start

        def member() -> str:
            """The name of an object's next member."""
            name, _ = value()
            if not isinstance(name, str):
                raise bad(f"not valid JSON ({name!r} as a name)")
            take(":")
            return name

        if key is not None:
            take("{")
            while member() != key:
                value()
                if take(",}") == "}":
                    raise bad(f"there is no {key!r}")
        take("[")
        counted, place = base, 0  # bytes before text[place], counted up to there
        more_to_come = peek() != "]"
        if not more_to_come:
            take("]")
        while more_to_come:
            peek()
            before = base
            _, start = value()
            if base != before or counted < base:
                counted, place = base, 0
            counted += len(text[place:start].encode())
            length = len(text[start:position].encode())
            yield counted, counted + length
            counted, place = counted + length, position
            more_to_come = take(",]") == ","
        while key is not None and take(",}") == ",":
            if member() == key:
                raise bad(f"there are two {key!r}, of which only one would be read")
            value()
        if behind := peek():
            raise bad(f"found {behind!r} behind the end")


def need(record: dict[str, Any], key: str, kind: type, where: str, what: str) -> Any:
    """A field of a record.

    Raises:
        DataError: it is missing or of another type.
    """
    if key not in record:
        raise DataError(f"{where}: field {key!r} is missing; is this a {what} file?")
    value = record[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(
            f"{where}: field {key!r} is {type(value).__name__}, expected {kind.__name__}; "
            f"is this a {what} file?"
        )
    return value


Identifier = TypeVar("Identifier", str, int)
Checked = TypeVar("Checked")


def index_records(
    records: Sequence[dict[str, Any]],
    where_of: Callable[[int], str],
    key: str,
    kind: type[Identifier],
    what: str,
    check: Callable[[dict[str, Any], Identifier, str], Checked],
    report: Callable[[str], None] | None,
) -> tuple[dict[Identifier, int], list[Checked]]:
    """The positions of records by their ids, and what ``check`` returns for each of them.

    Args:
        records: of one file.
        where_of: file and line (or entry) of a record.
        key: of the id, which no two records may share; it is a ``kind``.
        kind: see ``key``.
        what: name of the data set, for messages.
        check: of a record, its id and where it stands; raises DataError for a bad one.
        report: is told of bad records, which are left out.

    Raises:
        DataError: a record is bad, and there is no ``report``.
    """
    positions: dict[Identifier, int] = {}
    found: list[Checked] = []
    for number in range(len(records)):
        try:
            record, where = records[number], where_of(number)
            identifier = need(record, key, kind, where, what)
            if identifier in positions:
                other = where_of(positions[identifier])
                raise DataError(f"{where}: {key} {identifier!r} already stands in {other}; remove one")
            checked = check(record, identifier, where)
        except DataError as error:
            if report is None:
                raise
            report(str(error))
            continue
        positions[identifier] = number
        found.append(checked)
    return positions, found


def is_number(value: Any) -> bool:
    """Whether this is a JSON number of a sane size; false for NaN, and for what floats cannot hold."""
    return type(value) in (int, float) and abs(value) < 1e9


_SLACK = 0.01  # detectors round outwards; boxes may leave the picture by this share of its size


def normalise_boxes(boxes: Any, width: float, height: float, where: str) -> tuple[Box, ...]:
    """Boxes [x1, y1, x2, y2, ...] in pixels as xyxy in [0, 1], checked against the picture's size."""
    if not isinstance(boxes, list):
        raise DataError(f"{where}: boxes is {type(boxes).__name__}, expected a list of [x1, y1, x2, y2]")
    scale = (width, height, width, height)
    normalised = []
    for index, box in enumerate(boxes):
        if not (isinstance(box, list) and len(box) >= 4 and all(is_number(value) for value in box[:4])):
            raise DataError(f"{where}: box {index} is {box!r}, expected [x1, y1, x2, y2] in pixels")
        left, top, right, bottom = (value / size for value, size in zip(box, scale, strict=False))
        if not (-_SLACK <= left <= right <= 1 + _SLACK and -_SLACK <= top <= bottom <= 1 + _SLACK):
            raise DataError(
                f"{where}: box {index} is {box[:4]}, outside the picture of {width} x {height} pixels "
                "or with its corners swapped; copy the file again or correct it"
            )
        left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in (left, top, right, bottom))
        normalised.append((left, top, right, bottom))
    return tuple(normalised)


class SideFile:
    """A file beside a split with one line per example, found by position if the order agrees, else by id."""

    def __init__(self, path: Path, key: str, what: str):
        self.key, self.what = key, what
        self.records = Records.lines(path, what) if path.is_file() else None
        self._places: dict[Any, int] | None = None

    def find(self, identifier: Any, position: int) -> tuple[dict[str, Any], str] | None:
        """The line of an example and where it stands; None where there is none."""
        if self.records is None:
            return None
        if position < len(self.records):
            record = self.records[position]
            if record.get(self.key) == identifier:
                return record, self.records.where(position)
        if self._places is None:
            self._places = {}
            for index, record in enumerate(self.records):
                where = self.records.where(index)
                self._places[need(record, self.key, type(identifier), where, self.what)] = index
        index = self._places.get(identifier, -1)
        return (self.records[index], self.records.where(index)) if index >= 0 else None


def relevant_part(text: str, marks: tuple[dict[str, Any], str] | None) -> TextPart:
    """A text with the character spans that a line of a relevance file marks.

    Raises:
        DataError: the spans are no list of [start, end] inside the text.
    """
    if marks is None:
        return TextPart(text)
    spans = marks[0].get("spans", [])
    good = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
        and 0 <= span[0] < span[1] <= len(text)
        for span in spans
    )  # fmt: skip
    if not good:
        raise DataError(
            f"{marks[1]}: spans is {spans!r}, expected a list of [start, end] inside a text of "
            f"{len(text)} characters"
        )
    return TextPart(text, relevant=tuple((start, end) for start, end in spans))


def picture_boxes(marks: tuple[dict[str, Any], str] | None, image: Path) -> tuple[Box, ...]:
    """The boxes that a relevance line marks in pixels of the upright picture, normalised by its size."""
    if marks is None or not marks[0].get("boxes"):
        return ()
    width, height = read_header(image).upright
    return normalise_boxes(marks[0]["boxes"], width, height, marks[1])


class Reader(ABC):
    """One split of one data set: indexes its files, and makes examples of its records.

    Opening reads every record once (their ids, strata and labels are checked) and keeps positions,
    ids and strata; an example itself is made, and checked, when it is asked for.
    """

    what: str

    @abstractmethod
    def open(self, report: Callable[[str], None] | None = None) -> Examples:
        """The split's examples, made when asked for.

        Args:
            report: is told what is wrong with single records, which are then left out; without it
                the first problem is raised. (For checking a data set, not for training.)

        Raises:
            DataError: a file is not as published; says which line of which file.
        """

    def read(self) -> list[Example]:
        """All examples, each checked, in file order.

        Raises:
            DataError: a file is not as published; says which line of which file.
        """
        return list(self.open())

    def problems(self, decode: bool = False) -> Iterator[str]:
        """Everything that is wrong with the split, one message per example at most.

        Args:
            decode: also decode every picture (slow).
        """
        found: list[str] = []
        try:
            examples = self.open(found.append)
        except DataError as error:
            yield from [*found, str(error)]
            return
        yield from found
        seen: set[Path] = set()
        last = ""
        for index in range(len(examples)):
            try:
                image = examples[index].image
                if decode and image not in seen:
                    seen.add(image)
                    check_picture(image, decode=True)
            except DataError as error:
                if str(error) != last:  # the parts of one question, which stand together, fail alike
                    yield str(error)
                last = str(error)
