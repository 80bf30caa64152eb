"""The teacher's class probabilities: an optimal fit, and no score by a probe that saw its example."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tdlib.core.paths import ConfigError
from tdlib.data.examples import Example, Examples, TextPart
from tdlib.teacher import probe
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.teacher.probe import (
    AnswerStatements,
    ClassProbe,
    fit_logistic,
    probe_features,
    soft_target,
    statement_logits,
)
from tdlib.training.judging import StatementJudge
from tdlib.training.prepare import add_to_cache

COLOURS = ("red", "blue", "white")
TEXTS = ("A dog runs.", "It is a plate.", "Two people sit at a table.", "There is a red cup.")


@pytest.fixture(scope="module")
def problem(tmp_path_factory, teacher) -> tuple[TeacherCache, list[Example]]:
    """24 pictures in three colours, which are the labels, and the cache of their features."""
    folder = tmp_path_factory.mktemp("probe")
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(24):
        shift = torch.randint(-30, 30, (3,), generator=generator)
        base = torch.tensor([(200, 40, 40), (40, 40, 200), (220, 220, 220)][i % 3])
        Image.new("RGB", (32, 32), tuple((base + shift).tolist())).save(folder / f"{i}.png")
        examples.append(
            Example(f"q{i}", folder / f"{i}.png", (), (), TextPart(TEXTS[i % 4]), (), i % 3, "all")
        )
    cache = TeacherCache(folder / "cache", teacher)
    texts = {text for e in examples for text in (e.prompt.text, *AnswerStatements(COLOURS)(e))}
    cache.add(texts, [example.image for example in examples])
    return cache, examples


def relabel(examples: list[Example], changed: str, **changes) -> list[Example]:
    return [dataclasses.replace(e, **changes) if e.id == changed else e for e in examples]


# the fit


def gradients(features, targets, weight, bias, penalty) -> float:
    """The largest entry of the gradient of mean cross-entropy + penalty * squared weights, in closed form."""
    error = ((features @ weight + bias).softmax(-1) - targets) / len(targets)
    return max(
        (features.T @ error + 2 * penalty * weight).abs().max().item(), error.sum(0).abs().max().item()
    )


@pytest.mark.parametrize("penalty", probe.PENALTIES)
def test_the_fit_is_where_the_gradient_vanishes(penalty):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, 6, generator=generator)
    targets = (2 * features @ torch.randn(6, 4, generator=generator)).softmax(-1)
    weight, bias = fit_logistic(features, targets, penalty)
    assert gradients(features, targets, weight, bias, penalty) < 5e-4  # the loss is in single precision
    assert gradients(features, targets, 1.1 * weight, bias, penalty) > 3e-3
    assert gradients(features, targets, torch.zeros_like(weight), bias, penalty) > 1e-2
    assert not weight.requires_grad and not bias.requires_grad


def test_a_heavier_penalty_gives_smaller_weights_and_in_the_end_the_frequencies():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(40, 5, generator=generator)
    targets = F.one_hot((features[:, 0] > 0).long() + (features[:, 1] > 1).long(), 3).float()
    norms = [fit_logistic(features, targets, penalty)[0].norm().item() for penalty in (1e-3, 1e-1, 1e1)]
    assert norms[0] > norms[1] > norms[2]
    weight, bias = fit_logistic(features, targets, 1e4)
    assert torch.allclose((features @ weight + bias).softmax(-1), targets.mean(0).expand(40, 3), atol=1e-3)


def test_soft_targets_are_fitted_as_shares():
    features = torch.eye(2).repeat(10, 1)
    targets = torch.tensor([[0.75, 0.25, 0.0], [0.1, 0.2, 0.7]]).repeat(10, 1)
    weight, bias = fit_logistic(features, targets, 1e-6, steps=200)
    assert torch.allclose((features @ weight + bias).softmax(-1), targets, atol=0.02)


def test_features_are_both_embeddings_and_their_product():
    image, text = F.normalize(torch.randn(2, 3, 16), dim=-1)
    features = probe_features(image, text)
    assert features.shape == (3, 48)
    assert torch.equal(features[:, :16], image) and torch.equal(features[:, 16:32], text)
    assert torch.allclose(features[:, 32:].sum(-1), 4 * (image * text).sum(-1), atol=1e-5)


# cross-fitting


def test_a_separable_problem_is_learned_without_seeing_the_example(problem):
    cache, examples = problem
    found = ClassProbe(cache, examples, 3, seed=0)
    assert found.held_out_accuracy > 0.9
    right = sum(int(found(e).argmax() == e.label) for e in examples)
    assert right / len(examples) == pytest.approx(found.held_out_accuracy)
    new = ClassProbe(cache, examples[:18], 3, seed=0)
    assert sum(int(new(e).argmax() == e.label) for e in examples[18:]) >= 5
    assert all(new(e).shape == (3,) and not new(e).requires_grad for e in examples)


def test_labels_that_nothing_shows_are_not_learned_by_heart(problem):
    cache, examples = problem
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 2, (24,), generator=generator).tolist()
    shuffled = [dataclasses.replace(e, label=label) for e, label in zip(examples, random, strict=True)]
    assert ClassProbe(cache, shuffled, 2, seed=0).held_out_accuracy < 0.8


@pytest.mark.parametrize("change", [{"label": 0}, {"label": 2}, {"soft_label": ((0, 0.3), (2, 1.0))}])
def test_an_examples_own_label_does_not_reach_its_logits(problem, monkeypatch, change):
    monkeypatch.setattr(probe, "PENALTIES", (1e-2,))  # which penalty is best depends on all labels
    cache, examples = problem
    before = ClassProbe(cache, examples, 3, seed=0)
    changed = ClassProbe(cache, relabel(examples, "q7", **change), 3, seed=0)  # q7 has label 1
    assert torch.equal(before(examples[7]), changed(examples[7]))
    differing = [e for e in examples if not torch.equal(before(e), changed(e))]
    assert len(differing) >= 24 * 3 // 5  # those of the other folds


def test_of_what_is_left_out_of_the_fit_the_final_probe_speaks(problem, monkeypatch):
    cache, examples = problem
    unlabelled = ClassProbe(cache, relabel(examples, "q7", label=None), 3, seed=0)
    absent = ClassProbe(cache, [e for e in examples if e.id != "q7"], 3, seed=0)
    assert torch.equal(unlabelled(examples[7]), absent(examples[7]))
    monkeypatch.setattr("tdlib.teacher.probe.MOST", 12)
    few = ClassProbe(cache, examples, 3, seed=0)
    made: list[int] = []
    every = Examples.of(relabel(examples, "q7", label=None))
    counted = Examples(every.ids, every.strata, lambda i: made.append(i) or every[i])
    lazy = ClassProbe(cache, counted, 3, seed=0)
    assert 12 <= len(made) <= 13  # those of the fit, and q7, which has no label
    assert torch.equal(lazy(examples[7]), ClassProbe(cache, every, 3, seed=0)(examples[7]))
    raw = few._standard(few._raw(examples))
    final = [i for i, e in enumerate(examples) if torch.allclose(few(e), raw[i] @ few.weight + few.bias)]
    assert len(final) == 12


def test_the_penalty_is_the_best_on_what_was_held_out(problem, monkeypatch):
    cache, examples = problem
    targets = torch.tensor([e.label for e in examples])

    def held_out_loss(found: ClassProbe) -> float:
        return float(F.cross_entropy(torch.stack([found(e) for e in examples]), targets))

    best = ClassProbe(cache, examples, 3, seed=0)
    losses = {}
    for penalty in probe.PENALTIES:
        with monkeypatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (penalty,))
            losses[penalty] = held_out_loss(ClassProbe(cache, examples, 3, seed=0))
    assert best.penalty == min(losses, key=lambda penalty: losses[penalty])
    assert held_out_loss(best) == pytest.approx(min(losses.values()))


def test_a_seed_repeats_and_the_order_does_not_matter(problem):
    cache, examples = problem
    torch.manual_seed(3)
    first, again, other = (ClassProbe(cache, each, 3, seed) for each, seed in
                           [(examples, 0), (examples[::-1], 0), (examples, 1)])  # fmt: skip
    assert all(torch.equal(first(e), again(e)) for e in examples)
    assert torch.equal(first.weight, again.weight) and first.penalty == again.penalty
    assert not all(torch.equal(first(e), other(e)) for e in examples)  # other folds


def test_soft_labels_move_the_probabilities(problem):
    cache, examples = problem
    soft = [dataclasses.replace(e, soft_label=((e.label, 0.9), ((e.label + 1) % 3, 0.6))) for e in examples]

    def share_of_the_next(each: list[Example]) -> float:
        found = ClassProbe(cache, each, 3, seed=0)
        return sum(found(e).softmax(-1)[(e.label + 1) % 3].item() for e in each) / len(each)

    hard_shares, soft_shares = share_of_the_next(examples), share_of_the_next(soft)
    assert soft_shares > hard_shares + 0.1
    assert soft_shares == pytest.approx(0.4, abs=0.15)  # 0.6 of 1.5


def test_too_few_examples_fail(problem):
    cache, examples = problem
    with pytest.raises(ValueError, match="pictures cannot be split into 5 folds"):
        ClassProbe(cache, examples[:4], 3, seed=0)
    unlabelled = [dataclasses.replace(e, label=None) for e in examples]
    with pytest.raises(ValueError, match="0 pictures"):
        ClassProbe(cache, unlabelled, 3, seed=0)
    assert ClassProbe(cache, examples[:5], 3, seed=0)(examples[0]).isfinite().all()


# targets and statements


@pytest.mark.parametrize(
    ("label", "soft_label", "expected"),
    [(1, (), [0, 1, 0]), (1, ((1, 0.9), (2, 0.3)), [0, 0.9, 0.3]), (None, (), [0, 0, 0])],
)
def test_soft_targets(label, soft_label, expected):
    example = Example("a", Path("a"), (), (), TextPart("why?"), (), label, "all", soft_label=soft_label)
    assert soft_target(example, 3).tolist() == pytest.approx(expected)


def test_statements_follow_the_order_of_the_labels():
    example = Example("a", Path("a"), (), (), TextPart(" A dog runs. "), (), 0, "all")
    verdicts = "entailment", "contradiction"
    assert AnswerStatements(("contradiction", "entailment", "neutral"), verdicts)(example) == [
        "It is not true that a dog runs.", "A dog runs.", "Perhaps a dog runs.",
    ]  # fmt: skip
    assert AnswerStatements(("neutral", *verdicts[::-1]), verdicts)(example)[2] == "A dog runs."
    assert AnswerStatements(("yes", "2"))(example) == ["A dog runs. yes", "A dog runs. 2"]


def test_statement_logits_are_scaled_cosines(problem):
    cache, examples = problem
    example = examples[0]
    logits = statement_logits(cache, AnswerStatements(COLOURS), example)
    picture = F.normalize(cache.picture(example.image).pooled.float(), dim=-1)
    for logit, text in zip(logits, AnswerStatements(COLOURS)(example), strict=True):
        cosine = picture @ F.normalize(cache.text(text).pooled.float(), dim=-1)
        assert logit.item() == pytest.approx(cache.teacher.logit_scale * cosine.item(), rel=1e-2)


def test_more_answer_statements_than_a_teacher_can_read_are_refused(monkeypatch):
    monkeypatch.setattr(probe, "MOST_STATEMENTS", 30)
    probe.check_statements(10, 3)
    probe.check_statements(1000, 0)  # none are asked for
    with pytest.raises(ConfigError, match="11 examples with 3 answers"):
        probe.check_statements(11, 3)
    with pytest.raises(ConfigError, match="statements"):  # before any example is read
        add_to_cache(None, range(11), AnswerStatements(("yes", "no", "2")))


def test_judged_answers_are_stored_without_tokens(problem):
    """Those of all of VQA, with tokens, would take hundreds of gigabytes."""
    cache, examples = problem
    before = cache.store.count("texts")
    answers = AnswerPosterior(cache, examples, ("green", "pink", "black"))
    assert cache.store.count("texts") == before and cache.store.count("texts_pooled") == 12
    embeddings, _, outputs = StatementJudge(cache, answers)(examples[1])
    texts = [f"{examples[1].prompt.text} {('green', 'pink', 'black')[i]}" for i in outputs]
    live = torch.stack([record.pooled for record in cache.teacher.encode_texts(texts)])
    scale = answers.sharpness * cache.teacher.logit_scale
    torch.testing.assert_close(embeddings / scale, live, rtol=0, atol=3e-3)
