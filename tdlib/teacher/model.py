"""The frozen teacher: per-token features of any open_clip model, in its joint space.

This module loads a model, encodes texts and pictures, and places patches. ``text`` finds the characters of
text tokens, ``families`` takes the towers of each model family apart, ``cache`` stores features.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tdlib.core.devices import in_threads, usual_device
from tdlib.core.paths import resolve
from tdlib.core.store import fingerprint
from tdlib.method.registry import need_several
from tdlib.method.tokens import grid_cells
from tdlib.teacher.families import check_tower, image_tower, text_tower
from tdlib.teacher.text import TextTokenizer, open_tokenizer
from tdlib.teacher.towers import TeacherError

log = logging.getLogger(__name__)

# Raise it when this package computes other features or spans from the same model: it is part of the
# fingerprint, so caches with the old ones are left alone.
FEATURES = 2

# Batch sizes. A pair needs the graphs of both towers for its gradients, so fewer fit.
TEXTS_AT_ONCE, PICTURES_AT_ONCE, PAIRS_AT_ONCE = 256, 128, 8

Preprocess = Callable[[Image.Image], Tensor]  # a picture as pixels (3, height, width)


@dataclass(frozen=True)
class TeacherRecord:
    """The tokens of one text or one picture in the joint space, L2-normalised, without special tokens.

    ``positions`` are character spans (tokens, 2) of the raw string, or boxes (tokens, 4) normalised
    to the original picture. ``pooled`` is CLIP's global embedding. ``vv``, ``attention`` and ``rollout``
    (``EXTRAS``) are None unless they were requested; scalars are divided by the record's largest, so they lie
    in [0, 1]. ``cut`` counts the tokens of a text beyond the teacher's context: if it is not 0, the record
    describes a shortened text.
    """

    projected: Tensor  # (tokens, teacher_dim)
    value: Tensor  # (tokens, teacher_dim), last attention block replaced by its value path
    positions: Tensor
    pooled: Tensor  # (teacher_dim,)
    vv: Tensor | None = None  # (tokens, teacher_dim), value-value attention
    attention: Tensor | None = None  # (tokens,), the pooled position's attention in the last layer
    rollout: Tensor | None = None  # (tokens,), the same through all layers
    cut: int = 0


def patch_boxes(
    size: tuple[int, int],
    input_size: tuple[int, int],
    grid: tuple[int, int],
    resize_mode: str,
    patch: tuple[int, int] | None = None,
) -> Tensor:
    """Places the teacher's patches in the original picture, (rows * columns, 4) normalised xyxy.

    Args:
        size: width and height of the original picture, pixels.
        input_size: height and width of the model's input.
        grid: rows and columns of patches.
        resize_mode: open_clip's "shortest" (resize the shorter side, crop the centre), "squash"
            (stretch), or "longest" (resize the longer side, pad the centre).
        patch: height and width of a patch, pixels; None if the grid fills the input. (Patches of a fixed
            size may leave a margin out.)
    """
    input_height, input_width = input_size
    width, height = _resized(size, (input_width, input_height), resize_mode)
    left, top = _crop_start(width, input_width), _crop_start(height, input_height)
    rows, columns = grid
    step_y, step_x = patch or (input_height / rows, input_width / columns)
    box = grid_cells(rows, columns) * torch.tensor([step_x, step_y, step_x, step_y])
    offset = torch.tensor([left, top, left, top])
    return ((box + offset) / torch.tensor([width, height, width, height])).clamp(0, 1).float()


def _resized(size: tuple[int, int], input_size: tuple[int, int], resize_mode: str) -> tuple[int, int]:
    """Computes width and height after open_clip's resizing, before crop or padding, rounded as it rounds."""
    if resize_mode == "squash":
        return input_size
    (width, height), (input_width, input_height) = size, input_size
    if resize_mode == "shortest" and input_width == input_height:  # torchvision's Resize cuts fractions off
        return int(input_width * width / min(size)), int(input_height * height / min(size))
    pick = min if resize_mode == "shortest" else max
    ratio = pick(width / input_width, height / input_height)
    return round(width / ratio), round(height / ratio)


