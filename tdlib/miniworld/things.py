"""The things of a scene: what people hold, and what stands beside them."""

import numpy as np

from tdlib.miniworld.canvas import GROUND, Canvas

# Held things, at the hand (x, y).


def _umbrella(canvas: Canvas, x: float, y: float) -> None:
    canvas.line([(x, y + 10), (x, y - 74)], "black", 3.5)
    points = [(x - 46.0, y - 66.0)]
    points += [(float(x + 46 * np.cos(t)), float(y - 66 - 34 * np.sin(t))) for t in np.linspace(np.pi, 0, 13)]
    canvas.polygon([*points, (x + 23, y - 58), (x, y - 66), (x - 23, y - 58)], "#d13f6f")


def _book(canvas: Canvas, x: float, y: float) -> None:
    canvas.polygon([(x - 24, y - 18), (x, y - 12), (x, y + 18), (x - 24, y + 12)], "white")
    canvas.polygon([(x + 24, y - 18), (x, y - 12), (x, y + 18), (x + 24, y + 12)], "white")
    for shift in (-8, 0, 8):
        canvas.line([(x - 20, y - 5 + shift), (x - 4, y - 1 + shift)], "grey", 2)
        canvas.line([(x + 4, y - 1 + shift), (x + 20, y - 5 + shift)], "grey", 2)


def _cup(canvas: Canvas, x: float, y: float) -> None:
    canvas.ellipse(x + 15, y, 9, 9, "white")
    canvas.rect(x - 15, y - 16, x + 14, y + 18, "#3aa6a0")
    canvas.ellipse(x, y - 16, 14, 4, "#5b3a1f")
    canvas.arc(x - 4, y - 28, 4, 7, 90, 270, "grey", 2)
    canvas.arc(x + 6, y - 28, 4, 7, 90, 270, "grey", 2)


def _ball(canvas: Canvas, x: float, y: float) -> None:
    canvas.ellipse(x, y, 22, 22, "white")
    canvas.ellipse(x, y, 8, 8, "black")
    for angle in range(0, 360, 72):
        a, b = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        canvas.ellipse(float(x + 18 * a), float(y + 18 * b), 4.5, 4.5, "black")


def _kite(canvas: Canvas, x: float, y: float) -> None:
    canvas.line([(x, y), (x + 20, y - 60)], "black", 2)
    top = y - 92
    canvas.polygon([(x + 20, top - 30), (x + 44, top), (x + 20, top + 36), (x - 4, top)], "red")
    canvas.polygon([(x + 20, top - 30), (x + 44, top), (x + 20, top)], "yellow")
    canvas.polygon([(x + 20, top + 36), (x - 4, top), (x + 20, top)], "blue")


def _cake(canvas: Canvas, x: float, y: float) -> None:
    canvas.rect(x - 26, y - 4, x + 26, y + 16, "#f4b8cf")
    canvas.rect(x - 20, y - 20, x + 20, y - 4, "#fdf3dc")
    for shift in (-11, 0, 11):
        canvas.rect(x + shift - 2, y - 33, x + shift + 2, y - 20, "blue")
        canvas.ellipse(x + shift, y - 37, 2.6, 4, "orange")


def _banana(canvas: Canvas, x: float, y: float) -> None:
    outer = [(float(x + 28 * np.cos(t)), float(y - 14 + 30 * np.sin(t))) for t in np.linspace(0.1, 2.6, 10)]
    inner = [
        (float(x - 2 + 20 * np.cos(t)), float(y - 18 + 18 * np.sin(t))) for t in np.linspace(2.5, 0.2, 10)
    ]
    canvas.polygon(outer + inner, "yellow")
    canvas.ellipse(outer[0][0] - 2, outer[0][1] - 4, 4, 5, "brown")


def _phone(canvas: Canvas, x: float, y: float) -> None:
    canvas.rect(x - 12, y - 24, x + 12, y + 20, "black")
    canvas.rect(x - 8, y - 18, x + 8, y + 10, "#8fd3f2")
    canvas.ellipse(x, y + 15, 3, 3, "white")


def _suitcase(canvas: Canvas, x: float, y: float) -> None:
    canvas.arc(x, y + 12, 9, 10, 180, 360, "black", 4)
    canvas.rect(x - 27, y + 12, x + 27, y + 54, "#7a4a26")
    for left in (x - 18, x + 10):
        canvas.rect(left, y + 12, left + 7, y + 54, "#d6a665")


def _racket(canvas: Canvas, x: float, y: float) -> None:
    canvas.line([(x, y + 12), (x + 8, y - 18)], "brown", 6)
    canvas.ellipse(x + 15, y - 40, 18, 24, "#2e7d4f")
    canvas.ellipse(x + 15, y - 40, 14, 20, "white")
    for shift in (-7, 0, 7):
        canvas.line([(x + 15 + shift, y - 58), (x + 15 + shift, y - 22)], "grey", 1.5)
        canvas.line([(x + 2, y - 40 + shift * 1.6), (x + 28, y - 40 + shift * 1.6)], "grey", 1.5)


