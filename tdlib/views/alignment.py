"""Which teacher tokens a student's token is made of: both tokenisations of a statement and its picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tdlib.core.facts import kinds, title, token_names
from tdlib.core.records import TargetRecord
from tdlib.data.examples import DataError
from tdlib.views.figures.targets import plot_alignment
from tdlib.views.view import View

if TYPE_CHECKING:
    from tdlib.teacher.cache import TeacherCache


def teacher_positions(cache: "TeacherCache", record: TargetRecord) -> tuple[np.ndarray, np.ndarray]:
    """Spans (tokens, 2) and boxes (tokens, 4) of the teacher's tokens of a record's text and picture.

    No boxes where the picture can no longer be read.
    """
    cache.add(texts=[record.text])
    spans = cache.text(record.text).positions.numpy()
    try:
        cache.add(pictures=[record.image])
        boxes = cache.picture(record.image).positions.numpy()
    except DataError:
        boxes = np.zeros((0, 4))
    return spans, boxes


def alignment_table(
    record: TargetRecord, teacher_spans: np.ndarray, teacher_boxes: np.ndarray
) -> pd.DataFrame:
    """One row per pair of a student's and a teacher's token that overlap.

    ``share`` is the alignment's entry (``method.alignment.align``): how much of the student token's target
    the teacher's token makes up; a student token's rows sum to 1.
    """
    shares = _shares(record, teacher_spans, teacher_boxes)
    names, theirs = token_names(record), _teacher_names(record, teacher_spans, teacher_boxes)
    kind = kinds(record)
    rows = [
        (i, names[i], kind[i], j, theirs[j], float(shares[i, j]))
        for i, j in zip(*map(np.ndarray.tolist, np.nonzero(shares)), strict=True)
    ]
    columns = ["position", "token", "kind", "teacher_position", "teacher_token", "share"]
    return pd.DataFrame(rows, columns=columns)


def _shares(record: TargetRecord, spans: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    import torch  # here, so that views of records alone do not wait for it

    from tdlib.method.alignment import align
    from tdlib.method.tokens import Tokens

    theirs = Tokens.cat(
        [Tokens.text(torch.as_tensor(spans).long()), Tokens.visual(torch.as_tensor(boxes).float())]
    )
    student = Tokens(torch.as_tensor(record.spans).long(), torch.as_tensor(record.boxes).float())
    return align(student, theirs).numpy()


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
    visual = np.flatnonzero(record.is_region)
    if token is not None and token not in visual:
        raise ValueError(f"token {token} is no visual token; these are {visual[:1]} to {visual[-1:]}")
    if token is None and len(visual):
        token = int(visual[np.argmax(record.weight[visual])])
    names = _teacher_names(record, spans, boxes)
    heading = f"{title(record, labels)}: tokens of student and teacher"
    on_grid = np.concatenate([np.zeros((len(spans), 4)), boxes])
    alone = int((record.is_text & (shares.sum(1) == 0)).sum())
    note = f"{record.is_text.sum()} words of the student, {len(spans)} of the teacher; "
    note += f"{alone} of the student's without a target; {len(visual)} and {len(boxes)} visual tokens"
    arguments = {
        "record": record, "shares": shares, "teacher_names": names, "teacher_boxes": on_grid,
        "heading": heading, "token": token,
    }  # fmt: skip
    words = data[data["kind"] == "text"]
    parts = words["teacher_token"] + " " + (100 * words["share"]).map("{:.0f} %".format)
    rows = (
        words.assign(teacher=parts)
        .groupby("position", sort=True)
        .agg({"token": "first", "teacher": ", ".join})
    )
    rows = rows.rename(columns={"token": "student's word", "teacher": "made of the teacher's"})
    return View(heading, plot_alignment, arguments, data, rows, note, records=(record,))
