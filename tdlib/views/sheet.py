"""A sheet: one statement and its picture with a value for every token, whatever the values are.

Weights of a run, differences of two runs and attention are all drawn from sheets: as HTML by ``statement``
and ``picture``, as figures by ``figures.targets``, and by the explorer's page from ``scene``. So what a
word looks like is decided once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from tdlib.core.facts import facts, ground_truth, kinds, percent, shares, signed, title, token_name
from tdlib.core.records import TargetRecord
from tdlib.views.scale import Scale

NUMBERED = 10  # boxes whose number is drawn where every token has a value, as in attention


@dataclass(frozen=True)
class Piece:
    """A stretch of a statement without white space, with its token, if any, and the objects it ends on."""

    text: str
    token: int | None
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Sheet:
    """Values of the tokens of one record.

    ``values`` (tokens,) are shares of 1 on ``scale``; ``coloured`` (tokens,) says which have one at all,
    ``marked`` (tokens,) which are emphasised: bold and underlined words, outlined and numbered boxes.
    ``dotted`` (tokens,) which of these have a dotted line: those that only the first of two runs selected.
    ``notes`` are what a token says when the mouse rests on it, ``scores`` (tokens,) what the selector saw.
    ``name`` heads the sheet, ``about`` are facts of the record, ``below`` is what its numbers add up to.
    """

    record: TargetRecord
    values: np.ndarray
    coloured: np.ndarray
    marked: np.ndarray
    dotted: np.ndarray
    scale: Scale
    notes: tuple[str, ...]
    name: str = ""
    about: tuple[str, ...] = ()
    below: str = ""
    scores: np.ndarray | None = None

    @cached_property
    def truth(self) -> list[bool | None]:
        return ground_truth(self.record)

    @cached_property
    def regions(self) -> np.ndarray:
        """Positions of the visual tokens, large boxes first, so that small ones lie above them."""
        visual = np.flatnonzero(self.record.is_region)
        return visual[np.argsort(-areas(self.record.boxes[visual]).round(6), kind="stable")]


def areas(boxes: np.ndarray) -> np.ndarray:
    """The area of each box (tokens,), a share of the picture."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def weight_sheet(record: TargetRecord, highest: float, name: str = "", labels: Sequence[str] = ()) -> Sheet:
    """The weights of a record on the scale 0 to ``highest``."""
    notes = tuple(_weight_note(record, i) for i in range(len(record.tokens)))
    special = [
        f"{token_name(record, i)} {percent(float(record.weight[i]))} %"
        for i, kind in enumerate(kinds(record))
        if kind == "special" and record.selected[i]
    ]
    below = f"{shares(record)}; also selected: {', '.join(special)}" if special else shares(record)
    return Sheet(
        record, np.where(record.selected, record.weight, 0), record.selected, record.selected,
        np.zeros_like(record.selected), Scale(highest), notes, name,
        (title(record, labels), *map(" ".join, facts(record, labels).items())), f"{below}.", record.score,
    )  # fmt: skip


def _weight_note(record: TargetRecord, i: int) -> str:
    target = "" if record.distilled[i] else "no teacher target; "
    return (
        f"{target}relevance {record.relevance[i]:.3f}, prior {record.prior[i]:.3f}, "
        f"score {percent(float(record.score[i]))} %, weight {percent(float(record.weight[i]))} %"
    )


def difference_sheet(left: TargetRecord, right: TargetRecord, name: str, below: str) -> Sheet:
    """Weights of ``right`` minus those of ``left``, records of one statement with the same tokens."""
    first, second = (np.where(record.selected, record.weight, 0) for record in (left, right))
    either = left.selected | right.selected
    notes = tuple(
        f"{signed(b - a)} points: {percent(a)} % and {percent(b)} % of the weight"
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    )
    gap = second - first
    scale = Scale(float(np.abs(gap).max(initial=0)), "difference of weights, percentage points", signed=True)
    return Sheet(left, gap, either, either, left.selected & ~right.selected, scale, notes, name, (), below)


def value_sheet(record: TargetRecord, values: np.ndarray, name: str, what: str) -> Sheet:
    """A number of at least 0 for every token, such as attention: shares of their sum.

    Raises:
        ValueError: there is not one finite number per token.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(record.tokens),) or not np.isfinite(values).all():
        raise ValueError(
            f"values {values.shape} for {len(record.tokens)} tokens; expected one finite number each"
        )
    marked = np.zeros(len(values), dtype=bool)
    visual, words = np.flatnonzero(record.is_region), np.flatnonzero(record.is_text)
    for part in (visual, words):
        heaviest = part[np.argsort(-values[part], kind="stable")][:NUMBERED]
        marked[heaviest[values[heaviest] > 0]] = True
    parts = [("picture", record.is_region), ("words", record.is_text)]
    sums = [f"{key} {percent(float(values[mask].sum()))} %" for key, mask in parts]
    special = [
        (token_name(record, i), values[i]) for i, kind in enumerate(kinds(record)) if kind == "special"
    ]
    sums += [f"{token} {percent(float(value))} %" for token, value in special if value > 0]
    notes = tuple(f"{percent(float(value))} % {what}" for value in values)
    scale = Scale(float(values[record.is_text | record.is_visual].max(initial=0)), f"{what}, %")
    nowhere, below = np.zeros_like(marked), f"{', '.join(sums)}."
    return Sheet(record, values, values > 0, marked, nowhere, scale, notes, name, (), below)


# Words.


def words_of(record: TargetRecord) -> list[list[Piece]]:
    """The statement as words (between white space) of pieces (one token each), nothing left out or twice.

    A character belongs to the first token that covers it; a token that has none of its own (several
    byte-level tokens of one letter) follows its word in its own spelling.
    """
    tokens = sorted(np.flatnonzero(record.is_text).tolist(), key=lambda i: tuple(record.spans[i]))
    owners: list[int | None] = [None] * len(record.text)
    for i in reversed(tokens):
        start, end = record.spans[i].tolist()
        owners[start:end] = [i] * len(owners[start:end])
    places = [match.span() for match in re.finditer(r"\S+", record.text)] or [(0, 0)]
    words = [_pieces(record, owners, *place) for place in places]
    visible = {piece.token for word in words for piece in word}
    for i in tokens:
        if i not in visible:
            word = next((n for n, (_, end) in enumerate(places) if end > record.spans[i, 0]), -1)
            words[word].append(Piece(record.tokens[i], i, ()))
    return words


def _pieces(record: TargetRecord, owners: Sequence[int | None], start: int, end: int) -> list[Piece]:
    pieces = []
    for token, group in groupby(range(start, end), key=owners.__getitem__):
        first, *rest = group
        last = rest[-1] if rest else first
        objects = [o for r in record.references if first < r.end <= last + 1 for o in r.objects]
        pieces.append(Piece(record.text[first : last + 1], token, tuple(objects)))
    return pieces
