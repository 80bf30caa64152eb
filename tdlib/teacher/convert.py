"""Converts a CLIP that transformers has saved (``CLIPModel``) to a folder that open_clip reads.

``python -m tdlib.teacher.convert CLIPMODEL_FOLDER FOLDER``, then ``teacher="local-dir:FOLDER"``. Sizes are
read off the tensors, so only what these do not tell is taken from ``config.json``.
"""

import argparse
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # transformers' defaults, too
from safetensors.torch import load_file, save_file
from torch import Tensor, cat

from tdlib.core.files import refuse_foreign, write_folder
from tdlib.core.paths import ConfigError
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import TeacherError

log = logging.getLogger(__name__)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # whether it is QuickGELU
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

# Names of parameters, theirs and open_clip's; the order matters where one begins as another does.
NAMES = [
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
]


def convert(source: Path | str, folder: Path | str) -> Path:
    """Writes the teacher in ``source`` as an open_clip folder, opens it once, and returns the folder.

    Raises:
        TeacherError: ``source`` is no ``CLIPModel`` of transformers in safetensors, or has parts that
            open_clip's CLIP lacks.
        ConfigError: ``folder`` holds something else.
    """
    source = Path(source)
    refuse_foreign(Path(folder), "open_clip_config.json")
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        index, files = source / "model.safetensors.index.json", ["model.safetensors"]
        if not (source / files[0]).is_file():  # in parts, or in a file of another kind
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
            files = sorted({*shards.values()})
        stored = {name: value for file in files for name, value in load_file(source / file).items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TeacherError(f"{source}: cannot be read ({error}); expected a CLIPModel's folder") from error
    if config.get("model_type") != "clip" or "visual_projection.weight" not in stored:
        raise TeacherError(
            f"{source}: model_type {config.get('model_type')!r} with {len(stored)} tensors; expected a whole "
            "CLIPModel (model_type 'clip') with model.safetensors; load it by transformers and save it again "
            "if its weights are in another file"
        )
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise TeacherError(f"{source}: no tokenizer.json; save the model's tokenizer beside it")
    described = {"model_cfg": _model(config, stored, source), "preprocess_cfg": _preprocess(source, stored)}
    weights = _renamed(stored)

    def fill(partial: Path) -> None:
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        text = json.dumps(described, indent=1)
        (partial / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
        save_file(weights, partial / "open_clip_model.safetensors")
        Teacher(f"local-dir:{partial}", device="cpu")  # raises if it does not fit

    return write_folder(Path(folder), fill)


def _renamed(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of open_clip: one matrix for query, key and value, and projections transposed."""
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(".position_ids") or re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue  # the first is a buffer of older files; the others are joined to the query's
        if ".self_attn.q_proj." in name:
            value = cat([stored[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        projects = name in ("visual.proj", "text_projection")
        weights[name] = (value.T if projects else value).float().contiguous()
    return weights


def _model(config: dict[str, Any], stored: dict[str, Tensor], source: Path) -> dict[str, Any]:
    """The architecture as open_clip describes it."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    acts = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
    if len(acts) > 1 or not acts <= ACTIVATIONS.keys():
        raise TeacherError(f"{source}: hidden_act {sorted(acts)}; expected one of {', '.join(ACTIVATIONS)}")
    epsilons = {part.get("layer_norm_eps", 1e-5) for part in (text, vision)}
    if epsilons != {1e-5}:
        raise TeacherError(f"{source}: layer_norm_eps {sorted(epsilons)}; open_clip's is 1e-5")

    def tower(kind: str, settings: dict[str, Any], heads: int) -> dict[str, Any]:
        wide = stored[f"{kind}_model.encoder.layers.0.mlp.fc1.weight"]
        heads = settings.get("num_attention_heads", heads)
        layers = {name.split(".")[3] for name in stored if name.startswith(f"{kind}_model.encoder.layers.")}
        size = {"head_width": wide.shape[1] // heads} if kind == "vision" else {"heads": heads}
        ratio = wide.shape[0] / wide.shape[1]
        return {"width": wide.shape[1], "layers": len(layers), "mlp_ratio": ratio, **size}

    words, _ = stored["text_model.embeddings.token_embedding.weight"].shape
    end = text.get("eos_token_id", words - 1)
    # transformers pools at the first end token, in files that say 2 at the token of the highest number, which
    # is where open_clip's "argmax" pools.
    pools = {} if end in (2, words - 1) else {"pool_type": "eos", "eos_id": end}
    return {
        "embed_dim": stored["visual_projection.weight"].shape[0],
        "quick_gelu": ACTIVATIONS[acts.pop()],
        "vision_cfg": {
            **tower("vision", vision, 12),
            "image_size": _image_size(stored),
            "patch_size": stored["vision_model.embeddings.patch_embedding.weight"].shape[-1],
        },
        "text_cfg": {
            **tower("text", text, 8),
            "context_length": len(stored["text_model.embeddings.position_embedding.weight"]),
            "vocab_size": words,
            "hf_tokenizer_name": source.resolve().name,  # any name: the folder's own tokenizer is read
            **pools,
        },
    }


def _image_size(stored: dict[str, Tensor]) -> int:
    patches = len(stored["vision_model.embeddings.position_embedding.weight"]) - 1
    side = stored["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    return round(patches**0.5) * side


def _preprocess(source: Path, stored: dict[str, Tensor]) -> dict[str, Any]:
    """How pictures are prepared: by preprocessor_config.json, or transformers 5's processor_config.json.

    OpenAI's way without either, which is said.
    """
    path, side, given = source / "preprocessor_config.json", _image_size(stored), dict[str, Any]()
    if path.is_file():
        given = json.loads(path.read_text(encoding="utf-8"))
    elif (path := source / "processor_config.json").is_file():
        given = json.loads(path.read_text(encoding="utf-8")).get("image_processor", {})
    if not given:
        log.warning("%s does not say how pictures are prepared; taken to be as OpenAI's CLIP does", source)
    if off := [name for name in ("do_resize", "do_rescale", "do_normalize") if given.get(name) is False]:
        raise TeacherError(f"{path}: {', '.join(off)} false; open_clip always does what these leave out")
    if not math.isclose(given.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise TeacherError(f"{path}: rescale_factor {given['rescale_factor']}; open_clip takes 1/255")
    size = given.get("size", side)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    mode = "shortest" if "shortest_edge" in size else "squash"
    resample = given.get("resample", 3)
    if {*size.values()} != {side} or resample not in INTERPOLATIONS:
        raise TeacherError(
            f"{path}: size {size}, resample {resample}; expected {side}, as the model's positions say, and "
            "2 (bilinear) or 3 (bicubic)"
        )
    return {
        "mean": given.get("image_mean", OPENAI_DATASET_MEAN),
        "std": given.get("image_std", OPENAI_DATASET_STD),
        "interpolation": INTERPOLATIONS[resample], "resize_mode": mode,
    }  # fmt: skip


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="tdlib.teacher.convert", description="Turn a CLIPModel of transformers into a teacher's folder."
    )
    parser.add_argument(
        "source", type=Path, help="folder that CLIPModel.save_pretrained wrote, with tokenizer"
    )
    parser.add_argument("folder", type=Path, help="where to write")
    options = parser.parse_args()
    try:
        print(convert(options.source, options.folder).resolve())
    except (TeacherError, ConfigError) as error:
        raise SystemExit(f"convert: {error}") from None


if __name__ == "__main__":
    main()
