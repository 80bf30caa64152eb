"""The loss of a batch: its terms follow their formulas, and padding and cut texts change none of them."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from training_helpers import CLOSE, dataset_of, module_of, settings_of

from tdlib.config import apply_arm
from tdlib.method.losses import DISTANCES
from tdlib.method.relevance import RELEVANCE
from tdlib.students.base import student_inputs
from tdlib.training import objective
from tdlib.training import prepare as experiments
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.judging import StatementJudge
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.targets import make_targets

# Losses


@pytest.fixture(scope="module")
def mixed(base, prepared, tmp_path_factory):
    """Encoded examples whose texts and pictures differ in size."""
    chosen = sorted(prepared.train[:20], key=lambda example: len(example.prompt.text))[::4]
    for number, size in enumerate([(256, 256), (384, 256), (256, 350)]):
        path = tmp_path_factory.mktemp("pictures") / f"{number}.png"
        Image.open(chosen[number].image).resize(size).save(path)
        chosen[number] = replace(chosen[number], image=path)
    experiments.add_to_cache(prepared.cache, chosen)
    dataset = dataset_of(prepared, base, chosen)
    items = [dataset[index] for index in range(len(dataset))]
    assert len({item["visual"]["pixels"].shape for item in items}) == 3
    assert len({item["input_ids"].shape[1] for item in items}) > 2
    return items


@pytest.mark.parametrize("selector", ["nucleus", "all", "top_k"])
@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_longer_texts_and_larger_pictures_in_the_batch_change_no_loss(
    base, prepared, mixed, selector, distance
):
    config = settings_of(base, selector=selector, distance=distance, extra_weight=1.0)
    module = module_of(prepared, config).eval()
    window = len(mixed)
    with torch.no_grad():
        together = module(collate(mixed, prepared.encoder))
        alone = [module(collate([item], prepared.encoder), window) for item in mixed]
    for name in together:
        if name == "logits":
            assert_close(together[name], torch.cat([terms[name] for terms in alone]), **CLOSE)
        else:
            assert_close(together[name], sum(terms[name] for terms in alone), **CLOSE)
    assert all(together[name] > 0 for name in ("distill", "choice", "extra"))


def test_the_loss_is_its_weighted_terms(base, prepared, mixed):
    config = settings_of(base, distill_weight=0.7, choice_weight=0.3)
    with torch.no_grad():
        terms = module_of(prepared, config).eval()(collate(mixed, prepared.encoder))
    assert_close(terms["loss"], terms["task"] + 0.3 * terms["choice"] + 0.7 * terms["distill"])


def test_the_teachers_distribution_can_count_where_the_teacher_is_right(base, prepared, mixed):
    batch = collate(mixed, prepared.encoder)
    right = torch.arange(len(mixed)) < 2
    best = batch["teacher_logits"].argmax(-1)
    batch["labels"] = torch.where(right, best, (best + 1) % batch["teacher_logits"].shape[-1])
    with torch.no_grad():
        found = {
            name: float(
                module_of(prepared, settings_of(base, choice_instance_weight=name)).eval()(batch)["choice"]
            )
            for name in ("uniform", "correct", "ratio")
        }
        batch["teacher_logits"][~right] = 0  # no opinion, so another divergence
        again = module_of(prepared, settings_of(base, choice_instance_weight="correct")).eval()(batch)
    assert float(again["choice"]) == pytest.approx(found["correct"])
    assert found["correct"] < found["uniform"] and found["ratio"] < found["uniform"]


def test_a_distribution_over_texts_cut_short_is_not_distilled(base, prepared, mixed):
    """A question beyond the teacher's context makes all statements one text, and all choices alike."""
    example = prepared.train[0]
    question = " ".join(["Why is it that the person in the red coat waits there?"] * 6)
    long = replace(example, prompt=replace(example.prompt, text=question, references=()))
    experiments.add_to_cache(prepared.cache, [long])
    config = settings_of(base, choice_temperature=1.0)
    (item,) = [dataset_of(prepared, config, [long])[0]]
    assert item["teacher"].logits.unique().numel() == 1 and item["teacher"].knows == 0
    batch = collate([*mixed, item], prepared.encoder)
    assert batch["teacher_knows"].tolist() == [1.0] * len(mixed) + [0.0]
    for weighing in ("uniform", "ratio"):
        module = module_of(prepared, settings_of(base, choice_instance_weight=weighing)).eval()
        with torch.no_grad():
            with_it = module(batch)["choice"] * (len(mixed) + 1)
            without = module(collate(mixed, prepared.encoder))["choice"] * len(mixed)
        assert_close(with_it, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arm", "weight"),
    [
        *((arm, "ratio") for arm in ("clip_td", "naive_global", "clip_td_selection", "repair_only")),
        ("truth_only", "ratio"), ("extra_only", "ratio"), ("extra_only", "uniform"),
    ],
)  # fmt: skip
def test_what_a_cut_text_would_falsify_is_left_out_of_every_term(base, prepared, mixed, arm, weight):
    """Marking one example as cut is the same as giving it no part in any term of the teacher."""
    config = settings_of(base, arm=arm, repair_choice="disagreement", repair_weight=1.0, truth_weight=1.0)
    config = apply_arm(config).model_copy(update={"instance_weight": weight})
    experiments.add_to_cache(prepared.cache, prepared.train[:4])
    judge = StatementJudge(prepared.cache)
    feature_reader = TeacherFeatureReader(prepared.cache, prepared.idf, config, judge=judge)
    data = EncodedExamples([prepared.train[i] for i in range(4)], prepared.encoder, feature_reader)
    module = module_of(prepared, config).eval()
    batch = module.with_targets(collate([data[i] for i in range(4)], prepared.encoder))
    batch["teacher_knows"][0] = 0
    names = [name for name in ("choice", "distill", "repair", "truth", "extra") if name in module(batch)]
    assert names
    if module.repairing is not None and module.repairing.psi is not None:
        torch.nn.init.normal_(module.repairing.psi.weight)
    before = {name: float(module(batch)[name]) for name in names}
    for name in ("teacher_logits", "text_global", "scores", "vectors", "statements"):
        batch[name] = batch[name].clone()
        batch[name][0] = batch[name][0].flip(0)  # another text's
    after = {name: float(module(batch)[name]) for name in names}
    assert after == pytest.approx(before, rel=1e-4)
    batch["teacher_knows"][0] = 1
    assert all(float(module(batch)[name]) != pytest.approx(before[name], rel=1e-4) for name in names)


