"""VL-BERT (Su et al. 2020, arXiv 1908.08530) as a student: every token has a word and something seen.

Parameters carry the names of the authors' code (jackroos/VL-BERT), so that their checkpoints fit key
for key; ``convert_vlbert`` turns one into a folder. The authors move regions up to the end of each
text before the encoder; here padding is masked instead, which gives the same result, as all regions
share the position after the text. Features come precomputed, as in the authors' VQA: there is no
detector inside, and no loss on it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import (
    BertEncoder,
    BertPooler,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)

from tdlib.core.files import write_folder
from tdlib.core.paths import resolve
from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import read_header
from tdlib.regions.computed import Regions, RegionSource
from tdlib.students.base import (
    EncodedText,
    StudentError,
    StudentOutput,
    drawn_linear,
    load_checkpoint,
    mismatches,
    read_checkpoint,
)
from tdlib.students.region_student import RegionEncoder, region_output, sequence_mask

REGION_TYPE = 2  # the token type of regions and of [END]
FREQUENCIES = 256
GEOMETRY = 4 * 2 * FREQUENCIES  # sine and cosine of each of four numbers


class VlBertConfig(BertConfig):
    """BERT's sizes, and ``visual_embedding_dim``, the width of region features."""

    model_type = "vl-bert"

    type_vocab_size: int = 3
    visual_embedding_dim: int = 2048


AutoConfig.register(VlBertConfig.model_type, VlBertConfig)


