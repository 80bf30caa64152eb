"""Comparisons: what the arms share is prepared once, every run becomes a folder, tables read the folders."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tdlib.analysis.statistics import adjusted_together, bootstrap_interval, paired_difference
from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.files import write_jsonl
from tdlib.core.paths import ROOT, ConfigError
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, Examples, divide_by_picture, low_shot
from tdlib.data.reading import Records
from tdlib.data.tasks import (
    HELD_OUT,
    answer_vocabulary,
    class_labels,
    data_folder,
    generated_file,
    reader,
    score,
    splits_of,
)
from tdlib.data.vcr import PERSON_TOKENS, VcrReader, render
from tdlib.data.vcr_shifts import MASKINGS, shortcut_scores, write_shifted
from tdlib.method.priors import Idf
from tdlib.regions.computed import BackboneRegions, CachedRegions, RegionSource, open_regions
from tdlib.students.base import StudentEncoder
from tdlib.students.clip import ClipFusionEncoder
from tdlib.students.registry import architecture, load_student, open_encoder
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher, choice_logits
from tdlib.teacher.probe import answer_statements
from tdlib.training.pipeline import TargetBuilder
from tdlib.training.run import EncodedExamples, Materials, class_logits, collate, student_inputs, train_run

log = logging.getLogger(__name__)

CACHE_ROOT = ROOT / "data" / "cache"

# Parameters that decide which examples are read, encoded and cached: the same in every arm.
SHARED = (
    "task", "data_dir", "world_seed", "shift", "train_split", "eval_splits", "references", "vocabulary",
    "vocabulary_minimum", "held_out", "shots", "teacher", "teacher_pretrained", "max_text_tokens",
    "class_probabilities", "submission_split", "probe_examples",
)  # fmt: skip
# Parameters that decide the same, but that arms may change: each combination is prepared by itself.
PREPARED = ("student", "regions", "teacher_control")


@lru_cache(maxsize=16)
def _open(folder: Path, key: str, split: str) -> Examples:
    config = RunConfig.model_validate_json(key)
    return reader(config, split, answer_vocabulary(config)).open()


def read_split(config: RunConfig, split: str) -> Examples:
    """The examples of a split, made when asked for; of the training split, what is not ``held_out``.

    Raises:
        DataError: the data set lacks the split.
        ConfigError: ``held_out`` leaves nothing to learn from, or nothing to evaluate.
    """
    names = {
        "task", "data_dir", "world_seed", "references", "train_split", "vocabulary", "vocabulary_minimum"
    }  # fmt: skip
    whole = _open(data_folder(config), config.model_dump_json(include=names), split.removesuffix(HELD_OUT))
    if not config.held_out or split.removesuffix(HELD_OUT) != splits_of(config)[0]:
        return whole
    return _divide(whole, config.held_out)[split.endswith(HELD_OUT)]


@lru_cache(maxsize=4)
def _divide(examples: Examples, share: float) -> tuple[Examples, Examples]:
    try:
        return divide_by_picture(examples, share)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@lru_cache(maxsize=4)
def open_cache(name: str, pretrained: str, random_weights: int | None = None) -> TeacherCache:
    """The verified cache of a teacher; the teacher itself is its attribute."""
    return TeacherCache(CACHE_ROOT, Teacher(name, pretrained, random_weights=random_weights))


def teacher_cache(config: RunConfig) -> TeacherCache:
    """The cache of a run's teacher, or of the one with random weights that stands in for it (a control)."""
    drawn = 1 if config.teacher_control == "random_weights" else None
    return open_cache(config.teacher, config.teacher_pretrained, drawn)


