"""ViLT (Kim et al. 2021) as a student, from any transformers checkpoint of it.

The stock model picks its patches in random order (``visual_embed`` draws them with ``multinomial``)
and does not say which. Here patches keep their places, the picture is embedded once per example
instead of once per choice, and the output says where every token lies.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViltConfig, ViltModel, ViltPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import open_picture
from tdlib.method.tokens import grid_boxes, grid_cells
from tdlib.students.base import (
    LONGEST,
    EncodedText,
    FusedAttention,
    StudentEncoder,
    StudentError,
    StudentOutput,
    encoded_text,
    fuse_attention,
    placed_output,
)


def embed_patches(vilt: ViltModel, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch embeddings in reading order, the image [CLS] first.

    Equal to the stock ``visual_embed`` up to the order of patches (and without its random choice
    of ``max_image_length`` of them). ``pixel_values`` (batch, 3, height, width), ``pixel_mask``
    (batch, height, width), or (batch, 1, 1) where nothing is padded: the sizes are then known without
    waiting for the device. Returns embeddings (batch, 1 + patches, dim), mask (batch, 1 + patches)
    and boxes (batch, 1 + patches, 4), normalised xyxy of each picture.
    """
    embeddings = vilt.embeddings
    grid = embeddings.patch_embeddings(pixel_values)  # (batch, dim, rows, columns)
    rows, columns = grid.shape[-2:]
    padded = pixel_mask.shape[1:] != (1, 1)
    if padded:
        mask = F.interpolate(pixel_mask[:, None].float(), size=(rows, columns))[:, 0].long()
    else:
        mask = pixel_mask.expand(-1, rows, columns)
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0].sum(1)
    sizes = [(rows, columns)] * len(mask)
    if padded:
        sizes = [(h, w) for h, w in torch.stack([heights, widths], dim=1).tolist()]
    side = math.isqrt(embeddings.patch_embeddings.num_patches)
    table = embeddings.position_embeddings[:, 1:].transpose(1, 2).view(1, -1, side, side)
    positions = {
        (h, w): F.pad(
            F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True),
            (0, columns - w, 0, rows - h),
        )
        for h, w in set(sizes)
    }
    position = torch.cat([positions[size] for size in sizes]) if len(positions) > 1 else positions[sizes[0]]
    patches = (grid + position).flatten(2).transpose(1, 2)
    cls = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(len(patches), -1, -1)
    scale = torch.stack([widths, heights, widths, heights], dim=-1).to(grid)[:, None]
    mask = mask.flatten(1)
    boxes = torch.where(mask[..., None].bool(), grid_cells(rows, columns).to(grid) / scale, 0.0)
    if len(positions) > 1:  # real patches first, padding last, as in the stock model
        order = mask.argsort(dim=1, descending=True, stable=True)[:, : max(h * w for h, w in sizes)]
        patches, boxes = (x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in (patches, boxes))
        mask = mask.gather(1, order)
    return (
        embeddings.dropout(torch.cat([cls, patches], dim=1)),
        torch.cat([mask.new_ones(len(mask), 1), mask], dim=1),
        torch.cat([boxes.new_zeros(len(boxes), 1, 4), boxes], dim=1),
    )


def mask_of_attention(_module, _inputs, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Turns the embeddings' mask (rows, tokens) into the one that attention adds, (rows, 1, 1, tokens).

    The stock model leaves such a mask as it is. Given one with two axes it checks whether anything is padded,
    and so waits for the device in every pass.
    """
    embeddings, tokens = output
    mask = torch.where(tokens.bool(), 0.0, torch.finfo(embeddings.dtype).min).to(embeddings.dtype)
    return embeddings, mask[:, None, None]


class FusedViltSelfAttention(FusedAttention, ViltSelfAttention):  # type: ignore[misc]
    pass


class ViltForMultipleChoice(ViltPreTrainedModel):
    """ViLT that scores each statement about a picture; a softmax over the choices decides."""

    config_class = ViltConfig
    inputs = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask", "spans")
    may_lack = ("classifier.", "vilt.pooler.")

    def __init__(self, config: ViltConfig):
        super().__init__(config)
        self.vilt = ViltModel(config)
        fuse_attention(self.vilt, FusedViltSelfAttention)
        self.vilt.embeddings.register_forward_hook(mask_of_attention)
        self.classifier = self.make_classifier(config)
        self.post_init()

    @staticmethod
    def make_classifier(config: ViltConfig) -> nn.Module:
        return nn.Linear(config.hidden_size, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, pixel_values: Tensor,
        pixel_mask: Tensor, spans: Tensor | None = None, output_hidden_states: bool = False,
    ) -> StudentOutput:  # fmt: skip
        """Scores statements.

        Args:
            input_ids: (batch, choices, text_tokens); likewise attention_mask and token_type_ids.
            pixel_values: (batch, 3, height, width), once per example.
            pixel_mask: (batch, height, width), 1 on real pixels; see ``embed_patches``.
            spans: (batch, choices, text_tokens, 2) characters of each token, handed on in the output.
            output_hidden_states: whether to return hidden states, spans and boxes.
        """
        batch, choices, _ = input_ids.shape
        image, image_mask, boxes = embed_patches(self.vilt, pixel_values, pixel_mask)
        output = self.vilt(
            input_ids=input_ids.flatten(0, 1),
            attention_mask=attention_mask.flatten(0, 1),
            token_type_ids=token_type_ids.flatten(0, 1),
            image_embeds=image.repeat_interleave(choices, dim=0),
            pixel_mask=image_mask.repeat_interleave(choices, dim=0),
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(output.pooler_output).view(batch, -1)  # per choice, or per class
        if not output_hidden_states:
            return StudentOutput(logits=logits)
        return placed_output(logits, hidden_states(output), attention_mask, image_mask, spans, boxes)


class ViltForClassification(ViltForMultipleChoice):
    """ViLT that gives one statement about a picture a label; its head is that of ViLT's VQA checkpoints."""

    @staticmethod
    def make_classifier(config: ViltConfig) -> nn.Module:
        width = config.hidden_size
        return nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(),
            nn.Linear(2 * width, len(config.id2label or {})),
        )  # fmt: skip


