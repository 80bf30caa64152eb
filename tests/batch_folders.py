"""Folders of batches as their workers leave them, for the tests of what is read from them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from tdlib.analysis.compare import compare_arms
from tdlib.analysis.scores import read_runs, read_scores
from tdlib.data.examples import Example, TextPart, save_manifest
from tdlib.runs import states as run_states
from tdlib.training.evaluation import Predictions, prediction_table

CLASSES = ("yes", "no", "maybe")


DEFAULTS = {"student": "small", "eval_splits": [], "interactive": False, "runs_dir": "somewhere"}


def example(name: str, task: str, label: int | None, picture: str, part: str = "") -> Example:
    choices = tuple(TextPart(f"answer {i}") for i in range(4)) if task.startswith("vcr") else ()
    return Example(
        f"{name}:{part}" if part else name, Path(f"{picture}.png"), (), (), TextPart("why?"), choices, label,
        "", question=name, part=part,
    )  # fmt: skip


def examples_of(task: str, split: str, number: int = 24) -> list[Example]:
    """Two examples per picture; both halves of a question for task "vcr"."""
    labels = range(4) if task.startswith("vcr") else [0, 0, 1, 2]  # half of them are "yes"
    found = []
    for i in range(number):
        halves = ("", "r") if task == "vcr" else ("",)
        label = None if split == "test" else labels[i % 4]
        found += [example(f"{split}-{i}", task, label, f"{split}-{i // 2}", half) for half in halves]
    return found


def predict(examples: list[Example], share: float, seed: int) -> np.ndarray:
    """Probabilities that are right for about a share of the examples; the same ones for a larger share."""
    rng, width = np.random.default_rng(seed), len(examples[0].choices) or len(CLASSES)
    probabilities = np.full((len(examples), width), 0.1)
    for row, one, draw in zip(probabilities, examples, rng.random(len(examples)), strict=True):
        right = one.label or 0
        row[right if draw < share else (right + 1) % width] = 0.7
    return probabilities


def write_run(
    batch: Path, task="vcr_qa", arm="finetune", seed=0, shots=12, share=0.5, splits=("val",), state="done",
    ids=None, run="", more=None, number=24, columns=None,
) -> str:  # fmt: skip
    """A run's folder as its worker leaves it, with predictions in the form that training writes."""
    run = run or f"{task}-{arm}-{seed}-{shots:g}" + "".join(f"-{value}" for value in (more or {}).values())
    folder, parameters = batch / run, DEFAULTS | (more or {})
    parameters |= {"task": task, "arm": arm, "seed": seed, "shots": shots}
    folder.mkdir(parents=True)
    if state != "queued":
        (folder / "parameters.json").write_text(json.dumps({"parameters": parameters, "output": "runs_dir"}))
    if state == "done":
        output = folder / "output" / f"{arm}-seed{seed}"
        output.mkdir(parents=True)
        labels = () if task.startswith("vcr") else CLASSES
        tables = []
        for split in splits:
            tested = examples_of(task, split, number)
            said = Predictions.of(predict(tested, share, seed))
            tables.append(prediction_table(split, tested, said, labels, constant=1))
        pd.concat(tables).assign(**(columns or {})).to_parquet(output / "predictions.parquet", index=False)
        many = 100 if shots == 0 else int(shots)
        learned = [example(name, task, 0, "p") for name in ids or [f"{seed}-{i}" for i in range(many)]]
        save_manifest(output / "manifest.json", learned, shots, seed)
    if state != "queued":
        reason = {} if state == "done" else {"reason": f"it {state}"}
        kept = run_states.file_sizes(folder) if state == "done" else {}
        run_states.write_state(folder, {"state": state, "files": kept} | reason)
    file = batch / "batch.json"
    known = json.loads(file.read_text()) if file.exists() else {"name": batch.name, "file": "", "runs": []}
    file.write_text(json.dumps(known | {"runs": [*known["runs"], run]}))
    return run


def compare(batch: Path, **options) -> pd.DataFrame:
    runs = read_runs(batch)
    return compare_arms(runs, read_scores(batch, runs), resamples=100, **options)


def row_of(table: pd.DataFrame, **wanted) -> pd.Series:
    (found,) = table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])].index
    return table.loc[found]


SHARES = {"finetune": 0.4, "clip_td": 0.75, "naive": 0.4}


def change_batch(batch: Path, **what) -> None:
    """Something else in what the batch has recorded of itself."""
    file = batch / "batch.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | what))


TESTS = {
    "vcr_qa": ("val", "val_shortcut", "val_balanced", "val_style"),
    "snli_ve": ("dev", "dev_shortcut"),
    "vqa_v2": ("val2014", "val2014_prior"),
}
