"""Evaluates a trained student: probabilities, the table that a run folder keeps of them, and its figures.

Evaluation needs the trained student and the data alone, so it can be repeated without training.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.core.devices import usual_device
from tdlib.core.files import write_json
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, Examples, path_names
from tdlib.data.tasks import data_folder, detail, score, task_of
from tdlib.miniworld.worlds import STRATA, strata_by_row
from tdlib.students import registry as students
from tdlib.students.base import StudentEncoder, student_inputs
from tdlib.training.card import model_card
from tdlib.training.checkpoints import UNEVALUATED
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.prepare import PreparedData

log = logging.getLogger(__name__)

MOST_KEPT = 16  # choices or labels of which every probability is kept; all answers of VQA take gigabytes


def batch_logits(
    student: Any, dataset: EncodedExamples, batch_size: int, workers: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields the numbers of a batch's examples and their float32 logits, on the student's device.

    Texts of like length share a batch, so that little is computed on padding; the order is therefore another.
    ``workers`` processes make the batches beside this one, see ``EncodedExamples.workers``.
    """
    student.eval()
    device = next(student.parameters()).device
    order = sorted(range(len(dataset)), key=dataset.text_length)
    numbers = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(
        dataset, batch_sampler=numbers, num_workers=workers,
        collate_fn=partial(_collate, encoder=dataset.encoder),
        generator=torch.Generator(),  # a loader draws a seed, which must not come from the shared numbers
    )  # fmt: skip
    for of_batch, batch in zip(numbers, loader, strict=True):
        output = student(**{name: value.to(device) for name, value in student_inputs(student, batch).items()})
        yield of_batch, output.logits.float()


def _collate(items: Sequence[dict[str, Any]], encoder: StudentEncoder) -> dict[str, Tensor]:
    return collate([{**item, "teacher": None} for item in items], encoder)


@torch.inference_mode()
def predict(student: PreTrainedModel, dataset: EncodedExamples, batch_size: int = 32) -> np.ndarray:
    """Probabilities over choices or labels, (examples, choices or labels). No example is left out."""
    parts, order = [], []
    for numbers, logits in batch_logits(student, dataset, batch_size):
        parts.append(logits.softmax(-1).cpu().numpy())
        order += numbers
    return np.concatenate(parts)[np.argsort(order)]


@dataclass(frozen=True)
class Predictions:
    """What is kept of a split's probabilities, so that a large one with many labels fits into memory.

    ``chosen`` (examples,) are the likeliest choices or labels, ``probability`` (examples,) is theirs.
    ``every`` has all probabilities (examples, choices or labels); None of more than ``MOST_KEPT``.
    """

    chosen: np.ndarray
    probability: np.ndarray
    every: np.ndarray | None

    @classmethod
    def of(cls, probabilities: np.ndarray) -> "Predictions":
        """Reduces probabilities (examples, choices or labels)."""
        few = probabilities.shape[1] <= MOST_KEPT
        return cls(probabilities.argmax(-1), probabilities.max(-1), probabilities if few else None)

    @classmethod
    @torch.inference_mode()
    def by(
        cls, student: PreTrainedModel, dataset: EncodedExamples, batch_size: int = 32, workers: int = 0
    ) -> "Predictions":
        """Lets a student predict a split, and reduces its probabilities batch by batch."""
        parts, order = [], []
        for numbers, logits in batch_logits(student, dataset, batch_size, workers):
            parts.append(cls.of(logits.softmax(-1).cpu().numpy()))
            order += numbers
        places = np.argsort(order)
        chosen, probability = (
            np.concatenate([getattr(part, name) for part in parts])[places]
            for name in ("chosen", "probability")
        )
        kept = [part.every for part in parts if part.every is not None]
        return cls(chosen, probability, np.concatenate(kept)[places] if kept else None)


def prediction_table(
    split: str,
    examples: Sequence[Example],
    predictions: Predictions,
    labels: Sequence[str] = (),
    constant: int | None = None,
) -> pd.DataFrame:
    """One row per example: id, question, part, picture, stratum, label, prediction, score, chance, ...

    ``score`` and ``chance`` lie in [0, 1] and are missing where there is no label. ``chance`` is what
    guessing scores on the example (``data.chance``), given the answer that guessing always gives where
    there is a label set (``constant``).
    """
    examples, chosen, every = Examples.of(examples), predictions.chosen, predictions.every
    rows = [
        (example.image, example.label, example.answer_type, score(example, int(choice), labels))
        for example, choice in zip(examples, chosen, strict=True)
    ]
    return pd.DataFrame(
        {
            "split": split,
            "id": examples.ids,
            "question": examples.questions,
            "part": examples.parts,
            "image": path_names([row[0] for row in rows]),
            "stratum": examples.strata,
            "answer_type": [row[2] for row in rows],
            "label": pd.array([row[1] for row in rows], dtype="Int64"),
            "prediction": chosen,
            "answer": [labels[i] if labels else "" for i in chosen],
            "score": [row[3] for row in rows],
            "chance": chance_scores(examples, constant, labels),
            "probability": predictions.probability,
            "probabilities": [None] * len(chosen) if every is None else every.tolist(),
        }
    )


def evaluate(
    config: RunConfig, prepared: PreparedData, student: PreTrainedModel, folder: Path
) -> dict[str, Any]:
    """Writes predictions of all evaluated splits (and a submission) to ``folder``; returns the figures."""
    figures: dict[str, Any] = {"accuracy": {}, "measures": {}, "detail": {}}
    frames = []
    constant, task = constant_answer(prepared.train), task_of(config)
    for split, examples in prepared.evaluated.items():
        encoded = prepared.encoded[split]
        if config.modality != "both":
            encoded = EncodedExamples(
                examples, prepared.encoder, memory=0, num_labels=len(prepared.labels),
                modality=config.modality,
            )  # fmt: skip
        predictions = Predictions.by(student, encoded, workers=encoded.workers(config.loader_workers))
        table = prediction_table(split, examples, predictions, prepared.labels, constant)
        table = table.join(strata_by_row(data_folder(config), split, table["question"]))
        if examples.labelled:
            of_split = task.measures(table)
            figures["accuracy"][split] = next(iter(of_split.values()))
            figures["measures"][split] = of_split
            figures["detail"][split] = detail(table) | detail(task.measured(table), STRATA)
        if split == config.submission_split:
            told = predictions.chosen if predictions.every is None else predictions.every
            task.write_submission(folder / task.submission, examples, told, prepared.labels)
            figures["submission"] = task.submission
        frames.append(table)
    pd.concat(frames).to_parquet(folder / "predictions.parquet", index=False)
    return figures


def finish(config: RunConfig, metrics: dict[str, Any], student: PreTrainedModel, folder: Path) -> None:
    """Writes the model card and, last, the metrics: a folder that has them is a finished run."""
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    card = model_card(config, metrics, environment, type(student).__name__)
    (folder / "student" / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / "metrics.json", metrics)


def evaluate_again(
    config: RunConfig, prepared: PreparedData, folder: Path, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates the trained student of a run folder and removes the mark ``UNEVALUATED``."""
    log.info("%s: is trained already and only evaluated now", folder)
    began = time.time()
    student = students.load_student(str(folder / "student"), config.seed, prepared.labels)
    student.to(usual_device())
    metrics |= evaluate(config, prepared, student, folder)
    metrics["seconds"] = round(metrics["train_seconds"] + time.time() - began, 2)
    finish(config, metrics, student, folder)
    (folder / UNEVALUATED).unlink()
    return metrics
