"""Low-shot subsets, manifests and joined texts."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.data.examples import (
    Example,
    Examples,
    Reference,
    TextPart,
    divide_by_picture,
    join_parts,
    low_shot,
    path_names,
    save_manifest,
    spread,
)

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


def example(name: str, stratum: str = "all") -> Example:
    return Example(name, Path("a.jpg"), (), (), TextPart("why ?"), (), 0, stratum)


EXAMPLES = [example(f"train-{i}", "scene" if i % 3 else "role") for i in range(60)]  # 40 and 20


def ids(examples) -> list[str]:
    return [each.id for each in examples]


def strata(examples) -> Counter:
    return Counter(each.stratum for each in examples)


@few
@given(st.integers(0, 300), st.integers(1, 100))
def test_spread_positions_are_in_order_and_have_no_period(number, most):
    places = spread(number, most)
    assert len(places) == min(number, most) and places == sorted({*places}) == spread(number, most)
    assert all(0 <= place < number for place in places)
    if number >= 2 * most >= 60:
        assert 0.2 < sum(place % 2 for place in places) / most < 0.8


def test_examples_have_one_stratum_each():
    with pytest.raises(ValueError, match=r"3 ids, 2 strata, 3 questions and 3 parts"):
        Examples(["a", "b", "c"], ["x", "y"], lambda i: EXAMPLES[i])


# pictures set aside


def of_pictures(pictures: list[str]) -> Examples:
    return Examples.of(
        [dataclasses.replace(example(f"train-{i}"), image=Path(name)) for i, name in enumerate(pictures)]
    )


@few
@given(st.permutations([*range(200), *range(100)]), st.floats(0.1, 0.6), st.floats(0.1, 0.6))
def test_pictures_set_aside_are_a_share_of_all_and_of_any_larger_share(numbers, one, other):
    examples = of_pictures([f"images/{number}.jpg" for number in numbers])
    small, large = sorted((one, other))
    parts = {share: divide_by_picture(examples, share) for share in (small, large)}
    for share, (learned, aside) in parts.items():
        assert sorted(ids(learned) + ids(aside)) == sorted(ids(examples))
        assert ids(learned) == [name for name in ids(examples) if name in set(ids(learned))]  # in their order
        pictures = {each.image for each in aside}
        assert not pictures & {each.image for each in learned}
        assert abs(len(pictures) / len(set(numbers)) - share) < 0.2
    assert set(ids(parts[small][1])) <= set(ids(parts[large][1]))


def test_new_examples_do_not_change_the_side_of_the_old_ones():
    names = [f"images/{number}.jpg" for number in range(100)]
    before = ids(divide_by_picture(of_pictures(names), 0.3)[1])
    after = ids(divide_by_picture(of_pictures([*names, *(f"images/new-{i}.jpg" for i in range(50))]), 0.3)[1])
    assert [name for name in after if int(name.removeprefix("train-")) < 100] == before
    elsewhere = of_pictures([f"/data/other/{name}" for name in names])
    assert ids(divide_by_picture(elsewhere, 0.3)[1]) == before


def test_pictures_of_one_of_many_folders_stay_together():
    def clips(folders: int) -> tuple[set[Path], set[Path]]:
        names = [f"clip-{i}/{frame}.jpg" for i in range(folders) for frame in range(6)]
        one, other = divide_by_picture(of_pictures(names), 0.4)
        return {each.image.parent for each in one}, {each.image.parent for each in other}

    learned, aside = clips(80)
    assert not learned & aside and len(aside) > 10
    learned, aside = clips(3)  # parts of one collection: pictures are divided
    assert learned & aside


def test_pictures_of_one_name_in_different_folders_are_different():
    names = [
        f"{world}/clip-{clip}/{frame:03}.jpg" for world in "ab" for clip in range(3) for frame in range(20)
    ]
    assert path_names([Path(name) for name in names]) == names
    assert path_names([Path(f"/data/{name}") for name in names[:60]]) == [name[2:] for name in names[:60]]
    assert path_names([Path("/x/a.jpg"), Path("/x/b.jpg"), Path("/x/a.jpg")]) == ["a.jpg", "b.jpg", "a.jpg"]
    learned, aside = divide_by_picture(of_pictures(names), 0.4)
    shared = {each.image.name for each in learned} & {each.image.name for each in aside}
    assert len(shared) > 5  # frames of one number are decided by themselves


def test_folders_of_one_name_are_different():
    names = [f"part-{i}/images/{frame}.jpg" for i in range(80) for frame in range(3)]
    learned, aside = divide_by_picture(of_pictures(names), 0.4)
    parts = [{each.image.parent for each in part} for part in (learned, aside)]
    assert not parts[0] & parts[1] and len(parts[1]) > 10


@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_a_part_without_examples_is_refused(share):
    with pytest.raises(ValueError, match=r"held_out=.* of 20 pictures"):
        divide_by_picture(of_pictures([f"images/{number}.jpg" for number in range(20)]), share)


# low-shot subsets


@few
@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_a_larger_subset_holds_the_smaller_one(seed, one, other):
    small, large = sorted((one, other))
    assert set(ids(low_shot(EXAMPLES, small, seed))) <= set(ids(low_shot(EXAMPLES, large, seed)))


@few
@given(seeds, st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_a_larger_fraction_holds_the_smaller_one(seed, one, other):
    small, large = sorted((one, other))
    assert set(ids(low_shot(EXAMPLES, small, seed))) <= set(ids(low_shot(EXAMPLES, large, seed)))


def test_counts_and_fractions_are_nested_in_each_other():
    tenth = set(ids(low_shot(EXAMPLES, 0.1, 5)))  # 4 and 2
    assert set(ids(low_shot(EXAMPLES, 2, 5))) <= tenth <= set(ids(low_shot(EXAMPLES, 4, 5)))


@pytest.mark.parametrize("shots", [1, 5, 20])
def test_a_number_of_shots_is_per_stratum(shots):
    assert strata(low_shot(EXAMPLES, shots, 0)) == {"scene": shots, "role": shots}


@pytest.mark.parametrize(
    ("shots", "scene", "role"), [(0.5, 20, 10), (0.1, 4, 2), (0.001, 1, 1), (1.0, 40, 20)]
)
def test_a_fraction_is_of_each_stratum_and_at_least_one(shots, scene, role):
    assert strata(low_shot(EXAMPLES, shots, 0)) == {"scene": scene, "role": role}


@pytest.mark.parametrize("shots", [0, 0.0])
def test_zero_is_all(shots):
    assert list(low_shot(EXAMPLES, shots, 0)) == EXAMPLES


def test_seeds_differ_and_repeat():
    subsets = [ids(low_shot(EXAMPLES, 5, seed)) for seed in (0, 0, 1, 2)]
    assert subsets[0] == subsets[1]
    assert len({tuple(subset) for subset in subsets}) == 3


@few
@given(st.permutations(EXAMPLES), seeds)
def test_the_file_order_does_not_matter_and_is_kept(shuffled, seed):
    subset = ids(low_shot(shuffled, 4, seed))
    assert set(subset) == set(ids(low_shot(EXAMPLES, 4, seed)))
    assert subset == [identifier for identifier in ids(shuffled) if identifier in set(subset)]


def test_new_examples_do_not_reorder_the_old_ones():
    grown = [*EXAMPLES, *(example(f"new-{i}", "role") for i in range(20))]
    old = set(ids(low_shot(grown, 20, 3))) & set(ids(EXAMPLES))
    role = {each.id for each in EXAMPLES if each.stratum == "role"}
    count = len(old & role)
    assert 0 < count < 20
    assert old & role == set(ids(low_shot(EXAMPLES, count, 3))) & role


def test_the_choice_is_even_over_seeds():
    chosen = Counter(name for seed in range(200) for name in ids(low_shot(EXAMPLES, 10, seed)))
    assert len(chosen) == 60
    role = [chosen[each.id] for each in EXAMPLES if each.stratum == "role"]  # 10 of 20: 100 expected
    assert 70 < min(role) and max(role) < 130


@pytest.mark.parametrize("shots", [-1, -0.5, 1.5, float("nan"), float("inf")])
def test_shots_out_of_range_fail(shots):
    with pytest.raises(ValueError, match="expected an integer >= 1"):
        low_shot(EXAMPLES, shots, 0)


def test_a_stratum_with_too_few_examples_gives_all_and_is_named(caplog):
    found = low_shot(EXAMPLES, 21, 0)
    assert Counter(each.stratum for each in found)["role"] == 20
    assert Counter(each.stratum for each in found)["scene"] == 21
    assert "'role' (20)" in caplog.text and "scene" not in caplog.text
    assert set(ids(low_shot(EXAMPLES, 5, 0))) <= set(ids(found))


def test_ids_with_colons_are_whole_ids():
    clips = [example(f"clip:{i:02}") for i in range(20)]
    subsets = {tuple(ids(low_shot(clips, 4, seed))) for seed in range(8)}
    assert len(subsets) > 4  # one for nearly every seed


# manifests


def test_a_manifest_says_what_was_chosen_in_its_order(tmp_path):
    subset = low_shot([*EXAMPLES, example("naïve-日本")], 3, 9)[::-1]
    save_manifest(tmp_path / "manifest.json", subset, 3, 9)
    written = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert written == {"shots": 3, "seed": 9, "ids": ids(subset)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]


# texts


@st.composite
def parts(draw) -> TextPart:
    text = draw(st.text(max_size=12))
    position = st.integers(0, len(text))
    spans = [tuple(sorted((draw(position), draw(position)))) for _ in range(draw(st.integers(0, 4)))]
    references = tuple(Reference(*span, (number,)) for number, span in enumerate(spans[:2]))
    return TextPart(text, references, tuple(spans[2:]))


@few
@given(parts(), parts())
def test_joined_spans_cover_the_same_words(first, second):
    joined = join_parts(first, second)
    assert joined.text == f"{first.text} {second.text}"
    said = [part.text[r.start : r.end] for part in (first, second) for r in part.references]
    assert [joined.text[r.start : r.end] for r in joined.references] == said
    assert [r.objects for r in joined.references] == [
        r.objects for p in (first, second) for r in p.references
    ]
    decisive = [part.text[start:end] for part in (first, second) for start, end in part.relevant]
    assert [joined.text[start:end] for start, end in joined.relevant] == decisive


def test_statements_are_the_prompt_with_each_choice():
    choices = (TextPart("yes ."), TextPart("no ."))
    assert [part.text for part in dataclasses.replace(EXAMPLES[0], choices=choices).statements()] == [
        "why ? yes .",
        "why ? no .",
    ]


def test_without_choices_the_prompt_is_the_only_statement():
    assert EXAMPLES[0].statements() == (TextPart("why ?"),)


def test_changed_examples_are_made_when_they_are_asked_for():
    asked: list[str] = []

    def change(each: Example) -> Example:
        asked.append(each.id)
        return dataclasses.replace(each, given=7)

    changed = Examples.of(EXAMPLES).mapped(change)
    assert ids(EXAMPLES) == changed.ids and strata(EXAMPLES) == Counter(changed.strata) and not asked
    assert [each.given for each in changed[1:3]] == [7, 7] and asked == ids(EXAMPLES[1:3])
    assert changed.at([3])[0] == dataclasses.replace(EXAMPLES[3], given=7)
