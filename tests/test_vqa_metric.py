"""VQA v2: the official accuracy, the answer vocabulary with its soft targets, the submission file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.data.examples import DataError
from tdlib.data.vqa_metric import Vocabulary, check_submission, normalise, question_accuracy

few = settings(deadline=None, max_examples=50)

# From running vqaEval.py, its print statements aside (a013f00).
NORMALISED = {
    "u.s.a.": "usa",
    "100,978": "100978",
    "1,000.50": "1000.50",
    "3.": "3",
    "3.5": "3.5",
    "t-shirt": "t shirt",
    "yes/no": "yes no",
    "A man, a plan": "man plan",
    "None": "0",
    "ten o'clock": "10 o'clock",
    "dont": "don't",
    "Im": "im",  # the map has "Im", the text is in lower case
    "somebody'd": "somebodyd",
    "a": "",
    "it's 10:30, $5 & 10%": "it's 10:30 $5 & 10%",
    "a-b -c": "ab c",  # one mark beside a space, and all of its kind vanish
    "1,0 x-y": "10 xy",  # a comma between digits, and all marks vanish
    "." * 40: "." * 8,  # 32 at most
}


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items())
def test_normalise_equals_the_official_code(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_accuracy_by_the_number_of_matches(count, expected):
    answers = ["cat"] * count + [f"dog {i}" for i in range(10 - count)]
    assert question_accuracy("The cat.", answers) == pytest.approx(expected)


def test_answers_all_the_same_are_not_normalised():
    assert question_accuracy("The cat", ["cat"] * 10) == 0
    assert question_accuracy("\tcat \n", ["cat\n"] * 10) == 1  # but white space goes
    assert question_accuracy("a\ncat", ["a cat"] * 10) == 1
    assert question_accuracy("The cat", ["cat"] * 9 + ["dog"]) == 1
    assert question_accuracy("The cat", ["cat"] * 9 + ["a cat"]) == 1  # the same only once normalised


def test_few_annotators():
    assert question_accuracy("cat", ["cat"]) == 0  # nobody is left to agree with
    assert question_accuracy("cat", ["cat", "cat"]) == pytest.approx(1 / 3)


@few
@given(
    st.sampled_from(["cat", "dog", "2"]),
    st.lists(st.sampled_from(["cat", "a cat", "Cat", "dog", "two", "2"]), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_accuracy_agrees_with_leaving_out_one_by_one(prediction, answers, random):
    plain = {"a cat": "cat", "Cat": "cat", "two": "2"} if len(set(answers)) > 1 else {}
    accuracies = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        matches = [plain.get(answer, answer) for answer in others].count(prediction)
        accuracies.append({0: 0, 1: 1 / 3, 2: 2 / 3}.get(matches, 1))
    accuracy = question_accuracy(prediction, answers)
    assert accuracy == pytest.approx(sum(accuracies) / len(answers))
    shuffled = random.sample(answers, len(answers))
    assert question_accuracy(prediction, shuffled) == pytest.approx(accuracy)


def test_soft_targets_count_answers_as_they_were_written():
    vocabulary = Vocabulary(("dog", "cat", "2", "yes", "no"))
    answers = ["no"] * 4 + ["yes"] * 3 + ["cat"] * 2 + ["2"]
    assert vocabulary.soft_targets(answers) == {4: 1, 3: 0.9, 1: 0.6, 2: 0.3}
    answers = ["cat"] * 2 + ["Cat", "the cat", "a cat"] + ["two"] + ["bird"] * 4
    assert vocabulary.soft_targets(answers) == {1: 0.6}


def test_vocabulary_file_is_that_of_uniter(tmp_path):
    path = tmp_path / "ans2label.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps({"": 0, "naïve": 1, "cat": 2}, ensure_ascii=False), encoding=encoding)
        assert Vocabulary.load(path) == Vocabulary(("", "naïve", "cat"))
    path.write_text('{"cat": 1, "dog": 0}')  # in any order
    assert Vocabulary.load(path).answers == ("dog", "cat")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "not readable as JSON .*No such file"),
        ("{", "not readable as JSON"),
        ('{"cat": 0, "dog": 1, "cat": 2}', "'cat' stands twice"),
        ('["cat"]', "found list"),
        ("{}", "found no answers"),
        ('{"cat": 0, "dog": 2}', "the label of 'dog' is 2; expected 0 to 1 for the 2 answers"),
        ('{"cat": 0, "dog": 0}', "the label of 'dog' is 0"),
        ('{"cat": false}', "the label of 'cat' is False"),
        ('{"cat": [0]}', r"the label of 'cat' is \[0\]"),
    ],
)
def test_vocabulary_refuses_bad_files(tmp_path, content, found):
    path = tmp_path / "ans2label.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"ans2label.json: .*{found}.*write the file again"):
        Vocabulary.load(path)


def test_check_submission_lists_everything_wrong(tmp_path):
    path = tmp_path / "submission.json"
    entries = [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 1, "answer": "no"},
        {"question_id": "2", "answer": "no"},
        {"question_id": 3, "answer": 4},
        {"answer": "no"},
        {"question_id": 9},
        [1, "yes"],
    ]
    path.write_text(json.dumps(entries))
    problems = [problem.removeprefix(str(path)) for problem in check_submission(path, [1, 2, 3])]
    assert [problem[:36] for problem in problems] == [
        ", entry 2: question_id 1 already sta", ", entry 3: field 'question_id' is st",
        ", entry 4 (3): answer=4, expected a ", ", entry 5: field 'question_id' is mi",
        ", entry 6 (9): answer=None, expected", ", entry 6: 9 is not in the split",
        ", entry 7: expected a JSON object, f", ": 1 of 3 are missing (first: 2)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "no such file"), (b"[", "not valid JSON"), (b"{}", "expected one of [, found '{'")],
)
def test_check_submission_of_something_else(tmp_path, content, found):
    path = tmp_path / "submission.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_submission(path, [1])
    assert found in str(caught.value)
