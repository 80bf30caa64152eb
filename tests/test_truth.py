"""What stands in for ground truth on real data: e-SNLI's files field by field, VCR's references."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data.examples import GROUND_TRUTH, DataError
from tdlib.data.snli_ve import SnliVeReader, highlighted, with_highlights
from tdlib.data.truth import with_truth
from tdlib.data.vcr import VcrReader
from tdlib.training.prepare import read_split

# e-SNLI's columns: train has one annotator, dev and test have three.
SIDES = ("Sentence1_marked", "Sentence2_marked", "Sentence1_Highlighted", "Sentence2_Highlighted")
PARTS = ("Explanation", *SIDES)
FIRST = ("pairID", "gold_label", "Sentence1", "Sentence2")
TRAIN = ("pairID", "gold_label", "WorkerId", *FIRST[2:], *(f"{part}_1" for part in PARTS))
DEV = (*FIRST, *(f"{part}_{i}" for i in (1, 2, 3) for part in PARTS))
PAIR, OTHER = "4465359505.jpg#2r1c", "4465359505.jpg#0r1n"
TEXT, OTHER_TEXT = "A man isn't asleep, in Zürich.", "Two dogs run."


def row(columns, pair, text, *marked: str) -> list[str]:
    values = {"pairID": pair, "gold_label": "contradiction", "Sentence2": text, "WorkerId": "A1"}
    values |= {f"Sentence2_marked_{i}": own for i, own in enumerate(marked, start=1)}
    values |= {f"Sentence2_Highlighted_{i}": "0" for i in (1, 2, 3)}  # not to be believed
    values["Explanation_1"] = 'He is "up",\nnot asleep.'
    return [values.get(column, "") for column in columns]


def write(folder: Path, name: str, columns, *rows) -> None:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "flickr30k_images").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "flickr30k_images" / "4465359505.jpg")
    records = [
        {"pairID": pair, "sentence2": text, "gold_label": "contradiction", "Flikr30kID": "4465359505"}
        for pair, text in ((PAIR, TEXT), (OTHER, OTHER_TEXT))
    ]
    (tmp_path / "snli_ve_dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    side = {"pairID": PAIR, "spans": [[0, 1]], "boxes": [[0, 0, 20, 20]]}
    (tmp_path / "snli_ve_dev.relevance.jsonl").write_text(json.dumps(side) + "\n")
    return tmp_path


def words(example) -> list[str]:
    return [example.prompt.text[start:end] for start, end in example.prompt.relevant]


def marked(folder) -> dict:
    return {e.id: e for e in with_highlights(SnliVeReader(folder, "dev").read(), folder)}


# highlights


def test_highlights_are_found_by_pair_in_whichever_file_has_them(folder):
    write(folder, "esnli_train_1.csv", TRAIN, row(TRAIN, PAIR, TEXT, "A man *isn't* *asleep,* in Zürich."))
    write(folder, "esnli_dev.csv", DEV, row(DEV, OTHER, OTHER_TEXT, *["Two *dogs* run."] * 3))
    found = marked(folder)
    assert words(found[PAIR]) == ["isn't", "asleep"], "without the comma"
    assert words(found[OTHER]) == ["dogs"]
    assert {e.truth for e in found.values()} == {"highlights"}
    assert all(e.relevant_boxes == () for e in found.values()), "boxes of another kind of truth are not kept"
    assert {e.truth for e in SnliVeReader(folder, "dev").read()} == {GROUND_TRUTH}


@pytest.mark.parametrize(
    ("annotators", "expected"),
    [
        (["*Two* dogs run.", "*Two* *dogs* run.", "Two *dogs* *run.*"], ["Two", "dogs"]),
        (["*Two* dogs run.", "Two dogs run.", "Two dogs run."], []),
        (["*Two* dogs run.", "Two dogs run.", ""], ["Two"]),  # one of two who answered
        (["  Two   dogs *run.* ", "", ""], ["run"]),
        (["", "", ""], []),
    ],
)
def test_a_word_counts_if_half_of_the_annotators_marked_it(folder, annotators, expected):
    write(folder, "esnli_test.csv", DEV, row(DEV, OTHER, OTHER_TEXT, *annotators))
    assert words(marked(folder)[OTHER]) == expected


def test_another_text_is_logged_and_not_used(folder, caplog):
    write(folder, "esnli_dev.csv", DEV, row(DEV, OTHER, "Two cats run.", *["Two *cats* run."] * 3))
    assert words(marked(folder)[OTHER]) == []
    assert "1 of 2 pairs have another text" in caplog.text and OTHER in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "esnli_train_1.csv"),
        ("pairID,Sentence2\na,b\n", "no column Sentence2_marked_1"),
        ("pairID,Sentence2_marked_1\na,b,c\n", "esnli_dev.csv:2: more or fewer columns"),
        (b"pairID,Sentence2_marked_1\na,\xff\n", "not readable as CSV"),
    ],
)
def test_missing_or_bad_files_of_highlights_fail(folder, content, reason):
    if content is not None:
        (folder / "esnli_dev.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason):
        marked(folder)


WORDS = st.lists(st.text(st.sampled_from("ab.'*ü"), min_size=1, max_size=4), max_size=5)


@given(WORDS, st.data())
def test_any_text_gives_spans_inside_its_words_or_none(tokens, data):
    stars = [f"*{w}*" if data.draw(st.booleans()) else w for w in tokens]
    spans = highlighted(" ".join(tokens), [" ".join(stars)])
    for start, end in spans or ():
        assert 0 <= start < end <= len(" ".join(tokens)) and " " not in " ".join(tokens)[start:end]
    if not any("*" in word for word in tokens):
        assert spans is not None and len(spans) == sum(a != b for a, b in zip(stars, tokens, strict=True))


# objects that are referred to


def test_boxes_of_the_objects_in_question_and_right_answer(world):
    for subtask in ("qa", "qar"):
        config = RunConfig(task=f"vcr_{subtask}", data_dir=str(world))
        examples = VcrReader(world, "train", subtask).read()
        found = {e.id: e for e in with_truth(config, examples, "referred")}
        assert found
        for example in examples:
            parts = example.prompt, example.choices[example.label]
            objects = sorted({i for part in parts for r in part.references for i in r.objects})
            assert (example.id in found) == bool(objects), "without references nothing is known"
            if objects:
                proxy = found[example.id]
                assert proxy.relevant_boxes == tuple(example.boxes[i] for i in objects)
                assert not any(part.relevant for part in proxy.statements())
                assert proxy.truth == "referred objects" and example.truth == GROUND_TRUTH
                assert [s.text for s in proxy.statements()] == [s.text for s in example.statements()]


def test_without_labels_nothing_is_referred_to(world):
    assert with_truth(RunConfig(data_dir=str(world)), VcrReader(world, "test").read(), "referred") == []


# by name


def test_own_truth_is_the_datas_and_leaves_out_what_is_not_known(folder):
    config = RunConfig(task="snli_ve", data_dir=str(folder))
    (example,) = with_truth(config, read_split(config, "dev"))
    assert example.id == PAIR and example.truth == GROUND_TRUTH and words(example) == ["A"]
    write(folder, "esnli_dev.csv", DEV, row(DEV, OTHER, OTHER_TEXT, *["Two *dogs* run."] * 3))
    (example,) = with_truth(config, read_split(config, "dev"), "highlights")
    assert example.id == OTHER


@pytest.mark.parametrize(
    ("task", "truth", "reason"),
    [
        ("vcr_qa", "highlights", "truth='highlights' is for snli_ve, not task='vcr_qa'"),
        ("vqa_v2", "referred", "is for vcr"),
        ("vcr_qa", "guessed", "expected one of own, highlights, referred"),
    ],
)
def test_a_truth_that_does_not_apply_is_refused(task, truth, reason):
    with pytest.raises(ConfigError, match=reason):
        with_truth(RunConfig(task=task, data_dir="nowhere"), [], truth)
