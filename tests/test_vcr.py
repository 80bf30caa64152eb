"""Reading VCR: the official files field by field, text and its spans, answers beside rationales."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from data_files import METADATA, RECORD, RELEVANCE, STEM, TYPES, another, failure, lines, read, without, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError, Examples, Reference, low_shot
from tdlib.data.vcr import NEUTRAL_NAMES, PERSON_TOKENS, VcrReader, neutral_name, render

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
    (problem,) = VcrReader(tmp_path, "train").examine().problems
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
        # as the published files have it: val-0's right rationale
        (
            [[0], "'", "s", "expression", "is", "twisted", "in", "disgust", "."],
            "Casey's expression is twisted in disgust.",
        ),
        (["It", "doesn", "'", "t", "say", ":", "I", "’", "LL", "go", "."], "It doesn't say: I’LL go."),
        ([[10_001], "'", "s", "'", "s", "'"], "[MASK]'s's '"),
        (["[MASK]", "'", "t", "say"], "[MASK]'t say"),
        (["'", "s", "the", "'", "dog", "'", "t", "?", "'", "t"], "' s the ' dog't? ' t"),
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
    assert f"train.jsonl:1 (train-0): no {lacking}" in failure(tmp_path, subtask="both")
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


def test_ids_may_hold_what_tells_the_parts_apart(tmp_path):
    write(tmp_path, *(another(i, annot_id=f"clip:r{i}:r") for i in range(12)))
    examples = both(tmp_path)
    assert examples.questions[:3] == ["clip:r0:r", "clip:r0:r", "clip:r1:r"]
    assert [(e.question, e.part) for e in examples[:2]] == [("clip:r0:r", ""), ("clip:r0:r", "r")]
    subsets = {tuple(low_shot(examples, 2, seed).questions[::2]) for seed in range(9)}
    assert len(subsets) > 4


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
