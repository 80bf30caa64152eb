"""Selection: scores per modality, the selectors and their options."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.method.selection import SELECTORS, SelectionOptions, nucleus, select, token_scores
from tdlib.method.tokens import Tokens

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)
DRAWN = {"random", "sample"}
every_selector = pytest.mark.parametrize("name", sorted(SELECTORS))
by_score = pytest.mark.parametrize("name", sorted(set(SELECTORS) - DRAWN - {"first"}))

# four text tokens, four visual ones, one of neither
STUDENT = Tokens.cat(
    [
        Tokens.text(torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])),
        Tokens.visual(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)),
        Tokens.text(torch.tensor([[0, 0]])),
    ]
)


def everything(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def random_scores(seed, *shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores without ties, and which tokens are valid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator) < 0.7


def student_of(*batch) -> Tokens:
    return Tokens(STUDENT.spans.expand(*batch, 9, 2), STUDENT.boxes.expand(*batch, 9, 4))


def random_relevance(seed, *batch) -> tuple[torch.Tensor, torch.Tensor, Tokens, torch.Tensor]:
    """Relevance in [-1, 1], prior in [0, 1] with some zeros, tokens, valid."""
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.rand(*batch, 9, generator=generator) * 2 - 1
    prior = (torch.rand(*batch, 9, generator=generator) * 1.5 - 0.5).clamp_min(0)
    return relevance, prior, student_of(*batch), torch.rand(*batch, 9, generator=generator) < 0.7


# Scores


def plain_scores(relevance, prior, student, valid, temperature, prior_weight) -> list[float]:
    """The formula with Python's numbers, for one sequence."""
    scores = [0.0] * len(relevance)
    for modality in (student.is_text, student.is_visual):
        tokens = [i for i in range(len(scores)) if modality[i] and valid[i]]
        raw = {
            i: math.exp(relevance[i].item() / temperature) * prior[i].item() ** prior_weight for i in tokens
        }
        for i in tokens:
            scores[i] = raw[i] / sum(raw.values()) if sum(raw.values()) else 0.0
    return scores


