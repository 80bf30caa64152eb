"""Shows examples of any task as HTML: picture with boxes, references in the same colours, choices, answer.

``compare`` shows what a run targeted in them. Objects carry their index, so that nobody depends on colours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from tdlib.data.examples import Example, TextPart
from tdlib.views.html import direction_attribute, page, style
from tdlib.views.picture import frame, label, object_labels, overlaid
from tdlib.views.scale import BLACK, GREY, WHITE

# Paul Tol's bright scheme, safe for colour-blind readers; objects beyond the seventh start again.
COLOURS = ["#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#777777"]


def object_colour(index: int) -> str:
    """The colour of an object, in text and picture."""
    return COLOURS[index % len(COLOURS)]


def boxed_picture(example: Example, width: int) -> str:
    """The picture as HTML with every object's box and index; boxes that decide the answer are dashed."""
    over = [frame(box, f"3px solid {object_colour(i)}") for i, box in enumerate(example.boxes)]
    over += [label(x, y, str(i), WHITE, object_colour(i)) for i, x, y in object_labels(example.boxes)]
    over += [frame(box, f"2px dashed {BLACK}", casing=True) for box in example.relevant_boxes]
    objects = ", ".join(f"{i} {thing}" for i, thing in enumerate(example.names))
    alt = f"Picture of {example.id}" + (f" with boxes of {objects}" if objects else "")
    return overlaid(example.image, alt, over, width)


def text_html(part: TextPart) -> str:
    """A text as HTML: references have their object's colour and index, decisive words are underlined."""
    edges = {0, len(part.text)}
    for start, end in [*((r.start, r.end) for r in part.references), *part.relevant]:
        edges |= {start, end}
    cuts = sorted(edges)
    pieces = []
    for start, end in pairwise(cuts):
        piece = escape(part.text[start:end])
        reference = next((r for r in part.references if r.start <= start and end <= r.end), None)
        if any(first <= start and end <= last for first, last in part.relevant):
            piece = f'<span style="border-bottom: 2px dotted #1b1b1b">{piece}</span>'
        if reference:
            colour = object_colour(reference.objects[0])
            index = ",".join(map(str, reference.objects))
            piece = f'<b style="color: {colour}">{piece}<sub>{index}</sub></b>'
        pieces.append(piece)
    return "".join(pieces)


@dataclass(frozen=True, repr=False)
class Gallery:
    """Examples below each other, as HTML in a notebook and as text elsewhere."""

    html: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def gallery(
    examples: Sequence[Example] | Mapping[str, Example], labels: Sequence[str] = (), width: int = 300
) -> Gallery:
    """Shows examples, with pictures of ``width`` pixels; a mapping's keys head the rows.

    ``labels`` are the label set, where examples have no choices.
    """
    if isinstance(examples, Mapping):
        named = [*examples.items()]
    else:
        named = [(example.id, example) for example in examples]
    rows = [_row(name, example, labels, width) for name, example in named]
    lines = [f"{name}: {example.prompt.text} -> {_answer(example, labels)}" for name, example in named]
    legend = "Numbers are objects; dotted words and dashed boxes decide the answer (where that is known)."
    return Gallery(page(f"{''.join(rows)}<small>{legend}</small>"), "\n".join(lines))


def _answer(example: Example, labels: Sequence[str]) -> str:
    if example.label is None:
        return "no label"
    return example.choices[example.label].text if example.choices else labels[example.label] if labels else ""


def _element(tag: str, part: TextPart, before: str = "") -> str:
    return f"<{tag}{direction_attribute(part.text)}>{before}{text_html(part)}</{tag}>"


def _row(name: str, example: Example, labels: Sequence[str], width: int) -> str:
    """Name and kind, picture, and texts of an example beside each other, below where there is no room."""
    choices = "".join(
        _element("li", choice, "<b>&#10003;</b> " if i == example.label else "")
        for i, choice in enumerate(example.choices)
    )
    said = f"<p>{escape(', '.join(example.annotators))}</p>" if example.annotators else ""
    answer = "" if example.choices and example.label is not None else _answer(example, labels)
    parts = {
        "1 1 120px": f"<b>{escape(name)}</b><br><span {style(color=GREY)}>{escape(example.stratum)}</span>",
        f"0 1 {width}px": boxed_picture(example, width),
        "3 1 300px": f"{_element('p', example.prompt)}<ol start='0'>{choices}</ol>"
        f"<p><b>{escape(answer)}</b></p>{said}",
    }
    cells = "".join(f"<div {style(flex=size)}>{part}</div>" for size, part in parts.items())
    look = style(
        display="flex", flex_wrap="wrap", gap="12px", padding="6px 0", border_top="1px solid #cccccc",
        background_color=WHITE, color=BLACK, page_break_inside="avoid",
    )  # fmt: skip
    return f"<div {look}>{cells}</div>"
