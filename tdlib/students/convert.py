"""Converts the authors' checkpoints of students to folders that ``load_student`` reads, in float32.

``python -m tdlib.students.convert uniter uniter-base.pt FOLDER --tokenizer bert-base-cased --vcr``

UNITER and VILLA (``uniter-base.pt``) and VL-BERT (``vl-bert-base-prec.model``) come as files of tensors by
the authors' names; ``FORMATS`` describes each. VisualBERT's are on the hub in the stock format and only lack
a tokenizer. Foreign files are read with ``weights_only=True``, so that no code in them can run.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig

from tdlib.core.files import why_unreadable, write_folder
from tdlib.core.paths import resolve
from tdlib.data.vcr import PERSON_TOKENS
from tdlib.students.base import StudentError, load_checkpoint
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.visual_bert import VisualBertForMultipleChoice
from tdlib.students.vlbert import (
    CLASSIFIER,
    GEOMETRY,
    VlBertConfig,
    VlBertForClassification,
    VlBertForMultipleChoice,
)


@dataclass(frozen=True)
class Format:
    """Describes how the authors of one architecture wrote its weights, and what VCR needs beside them.

    ``sizes`` names the matrices whose shapes give a checkpoint's sizes: rows of "words" (by the hidden size),
    "positions" and "types", the rows of "intermediate", and the columns of "regions" less ``geometry``.
    """

    name: str
    config: Callable[..., BertConfig]
    models: tuple[Any, ...]  # a checkpoint may have parameters of each of them
    key: str  # of the state dict in the file
    rename: Callable[[str], str]  # the authors' name of a parameter as ours
    left_out: tuple[str, ...]  # parameters whose (our) names begin so are not where finetuning starts from
    sizes: Mapping[str, str]
    types: Mapping[int, tuple[int, ...]]  # by the number of token types: which one each of VCR's copies
    tokenizer: str  # what the authors pretrained with
    geometry: int = 0
    people: Sequence[str] = field(default=(), repr=False)  # tokens that VCR adds


def _uniter_name(name: str) -> str:
    """Renames a parameter: older files have ``bert.`` for ``uniter.``, ``gamma`` and ``beta`` in norms."""
    name = re.sub(r"^bert\.", "uniter.", name)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _vlbert_name(name: str) -> str:
    """Removes ``module.`` (training on several GPUs) and ``_module.`` (VCR) from a parameter's name.

    The transform of the word predictor is kept under the name of the classifier, which starts from it.
    """
    name = name.removeprefix("module.").replace("vlbert._module.", "vlbert.")
    return re.sub(r"^vlbert\.mlm_head\.predictions\.transform\.", CLASSIFIER, name)


FORMATS = {
    "uniter": Format(
        "UNITER", UniterConfig, (UniterForMultipleChoice,), "model_state", _uniter_name,
        # Heads of pretraining, its embedding of masked regions, and the heads that finetuning writes.
        ("cls.", "feat_regress.", "region_classifier.", "itm_output.",
         "uniter.img_embeddings.mask_embedding.", "vcr_output.", "vqa_output.", "re_output.",
         "nlvr2_output.", "rank_output.", "attn_pool.", "attn1.", "attn2.", "fc."),
        {"words": "uniter.embeddings.word_embeddings.weight",
         "positions": "uniter.embeddings.position_embeddings.weight",
         "types": "uniter.embeddings.token_type_embeddings.weight",
         "regions": "uniter.img_embeddings.img_linear.weight",
         "intermediate": "uniter.encoder.layer.0.intermediate.dense.weight"},
        {2: (0, 1, 0, 0), 4: (0, 1, 2, 3)}, "bert-base-cased (28,996)", people=PERSON_TOKENS,
    ),
    "vl-bert": Format(
        "VL-BERT", VlBertConfig, (VlBertForMultipleChoice, VlBertForClassification), "state_dict",
        _vlbert_name,
        # The detector, and what only pretraining or the head of a task uses.
        ("image_feature_extractor.backbone.", "image_feature_extractor.roi_head_feature_extractor.",
         "image_feature_extractor.head.", "image_feature_extractor.regularizing_predictor.",
         "object_mask_visual_embedding.", "object_mask_word_embedding.", "aux_text_visual_embedding.",
         "vlbert.mlm_head.", "vlbert.mvrc_head.", "vlbert.relationsip_head.", "final_mlp.", "cnn_loss_reg."),
        {"words": "vlbert.word_embeddings.weight", "positions": "vlbert.position_embeddings.weight",
         "types": "vlbert.token_type_embeddings.weight",
         "regions": "image_feature_extractor.obj_downsample.1.weight",
         "intermediate": "vlbert.encoder.layer.0.intermediate.dense.weight"},
        # Type 1, which pretraining on captions never meets, starts as type 0.
        {3: (0, 0, 2)}, "bert-base-uncased (30,522)", GEOMETRY,
    ),
}  # fmt: skip


def convert(
    kind: str, checkpoint: Path | str, folder: Path | str, tokenizer: Path | str, *, vcr: bool = False,
    drop: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Writes an official checkpoint as a folder.

    Args:
        kind: "uniter" (VILLA's are UNITERs), "vl-bert" or "visual-bert".
        checkpoint: a file of the authors', or one that their finetuning wrote; of VisualBERT a folder or
            hub id, such as ``uclanlp/visualbert-vcr-coco-pre``.
        folder: where to write; must not exist or be empty.
        tokenizer: folder or hub id of the tokenizer that it was pretrained with.
        vcr: prepare it for VCR as the authors do at the start of finetuning: token types of
            answers (and of UNITER's rationales) start as those of questions, and UNITER's tokens of people
            (``person_0`` ...) get rows from N(0, 0.02). What pretraining on VCR has learned is kept.
        drop: beginnings of the names of further parameters to leave out.

    Returns:
        The names in the checkpoint that were left out.

    Raises:
        StudentError: the checkpoint cannot be read, lacks a parameter, has an unknown one or one of
            unknown shape; the tokenizer is of another size; the folder is not empty.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise StudentError(f"{folder} is not empty; remove it or choose another folder to write to")
    source, left_out = FORMATS.get(kind), list[str]()
    if source is None:  # the stock format; its head is drawn in a run, so it is not written
        model = load_checkpoint(VisualBertForMultipleChoice, str(checkpoint), seed=0)
        config, state = model.config, model.state_dict()
        weights = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    else:
        state = read_checkpoint(checkpoint, source.key)
        config, weights, left_out = official_weights(source, state, str(checkpoint), drop)
    words = _fit_tokenizer(source, tokenizer, config, weights, str(checkpoint), vcr)
    if vcr and source is not None:
        order = source.types[config.type_vocab_size]
        weights[source.sizes["types"]] = weights[source.sizes["types"]][list(order)]
        config.type_vocab_size = len(order)

    def fill(partial: Path) -> None:
        config.save_pretrained(partial)
        words.save_pretrained(partial)
        tensors = {name: value.float().contiguous() for name, value in weights.items()}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})

    write_folder(folder, fill)
    return left_out


def read_checkpoint(path: Path | str, key: str) -> dict[str, Tensor]:
    """Reads the tensors of a file that ``torch.save`` wrote, at its top or under ``key``."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through what zipfile, pickle and the system raise
        raise StudentError(
            f"checkpoint {path} cannot be read ({why_unreadable(error)}); expected a file of tensors that "
            "torch.save wrote"
        ) from error
    if isinstance(state, dict):
        state = state.get(key, state)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise StudentError(f"checkpoint {path} is not a state dict; expected tensors by parameter name")
    return state


