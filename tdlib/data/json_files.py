"""Reads large JSON files as sequences of records: only byte positions are in memory, parsing is on access."""

import codecs
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tdlib.data.examples import DataError

_CHUNK = 2**22
_SPACE = " \t\n\r"
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
    record. Messages name a record by the path, ``places`` and its number from 1; ``numbers`` are line numbers
    if they differ from the position + 1.
    """

    def __init__(
        self, path: Path, spans: np.ndarray, places: str, numbers: np.ndarray | None = None, what: str = ""
    ):
        self.path, self.spans, self._places, self._numbers, self.what = path, spans, places, numbers, what
        self._file = path.open("rb")  # read by position; workers of a loader may share it
        weakref.finalize(self, self._file.close)

    @classmethod
    def lines(cls, path: Path, what: str) -> "Records":
        """Reads the non-empty lines of a JSONL file."""
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
        # A line of white space alone is empty too; longer ones are taken for records without reading them.
        keep = spans[:, 1] > spans[:, 0]
        with path.open("rb") as file:
            for index in np.flatnonzero(keep & (spans[:, 1] - spans[:, 0] < 16)):
                file.seek(spans[index, 0])
                keep[index] = bool(file.read(spans[index, 1] - spans[index, 0]).strip())
        numbers = None if keep[:-1].all() else np.flatnonzero(keep) + 1
        return cls(path, spans[keep], ":", numbers, what)

    @classmethod
    def entries(cls, path: Path, key: str | None, what: str) -> "Records":
        """Reads the objects of the array ``key`` of a JSON object, or of a top-level array (None).

        Raises:
            DataError: there is no such file or array, or the file is truncated or no JSON.
        """
        _need_file(path, f"a JSON file of {what}")
        spans = np.array(list(_entry_spans(path, key, what)), dtype=np.int64).reshape(-1, 2)
        return cls(path, spans, f", entry of {key!r} " if key else ", entry ", what=what)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """Names the file and the line (or entry) of a record, counted from 1."""
        number = index + 1 if self._numbers is None else int(self._numbers[index])
        return f"{self.path}{self._places}{number}"

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


def _start_of_text(path: Path) -> int:
    """Counts the bytes before the text: 3 with a byte order mark, else 0."""
    with path.open("rb") as file:
        return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


class _JsonStream:
    """Reads the JSON text of a file in pieces, so that the file is never in memory as a whole.

    ``text`` is the present piece, ``position`` the next character in it, and ``base`` the byte of the
    file at which ``text`` starts.
    """

    def __init__(self, file: BinaryIO, path: Path, what: str):
        self.file, self.path, self.what = file, path, what
        self.text, self.position = "", 0
        self.base = file.seek(_start_of_text(path))
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode

    def bad(self, reason: str) -> DataError:
        near = self.base + len(self.text[: self.position].encode())
        return DataError(
            f"{self.path}: {reason} (near byte {near}); is this a {self.what} file? It may be truncated or "
            "damaged: copy it again"
        )

    def more(self) -> bool:
        """Drops what was read and appends the next piece; False at the end of the file."""
        try:
            # A value that does not end in the present piece is parsed again with twice as much text.
            piece = self.file.read(max(_CHUNK, len(self.text) - self.position))
            added = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise self.bad(f"not UTF-8 ({error})") from None
        self.base += len(self.text[: self.position].encode())
        self.text, self.position = self.text[self.position :] + added, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def take(self, expected: str) -> str:
        """Reads one of the expected characters."""
        character = self.peek()
        if not character or character not in expected:
            wanted = " ".join(expected)
            raise self.bad(f"expected one of {wanted}, found {character!r}" if character else "it ends early")
        self.position += 1
        return character

    def value(self) -> tuple[Any, int]:
        """Reads the next value; returns it and where it starts in ``text``."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self.more():
                    raise self.bad(f"not valid JSON ({error})") from None
                continue
            length = end - self.position
            if len(self.text) - end < 3 and self.more():  # a number may continue, as the 1 of 1e+5
                continue
            start, self.position = self.position, self.position + length
            return value, start

    def member(self) -> str:
        """Reads the name of an object's next member."""
        name, _ = self.value()
        if not isinstance(name, str):
            raise self.bad(f"not valid JSON ({name!r} as a name)")
        self.take(":")
        return name


def _entry_spans(path: Path, key: str | None, what: str) -> Iterator[tuple[int, int]]:
    """First byte and end of each entry of an array; ``key`` as in ``Records.entries``."""
    with path.open("rb") as file:
        stream = _JsonStream(file, path, what)
        if key is not None:
            stream.take("{")
            while stream.member() != key:
                stream.value()
                if stream.take(",}") == "}":
                    raise stream.bad(f"there is no {key!r}")
        stream.take("[")
        counted, place = stream.base, 0  # bytes before text[place], counted up to there
        more_to_come = stream.peek() != "]"
        if not more_to_come:
            stream.take("]")
        while more_to_come:
            stream.peek()
            before = stream.base
            _, start = stream.value()
            if stream.base != before or counted < stream.base:
                counted, place = stream.base, 0
            counted += len(stream.text[place:start].encode())
            length = len(stream.text[start : stream.position].encode())
            yield counted, counted + length
            counted, place = counted + length, stream.position
            more_to_come = stream.take(",]") == ","
        while key is not None and stream.take(",}") == ",":
            if stream.member() == key:
                raise stream.bad(f"there are two {key!r}, of which only one would be read")
            stream.value()
        if behind := stream.peek():
            raise stream.bad(f"found {behind!r} behind the end")
