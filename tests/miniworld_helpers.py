"""What the tests of several data sets of the MiniWorld share: digests, lines, and a reader of phrases."""

import hashlib
import json
import re
from pathlib import Path

from tdlib.miniworld.drawing import SIZE
from tdlib.miniworld.scenes import HELD, Scene

SEED = 5


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def who(scene: Scene, words: str) -> list[int]:
    """People whom a phrase fits, by its words alone."""
    names = {name: re.sub(r"^\w+ ", "", entry.noun) for name, entry in HELD.items()}
    sides = {"left": 0, "middle": 1, "right": len(scene.people) - 1}
    if match := re.search(r"in the (\w+) shirt", words):
        return [i for i, p in enumerate(scene.people) if p.shirt == match[1]]
    if match := re.search(r"person on the (left|right)|person in the (middle)", words):
        return [sides[match[1] or match[2]]]
    if "the only person here" in words.lower():
        assert len(scene.people) == 1
        return [0]
    return [i for i, p in enumerate(scene.people) if p.held and f"with the {names[p.held]} " in f"{words} "]


def inside(marks: dict, text: str) -> None:
    """Spans are of whole words, boxes lie in the picture."""
    assert marks["spans"] and marks["boxes"]
    for start, end in marks["spans"]:
        assert 0 <= start < end <= len(text) and text[start:end] == text[start:end].strip(" .,?")
        assert re.fullmatch(r"\W?", text[end : end + 1]) and re.fullmatch(
            r"\W?", text[max(start - 1, 0) : start]
        )
    for left, top, right, bottom in marks["boxes"]:
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
