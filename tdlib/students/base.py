"""Defines what every student shares: its inputs, its one output type, and loading.

A student is a ``PreTrainedModel``; which tokens it sees where (characters, boxes) is part of its
output, so that the method never needs to know the architecture.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from tdlib.core.files import why_unreadable
from tdlib.core.paths import resolve
from tdlib.core.provenance import tokenizer_digest
from tdlib.data.examples import Example, TextPart, spread

log = logging.getLogger(__name__)

LONGEST = 40  # tokens of a statement, as runs read them by default
MOST_MEASURED = 20_000  # examples whose statements are tokenized to count cut ones; all of VCR takes minutes


class StudentError(ValueError):
    """A student cannot be loaded or used; the message names the student, the reason and the remedy."""


def check_tokenizer(folder: Path | str, required: bool = False) -> str:
    """Refuses a model folder whose tokenizer is not the one that its weights were trained with.

    Such a model looks perfect in training and is at chance in a run. The makers of mini models write the
    digest of their tokenizer to ``provenance.json``. Models from elsewhere have no such file; they are
    refused only if a digest is ``required``. Returns the digest in that file, "" if it has none.
    """
    path = Path(folder) / "provenance.json"
    provenance = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    expected = provenance.get("tokenizer", "")
    if not expected:
        if required:
            raise StudentError(
                f"{folder}: does not say with which tokenizer it was trained (made by "
                f"{provenance.get('made_by', 'nobody who says so')}); make it anew with python -m tdlib.make"
            )
        return ""
    digest = tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(str(folder)))
    if digest != expected:
        raise StudentError(
            f"{folder}: its tokenizer ({digest[:12]}) is not the one that its weights were trained with "
            f"({expected[:12]}): it would read other words; put that one back, or make the model anew"
        )
    return expected


@dataclass
class StudentOutput(ModelOutput):
    """Output of any student for (batch, choices) statements; tokens run over text, then picture.

    ``logits`` (batch, choices), or (batch, labels) of one statement. ``hidden_states``: per layer, the
    embeddings first, each (batch, choices, tokens, student_dim). ``attention_mask`` (batch, choices,
    tokens), 1 on real tokens.
    ``spans`` (batch, choices, tokens, 2) and ``boxes`` (batch, choices, tokens, 4): see ``method.tokens``.
    """

    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_mask: Tensor | None = None
    spans: Tensor | None = None
    boxes: Tensor | None = None


def sequence_mask(attention_mask: Tensor, visual_mask: Tensor) -> Tensor:
    """(batch, choices, text_tokens + visual) of masks (batch, choices, text_tokens) and (batch, visual)."""
    visual = visual_mask[:, None].expand(-1, attention_mask.shape[1], -1)
    return torch.cat([attention_mask, visual.to(attention_mask)], dim=-1)


def placed_output(
    logits: Tensor, states: Sequence[Tensor], attention_mask: Tensor, visual_mask: Tensor,
    spans: Tensor | None, visual_boxes: Tensor,
) -> StudentOutput:  # fmt: skip
    """Builds a student's output, with the place of every token.

    ``states`` (batch * choices, tokens or more, width): tokens without a place (VL-BERT's [END]) come after
    the others and are dropped. Masks are as in ``sequence_mask``; ``spans`` are those of text tokens, 0 if
    None; ``visual_boxes`` (batch, visual, 4).
    """
    mask = sequence_mask(attention_mask, visual_mask)
    batch, choices, tokens = mask.shape
    length, visual = attention_mask.shape[2], visual_mask.shape[1]
    if spans is None:
        spans = attention_mask.new_zeros(batch, choices, length, 2)
    boxes = visual_boxes[:, None].expand(-1, choices, -1, -1)
    return StudentOutput(
        logits=logits,
        hidden_states=tuple(state[:, :tokens].unflatten(0, (batch, choices)) for state in states),
        attention_mask=mask,
        spans=torch.cat([spans, spans.new_zeros(batch, choices, visual, 2)], dim=2),
        boxes=torch.cat([boxes.new_zeros(batch, choices, length, 4), boxes], dim=2),
    )


@dataclass(frozen=True)
class EncodedText:
    """The text side of one example, one row per choice: ids and character spans of the statement.

    ``objects`` are the objects of the picture that tokens refer to (the first where a token refers
    to several), -1 where they refer to none.
    """

    input_ids: Tensor  # (choices, text_tokens)
    attention_mask: Tensor
    token_type_ids: Tensor
    spans: Tensor  # (choices, text_tokens, 2)
    objects: Tensor  # (choices, text_tokens)


Row = tuple[Sequence[int], Sequence[int], Sequence[tuple[int, int]]]  # of one statement: ids, types, spans


def encoded_text(rows: Sequence[Row], padding: int, statements: Sequence[TextPart]) -> EncodedText:
    """Pads the rows of an example's statements to the longest; ``padding`` is the id that pads."""
    length = max(len(ids) for ids, _, _ in rows)

    def padded(values: Iterable[Sequence[Any]], value: Any) -> Tensor:
        rectangle = [[*row, *[value] * (length - len(row))] for row in values]
        # Through numpy this takes a third of torch.tensor's time, and it runs at every step of a training
        # whose texts do not fit into memory.
        return torch.from_numpy(np.array(rectangle, dtype=np.int64))

    ids, types, spans = zip(*rows, strict=True)
    return EncodedText(
        padded(ids, padding),
        padded([[1] * len(row) for row in ids], 0),
        padded(types, 0),
        padded(spans, (0, 0)),
        padded(map(_referred_objects, statements, spans), -1),
    )


def _referred_objects(statement: TextPart, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the first object that each token refers to, -1 for none; a later reference overrides."""
    objects = [-1] * len(spans)
    for reference in statement.references:
        if reference.objects:
            for place, (start, end) in enumerate(spans):
                if start < reference.end and end > reference.start:
                    objects[place] = reference.objects[0]
    return objects


def student_inputs(student: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects what a student's ``forward`` reads from a batch."""
    return {name: batch[name] for name in student.inputs}


class StudentEncoder(ABC):
    """Turns examples into one kind of student's inputs, with the place of every token.

    Args:
        name: folder or hub id of the student, or of a run's saved one.
        max_text_tokens: longer statements are cut.

    Raises:
        StudentError: the tokenizer or the configuration cannot be loaded.
    """

    kind: ClassVar[str]  # what messages call the student
    needs_every_word: ClassVar[bool] = False  # no padded vocabulary: its tokenizer has as many as the model

    def __init__(self, name: str, max_text_tokens: int = LONGEST):
        self.name = resolve(name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
            self.config = AutoConfig.from_pretrained(self.name)
            self.load_processor()
        except Exception as error:  # transformers lets through what json and tokenizers raise
            raise StudentError(
                f"student {name!r}: tokenizer or image processor cannot be loaded ({error}); expected a "
                f"folder or hub id of a {self.kind}"
            ) from error
        check_tokenizer(self.name)
        # transformers does not fail if a folder has no tokenizer: it makes one that knows no words.
        known, words = len(self.tokenizer), self.config.vocab_size
        fits = known == words if self.needs_every_word else known <= words
        if not fits or known <= len(self.tokenizer.all_special_ids):
            raise StudentError(
                f"student {name!r} has {words} words, but its tokenizer {known}; "
                "save the tokenizer of its pretraining beside it (bert-base-uncased for most authors')"
            )
        if max_text_tokens > self.config.max_position_embeddings:
            raise StudentError(
                f"student {name!r} reads at most {self.config.max_position_embeddings} text tokens, but "
                f"max_text_tokens={max_text_tokens}"
            )
        self.max_text_tokens = max_text_tokens

    def load_processor(self) -> None:  # noqa: B027 (not every student has one)
        """Loads whatever else the encoder needs from ``self.name``, such as an image processor."""

    def prepare(self, examples: Sequence[Example]) -> None:  # noqa: B027 (most students need nothing)
        """Computes and stores what encoding these examples will read, such as region features."""

    @abstractmethod
    def text(self, example: Example) -> EncodedText:
        """Encodes the statements (prompt with each choice, or the prompt alone) of one example."""

    @abstractmethod
    def lengths(self, example: Example) -> list[int]:
        """Counts the tokens of each statement of one example before it is cut, with special ones."""

    @abstractmethod
    def visual(self, example: Example) -> dict[str, Tensor]:
        """Reads the picture of one example, as tensors that ``pad_visual`` puts into a batch."""

    @abstractmethod
    def visual_boxes(self, visual: dict[str, Tensor]) -> Tensor:
        """Returns the boxes (visual_tokens, 4) of visual tokens; one without area has no place."""

    @abstractmethod
    def pad_visual(self, visuals: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pads the pictures of a batch to one size, under the names of the student's ``forward``."""

    def blank(self, visual: dict[str, Tensor]) -> dict[str, Tensor]:
        """Removes what the picture shows (a control: how much can be answered without seeing it?)."""
        return {name: torch.zeros_like(value) for name, value in visual.items()}

    def save(self, folder: Path | str) -> None:
        """Writes the files that loading needs beside the student's weights."""
        self.tokenizer.save_pretrained(folder)


def report_cut(encoder: StudentEncoder, examples: Sequence[Example], split: str) -> int:
    """Counts the statements of a split that the student reads cut short; warns in the log if there are any.

    Of a split with more than ``MOST_MEASURED`` examples so many are measured, and the number is estimated.
    """
    measured = spread(len(examples), MOST_MEASURED)
    lengths = [n for index in measured for n in encoder.lengths(examples[index])]
    cut = sum(length > encoder.max_text_tokens for length in lengths)
    if cut:
        log.warning(
            "%d of %d statements (%d examples) of split %s are longer than max_text_tokens=%d and lose "
            "their end (the longest has %d tokens)",
            cut, len(lengths), len(measured), split, encoder.max_text_tokens, max(lengths),
        )  # fmt: skip
    return round(cut * len(examples) / len(measured)) if cut else 0


def load_checkpoint(
    kind: Any, name: str, seed: int, labels: Sequence[str] = (), bias: float | None = None
) -> Any:
    """Loads a student in float32; parameters of its head that are not stored are drawn from ``seed``.

    Args:
        kind: the student's class, a ``PreTrainedModel``; a checkpoint need not hold its ``may_lack``.
        name: folder or hub id.
        seed: of new parameters.
        labels: names of the classes, where the head is a classifier. A stored classifier is fitted to
            them by name, see ``fit_classifier``.
        bias: what the biases of a classifier's last layer start from if that layer is drawn; a trained one
            keeps its own.

    Raises:
        StudentError: the checkpoint is missing, of another architecture or of another shape.
    """
    name = resolve(name)
    # Without a config.json transformers would silently take its full-size defaults.
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise StudentError(
            f"student {name!r} has no config.json; expected a folder that save_pretrained wrote"
        )
    what = kind.__name__.partition("For")[0]
    model, report, stored = _from_pretrained(kind, name, seed, labels, what)
    missing = [key for key in report["missing_keys"] if not key.startswith(kind.may_lack)]
    mismatched = [str(key) for key in report["mismatched_keys"]]
    # A stored head for other labels is replaced, not an error.
    wrong = [key for key in mismatched if not (labels and "classifier." in key)]
    if missing or wrong:
        raise StudentError(
            f"student {name!r}: not a {what} checkpoint of its own config's shape "
            f"(missing {sorted(missing)[:3]}, mismatched {sorted(wrong)[:3]})"
        )
    kept = _named(model.config.id2label)
    if kept and not labels:
        log.warning(
            "student %s: its trained head for %d labels (%s, ...) is not read, one for choices is drawn; "
            "give labels=... to keep it", name, len(kept), kept[0],
        )  # fmt: skip
    if labels:
        last = f"classifier.{len(model.classifier) - 1}.weight"
        drawn = last in report["missing_keys"]
        if any(last in key for key in mismatched):
            drawn = True
            log.log(  # a head that scored choices has no named outputs, so nobody expects it to be kept
                logging.WARNING if _named(stored) else logging.INFO,
                "student %s: its head has another number of outputs than the %d labels, so its last layer is "
                "drawn anew", name, len(labels),
            )  # fmt: skip
        if (drawn or not fit_classifier(model, stored, labels, seed, name)) and bias is not None:
            nn.init.constant_(model.classifier[-1].bias, bias)
    return model


def _named(outputs: Mapping[int, str]) -> list[str]:
    """The names of a head's outputs that somebody gave it, not transformers."""
    return [str(name) for name in outputs.values() if not str(name).startswith("LABEL_")]


def named_outputs(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the options of a configuration that name a classifier's outputs; none without labels."""
    if not labels:
        return {}
    numbers = {label: index for index, label in enumerate(labels)}
    return {"id2label": dict(enumerate(labels)), "label2id": numbers}


def _from_pretrained(
    kind: Any, name: str, seed: int, labels: Sequence[str], what: str
) -> tuple[Any, dict[str, Any], Mapping[int, str]]:
    """Returns the model, transformers' report on its parameters, and the stored names of its outputs."""
    verbosity = transformers.utils.logging.get_verbosity()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.utils.logging.set_verbosity_error()  # the caller checks what is missing
        try:
            stored = kind.config_class.from_pretrained(name).id2label if labels else {}
            model, report = kind.from_pretrained(
                name,
                output_loading_info=True,
                dtype=torch.float32,  # whatever it is stored in: it will be trained
                ignore_mismatched_sizes=bool(labels),
                **named_outputs(labels),
            )
        except Exception as error:  # transformers lets through what json, torch and safetensors raise
            raise StudentError(
                f"student {name!r} cannot be loaded: {why_unreadable(error)}. Expected a folder or hub id of "
                f"a {what}"
            ) from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
    return model, report, stored


def fit_classifier(
    model: Any, stored: Mapping[int, str], labels: Sequence[str], seed: int, where: str
) -> bool:
    """Gives every label the output that was trained for it; a change of the order is logged.

    An output belongs to the label of its name, whatever its number: two runs, or an official checkpoint,
    may list the same labels in another order. If the names differ (capitals aside), nobody knows what
    the outputs mean, so the last layer is drawn from ``seed``. Returns whether the trained layer is kept.
    """
    names = [str(stored.get(index)) for index in range(len(labels))]
    if names == list(labels):
        return True
    last = model.classifier[-1]
    rows = {name.casefold(): row for row, name in enumerate(names)}
    if rows.keys() == {label.casefold() for label in labels} and len(rows) == len(labels):
        order = [rows[label.casefold()] for label in labels]
        if order != sorted(order):
            log.warning("student %s: its classifier's outputs are put in the order of the labels", where)
        with torch.no_grad():
            last.weight.copy_(last.weight[order])
            last.bias.copy_(last.bias[order])
        return True
    log.warning(
        "student %s: its classifier's outputs are called %s, ..., the labels %s, ...: its last layer is "
        "drawn anew. To keep it, name its outputs as the labels in id2label of its config.json",
        where, ", ".join(names[:3]), ", ".join(labels[:3]),
    )  # fmt: skip
    model.classifier[-1] = nn.Linear(last.in_features, last.out_features)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model._init_weights(model.classifier[-1])
    return False


class FusedAttention:
    """Computes self-attention by torch's fused kernel; a mixin before a stock module that writes it out.

    No fused kernel keeps attention maps. A call that asks for them runs the stock module instead.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    num_attention_heads: int
    training: bool

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """``attention_mask`` is boolean, or added to the scores; (batch, 1, 1 or tokens, tokens)."""
        if output_attentions:
            return super().forward(hidden_states, attention_mask, output_attentions)  # type: ignore[misc]
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask == 0  # the kernels for GPUs want booleans
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
        return (mixed.transpose(1, 2).flatten(2),)


def fuse_attention(model: nn.Module, fused: type[FusedAttention]) -> None:
    """Turns self-attention modules of a stock class, the second base of ``fused``, into ``fused``.

    That class stands in a module: with one that is made here no student could be pickled.
    """
    _, stock = fused.__bases__
    for module in model.modules():
        if type(module) is stock:
            module.__class__ = fused  # type: ignore[assignment]


def drawn_linear(inputs: int, outputs: int) -> nn.Linear:
    """Creates a linear layer as BERT does: weights from N(0, 0.02), bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def pad_last(rows: list[Tensor], length: int, dim: int = 1, value: float = 0) -> Tensor:
    """Stacks tensors after padding axis ``dim`` of each to ``length``."""
    inner = [0, 0] * (rows[0].dim() - 1 - dim)  # F.pad counts axes from the last
    return torch.stack([F.pad(row, [*inner, 0, length - row.shape[dim]], value=value) for row in rows])
