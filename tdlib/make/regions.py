"""How the committed mini UNITER, VL-BERT and VisualBERT were made: on the curated corpus, as the mini ViLT.

Their regions are those of the mini detector, which stays as it is. Run ``python -m
tdlib.make.regions uniter`` (or ``vl-bert``, ``visual-bert``) after ``pretraining_detector``; it
writes weights with parameters, seed, checksum and held-out figures beside them.
"""

import argparse
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, VisualBertConfig
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from tdlib.core.files import file_digest, write_json
from tdlib.core.paths import ROOT
from tdlib.data.examples import Reference, TextPart
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.make.detector import ATTRIBUTES, boxes_corpus
from tdlib.make.pretraining import (
    HAS_BFLOAT16,
    batches,
    learning_rate,
    make_optimizer,
    mask_words,
    mixed_precision,
    note_figures,
    replaced_words,
    train_wordpiece_tokenizer,
)
from tdlib.miniworld.drawing import SIZE
from tdlib.miniworld.writers import VERSION, captioned_scene, false_caption
from tdlib.regions.backbones import MiniDetector, load_detector
from tdlib.regions.computed import grid_boxes
from tdlib.students.base import StudentOutput, referred_objects
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice, load_uniter
from tdlib.students.visual_bert import VisualBertForMultipleChoice, load_visual_bert
from tdlib.students.vlbert import (
    CLASSIFIER,
    VlBertConfig,
    VlBertForMultipleChoice,
    load_vlbert,
    within_pixels,
)

log = logging.getLogger("tdlib.make.regions")

GRID = (6, 6)
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


# What is seen


@dataclass(frozen=True)
class SeenPictures:
    """Regions of many pictures: the whole picture, its objects, the cells of a grid.

    ``features`` (pictures, regions, dim) in half precision; ``boxes`` (pictures, regions, 4) xyxy
    normalised to the picture; ``objects`` (pictures, regions) the index of the object that a region is,
    or -1; ``mask`` (pictures, regions) true on real regions: a picture with few objects has gaps.
    ``people`` (pictures,) how many of the objects, the first ones, are people.
    """

    features: Tensor
    boxes: Tensor
    objects: Tensor
    mask: Tensor
    people: Tensor

    def inputs(self, index: Tensor, bare: Tensor) -> dict[str, Tensor]:
        """What region students read of the pictures ``index``; of those that are ``bare``, no objects."""
        objects = self.objects[index]
        hidden = (objects >= 0) & bare[:, None]
        return {
            "region_features": self.features[index].float(),
            "region_boxes": self.boxes[index],
            "region_mask": (self.mask[index] & ~hidden).long(),
            "region_objects": objects.masked_fill(hidden, -1),
        }


