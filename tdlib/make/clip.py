"""The maker of the mini teacher: a CLIP on the web corpus, which has all concepts and all styles.

Two phases. "words": the image tower alone learns to recognise the words of a picture's captions (CatLIP,
Mehta et al. 2024), each from the surest patch (multiple-instance learning, Fang et al. 2015). "contrast":
both towers learn CLIP's loss (Radford et al. 2021) with the words kept on, also read from the pooled
picture. Contrast alone taught so small a model places and weather, but nothing small: held things, moods
and hats stayed near chance. The words' head is dropped.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tdlib.core.files import refuse_foreign, write_folder, write_json
from tdlib.make import corpus
from tdlib.make.loop import mixed_precision, provenance, train
from tdlib.make.pretraining import contrastive_loss
from tdlib.miniworld.writers import VERSION
from tdlib.teacher.families import encode_text_ids

MINI_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": corpus.SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12,
    },
    "text_cfg": {
        "context_length": corpus.CLIP_LONGEST, "vocab_size": 0, "width": 128, "heads": 4, "layers": 3,
        "hf_tokenizer_name": "mini-clip",
    },
}  # fmt: skip
PHASES = (("words", 0.3), ("contrast", 0.7))
BATCH = {"words": 128, "contrast": 256}
CAPTIONS = 2  # of each picture in a step of "contrast": a caption costs a third of its picture
_SORTED = 4  # batches whose captions are sorted by length together


class BatchFirstAttention(nn.MultiheadAttention):
    """The attention of open_clip's blocks without the copies that torch's module makes in training.

    Torch turns (batch, tokens, width) round and copies query, key and value apart. On one CPU core a step of
    this image tower takes 0.73 times as long without (2.36 and 1.73 s for 256 pictures).
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Computes self-attention: all three are one tensor; a mask is causal (only text has one)."""
        assert query is key is value and not need_weights
        batch, tokens, width = query.shape
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = projected.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask is not None)
        return self.out_proj(read.transpose(1, 2).reshape(batch, tokens, width)), None


def fast_clip(config: dict[str, Any]) -> open_clip.CLIP:
    """Makes an open_clip model with ``BatchFirstAttention``; its parameters have their usual names."""
    model = open_clip.CLIP(**config)
    for part in model.modules():
        if isinstance(part, nn.MultiheadAttention):
            part.__class__ = BatchFirstAttention
    return model


def patch_words(visual: VisionTransformer, pixels: Tensor, word_head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Computes picture features (batch, dim), and log-odds of words (batch, words) from the surest patch."""
    output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
    votes = word_head(output["image_intermediates"][-1] @ visual.proj)
    return output["image_features"], votes.float().amax(dim=1)