def official_weights(
    source: Format, state: Mapping[str, Tensor], where: str, drop: Sequence[str] = ()
) -> tuple[Any, dict[str, Tensor], list[str]]:
    """Reads an official state dict: configuration, parameters by our names, and the names left out."""
    weights, left_out = {}, []
    for name, value in state.items():
        new = source.rename(name)
        if name.startswith(tuple(drop)) or new.startswith(source.left_out):
            left_out.append(name)
        else:
            if new in weights:
                raise StudentError(f"checkpoint {where}: two parameters would be {new}, one of them {name}")
            if not value.is_floating_point() or not (value.is_meta or value.isfinite().all()):
                raise StudentError(
                    f"checkpoint {where}: {name} holds {value.dtype}, or no finite numbers; expected weights "
                    "as they were trained, neither quantised nor of a training that diverged"
                )
            weights[new] = value
    config = _config_of(source, weights, where)
    with torch.device("meta"):
        models = [model(config) for model in source.models]
    shapes = {name: value.shape for model in models for name, value in model.state_dict().items()}
    if len(models) == 1:  # a run draws its head, so a checkpoint need not have one
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}
    problems = {
        "missing": {name for name in shapes if not name.startswith(models[0].may_lack)} - weights.keys(),
        "unknown": weights.keys() - shapes.keys(),
        "of unknown shape": {
            f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        },
    }
    listed = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in problems.items()
        if names
    ]
    if listed:
        raise StudentError(
            f"checkpoint {where} is not a {source.name}: parameters {'; '.join(listed)}; name the beginnings "
            "of those that are unknown and not needed in drop (--drop NAME of the command)"
        )
    return config, weights, sorted(left_out)


