"""Parts that the writers of all data sets share: streams of scenes, pictures on disk, side files, folders.

Everything is a function of the seed: the same call writes the same bytes. A folder appears under
its final name only when it is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from tdlib.core.files import refuse_foreign, write_folder
from tdlib.miniworld.drawing import SIZE, Picture, draw
from tdlib.miniworld.language import curated_concepts
from tdlib.miniworld.scenes import STYLES, Scene, reserved, sample_scene

VERSION = 2  # raise it when the same seed would give other pictures or texts
SIDE_FILES = 3  # raise it when side files change: since 3 every task has *.concepts.jsonl
STRATA = ["concept", "style", "style_known"]  # columns of ``strata_of``, read from side files
TRAIN_STYLES = ("flat", "pastel", "sketch")  # "noir" is kept for the style shift
_CAPTIONS = ("web", "curated", "held_out")
STREAMS = {
    name: number
    for number, name in enumerate(
        (
            *("train", "val", "test", *_CAPTIONS, "val_style", "val_composition"),
            *("snli_ve_train", "snli_ve_dev", "snli_ve_test", "snli_ve_dev_style", "snli_ve_dev_composition"),
            *("train2014", "val2014", "test2015", "val2014_style", "val2014_composition"),
        )
    )
}  # a stream's number seeds its scenes: append only

Item = TypeVar("Item")


@dataclass(frozen=True)
class Size:
    """Number of pictures per split; about two questions or pairs are written about each.

    ``train_examples`` asks for about that many training examples in place of two a picture: many
    texts about few pictures (SNLI-VE: a multiple of three).
    """

    train: int = 900
    val: int = 300  # SNLI-VE calls the split dev
    test: int = 60
    shifted: int = 150  # each of the two sets with other pictures: style and composition
    train_examples: int | None = None

    @classmethod
    def of(cls, pictures: int) -> "Size":
        """The usual proportions for this many training pictures."""
        return cls(train=pictures, val=max(pictures // 3, 30), test=max(pictures // 15, 30))


USUAL_SIZE = Size()


def scene_at(seed: int, stream: str, index: int) -> Scene:
    """Draws scene number ``index`` of a stream; streams of one seed share no scene.

    Scenes of tasks have the training styles and no reserved combination, except in the streams that shift
    just that. The caption corpora have all of their concepts in all combinations.
    """
    rng = np.random.default_rng([seed, STREAMS[stream], index])
    if stream in _CAPTIONS:
        return sample_scene(rng, curated=stream == "curated")
    styles = ("noir",) if stream.endswith("_style") else TRAIN_STYLES
    while True:
        scene = sample_scene(rng, styles=styles)
        if reserved(scene) == stream.endswith("_composition"):
            return scene


def save_picture(scene: Scene, path: Path) -> Picture:
    picture = draw(scene)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(path, quality=92)
    return picture


def regions(scene: Scene, picture: Picture) -> dict[str, list[float]]:
    """Lists the boxes (pixels, xyxy) of everything to which words can refer.

    Keys: "all", "weather", "place", names of things and held things, and with a person's number
    "person0", "face0", "bare0" (the head of someone without a hat), "hat0", "held0".
    """
    boxes: dict[str, Sequence[float]] = {
        "all": (0.0, 0.0, SIZE, SIZE), "weather": (0.0, 0.0, SIZE, 176.0), "place": picture.landmark.box,
    }  # fmt: skip
    for i, person in enumerate(scene.people):
        boxes[f"person{i}"], boxes[f"face{i}"] = picture.people[i].box, picture.faces[i].box
        hat, held = picture.hats[i], picture.held[i]
        boxes[f"hat{i}" if hat else f"bare{i}"] = (hat or picture.faces[i]).box
        if person.held and held:
            boxes[f"held{i}"] = held.box
            boxes.setdefault(person.held, held.box)
    boxes |= {name: shape.box for name, shape in zip(scene.things, picture.things, strict=True)}
    return {name: [round(float(value), 1) for value in box] for name, box in boxes.items()}


def concepts(
    identifier: str | int, scene: Scene, family: str, right: Sequence[str], wrong: Iterable[Sequence[str]]
) -> dict[str, Any]:
    """Describes the concepts of an example, and whether the curated corpus, which students read, has them.

    Args:
        identifier: of the example.
        scene: what its picture shows.
        family: of questions whose answers compete, or of statements.
        right: concepts of the question and its right answer, or of the statement.
        wrong: those of each wrong answer.

    Returns:
        A line of ``*.concepts.jsonl``.
    """
    has = curated_concepts()

    def said(named: Sequence[str]) -> dict[str, Any]:
        unique = list(dict.fromkeys(named))
        return {"concepts": unique, "known": all(has[name] for name in unique) if unique else None}

    return {
        "id": str(identifier), "family": family, "right": said(right), "wrong": [said(one) for one in wrong],
        "style": scene.style, "style_known": STYLES[scene.style],
    }  # fmt: skip


def read_concepts(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """Reads the concepts of a split's examples by id; nothing if there is no such file.

    A line has ``right`` (VCR: the right answer; SNLI-VE: the hypothesis; VQA: question and right answer)
    and ``wrong`` (the wrong answers, in no order of the choices; of VQA all others that questions of this
    kind have), each as {"concepts", "known"}, and the picture's ``style`` with ``style_known``. "known" is
    true if the curated corpus, from which the mini students learn, has all of the concepts, and null if there
    are none ("how many people are there?"). A reworded split ("val_shortcut", "dev_balanced") has the lines
    of its source.
    """
    for stem in (split, split.split("_")[0]):
        for start in ("", "snli_ve_", "v2_mscoco_", "vqacp_v2_"):
            path = Path(folder) / f"{start}{stem}.concepts.jsonl"
            if path.is_file():
                lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                return {line["id"]: line for line in lines}
    return {}


def strata_of(folder: Path | str, split: str) -> pd.DataFrame:
    """Tabulates the strata of a split's questions, by question; no rows if the data have no side file.

    Columns: ``concept`` is "known" if the corpus from which the mini students learned has everything that
    question and right answer, or hypothesis, name, else "unknown", and "" if they name no concept; ``style``
    is that of the picture; ``style_known`` is "known" if the corpus has it, else "unknown".

    Args:
        folder: of the data set; "" for none.
        split: of it.
    """
    lines = read_concepts(Path(folder), split) if folder else {}
    names = {True: "known", False: "unknown", None: ""}
    rows = [
        (names[line["right"]["known"]], line["style"], names[line["style_known"]]) for line in lines.values()
    ]
    return pd.DataFrame(rows, columns=STRATA, index=pd.Index(list(lines), dtype=object), dtype=object)


def strata_by_row(folder: Path | str, split: str, questions: pd.Series) -> pd.DataFrame:
    """Looks up the strata of questions of a split, by the rows' index; "" where the data do not say."""
    return strata_of(folder, split).reindex(questions).fillna("").set_index(questions.index)


