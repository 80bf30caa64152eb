"""What students know before finetuning: measures, readouts of words, and their figures."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from tdlib.analysis import knowledge
from tdlib.data.snli_ve import LABELS
from tdlib.miniworld.worlds import read_concepts
from tdlib.miniworld.writers import curated_texts
from tdlib.students.registry import load_student, open_encoder
from tdlib.views.figures.knowledge import plot_concepts, plot_votes

TABLE = pd.DataFrame(
    [
        ("a", "doing", ["kite"], True, "flat", True, True),
        ("b", "doing", ["kite"], True, "sketch", False, False),
        ("c", "why", ["sad", "cow"], False, "flat", True, True),
        ("d", "count", [], None, "flat", True, False),
    ],
    columns=knowledge.KNOWLEDGE,
).astype({"known": object})


@pytest.fixture(scope="module")
def student(student_folder):
    return load_student(str(student_folder)), open_encoder(str(student_folder), 40)


def test_hits_are_split_by_what_is_known_and_by_concept():
    assert knowledge.by_knowledge(TABLE) == {
        "": 0.5, "_known": 0.5, "_unknown": 1.0, "_known_in_known_style": 1.0,
    }  # fmt: skip
    found = knowledge.by_concept(TABLE).set_index("concept")
    assert found["hit"].to_dict() == {"kite": 0.5, "sad": 1.0, "cow": 1.0}
    assert found["n"].to_dict() == {"kite": 2, "sad": 1, "cow": 1} and list(found.index[found["known"]]) == [
        "kite"
    ]


def test_zero_shot_asks_every_question(student, world):
    table = knowledge.zero_shot(*student, world, "val_balanced")
    lines = read_concepts(world, "val")
    assert list(table["id"]) == list(lines) and list(table.columns) == knowledge.KNOWLEDGE
    assert 0 < table["hit"].mean() < 0.6  # of random weights
    assert table["known"].tolist() == [line["right"]["known"] for line in lines.values()]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_entailment_compares_pictures_of_one_hypothesis(sign, expected, student, worlds, monkeypatch):
    order = {
        LABELS.index("entailment"): 1.0,
        LABELS.index("neutral"): 5.0,
        LABELS.index("contradiction"): 0.0,
    }
    monkeypatch.setattr(
        knowledge, "scores",
        lambda model, encoder, examples: torch.tensor([sign * order[one.label] for one in examples]),
    )  # fmt: skip
    table = knowledge.entailment(*student, worlds["snli_ve"])
    lines = read_concepts(worlds["snli_ve"], "dev")
    assert len(table) == len(lines) / 3 and table["hit"].mean() == expected
    ids = list(lines)
    for row, start in zip(table.itertuples(), range(0, len(ids), 3), strict=True):
        same = [lines[ids[start + i]] for i in range(3)]
        assert row.id in ids[start : start + 3]
        assert all(line["right"] == same[0]["right"] for line in same), "one hypothesis, three pictures"


def test_places_have_states_and_boxes(student, tmp_path):
    pictures = knowledge.curated_pictures(tmp_path, 3, 2)
    states, boxes = knowledge.places(*student, pictures, -1)
    assert states.shape[:2] == boxes.shape[:2] and states.shape[2] == 32
    patches = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    assert patches.sum(1).tolist() == [9, 9]  # 48 pixels, patches of 16
    assert_close(boxes[0][patches[0]].amin(0), torch.tensor([0.0, 0.0, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("told", [True, False])
def test_words_are_read_where_states_tell_them(told, tokenizer_folder, monkeypatch):
    """A place that shows a word has its direction; with random states nothing can be read."""
    scenes = 64
    words, said = knowledge.said_words([curated_texts(3, i)[:3] for i in range(scenes)])
    assert ((said.float().mean(0) > 0.03) & (said.float().mean(0) < 0.35)).all() and "kite" in words
    generator = torch.Generator().manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    table = torch.randn(len(tokenizer), 128, generator=generator)
    directions = torch.randn(len(words), 128, generator=generator)
    shown = said.float() if told else said.float()[torch.randperm(scenes, generator=generator)]
    states = torch.randn(scenes, 4, 128, generator=generator)
    states[:, 1] += shown @ directions
    boxes = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(scenes, 4, 4).clone()
    boxes[:, 3] = 0  # no place
    monkeypatch.setattr(knowledge, "places", lambda *_: (states, boxes))
    model = SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=4),
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.nn.Parameter(table)),
    )
    votes = knowledge.fit_votes(model, SimpleNamespace(tokenizer=tokenizer), scenes, 3, steps=150)
    assert votes.words == words and votes.layer == 2
    assert votes.auc > 0.65 if told else 0.4 < votes.auc < 0.6
    ((_, same, shares),) = knowledge.votes_of(votes, model, None, [None])[:1]
    assert same == words and shares.shape == (4, len(words)) and 0 <= shares.min() <= shares.max() <= 1
    if told:
        best = said[0].nonzero()[:, 0]
        assert shares[1, best].mean() > shares[0, best].mean()


def texts_of(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_figure_of_concepts_has_a_number_for_each_that_was_asked():
    tables = [knowledge.by_concept(TABLE).assign(student=name) for name in ("one", "other")]
    tables[1] = tables[1][tables[1]["concept"] != "cow"]
    figure = plot_concepts(pd.concat(tables))
    assert sorted(texts_of(figure)) == ["100", "100", "100", "50", "50"]
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == ["kite (2)"]
    assert {label.get_text() for label in right.get_yticklabels()} == {"sad (1)", "cow (1)"}
    assert [label.get_text() for label in left.get_xticklabels()] == ["one", "other"]
    with pytest.raises(ValueError, match="no column student"):
        plot_concepts(knowledge.by_concept(TABLE))


def test_the_figure_of_votes_writes_what_is_likelier_than_not():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0, 1, 1], [0, 0, 0, 0]])
    shares = np.array([[0.9, 0.2], [0.1, 0.3], [0.2, 0.7], [1.0, 1.0]])
    image = Image.new("RGB", (8, 8))
    figure = plot_votes([("here", image)], {"one": [(boxes, ["$dog", "cat"], shares)]})
    assert texts_of(figure) == [r"\$dog", "cat"], "each where it is surest, places without area aside"
    assert [axes.texts[0].get_position() for axes in figure.axes] == [(0.01, 0.01)]
    assert [len(axes.patches) for axes in figure.axes] == [2]
    assert figure.axes[0].get_title(loc="left") == "one: here"
