"""Computes the scores that need no student: those of the teacher itself, and of guessing."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdlib.config import RunConfig
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, low_shot
from tdlib.data.tasks import score, task_of
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.probe import statement_logits
from tdlib.training.prepare import PreparedData, class_logits


def zero_shot(cache: TeacherCache, examples: Sequence[Example]) -> np.ndarray:
    """The teacher's own probabilities over the choices, (examples, choices), from the cache."""

    def statements(example: Example) -> list[str]:
        return [statement.text for statement in example.statements()]

    logits = [statement_logits(cache, statements, example) for example in examples]
    return np.stack([row.softmax(-1).numpy() for row in logits])


def reference_scores(config: RunConfig, prepared: PreparedData) -> pd.DataFrame:
    """Scores the teacher without a student, and guessing, on the evaluated splits.

    Columns arm, split, mean. The teacher chooses zero-shot where examples have choices; else a
    linear probe on its global embeddings, fitted on the subset of the config's seed. Guessing is as in
    ``data.chance``. Task "vcr" is left out, because its score joins two predictions.
    """
    rows: list[dict] = []
    subset = low_shot(prepared.train, config.shots, config.seed)
    logits = class_logits(config, prepared, subset)
    constant = constant_answer(prepared.train)
    for split, examples in prepared.evaluated.items():
        if not examples.labelled or task_of(config).has_parts:
            continue
        if logits is None:
            name, chosen = "teacher, zero-shot", zero_shot(prepared.cache, examples).argmax(1)
        else:
            name = "teacher, probe" if config.class_probabilities == "probe" else "teacher, zero-shot"
            chosen = np.array([int(logits(example).argmax()) for example in examples])
        scores = [
            score(example, int(prediction), prepared.labels)
            for example, prediction in zip(examples, chosen, strict=True)
        ]
        guesses = chance_scores(examples, constant, prepared.labels)
        rows.append({"arm": name, "split": split, "mean": float(np.mean(scores))})
        rows.append({"arm": "chance", "split": split, "mean": float(np.mean(guesses))})
    return pd.DataFrame(rows, columns=["arm", "split", "mean"])
