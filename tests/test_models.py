"""The committed weights are what their provenance says, small, and loadable."""

import json

import numpy as np
import pytest

from tdlib.analysis import knowledge
from tdlib.core.files import file_digest
from tdlib.core.paths import ROOT
from tdlib.data.pictures import open_picture
from tdlib.data.vcr import VcrReader
from tdlib.make import page
from tdlib.make.kinds import KINDS
from tdlib.make.measure import open_student
from tdlib.miniworld.writers import Size, write_vcr
from tdlib.students.base import check_tokenizer
from tdlib.students.registry import architecture
from tdlib.teacher.model import Teacher

HOME = ROOT / "data" / "models"
MODELS = sorted(path.parent for path in HOME.glob("*/provenance.json"))


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


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


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_each_tokenizer_is_the_one_that_the_weights_were_trained_with(folder):
    """With another one a model is at chance, however well its training went."""
    if not (folder / "tokenizer.json").exists():
        assert folder.name == "mini-detector"
        return
    assert check_tokenizer(folder, required=True) == provenance(folder)["tokenizer"]


def test_the_page_of_models_says_what_their_provenance_says():
    """Else run python -m tdlib.make page."""
    text = (HOME / "README.md").read_text()
    assert page.with_tables(text, HOME) == text
    for folder in MODELS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{folder.name}` |")]
        made = provenance(folder)
        assert f"{made['minutes']:g} min" in row
        assert ("earlier maker" in row) != page.is_current(made["made_by"])
        shown = ("matching", "matching_hard", "vcr_val", "vcr_val_balanced_known", "caption_of_256", "mood")
        for name in {*shown} & {*made["held_out"]}:
            assert f"| {100 * made['held_out'][name]:.1f} |" in row, name


def test_a_page_without_marks_stays_and_tables_follow_provenance(tmp_path):
    made = {
        "made_by": "tdlib.make.students.make_student", "kind": "vilt", "minutes": 7.5,
        "steps": {"text": 1000, "words": 500}, "held_out": {"matching": 0.9312},
    }  # fmt: skip
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "provenance.json").write_text(json.dumps(made))
    assert page.with_tables("nothing", tmp_path) == "nothing"
    page.write_page(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text(f"a\n{page.BEGIN}\nold\n{page.END}\nb")
    page.write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| `mini` | `python -m tdlib.make vilt` | 1,500 steps, 7.5 min | 93.1 |" in text
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb")
    page.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    gone = page.maker(made | {"made_by": "tdlib.pretraining.pretrain_student"})
    assert gone == "earlier maker, pretraining.pretrain_student"
    assert page.maker(made | {"command": "python a", "budget": "8 minutes"}) == "`python a` (8 minutes)"


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
def test_each_student_prefers_true_captions_of_pictures_it_never_saw(kind, tmp_path):
    """As often as is recorded, within three standard errors."""
    scenes, folder = 96, HOME / KINDS[kind].folder
    made = provenance(folder)
    student, encoder = open_student(folder, HOME / "mini-detector", tmp_path / "regions")
    bare = architecture(str(folder)).reads_regions
    found = knowledge.matching(student, encoder, scenes, seed=501, bare=bare)
    for name, share in found.items():
        recorded = made["held_out"][name]
        assert abs(share - recorded) < 3 * (recorded * (1 - recorded) / scenes) ** 0.5 + 0.01, name
