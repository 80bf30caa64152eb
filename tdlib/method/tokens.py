"""The types that the method reads: positions of tokens, and the teacher's tensors.

Positions are characters of the text and areas of the picture, so that tokens of two models can be compared.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def grid_cells(rows: int, columns: int) -> Int[Tensor, "cells 4"]:
    """Corners of the cells of a grid, row by row: x, y, x + 1, y + 1, in cells."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4)


def grid_boxes(rows: int, columns: int) -> Float[Tensor, "cells 4"]:
    """Boxes of the cells of a grid over the whole picture, row by row: normalised xyxy."""
    return grid_cells(rows, columns) / torch.tensor([columns, rows, columns, rows])


@dataclass(frozen=True)
class Tokens:
    """Positions of tokens: a text token has a character span, a visual token has a box.

    ``spans`` are [start, end) offsets into the raw string; (0, 0) means "not a text token".
    ``boxes`` are xyxy, normalised to the original picture ([0, 1]); a box without area means
    "not a visual token". Special tokens and padding have neither.
    """

    spans: Int[Tensor, "*batch tokens 2"]
    boxes: Float[Tensor, "*batch tokens 4"]

    @property
    def is_text(self) -> Bool[Tensor, "*batch tokens"]:
        return self.spans[..., 1] > self.spans[..., 0]

    @property
    def is_visual(self) -> Bool[Tensor, "*batch tokens"]:
        return (self.boxes[..., 2] > self.boxes[..., 0]) & (self.boxes[..., 3] > self.boxes[..., 1])

    def __getitem__(self, row: int) -> "Tokens":
        """The tokens of one entry of the first axis."""
        return Tokens(self.spans[row], self.boxes[row])

    @staticmethod
    def text(spans: Int[Tensor, "*batch tokens 2"]) -> "Tokens":
        """Tokens of a text alone."""
        return Tokens(spans, spans.new_zeros(*spans.shape[:-1], 4, dtype=torch.float32))

    @staticmethod
    def visual(boxes: Float[Tensor, "*batch tokens 4"]) -> "Tokens":
        """Tokens of a picture alone."""
        return Tokens(boxes.new_zeros(*boxes.shape[:-1], 2, dtype=torch.long), boxes)

    @staticmethod
    def cat(parts: list["Tokens"]) -> "Tokens":
        """Tokens of several sequences, one after the other along the token axis."""
        return Tokens(
            torch.cat([part.spans for part in parts], dim=-2),
            torch.cat([part.boxes for part in parts], dim=-2),
        )


def join(text: Tensor, visual: Tensor, axis: int) -> Tensor:
    """Text and picture one after the other along the axis of tokens.

    A picture that is there once for all its texts is repeated for each of them.
    """
    return torch.cat([text, visual.expand(*text.shape[:axis], *visual.shape[axis:])], dim=axis)


@dataclass(frozen=True)
class TeacherTokens:
    """What the method reads of the frozen teacher, all in CLIP's joint space, L2-normalised.

    ``projected`` are the tokens after the tower's final norm and projection; ``value`` the same
    with the last attention block replaced by its value path (relevance variant). Padded tokens
    are zero vectors. ``image_global`` and ``text_global`` are CLIP's pooled embeddings. The last two
    are None unless a relevance variant reads them: ``vv`` are the tokens of value-value attention,
    ``saliency`` is a scalar per token in [0, 1] (attention, rollout or gradient).
    An axis of ``batch`` may have length 1: a picture's tokens are the same for all texts about it.
    """

    tokens: Tokens
    projected: Float[Tensor, "*#batch teacher_tokens teacher_dim"]
    value: Float[Tensor, "*#batch teacher_tokens teacher_dim"]
    image_global: Float[Tensor, "*#batch teacher_dim"]
    text_global: Float[Tensor, "*#batch teacher_dim"]
    vv: Float[Tensor, "*#batch teacher_tokens teacher_dim"] | None = None
    saliency: Float[Tensor, "*#batch teacher_tokens"] | None = None

    def __getitem__(self, row: int) -> "TeacherTokens":
        """The tokens of one entry of the first axis."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        ours: Any = {name: None if part is None else part[row] for name, part in parts.items()}
        return TeacherTokens(**ours)

    @staticmethod
    def cat(text: "TeacherTokens", visual: "TeacherTokens") -> "TeacherTokens":
        """Tokens of statements, then of their pictures, as one sequence each; see ``join``."""
        axis = text.projected.dim() - 2
        parts = {
            name: join(getattr(text, name), getattr(visual, name), axis)
            for name in ("projected", "value", "vv", "saliency")
            if getattr(text, name) is not None
        }
        return TeacherTokens(
            Tokens(
                join(text.tokens.spans, visual.tokens.spans, axis),
                join(text.tokens.boxes, visual.tokens.boxes, axis),
            ),
            image_global=text.image_global, text_global=text.text_global, **parts,
        )  # fmt: skip
