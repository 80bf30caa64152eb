"""Reads region features from files of a detector: the base class of such readers, and folders of NPZ.

A picture's regions are read when they are needed. Every reader can be pickled and shared by the workers of
a DataLoader. No foreign data are unpickled. ``lmdb`` reads UNITER's databases, ``convert`` makes NPZ of other
files.
"""

import importlib
import re
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tdlib.core.paths import resolve
from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import PictureHeader, read_header, upright_boxes, upright_size
from tdlib.data.reading import look_normalised
from tdlib.regions.computed import Regions

# Detected boxes may reach out of the picture by this share of its size, and are then clipped; one that
# reaches further belongs to another picture or layout.
_OVERHANG = 0.1
UNREADABLE = (OSError, ValueError, OverflowError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class RawRegions:
    """The content of a file for one picture, unchecked; ``boxes`` (regions, 4) are in pixels.

    Without ``size`` they are normalised.
    """

    where: str
    features: np.ndarray  # (regions, dim)
    boxes: np.ndarray
    size: tuple[float, float] | None = None  # width and height of the picture in pixels, if the file has them


def checked(record: RawRegions, dim: int) -> tuple[Tensor, Tensor]:
    """Checks a file's regions; returns features (regions, dim) and boxes (regions, 4).

    Boxes are xyxy normalised, clipped to the picture.

    Raises:
        DataError: a shape, the width of features, a number or a box is wrong.
    """
    try:
        features, boxes = np.array(record.features, np.float32), np.array(record.boxes, np.float32)
    except ValueError as error:
        raise DataError(f"{record.where}: no numbers ({error}); extract this picture again") from None
    if features.ndim != 2 or not len(features) or boxes.shape != (len(features), 4):
        raise DataError(
            f"{record.where}: features of shape {features.shape} and boxes of shape {boxes.shape}; expected "
            "(regions, dim) and (regions, 4) with at least one region; extract this picture again"
        )
    if features.shape[1] != dim:
        raise DataError(
            f"{record.where}: features are {features.shape[1]} wide, expected {dim} as in the first record; "
            "use files of one detector only"
        )
    if not np.isfinite(features).all():
        raise DataError(
            f"{record.where}: features hold NaN or infinity, expected finite numbers; extract "
            "this picture again"
        )
    width, height = record.size or (1.0, 1.0)
    if not min(width, height) > 0:
        raise DataError(
            f"{record.where}: a picture of {width} x {height} pixels; expected width and height above 0; "
            "extract this picture again"
        )
    normalised = boxes / np.array([width, height, width, height], np.float32)
    inside = (normalised >= -_OVERHANG) & (normalised <= 1 + _OVERHANG)
    bad = ~(inside.all(1) & (normalised[:, 2:] >= normalised[:, :2]).all(1))  # NaN is bad, too
    if record.size and look_normalised(boxes.ravel().tolist(), width, height):
        raise DataError(
            f"{record.where}: all boxes lie within one pixel of a picture of {width:g} x {height:g}, so they "
            "are normalised already; state them in pixels, or the picture as 1 x 1"
        )
    if bad.any():
        number = int(bad.argmax())
        raise DataError(
            f"{record.where}: box {number} is {boxes[number].tolist()}; expected x1, y1, x2, y2 within the "
            f"picture of {width:g} x {height:g}; the file has another layout, or belongs to other pictures"
        )
    return torch.from_numpy(features), torch.from_numpy(normalised.clip(0, 1))


_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{1,20})")


def picture_keys(image: Path) -> list[str]:
    """Lists the names that files may use for a picture: its stem, COCO's or Flickr30k's bare number."""
    match = _NUMBERED.fullmatch(image.stem)
    return list(dict.fromkeys([image.stem, str(int(match[1]))] if match else [image.stem]))


