"""Turns predictions for VCR into Q->AR scores, and into the leaderboard's CSV."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tdlib.core.files import whole_file
from tdlib.data.examples import DataError, Examples
from tdlib.data.reading import Rows, check_answers
from tdlib.data.vcr import parts_of


def joint_scores(predictions: pd.DataFrame, keys: Sequence[str] = ()) -> pd.DataFrame:
    """Computes Q->AR: a row per question, right if answer and rationale both are (r2c, eval_q2ar.py).

    Args:
        predictions: rows of answers and rationales with columns ``question``, ``part`` and ``score``;
            ``chance``, if it is there, is multiplied.
        keys: columns that tell predictions of one question apart, such as the run.

    Raises:
        ValueError: a question lacks one of the two.
    """
    keys = [*keys, "question"]
    guessed = {"chance": ("chance", "prod")} if "chance" in predictions else {}
    sizes = {"size": ("part", "size"), "parts": ("part", "nunique")}
    joint = predictions.groupby(keys, sort=False).agg(score=("score", "min"), **guessed, **sizes)
    if not (joint[["size", "parts"]] == 2).all(axis=None):
        raise ValueError("Q->AR needs answers and rationales of the same questions")
    answers = predictions[predictions["part"] == ""].drop(columns=["score", *guessed])
    return answers.merge(joint.drop(columns=["size", "parts"]).reset_index(), on=keys)


SUBMISSION_COLUMNS = (
    "annot_id",
    *(f"answer_{i}" for i in range(4)),
    *(f"rationale_conditioned_on_a{answer}_{i}" for answer in range(4) for i in range(4)),
)


def write_submission(path: Path, examples: Examples, probabilities: Sequence[Sequence[float]]) -> int:
    """Writes the leaderboard's CSV (annot_id and 20 columns); returns the number of questions.

    Numbers are written in full, so that reading them gives the same values: rounded, small ones would tie.

    Args:
        path: the file, written under a temporary name first.
        examples: of ``VcrReader(subtask="both")`` on a test split.
        probabilities: four numbers for each of them.

    Raises:
        DataError: a question lacks its answers or its rationales given one of the answers, or a number is not
            finite.
    """
    by_question: dict[str, dict[str, Sequence[float]]] = {}
    for question, part, numbers in zip(examples.questions, examples.parts, probabilities, strict=True):
        if not all(math.isfinite(number) for number in numbers):
            raise DataError(f"{path}: predictions for {question!r} are not finite; was it trained?")
        by_question.setdefault(question, {})[part] = numbers
    wanted = parts_of("both", labelled=False)
    rows = []
    for question, by_part in by_question.items():
        if lacking := [part for part in wanted if part not in by_part]:
            raise DataError(
                f"{path}: no predictions for the {'rationales' if lacking[0] else 'answers'} of "
                f"{question!r}; the leaderboard wants answers, and rationales given each answer: predict the "
                "test split with task='vcr'"
            )
        rows.append([question, *(repr(float(p)) for part in wanted for p in by_part[part])])
    with whole_file(path) as file:
        csv.writer(file, lineterminator="\n").writerows([SUBMISSION_COLUMNS, *rows])
    return len(rows)


def check_submission(path: Path, questions: Sequence[str]) -> list[str]:
    """Lists all faults of a leaderboard CSV for these questions.

    Raises:
        DataError: it is no table with these columns.
    """

    def fault(row: dict[str, str]) -> str:
        try:
            finite = all(math.isfinite(float(row[name])) for name in SUBMISSION_COLUMNS[1:])
        except ValueError:
            finite = False
        return "" if finite else "expected 20 finite numbers"

    rows = Rows(path, "VCR submission", SUBMISSION_COLUMNS)
    if rows and tuple(rows[0]) != SUBMISSION_COLUMNS:
        return [f"{path}:1: expected the header {','.join(SUBMISSION_COLUMNS)}"]
    return check_answers(path, rows, "annot_id", questions, fault)
