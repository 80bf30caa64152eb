"""Prepares a run: reads the data, fills the teacher's cache, opens encoder and student.

The arms of a comparison share ``PreparedData``; the student and the teacher's class logits belong to one run.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tdlib.config import RunConfig, parameters_with
from tdlib.core.files import ANNOTATIONS, file_state
from tdlib.core.paths import ROOT, ConfigError, resolve
from tdlib.core.provenance import digest
from tdlib.data.examples import DataError, Example, Examples, divide_by_picture, low_shot, spread
from tdlib.data.reading import SLACK
from tdlib.data.tasks import HELD_OUT, class_labels, reader, score, splits_of, task_of, user_task
from tdlib.data.vcr import PERSON_TOKENS
from tdlib.method.priors import Idf
from tdlib.miniworld.writers import ensure_data
from tdlib.regions.computed import BackboneRegions, CachedRegions, RegionSource
from tdlib.regions.sources import open_regions
from tdlib.students import registry as students
from tdlib.students.base import StudentEncoder
from tdlib.students.clip import ClipFusionEncoder, open_teacher_as_student
from tdlib.students.region_student import RegionEncoder
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.teacher.probe import AnswerStatements, ClassProbe, check_statements, soft_target, statement_logits
from tdlib.training.data import EncodedExamples
from tdlib.training.judging import StatementJudge
from tdlib.training.pipeline import TeacherFeatureReader, token_centres
from tdlib.training.provenance import data_manifest

log = logging.getLogger(__name__)


CACHE_ROOT = ROOT / "data" / "cache"
COUNTED = 20_000  # examples whose words are counted; more would hardly change the idf of any frequent word
AT_ONCE = 5_000  # examples that are held in memory while the cache is filled

SHARED = parameters_with(prepares="all")
PREPARED = parameters_with(prepares="arm")  # each combination is prepared by itself


@dataclass(frozen=True)
class PreparedData:
    """The data, encoder and cached teacher that the arms of one comparison share."""

    config: RunConfig  # of the first of these arms
    train: Examples
    evaluated: dict[str, Examples]
    encoder: StudentEncoder
    idf: Idf  # of the training split
    encoded: dict[str, EncodedExamples]
    labels: tuple[str, ...] = ()  # the label set, where examples have no choices

    @cached_property
    def cache(self) -> TeacherCache:
        """The teacher's cache, opened and verified when it is first used: many arms have no teacher."""
        return teacher_cache(self.config)


def read_split(config: RunConfig, split: str) -> Examples:
    """Opens the examples of a split; without those ``held_out`` if it is the training split.

    Raises:
        DataError: the data set lacks the split.
        ConfigError: ``held_out`` leaves nothing to learn from, or nothing to evaluate.
    """
    names = {
        "task", "data_dir", "world_seed", "references", "train_split", "vocabulary", "vocabulary_minimum"
    }  # fmt: skip
    folder, source = ensure_data(config), split.removesuffix(HELD_OUT)
    # The first may lie elsewhere if it is generated, the second wherever the user likes.
    opened = reader(config, source)
    named = [opened.path, Path(resolve(config.vocabulary)).expanduser()]
    files = [*named, *(file for file in folder.iterdir() if file.suffix in ANNOTATIONS)]
    states = tuple((str(file), file_state(file)) for file in sorted({*files}) if file.is_file())
    task = task_of(config)
    kinds = type(opened), type(task), repr(task)
    whole = _open(folder, config.model_dump_json(include=names), source, states, kinds)
    if not config.held_out or split.removesuffix(HELD_OUT) != splits_of(config)[0]:
        return whole
    return _divide(whole, config.held_out)[split.endswith(HELD_OUT)]


@lru_cache(maxsize=16)
def _open(folder: Path, key: str, split: str, _states: tuple, _kinds: tuple) -> Examples:
    """Opens a split once more only if a file of the data set, or a task of one's own, has changed."""
    config = RunConfig.model_validate_json(key)
    task = task_of(config)
    examples = reader(config, split, task.vocabulary(config)).open()
    if not user_task(config) or not len(examples):
        return examples
    return _checked(examples, split, len(task.labels(config)), task.has_soft_labels)


def _checked(examples: Examples, split: str, labels: int, soft: bool) -> Examples:
    """Checks what the project's readers ensure and training relies on: ids at once, an example when made."""
    twice = [name for name, number in Counter(examples.ids).items() if number > 1]
    if twice:
        raise DataError(f"{split}: the id {twice[0]!r} stands twice; each example needs one of its own")
    choices = len(examples[0].choices)

    def check(example: Example) -> Example:
        if wrong := _fault(example, choices, labels, soft):
            raise DataError(f"{split}, example {example.id!r}: {wrong}")
        return example

    return examples.mapped(check)


