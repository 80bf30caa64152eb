"""Measures what a student knows before it is finetuned, through the reader that runs use.

Does it prefer true captions (``matching``)? Does it answer without training, concept by concept
(``zero_shot``, ``entailment``)? Which words can be read from its visual tokens (``fit_votes``)? Pictures
and texts are the MiniWorld's. Loads models, unlike most of ``analysis``.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tdlib.analysis.targeting import roc_auc
from tdlib.data.examples import Example, Reference, TextPart
from tdlib.data.snli_ve import LABELS, SnliVeReader
from tdlib.data.vcr import NEUTRAL_NAMES, VcrReader
from tdlib.miniworld.drawing import SIZE
from tdlib.miniworld.language import two_parts
from tdlib.miniworld.scenes import HELD, THINGS
from tdlib.miniworld.worlds import read_concepts, save_picture, scene_at
from tdlib.miniworld.writers import CURATED_READINGS, curated_texts
from tdlib.students.base import StudentEncoder, student_inputs
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import batch_logits, predict

# Statements as examples


def _named(text: str, people: int) -> TextPart:
    """Makes a text with references to the people that it names: person i has the i-th neutral name."""
    words = [word for word in re.finditer(r"\w+", text) if word[0] in NEUTRAL_NAMES[:people]]
    return TextPart(
        text, tuple(Reference(word.start(), word.end(), (NEUTRAL_NAMES.index(word[0]),)) for word in words)
    )


def statement(example: Example, text: str) -> Example:
    """Makes an example with one statement about a picture: a question with one choice, or a hypothesis."""
    people = example.names.count("person")
    asked, told = two_parts(text)
    choices = (_named(told, people),) if told else ()
    return replace(example, prompt=_named(asked, people), choices=choices)


def curated_pictures(folder: Path, seed: int, number: int) -> list[Example]:
    """Draws curated scenes as examples without words, with the objects that VCR would list."""
    examples = []
    for index in range(number):
        scene = scene_at(seed, "curated", index)
        path = folder / f"{index}.jpg"
        picture = save_picture(scene, path)
        listed = [("person", person) for person in picture.people]
        for person, held in zip(scene.people, picture.held, strict=True):
            if person.held and held and HELD[person.held].coco:
                listed.append((person.held, held))
        listed += [
            (name, drawn)
            for name, drawn in zip(scene.things, picture.things, strict=True)
            if THINGS[name].coco
        ]
        boxes: tuple[Any, ...] = tuple(tuple(side / SIZE for side in drawn.box) for _, drawn in listed)
        names = tuple(name for name, _ in listed)
        examples.append(Example(f"curated-{index}", path, boxes, names, TextPart(""), (), None, ""))
    return examples


@torch.inference_mode()
def scores(student: Any, encoder: StudentEncoder, examples: Sequence[Example]) -> Tensor:
    """Computes the logit of each example of one statement: (examples,)."""
    dataset = EncodedExamples(examples, encoder)
    logits_of_examples = torch.zeros(len(dataset))
    for numbers, logits in batch_logits(student, dataset, 64):
        logits_of_examples[numbers] = logits[:, 0].cpu()
    return logits_of_examples


# Matching


def matching(
    student: Any, encoder: StudentEncoder, scenes: int = 512, seed: int = 500, bare: bool = False
) -> dict[str, float]:
    """Measures image-text matching on curated scenes that no student saw (chance 0.5).

    The share of pictures whose own caption scores higher: ``matching``, than the caption of another
    picture; ``matching_hard``, than its own with one thing changed. With ``bare`` also both, named
    ``..._bare``, without the boxes of objects (for students that read regions).
    """
    texts = [curated_texts(seed, index) for index in range(scenes)]
    said = {
        "own": [text[0] for text in texts],
        "matching": [text[0] for text in texts[1:] + texts[:1]],
        "matching_hard": [text[CURATED_READINGS] for text in texts],
    }
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = curated_pictures(Path(folder), seed, scenes)
        views = {"": pictures}
        if bare:
            views["_bare"] = [replace(picture, boxes=(), names=()) for picture in pictures]
        for view, shown in views.items():
            logits = {}
            for name, chosen in said.items():
                examples = [statement(p, text) for p, text in zip(shown, chosen, strict=True)]
                encoder.prepare(examples)
                logits[name] = scores(student, encoder, examples)
            for name in ("matching", "matching_hard"):
                figures[name + view] = float((logits["own"] > logits[name]).float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


# Zero-shot, concept by concept

KNOWLEDGE = ["id", "family", "concepts", "known", "style", "style_known", "hit"]


def _knowledge(folder: Path, split: str, ids: Sequence[str], hits: Sequence[bool]) -> pd.DataFrame:
    """Makes a table of examples, their concepts and whether each was answered right; see ``KNOWLEDGE``."""
    lines = read_concepts(folder, split)
    rows = []
    for identifier, hit in zip(ids, hits, strict=True):
        line = lines[identifier]
        right = line["right"]
        about = right["concepts"], right["known"], line["style"], line["style_known"]
        rows.append((identifier, line["family"], *about, bool(hit)))
    return pd.DataFrame(rows, columns=KNOWLEDGE).astype({"known": object})


def zero_shot(
    student: Any, encoder: StudentEncoder, world: Path, split: str = "val_balanced"
) -> pd.DataFrame:
    """Tells of each question of a MiniWorld's VCR split if the student is right untrained (chance 0.25).

    Columns ``KNOWLEDGE``: ``concepts`` of the right answer, ``known`` to the curated corpus or not (None:
    it names none), the picture's style and whether that corpus has it, and ``hit``.
    """
    examples = VcrReader(world, split).read()
    encoder.prepare(examples)
    chosen = predict(student, EncodedExamples(examples, encoder)).argmax(1)
    hits = chosen == np.array([example.label for example in examples])
    return _knowledge(world, split, [example.id for example in examples], hits)


def entailment(
    student: Any, encoder: StudentEncoder, world: Path, split: str = "dev_balanced"
) -> pd.DataFrame:
    """Tells of each hypothesis of a MiniWorld's SNLI-VE split if it is matched with the right picture.

    Right: it matches a picture that entails it better than one that contradicts it (chance 0.5).
    The generator writes every hypothesis three times, once with each label, one after the other. Columns
    as in ``zero_shot``, the picture being the entailing one.
    """
    examples = SnliVeReader(world, split).read()
    encoder.prepare(examples)
    logits = scores(student, encoder, examples)
    entails, contradicts = LABELS.index("entailment"), LABELS.index("contradiction")
    ids, hits = [], []
    for start in range(0, len(examples), 3):
        place = {example.label: start + i for i, example in enumerate(examples[start : start + 3])}
        ids.append(examples[place[entails]].id)
        hits.append(bool(logits[place[entails]] > logits[place[contradicts]]))
    return _knowledge(world, split, ids, hits)


def by_knowledge(table: pd.DataFrame) -> dict[str, float]:
    """Computes the share of hits in all, among known concepts and among unknown ones.

    ``_known_in_known_style``: known, and drawn in the one style of the curated corpus.
    """
    known, unknown = ((table["known"].map(lambda value, k=k: value is k)) for k in (True, False))
    strata = {
        "": table["hit"].notna(), "_known": known, "_unknown": unknown,
        "_known_in_known_style": known & table["style_known"].astype(bool),
    }  # fmt: skip
    return {name: round(float(table["hit"][rows].mean()), 3) for name, rows in strata.items() if rows.any()}


def by_concept(table: pd.DataFrame) -> pd.DataFrame:
    """Computes the share of hits by concept: columns concept, known, hit, n.

    An example with two concepts counts for both.
    """
    rows = table.explode("concepts").dropna(subset=["concepts"]).rename(columns={"concepts": "concept"})
    alone = rows.assign(known=rows["known"].astype(bool))
    by_name = alone.groupby("concept", sort=False).agg(
        known=("known", "any"), hit=("hit", "mean"), n=("hit", "size")
    )
    return by_name.reset_index()


# Words that are read from places

# Words of the forms of questions and answers, which no picture shows.
FORMS = frozenset(
    "and are because can could does doing for from going has have hand happen how into job let like maybe "
    "need needs next not now off one out outside quite right see somebody somewhere someone stay than that "
    "the their them then there they this what when where while who why will with would".split()
)


@dataclass(frozen=True)
class Votes:
    """A readout of words from a student's places; see ``fit_votes``.

    ``auc`` tells how well it ranks pictures that it was not fitted on: the mean over words of the
    chance that a picture whose captions say the word gets more of it than one whose captions do not (0.5:
    nothing is read).
    """

    words: list[str]
    weight: Tensor  # (student_dim, words)
    bias: Tensor  # (words,)
    layer: int
    auc: float

    def __call__(self, states: Tensor) -> Tensor:
        """Computes log-odds (..., words) that captions say a word, from each place (..., student_dim)."""
        return states @ self.weight + self.bias


@torch.no_grad()
def places(
    student: Any, encoder: StudentEncoder, examples: Sequence[Example], layer: int
) -> tuple[Tensor, Tensor]:
    """Computes hidden states (examples, places, dim) of places of pictures without words, and the boxes.

    Boxes (examples, places, 4) have no area where an example has fewer places.
    """
    nothing = [replace(example, prompt=TextPart(""), choices=()) for example in examples]
    encoder.prepare(nothing)
    dataset = EncodedExamples(nothing, encoder)
    student.eval()
    states, boxes = [], []
    for start in range(0, len(nothing), 32):
        items = [dataset[index] for index in range(start, min(start + 32, len(nothing)))]
        inputs = student_inputs(student, collate(items, encoder))
        output = student(**inputs, output_hidden_states=True)
        states.append(output.hidden_states[layer][:, 0].float())
        boxes.append(output.boxes[:, 0].float())
    most = max(part.shape[1] for part in boxes)

    def together(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts])

    return together(states), together(boxes)


def said_words(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Finds words that captions of 3 to 35 % of the scenes say, and which scene says which: (scenes, words).

    A rarer word has too few pictures to fit on, one that is more frequent tells little of a place.
    """
    said = [set(re.findall(r"[a-z]{3,}", " ".join(of_scene).lower())) for of_scene in texts]
    every = sorted(set().union(*said) - {name.lower() for name in NEUTRAL_NAMES} - FORMS)
    present = torch.tensor([[word in one for word in every] for one in said])
    share = present.float().mean(0)
    kept = ((share >= 0.03) & (share <= 0.35)).nonzero()[:, 0]
    return [every[i] for i in kept], present[:, kept]


