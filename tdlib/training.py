"""One training run: a student, finetuned or distilled, from configuration to run folder.

``TargetedDistillation`` joins the student with what training needs beside it (two linear maps that
are dropped afterwards); ``DistillationTrainer`` is transformers' Trainer with our loss, our log and
our saving. Everything about the teacher comes from the cache.
"""

import logging
import math
import platform
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tdlib.config import ROOT, ConfigError, RunConfig
from tdlib.examples import Example, Examples, TextPart, low_shot, save_manifest
from tdlib.files import write_folder, write_json, write_jsonl
from tdlib.functions import own_functions
from tdlib.objective import TERMS, TargetedDistillation
from tdlib.probe import ClassProbe, soft_target, statement_logits
from tdlib.records import END, ProbeRecorder, TargetRecord, write_records
from tdlib.relevance import STUDENT_RELEVANCE
from tdlib.students import catalogue as students
from tdlib.students.base import EncodedText, StudentEncoder, pad_last, student_inputs
from tdlib.students.clip import open_teacher_as_student
from tdlib.students.region_encoder import RegionEncoder
from tdlib.targets import TargetBuilder, Targets
from tdlib.tasks.catalogue import detail, measures, score, task_of, write_submission
from tdlib.teacher import EXTRAS

log = logging.getLogger(__name__)


class EncodedExamples(Dataset):
    """Examples as the student's inputs, with targets if a builder is given.

    What was encoded once is kept while it fits into ``memory`` bytes. ``num_labels`` is the size of
    the label set where examples have no choices. ``modality`` "text" blanks the picture, "image"
    every word (controls: what can be answered without the other?).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: StudentEncoder,
        builder: TargetBuilder | None = None,
        memory: int = 2**29,
        num_labels: int = 0,
        modality: str = "both",
    ):
        self.examples, self.encoder, self.builder = examples, encoder, builder
        self.num_labels, self.modality = num_labels, modality
        self._kept: dict[int, dict[str, Any]] = {}
        self._room = memory

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        item = {**self._encode(self.examples[index]), "row": index}
        targets = item["targets"]
        tensors = [*item.values(), *item["visual"].values(), *(vars(targets).values() if targets else ())]
        size = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[index] = item
        return item

    def _encode(self, example: Example) -> dict[str, Any]:
        if self.modality == "image":
            nothing = TextPart("")
            example = replace(example, prompt=nothing, choices=(nothing,) * len(example.choices))
        text = self.encoder.text(example)
        visual = self.encoder.visual(example)
        if self.modality == "text":
            visual = self.encoder.blank(visual)
        targets = (
            self.builder(example, text.spans, self.encoder.visual_boxes(visual)) if self.builder else None
        )
        label = -1 if example.label is None else example.label
        item = {**vars(text), "visual": visual, "label": label, "targets": targets}
        if example.annotators:
            item["soft"] = soft_target(example, self.num_labels)
        return item


def _targets_batch(items: Sequence[dict[str, Any]], length: int, visual: int) -> dict[str, Tensor]:
    """Targets of a batch; each example's text and visual tokens move to where the student has them."""
    columns = defaultdict(list)
    for item in items:
        targets: Targets = item["targets"]
        texts = item["input_ids"].shape[1]
        parts = {
            "vectors": targets.vectors, "scores": targets.scores, "valid": targets.valid,
            "target_spans": targets.tokens.spans, "target_boxes": targets.tokens.boxes,
            "relevance": targets.relevance, "prior": targets.prior,
        }  # fmt: skip
        for name, value in parts.items():
            pieces = (value[:, :texts], length), (value[:, texts:], visual)
            columns[name].append(torch.cat([pad_last([piece], size)[0] for piece, size in pieces], dim=1))
    batch = {name: torch.stack(values) for name, values in columns.items()}
    for name in ("teacher_logits", "text_global", "image_global"):
        batch[name] = torch.stack([getattr(item["targets"], name) for item in items])
    return batch


def collate(items: Sequence[dict[str, Any]], encoder: StudentEncoder) -> dict[str, Tensor]:
    """One batch: texts padded to the longest, pictures to the largest."""
    length = max(item["input_ids"].shape[1] for item in items)
    padding = {"input_ids": encoder.tokenizer.pad_token_id, "objects": -1}
    batch = {
        field.name: pad_last([item[field.name] for item in items], length, value=padding.get(field.name, 0))
        for field in fields(EncodedText)
    }
    batch |= encoder.pad_visual([item["visual"] for item in items])
    batch["labels"] = torch.tensor([item["label"] for item in items])
    batch["rows"] = torch.tensor([item["row"] for item in items])
    if "soft" in items[0]:
        batch["soft"] = torch.stack([item["soft"] for item in items])
    if items[0]["targets"] is not None:
        visual = max(i["targets"].valid.shape[1] - i["input_ids"].shape[1] for i in items)
        batch |= _targets_batch(items, length, visual)
    return batch


