"""The arms of a comparison: named settings of the same training."""

from tdlib.config import ConfigError, RunConfig

ARMS: dict[str, dict[str, object]] = {
    "finetune": {"distill_weight": 0.0, "choice_weight": 0.0},
    "naive": {
        "choice_weight": 0.0,
        "selector": "all",
        "token_weight": "uniform",
        "instance_weight": "uniform",
    },
    "naive_global": {
        "choice_weight": 0.0,
        "distill_target": "global",
        "instance_weight": "uniform",
    },
    "clip_td": {},
    # ablations
    "clip_td_features": {"choice_weight": 0.0},
    "clip_td_choice": {"distill_weight": 0.0},
    "clip_td_selection": {"instance_weight": "uniform", "token_weight": "uniform"},
    "clip_td_weighting": {"selector": "all"},
    "clip_td_no_prior": {"prior": "uniform"},
    # controls
    "clip_td_random": {"selector": "random"},
    "clip_td_first": {"selector": "first"},
    "clip_td_inverse": {"selector": "inverse"},
    "shuffled_teacher": {"teacher_control": "shuffled_images"},
    "random_teacher": {"teacher_control": "random_weights"},
    "label_smoothing": {"distill_weight": 0.0, "choice_weight": 0.0, "label_smoothing": 0.1},
    # works that finetune CLIP itself
    "clip_input": {"distill_weight": 0.0, "choice_weight": 0.0, "regions": "clip"},
    "clip_finetune": {"distill_weight": 0.0, "choice_weight": 0.0, "student": "teacher"},
}

ARM_SETS: dict[str, list[str]] = {
    "paper": ["finetune", "naive", "clip_td", "clip_finetune"],
    "ablation": [
        "finetune", "clip_td", "clip_td_features", "clip_td_choice", "clip_td_selection", "clip_td_weighting",
        "clip_td_no_prior",
    ],
    "controls": [
        "finetune", "clip_td", "clip_td_random", "clip_td_first", "clip_td_inverse", "shuffled_teacher",
        "random_teacher", "label_smoothing",
    ],
}  # fmt: skip


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
