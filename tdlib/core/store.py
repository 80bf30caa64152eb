"""The store behind the caches: packed tensors of many records on disk, verified, read in place.

A cache that computes something per picture or text keeps it here and owns nothing but the computing.
``TeacherCache`` does so; a cache of another kind needs these lines:

    layout = {"regions": {"features": Column(), "boxes": EXACT, "objects": EXACT}}
    store = Store(folder / source.fingerprint[:16], owner=source.fingerprint, layout=layout)
    digests = FileDigests()                                   # of pictures, remembered
    keys = {record_key(digests(e.image), json.dumps(e.boxes)): e for e in examples}
    for part in parts_of(store.missing("regions", keys)):      # as many as fit into memory
        made_of = [keys[key] for key in part]
        store.append("regions", part, [vars(source(e)) for e in made_of], [str(e.image) for e in made_of])
    Regions(**store.read("regions", key))                     # KeyError if it was never appended

Memory grows by 32 bytes per record and nothing else: the index holds 16 bytes of each key, 8 of the
record's place and 8 of where its rows begin. Records are read by position (``pread``) into memory of
their own: a memory map would read the same pages, but those that it has touched count as resident
until somebody else needs them, and a file cut short by another process would kill the reader.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tdlib.core.files import file_digest, sync, whole_path

log = logging.getLogger(__name__)

FORMAT = 2
OPEN_FILES = 128  # of one store at a time: large caches have more shards than a process may open files
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}


class CacheError(RuntimeError):
    """Raised where a store is damaged or belongs to another owner; names the file and the remedy."""


class NotFiniteError(CacheError):
    """Raised for records that are not finite: their ``rows`` in the call, the first one's ``column``."""

    def __init__(self, rows: Sequence[int], column: str, source: Any):
        super().__init__(f"{column} of {source!r} is not finite as it is stored; nothing was stored")
        self.rows, self.column, self.source = rows, column, source


@dataclass(frozen=True)
class Column:
    """The way one tensor of a record is stored.

    ``half``: in half precision, and read back in single; else as it is. ``ragged``: the length of its first
    axis differs between records and is the same for all ragged columns of a record; else every record has
    one row.
    """

    half: bool = True
    ragged: bool = True


EXACT = Column(half=False)
Layout = Mapping[str, Mapping[str, Column]]  # of each kind of records, its columns


def record_key(*parts: str) -> bytes:
    """Makes the key of a record that was computed from these strings: their SHA-256."""
    return hashlib.sha256(" ".join(parts).encode("utf-8", "surrogatepass")).digest()


def fingerprint(network: nn.Module, /, without: str = "", **settings: Any) -> str:
    """SHA-256 over a network's weights and architecture, and settings: the owner of what it computes.

    Args:
        network: hashed in single precision, so that the precision of a file of weights does not matter.
        without: weights whose names begin with this are left out, where no feature passes them.
        settings: what neither weights nor the names of modules tell; anything that JSON can hold.
    """
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not without or not name.startswith(without):
            total.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    total.update(json.dumps({"module": str(network), **settings}, sort_keys=True).encode())
    return total.hexdigest()


class FileDigests:
    """SHA-256 of files, hex, each computed once while the file's size and time of change stay the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int, str]] = {}

    def __call__(self, path: Path) -> str:
        """Raises FileNotFoundError where there is no such file."""
        status = path.stat()
        known = self._known.get(str(path))
        if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
            known = status.st_size, status.st_mtime_ns, file_digest(path)
            self._known[str(path)] = known
        return known[2]


class _File:
    """A file opened for reading at any position, closed with the last reference to it."""

    descriptor = -1

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # reading ahead of one record reads another's
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Shard:
    """One safetensors file of records; ValueError, or what json and the system raise, if it is none."""

    def __init__(self, path: Path, columns: Mapping[str, Column], files: "_Files"):
        self.path, self._files = path, files
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size < path.stat().st_size:
                raise ValueError("it has no header")
            header = json.loads(file.read(size))
        self._places: dict[str, tuple[torch.dtype, list[int], int]] = {}
        for name in (*columns, "keys", "sources", "offsets", "source_offsets"):
            entry = header[name]
            self._places[name] = _DTYPES[entry["dtype"]], entry["shape"], 8 + size + entry["data_offsets"][0]
        self.records = self._places["keys"][1][0]
        self.offsets = self.rows("offsets", 0, self.records + 1).numpy()
        for name, column in columns.items():
            rows = self.offsets[-1] if column.ragged else self.records
            if self._places[name][1][0] != rows or (np.diff(self.offsets) < 0).any():
                raise ValueError(f"{name} has {self._places[name][1][0]} rows, its records {rows}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor, as they are stored."""
        dtype, shape, begin = self._places[name]
        values = torch.empty(stop - start, *shape[1:], dtype=dtype)
        row = values[:1].nbytes if stop > start else 0
        buffers: Any = [values.numpy()]
        if os.preadv(self._files[self.path].descriptor, buffers, begin + start * row) != values.nbytes:
            raise ValueError(f"it ends before row {stop} of {name}")
        return values

    def keys(self) -> bytes:
        return self.rows("keys", 0, self.records).numpy().tobytes()

    def source(self, row: int) -> Any:
        start, stop = self.rows("source_offsets", row, row + 2).tolist()
        return json.loads(self.rows("sources", start, stop).numpy().tobytes())