def prepare(config: RunConfig, seeds: Sequence[int] = (), whole_splits: bool = True) -> Materials:
    """Reads the data, opens the teacher's cache and fills it with what the runs will need.

    Args:
        config: the arms' common settings.
        seeds: seeds of the runs (their training subsets are cached); the config's own if empty.
        whole_splits: also cache every evaluated example (for zero-shot figures), not only the probes.
    """
    train_split, eval_splits = splits_of(config)
    train = read_split(config, train_split)
    if config.submission_split and config.submission_split not in eval_splits:
        eval_splits = [*eval_splits, config.submission_split]
    evaluated = {split: read_split(config, split) for split in eval_splits}
    labels = class_labels(config)
    cache = teacher_cache(config)
    encoder = encoder_of(config, cache)
    if config.references == "person_tokens":
        encoder.tokenizer.add_tokens(PERSON_TOKENS)
    worded = labels if config.class_probabilities == "statements" else ()
    for seed in seeds or [config.seed]:
        subset = low_shot(train, config.shots, seed)
        add_to_cache(cache, subset, worded)
        encoder.prepare(subset)
    for examples in evaluated.values():  # every example is made: a bad one is found now, not after training
        if not whole_splits:
            for _ in examples:
                pass
        encoder.prepare(examples)
        add_to_cache(cache, examples if whole_splits else examples[: config.probe_examples], worded)
    return Materials(
        train=train,
        evaluated=evaluated,
        encoder=encoder,
        builder=TargetBuilder(cache, fit_idf(train), config),
        encoded={
            split: EncodedExamples(examples, encoder, num_labels=len(labels))
            for split, examples in evaluated.items()
        },
        labels=labels,
    )


def encoder_of(config: RunConfig, cache: TeacherCache | None = None, student: str = "") -> StudentEncoder:
    """The encoder of the run's student (or of a stored ``student``), with the regions that it reads.

    Regions computed on this machine are stored, see ``RegionEncoder.prepare``.

    Raises:
        ConfigError: regions are CLIP's, but the student reads none.
    """

    def regions() -> RegionSource:
        source = open_regions(config.regions, cache=cache)
        return (
            CachedRegions(source, CACHE_ROOT / "regions") if isinstance(source, BackboneRegions) else source
        )

    name = student or config.student
    if name == "teacher":
        assert cache is not None
        return ClipFusionEncoder(cache.teacher, config.max_text_tokens)
    if config.regions == "clip" and not architecture(name).reads_regions:
        raise ConfigError(f"regions='clip' (arm clip_input) need a student that reads regions, not {name!r}")
    return open_encoder(name, config.max_text_tokens, regions)