def fit_votes(
    student: Any, encoder: StudentEncoder, scenes: int = 256, seed: int = 500, steps: int = 200
) -> Votes:
    """Reads words from the places of a frozen student, as its pretraining did with heads that are dropped.

    A linear map leads from a place's hidden state in the middle layer, where it has seen the picture and
    still differs from the others, to the student's own word embeddings; the surest place counts
    (multiple-instance learning, Fang et al. 2015). It is fitted, in ``steps`` of Adam, on ``scenes``
    curated pictures with three captions each, of a ``seed`` that no student learned from, and says what can
    be read off; a quarter of the pictures is held out and tells how well. The student is not changed.
    """
    layer = student.config.num_hidden_layers // 2
    words, said = said_words([curated_texts(seed, index)[:CURATED_READINGS] for index in range(scenes)])
    table = student.get_input_embeddings().weight.detach()
    pieces = [encoder.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    embeddings = torch.stack([table[ids].mean(0) for ids in pieces])
    embeddings = (embeddings - embeddings.mean(0)) / embeddings.std()
    with tempfile.TemporaryDirectory() as folder:
        states, boxes = places(student, encoder, curated_pictures(Path(folder), seed, scenes), layer)
    real = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return _fit(words, said.float(), embeddings, states, real, layer, steps)


@torch.no_grad()
def votes_of(
    votes: Votes, student: Any, encoder: StudentEncoder, examples: Sequence[Example]
) -> list[tuple[np.ndarray, list[str], np.ndarray]]:
    """Computes boxes (places, 4), words and probabilities (places, words) per example, for ``plot_votes``."""
    states, boxes = places(student, encoder, examples, votes.layer)
    shares = votes(states).sigmoid().numpy()
    return [(box, votes.words, share) for box, share in zip(boxes.numpy(), shares, strict=True)]


def _fit(
    words: list[str], said: Tensor, embeddings: Tensor, states: Tensor, real: Tensor, layer: int, steps: int
) -> Votes:
    """Fits the readout; the last quarter of the pictures is held out."""
    mean, spread = states[real].mean(0), states[real].std(0) + 1e-6
    states = (states - mean) / spread
    fitted = len(states) * 3 // 4
    with torch.random.fork_rng():  # the caller's random numbers stay what they are
        torch.manual_seed(0)
        turn = (0.01 * torch.randn(states.shape[-1], embeddings.shape[1])).requires_grad_()
    offset = torch.logit(said[:fitted].mean(0).clamp(0.01, 0.99)).requires_grad_()

    def votes(rows: Any) -> Tensor:
        log_odds = states[rows] @ (turn @ embeddings.T) + offset
        return log_odds.masked_fill(~real[rows][..., None], -1e4).amax(1)

    optimizer = torch.optim.AdamW([turn, offset], lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(votes(slice(fitted)), said[:fitted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guessed, there = votes(slice(fitted, None)).numpy(), said[fitted:].bool().numpy()
        weight = (turn @ embeddings.T) / spread[:, None]
        bias = offset - mean @ weight
    measurable = np.flatnonzero(there.any(0) & ~there.all(0))
    areas = [roc_auc(guessed[:, word], there[:, word]) for word in measurable]
    return Votes(words, weight, bias, layer, float(np.mean(areas)))
