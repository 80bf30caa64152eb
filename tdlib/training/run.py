"""Executes one training run, from configuration to run folder, and all arms of a comparison.

Everything about the teacher comes from the cache. A run may be interrupted and continued from its
checkpoints, or shared by several processes; neither changes what it computes.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list

from tdlib.config import RunConfig, apply_arm, check_arm, check_common
from tdlib.core.files import refuse_foreign, write_folder, write_json, write_jsonl
from tdlib.core.paths import ConfigError
from tdlib.core.records import END, write_records
from tdlib.data.examples import Examples, low_shot, save_manifest
from tdlib.data.tasks import task_of
from tdlib.students.base import report_cut
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.teacher.probe import ClassProbe, count_cut
from tdlib.teacher.towers import EXTRAS
from tdlib.training import checkpoints
from tdlib.training import prepare as preparation
from tdlib.training.data import EncodedExamples, fitting_batches
from tdlib.training.evaluation import evaluate, evaluate_again, finish
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.pools import picture_pool, unlabelled_examples
from tdlib.training.prepare import (
    PREPARED,
    SHARED,
    PreparedData,
    add_to_cache,
    feature_reader_of,
    load_student,
    prepare,
    worded_answers,
)
from tdlib.training.processes import first_process_first, launch, must_launch, place_among_processes
from tdlib.training.recording import ProbeRecorder, RecordTargets
from tdlib.training.repairing import rows_of
from tdlib.training.run_folders import (
    IDENTITY,
    archive_previous_run,
    environment,
    finished,
    pending_evaluation,
    run_identity,
    user_parts,
)
from tdlib.training.trainer import CheckpointKeeper, make_trainer
from tdlib.training.workers import side_by_side

log = logging.getLogger(__name__)


def compare(
    config: RunConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    on_run: Callable[[dict], None] | None = None,
    show_progress: bool = False,
    reuse: bool = False,
    workers: int = 1,
) -> list[Path]:
    """Runs every arm with every seed; returns the run folders.

    All arms of a seed train on the same examples for the same number of updates.

    Args:
        config: the arms' common settings.
        arms: keys of ``arms.ARMS``.
        seeds: one run of each arm for each.
        folder: that the run folders are written to.
        on_run: called with each run's metrics when it is done; ``reused`` marks one of an earlier call.
        show_progress: draw a bar for each run.
        reuse: keep the runs that an earlier call has finished in ``folder``, if everything that their
            results depend on (``run_identity``) is still the same.
        workers: runs that train side by side, see ``workers.side_by_side``.

    Raises:
        ConfigError: an unknown arm, a bad value in one, or one that changes what all arms share; or
            settings that ``apply_arm`` has made one arm's already.
    """
    check_common(config, arms)
    runs = [apply_arm(config.model_copy(update={"arm": arm, "seed": seed})) for seed in seeds for arm in arms]
    for run in runs:
        changed = [name for name in SHARED if getattr(run, name) != getattr(config, name)]
        if changed:
            raise ConfigError(
                f"arm {run.arm!r} changes {', '.join(changed)}, which all arms of a comparison share"
            )
    prepared: dict[tuple, PreparedData] = {}
    for run in runs:  # all before the first training, so that missing files are reported now
        if _prepared(run) not in prepared:
            sharing = (other for other in runs if _prepared(other) == _prepared(run))
            prepared[_prepared(run)] = prepare(run, seeds, any(other.asks_teacher for other in sharing))
    folders = {f"{run.arm}-seed{run.seed}": run for run in runs}
    jobs = []
    # The longest first, so that no core waits for the other at the end.
    for name, run in sorted(folders.items(), key=lambda item: -passes_per_update(item[1]) * (workers > 1)):
        place, of_run = Path(folder) / name, prepared[_prepared(run)]
        subset = low_shot(of_run.train, run.shots, run.seed)
        if reuse and (metrics := finished(place, run_identity(run, subset))) is not None:
            if on_run:
                on_run(metrics | {"reused": True})
        else:
            jobs.append(partial(train_run, run, of_run, place, show_progress))
    for _, metrics in side_by_side(jobs, workers):
        if on_run:
            on_run(metrics)
    return [Path(folder) / name for name in folders]


# Parameters of preparation that may differ: a run that asks for more than is there reports what is missing.
CHOSEN_LATER = ("shots", "probe_examples", "submission_split")


def _prepared(config: RunConfig) -> tuple:
    return tuple(getattr(config, name) for name in PREPARED)


def train_run(
    config: RunConfig, prepared: PreparedData, folder: Path, show_progress: bool = False
) -> dict[str, Any]:
    """Trains one arm with one seed, evaluates it and writes the run folder.

    The folder holds config.json, identity.json (``run_identity``), manifest.json (ids of the training
    subset), history.jsonl, diagnostics.jsonl (with ``diagnostics_every``), functions.json (source of the
    functions that the user added), metrics.json, predictions.parquet, selections.parquet,
    environment.json, the submission file (with ``submission_split``), and student/ (loadable with
    ``from_pretrained``; exactly the baseline's parameters; with a model card). It replaces an older run of
    the same settings; a run of others is kept beside it (``archive_previous_run``). Returns the metrics.

    With ``checkpoint_every``, a run that was interrupted in training and is called again with the same
    settings and folder continues from its last whole checkpoint, and ends as if it had not been
    interrupted (on the CPU bit for bit). With ``processes`` above 1 they are started here
    (``training.processes``), unless this is one of them.

    If the evaluation fails, the folder is written nevertheless, with the trained student and the mark
    ``UNEVALUATED`` instead of metrics and predictions. The same call then only evaluates that student.

    Raises:
        ConfigError: settings that do not fit each other or the prepared data, or checkpoints of another run.
        FloatingPointError: a loss or gradient was not finite; names term and examples.
    """
    check_arm(config)
    others = [
        f"{name}={getattr(config, name)!r}, prepared with {getattr(prepared.config, name)!r}"
        for name in (*SHARED, *PREPARED)
        if name not in CHOSEN_LATER and getattr(config, name) != getattr(prepared.config, name)
    ]
    if config.submission_split and config.submission_split not in prepared.evaluated:
        others.append(f"submission_split={config.submission_split!r}, not prepared")
    if others:
        raise ConfigError(f"{'; '.join(others)}: call prepare(config) again, with these settings")
    refuse_foreign(Path(folder), "config.json", IDENTITY, checkpoints.UNEVALUATED)
    subset = low_shot(prepared.train, config.shots, config.seed)
    if (pending := pending_evaluation(folder, config, subset)) is not None:
        if place_among_processes() > 0:  # the first process evaluates alone
            return pending
        return evaluate_again(config, prepared, folder, pending)
    if must_launch(config):
        return launch(config, folder, preparation.CACHE_ROOT, show_progress)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not show_progress:
        transformers.utils.logging.disable_progress_bar()
    run = _Run(config, prepared, subset, checkpoints.checkpoints_of(folder))
    log.info("%s, seed %d: %d examples, %d epochs", config.arm, config.seed, len(subset), config.epochs)
    if place_among_processes() > 0:  # only the first process evaluates and writes
        with tempfile.TemporaryDirectory() as elsewhere:  # what this process writes is deleted
            run.train(Path(elsewhere), show_progress)
        return run.metrics
    failures: list[BaseException] = []

    def fill(partial: Path) -> None:
        run.train(partial, show_progress)
        run.write(partial)
        try:
            run.evaluate(partial)
            archive_previous_run(folder, config)
        except BaseException as error:  # also an interruption: hours of training must not be lost
            failures.append(error)
            identity = run_identity(config, subset, files=False)
            mark = {"error": repr(error), "run": identity, "metrics": run.metrics}
            write_json(partial / checkpoints.UNEVALUATED, mark)
            archive_previous_run(folder, None)

    write_folder(folder, fill)
    if config.checkpoint_every:
        checkpoints.remove(run.checkpoints)
    for error in failures:
        error.add_note(f"the trained student is kept in {folder}; the same call evaluates it again")
        raise error
    return run.metrics


class _Run:
    """The state of one run; its stages are ``train``, ``write`` and ``evaluate``."""

    def __init__(self, config: RunConfig, prepared: PreparedData, subset: Examples, home: Path):
        self.started = time.time()
        self.config, self.prepared, self.subset, self.checkpoints = config, prepared, subset, home
        self.student = load_student(config, prepared)
        with first_process_first():
            self.feature_reader = self._open_feature_reader()
            self.pool = picture_pool(config, prepared, subset, self.feature_reader)
            self.unlabelled = unlabelled_examples(config, prepared, subset, self.feature_reader)
        self.encode = partial(
            EncodedExamples,
            encoder=prepared.encoder,
            num_labels=len(prepared.labels),
            modality=config.modality,
            soft_labels=task_of(config).has_soft_labels,
        )
        self.dataset = self.encode(subset, feature_reader=self.feature_reader)
        teacher_dim = prepared.cache.teacher.dim if config.distill_weight > 0 else None
        self.module = TargetedDistillation(self.student, config, teacher_dim)
        self.seconds_before = 0.0  # of training before the last interruption
        self.metrics: dict[str, Any] = {
            "arm": config.arm, "seed": config.seed, "train_examples": len(subset)
        }  # fmt: skip
        teacher = self.feature_reader.class_logits if self.feature_reader else None
        if isinstance(teacher, ClassProbe | AnswerPosterior):
            self.metrics["teacher_accuracy"] = teacher.held_out_accuracy

    def _open_feature_reader(self) -> TeacherFeatureReader | None:
        """Opens the reader of the teacher's features and fills the cache; None for arms without a teacher."""
        config, prepared = self.config, self.prepared
        if not config.asks_teacher:
            return None
        feature_reader = feature_reader_of(config, prepared, self.subset)
        if config.distils_unlabelled or (config.repair_pool == "train" and config.asks_judge):
            answers = worded_answers(config, prepared.labels) if config.distils_unlabelled else None
            add_to_cache(prepared.cache, prepared.train.mapped(feature_reader.seen_as), answers)
        if config.relevance in (*EXTRAS, "gradient"):
            feature_reader.prepare(prepared.train if config.distils_unlabelled else self.subset)
        return feature_reader

    def _count_cut_texts(self) -> None:
        """Counts the texts that teacher and student have to cut, and warns of them.

        Called after a checkpoint was compared with this run, so that a refused one costs no time.
        """
        if self.feature_reader is not None:
            seen = map(self.feature_reader.seen_as, self.subset)
            cut = count_cut(seen, self.feature_reader.cache.cut, self.feature_reader.answers)
            self.metrics["teacher_cut_examples"] = cut.cut_examples
            if cut.cut_examples:
                log.warning("%s", cut)
        texts = {"train": self.subset, **self.prepared.evaluated}
        self.metrics["student_cut_texts"] = {
            split: report_cut(self.prepared.encoder, examples, split) for split, examples in texts.items()
        }

    def train(self, partial: Path, show_progress: bool) -> None:
        """Trains the student; with ``checkpoint_every`` from the last whole checkpoint on."""
        config, rank = self.config, place_among_processes()
        keeps = config.checkpoint_every > 0
        place = partial / "trainer"
        if keeps:
            home = self.checkpoints
            place = checkpoints.staging(home) if rank == 0 else home / checkpoints.STAGING
        self.trainer = make_trainer(
            self.module, config, self.dataset, place, show_progress,
            pool=self.pool, unlabelled=self.unlabelled,
        )  # fmt: skip
        self.recorders = self._recorders() if rank == 0 else []
        if self.recorders and config.probe_every:
            self.trainer.add_callback(RecordTargets(self.recorders, config.probe_every))
        whole, self.resumed = None, list[int]()
        if keeps:
            identity = run_identity(config, self.subset)
            keeper = CheckpointKeeper(self.trainer, home, identity, self.recorders)
            self.trainer.add_callback(keeper)
            if whole := _agreed(checkpoints.newest(home, identity) if rank == 0 else None):
                keeper.restore(whole)
            self.resumed, self.seconds_before = keeper.resumed, keeper.seconds
        self._count_cut_texts()
        if self.module.phi is not None and whole is None:
            self.module.fit_phi(fitting_batches(self.dataset, config))
        began = time.time()
        self.trainer.train(**({"resume_from_checkpoint": str(whole)} if whole else {}))
        self.metrics["train_seconds"] = round(self.seconds_before + time.time() - began, 2)
        self.metrics["updates"] = self.trainer.state.global_step
        if self.metrics["updates"]:
            share = self.metrics["train_seconds"] / self.metrics["updates"]
            self.metrics["seconds_per_update"] = round(share, 4)
        self.metrics["passes_per_update"] = passes_per_update(config)
        for recorder in self.recorders:
            recorder.record(END)

    def _recorders(self) -> list[ProbeRecorder]:
        """Opens a recorder for the probes of each evaluated split, if the run distils or re-pairs."""
        targets = self.module.phi is not None or self.module.repairing is not None
        if not targets or not self.config.probe_examples:
            return []
        probes = {
            split: self.encode(examples[: self.config.probe_examples], feature_reader=self.feature_reader)
            for split, examples in self.prepared.evaluated.items()
        }
        return [ProbeRecorder(examples, self.module, split) for split, examples in probes.items()]

    def write(self, partial: Path) -> None:
        """Writes what training produced: the student, the log and the records of targets."""
        config = self.config
        if records := [record for recorder in self.recorders for record in recorder.records]:
            write_records(records, partial / "selections.parquet")
        write_json(partial / "config.json", config.model_dump())
        write_json(partial / IDENTITY, run_identity(config, self.subset))
        resumed = {"resumed_after_updates": self.resumed} if self.resumed else {}
        write_json(partial / "environment.json", environment() | resumed)
        write_jsonl(partial / "history.jsonl", self.trainer.history)
        if self.trainer.diagnostics:
            write_jsonl(partial / "diagnostics.jsonl", self.trainer.diagnostics)
        if parts := user_parts(config):
            write_json(partial / "functions.json", parts)
        save_manifest(partial / "manifest.json", self.subset, config.shots, config.seed)
        shutil.rmtree(partial / "trainer", ignore_errors=True)  # the Trainer's own folder: nothing is in it
        self.student.save_pretrained(partial / "student")
        self.prepared.encoder.save(partial / "student")

    def evaluate(self, partial: Path) -> None:
        """Evaluates the trained student and writes metrics, predictions and the model card."""
        self.metrics |= evaluate(self.config, self.prepared, self.student, partial)
        self.metrics["seconds"] = round(self.seconds_before + time.time() - self.started, 2)
        finish(self.config, self.metrics, self.student, partial)


def passes_per_update(config: RunConfig) -> float:
    """How often an example of a full batch passes through the student at each update: once in finetuning."""
    size = config.batch_size
    repaired = rows_of(config.repair_share, size) / size if config.repair_weight > 0 else 0
    more = max(1, round(config.feature_share * size)) / size if config.distils_unlabelled else 0
    return 1 + config.adversarial_steps + repaired + more


def _agreed(checkpoint: Path | None) -> Path | None:
    """Sends the checkpoint that the first process chose to all of them."""
    shared = [checkpoint]
    broadcast_object_list(shared)
    return shared[0]
