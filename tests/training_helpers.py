"""Modules, data sets and trainers of a few seconds, and what two runs are compared by."""

import torch
from safetensors.torch import load_file

from tdlib.config import RunConfig
from tdlib.data.examples import low_shot
from tdlib.students.registry import load_student
from tdlib.training import trainer as trainer_module
from tdlib.training.data import EncodedExamples
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.trainer import DistillationTrainer, make_trainer

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# A softmax does not see them: their gradient is rounding error, which Adam scales up.
NOISE = ("classifier.bias", "key.bias")
TERMS = ("loss", "task", "choice", "distill")


def settings_of(base: RunConfig, **changes) -> RunConfig:
    return RunConfig.from_parameters(**{**base.model_dump(), **changes})


def dataset_of(prepared, config: RunConfig, examples=None) -> EncodedExamples:
    feature_reader = TeacherFeatureReader(prepared.cache, prepared.idf, config)
    examples = low_shot(prepared.train, config.shots, config.seed) if examples is None else examples
    return EncodedExamples(examples, prepared.encoder, feature_reader)


def module_of(prepared, config: RunConfig) -> TargetedDistillation:
    student = load_student(config.student, seed=config.seed)
    return TargetedDistillation(student, config, prepared.cache.teacher.dim)


def trained(prepared, config: RunConfig, folder, log_every: int = 1) -> DistillationTrainer:
    module, dataset = module_of(prepared, config), dataset_of(prepared, config)
    trainer = make_trainer(module, config, dataset, folder, log_every=log_every)
    trainer.train()
    return trainer


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def recorded(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """All batches that are made from here on."""
    batches, real = [], trainer_module.collate
    monkeypatch.setattr(
        trainer_module,
        "collate",
        lambda *args, **options: batches.append(real(*args, **options)) or batches[-1],
    )
    return batches
