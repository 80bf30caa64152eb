"""Alignment: overlap of characters and area, row-stochastic rows, targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tdlib.method.alignment import align, aligned_targets, text_overlap, visual_overlap
from tdlib.method.tokens import Tokens

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


def random_tokens(generator, *batch, text=5, visual=4, nothing=2) -> Tokens:
    """Text tokens of 1-6 of 20 characters, boxes on a grid of 1/8, and tokens without a position."""

    def integers(low, high, *shape):
        return torch.randint(low, high, (*batch, *shape), generator=generator)

    start = integers(0, 15, text, 1)
    corner = integers(0, 6, visual, 2)
    spans = torch.cat([start, start + integers(1, 7, text, 1)], dim=-1)
    boxes = torch.cat([corner, corner + integers(1, 3, visual, 2)], dim=-1) / 8
    empty = Tokens.text(torch.zeros(*batch, nothing, 2, dtype=torch.long))
    return Tokens.cat([Tokens.text(spans), Tokens.visual(boxes), empty])


def random_pair(seed, *batch) -> tuple[Tokens, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return random_tokens(generator, *batch), random_tokens(generator, *batch, text=6, visual=3, nothing=1)


def permuted(tokens: Tokens, order: torch.Tensor) -> Tokens:
    return Tokens(tokens.spans[..., order, :], tokens.boxes[..., order, :])


def grid(left, top, right, bottom, side) -> torch.Tensor:
    """Boxes of side x side patches that tile the given part of the picture."""
    xs, ys = torch.linspace(left, right, side + 1), torch.linspace(top, bottom, side + 1)
    return torch.stack(
        [torch.stack([xs[x], ys[y], xs[x + 1], ys[y + 1]]) for y in range(side) for x in range(side)]
    )


def test_wordpiece_against_bpe():
    # "The unbelievable cat": WordPiece The|un|##bel|##ievable|cat, BPE the|unbeliev|able|cat
    wordpiece = Tokens.text(torch.tensor([[0, 0], [0, 3], [4, 6], [6, 9], [9, 16], [17, 20], [0, 0]]))
    bpe = Tokens.text(torch.tensor([[0, 0], [0, 3], [4, 12], [12, 16], [17, 20]]))
    expected = torch.tensor(
        [
            [0, 0, 0, 0, 0],  # [CLS]
            [0, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 3 / 7, 4 / 7, 0],  # "iev" of "unbeliev", all of "able"
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0],  # [PAD]
        ]
    )
    assert_close(align(wordpiece, bpe), expected)


def test_bpe_tokens_that_carry_the_space_before_the_word_share_only_its_letters():
    spaced, bare = torch.tensor([[0, 3], [3, 7]]), torch.tensor([[0, 3], [4, 7]])
    assert_close(text_overlap(spaced, bare), torch.tensor([[3.0, 0.0], [0.0, 3.0]]))


def test_region_against_patches():
    patches = grid(0, 0, 1, 1, side=2)
    regions = torch.tensor([[0.25, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0], [0.6, 0.6, 0.7, 0.9]])
    expected = torch.tensor([[1 / 3, 2 / 3, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1.0]])
    assert_close(align(Tokens.visual(regions), Tokens.visual(patches)), expected)


@pytest.mark.parametrize("right", [0.2, 0.25, 0.25 + 1e-6])
def test_region_outside_the_crop_is_a_zero_row(right):
    crop = Tokens.visual(grid(0.25, 0, 0.75, 1, side=7))
    regions = Tokens.visual(torch.tensor([[0.0, 0.1, right, 0.9], [0.0, 0.1, 0.3, 0.9]]))
    outside, partly_inside = align(regions, crop)
    assert outside.eq(0).all()
    assert_close(partly_inside.sum(), torch.tensor(1.0))


def test_text_and_visual_tokens_never_mix():
    # A token with both a span and a box is a text token on either side.
    both = Tokens(torch.tensor([[0, 4], [0, 0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]))
    assert_close(align(both, both), torch.eye(2))
    only_visual = Tokens.visual(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert_close(align(both, only_visual), torch.tensor([[0.0], [1.0]]))
    assert_close(align(only_visual, both), torch.tensor([[0.0, 1.0]]))


def test_inverted_and_empty_boxes_share_nothing():
    boxes = torch.tensor([[0.8, 0.8, 0.2, 0.2], [0.5, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert visual_overlap(boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).eq(0).all()


@few
@given(seeds)
def test_overlaps_agree_with_counting(seed):
    student, teacher = random_pair(seed)
    shared = text_overlap(student.spans, teacher.spans)
    area = visual_overlap(student.boxes, teacher.boxes) * 64
    for i in range(len(student.spans)):
        for j in range(len(teacher.spans)):
            characters = set(range(*student.spans[i].tolist())) & set(range(*teacher.spans[j].tolist()))
            assert shared[i, j] == len(characters)
            assert area[i, j] == len(cells(student.boxes[i]) & cells(teacher.boxes[j]))


def cells(box: torch.Tensor) -> set[tuple[int, int]]:
    left, top, right, bottom = (box * 8).long().tolist()
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


@few
@given(seeds)
def test_rows_sum_to_one_exactly_where_something_overlaps(seed):
    student, teacher = random_pair(seed)
    alignment = align(student, teacher)
    texts = text_overlap(student.spans, teacher.spans).any(dim=-1)
    overlaps = texts | visual_overlap(student.boxes, teacher.boxes).any(dim=-1)
    assert alignment.ge(0).all()
    assert_close(alignment.sum(dim=-1), overlaps.float())


@few
@given(seeds)
def test_tokens_align_with_themselves(seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(1, 5, (6,), generator=generator).cumsum(dim=0)
    words = torch.stack([ends - torch.cat([ends[:1], ends.diff()]), ends], dim=-1)
    tokens = Tokens.cat([Tokens.text(words), Tokens.visual(grid(0.1, 0.2, 0.9, 1.0, side=3))])
    assert_close(align(tokens, tokens), torch.eye(15), atol=1e-5, rtol=0)


@few
@given(seeds)
def test_padding_does_not_matter(seed):
    student, teacher = random_pair(seed)
    padding = Tokens.text(torch.zeros(3, 2, dtype=torch.long))
    padded = align(Tokens.cat([student, padding]), Tokens.cat([teacher, padding]))
    assert_close(padded[:-3, :-3], align(student, teacher))
    assert padded[-3:].eq(0).all() and padded[:, -3:].eq(0).all()


@few
@given(seeds)
def test_permutation_equivariance(seed):
    student, teacher = random_pair(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(11, generator=generator), torch.randperm(10, generator=generator)
    shuffled = align(permuted(student, rows), permuted(teacher, columns))
    assert_close(shuffled, align(student, teacher)[rows][:, columns])


def test_batched_equals_unbatched():
    student, teacher = random_pair(0, 2, 3)
    vectors = torch.randn(2, 3, 10, 8)
    alignment = align(student, teacher)
    targets = aligned_targets(alignment, vectors)
    for b in range(2):
        for c in range(3):
            one = align(
                Tokens(student.spans[b, c], student.boxes[b, c]),
                Tokens(teacher.spans[b, c], teacher.boxes[b, c]),
            )
            assert_close(alignment[b, c], one)
            assert_close(targets[b, c], aligned_targets(one, vectors[b, c]))


def test_targets_are_the_normalised_mean_direction():
    alignment = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [-0.6, 0.8], [0.0, 0.0]])
    assert_close(aligned_targets(alignment, vectors), expected)
    assert aligned_targets(alignment, vectors)[2].eq(0).all()


@few
@given(seeds)
def test_targets_are_unit_vectors_where_rows_are_not_zero(seed):
    student, teacher = random_pair(seed, 2)
    alignment = align(student, teacher)
    targets = aligned_targets(alignment, torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(seed)))
    assert_close(targets.norm(dim=-1), alignment.any(dim=-1).float())


def test_no_gradient_reaches_the_teacher():
    vectors = torch.randn(3, 4, requires_grad=True)
    alignment = torch.eye(3, requires_grad=True)
    assert not aligned_targets(alignment, vectors).requires_grad


def test_targets_take_a_cache_in_half_precision():
    vectors = torch.tensor([[0.6, 0.8]], dtype=torch.float16)
    assert_close(aligned_targets(torch.ones(1, 1), vectors), torch.tensor([[0.6, 0.8]]), atol=1e-3, rtol=0)
