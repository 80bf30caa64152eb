"""VisualBERT (Li et al. 2019, arXiv 1908.03557) as a student, from any transformers checkpoint of it.

Parameters are those of the stock model, ``visual_bert.``; only its forward pass is written anew, so
that regions are projected once per example instead of once per choice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import VisualBertConfig, VisualBertModel, VisualBertPreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from tdlib.core.files import write_folder
from tdlib.students.base import StudentError, StudentOutput, drawn_linear, load_checkpoint
from tdlib.students.region_student import region_output, sequence_mask
from tdlib.students.vlbert import (
    BertPairEncoder,
    answer_slot,
    check_empty,
    fitting_tokenizer,
    referents,
)

# Of the visual token types. The authors' code gives regions of COCO, VCR, VQA and Flickr30k type 0; type 1 is
# that of NLVR2's second picture. (The stock model takes 1 where none is given.)
REGION_TYPE = 0


class VisualBertForMultipleChoice(VisualBertPreTrainedModel):
    """VisualBERT that scores each statement about a picture; a softmax over the choices decides.

    The head is the stock one for VCR: dropout and one linear layer on the pooled [CLS]. A region has
    the mean position of the words that refer to it (section 3.2; the stock ``image_text_alignment``).
    Boxes are not read: they only say in the output where regions lie.

    Raises:
        StudentError: the configuration has ``bypass_transformer``, with which no layer sees both
            text and regions but the last.
    """

    config_class = VisualBertConfig
    inputs = (
        "input_ids", "attention_mask", "token_type_ids", "region_features", "region_boxes", "region_mask",
        "region_objects", "objects", "spans",
    )  # fmt: skip
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
        self.classifier = self.make_classifier(config)
        self.post_init()

    @staticmethod
    def make_classifier(config: VisualBertConfig) -> nn.Module:
        return nn.Sequential(nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.hidden_size, 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.visual_bert.get_input_embeddings()

    def renew_visual(self, dim: int) -> None:
        """Draws the projection of region features anew, for features of width ``dim``."""
        self.visual_bert.embeddings.visual_projection = drawn_linear(dim, self.config.hidden_size)
        self.config.visual_embedding_dim = dim

    def summary(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads of the last ``state``: (batch * choices, width)."""
        assert self.visual_bert.pooler is not None
        return self.visual_bert.pooler(state)

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor, region_features: Tensor, aligned: Tensor
    ) -> Tensor:
        """Embeddings (batch, choices, text_tokens + regions, width).

        ``aligned`` (batch, choices, text_tokens, regions): which regions each token refers to.
        """
        table = self.visual_bert.embeddings
        words = table.word_embeddings(input_ids.flatten(0, 1)).unflatten(0, input_ids.shape[:2])
        positions = table.position_embeddings.weight[: input_ids.shape[2]]
        text = words + table.token_type_embeddings(token_type_ids) + positions
        share = aligned.to(words) / aligned.sum(2, keepdim=True).clamp(min=1)
        places = torch.einsum("bctr,tw->bcrw", share, positions.to(words))
        own = (
            table.visual_token_type_embeddings.weight[REGION_TYPE]
            + table.visual_position_embeddings.weight[0]
        )
        regions = (table.visual_projection(region_features) + own)[:, None] + places
        return table.dropout(table.LayerNorm(torch.cat([text, regions], dim=2)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        region_features: Tensor,
        region_boxes: Tensor,
        region_mask: Tensor,
        region_objects: Tensor,
        objects: Tensor,
        spans: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> StudentOutput:
        """Scores statements.

        Args:
            input_ids: (batch, choices, text_tokens), padded at the end; likewise attention_mask and
                token_type_ids.
            region_features: (batch, regions, visual_embedding_dim), once per example.
            region_boxes: (batch, regions, 4), xyxy normalised to the picture.
            region_mask: (batch, regions), 1 on real regions.
            region_objects: (batch, regions), index of the object that a region is, or -1.
            objects: (batch, choices, text_tokens), index of the object that a token refers to, or -1.
            spans: (batch, choices, text_tokens, 2) characters of each token, handed on in the output.
            output_hidden_states: whether to return hidden states, spans and boxes.
        """
        aligned = referents(objects, region_objects) & (attention_mask[..., None] == 1)
        state = self.embed(input_ids, token_type_ids, region_features, aligned).flatten(0, 1)
        tokens = sequence_mask(attention_mask, region_mask).flatten(0, 1)
        # One row, added to the scores of every query, as in the stock model.
        mask = create_bidirectional_mask(self.config, state[:, :1], tokens, allow_is_bidirectional_skip=False)
        states = self.visual_bert.encoder(state, attention_mask=mask, output_hidden_states=True).hidden_states
        logits = self.classifier(self.summary(states[-1], attention_mask)).view(len(input_ids), -1)
        if not output_hidden_states:
            return StudentOutput(logits=logits)
        return region_output(logits, states, attention_mask, region_mask, region_boxes, spans)


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

    def summary(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return answer_slot(state, attention_mask)


class VisualBertEncoder(BertPairEncoder):
    """Turns examples into VisualBERT's inputs.

    The authors' repositories on the hub hold no tokenizer; see ``convert_visual_bert``.
    """

    kind = "VisualBERT"
    config_kind = VisualBertConfig


def load_visual_bert(name: str, seed: int = 0, labels: Sequence[str] = ()) -> VisualBertForMultipleChoice:
    """A VisualBERT with a multiple-choice head, or one for ``labels``; see ``load_checkpoint``."""
    kind = VisualBertForClassification if labels else VisualBertForMultipleChoice
    return load_checkpoint(kind, name, seed, labels)


def convert_visual_bert(name: str, folder: Path | str, tokenizer: Path | str) -> None:
    """Writes a stock checkpoint without its head, but with a tokenizer, as a folder.

    Args:
        name: folder or hub id, such as ``uclanlp/visualbert-vcr-coco-pre``.
        folder: where to write; must not exist or be empty.
        tokenizer: folder or hub id of the tokenizer that it was pretrained with (bert-base-uncased).

    Raises:
        StudentError: one of the two cannot be loaded, or they do not fit; the folder is not empty.
    """
    check_empty(folder)
    model = load_visual_bert(name).visual_bert
    words = fitting_tokenizer(tokenizer, model.config.vocab_size, name)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        words.save_pretrained(partial)

    write_folder(Path(folder), fill)
