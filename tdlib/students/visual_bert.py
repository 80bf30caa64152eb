"""VisualBERT (Li et al. 2019, arXiv 1908.03557) as a student, from any transformers checkpoint of it.

Parameters are those of the stock model, ``visual_bert.``; only its forward pass is written anew, so
that regions are projected once per example instead of once per choice.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import VisualBertConfig, VisualBertModel, VisualBertPreTrainedModel
from transformers.models.visual_bert.modeling_visual_bert import VisualBertSelfAttention

from tdlib.students.base import FusedAttention, StudentError, drawn_linear, fuse_attention, sequence_mask
from tdlib.students.region_student import BertPairEncoder, RegionStudent, referents

# Of the visual token types. The authors' code gives regions of COCO, VCR, VQA and Flickr30k type 0; type 1 is
# that of NLVR2's second picture. (The stock model takes 1 where none is given.)
REGION_TYPE = 0


class FusedVisualBertSelfAttention(FusedAttention, VisualBertSelfAttention):  # type: ignore[misc]
    pass


class VisualBertForMultipleChoice(RegionStudent, VisualBertPreTrainedModel):
    """VisualBERT that scores each statement about a picture; a softmax over the choices decides.

    The head is the stock one for VCR: dropout and one linear layer on the pooled [CLS]. A region has
    the mean position of the words that refer to it (section 3.2; the stock ``image_text_alignment``).
    Boxes are not read: they only say in the output where regions lie. A configuration with
    ``bypass_transformer`` is refused: no layer but the last sees both text and regions.
    """

    config_class = VisualBertConfig
    may_lack: ClassVar[tuple[str, ...]] = ("classifier.", "visual_bert.pooler.")
    with_pooler: ClassVar[bool] = True

    def __init__(self, config: VisualBertConfig):
        super().__init__(config)
        if config.bypass_transformer:
            raise StudentError(
                "a VisualBERT with bypass_transformer=true has no hidden states of regions; "
                "choose a checkpoint without it"
            )
        self.visual_bert = VisualBertModel(config, add_pooling_layer=self.with_pooler)
        fuse_attention(self.visual_bert, FusedVisualBertSelfAttention)
        self.classifier = self.make_classifier(config)
        self.post_init()

    def renew_visual(self, dim: int) -> nn.Module:
        self.visual_bert.embeddings.visual_projection = drawn_linear(dim, self.config.hidden_size)
        self.config.visual_embedding_dim = dim
        return self.visual_bert.embeddings.visual_projection

    def states(
        self, *, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, region_features: Tensor,
        region_mask: Tensor, region_objects: Tensor, objects: Tensor, **_: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        table = self.visual_bert.embeddings
        words = table.word_embeddings(input_ids.flatten(0, 1)).unflatten(0, input_ids.shape[:2])
        positions = table.position_embeddings.weight[: input_ids.shape[2]]
        text = words + table.token_type_embeddings(token_type_ids) + positions
        # Which regions each token refers to, (batch, choices, text_tokens, regions).
        aligned = referents(objects, region_objects) & (attention_mask[..., None] == 1)
        share = aligned.to(words) / aligned.sum(2, keepdim=True).clamp(min=1)
        places = torch.einsum("bctr,tw->bcrw", share, positions.to(words))
        type_and_position = (
            table.visual_token_type_embeddings.weight[REGION_TYPE]
            + table.visual_position_embeddings.weight[0]
        )
        regions = (table.visual_projection(region_features) + type_and_position)[:, None] + places
        embeddings = table.dropout(table.LayerNorm(torch.cat([text, regions], dim=2)))
        states = [embeddings.flatten(0, 1)]
        # One row for every query: true where a token may be attended to.
        mask = sequence_mask(attention_mask, region_mask).flatten(0, 1)[:, None, None].bool()
        for layer in self.visual_bert.encoder.layer:
            states.append(layer(states[-1], mask)[0])
        return tuple(states)


class VisualBertForClassification(VisualBertForMultipleChoice):
    """VisualBERT that gives a statement about a picture a label, read from the [MASK] that follows it.

    The head is the stock one for VQA: dropout and one linear layer.
    """

    may_lack = ("classifier.",)
    with_pooler = False

    @staticmethod
    def make_classifier(config: VisualBertConfig) -> nn.Module:
        labels = len(config.id2label or {})
        return nn.Sequential(nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.hidden_size, labels))


class VisualBertEncoder(BertPairEncoder):
    """Turns examples into VisualBERT's inputs.

    The authors' repositories on the hub hold no tokenizer; ``convert`` puts one beside their weights.
    """

    kind = "VisualBERT"
    config_kind = VisualBertConfig
