"""The teacher's features on disk: each distinct picture and text once, verified, never silently wrong.

A cache folder belongs to one teacher (its name carries the fingerprint of weights, preprocessing,
tokenizer and layer). It holds shards: safetensors files of packed, ragged records in half precision,
read memory-mapped. A record's key is the SHA-256 of the picture file's bytes or of the raw text.
What only some relevance variants read lies in shards of its own, under the same keys: nobody else
computes it, and asking for it later adds it to what is there. Relevance that belongs to a text and a
picture together has the key of both.
``manifest.json`` lists the shards with their checksums and is replaced last, so that a killed
writer leaves the cache as it was.
"""

import hashlib
import json
import logging
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdlib.core.files import file_digest
from tdlib.data.pictures import open_picture
from tdlib.teacher.model import EXTRAS, Teacher, TeacherRecord

log = logging.getLogger(__name__)

FORMAT = 1
_BASE = ("projected", "value", "positions", "pooled")
_KINDS: dict[str, tuple[str, ...]] = {  # what a shard of each kind holds
    "texts": _BASE, "pictures": _BASE,
    **{f"{kind}:{extra}": (extra,) for kind in ("texts", "pictures") for extra in EXTRAS},
    "pairs": ("gradient",),
}  # fmt: skip


class CacheError(RuntimeError):
    """The cache is damaged or belongs to another teacher: says which file and the remedy."""


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def pair_key(text_key: str, picture_key: str) -> str:
    return hashlib.sha256(f"{text_key} {picture_key}".encode()).hexdigest()


