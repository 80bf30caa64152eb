"""Reads the teacher's features of an example from the cache: tokens, priors, CLIP's logits.

Everything here depends on the example and the frozen teacher alone, so it is read once and kept with the
encoded example. ``targets`` turns the features of a whole batch into targets; what changes while the student
learns is computed in ``objective``.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tdlib.config import RunConfig
from tdlib.data.examples import Example
from tdlib.method.clip_td import token_prior
from tdlib.method.priors import Idf
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.students.base import pad_last
from tdlib.teacher.cache import TeacherCache, text_key
from tdlib.teacher.model import TeacherRecord, choice_logits
from tdlib.teacher.towers import EXTRAS
from tdlib.training.judging import StatementJudge
from tdlib.training.targets import TeacherFeatures


def teacher_tokens(texts: Sequence[TeacherRecord], picture: TeacherRecord) -> TeacherTokens:
    """The teacher's tokens of several statements about one picture: (choices, text then patches, ...).

    Shorter statements are padded with zero vectors.
    """
    longest = max(len(text.positions) for text in texts)
    globals_ = picture.pooled.expand(len(texts), -1), torch.stack([text.pooled for text in texts])

    def padded(name: str) -> Tensor:
        return pad_last([getattr(text, name) for text in texts], longest, dim=0)

    words = TeacherTokens(
        Tokens.text(padded("positions")), padded("projected"), padded("value"), *globals_,
        vv=None if picture.vv is None else padded("vv"),
    )  # fmt: skip
    patches = TeacherTokens(
        Tokens.visual(picture.positions[None]), picture.projected[None], picture.value[None], *globals_,
        vv=None if picture.vv is None else picture.vv[None],
    )  # fmt: skip
    return TeacherTokens.cat(words, patches)


class TeacherFeatureReader:
    """Reads what the targets of an example are computed from: ``features``.

    Args:
        cache: holds the teacher's features of every statement and picture that will be read.
        idf: word statistics of the training split.
        config: names the relevance variant, the prior and their settings.
        class_logits: computes the teacher's logits over the label set, where examples have no choices.
        seen_as: gives the example as the teacher sees it: a control shows it another example's picture.
        answers: words the statements that ``class_logits`` compares the picture with, if it does.
        judge: lists the statements that CLIP judges, where a run re-pairs.
        centres: mean teacher tokens of texts and of pictures, where targets are centred.
    """

    def __init__(
        self,
        cache: TeacherCache,
        idf: Idf,
        config: RunConfig,
        class_logits: Callable[[Example], Tensor] | None = None,
        seen_as: Callable[[Example], Example] = lambda example: example,
        answers: Callable[[Example], Sequence[str]] | None = None,
        judge: StatementJudge | None = None,
        centres: tuple[Tensor, Tensor] | None = None,
    ):
        self.cache, self.idf, self.config, self.class_logits = cache, idf, config, class_logits
        self.answers = answers
        self._extras = [config.relevance] if config.relevance in EXTRAS else []
        # Computed now and kept: processes that make batches must not load the teacher or touch the GPU.
        _ = cache.teacher.logit_scale
        self.seen_as, self.judge, self.centres = seen_as, judge, centres

    def prepare(self, examples: Sequence[Example], part: int = 5_000) -> None:
        """Adds to the cache, in large batches, what the relevance variant reads and the cache lacks.

        ``features`` adds what is still missing, but one example at a time, which is far slower.

        Args:
            examples: their statements and pictures are added.
            part: number of examples whose texts are held in memory at once.

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
        texts, pictures = [text for text, _ in pairs], [picture for _, picture in pairs]
        self.cache.add(texts, pictures, extras=self._extras)
        if self.config.relevance == "gradient":
            self.cache.add_pairs(pairs)

    def _records(
        self, statements: Sequence[str], picture: Path
    ) -> tuple[list[TeacherRecord], TeacherRecord, list[tuple[Tensor, Tensor]] | None]:
        """Reads statements and a picture as they are stored, and the scalars of a relevance variant."""
        variant = self.config.relevance
        if self._extras or variant == "gradient":
            self._add([(text, picture) for text in statements])
        texts = [self.cache.text(text, self._extras, as_stored=True) for text in statements]
        patches = self.cache.picture(picture, self._extras, as_stored=True)
        if variant == "gradient":
            lengths = [[len(text.positions), len(patches.positions)] for text in texts]
            pairs = [
                self.cache.pair(text, picture).split(length)
                for text, length in zip(statements, lengths, strict=True)
            ]
            return texts, patches, [(words, cells) for words, cells in pairs]
        if self._extras and variant != "vv":
            return texts, patches, [(getattr(text, variant), getattr(patches, variant)) for text in texts]
        return texts, patches, None

    def features(self, example: Example, spans: Tensor, boxes: Tensor) -> TeacherFeatures:
        """Reads what the targets are computed from, for a student whose tokens have these positions.

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
        # Where the teacher cuts a text, its logits are those of another text; ``knows`` = 0 leaves them out.
        if self.answers:
            is_cut = any(map(self.cache.cut, self.answers(example)))
        else:
            is_cut = any(text.cut for text in texts)
        judged = self.judge(example) if self.judge else (None, None, None)
        return TeacherFeatures(
            tuple(texts), tuple(map(text_key, statements)), picture, self.cache.picture_key(example.image),
            boxes, prior[:, : spans.shape[1]], logits, torch.tensor(float(not is_cut)),
            prior[:, spans.shape[1] :] if refers else None, saliencies, self.centres, *judged,
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
    """The mean teacher token of texts and that of pictures, both (teacher_dim,).

    Every distinct statement and picture of the examples is read once and counts with its number of tokens.
    """
    texts = dict.fromkeys(statement.text for example in examples for statement in example.statements())
    pictures = dict.fromkeys(example.image for example in examples)
    return _mean_token(map(cache.text, texts)), _mean_token(map(cache.picture, pictures))


def _mean_token(records: Iterable[TeacherRecord]) -> Tensor:
    """Averages tokens without holding more than one record's: all of VCR's take tens of gigabytes."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for record in records:
        # In double precision a running sum is as good as one of pairs.
        total = total + record.projected.sum(0, dtype=torch.float64)
        count += len(record.projected)
    return (total / count).float()
