"""What a student knows before it is finetuned, asked through the reader that runs use.

Three questions: does it prefer true captions (``matching``), does it answer without training, concept by
concept (``zero_shot``, ``entailment``), and which words do its places speak of (``fit_votes``)? Pictures
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
from tdlib.training.evaluation import predict

# Statements as examples


def _named(text: str, people: int) -> TextPart:
    """A text with references to the people that it names: person i by the i-th neutral name."""
    words = [word for word in re.finditer(r"\w+", text) if word[0] in NEUTRAL_NAMES[:people]]
    return TextPart(
        text, tuple(Reference(word.start(), word.end(), (NEUTRAL_NAMES.index(word[0]),)) for word in words)
    )


def statement(example: Example, text: str) -> Example:
    """An example that says one thing about a picture, as a question with a choice or as a statement."""
    people = example.names.count("person")
    asked, told = two_parts(text)
    choices = (_named(told, people),) if told else ()
    return replace(example, prompt=_named(asked, people), choices=choices)


def curated_pictures(folder: Path, seed: int, number: int) -> list[Example]:
    """Curated scenes as examples without words, with the objects that VCR would list."""
    found = []
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
        found.append(Example(f"curated-{index}", path, boxes, names, TextPart(""), (), None, ""))
    return found


@torch.inference_mode()
def scores(student: Any, encoder: StudentEncoder, examples: Sequence[Example]) -> Tensor:
    """The one logit of each example of one statement: (examples,)."""
    dataset = EncodedExamples(examples, encoder)
    student.eval()
    device = next(student.parameters()).device
    order = sorted(range(len(dataset)), key=lambda index: dataset[index]["input_ids"].shape[1])
    found = torch.zeros(len(dataset))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        inputs = student_inputs(student, collate([dataset[index] for index in chosen], encoder))
        logits = student(**{name: value.to(device) for name, value in inputs.items()}).logits
        found[chosen] = logits[:, 0].float().cpu()
    return found


# Matching


def matching(
    student: Any, encoder: StudentEncoder, scenes: int = 512, seed: int = 500, bare: bool = False
) -> dict[str, float]:
    """Held-out image-text matching on curated scenes that no student saw (chance 0.5).

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
            found = {}
            for name, chosen in said.items():
                examples = [statement(p, text) for p, text in zip(shown, chosen, strict=True)]
                encoder.prepare(examples)
                found[name] = scores(student, encoder, examples)
            for name in ("matching", "matching_hard"):
                figures[name + view] = float((found["own"] > found[name]).float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


# Zero-shot, concept by concept

KNOWLEDGE = ["id", "family", "concepts", "known", "style", "style_known", "hit"]


def _knowledge(folder: Path, split: str, ids: Sequence[str], hits: Sequence[bool]) -> pd.DataFrame:
    """What the data say of examples, and whether each was answered right; see ``KNOWLEDGE``."""
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
    """Each question of a MiniWorld's VCR split: is the student right without training (chance 0.25)?

    Columns ``KNOWLEDGE``: ``concepts`` of the right answer, ``known`` to the curated corpus or not (None:
    it names none), the picture's style and whether that corpus has it, and ``hit``.
    """
    examples = list(VcrReader(world, split).read())
    encoder.prepare(examples)
    chosen = predict(student, EncodedExamples(examples, encoder)).argmax(1)
    hits = chosen == np.array([example.label for example in examples])
    return _knowledge(world, split, [example.id for example in examples], hits)


def entailment(
    student: Any, encoder: StudentEncoder, world: Path, split: str = "dev_balanced"
) -> pd.DataFrame:
    """Each hypothesis of a MiniWorld's SNLI-VE split: does it match a picture that entails it better than
    one that contradicts it (chance 0.5)?

    The generator writes every hypothesis three times, once with each label, one after the other. Columns
    as in ``zero_shot``, the picture being the entailing one.
    """
    examples = list(SnliVeReader(world, split).read())
    encoder.prepare(examples)
    found = scores(student, encoder, examples)
    entails, contradicts = LABELS.index("entailment"), LABELS.index("contradiction")
    ids, hits = [], []
    for start in range(0, len(examples), 3):
        place = {example.label: start + i for i, example in enumerate(examples[start : start + 3])}
        ids.append(examples[place[entails]].id)
        hits.append(bool(found[place[entails]] > found[place[contradicts]]))
    return _knowledge(world, split, ids, hits)


def by_knowledge(table: pd.DataFrame) -> dict[str, float]:
    """Share of hits in all, and where all that is named is known and where not.

    ``_known_in_known_style``: known, and drawn in the one style of the curated corpus.
    """
    known, unknown = ((table["known"].map(lambda value, k=k: value is k)) for k in (True, False))
    strata = {
        "": table["hit"].notna(), "_known": known, "_unknown": unknown,
        "_known_in_known_style": known & table["style_known"].astype(bool),
    }  # fmt: skip
    return {name: round(float(table["hit"][rows].mean()), 3) for name, rows in strata.items() if rows.any()}


def by_concept(table: pd.DataFrame) -> pd.DataFrame:
    """Share of hits by concept: columns concept, known, hit, n; an example with two counts for both."""
    rows = table.explode("concepts").dropna(subset=["concepts"]).rename(columns={"concepts": "concept"})
    alone = rows.assign(known=rows["known"].astype(bool))
    found = alone.groupby("concept", sort=False).agg(
        known=("known", "any"), hit=("hit", "mean"), n=("hit", "size")
    )
    return found.reset_index()


# Words that places speak of

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
        """Log-odds (..., words) that the picture's captions say a word, by each place (..., student_dim)."""
        return states @ self.weight + self.bias


@torch.no_grad()
def places(
    student: Any, encoder: StudentEncoder, examples: Sequence[Example], layer: int
) -> tuple[Tensor, Tensor]:
    """Hidden states (examples, places, dim) of the places of pictures without words, and their boxes.

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
    """Words that the captions of 3 to 35 % of the scenes say, and which scene says which: (scenes, words).

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
    """Boxes (places, 4), words and their probabilities (places, words), by example; for ``plot_votes``."""
    states, boxes = places(student, encoder, examples, votes.layer)
    shares = votes(states).sigmoid().numpy()
    return [(box, votes.words, share) for box, share in zip(boxes.numpy(), shares, strict=True)]


def _fit(
    words: list[str], said: Tensor, embeddings: Tensor, states: Tensor, real: Tensor, layer: int, steps: int
) -> Votes:
    """The readout; the last quarter of the pictures is held out."""
    mean, spread = states[real].mean(0), states[real].std(0) + 1e-6
    states = (states - mean) / spread
    fitted = len(states) * 3 // 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        turn = (0.01 * torch.randn(states.shape[-1], embeddings.shape[1])).requires_grad_()
    offset = torch.logit(said[:fitted].mean(0).clamp(0.01, 0.99)).requires_grad_()

    def votes(rows: Any) -> Tensor:
        found = states[rows] @ (turn @ embeddings.T) + offset
        return found.masked_fill(~real[rows][..., None], -1e4).amax(1)

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
    asked = np.flatnonzero(there.any(0) & ~there.all(0))
    areas = [roc_auc(guessed[:, word], there[:, word]) for word in asked]
    return Votes(words, weight, bias, layer, float(np.mean(areas)))