def _teddy(canvas: Canvas, x: float, y: float) -> None:
    for shift in (-14, 14):
        canvas.ellipse(x + shift, y - 28, 8, 8, "brown")
        canvas.ellipse(x + shift, y + 18, 8, 9, "brown")
    canvas.ellipse(x, y + 6, 17, 18, "brown")
    canvas.ellipse(x, y - 16, 17, 15, "brown")
    canvas.ellipse(x, y - 11, 8, 6, "#dcb98e")
    for shift in (-6, 6):
        canvas.ellipse(x + shift, y - 20, 2, 2, "black")


def _flowers(canvas: Canvas, x: float, y: float) -> None:
    for shift, height, colour in ((-16, 32, "pink"), (0, 42, "purple"), (16, 32, "yellow")):
        canvas.line([(x, y + 18), (x + shift, y - height + 10)], "green", 3)
        for angle in range(0, 360, 72):
            a, b = 7 * np.cos(np.radians(angle)), 7 * np.sin(np.radians(angle))
            canvas.ellipse(float(x + shift + a), float(y - height + b), 5, 5, colour)
        canvas.ellipse(x + shift, y - height, 4, 4, "orange")


def _surfboard(canvas: Canvas, x: float, y: float) -> None:
    canvas.ellipse(x + 8, y - 20, 15, 66, "#35b5c9")
    canvas.rect(x + 5, y - 82, x + 11, y + 42, "white", edge=False)
    canvas.rect(x - 5, y - 30, x + 21, y - 20, "red", edge=False)


def _guitar(canvas: Canvas, x: float, y: float) -> None:
    canvas.line([(x - 4, y + 6), (x + 30, y - 44)], "black", 6)
    canvas.ellipse(x + 6, y - 8, 14, 14, "#c7702e")
    canvas.ellipse(x - 8, y + 12, 19, 18, "#c7702e")
    canvas.ellipse(x - 2, y + 3, 6, 6, "black")
    canvas.line([(x - 14, y + 20), (x + 28, y - 42)], "white", 1.5)


def _balloons(canvas: Canvas, x: float, y: float) -> None:
    for shift, height, colour in ((-20, 84, "red"), (4, 100, "yellow"), (28, 82, "blue")):
        canvas.line([(x, y), (x + shift, y - height + 20)], "black", 1.5)
        canvas.ellipse(x + shift, y - height, 15, 19, colour)


def _pizza(canvas: Canvas, x: float, y: float) -> None:
    canvas.polygon([(x - 26, y - 20), (x + 26, y - 20), (x, y + 28)], "#f2c24b")
    canvas.rect(x - 29, y - 28, x + 29, y - 18, "#c58a3e")
    for dx, dy in ((-10, -8), (9, -6), (0, 8)):
        canvas.ellipse(x + dx, y + dy, 5, 5, "red")


HELD_THINGS = {
    "umbrella": _umbrella, "book": _book, "cup": _cup, "ball": _ball, "kite": _kite, "cake": _cake,
    "banana": _banana, "phone": _phone, "suitcase": _suitcase, "racket": _racket, "teddy": _teddy,
    "flowers": _flowers, "surfboard": _surfboard, "guitar": _guitar, "balloons": _balloons, "pizza": _pizza,
}  # fmt: skip


# Things on the ground, around x.


def _four_legs(canvas: Canvas, x: float, size: float, colour: str, neck: float) -> tuple[float, float]:
    """Draws an animal's body; returns the place of its head."""
    top = GROUND - 30 * size
    for dx in (-18, -10, 12, 20):
        canvas.rect(x + dx * size - 3, top + 8 * size, x + dx * size + 3, GROUND, colour)
    canvas.ellipse(x, top, 27 * size, 13 * size, colour)
    head = (x - 28 * size, top - neck * size)
    canvas.line([(x - 18 * size, top), head], colour, 11 * size)
    return head


def _dog(canvas: Canvas, x: float) -> None:
    y = GROUND
    hx, hy = _four_legs(canvas, x, 0.95, "#c98f4e", 14)
    canvas.line([(x + 22, y - 34), (x + 34, y - 50)], "#c98f4e", 6)
    canvas.ellipse(hx, hy, 14, 11, "#c98f4e")
    canvas.ellipse(hx + 8, hy - 2, 5, 11, "brown")
    canvas.ellipse(hx - 13, hy + 1, 4, 3, "black")
    canvas.ellipse(hx - 4, hy - 4, 2, 2, "black")


def _cat(canvas: Canvas, x: float) -> None:
    y = GROUND
    canvas.arc(x + 22, y - 24, 14, 22, 270, 450, "#6f6f78", 6)
    canvas.ellipse(x, y - 18, 19, 19, "#6f6f78")
    for side in (-1, 1):
        canvas.polygon([(x + side * 4, y - 52), (x + side * 16, y - 66), (x + side * 17, y - 44)], "#6f6f78")
    canvas.ellipse(x, y - 42, 17, 14, "#6f6f78")
    for side in (-1, 1):
        canvas.ellipse(x + side * 7, y - 44, 3, 4, "#c8e05a")
        canvas.line([(x + side * 8, y - 36), (x + side * 24, y - 38)], "black", 1.5)


