"""Reading VCR: the official files field by field, text and its spans, and files that are damaged."""

import copy
import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError, Example, Examples, Reference, low_shot
from tdlib.data.vcr import (
    NEUTRAL_NAMES,
    PERSON_TOKENS,
    VcrReader,
    neutral_name,
    render,
)
from tdlib.data.vcr_results import SUBMISSION_COLUMNS, check_submission, joint_scores, write_submission

# One line of train.jsonl and its metadata, as published (names with "@", 1-based numbers in the raw
# strings, several objects in one reference, class names without spaces, segms, box scores).
STEM = "lsmdc_3015_CHARLIE_ST_CLOUD/3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0"
RECORD: dict[str, Any] = {
    "movie": "3015_CHARLIE_ST_CLOUD",
    "objects": ["person", "person", "wineglass", "person", "diningtable"],
    "interesting_scores": [1, 0, -1, 0, -1],
    "answer_likelihood": "possible",
    "img_fn": f"{STEM}.jpg",
    "metadata_fn": f"{STEM}.json",
    "answer_orig": "They're afraid of 2.",
    "question_orig": "Why don't 1 and 4 look at 2's 3?",
    "rationale_orig": "2 sits at 5: he's angry!",
    "question": ["Why", "do", "n't", [0, 3], "look", "at", [1], "'s", [2], "?"],
    "answer_match_iter": [3, 0, 2, 1],
    "answer_sources": [31204, 0, 10811, 2231],
    "answer_choices": [
        ["No", ",", [0], "is", "not", "hungry", "."],
        ["They", "'re", "afraid", "of", [1], "."],
        [[0, 1, 3], "ca", "n't", "see", "it", "."],
        ["Yes", "."],
    ],
    "answer_label": 1,
    "rationale_choices": [
        [[3], "has", "a", [2], "in", "one", "hand", "."],
        ["I", "'m", "not", "sure", "."],
        [[1], "sits", "at", [4], ":", "he", "'s", "angry", "!"],
        ["It", "is", "dark", ";", "nobody", "'d", "come", "."],
    ],
    "rationale_sources": [4, 0, 2, 18],
    "rationale_match_iter": [1, 3, 0, 2],
    "rationale_label": 2,
    "img_id": "train-0",
    "question_number": 0,
    "annot_id": "train-0",
    "match_fold": "train-0",
    "match_index": 0,
    "a_field_of_a_later_release": {"x": [None]},
}
METADATA: dict[str, Any] = {
    "boxes": [
        [480.0, 80.0, 960.0, 800.0, 0.99],
        [0.0, 0.0, 192.0, 400.0, 0.98],
        [96, 200, 192, 400, 1],
        [1900.5, 0.0, 1923.0, 805.0, 0.71],  # rounded outwards by the detector
        [0.0, 400.0, 1920.0, 800.0, 0.9],
    ],
    "segms": [
        [[[480.0, 80.0], [960.0, 80.0], [960.0, 800.0]]],
        [],
        [[[96, 200], [100, 210], [96, 220]]],
        [],
        [],
    ],
    "names": ["person", "person", "wineglass", "person", "diningtable"],
    "width": 1920,
    "height": 800,
}
RELEVANCE: dict[str, Any] = {
    "annot_id": "train-0",
    "question": [4, 5, 8],
    "answer_choices": [[5], [2, 3, 4], [1, 2, 3], [0]],
    "rationale_choices": [[3], [3], [7], [2]],
    "boxes": [[96, 200.0, 192, 400]],
}
TYPES: dict[str, Any] = {"annot_id": "train-0", "type": "mental"}


