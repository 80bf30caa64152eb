"""Records of a training: their file, and that recording changes nothing."""

from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from records import drawn_record
from transformers import TrainerCallback

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.core.records import END, TargetRecord, read_records, records_table, write_records
from tdlib.data.examples import low_shot
from tdlib.students.registry import load_student
from tdlib.training.data import EncodedExamples
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import shuffled_pictures
from tdlib.training.recording import ProbeRecorder, preview_targets
from tdlib.training.run import train_run
from tdlib.training.trainer import make_trainer

# Records


def test_a_file_of_an_older_run_is_still_read(image, tmp_path):
    records = [drawn_record(image), drawn_record(image, seed=1)]
    table = records_table(records)
    assert list(table)[: len(fields(TargetRecord)) - 1] == [f.name for f in fields(TargetRecord)][:-1]
    table.drop(columns="step").to_parquet(tmp_path / "old.parquet", index=False)
    read = read_records(tmp_path / "old.parquet")
    assert [record.step for record in read] == [END, END]
    np.testing.assert_array_equal(read[1].weight, records[1].weight)


def test_steps_survive_the_file_and_can_be_chosen(history, tmp_path):
    path = tmp_path / "selections.parquet"
    write_records(history, path)
    read = read_records(path)
    assert [record.step for record in read] == [record.step for record in history]
    for own, other in zip(history, read, strict=True):
        for field in fields(own):
            a, b = getattr(own, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else None
            assert isinstance(a, np.ndarray) or a == b, field.name
    assert {record.step for record in read_records(path, steps=[0, END])} == {0, END}
    assert read_records(path, steps=[7]) == []
    records_table(history).drop(columns="step").to_parquet(path)
    assert len(read_records(path, steps=[END])) == len(history) and not read_records(path, steps=[0])


def test_one_example_is_read_without_decoding_the_others(image, tmp_path, monkeypatch):
    """Small row groups with narrow ranges of ids, so that most are left out; the same records either way."""
    monkeypatch.setattr("tdlib.core.records.EXAMPLES_PER_GROUP", 4)
    many = [
        drawn_record(image, seed=seed, example_id=f"val-{seed}", step=step, choice=choice, split=split)
        for step in (0, END)
        for split in ("val", "shifted")
        for seed in range(9)
        for choice in range(3)
    ]
    path = tmp_path / "selections.parquet"
    write_records(many, path)
    whole = read_records(path)
    for asked in ([("val", "val-0")], [("val", "val-4"), ("shifted", "val-7")]):
        found = read_records(path, examples=asked)
        own = [record for record in whole if (record.split, record.example_id) in asked]
        assert len(found) == len(own) == 6 * len(asked)
        for a, b in zip(found, own, strict=True):
            assert (a.split, a.example_id, a.choice, a.step) == (b.split, b.example_id, b.choice, b.step)
            np.testing.assert_array_equal(a.weight, b.weight)
    file = pq.read_metadata(path)
    names = [file.schema.column(i).name for i in range(file.num_columns)]
    ranges = [file.row_group(i).column(names.index("example_id")).statistics for i in range(5)]
    assert file.num_row_groups == 5
    assert [(r.min, r.max) for r in ranges] == [
        ("val-0", "val-3"), ("val-4", "val-7"), ("val-0", "val-8"), ("val-3", "val-6"), ("val-7", "val-8")
    ]  # fmt: skip
    assert [r.step for r in read_records(path, steps=[0], examples=[("val", "val-8")])] == [0] * 3
    assert read_records(path, examples=[("val", "val-99")]) == []


def test_further_steps_cost_little(image, tmp_path):
    one = [drawn_record(image, seed=seed, example_id=f"val-{seed}") for seed in range(20)]
    many = [replace(record, step=step) for step in range(10) for record in one]
    sizes = []
    for part in (one, many):
        write_records(part, tmp_path / "x.parquet")
        sizes.append((tmp_path / "x.parquet").stat().st_size)
    assert sizes[1] < 1.3 * sizes[0]
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 200


@pytest.fixture(scope="module")
def base(base):
    return base.model_copy(update={"eval_splits": ["val"], "shift": "", "probe_examples": 3})


def setting(prepared, config, folder, every: int = 0):
    """A trainer and its recorder, called before the first and after every ``every`` updates."""
    feature_reader = TeacherFeatureReader(prepared.cache, prepared.idf, config)
    subset = low_shot(prepared.train, config.shots, config.seed)
    module = TargetedDistillation(
        load_student(config.student, seed=config.seed), config, prepared.cache.teacher.dim
    )
    trainer = make_trainer(module, config, EncodedExamples(subset, prepared.encoder, feature_reader), folder)
    probes = EncodedExamples(prepared.evaluated["val"][:3], prepared.encoder, feature_reader)
    recorder = ProbeRecorder(probes, module, split="val", batch_size=2)

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            recorder.record(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0:
                recorder.record(state.global_step)

    if every:
        trainer.add_callback(Record())
    return trainer, recorder


@pytest.mark.parametrize(
    "changes", [{}, {"relevance": "disagreement", "selector": "sample"}], ids=["value", "disagreement"]
)
def test_recording_changes_nothing(base, prepared, tmp_path, changes):
    config = RunConfig.from_parameters(**{**base.model_dump(), **changes})
    plain, _ = setting(prepared, config, tmp_path / "a")
    plain.train()
    watched, recorder = setting(prepared, config, tmp_path / "b", every=1)
    watched.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert watched.model.training == plain.model.training
    steps = list(dict.fromkeys(record.step for record in recorder.records))
    assert steps == [*range(watched.state.global_step + 1)]
    assert len(recorder.records) == len(steps) * 3 * 4
    moved = [record.student_probability for record in recorder.records[:: 3 * 4]]
    assert len(set(moved)) > 1
    if changes:
        first, last = recorder.records[0], recorder.records[-12]
        assert np.abs(first.relevance - last.relevance).max() > 1e-3, "relevance follows the student"


@pytest.mark.parametrize("relevance", ["value", "disagreement"])
def test_a_preview_records_what_the_recorder_does_before_training(base, prepared, tmp_path, relevance):
    config = RunConfig.from_parameters(**{**base.model_dump(), "relevance": relevance, "probe_every": 1})
    train_run(config, prepared, tmp_path / "run")
    found = read_records(tmp_path / "run" / "selections.parquet", steps=[0])
    expected = preview_targets(config, prepared, prepared.evaluated["val"][: config.probe_examples])
    assert len(found) == len(expected) == 12
    for own, other in zip(found, expected, strict=True):
        for field in fields(own):
            a, b = getattr(own, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype.kind == b.dtype.kind
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            elif isinstance(a, float):
                assert a == pytest.approx(b, abs=1e-5)
            elif field.name not in ("step", "split"):
                assert a == b, field.name


def test_a_preview_of_settings_that_are_not_their_arms_is_refused(base, prepared):
    with pytest.raises(ConfigError, match=r"arm='naive' sets .*selector='all'.*use apply_arm"):
        preview_targets(base.model_copy(update={"arm": "naive"}), prepared, prepared.train[:1])


def test_a_preview_of_a_control_shows_what_its_teacher_sees(base, prepared):
    control = base.model_copy(update={"teacher_control": "shuffled_images"})
    subset = low_shot(prepared.train, base.shots, base.seed)
    example = subset[0]
    other = replace(example, image=shuffled_pictures(subset, base.seed)[example.id, example.image])
    seen, own, expected = (
        preview_targets(config, prepared, [one])[0]
        for config, one in ((control, example), (base, example), (base, other))
    )
    assert seen.image == example.image != other.image
    words = slice(0, len(seen.tokens))
    assert seen.teacher_probability == pytest.approx(expected.teacher_probability, abs=1e-5)
    np.testing.assert_allclose(seen.relevance[words], expected.relevance[words], atol=1e-5)
    assert np.abs(seen.relevance[words] - own.relevance[words]).max() > 1e-3
