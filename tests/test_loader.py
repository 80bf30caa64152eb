"""What makes a training's batches, and how a batch's examples are counted."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from training_helpers import settings_of
from transformers import Trainer

from tdlib.config import apply_arm
from tdlib.core import devices
from tdlib.core.devices import MOST_WORKERS, in_threads, usual_workers
from tdlib.data.examples import low_shot
from tdlib.students.base import student_inputs
from tdlib.students.registry import load_student
from tdlib.training import data as data_module
from tdlib.training import evaluation
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import Predictions, batch_logits, predict
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
    monkeypatch.setattr(data_module, "usual_workers", lambda processes=1: asked.append(processes) or 3)
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


@pytest.mark.parametrize("workers", [0, 2])
@torch.inference_mode()
def test_evaluation_opens_each_picture_once_and_sees_the_batches_of_always(
    base, prepared, monkeypatch, workers
):  # fmt: skip
    """Also where memory keeps nothing, and with processes that make the batches; bit for bit."""
    student, examples = load_student(base.student).eval(), prepared.evaluated["val"]
    kept = EncodedExamples(examples, prepared.encoder)
    order = sorted(range(len(kept)), key=lambda i: kept[i]["input_ids"].shape[1])
    expected = []
    for start in range(0, len(order), 4):
        batch = collate([kept[i] for i in order[start : start + 4]], prepared.encoder)
        logits = student(**student_inputs(student, batch)).logits
        expected.append((order[start : start + 4], logits))
    opened, visual = Counter(), prepared.encoder.visual
    monkeypatch.setattr(
        prepared.encoder, "visual", lambda example: opened.update([example.id]) or visual(example)
    )
    state = torch.random.get_rng_state()
    found = [*batch_logits(student, EncodedExamples(examples, prepared.encoder, memory=0), 4, workers)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [numbers for numbers, _ in found] == [numbers for numbers, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert opened == ({} if workers else Counter(examples.ids))  # workers open them in their own memory


def test_of_many_labels_the_chosen_are_kept(base, prepared, monkeypatch):
    student = load_student(base.student)
    data = EncodedExamples(prepared.evaluated["val"], prepared.encoder)
    every = predict(student, data)
    few = Predictions.by(student, data)
    monkeypatch.setattr(evaluation, "MOST_KEPT", every.shape[1] - 1)
    many = Predictions.by(student, data)
    assert np.array_equal(few.every, every) and many.every is None
    for found in (few, many):
        assert np.array_equal(found.chosen, every.argmax(-1))
        assert np.array_equal(found.probability, every.max(-1))


def test_workers_keep_nothing_that_they_will_not_read_again(prepared):
    class Counting(EncodedExamples):
        def __getitem__(self, index):
            super().__getitem__(index)
            return len(self._kept)

    data = Counting(prepared.evaluated["val"][:6], prepared.encoder)
    assert data[2] == 1  # kept here, so workers have it too
    assert [*DataLoader(data, batch_size=None, num_workers=1)] == [1] * 6
    assert [*DataLoader(data, batch_size=None)][-1] == 6
