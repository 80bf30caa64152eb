"""Reading SNLI-VE and e-SNLI-VE: the official fields, the spellings of picture ids, damaged files."""

import copy
import csv
import io
from pathlib import Path
from typing import Any

import pytest
from data_files import damaged, lines, mutated, without
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError, Example
from tdlib.data.snli_ve import IMAGE_FOLDERS, LABELS, SnliVeReader, image_id

RECORD: dict[str, Any] = {  # a line of snli_ve_dev.jsonl with all its fields
    "annotator_labels": ["entailment", "entailment", "neutral", "entailment", "entailment"],
    "captionID": "4465359505.jpg#2",
    "gold_label": "entailment",
    "pairID": "4465359505.jpg#2r1e",
    "sentence1": "A man in a blue shirt is standing on a ladder.",
    "sentence1_binary_parse": "( ( A man ) ( is ( standing ( on ( a ladder ) ) ) ) )",
    "sentence1_parse": "(ROOT (S (NP (DT A) (NN man)) (VP (VBZ is))))",
    "sentence2": " A man isn't on the ground, in Zürich. ",
    "sentence2_binary_parse": "( ( A man ) is )",
    "sentence2_parse": "(ROOT (S (NP (DT A) (NN man))))",
    "Flikr30kID": "4465359505",
}
RELEVANCE = {"pairID": "4465359505.jpg#2r1e", "spans": [[1, 6], [31, 37]], "boxes": [[10, 0, 20, 20]]}
COLUMNS = ("", "pairID", "Flickr30kID", "hypothesis", "gold_label", "explanation")
ROW = (
    "0",
    "4465359505.jpg#2r1e",
    "4465359505.jpg",
    "A man is up.",
    "entailment",
    'He is\non a "ladder",\nup.',
)