@few
@given(seeds, st.sampled_from([0.05, 0.5, 3.0]), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_scores_agree_with_the_formula(seed, temperature, prior_weight):
    case = random_relevance(seed)
    expected = torch.tensor(plain_scores(*case, temperature, prior_weight))
    assert_close(token_scores(*case, temperature, prior_weight), expected, atol=1e-5, rtol=1e-4)


@few
@given(seeds)
def test_each_modality_sums_to_one_or_zero(seed):
    relevance, prior, student, valid = random_relevance(seed, 3)
    scores = token_scores(relevance, prior, student, valid, 0.1, 1.0)
    for modality in (student.is_text, student.is_visual):
        has_any = (modality & valid & (prior > 0)).any(dim=-1)
        assert_close(scores.masked_fill(~modality, 0).sum(dim=-1), has_any.float())
    assert scores.masked_fill(valid & (student.is_text | student.is_visual), 0).eq(0).all()


def test_nothing_valid_scores_zero_and_padding_may_hold_anything():
    relevance, prior, student, _ = random_relevance(0)
    nothing = torch.zeros(9, dtype=torch.bool)
    assert token_scores(relevance, prior, student, nothing, 0.1, 1.0).eq(0).all()
    only_text = student.is_text
    dirty = relevance.masked_fill(~only_text, math.nan), prior.masked_fill(~only_text, -1)
    clean = token_scores(relevance, torch.ones(9), student, only_text, 0.1, 0.0)
    assert_close(token_scores(*dirty, student, only_text, 0.1, 0.0), clean)


def test_a_relevance_that_is_not_a_number_shows_in_its_modality():
    relevance = torch.zeros(9)
    relevance[1] = math.nan
    scores = token_scores(relevance, torch.ones(9), STUDENT, everything(relevance), 0.1, 1.0)
    assert scores[:4].isnan().all()
    assert_close(scores[4:8], torch.full((4,), 0.25))


def test_a_high_relevance_with_prior_zero_does_not_drown_the_rest():
    relevance = torch.tensor([1.0, -1.0, -0.99, -1.0, 0, 0, 0, 0, 0])
    prior = torch.tensor([0.0, 1.0, 1.0, 0.0, 1, 1, 1, 1, 1])
    scores = token_scores(relevance, prior, STUDENT, everything(prior), 0.01, 1.0)
    share = 1 / (1 + math.e)  # the rest lies 200 temperatures below the token without prior
    assert_close(scores[:4], torch.tensor([0.0, share, 1 - share, 0.0]), atol=1e-4, rtol=0)


def test_scores_carry_no_gradient():
    relevance, prior, student, valid = random_relevance(0)
    assert not token_scores(relevance.requires_grad_(), prior, student, valid, 0.1, 1.0).requires_grad


@few
@given(seeds)
def test_scores_are_permutation_equivariant_and_blind_to_padding(seed):
    relevance, prior, student, valid = random_relevance(seed)
    scores = token_scores(relevance, prior, student, valid, 0.1, 1.0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = Tokens(student.spans[order], student.boxes[order])
    assert_close(token_scores(relevance[order], prior[order], moved, valid[order], 0.1, 1.0), scores[order])
    longer = Tokens.cat([student, student])
    padded = token_scores(
        relevance.repeat(2), prior.repeat(2), longer, torch.cat([valid, torch.zeros_like(valid)]), 0.1, 1.0
    )
    assert_close(padded, F.pad(scores, (0, 9)))


def test_batched_scores_equal_unbatched():
    relevance, prior, student, valid = random_relevance(0, 2, 3)
    scores = token_scores(relevance, prior, student, valid, 0.1, 1.0)
    for b in range(2):
        for c in range(3):
            one = token_scores(relevance[b, c], prior[b, c], STUDENT, valid[b, c], 0.1, 1.0)
            assert_close(scores[b, c], one)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="relevance temperature"):
        token_scores(*random_relevance(0), temperature, 1.0)


@pytest.mark.parametrize("prior_weight", [-0.5, math.nan, math.inf])
def test_a_bad_prior_weight_is_refused(prior_weight):
    with pytest.raises(ValueError, match="prior_weight"):
        token_scores(*random_relevance(0), 0.1, prior_weight)


# Nucleus


def smallest_size(scores: list[int], mass: Fraction) -> int:
    """Try every set, smallest first."""
    for size in range(len(scores) + 1):
        if any(sum(chosen) >= mass * sum(scores) for chosen in itertools.combinations(scores, size)):
            return size
    raise AssertionError("the set of all tokens has all the mass")


@few
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 20).map(lambda twentieths: Fraction(twentieths, 20)),
)
def test_nucleus_agrees_with_trying_every_set(tokens, mass):
    whole, valid = zip(*tokens, strict=True)
    scores, mask = torch.tensor(whole) / max(1, sum(whole)), torch.tensor(valid)
    selected = nucleus(scores, mask, SelectionOptions(mass=float(mass)), None)

    kept = [score if is_valid else 0 for score, is_valid in tokens]
    ranking = sorted(range(len(kept)), key=lambda i: (-kept[i], i))
    expected = ranking[: smallest_size(kept, mass)]
    assert selected.nonzero().flatten().tolist() == sorted(expected)
    for i in expected:  # without any one of them the mass is not reached
        assert sum(kept[j] for j in expected if j != i) < mass * sum(kept)


def test_nucleus_breaks_ties_by_position_and_ignores_rounding():
    tenths = torch.full((10,), 0.1)
    for size in range(1, 11):
        selected = nucleus(tenths, everything(tenths), SelectionOptions(mass=size / 10), None)
        assert selected.tolist() == [True] * size + [False] * (10 - size)


@few
@given(seeds, st.sampled_from([1e-9, 0.01, 0.5, 1.0]))
def test_nucleus_is_empty_only_where_no_valid_score_is_positive(seed, mass):
    scores, valid = random_scores(seed, 6, 3)
    scores = scores.masked_fill(scores < 0.4, 0)
    selected = nucleus(scores, valid, SelectionOptions(mass=mass), None)
    assert torch.equal(selected.any(dim=-1), (valid & (scores > 0)).any(dim=-1))
    assert not selected[scores == 0].any()


# The other selectors


def selected_by(name, scores, valid) -> torch.Tensor:
    return SELECTORS[name](scores, valid, SelectionOptions(), None)


def picked(name, scores, valid=None, **options) -> list[int]:
    scores = torch.tensor(scores)
    valid = everything(scores) if valid is None else torch.tensor(valid)
    return SELECTORS[name](scores, valid, SelectionOptions(**options), None).nonzero().flatten().tolist()


def test_top_k():
    assert picked("top_k", [0.1, 0.4, 0.2, 0.3], count=2) == [1, 3]
    assert picked("top_k", [0.1, 0.4, 0.2, 0.3], valid=[True, False, True, True], count=2) == [2, 3]
    assert picked("top_k", [0.5, 0.5, 0.5], count=2) == [0, 1]
    assert picked("top_k", [0.5, 0.5], valid=[False, True], count=5) == [1]


