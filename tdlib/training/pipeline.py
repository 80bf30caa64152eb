"""From an example to what the method distils: the student's tokens, the teacher's, and their bond.

Everything here depends on the example and the frozen teacher alone, so it is computed once per
example; what changes while training (selection that draws, instance weights) happens in ``training``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tdlib.config import RunConfig
from tdlib.data.examples import Example
from tdlib.method.alignment import align, aligned_targets
from tdlib.method.priors import PRIORS, Idf, referred_prior
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.method.selection import token_scores
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import EXTRAS, TeacherRecord, choice_logits
from tdlib.teacher.probe import compared_texts


@dataclass(frozen=True)
class Targets:
    """What one example's tokens are drawn to; tokens run over text, then picture, as in the student.

    ``vectors`` (choices, tokens, teacher_dim) unit length, zero where not distilled; ``relevance``,
    ``prior``, ``scores`` (choices, tokens); ``valid`` marks tokens with a target; a relevance that
    depends on the student (``STUDENT_RELEVANCE``) is 0 here, for training to compute;
    ``teacher_logits`` are CLIP's zero-shot scaled cosines (choices,), or class logits (labels,);
    ``teacher_knows`` is 0 where a text was too long for it, so that they tell nothing, else 1.
    """

    tokens: Tokens
    vectors: Tensor
    relevance: Tensor
    prior: Tensor
    scores: Tensor
    valid: Tensor
    teacher_logits: Tensor
    teacher_knows: Tensor
    text_global: Tensor  # (choices, teacher_dim)
    image_global: Tensor  # (choices, teacher_dim), the same picture for each


def teacher_tokens(
    texts: list[TeacherRecord],
    picture: TeacherRecord,
    saliencies: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> TeacherTokens:
    """The teacher's tokens of several statements about one picture, text then patches, of one length.

    ``saliencies`` are scalars of each statement's tokens and of the patches.
    """
    patches = len(picture.positions)
    longest = max(len(text.positions) for text in texts)

    def laid_out(of_texts: Sequence[Tensor], of_picture: Sequence[Tensor]) -> Tensor:
        rows = of_texts[0].new_zeros(len(texts), longest + patches, *of_texts[0].shape[1:])
        for row, words, cells in zip(rows, of_texts, of_picture, strict=True):
            row[: len(words)] = words
            row[longest:] = cells
        return rows

    def vectors(name: str) -> Tensor:
        return laid_out([getattr(text, name) for text in texts], [getattr(picture, name)] * len(texts))

    spans = laid_out(
        [text.positions for text in texts], [torch.zeros(patches, 2, dtype=torch.long)] * len(texts)
    )
    boxes = torch.zeros(len(texts), longest + patches, 4)
    boxes[:, longest:] = picture.positions
    return TeacherTokens(
        Tokens(spans, boxes), vectors("projected"), vectors("value"), picture.pooled.expand(len(texts), -1),
        torch.stack([text.pooled for text in texts]),
        vv=None if picture.vv is None else vectors("vv"),
        saliency=None if saliencies is None else laid_out(*zip(*saliencies, strict=True)),
    )  # fmt: skip


class TargetBuilder:
    """Makes the targets of examples from cached teacher features.

    Args:
        cache: holds the features of every statement and picture asked for.
        idf: word statistics of the training split.
        config: names the relevance variant, the prior and their settings.
        class_logits: the teacher's logits over the label set, where examples have no choices.
        labels: the label set, where ``class_logits`` compares the picture with answer statements.
        seen_as: the example as the teacher sees it; itself, unless a control shows another's picture.
    """

    def __init__(
        self,
        cache: TeacherCache,
        idf: Idf,
        config: RunConfig,
        class_logits: Callable[[Example], Tensor] | None = None,
        seen_as: Callable[[Example], Example] = lambda example: example,
        labels: Sequence[str] = (),
    ):
        self.cache, self.idf, self.config, self.class_logits = cache, idf, config, class_logits
        self.labels = labels
        _ = cache.teacher.logit_scale  # is kept from now on: processes that make batches have no GPU
        self.seen_as = seen_as

    def prepare(self, examples: Sequence[Example], part: int = 5_000) -> None:
        """Computes in one go what the relevance variant needs of examples and the cache lacks.

        Not needed, but calling the builder adds them one by one, which is far slower.

        Args:
            examples: statements and pictures of these.
            part: examples that are held in memory at once.

        Raises:
            TeacherError: the teacher cannot give this relevance.
        """
        for start in range(0, len(examples), part):
            pairs = [
                (statement.text, self.seen_as(example).image)
                for example in examples[start : start + part]
                for statement in example.statements()
            ]
            self._add(pairs)

    def _add(self, pairs: Sequence[tuple[str, Path]]) -> None:
        extras = [self.config.relevance] if self.config.relevance in EXTRAS else []
        self.cache.add([text for text, _ in pairs], [picture for _, picture in pairs], extras=extras)
        if self.config.relevance == "gradient":
            self.cache.add_pairs(pairs)

    def _teacher_tokens(self, statements: Sequence[str], picture: Path) -> TeacherTokens:
        variant = self.config.relevance
        if variant not in (*EXTRAS, "gradient"):
            return teacher_tokens([self.cache.text(text) for text in statements], self.cache.picture(picture))
        self._add([(text, picture) for text in statements])
        extras = [variant] if variant in EXTRAS else []
        texts = [self.cache.text(text, extras) for text in statements]
        patches = self.cache.picture(picture, extras)
        saliencies = None
        if variant == "gradient":
            lengths = [[len(text.positions), len(patches.positions)] for text in texts]
            saliencies = [
                self.cache.pair(text, picture).split(length)
                for text, length in zip(statements, lengths, strict=True)
            ]
        elif variant != "vv":
            saliencies = [(getattr(text, variant), getattr(patches, variant)) for text in texts]
        return teacher_tokens(texts, patches, saliencies)

    def __call__(self, example: Example, spans: Tensor, boxes: Tensor) -> Targets:
        """Targets for a student whose tokens have these positions.

        Args:
            example: the example.
            spans: (choices, text_tokens, 2), characters of each statement.
            boxes: (visual_tokens, 4), normalised xyxy.
        """
        example = self.seen_as(example)
        statements = [statement.text for statement in example.statements()]
        teacher = self._teacher_tokens(statements, example.image)
        choices = len(statements)
        student = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes.expand(choices, -1, -1))])
        alignment = align(student, teacher.tokens)
        vectors = aligned_targets(alignment, teacher.projected)
        valid = vectors.abs().sum(-1) > 0
        prior = torch.ones(choices, student.spans.shape[1])
        if self.config.relevance in STUDENT_RELEVANCE:
            relevance = torch.zeros_like(prior)
        else:
            relevance = RELEVANCE[self.config.relevance](alignment, student, teacher)
        text_prior = PRIORS[self.config.prior]
        for row, text in enumerate(statements):
            prior[row, : spans.shape[1]] = text_prior(text, spans[row], self.idf)
            if self.config.visual_prior == "referred":
                objects = {o for reference in example.statements()[row].references for o in reference.objects}
                referred = torch.tensor([example.boxes[o] for o in sorted(objects)]).reshape(-1, 4)
                prior[row, spans.shape[1] :] = referred_prior(boxes, referred)
        scores = token_scores(
            relevance, prior, student, valid, self.config.temperature, self.config.prior_weight
        )
        if self.class_logits is not None:
            logits = self.class_logits(example)
        else:
            scale = self.cache.teacher.logit_scale
            logits = choice_logits(teacher.image_global[0], teacher.text_global, scale)
        return Targets(
            student,
            vectors,
            relevance,
            prior,
            scores,
            valid,
            logits,
            torch.tensor(float(not any(map(self.cache.cut, compared_texts(example, self.labels))))),
            teacher.text_global,
            teacher.image_global,
        )