def another(number: int, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(RECORD) | {"pairID": f"4465359505.jpg#{number}r1n"} | changes


def table(*rows: tuple[str, ...], columns: tuple[str, ...] = COLUMNS) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def write(folder: Path, *records: Any, relevance: Any = None, images: str = "flickr30k_images") -> Path:
    (folder / images).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(folder / images / "4465359505.jpg")
    (folder / "snli_ve_dev.jsonl").write_text(lines(*(records or [RECORD])))
    if relevance is not None:
        (folder / "snli_ve_dev.relevance.jsonl").write_text(lines(relevance))
    return folder


def explained(folder: Path, content: str) -> Path:
    write(folder)
    (folder / "esnlive_dev.csv").write_text(content, encoding="utf-8")
    return folder


def read(folder: Path, **options: Any) -> list[Example]:
    return SnliVeReader(folder, "dev", **options).read()


def failure(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **options)
    return str(caught.value)


# the official files


def test_an_official_line_is_read_field_by_field(tmp_path):
    (example,) = read(write(tmp_path))
    assert example.id == "4465359505.jpg#2r1e"
    assert example.image == tmp_path / "flickr30k_images" / "4465359505.jpg"
    assert example.prompt.text == RECORD["sentence2"]
    assert example.statements() == (example.prompt,)  # the premise is no input
    assert (example.boxes, example.choices, example.relevant_boxes) == ((), (), ())
    assert example.label == 1 and example.stratum == "entailment"


def test_labels_are_in_uniters_order(tmp_path):
    write(tmp_path, *(another(i, gold_label=label) for i, label in enumerate(LABELS)))
    examples = SnliVeReader(tmp_path, "dev").open()
    assert [example.label for example in examples] == [0, 1, 2]
    assert examples.labelled and list(examples.strata) == ["contradiction", "entailment", "neutral"]


@pytest.mark.parametrize("folder", IMAGE_FOLDERS)
def test_pictures_lie_in_one_of_the_usual_folders(tmp_path, folder):
    (example,) = read(write(tmp_path, images=folder))
    assert example.image.parent == tmp_path / folder


@pytest.mark.parametrize("key", ["Flikr30kID", "Flickr30K_ID", "Flickr30kID"])
@pytest.mark.parametrize("value", ["4465359505", "4465359505.jpg", 4465359505])
def test_the_picture_id_has_three_spellings(key, value):
    record = without(RECORD, "Flikr30kID") | {key: value, "pairID": "another.jpg#0r1n"}
    assert image_id(record, "f:1") == "4465359505"


@pytest.mark.parametrize("empty", [{}, {"Flikr30kID": ""}, {"Flikr30kID": None}])
def test_the_pair_names_the_picture_where_no_field_does(tmp_path, empty):
    (example,) = read(write(tmp_path, without(RECORD, "Flikr30kID") | empty))
    assert example.image.name == "4465359505.jpg"


def test_a_file_without_labels_is_read(tmp_path):
    write(tmp_path, without(RECORD, "gold_label"), another(1, gold_label=None))
    examples = SnliVeReader(tmp_path, "dev").open()
    assert not examples.labelled and [example.label for example in examples] == [None, None]
    assert set(examples.strata) == {"all"}


def test_decisive_words_and_boxes_come_from_the_file_beside(tmp_path):
    (example,) = read(write(tmp_path, relevance=RELEVANCE))
    text = example.prompt.text
    assert [text[start:end] for start, end in example.prompt.relevant] == ["A man", "Zürich"]
    assert example.relevant_boxes == ((0.25, 0.0, 0.5, 1.0),)
    (example,) = read(write(tmp_path, another(7), relevance=RELEVANCE))
    assert example.prompt.relevant == () and example.relevant_boxes == ()


# e-SNLI-VE


def test_explained_rows_are_read_by_column(tmp_path):
    other = ("1", "4465359505.jpg#0r1c", "4465359505.jpg", "A cat, asleep.", "contradiction", "")
    examples = read(explained(tmp_path, table(ROW, other)), explained=True)
    assert [e.id for e in examples] == [ROW[1], other[1]]
    assert [e.prompt.text for e in examples] == ["A man is up.", "A cat, asleep."]
    assert [e.label for e in examples] == [1, 0]
    assert all(e.image.name == "4465359505.jpg" for e in examples)


def test_explained_rows_may_lack_labels(tmp_path):
    rows = table((*ROW[:4], "", ""))
    assert read(explained(tmp_path, rows), explained=True)[0].label is None
    explained(tmp_path, table(ROW[:4], columns=COLUMNS[:4]))
    assert not SnliVeReader(tmp_path, "dev", explained=True).open().labelled


BAD_TABLES: dict[str, tuple[str, str]] = {
    "empty": ("", ":1: no column hypothesis, pairID"),
    "another table": ("a,b\n1,2\n", ":1: no column hypothesis, pairID; is this a e-SNLI-VE file"),
    "a column too few": (table(ROW, ROW[:5]), ":5: more or fewer columns"),
    "a column too many": (table((*ROW, "x")), ":4: more or fewer columns"),
    "an open quote": (table(ROW)[:-3], "not readable as CSV"),
    "no rows": (table(), "no examples"),
    "a bad label": (table(ROW, ("1", "x.jpg#0", "", "a", "yes", "")), ":5 (x.jpg#0): gold_label='yes'"),
    "twice": (table(ROW, ROW), f":7: pairID '{ROW[1]}' already stands in "),
    "an empty hypothesis": (table((*ROW[:3], " ", *ROW[4:])), "hypothesis is empty"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_fails_with_its_line(tmp_path, name):
    content, reason = BAD_TABLES[name]
    message = failure(explained(tmp_path, content), explained=True)
    assert str(tmp_path / "esnlive_dev.csv") in message and reason in message


# bad input


def test_a_missing_split_or_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"snli_ve_dev\.jsonl: no such file; .*found here: nothing"):
        SnliVeReader(tmp_path / "nowhere", "dev")
    write(tmp_path)
    with pytest.raises(
        DataError, match=r"snli_ve_val\.jsonl: no such file; .*found here: snli_ve_dev\.jsonl"
    ):
        SnliVeReader(tmp_path, "val")
    with pytest.raises(DataError, match=r"esnlive_dev\.csv: no such file; expected esnlive_\*\.csv"):
        SnliVeReader(tmp_path, "dev", explained=True)
    (tmp_path / "flickr30k_images").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match="flickr30k_images, flickr30k-images, images; unpack"):
        SnliVeReader(tmp_path, "dev")


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "no consensus": (another(1, gold_label="-"), "gold_label='-', expected one of contradiction, entailm"),
    "an empty label": (another(1, gold_label=""), "no gold_label, as 1 of 3 lines"),
    "a label number": (another(1, gold_label=1), "gold_label=1"),
    "labels": (another(1, gold_label=["neutral"]), "gold_label=['neutral']"),
    "no label": (without(another(1), "gold_label"), "no gold_label, as 1 of 3 lines"),
    "no pair": (without(RECORD, "pairID"), "field 'pairID' is missing; is this a SNLI-VE file"),
    "a pair number": (another(1, pairID=3), "field 'pairID' is int"),
    "no hypothesis": (without(another(1), "sentence2"), "field 'sentence2' is missing"),
    "an empty hypothesis": (another(1, sentence2=" \n"), "sentence2 is empty"),
    "a hypothesis number": (another(1, sentence2=3), "field 'sentence2' is int"),
    "twice": (RECORD, "pairID '4465359505.jpg#2r1e' already stands in "),
    "picture missing": (another(1, Flikr30kID="12"), "12.jpg: no such picture; unpack Flickr30k again"),
    "picture odd": (another(1, Flikr30kID="a\0"), "no such picture"),
    "picture name long": (another(1, Flikr30kID="a" * 9999), "no such picture"),
    "picture unnamed": (without(another(1), "Flikr30kID") | {"pairID": "x"}, "no picture: none of Flikr"),
    "no picture": (another(1, Flikr30kID=".jpg"), ".jpg: no such picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_fails_with_its_line(tmp_path, name):
    record, reason = BAD_RECORDS[name]
    message = failure(write(tmp_path, RECORD, record, another(3)))
    assert message.startswith(f"{tmp_path / 'snli_ve_dev.jsonl'}:2") and reason in message
    *others, last = SnliVeReader(tmp_path, "dev").examine().problems
    assert others == [] and last == message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no examples"),
        ("\n \n", "no examples"),
        (lines(RECORD)[:-9], ":1: not valid JSON"),
        ("3", "found int"),
    ],
)
def test_a_damaged_file_fails(tmp_path, content, reason):
    write(tmp_path)
    (tmp_path / "snli_ve_dev.jsonl").write_text(content)
    assert reason in failure(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spans": [[0, 999]]}, "relevance.jsonl:1: spans is"),
        ({"boxes": [[0, 0, 41, 20]]}, "relevance.jsonl:1: box 0 is"),
        ({"boxes": "all"}, "relevance.jsonl:1: boxes is str"),
        ({"pairID": 3}, "relevance.jsonl:1: field 'pairID' is int"),
    ],
)
def test_bad_relevance_fails(tmp_path, changes, reason):
    assert reason in failure(write(tmp_path, relevance=RELEVANCE | changes))


