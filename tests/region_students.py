"""What the tests of region students share: small models with random weights, random inputs, regions.

And the equations of BERT's layers, in double precision from the weights alone, with the names and shapes
that their parameters have in official files.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import VisualBertConfig, VisualBertModel

from tdlib.data.examples import Example
from tdlib.regions.computed import Regions
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.vlbert import VlBertConfig, VlBertForMultipleChoice

CLOSE = {"rtol": 0, "atol": 1e-5}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "objects")
LABELS = ("no", "yes", "maybe")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def uniter(**settings):
    return UniterForMultipleChoice(UniterConfig(**SIZES | {"type_vocab_size": 4, "img_dim": 6} | settings))


def vlbert(**settings):
    return VlBertForMultipleChoice(VlBertConfig(**SIZES | {"visual_embedding_dim": 6} | settings))


def visual_bert(kind=VisualBertModel, **settings):
    """A stock model."""
    return kind(VisualBertConfig(**SIZES | {"visual_embedding_dim": 6} | settings))


def weighty(make, **settings):
    """A model with random weights, large enough that every part of it counts."""
    torch.manual_seed(0)
    model = make(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class BoxRegions:
    """The whole picture, unless left out, and every object of an example, each seen as its geometry."""

    dim = 6

    def __init__(self, whole: bool = True):
        self.whole = whole

    def __call__(self, example: Example) -> Regions:
        boxes = torch.tensor([(0.0, 0.001, 0.998, 1.0), *example.boxes])[0 if self.whole else 1 :]
        objects = torch.arange(-1 if self.whole else 0, len(example.boxes))
        return Regions(torch.cat([boxes, boxes[:, :2]], dim=1), boxes, objects)


def inputs_of(
    batch: int = 3, choices: int = 2, length: int = 7, regions: int = 4, seed: int = 0, objects: bool = True
) -> dict[str, torch.Tensor]:
    """Random inputs; texts and regions of several lengths, all padding at the end; region 0 is no object."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (batch, choices, length), generator=generator)
    texts = torch.randint(3, length + 1, (batch, choices, 1), generator=generator)
    seen = torch.randint(2, regions + 1, (batch, 1), generator=generator)
    attention = (torch.arange(length) < texts).long()
    mask = (torch.arange(regions) < seen).long()
    corners = torch.rand(batch, regions, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    inputs = {
        "input_ids": ids * attention,
        "attention_mask": attention,
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator) * attention,
        "region_features": torch.randn(batch, regions, 6, generator=generator) * mask[..., None],
        "region_boxes": corners * mask[..., None],
        "region_mask": mask,
    }
    if objects:
        found = torch.arange(-1, regions - 1).expand(batch, -1)
        referred = torch.randint(-1, 3, ids.shape, generator=generator)
        inputs["region_objects"] = found.masked_fill(mask == 0, -1)
        inputs["objects"] = referred.masked_fill(attention == 0, -1)
    return inputs


def run(student, inputs, **options):
    with torch.inference_mode():
        return student(**inputs, output_hidden_states=True, **options)


def cut(inputs, b, c):
    """The inputs of one example and choice without any padding."""
    text, seen = inputs["attention_mask"][b, c].bool(), inputs["region_mask"][b].bool()
    return {
        name: value[b : b + 1, c : c + 1, text] if name in TEXT else value[b : b + 1, seen]
        for name, value in inputs.items()
    }


def places_of(inputs) -> list[list[int]]:
    """Each example and choice."""
    return torch.cartesian_prod(*map(torch.arange, inputs["input_ids"].shape[:2])).tolist()


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


BROKEN_FOLDERS = {
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "malformed config": lambda folder: (folder / "config.json").write_text("{"),
}


def student_folder(tmp_path_factory, tokenizer_folder, model) -> Path:
    """A folder of a model with a tokenizer."""
    folder = tmp_path_factory.mktemp("region_student") / "student"
    shutil.copytree(tokenizer_folder, folder)
    model.save_pretrained(folder)
    return folder


# The equations (Devlin et al. 2019)


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-12)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_states(embedded, table, encoder: str, heads: int):
    """What goes into two layers and what comes out of each, of one unpadded sequence."""
    states = [embedded]
    for layer in (f"{encoder}.layer.{number}" for number in range(2)):
        query, key, value = (
            linear(states[-1], table, f"{layer}.attention.self.{name}") for name in ("query", "key", "value")
        )
        wide = query.shape[-1] // heads
        mixed = []
        for part in (slice(head * wide, (head + 1) * wide) for head in range(heads)):
            scores = query[:, part] @ key[:, part].T / math.sqrt(wide)
            mixed.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ value[:, part])
        attended = linear(torch.cat(mixed, dim=-1), table, f"{layer}.attention.output.dense")
        attended = norm(attended + states[-1], table, f"{layer}.attention.output.LayerNorm")
        inner = gelu(linear(attended, table, f"{layer}.intermediate.dense"))
        outer = linear(inner, table, f"{layer}.output.dense") + attended
        states.append(norm(outer, table, f"{layer}.output.LayerNorm"))
    return states


# Official files


def dense(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def scale(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def layer_shapes(encoder: str, width: int, inner: int, layers: int) -> dict[str, tuple]:
    shapes = {}
    for layer in (f"{encoder}.layer.{number}" for number in range(layers)):
        for name in ("query", "key", "value"):
            shapes |= dense(f"{layer}.attention.self.{name}", width, width)
        shapes |= dense(f"{layer}.attention.output.dense", width, width)
        shapes |= scale(f"{layer}.attention.output.LayerNorm", width)
        shapes |= dense(f"{layer}.intermediate.dense", inner, width)
        shapes |= dense(f"{layer}.output.dense", width, inner) | scale(f"{layer}.output.LayerNorm", width)
    return shapes


def random_state(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def refused(prefix: str, model: str) -> dict[str, tuple[Callable[[dict], object], str]]:
    """What is done to a good state dict, and what the message says, of every architecture."""
    query = f"{model}.encoder.layer.1.attention.self.query.weight"
    words = f"{model}.{'embeddings.' * (model == 'uniter')}word_embeddings.weight"

    def put(name: str, *shape: int) -> Callable[[dict], object]:
        return lambda state: state.update({prefix + name: torch.ones(shape)})

    return {
        "missing": (lambda s: s.pop(prefix + query), rf"1 missing \({re.escape(query)}\)"),
        "unknown layer": (put(f"{model}.x", 1), rf"unknown \({model}\.x\)"),
        "a gap": (
            lambda s: [s.pop(name) for name in list(s) if "layer.0.attention" in name],
            rf"10 missing \({model}.encoder.layer.0.attention",
        ),
        "shape": (put(query, 64, 32), r"\(64, 32\) instead of \(64, 64\)"),
        "no words": (lambda s: s.pop(prefix + words), "missing.*word_embeddings"),
        "width": (put(words, 300, 70), "hidden size 70"),
        "vocabulary": (put(words, 381, 64), r"has 300 tokens, but .* has 381"),
    }
