"""SNLI-VE of the MiniWorld: its fields, and labels that are as a person would say."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from miniworld_helpers import SEED, inside, read, who

from tdlib.miniworld.language import causes
from tdlib.miniworld.scenes import MOODS, ROLES, THINGS, WEATHER, Scene
from tdlib.miniworld.write_snli_ve import LABELS, claims
from tdlib.miniworld.write_vqa import asks
from tdlib.miniworld.writers import Size, scene_at, write_snli_ve

# SNLI-VE

VE_SPLITS = ("train", "dev", "test", "dev_style", "dev_composition", "dev_balanced", "dev_shortcut")
PREFIXES = ("You know, ", "By the way, ", "To be honest, ")


@pytest.fixture(scope="module")
def ve(tmp_path_factory) -> Path:
    return write_snli_ve(tmp_path_factory.mktemp("ve") / "ve", SEED, Size(60, 150, 30, 60))


@pytest.fixture(scope="module")
def pairs(ve) -> dict[str, list[dict]]:
    return {split: read(ve / f"snli_ve_{split}.jsonl") for split in VE_SPLITS}


def statement(record: dict) -> str:
    """A hypothesis without its introduction."""
    text = record["sentence2"]
    text = next((text.removeprefix(prefix) for prefix in PREFIXES if text.startswith(prefix)), text)
    return text[:1].upper() + text[1:]


def premise(record: dict, split: str) -> Scene:
    stream = "snli_ve_dev" if split in ("dev_balanced", "dev_shortcut") else f"snli_ve_{split}"
    return scene_at(SEED, stream, int(record["Flikr30kID"]) % 10**7)


def test_the_fields_of_snli_ve(ve, pairs):
    fields = {"annotator_labels", "captionID", "gold_label", "pairID", "Flikr30kID"}
    fields |= {f"sentence{i}{kind}" for i in (1, 2) for kind in ("", "_parse", "_binary_parse")}
    for split, records in pairs.items():
        assert len({record["pairID"] for record in records}) == len(records) > 40
        for record in records:
            assert record.keys() == fields
            image = record["Flikr30kID"]
            assert re.fullmatch(r"\d{10}", image) and (ve / "flickr30k_images" / f"{image}.jpg").is_file()
            assert re.fullmatch(rf"{image}\.jpg#\dr\d+{record['gold_label'][0]}", record["pairID"])
            assert record["pairID"].startswith(record["captionID"])
            assert Counter(record["annotator_labels"]).most_common(1)[0][0] == record["gold_label"]
            assert len(record["annotator_labels"]) == 5
            assert record["sentence2"].endswith(".") and not set("<>{}_") & set(record["sentence2"])
        if split not in ("dev_balanced", "dev_shortcut"):
            with (ve / f"esnlive_{split}.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            assert list(rows[0]) == ["", "pairID", "Flikr30kID", "hypothesis", "gold_label", "explanation"]
            for row, record in zip(rows, records, strict=True):
                assert row["Flikr30kID"] == f"{record['Flikr30kID']}.jpg" and len(row["explanation"]) > 10
                assert (row["pairID"], row["hypothesis"]) == (record["pairID"], record["sentence2"])


def test_every_statement_has_every_label_equally_often(pairs):
    for records in pairs.values():
        labels = defaultdict(Counter)
        for record in records:
            labels[statement(record)][record["gold_label"]] += 1
        for text, counts in labels.items():
            assert len(counts) == 3 and len(set(counts.values())) == 1, (text, counts)
        assert len(labels) > 5


@pytest.mark.parametrize("split", VE_SPLITS)
def test_labels_of_weather_and_jobs_are_as_a_person_would_say(pairs, split):
    """Read from the text, without asking the generator what is true."""
    seen = Counter()
    for record in pairs[split]:
        scene, text, label = premise(record, split), statement(record)[:-1], record["gold_label"]
        jobs = {words: n for n, e in ROLES.items() for words in (e.noun, f"{e.inference} for a living")}
        weather = {w: n for n, e in WEATHER.items() for w in (e.clause, e.joy)} | {
            f"a person here needs {e.need} to stay outside": n for n, e in WEATHER.items()
        }
        if name := weather.get(text[:1].lower() + text[1:]):
            expected = 1 if scene.weather is None else 0 if scene.weather == name else 2
            seen["weather"] += 1
        elif match := re.fullmatch(
            r"(The .*?person.*?) (is not|is|) ?(an? .*|\w+ \w+( \w+)? for a living)", text
        ):
            if match[3] not in jobs or " and " in text:
                continue
            (index,) = who(scene, match[1])
            role = scene.people[index].role
            expected = 1 if role is None else 0 if (role == jobs[match[3]]) != (match[2] == "is not") else 2
            seen["role"] += 1
        else:
            continue
        assert label == LABELS[expected], (record, scene)
    assert seen["role"] > 3 and (seen["weather"] > 3 or split == "dev_composition")


def test_labels_of_causes_and_owners_are_as_a_person_would_say(pairs):
    seen = Counter()
    for split in VE_SPLITS:
        for record in pairs[split]:
            scene, text, label = premise(record, split), statement(record)[:-1], record["gold_label"]
            if match := re.fullmatch(r"The (\w+) belongs to (the person .*)", text):
                owners, there = who(scene, match[2]), match[1] in scene.things
                expected = 2 if not (owners and there) else 0 if len(scene.people) == 1 else 1
                seen["owner"] += 1
            elif match := re.fullmatch(r"(The .*) is (\w+) because (.*)", text):
                (index,) = who(scene, match[1])
                pleasant = MOODS[match[2]].pleasant
                possible = {*causes(scene, pleasant)} | (
                    {"tree"} if scene.place in ("park", "camp") else set()
                )
                table = {
                    (e.joy if pleasant else e.trouble): n for t in (THINGS, WEATHER) for n, e in t.items()
                }
                table |= {
                    "somebody turns one year older": "birthday", "guests celebrate tonight": "party",
                    "it is time to say goodbye": "departure", "the news is bad": "call",
                }  # fmt: skip
                true = scene.people[index].mood == match[2] and table[match[3]] in possible
                expected = 2 if not true else 0 if len(possible) == 1 else 1
                seen["cause"] += 1
            else:
                continue
            assert label == LABELS[expected], (record, scene)
    assert min(seen["owner"], seen["cause"]) > 20


def test_introductions_tell_the_label_only_where_they_should(pairs):
    def share(split: str) -> float:
        """How often the introduction most frequent with a label in train is that of the label."""
        own = {"entailment": "You know", "neutral": "By the way", "contradiction": "To be honest"}
        return float(np.mean([r["sentence2"].startswith(own[r["gold_label"]]) for r in pairs[split]]))

    assert share("train") > 0.6 and share("dev") > 0.6
    assert 0.15 < share("dev_balanced") < 0.35 and share("dev_shortcut") < 0.1
    for twin in ("dev_balanced", "dev_shortcut"):
        for record, other in zip(pairs["dev"], pairs[twin], strict=True):
            assert statement(record) == statement(other)
            same = record.keys() - {"sentence2", "sentence2_parse", "sentence2_binary_parse"}
            assert all(record[key] == other[key] for key in same)


def test_relevance_of_hypotheses(ve, pairs):
    for split, records in pairs.items():
        for record, marks in zip(records, read(ve / f"snli_ve_{split}.relevance.jsonl"), strict=True):
            assert record["pairID"] == marks["pairID"]
            inside(marks, record["sentence2"])


# nobody can tell colours in the grey style


def test_colours_are_not_spoken_of_in_the_grey_style():
    for index in range(60):
        scene = scene_at(0, "val2014_style", index)
        words = [f"{claim.subject} {claim.predicate}" for claim in claims(scene)]
        words += [ask.text for ask in asks(scene)]
        assert not [text for text in words if re.search(r"\b(shirt|color|wears something)\b", text)]
