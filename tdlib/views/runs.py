"""Views of several runs and of training: differences, evolution, instance weights, alignment, measures.

Each is a pure function of records (of ``records.read_records``) and returns a ``views.View``; its table
holds every number that it shows. Owns the HTML and the tables; ``run_plots`` draws and is imported only
when a picture is asked for. HTML keeps to what JupyterLab shows in an untrusted notebook, see ``views``.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from tdlib.analysis.masking import Curves
from tdlib.core.records import END, TargetRecord
from tdlib.data.examples import GROUND_TRUTH
from tdlib.method.alignment import align
from tdlib.method.tokens import Tokens
from tdlib.views.view import (
    BLACK,
    CELL,
    GREY,
    METHOD,
    WHITE,
    View,
    _page,
    _Piece,
    _statement,
    _style,
    _words,
    facts,
    ground_truth,
    highest_weight,
    ink,
    kinds,
    percent,
    title,
    token_name,
    truth_name,
)

if TYPE_CHECKING:
    from tdlib.teacher.cache import TeacherCache
    from tdlib.views.figures.targets import Figure

# Ends of the diverging scale: the first record weighs more, the second does.
MORE_FIRST, MORE_SECOND = (33, 102, 172), (179, 88, 6)
PICTURES = 3  # along an evolution


# Two runs.


def difference_table(left: TargetRecord, right: TargetRecord) -> pd.DataFrame:
    """One row per token of two records of one statement, of two runs or steps.

    ``weight_first``, ``weight_second`` and ``difference`` (second minus first) are shares of 1, 0 where
    not selected; ``change`` is "both", "gained" (only the second selects it), "lost" or "".

    Raises:
        ValueError: the records are of different statements, or of students with different tokens.
    """
    _same_tokens(left, right)
    first, second = (np.where(record.selected, record.weight, 0) for record in (left, right))
    change = np.select(
        [left.selected & right.selected, right.selected, left.selected], ["both", "gained", "lost"], ""
    )
    return pd.DataFrame(
        {
            "position": range(len(left.tokens)),
            "token": [token_name(left, i) for i in range(len(left.tokens))],
            "kind": kinds(left),
            "weight_first": first,
            "weight_second": second,
            "difference": second - first,
            "selected_first": left.selected,
            "selected_second": right.selected,
            "change": change,
        }
    )


def _same_tokens(left: TargetRecord, right: TargetRecord) -> None:
    names = [(record.split, record.example_id, record.choice) for record in (left, right)]
    if (left.example_id, left.choice, left.text) != (right.example_id, right.choice, right.text):
        raise ValueError(
            f"records of different statements, {names[0]} and {names[1]}: choose the same example and choice"
        )
    same = np.array_equal(left.spans, right.spans) and left.boxes.shape == right.boxes.shape
    if not (same and np.allclose(left.boxes, right.boxes, atol=1e-5)):
        raise ValueError(
            f"{names[0]}: the two students have different tokens ({len(left.tokens)} and "
            f"{len(right.tokens)}), so there is no difference per token; use views.comparison"
        )


def difference_view(
    left: TargetRecord,
    right: TargetRecord,
    names: Sequence[str] = ("first", "second"),
    labels: Sequence[str] = (),
) -> View:
    """Two runs (arms, seeds, steps) on one statement, and the difference of their weights.

    Differences are second minus first in percentage points, signed, on a scale from blue (the first
    weighs more) over white to orange. The table is ``difference_table``.

    Raises:
        ValueError: see ``difference_table``; or there are not two names.
    """
    if len(names) != 2:
        raise ValueError(f"{len(names)} names for two records: give one name per record")
    data = difference_table(left, right)
    gap = data["difference"].to_numpy()
    extent = float(np.abs(gap).max(initial=0))
    highest = highest_weight([left, right])
    cell, first = _style(**CELL), _style(**CELL, width="28%")
    rows = []
    for record, name in zip((left, right), names, strict=True):
        numbers = ", ".join(f"{key} {value}" for key, value in facts(record, labels).items())
        heading = f"<b>{escape(name)}</b><br><span {_style(color=GREY)}>{escape(numbers)}</span>"
        rows.append(_row(f"<td {first}>{heading}</td><td {cell}>{_statement(record, highest)}</td>"))
    what = f"<b>{escape(names[1])} − {escape(names[0])}</b><br>"
    what += f"<span {_style(color=GREY)}>{escape(_change_text(data))}</span>"
    words = _difference_statement(left, data, extent)
    rows.append(_row(f"<td {first}>{what}</td><td {cell}>{words}</td>"))

    def figure(bare: bool = False) -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_difference(left, right, names, title(left, labels), bare)

    whole = _style(border_collapse="collapse", width="100%", color=BLACK)
    table = f"<table {whole}><tbody>{''.join(rows)}</tbody></table>"
    picture = ""
    if left.is_visual.any():
        alt = f"Pictures of {left.example_id}: weights of both and their difference; {_heaviest(data)}."
        picture = _embedded(lambda: figure(bare=True), alt, 860)
    html = _page(f"<b>{escape(title(left, labels))}</b>{table}{picture}{_difference_legend(extent)}")
    text = f"{title(left, labels)}\n{names[1]} − {names[0]}: {_change_text(data)}\n{_heaviest(data, 10)}"
    return View(html, (left, right), figure, tuple(labels), data, text)


def difference_colour(value: float, extent: float) -> tuple[str, str]:
    """Background and text colour (hex) of a difference on the scale ``-extent`` to ``extent``."""
    share = float(np.clip(value / extent if extent > 0 else 0, -1, 1))
    end = MORE_SECOND if share > 0 else MORE_FIRST
    red, green, blue = (round(255 + abs(share) * (channel - 255)) for channel in end)
    return f"#{red:02x}{green:02x}{blue:02x}", ink(red, green, blue)


def _signed(share: float) -> str:
    text = percent(abs(share))
    return text if text == "0.0" else f"{'+' if share > 0 else '−'}{text}"


def _change_text(data: pd.DataFrame) -> str:
    counts = data["change"].value_counts()
    moved = float(data["difference"].abs().sum() / 2)
    parts = [f"{counts.get(name, 0)} {words}" for name, words in
             (("both", "selected in both"), ("gained", "gained"), ("lost", "lost"))]  # fmt: skip
    return f"{', '.join(parts)}; {percent(moved)} % of the weight moved"


def _heaviest(data: pd.DataFrame, count: int = 5) -> str:
    ranked = data.reindex(data["difference"].abs().sort_values(ascending=False, kind="stable").index)
    ranked = ranked[ranked["difference"].abs() > 0][:count]
    parts = [f"{row.token} {_signed(row.difference)}" for row in ranked.itertuples()]
    return f"largest differences (points): {'; '.join(parts)}" if parts else "no difference"


def _difference_statement(record: TargetRecord, data: pd.DataFrame, extent: float) -> str:
    """The statement with each token's signed difference below it."""
    style = _style(display="inline-block", white_space="nowrap", vertical_align="top", margin="0 2px 4px 0")
    rows = data.to_dict("records")
    words = [
        f"<span {style}>{''.join(_difference_piece(piece, rows, extent) for piece in word)}</span>"
        for word in _words(record)
    ]
    return f"<div {_style(line_height='1.35', font_size='16px')}>{' '.join(words)}</div>"


