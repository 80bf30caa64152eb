"""The canvas of scenes: draws shapes in one style and records the outlines of objects.

Coordinates are pixels of a 256 x 256 picture; drawing happens at twice the size and is reduced.
"""

import colorsys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageColor, ImageDraw

SIZE = 256
SCALE = 2
GROUND = 238  # feet stand here
HAND_Y = GROUND - 74  # held things start here

COLOURS = {
    "red": "#d8342c", "blue": "#2f62c9", "green": "#2f9a48", "yellow": "#f3c623", "purple": "#8a45b5",
    "orange": "#ee7f22", "white": "#f6f6f2", "black": "#26262b", "brown": "#8a5a33", "grey": "#8d939c",
    "pink": "#ef8fb4", "skin": "#f0c6a0", "dark": "#1d2b4f", "sand": "#ecd9a0", "sea": "#3f8fc4",
    "grass": "#86c268", "sky": "#bfe3f7", "rain": "#9fb0bf", "snow": "#eef3f7", "wood": "#b98a56",
    "wall": "#f1e6cf", "tile": "#d7dde2", "asphalt": "#a4a6ab", "curtain": "#93263c", "stone": "#c9b7a1",
}  # fmt: skip


@dataclass
class Drawn:
    """The polygons, in pixels, that one object left on the canvas."""

    polygons: list[list[tuple[float, float]]] = field(default_factory=list)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy in pixels, clipped to the picture."""
        points = np.clip(np.array([point for polygon in self.polygons for point in polygon]), 0, SIZE)
        (left, top), (right, bottom) = points.min(0), points.max(0)
        return float(left), float(top), float(right), float(bottom)


class Canvas:
    """Draws shapes in one style, and adds each to the outlines of all objects that are being recorded."""

    def __init__(self, style: str):
        self.style = style
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), "#ffffff")
        self._draw = ImageDraw.Draw(self.image)
        self._open: list[Drawn] = []

    @contextmanager
    def record(self) -> Iterator[Drawn]:
        """Records the outlines of all that is drawn in the context; contexts may be nested."""
        drawn = Drawn()
        self._open.append(drawn)
        yield drawn
        self._open.remove(drawn)

    def _colour(self, name: str) -> tuple[int, int, int]:
        red, green, blue = ImageColor.getrgb(COLOURS.get(name, name))[:3]
        if self.style == "pastel":
            red, green, blue = (int(value * 0.5 + 255 * 0.5) for value in (red, green, blue))
        elif self.style == "sketch":
            red, green, blue = (int(value * 0.28 + 255 * 0.72) for value in (red, green, blue))
        elif self.style == "noir":
            grey = int(255 * (colorsys.rgb_to_yiq(red / 255, green / 255, blue / 255)[0] ** 1.3))
            red = green = blue = grey
        return red, green, blue

    def _note(self, polygon: list[tuple[float, float]]) -> None:
        for drawn in self._open:
            drawn.polygons.append(polygon)

    def polygon(self, points: list[tuple[float, float]], colour: str, edge: bool = True) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.polygon(scaled, self._colour(colour))
        if edge and self.style != "pastel":
            width = round(1.5 * SCALE * (1.4 if self.style == "sketch" else 1.0))
            self._draw.line([*scaled, scaled[0]], (25, 25, 30), width, joint="curve")
        self._note(points)

    def rect(
        self, left: float, top: float, right: float, bottom: float, colour: str, edge: bool = True
    ) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, edge)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: str, edge: bool = True) -> None:
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        self.polygon([(float(x + rx * np.cos(t)), float(y + ry * np.sin(t))) for t in turn], colour, edge)

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, self._colour(colour), round(width * SCALE), joint="curve")
        half = width / 2
        xs, ys = [x for x, _ in points], [y for _, y in points]
        left, top, right, bottom = min(xs) - half, min(ys) - half, max(xs) + half, max(ys) + half
        self._note([(left, top), (right, top), (right, bottom), (left, bottom)])

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, colour: str, width: float
    ) -> None:
        turn = np.radians(np.linspace(start, end, 13))
        self.line([(float(x + rx * np.cos(t)), float(y + ry * np.sin(t))) for t in turn], colour, width)