def test_the_tokens_that_are_left_of_a_cut_text_are_right(base, prepared, mixed):
    module = module_of(prepared, apply_arm(settings_of(base, arm="naive"))).eval()
    batch = collate(mixed, prepared.encoder)
    before = float(module(batch)["distill"])
    batch["teacher_knows"][0] = 0
    assert float(module(batch)["distill"]) == before > 0


@pytest.mark.parametrize(
    ("distance", "arm"), [("cosine", "clip_td"), ("info_nce", "clip_td"), ("l1", "naive")]
)
def test_reading_every_token_gives_the_loss_of_the_selected(
    base, prepared, mixed, monkeypatch, distance, arm
):
    """A device is not asked how many tokens are selected: the others have no weight and no target there."""
    losses = {}
    for gathering in ({"cpu"}, set()):
        monkeypatch.setattr(objective, "GATHERING", gathering)
        module = module_of(prepared, apply_arm(settings_of(base, distance=distance, arm=arm))).eval()
        loss = module(collate(mixed, prepared.encoder))["distill"]
        loss.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        losses[bool(gathering)] = loss.detach(), *gradients
    assert losses[True][0] > 0 and len(losses[True]) == len(losses[False]) > 2
    for gathered, whole in zip(losses[True], losses[False], strict=True):
        assert_close(gathered, whole, rtol=1e-4, atol=1e-6)


def test_global_targets_have_the_other_examples_as_rivals(base, prepared, mixed):
    """A distance that compares tokens with each other finds no other in a sequence of one [CLS]."""
    config = apply_arm(settings_of(base, arm="naive_global", distance="info_nce"))
    module = module_of(prepared, config).eval()
    batch = module.with_targets(collate(mixed, prepared.encoder))
    found = module(batch)["distill"]
    hidden = module.student(**student_inputs(module.student, batch), output_hidden_states=True).hidden_states
    expected = 0
    for name in ("text_global", "image_global"):
        states = module.phi[name](hidden[-2][:, :, 0].flatten(0, 1))
        expected += DISTANCES["info_nce"](states, batch[name].flatten(0, 1)).mean() / 2
    assert_close(found, expected, **CLOSE)
    found.backward()
    assert found > 0.5 and module.phi["image_global"].weight.grad.abs().sum() > 0


