"""Every task trained for real from its files to its submission, on a tiny world and tiny models."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tdlib.analysis.compare import summarise
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ROOT, ConfigError
from tdlib.core.records import read_records
from tdlib.data import tasks as catalogue
from tdlib.data import vcr
from tdlib.data.examples import DataError, low_shot
from tdlib.data.json_files import Records
from tdlib.data.tasks import TASKS
from tdlib.data.vcr import VcrReader
from tdlib.regions.sources import open_regions
from tdlib.students.registry import load_student, open_encoder
from tdlib.students.vilt import ViltEncoder, ViltForClassification
from tdlib.teacher.cache import CacheError
from tdlib.training import prepare as experiments
from tdlib.training.data import EncodedExamples
from tdlib.training.evaluation import predict
from tdlib.training.masked_sets import asked_of, write_masked
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import prepare, worded_answers
from tdlib.training.reference import reference_scores
from tdlib.training.run import train_run
from tdlib.views.gallery import gallery, text_html


@pytest.fixture(scope="module")
def settings(worlds, teacher_folder, student_folder, own_cache):
    """A function from a task to the settings of a run of a second."""

    def of(task: str, **changes) -> RunConfig:
        common = {
            "task": task, "data_dir": str(worlds[TASKS[task].data_set]), "student": str(student_folder),
            "learning_rate": 5e-4, "head_learning_rate": 1e-3,  # so that a few updates show
            "teacher": f"local-dir:{teacher_folder}", "shots": 0.3, "epochs": 1, "batch_size": 8,
            "probe_examples": 2, "vocabulary_minimum": 2, "submission_split": TASKS[task].submitted,
        }  # fmt: skip
        return apply_arm(RunConfig.from_parameters(**common | changes))

    return of


def test_answers_of_another_data_set_are_refused_before_training(settings, tmp_path):
    file = tmp_path / "ans2label.json"
    file.write_text(json.dumps({"a zeppelin": 0, "a harpsichord": 1}))
    with pytest.raises(ConfigError, match=r"no answer to the \d+ training examples is one of the 2 labels"):
        prepare(settings("vqa_v2", vocabulary=str(file), arm="finetune", submission_split=""), [0])


@pytest.mark.parametrize("task", ["vcr", "vcr_qar", "snli_ve", "e_snli_ve", "vqa_v2", "vqa_cp_v2"])
def test_a_task_trains_evaluates_and_submits(settings, task, tmp_path):
    config = settings(task)
    prepared = prepare(config, [0])
    folder = tmp_path / "run"
    metrics = train_run(config, prepared, folder)
    usual = TASKS[task].evaluated
    assert usual in metrics["accuracy"] and all(0 <= v <= 1 for v in metrics["accuracy"].values())
    table = pd.read_parquet(folder / "predictions.parquet")
    for split, examples in prepared.evaluated.items():  # nothing is dropped
        assert table[table["split"] == split]["id"].tolist() == list(examples.ids)
    tested = TASKS[task].submitted
    if tested:
        file = folder / metrics["submission"]
        assert TASKS[task].check_submission(file, prepared.evaluated[tested]) == []
    else:
        assert "submission" not in metrics
    records = read_records(folder / "selections.parquet")
    assert records and all(abs(record.weight.sum() - 1) < 1e-4 for record in records)
    summary = summarise(table.assign(arm="finetune", seed=0))
    mean = summary.set_index("split").loc[usual, "mean"]
    assert mean == pytest.approx(metrics["accuracy"][usual])
    student = load_student(str(folder / "student"), labels=prepared.labels)  # the stored head, not a new one
    again = predict(student, EncodedExamples(prepared.evaluated[usual], ViltEncoder(str(folder / "student")),
                                             num_labels=len(prepared.labels)))  # fmt: skip
    stored = table[table["split"] == usual]
    assert (again.argmax(1) == stored["prediction"]).mean() > 0.98
    np.testing.assert_allclose(again.max(1), stored["probability"], atol=1e-4)
    # a run that begins with it keeps all of it; a head that is drawn begins at the probability 1 / labels
    continued = experiments.load_student(settings(task, student=str(folder / "student")), prepared)
    assert all(torch.equal(p, student.get_parameter(n)) for n, p in continued.named_parameters())
    if TASKS[task].has_soft_labels:
        start = experiments.load_student(config, prepared).classifier[-1].bias
        torch.testing.assert_close(start, torch.full_like(start, -np.log(len(start) - 1)))


@pytest.mark.parametrize("task", ["snli_ve", "vqa_v2"])
def test_the_teacher_may_speak_by_answer_statements(settings, task, tmp_path):
    config = settings(task, class_probabilities="statements")
    prepared = prepare(config, [0])
    assert "teacher_accuracy" not in train_run(config, prepared, tmp_path / "run")
    cache, example = prepared.cache, low_shot(prepared.train, config.shots, config.seed)[0]
    own, asked = {s.text for s in example.statements()}, worded_answers(config, prepared.labels)(example)
    for text in {*asked} - own:  # hundreds a question, of which nobody reads the tokens
        assert cache.pooled(text).isfinite().all()
        with pytest.raises(CacheError):
            cache.text(text)
    table = reference_scores(config, prepared)
    assert set(table["arm"]) == {"teacher, zero-shot", "chance"} and table["mean"].between(0, 1).all()


@pytest.mark.parametrize("task", ["vcr", "snli_ve", "vqa_v2", "vqa_cp_v2"])
def test_settings_are_chosen_on_pictures_that_are_not_learned_from(settings, task, tmp_path):
    config = settings(task, held_out=0.3, submission_split="")
    prepared = prepare(config, [0])
    ((split, aside),) = prepared.evaluated.items()
    assert split == f"{TASKS[task].train}_held_out"
    assert not {e.image for e in prepared.train} & {e.image for e in aside}
    whole = experiments.read_split(config.model_copy(update={"held_out": 0.0}), TASKS[task].train)
    assert sorted([*prepared.train.ids, *aside.ids]) == sorted(whole.ids)
    if task != "snli_ve":
        return
    metrics = train_run(config, prepared, tmp_path / "run")
    assert list(metrics["accuracy"]) == [split]
    learned = json.loads((tmp_path / "run" / "manifest.json").read_text())["ids"]
    tested = pd.read_parquet(tmp_path / "run" / "predictions.parquet")["id"]
    assert learned and not set(learned) & set(tested)
    assert read_records(tmp_path / "run" / "selections.parquet")[0].split == split


def test_nothing_held_out_is_refused(settings):
    with pytest.raises(ConfigError, match="held_out=1e-09: 0 of"):
        prepare(settings("snli_ve", held_out=1e-9, submission_split=""))


def test_reference_scores_of_a_probe_and_of_choices(settings):
    for task, name in (("snli_ve", "teacher, fit"), ("vcr_qar", "teacher, zero-shot")):
        config = settings(task, submission_split="")
        table = reference_scores(config, prepare(config, [0])).set_index(["arm", "split"])["mean"]
        assert table.loc["chance", TASKS[task].evaluated] == pytest.approx(
            1 / 3 if task == "snli_ve" else 1 / 4
        )
        assert 0 <= table.loc[name, TASKS[task].evaluated] <= 1
        assert ("student, zero-shot" in table.index.get_level_values("arm")) == (task == "vcr_qar")


def _pixels(item):
    return item["visual"]["pixels"]


@pytest.mark.parametrize("modality", ["text", "image"])
def test_controls_see_one_modality_only(settings, modality):
    config = settings("vcr_qa", modality=modality, arm="finetune")
    prepared = prepare(config, [0], whole_splits=False)
    examples = prepared.evaluated["val"][:6]
    items = [EncodedExamples(examples, prepared.encoder, modality=kind)[0] for kind in ("both", modality)]
    pixels, ids = ([value(item) for item in items] for value in (_pixels, lambda item: item["input_ids"]))
    if modality == "text":
        assert torch.equal(*ids) and pixels[0].any() and not pixels[1].any()
    else:
        assert torch.equal(*pixels) and ids[0].shape[1] > 3 >= ids[1].shape[1]
    with pytest.raises(ConfigError, match="without a teacher"):
        train_run(settings("vcr_qa", modality=modality), prepared, "unused")


def test_an_answer_outside_the_vocabulary_weighs_nothing(settings):
    config = settings("vqa_v2", vocabulary_minimum=10, submission_split="")
    prepared = prepare(config, [0])
    from torch.utils.data import DataLoader

    from tdlib.data.examples import low_shot
    from tdlib.training.data import collate
    from tdlib.training.objective import TargetedDistillation
    from tdlib.training.prepare import class_logits, load_student

    subset = low_shot(prepared.train, config.shots, 0)
    unknown = [i for i, example in enumerate(subset) if example.label is None]
    assert unknown, "the test needs a rare answer"
    feature_reader = TeacherFeatureReader(
        prepared.cache, prepared.idf, config, class_logits(config, prepared, subset)
    )
    data = EncodedExamples(
        subset, prepared.encoder, feature_reader, num_labels=len(prepared.labels), soft_labels=True
    )
    module = TargetedDistillation(load_student(config, prepared), config, 24)
    batch = next(iter(DataLoader(data, len(data), collate_fn=partial(collate, encoder=data.encoder))))
    weights = module.instance_weights(batch, torch.zeros(len(data), len(prepared.labels)))
    assert (weights[unknown] == 0).all() and (weights[batch["labels"] >= 0] > 0).all()
    assert torch.isfinite(module(batch)["loss"])


def test_a_vocabulary_that_is_corrected_is_read_again(settings, tmp_path):
    config = settings("vqa_v2")
    answers, file = experiments.class_labels(config), tmp_path / "answers.json"
    config = config.model_copy(update={"vocabulary": str(file)})
    found = []
    for named in (answers, ["other", *answers]):
        file.write_text(json.dumps({answer: label for label, answer in enumerate(named)}))
        split = experiments.read_split(config, TASKS["vqa_v2"].train)
        found.append([example.label for example in split if example.label is not None])
    assert found[0] and found[1] == [label + 1 for label in found[0]]


def test_masked_sets_follow_a_trained_student(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SHIFTED_FILES", tmp_path / "shifts")
    config = settings("vcr", submission_split="")
    run = tmp_path / "run"
    train_run(config, prepare(config, [0]), run)
    shifted = settings("vcr", submission_split="", shift="keeptop1")
    with pytest.raises(DataError, match=r"tdlib data mask RUN_FOLDER keeptop1"):
        prepare(shifted, [0])
    encoded = []
    with monkeypatch.context() as patch:
        visual = ViltEncoder.visual
        patch.setattr(ViltEncoder, "visual", lambda *given: encoded.append(given) or visual(*given))
        write_masked(run, "keeptop1")
    examples = prepare(shifted, [0]).evaluated["val_keeptop1"]
    assert len(encoded) == len({*examples.questions}), "a picture is encoded once per question"
    for example in examples[:8]:
        for choice in example.choices:
            rest = choice.text.replace("[MASK]", "").split()
            assert "[MASK]" in choice.text and len(rest) <= 1
    other = tmp_path / "other"
    other.mkdir()
    for unfit in (settings("snli_ve"), settings("vcr_qa"), settings("vcr", modality="image")):
        (other / "config.json").write_text(unfit.model_dump_json())
        with pytest.raises(ConfigError, match="expected one of task='vcr' that reads words"):
            write_masked(other, "keeptop1")
    shutil.copytree(examples[0].image.parents[2], tmp_path / "vcr")
    (tmp_path / "vcr" / "val_keeptop1.jsonl").touch()
    (other / "config.json").write_text(settings("vcr", data_dir=str(tmp_path / "vcr")).model_dump_json())
    with pytest.raises(ConfigError, match="the data hold this set already"):
        write_masked(other, "keeptop1")


@pytest.mark.parametrize("student", ["mini-uniter", "mini-vilt", "mini-vlbert", "mini-visualbert"])
def test_what_is_scored_without_a_mask_is_what_the_student_learned_from(world, student):
    regions = partial(open_regions, f"boxes+grid:{ROOT / 'data' / 'models' / 'mini-detector'}")
    encoder = open_encoder(str(ROOT / "data" / "models" / student), 40, regions)
    answers, both = (VcrReader(world, "val", subtask).open() for subtask in ("qa", "both"))
    for place in range(4):
        record = Records.lines(world / "val.jsonl", "VCR")[place]
        question, right = record["question"], record["answer_choices"][record["answer_label"]]
        for part, prompt in enumerate((question, [*question, *right])):
            choices = record[("answer_choices", "rationale_choices")[part]]
            scored = vars(encoder.text(asked_of(answers[place], record, prompt, choices, "names")))
            for name, learned in vars(encoder.text(both[2 * place + part])).items():
                assert learned is scored[name] is None or torch.equal(learned, scored[name]), (part, name)


def test_person_tokens_are_words_of_the_student(settings, tmp_path):
    config = settings("vcr_qa", references="person_tokens", submission_split="")
    prepared = prepare(config, [0])
    tokens = prepared.encoder.tokenizer.tokenize(prepared.train[0].statements()[0].text)
    assert any(token in vcr.PERSON_TOKENS for token in tokens)
    train_run(config, prepared, tmp_path / "run")
    stored = load_student(str(tmp_path / "run" / "student"))
    assert stored.config.vocab_size == len(ViltEncoder(str(tmp_path / "run" / "student")).tokenizer)


def test_heads_have_the_labels_and_replace_others(student_folder, tmp_path, caplog):
    three = load_student(str(student_folder), labels=("a", "b", "c"))
    assert isinstance(three, ViltForClassification) and three.config.id2label == {0: "a", 1: "b", 2: "c"}
    three.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        load_student(str(student_folder))
        assert not caplog.records
        load_student(str(tmp_path))
    assert "head for 3 labels (a, ...) is not read" in caplog.text
    assert load_student(str(tmp_path), labels=("x", "y")).config.num_labels == 2


def test_galleries_escape_data_and_show_answers(settings):
    config = settings("vcr_qa", submission_split="")
    example = prepare(config, [0], whole_splits=False).evaluated["val"][0]
    shown = gallery([example], width=120)
    assert gallery([example, example], width=120).html.count("<img") == 2, "a shift asks the same questions"
    assert shown.html.count("<img") == 1 and example.choices[example.label].text in repr(shown)
    part = vcr.render(["<script>", [0], "&"], ["person"], decisive=[0])
    html = text_html(part)
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp;" in html and "<sub>0</sub>" in html
