"""The tasks by name: where their splits lie, which shifts apply, how they are scored and submitted.

Owns what differs between tasks in one table, so that training and notebooks need not know. A shift
is evaluated as one more split, named after its source: "val" under "shortcut" is "val_shortcut".
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from tdlib.config import RunConfig

from tdlib.core.paths import ROOT, ConfigError, resolve
from tdlib.data.examples import DataError, Example, Examples
from tdlib.data import snli_ve
from tdlib.data import vcr
from tdlib.data import vqa
from tdlib.data import vqa_metric
from tdlib.data.reading import Reader
from tdlib.data.vcr_shifts import RULES, write_shifted
from tdlib.data.vcr_shifts import SHIFTS as VCR_SHIFTS
from tdlib.data.vqa_metric import Vocabulary

SHIFTED_FILES = ROOT / "data" / "shifts"  # sets that are generated from a user's own files

# What each shift changes. The first five come as files (the MiniWorld writes them), the others are
# made from any VCR file.
SHIFTS = {
    "shortcut": "words that went with the right answer in training go with the wrong ones",
    "balanced": "words tell nothing about the right answer (no shift of pictures)",
    "prior": "answer frequencies per question are reversed",
    "composition": "pairs of place or shirt with a held thing that training never shows",
    "style": "a drawing style that training never shows",
    "rule_singular": "Ye and Kovashka (2021): right answers say 'he' or 'she', wrong ones repeat the tag",
    "rule_plural": "Ye and Kovashka (2021): right answers say 'they', wrong ones repeat the tags",
    "rmtop1": "Ye and Kovashka (2021): the word that a trained student leans on most is masked",
    "keeptop1": "Ye and Kovashka (2021): only the word that a trained student leans on most is left",
    "keeptop3": "the same with three words",
    "keeptop5": "the same with five words",
}
_PICTURES = ("composition", "style")
HELD_OUT = "_held_out"  # ends the name of the part of a training split that settings are chosen on


@dataclass(frozen=True)
class Task:
    """One task: its data set's folder name, its splits, the shifts that apply, and what is scored.

    ``shift`` is evaluated unless another is asked for: the first where the data are the MiniWorld's,
    the second on a user's own. ``metric`` names the figure in tables.
    """

    data_set: str
    train: str
    evaluated: str
    test: str
    shift: tuple[str, str]
    shifts: tuple[str, ...]
    metric: str
    subtask: str = ""


_VCR = ("shortcut", "balanced", *_PICTURES, *VCR_SHIFTS)
TASKS = {
    "vcr_qa": Task(
        "vcr", "train", "val", "test", ("shortcut", "rule_singular"), _VCR, "accuracy (Q->A)", "qa"
    ),
    "vcr_qar": Task(
        "vcr", "train", "val", "test", ("shortcut", "rule_singular"), _VCR, "accuracy (QA->R)", "qar"
    ),
    "vcr": Task(
        "vcr", "train", "val", "test", ("shortcut", "rule_singular"), _VCR, "accuracy (Q->AR)", "both"
    ),
    "snli_ve": Task(
        "snli_ve", "train", "dev", "test", ("shortcut", ""), ("shortcut", "balanced", *_PICTURES), "accuracy"
    ),
    "e_snli_ve": Task("snli_ve", "train", "dev", "test", ("", ""), (), "accuracy"),
    "vqa_v2": Task(
        "vqa_v2", "train2014", "val2014", "test2015", ("prior", ""), ("prior", "balanced", *_PICTURES),
        "VQA accuracy",
    ),
    "vqa_cp_v2": Task("vqa_cp_v2", "train", "test", "test", ("", ""), (), "VQA accuracy"),
}  # fmt: skip


def task_of(config: RunConfig) -> Task:
    """The task of a run."""
    return TASKS[config.task]


def splits_of(config: RunConfig) -> tuple[str, list[str]]:
    """Training split and evaluated splits of a run: named ones, else the task's own and its shift.

    With ``held_out`` the pictures set aside are all that is evaluated: settings are not chosen on tests.

    Raises:
        ConfigError: the shift is unknown, or does not apply to the task; or tests are named beside
            ``held_out``.
    """
    task, shift = task_of(config), config.shift
    if config.held_out:
        if config.eval_splits or shift not in ("auto", "") or config.submission_split:
            raise ConfigError(
                f"held_out={config.held_out:g} evaluates the pictures set aside and no test; leave shift, "
                "eval_splits and submission as they are"
            )
        train = config.train_split or task.train
        return train, [f"{train}{HELD_OUT}"]
    if shift == "auto":
        own = bool(config.data_dir) and not (data_folder(config) / "miniworld.json").is_file()
        shift = task.shift[own]
    if shift and shift not in SHIFTS:
        raise ConfigError(f"shift={shift!r}: expected 'auto', '' or one of {', '.join(SHIFTS)}")
    if shift and shift not in task.shifts:
        raise ConfigError(
            f"shift={shift!r} does not apply to task={config.task!r}; "
            f"expected {', '.join(('auto', *task.shifts))} or '' for none"
        )
    evaluated = [task.evaluated, f"{task.evaluated}_{shift}"] if shift else [task.evaluated]
    return config.train_split or task.train, list(config.eval_splits) or evaluated


def submission_split(task: str) -> str:
    """The split whose predictions the task's benchmark takes; "" for half a task (VCR's Q->A alone)."""
    return "" if TASKS[task].subtask in ("qa", "qar") else TASKS[task].test


def data_folder(config: RunConfig) -> Path:
    """The data set's folder; the MiniWorld is written first if no other is named."""
    if config.data_dir:
        path = Path(config.data_dir).expanduser()
        return path if path.is_absolute() else ROOT / path
    from tdlib.miniworld import writers

    data_set = task_of(config).data_set
    ensure: dict[str, Callable[[Path, int], Path]] = {
        "vcr": writers.ensure_vcr, "snli_ve": writers.ensure_snli_ve, "vqa_v2": writers.ensure_vqa,
        "vqa_cp_v2": writers.ensure_vqa_cp,
    }  # fmt: skip
    folder = ROOT / "data" / "miniworld" / f"seed{config.world_seed}" / data_set
    return ensure[data_set](folder, config.world_seed)


