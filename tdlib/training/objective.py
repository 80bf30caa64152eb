"""What training minimises: a student's task loss with the method's terms beside it.

``TargetedDistillation`` joins the student with what training needs beside it (linear maps and
weights of terms that are dropped afterwards). Owns which terms there are and what they weigh; the
method's steps are in ``method.clip_td``, re-pairing in ``Repairing`` below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.method.clip_td import choose_tokens, distillation_loss, places_of, score_by_student, weigh_examples
from tdlib.method.losses import choice_distribution_loss, targeted_distillation_loss
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.method.selection import SelectionOptions
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import SCHEDULES
from tdlib.students.base import StudentOutput, student_inputs
from tdlib.training.adversarial import adversarial_loss
from tdlib.training.data import UNLABELLED
from tdlib.training.repairing import Repaired, Repairing
from tdlib.training.targets import make_targets

TERMS = ("task", "choice", "distill", "repair", "truth", "features")


@dataclass(frozen=True)
class Chosen:
    """The tokens of a batch that are distilled: a mask and weights (batch, choices, tokens), and where."""

    selected: Tensor
    weights: Tensor
    places: dict[str, Tensor] | None  # of ``places_of``, where the loss will ask


class TargetedDistillation(nn.Module):
    """A student with the loss of the method (step 8).

    ``phi`` is one linear map per modality (or one for both) from the student's width to the teacher's
    joint space; it exists only here and is dropped after training (our reading), as are ``log_variance``,
    the terms' own uncertainty, where they are weighed by it (Kendall et al. 2018, eq. 10), and the map of
    ``repairing`` that reads a statement's truth from its tokens.

    ``progress``, the share of updates done, is for the trainer to set.
    """

    def __init__(self, student: PreTrainedModel, config: RunConfig, teacher_dim: int | None):
        super().__init__()
        self.student, self.settings = student, config
        self.phi: nn.ModuleDict | None = None
        self.log_variance: nn.ParameterDict | None = None
        self.repairing: Repairing | None = None
        self.progress = 0.0
        width = student.config.hidden_size
        if config.distill_weight > 0 and teacher_dim is not None:
            layers = student.config.num_hidden_layers + 1
            if not -layers <= config.distill_layer < layers:
                raise ConfigError(
                    f"distill_layer={config.distill_layer}: the student has hidden states {-layers} to "
                    f"{layers - 1}"
                )
            with torch.random.fork_rng():  # the baseline's random numbers stay what they are
                torch.manual_seed(config.seed)
                self.phi = nn.ModuleDict(
                    {name: nn.Linear(width, teacher_dim) for name in self._mapped(config)}
                )
        if config.asks_judge:
            if config.truth_weight > 0 and self.phi is None and config.relevance in STUDENT_RELEVANCE:
                raise ConfigError(
                    f"relevance={config.relevance!r} compares the student with its targets, which "
                    "distill_weight=0 leaves out; set another relevance, or distill_weight"
                )
            self.repairing = Repairing(config, width)
        if config.distill_schedule == "learned" and (self.phi is not None or config.choice_weight > 0):
            names = ["task", "choice", "distill", *(self.repairing.terms if self.repairing else ())]
            names += ["features"] if config.distils_unlabelled else []
            self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        self.options = SelectionOptions(config.mass, config.count, config.fraction, config.deviations)
        self.generator = torch.Generator().manual_seed(config.seed)

    @staticmethod
    def _mapped(config: RunConfig) -> list[str]:
        """Names of the maps that are learned; one for both modalities is called "text"."""
        tokens = ["text"] if config.shared_phi else ["text", "visual"]
        names = {"tokens": tokens, "global": ["text_global", "image_global"]}
        return names.get(config.distill_target) or [*names["tokens"], *names["global"]]

    @property
    def token_maps(self) -> Mapping[str, nn.Module]:
        """The map of each modality's tokens."""
        assert self.phi is not None
        return {
            "text": self.phi["text"],
            "visual": self.phi["text" if self.settings.shared_phi else "visual"],
        }

    def generators(self) -> dict[str, torch.Generator]:
        """The generators that this module draws from, whose states belong to a checkpoint."""
        return {"generator": self.generator} | (
            {"repairing": self.repairing.generator} if self.repairing is not None else {}
        )

    def forward(self, batch: dict[str, Tensor], window: int | None = None) -> dict[str, Tensor]:
        """The loss and its terms.

        ``window`` is the number of examples in the whole accumulation window; sums are divided by it.
        """
        config, batch = self.settings, self.with_targets(batch)
        examples = window or len(batch["labels"])
        chosen = self._chosen(batch) if self._chooses_early else None
        if config.adversarial_steps and self.training:
            output, extra = adversarial_loss(
                self.student, batch, self.task_loss, config, examples, self.needs_hidden_states
            )
        else:
            output, extra = self.student(**self.inputs(batch)), {}
        assert output.logits is not None
        output.logits = logits = output.logits.float()
        repaired = None
        if self.repairing is not None:
            repaired = self.repairing.repair(self.student, batch, logits, config.repair_share)
        extra |= self._features(batch, examples)
        with torch.autocast(logits.device.type, enabled=False):  # whatever the precision of the student
            terms = {"task": self.task_loss(logits, batch, examples), **extra}
            if config.choice_weight > 0:
                terms["choice"] = self._choice_loss(logits, batch, examples)
            if not self._chooses_early:
                chosen = self._chosen(batch, output)
            if self.phi is not None:
                terms |= self._distill(output, batch, chosen, examples)
            if self.repairing is not None:
                terms |= self._repair(output, repaired, batch, chosen, examples)
            return {"loss": self._total(terms, examples, len(batch["labels"])), "logits": logits, **terms}

    def with_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its targets in place of what they are made of, see ``targets.make_targets``."""
        return make_targets(batch, self.settings)

    @property
    def _chooses_early(self) -> bool:
        """Whether tokens are chosen before the student's pass, while the device is idle: ``places_of``."""
        return self.settings.relevance not in STUDENT_RELEVANCE

    @property
    def needs_hidden_states(self) -> bool:
        return self.phi is not None or self.settings.truth_weight > 0

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the student is called with."""
        inputs: dict[str, Any] = student_inputs(self.student, batch)
        return inputs | {"output_hidden_states": True} if self.needs_hidden_states else inputs

    def task_loss(self, logits: Tensor, batch: dict[str, Tensor], examples: int) -> Tensor:
        """The loss of the task itself, summed over the batch and divided by ``examples``."""
        if "soft" in batch:  # several answers can be right: one binary loss each (VQA)
            # smoothing a binary target moves it towards 1/2 (our reading)
            targets = batch["soft"] * (1 - self.settings.label_smoothing) + self.settings.label_smoothing / 2
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        else:
            loss = nn.functional.cross_entropy(
                logits, batch["labels"], reduction="sum", label_smoothing=self.settings.label_smoothing
            )
        return loss / examples

    def _choice_loss(self, logits: Tensor, batch: dict[str, Tensor], examples: int) -> Tensor:
        """The teacher's distribution over the choices (or labels)."""
        config = self.settings
        weights = batch["teacher_knows"]  # a distribution over texts cut short is no knowledge
        if config.choice_instance_weight != "uniform":  # "uniform" needs no right answer
            weights = weights * self.instance_weights(batch, logits, config.choice_instance_weight)
        return choice_distribution_loss(
            logits, batch["teacher_logits"], config.choice_temperature, examples, weights
        )

    def _chosen(self, batch: dict[str, Tensor], output: StudentOutput | None = None) -> Chosen | None:
        """Selected tokens and their weights, once for all terms that read them; None where none does."""
        config = self.settings
        of_tokens = self.phi is not None and config.distill_target != "global"
        if not of_tokens and config.truth_weight == 0:
            return None
        hidden = None
        if output is not None and output.hidden_states is not None:
            hidden = output.hidden_states[config.distill_layer].float()
        selected, weights = self.choose_tokens(batch, hidden)
        if not of_tokens:
            return Chosen(selected, weights, None)
        student = Tokens(batch["target_spans"], batch["target_boxes"])
        return Chosen(selected, weights, places_of(selected & batch["valid"] & (weights != 0), student))

    def _repair(
        self, output: StudentOutput, repaired: Repaired | None, batch: dict[str, Tensor],
        chosen: Chosen | None, examples: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms beyond the paper: CLIP's judgement of re-paired examples, and of statements' truth."""
        assert self.repairing is not None
        share = len(batch["labels"]) / examples
        terms = self.repairing.repair_loss(repaired, share) if repaired else {}
        if self.settings.truth_weight > 0:
            assert chosen is not None
            truth = self.repairing.truth_loss(output, repaired, batch, chosen.selected, chosen.weights)
            terms["truth"] = truth * share
        return terms

    def _features(self, batch: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        """The term "features": the distilled tokens of unlabelled examples, where a batch brings any.

        ``L_features`` is step 9 averaged over these examples, and weighs what "distill" weighs (beyond the
        paper; its relatives are all semi-supervised distillations). Nothing reads a label: an instance
        weight that asks for the right answer is given CLIP's best one.
        """
        own = {n.removeprefix(UNLABELLED): v for n, v in batch.items() if n.startswith(UNLABELLED)}
        if not own or self.phi is None:
            return {}
        own = self.with_targets(own)
        own["labels"] = own["teacher_logits"].argmax(-1)
        chosen = self._chosen(own) if self._chooses_early else None
        output = self.student(**self.inputs(own))
        assert output.logits is not None
        output.logits = output.logits.float()
        with torch.autocast(output.logits.device.type, enabled=False):
            terms = self._distill(output, own, chosen or self._chosen(own, output), len(own["labels"]))
        return {"features": terms["distill"] * (len(batch["labels"]) / examples)}

    def _total(self, terms: dict[str, Tensor], examples: int, here: int) -> Tensor:
        config = self.settings
        distill = self.distill_weight()
        weights = {"task": 1.0, "choice": config.choice_weight, "distill": distill, "features": distill}
        if self.repairing is not None:
            weights |= self.repairing.weights(self.progress)
        loss = terms["task"].new_zeros(())
        for name, weight in weights.items():
            if name not in terms:
                continue
            term = terms[name]
            if self.log_variance is not None:
                variance = self.log_variance[name]
                term = (-variance).exp() * term + variance / 2 * here / examples
            loss = loss + weight * term
        return loss + terms["adversarial"] if "adversarial" in terms else loss

    def distill_weight(self) -> float:
        """The weight of the distillation term at this point of the training."""
        return self.settings.distill_weight * SCHEDULES[self.settings.distill_schedule](self.progress)

    def _distill(
        self, output: StudentOutput, batch: dict[str, Tensor], chosen: Chosen | None, examples: int
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.phi is not None and output.hidden_states is not None and output.logits is not None
        hidden = output.hidden_states[self.settings.distill_layer].float()
        instance = self.instance_weights(batch, output.logits)
        if self.settings.distill_target != "tokens" or self.settings.selector != "all":
            # A text cut short has another global embedding, by which patches are chosen. What is left of
            # its tokens is right: the teacher reads from left to right.
            instance = instance * batch["teacher_knows"]
        sequences = examples * hidden.shape[1]
        terms = {"distill": hidden.new_zeros(()), "instance_weight": instance.sum() / examples}
        if self.settings.distill_target != "tokens":
            for name in ("text_global", "image_global"):
                terms["distill"] = terms["distill"] + targeted_distillation_loss(
                    self.phi[name](hidden[:, :, :1]), batch[name][:, :, None], 
                    torch.full_like(hidden[:, :, :1, 0], 0.5), instance[:, None],
                    self.settings.distance, sequences,
                )  # fmt: skip
        if chosen is None or chosen.places is None:
            return terms
        on_words, on_places = distillation_loss(
            hidden, self.token_maps, batch["vectors"], chosen.weights, instance, chosen.places,
            self.settings.distance, sequences,
        )  # fmt: skip
        selected, text = chosen.selected, Tokens(batch["target_spans"], batch["target_boxes"]).is_text
        return terms | {
            "distill": terms["distill"] + on_words + on_places,
            "selected_text": (selected & text).sum() / sequences,
            "selected_visual": (selected & ~text).sum() / sequences,
            "selected_mass": batch["scores"].masked_fill(~selected, 0).sum() / sequences,
            "empty_selections": (~selected.any(-1)).sum() / sequences,
        }

    def scores(self, batch: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Relevance and scores of the tokens, both (batch, choices, tokens).

        They are the batch's own, made with the targets, unless relevance depends on the student: then
        it is computed from ``hidden`` (batch, choices, tokens, student_dim).
        """
        config = self.settings
        if config.relevance not in STUDENT_RELEVANCE:
            return batch["relevance"], batch["scores"]
        assert self.phi is not None and hidden is not None
        student = Tokens(batch["target_spans"], batch["target_boxes"])
        maps = self.token_maps
        with torch.no_grad():
            mapped = torch.where(student.is_text[..., None], maps["text"](hidden), maps["visual"](hidden))
        return score_by_student(
            mapped, batch["vectors"], batch["prior"], student, batch["valid"], config.relevance,
            config.temperature, config.prior_weight,
        )  # fmt: skip

    def choose_tokens(self, batch: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Selected tokens and their weights, both (batch, choices, tokens); ``hidden`` as in ``scores``."""
        config, student = self.settings, Tokens(batch["target_spans"], batch["target_boxes"])
        _, scores = self.scores(batch, hidden)
        return choose_tokens(
            scores, student, batch["valid"], config.selector, self.options, config.token_weight,
            self.generator,
        )  # fmt: skip

    def instance_weights(self, batch: dict[str, Tensor], logits: Tensor, name: str = "") -> Tensor:
        """c (batch,), from the probabilities of teacher and student; carries no gradient.

        0 for an example whose right answer is not in the label set, or whose texts the teacher cuts short:
        there is no p_T. ``name`` is that of a function in ``INSTANCE_WEIGHTS``; "" takes the run's.
        """
        name = name or self.settings.instance_weight
        weights = weigh_examples(batch["teacher_logits"], logits, batch["labels"], name)
        return weights if name == "uniform" else weights * batch["teacher_knows"]

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
            batch = self.with_targets({name: value.to(device) for name, value in batch.items()})
            hidden = self.student(**self.inputs(batch)).hidden_states[self.settings.distill_layer]
            text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
            of_text = batch["valid"] & text
            pairs = {
                "text": (batch["valid"] if self.settings.shared_phi else of_text, batch["vectors"]),
                "visual": (batch["valid"] & ~text, batch["vectors"]),
            }
            first = torch.zeros_like(text)
            first[:, :, 0] = True
            for name in ("text_global", "image_global"):
                if name in self.phi:
                    pairs[name] = first, batch[name][:, :, None].expand(*first.shape, -1)
            for name in self.phi:
                chosen, targets = pairs[name]
                x = nn.functional.pad(hidden[chosen], (0, 1), value=1.0).double()
                y = targets[chosen].double()
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
