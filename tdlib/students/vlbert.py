"""VL-BERT (Su et al. 2020, arXiv 1908.08530) as a student: every token has a word and a visual feature.

Parameters carry the names of the authors' code (jackroos/VL-BERT), so that their checkpoints fit key for
key; ``convert`` turns one into a folder. All regions share the position after the text. Features come
precomputed, as in the authors' VQA: there is no detector inside, and no loss on it.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig
from transformers import initialization as init
from transformers.models.bert.modeling_bert import (
    BertEncoder,
    BertPooler,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)

from tdlib.data.examples import Example
from tdlib.regions.computed import Regions, RegionSource
from tdlib.regions.files import header_of
from tdlib.students.base import StudentError, drawn_linear, sequence_mask
from tdlib.students.region_student import BertPairEncoder, RegionStudent, bert_states, referents

REGION_TYPE = 2  # the token type of regions and of [END]
CLASSIFIER = "classifier.0."  # the transform of the pretrained word predictor, from which VQA's head starts
FREQUENCIES = 256
GEOMETRY = 4 * 2 * FREQUENCIES  # sine and cosine of each of four numbers


class VlBertConfig(BertConfig):
    """BERT's sizes, and ``visual_embedding_dim``, the width of region features."""

    model_type = "vl-bert"

    type_vocab_size: int = 3
    visual_embedding_dim: int = 2048


AutoConfig.register(VlBertConfig.model_type, VlBertConfig)


def geometry(boxes: Tensor) -> Tensor:
    """Encodes places and sizes as sines and cosines: (..., 2048) of normalised xyxy ``boxes`` (..., 4).

    Each number p of 100 * (centre x, centre y, width, height) becomes sin(p / 1000^(i / 256)), i = 0 ... 255,
    and then the cosines (section 3.2, and the authors' ``coordinate_embeddings``).
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    places = 100 * torch.cat([(low + high) / 2, high - low], dim=-1)
    steps = torch.arange(FREQUENCIES, dtype=boxes.dtype, device=boxes.device) / FREQUENCIES
    angles = places[..., None] / 1000**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class RegionFeatures(nn.Module):
    """ReLU(W [geometry; features] + b), what a region looks like and where it is (section 3.2)."""

    def __init__(self, config: VlBertConfig):
        super().__init__()
        self.obj_downsample = nn.Sequential(
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(GEOMETRY + config.visual_embedding_dim, config.hidden_size),
            nn.ReLU(),
        )

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(batch, regions, width) of (batch, regions, visual_embedding_dim) and (batch, regions, 4)."""
        return self.obj_downsample(torch.cat([geometry(boxes), features], dim=-1))


class VisualLayerNorm(nn.LayerNorm):
    """The norm of what a token shows; its scale starts at 0, as the authors' does: the picture fades in."""


