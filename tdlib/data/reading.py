"""Shared by the readers of all tasks: checks of fields and boxes, side files, and the readers' base class."""

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tdlib.data.examples import Box, DataError, Example, Examples, TextPart
from tdlib.data.json_files import Records
from tdlib.data.pictures import open_picture, read_header


def need(record: dict[str, Any], key: str, kind: type, where: str, what: str) -> Any:
    """Returns a field of a record; raises DataError if it is missing or of another type."""
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


class Located(Protocol):
    """The records of one file, each with its line or entry: ``Records`` or ``Rows``."""

    what: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str: ...


class Rows(list[dict[str, str]]):
    """The rows of a CSV file, each with the line of the file in which it ends."""

    def __init__(self, path: Path, what: str, columns: Sequence[str]):
        rows = dict(csv_rows(path, what, columns))
        super().__init__(rows.values())
        self.path, self.what, self._lines = path, what, list(rows)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"


def csv_rows(path: Path, what: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterates over the rows of a CSV file that must have these columns, with the line in which each ends."""
    csv.field_size_limit(2**24)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or []
            twice = sorted({name for name in names if list(names).count(name) > 1})
            if twice:
                raise DataError(f"{path}:1: column {twice[0]!r} stands there twice; remove one")
            if lacking := sorted({*columns} - {*names}):
                raise DataError(f"{path}:1: no column {', '.join(lacking)}; is this a {what} file?")
            for row in rows:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{rows.line_num}: more or fewer columns than the header")
                yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV in UTF-8 ({error}); copy it again") from None


def index_records(
    records: Located, key: str, kind: type[Identifier],
    check: Callable[[dict[str, Any], Identifier, str], Checked],
    report: Callable[[str], None] | None = None,
) -> dict[Identifier, tuple[int, Checked]]:  # fmt: skip
    """Indexes the records of one file by id: the position of each, and the result of ``check`` for it.

    The id is a ``kind`` under ``key``, which no two records may share. ``check`` gets a record, its id and
    its place in the file, and raises DataError for a bad one. Bad records are left out and passed to
    ``report``; without it the first error is raised.
    """
    index: dict[Identifier, tuple[int, Checked]] = {}
    for number in range(len(records)):
        try:
            record, where = records[number], records.where(number)
            identifier = need(record, key, kind, where, records.what)
            if identifier in index:
                other = records.where(index[identifier][0])
                raise DataError(f"{where}: {key} {identifier!r} already stands in {other}; remove one")
            index[identifier] = number, check(record, identifier, where)
        except DataError as error:
            if report is None:
                raise
            report(str(error))
    return index


def check_answers(
    path: Path,
    records: Located,
    key: str,
    wanted: Collection[Identifier],
    fault: Callable[[dict[str, Any]], str],
) -> list[str]:
    """Lists all faults of a file for a benchmark, which has one record for each of the ``wanted`` ids.

    ``fault`` says what is wrong with a record but for its id; "" if nothing.
    """
    problems: list[str] = []
    wanted = set(wanted)

    def check(record: dict[str, Any], identifier: Identifier, where: str) -> None:
        if wrong := fault(record):
            problems.append(f"{where} ({identifier}): {wrong}")
        if identifier not in wanted:
            problems.append(f"{where}: {identifier!r} is not in the split")

    kind = type(next(iter(wanted)))
    seen = index_records(records, key, kind, check, problems.append)
    if missing := sorted(wanted - seen.keys()):
        problems.append(f"{path}: {len(missing)} of {len(wanted)} are missing (first: {missing[0]!r})")
    return problems


def all_labelled(path: Path, records: Located, labels: dict[str, tuple[int, Any]], key: str) -> bool:
    """True if all records of an index have labels, False if none has; DataError for a mix or no records."""
    if not labels:
        raise DataError(f"{path}: the file has no examples; copy it again")
    lacking = [name for name, (_, label) in labels.items() if label is None]
    if 0 < len(lacking) < len(labels):
        raise DataError(
            f"{records.where(labels[lacking[0]][0])} ({lacking[0]}): no {key}, as {len(lacking)} of "
            f"{len(labels)} lines; expected all (train, val) or none (test) to have one"
        )
    return not lacking


def is_number(value: Any) -> bool:
    """Returns True for a JSON number of a sane size; False for NaN, and for what floats cannot hold."""
    return type(value) in (int, float) and abs(value) < 1e9


def look_normalised(coordinates: Sequence[float], width: float, height: float) -> bool:
    """True if coordinates in pixels would all lie in the first pixel of a picture: they are shares of it.

    The same slip puts every object into one corner without any box leaving the picture.
    """
    return min(width, height) >= 16 and 0 < max(coordinates, default=0.0) <= 1.01


SLACK = 0.01  # detectors round outwards; boxes may leave the picture by this share of its size


def normalise_boxes(boxes: Any, width: float, height: float, where: str) -> tuple[Box, ...]:
    """Converts boxes [x1, y1, x2, y2, ...] in pixels to xyxy in [0, 1]; checks them by the picture's size."""
    if not isinstance(boxes, list):
        raise DataError(f"{where}: boxes is {type(boxes).__name__}, expected a list of [x1, y1, x2, y2]")
    scale = (width, height, width, height)
    normalised = []
    for index, box in enumerate(boxes):
        if not (isinstance(box, list) and len(box) >= 4 and all(is_number(value) for value in box[:4])):
            raise DataError(f"{where}: box {index} is {box!r}, expected [x1, y1, x2, y2] in pixels")
        left, top, right, bottom = (value / size for value, size in zip(box, scale, strict=False))
        if not (-SLACK <= left <= right <= 1 + SLACK and -SLACK <= top <= bottom <= 1 + SLACK):
            raise DataError(
                f"{where}: box {index} is {box[:4]}, outside the picture of {width} x {height} pixels "
                "or with its corners swapped; copy the file again or correct it"
            )
        left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in (left, top, right, bottom))
        normalised.append((left, top, right, bottom))
    if look_normalised([value for box in boxes for value in box[:4]], width, height):
        raise DataError(
            f"{where}: all boxes lie within one pixel of a picture of {width} x {height}, so they are "
            "normalised already; multiply them by its width and height"
        )
    return tuple(normalised)


