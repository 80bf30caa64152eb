"""Files of data sets as published, and damage to them, for the tests of readers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from tdlib.config import RunConfig
from tdlib.data.examples import DataError, Example
from tdlib.data.snli_ve import LABELS
from tdlib.data.vcr import VcrReader


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


# Damage: whatever stands in a file, a reader answers with examples or with a DataError

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([2**63, 10**400]) | st.floats()
    | st.text(st.characters(), max_size=6) | st.sampled_from(["-", "neutral", ".jpg", "../x"]),
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


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """File content with a stretch of any length replaced by a few bytes."""
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return content[:start] + data.draw(st.binary(max_size=6)) + content[end:]


# VCR, all fields

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
    "question": ["Why", "don", "'", "t", [0, 3], "look", "at", [1], "'", "s", [2], "?"],
    "answer_match_iter": [3, 0, 2, 1],
    "answer_sources": [31204, 0, 10811, 2231],
    "answer_choices": [
        ["No", ",", [0], "is", "not", "hungry", "."],
        ["They", "'re", "afraid", "of", [1], "."],
        [[0, 1, 3], "can", "'", "t", "see", "it", "."],
        ["Yes", "."],
    ],
    "answer_label": 1,
    "rationale_choices": [
        [[3], "has", "a", [2], "in", "one", "hand", "."],
        ["I", "'m", "not", "sure", "."],
        [[1], "sits", "at", [4], ":", "he", "'", "s", "angry", "!"],
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
    "question": [5, 6, 10],
    "answer_choices": [[5], [2, 3, 4], [1, 2, 3, 4], [0]],
    "rationale_choices": [[3], [3], [8], [2]],
    "boxes": [[96, 200.0, 192, 400]],
}
TYPES: dict[str, Any] = {"annot_id": "train-0", "type": "mental"}


def another(number: int, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(RECORD) | {"annot_id": f"train-{number}"} | changes


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


# Small data sets of every task


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


def put_vcr(folder: Path) -> Path:
    pictures = folder / "vcr1images"
    pictures.mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(pictures / "a.jpg")
    names = ["person", "person", "car"]
    metadata = {"names": names, "boxes": [[0, 0, 20, 20, 1]] * 3, "width": 40, "height": 20}
    (pictures / "a.json").write_text(json.dumps(metadata))
    plural = vcr_record(1, question=["Where", "are", [0, 1], "?"])
    (folder / "val.jsonl").write_text(lines(vcr_record(0), plural, vcr_record(2)))
    hidden = without(vcr_record(0, "test"), "answer_label", "rationale_label")
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


def put_snli_ve(folder: Path) -> Path:
    (folder / "flickr30k_images").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "flickr30k_images" / "1.jpg")
    (folder / "snli_ve_dev.jsonl").write_text(lines(*(pair(number) for number in range(5))))
    unlabelled = [without(pair(number), "gold_label") for number in range(5, 9)]
    (folder / "snli_ve_test.jsonl").write_text(lines(*unlabelled))
    (folder / "esnlive_dev.csv").write_text("pairID,hypothesis,gold_label\n1.jpg#1,A dog.,neutral\n")
    return folder


def put_vqa(folder: Path, answers: tuple[str, ...] = ("yes", "no", "yes")) -> Path:
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


def config(task: str, folder: Path | str = "", **changes: Any) -> RunConfig:
    return RunConfig.from_parameters(task=task, data_dir=str(folder), **changes)
