"""Computes the scores that need no training: of the teacher, of the student as it comes, of guessing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdlib.config import RunConfig
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, low_shot
from tdlib.data.tasks import score, task_of
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.teacher.probe import statement_logits
from tdlib.training.data import EncodedExamples
from tdlib.training.evaluation import predict
from tdlib.training.prepare import PreparedData, class_logits, load_student


def zero_shot(cache: TeacherCache, examples: Sequence[Example]) -> np.ndarray:
    """The teacher's own probabilities over the choices, (examples, choices), from the cache."""

    def statements(example: Example) -> list[str]:
        return [statement.text for statement in example.statements()]

    logits = [statement_logits(cache, statements, example) for example in examples]
    return np.stack([row.softmax(-1).numpy() for row in logits])


def reference_scores(config: RunConfig, prepared: PreparedData) -> pd.DataFrame:
    """Scores the teacher, the student before any finetuning, and guessing, on the evaluated splits.

    Columns arm, split, mean. The teacher chooses zero-shot where examples have choices; else as
    ``class_probabilities`` says, with what it takes from the subset of the config's seed. The student
    chooses where examples have choices, by the score that its pretraining gave it (one whose checkpoint
    lacks such a score guesses); other tasks' labels it has not seen. Guessing is as in ``data.chance``.
    Task "vcr" is left out, because its score joins two predictions.
    """
    rows: list[dict] = []
    subset = low_shot(prepared.train, config.shots, config.seed)
    logits = class_logits(config, prepared, subset)
    constant = constant_answer(prepared.train)
    student: Any = load_student(config, prepared).eval() if logits is None else None
    for split, examples in prepared.evaluated.items():
        if not examples.labelled or task_of(config).has_parts:
            continue
        if logits is None:
            prepared.encoder.prepare(examples)
            dataset = EncodedExamples(examples, prepared.encoder, modality=config.modality)
            answers = {
                "teacher, zero-shot": zero_shot(prepared.cache, examples).argmax(1),
                "student, zero-shot": predict(student, dataset).argmax(1),
            }
        else:
            if isinstance(logits, AnswerPosterior):
                logits.prepare(examples)
            by = "zero-shot" if config.class_probabilities == "statements" else config.class_probabilities
            answers = {f"teacher, {by}": np.array([int(logits(example).argmax()) for example in examples])}
        for name, chosen in answers.items():
            scores = [
                score(example, int(prediction), prepared.labels)
                for example, prediction in zip(examples, chosen, strict=True)
            ]
            rows.append({"arm": name, "split": split, "mean": float(np.mean(scores))})
        guesses = chance_scores(examples, constant, prepared.labels)
        rows.append({"arm": "chance", "split": split, "mean": float(np.mean(guesses))})
    return pd.DataFrame(rows, columns=["arm", "split", "mean"])
