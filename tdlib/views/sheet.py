"""A sheet: one statement and its picture with a value for every token, whatever the values are.

Weights of a run, differences of two runs and attention are all drawn from sheets: as HTML by ``statement``
and ``picture``, and as figures by ``figures.targets``. So what a word looks like is decided once.
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

    All arrays are (tokens,). ``values`` are shares of 1 on ``scale``; ``coloured`` is True for tokens that
    have a value at all, ``marked`` for tokens that are emphasised: bold and underlined words, outlined and
    numbered boxes. ``dotted`` is True for marked tokens that only the first of two runs selected; their line
    is dotted. ``scores`` are the numbers that the selector chose by; None where nothing is selected by them.
    ``notes`` are the texts that appear when the mouse rests on a token. ``name`` heads the sheet, ``about``
    are facts of the record, ``below`` says what its numbers add up to.
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

    @property
    def is_selection(self) -> bool:
        """True if marked tokens are the selected ones; else they are the largest, as in attention."""
        return self.marked is self.coloured

    @cached_property
    def regions(self) -> np.ndarray:
        """Positions of the visual tokens, large boxes first, so that small ones lie above them."""
        visual = np.flatnonzero(self.record.is_region)
        return visual[np.argsort(-areas(self.record.boxes[visual]).round(6), kind="stable")]


def areas(boxes: np.ndarray) -> np.ndarray:
    """The area of each box (tokens,), a share of the picture."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def marks_of(sheets: Sequence[Sheet], words: bool = True, picture: bool = True) -> set[str]:
    """Names the marks that occur in these sheets, so that a legend explains these and no others.

    ``words`` and ``picture`` say which half is drawn. HTML and figures draw the same marks differently, so
    each has its text for a mark; whether it occurs is decided here for both.
    """
    records = [sheet.record for sheet in sheets]
    selections = [sheet for sheet in sheets if sheet.is_selection]
    occurs = {
        "selected": any(sheet.marked.any() for sheet in selections),
        "largest": bool(sheets) and not selections,
        "first alone": any(sheet.dotted.any() for sheet in sheets),
        "score": words and any(sheet.scores is not None for sheet in sheets),
        "no target": words and any((~s.record.distilled & s.record.is_text).any() for s in selections),
        "decisive word": words and any(record.relevant_spans for record in records),
        "decisive box": picture and any(record.relevant_boxes for record in records),
        "object": picture and any(record.object_boxes for record in records),
        "reference": words and any(record.references for record in records),
    }
    return {mark for mark, is_there in occurs.items() if is_there}


def weight_sheet(record: TargetRecord, highest: float, name: str = "", labels: Sequence[str] = ()) -> Sheet:
    """Makes the sheet of a record's weights on the scale 0 to ``highest``."""
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
    """Makes the sheet of weights of ``right`` minus those of ``left``, of one statement and its tokens."""
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
    """Makes the sheet of a number of at least 0 for every token, such as attention: shares of their sum.

    Raises:
        ValueError: there is not one finite number per token.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(record.tokens),) or not np.isfinite(values).all():
        raise ValueError(
            f"values {values.shape} for {len(record.tokens)} tokens; expected one finite number each"
        )
    marked = np.zeros(len(values), dtype=bool)
    # Each modality has numbers: attention to either can be so small that the other would take them all.
    for part in (np.flatnonzero(record.is_region), np.flatnonzero(record.is_text)):
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
    """Splits the statement into words (at white space) of pieces (one token each), each letter once.

    A character belongs to the first token that covers it. Where several byte-level tokens share one letter,
    the others have no character left: they follow the word, spelled as the tokenizer spells them.
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