def test_top_fraction_rounds_up():
    valid = torch.arange(40) < torch.arange(0, 41).unsqueeze(-1)  # rows with 0, 1, ... 40 valid tokens
    scores = torch.rand(41, 40, generator=torch.Generator().manual_seed(0))
    for twentieths in range(1, 21):
        selected = SELECTORS["top_fraction"](scores, valid, SelectionOptions(fraction=twentieths / 20), None)
        expected = [math.ceil(Fraction(twentieths, 20) * size) for size in range(41)]
        assert selected.sum(dim=-1).tolist() == expected
        left_out = scores.masked_fill(selected | ~valid, -1).amax(dim=-1)
        assert (scores.masked_fill(~selected, 2).amin(dim=-1) > left_out).all()


def test_threshold():
    scores = [1.0, 2.0, 3.0, 6.0, 100.0]  # of the first four: mean 3, standard deviation 1.87
    valid = [True, True, True, True, False]
    assert picked("threshold", scores, valid, deviations=1.0) == [3]
    assert picked("threshold", scores, valid, deviations=0.0) == [2, 3]
    assert picked("threshold", scores, valid, deviations=-0.6) == [1, 2, 3]
    assert picked("threshold", scores, valid, deviations=3.0) == []
    assert picked("threshold", [0.1] * 10, deviations=1.0) == list(range(10))
    assert picked("threshold", [0.0, 0.0], deviations=1.0) == []


def test_controls_have_the_size_of_the_nucleus():
    scores, valid = [0.5, 0.05, 0.25, 0.15, 0.05], [True, True, True, True, True]
    assert picked("nucleus", scores, valid, mass=0.7) == [0, 2]
    assert picked("first", scores, valid, mass=0.7) == [0, 1]
    assert picked("inverse", scores, valid, mass=0.7) == [1, 4]
    assert picked("all", scores, valid) == [0, 1, 2, 3, 4]
    some = [False, True, True, True, False]
    assert picked("nucleus", scores, some, mass=0.7) == [2, 3]
    assert picked("first", scores, some, mass=0.7) == [1, 2]
    assert picked("inverse", scores, some, mass=0.7) == [1, 3]
    assert picked("all", scores, some) == [1, 2, 3]


@pytest.mark.parametrize("name", ["random", "sample", "first", "inverse"])
@few
@given(seed=seeds, mass=st.floats(0.05, 1.0))
def test_same_size_as_the_nucleus_and_only_valid_tokens(name, seed, mass):
    scores, valid = random_scores(seed, 5, 9)
    scores = scores.masked_fill(scores < 0.2, 0)
    options = SelectionOptions(mass=mass)
    selected = SELECTORS[name](scores, valid, options, torch.Generator().manual_seed(seed))
    assert torch.equal(selected.sum(dim=-1), nucleus(scores, valid, options, None).sum(dim=-1))
    assert not selected[~valid].any()


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_draws_follow_the_generator(name):
    scores, valid = random_scores(0, 20, 12)

    def draw(seed):
        return SELECTORS[name](scores, valid, SelectionOptions(), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    one = selected_by(name, scores, valid)
    torch.manual_seed(3)
    assert torch.equal(one, selected_by(name, scores, valid))


def test_random_is_uniform_over_the_valid_tokens():
    scores = torch.tensor([0.7, 0.15, 0.1, 0.05, 0.9]).expand(4000, 5)
    valid = torch.tensor([True, True, True, True, False]).expand(4000, 5)
    drawn = SELECTORS["random"](scores, valid, SelectionOptions(mass=0.8), torch.Generator().manual_seed(0))
    assert_close(drawn.float().mean(dim=0), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]), atol=0.04, rtol=0)


def test_sample_draws_in_proportion_to_the_score():
    scores = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(40_000, 4)
    one = SELECTORS["sample"](
        scores, everything(scores), SelectionOptions(mass=0.1), torch.Generator().manual_seed(0)
    )
    assert_close(one.float().mean(dim=0), scores[0], atol=0.01, rtol=0)
    two = SELECTORS["sample"](
        scores, everything(scores), SelectionOptions(mass=0.6), torch.Generator().manual_seed(0)
    )
    # the first token is drawn first, or second after either of the others
    first = 0.5 + 0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.8
    assert_close(two[:, 0].float().mean(), torch.tensor(first), atol=0.01, rtol=0)


# What all selectors share


