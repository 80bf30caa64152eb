"""Gathers what an example's targets are made of: cached teacher features, priors, CLIP's logits.

All that is here depends on the example and the frozen teacher alone. What follows from it by tensor
functions is made for whole batches (``targets``), and what changes while the student learns in ``objective``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from tdlib.config import RunConfig
from tdlib.data.examples import Example
from tdlib.method.clip_td import ScoredTokens, token_prior
from tdlib.method.priors import Idf
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.teacher.cache import TeacherCache, text_key
from tdlib.teacher.model import TeacherRecord, choice_logits
from tdlib.teacher.probe import compared_texts
from tdlib.teacher.towers import EXTRAS
from tdlib.training.judging import StatementJudge
from tdlib.training.targets import TeacherFeatures, make_targets, pack


@dataclass(frozen=True)
class Targets(ScoredTokens):
    """What one example's tokens are drawn to; tokens run over text, then picture, as in the student.

    Beside the scored tokens (choices, tokens, ...): CLIP's ``teacher_logits`` and ``teacher_knows``, the
    ``logits`` and ``knows`` of ``TeacherFeatures``.
    """

    tokens: Tokens
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


class TeacherFeatureReader:
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

        Not needed, but calling the feature_reader adds them one by one, which is far slower.

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

    def _records(
        self, statements: Sequence[str], picture: Path
    ) -> tuple[list[TeacherRecord], TeacherRecord, list[tuple[Tensor, Tensor]] | None]:
        """Features of statements and a picture as they are stored, and a relevance variant's scalars."""
        variant = self.config.relevance
        extras = [variant] if variant in EXTRAS else []
        if variant in (*EXTRAS, "gradient"):
            self._add([(text, picture) for text in statements])
        texts = [self.cache.text(text, extras, as_stored=True) for text in statements]
        patches = self.cache.picture(picture, extras, as_stored=True)
        if variant == "gradient":
            lengths = [[len(text.positions), len(patches.positions)] for text in texts]
            pairs = [
                self.cache.pair(text, picture).split(length)
                for text, length in zip(statements, lengths, strict=True)
            ]
            return texts, patches, [(words, cells) for words, cells in pairs]
        if variant in EXTRAS and variant != "vv":
            return texts, patches, [(getattr(text, variant), getattr(patches, variant)) for text in texts]
        return texts, patches, None

    def features(self, example: Example, spans: Tensor, boxes: Tensor) -> TeacherFeatures:
        """What the targets are made of, for a student whose tokens have these positions.

        Args:
            example: the example.
            spans: (choices, text_tokens, 2), characters of each statement.
            boxes: (visual_tokens, 4), normalised xyxy.
        """
        example = self.seen_as(example)
        statements = [statement.text for statement in example.statements()]
        texts, picture, saliencies = self._records(statements, example.image)
        config = self.config
        refers = config.visual_prior == "referred"
        prior = token_prior(
            statements, spans, boxes, self.idf, config.prior, self._referred(example) if refers else None
        )
        if self.class_logits is not None:
            logits = self.class_logits(example)
        else:
            pooled = torch.stack([text.pooled for text in texts]).float()
            logits = choice_logits(picture.pooled.float(), pooled, self.cache.teacher.logit_scale)
        if self.labels:
            is_cut = any(map(self.cache.cut, compared_texts(example, self.labels)))
        else:
            is_cut = any(text.cut for text in texts)
        judged = self.judge(example) if self.judge else (None, None)
        return TeacherFeatures(
            tuple(texts), tuple(map(text_key, statements)), picture, self.cache.picture_key(example.image),
            boxes, prior[:, : spans.shape[1]], logits, torch.tensor(float(not is_cut)),
            prior[:, spans.shape[1] :] if refers else None, saliencies, self.centres, *judged,
        )  # fmt: skip

    def __call__(self, example: Example, spans: Tensor, boxes: Tensor) -> Targets:
        """The targets of one example: a batch of one. Arguments as for ``features``."""
        found = pack([self.features(example, spans, boxes)], spans.shape[1]) | {"spans": spans[None]}
        made = {name: value[0] for name, value in make_targets(found, self.config).items()}
        named = {field.name: made[field.name] for field in fields(Targets) if field.name != "tokens"}
        return Targets(**named, tokens=Tokens(made["target_spans"], made["target_boxes"]))

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
