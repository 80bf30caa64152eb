"""Notebooks call the library as it is: what they import exists and takes the arguments that they name."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from tdlib.core.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_calls_fit_what_is_imported(path: Path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    imported = {
        alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdlib")
        for alias in node.names
    }
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [(call, imported[call.func.id]) for call in calls if call.func.id in imported]
    assert asked
    for call, function in asked:
        if inspect.isclass(function) and issubclass(function, str | Exception):
            continue  # has no signature
        names = inspect.signature(function).parameters
        if any(kind.kind is kind.VAR_KEYWORD for kind in names.values()):
            continue
        given = {keyword.arg for keyword in call.keywords} - {None}
        assert given <= names.keys(), f"{ast.unparse(call)}: has no {given - names.keys()}"


def test_the_defaults_of_the_tokens_notebook_hide_no_example():
    names: dict[str, Any] = {}
    cells = nbformat.read(ROOT / "notebooks" / "05_tokens.ipynb", as_version=4).cells
    for source in [cell.source for cell in cells if cell.cell_type == "code"][:2]:  # parameters, filter
        exec(source, names)
    index = pd.DataFrame({"example_id": ["labelled", "unlabelled"], "c": [0.5, float("nan")]})
    assert len(names["filter"].choose(index)) == 2
