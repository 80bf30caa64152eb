"""Large JSON files read by position: every layout, every damage."""

import gzip
import json
import re
from typing import Any

import pytest
from data_files import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError, Example, Examples, TextPart
from tdlib.data.json_files import Records
from tdlib.data.reading import Reader, SideFile, need, normalise_boxes, picture_boxes, relevant_part

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ['"', "\\", '{"a": [', "]}", "日本", "\U0001f600", "\n", "\\u", "\u2028"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(text, values, max_size=4)
space = st.text(" \t\r\n", max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("reading") / "file.json"


def entries(path, key=None) -> Records:
    return Records.entries(path, key, "test")


def lines(path) -> Records:
    return Records.lines(path, "test")


def raw(records: Records) -> list[bytes]:
    content = records.path.read_bytes()
    return [content[start:end] for start, end in records.spans]


# lines


@settings(deadline=None, max_examples=100)
@given(st.data(), st.lists(objects, max_size=5))
def test_lines_are_the_written_objects(path, data, written):
    content, numbers = b"", []
    for record in written:
        blank = data.draw(st.lists(st.sampled_from(["", "  ", "\t", "\r"]), max_size=2))
        content += "".join(f"{each}\n" for each in blank).encode()
        numbers.append(content.count(b"\n") + 1)
        line = json.dumps(record, ensure_ascii=data.draw(st.booleans()))
        content += (line + data.draw(st.sampled_from(["\n", "\r\n", " \n"]))).encode()
    if data.draw(st.booleans()):
        content = content.removesuffix(b"\n")
    path.write_bytes(content)
    records = lines(path)
    assert list(records) == written
    assert [records.where(index) for index in range(len(records))] == [f"{path}:{n}" for n in numbers]


def test_a_broken_line_does_not_stop_the_others(path):
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\n[2]\n\n{"a": 3}')
    records = lines(path)
    assert len(records) == 5
    assert records[0] == {"a": 1} and records[4] == {"a": 3}
    for index, reason in ((1, "not valid JSON"), (2, "not valid JSON in UTF-8"), (3, "found list")):
        with pytest.raises(DataError, match=re.escape(f"{path}:{index + 1}: ") + f".*{reason}"):
            records[index]
    assert records.where(4) == f"{path}:6"


def test_records_end_as_sequences_do(path):
    for content in ("[]", '[{"a": 1}]'):
        path.write_text(content)
        records = entries(path)
        assert len(list(records)) == len(records) == len(json.loads(content))
        with pytest.raises(IndexError):
            records[len(records)]
    path.write_text("")
    assert list(lines(path)) == []


# entries of arrays


@st.composite
def laid_out(draw, value: Any) -> str:
    """A JSON value with white space wherever it may stand."""
    if isinstance(value, dict | list):
        parts = [
            f"{draw(laid_out(each))}" if isinstance(value, list)
            else f"{draw(space)}{json.dumps(each)}{draw(space)}:{draw(laid_out(value[each]))}"
            for each in value
        ]  # fmt: skip
        opening, closing = "[]" if isinstance(value, list) else "{}"
        return f"{draw(space)}{opening}{','.join(parts) or draw(space)}{closing}{draw(space)}"
    return f"{draw(space)}{json.dumps(value, ensure_ascii=draw(st.booleans()))}{draw(space)}"


@settings(deadline=None, max_examples=150)
@given(st.data(), st.lists(objects, max_size=5), objects, objects)
def test_entries_are_the_written_objects(path, data, written, before, after):
    key = data.draw(st.sampled_from([None, "questions"]))
    whole: Any = written
    if key:
        before.pop(key, None)
        after.pop(key, None)
        whole = before | {key: written} | after
    path.write_bytes(data.draw(laid_out(whole)).encode())
    records = entries(path, key)
    assert [json.loads(each) for each in raw(records)] == written
    assert list(records) == written
    assert all(each == each.strip() for each in raw(records))


@pytest.mark.parametrize("key", [None, "questions"])
@pytest.mark.parametrize("indent", [None, 1])
def test_positions_are_those_of_bytes(path, key, indent):
    written = [{"é": "日" * i, "n": [i, {"x": None}]} for i in range(4)]
    whole = {"info": {"questions": [1]}, "s": '"]}', key: written, "z": 1} if key else written
    content = json.dumps(whole, ensure_ascii=False, indent=indent)
    path.write_text(content, encoding="utf-8")
    assert [json.loads(each) for each in raw(entries(path, key))] == written


def test_an_entry_is_parsed_for_its_content_only_when_asked_for(path):
    path.write_bytes(b'{"questions": [{"a": 1}, 3, {"a": "\\ud800"}, {"a": 2}, {"a": "\xff"}]}')
    records = entries(path, "questions")
    assert records[0] == {"a": 1} and records[3] == {"a": 2}
    with pytest.raises(DataError, match=re.escape(f"{path}, entry of 'questions' 2: ") + ".*found int"):
        records[1]
    for number in (3, 5):
        with pytest.raises(DataError, match=rf"entry of 'questions' {number}: not valid JSON in UTF-8"):
            records[number - 1]


# damage

WHOLE = json.dumps(
    {"info": ["é"], "questions": [{"a": "日本"}, {"b": [1.5, -2]}], "n": 12}, ensure_ascii=False
)


@pytest.mark.parametrize("key", [None, "questions"])
def test_a_truncated_array_fails(path, key):
    content = WHOLE.encode() if key else json.dumps(json.loads(WHOLE)["questions"], indent=1).encode()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match="copy it again") as caught:
            entries(path, key)
        assert str(path) in str(caught.value)


def test_a_truncated_line_fails_when_asked_for(path):
    content = b'{"a": 1}\n' + '{"é": ["日本", {"b": -1.5e3}]}'.encode()
    for end in range(10, len(content)):
        path.write_bytes(content[:end])
        records = lines(path)
        assert records[0] == {"a": 1}
        with pytest.raises(DataError, match=":2: not valid JSON"):
            records[1]


BAD_ARRAYS: dict[str, tuple[bytes, str | None, str]] = {
    "no such key": (b'{"annotations": []}', "questions", "there is no 'questions'"),
    "only inside": (b'{"info": {"questions": []}}', "questions", "there is no 'questions'"),
    "no key at all": (b"{}", "questions", "is this a test file"),
    "a list": (b"[]", "questions", "expected one of {, found '['"),
    "an object": (b'{"questions": []}', None, "expected one of [, found '{'"),
    "no array": (b'{"questions": {}}', "questions", "expected one of [, found '{'"),
    "a comma too many": (b"[{},]", None, "not valid JSON"),
    "a comma too few": (b"[{} {}]", None, "expected one of , ], found '{'"),
    "bare words": (b"[{}, what]", None, "not valid JSON"),
    "more behind": (b"[{}] {}", None, "found '{'"),
    "more behind the object": (b'{"questions": []}]', "questions", "found ']'"),
    "broken behind": (b'{"questions": [], "n": nope}', "questions", "not valid JSON"),
    "UTF-16": ("[{}]".encode("utf-16"), None, "not UTF-8"),
    "half a character": ('["é'.encode()[:-1], None, "not valid JSON"),
    "endless nesting": (b"[" * 100_000, None, "not valid JSON"),
    "a number too long": (b'{"n": ' + b"1" * 5000 + b', "questions": []}', "questions", "not valid JSON"),
    "empty": (b"", None, "it ends early"),
    "a picture": (b"\x89PNG\r\n\x1a\n", None, "expected one of ["),
    "gzip": (gzip.compress(b"[{}]"), None, "unpack it"),
    "zip": (b"PK\x03\x04...", None, "unpack it"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_what_is_no_such_array_fails(path, name):
    content, key, reason = BAD_ARRAYS[name]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        entries(path, key)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_bytes_give_records_or_a_data_error(path, data):
    content = damaged(data, WHOLE.encode())
    path.write_bytes(content)
    try:
        found = list(entries(path, "questions"))
    except DataError:
        pass
    else:  # what stands outside of the array is not decoded
        assert found == json.loads(content.decode("utf-8", "replace"))["questions"]
    try:
        list(lines(path))
    except DataError as error:
        assert str(path) in str(error)


def test_a_missing_file_fails(tmp_path):
    for read in (entries, lines):
        with pytest.raises(DataError, match="no such file; expected a JSON"):
            read(tmp_path / "none.json")
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path)  # a folder is none


# fields, boxes, spans


@pytest.mark.parametrize(
    ("record", "kind", "reason"),
    [
        ({}, int, "field 'a' is missing; is this a VQA file"),
        ({"a": "1"}, int, "field 'a' is str, expected int"),
        ({"a": True}, int, "field 'a' is bool, expected int"),
        ({"a": None}, str, "field 'a' is NoneType, expected str"),
    ],
)
def test_a_field_is_needed_in_its_type(record, kind, reason):
    with pytest.raises(DataError, match=reason):
        need(record, "a", kind, "f:1", "VQA")
    assert need({"a": 0}, "a", int, "f:1", "VQA") == 0


def test_boxes_are_clipped_within_the_slack_only():
    assert normalise_boxes([[-1, 0, 50, 100.5, 0.9]], 200, 100, "f:1") == ((0.0, 0.0, 0.25, 1.0),)
    for bad in ([[-3, 0, 50, 100]], [[0, 0, 50, 102]], [[50, 0, 40, 100]], [[0, 0, 1]], ["abcd"], {}):
        with pytest.raises(DataError, match=r"^f:1: box"):
            normalise_boxes(bad, 200, 100, "f:1")


def test_boxes_in_shares_are_not_taken_for_pixels():
    shares = [[0, 0, 1, 1], [0.2, 0.1, 0.9, 1.0]]
    with pytest.raises(DataError, match=r"^f:1: all boxes .* normalised already"):
        normalise_boxes(shares, 200, 100, "f:1")
    for good in ([], [[0, 0, 0, 0]], [*shares, [0, 0, 5, 5]]):  # one that must be in pixels
        assert len(normalise_boxes(good, 200, 100, "f:1")) == len(good)
    assert normalise_boxes(shares, 1, 1, "f:1")[1] == (0.2, 0.1, 0.9, 1.0)


@pytest.mark.parametrize(
    "spans", [3, [[0]], [[0, 1, 2]], [[1, 1]], [[-1, 2]], [[0, 6]], [["0", 1]], [[0, True]]]
)
def test_relevant_spans_lie_inside_the_text(spans):
    with pytest.raises(DataError, match=r"f:1: spans is .* a text of 5 characters"):
        relevant_part("a dog", ({"spans": spans}, "f:1"))


def test_relevance_may_be_missing_or_in_part(tmp_path):
    assert relevant_part("a dog", None) == relevant_part("a dog", ({}, "f:1")) == TextPart("a dog")
    assert relevant_part("a dog", ({"spans": [[2, 5]]}, "f:1")).relevant == ((2, 5),)
    assert picture_boxes(({}, "f:1"), tmp_path / "not opened") == ()
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    assert picture_boxes(({"boxes": [[0, 0, 50, 100]]}, "f:1"), tmp_path / "a.png") == ((0, 0, 0.25, 1),)


def test_boxes_of_a_damaged_picture_fail_as_data(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.jpg: not a picture"):
        picture_boxes(({"boxes": [[0, 0, 50, 100]]}, "f:1"), tmp_path / "a.jpg")


# files beside a split


def test_side_lines_are_found_in_any_order_and_read_in_order_without_an_index(tmp_path):
    path = tmp_path / "side.jsonl"
    path.write_text("".join(f'{{"id": {i}, "x": {i * i}}}\n' for i in range(5)) + "broken\n")
    side = SideFile(path, "id", "test")
    assert [side.find(i, i) for i in range(5)] == [
        ({"id": i, "x": i * i}, f"{path}:{i + 1}") for i in range(5)
    ]
    with pytest.raises(DataError, match=":6: not valid JSON"):
        side.find(3, 0)
    path.write_text('{"id": 3, "x": 9}\n{"id": 1, "x": 1}\n')
    side = SideFile(path, "id", "test")
    assert side.find(1, 0) == ({"id": 1, "x": 1}, f"{path}:2")
    assert side.find(3, 7) == ({"id": 3, "x": 9}, f"{path}:1")
    assert side.find(2, 1) is None
    assert SideFile(tmp_path / "none.jsonl", "id", "test").find(1, 0) is None
    path.write_text('{"id": "1"}\n')
    with pytest.raises(DataError, match=":1: field 'id' is str, expected int"):
        SideFile(path, "id", "test").find(1, 0)


# the readers' base class


class Three(Reader):
    """Three examples of two parts each, of which the second question is bad in both parts."""

    what = "test"

    def __init__(self, folder, fails_at_the_end: bool = False):
        self.folder, self.fails_at_the_end = folder, fails_at_the_end

    def open(self, report=None):
        if report is not None:
            report("line 9: left out")
        if self.fails_at_the_end:
            raise DataError("mixed")
        return Examples([str(i) for i in range(6)], ["all"] * 6, self.make)

    def make(self, index):
        if index // 2 == 1:
            raise DataError("question 1 is bad")
        image = self.folder / f"{index // 2}.png"
        return Example(str(index), image, (), (), TextPart("a"), (), 0, "all")


def test_problems_are_all_listed_once(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    assert list(Three(tmp_path).examine().problems) == ["line 9: left out", "question 1 is bad"]
    first, second, third = Three(tmp_path).examine(decode=True).problems
    assert (first, second) == ("line 9: left out", "question 1 is bad")
    assert third.startswith(f"{tmp_path / '2.png'}: not a picture that can be decoded")
    assert list(Three(tmp_path, fails_at_the_end=True).examine().problems) == ["line 9: left out", "mixed"]
    with pytest.raises(DataError, match="question 1 is bad"):
        Three(tmp_path).read()


# what files may begin with, and names that stand twice


def test_a_byte_order_mark_is_no_damage(path):
    mark, records = b"\xef\xbb\xbf", [{"id": 1, "text": "日本"}, {"id": 2}]
    path.write_bytes(mark + b"\n".join(json.dumps(record).encode() for record in records))
    assert list(lines(path)) == records
    for key, value in (("all", {"info": 1, "all": records}), (None, records)):
        path.write_bytes(mark + json.dumps(value, ensure_ascii=False).encode())
        assert list(entries(path, key)) == records
    path.write_bytes(mark)
    assert list(lines(path)) == []


@pytest.mark.parametrize("line", ['{"id": 1, "a": 2, "a": 3}', '{"id": 1, "b": [{"a": 2, "a": 2}]}'])
def test_a_name_that_stands_twice_in_an_object_is_refused(path, line):
    path.write_text(f'{{"id": 0}}\n{line}\n')
    with pytest.raises(DataError, match=r"file\.json:2: .*'a' stands twice"):
        list(lines(path))
    path.write_text(f"[{line}]")
    with pytest.raises(DataError, match=r"entry 1: .*'a' stands twice"):
        list(entries(path))


def test_an_array_that_stands_twice_is_refused(path):
    path.write_text('{"all": [{"id": 1}], "all": [{"id": 2}]}')
    with pytest.raises(DataError, match="there are two 'all'"):
        entries(path, "all")
