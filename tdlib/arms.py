"""The arms of a comparison: named settings of the same training."""

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
    # beyond the paper: CLIP's judgement of texts with other pictures, and its controls
    "clip_td_repaired": {"repair_weight": 3.0},
    "repair_only": {"distill_weight": 0.0, "choice_weight": 0.0, "repair_weight": 3.0},
    "truth_only": {"distill_weight": 0.0, "choice_weight": 0.0, "truth_weight": 1.0},
    "repair_shuffled": {
        "distill_weight": 0.0,
        "choice_weight": 0.0,
        "repair_weight": 3.0,
        "teacher_control": "shuffled_images",
    },
    "repair_random": {
        "distill_weight": 0.0,
        "choice_weight": 0.0,
        "repair_weight": 3.0,
        "teacher_control": "random_weights",
    },
    "repair_own": {
        "distill_weight": 0.0,
        "choice_weight": 0.0,
        "repair_weight": 3.0,
        "repair_pool": "own",
    },
    "finetune_double": {"distill_weight": 0.0, "choice_weight": 0.0, "repeat_epochs": 2},
    # works that finetune CLIP itself
    "clip_input": {"distill_weight": 0.0, "choice_weight": 0.0, "regions": "clip"},
    "clip_finetune": {"distill_weight": 0.0, "choice_weight": 0.0, "student": "teacher"},
}
