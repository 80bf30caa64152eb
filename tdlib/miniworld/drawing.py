"""Draws scenes as clean vector pictures, with the box and the outline of every object."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from tdlib.miniworld.canvas import COLOURS, GROUND, HAND_Y, SCALE, SIZE, Canvas, Drawn
from tdlib.miniworld.scenes import Person, Scene
from tdlib.miniworld.things import HELD_THINGS, THINGS

__all__ = ["COLOURS", "SIZE", "Drawn", "Picture", "draw"]


@dataclass
class Picture:
    """A drawn scene, with the outline of every object that words can be about."""

    image: Image.Image
    people: list[Drawn]
    faces: list[Drawn]
    hats: list[Drawn | None]
    held: list[Drawn | None]
    things: list[Drawn]
    landmark: Drawn  # the objects from which one recognises the place


def _place(canvas: Canvas, scene: Scene) -> Drawn:
    sky = {"sunny": "sky", "rainy": "rain", "snowy": "snow", "night": "dark", None: "wall"}[scene.weather]
    canvas.rect(0, 0, SIZE, 190, sky, edge=False)
    ground = {
        "street": "asphalt", "park": "grass", "beach": "sand", "kitchen": "tile", "classroom": "wood",
        "farm": "#b9a24d", "stage": "#6b4a2f", "station": "stone", "shop": "white", "camp": "#5d8a4a",
    }  # fmt: skip
    if scene.weather == "sunny":
        canvas.ellipse(226, 30, 17, 17, "yellow")
        for angle in range(0, 360, 45):
            x, y = np.cos(np.radians(angle)), np.sin(np.radians(angle))
            canvas.line([(226 + 21 * x, 30 + 21 * y), (226 + 28 * x, 30 + 28 * y)], "yellow", 3)
    if scene.weather == "night":
        canvas.ellipse(226, 30, 16, 16, "#fbf3c0")
        canvas.ellipse(219, 26, 14, 14, "dark", edge=False)
        for x, y in ((20, 22), (60, 12), (110, 26), (150, 10), (186, 48), (88, 52), (36, 58)):
            canvas.ellipse(x, y, 2.2, 2.2, "#fbf3c0", edge=False)
    canvas.rect(0, 176, SIZE, SIZE, ground[scene.place])
    with canvas.record() as landmark:
        _LANDMARKS[scene.place](canvas)
    return landmark


def _houses(canvas: Canvas) -> None:
    for left, top, colour in (
        (0, 60, "#c98b6b"),
        (62, 30, "#d8b36c"),
        (124, 72, "#a6b7c9"),
        (186, 44, "#c7a0a6"),
    ):
        canvas.rect(left, top, left + 58, 176, colour)
        for x in (left + 10, left + 34):
            for y in range(top + 12, 160, 34):
                canvas.rect(x, y, x + 13, y + 18, "#e9f4fb")
    canvas.rect(0, 212, SIZE, 216, "white", edge=False)


def _trees(canvas: Canvas) -> None:
    for x, y in ((30, 96), (92, 82), (158, 92), (220, 84)):
        canvas.rect(x - 6, y + 20, x + 6, 180, "brown")
        canvas.ellipse(x, y, 32, 36, "green")


def _sea(canvas: Canvas) -> None:
    canvas.rect(0, 122, SIZE, 178, "sea")
    for y in (134, 148, 162):
        for x in range(10, 250, 44):
            canvas.arc(x, y, 9, 4, 180, 360, "white", 2)
    canvas.polygon([(60, 120), (104, 120), (94, 134), (68, 134)], "white")
    canvas.polygon([(82, 84), (82, 116), (106, 116)], "white")


def _stove(canvas: Canvas) -> None:
    canvas.rect(0, 108, SIZE, 178, "#dfe3e6")
    for left in (4, 68, 132, 196):
        canvas.rect(left, 114, left + 56, 174, "#f6f3ea")
    canvas.rect(68, 100, 130, 178, "grey")
    canvas.rect(78, 128, 120, 166, "black")
    canvas.ellipse(99, 94, 22, 8, "black")
    canvas.rect(20, 20, 100, 62, "#e2c79b")
    canvas.rect(150, 14, 230, 70, "#cfe9f5")


def _blackboard(canvas: Canvas) -> None:
    canvas.rect(40, 26, 216, 116, "#2c5a45")
    canvas.rect(36, 114, 220, 122, "wood")
    for y, right in ((48, 150), (66, 190), (84, 120)):
        canvas.line([(56, y), (right, y)], "white", 3)


def _barn(canvas: Canvas) -> None:
    canvas.polygon([(20, 90), (70, 44), (120, 90), (120, 178), (20, 178)], "#b5352b")
    canvas.rect(50, 116, 90, 178, "white")
    canvas.line([(50, 116), (90, 178)], "#b5352b", 4)
    canvas.line([(90, 116), (50, 178)], "#b5352b", 4)
    for x in range(132, 256, 26):
        canvas.rect(x, 138, x + 8, 182, "white")
    canvas.rect(126, 148, SIZE, 155, "white")


def _curtains(canvas: Canvas) -> None:
    canvas.rect(0, 0, SIZE, 176, "#3a2a3f")
    for left in (0, 196):
        for x in range(left, left + 60, 15):
            canvas.rect(x, 0, x + 15, 178, "curtain")
    canvas.rect(0, 0, SIZE, 24, "curtain")
    canvas.polygon([(128, 20), (84, 178), (172, 178)], "#f6eaa5", edge=False)


def _shelter(canvas: Canvas) -> None:
    canvas.rect(30, 60, 190, 72, "#3c6ea8")
    for x in (36, 178):
        canvas.rect(x, 72, x + 7, 178, "grey")
    canvas.rect(43, 78, 178, 140, "#dcecf3")
    canvas.rect(224, 60, 229, 178, "grey")
    canvas.ellipse(226, 54, 20, 20, "yellow")
    canvas.rect(216, 46, 236, 60, "#3c6ea8")


def _shelves(canvas: Canvas) -> None:
    colours = ("red", "blue", "yellow", "green", "orange", "purple")
    for row, y in enumerate((14, 58, 102)):
        canvas.rect(8, y + 34, 248, y + 40, "wood")
        for column in range(10):
            colour = colours[(row * 2 + column) % 6]
            canvas.rect(14 + column * 23, y + 6 + 8 * (column % 2), 30 + column * 23, y + 34, colour)


def _tent(canvas: Canvas) -> None:
    canvas.polygon([(16, 178), (76, 74), (136, 178)], "orange")
    canvas.polygon([(60, 178), (76, 108), (94, 178)], "black")
    for x in (190, 214):
        canvas.polygon([(x - 24, 176), (x, 66), (x + 24, 176)], "#2f6b46")


_LANDMARKS = {
    "street": _houses, "park": _trees, "beach": _sea, "kitchen": _stove, "classroom": _blackboard,
    "farm": _barn, "stage": _curtains, "station": _shelter, "shop": _shelves, "camp": _tent,
}  # fmt: skip


def _face(canvas: Canvas, x: float, y: float, mood: str) -> None:
    skin = {"angry": "#e88d72", "sad": "#d9c7b8"}.get(mood, "skin")
    canvas.ellipse(x, y, 25, 26, skin)
    left, right = x - 9, x + 9
    if mood == "sleepy":
        for eye in (left, right):
            canvas.arc(eye, y - 5, 5, 4, 0, 180, "black", 2.5)
        canvas.line([(x - 4, y + 12), (x + 4, y + 12)], "black", 2.5)
        for size, (dx, dy) in ((7, (30, -22)), (10, (40, -36))):
            left, top, right, bottom = x + dx, y + dy, x + dx + size, y + dy + size
            canvas.line([(left, top), (right, top), (left, bottom), (right, bottom)], "blue", 2.5)
        return
    radius = 5.0 if mood == "surprised" else 3.2
    for eye in (left, right):
        canvas.ellipse(eye, y - 5, radius, radius, "white" if mood == "surprised" else "black")
        canvas.ellipse(eye, y - 5, 2.2, 2.2, "black")
    if mood == "happy":
        canvas.polygon([(x - 13, y + 5), (x + 13, y + 5), (x + 7, y + 15), (x - 7, y + 15)], "white")
    elif mood == "sad":
        canvas.arc(x, y + 18, 10, 8, 200, 340, "black", 3)
        canvas.ellipse(right + 3, y + 5, 3.4, 5.5, "blue")
    elif mood == "angry":
        canvas.line([(left - 7, y - 16), (left + 5, y - 10)], "black", 3.5)
        canvas.line([(right + 7, y - 16), (right - 5, y - 10)], "black", 3.5)
        canvas.line([(x - 10, y + 14), (x - 4, y + 10), (x + 4, y + 14), (x + 10, y + 10)], "black", 3)
    elif mood == "surprised":
        canvas.ellipse(x, y + 13, 6, 8, "black")
        for eye in (left, right):
            canvas.arc(eye, y - 15, 6, 4, 190, 350, "black", 2.5)


def _hat(canvas: Canvas, x: float, y: float, role: str) -> None:
    top = y - 20
    if role == "chef":
        canvas.rect(x - 18, top - 16, x + 18, top, "white")
        for shift in (-14, 0, 14):
            canvas.ellipse(x + shift, top - 20, 12, 11, "white")
    elif role == "builder":
        canvas.ellipse(x, top - 1, 25, 18, "yellow")
        canvas.rect(x - 31, top, x + 31, top + 6, "yellow")
    elif role == "police":
        canvas.polygon([(x - 29, top - 16), (x + 29, top - 16), (x + 22, top), (x - 22, top)], "dark")
        canvas.rect(x - 23, top, x + 23, top + 6, "black")
        canvas.ellipse(x, top - 8, 5, 5, "yellow")
    elif role == "doctor":
        canvas.rect(x - 20, top - 14, x + 20, top + 2, "white")
        canvas.rect(x - 3, top - 13, x + 3, top + 1, "red", edge=False)
        canvas.rect(x - 8, top - 9, x + 8, top - 3, "red", edge=False)
    elif role == "farmer":
        canvas.ellipse(x, top, 37, 8, "#e3bf63")
        canvas.ellipse(x, top - 8, 19, 14, "#e3bf63")
    elif role == "king":
        points = [(-22, 2), (-22, -22), (-11, -8), (0, -26), (11, -8), (22, -22), (22, 2)]
        canvas.polygon([(x + dx, top + dy) for dx, dy in points], "#f5c518")


def _person(canvas: Canvas, person: Person, x: float) -> tuple[Drawn, Drawn, Drawn | None]:
    """Draws one person with feet on the ground: body, face, hat."""
    hip, shoulder, head = GROUND - 50, GROUND - 108, GROUND - 136
    hand = (x + 42, HAND_Y)
    hat = None
    with canvas.record() as body:
        spread = 22 if person.pose == "running" else 9
        canvas.line([(x - 5, hip), (x - spread, GROUND)], "#3a3f55", 13)
        canvas.line([(x + 5, hip), (x + spread, GROUND)], "#3a3f55", 13)
        other = {"waving": (x - 44, shoulder - 26), "running": (x - 40, shoulder + 26)}.get(
            person.pose, (x - 31, shoulder + 52)
        )
        canvas.line([(x - 18, shoulder + 8), other], person.shirt, 12)
        canvas.line([(x + 18, shoulder + 8), hand], person.shirt, 12)
        canvas.polygon(
            [(x - 24, shoulder), (x + 24, shoulder), (x + 26, hip + 6), (x - 26, hip + 6)], person.shirt
        )
        canvas.ellipse(*other, 7, 7, "skin")
        canvas.ellipse(*hand, 7, 7, "skin")
        with canvas.record() as face:
            _face(canvas, x, head, person.mood)
        if person.role:
            with canvas.record() as hat:
                _hat(canvas, x, head, person.role)
    return body, face, hat


def _weather_in_front(canvas: Canvas, weather: str | None, rng: np.random.Generator) -> None:
    if weather == "rainy":
        for x, y in rng.uniform(0, SIZE, (60, 2)):
            canvas.line([(float(x), float(y)), (float(x) - 5, float(y) + 13)], "#3c6fae", 2)
    elif weather == "snowy":
        for x, y in rng.uniform(0, SIZE, (60, 2)):
            canvas.ellipse(float(x), float(y), 3.2, 3.2, "white")


_PEOPLE_AT: dict[int, list[float]] = {1: [100], 2: [58, 168], 3: [38, 112, 186]}
_THINGS_AT: dict[int, list[float]] = {1: [206, 36], 2: [226], 3: []}


def draw(scene: Scene) -> Picture:
    """The scene as a 256 x 256 picture, with everything that words can be about located."""
    rng = np.random.default_rng(scene.layout_seed)
    canvas = Canvas(scene.style)
    landmark = _place(canvas, scene)
    things = []
    for name, x in zip(scene.things, _THINGS_AT[len(scene.people)], strict=False):
        with canvas.record() as drawn:
            THINGS[name](canvas, x + float(rng.uniform(-5, 5)))
        things.append(drawn)
    centres = [x + float(rng.uniform(-8, 8)) for x in _PEOPLE_AT[len(scene.people)]]
    people = [_person(canvas, person, x) for person, x in zip(scene.people, centres, strict=True)]
    held: list[Drawn | None] = []  # after all people, so that nobody hides what a neighbour holds
    for person, x in zip(scene.people, centres, strict=True):
        with canvas.record() as drawn:
            if person.held:
                HELD_THINGS[person.held](canvas, x + 42, HAND_Y)
        held.append(drawn if person.held else None)
    _weather_in_front(canvas, scene.weather, rng)
    bodies, faces, hats = (list(column) for column in zip(*people, strict=True))
    image = canvas.image.reduce(SCALE)
    return Picture(image, bodies, faces, hats, held, things, landmark)
