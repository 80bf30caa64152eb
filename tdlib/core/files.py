"""Writes files so that none is ever half-written under its final name; reads values; compares files."""

import argparse
import hashlib
import json
import os
import pickle
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tdlib.core.paths import ConfigError

# Ends of files in a data folder that may hold annotations: a change of one is a change of the data.
ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fills a temporary folder beside ``folder``; on success it is renamed, on error it is deleted.

    An older folder of that name stays until then. Where ``folder`` is a link, it stays one and the folder
    that it points to is replaced.
    """
    given, folder = Path(folder), Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{given}: is a file; remove it or choose another folder to write to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = partial.with_name(f"{partial.name}-old")
    try:
        fill(partial)
        partial.chmod(0o755)
        if folder.exists():  # no system renames a folder over one that holds files: two steps
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return given


def refuse_foreign(folder: Path, *markers: str) -> None:
    """Raises ConfigError if writing would replace a folder without any of the files that its maker writes."""
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in markers):
        raise ConfigError(
            f"{folder}: holds files that were not made here (there is no {markers[0]}) and would be "
            "replaced; choose another folder, or empty this one"
        )


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path; on success it is renamed to ``path``, on error it is deleted."""
    # Two that write the same file must not share its temporary one; in containers, processes have equal ids.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Yields a text file to write to, which appears as ``path`` on success (see ``whole_path``)."""
    with whole_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


def file_state(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in nanoseconds; None where there is no file.

    An argument of what is cached by path, so that a changed file is read again.
    """
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def parse_json(text: str, where: str) -> Any:
    """Parses JSON and refuses a key that stands twice in an object, where Python would keep the last value.

    Raises:
        ConfigError: an object has a key twice; names ``where`` the text is from.
        ValueError: it is no JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ConfigError(f"{where}: {key!r} stands {count} times in one object; keep one of them")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def parse_value(text: str, where: str) -> Any:
    """Parses a value of the command line: JSON, a list of bare words (``[finetune, clip_td]``), or text."""
    try:
        return parse_json(text, where)
    except json.JSONDecodeError:
        if text[:1] == "[" and text[-1:] == "]" and not set(text[1:-1]) & set("\"'{}[]"):
            return [parse_value(word.strip(), where) for word in text[1:-1].split(",")]
        return text


def at_least(least: int, text: str) -> int:
    """Parses a whole number of the command line, ``least`` or more: a ``type`` for argparse."""
    if (number := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from {least} on")
    return number


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, straight under the final name: for use inside ``write_folder``."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible_files(folder: Path, name: str) -> list[Path]:
    """Lists the files of a name below a folder, sorted, without those in hidden folders (checkpoints)."""
    files = sorted(folder.rglob(name)) if folder.is_dir() else []
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flattens nested dicts: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    inner = ((f"{name}.{part}" if name else part, item) for part, item in value.items())
    return {key: leaf for part, item in inner for key, leaf in flat(item, part).items()}


def remove_tree(folder: Path) -> None:
    """Removes a folder; links in it are removed, not followed."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def why_unreadable(error: BaseException) -> str:
    """Explains why a file of weights does not load.

    Where it holds other objects than tensors, torch's message advises to unpickle it all the same, which
    would run whatever code is in it; this names a safe remedy instead.
    """
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, pickle.UnpicklingError):
            return (
                "damaged, or with Python objects beside its tensors, which could run any code and are not "
                "read; ask its authors for the state dict alone, or for safetensors"
            )
        reason = reason.__cause__ or reason.__context__
    return str(error)
