"""Region features that a detector wrote to files: two kinds of TSV, HDF5 and NPZ.

Opening a file reads no features (a TSV is indexed once, by byte position); a record is read when its
picture is asked for. Every door can be pickled and shared by the workers of a DataLoader. Nothing is
unpickled. UNITER's LMDB has its own module, ``region_lmdb``; features that are computed here are
``regions``' business.
"""

import base64
import binascii
import importlib
import json
import logging
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tdlib.core.files import write_json
from tdlib.core.paths import resolve
from tdlib.data.examples import DataError, Example
from tdlib.regions.computed import Regions

log = logging.getLogger(__name__)

_OVERHANG = 0.1  # how far boxes may reach out of the picture, as a share of its size, before it is an error
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Record:
    """What a file holds of one picture; ``boxes`` (regions, 4) in pixels, normalised without ``size``."""

    where: str
    features: np.ndarray  # (regions, dim)
    boxes: np.ndarray
    size: tuple[float, float] | None = None  # width and height of the picture in pixels, if the file has them


def checked(record: Record, dim: int) -> tuple[Tensor, Tensor]:
    """Features (regions, dim) and boxes (regions, 4), xyxy normalised and clipped to the picture.

    Raises:
        DataError: shapes, width, numbers or boxes are not what they should be.
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
    if bad.any():
        number = int(bad.argmax())
        raise DataError(
            f"{record.where}: box {number} is {boxes[number].tolist()}; expected x1, y1, x2, y2 within the "
            f"picture of {width:g} x {height:g}; the file has another layout, or belongs to other pictures"
        )
    return torch.from_numpy(features), torch.from_numpy(normalised.clip(0, 1))


_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{1,20})")


def picture_keys(image: Path) -> list[str]:
    """Names under which files know a picture: its stem, and COCO's or Flickr30k's number without zeros."""
    number = _NUMBERED.fullmatch(image.stem)
    return list(dict.fromkeys([image.stem, str(int(number[1]))] if number else [image.stem]))


def library(name: str, what: str) -> Any:
    """A package that only some doors need.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {name!r} ({error}); install it with: "
            "pip install 'clip-td-workbench[regions]'"
        ) from None


class FileRegions(ABC):
    """Regions from files that are asked in turn; ``objects`` are -1, a detector knows no tags.

    Args:
        paths: files, or folders; relative ones may be relative to the project.

    Raises:
        DataError: nothing is there, or it is not in the expected layout. Asking for a picture that
            is in none of the files, or whose record is damaged, raises it too.
    """

    what: ClassVar[str]  # what messages call one of the paths
    dim: int  # width of the features: that of the first record

    def __init__(self, *paths: Path | str):
        self.paths = [Path(resolve(str(path))) for path in paths]
        for path in self.paths:
            if not path.exists():
                raise DataError(f"{path}: no such file or folder; expected {self.what}")
        if not self.paths:
            raise DataError(f"no file of regions given; expected {self.what}")

    @abstractmethod
    def find(self, image: Path) -> Record | None:
        """The record of a picture, None where there is none."""

    def __call__(self, example: Example) -> Regions:
        record = self.find(example.image)
        if record is None:
            raise self._missing(example)
        features, boxes = checked(record, self.dim)
        return Regions(features, boxes, torch.full((len(boxes),), -1), record.size)

    def _missing(self, example: Example) -> DataError:
        return DataError(
            f"{', '.join(map(str, self.paths))}: no regions of {example.image.name} (example {example.id}); "
            f"looked for {', '.join(map(repr, self.names(example.image))) or 'none, from its name'}. Add "
            f"{self.what} that covers this picture's split"
        )

    def names(self, image: Path) -> list[str]:
        """What is looked for."""
        return picture_keys(image)


