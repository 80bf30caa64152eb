"""Prepares corpora as arrays on disk: drawn, tokenized and read by the detector once, then memory-mapped.

Every folder records from what it was made, and is made again if that differs. Arrays of token ids carry the
digest of their tokenizer, which lies beside them: a maker copies that one into the model's folder.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tdlib.core.files import file_digest, write_folder, write_json
from tdlib.data.examples import DataError
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.make.detector import ATTRIBUTES, render_boxes
from tdlib.make.vocabulary import train_clip_tokenizer, train_wordpiece_tokenizer, vocabulary_texts
from tdlib.method.tokens import grid_boxes
from tdlib.miniworld.drawing import draw
from tdlib.miniworld.language import two_parts
from tdlib.miniworld.writers import CURATED_READINGS, VERSION, captioned_scene, curated_texts, scene_at
from tdlib.regions.backbones import load_detector
from tdlib.students.base import LONGEST, tokenizer_digest

SIZE = 96  # pixels of a side, as all mini models see pictures
CLIP_LONGEST = 48
WEB_FIRST = 1_000_000  # web scenes start here, beyond any other use of the stream
READINGS = {"curated": CURATED_READINGS, "web": 5}  # captions of a scene
GRID = (6, 6)
MOST_OBJECTS = 6  # people, held things and things of a curated scene; people and things are at most three
_CHUNK = 250  # scenes that a process makes at a time


# Folders of arrays


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Opens the arrays of a folder that ``write_arrays`` wrote, memory-mapped."""
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def write_arrays(
    folder: Path,
    made: dict[str, Any],
    number: int,
    work: Callable[..., dict[str, np.ndarray]],
    arguments: tuple[Any, ...],
    workers: int,
    beside: Callable[[Path], None] = lambda folder: None,
) -> dict[str, np.ndarray]:
    """Makes arrays of ``number`` rows each in processes, one chunk of rows after the other.

    A folder whose ``made.json`` equals ``made`` is only read. ``work`` returns the rows [start, stop) of
    every array; it is called with ``arguments``, start and stop. ``beside`` writes other files to the folder.
    """
    made = json.loads(json.dumps(made | {"rows": number}))
    try:
        if json.loads((folder / "made.json").read_text(encoding="utf-8")) == made:
            return read_arrays(folder)
    except (OSError, ValueError):
        pass  # there is no such folder, or it is damaged

    def fill(partial: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        starts = range(0, number, _CHUNK)
        stops = [min(start + _CHUNK, number) for start in starts]
        with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = pool.map(work, *([value] * len(starts) for value in arguments), starts, stops)
            for start, stop, part in zip(starts, stops, parts, strict=True):
                for name, rows in part.items():
                    if name not in arrays:
                        arrays[name] = np.lib.format.open_memmap(
                            partial / f"{name}.npy", "w+", rows.dtype, (number, *rows.shape[1:])
                        )
                    arrays[name][start:stop] = rows
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        beside(partial)
        write_json(partial / "made.json", made)

    write_folder(folder, fill)
    return read_arrays(folder)


# Pictures


def _draw_web(seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
    pictures = np.empty((stop - start, 3, SIZE, SIZE), np.uint8)
    for row, index in enumerate(range(start, stop)):
        image = draw(scene_at(seed, "web", WEB_FIRST + index)).image
        pictures[row] = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return {"pictures": pictures}


def _draw_curated(seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
    pictures, boxes, labels = render_boxes((seed, start, stop, SIZE))
    return {"pictures": pictures, "boxes": boxes, "labels": labels}


def pictures(kind: str, home: Path, seed: int, number: int, workers: int = 2) -> dict[str, np.ndarray]:
    """Prepares ``pictures`` (number, 3, 96, 96) uint8 of a corpus; of the curated one also boxes and labels.

    Boxes and labels are as in ``boxes_corpus``.
    """
    work = {"web": _draw_web, "curated": _draw_curated}[kind]
    made = {"what": f"{kind} pictures", "world": VERSION, "seed": seed, "size": SIZE}
    return write_arrays(home / f"{kind}-pictures-{seed}-{number}", made, number, work, (seed,), workers)


# Texts


def check_tokens(tokenizer: PreTrainedTokenizerFast, digest: str, where: str) -> None:
    """Refuses arrays of token ids that another tokenizer made."""
    found = tokenizer_digest(tokenizer)
    if found != digest:
        raise DataError(
            f"{where}: its tokenizer ({found[:12]}) is not the one that the corpus was tokenized with "
            f"({digest[:12]}); a model trained on these ids would read other words. Take the tokenizer that "
            "lies beside the arrays, or tokenize the corpus with this one"
        )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], longest: int = LONGEST
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes texts as students read a question and a choice: [CLS] question [SEP] answer [SEP].

    A text without a question is one part: [CLS] text [SEP]. Longer ones are cut, the longest part first.

    Returns:
        Ids (texts, longest) uint16, padded; the person that each token names (texts, longest) int8, -1
        if none: captions call person i by the i-th neutral name.
    """
    parts = [part for text in texts for part in two_parts(text)]
    encoded = tokenizer(parts, add_special_tokens=False, return_offsets_mapping=True, padding=False)
    ids = np.full((len(texts), longest), tokenizer.pad_token_id, np.uint16)
    named = np.full((len(texts), longest), -1, np.int8)
    for row in range(len(texts)):
        pieces = []
        for part in (2 * row, 2 * row + 1):
            names = {
                place: NEUTRAL_NAMES.index(word[0])
                for word in re.finditer(r"\w+", parts[part])
                if word[0] in NEUTRAL_NAMES
                for place in range(word.start(), word.end())
            }
            tokens = zip(encoded["input_ids"][part], encoded["offset_mapping"][part], strict=True)
            pieces.append([(token, names.get(span[0], -1)) for token, span in tokens])
        pieces = [piece for piece in pieces if piece] or [[]]
        while sum(map(len, pieces)) > longest - 1 - len(pieces):
            max(pieces, key=len).pop()
        row_tokens = [(tokenizer.cls_token_id, -1)]
        for piece in pieces:
            row_tokens += [*piece, (tokenizer.sep_token_id, -1)]
        ids[row, : len(row_tokens)] = [token for token, _ in row_tokens]
        named[row, : len(row_tokens)] = [person for _, person in row_tokens]
    return ids, named


def replaced_words(true: Sequence[int], false: Sequence[int]) -> np.ndarray:
    """Marks the tokens of a false statement that its true one lacks; the two differ in one place."""
    replaced = np.zeros(len(false), bool)
    for kind, _, _, start, stop in SequenceMatcher(None, true, false, autojunk=False).get_opcodes():
        if kind in ("replace", "insert"):
            replaced[start:stop] = True
    return replaced


def web_texts(seed: int, index: int) -> list[str]:
    """Writes five captions of a web scene."""
    return [captioned_scene("web", seed, WEB_FIRST + index, reading)[1] for reading in range(READINGS["web"])]


@cache
def _tokenizer(with_clip: bool, seed: int) -> PreTrainedTokenizerFast:
    return (train_clip_tokenizer if with_clip else train_wordpiece_tokenizer)(vocabulary_texts(seed))


_TEXTS = {"curated": curated_texts, "web": web_texts}


def _tokenize_scenes(
    kind: str, seed: int, tokenizer: PreTrainedTokenizerFast, start: int, stop: int
) -> dict[str, np.ndarray]:
    texts = [_TEXTS[kind](seed, index) for index in range(start, stop)]
    ids, named = tokenize(tokenizer, [text for scene in texts for text in scene])
    ids, named = (array.reshape(len(texts), -1, LONGEST) for array in (ids, named))
    if kind == "web":
        return {"ids": ids}
    half = READINGS["curated"]
    replaced = np.zeros(ids.shape, bool)
    for scene, rows in enumerate(ids.tolist()):
        rows = [[token for token in row if token != tokenizer.pad_token_id] for row in rows]
        for reading, (true, false) in enumerate(zip(rows[:half], rows[half:], strict=True)):
            replaced[scene, half + reading, : len(false)] = replaced_words(true, false)
    return {"ids": ids, "named": named, "replaced": replaced}


def _tokenize_for_clip(
    seed: int, tokenizer: PreTrainedTokenizerFast, start: int, stop: int
) -> dict[str, np.ndarray]:
    texts = [text for index in range(start, stop) for text in web_texts(seed, index)]
    encoded = tokenizer(texts, truncation=True, max_length=CLIP_LONGEST, padding="max_length")["input_ids"]
    return {"ids": np.array(encoded, np.uint16).reshape(stop - start, -1, CLIP_LONGEST)}


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts of many scenes, and the folder of the tokenizer that made them.

    ``ids`` (scenes, texts, tokens) uint16. For students also, of the curated corpus, ``named`` (which
    person a token names, -1 for none) and ``replaced`` (whether a token is what makes a caption false), both
    of that shape; per scene the true captions come first.
    """

    ids: np.ndarray
    tokenizer: Path
    digest: str
    named: np.ndarray | None = None
    replaced: np.ndarray | None = None


def texts(kind: str, home: Path, seed: int, number: int, workers: int = 2) -> Texts:
    """Prepares texts of "curated" or "web" scenes as students read them, or of web scenes as "clip" does."""
    with_clip = kind == "clip"
    tokenizer = _tokenizer(with_clip, seed)
    digest = tokenizer_digest(tokenizer)
    made = {
        "what": f"{kind} texts", "world": VERSION, "seed": seed, "tokenizer": digest,
        "longest": CLIP_LONGEST if with_clip else LONGEST,
    }  # fmt: skip
    folder = home / f"{kind}-texts-{seed}-{number}-{digest[:8]}"
    work = _tokenize_for_clip if with_clip else _tokenize_scenes
    arguments = (seed, tokenizer) if with_clip else (kind, seed, tokenizer)

    def beside(partial: Path) -> None:
        tokenizer.save_pretrained(partial / "tokenizer")

    arrays = write_arrays(folder, made, number, work, arguments, workers, beside)
    return Texts(**arrays, tokenizer=folder / "tokenizer", digest=digest)


def said_words(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Marks the tokens in the texts (scenes, texts, tokens) of each scene: (scenes, vocabulary) bool."""
    said = np.zeros((len(ids), vocabulary), bool)
    for start in range(0, len(ids), 4096):
        rows = np.arange(start, min(start + 4096, len(ids)))
        said[rows[:, None], ids[rows].reshape(len(rows), -1)] = True
    return said


# Regions


def object_boxes(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the objects of curated pictures that VCR lists: people first, then things.

    Args:
        boxes: (pictures, boxes, 4) and
        labels: (pictures, boxes, attributes), of ``boxes_corpus``.

    Returns:
        Boxes (pictures, 6, 4), a mask of the real ones (pictures, 6), and the number of people
        (pictures,).
    """
    names = labels[..., list(ATTRIBUTES).index("name")]  # "person" is 0; faces and hats have none
    real = names >= 0
    order = torch.where(real, names, len(ATTRIBUTES["name"])).argsort(dim=1, stable=True)[:, :MOST_OBJECTS]
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), real.gather(1, order), (names == 0).sum(1)


@torch.no_grad()
def _see(folder: Path, detector: Path, start: int, stop: int) -> dict[str, np.ndarray]:
    arrays = read_arrays(folder)
    shown, found, labels = (
        torch.from_numpy(np.array(arrays[name][start:stop])) for name in ("pictures", "boxes", "labels")
    )
    found, real, people = object_boxes(found, labels)
    cells, whole = grid_boxes(*GRID), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    boxes = torch.cat([whole.expand(len(shown), 1, 4), found, cells.expand(len(shown), -1, 4)], dim=1)
    mask = torch.cat([real.new_ones(len(shown), 1), real, real.new_ones(len(shown), len(cells))], dim=1)
    network = load_detector(detector)
    if network.size != SIZE:
        raise DataError(
            f"{detector}: sees pictures of {network.size} pixels, but the corpus has {SIZE}; train the "
            f"detector with size={SIZE}"
        )
    features = torch.zeros(*mask.shape, network.dim, dtype=torch.half)
    places = [box[there] for box, there in zip(boxes, mask, strict=True)]
    features[mask] = network(shown, places).half()
    return {
        "features": features.numpy(), "boxes": boxes.numpy(), "real": real.numpy(),
        "people": people.numpy().astype(np.int8),
    }  # fmt: skip


def regions(home: Path, seed: int, number: int, detector: Path, workers: int = 2) -> dict[str, np.ndarray]:
    """Prepares the regions of curated scenes, as ``BackboneRegions`` computes them with "boxes+grid".

    Returns:
        ``features`` (scenes, 43, dim) in half precision and ``boxes`` (scenes, 43, 4) of the whole
        picture, six places for objects and the cells of the grid; ``real`` (scenes, 6): a mask of the
        objects; ``people`` (scenes,): how many of the objects, the first ones, are people.
    """
    pictures("curated", home, seed, number, workers)
    source = home / f"curated-pictures-{seed}-{number}"
    digest = file_digest(detector / "model.safetensors")
    made = {"what": "curated regions", "world": VERSION, "seed": seed, "detector": digest, "grid": GRID}
    folder = home / f"curated-regions-{seed}-{number}-{digest[:8]}"
    return write_arrays(folder, made, number, _see, (source, detector), workers)


# Order


def batches(number: int, batch: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yields rows of shuffled batches, epoch after epoch, from batch ``start`` on.

    Rows that do not fill a batch are left out of their epoch; the next one shuffles all rows again.
    """
    per_epoch, epoch, order = number // batch, -1, np.empty(0, np.int64)
    while True:
        if start // per_epoch != epoch:
            epoch = start // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(number)
        place = start % per_epoch * batch
        yield order[place : place + batch]
        start += 1