def fit_idf(train: Examples, most: int = 20_000) -> Idf:
    """Word statistics of a training split; of ``most`` examples at even distances where it is larger."""
    every = range(0, len(train), max(1, len(train) // most))
    return Idf.fit(statement.text for index in every for statement in train[index].statements())


def add_to_cache(
    cache: TeacherCache, examples: Sequence[Example], labels: Sequence[str] = (), part: int = 5_000
) -> None:
    """Stores the teacher's features of all statements and pictures of the examples, ``part`` at a time.

    Args:
        cache: where they are stored.
        examples: statements and pictures of these.
        labels: also the answer statements with these labels.
        part: examples that are held in memory at once.
    """
    for start in range(0, len(examples), part):
        texts, pictures = [], []
        for example in examples[start : start + part]:
            texts += [statement.text for statement in example.statements()]
            texts += answer_statements(example, labels) if labels else []
            pictures.append(example.image)
        cache.add(texts=texts, pictures=pictures)


def zero_shot(cache: TeacherCache, examples: Sequence[Example]) -> np.ndarray:
    """The teacher's own probabilities over the choices, (examples, choices), from the cache."""
    rows = []
    for example in examples:
        picture = cache.picture(example.image).pooled
        texts = np.stack([cache.text(statement.text).pooled.numpy() for statement in example.statements()])
        logits = choice_logits(picture, picture.new_tensor(texts), cache.teacher.logit_scale)
        rows.append(logits.softmax(-1).numpy())
    return np.stack(rows)


def reference_scores(config: RunConfig, materials: Materials) -> pd.DataFrame:
    """What the teacher makes of the evaluated splits without a student, and what guessing reaches.

    Columns arm, split, mean. The teacher chooses zero-shot where examples have choices; else a
    linear probe on its global embeddings, fitted on the subset of the config's seed. Guessing is as in
    ``data.chance``. Task "vcr" is left out: its figure is joint.
    """
    assert materials.builder is not None
    rows: list[dict] = []
    subset = low_shot(materials.train, config.shots, config.seed)
    logits = class_logits(config, materials, subset)
    constant = constant_answer(materials.train)
    for split, examples in materials.evaluated.items():
        if not examples.labelled or config.task == "vcr":
            continue
        if logits is None:
            name, chosen = "teacher, zero-shot", zero_shot(materials.builder.cache, examples).argmax(1)
        else:
            name = "teacher, probe" if config.class_probabilities == "probe" else "teacher, zero-shot"
            chosen = np.array([int(logits(example).argmax()) for example in examples])
        scores = [
            score(example, int(prediction), materials.labels)
            for example, prediction in zip(examples, chosen, strict=True)
        ]
        guesses = chance_scores(examples, constant, materials.labels)
        rows.append({"arm": name, "split": split, "mean": float(np.mean(scores))})
        rows.append({"arm": "chance", "split": split, "mean": float(np.mean(guesses))})
    return pd.DataFrame(rows, columns=["arm", "split", "mean"])


def compare(
    config: RunConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    on_run: Callable[[dict], None] | None = None,
    show_progress: bool = False,
) -> list[Path]:
    """Runs every arm with every seed; returns the run folders.

    All arms of a seed train on the same examples for the same number of updates. ``on_run`` is
    called with each run's metrics.

    Raises:
        ConfigError: an unknown arm, a bad value in one, or one that changes what all arms share.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ConfigError(
            f"arms={list(arms)}: unknown {', '.join(unknown)}; expected some of {', '.join(ARMS)}"
        )
    runs = [apply_arm(config.model_copy(update={"arm": arm, "seed": seed})) for seed in seeds for arm in arms]
    for run in runs:
        changed = [name for name in SHARED if getattr(run, name) != getattr(config, name)]
        if changed:
            raise ConfigError(
                f"arm {run.arm!r} changes {', '.join(changed)}, which all arms of a comparison share"
            )
    materials: dict[tuple, Materials] = {}
    for run in runs:  # all before the first training: what is missing is found now
        if _prepared(run) not in materials:
            materials[_prepared(run)] = prepare(run, seeds)
    folders = []
    for run in runs:
        folders.append(Path(folder) / f"{run.arm}-seed{run.seed}")
        metrics = train_run(run, materials[_prepared(run)], folders[-1], show_progress)
        if on_run:
            on_run(metrics)
    return folders


def _prepared(config: RunConfig) -> tuple:
    return tuple(getattr(config, name) for name in PREPARED)


def read_predictions(folders: Sequence[Path]) -> pd.DataFrame:
    """Predictions of several runs as one table with columns arm and seed."""
    frames = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        frames.append(
            pd.read_parquet(folder / "predictions.parquet").assign(arm=config["arm"], seed=config["seed"])
        )
    return pd.concat(frames, ignore_index=True)


def joint_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Q->AR rows (answer and rationale both right) from the rows of task "vcr", or the rows as they are."""
    rationale = predictions["id"].str.endswith(":r")
    if not rationale.any():
        return predictions
    keys = ["arm", "seed", "split", "question"]
    both = predictions.assign(question=predictions["id"].str.removesuffix(":r"))
    guessed = {"chance": ("chance", "prod")} if "chance" in both else {}
    joint = both.groupby(keys, sort=False).agg(score=("score", "min"), size=("score", "size"), **guessed)
    if not (joint["size"] == 2).all():
        raise ValueError("Q->AR needs answers and rationales of the same questions")
    answers = both[~rationale].drop(columns=["score", *guessed])
    return answers.merge(joint.reset_index(), on=keys).drop(columns=["question", "size"])


def summarise(predictions: pd.DataFrame, baseline: str = "finetune") -> pd.DataFrame:
    """Mean score per arm and split with 95 % intervals, and the paired difference to the baseline.

    Columns: arm, split, mean, low, high, n (seeds), difference, difference_low, difference_high, and the
    verdict of ``statistics.PairedDifference``, corrected for the number of arms on the same split.
    Intervals: two-level bootstrap over seeds and over pictures. Splits without labels are left out;
    for task "vcr" the score is Q->AR.
    """
    rows = []
    predictions = predictions[~predictions["split"].isin(_unlabelled(predictions))]
    for split, part in joint_predictions(predictions).groupby("split", sort=False):
        tables = {
            arm: own.pivot(index="seed", columns="id", values="score").astype(float)
            for arm, own in part.groupby("arm", sort=False)
        }
        images = part.drop_duplicates("id").set_index("id")["image"]
        compared = {
            arm: paired_difference(
                table.to_numpy(),
                tables[baseline].loc[table.index, table.columns].to_numpy(),
                images[table.columns].to_numpy(),
            )
            for arm, table in tables.items()
            if arm != baseline and baseline in tables
        }
        compared = adjusted_together(compared)
        for arm, table in tables.items():
            values = table.to_numpy()
            low, high = bootstrap_interval(values, images[table.columns].to_numpy())
            row = {
                "arm": arm, "split": split, "mean": values.mean(), "low": low, "high": high, "n": len(table),
            }  # fmt: skip
            if arm in compared:
                gain = compared[arm]
                row |= {
                    "difference": gain.difference, "difference_low": gain.low, "difference_high": gain.high,
                    "verdict": gain.verdict(),
                }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def _unlabelled(predictions: pd.DataFrame) -> list[str]:
    """Splits without labels: a test split's scores are all missing."""
    known = predictions.groupby("split", sort=False)["score"].count()
    return list(known[known == 0].index)


@torch.inference_mode()
def write_masked(folder: Path, shift: str, source: Path | None = None) -> Path:
    """Makes a masked VCR set (Ye and Kovashka 2021) from what the student of a run leans on.

    Every token of every choice is masked in turn; see ``vcr_shifts.shortcut_scores``. The scores are
    kept beside the set. The student should know answers and rationales: a run of task "vcr".

    Args:
        folder: the run folder.
        shift: "rmtop1", "keeptop1", "keeptop3" or "keeptop5".
        source: a VCR file with labels; val.jsonl of the run's data if None.

    Raises:
        ConfigError: the run is of another task, or the shift is unknown.
    """
    config = RunConfig.from_parameters(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if shift not in MASKINGS:
        raise ConfigError(f"shift={shift!r}: expected one of {', '.join(MASKINGS)}")
    if not config.task.startswith("vcr"):
        raise ConfigError(f"{folder}: a run of task={config.task!r}; masked sets are VCR's")
    home = data_folder(config)
    source = source or home / "val.jsonl"
    cache = open_cache(config.teacher, config.teacher_pretrained) if config.regions == "clip" else None
    encoder = encoder_of(config, cache, str(folder / "student"))
    student = load_student(str(folder / "student")).eval()
    lines = []
    examples = VcrReader(home, source.stem, references=config.references, file=source).open()
    encoder.prepare(examples)
    for record, example in zip(Records.lines(source, "VCR"), examples, strict=True):

        def score_variants(prompt, variants, record=record, example=example):
            parts = [render(tokens, record["objects"], config.references) for tokens in [prompt, *variants]]
            asked = replace(example, prompt=parts[0], choices=tuple(parts[1:]))
            batch = collate([EncodedExamples([asked], encoder)[0]], encoder)
            return student(**student_inputs(student, batch)).logits[0].tolist()

        lines.append(shortcut_scores(record, score_variants))
    target = generated_file(source, shift)
    target.parent.mkdir(parents=True, exist_ok=True)
    scores = target.with_name(f"{source.stem}_shortcut_scores.jsonl")
    write_jsonl(scores, lines)
    write_shifted(source, target, shift, scores)
    return target