def _fault(example: Example, choices: int, labels: int, soft: bool) -> str:
    """Says what is wrong with an example of a task with so many choices or labels; "" if nothing."""
    if not isinstance(example.image, Path) or not isinstance(example.boxes, tuple):
        return "image must be a Path, and boxes a tuple"
    low, high = -SLACK, 1 + SLACK
    for box in (*example.boxes, *example.relevant_boxes):
        if len(box) != 4 or not (low <= box[0] <= box[2] <= high and low <= box[1] <= box[3] <= high):
            return (
                f"box {box}, expected (x1, y1, x2, y2) from 0 to 1: pixels divided by the picture's width "
                "and height"
            )
    if len(example.names) != len(example.boxes):
        return f"{len(example.names)} names of {len(example.boxes)} boxes; each box needs one"
    for part in (example.prompt, *example.choices):
        spans = [*part.relevant, *((reference.start, reference.end) for reference in part.references)]
        for start, end in spans:
            if not 0 <= start < end <= len(part.text):
                return f"span {(start, end)} is not within {part.text!r}"
        for place in (place for reference in part.references for place in reference.objects):
            if not 0 <= place < len(example.boxes):
                return f"{part.text!r} refers to object {place} of {len(example.boxes)}"
    if len(example.choices) != choices:
        return f"{len(example.choices)} choices, but {choices} in the first example"
    most = choices or labels
    known = f"one from 0 to {most - 1}" if most else "none, as the task has neither choices nor labels"
    if example.label is not None and not 0 <= example.label < most:
        return f"label {example.label}, expected {known}"
    if not example.soft_label:
        return ""
    if not soft or choices:
        return "a soft_label, which only a task of labels with has_soft_labels = True learns from"
    if example.label is None or not any(worth > 0 for _, worth in example.soft_label):
        return "a soft_label of no worth, or without the label that is worth most"
    for label, worth in example.soft_label:
        if not (0 <= label < most and 0 <= worth <= 1):
            return f"soft_label {(label, worth)}, expected {known}, worth 0 to 1"
    return ""


@lru_cache(maxsize=4)
def _divide(examples: Examples, share: float) -> tuple[Examples, Examples]:
    try:
        return divide_by_picture(examples, share)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@lru_cache(maxsize=4)
def open_cache(
    name: str, pretrained: str, random_weights: int | None = None, _state: str = ""
) -> TeacherCache:
    """The verified cache of a teacher; the teacher itself is its attribute.

    ``_state`` makes the cache miss when the teacher's files have changed.
    """
    return TeacherCache(CACHE_ROOT, Teacher(name, pretrained, random_weights=random_weights))


def regions_cache(config: RunConfig) -> TeacherCache:
    """The cache of the teacher whose patches a student sees as regions; no control changes it."""
    return teacher_cache(config.model_copy(update={"teacher_control": ""}))


def teacher_cache(config: RunConfig) -> TeacherCache:
    """The cache of a run's teacher, or of the one with random weights that replaces it as a control."""
    drawn = 1 if config.teacher_control == "random_weights" else None
    files = data_manifest({"teacher": config.teacher, "teacher_pretrained": config.teacher_pretrained})
    return open_cache(config.teacher, config.teacher_pretrained, drawn, digest(files))