def _difference_piece(piece: _Piece, rows: list[dict], extent: float) -> str:
    row = None if piece.token is None else rows[piece.token]
    chosen = row is not None and row["change"] != ""
    background, colour = difference_colour(row["difference"], extent) if row and chosen else (WHITE, GREY)
    line = "dotted" if row and row["change"] == "lost" else "solid"
    look = _style(
        background_color=background,
        background_clip="padding-box",
        color=colour,
        border_bottom=f"3px {line} {BLACK if chosen else WHITE}",
        font_weight="bold" if chosen else "normal",
        padding="0 1px",
    )
    number = _signed(row["difference"]) if row and chosen else "&nbsp;"
    if row is None:
        note = "not a token of the student"
    else:
        note = f"{percent(row['weight_first'])} % and {percent(row['weight_second'])} % of the weight"
    return (
        f"<span {_style(display='inline-block', text_align='center', vertical_align='top')}>"
        f'<span {look} title="{escape(note)}">{escape(piece.text)}</span>'
        f"<br><span {_style(font_size='11px', color=BLACK, padding='0 2px')}>{number}</span></span>"
    )


def _difference_legend(extent: float) -> str:
    swatches = ""
    for step in (-1, -0.5, 0, 0.5, 1) if extent > 0 else ():
        background, colour = difference_colour(step * extent, extent)
        look = _style(background_color=background, color=colour, padding="1px 5px")
        swatches += f"<span {look}>{_signed(step * extent)}</span>"
    parts = [
        f"{swatches} difference of weights, percentage points (blue, −: the first weighs more)",
        f"<b {_style(border_bottom=f'3px solid {BLACK}')}>underlined</b> selected by the second",
        f"<b {_style(border_bottom=f'3px dotted {BLACK}')}>dotted</b> only by the first",
    ]
    look = _style(font_size="12px", line_height="1.8", border_top="1px solid #cccccc")
    return f"<div {look}>{' &nbsp;·&nbsp; '.join(parts)}</div>"


