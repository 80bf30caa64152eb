"""The characters that a teacher's text tokens hold: open_clip's own ids, and places in the raw text."""

import itertools
import re
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from tdlib.teacher.model import Teacher
from tdlib.teacher.text import TextTokenizer, open_tokenizer, spans_in_raw
from tdlib.teacher.towers import TeacherError

TEXTS = [
    "a person in a red shirt holds an umbrella",
    "Why is Casey smiling? Because it's raining.",
    "two dogs",
    "the suitcase stands at the bus stop, and Riley is about to travel; balloons are blue.",
]


@pytest.fixture(scope="module")
def simple() -> TextTokenizer:
    """With offsets over open_clip's own byte-level tokenizer."""
    return TextTokenizer(SimpleTokenizer(), "simple")


AWKWARD = [
    "I'm sure they'd've gone, wouldn't they?", "CAFÉ  naïve\tco-op\n2024", "a &amp; b &lt;3 &copy; c",
    "👩‍👩‍👧 fun 🎉!!", "ＦＵＬＬ width ﬁne “quotes” … – ½", "x" * 30, "İstanbul ẞ straße",
    "<start_of_text> in the text",
    "", "  ", "日本語のテキスト", "schÃ¶n", "e\u0301clair", "a\u200bb\xa0c\ufeff", "</w> <pad>", "1234.56%",
]  # fmt: skip
few = settings(deadline=None, max_examples=80)
entities = ["&amp;", "&#39;", "'s ", "n't", "  ", "Ã©", "<end_of_text>"]
pieces = [*"abcDE '.,&;#0123<>\n\té½ﬁ…“’İß👍🏽\u0301\u200d\xad", *entities]
texts = st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=40).map("".join)


def check_spans(text: str, ids: list[int], spans: list[tuple[int, int]]) -> None:
    assert len(ids) == len(spans) and spans[0] == spans[-1] == (0, 0)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    inner = spans[1:-1]
    assert all(a <= b and c <= d for (a, c), (b, d) in itertools.pairwise(inner))


def assert_open_clips_ids(tokenize: TextTokenizer, text: str, ids: list[int]) -> None:
    expected = tokenize.tokenizer(text)[0].tolist()  # padded with 0
    assert ids == expected[: len(ids)]
    assert not any(expected[len(ids) :])


def assert_both_give_open_clips_ids(simple: TextTokenizer, teacher: Teacher, text: str) -> None:
    assert isinstance(teacher.tokenize.tokenizer, HFTokenizer)
    for tokenize in (simple, teacher.tokenize):
        ids, spans = tokenize(text)
        assert_open_clips_ids(tokenize, text, ids)
        check_spans(text, ids, spans)


@pytest.mark.parametrize("text", [*TEXTS, *AWKWARD])
def test_awkward_texts_have_open_clips_ids(simple, teacher, text):
    assert_both_give_open_clips_ids(simple, teacher, text)


@given(texts)
@few
def test_any_text_has_open_clips_ids(simple, teacher, text):
    assert_both_give_open_clips_ids(simple, teacher, text)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
