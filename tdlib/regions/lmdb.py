"""Reads UNITER's LMDBs of region features for COCO, Flickr30k and VCR (annotated and detected boxes)."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdlib.data.examples import DataError, Example
from tdlib.regions.computed import Regions
from tdlib.regions.files import UNREADABLE, FileRegions, RawRegions, checked, library


@dataclass(frozen=True)
class _Database:
    """One LMDB of UNITER's: the beginning of its keys, and how many regions of a picture are used."""

    path: Path
    prefix: str
    limit: int
    uncut: bool  # it holds all regions of a picture; those with enough confidence are used

    @property
    def ground_truth(self) -> bool:
        return self.prefix.startswith("vcr_gt_")

    def key(self, image: Path) -> str | None:
        """Returns a picture's key; None if the picture cannot be in this database."""
        stem = image.stem
        if self.prefix.startswith("coco_"):
            return f"{stem.lower()}.npz" if stem.lower().startswith(f"{self.prefix}_") else None
        if self.prefix == "flickr30k":
            return f"flickr30k_{stem.zfill(12)}.npz" if stem.isdigit() else None
        return f"{self.prefix}_{stem}.npz"


class LmdbRegions(FileRegions):
    """Reads the LMDBs of UNITER and VILLA (Chen et al. 2020), compressed or not.

    A folder per split (``coco_train2014``, ``flickr30k``, ``vcr_train``, ``vcr_gt_train``, ...) holds
    ``feat_th0.2_max100_min10``, ``feat_numbb36`` or ``all``; keys are ``coco_train2014_000000000009.npz``,
    ``flickr30k_000123456789.npz``, ``vcr_gt_train_<stem>.npz``. From ``all`` those
    regions are used whose confidence is above 0.2, but at least 10 and at most 100; the other databases were
    cut so when they were written. Regions of ``vcr_gt_*`` come first and are the example's objects; if
    databases of both kinds are given, an example needs both.

    Args:
        paths: folders of splits, or the databases themselves.
    """

    what = "an LMDB folder of UNITER's region features"

    def __init__(self, *paths: Path | str):
        super().__init__(*paths)
        self._databases = [_open_database(path) for path in self.paths]
        # Annotated regions first (True), then detected ones, as far as there are databases of them.
        self._kinds = sorted({database.ground_truth for database in self._databases}, reverse=True)
        first = self._databases[0]
        key, value = next(_records(first.path))
        self.dim = _decode(f"{first.path}: {key!r}", value, first).features.shape[-1]

    def names(self, image: Path) -> list[str]:
        return [key for database in self._databases if (key := database.key(image))]

    def where(self, image: Path) -> str | None:
        found = [self._value(image, kind, read=False) for kind in self._kinds]
        return None if None in found else ", ".join(part[0] for part in found if part)

    def _value(
        self, image: Path, ground_truth: bool, read: bool = True
    ) -> tuple[str, bytes, _Database] | None:
        """Finds where the value of a picture stands, the value (b"" if not ``read``), and its database."""
        for database in self._databases:
            key = database.key(image)
            if database.ground_truth == ground_truth and key:
                # A buffer is not read from the disk until it is looked at; half a megabyte each.
                with _reading(database.path, buffers=not read) as transaction:
                    value = transaction.get(key.encode())
                if value is not None:
                    return f"{database.path}: {key!r}", value if read else b"", database
        return None

    def read(self, example: Example) -> Regions | None:
        parts = []
        for ground_truth in self._kinds:
            value = self._value(example.image, ground_truth)
            if value is None:
                return None
            record = _decode(*value)
            features, boxes = checked(record, self.dim)
            if ground_truth:
                _check_objects(record.where, boxes, example)
            objects = torch.arange(len(boxes)) if ground_truth else torch.full((len(boxes),), -1)
            parts.append((features, boxes, objects))
        features, boxes, objects = (torch.cat(column) for column in zip(*parts, strict=True))
        return Regions(features, boxes, objects)


def _check_objects(where: str, boxes: Tensor, example: Example) -> None:
    """Refuses annotated boxes that are not the example's in its order, because tags refer to them."""
    expected = torch.tensor(example.boxes).reshape(-1, 4)[: len(boxes)]
    enough = len(boxes) >= min(len(example.boxes), 100)  # UNITER stores at most 100
    if not enough or len(boxes) > len(expected) or (expected - boxes).abs().max() > 0.05:
        raise DataError(
            f"{where}: {len(boxes)} annotated boxes, which are not the {len(example.boxes)} objects of "
            f"example {example.id} in order; use features made from the same VCR, or leave vcr_gt out"
        )


