"""The tasks by name: splits and shifts, generated sets, checks of whole folders, scores, submissions."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from data_files import config, lines, put_snli_ve, put_vcr, put_vqa, vcr_record

from tdlib.core.paths import ConfigError
from tdlib.data import tasks as catalogue
from tdlib.data.examples import DataError, Example, Examples, TextPart
from tdlib.data.snli_ve import LABELS
from tdlib.data.tasks import (
    SHIFTS,
    TASKS,
    class_labels,
    data_folder,
    detail,
    generated_file,
    reader,
    score,
    splits_of,
    submission_split,
    task_of,
)
from tdlib.data.vcr_results import SUBMISSION_COLUMNS, check_submission


@pytest.fixture(autouse=True)
def shifted_files(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(catalogue, "SHIFTED_FILES", tmp_path / "shifts")
    return tmp_path / "shifts"


# splits and shifts

VCR_SHIFTS = {"shortcut", "balanced", "composition", "style", "rule_singular", "rule_plural",
              "rmtop1", "keeptop1", "keeptop3", "keeptop5"}  # fmt: skip
APPLY = {
    "vcr_qa": VCR_SHIFTS,
    "vcr_qar": VCR_SHIFTS,
    "vcr": VCR_SHIFTS,
    "snli_ve": {"shortcut", "balanced", "composition", "style"},
    "e_snli_ve": set(),
    "vqa_v2": {"prior", "balanced", "composition", "style"},
    "vqa_cp_v2": set(),
}


@pytest.mark.parametrize("task", APPLY)
def test_a_shift_is_evaluated_where_it_applies_and_refused_elsewhere(task):
    for shift in APPLY[task]:
        _, (usual, shifted) = splits_of(config(task, shift=shift))
        assert shifted == f"{usual}_{shift}"
    for shift in SHIFTS.keys() - APPLY[task]:
        with pytest.raises(ConfigError) as caught:
            splits_of(config(task, shift=shift))
        assert f"shift={shift!r} does not apply to task={task!r}; expected auto" in str(caught.value)
        assert all(other in str(caught.value) for other in APPLY[task])
    with pytest.raises(ConfigError, match=f"shift='dark': expected 'auto', '' or one of {', '.join(SHIFTS)}"):
        splits_of(config(task, shift="dark"))


@pytest.mark.parametrize(
    ("task", "train", "of_the_miniworld", "of_a_users_data"),
    [
        ("vcr_qa", "train", ["val", "val_shortcut"], ["val", "val_rule_singular"]),
        ("vcr_qar", "train", ["val", "val_shortcut"], ["val", "val_rule_singular"]),
        ("vcr", "train", ["val", "val_shortcut"], ["val", "val_rule_singular"]),
        ("snli_ve", "train", ["dev", "dev_shortcut"], ["dev"]),
        ("e_snli_ve", "train", ["dev"], ["dev"]),
        ("vqa_v2", "train2014", ["val2014", "val2014_prior"], ["val2014"]),
        ("vqa_cp_v2", "train", ["test"], ["test"]),
    ],
)
def test_a_tasks_own_splits(task, train, of_the_miniworld, of_a_users_data):
    assert splits_of(config(task)) == (train, of_the_miniworld)
    assert splits_of(config(task, "/data")) == (train, of_a_users_data)
    assert splits_of(config(task, shift="")) == (train, of_the_miniworld[:1])
    named = config(task, train_split="a", eval_splits=["b", "c"])
    assert splits_of(named) == ("a", ["b", "c"])


def test_what_would_not_be_tested_or_submitted_is_refused():
    with pytest.raises(ConfigError, match="shift='style': is not tested, as eval_splits names the tests"):
        splits_of(config("vcr", shift="style", eval_splits=["val"]))
    for half in ("vcr_qa", "vcr_qar"):
        with pytest.raises(ConfigError, match=f"submission=True: task='{half}' is half of what is submitted"):
            submission_split(half)


@pytest.mark.parametrize("task", ["vcr", "e_snli_ve", "vqa_v2"])
def test_held_out_pictures_are_evaluated_instead_of_tests(task):
    train, evaluated = splits_of(config(task, held_out=0.2))
    assert evaluated == [f"{train}_held_out"]
    assert splits_of(config(task, held_out=0.2, train_split="a")) == ("a", ["a_held_out"])
    for beside in ({"eval_splits": ["val"]}, {"shift": "shortcut"}, {"submission_split": "test"}):
        with pytest.raises(ConfigError, match=r"held_out=0\.2 evaluates the pictures set aside and no test"):
            splits_of(config(task, held_out=0.2, **beside))


def test_the_split_that_a_benchmark_takes():
    assert {task: TASKS[task].submitted for task in TASKS} == {
        "vcr_qa": "", "vcr_qar": "", "vcr": "test", "snli_ve": "test", "e_snli_ve": "test",
        "vqa_v2": "test2015", "vqa_cp_v2": "test",
    }  # fmt: skip


# data sets of a user


def test_a_data_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_folder(config("vcr", tmp_path / "mine")) == tmp_path / "mine"
    assert data_folder(config("vcr", "mine")) == tmp_path / "mine"
    assert data_folder(config("vcr", "~/mine")) == tmp_path / "home" / "mine"


def test_class_labels_of_each_kind_of_task(tmp_path):
    assert class_labels(config("snli_ve")) == class_labels(config("e_snli_ve")) == LABELS
    assert class_labels(config("vcr", tmp_path)) == ()
    put_vqa(tmp_path / "vqa")
    assert class_labels(config("vqa_v2", tmp_path / "vqa", vocabulary_minimum=1)) == ("yes", "no")
    assert class_labels(config("vqa_v2", tmp_path / "vqa", vocabulary_minimum=2)) == ("yes",)
    (tmp_path / "answers.json").write_text('{"maybe": 0, "yes": 1}')
    given = config("vqa_v2", tmp_path / "vqa", vocabulary=str(tmp_path / "answers.json"))
    assert class_labels(given) == ("maybe", "yes")
    assert task_of(config("snli_ve")).vocabulary(config("snli_ve")) is None


def test_each_task_has_its_reader(tmp_path):
    put_vcr(tmp_path / "vcr"), put_snli_ve(tmp_path / "ve"), put_vqa(tmp_path / "vqa")
    ids = {
        task: list(reader(config(task, tmp_path / folder), split).open().ids)[:2]
        for task, folder, split in [
            ("vcr_qa", "vcr", "val"), ("vcr_qar", "vcr", "val"), ("vcr", "vcr", "val"),
            ("snli_ve", "ve", "dev"), ("e_snli_ve", "ve", "dev"), ("vqa_v2", "vqa", "train2014"),
        ]
    }  # fmt: skip
    assert ids == {
        "vcr_qa": ["val-0", "val-1"], "vcr_qar": ["val-0", "val-1"], "vcr": ["val-0", "val-0:r"],
        "snli_ve": ["1.jpg#0", "1.jpg#1"], "e_snli_ve": ["1.jpg#1"], "vqa_v2": ["7000", "7001"],
    }  # fmt: skip


def test_references_are_rendered_as_the_run_says(tmp_path):
    put_vcr(tmp_path / "vcr")
    prompts = [
        reader(config("vcr", tmp_path / "vcr", references=scheme), "val").open()[0].prompt.text
        for scheme in ("names", "person_tokens", "category")
    ]
    assert prompts == ["Why does Riley smile?", "Why does person_1 smile?", "Why does person smile?"]


# sets made from a user's VCR


def test_a_rule_based_set_is_made_once_and_again_when_its_source_changes(
    tmp_path, shifted_files, monkeypatch
):
    source = put_vcr(tmp_path / "vcr") / "val.jsonl"
    made = []
    original = catalogue.write_shifted
    monkeypatch.setattr(
        catalogue, "write_shifted", lambda *arguments: made.append(arguments) or original(*arguments)
    )
    run = config("vcr_qa", tmp_path / "vcr")
    examples = reader(run, "val_rule_singular").open()
    assert list(examples.ids) == ["val-0", "val-2"]  # val-1 asks for two people
    assert [choice.text for choice in examples[0].choices] == [
        "He waves.", "Riley sleeps.", "Because.", "Riley left.",
    ]  # fmt: skip
    target = generated_file(source, "rule_singular")
    assert target.is_file() and target.is_relative_to(shifted_files)
    assert sorted(path.name for path in (tmp_path / "vcr").iterdir()) == [
        "test.jsonl",
        "val.jsonl",
        "vcr1images",
    ]
    assert list(reader(run, "val_rule_singular").open().ids) == ["val-0", "val-2"] and len(made) == 1
    source.write_text(lines(vcr_record(7)))
    assert list(reader(run, "val_rule_singular").open().ids) == ["val-7"] and len(made) == 2
    assert generated_file(source, "rule_singular") != target


def test_a_set_in_the_folder_goes_before_a_made_one(tmp_path, shifted_files):
    put_vcr(tmp_path / "vcr")
    (tmp_path / "vcr" / "val_rule_singular.jsonl").write_text(lines(vcr_record(9)))
    examples = reader(config("vcr_qa", tmp_path / "vcr"), "val_rule_singular").open()
    assert list(examples.ids) == ["val-9"] and not shifted_files.exists()


def test_sets_that_cannot_be_made_say_why(tmp_path, shifted_files):
    folder = put_vcr(tmp_path / "vcr")
    run = config("vcr_qa", folder)
    with pytest.raises(DataError, match="tdlib data mask RUN_FOLDER keeptop3"):
        reader(run, "val_keeptop3")
    with pytest.raises(DataError, match=r"train_rule_singular\.jsonl: no such file"):
        reader(run, "train_rule_singular")
    with pytest.raises(DataError, match="take a split that has them"):
        reader(run, "test_rule_plural")
    (folder / "val.jsonl").write_text(lines(vcr_record(0)))
    for _ in range(2):  # nothing empty is left behind
        with pytest.raises(DataError, match="no question fits the rules of 'rule_plural'"):
            reader(run, "val_rule_plural")
    assert [path for path in shifted_files.rglob("*") if path.is_file()] == []


# scores


def example(label: int | None = 1, **changes: Any) -> Example:
    return Example("a", Path("a.jpg"), (), (), TextPart("why?"), (), label, "all", **changes)


def test_a_prediction_is_worth_what_the_task_says():
    assert [score(example(), prediction, LABELS) for prediction in range(3)] == [0.0, 1.0, 0.0]
    assert math.isnan(score(example(None), 1, LABELS))
    answers = ("cat", "Cat.", *["dog"] * 8)
    asked = example(None, annotators=answers)  # the right answer need not be in the vocabulary
    values = [score(asked, i, ("the cat", "dog", "bird")) for i in range(3)]
    assert values == [pytest.approx(0.6), 1.0, 0.0]


def test_measures_of_a_task_with_two_halves():
    table = pd.DataFrame({"question": ["a", "a", "b:r", "b:r", "c", "c", "d", "d"], "part": ["", "r"] * 4})
    found = TASKS["vcr"].measures(table.assign(score=[1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    assert list(found.items()) == [
        ("accuracy (Q->AR)", 0.25), ("accuracy (Q->A)", 0.5), ("accuracy (QA->R)", 0.5),
    ]  # fmt: skip
    kinds = table.assign(score=[1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0], style=["flat"] * 4 + ["ink"] * 4)
    assert detail(TASKS["vcr"].measured(kinds), ["style"]) == {"style: flat": 0.5, "style: ink": 0.0}
    assert TASKS["vcr_qa"].measured(kinds) is kinds
    found = TASKS["vcr"].measures(table.assign(score=[1.0, 0.0, 0.0, 1.0] * 2))
    assert found["accuracy (Q->AR)"] == 0.0 != found["accuracy (Q->A)"] * found["accuracy (QA->R)"]


@pytest.mark.parametrize(
    ("task", "name"),
    [("vcr_qa", "accuracy (Q->A)"), ("vcr_qar", "accuracy (QA->R)"), ("snli_ve", "accuracy"),
     ("vqa_v2", "VQA accuracy")],
)  # fmt: skip
def test_measures_of_other_tasks(task, name):
    assert TASKS[task].measures(pd.DataFrame({"score": [0.3, 0.9]})) == {name: pytest.approx(0.6)}


def test_detail_is_by_stratum_and_answer_type():
    table = pd.DataFrame({
        "stratum": ["what", "is", "is"], "answer_type": ["other", "yes/no", "yes/no"], "score": [0.3, 1, 0],
    })  # fmt: skip
    assert detail(table) == {
        "stratum: is": 0.5, "stratum: what": 0.3, "answer_type: other": 0.3, "answer_type: yes/no": 0.5,
    }  # fmt: skip
    known = table.assign(answer_type="", concept=["known", "", "unknown"])
    assert detail(known) == {"stratum: is": 0.5, "stratum: what": 0.3}
    assert detail(known, ["concept"]) == {"concept: known": 0.3, "concept: unknown": 0.0}


# submissions


def probabilities(chosen: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[chosen] * 0.5 + 0.125


def test_a_vcr_submission_is_the_leaderboards(tmp_path):
    run = config("vcr", put_vcr(tmp_path / "vcr"))
    examples = reader(run, submission_split("vcr")).open()
    path = tmp_path / task_of(run).submission
    task_of(run).write_submission(path, examples, probabilities([0, 1, 2, 3, 0] * 2, 4), ())
    assert path.name == "submission.csv" and check_submission(path, ["test-0", "test-1"]) == []
    header, row, _ = csv.reader(path.read_text().splitlines())
    assert tuple(header) == SUBMISSION_COLUMNS and row[0] == "test-0"
    chosen = [np.argmax([float(value) for value in row[1 + 4 * i : 5 + 4 * i]]) for i in range(5)]
    assert chosen == [0, 1, 2, 3, 0]


def test_half_of_vcr_has_no_submission(tmp_path):
    put_vcr(tmp_path / "vcr")
    for task in ("vcr_qa", "vcr_qar"):
        examples = reader(config(task, tmp_path / "vcr"), "test").open()
        with pytest.raises(ConfigError, match="half of what the leaderboard asks for; use task='vcr'"):
            TASKS[task].write_submission(tmp_path / "s", examples, probabilities([0] * len(examples), 4), ())
    run = config("vcr", tmp_path / "vcr")
    examples = reader(run, "val").open()  # has labels: no rationales given each answer
    with pytest.raises(DataError, match="predict the test split"):
        task_of(run).write_submission(tmp_path / "s", examples, probabilities([0] * len(examples), 4), ())


@pytest.mark.parametrize("task", ["snli_ve", "e_snli_ve"])
def test_an_entailment_submission_has_a_line_per_pair(tmp_path, task):
    examples = Examples(["x", "y"], ["all"] * 2, lambda _: example(), False)
    path = tmp_path / TASKS[task].submission
    TASKS[task].write_submission(path, examples, probabilities([2, 0], 3), LABELS)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"pairID": "x", "label": "neutral"},
        {"pairID": "y", "label": "contradiction"},
    ]


@pytest.mark.parametrize("task", ["vqa_v2", "vqa_cp_v2"])
def test_a_vqa_submission_is_the_servers(tmp_path, task):
    examples = Examples(["70", "9"], ["all"] * 2, lambda _: example(), False)
    for told in (probabilities([1, 0], 2), np.array([1, 0])):  # of many labels only the chosen ones
        path = tmp_path / TASKS[task].submission
        TASKS[task].write_submission(path, examples, told, ("yes", "no"))
        assert json.loads(path.read_text()) == [
            {"question_id": 70, "answer": "no"}, {"question_id": 9, "answer": "yes"},
        ]  # fmt: skip


@pytest.mark.parametrize("task", ["vcr", "snli_ve", "vqa_v2"])
def test_predictions_must_cover_the_split(tmp_path, task):
    examples = Examples(["1", "2"], ["all"] * 2, lambda _: example(), False)
    with pytest.raises(ValueError, match="shorter"):
        TASKS[task].write_submission(tmp_path / "s", examples, probabilities([0], 4), LABELS)
    assert list(tmp_path.iterdir()) == []
