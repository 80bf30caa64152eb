"""Lists the architectures of students, with their encoders and models; ``config.json`` names a student's."""

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
    """The encoder of one architecture, and its models for choices and for a label set."""

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
    """Looks up the architecture of a student.

    Raises:
        StudentError: there is no readable configuration, or its architecture is not in ``ARCHITECTURES``.
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
    """Opens the encoder of a student; ``regions`` is called only if the student reads region features."""
    kind = architecture(name)
    if not kind.reads_regions:
        return kind.encoder(name, max_text_tokens)
    if regions is None:
        raise StudentError(f"student {name!r} reads region features, and none are given")
    return kind.encoder(name, max_text_tokens, regions())


def load_student(name: str, seed: int = 0, labels: Sequence[str] = (), bias: float | None = None) -> Any:
    """Loads a student with a multiple-choice head, or one for ``labels``; see ``load_checkpoint``."""
    kind = architecture(name)
    return load_checkpoint(kind.labels if labels else kind.choices, name, seed, labels, bias)
