"""The loop over updates: transformers' Trainer with our loss, log, clipping and checkpoints.

``run`` decides what is trained on which examples.
"""

import gc
import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdlib.config import RunConfig
from tdlib.core.files import write_json
from tdlib.core.paths import ConfigError
from tdlib.core.records import read_records, write_records
from tdlib.training import checkpoints
from tdlib.training.data import EncodedExamples, EpochBatches, SharedBatches, UnlabelledExamples, collate
from tdlib.training.judging import PicturePool
from tdlib.training.objective import TERMS, TargetedDistillation
from tdlib.training.recording import ProbeRecorder

log = logging.getLogger(__name__)


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
        student = self.module.student
        if self.settings.compile:
            student.compile(dynamic=True)  # texts and pictures of batches differ in size
        gc.freeze()  # the Trainer begins with a full collection: 0.4 s over all that was there before
        try:
            return super().train(*args, **options)
        finally:
            gc.unfreeze()
            student._compiled_call_impl = None  # evaluation uses other sizes, which would compile again

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        data, config = self.train_dataset, self.settings
        assert isinstance(data, EncodedExamples)
        order = SeedableRandomSampler(data, data_seed=config.seed)
        batches = EpochBatches(order, config.batch_size, drop_last=False)
        own = SharedBatches(batches, config.accumulation, self.args.process_index, self.args.world_size)
        return DataLoader(
            data, batch_sampler=own, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples, device):
        """The number of examples in an update, over all processes.

        The Trainer's version counts on the device, and waits for it.
        """
        here = sum(len(batch["labels"]) for batch in batch_samples)
        if self.args.world_size == 1 or not batch_samples:
            return here or None
        return self.accelerator.gather(torch.tensor(here, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        module = self.module
        module.progress = self.state.global_step / max(1, self.state.max_steps)
        window = None if num_items_in_batch is None else int(num_items_in_batch)  # over all processes
        every = self.settings.diagnostics_every
        if every and self.state.global_step % every == 0 and not self._window:
            step = {"step": self.state.global_step}
            self.diagnostics.append(step | diagnose(module, inputs, self.accelerator))
        output = model(inputs, window)
        terms = {name: value.detach() for name, value in output.items() if name != "logits"}
        self._window.append((inputs["rows"], terms))
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        loss = output["loss"] * self.args.world_size  # averaged over processes later, but must be a sum
        return (loss, output) if return_outputs else loss

    def _clip_grad_norm(self, model):
        """Clips gradients; ends a run whose loss or gradients are not finite, before the optimizer steps.

        It reads all losses of an update at once, because every read waits for the device. With fp16 a
        gradient that overflows makes the scaler skip the update and scale down; the run ends only when the
        scale is below 1 and it still overflows.
        """
        norm = super()._clip_grad_norm(model)
        numbers = [terms["loss"] for _, terms in self._window]
        if not self.args.fp16 or self.accelerator.scaler.get_scale() < 1:
            numbers.append(norm)
        finite = torch.stack(numbers).isfinite().all()
        if self.args.world_size > 1:  # all processes end together, none waits for another forever
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
        if not bool(finite):
            self.abort_non_finite()
        self._window.clear()
        return norm

    def abort_non_finite(self) -> None:
        """Ends the run with an error that names the terms that are not finite, and their examples.

        Raises:
            FloatingPointError: always.
        """
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
        # New layers start from noise and learn at a higher rate than pretrained ones. Biases and norms do not
        # decay, as is usual since BERT.
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        drawn = getattr(self.module.student, "drawn", ())
        for name, parameter in self.model.named_parameters():
            of_student = name.removeprefix("student.")
            is_new = of_student in drawn or name.startswith(
                ("phi.", "log_variance.", "repairing.", "student.classifier.")
            )
            groups[is_new, parameter.ndim > 1].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": config.head_learning_rate if is_new else config.learning_rate,
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
                for (is_new, decays), parameters in groups.items()
            ],
            fused=True if self.args.device.type == "cuda" else None,  # one kernel for all parameters
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
        # Selectors and re-pairing draw from generators of their own, which the Trainer does not know; the
        # sums are of updates since the last line of the log.
        own = {name: generator.get_state() for name, generator in self.module.generators().items()}
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
        for name, generator in self.module.generators().items():
            generator.set_state(own[name])
        self._sums = {name: own[f"sum.{name}"].to(self.args.device) for name in progress["terms"]}


class CheckpointKeeper(TrainerCallback):
    """Turns what the Trainer saves into checkpoints below ``home``, and continues from one of them.

    A run continues only from a checkpoint whose ``run`` (``run_identity``) equals its identity. A checkpoint
    also holds the records that the recorders have made so far.
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
        self.trainer.accelerator.wait_for_everyone()  # all parts must lie there before they are sealed
        if self.trainer.is_world_process_zero():
            (folder / "training_args.bin").unlink()  # a pickle that nobody reads
            seconds = self.seconds + time.time() - self._began
            write_json(folder / "attempts.json", {"seconds": seconds, "resumed": self.resumed})
            for place, recorder in enumerate(self.recorders):
                if recorder.records:
                    write_records(recorder.records, folder / f"selections-{place}.parquet")
            checkpoints.publish_checkpoint(folder, self.home, state.global_step, self.run)
        self.trainer.accelerator.wait_for_everyone()


def diagnose(
    module: TargetedDistillation, batch: dict[str, Tensor], accelerator: Accelerator
) -> dict[str, Any]:
    """Measures how the terms pull at the student in this batch (of all processes).

    Returns the norms of each term's gradient with respect to the student's parameters (terms as in the log,
    before their weights), the cosines between these gradients, quartiles of the instance weights, and the
    share of examples on which teacher and student choose the same. Changes nothing, not even the states of
    random generators.
    """
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    states = {name: generator.get_state() for name, generator in module.generators().items()}
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    size = torch.tensor(len(batch["labels"]), device=batch["labels"].device)
    with torch.random.fork_rng(devices):
        # A second pass in place of the training's own: its graph must stay whole for the update.
        output = module(batch, int(accelerator.reduce(size, "sum")))
    for name, generator in module.generators().items():
        generator.set_state(states[name])
    gradients = {}
    for name in (*TERMS, "adversarial"):
        if name in output:
            parts = torch.autograd.grad(output[name], parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, parts, strict=True)
            filled = [torch.zeros_like(p) if part is None else part for p, part in pairs]
            gradients[name] = accelerator.reduce(torch.cat([part.flatten() for part in filled]), "sum")
    measures: dict[str, Any] = {f"{name}_gradient": float(g.norm()) for name, g in gradients.items()}
    names = list(gradients)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            cosine = nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0)
            measures[f"{first}_{second}_cosine"] = float(cosine)
    if "teacher_logits" in batch:
        logits = output["logits"].detach()
        agree = batch["teacher_logits"].argmax(-1) == logits.argmax(-1)
        weights = torch.tensor(gather_object(module.distill_weights(batch, logits).float().tolist()))
        quartiles = weights.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        measures["instance_weight_quartiles"] = [round(value, 4) for value in quartiles.tolist()]
        measures["teacher_agreement"] = float(torch.tensor(gather_object(agree.float().tolist())).mean())
    return measures


def make_trainer(
    module: TargetedDistillation,
    config: RunConfig,
    dataset: EncodedExamples,
    folder: Path,
    show_progress: bool = False,
    log_every: int = 10,
    pool: PicturePool | None = None,
    unlabelled: UnlabelledExamples | None = None,
) -> DistillationTrainer:
    """A trainer for one run; same data order and updates for every arm of the same seed.

    ``folder`` is where it saves every ``checkpoint_every`` updates, if that is above 0. ``pool`` are
    pictures for re-pairing beside the batch's own, ``unlabelled`` examples whose tokens are distilled too.
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
    if config.compile and (config.adversarial_steps or config.diagnostics_every):
        raise ConfigError(
            "compile=True: a compiled student keeps no graph for a second backward pass; set "
            "adversarial_steps=0 and diagnostics_every=0, or compile=False"
        )
    workers = dataset.workers(config.loader_workers, config.processes)
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=config.epochs * config.repeat_epochs,
        per_device_train_batch_size=config.batch_size // config.processes,
        gradient_accumulation_steps=config.accumulation, learning_rate=config.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=config.warmup_fraction, max_grad_norm=1.0,
        logging_steps=log_every, save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500, report_to=[], seed=config.seed,
        data_seed=config.seed, remove_unused_columns=False, dataloader_pin_memory=gpu,
        disable_tqdm=not show_progress, logging_nan_inf_filter=False, label_names=["labels"],
        use_cpu=not gpu,  # several processes would not find each other there else
        bf16=config.precision == "bf16", fp16=config.precision == "fp16",
        dataloader_num_workers=workers,  # not persistent: those draw fewer random numbers
        accelerator_config={"non_blocking": gpu},  # batches are in pinned memory there
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one; else the Trainer spreads it over all
    trainer = DistillationTrainer(
        config=config, model=module, args=arguments, train_dataset=dataset,
        data_collator=partial(collate, encoder=dataset.encoder, pool=pool, unlabelled=unlabelled),
    )  # fmt: skip
    if not show_progress:
        trainer.remove_callback(transformers.PrinterCallback)
    return trainer
