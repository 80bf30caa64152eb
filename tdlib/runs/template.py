"""Reads what a notebook declares: its parameters, and the functions that its cells register.

Reads the file and executes nothing. ``checks`` tells which values are right for the parameters.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tdlib.arms import ARMS
from tdlib.config import RunConfig
from tdlib.core.files import parse_value
from tdlib.core.paths import ROOT, ConfigError, did_you_mean
from tdlib.core.provenance import code_of, digest
from tdlib.method import registry

NOTEBOOKS = ROOT / "notebooks"  # kernels work there, so that cells import modules that lie beside notebooks
UNKNOWN = object()  # a default that only the kernel can compute, such as os.environ["DATA"]
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "list": (list,), "dict": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter, as the notebook's cell declares it."""

    name: str
    annotation: str  # "" where it has none
    default: Any  # or ``UNKNOWN``
    source: str  # of the default
    comment: str = ""  # behind it: meaning, unit, choices

    @property
    def kind(self) -> str:
        """Returns the type that values must have, a key of ``_KINDS``; "" where any type is allowed."""
        annotated = re.split(r"[\[|\s]", self.annotation.strip())[0].lower()
        return next((kind for kind in (annotated, type(self.default).__name__) if kind in _KINDS), "")

    def problem(self, value: Any) -> str:
        """Returns what is wrong with a value's type; "" if nothing is."""
        allowed = _KINDS.get(self.kind)
        if allowed is None or (value is None and (self.default is None or "None" in self.annotation)):
            return ""
        if isinstance(value, allowed) and isinstance(value, bool) == (self.kind == "bool"):
            return ""
        return f"{self.name}={value!r}: expected {self.annotation or self.kind}, like {self.source}"

    def from_text(self, text: str) -> Any:
        """Parses a value of the command line (``parse_value``); a parameter of text takes it as it is."""
        if self.kind == "bool" and text in ("True", "False"):
            return text == "True"
        value = parse_value(text, self.name)
        return text if self.kind == "str" and not isinstance(value, str) else value


