"""The teacher's class probabilities for tasks without choices: a cross-fitted linear probe, or zero-shot.

The probe reads CLIP's global embeddings, or only how well they fit each other (method, step 8). No training
example is scored by a probe that was fitted on it, so the teacher's certainty does not come from memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tdlib.core.paths import ConfigError
from tdlib.data.examples import Example, Examples
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import choice_logits

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
MOST = 20_000  # examples that are fitted on at most
MOST_STATEMENTS = 10_000_000  # answer statements that a teacher reads for one set of examples
FOLDS = 5  # parts of the subset, whole pictures; each is scored by a probe fitted on the others


def probe_features(
    image: Float[Tensor, "examples dim"], text: Float[Tensor, "examples dim"]
) -> Float[Tensor, "examples features"]:
    """Joins both global embeddings (unit length) and their product: (examples, 3 * dim)."""
    # The product of two unit vectors has entries of 1 / dim; the factor gives it the size of the others.
    return torch.cat([image, text, image * text * image.shape[-1] ** 0.5], dim=-1)


def fit_logistic(
    features: Float[Tensor, "examples features"],
    targets: Float[Tensor, "examples classes"],
    penalty: float,
    steps: int = 60,
) -> tuple[Tensor, Tensor]:
    """Fits a multinomial logistic regression on soft targets by L-BFGS; returns weights and bias.

    Minimises the mean cross-entropy plus ``penalty`` times the sum of squared weights. Rows of ``targets``
    sum to 1.
    """
    weight = torch.zeros(features.shape[1], targets.shape[1], requires_grad=True)
    # The bias starts at the classes' frequencies, so that the few steps are spent on the features.
    bias = targets.mean(0).clamp_min(1e-4).log().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, targets) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


class ClassProbe:
    """Class probabilities of a teacher, learned from a training subset.

    Args:
        cache: holds the features of the examples' statements and pictures.
        examples: the training subset; those without a label are left out of the fit.
        num_labels: size of the label set.
        seed: of the folds.
        fit_alone: the one feature is how well the picture fits the text (the scaled cosine), so that the
            teacher cannot learn what a text alone betrays of its label. Where labels say whether a text is
            true of its picture, this suffices.

    At most ``MOST`` examples are fitted on, the first in a seeded order. The penalty is the one of
    ``PENALTIES`` with the least cross-entropy on the held-out folds. It and the features' mean and scale are
    the only quantities through which an example influences its own held-out prediction.

    Raises:
        ValueError: labelled examples of fewer pictures than folds.
    """

    def __init__(
        self, cache: TeacherCache, examples: Sequence[Example], num_labels: int, seed: int,
        fit_alone: bool = False,
    ):  # fmt: skip
        self.cache, self.fit_alone = cache, fit_alone
        # The order depends on the seed and the ids alone, whatever the order of the subset. No more examples
        # are made than are fitted on: all of VQA would take gigabytes.
        every = Examples.of(examples)
        order = sorted(
            range(len(every)), key=lambda i: hashlib.sha256(f"{seed} {every.ids[i]}".encode()).digest()
        )
        made = (every[place] for place in order)
        labelled = list(islice((example for example in made if example.label is not None), MOST))
        # Folds are of whole pictures: if two questions about one picture were in two folds, the probe would
        # know the picture.
        pictures = {image: place for place, image in enumerate(dict.fromkeys(e.image for e in labelled))}
        if len(pictures) < FOLDS:
            raise ValueError(
                f"labelled examples of {len(pictures)} pictures cannot be split into {FOLDS} folds; "
                "raise shots, or set class_probabilities='statements'"
            )
        # Divided by sqrt(features), rows have about length 1: one range of penalties suits every teacher.
        raw = self._raw(labelled)
        self._mean, self._scale = raw.mean(0), raw.std(0).clamp_min(1e-3) * raw.shape[1] ** 0.5
        features = self._standard(raw)
        targets = torch.stack([soft_target(example, num_labels) for example in labelled])
        targets = targets / targets.sum(1, keepdim=True)
        fold = torch.tensor([pictures[example.image] % FOLDS for example in labelled])
        held_out: dict[float, Tensor] = {}
        for penalty in PENALTIES:
            logits = torch.empty_like(targets)
            for part in range(FOLDS):
                weight, bias = fit_logistic(features[fold != part], targets[fold != part], penalty)
                logits[fold == part] = features[fold == part] @ weight + bias
            held_out[penalty] = logits
        losses = {penalty: float(F.cross_entropy(logits, targets)) for penalty, logits in held_out.items()}
        self.penalty = min(losses, key=lambda penalty: losses[penalty])
        self.weight, self.bias = fit_logistic(features, targets, self.penalty)
        # Training examples get the logits of a probe that did not see them: on its own examples a probe is
        # always right, and instance weights would take the teacher to be surer than it is on any other.
        logits = held_out[self.penalty]
        self._held_out = {_key(example): logits[i] for i, example in enumerate(labelled)}
        self.held_out_accuracy = float((logits.argmax(1) == targets.argmax(1)).float().mean())

    def _raw(self, examples: Sequence[Example]) -> Tensor:
        images = [self.cache.picture(example.image).pooled.float() for example in examples]
        texts = [self.cache.text(example.prompt.text).pooled.float() for example in examples]
        image, text = torch.stack(images), torch.stack(texts)
        if self.fit_alone:
            return self.cache.teacher.logit_scale * (image * text).sum(-1, keepdim=True)
        return probe_features(image, text)

    def _standard(self, raw: Tensor) -> Tensor:
        return (raw - self._mean) / self._scale

    def __call__(self, example: Example) -> Float[Tensor, " classes"]:
        """Computes logits over the label set, for an example of the fit by the probe that did not see it."""
        if (known := self._held_out.get(_key(example))) is not None:
            return known
        return (self._standard(self._raw([example])) @ self.weight + self.bias)[0]


def _key(example: Example) -> tuple[str, str, str]:
    """Tells an example of the fit from one of another split that has the same id."""
    return example.id, str(example.image), example.prompt.text


@dataclass(frozen=True)
class AnswerStatements:
    """Words a statement for each label that fits the picture if the label is right (our wording).

    Answers follow the question. Where labels say whether a text is true of its picture, ``verdicts`` are
    those for true and for false: they become the text and its negation, any other label its doubt.
    """

    labels: tuple[str, ...]
    verdicts: tuple[str, str] | None = None

    def __call__(self, example: Example) -> list[str]:
        """The statement of each label, in order."""
        text = example.prompt.text.strip()
        if self.verdicts is None:
            return [f"{text} {label}" for label in self.labels]
        said = text[:1].lower() + text[1:]
        worded = dict(zip(self.verdicts, (text, f"It is not true that {said}"), strict=True))
        return [worded.get(label, f"Perhaps {said}") for label in self.labels]


def statement_logits(
    cache: TeacherCache, answers: Callable[[Example], Sequence[str]], example: Example
) -> Tensor:
    """Computes zero-shot logits over the label set: scaled cosines of the picture with answer statements.

    The statements must be in the cache.
    """
    texts = [cache.pooled(text) for text in answers(example)]
    picture = cache.picture(example.image).pooled.float()
    return choice_logits(picture, torch.stack(texts), cache.teacher.logit_scale)


def check_statements(examples: int, labels: int) -> None:
    """Refuses answer statements that a teacher would read for days and that no disk holds (all of VQA).

    Raises:
        ConfigError: there are more than ``MOST_STATEMENTS``.
    """
    if examples * labels > MOST_STATEMENTS:
        raise ConfigError(
            f"class_probabilities='statements': {examples} examples with {labels} answers each are "
            f"{examples * labels:,} texts for the teacher, of at most {MOST_STATEMENTS:,}; set "
            "class_probabilities='fit', or fewer shots and a smaller vocabulary (vocabulary_minimum)"
        )


@dataclass(frozen=True)
class CutTexts:
    """The number of examples that a teacher cannot read in full, and the one of which it misses most."""

    examples: int
    cut_examples: int
    most: int  # tokens beyond the context in one text
    id: str

    def __str__(self) -> str:
        return (
            f"{self.cut_examples} of {self.examples} examples have texts beyond the teacher's context (up to "
            f"{self.most} tokens, {self.id}): it cannot tell their choices apart by what it does not see, so "
            "its distribution over them is not distilled"
        )


def count_cut(
    examples: Iterable[Example],
    cut: Callable[[str], int],
    answers: Callable[[Example], Sequence[str]] | None = None,
) -> CutTexts:
    """Counts the examples of which a teacher cuts a text, given how many tokens it cuts of one.

    The texts are those that are compared with the picture for the teacher's distribution over answers: the
    answer statements, or without them the statements with each choice (or the only one).
    That is ``TeacherCache.cut``, or, where no weights are at hand, ``lambda text: tokenize.read(text).cut``
    with ``text.open_tokenizer``.
    """
    number = bad = most = 0
    worst = ""
    for example in examples:
        texts = answers(example) if answers else [statement.text for statement in example.statements()]
        longest = max(map(cut, texts))
        number, bad = number + 1, bad + (longest > 0)
        if longest > most:
            most, worst = longest, example.id
    return CutTexts(number, bad, most, worst)


def soft_target(example: Example, num_labels: int) -> Float[Tensor, " classes"]:
    """Returns the worth of each label for an example, in [0, 1]: its soft label, or 1 for its label."""
    target = torch.zeros(num_labels)
    if example.soft_label:
        for index, value in example.soft_label:
            target[index] = value
    elif example.label is not None:
        target[example.label] = 1.0
    return target