class _Files(OrderedDict[Path, _File]):
    """Keeps the files that were used last open, by path; each process opens them for itself."""

    def __missing__(self, path: Path) -> _File:
        self[path] = file = _File(path)
        if len(self) > OPEN_FILES:
            self.popitem(last=False)
        return file

    def __reduce__(self) -> tuple:
        return _Files, ()


class _Index:
    """Finds records of one kind by the first 16 bytes of their keys, which are sorted."""

    def __init__(self) -> None:
        self.keys = np.empty(0, "S16")
        self.places = np.empty(0, np.int64)  # number of the shard * 2**32 + row in it

    def add(self, keys: bytes, shard: int) -> None:
        """Adds a shard's records; a key that is there already keeps its place."""
        short, rows = np.unique(np.frombuffer(keys, "S32").astype("S16"), return_index=True)
        new = self.find(short) < 0
        at = np.searchsorted(self.keys, short[new])
        self.keys = np.insert(self.keys, at, short[new])
        self.places = np.insert(self.places, at, shard * 2**32 + rows[new])

    def find(self, short: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Returns the place of each key, -1 where there is none."""
        short = np.asarray(short, "S16")
        if not len(self.keys):
            return np.full(len(short), -1)
        at = np.searchsorted(self.keys, short).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == short, self.places[at], -1)


class Store:
    """Records of several kinds in a folder of one owner; opening it verifies it.

    Shards are safetensors files named by their SHA-256, each with the keys of its records and what they
    were made of. ``manifest.json`` lists them with their digests and is replaced last: a killed writer, or
    two at once, leave a whole store. Records with numbers that are not finite are never stored.

    Args:
        folder: is made if it is not there.
        owner: fingerprint of what computes the records.
        layout: the columns of each kind.

    Raises:
        CacheError: a file is missing, damaged or of another format or owner.
    """

    def __init__(self, folder: Path, owner: str, layout: Layout):
        self.folder, self.owner, self.layout = Path(folder), owner, layout
        self.remedy = f"delete {self.folder} and run again; it is rebuilt from the data"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = _Files()
        self._shards: list[_Shard] = []
        self._index = {kind: _Index() for kind in layout}
        self._opened: set[str] = set()
        self._open_new()

    def _open_new(self) -> None:
        """Opens and verifies the shards that were added since, by other processes; first of all: all."""
        entries = [e for e in self._manifest()["shards"] if e["file"] not in self._opened]
        for entry in entries:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise CacheError(f"{path}: shard is missing; {self.remedy}")
            if file_digest(path) != entry["sha256"]:
                raise CacheError(f"{path}: checksum differs, the file is damaged; {self.remedy}")
        for entry in entries:
            self._open(entry)

    def count(self, kind: str) -> int:
        """Number of records of a kind."""
        return len(self._index[kind].keys)

    def missing(self, kind: str, keys: Iterable[bytes]) -> list[bytes]:
        """Returns the keys that no record is stored under, in their order; other processes may store too."""

        def lacking(keys: list[bytes]) -> list[bytes]:
            places = self._index[kind].find([key[:16] for key in keys]).tolist()
            return [key for key, place in zip(keys, places, strict=True) if place < 0]

        if not (missing := lacking(list(keys))):
            return []
        self._open_new()
        return lacking(missing)

    @contextmanager
    def to_fill(self, kinds: Sequence[str], keys: Collection[bytes]) -> Iterator[dict[str, list[bytes]]]:
        """Yields the keys that are missing of each kind, for the block to store.

        Other processes that lack records of just these keys wait meanwhile, and then find them stored: runs
        of a batch that begin side by side with the same examples would each compute all of them.
        """

        def absent() -> dict[str, list[bytes]]:
            return {kind: self.missing(kind, keys) for kind in kinds}

        if not any((nothing := absent()).values()):
            yield nothing
            return
        digest = hashlib.sha256(b"".join(keys)).digest()
        # One byte of an empty file is locked, for each set of keys another one.
        whose = 1, int.from_bytes(digest[:7], "big")
        with (self.folder / ".filling").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *whose)
            except (BlockingIOError, PermissionError):
                log.warning("%s: another process computes the same records; this one waits", self.folder)
                fcntl.lockf(file, fcntl.LOCK_EX, *whose)
            yield absent()

    def read(
        self, kind: str, key: bytes, columns: Sequence[str] = (), as_stored: bool = False
    ) -> dict[str, Tensor]:
        """Reads one record, or some columns of it; half precision is read as single.

        ``as_stored``: keeps half precision.

        Raises:
            KeyError: no record has this key.
        """
        place = int(self._index[kind].find([key[:16]])[0])
        if place < 0:
            raise KeyError(key)
        shard, row = self._shards[place >> 32], place & 2**32 - 1
        start, stop = shard.offsets[row : row + 2].tolist()
        record = {}
        for name in columns or self.layout[kind]:
            column = self.layout[kind][name]
            values = shard.rows(name, start, stop) if column.ragged else shard.rows(name, row, row + 1)[0]
            record[name] = values.float() if column.half and not as_stored else values
        return record

    def sample(self, kind: str, most: int) -> Iterator[tuple[bytes, Any]]:
        """Yields keys of randomly chosen records, the same ones every time, and what they were made of."""
        places = self._index[kind].places
        # Seeded by the size, so that a check of the same store looks at the same records.
        for i in random.Random(len(places)).sample(range(len(places)), min(most, len(places))):
            shard, row = self._shards[int(places[i]) >> 32], int(places[i]) & 2**32 - 1
            yield shard.rows("keys", row, row + 1).numpy().tobytes(), shard.source(row)

    def append(
        self, kind: str, keys: Sequence[bytes], records: Sequence[Mapping[str, Tensor]],
        sources: Sequence[Any],
    ) -> None:  # fmt: skip
        """Stores records as one shard.

        Args:
            kind: one of the layout's.
            keys: 32 bytes each, see ``record_key``.
            records: with the columns of the kind; others are left out.
            sources: what each was made of, in what JSON can hold.

        Raises:
            NotFiniteError: a record holds a number that is not finite in the precision it is stored in.
        """
        said = [json.dumps(source).encode() for source in sources]
        packed = _pack(self.layout[kind], records, sources) | {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32),
            "sources": torch.frombuffer(bytearray(b"".join(said)), dtype=torch.uint8),
            "source_offsets": torch.tensor([0, *map(len, said)]).cumsum(0),
        }
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
        os.close(handle)
        try:
            save_file(packed, partial, metadata={"owner": self.owner, "kind": kind})
            sync(Path(partial))
            digest = file_digest(Path(partial))
            # named by its content, so that two writers never overwrite each other's
            file = f"{kind.replace(':', '-')}-{digest[:16]}.safetensors"
            os.replace(partial, self.folder / file)
        finally:
            Path(partial).unlink(missing_ok=True)
        entry = {"file": file, "kind": kind, "sha256": digest, "records": len(keys)}
        self._list(entry)
        self._open(entry)

    def _open(self, entry: dict[str, Any]) -> None:
        """Adds a shard to the index."""
        path, kind = self.folder / entry["file"], entry["kind"]
        try:
            shard = _Shard(path, self.layout[kind], self._files)
            if shard.records != entry["records"]:
                raise ValueError(f"{shard.records} records, where the manifest lists {entry['records']}")
            self._index[kind].add(shard.keys(), len(self._shards))
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise CacheError(f"{path}: not a readable shard ({error}); {self.remedy}") from None
        self._shards.append(shard)
        self._opened.add(entry["file"])

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {"format": FORMAT, "owner": self.owner, "shards": []}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = manifest["format"], manifest["owner"]
            for entry in manifest["shards"]:
                _ = self.folder / entry["file"], entry["sha256"], entry["records"]
                if entry["kind"] not in self.layout:
                    raise ValueError(f"a shard of kind {entry['kind']!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path}: not a store's manifest ({error!r}); {self.remedy}") from None
        if found != (FORMAT, self.owner):
            raise CacheError(
                f"{path}: format and owner are {found}, expected {(FORMAT, self.owner)}; {self.remedy}"
            )
        return manifest

    def _list(self, entry: dict[str, Any]) -> None:
        """Writes a shard to the manifest, in place of one of the same content."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or a shard that another process adds meanwhile would be lost
            manifest = self._manifest()
            shards = {known["file"]: known for known in [*manifest["shards"], entry]}
            with whole_path(self.folder / "manifest.json") as partial:
                partial.write_text(json.dumps(manifest | {"shards": list(shards.values())}), encoding="utf-8")
                sync(partial)


def _pack(
    columns: Mapping[str, Column], records: Sequence[Mapping[str, Tensor]], sources: Sequence[Any]
) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {"offsets": torch.zeros(len(records) + 1, dtype=torch.long)}
    for name, column in columns.items():
        values = [record[name] for record in records]
        if column.ragged:
            packed["offsets"][1:] = torch.tensor([len(value) for value in values]).cumsum(0)
        whole = torch.cat(values) if column.ragged else torch.stack(values)
        packed[name] = whole.half() if column.half else whole
    for name, column in columns.items():
        rows = (~packed[name][..., None].isfinite().flatten(1).all(1)).nonzero()[:, 0].numpy()
        if len(rows):
            bad = np.searchsorted(packed["offsets"].numpy(), rows, "right") - 1 if column.ragged else rows
            raise NotFiniteError(sorted(set(bad.tolist())), name, sources[bad[0]])
    return packed
