"""Hashes of what a result depends on: the library's code, and values. (``training.provenance``: data.)"""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from tdlib.core.paths import ROOT

# A run's id depends on these packages alone: a change of how runs are started, compared or drawn must
# not make finished runs unfindable. `miniworld` is here because it writes the data.
RESULT_PACKAGES = ("core", "method", "data", "miniworld", "teacher", "regions", "students", "training")


def digest(value: Any) -> str:
    """Sixteen hex digits that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code_version() -> str:
    """Hash of the library's sources that can change a run's result: whole packages, and no views."""
    home = Path(__file__).resolve().parents[1]
    sources = [home / "config.py", home / "arms.py"]
    for package in RESULT_PACKAGES:
        sources += sorted((home / package).rglob("*.py"))
    return digest(
        [
            [path.relative_to(home).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
            for path in sources
        ]
    )


def git_version() -> str | None:
    """The commit of the project's sources, with "-dirty" where they differ from it; None without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
