"""Shows a re-paired lesson: a text with another example's picture, and how CLIP and the student judge it.

Beside it stands how both judge the text with its own picture, before and after the training if the run
recorded both. Re-pairing is beyond the paper, see ``method.pairing``.
"""

from collections.abc import Sequence

import pandas as pd

from tdlib.core.records import TargetRecord
from tdlib.views.evolution import in_order
from tdlib.views.figures.lesson import BARS, plot_lesson
from tdlib.views.figures.style import step_name
from tdlib.views.view import View

OWN, OTHER = "its own picture", "the other picture"


def lesson_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """Make a row per record and picture with the probabilities of CLIP and of the student.

    Columns ``split``, ``example_id``, ``step``, ``choice``, ``text``, ``picture`` ("its own picture" or "the
    other picture"), ``file``, ``teacher`` and ``student`` (probabilities among the statements that CLIP
    judges), ``weight`` (of the pair in the loss; missing for its own picture, which is no lesson).
    """
    rows = []
    for record in records:
        for picture, file, teacher, student, weight in (
            (OWN, record.image, record.teacher_choice, record.student_choice, None),
            (OTHER, record.other_image, record.teacher_other, record.student_other, record.lesson_weight),
        ):
            assert file is not None
            shown = {
                "split": record.split, "example_id": record.example_id, "step": record.step,
                "choice": record.choice, "text": record.text, "picture": picture, "file": file.name,
                "teacher": teacher, "student": student, "weight": weight,
            }  # fmt: skip
            rows.append(shown)
    return pd.DataFrame(rows)


def lesson_view(records: Sequence[TargetRecord], labels: Sequence[str] = ()) -> View:
    """Show both pictures of a lesson and all distributions over the choices, before and after training.

    "Before" is the first recorded step, where there are several; a student that chooses its own lessons
    (``repair_choice="disagreement"``) may then have been shown another picture, of which nothing is drawn.
    ``records`` are those of one example of one run, with all its choices, at any steps; ``labels`` the
    label set of a task without choices.

    Raises:
        ValueError: the records are of several examples, or none has a lesson.
    """
    if len({(record.split, record.example_id) for record in records}) > 1:
        raise ValueError("records of several examples; expected those of one, see read_records(examples=...)")
    kept = [record for record in in_order(records) if record.other_image is not None]
    if not kept:
        raise ValueError(
            "no record has a re-paired lesson: the run re-pairs nothing, CLIP judges other texts than the "
            "student reads (VQA), or there was no other picture"
        )
    first, last = kept[0].step, kept[-1].step
    now = [record for record in kept if record.step == last]
    other = now[0].other_image
    assert other is not None
    data = lesson_table(kept)
    shown = data[data["file"].isin([now[0].image.name, other.name])]
    parts = [("CLIP", last, "teacher"), ("student", last, "student")]
    parts += [("student before", first, "student")] if first != last else []
    drawn = pd.concat([
        shown[shown["step"] == step].assign(who=who, probability=shown[name]) for who, step, name in parts
    ])  # fmt: skip
    texts = [f"{record.text}{_answer(record, labels)}" for record in now]
    arguments = {
        "pictures": {OWN: now[0].image, OTHER: other}, "texts": texts, "table": drawn,
        "heading": f"{now[0].example_id}: its texts with another picture",
    }  # fmt: skip
    steps = f", student after step {step_name(last)}" if first == last else f", student before: step {first}"
    note = f"the pair weighs {now[0].lesson_weight:.2f} in the loss{steps}"
    rows = (100 * drawn.set_index(["choice", "text", "picture", "who"])["probability"]).unstack()
    rows = rows[[name for name in BARS if name in rows]].round(1).add_suffix(" (%)").reset_index()
    rows = rows.sort_values(["picture", "choice"], kind="stable").rename_axis(columns=None)
    return View(arguments["heading"], plot_lesson, arguments, data, rows, note)


def _answer(record: TargetRecord, labels: Sequence[str]) -> str:
    if labels:
        return "" if record.label is None else f" ({labels[record.label]})"
    return " (true)" if record.choice == record.label else ""
