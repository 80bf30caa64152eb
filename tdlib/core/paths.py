"""Where the project's files lie, and the error that a bad parameter raises."""

import difflib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A bad parameter: names it, the value found and what was expected."""


def resolve(name: str, prefix: str = "") -> str:
    """A path relative to the project as an absolute one; other names (hub ids, tags) as they are."""
    if name.startswith(prefix):
        path = ROOT / name[len(prefix) :]
        if name[len(prefix) :] and path.exists():
            return f"{prefix}{path}"
    return name


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: "; did you mean 'X'?", or "" where none is like it."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
