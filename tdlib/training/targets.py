"""Computes the targets of a batch on the student's device: steps 1 to 5 of ``method.clip_td``.

Batches carry the teacher's features instead of targets, because these are far smaller (``pack``): every
distinct text and picture once, in the precision of the cache, and which sequence shows which. From them
``make_targets`` computes alignment, targets, relevance and scores. ``pipeline`` reads the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tdlib.config import RunConfig
from tdlib.method.alignment import image_conditioned_targets
from tdlib.method.clip_td import ScoredTokens, score_tokens
from tdlib.method.registry import is_users
from tdlib.method.relevance import RELEVANCE
from tdlib.method.tokens import TeacherTokens, Tokens, join
from tdlib.students.base import pad_last
from tdlib.teacher.model import TeacherRecord

PACKED = "packed."  # prefix of the batch entries from which targets are computed
_SIGNALS = ("positions", "projected", "value", "vv")


@dataclass(frozen=True)
class TeacherFeatures:
    """The features from which the targets of one example are computed, beside the student's inputs.

    ``texts`` and ``picture`` are the teacher's tokens as the cache stores them; the keys tell distinct ones
    apart. ``boxes`` are those of the student's visual tokens. ``visual_prior`` is None where all visual
    tokens have the prior 1. ``saliencies`` are the scalars that some relevance variants read, of each
    statement's tokens and of the picture's. ``logits`` are CLIP's zero-shot scaled cosines (choices,), or
    class logits (labels,). ``knows`` is 0 where CLIP had to cut a text, so that its logits tell nothing, else
    1. ``statements``, ``statement_prior`` and ``judged`` name what CLIP judges about the text with any
    picture, see ``judging.StatementJudge``.
    """

    texts: tuple[TeacherRecord, ...]
    text_keys: tuple[bytes, ...]
    picture: TeacherRecord
    picture_key: bytes
    boxes: Tensor  # (visual_tokens, 4)
    text_prior: Tensor  # (choices, text_tokens)
    logits: Tensor
    knows: Tensor
    visual_prior: Tensor | None = None  # (choices, visual_tokens)
    saliencies: Sequence[tuple[Tensor, Tensor]] | None = None
    centres: tuple[Tensor, Tensor] | None = None  # mean teacher tokens, where targets are centred
    statements: Tensor | None = None  # (judged, teacher_dim)
    statement_prior: Tensor | None = None  # (judged,), logarithms
    judged: Tensor | None = None  # (judged,)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        records = [value for record in (*self.texts, self.picture) for value in vars(record).values()]
        return sum(value.nbytes for value in [*records, *vars(self).values()] if isinstance(value, Tensor))


def pack(features: Sequence[TeacherFeatures], text_tokens: int) -> dict[str, Tensor]:
    """Packs the teacher's features of a batch whose statements are padded to ``text_tokens``.

    ``make_targets`` turns the entries that begin with ``PACKED`` into targets.
    """
    texts = {key: text for one in features for key, text in zip(one.text_keys, one.texts, strict=True)}
    pictures = {one.picture_key: one.picture for one in features}
    text_rows = {key: row for row, key in enumerate(texts)}
    picture_rows = {key: row for row, key in enumerate(pictures)}
    packed = {
        "text.rows": torch.tensor([[text_rows[key] for key in one.text_keys] for one in features]),
        "picture.rows": torch.tensor([picture_rows[one.picture_key] for one in features]),
        "boxes": pad_sequence([one.boxes for one in features], batch_first=True),
        "text_prior": pad_last([one.text_prior for one in features], text_tokens),
        **_end_to_end("text", [*texts.values()]), **_end_to_end("picture", [*pictures.values()]),
    }  # fmt: skip
    first = features[0]
    if first.visual_prior is not None:
        of_places = [one.visual_prior for one in features if one.visual_prior is not None]
        packed["visual_prior"] = pad_last(of_places, packed["boxes"].shape[1])
    if first.saliencies is not None:
        for place, kind in enumerate(("text", "picture")):
            rows = [[pair[place] for pair in one.saliencies or ()] for one in features]
            length = packed[f"{kind}.index"].shape[1]
            packed[f"{kind}.saliency"] = torch.stack([pad_last(row, length, dim=0) for row in rows])
    if first.centres is not None:
        packed["centres"] = torch.stack(first.centres)
    batch = {PACKED + name: value for name, value in packed.items()}
    batch["teacher_logits"] = torch.stack([one.logits for one in features])
    batch["teacher_knows"] = torch.stack([one.knows for one in features])
    for name in ("statements", "statement_prior", "judged"):
        if getattr(first, name) is not None:
            batch[name] = torch.stack([getattr(one, name) for one in features])
    return batch


def _end_to_end(kind: str, records: Sequence[TeacherRecord]) -> dict[str, Tensor]:
    """Lays the tokens of all records one after the other, with a row of zeros at the end.

    ``index`` (records, most tokens) gives the row of each token of a record; padding points at the zeros.
    """
    lengths = torch.tensor([len(record.positions) for record in records])
    place = torch.arange(int(lengths.max()))
    index = (lengths.cumsum(0) - lengths)[:, None] + place
    index[place >= lengths[:, None]] = int(lengths.sum())
    laid_out = {
        f"{kind}.index": index,
        f"{kind}.pooled": torch.stack([record.pooled for record in records]),
    }
    for name in _SIGNALS:
        parts = [getattr(record, name) for record in records]
        if parts[0] is not None:
            laid_out[f"{kind}.{name}"] = torch.cat([*parts, parts[0].new_zeros(1, *parts[0].shape[1:])])
    return laid_out


@torch.no_grad()
def make_targets(batch: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Replaces the packed features of a batch by its targets; returns a batch without features as it is.

    Adds, for (batch, choices) sequences of the student's tokens, text then picture: ``vectors``, ``valid``,
    ``relevance``, ``prior`` and ``scores`` (see ``ScoredTokens``), ``target_spans`` and ``target_boxes``
    (see ``Tokens``), and CLIP's ``text_global`` and ``image_global``, (batch, choices, teacher_dim).
    """
    packed = {name[len(PACKED) :]: value for name, value in batch.items() if name.startswith(PACKED)}
    if not packed:
        return batch
    with torch.autocast(batch["spans"].device.type, enabled=False):  # targets are float32 in every run
        rows, pictures = packed["text.rows"], packed["picture.rows"][:, None]
        of_texts = packed["text.pooled"].float()[rows]
        of_pictures = packed["picture.pooled"].float()[packed["picture.rows"]]
        pooled = of_pictures[:, None].expand_as(of_texts), of_texts
        texts, boxes = Tokens.text(batch["spans"]), packed["boxes"][:, None]
        visual_prior = packed.get("visual_prior")
        if visual_prior is None:
            visual_prior = torch.ones_like(boxes[..., 0])
        visual = Tokens.visual(boxes)
        scored = _score(
            (texts, _teacher_tokens(packed, "text", rows, pooled), packed["text_prior"]),
            (visual, _teacher_tokens(packed, "picture", pictures, pooled), visual_prior),
            packed.get("centres"),
            config,
        )
        student = Tokens(join(texts.spans, visual.spans, 2), join(texts.boxes, visual.boxes, 2))
        if config.conditioned_targets:  # last, because only here do words read the patches of their picture
            vectors = image_conditioned_targets(scored.vectors, student, config.temperature)
            scored = replace(scored, vectors=vectors)
    rest = {name: value for name, value in batch.items() if not name.startswith(PACKED)}
    return {
        **rest, **vars(scored), "target_spans": student.spans, "target_boxes": student.boxes,
        "image_global": pooled[0], "text_global": pooled[1],
    }  # fmt: skip