# Training.


def in_order(records: Sequence[TargetRecord]) -> list[TargetRecord]:
    """Records by step, the end last; otherwise in the given order."""
    return sorted(records, key=lambda record: math.inf if record.step == END else record.step)


def of_statement(
    records: Sequence[TargetRecord], example_id: str, choice: int | None = None, split: str | None = None
) -> list[TargetRecord]:
    """All records of one statement, by step; ``choice`` None takes the right one (else the first).

    Raises:
        ValueError: there is none.
    """
    own = [r for r in records if r.example_id == example_id and (split is None or r.split == split)]
    if choice is None and own:
        choices = {record.choice for record in own}
        choice = own[0].label if own[0].label in choices else min(choices)
    own = [record for record in own if record.choice == choice]
    if not own:
        known = list(dict.fromkeys(record.example_id for record in records))
        shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        raise ValueError(
            f"no record of {example_id!r}, choice {choice}; there are {shown or 'no records at all'}"
        )
    return in_order(own)


def _orders(records: Sequence[TargetRecord]) -> dict[int, int]:
    """The place of each step along the axis."""
    steps = dict.fromkeys(record.step for record in in_order(records))
    return {step: place for place, step in enumerate(steps)}


def evolution_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """One row per step and token of one statement's records.

    Columns ``step`` (END for the end), ``order`` (its place from 0), ``position``, ``token``, ``kind``,
    ``weight``, ``score``, ``relevance`` and ``selected``, the records' own numbers.

    Raises:
        ValueError: the records are of several statements or runs, or there are none.
    """
    records = _one_statement(records)
    orders = _orders(records)
    first = records[0]
    names = [token_name(first, i) for i in range(len(first.tokens))]
    frames = [
        pd.DataFrame(
            {
                "step": record.step,
                "order": orders[record.step],
                "position": range(len(names)),
                "token": names,
                "kind": kinds(record),
                "weight": record.weight,
                "score": record.score,
                "relevance": record.relevance,
                "selected": record.selected,
            }
        )
        for record in records
    ]
    return pd.concat(frames, ignore_index=True)


def _one_statement(records: Sequence[TargetRecord]) -> list[TargetRecord]:
    if not records:
        raise ValueError("no records; expected those of one statement at several steps")
    for record in records:
        _same_tokens(records[0], record)
    _once_per_step(records)
    return in_order(records)


