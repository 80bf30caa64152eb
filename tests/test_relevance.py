"""Relevance: cosines of aligned teacher tokens, the teacher's scalars, and what the student disagrees on."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE, relevance_disagreement, relevance_entropy
from tdlib.method.tokens import TeacherTokens, Tokens

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)
variants = pytest.mark.parametrize("variant", ["projected", "value", "vv"])
scalars = pytest.mark.parametrize("variant", ["attention", "rollout", "gradient"])

# two text tokens, two visual ones, and one without a position
STUDENT = Tokens.cat(
    [
        Tokens.text(torch.tensor([[0, 3], [4, 7]])),
        Tokens.visual(torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])),
        Tokens.text(torch.tensor([[0, 0]])),
    ]
)


def random_case(seed, *batch) -> tuple[torch.Tensor, Tokens, TeacherTokens]:
    """A row-stochastic alignment to six teacher tokens (the last student row is zero), tokens, teacher."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(*batch, *shape, generator=generator), dim=-1)

    alignment = torch.rand(*batch, 5, 6, generator=generator).softmax(dim=-1)
    alignment[..., 4, :] = 0
    student = Tokens(STUDENT.spans.expand(*batch, 5, 2), STUDENT.boxes.expand(*batch, 5, 4))
    positions = Tokens.text(torch.zeros(*batch, 6, 2, dtype=torch.long))
    saliency = torch.rand(*batch, 6, generator=generator)
    tokens = TeacherTokens(positions, unit(6, 8), unit(6, 8), unit(8), unit(8), unit(6, 8), saliency)
    return alignment, student, tokens


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("projected", [1.0, 0.6, 1.0]), ("value", [0.6, 1.0, 0.0]), ("vv", [0.0, 1.0, 0.8])],
)
def test_text_is_compared_with_the_image_and_regions_with_the_text(variant, expected):
    image, text = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    slanted = torch.tensor([0.6, 0.8])
    teacher = TeacherTokens(
        tokens=Tokens.text(torch.zeros(3, 2, dtype=torch.long)),
        projected=torch.stack([image, slanted, text]),
        value=torch.stack([slanted, image, image]),
        image_global=image,
        text_global=text,
        vv=torch.stack([text, image, slanted]),
    )
    rows = torch.cat([torch.eye(3), torch.zeros(2, 3)])  # the second region and the last token: not distilled
    assert_close(RELEVANCE[variant](rows, STUDENT, teacher), torch.tensor([*expected, 0.0, 0.0]))


@variants
@few
@given(seed=seeds)
def test_agrees_with_the_formula_token_by_token(variant, seed):
    alignment, student, teacher = random_case(seed)
    relevance = RELEVANCE[variant](alignment, student, teacher)
    for i in range(4):
        vectors = getattr(teacher, variant)
        mixed = sum(alignment[i, j] * vectors[j] for j in range(6))
        other = teacher.image_global if i < 2 else teacher.text_global
        assert_close(relevance[i], (mixed / mixed.norm()) @ other, atol=1e-5, rtol=1e-4)
    assert relevance.abs().le(1 + 1e-6).all()
    assert relevance[4] == 0


@variants
@few
@given(seed=seeds)
def test_permutation_equivariance_and_padding(variant, seed):
    alignment, student, teacher = random_case(seed)
    relevance = RELEVANCE[variant](alignment, student, teacher)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=generator), torch.randperm(6, generator=generator)
    shuffled = dataclasses.replace(teacher, **{variant: getattr(teacher, variant)[columns]})
    moved = Tokens(student.spans[rows], student.boxes[rows])
    assert_close(RELEVANCE[variant](alignment[rows][:, columns], moved, shuffled), relevance[rows])

    every = {name: F.pad(getattr(teacher, name), (0, 0, 0, 2)) for name in ("projected", "value", "vv")}
    padded = dataclasses.replace(teacher, **every, saliency=None)
    assert_close(RELEVANCE[variant](F.pad(alignment, (0, 2)), student, padded), relevance)


@variants
def test_batched_equals_unbatched(variant):
    alignment, student, teacher = random_case(0, 2, 3)
    relevance = RELEVANCE[variant](alignment, student, teacher)
    assert relevance.shape == (2, 3, 5)
    for b in range(2):
        for c in range(3):
            one = TeacherTokens(
                Tokens(teacher.tokens.spans[b, c], teacher.tokens.boxes[b, c]),
                teacher.projected[b, c],
                teacher.value[b, c],
                teacher.image_global[b, c],
                teacher.text_global[b, c],
                teacher.vv[b, c],
            )
            assert_close(relevance[b, c], RELEVANCE[variant](alignment[b, c], STUDENT, one))


@variants
def test_a_missing_modality_is_zero_not_nan(variant):
    alignment, student, teacher = random_case(0)
    teacher = dataclasses.replace(teacher, text_global=torch.zeros(8))
    relevance = RELEVANCE[variant](alignment, student, teacher)
    assert relevance[:2].ne(0).all() and relevance[2:].eq(0).all()


@variants
def test_no_gradient_reaches_the_teacher(variant):
    alignment, student, teacher = random_case(0)
    alignment.requires_grad_()
    for name in ["projected", "value", "vv", "image_global", "text_global"]:
        getattr(teacher, name).requires_grad_()
    assert not RELEVANCE[variant](alignment, student, teacher).requires_grad


@variants
def test_takes_a_cache_in_half_precision(variant):
    alignment, student, teacher = random_case(0)
    names = ["projected", "value", "vv", "image_global", "text_global"]
    half = dataclasses.replace(teacher, **{name: getattr(teacher, name).half() for name in names})
    expected = RELEVANCE[variant](alignment, student, teacher)
    assert_close(RELEVANCE[variant](alignment, student, half), expected, atol=2e-3, rtol=0)