Part = tuple[Tokens, TeacherTokens, Tensor]  # student's tokens, teacher's tokens, prior of the student's


def _score(text: Part, visual: Part, centres: Tensor | None, config: RunConfig) -> ScoredTokens:
    """``clip_td.score_tokens`` of a batch whose texts and pictures are scored separately and then joined.

    Text is (batch, choices, tokens, ...), pictures (batch, 1, tokens, ...): alignment and targets of a
    picture are the same for every text about it, so they are computed once. The joined result is
    (batch, choices, text then visual tokens, ...).
    """

    def score(student: Tokens, teacher: TeacherTokens, prior: Tensor) -> ScoredTokens:
        means = None if centres is None else (centres[0], centres[1])
        return score_tokens(
            student, teacher, prior, config.relevance, config.temperature, config.prior_weight, means
        )

    names = [field.name for field in fields(ScoredTokens)]
    if config.relevance in RELEVANCE and is_users(RELEVANCE[config.relevance]):
        # A user's function takes whole sequences of one example, (choices, tokens, ...), which is slower.
        student = Tokens(join(text[0].spans, visual[0].spans, 2), join(text[0].boxes, visual[0].boxes, 2))
        teacher, prior = TeacherTokens.cat(text[1], visual[1]), join(text[2], visual[2], 2)
        rows = [score(student[row], teacher[row], prior[row]) for row in range(len(prior))]
        return ScoredTokens(**{name: torch.stack([getattr(row, name) for row in rows]) for name in names})
    words, places = score(*text), score(*visual)
    return ScoredTokens(**{name: join(getattr(words, name), getattr(places, name), 2) for name in names})


def _teacher_tokens(
    packed: dict[str, Tensor], kind: str, rows: Tensor, pooled: tuple[Tensor, Tensor]
) -> TeacherTokens:
    """The teacher's tokens of the texts, or pictures, with these numbers."""
    index = packed[f"{kind}.index"][rows]

    def placed(name: str) -> Tensor:
        signal = packed[f"{kind}.{name}"]
        return (signal if name == "positions" else signal.float())[index]

    positions, saliency = placed("positions"), packed.get(f"{kind}.saliency")
    return TeacherTokens(
        Tokens.text(positions) if kind == "text" else Tokens.visual(positions),
        placed("projected"), placed("value"), *pooled,
        vv=placed("vv") if f"{kind}.vv" in packed else None,
        saliency=None if saliency is None else saliency.float(),
    )  # fmt: skip
