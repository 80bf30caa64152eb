"""Shows statements and pictures with the weights of their tokens: one, several, or two runs compared."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdlib.core.facts import highest_weight, kinds, percent, table, title, token_names
from tdlib.core.records import TargetRecord
from tdlib.views.figures.targets import plot_sheets
from tdlib.views.sheet import Sheet, difference_sheet, value_sheet, weight_sheet
from tdlib.views.view import METHOD, View, sheets_html, token_rows


def sheets_view(
    heading: str, sheets: Sequence[Sheet], data: pd.DataFrame, words: bool = True, picture: bool = True,
    note: str = "",
) -> View:  # fmt: skip
    """Make a view of any sheets; sheets of one scale share a legend and the range of their colour bars."""
    arguments = {"sheets": sheets, "heading": heading, "words": words, "picture": picture}
    body = sheets_html(sheets, words, picture)
    return View(heading, plot_sheets, arguments, data, token_rows(sheets), note, body, tuple(sheets))


def comparison(
    records: TargetRecord | Sequence[TargetRecord],
    names: Sequence[str] = (),
    method: str = METHOD,
    labels: Sequence[str] = (),
    words: bool = True,
    picture: bool = True,
) -> View:
    """Show a row per record (choices of a question, or arms, or examples): numbers, picture, statement.

    Each token is coloured by its weight, on one scale for all rows, words and pictures together. ``names``
    (of arms, say) head the rows; ``words`` and ``picture`` say which half is shown.

    Raises:
        ValueError: there are no records, or not one name per record.
    """
    records = (records,) if isinstance(records, TargetRecord) else tuple(records)
    if not records:
        raise ValueError("comparison: no records; expected at least one TargetRecord")
    if names and len(names) != len(records):
        raise ValueError(f"{len(names)} names for {len(records)} records: give one name per record, or none")
    highest = highest_weight(records)
    sheets = [
        weight_sheet(record, highest, name, labels)
        for record, name in zip(records, names or [""] * len(records), strict=True)
    ]
    return sheets_view(method, sheets, table(records), words, picture)


# Two runs, or two steps of one.


def same_tokens(left: TargetRecord, right: TargetRecord) -> None:
    """Raises a ValueError if the records are of different statements, or of students with other tokens."""
    names = [(record.split, record.example_id, record.choice) for record in (left, right)]
    if (left.example_id, left.choice, left.text) != (right.example_id, right.choice, right.text):
        raise ValueError(
            f"records of different statements, {names[0]} and {names[1]}: choose the same example and choice"
        )
    same = np.array_equal(left.spans, right.spans) and left.boxes.shape == right.boxes.shape
    if not (same and np.allclose(left.boxes, right.boxes, atol=1e-5)):
        raise ValueError(
            f"{names[0]}: the two students have different tokens ({len(left.tokens)} and "
            f"{len(right.tokens)}), so there is no difference per token; use compare.comparison"
        )


def difference_view(
    left: TargetRecord,
    right: TargetRecord,
    names: Sequence[str] = ("first", "second"),
    labels: Sequence[str] = (),
) -> View:
    """Show two runs (arms, seeds, steps) on one statement, and the difference of their weights.

    Both runs share one scale, words and pictures together. Differences are second minus first in percentage
    points with their sign; they have another scale and legend. The table has one row per token:
    ``weight_first``, ``weight_second`` and ``difference`` are shares of 1, 0 where not selected; ``change``
    is "both", "gained" (only the second selects it), "lost" or "".

    Raises:
        ValueError: the records are of different statements, or of students with different tokens.
    """
    if len(names) != 2:
        raise ValueError(f"{len(names)} names for two records: give one name per record")
    same_tokens(left, right)
    first, second = (np.where(record.selected, record.weight, 0) for record in (left, right))
    change = np.select(
        [left.selected & right.selected, right.selected, left.selected], ["both", "gained", "lost"], ""
    )
    data = pd.DataFrame({
        "position": range(len(left.tokens)), "token": token_names(left), "kind": kinds(left),
        "weight_first": first, "weight_second": second, "difference": second - first,
        "selected_first": left.selected, "selected_second": right.selected, "change": change,
    })  # fmt: skip
    both, gained, lost = ((change == name).sum() for name in ("both", "gained", "lost"))
    moved = f"{both} selected in both, {gained} gained, {lost} lost; "
    moved += f"{percent(float(data['difference'].abs().sum() / 2))} % of the weight moved."
    highest = highest_weight([left, right])
    sheets = [
        weight_sheet(record, highest, name, labels) for record, name in zip((left, right), names, strict=True)
    ]
    sheets.append(difference_sheet(left, right, f"{names[1]} − {names[0]}", moved))
    return sheets_view(title(left, labels), sheets, data, note=f"{names[1]} − {names[0]}: {moved}")


def values_view(
    record: TargetRecord, values: np.ndarray, method: str, query: str = "", what: str = "",
    labels: Sequence[str] = (),
) -> View:  # fmt: skip
    """Show a number of at least 0 per token, such as attention, on the picture and in the statement.

    ``method`` names model, layers and heads, ``query`` the token whose attention it is, ``what`` the whole of
    which the numbers are shares. Table: ``position``, ``token``, ``value``.
    """
    what = what or (f"of the attention of {query}" if query else "of all relevance")
    sheet = value_sheet(record, values, method, what)
    data = pd.DataFrame(
        {"position": range(len(record.tokens)), "token": token_names(record), "value": sheet.values}
    )
    note = f"{method}; query {query}" if query else method
    return sheets_view(title(record, labels), [sheet], data, note=note)
