"""Draws a picture with boxes and visual tokens over it as HTML, and places the numbers on boxes.

A token's colour is transparent at 0 (``scale``), so that nothing bleaches the picture; the ``title`` of a
box says its numbers in words. If the picture's file is gone, a placeholder names it, and boxes, numbers and
texts are drawn all the same.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from tdlib.core.facts import token_name
from tdlib.core.files import file_state
from tdlib.data.examples import Box, DataError
from tdlib.data.pictures import open_picture
from tdlib.views.html import source, style
from tdlib.views.scale import BLACK, OBJECT, WHITE
from tdlib.views.sheet import Sheet, areas

LARGEST = 720  # pixels of a side, as embedded
WIDTH = 380  # pixels on the screen; twice as many are embedded, for dense screens and for paper
ROOM = (0.075, 0.045)  # least width and height of a box, in shares of the picture, that holds a number


def find_picture(path: Path) -> tuple[Image.Image | None, str]:
    """Opens a picture; None and what is wrong with the file where that fails, so that a view can go on."""
    try:
        return open_picture(path), ""
    except DataError as error:
        return None, str(error)


def embedded(path: Path) -> tuple[bytes, str]:
    """A picture as JPEG of at most ``LARGEST`` pixels a side, and what is wrong with the file.

    The bytes are empty if it cannot be read. Cached, because a list of examples is walked to and fro.
    """
    return _embedded(path, file_state(path))


@lru_cache(maxsize=32)
def _embedded(path: Path, _state: tuple[int, int] | None) -> tuple[bytes, str]:
    picture, missing = find_picture(path)
    if picture is None:
        return b"", missing
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue(), ""


def picture_html(sheet: Sheet) -> str:
    """Draws the picture of a sheet with boxes, frames and numbers, at most ``WIDTH`` pixels wide."""
    record = sheet.record
    over = [_region(sheet, int(i)) for i in sheet.regions]
    over += [frame(box, f"2px solid {OBJECT}") for box in record.object_boxes]
    over += [frame(box, f"2px dashed {BLACK}", casing=True) for box in record.relevant_boxes]
    over += [label(x, y, str(n), WHITE, OBJECT) for n, x, y in object_labels(record.object_boxes)]
    over += [
        label(x, y, sheet.scale.number(float(sheet.values[i])), BLACK, WHITE, sheet.notes[i])
        for i, x, y in number_labels(sheet)
    ]
    key = ", ".join(f"[{number}] {name}" for number, name in enumerate(record.object_names))
    below = f"<div {style(font_size='12px', margin='2px 0')}>{escape(key)}</div>" if key else ""
    return overlaid(record.image, described(sheet), over, WIDTH) + below


def overlaid(path: Path, alt: str, over: Sequence[str], width: int) -> str:
    """Lays HTML over a picture, at most ``width`` pixels wide; ``alt`` describes the picture in words."""
    content, missing = embedded(path)
    if missing:
        look = style(background_color="#eeeeee", padding="0 0 75% 0", font_size="12px", color=BLACK)
        ground = f"<div {look}></div>"
        missing = f"<div {style(font_size='12px', color=OBJECT, margin='2px 0')}>{escape(missing)}</div>"
    else:
        look = style(width="100%", display="block")
        ground = f'<img src="{source(content, "jpeg")}" alt="{escape(alt)}" {look}>'
    around = style(position="relative", width="100%", max_width=f"{width}px", line_height="1")
    return f"<div {around}>{ground}{''.join(over)}</div>{missing}"


def described(sheet: Sheet) -> str:
    """The alternative text of a sheet's picture: the heaviest boxes and their numbers."""
    record = sheet.record
    chosen = np.flatnonzero(sheet.marked & record.is_region)
    heaviest = chosen[np.argsort(-np.abs(sheet.values[chosen]), kind="stable")][:5]
    unit = " points" if sheet.scale.signed else " %"
    names = [
        f"{token_name(record, int(i))}: {sheet.scale.number(float(sheet.values[i]))}{unit}" for i in heaviest
    ]
    listing = f"the largest are {'; '.join(names)}" if names else "nothing is selected in it"
    return f"Picture of {record.example_id} with the values of its tokens; {listing}."


def _place(box: Sequence[float] | np.ndarray) -> dict[str, str]:
    left, top, right, bottom = (100 * float(value) for value in box)
    return {
        "position": "absolute", "left": f"{left:.2f}%", "top": f"{top:.2f}%",
        "width": f"{right - left:.2f}%", "height": f"{bottom - top:.2f}%",
    }  # fmt: skip


