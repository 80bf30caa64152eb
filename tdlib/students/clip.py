"""CLIP itself as a student: its two towers with a fusion head, finetuned (the arm ``clip_finetune``).

Any model that ``teacher`` loads; texts and pictures go in as they do there. It has no tokens to
distil into, as it is what the others are distilled from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tdlib.core.files import write_json
from tdlib.core.paths import resolve
from tdlib.data.examples import Example
from tdlib.data.pictures import open_picture
from tdlib.students.base import (
    LONGEST,
    EncodedText,
    Row,
    StudentEncoder,
    StudentError,
    StudentOutput,
    encoded_text,
    named_outputs,
)
from tdlib.teacher.families import text_tower
from tdlib.teacher.model import (
    Preprocess,
    Teacher,
    choice_logits,
    description,
    opened,
    patch_boxes,
    untrained,
)
from tdlib.teacher.text import TextTokenizer


class ClipFusionConfig(PreTrainedConfig):
    """Holds what rebuilds an open_clip model and its preprocessing, and sizes as all students name them.

    ``clip`` is the content of open_clip_config.json, ``grid`` rows and columns of patches, ``patch`` their
    height and width in pixels (where the tower cuts patches), ``hidden_size`` the width of the joint
    space (teacher_dim), ``max_position_embeddings`` the text context.
    """

    model_type = "clip-fusion"

    clip: dict[str, Any] | None = None
    grid: list[int] | None = None
    patch: list[int] | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 12  # of the text tower
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    pad_token_id: int = 0


AutoConfig.register(ClipFusionConfig.model_type, ClipFusionConfig)


def fusion_config(teacher: Teacher, labels: Sequence[str] = ()) -> ClipFusionConfig:
    """Makes the configuration of a student that copies this teacher; ``labels`` names its classes, if any."""
    blank = Image.new("RGB", (64, 64))
    height, width = teacher.preprocess(blank).shape[1:]
    patches = len(teacher.encode_pictures([blank])[0].positions)
    patch = teacher.image.patch
    tokenizer = _Tokenizer(teacher.tokenize)
    return ClipFusionConfig(
        clip=json.loads(json.dumps(description(teacher))),  # with lists for tuples, as it is read
        grid=list(teacher.image.grid(height, width, patches)), patch=None if patch is None else list(patch),
        hidden_size=teacher.dim, num_hidden_layers=len(teacher.text.blocks),
        max_position_embeddings=teacher.tokenize.tokenizer.context_length, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, **named_outputs(labels),
    )  # fmt: skip


def fused(image: Tensor, text: Tensor) -> Tensor:
    """``[i, t, i * t, |i - t|]`` of global embeddings (the features of Conneau et al. 2017, 1705.02364).

    ``image`` (batch, teacher_dim), ``text`` (batch, choices, teacher_dim), both of unit length; returns
    (batch, choices, 4 * teacher_dim).
    """
    image = image.unsqueeze(1).expand_as(text)
    return torch.cat([image, text, image * text, (image - text).abs()], dim=-1)


class ClipFusionForMultipleChoice(PreTrainedModel):
    """CLIP that scores each statement about a picture: its scaled cosine plus the head's correction.

    The head's last layer starts at zero, so that an untrained student is the zero-shot teacher.
    """

    config_class = ClipFusionConfig
    inputs = ("input_ids", "pixel_values")
    may_lack = ("classifier.",)
    starts_at_zero: ClassVar[bool] = True

    def __init__(self, config: ClipFusionConfig):
        super().__init__(config)
        self.clip: Any = _store_buffers(untrained(config.clip or {}))
        width = config.hidden_size
        self.classifier = nn.Sequential(
            nn.Linear(4 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(),
            nn.Linear(2 * width, self.outputs(config)),
        )  # fmt: skip
        self.post_init()

    @staticmethod
    def outputs(config: ClipFusionConfig) -> int:
        """Scores per statement."""
        return 1

    def _init_weights(self, module: nn.Module) -> None:
        """Draws the head as torch does; the towers come with weights."""
        if isinstance(module, nn.Linear | nn.LayerNorm) and module in list(self.classifier):
            module.reset_parameters()
            if self.starts_at_zero and module is self.classifier[-1]:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> Self:
        """Leaves batch norms (ResNets) in evaluation mode: CLIP's statistics beat those of a small batch."""
        super().train(mode)
        for module in self.clip.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, output_hidden_states: bool = False
    ) -> StudentOutput:
        """Scores statements.

        Args:
            input_ids: (batch, choices, text_tokens), padding at the end; a text's end token tells
                CLIP where it ends.
            pixel_values: (batch, 3, height, width), once per example.
            output_hidden_states: not possible.

        Raises:
            StudentError: hidden states are requested, or texts are longer than CLIP's context.
        """
        if output_hidden_states:
            raise StudentError(
                "a CLIP with a fusion head gives no hidden states: there is nothing to distil CLIP into; set "
                "distill_weight=0, truth_weight=0 and extra_weight=0"
            )
        image = self.clip.encode_image(pixel_values, normalize=True)
        return StudentOutput(logits=self.score(image, self.encode_texts(input_ids)))

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """Global embeddings of statements, (batch, choices, teacher_dim), of unit length."""
        length, context = input_ids.shape[-1], self.config.max_position_embeddings
        if length > context:
            raise StudentError(f"texts of {length} tokens are longer than CLIP's context of {context}")
        tower = text_tower(self.clip, self.config.model_type)
        if not tower.cut:  # this tower reads its padding too, so it needs the full context
            input_ids = F.pad(input_ids, (0, context - length), value=self.config.pad_token_id)
        return F.normalize(tower.run(input_ids.flatten(0, 1))[0], dim=-1).unflatten(0, input_ids.shape[:2])

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits (batch, choices) of global embeddings as ``fused`` takes them."""
        zero_shot = self.clip.logit_scale.exp() * choice_logits(image, text, 1.0)
        return zero_shot + self.classifier(fused(image, text)).squeeze(-1)


class ClipFusionForClassification(ClipFusionForMultipleChoice):
    """CLIP that gives one statement about a picture a label, by the fusion head alone."""

    starts_at_zero = False

    @staticmethod
    def outputs(config: ClipFusionConfig) -> int:
        return len(config.id2label or {})

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits (batch, labels) of global embeddings as ``fused`` takes them, one text each."""
        return self.classifier(fused(image, text)).flatten(1)


