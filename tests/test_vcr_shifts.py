"""The shifted VCR sets: golden vectors of the published rules, masks and scores, and the writer."""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.data.examples import DataError
from tdlib.data.json_files import Records
from tdlib.data.vcr import VcrReader
from tdlib.data.vcr_shifts import (
    MASK,
    MASKED_TAG,
    MASKINGS,
    RULES,
    SHIFTS,
    expand,
    keep_top,
    mask_tokens,
    read_scores,
    rm_top,
    rule_plural,
    rule_singular,
    shortcut_scores,
    write_shifted,
)

OBJECTS = ["person", "person", "person", "car"]
DULL = ["It", "rains", "."]


def words(text: str) -> list:
    """Golden vectors as text: "[0,3] runs ." is [[0, 3], "runs", "."]."""
    return [json.loads(word) if word[0] == "[" and word != MASK else word for word in text.split()]


def record(question: str = "Where is [1] ?", **changes: Any) -> dict[str, Any]:
    base = {
        "annot_id": "val-0",
        "objects": OBJECTS,
        "question": words(question),
        "answer_choices": [DULL] * 4,
        "answer_label": 1,
        "rationale_choices": [DULL] * 4,
        "rationale_label": 2,
        "img_fn": "a/ü.jpg",
        "metadata_fn": "a/ü.json",
        "later_release": {"x": [None, 0.1]},
    }
    return copy.deepcopy(base | changes)


def reworded(rule, question: str, choice: str, right: bool, **changes) -> list:
    """The choice under a rule, as an answer and as a rationale (which must agree)."""
    given_record = record(question, **changes)
    given_record["answer_choices"][1 if right else 3] = words(choice)
    given_record["rationale_choices"][2 if right else 0] = words(choice)
    shifted = rule(given_record)
    answer = shifted["answer_choices"][1 if right else 3]
    assert shifted["rationale_choices"][2 if right else 0] == answer
    assert shifted["answer_choices"][0] == shifted["rationale_choices"][3] == DULL
    return answer


# Question, choice, is it the right one?, the choice in the set. The reference's golden vectors, run with
# the original code, stand first.
SINGULAR = [
    ("Where is [1] ?", "[1] is going .", True, "He is going ."),
    ("Where is [1] ?", "[0] is going .", False, "[1] is going ."),
    ("Where is [1] ?", "He is home", False, "[1] is home"),
    ("Where is [1] ?", "[0] goes with [1]", False, "[0] goes with [1]"),
    ("Where is [1] ?", "She and [0] left", False, "She and [0] left"),
    ("Where is [1] ?", "[0] loves her dog", True, "She loves her dog"),
    ("Where is [1] ?", "The man near [0] waves", True, "The man near he waves"),
    ("Where is [1] ?", "[0,3] go", False, "[0,3] go"),
    ("Where is [1] ?", "[0,3] go", True, "[0,3] go"),
    # the pictured examples of the README, numbers from 0
    ("Where is [1] going ?", "[0] is going to the bathroom .", False, "[1] is going to the bathroom ."),
    ("How does [0] feel ?", "[0] is tired .", True, "He is tired ."),
    ("What is [0] planning ?", "She wants to sleep .", False, "[0] wants to sleep ."),
    ("What is [0] planning ?", "She is planning to get on [3] .", True, "She is planning to get on [3] ."),
    # quirks
    ("Where is [1] ?", "[0] and [0] and [0] and [3]", False, "[1] and [1] and [1] and [3]"),
    ("Where is [1] ?", "[0,0] runs", False, "[0,0] runs"),
    ("Where is [1] ?", "he says He runs", False, "[1] says [1] runs"),
    ("Where is [1] ?", "HE runs", False, "HE runs"),  # counted, not replaced
    ("Where is [1] ?", "His dog sees him", False, "His dog sees him"),
    ("Where is [1] ?", "[0] takes his hat", False, "[1] takes his hat"),
    ("Where is [1] ?", "he and she left", False, "he and she left"),
    ("Is [1] on her car [3] ?", "[0] is", True, "She is"),  # the question breaks the tie
    ("Is [1] on her car ?", "[0] and his hat", True, "He and his hat"),
    ("Is she [1] or her ?", "[0] his hers", True, "She his hers"),
    ("Is he [1] ?", "[0] her him her", True, "She her him her"),
    ("Is HER hat on [1] ?", "[0] is", True, "He is"),
    ("Are [1] and [1] one ?", "[0] is", False, "[1] is"),
    ("Is [1,3] here ?", "[0] is", False, "[1] is"),
]


