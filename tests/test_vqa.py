"""Reading VQA v2 and VQA-CP v2: official files, pairs of files that do not agree, soft labels."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import damaged, lines, mutated
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError, Example
from tdlib.data.vqa import VqaReader, build_vocabulary, image_file
from tdlib.data.vqa_metric import Vocabulary

VOCABULARY = Vocabulary(("yes", "no", "2", "ladder"))


def annotation(number: int, *answers: str, kind: str = "other", **changes: Any) -> dict[str, Any]:
    """The annotation of question 458752000 + number, with ten answers (the last one repeated)."""
    given = [*answers, *[answers[-1]] * (10 - len(answers))]
    return {
        "question_type": f"is this {number}",
        "multiple_choice_answer": answers[-1],
        "answers": [
            {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)
        ],
        "image_id": 458752,
        "answer_type": kind,
        "question_id": 458752000 + number,
    } | changes  # fmt: skip


def question(number: int, text: str = "What is this photo taken looking through?", **changes: Any):
    return {"image_id": 458752, "question": text, "question_id": 458752000 + number} | changes


QUESTIONS = [question(0), question(1, "Is he on a ladder, in Zürich?"), question(2, "How many?")]
ANNOTATIONS = [
    annotation(2, "1", "3", "2", kind="number"),
    annotation(0, "net", "nets", "mesh"),
    annotation(1, "no", "no", "no", "ladder", "yes", kind="yes/no"),
]
RELEVANCE = {"question_id": 458752001, "spans": [[11, 17]], "boxes": [[10, 0, 20, 20]]}


def wrapped(key: str, records: Any) -> dict[str, Any]:
    """As published, with what stands around the records."""
    info = {"description": "VQA", "year": 2017, "license": {"url": "x"}, "questions of": [], "version": "2.0"}
    return {
        "info": info,
        "license": {"name": "CC"},
        "data_subtype": "train2014",
        key: records,
        "type": "mscoco",
    }


def put_picture(folder: Path, subtype: str = "train2014") -> None:
    (folder / subtype).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(folder / subtype / f"COCO_{subtype}_000000458752.jpg")


def write(
    folder: Path,
    questions: Any = QUESTIONS,
    annotations: Any = ANNOTATIONS,
    split: str = "train2014",
    subtype: str = "train2014",
) -> Path:
    put_picture(folder, subtype)
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    path.write_text(json.dumps(wrapped("questions", questions)))
    if annotations is not None:
        path = folder / f"v2_mscoco_{split}_annotations.json"
        path.write_text(json.dumps(wrapped("annotations", annotations), indent=1))
    return folder


def read(folder: Path, split: str = "train2014", **options: Any) -> list[Example]:
    return VqaReader(folder, split, VOCABULARY, **options).read()


def failure(folder: Path, split: str = "train2014", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, split, **options)
    return str(caught.value)


# the official files


def test_official_files_are_read_field_by_field(tmp_path):
    first, second, third = read(write(tmp_path))
    assert [e.id for e in (first, second, third)] == ["458752000", "458752001", "458752002"]
    assert {e.image for e in (first, second)} == {tmp_path / "train2014" / "COCO_train2014_000000458752.jpg"}
    assert second.prompt.text == "Is he on a ladder, in Zürich?"
    assert second.statements() == (second.prompt,)
    assert (second.boxes, second.choices, second.relevant_boxes) == ((), (), ())
    assert [e.stratum for e in (first, second, third)] == ["is this 0", "is this 1", "is this 2"]
    assert [e.answer_type for e in (first, second, third)] == ["other", "yes/no", "number"]
    assert second.annotators == ("no", "no", "no", "ladder", *["yes"] * 6)
    assert len(third.annotators) == 10


def test_labels_are_the_best_answers_of_the_vocabulary(tmp_path):
    first, second, third = read(write(tmp_path))
    assert (first.label, first.soft_label) == (None, ())  # out of the vocabulary
    assert (second.label, second.soft_label) == (0, ((0, 1.0), (1, 0.9), (3, 0.3)))
    assert (third.label, third.soft_label) == (2, ((2, 1.0),))
    examples = VqaReader(tmp_path, "train2014").open()
    assert examples.labelled and [e.label for e in examples] == [None] * 3
    assert [e.annotators for e in examples] == [e.annotators for e in (first, second, third)]


def test_of_equally_good_answers_the_first_of_the_vocabulary_is_the_label(tmp_path):
    (example,) = read(write(tmp_path, [question(1)], [annotation(1, *["ladder"] * 5, "no")]))
    assert (example.label, example.soft_label) == (1, ((1, 1.0), (3, 1.0)))


@pytest.mark.parametrize("split", ["test2015", "test-dev2015"])
def test_test_questions_have_no_annotations_and_share_their_pictures(tmp_path, split):
    write(tmp_path, annotations=None, split=split, subtype="test2015")
    examples = VqaReader(tmp_path, split, VOCABULARY).open()
    assert not examples.labelled and set(examples.strata) == {"all"}
    for example in examples:
        assert example.image == tmp_path / "test2015" / "COCO_test2015_000000458752.jpg"
        assert (example.label, example.annotators, example.soft_label) == (None, (), ())


def test_a_shifted_set_shares_the_pictures_of_its_source(tmp_path):
    write(tmp_path, split="val2014_prior", subtype="val2014")
    assert read(tmp_path, "val2014_prior")[0].image.parent == tmp_path / "val2014"
    assert image_file(Path("a"), "train2014", 9) == Path("a/train2014/COCO_train2014_000000000009.jpg")


def test_decisive_words_and_boxes_come_from_the_file_beside(tmp_path):
    write(tmp_path)
    (tmp_path / "v2_mscoco_train2014.relevance.jsonl").write_text(json.dumps(RELEVANCE) + "\n")
    first, second, _ = read(tmp_path)
    assert first.prompt.relevant == () and first.relevant_boxes == ()
    assert [second.prompt.text[start:end] for start, end in second.prompt.relevant] == ["ladder"]
    assert second.relevant_boxes == ((0.25, 0.0, 0.5, 1.0),)


# VQA-CP


def write_cp(folder: Path, questions: Any, annotations: Any, split: str = "train") -> Path:
    for subtype in ("train2014", "val2014"):
        put_picture(folder, subtype)
    (folder / f"vqacp_v2_{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"vqacp_v2_{split}_annotations.json").write_text(json.dumps(annotations))
    return folder


CP = [
    [each | {"coco_split": split} for each, split in zip(records, ("train2014", "val2014"), strict=True)]
    for records in (QUESTIONS[:2], ANNOTATIONS[1:])
]


@pytest.mark.parametrize("split", ["train", "test"])
def test_changing_priors_are_plain_lists_that_name_the_pictures_folder(tmp_path, split):
    write_cp(tmp_path, *CP, split=split)
    examples = read(tmp_path, split, changing_priors=True)
    assert [e.image.name for e in examples] == [
        "COCO_train2014_000000458752.jpg",
        "COCO_val2014_000000458752.jpg",
    ]
    assert [e.image.parent.name for e in examples] == ["train2014", "val2014"]
    assert [e.label for e in examples] == [None, 0] and examples[1].answer_type == "yes/no"
    assert build_vocabulary(tmp_path, split, 1, changing_priors=True).answers == ("mesh", "yes")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"coco_split": "test2015"}, "coco_split='test2015', expected train2014 or val2014"),
        ({"coco_split": None}, "field 'coco_split' is NoneType"),
    ],
)
def test_changing_priors_need_the_pictures_folder(tmp_path, changes, reason):
    write_cp(tmp_path, [CP[0][0], CP[0][1] | changes], CP[1])
    message = failure(tmp_path, "train", changing_priors=True)
    assert f"{tmp_path / 'vqacp_v2_train_questions.json'}, entry 2 (458752001): {reason}" in message


def test_changing_priors_and_vqa_are_not_mixed_up(tmp_path):
    write_cp(tmp_path, wrapped("questions", CP[0]), CP[1])
    assert "expected one of [, found '{'; is this a VQA-CP file" in failure(
        tmp_path, "train", changing_priors=True
    ).replace(" (byte 0)", "")
    with pytest.raises(DataError, match=r"vqacp_v2_test_annotations\.json: no such file"):
        (tmp_path / "vqacp_v2_test_questions.json").write_text("[]")
        VqaReader(tmp_path, "test", changing_priors=True)


# bad input


def test_missing_files_say_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"_train2014_questions\.json: no such file; .*found here: nothing"):
        VqaReader(tmp_path / "nowhere", "train2014")
    write(tmp_path, annotations=None)
    with pytest.raises(DataError, match=r"annotations\.json: no such file; only test2015 and test-dev2015"):
        VqaReader(tmp_path, "train2014")
    with pytest.raises(DataError, match=r"found here: v2_OpenEnded_mscoco_train2014_questions\.json"):
        VqaReader(tmp_path, "val2014")


BAD_PAIRS: dict[str, tuple[Any, Any, str]] = {
    "no annotation": (
        QUESTIONS,
        ANNOTATIONS[:2],
        "'questions' 2: question_id 458752001 has no annotation in",
    ),
    "no question": (QUESTIONS[:2], ANNOTATIONS, "1 annotations of questions that are not in"),
    "question twice": (
        [*QUESTIONS, QUESTIONS[1]],
        ANNOTATIONS,
        "'questions' 4: question_id 458752001 already",
    ),
    "annotated twice": (
        QUESTIONS,
        [*ANNOTATIONS, ANNOTATIONS[1]],
        "'annotations' 4: question_id 458752000 already",
    ),
    "no questions": ([], [], "the file has no questions"),
    "no object": ([*QUESTIONS, 3], ANNOTATIONS, "'questions' 4: expected a JSON object, found int"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_questions_and_annotations_must_agree(tmp_path, name):
    questions, annotations, reason = BAD_PAIRS[name]
    assert reason in failure(write(tmp_path, questions, annotations))


ANSWERS = ANNOTATIONS[2]["answers"]
BAD_RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # changes of question and annotation
    "other picture": ({}, {"image_id": 1}, "image_id=1, but its question is about 458752; files of diff"),
    "answer type": ({}, {"answer_type": "yes"}, "answer_type='yes', expected one of yes/no, number, other"),
    "no answer type": ({}, {"answer_type": None}, "field 'answer_type' is NoneType"),
    "no answers": ({}, {"answers": []}, "answers is [], expected ten objects"),
    "answers strings": ({}, {"answers": ["yes"] * 10}, "expected ten objects with an 'answer'"),
    "an answer number": ({}, {"answers": [*ANSWERS, {"answer": 2}]}, "expected ten objects"),
    "question type": ({}, {"question_type": 3}, "field 'question_type' is int"),
    "annotation id": ({}, {"question_id": "458752001"}, "field 'question_id' is str"),
    "empty question": ({"question": " "}, {}, "(458752001): the question is empty"),
    "question number": ({"question": 3}, {}, "field 'question' is int"),
    "id a string": ({"question_id": "458752001"}, {}, "field 'question_id' is str"),
    "id a fraction": ({"question_id": 458752001.0}, {}, "field 'question_id' is float"),
    "picture missing": ({"image_id": 7}, {"image_id": 7}, "COCO_train2014_000000000007.jpg: no such picture"),
    "picture too large": ({"image_id": 10**400}, {}, "no such picture"),
    "picture below zero": ({"image_id": -7}, {}, "no such picture"),
    "picture a name": ({"image_id": "7"}, {}, "field 'image_id' is str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_fails_with_its_place(tmp_path, name):
    in_question, in_annotation, reason = BAD_RECORDS[name]
    questions = [QUESTIONS[0], QUESTIONS[1] | in_question]
    annotations = [ANNOTATIONS[1], ANNOTATIONS[2] | in_annotation]
    message = failure(write(tmp_path, questions, annotations))
    assert message.startswith(str(tmp_path)) and "2" in message.partition(": ")[0] and reason in message
    assert message in VqaReader(tmp_path, "train2014").examine().problems


@pytest.mark.parametrize("side", ["questions", "annotations"])
def test_a_truncated_file_fails(tmp_path, side):
    write(tmp_path)
    (path,) = tmp_path.glob(f"*_{side}.json")
    path.write_text(path.read_text()[:-30])
    assert f"{path}: " in failure(tmp_path)


# the vocabulary


def test_the_vocabulary_has_the_frequent_answers_in_order_of_first_occurrence(tmp_path):
    said = ["The dog", "cat", "red", "dog", "2", "two", "cat", "dog."]
    write(tmp_path, annotations=[annotation(i, answer) for i, answer in enumerate(said)])
    assert build_vocabulary(tmp_path, "train2014", 1).answers == ("dog", "cat", "red", "2")
    assert build_vocabulary(tmp_path, "train2014", 2).answers == ("dog", "cat", "2")
    assert build_vocabulary(tmp_path, "train2014", 3).answers == ("dog",)


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        (ANNOTATIONS, "no answer occurs 9 times; lower the minimum"),
        ([], "no answer occurs 9 times"),
        (
            [ANNOTATIONS[0] | {"multiple_choice_answer": 2}],
            "'annotations' 1: field 'multiple_choice_answer' is",
        ),
    ],
)
def test_a_vocabulary_that_cannot_be_built_fails(tmp_path, annotations, reason):
    with pytest.raises(DataError, match=reason):
        build_vocabulary(write(tmp_path, annotations=annotations), "train2014")
    with pytest.raises(DataError, match=r"_val2014_annotations\.json: no such file"):
        build_vocabulary(tmp_path, "val2014")


# fuzzing


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def assert_examples_or_data_error(folder: Path) -> None:
    try:
        examples = read(folder)
    except DataError as error:
        assert str(folder) in str(error)
        assert list(VqaReader(folder, "train2014").examine().problems) != []
        return
    for example in examples:
        example.prompt.text.encode("utf-8")
        assert example.image.is_file() and example.annotators
        assert all(0 <= index < 4 and 0 < value <= 1 for index, value in example.soft_label)
        assert example.label == (
            max(example.soft_label, key=lambda each: each[1])[0] if example.soft_label else None
        )


@pytest.mark.parametrize("target", range(3))
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_mutation_gives_examples_or_a_data_error(fuzzed, target, data):
    records: list[Any] = [QUESTIONS[1], ANNOTATIONS[2], RELEVANCE]
    records[target] = data.draw(mutated(records[target]))
    write(fuzzed, records[:1], records[1:2])
    (fuzzed / "v2_mscoco_train2014.relevance.jsonl").write_text(lines(records[2]))
    assert_examples_or_data_error(fuzzed)


@pytest.mark.parametrize("side", ["OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_bytes_give_examples_or_a_data_error(fuzzed, side, data):
    path = write(fuzzed) / f"v2_{side}.json"
    path.write_bytes(damaged(data, path.read_bytes()))
    assert_examples_or_data_error(fuzzed)
