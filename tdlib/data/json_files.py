"""Reads large JSON files as sequences of records: only byte positions are in memory, parsing is on access."""

import codecs
import json
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdlib.data.examples import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_scan_json = json.JSONDecoder().raw_decode
_MARK = codecs.BOM_UTF8  # some editors and spreadsheets write these three bytes before the text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; refuses two members of one name, of which Python would silently keep the last."""
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return members


_decode_json = json.JSONDecoder(object_pairs_hook=_unique).decode


def parse_json(raw: bytes) -> Any:
    """Parses JSON text in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8 or not JSON, an object names a member twice, or a string holds half
            of a surrogate pair, which is no text and would fail later, in a tokenizer.
        RecursionError: it is nested too deeply.
    """
    value = _decode_json(raw.removeprefix(_MARK).decode("utf-8"))
    if b"\\u" in raw:  # only an escape can hold half of a surrogate pair; encoding finds it
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path, where: str = "", remedy: str = "copy it again") -> Any:
    """Reads a small JSON file; raises DataError if it is missing or not JSON in UTF-8."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where or path}: not readable as JSON in UTF-8 ({error}); {remedy}") from None


class Records(Sequence[dict[str, Any]]):
    """The objects of one JSON file: lines of a JSONL file, or entries of an array.

    The file must not change while it is in use. ``spans`` (records, 2) are the first byte and the end of each
    record. Messages name a record by the path, ``places`` and its number.
    """

    def __init__(
        self, path: Path, spans: Sequence[tuple[int, int]], places: str, numbers: Sequence[int], what: str
    ):
        self.path, self._places, self.what = path, places, what
        # As arrays, because lists of so many numbers are large.
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
        self._numbers = np.array(numbers, dtype=np.int64)
        self._file = path.open("rb")  # read by position; workers of a loader may share it
        weakref.finalize(self, self._file.close)

    @classmethod
    def lines(cls, path: Path, what: str) -> "Records":
        """Finds the lines of a JSONL file that hold more than white space."""
        _need_file(path, "a JSONL file with one example per line")
        spans, numbers, start = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.removeprefix(_MARK).strip():
                    spans.append((start, start + len(line)))
                    numbers.append(number)
                start += len(line)
        return cls(path, spans, ":", numbers, what)

    @classmethod
    def entries(cls, path: Path, key: str | None, what: str) -> "Records":
        """Finds the entries of the array ``key`` of a JSON object, or of a top-level array (None).

        The file is in memory meanwhile, as text without its objects, which would take ten times as much.

        Raises:
            DataError: there is no such file or array, or the file is truncated or no JSON.
        """
        _need_file(path, f"a JSON file of {what}")
        # One character per byte, so that places are those of bytes. Nothing but ASCII gives JSON its form,
        # and a record is decoded when it is accessed.
        text = path.read_bytes().decode("latin-1")
        try:
            spans = list(_entry_spans(text, key))
        except ValueError as error:
            raise DataError(
                f"{path}: {error}; is this a {what} file? It may be truncated or damaged: copy it again"
            ) from None
        places = f", entry of {key!r} " if key else ", entry "
        return cls(path, spans, places, range(1, len(spans) + 1), what)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """Names the file and the line (or entry) of a record, counted from 1."""
        return f"{self.path}{self._places}{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        """Parses one record; raises DataError if it is not valid JSON in UTF-8, or no object."""
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


# First bytes of files that are no text in UTF-8, with what they are and the remedy.
_FOREIGN = {
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    codecs.BOM_UTF16_LE: "in UTF-16, not UTF-8: save it again",
    codecs.BOM_UTF16_BE: "in UTF-16, not UTF-8: save it again",
}


def _need_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {expected}")
    with path.open("rb") as file:
        start = file.read(4)
    for mark, remedy in _FOREIGN.items():
        if start.startswith(mark):
            raise DataError(f"{path}: expected {expected}, but the file is {remedy}")


class _Scanner:
    """Reads JSON text value by value; ``place`` is the next character that is not white space."""

    def __init__(self, text: str):
        self.text = text
        self._move(len(_MARK) if text.startswith(_MARK.decode("latin-1")) else 0)

    def _move(self, place: int) -> None:
        self.place = _SPACE.match(self.text, place).end()  # type: ignore[union-attr]  # it may be empty

    def take(self, expected: str) -> str:
        """Reads one of the expected characters."""
        character = self.text[self.place : self.place + 1]
        if not character:
            raise ValueError("it ends early")
        if character not in expected:
            raise ValueError(f"expected one of {' '.join(expected)}, found {character!r} (byte {self.place})")
        self._move(self.place + 1)
        return character

    def value(self) -> tuple[Any, int]:
        """Reads a value; returns it and its end."""
        try:
            value, end = _scan_json(self.text, self.place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from None
        self._move(end)
        return value, end

    def member(self) -> str:
        """Reads the name of an object's next member."""
        name, _ = self.value()
        if not isinstance(name, str):
            raise ValueError(f"not valid JSON ({name!r} as a name)")
        self.take(":")
        return name


def _entry_spans(text: str, key: str | None) -> Iterator[tuple[int, int]]:
    """Start and end of each entry of an array; ``key`` as in ``Records.entries``."""
    scanner = _Scanner(text)
    if key is not None:
        scanner.take("{")
        while scanner.member() != key:
            scanner.value()
            if scanner.take(",}") == "}":
                raise ValueError(f"there is no {key!r}")
    scanner.take("[")
    if text.startswith("]", scanner.place):
        scanner.take("]")
    else:
        more_to_come = True
        while more_to_come:
            start = scanner.place
            _, end = scanner.value()
            yield start, end
            more_to_come = scanner.take(",]") == ","
    while key is not None and scanner.take(",}") == ",":
        if scanner.member() == key:
            raise ValueError(f"there are two {key!r}, of which only one would be read")
        scanner.value()
    if scanner.place < len(text):
        raise ValueError(f"found {text[scanner.place]!r} behind the end")