def another(number: int, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(RECORD) | {"annot_id": f"train-{number}"} | changes


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(folder: Path, *records: Any, metadata: Any = METADATA, **side: Any) -> Path:
    """A VCR folder with one split, train, and one picture; ``side`` are lines of side files."""
    picture = folder / "vcr1images" / f"{STEM}.jpg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(b"the reader opens no picture")
    picture.with_suffix(".json").write_text(json.dumps(metadata))
    (folder / "train.jsonl").write_text(lines(*(records or [RECORD])))
    for kind, record in side.items():
        (folder / f"train.{kind}.jsonl").write_text(lines(record))
    return folder


def read(folder: Path, **options: Any) -> list[Example]:
    return VcrReader(folder, "train", **options).read()


def failure(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **options)
    return str(caught.value)


# the official files


def test_an_official_line_is_read_field_by_field(tmp_path):
    (example,) = read(write(tmp_path))
    assert example.id == "train-0"
    assert example.image == tmp_path / "vcr1images" / f"{STEM}.jpg"
    assert example.names == tuple(RECORD["objects"])
    assert example.prompt.text == "Why don't Casey and Jackie look at Riley's wineglass?"
    assert [choice.text for choice in example.choices] == [
        "No, Casey is not hungry.",
        "They're afraid of Riley.",
        "Casey and Riley and Jackie can't see it.",
        "Yes.",
    ]
    assert example.label == 1
    assert example.stratum == "all"
    assert example.relevant_boxes == ()
    assert all(part.relevant == () for part in example.statements())


def test_boxes_are_shares_of_the_picture_without_their_score(tmp_path):
    (example,) = read(write(tmp_path))
    assert example.boxes[0] == pytest.approx((0.25, 0.1, 0.5, 1.0))
    assert example.boxes[2] == pytest.approx((0.05, 0.25, 0.1, 0.5))
    assert example.boxes[3] == (1900.5 / 1920, 0.0, 1.0, 1.0)  # clipped
    plain = METADATA | {"boxes": [box[:4] for box in METADATA["boxes"]]}
    assert read(write(tmp_path, metadata=plain))[0].boxes == example.boxes


def test_references_are_spans_of_the_text_with_their_objects(tmp_path):
    (example,) = read(write(tmp_path))
    prompt = example.prompt
    named = [(prompt.text[r.start : r.end], r.objects) for r in prompt.references]
    assert named == [("Casey", (0,)), ("Jackie", (3,)), ("Riley", (1,)), ("wineglass", (2,))]
    assert example.choices[2].references == (
        Reference(0, 5, (0,)), Reference(10, 15, (1,)), Reference(20, 26, (3,))
    )  # fmt: skip


def test_rationales_are_conditioned_on_the_right_answer(tmp_path):
    (answers,) = read(write(tmp_path, relevance=RELEVANCE))
    (example,) = read(tmp_path, subtask="qar")
    right = answers.choices[1]
    assert example.prompt.text == f"{answers.prompt.text} {right.text}"
    assert [example.prompt.text[r.start : r.end] for r in example.prompt.references] == [
        "Casey", "Jackie", "Riley", "wineglass", "Riley",
    ]  # fmt: skip
    assert [example.prompt.text[start:end] for start, end in example.prompt.relevant] == [
        "look at", "wineglass", "afraid of Riley",
    ]  # fmt: skip
    assert [choice.text for choice in example.choices] == [
        "Jackie has a wineglass in one hand.",
        "I'm not sure.",
        "Riley sits at diningtable: he's angry!",
        "It is dark; nobody'd come.",
    ]
    assert example.label == 2


def test_objects_may_go_by_their_category(tmp_path):
    (example,) = read(write(tmp_path), references="category")
    assert example.prompt.text == "Why don't person and person look at person's wineglass?"


def test_the_test_file_has_no_labels(tmp_path):
    hidden = ("answer_label", "rationale_label", "answer_orig", "rationale_orig", "answer_sources")
    write(tmp_path, without(RECORD, *hidden), another(1) | {"annot_id": "x"})
    (tmp_path / "test.jsonl").write_text(lines(without(RECORD, *hidden)))
    (example,) = VcrReader(tmp_path, "test").read()
    assert example.label is None and len(example.choices) == 4
    given = VcrReader(tmp_path, "test", "qar").read()  # as the leaderboard asks: given each answer
    assert [example.id for example in given] == [f"train-0:r{k}" for k in range(4)]
    for k, conditioned in enumerate(given):
        assert conditioned.label is None
        assert conditioned.prompt.text == f"{example.prompt.text} {example.choices[k].text}"


def test_examples_keep_the_file_order_and_blank_lines_are_skipped(tmp_path):
    write(tmp_path)
    (tmp_path / "train.jsonl").write_text(f"\n{lines(another(5))}\r\n   \n{lines(another(2))}")
    assert [example.id for example in read(tmp_path)] == ["train-5", "train-2"]


def test_a_data_folder_may_be_given_by_any_path(tmp_path, monkeypatch):
    write(tmp_path / "vcr")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert len(read(Path("../vcr"))) == 1
    assert len(VcrReader("../vcr", "train").read()) == 1


def test_a_metadata_file_is_read_once_for_all_its_questions(tmp_path, monkeypatch):
    write(tmp_path, *(another(number) for number in range(5)), relevance=RELEVANCE)
    opened = []
    original = Path.read_bytes

    def read_bytes(self):
        opened.append(self.name)
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert len(read(tmp_path)) == 5
    assert opened == [f"{Path(STEM).name}.json"]


def picture_of(folder: Path, size: tuple[int, int], orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / "vcr1images" / f"{STEM}.jpg", exif=exif)


def test_boxes_of_stored_pixels_turn_with_the_picture(tmp_path):
    """Metadata of 1920 x 800 and a picture stored so, which stands upright when turned by a quarter."""
    plain = read(write(tmp_path, relevance=RELEVANCE))[0]
    picture_of(tmp_path, (192, 80), orientation=6)
    turned = read(tmp_path)[0]
    assert turned.boxes == tuple((1 - y2, x1, 1 - y1, x2) for x1, y1, x2, y2 in plain.boxes)
    x1, y1, x2, y2 = plain.relevant_boxes[0]
    assert turned.relevant_boxes == ((1 - y2, x1, 1 - y1, x2),)
    picture_of(tmp_path, (80, 192), orientation=6)  # the metadata state the size of the upright picture
    assert read(tmp_path)[0].boxes == plain.boxes


def test_exchanged_width_and_height_are_refused(tmp_path):
    write(tmp_path)
    picture_of(tmp_path, (800, 1920))
    assert "width=1920, height=800, but the picture has 800 x 1920 pixels" in failure(tmp_path)
    (problem,) = VcrReader(tmp_path, "train").problems()
    assert "width and height are exchanged" in problem


def test_every_miniworld_split_is_read(world):
    for split in ("train", "val", "test", "val_shortcut"):
        written = [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]
        examples = VcrReader(world, split).read()
        assert [example.id for example in examples] == [record["annot_id"] for record in written]
        assert all(example.image.is_file() for example in examples)
        assert all(len(example.relevant_boxes) == 1 for example in examples)
        assert all(example.prompt.relevant for example in examples)
        assert "all" not in {example.stratum for example in examples}
        assert {example.label is None for example in examples} == {split == "test"}


# the MiniWorld's side files


def test_relevant_tokens_become_spans_of_exactly_these_words(tmp_path):
    (example,) = read(write(tmp_path, relevance=RELEVANCE))

    def words(part):
        return [part.text[start:end] for start, end in part.relevant]

    assert words(example.prompt) == ["look at", "wineglass"]
    assert [words(choice) for choice in example.choices] == [
        ["hungry"],
        ["afraid of Riley"],
        ["can't see"],
        ["Yes"],
    ]
    assert example.relevant_boxes == (pytest.approx((0.05, 0.25, 0.1, 0.5)),)


def test_relevance_may_be_known_in_part(tmp_path):
    (example,) = read(write(tmp_path, relevance={"annot_id": "train-0", "question": [0]}))
    assert example.prompt.relevant == ((0, 3),)
    assert example.relevant_boxes == () and example.choices[0].relevant == ()
    (example,) = read(write(tmp_path, relevance={"annot_id": "another"}))
    assert example.prompt.relevant == ()


def test_question_types_are_strata_and_shared_with_a_reworded_split(tmp_path):
    write(tmp_path, types=TYPES)
    (tmp_path / "train_shortcut.jsonl").write_text(lines(RECORD))
    for split in ("train", "train_shortcut"):
        assert [example.stratum for example in VcrReader(tmp_path, split).read()] == ["mental"]
    (tmp_path / "train_shortcut.types.jsonl").write_text(lines(TYPES | {"type": "scene"}))
    assert VcrReader(tmp_path, "train_shortcut").read()[0].stratum == "scene"


# rendering


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (["Hello", ",", "you", "!"], "Hello, you!"),
        (["It", "is", "n't", "so", "."], "It isn't so."),
        (
            ["they", "'ve", "said", "I", "'d", "we", "'ll", "you", "'re", "."],
            "they've said I'd we'll you're.",
        ),
        ([[0], "'s", "dog", "and", [1]], "Casey's dog and dog"),
        ([[0, 1, 2]], "Casey and dog and Jessie"),
        ([[2], ":", "why", "?"], "Jessie: why?"),
        (["."], "."),
    ],
)
def test_rendering(tokens, text):
    assert render(tokens, ["person", "dog", "person"]).text == text


