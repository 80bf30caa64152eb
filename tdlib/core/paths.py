"""The project's root folder, names of files in it, and what is said of a bad parameter or an unknown name."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

ROOT = Path(__file__).resolve().parents[2]
Value = TypeVar("Value")


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


def need_several(texts: object, what: str) -> None:
    """Raises ValueError for one string in place of several: each letter would count as one."""
    if isinstance(texts, str):
        raise ValueError(
            f"{what} is one string ({texts[:40]!r}); expected several, such as a list of strings"
        )


class Named(dict[str, Value]):
    """A table by name, to which users add. A name that it lacks raises ConfigError with what it holds."""

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(
            f"{name!r}: not known in this session, only {', '.join(self)}{did_you_mean(name, self)} (one of "
            "your own: first execute the cell, or import the module, that registers it)"
        )
