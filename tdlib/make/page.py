"""Makes the tables of data/models/README.md from each model's ``provenance.json``."""

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdlib.core.files import whole_file

BEGIN, END = "<!-- made by: python -m tdlib.make page -->", "<!-- end -->"
STUDENTS = {
    "matching": "other picture's caption", "matching_hard": "one thing changed",
    "vcr_val_balanced": "VCR zero-shot", "vcr_val_balanced_known": "known",
    "vcr_val_balanced_unknown": "unknown", "vcr_val_balanced_known_in_known_style": "known, its style",
    "snli_ve_dev_balanced": "SNLI-VE zero-shot",
}  # fmt: skip
TEACHERS = {
    "picture_of_256": "right picture of 256", "caption_of_256": "right caption of 256",
    "vcr_val": "VCR zero-shot", "vcr_val_shortcut": "the same, `val_shortcut`",
}  # fmt: skip


def is_current(made_by: str) -> bool:
    """True if the function that made a model still exists."""
    try:
        return callable(pkgutil.resolve_name(made_by))
    except (ImportError, AttributeError):
        return False


def maker(made: dict[str, Any]) -> str:
    """Names the command that made a model, or the function, if it does not exist any more."""
    name = str(made["made_by"])
    if not is_current(name):
        return f"earlier maker, {name.removeprefix('tdlib.')}"
    command = made.get("command") or f"python -m tdlib.make {made.get('kind', 'detector')}"
    return f"`{command}`" + (f" ({made['budget']})" if "budget" in made else "")


def _cost(made: dict[str, Any]) -> str:
    steps = made["steps"]
    number = sum(steps.values()) if isinstance(steps, dict) else steps
    return f"{number:,} steps, {made['minutes']:g} min"


def _table(models: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    heads = ["model", "made by", "took", *columns.values()]
    rows = [heads, ["---"] * len(heads)]
    for name, made in models.items():
        found = made["held_out"]
        figures = [f"{100 * found[key]:.1f}" if key in found else "" for key in columns]
        rows.append([f"`{name}`", maker(made), _cost(made), *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tables(home: Path) -> str:
    """Makes Markdown: one table of students, one of teachers, one of detectors; figures in per cent."""
    provenances = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(home.glob("*/provenance.json"))
    }
    kinds: Sequence[tuple[str, dict[str, str]]] = (
        ("matching", STUDENTS),
        ("vcr_val", TEACHERS),
        ("name", {}),
    )
    parts = []
    for key, columns in kinds:
        models = {name: made for name, made in provenances.items() if key in made.get("held_out", {})}
        columns = columns or {name: name for made in models.values() for name in made["held_out"]}
        if models:
            parts.append(_table(models, columns))
    return "\n\n".join(parts)


def with_tables(text: str, home: Path) -> str:
    """Replaces the tables between a page's two marks by the present ones."""
    return re.sub(f"(?<={BEGIN}\n).*?(?=\n{END})", lambda _: tables(home), text, flags=re.DOTALL)


def write_page(home: Path) -> None:
    """Brings the page of a folder of models up to date, if there is one."""
    path = home / "README.md"
    if path.is_file():
        text = with_tables(path.read_text(encoding="utf-8"), home)
        with whole_file(path) as out:
            out.write(text)
