"""What a trained student predicts: probabilities, and the table that a run folder keeps of them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tdlib.data.chance import chance_scores
from tdlib.data.examples import Example, Examples, path_names
from tdlib.data.tasks import score
from tdlib.students.base import student_inputs
from tdlib.training.data import EncodedExamples, collate


@torch.inference_mode()
def predict(student: PreTrainedModel, dataset: EncodedExamples, batch_size: int = 32) -> np.ndarray:
    """Probabilities over choices or labels, (examples, choices or labels). No example is left out."""
    student.eval()
    device = next(student.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: dataset[i]["input_ids"].shape[1])
    rows: list[Tensor | None] = [None] * len(dataset)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([{**dataset[i], "teacher": None} for i in chosen], dataset.encoder)
        output = student(**{name: value.to(device) for name, value in student_inputs(student, batch).items()})
        for i, row in zip(chosen, output.logits.float().softmax(-1).cpu(), strict=True):
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
