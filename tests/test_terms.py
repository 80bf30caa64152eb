"""Terms beyond the paper: relations among tokens, the reverse divergence, and one of a user's own."""

import json

import pytest
import torch
from torch.testing import assert_close
from training_helpers import dataset_of, module_of, settings_of

from tdlib.config import ConfigError, RunConfig, apply_arm
from tdlib.method.terms import EXTRA_TERMS, TermInputs, reverse_divergence, token_cka
from tdlib.method.tokens import Tokens
from tdlib.training.data import collate
from tdlib.training.prepare import prepare
from tdlib.training.run import compare, train_run

WORDS, PLACES, WIDTH, TEACHER = 5, 6, 8, 7


def inputs_of(seed: int = 0, **changes) -> TermInputs:
    """Two examples of three choices; all tokens have a target and the same score."""
    torch.manual_seed(seed)
    shape = 2, 3, WORDS + PLACES
    of_text = torch.arange(shape[-1]) < WORDS
    spans = torch.where(of_text[:, None], torch.tensor([0, 1]), 0).expand(*shape, 2)
    boxes = torch.where(of_text[:, None], 0.0, torch.tensor([0.0, 0.0, 1.0, 1.0])).expand(*shape, 4)
    hidden = torch.randn(*shape, WIDTH)
    given = {
        "logits": torch.randn(2, 3), "hidden": hidden, "hidden_states": (hidden,),
        "tokens": Tokens(spans, boxes), "labels": torch.tensor([0, 2]),
        "teacher_logits": torch.randn(2, 3), "teacher_knows": torch.ones(2),
        "targets": torch.nn.functional.normalize(torch.randn(*shape, TEACHER), dim=-1),
        "valid": torch.ones(shape, dtype=torch.bool), "scores": torch.full(shape, 0.1),
        "selected": torch.ones(shape, dtype=torch.bool), "weights": torch.full(shape, 0.1),
        "instance_weights": torch.ones(2),
    }  # fmt: skip
    return TermInputs(**{**given, **changes})


