"""Region features: what a detector, or a grid, saw in each picture.

It says what regions are and computes them: RoIAlign over given boxes or a grid, from a backbone on this
machine (``backbones``), kept on disk. ``files`` and ``lmdb`` read those that others made.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from tdlib.core.paths import resolve
from tdlib.core.store import EXACT, CacheError, Column, FileDigests, Store, record_key
from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import open_picture
from tdlib.method.tokens import grid_boxes
from tdlib.regions.backbones import Backbone, open_backbone
from tdlib.teacher.cache import TeacherCache

Layout = Literal["boxes", "grid", "boxes+grid"]


@dataclass(frozen=True)
class Regions:
    """The regions of one picture.

    ``features`` (regions, dim) float32; ``boxes`` (regions, 4) xyxy normalised to the picture;
    ``objects`` (regions,) the index of the example's object that each region is, -1 where it is none;
    ``size`` width and height of the picture in pixels, where the source knows them.
    """

    features: Tensor
    boxes: Tensor
    objects: Tensor
    size: tuple[float, float] | None = None


class RegionSource(Protocol):
    """Gives the regions of an example's picture; ``dim`` is the width of their features."""

    dim: int

    def __call__(self, example: Example) -> Regions: ...


class ComputedRegions(RegionSource, Protocol):
    """Computes regions from the picture and the example's boxes alone; ``fingerprint`` says how."""

    fingerprint: str


class BackboneRegions:
    """Regions from a backbone, for people without a detector.

    The whole picture comes first, then, as ``layout`` says, the example's own boxes in their order
    (``objects`` 0, 1, ...) and the cells of a grid, row by row. An example without boxes has none.

    Args:
        backbone: gives the features of boxes of a picture.
        layout: "boxes", "grid" or "boxes+grid".
        grid: rows and columns.
    """

    def __init__(self, backbone: Backbone, layout: Layout = "boxes", grid: tuple[int, int] = (6, 6)):
        if layout not in ("boxes", "grid", "boxes+grid") or min(grid) < 1:
            raise ValueError(
                f"layout={layout!r}, grid={grid}: expected 'boxes', 'grid' or 'boxes+grid', and rows and "
                "columns of at least 1"
            )
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
    """CLIP's patch tokens in the joint space as regions, read from the teacher's cache.

    The arm ``clip_input``: CLIP's grid is the student's visual input (CLIP-ViL, Shen et al. 2021; they
    take a ResNet's grid before projection). Patches that lie wholly outside the picture are left out.
    No student was pretrained with these: its projection of features is drawn anew (``foreign``).
    """

    foreign = True

    def __init__(self, cache: TeacherCache):
        self.cache, self.dim = cache, cache.teacher.dim

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
_TOGETHER = 1024  # records of a shard


class CachedRegions:
    """Computed regions, stored once per picture and boxes: a verified ``Store`` in ``folder/<fingerprint>``.

    A record's key is the SHA-256 of the picture file's bytes and of the example's boxes; features are kept
    in half precision.

    Args:
        source: computes what is missing.
        folder: where caches of all sources lie.

    Raises:
        CacheError: a shard is damaged, or an example is asked for that was never added.
    """

    def __init__(self, source: ComputedRegions, folder: Path | str):
        self.source, self.dim = source, source.dim
        self.store = Store(Path(folder) / source.fingerprint[:16], source.fingerprint, _LAYOUT)
        self._digests = FileDigests()

    def __len__(self) -> int:
        """Number of stored records."""
        return self.store.count("regions")

    def _key(self, example: Example) -> bytes:
        try:
            return record_key(self._digests(example.image), json.dumps(example.boxes))
        except FileNotFoundError:
            open_picture(example.image)  # raises with the remedy
            raise

    def add(self, examples: Sequence[Example]) -> None:
        """Computes and stores what is not there yet."""
        wanted = {self._key(example): example for example in examples}
        missing = self.store.missing("regions", wanted)
        for start in range(0, len(missing), _TOGETHER):
            keys = missing[start : start + _TOGETHER]
            records = []
            for key in keys:
                regions = self.source(wanted[key])
                records.append(vars(regions) | {"size": torch.tensor(regions.size or (0, 0)).float()})
            self.store.append("regions", keys, records, [str(wanted[key].image) for key in keys])

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


def listed_paths(where: str) -> list[str]:
    """The paths of a list with commas; a path with a comma in its name is one if it is there."""
    parts, paths = where.split(","), []
    while parts:
        whole = (",".join(parts[:length]).strip() for length in range(len(parts), 1, -1))
        path = next((path for path in whole if Path(resolve(path)).exists()), parts[0].strip())
        del parts[: path.count(",") + 1]
        paths += [path] if path else []
    return paths


def open_regions(
    spec: str, *, cache: TeacherCache | None = None, grid: tuple[int, int] = (6, 6), device: str = ""
) -> RegionSource:
    """The region source that a spec "KIND:WHERE" names.

    Files of a detector: "lmdb:FOLDER[,FOLDER]" (UNITER's), "npz:FOLDER[,FOLDER]"; other files become NPZ by
    ``python -m tdlib.regions.convert``. Computed here: "boxes:BACKBONE", "grid:BACKBONE",
    "boxes+grid:BACKBONE", where BACKBONE is the folder of a ``MiniDetector`` or MODEL@WEIGHTS, a model of
    torchvision's with its local file. "clip": the teacher's patches.

    Args:
        spec: see above.
        cache: of the teacher, for "clip".
        grid: rows and columns, for "grid".
        device: where a backbone runs; "" for this process's GPU, or the processor where there is none.

    Raises:
        DataError: the spec is malformed, or what it names is not there or not in its layout.
        ImportError: the kind needs a package of the extra ``regions``.
    """
    from tdlib.regions.files import NpzRegions
    from tdlib.regions.lmdb import LmdbRegions

    kind, _, where = spec.partition(":")
    readers = {"lmdb": LmdbRegions, "npz": NpzRegions}
    if kind in readers and where:
        return readers[kind](*listed_paths(where))
    if kind in ("boxes", "grid", "boxes+grid") and where:
        return BackboneRegions(open_backbone(where, device), kind, grid)  # type: ignore[arg-type]
    if kind == "clip" and not where:
        if cache is None:
            raise DataError("regions='clip' are read from the teacher's cache, and none is given")
        return ClipGridRegions(cache)
    if kind in ("tsv", "lxmert", "hdf5"):
        raise DataError(
            f"regions={spec!r}: make a folder of NPZ files of it, once: python -m tdlib.regions.convert "
            f"{kind} {where or 'FILE'} FOLDER; then give npz:FOLDER"
        )
    raise DataError(
        f"regions={spec!r}; expected lmdb:FOLDER[,FOLDER], npz:FOLDER[,FOLDER], boxes:BACKBONE, "
        "grid:BACKBONE, boxes+grid:BACKBONE (BACKBONE: a mini detector's folder, or MODEL@WEIGHTS such as "
        "resnet50@resnet50.pth), or clip"
    )
