"""The generator: the same bytes from a seed, concepts and captions, and folders that are its own."""

import json
from functools import partial

import numpy as np
import pytest
from miniworld_helpers import digest, read

from tdlib.core.paths import ConfigError
from tdlib.data.examples import DataError
from tdlib.miniworld.language import causes, mark
from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    ROLES,
    SHIRTS,
    STYLES,
    THINGS,
    WEATHER,
    Person,
    Scene,
    reserved,
)
from tdlib.miniworld.writers import (
    WORLDS,
    Size,
    captioned_scene,
    curated_texts,
    ensure_world,
    scene_at,
    write_captions,
    write_snli_ve,
    write_vcr,
    write_vqa,
)

SMALL = Size(train=20, val=20, test=20, shifted=30)


# styles, concepts and captions

CURATED = {
    "place": {name for name, entry in PLACES.items() if entry.curated},
    "weather": {name for name, entry in WEATHER.items() if entry.curated} | {None},
    "style": {name for name, curated in STYLES.items() if curated},
    "things": {name for name, entry in THINGS.items() if entry.curated},
    "mood": {name for name, entry in MOODS.items() if entry.curated},
    "held": {name for name, entry in HELD.items() if entry.curated} | {None},
    "role": {name for name, entry in ROLES.items() if entry.curated} | {None},
    "shirt": {name for name, curated in SHIRTS.items() if curated},
}


def concepts(scenes: list[Scene]) -> dict[str, set]:
    """All that occurs in some scenes, by kind of concept."""
    found = {kind: {getattr(scene, kind) for scene in scenes} for kind in ("place", "weather", "style")}
    found["things"] = {name for scene in scenes for name in scene.things}
    for kind in ("mood", "held", "role", "shirt"):
        found[kind] = {getattr(person, kind) for scene in scenes for person in scene.people}
    return found


def test_scenes_depend_on_seed_stream_and_index_alone():
    picked = [(0, "train", 3), (1, "train", 3), (0, "val", 3), (0, "train", 4)]
    forwards = {key: scene_at(*key) for key in picked}
    assert forwards == {key: scene_at(*key) for key in reversed(picked)}
    assert len(set(forwards.values())) == 4


def test_a_smaller_corpus_is_the_start_of_a_larger_one(tmp_path):
    small = write_captions(tmp_path / "small", "web", 1, 3)
    large = write_captions(tmp_path / "large", "web", 1, 5)
    assert read(large / "captions.jsonl")[:3] == read(small / "captions.jsonl")
    assert (large / "images/000002.jpg").read_bytes() == (small / "images/000002.jpg").read_bytes()


def test_a_cause_fits_the_mood():
    scene = scene_at(0, "train", 0)
    person = scene.people[0].__class__("red", "standing", "happy", "suitcase", None)
    scene = Scene("station", "rainy", "flat", (person,), ("dog",), 0)
    assert causes(scene, pleasant=True) == {"dog": "dog", "rainy": "weather"}
    assert causes(scene, pleasant=False) == {"dog": "dog", "rainy": "weather", "departure": "suitcase"}


@pytest.mark.parametrize(
    ("text", "tokens", "decisive"),
    [
        ("why is {0} <sad> ?", ["Why", "is", [0], "sad", "?"], [3]),
        ("{12} has <a red hat> .", [[12], "has", "a", "red", "hat", "."], [2, 3, 4]),
        ("<why> is {0} <so sad> ?", ["Why", "is", [0], "so", "sad", "?"], [0, 3, 4]),
        ("nothing is marked .", ["Nothing", "is", "marked", "."], []),
    ],
)
def test_marks_become_tokens_and_indices(text, tokens, decisive):
    marked = mark(text)
    assert (marked.tokens, marked.decisive) == (tokens, decisive)


def test_the_curated_corpus_has_its_concepts_and_the_web_all():
    curated, web = (
        concepts([captioned_scene(kind, 3, index)[0] for index in range(300)]) for kind in ("curated", "web")
    )
    assert curated == CURATED and CURATED["style"] == {"flat"}  # none besides them, and each of them
    assert web["style"] == set(STYLES) and all(CURATED[kind] < web[kind] for kind in CURATED)


def test_curated_captions_infer_only_from_what_they_know():
    """What follows from unknown concepts is the teacher's knowledge alone."""

    def unknown(table):
        return [entry for entry in table.values() if not entry.curated]

    inferences = [entry.inference for table in (MOODS, PLACES, ROLES) for entry in unknown(table)]
    inferences += [words for entry in unknown(HELD) for words in (entry.next, entry.consequence)]
    for table in (THINGS, WEATHER):
        inferences += [words for entry in unknown(table) for words in (entry.joy, entry.trouble)]
    curated = "\n".join(captioned_scene("curated", 3, index)[1].lower() for index in range(300))
    assert not [words for words in inferences if words in curated]
    web = "\n".join(captioned_scene("web", 3, index)[1].lower() for index in range(1000))
    assert len([words for words in inferences if words in web]) > 0.9 * len(inferences)


def test_false_captions_differ_from_the_true_ones():
    for index in range(100):
        texts = curated_texts(3, index)
        assert texts[0] == captioned_scene("curated", 3, index)[1]
        assert all(true != false for true, false in zip(texts[:3], texts[3:], strict=True))


