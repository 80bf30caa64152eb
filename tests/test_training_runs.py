"""Run folders: whole, the same again, kept from harm; and comparisons of them."""

import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close
from training_helpers import TERMS, assert_same_bits, settings_of, weights_of

from tdlib.analysis.compare import summarise
from tdlib.analysis.scores import read_predictions
from tdlib.analysis.statistics import bootstrap_interval
from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ConfigError
from tdlib.core.records import read_records
from tdlib.data.examples import DataError, low_shot
from tdlib.students.registry import load_student
from tdlib.students.vilt import ViltEncoder, ViltForMultipleChoice
from tdlib.teacher.probe import count_cut
from tdlib.training import prepare as experiments
from tdlib.training import run as training
from tdlib.training.data import EncodedExamples
from tdlib.training.evaluation import predict
from tdlib.training.objective import TargetedDistillation
from tdlib.training.prepare import prepare, read_split
from tdlib.training.reference import zero_shot
from tdlib.training.run import compare, train_run
from tdlib.training.run_folders import archive_previous_run
from tdlib.training.trainer import DistillationTrainer


@pytest.fixture(scope="module")
def folders(base, prepared, tmp_path_factory):
    """Run folders of two arms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", lambda *_args: prepared)
        return compare(base, ["finetune", "clip_td"], [0], tmp_path_factory.mktemp("runs"))


# Without a teacher it is finetuning


def test_weights_of_zero_are_plain_finetuning_bit_for_bit(base, prepared, folders, tmp_path):
    config = settings_of(
        base, arm="clip_td", distill_weight=0.0, choice_weight=0.0, selector="random", mass=0.9
    )
    train_run(config, prepared, tmp_path / "zero")
    assert_same_bits(weights_of(tmp_path / "zero"), weights_of(folders[0]))
    assert (tmp_path / "zero/history.jsonl").read_text() == (folders[0] / "history.jsonl").read_text()
    start = load_student(base.student).state_dict()
    assert not torch.equal(start["classifier.weight"], weights_of(folders[0])["classifier.weight"])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights_of(folders[0]).values(), weights_of(folders[1]).values(), strict=True)
    )


def test_examples_that_the_teacher_cuts_are_counted(base, prepared, folders):
    first = prepared.train[0]
    long = replace(first, prompt=replace(first.prompt, text="word " * 60, references=()))
    experiments.add_to_cache(prepared.cache, [first, long])
    cut = prepared.cache.cut(long.statements()[0].text)
    counted = count_cut([first, long], prepared.cache.cut)
    assert (counted.examples, counted.cut_examples) == (2, 1) and counted.most >= cut > 0
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [found.get("teacher_cut_examples") for found in metrics] == [None, 0]
    assert "1 of 2 examples have texts beyond" in str(counted) and long.id in str(counted)


# Runs


def test_a_run_folder_is_complete(folders, base, prepared):
    expected = {
        "config.json", "manifest.json", "history.jsonl", "metrics.json", "predictions.parquet",
        "environment.json", "identity.json", "student",
    }  # fmt: skip
    for folder, own in zip(folders, (set(), {"selections.parquet"}), strict=True):
        assert {path.name for path in folder.iterdir()} - {"trainer"} == expected | own
    assert [folder.name for folder in folders] == ["finetune-seed0", "clip_td-seed0"]
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["clip_td-seed0", "finetune-seed0"]
    subset = low_shot(prepared.train, base.shots, 0)
    for folder, arm in zip(folders, ("finetune", "clip_td"), strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert RunConfig.from_parameters(**config) == apply_arm(settings_of(base, arm=arm))
        assert json.loads((folder / "manifest.json").read_text())["ids"] == [example.id for example in subset]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["updates"] == math.ceil(len(subset) / 4) and metrics["train_examples"] == len(subset)
        assert metrics["accuracy"].keys() == {"val"}  # the test split has no labels


def test_the_history_covers_every_update_of_a_short_run(folders):
    for folder in folders:
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert history[-1]["step"] == json.loads((folder / "metrics.json").read_text())["updates"]
        assert all(math.isfinite(value) for entry in history for value in entry.values())
    assert {*TERMS, "instance_weight"} <= history[-1].keys()


def test_the_finished_student_is_the_baseline_and_predicts_what_is_recorded(folders, base, prepared):
    start = load_student(base.student).state_dict()
    for folder in folders:
        student = load_student(str(folder / "student"))
        again = ViltForMultipleChoice.from_pretrained(folder / "student")
        assert {n: v.shape for n, v in weights_of(folder).items()} == {n: v.shape for n, v in start.items()}
        assert sum(p.numel() for p in student.parameters()) == sum(
            p.numel() for p in load_student(base.student).parameters()
        )
        assert_same_bits(student.state_dict(), dict(again.state_dict()))
        encoder = ViltEncoder(str(folder / "student"))
        table = pd.read_parquet(folder / "predictions.parquet")
        for split, examples in prepared.evaluated.items():
            own = table[table["split"] == split]
            assert own["id"].tolist() == [example.id for example in examples]  # none left out
            found = predict(student, EncodedExamples(examples, encoder))
            assert_close(
                torch.tensor(np.stack(own["probabilities"])), torch.tensor(found).double(), rtol=0, atol=1e-6
            )
            assert own["prediction"].tolist() == found.argmax(-1).tolist()


def test_the_same_settings_give_the_same_run(folders, base, prepared, tmp_path):
    train_run(apply_arm(settings_of(base, arm="clip_td")), prepared, tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), weights_of(folders[1]))
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "again" / name), pd.read_parquet(folders[1] / name)
        )
    for name in ("config.json", "manifest.json", "history.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (folders[1] / name).read_text()
    found, known = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "again", folders[1]))
    for metrics in (found, known):
        assert metrics.pop("seconds") >= metrics.pop("train_seconds") >= 0
        assert metrics.pop("seconds_per_update") >= 0
    assert found == known


def test_half_precision_is_the_students_alone(base, prepared, folders, tmp_path, monkeypatch):
    """Its layers compute in it; losses and evaluation do not, and weights stay single."""
    seen, terms = set(), set()
    loss = training.TargetedDistillation.forward

    def computed(layer, given, output):
        if isinstance(layer, torch.nn.Linear) and output.ndim == 3:  # of the encoder
            seen.add((output.dtype, torch.is_grad_enabled()))

    def lost(self, *args, **options):
        output = loss(self, *args, **options)
        terms.update(value.dtype for value in output.values() if value.is_floating_point())
        return output

    monkeypatch.setattr(training.TargetedDistillation, "forward", lost)
    with register_module_forward_hook(computed):
        train_run(apply_arm(settings_of(base, arm="clip_td", precision="bf16")), prepared, tmp_path / "run")
    assert seen == {(torch.bfloat16, True), (torch.float32, False)} and terms == {torch.float32}
    assert {value.dtype for value in weights_of(tmp_path / "run").values()} == {torch.float32}
    first, known = (
        json.loads((f / "history.jsonl").read_text().splitlines()[0]) for f in (tmp_path / "run", folders[1])
    )
    for name in TERMS:
        assert first[name] != known[name] and first[name] == pytest.approx(known[name], rel=0.05), name


@pytest.mark.parametrize("changes", [{"adversarial_steps": 2}, {"diagnostics_every": 1}])
def test_a_compiled_student_has_no_second_backward_pass(base, prepared, tmp_path, changes):
    config = apply_arm(settings_of(base, arm="finetune", compile=True, **changes))
    with pytest.raises(ConfigError, match="compile=True"):
        train_run(config, prepared, tmp_path / "run")


def test_half_precision_needs_hardware(base, prepared, tmp_path):
    with pytest.raises(ConfigError, match="precision='fp16' needs a GPU"):
        config = apply_arm(settings_of(base, arm="finetune", precision="fp16"))
        train_run(config, prepared, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [{"references": "category"}, {"world_seed": 7}, {"eval_splits": ["val_style"]},
     {"teacher_control": "random_weights"}],
)  # fmt: skip
def test_data_that_were_prepared_for_other_settings_are_refused(base, prepared, tmp_path, changes):
    ((name, value),) = changes.items()
    with pytest.raises(
        ConfigError, match=rf"{name}={re.escape(repr(value))}, prepared with .*prepare\(config\)"
    ):
        train_run(apply_arm(settings_of(base, arm="clip_td", **changes)), prepared, tmp_path / "run")


def test_settings_must_be_those_of_their_arm(base, prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"arm='naive' sets .*selector='all'.*use apply_arm"):
        train_run(settings_of(base, arm="naive"), prepared, tmp_path / "run")


def test_a_run_of_other_settings_is_not_lost(base, prepared, tmp_path, caplog):
    config, folder = apply_arm(settings_of(base, arm="finetune")), tmp_path / "run"
    other = settings_of(config, seed=1)
    for changed in (config, config, other, settings_of(other, loader_workers=1)):
        train_run(changed, prepared, folder)
    (kept,) = set(tmp_path.iterdir()) - {folder}
    found = [json.loads((place / "config.json").read_text())["seed"] for place in (kept, folder)]
    assert found == [0, 1] and kept.name.startswith("run-") and kept.name in caplog.text


@pytest.mark.parametrize("moment", ["write_json", "write_jsonl", "save_manifest"])
def test_an_error_leaves_no_folder_and_the_old_one_as_it_was(base, prepared, tmp_path, monkeypatch, moment):
    config = apply_arm(settings_of(base, arm="finetune"))
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.json").write_text("old")
    (old / "config.json").write_text("{}")

    def fail(*_args, **_options):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(training, moment, fail)
    monkeypatch.setattr(DistillationTrainer, "train", lambda self: None)
    for folder in (old, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="in the middle"):
            train_run(config, prepared, folder)
    assert sorted(os.listdir(tmp_path)) == ["old"]
    assert (old / "metrics.json").read_text() == "old"


def test_a_failed_evaluation_keeps_the_student_and_is_repeated_without_training(
    base, prepared, folders, tmp_path, monkeypatch
):
    config, folder = apply_arm(settings_of(base, arm="clip_td")), tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text("of an older run")
    (folder / "config.json").write_text("{}")

    def fail(*_args, **_options):
        raise OSError("disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("tdlib.training.evaluation.batch_logits", fail)
        with pytest.raises(OSError, match="disk is gone") as failure:
            train_run(config, prepared, folder)
    assert any(str(folder) in note and "again" in note for note in failure.value.__notes__)
    (aside,) = set(tmp_path.iterdir()) - {folder}
    assert (aside / "metrics.json").read_text() == "of an older run"
    assert_same_bits(weights_of(folder), weights_of(folders[1]))
    assert "disk is gone" in (folder / "unevaluated.json").read_text()
    assert not {"metrics.json", "predictions.parquet"} & {path.name for path in folder.iterdir()}

    monkeypatch.setattr(DistillationTrainer, "train", fail)  # whoever trains now fails
    metrics = train_run(config, prepared, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in folders[1].iterdir()}
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name), pd.read_parquet(folders[1] / name))
    expected = json.loads((folders[1] / "metrics.json").read_text())
    for found in (metrics, json.loads((folder / "metrics.json").read_text())):
        assert found["accuracy"] == expected["accuracy"] and found["updates"] == expected["updates"]
    with pytest.raises(OSError, match="disk is gone"):  # it is finished, so that this call trains anew
        train_run(config, prepared, folder)
    with monkeypatch.context() as patch:
        patch.undo()
        patch.setattr("tdlib.training.evaluation.batch_logits", fail)
        with pytest.raises(OSError):
            train_run(config, prepared, tmp_path / "other")
    monkeypatch.setattr(DistillationTrainer, "train", fail)
    with pytest.raises(OSError):  # a student of other settings is none of this run's
        train_run(settings_of(config, seed=1), prepared, tmp_path / "other")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bad_picture_of_an_evaluated_split_is_found_before_training(base, world, tmp_path, damage):
    data = tmp_path / "vcr"
    shutil.copytree(world, data)
    config = settings_of(base, data_dir=str(data), eval_splits=["val"], probe_examples=1)
    picture = read_split(config, "val")[len(read_split(config, "val")) - 1].image
    content = picture.read_bytes()
    picture.unlink() if damage == "missing" else picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=picture.name):
        prepare(config, whole_splits=False)


def test_a_bad_training_line_is_found_before_training_without_a_teacher(base, world, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "COUNTED", 1)  # words are counted in a part of a large split
    data = tmp_path / "vcr"
    shutil.copytree(world, data)
    config = apply_arm(settings_of(base, data_dir=str(data), arm="finetune", shots=0))
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"rationale_label": 7, "answer_label": 7})
    (data / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"train.jsonl:{len(lines)} .*answer_label=7"):
        prepare(config, whole_splits=False)


def test_files_that_are_corrected_are_read_again(base, world, teacher_folder, tmp_path):
    """In the same kernel, as their state is part of a run's identity."""
    shutil.copytree(world, tmp_path / "vcr")
    shutil.copytree(teacher_folder, tmp_path / "clip")
    config = settings_of(base, data_dir=str(tmp_path / "vcr"), teacher=f"local-dir:{tmp_path / 'clip'}")
    val, cache = read_split(config, "val"), experiments.teacher_cache(config)
    assert read_split(config, "val") is val and experiments.teacher_cache(config) is cache
    lines = (tmp_path / "vcr" / "val.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "vcr" / "val.jsonl").write_text("".join(lines[1:]))
    assert len(read_split(config, "val")) == len(val) - 1
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    assert experiments.teacher_cache(config).teacher.fingerprint != cache.teacher.fingerprint


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(base, prepared, tmp_path, monkeypatch, bad):
    real = TargetedDistillation.forward

    def forward(self, batch, window=None):
        terms = real(self, batch, window)
        return {**terms, "loss": terms["loss"] * bad}

    monkeypatch.setattr(TargetedDistillation, "forward", forward)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_run(apply_arm(settings_of(base, arm="finetune")), prepared, tmp_path / "run")
    assert not os.listdir(tmp_path)


# Records


def test_selections_can_be_read_and_their_weights_sum_to_one(folders, base, prepared):
    records = read_records(folders[1] / "selections.parquet")
    assert len(records) == 2 * 2 * 4  # splits, probes, choices
    assert {record.split for record in records} == {"val", "test"}
    table = pd.read_parquet(folders[1] / "predictions.parquet").set_index("id")
    chance = zero_shot(prepared.cache, prepared.evaluated["val"][:2])
    for record in records:
        assert record.selected.any() and record.weight.sum() == pytest.approx(1, abs=1e-5)
        assert not record.weight[~record.selected].any() and not (record.selected & ~record.distilled).any()
        assert record.prediction == table.loc[record.example_id, "prediction"]
        for chosen in (record.is_text, record.is_visual):
            assert record.score[chosen & record.distilled].sum() == pytest.approx(1, abs=1e-5)
        words = [record.text[start:end] for start, end in record.spans]
        assert list(record.tokens) == words
        if record.split == "test":
            assert record.label is record.teacher_probability is record.instance_weight is None
        else:
            assert isinstance(record.label, int)
            student = table.loc[record.example_id, "probabilities"][record.label]
            position = [example.id for example in prepared.evaluated["val"]].index(record.example_id)
            teacher = chance[position, record.label]
            assert record.student_probability == pytest.approx(student, abs=1e-6)
            assert record.teacher_probability == pytest.approx(teacher, abs=1e-5)
            assert record.instance_weight == pytest.approx(teacher / (teacher + student), abs=1e-5)


# Comparisons


def test_an_arms_own_targets_are_used(base, prepared, tmp_path, monkeypatch):
    """An arm that changes only the prior must not train on the common settings' targets."""
    monkeypatch.setitem(ARMS, "no_prior", {"prior": "uniform"})
    monkeypatch.setitem(ARMS, "raw", {"relevance": "projected", "temperature": 0.01})
    monkeypatch.setattr(training, "prepare", lambda *_args: prepared)
    monkeypatch.setattr(DistillationTrainer, "train", lambda self: None)
    own = {}
    for folder in compare(base, ["clip_td", "no_prior", "raw"], [0], tmp_path):
        own[folder.name.split("-")[0]] = read_records(folder / "selections.parquet")[0]
    assert own["clip_td"].prior[own["clip_td"].is_text].std() > 0
    assert (own["no_prior"].prior[own["no_prior"].is_text] == 1).all()
    assert np.abs(own["raw"].relevance - own["clip_td"].relevance).max() > 1e-3


def test_comparisons_that_cannot_be_fair_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "more", {"shots": 0.5})
    for arms, problem in ((["more"], "'more' changes shots"), (["nonesuch", "finetune"], "arm='nonesuch'")):
        with pytest.raises(ConfigError, match=problem):
            compare(base, arms, [0], tmp_path)
    assert not os.listdir(tmp_path)


