"""Writes VCR sets in which the words that a student relies on are masked (Ye and Kovashka 2021)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tdlib.config import RunConfig
from tdlib.core.devices import usual_device
from tdlib.core.files import write_jsonl
from tdlib.core.paths import ConfigError
from tdlib.data.examples import Example, join_parts
from tdlib.data.json_files import Records
from tdlib.data.tasks import generated_file
from tdlib.data.vcr import VcrReader, render
from tdlib.data.vcr_shifts import MASKINGS, Line, Token, shortcut_scores, write_shifted
from tdlib.miniworld.writers import ensure_data
from tdlib.students.base import report_cut, student_inputs
from tdlib.students.registry import load_student
from tdlib.training.data import collate
from tdlib.training.prepare import encoder_of, regions_cache


def asked_of(
    example: Example, record: Line, prompt: Sequence[Token], variants: Sequence[list[Token]], references: str
) -> Example:
    """Makes an example with other choices, of the answers or (``prompt`` holds one) of the rationales.

    Without any mask the student reads what ``VcrReader`` gives it in training, to the token.
    """
    question, *choices = (
        render(tokens, example.names, references) for tokens in [record["question"], *variants]
    )
    if not (answer := prompt[len(record["question"]) :]):
        return replace(example, prompt=question, choices=tuple(choices))
    joined = join_parts(question, render(answer, example.names, references))
    return replace(example, prompt=joined, choices=tuple(choices), given=len(question.text) + 1)


@torch.inference_mode()
def write_masked(folder: Path, shift: str) -> Path:
    """Makes a masked set of val.jsonl from the tokens that the student of a run relies on.

    Every token of every choice is masked in turn, see ``vcr_shifts.shortcut_scores``; the scores are
    written beside the set. Words that the student cuts change nothing, and a warning says how many texts
    lose any: more ``max_text_tokens`` help.

    Args:
        folder: the run folder.
        shift: "rmtop1", "keeptop1", "keeptop3" or "keeptop5".

    Raises:
        ConfigError: the run is not of task "vcr", whose student alone has learned both answers and
            rationales, or saw no words; the shift is unknown; or the data hold a set of this name already.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json; expected the folder of a finished run")
    config = RunConfig.from_parameters(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if shift not in MASKINGS:
        raise ConfigError(f"shift={shift!r}: expected one of {', '.join(MASKINGS)}")
    if config.task != "vcr" or config.modality == "image":
        raise ConfigError(
            f"{folder}: a run of task={config.task!r}, modality={config.modality!r}; "
            "expected one of task='vcr' that reads words"
        )
    home = ensure_data(config)
    source = home / "val.jsonl"
    if (there := home / f"{source.stem}_{shift}.jsonl").is_file():
        raise ConfigError(f"{there}: the data hold this set already, which goes before one that is made")
    cache = regions_cache(config) if config.regions == "clip" else None
    encoder = encoder_of(config, cache, str(folder / "student"))
    student = load_student(str(folder / "student")).eval().to(usual_device())
    examples = VcrReader(home, source.stem, "both", config.references).open()
    report_cut(encoder, examples, source.stem)
    lines, questions = [], examples[::2]  # each is followed by its rationale
    encoder.prepare(questions)
    for record, example in zip(Records.lines(source, "VCR"), questions, strict=True):
        visual = encoder.visual(example)  # once for answers and rationales
        if config.modality == "text":
            visual = encoder.blank(visual)

        def score_variants(prompt, variants, record=record, example=example, visual=visual):
            asked = asked_of(example, record, prompt, variants, config.references)
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