def prepare(config: RunConfig, seeds: Sequence[int] = (), whole_splits: bool = True) -> PreparedData:
    """Reads the data and fills the teacher's cache with what the runs will need.

    Without ``whole_splits`` nothing is cached for an arm that asks no teacher.

    Args:
        config: the arms' common settings.
        seeds: seeds of the runs (their training subsets are cached); the config's own if empty.
        whole_splits: also cache every evaluated example (for zero-shot figures), not only the probes.
    """
    train_split, eval_splits = splits_of(config)
    if train_split in eval_splits and not config.eval_splits:
        raise ConfigError(f"train_split={train_split!r} is also evaluated; name other splits in eval_splits")
    train = read_split(config, train_split)
    if not train.labelled:
        raise ConfigError(
            f"train_split={train_split!r}: has no labels to learn from; expected a split with them"
        )
    if config.submission_split and config.submission_split not in eval_splits:
        eval_splits = [*eval_splits, config.submission_split]
    evaluated = {split: read_split(config, split) for split in eval_splits}
    labels, users = class_labels(config), bool(user_task(config))
    seen = config.regions == "clip" or config.student == "teacher"
    encoder = encoder_of(config, regions_cache(config) if seen else None)
    if config.references == "person_tokens":
        encoder.tokenizer.add_tokens(PERSON_TOKENS)
    fills = whole_splits or config.asks_teacher
    cache = teacher_cache(config) if fills else None
    worded = worded_answers(config, labels)
    for seed in seeds or [config.seed]:
        subset = low_shot(train, config.shots, seed)
        if labels and not any(soft_target(one, len(labels)).any() for one in subset):
            raise ConfigError(
                f"no answer to the {len(subset)} training examples is one of the {len(labels)} labels; "
                "expected labels of this data set (for VQA see vocabulary and vocabulary_minimum)"
            )
        if users and not task_of(config).has_soft_labels:
            if lacking := [example.id for example in subset if example.label is None]:
                raise DataError(
                    f"train_split={train_split!r}: {len(lacking)} of {len(subset)} examples have no label "
                    f"(first: {lacking[0]!r}); leave them out in the reader"
                )
        encoder.prepare(subset)
        if cache is not None:
            add_to_cache(cache, subset, worded)
        elif not isinstance(encoder, RegionEncoder):  # whose regions were looked up example by example
            for _ in subset:  # a bad record, or a missing picture, must stop a run before it trains
                pass
    encoded = {
        split: EncodedExamples(examples, encoder, num_labels=len(labels))
        for split, examples in evaluated.items()
    }
    for split, examples in evaluated.items():
        if users and examples.labelled:
            unscored = [example.id for example in examples if np.isnan(score(example, 0, labels))]
            if unscored:
                raise DataError(
                    f"split {split}: {len(unscored)} of {len(examples)} examples have no label to be scored "
                    f"by (first: {unscored[0]!r}); leave them out, or say labelled=False of the whole split"
                )
        encoder.prepare(examples)
        encoded[split].check_pictures()  # a damaged picture or region must stop a run before it trains
        if cache is not None:
            add_to_cache(cache, examples if whole_splits else examples[: config.probe_examples], worded)
    if cache is not None:
        _ = cache.teacher.logit_scale  # computed once, before runs side by side are forked from this process
    return PreparedData(
        config=config, train=train, evaluated=evaluated, encoder=encoder, idf=fit_idf(train),
        encoded=encoded, labels=labels,
    )  # fmt: skip


def encoder_of(config: RunConfig, cache: TeacherCache | None = None, student: str = "") -> StudentEncoder:
    """Opens the encoder of the run's student (or of a stored ``student``), with the regions that it reads.

    Regions that are computed on this machine are stored, see ``RegionEncoder.prepare``.
    """

    def regions() -> RegionSource:
        source = open_regions(config.regions, cache)
        return (
            CachedRegions(source, CACHE_ROOT / "regions") if isinstance(source, BackboneRegions) else source
        )

    name = student or config.student
    if name == "teacher":
        assert cache is not None
        return ClipFusionEncoder(cache.teacher, config.max_text_tokens)
    if config.regions == "clip" and not students.architecture(name).reads_regions:
        raise ConfigError(f"regions='clip' (arm clip_input) need a student that reads regions, not {name!r}")
    return students.open_encoder(name, config.max_text_tokens, regions)


def fit_idf(train: Examples) -> Idf:
    """Counts the words of a training split; of a large one, of ``COUNTED`` examples."""
    counted = spread(len(train), COUNTED)
    return Idf.fit(statement.text for index in counted for statement in train[index].statements())


def add_to_cache(
    cache: TeacherCache, examples: Sequence[Example], answers: AnswerStatements | None = None
) -> None:
    """Stores the teacher's features of all statements and pictures of the examples.

    With ``answers`` also the global embeddings of the answer statements, unless they are too many
    (ConfigError).
    """
    check_statements(len(examples), len(answers.labels) if answers else 0)
    for start in range(0, len(examples), AT_ONCE):
        part = [*examples[start : start + AT_ONCE]]  # each is made once, and read three times
        texts = [statement.text for example in part for statement in example.statements()]
        cache.add(texts=texts, pictures=[example.image for example in part])
        if answers:
            cache.add_pooled(text for example in part for text in answers(example))