def class_labels(config: RunConfig) -> tuple[str, ...]:
    """The fixed label set of a task: classes, or the answer vocabulary; empty where examples have choices."""
    if task_of(config).data_set == "snli_ve":
        return snli_ve.LABELS
    vocabulary = answer_vocabulary(config)
    return vocabulary.answers if vocabulary else ()


def answer_vocabulary(config: RunConfig) -> Vocabulary | None:
    """The answers a VQA model chooses from: a given file, else the frequent ones of the training split."""
    task = task_of(config)
    if not task.data_set.startswith("vqa"):
        return None
    if config.vocabulary:
        return Vocabulary.load(Path(resolve(config.vocabulary)).expanduser())
    train, _ = splits_of(config)
    changing = task.data_set == "vqa_cp_v2"
    folder = data_folder(config)
    annotations = vqa.files(folder, train, changing)[1]
    state = (annotations.stat().st_size, annotations.stat().st_mtime_ns) if annotations.is_file() else None
    return _frequent_answers(folder, train, config.vocabulary_minimum, changing, state)


@lru_cache(maxsize=4)
def _frequent_answers(
    folder: Path, split: str, minimum: int, changing_priors: bool, _state: tuple[int, int] | None
) -> Vocabulary:
    return vqa.build_vocabulary(folder, [split], minimum, changing_priors)


def reader(config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
    """The reader of a split; a rule-based VCR set that is not there is made from its source.

    Raises:
        DataError: the data set lacks the split, or it cannot be made.
    """
    task, folder = task_of(config), data_folder(config)
    if task.data_set == "vcr":
        return vcr.VcrReader(folder, split, task.subtask, config.references, file=_generated(folder, split))
    if task.data_set == "snli_ve":
        return snli_ve.SnliVeReader(folder, split, explained=config.task == "e_snli_ve")
    return vqa.VqaReader(folder, split, vocabulary, changing_priors=task.data_set == "vqa_cp_v2")


def _generated(folder: Path, split: str) -> Path | None:
    """A set of Ye and Kovashka that the folder lacks; rule-based ones are written when first needed."""
    shift = next((name for name in VCR_SHIFTS if split.endswith(f"_{name}")), "")
    source = folder / f"{split.removesuffix(f'_{shift}')}.jsonl"
    if not shift or (folder / f"{split}.jsonl").is_file() or not source.is_file():
        return None
    target = generated_file(source, shift)
    if not target.is_file() and shift not in RULES:
        raise DataError(
            f"{folder / split}.jsonl: no such file; it is made from a trained student's scores: "
            f"tdlib data mask RUN_FOLDER {shift}"
        )
    if not target.is_file() and not write_shifted(source, target, shift):
        target.unlink()
        raise DataError(f"{source}: no question fits the rules of {shift!r}; the shifted set is empty")
    return target


def generated_file(source: Path, shift: str) -> Path:
    """Where the set made from a VCR file lies: under data/shifts/, by the file's place, size and time."""
    state = source.stat()
    key = hashlib.sha256(f"{source.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:16]
    return SHIFTED_FILES / key / f"{source.stem}_{shift}.jsonl"


_NAMES = (
    ("vcr", "*.jsonl", re.compile(r"((?:train|val|test)(?:_\w+)?)\.jsonl")),
    ("snli_ve", "*.jsonl", re.compile(r"snli_ve_((?:train|dev|test)(?:_\w+)?)\.jsonl")),
    ("e_snli_ve", "*.csv", re.compile(r"esnlive_(\w+)\.csv")),
    ("vqa_v2", "*.json", re.compile(r"v2_OpenEnded_mscoco_([\w-]+)_questions\.json")),
    ("vqa_cp_v2", "*.json", re.compile(r"vqacp_v2_(train|test)_questions\.json")),
)


def check_folder(folder: Path, decode: bool = False) -> Iterator[tuple[str, str, int, list[str]]]:
    """Validates every split found in a folder, as (task, split, examples, problems).

    Args:
        folder: a data set, or a folder of data sets.
        decode: also decode every picture.

    Raises:
        DataError: no split of any task is there.
    """
    folder = Path(folder)
    places = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())] if folder.is_dir() else []
    found = False
    for place in places:
        for task, pattern, name in _NAMES:
            for path in sorted(place.glob(pattern)):
                match = name.fullmatch(path.name)
                if match:
                    found = True
                    config = RunConfig.from_parameters(task=task, data_dir=str(place.resolve()))
                    yield (task, match[1], *_check_split(config, match[1], decode))
    if not found:
        wanted = "train.jsonl (VCR), snli_ve_train.jsonl, esnlive_train.csv, "
        raise DataError(
            f"{folder}: no data set there or one folder below; expected files such as {wanted}"
            "v2_OpenEnded_mscoco_train2014_questions.json (VQA) or vqacp_v2_train_questions.json"
        )