@dataclass(frozen=True)
class Template:
    """A notebook that runs are made from: the file as it was read, its code cells, its parameters."""

    path: Path
    content: bytes
    cells: tuple[str, ...]  # source of each code cell
    first: int  # number of the cell of parameters among them
    parameters: Mapping[str, Parameter]

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each parameter, without those that only a kernel can compute."""
        return {n: p.default for n, p in self.parameters.items() if p.default is not UNKNOWN}

    @property
    def builds_config(self) -> bool:
        """True if a cell makes a ``RunConfig``."""
        return any("RunConfig" in cell for cell in self.cells)

    @cached_property
    def settings(self) -> frozenset[str]:
        """Parameters that are passed to a ``RunConfig`` unchanged and under the same name.

        Not every parameter of that name is one: ``modality`` of ``05_tokens`` filters what is shown.
        """
        reach: set[str] = set()
        for call in (node for cell in self.cells for node in ast.walk(parse_cell(cell))):
            if not isinstance(call, ast.Call) or "RunConfig" not in ast.unparse(call.func):
                continue
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            reach |= {n for n, value in keywords.items() if n and getattr(value, "id", "") == n}
            if None in keywords or ast.unparse(call.func).endswith(".from_notebook"):
                reach |= RunConfig.model_fields.keys() - keywords.keys()
        return frozenset(reach & self.parameters.keys())

    def problem(self, name: str, value: Any) -> str:
        """Returns what is wrong with a parameter's name or its value's type; "" if nothing is."""
        if name not in self.parameters:
            return f"{name}: unknown parameter of {self.path.name}{did_you_mean(name, self.parameters)}"
        return self.parameters[name].problem(value)

    def from_text(self, name: str, text: str) -> Any:
        """Parses a parameter's value of the command line; see ``Parameter.from_text``."""
        return self.parameters.get(name, Parameter(name, "", None, "")).from_text(text)

    @cached_property
    def modules(self) -> dict[Path, str]:
        """Sources of the modules beside notebooks that cells import, also through each other.

        Packages count whole.
        """
        files: dict[Path, str] = {}
        waiting = [*self.cells]
        while waiting:
            for name in _imports(waiting.pop()):
                for file in (NOTEBOOKS / f"{name}.py", *(NOTEBOOKS / name).rglob("*.py")):
                    if file.is_file() and file not in files:
                        files[file] = file.read_text(encoding="utf-8", errors="replace")
                        waiting.append(files[file])
        return dict(sorted(files.items()))

    @cached_property
    def sources(self) -> list[str]:
        """Sources of the modules and of the code cells."""
        return [*self.modules.values(), *self.cells]

    @cached_property
    def code(self) -> str:
        """Hash of what cells and modules execute; outputs and prose are not in it."""
        modules = [[file.relative_to(NOTEBOOKS).as_posix(), code_of(file)] for file in self.modules]
        return digest([self.cells, modules])

    @cached_property
    def registered(self) -> dict[str, dict[str, ast.expr]]:
        """The expressions that code assigns to tables, ``SELECTORS["mine"] = ...``, by table and name."""
        entries: dict[str, dict[str, ast.expr]] = {}
        for source in self.sources:
            for node in ast.walk(parse_cell(source)):
                if not isinstance(node, ast.Assign):
                    continue
                for target in node.targets:
                    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                        table = ast.unparse(target.value).rpartition(".")[2]
                        entries.setdefault(table, {})[str(target.slice.value)] = node.value
        return entries

    def registers(self, parameter: str, name: str) -> bool | None:
        """True if code registers what the parameter names; None if only running it can tell."""
        tables = tables_of(parameter)
        if any(name in self.registered.get(table, ()) for table in tables):
            return True
        return None if any(table in self._changed_tables for table in tables) else False

    @cached_property
    def _changed_tables(self) -> set[str]:
        """Names what code changes in other ways than by a plain assignment of one entry."""
        change = r"\b([A-Z_]+)\b(?:\.(?:update|setdefault)|\[[^\]'\"]+\]\s*=[^=]|\s*\|=)"
        return {match[1] for source in self.sources for match in re.finditer(change, source)}

    @cached_property
    def arms(self) -> dict[str, Any]:
        """Settings of every arm, also of those that code registers; ``UNKNOWN`` where only running it tells.

        They may be a literal, also one made of other arms: ``{**ARMS["clip_td"], "selector": "all"}``.
        """
        arms: dict[str, Any] = dict(ARMS)
        for name, settings in self.registered.get("ARMS", {}).items():
            arms[name] = _constant(settings, {"ARMS": arms})
        return arms

    @cached_property
    def overridden(self) -> dict[str, Any]:
        """Parameters that a later cell sets to a literal before the configuration is built."""
        fixed = {}
        for cell in self.cells[self.first + 1 :]:
            for node in parse_cell(cell).body:
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    name = getattr(node.targets[0], "id", "")
                    if name in self.parameters and (value := _constant(node.value)) is not UNKNOWN:
                        fixed[name] = value
            if "RunConfig." in cell:
                break
        return fixed

    def reads(self, name: str) -> bool:
        """True if code after the parameters' cell names the parameter."""
        return any(re.search(rf"\b{re.escape(name)}\b", cell) for cell in self.cells[self.first + 1 :])


def tables_of(parameter: str) -> list[str]:
    """Names the tables that hold what a parameter may name; none for most parameters."""
    functions = [table.name for table in registry.TABLES.get(parameter, ())]
    return {"arm": ["ARMS"], "task": ["TASKS"]}.get(parameter, functions)


def find_notebook(name: str, folder: Path = ROOT) -> Path:
    """Finds a notebook by its name in notebooks/, or by its path, relative to ``folder`` or the project."""
    if not name.endswith(".ipynb"):
        return ROOT / "notebooks" / f"{name}.ipynb"
    places = [folder / name, ROOT / name, ROOT / "notebooks" / name]
    return next((place.resolve() for place in places if place.is_file()), places[0])


