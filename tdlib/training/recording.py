"""Records which tokens a run targets in a few fixed examples (probes), while it trains.

``core.records`` defines the record and its file.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from tdlib.arms import WEIGHTS
from tdlib.config import RunConfig, check_arm
from tdlib.core.records import END, TargetRecord
from tdlib.data.examples import Example, low_shot
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.students.base import student_inputs
from tdlib.training.data import EncodedExamples, collate, fitting_batches
from tdlib.training.objective import TargetedDistillation
from tdlib.training.prepare import (
    PreparedData,
    add_to_cache,
    feature_reader_of,
    load_student,
    worded_answers,
)
from tdlib.training.repairing import asks_truth


class ProbeRecorder:
    """Records the targets of a fixed set of examples of one split, each time ``record`` is called.

    A call costs one forward pass of the student on the probes, without gradient. It changes neither weights
    nor random numbers, so that a run trains the same with and without a recorder. ``records`` collects the
    records for ``write_records``.
    """

    def __init__(
        self, probes: EncodedExamples, module: TargetedDistillation, split: str = "", batch_size: int = 32
    ):
        self.probes, self.module = probes, module
        self.split, self.batch_size = split, batch_size
        self.records: list[TargetRecord] = []

    @torch.no_grad()
    def record(self, step: int = END) -> list[TargetRecord]:
        """Appends, and returns, a record for each statement of each probe.

        ``step`` is the number of updates done, or END. In evaluation mode (no dropout).
        """
        module, was_training = self.module, self.module.training
        states = {name: generator.get_state() for name, generator in module.generators().items()}
        module.eval()
        found = []
        try:
            for start in range(0, len(self.probes.examples), self.batch_size):
                examples = self.probes.examples[start : start + self.batch_size]
                items = [self.probes[start + i] for i in range(len(examples))]
                found += self._batch(examples, items, step)
        finally:
            module.train(was_training)
            for name, generator in module.generators().items():
                generator.set_state(states[name])
        self.records += found
        return found

    def _batch(
        self, examples: Sequence[Example], items: list[dict[str, Any]], step: int
    ) -> list[TargetRecord]:
        module = self.module
        device = next(module.student.parameters()).device
        collated = collate(items, self.probes.encoder)
        batch = module.with_targets({k: value.to(device) for k, value in collated.items()})
        reads_student = module.settings.relevance in STUDENT_RELEVANCE
        output = module.student(**student_inputs(module.student, batch), output_hidden_states=reads_student)
        hidden = output.hidden_states[module.settings.distill_layer] if reads_student else None
        relevance, scores = module.scores(batch, hidden)
        selected, weight = module.choose_tokens(batch, scores)
        columns = {
            "relevance": relevance, "score": scores, "selected": selected, "weight": weight,
            "spans": batch["target_spans"], "boxes": batch["target_boxes"], "distilled": batch["valid"],
            "prior": batch["prior"],
        }  # fmt: skip
        arrays = {name: value.cpu().numpy() for name, value in columns.items()}
        teacher, student = (
            logits.float().softmax(-1).cpu().numpy() for logits in (batch["teacher_logits"], output.logits)
        )
        instance = module.distill_weights(batch, output.logits).float().cpu().numpy()
        lessons = self._lessons(examples, batch, output.logits.float())
        length = batch["input_ids"].shape[2]
        records = []
        for row, (example, item) in enumerate(zip(examples, items, strict=True)):
            # the example's own tokens in the padded batch
            own = np.r_[: item["input_ids"].shape[1], length : length + len(item["teacher"].boxes)]
            label, p = example.label, student[row]
            teacher_p = student_p = weight_of_example = None
            if label is not None:
                teacher_p, student_p = float(teacher[row, label]), float(p[label])
                weight_of_example = float(instance[row])
            for choice, statement in enumerate(example.statements()):
                of_tokens = {name: array[row, choice, own] for name, array in arrays.items()}
                records.append(
                    TargetRecord(
                        example_id=example.id, choice=choice, label=label, prediction=int(p.argmax()),
                        text=statement.text, references=statement.references, image=example.image,
                        object_boxes=example.boxes, object_names=example.names,
                        tokens=tuple(statement.text[start:end] for start, end in of_tokens["spans"]),
                        relevant_spans=statement.relevant,
                        relevant_boxes=example.relevant_boxes, truth=example.truth,
                        split=self.split, step=step,
                        teacher_probability=teacher_p, student_probability=student_p,
                        instance_weight=weight_of_example,
                        **of_tokens,
                        **lessons.get((row, choice), {}),
                    )
                )  # fmt: skip
        return records

    def _lessons(
        self, examples: Sequence[Example], batch: dict[str, Tensor], logits: Tensor
    ) -> dict[tuple[int, int], dict[str, Any]]:
        """What CLIP and the student say of the probes with each other's pictures, by row and statement.

        Empty if the run re-pairs nothing, and for VQA, where the statements that CLIP judges are not those
        that the student reads. Every step shows the same pictures, unless their choice depends on the
        student.
        """
        repairing = self.module.repairing
        if repairing is None or repairing.settings.repair_weight == 0:
            return {}
        if repairing.settings.repair_pool == "own":
            return {}  # a control: there is no other picture
        truth = asks_truth(batch)
        if not truth and batch["judged"].shape[1] != batch["input_ids"].shape[1]:
            return {}
        repairing.generator.manual_seed(repairing.settings.seed)  # its state is put back afterwards
        repaired = repairing.repair(self.module.student, batch, logits)
        assert repaired is not None
        pairs = repaired.pairs
        columns = {
            "teacher_choice": pairs.own[pairs.rows],
            "teacher_other": pairs.teacher,
            "student_choice": logits.gather(1, batch["judged"])[pairs.rows],
            "student_other": repaired.student,
        }
        found = {name: value.float().softmax(-1).cpu().tolist() for name, value in columns.items()}
        weights = repaired.weights.cpu().tolist()
        lessons = {}
        for place, (row, column, exists) in enumerate(
            zip(pairs.rows.tolist(), pairs.columns.tolist(), pairs.exists.tolist(), strict=True)
        ):
            for choice in range(1 if truth else batch["judged"].shape[1]) if exists else ():
                lessons[row, choice] = {name: values[place][choice] for name, values in found.items()}
                lessons[row, choice] |= {
                    "other_image": examples[column].image, "lesson_weight": weights[place]
                }  # fmt: skip
        return lessons


class RecordTargets(TrainerCallback):
    """Calls the recorders before the first update and after every ``every`` updates."""

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


def preview_targets(
    config: RunConfig, prepared: PreparedData, examples: Sequence[Example], student: Any = None
) -> list[TargetRecord]:
    """Records what the method would target in examples before any training: one record per statement.

    If the settings re-pair, records also tell what is learned from each example with another's picture.
    ``student`` defaults to ``load_student``'s for these settings. Features that the cache lacks are added to
    it. An example need not belong to a data set: any ``Example`` with a picture and a text will do.
    A relevance that reads the student does so through the maps with which a run begins (``fit_phi``); those
    of a trained student were dropped, so what its training targeted last is in its run's records alone.
    Raises ConfigError for settings that are not those of their arm (weights and student apart).
    """
    check_arm(config, (*WEIGHTS, "student"))
    subset = low_shot(prepared.train, config.shots, config.seed)
    if not config.asks_teacher:  # then nothing has filled the cache
        for asked in (subset, examples):
            add_to_cache(prepared.cache, asked, worded_answers(config, prepared.labels))
    feature_reader = feature_reader_of(config, prepared, subset)
    feature_reader.prepare(examples)
    prepared.encoder.prepare(examples)
    encode = partial(
        EncodedExamples, encoder=prepared.encoder, feature_reader=feature_reader,
        num_labels=len(prepared.labels), modality=config.modality,
    )  # fmt: skip
    probes = encode(examples)
    student = student if student is not None else load_student(config, prepared)
    module = TargetedDistillation(student, config, prepared.cache.teacher.dim)
    if module.maps_tokens and config.relevance in STUDENT_RELEVANCE:
        module.fit_phi(fitting_batches(encode(subset), config))
    return ProbeRecorder(probes, module).record()