# The teacher's scalars


@scalars
@few
@given(seed=seeds)
def test_scalars_are_mixed_as_targets_are(variant, seed):
    alignment, student, teacher = random_case(seed, 2)
    teacher.saliency.requires_grad_()
    relevance = RELEVANCE[variant](alignment, student, teacher)
    for b in range(2):
        for i in range(5):
            expected = sum(alignment[b, i, j] * teacher.saliency[b, j] for j in range(6))
            assert_close(relevance[b, i], expected.detach(), atol=1e-6, rtol=1e-5)
    assert relevance[:, 4].eq(0).all() and not relevance.requires_grad
    assert relevance.min() >= 0 and relevance.max() <= 1 + 1e-6


@pytest.mark.parametrize("variant", ["vv", "attention", "rollout", "gradient"])
def test_a_signal_that_was_not_computed_is_an_error(variant):
    alignment, student, teacher = random_case(0)
    without = dataclasses.replace(teacher, vv=None, saliency=None)
    with pytest.raises(ValueError, match="'vv'" if variant == "vv" else "'saliency'"):
        RELEVANCE[variant](alignment, student, without)


# What depends on the student

everyone = pytest.mark.parametrize("variant", STUDENT_RELEVANCE)


def student_case(seed, *batch) -> tuple[torch.Tensor, torch.Tensor, Tokens, torch.Tensor]:
    """Three text tokens and three visual ones, then a token without a position; the third is not valid."""
    generator = torch.Generator().manual_seed(seed)
    spans = torch.tensor([[0, 3], [4, 7], [8, 9]])
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.2, 0.2, 0.7, 0.7]])
    tokens = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes), Tokens.text(torch.tensor([[0, 0]]))])
    student = Tokens(tokens.spans.expand(*batch, 7, 2), tokens.boxes.expand(*batch, 7, 4))
    valid = torch.tensor([True, True, False, True, True, True, False]).expand(*batch, 7)
    projected = 3 * torch.randn(*batch, 7, 8, generator=generator)
    targets = F.normalize(torch.randn(*batch, 7, 8, generator=generator), dim=-1)
    return projected, targets * valid.unsqueeze(-1), student, valid


@few
@given(seed=seeds, temperature=st.floats(0.01, 10))
def test_entropy_is_that_of_the_softmax_over_targets_of_the_modality(seed, temperature):
    projected, targets, student, valid = student_case(seed)
    entropy = relevance_entropy(projected, targets, student, valid, temperature)
    for i, group in [(0, [0, 1]), (1, [0, 1]), (3, [3, 4, 5]), (4, [3, 4, 5]), (5, [3, 4, 5])]:
        cosines = F.cosine_similarity(projected[i], targets[group], dim=-1)
        expected = torch.distributions.Categorical(logits=cosines / temperature).entropy() / math.log(
            len(group)
        )
        assert_close(entropy[i], expected, atol=1e-4, rtol=1e-3)
    assert entropy[[2, 6]].eq(0).all()
    assert 0 <= entropy.min() and entropy.max() <= 1


def test_entropy_is_one_for_a_token_between_its_targets_and_zero_for_one_that_found_its_own():
    _, _, student, valid = student_case(0)
    targets = torch.eye(7, 8)
    between = targets[[0, 1]].sum(0).expand(7, 8)
    assert relevance_entropy(between, targets, student, valid, 0.1)[0] == pytest.approx(1, abs=1e-6)
    assert relevance_entropy(targets, targets, student, valid, 0.01).abs().max() < 1e-6
    alone = torch.tensor([True, False, False, True, False, False, False])
    assert relevance_entropy(between, targets, student, alone, 0.1).eq(0).all()  # one candidate each


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_an_entropy_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        relevance_entropy(*student_case(0), temperature)


@few
@given(seed=seeds)
def test_disagreement_is_the_distance_to_the_target(seed):
    projected, targets, student, valid = student_case(seed)
    found = relevance_disagreement(projected, targets, student, valid)
    for i in (0, 1, 3, 4, 5):
        assert_close(found[i], 1 - (projected[i] / projected[i].norm()) @ targets[i], atol=1e-5, rtol=1e-4)
    assert found[[2, 6]].eq(0).all()
    assert relevance_disagreement(5 * targets, targets, student, valid).abs().max() < 1e-6
    assert_close(relevance_disagreement(-targets, targets, student, valid), 2.0 * valid)


@everyone
@few
@given(seed=seeds)
def test_student_relevance_is_equivariant_batched_and_without_gradient(variant, seed):
    projected, targets, student, valid = student_case(seed, 2)
    relevance = STUDENT_RELEVANCE[variant]
    found = relevance(projected.requires_grad_(), targets, student, valid)
    assert found.shape == (2, 7) and not found.requires_grad
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    moved = Tokens(student.spans[:, order], student.boxes[:, order])
    assert_close(relevance(projected[:, order], targets[:, order], moved, valid[:, order]), found[:, order])
    for b in range(2):
        one = Tokens(student.spans[b], student.boxes[b])
        assert_close(relevance(projected[b], targets[b], one, valid[b]), found[b])


@everyone
def test_student_relevance_of_nothing_is_finite(variant):
    projected, targets, student, valid = student_case(0)
    found = STUDENT_RELEVANCE[variant](projected, 0 * targets, student, torch.zeros_like(valid))
    assert found.eq(0).all()