def test_summary_equals_direct_figures(folders):
    table = read_predictions(folders)
    assert set(table["arm"]) == {"finetune", "clip_td"} and set(table["seed"]) == {0}
    rng = np.random.default_rng(0)
    other = table.assign(
        seed=1, score=[math.nan if math.isnan(s) else float(rng.random() < 0.5) for s in table["score"]]
    )
    both = pd.concat(
        [table, other.sample(frac=1, random_state=0)], ignore_index=True
    )  # order does not matter
    summary = summarise(both)
    assert set(summary["split"]) == {"val"}  # the test split has no labels
    images = table[(table["split"] == "val") & (table["arm"] == "finetune")]["image"].to_numpy()
    ids = table[(table["split"] == "val") & (table["arm"] == "finetune")]["id"].tolist()
    right = {}
    for arm in ("finetune", "clip_td"):
        part = both[(both["arm"] == arm) & (both["split"] == "val")]
        right[arm] = np.array(
            [
                [bool(part[(part["seed"] == s) & (part["id"] == i)]["score"].item()) for i in ids]
                for s in (0, 1)
            ]
        )
    for row in summary.to_dict("records"):
        values = right[row["arm"]].astype(float)
        assert row["n"] == 2 and row["mean"] == pytest.approx(values.mean())
        order = np.argsort(ids)  # the summary sorts by id; resampling depends on the clusters alone
        low, high = bootstrap_interval(values[:, order], images[order])
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    row = summary[summary["arm"] == "clip_td"].iloc[0]
    gain = right["clip_td"].astype(float) - right["finetune"]
    assert row["difference"] == pytest.approx(gain.mean())
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert summary[summary["arm"] == "finetune"]["difference"].isna().all()


