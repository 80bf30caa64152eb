"""Types for places in a text and in a picture, which data, records and views share."""

from dataclasses import dataclass

Span = tuple[int, int]
"""Characters [start, end) of a raw string."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, normalised to the original picture ([0, 1])."""

GROUND_TRUTH = "ground truth"  # relevant spans and boxes that the data themselves state


@dataclass(frozen=True)
class Reference:
    """A stretch of text, characters [start, end), that names objects of the picture by their indices."""

    start: int
    end: int
    objects: tuple[int, ...]
