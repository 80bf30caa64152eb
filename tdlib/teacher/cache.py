"""Stores the teacher's features on disk: each distinct picture and text once, verified when opened.

A cache folder belongs to one teacher (its name is the fingerprint of weights, preprocessing and tokenizer)
and is a ``core.store``, which owns files, checksums and the index in memory. A record's key is the SHA-256
of the picture file's bytes or of the raw text. Signals that only some relevance variants read lie in
separate shards under the same keys: they are computed only when a variant needs them, and are added to the
records that are there. Texts of which only the global embedding is read are stored without their tokens,
which take many times the place. Relevance of a text together with a picture has a key made of both keys.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlib.core.devices import in_threads
from tdlib.core.store import EXACT, CacheError, Column, FileDigests, NotFiniteError, Store, record_key
from tdlib.data.pictures import open_picture
from tdlib.method.registry import need_several
from tdlib.teacher.model import Teacher, TeacherRecord
from tdlib.teacher.towers import EXTRAS, TeacherError

log = logging.getLogger(__name__)

SHARD_BYTES = 2**28  # computed features are written when they take this much memory
# Texts, decoded pictures or pairs in memory at once.
STEP = {"texts": 512, "texts_pooled": 512, "pictures": 128, "pairs": 512}
AT_ONCE = 100_000  # texts of ``add_pooled`` in memory at once
SAMPLE = 4  # stored records of each kind that are computed again on opening

_BASE = {"projected": Column(), "value": Column(), "positions": EXACT, "pooled": Column(ragged=False)}
LAYOUT: dict[str, dict[str, Column]] = {  # what a shard of each kind holds
    "texts": {**_BASE, "cut": Column(half=False, ragged=False)},
    "texts_pooled": {"pooled": Column(ragged=False)},
    "pictures": _BASE,
    **{f"{kind}:{extra}": {extra: Column()} for kind in ("texts", "pictures") for extra in EXTRAS},
    "pairs": {"gradient": Column()},
}


def text_key(text: str) -> bytes:
    return record_key(text)


def pair_key(text_key: bytes, picture_key: bytes) -> bytes:
    return record_key(text_key.hex(), picture_key.hex())


def _agree(name: str, stored: Tensor, live: Tensor) -> bool:
    """True if a stored tensor equals the live one up to half precision and the machine's rounding."""
    if stored.shape != live.shape:
        return False
    if name in ("positions", "cut"):
        return torch.allclose(stored, live, rtol=0, atol=1e-3)
    if name in ("attention", "rollout", "gradient"):
        return bool(((stored - live).abs() < 0.02).all())
    return bool(((stored * live).sum(-1) > 0.99).all())


def _tensors(record: TeacherRecord) -> dict[str, Tensor]:
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return {**tensors, "cut": torch.tensor(record.cut)}


