"""Defines the kinds of mini students: their visual input, their model, and one way to run all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViltConfig, VisualBertConfig

from tdlib.core.files import file_digest
from tdlib.make import corpus
from tdlib.miniworld.drawing import SIZE
from tdlib.students.base import StudentOutput
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.vilt import ViltForMultipleChoice, embed_patches, hidden_states
from tdlib.students.visual_bert import VisualBertForMultipleChoice
from tdlib.students.vlbert import CLASSIFIER, VlBertConfig, VlBertForMultipleChoice, within_pixels

SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DISTORTED = 0.75  # share of pictures that are: students are to know things in styles they have not seen
CELLS = 12  # of the grid's 36 cells that a picture in the view "few" has, see ``RegionSight``


class PatchSight:
    """Gives pictures as ViLT reads them, moved by up to three pixels, most of them distorted."""

    summary = 1  # number of visual tokens without a place: the image's [CLS]

    def __init__(self, home: Path, seed: int, scenes: int, detector: Path):
        self.pictures = corpus.pictures("curated", home, seed, scenes)["pictures"]
        self.settings: dict[str, Any] = {"distorted": DISTORTED}

    def __call__(self, rows: np.ndarray, rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        pixels = torch.from_numpy(self.pictures[rows]).float() / 255
        dy, dx = rng.integers(-3, 4, 2).tolist()
        pixels, chosen = torch.roll(pixels, (dy, dx), (-2, -1)), rng.random(len(rows)) < DISTORTED
        pixels[chosen] = corpus.distorted(pixels[chosen], rng)
        pixels = 2 * pixels - 1
        return {
            "pixel_values": pixels,
            "pixel_mask": torch.ones(len(rows), *pixels.shape[-2:], dtype=torch.long),
        }

    def people(self, rows: np.ndarray, visual: dict[str, Tensor]) -> Tensor:
        return torch.zeros(len(rows), dtype=torch.long)  # a patch is no person


class RegionSight:
    """Gives regions of pictures in three views, one per batch.

    "few" has the whole picture, the objects and a third of the grid's cells, drawn for each picture: few
    cells suffice for what the boxes do not show, and short sequences are fast. "bare" lacks the objects, as
    in data sets without boxes. "all" has everything, and is used more often towards the end.
    """

    summary = 0

    def __init__(self, home: Path, seed: int, scenes: int, detector: Path):
        seen = corpus.regions(home, seed, scenes, detector)
        self.features, self.distorted = seen["features"], seen["distorted"]
        self.boxes, self.real, self.counted = seen["boxes"], seen["real"], seen["people"]
        self.dim = self.features.shape[-1]
        digest = file_digest(detector / "model.safetensors")
        self.settings = {"detector": digest, "distorted": DISTORTED}

    def __call__(self, rows: np.ndarray, rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        shares = (0.6, 0.25, 0.15) if progress < 0.93 else (0.1, 0.3, 0.6)
        view = ("few", "bare", "all")[rng.choice(3, p=shares)]
        return self.view(rows, view, rng, rng.random(len(rows)) < DISTORTED)

    def view(
        self, rows: np.ndarray, view: str, rng: np.random.Generator, distorted: np.ndarray | slice = slice(0)
    ) -> dict[str, Tensor]:
        """Gives the regions of the pictures ``rows`` in one view, some of them ``distorted``."""
        real = self.real[rows]
        most = 0 if view == "bare" else int(real.sum(1).max())
        cells = self.features.shape[1] - 1 - corpus.MOST_OBJECTS
        places = np.tile(np.arange(1 + most + cells), (len(rows), 1))
        places[:, 1 + most :] += corpus.MOST_OBJECTS - most
        if view == "few":
            chosen = rng.random((len(rows), cells)).argsort(1)[:, :CELLS]
            places = np.concatenate([places[:, : 1 + most], 1 + corpus.MOST_OBJECTS + chosen], axis=1)
        mask = np.ones(places.shape, bool)
        mask[:, 1 : 1 + most] = real[:, :most]
        objects = np.full(places.shape, -1)
        objects[:, 1 : 1 + most] = np.where(real[:, :most], np.arange(most), -1)
        features = self.features[rows[:, None], places]
        features[distorted] = self.distorted[rows[distorted, None], places[distorted]]
        return {
            "region_features": torch.from_numpy(features).float(),
            "region_boxes": torch.from_numpy(self.boxes[rows[:, None], places]),
            "region_mask": torch.from_numpy(mask).long(),
            "region_objects": torch.from_numpy(objects),
        }

    def people(self, rows: np.ndarray, visual: dict[str, Tensor]) -> Tensor:
        """Counts the people with a box in each picture; they are its first objects."""
        shown = (visual["region_objects"] >= 0).any(1)
        return torch.from_numpy(self.counted[rows].astype(np.int64)) * shown


@dataclass(frozen=True)
class Kind:
    """One architecture of mini students: its folder, its model, and what differs in its making."""

    folder: str
    architecture: str  # its model_type
    sight: type[PatchSight] | type[RegionSight]
    make: Callable[[int, int], Any]  # of the sizes of the vocabulary and of region features
    answer_type: int  # token type of a choice
    slot: bool = False  # True if [MASK] follows a statement that is no question with a choice
    types: str = ""  # parameter of the token types' embeddings, if captions do not have all types
    met: tuple[int, ...] = ()  # for each token type the type whose embedding it gets at the end
    transform: str = ""  # beginning of a classifier's parameters that start from the word predictor's
    boxes: Callable[[Tensor], Tensor] = lambda boxes: boxes  # the change that its encoder makes to boxes


def _vilt(words: int, dim: int) -> ViltForMultipleChoice:
    config = ViltConfig(**SIZES, vocab_size=words, image_size=corpus.SIZE, patch_size=16)
    return ViltForMultipleChoice(config)


KINDS = {
    "uniter": Kind(
        "mini-uniter", "uniter", RegionSight,
        lambda words, dim: UniterForMultipleChoice(
            UniterConfig(**SIZES, vocab_size=words, img_dim=dim, type_vocab_size=4)
        ),
        2, types="uniter.embeddings.token_type_embeddings.weight", met=(0, 1, 2, 2),  # rationales: as answers
    ),
    "vilt": Kind("mini-vilt", "vilt", PatchSight, _vilt, 1),
    "vl-bert": Kind(
        "mini-vlbert", "vl-bert", RegionSight,
        lambda words, dim: VlBertForMultipleChoice(
            VlBertConfig(**SIZES, vocab_size=words, visual_embedding_dim=dim)
        ),
        1, slot=True, transform=CLASSIFIER, boxes=lambda boxes: within_pixels(boxes, (SIZE, SIZE)),
    ),
    "visual-bert": Kind(
        "mini-visualbert", "visual_bert", RegionSight,
        lambda words, dim: VisualBertForMultipleChoice(
            VisualBertConfig(**SIZES, vocab_size=words, visual_embedding_dim=dim)
        ),
        1, slot=True,
    ),
}  # fmt: skip


def read(model: Any, text: dict[str, Tensor] | None, visual: dict[str, Tensor] | None) -> StudentOutput:
    """Runs a student on texts (pictures, choices, tokens) with pictures, or on one of the two alone.

    Returns logits and hidden states. Without text a student reads only [CLS]; without a picture it reads one
    region that is masked (ViLT: no patch).
    """
    if text is None:
        assert visual is not None
        cls = torch.full((len(next(iter(visual.values()))), 1, 1), model.config.cls_token_id)
        text = {
            "input_ids": cls, "attention_mask": torch.ones_like(cls), "token_type_ids": torch.zeros_like(cls),
            "objects": torch.full_like(cls, -1),
        }  # fmt: skip
    number = len(text["input_ids"])
    if isinstance(model, ViltForMultipleChoice):
        choices = text["input_ids"].shape[1]
        if visual is None:
            image = torch.zeros(number, 0, model.config.hidden_size)
            mask = torch.zeros(number, 0, dtype=torch.long)
        else:
            image, mask, _ = embed_patches(model.vilt, visual["pixel_values"], visual["pixel_mask"])
        output = model.vilt(
            **{k: text[k].flatten(0, 1) for k in ("input_ids", "attention_mask", "token_type_ids")},
            image_embeds=image.repeat_interleave(choices, dim=0),
            pixel_mask=mask.repeat_interleave(choices, dim=0), output_hidden_states=True,
        )  # fmt: skip
        return StudentOutput(
            logits=model.classifier(output.pooler_output).view(number, choices),
            hidden_states=tuple(state.unflatten(0, (number, choices)) for state in hidden_states(output)),
        )
    if visual is None:
        width = model.config.visual_embedding_dim
        visual = {
            "region_features": torch.zeros(number, 1, width),
            "region_boxes": torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(number, 1, 4),
            "region_mask": torch.zeros(number, 1, dtype=torch.long),
            "region_objects": torch.full((number, 1), -1),
        }
    inputs = {name: value for name, value in (text | visual).items() if name in model.inputs}
    return model(**inputs, output_hidden_states=True)
