"""A task that a notebook cell adds: the README's, on files in its format, through every kind of arm."""

import json
import linecache
import re
from dataclasses import fields, replace

import pandas as pd
import pytest
from torch.testing import assert_close

from tdlib.config import ConfigError, RunConfig, apply_arm
from tdlib.core.paths import ROOT
from tdlib.core.places import Reference
from tdlib.core.records import read_records
from tdlib.data.examples import DataError, low_shot
from tdlib.data.json_files import Records
from tdlib.data.tasks import TASKS, user_task
from tdlib.training.data import collate
from tdlib.training.prepare import class_logits, prepare, read_split, shuffled_pictures
from tdlib.training.processes import launch
from tdlib.training.run import _Run, compare, train_run


@pytest.fixture(scope="module")
def vsr(worlds, tmp_path_factory):
    """SNLI-VE's pairs with a verdict, as VSR's lines."""
    source, folder = worlds["snli_ve"], tmp_path_factory.mktemp("vsr")
    (folder / "images").symlink_to(source / "flickr30k_images")
    for split in ("train", "dev"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, pair in enumerate(Records.lines(source / f"snli_ve_{split}.jsonl", "SNLI-VE")):
                if pair["gold_label"] != "neutral":
                    line = {
                        "image": f"{pair['Flikr30kID']}.jpg", "image_link": "", "caption": pair["sentence2"],
                        "label": int(pair["gold_label"] == "entailment"),
                        "relation": ("near", "in front of")[number % 2], "annotator_id": 1,
                        "vote_true_validator_id": [], "vote_false_validator_id": [],
                    }  # fmt: skip
                    file.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture
def cell():
    """Executes the README's cell as a notebook does, where Python finds the sources of functions.

    The task leaves with the test.
    """
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "TASKS[" in block]

    def execute(old: str = "", new: str = "") -> None:
        edited = code.replace(old, new) if old else code
        linecache.cache["<cell>"] = len(edited), None, edited.splitlines(keepends=True), "<cell>"
        exec(compile(edited, "<cell>", "exec"), {"__name__": "__main__"})

    before = dict(TASKS)
    yield execute
    TASKS.clear()
    TASKS.update(before)
    linecache.cache.pop("<cell>", None)


@pytest.fixture
def settings(vsr, student_folder, teacher_folder, own_cache):
    def of(**changes) -> RunConfig:
        given = {
            "task": "vsr", "data_dir": str(vsr), "student": str(student_folder), "shots": 8, "epochs": 1,
            "teacher": f"local-dir:{teacher_folder}", "batch_size": 8, "probe_examples": 2,
        }  # fmt: skip
        return RunConfig.from_parameters(**given | changes)

    return of


def test_a_task_of_ones_own_trains_with_every_kind_of_arm(cell, settings, tmp_path):
    cell()
    arms = ["finetune", "naive", "clip_td", "clip_td_repaired", "truth_only", "extra_only"]
    folders = compare(settings(), arms, [0], tmp_path)
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        assert 0 <= metrics["accuracy"]["dev"] <= 1
        assert {"stratum: near", "stratum: in front of"} <= metrics["detail"]["dev"].keys()
        kept = json.loads((folder / "functions.json").read_text())["task"]
        assert kept["name"] == "vsr" and "records.where(number)" in kept["source"]
    lessons = [r for r in read_records(folders[3] / "selections.parquet") if r.other_image is not None]
    assert lessons and all(0 <= record.teacher_other <= 1 for record in lessons)


def test_clip_compares_a_caption_with_its_negation(cell, settings, tmp_path):
    cell()
    config = apply_arm(settings(class_probabilities="statements"))
    prepared = prepare(config)
    train_run(config, prepared, tmp_path / "run")
    example = low_shot(prepared.train, config.shots, config.seed)[0]
    caption, cache = example.prompt.text, prepared.cache
    picture = cache.picture(example.image).pooled.float()
    logits = [
        cache.teacher.logit_scale * float(picture @ cache.pooled(text).float())
        for text in (f"It is not true that {caption[0].lower()}{caption[1:]}", caption)
    ]
    found = class_logits(config, prepared, [])(example)
    assert found.tolist() == pytest.approx(logits, rel=1e-3)


