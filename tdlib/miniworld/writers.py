"""Writes the MiniWorld: the caption corpora here, each data set in its own module, all named here."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tdlib.config import RunConfig
from tdlib.core.files import refuse_foreign, write_folder, write_jsonl
from tdlib.data.tasks import data_folder, task_of
from tdlib.data.vcr import NEUTRAL_NAMES
from tdlib.miniworld.language import curated_captions, web_caption
from tdlib.miniworld.scenes import Scene, sample_scene
from tdlib.miniworld.worlds import (
    STREAMS,
    USUAL_SIZE,
    VERSION,
    Size,
    describe_world,
    save_picture,
    scene_at,
)
from tdlib.miniworld.write_snli_ve import write_snli_ve
from tdlib.miniworld.write_vcr import write_vcr
from tdlib.miniworld.write_vqa import write_vqa, write_vqa_cp

__all__ = [
    "CURATED_READINGS", "VERSION", "WORLDS", "Size", "captioned_scene", "curated_texts",
    "ensure_data", "ensure_world", "scene_at", "write_captions",
    "write_snli_ve", "write_vcr", "write_vqa", "write_vqa_cp",
]  # fmt: skip

CURATED_READINGS = 3  # captions of a curated scene that students learn from
WORLDS: dict[str, Callable[[Path, int, Size], Path]] = {
    "vcr": write_vcr, "snli_ve": write_snli_ve, "vqa_v2": write_vqa, "vqa_cp_v2": write_vqa_cp,
}  # fmt: skip


def ensure_world(data_set: str, folder: Path, seed: int = 0, size: Size = USUAL_SIZE) -> Path:
    """Writes the folder unless it already holds the same world; ``data_set`` is a key of ``WORLDS``."""
    try:
        if json.loads((folder / "miniworld.json").read_text()) == describe_world(data_set, seed, size):
            return folder
    except (OSError, ValueError):
        pass  # no world there, or a damaged one
    return WORLDS[data_set](folder, seed, size)


def ensure_data(config: RunConfig) -> Path:
    """Returns the folder of a run's data; without ``data_dir`` the MiniWorld is written there if need be."""
    folder = data_folder(config)
    return folder if config.data_dir else ensure_world(task_of(config).data_set, folder, config.world_seed)


def _reading(kind: str, seed: int, index: int, reading: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS[kind], index, 1 + reading])


def captioned_scene(kind: str, seed: int, index: int, reading: int = 0) -> tuple[Scene, str]:
    """Makes a scene and its caption of one corpus: "web", "curated", or "held_out" (web, for evaluation).

    Each ``reading`` is another caption of the same scene, as several web pages show one picture.
    """
    rng, scene = _reading(kind, seed, index, reading), scene_at(seed, kind, index)
    spoken = scene
    if kind == "web" and rng.random() < 0.08:  # noise of the web: the caption of another picture
        spoken = sample_scene(rng)
    if kind == "curated":
        return scene, curated_captions(scene, rng, NEUTRAL_NAMES)[0]
    return scene, web_caption(spoken, rng, NEUTRAL_NAMES)


def curated_texts(seed: int, index: int) -> list[str]:
    """Writes three true captions of a curated scene, then the same with one thing changed in each."""
    scene = scene_at(seed, "curated", index)
    readings = (_reading("curated", seed, index, reading) for reading in range(CURATED_READINGS))
    pairs = [curated_captions(scene, rng, NEUTRAL_NAMES) for rng in readings]
    return [true for true, _ in pairs] + [false for _, false in pairs]


def write_captions(folder: Path, kind: str, seed: int, number: int) -> Path:
    """Writes a caption corpus: images/ and captions.jsonl with {"image", "caption"} per line."""
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
