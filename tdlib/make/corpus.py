"""Prepares corpora as arrays on disk: drawn, tokenized and read by the detector once, then memory-mapped.

Every folder records from what it was made, and is made again if that differs. Arrays of token ids carry the
digest of their tokenizer, which lies beside them: a maker copies that one into the model's folder.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tdlib.core.files import file_digest, write_folder, write_json
from tdlib.core.provenance import code_of, digest, tokenizer_digest
from tdlib.data.examples import Box
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.make.vocabulary import train_clip_tokenizer, train_wordpiece_tokenizer, vocabulary_texts
from tdlib.method.tokens import grid_boxes
from tdlib.miniworld import drawing
from tdlib.miniworld.drawing import draw
from tdlib.miniworld.language import two_parts
from tdlib.miniworld.scenes import (
    HELD,
    MOODS,
    PLACES,
    POSES,
    ROLES,
    SHIRTS,
    THINGS,
    WEATHER,
    Scene,
    curated_names,
)
from tdlib.miniworld.writers import CURATED_READINGS, VERSION, captioned_scene, curated_texts, scene_at
from tdlib.regions.backbones import load_detector
from tdlib.students.base import LONGEST

SIZE = 96  # pixels of a side, as all mini models see pictures
CLIP_LONGEST = 48
WEB_FIRST = 1_000_000  # web scenes start here, beyond any other use of the stream
READINGS = {"curated": CURATED_READINGS, "web": 5}  # captions of a scene
GRID = (6, 6)
MOST_OBJECTS = 6  # people, held things and things of a curated scene; people and things are at most three
_CHUNK = 250  # scenes that a process makes at a time
_WORKERS = 2  # processes


# Folders of arrays


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Opens the arrays of a folder that ``write_arrays`` wrote, memory-mapped."""
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


@cache
def corpus_code() -> str:
    """Hash of the code that decides what a prepared corpus holds, without docstrings."""
    home = Path(__file__).parents[1]
    names = ("make/corpus.py", "make/vocabulary.py", "regions/backbones.py", "method/tokens.py")
    files = [*(home / name for name in names), *sorted((home / "miniworld").glob("*.py"))]
    return digest([[file.name, code_of(file)] for file in files] + [NEUTRAL_NAMES, LONGEST])