def geometry(boxes: Tensor) -> Tensor:
    """Sines and cosines of places and sizes: (..., 2048) of normalised xyxy ``boxes`` (..., 4).

    Each number p of 100 * (centre x, centre y, width, height) becomes sin(p / 1000^(i / 256)), i = 0 ... 255,
    and then the cosines (section 3.2, and the authors' ``coordinate_embeddings``).
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    places = 100 * torch.cat([(low + high) / 2, high - low], dim=-1)
    steps = torch.arange(FREQUENCIES, dtype=boxes.dtype, device=boxes.device) / FREQUENCIES
    angles = places[..., None] / 1000**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def referents(objects: Tensor, region_objects: Tensor) -> Tensor:
    """Which regions each token refers to: (batch, choices, text_tokens, regions), boolean.

    ``objects`` (batch, choices, text_tokens) and ``region_objects`` (batch, regions) are indices of
    an example's objects, -1 for none.
    """
    return (objects[..., None] == region_objects[:, None, None]) & (objects[..., None] >= 0)


def answer_slot(state: Tensor, attention_mask: Tensor) -> Tensor:
    """The text token before the last, [MASK] in a ``BertPairEncoder``'s question: (batch * choices, width).

    ``state`` (batch * choices, tokens, width), ``attention_mask`` (batch, choices, text_tokens) with
    padding at the end.
    """
    slots = attention_mask.flatten(0, 1).sum(-1) - 2
    return state[torch.arange(len(state), device=state.device), slots]


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

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, seen: Tensor,
        region_word: Tensor, which: Tensor,
    ) -> Tensor:  # fmt: skip
        """Embeddings (batch, choices, text_tokens + regions + 1, width); arguments as in ``forward``."""
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
        return self.embedding_dropout(self.embedding_LayerNorm(torch.cat([text, regions, end], dim=2)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        seen: Tensor,
        region_word: Tensor,
        region_mask: Tensor,
        which: Tensor,
    ) -> tuple[Tensor, ...]:
        """Hidden states (batch * choices, text_tokens + regions + 1, width), embeddings first; [END] is last.

        Args:
            input_ids: (batch, choices, text_tokens); likewise attention_mask and token_type_ids.
            seen: (batch, regions, width) of ``RegionFeatures``.
            region_word: (1, width), the word of every region.
            region_mask: (batch, regions), 1 on real regions.
            which: (batch, choices, text_tokens), the region that each text token shows.
        """
        embeddings = self.embed(input_ids, attention_mask, token_type_ids, seen, region_word, which)
        tokens = nn.functional.pad(sequence_mask(attention_mask, region_mask), (0, 1), value=1)
        states = [embeddings.flatten(0, 1)]
        mask = create_bidirectional_mask(self.config, states[0], tokens.flatten(0, 1))
        for layer in self.encoder.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)


class VlBertForMultipleChoice(BertPreTrainedModel):
    """VL-BERT that scores each statement about a picture; a softmax over the choices decides.

    The head is the authors' for VCR: one linear layer on the pooled [CLS]. They train it with the
    sigmoid of each choice. Region 0 is the whole picture (``VlBertEncoder`` sees to it): every text
    token that refers to no region shows it. [END] is read by the other tokens, but is not in the output.
    """

    config_class = VlBertConfig
    base_model_prefix = "vlbert"
    inputs = (
        "input_ids", "attention_mask", "token_type_ids", "region_features", "region_boxes", "region_mask",
        "region_objects", "objects", "spans",
    )  # fmt: skip
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

    @staticmethod
    def make_classifier(config: VlBertConfig) -> nn.Module:
        return nn.Sequential(nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.hidden_size, 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.vlbert.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.vlbert.word_embeddings = value

    def renew_visual(self, dim: int) -> None:
        """Draws the projection of geometry and features anew, for features of width ``dim``."""
        down = self.image_feature_extractor.obj_downsample
        down[1] = drawn_linear(GEOMETRY + dim, self.config.hidden_size)
        self.config.visual_embedding_dim = dim

    def summary(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads of the last ``state``: (batch * choices, width)."""
        assert self.vlbert.pooler is not None
        return self.vlbert.pooler(state)

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
            region_features: (batch, regions, visual_embedding_dim), once per example, the whole
                picture first.
            region_boxes: (batch, regions, 4), xyxy normalised to the picture.
            region_mask: (batch, regions), 1 on real regions.
            region_objects: (batch, regions), index of the object that a region is, or -1.
            objects: (batch, choices, text_tokens), index of the object that a token refers to, or -1.
            spans: (batch, choices, text_tokens, 2) characters of each token, handed on in the output.
            output_hidden_states: whether to return hidden states, spans and boxes.
        """
        seen = self.image_feature_extractor(region_features, region_boxes)
        which = referents(objects, region_objects).long().argmax(-1)  # 0, the whole picture, for none
        word = self.object_linguistic_embeddings.weight
        states = self.vlbert(input_ids, attention_mask, token_type_ids, seen, word, region_mask, which)
        logits = self.classifier(self.summary(states[-1], attention_mask)).view(len(input_ids), -1)
        if not output_hidden_states:
            return StudentOutput(logits=logits)
        return region_output(logits, states, attention_mask, region_mask, region_boxes, spans)


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

    def summary(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return answer_slot(state, attention_mask)


class BertPairEncoder(RegionEncoder):
    """[CLS] prompt [SEP] choice [SEP], with types 0 and 1; without choices [CLS] prompt [SEP] [MASK] [SEP].

    A given answer (VCR's QA->R) follows its question without a separator. The head of a classifier
    reads [MASK], which has no characters. So do the authors of VL-BERT and of VisualBERT.

    Raises:
        StudentError: the student is of another architecture; its tokenizer is not that of its
            vocabulary; region features are not of its width.
    """

    def __init__(self, name: str, max_text_tokens: int, regions: RegionSource):
        super().__init__(name, max_text_tokens, regions)
        config = self.config
        # Where a folder has no tokenizer, transformers makes one that knows no words.
        if len(self.tokenizer) != config.vocab_size:
            raise StudentError(
                f"student {name!r} has {config.vocab_size} words, but its tokenizer {len(self.tokenizer)}; "
                "save the tokenizer of its pretraining beside it (bert-base-uncased for the authors')"
            )

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


class VlBertEncoder(BertPairEncoder):
    """Turns examples into VL-BERT's inputs: the whole picture first, boxes within the pixels of the picture.

    Raises:
        StudentError: see ``BertPairEncoder``; or ``max_text_tokens`` leaves no positions for regions.
    """

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
        size = regions.size or picture_size(example.image)
        return regions if size is None else replace(regions, boxes=within_pixels(regions.boxes, size))

    def blank(self, visual: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole picture without content."""
        return {
            "region_features": torch.zeros_like(visual["region_features"][:1]),
            "region_boxes": visual["region_boxes"][:1],
            "region_objects": visual["region_objects"][:1],
        }


def whole_picture_first(regions: Regions) -> Regions:
    """The same regions with the whole picture as region 0, where texts without an object look.

    The first region that is no object and covers the picture (to 1 % of its sides) is moved there.
    Where there is none, the mean of all features is put there, as the authors do for precomputed ones.
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
    """Normalised xyxy ``boxes`` (..., 4) cut where the authors cut theirs: at (0, 0, width - 1, height - 1).

    They count pixels from 0 to width - 1, so that in their code the whole picture ends at 1 - 1 / width
    and 1 - 1 / height. ``size`` is width and height in pixels.
    """
    return boxes.clamp(min=0).minimum(1 - 1 / boxes.new_tensor([*size, *size]))


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture in pixels, upright; None where there is no such file.

    Features that came with a data set can be used without its pictures.
    """
    try:
        return read_header(path).upright
    except DataError:
        return None


def load_vlbert(name: str, seed: int = 0, labels: Sequence[str] = ()) -> VlBertForMultipleChoice:
    """A VL-BERT with a multiple-choice head, or one for ``labels``; see ``load_checkpoint``."""
    return load_checkpoint(VlBertForClassification if labels else VlBertForMultipleChoice, name, seed, labels)


# The authors' checkpoints

# Beginnings of names that are left out: the detector, and what only pretraining or a task's head uses.
LEFT_OUT = (
    "image_feature_extractor.backbone.", "image_feature_extractor.roi_head_feature_extractor.",
    "image_feature_extractor.head.", "image_feature_extractor.regularizing_predictor.",
    "object_mask_visual_embedding.", "object_mask_word_embedding.", "aux_text_visual_embedding.",
    "vlbert.mlm_head.", "vlbert.mvrc_head.", "vlbert.relationsip_head.", "final_mlp.", "cnn_loss_reg.",
)  # fmt: skip
# The one head that finetuning reads: VQA's starts from it.
WORD_HEAD, CLASSIFIER = "vlbert.mlm_head.predictions.transform.", "classifier.0."


def convert_vlbert(
    checkpoint: Path | str, folder: Path | str, tokenizer: Path | str, vcr: bool = False
) -> list[str]:
    """Writes an official VL-BERT checkpoint as a folder that ``load_vlbert`` reads, in float32.

    The pretrained ones have no pooler, which is then drawn when they are loaded; the authors take
    BERT's. The transform of the word predictor is kept: the classifier starts from it.

    Args:
        checkpoint: such as ``vl-bert-base-prec.model``, or one that the authors' finetuning wrote.
        folder: where to write; must not exist or be empty.
        tokenizer: folder or hub id of the tokenizer that it was pretrained with (bert-base-uncased).
        vcr: whether token type 1, which pretraining on captions never meets, becomes a copy of type 0,
            as at the start of the authors' finetuning on VCR.

    Returns:
        The names in the checkpoint that were left out (its detector and its heads).

    Raises:
        StudentError: the checkpoint cannot be read, lacks a parameter, has an unknown one or one of
            unknown shape; the tokenizer is of another size; the folder is not empty.
    """
    check_empty(folder)
    config, weights, left_out = vlbert_weights(read_checkpoint(checkpoint, "state_dict"), str(checkpoint))
    words = fitting_tokenizer(tokenizer, config.vocab_size, str(checkpoint))
    if vcr:
        name = "vlbert.token_type_embeddings.weight"
        weights[name] = weights[name][[0, 0, 2]]

    def fill(partial: Path) -> None:
        config.save_pretrained(partial)
        words.save_pretrained(partial)
        tensors = {name: value.float().contiguous() for name, value in weights.items()}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})

    write_folder(Path(folder), fill)
    return left_out