PLURAL = [
    ("What do [1,2] do ?", "[1,2] are dancing .", True, "They are dancing ."),
    ("What do [1,2] do ?", "They hide among [0,1]", False, "[1,2] hide among [1,2]"),
    ("What do [1,2] do ?", "[2,1] run", False, "[2,1] run"),
    ("What do [0,1] feel ?", "They are apprehensive .", False, "[0,1] are apprehensive ."),  # README, val-270
    ("What do [0,1] feel ?", "They are happy .", True, "They are happy ."),
    ("What do [0,1] feel ?", "[0,1] are drunk .", False, "[0,1] are drunk ."),
    ("What do [1,2] do ?", "They hide among [0,3] .", False, "[1,2] hide among [0,3] ."),  # README, val-171
    # quirks
    ("What do [2,1] do ?", "they run", False, "[1,2] run"),
    ("What do [1,2] do ?", "all of [0,1] run", True, "all of they run"),
    ("What do [1,2] do ?", "They see [0,1]", True, "They see they"),
    ("What do [1,2] do ?", "[1,0] see they", True, "[1,0] see they"),
    ("What do [1,2] do ?", "THEY run", False, "THEY run"),
    ("What do [1,2] do ?", "[0] runs", False, "[0] runs"),
    ("What do [1,2] do ?", "[0,1] and [2] run", False, "[0,1] and [2] run"),
    ("What do [1,2] do ?", "They and [0] run", False, "[1,2] and [0] run"),
    ("What do [1,1] do ?", "[0,0] run", False, "[1,1] run"),
]


@pytest.mark.parametrize(
    ("rule", "question", "choice", "right", "expected"),
    [*((rule_singular, *case) for case in SINGULAR), *((rule_plural, *case) for case in PLURAL)],
)
def test_rules_reword_as_the_authors_do(rule, question, choice, right, expected):
    assert reworded(rule, question, choice, right) == words(expected)


@pytest.mark.parametrize(
    ("rule", "questions"),
    [
        (rule_singular, ["Why ?", "Why [3] ?", "Why [0,1] ?", "Are [0] and [1] one ?"]),
        (rule_plural, ["Why ?", "Why [1] ?", "Why [0,3] ?", "Do [0,1] see [2] ?", "[0,1] [0,1]"]),
    ],
)
def test_questions_about_others_are_not_in_a_rules_set(rule, questions):
    assert [rule(record(question)) for question in questions] == [None] * len(questions)


@pytest.mark.parametrize("shift", [rule_singular, rule_plural])
@pytest.mark.parametrize("changes", [{"answer_label": None}, {"rationale_label": 4}])
def test_rules_need_labels(shift, changes):
    with pytest.raises(ValueError, match="needs answer_label and rationale_label"):
        shift(record() | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objects": None}, "objects is None"),
        ({"answer_choices": [DULL] * 3}, "expected 4 token lists"),
        ({"rationale_choices": [DULL, DULL, "no", DULL]}, r"rationale_choices\[2\] is 'no'"),
        ({"question": [[]]}, "neither a word nor a list"),
        ({"question": [None]}, "neither a word nor a list"),
        ({"question": [[4]]}, "reference to object 4, but the picture has 4"),
        ({"question": [[-1]]}, "reference to object -1"),
        ({"answer_choices": [[[MASKED_TAG]]] * 4}, "take the file that has no masks"),
    ],
)
def test_what_is_no_vcr_line_fails(changes, reason):
    for shift in (*RULES.values(), *(lambda r, f=f: f(r, {}) for f in MASKINGS.values())):
        with pytest.raises(ValueError, match=reason):
            shift(record() | changes)


# masks


def test_expand_and_mask_by_position():
    tokens = words("[0,3] see [1] .")
    assert expand(tokens) == [0, 3, "see", 1, "."]
    assert mask_tokens(tokens, {1, 2, 3}) == [[0, 10003], MASK, [10001], "."]
    assert mask_tokens(tokens, ()) == tokens


def line(answers: list, rationales: list) -> dict[str, Any]:
    return {
        "annot_id": "val-0",
        "answer_label": 1,
        "answer_tokens": [["w"] * len(losses) for losses in answers],
        "answer_losses": answers,
        "rationale_label": 2,
        "rationale_tokens": [["w"] * len(losses) for losses in rationales],
        "rationale_losses": rationales,
    }


