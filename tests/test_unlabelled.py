"""Features of training examples without labels: the term, its draws, and that no label of theirs is read."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ConfigError
from tdlib.data.examples import Examples, low_shot
from tdlib.training.data import UNLABELLED, EncodedExamples, collate
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pools import unlabelled_examples
from tdlib.training.prepare import add_to_cache, class_logits, load_student, prepare
from tdlib.training.run import feature_reader_of, passes_per_update, train_run


def settings_of(folder, student_folder, teacher_folder, **changes) -> RunConfig:
    usual = {
        "data_dir": str(folder), "student": str(student_folder), "teacher": f"local-dir:{teacher_folder}",
        "learning_rate": 5e-4, "head_learning_rate": 1e-3,  # so that a few updates show
        "shots": 0.2, "epochs": 1, "batch_size": 4, "shift": "", "probe_examples": 0,
        "arm": "clip_td", "feature_pool": "train",
    }  # fmt: skip
    return apply_arm(RunConfig.from_parameters(**usual | changes))


@pytest.fixture(scope="module")
def config(world, student_folder, teacher_folder, own_cache):
    return settings_of(world, student_folder, teacher_folder)


@pytest.fixture(scope="module")
def prepared(config):
    ready = prepare(config, whole_splits=False)
    add_to_cache(ready.cache, ready.train)  # as a run does, whichever test is the first
    return ready


def parts(config, prepared):
    """The labelled subset, the unlabelled rest, and what makes the targets of both."""
    subset = low_shot(prepared.train, config.shots, config.seed)
    feature_reader = feature_reader_of(config, prepared, subset)
    return subset, unlabelled_examples(config, prepared, subset, feature_reader), feature_reader


def test_others_are_drawn_and_drawn_again_alike(config, prepared):
    subset, pool, _ = parts(config.model_copy(update={"feature_share": 1.5}), prepared)
    assert {*pool.examples.examples.ids} == {*prepared.train.ids} - {*subset.ids}
    drawn, again, other = pool.draw([1, 2, 3, 0]), pool.draw([1, 2, 3, 0]), pool.draw([2, 1, 3, 0])
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    rows = drawn[f"{UNLABELLED}rows"]
    assert len(set(rows.tolist())) == 6 and not torch.equal(rows, other[f"{UNLABELLED}rows"])
    assert (drawn[f"{UNLABELLED}labels"] == -1).all()


@pytest.mark.parametrize("arm", ["clip_td", "clip_td_features"])
def test_the_term_is_the_distillation_of_the_others(config, prepared, arm):
    """With the labels that CLIP would give, averaged over those that are drawn."""
    config = apply_arm(config.model_copy(update={"arm": arm, "feature_share": 0.5, "distill_weight": 2.0}))
    subset, pool, feature_reader = parts(config, prepared)
    data = EncodedExamples(subset, prepared.encoder, feature_reader)
    batch = collate([data[row] for row in range(4)], prepared.encoder, unlabelled=pool)
    dim = prepared.cache.teacher.dim
    module = TargetedDistillation(load_student(config, prepared), config, dim).eval()
    found = module(batch)
    items = [pool.examples[row] for row in batch[f"{UNLABELLED}rows"].tolist()]
    assert len(items) == 2
    alone = collate(items, prepared.encoder)
    alone["labels"] = alone["teacher_logits"].argmax(-1)
    assert_close(found["features"], module(alone)["distill"])
    assert_close(module(batch, window=8)["features"], found["features"] / 2)
    labelled = collate([data[row] for row in range(4)], prepared.encoder)
    without = module(labelled)
    assert_close(found["loss"], without["loss"] + 2 * found["features"])
    assert "features" not in without and all(torch.equal(found[n], without[n]) for n in ("task", "distill"))
    found["features"].backward()
    assert module.student.vilt.encoder.layer[0].attention.attention.query.weight.grad.abs().sum() > 0
    assert module.student.classifier.weight.grad is None, "the head learns from labels alone"
    assert passes_per_update(config) == 1.5


@pytest.mark.parametrize("relevance", ["value", "disagreement"])
def test_labels_of_the_others_change_no_number(config, prepared, tmp_path, relevance):
    config = config.model_copy(update={"relevance": relevance, "distill_schedule": "learned"})
    subset = set(low_shot(prepared.train, config.shots, config.seed).ids)

    def other(index: int):
        example = prepared.train[index]
        return example if example.id in subset else replace(example, label=(example.label + 1) % 4)

    train = Examples(prepared.train.ids, prepared.train.strata, other)
    assert any(one.label != two.label for one, two in zip(train, prepared.train, strict=True))
    for name, ready in (("true", prepared), ("false", replace(prepared, train=train))):
        metrics = train_run(config, ready, tmp_path / name)
        assert metrics["passes_per_update"] == 2
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("true", "false"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("true", "false")]
    assert histories[0] == histories[1] and '"features"' in histories[0]


def test_soft_labels_do_not_travel(worlds, student_folder, teacher_folder, own_cache):
    config = settings_of(
        worlds["vqa_v2"], student_folder, teacher_folder, task="vqa_v2", vocabulary_minimum=1
    )
    ready = prepare(config, whole_splits=False)
    add_to_cache(ready.cache, ready.train)
    subset, pool, feature_reader = parts(config, ready)
    assert feature_reader.class_logits is not None and class_logits(config, ready, subset) is not None
    assert "soft" not in pool.examples[0] and f"{UNLABELLED}soft" not in pool.draw([0, 1])


def test_there_must_be_others_and_a_term(config, prepared):
    with pytest.raises(ConfigError, match="shots=0"):
        parts(config.model_copy(update={"shots": 0}), prepared)
    off = apply_arm(config.model_copy(update={"arm": "finetune"}))
    assert not off.distils_unlabelled and passes_per_update(off) == 1
    usual = config.model_copy(update={"feature_pool": "subset"})
    add_to_cache(prepared.cache, low_shot(prepared.train, usual.shots, 0))
    assert parts(usual, prepared)[1] is None