class ClipJob:
    """Training of the mini CLIP; see the module, and ``pretraining.StudentJob`` for the arguments."""

    phases: ClassVar = PHASES

    def __init__(
        self, home: Path, scenes: int, seed: int = 0, batch: dict[str, int] | None = None, device: str = "cpu"
    ):
        self.seed, self.scenes, self.device, self.batch = seed, scenes, device, batch or BATCH
        self.texts = corpus.texts("clip", home, seed, scenes)
        self.pictures = corpus.pictures("web", home, seed, scenes)["pictures"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.texts.tokenizer)
        self.pad = tokenizer.pad_token_id
        self.config = json.loads(json.dumps(MINI_CLIP))
        self.config["text_cfg"]["vocab_size"] = len(tokenizer)
        torch.manual_seed(seed)
        self.model = fast_clip(self.config)
        said = corpus.said_words(self.texts.ids, len(tokenizer))
        share = said[:10_000].mean(0)
        asked = ((share > 0.01) & (share < 0.3)).nonzero()[0]  # mostly nouns; function words are frequent
        self.said = self.put(said[:, asked])
        self.head = nn.Linear(self.config["embed_dim"], len(asked))
        self.mean, self.spread = (
            torch.tensor(value, device=device).view(3, 1, 1) * 255
            for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.module = nn.ModuleDict({"model": self.model, "head": self.head}).to(device)
        self.settings = {
            "kind": "clip", "world": VERSION, "scenes": scenes, "seed": seed, "batch": self.batch,
            "tokenizer": self.texts.digest, "phases": self.phases,
        }  # fmt: skip
        self.memory: dict[str, Any] = {}

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def rows(self, phase: str, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the scenes of a batch and their captions: (batch,) and (batch, captions)."""
        number = [name for name, _ in self.phases].index(phase)
        group, member = divmod(place, _SORTED)
        size = self.batch[phase]
        large = min(size * _SORTED, self.scenes // size * size)
        rows = corpus.batch_at(self.scenes, large, 1000 * self.seed + number, group)
        rng = np.random.default_rng([self.seed, number, group])
        readings = self.texts.ids.shape[1]
        reading = rng.random((len(rows), readings)).argsort(1)[:, :CAPTIONS]
        lengths = (self.texts.ids[rows[:, None], reading] != self.pad).sum(-1).max(1)
        order = lengths.argsort(kind="stable").reshape(-1, size)
        part = order[rng.permutation(len(order))][member % len(order)]
        return rows[part], reading[part]

    def loss(self, phase: str, place: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        number = [name for name, _ in self.phases].index(phase)
        rng = np.random.default_rng([self.seed, number, place, 1])
        rows, reading = self.rows(phase, place)
        down, right = rng.integers(-3, 4, 2).tolist()
        pixels = torch.roll(self.put(self.pictures[rows]), (down, right), (-2, -1))
        present = self.said[self.put(rows)].float()
        with mixed_precision(self.device):
            image, votes = patch_words(self.model.visual, (pixels - self.mean) / self.spread, self.head)
            loss = F.binary_cross_entropy_with_logits(votes, present)
            figures = {"votes": loss.detach()}
            if phase == "contrast":
                guesses = self.head(image).float()
                loss = 10 * (loss + F.binary_cross_entropy_with_logits(guesses, present))
                scale = self.model.logit_scale.clamp(0, math.log(100)).exp()
                terms = []
                for caption in reading.T:
                    ids = self.texts.ids[rows, caption]
                    ids = ids[:, : int((ids != self.pad).sum(1).max())].astype(np.int64)
                    text = encode_text_ids(self.model, self.put(ids))
                    terms.append(contrastive_loss(image, text, scale))
                contrast = torch.stack(terms).mean()
                figures["contrast"] = contrast.detach()
                loss = loss + contrast
        return loss, figures


def make_clip(
    folder: Path, work: Path, *, steps: int | None = None, minutes: float = 80, seed: int = 0,
    scenes: int = 48_000, batch: dict[str, int] | None = None, device: str = "cpu",
) -> None:  # fmt: skip
    """Trains the mini CLIP and writes an open_clip model folder; arguments as in ``make_student``."""
    refuse_foreign(folder, "provenance.json")
    job = ClipJob(work / "corpus", scenes, seed, batch, device)
    position = train(job, work / f"clip-{seed}" / "checkpoint.safetensors", steps, minutes)

    def fill(partial: Path) -> None:
        shutil.copytree(job.texts.tokenizer, partial, dirs_exist_ok=True)
        preprocess = {
            "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
            "interpolation": "bicubic", "resize_mode": "shortest",
        }  # fmt: skip
        write_json(partial / "open_clip_config.json", {"model_cfg": job.config, "preprocess_cfg": preprocess})
        with torch.no_grad():
            job.model.logit_scale.clamp_(0, math.log(100))
        weights = {name: value.half().cpu().contiguous() for name, value in job.model.state_dict().items()}
        save_file(weights, partial / "open_clip_model.safetensors", metadata={"format": "pt"})
        write_json(partial / "provenance.json", provenance(make_clip, "web", job, position))

    write_folder(folder, fill)
