"""Writes the model card of a trained student: what it is, how it was made, what it reached.

The card lies beside the weights, so that somebody who is handed the folder knows where they come from.
huggingface_hub formats its metadata block.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tdlib.config import RunConfig, parameters_with
from tdlib.data.tasks import task_of
from tdlib.training.objective import TERMS, term_weights


def model_card(
    config: RunConfig, metrics: Mapping[str, Any], environment: Mapping[str, Any], architecture: str
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads, from a run folder's files."""
    name, task = f"{config.arm}-seed{config.seed}", task_of(config)
    data = config.data_dir or f"MiniWorld, seed {config.world_seed}"
    figures = [
        (split, measure, value)
        for split, measures in metrics["measures"].items()
        for measure, value in measures.items()
    ]
    results = [
        EvalResult(
            task_type="visual-question-answering", dataset_type=task.data_set,
            dataset_name=f"{config.task} ({data})", dataset_split=split, metric_type="accuracy",
            metric_name=measure, metric_value=round(value, 4),
        )
        for split, measure, value in figures
    ]  # fmt: skip
    block = ModelCardData(
        library_name="transformers", tags=["vision-language", "distillation", "clip-td"], model_name=name,
        eval_results=results or None,
    )  # fmt: skip
    rows = [f"| `{split}` | {measure} | {100 * value:.1f} % |" for split, measure, value in figures]
    weights = term_weights(config)
    terms = {name: weights[name] for name in TERMS if weights[name] or name in TERMS[:3]}
    parts = [
        f"---\n{block.to_yaml()}\n---",
        f"# {name}: {config.task}",
        f"`{config.student}` ({architecture}), trained on {metrics['train_examples']:,} examples of "
        f"{config.task} ({data}) in {metrics['updates']:,} updates, arm `{config.arm}`.",
        "## What it reached",
        "| split | measure | value |\n|---|---|---|\n" + "\n".join(rows) if rows else "No split has labels.",
        "One run of one seed: no claim about the arm.",
        "## How it was made",
        _teaching(config, terms),
        "Training: " + _listed(config, ("seed", "shots", *parameters_with(role="training"))),
        "Environment: " + ", ".join(f"{key} {value}" for key, value in environment.items()),
        "All parameters are in the run folder's `config.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _teaching(config: RunConfig, terms: Mapping[str, float]) -> str:
    weights = ", ".join(f"{name} {weight:g}" for name, weight in terms.items())
    if not any(weight for name, weight in terms.items() if name != "task"):
        return "No teacher." if config.student != "teacher" else f"It is CLIP itself: `{config.teacher}`."
    source = " ".join(filter(None, (config.teacher, config.teacher_pretrained)))
    control = f" (control: {config.teacher_control})" if config.teacher_control else ""
    return (
        f"Teacher: `{source}`{control}. Weights of the terms: {weights} (those after distill are beyond the "
        "paper). The student has the parameters and the graph of a plainly finetuned one: the projections to "
        "the teacher's space were dropped. Settings of the method (CLIP-TD, arXiv 2201.05729, our reading): "
        + _listed(config, parameters_with(role="method"))
    )


def _listed(config: RunConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}={getattr(config, name)!r}`" for name in names) + "."
