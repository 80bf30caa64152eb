"""Pretrains mini students: their batches, their losses, and the order in which they learn.

Training has four phases.

- "text": masked words of web texts, so that the student knows the language as widely as BERT does.
- "words": every region or patch votes for the words of the picture's captions, by its product with the
  words' embeddings (tied). So visual and word states lie near each other before they are mixed (align before
  fuse, Li et al. 2021). The surest vote counts (multiple-instance learning, Fang et al. 2015).
- "contrast": pictures and captions find each other in the batch (Radford et al. 2021); the votes continue.
- "fusion": text and picture together. Image-text matching, often against captions that are false in one
  point (the generator writes them; ALBEF mines them); masked words given the picture; and the truth of
  every word (ELECTRA, Clark et al. 2020, but given the picture), read one layer below the top, whose states
  [CLS] reads in the last layer.

The pictures show only concepts of the curated corpus, in its one style, most of them distorted in tones and
edges; only texts of the first phase have all concepts.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from tdlib.make import corpus
from tdlib.make.kinds import KINDS, read
from tdlib.make.loop import mixed_precision
from tdlib.miniworld.writers import VERSION

PHASES = (("text", 0.06), ("words", 0.14), ("contrast", 0.16), ("fusion", 0.64))
# Pictures, or texts, of a step. Small: on a processor more steps are worth more than larger ones.
BATCH = {"text": 64, "words": 64, "contrast": 96, "fusion": 48}
PAIRS = 28  # pictures of a fusion step with a true and a false caption; the rest have masked words
HARD = 0.7  # final share of the false captions that are false in one point only
_SORTED = 8  # batches whose texts are sorted by length together, so that little is padding


class Heads(nn.Module):
    """Heads that only pretraining needs.

    ``transform`` maps a hidden state to the embedding of a masked word, ``truth`` to the log-odds that a word
    is false, ``votes`` (of the middle and the last layer) to the embeddings of words that a place shows;
    ``picture`` and ``caption`` map to the space in which the two are compared.
    """

    def __init__(self, config: Any, words: int):
        super().__init__()
        width = config.hidden_size
        self.transform = BertPredictionHeadTransform(config)
        self.truth = nn.Linear(width, 1)
        self.votes = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.offsets = nn.ParameterList(nn.Parameter(torch.full((words,), -2.0)) for _ in range(2))
        self.picture, self.caption = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def matching_loss(logits: Tensor) -> Tensor:
    """Adds binary cross-entropy of each statement and cross-entropy between a picture's two, nats.

    ``logits`` (pictures, 2): of the true caption and of the false one. Runs compare choices of one picture,
    as the second term does; the first makes logits comparable between pictures.
    """
    true = torch.tensor([1.0, 0.0]).expand_as(logits)
    first = torch.zeros(len(logits), dtype=torch.long)
    return F.binary_cross_entropy_with_logits(logits, true) + F.cross_entropy(logits, first)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Averages the cross-entropies of both directions, nats (Radford et al. 2021, figure 3).

    ``images`` and ``texts`` (batch, dim) need not be normalised; row i of both belongs together;
    ``scale`` multiplies cosines.
    """
    logits = scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class StudentJob:
    """Pretraining of one mini student; see the module.

    Args:
        kind: a key of ``KINDS``.
        home: where the corpora lie, and are made where they are missing.
        detector: folder of the detector behind region features.
        scenes: of both corpora.
        seed: of the corpora and of all random numbers.
        batch: pictures or texts per step, by phase.
        pairs: pictures of a "fusion" step with a true and a false caption.
        device: "cpu" or "cuda".
    """

    phases: ClassVar = PHASES

    def __init__(
        self, kind: str, home: Path, detector: Path, scenes: int = 48_000, seed: int = 0,
        batch: dict[str, int] | None = None, pairs: int = PAIRS, device: str = "cpu",
    ):  # fmt: skip
        self.kind, self.seed, self.scenes, self.pairs = KINDS[kind], seed, scenes, pairs
        self.batch, self.device = batch or BATCH, device
        self.curated = corpus.texts("curated", home, seed, scenes)
        self.web = corpus.texts("web", home, seed, scenes)
        self.sight = self.kind.sight(home, seed, scenes, detector)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.curated.tokenizer)
        self.pad, self.mask = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.separator = tokenizer.sep_token_id
        self.special = np.array(tokenizer.all_special_ids)
        torch.manual_seed(seed)
        self.model = self.kind.make(len(tokenizer), getattr(self.sight, "dim", 0))
        self.model.config.pad_token_id = tokenizer.pad_token_id
        self.model.config.cls_token_id = tokenizer.cls_token_id
        readings = self.curated.ids.shape[1] // 2
        said = corpus.said_words(self.curated.ids[:, :readings], len(tokenizer))
        share = said[:10_000].mean(0)
        self.asked = self.put(((share > 0.005) & (share < 0.35)).nonzero()[0])
        self.said = self.put(said)
        self.heads = Heads(self.model.config, len(self.asked))
        self.module = nn.ModuleDict({"model": self.model, "heads": self.heads}).to(device)
        self.settings = {
            "kind": kind, "world": VERSION, "scenes": scenes, "seed": seed, "batch": self.batch,
            "pairs": pairs, "hard_negatives": HARD, "tokenizer": self.curated.digest, "phases": self.phases,
            **self.sight.settings,
        }  # fmt: skip
        # "matched": running share of right answers; "hardened": fusion steps since it left its plateau.
        self.memory: dict[str, Any] = {"matched": 0.5, "hardened": 0}
        self._group: tuple[Any, list[tuple[np.ndarray, np.ndarray]]] = (None, [])

    # Batches

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def look(
        self, rows: np.ndarray, rng: np.random.Generator, progress: float
    ) -> tuple[dict[str, Tensor], np.ndarray]:
        """Gives the visual input of pictures, and the number of their objects that are people (pictures,)."""
        visual = self.sight(rows, rng, progress)
        people = self.sight.people(rows, visual).numpy()
        if "region_boxes" in visual:
            visual["region_boxes"] = self.kind.boxes(visual["region_boxes"])
        return {name: value.to(self.device) for name, value in visual.items()}, people

    def rows(self, phase: str, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the scenes of a batch and the caption of each; a batch has texts of like length."""
        group, member = divmod(place, _SORTED)
        if self._group[0] != (phase, group):
            size, number = self.batch[phase], [name for name, _ in self.phases].index(phase)
            large = min(size * _SORTED, self.scenes // size * size)
            rows = corpus.batch_at(self.scenes, large, 1000 * self.seed + number, group)
            rng = np.random.default_rng([self.seed, number, group])
            ids = self.web.ids if phase == "text" else self.curated.ids
            readings = ids.shape[1] if phase == "text" else ids.shape[1] // 2
            reading = rng.integers(readings, size=len(rows))
            lengths = (ids[rows, reading] != self.pad).sum(1)
            if phase == "fusion":
                lengths = np.maximum(lengths, (ids[rows, reading + readings] != self.pad).sum(1))
            order = lengths.argsort(kind="stable").reshape(-1, size)
            mixed = [rng.permutation(part) for part in rng.permutation(order)]
            self._group = (phase, group), [(rows[part], reading[part]) for part in mixed]
        parts = self._group[1]
        return parts[member % len(parts)]

    def text(self, ids: np.ndarray, objects: np.ndarray | None = None) -> dict[str, Tensor]:
        """Makes text inputs of statements (pictures, choices, tokens) ``as_read``, cut to the longest."""
        longest = int((ids != self.pad).sum(-1).max())
        ids = ids[..., :longest]
        real, ends = ids != self.pad, ids == self.separator
        behind = (ends.cumsum(-1) - ends >= 1) & real  # the first separator
        named = np.full(ids.shape, -1) if objects is None else objects[..., :longest]
        return {
            "input_ids": self.put(ids), "attention_mask": self.put(real).long(),
            "token_type_ids": self.put(behind).long() * self.kind.answer_type,
            "objects": self.put(named.astype(np.int64)),
        }  # fmt: skip

    def as_read(self, ids: np.ndarray) -> np.ndarray:
        """Converts ids (..., tokens) to those of the student's encoder.

        VL-BERT's and VisualBERT's append [MASK] [SEP] to a statement of one part, a place for an answer.
        """
        ids = ids.astype(np.int64)
        if self.kind.slot:
            alone = (ids == self.separator).sum(-1) == 1
            rows = ids[alone]
            ends = np.minimum((rows != self.pad).sum(-1) - 1, ids.shape[-1] - 3)
            for behind, token in enumerate((self.separator, self.mask, self.separator)):
                rows[np.arange(len(rows)), ends + behind] = token
            rows[np.arange(rows.shape[-1]) > ends[:, None] + 2] = self.pad
            ids[alone] = rows
        return ids

    def masked(self, ids: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """Puts [MASK] at random places; labels are the ids there, -100 elsewhere (Devlin et al. 2019)."""
        chosen = (rng.random(ids.shape) < share) & ~np.isin(ids, self.special)
        return np.where(chosen, self.mask, ids), self.put(np.where(chosen, ids, -100))

    # Losses

    def loss(self, phase: str, place: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        number = [name for name, _ in self.phases].index(phase)
        rng = np.random.default_rng([self.seed, number, place, 1])
        rows, reading = self.rows(phase, place)
        with mixed_precision(self.device), torch.device(self.device):
            if phase == "text":
                return self.text_loss(rows, reading, rng)
            if phase == "fusion":
                return self.fusion_loss(rows, reading, place, progress, rng)
            return self.aligned_loss(rows, reading, phase == "contrast", progress, rng)

    def word_loss(self, state: Tensor, labels: Tensor) -> Tensor:
        """Computes the cross-entropy of masked words, nats; scores are products with the words' embeddings.

        ``state`` (texts, tokens, width), text first; ``labels`` (texts, tokens), -100 where none is masked.
        """
        longest = min(state.shape[1], labels.shape[1])  # labels run on over padding, states over the picture
        state, labels = state[:, :longest], labels[:, :longest]
        asked = labels != -100
        guesses = self.heads.transform(state[asked]) @ self.model.get_input_embeddings().weight.T
        total = F.cross_entropy(guesses.float(), labels[asked], reduction="sum")
        return total / max(1, len(guesses))

    def text_loss(self, rows: np.ndarray, reading: np.ndarray, rng: np.random.Generator) -> Any:
        ids, labels = self.masked(self.as_read(self.web.ids[rows, reading]), 0.15, rng)
        text = self.text(ids[:, None])
        states = read(self.model, text, None).hidden_states
        assert states is not None
        loss = self.word_loss(states[-1][:, 0], labels)
        return loss, {"masked": loss.detach()}

    def aligned_loss(
        self, rows: np.ndarray, reading: np.ndarray, contrast: bool, progress: float,
        rng: np.random.Generator,
    ) -> Any:  # fmt: skip
        """Computes the loss of votes for words and, with ``contrast``, that of retrieval in the batch."""
        visual, _ = self.look(rows, rng, progress)
        states = read(self.model, None, visual).hidden_states
        assert states is not None
        real = visual["region_mask"].bool() if "region_mask" in visual else None
        table = self.model.get_input_embeddings().weight[self.asked]
        present = self.said[self.put(rows)][:, self.asked].float()
        losses, places = [], torch.empty(0)
        layers = len(states) // 2, -1
        for layer, vote, offset in zip(layers, self.heads.votes, self.heads.offsets, strict=True):
            places = states[layer][:, 0, 1 + self.sight.summary :]  # behind [CLS]
            scores = vote(places) @ table.T
            if real is not None:
                scores = scores.masked_fill(~real[..., None], -1e4)
            logits = scores.amax(1).float() + offset
            losses.append(F.binary_cross_entropy_with_logits(logits, present))
        loss = torch.stack(losses).sum()
        figures = {"votes": loss.detach()}
        loss = 10 * loss
        if contrast:
            weights = torch.ones(places.shape[:2]) if real is None else real.float()
            image = (places * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
            output = read(self.model, self.text(self.as_read(self.curated.ids[rows, reading])[:, None]), None)
            assert output.hidden_states is not None
            caption = output.hidden_states[-1][:, 0, 0]
            scale = self.heads.scale.exp().clamp(max=100)
            retrieval = contrastive_loss(self.heads.picture(image), self.heads.caption(caption), scale)
            figures["contrast"] = retrieval.detach()
            loss = loss + retrieval
        return loss, figures

    def fusion_loss(
        self, rows: np.ndarray, reading: np.ndarray, place: int, progress: float, rng: np.random.Generator
    ) -> Any:
        ids, named, replaced = self.curated.ids, self.curated.named, self.curated.replaced
        assert named is not None and replaced is not None
        pairs, readings = slice(self.pairs), ids.shape[1] // 2

        # A true and a false caption of each picture
        scenes, told = rows[pairs], reading[pairs]
        share = HARD * min(1.0, self.memory["hardened"] / 200)
        false = rng.random(len(scenes)) < share
        other, other_told = np.roll(scenes, 1), rng.integers(readings, size=len(scenes))
        wrong = np.where(false, scenes, other), np.where(false, told + readings, other_told)
        both = self.as_read(np.stack([ids[scenes, told], ids[wrong]], axis=1))
        visual, people = self.look(scenes, rng, progress)
        objects = np.stack([named[scenes, told], named[wrong]], axis=1)
        text = self.text(both, np.where(objects < people[:, None, None], objects, -1))
        output = read(self.model, text, visual)
        assert output.logits is not None and output.hidden_states is not None
        longest = text["input_ids"].shape[-1]
        logits, real = output.logits.float(), text["attention_mask"].bool()
        # A word of another picture's caption is false if none of the picture's own captions has it.
        unsaid = ~self.said[self.put(scenes)].gather(1, text["input_ids"][:, 1])
        changed = (replaced[wrong] & (both[:, 1] == ids[wrong]))[:, :longest]
        held = torch.zeros_like(real)
        held[:, 1] = torch.where(self.put(false)[:, None], self.put(changed), unsaid)
        judged = real & (text["input_ids"] != self.mask)
        truths = self.heads.truth(output.hidden_states[-2][:, :, :longest][judged])[:, 0].float()
        truth = F.binary_cross_entropy_with_logits(truths, held[judged].float())
        matched = matching_loss(logits)

        # Masked words of true captions
        scenes, told = rows[self.pairs :], reading[self.pairs :]
        masked_ids, labels = self.masked(self.as_read(ids[scenes, told]), 0.2, rng)
        visual, people = self.look(scenes, rng, progress)
        objects = named[scenes, told]
        text = self.text(masked_ids[:, None], np.where(objects < people[:, None], objects, -1)[:, None])
        states = read(self.model, text, visual).hidden_states
        assert states is not None
        masked = self.word_loss(states[-1][:, 0], labels)

        loss = matched + masked + 4 * truth
        first = logits.detach()[:, 0] > logits.detach()[:, 1]
        figures = {
            "masked": masked.detach(), "truth": truth.detach(), "matching": matched.detach(),
            "plain": first[self.put(~false)].float().mean(),
            "hard": first[self.put(false)].float().mean(),
        }  # fmt: skip
        self.memory["matched"] = 0.96 * self.memory["matched"] + 0.04 * float(first.float().mean())
        if self.memory["hardened"] or self.memory["matched"] > 0.7:
            self.memory["hardened"] += 1
        if place % 6 == 0:  # so that the student does not forget what it learned in the earlier phases
            kept, also = self.aligned_loss(rows, reading, True, progress, rng)
            loss, figures = loss + kept, figures | also
        return loss, figures
