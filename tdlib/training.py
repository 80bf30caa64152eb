"""One training run: a student, finetuned or distilled, from configuration to run folder.

``TargetedDistillation`` joins the student with what training needs beside it (two linear maps that
are dropped afterwards); ``DistillationTrainer`` is transformers' Trainer with our loss, our log and
our saving. Everything about the teacher comes from the cache.
"""

import logging
import math
import platform
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
from transformers import Trainer, TrainerCallback, TrainingArguments

from tdlib.config import ROOT, ConfigError, RunConfig
from tdlib.examples import Example, Examples, TextPart, low_shot, save_manifest
from tdlib.files import write_folder, write_json, write_jsonl
from tdlib.losses import choice_distribution_loss, targeted_distillation_loss
from tdlib.probe import ClassProbe, soft_target, statement_logits
from tdlib.records import TargetRecord, records_table
from tdlib.selection import SelectionOptions, select
from tdlib.students.base import EncodedText, StudentEncoder, StudentOutput, pad_last
from tdlib.students.vilt import ViltForMultipleChoice, load_vilt
from tdlib.targets import TargetBuilder, Targets
from tdlib.tasks.catalogue import detail, measures, score, task_of, write_submission
from tdlib.tokens import Tokens
from tdlib.weighting import INSTANCE_WEIGHTS, TOKEN_WEIGHTS

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
        item = self._encode(self.examples[index])
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
        }  # fmt: skip
        for name, value in parts.items():
            pieces = (value[:, :texts], length), (value[:, texts:], visual)
            columns[name].append(torch.cat([pad_last([piece], size)[0] for piece, size in pieces], dim=1))
    batch = {name: torch.stack(values) for name, values in columns.items()}
    return {**batch, "teacher_logits": torch.stack([item["targets"].teacher_logits for item in items])}


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
    if "soft" in items[0]:
        batch["soft"] = torch.stack([item["soft"] for item in items])
    if items[0]["targets"] is not None:
        visual = max(i["targets"].valid.shape[1] - i["input_ids"].shape[1] for i in items)
        batch |= _targets_batch(items, length, visual)
    return batch


