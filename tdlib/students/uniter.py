"""UNITER (Chen et al. 2020, arXiv 1909.11740) as a student: one BERT over words and regions.

Parameters carry the names of the authors' code, so that their checkpoints (and VILLA's, which are
UNITERs trained otherwise) fit key for key; ``convert`` turns one into a folder.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertPooler,
    BertPreTrainedModel,
)

from tdlib.data.examples import Example
from tdlib.students.base import EncodedText, StudentError, drawn_linear, sequence_mask
from tdlib.students.region_student import RegionEncoder, RegionStudent, bert_states

IMAGE_TYPE = 1  # the token type of regions


class UniterConfig(BertConfig):
    """BERT's sizes, and ``img_dim``, the width of region features (other students' ``visual_embedding_dim``).

    ``type_vocab_size`` is 2 in the authors' checkpoints; VCR needs 4 (see ``convert``).
    """

    model_type = "uniter"
    attribute_map: ClassVar[dict[str, str]] = {"visual_embedding_dim": "img_dim"}

    vocab_size: int = 28996  # bert-base-cased
    img_dim: int = 2048


AutoConfig.register(UniterConfig.model_type, UniterConfig)


def geometry(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2, w, h, w * h), Chen et al. section 3.1, of normalised xyxy ``boxes`` (..., 4)."""
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes, size, size.prod(dim=-1, keepdim=True)], dim=-1)


class UniterImageEmbeddings(nn.Module):
    """LN(LN(W_f f + b_f) + LN(W_g g + b_g) + t): features f, geometry g, type embedding t (section 3.1)."""

    def __init__(self, config: UniterConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.img_linear = nn.Linear(config.img_dim, width)
        self.img_layer_norm = nn.LayerNorm(width, eps=eps)
        self.pos_linear = nn.Linear(7, width)
        self.pos_layer_norm = nn.LayerNorm(width, eps=eps)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: Tensor, boxes: Tensor, type_embedding: Tensor) -> Tensor:
        """(batch, regions, width) of (batch, regions, img_dim), (batch, regions, 4) and (width,)."""
        seen = self.img_layer_norm(self.img_linear(features))
        place = self.pos_layer_norm(self.pos_linear(geometry(boxes)))
        return self.dropout(self.LayerNorm(seen + place + type_embedding))


class UniterPreTrainedModel(BertPreTrainedModel):
    """Tells transformers how to load and save UNITERs."""

    config_class = UniterConfig
    base_model_prefix = "uniter"


class UniterModel(UniterPreTrainedModel):
    """[CLS] text [SEP] regions through a BERT encoder; ``pooler`` is tanh(W h + b) of [CLS]."""

    def __init__(self, config: UniterConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.img_embeddings = UniterImageEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.embeddings.word_embeddings = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, region_features: Tensor,
        region_boxes: Tensor, region_mask: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Hidden states, see ``RegionStudent.states``; arguments as in its ``forward``."""
        text = self.embeddings(input_ids.flatten(0, 1), token_type_ids.flatten(0, 1))
        image_type = self.embeddings.token_type_embeddings.weight[IMAGE_TYPE]
        regions = self.img_embeddings(region_features, region_boxes, image_type)
        embeddings = torch.cat([text, regions.repeat_interleave(input_ids.shape[1], dim=0)], dim=1)
        tokens = sequence_mask(attention_mask, region_mask).flatten(0, 1)
        return bert_states(self.encoder.layer, self.config, embeddings, tokens)


class LogOdds(nn.Module):
    """The log-odds of class 1 of two: (..., 2) logits to (..., 1)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits[..., 1:] - logits[..., :1]


class UniterForMultipleChoice(RegionStudent, UniterPreTrainedModel):
    """UNITER that scores each statement about a picture; a softmax over the choices decides.

    The head is the authors' for VCR (d -> 2d, ReLU, LN, 2d -> 2: wrong, right). They train it with
    a two-way softmax per choice and then rank by the second logit alone. Our reading: a choice's
    one logit is the difference of the two, its log-odds of being right. The authors' loss is the
    binary cross-entropy of this logit, and both rows of the last layer learn under a softmax over
    the choices, where the first would be idle if the second logit alone were the score.
    """

    inputs = tuple(name for name in RegionStudent.inputs if "objects" not in name)
    may_lack = ("classifier.",)

    def __init__(self, config: UniterConfig):
        super().__init__(config)
        self.uniter = UniterModel(config)
        self.classifier = self.make_classifier(config)
        self.post_init()

    @staticmethod
    def make_classifier(config: UniterConfig) -> nn.Module:
        return nn.Sequential(*_two_layers(config, nn.ReLU(), outputs=2), LogOdds())

    def renew_visual(self, dim: int) -> nn.Module:
        self.uniter.img_embeddings.img_linear = drawn_linear(dim, self.config.hidden_size)
        self.config.img_dim = dim
        return self.uniter.img_embeddings.img_linear

    def states(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        return self.uniter(**inputs)


class UniterForClassification(UniterForMultipleChoice):
    """UNITER that gives a statement about a picture a label; the head is the authors' for VQA and SNLI-VE."""

    @staticmethod
    def make_classifier(config: UniterConfig) -> nn.Module:
        return nn.Sequential(*_two_layers(config, nn.GELU(), outputs=len(config.id2label or {})))


def _two_layers(config: UniterConfig, activation: nn.Module, outputs: int) -> list[nn.Module]:
    width = config.hidden_size
    norm = nn.LayerNorm(2 * width, eps=config.layer_norm_eps)
    return [nn.Linear(width, 2 * width), activation, norm, nn.Linear(2 * width, outputs)]


class UniterEncoder(RegionEncoder):
    """Turns examples into UNITER's inputs.

    A separator has the type of the part that it ends, as in the authors' second pretraining on VCR;
    their finetuning gives it that of the part that follows.
    """

    kind = "UNITER"
    token_types: ClassVar[dict[str, int]] = {"question": 0, "answer": 2, "rationale": 3}

    config_kind = UniterConfig

    def text(self, example: Example) -> EncodedText:
        encoded = super().text(example)
        if int(encoded.token_type_ids.max()) >= self.config.type_vocab_size:
            raise StudentError(
                f"student {self.name!r} has {self.config.type_vocab_size} token types; example "
                f"{example.id!r} has choices, which need 4: convert the checkpoint with vcr=True (--vcr)"
            )
        return encoded
