"""Shared parts of the students that read region features beside text: UNITER, VL-BERT, VisualBERT.

``RegionStudent`` is their one forward pass: an architecture only defines its hidden states and the vector
that its head reads. Padding is masked; the authors move regions up to the end of each text instead, which
gives the same result. ``RegionEncoder`` makes their inputs, ``BertPairEncoder`` those of VL-BERT and
VisualBERT, which read texts as BERT's pairs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from tdlib.data.examples import Example
from tdlib.regions.computed import CachedRegions, ClipGridRegions, Regions, RegionSource
from tdlib.regions.files import FileRegions
from tdlib.students.base import (
    EncodedText,
    Row,
    StudentEncoder,
    StudentError,
    StudentOutput,
    encoded_text,
    pad_last,
    placed_output,
)

Piece = tuple[int, tuple[int, int]]  # a token and its span


def bert_states(
    layers: Iterable[nn.Module], config: Any, embeddings: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    """Runs BERT's layers; returns hidden states, ``embeddings`` (rows, tokens, width) first.

    ``tokens`` (rows, tokens) is 1 on real ones.
    """
    # Without the skip: checking whether anything is padded would wait for the device in every pass.
    mask = create_bidirectional_mask(config, embeddings, tokens, allow_is_bidirectional_skip=False)
    states = [embeddings]
    for layer in layers:
        states.append(layer(states[-1], mask))
    return tuple(states)


def referents(objects: Tensor, region_objects: Tensor) -> Tensor:
    """Marks the regions that each token refers to: (batch, choices, text_tokens, regions), boolean.

    ``objects`` (batch, choices, text_tokens) and ``region_objects`` (batch, regions) are indices of
    an example's objects, -1 for none.
    """
    return (objects[..., None] == region_objects[:, None, None]) & (objects[..., None] >= 0)


class RegionStudent:
    """Scores statements about a picture that is given as regions; a mixin before ``PreTrainedModel``.

    An architecture defines ``states``, ``renew_visual`` and ``classifier``. Its base model has a ``pooler``,
    which is None in classifiers that read their answer from [MASK].
    """

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids", "attention_mask", "token_type_ids", "region_features", "region_boxes", "region_mask",
        "region_objects", "objects", "spans",
    )  # fmt: skip
    classifier: nn.Module
    base_model: Any
    drawn: Collection[str] = ()  # parameters that are drawn anew for a run, which learn as its head does

    @staticmethod
    def make_classifier(config: Any) -> nn.Module:
        """Creates the head: dropout and one linear layer, if an architecture has no other."""
        return nn.Sequential(nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.hidden_size, 1))

    def states(self, *args: Any, **inputs: Any) -> tuple[Tensor, ...]:
        """Computes hidden states, each (batch * choices, text_tokens + regions or more, width).

        Embeddings come first. ``inputs`` are those of ``forward``. Tokens without a place (VL-BERT's [END])
        come last.
        """
        raise NotImplementedError

    def summary(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Selects the vector (batch * choices, width) that the head reads from the last ``state``.

        It is the pooled [CLS], or without a pooler the text token before the last one: the [MASK] behind a
        question, see ``BertPairEncoder``. ``attention_mask`` (batch, choices, text_tokens) has padding last.
        """
        if self.base_model.pooler is not None:
            return self.base_model.pooler(state)
        slots = attention_mask.flatten(0, 1).sum(-1) - 2
        return state[torch.arange(len(state), device=state.device), slots]

    def renew_visual(self, dim: int) -> nn.Module:
        """Draws the projection of region features anew, for features of width ``dim``; returns it."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, region_features: Tensor,
        region_boxes: Tensor, region_mask: Tensor, spans: Tensor | None = None,
        output_hidden_states: bool = False, **references: Tensor,
    ) -> StudentOutput:  # fmt: skip
        """Scores statements.

        Args:
            input_ids: (batch, choices, text_tokens), padded at the end; likewise attention_mask and
                token_type_ids.
            region_features: (batch, regions, visual_embedding_dim), once per example: in training its
                choices share what dropout leaves of them.
            region_boxes: (batch, regions, 4), xyxy normalised to the picture.
            region_mask: (batch, regions), 1 on real regions.
            spans: (batch, choices, text_tokens, 2) characters of each token, handed on in the output.
            output_hidden_states: whether to return hidden states, spans and boxes.
            references: where ``inputs`` names them, region_objects (batch, regions), index of the object
                that a region is, or -1, and objects (batch, choices, text_tokens), index of the object
                that a token refers to, or -1.
        """
        states = self.states(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            region_features=region_features, region_boxes=region_boxes, region_mask=region_mask, **references,
        )  # fmt: skip
        logits = self.classifier(self.summary(states[-1], attention_mask))
        logits = logits.view(len(input_ids), -1)  # per choice, or per class
        if not output_hidden_states:
            return StudentOutput(logits=logits)
        return placed_output(logits, states, attention_mask, region_mask, spans, region_boxes)


class RegionEncoder(StudentEncoder):
    """Turns examples into text tokens and regions.

    A statement becomes [CLS] part [SEP] part [SEP] ..., where the parts are the question (or
    hypothesis), a given answer (VCR's QA->R) and the choice; each has its own token type.

    Args:
        name: folder or hub id of the student.
        max_text_tokens: longer statements are cut, the longest part first.
        regions: where region features come from.

    Raises:
        StudentError: the student is of another architecture, or region features are not of its width.
    """

    token_types: ClassVar[dict[str, int]] = {"question": 0, "answer": 1, "rationale": 1}
    config_kind: ClassVar[Any]

    def __init__(self, name: str, max_text_tokens: int, regions: RegionSource):
        super().__init__(name, max_text_tokens)
        self.regions = regions
        if not isinstance(self.config, self.config_kind):
            raise StudentError(
                f"student {name!r} is a {self.config.model_type}; expected a folder or hub id of a "
                f"{self.kind}"
            )
        width = self.config.visual_embedding_dim
        if regions.dim != width and not self.foreign:
            raise StudentError(
                f"student {name!r} reads region features of width {width}, but these have {regions.dim}; "
                "choose features of the detector that it was pretrained with"
            )

    @property
    def foreign(self) -> bool:
        """True if the student was not trained with features of this kind; its run notes ``region_source``."""
        trained_with = getattr(self.config, "region_source", None)
        return getattr(self.regions, "foreign", False) and trained_with != self.regions.fingerprint  # type: ignore[attr-defined]

    def _parts(self, example: Example) -> list[list[tuple[str, int, int]]]:
        """Splits each statement into parts: text, its start in the statement, and its token type."""
        prompt, given, types = example.prompt.text, example.given, self.token_types
        asked = [(prompt, 0, types["question"])]
        if given:
            asked = [
                (prompt[:given].rstrip(), 0, types["question"]),
                (prompt[given:], given, types["answer"]),
            ]
        last = types["rationale" if given else "answer"]
        return [[*asked, (choice.text, len(prompt) + 1, last)] for choice in example.choices] or [asked]

    def text(self, example: Example) -> EncodedText:
        parts = self._parts(example)
        rows = [self._row(*row) for row in zip(parts, self._pieces(parts), strict=True)]
        return encoded_text(rows, self.tokenizer.pad_token_id, example.statements())

    def _row(self, parts: Sequence[tuple[str, int, int]], pieces: list[list[Piece]]) -> Row:
        """Builds ids, token types and spans of one statement, of at most ``max_text_tokens``."""
        room = self.max_text_tokens - 1 - len(parts)
        while sum(map(len, pieces)) > room:
            max(pieces, key=len).pop()
        ids, types, spans = [self.tokenizer.cls_token_id], [parts[0][2]], [(0, 0)]
        for piece, (_, _, kind) in zip(pieces, parts, strict=True):
            ids += [*(token for token, _ in piece), self.tokenizer.sep_token_id]
            types += [kind] * (len(piece) + 1)
            spans += [*(span for _, span in piece), (0, 0)]
        return ids, types, spans

    def _pieces(self, statements: Sequence[Sequence[tuple[str, int, int]]]) -> list[list[list[Piece]]]:
        """Tokenizes each part of each statement: ids and spans in the statement.

        The statements of an example share their question, so each distinct part is tokenized once.
        """
        texts = [*dict.fromkeys(text for parts in statements for text, _, _ in parts)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        read = {text: [*zip(ids, spans, strict=True)] for text, ids, spans in rows}

        def moved(text: str, start: int) -> list[Piece]:
            return [(token, (begin + start, end + start)) for token, (begin, end) in read[text]]

        return [[moved(text, start) for text, start, _ in parts] for parts in statements]

    def lengths(self, example: Example) -> list[int]:
        # [CLS], and a [SEP] behind each part
        return [1 + len(pieces) + sum(map(len, pieces)) for pieces in self._pieces(self._parts(example))]

    def prepare(self, examples: Sequence[Example], part: int = 5_000) -> None:
        """Computes and stores the regions of the examples, ``part`` at a time, if they are computed here.

        Of those that are read from files none may be missing (DataError).
        """
        if isinstance(self.regions, CachedRegions | ClipGridRegions):
            for start in range(0, len(examples), part):
                self.regions.add(examples[start : start + part])
        elif isinstance(self.regions, FileRegions):
            self.regions.require(examples)

    def arrange(self, regions: Regions, example: Example) -> Regions:
        """Rearranges the regions of an example as the architecture needs them."""
        return regions

    def visual(self, example: Example) -> dict[str, Tensor]:
        regions = self.arrange(self.regions(example), example)
        return {
            "region_features": regions.features, "region_boxes": regions.boxes,
            "region_objects": regions.objects,
        }  # fmt: skip

    def visual_boxes(self, visual: dict[str, Tensor]) -> Tensor:
        return visual["region_boxes"]

    def blank(self, visual: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves one region without content: even the number and places of regions would tell something."""
        return {
            "region_features": torch.zeros_like(visual["region_features"][:1]),
            "region_boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
            "region_objects": torch.tensor([-1]),
        }

    def pad_visual(self, visuals: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``region_features`` (batch, regions, dim); their boxes, objects and mask are padded alike."""
        longest = max(len(visual["region_boxes"]) for visual in visuals)
        mask = [torch.ones(len(visual["region_boxes"]), dtype=torch.long) for visual in visuals]
        return {
            "region_features": pad_last([v["region_features"] for v in visuals], longest, 0),
            "region_boxes": pad_last([v["region_boxes"] for v in visuals], longest, 0),
            "region_objects": pad_last([v["region_objects"] for v in visuals], longest, 0, -1),
            "region_mask": pad_last(mask, longest, 0),
        }


class BertPairEncoder(RegionEncoder):
    """[CLS] prompt [SEP] choice [SEP], with types 0 and 1; without choices [CLS] prompt [SEP] [MASK] [SEP].

    A given answer (VCR's QA->R) follows its question without a separator. The head of a classifier
    reads [MASK], which has no characters. So do the authors of VL-BERT and of VisualBERT.
    """

    needs_every_word = True

    def _parts(self, example: Example) -> list[list[tuple[str, int, int]]]:
        parts = super()._parts(replace(example, given=0))
        if example.choices:
            return parts
        slot = (self.tokenizer.mask_token, len(example.prompt.text), self.token_types["answer"])
        return [[*row, slot] for row in parts]

    def text(self, example: Example) -> EncodedText:
        encoded = super().text(example)
        encoded.spans[encoded.input_ids == self.tokenizer.mask_token_id] = 0
        return encoded
