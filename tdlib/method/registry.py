"""The tables of functions that parameters name: where they lie, how their functions are called.

Anyone may add one in a notebook cell, ``SELECTORS["mine"] = my_selector``, and name it in the
parameters, ``selector="mine"``; its source is kept with the run. ``signatures`` lists every table with
the call that its functions must take.

Importing this module loads no torch: a batch is planned, and a command line checked, from the tables'
names alone, which are read from the source until something imports the module itself.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Table:
    """One table of exchangeable functions."""

    module: str  # of ``tdlib.method`` that holds it
    name: str  # of the dict in that module
    arguments: tuple[str, ...]  # what its functions are called with, by position
    returns: str  # shape and range of what they return

    def names(self) -> list[str]:
        """The names in the table now; its module is not imported for this."""
        return table_keys(f"tdlib.method.{self.module}", self.name)

    def functions(self) -> dict[str, Function]:
        """The table itself; imports torch."""
        return getattr(importlib.import_module(f"tdlib.method.{self.module}"), self.name)


_INSTANCE = Table(
    "weighting", "INSTANCE_WEIGHTS",
    ("teacher probabilities (batch choices)", "student probabilities (batch choices)", "labels (batch)"),
    "(batch), at least 0",
)  # fmt: skip
_SCHEDULE = Table("weighting", "SCHEDULES", ("progress: float in [0, 1)",), "float in [0, 1]")
TABLES: dict[str, tuple[Table, ...]] = {
    "relevance": (
        Table(
            "relevance", "RELEVANCE",
            ("alignment (choices student_tokens teacher_tokens)", "student: Tokens",
             "teacher: TeacherTokens"),
            "(choices student_tokens)",
        ),
        Table(
            "relevance", "STUDENT_RELEVANCE",
            ("projected (batch choices tokens teacher_dim)", "targets (the same)", "student: Tokens",
             "valid (batch choices tokens)"),
            "(batch choices tokens)",
        ),
    ),
    "prior": (
        Table("priors", "PRIORS", ("text: str", "spans (tokens 2)", "idf: Idf"), "(tokens), in [0, 1]"),
    ),
    "selector": (
        Table(
            "selection", "SELECTORS",
            ("scores (batch choices tokens), 0 outside the modality",
             "valid (the same): the modality's tokens that have a target", "options: SelectionOptions",
             "generator: torch.Generator | None"),
            "boolean mask (batch choices tokens); called once for words and once for places",
        ),
    ),
    "token_weight": (
        Table(
            "weighting", "TOKEN_WEIGHTS",
            ("scores (batch choices tokens)", "selected (batch choices tokens)"),
            "(batch choices tokens); counts where selected",
        ),
    ),
    "instance_weight": (_INSTANCE,),
    "choice_instance_weight": (_INSTANCE,),
    "distance": (
        Table(
            "losses", "DISTANCES",
            ("student_projected (..., tokens, teacher_dim)", "targets (the same)"),
            "(..., tokens)",
        ),
    ),
    "extra_term": (
        Table("terms", "EXTRA_TERMS", ("inputs: TermInputs, the batch's tensors",), "(batch)"),
    ),
    "distill_schedule": (_SCHEDULE,),
    "repair_schedule": (_SCHEDULE,),
    "repair_instance_weight": (_INSTANCE,),
}  # fmt: skip


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
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
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
        try:
            inspect.signature(table.functions()[name]).bind(*table.arguments)
        except TypeError as error:
            return (
                f"{table.name}[{name!r}] is called with {len(table.arguments)} arguments by position: "
                f"({', '.join(table.arguments)}); {error}"
            )
        except ValueError:  # some functions written in C do not tell their arguments
            pass
    return ""


def check_result(what: str, found: Any, shape: Sequence[int], mask: bool = False) -> None:
    """Refuses what a function of a table has returned if it is not of the shape that the table says.

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
    """One row per table, for ``pandas.DataFrame``: parameter, table, arguments, returns, functions."""
    return [
        {
            "parameter": parameter, "table": f"tdlib.method.{table.module}.{table.name}",
            "called with": ", ".join(table.arguments), "returns": table.returns,
            "functions": ", ".join(table.names()),
        }
        for parameter, known in TABLES.items()
        for table in known
    ]  # fmt: skip


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


def source_of(part: Any) -> str:
    """The source of a function or class; "" where Python cannot find it, as of one typed at a bare prompt.

    Of a class that a notebook defines, Python finds the methods alone.
    """
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(part)))
    except (OSError, TypeError):
        methods = vars(part).values() if isinstance(part, type) else ()
        return "\n".join(source_of(method) for method in methods if inspect.isfunction(method))
