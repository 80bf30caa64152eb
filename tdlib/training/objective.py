"""What training minimises: a student's task loss with the method's terms beside it.

``TargetedDistillation`` joins the student with what training needs beside it (linear maps and
weights of terms that are dropped afterwards). Owns which terms there are and what they weigh; the
losses themselves, selection and weights are pure functions in modules of their own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.method.losses import choice_distribution_loss, targeted_distillation_loss
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.method.selection import SelectionOptions, select, token_scores
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import INSTANCE_WEIGHTS, SCHEDULES, TOKEN_WEIGHTS
from tdlib.students.base import StudentOutput, student_inputs
from tdlib.training.adversarial import adversarial_loss

TERMS = ("task", "choice", "distill")


class TargetedDistillation(nn.Module):
    """A student with the loss of the method (step 8).

    ``phi`` is one linear map per modality from the student's width to the teacher's joint space;
    it exists only here and is dropped after training (our reading), as is ``log_variance``, the
    terms' own uncertainty, where they are weighed by it (Kendall et al. 2018, eq. 10).

    ``progress``, the share of updates done, is for the trainer to set.
    """

    def __init__(self, student: PreTrainedModel, config: RunConfig, teacher_dim: int | None):
        super().__init__()
        self.student, self.settings = student, config
        self.phi: nn.ModuleDict | None = None
        self.log_variance: nn.ParameterDict | None = None
        self.progress = 0.0
        if config.distill_weight > 0 and teacher_dim is not None:
            layers = student.config.num_hidden_layers + 1
            if not -layers <= config.distill_layer < layers:
                raise ConfigError(
                    f"distill_layer={config.distill_layer}: the student has hidden states {-layers} to "
                    f"{layers - 1}"
                )
            width = student.config.hidden_size
            with torch.random.fork_rng():  # the baseline's random numbers stay what they are
                torch.manual_seed(config.seed)
                self.phi = nn.ModuleDict(
                    {name: nn.Linear(width, teacher_dim) for name in self._mapped(config.distill_target)}
                )
        if config.distill_schedule == "learned" and (self.phi is not None or config.choice_weight > 0):
            self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in TERMS})
        self.options = SelectionOptions(config.mass, config.count, config.fraction, config.deviations)
        self.generator = torch.Generator().manual_seed(config.seed)

    @staticmethod
    def _mapped(target: str) -> list[str]:
        names = {"tokens": ["text", "visual"], "global": ["text_global", "image_global"]}
        return names.get(target) or [*names["tokens"], *names["global"]]

    def forward(self, batch: dict[str, Tensor], window: int | None = None) -> dict[str, Tensor]:
        """The loss and its terms.

        ``window`` is the number of examples in the whole accumulation window; sums are divided by it.
        """
        config = self.settings
        examples = window or len(batch["labels"])
        if config.adversarial_steps and self.training:
            output, extra = adversarial_loss(self.student, batch, self.task_loss, config, examples)
        else:
            output, extra = self.student(**self._inputs(batch)), {}
        assert output.logits is not None
        output.logits = logits = output.logits.float()
        with torch.autocast(logits.device.type, enabled=False):  # whatever the precision of the student
            terms = {"task": self.task_loss(logits, batch, examples), **extra}
            if config.choice_weight > 0:
                weighing = config.choice_instance_weight  # "uniform" needs no right answer
                weights = batch["teacher_knows"]  # a distribution over texts cut short is no knowledge
                if weighing != "uniform":
                    weights = weights * self.instance_weights(batch, logits, weighing)
                terms["choice"] = choice_distribution_loss(
                    logits, batch["teacher_logits"], config.choice_temperature, examples, weights
                )
            if self.phi is not None:
                terms |= self._distill(output, batch, examples)
            return {"loss": self._total(terms, examples, len(batch["labels"])), "logits": logits, **terms}

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = student_inputs(self.student, batch)
        return inputs | {"output_hidden_states": True} if self.phi is not None else inputs

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

    def _total(self, terms: dict[str, Tensor], examples: int, here: int) -> Tensor:
        config = self.settings
        weights = {"task": 1.0, "choice": config.choice_weight, "distill": self.distill_weight()}
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

    def _distill(self, output: StudentOutput, batch: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        assert self.phi is not None and output.hidden_states is not None and output.logits is not None
        hidden = output.hidden_states[self.settings.distill_layer].float()
        instance = self.instance_weights(batch, output.logits)
        sequences = examples * hidden.shape[1]
        terms = {"distill": hidden.new_zeros(()), "instance_weight": instance.sum() / examples}
        if self.settings.distill_target != "tokens":
            for name in ("text_global", "image_global"):
                terms["distill"] = terms["distill"] + targeted_distillation_loss(
                    self.phi[name](hidden[:, :, :1]), batch[name][:, :, None], 
                    torch.full_like(hidden[:, :, :1, 0], 0.5), instance[:, None],
                    self.settings.distance, sequences,
                )  # fmt: skip
        if self.settings.distill_target != "global":
            terms |= self._distill_tokens(terms, hidden, instance, batch, sequences)
        return terms

    def _distill_tokens(
        self, terms: dict[str, Tensor], hidden: Tensor, instance: Tensor, batch: dict[str, Tensor],
        sequences: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.phi is not None
        selected, weights = self.choose_tokens(batch, hidden)
        text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
        loss = terms["distill"]
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
        with torch.no_grad():
            mapped = torch.where(
                student.is_text[..., None], self.phi["text"](hidden), self.phi["visual"](hidden)
            )
        relevance = STUDENT_RELEVANCE[config.relevance](mapped, batch["vectors"], student, batch["valid"])
        scores = token_scores(
            relevance, batch["prior"], student, batch["valid"], config.temperature, config.prior_weight
        )
        return relevance, scores

    def choose_tokens(self, batch: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Selected tokens and their weights, both (batch, choices, tokens); ``hidden`` as in ``scores``."""
        _, scores = self.scores(batch, hidden)
        student = Tokens(batch["target_spans"], batch["target_boxes"])
        selected = select(
            scores, student, batch["valid"], self.settings.selector, self.options, self.generator
        )
        return selected, TOKEN_WEIGHTS[self.settings.token_weight](scores, selected)

    def instance_weights(self, batch: dict[str, Tensor], logits: Tensor, name: str = "") -> Tensor:
        """c (batch,), from the probabilities of teacher and student; carries no gradient.

        0 for an example whose right answer is not in the label set: there is no p_T. ``name`` is that of
        a function in ``INSTANCE_WEIGHTS``; "" takes the run's.
        """
        weight = INSTANCE_WEIGHTS[name or self.settings.instance_weight]
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
            hidden = self.student(**self._inputs(batch)).hidden_states[self.settings.distill_layer]
            text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
            pairs = {
                "text": (batch["valid"] & text, batch["vectors"]),
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