def test_the_students_card_says_what_the_run_reached_and_with_what(folders):
    for folder in folders:
        card = ModelCard.load(folder / "student" / "README.md")
        metrics = json.loads((folder / "metrics.json").read_text())
        stated = {result.dataset_split: result.metric_value for result in card.data.eval_results}
        assert stated == {split: round(value, 4) for split, value in metrics["accuracy"].items()}
        assert card.data.library_name == "transformers"
        assert f"{metrics['train_examples']:,} examples" in card.text and "`seed=0`" in card.text
        distilled = metrics["arm"] == "clip_td"
        assert ("`selector='nucleus'`" in card.text) == distilled == ("No teacher." not in card.text)


def test_only_a_run_of_other_settings_is_kept_beside_its_successor(tmp_path):
    """A parameter of which an earlier version knew nothing had its default there."""
    config = RunConfig.from_parameters(seed=1)
    stored = config.model_dump()
    cases = {
        "same": stored, "machine": stored | {"checkpoint_every": 7}, "other": stored | {"shots": 3},
        "earlier": {name: value for name, value in stored.items() if name != "extra_weight"},
        "earlier other": {name: value for name, value in stored.items() if name != "seed"},
    }  # fmt: skip
    kept = set()
    for name, settings in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        archive_previous_run(tmp_path / name, config)
        kept |= set() if (tmp_path / name).exists() else {name}
    assert kept == {"other", "earlier other"}
    assert len(list(tmp_path.glob("*-*"))) == 2
    for _ in range(2):
        (tmp_path / "unread").mkdir()
        (tmp_path / "unread" / "config.json").write_text("")
        archive_previous_run(tmp_path / "unread", config)
    assert len(list(tmp_path.glob("unread-*"))) == 2, "whose settings cannot be read"


def test_a_folder_that_is_no_run_is_not_replaced(base, prepared, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine: holds files that were not made here \(.*config\.json"):
        train_run(base, prepared, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_split_without_labels_is_not_trained_on(base):
    with pytest.raises(ConfigError, match=r"train_split='test'.*no labels to learn from"):
        prepare(base.model_copy(update={"train_split": "test", "eval_splits": ["val"]}))
