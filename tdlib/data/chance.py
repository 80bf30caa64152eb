"""Chance, for every table of the project: what a predictor scores that sees neither picture nor text.

Where examples have choices it takes one of them at random: 1 / choices. Where there is a label set it
always gives one answer, the one with the best mean score on the training split, and is scored on the
tested split as any prediction is (VQA by its soft accuracy). It knows nothing of the tested split, so
where that has other frequencies (VQA-CP) chance is lower there. Q->AR needs two right choices: the
product of both.
"""

from collections import defaultdict
from collections.abc import Sequence

from tdlib.data.examples import Example, Examples
from tdlib.data.tasks import score

MOST = 20_000  # training examples that are looked at; of larger splits, these at even distances


def constant_answer(train: Examples) -> int | None:
    """The label that scores best if it is always given, by the training split; of equals, the first.

    None where examples have choices, or where none has a label.
    """
    totals: dict[int, float] = defaultdict(float)
    for index in range(0, len(train), max(1, len(train) // MOST)):
        example = train[index]
        if example.choices:
            return None
        if example.soft_label:
            for label, worth in example.soft_label:
                totals[label] += worth
        elif example.label is not None:
            totals[example.label] += 1
    return min(totals, key=lambda label: (-totals[label], label)) if totals else None


def chance_scores(
    examples: Sequence[Example], constant: int | None, labels: Sequence[str] = ()
) -> list[float]:
    """Score of guessing on each example of a tested split, in [0, 1]; nan where nothing can be scored.

    ``constant`` is the ``constant_answer`` of the training split, ``labels`` the label set, if there is one.
    """
    return [_chance(example, constant, labels) for example in examples]


def _chance(example: Example, constant: int | None, labels: Sequence[str]) -> float:
    if example.choices:
        return float("nan") if example.label is None else 1 / len(example.choices)
    return float("nan") if constant is None else score(example, constant, labels)
