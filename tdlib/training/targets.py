"""Targets of a batch: what they are made of travels, and they are made where the student is.

Owns the form in which the teacher's features of a batch travel (``pack``): each distinct text and picture
once, in the precision of the cache, and which sequence shows which. Alignment, targets, relevance and
scores follow from it by tensor functions on the student's device (``make_targets``), steps 1 to 5 of
``method.clip_td``. Does not own where the features come from (``pipeline``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tdlib.config import RunConfig
from tdlib.method.clip_td import score_apart
from tdlib.method.tokens import TeacherTokens, Tokens, join
from tdlib.teacher.model import TeacherRecord

PACKED = "packed."  # begins the names of a batch's entries that targets are made of
_SIGNALS = ("positions", "projected", "value", "vv")


@dataclass(frozen=True)
class TeacherFeatures:
    """What the targets of one example are made of, beside what the student reads itself.

    ``texts`` and ``picture`` are the teacher's tokens as they are stored, with keys that tell distinct ones
    apart. ``boxes`` are the student's visual tokens. Priors: of words always; of places where they are not
    all alike. ``saliencies`` are a relevance variant's scalars of each statement's tokens and of the
    picture's. ``logits`` are CLIP's zero-shot scaled cosines (choices,), or class logits (labels,);
    ``knows`` is 0 where a text was too long for it, so that they tell nothing, else 1. ``statements`` and
    ``judged`` say what CLIP judges of the example with any picture, see ``judging.StatementJudge``.
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
    judged: Tensor | None = None  # (judged,)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        records = [value for record in (*self.texts, self.picture) for value in vars(record).values()]
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in [*records, *own] if isinstance(value, Tensor))


def pack(features: Sequence[TeacherFeatures], text_tokens: int) -> dict[str, Tensor]:
    """The teacher's part of a batch, whose statements are padded to ``text_tokens``.

    The entries that begin with ``PACKED`` are turned into targets by ``make_targets``.
    """
    texts = {key: text for one in features for key, text in zip(one.text_keys, one.texts, strict=True)}
    pictures = {one.picture_key: one.picture for one in features}
    text_rows = {key: row for row, key in enumerate(texts)}
    picture_rows = {key: row for row, key in enumerate(pictures)}
    packed = {
        "text.rows": torch.tensor([[text_rows[key] for key in one.text_keys] for one in features]),
        "picture.rows": torch.tensor([picture_rows[one.picture_key] for one in features]),
        "boxes": pad_sequence([one.boxes for one in features], batch_first=True),
        "text_prior": _padded([one.text_prior for one in features], text_tokens),
        **_end_to_end("text", [*texts.values()]), **_end_to_end("picture", [*pictures.values()]),
    }  # fmt: skip
    first = features[0]
    if first.visual_prior is not None:
        of_places = [one.visual_prior for one in features if one.visual_prior is not None]
        packed["visual_prior"] = _padded(of_places, packed["boxes"].shape[1])
    if first.saliencies is not None:
        for place, kind in enumerate(("text", "picture")):
            rows = [[pair[place] for pair in one.saliencies or ()] for one in features]
            length = packed[f"{kind}.index"].shape[1]
            packed[f"{kind}.saliency"] = torch.stack([_padded(row, length, dim=0) for row in rows])
    if first.centres is not None:
        packed["centres"] = torch.stack(first.centres)
    batch = {PACKED + name: value for name, value in packed.items()}
    batch["teacher_logits"] = torch.stack([one.logits for one in features])
    batch["teacher_knows"] = torch.stack([one.knows for one in features])
    if first.statements is not None:
        batch["statements"] = torch.stack([one.statements for one in features if one.statements is not None])
        batch["judged"] = torch.stack([one.judged for one in features if one.judged is not None])
    return batch


def _padded(rows: Sequence[Tensor], length: int, dim: int = 1) -> Tensor:
    """Rows stacked, each with zeros up to ``length`` along ``dim``."""
    shape = [*rows[0].shape]
    shape[dim] = length
    whole = rows[0].new_zeros(len(rows), *shape)
    for place, row in enumerate(rows):
        whole[place].narrow(dim, 0, row.shape[dim]).copy_(row)
    return whole


def _end_to_end(kind: str, records: Sequence[TeacherRecord]) -> dict[str, Tensor]:
    """Tokens of records one after the other, a row of zeros behind them, and where those of each are.

    ``index`` (records, most tokens) names the row of each token, that of zeros where there is none.
    """
    lengths = torch.tensor([len(record.positions) for record in records])
    place = torch.arange(int(lengths.max()))
    index = (lengths.cumsum(0) - lengths)[:, None] + place
    index[place >= lengths[:, None]] = int(lengths.sum())
    found = {
        f"{kind}.index": index,
        f"{kind}.pooled": torch.stack([record.pooled for record in records]),
    }
    for name in _SIGNALS:
        parts = [getattr(record, name) for record in records]
        if parts[0] is not None:
            found[f"{kind}.{name}"] = torch.cat([*parts, parts[0].new_zeros(1, *parts[0].shape[1:])])
    return found


@torch.no_grad()
def make_targets(batch: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """A batch with its targets in place of what they are made of; unchanged where there is nothing to make.

    Adds, for (batch, choices) sequences of the student's tokens, text then picture: ``vectors``, ``valid``,
    ``relevance``, ``prior`` and ``scores`` (see ``ScoredTokens``), ``target_spans`` and ``target_boxes``
    (see ``Tokens``), and CLIP's ``text_global`` and ``image_global``, (batch, choices, teacher_dim).
    """
    packed = {name[len(PACKED) :]: value for name, value in batch.items() if name.startswith(PACKED)}
    if not packed:
        return batch
    with torch.autocast(batch["spans"].device.type, enabled=False):  # whatever the student's precision
        rows = packed["text.rows"]
        of_texts = packed["text.pooled"].float()[rows]
        of_pictures = packed["picture.pooled"].float()[packed["picture.rows"]]
        pooled = of_pictures[:, None].expand_as(of_texts), of_texts
        texts, boxes = Tokens.text(batch["spans"]), packed["boxes"][:, None]
        visual_prior = packed.get("visual_prior")
        if visual_prior is None:
            visual_prior = torch.ones_like(boxes[..., 0])
        centres = packed.get("centres")
        scored = score_apart(
            (texts, _teacher_tokens(packed, "text", rows, pooled), packed["text_prior"]),
            (
                Tokens.visual(boxes),
                _teacher_tokens(packed, "picture", packed["picture.rows"][:, None], pooled),
                visual_prior,
            ),
            config.relevance,
            config.temperature,
            config.prior_weight,
            None if centres is None else (centres[0], centres[1]),
            config.conditioned_targets,
        )
    visual = Tokens.visual(boxes)
    rest = {name: value for name, value in batch.items() if not name.startswith(PACKED)}
    return {
        **rest, **vars(scored), "target_spans": join(texts.spans, visual.spans, 2),
        "target_boxes": join(texts.boxes, visual.boxes, 2),
        "image_global": pooled[0], "text_global": pooled[1],
    }  # fmt: skip


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
