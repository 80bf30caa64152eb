"""Shows attention: of one token, rolled out through layers, as gradient relevance, and of every head."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdlib.core.facts import title, token_name
from tdlib.core.records import TargetRecord
from tdlib.teacher.attention import Attention, AttentionError, rollout
from tdlib.views.compare import values_view
from tdlib.views.figures.attention import plot_heads
from tdlib.views.view import View


def name_layers(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0 to 5" or "layers 1, 3"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def attention_view(attention: Attention, head: int | None = None, labels: Sequence[str] = ()) -> View:
    """Show what the token that the answer is read from attends to, in % of all tokens.

    It is drawn on the picture and in the statement; ``head`` None averages the heads. The figure names
    layers, heads and token. Table: ``position``, ``token``, ``value``.
    """
    query = attention.readout
    heads = f"head {head}" if head is not None else f"mean of {attention.maps.shape[1]} heads"
    method = f"{attention.model}: attention of {name_layers(attention.layers)}, {heads}"
    record = attention.record
    return values_view(record, attention.row(head), method, token_name(record, query), labels=labels)


def rollout_view(attention: Attention, labels: Sequence[str] = ()) -> View:
    """Show attention rolled out through all layers (see ``rollout``), drawn as ``attention_view`` does."""
    if attention.layers != tuple(range(len(attention.layers))):
        raise AttentionError(
            f"rollout needs every layer from 0 on; these are {name_layers(attention.layers)}: read all layers"
        )
    query = attention.readout
    method = f"{attention.model}: attention rollout of {name_layers(attention.layers)}, heads averaged"
    record = attention.record
    values = rollout(attention.maps, query)
    return values_view(record, values, method, token_name(record, query), labels=labels)


def relevance_view(record: TargetRecord, values: np.ndarray, method: str, labels: Sequence[str] = ()) -> View:
    """Show gradient relevance (of ``gradient_relevance`` or ``teacher_relevance``) as shares of its sum.

    ``method`` names model, layers and goal, such as "student: gradient relevance, layers 0 to 3, choice 2".
    """
    total = values.sum()
    return values_view(record, values / total if total > 0 else values, method, labels=labels)


def heads_view(attention: Attention, labels: Sequence[str] = ()) -> View:
    """Show every head's map as a tile, a row of tiles per layer; lines part text and picture.

    Over a tile stands "layer.head · share": the part of their attention that text tokens give to the
    picture (in %), where there are both. Table: ``layer``, ``head``, ``text_to_picture``,
    ``picture_to_text``, ``readout_to_picture`` (shares of 1), and ``entropy`` of the rows in nats.
    """
    record, maps = attention.record, attention.maps
    visual, text = record.is_region, record.is_text
    border = int(np.argmax(visual)) if visual.any() and text.any() else 0
    rows = []
    for place, layer in enumerate(attention.layers):
        for head, tile in enumerate(maps[place]):
            entropy = -(tile * np.log(np.where(tile > 0, tile, 1))).sum(1).mean()
            rows.append({
                "layer": layer, "head": head, "text_to_picture": _between(tile, text, visual),
                "picture_to_text": _between(tile, visual, text),
                "readout_to_picture": float(tile[attention.readout, visual].sum()),
                "entropy": float(entropy),
            })  # fmt: skip
    data = pd.DataFrame(rows)
    heading = (
        f"{title(record, labels)}; {attention.model}, {name_layers(attention.layers)}; rows attend to columns"
    )
    if border:
        heading += "; over each: layer.head · what text gives to the picture (%)"
    shares = data["text_to_picture"].to_numpy().reshape(maps.shape[:2])
    arguments = {
        "maps": maps, "layers": attention.layers, "border": border, "shares": shares, "heading": heading,
    }  # fmt: skip
    shown = data.assign(**{"layer.head": [f"{row.layer}.{row.head}" for row in data.itertuples()]})
    for name in ("text_to_picture", "picture_to_text", "readout_to_picture"):
        shown[f"{name.replace('_', ' ')} (%)"] = (100 * data[name]).round(1)
    shown = shown.drop(columns=[*data.columns]).assign(entropy=data["entropy"].round(2))
    return View(heading, plot_heads, arguments, data, shown)


def _between(tile: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> float:
    return float(tile[np.ix_(queries, keys)].sum(1).mean()) if queries.any() else float("nan")
