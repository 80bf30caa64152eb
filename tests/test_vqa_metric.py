"""VQA v2: the official accuracy, the answer vocabulary with its soft targets, the submission file."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.data.examples import DataError
from tdlib.data.vqa_metric import Vocabulary, check_submission, normalise, question_accuracy, write_submission

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
    with pytest.raises(ValueError, match="answers is empty"):
        question_accuracy("cat", [])
    with pytest.raises(ValueError, match=r"answers is one string \('cat'\)"):
        question_accuracy("cat", "cat")


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


def test_vocabulary_counts_preprocessed_answers_in_order_of_first_occurrence():
    questions = ["The dog", "cat", "red", "dog", "2", "two", "cat", "dog"]
    assert Vocabulary.build(iter(questions), minimum=2).answers == ("dog", "cat", "2")
    assert Vocabulary.build(["cat"] * 9 + ["dog"] * 8).answers == ("cat",)


def test_vocabulary_refuses_what_it_cannot_label():
    with pytest.raises(ValueError, match=r"none of 2 answers occurs 9 times \(the most common: 8\)"):
        Vocabulary.build(["cat"] * 8 + ["dog"])
    with pytest.raises(ValueError, match="multiple_choice_answers is one string"):
        Vocabulary.build("cat", minimum=1)
    with pytest.raises(ValueError, match=r"1 answers twice \(first: 'cat'\)"):
        Vocabulary(("cat", "dog", "cat"))


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
        (None, "no such file"),
        ("{", "not valid JSON"),
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


def test_submission_has_the_order_of_the_split(tmp_path):
    path = tmp_path / "submission.json"
    write_submission(path, {1: "yes", 3: "naïve"}, [3, 1])
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"question_id": 3, "answer": "naïve"},
        {"question_id": 1, "answer": "yes"},
    ]
    assert check_submission(path, [1, 3]) == []


@pytest.mark.parametrize(
    ("answers", "question_ids", "found"),
    [
        ({1: "yes"}, [1, 2, 3], "2 question ids missing in the answers: 2, 3;"),
        ({1: "yes", 2: "no"}, [1], "1 extra question ids in the answers: 2;"),
        ({1: "yes"}, [1, 1], "1 question ids doubled: 1;"),
        ({1: 0}, [1], "1 answers that are not strings: 1;"),
        ({}, range(7), "7 question ids missing in the answers: 0, 1, 2, 3, 4, ...;"),
    ],
)
def test_submission_refuses_other_questions_and_leaves_the_old_file(tmp_path, answers, question_ids, found):
    path = tmp_path / "submission.json"
    path.write_text("old")
    with pytest.raises(DataError) as caught:
        write_submission(path, answers, question_ids)
    assert str(caught.value).startswith(f"{path}: not written: {found} expected one answer")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_check_submission_lists_everything_wrong(tmp_path):
    path = tmp_path / "submission.json"
    entries = [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 1, "answer": "no"},
        {"question_id": "2", "answer": "no"},
        {"question_id": True, "answer": 4},
        {"answer": "no"},
        {"question_id": 9},
        [1, "yes"],
    ]
    path.write_text(json.dumps(entries))
    assert sorted(check_submission(path, [1, 2, 3])) == sorted([
        "1 entries that are not objects: 6",
        "1 entries without 'question_id': 4",
        "1 entries without 'answer': 5",
        "2 entries whose 'question_id' is not int: 2, 3",
        "1 entries whose 'answer' is not str: 3",
        "1 question ids doubled: 1",
        "2 question ids missing in the file: 2, 3",
        "1 extra question ids in the file: 9",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "not readable as JSON in UTF-8: .*No such file"),
        (b"[", "not readable as JSON in UTF-8: Expecting value"),
        (b"\xff", "not readable as JSON in UTF-8: .*can't decode"),
        (b"{}", "expected a list of entries, found dict"),
    ],
)
def test_check_submission_of_something_else(tmp_path, content, found):
    path = tmp_path / "submission.json"
    if content is not None:
        path.write_bytes(content)
    (problem,) = check_submission(path, [1])
    assert re.match(found, problem)