# fuzzing


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def assert_examples_or_data_error(folder: Path, **options: Any) -> None:
    try:
        examples = read(folder, **options)
    except DataError as error:
        assert str(folder) in str(error)
        return
    for example in examples:
        example.prompt.text.encode("utf-8")
        assert example.label in (None, 0, 1, 2) and example.image.is_file()
        assert all(0 <= start < end <= len(example.prompt.text) for start, end in example.prompt.relevant)
    # A check also doubts what a reader takes: an id that names another picture than its line.
    problems = SnliVeReader(folder, "dev", **options).examine().problems
    assert all("the pair is about picture" in problem for problem in problems)


@settings(deadline=None, max_examples=80)
@given(mutated(RECORD) | st.just(RECORD), mutated(RELEVANCE))
def test_any_mutation_gives_examples_or_a_data_error(fuzzed, record, relevance):
    write(fuzzed, record, relevance=relevance)
    assert_examples_or_data_error(fuzzed)


@pytest.mark.parametrize(
    "name",
    [
        "snli_ve_dev.jsonl",
        "snli_ve_dev.relevance.jsonl",
        "esnlive_dev.csv",
        "flickr30k_images/4465359505.jpg",
    ],
)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_bytes_give_examples_or_a_data_error(fuzzed, name, data):
    write(fuzzed, relevance=RELEVANCE)
    (fuzzed / "esnlive_dev.csv").write_text(table(ROW))
    (fuzzed / name).write_bytes(damaged(data, (fuzzed / name).read_bytes()))
    assert_examples_or_data_error(fuzzed, explained=name.endswith(".csv"))
