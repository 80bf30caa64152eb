"""What a GPU changes: nothing but the rounding. Skipped where there is none, or it is hidden (`make gpu`)."""

import json
import os
import subprocess
import sys
from functools import partial

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ROOT
from tdlib.data.examples import low_shot
from tdlib.data.pictures import open_picture
from tdlib.regions.backbones import DetectorBackbone, load_detector
from tdlib.regions.computed import BackboneRegions
from tdlib.regions.sources import open_regions
from tdlib.runs.batch import Batch
from tdlib.runs.engines import visible_gpus
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import EXTRAS
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import load_student, prepare
from tdlib.training.run import train_run
from tdlib.training.trainer import CheckpointKeeper, make_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def base(base):
    return base.model_copy(update={"shots": 0.4, "epochs": 3, "eval_splits": ["val"], "diagnostics_every": 2})


def settings_of(base: RunConfig, **changes) -> RunConfig:
    return apply_arm(RunConfig.from_parameters(**{**base.model_dump(), **changes}))


def history_of(folder) -> pd.DataFrame:
    return pd.read_json(folder / "history.jsonl", lines=True)


@pytest.fixture(scope="module")
def on_the_processor(base, own_cache, tmp_path_factory):
    """The same run where no GPU is to be seen."""
    folder = tmp_path_factory.mktemp("runs") / "processor"
    script = (
        "import sys; from pathlib import Path\n"
        "from tdlib.training import prepare as experiments; from tdlib.config import RunConfig\n"
        "from tdlib.training.run import train_run\n"
        "experiments.CACHE_ROOT = Path(sys.argv[1]); config = RunConfig.model_validate_json(sys.argv[2])\n"
        "train_run(config, experiments.prepare(config, whole_splits=False), Path(sys.argv[3]))"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    around = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    config = settings_of(base, arm="clip_td").model_dump_json()
    subprocess.run(
        [sys.executable, "-c", script, str(own_cache / "cpu"), config, str(folder)], env=around, check=True
    )
    return folder


def test_the_teacher_is_there_and_sees_the_same(teacher_folder, world, tmp_path):
    here, there = Teacher(f"local-dir:{teacher_folder}"), Teacher(f"local-dir:{teacher_folder}", device="cpu")
    assert here.device.type == "cuda" and here.fingerprint == there.fingerprint
    pictures = [open_picture(path) for path in sorted(world.rglob("*.jpg"))[:3]]
    for kind, given in (("encode_texts", ["a red cup", "two dogs"]), ("encode_pictures", pictures)):
        for one, other in zip(
            getattr(here, kind)(given, extras=EXTRAS), getattr(there, kind)(given, extras=EXTRAS), strict=True
        ):
            for name, value in vars(one).items():
                if value is not None:
                    assert value.device.type == "cpu"
                    torch.testing.assert_close(value, getattr(other, name), rtol=0, atol=5e-3, msg=name)
    for one, other in zip(
        here.pair_relevance(["a cup"], pictures[0])[0], there.pair_relevance(["a cup"], pictures[0])[0],
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)
    TeacherCache(tmp_path, there).add(["a red cup"])
    assert TeacherCache(tmp_path, here).text("a red cup") is not None  # verified on opening


def test_regions_are_computed_there(prepared):
    source = open_regions("boxes+grid:data/models/mini-detector")
    other = BackboneRegions(DetectorBackbone(load_detector("data/models/mini-detector"), "cpu"), "boxes+grid")
    one, two = source(prepared.train[0]), other(prepared.train[0])
    torch.testing.assert_close(one.features, two.features, rtol=0.02, atol=0.02)


def test_training_is_the_same(base, prepared, on_the_processor, tmp_path):
    metrics = train_run(settings_of(base, arm="clip_td"), prepared, tmp_path / "run")
    here, there = history_of(tmp_path / "run"), history_of(on_the_processor)
    for name in ("loss", "task", "choice", "distill"):
        np.testing.assert_allclose(here[name], there[name], rtol=2e-2, err_msg=name)
    around = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert around["device"] != "cpu" and around["peak_gpu_memory"] > 0 and metrics["updates"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_leaves_a_whole_student(
    base, prepared, on_the_processor, tmp_path, precision
):
    config = settings_of(base, arm="clip_td", precision=precision, diagnostics_every=0)
    train_run(config, prepared, tmp_path / "run")
    here, there = history_of(tmp_path / "run"), history_of(on_the_processor)
    for name in ("loss", "task", "choice", "distill"):
        np.testing.assert_allclose(here[name], there[name], rtol=0.1, err_msg=name)
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("arm", sorted(set(ARMS) - {"clip_input"}))
def test_each_arm_trains_in_half_precision(base, tmp_path, arm):
    config = settings_of(base, arm=arm, precision="bf16", epochs=1, loader_workers=1)
    metrics = train_run(config, prepare(config, whole_splits=False), tmp_path / "run")
    assert 0 <= metrics["accuracy"]["val"] <= 1


@pytest.mark.parametrize("relevance", ["gradient", "rollout", "entropy", "disagreement"])
def test_each_relevance_trains(base, prepared, tmp_path, relevance):
    train_run(settings_of(base, relevance=relevance, epochs=1), prepared, tmp_path / "run")


def test_processes_that_make_batches_use_answer_statements(worlds, base, tmp_path):
    config = settings_of(
        base, task="snli_ve", data_dir=str(worlds["snli_ve"]), eval_splits=["dev"], arm="clip_td_choice",
        class_probabilities="statements", loader_workers=1, epochs=1,
    )  # fmt: skip
    train_run(config, prepare(config, whole_splits=False), tmp_path / "run")


@pytest.mark.parametrize("relevance", ["value", "gradient", "rollout"])
def test_processes_that_make_batches_leave_it_alone(base, prepared, relevance):
    config = settings_of(base, arm="clip_td", relevance=relevance)
    subset = low_shot(prepared.train, config.shots, config.seed)
    feature_reader = TeacherFeatureReader(prepared.cache, prepared.idf, config)
    feature_reader.prepare(subset)
    dataset = EncodedExamples(subset, prepared.encoder, feature_reader, memory=0)
    batches = DataLoader(
        dataset, 4, num_workers=1, collate_fn=partial(collate, encoder=dataset.encoder), pin_memory=True
    )
    for number, batch in enumerate(batches):
        here = collate([dataset[4 * number + row] for row in range(len(batch["rows"]))], dataset.encoder)
        for name, value in batch.items():
            assert torch.equal(value, here[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("where", ["task", "gradient"])
def test_numbers_that_are_not_finite_change_nothing(base, prepared, tmp_path, monkeypatch, where, precision):
    config = settings_of(
        base, arm="finetune", precision=precision, epochs=1, accumulation=2, diagnostics_every=0,
        warmup_fraction=0.0,
    )  # fmt: skip
    subset = low_shot(prepared.train, config.shots, config.seed)
    dataset = EncodedExamples(subset, prepared.encoder)
    module = TargetedDistillation(load_student(config, prepared), config, None)
    trainer = make_trainer(module, config, dataset, tmp_path)
    start, snapshots = module.student.classifier.weight.detach().clone(), []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            snapshots.append({n: v.detach().clone() for n, v in module.named_parameters()})

    trainer.add_callback(Snapshot())
    real, calls = module.task_loss, []

    def lost(*args):
        calls.append(1)
        return real(*args) * (float("inf") if where == "task" and len(calls) == 4 else 1.0)

    def turned(gradient):
        return gradient * float("nan") if where == "gradient" and len(calls) == 4 else gradient

    monkeypatch.setattr(module, "task_loss", lost)
    module.student.classifier.weight.register_hook(turned)
    if precision == "fp16" and where == "gradient":  # its scaler passes over such an update
        trainer.train()
        for name, value in snapshots[0].items():
            assert torch.equal(value, snapshots[1][name]), name
        return
    with pytest.raises(FloatingPointError, match=f"update 2: {where} not finite, examples ") as error:
        trainer.train()
    named = str(error.value).split("examples ")[1].split(";")[0].split(", ")
    assert len(named) == (4 if where == "task" else 8)
    for name, value in module.named_parameters():
        assert torch.equal(value, snapshots[0][name]), name
    assert precision == "fp16" or not torch.equal(start, module.student.classifier.weight)


def test_one_process_uses_one(base, prepared, tmp_path, monkeypatch):
    """Not all that are visible, by DataParallel."""
    config = settings_of(base, arm="finetune")
    dataset = EncodedExamples(low_shot(prepared.train, config.shots, 0), prepared.encoder)
    module = TargetedDistillation(load_student(config, prepared), config, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = make_trainer(module, config, dataset, tmp_path)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == config.batch_size


def test_adversarial_steps_train(base, prepared, tmp_path):
    config = settings_of(base, arm="finetune", adversarial_steps=2, precision="bf16", epochs=1)
    train_run(config, prepared, tmp_path / "run")


def test_an_interrupted_training_goes_on(base, prepared, tmp_path, monkeypatch):
    config = settings_of(base, arm="clip_td", selector="sample", checkpoint_every=2, probe_examples=0)
    train_run(config, prepared, tmp_path / "whole")
    saved = CheckpointKeeper.on_save

    def interrupted(self, *args, **options):
        saved(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "on_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, prepared, tmp_path / "run")
    train_run(config, prepared, tmp_path / "run")
    around = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert around["resumed_after_updates"] == [2]
    here, there = history_of(tmp_path / "run"), history_of(tmp_path / "whole")
    np.testing.assert_allclose(here["loss"], there["loss"], rtol=1e-3)


TEMPLATE = """\
import json, os
from pathlib import Path
folder = Path(runs_dir) / "run"
folder.mkdir(parents=True)
import torch
seen = {"visible": os.environ["CUDA_VISIBLE_DEVICES"], "gpus": torch.cuda.device_count()}
(folder / "metrics.json").write_text(json.dumps(seen))
"""


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_runs_see_the_gpus_that_they_lease(tmp_path, share):
    parameters = 'seed: int = 0  # tells runs apart\nruns_dir: str = ""  # results'
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(TEMPLATE),
    ])  # fmt: skip
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "template.ipynb")
    described = {
        "template": str(tmp_path / "template.ipynb"), "seeds": 3, "resources": {"cpus": 1, "gpus": share},
    }  # fmt: skip
    table = Batch(described, "leases", tmp_path).run("local", cpus=3)
    assert set(table["state"]) == {"done"}
    assert set(table["gpus"]) == {1 if share else 0}
    assert set(table["visible"]) <= ({""} if share == 0 else set(visible_gpus()))