def _region(sheet: Sheet, i: int) -> str:
    look = _place(sheet.record.boxes[i]) | {"box_sizing": "border-box"}
    if sheet.coloured[i]:
        look["background_color"] = sheet.scale.css(float(sheet.values[i]))
    if sheet.marked[i]:
        line = "dotted" if sheet.dotted[i] else "solid"
        look |= {"border": f"1px {line} {BLACK}"}
    note = f"{token_name(sheet.record, i)}: {sheet.notes[i]}"
    return f'<div {style(**look)} data-token="{i}" title="{escape(note)}"></div>'


def frame(box: Box, line: str, casing: bool = False) -> str:
    """Draws a box as four lines: one element would keep the mouse from the tokens below it."""
    left, top, right, bottom = box
    look = {"outline": f"1px solid {WHITE}"} if casing else {}
    sides = [
        ((left, top, right, top), "border_top"), ((left, bottom, right, bottom), "border_top"),
        ((left, top, left, bottom), "border_left"), ((right, top, right, bottom), "border_left"),
    ]  # fmt: skip
    return "".join(f"<div {style(**_place(side), **{edge: line}, **look)}></div>" for side, edge in sides)


def label(x: float, y: float, text: str, colour: str, ground: str, note: str = "") -> str:
    """Writes a number centred at (x, y), in shares of the picture."""
    around = style(
        position="absolute", left=f"{100 * x - 6:.2f}%", top=f"{100 * y - 2.6:.2f}%", width="12%",
        text_align="center", font_size="10px",
    )  # fmt: skip
    look = style(background_color=ground, color=colour, padding="0 1px")
    hover = f' title="{escape(note)}"' if note else ""
    return f"<div {around}><span {look}{hover}>{text}</span></div>"


# Where numbers stand, in shares of the picture; shared with the figures.


def object_labels(boxes: Sequence[Box]) -> list[tuple[int, float, float]]:
    """Places each object's number: at a corner of its box that no other object's number takes."""
    taken: list[tuple[float, float]] = []
    labels = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        middle, centre = (left + right) / 2, (top + bottom) / 2
        corners = [(x, y) for y in (top, bottom, centre) for x in (left, right, middle)]
        places = [(min(max(x, 0.03), 0.97), min(max(y, 0.03), 0.97)) for x, y in corners]
        x, y = (_free(places, taken, 0.085) or places)[0]
        taken.append((x, y))
        labels.append((number, x, y))
    return labels


def number_labels(sheet: Sheet) -> list[tuple[int, float, float]]:
    """Places the number of each marked token that has room in its box and hides no other number."""
    record = sheet.record
    marked = np.flatnonzero(sheet.marked & record.is_region)
    marked = marked[
        np.argsort(areas(record.boxes[marked]), kind="stable")
    ]  # small boxes first: a large one has more room
    taken = [(x, y) for _, x, y in object_labels(record.object_boxes)]
    labels = []
    for i in marked.tolist():
        left, top, right, bottom = record.boxes[i]
        if right - left < ROOM[0] or bottom - top < ROOM[1]:
            continue
        wide = min(0.14, 0.99 * (right - left))
        if free := _free(_places(record.boxes[i], record.relevant_boxes), taken, wide):
            taken.append(free[0])
            labels.append((i, *free[0]))
    return labels


def _places(box: np.ndarray, frames: Sequence[Box]) -> list[tuple[float, float]]:
    """Lists places for a token's number in its box, first those where no line of a frame crosses it."""
    left, top, right, bottom = map(float, box)
    middle, centre = (left + right) / 2, (top + bottom) / 2
    across = [middle, *([left + 0.045, right - 0.045] if right - left > 0.12 else [])]
    down = [centre, *([bottom - 0.04, top + 0.04] if bottom - top > 0.09 else [])]
    places = [(x, y) for y in down for x in across]
    return sorted(places, key=lambda place: any(_runs_through(frame, *place) for frame in frames))


def _runs_through(frame: Box, x: float, y: float) -> bool:
    """True if a frame's line crosses a number at (x, y), which is 0.09 wide and 0.05 high."""
    left, top, right, bottom = frame
    wide, high = 0.055, 0.035
    meets = left - wide < x < right + wide and top - high < y < bottom + high
    inside = left + wide < x < right - wide and top + high < y < bottom - high
    return meets and not inside


def _free(
    places: list[tuple[float, float]], taken: list[tuple[float, float]], wide: float
) -> list[tuple[float, float]]:
    """Keeps the places where a number of this width hides none that is already placed."""
    return [(x, y) for x, y in places if all(abs(x - u) >= wide or abs(y - v) > 0.055 for u, v in taken)]
