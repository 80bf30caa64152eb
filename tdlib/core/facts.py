"""Derives from a record what views and measures show: titles, shares in %, the tokens that decide.

Choices and objects carry their index in the data (from 0); weights and scores are shown in %.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdlib.core.records import TargetRecord

HALF = 0.5 - 1e-6  # share of a patch inside a box; the margin is for the rounding of boxes


def title(record: TargetRecord, labels: Sequence[str] = ()) -> str:
    """Name a record: "val-12, choice 2 (true)", or "e-7 (neutral)" where the task has a label set.

    A record does not say whether its task has choices: pass the names of the ``labels`` where it has not.
    """
    if labels:
        return record.example_id if record.label is None else f"{record.example_id} ({labels[record.label]})"
    truth = "" if record.label is None else " (true)" if record.choice == record.label else " (false)"
    return f"{record.example_id}, choice {record.choice}{truth}"


def facts(record: TargetRecord, labels: Sequence[str] = ()) -> dict[str, str]:
    """Label, prediction, p_T and p_S (of the true label) and instance weight c as text, where known."""

    def name(index: int) -> str:
        return labels[index] if labels else str(index)

    texts = {"label": "unknown" if record.label is None else name(record.label)}
    if record.prediction is not None:
        verdict = (
            "" if record.label is None else " (right)" if record.label == record.prediction else " (wrong)"
        )
        texts["prediction"] = name(record.prediction) + verdict
    numbers = {
        "p_T": record.teacher_probability,
        "p_S": record.student_probability,
        "c": record.instance_weight,
    }
    return texts | {symbol: f"{value:.3f}" for symbol, value in numbers.items() if value is not None}


def percent(share: float) -> str:
    """Writes a share of 1 in % with one decimal, without the sign."""
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    """Writes a difference of shares in points with its sign; "0.0" where there is none."""
    text = percent(abs(share))
    return text if text == "0.0" else f"{'+' if share > 0 else '−'}{text}"


def highest_weight(records: Sequence[TargetRecord]) -> float:
    """Returns the largest weight of a selected token, to end a colour scale; 0 where none is selected."""
    return max((float(record.weight[record.selected].max(initial=0)) for record in records), default=0.0)


def shares(record: TargetRecord) -> str:
    """Describes how many words and patches are selected, and each modality's share of the weight."""
    parts = []
    for name, mask in (("text tokens", record.is_text), ("visual tokens", record.is_region)):
        chosen = record.selected & mask
        weight = percent(float(record.weight[chosen].sum()))
        parts.append(f"{chosen.sum()} of {mask.sum()} {name} selected, {weight} % of the weight")
    return "; ".join(parts)


def relevant_tokens(record: TargetRecord) -> np.ndarray:
    """Marks the student's tokens that decide the statement, with or without a teacher target: (tokens,).

    The one definition that views and measures share. Words: those that share a character with a
    relevant span. Visual tokens (our reading): those at least half of which lie in one relevant box; where
    no token lies half inside a box, as with objects smaller than half a patch, the one that fits it
    best by intersection over union (among patches of one size: the one that holds its largest share),
    ties together. All False where the record knows no span or box: see ``ground_truth``.
    """
    words = np.zeros(len(record.spans), dtype=bool)
    for start, end in record.relevant_spans:
        words |= (record.spans[:, 0] < end) & (record.spans[:, 1] > start)
    visual, boxes = record.is_region, record.boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    patches = np.zeros(len(boxes), dtype=bool)
    for left, top, right, bottom in record.relevant_boxes:
        width = np.clip(np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left), 0, None)
        height = np.clip(np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top), 0, None)
        both = width * height * visual
        inside = visual & (both > 0) & (both >= HALF * area)
        if not inside.any() and both.any():
            fit = np.divide(both, area + (right - left) * (bottom - top) - both, where=visual,
                            out=np.zeros_like(both))  # fmt: skip
            inside = fit >= fit.max() * (1 - 1e-4)
        patches |= inside
    return (words & record.is_text) | patches


def ground_truth(record: TargetRecord) -> list[bool | None]:
    """Tells of each token whether it decides the answer (``relevant_tokens``).

    None where the record does not know: no relevant span for words, no relevant box for visual tokens.
    """
    text = record.is_text & bool(record.relevant_spans)
    visual = record.is_region & bool(record.relevant_boxes)
    decides = relevant_tokens(record)
    return [bool(yes) if known else None for yes, known in zip(decides, text | visual, strict=True)]


def truth_name(records: Sequence[TargetRecord]) -> str:
    """Names where the records' relevant spans and boxes come from: "ground truth", or a proxy."""
    truths = (record.truth for record in records if record.relevant_spans or record.relevant_boxes)
    return " or ".join(dict.fromkeys(truths))


def kinds(record: TargetRecord) -> list[str]:
    """Sorts tokens into "text", "visual" and "special" (neither span nor box); with both, it is text."""
    return [
        "text" if text else "visual" if visual else "special"
        for text, visual in zip(record.is_text, record.is_visual, strict=True)
    ]


def token_name(record: TargetRecord, index: int) -> str:
    """Names a token in a list by its text, or by "box" with its corners in % of the picture."""
    if record.is_text[index] or not record.is_visual[index]:
        return record.tokens[index] or f"token {index}"
    left, top, right, bottom = (f"{100 * value:.0f}" for value in record.boxes[index])
    return f"box {left},{top} to {right},{bottom} %"


def token_names(record: TargetRecord) -> list[str]:
    """``token_name`` of every token."""
    return [token_name(record, i) for i in range(len(record.tokens))]


def table(records: TargetRecord | Sequence[TargetRecord]) -> pd.DataFrame:
    """Makes a table of the tokens with unrounded numbers; ``span`` or ``box`` is None where absent.

    ``ground_truth`` is <NA> where it is not known (see ``ground_truth``).
    """
    frames = []
    for record in (records,) if isinstance(records, TargetRecord) else records:
        kind = kinds(record)
        columns = {
            "split": record.split,
            "example_id": record.example_id,
            "choice": record.choice,
            "position": range(len(record.tokens)),
            "token": record.tokens,
            "kind": kind,
            "span": [
                tuple(map(int, s)) if k == "text" else None for s, k in zip(record.spans, kind, strict=True)
            ],
            "box": [
                tuple(map(float, b)) if k == "visual" else None
                for b, k in zip(record.boxes, kind, strict=True)
            ],
            "distilled": record.distilled,
            "relevance": record.relevance,
            "prior": record.prior,
            "score": record.score,
            "selected": record.selected,
            "weight": record.weight,
            "ground_truth": pd.array(ground_truth(record), dtype="boolean"),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
