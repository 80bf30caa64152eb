"""Colour scales of views: transparent at 0, one hue that darkens up to the largest value of the view.

Words, boxes and figures of a view share one ``Scale``. Over a picture the hue's alpha is the value, so
that the picture stays as it is where nothing weighs; on white the same mixture is a tint. A scale of
differences has a hue per sign, blue for less and orange for more, as dark as each other: signs are
therefore written as well. Nothing is told by hue alone, and both scales are monotonic in grey.
"""

from dataclasses import dataclass

import numpy as np

from tdlib.core.facts import percent, signed

WHITE, BLACK, GREY, OBJECT = "#ffffff", "#1b1b1b", "#6b6b6b", "#c24e00"
HUE = (74, 20, 134)  # of weights: a violet, dark in grey print and seldom met in pictures
LESS, MORE = (33, 102, 172), (179, 88, 6)  # of differences; equally dark
DARKEST = 0.85  # alpha of the largest value: what lies below can still be made out


@dataclass(frozen=True)
class Scale:
    """The colours of a view: from 0, or from ``-end`` where ``signed``, to ``end`` (shares of 1).

    ``name`` says in legends and on colour bars what is coloured.
    """

    end: float
    name: str = "weight in % of all selected tokens"
    signed: bool = False

    def rgba(self, value: float) -> tuple[int, int, int, float]:
        """Hue (0 to 255) and alpha (0 to ``DARKEST``) of a value; beyond an end, those of the end."""
        place = float(np.clip(value / self.end if self.end > 0 else 0, -1 if self.signed else 0, 1))
        hue = HUE if not self.signed else MORE if place > 0 else LESS
        return (*hue, round(DARKEST * abs(place), 3))

    def css(self, value: float) -> str:
        """The colour over a picture."""
        return "rgba({}, {}, {}, {:g})".format(*self.rgba(value))

    def on_white(self, value: float) -> tuple[str, str]:
        """Background and text colour (hex) of a value in running text."""
        *hue, alpha = self.rgba(value)
        red, green, blue = (round(255 + alpha * (channel - 255)) for channel in hue)
        return f"#{red:02x}{green:02x}{blue:02x}", ink(red, green, blue)

    def number(self, value: float) -> str:
        """A value as text: % without a sign, or percentage points with it."""
        return signed(value) if self.signed else percent(value)

    def steps(self) -> list[float]:
        """Values that a legend shows, lowest first; none where nothing has a value."""
        if self.end <= 0:
            return []
        return [
            share * self.end for share in ((-1, -0.5, 0, 0.5, 1) if self.signed else (0, 0.25, 0.5, 0.75, 1))
        ]


def ink(red: int, green: int, blue: int) -> str:
    """Black or white (hex), whichever is read better on this ground: a contrast of at least 4.5 (WCAG 2)."""
    linear = [
        (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))  # black and white are equal at 0.179
    return "#000000" if luminance > 0.179 else WHITE
