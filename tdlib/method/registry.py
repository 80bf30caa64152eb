"""The functions that parameters name, and the source of those that a user added.

Anyone may add one in a notebook cell, ``SELECTORS["mine"] = my_selector``, and name it in the
parameters of the same session; its source is kept with the run.
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from tdlib.method.losses import DISTANCES
from tdlib.method.priors import PRIORS
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.method.selection import SELECTORS
from tdlib.method.weighting import INSTANCE_WEIGHTS, SCHEDULES, TOKEN_WEIGHTS


def tables() -> dict[str, dict[str, Callable[..., Any]]]:
    """Parameters that name a function, each with what it may name now."""
    return {
        "relevance": RELEVANCE | STUDENT_RELEVANCE, "prior": PRIORS, "selector": SELECTORS,
        "token_weight": TOKEN_WEIGHTS, "instance_weight": INSTANCE_WEIGHTS, "distance": DISTANCES,
        "distill_schedule": SCHEDULES, "choice_instance_weight": INSTANCE_WEIGHTS,
    }  # fmt: skip


def own_functions(config: Any) -> dict[str, dict[str, str]]:
    """The functions of a run that are not the project's: name and source text by parameter.

    The source is "" where Python cannot find it (a function typed at a bare prompt).
    """
    found = {}
    for parameter, table in tables().items():
        name = getattr(config, parameter)
        function = inspect.unwrap(table[name])
        if not getattr(function, "__module__", "").startswith("tdlib."):
            try:
                source = textwrap.dedent(inspect.getsource(function))
            except (OSError, TypeError):
                source = ""
            found[parameter] = {"name": name, "source": source}
    return found
