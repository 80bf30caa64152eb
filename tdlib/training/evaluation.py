"""Evaluates a trained student: probabilities, the table that a run folder keeps of them, and its figures.

Evaluation needs the trained student and the data alone, so it can be repeated without training.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.core.devices import usual_device
from tdlib.core.files import write_json
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, Examples, path_names
from tdlib.data.tasks import data_folder, detail, score, task_of
from tdlib.miniworld.worlds import STRATA, strata_of
from tdlib.students import registry as students
from tdlib.students.base import student_inputs
from tdlib.training.card import model_card
from tdlib.training.checkpoints import UNEVALUATED
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.prepare import PreparedData

log = logging.getLogger(__name__)


def batch_logits(
    student: Any, dataset: EncodedExamples, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields the numbers of a batch's examples and their float32 logits, on the student's device.

    Texts of like length share a batch, so that little is computed on padding; the order is therefore another.
    """
    student.eval()
    device = next(student.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: dataset[i]["input_ids"].shape[1])
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate([{**dataset[i], "teacher": None} for i in numbers], dataset.encoder)
        output = student(**{name: value.to(device) for name, value in student_inputs(student, batch).items()})
        yield numbers, output.logits.float()


@torch.inference_mode()
def predict(student: PreTrainedModel, dataset: EncodedExamples, batch_size: int = 32) -> np.ndarray:
    """Probabilities over choices or labels, (examples, choices or labels). No example is left out."""
    rows: list[Tensor | None] = [None] * len(dataset)
    for numbers, logits in batch_logits(student, dataset, batch_size):
        for i, row in zip(numbers, logits.softmax(-1).cpu(), strict=True):
            rows[i] = row
    return torch.stack([row for row in rows if row is not None]).numpy()


def prediction_table(
    split: str,
    examples: Sequence[Example],
    probabilities: np.ndarray,
    labels: Sequence[str] = (),
    constant: int | None = None,
) -> pd.DataFrame:
    """One row per example: id, question, part, picture, stratum, label, prediction, score, chance, ...

    ``score`` and ``chance`` lie in [0, 1] and are missing where there is no label. ``chance`` is what
    guessing scores on the example (``data.chance``), given the answer that guessing always gives where
    there is a label set (``constant``). Probabilities over more than 16 labels are not kept.
    """
    examples, predictions = Examples.of(examples), probabilities.argmax(-1)
    rows = [
        (example.image, example.label, example.answer_type, score(example, int(prediction), labels))
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    few = probabilities.shape[1] <= 16
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
            "prediction": predictions,
            "answer": [labels[i] if labels else "" for i in predictions],
            "score": [row[3] for row in rows],
            "chance": chance_scores(examples, constant, labels),
            "probability": probabilities.max(-1),
            "probabilities": [row.tolist() if few else None for row in probabilities],
        }
    )


def evaluate(
    config: RunConfig, prepared: PreparedData, student: PreTrainedModel, folder: Path
) -> dict[str, Any]:
    """Writes predictions of all evaluated splits (and a submission) to ``folder``; returns the figures."""
    figures: dict[str, Any] = {"accuracy": {}, "measures": {}, "detail": {}}
    frames = []
    constant = constant_answer(prepared.train)
    for split, examples in prepared.evaluated.items():
        encoded = prepared.encoded[split]
        if config.modality != "both":
            encoded = EncodedExamples(
                examples, prepared.encoder, memory=0, num_labels=len(prepared.labels),
                modality=config.modality,
            )  # fmt: skip
        probabilities = predict(student, encoded)
        table = prediction_table(split, examples, probabilities, prepared.labels, constant)
        if examples.labelled:
            of_split = task_of(config).measures(table)
            figures["accuracy"][split] = next(iter(of_split.values()))
            figures["measures"][split] = of_split
            strata = strata_of(data_folder(config), split).reindex(table["question"]).fillna("")
            figures["detail"][split] = detail(table.assign(**strata.reset_index(drop=True)), STRATA)
        if split == config.submission_split:
            path = task_of(config).write_submission(folder, examples, probabilities, prepared.labels)
            figures["submission"] = path.name
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