def test_people_are_named_by_their_index_and_things_by_their_class():
    assert neutral_name(2, "pottedplant") == "pottedplant"
    assert [neutral_name(index, "person") for index in (0, 14, 15, 31)] == [
        "Casey",
        "Quinn",
        "Casey",
        "Riley",
    ]
    assert len(NEUTRAL_NAMES) == 15


@st.composite
def mixed_tokens(draw) -> tuple[list, list[str]]:
    names = draw(st.lists(st.sampled_from(["person", "person", "dog", "wineglass"]), min_size=1, max_size=20))
    word = st.text("abzé日", min_size=1, max_size=5) | st.sampled_from([".", ",", "'s", "n't", "?", "-", "'"])
    reference = st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4)
    return draw(st.lists(word | reference, min_size=1, max_size=12)), names


def spoken(token, names: list[str]) -> str:
    return token if isinstance(token, str) else " and ".join(neutral_name(i, names[i]) for i in token)


@settings(deadline=None, max_examples=60)
@given(mixed_tokens())
def test_reference_spans_are_the_names_and_indices(case):
    tokens, names = case
    part = render(tokens, names)
    objects = [i for token in tokens if isinstance(token, list) for i in token]
    assert [r.objects for r in part.references] == [(i,) for i in objects]
    assert [part.text[r.start : r.end] for r in part.references] == [spoken([i], names) for i in objects]
    assert all(first.end <= second.start for first, second in pairwise(part.references))
    assert part.text.replace(" ", "") == "".join(spoken(token, names) for token in tokens).replace(" ", "")
    assert part.text == part.text.strip() and "  " not in part.text