@pytest.mark.parametrize("kind", ["web", "curated", "held_out"])
def test_captions_are_deterministic(kind):
    first = [captioned_scene(kind, 3, index) for index in range(20)]
    assert first == [captioned_scene(kind, 3, index) for index in reversed(range(20))][::-1]
    assert first != [captioned_scene(kind, 4, index) for index in range(20)]
    assert len({caption for _, caption in first}) > 18
    assert all(caption and caption == caption.strip() and "{" not in caption for _, caption in first)


def test_other_readings_are_other_captions_of_the_same_scene():
    readings = [[captioned_scene("web", 3, index, reading) for index in range(30)] for reading in (0, 1, 2)]
    assert readings[0] == [captioned_scene("web", 3, index) for index in range(30)]
    assert len({tuple(scene for scene, _ in each) for each in readings}) == 1
    assert all(len({caption for _, caption in each}) > 1 for each in zip(*readings, strict=True))


def test_evaluation_captions_are_not_those_of_training():
    web, held_out = ({captioned_scene(kind, 3, i)[0] for i in range(300)} for kind in ("web", "held_out"))
    assert not web & held_out


def test_a_caption_corpus_on_disk(tmp_path):
    folder = write_captions(tmp_path / "curated", "curated", 3, 4)
    assert digest(folder) == digest(write_captions(tmp_path / "again", "curated", 3, 4))
    written = read(folder / "captions.jsonl")
    assert [record["caption"] for record in written] == [
        captioned_scene("curated", 3, i)[1] for i in range(4)
    ]
    assert {record["image"] for record in written} == {
        f"images/{p.name}" for p in (folder / "images").iterdir()
    }


def test_the_generator_replaces_its_own_folders_only(tmp_path):
    (tmp_path / "precious").write_text("the real VCR's")
    for data_set, write in WORLDS.items():
        for make in (write, partial(ensure_world, data_set)):
            with pytest.raises(ConfigError, match=r"miniworld\.json.*choose another folder"):
                make(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"captions\.jsonl.*choose another folder"):
        write_captions(tmp_path, "web", 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_split_without_questions_is_not_written_silently(tmp_path):
    with pytest.raises(DataError, match=r"train: 4 pictures are too few.*30 or more"):
        write_vcr(tmp_path / "vcr", 0, Size(train=4))
    with pytest.raises(DataError, match="train2014: 100001 pictures; there are ids for 100000"):
        write_vqa(tmp_path / "vqa", 0, Size(train=100_001))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data_set", WORLDS)
def test_a_world_is_written_once_and_its_seed_gives_the_same_bytes(tmp_path, data_set):
    folder = ensure_world(data_set, tmp_path / "world", 3, SMALL)
    stamp, before = (folder / "miniworld.json").stat().st_ino, digest(folder)
    assert ensure_world(data_set, folder, 3, SMALL) == folder
    assert (folder / "miniworld.json").stat().st_ino == stamp, "it is there already"
    older = json.dumps(json.loads((folder / "miniworld.json").read_text()) | {"side_files": 2})
    (folder / "miniworld.json").write_text("{" if data_set == "vcr" else older)  # written again
    assert digest(ensure_world(data_set, folder, 3, SMALL)) == before
    assert digest(WORLDS[data_set](tmp_path / "deeper" / "other", 4, SMALL)) != before


# shifts of pictures


def test_a_fifth_of_the_combinations_is_reserved_and_every_value_keeps_most_partners():
    def pairs(kind: str, values) -> dict[tuple[str, str], bool]:
        """Whether each pair is reserved, whatever the rest of the scene is."""
        found = {}
        for value in values:
            for held in HELD:
                verdicts = set()
                for other in SHIRTS if kind == "place" else PLACES:
                    shirt, place = (other, value) if kind == "place" else (value, other)
                    person = Person(shirt, "standing", "happy", held, None)
                    verdicts.add(reserved(Scene(place, None, "flat", (person,), (), 0)))
                found[value, held] = verdicts == {True}
        return found

    for kind, values in (("place", PLACES), ("shirt", SHIRTS)):
        verdicts = pairs(kind, values)
        assert 0.17 < np.mean(list(verdicts.values())) < 0.23
        for side in (0, 1):
            for value in {pair[side] for pair in verdicts}:
                assert np.mean([v for pair, v in verdicts.items() if pair[side] == value]) <= 0.3


def test_many_texts_about_few_pictures(tmp_path):
    vcr = write_vcr(tmp_path / "vcr", 0, Size(60, 0, 0, 0, train_examples=601))
    assert len({record["annot_id"] for record in read(vcr / "train.jsonl")}) > 590
    ve = write_snli_ve(tmp_path / "ve", 0, Size(30, 0, 0, 0, train_examples=900))
    assert len({record["pairID"] for record in read(ve / "snli_ve_train.jsonl")}) == 900
    vqa = write_vqa(tmp_path / "vqa", 0, Size(20, 0, 0, 0, train_examples=800))
    asked = json.loads((vqa / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    assert len({each["question_id"] for each in asked}) == 800
    many = write_vqa(tmp_path / "more", 0, Size(6, 0, 0, 0, train_examples=9000))
    asked = json.loads((many / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    assert len({each["question_id"] for each in asked}) == 9000
