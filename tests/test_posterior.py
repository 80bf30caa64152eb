"""Answers by Bayes' rule: the formula, no example that tells its own answer, what chooses the sharpness."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tdlib.data.examples import Example, TextPart
from tdlib.teacher import posterior
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.posterior import SHARPNESS, UNJUDGED, AnswerPosterior
from tdlib.teacher.probe import ClassProbe, fit_logistic

LABELS = ("yes", "no", "one", "two", "three")
# question, kind, label, picture
ASKED = [
    ("Is there a dog?", "is", 0, 0),
    ("Is it red?", "is", 0, 1),
    ("Is it raining?", "is", 1, 0),
    ("How many cups?", "how", 3, 0),
    ("How many dogs?", "how", 2, 2),
    ("How many people?", "how", 3, 3),
    ("How many horses?", "how", None, 3),
    ("Is it warm?", "is", 0, 4),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory, teacher) -> tuple[TeacherCache, list[Example]]:
    folder = tmp_path_factory.mktemp("posterior")
    for number, colour in enumerate(["red", "blue", "white", "green", "black"]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
    examples = [
        Example(f"q{place}", folder / f"{picture}.png", (), (), TextPart(question), (), label, kind)
        for place, (question, kind, label, picture) in enumerate(ASKED)
    ]
    cache = TeacherCache(folder / "cache", teacher)
    cache.add([example.prompt.text for example in examples], {example.image for example in examples})
    return cache, examples


def expected_prior(example: Example, examples: list[Example]) -> torch.Tensor:
    counted = [e for e in examples if e.label is not None and e.image != example.image]
    of_all, of_kind = Counter(e.label for e in counted), [e for e in counted if e.stratum == example.stratum]
    overall = [(of_all[label] + 0.5) / (len(counted) + 2.5) for label in range(5)]
    kind = Counter(e.label for e in of_kind)
    return torch.tensor([math.log((kind[a] + overall[a]) / (len(of_kind) + 1)) for a in range(5)])


def test_logits_are_the_frequency_times_the_fit_without_the_examples_picture(asked):
    cache, examples = asked
    found = AnswerPosterior(cache, examples, LABELS)
    elsewhere = replace(examples[0], id="new", image=examples[4].image.with_name("5.png"))
    Image.new("RGB", (32, 32), "yellow").save(elsewhere.image)
    cache.add([], [elsewhere.image])
    for example in (*examples, elsewhere):
        order = found.judged(example)
        assert_close(found.log_prior(example), expected_prior(example, examples)[order])
        fits = [cache.pooled(f"{example.prompt.text} {label}") for label in LABELS]
        cosines = torch.stack(fits) @ cache.picture(example.image).pooled.float()
        logits = found.sharpness * cache.teacher.logit_scale * cosines + expected_prior(example, examples)
        assert_close(found(example), logits)
    assert found.judged(examples[0])[:2] == [0, 1] and found.judged(examples[3])[:2] == [3, 2]


def test_a_flat_prior_knows_which_answers_a_kind_has_and_not_how_often(asked):
    cache, examples = asked
    found = AnswerPosterior(cache, examples, LABELS)
    example = replace(examples[4], stratum="is")
    yes, no, one = (found.judged(example).index(label) for label in (0, 1, 2))
    usual, flat = (found.log_prior(example, flat) for flat in (False, True))
    assert flat.exp().sum() == pytest.approx(1) and usual[yes] - usual[no] > 0.5
    assert flat[yes] - flat[no] < 0.3 and flat[no] - flat[one] > 1.5


def test_no_example_tells_the_teacher_its_own_answer(asked):
    cache, examples = asked
    for place in (0, 3):
        changed = [*examples]
        changed[place] = replace(examples[place], label=4)
        before, after = (
            AnswerPosterior(cache, each, LABELS).log_prior(each[place]) for each in (examples, changed)
        )
        assert_close(before.sort().values, after.sort().values)
        other = (place + 1, 4)[place == 3]  # of another picture: it is told
        told = [AnswerPosterior(cache, e, LABELS).log_prior(e[other]) for e in (examples, changed)]
        assert not torch.allclose(told[0].sort().values, told[1].sort().values)


def test_strata_that_are_the_labels_tell_nothing(asked):
    """A task of one's own may balance its subsets by label: such a stratum would be the answer."""
    cache, examples = asked
    by_label = [replace(example, stratum=str(example.label)) for example in examples]
    found = AnswerPosterior(cache, by_label, LABELS)
    priors = [found.log_prior(replace(by_label[4], stratum=stratum)) for stratum in ("2", "0", "new")]
    assert_close(priors[0], priors[1])
    assert_close(priors[0], priors[2])


def test_the_frequent_answers_of_a_kind_are_judged_and_no_others(asked, monkeypatch):
    cache, examples = asked
    monkeypatch.setattr(posterior, "JUDGED_ANSWERS", 2)
    found = AnswerPosterior(cache, examples, LABELS)
    assert found.judged(examples[3]) == [3, 2]
    assert found.judged(replace(examples[3], stratum="never asked")) == [0, 3]
    logits = found(examples[3])
    assert (logits[[0, 1, 4]] == UNJUDGED).all() and (logits[[2, 3]] > UNJUDGED).all()
    assert logits.softmax(-1)[[0, 1, 4]].sum() == 0
    assert len(found.statements(examples[3])) == 2


@pytest.mark.parametrize("truth", [0.0, 0.5, 2.0])
def test_the_sharpness_is_the_likeliest(asked, monkeypatch, truth):
    """Answers drawn from the posterior of one sharpness are explained best by it."""
    cache, examples = asked
    generator = torch.Generator().manual_seed(0)
    fit = 3 * torch.randn(600, 5, generator=generator)
    labels = torch.multinomial((truth * fit).softmax(-1), 1, generator=generator)[:, 0].tolist()
    many = [
        replace(examples[0], id=str(place), image=examples[0].image.with_name(str(place)), label=label)
        for place, label in enumerate(labels)
    ]
    monkeypatch.setattr(AnswerPosterior, "_fit", lambda self, e: fit[int(e.id)][self.judged(e)])
    found = AnswerPosterior(cache, many, LABELS)
    assert found.sharpness == (truth or min(SHARPNESS))
    assert found.held_out_accuracy > (0.5 if truth else 0.15)


def test_a_probe_of_the_fit_alone_cannot_read_the_text(asked):
    cache, examples = asked
    by_text = [replace(e, label=int(e.stratum == "is")) for e in examples]
    both, alone = (ClassProbe(cache, by_text, 2, 0, fit_alone=which) for which in (False, True))
    assert len(alone.weight) == 1 and len(both.weight) == 3 * cache.teacher.dim
    with_other_text = replace(by_text[0], id="new", prompt=TextPart(by_text[3].prompt.text))
    cosines = [
        cache.teacher.logit_scale
        * float(cache.picture(e.image).pooled.float() @ cache.text(e.prompt.text).pooled.float())
        for e in (*by_text, with_other_text)
    ]
    standard = (torch.tensor(cosines)[:, None] - torch.tensor(cosines[:-1]).mean()) / torch.tensor(
        cosines[:-1]
    ).std()
    targets = torch.nn.functional.one_hot(torch.tensor([e.label for e in by_text])).float()
    weight, bias = fit_logistic(standard[:-1], targets, alone.penalty)
    assert_close(alone(with_other_text), (standard[-1:] @ weight + bias)[0], rtol=1e-2, atol=1e-3)