class SideFile:
    """A file beside a split with one line per example.

    A line is looked up at the example's position, and only if another example's line is there by id: the
    generator writes both files in one order, and an index of all ids takes time and memory.
    """

    def __init__(self, path: Path, key: str, what: str):
        self.key = key
        self.records = Records.lines(path, what) if path.is_file() else None
        self._places: dict[Any, tuple[int, None]] | None = None

    def find(self, identifier: Any, position: int) -> tuple[dict[str, Any], str] | None:
        """Returns the line of an example and its place in the file; None if there is none."""
        if self.records is None:
            return None
        if position < len(self.records):
            record = self.records[position]
            if record.get(self.key) == identifier:
                return record, self.records.where(position)
        if self._places is None:
            self._places = index_records(self.records, self.key, type(identifier), lambda *_: None)
        index, _ = self._places.get(identifier, (-1, None))
        return (self.records[index], self.records.where(index)) if index >= 0 else None


def relevant_part(text: str, marks: tuple[dict[str, Any], str] | None) -> TextPart:
    """Adds to a text the character spans that a line of a relevance file marks."""
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
    """Normalises the boxes that a relevance line marks, in pixels of the upright picture."""
    if marks is None or not marks[0].get("boxes"):
        return ()
    width, height = read_header(image).upright
    return normalise_boxes(marks[0]["boxes"], width, height, marks[1])


def missing_file(path: Path, pattern: str, expected: str) -> DataError:
    """Makes the error for a split without its file; it lists the files by ``pattern`` that are there."""
    there = sorted(other.name for other in path.parent.glob(pattern)) if path.parent.is_dir() else []
    return DataError(
        f"{path}: no such file; {expected} (found here: {', '.join(there) or 'nothing'}); check data_dir and "
        "the split's name"
    )


class Reader(ABC):
    """One split of one data set: indexes its files and makes examples from its records.

    Opening reads every record once, checks ids, strata and labels, and keeps positions, ids and strata. The
    rest of an example is read and checked when it is accessed.
    """

    what: str
    path: Path  # the file that lists the examples

    @abstractmethod
    def open(self, report: Callable[[str], None] | None = None) -> Examples:
        """Opens the split; its examples are made when they are accessed.

        Args:
            report: is called with each problem of a single record, which is then left out; without it the
                first problem is raised. (It serves to check a data set, not to train.)

        Raises:
            DataError: a file is not as published; the message names file and line.
        """

    def read(self) -> list[Example]:
        """Makes, and so checks, all examples, in the order of the file."""
        return list(self.open())

    def examine(self, decode: bool = False) -> "Examined":
        """Reads the whole split and lists all its problems, one message per example at most.

        These are errors that would stop a run, and doubts about examples that it would read (``_doubt``).
        With ``decode`` every picture is decoded too, which is slow.
        """
        problems: list[str] = []
        try:
            examples = self.open(problems.append)
        except DataError as error:
            return Examined(0, [*problems, str(error)], set(), set())
        pictures: set[Path] = set()
        for index in range(len(examples)):
            message = ""
            try:
                example = examples[index]
                known = example.image in pictures
                pictures.add(example.image)
                message = self._doubt(example)
                if decode and not known:
                    read_header(example.image)
                    open_picture(example.image)
            except DataError as error:
                message = str(error)
            # The parts of one question follow each other and share their error, which is listed once.
            if message and message not in problems[-1:]:
                problems.append(message)
        return Examined(len(examples), problems, set(examples.questions), pictures)

    def _doubt(self, example: Example) -> str:
        """Says why an example is useless or likely to be damaged; "" if nothing is wrong with it."""
        seen: dict[Any, int] = {}
        for number, choice in enumerate(example.choices):
            # Two people may bear the same name: the texts are equal then, but not what they refer to.
            first = seen.setdefault((choice.text, choice.references), number)
            if first != number:
                return (
                    f"{self.path} ({example.question or example.id}): choices {first} and {number} are both "
                    f"{choice.text!r}; of equal choices none can be right alone"
                )
        return ""


@dataclass(frozen=True)
class Examined:
    """Findings of ``Reader.examine`` about one split."""

    examples: int
    problems: list[str]
    questions: set[str]  # ids
    pictures: set[Path]