def test_golden_masks():
    # numpy: argmax is the first of equals, a stable argsort()[-k:] has the last ones
    choices = [words(text) for text in ("[0,3] see [1]", "a b", "a b c", ".")]
    scores = line([[0.1, 2, 0.3, 1], [1, 1], [0, 5, 5], [0]], [[0, 0, 0]] * 4)
    example = record(answer_choices=choices)
    top = rm_top(example, scores)
    assert top["answer_choices"] == [[[0, 10003], "see", [1]], [MASK, "b"], ["a", MASK, "c"], [MASK]]
    assert top["rationale_choices"] == [[MASK, "rains", "."]] * 4
    kept = keep_top(example, scores, 1)
    assert kept["answer_choices"] == [[[10000, 3], MASK, [10001]], [MASK, "b"], [MASK, MASK, "c"], ["."]]
    assert kept["rationale_choices"] == [[MASK, MASK, "."]] * 4
    assert MASKINGS["keeptop3"](example, scores) == keep_top(example, scores, 3)
    assert MASKINGS["keeptop5"](example, scores)["answer_choices"] == choices


def test_masks_need_no_labels_but_the_right_scores():
    scores = line([[0, 1, 0]] * 4, [[0, 1, 0]] * 4)
    unlabelled = {key: value for key, value in record().items() if not key.endswith("_label")}
    assert rm_top(unlabelled, scores)["answer_choices"] == [["It", MASK, "."]] * 4
    with pytest.raises(ValueError, match="answer_label is 0 here and 1 in the shortcut scores"):
        rm_top(record(answer_label=0), scores)
    with pytest.raises(ValueError, match=r"answer_choices\[0\] has 3 tokens, but 1 shortcut scores"):
        rm_top(record(), line([[0]] * 4, [[0, 1, 0]] * 4))


# scores


def pay_for(calls: list):
    """A scorer that knows one word: logit 2 for each "[MASK]" and -3 for each masked tag; keeps its calls."""

    def score(prompt, variants):
        calls.append((prompt, variants))
        flat = [expand(variant) for variant in variants]
        return [
            2.0 * tokens.count(MASK) - 3.0 * sum(isinstance(t, int) and t >= MASKED_TAG for t in tokens)
            for tokens in flat
        ]

    return score


def test_shortcut_scores_mask_each_token_in_turn():
    example = record(
        answer_choices=[words(text) for text in ("[0,3] go", "[1] sits", ".", "a b")], answer_label=1
    )
    calls: list = []
    scores = shortcut_scores(example, pay_for(calls))
    (prompt, variants), (rationale_prompt, rationale_variants) = calls  # one call per question
    assert prompt == example["question"]
    assert variants == [words(v) for v in (
        "[10000,3] go", "[0,10003] go", "[0,3] [MASK]", "[10001] sits", "[1] [MASK]",
        "[MASK]", "[MASK] b", "a [MASK]",
    )]  # fmt: skip
    assert rationale_prompt == [*example["question"], *example["answer_choices"][1]]
    assert len(rationale_variants) == 12

    right_2, wrong_2 = round(math.log1p(math.exp(-2)), 4), round(math.log1p(math.exp(2)), 4)
    right_3, wrong_3 = round(math.log1p(math.exp(3)), 4), round(math.log1p(math.exp(-3)), 4)
    assert scores == {
        "annot_id": "val-0",
        "answer_label": 1,
        "answer_tokens": [["person_0", "car_3", "go"], ["person_1", "sits"], ["."], ["a", "b"]],
        "answer_losses": [[wrong_3, wrong_3, wrong_2], [right_3, right_2], [wrong_2], [wrong_2, wrong_2]],
        "rationale_label": 2,
        "rationale_tokens": [DULL] * 4,
        "rationale_losses": [[wrong_2] * 3, [wrong_2] * 3, [right_2] * 3, [wrong_2] * 3],
    }
    assert right_2 == 0.1269 and wrong_2 == 2.1269