def no_such(what: str, path: Path, suffix: str) -> ConfigError:
    """Makes the error of a file that is missing, with the names of those beside it that end in ``suffix``."""
    known = sorted(other.stem for other in path.parent.glob(f"*{suffix}"))
    there = ", ".join(known) or "none"
    return ConfigError(f"{path}: no such {what}{did_you_mean(path.stem, known)}; there are: {there}")


def read_template(path: Path) -> Template:
    """Reads a notebook; ConfigError where it has not exactly one cell tagged ``parameters``, in Python."""
    if not path.is_file():
        raise no_such("notebook", path, ".ipynb")
    content = path.read_bytes()
    try:
        cells = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
        tagged = [n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
        sources = tuple("".join(cell["source"]) for cell in cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no notebook ({type(error).__name__}: {error})") from None
    if len(tagged) != 1:
        raise ConfigError(f"{path}: {len(tagged)} cells are tagged 'parameters', expected one")
    try:
        parameters = declared_in(sources[tagged[0]])
    except SyntaxError as error:
        raise ConfigError(
            f"{path}: the cell of parameters is no Python: line {error.lineno}: {error.msg}: "
            f"{(error.text or '').strip()}"
        ) from None
    return Template(path, content, sources, tagged[0], parameters)


def declared_in(source: str) -> dict[str, Parameter]:
    """Reads the parameters of a cell: every ``name = value``, annotated or not, and no other statement."""
    comments = {}
    plain = plain_python(source)
    for token in tokenize.generate_tokens(io.StringIO(plain).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    declared = {}
    for node in ast.parse(plain).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                annotation = ast.unparse(node.annotation)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                annotation = ""
            case _:
                continue
        text, comment = ast.unparse(value), comments.get(node.end_lineno or node.lineno, "")
        declared[name] = Parameter(name, annotation, _constant(value), text, comment)
    return declared


def plain_python(source: str) -> str:
    """Turns IPython's lines of a cell that is no Python to comments: ``%magic``, ``x = !command``, ``x?``."""
    try:
        ast.parse(source)
    except SyntaxError:
        lines = r"^(\s*)(?=(?:[\w., ]+=\s*)?[%!]|[\w.]+\?+\s*$)"
        return re.sub(lines, r"\1pass  # ", source, flags=re.MULTILINE)
    return source


def parse_cell(source: str) -> ast.Module:
    """Parses a cell; an empty tree where it is not plain Python, which its run will tell."""
    try:
        return ast.parse(plain_python(source))
    except SyntaxError:
        return ast.Module([], [])


def _imports(source: str) -> set[str]:
    """The first parts of the names of modules that a source imports, or runs by ``%run FILE.py``."""
    names: list[str] = re.findall(r"^\s*%run\s+(?:-\S+\s+)*(\w+)\.py\b", source, flags=re.MULTILINE)
    for node in ast.walk(parse_cell(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


_ARITHMETIC = (
    ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.List, ast.Tuple,
    ast.Dict, ast.Set, ast.Load,
)  # fmt: skip


def _constant(value: ast.expr, known: Mapping[str, Any] | None = None) -> Any:
    """Computes literals and arithmetic on them, such as ``2 * 3``; ``UNKNOWN`` for all else.

    ``known`` are variables that it may name and look up entries of.
    """
    for node in ast.walk(value):
        looked_up = known and (isinstance(node, ast.Subscript) or getattr(node, "id", "") in known)
        if not looked_up and not isinstance(node, _ARITHMETIC):
            return UNKNOWN
    try:
        return eval(compile(ast.Expression(value), "<parameter>", "eval"), {"__builtins__": {}}, known)
    except Exception:  # 1 / 0: the kernel will say so
        return UNKNOWN
