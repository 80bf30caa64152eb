"""Re-pairing while a student trains: the second pass with other pictures, and its loss (beyond the paper).

``method.pairing`` computes CLIP's judgement of a pair and chooses the picture; ``judging`` lists the
statements that CLIP judges. This module does what happens at an update.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tdlib.config import RunConfig
from tdlib.method.losses import choice_distribution_loss
from tdlib.method.pairing import PICTURE_CHOICES, judge_choices, judge_truth, other_pictures
from tdlib.method.registry import check_result
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import INSTANCE_WEIGHTS
from tdlib.students.base import EncodedText, StudentOutput, student_inputs

TEXT_INPUTS = {field.name for field in fields(EncodedText)}
TRUTH_LAYER = -2  # one layer below the top: what [CLS] reads


@dataclass
class Pairs:
    """Which rows of a batch are shown with which picture; ``rows`` and ``columns`` run over the pairs.

    ``columns`` count the batch's pictures, then those of the pool. ``exists`` is False for a row that has
    no other picture to be shown with. ``teacher`` are CLIP's logits over the judged statements.
    """

    rows: Tensor
    columns: Tensor
    exists: Tensor
    teacher: Tensor  # (pairs, judged)
    own: Tensor  # (batch, judged), for the example's own picture


@dataclass
class Repaired:
    """Pairs, and the student's output for them."""

    pairs: Pairs
    output: StudentOutput
    student: Tensor  # (pairs, judged), its logits of the judged outputs
    weights: Tensor  # (pairs,), 0 for a pair that does not exist


def rows_of(share: float, examples: int) -> int:
    """How many of so many examples are shown again: ``share`` of them, rounded up."""
    return math.ceil(share * examples * (1 - 1e-9))  # 0.07 * 100 is above 7 in floating point


