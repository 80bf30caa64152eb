"""The committed weights are what their provenance says, small, and loadable."""

import json

import numpy as np
import pytest

from tdlib.core.files import file_digest
from tdlib.core.paths import ROOT
from tdlib.data.pictures import open_picture
from tdlib.data.vcr import VcrReader
from tdlib.make.kinds import KINDS
from tdlib.make.measure import matching
from tdlib.miniworld.writers import Size, write_vcr
from tdlib.teacher.model import Teacher

MODELS = sorted(path.parent for path in (ROOT / "data" / "models").glob("*/provenance.json"))


def test_there_are_a_teacher_a_detector_and_a_student_of_each_architecture():
    students = {"mini-vilt", "mini-uniter", "mini-vlbert", "mini-visualbert"}
    assert {"mini-clip", "mini-detector"} | students == {folder.name for folder in MODELS}


def test_all_weights_together_are_small():
    total = sum(path.stat().st_size for path in (ROOT / "data" / "models").rglob("*") if path.is_file())
    assert total < 24 * 2**20


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_provenance_names_these_weights(folder):
    made = json.loads((folder / "provenance.json").read_text())
    assert file_digest(folder / made["weights"]) == made["sha256"]
    assert {"made_by", "corpus", "seed", "steps", "held_out"} <= set(made)
    assert made["corpus"].startswith("web" if folder.name == "mini-clip" else "curated")


def test_teacher_knows_a_world_it_never_saw(tmp_path):
    """The recorded zero-shot accuracy holds on a fresh world, within three standard errors."""
    folder = ROOT / "data" / "models" / "mini-clip"
    recorded = json.loads((folder / "provenance.json").read_text())["held_out"]["vcr_val"]
    world = write_vcr(tmp_path / "vcr", 501, Size(train=0, val=60, test=0))
    examples = VcrReader(world, "val").read()
    teacher = Teacher(f"local-dir:{folder}")
    pictures = teacher.encode_pictures([open_picture(example.image) for example in examples])
    texts = teacher.encode_texts([s.text for example in examples for s in example.statements()])
    hits = [
        int(np.argmax([float(texts[4 * i + k].pooled @ picture.pooled) for k in range(4)])) == example.label
        for i, (example, picture) in enumerate(zip(examples, pictures, strict=True))
    ]
    spread = 3 * (recorded * (1 - recorded) / len(hits)) ** 0.5
    assert abs(sum(hits) / len(hits) - recorded) < spread


@pytest.mark.parametrize("kind", KINDS)
def test_each_student_prefers_true_captions_of_pictures_it_never_saw(kind):
    """As often as is recorded, within three standard errors."""
    models, scenes = ROOT / "data" / "models", 96
    folder = models / KINDS[kind].folder
    made = json.loads((folder / "provenance.json").read_text())
    if made["made_by"] != "tdlib.make.students.make_student":
        pytest.skip("its figures were measured otherwise")
    found = matching(folder, models / "mini-detector", scenes, seed=501)
    for name, share in found.items():
        recorded = made["held_out"][name]
        assert abs(share - recorded) < 3 * (recorded * (1 - recorded) / scenes) ** 0.5 + 0.01, name
