"""Checkpoints of a training, as folders that are either complete or absent.

The trainer fills a folder (``staging``) and hands it over (``publish_checkpoint``). This module decides where
checkpoints lie, how they become final, how they are verified and which are kept.

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

HOME = ".checkpoints"  # hidden, so that nobody takes it for a run; survives the deletion of a run folder
UNEVALUATED = "unevaluated.json"  # marks a run folder whose student is trained and not yet evaluated
KEPT = 2  # one is left if the newest turns out to be damaged
STAGING = ".partial"  # below a run's checkpoints: a checkpoint that is still being written
_MANIFEST, _RUN = "manifest.json", "run.json"
_STEP = re.compile(r"step-(\d+)")


def checkpoints_of(folder: Path) -> Path:
    """The folder of a run folder's checkpoints."""
    folder = Path(folder).resolve()
    return folder.parent / HOME / folder.name


def staging(home: Path) -> Path:
    """Makes an empty folder for the next checkpoint; deletes what an interrupted run left in it."""
    place = home / STAGING
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def publish_checkpoint(filled: Path, home: Path, step: int, run: dict[str, Any]) -> Path:
    """Makes a filled folder the checkpoint of ``step``; deletes all but the newest ``KEPT`` up to it.

    ``filled`` lies below ``home``. A run continues from the checkpoint only if its ``run`` (JSON) is equal.

    The order matters: every file reaches the disk, then the manifest with their digests, and only then the
    folder gets its name. A machine that stops in between leaves no folder that looks complete.
    """
    write_json(filled / _RUN, run)
    files = [path for path in sorted(filled.rglob("*")) if path.is_file()]
    digests = {path.relative_to(filled).as_posix(): file_digest(path) for path in files}
    for path in files:
        sync(path)
    write_json(filled / _MANIFEST, {"step": step, "files": digests})
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
    """The newest undamaged checkpoint; None if there is none. The log names damaged ones.

    Raises:
        ConfigError: it belongs to another run than ``run``.
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
    """Says what is wrong with a checkpoint; "" if every file has the digest of the manifest."""
    name = _MANIFEST
    try:
        digests = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in (_RUN, *digests):
            if file_digest(folder / name) != digests[name]:
                return f"{name} does not have its SHA-256"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{name} cannot be read: {type(error).__name__}: {error}"
    return ""


def remove(home: Path) -> None:
    """Removes a finished run's checkpoints."""
    shutil.rmtree(home, ignore_errors=True)
    with suppress(OSError):  # other runs have theirs there
        home.parent.rmdir()


def _steps(home: Path) -> dict[int, Path]:
    """Checkpoints by their step, the newest first."""
    steps = {int(match[1]): path for path in home.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(steps.items(), reverse=True))


def _differences(stored: Any, run: dict[str, Any]) -> str:
    """Lists what differs between two runs; dots join nested names."""
    old, new = flat(stored), flat(run)
    names = [name for name in old | new if old.get(name, "absent") != new.get(name, "absent")]
    shown = [f"{name} was {_short(old, name)} and is {_short(new, name)}" for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _short(values: dict[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "absent"
    return text if len(text) <= 60 else f"{text[:57]}..."
