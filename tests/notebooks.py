"""A notebook's code, executed in the test's own process: no kernel has to start and import all again."""

from typing import Any

import nbformat
from IPython.display import display

from tdlib.core.paths import ROOT


def execute(notebook: str, **parameters: Any) -> dict[str, Any]:
    """Executes the code of ``notebooks/<notebook>.ipynb`` with other parameters; returns what it defined."""
    names: dict[str, Any] = {"display": display}
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters
    return names
