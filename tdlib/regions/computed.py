"""Defines regions, and computes their features with a backbone on this machine.

Regions are the example's boxes or the cells of a grid; a backbone (``backbones``) gives their features by
RoIAlign, and ``CachedRegions`` stores them. ``files`` and ``lmdb`` read features that others have made.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tdlib.core.store import EXACT, CacheError, Column, FileDigests, Store, record_key
from tdlib.data.examples import Example
from tdlib.data.pictures import open_picture
from tdlib.method.tokens import grid_boxes
from tdlib.regions.backbones import Backbone
from tdlib.teacher.cache import TeacherCache


@dataclass(frozen=True)
class Regions:
    """The regions of one picture.

    ``features`` (regions, dim) float32; ``boxes`` (regions, 4) xyxy normalised to the picture;
    ``objects`` (regions,) the index of the example's object that each region is, -1 where it is none;
    ``size`` width and height of the picture in pixels, None if the source does not have them.
    """

    features: Tensor
    boxes: Tensor
    objects: Tensor
    size: tuple[float, float] | None = None


class RegionSource(Protocol):
    """Gives the regions of an example's picture; ``dim`` is the width of their features."""

    dim: int

    def __call__(self, example: Example) -> Regions: ...


class BackboneRegions:
    """Computes regions with a backbone, for users without a detector.

    The whole picture comes first, then, depending on ``layout``, the example's boxes in their order
    (``objects`` 0, 1, ...) and the cells of a grid, row by row. No boxes are proposed.

    Args:
        backbone: gives the features of boxes of a picture.
        layout: "boxes", "grid" or "boxes+grid".
        grid: rows and columns.
    """

    def __init__(self, backbone: Backbone, layout: str = "boxes", grid: tuple[int, int] = (6, 6)):
        self.backbone, self.layout, self.grid = backbone, layout, grid
        self.dim = backbone.dim
        settings = f"{backbone.fingerprint} {layout} {grid if 'grid' in layout else ''}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def __call__(self, example: Example) -> Regions:
        boxes, objects = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], [torch.tensor([-1])]
        if "boxes" in self.layout:
            boxes.append(torch.tensor(example.boxes).reshape(-1, 4))
            objects.append(torch.arange(len(example.boxes)))
        if "grid" in self.layout:
            boxes.append(grid_boxes(*self.grid))
            objects.append(torch.full((len(boxes[-1]),), -1))
        places = torch.cat(boxes)
        picture = open_picture(example.image)
        return Regions(self.backbone(picture, places), places, torch.cat(objects), picture.size)


class ClipGridRegions:
    """Reads CLIP's patch tokens in the joint space as regions, from the teacher's cache.

    In the arm ``clip_input`` CLIP's grid is the student's visual input (CLIP-ViL, Shen et al. 2021; they
    take a ResNet's grid before projection). Patches that lie wholly outside the picture are left out.
    No student was pretrained with these features, so its projection of features is re-initialised
    (``foreign``), unless it comes from a run with the same teacher (``fingerprint``).
    """

    foreign = True

    def __init__(self, cache: TeacherCache):
        self.cache, self.dim, self.fingerprint = cache, cache.teacher.dim, cache.teacher.fingerprint[:16]

    def add(self, examples: Sequence[Example]) -> None:
        """Adds the pictures that the teacher's cache lacks."""
        self.cache.add(pictures=[example.image for example in examples])

    def __call__(self, example: Example) -> Regions:
        record = self.cache.picture(example.image)
        inside = (record.positions[:, 2:] > record.positions[:, :2]).all(1)
        boxes = record.positions[inside]
        return Regions(record.projected[inside], boxes, torch.full((len(boxes),), -1))


_LAYOUT = {
    "regions": {
        "features": Column(), "boxes": EXACT, "objects": EXACT, "size": Column(half=False, ragged=False),
    }
}  # fmt: skip
_TOGETHER = 1024  # records that are computed, and written as one shard, at a time


class CachedRegions:
    """Stores computed regions once per picture and boxes: a verified ``Store`` in ``folder/<fingerprint>``.

    A record's key is the SHA-256 of the picture file's bytes and of the example's boxes; features are stored
    in half precision.

    Args:
        source: computes what is missing; it may read no more than the picture and the example's boxes.
        folder: where caches of all sources lie.

    Raises:
        CacheError: a shard is damaged, or a requested example was never added.
    """

    def __init__(self, source: BackboneRegions, folder: Path | str):
        self.source, self.dim = source, source.dim
        self.store = Store(Path(folder) / source.fingerprint[:16], source.fingerprint, _LAYOUT)
        self._digests = FileDigests()

    def _key(self, example: Example) -> bytes:
        try:
            return record_key(self._digests(example.image), json.dumps(example.boxes))
        except FileNotFoundError:
            open_picture(example.image)  # raises DataError, whose message has the remedy
            raise

    def add(self, examples: Sequence[Example]) -> None:
        """Computes and stores the regions that are not stored yet."""
        examples_by_key = {self._key(example): example for example in examples}
        with self.store.to_fill(["regions"], examples_by_key) as missing:
            for start in range(0, len(missing["regions"]), _TOGETHER):
                keys = missing["regions"][start : start + _TOGETHER]
                records = []
                for key in keys:
                    regions = self.source(examples_by_key[key])
                    records.append(vars(regions) | {"size": torch.tensor(regions.size or (0, 0)).float()})
                images = [str(examples_by_key[key].image) for key in keys]
                self.store.append("regions", keys, records, images)

    def __call__(self, example: Example) -> Regions:
        try:
            record = self.store.read("regions", self._key(example))
        except KeyError:
            raise CacheError(
                f"{self.store.folder}: no regions of example {example.id} ({example.image}); call add() "
                "with it"
            ) from None
        width, height = record.pop("size").tolist()
        return Regions(**record, size=(width, height) if width else None)