def _check_split(config: RunConfig, split: str, decode: bool) -> tuple[int, list[str]]:
    try:
        own = reader(config, split)
    except DataError as error:
        return 0, [str(error)]
    problems = list(own.problems(decode))
    try:
        return len(own.open(lambda _: None)), problems
    except DataError:  # is among the problems
        return 0, problems


def score(example: Example, prediction: int, labels: Sequence[str]) -> float:
    """What a prediction is worth, in [0, 1]; nan without a label.

    Choices and classes: right or wrong. VQA: the official accuracy of the predicted string against
    the annotators' answers.
    """
    if example.annotators:
        return vqa_metric.question_accuracy(labels[prediction], example.annotators)
    return float("nan") if example.label is None else float(prediction == example.label)


def measures(config: RunConfig, predictions: pd.DataFrame) -> dict[str, float]:
    """The figures of one split: the task's own first (as a share), then its parts.

    ``predictions`` has a row per example with columns ``question``, ``part`` and ``score``.
    """
    scores, metric = predictions["score"], task_of(config).metric
    if task_of(config).subtask != "both":
        return {metric: float(np.mean(scores))}
    rationale = predictions["part"] != ""
    return {
        metric: float(np.mean(vcr.joint_scores(predictions)["score"])),
        TASKS["vcr_qa"].metric: float(np.mean(scores[~rationale])),
        TASKS["vcr_qar"].metric: float(np.mean(scores[rationale])),
    }


def write_submission(
    config: RunConfig, folder: Path, examples: Examples, probabilities: np.ndarray, labels: Sequence[str]
) -> Path:
    """Writes the predictions of a whole split as its benchmark wants them; returns the file.

    VCR: the leaderboard's CSV (needs task="vcr"). SNLI-VE: one line per pair. VQA: the server's
    JSON. Incomplete predictions are refused.

    Raises:
        DataError: the predictions do not cover the split.
        ConfigError: the task has no submission.
    """
    data_set = task_of(config).data_set
    if len(examples) != len(probabilities):
        raise DataError(f"{folder}: {len(probabilities)} predictions for {len(examples)} examples")
    if data_set == "vcr":
        if config.task != "vcr":
            raise ConfigError(
                f"task={config.task!r} answers half of what the leaderboard asks for; use task='vcr'"
            )
        path = folder / "submission.csv"
        vcr.write_submission(path, examples, probabilities.tolist())
    elif data_set == "snli_ve":
        path = folder / "submission.jsonl"
        chosen = (int(i) for i in probabilities.argmax(-1))
        snli_ve.write_submission(path, dict(zip(examples.ids, chosen, strict=True)))
    else:
        path = folder / "submission.json"
        ids = [int(identifier) for identifier in examples.ids]
        answers = {i: labels[int(row.argmax())] for i, row in zip(ids, probabilities, strict=True)}
        vqa_metric.write_submission(path, answers, ids)
    return path


def detail(table: pd.DataFrame) -> dict[str, float]:
    """Mean scores per stratum (question type or class) and, for VQA, per answer type."""
    found = {}
    for column in ("stratum", "answer_type"):
        for group, value in table.groupby(column, sort=True)["score"].mean().items():
            if group:
                found[f"{column}: {group}"] = float(value)
    return found