def _once_per_step(records: Sequence[TargetRecord]) -> None:
    keys = [(record.split, record.example_id, record.choice, record.step) for record in records]
    twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if twice:
        raise ValueError(f"two records of {twice[:3]} at step {twice[3]}: pass the records of one run")


def turnover(before: np.ndarray, after: np.ndarray) -> float:
    """``1 - |A and B| / |A or B|`` of two boolean sets, in [0, 1]; 0 for two empty ones."""
    union = (before | after).sum()
    return float(1 - (before & after).sum() / union) if union else 0.0


def turnover_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """How large each statement's selected set is at each step, and how much of it is new.

    One row per statement and step: ``selected_text``, ``selected_visual`` (tokens), ``turnover_text``,
    ``turnover_visual`` and ``turnover`` against the statement's previous recorded step (missing at its
    first), and p_T, p_S and c; ``order`` is the step's place among all steps.

    Raises:
        ValueError: a statement has two records of one step.
    """
    _once_per_step(records)
    orders, rows = _orders(records), []
    last: dict[tuple, TargetRecord] = {}
    for record in in_order(records):
        key = record.split, record.example_id, record.choice
        visual = record.is_visual & ~record.is_text
        row = {
            "split": record.split, "example_id": record.example_id, "choice": record.choice,
            "step": record.step, "order": orders[record.step],
        }  # fmt: skip
        row["selected_text"] = int((record.selected & record.is_text).sum())
        row["selected_visual"] = int((record.selected & visual).sum())
        before = last.get(key)
        if before is not None:
            _same_tokens(before, record)
        every = np.ones_like(visual)
        for name, part in (("_text", record.is_text), ("_visual", visual), ("", every)):
            row[f"turnover{name}"] = (
                math.nan if before is None else turnover(before.selected & part, record.selected & part)
            )
        rows.append(row | _instance(record))
        last[key] = record
    return pd.DataFrame(rows)


def _instance(record: TargetRecord) -> dict[str, float]:
    numbers = record.teacher_probability, record.student_probability, record.instance_weight
    return {
        name: math.nan if value is None else value
        for name, value in zip(("p_T", "p_S", "c"), numbers, strict=True)
    }


def evolution_view(
    records: Sequence[TargetRecord], labels: Sequence[str] = (), most_visual: int = 16
) -> View:
    """One statement over training: tokens x steps as a heat map, set size and turnover, pictures.

    All text tokens and the ``most_visual`` visual tokens that weighed most on average are drawn; the
    table, ``evolution_table``, has all. Records are those of one statement and run, see ``of_statement``.

    Raises:
        ValueError: see ``evolution_table``.
    """
    records = _one_statement(records)
    data, steps = evolution_table(records), turnover_table(records)
    mean = data.assign(weight=data["weight"] * data["selected"]).groupby("position")["weight"].mean()
    first = records[0]
    visual = first.is_visual & ~first.is_text
    ever = np.flatnonzero(visual & np.any([record.selected for record in records], axis=0))
    ranked = ever[np.argsort(-mean.to_numpy()[ever], kind="stable")][:most_visual]
    drawn = np.concatenate([np.flatnonzero(first.is_text), np.sort(ranked)])
    hidden = f"{len(ranked)} of the {len(ever)} visual tokens that were ever selected (of {visual.sum()})"
    places = sorted({*np.linspace(0, len(records) - 1, PICTURES).round().astype(int)})
    shown = [records[place] for place in places] if visual.any() else []
    heading = f"{title(first, labels)} over training"

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        part = data[data["position"].isin(drawn)]
        decisive = {i for i, known in enumerate(ground_truth(first)) if known}
        return run_plots.plot_evolution(part, steps, shown, heading, hidden, decisive, truth_name([first]))

    text = "\n".join([heading, first.text, *_step_lines(steps)])
    alt = f"Heat map of {heading}: weights of tokens at {len(records)} steps."
    html = _page(
        f"<div><b>{escape(heading)}</b></div><div>{escape(first.text)}</div>"
        f"{_embedded(figure, alt, 760)}{_step_html(steps)}"
    )
    return View(html, tuple(records), figure, tuple(labels), data, text)


