"""Weighting: token weights sum to 1 over both modalities, instance weights follow p_T and p_S."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.method.clip_td import choose_tokens, weigh_examples
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import INSTANCE_WEIGHTS, TOKEN_WEIGHTS, focal_weight

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)
every_token_weight = pytest.mark.parametrize("name", sorted(TOKEN_WEIGHTS))
every_instance_weight = pytest.mark.parametrize("name", sorted(INSTANCE_WEIGHTS))


def random_selection(seed, *shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator) < 0.4


def random_probabilities(seed, *batch, choices=4):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(*batch, choices, generator=generator).softmax(dim=-1)
    student = torch.randn(*batch, choices, generator=generator).softmax(dim=-1)
    return teacher, student, torch.randint(choices, batch, generator=generator)


def of_two(teacher: list[float], student: list[float]):
    """Probabilities over two choices of which the first is right."""
    teacher, student = torch.tensor(teacher), torch.tensor(student)
    labels = torch.zeros(len(teacher), dtype=torch.long)
    return torch.stack([teacher, 1 - teacher], dim=-1), torch.stack([student, 1 - student], dim=-1), labels


def test_token_weights_on_an_example():
    scores = torch.tensor([0.6, 0.3, 0.1, 0.7, 0.2])
    selected = torch.tensor([True, False, True, False, True])
    assert_close(TOKEN_WEIGHTS["score"](scores, selected), torch.tensor([6 / 9, 0, 1 / 9, 0, 2 / 9]))
    assert_close(TOKEN_WEIGHTS["uniform"](scores, selected), torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3]))


@every_token_weight
@few
@given(seed=seeds)
def test_token_weights_sum_to_one_over_the_selected(name, seed):
    scores, selected = random_selection(seed, 4, 6)
    weights = TOKEN_WEIGHTS[name](scores, selected)
    assert_close(weights.sum(dim=-1), selected.any(dim=-1).float())
    assert weights[selected].gt(0).all() and weights[~selected].eq(0).all()


@every_token_weight
@few
@given(seed=seeds)
def test_token_weights_ignore_padding_and_follow_permutations(name, seed):
    scores, selected = random_selection(seed, 6)
    weights = TOKEN_WEIGHTS[name](scores, selected)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert_close(TOKEN_WEIGHTS[name](scores[order], selected[order]), weights[order])
    padded = TOKEN_WEIGHTS[name](F.pad(scores, (0, 3), value=math.nan), F.pad(selected, (0, 3)))
    assert_close(padded, F.pad(weights, (0, 3)))


@every_token_weight
def test_token_weights_batched_equal_unbatched(name):
    scores, selected = random_selection(0, 2, 3, 6)
    weights = TOKEN_WEIGHTS[name](scores, selected)
    for b in range(2):
        for c in range(3):
            assert_close(weights[b, c], TOKEN_WEIGHTS[name](scores[b, c], selected[b, c]))


def test_selected_tokens_without_any_score_weigh_nothing():
    weights = TOKEN_WEIGHTS["score"](torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert weights.tolist() == [0.0, 0.0, 0.0]


@every_token_weight
def test_token_weights_carry_no_gradient(name):
    scores, selected = random_selection(0, 4, 6)
    assert not TOKEN_WEIGHTS[name](scores.requires_grad_(), selected).requires_grad


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ratio", [0.8 / 1.0, 0.3 / 0.9]),
        ("teacher", [0.8, 0.3]),
        ("gap", [0.6, 0.0]),
        ("correct", [1.0, 0.0]),
        ("focal", [0.64, 0.16]),
        (
            "wsld",
            [1 - math.exp(-math.log(0.2) / math.log(0.8)), 1 - math.exp(-math.log(0.6) / math.log(0.3))],
        ),
        ("uniform", [1.0, 1.0]),
    ],
)
def test_instance_weights_on_two_examples(name, expected):
    assert_close(INSTANCE_WEIGHTS[name](*of_two([0.8, 0.3], [0.2, 0.6])), torch.tensor(expected))


def test_instance_weights_read_the_probability_of_the_label():
    teacher, student, _ = of_two([0.8], [0.2])
    for name in ("ratio", "teacher", "gap", "correct", "focal", "wsld"):
        first = INSTANCE_WEIGHTS[name](teacher, student, torch.tensor([0]))
        flipped = INSTANCE_WEIGHTS[name](teacher.flip(-1), student.flip(-1), torch.tensor([1]))
        assert_close(first, flipped)
        assert first != INSTANCE_WEIGHTS[name](teacher, student, torch.tensor([1])), name


def test_focal_gamma():
    assert_close(focal_weight(*of_two([0.5], [0.2]), gamma=3.0), torch.tensor([0.8**3]))


@every_instance_weight
@few
@given(seed=seeds)
def test_instance_weights_lie_in_the_unit_interval(name, seed):
    weights = INSTANCE_WEIGHTS[name](*random_probabilities(seed, 16))
    assert weights.ge(0).all() and weights.le(1).all()


@every_instance_weight
def test_instance_weights_at_the_extremes(name):
    certain = [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    weights = INSTANCE_WEIGHTS[name](*of_two(certain, [0.0, 0.5, 1.0] * 3))
    assert weights.ge(0).all() and weights.le(1).all()  # false for NaN


def test_a_teacher_that_rules_out_the_truth_is_not_followed():
    assert INSTANCE_WEIGHTS["ratio"](*of_two([0.0, 0.0], [0.0, 0.5])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "with_teacher", "with_student"),
    [
        ("ratio", 1, -1),
        ("teacher", 1, 0),
        ("gap", 1, -1),
        ("correct", 1, 0),
        ("focal", 0, -1),
        ("wsld", 1, -1),
        ("uniform", 0, 0),
    ],
)
def test_instance_weights_are_monotone(name, with_teacher, with_student):
    rising = torch.linspace(0, 1, 21).tolist()
    for fixed in (0.1, 0.4, 0.9):
        still = [fixed] * 21
        along_teacher = INSTANCE_WEIGHTS[name](*of_two(rising, still)).diff()
        along_student = INSTANCE_WEIGHTS[name](*of_two(still, rising)).diff()
        for steps, direction in [(along_teacher, with_teacher), (along_student, with_student)]:
            assert (steps * direction).ge(0).all()
            assert steps.ne(0).any() == (direction != 0)


@every_instance_weight
def test_instance_weights_carry_no_gradient(name):
    teacher, student, labels = random_probabilities(0, 4)
    weights = INSTANCE_WEIGHTS[name](teacher.requires_grad_(), student.requires_grad_(), labels)
    assert not weights.requires_grad


@every_instance_weight
def test_instance_weights_batched_equal_unbatched(name):
    teacher, student, labels = random_probabilities(0, 2, 3)
    weights = INSTANCE_WEIGHTS[name](teacher, student, labels)
    assert weights.shape == (2, 3)
    for b in range(2):
        for c in range(3):
            assert_close(weights[b, c], INSTANCE_WEIGHTS[name](teacher[b, c], student[b, c], labels[b, c]))


# Functions that a user adds


def test_a_token_weight_counts_where_tokens_are_selected(monkeypatch):
    """Wherever the loss reads: a device that reads every token must not give weight to the others."""
    monkeypatch.setitem(TOKEN_WEIGHTS, "mine", lambda scores, selected: scores + 1)
    words = Tokens.text(torch.tensor([[[0, 1], [1, 2], [2, 3]]]))
    scores, valid = torch.tensor([[0.7, 0.2, 0.1]]), torch.ones(1, 3, dtype=torch.bool)
    selected, weights = choose_tokens(scores, words, valid, token_weight="mine")
    assert selected.tolist() == [[True, False, False]]
    assert_close(weights, torch.tensor([[1.7, 0.0, 0.0]]))
    monkeypatch.setitem(TOKEN_WEIGHTS, "mine", lambda scores, selected: 1 / selected.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match=r"token_weight 'mine' returned .*\(1, 1\); expected .*\(1, 3\)"):
        choose_tokens(scores, words, valid, token_weight="mine")


@pytest.mark.parametrize(
    "function",
    [
        lambda teacher, student, labels: teacher.mean(),
        lambda teacher, student, labels: teacher.gather(-1, labels[:, None]),
        lambda teacher, student, labels: teacher,
    ],
)
def test_an_instance_weight_is_one_number_per_example(monkeypatch, function):
    """Broadcasting would weigh all examples alike, or pair all with all."""
    monkeypatch.setitem(INSTANCE_WEIGHTS, "mine", function)
    teacher, student, labels = random_probabilities(0, 4)
    with pytest.raises(ValueError, match=r"instance weight 'mine' returned .*expected .*\(4,\)"):
        weigh_examples(teacher, student, labels, "mine")


@pytest.mark.parametrize("name", INSTANCE_WEIGHTS)
def test_an_unknown_answer_has_no_weight_where_the_weight_reads_the_answer(name):
    """And the same weight as any other where it does not: naive distillation needs no answer."""
    teacher, student, _ = random_probabilities(0, 4)
    per_answer = torch.stack(
        [weigh_examples(teacher, student, torch.full((4,), k), name) for k in range(teacher.shape[-1])]
    )
    unknown = weigh_examples(teacher, student, torch.full((4,), -1), name)
    if (per_answer == per_answer[0]).all():
        assert torch.equal(unknown, per_answer[0])
    else:
        assert not unknown.any()
