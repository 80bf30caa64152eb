"""From an example to what the method distils: the student's tokens, the teacher's, and their bond.

Everything here depends on the example and the frozen teacher alone, so it is computed once per
example; what changes while training (selection that draws, instance weights) happens in ``training``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdlib.alignment import align, aligned_targets
from tdlib.cache import TeacherCache
from tdlib.config import RunConfig
from tdlib.examples import Example
from tdlib.priors import PRIORS, Idf
from tdlib.relevance import RELEVANCE
from tdlib.selection import token_scores
from tdlib.teacher import TeacherRecord, choice_logits
from tdlib.tokens import TeacherTokens, Tokens


@dataclass(frozen=True)
class Targets:
    """What one example's tokens are drawn to; tokens run over text, then picture, as in the student.

    ``vectors`` (choices, tokens, teacher_dim) unit length, zero where not distilled; ``relevance``,
    ``prior``, ``scores`` (choices, tokens); ``valid`` marks tokens with a target;
    ``teacher_logits`` are CLIP's zero-shot scaled cosines (choices,), or class logits (labels,).
    """

    tokens: Tokens
    vectors: Tensor
    relevance: Tensor
    prior: Tensor
    scores: Tensor
    valid: Tensor
    teacher_logits: Tensor


def teacher_tokens(texts: list[TeacherRecord], picture: TeacherRecord) -> TeacherTokens:
    """The teacher's tokens of several statements about one picture, text then patches, of one length."""
    choices, patches, dim = len(texts), len(picture.positions), picture.pooled.shape[-1]
    longest = max(len(text.positions) for text in texts)
    spans = torch.zeros(choices, longest + patches, 2, dtype=torch.long)
    boxes = torch.zeros(choices, longest + patches, 4)
    projected, value = torch.zeros(2, choices, longest + patches, dim)
    boxes[:, longest:] = picture.positions
    projected[:, longest:], value[:, longest:] = picture.projected, picture.value
    for row, text in enumerate(texts):
        length = len(text.positions)
        spans[row, :length] = text.positions
        projected[row, :length], value[row, :length] = text.projected, text.value
    return TeacherTokens(
        Tokens(spans, boxes), projected, value, picture.pooled.expand(choices, dim),
        torch.stack([text.pooled for text in texts]),
    )  # fmt: skip


class TargetBuilder:
    """Makes the targets of examples from cached teacher features.

    Args:
        cache: holds the features of every statement and picture asked for.
        idf: word statistics of the training split.
        config: names the relevance variant, the prior and their settings.
        class_logits: the teacher's logits over the label set, where examples have no choices.
    """

    def __init__(
        self,
        cache: TeacherCache,
        idf: Idf,
        config: RunConfig,
        class_logits: Callable[[Example], Tensor] | None = None,
    ):
        self.cache, self.idf, self.config, self.class_logits = cache, idf, config, class_logits

    def __call__(self, example: Example, spans: Tensor, boxes: Tensor) -> Targets:
        """Targets for a student whose tokens have these positions.

        Args:
            example: the example.
            spans: (choices, text_tokens, 2), characters of each statement.
            boxes: (visual_tokens, 4), normalised xyxy.
        """
        statements = [statement.text for statement in example.statements()]
        teacher = teacher_tokens(
            [self.cache.text(text) for text in statements], self.cache.picture(example.image)
        )
        choices = len(statements)
        student = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes.expand(choices, -1, -1))])
        alignment = align(student, teacher.tokens)
        vectors = aligned_targets(alignment, teacher.projected)
        valid = vectors.abs().sum(-1) > 0
        relevance = RELEVANCE[self.config.relevance](alignment, student, teacher)
        text_prior = PRIORS[self.config.prior]
        prior = torch.ones(choices, student.spans.shape[1])
        for row, text in enumerate(statements):
            prior[row, : spans.shape[1]] = text_prior(text, spans[row], self.idf)
        scores = token_scores(
            relevance, prior, student, valid, self.config.temperature, self.config.prior_weight
        )
        if self.class_logits is not None:
            logits = self.class_logits(example)
        else:
            scale = self.cache.teacher.logit_scale
            logits = choice_logits(teacher.image_global[0], teacher.text_global, scale)
        return Targets(student, vectors, relevance, prior, scores, valid, logits)
