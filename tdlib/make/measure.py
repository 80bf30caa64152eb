"""Measures what mini models know, from their written folders through the readers that runs use."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdlib.analysis import knowledge
from tdlib.data.vcr import VcrReader
from tdlib.miniworld.drawing import draw
from tdlib.miniworld.worlds import Size
from tdlib.miniworld.write_snli_ve import write_snli_ve
from tdlib.miniworld.write_vcr import write_vcr
from tdlib.miniworld.writers import captioned_scene
from tdlib.regions.computed import CachedRegions
from tdlib.regions.sources import open_regions
from tdlib.students.base import LONGEST, StudentEncoder, check_tokenizer
from tdlib.students.registry import architecture, load_student, open_encoder
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher
from tdlib.training.prepare import add_to_cache
from tdlib.training.reference import zero_shot

ONLY_VAL = Size(train=0, test=0, shifted=0)


def open_student(folder: Path, detector: Path, cache: Path) -> tuple[Any, StudentEncoder]:
    """Opens a student and its encoder; computed regions are kept in ``cache``."""
    source: Any = open_regions(f"boxes+grid:{detector}")
    encoder = open_encoder(str(folder), LONGEST, lambda: CachedRegions(source, cache))
    return load_student(str(folder)), encoder


def measure_student(
    folder: Path, detector: Path, scenes: int = 512, seed: int = 1000, size: Size = ONLY_VAL
) -> dict[str, float]:
    """Computes all held-out figures of a mini student, on worlds on which no verdict rests.

    These are matching (``knowledge.matching``), and zero-shot accuracy in four-choice VCR (chance 0.25) and
    in telling entailed hypotheses of SNLI-VE from contradicted ones (chance 0.5), split by whether the
    curated corpus has the concepts.
    """
    check_tokenizer(folder, required=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        student, encoder = open_student(folder, detector, home / "regions")
        bare = architecture(str(folder)).reads_regions
        figures = knowledge.matching(student, encoder, scenes, bare=bare)
        vcr, pairs = write_vcr(home / "vcr", seed, size), write_snli_ve(home / "snli_ve", seed, size)
        asked = {
            f"vcr_{split}": (knowledge.zero_shot, vcr, split) for split in ("val_balanced", "val_shortcut")
        }
        asked["snli_ve_dev_balanced"] = knowledge.entailment, pairs, "dev_balanced"
        for name, (ask, world, split) in asked.items():
            found = knowledge.by_knowledge(ask(student, encoder, world, split))
            figures |= {f"{name}{stratum}": value for stratum, value in found.items()}
    return figures


@torch.inference_mode()
def measure_clip(folder: Path, scenes: int = 256, seed: int = 500, size: Size = ONLY_VAL) -> dict[str, float]:
    """Computes held-out figures of a CLIP: retrieval among new web scenes, and zero-shot four-choice VCR.

    Retrieval is the share of noise-free captions whose picture is the nearest of ``scenes``, and the reverse.
    VCR is the accuracy on the val split of the MiniWorld ``seed``, on which no verdict rests,
    and on its shortcut-reversed twin.
    """
    check_tokenizer(folder, required=True)
    teacher = Teacher(f"local-dir:{folder}")
    pairs = [captioned_scene("held_out", seed, index) for index in range(scenes)]
    pictures = torch.stack(
        [record.pooled for record in teacher.encode_pictures([draw(scene).image for scene, _ in pairs])]
    )
    texts = torch.stack([record.pooled for record in teacher.encode_texts([text for _, text in pairs])])
    cosines, target = texts @ pictures.T, torch.arange(scenes)
    figures = {
        f"picture_of_{scenes}": float((cosines.argmax(1) == target).float().mean()),
        f"caption_of_{scenes}": float((cosines.argmax(0) == target).float().mean()),
    }
    with tempfile.TemporaryDirectory() as temporary:
        world = write_vcr(Path(temporary) / "vcr", seed, size)
        cache = TeacherCache(Path(temporary) / "cache", teacher)
        for split in ("val", "val_shortcut"):
            examples = VcrReader(world, split).read()
            add_to_cache(cache, examples)
            hits = zero_shot(cache, examples).argmax(1) == np.array([example.label for example in examples])
            figures[f"vcr_{split}"] = float(hits.mean())
    return {name: round(value, 3) for name, value in figures.items()}