def turnover_view(records: Sequence[TargetRecord], method: str = METHOD) -> View:
    """Size and turnover of the selected sets over training: mean and quartiles over all statements.

    The table is ``turnover_table``, a row per statement and step.
    """
    if not records:
        raise ValueError("no records; expected those of several steps")
    data = turnover_table(records)
    statements = len(data.groupby(["split", "example_id", "choice"]))
    heading = f"{method}: selected tokens of {statements} statements over training"
    numbers = [
        "selected_text",
        "selected_visual",
        "turnover_text",
        "turnover_visual",
        "turnover",
        "p_T",
        "p_S",
        "c",
    ]
    means = data.groupby(["order", "step"], as_index=False)[numbers].mean()

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_turnover(data, heading)

    html = _page(
        f"<div><b>{escape(heading)}</b></div>{_embedded(figure, heading, 700)}{_step_html(means, 'mean ')}"
    )
    return View(html, tuple(records), figure, (), data, "\n".join([heading, *_step_lines(means)]))


STEP_COLUMNS = {
    "selected_text": "words", "selected_visual": "visual", "turnover_text": "turnover, words",
    "turnover_visual": "turnover, visual", "p_T": "p_T", "p_S": "p_S", "c": "c",
}  # fmt: skip


def _step_lines(steps: pd.DataFrame) -> list[str]:
    return [f"  step {row[0]:>6}  " + "  ".join(f"{n} {v}" for n, v in zip(STEP_COLUMNS.values(), row[1:],
            strict=True)) for row in _step_cells(steps)]  # fmt: skip


def _step_cells(steps: pd.DataFrame) -> list[list[str]]:
    rows = []
    for row in steps.sort_values("order").to_dict("records"):
        cells = ["end" if row["step"] == END else str(row["step"])]
        for name in STEP_COLUMNS:
            value = row[name]
            whole = name.startswith("selected") and float(value).is_integer()
            cells.append("" if math.isnan(value) else f"{value:.0f}" if whole else f"{value:.2f}")
        rows.append(cells)
    return rows


def _step_html(steps: pd.DataFrame, prefix: str = "") -> str:
    return _html_table(["step", *(prefix + name for name in STEP_COLUMNS.values())], _step_cells(steps))


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table of text; the first column is bold."""
    look = _style(padding="2px 8px", text_align="left", border_top="1px solid #cccccc", font_size="12px")
    head = "".join(f"<td {look}><b>{escape(name)}</b></td>" for name in header)
    body = "".join(
        _row("".join(f"<td {look}>{escape(cell) or '&nbsp;'}</td>" for cell in row)) for row in rows
    )
    return (
        f"<table {_style(border_collapse='collapse', color=BLACK)}><tbody>{_row(head)}{body}</tbody></table>"
    )


def _row(cells: str) -> str:
    """A table's row on white, also where a theme stripes rows or marks the one under the mouse."""
    return f"<tr {_style(background_color=WHITE)}>{cells}</tr>"


def instance_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """p_T, p_S (of the true label) and c per example and step; examples without a label are left out.

    Columns ``split``, ``example_id``, ``step``, ``order`` (its place from 0), ``p_T``, ``p_S``, ``c``.
    """
    orders = _orders(records)
    rows = {}
    for record in in_order(records):
        if record.instance_weight is None:
            continue
        key = {"split": record.split, "example_id": record.example_id, "step": record.step}
        rows[tuple(key.values())] = key | {"order": orders[record.step]} | _instance(record)
    return pd.DataFrame(rows.values(), columns=["split", "example_id", "step", "order", "p_T", "p_S", "c"])


