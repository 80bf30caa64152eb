"""The loss that training minimises: the task's own, and the terms of the method.

``TargetedDistillation`` joins the student with what only training needs: the linear maps into CLIP's space
and learned weights of terms. It decides which terms there are and calls steps 6 to 9 of ``method.clip_td``;
``repairing.Repairing`` computes the terms of re-pairing.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.method.clip_td import (
    all_places,
    choose_tokens,
    distillation_loss,
    places_of,
    score_by_student,
    weigh_examples,
)
from tdlib.method.losses import choice_distribution_loss, weighted_distance
from tdlib.method.registry import check_result
from tdlib.method.relevance import STUDENT_RELEVANCE
from tdlib.method.selection import SelectionOptions
from tdlib.method.terms import EXTRA_TERMS, TermInputs
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import SCHEDULES
from tdlib.students.base import StudentOutput, student_inputs
from tdlib.training.adversarial import adversarial_loss
from tdlib.training.data import UNLABELLED
from tdlib.training.repairing import Repaired, Repairing
from tdlib.training.targets import make_targets

# In the order of logs and cards.
TERMS = ("task", "choice", "distill", "repair", "truth", "features", "extra")
# Windows of batches of the regression that ``phi`` starts from: more tokens than the student is wide.
PHI_BATCHES = 8
PHI_RIDGE = 1e-2  # its penalty, as a share of the mean square of the features
# Devices on which the loss reads only the selected tokens. To count these, any other device would have to
# finish its queue first, so there every token is read, which needs no count.
GATHERING = {"cpu"}


def term_weights(config: RunConfig, progress: float | None = None) -> dict[str, float]:
    """What each term weighs in the loss, in the order in which terms are added; 0 for a term that is absent.

    ``progress`` is the share of updates done; None gives the weights before any schedule.
    """
    distill, repair = config.distill_weight, config.repair_weight
    if progress is not None:
        distill = distill * SCHEDULES[config.distill_schedule](progress)
        repair = repair * SCHEDULES[config.repair_schedule](progress)
    return {
        "task": 1.0,
        "choice": config.choice_weight,
        "distill": distill,
        "features": distill if config.distils_unlabelled else 0.0,
        "repair": repair,
        "truth": config.truth_weight,
        "extra": config.extra_weight,
    }


@dataclass(frozen=True)
class Chosen:
    """The tokens of a batch that are distilled: a mask, weights and scores, all (batch, choices, tokens).

    ``places`` are where the loss reads, ``vectors`` the targets there.
    """

    selected: Tensor
    weights: Tensor
    scores: Tensor
    places: dict[str, Tensor]
    vectors: Tensor

    @property
    def whole(self) -> Tensor:
        """0 if every score is a number, else none.

        Selectors leave other tokens out; a loss that reads the selection must not look whole without them.
        """
        return 0 * self.scores.detach().sum()


class TargetedDistillation(nn.Module):
    """A student with the loss of the method (step 9 and the terms beside it).

    ``phi`` is one linear map per modality (or one for both) from the student's width to the teacher's
    joint space. It exists only here and is dropped after training (our reading). So are ``log_variance``, the
    learned uncertainty of each term (Kendall et al. 2018, eq. 10; only with a schedule "learned"),
    and the map of ``repairing`` that reads a statement's truth from its tokens.

    The trainer sets ``progress``, the share of updates done, before each batch: schedules read it.
    """

    def __init__(self, student: PreTrainedModel, config: RunConfig, teacher_dim: int | None):
        super().__init__()
        self.student, self.settings = student, config
        self.phi: nn.ModuleDict | None = None
        self.log_variance: nn.ParameterDict | None = None
        self.repairing: Repairing | None = None
        self.progress = 0.0
        width = student.config.hidden_size
        target_dim = teacher_dim if config.distill_weight > 0 else None
        layers = student.config.num_hidden_layers + 1
        if (target_dim is not None or self.chooses_alone) and not -layers <= config.distill_layer < layers:
            raise ConfigError(
                f"distill_layer={config.distill_layer}: the student has hidden states {-layers} to "
                f"{layers - 1}"
            )
        if target_dim is not None:
            with torch.random.fork_rng():  # the baseline's random numbers stay what they are
                torch.manual_seed(config.seed)
                self.phi = nn.ModuleDict(
                    {name: nn.Linear(width, target_dim) for name in self._mapped(config)}
                )
        if self.chooses_alone and not self.maps_tokens and config.relevance in STUDENT_RELEVANCE:
            raise ConfigError(
                f"relevance={config.relevance!r} compares the student's tokens with their targets, which "
                f"distill_weight={config.distill_weight:g}, distill_target={config.distill_target!r} "
                "leave out; set another relevance, or let tokens be distilled"
            )
        if config.asks_judge:
            self.repairing = Repairing(config, width)
        learned = config.distill_schedule == "learned" and (self.phi is not None or config.choice_weight > 0)
        if learned or (config.repair_schedule == "learned" and config.repair_weight > 0):
            weights = term_weights(config)
            names = [name for name in TERMS if name in TERMS[:3] or weights[name] > 0]
            self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        self.options = SelectionOptions(config.mass, config.count, config.fraction, config.deviations)
        self.generator = torch.Generator().manual_seed(config.seed)

    @staticmethod
    def _mapped(config: RunConfig) -> list[str]:
        """Names of the maps that are learned; a map that both modalities share is called "text"."""
        tokens = ["text"] if config.shared_phi else ["text", "visual"]
        names = {"tokens": tokens, "global": ["text_global", "image_global"]}
        return names.get(config.distill_target) or [*names["tokens"], *names["global"]]

    @property
    def maps_tokens(self) -> bool:
        """True if there are maps of tokens: not where nothing, or global embeddings alone, are distilled."""
        return self.phi is not None and self.settings.distill_target != "global"

    @property
    def chooses_alone(self) -> bool:
        """True if a term reads the chosen tokens whether or not there are maps of them."""
        return self.settings.truth_weight > 0 or self.settings.extra_weight > 0

    @property
    def token_maps(self) -> Mapping[str, nn.Module]:
        """The map of each modality's tokens."""
        assert self.phi is not None
        return {
            "text": self.phi["text"],
            "visual": self.phi["text" if self.settings.shared_phi else "visual"],
        }

    def generators(self) -> dict[str, torch.Generator]:
        """The generators that this module draws from; checkpoints store their states."""
        return {"generator": self.generator} | (
            {"repairing": self.repairing.generator} if self.repairing is not None else {}
        )

    def forward(self, batch: dict[str, Tensor], window: int | None = None) -> dict[str, Tensor]:
        """Computes the loss and its terms for one batch.

        Every term is a sum over the batch divided by ``window``, the number of examples in the whole
        accumulation window, so that the gradients of its batches add up to those of one large batch. (A term
        that compares examples with each other finds fewer in a small batch: re-pairing its pictures, "truth"
        of one statement and ``info_nce`` their rivals.)
        """
        config, batch = self.settings, self.with_targets(batch)
        examples = window or len(batch["labels"])
        if config.adversarial_steps and self.training:
            output, extra = adversarial_loss(
                self.student, self.inputs(batch), batch, self.task_loss, config, examples
            )
        else:
            output, extra = self.student(**self.inputs(batch)), {}
        assert output.logits is not None
        output.logits = logits = output.logits.float()
        repaired = None
        if self.repairing is not None:
            repaired = self.repairing.repair(self.student, batch, logits, config.repair_share)
        extra |= self._features(batch, examples)
        with torch.autocast(logits.device.type, enabled=False):  # losses are float32 in every precision
            terms = {"task": self.task_loss(logits, batch, examples), **extra}
            if config.choice_weight > 0:
                terms["choice"] = self._choice_loss(logits, batch, examples)
            chosen = self._chosen(batch, output)
            if self.phi is not None:
                terms |= self._distill(output, batch, chosen, examples)
            if self.repairing is not None:
                terms |= self._repair(output, repaired, batch, chosen, examples)
            if config.extra_weight > 0:
                terms["extra"] = self._extra(output, batch, chosen) / examples
            return {"loss": self._total(terms, examples, len(batch["labels"])), "logits": logits, **terms}

    def with_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces the teacher's features of a batch by its targets, see ``targets.make_targets``."""
        return make_targets(batch, self.settings)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments with which the student is called."""
        inputs: dict[str, Any] = student_inputs(self.student, batch)
        reads_tokens = self.phi is not None or self.chooses_alone
        return inputs | {"output_hidden_states": True} if reads_tokens else inputs

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
        """The term "choice": the divergence from the teacher's distribution over choices (or labels)."""
        config = self.settings
        weights = self.instance_weights(batch, logits, config.choice_instance_weight)
        weights = weights * batch["teacher_knows"]  # where CLIP had to cut a text it compared other texts
        return choice_distribution_loss(
            logits, batch["teacher_logits"], config.choice_temperature, examples, weights
        )

    def _chosen(self, batch: dict[str, Tensor], output: StudentOutput) -> Chosen | None:
        """Chooses tokens once for all terms that read them; None where no term does."""
        if not self.maps_tokens and not self.chooses_alone:
            return None
        assert output.hidden_states is not None
        _, scores = self.scores(batch, output.hidden_states[self.settings.distill_layer].float())
        selected, weights = self.choose_tokens(batch, scores)
        distilled = selected & batch["valid"] & (weights != 0)
        if distilled.device.type in GATHERING:
            places = places_of(distilled, Tokens(batch["target_spans"], batch["target_boxes"]))
            return Chosen(selected, weights, scores, places, batch["vectors"])
        # A target of zeros is none, also to a distance that compares tokens with each other.
        targets = batch["vectors"] * distilled.unsqueeze(-1)
        places = all_places(distilled, batch["spans"].shape[2])
        return Chosen(selected, weights, scores, places, targets)

    def _repair(
        self, output: StudentOutput, repaired: Repaired | None, batch: dict[str, Tensor],
        chosen: Chosen | None, examples: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms beyond the paper: CLIP's judgement of re-paired examples, and the truth of statements."""
        assert self.repairing is not None
        share = len(batch["labels"]) / examples
        terms = self.repairing.repair_loss(repaired, share) if repaired else {}
        if self.settings.truth_weight > 0:
            assert chosen is not None
            truth = self.repairing.truth_loss(output, repaired, batch, chosen.selected, chosen.weights)
            terms["truth"] = truth * share + chosen.whole
        return terms

    def _extra(self, output: StudentOutput, batch: dict[str, Tensor], chosen: Chosen | None) -> Tensor:
        """The term "extra", summed over the batch: what ``extra_term`` makes of each example."""
        assert chosen is not None and output.hidden_states is not None and output.logits is not None
        name, logits = self.settings.extra_term, output.logits
        per_example = EXTRA_TERMS[name](
            TermInputs(
                logits=logits, hidden=output.hidden_states[self.settings.distill_layer].float(),
                hidden_states=output.hidden_states,
                tokens=Tokens(batch["target_spans"], batch["target_boxes"]), labels=batch["labels"],
                teacher_logits=batch["teacher_logits"], teacher_knows=batch["teacher_knows"],
                targets=batch["vectors"], valid=batch["valid"], scores=chosen.scores,
                selected=chosen.selected, weights=chosen.weights,
                instance_weights=self.instance_weights(batch, logits) * batch["teacher_knows"],
            )
        )  # fmt: skip
        check_result(f"extra_term {name!r}", per_example, batch["labels"].shape)
        if torch.is_grad_enabled() and not per_example.requires_grad:
            raise ValueError(f"extra_term {name!r} does not depend on the student: it would teach nothing")
        return per_example.sum() + chosen.whole

    def _features(self, batch: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        """The term "features": step 9 on the unlabelled examples that travel with a batch, if any.

        It is averaged over these examples and has the weight of "distill" (beyond the paper; a kind of
        semi-supervised distillation). No label is read: an instance weight that asks for the right answer
        is given CLIP's best one.
        """
        unlabelled = {n.removeprefix(UNLABELLED): v for n, v in batch.items() if n.startswith(UNLABELLED)}
        if not unlabelled or self.phi is None:
            return {}
        unlabelled = self.with_targets(unlabelled)
        unlabelled["labels"] = unlabelled["teacher_logits"].argmax(-1)
        output = self.student(**self.inputs(unlabelled))
        assert output.logits is not None
        output.logits = output.logits.float()
        with torch.autocast(output.logits.device.type, enabled=False):
            chosen = self._chosen(unlabelled, output)
            terms = self._distill(output, unlabelled, chosen, len(unlabelled["labels"]))
        return {"features": terms["distill"] * (len(batch["labels"]) / examples)}

    def _total(self, terms: dict[str, Tensor], examples: int, here: int) -> Tensor:
        """The sum of the weighted terms; ``here`` of the window's ``examples`` are in this batch."""
        loss = terms["task"].new_zeros(())
        for name, weight in term_weights(self.settings, self.progress).items():
            if name not in terms:
                continue
            term = terms[name]
            if self.log_variance is not None:
                variance = self.log_variance[name]
                term = (-variance).exp() * term + variance / 2 * here / examples
            loss = loss + weight * term
        return loss + terms["adversarial"] if "adversarial" in terms else loss

    def _distill(
        self, output: StudentOutput, batch: dict[str, Tensor], chosen: Chosen | None, examples: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """The term "distill" (step 9), and what the log keeps of the selection."""
        assert self.phi is not None and output.hidden_states is not None and output.logits is not None
        hidden = output.hidden_states[self.settings.distill_layer].float()
        instance = self.distill_weights(batch, output.logits)
        sequences = examples * hidden.shape[1]
        terms = {"distill": hidden.new_zeros(()), "instance_weight": instance.sum() / examples}
        if self.settings.distill_target != "tokens":
            weights = 0.5 * instance.repeat_interleave(hidden.shape[1])
            for name in ("text_global", "image_global"):
                # A distance that compares tokens finds those of all sequences, but none that weigh nothing.
                mapped, targets = self.phi[name](hidden[:, :, 0]).flatten(0, 1), batch[name].flatten(0, 1)
                targets = targets.masked_fill(weights[:, None] == 0, 0)
                distance = weighted_distance(mapped, targets, weights, self.settings.distance)
                terms["distill"] = terms["distill"] + distance / sequences
        if chosen is None or not self.maps_tokens:
            return terms
        on_words, on_places = distillation_loss(
            hidden, self.token_maps, chosen.vectors, chosen.weights, instance, chosen.places,
            self.settings.distance, sequences,
        )  # fmt: skip
        selected, text = chosen.selected, Tokens(batch["target_spans"], batch["target_boxes"]).is_text
        return terms | {
            "distill": terms["distill"] + on_words + on_places + chosen.whole,
            "selected_text": (selected & text).sum() / sequences,
            "selected_visual": (selected & ~text).sum() / sequences,
            "selected_mass": chosen.scores.masked_fill(~selected, 0).sum() / sequences,
            "empty_selections": (~selected.any(-1)).sum() / sequences,
        }

    def scores(self, batch: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Relevance and scores of the tokens, both (batch, choices, tokens).

        They were computed together with the targets, unless relevance depends on the student: then they are
        computed here from ``hidden`` (batch, choices, tokens, student_dim). A run without maps of tokens
        cannot compare them: there relevance stays 0, and the scores are the prior's.
        """
        config = self.settings
        if config.relevance not in STUDENT_RELEVANCE or not self.maps_tokens:
            return batch["relevance"], batch["scores"]
        assert hidden is not None
        student = Tokens(batch["target_spans"], batch["target_boxes"])
        maps = self.token_maps
        with torch.no_grad():
            mapped = torch.where(student.is_text[..., None], maps["text"](hidden), maps["visual"](hidden))
        return score_by_student(
            mapped, batch["vectors"], batch["prior"], student, batch["valid"], config.relevance,
            config.temperature, config.prior_weight,
        )  # fmt: skip

    def choose_tokens(self, batch: dict[str, Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Selected tokens and their weights, both (batch, choices, tokens) as the ``scores``."""
        config, student = self.settings, Tokens(batch["target_spans"], batch["target_boxes"])
        return choose_tokens(
            scores, student, batch["valid"], config.selector, self.options, config.token_weight,
            self.generator,
        )  # fmt: skip

    def instance_weights(self, batch: dict[str, Tensor], logits: Tensor, name: str = "") -> Tensor:
        """Step 8: the weight c of each example, (batch,); carries no gradient.

        0 for an example whose right answer is not in the label set (if the weight reads it), or one of whose
        texts CLIP had to cut: there is no p_T, which "uniform" alone does not read. ``name`` is a key of
        ``INSTANCE_WEIGHTS``; "" takes the run's.
        """
        name = name or self.settings.instance_weight
        weights = weigh_examples(batch["teacher_logits"], logits, batch["labels"], name)
        return weights if name == "uniform" else weights * batch["teacher_knows"]

    def distill_weights(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        """The weight c of each example in the term "distill", (batch,): ``instance_weights`` of whole texts.

        Where CLIP had to cut a text, its global embedding, by which patches are selected, is that of another
        text. The tokens before the cut are right, as CLIP's text tower reads from left to right; so only a
        loss without a selection keeps such an example.
        """
        weights = self.instance_weights(batch, logits)
        selects = self.settings.distill_target != "tokens" or self.settings.selector != "all"
        return weights * batch["teacher_knows"] if selects else weights

    @torch.no_grad()
    def fit_phi(self, loader: DataLoader) -> None:
        """Starts the maps at the ridge regression of targets on the untrained student's hidden states.

        With random maps the first updates would pull the student in random directions. From here on, what
        the student already knows is mapped to the teacher's vectors and only the rest is learned (our
        reading).
        """
        assert self.phi is not None
        xx: dict[str, Any] = defaultdict(float)  # of each map: the sums of x x^T, and of x y^T
        xy: dict[str, Any] = defaultdict(float)
        device = next(self.student.parameters()).device
        self.student.eval()
        for number, batch in enumerate(loader):
            if number == PHI_BATCHES * self.settings.accumulation:  # the examples of as many updates
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
                # A column of ones gives the bias. Double precision: the normal equations square the
                # condition number of x.
                x = nn.functional.pad(hidden[chosen], (0, 1), value=1.0).double()
                y = targets[chosen].double()
                xx[name], xy[name] = xx[name] + x.T @ x, xy[name] + x.T @ y
        for name, linear in self.phi.items():
            if not xx[name].any():  # no token has a target, as in a task without words
                continue
            # Relative to the size of the features, so that it means the same for every student.
            eye = torch.eye(len(xx[name]), dtype=torch.double, device=device)
            penalty = PHI_RIDGE * xx[name].diagonal().mean() * eye
            assert isinstance(linear, nn.Linear)
            solution = torch.linalg.solve(xx[name] + penalty, xy[name]).to(linear.weight.dtype)
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])