def _config_of(source: Format, weights: Mapping[str, Tensor], where: str) -> BertConfig:
    """Reads the sizes from the tensors' shapes; an attention head is 64 wide, as in every BERT."""
    bad = [
        f"{name} {tuple(weights[name].shape)}" if name in weights else name
        for name in source.sizes.values()
        if name not in weights or weights[name].ndim != 2 or 0 in weights[name].shape
    ]
    if bad:
        raise StudentError(
            f"checkpoint {where} is not a {source.name}: missing, or no matrix: {', '.join(bad)}"
        )
    shape = {what: weights[name].shape for what, name in source.sizes.items()}
    width, types, seen = shape["words"][1], shape["types"][0], shape["regions"][1] - source.geometry
    if width % 64 or types not in source.types or seen < 1:
        raise StudentError(
            f"checkpoint {where}: hidden size {width}, {types} token types and {shape['regions'][1]} numbers "
            f"per region; expected a multiple of 64 (768 for base, 1024 for large), "
            f"{' or '.join(map(str, source.types))} types, and more than {source.geometry} numbers"
        )
    pattern = re.compile(r"\w+\.encoder\.layer\.(\d+)\.")
    layers = {found[1] for name in weights if (found := pattern.match(name))}
    return source.config(
        vocab_size=shape["words"][0], hidden_size=width, num_hidden_layers=len(layers),
        num_attention_heads=width // 64, intermediate_size=shape["intermediate"][0],
        max_position_embeddings=shape["positions"][0], type_vocab_size=types, visual_embedding_dim=seen,
    )  # fmt: skip


def _fit_tokenizer(
    source: Format | None, name: Path | str, config: Any, weights: dict[str, Tensor], where: str, vcr: bool
) -> Any:  # fmt: skip
    """Loads the tokenizer, for ``vcr`` with tokens of people; ``weights`` get a row for each new token."""
    people = source.people if vcr and source else ()
    expected = source.tokenizer if source else "bert-base-uncased (30,522)"
    try:
        words = AutoTokenizer.from_pretrained(resolve(str(name)))
    except Exception as error:  # transformers lets through what json and tokenizers raise
        raise StudentError(
            f"tokenizer {str(name)!r} cannot be loaded ({error}); expected a folder or hub id, such as "
            f"{expected.partition(' ')[0]}"
        ) from error
    known = len(words)
    words.add_tokens(list(people))
    missing = len(words) - config.vocab_size
    if missing not in (0, len(words) - known):
        more = f", and vcr=True if it has {len(PERSON_TOKENS)} tokens of people already"
        raise StudentError(
            f"tokenizer {str(name)!r} has {known} tokens, but {where} has {config.vocab_size}; expected the "
            f"tokenizer that it was pretrained with: {expected} for the authors' checkpoints"
            f"{more if source and source.people else ''}"
        )
    if missing and source:
        generator = torch.Generator().manual_seed(0)
        rows = config.initializer_range * torch.randn(missing, config.hidden_size, generator=generator)
        table = source.sizes["words"]
        weights[table] = torch.cat([weights[table].float(), rows])
        config.vocab_size += missing
    return words


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Turn an official checkpoint into a student's folder.")
    parser.add_argument("kind", choices=[*FORMATS, "visual-bert"])
    parser.add_argument("checkpoint", help="a .pt or .model file; for VisualBERT a folder or hub id")
    parser.add_argument("folder", help="where to write; must not exist or be empty")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of its BERT tokenizer")
    parser.add_argument("--vcr", action="store_true", help="make room for VCR's answers and rationales")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME",
        help="leave out parameters whose names begin so; may be given several times",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        convert(
            options.kind, options.checkpoint, options.folder, options.tokenizer, vcr=options.vcr,
            drop=options.drop,
        )  # fmt: skip
    except StudentError as error:
        raise SystemExit(f"convert: {error}") from None
    print(Path(options.folder).resolve())


if __name__ == "__main__":
    main()
