"""Small parts of HTML that survive JupyterLab's sanitiser: plain tags, inline hex and rgba colours.

The sanitiser drops scripts, style sheets, SVG and unknown colours in notebooks that are not trusted, so
nothing here needs them; every string from the data is escaped by the caller.
"""

import base64
from unicodedata import bidirectional

from tdlib.views.scale import BLACK, WHITE


def style(**properties: str) -> str:
    """A style attribute; ``font_size`` is written font-size."""
    rules = "; ".join(f"{name.replace('_', '-')}: {value}" for name, value in properties.items())
    return f'style="{rules}"'


def direction_attribute(text: str) -> str:
    """The attribute for an element of words: "rtl" or "ltr", by the first letter that has a direction.

    Empty where all letters run left to right.
    """
    strong = [kind for kind in map(bidirectional, text) if kind in ("L", "R", "AL")]
    if not {"R", "AL"} & {*strong}:
        return ""
    return ' dir="ltr"' if strong[0] == "L" else ' dir="rtl"'


def page(body: str) -> str:
    """The frame of every view; states its colours, as a dark theme would otherwise choose the text's."""
    frame = style(
        background_color=WHITE, color=BLACK, padding="8px", font_family="sans-serif", font_size="14px"
    )
    return f"<div {frame}>{body}</div>"


def source(content: bytes, kind: str = "png") -> str:
    """A picture as the address of an image element."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