def _crop_start(resized: int, wanted: int) -> int:
    """Computes where a centre crop starts in the resized picture, pixels; negative if it pads."""
    return round((resized - wanted) / 2) if resized >= wanted else -((wanted - resized) // 2)


class Teacher:
    """A frozen open_clip model that yields per-token features.

    A checkpoint file does not say which activation its weights were trained with. OpenAI's (and all
    made from them, and those of MetaCLIP and DFN) need QuickGELU: name "ViT-B-16-quickgelu", not
    "ViT-B-16", with such a file. With a tag, the activation is set right here. Nor does a file say how
    pictures are prepared: that is taken from the architecture's tags, with a warning where they differ.

    Args:
        name: an open_clip model name ("ViT-B-16"), "local-dir:FOLDER" or "hf-hub:ORG/REPO".
        pretrained: an open_clip tag ("openai") or a checkpoint file; "" for folders and hubs.
        device: where it runs; "" for this process's GPU, or the processor where there is none.
        random_weights: a seed; the weights are then drawn as open_clip draws them before training. This
            is the control of an untrained teacher. Architecture, preprocessing and tokenizer stay.

    Raises:
        TeacherError: the model is unknown, its weights are missing or of another shape, or its
            towers give no per-token features.
    """

    def __init__(self, name: str, pretrained: str = "", device: str = "", random_weights: int | None = None):
        name, device = resolve(name, prefix="local-dir:"), device or usual_device()
        pretrained = resolve(pretrained)
        if pretrained and ":" in name:
            raise TeacherError(
                f"teacher {name!r} brings its own weights, pretrained={pretrained!r} would be ignored; leave "
                "teacher_pretrained empty or name an open_clip architecture"
            )
        options = _activation(name, pretrained) | _preprocessing(name, pretrained)
        if random_weights is not None:
            options |= {"load_weights": False, "pretrained_text": False}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0 if random_weights is None else random_weights)
                model, _, self.preprocess = open_clip.create_model_and_transforms(
                    name, pretrained=pretrained or None, device=device,
                    require_pretrained=random_weights is None, **options,
                )  # fmt: skip
        except Exception as error:  # open_clip lets through what json, torch and safetensors raise
            raise TeacherError(
                f"teacher {name!r} (pretrained={pretrained!r}) cannot be loaded: {error}. Expected an "
                "open_clip name with a tag or checkpoint file of the same shape, 'local-dir:FOLDER', or "
                f"'hf-hub:ORG/REPO'{_hint(error, name)}"
            ) from error
        if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa):
            raise TeacherError(f"teacher {name!r}: {type(model).__name__} is no CLIP, CustomTextCLIP or CoCa")
        self.name, self.device = name, torch.device(device)
        self.model = model.eval().requires_grad_(False)
        self.text, self.image = text_tower(model, repr(name)), image_tower(model.visual, repr(name))
        self.tokenize = open_tokenizer(name)
        check_tower(self.text, self.text_ids([self.tokenize("a red cup on a table")[0]]))
        check_tower(
            self.image, self.preprocess(Image.linear_gradient("L").convert("RGB"))[None].to(self.device)
        )
        self.fingerprint = self._fingerprint()

    @cached_property
    def dim(self) -> int:
        """Width of the joint space."""
        return len(self.encode_texts(["a"])[0].pooled)

    @cached_property
    def logit_scale(self) -> float:
        """The factor of cosines before the model's softmax (in SigLIP a sigmoid)."""
        return float(self.model.logit_scale.exp())

    def _fingerprint(self) -> str:
        """SHA-256 over weights, architecture, preprocessing, tokenizer, and library version."""
        heads = [m.num_heads for m in self.model.modules() if isinstance(getattr(m, "num_heads", None), int)]
        return fingerprint(
            self.model,
            without="text_decoder.",  # CoCa's; no feature depends on it
            heads=heads,
            towers=self._tower_settings(),
            preprocess=str(self.preprocess),
            tokenizer=self.tokenize.digest(),
            sample=self.tokenize("The quick brown fox, 1.5 dogs."),
            open_clip=open_clip.__version__,
            features=FEATURES,
        )

    def _tower_settings(self) -> list[dict[str, Any]]:
        """Lists settings that change features but no weights: kinds of pooling, masks, prefix tokens."""
        model, visual = self.model, self.model.visual
        text = getattr(model, "text", model)
        settings = [
            {
                key: value
                for key, value in sorted(vars(part).items())
                if isinstance(value, bool | int | str | tuple)
            }
            for part in (model, text, visual, getattr(visual, "trunk", visual))
        ]
        hugging_face = getattr(text, "config", None)
        return [
            *settings, {"causal": getattr(text, "attn_mask", None) is not None},
            {} if hugging_face is None else hugging_face.to_diff_dict(),
        ]  # fmt: skip

    def text_ids(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """Pads ids of texts for the text tower: to the longest one if padding changes nothing, else fully."""
        length = max(map(len, encoded)) if self.text.cut else self.tokenize.tokenizer.context_length
        ids = torch.full((len(encoded), length), self.tokenize.padding)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids.to(self.device)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], extras: Sequence[str] = ()) -> list[TeacherRecord]:
        """Computes per-token features of texts; ``extras`` names further signals (``EXTRAS``)."""
        need_several(texts, "texts")
        encoded = [self.tokenize.read(text) for text in texts]
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i].ids))
        records: dict[int, TeacherRecord] = {}
        for start in range(0, len(order), TEXTS_AT_ONCE):
            chosen = order[start : start + TEXTS_AT_ONCE]
            pooled, signals = _fetched(
                *self.text.encode(self.text_ids([encoded[i].ids for i in chosen]), extras)
            )
            for row, i in enumerate(chosen):
                spans = torch.tensor(encoded[i].spans)
                real = spans[:, 1] > spans[:, 0]
                of_text = {name: signal[row, : len(spans)][real] for name, signal in signals.items()}
                records[i] = _record(of_text, spans[real], pooled[row], encoded[i].cut)
        return [records[i] for i in range(len(texts))]

    @torch.inference_mode()
    def encode_pictures(
        self, pictures: Sequence[Image.Image], extras: Sequence[str] = ()
    ) -> list[TeacherRecord]:
        """Computes per-patch features of pictures; ``extras`` names further signals (``EXTRAS``)."""
        records = []
        mode = getattr(self.model.visual, "preprocess_cfg", {}).get("resize_mode", "shortest")
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            chosen = pictures[start : start + PICTURES_AT_ONCE]
            pixels = torch.stack(in_threads(self.preprocess, chosen)).to(self.device)
            pooled, signals = _fetched(*self.image.encode(pixels, extras))
            height, width = pixels.shape[-2:]
            grid = self.image.grid(height, width, signals["projected"].shape[1])
            for row, picture in enumerate(chosen):
                of_picture = {name: signal[row] for name, signal in signals.items()}
                boxes = patch_boxes(picture.size, (height, width), grid, mode, self.image.patch)
                records.append(_record(of_picture, boxes, pooled[row]))
        return records

    def check(self, relevance: str) -> None:
        """Raises TeacherError if a tower cannot give a signal of ``EXTRAS``, or "gradient"."""
        self.text.check(relevance)
        self.image.check(relevance)

    def pair_relevance(self, texts: Sequence[str], picture: Image.Image) -> list[tuple[Tensor, Tensor]]:
        """Measures how much each token contributes to the cosine of a text and a picture.

        As in Chefer et al. (2021, ICCV): the gradient of the cosine with respect to each attention map, times
        the map, positive part, mean over heads, accumulated through the layers. The pooled position's row is
        divided by its largest entry (our reading: so that all variants have one scale).

        Returns for each text (text_tokens,) and (patches,), in [0, 1], in the order of the records.
        """
        self.check("gradient")
        need_several(texts, "texts")
        encoded = [self.tokenize(text) for text in texts]
        pairs = []
        with torch.no_grad():
            pixels = self.preprocess(picture)[None].to(self.device)
            seen_picture = self.image.see(pixels, len(self.image.blocks))
        for start in range(0, len(texts), PAIRS_AT_ONCE):
            chosen = encoded[start : start + PAIRS_AT_ONCE]
            ids = self.text_ids([tokens for tokens, _ in chosen])
            with torch.no_grad():
                seen_text = self.text.see(ids, len(self.text.blocks))
            with torch.enable_grad():
                of_text = self.text.attend(seen_text)
                of_picture = self.image.attend(seen_picture.repeated(len(chosen)))
                # One sum for all gradients: a pair's tokens change no other pair's cosine.
                cosines = F.cosine_similarity(of_text.pooled, of_picture.pooled, dim=-1).sum()
                words = self.text.relevancy(of_text, cosines)
                patches = self.image.relevancy(of_picture, cosines)
            for row, (_, spans) in enumerate(chosen):
                real = torch.tensor([end > begin for begin, end in spans])
                of_words = words[row, : len(spans)].cpu()[real]
                pairs.append((_largest_is_one(of_words), _largest_is_one(patches[row].cpu())))
        return pairs


