"""What makes a training's batches, and how a batch's examples are counted."""

import os

import pytest
import torch
from training_helpers import settings_of
from transformers import Trainer

from tdlib.config import apply_arm
from tdlib.core import devices
from tdlib.core.devices import MOST_WORKERS, in_threads, usual_workers
from tdlib.data.examples import low_shot
from tdlib.students.registry import load_student
from tdlib.training import trainer as trainer_module
from tdlib.training.data import EncodedExamples
from tdlib.training.objective import TargetedDistillation
from tdlib.training.trainer import make_trainer


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "workers"),
    [(False, 64, 1, 0), (True, 2, 1, 0), (True, 3, 1, 0), (True, 4, 1, 3), (True, 64, 1, MOST_WORKERS),
     (True, 16, 4, 3), (True, 8, 8, 1)],
)  # fmt: skip
def test_workers_follow_the_machine(monkeypatch, gpu, cores, processes, workers):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert usual_workers(processes) == workers


@pytest.mark.parametrize("cores", [1, 4])
def test_threads_keep_the_order_and_pass_on_what_is_raised(monkeypatch, cores):
    monkeypatch.setattr(devices, "usable_cores", lambda: cores)
    assert in_threads(lambda n: n * n, range(20)) == [n * n for n in range(20)] and in_threads(str, []) == []
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [1, 0, 2])


def test_a_training_uses_them_where_memory_does_not_keep_its_data(
    base, prepared, tmp_path, monkeypatch
):  # fmt: skip
    config = apply_arm(settings_of(base, arm="finetune"))
    subset = low_shot(prepared.train, config.shots, config.seed)
    asked = []
    monkeypatch.setattr(trainer_module, "usual_workers", lambda processes=1: asked.append(processes) or 3)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))

    def trainer_of(memory: int, **changes):
        module = TargetedDistillation(load_student(config.student), config, None)
        data = EncodedExamples(subset, prepared.encoder, memory=memory)
        return make_trainer(module, config.model_copy(update=changes), data, tmp_path)

    assert trainer_of(2**30).args.dataloader_num_workers == 0
    assert trainer_of(2**10).args.dataloader_num_workers == 3
    assert trainer_of(2**10, loader_workers=0).args.dataloader_num_workers == 0
    assert trainer_of(2**30, loader_workers=2).args.dataloader_num_workers == 2
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    trainer_of(2**30).train()
    assert not compiled
    trainer = trainer_of(2**30, compile=True)
    trainer.train()
    assert [part for part, _ in compiled] == [trainer.module.student]
    batches = [{"labels": torch.zeros(4)}, {"labels": torch.zeros(3)}]
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) == 7
