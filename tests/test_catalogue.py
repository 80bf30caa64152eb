"""The tasks by name: splits and shifts, generated sets, checks of whole folders, scores, submissions."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tdlib.cli import main
from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data import tasks as catalogue
from tdlib.data.check import check_folder
from tdlib.data.check import check_submission as check_file
from tdlib.data.examples import DataError, Example, Examples, TextPart
from tdlib.data.snli_ve import LABELS
from tdlib.data.tasks import (
    SHIFTS,
    TASKS,
    answer_vocabulary,
    class_labels,
    data_folder,
    detail,
    generated_file,
    measures,
    reader,
    score,
    splits_of,
    submission_split,
    write_submission,
)
from tdlib.data.vcr_results import SUBMISSION_COLUMNS, check_submission


def config(task: str, folder: Path | str = "", **changes: Any) -> RunConfig:
    return RunConfig.from_parameters(task=task, data_dir=str(folder), **changes)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(autouse=True)
def shifted_files(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(catalogue, "SHIFTED_FILES", tmp_path / "shifts")
    return tmp_path / "shifts"


# small data sets as published


def vcr_record(number: int, split: str = "val", **changes: Any) -> dict[str, Any]:
    return {
        "annot_id": f"{split}-{number}",
        "objects": ["person", "person", "car"],
        "img_fn": "a.jpg",
        "metadata_fn": "a.json",
        "question": ["Why", "does", [1], "smile", "?"],
        "answer_choices": [[[1], "waves", "."], [[0], "sleeps", "."], ["Because", "."], ["He", "left", "."]],
        "answer_label": 0,
        "rationale_choices": [[[0], "runs", "."], ["It", "rains", "."], [[1], "sits", "."], ["Yes", "."]],
        "rationale_label": 2,
    } | changes


def write_vcr(folder: Path) -> Path:
    pictures = folder / "vcr1images"
    pictures.mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(pictures / "a.jpg")
    names = ["person", "person", "car"]
    metadata = {"names": names, "boxes": [[0, 0, 20, 20, 1]] * 3, "width": 40, "height": 20}
    (pictures / "a.json").write_text(json.dumps(metadata))
    plural = vcr_record(1, question=["Where", "are", [0, 1], "?"])
    (folder / "val.jsonl").write_text(lines(vcr_record(0), plural, vcr_record(2)))
    hidden = {k: v for k, v in vcr_record(0, "test").items() if not k.endswith("_label")}
    (folder / "test.jsonl").write_text(lines(hidden, hidden | {"annot_id": "test-1"}))
    return folder


def pair(number: int, **changes: Any) -> dict[str, Any]:
    good = {
        "pairID": f"1.jpg#{number}",
        "gold_label": LABELS[number % 3],
        "sentence2": "Yes.",
        "Flikr30kID": "1",
    }
    return good | changes


def write_snli_ve(folder: Path) -> Path:
    (folder / "flickr30k_images").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "flickr30k_images" / "1.jpg")
    (folder / "snli_ve_dev.jsonl").write_text(lines(*(pair(number) for number in range(5))))
    unlabelled = [{k: v for k, v in pair(number).items() if k != "gold_label"} for number in range(5, 9)]
    (folder / "snli_ve_test.jsonl").write_text(lines(*unlabelled))
    (folder / "esnlive_dev.csv").write_text("pairID,hypothesis,gold_label\n1.jpg#1,A dog.,neutral\n")
    return folder


def write_vqa(folder: Path, answers: tuple[str, ...] = ("yes", "no", "yes")) -> Path:
    info: dict[str, Any] = {"info": {"year": 2017}}
    for split, numbers in (("train2014", range(len(answers))), ("test2015", range(8, 10))):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(folder / split / f"COCO_{split}_000000000007.jpg")
        asked = [{"question_id": 7000 + i, "image_id": 7, "question": "Is it?"} for i in numbers]
        path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
        path.write_text(json.dumps(info | {"questions": asked}))
    said = [
        {
            "question_id": 7000 + i, "image_id": 7, "question_type": "is it", "answer_type": "yes/no",
            "multiple_choice_answer": answer, "answers": [{"answer": answer}] * 10,
        } for i, answer in enumerate(answers)
    ]  # fmt: skip
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps(info | {"annotations": said}))
    return folder


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


def test_every_task_that_a_run_may_name_is_here():
    assert set(TASKS) == set(APPLY)


@pytest.mark.parametrize("task", APPLY)
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_is_evaluated_where_it_applies_and_refused_elsewhere(task, shift):
    if shift in APPLY[task]:
        _, (usual, shifted) = splits_of(config(task, shift=shift))
        assert shifted == f"{usual}_{shift}"
    else:
        with pytest.raises(ConfigError) as caught:
            splits_of(config(task, shift=shift))
        assert f"shift={shift!r} does not apply to task={task!r}; expected auto" in str(caught.value)
        assert all(other in str(caught.value) for other in APPLY[task])


@pytest.mark.parametrize("task", APPLY)
def test_an_unknown_shift_names_the_known_ones(task):
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


@pytest.mark.parametrize("task", ["vcr", "e_snli_ve", "vqa_v2"])
def test_held_out_pictures_are_evaluated_instead_of_tests(task):
    train, evaluated = splits_of(config(task, held_out=0.2))
    assert evaluated == [f"{train}_held_out"]
    assert splits_of(config(task, held_out=0.2, train_split="a")) == ("a", ["a_held_out"])
    for beside in ({"eval_splits": ["val"]}, {"shift": "shortcut"}, {"submission_split": "test"}):
        with pytest.raises(ConfigError, match=r"held_out=0\.2 evaluates the pictures set aside and no test"):
            splits_of(config(task, held_out=0.2, **beside))


def test_the_split_that_a_benchmark_takes():
    assert {task: submission_split(task) for task in TASKS} == {
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
    write_vqa(tmp_path / "vqa")
    assert class_labels(config("vqa_v2", tmp_path / "vqa", vocabulary_minimum=1)) == ("yes", "no")
    assert class_labels(config("vqa_v2", tmp_path / "vqa", vocabulary_minimum=2)) == ("yes",)
    (tmp_path / "answers.json").write_text('{"maybe": 0, "yes": 1}')
    given = config("vqa_v2", tmp_path / "vqa", vocabulary=str(tmp_path / "answers.json"))
    assert class_labels(given) == ("maybe", "yes")
    assert answer_vocabulary(config("snli_ve")) is None


def test_each_task_has_its_reader(tmp_path):
    write_vcr(tmp_path / "vcr"), write_snli_ve(tmp_path / "ve"), write_vqa(tmp_path / "vqa")
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
    write_vcr(tmp_path / "vcr")
    prompts = [
        reader(config("vcr", tmp_path / "vcr", references=scheme), "val").open()[0].prompt.text
        for scheme in ("names", "person_tokens", "category")
    ]
    assert prompts == ["Why does Riley smile?", "Why does person_1 smile?", "Why does person smile?"]


# sets made from a user's VCR


def test_a_rule_based_set_is_made_once_and_again_when_its_source_changes(
    tmp_path, shifted_files, monkeypatch
):
    source = write_vcr(tmp_path / "vcr") / "val.jsonl"
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
    write_vcr(tmp_path / "vcr")
    (tmp_path / "vcr" / "val_rule_singular.jsonl").write_text(lines(vcr_record(9)))
    examples = reader(config("vcr_qa", tmp_path / "vcr"), "val_rule_singular").open()
    assert list(examples.ids) == ["val-9"] and not shifted_files.exists()


def test_sets_that_cannot_be_made_say_why(tmp_path, shifted_files):
    folder = write_vcr(tmp_path / "vcr")
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


# checking folders


def test_all_data_sets_of_a_folder_are_checked(tmp_path):
    write_vcr(tmp_path / "vcr"), write_snli_ve(tmp_path / "ve"), write_vqa(tmp_path / "vqa")
    one, other = "1 of 1 pictures are in 'test' too", "1 of 1 pictures are in 'dev' too"
    assert list(check_folder(tmp_path, decode=True)) == [
        ("vcr", "test", 10, [], []),
        ("vcr", "val", 6, [], [one]),
        ("snli_ve", "dev", 5, [], []),
        ("snli_ve", "test", 4, [], [other]),
        ("e_snli_ve", "dev", 1, [], []),
        ("vqa_v2", "test2015", 2, [], []),
        ("vqa_v2", "train2014", 3, [], []),
    ]
    assert [found[:2] for found in check_folder(tmp_path / "vcr")] == [("vcr", "test"), ("vcr", "val")]


def test_splits_that_share_questions_are_found(tmp_path):
    vcr, ve = write_vcr(tmp_path / "vcr"), write_snli_ve(tmp_path / "ve")
    (vcr / "train.jsonl").write_text(lines(vcr_record(0), vcr_record(9), vcr_record(2)))
    (vcr / "val_shortcut.jsonl").write_text((vcr / "val.jsonl").read_text())  # val in other words
    (ve / "snli_ve_train.jsonl").write_text(lines(pair(1), pair(20), pair(21)))
    found = {(report.task, report.split): report.problems for report in check_folder(tmp_path)}
    assert found["vcr", "train"] == [] and found["snli_ve", "test"] == []
    for split in ("val", "val_shortcut"):
        (problem,) = found["vcr", split]
        assert problem.startswith(
            f"{split}: 2 of 3 ids are those of questions in 'train' too (first: 'val-0')"
        )
    assert found["snli_ve", "train"][0].startswith("train: 1 of 3 ids are those of questions in 'dev' too")


def test_equal_choices_and_empty_texts_are_found(tmp_path):
    vcr = write_vcr(tmp_path)
    twice = vcr_record(0, answer_choices=[["No", "."], [[1], "waves"], ["Yes"], ["No", "."]])
    namesakes = vcr_record(1, objects=["person"] * 3, answer_choices=[[[0]], [[1]], [[2]], ["He"]])
    empty, blank = vcr_record(2, question=[]), vcr_record(3, rationale_choices=[["It"], [" "], ["a"], ["b"]])
    (vcr / "val.jsonl").write_text(lines(twice, vcr_record(5), empty, blank))
    (_, report) = check_folder(vcr)
    choices, question, rationale = report.problems
    assert choices.startswith(f"{vcr / 'val.jsonl'} (val-0): choices 0 and 3 are both 'No.'")
    assert ":3 (val-2): question is empty" in question
    assert ":4 (val-3): rationale_choices[1] is empty" in rationale
    metadata = {"names": ["person"] * 3, "boxes": [[0, 0, 20, 20, 1]] * 3, "width": 40, "height": 20}
    (vcr / "vcr1images" / "a.json").write_text(json.dumps(metadata))
    (vcr / "val.jsonl").write_text(lines(namesakes))
    assert reader(config("vcr_qa", vcr, references="category"), "val").problems() == []


def test_a_byte_order_mark_and_a_doubled_column_of_csv(tmp_path):
    path = write_snli_ve(tmp_path) / "esnlive_dev.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert reader(config("e_snli_ve", tmp_path), "dev").problems() == []
    path.write_text("pairID,hypothesis,gold_label,hypothesis\n1.jpg#1,A dog.,neutral,A cat.\n")
    (problem,) = reader(config("e_snli_ve", tmp_path), "dev").problems()
    assert ":1: column 'hypothesis' stands there twice" in problem


def test_every_bad_line_is_one_problem(tmp_path):
    vcr, ve, vqa = write_vcr(tmp_path / "vcr"), write_snli_ve(tmp_path / "ve"), write_vqa(tmp_path / "vqa")
    bad = [vcr_record(3, question=[[9]]), vcr_record(4, rationale_label=7), vcr_record(0)]
    (vcr / "val.jsonl").write_text(lines(vcr_record(0), *bad, vcr_record(5)) + "{")
    (ve / "snli_ve_dev.jsonl").write_text(lines(pair(0), pair(1, gold_label="-"), pair(2, Flikr30kID="9"), 3))
    (ve / "snli_ve_test.jsonl").write_text(lines(pair(5), pair(6, gold_label=None), pair(7, gold_label="-")))
    path = vqa / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions = json.loads(path.read_text())["questions"]
    questions[0]["question"], questions[1]["image_id"] = " ", 8
    path.write_text(json.dumps({"questions": [*questions, {"question_id": 1}]}))
    (vqa / "test2015" / "COCO_test2015_000000000007.jpg").write_bytes(b"no picture")
    found = {
        (task, split): (count, problems) for task, split, count, problems, _ in check_folder(tmp_path, True)
    }

    def says(key: tuple[str, str], *expected: str) -> bool:
        problems = found[key][1]
        return len(problems) == len(expected) and all(a in b for a, b in zip(expected, problems, strict=True))

    assert says(("vcr", "val"), ":4: annot_id 'val-0' already", ":6: not valid JSON",
                ":2 (val-3): question: reference to object 9", ":3 (val-4): rationale_label=7")  # fmt: skip
    assert says(("snli_ve", "dev"), "gold_label='-'", "found int", "9.jpg: no such picture")
    assert says(("snli_ve", "test"), "gold_label='-'", "no gold_label, as 1 of 2")
    assert says(("vqa_v2", "train2014"), "entry of 'questions' 4: question_id 1 has no annotation",
                "the question is empty", "000000000008.jpg: no such picture")  # fmt: skip
    assert says(("vqa_v2", "test2015"), "COCO_test2015_000000000007.jpg: not a picture that can be decoded")
    assert found["vcr", "test"] == (10, []) and found["e_snli_ve", "dev"] == (1, [])
    assert (found["vcr", "val"][0], found["snli_ve", "test"][0], found["vqa_v2", "train2014"][0]) == (8, 0, 3)


def test_a_split_without_its_pictures_or_annotations_is_a_problem(tmp_path):
    (write_vcr(tmp_path / "vcr") / "vcr1images").rename(tmp_path / "elsewhere")
    vqa = write_vqa(tmp_path / "vqa")
    (vqa / "v2_mscoco_train2014_annotations.json").unlink()
    found = {(task, split): problems for task, split, _, problems, _ in check_folder(tmp_path)}
    assert "vcr1images: no such folder" in found["vcr", "val"][0]
    assert "annotations.json: no such file" in found["vqa_v2", "train2014"][0]
    assert found["vqa_v2", "test2015"] == []


def test_a_folder_without_data_sets_says_what_was_expected(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            DataError, match=r"no data set there .*train\.jsonl \(VCR\).*vqacp_v2_train_questions"
        ):
            list(check_folder(folder))


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
    found = measures(config("vcr"), table.assign(score=[1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    assert list(found.items()) == [
        ("accuracy (Q->AR)", 0.25), ("accuracy (Q->A)", 0.5), ("accuracy (QA->R)", 0.5),
    ]  # fmt: skip
    found = measures(config("vcr"), table.assign(score=[1.0, 0.0, 0.0, 1.0] * 2))
    assert found["accuracy (Q->AR)"] == 0.0 != found["accuracy (Q->A)"] * found["accuracy (QA->R)"]


@pytest.mark.parametrize(
    ("task", "name"),
    [("vcr_qa", "accuracy (Q->A)"), ("vcr_qar", "accuracy (QA->R)"), ("snli_ve", "accuracy"),
     ("vqa_v2", "VQA accuracy")],
)  # fmt: skip
def test_measures_of_other_tasks(task, name):
    assert measures(config(task), pd.DataFrame({"score": [0.3, 0.9]})) == {name: pytest.approx(0.6)}


def test_detail_is_by_stratum_and_answer_type():
    table = pd.DataFrame({
        "stratum": ["what", "is", "is"], "answer_type": ["other", "yes/no", "yes/no"], "score": [0.3, 1, 0],
    })  # fmt: skip
    assert detail(table) == {
        "stratum: is": 0.5, "stratum: what": 0.3, "answer_type: other": 0.3, "answer_type: yes/no": 0.5,
    }  # fmt: skip
    known = table.assign(answer_type="", concept=["known", "", "unknown"])
    assert detail(known) == {"stratum: is": 0.5, "stratum: what": 0.3}
    assert detail(known, ["concept"]) == detail(known) | {"concept: known": 0.3, "concept: unknown": 0.0}


# submissions


def probabilities(chosen: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[chosen] * 0.5 + 0.125


def test_a_vcr_submission_is_the_leaderboards(tmp_path):
    run = config("vcr", write_vcr(tmp_path / "vcr"))
    examples = reader(run, submission_split("vcr")).open()
    path = write_submission(run, tmp_path, examples, probabilities([0, 1, 2, 3, 0] * 2, 4), ())
    assert path == tmp_path / "submission.csv" and check_submission(path, ["test-0", "test-1"]) == []
    header, row, _ = csv.reader(path.read_text().splitlines())
    assert tuple(header) == SUBMISSION_COLUMNS and row[0] == "test-0"
    chosen = [np.argmax([float(value) for value in row[1 + 4 * i : 5 + 4 * i]]) for i in range(5)]
    assert chosen == [0, 1, 2, 3, 0]


def test_half_of_vcr_has_no_submission(tmp_path):
    write_vcr(tmp_path / "vcr")
    for task in ("vcr_qa", "vcr_qar"):
        examples = reader(config(task, tmp_path / "vcr"), "test").open()
        with pytest.raises(ConfigError, match="half of what the leaderboard asks for; use task='vcr'"):
            write_submission(
                config(task), tmp_path, examples, probabilities([0] * len(examples), 4), ()
            )  # fmt: skip
    run = config("vcr", tmp_path / "vcr")
    examples = reader(run, "val").open()  # has labels: no rationales given each answer
    with pytest.raises(DataError, match="predict the test split"):
        write_submission(run, tmp_path, examples, probabilities([0] * len(examples), 4), ())


@pytest.mark.parametrize("task", ["snli_ve", "e_snli_ve"])
def test_an_entailment_submission_has_a_line_per_pair(tmp_path, task):
    examples = Examples(["x", "y"], ["all"] * 2, lambda _: example(), False)
    path = write_submission(config(task), tmp_path, examples, probabilities([2, 0], 3), LABELS)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"pairID": "x", "label": "neutral"},
        {"pairID": "y", "label": "contradiction"},
    ]


@pytest.mark.parametrize("task", ["vqa_v2", "vqa_cp_v2"])
def test_a_vqa_submission_is_the_servers(tmp_path, task):
    examples = Examples(["70", "9"], ["all"] * 2, lambda _: example(), False)
    path = write_submission(config(task), tmp_path, examples, probabilities([1, 0], 2), ("yes", "no"))
    assert json.loads(path.read_text()) == [
        {"question_id": 70, "answer": "no"}, {"question_id": 9, "answer": "yes"},
    ]  # fmt: skip


def test_a_submission_is_checked_against_its_data_set(tmp_path, capsys):
    folder, written = write_snli_ve(tmp_path / "ve"), tmp_path / "mine.jsonl"
    good = [{"pairID": f"1.jpg#{i}", "label": "neutral"} for i in range(5, 9)]
    written.write_text(lines(*good))
    assert check_file(written, folder) == []
    written.write_text(lines(good[0], good[0], good[1] | {"label": 2}, good[2] | {"pairID": "x"}, {}))
    problems = [problem.removeprefix(str(written)) for problem in check_file(written, folder)]
    assert [problem[:24] for problem in problems] == [
        ":2: '1.jpg#5' stands the", ":3 (1.jpg#6): label=2, e", ":4: 'x' is no pair",
        ":5: field 'pairID' is mi", ": 2 of 4 pairs are missi",
    ]  # fmt: skip
    assert main(["data", "check", str(written), "--data", str(folder)]) == 1
    assert "5 problems" in capsys.readouterr().out
    assert "is no pair" in check_file(written, folder, "dev")[0]
    with pytest.raises(ConfigError, match=r"expected a file as submission\.csv \(VCR\)"):
        check_file(written, tmp_path)
    vqa = write_vqa(tmp_path / "vqa")
    (tmp_path / "answers.json").write_text(json.dumps([{"question_id": 7008, "answer": "yes"}]))
    assert check_file(tmp_path / "answers.json", vqa) == ["1 question ids missing in the file: 7009"]


@pytest.mark.parametrize("task", ["vcr", "snli_ve", "vqa_v2"])
def test_predictions_must_cover_the_split(tmp_path, task):
    examples = Examples(["1", "2"], ["all"] * 2, lambda _: example(), False)
    with pytest.raises(DataError, match="1 predictions for 2 examples"):
        write_submission(config(task), tmp_path, examples, probabilities([0], 4), LABELS)
    assert list(tmp_path.iterdir()) == []
