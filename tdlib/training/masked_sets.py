"""Writes VCR sets in which the words that a student relies on are masked (Ye and Kovashka 2021)."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from tdlib.config import RunConfig
from tdlib.core.devices import usual_device
from tdlib.core.files import write_jsonl
from tdlib.core.paths import ConfigError
from tdlib.data.json_files import Records
from tdlib.data.tasks import generated_file, task_of
from tdlib.data.vcr import VcrReader, render
from tdlib.data.vcr_shifts import MASKINGS, shortcut_scores, write_shifted
from tdlib.miniworld.writers import ensure_data
from tdlib.students.base import student_inputs
from tdlib.students.registry import load_student
from tdlib.training.data import collate
from tdlib.training.prepare import encoder_of, teacher_cache


@torch.inference_mode()
def write_masked(folder: Path, shift: str) -> Path:
    """Makes a masked set of val.jsonl from the tokens that the student of a run relies on.

    Every token of every choice is masked in turn, see ``vcr_shifts.shortcut_scores``; the scores are
    written beside the set. The student should know answers and rationales: take a run of task "vcr".

    Args:
        folder: the run folder.
        shift: "rmtop1", "keeptop1", "keeptop3" or "keeptop5".

    Raises:
        ConfigError: the run is of another task, or the shift is unknown.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json; expected the folder of a finished run")
    config = RunConfig.from_parameters(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if shift not in MASKINGS:
        raise ConfigError(f"shift={shift!r}: expected one of {', '.join(MASKINGS)}")
    if shift not in task_of(config).shifts:
        raise ConfigError(f"{folder}: a run of task={config.task!r}; masked sets are VCR's")
    home = ensure_data(config)
    source = home / "val.jsonl"
    cache = teacher_cache(config) if config.regions == "clip" else None
    encoder = encoder_of(config, cache, str(folder / "student"))
    student = load_student(str(folder / "student")).eval().to(usual_device())
    lines = []
    examples = VcrReader(home, source.stem, references=config.references, file=source).open()
    encoder.prepare(examples)
    for record, example in zip(Records.lines(source, "VCR"), examples, strict=True):
        visual = encoder.visual(example)  # once for answers and rationales

        def score_variants(prompt, variants, record=record, example=example, visual=visual):
            parts = [render(tokens, record["objects"], config.references) for tokens in [prompt, *variants]]
            asked = replace(example, prompt=parts[0], choices=tuple(parts[1:]))
            item = {**vars(encoder.text(asked)), "visual": visual, "label": -1, "row": 0, "teacher": None}
            batch = student_inputs(student, collate([item], encoder))
            return student(**{n: value.to(student.device) for n, value in batch.items()}).logits[0].tolist()

        lines.append(shortcut_scores(record, score_variants))
    target = generated_file(source, shift)
    target.parent.mkdir(parents=True, exist_ok=True)
    scores = target.with_name(f"{source.stem}_shortcut_scores.jsonl")
    write_jsonl(scores, lines)
    write_shifted(source, target, shift, scores)
    return target