def check_empty(folder: Path | str) -> None:
    """Refuses a folder to write to that has something in it, with a ``StudentError``."""
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise StudentError(f"{folder} is not empty; remove it or choose another folder to write to")


def fitting_tokenizer(name: Path | str, size: int, where: str) -> Any:
    """The tokenizer ``name`` for the checkpoint ``where`` of so many words.

    Raises:
        StudentError: it cannot be loaded, or is of another size.
    """
    try:
        words = AutoTokenizer.from_pretrained(resolve(str(name)))
    except Exception as error:  # transformers lets through what json and tokenizers raise
        raise StudentError(
            f"tokenizer {str(name)!r} cannot be loaded ({error}); expected a folder or hub id, such as "
            "bert-base-uncased"
        ) from error
    if len(words) != size:
        raise StudentError(
            f"tokenizer {str(name)!r} has {len(words)} tokens, but {where} has {size}; expected the "
            "tokenizer that it was pretrained with: bert-base-uncased (30,522) for the authors' checkpoints"
        )
    return words


def vlbert_weights(
    state: Mapping[str, Tensor], where: str
) -> tuple[VlBertConfig, dict[str, Tensor], list[str]]:
    """Configuration, parameters by our names, and the names left out of a VL-BERT's state dict.

    Our names are the authors', without ``module.`` of several GPUs and ``_module.`` of VCR. Sizes
    are those of the tensors; a head of attention is 64 wide, as in every BERT.

    Raises:
        StudentError: parameters are missing, unknown or of unknown shape; names them and ``where``.
    """
    weights, left_out = {}, []
    for name, value in state.items():
        new = name.removeprefix("module.").replace("vlbert._module.", "vlbert.")
        if new.startswith(WORD_HEAD):
            weights[CLASSIFIER + new.removeprefix(WORD_HEAD)] = value
        elif new.startswith(LEFT_OUT):
            left_out.append(name)
        else:
            weights[new] = value
    config = _config_of(weights, where)
    with torch.device("meta"):
        models = VlBertForMultipleChoice(config), VlBertForClassification(config)
    shapes = {name: value.shape for model in models for name, value in model.state_dict().items()}
    known = {name: shape for name, shape in shapes.items() if name in weights}
    may_lack = VlBertForMultipleChoice.may_lack
    problems = {
        "missing": {name for name in shapes if not name.startswith(may_lack)} - weights.keys(),
        "unknown": weights.keys() - shapes.keys(),
        "of unknown shape": {
            f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
            for name, shape in known.items()
            if weights[name].shape != shape
        },
    }
    if found := mismatches(problems):
        raise StudentError(
            f"checkpoint {where} is not a VL-BERT: parameters {found}; expected the parameters of the "
            "authors' base or large model, in a file such as vl-bert-base-prec.model"
        )
    return config, weights, sorted(left_out)


