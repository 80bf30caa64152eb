"""The students by architecture: how each is fed and loaded, found by its ``config.json``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from tdlib.core.paths import resolve
from tdlib.regions.computed import RegionSource
from tdlib.students.base import StudentEncoder, StudentError, load_checkpoint
from tdlib.students.clip import ClipFusionEncoder, ClipFusionForClassification, ClipFusionForMultipleChoice
from tdlib.students.uniter import UniterEncoder, UniterForClassification, UniterForMultipleChoice
from tdlib.students.vilt import ViltEncoder, ViltForClassification, ViltForMultipleChoice
from tdlib.students.visual_bert import (
    VisualBertEncoder,
    VisualBertForClassification,
    VisualBertForMultipleChoice,
)
from tdlib.students.vlbert import VlBertEncoder, VlBertForClassification, VlBertForMultipleChoice


@dataclass(frozen=True)
class Architecture:
    """How students of one architecture are fed, and their models for choices and for labels."""

    encoder: Callable[..., StudentEncoder]
    choices: Any
    labels: Any
    reads_regions: bool = True


ARCHITECTURES = {  # by model_type
    "vilt": Architecture(ViltEncoder, ViltForMultipleChoice, ViltForClassification, reads_regions=False),
    "uniter": Architecture(UniterEncoder, UniterForMultipleChoice, UniterForClassification),
    "vl-bert": Architecture(VlBertEncoder, VlBertForMultipleChoice, VlBertForClassification),
    "visual_bert": Architecture(VisualBertEncoder, VisualBertForMultipleChoice, VisualBertForClassification),
    "clip-fusion": Architecture(
        ClipFusionEncoder, ClipFusionForMultipleChoice, ClipFusionForClassification, reads_regions=False
    ),
}


def architecture(name: str) -> Architecture:
    """The architecture of a student.

    Raises:
        StudentError: there is no readable configuration, or it is of no architecture known here.
    """
    try:
        kind = AutoConfig.from_pretrained(resolve(name)).model_type
    except Exception as error:  # transformers lets through what json and the hub raise
        raise StudentError(
            f"student {name!r}: no configuration can be loaded ({error}); expected a folder or hub id of a "
            f"{', '.join(ARCHITECTURES)}"
        ) from error
    if kind not in ARCHITECTURES:
        raise StudentError(f"student {name!r} is a {kind}; expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def open_encoder(
    name: str, max_text_tokens: int, regions: Callable[[], RegionSource] | None = None
) -> StudentEncoder:
    """The encoder of a student; ``regions`` opens the region features if the student reads them."""
    kind = architecture(name)
    if not kind.reads_regions:
        return kind.encoder(name, max_text_tokens)
    if regions is None:
        raise StudentError(f"student {name!r} reads region features, and none are given")
    return kind.encoder(name, max_text_tokens, regions())


def load_student(name: str, seed: int = 0, labels: Sequence[str] = ()) -> Any:
    """A student with a multiple-choice head, or one for ``labels``; see ``load_checkpoint``."""
    kind = architecture(name)
    return load_checkpoint(kind.labels if labels else kind.choices, name, seed, labels)
