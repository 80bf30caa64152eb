"""VCR files that are damaged: every message says where, what was expected and what to do."""

import math
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    METADATA,
    RECORD,
    RELEVANCE,
    STEM,
    TYPES,
    another,
    damaged,
    failure,
    lines,
    mutated,
    read,
    without,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.data.examples import DataError
from tdlib.data.vcr import VcrReader

REMEDIES = (
    "copy",
    "unpack",
    "check",
    "expected",
    "is this a VCR file",
    "different releases",
    "remove",
    "belong",
)


def assert_helpful(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message
    assert any(remedy in message for remedy in REMEDIES), message


def test_a_missing_split_lists_what_is_there(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError) as caught:
        VcrReader(tmp_path, "vall")
    assert_helpful(str(caught.value), f"{tmp_path / 'vall.jsonl'}: no such file", "found here: train.jsonl")
    with pytest.raises(DataError, match="found here: nothing"):
        VcrReader(tmp_path / "nowhere", "train")


def test_missing_pictures_fail_at_once(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(RECORD))
    with pytest.raises(DataError, match=r"vcr1images: no such folder; unpack vcr1images\.zip"):
        VcrReader(tmp_path, "train")


BAD_FILES = {
    "truncated": (lines(RECORD, another(1))[:-40].encode(), ":2:", "truncated"),
    "no object": (lines(RECORD, [1, 2]).encode(), ":2:", "found list"),
    "a number": (b"3\n", ":1:", "found int"),
    "not UTF-8": (lines(RECORD).encode() + b'{"a": "\xff"}\n', ":2:", "UTF-8"),
    "UTF-16": (lines(RECORD).encode("utf-16"), ":", "not UTF-8"),
    "half a surrogate pair": (lines(another(0, annot_id="\ud800")).encode(), ":1:", "UTF-8"),
    "endless nesting": (b"[" * 100_000, ":1:", "not valid JSON"),
    "a number too long": (b'{"annot_id": ' + b"1" * 5000 + b"}", ":1:", "not valid JSON"),
    "empty": (b"", "", "no examples"),
    "blank": (b"\n \n", "", "no examples"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", ":1:", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_fails_with_its_line(tmp_path, name):
    content, line, reason = BAD_FILES[name]
    write(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(content)
    assert_helpful(failure(tmp_path), f"{tmp_path / 'train.jsonl'}{line}", reason)


CHOICES = RECORD["answer_choices"]
BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {  # changes of a good line
    "label too large": (dict(answer_label=4), "answer_label=4, expected 0 to 3"),
    "label below zero": (dict(answer_label=-1), "answer_label=-1, expected 0 to 3"),
    "label true": (dict(answer_label=True), "'answer_label' is bool, expected int"),
    "label a string": (dict(answer_label="1"), "'answer_label' is str, expected int"),
    "label a fraction": (dict(answer_label=1.0), "'answer_label' is float, expected int"),
    "label null": (dict(answer_label=None), "'answer_label' is NoneType, expected int"),
    "three choices": (dict(answer_choices=CHOICES[:3]), "answer_choices has 3 entries, expected 4"),
    "five choices": (dict(answer_choices=[*CHOICES, ["a"]]), "answer_choices has 5 entries"),
    "choice a string": (dict(answer_choices=["Yes", *CHOICES[1:]]), "answer_choices[0] is 'Yes'"),
    "no such object": (dict(question=["Is", [0, 5], "?"]), "question: reference to object 5, but"),
    "object below zero": (dict(question=[[-1]]), "reference to object -1"),
    "reference to a name": (dict(question=[["person"]]), "question: a reference is a non-empty list"),
    "reference true": (dict(question=[[True]]), "a reference is a non-empty list of integers"),
    "empty reference": (dict(answer_choices=[[[]], *CHOICES[1:]]), "answer_choices[0]: a reference is"),
    "token a number": (dict(question=["Is", 0, "?"]), "a token is a string or a list of object indices"),
    "other objects": (dict(objects=["person"]), "'objects' differs from the names in"),
    "image missing": (dict(img_fn="gone.jpg"), "img_fn='gone.jpg': no such file"),
    "image a folder": (dict(img_fn="."), "img_fn='.': no such file"),
    "image name odd": (dict(img_fn="a\0b" + "c" * 9999), "no such file"),
    "metadata missing": (dict(metadata_fn="gone.json"), "metadata_fn='gone.json': no such file"),
    "metadata a picture": (dict(metadata_fn=f"{STEM}.jpg"), "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_fails_with_its_line_and_id(tmp_path, name):
    changes, reason = BAD_RECORDS[name]
    write(tmp_path, RECORD, another(1, **changes))
    assert_helpful(failure(tmp_path), f"{tmp_path / 'train.jsonl'}:2", "train-1", reason)


@pytest.mark.parametrize(
    ("field", "subtask"),
    [
        *((key, "qa") for key in ("objects", "img_fn", "metadata_fn", "question", "answer_choices")),
        ("rationale_choices", "qar"),
    ],
)
def test_a_missing_or_mistyped_field_fails_by_name(tmp_path, field, subtask):
    write(tmp_path, RECORD, without(another(1), field))
    assert_helpful(
        failure(tmp_path, subtask=subtask), "train.jsonl:2 (train-1)", f"field '{field}' is missing"
    )
    write(tmp_path, RECORD, another(1, **{field: 3}))
    assert_helpful(failure(tmp_path, subtask=subtask), "train.jsonl:2 (train-1)", f"field '{field}' is int")


def test_an_id_is_needed_and_stands_once(tmp_path):
    write(tmp_path, RECORD, without(RECORD, "annot_id"))
    assert_helpful(failure(tmp_path), "train.jsonl:2: field 'annot_id' is missing")
    write(tmp_path, RECORD, another(1), RECORD)
    assert_helpful(failure(tmp_path), "train.jsonl:3", "'train-0' already stands in ")


@pytest.mark.parametrize(("subtask", "field"), [("qa", "answer_label"), ("qar", "rationale_label")])
def test_labels_are_there_for_all_or_none(tmp_path, subtask, field):
    write(tmp_path, RECORD, without(another(1), field), another(2))
    assert_helpful(
        failure(tmp_path, subtask=subtask), f"train.jsonl:2 (train-1): no {field}, as 1 of 3 lines"
    )


def box(*corners: Any) -> dict[str, Any]:
    return METADATA | {"boxes": [list(corners), *METADATA["boxes"][1:]]}


BAD_METADATA: dict[str, tuple[Any, str]] = {
    "a list": ([], "found list"),
    "no width": (without(METADATA, "width"), "width=None"),
    "width zero": (METADATA | {"width": 0}, "width=0"),
    "height negative": (METADATA | {"height": -800}, "height=-800"),
    "width infinite": (METADATA | {"width": math.inf}, "width=inf"),
    "width NaN": (METADATA | {"width": math.nan}, "width=nan"),
    "width huge": (METADATA | {"width": 10**400}, "expected positive numbers"),
    "width true": (METADATA | {"width": True}, "width=True"),
    "width a string": (METADATA | {"width": "1920"}, "width='1920'"),
    "no names": (without(METADATA, "names"), "names=None"),
    "names numbers": (METADATA | {"names": [1, 2, 3, 4, 5]}, "expected a list of class names"),
    "names a string": (METADATA | {"names": "abcde"}, "expected a list of class names"),
    "fewer names": (METADATA | {"names": ["person"]}, "1 names but 5 boxes"),
    "no boxes": (without(METADATA, "boxes"), "boxes is NoneType"),
    "boxes an object": (METADATA | {"boxes": {}}, "boxes is dict"),
    "box short": (box(0, 0, 1), "box 0 is [0, 0, 1]"),
    "box strings": (box("0", "0", "1", "1"), "expected [x1, y1, x2, y2]"),
    "box NaN": (box(0, math.nan, 1, 1), "box 0 is [0, nan, 1, 1]"),
    "box infinite": (box(0, 0, math.inf, 1), "box 0 is"),
    "box nested": (box([0], 0, 1, 1), "box 0 is"),
    "box below": (box(0, 0, 9, 900, 1), "box 0 is [0, 0, 9, 900], outside the picture of 1920 x 800"),
    "box left of it": (box(-200, 0, 100, 100), "outside the picture"),
    "corners swapped": (box(100, 0, 50, 100), "corners swapped"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_bad_metadata_fail_by_file_and_user(tmp_path, name):
    metadata, reason = BAD_METADATA[name]
    write(tmp_path, metadata=metadata)
    path = tmp_path / "vcr1images" / f"{STEM}.json"
    assert_helpful(failure(tmp_path), str(path), f"used by {tmp_path / 'train.jsonl'}:1 (train-0)", reason)


BAD_RELEVANCE: dict[str, tuple[dict[str, Any], str]] = {  # changes of a good line of relevance
    "id a list": ({"annot_id": []}, "relevance.jsonl:1: field 'annot_id' is list"),
    "indices a number": ({"question": 3}, "relevance.jsonl:1: question is 3"),
    "indices strings": ({"question": ["a"]}, "relevance.jsonl:1: question is ['a']"),
    "indices true": ({"question": [True]}, "relevance.jsonl:1: question is [True]"),
    "an object": ({"rationale_choices": {}}, "relevance.jsonl:1: field 'rationale_choices' is dict"),
    "not lists": ({"answer_choices": [0] * 4}, "answer_choices[0] is 0"),
    "no such token": ({"question": [12]}, "train.jsonl:1 (train-0): question: token 12 is marked"),
    "token below zero": ({"answer_choices": [[-1]] * 4}, "answer_choices[0]: token -1"),
    "boxes a number": ({"boxes": 1}, "relevance.jsonl:1: boxes is int"),
    "a box short": ({"boxes": [[0, 0, 1]]}, "box 0 is [0, 0, 1]"),
    "a box outside": ({"boxes": [[0, 0, 5000, 1]]}, "outside the picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RELEVANCE)
def test_bad_relevance_fails(tmp_path, name):
    changes, reason = BAD_RELEVANCE[name]
    assert_helpful(failure(write(tmp_path, relevance=RELEVANCE | changes)), "train", reason)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (without(TYPES, "annot_id"), "types.jsonl:1: field 'annot_id' is missing"),
        (without(TYPES, "type"), "types.jsonl:1: field 'type' is missing"),
        (TYPES | {"type": 2}, "types.jsonl:1: field 'type' is int"),
        (TYPES | {"annot_id": "val-0"}, "(train-0): its *.types.jsonl has no line for it"),
    ],
)
def test_bad_question_types_fail(tmp_path, record, reason):
    assert_helpful(failure(write(tmp_path, types=record)), reason)


# fuzzing: whatever stands in a file, the reader answers with examples or with a DataError


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def assert_examples_or_data_error(folder: Path, subtask: str) -> None:
    try:
        examples = read(folder, subtask=subtask)
    except DataError as error:
        assert str(folder) in str(error)
        return
    for example in examples:
        assert len(example.choices) == 4 and example.label in (None, 0, 1, 2, 3)
        assert len(example.names) == len(example.boxes)
        for left, top, right, bottom in (*example.boxes, *example.relevant_boxes):
            assert 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1
        for part in example.statements():
            part.text.encode("utf-8")
            for start, end in (*part.relevant, *((r.start, r.end) for r in part.references)):
                assert 0 <= start <= end <= len(part.text)


@pytest.mark.parametrize("target", ["record", "metadata", "relevance", "types"])
@settings(deadline=None, max_examples=50)
@given(data=st.data(), subtask=st.sampled_from(["qa", "qar", "both"]))
def test_any_mutation_gives_examples_or_a_data_error(fuzzed, target, data, subtask):
    files = {"record": RECORD, "metadata": METADATA, "relevance": RELEVANCE, "types": TYPES}
    files[target] = data.draw(mutated(files[target]))
    record = files.pop("record")
    write(fuzzed, record, **files)
    assert_examples_or_data_error(fuzzed, subtask)


@pytest.mark.parametrize(
    "name", ["train.jsonl", f"vcr1images/{STEM}.json", "train.relevance.jsonl", "train.types.jsonl"]
)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_bytes_give_examples_or_a_data_error(fuzzed, name, data):
    write(fuzzed, relevance=RELEVANCE, types=TYPES)
    (fuzzed / name).write_bytes(damaged(data, (fuzzed / name).read_bytes()))
    assert_examples_or_data_error(fuzzed, "qar")
