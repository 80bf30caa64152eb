"""The parameters of a run, validated before any work is done."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number
from pathlib import PurePath
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tdlib.arms import ARMS, WEIGHTS
from tdlib.core.paths import ConfigError, did_you_mean
from tdlib.method import registry


def _parameter(role: str, default: Any, description: str = "", prepares: str = "", **limits: Any) -> Any:
    """A field of ``RunConfig`` with what other modules must know of it; see there for both tags."""
    extra: Any = {"role": role, "prepares": prepares}
    return Field(default, description=description, json_schema_extra=extra, **limits)


_data, _model, _method, _training, _recording, _machine = (
    partial(_parameter, role) for role in ("data", "model", "method", "training", "recording", "machine")
)


class RunConfig(BaseModel):
    """Everything that one training run depends on.

    Field descriptions are the documentation; the notebooks' parameter cells carry the same names. Each
    field has two tags, from which every list of parameters elsewhere follows (``parameters_with``):

    - ``role``: "data", "model", "method", "training", "recording" (what is written beside the result) or
      "machine" (changes neither result nor record, so it is no part of a run's identity);
    - ``prepares``: "all" if it decides which examples are read, encoded and cached, and is therefore the
      same in every arm of a comparison; "arm" if it does and arms may change it; else "".
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    task: str = _data("vcr_qa", "a key of tdlib.data.tasks.TASKS", "all")
    data_dir: str = _data("", "folder of the data set; '' for the MiniWorld, made on demand", "all")
    world_seed: int = _data(0, "seed of the MiniWorld (only where data_dir is '')", "all", ge=0)
    shift: str = _data("auto", "evaluated beside the usual split; 'auto': the task's own, '': none", "all")
    train_split: str = _data("", "'' for the task's own", "all")
    eval_splits: list[str] = _data([], "[] for the task's own and its shift", "all")
    held_out: float = _data(
        0.0,
        "share of the training pictures set aside; above 0 a run is evaluated on these alone: to choose "
        "settings on",
        "all",
        ge=0,
        le=0.9,
    )
    references: Literal["names", "person_tokens", "category"] = _data(
        "names", "how VCR's object references become text", "all"
    )
    vocabulary: str = _data("", "VQA: an ans2label file; '' for the training split's answers", "all")
    vocabulary_minimum: int = _data(9, "occurrences that an answer needs (VQA)", "all", ge=1)
    modality: Literal["both", "text", "image"] = _data(
        "both", "what the student sees (controls; without a teacher)"
    )
    shots: int | float = _data(
        48, "examples per stratum (48), a fraction of each (0.1), or 0: all", "all", ge=0
    )
    seed: int = _data(0, "of the subset, of new parameters and of the data order", ge=0, lt=2**32)

    teacher: str = _model("local-dir:data/models/mini-clip", "open_clip name, local-dir: or hf-hub:", "all")
    teacher_pretrained: str = _model("", "open_clip tag or checkpoint file", "all")
    student: str = _model(
        "data/models/mini-vilt",
        "folder or hub id of a ViLT, UNITER, VL-BERT or VisualBERT; 'teacher': CLIP itself",
        "arm",
    )
    regions: str = _model(
        "boxes+grid:data/models/mini-detector",
        "region features for students that read them, KIND:WHERE (regions.sources.open_regions)",
        "arm",
    )
    max_text_tokens: int = _model(40, "longer statements are cut", "all", ge=8, le=512)

    arm: str = _method("clip_td", "a key of tdlib.arms.ARMS")
    epochs: int = _training(16, "passes over the training subset", ge=1)
    repeat_epochs: int = _training(1, "times that the epochs are trained (a control of cost)", ge=1)
    batch_size: int = _training(16, "examples per batch", ge=1)
    accumulation: int = _training(1, "batches per update", ge=1)
    learning_rate: float = _training(
        2e-4, "of pretrained layers; a larger one destroys what a student knows", gt=0
    )
    head_learning_rate: float = _training(4e-4, "of layers that are new and of the dropped projections", gt=0)
    weight_decay: float = _training(0.01, "of matrices", ge=0)
    warmup_fraction: float = _training(0.1, "of the updates", ge=0, lt=1)
    label_smoothing: float = _training(0.0, "of the task loss", ge=0, lt=1)
    checkpoint_every: int = _machine(
        0, "updates between checkpoints, from which an interrupted run continues; 0: none", ge=0
    )
    processes: int = _training(
        1, "that train this run together, one GPU each (without GPUs: on the CPU)", ge=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = _training(
        "fp32", "of the student's passes in training; losses are fp32, evaluation too"
    )
    loader_workers: int = _machine(
        -1,
        "processes that make the batches of training and evaluation; 0: none but this one; -1: some where "
        "there are a GPU, four cores or more, and more data than memory keeps encoded",
        ge=-1,
    )
    compile: bool = _training(False, "whether torch compiles the student for its training")
    adversarial_steps: int = _training(
        0, "VILLA's K, inputs that are trained on (3 in its paper; the first is unmoved); 0: none", ge=0
    )
    adversarial_rate: float = _training(0.01, "length of such a step", gt=0)
    adversarial_weight: float = _training(1.5, "of the divergence from the unmoved output", ge=0)
    adversarial_on: Literal["text", "visual", "both"] = _training("both", "the embeddings that are moved")

    distill_weight: float = _method(1.0, "of the targeted distillation loss", ge=0)
    distill_schedule: str = _method("constant", "of distill_weight over the training")
    distill_target: Literal["tokens", "global", "both"] = _method(
        "tokens", "targeted tokens, or CLIP's global embeddings for [CLS]"
    )
    choice_weight: float = _method(1.0, "of the teacher's distribution over choices", ge=0)
    choice_temperature: float = _method(1.0, "of that distribution", gt=0)
    choice_instance_weight: str = _method(
        "uniform", "of each example in that term: a key of tdlib.method.weighting.INSTANCE_WEIGHTS"
    )
    class_probabilities: Literal["fit", "probe", "statements"] = _method(
        "fit",
        "the teacher's, where there are no choices: how well text and picture fit and how frequent labels "
        "are, a cross-fitted probe of both embeddings, or zero-shot",
        "all",
    )
    distill_layer: int = _method(-2, "index into hidden states; -1 is the last, -2 what [CLS] reads")
    relevance: str = _method("value", "a key of tdlib.method.relevance.RELEVANCE or STUDENT_RELEVANCE")
    temperature: float = _method(0.03, "of the relevance softmax", gt=0)
    prior: str = _method("idf", "of words: a key of tdlib.method.priors.PRIORS")
    visual_prior: Literal["uniform", "referred"] = _method(
        "uniform", "of patches and regions: all alike, or those that the text points at"
    )
    prior_weight: float = _method(1.0, "exponent of the prior", ge=0)
    selector: str = _method("nucleus", "a key of tdlib.method.selection.SELECTORS")
    mass: float = _method(0.6, "share of the score that the nucleus reaches", gt=0, le=1)
    count: int = _method(5, "tokens per modality (top_k)", ge=1)
    fraction: float = _method(0.3, "of a modality's tokens (top_fraction)", gt=0, le=1)
    deviations: float = _method(1.0, "above the mean score (threshold)")
    token_weight: str = _method("score", "a key of tdlib.method.weighting.TOKEN_WEIGHTS")
    instance_weight: str = _method("ratio", "a key of tdlib.method.weighting.INSTANCE_WEIGHTS")
    distance: str = _method("cosine", "a key of tdlib.method.losses.DISTANCES")

    centred_targets: bool = _method(
        False, "whether targets lose the mean token of their modality (beyond the paper)"
    )
    conditioned_targets: bool = _method(
        False, "whether words are drawn to the patches that agree with them (beyond the paper)"
    )
    shared_phi: bool = _method(False, "one map into CLIP's space for text and picture (beyond the paper)")
    feature_pool: Literal["subset", "train"] = _method(
        "subset",
        "whose tokens are distilled: the training subset's, or also those of all other training examples, "
        "without their labels (beyond the paper)",
    )
    feature_share: float = _method(
        1.0,
        "examples of feature_pool='train' beside each of a batch, shown in a pass of their own",
        gt=0,
        le=8,
    )
    repair_weight: float = _method(
        0.0,
        "of CLIP's judgement of texts with other pictures (beyond the paper); 0: the arm's own, if any",
        ge=0,
    )
    repair_pool: Literal["batch", "subset", "train", "own"] = _method(
        "batch",
        "where other pictures come from: the batch (each of several processes takes its own share), the "
        "training subset, all training pictures (without labels), or 'own': the example's own (a control)",
    )
    repair_choice: Literal["random", "changed", "disagreement"] = _method(
        "random",
        "which of them: any, one that changes CLIP's answer, or the one where the student is furthest from "
        "CLIP",
    )
    repair_share: float = _method(1.0, "of the batch that is shown again", gt=0, le=1)
    repair_schedule: str = _method("constant", "of repair_weight over the training")
    repair_instance_weight: str = _method(
        "certainty",
        "of each pair: a key of tdlib.method.weighting.INSTANCE_WEIGHTS; CLIP's best answer counts as right",
    )
    truth_weight: float = _method(
        0.0,
        "of selected words that predict whether their statement is true (beyond the paper); 0: the arm's own",
        ge=0,
    )
    extra_term: str = _method(
        "token_cka", "a further term of the loss (beyond the paper): a key of tdlib.method.terms.EXTRA_TERMS"
    )
    extra_weight: float = _method(0.0, "of that term; 0: the arm's own, if any", ge=0)

    teacher_control: Literal["", "shuffled_images", "random_weights"] = _method(
        "", "a teacher that sees another picture, or has learned nothing", "arm"
    )

    diagnostics_every: int = _recording(0, "updates between records of gradients and weights; 0: none", ge=0)
    submission_split: str = _recording(
        "", "evaluated split whose predictions are also written as its benchmark wants them", "all"
    )
    probe_examples: int = _recording(
        8, "examples per evaluated split whose selections are recorded", "all", ge=0
    )
    probe_every: int = _recording(0, "updates between records of these selections; 0: only at the end", ge=0)

    @property
    def asks_teacher(self) -> bool:
        """True if a term of the loss needs the teacher."""
        return self.distill_weight > 0 or self.choice_weight > 0 or self.extra_weight > 0 or self.asks_judge

    @property
    def targets_tokens(self) -> bool:
        """True if a term of the loss reads the selected tokens; else a selection is only recorded."""
        distils = self.distill_weight > 0 and self.distill_target != "global"
        return distils or self.truth_weight > 0 or self.extra_weight > 0

    @property
    def distils_unlabelled(self) -> bool:
        """True if tokens of training examples beyond the labelled subset are distilled too."""
        return self.feature_pool == "train" and self.distill_weight > 0

    @property
    def asks_judge(self) -> bool:
        """True if CLIP judges statements, for re-paired pictures or for their truth."""
        return self.repair_weight > 0 or self.truth_weight > 0

    @classmethod
    def from_parameters(cls, **parameters: Any) -> "RunConfig":
        """Validates parameters.

        Raises:
            ConfigError: an unknown name, a wrong type or a value out of range; all of them are listed.
        """
        try:
            return cls(**parameters)
        except ValidationError as error:
            lines = [_explain(item) for item in error.errors()]
            raise ConfigError("bad parameters:\n" + "\n".join(f"- {line}" for line in lines)) from None

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], **others: Any) -> "RunConfig":
        """The configuration that a notebook's variables describe: ``from_notebook(globals())``.

        Takes every variable that has a parameter's name and a plain value, as in the notebook's cell of
        parameters. A variable that a loop has left under such a name counts too; name it in ``others``. A
        module, function or object under such a name is no parameter; a path, None, or a number of numpy is
        meant as one, and refused.

        Args:
            namespace: of the notebook.
            others: parameters that the notebook computes; they take precedence over variables.

        Raises:
            ConfigError: as ``from_parameters``; also an annotated variable that is no parameter but is
                spelt nearly like one that the notebook does not set: the default would stay in force.
                (``seeds``, a list of ``seed``, is meant so.)
        """
        plain = (str, bool, int, float, list)
        taken = {name: namespace[name] for name in cls.model_fields if type(namespace.get(name)) in plain}
        like_plain = (PurePath, Number, tuple, set, dict, NoneType, str)
        wrong = {
            name: namespace[name]
            for name in cls.model_fields
            if name in namespace and name not in (*taken, *others)
            and (isinstance(namespace[name], like_plain) or type(namespace[name]).__module__ == "numpy")
        }  # fmt: skip
        if wrong:
            lines = [f"\n- {name}={value!r}: is a {type(value).__name__}" for name, value in wrong.items()]
            raise ConfigError(
                f"bad parameters:{''.join(lines)}\nexpected text, a number, True or False, or a list: write "
                "str(...), int(...), float(...) or list(...), or rename what is no parameter"
            )
        taken |= others
        for name in namespace.get("__annotations__", {}):
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
            one = name.removesuffix("s") if isinstance(namespace.get(name), list) else name
            if close and close[0] not in (*taken, name, one):
                raise ConfigError(f"bad parameters:\n- {name}: unknown parameter; did you mean {close[0]!r}?")
        return cls.from_parameters(**taken)

    @field_validator("task", "arm", *registry.TABLES)
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        name = str(info.field_name)
        known = known_names(name) or ()
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}{did_you_mean(value, known)}")
        if name in registry.TABLES and (problem := registry.call_problem(name, value)):
            raise ValueError(problem)
        return value

    @field_validator("processes")
    @classmethod
    def _even(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("batch_size", value)
        if size % value:
            raise ValueError(f"expected a divisor of batch_size, which is {size}: all get equal shares")
        return value

    @field_validator("adversarial_steps")
    @classmethod
    def _ascends(cls, value: int) -> int:
        if value == 1:
            raise ValueError("the first of them is the unmoved input: expected 0, or 2 and more")
        return value

    @field_validator("shots")
    @classmethod
    def _number_or_share(cls, value: int | float) -> int | float:
        """Notebooks declare ``shots: float``, so that 48 may arrive as 48.0."""
        if isinstance(value, int) or 0 < value < 1:
            return value
        if value == 1:
            raise ValueError("1 example per stratum, or the share of all? Write 1 for one, 0 for all")
        if value != int(value):
            raise ValueError("expected an integer (examples per stratum) or a fraction below 1")
        return int(value)


def known_names(parameter: str) -> list[str] | None:
    """What a parameter that names a task, an arm or a function may name now; None for any other parameter."""
    if parameter == "task":
        return registry.table_keys("tdlib.data.tasks", "TASKS")
    if parameter == "arm":
        return list(ARMS)
    return registry.names(parameter) if parameter in registry.TABLES else None


def parameters_with(**tags: str) -> tuple[str, ...]:
    """Names of the parameters with these tags, in order: ``parameters_with(role="machine")``."""
    return tuple(
        name
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and tags.items() <= field.json_schema_extra.items()
    )


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))  # a union's members
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown parameter{did_you_mean(name, RunConfig.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "literal_error":
        message += did_you_mean(error["input"], get_args(RunConfig.model_fields[name].annotation))
    return f"{name}={error['input']!r}: {message}" if name else message


def arm_settings(arm: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm that apply to a run: all but the weights that the run sets itself.

    A weight (``arms.WEIGHTS``) is set where it is not ``RunConfig``'s default, so that notebooks and
    batches need no word for "unset"; an arm that sets it to 0 lacks the term whatever a run says.

    Args:
        arm: a value of ``ARMS``.
        settings: of the run; of those that it lacks the defaults count.
    """
    fields = RunConfig.model_fields
    return {
        name: value
        for name, value in arm.items()
        if not (
            name in WEIGHTS and value and settings.get(name, fields[name].default) != fields[name].default
        )
    }


def replaced_by_arm(settings: Mapping[str, Any], arm: Mapping[str, Any] | None = None) -> list[str]:
    """Names, in words, the settings of a run that its arm (or ``arm``) overrides."""
    fields = RunConfig.model_fields
    name = settings.get("arm", fields["arm"].default)
    return [
        f"{other}={settings[other]!r}: has no effect, because arm={name!r} sets {other}={value!r}"
        for other, value in arm_settings(ARMS.get(name, {}) if arm is None else arm, settings).items()
        if settings.get(other, fields[other].default) not in (value, fields[other].default)
    ]


def apply_arm(config: RunConfig, arm: Mapping[str, Any] | None = None) -> RunConfig:
    """Applies an arm's settings to a configuration, except the weights that it sets itself.

    ``finetune`` uses no teacher; ``naive`` distils every token with equal weight and c = 1
    (our reading of "naive distillation"), ``naive_global`` CLIP's global embeddings to [CLS];
    ``clip_td`` is the method. Ablations: without the teacher's choice distribution
    (``clip_td_features``), with it alone (``clip_td_choice``), selection without weights, weights
    without selection, without the prior. Controls: other selections of the same size, a teacher that
    sees another example's picture or has random weights, and smoothed labels without a teacher.
    Beyond the paper: ``clip_td_repaired`` adds CLIP's judgement of re-paired examples to the method,
    ``repair_only`` has nothing else, ``truth_only`` lets selected tokens predict a statement's truth (a
    run's ``truth_weight`` adds this to the first two, its ``repair_weight`` re-pairing to the last).
    Their controls: ``repair_shuffled`` and ``repair_random`` have such teachers, ``repair_own`` learns
    CLIP's judgement of the true pairs in a second pass, ``finetune_double`` finetunes with as many
    passes.
    ``clip_td_extra`` adds ``extra_term`` to the method, ``extra_only`` has that term beside the task's alone.
    ``clip_input``: CLIP's patch tokens in place of the student's regions; their projection is new
    (after CLIP-ViL, Shen et al. 2021). ``clip_finetune``: CLIP's two towers with a fusion head.

    ``arm``: settings in place of those in ``ARMS``, of an arm that is not registered yet.

    Raises:
        ConfigError: there is no such arm, it sets an unknown parameter or a bad value, or its settings
            contradict the others.
    """
    settings = config.model_dump()
    own = arm_settings(ARMS.get(config.arm, {}) if arm is None else arm, settings)
    applied = RunConfig.from_parameters(**{**settings, **own})
    if applied.student == "teacher" and applied.adversarial_steps and applied.adversarial_on != "visual":
        raise ConfigError(
            f"adversarial_on={applied.adversarial_on!r}: the words of CLIP itself are not moved; set "
            "adversarial_on='visual', or adversarial_steps=0"
        )
    alone = applied.batch_size < 2 * applied.processes
    if alone and applied.repair_weight > 0 and applied.repair_pool == "batch":
        raise ConfigError(
            f"batch_size={applied.batch_size}, processes={applied.processes}: each example is alone in its "
            "batch, so repair_pool='batch' has no other picture to show it with; raise batch_size, or set "
            "repair_pool='subset'"
        )
    return applied


def check_common(config: RunConfig, arms: Sequence[str]) -> None:
    """Raises ConfigError if the common settings of several arms are those that one arm sets.

    An arm takes over what another one set, so that all would be that arm under other names.
    """
    fields = RunConfig.model_fields
    own = {
        name: value
        for name, value in ARMS.get(config.arm, {}).items()
        if value != fields[name].default and not (name in WEIGHTS and value)
    }
    if own and {*arms} != {config.arm} and all(getattr(config, name) == own[name] for name in own):
        raise ConfigError(
            f"arms={list(arms)}: the settings are those that apply_arm makes of arm={config.arm!r} "
            f"({', '.join(f'{name}={value!r}' for name, value in own.items())}), so every arm would be like "
            "it; give the settings from before apply_arm, or leave arm at its default"
        )


def check_arm(config: RunConfig, but: Sequence[str] = ()) -> None:
    """Raises ConfigError if the settings are not those of their ``arm``, except those in ``but``."""
    own = arm_settings(ARMS.get(config.arm, {}), config.model_dump())
    other = {name: value for name, value in own.items() if name not in but and getattr(config, name) != value}
    if other:
        wanted = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ConfigError(f"arm={config.arm!r} sets {wanted}, which is not so here: use apply_arm(config)")
