"""Checkpoints of a training as folders that are either whole or not there, and finished runs known again.

Owns where they lie, how they become final, how they are verified and which are kept. Does not own
what is in them: the trainer fills a folder (``staging``) and hands it over (``publish_checkpoint``).

The checkpoints of the run folder ``runs/NAME`` lie in ``runs/.checkpoints/NAME/step-N``. A
``manifest.json`` with the SHA-256 of every other file is written last; files and folders reach the
disk before the folder gets its name.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tdlib.core.files import file_digest, flat, sync, write_json
from tdlib.core.paths import ConfigError

log = logging.getLogger(__name__)

HOME = ".checkpoints"  # hidden: no run, and kept where a run's other output is cleared
KEPT = 2  # so that one is left when the newest turns out damaged
STAGING = ".partial"  # below a run's checkpoints: what is not whole yet
_MANIFEST, _RUN = "manifest.json", "run.json"
_STEP = re.compile(r"step-(\d+)")


def checkpoints_of(folder: Path) -> Path:
    """The folder of a run folder's checkpoints."""
    folder = Path(folder).resolve()
    return folder.parent / HOME / folder.name


def staging(home: Path) -> Path:
    """An empty folder beside the checkpoints, for what is not whole yet; an earlier one's remains go."""
    place = home / STAGING
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def publish_checkpoint(filled: Path, home: Path, step: int, run: dict[str, Any]) -> Path:
    """Makes a filled folder the checkpoint of ``step``; all but the newest ``KEPT`` up to it go.

    ``filled`` lies below ``home``. ``run`` is what must be equal for a run to continue from it (JSON).
    """
    write_json(filled / _RUN, run)
    files = [path for path in sorted(filled.rglob("*")) if path.is_file()]
    listed = {
        path.relative_to(filled).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }
    for path in files:
        sync(path)
    write_json(filled / _MANIFEST, {"step": step, "files": listed})
    sync(filled / _MANIFEST)
    sync(filled)
    target = home / f"step-{step:08d}"
    if target.exists():  # a damaged one, or this run would have continued from it
        shutil.rmtree(target)
    os.replace(filled, target)
    sync(home)
    steps = _steps(home)
    kept = [number for number in steps if number <= step][:KEPT]
    for number, other in steps.items():
        if number not in kept:
            shutil.rmtree(other, ignore_errors=True)
    return target


def newest(home: Path, run: dict[str, Any]) -> Path | None:
    """The newest checkpoint that is whole; None if there is none. Damaged ones are named in the log.

    ConfigError where it belongs to another run than ``run``.
    """
    for folder in _steps(home).values():
        if damage := damaged(folder):
            log.warning("checkpoint %s is damaged (%s); an earlier one is looked for", folder, damage)
            continue
        stored = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        run = json.loads(json.dumps(run))  # as it was stored: tuples are lists
        if stored != run:
            raise ConfigError(
                f"{folder} is a checkpoint of another run: {_differences(stored, run)}; run with what it was "
                f"made with to continue, or remove {home} to start anew"
            )
        return folder
    return None


def damaged(folder: Path) -> str:
    """What is wrong with a checkpoint; "" if every file has the checksum of its manifest."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {_MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {type(error).__name__}: {error}"
    if _RUN not in listed:
        return f"{_MANIFEST} does not list {_RUN}"
    for name, (size, digest) in listed.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if file_digest(path) != digest:
                return f"{name} does not have its SHA-256"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return ""


def remove(home: Path) -> None:
    """Removes a finished run's checkpoints."""
    shutil.rmtree(home, ignore_errors=True)
    with suppress(OSError):  # other runs have theirs there
        home.parent.rmdir()


def _steps(home: Path) -> dict[int, Path]:
    """Checkpoints by their step, the newest first."""
    found = {int(match[1]): path for path in home.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def _differences(stored: Any, run: dict[str, Any]) -> str:
    """What differs between two runs, nested names joined by dots."""
    old, new = flat(stored), flat(run)
    names = [name for name in old | new if old.get(name, "absent") != new.get(name, "absent")]
    shown = [f"{name} was {_short(old, name)} and is {_short(new, name)}" for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _short(values: dict[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "absent"
    return text if len(text) <= 60 else f"{text[:57]}..."
