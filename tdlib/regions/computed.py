"""Region features: what a detector, or a grid, saw in each picture.

Owns what regions are and those that are computed here: RoIAlign over given boxes or a grid, from a
backbone on this machine (``backbones``), kept on disk. Files that others made are read in
``region_files`` and ``region_lmdb``.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdlib.core.files import file_digest
from tdlib.core.paths import resolve
from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import open_picture
from tdlib.regions.backbones import Backbone, open_backbone
from tdlib.teacher.cache import CacheError, TeacherCache

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


def grid_boxes(rows: int, columns: int) -> Tensor:
    """The cells of a grid over the picture, row by row: (rows * columns, 4) normalised xyxy."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4)
    return cells / torch.tensor([columns, rows, columns, rows])


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


class CachedRegions:
    """Computed regions, stored once per picture and boxes.

    ``folder/<fingerprint>`` holds shards: safetensors files of packed, ragged records, features in
    half precision, read memory-mapped. Each has the keys of its records in its metadata and the
    start of its own SHA-256 as its name, and appears under it when complete: killed or concurrent
    writers damage nothing. A key is the SHA-256 of the picture file's bytes and the example's boxes.

    Args:
        source: computes what is missing.
        folder: where caches of all sources lie.
        examples: stored on opening; ``add`` stores more.

    Raises:
        CacheError: a shard is damaged, or an example is asked for that was never added.
    """

    def __init__(self, source: ComputedRegions, folder: Path | str, examples: Sequence[Example] = ()):
        self.source, self.dim = source, source.dim
        self.folder = Path(folder) / source.fingerprint[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, tuple[Path, int, int]] = {}  # shard, first region, last
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}
        self._files: dict[tuple[int, Path], Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if file_digest(path)[:16] != path.stem:
                raise CacheError(f"{path}: checksum differs, the file is damaged; delete it and run again")
            self._list(path)
        self.add(examples)

    def __len__(self) -> int:
        """Number of stored records."""
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def _open(self, path: Path) -> Any:
        """A memory-mapped shard, opened by each process for itself."""
        name = os.getpid(), path
        if name not in self._files:
            self._files[name] = safe_open(path, framework="pt")
        return self._files[name]

    def _list(self, path: Path) -> None:
        try:
            keys = json.loads(self._open(path).metadata()["keys"])
            offsets = self._open(path).get_tensor("offsets").tolist()
            places = zip(keys, offsets[:-1], offsets[1:], strict=True)
            self._rows |= {key: (path, start, end) for key, start, end in places}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path}: not a shard of regions ({error!r}); delete it and run again") from None

    def key(self, example: Example) -> str:
        """What an example's regions are stored under; digests of unchanged files are remembered."""
        name = str(example.image)
        try:
            status = example.image.stat()
        except FileNotFoundError:
            open_picture(example.image)  # raises with the remedy
            raise
        stamp = status.st_size, status.st_mtime_ns
        if name not in self._digests or self._digests[name][0] != stamp:
            self._digests[name] = stamp, file_digest(example.image)
        return hashlib.sha256(f"{self._digests[name][1]} {json.dumps(example.boxes)}".encode()).hexdigest()

    def add(
        self, examples: Sequence[Example], shard_size: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Computes and stores what is not there yet; calls ``progress(done, total)`` after every shard."""
        missing = {key: example for example in examples if (key := self.key(example)) not in self._rows}
        for start in range(0, len(missing), shard_size):
            part = dict(list(missing.items())[start : start + shard_size])
            self._write(list(part), [self.source(example) for example in part.values()])
            if progress:
                progress(start + len(part), len(missing))

    def _write(self, keys: list[str], regions: list[Regions]) -> None:
        packed = {
            "features": torch.cat([r.features for r in regions]).half(),
            "boxes": torch.cat([r.boxes for r in regions]),
            "objects": torch.cat([r.objects for r in regions]),
            "offsets": torch.tensor([0, *(len(r.boxes) for r in regions)]).cumsum(0),
        }
        if not packed["features"].isfinite().all():
            raise CacheError("features are not finite in half precision; the backbone's weights are damaged")
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
        try:
            save_file(packed, partial, metadata={"keys": json.dumps(keys)})
            os.fsync(handle)
            path = self.folder / f"{file_digest(Path(partial))[:16]}.safetensors"
            os.replace(partial, path)
        finally:
            os.close(handle)
            Path(partial).unlink(missing_ok=True)
        self._list(path)

    def __call__(self, example: Example) -> Regions:
        key = self.key(example)
        if key not in self._rows:
            raise CacheError(
                f"{self.folder}: no regions of example {example.id} ({example.image}); call add() with it"
            )
        path, start, end = self._rows[key]
        features, boxes, objects = (
            self._open(path).get_slice(name)[start:end] for name in ("features", "boxes", "objects")
        )
        return Regions(features.float(), boxes, objects)


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

    Files of a detector: "lmdb:FOLDER[,FOLDER]", "tsv:FILE[,FILE]", "lxmert:FILE[,FILE]",
    "hdf5:FILE[,MAPPING.json]", "npz:FOLDER[,FOLDER]". Computed here: "boxes:BACKBONE",
    "grid:BACKBONE", "boxes+grid:BACKBONE", where BACKBONE is the folder of a ``MiniDetector`` or
    MODEL@WEIGHTS, a model of torchvision's with its local file. "clip": the teacher's patches.

    Args:
        spec: see above.
        cache: of the teacher, for "clip".
        grid: rows and columns, for "grid".
        device: where a backbone runs; "" for this process's GPU, or the processor where there is none.

    Raises:
        DataError: the spec is malformed, or what it names is not there or not in its layout.
        ImportError: the kind needs a package of the extra ``regions``.
    """
    from tdlib.regions.files import Hdf5Regions, LxmertRegions, NpzRegions, TsvRegions
    from tdlib.regions.lmdb import LmdbRegions

    doors: dict[str, Callable[..., RegionSource]] = {
        "lmdb": LmdbRegions, "tsv": TsvRegions, "lxmert": LxmertRegions, "hdf5": Hdf5Regions,
        "npz": NpzRegions,
    }  # fmt: skip
    kind, _, where = spec.partition(":")
    if kind in doors and where:
        return doors[kind](*listed_paths(where))
    if kind in ("boxes", "grid", "boxes+grid") and where:
        return BackboneRegions(open_backbone(where, device), kind, grid)  # type: ignore[arg-type]
    if kind == "clip" and not where:
        if cache is None:
            raise DataError("regions='clip' are read from the teacher's cache, and none is given")
        return ClipGridRegions(cache)
    raise DataError(
        f"regions={spec!r}; expected lmdb:FOLDER[,FOLDER], tsv:FILE[,FILE], lxmert:FILE[,FILE], "
        "hdf5:FILE[,MAPPING.json], npz:FOLDER[,FOLDER], boxes:BACKBONE, grid:BACKBONE, boxes+grid:BACKBONE "
        "(BACKBONE: a mini detector's folder, or MODEL@WEIGHTS such as resnet50@resnet50.pth), or clip"
    )