@example("it's  a   test")
@example("R&D AT&T;")
@few
def test_spans_hold_the_pieces_of_plain_text(simple, text):
    """Where cleaning only lowers and joins white space, each span holds exactly its piece."""
    if "&" in text or "<" in text:  # html entities and special tokens are cleaned or read whole
        text = text.replace("&", "+").replace("<", "(")
    for token, (start, end) in list(zip(*simple(text), strict=True))[1:-1]:
        piece = simple.tokenizer.decoder[token].removesuffix("</w>")
        assert text[start:end].lower() == piece


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Cats &amp; dogs", ["Cats", "&", "dogs"]),
        ("a   red\n\numbrella", ["a", "red", "umbrella"]),
        ("“Yes” it's", ['“', "Yes", "”", "it", "'s"]),
        ("the ﬁsh", ["the", "ﬁsh"]),
        ("café!", ["café", "!"]),
        ("  it’s", ["it", "’s"]),
    ],
)  # fmt: skip
def test_spans_point_into_the_raw_text(simple, text, words):
    _, spans = simple(text)
    found = [text[start:end] for start, end in spans[1:-1]]
    for word in words:
        assert word in found or any(word.startswith(piece) for piece in found), (word, found)
    whole = "".join(found)
    assert re.sub(r"\s|amp;", "", text) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q\u0307\u0323 x", ["q\u0307\u0323", "x"]),  # marks in the order that normalisation changes
        ("a\u0302\u0323b cats", ["a\u0302\u0323", "b", "cats"]),
        ("n\u0303o\u0308 end", ["n\u0303", "o\u0308", "end"]),
        ("a  Ｃｕｐ　ｏｆ tea", ["a", "Ｃｕｐ", "ｏｆ", "tea"]),  # full width, with its own space
        ("ﾊﾞｽ  bus", ["ﾊﾞ", "ｽ", "bus"]),  # half width, the mark a letter of its own
        ("＆ ！ ａｂ", ["＆", "！", "ａｂ"]),
        ("the  oﬃce", ["the", "oﬃ", "ﬃce"]),  # one character of three letters, of which a token holds one
        ("\u212bngstro\u0308m", ["\u212b", "ngstr", "o\u0308", "m"]),
    ],
)
def test_letters_that_cleaning_rewrites_keep_their_place(simple, text, words):
    ids, spans = simple(text)
    assert_open_clips_ids(simple, text, ids)
    pieces = [text[start:end] for start, end in spans[1:-1]]
    assert all(pieces), "a token lost its place"
    starts = {start for start, _ in spans[1:-1]} | {len(text)}
    for word in words[:-1] if "ﬃ" in text else words:
        start = text.index(word)
        assert start in starts, (word, pieces)
        assert any(piece in word or word in piece for piece in pieces)
    covered = "".join(text[i] for i in range(len(text)) if any(a <= i < b for a, b in spans[1:-1]))
    assert covered == re.sub(r"\s", "", text)


def test_every_byte_piece_of_a_character_has_its_span(simple):
    text = "a 👍 b"
    _, spans = simple(text)
    inner = [text[start:end] for start, end in spans[1:-1]]
    assert inner[0] == "a" and inner[-1] == "b"
    assert set(inner[1:-1]) == {"👍"}


def test_mini_tokenizers_spans_hold_its_pieces(teacher):
    tokenizer = teacher.tokenize.tokenizer.tokenizer
    for text in TEXTS:
        ids, spans = teacher.tokenize(text)
        for token, (start, end) in list(zip(ids, spans, strict=True))[1:-1]:
            piece = tokenizer.convert_ids_to_tokens(token).removesuffix("</w>")
            assert piece in (text[start:end].lower(), "<unk>")


def test_long_texts_are_cut_at_the_context_length(simple, teacher):
    text = "word " * 200
    for tokenize, length in ((simple, 77), (teacher.tokenize, 48)):
        ids, spans = tokenize(text)
        assert len(ids) == len(spans) == length
        assert_open_clips_ids(tokenize, text, ids)
        check_spans(text, ids, spans)
    (record,) = teacher.encode_texts([text])
    assert len(record.positions) == 46


def test_what_is_cut_at_the_context_length_is_counted(simple, teacher):
    for number in (1, 75, 76, 200):
        assert simple.read("cup " * number).cut == max(0, number - 75)
    whole = teacher.tokenize.tokenizer.tokenizer
    for text in (*TEXTS, "a cup and a dog " * 20):
        tokens = len(whole(text, add_special_tokens=False)["input_ids"])
        assert teacher.tokenize.read(text).cut == teacher.encode_texts([text])[0].cut == max(0, tokens - 46)


def test_a_tokenizer_opens_without_the_weights(teacher, teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    tokenize = open_tokenizer(f"local-dir:{folder}")
    assert [tokenize(text) for text in TEXTS] == [teacher.tokenize(text) for text in TEXTS]
    assert open_tokenizer("ViT-B-16").tokenizer.context_length == 77
    for name in ("local-dir:/no/such/folder", "ViT-Nothing"):
        with pytest.raises(TeacherError, match=re.escape(repr(name))):
            open_tokenizer(name)


@given(st.text(max_size=30), st.text(max_size=30))
@few
def test_spans_in_raw_are_ordered_and_in_range(raw, cleaned):
    spans = spans_in_raw(raw, cleaned, [(i, i + 1) for i in range(len(cleaned))])
    assert all(0 <= start <= end <= len(raw) for start, end in spans)
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(spans))


def test_tokenizers_without_offsets_are_refused():
    with pytest.raises(TeacherError, match="no character offsets"):
        TextTokenizer(object(), "siglip")  # type: ignore[arg-type]