def _activation(name: str, pretrained: str) -> dict[str, Any]:
    """Chooses the options of open_clip's factory for the activation that the weights were trained with."""
    if not pretrained:
        return {}
    quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        if quick and not tag.get("quick_gelu", False):
            raise TeacherError(
                f"teacher {name!r}: the weights {pretrained!r} were trained without QuickGELU; name the "
                f"architecture {name.removesuffix('-quickgelu')!r}"
            )
        return {"force_quick_gelu": True} if tag.get("quick_gelu", False) else {}
    if not quick and f"{name}-quickgelu" in open_clip.list_models():
        log.warning(
            "%s does not say which activation it was trained with; weights of OpenAI, MetaCLIP or DFN need "
            "the name %s-quickgelu, not %s", pretrained, name, name,
        )  # fmt: skip
    return {}


def _preprocessing(name: str, pretrained: str) -> dict[str, Any]:
    """Chooses how pictures are prepared for a checkpoint file, which does not say it itself.

    As for the tags of this architecture; where these differ, open_clip's default with a warning.
    """
    if not pretrained or open_clip.get_pretrained_cfg(name, pretrained):
        return {}
    usual, ways = PreprocessCfg(), list[dict[str, Any]]()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        told = open_clip.get_pretrained_cfg(name, tag)
        keys = ("mean", "std", "interpolation", "resize_mode")
        way = {f"image_{key}": told.get(key) or getattr(usual, key) for key in keys}
        if way not in ways:
            ways.append(way)
    if len(ways) > 1:
        log.warning(
            "%s does not say how pictures were prepared for it, and the published weights of %s differ in "
            "that; taken to be as for OpenAI's. A folder with an open_clip_config.json (local-dir:) says it",
            pretrained, name,
        )  # fmt: skip
    return ways[0] if len(ways) == 1 else {}