def _car(canvas: Canvas, x: float) -> None:
    y = GROUND
    canvas.polygon([(x - 22, y - 34), (x - 12, y - 52), (x + 16, y - 52), (x + 26, y - 34)], "#cfe9f5")
    canvas.rect(x - 38, y - 34, x + 38, y - 10, "red")
    for dx in (-22, 22):
        canvas.ellipse(x + dx, y - 9, 10, 10, "black")
        canvas.ellipse(x + dx, y - 9, 4, 4, "grey")


def _bench(canvas: Canvas, x: float) -> None:
    y = GROUND
    for dx in (-28, 24):
        canvas.rect(x + dx, y - 26, x + dx + 6, y, "black")
    for dy in (28, 40, 52):
        canvas.rect(x - 36, y - dy - 7, x + 36, y - dy, "wood")


def _tree(canvas: Canvas, x: float) -> None:
    y = GROUND
    canvas.polygon([(x - 14, y - 22), (x + 14, y - 22), (x + 10, y), (x - 10, y)], "#b5532b")
    canvas.line([(x, y - 22), (x, y - 40)], "brown", 5)
    for dx, dy in ((-14, -50), (14, -50), (0, -68), (0, -46)):
        canvas.ellipse(x + dx, y + dy, 15, 15, "green")


def _bird(canvas: Canvas, x: float) -> None:
    y = GROUND
    for dx in (-4, 5):
        canvas.line([(x + dx, y - 16), (x + dx, y)], "orange", 3)
    canvas.ellipse(x, y - 26, 20, 14, "#2b8fd0")
    canvas.ellipse(x - 17, y - 40, 11, 11, "#2b8fd0")
    canvas.polygon([(x - 27, y - 42), (x - 40, y - 37), (x - 26, y - 35)], "orange")
    canvas.polygon([(x - 2, y - 32), (x + 26, y - 42), (x + 16, y - 20)], "#1d5f94")
    canvas.ellipse(x - 19, y - 42, 2, 2, "black")


def _horse(canvas: Canvas, x: float) -> None:
    y = GROUND
    hx, hy = _four_legs(canvas, x, 1.25, "#7b4726", 26)
    canvas.ellipse(hx - 6, hy, 17, 9, "#7b4726")
    canvas.line([(hx + 8, hy - 8), (x - 20, y - 40)], "black", 7)
    canvas.line([(x + 32, y - 40), (x + 40, y - 12)], "black", 6)


def _cow(canvas: Canvas, x: float) -> None:
    y = GROUND
    hx, hy = _four_legs(canvas, x, 1.2, "white", 10)
    for dx, dy in ((-10, -40), (12, -34)):
        canvas.ellipse(x + dx, y + dy, 9, 7, "black", edge=False)
    canvas.ellipse(hx, hy, 13, 12, "white")
    canvas.ellipse(hx - 5, hy + 7, 9, 6, "pink")
    for dx in (-8, 8):
        canvas.line([(hx + dx, hy - 9), (hx + dx * 1.5, hy - 19)], "stone", 4)


def _bicycle(canvas: Canvas, x: float) -> None:
    y = GROUND
    for dx in (-22, 22):
        canvas.ellipse(x + dx, y - 19, 18, 18, "black")
        canvas.ellipse(x + dx, y - 19, 14, 14, "white")
    canvas.line([(x - 22, y - 19), (x - 8, y - 46), (x + 16, y - 46), (x + 22, y - 19)], "red", 4)
    canvas.line(
        [(x - 8, y - 46), (x + 2, y - 19), (x + 16, y - 46), (x + 12, y - 58), (x + 24, y - 60)], "red", 4
    )
    canvas.rect(x - 17, y - 54, x - 1, y - 49, "black")


def _clock(canvas: Canvas, x: float) -> None:
    y = GROUND
    canvas.rect(x - 4, y - 46, x + 4, y, "black")
    canvas.ellipse(x, y - 62, 25, 25, "white")
    canvas.line([(x, y - 62), (x, y - 80)], "black", 3)
    canvas.line([(x, y - 62), (x + 12, y - 56)], "black", 3)
    for angle in range(0, 360, 90):
        a, b = 20 * np.cos(np.radians(angle)), 20 * np.sin(np.radians(angle))
        canvas.ellipse(float(x + a), float(y - 62 + b), 2, 2, "black")


THINGS = {
    "dog": _dog,
    "cat": _cat,
    "car": _car,
    "bench": _bench,
    "tree": _tree,
    "bird": _bird,
    "horse": _horse,
    "cow": _cow,
    "bicycle": _bicycle,
    "clock": _clock,
}
