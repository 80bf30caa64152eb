"""Predictions for VCR: the score of answers and rationales together, and the leaderboard's file."""

import csv
import math

import pandas as pd
import pytest

from tdlib.data.examples import DataError, Examples
from tdlib.data.vcr_results import SUBMISSION_COLUMNS, check_submission, joint_scores, write_submission


def scored(**hits: tuple[float, ...]) -> pd.DataFrame:
    """Scores of the answers, and of the rationales where there is a second number, by question."""
    rows = [
        (name, part, value)
        for name, values in hits.items()
        for part, value in zip(("", "r"), values, strict=False)
    ]
    return pd.DataFrame(rows, columns=["question", "part", "score"])


def test_answers_and_rationales_both_have_to_be_right():
    table = scored(a=(1, 1), b=(1, 0), c=(0, 1), d=(1, 1))
    joint = joint_scores(table)
    assert dict(zip(joint["question"], joint["score"], strict=True)) == {"a": 1, "b": 0, "c": 0, "d": 1}
    of_parts = table.groupby("part")["score"].mean()
    assert joint["score"].mean() == 0.5 != of_parts[""] * of_parts["r"]


@pytest.mark.parametrize("table", [scored(a=(1,)), scored(a=(1, 1), b=(1,)), scored(a=(1, 1), b=(0, 1))[1:]])
def test_a_joint_score_needs_both_halves(table):
    with pytest.raises(ValueError, match="Q->AR needs answers and rationales of the same questions"):
        joint_scores(table)


# the leaderboard's file

HEADER = (
    "annot_id,answer_0,answer_1,answer_2,answer_3,"
    "rationale_conditioned_on_a0_0,rationale_conditioned_on_a0_1,"
    "rationale_conditioned_on_a0_2,rationale_conditioned_on_a0_3,"
    "rationale_conditioned_on_a1_0,rationale_conditioned_on_a1_1,"
    "rationale_conditioned_on_a1_2,rationale_conditioned_on_a1_3,"
    "rationale_conditioned_on_a2_0,rationale_conditioned_on_a2_1,"
    "rationale_conditioned_on_a2_2,rationale_conditioned_on_a2_3,"
    "rationale_conditioned_on_a3_0,rationale_conditioned_on_a3_1,"
    "rationale_conditioned_on_a3_2,rationale_conditioned_on_a3_3"
)  # r2c, models/README.md


PARTS = ("", "r0", "r1", "r2", "r3")


def predicted(*questions: str, of: dict[tuple[str, str], list[float]] | None = None):
    """Examples of these questions' parts and four numbers for each; an empty list leaves one out."""
    numbers = {(q, p): [(5 * i + j) + k / 8 for k in range(4)]
               for i, q in enumerate(questions) for j, p in enumerate(PARTS)} | (of or {})  # fmt: skip
    names = [name for name, values in numbers.items() if values]
    ids, parts = [f"{q}:{p}" for q, p in names], [p for _, p in names]
    made = Examples(ids, ["all"] * len(ids), lambda _: None, False, [q for q, _ in names], parts)
    return made, [numbers[name] for name in names]


def test_a_submission_has_the_official_columns(tmp_path):
    path = tmp_path / "submission.csv"
    examples, numbers = predicted("test-0", "test:r-1")
    shuffled = examples[::-1], numbers[::-1]
    assert write_submission(path, *shuffled) == 2
    header, *rows = path.read_text().splitlines()
    assert header == HEADER == ",".join(SUBMISSION_COLUMNS)
    by_id = {row[0]: [float(value) for value in row[1:]] for row in csv.reader(rows)}
    assert by_id["test-0"] == [i + k / 8 for i in range(5) for k in range(4)]
    assert by_id["test:r-1"] == [i + k / 8 for i in range(5, 10) for k in range(4)]
    assert check_submission(path, ["test-0", "test:r-1"]) == []
    assert [each.name for each in tmp_path.iterdir()] == ["submission.csv"]


def test_numbers_that_differ_stay_different(tmp_path):
    close = [0.1234567, 0.1234568, 1e-9, 1.0000001e-9]
    write_submission(tmp_path / "submission.csv", *predicted("t-0", of={("t-0", "r2"): close}))
    _, row = csv.reader((tmp_path / "submission.csv").read_text().splitlines())
    assert [float(value) for value in row[13:17]] == close


@pytest.mark.parametrize(
    ("questions", "changed", "reason"),
    [
        (("t-0", "t-1"), {("t-1", "r2"): []}, "no predictions for the rationales of 't-1'"),
        (("t-0", "t-1"), {("t-1", ""): []}, "no predictions for the answers of 't-1'"),
        (("t-0",), {("t-0", ""): [0.5, math.nan, 0, 0]}, "for 't-0' are not finite"),
    ],
)
def test_an_incomplete_submission_is_refused(tmp_path, questions, changed, reason):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(DataError, match=reason):
        write_submission(path, *predicted(*questions, of=changed))
    assert path.read_text() == "old"


def test_checking_a_submission_lists_all_problems(tmp_path):
    path = tmp_path / "submission.csv"
    write_submission(path, *predicted("t-0", "t-1", "t-2", "other"))
    header, first, second, third, other = path.read_text().splitlines()
    bad = [header, first, second.replace(",5.0,", ",nan,"), first, third.replace(",10.0,", ",x,"), other]
    path.write_text("\n".join(bad))
    problems = check_submission(path, ["t-0", "t-1", "t-2", "t-3"])
    assert [problem.removeprefix(f"{path}") for problem in problems] == [
        ":3 (t-1): expected 20 finite numbers",
        f":4: annot_id 't-0' already stands in {path}:2; remove one",
        ":5 (t-2): expected 20 finite numbers",
        ":6: 'other' is not in the split",
        ": 1 of 4 are missing (first: 't-3')",
    ]
    path.write_text("\n".join([header, first + ",1"]))
    with pytest.raises(DataError, match=":2: more or fewer columns"):
        check_submission(path, ["t-0"])
    moved = [",".join([*line.split(",")[1:], line.split(",")[0]]) for line in (header, first)]
    path.write_text("\n".join(moved))
    (problem,) = check_submission(path, ["t-0"])
    assert problem.startswith(f"{path}:1: expected the header annot_id,answer_0,")


@pytest.mark.parametrize("content", [b"", b"a,b\n", HEADER[:-1].encode(), b"\xff\n"])
def test_checking_what_is_no_submission(tmp_path, content):
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_submission(tmp_path / "s.csv", ["t-0"])
    assert str(caught.value).startswith(f"{tmp_path / 's.csv'}:")