@every_selector
@few
@given(seed=seeds)
def test_selectors_keep_to_the_valid_tokens_and_to_the_row(name, seed):
    scores, valid = random_scores(seed, 2, 3, 7)
    valid[0, 0] = False
    before = scores.clone(), valid.clone()
    selected = selected_by(name, scores, valid)
    assert selected.dtype == torch.bool and selected.shape == valid.shape
    assert not (selected & ~valid).any()
    assert torch.equal(scores, before[0]) and torch.equal(valid, before[1])
    if name not in DRAWN:
        for b, c in itertools.product(range(2), range(3)):
            assert torch.equal(selected[b, c], selected_by(name, scores[b, c], valid[b, c]))


@by_score
@few
@given(seed=seeds)
def test_selectors_are_permutation_equivariant(name, seed):
    scores, valid = random_scores(seed, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(
        selected_by(name, scores[order], valid[order]),
        selected_by(name, scores, valid)[order],
    )


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - DRAWN))
@few
@given(seed=seeds)
def test_padding_does_not_matter(name, seed):
    scores, valid = random_scores(seed, 8)
    padded = selected_by(name, F.pad(scores, (0, 3), value=9.0), F.pad(valid, (0, 3)))
    assert torch.equal(padded, F.pad(selected_by(name, scores, valid), (0, 3)))


# Selection by modality


@every_selector
@few
@given(seed=seeds)
def test_select_is_the_union_over_modalities(name, seed):
    scores, valid = random_scores(seed, 2, 9)
    student = student_of(2)
    selected = select(scores, student, valid, name, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    options = SelectionOptions()
    text = SELECTORS[name](scores, valid & student.is_text, options, generator)
    visual = SELECTORS[name](scores, valid & student.is_visual, options, generator)
    assert torch.equal(selected, text | visual)
    assert not selected[:, 8].any()  # neither text nor visual


def test_a_token_with_span_and_box_is_selected_as_text():
    both = Tokens(torch.tensor([[0, 2], [2, 4], [0, 0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4))
    scores = torch.tensor([0.7, 0.9, 0.1])
    selected = select(scores, both, everything(scores), "top_k", SelectionOptions(count=1))
    assert selected.tolist() == [False, True, True]


def test_select_takes_a_name_added_by_the_user(monkeypatch):
    def last(scores, valid, options, generator):
        return valid & (valid.flip(-1).cumsum(dim=-1).flip(-1) == 1)

    scores = torch.rand(9)
    monkeypatch.setitem(SELECTORS, "last", last)
    assert select(scores, STUDENT, everything(scores), "last").nonzero().flatten().tolist() == [3, 7]


def test_a_selector_sees_and_marks_one_modality_at_a_time(monkeypatch):
    """Also one that reads all scores, or forgets which tokens are valid."""
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    valid = torch.tensor([True, True, True, False, True, True, True, False, True])
    select_of = {
        "two best": lambda scores, valid, *_: valid & (scores >= scores.topk(2).values[-1]),
        "any score": lambda scores, valid, *_: scores > 0.15,
        "everything": lambda scores, valid, *_: torch.ones_like(valid),
    }
    found = {}
    for name, selector in select_of.items():
        monkeypatch.setitem(SELECTORS, name, selector)
        found[name] = select(scores, STUDENT, valid, name)
    assert found["two best"].nonzero().flatten().tolist() == [1, 2, 5, 6]
    assert found["any score"].nonzero().flatten().tolist() == [1, 2, 4, 5, 6]
    assert torch.equal(found["everything"], valid & (STUDENT.is_text | STUDENT.is_visual))


@pytest.mark.parametrize(
    "selector",
    [
        lambda scores, valid, *_: (valid & (scores > 0.5)).float(),
        lambda scores, valid, *_: scores.topk(3).indices,
        lambda scores, valid, *_: valid.any(-1, keepdim=True),
        lambda scores, valid, *_: None,
    ],
)
def test_select_refuses_what_is_no_mask_of_the_tokens(monkeypatch, selector):
    monkeypatch.setitem(SELECTORS, "mine", selector)
    with pytest.raises(ValueError, match=r"selector 'mine' returned .*expected a boolean mask.*\(9,\)"):
        select(torch.rand(9), STUDENT, torch.ones(9, dtype=torch.bool), "mine")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("mass", [0.0, -0.1, 60.0, math.nan]), ("count", [0, -2]), ("fraction", [0.0, 1.5, math.nan]),
        ("deviations", [math.nan, math.inf]),
    ],
)  # fmt: skip
def test_options_refuse_numbers_that_would_select_otherwise_than_they_say(option, values):
    for value in values:
        with pytest.raises(ValueError, match=f"selection {option}"):
            SelectionOptions(**{option: value})