def test_losses_of_large_logits_stay_finite():
    scores = shortcut_scores(record(), lambda _, variants: [-1e4] * len(variants))
    assert scores["answer_losses"] == [[0.0] * 3, [1e4] * 3, [0.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("logits", [[0.0], [math.nan] * 12, [math.inf] * 12])
def test_a_scorer_gives_one_finite_logit_per_variant(logits):
    with pytest.raises(ValueError, match=r"val-0: score gave \d+ logits for 12 variants"):
        shortcut_scores(record(), lambda _prompt, _variants: logits)


SCORES = shortcut_scores(record(), pay_for([]))


def test_scores_round_trip(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(SCORES) + "\n\n" + json.dumps(SCORES | {"annot_id": "val-1"}))
    assert read_scores(path) == {"val-0": SCORES, "val-1": SCORES | {"annot_id": "val-1"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"annot_id": 3}, "field 'annot_id' is int, expected str"), ({}, "'first' already stands in")],
)
def test_bad_scores_fail_by_line(tmp_path, changes, reason):
    path, first = tmp_path / "scores.jsonl", SCORES | {"annot_id": "first"}
    path.write_text(json.dumps(first) + "\n" + json.dumps(first | changes) + "\n")
    with pytest.raises(DataError) as caught:
        read_scores(path)
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)


# properties

TOKEN = st.sampled_from(["he", "She", "HE", "they", "They", "his", "her", "a", "."]) | st.lists(
    st.integers(0, 3), min_size=1, max_size=3
)
CHOICES = st.lists(st.lists(TOKEN, max_size=7), min_size=4, max_size=4)
RECORDS = st.builds(
    lambda question, answers, rationales, *labels: record() | dict(zip(
        ("question", "answer_choices", "rationale_choices", "answer_label", "rationale_label"),
        (question, answers, rationales, *labels), strict=True,
    )),
    st.lists(TOKEN, max_size=4) | st.just([[1]]) | st.just([[2, 1]]), CHOICES, CHOICES,
    st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip


def choices_of(example: dict[str, Any]) -> list:
    return [*example["answer_choices"], *example["rationale_choices"]]


def assert_only_choices_changed(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(after) == list(before)
    assert {k: v for k, v in after.items() if "choices" not in k} == {
        k: v for k, v in before.items() if "choices" not in k
    }
    for old, new in zip(choices_of(before), choices_of(after), strict=True):
        assert len(old) == len(new)


@settings(deadline=None, max_examples=80)
@given(example=RECORDS, name=st.sampled_from([*RULES]))
def test_rules_are_pure_and_change_only_persons_and_pronouns(example, name):
    before = copy.deepcopy(example)
    shifted = RULES[name](example)
    assert example == before
    if shifted is None:
        return
    assert_only_choices_changed(before, shifted)
    pronouns = {"he", "she", "He", "She"} if name == "rule_singular" else {"they", "They"}
    for old, new in zip(choices_of(before), choices_of(shifted), strict=True):
        for one, other in zip(old, new, strict=True):
            if one != other:
                assert isinstance(one, list) or one in pronouns
                assert isinstance(other, list) or other in pronouns
    for choice in choices_of(shifted):  # nothing of the input is shared
        for token in choice:
            if isinstance(token, list):
                token.append(0)
    assert example == before


@settings(deadline=None, max_examples=80)
@given(example=RECORDS, count=st.integers(1, 6), data=st.data())
def test_masks_are_pure_and_as_many_as_asked_for(example, count, data):
    def losses(choices):
        return [data.draw(st.lists(st.floats(0, 2), min_size=n, max_size=n)) for n in map(len, choices)]

    answers, rationales = (
        [expand(c) for c in example[f"{part}_choices"]] for part in ("answer", "rationale")
    )
    scores = line(losses(answers), losses(rationales)) | {
        key: example[key] for key in ("answer_label", "rationale_label")
    }
    before = copy.deepcopy((example, scores))
    removed, kept = rm_top(example, scores, count), keep_top(example, scores, count)
    assert (example, scores) == before
    every_loss = [*scores["answer_losses"], *scores["rationale_losses"]]
    for shifted in (removed, kept):
        assert_only_choices_changed(example, shifted)
        for old, new, values in zip(choices_of(example), choices_of(shifted), every_loss, strict=True):
            pairs = list(zip(expand(old), expand(new), strict=True))
            hidden = [other != one for one, other in pairs]
            assert all(
                other == (MASK if isinstance(one, str) else MASKED_TAG + one)
                for (one, other), hide in zip(pairs, hidden, strict=True)
                if hide
            )
            top = hidden if shifted is removed else [not hide for hide in hidden]
            assert sum(top) == min(count, len(pairs))
            inside = [value for value, is_top in zip(values, top, strict=True) if is_top]
            outside = [value for value, is_top in zip(values, top, strict=True) if not is_top]
            assert not inside or not outside or min(inside) >= max(outside)


# files


@pytest.fixture
def split(tmp_path):
    """Two of its three examples are about one person, one about two."""
    path = tmp_path / "val.jsonl"
    questions = ("Where is [1] ?", "What do [0,1] do ?", "Is [0] angry ?")
    records = [
        record(question, annot_id=f"val-{i}", answer_choices=[words("[2] is in [3] .")] * 4)
        for i, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    lines = [shortcut_scores(r, pay_for([])) for r in records]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
    return path


def read(path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SHIFTS)
def test_write_shifted_equals_the_functions(split, name):
    target, scores = split.parent / "shifted" / f"val_{name}.jsonl", split.parent / "scores.jsonl"
    count = write_shifted(split, target, name, scores=None if name in RULES else scores)
    if name in RULES:
        expected = [shifted for r in read(split) if (shifted := RULES[name](r)) is not None]
    else:
        expected = [MASKINGS[name](r, s) for r, s in zip(read(split), read(scores), strict=True)]
    assert read(target) == expected and count == len(expected)
    assert count == {"rule_singular": 2, "rule_plural": 1}.get(name, 3)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert "ü" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "scores"), [("rule_singular", None), ("rmtop1", "scores.jsonl")])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"annot_id": ', ":2: not valid JSON"),
        ("[1]", ":2: expected a JSON object"),
        (json.dumps(record(annot_id=None)), ":2: field 'annot_id' is NoneType"),
        (json.dumps(record(answer_choices=None, annot_id="val-1")), ":2 (val-1): answer_choices is None"),
        ('{"annot_id": "val-1", "answer_label": 1, "rationale_label": 2}', ":2 (val-1): objects is None"),
    ],
)
def test_a_bad_line_fails_by_file_and_line_and_leaves_the_old_file(split, name, scores, bad, reason):
    good = split.read_text(encoding="utf-8").splitlines()
    split.write_text("\n".join([good[0], bad, good[2]]) + "\n", encoding="utf-8")
    target = split.parent / "shifted" / "out.jsonl"
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(DataError) as caught:
        write_shifted(split, target, name, scores and split.parent / scores)
    assert f"{split}{reason}" in str(caught.value)
    assert target.read_text() == "old" and len(list(target.parent.iterdir())) == 1