def test_a_changed_reader_is_another_run(cell, settings):
    assert not user_task(settings(task="snli_ve", data_dir=""))
    found = []
    for old, new in (
        ("", ""),
        ("int,", "int, "),
        ('"label", int)', '"label", int) ^ 1'),
        ('"dev"', '"test"'),
    ):
        cell(old, new)
        found.append(user_task(settings()))
    assert len({json.dumps(one) for one in found}) == 3 + (found[0] != found[1])
    assert found[0] != found[2] != found[3]


def test_a_corrected_reader_reads_again(cell, settings):
    cell()
    before = [example.label for example in read_split(settings(), "train")]
    cell('"label", int)', '"label", int) ^ 1')
    assert [1 - example.label for example in read_split(settings(), "train")] == before


def test_a_corrected_task_has_its_labels_at_once(cell, settings):
    cell('"label", int)', '"label", int) + 1')
    with pytest.raises(DataError, match="label 2, expected one from 0 to 1"):
        list(read_split(settings(), "train"))
    task = TASKS["vsr"]
    three = type("VsrTask", (type(task),), {"labels": lambda self, config: ("false", "unsure", "true")})
    TASKS["vsr"] = three(*(getattr(task, field.name) for field in fields(task)))
    assert {example.label for example in read_split(settings(), "train")} == {1, 2}


@pytest.mark.parametrize("task", ["vcr_qa", "vqa_v2"])
def test_a_split_is_trained_on_and_tested_only_if_it_is_said(settings, task):
    usual = TASKS[task].evaluated
    config = settings(task=task, data_dir="", train_split=usual, shots=2)
    with pytest.raises(ConfigError, match=f"train_split='{usual}' is also evaluated"):
        prepare(config)
    read_split(config.model_copy(update={"eval_splits": [f"{usual}_balanced"]}), usual)


def test_ids_of_another_split_do_not_mix_its_examples_up(cell, settings):
    cell('f"{self.path.stem}-', 'f"')
    config = settings()
    prepared = prepare(config)
    subset = low_shot(prepared.train, config.shots, config.seed)
    logits = class_logits(config, prepared, subset)
    known = {example.id for example in subset}
    shared = [example for example in prepared.evaluated["dev"] if example.id in known]
    assert shared
    for example in shared:
        assert_close(logits(example), logits(replace(example, id="of no example of the fit")))
    shown = shuffled_pictures(subset, 0)
    assert not any((example.id, example.image) in shown for example in shared)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"label", int)', '"label", int) + 1', "label 2, expected one from 0 to 1"),
        ('"label", int)', '"label", int) - 1', "label -1, expected one"),
        ("boxes=()", "boxes=[]", "boxes a tuple"),
        (
            'image=self.folder / "images" /',
            'image=str(self.folder / "images") + "/" +',
            "image must be a Path",
        ),
        (
            "choices=()",
            "choices=(TextPart('a'),) * (2 + number % 2)",
            "3 choices, but 2 in the first example",
        ),
        ('f"{self.path.stem}-{n}"', 'f"{n // 2}"', "the id '0' stands twice"),
        ("boxes=()", "boxes=((20.0, 30.0, 120.0, 200.0),)", "from 0 to 1: pixels divided by"),
        ("boxes=()", "boxes=((0.5, 0.1, 0.2, 0.3),)", "expected .x1, y1, x2, y2. from 0 to 1"),
        ("boxes=()", "relevant_boxes=((0, 0, float('nan'), 1),), boxes=()", "box .0, 0, nan, 1., expected"),
        ("boxes=()", "boxes=((0, 0, 1, 1),)", "0 names of 1 boxes"),
        ("prompt=TextPart(", "prompt=TextPart(references=(Reference(0, 1, (2,)),), text=", "object 2 of 0"),
        ("prompt=TextPart(", "prompt=TextPart(relevant=((3, 900),), text=", "span .3, 900. is not within"),
        ("boxes=()", "soft_label=((0, 1.0),), boxes=()", "only a task of labels with has_soft_labels = True"),
    ],
)
def test_bad_examples_of_a_reader_of_ones_own_are_named(cell, settings, old, new, told):
    cell(old, new)  # the README's cell needs no references, so that it does not import them
    code = type(TASKS["vsr"]).reader.__globals__
    code["Reference"] = Reference
    with pytest.raises(DataError, match=rf"train.*{told}"):
        list(read_split(settings(), "train"))