class TsvRegions(FileRegions):
    """Bottom-up-attention TSV (Anderson et al. 2018): no header, one picture per line.

    Columns image_id, image_w, image_h, num_boxes, then base64 of float32: boxes (pixels, xyxy) and
    features. The byte position of each line is kept beside the file, in ``FILE.index.json``.
    """

    what = "a bottom-up-attention TSV"
    columns: ClassVar[tuple[str, ...]] = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")

    def __init__(self, *paths: Path | str):
        super().__init__(*paths)
        self._positions = [tsv_positions(path) for path in self.paths]
        key, position = next(iter(self._positions[0].items()))
        self.dim = self._read(self.paths[0], key, position).features.shape[1]

    def find(self, image: Path) -> Record | None:
        for path, positions in zip(self.paths, self._positions, strict=True):
            for key in picture_keys(image):
                if key in positions:
                    return self._read(path, key, positions[key])
        return None

    def _read(self, path: Path, key: str, position: int) -> Record:
        where = f"{path}: record {key!r} at byte {position}"
        with path.open("rb") as file:
            file.seek(position)
            fields = file.readline().rstrip(b"\r\n").split(b"\t")
        if len(fields) != len(self.columns):
            raise DataError(
                f"{where}: {len(fields)} columns, expected {len(self.columns)} ({', '.join(self.columns)}). "
                "Download the file again if it was cut off; 6 columns are bottom-up-attention's layout "
                "('tsv:'), 10 are LXMERT's ('lxmert:')"
            )
        row = dict(zip(self.columns, fields, strict=True))
        if fields[0].decode(errors="replace") != key:
            raise DataError(
                f"{where}: found {fields[0][:40]!r} there; delete {index_file(path)}, it is out of date"
            )
        image = self.columns[0].removesuffix("_id")
        names = ("num_boxes", f"{image}_w", f"{image}_h")
        try:
            count, width, height = (int(row[name]) for name in names)
        except ValueError as error:
            raise DataError(
                f"{where}: {', '.join(names)} are not integers ({error}); expected the columns "
                f"{', '.join(self.columns)}"
            ) from None
        boxes, features = (_floats(where, name, row[name], count) for name in ("boxes", "features"))
        return Record(where, features, boxes, (width, height))


class LxmertRegions(TsvRegions):
    """LXMERT's TSV (Tan and Bansal 2019): no header, one picture per line, boxes in pixels, xyxy."""

    what = "a TSV of LXMERT"
    columns = (
        "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes",
        "boxes", "features",
    )  # fmt: skip


def _floats(where: str, name: str, text: bytes, count: int) -> np.ndarray:
    """Base64 of float32 as (count, columns)."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{where}: {name} is not base64 ({error}); the file was cut off, copy it again"
        ) from None
    if count < 1 or not data or len(data) % (4 * count):
        raise DataError(
            f"{where}: {name} has {len(data)} bytes, expected float32 of num_boxes={count} rows; "
            "the file was cut off, copy it again"
        )
    return np.frombuffer(data, "<f4").reshape(count, -1)


def index_file(path: Path) -> Path:
    """Where the byte positions of a TSV's lines are kept."""
    return path.with_name(f"{path.name}.index.json")