def instance_view(records: Sequence[TargetRecord], example_id: str | None = None) -> View:
    """Instance weights: p_T, p_S and c of one example over training, and c over all examples.

    ``example_id`` names the example that is drawn by itself and marked among the others; None, none.
    The table is ``instance_table``.

    Raises:
        ValueError: no record has an instance weight, or none is of that example.
    """
    data = instance_table(records)
    if data.empty:
        raise ValueError(
            "no record has an instance weight: were the examples labelled, and was there a teacher?"
        )
    if example_id is not None and example_id not in set(data["example_id"]):
        known = ", ".join(data["example_id"].unique()[:8])
        raise ValueError(f"no instance weight of {example_id!r}; there are {known}")
    if example_id is None and data["example_id"].nunique() == 1:
        example_id = str(data["example_id"].iloc[0])
    heading = f"Instance weights of {data['example_id'].nunique()} examples"

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_instances(data, example_id, heading)

    names = ["p_T", "p_S", "c"]
    means = data.groupby(["order", "step"], as_index=False)[names].mean()
    spread = data.groupby("order")["c"].quantile([0, 0.25, 0.5, 0.75, 1]).unstack()
    header = [
        "step",
        "mean p_T",
        "mean p_S",
        "mean c",
        "c: lowest",
        "quartile",
        "median",
        "quartile",
        "highest",
    ]
    own = data[data["example_id"] == example_id].set_index("order")
    if example_id is not None:
        header += [f"{name} of {example_id}" for name in names]
    rows = []
    for row in means.to_dict("records"):
        numbers = [row[name] for name in names] + spread.loc[row["order"]].tolist()
        if example_id is not None:
            numbers += own[names].reindex([row["order"]]).iloc[0].tolist()
        step = "end" if row["step"] == END else str(row["step"])
        rows.append([step, *("" if math.isnan(value) else f"{value:.3f}" for value in numbers)])
    text = "\n".join([heading, ", ".join(header), *("  " + "  ".join(row) for row in rows)])
    html = _page(
        f"<div><b>{escape(heading)}</b></div>{_embedded(figure, heading, 760)}{_html_table(header, rows)}"
    )
    return View(html, tuple(records), figure, (), data, text)


# Alignment.


def teacher_positions(cache: "TeacherCache", record: TargetRecord) -> tuple[np.ndarray, np.ndarray]:
    """Spans (tokens, 2) and boxes (tokens, 4) of the teacher's tokens of a record's text and picture."""
    spans = cache.text(record.text).positions.numpy()
    boxes = cache.picture(record.image).positions.numpy()
    return spans, boxes


def alignment_table(
    record: TargetRecord, teacher_spans: np.ndarray, teacher_boxes: np.ndarray
) -> pd.DataFrame:
    """One row per pair of a student's and a teacher's token that overlap.

    ``share`` is the alignment's entry (``alignment.align``): how much of the student token's target
    the teacher's token makes up; a student token's rows sum to 1.
    """
    shares = _shares(record, teacher_spans, teacher_boxes)
    names = _teacher_names(record, teacher_spans, teacher_boxes)
    kind = kinds(record)
    rows = [
        (i, token_name(record, i), kind[i], j, names[j], float(shares[i, j]))
        for i, j in zip(*map(np.ndarray.tolist, np.nonzero(shares)), strict=True)
    ]
    columns = ["position", "token", "kind", "teacher_position", "teacher_token", "share"]
    return pd.DataFrame(rows, columns=columns)