class DistillationTrainer(Trainer):
    """Trainer that optimises ``TargetedDistillation``.

    Overrides: the loss (so that terms are logged without a synchronisation per step), the
    optimizer's groups (new layers learn at ``head_learning_rate``), and the log. ``diagnostics`` are
    recorded every ``diagnostics_every`` updates.
    """

    def __init__(self, *, config: RunConfig, **options: Any):
        super().__init__(**options)
        self.settings = config
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self.diagnostics: list[dict[str, Any]] = []
        self._last_step = 0
        self._window: list[Tensor] = []  # rows of the examples since the last update
        self.model_accepts_loss_kwargs = True  # sums are divided by the window's number of examples

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        module = self.accelerator.unwrap_model(model)
        module.progress = self.state.global_step / max(1, self.state.max_steps)
        window = None if num_items_in_batch is None else int(num_items_in_batch)
        every = self.settings.diagnostics_every
        if every and self.state.global_step % every == 0 and not self._window:
            step = {"step": self.state.global_step}
            self.diagnostics.append(step | diagnose(module, inputs))
        self._window.append(inputs["rows"])
        output = model(inputs, window)
        if not bool(output["loss"].isfinite()):
            bad = [name for name in output if name not in ("loss", "logits") and not output[name].isfinite()]
            self.refuse(f"{', '.join(bad) or 'loss'} not finite")
        for name, value in output.items():
            if name != "logits":
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        return (output["loss"], output) if return_outputs else output["loss"]

    def refuse(self, what: str) -> None:
        """Ends the run before the optimizer steps; names the examples since the last update."""
        data = self.train_dataset
        assert isinstance(data, EncodedExamples)
        ids = [data.examples[row].id for row in torch.cat(self._window).tolist()]
        shown = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise FloatingPointError(
            f"update {self.state.global_step + 1}: {what}, examples {shown}; lower learning_rate, or look at "
            "these examples"
        )

    def create_optimizer(self, model=None):
        config = self.settings
        assert self.model is not None
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            is_new = name.startswith(("phi.", "log_variance.", "student.classifier."))
            groups[is_new, parameter.ndim > 1].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": config.head_learning_rate if is_new else config.learning_rate,
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
                for (is_new, decays), parameters in groups.items()
            ]
        )
        return self.optimizer

    def log(self, logs, start_time=None):
        updates = self.state.global_step - self._last_step  # each term is a mean over an update's examples
        if updates and ("loss" in logs or "train_loss" in logs):  # the latter ends the training
            means = {name: float(value) / updates for name, value in self._sums.items()}
            self.history.append({"step": self.state.global_step, **means})
            logs = {**logs, **{name: round(value, 4) for name, value in means.items()}}
            self._sums, self._last_step = {}, self.state.global_step
        super().log(logs, start_time)


class _StopAtBadGradient(TrainerCallback):
    """Ends a run whose gradients are not finite, before the optimizer steps."""

    trainer: DistillationTrainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not bool(nn.utils.get_total_norm(gradients).isfinite()):  # clipping has spread it to all
            self.trainer.refuse("gradient not finite")
        self.trainer._window.clear()