def _store_buffers(model: nn.Module) -> nn.Module:
    """Puts every buffer into checkpoints: transformers leaves one that is not there uninitialised."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer)
    return model


def open_teacher_as_student(
    name: str, pretrained: str = "", seed: int = 0, labels: Sequence[str] = (), bias: float | None = None
) -> ClipFusionForMultipleChoice:
    """Makes a student that is a trainable copy of a teacher, in float32, with a head drawn from ``seed``.

    ``bias`` is what the biases of a classifier's last layer start from; if None, they are drawn too.
    """
    teacher = Teacher(name, pretrained, device="cpu")
    kind = ClipFusionForClassification if labels else ClipFusionForMultipleChoice
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = kind(fusion_config(teacher, labels))
    student.clip.load_state_dict(_store_buffers(teacher.model).state_dict())
    if labels and bias is not None:
        nn.init.constant_(student.classifier[-1].bias, bias)  # type: ignore[arg-type]
    return student.eval()


class _Tokenizer:
    """Gives a teacher's tokenizer the few attributes that the project uses of a student's."""

    def __init__(self, tokenize: TextTokenizer):
        self.pad_token_id = tokenize.padding
        tokenizer = tokenize.tokenizer
        self.size = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size

    def __len__(self) -> int:
        return self.size

    def add_tokens(self, tokens: Sequence[str]) -> NoReturn:
        raise StudentError(
            f"CLIP's vocabulary takes no new tokens such as {tokens[0]!r}; set references='names'"
        )


class ClipFusionEncoder(StudentEncoder):
    """Turns examples into CLIP's inputs, with the characters of every token and the boxes of patches.

    ``source`` is the folder of a saved student, or the teacher that the student is a copy of. Longer
    statements than ``max_text_tokens`` are cut, keeping the end token; CLIP's context cuts anyway.
    """

    kind = "CLIP with a fusion head"
    config: Any
    tokenizer: Any

    def __init__(self, source: str | Teacher, max_text_tokens: int = LONGEST):
        if isinstance(source, Teacher):
            self.name, self.config = source.name, fusion_config(source)
            self.preprocess, self.tokenize = source.preprocess, source.tokenize
        else:
            self.name = resolve(source)
            self.config, self.preprocess, self.tokenize = self._read()
        self.tokenizer = _Tokenizer(self.tokenize)
        self.max_text_tokens = min(max_text_tokens, self.config.max_position_embeddings)

    def _read(self) -> tuple[ClipFusionConfig, Preprocess, TextTokenizer]:
        try:
            config = AutoConfig.from_pretrained(self.name)
            if not isinstance(config, ClipFusionConfig):
                raise TypeError(f"it is a {config.model_type}")
            return config, *opened(config.clip or {}, self.name)
        except Exception as error:  # transformers and open_clip let through what json and tokenizers raise
            raise StudentError(
                f"student {self.name!r}: tokenizer or preprocessing cannot be loaded ({error}); expected a "
                f"folder of a {self.kind}"
            ) from error

    def text(self, example: Example) -> EncodedText:
        statements = example.statements()
        rows: list[Row] = []
        for statement in statements:
            ids, spans = self.tokenize(statement.text)
            if len(ids) > self.max_text_tokens:  # its end token stays the last one
                keep = self.max_text_tokens - 1
                ids, spans = [*ids[:keep], ids[-1]], [*spans[:keep], spans[-1]]
            rows.append((ids, [0] * len(ids), spans))
        return encoded_text(rows, self.tokenizer.pad_token_id, statements)

    def lengths(self, example: Example) -> list[int]:
        texts = [self.tokenize.read(statement.text) for statement in example.statements()]
        return [len(text.ids) + text.cut for text in texts]

    def visual(self, example: Example) -> dict[str, Tensor]:
        """``pixels`` (3, height, width) and ``boxes`` (patches, 4) of one example's picture."""
        picture = open_picture(example.image)
        pixels = self.preprocess(picture)
        height, width = pixels.shape[1:]
        mode = self.config.clip["preprocess_cfg"]["resize_mode"]
        boxes = patch_boxes(picture.size, (height, width), self.config.grid, mode, self.config.patch)
        return {"pixels": pixels, "boxes": boxes}

    def visual_boxes(self, visual: dict[str, Tensor]) -> Tensor:
        return visual["boxes"]

    def pad_visual(self, visuals: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``pixel_values`` (batch, 3, height, width); preprocessing has given all pictures one size."""
        return {"pixel_values": torch.stack([visual["pixels"] for visual in visuals])}

    def blank(self, visual: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**visual, "pixels": torch.zeros_like(visual["pixels"])}

    def save(self, folder: Path | str) -> None:
        """Writes open_clip's configuration of model and preprocessing, and the tokenizer's files."""
        write_json(Path(folder) / "open_clip_config.json", self.config.clip)
        tokenizer = self.tokenize.tokenizer
        if hasattr(
            tokenizer, "save_pretrained"
        ):  # SimpleTokenizer has no files here: open_clip contains them
            tokenizer.save_pretrained(folder)