class Deck(Generic[Item]):
    """Deals (scene, item) pairs in random order, each once before any comes again.

    It deals the one of the next eight whose scene was used least so far, by all decks that share ``used``, so
    that questions spread over the pictures.
    """

    def __init__(self, pairs: Iterable[tuple[int, Item]], used: dict[int, int]):
        self._pairs, self._used = list(pairs), used
        self._left: list[tuple[int, Item]] = []

    def deal(self, rng: np.random.Generator) -> tuple[int, Item]:
        if not self._left:
            self._left = [self._pairs[int(i)] for i in rng.permutation(len(self._pairs))]
        near = range(max(len(self._left) - 8, 0), len(self._left))
        scene, item = self._left.pop(min(near, key=lambda i: self._used.get(self._left[i][0], 0)))
        self._used[scene] = self._used.get(scene, 0) + 1
        return scene, item


@contextmanager
def writing_lines(folder: Path) -> Iterator[Callable[[str, Any], None]]:
    """Writes several JSONL files at once: yields ``write(name, record)``, which appends a line."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def write(name: str, record: Any) -> None:
            if name not in files:
                files[name] = stack.enter_context((folder / name).open("w", encoding="utf-8"))
            files[name].write(json.dumps(record, ensure_ascii=False) + "\n")

        yield write


def describe_world(data: str, seed: int, size: Size) -> dict[str, Any]:
    """Makes the description that is written beside a world, by which it is recognised."""
    about = {"generator": VERSION, "side_files": SIDE_FILES, "data": data, "seed": seed}
    return about | {"size": vars(size)}


def write_world(folder: Path, description: dict[str, Any], fill: Callable[[Path], None]) -> Path:
    """Fills a folder and marks it as written by the generator."""
    refuse_foreign(Path(folder), "miniworld.json")

    def marked(partial: Path) -> None:
        fill(partial)
        (partial / "miniworld.json").write_text(json.dumps(description))

    return write_folder(folder, marked)