def test_training_examples_without_a_label_are_named_before_training(cell, settings):
    cell('label=field(number, "label", int)', 'label=field(number, "label", int) if number % 4 else None')
    with pytest.raises(
        DataError, match=r"train_split='train': \d+ of 16 examples have no label \(first: 'train-"
    ):
        prepare(apply_arm(settings(arm="finetune")))


def test_tests_that_are_labelled_in_part_are_named_before_training(cell, settings):
    """Accuracy would be that of the labelled ones alone."""
    label = 'field(number, "label", int)'
    cell(f"label={label}", f'label={label} if number % 4 or self.path.stem == "train" else None')
    with pytest.raises(DataError, match=r"split dev: \d+ of \d+ examples have no label to be scored by"):
        prepare(apply_arm(settings(arm="finetune")))
    cell(f"label={label}", f'label={label} if self.path.stem == "train" else None')
    with pytest.raises(DataError, match=r"or say labelled=False of the whole split"):
        prepare(apply_arm(settings(arm="finetune")))


@pytest.mark.parametrize(("label", "worth"), [(2, 1.0), (-1, 0.5), (1, 1.5), (1, 0.0)])
def test_bad_soft_labels_are_named(cell, settings, label, worth):
    cell("boxes=()", f"soft_label=(({label}, {worth}),), boxes=()")
    type(TASKS["vsr"]).has_soft_labels = True
    with pytest.raises(
        DataError, match=r"soft_label (.*, expected one from 0 to 1, worth 0 to 1|of no worth)"
    ):
        list(read_split(settings(), "train"))


def test_what_labels_are_worth_is_learned_and_scored(cell, settings, tmp_path):
    """Every third caption is half true, every other has its label alone; none has annotators."""
    half = "label=field(number, 'label', int), soft_label=((0, 0.5), (1, 0.5)) if number % 3 == 0 else ()"
    cell('label=field(number, "label", int)', half)
    type(TASKS["vsr"]).has_soft_labels = True
    config = apply_arm(settings(arm="finetune", epochs=2))
    prepared = prepare(config)
    subset = low_shot(prepared.train, config.shots, config.seed)
    run = _Run(config, prepared, subset, tmp_path)
    soft = collate([run.dataset[i] for i in range(len(subset))], prepared.encoder)["soft"]
    assert soft.tolist() == [[0.5, 0.5] if e.soft_label else [1.0 - e.label, e.label] for e in subset]
    assert {0.5, 1.0} <= set(soft.flatten().tolist())
    train_run(config, prepared, tmp_path / "run")
    scores = pd.read_parquet(tmp_path / "run" / "predictions.parquet").set_index("id")["score"]
    for example in prepared.evaluated["dev"]:
        assert scores[example.id] in ((0.5,) if example.soft_label else (0.0, 1.0))


def test_a_task_of_another_session_says_what_to_do():
    with pytest.raises(ConfigError, match=r"'vsr': not known in this session.*execute the cell"):
        _ = TASKS["vsr"]
    assert TASKS.get("vsr") is None and "vsr" not in TASKS


def test_several_processes_do_not_know_the_task(cell, settings, tmp_path):
    cell()
    with pytest.raises(ConfigError, match=r"task='vsr': of this session.*processes=2"):
        launch(apply_arm(settings(processes=2, arm="finetune")), tmp_path, None)


def test_a_bad_record_of_ones_own_files_is_named_before_training(cell, settings, vsr, tmp_path):
    cell()
    folder = tmp_path / "vsr"
    folder.mkdir()
    (folder / "images").symlink_to(vsr / "images")
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text((vsr / f"{split}.jsonl").read_text())
    lines = (folder / "dev.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"caption"', '"sentence"')
    (folder / "dev.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"dev.jsonl:5: field 'caption' is missing; is this a VSR file"):
        compare(settings(data_dir=str(folder)), ["finetune"], [0], tmp_path / "runs")
