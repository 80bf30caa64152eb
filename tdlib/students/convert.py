"""The authors' checkpoints of students, as folders that ``from_pretrained`` reads.

Foreign files are read with ``weights_only=True``: no code of theirs runs.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from tdlib.core.files import write_folder
from tdlib.core.paths import resolve
from tdlib.data.vcr import PERSON_TOKENS
from tdlib.students.base import StudentError, mismatches, read_checkpoint
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice

# Beginnings of names that are left out: the heads of pretraining, its embedding of masked regions, and the
# heads that the authors' finetuning writes.
UNITER_LEFT_OUT = (
    "cls.", "feat_regress.", "region_classifier.", "itm_output.", "uniter.img_embeddings.mask_embedding.",
    "vcr_output.", "vqa_output.", "re_output.", "nlvr2_output.", "rank_output.", "attn_pool.", "attn1.",
    "attn2.", "fc.",
)  # fmt: skip


def convert_uniter(
    checkpoint: Path | str,
    folder: Path | str,
    tokenizer: Path | str,
    vcr: bool = False,
    seed: int = 0,
    drop: Sequence[str] = (),
) -> list[str]:
    """Writes an official UNITER or VILLA checkpoint as a folder that ``load_uniter`` reads, in float32.

    With ``vcr``, token types 2 and 3 (answer, rationale) are added as copies of type 0, and the
    tokens of people (``person_0`` ... ``person_80``) with rows from N(0, 0.02), as the authors'
    finetuning on VCR does; what a checkpoint of their second pretraining on VCR has, it keeps.

    Args:
        checkpoint: such as ``uniter-base.pt``.
        folder: where to write; must not exist or be empty.
        tokenizer: folder or hub id of the tokenizer that it was pretrained with (bert-base-cased).
        vcr: whether to prepare it for VCR.
        seed: of the new rows.
        drop: beginnings of the names of further parameters to leave out, beside ``UNITER_LEFT_OUT``.

    Returns:
        The names in the checkpoint that were left out.

    Raises:
        StudentError: the checkpoint cannot be read, lacks a parameter, has an unknown one or one of
            unknown shape; the tokenizer is of another size; the folder is not empty.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise StudentError(f"{folder} is not empty; remove it or choose another folder to write to")
    config, weights, dropped = uniter_weights(
        read_checkpoint(checkpoint, "model_state"), str(checkpoint), drop
    )
    try:
        words = AutoTokenizer.from_pretrained(resolve(str(tokenizer)))
    except Exception as error:  # transformers lets through what json and tokenizers raise
        raise StudentError(
            f"tokenizer {str(tokenizer)!r} cannot be loaded ({error}); expected a folder or hub id, such as "
            "bert-base-cased"
        ) from error
    known = len(words)
    if vcr:
        words.add_tokens(PERSON_TOKENS)
        add_token_types(config, weights)
    missing = len(words) - config.vocab_size
    if missing not in (0, len(words) - known):
        raise StudentError(
            f"tokenizer {str(tokenizer)!r} has {known} tokens, but {checkpoint} has {config.vocab_size}; "
            "expected the tokenizer that it was pretrained with: bert-base-cased (28,996) for the authors' "
            f"checkpoints, and vcr=True if it has {len(PERSON_TOKENS)} tokens of people already"
        )
    if missing:
        add_words(config, weights, missing, seed)

    def fill(partial: Path) -> None:
        config.save_pretrained(partial)
        words.save_pretrained(partial)
        tensors = {name: value.float().contiguous() for name, value in weights.items()}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})

    write_folder(folder, fill)
    return dropped


def uniter_weights(
    state: Mapping[str, Tensor], where: str, drop: Sequence[str] = ()
) -> tuple[UniterConfig, dict[str, Tensor], list[str]]:
    """Configuration, parameters by our names, and the dropped names of a UNITER's state dict.

    Sizes are those of the tensors; a head is 64 wide, as in every BERT. Older files say ``bert.``
    for ``uniter.``, and ``gamma`` and ``beta`` for a norm's ``weight`` and ``bias``.

    Raises:
        StudentError: parameters are missing, unknown or of unknown shape; names them and ``where``.
    """
    weights, dropped = {}, []
    for name, value in state.items():
        new = re.sub(r"^bert\.", "uniter.", name)
        new = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", new))
        if name.startswith(tuple(drop)) or new.startswith(UNITER_LEFT_OUT):
            dropped.append(name)
        else:
            weights[new] = value
    config = _uniter_config(weights, where)
    with torch.device("meta"):
        model = UniterForMultipleChoice(config)
    shapes = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    problems = {
        "missing": shapes.keys() - weights.keys(),
        "unknown": weights.keys() - shapes.keys(),
        "of unknown shape": {
            f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        },
    }
    if found := mismatches(problems):
        raise StudentError(
            f"checkpoint {where} is not a UNITER: parameters {found}; name the beginnings of those that are "
            "unknown and not needed in drop (--drop NAME of the command)"
        )
    return config, weights, sorted(dropped)


