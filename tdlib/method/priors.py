"""The prior of a token: how much its word, or its place, tells before the picture is seen.

Words that are rare in the training split tell more (IDF); places tell more if the text points at them.
``selection`` multiplies the prior into the score. Words are ``\\w+`` in lower case, the same
for fitting and for looking up.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tdlib.method.alignment import text_overlap, visual_overlap
from tdlib.method.registry import Named, need_several

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Idf:
    """Inverse document frequency of words over a training split.

    ``document_frequency`` counts the documents that contain a word, out of ``num_documents``.
    """

    num_documents: int
    document_frequency: dict[str, int]

    @classmethod
    def fit(cls, documents: Iterable[str]) -> "Idf":
        """Count words over the documents (one text per example); read once, so a generator will do."""
        need_several(documents, "documents")
        num_documents, counts = 0, Counter[str]()
        for document in documents:
            num_documents += 1
            counts.update({word.lower() for word in WORD.findall(document)})
        return cls(num_documents, dict(counts))

    def word(self, word: str) -> float:
        """Smoothed idf of a word: ``log((1 + N) / (1 + df)) + 1`` (scikit-learn's smooth_idf), at least 1.

        An unseen word has ``df = 0``, the highest value there is.
        """
        return math.log((1 + self.num_documents) / (1 + self.document_frequency.get(word.lower(), 0))) + 1


def idf_prior(text: str, spans: Int[Tensor, "tokens 2"], idf: Idf) -> Float[Tensor, " tokens"]:
    """Give each token the idf of the word it shares most characters with, over the example's highest.

    In [0, 1] (our reading of CLIP-TD); 0 for a token without a word: punctuation, special tokens, padding.
    ``spans`` are [start, end) offsets into ``text``. Ties go to the earlier word.
    """
    words = [match.span() for match in WORD.finditer(text)]
    if not words or not len(spans):
        return torch.zeros(len(spans))
    idfs = torch.tensor([idf.word(text[start:end]) for start, end in words], dtype=torch.float64)
    shared = text_overlap(spans, torch.tensor(words))
    of_tokens = torch.where(shared.amax(-1) > 0, idfs[shared.argmax(-1)], 0)
    return (of_tokens / of_tokens.max().clamp_min(1)).float()  # every idf is at least 1


def uniform_prior(text: str, spans: Int[Tensor, "tokens 2"], idf: Idf | None) -> Float[Tensor, " tokens"]:
    """Prefer nothing: 1 for every token."""
    return torch.ones(len(spans))


def referred_prior(
    boxes: Float[Tensor, "tokens 4"], referred: Float[Tensor, "objects 4"], floor: float = 0.1
) -> Float[Tensor, " tokens"]:
    """Prefer what the text points at: the largest share of a token's area that lies in one referred box.

    In [``floor``, 1], so that no token is excluded; 1 for all tokens where the text points at nothing (our
    reading of "the area referred to by tags"). Boxes are xyxy.
    """
    if not len(referred):
        return torch.ones(len(boxes))
    shared = visual_overlap(boxes, referred)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    share = torch.where(area > 0, shared.amax(-1) / area.clamp(min=1e-12), 0.0)
    return share.clamp(floor, 1)


PRIORS: Named[Callable[..., Tensor]] = Named(idf=idf_prior, uniform=uniform_prior)