def library(name: str, what: str) -> Any:
    """Imports a package that only some readers need; the error has the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {name!r} ({error}); install it with: "
            "pip install 'clip-td-workbench[regions]'"
        ) from None


class FileRegions(ABC):
    """Reads regions from the first of several paths that has the picture.

    Where a detector made them, ``objects`` are -1: it does not know which region is an example's object.

    Args:
        paths: files, or folders; relative ones may be relative to the project.

    Raises:
        DataError: nothing is there, or it is not in the expected layout. A call raises it for a picture
            that is in none of the files or has another shape there, whose record is damaged, or whose
            name another picture has too.
    """

    what: ClassVar[str]  # describes one of the paths in messages
    dim: int  # width of the features: that of the first record

    def __init__(self, *paths: Path | str):
        self.paths = [Path(resolve(str(path))) for path in paths]
        for path in self.paths:
            if not path.exists():
                raise DataError(f"{path}: no such file or folder; expected {self.what}")
        if not self.paths:
            raise DataError(f"no file of regions given; expected {self.what}")
        self._places: dict[str, tuple[str, str]] = {}  # folder and ending of each picture, by its stem
        self._numbered: dict[str, str] = {}  # stem of the picture whose regions a record is, by its place

    @abstractmethod
    def read(self, example: Example) -> Regions | None:
        """Reads the regions of an example's picture; None if no path has them."""

    @abstractmethod
    def where(self, image: Path) -> str | None:
        """Names the place of a picture's regions, without reading them; None if no path has them."""

    @abstractmethod
    def names(self, image: Path) -> list[str]:
        """Lists the names under which a picture is looked up."""

    def require(self, examples: Iterable[Example]) -> None:
        """Raises DataError if regions of any of these examples' pictures are missing."""
        pictures: set[Path] = set()
        first, lacking = None, 0
        for example in examples:
            if example.image in pictures:
                continue
            pictures.add(example.image)
            self._distinct(example.image)
            if self.where(example.image) is None:
                first, lacking = first or example, lacking + 1
        if first:
            raise DataError(f"{self._missing(first)} ({lacking} of {len(pictures)} are missing)")

    def __call__(self, example: Example) -> Regions:
        self._distinct(example.image)
        regions = self.read(example)
        if regions is None:
            raise self._missing(example)
        return regions

    def _distinct(self, image: Path) -> None:
        """Refuses a second picture of one name or number: files of regions know pictures by these alone."""
        place = sys.intern(str(image.parent)), image.suffix
        if (other := self._places.get(image.stem)) is None:  # it was not asked for yet
            self._claim(image)
            self._places[image.stem] = place
        elif other != place:
            raise DataError(
                f"{image}: {Path(other[0]) / (image.stem + other[1])} has the same name, by which "
                f"{self.what} tells pictures apart, so both would show the same regions; rename one, and its "
                "regions"
            )

    def _claim(self, image: Path) -> None:
        """Notes whose regions a record named by a number is: "1.jpg" and "001.jpg" would share one."""
        if not _NUMBERED.fullmatch(image.stem) or (record := self.where(image)) is None:
            return
        if (owner := self._numbered.setdefault(record, image.stem)) != image.stem:
            raise DataError(
                f"{image}: {record} are the regions of {owner}{image.suffix}, which has the same number; "
                "name the regions by the pictures' whole names"
            )

    def _missing(self, example: Example) -> DataError:
        return DataError(
            f"{', '.join(map(str, self.paths))}: no regions of {example.image.name} (example {example.id}); "
            f"looked for {', '.join(map(repr, self.names(example.image))) or 'none, from its name'}. Add "
            f"{self.what} that covers this picture's split"
        )


def header_of(image: Path) -> PictureHeader | None:
    """Reads the header of a picture; None if it cannot be read: regions can be used without pictures."""
    try:
        return read_header(image)
    except DataError:
        return None


class NpzRegions(FileRegions):
    """Reads folders with one NPZ per picture, as bottom-up-attention.pytorch and MCAN write them.

    Arrays: x (regions, dim) or (dim, regions), bbox (pixels, xyxy), num_bbox, image_h, image_w. Rows behind
    the first num_bbox are padding. If the size of the picture is not known, bbox is normalised and both sizes
    are 1; else boxes turn with a picture that EXIF turns. A file's name is the picture's stem, full name, or
    number.
    """

    what = "a folder with one NPZ of regions per picture"

    def __init__(self, *paths: Path | str):
        super().__init__(*paths)
        first = min(self.paths[0].glob("*.npz"), default=None)
        if first is None:
            raise DataError(f"{self.paths[0]}: holds no .npz file; expected {self.what}")
        self.dim = self._read(first).features.shape[-1]

    def names(self, image: Path) -> list[str]:
        return [f"{key}.npz" for key in (*picture_keys(image), image.name)]

    def read(self, example: Example) -> Regions | None:
        file = self._file(example.image)
        if file is None:
            return None
        record = self._read(file)
        features, boxes = checked(record, self.dim)
        size = record.size
        if size is not None and (header := header_of(example.image)) is not None:
            places = upright_boxes(boxes.tolist(), size, header, record.where)
            boxes, size = torch.tensor(places), upright_size(size, header, record.where)
        return Regions(features, boxes, torch.full((len(boxes),), -1), size)

    def where(self, image: Path) -> str | None:
        return None if (file := self._file(image)) is None else str(file)

    def _file(self, image: Path) -> Path | None:
        files = (folder / name for folder in self.paths for name in self.names(image))
        return next((file for file in files if file.is_file()), None)

    def _read(self, path: Path) -> RawRegions:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                numbers = (arrays[name].item() for name in ("num_bbox", "image_w", "image_h"))
                count, width, height = map(int, numbers)
                features, boxes = arrays["x"], arrays["bbox"]
        except (*UNREADABLE, TypeError) as error:
            raise DataError(
                f"{path}: not an NPZ of regions ({error!r}); expected x, bbox, num_bbox, image_h and "
                "image_w; extract this picture again"
            ) from None
        # MCAN's files hold (dim, regions), and with padding more of both than num_bbox counts.
        if features.ndim == 2 and len(features) != features.shape[1] in (count, *boxes.shape[:1]):
            features = features.T
        if min(features.ndim, boxes.ndim) < 1 or not 0 < count <= min(len(features), len(boxes)):
            raise DataError(
                f"{path}: num_bbox is {count}, but x has the shape {features.shape} and bbox {boxes.shape}; "
                "extract this picture again"
            )
        features, boxes = features[:count], boxes[:count]
        size = (width, height) if (width, height) != (1, 1) else None  # normalised: the size is not known
        return RawRegions(str(path), features, boxes, size)
