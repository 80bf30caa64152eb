"""Hashes of what a result depends on: the library's code, and values. (``training.provenance``: data.)"""

import ast
import hashlib
import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from tdlib.core.paths import ROOT

# A run's id depends on these packages alone: a change of how runs are started, compared or drawn must
# not make finished runs unfindable. `miniworld` is here because it writes the data.
RESULT_PACKAGES = ("core", "method", "data", "miniworld", "teacher", "regions", "students", "training")
NO_RESULT = ("core/facts.py", "core/pages.py")  # views and reports alone use these


def canonical(value: Any) -> Any:
    """Makes whole floats ints, also in lists and dicts: 3 and 3.0 are one setting, written in two ways."""
    if isinstance(value, dict):
        return {name: canonical(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def canonical_json(value: Any) -> str:
    """Writes a value as JSON that is equal for equal settings (``canonical``, keys in order)."""
    return json.dumps(canonical(value), sort_keys=True)


def digest(value: Any) -> str:
    """Hashes a JSON value to sixteen hex digits, by its ``canonical_json``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def code_version() -> str:
    """Hash of the library's code that can change a run's result: whole packages, and no views.

    What Python executes counts, so that a corrected comment or docstring leaves finished runs their ids
    and checkpoints their use. (Another version of Python parses to another tree and makes new ids, as it
    may make other numbers.)
    """
    home = Path(__file__).resolve().parents[1]
    sources = [home / "config.py", home / "arms.py"]
    for package in RESULT_PACKAGES:
        sources += sorted((home / package).rglob("*.py"))
    named = {path.relative_to(home).as_posix(): path for path in sources}
    return digest([[name, code_of(path)] for name, path in named.items() if name not in NO_RESULT])


def code_of(path: Path) -> str:
    """Hash of a Python file's ``executed_code``, or of its bytes where it is no Python."""
    state = path.stat()
    return _code_of(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)  # a batch computes it for every run; size and time tell a changed file
def _code_of(path: Path, size: int, changed: int) -> str:
    content = path.read_bytes()
    try:
        return executed_code(content.decode("utf-8"))
    except (SyntaxError, ValueError):
        return hashlib.sha256(content).hexdigest()


def executed_code(source: str) -> str:
    """Hash of a module's syntax tree without docstrings; comments and layout are not in it either."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *others]:
                    node.body = others
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def git_version() -> str | None:
    """Returns the commit of the sources, with "-dirty" where they differ from it; None without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def tokenizer_digest(tokenizer: Any) -> str:
    """Identifies a tokenizer: SHA-256 over its pieces, their ids and the rules that cut texts into them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("truncation", "padding"):  # every call sets these, so they are no property of the tokenizer
        state.pop(key, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