def load_student(config: RunConfig, prepared: PreparedData) -> PreTrainedModel:
    """Loads the untrained student of a run, with the head of its task and embeddings for added tokens."""
    student: Any
    # Where each answer is decided by itself, it starts at the probability 1 / labels, as about one of them is
    # right. From 1/2 each, the first updates would only push thousands of biases down.
    bias = -math.log(max(1, len(prepared.labels) - 1)) if task_of(config).has_soft_labels else None
    if config.student == "teacher":
        source = config.teacher, config.teacher_pretrained
        student = open_teacher_as_student(*source, config.seed, prepared.labels, bias)
    else:
        student = students.load_student(config.student, config.seed, prepared.labels, bias)
    tokens = len(prepared.encoder.tokenizer)
    if tokens > student.config.vocab_size:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student.resize_token_embeddings(tokens)
    if isinstance(prepared.encoder, RegionEncoder) and prepared.encoder.foreign:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            drawn = {*student.renew_visual(prepared.encoder.regions.dim).parameters()}
        student.drawn = {name for name, parameter in student.named_parameters() if parameter in drawn}
        student.config.region_source = prepared.encoder.regions.fingerprint  # type: ignore[attr-defined]
    return student


def worded_answers(config: RunConfig, labels: tuple[str, ...]) -> AnswerStatements | None:
    """How the teacher reads labels in statements alone; None where it does not, or there are none."""
    if not labels or config.class_probabilities != "statements":
        return None
    return AnswerStatements(labels, task_of(config).verdicts)


def class_logits(
    config: RunConfig, prepared: PreparedData, subset: Sequence[Example]
) -> Callable[..., Tensor] | None:
    """The teacher's logits over the label set for one run; None where examples have choices."""
    if not prepared.labels:
        return None
    if answers := worded_answers(config, prepared.labels):
        return partial(statement_logits, prepared.cache, answers)
    fits = config.class_probabilities == "fit"
    if fits and task_of(config).verdicts is None:
        return AnswerPosterior(prepared.cache, subset, prepared.labels)
    return ClassProbe(prepared.cache, subset, len(prepared.labels), config.seed, fit_alone=fits)


def feature_reader_of(config: RunConfig, prepared: PreparedData, subset: Examples) -> TeacherFeatureReader:
    """Opens the reader of the teacher's features for the examples of a run.

    Args:
        config: of the run, with its arm applied.
        prepared: its data and cache, which must hold what the subset's examples show the teacher.
        subset: the labelled training examples.

    Raises:
        ConfigError: these settings have no such reader, as where the student sees one modality only.
    """
    if config.modality != "both":
        raise ConfigError(f"modality={config.modality!r} is for arms without a teacher, not {config.arm!r}")
    verdicts = task_of(config).verdicts
    if config.truth_weight > 0 and prepared.labels and verdicts is None:
        raise ConfigError(
            f"truth_weight={config.truth_weight:g}: the student of task={config.task!r} reads a question "
            "without an answer, which is neither true nor false; set truth_weight=0"
        )
    shown: dict[tuple[str, Path], Path] = {}
    if config.teacher_control == "shuffled_images":
        every = config.repair_pool == "train" or config.distils_unlabelled
        shown = shuffled_pictures(prepared.train if every else subset, config.seed)

    def seen_as(example: Example) -> Example:
        other = shown.get((example.id, example.image))  # another split may have the same ids
        return replace(example, image=other) if other else example

    seen = subset.mapped(seen_as) if shown else subset
    cache, logits, judge = prepared.cache, class_logits(config, prepared, seen), None
    answers = logits if isinstance(logits, AnswerPosterior) else None
    if config.asks_judge:
        judged = answers
        if prepared.labels and verdicts is None and judged is None:
            judged = AnswerPosterior(cache, seen, prepared.labels)
        judge = StatementJudge(cache, judged, [prepared.labels.index(label) for label in verdicts or ()])
    return TeacherFeatureReader(
        cache, prepared.idf, config, logits, seen_as,
        answers.statements if answers else worded_answers(config, prepared.labels),
        judge, token_centres(cache, seen) if config.centred_targets else None,
    )  # fmt: skip


def shuffled_pictures(examples: Sequence[Example], seed: int) -> dict[tuple[str, Path], Path]:
    """Gives each example another picture, by id and picture, by shifting all along one random cycle.

    Examples that share a picture share the new one too, so that the teacher stays consistent but wrong.
    """
    pictures = list(dict.fromkeys(example.image for example in examples))
    if len(pictures) < 2:
        raise ConfigError("teacher_control='shuffled_images': the training examples have one picture alone")
    order = np.random.default_rng(seed).permutation(len(pictures))
    following = {pictures[a]: pictures[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    return {(example.id, example.image): following[example.image] for example in examples}
