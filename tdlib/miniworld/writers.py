"""Writes the MiniWorld: the caption corpora here, each data set in its own module, all named here."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tdlib.core.files import write_folder, write_jsonl
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.miniworld.drawing import Picture, draw
from tdlib.miniworld.language import curated_captions, web_caption
from tdlib.miniworld.scenes import Scene, sample_scene
from tdlib.miniworld.worlds import STREAMS, TRAIN_STYLES, VERSION, refuse_foreign, save_picture, scene_at
from tdlib.miniworld.write_snli_ve import SnliVeSize, ensure_snli_ve, write_snli_ve
from tdlib.miniworld.write_vcr import ECHO, VcrSize, ensure_vcr, write_vcr
from tdlib.miniworld.write_vqa import VqaSize, ensure_vqa, ensure_vqa_cp, write_vqa, write_vqa_cp

__all__ = [
    "ECHO", "TRAIN_STYLES", "VERSION", "SnliVeSize", "VcrSize", "VqaSize", "captioned_scene", "captions",
    "digest", "ensure_snli_ve", "ensure_vcr", "ensure_vqa", "ensure_vqa_cp", "false_caption", "scene_at",
    "write_captions",
    "write_snli_ve", "write_vcr", "write_vqa", "write_vqa_cp",
]  # fmt: skip


def captioned_scene(kind: str, seed: int, index: int, reading: int = 0) -> tuple[Scene, str]:
    """A scene and its caption of one corpus: "web", "curated", or "held_out" (web, for evaluation).

    Other readings are other captions of the same scene, as several pages show one picture.
    """
    rng = np.random.default_rng([seed, STREAMS[kind], index, 1 + reading])
    scene = scene_at(seed, kind, index)
    spoken = scene
    if kind == "web" and rng.random() < 0.08:  # a caption that belongs to another picture
        spoken = sample_scene(rng)
    if kind == "curated":
        return scene, curated_captions(scene, rng, NEUTRAL_NAMES)[0]
    return scene, web_caption(spoken, rng, NEUTRAL_NAMES)


def false_caption(seed: int, index: int, reading: int = 0) -> str:
    """The caption of a curated scene with one thing in it changed: see ``curated_captions``."""
    rng = np.random.default_rng([seed, STREAMS["curated"], index, 1 + reading])
    return curated_captions(scene_at(seed, "curated", index), rng, NEUTRAL_NAMES)[1]


def captions(kind: str, seed: int, stop: int, start: int = 0) -> Iterator[tuple[Picture, str]]:
    """Pictures with captions of one corpus, see ``captioned_scene``."""
    for index in range(start, stop):
        scene, caption = captioned_scene(kind, seed, index)
        yield draw(scene), caption


def write_captions(folder: Path, kind: str, seed: int, number: int) -> Path:
    """Writes a caption corpus: images/ and captions.jsonl with {"image", "caption"} per line.

    Raises:
        DataError: the folder holds something else.
    """
    refuse_foreign(Path(folder), "captions.jsonl")

    def fill(partial: Path) -> None:
        (partial / "images").mkdir()
        records = []
        for index in range(number):
            scene, caption = captioned_scene(kind, seed, index)
            name = f"images/{index:06d}.jpg"
            save_picture(scene, partial / name)
            records.append({"image": name, "caption": caption})
        write_jsonl(partial / "captions.jsonl", records)

    return write_folder(folder, fill)


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
