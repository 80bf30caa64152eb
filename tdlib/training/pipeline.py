"""Builds the targets of one example from cached teacher features: steps 1 to 5 of ``method.clip_td``.

All that is here depends on the example and the frozen teacher alone, so it is made once per example; what
changes while the student learns happens in ``objective``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tdlib.config import RunConfig
from tdlib.data.examples import Example
from tdlib.method.clip_td import ScoredTokens, score_tokens, token_prior
from tdlib.method.priors import Idf
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import EXTRAS, TeacherRecord, choice_logits
from tdlib.teacher.probe import compared_texts
from tdlib.training.judging import StatementJudge


@dataclass(frozen=True)
class Targets(ScoredTokens):
    """What one example's tokens are drawn to; tokens run over text, then picture, as in the student.

    Beside the scored tokens (choices, tokens, ...): ``teacher_logits`` are CLIP's zero-shot scaled cosines
    (choices,), or class logits (labels,); ``teacher_knows`` is 0 where a text was too long for it, so that
    they tell nothing, else 1. ``statements`` and ``judged`` say what CLIP judges of the example
    with any picture, see ``judging.StatementJudge``; None where nothing is re-paired.
    """

    tokens: Tokens
    teacher_logits: Tensor
    teacher_knows: Tensor
    text_global: Tensor  # (choices, teacher_dim)
    image_global: Tensor  # (choices, teacher_dim), the same picture for each
    statements: Tensor | None = None  # (judged, teacher_dim)
    judged: Tensor | None = None  # (judged,)


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
        judge: what CLIP is asked about re-paired examples, where a run re-pairs.
        centres: mean teacher tokens of texts and of pictures, where targets are centred.
    """

    def __init__(
        self,
        cache: TeacherCache,
        idf: Idf,
        config: RunConfig,
        class_logits: Callable[[Example], Tensor] | None = None,
        seen_as: Callable[[Example], Example] = lambda example: example,
        labels: Sequence[str] = (),
        judge: StatementJudge | None = None,
        centres: tuple[Tensor, Tensor] | None = None,
    ):
        self.cache, self.idf, self.config, self.class_logits = cache, idf, config, class_logits
        self.labels = labels
        _ = cache.teacher.logit_scale  # is kept from now on: processes that make batches have no GPU
        self.seen_as, self.judge, self.centres = seen_as, judge, centres

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
        student = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes.expand(len(statements), -1, -1))])
        config = self.config
        referred = self._referred(example) if config.visual_prior == "referred" else None
        prior = token_prior(statements, spans, boxes, self.idf, config.prior, referred)
        scored = score_tokens(
            student, teacher, prior, config.relevance, config.temperature, config.prior_weight, self.centres,
            config.conditioned_targets,
        )  # fmt: skip
        if self.class_logits is not None:
            logits = self.class_logits(example)
        else:
            logits = choice_logits(
                teacher.image_global[0], teacher.text_global, self.cache.teacher.logit_scale
            )
        statements_judged = self.judge(example) if self.judge else (None, None)
        is_cut = any(map(self.cache.cut, compared_texts(example, self.labels)))
        return Targets(
            **vars(scored), tokens=student, teacher_logits=logits, text_global=teacher.text_global,
            image_global=teacher.image_global,
            teacher_knows=torch.tensor(float(not is_cut)),
            statements=statements_judged[0], judged=statements_judged[1],
        )  # fmt: skip

    @staticmethod
    def _referred(example: Example) -> list[Tensor]:
        """The boxes of the objects that each statement points at, (objects, 4)."""
        objects = [
            sorted({o for reference in statement.references for o in reference.objects})
            for statement in example.statements()
        ]
        return [torch.tensor([example.boxes[o] for o in numbers]).reshape(-1, 4) for numbers in objects]


@torch.no_grad()
def token_centres(cache: TeacherCache, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The mean token of the examples' distinct statements, and of their distinct pictures, (teacher_dim,).

    Each text, and each picture, counts with its number of tokens.
    """
    texts = dict.fromkeys(statement.text for example in examples for statement in example.statements())
    pictures = dict.fromkeys(example.image for example in examples)
    of_texts = torch.cat([cache.text(text).projected for text in texts]).mean(0)
    return of_texts, torch.cat([cache.picture(picture).projected for picture in pictures]).mean(0)
