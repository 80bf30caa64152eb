"""The parameters of a run, validated before any work."""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tdlib.arms import ARMS
from tdlib.core.paths import ConfigError


class RunConfig(BaseModel):
    """Everything that one training run depends on.

    Field descriptions are the documentation; the notebooks' parameter cells carry the same names.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    task: Literal["vcr_qa", "vcr_qar", "vcr", "snli_ve", "e_snli_ve", "vqa_v2", "vqa_cp_v2"] = "vcr_qa"
    data_dir: str = Field("", description="folder of the data set; '' for the MiniWorld, made on demand")
    world_seed: int = Field(0, ge=0, description="seed of the MiniWorld (only where data_dir is '')")
    shift: str = Field(
        "auto", description="evaluated beside the usual split; 'auto': the task's own, '': none"
    )
    train_split: str = Field("", description="'' for the task's own")
    eval_splits: list[str] = Field([], description="[] for the task's own and its shift")
    held_out: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="share of the training pictures set aside; above 0 a run is evaluated on these alone: to "
        "choose settings on",
    )
    references: Literal["names", "person_tokens", "category"] = Field(
        "names", description="how VCR's object references become text"
    )
    vocabulary: str = Field("", description="VQA: an ans2label file; '' for the training split's answers")
    vocabulary_minimum: int = Field(9, ge=1, description="occurrences that an answer needs (VQA)")
    modality: Literal["both", "text", "image"] = Field(
        "both", description="what the student sees (controls; without a teacher)"
    )
    shots: int | float = Field(
        48, ge=0, description="examples per stratum (int), a fraction of each (float), 0: all"
    )
    seed: int = Field(0, ge=0, description="of the subset, of new parameters and of the data order")

    teacher: str = Field(
        "local-dir:data/models/mini-clip", description="open_clip name, local-dir: or hf-hub:"
    )
    teacher_pretrained: str = Field("", description="open_clip tag or checkpoint file")
    student: str = Field(
        "data/models/mini-vilt",
        description="folder or hub id of a ViLT, UNITER, VL-BERT or VisualBERT; 'teacher': CLIP itself",
    )
    regions: str = Field(
        "boxes+grid:data/models/mini-detector",
        description="region features for students that read them, KIND:WHERE (regions.computed.open_regions)",
    )
    max_text_tokens: int = Field(40, ge=8, le=512)

    arm: str = Field("clip_td", description="a key of tdlib.arms.ARMS")
    epochs: int = Field(6, ge=1)
    batch_size: int = Field(16, ge=1, description="examples per batch")
    accumulation: int = Field(1, ge=1, description="batches per update")
    learning_rate: float = Field(5e-4, gt=0)
    head_learning_rate: float = Field(1e-3, gt=0, description="of the new head and the dropped projections")
    weight_decay: float = Field(0.01, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    checkpoint_every: int = Field(
        0, ge=0, description="updates between checkpoints, from which an interrupted run continues; 0: none"
    )
    processes: int = Field(
        1, ge=1, description="that train this run together, one GPU each (without GPUs: on the CPU)"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the student's passes in training; losses are fp32, evaluation too"
    )
    loader_workers: int = Field(
        0, ge=0, description="processes that make the training's batches; 0: none but this one"
    )
    adversarial_steps: int = Field(0, ge=0, description="VILLA's steps of ascent (3 in the paper); 0: none")
    adversarial_rate: float = Field(0.01, gt=0, description="length of such a step")
    adversarial_weight: float = Field(1.5, ge=0, description="of the divergence from the unmoved output")
    adversarial_on: Literal["text", "visual", "both"] = "both"

    distill_weight: float = Field(1.0, ge=0)
    distill_schedule: str = Field("constant", description="of distill_weight over the training")
    distill_target: Literal["tokens", "global", "both"] = Field(
        "tokens", description="targeted tokens, or CLIP's global embeddings for [CLS]"
    )
    choice_weight: float = Field(1.0, ge=0, description="of the teacher's distribution over choices")
    choice_temperature: float = Field(1.0, gt=0)
    choice_instance_weight: str = Field(
        "uniform",
        description="of each example in that term: a key of tdlib.method.weighting.INSTANCE_WEIGHTS",
    )
    class_probabilities: Literal["probe", "statements"] = Field(
        "probe", description="the teacher's, where there are no choices: cross-fitted probe, or zero-shot"
    )
    distill_layer: int = Field(
        -2, description="index into hidden states; -1 is the last, -2 what [CLS] reads"
    )
    relevance: str = "value"
    temperature: float = Field(0.03, gt=0, description="of the relevance softmax")
    prior: str = "idf"
    visual_prior: Literal["uniform", "referred"] = Field(
        "uniform", description="of patches and regions: all alike, or those that the text points at"
    )
    prior_weight: float = Field(1.0, ge=0)
    selector: str = "nucleus"
    mass: float = Field(0.6, gt=0, le=1)
    count: int = Field(5, ge=1)
    fraction: float = Field(0.3, gt=0, le=1)
    deviations: float = 1.0
    token_weight: str = "score"
    instance_weight: str = "ratio"
    distance: str = "cosine"

    teacher_control: Literal["", "shuffled_images", "random_weights"] = Field(
        "", description="a teacher that sees another picture, or has learned nothing"
    )

    diagnostics_every: int = Field(
        0, ge=0, description="updates between records of gradients and weights; 0: none"
    )
    submission_split: str = Field(
        "", description="evaluated split whose predictions are also written as its benchmark wants them"
    )
    probe_examples: int = Field(
        8, ge=0, description="examples per evaluated split whose selections are recorded"
    )
    probe_every: int = Field(
        0, ge=0, description="updates between records of these selections; 0: only at the end"
    )

    @classmethod
    def from_parameters(cls, **parameters: Any) -> "RunConfig":
        """Validates parameters.

        Raises:
            ConfigError: an unknown name, a wrong type or a value out of range; all of them are listed.
        """
        try:
            return cls(**parameters)
        except ValidationError as error:
            lines = [_explain(item, list(cls.model_fields)) for item in error.errors()]
            raise ConfigError("bad parameters:\n" + "\n".join(f"- {line}" for line in lines)) from None

    @field_validator(
        "arm", "relevance", "prior", "selector", "token_weight", "instance_weight", "distance",
        "distill_schedule", "choice_instance_weight",
    )  # fmt: skip
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        from tdlib.method.registry import tables

        table: dict[str, Any] = ({"arm": ARMS} | tables())[str(info.field_name)]
        if value not in table:
            raise ValueError(f"expected one of {', '.join(table)}")
        return value

    @field_validator("processes")
    @classmethod
    def _even(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("batch_size", value)
        if size % value:
            raise ValueError(f"expected a divisor of batch_size, which is {size}: all get equal shares")
        return value

    @field_validator("shots")
    @classmethod
    def _share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value > 1:
            raise ValueError("expected an integer (examples per stratum) or a fraction of at most 1")
        return value


def _explain(error: Any, fields: list[str]) -> str:
    name = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))  # a union's members
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, fields, n=1)
        return f"{name}: unknown parameter" + (f"; did you mean {close[0]!r}?" if close else "")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message}" if name else message


def apply_arm(config: RunConfig) -> RunConfig:
    """The configuration with its arm's settings in force.

    ``finetune`` uses no teacher; ``naive`` distils every token with equal weight and c = 1
    (our reading of "naive distillation"), ``naive_global`` CLIP's global embeddings to [CLS];
    ``clip_td`` is the method. Ablations: without the teacher's choice distribution
    (``clip_td_features``), with it alone (``clip_td_choice``), selection without weights, weights
    without selection, without the prior. Controls: other selections of the same size, a teacher that
    sees another example's picture or has random weights, and smoothed labels without a teacher.
    ``clip_input``: CLIP's patch tokens in place of the student's regions; their projection is new
    (after CLIP-ViL, Shen et al. 2021). ``clip_finetune``: CLIP's two towers with a fusion head.

    Raises:
        ConfigError: the arm sets an unknown parameter or a bad value.
    """
    return RunConfig.from_parameters(**{**config.model_dump(), **ARMS[config.arm]})


def check_arm(config: RunConfig) -> None:
    """Raises ConfigError where settings are not those of the arm that they bear the name of."""
    other = {
        name: value for name, value in ARMS.get(config.arm, {}).items() if getattr(config, name) != value
    }
    if other:
        wanted = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ConfigError(f"arm={config.arm!r} sets {wanted}, which is not so here: use apply_arm(config)")
