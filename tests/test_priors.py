"""Priors: IDF of words over the training split, carried to tokens by character spans."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tdlib.method.priors import PRIORS, Idf, idf_prior, referred_prior

few = settings(deadline=None, max_examples=50)
DOCUMENTS = ["The cat sat.", "the cat, the dog", "A dog!"]
COMMON = math.log(4 / 3) + 1  # in two of three documents
RARE = math.log(4 / 2) + 1  # in one
UNSEEN = math.log(4 / 1) + 1


def test_fit_counts_documents_in_lower_case():
    idf = Idf.fit(iter(DOCUMENTS))
    assert idf == Idf(3, {"the": 2, "cat": 2, "sat": 1, "dog": 2, "a": 1})
    assert [idf.word(word) for word in ("the", "SAT", "zebra")] == pytest.approx([COMMON, RARE, UNSEEN])


def test_fit_refuses_a_single_string():
    with pytest.raises(ValueError, match="documents is one string"):
        Idf.fit("the cat")


def test_without_documents_all_words_are_alike():
    assert Idf.fit([]).word("cat") == 1


def test_prior_on_an_example():
    # tokens: [CLS] the zeb ##ra sat . "t ." [PAD]
    text = "The zebra sat."
    spans = torch.tensor([[0, 0], [0, 3], [4, 7], [7, 9], [10, 13], [13, 14], [12, 14], [0, 0]])
    expected = torch.tensor([0, COMMON, UNSEEN, UNSEEN, RARE, 0, RARE, 0]) / UNSEEN
    assert_close(idf_prior(text, spans, Idf.fit(DOCUMENTS)), expected)


def test_a_token_over_two_words_takes_the_one_it_shares_most_with():
    idf = Idf.fit(DOCUMENTS)
    spans = torch.tensor([[1, 7], [0, 6], [1, 5], [4, 9]])  # "he zeb", "The ze", "he z", "zebra"
    expected = torch.tensor([UNSEEN, COMMON, COMMON, UNSEEN]) / UNSEEN
    assert_close(idf_prior("The zebra", spans, idf), expected)


def test_ties_go_to_the_earlier_word():
    idf = Idf.fit(DOCUMENTS)
    spans = torch.tensor([[2, 5], [4, 7]])  # "e z" shares one letter with either word; then "zeb"
    assert_close(idf_prior("the zebra", spans, idf), torch.tensor([COMMON / UNSEEN, 1.0]))


def test_lower_case_that_changes_the_length_does_not_shift_words():
    # In lower case the dotted capital I has two characters.
    prior = idf_prior("İİİ the", torch.tensor([[0, 3], [4, 7]]), Idf.fit(DOCUMENTS))
    assert_close(prior, torch.tensor([1.0, COMMON / UNSEEN]))


def test_no_words_and_no_tokens():
    idf = Idf.fit(DOCUMENTS)
    assert idf_prior("?! ...", torch.tensor([[0, 2], [3, 6]]), idf).tolist() == [0.0, 0.0]
    assert idf_prior("", torch.zeros(0, 2, dtype=torch.long), idf).shape == (0,)


@few
@given(
    st.lists(st.sampled_from(["the", "Cat", "dog", "zebra", ",", " ", "...", "İ"]), max_size=8),
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6)), max_size=6),
)
def test_prior_agrees_with_counting_characters(pieces, lengths):
    text, idf = " ".join(pieces), Idf.fit(DOCUMENTS)
    spans = [(start, start + length) for start, length in lengths]
    words = [match.span() for match in re.finditer(r"\w+", text)]
    raw = []
    for span in spans:
        shared = [len(set(range(*span)) & set(range(*word))) for word in words]
        best = max(shared, default=0)
        word = words[shared.index(best)] if best else None
        raw.append(idf.word(text[slice(*word)]) if word else 0.0)
    expected = torch.tensor([value / max([*raw, 1e-9]) for value in raw])
    prior = idf_prior(text, torch.tensor(spans, dtype=torch.long).reshape(-1, 2), idf)
    assert_close(prior, expected)
    assert prior.ge(0).all() and prior.le(1).all()


def test_named_priors():
    idf, text, spans = Idf.fit(DOCUMENTS), "the sat", torch.tensor([[0, 3], [4, 7], [0, 0]])
    assert_close(PRIORS["idf"](text, spans, idf), torch.tensor([COMMON / RARE, 1.0, 0.0]))
    assert PRIORS["uniform"](text, spans, None).tolist() == [1.0, 1.0, 1.0]


def test_referred_prior_is_the_share_of_a_token_that_the_text_points_at():
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.25, 0, 0.75, 0.5], [0, 0, 0, 0]])
    one = torch.tensor([[0, 0, 0.5, 1.0]])
    assert_close(referred_prior(boxes, one), torch.tensor([1, 0.1, 0.5, 0.1]))
    two = torch.cat([one, torch.tensor([[0.5, 0.5, 1.0, 0.75]])])
    assert_close(referred_prior(boxes, two), torch.tensor([1, 0.5, 0.5, 0.1]))
    assert referred_prior(boxes, torch.zeros(0, 4)).tolist() == [1] * 4