def write_arrays(
    folder: Path,
    made: dict[str, Any],
    number: int,
    work: Callable[[int, int], dict[str, np.ndarray]],
    beside: Callable[[Path], None] = lambda folder: None,
) -> dict[str, np.ndarray]:
    """Makes arrays of ``number`` rows each in processes, one chunk of rows after the other.

    A folder whose ``made.json`` equals ``made``, and that the same code has made, is only read. ``work``,
    called with start and stop, returns the rows [start, stop) of every array. ``beside`` writes other
    files to the folder.
    """
    made = json.loads(json.dumps(made | {"rows": number, "code": corpus_code()}))
    try:
        if json.loads((folder / "made.json").read_text(encoding="utf-8")) == made:
            return read_arrays(folder)
    except (OSError, ValueError):
        pass  # there is no such folder, or it is damaged

    def fill(partial: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        starts = range(0, number, _CHUNK)
        stops = [min(start + _CHUNK, number) for start in starts]
        with ProcessPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for start, stop, part in zip(starts, stops, pool.map(work, starts, stops), strict=True):
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


ATTRIBUTES = {
    "name": ["person", *curated_names(HELD), *curated_names(THINGS)],
    "shirt": curated_names(SHIRTS),
    "pose": list(POSES),
    "mood": curated_names(MOODS),
    "role": ["none", *curated_names(ROLES)],
    "place": curated_names(PLACES),
    "weather": ["indoors", *curated_names(WEATHER)],
}  # the values that occur in the curated corpus
_MOST = 14  # boxes of one picture: itself, three people with face, hat and held thing, or fewer and things


def labelled_boxes(scene: Scene, picture: drawing.Picture) -> list[tuple[Box, dict[str, str]]]:
    """Lists boxes (normalised xyxy) with their attributes; the whole picture comes first."""

    def box(drawn: drawing.Drawn) -> Box:
        left, top, right, bottom = drawn.box
        return left / drawing.SIZE, top / drawing.SIZE, right / drawing.SIZE, bottom / drawing.SIZE

    found: list[tuple[Box, dict[str, str]]] = [
        ((0.0, 0.0, 1.0, 1.0), {"place": scene.place, "weather": scene.weather or "indoors"})
    ]
    for person, body, face, hat, held in zip(
        scene.people, picture.people, picture.faces, picture.hats, picture.held, strict=True
    ):
        mood, role = {"mood": person.mood}, {"role": person.role or "none"}
        said = {"name": "person", "shirt": person.shirt, "pose": person.pose} | mood | role
        found += [(box(body), said), (box(face), mood)]
        if hat:
            found.append((box(hat), role))
        if held and person.held:
            found.append((box(held), {"name": person.held}))
    return found + [
        (box(drawn), {"name": name}) for name, drawn in zip(scene.things, picture.things, strict=True)
    ]


def _shown(picture: drawing.Picture) -> np.ndarray:
    image = picture.image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _draw_web(seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
    scenes = (scene_at(seed, "web", WEB_FIRST + index) for index in range(start, stop))
    return {"pictures": np.stack([_shown(draw(scene)) for scene in scenes])}


def _draw_curated(seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
    boxes = np.zeros((stop - start, _MOST, 4), np.float32)
    labels = np.full((stop - start, _MOST, len(ATTRIBUTES)), -1, np.int64)
    shown = []
    for row, index in enumerate(range(start, stop)):
        scene = scene_at(seed, "curated", index)
        picture = draw(scene)
        shown.append(_shown(picture))
        for number, (place, said) in enumerate(labelled_boxes(scene, picture)):
            boxes[row, number] = place
            for column, (name, values) in enumerate(ATTRIBUTES.items()):
                if name in said:
                    labels[row, number, column] = values.index(said[name])
    return {"pictures": np.stack(shown), "boxes": boxes, "labels": labels}


def pictures(kind: str, home: Path, seed: int, number: int) -> dict[str, np.ndarray]:
    """Prepares ``pictures`` (number, 3, 96, 96) uint8 of a corpus; of the curated one also boxes and labels.

    Boxes (number, 14, 4) are normalised xyxy. Labels (number, 14, attributes) are indices into the values
    of ``ATTRIBUTES``, -1 if a box has no value of the attribute; rows of -1 only are no boxes.
    """
    work = partial({"web": _draw_web, "curated": _draw_curated}[kind], seed)
    made = {"what": f"{kind} pictures", "world": VERSION, "seed": seed, "size": SIZE}
    return write_arrays(home / f"{kind}-pictures-{seed}-{number}", made, number, work)


def distorted(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes how pictures look and not what they show: a photometric distortion of each (Liu et al. 2016).

    Colours get paler or stronger, tones darker or lighter, all of them pressed into a part of the range,
    edges softer or sharper. ``pictures`` and the result are (pictures, 3, height, width), 0 to 1.
    """

    def drawn(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(pictures), 1, 1, 1)).astype(np.float32))

    grey = pictures.mean(1, keepdim=True)
    changed = (grey + drawn(0.5, 1.4) * (pictures - grey)).clamp(0, 1) ** drawn(-0.7, 0.7).exp()
    darkest = drawn(0.0, 0.6)
    changed = darkest + (1 - darkest) * drawn(0.7, 1.0) * changed
    soft = F.avg_pool2d(changed, 3, stride=1, padding=1, count_include_pad=False)
    return (changed + drawn(-1.0, 3.0) * (changed - soft)).clamp(0, 1)


# Texts


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


def texts(kind: str, home: Path, seed: int, number: int) -> Texts:
    """Prepares texts of "curated" or "web" scenes as students read them, or of web scenes as "clip" does."""
    with_clip = kind == "clip"
    tokenizer = _tokenizer(with_clip, seed)
    digest = tokenizer_digest(tokenizer)
    made = {
        "what": f"{kind} texts", "world": VERSION, "seed": seed, "tokenizer": digest,
        "longest": CLIP_LONGEST if with_clip else LONGEST,
    }  # fmt: skip
    folder = home / f"{kind}-texts-{seed}-{number}-{digest[:8]}"
    work: Callable[[int, int], dict[str, np.ndarray]] = (
        partial(_tokenize_for_clip, seed, tokenizer)
        if with_clip
        else partial(_tokenize_scenes, kind, seed, tokenizer)
    )

    def beside(partial: Path) -> None:
        tokenizer.save_pretrained(partial / "tokenizer")

    arrays = write_arrays(folder, made, number, work, beside)
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
        labels: (pictures, boxes, attributes), as in ``pictures``.

    Returns:
        Boxes (pictures, 6, 4), a mask of the real ones (pictures, 6), and the number of people
        (pictures,).
    """
    names = labels[..., list(ATTRIBUTES).index("name")]  # "person" is 0; faces and hats have none
    real = names >= 0
    order = torch.where(real, names, len(ATTRIBUTES["name"])).argsort(dim=1, stable=True)[:, :MOST_OBJECTS]
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), real.gather(1, order), (names == 0).sum(1)


@torch.no_grad()
def _see(seed: int, folder: Path, detector: Path, start: int, stop: int) -> dict[str, np.ndarray]:
    arrays = read_arrays(folder)
    shown, found, labels = (
        torch.from_numpy(np.array(arrays[name][start:stop])) for name in ("pictures", "boxes", "labels")
    )
    found, real, people = object_boxes(found, labels)
    cells, whole = grid_boxes(*GRID), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    boxes = torch.cat([whole.expand(len(shown), 1, 4), found, cells.expand(len(shown), -1, 4)], dim=1)
    mask = torch.cat([real.new_ones(len(shown), 1), real, real.new_ones(len(shown), len(cells))], dim=1)
    network = load_detector(detector)
    places = [box[there] for box, there in zip(boxes, mask, strict=True)]
    otherwise = (255 * distorted(shown / 255, np.random.default_rng([seed, start]))).round().byte()
    seen = {}
    for name, look in {"features": shown, "distorted": otherwise}.items():
        features = torch.zeros(*mask.shape, network.dim, dtype=torch.half)
        features[mask] = network(look, places).half()
        seen[name] = features.numpy()
    return seen | {
        "boxes": boxes.numpy(), "real": real.numpy(), "people": people.numpy().astype(np.int8),
    }  # fmt: skip


def regions(home: Path, seed: int, number: int, detector: Path) -> dict[str, np.ndarray]:
    """Prepares the regions of curated scenes, as ``BackboneRegions`` computes them with "boxes+grid".

    Returns:
        ``features`` (scenes, 43, dim) in half precision and ``boxes`` (scenes, 43, 4) of the whole
        picture, six places for objects and the cells of the grid; ``distorted``, as ``features``: of the
        picture after one distortion; ``real`` (scenes, 6): a mask of the objects; ``people`` (scenes,): how
        many of the objects, the first ones, are people.
    """
    pictures("curated", home, seed, number)
    source = home / f"curated-pictures-{seed}-{number}"
    digest = file_digest(detector / "model.safetensors")
    made = {
        "what": "curated regions, and distorted", "world": VERSION, "seed": seed, "detector": digest,
        "grid": GRID,
    }  # fmt: skip
    folder = home / f"curated-regions-{seed}-{number}-{digest[:8]}"
    return write_arrays(folder, made, number, partial(_see, seed, source, detector))


# Order


def batch_at(number: int, batch: int, seed: int, place: int) -> np.ndarray:
    """Returns the rows of batch ``place`` of shuffled batches, epoch after epoch.

    Rows that do not fill a batch are left out of their epoch; the next one shuffles all rows again.
    """
    epoch, place = divmod(place, number // batch)
    return np.random.default_rng([seed, epoch]).permutation(number)[place * batch : (place + 1) * batch]