def _uniter_config(weights: Mapping[str, Tensor], where: str) -> UniterConfig:
    names = {
        "words": "uniter.embeddings.word_embeddings.weight",
        "positions": "uniter.embeddings.position_embeddings.weight",
        "types": "uniter.embeddings.token_type_embeddings.weight",
        "regions": "uniter.img_embeddings.img_linear.weight",
        "intermediate": "uniter.encoder.layer.0.intermediate.dense.weight",
    }
    bad = [
        f"{name} {tuple(weights[name].shape)}" if name in weights else name
        for name in names.values()
        if name not in weights or weights[name].ndim != 2 or 0 in weights[name].shape
    ]
    if bad:
        raise StudentError(
            f"checkpoint {where} is not a pretrained UNITER: missing, or no matrix: {', '.join(bad)}"
        )
    shape = {what: weights[name].shape for what, name in names.items()}
    width, types = shape["words"][1], shape["types"][0]
    if width % 64 or types not in (2, 4):
        raise StudentError(
            f"checkpoint {where}: hidden size {width} and {types} token types; expected a multiple of 64 "
            "(768 for base, 1024 for large), and 2 types, or 4 after pretraining on VCR"
        )
    layers = {found[1] for name in weights if (found := re.match(r"uniter\.encoder\.layer\.(\d+)\.", name))}
    return UniterConfig(
        vocab_size=shape["words"][0], hidden_size=width, num_hidden_layers=len(layers),
        num_attention_heads=width // 64, intermediate_size=shape["intermediate"][0],
        max_position_embeddings=shape["positions"][0], type_vocab_size=types, img_dim=shape["regions"][1],
    )  # fmt: skip


def add_token_types(config: UniterConfig, weights: dict[str, Tensor]) -> None:
    """Gives two token types two more, copies of the first; four stay what they are."""
    name = "uniter.embeddings.token_type_embeddings.weight"
    if config.type_vocab_size == 2:
        weights[name] = weights[name][[0, 1, 0, 0]]
        config.type_vocab_size = 4


def add_words(config: UniterConfig, weights: dict[str, Tensor], number: int, seed: int) -> None:
    """Adds rows from N(0, ``initializer_range``) to the word embeddings."""
    name = "uniter.embeddings.word_embeddings.weight"
    generator = torch.Generator().manual_seed(seed)
    rows = config.initializer_range * torch.randn(number, config.hidden_size, generator=generator)
    weights[name] = torch.cat([weights[name].float(), rows])
    config.vocab_size += number


def main() -> None:
    """``python -m tdlib.students.convert uniter uniter-base.pt FOLDER --tokenizer bert-base-cased --vcr``."""
    from tdlib.students.visual_bert import convert_visual_bert
    from tdlib.students.vlbert import convert_vlbert

    parser = argparse.ArgumentParser(description="Turn an official checkpoint into a student's folder.")
    parser.add_argument("kind", choices=["uniter", "vl-bert", "visual-bert"])
    parser.add_argument("checkpoint", help="a .pt or .model file; for VisualBERT a folder or hub id")
    parser.add_argument("folder", help="where to write; must not exist or be empty")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of its BERT tokenizer")
    parser.add_argument("--vcr", action="store_true", help="make room for VCR's answers and rationales")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME",
        help="leave out parameters whose names begin so (may be given several times; UNITER)",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        if options.kind == "visual-bert":
            convert_visual_bert(options.checkpoint, options.folder, options.tokenizer)
        else:
            convert, more = convert_vlbert, {}
            if options.kind == "uniter":
                convert, more = convert_uniter, {"drop": options.drop}
            convert(options.checkpoint, options.folder, options.tokenizer, vcr=options.vcr, **more)
    except StudentError as error:
        raise SystemExit(f"convert: {error}") from None
    print(Path(options.folder).resolve())


if __name__ == "__main__":
    main()
