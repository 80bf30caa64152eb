"""What side files say of examples: the concepts that are named, who knows them, and the picture's style."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tdlib.miniworld.language import cause_clause, curated_concepts, definite
from tdlib.miniworld.scenes import HELD, MOODS, PLACES, ROLES, SHIRTS, STYLES, THINGS, WEATHER
from tdlib.miniworld.worlds import STRATA, Size, read_concepts, scene_at, strata_of
from tdlib.miniworld.write_snli_ve import write_snli_ve
from tdlib.miniworld.write_vqa import write_vqa, write_vqa_cp

SEED = 5
SIZE = Size(train=30, val=60, test=12, shifted=40)
KNOWN = {True: "known", False: "unknown", None: ""}


@pytest.fixture(scope="module")
def ve(tmp_path_factory) -> Path:
    return write_snli_ve(tmp_path_factory.mktemp("ve") / "ve", SEED, SIZE)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory) -> Path:
    return write_vqa(tmp_path_factory.mktemp("vqa") / "vqa", SEED, SIZE)


def phrases_of_hypotheses() -> dict[str, list[str]]:
    """All words by which a hypothesis can name each concept, read off the tables."""
    found: dict[str, list[str]] = {}
    for name, entry in HELD.items():
        found[name] = [f"person with the {definite(entry.noun)}", entry.doing, f"ready to {entry.next}"]
    for name, entry in PLACES.items():
        found[name] = [entry.phrase, entry.inference]
    for name, entry in MOODS.items():
        found[name] = [f"is {entry.word}", f"feels {entry.inference}"]
    for name, entry in ROLES.items():
        found[name] = [entry.noun, entry.inference]
    for name in SHIRTS:
        found[name] = [f"the {name} shirt", f"something {name}"]
    because = {"sunny": "the sun", "rainy": "the rain", "snowy": "the snow", "night": "the night"}
    for name, entry in WEATHER.items():
        found[name] = [entry.clause, entry.evidence, entry.joy, entry.trouble, f"needs {entry.need}"]
        found[name].append(f"because of {because[name]}")
    for name, entry in THINGS.items():
        found[name] = [
            entry.joy,
            entry.trouble,
            f"because of the {definite(entry.noun)}",
            f"the {name} belongs",
        ]
    for name, pet in {"dog": "puppy", "cat": "kitten", "car": "vehicle", "horse": "pony"}.items():
        found[name].append(f"takes care of this {pet}")
    found["bicycle"].append("takes care of this bike")
    events = {"birthday": "a birthday", "party": "a party", "departure": "a farewell", "call": "a phone call"}
    for name, words in events.items():
        found[name] = [cause_clause(name, True), f"because of {words}"]
    return found


def test_a_hypothesis_names_the_concepts_whose_words_it_has(ve):
    phrases = phrases_of_hypotheses()
    seen = Counter()
    for split in ("train", "dev", "test", "dev_shortcut", "dev_balanced", "dev_style", "dev_composition"):
        lines = read_concepts(ve, split)
        records = [json.loads(line) for line in (ve / f"snli_ve_{split}.jsonl").read_text().splitlines()]
        assert list(lines) == [record["pairID"] for record in records]
        stream = f"snli_ve_{split if split in ('dev_style', 'dev_composition') else split.split('_')[0]}"
        for record in records:
            text, line = record["sentence2"], lines[record["pairID"]]
            named = {
                name
                for name, words in phrases.items()
                if any(re.search(rf"\b{re.escape(each)}\b", text, re.IGNORECASE) for each in words)
            }
            assert named == set(line["right"]["concepts"]), text
            assert line["style"] == scene_at(SEED, stream, int(record["Flikr30kID"]) % 10**7).style
            assert line["wrong"] == []
            seen[line["right"]["known"]] += 1
    assert min(seen[True], seen[False]) > 50 and seen[None] == 0


def test_questions_and_answers_name_what_they_are_about(vqa):
    """A right answer's concepts are in its words, or what they say of the scene; wrong ones are others."""
    nouns = {name: definite(entry.noun) for name, entry in (HELD | THINGS | ROLES).items()}
    seen = Counter()
    for split in ("train2014", "val2014", "val2014_prior", "val2014_balanced", "val2014_style"):
        lines = read_concepts(vqa, split)
        asked = json.loads((vqa / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())["questions"]
        answered = json.loads((vqa / f"v2_mscoco_{split}_annotations.json").read_text())["annotations"]
        assert list(lines) == [str(question["question_id"]) for question in asked]
        for question, annotation in zip(asked, answered, strict=True):
            line, text = lines[str(question["question_id"])], question["question"].lower()
            answer, named = annotation["multiple_choice_answer"], line["right"]["concepts"]
            assert set(re.findall(r"person in the (\w+) shirt", text)) <= set(named), text
            if match := re.match(r"is there an? (\w+)", text):
                assert named == [match[1]]
            elif text.startswith("where"):
                assert named[-1] == {"bus stop": "station", "campsite": "camp"}.get(answer, answer)
            elif text.startswith(("what is the job", "what animal")) or "holding" in text:
                assert nouns[named[-1]] == answer
            elif text.startswith("what color"):
                assert named[-1] == answer
            elif text in ("how many people are there?", "how many animals are there?", "is this outdoors?"):
                assert named == [] and line["right"]["known"] is None and line["wrong"] == []
            else:
                continue
            assert not [wrong for wrong in line["wrong"] if wrong["concepts"] == named[-1:] and named]
            seen[text.split()[0], line["right"]["known"]] += 1
    assert min(seen["where", True], seen["where", False], seen["is", True], seen["is", False]) > 3
    assert seen["how", None] > 3


def test_known_is_what_the_curated_corpus_has_of_all_that_is_named(ve, vqa, tmp_path):
    cp = write_vqa_cp(tmp_path / "cp", SEED, SIZE)
    has = curated_concepts()
    tables = HELD | PLACES | MOODS | ROLES | WEATHER | THINGS
    assert all(has[name] == entry.curated for name, entry in tables.items())
    assert {name for name in has if name not in tables and not has[name]} == {
        "purple", "orange", "white", "party", "departure", "call",
    }  # fmt: skip
    for folder, split in ((ve, "dev"), (vqa, "val2014"), (cp, "train"), (cp, "test")):
        lines = read_concepts(folder, split)
        for line in lines.values():
            for said in (line["right"], *line["wrong"]):
                expected = all(has[name] for name in said["concepts"]) if said["concepts"] else None
                assert said["known"] is expected
            assert line["style_known"] is STYLES[line["style"]]
        table = strata_of(folder, split)
        assert list(table.index) == list(lines) and list(table.columns) == STRATA
        assert table["concept"].tolist() == [KNOWN[line["right"]["known"]] for line in lines.values()]
        assert set(table["style_known"]) == {"known", "unknown"}


def test_data_without_side_files_have_no_strata(tmp_path):
    for folder in (tmp_path, ""):
        table = strata_of(folder, "val")
        assert table.empty and list(table.columns) == STRATA
    assert table.reindex(["a"]).fillna("").to_dict("records") == [dict.fromkeys(STRATA, "")]
