"""Computes chance, for every table: the score of a predictor that sees neither picture nor text.

If examples have choices, it takes one at random: 1 / choices. If there is a label set, it always gives one
answer, the one with the best mean score on the training split, and is scored on the tested split like any
prediction (VQA by its soft accuracy). It knows nothing of the tested split, so chance is lower where answers
have other frequencies (VQA-CP). Q->AR needs two right choices, so its chance is the product of both.
"""

from collections import defaultdict
from collections.abc import Sequence

from tdlib.data.examples import Example, Examples, spread
from tdlib.data.tasks import score

MOST = 20_000  # training examples that are read; from larger splits so many are drawn


def constant_answer(train: Examples) -> int | None:
    """Finds the label that scores best on the training split if it is always given; of equals, the first.

    Returns None if examples have choices, or if none has a label.
    """
    totals: dict[int, float] = defaultdict(float)
    for index in spread(len(train), MOST):
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
    """Computes the score of guessing on each example of a tested split, in [0, 1]; nan without a label.

    ``constant`` is the ``constant_answer`` of the training split, ``labels`` the label set, if there is one.
    """
    return [_chance(example, constant, labels) for example in examples]


def _chance(example: Example, constant: int | None, labels: Sequence[str]) -> float:
    if example.choices:
        return float("nan") if example.label is None else 1 / len(example.choices)
    return float("nan") if constant is None else score(example, constant, labels)