def object_boxes(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of the pictures of ``boxes_corpus`` that VCR lists: people first, then things.

    Returns:
        Boxes (pictures, objects, 4), which of them are real (pictures, objects), and the number of
        people (pictures,).
    """
    names = labels[..., list(ATTRIBUTES).index("name")]  # "person" is 0; faces and hats have none
    real = names >= 0
    order = torch.where(real, names, len(ATTRIBUTES["name"])).argsort(dim=1, stable=True)
    order = order[:, : int(real.sum(1).max())]
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), real.gather(1, order), (names == 0).sum(1)


@torch.no_grad()
def see_scenes(detector: MiniDetector, seed: int, number: int, batch: int = 64) -> SeenPictures:
    """The regions that ``BackboneRegions`` gives with "boxes+grid", of the first curated scenes.

    Args:
        detector: in eval mode.
        seed: of the corpus.
        number: of scenes.
        batch: pictures that the detector sees at a time.
    """
    pictures, found, labels = boxes_corpus(seed, number, detector.size)
    found, real, people = object_boxes(found, labels)
    cells, most = grid_boxes(*GRID), real.shape[1]
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    boxes = torch.cat([whole.expand(number, 1, 4), found, cells.expand(number, -1, 4)], dim=1)
    mask = torch.cat([real.new_ones(number, 1), real, real.new_ones(number, len(cells))], dim=1)
    objects = torch.full(mask.shape, -1)
    objects[:, 1 : 1 + most] = torch.arange(most).where(real, -1)
    features = torch.zeros(*mask.shape, detector.dim, dtype=torch.half)
    for start in range(0, number, batch):
        rows = slice(start, start + batch)
        shown = [places[there] for places, there in zip(boxes[rows], mask[rows], strict=True)]
        features[rows][mask[rows]] = detector(pictures[rows], shown).half()
    return SeenPictures(features, boxes, objects, mask, people)


# What is said


@dataclass(frozen=True)
class SpokenTexts:
    """Captions of many scenes: per scene ``readings`` true ones, then as many false ones.

    ``ids`` (texts, tokens); ``lengths`` (texts,) of the texts with [CLS] and [SEP]; ``objects`` (texts,
    tokens) which object a token names if the picture shows it, else -1; ``replaced`` (texts, tokens)
    whether a token of a false caption is not in its true one.
    """

    ids: Tensor
    lengths: Tensor
    objects: Tensor
    replaced: Tensor


def named_people(text: str) -> TextPart:
    """A caption with references to the people that it names.

    Captions call person i by the i-th neutral name, as VCR's texts do, where people are the first objects.
    """
    found = re.finditer(r"\w+", text)
    return TextPart(
        text,
        tuple(
            Reference(word.start(), word.end(), (NEUTRAL_NAMES.index(word[0]),))
            for word in found
            if word[0] in NEUTRAL_NAMES
        ),
    )


def caption_texts(seed: int, number: int, readings: int) -> list[str]:
    """True captions of each curated scene, then its false ones: (number * 2 * readings) texts."""
    return [
        text
        for index in range(number)
        for text in (
            *(captioned_scene("curated", seed, index, reading)[1] for reading in range(readings)),
            *(false_caption(seed, index, reading) for reading in range(readings)),
        )
    ]


def read_captions(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], readings: int, longest: int
) -> SpokenTexts:
    """Tokenizes what ``caption_texts`` gives; ``longest`` is where texts are cut, in tokens."""
    encoded = tokenizer(
        texts, padding=True, truncation=True, max_length=longest, return_tensors="pt",
        return_offsets_mapping=True,
    )  # fmt: skip
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    real = ids != tokenizer.pad_token_id
    replaced = replaced_words(ids.view(-1, 2, readings, ids.shape[1])).view(ids.shape) & real
    objects = referred_objects([named_people(text) for text in texts], spans)
    return SpokenTexts(ids, real.sum(1), objects, replaced)


def text_inputs(
    ids: Tensor, objects: Tensor, people: Tensor, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Tensor]:
    """What students read of captions (batch, tokens), each with how many people its picture shows."""
    return {
        "input_ids": ids[:, None],
        "attention_mask": (ids != tokenizer.pad_token_id).long()[:, None],
        "token_type_ids": torch.zeros_like(ids)[:, None],
        "objects": objects.masked_fill(objects >= people[:, None], -1)[:, None],
    }


def choose_captions(
    index: Tensor, share: float, readings: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A caption for each picture of a batch, half of them not its own.

    Args:
        index: (batch,), scenes.
        share: of the captions that do not match, how many are the picture's own with one thing changed;
            the rest belong to the picture before in the batch.
        readings: true captions per scene.
        generator: of random numbers.

    Returns:
        Row of ``SpokenTexts``, whether the caption is true of the picture, and whether it is its own
        with one thing changed: each (batch,).
    """
    match = torch.rand(len(index), generator=generator) < 0.5
    false = ~match & (torch.rand(len(index), generator=generator) < share)
    scene = torch.where(match | false, index, torch.roll(index, 1))
    reading = torch.randint(readings, (len(index),), generator=generator)
    return scene * 2 * readings + false * readings + reading, match, false


# What is learned


class CaptionHeads(nn.Module):
    """Heads of pretraining: which word is masked, and whether each word is true of the picture.

    A word's score is the product with its own embedding. Truth is read one layer below the last: it
    is what [CLS] reads there.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.truth = nn.Linear(config.hidden_size, 1)

    def forward(
        self, states: tuple[Tensor, ...], asked: Tensor, judged: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of words (asked tokens, vocabulary), and log-odds that words are false (judged tokens,).

        Args:
            states: hidden states, each (batch, tokens, width), text first.
            asked: (batch, text_tokens), where words are guessed.
            judged: (batch, text_tokens), where they are judged.
            words: (vocabulary, width), embeddings.
        """
        length = asked.shape[1]
        guesses = self.transform(states[-1][:, :length][asked]) @ words.T
        return guesses, self.truth(states[-2][:, :length][judged])[:, 0]


def caption_losses(
    output: StudentOutput, heads: CaptionHeads, table: Tensor, labels: Tensor, replaced: Tensor,
    read: Tensor, match: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Losses of one batch, nats: "words", "truth", "matching"; and "matched", the share of right answers.

    Args:
        output: of a student that read one caption per picture (choices = 1).
        heads: of pretraining.
        table: (vocabulary, width), embeddings of words.
        labels: (batch, text_tokens), ids of masked words, -100 elsewhere; asked of true captions only.
        replaced: (batch, text_tokens), whether a word is false of the picture.
        read: (batch, text_tokens), true on real tokens.
        match: (batch,), see ``choose_captions``.
    """
    assert output.hidden_states is not None and output.logits is not None
    asked = (labels != -100) & match[:, None]
    guesses, truths = heads(tuple(state[:, 0] for state in output.hidden_states[-2:]), asked, read, table)
    logits, held = output.logits[:, 0].float(), replaced[read].float()
    words = F.cross_entropy(guesses.float(), labels[asked], reduction="sum")
    truth = F.binary_cross_entropy_with_logits(truths.float(), held, reduction="sum")
    return {
        "words": words / max(1, len(guesses)),
        "truth": truth / max(1, len(truths)),
        "matching": F.binary_cross_entropy_with_logits(logits, match.float()),
        "matched": ((logits.detach() > 0) == match).float().mean(),
    }


@dataclass(frozen=True)
class Kind:
    """How a mini student of one architecture is made, and what it is called."""

    folder: str
    make: Callable[[int, int], Any]  # of the width of regions and the size of the vocabulary
    load: Callable[[str], Any]
    types: str  # its embeddings of token types
    met: tuple[int, ...]  # per token type the one whose embedding it gets: captions only have type 0
    transform: str = ""  # where a classifier starts from the transform of the word predictor
    arrange: Callable[[SeenPictures], SeenPictures] = lambda seen: seen  # as its encoder's method


KINDS = {
    "uniter": Kind(
        "mini-uniter",
        lambda dim, words: UniterForMultipleChoice(
            UniterConfig(**SIZES, vocab_size=words, img_dim=dim, type_vocab_size=4)
        ),
        load_uniter,
        "uniter.embeddings.token_type_embeddings.weight",
        (0, 1, 0, 0),  # 1 is that of regions
    ),
    "vl-bert": Kind(
        "mini-vlbert",
        lambda dim, words: VlBertForMultipleChoice(
            VlBertConfig(**SIZES, vocab_size=words, visual_embedding_dim=dim)
        ),
        load_vlbert,
        "vlbert.token_type_embeddings.weight",
        (0, 0, 2),  # 2 is that of regions
        CLASSIFIER,
        lambda seen: replace(seen, boxes=within_pixels(seen.boxes, (SIZE, SIZE))),
    ),
    "visual-bert": Kind(
        "mini-visualbert",
        lambda dim, words: VisualBertForMultipleChoice(
            VisualBertConfig(**SIZES, vocab_size=words, visual_embedding_dim=dim)
        ),
        load_visual_bert,
        "visual_bert.embeddings.token_type_embeddings.weight",
        (0, 0),
    ),
}


def write_weights(kind: Kind, model: Any, heads: CaptionHeads, folder: Path) -> None:
    """Writes weights, in half precision, and configuration.

    Token types that captions do not have become copies of type 0, as at the start of the authors'
    finetuning on VCR (see ``convert_uniter`` and ``convert_vlbert``).
    """
    weights = dict(model.state_dict())
    weights[kind.types] = weights[kind.types][list(kind.met)]
    if kind.transform:
        weights |= {f"{kind.transform}{name}": value for name, value in heads.transform.state_dict().items()}
    model.config.save_pretrained(folder)
    halves = {name: value.half().contiguous() for name, value in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def pretrain_region_student(
    kind: str,
    folder: Path,
    detector: Path,
    scenes: int = 24_000,
    steps: int = 2_000,
    batch: int = 128,
    peak: float = 1e-3,
    seed: int = 0,
    readings: int = 3,
    hard: float = 0.6,
    bare: float = 0.5,
    vocabulary_texts: int = 6_000,
) -> dict[str, list[float]]:
    """Trains a mini region student on the curated corpus and writes its folder.

    As ``pretrain_student`` in its second part: masked words given the regions, and image-text matching
    (Chen et al. 2020, section 3.2), with negatives that differ in one thing only once matching has left
    its plateau, and with the truth of every word beside it, also of those of other pictures' captions (a
    word is taken to be false that none of the picture's own captions has): without the latter matching
    stayed on its plateau of 0.693 for the 1,350 steps that were tried. What a picture shows need not be
    learned first: the detector, which is not trained, knows it. The matching head is kept as the
    multiple-choice head (UNITER's has two logits; their difference is trained). VL-BERT's word
    predictor is kept too, as its classifiers start from it. The vocabulary is made from web texts, as
    BERT's is; the weights see the curated corpus only.

    Regions are computed once and kept in half precision: with 24,000 scenes, 43 regions of width 128,
    264 MB, after 0.7 GB of pictures. Where a caption names a person, its token refers to the person's
    box (VL-BERT and VisualBERT read that); other words refer to nothing.

    Args:
        kind: a key of ``KINDS``.
        folder: where to write.
        detector: folder of a mini detector.
        scenes: of the curated corpus.
        steps: updates.
        batch: pictures per update, each with one caption.
        peak: learning rate.
        seed: of the corpus and of all random numbers.
        readings: true captions per scene.
        hard: share of the captions that do not match that in the end differ in one thing only.
        bare: how often a picture is shown without the boxes of its objects, as those of SNLI-VE and VQA.
        vocabulary_texts: web texts that the vocabulary is made from.

    Returns:
        The losses of every step, see ``caption_losses``.
    """
    torch.manual_seed(seed)
    started, made = time.time(), KINDS[kind]
    web_texts = [captioned_scene("web", seed + 1, index)[1] for index in range(vocabulary_texts)]
    tokenizer = train_wordpiece_tokenizer(web_texts)
    seen = made.arrange(see_scenes(load_detector(detector), seed, scenes))
    log.info("regions: %s in %.0f s", tuple(seen.features.shape), time.time() - started)
    model = made.make(seen.features.shape[-1], len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if HAS_BFLOAT16:
        model.set_attn_implementation("eager")  # on the CPU a third faster than the fused one's backward
    longest = model.config.max_position_embeddings - 2  # VL-BERT has two more places behind a text
    texts = read_captions(tokenizer, caption_texts(seed, scenes, readings), readings, longest)
    log.info("captions: %s in %.0f s", tuple(texts.ids.shape), time.time() - started)
    true = texts.ids.view(scenes, 2, -1)[:, 0]
    said_of = torch.zeros(scenes, len(tokenizer), dtype=torch.bool).scatter_(1, true, True)
    heads = CaptionHeads(model.config)
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    both = nn.ModuleList([model, heads])
    optimizer = make_optimizer(both, 0.05)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    history: dict[str, list[float]] = {"words": [], "truth": [], "matching": [], "matched": []}
    hardened = 0  # steps since matching left its plateau
    for step, index in enumerate(batches(scenes, batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 100)
        if hardened or np.mean(history["matched"][-50:] or 0) > 0.7:
            hardened += 1
        chosen, match, false = choose_captions(index, hard * min(1, hardened / 300), readings, generator)
        length = int(texts.lengths[chosen].max())
        ids = texts.ids[chosen, :length]
        other = ~(match | false)[:, None]  # another picture's: false is what no own caption says
        held = torch.where(other, ~said_of[index].gather(1, ids), texts.replaced[chosen, :length])
        words, labels = mask_words(ids, tokenizer, 0.15, generator)  # of both kinds: [MASK] must not tell
        shown = seen.inputs(index, torch.rand(len(index), generator=generator) < bare)
        said = text_inputs(words, texts.objects[chosen, :length], seen.people[index], tokenizer)
        inputs = {name: value for name, value in (shown | said).items() if name in model.inputs}
        with mixed_precision():
            output = model(**inputs, output_hidden_states=True)
            losses = caption_losses(
                output, heads, model.get_input_embeddings().weight, labels,
                held, words != tokenizer.pad_token_id, match,
            )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        (losses["words"] + losses["matching"] + 4 * losses["truth"]).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        for name, values in history.items():
            values.append(float(losses[name].detach()))
        if (step + 1) % 50 == 0:
            means = {name: round(float(np.mean(values[-50:])), 3) for name, values in history.items()}
            log.info("step %d %s (%.0f s)", step + 1, means, time.time() - started)
        if (step + 1) % 300 == 0 or step + 1 == steps:
            write_weights(made, model, heads, folder)
    write_json(folder / "provenance.json", {
        "made_by": "tdlib.make.regions.pretrain_region_student", "corpus": "curated",
        "world": VERSION, "detector": file_digest(detector / "model.safetensors"),
        "layout": "boxes+grid", "grid": GRID, "without_boxes": bare, "scenes": scenes,
        "readings": readings, "hard_negatives": hard, "steps": steps, "batch": batch,
        "peak_learning_rate": peak, "seed": seed, "minutes": round((time.time() - started) / 60, 1),
        "final": {name: round(float(np.mean(values[-50:])), 3) for name, values in history.items()},
        "torch": torch.__version__, "threads": torch.get_num_threads(), "bfloat16": HAS_BFLOAT16,
    })  # fmt: skip
    return history


@torch.inference_mode()
def evaluate_region_student(
    kind: str, folder: Path, detector: Path, scenes: int = 512, seed: int = 500
) -> dict[str, float]:
    """Held-out image-text matching on curated scenes that the student never saw (chance 0.5).

    ``matching``: the caption against that of another picture; ``matching_hard``: against one that
    differs in one thing. Each is the share of pairs in which the true one scores higher, with the
    boxes of the objects; with ``_bare``, without.
    """
    model = KINDS[kind].load(str(folder)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    longest = model.config.max_position_embeddings - 2
    seen = KINDS[kind].arrange(see_scenes(load_detector(detector), seed, scenes))
    texts = read_captions(tokenizer, caption_texts(seed, scenes, 1), 1, longest)
    own = 2 * torch.arange(scenes)
    others = {"matching": own.roll(-1), "matching_hard": own + 1}

    def scores(rows: Tensor, bare: bool) -> Tensor:
        found = []
        for index in torch.arange(scenes).split(64):
            said = text_inputs(
                texts.ids[rows[index]], texts.objects[rows[index]], seen.people[index], tokenizer
            )
            given = seen.inputs(index, torch.full(index.shape, bare)) | said
            inputs = {name: value for name, value in given.items() if name in model.inputs}
            found.append(model(**inputs).logits[:, 0])
        return torch.cat(found)

    figures = {}
    for ending, bare in (("", False), ("_bare", True)):
        true = scores(own, bare)
        for name, rows in others.items():
            figures[name + ending] = round(float((true > scores(rows, bare)).float().mean()), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where to write (default: data/models/mini-...)")
    parser.add_argument("--detector", type=Path, default=ROOT / "data/models/mini-detector")
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = {name: value for name in ("scenes", "steps") if (value := getattr(options, name))}
    folder = options.folder or ROOT / "data/models" / KINDS[options.kind].folder
    pretrain_region_student(options.kind, folder, options.detector, **given)
    note_figures(folder, evaluate_region_student(options.kind, folder, options.detector))


if __name__ == "__main__":
    main()