class Repairing(nn.Module):
    """The terms "repair" and "truth" of one run; its map ``psi`` is dropped after training.

    ``L_repair = mean_b c[b] * KL(CLIP(. | text b, picture j(b)) || student(. | text b, picture j(b)))``,
    where ``repair_instance_weight`` gives c. A weight that asks for the right answer is given CLIP's best
    one, so no label is read. The mean runs over the pairs that are shown, so that ``repair_share`` changes
    the cost of the term and not its size. Of several processes that train together, each pairs within its
    share of the batch: n of them have n times fewer pictures to choose from (unless there is a pool).

    ``L_truth = mean_b certainty[b] * sum_i w[b, i] * BCE(psi(h[b, i]), p_CLIP(statement))``: the selected
    text tokens, one layer below the top, predict whether their statement is true of the picture.
    """

    def __init__(self, config: RunConfig, width: int):
        super().__init__()
        self.settings = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.psi: nn.Linear | None = None
        if config.truth_weight > 0:
            with torch.random.fork_rng():  # the baseline's random numbers stay what they are
                self.psi = nn.Linear(width, 1)
            nn.init.zeros_(self.psi.weight)
            nn.init.zeros_(self.psi.bias)

    def judge(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CLIP's logits (batch, pictures, judged), and those for each example's own picture (batch, judged).

        Beside these the numbers of the pictures, and whether each is there for the first time.
        """
        numbers, images = batch["picture"], batch["image_global"][:, 0]
        if "pool_picture" in batch:
            numbers = torch.cat([numbers, batch["pool_picture"]])
            images = torch.cat([images, batch["pool_image"]])
        first = (numbers[:, None] == numbers[None]).long().argmax(dim=1)
        distinct = first == torch.arange(len(numbers), device=numbers.device)
        if asks_truth(batch):
            judged = judge_truth(batch["statements"], images, distinct)
        else:
            judged = judge_choices(batch["statements"], images, batch["statement_prior"])
        own = judged[torch.arange(len(judged), device=first.device), first[: len(judged)]]
        return judged, own, numbers, distinct

    def pair(self, batch: dict[str, Tensor], logits: Tensor, share: float = 1.0) -> Pairs:
        """Chooses the rows that are shown again (``share`` of them), and the picture of each."""
        config, examples = self.settings, len(batch["labels"])
        with torch.autocast(batch["image_global"].device.type, enabled=False):
            # bf16 would round CLIP's logits to 1/8 where its scale is 100, and another picture might win.
            judged, own, numbers, distinct = self.judge(batch)
        everyone = columns = torch.arange(examples, device=numbers.device)
        if config.repair_pool == "own":  # a control: CLIP's judgement of the true pairs
            exists = torch.ones_like(columns, dtype=torch.bool)
            judged_there = own
        else:
            allowed = other_pictures(batch["picture"], numbers)
            if "pool_picture" in batch:
                allowed[:, :examples] = False
            else:  # a picture of several examples must not be drawn more often than others
                allowed &= distinct
            student = logits.detach().gather(1, batch["judged"])
            choose = PICTURE_CHOICES[config.repair_choice]
            columns = choose(judged, own, student, allowed, self.generator)
            exists = columns >= 0
            columns = columns.clamp_min(0)
            judged_there = judged[everyone, columns]
        noise = torch.rand(examples, generator=self.generator).to(numbers.device, non_blocking=True)
        order = noise + 2.0 * ~exists  # noise is below 1: rows without another picture come last
        rows = order.argsort()[: rows_of(share, examples)].sort().values
        return Pairs(rows, columns[rows], exists[rows], judged_there[rows], own)

    def repair(
        self, student: PreTrainedModel, batch: dict[str, Tensor], logits: Tensor, share: float = 1.0
    ) -> Repaired | None:
        """Shows ``share`` of the texts with other pictures; None where nothing is re-paired."""
        config = self.settings
        if config.repair_weight == 0:
            return None
        pairs = self.pair(batch, logits, share)
        output = student(
            **repaired_inputs(student, batch, pairs.rows, pairs.columns),
            output_hidden_states=config.truth_weight > 0,
        )
        own_logits = output.logits.float().gather(1, batch["judged"][pairs.rows])
        teacher = pairs.teacher.softmax(-1)
        weigh = INSTANCE_WEIGHTS[config.repair_instance_weight]
        weights = weigh(teacher, own_logits.detach().softmax(-1), teacher.argmax(-1))
        check_result(f"instance weight {config.repair_instance_weight!r}", weights, pairs.exists.shape)
        # CLIP misjudges a text that it had to cut, with any picture.
        weights = weights * pairs.exists * batch["teacher_knows"][pairs.rows]
        return Repaired(pairs, output, own_logits, weights)

    def repair_loss(self, repaired: Repaired, share: float) -> dict[str, Tensor]:
        """The term "repair", and figures for the log; this batch has ``share`` of the window's examples."""
        pairs = repaired.pairs.exists.sum().clamp_min(1)
        loss = choice_distribution_loss(
            repaired.student, repaired.pairs.teacher, num_examples=1, instance_weights=repaired.weights
        )
        teacher, student = repaired.pairs.teacher, repaired.student.detach()
        agree = (teacher.argmax(-1) == student.argmax(-1)) & repaired.pairs.exists
        return {
            "repair": loss / pairs * share,
            "repair_certainty": repaired.weights.sum() / pairs * share,
            "repair_agreement": agree.sum() / pairs * share,
        }

    def truth_loss(
        self, output: StudentOutput, repaired: Repaired | None, batch: dict[str, Tensor],
        selected: Tensor, weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """The term "truth", on the true pairs and on the re-paired ones if there are any."""
        text = Tokens(batch["target_spans"], batch["target_boxes"]).is_text
        of_text = weights * (selected & text)
        _, own, _, _ = self.judge(batch)
        everyone, knows = torch.ones(len(of_text), device=of_text.device), batch["teacher_knows"]
        loss = self._truth(output, of_text, own, everyone, knows)
        if repaired is not None:
            rows = repaired.pairs.rows
            loss = loss + self._truth(
                repaired.output,
                of_text[rows],
                repaired.pairs.teacher,
                repaired.pairs.exists.float(),
                knows[rows],
            )
        return loss

    def _truth(
        self, output: StudentOutput, of_text: Tensor, teacher: Tensor, exists: Tensor, knows: Tensor
    ) -> Tensor:
        assert self.psi is not None and output.hidden_states is not None
        p = teacher.softmax(-1).detach()
        certainty = INSTANCE_WEIGHTS["certainty"](p, p, p.argmax(-1)) * exists * knows
        # Text tokens come first in every student; visual ones may be fewer with another picture.
        length = min(of_text.shape[2], output.hidden_states[TRUTH_LAYER].shape[2])
        w = of_text[:, :, :length]
        w = w / w.sum(-1, keepdim=True).clamp_min(1e-9)
        told = self.psi(output.hidden_states[TRUTH_LAYER][:, :, :length].float())[..., 0]
        expected = p[:, : told.shape[1], None].expand_as(told)  # of one statement: that it is true
        error = F.binary_cross_entropy_with_logits(told, expected, reduction="none")
        return (certainty[:, None] * (w * error).sum(-1)).mean(1).sum() / exists.sum().clamp_min(1)


def asks_truth(batch: dict[str, Tensor]) -> bool:
    """True if CLIP judges whether one statement is true, False if it compares several statements."""
    return batch["statements"].shape[1] == 1 and batch["judged"].shape[1] == 2


def repaired_inputs(
    student: Any, batch: dict[str, Tensor], rows: Tensor, columns: Tensor
) -> dict[str, Tensor]:
    """A student's inputs for the texts of ``rows`` with the pictures of ``columns``.

    Pictures are the batch's, or the pool's where the batch has one; they are encoded already. A name
    in the text that pointed at an object points at the object of that number in the other picture.
    """
    pooled = "pool_picture" in batch
    examples = len(batch["labels"])
    inputs = {}
    for name, value in student_inputs(student, batch).items():
        if name in TEXT_INPUTS:
            inputs[name] = value[rows]
        elif pooled:
            # A row without another picture has a column of the batch, and no weight: any picture will do.
            inputs[name] = batch[f"pool_{name}"][(columns - examples).clamp_min(0)]
        else:
            inputs[name] = value[columns]
    return inputs