def linear_cka(x, y):
    """Kornblith et al. 2019, eq. 4: from the features, not from their Gram matrices."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def test_cka_of_tokens_of_one_weight_is_the_published_one():
    inputs = inputs_of()
    expected = [
        torch.stack(
            [
                1 - linear_cka(inputs.hidden[b, k, part], inputs.targets[b, k, part])
                for k in range(3)
                for part in (slice(None, WORDS), slice(WORDS, None))
            ]
        ).mean()
        for b in range(2)
    ]
    assert_close(token_cka(inputs), torch.stack(expected))


def test_a_weight_of_two_is_the_token_twice():
    """As masses should; what has no target has none, whatever it holds."""
    inputs = inputs_of()
    twice = torch.tensor([0, 0, *range(1, WORDS + PLACES), WORDS])
    names = ("hidden", "targets", "weights", "scores", "valid")
    doubled = {name: getattr(inputs, name)[:, :, twice] for name in names}
    places = Tokens(inputs.tokens.spans[:, :, twice], inputs.tokens.boxes[:, :, twice])
    repeated = inputs_of(**doubled, tokens=places, selected=torch.ones_like(doubled["valid"]))
    scores, valid, hidden = inputs.scores.clone(), inputs.valid.clone(), inputs.hidden.clone()
    scores[..., [0, WORDS]] *= 2
    assert_close(token_cka(inputs_of(scores=scores)), token_cka(repeated))
    valid[..., [1, WORDS + 1]], hidden[..., [1, WORDS + 1], :] = False, 1e3
    without = inputs_of(valid=valid)
    assert_close(token_cka(inputs_of(valid=valid, hidden=hidden)), token_cka(without))
    assert not torch.allclose(token_cka(without), token_cka(inputs))


def test_relations_do_not_depend_on_the_students_axes_nor_on_its_scale():
    inputs = inputs_of()
    turned = 3 * inputs.hidden @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] + 5
    assert_close(token_cka(inputs_of(hidden=turned)), token_cka(inputs), rtol=1e-4, atol=1e-5)
    alike = inputs_of(hidden=torch.nn.functional.pad(inputs.targets, (0, 1)))
    assert_close(token_cka(alike), torch.zeros(2), rtol=0, atol=1e-5)
    halved = inputs_of(instance_weights=torch.tensor([0.5, 0.0]))
    assert_close(token_cka(halved), token_cka(inputs) * torch.tensor([0.5, 0.0]))


def test_following_its_gradient_brings_the_relations_closer():
    hidden = inputs_of().hidden.clone().requires_grad_()
    optimizer = torch.optim.Adam([hidden], lr=0.05)
    losses = []
    for _ in range(40):
        loss = token_cka(inputs_of(hidden=hidden)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_few_tokens_have_no_relations_and_finite_gradients(kept):
    inputs = inputs_of()
    valid = torch.zeros_like(inputs.valid)
    valid[..., :kept] = True
    hidden = inputs.hidden.clone().requires_grad_()
    found = token_cka(inputs_of(hidden=hidden, valid=valid))
    found.sum().backward()
    assert_close(found.detach(), torch.zeros(2), rtol=0, atol=1e-5)  # two points always lie alike
    assert hidden.grad.isfinite().all()


def test_the_reverse_divergence_is_torchs():
    inputs = inputs_of(teacher_knows=torch.tensor([1.0, 0.0]))
    student, teacher = (
        torch.distributions.Categorical(logits=logits) for logits in (inputs.logits, inputs.teacher_logits)
    )
    expected = torch.distributions.kl_divergence(student, teacher) * torch.tensor([1.0, 0.0])
    assert_close(reverse_divergence(inputs), expected)


@pytest.mark.parametrize("term", EXTRA_TERMS)
def test_a_run_can_have_a_further_term(base, tmp_path, term):
    config = settings_of(base, extra_term=term, extra_weight=2.0)
    folders = compare(config, ["extra_only", "clip_td_extra", "clip_td"], [0], tmp_path)
    for folder, other in zip(folders, ({"extra"}, {"extra", "choice", "distill"}, set()), strict=True):
        first = json.loads((folder / "history.jsonl").read_text().splitlines()[0])
        terms = {"choice": 1, "distill": 1, "extra": 2}
        told = first["task"] + sum(weight * first.get(name, 0) for name, weight in terms.items())
        assert first["loss"] == pytest.approx(told, rel=1e-4)
        assert other <= first.keys() and ("extra" in first) == ("extra" in other)
        if other == {"extra"}:
            assert "choice" not in first and "distill" not in first
    card = (folders[0] / "student" / "README.md").read_text()
    assert "extra 2" in card and f"extra_term={term!r}" in card


def test_a_term_of_ones_own_sees_the_batch_and_is_kept_with_the_run(base, tmp_path, monkeypatch):
    seen = []

    def margin(inputs):
        seen.append(inputs)
        return (1 - inputs.logits.gather(1, inputs.labels[:, None]).squeeze(1)).clamp(min=0)

    monkeypatch.setitem(EXTRA_TERMS, "margin", margin)
    config = apply_arm(settings_of(base, arm="extra_only", extra_term="margin"))
    assert config.extra_weight == 1
    train_run(config, prepare(config), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "functions.json").read_text())
    assert kept["extra_term"]["name"] == "margin" and "clamp(min=0)" in kept["extra_term"]["source"]
    one = seen[0]
    of_tokens = one.hidden.shape[:-1]
    assert one.hidden_states[config.distill_layer].shape == one.hidden.shape
    for name in ("valid", "scores", "selected", "weights"):
        assert getattr(one, name).shape == of_tokens
    assert one.targets.shape[:-1] == one.tokens.is_text.shape == of_tokens
    assert one.selected.any() and not (one.selected & ~one.valid).any()
    for name in ("labels", "instance_weights", "teacher_knows"):
        assert getattr(one, name).shape == of_tokens[:1]


def test_terms_that_would_be_silently_wrong_are_refused(base, prepared, monkeypatch):
    config = apply_arm(settings_of(base, arm="extra_only"))
    data = dataset_of(prepared, config)
    batch = collate([data[0], data[1]], prepared.encoder)
    for wrong, problem in (
        (lambda inputs: inputs.logits.sum(), r"extra_term 'token_cka' returned .* shape \(\)"),
        (lambda inputs: inputs.logits.sum(0), r"shape \(4,\)"),
        (lambda inputs: inputs.logits.detach().sum(1), "does not depend on the student"),
    ):
        monkeypatch.setitem(EXTRA_TERMS, "token_cka", wrong)
        with pytest.raises(ValueError, match=problem):
            module_of(prepared, config)(batch)
    with pytest.raises(ConfigError, match=r"EXTRA_TERMS\['token_cka'\].*called by position"):
        monkeypatch.setitem(EXTRA_TERMS, "token_cka", lambda logits, labels: logits)
        RunConfig.from_parameters(extra_term="token_cka")
    with pytest.raises(ConfigError, match=r"distill_layer=9: the student has hidden states"):
        module_of(prepared, config.model_copy(update={"distill_layer": 9}))