class TeacherCache:
    """Features of one teacher under ``root``; opening it verifies it.

    Checksums are compared, and a sample of what is stored is computed again.

    Args:
        root: where caches of all teachers lie; this one is ``root/<fingerprint>``.
        teacher: the live teacher; it computes what is missing and a sample of what is there.

    Raises:
        CacheError: a checksum, the format, the fingerprint or a recomputed record does not agree.
    """

    def __init__(self, root: Path | str, teacher: Teacher):
        self.teacher = teacher
        self.store = Store(Path(root) / teacher.fingerprint[:16], teacher.fingerprint, LAYOUT)
        self.folder = self.store.folder
        self._digests = FileDigests()
        for kind in LAYOUT:
            self._check_records(kind)

    def __len__(self) -> int:
        """Number of texts and pictures stored."""
        return self.store.count("texts") + self.store.count("pictures")

    def _check_records(self, kind: str) -> None:
        """Recomputes some stored records whose source is still there; the live teacher must agree."""
        drawn = self.store.sample(kind, 4 * SAMPLE)
        sample = [(key, source) for key, source in drawn if self._at_hand(kind, key, source)][:SAMPLE]
        if not sample:
            return
        live = self._compute(kind, [source for _, source in sample])
        for (key, source), record in zip(sample, live, strict=True):
            stored = self.store.read(kind, key)
            misplaced = kind.startswith("texts") and key != text_key(source)
            if misplaced or not all(_agree(name, stored[name], record[name]) for name in stored):
                raise CacheError(
                    f"{self.folder}: the stored features of {source!r} ({kind}) differ from the live "
                    f"teacher's; {self.store.remedy}"
                )

    def _at_hand(self, kind: str, key: bytes, source: Any) -> bool:
        """True if the picture that a record was made from is still there, unchanged."""
        if kind.startswith("texts"):
            return True
        path = Path(source[1] if kind == "pairs" else source)
        if not path.is_file():
            return False
        picture = self.picture_key(path)
        return key == (pair_key(text_key(source[0]), picture) if kind == "pairs" else picture)

    def _compute(
        self, kind: str, sources: Sequence[Any], extras: Sequence[str] = ()
    ) -> list[dict[str, Tensor]]:
        """Computes records of one kind, with further signals beside them."""
        kind, _, extra = kind.partition(":")
        if kind == "pairs":
            return self._compute_pairs(sources)
        extras = [*extras, extra] if extra else extras
        if kind == "texts":
            return [_tensors(record) for record in self.teacher.encode_texts(sources, extras=extras)]
        if kind == "texts_pooled":
            return [{"pooled": record.pooled} for record in self.teacher.encode_texts(sources)]
        pictures = in_threads(open_picture, [Path(source) for source in sources])
        return [_tensors(record) for record in self.teacher.encode_pictures(pictures, extras=extras)]

    def _compute_pairs(self, sources: Sequence[tuple[str, str]]) -> list[dict[str, Tensor]]:
        of_picture = defaultdict(list)
        for row, (_, path) in enumerate(sources):
            of_picture[path].append(row)
        relevance: dict[int, Tensor] = {}
        for path, rows in of_picture.items():
            texts = [sources[row][0] for row in rows]
            pairs = self.teacher.pair_relevance(texts, open_picture(Path(path)))
            relevance |= {row: torch.cat(pair) for row, pair in zip(rows, pairs, strict=True)}
        return [{"gradient": relevance[row]} for row in range(len(sources))]

    def picture_key(self, path: Path) -> bytes:
        """Returns the SHA-256 of a picture file; remembered while size and time of change stay the same."""
        try:
            return bytes.fromhex(self._digests(Path(path)))
        except FileNotFoundError:
            open_picture(path)  # raises DataError, whose message has the remedy
            raise

    def add(
        self, texts: Iterable[str] = (), pictures: Iterable[Path] = (), extras: Sequence[str] = ()
    ) -> None:
        """Computes and stores what is not there yet, each distinct text and picture once.

        Args:
            texts: raw strings.
            pictures: files.
            extras: further signals to store, of ``towers.EXTRAS``.

        Raises:
            TeacherError: the teacher cannot give one of ``extras``, or makes numbers that are not finite
                of a text or picture.
        """
        need_several(texts, "texts")
        need_several(pictures, "pictures")
        for extra in extras:
            self.teacher.check(extra)
        sources_of: dict[str, dict[bytes, str]] = {
            "texts": {text_key(text): text for text in texts},
            "pictures": {self.picture_key(path): str(path) for path in dict.fromkeys(pictures)},
        }
        for kind, sources in sources_of.items():
            parts = [kind, *(f"{kind}:{extra}" for extra in extras)]
            with self.store.to_fill(parts, sources) as missing:
                absent = {part: set(keys) for part, keys in missing.items()}
                # Keys that lack the same signals are computed together, all of their signals in one pass.
                groups = defaultdict(list)
                for key in sources:
                    if lacking := tuple(part for part in parts if key in absent[part]):
                        groups[lacking].append(key)
                for lacking, keys in groups.items():
                    self._fill(lacking, keys, [sources[key] for key in keys])

    def add_pooled(self, texts: Iterable[str]) -> None:
        """Computes and stores the global embeddings of texts that the cache lacks, without their tokens.

        ``pooled`` reads them. There may be more texts than fit into memory. Raises TeacherError where an
        embedding is not finite.
        """
        need_several(texts, "texts")
        rest, waiting = iter(texts), dict[bytes, str]()
        while part := [*islice(rest, AT_ONCE)]:
            waiting |= {text_key(text): text for text in part}
            keys = self.store.missing("texts", self.store.missing("texts_pooled", waiting))
            # Only whole steps but for the last, so that the division into parts changes no rounding.
            step = STEP["texts_pooled"]
            full = keys if len(part) < AT_ONCE else keys[: len(keys) // step * step]
            self._fill(["texts_pooled"], full, [waiting[key] for key in full])
            waiting = {key: waiting[key] for key in keys[len(full) :]}
        self._fill(["texts_pooled"], [*waiting], [*waiting.values()])

    def add_pairs(self, pairs: Iterable[tuple[str, Path]]) -> None:
        """Computes and stores the gradient relevance of texts with pictures, each distinct pair once.

        Costs a forward and a backward pass through both towers per pair.
        """
        self.teacher.check("gradient")
        sources = {
            pair_key(text_key(text), self.picture_key(path)): (text, str(path)) for text, path in pairs
        }
        with self.store.to_fill(["pairs"], sources) as missing:
            self._fill(["pairs"], missing["pairs"], [sources[key] for key in missing["pairs"]])

    def _fill(self, kinds: Sequence[str], keys: Sequence[bytes], sources: Sequence[Any]) -> None:
        """Computes records once; writes a shard of each kind whenever enough of them are in memory.

        A thread writes a shard while records of the next one are computed, so two may be in memory together.
        """
        extras = [kind.partition(":")[2] for kind in kinds if ":" in kind]
        base = kinds[0].partition(":")[0]
        held: list[dict[str, Tensor]] = []
        first = size = 0
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            try:
                for start in range(0, len(keys), STEP[base]):
                    records = self._compute(base, sources[start : start + STEP[base]], extras)
                    held += records
                    size += sum(value.nbytes for record in records for value in record.values())
                    if size >= SHARD_BYTES:
                        if writing is not None:
                            writing.result()
                        writing = writer.submit(self._write, kinds, keys[first:], held, sources[first:])
                        first, held, size = first + len(held), [], 0
            finally:  # whatever stopped the loop, records that were computed are kept
                if writing is not None:
                    wait([writing])
                if held:
                    self._write(kinds, keys[first:], held, sources[first:])
            if writing is not None:
                writing.result()  # raises what the thread raised

    def _write(
        self, kinds: Sequence[str], keys: Sequence[bytes], records: Sequence[Mapping[str, Tensor]],
        sources: Sequence[Any],
    ) -> None:  # fmt: skip
        """Stores records under the first of these keys, all finite ones before it raises for the others."""
        refused: NotFiniteError | None = None
        for kind in kinds:
            rows = list(range(len(records)))
            while rows:
                try:
                    self.store.append(
                        kind, [keys[row] for row in rows], [records[row] for row in rows],
                        [sources[row] for row in rows],
                    )  # fmt: skip
                    break
                except NotFiniteError as error:
                    refused = refused or error
                    rows = [row for place, row in enumerate(rows) if place not in set(error.rows)]
        if refused is not None:
            raise TeacherError(self._why_not_finite(kinds[0].partition(":")[0], refused)) from None

    def _why_not_finite(self, kind: str, error: NotFiniteError) -> str:
        name = {"pictures": "picture", "pairs": "text and picture"}.get(kind, "text")
        weights = dict(self.teacher.model.named_parameters())
        spoiled = [name for name, weight in weights.items() if not weight.isfinite().all()]
        precision = " and ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()}))
        if spoiled:
            reason = f"{len(spoiled)} of its weights are not either ({spoiled[0]}): copy their file again"
        elif precision != "float32":
            reason = "its numbers overflow in this precision: load the weights in float32"
        else:
            reason = "its weights are finite: leave this out of the data, or choose another teacher"
        return (
            f"teacher {self.teacher.name!r} in {precision}: {error.column!r} of the {name} {error.source!r} "
            f"is not finite; {reason}. Nothing of it was stored"
        )

    def text(self, text: str, extras: Sequence[str] = (), as_stored: bool = False) -> TeacherRecord:
        """Reads the stored features of a text, and the further signals ``extras``.

        ``as_stored`` keeps them in half precision, as on the disk; else they are converted to single.

        Raises:
            CacheError: it, or one of ``extras``, was never added.
        """
        return self._record("texts", text_key(text), text, extras, as_stored)

    def picture(self, path: Path, extras: Sequence[str] = (), as_stored: bool = False) -> TeacherRecord:
        """Reads the stored features of a picture file; arguments and errors as in ``text``."""
        return self._record("pictures", self.picture_key(path), str(path), extras, as_stored)

    def pooled(self, text: str) -> Tensor:
        """Reads the global embedding of a text in single precision, (teacher_dim,), with or without tokens.

        Raises:
            CacheError: the text was never added.
        """
        key = text_key(text)
        # What was stored first is read, so that tokens which are added later change no number.
        try:
            return self.store.read("texts_pooled", key)["pooled"]
        except KeyError:
            return self._read("texts", key, text, ["pooled"])["pooled"]

    def pair(self, text: str, path: Path) -> Tensor:
        """Reads the stored gradient relevance of a text's tokens, then of the picture's, in [0, 1]."""
        try:
            return self.store.read("pairs", pair_key(text_key(text), self.picture_key(path)))["gradient"]
        except KeyError:
            raise CacheError(
                f"{self.folder}: no gradient relevance of {text!r} with {path}; call add_pairs() with "
                "both first"
            ) from None

    def cut(self, text: str) -> int:
        """Returns how many tokens of a text the teacher does not read, being beyond its context."""
        try:
            return int(self.store.read("texts", text_key(text), ["cut"])["cut"])
        except KeyError:  # not stored, or without its tokens
            return self.teacher.tokenize.read(text).cut

    def _record(
        self, kind: str, key: bytes, source: str, extras: Sequence[str], as_stored: bool
    ) -> TeacherRecord:
        columns: dict[str, Any] = self._read(kind, key, source, as_stored=as_stored)
        columns["cut"] = int(columns.get("cut", 0))
        for extra in extras:
            try:
                columns |= self.store.read(f"{kind}:{extra}", key, as_stored=as_stored)
            except KeyError:
                raise CacheError(
                    f"{self.folder}: no {extra!r} of {source!r}; call add({kind}=..., extras=({extra!r},)) "
                    "with it first"
                ) from None
        return TeacherRecord(**columns)

    def _read(
        self, kind: str, key: bytes, source: str, columns: Sequence[str] = (), as_stored: bool = False
    ) -> dict[str, Tensor]:
        try:
            return self.store.read(kind, key, columns, as_stored)
        except KeyError:
            raise CacheError(
                f"{self.folder}: no features of {source!r}; call add({kind}=...) with it first"
            ) from None