def _config_of(weights: Mapping[str, Tensor], where: str) -> VlBertConfig:
    names = {
        "words": "vlbert.word_embeddings.weight",
        "positions": "vlbert.position_embeddings.weight",
        "types": "vlbert.token_type_embeddings.weight",
        "regions": "image_feature_extractor.obj_downsample.1.weight",
        "intermediate": "vlbert.encoder.layer.0.intermediate.dense.weight",
    }
    bad = [
        f"{name} {tuple(weights[name].shape)}" if name in weights else name
        for name in names.values()
        if name not in weights or weights[name].ndim != 2 or 0 in weights[name].shape
    ]
    if bad:
        raise StudentError(f"checkpoint {where} is not a VL-BERT: missing, or no matrix: {', '.join(bad)}")
    shape = {what: weights[name].shape for what, name in names.items()}
    width, types, seen = shape["words"][1], shape["types"][0], shape["regions"][1] - GEOMETRY
    if width % 64 or types != 3 or seen < 1:
        raise StudentError(
            f"checkpoint {where}: hidden size {width}, {types} token types and {shape['regions'][1]} numbers "
            f"per region; expected a multiple of 64 (768 for base, 1024 for large), 3 types, and more than "
            f"{GEOMETRY} numbers (4,096 in the authors')"
        )
    layers = {found[1] for name in weights if (found := re.match(r"vlbert\.encoder\.layer\.(\d+)\.", name))}
    return VlBertConfig(
        vocab_size=shape["words"][0], hidden_size=width, num_hidden_layers=len(layers),
        num_attention_heads=width // 64, intermediate_size=shape["intermediate"][0],
        max_position_embeddings=shape["positions"][0], visual_embedding_dim=seen,
    )  # fmt: skip