def student_inputs(student: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a student's ``forward`` takes of a batch."""
    return {name: batch[name] for name in student.inputs}  # type: ignore[union-attr]


class TargetedDistillation(nn.Module):
    """A student with the loss of the method.

    ``phi`` is one linear map per modality from the student's width to the teacher's joint space;
    it exists only here and is dropped after training (method, step 8; our reading).
    """

    def __init__(self, student: ViltForMultipleChoice, config: RunConfig, teacher_dim: int | None):
        super().__init__()
        layers = student.config.num_hidden_layers + 1
        if not -layers <= config.distill_layer < layers:
            raise ConfigError(
                f"distill_layer={config.distill_layer}: the student has hidden states {-layers} to "
                f"{layers - 1}"
            )
        self.student, self.settings = student, config
        self.phi: nn.ModuleDict | None = None
        if config.distill_weight > 0 and teacher_dim is not None:
            width = student.config.hidden_size
            with torch.random.fork_rng():  # the baseline's random numbers stay what they are
                torch.manual_seed(config.seed)
                self.phi = nn.ModuleDict({name: nn.Linear(width, teacher_dim) for name in ("text", "visual")})
        self.options = SelectionOptions(config.mass, config.count, config.fraction, config.deviations)
        self.generator = torch.Generator().manual_seed(config.seed)

    def forward(self, batch: dict[str, Tensor], window: int | None = None) -> dict[str, Tensor]:
        """The loss and its terms.

        ``window`` is the number of examples in the whole accumulation window; sums are divided by it.
        """
        config = self.settings
        output = self.student(
            **student_inputs(self.student, batch), output_hidden_states=self.phi is not None
        )
        labels = batch["labels"]
        examples = window or len(labels)
        if "soft" in batch:  # several answers can be right: one binary loss each (VQA)
            loss = nn.functional.binary_cross_entropy_with_logits(
                output.logits, batch["soft"], reduction="sum"
            )
        else:
            loss = nn.functional.cross_entropy(output.logits, labels, reduction="sum")
        loss = loss / examples
        terms = {"task": loss}
        if config.choice_weight > 0:
            terms["choice"] = choice_distribution_loss(
                output.logits, batch["teacher_logits"], config.choice_temperature, examples
            )
            loss = loss + config.choice_weight * terms["choice"]
        if self.phi is not None:
            terms |= self._distill(output, batch, examples)
            loss = loss + config.distill_weight * terms["distill"]
        return {"loss": loss, "logits": output.logits, **terms}

    def _distill(self, output: StudentOutput, batch: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        assert self.phi is not None and output.hidden_states is not None and output.logits is not None
        selected, weights = self.choose_tokens(batch)
        instance = self.instance_weights(batch, output.logits)
        hidden = output.hidden_states[self.settings.distill_layer]
        text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
        loss = hidden.new_zeros(())
        sequences = examples * selected.shape[1]
        share = weights * instance[:, None, None]
        for name, chosen in (("text", selected & text), ("visual", selected & ~text)):
            projected = self.phi[name](hidden[chosen])  # only the selected tokens are projected
            loss = loss + targeted_distillation_loss(
                projected[None], batch["vectors"][chosen][None], share[chosen][None], hidden.new_ones(1),
                self.settings.distance, sequences,
            )  # fmt: skip
        return {
            "distill": loss,
            "selected_text": (selected & text).sum() / sequences,
            "selected_visual": (selected & ~text).sum() / sequences,
            "empty_selections": (~selected.any(-1)).sum() / sequences,
            "instance_weight": instance.sum() / examples,
        }

    def choose_tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Selected tokens and their weights, both (batch, choices, tokens)."""
        student = Tokens(batch["target_spans"], batch["target_boxes"])
        selected = select(
            batch["scores"], student, batch["valid"], self.settings.selector, self.options, self.generator
        )
        return selected, TOKEN_WEIGHTS[self.settings.token_weight](batch["scores"], selected)

    def instance_weights(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        """c (batch,), from the probabilities of teacher and student; carries no gradient.

        0 for an example whose right answer is not in the label set: there is no p_T.
        """
        weight = INSTANCE_WEIGHTS[self.settings.instance_weight]
        known = batch["labels"] >= 0
        teacher, student = batch["teacher_logits"].softmax(-1), logits.detach().softmax(-1)
        return weight(teacher, student, batch["labels"].clamp_min(0)) * known

    @torch.no_grad()
    def fit_phi(self, loader: DataLoader, ridge: float = 1e-2, batches: int = 8) -> None:
        """Starts the maps at the ridge regression of targets on the untrained student's hidden states.

        So the first updates do not chase random directions: what the student already knows is
        mapped to where the teacher has it, and only the rest is learned (our reading).
        """
        assert self.phi is not None
        sums: dict[str, list[Tensor]] = {}
        device = next(self.student.parameters()).device
        self.student.eval()
        for number, batch in enumerate(loader):
            if number == batches:
                break
            batch = {name: value.to(device) for name, value in batch.items()}
            output = self.student(**student_inputs(self.student, batch), output_hidden_states=True)
            hidden = output.hidden_states[self.settings.distill_layer]
            text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
            for name, chosen in (("text", batch["valid"] & text), ("visual", batch["valid"] & ~text)):
                x = nn.functional.pad(hidden[chosen], (0, 1), value=1.0).double()
                y = batch["vectors"][chosen].double()
                moments = [x.T @ x, x.T @ y]
                sums[name] = (
                    [a + b for a, b in zip(sums[name], moments, strict=True)] if name in sums else moments
                )
        for name, (xx, xy) in sums.items():
            penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=device)
            linear = self.phi[name]
            assert isinstance(linear, nn.Linear)
            solution = torch.linalg.solve(xx + penalty, xy).to(linear.weight.dtype)
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])


class DistillationTrainer(Trainer):
    """Trainer that optimises ``TargetedDistillation``.

    Overrides: the loss (so that terms are logged without a synchronisation per step), the
    optimizer's groups (new layers learn at ``head_learning_rate``), and the log.
    """

    def __init__(self, *, config: RunConfig, **options: Any):
        super().__init__(**options)
        self.settings = config
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._last_step = 0
        self.model_accepts_loss_kwargs = True  # sums are divided by the window's number of examples

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(inputs, None if num_items_in_batch is None else int(num_items_in_batch))
        for name, value in output.items():
            if name != "logits":
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        return (output["loss"], output) if return_outputs else output["loss"]

    def create_optimizer(self, model=None):
        config = self.settings
        assert self.model is not None
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            is_new = name.startswith(("phi.", "student.classifier."))
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


class _StopAtBadLoss(TrainerCallback):
    """Ends a run whose loss is not finite, at the next log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        bad = [
            name
            for name, value in (logs or {}).items()
            if isinstance(value, float) and not np.isfinite(value)
        ]
        if bad:
            raise FloatingPointError(
                f"step {state.global_step}: {', '.join(bad)} not finite; lower learning_rate"
            )


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
    trainer = DistillationTrainer(
        config=config, model=module, args=arguments, train_dataset=dataset, callbacks=[_StopAtBadLoss()],
        data_collator=partial(collate, encoder=dataset.encoder),
    )  # fmt: skip
    if not show_progress:
        trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@torch.inference_mode()
def predict(student: ViltForMultipleChoice, dataset: EncodedExamples, batch_size: int = 32) -> np.ndarray:
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
    selected, weights = module.choose_tokens(batch)
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
                relevance=targets.relevance[choice].numpy(), prior=targets.prior[choice].numpy(),
                score=targets.scores[choice].numpy(), selected=selected[0, choice].numpy(),
                weight=weights[0, choice].numpy(), teacher_probability=teacher_p,
                student_probability=student_p, instance_weight=weight, relevant_spans=statement.relevant,
                relevant_boxes=example.relevant_boxes,
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


def class_logits(config: RunConfig, materials: Materials, subset: Examples) -> Callable[..., Tensor] | None:
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
        own = TargetBuilder(shared.cache, shared.idf, config, class_logits(config, materials, subset))
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

    def fill(partial: Path) -> None:
        trainer = make_trainer(module, config, dataset, partial / "trainer", show_progress)
        if module.phi is not None:
            with torch.random.fork_rng():  # a loader draws a seed
                module.fit_phi(DataLoader(dataset, config.batch_size, collate_fn=trainer.data_collator))
        began = time.time()
        trainer.train()
        metrics["train_seconds"] = round(time.time() - began, 2)
        metrics["updates"] = trainer.state.global_step
        metrics.update(accuracy={}, measures={}, detail={})
        frames, records = [], []
        for split, examples in materials.evaluated.items():
            encoded = materials.encoded[split]
            if config.modality != "both":
                encoded = encode(examples, memory=0)
            probabilities = predict(student, encoded)
            if module.phi is not None:
                probes = encode(examples[: config.probe_examples], builder=own)
                records += _probe_records(probes, split, module, probabilities)
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
        if records:
            records_table(records).to_parquet(partial / "selections.parquet", index=False)
        write_json(partial / "config.json", config.model_dump())
        write_json(partial / "metrics.json", metrics)
        write_json(partial / "environment.json", environment())
        write_jsonl(partial / "history.jsonl", trainer.history)
        save_manifest(partial / "manifest.json", subset, config.shots, config.seed)
        student.save_pretrained(partial / "student")
        materials.encoder.save(partial / "student")

    log.info("%s, seed %d: %d examples, %d epochs", config.arm, config.seed, len(subset), config.epochs)
    write_folder(folder, fill)
    return metrics


def load_student(config: RunConfig, materials: Materials) -> ViltForMultipleChoice:
    """The untrained student of a run, with the head of its task and room for added tokens."""
    student = load_vilt(config.student, config.seed, materials.labels)
    tokens = len(materials.encoder.tokenizer)
    if tokens > student.config.vocab_size:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student.resize_token_embeddings(tokens)
    if task_of(config).data_set.startswith("vqa"):
        head = student.get_submodule("classifier.3")
        assert isinstance(head, nn.Linear)
        nn.init.constant_(head.bias, -math.log(max(1, len(materials.labels) - 1)))  # one answer of all
    return student


def _probe_records(
    probes: EncodedExamples, split: str, module: TargetedDistillation, probabilities: np.ndarray
) -> list[TargetRecord]:
    records = []
    for index, example in enumerate(probes.examples):
        found = record_targets(example, probes[index], probes.encoder, module, probabilities[index])
        records += [replace(record, split=split) for record in found]
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