def hidden_states(output: BaseModelOutputWithPooling) -> tuple[Tensor, ...]:
    """Returns the output of each layer, embeddings first; the last one is taken after the final norm."""
    assert output.hidden_states is not None and output.last_hidden_state is not None
    return (*output.hidden_states[:-1], output.last_hidden_state)


ELONGATION = 1333 / 800  # the image processor caps the longer side at so many times the shorter one


class ViltEncoder(StudentEncoder):
    """Turns examples into ViLT's inputs, with the characters of every text token."""

    kind = "ViLT"

    def __init__(self, name: str, max_text_tokens: int = LONGEST):
        super().__init__(name, max_text_tokens)
        self.patch_size = self.config.patch_size
        self.divisor = getattr(self.image_processor, "size_divisor", None) or 1
        if self.divisor % self.patch_size:
            raise StudentError(
                f"student {name!r}: its image processor has size_divisor={self.divisor}; expected a multiple "
                f"of the patch size {self.patch_size}, or patches do not cover the picture"
            )

    def load_processor(self) -> None:
        self.image_processor = AutoImageProcessor.from_pretrained(self.name)

    def text(self, example: Example) -> EncodedText:
        prompt = example.prompt.text
        choices = [choice.text for choice in example.choices]
        rows = max(1, len(choices))
        encoding = self.tokenizer(
            [prompt] * rows, choices or None, truncation="longest_first", max_length=self.max_text_tokens,
            return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        spans = [pair_spans(encoding, row, len(prompt) + 1) for row in range(rows)]
        read = zip(encoding["input_ids"], encoding["token_type_ids"], spans, strict=True)
        return encoded_text([*read], self.tokenizer.pad_token_id, example.statements())

    def lengths(self, example: Example) -> list[int]:
        choices = [choice.text for choice in example.choices]
        ids = self.tokenizer([example.prompt.text] * max(1, len(choices)), choices or None)["input_ids"]
        return [len(row) for row in ids]

    def visual(self, example: Example) -> dict[str, Tensor]:
        picture = open_picture(example.image)
        try:
            return {"pixels": self.picture(picture)}
        except (ValueError, RuntimeError) as error:  # the image processor raises either
            raise DataError(
                f"{example.image}: a picture of {picture.width} x {picture.height} pixels cannot be made "
                f"ViLT's input ({error}); pad it to a less extreme shape, or leave the example out"
            ) from None

    def picture(self, picture: Image.Image) -> Tensor:
        """Makes the pixel values (3, height, width) of one picture.

        A picture so long and thin that the processor would leave no row of patches is widened first, until
        there is one. Boxes are shares of a picture's sides, so they stay valid.
        """
        longest = int(ELONGATION * (self.image_processor.size["shortest_edge"] or 0))
        if longest and int(longest * min(picture.size) / max(picture.size) + 0.5) < self.divisor:
            least = math.ceil(max(picture.size) * self.divisor / longest)
            picture = picture.resize((max(least, picture.width), max(least, picture.height)))
        return self.image_processor(picture, return_tensors="pt")["pixel_values"][0]

    def visual_boxes(self, visual: dict[str, Tensor]) -> Tensor:
        """Boxes (1 + patches, 4) of the visual tokens that these pixel values become; [CLS] has none."""
        rows, columns = (side // self.patch_size for side in visual["pixels"].shape[-2:])
        return torch.cat([torch.zeros(1, 4), grid_boxes(rows, columns)])

    def pad_visual(self, visuals: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        values, mask = pad_pictures([visual["pixels"] for visual in visuals])
        return {"pixel_values": values, "pixel_mask": mask}

    def save(self, folder: Path | str) -> None:
        super().save(folder)
        self.image_processor.save_pretrained(folder)


def pair_spans(encoding, row: int, shift: int) -> list[tuple[int, int]]:
    """Returns the character spans of a tokenized pair in the statement "first second".

    The tokenizer counts characters from the start of each part; ``shift`` is where the second one starts in
    the statement. Special tokens get (0, 0).
    """
    return [
        (start + part * shift, end + part * shift) if part is not None else (0, 0)
        for (start, end), part in zip(
            encoding["offset_mapping"][row], encoding.sequence_ids(row), strict=True
        )
    ]


def pad_pictures(pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads pictures to pixel values (batch, 3, height, width), with a mask (batch, height, width).

    If all pictures have one size, the mask is (batch, 1, 1) ones, see ``embed_patches``.
    """
    height, width = max(p.shape[1] for p in pictures), max(p.shape[2] for p in pictures)
    values = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
    if all(picture.shape[1:] == (height, width) for picture in pictures):
        return values, torch.ones(len(pictures), 1, 1, dtype=torch.long)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.long)
    for row, picture in enumerate(pictures):
        mask[row, : picture.shape[1], : picture.shape[2]] = 1
    return values, mask