@settings(deadline=None, max_examples=60)
@given(mixed_tokens(), st.data())
def test_decisive_spans_cover_exactly_the_decisive_words(case, data):
    tokens, names = case
    decisive = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=8))
    text = render(tokens, names).text
    alone = {}
    for i in decisive:
        (alone[i],) = render(tokens, names, decisive=[i]).relevant
        assert text[slice(*alone[i])] == spoken(tokens[i], names)
    together = render(tokens, names, decisive=decisive).relevant

    def covered(spans) -> set[int]:
        return {i for start, end in spans for i in range(start, end) if not text[i].isspace()}

    assert covered(together) == covered(alone.values())
    assert all(end < start for (_, end), (start, _) in pairwise(together))  # in order, and neighbours merged
    assert all(text[end:start].strip() for (_, end), (start, _) in pairwise(together))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_decisive_token_must_exist(index):
    with pytest.raises(IndexError, match=f"token {index} .* 2 tokens"):
        render(["yes", "."], [], decisive=[index])


# bad input: every message says where, what was expected and what to do

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


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ({"subtask": "q2a"}, "subtask='q2a': expected one of qa, qar"),
        ({"references": "ids"}, "names, person_tokens, category"),
    ],
)
def test_unknown_options_fail_with_the_known_ones(tmp_path, options, choices):
    assert choices in failure(write(tmp_path), **options)


