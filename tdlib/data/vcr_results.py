"""Turns predictions for VCR into Q->AR scores, and into the leaderboard's CSV."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from tdlib.core.files import whole_file
from tdlib.data.examples import DataError, Examples
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
                f"{path}: no predictions for the {'rationales' if lacking[0] else 'answers'} of {question!r}; "
                "the leaderboard wants answers, and rationales given each answer: predict the test split with "
                "task='vcr'"
            )
        rows.append([question, *(repr(float(p)) for part in wanted for p in by_part[part])])
    with whole_file(path) as file:
        csv.writer(file, lineterminator="\n").writerows([SUBMISSION_COLUMNS, *rows])
    return len(rows)


def check_submission(path: Path, identifiers: Iterable[str]) -> list[str]:
    """Lists all faults of a leaderboard CSV, given the ids of the test questions."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [f"{path}: not readable as CSV ({error})"]
    if not rows or tuple(rows[0]) != SUBMISSION_COLUMNS:
        return [f"{path}:1: expected the header {','.join(SUBMISSION_COLUMNS)}"]
    problems, seen = [], set()
    wanted = set(identifiers)
    for number, row in enumerate(rows[1:], start=2):
        where = f"{path}:{number}"
        if len(row) != len(SUBMISSION_COLUMNS):
            problems.append(f"{where}: {len(row)} columns, expected {len(SUBMISSION_COLUMNS)}")
            continue
        if not all(_is_finite(value) for value in row[1:]):
            problems.append(f"{where} ({row[0]}): expected 20 finite numbers")
        if row[0] in seen:
            problems.append(f"{where}: {row[0]!r} stands there twice")
        elif row[0] not in wanted:
            problems.append(f"{where}: {row[0]!r} is no question of the set")
        seen.add(row[0])
    missing = sorted(wanted - seen)
    if missing:
        problems.append(
            f"{path}: {len(missing)} of {len(wanted)} questions are missing (first: {missing[0]!r})"
        )
    return problems


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
