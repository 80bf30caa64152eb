"""The arms of a comparison: named settings of the same training.

An arm says which terms the loss has. A weight of ``WEIGHTS`` that it sets to 0 stays 0: the arm lacks that
term. A weight above 0 is the arm's default: a run that sets it to something else than ``RunConfig``'s default
keeps its value, so that a batch can tune it. All other settings define the arm and cannot be changed.
"""

WEIGHTS = (
    "distill_weight", "choice_weight", "repair_weight", "truth_weight", "extra_weight", "label_smoothing"
)  # fmt: skip

_IN_PAPER = {"repair_weight": 0.0, "truth_weight": 0.0, "extra_weight": 0.0}
_NO_DISTILLATION = {"distill_weight": 0.0, "choice_weight": 0.0}
_TASK_ALONE = {**_NO_DISTILLATION, **_IN_PAPER}
_REPAIR_ALONE = {**_NO_DISTILLATION, "extra_weight": 0.0, "repair_weight": 3.0}

ARMS: dict[str, dict[str, object]] = {
    "finetune": {**_TASK_ALONE},
    "naive": {
        **_IN_PAPER, "choice_weight": 0.0, "selector": "all", "token_weight": "uniform",
        "instance_weight": "uniform",
    },
    "naive_global": {
        **_IN_PAPER, "choice_weight": 0.0, "distill_target": "global", "instance_weight": "uniform"
    },
    "clip_td": {**_IN_PAPER},
    # ablations
    "clip_td_features": {**_IN_PAPER, "choice_weight": 0.0},
    "clip_td_choice": {**_IN_PAPER, "distill_weight": 0.0},
    "clip_td_selection": {**_IN_PAPER, "instance_weight": "uniform", "token_weight": "uniform"},
    "clip_td_weighting": {**_IN_PAPER, "selector": "all"},
    "clip_td_no_prior": {**_IN_PAPER, "prior": "uniform"},
    # controls
    "clip_td_random": {**_IN_PAPER, "selector": "random"},
    "clip_td_first": {**_IN_PAPER, "selector": "first"},
    "clip_td_inverse": {**_IN_PAPER, "selector": "inverse"},
    "shuffled_teacher": {**_IN_PAPER, "teacher_control": "shuffled_images"},
    "random_teacher": {**_IN_PAPER, "teacher_control": "random_weights"},
    "label_smoothing": {**_TASK_ALONE, "label_smoothing": 0.1},
    # beyond the paper: CLIP's judgement of texts with other pictures, and its controls
    "clip_td_repaired": {"repair_weight": 3.0, "extra_weight": 0.0},
    "repair_only": {**_REPAIR_ALONE},
    "truth_only": {**_NO_DISTILLATION, "extra_weight": 0.0, "truth_weight": 1.0},
    "repair_shuffled": {**_REPAIR_ALONE, "teacher_control": "shuffled_images"},
    "repair_random": {**_REPAIR_ALONE, "teacher_control": "random_weights"},
    "repair_own": {**_REPAIR_ALONE, "repair_pool": "own"},
    "finetune_double": {**_TASK_ALONE, "repeat_epochs": 2},
    # beyond the paper: a term of one's own
    "clip_td_extra": {**_IN_PAPER, "extra_weight": 1.0},
    "extra_only": {**_TASK_ALONE, "extra_weight": 1.0},
    # works that finetune CLIP itself
    "clip_input": {**_TASK_ALONE, "regions": "clip"},
    "clip_finetune": {**_TASK_ALONE, "student": "teacher"},
}  # fmt: skip