def test_clip_judges_pairs_in_single_precision(base, prepared):
    """Whatever the student computes in: rounded logits are those of another teacher."""
    config = apply_arm(settings_of(base, arm="repair_only", repair_choice="disagreement"))
    chosen = [prepared.train[i] for i in range(6)]
    experiments.add_to_cache(prepared.cache, chosen)
    judge = StatementJudge(prepared.cache)
    data = EncodedExamples(
        chosen,
        prepared.encoder,
        TeacherFeatureReader(prepared.cache, prepared.idf, config, judge=judge),
    )
    module = module_of(prepared, config)
    batch = module.with_targets(collate([data[i] for i in range(6)], prepared.encoder))
    plain = module.repairing.pair(batch, torch.zeros(6, 4))
    with torch.autocast("cpu", torch.bfloat16):
        again = module.repairing.pair(batch, torch.zeros(6, 4))
    assert again.teacher.dtype == torch.float32 and torch.equal(again.teacher, plain.teacher)
    assert torch.equal(again.columns[again.rows.argsort()], plain.columns[plain.rows.argsort()])


def test_scores_that_are_no_numbers_do_not_pass_for_an_empty_selection(base, prepared, mixed, monkeypatch):
    batch = collate(mixed, prepared.encoder)
    monkeypatch.setitem(RELEVANCE, "mine", lambda alignment, student, teacher: alignment.sum(-1) / 0 * 0)
    config = settings_of(base, relevance="mine")
    assert module_of(prepared, config).eval()(batch)["distill"].isnan()
    monkeypatch.setitem(RELEVANCE, "mine", lambda alignment, student, teacher: alignment.sum(-1)[0])
    with pytest.raises(ValueError, match="relevance 'mine' returned"):
        module_of(prepared, config)(batch)


def test_the_log_has_the_mass_that_was_selected(base, prepared, mixed):
    """Also where relevance depends on the student, whose scores come after the batch's."""
    config = base.model_copy(update={"relevance": "disagreement"})
    module = module_of(prepared, config).eval()
    with torch.no_grad():
        mass = module(make_targets(collate(mixed, prepared.encoder), config))["selected_mass"]
    assert 2 * config.mass - 1e-5 <= mass < 2  # of words and of places


def test_distillation_follows_the_formula(base, prepared, mixed):
    """mean over examples and choices of c * sum of w * (1 - cos(phi(h), u)), token by token."""
    module = module_of(prepared, base).eval()
    batch = make_targets(collate(mixed, prepared.encoder), base)
    with torch.no_grad():
        terms = module(batch)
        output = module.student(**student_inputs(module.student, batch), output_hidden_states=True)
        selected, weights = module.choose_tokens(batch, batch["scores"])
        instance = module.instance_weights(batch, output.logits)
        total, count = 0.0, 0
        for row in range(len(mixed)):
            for choice in range(4):
                for token in selected[row, choice].nonzero().flatten().tolist():
                    is_text = bool(output.spans[row, choice, token].any())
                    phi = module.phi["text" if is_text else "visual"]
                    distance = 1 - torch.cosine_similarity(
                        phi(output.hidden_states[-2][row, choice, token]),
                        batch["vectors"][row, choice, token],
                        dim=0,
                    )
                    total += float(instance[row] * weights[row, choice, token] * distance)
                    count += 1
    assert_close(float(terms["distill"]), total / (4 * len(mixed)), **CLOSE)
    assert count == int((terms["selected_text"] + terms["selected_visual"]) * 4 * len(mixed) + 0.5)


def test_targets_lie_where_the_student_has_its_tokens(base, prepared, mixed):
    batch = make_targets(collate(mixed, prepared.encoder), base)
    student = module_of(prepared, base).eval().student
    with torch.no_grad():
        output = student(**student_inputs(student, batch), output_hidden_states=True)
    assert torch.equal(output.spans, batch["target_spans"])
    assert_close(output.boxes, batch["target_boxes"], rtol=0, atol=1e-6)
    assert not (batch["valid"] & (output.attention_mask == 0)).any()
    assert_close(batch["vectors"].norm(dim=-1), batch["valid"].float())


def test_no_gradient_reaches_the_teacher(base, prepared, mixed):
    module = module_of(prepared, base)
    batch = module.with_targets(collate(mixed, prepared.encoder))
    teachers = [batch[name].requires_grad_() for name in ("vectors", "scores", "teacher_logits")]
    module(batch)["loss"].backward()
    assert all(tensor.grad is None for tensor in teachers)
    assert all(parameter.grad is not None for parameter in module.phi.parameters())
    assert not any(p.requires_grad for p in prepared.cache.teacher.model.parameters())