def _hint(error: Exception, name: str) -> str:
    if (folder := Path(name.removeprefix("local-dir:"))).joinpath("config.json").is_file():
        return (
            f". {folder} holds a model of transformers; a CLIPModel becomes a teacher by python -m "
            "tdlib.teacher.convert FOLDER NEW_FOLDER"
        )
    if "TorchScript" not in str(error):
        return ""
    return (
        ". OpenAI's .pt archives are TorchScript: use the tag 'openai', or save the archive's state_dict() "
        "without input_resolution, context_length and vocab_size and name the architecture with '-quickgelu'"
    )


def _largest_is_one(scalars: Tensor) -> Tensor:
    """Divides scalars of at least 0 by the largest one; leaves them if all are 0."""
    return scalars / scalars.max() if scalars.numel() and scalars.max() > 0 else scalars


def _fetched(pooled: Tensor, signals: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Normalises a batch's embeddings and vectors; fetches each signal from the device in one transfer."""
    scaled = {
        name: F.normalize(signal, dim=-1) if signal.dim() == 3 else signal for name, signal in signals.items()
    }
    return F.normalize(pooled, dim=-1).cpu(), {name: signal.cpu() for name, signal in scaled.items()}


def _record(signals: dict[str, Tensor], positions: Tensor, pooled: Tensor, cut: int = 0) -> TeacherRecord:
    """Makes the record of one text or picture from its signals, which ``_fetched`` has normalised."""
    scaled = {
        name: signal if signal.dim() == 2 else _largest_is_one(signal) for name, signal in signals.items()
    }
    return TeacherRecord(positions=positions, pooled=pooled, cut=cut, **scaled)


def choice_logits(image_pooled: Tensor, text_pooled: Tensor, logit_scale: float) -> Tensor:
    """Computes zero-shot logits of statements: scaled cosines of (..., dim) with (..., choices, dim).

    They go through a softmax over the choices. A sigmoid model's bias (``logit_bias``, as SigLIP has it) is
    left out: it is the same for every choice and cancels.
    """
    return logit_scale * (text_pooled @ image_pooled.unsqueeze(-1)).squeeze(-1)


def description(teacher: Teacher) -> dict[str, Any]:
    """Describes a teacher as open_clip_config.json does, so that it can be rebuilt without its weights."""
    name = teacher.name if ":" in teacher.name else teacher.name.replace("/", "-")  # as open_clip does
    model = cast(dict[str, Any], open_clip.get_model_config(name))
    model["quick_gelu"] = any(isinstance(part, QuickGELU) for part in teacher.model.modules())
    return {"model_cfg": model, "preprocess_cfg": {**teacher.model.visual.preprocess_cfg}}


def untrained(described: dict[str, Any]) -> nn.Module:
    """Builds the model of a ``description`` with random weights."""
    options = copy.deepcopy(described["model_cfg"])
    custom_text = options.pop("custom_text", False) or "hf_model_name" in options["text_cfg"]
    options["text_cfg"]["hf_model_pretrained"] = options["vision_cfg"]["timm_model_pretrained"] = False
    custom = open_clip.CoCa if "multimodal_cfg" in options else open_clip.CustomTextCLIP
    return (custom if custom_text else open_clip.CLIP)(**options)


def opened(described: dict[str, Any], folder: str) -> tuple[Preprocess, TextTokenizer]:
    """Opens preprocessing and tokenizer of a ``description``; the tokenizer's files lie in ``folder``."""
    preprocess = image_transform_v2(PreprocessCfg(**described["preprocess_cfg"]), is_train=False)
    return preprocess, TextTokenizer(open_clip.get_tokenizer(f"local-dir:{folder}"), folder)
