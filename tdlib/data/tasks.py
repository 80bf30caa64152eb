"""Defines the tasks: all differences between them are here, so that no other module needs to know them.

A task is an object with the files of its splits and their reader, its label set, its scores, the shifts that
apply and its submission. To add one, write a reader and an entry of ``TASKS``; this works in a notebook too,
because every use of a task's name looks it up there. A shift is evaluated as one more split, named after its
source: "val" under "shortcut" is "val_shortcut".
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from tdlib.config import RunConfig
from tdlib.core.files import file_state, whole_path, write_json, write_jsonl
from tdlib.core.paths import ROOT, ConfigError, resolve
from tdlib.core.provenance import code_of
from tdlib.data import snli_ve, vcr, vcr_results, vcr_shifts, vqa, vqa_metric
from tdlib.data.examples import DataError, Example, Examples
from tdlib.data.reading import Reader
from tdlib.data.vcr_shifts import MASKINGS, RULES, write_shifted
from tdlib.data.vcr_shifts import SHIFTS as VCR_SHIFTS
from tdlib.data.vqa_metric import Vocabulary
from tdlib.method.registry import Named, is_users, source_of

MINIWORLDS = ROOT / "data" / "miniworld"  # a folder per seed, in it one per data set
SHIFTED_FILES = ROOT / "data" / "shifts"  # sets that are generated from a user's own files

# Each shift, with what it changes. The first five come as files that the MiniWorld writes, the others are
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
    """One task; the methods defined here suit one with a fixed label set and one label per example.

    Attributes:
        data_set: name of the data set's folder, which tasks may share.
        benchmark: name in the literature of the task, or of the task of which it is a part.
        train, evaluated, test: names of its splits; the benchmark takes predictions of ``test``.
        metric: name in tables of the mean of ``score``.
        shifts: the shifts that apply.
        shift: the default shifts, the first for the MiniWorld's data, the second for a user's data; ""
            for none.
        files: matches the name of a split's file; its group is the split's name. None where another
            task reads the same files.
    """

    data_set: str
    benchmark: str
    train: str
    evaluated: str
    test: str
    metric: str
    shifts: tuple[str, ...] = ()
    shift: tuple[str, str] = ("", "")
    files: re.Pattern[str] | None = None
    submission: ClassVar[str]  # name of the file for the benchmark
    # Each example has separate candidate answers; else all share a label set.
    has_choices: ClassVar[bool] = False
    # Several labels can be right to some degree, so that each is decided separately.
    has_soft_labels: ClassVar[bool] = False

    def reader(self, config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
        """Opens the reader of a split. Raises DataError if the data set lacks it."""
        raise NotImplementedError

    @property
    def has_parts(self) -> bool:
        """True if a question is several examples, which are scored together."""
        return False

    @property
    def verdicts(self) -> tuple[str, str] | None:
        """The labels for a text that is true of its picture, and for one that is false.

        None where examples have choices, or where labels answer a question: CLIP then reads the text with
        the frequent ones, see ``posterior.AnswerPosterior``, or with each, see ``probe.AnswerStatements``.
        """
        return None

    @property
    def submitted(self) -> str:
        """The split whose predictions the benchmark takes; "" where the task is only a part of it."""
        return self.test

    def vocabulary(self, config: RunConfig) -> Vocabulary | None:
        """Returns the answers from which a model chooses; None if the task has no vocabulary."""
        return None

    def labels(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the label set; empty if examples have choices."""
        return ()

    def measured(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """The rows whose mean ``score`` is the main figure of a split: one per question.

        ``predictions`` has a row per example, with columns ``question``, ``part`` and ``score``.
        """
        return predictions

    def measures(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Computes the figures of one split as shares, the main one first; ``predictions`` as above."""
        return {self.metric: float(np.mean(self.measured(predictions)["score"]))}

    def write_submission(
        self, path: Path, examples: Examples, probabilities: np.ndarray, labels: Sequence[str]
    ) -> None:
        """Writes the predictions of a whole split as the benchmark wants them.

        Args:
            path: of the file, named as ``submission``.
            examples: the whole split.
            probabilities: (examples, choices or labels); of a large label set, which needs no more, the
                chosen labels (examples,) will do.
            labels: the label set; empty where examples have choices.

        Raises:
            ValueError: the predictions do not cover the split.
            ConfigError: the benchmark takes no predictions of this task alone.
        """
        raise NotImplementedError

    def check_submission(self, path: Path, examples: Examples) -> list[str]:
        """Lists all faults of a submission for these examples, which may have been made elsewhere."""
        raise NotImplementedError


@dataclass(frozen=True)
class VcrTask(Task):
    """VCR, whose submission is the leaderboard's CSV, or half of it; ``subtask`` as in ``VcrReader``."""

    subtask: str = "both"
    submission: ClassVar[str] = "submission.csv"
    has_choices: ClassVar[bool] = True

    def reader(self, config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
        """Opens a split; a rule-based set of Ye and Kovashka that is not there is made from its source."""
        folder = data_folder(config)
        return vcr.VcrReader(folder, split, self.subtask, config.references, file=_generated(folder, split))

    @property
    def has_parts(self) -> bool:
        return self.subtask == "both"

    @property
    def submitted(self) -> str:
        return self.test if self.has_parts else ""

    def measured(self, predictions: pd.DataFrame) -> pd.DataFrame:
        return vcr_results.joint_scores(predictions) if self.has_parts else predictions

    def measures(self, predictions: pd.DataFrame) -> dict[str, float]:
        if not self.has_parts:
            return super().measures(predictions)
        scores, rationale = predictions["score"], predictions["part"] != ""
        return super().measures(predictions) | {
            TASKS["vcr_qa"].metric: float(np.mean(scores[~rationale])),
            TASKS["vcr_qar"].metric: float(np.mean(scores[rationale])),
        }

    def write_submission(
        self, path: Path, examples: Examples, probabilities: np.ndarray, labels: Sequence[str]
    ) -> None:
        if not self.has_parts:
            raise ConfigError(f"{self.metric} is half of what the leaderboard asks for; use task='vcr'")
        vcr_results.write_submission(path, examples, probabilities.tolist())

    def check_submission(self, path: Path, examples: Examples) -> list[str]:
        return vcr_results.check_submission(path, examples.questions)


@dataclass(frozen=True)
class EntailmentTask(Task):
    """SNLI-VE, whose submission has a line per pair; with ``explained``, e-SNLI-VE from its CSV files."""

    explained: bool = False
    submission: ClassVar[str] = "submission.jsonl"

    def reader(self, config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
        return snli_ve.SnliVeReader(data_folder(config), split, self.explained)

    @property
    def verdicts(self) -> tuple[str, str]:
        return "entailment", "contradiction"

    def labels(self, config: RunConfig) -> tuple[str, ...]:
        return snli_ve.LABELS

    def write_submission(
        self, path: Path, examples: Examples, probabilities: np.ndarray, labels: Sequence[str]
    ) -> None:
        pairs = zip(examples.ids, _chosen(probabilities), strict=True)
        with whole_path(path) as partial:
            write_jsonl(partial, ({"pairID": pair, "label": snli_ve.LABELS[label]} for pair, label in pairs))

    def check_submission(self, path: Path, examples: Examples) -> list[str]:
        return snli_ve.check_submission(path, examples.ids)


@dataclass(frozen=True)
class VqaTask(Task):
    """VQA v2, whose submission is the server's JSON; with ``changing_priors``, VQA-CP v2."""

    changing_priors: bool = False
    submission: ClassVar[str] = "submission.json"
    has_soft_labels: ClassVar[bool] = True

    def reader(self, config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
        return vqa.VqaReader(data_folder(config), split, vocabulary, self.changing_priors)

    def vocabulary(self, config: RunConfig) -> Vocabulary:
        """Returns the vocabulary of a named file, else the frequent answers of the training split."""
        if config.vocabulary:
            return Vocabulary.load(Path(resolve(config.vocabulary)).expanduser())
        folder, (train, _) = data_folder(config), splits_of(config)
        annotations = vqa.files(folder, train, self.changing_priors)[1]
        state = file_state(annotations)
        return _frequent_answers(folder, train, config.vocabulary_minimum, self.changing_priors, state)

    def labels(self, config: RunConfig) -> tuple[str, ...]:
        return self.vocabulary(config).answers

    def write_submission(
        self, path: Path, examples: Examples, probabilities: np.ndarray, labels: Sequence[str]
    ) -> None:
        questions = zip(examples.ids, _chosen(probabilities), strict=True)
        write_json(path, [{"question_id": int(i), "answer": labels[label]} for i, label in questions])

    def check_submission(self, path: Path, examples: Examples) -> list[str]:
        return vqa_metric.check_submission(path, [int(identifier) for identifier in examples.ids])


def _chosen(probabilities: np.ndarray) -> list[int]:
    """The labels that a submission names, see ``Task.write_submission``."""
    return (probabilities if probabilities.ndim == 1 else probabilities.argmax(-1)).tolist()


@lru_cache(maxsize=4)
def _frequent_answers(
    folder: Path, split: str, minimum: int, changing_priors: bool, _state: tuple[int, int] | None
) -> Vocabulary:
    """Builds a vocabulary once; ``_state`` makes the cache miss when the annotations have changed."""
    return vqa.build_vocabulary(folder, split, minimum, changing_priors)


class _Tasks(Named[Task]):
    error = ConfigError


_VCR_SHIFTS = ("shortcut", "balanced", *_PICTURES, *VCR_SHIFTS)
_VCR_SHIFT = ("shortcut", "rule_singular")
TASKS: Named[Task] = _Tasks({
    "vcr_qa": VcrTask(
        "vcr", "VCR", "train", "val", "test", "accuracy (Q->A)", _VCR_SHIFTS, _VCR_SHIFT, subtask="qa"
    ),
    "vcr_qar": VcrTask(
        "vcr", "VCR", "train", "val", "test", "accuracy (QA->R)", _VCR_SHIFTS, _VCR_SHIFT, subtask="qar"
    ),
    "vcr": VcrTask(
        "vcr", "VCR", "train", "val", "test", "accuracy (Q->AR)", _VCR_SHIFTS, _VCR_SHIFT,
        re.compile(r"((?:train|val|test)(?:_\w+)?)\.jsonl"),
    ),
    "snli_ve": EntailmentTask(
        "snli_ve", "SNLI-VE", "train", "dev", "test", "accuracy", ("shortcut", "balanced", *_PICTURES),
        ("shortcut", ""), re.compile(r"snli_ve_((?:train|dev|test)(?:_\w+)?)\.jsonl"),
    ),
    "e_snli_ve": EntailmentTask(
        "snli_ve", "SNLI-VE", "train", "dev", "test", "accuracy",
        files=re.compile(r"esnlive_(\w+)\.csv"), explained=True,
    ),
    "vqa_v2": VqaTask(
        "vqa_v2", "VQA", "train2014", "val2014", "test2015", "VQA accuracy",
        ("prior", "balanced", *_PICTURES), ("prior", ""),
        re.compile(r"v2_OpenEnded_mscoco_([\w-]+)_questions\.json"),
    ),
    "vqa_cp_v2": VqaTask(
        "vqa_cp_v2", "VQA", "train", "test", "test", "VQA accuracy",
        files=re.compile(r"vqacp_v2_(train|test)_questions\.json"), changing_priors=True,
    ),
})  # fmt: skip

_PUBLISHED = dict(TASKS)


def user_task(config: RunConfig) -> dict[str, str]:
    """Name and source of a run's task if it is not one of the project's, with its reader; else empty."""
    task = task_of(config)
    if task == _PUBLISHED.get(config.task):
        return {}
    kinds = type(task), type(task.reader(config, splits_of(config)[0]))
    sources = [source_of(kind) for kind in kinds if is_users(kind)]
    return {"name": config.task, "source": "\n\n".join([repr(task), *sources])}


def task_of(config: RunConfig) -> Task:
    """Returns the task of a run."""
    return TASKS[config.task]


def data_folder(config: RunConfig) -> Path:
    """Returns the folder of a run's data set; the MiniWorld's need not be written yet."""
    if config.data_dir:
        return ROOT / Path(config.data_dir).expanduser()
    return world_folder(config.task, config.world_seed)


def world_folder(task: str, seed: int) -> Path:
    """The folder of the MiniWorld with a seed in the form of a task's data set, written or not."""
    return MINIWORLDS / f"seed{seed}" / TASKS[task].data_set


def splits_of(config: RunConfig) -> tuple[str, list[str]]:
    """Returns a run's training split and evaluated splits: those it names, else the task's and its shift.

    With ``held_out`` only the pictures set aside are evaluated, because settings are not chosen on tests.

    Raises:
        ConfigError: the shift is unknown, or does not apply to the task; or tests are named beside
            ``held_out``.
    """
    task, shift = task_of(config), config.shift
    if config.eval_splits and shift not in ("auto", ""):
        raise ConfigError(
            f"shift={shift!r}: is not tested, as eval_splits names the tests; add its split there, and leave "
            "shift as it is"
        )
    if config.held_out:
        if config.eval_splits or shift not in ("auto", "") or config.submission_split:
            raise ConfigError(
                f"held_out={config.held_out:g} evaluates the pictures set aside and no test; leave shift, "
                "eval_splits and submission as they are"
            )
        train = config.train_split or task.train
        return train, [f"{train}{HELD_OUT}"]
    if shift == "auto":
        users_own = bool(config.data_dir) and not (data_folder(config) / "miniworld.json").is_file()
        shift = task.shift[users_own]
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
    """Returns the split whose predictions the benchmark takes.

    Raises a ConfigError for half a task (VCR's Q->A alone).
    """
    if not TASKS[task].submitted:
        raise ConfigError(f"submission=True: task={task!r} is half of what is submitted; use task='vcr'")
    return TASKS[task].submitted


def class_labels(config: RunConfig) -> tuple[str, ...]:
    """Returns a task's fixed label set, classes or the answer vocabulary; empty if examples have choices."""
    return task_of(config).labels(config)


def reader(config: RunConfig, split: str, vocabulary: Vocabulary | None = None) -> Reader:
    """Opens the reader of a split; a rule-based VCR set that is not there is made from its source."""
    return task_of(config).reader(config, split, vocabulary)


def _generated(folder: Path, split: str) -> Path | None:
    """Finds a set of Ye and Kovashka that the folder lacks; writes a rule-based one when first needed."""
    source, shift = _origin(folder, split)
    if not shift:
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


def _origin(folder: Path, split: str) -> tuple[Path, str]:
    """The file that a set of Ye and Kovashka is made from, and its shift; "" if the folder holds the set."""
    shift = next((name for name in VCR_SHIFTS if split.endswith(f"_{name}")), "")
    source = folder / f"{split.removesuffix(f'_{shift}')}.jsonl"
    return source, shift if source.is_file() and not (folder / f"{split}.jsonl").is_file() else ""


def masked_set(folder: Path, split: str) -> Path | None:
    """Returns the file of a split that masks the words a trained student relies on; None if none was made."""
    source, shift = _origin(folder, split)
    file = generated_file(source, shift) if shift in MASKINGS else None
    return file if file and file.is_file() else None


def generated_file(source: Path, shift: str) -> Path:
    """Returns the path of the set made from a VCR file: under data/shifts/, by its path, size and time.

    A set of a rule is also of the code that makes it; a masked one is a student's, made once.
    """
    state = source.stat()
    made_from = f"{source.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    if shift in RULES:
        made_from += f":{code_of(Path(vcr_shifts.__file__))}"
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    return SHIFTED_FILES / key / f"{source.stem}_{shift}.jsonl"


def score(example: Example, prediction: int, labels: Sequence[str]) -> float:
    """Scores a prediction, in [0, 1]; nan without a label.

    Choices and classes: right or wrong. VQA: the official accuracy of the predicted string against
    the annotators' answers; without annotators what the label is worth by ``Example.soft_label``.
    """
    if example.annotators:
        return vqa_metric.question_accuracy(labels[prediction], example.annotators)
    if example.soft_label:
        return dict(example.soft_label).get(prediction, 0.0)
    return float("nan") if example.label is None else float(prediction == example.label)


def detail(table: pd.DataFrame, by: Sequence[str] = ("stratum", "answer_type")) -> dict[str, float]:
    """Averages scores per group of each column: usually stratum (question type or class) and answer type."""
    means = {}
    for column in by:
        for group, value in table.groupby(column, sort=True)["score"].mean().items():
            if group:
                means[f"{column}: {group}"] = float(value)
    return means
