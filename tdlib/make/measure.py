"""What mini models know, measured from their written folders through the readers that runs use."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdlib.data.examples import Example, Reference, TextPart
from tdlib.data.vcr import NEUTRAL_NAMES, VcrReader
from tdlib.make.corpus import LONGEST, READINGS, curated_texts, two_parts
from tdlib.miniworld.drawing import SIZE
from tdlib.miniworld.scenes import HELD, THINGS
from tdlib.miniworld.worlds import Size, read_concepts, save_picture, scene_at
from tdlib.miniworld.write_vcr import write_vcr
from tdlib.miniworld.writers import captions
from tdlib.regions.computed import CachedRegions, open_regions
from tdlib.students.base import StudentEncoder, student_inputs
from tdlib.students.registry import architecture, load_student, open_encoder
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import predict
from tdlib.training.prepare import add_to_cache
from tdlib.training.reference import zero_shot


def _named(text: str, people: int) -> TextPart:
    """A text with references to the people that it names: person i by the i-th neutral name."""
    words = [word for word in re.finditer(r"\w+", text) if word[0] in NEUTRAL_NAMES[:people]]
    return TextPart(
        text,
        tuple(Reference(word.start(), word.end(), (NEUTRAL_NAMES.index(word[0]),)) for word in words),
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


def open_student(folder: Path, detector: Path, cache: Path) -> tuple[Any, StudentEncoder]:
    """A student of a folder and its reader; computed regions are kept in ``cache``."""
    source: Any = open_regions(f"boxes+grid:{detector}")
    encoder = open_encoder(str(folder), LONGEST, lambda: CachedRegions(source, cache))
    return load_student(str(folder)), encoder


def matching(folder: Path, detector: Path, scenes: int = 512, seed: int = 500) -> dict[str, float]:
    """Held-out image-text matching of a student on curated scenes that it never saw (chance 0.5).

    The share of pictures whose own caption scores higher: ``matching``, than the caption of another
    picture; ``matching_hard``, than its own with one thing changed. Those with ``_bare`` are shown
    without the boxes of objects (of students that read regions).
    """
    with tempfile.TemporaryDirectory() as temporary:
        pictures = curated_pictures(Path(temporary), seed, scenes)
        student, encoder = open_student(folder, detector, Path(temporary) / "regions")
        texts = [curated_texts(seed, index) for index in range(scenes)]
        said = {
            "own": [text[0] for text in texts],
            "matching": [text[0] for text in texts[1:] + texts[:1]],
            "matching_hard": [text[READINGS["curated"]] for text in texts],
        }
        views = {"": pictures}
        if architecture(str(folder)).reads_regions:
            views["_bare"] = [replace(picture, boxes=(), names=()) for picture in pictures]
        figures = {}
        for view, shown in views.items():
            found = {}
            for name, chosen in said.items():
                examples = [statement(p, text) for p, text in zip(shown, chosen, strict=True)]
                encoder.prepare(examples)
                found[name] = scores(student, encoder, examples)
            for name in ("matching", "matching_hard"):
                figures[name + view] = float((found["own"] > found[name]).float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


def by_knowledge(folder: Path, split: str, examples: Sequence[Example], hits: np.ndarray) -> dict[str, float]:
    """Accuracy on a split of a MiniWorld: in all, and where the right answer's concept is known and not.

    ``_known_in_known_style``: known, and drawn in the one style of the curated corpus.
    """
    lines = read_concepts(folder, split)
    known = np.array([lines[example.id]["right"]["known"] for example in examples])
    style = np.array([lines[example.id]["style_known"] for example in examples])
    strata = {
        "": np.ones(len(hits), bool),
        "_known": known,
        "_unknown": ~known,
        "_known_in_known_style": known & style,
    }
    return {name: round(float(hits[rows].mean()), 3) for name, rows in strata.items() if rows.any()}


def student_zero_shot(
    folder: Path, detector: Path, seed: int = 1000, size: Size | None = None,
    splits: Sequence[str] = ("val_balanced", "val_shortcut"),
) -> dict[str, float]:  # fmt: skip
    """Zero-shot accuracy of a student in four-choice VCR (chance 0.25) on a MiniWorld of no report."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        world = write_vcr(Path(temporary) / "vcr", seed, size or Size(train=0, test=0, shifted=0))
        student, encoder = open_student(folder, detector, Path(temporary) / "regions")
        for split in splits:
            examples = list(VcrReader(world, split).read())
            encoder.prepare(examples)
            chosen = predict(student, EncodedExamples(examples, encoder)).argmax(1)
            hits = chosen == np.array([example.label for example in examples])
            found = by_knowledge(world, split, examples, hits)
            figures |= {f"vcr_{split}{name}": value for name, value in found.items()}
    return figures


def measure_student(folder: Path, detector: Path) -> dict[str, float]:
    """All held-out figures of a mini student."""
    return matching(folder, detector) | student_zero_shot(folder, detector)


@torch.inference_mode()
def measure_clip(
    folder: Path, scenes: int = 256, seed: int = 500, size: Size | None = None
) -> dict[str, float]:
    """Held-out figures of a CLIP: retrieval among web scenes it never saw, and zero-shot four-choice VCR.

    Retrieval: share of captions whose picture is the nearest of ``scenes`` (and the reverse), noise-free
    captions. VCR: accuracy on the val split of the MiniWorld ``seed`` (no reported world) and on its
    shortcut-reversed twin.
    """
    teacher = Teacher(f"local-dir:{folder}")
    pairs = list(captions("held_out", seed, scenes))
    pictures = torch.stack(
        [record.pooled for record in teacher.encode_pictures([picture.image for picture, _ in pairs])]
    )
    texts = torch.stack([record.pooled for record in teacher.encode_texts([text for _, text in pairs])])
    cosines, target = texts @ pictures.T, torch.arange(scenes)
    figures = {
        f"picture_of_{scenes}": float((cosines.argmax(1) == target).float().mean()),
        f"caption_of_{scenes}": float((cosines.argmax(0) == target).float().mean()),
    }
    with tempfile.TemporaryDirectory() as temporary:
        world = write_vcr(Path(temporary) / "vcr", seed, size or Size(train=0, test=0, shifted=0))
        cache = TeacherCache(Path(temporary) / "cache", teacher)
        for split in ("val", "val_shortcut"):
            examples = VcrReader(world, split).read()
            add_to_cache(cache, examples)
            hits = zero_shot(cache, examples).argmax(1) == np.array([example.label for example in examples])
            figures[f"vcr_{split}"] = float(hits.mean())
    return {name: round(value, 3) for name, value in figures.items()}