class _RecordTargets(TrainerCallback):
    """Records what is targeted in the probes, before the first update and every few."""

    def __init__(self, recorders: Sequence[ProbeRecorder], every: int):
        self.recorders, self.every = recorders, every

    def on_train_begin(self, args, state, control, **kwargs):
        self._record(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        for recorder in self.recorders:
            recorder.record(step)


def diagnose(module: TargetedDistillation, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What pulls at the student in this batch; changes nothing, not even random states.

    Norms of each term's gradient with respect to the student's parameters (as the terms stand in the
    log: before their weights) and the cosines between them, quartiles of the instance weights, and the
    share of examples on which teacher and student choose the same.
    """
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    drawn = module.generator.get_state()
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    with torch.random.fork_rng(devices):
        output = module(batch)
    module.generator.set_state(drawn)
    gradients = {}
    for name in (*TERMS, "adversarial"):
        if name in output:
            parts = torch.autograd.grad(output[name], parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, parts, strict=True)
            whole = [torch.zeros_like(p) if part is None else part for p, part in pairs]
            gradients[name] = torch.cat([part.flatten() for part in whole])
    found: dict[str, Any] = {f"{name}_gradient": float(g.norm()) for name, g in gradients.items()}
    names = list(gradients)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            cosine = nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0)
            found[f"{first}_{second}_cosine"] = float(cosine)
    if "teacher_logits" in batch:
        logits = output["logits"].detach()
        agree = batch["teacher_logits"].argmax(-1) == logits.argmax(-1)
        quartiles = (
            module.instance_weights(batch, logits)
            .float()
            .quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=logits.device))
        )
        found["instance_weight_quartiles"] = [round(value, 4) for value in quartiles.tolist()]
        found["teacher_agreement"] = float(agree.float().mean())
    return found


def make_trainer(
    module: TargetedDistillation,
    config: RunConfig,
    dataset: EncodedExamples,
    folder: Path,
    show_progress: bool = False,
    log_every: int = 10,
) -> DistillationTrainer:
    """A trainer for one run; same data order and updates for every arm of the same seed."""
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=config.epochs, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation, learning_rate=config.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=config.warmup_fraction, max_grad_norm=1.0,
        logging_steps=log_every, save_strategy="no", report_to=[], seed=config.seed,
        data_seed=config.seed, remove_unused_columns=False, dataloader_pin_memory=False,
        disable_tqdm=not show_progress, logging_nan_inf_filter=False, label_names=["labels"],
    )  # fmt: skip
    stop = _StopAtBadGradient()
    trainer = stop.trainer = DistillationTrainer(
        config=config, model=module, args=arguments, train_dataset=dataset, callbacks=[stop],
        data_collator=partial(collate, encoder=dataset.encoder),
    )  # fmt: skip
    if not show_progress:
        trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@torch.inference_mode()
def predict(student: PreTrainedModel, dataset: EncodedExamples, batch_size: int = 32) -> np.ndarray:
    """Probabilities over choices or labels, (examples, choices or labels). No example is left out."""
    student.eval()
    device = next(student.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: dataset[i]["input_ids"].shape[1])
    rows: list[Tensor | None] = [None] * len(dataset)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([{**dataset[i], "targets": None} for i in chosen], dataset.encoder)
        output = student(**{name: value.to(device) for name, value in student_inputs(student, batch).items()})
        for i, row in zip(chosen, output.logits.float().softmax(-1).cpu(), strict=True):
            rows[i] = row
    return torch.stack([row for row in rows if row is not None]).numpy()


def record_targets(
    example: Example,
    item: dict[str, Any],
    encoder: StudentEncoder,
    module: TargetedDistillation,
    probabilities: np.ndarray,
) -> list[TargetRecord]:
    """What the method targets in each statement of one example, given the student's probabilities."""
    targets: Targets = item["targets"]
    batch = collate([item], encoder)
    hidden = None
    if module.settings.relevance in STUDENT_RELEVANCE:
        with torch.inference_mode():
            output = module.student(**student_inputs(module.student, batch), output_hidden_states=True)
        hidden = output.hidden_states[module.settings.distill_layer]
    relevance, scores = (value[0].numpy() for value in module.scores(batch, hidden))
    selected, weights = module.choose_tokens(batch, hidden)
    teacher = targets.teacher_logits.softmax(-1)
    label = example.label
    weight = teacher_p = student_p = None
    if label is not None:
        logits = torch.tensor(probabilities).log()[None]
        weight = float(module.instance_weights(batch, logits)[0])
        teacher_p, student_p = float(teacher[label]), float(probabilities[label])
    records = []
    for choice, statement in enumerate(example.statements()):
        spans = targets.tokens.spans[choice].numpy()
        records.append(
            TargetRecord(
                example_id=example.id, choice=choice, label=label, prediction=int(probabilities.argmax()),
                text=statement.text, references=statement.references, image=example.image,
                object_boxes=example.boxes, object_names=example.names,
                tokens=tuple(statement.text[start:end] for start, end in spans), spans=spans,
                boxes=targets.tokens.boxes[choice].numpy(), distilled=targets.valid[choice].numpy(),
                relevance=relevance[choice], prior=targets.prior[choice].numpy(),
                score=scores[choice], selected=selected[0, choice].numpy(),
                weight=weights[0, choice].numpy(), teacher_probability=teacher_p,
                student_probability=student_p, instance_weight=weight, relevant_spans=statement.relevant,
                relevant_boxes=example.relevant_boxes, truth=example.truth,
            )
        )  # fmt: skip
    return records


@dataclass(frozen=True)
class Materials:
    """What the arms of one comparison share: data, encoder and cached teacher."""

    train: Examples
    evaluated: dict[str, Examples]
    encoder: StudentEncoder
    builder: TargetBuilder | None
    encoded: dict[str, EncodedExamples]
    labels: tuple[str, ...] = ()  # the label set, where examples have no choices


def environment() -> dict[str, Any]:
    """Versions and hardware of this run."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "code": commit, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def shuffled_pictures(examples: Sequence[Example], seed: int) -> dict[str, Path]:
    """For each example another's picture, the same for all of one picture: one cycle of all pictures."""
    pictures = list(dict.fromkeys(example.image for example in examples))
    order = np.random.default_rng(seed).permutation(len(pictures))
    following = {pictures[a]: pictures[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    return {example.id: following[example.image] for example in examples}


def class_logits(
    config: RunConfig, materials: Materials, subset: Sequence[Example]
) -> Callable[..., Tensor] | None:
    """The teacher's logits over the label set for one run; None where examples have choices."""
    if not materials.labels or materials.builder is None:
        return None
    cache = materials.builder.cache
    if config.class_probabilities == "probe":
        return ClassProbe(cache, subset, len(materials.labels), config.seed)
    return partial(statement_logits, cache, materials.labels)


def train_run(
    config: RunConfig, materials: Materials, folder: Path, show_progress: bool = False
) -> dict[str, Any]:
    """Trains one arm with one seed, evaluates it and writes the run folder.

    The folder holds config.json, manifest.json (ids of the training subset), history.jsonl,
    diagnostics.jsonl (if asked for), functions.json (source of the functions that the user added),
    metrics.json, predictions.parquet, selections.parquet, environment.json, the submission file if
    one is asked for, and student/ (loadable with ``from_pretrained``; exactly the baseline's
    parameters). Returns the metrics.
    """
    started = time.time()
    if not show_progress:
        transformers.utils.logging.disable_progress_bar()
    subset = low_shot(materials.train, config.shots, config.seed)
    student = load_student(config, materials)
    shared = materials.builder  # its cache and word statistics; the settings are this arm's
    needs_teacher = config.distill_weight > 0 or config.choice_weight > 0
    if needs_teacher and shared is None:
        raise ConfigError(f"arm={config.arm!r} needs a teacher, but the materials were prepared without one")
    if needs_teacher and config.modality != "both":
        raise ConfigError(f"modality={config.modality!r} is for arms without a teacher, not {config.arm!r}")
    own = None
    if needs_teacher and shared is not None:
        shown = shuffled_pictures(subset, config.seed) if config.teacher_control == "shuffled_images" else {}

        def seen_as(example: Example) -> Example:
            return replace(example, image=shown[example.id]) if example.id in shown else example

        seen = [seen_as(example) for example in subset] if shown else subset
        logits = class_logits(config, materials, seen)
        own = TargetBuilder(shared.cache, shared.idf, config, logits, seen_as)
        if config.relevance in (*EXTRAS, "gradient"):
            own.prepare(subset)
    encode = partial(
        EncodedExamples,
        encoder=materials.encoder,
        num_labels=len(materials.labels),
        modality=config.modality,
    )
    dataset = encode(subset, builder=own)
    module = TargetedDistillation(student, config, shared.cache.teacher.dim if shared else None)
    metrics: dict[str, Any] = {"arm": config.arm, "seed": config.seed, "train_examples": len(subset)}
    if own is not None and isinstance(own.class_logits, ClassProbe):
        metrics["probe_accuracy"] = own.class_logits.held_out_accuracy

    gather = partial(collate, encoder=materials.encoder)

    def fill(partial: Path) -> None:
        trainer = make_trainer(module, config, dataset, partial / "trainer", show_progress)
        if module.phi is not None:
            with torch.random.fork_rng():  # a loader draws a seed
                module.fit_phi(DataLoader(dataset, config.batch_size, collate_fn=trainer.data_collator))
        recorders = {}
        if module.phi is not None and config.probe_examples:
            for split, examples in materials.evaluated.items():
                probes = encode(examples[: config.probe_examples], builder=own)
                recorders[split] = ProbeRecorder(probes, gather, module, split)
        if recorders and config.probe_every:
            trainer.add_callback(_RecordTargets([*recorders.values()], config.probe_every))
        began = time.time()
        trainer.train()
        metrics["train_seconds"] = round(time.time() - began, 2)
        metrics["updates"] = trainer.state.global_step
        metrics.update(accuracy={}, measures={}, detail={})
        frames = []
        for split, examples in materials.evaluated.items():
            encoded = materials.encoded[split]
            if config.modality != "both":
                encoded = encode(examples, memory=0)
            probabilities = predict(student, encoded)
            if split in recorders:
                recorders[split].record(END)
            table = prediction_table(split, examples, probabilities, materials.labels)
            if examples.labelled:
                found = measures(config, table["id"], table["score"])
                metrics["accuracy"][split] = next(iter(found.values()))
                metrics["measures"][split] = found
                metrics["detail"][split] = detail(table)
            if split == config.submission_split:
                path = write_submission(config, partial, examples, probabilities, materials.labels)
                metrics["submission"] = path.name
            frames.append(table)
        metrics["seconds"] = round(time.time() - started, 2)
        pd.concat(frames).to_parquet(partial / "predictions.parquet", index=False)
        if records := [record for recorder in recorders.values() for record in recorder.records]:
            write_records(records, partial / "selections.parquet")
        write_json(partial / "config.json", config.model_dump())
        write_json(partial / "metrics.json", metrics)
        write_json(partial / "environment.json", environment())
        write_jsonl(partial / "history.jsonl", trainer.history)
        if trainer.diagnostics:
            write_jsonl(partial / "diagnostics.jsonl", trainer.diagnostics)
        if functions := own_functions(config):
            write_json(partial / "functions.json", functions)
        save_manifest(partial / "manifest.json", subset, config.shots, config.seed)
        shutil.rmtree(partial / "trainer", ignore_errors=True)  # the Trainer's own folder: nothing is in it
        student.save_pretrained(partial / "student")
        materials.encoder.save(partial / "student")

    log.info("%s, seed %d: %d examples, %d epochs", config.arm, config.seed, len(subset), config.epochs)
    write_folder(folder, fill)
    return metrics


def load_student(config: RunConfig, materials: Materials) -> PreTrainedModel:
    """The untrained student of a run, with the head of its task and room for added tokens."""
    student: Any
    if config.student == "teacher":
        source = config.teacher, config.teacher_pretrained
        student = open_teacher_as_student(*source, config.seed, materials.labels)
    else:
        student = students.load_student(config.student, config.seed, materials.labels)
    tokens = len(materials.encoder.tokenizer)
    if tokens > student.config.vocab_size:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student.resize_token_embeddings(tokens)
    if isinstance(materials.encoder, RegionEncoder) and materials.encoder.foreign:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student.renew_visual(materials.encoder.regions.dim)
    if task_of(config).data_set.startswith("vqa"):
        head = [layer for layer in student.classifier.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.constant_(head.bias, -math.log(max(1, len(materials.labels) - 1)))  # one answer of all
    return student


def preview_targets(
    config: RunConfig, materials: Materials, examples: Sequence[Example]
) -> list[TargetRecord]:
    """What the method would target in examples before any training: one record per statement.

    The student is the untrained one; what the cache lacks is added to it. Any example will do, also
    one of your own (``Example`` with a picture and a text).
    """
    assert materials.builder is not None
    shared = materials.builder
    logits = class_logits(config, materials, low_shot(materials.train, config.shots, config.seed))
    builder = TargetBuilder(shared.cache, shared.idf, config, logits)
    builder.prepare(examples)
    materials.encoder.prepare(examples)
    encoded = EncodedExamples(examples, materials.encoder, builder, num_labels=len(materials.labels))
    student = load_student(config, materials)
    module = TargetedDistillation(student, config, shared.cache.teacher.dim).eval()
    probabilities = predict(student, encoded)
    records = []
    for index, example in enumerate(examples):
        records += record_targets(example, encoded[index], encoded.encoder, module, probabilities[index])
    return records


def prediction_table(
    split: str, examples: Sequence[Example], probabilities: np.ndarray, labels: Sequence[str] = ()
) -> pd.DataFrame:
    """One row per example: id, picture, stratum, label, prediction, score in [0, 1], probabilities.

    ``score`` is missing where there is no label. Probabilities over more than 16 labels are not kept.
    """
    examples, predictions = Examples.of(examples), probabilities.argmax(-1)
    rows = [
        (example.image.name, example.label, example.answer_type, score(example, int(prediction), labels))
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    few = probabilities.shape[1] <= 16
    return pd.DataFrame(
        {
            "split": split,
            "id": examples.ids,
            "image": [row[0] for row in rows],
            "stratum": examples.strata,
            "answer_type": [row[2] for row in rows],
            "label": pd.array([row[1] for row in rows], dtype="Int64"),
            "prediction": predictions,
            "answer": [labels[i] if labels else "" for i in predictions],
            "score": [row[3] for row in rows],
            "probability": probabilities.max(-1),
            "probabilities": [row.tolist() if few else None for row in probabilities],
        }
    )
