"""The token type of the method: where each token of a sequence lies.

Owns the geometry that lets tokens of two models be compared (characters for text, area for
pictures) and the bundle of teacher tensors that the method reads. Knows no model and no file.
"""

from dataclasses import dataclass

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

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(self.spans.to(device), self.boxes.to(device))

    @staticmethod
    def text(spans: Int[Tensor, "*batch tokens 2"]) -> "Tokens":
        """Tokens of a text alone."""
        return Tokens(spans, torch.zeros(*spans.shape[:-1], 4))

    @staticmethod
    def visual(boxes: Float[Tensor, "*batch tokens 4"]) -> "Tokens":
        """Tokens of a picture alone."""
        return Tokens(torch.zeros(*boxes.shape[:-1], 2, dtype=torch.long), boxes)

    @staticmethod
    def cat(parts: list["Tokens"]) -> "Tokens":
        """Tokens of several sequences, one after the other along the token axis."""
        return Tokens(
            torch.cat([part.spans for part in parts], dim=-2),
            torch.cat([part.boxes for part in parts], dim=-2),
        )


@dataclass(frozen=True)
class TeacherTokens:
    """What the method reads of the frozen teacher, all in CLIP's joint space, L2-normalised.

    ``projected`` are the tokens after the tower's final norm and projection; ``value`` the same
    with the last attention block replaced by its value path (relevance variant). Padded tokens
    are zero vectors. ``image_global`` and ``text_global`` are CLIP's pooled embeddings. The last two
    are there only where a relevance variant reads them: ``vv`` the tokens of value-value attention,
    ``saliency`` a scalar per token in [0, 1] that the teacher gave it (attention, rollout, gradient).
    """

    tokens: Tokens
    projected: Float[Tensor, "*batch teacher_tokens teacher_dim"]
    value: Float[Tensor, "*batch teacher_tokens teacher_dim"]
    image_global: Float[Tensor, "*batch teacher_dim"]
    text_global: Float[Tensor, "*batch teacher_dim"]
    vv: Float[Tensor, "*batch teacher_tokens teacher_dim"] | None = None
    saliency: Float[Tensor, "*batch teacher_tokens"] | None = None