def test_write_shifted_says_what_it_lacks(split):
    target, scores = split.parent / "out.jsonl", split.parent / "scores.jsonl"
    for source, file, reason in (
        (split.with_name("test.jsonl"), scores, "test.jsonl: no such file"),
        (split, split.with_name("none.jsonl"), "none.jsonl: no such file"),
    ):
        with pytest.raises(DataError) as caught:
            write_shifted(source, target, "rmtop1", file)
        assert reason in str(caught.value)
    first, second, _ = read(scores)
    del second["answer_losses"]
    for lines, reason in (([first], f"no line for it in {scores}"), ([first, second], "KeyError")):
        scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError) as caught:
            write_shifted(split, target, "rmtop1", scores)
        assert f"{split}:2 (val-1): {reason}" in str(caught.value)
    assert not target.exists()


def test_write_shifted_streams(split, monkeypatch):
    """At any time one record is in memory: each is written before the next is read."""
    events = []
    monkeypatch.setitem(RULES, "own", lambda r: events.append(("shift", r["annot_id"])) or r)

    class Watched(Records):
        def __getitem__(self, index):
            events.append(("read", f"val-{index}"))
            return super().__getitem__(index)

    monkeypatch.setattr("tdlib.data.vcr_shifts.Records", Watched)
    assert write_shifted(split, split.with_name("own.jsonl"), "own") == 3  # and a rule of one's own works
    assert events == [(what, f"val-{i}") for i in range(3) for what in ("read", "shift")]


@pytest.mark.parametrize("name", SHIFTS)
def test_the_reader_reads_every_shifted_set(split, name):
    folder = split.parent
    (folder / "vcr1images" / "a").mkdir(parents=True)
    (folder / "vcr1images/a/ü.jpg").touch()
    metadata = {"boxes": [[0, 0, 9, 9, 1]] * 4, "segms": [[]] * 4, "names": OBJECTS, "width": 9, "height": 9}
    (folder / "vcr1images/a/ü.json").write_text(json.dumps(metadata))
    count = write_shifted(split, folder / f"val_{name}.jsonl", name, folder / "scores.jsonl")
    assert len(VcrReader(folder, f"val_{name}").read()) == count > 0