_opened: dict[Path, tuple[tuple[int, ...], Any]] = {}  # state of the file and environment


@contextmanager
def _reading(path: Path, buffers: bool = False) -> Iterator[Any]:
    """Yields a transaction of an LMDB, which is opened without locks, so that forked workers share it.

    It is opened once per path and process, as the library demands, and again when its file was replaced.
    """
    lmdb = library("lmdb", "UNITER's LMDB")
    try:
        file = (path / "data.mdb").stat()
        state = file.st_ino, file.st_size, file.st_mtime_ns
        if path in _opened and _opened[path][0] != state:
            _opened.pop(path)[1].close()
        if path not in _opened:
            opened = lmdb.open(str(path), readonly=True, lock=False, create=False, readahead=False)
            _opened[path] = state, opened
        with _opened[path][1].begin(buffers=buffers) as transaction:
            yield transaction
    except (OSError, lmdb.Error) as error:
        raise DataError(f"{path}: this LMDB cannot be read ({error}); copy or unpack it again") from None


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Iterates over keys and values, without UNITER's list of all keys."""
    with _reading(path) as transaction:
        yield from (item for item in transaction.cursor() if item[0] != b"__keys__")


_PREFIX = re.compile(rb"((?:coco|vcr_gt|vcr)_(?:train|val|test)(?:2014|2015)?|flickr30k)_.+\.npz")


def _open_database(folder: Path) -> _Database:
    databases = (
        [folder] if (folder / "data.mdb").is_file() else sorted(p.parent for p in folder.glob("*/data.mdb"))
    )
    if len(databases) != 1:
        names = ", ".join(path.name for path in databases) or "no LMDB (data.mdb)"
        raise DataError(
            f"{folder}: holds {names}; expected one LMDB such as feat_th0.2_max100_min10. Name the one to "
            "read, or unpack it again"
        )
    path = databases[0].resolve()  # lmdb opens a database once per process, known by this path
    key = next((key for key, _ in _records(path)), b"")
    prefix = _PREFIX.fullmatch(key)
    if not prefix:
        raise DataError(
            f"{path}: its first key is {key[:60]!r}; expected coco_train2014_*.npz, flickr30k_*.npz, "
            "vcr_train_*.npz, vcr_gt_train_*.npz or another split of these; give an image LMDB of UNITER's"
        )
    limit = re.search(r"_(?:numbb|max)(\d+)", path.name)
    return _Database(path, prefix[1].decode(), int(limit[1]) if limit else 100, path.name.startswith("all"))


def _decode(where: str, value: bytes, database: _Database) -> RawRegions:
    """Decodes a value of an LMDB: NPZ bytes, or a dictionary as msgpack_numpy writes it."""
    try:
        if value[:2] == b"PK":
            with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
                names = ("features", "norm_bb", *(["conf"] if database.uncut else []))
                fields = {name: arrays[name] for name in names}
        else:
            msgpack = library("msgpack", "UNITER's LMDB")
            fields = msgpack.loads(value, raw=False, object_hook=_array, strict_map_key=False)
        features, boxes = fields["features"], fields["norm_bb"]
        count = database.limit
        if database.uncut:
            count = min(max(int((fields["conf"] > 0.2).sum()), 10), database.limit)
        return RawRegions(where, features[:count], boxes[:count, :4])
    except (*UNREADABLE, TypeError, IndexError) as error:
        raise DataError(
            f"{where}: not a record of region features ({error!r}); expected an NPZ or a msgpack dictionary "
            "with features, norm_bb and conf; copy the database again"
        ) from None


def _array(value: dict) -> Any:
    """Converts msgpack_numpy's dictionaries to arrays; refuses its pickled objects."""
    fields = {key.decode() if isinstance(key, bytes) else key: item for key, item in value.items()}
    if fields.get("nd") is not True:
        return value
    kind = np.dtype(fields["type"])
    if kind.hasobject:
        raise ValueError("an array of Python objects, which is not unpickled")
    return np.frombuffer(fields["data"], kind).reshape(fields["shape"])