def tsv_positions(path: Path) -> dict[str, int]:
    """The byte position of the line of each key (its first column); of several the first.

    Made in one pass over the file, one line in memory, and kept beside it where that can be written.

    Raises:
        DataError: the file is empty, or a line has no columns.
    """
    status = path.stat()
    stamp = {"size": status.st_size, "modified": status.st_mtime_ns}
    kept = index_file(path)
    try:
        index = json.loads(kept.read_text(encoding="utf-8"))
        if {name: index[name] for name in stamp} == stamp:
            return {str(key): int(position) for key, position in index["positions"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: not an index (%r), it is made anew", kept, error)
    log.info("%s: indexing %.1f GB, once", path, status.st_size / 1e9)
    positions: dict[str, int] = {}
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            key, tab, _ = line.partition(b"\t")
            if tab:
                positions.setdefault(key.decode(errors="replace"), position)
            elif line.strip():
                raise DataError(f"{path}, line {number}: no tab, expected columns; is it a TSV of regions?")
            position += len(line)
    if not positions:
        raise DataError(f"{path}: is empty, expected a TSV of regions; copy it again")
    try:
        write_json(kept, stamp | {"positions": positions})
    except OSError as error:
        log.warning("%s: cannot be written (%s); the file will be indexed again next time", kept, error)
    return positions


class Hdf5Regions(FileRegions):
    """HDF5 as bottom-up-attention-vqa writes it: image_features [n, k, dim], spatial_features [n, k, 6].

    Which row is whose: the file's own dataset ``image_ids``, or a JSON file {image id: row}. (The
    official mapping is a pickle, which could run any code and is not read.)

    Args:
        paths: HDF5 files; a JSON file behind one is its mapping. Without it,
            ``train36_imgid2idx.json`` beside ``train36.hdf5`` is tried.
    """

    what = "an HDF5 file with image_features and spatial_features"

    def __init__(self, *paths: Path | str):
        super().__init__(*paths)
        mappings = {a: b for a, b in zip(self.paths, self.paths[1:], strict=False) if b.suffix == ".json"}
        self.paths = [path for path in self.paths if path.suffix != ".json"]
        if not self.paths:
            raise DataError(f"only a mapping was given, expected {self.what}")
        self._rows = [self._open(path, mappings.get(path)) for path in self.paths]
        self.dim = int(hdf5_file(str(self.paths[0]), os.getpid())["image_features"].shape[2])

    def _open(self, path: Path, mapping: Path | None) -> dict[str, int]:
        try:
            file = hdf5_file(str(path), os.getpid())
            features, spatial = file["image_features"].shape, file["spatial_features"].shape
        except (OSError, KeyError) as error:
            raise DataError(f"{path}: not {self.what} ({error}); convert the features again") from None
        if len(features) != 3 or spatial != (*features[:2], 6):
            raise DataError(
                f"{path}: image_features {features} and spatial_features {spatial}; expected (n, k, dim) and "
                "(n, k, 6): the same number of regions for all pictures"
            )
        if mapping is None and "image_ids" in file:
            ids = file["image_ids"][()].tolist()
            rows = {i.decode() if isinstance(i, bytes) else str(i): row for row, i in enumerate(ids)}
        else:
            rows = _mapping(path, mapping or path.with_name(f"{path.stem}_imgid2idx.json"))
        if not all(type(row) is int and 0 <= row < features[0] for row in rows.values()) or not rows:
            raise DataError(
                f"{path}: its mapping names no rows, or others than 0 to {features[0] - 1}; give the mapping "
                "made with this file"
            )
        return rows

    def find(self, image: Path) -> Record | None:
        for path, rows in zip(self.paths, self._rows, strict=True):
            for key in picture_keys(image):
                if key in rows:
                    file, row = hdf5_file(str(path), os.getpid()), rows[key]
                    where = f"{path}: image {key!r} in row {row}"
                    try:
                        return Record(
                            where, file["image_features"][row], file["spatial_features"][row, :, :4]
                        )
                    except OSError as error:
                        raise DataError(f"{where}: cannot be read ({error}); copy the file again") from None
        return None


@cache
def hdf5_file(path: str, process: int) -> Any:
    """The open HDF5 file of this process: handles do not survive forking."""
    return library("h5py", "HDF5").File(path, "r")


def _mapping(path: Path, mapping: Path) -> dict[str, int]:
    try:
        rows = json.loads(mapping.read_text(encoding="utf-8"))
        if not isinstance(rows, dict):
            raise TypeError(f"a {type(rows).__name__}")
        return rows
    except FileNotFoundError:
        raise DataError(
            f"{path}: which row is which picture's? It has no dataset image_ids, and there is no {mapping}. "
            "A pickle is not read, since it could run any code; if you trust it, convert it: "
            f"python -c \"import json, pickle; json.dump(pickle.load(open('{mapping.stem}.pkl', 'rb')), "
            f"open('{mapping.name}', 'w'))\""
        ) from None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{mapping}: not a mapping ({error}); expected JSON, {{image id: row}}") from None


class NpzRegions(FileRegions):
    """A folder with one NPZ per picture, as bottom-up-attention.pytorch and MCAN have it.

    Arrays x (regions, dim) or (dim, regions), bbox (pixels, xyxy), num_bbox, image_h, image_w. Files
    are named by the picture: its stem, its whole name, or its number.
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

    def find(self, image: Path) -> Record | None:
        files = (folder / name for folder in self.paths for name in self.names(image))
        return next((self._read(file) for file in files if file.is_file()), None)

    def _read(self, path: Path) -> Record:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                count, width, height = (int(arrays[name]) for name in ("num_bbox", "image_w", "image_h"))
                features, boxes = arrays["x"], arrays["bbox"]
        except (*UNREADABLE, TypeError) as error:
            raise DataError(
                f"{path}: not an NPZ of regions ({error!r}); expected x, bbox, num_bbox, image_h and "
                "image_w; extract this picture again"
            ) from None
        if features.ndim == 2 and len(features) != count == features.shape[1]:
            features = features.T
        return Record(str(path), features, boxes, (width, height))
