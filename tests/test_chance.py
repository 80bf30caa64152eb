"""Chance: one definition, by hand for every kind of task."""

from pathlib import Path

import numpy as np
import pytest

from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, Examples, TextPart
from tdlib.training.evaluation import Predictions, prediction_table


def example(label=None, choices=0, annotators=(), soft=()) -> Example:
    parts = tuple(TextPart(f"answer {i}") for i in range(choices))
    return Example("e", Path("p.png"), (), (), TextPart("why?"), parts, label, "", annotators=annotators,
                   soft_label=soft)  # fmt: skip


def test_one_of_the_choices_whatever_the_label():
    assert constant_answer(Examples.of([example(0, 4), example(0, 4)])) is None
    assert chance_scores([example(3, 4), example(0, 2), example(None, 4)], None) == pytest.approx(
        [0.25, 0.5, float("nan")], nan_ok=True
    )


def test_the_answer_is_chosen_in_training_and_scored_on_the_test():
    train = Examples.of([example(label) for label in (2, 1, 2, 0, None)])
    constant = constant_answer(train)
    assert constant == 2
    tested = [example(label) for label in (0, 0, 0, 2, None)]  # whose own most frequent label is 0
    assert chance_scores(tested, constant, "abc") == pytest.approx([0, 0, 0, 1, float("nan")], nan_ok=True)
    assert constant_answer(Examples.of([example(1), example(0)])) == 0, "of equals, the first"
    assert constant_answer(Examples.of([example(None)])) is None
    assert np.isnan(chance_scores(tested, None, "abc")).all()


def test_vqa_counts_by_its_soft_accuracy():
    labels = ("yes", "two", "red")
    # by label "yes" and "two" are level; by what they are worth "two" is ahead
    train = [example(0, soft=((0, 0.3),)), example(1, soft=((1, 1.0), (0, 0.3)))]
    constant = constant_answer(Examples.of(train))
    assert labels[constant] == "two"
    said = [("two",) * 10, ("two",) * 2 + ("red",) * 8, ("yes",) * 10]
    tested = [example(1, annotators=said[0]), example(2, annotators=said[1]), example(0, annotators=said[2])]
    # of ten subsets of nine: eight have both "two" (2/3), two have one (1/3): 0.6
    assert chance_scores(tested, constant, labels) == pytest.approx([1.0, 0.6, 0.0])


def test_predictions_keep_the_chance_of_each_example():
    tested = [example(label) for label in (0, 2)]
    table = prediction_table("dev", tested, Predictions.of(np.eye(3)[:2]), ("a", "b", "c"), constant=2)
    assert list(table["chance"]) == [0.0, 1.0] and list(table["score"]) == [1.0, 0.0]
    table = prediction_table("val", [example(1, 4)], Predictions.of(np.eye(4)[:1]))
    assert list(table["chance"]) == [0.25]
