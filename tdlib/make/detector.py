"""Makes the mini detector, which recognises names and attributes of things in boxes.

It learns from the curated corpus only, as the students do. ``python -m tdlib.make detector`` trains
it and writes weights, parameters, seed, checksum and held-out figures.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tdlib.core.files import refuse_foreign, write_folder, write_json
from tdlib.make import corpus
from tdlib.make.loop import make_optimizer, mixed_precision, step_safely
from tdlib.miniworld.writers import VERSION
from tdlib.regions.backbones import MiniDetector, load_detector, save_detector

log = logging.getLogger("tdlib.make.detector")

PEAK = 3e-3  # learning rate


def labelled_pictures(home: Path, seed: int, number: int) -> list[Tensor]:
    """Reads pictures, boxes and labels of curated scenes (see ``corpus.pictures``) into memory."""
    arrays = corpus.pictures("curated", home, seed, number)
    return [torch.from_numpy(np.array(arrays[name])) for name in ("pictures", "boxes", "labels")]


def jitter(boxes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Moves the sides of boxes (regions, 4) by up to a share of their width or height, and clips them."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (boxes + sides * share * (2 * torch.rand(boxes.shape, generator=generator) - 1)).clamp(0, 1)


def attribute_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sums over attributes the mean cross-entropy over the boxes that have the attribute."""
    terms = [
        F.cross_entropy(votes.float(), labels[:, column], ignore_index=-1)
        for column, votes in enumerate(logits.values())
        if bool((labels[:, column] >= 0).any())
    ]
    return torch.stack(terms).sum()


def batches(number: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yields indices of shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(number, generator=generator)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warmup = 50
    if step < warmup:
        return PEAK * (step + 1) / warmup
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_mini_detector(
    folder: Path, work: Path, scenes: int = 16_000, steps: int = 500, batch: int = 96, seed: int = 0
) -> list[float]:
    """Trains the mini detector to recognise what stands in each box and writes its folder.

    Boxes are jittered by up to a tenth, so that features of inexact boxes, or of a grid's cells, are
    meaningful too. The corpus lies in ``work``.

    Returns:
        The loss of every step: nats, summed over the attributes.
    """
    refuse_foreign(folder, "provenance.json")
    torch.manual_seed(seed)
    started = time.time()
    pictures, boxes, labels = labelled_pictures(work / "corpus", seed, scenes)
    log.info("corpus: %d scenes in %.0f s", scenes, time.time() - started)
    detector = MiniDetector(corpus.ATTRIBUTES, corpus.SIZE).to(memory_format=torch.channels_last).train()
    log.info("%d parameters", sum(p.numel() for p in detector.parameters()))
    optimizer = make_optimizer(detector, fused=False)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step, index in enumerate(batches(scenes, batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        asked = (labels[index] >= 0).any(-1)
        shown = [jitter(box[real], 0.1, generator) for box, real in zip(boxes[index], asked, strict=True)]
        with mixed_precision():
            features = detector(pictures[index].contiguous(memory_format=torch.channels_last), shown)
            logits = detector.logits(features)
        loss = attribute_loss(logits, labels[index][asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        step_safely(optimizer, detector, f"step {step}")
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            log.info("step %d: %.3f (%.0f s)", step + 1, np.mean(losses[-50:]), time.time() - started)
    made = {
        "made_by": "tdlib.make.detector.train_mini_detector", "corpus": "curated", "world": VERSION,
        "scenes": scenes, "steps": steps, "batch": batch, "peak_learning_rate": PEAK, "seed": seed,
        "size": corpus.SIZE, "minutes": round((time.time() - started) / 60, 1),
        "final_loss": round(float(np.mean(losses[-50:])), 3),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip

    def fill(partial: Path) -> None:
        save_detector(detector, partial)
        write_json(partial / "provenance.json", made)

    write_folder(folder, fill)  # at once: students read what lies there
    return losses


@torch.inference_mode()
def evaluate_detector(folder: Path, work: Path, scenes: int = 1_000, seed: int = 500) -> dict[str, float]:
    """Measures the accuracy of each attribute on boxes of curated scenes that were not trained on."""
    detector = load_detector(folder)
    pictures, boxes, labels = labelled_pictures(work / "corpus", seed, scenes)
    hits: dict[str, list[Tensor]] = {name: [] for name in detector.attributes}
    for part in torch.arange(scenes).split(100):
        asked = (labels[part] >= 0).any(-1)
        shown = [box[real] for box, real in zip(boxes[part], asked, strict=True)]
        truth = labels[part][asked]
        for column, (name, votes) in enumerate(detector.logits(detector(pictures[part], shown)).items()):
            real = truth[:, column] >= 0
            hits[name].append(votes[real].argmax(1) == truth[real, column])
    return {name: round(float(torch.cat(found).float().mean()), 3) for name, found in hits.items()}