class VisualLinguisticBert(nn.Module):
    """[CLS] text [SEP] regions [END] through a BERT encoder.

    A token's word, what it shows, its position and its type are added, then normalised.
    """

    def __init__(self, config: VlBertConfig, with_pooler: bool):
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.end_embedding = nn.Embedding(1, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.embedding_LayerNorm = nn.LayerNorm(width, eps=eps)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.visual_ln_text = VisualLayerNorm(width, eps=eps)
        self.visual_ln_object = VisualLayerNorm(width, eps=eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if with_pooler else None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, seen: Tensor,
        region_word: Tensor, region_mask: Tensor, which: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Hidden states (batch * choices, text_tokens + regions + 1, width), embeddings first; [END] is last.

        Args:
            input_ids: (batch, choices, text_tokens); likewise attention_mask and token_type_ids.
            seen: (batch, regions, width) of ``RegionFeatures``.
            region_word: (1, width), the word of every region.
            region_mask: (batch, regions), 1 on real regions.
            which: (batch, choices, text_tokens), the region that each text token shows.
        """
        batch, choices, length = input_ids.shape
        words = self.word_embeddings(input_ids.flatten(0, 1)).unflatten(0, (batch, choices))
        rows = torch.arange(batch, device=seen.device)[:, None, None]
        positions = self.position_embeddings.weight[:length]
        text = words + self.visual_ln_text(seen)[rows, which] + positions
        text = text + self.token_type_embeddings(token_type_ids)
        ends = attention_mask.sum(-1, keepdim=True)  # (batch, choices, 1)
        kind = self.token_type_embeddings.weight[REGION_TYPE]
        regions = (self.visual_ln_object(seen) + region_word)[:, None] + self.position_embeddings(ends) + kind
        end = self.end_embedding.weight + self.position_embeddings(ends + 1) + kind
        every = torch.cat([text, regions, end], dim=2)  # (batch, choices, text_tokens + regions + 1, width)
        embeddings = self.embedding_dropout(self.embedding_LayerNorm(every))
        tokens = nn.functional.pad(sequence_mask(attention_mask, region_mask), (0, 1), value=1)
        return bert_states(self.encoder.layer, self.config, embeddings.flatten(0, 1), tokens.flatten(0, 1))


class VlBertForMultipleChoice(RegionStudent, BertPreTrainedModel):
    """VL-BERT that scores each statement about a picture; a softmax over the choices decides.

    The head is the authors' for VCR: one linear layer on the pooled [CLS]. They train it with the
    sigmoid of each choice. Region 0 is the whole picture (``VlBertEncoder`` sees to it): every text
    token that refers to no region shows it. [END] is read by the other tokens, but is not in the output.
    """

    config_class = VlBertConfig
    base_model_prefix = "vlbert"
    may_lack: ClassVar[tuple[str, ...]] = ("classifier.", "vlbert.pooler.")
    with_pooler: ClassVar[bool] = True

    def __init__(self, config: VlBertConfig):
        super().__init__(config)
        self.image_feature_extractor = RegionFeatures(config)
        self.object_linguistic_embeddings = nn.Embedding(1, config.hidden_size)
        self.vlbert = VisualLinguisticBert(config, self.with_pooler)
        self.classifier = self.make_classifier(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisualLayerNorm):
            init.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlbert.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.vlbert.word_embeddings = value

    def renew_visual(self, dim: int) -> nn.Module:
        down = self.image_feature_extractor.obj_downsample
        down[1] = drawn_linear(GEOMETRY + dim, self.config.hidden_size)
        self.config.visual_embedding_dim = dim
        return down[1]

    def states(
        self, *, region_features: Tensor, region_boxes: Tensor, region_objects: Tensor, objects: Tensor,
        **inputs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """See ``RegionStudent``; [END] comes last. Region 0 is the whole picture."""
        seen = self.image_feature_extractor(region_features, region_boxes)
        which = referents(objects, region_objects).long().argmax(-1)  # 0, the whole picture, for none
        word = self.object_linguistic_embeddings.weight
        return self.vlbert(seen=seen, region_word=word, which=which, **inputs)


class VlBertForClassification(VlBertForMultipleChoice):
    """VL-BERT that gives a statement about a picture a label, read from the [MASK] that follows it.

    The head is the authors' for VQA: the transform of the pretrained word predictor, then one linear
    layer. They start the rows of that layer from the words of the answers; here they are drawn.
    """

    may_lack = ("classifier.",)
    with_pooler = False

    @staticmethod
    def make_classifier(config: VlBertConfig) -> nn.Module:
        return nn.Sequential(
            BertPredictionHeadTransform(config), nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(config.hidden_size, len(config.id2label or {})),
        )  # fmt: skip


class VlBertEncoder(BertPairEncoder):
    """Turns examples into VL-BERT's inputs: the whole picture first, boxes within the picture's pixels."""

    kind = "VL-BERT"
    config_kind = VlBertConfig

    def __init__(self, name: str, max_text_tokens: int, regions: RegionSource):
        super().__init__(name, max_text_tokens, regions)
        if max_text_tokens > self.config.max_position_embeddings - 2:
            raise StudentError(
                f"student {name!r} has {self.config.max_position_embeddings} positions, two of them for "
                f"regions and [END], but max_text_tokens={max_text_tokens}"
            )

    def arrange(self, regions: Regions, example: Example) -> Regions:
        regions = whole_picture_first(regions)
        # Features that came with a data set can be used without its pictures.
        header = None if regions.size else header_of(example.image)
        size = header.upright if header else regions.size
        return regions if size is None else replace(regions, boxes=within_pixels(regions.boxes, size))

    def blank(self, visual: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole picture without content."""
        return super().blank(visual) | {"region_boxes": visual["region_boxes"][:1]}


def whole_picture_first(regions: Regions) -> Regions:
    """Makes the whole picture region 0, which text tokens without an object show.

    The first region that is no object and covers the picture (to 1 % of its sides) is moved there.
    If there is none, the mean of all features is inserted, as the authors do for precomputed features.
    """
    boxes, objects, features = regions.boxes, regions.objects, regions.features
    covering = (boxes[:, :2] <= 0.01).all(1) & (boxes[:, 2:] >= 0.99).all(1) & (objects < 0)
    if covering.any():
        first = covering.long().argmax()
        order = torch.cat([first[None], (torch.arange(len(boxes)) != first).nonzero()[:, 0]])
        return replace(regions, features=features[order], boxes=boxes[order], objects=objects[order])
    mean = features.sum(0, keepdim=True) / max(1, len(features))
    return replace(
        regions,
        features=torch.cat([mean, features]),
        boxes=torch.cat([boxes.new_tensor([[0, 0, 1, 1]]), boxes]),
        objects=torch.cat([objects.new_tensor([-1]), objects]),
    )


def within_pixels(boxes: Tensor, size: tuple[float, float]) -> Tensor:
    """Clips normalised xyxy ``boxes`` (..., 4) as the authors do: to (0, 0, width - 1, height - 1).

    They count pixels from 0 to width - 1, so that in their code the whole picture ends at 1 - 1 / width
    and 1 - 1 / height. ``size`` is width and height in pixels.
    """
    return boxes.clamp(min=0).minimum(1 - 1 / boxes.new_tensor([*size, *size]))
