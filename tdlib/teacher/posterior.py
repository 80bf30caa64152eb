"""The teacher's class probabilities by Bayes' rule: how frequent an answer is, and how well it fits.

Zero-shot, CLIP compares the picture with the question and each of many answers; it does not know which of
them answer *this kind* of question, and a probe of its embeddings has to learn that from few examples. How
often each answer is right among the labelled questions of the same kind says it (our reading; a class prior
added to logits, as in Menon et al. 2020, arXiv 2007.07314).
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tdlib.data.examples import Example, Examples
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.probe import AnswerStatements, statement_logits

log = logging.getLogger(__name__)

JUDGED_ANSWERS = 32  # of a question
SHARPNESS = (0.1, 0.25, 0.5, 1.0, 2.0)  # by which CLIP's scaled cosines may be multiplied
FITTED = 2_000  # labelled examples that choose among these
MANY = 1_000_000  # texts, which take a GPU minutes
UNJUDGED = -1e4  # the logit of an answer that is not judged: its probability is exactly 0


class AnswerPosterior:
    """CLIP's distribution over the answers of a label set, for any picture.

        log p(a | question, picture) = r * scale * cos(picture, "question a") + log p(a | kind) + constant

    ``p(a | kind)`` is the share of ``a`` among the labelled examples of the same stratum (VQA: question
    type), drawn towards its share among all by one further example. Examples about the same picture are not
    counted, so that no example tells the teacher its own answer; nor are strata told apart where each has
    one label alone: such a stratum would be the answer. ``r`` is the one of ``SHARPNESS`` with
    which the labelled examples' answers have the highest likelihood. Only the ``JUDGED_ANSWERS`` most
    frequent in the stratum, and then among all, are judged; the cache stores the global embedding of each
    question with each of them, without tokens (1 kB for a teacher of 512 dimensions).

    Args:
        cache: holds the examples' pictures; statements that it lacks are added.
        examples: the training subset, as the teacher sees it.
        labels: the label set.

    Attributes:
        sharpness: the factor ``r``.
        held_out_accuracy: of the labelled examples that chose it (at most ``FITTED``), the share of which
            the most probable answer is the label; nan without any.
    """

    def __init__(self, cache: TeacherCache, examples: Sequence[Example], labels: Sequence[str]):
        self.cache, self.labels = cache, labels
        self._counts: dict[str, Counter[int]] = defaultdict(Counter)
        self._of_picture: dict[Path, list[tuple[str, int]]] = defaultdict(list)
        fitted: list[tuple[bytes, int]] = []
        every = Examples.of(examples)
        for place, example in enumerate(every):
            if example.label is not None:
                self._counts[example.stratum][example.label] += 1
                self._of_picture[example.image].append((example.stratum, example.label))
                fitted.append((hashlib.sha256(example.id.encode()).digest(), place))
        self._all: Counter[int] = sum(self._counts.values(), Counter())
        if all(len(counted) == 1 for counted in self._counts.values()):
            self._counts.clear()
        self._judged = self._most_frequent()
        self.sharpness, self.held_out_accuracy = 1.0, float("nan")
        if (texts := len(every) * len(self._judged[""])) > MANY:
            log.warning("up to %s questions with an answer are read by the teacher, once", f"{texts:,}")
        self.prepare(every)
        self._choose_sharpness([every[place] for _, place in sorted(fitted)[:FITTED]])

    def _most_frequent(self) -> dict[str, list[int]]:
        """The labels that are judged for each stratum, most frequent first; "" holds those of all strata."""
        by_frequency = [label for label, _ in self._all.most_common()]
        by_frequency += [label for label in range(len(self.labels)) if label not in self._all]
        size = min(JUDGED_ANSWERS, len(self.labels))  # the same for every example
        ordered = {
            stratum: [*dict.fromkeys([label for label, _ in counted.most_common()] + by_frequency)][:size]
            for stratum, counted in self._counts.items()
        }
        return {"": by_frequency[:size]} | ordered

    def _choose_sharpness(self, labelled: Sequence[Example]) -> None:
        fits, priors, rights = list[Tensor](), list[Tensor](), list[int]()
        for example in labelled:
            outputs = self.judged(example)
            if example.label in outputs:
                fits.append(self._fit(example))
                priors.append(self.log_prior(example))
                rights.append(outputs.index(example.label))
        if not rights:
            return
        fit, prior, right = torch.stack(fits), torch.stack(priors), torch.tensor(rights)
        losses = {factor: float(F.cross_entropy(factor * fit + prior, right)) for factor in SHARPNESS}
        self.sharpness = min(losses, key=lambda factor: losses[factor])
        hits = (self.sharpness * fit + prior).argmax(1) == right
        self.held_out_accuracy = float(hits.sum()) / len(labelled)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Adds to the cache in large batches what these examples lack (calling adds one by one)."""
        self.cache.add_pooled(text for example in examples for text in self.statements(example))

    def judged(self, example: Example) -> list[int]:
        """The labels that are judged, as many for every example."""
        return self._judged.get(example.stratum, self._judged[""])

    def statements(self, example: Example) -> list[str]:
        """The question followed by each answer that is judged, in the order of ``judged``."""
        return AnswerStatements(tuple(self.labels[label] for label in self.judged(example)))(example)

    def log_prior(self, example: Example, flat: bool = False) -> Float[Tensor, " judged"]:
        """The logarithm of ``p(a | kind)``, in nats, of the answers that are judged.

        With ``flat`` every answer that is right of some other picture counts once, however often it is:
        which answers a kind of question has, without saying which it mostly has.
        """
        of_kind = self._counts.get(example.stratum, Counter())
        own = self._of_picture.get(example.image, ())
        own_all = Counter(label for _, label in own)
        own_kind = Counter(label for stratum, label in own if of_kind and stratum == example.stratum)
        judged = self.judged(example)
        # Half a count for every answer, so that one which the subset lacks is not impossible.
        overall = torch.tensor([self._all[label] - own_all[label] + 0.5 for label in judged])
        kind = torch.tensor([float(of_kind[label] - own_kind[label]) for label in judged])
        shares = (kind.clamp(max=1) if flat else kind) + overall / overall.sum()
        return (shares / shares.sum()).log()

    def _fit(self, example: Example) -> Float[Tensor, " judged"]:
        return statement_logits(self.cache, self.statements, example)

    def __call__(self, example: Example) -> Float[Tensor, " labels"]:
        """Computes logits over the label set; ``UNJUDGED`` for the answers that are not judged."""
        self.prepare([example])
        logits = torch.full((len(self.labels),), UNJUDGED)
        logits[self.judged(example)] = self.sharpness * self._fit(example) + self.log_prior(example)
        return logits
