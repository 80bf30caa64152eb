"""The tables of functions that parameters name: where they lie, how their functions are called.

Anyone may add one in a notebook cell, ``SELECTORS["mine"] = my_selector``, and name it in the
parameters, ``selector="mine"``; its source is kept with the run. ``signatures`` lists every table with
the call that its functions must take.

Importing this module loads no torch: a batch is planned, and a command line checked, from the tables'
names alone, which are read from the source until something imports the module itself.
"""

import ast
import difflib
import dis
import functools
import hashlib
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, NoReturn, TypeVar

Function = Callable[..., Any]
Value = TypeVar("Value")


class Named(dict[str, Value]):
    """A table by name, to which users add. Of a name that it lacks, an ``error`` says what it holds."""

    error: ClassVar[type[Exception]] = ValueError

    def __missing__(self, name: str) -> NoReturn:
        close = difflib.get_close_matches(str(name), list(self), n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise self.error(
            f"{name!r}: not known in this session, only {', '.join(self)}{meant} (one of your own: first "
            "execute the cell, or import the module, that registers it)"
        )


def need_several(texts: object, what: str) -> None:
    """Raises ValueError for one string in place of several: each letter would count as one."""
    if isinstance(texts, str):
        raise ValueError(
            f"{what} is one string ({texts[:40]!r}); expected several, such as a list of strings"
        )


@dataclass(frozen=True)
class Table:
    """One table of exchangeable functions: the dict ``name`` in a ``module`` of ``tdlib.method``."""

    module: str
    name: str

    def names(self) -> list[str]:
        """The names in the table now; its module is not imported for this."""
        return table_keys(f"tdlib.method.{self.module}", self.name)

    def functions(self) -> dict[str, Function]:
        """The table itself; imports torch."""
        return getattr(importlib.import_module(f"tdlib.method.{self.module}"), self.name)

    def call(self) -> inspect.Signature:
        """How its functions are called, by position: as the project's, but for arguments with defaults."""
        projects = next(function for function in self.functions().values() if not is_users(function))
        known = inspect.signature(projects)
        parameters = [one for one in known.parameters.values() if one.default is one.empty]
        return known.replace(parameters=parameters)


_INSTANCE, _SCHEDULE = Table("weighting", "INSTANCE_WEIGHTS"), Table("weighting", "SCHEDULES")
TABLES: dict[str, tuple[Table, ...]] = {
    "relevance": (Table("relevance", "RELEVANCE"), Table("relevance", "STUDENT_RELEVANCE")),
    "prior": (Table("priors", "PRIORS"),),
    "selector": (Table("selection", "SELECTORS"),),
    "token_weight": (Table("weighting", "TOKEN_WEIGHTS"),),
    "instance_weight": (_INSTANCE,),
    "choice_instance_weight": (_INSTANCE,),
    "distance": (Table("losses", "DISTANCES"),),
    "extra_term": (Table("terms", "EXTRA_TERMS"),),
    "distill_schedule": (_SCHEDULE,),
    "repair_schedule": (_SCHEDULE,),
    "repair_instance_weight": (_INSTANCE,),
}


def table_keys(module: str, name: str) -> list[str]:
    """The names in a table of any module of ``tdlib`` now; the module is not imported for this."""
    # Only code that has imported the module can have added to the table; until then its source is complete.
    loaded = sys.modules.get(module)
    return list(getattr(loaded, name)) if loaded else list(_keys_in_source(module, name))


@lru_cache
def _keys_in_source(module: str, name: str) -> tuple[str, ...]:
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    source = path.with_suffix(".py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            value = node.value
            if isinstance(value, ast.Call) and value.keywords:  # Named(mine=..., ...)
                return tuple(keyword.arg for keyword in value.keywords if keyword.arg)
            value = value.args[0] if isinstance(value, ast.Call) else value
            assert isinstance(value, ast.Dict)
            return tuple(ast.literal_eval(key) for key in value.keys if key is not None)
    raise LookupError(f"{module} holds no table {name}")


def names(parameter: str) -> list[str]:
    """The names that a parameter may have now."""
    return [name for table in TABLES[parameter] for name in table.names()]


def tables() -> dict[str, dict[str, Function]]:
    """Every parameter that names a function, with the functions that it may name now; imports torch."""
    return {
        parameter: {name: function for table in known for name, function in table.functions().items()}
        for parameter, known in TABLES.items()
    }


def call_problem(parameter: str, name: str) -> str:
    """Says why the function of this name cannot be called as training will call it; "" if it can.

    A table that was never imported holds only the project's functions, which can.
    """
    for table in TABLES[parameter]:
        if f"tdlib.method.{table.module}" not in sys.modules or name not in table.functions():
            continue
        wanted = table.call()
        try:
            inspect.signature(table.functions()[name]).bind(*wanted.parameters)
        except TypeError as error:
            return f"{table.name}[{name!r}] is called by position as {_without_modules(wanted)}; {error}"
        except ValueError:  # some functions written in C do not tell their arguments
            pass
    return ""


def check_result(what: str, found: Any, shape: Sequence[int], mask: bool = False) -> None:
    """Refuses what a function of a table has returned if it is not of the shape that is needed.

    Broadcasting would hide it: one number in place of one for each example weighs all examples alike. Looks
    at shape and type alone, so no device is waited for. ``mask``: it must be boolean.

    Raises:
        ValueError: names ``what`` and both shapes.
    """
    of = tuple(getattr(found, "shape", ()))
    kind = str(getattr(found, "dtype", type(found).__name__)).removeprefix("torch.")
    if of != tuple(shape) or (mask and kind != "bool"):
        expected = f"{'a boolean mask' if mask else 'a tensor'} of shape {tuple(shape)}"
        raise ValueError(f"{what} returned {kind} of shape {of}; expected {expected}")


def signatures() -> list[dict[str, str]]:
    """One row per table, for ``pandas.DataFrame``: parameter, table, called as, functions."""
    return [
        {
            "parameter": parameter, "table": f"tdlib.method.{table.module}.{table.name}",
            "called as": _without_modules(table.call()), "functions": ", ".join(table.names()),
        }
        for parameter, known in TABLES.items()
        for table in known
    ]  # fmt: skip


def _without_modules(call: inspect.Signature) -> str:
    return re.sub(r"\b(?:\w+\.)+", "", str(call))


def is_users(function: Function) -> bool:
    """True for a function that a user defined, False for the project's."""
    return not getattr(inspect.unwrap(function), "__module__", "").startswith("tdlib.")


def user_functions(config: Any) -> dict[str, dict[str, str]]:
    """The functions of a run that are not the project's: name and source (``source_of``) by parameter."""
    added = {}
    for parameter, table in tables().items():
        name = getattr(config, parameter)
        if is_users(table[name]):
            added[parameter] = {"name": name, "source": source_of(table[name])}
    return added


def source_of(part: Any, known: tuple[Any, ...] = ()) -> str:
    """The source of a function or class; "" where Python cannot find it, as of one typed at a bare prompt.

    With what decides what a function does: the arguments of a ``partial``, plain values from outside that it
    reads, and the source of functions beside it that it calls. Of a class that a notebook defines, Python
    finds the methods alone. ``known`` are functions whose source is there already.
    """
    if isinstance(part, functools.partial):
        return f"# partial: {_text(part.args)}, {_text(part.keywords)}\n{source_of(part.func, known)}"
    part = inspect.unwrap(part)
    inside = vars(part).values() if isinstance(part, type) else (part,)
    functions = [one for one in inside if inspect.isfunction(one)]
    try:
        source = textwrap.dedent(inspect.getsource(part))
    except (OSError, TypeError):
        return "\n".join(source_of(method) for method in functions if method is not part)
    return source + "".join(_read_outside(function, (*known, part)) for function in functions)


def _read_outside(function: Any, known: tuple[Any, ...]) -> str:
    """Plain values that a function reads from outside, as comments, and sources of functions beside it."""
    names, around = set(_global_names(function.__code__)), function.__globals__
    read: dict[str, Any] = {name: around[name] for name in names if name in around}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # nothing is in it yet
            read[name] = cell.cell_contents
    if function.__defaults__:
        read["defaults"] = function.__defaults__
    lines = []
    for name, value in sorted(read.items()):
        beside = inspect.isfunction(value) and value.__module__ == function.__module__
        if value is None or type(value) in (bool, int, float, str, bytes, tuple, list, dict, set):
            text = _text(value)
            said = text if len(text) < 1000 else hashlib.sha256(text.encode()).hexdigest()
            lines.append(f"# {name} = {said}\n")
        elif beside and (called := inspect.unwrap(value)) not in known:
            lines.append(f"\n{source_of(called, known)}")
            known = (*known, called)
    return "".join(lines)


def _global_names(code: CodeType) -> Iterator[str]:
    """Names that code reads from outside, also within its comprehensions and inner functions."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)


def _text(value: Any) -> str:
    """Writes a value without addresses and in one order, so that it is the same in every process."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_text(one)}" for name, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
