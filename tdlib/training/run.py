"""One training run: a student, finetuned or distilled, from configuration to run folder.

``TargetedDistillation`` joins the student with what training needs beside it (two linear maps that
are dropped afterwards); ``DistillationTrainer`` is transformers' Trainer with our loss, our log and
our saving. Everything about the teacher comes from the cache. A run may be interrupted and continued
from its checkpoints, and shared by several processes; neither changes what it computes.
"""

import gc
import json
import logging
import math
import platform
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdlib.config import RunConfig, check_arm
from tdlib.core.devices import usual_device
from tdlib.core.files import remove_tree, write_folder, write_json, write_jsonl
from tdlib.core.paths import ROOT, ConfigError
from tdlib.core.provenance import code_version, digest
from tdlib.core.records import END, ProbeRecorder, TargetRecord, read_records, write_records
from tdlib.data.chance import chance_scores, constant_answer
from tdlib.data.examples import Example, Examples, TextPart, low_shot, save_manifest
from tdlib.data.tasks import detail, measures, score, task_of, write_submission
from tdlib.method.registry import own_functions
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.students import registry as students
from tdlib.students.base import EncodedText, StudentEncoder, pad_last, student_inputs
from tdlib.students.clip import open_teacher_as_student
from tdlib.students.region_student import RegionEncoder
from tdlib.teacher.model import EXTRAS
from tdlib.teacher.probe import ClassProbe, soft_target, statement_logits
from tdlib.training import checkpoints
from tdlib.training.card import model_card
from tdlib.training.distributed import launch, must_launch, place_among_processes
from tdlib.training.objective import TERMS, TargetedDistillation
from tdlib.training.pipeline import TargetBuilder, Targets
from tdlib.training.provenance import data_manifest

log = logging.getLogger(__name__)


class EncodedExamples(Dataset):
    """Examples as the student's inputs, with targets if a builder is given.

    What was encoded once is kept while it fits into ``memory`` bytes (of each process that makes
    batches). ``num_labels`` is the size of the label set where examples have no choices. ``modality``
    "text" blanks the picture, "image" every word (controls: what can be answered without the other?).
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
    batch: dict[str, Tensor] = {}
    for row, item in enumerate(items):
        targets: Targets = item["targets"]
        texts = item["input_ids"].shape[1]
        parts = {
            "vectors": targets.vectors, "scores": targets.scores, "valid": targets.valid,
            "target_spans": targets.tokens.spans, "target_boxes": targets.tokens.boxes,
            "relevance": targets.relevance, "prior": targets.prior,
        }  # fmt: skip
        for name, value in parts.items():
            if name not in batch:
                batch[name] = value.new_zeros(len(items), len(value), length + visual, *value.shape[2:])
            batch[name][row, :, :texts] = value[:, :texts]
            batch[name][row, :, length : length + value.shape[1] - texts] = value[:, texts:]
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


class _EpochBatches(BatchSampler):
    """Batches in an order of the epoch's own."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


class SharedBatches:
    """What one process of several has of the batches that a single process would see.

    Process ``rank`` takes every ``processes``-th example of each batch, from the ``rank``-th on. A last
    batch of fewer examples than processes goes to the batch before it if both belong to one update (of
    ``window`` batches); else every process takes the whole of it, which all sums count alike.
    """

    def __init__(self, batch_sampler: _EpochBatches, window: int, rank: int, processes: int):
        self.batch_sampler, self.window = batch_sampler, window
        self.rank, self.processes = rank, processes

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def _joins(self) -> bool:
        """Whether the last batch goes to the one before it."""
        rest = len(self.batch_sampler.sampler) % self.batch_sampler.batch_size  # type: ignore[arg-type]
        return 0 < rest < self.processes and (len(self.batch_sampler) - 1) % self.window != 0

    def __len__(self) -> int:
        return len(self.batch_sampler) - self._joins()

    def __iter__(self) -> Iterator[list[int]]:
        whole = list(self.batch_sampler)
        if self._joins():
            rest = whole.pop()
            whole[-1] = whole[-1] + rest
        for batch in whole:
            yield batch if len(batch) < self.processes else batch[self.rank :: self.processes]


