"""The project's root folder, names of files in it, and the error that a bad parameter raises."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A bad parameter: names it, the value found and what was expected."""


def resolve(name: str, prefix: str = "") -> str:
    """Makes a path absolute that is relative to the project or begins with ~; hub ids and tags stay."""
    if name.startswith(prefix):
        path = ROOT / os.path.expanduser(name[len(prefix) :])
        if name[len(prefix) :] and path.exists():
            return f"{prefix}{path}"
    return name


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Ends an error about an unknown name with the most similar known one: "; did you mean 'X'?", or ""."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
