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
    # works that finetune CLIP itself
    "clip_input": {"distill_weight": 0.0, "choice_weight": 0.0, "regions": "clip"},
    "clip_finetune": {"distill_weight": 0.0, "choice_weight": 0.0, "student": "teacher"},
}
