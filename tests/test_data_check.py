"""Checks before the expensive step: whole folders of data sets, and files for a benchmark."""

import json

import pytest
from data_files import config, lines, pair, put_snli_ve, put_vcr, put_vqa, vcr_record

from tdlib.cli import main
from tdlib.core.paths import ConfigError
from tdlib.data import check
from tdlib.data.check import check_folder
from tdlib.data.check import check_submission as check_file
from tdlib.data.examples import DataError
from tdlib.data.tasks import reader
from tdlib.data.vqa_metric import question_accuracy


def test_all_data_sets_of_a_folder_are_checked(tmp_path):
    put_vcr(tmp_path / "vcr"), put_snli_ve(tmp_path / "ve"), put_vqa(tmp_path / "vqa")
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


@pytest.mark.parametrize(("published", "noted"), [(30, 0), (33, 1), (29, 1), (90, 0)])
def test_a_split_that_nearly_has_its_published_size_is_noted(tmp_path, monkeypatch, published, noted):
    vcr = put_vcr(tmp_path)
    (vcr / "test.jsonl").unlink()
    (vcr / "val.jsonl").write_text(lines(*map(vcr_record, range(30))))
    monkeypatch.setitem(check.PUBLISHED, "vcr", {"val": published})
    (report,) = check_folder(vcr)
    assert not report.problems and len(report.notes) == noted


def test_splits_that_share_questions_are_found(tmp_path):
    vcr, ve = put_vcr(tmp_path / "vcr"), put_snli_ve(tmp_path / "ve")
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
    vcr = put_vcr(tmp_path)
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
    assert reader(config("vcr_qa", vcr, references="category"), "val").examine().problems == []


def test_pairs_of_another_picture_and_questions_that_few_answered_are_found(tmp_path):
    ve, vqa = put_snli_ve(tmp_path / "ve"), put_vqa(tmp_path / "vqa", ("yes", "no"))
    (ve / "snli_ve_dev.jsonl").write_text(lines(pair(0), pair(1, pairID="2.jpg#1"), pair(2, pairID="vg_7")))
    path = vqa / "v2_mscoco_train2014_annotations.json"
    annotations = json.loads(path.read_text())
    annotations["annotations"][0]["answers"] = [{"answer": "yes"}] * 4
    annotations["annotations"][1]["answers"] = [{"answer": "yes"}] * 3
    path.write_text(json.dumps(annotations))
    found = {(task, split): problems for task, split, _, problems, _ in check_folder(tmp_path)}
    (problem,) = found["snli_ve", "dev"]
    assert "(2.jpg#1): the pair is about picture 2, but the line names 1" in problem
    (problem,) = found["vqa_v2", "train2014"]
    assert "(7001): answers of 3 people" in problem
    for people, accuracy in ((4, 1.0), (3, 2 / 3)):  # why three are too few
        assert question_accuracy("yes", ["yes"] * people) == pytest.approx(accuracy)


def test_a_byte_order_mark_and_a_doubled_column_of_csv(tmp_path):
    path = put_snli_ve(tmp_path) / "esnlive_dev.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert reader(config("e_snli_ve", tmp_path), "dev").examine().problems == []
    path.write_text("pairID,hypothesis,gold_label,hypothesis\n1.jpg#1,A dog.,neutral,A cat.\n")
    (problem,) = reader(config("e_snli_ve", tmp_path), "dev").examine().problems
    assert ":1: column 'hypothesis' stands there twice" in problem


def test_every_bad_line_is_one_problem(tmp_path):
    vcr, ve, vqa = put_vcr(tmp_path / "vcr"), put_snli_ve(tmp_path / "ve"), put_vqa(tmp_path / "vqa")
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
    (put_vcr(tmp_path / "vcr") / "vcr1images").rename(tmp_path / "elsewhere")
    vqa = put_vqa(tmp_path / "vqa")
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


def test_a_submission_is_checked_against_its_data_set(tmp_path, capsys):
    folder, written = put_snli_ve(tmp_path / "ve"), tmp_path / "mine.jsonl"
    good = [{"pairID": f"1.jpg#{i}", "label": "neutral"} for i in range(5, 9)]
    written.write_text(lines(*good))
    assert check_file(written, folder) == []
    written.write_text(lines(good[0], good[0], good[1] | {"label": 2}, good[2] | {"pairID": "x"}, {}))
    problems = [problem.removeprefix(str(written)) for problem in check_file(written, folder)]
    assert [problem[:24] for problem in problems] == [
        ":2: pairID '1.jpg#5' alr", ":3 (1.jpg#6): label=2, e", ":4: 'x' is not in the sp",
        ":5: field 'pairID' is mi", ": 2 of 4 are missing (fi",
    ]  # fmt: skip
    assert main(["data", "check", str(written), "--data", str(folder)]) == 1
    assert "5 problems" in capsys.readouterr().out
    assert "is not in the split" in check_file(written, folder, "dev")[0]
    with pytest.raises(ConfigError, match=r"expected a file as submission\.csv \(VCR\)"):
        check_file(written, tmp_path)
    vqa = put_vqa(tmp_path / "vqa")
    (tmp_path / "answers.json").write_text(json.dumps([{"question_id": 7008, "answer": "yes"}]))
    (problem,) = check_file(tmp_path / "answers.json", vqa)
    assert problem.endswith("answers.json: 1 of 2 are missing (first: 7009)")