def _pack(names: Sequence[str], records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    packed = {}
    for name in names:
        values = [record[name] for record in records]
        whole = torch.stack(values) if name == "pooled" else torch.cat(values)
        packed[name] = whole if name == "positions" else whole.half()
    lengths = torch.tensor([0, *(len(record[names[0]]) for record in records)])
    return {**packed, "offsets": lengths.cumsum(0)}


class _Shard:
    """One memory-mapped file of records."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.file = safe_open(path, framework="pt")
        self.offsets = self.file.get_tensor("offsets").tolist()
        self.slices = {name: self.file.get_slice(name) for name in names}

    def record(self, row: int) -> dict[str, Tensor]:
        start, end = self.offsets[row], self.offsets[row + 1]
        found = {
            name: values[row : row + 1][0] if name == "pooled" else values[start:end]
            for name, values in self.slices.items()
        }
        return {name: value if name == "positions" else value.float() for name, value in found.items()}


def _agree(name: str, stored: Tensor, live: Tensor) -> bool:
    """Whether a stored tensor is the live one up to half precision and the machine's rounding."""
    if stored.shape != live.shape:
        return False
    if name == "positions":
        return torch.allclose(stored, live, rtol=0, atol=1e-3)
    if name in ("attention", "rollout", "gradient"):
        return bool(((stored - live).abs() < 0.02).all())
    return bool(((stored * live).sum(-1) > 0.99).all())


class TeacherCache:
    """Features of one teacher under ``root``; opening it verifies it.

    Args:
        root: where caches of all teachers lie; this one is ``root/<fingerprint>``.
        teacher: the live teacher; it computes what is missing and a sample of what is there.
        checked_records: how many stored records of each kind are recomputed on opening.

    Raises:
        CacheError: a checksum, the format, the fingerprint or a recomputed record does not agree.
    """

    def __init__(self, root: Path | str, teacher: Teacher, checked_records: int = 4):
        self.teacher = teacher
        self.folder = Path(root) / teacher.fingerprint[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, dict[str, tuple[str, int]]] = {kind: {} for kind in _KINDS}
        self._shards: dict[str, _Shard] = {}
        self._sources: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}
        for entry in self._open_manifest()["shards"]:
            self._open_shard(entry, verify=True)
        for kind in _KINDS:
            self._check_records(kind, checked_records)

    def __len__(self) -> int:
        """Number of texts and pictures stored."""
        return len(self._rows["texts"]) + len(self._rows["pictures"])

    def _remedy(self) -> str:
        return f"delete {self.folder} and run again; it is rebuilt from the data"

    def _open_manifest(self) -> dict:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {"format": FORMAT, "fingerprint": self.teacher.fingerprint, "shards": []}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = manifest["format"], manifest["fingerprint"]
            for entry in manifest["shards"]:
                kind, keys, sources = entry["kind"], entry["keys"], entry["sources"]
                _ = self.folder / entry["file"], entry["sha256"]
                if kind not in _KINDS or not (isinstance(keys, list) and isinstance(sources, list)):
                    raise ValueError(f"shard of kind {kind!r}, keys or sources that are no list")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path}: not a cache manifest ({error!r}); {self._remedy()}") from None
        if found != (FORMAT, self.teacher.fingerprint):
            raise CacheError(
                f"{path}: format and teacher are {found}, expected {(FORMAT, self.teacher.fingerprint)}; "
                f"{self._remedy()}"
            )
        return manifest

    def _open_shard(self, entry: dict, verify: bool) -> None:
        path = self.folder / entry["file"]
        if verify:
            if not path.is_file():
                raise CacheError(f"{path}: shard is missing; {self._remedy()}")
            if file_digest(path) != entry["sha256"]:
                raise CacheError(f"{path}: checksum differs, the file is damaged; {self._remedy()}")
        try:
            shard = _Shard(path, _KINDS[entry["kind"]])
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: not a readable shard ({error}); {self._remedy()}") from None
        if not len(shard.offsets) - 1 == len(entry["keys"]) == len(entry["sources"]):
            raise CacheError(
                f"{path}: {len(shard.offsets) - 1} records, but the manifest lists {len(entry['keys'])} keys "
                f"and {len(entry['sources'])} sources; {self._remedy()}"
            )
        self._shards[entry["file"]] = shard
        rows = self._rows[entry["kind"]]
        for row, (key, source) in enumerate(zip(entry["keys"], entry["sources"], strict=True)):
            rows[key] = (entry["file"], row)
            self._sources[entry["kind"]][key] = source

    def _check_records(self, kind: str, count: int) -> None:
        """Recomputes some records whose source is still at hand; the live teacher must agree."""
        sources = self._sources[kind]
        keys = random.Random(len(sources)).sample(sorted(sources), min(4 * count, len(sources)))
        keys = [key for key in keys if self._at_hand(kind, key, sources[key])][:count]
        if not keys:
            return
        live = self._compute(kind, [sources[key] for key in keys])
        for key, record in zip(keys, live, strict=True):
            stored = self._get(kind, key)
            if not all(_agree(name, stored[name], record[name]) for name in stored):
                raise CacheError(
                    f"{self.folder}: the stored features of {sources[key]!r} ({kind}) differ from the live "
                    f"teacher's; {self._remedy()}"
                )

    @staticmethod
    def _at_hand(kind: str, key: str, source: Any) -> bool:
        """Whether the picture that a record was made of is still there, unchanged."""
        if kind.startswith("texts"):
            return True
        path = Path(source[1] if kind == "pairs" else source)
        if not path.is_file():
            return False
        digest = file_digest(path)
        return key == (pair_key(text_key(source[0]), digest) if kind == "pairs" else digest)

    def _compute(
        self, kind: str, sources: Sequence[Any], extras: Sequence[str] = ()
    ) -> list[Mapping[str, Tensor]]:
        """Records of one kind, with further signals beside them."""
        kind, _, extra = kind.partition(":")
        if kind == "pairs":
            return self._compute_pairs(sources)
        extras = [*extras, extra] if extra else extras
        if kind == "texts":
            return [vars(record) for record in self.teacher.encode_texts(sources, extras=extras)]
        pictures = [open_picture(Path(source)) for source in sources]
        return [vars(record) for record in self.teacher.encode_pictures(pictures, extras=extras)]

    def _compute_pairs(self, sources: Sequence[tuple[str, str]]) -> list[Mapping[str, Tensor]]:
        of_picture = defaultdict(list)
        for row, (_, path) in enumerate(sources):
            of_picture[path].append(row)
        found: dict[int, Tensor] = {}
        for path, rows in of_picture.items():
            texts = [sources[row][0] for row in rows]
            pairs = self.teacher.pair_relevance(texts, open_picture(Path(path)))
            found |= {row: torch.cat(pair) for row, pair in zip(rows, pairs, strict=True)}
        return [{"gradient": found[row]} for row in range(len(sources))]

    def _get(self, kind: str, key: str) -> dict[str, Tensor]:
        file, row = self._rows[kind][key]
        return self._shards[file].record(row)

    def picture_key(self, path: Path) -> str:
        """SHA-256 of a picture file; remembered while size and time of change stay the same."""
        name = str(path)
        try:
            status = path.stat()
        except FileNotFoundError:
            open_picture(path)  # raises with the remedy
            raise
        stamp = status.st_size, status.st_mtime_ns
        if name not in self._digests or self._digests[name][0] != stamp:
            self._digests[name] = stamp, file_digest(path)
        return self._digests[name][1]

    def add(
        self, texts: Iterable[str] = (), pictures: Iterable[Path] = (), shard_size: int = 4096,
        progress: Callable[[str, int, int], None] | None = None, extras: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Computes and stores what is not there yet, each distinct text and picture once.

        Args:
            texts: raw strings.
            pictures: files.
            shard_size: records of a file.
            progress: called as ``progress(kind, done, total)`` after every shard.
            extras: further signals to store, of ``teacher.EXTRAS``.

        Raises:
            TeacherError: the teacher cannot give one of ``extras``.
        """
        for extra in extras:
            self.teacher.check(extra)
        wanted = {
            "texts": {text_key(text): text for text in texts},
            "pictures": {self.picture_key(path): str(path) for path in dict.fromkeys(pictures)},
        }
        for kind, sources in wanted.items():
            parts = [kind, *(f"{kind}:{extra}" for extra in extras)]
            groups = defaultdict(list)  # of keys that lack the same
            for key in sources:
                if lacking := tuple(part for part in parts if key not in self._rows[part]):
                    groups[lacking].append(key)
            done, total = 0, sum(map(len, groups.values()))
            for lacking, keys in groups.items():
                for start in range(0, len(keys), shard_size):
                    part = keys[start : start + shard_size]
                    self._write_shards(lacking, part, [sources[key] for key in part])
                    done += len(part)
                    if progress:
                        progress(kind, done, total)

    def add_pairs(
        self, pairs: Iterable[tuple[str, Path]], shard_size: int = 4096,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Computes and stores the gradient relevance of texts with pictures, each distinct pair once.

        Costs a forward and a backward pass through both towers per pair.

        Raises:
            TeacherError: the teacher's attention cannot be read.
        """
        self.teacher.check("gradient")
        sources = {
            pair_key(text_key(text), self.picture_key(path)): (text, str(path)) for text, path in pairs
        }
        missing = [key for key in sources if key not in self._rows["pairs"]]
        for start in range(0, len(missing), shard_size):
            part = missing[start : start + shard_size]
            self._write_shards(("pairs",), part, [sources[key] for key in part])
            if progress:
                progress("pairs", start + len(part), len(missing))

    def _write_shards(self, kinds: Sequence[str], keys: list[str], sources: list[Any]) -> None:
        """One shard of each kind, all of the same records, which are computed once."""
        step = 512  # pictures in memory at once
        extras = [kind.partition(":")[2] for kind in kinds if ":" in kind]
        base = kinds[0].partition(":")[0]
        records = [
            record
            for i in range(0, len(sources), step)
            for record in self._compute(base, sources[i : i + step], extras)
        ]
        for kind in kinds:
            self._write_shard(kind, keys, sources, records)

    def _write_shard(
        self, kind: str, keys: list[str], sources: list[Any], records: list[Mapping[str, Tensor]]
    ) -> None:
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
        os.close(handle)
        try:
            metadata = {"fingerprint": self.teacher.fingerprint, "kind": kind}
            save_file(_pack(_KINDS[kind], records), partial, metadata=metadata)
            _sync(Path(partial))
            digest = file_digest(Path(partial))
            name = kind.replace(":", "-")
            file = f"{name}-{digest[:16]}.safetensors"  # so that two writers never overwrite each other's
            entry = {"file": file, "kind": kind, "sha256": digest, "keys": keys, "sources": sources}
            os.replace(partial, self.folder / file)
        finally:
            Path(partial).unlink(missing_ok=True)
        self._append_to_manifest(entry)
        self._open_shard(entry, verify=False)

    def _append_to_manifest(self, entry: dict) -> None:
        manifest = self._open_manifest()  # anew: another process may have added shards
        manifest["shards"].append(entry)
        partial = self.folder / f".manifest-{os.getpid()}.json"
        try:
            partial.write_text(json.dumps(manifest), encoding="utf-8")
            _sync(partial)
            os.replace(partial, self.folder / "manifest.json")
        finally:
            partial.unlink(missing_ok=True)

    def text(self, text: str, extras: Sequence[str] = ()) -> TeacherRecord:
        """The stored features of a text, with further signals if asked for.

        Raises:
            CacheError: it, or one of ``extras``, was never added.
        """
        return self._record("texts", text_key(text), text, extras)

    def picture(self, path: Path, extras: Sequence[str] = ()) -> TeacherRecord:
        """The stored features of a picture file, with further signals if asked for.

        Raises:
            CacheError: it, or one of ``extras``, was never added (or the file has changed since).
        """
        return self._record("pictures", self.picture_key(path), str(path), extras)

    def pair(self, text: str, path: Path) -> Tensor:
        """The stored gradient relevance of a text's tokens and then the picture's, in [0, 1].

        Raises:
            CacheError: the pair was never added.
        """
        key = pair_key(text_key(text), self.picture_key(path))
        if key not in self._rows["pairs"]:
            raise CacheError(
                f"{self.folder}: no gradient relevance of {text!r} with {path}; call add_pairs() with "
                "both first"
            )
        return self._get("pairs", key)["gradient"]

    def _record(self, kind: str, key: str, source: str, extras: Sequence[str]) -> TeacherRecord:
        if key not in self._rows[kind]:
            raise CacheError(f"{self.folder}: no features of {source!r}; call add({kind}=...) with it first")
        record = TeacherRecord(**self._get(kind, key))
        for extra in extras:
            part = f"{kind}:{extra}"
            if key not in self._rows[part]:
                raise CacheError(
                    f"{self.folder}: no {extra!r} of {source!r}; call add({kind}=..., extras=({extra!r},)) "
                    "with it first"
                )
            record = replace(record, **self._get(part, key))
        return record


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