BAD_FILES = {
    "truncated": (lines(RECORD, another(1))[:-40].encode(), ":2:", "truncated"),
    "no object": (lines(RECORD, [1, 2]).encode(), ":2:", "found list"),
    "a number": (b"3\n", ":1:", "found int"),
    "not UTF-8": (lines(RECORD).encode() + b'{"a": "\xff"}\n', ":2:", "UTF-8"),
    "UTF-16": (lines(RECORD).encode("utf-16"), ":1:", "UTF-8"),
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
    "image outside": (dict(img_fn="../../secret.jpg"), "img_fn='../../secret.jpg' leads out of"),
    "image absolute": (dict(img_fn="/etc/passwd"), "img_fn='/etc/passwd' leads out of"),
    "metadata outside": (dict(metadata_fn="../train.jsonl"), "metadata_fn='../train.jsonl' leads out"),
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
    "three lists": ({"answer_choices": [[0]] * 3}, "expected 4 lists of token indices"),
    "an object": ({"rationale_choices": {}}, "rationale_choices is {}"),
    "not lists": ({"answer_choices": [0] * 4}, "answer_choices[0] is 0"),
    "no such token": ({"question": [10]}, "train.jsonl:1 (train-0): question: token 10 is marked"),
    "token below zero": ({"answer_choices": [[-1]] * 4}, "answer_choices[0]: token -1"),
    "boxes a number": ({"boxes": 1}, "relevance.jsonl:1: boxes is 1"),
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

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.just(10**400) | st.floats()
    | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def places(value: Any, depth: int = 3) -> list[tuple]:
    """Paths to all the values inside a JSON value, down to a depth."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in pairs if depth else ():
        found += [(key,), *((key, *path) for path in places(inner, depth - 1))]
    return found


@st.composite
def mutated(draw, value: Any) -> Any:
    """A JSON value with up to two places dropped or replaced by anything."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(value) or [()])) or [None]
        if last is None:
            return value
        parent = value
        for key in path:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = draw(ANYTHING)
        else:
            del parent[last]
    return value


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
    content = (fuzzed / name).read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    (fuzzed / name).write_bytes(content[:start] + data.draw(st.binary(max_size=6)) + content[end:])
    assert_examples_or_data_error(fuzzed, "qar")


# answers and rationales together

HIDDEN = ("answer_label", "rationale_label")


def both(folder: Path, split: str = "train") -> Examples:
    return VcrReader(folder, split, "both").open()


def test_both_gives_answers_and_rationales_of_each_question(tmp_path):
    write(tmp_path, RECORD, another(1, answer_label=3), types=TYPES)
    (tmp_path / "train.types.jsonl").write_text(lines(TYPES, {"annot_id": "train-1", "type": "scene"}))
    examples = both(tmp_path)
    assert list(examples.ids) == ["train-0", "train-0:r", "train-1", "train-1:r"]
    assert list(examples.strata) == ["mental", "mental rationale", "scene", "scene rationale"]
    assert examples.labelled and [example.label for example in examples] == [1, 2, 3, 2]
    assert [(e.id, e.stratum) for e in examples] == list(zip(examples.ids, examples.strata, strict=True))
    for part, alone in ((examples[0::2], read(tmp_path)), (examples[1::2], read(tmp_path, subtask="qar"))):
        assert [(e.prompt, e.choices, e.label) for e in part] == [
            (e.prompt, e.choices, e.label) for e in alone
        ]


def test_both_expands_a_test_file_to_what_the_leaderboard_asks(tmp_path):
    write(tmp_path)
    (tmp_path / "test.jsonl").write_text(lines(*(without(another(i), *HIDDEN) for i in (7, 8))))
    examples = both(tmp_path, "test")
    parts = ["", ":r0", ":r1", ":r2", ":r3"]
    assert list(examples.ids) == [f"train-{i}{part}" for i in (7, 8) for part in parts]
    assert list(examples.strata[:3]) == ["all", "all rationale", "all rationale"]
    assert not examples.labelled and {example.label for example in examples} == {None}
    question, *given = examples[:5]
    assert [e.prompt.text for e in given] == [f"{question.prompt.text} {c.text}" for c in question.choices]
    assert len({e.choices for e in given}) == 1


@pytest.mark.parametrize("lacking", HIDDEN)
@pytest.mark.parametrize("all_of_them", [True, False])
def test_both_needs_both_labels_or_none(tmp_path, lacking, all_of_them):
    write(tmp_path, without(RECORD, lacking), another(1) if not all_of_them else without(another(1), lacking))
    message = failure(tmp_path, subtask="both")
    assert_helpful(message, "train.jsonl:1 (train-0)", f"no {lacking}")
    write(tmp_path, RECORD, without(another(1), *HIDDEN))
    assert "train.jsonl:2 (train-1): no answer_label, as 1 of 2 lines" in failure(tmp_path, subtask="both")


@pytest.mark.parametrize("shots", [1, 4, 7, 0.3, 0.5])
def test_low_shot_keeps_answers_and_rationales_together_and_nested(tmp_path, shots):
    write(tmp_path, *(another(i) for i in range(20)))
    types = (TYPES | {"annot_id": f"train-{i}", "type": "scene" if i % 2 else "role"} for i in range(20))
    (tmp_path / "train.types.jsonl").write_text(lines(*types))
    examples = both(tmp_path)
    for seed in range(5):
        chosen = low_shot(examples, shots, seed)
        questions = [i for i in chosen.ids if not i.endswith(":r")]
        assert sorted(chosen.ids) == sorted([*questions, *(f"{i}:r" for i in questions)])
        assert len(questions) == 2 * (shots if isinstance(shots, int) else round(10 * shots))
        assert set(chosen.ids) < set(low_shot(examples, 8, seed).ids)
        alone = low_shot(VcrReader(tmp_path, "train").open(), shots, seed)
        assert list(alone.ids) == questions  # and the same questions as where only answers are learned


def test_making_examples_is_put_off_until_one_is_asked_for(tmp_path):
    write(tmp_path, *(another(i) for i in range(4)), another(4, question=[[9]]))
    examples = low_shot(both(tmp_path), 5, 0)
    assert [example.id for example in examples[:8]] == [f"train-{i}{p}" for i in range(4) for p in ("", ":r")]
    with pytest.raises(DataError, match="reference to object 9"):
        examples[8]


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


def test_ids_may_hold_what_tells_the_parts_apart(tmp_path):
    write(tmp_path, *(another(i, annot_id=f"clip:r{i}:r") for i in range(12)))
    examples = both(tmp_path)
    assert examples.questions[:3] == ["clip:r0:r", "clip:r0:r", "clip:r1:r"]
    assert [(e.question, e.part) for e in examples[:2]] == [("clip:r0:r", ""), ("clip:r0:r", "r")]
    subsets = {tuple(low_shot(examples, 2, seed).questions[::2]) for seed in range(9)}
    assert len(subsets) > 4
    write(tmp_path, another(0, annot_id="clip"), another(1, annot_id="clip:r"))
    with pytest.raises(DataError, match="'clip:r' is also the id of another question's rationales"):
        both(tmp_path)
    assert VcrReader(tmp_path, "train").open().ids == ["clip", "clip:r"]


# people as tokens, and masked objects


@pytest.mark.parametrize(
    ("tokens", "scheme", "text", "objects"),
    [
        ([[0, 2], "'s", [1], "?"], "person_tokens", "person_0 person_2's dog?", [(0,), (2,), (1,)]),
        ([[10_000], "sits", "."], "names", "[MASK] sits.", []),
        ([[0, 10_002], "sit"], "names", "Casey and [MASK] sit", [(0,)]),
        ([[10_000, 2], "sit"], "person_tokens", "[MASK] person_2 sit", [(2,)]),
        (["[MASK]", [10_001]], "category", "[MASK] [MASK]", []),
    ],
)
def test_people_as_tokens_and_masked_objects(tokens, scheme, text, objects):
    part = render(tokens, ["person", "dog", "person"], scheme)
    assert part.text == text
    assert [reference.objects for reference in part.references] == objects


def test_there_are_81_person_tokens_and_the_last_stands_for_all_beyond():
    part = render([[80], [81], [200]], ["person"] * 201, "person_tokens")
    assert part.text == "person_80 person_80 person_80"
    assert (len(PERSON_TOKENS), PERSON_TOKENS[0], PERSON_TOKENS[-1]) == (81, "person_0", "person_80")


@pytest.mark.parametrize("tag", [3, 9_999, 10_003, 20_000, 20_001, -1, -10_000])
def test_a_masked_object_must_exist_too(tag):
    with pytest.raises(IndexError, match=f"reference to object {tag}, but the picture has 3 objects"):
        render([[tag]], ["person"] * 3)


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
        ((), {}, "no predictions to write"),
        (("t-0", "t-1"), {("t-1", "r2"): []}, "no predictions for the rationales of 't-1' given answer 2"),
        (("t-0", "t-1"), {("t-1", ""): []}, "no predictions for the answers of 't-1'"),
        (("t-0",), {("t-0", "r1"): [0.5, 0.5]}, "2 predictions for the rationales of 't-0' given answer 1"),
        (("t-0",), {("t-0", ""): [0.5, math.nan, 0, 0]}, "the answers of 't-0' are not finite"),
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
    bad = [header, first, second.replace(",5.0,", ",nan,"), first, third + ",1", other]
    path.write_text("\n".join(bad))
    problems = check_submission(path, ["t-0", "t-1", "t-2", "t-3"])
    assert [problem.removeprefix(f"{path}") for problem in problems] == [
        ":3 (t-1): expected 20 finite numbers",
        ":4: 't-0' stands there twice",
        ":5: 22 columns, expected 21",
        ":6: 'other' is no question of the set",
        ": 2 of 4 questions are missing (first: 't-2')",
    ]


@pytest.mark.parametrize("content", [b"", b"a,b\n", HEADER[:-1].encode(), b"\xff\n"])
def test_checking_what_is_no_submission(tmp_path, content):
    (tmp_path / "s.csv").write_bytes(content)
    (problem,) = check_submission(tmp_path / "s.csv", ["t-0"])
    assert problem.startswith(f"{tmp_path / 's.csv'}:")
    (problem,) = check_submission(tmp_path / "none.csv", ["t-0"])
    assert "none.csv: not readable" in problem
