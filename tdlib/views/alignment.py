"""Shows which teacher tokens make up each student token's target: both tokenisations of a statement."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from tdlib.core.facts import kinds, title, token_names
from tdlib.core.records import TargetRecord
from tdlib.data.examples import DataError
from tdlib.method.alignment import align
from tdlib.method.tokens import Tokens
from tdlib.teacher.cache import TeacherCache
from tdlib.views.figures.targets import plot_alignment
from tdlib.views.view import View


def tokens_of(record: TargetRecord, batched: bool = False) -> Tokens:
    """Positions of a record's tokens in the form that the method takes; ``batched``: as a batch of one."""
    spans, boxes = torch.as_tensor(record.spans).long(), torch.as_tensor(record.boxes).float()
    return Tokens(spans[None], boxes[None]) if batched else Tokens(spans, boxes)


def teacher_positions(cache: TeacherCache, record: TargetRecord) -> tuple[np.ndarray, np.ndarray]:
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


def alignment_view(
    record: TargetRecord,
    teacher_spans: np.ndarray,
    teacher_boxes: np.ndarray,
    labels: Sequence[str] = (),
) -> View:
    """Show both tokenisations of a statement and its picture, and which tokens overlap.

    Spans (tokens, 2), in characters, and boxes (tokens, 4), normalised xyxy, are the teacher's, see
    ``teacher_positions``; the student's tokens are those of the record. On the picture the shares of the
    heaviest visual token are drawn. Table: a row per pair of a student's and a teacher's token that overlap;
    ``share`` is how much of the student token's target the teacher's token makes up
    (``method.alignment.align``), so that a student token's rows sum to 1.
    """
    spans, boxes = np.asarray(teacher_spans).reshape(-1, 2), np.asarray(teacher_boxes).reshape(-1, 4)
    theirs = Tokens.cat(
        [Tokens.text(torch.as_tensor(spans).long()), Tokens.visual(torch.as_tensor(boxes).float())]
    )
    shares = align(tokens_of(record), theirs).numpy()
    their_names = [record.text[start:end] for start, end in spans]
    their_names += ["box {:.0f},{:.0f} to {:.0f},{:.0f} %".format(*(100 * box)) for box in boxes]
    names, kind = token_names(record), kinds(record)
    overlaps = [
        (i, names[i], kind[i], j, their_names[j], float(shares[i, j]))
        for i, j in zip(*map(np.ndarray.tolist, np.nonzero(shares)), strict=True)
    ]
    columns = ["position", "token", "kind", "teacher_position", "teacher_token", "share"]
    data = pd.DataFrame(overlaps, columns=columns)
    visual = np.flatnonzero(record.is_region)
    token = int(visual[np.argmax(record.weight[visual])]) if len(visual) else None
    heading = f"{title(record, labels)}: tokens of student and teacher"
    on_grid = np.concatenate([np.zeros((len(spans), 4)), boxes])
    alone = int((record.is_text & (shares.sum(1) == 0)).sum())
    note = f"{record.is_text.sum()} words of the student, {len(spans)} of the teacher; "
    note += f"{alone} of the student's without a target; {len(visual)} and {len(boxes)} visual tokens"
    arguments = {
        "record": record, "shares": shares, "teacher_names": their_names, "teacher_boxes": on_grid,
        "heading": heading, "token": token,
    }  # fmt: skip
    words = data[data["kind"] == "text"]
    shared = zip(words["teacher_token"], words["share"], strict=True)
    parts = [f"{name} {100 * share:.0f} %" for name, share in shared]
    by_word = words.assign(teacher=parts).groupby("position", sort=True)
    rows = by_word.agg({"token": "first", "teacher": ", ".join})
    rows = rows.rename(columns={"token": "student's word", "teacher": "made of the teacher's"})
    return View(heading, plot_alignment, arguments, data, rows, note)
