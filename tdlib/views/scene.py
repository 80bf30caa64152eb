"""A view of sheets as plain lists and numbers, which the explorer's page draws (``static/stage.js``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tdlib.core.facts import token_name, truth_name
from tdlib.views.html import direction
from tdlib.views.picture import described, embedded, number_labels, object_labels
from tdlib.views.scale import Scale
from tdlib.views.sheet import Sheet, marks_of, words_of
from tdlib.views.view import View


def scene_of(view: View) -> dict[str, Any]:
    """Everything that the page needs to draw a view but the bytes of its pictures, see ``pictures_of``."""
    scales = dict.fromkeys(sheet.scale for sheet in view.sheets)
    words, picture = view.arguments["words"], view.arguments["picture"]
    return {
        "heading": view.heading,
        "note": view.note,
        "words": words,
        "picture": picture,
        "sheets": [sheet_of(sheet) for sheet in view.sheets],
        "scales": [_legend(scale) for scale in scales if scale.end > 0],
        "marks": " · ".join(_marks(view.sheets, words, picture)),
    }


def _marks(sheets: Sequence[Sheet], words: bool, picture: bool) -> list[str]:
    """Explains lines and grey letters, as far as these sheets show them."""
    marks, truth = marks_of(sheets, words, picture), truth_name([sheet.record for sheet in sheets])
    texts = {
        "underlined or outlined: selected": {"selected"},
        "underlined or outlined: the largest": {"largest"},
        "dotted line: selected by the first alone": {"first alone"},
        f"dotted above, dashed box: decides the answer ({truth})": {"decisive word", "decisive box"},
        "orange box: object": {"object"},
        "grey: no teacher target": {"no target"},
    }
    return [text for text, explained in texts.items() if explained & marks]


def pictures_of(view: View) -> dict[str, bytes]:
    """The JPEG of each picture of a view, by the name that ``sheet_of`` gives it, without missing files."""
    paths = dict.fromkeys(sheet.record.image for sheet in view.sheets)
    return {str(path): content for path in paths if (content := embedded(path)[0])}


def sheet_of(sheet: Sheet) -> dict[str, Any]:
    """A sheet with its colours, numbers and the places of its labels."""
    record = sheet.record
    missing = embedded(record.image)[1] if len(sheet.regions) else ""
    names = [*record.object_names, *[""] * (len(record.object_boxes) - len(record.object_names))]
    return {
        "key": key_of(sheet),
        "name": sheet.name,
        "about": list(sheet.about),
        "below": sheet.below,
        "words": [[[p.text, p.token, list(p.objects)] for p in word] for word in words_of(record)],
        "direction": direction(record.text),
        "tokens": [_token(sheet, i) for i in range(len(record.tokens))],
        "boxes": [[int(i), *np.round(record.boxes[i], 5).tolist()] for i in sheet.regions],
        "objects": [[str(name), *box] for name, box in zip(names, record.object_boxes, strict=True)],
        "truths": [list(box) for box in record.relevant_boxes],
        "places": {"objects": object_labels(record.object_boxes), "numbers": number_labels(sheet)},
        "picture": "" if missing else str(record.image),
        "missing": missing,
        "described": described(sheet),
    }


def key_of(sheet: Sheet) -> str:
    """Names a statement and its tokenisation; sheets with the same key share one matrix of cosines."""
    record = sheet.record
    return f"{record.split} {record.example_id} {record.choice} {len(record.tokens)}"


def _token(sheet: Sheet, i: int) -> dict[str, Any]:
    value = float(sheet.values[i])
    return {
        "value": sheet.scale.number(value) if sheet.marked[i] else "",
        "fill": sheet.scale.css(value) if sheet.coloured[i] else "",
        "tint": list(sheet.scale.on_white(value)) if sheet.coloured[i] else [],
        "marked": bool(sheet.marked[i]),
        "dotted": bool(sheet.dotted[i]),
        "truth": bool(sheet.truth[i]),
        "distilled": bool(sheet.record.distilled[i]),
        "name": token_name(sheet.record, i),
        "note": sheet.notes[i],
    }


def _legend(scale: Scale) -> dict[str, Any]:
    steps = [[scale.number(step), *scale.on_white(step)] for step in scale.steps()]
    return {"name": scale.name, "steps": steps}