class DistillationTrainer(Trainer):
    """Trainer that optimises ``TargetedDistillation``.

    Overrides: the loss (so that terms are logged without a synchronisation per step), the clipping of
    gradients (numbers that are not finite end the run), the optimizer's groups (new layers learn at
    ``head_learning_rate``), the log, and with several processes the loader. ``diagnostics`` are recorded
    every ``diagnostics_every`` updates.
    """

    def __init__(self, *, config: RunConfig, **options: Any):
        super().__init__(**options)
        self.settings = config
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self.diagnostics: list[dict[str, Any]] = []
        self._last_step = 0
        self._window: list[tuple[Tensor, dict[str, Tensor]]] = []  # rows and terms since the last update
        self.model_accepts_loss_kwargs = True  # sums are divided by the window's number of examples

    @property
    def module(self) -> TargetedDistillation:
        assert isinstance(self.model, TargetedDistillation)
        return self.model

    def train(self, *args: Any, **options: Any) -> Any:
        gc.freeze()  # the Trainer begins with a full collection: 0.4 s over all that was there before
        try:
            return super().train(*args, **options)
        finally:
            gc.unfreeze()

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        data, config = self.train_dataset, self.settings
        assert isinstance(data, EncodedExamples)
        order = SeedableRandomSampler(data, data_seed=config.seed)
        batches = _EpochBatches(order, config.batch_size, drop_last=False)
        own = SharedBatches(batches, config.accumulation, self.args.process_index, self.args.world_size)
        return DataLoader(
            data, batch_sampler=own, collate_fn=self.data_collator, num_workers=config.loader_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        module = self.module
        module.progress = self.state.global_step / max(1, self.state.max_steps)
        window = None if num_items_in_batch is None else int(num_items_in_batch)  # of all processes
        every = self.settings.diagnostics_every
        if every and self.state.global_step % every == 0 and not self._window:
            step = {"step": self.state.global_step}
            self.diagnostics.append(step | diagnose(module, inputs, self.accelerator))
        output = model(inputs, window)
        terms = {name: value.detach() for name, value in output.items() if name != "logits"}
        self._window.append((inputs["rows"], terms))
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        loss = output["loss"] * self.args.world_size  # gradients are averaged over processes: here, a sum
        return (loss, output) if return_outputs else loss

    def _clip_grad_norm(self, model):
        """Clips, and ends a run whose loss or gradients are not finite, before the optimizer steps.

        One look per update, as a look waits for the device. With fp16, too large a gradient makes the
        scaler skip the update; the run ends when scaling down has not helped.
        """
        norm = super()._clip_grad_norm(model)
        numbers = [terms["loss"] for _, terms in self._window]
        if not self.args.fp16 or self.accelerator.scaler.get_scale() < 1:
            numbers.append(norm)
        whole = torch.stack(numbers).isfinite().all()
        if self.args.world_size > 1:  # all of them end together
            whole = self.accelerator.reduce(whole.float(), "mean") == 1
        if not bool(whole):
            self.refuse()
        self._window.clear()
        return norm

    def refuse(self) -> None:
        """Ends the run; names what is not finite, and the examples of these batches or of this update."""
        data = self.train_dataset
        assert isinstance(data, EncodedExamples)
        bad = [
            [rows.tolist(), [n for n, value in terms.items() if n != "loss" and not value.isfinite()]]
            for rows, terms in self._window
            if not terms["loss"].isfinite()
        ]
        every = [[rows.tolist(), []] for rows, _ in self._window]
        if self.args.world_size > 1:
            bad, every = gather_object(bad), gather_object(every)
        names = sorted({name for _, names in bad for name in names}) or (["loss"] if bad else ["gradient"])
        ids = [data.examples[row].id for rows, _ in bad or every for row in rows]
        shown = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise FloatingPointError(
            f"update {self.state.global_step + 1}: {', '.join(names)} not finite, examples {shown}; lower "
            "learning_rate, or look at these examples"
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
            sums = self._sums
            if self.args.world_size > 1:
                whole = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
                sums = dict(zip(sums, whole, strict=True))
            means = {name: float(value) / updates for name, value in sums.items()}
            self.history.append({"step": self.state.global_step, **means})
            logs = {**logs, **{name: round(value, 4) for name, value in means.items()}}
            self._sums, self._last_step = {}, self.state.global_step
        super().log(logs, start_time)

    # Checkpoints: what the Trainer saves and restores, and beside it what only we know of.

    def save_own(self, folder: Path) -> None:
        """Writes this process's part of what the Trainer does not save."""
        own = {"generator": self.module.generator.get_state()}
        own |= {f"sum.{name}": value.cpu() for name, value in self._sums.items()}
        save_file(own, folder / f"process-{self.args.process_index}.safetensors")
        if self.is_world_process_zero():
            progress = {
                "history": self.history, "diagnostics": self.diagnostics, "last_step": self._last_step,
                "terms": list(self._sums),
            }  # fmt: skip
            write_json(folder / "progress.json", progress)

    def restore_own(self, folder: Path) -> None:
        """Takes up what ``save_own`` has written; ``train`` restores the rest from the same folder."""
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        self.history, self.diagnostics = progress["history"], progress["diagnostics"]
        self._last_step = progress["last_step"]
        own = load_file(folder / f"process-{self.args.process_index}.safetensors")
        self.module.generator.set_state(own["generator"])
        self._sums = {name: own[f"sum.{name}"].to(self.args.device) for name in progress["terms"]}


class CheckpointKeeper(TrainerCallback):
    """Makes a checkpoint of what the Trainer saves, and continues from one.

    Args:
        trainer: it saves into its output folder, which lies below ``home``.
        home: the run's checkpoints.
        run: what must be equal for a run to continue, see ``checkpoints.seal``.
        recorders: their records so far are part of a checkpoint.
    """

    def __init__(
        self, trainer: DistillationTrainer, home: Path, run: dict[str, Any],
        recorders: Sequence[ProbeRecorder],
    ):  # fmt: skip
        self.trainer, self.home, self.run, self.recorders = trainer, home, run, recorders
        self.seconds = 0.0  # of training before the last interruption
        self.resumed: list[int] = []  # updates after which this run was continued
        self._began = time.time()

    def restore(self, folder: Path) -> None:
        log.info("continuing from %s", folder)
        self.trainer.restore_own(folder)
        attempts = json.loads((folder / "attempts.json").read_text(encoding="utf-8"))
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        self.seconds, self.resumed = attempts["seconds"], [*attempts["resumed"], step]
        for place, recorder in enumerate(self.recorders):
            if (file := folder / f"selections-{place}.parquet").exists():
                recorder.records = read_records(file)

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.time()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.trainer.save_own(folder)
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.is_world_process_zero():
            (folder / "training_args.bin").unlink()  # a pickle that nobody reads
            seconds = self.seconds + time.time() - self._began
            write_json(folder / "attempts.json", {"seconds": seconds, "resumed": self.resumed})
            for place, recorder in enumerate(self.recorders):
                if recorder.records:
                    write_records(recorder.records, folder / f"selections-{place}.parquet")
            checkpoints.seal(folder, self.home, state.global_step, self.run)
        self.trainer.accelerator.wait_for_everyone()


class _RecordTargets(TrainerCallback):
    """Records what is targeted in the probes, before the first update and every few."""

    def __init__(self, recorders: Sequence[ProbeRecorder], every: int):
        self.recorders, self.every = recorders, every

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # not where the run is continued
            self._record(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        for recorder in self.recorders:
            recorder.record(step)


def diagnose(
    module: TargetedDistillation, batch: dict[str, Tensor], accelerator: Accelerator
) -> dict[str, Any]:
    """What pulls at the student in this batch (of all processes); changes nothing, not even random states.

    Norms of each term's gradient with respect to the student's parameters (as the terms stand in the
    log: before their weights) and the cosines between them, quartiles of the instance weights, and the
    share of examples on which teacher and student choose the same.
    """
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    drawn = module.generator.get_state()
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    size = torch.tensor(len(batch["labels"]), device=batch["labels"].device)
    with torch.random.fork_rng(devices):
        output = module(batch, int(accelerator.reduce(size, "sum")))
    module.generator.set_state(drawn)
    gradients = {}
    for name in (*TERMS, "adversarial"):
        if name in output:
            parts = torch.autograd.grad(output[name], parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, parts, strict=True)
            whole = [torch.zeros_like(p) if part is None else part for p, part in pairs]
            gradients[name] = accelerator.reduce(torch.cat([part.flatten() for part in whole]), "sum")
    found: dict[str, Any] = {f"{name}_gradient": float(g.norm()) for name, g in gradients.items()}
    names = list(gradients)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            cosine = nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0)
            found[f"{first}_{second}_cosine"] = float(cosine)
    if "teacher_logits" in batch:
        logits = output["logits"].detach()
        agree = batch["teacher_logits"].argmax(-1) == logits.argmax(-1)
        weights = torch.tensor(gather_object(module.instance_weights(batch, logits).float().tolist()))
        quartiles = weights.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        found["instance_weight_quartiles"] = [round(value, 4) for value in quartiles.tolist()]
        found["teacher_agreement"] = float(torch.tensor(gather_object(agree.float().tolist())).mean())
    return found


def make_trainer(
    module: TargetedDistillation,
    config: RunConfig,
    dataset: EncodedExamples,
    folder: Path,
    show_progress: bool = False,
    log_every: int = 10,
) -> DistillationTrainer:
    """A trainer for one run; same data order and updates for every arm of the same seed.

    ``folder`` is where it saves every ``checkpoint_every`` updates, if that is above 0.

    Raises:
        ConfigError: half precision without a GPU that can compute in it, or where gradients would vanish.
    """
    gpu = torch.cuda.is_available()
    if config.precision == "fp16" and not gpu:
        raise ConfigError("precision='fp16' needs a GPU; set 'fp32', or 'bf16'")
    if config.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("precision='bf16': this GPU only emulates it, slowly; set 'fp16'")
    if config.precision == "fp16" and (config.adversarial_steps or config.diagnostics_every):
        raise ConfigError(
            "precision='fp16': small gradients vanish in it but for the optimizer's, which are scaled; set "
            "adversarial_steps=0 and diagnostics_every=0, or precision='bf16'"
        )
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // config.processes,
        gradient_accumulation_steps=config.accumulation, learning_rate=config.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=config.warmup_fraction, max_grad_norm=1.0,
        logging_steps=log_every, save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500, report_to=[], seed=config.seed,
        data_seed=config.seed, remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not show_progress, logging_nan_inf_filter=False, label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),  # several processes would not find each other there else
        bf16=config.precision == "bf16", fp16=config.precision == "fp16",
        dataloader_num_workers=config.loader_workers,  # not persistent: those draw fewer random numbers
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one; else the Trainer spreads it over all
    trainer = DistillationTrainer(
        config=config, model=module, args=arguments, train_dataset=dataset,
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
    device = next(module.parameters()).device
    batch = {name: value.to(device) for name, value in collate([item], encoder).items()}
    hidden = None
    if module.settings.relevance in STUDENT_RELEVANCE:
        with torch.inference_mode():
            output = module.student(**student_inputs(module.student, batch), output_hidden_states=True)
        hidden = output.hidden_states[module.settings.distill_layer]
    relevance, scores = (value[0].cpu().numpy() for value in module.scores(batch, hidden))
    selected, weights = (value.cpu() for value in module.choose_tokens(batch, hidden))
    teacher = targets.teacher_logits.softmax(-1)
    label = example.label
    weight = teacher_p = student_p = None
    if label is not None:
        logits = torch.tensor(probabilities, device=device).log()[None]
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "peak_gpu_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }  # fmt: skip


def run_identity(config: RunConfig, subset: Examples) -> dict[str, Any]:
    """What must be equal for an interrupted run to be continued: all that its results depend on."""
    settings = config.model_dump(exclude={"checkpoint_every", "loader_workers"})

    return {
        **settings, "functions": own_functions(config),
        "training subset": digest(list(subset.ids)),
        "files of data and models": digest(data_manifest(settings)),
        "code of tdlib": code_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "device": torch.device(usual_device()).type,
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
    parameters; with a model card). It replaces an older one of the same settings; one of others is kept
    beside it (``set_aside``). Returns the metrics.

    With ``checkpoint_every``, a run that was interrupted in training and is called again with the same
    settings and folder continues from its last whole checkpoint, and ends as if it had not been
    interrupted (on the CPU bit for bit). With ``processes`` above 1 they are started here
    (``distributed``), unless this is one of them.

    Raises:
        ConfigError: settings that do not fit each other or the materials, or checkpoints of another run.
        FloatingPointError: a loss or gradient was not finite; names term and examples.
    """
    started = time.time()
    check_arm(config)
    if must_launch(config):
        return launch(config, folder, shared_cache(materials), show_progress)
    rank = place_among_processes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
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

    home = checkpoints.checkpoints_of(folder)

    def fill(partial: Path) -> None:
        keeps = config.checkpoint_every > 0
        place = partial / "trainer"
        if keeps:
            place = checkpoints.staging(home) if rank == 0 else home / checkpoints.STAGING
        trainer = make_trainer(module, config, dataset, place, show_progress)
        recorders = {}
        if module.phi is not None and config.probe_examples and rank == 0:
            for split, examples in materials.evaluated.items():
                probes = encode(examples[: config.probe_examples], builder=own)
                recorders[split] = ProbeRecorder(probes, gather, module, split)
        if recorders and config.probe_every:
            trainer.add_callback(_RecordTargets([*recorders.values()], config.probe_every))
        whole = None
        if keeps:
            identity = run_identity(config, subset)
            keeper = CheckpointKeeper(trainer, home, identity, [*recorders.values()])
            trainer.add_callback(keeper)
            if whole := _agreed(checkpoints.newest(home, identity) if rank == 0 else None):
                keeper.restore(whole)
        if module.phi is not None and whole is None:
            with torch.random.fork_rng():  # a loader draws a seed
                module.fit_phi(DataLoader(dataset, config.batch_size, collate_fn=trainer.data_collator))
        began = time.time()
        trainer.train(**({"resume_from_checkpoint": str(whole)} if whole else {}))
        if rank > 0:
            return
        before = keeper.seconds if keeps else 0.0
        metrics["train_seconds"] = round(before + time.time() - began, 2)
        metrics["updates"] = trainer.state.global_step
        metrics.update(accuracy={}, measures={}, detail={})
        frames = []
        constant = constant_answer(materials.train)
        for split, examples in materials.evaluated.items():
            encoded = materials.encoded[split]
            if config.modality != "both":
                encoded = encode(examples, memory=0)
            probabilities = predict(student, encoded)
            if split in recorders:
                recorders[split].record(END)
            table = prediction_table(split, examples, probabilities, materials.labels, constant)
            if examples.labelled:
                found = measures(config, table["id"], table["score"])
                metrics["accuracy"][split] = next(iter(found.values()))
                metrics["measures"][split] = found
                metrics["detail"][split] = detail(table)
            if split == config.submission_split:
                path = write_submission(config, partial, examples, probabilities, materials.labels)
                metrics["submission"] = path.name
            frames.append(table)
        metrics["seconds"] = round(before + time.time() - started, 2)
        pd.concat(frames).to_parquet(partial / "predictions.parquet", index=False)
        if records := [record for recorder in recorders.values() for record in recorder.records]:
            write_records(records, partial / "selections.parquet")
        write_json(partial / "config.json", config.model_dump())
        write_json(partial / "metrics.json", metrics)
        around = environment()
        if keeps and keeper.resumed:
            around["resumed_after_updates"] = keeper.resumed
        write_json(partial / "environment.json", around)
        write_jsonl(partial / "history.jsonl", trainer.history)
        if trainer.diagnostics:
            write_jsonl(partial / "diagnostics.jsonl", trainer.diagnostics)
        if functions := own_functions(config):
            write_json(partial / "functions.json", functions)
        save_manifest(partial / "manifest.json", subset, config.shots, config.seed)
        shutil.rmtree(partial / "trainer", ignore_errors=True)  # the Trainer's own folder: nothing is in it
        student.save_pretrained(partial / "student")
        materials.encoder.save(partial / "student")
        card = model_card(config, metrics, around, type(student).__name__)
        (partial / "student" / "README.md").write_text(card, encoding="utf-8")
        set_aside(folder, config)

    log.info("%s, seed %d: %d examples, %d epochs", config.arm, config.seed, len(subset), config.epochs)
    if rank > 0:  # it helps to train; the first process evaluates and writes
        with tempfile.TemporaryDirectory() as elsewhere:
            fill(Path(elsewhere))
        return metrics
    write_folder(folder, fill)
    if config.checkpoint_every:
        checkpoints.remove(home)
    return metrics


def set_aside(folder: Path, config: RunConfig) -> None:
    """Renames a run of other settings that has this run's name: NAME-DIGEST, beside it."""
    folder = folder.resolve()
    unimportant = {"checkpoint_every", "loader_workers"}
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = json.loads(config.model_dump_json(exclude=unimportant))
    if {name: value for name, value in before.items() if name not in unimportant} != now:
        other = folder.with_name(f"{folder.name}-{digest(before)[:8]}")
        remove_tree(other)
        folder.rename(other)
        log.warning("%s held a run of other settings, which is now %s", folder, other.name)


def _agreed(found: Path | None) -> Path | None:
    """What the first process has found, for all of them."""
    shared = [found]
    broadcast_object_list(shared)
    return shared[0]


def shared_cache(materials: Materials) -> Path | None:
    """The folder of all teachers' caches, where the materials have one."""
    return materials.builder.cache.folder.parent if materials.builder else None


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
    split: str,
    examples: Sequence[Example],
    probabilities: np.ndarray,
    labels: Sequence[str] = (),
    constant: int | None = None,
) -> pd.DataFrame:
    """One row per example: id, picture, stratum, label, prediction, score, chance, probabilities.

    ``score`` and ``chance`` lie in [0, 1] and are missing where there is no label. ``chance`` is what
    guessing scores on the example (``data.chance``), given the answer that guessing always gives where
    there is a label set (``constant``). Probabilities over more than 16 labels are not kept.
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
            "chance": chance_scores(examples, constant, labels),
            "probability": probabilities.max(-1),
            "probabilities": [row.tolist() if few else None for row in probabilities],
        }
    )
