"""Losses: scale-free distances, the targeted loss and its reductions, the choice distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.method.clip_td import distillation_loss
from tdlib.method.losses import DISTANCES, choice_distribution_loss, weighted_distance

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)
every_distance = pytest.mark.parametrize("name", sorted(DISTANCES))
# of one token alone, whatever the others are
every_pair_distance = pytest.mark.parametrize("name", sorted(set(DISTANCES) - {"info_nce"}))
LARGEST = {"cosine": 2.0, "l1": 2.0, "smooth_l1": 2.0, "mse": 4.0}


def random_vectors(seed, *shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(*shape, generator=generator)
    return student, F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_case(seed, *batch):
    """Student, targets, token weights (two of five tokens weigh nothing), instance weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*batch, 5, generator=generator)
    weights[..., [1, 3]] = 0
    return *random_vectors(seed, *batch, 5, 8), weights, torch.rand(batch, generator=generator)


# Distances


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", 0.4),
        ("mse", 0.8),  # 2 - 2 cos
        ("l1", (0.4 + 0.8) / 2 * 2**0.5),
        # the differences, times sqrt(2): 0.566 bends, 1.131 does not
        ("smooth_l1", (0.5 * 0.4**2 * 2 + 0.8 * 2**0.5 - 0.5) / 2),
    ],
)
def test_distances_on_an_example(name, expected):
    distance = DISTANCES[name](torch.tensor([[5.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
    assert_close(distance, torch.tensor([expected]))


@every_pair_distance
@few
@given(seed=seeds, dim=st.sampled_from([1, 2, 8, 64]))
def test_distances_are_zero_for_one_direction_symmetric_and_bounded(name, seed, dim):
    student, target = random_vectors(seed, 4, dim)
    distance = DISTANCES[name](student, target)
    assert distance.ge(-1e-6).all() and distance.le(LARGEST[name] + 1e-5).all()
    assert_close(DISTANCES[name](target, student), distance)
    assert_close(DISTANCES[name](7 * student, target), distance, atol=1e-5, rtol=1e-4)
    assert_close(DISTANCES[name](0.3 * target, target), torch.zeros(4), atol=1e-5, rtol=0)
    assert DISTANCES[name](-target, target).gt(0.5).all()


@few
@given(seed=seeds)
def test_mse_is_twice_the_cosine_distance(seed):
    student, target = random_vectors(seed, 4, 8)
    assert_close(DISTANCES["mse"](student, target), 2 * DISTANCES["cosine"](student, target))


@every_pair_distance
def test_distances_do_not_depend_on_the_width(name):
    narrow, wide = (DISTANCES[name](*random_vectors(0, 2000, dim)).mean() for dim in (32, 512))
    assert_close(narrow, wide, atol=0, rtol=0.05)


@every_distance
def test_distances_have_small_gradients_at_zero_vectors(name):
    student = torch.zeros(2, 4, requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    DISTANCES[name](student, target).sum().backward()
    assert student.grad.eq(0).all()


@every_distance
def test_distances_of_half_precision_vectors_do_not_overflow(name):
    student, target = random_vectors(0, 4, 8)
    half = DISTANCES[name]((1000 * student).half(), target.half())  # squares of these leave float16
    assert half.dtype == torch.float32
    assert_close(half, DISTANCES[name](student, target), atol=5e-3, rtol=0)


# Targeted loss

PHI = {"text": torch.nn.Identity(), "visual": torch.nn.Identity()}


def targeted_loss(student, targets, weights, instances, distance="cosine", num_sequences=None):
    """Step 9 of examples with one choice each, (batch, tokens, ...), all of whose tokens are words."""
    places = {
        "text": ((weights != 0) & (targets != 0).any(dim=-1)).flatten().nonzero().squeeze(1),
        "visual": torch.zeros(0, dtype=torch.long),
    }
    student, targets, weights = (part.unsqueeze(1) for part in (student, targets, weights))
    on_words, on_places = distillation_loss(
        student, PHI, targets, weights, instances, places, distance, num_sequences
    )
    return on_words + on_places


@every_pair_distance
@few
@given(seed=seeds)
def test_targeted_loss_agrees_with_the_formula(name, seed):
    student, targets, weights, instances = random_case(seed, 3)
    total = 0.0
    for b in range(3):
        for i in range(5):
            distance = DISTANCES[name](student[b, i : i + 1], targets[b, i : i + 1]).item()
            total += instances[b].item() * weights[b, i].item() * distance
    loss = targeted_loss(student, targets, weights, instances, name)
    assert_close(loss, torch.tensor(total / 3), atol=1e-5, rtol=1e-4)


def test_targeted_loss_is_zero_for_identical_inputs_and_pulls_towards_the_target():
    student, targets, weights, instances = random_case(0, 3)
    zero = torch.tensor(0.0)
    assert_close(targeted_loss(targets, targets, weights, instances), zero, atol=1e-6, rtol=0)
    student.requires_grad_()
    loss = targeted_loss(student, targets, weights, instances)
    loss.backward()
    assert targeted_loss(student - student.grad, targets, weights, instances) < loss


def test_an_empty_selection_adds_zero_and_stays_in_the_mean():
    student, targets, weights, instances = random_case(0, 2)
    alone = targeted_loss(student[:1], targets[:1], weights[:1], instances[:1])
    weights[1] = 0
    assert_close(targeted_loss(student, targets, weights, instances), alone / 2)


def test_micro_batches_add_up_to_the_window():
    case = random_case(0, 6)
    parts = [
        targeted_loss(*(tensor[part] for tensor in case), num_sequences=6)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert_close(sum(parts), targeted_loss(*case))


def test_the_loss_is_the_mean_over_examples_and_choices_words_and_places():
    student, targets, weights, _ = random_case(0, 2, 3)
    instances = torch.tensor([0.2, 0.9])
    weighed = weights.flatten().nonzero().squeeze(1)
    words = (weighed % 5) < 2
    places = {"text": weighed[words], "visual": weighed[~words]}
    found = sum(distillation_loss(student, PHI, targets, weights, instances, places))
    single = [
        targeted_loss(*(part[b, c][None] for part in (student, targets, weights)), instances[[b]])
        for b in range(2)
        for c in range(3)
    ]
    assert_close(found, torch.stack(single).mean())


@every_distance
@few
@given(seed=seeds)
def test_targeted_loss_ignores_padding_and_order(name, seed):
    student, targets, weights, instances = random_case(seed, 3)
    loss = targeted_loss(student, targets, weights, instances, name)
    padded = [F.pad(student, (0, 0, 0, 2), value=5.0), F.pad(targets, (0, 0, 0, 2)), F.pad(weights, (0, 2))]
    assert_close(targeted_loss(*padded, instances, name), loss)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = targeted_loss(student[:, order], targets[:, order], weights[:, order], instances, name)
    assert_close(moved, loss)


@every_distance
@pytest.mark.parametrize("garbage", [0.0, math.inf, math.nan])
def test_masked_tokens_stay_out_whatever_they_hold(name, garbage):
    student, targets, weights, instances = random_case(0, 3)
    clean = targeted_loss(student, targets, weights, instances, name)
    masked = weights == 0
    student = student.masked_fill(masked.unsqueeze(-1), garbage).requires_grad_()
    targets[:, 1] = 0  # the other masked token keeps its target
    loss = targeted_loss(student, targets, weights, instances, name)
    loss.backward()
    assert_close(loss, clean)
    assert student.grad[masked].eq(0).all() and student.grad[~masked].ne(0).any()
    assert student.grad.isfinite().all()


@every_distance
def test_a_zero_target_adds_nothing_even_if_it_has_weight(name):
    student, targets, weights, instances = random_case(0, 3)
    targets[:, 0] = 0
    without = weights.clone()
    without[:, 0] = 0
    loss = targeted_loss(student, targets, weights, instances, name)
    assert_close(loss, targeted_loss(student, targets, without, instances, name))


def bare_cosine(student, targets):
    """Divides by zero where there is no target, as a distance that a user adds may."""
    return 1 - (student * targets).sum(-1) / (student.norm(dim=-1) * targets.norm(dim=-1))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_distance_without_a_value_where_there_is_no_target_does_no_harm(monkeypatch, weight):
    """A device that reads every token, and global embeddings, have targets of zeros among the others."""
    monkeypatch.setitem(DISTANCES, "bare", bare_cosine)
    (student, targets), weights = random_vectors(0, 4, 8), torch.full((4,), 0.5)
    targets[1], weights[1] = 0, weight
    student.requires_grad_()
    loss = weighted_distance(student, targets, weights, "bare")
    loss.backward()
    kept = torch.tensor([0, 2, 3])
    assert_close(loss, 0.5 * DISTANCES["cosine"](student[kept], targets[kept]).sum())
    assert student.grad.isfinite().all() and student.grad[1].eq(0).all() and student.grad[0].ne(0).any()


@every_distance
def test_everything_masked_is_zero_with_zero_gradients(name):
    student = random_case(0, 3)[0].requires_grad_()
    loss = targeted_loss(student, torch.zeros(3, 5, 8), torch.zeros(3, 5), torch.zeros(3), name)
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


def test_no_gradient_reaches_teacher_or_weights():
    student, *others = (tensor.requires_grad_() for tensor in random_case(0, 3))
    targeted_loss(student, *others).backward()
    assert student.grad.ne(0).any()
    assert [tensor.grad for tensor in others] == [None, None, None]


# Choice distribution


def random_logits(seed) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, 4, generator=generator), 3 * torch.randn(5, 4, generator=generator)


@few
@given(seeds, st.sampled_from([0.5, 1.0, 4.0]))
def test_choice_loss_agrees_with_torch(seed, temperature):
    student, teacher = random_logits(seed)
    student_distribution, teacher_distribution = (
        torch.distributions.Categorical(logits=logits / temperature) for logits in (student, teacher)
    )
    divergence = torch.distributions.kl_divergence(teacher_distribution, student_distribution).mean()
    loss = choice_distribution_loss(student, teacher, temperature)
    assert_close(loss, temperature**2 * divergence, atol=1e-5, rtol=1e-4)
    assert loss > 0


def test_choice_loss_is_zero_for_one_distribution():
    student, _ = random_logits(0)
    assert_close(choice_distribution_loss(student + 2, student), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_choice_loss_follows_permutations_of_the_choices():
    student, teacher = random_logits(0)
    order = torch.tensor([2, 0, 3, 1])
    loss = choice_distribution_loss(student, teacher)
    assert_close(choice_distribution_loss(student[:, order], teacher[:, order]), loss)


def test_choice_loss_micro_batches_add_up_to_the_window():
    student, teacher = random_logits(0)
    parts = [
        choice_distribution_loss(student[part], teacher[part], num_examples=5)
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert_close(sum(parts), choice_distribution_loss(student, teacher))


def test_each_examples_divergence_counts_as_its_weight_says():
    student, teacher = random_logits(3)
    weights = torch.linspace(0, 1, len(student))
    single = torch.stack([choice_distribution_loss(student[[i]], teacher[[i]]) for i in range(len(student))])
    found = choice_distribution_loss(student, teacher, instance_weights=weights)
    assert_close(found, (weights * single).mean())
    assert_close(
        choice_distribution_loss(student, teacher, instance_weights=torch.ones(len(student))),
        choice_distribution_loss(student, teacher),
    )


def test_choice_loss_sends_its_gradient_to_the_student_alone():
    student, teacher = (logits.requires_grad_() for logits in random_logits(0))
    choice_distribution_loss(student, teacher).backward()
    assert_close(student.grad, (student.softmax(dim=-1) - teacher.softmax(dim=-1)).detach() / 5)
    assert teacher.grad is None


def test_choice_loss_is_finite_for_a_certain_teacher():
    student = torch.zeros(1, 3, requires_grad=True)
    loss = choice_distribution_loss(student, torch.tensor([[1000.0, 0.0, -math.inf]]))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(math.log(3)))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_choice_loss_refuses_a_bad_temperature(temperature):
    with pytest.raises(ValueError, match="choice temperature"):
        choice_distribution_loss(*random_logits(0), temperature)


def test_info_nce_is_the_cross_entropy_of_finding_ones_own_target():
    student, target = random_vectors(3, 6, 8)
    cosines = torch.nn.functional.normalize(student, dim=-1) @ torch.nn.functional.normalize(target, dim=-1).T
    expected = torch.nn.functional.cross_entropy(cosines / 0.1, torch.arange(6), reduction="none")
    assert_close(DISTANCES["info_nce"](student, target), expected)
    assert_close(DISTANCES["info_nce"](7 * student, target), expected, atol=1e-5, rtol=1e-4)
    assert_close(DISTANCES["info_nce"](student[:1], target[:1]), torch.zeros(1))  # no other target


def test_info_nce_counts_neither_equal_targets_nor_absent_ones_as_negatives():
    student, target = random_vectors(3, 4, 8)
    alone = DISTANCES["info_nce"](student, target)
    twice, empty = torch.cat([target, 3 * target[:1]]), torch.cat([target, torch.zeros(1, 8)])
    more = torch.cat([student, student[:1]])
    assert_close(DISTANCES["info_nce"](more, empty)[:4], alone)
    assert_close(DISTANCES["info_nce"](more, twice)[0], alone[0])
    assert DISTANCES["info_nce"](more, twice)[1] > alone[1]


def test_info_nce_of_targeted_tokens_does_not_see_the_others():
    student, targets, weights, instances = random_case(0, 2)
    weights[:, 2:] = 0
    few = targeted_loss(student[:, :2], targets[:, :2], weights[:, :2], instances, "info_nce")
    assert_close(targeted_loss(student, targets, weights, instances, "info_nce"), few)


@pytest.mark.parametrize(
    "distance", [lambda one, two: ((one - two) ** 2).mean(), lambda one, two: (one - two) ** 2]
)
def test_a_distance_is_one_number_per_token(monkeypatch, distance):
    """The mean over all tokens in its place would be weighed as if it were each token's."""
    monkeypatch.setitem(DISTANCES, "mine", distance)
    with pytest.raises(ValueError, match=r"distance 'mine' returned .*expected .*\(9,\)"):
        targeted_loss(*random_case(0, 3), "mine")
