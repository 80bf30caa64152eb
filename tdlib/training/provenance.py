"""Hashes of the data and models that parameters name. Loads no torch: plans of batches use it too."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tdlib.core.files import ANNOTATIONS
from tdlib.core.paths import ROOT
from tdlib.data.tasks import TASKS, masked_set, world_folder
from tdlib.miniworld.worlds import VERSION
from tdlib.regions.specs import COMPUTED, FILES, each_path

PATHS = ("data_dir", "vocabulary", "teacher", "teacher_pretrained", "student")  # may name one without a slash


def data_manifest(parameters: dict[str, Any]) -> list[Any]:
    """Lists the state of the files that parameters name, as JSON; it changes if one of them does.

    Models and vocabularies count with their contents. Of ``data_dir`` and of folders of region features the
    names, sizes and times of change count, in the folder and one folder below, as reading all would take
    too long; of ``data_dir`` those of json, jsonl and csv files. Where ``data_dir`` is "", the MiniWorld's
    version and seed count. Sets that mask the words a student relies on count with their contents, because
    no parameter says which student that was.
    """
    states: list[Any] = []
    if parameters.get("data_dir") == "" and "world_seed" in parameters:
        states.append(["miniworld", VERSION, parameters["world_seed"]])
    states += [[split, _hash(file)] for split, file in _masked_sets(parameters)]
    for name, value in sorted(parameters.items()):
        several = value if isinstance(value, list) else [value]
        for one in (part for text in several if isinstance(text, str) for part in each_path(text)):
            kind, found = one.partition(":")[0], named_path(one, anything=name in PATHS)
            if found is None or not found.exists():
                continue
            for file in _files(found):
                state = file.stat()
                label = [name, file.relative_to(found).as_posix(), state.st_size]
                if name != "data_dir" and kind not in FILES:
                    states.append([*label, _hash(file)])
                elif name != "data_dir" or file.suffix in ANNOTATIONS:
                    states.append([*label, state.st_mtime_ns])
    return states


def named_path(value: Any, anything: bool = False) -> Path | None:
    """The path that a parameter's value names, with or without ``KIND:`` before it; None for other values.

    A value without a slash is taken for a path only if ``anything`` is True or it is one of regions. A value
    that names several paths must be split before, see ``regions.specs.each_path``.
    """
    if not isinstance(value, str) or not value:
        return None
    kind, colon, rest = value.partition(":")
    name = rest if colon and "/" not in kind else value
    if not name or not (anything or "/" in name or (colon and kind in (*FILES, *COMPUTED))):
        return None
    return ROOT / Path(name).expanduser()


def _masked_sets(parameters: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Iterates over the generated masked sets among the splits that parameters evaluate, with their files."""
    task = TASKS.get(parameters.get("task", ""))
    if task is None:
        return
    home = named_path(parameters.get("data_dir"), anything=True)
    folder = home or world_folder(parameters["task"], parameters.get("world_seed", 0))
    named = parameters.get("eval_splits") or [f"{task.evaluated}_{parameters.get('shift')}"]
    for split in named:
        if file := masked_set(folder, split):
            yield split, file


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = (file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
    # What a desktop or an editor leaves there (.DS_Store, .ipynb_checkpoints) is no part of a model.
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts))


def _hash(file: Path) -> str:
    state = file.stat()
    return _content(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, or for one above 64 MiB its time of change."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if size <= 2**26 else str(changed)
