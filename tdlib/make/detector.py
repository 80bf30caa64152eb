"""Makes the mini detector, which recognises names and attributes of things in boxes.

It learns from the curated corpus only, as the students do. ``python -m tdlib.make detector`` trains
it and writes weights, parameters, seed, checksum and held-out figures.
"""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tdlib.core.files import refuse_foreign, write_folder, write_json
from tdlib.data.examples import Box
from tdlib.make.loop import make_optimizer, mixed_precision
from tdlib.miniworld.drawing import SIZE, Drawn, Picture, draw
from tdlib.miniworld.scenes import HELD, MOODS, PLACES, POSES, ROLES, SHIRTS, THINGS, WEATHER, Scene
from tdlib.miniworld.writers import VERSION, scene_at
from tdlib.regions.backbones import MiniDetector, load_detector, save_detector

log = logging.getLogger("tdlib.make.detector")

ATTRIBUTES = {
    "name": ["person", *(name for table in (HELD, THINGS) for name, known in table.items() if known.curated)],
    "shirt": [name for name, curated in SHIRTS.items() if curated],
    "pose": list(POSES),
    "mood": [name for name, mood in MOODS.items() if mood.curated],
    "role": ["none", *(name for name, role in ROLES.items() if role.curated)],
    "place": [name for name, place in PLACES.items() if place.curated],
    "weather": ["indoors", *(name for name, weather in WEATHER.items() if weather.curated)],
}  # the values that occur in the curated corpus
WORKERS = 2  # processes that draw scenes
_MOST = 14  # boxes of one picture: itself, three people with face, hat and held thing, or fewer and things


def labelled_boxes(scene: Scene, picture: Picture) -> list[tuple[Box, dict[str, str]]]:
    """Lists boxes (normalised xyxy) with their attributes; the whole picture comes first."""

    def box(drawn: Drawn) -> Box:
        left, top, right, bottom = drawn.box
        return left / SIZE, top / SIZE, right / SIZE, bottom / SIZE

    found: list[tuple[Box, dict[str, str]]] = [
        ((0.0, 0.0, 1.0, 1.0), {"place": scene.place, "weather": scene.weather or "indoors"})
    ]
    for person, body, face, hat, held in zip(
        scene.people, picture.people, picture.faces, picture.hats, picture.held, strict=True
    ):
        role = person.role or "none"
        said = {
            "name": "person",
            "shirt": person.shirt,
            "pose": person.pose,
            "mood": person.mood,
            "role": role,
        }
        found += [(box(body), said), (box(face), {"mood": person.mood})]
        if hat:
            found.append((box(hat), {"role": role}))
        if held and person.held:
            found.append((box(held), {"name": person.held}))
    return found + [
        (box(drawn), {"name": name}) for name, drawn in zip(scene.things, picture.things, strict=True)
    ]


def render_boxes(job: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seed, start, stop, size = job
    pictures = np.empty((stop - start, 3, size, size), np.uint8)
    boxes = np.zeros((stop - start, _MOST, 4), np.float32)
    labels = np.full((stop - start, _MOST, len(ATTRIBUTES)), -1, np.int64)
    for row, index in enumerate(range(start, stop)):
        scene = scene_at(seed, "curated", index)
        picture = draw(scene)
        image = picture.image.resize((size, size), Image.Resampling.BICUBIC)
        pictures[row] = np.asarray(image).transpose(2, 0, 1)
        for number, (place, said) in enumerate(labelled_boxes(scene, picture)):
            boxes[row, number] = place
            for column, (name, values) in enumerate(ATTRIBUTES.items()):
                if name in said:
                    labels[row, number, column] = values.index(said[name])
    return pictures, boxes, labels


def boxes_corpus(seed: int, number: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws curated scenes as pictures (number, 3, size, size) uint8, with boxes and labels.

    Boxes (number, 14, 4) are normalised xyxy. Labels (number, 14, attributes) are indices into the values
    of ``ATTRIBUTES``, -1 if a box has no value of the attribute; rows of -1 only are no boxes.
    """
    step = max(1, min(500, -(-number // WORKERS)))
    jobs = [(seed, start, min(start + step, number), size) for start in range(0, number, step)]
    with ProcessPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(render_boxes, jobs))
    pictures, boxes, labels = (
        torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)
    )
    return pictures, boxes, labels


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


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_mini_detector(
    folder: Path, scenes: int = 16_000, steps: int = 500, batch: int = 96, peak: float = 3e-3, seed: int = 0,
    size: int = 96,
) -> list[float]:  # fmt: skip
    """Trains the mini detector to recognise what stands in each box and writes its folder.

    Boxes are jittered by up to a tenth, so that features of inexact boxes, or of a grid's cells, are
    meaningful too.

    Returns:
        The loss of every step: nats, summed over the attributes.
    """
    refuse_foreign(folder, "provenance.json")
    torch.manual_seed(seed)
    started = time.time()
    pictures, boxes, labels = boxes_corpus(seed, scenes, size)
    log.info("corpus: %d scenes in %.0f s", scenes, time.time() - started)
    detector = MiniDetector(ATTRIBUTES, size).to(memory_format=torch.channels_last).train()
    log.info("%d parameters", sum(p.numel() for p in detector.parameters()))
    optimizer = make_optimizer(detector, 0.05, fused=False)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step, index in enumerate(batches(scenes, batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 50)
        asked = (labels[index] >= 0).any(-1)
        shown = [jitter(box[real], 0.1, generator) for box, real in zip(boxes[index], asked, strict=True)]
        with mixed_precision():
            features = detector(pictures[index].contiguous(memory_format=torch.channels_last), shown)
            logits = detector.logits(features)
        loss = attribute_loss(logits, labels[index][asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            log.info("step %d: %.3f (%.0f s)", step + 1, np.mean(losses[-50:]), time.time() - started)
    made = {
        "made_by": "tdlib.make.detector.train_mini_detector", "corpus": "curated", "world": VERSION,
        "scenes": scenes, "steps": steps, "batch": batch, "peak_learning_rate": peak, "seed": seed,
        "size": size, "minutes": round((time.time() - started) / 60, 1),
        "final_loss": round(float(np.mean(losses[-50:])), 3),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip

    def fill(partial: Path) -> None:
        save_detector(detector, partial)
        write_json(partial / "provenance.json", made)

    write_folder(folder, fill)  # at once: students read what lies there
    return losses


@torch.inference_mode()
def evaluate_detector(folder: Path, scenes: int = 1_000, seed: int = 500) -> dict[str, float]:
    """Measures the accuracy of each attribute on boxes of curated scenes that were not trained on."""
    detector = load_detector(folder)
    pictures, boxes, labels = boxes_corpus(seed, scenes, detector.size)
    hits: dict[str, list[Tensor]] = {name: [] for name in detector.attributes}
    for part in torch.arange(scenes).split(100):
        asked = (labels[part] >= 0).any(-1)
        shown = [box[real] for box, real in zip(boxes[part], asked, strict=True)]
        truth = labels[part][asked]
        for column, (name, votes) in enumerate(detector.logits(detector(pictures[part], shown)).items()):
            real = truth[:, column] >= 0
            hits[name].append(votes[real].argmax(1) == truth[real, column])
    return {name: round(float(torch.cat(found).float().mean()), 3) for name, found in hits.items()}