def _shares(record: TargetRecord, spans: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    theirs = Tokens.cat(
        [Tokens.text(torch.as_tensor(spans).long()), Tokens.visual(torch.as_tensor(boxes).float())]
    )
    own = Tokens(torch.as_tensor(record.spans).long(), torch.as_tensor(record.boxes).float())
    return align(own, theirs).numpy()


def _teacher_names(record: TargetRecord, spans: np.ndarray, boxes: np.ndarray) -> list[str]:
    names = [record.text[start:end] for start, end in spans]
    return names + ["box {:.0f},{:.0f} to {:.0f},{:.0f} %".format(*(100 * box)) for box in boxes]


def alignment_view(
    record: TargetRecord,
    teacher_spans: np.ndarray,
    teacher_boxes: np.ndarray,
    token: int | None = None,
    labels: Sequence[str] = (),
) -> View:
    """Both tokenisations of a statement and its picture, and which tokens overlap.

    Args:
        record: any record of the statement; its student's tokens are shown.
        teacher_spans: (tokens, 2) characters of the teacher's text tokens, see ``teacher_positions``.
        teacher_boxes: (tokens, 4) of its patches, normalised xyxy.
        token: a visual token of the student whose shares are drawn; the heaviest if None.
        labels: the label set of a task without choices.

    Raises:
        ValueError: ``token`` is no visual token.
    """
    spans, boxes = np.asarray(teacher_spans).reshape(-1, 2), np.asarray(teacher_boxes).reshape(-1, 4)
    data, shares = alignment_table(record, spans, boxes), _shares(record, spans, boxes)
    visual = np.flatnonzero(record.is_visual & ~record.is_text)
    if token is not None and token not in visual:
        raise ValueError(f"token {token} is no visual token; these are {visual[:1]} to {visual[-1:]}")
    if token is None and len(visual):
        token = int(visual[np.argmax(record.weight[visual])])
    names = _teacher_names(record, spans, boxes)
    heading = f"{title(record, labels)}: tokens of student and teacher"
    on_grid = np.concatenate([np.zeros((len(spans), 4)), boxes])

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_alignment(record, shares, names, on_grid, heading, token)

    alone = int((record.is_text & (shares.sum(1) == 0)).sum())
    note = f"{record.is_text.sum()} words of the student, {len(spans)} of the teacher; "
    note += f"{alone} of the student's without a target; {len(visual)} and {len(boxes)} visual tokens"
    lines = [
        f"  {token_name(record, int(i))}: " + ", ".join(f"{names[j]} {percent(shares[i, j])} %" for j in row)
        for i in np.flatnonzero(record.is_text)
        if len(row := np.flatnonzero(shares[i]))
    ]
    html = _page(
        f"<div><b>{escape(heading)}</b> <span {_style(color=GREY)}>{escape(note)}</span></div>"
        f"{_two_rows(record, spans)}{_embedded(figure, heading, 760)}"
    )
    return View(html, (record,), figure, tuple(labels), data, "\n".join([heading, note, *lines]))


def _two_rows(record: TargetRecord, spans: np.ndarray, letters: int = 72) -> str:
    """The statement in lines of whole words, each with the student's cells above the teacher's."""
    own = [tuple(map(int, span)) for span in record.spans[record.is_text]]
    theirs = [tuple(map(int, span)) for span in spans]
    lines, start, text = [], 0, record.text
    while start < len(text):
        end = len(text) if len(text) - start <= letters else text.rfind(" ", start, start + letters) + 1
        end = end if end > start else min(len(text), start + letters)
        edges = sorted({start, end, *(min(max(p, start), end) for span in (*own, *theirs) for p in span)})
        rows = "".join(
            _cells(text, part, edges, name) for name, part in (("student", own), ("teacher", theirs))
        )
        style = _style(border_collapse="collapse", margin="4px 0", color=BLACK)
        lines.append(f"<table {style}><tbody>{rows}</tbody></table>")
        start = end
    return "".join(lines)


def _cells(text: str, spans: Sequence[tuple[int, ...]], edges: Sequence[int], name: str) -> str:
    """One tokenisation of a line as table cells; a cell spans as many stretches as the token covers."""
    look = _style(color=GREY, font_size="11px", padding="0 6px 0 0", text_align="left")
    cells = [f"<td {look}>{name}</td>"]
    place = 0
    while place < len(edges) - 1:
        start = edges[place]
        span = next((s for s in spans if s[0] <= start < s[1]), None)
        # a token ends where its span does, or at the next stretch that another token begins
        stop = next((q for q in range(place + 1, len(edges)) if span and edges[q] >= span[1]), None)
        if span is None:
            stop = place + 1
        stop = stop or len(edges) - 1
        line = BLACK if span else WHITE
        style = _style(
            border=f"1px solid {line}", background_color=WHITE, padding="1px 2px", text_align="center",
            white_space="nowrap", font_size="13px", color=BLACK if span else GREY,
        )  # fmt: skip
        shown = escape(text[start : edges[stop]].strip()) or "&nbsp;"
        cells.append(f'<td colspan="{stop - place}" {style}>{shown}</td>')
        place = stop
    return _row("".join(cells))


# Measures of the targeting.


def quality_view(quality: pd.DataFrame, method: str = METHOD) -> View:
    """A ``targeting.targeting_quality`` as a figure and a table: the targeting beside its baselines.

    Values with 95 % intervals over pictures; the table's gains are targeting minus baseline, paired.

    Raises:
        ValueError: there are no rows.
    """
    if quality.empty:
        raise ValueError("no rows: the measures have nothing to show")
    heading = f"{method}: targeted tokens"
    if (truth := quality["truth"].iloc[0] if "truth" in quality else "") not in ("", GROUND_TRUTH):
        heading += f" against {truth}, which stand in for the ground truth"

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_quality(quality, heading)

    rows = []
    for row in quality.to_dict("records"):
        gain = ""
        if not math.isnan(row.get("gain", math.nan)):
            gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        rows.append(
            [row["modality"], row["metric"], row["source"], value, gain, f"{row['n']}, {row['pictures']}"]
        )
    header = [
        "modality",
        "metric",
        "source",
        "mean [95 %]",
        "gain of the targeting [95 %]",
        "records, pictures",
    ]
    text = "\n".join([heading, ", ".join(header), *("  " + "  ".join(row) for row in rows)])
    html = _page(
        f"<div><b>{escape(heading)}</b></div>{_embedded(figure, heading, 860)}{_html_table(header, rows)}"
    )
    return View(html, (), figure, (), quality, text)


def curves_view(
    record: TargetRecord, curves: Mapping[str, Curves], labels: Sequence[str] = (), unit: str = "probability"
) -> View:
    """Deletion and insertion curves of one record, such as ``targeting.record_curves`` gives.

    ``curves`` by source; ``unit`` is the scorer's. Table: ``source``, ``fraction``, ``deletion``,
    ``insertion``.
    """
    data = pd.concat(
        [
            pd.DataFrame({"source": source, "fraction": c.fraction, "deletion": c.deletion,
                          "insertion": c.insertion})
            for source, c in curves.items()
        ],
        ignore_index=True,
    )  # fmt: skip
    areas = pd.DataFrame(
        {source: {"deletion": c.deletion_area, "insertion": c.insertion_area} for source, c in curves.items()}
    ).T
    heading = f"{title(record, labels)}: masking tokens"

    def figure() -> "Figure":
        from tdlib.views.figures import runs as run_plots

        return run_plots.plot_curves(data, areas, heading, unit)

    rows = [[str(source), *(f"{value:.3f}" for value in row)] for source, *row in areas.itertuples()]
    header = ["source", "deletion, mean height", "insertion, mean height"]
    text = "\n".join([heading, ", ".join(header), *("  " + "  ".join(row) for row in rows)])
    html = _page(
        f"<div><b>{escape(heading)}</b></div>{_embedded(figure, heading, 720)}{_html_table(header, rows)}"
    )
    return View(html, (record,), figure, tuple(labels), data, text)


def _embedded(figure: Callable[[], "Figure"], alt: str, width: int) -> str:
    from tdlib.views.figures import targets as plots

    data = base64.b64encode(plots.to_png(figure(), dpi=110)).decode()
    return f'<br><img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}">'
