"""Re-pairing and what goes with it: other pictures only, no label, no trace in the student, controls."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from html_page import problems
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ConfigError
from tdlib.core.records import END, read_records
from tdlib.data.examples import low_shot
from tdlib.data.tasks import task_of
from tdlib.method.alignment import aligned_targets, image_conditioned_targets
from tdlib.method.pairing import PICTURE_CHOICES, judge_choices, judge_truth, other_pictures
from tdlib.method.tokens import Tokens
from tdlib.method.weighting import certainty_weight, disagreement_weight
from tdlib.students.base import student_inputs
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.judging import PicturePool, StatementJudge, picture_number
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TeacherFeatureReader, token_centres
from tdlib.training.prepare import feature_reader_of, load_student, prepare
from tdlib.training.recording import preview_targets
from tdlib.training.repairing import repaired_inputs
from tdlib.training.run import passes_per_update, train_run
from tdlib.training.targets import make_targets
from tdlib.training.trainer import make_trainer
from tdlib.views.explorer import ViewRequest, show
from tdlib.views.index import find_runs
from tdlib.views.lesson import lesson_view


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_choices_are_judged_by_scaled_cosines():
    texts, pictures = 20 * unit(3, 4, 8), unit(5, 8, seed=1)
    judged = judge_choices(texts, pictures)
    assert judged.shape == (3, 5, 4)
    assert_close(judged[2, 1], texts[2] @ pictures[1])
    order = torch.tensor([4, 0, 3, 1, 2])
    assert_close(judge_choices(texts, pictures[order]), judged[:, order])


def test_a_statement_is_true_of_the_picture_it_fits_best():
    texts, pictures = 20 * unit(3, 1, 8), unit(5, 8, seed=1)
    p = judge_truth(texts, pictures).softmax(-1)
    assert_close(p[..., 0].sum(1), torch.ones(3))
    assert_close(p[..., 0], (texts[:, 0] @ pictures.T).softmax(-1))
    assert (p[..., 0].argmax(1) == (texts[:, 0] @ pictures.T).argmax(1)).all()
    twice = torch.cat([pictures, pictures[:2]])
    distinct = torch.tensor([True] * 5 + [False] * 2)
    again = judge_truth(texts, twice, distinct).softmax(-1)
    assert_close(again[:, :5], p)
    assert_close(again[:, 5:], p[:, :2])
    same = torch.tensor([True, False])
    for alone in (judge_truth(texts, pictures[:1]), judge_truth(texts, pictures[[0, 0]], same)):
        assert_close(alone.softmax(-1), torch.full_like(alone, 0.5))  # one picture alone tells nothing


@pytest.mark.parametrize("choice", PICTURE_CHOICES)
def test_no_example_is_shown_with_its_own_picture(choice):
    own = torch.tensor([7, 7, 8, 9])
    judged, student = judge_choices(9 * unit(4, 3, 8), unit(4, 8, seed=1)), torch.randn(4, 3)
    allowed = other_pictures(own, own)
    of_own = judged[torch.arange(4), torch.arange(4)]
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = PICTURE_CHOICES[choice](judged, of_own, student, allowed, generator)
        assert (own[found] != own).all()
        seen.add(tuple(found.tolist()))
    assert (len(seen) > 3) == (choice == "random") or choice == "changed"
    alone = PICTURE_CHOICES[choice](judged, of_own, student, torch.zeros(4, 4, dtype=torch.bool), None)
    assert (alone == -1).all()


def test_adaptive_choices_take_what_they_say():
    judged = torch.tensor([[[5.0, 0.0], [4.0, 0.0], [0.0, 3.0], [0.0, 0.5]]])
    own, allowed = judged[:, 0], torch.tensor([[False, True, True, True]])
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        assert PICTURE_CHOICES["changed"](judged, own, own, allowed, generator).item() in (2, 3)
    only_same = torch.tensor([[False, True, False, False]])
    assert PICTURE_CHOICES["changed"](judged, own, own, only_same, None).item() == 1
    student = torch.tensor([[2.0, 0.0]])
    divergences = [
        float(F.kl_div(student[0].log_softmax(-1), judged[0, j].softmax(-1), reduction="sum"))
        for j in (1, 2, 3)
    ]
    expected = 1 + max(range(3), key=lambda i: divergences[i])
    assert PICTURE_CHOICES["disagreement"](judged, own, student, allowed, None).item() == expected == 2


def test_certainty_and_disagreement():
    sure, even = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.full((4,), 0.25)
    p = torch.tensor([0.7, 0.1, 0.1, 0.1])
    teacher = torch.stack([sure, even, p])
    label = torch.zeros(3, dtype=torch.long)
    entropy = -(p * p.log()).sum()
    found = certainty_weight(teacher, even.expand(3, 4), label)
    assert_close(found, torch.tensor([1.0, 0.0, float(1 - entropy / math.log(4))]))
    assert_close(certainty_weight(teacher, sure.expand(3, 4), label + 2), found)  # teacher alone
    apart = disagreement_weight(teacher, torch.stack([even, even, p]), label)
    assert_close(apart, torch.tensor([0.75, 0.0, 0.0]))


def test_centred_targets_lose_what_all_share():
    tokens = torch.randn(6, 8) + 10
    alignment = torch.eye(6)[:, :].clone()
    alignment[5] = 0
    centre = tokens.mean(0)
    found = aligned_targets(alignment, tokens, centre)
    assert_close(found[:5], F.normalize(tokens[:5] - centre, dim=-1))
    assert not found[5].any()
    raw = aligned_targets(alignment, tokens)
    assert (raw[:5] @ raw[:5].T).min() > 0.9 > (found[:5] @ found[:5].T).min()


def test_words_are_drawn_to_the_patches_that_agree_with_them():
    spans = torch.tensor([[0, 0], [0, 3], [4, 9], [0, 0], [0, 0], [0, 0]])
    boxes = torch.zeros(6, 4)
    boxes[3:] = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.2, 0.2, 0.4, 0.4]])
    tokens, vectors = Tokens(spans, boxes), unit(6, 8)
    vectors[0] = vectors[5] = 0  # a special token, and a patch without a target
    found = image_conditioned_targets(vectors, tokens, 0.1)
    assert torch.equal(found[[0, 3, 4, 5]], vectors[[0, 3, 4, 5]])
    share = (vectors[1] @ vectors[3:5].T / 0.1).softmax(-1)
    assert_close(found[1], F.normalize(share @ vectors[3:5], dim=-1))
    order = torch.tensor([2, 4, 1, 0, 5, 3])
    assert_close(
        image_conditioned_targets(vectors[order], Tokens(spans[order], boxes[order]), 0.1), found[order]
    )
    vectors[3] = 0
    assert_close(image_conditioned_targets(vectors, tokens)[1], vectors[4])  # one patch is all there is
    vectors[4] = 0
    assert torch.equal(image_conditioned_targets(vectors, tokens), vectors)


# In training


@pytest.fixture(scope="module")
def base(base):
    changes = {"arm": "repair_only", "shots": 0.3, "eval_splits": ["val"], "probe_examples": 3}
    return base.model_copy(update=changes)


def settings_of(base: RunConfig, **changes) -> RunConfig:
    return apply_arm(RunConfig.from_parameters(**{**base.model_dump(), **changes}))


def parts(prepared, config, size: int = 6):
    """A module and a batch of the training subset."""
    cache, subset = prepared.cache, low_shot(prepared.train, 0, 0)[:size]
    feature_reader = feature_reader_of(config, prepared, low_shot(prepared.train, config.shots, config.seed))
    feature_reader.prepare(subset)
    data = EncodedExamples(
        subset,
        prepared.encoder,
        feature_reader,
        num_labels=len(prepared.labels),
        soft_labels=task_of(config).has_soft_labels,
    )
    batch = collate([data[i] for i in range(size)], prepared.encoder)
    module = TargetedDistillation(load_student(config, prepared), config, cache.teacher.dim)
    return module, module.with_targets(batch)


def test_the_loss_is_the_formula_and_reads_no_label(base, prepared):
    config = settings_of(base)
    module, batch = parts(prepared, config)
    batch["statements"].requires_grad_()
    batch["image_global"].requires_grad_()
    terms = module.eval()(batch)
    module.repairing.generator.manual_seed(config.seed)
    logits = module.student(**student_inputs(module.student, batch)).logits
    pairs = module.repairing.pair(batch, logits)
    assert (batch["picture"][pairs.columns] != batch["picture"][pairs.rows]).all() and pairs.exists.all()
    total = 0.0
    for row, column in zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        for name in ("pixel_values", "pixel_mask"):
            one[name] = batch[name][column : column + 1]
        student = module.student(**student_inputs(module.student, one)).logits[0].log_softmax(-1)
        p = (batch["statements"][row] @ batch["image_global"][column, 0]).softmax(-1)
        certainty = 1 + (p * p.log()).sum() / math.log(4)
        total += float(certainty * (p * (p.log() - student)).sum()) / len(pairs.rows)
    assert float(terms["repair"]) == pytest.approx(total, rel=1e-4)
    assert_close(terms["loss"], terms["task"] + 3 * terms["repair"])
    module.repairing.generator.manual_seed(config.seed)
    other = module({**batch, "labels": (batch["labels"] + 1) % 4})
    assert_close(other["repair"], terms["repair"])
    terms["repair"].backward()
    assert batch["statements"].grad is None and batch["image_global"].grad is None
    assert module.student.vilt.encoder.layer[0].attention.attention.query.weight.grad.abs().sum() > 0


def test_with_identical_pictures_a_pair_is_the_example_itself(base, prepared):
    module, batch = parts(prepared, settings_of(base))
    for name in ("pixel_values", "pixel_mask", "image_global"):
        batch[name] = batch[name][:1].expand_as(batch[name])
    module.eval()
    logits = module.student(**student_inputs(module.student, batch)).logits
    repaired = module.repairing.repair(module.student, batch, logits)
    assert_close(repaired.student, logits, rtol=1e-4, atol=1e-6)
    assert_close(repaired.pairs.teacher, repaired.pairs.own)
    teacher = repaired.pairs.own.softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="none").sum(-1)
    expected = (certainty_weight(teacher, teacher, teacher.argmax(-1)) * divergence).mean()
    assert_close(module.repairing.repair_loss(repaired, 1.0)["repair"], expected, rtol=1e-4, atol=1e-6)


def test_the_order_of_the_batch_does_not_matter(base, prepared):
    """With the choice that draws nothing."""
    module, batch = parts(prepared, settings_of(base, repair_choice="disagreement"))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    module.eval()
    one, other = module(batch), module({name: value[order] for name, value in batch.items()})
    assert_close(other["repair"], one["repair"], rtol=1e-4, atol=1e-6)


def test_a_share_of_the_rows_is_shown_and_the_own_picture_is_a_control(base, prepared):
    module, batch = parts(prepared, settings_of(base, repair_share=0.4))
    shown = []
    real = module.student.forward
    module.student.forward = lambda **inputs: shown.append(len(inputs["input_ids"])) or real(**inputs)
    module.eval()(batch)
    assert shown == [6, 3] and passes_per_update(module.settings) == 1 + 3 / 6
    module, batch = parts(prepared, settings_of(base, arm="repair_own"))
    logits = torch.zeros(6, 4)
    pairs = module.repairing.pair(batch, logits)
    assert pairs.columns.tolist() == list(range(6))
    assert_close(pairs.teacher, batch["teacher_logits"], rtol=1e-4, atol=1e-4)
    inputs = repaired_inputs(module.student, batch, pairs.rows, pairs.columns)
    for name, value in student_inputs(module.student, batch).items():
        assert torch.equal(inputs[name], value), name


def test_a_lone_example_has_no_lesson(base, prepared):
    module, batch = parts(prepared, settings_of(base), size=1)
    terms = module(batch)
    assert float(terms["repair"]) == 0 and terms["loss"].isfinite()
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["subset", "train"])
def test_pools_hold_other_pictures_and_draw_the_same_again(base, prepared, kind):
    config = settings_of(base, repair_pool=kind)
    module, batch = parts(prepared, config)
    examples = [*(prepared.train if kind == "train" else low_shot(prepared.train, config.shots, 0))]
    cache = prepared.cache
    cache.add(pictures=[example.image for example in examples])
    pool = PicturePool(examples, prepared.encoder, cache, seed=0)
    assert len(pool) == len({example.image for example in examples})
    drawn, again, other = pool.draw([1, 2], 4), pool.draw([1, 2], 4), pool.draw([2, 1], 4)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["pool_picture"], other["pool_picture"])
    known = {picture_number(example.image): example for example in examples}
    for number, image in zip(drawn["pool_picture"].tolist(), drawn["pool_image"], strict=True):
        assert_close(image, cache.picture(known[number].image).pooled.float())
    module.eval()
    pairs = module.repairing.pair(batch | drawn, torch.zeros(6, 4))
    assert (pairs.columns >= 6).all()
    assert (drawn["pool_picture"][pairs.columns - 6] != batch["picture"][pairs.rows]).all()
    inputs = repaired_inputs(module.student, batch | drawn, pairs.rows, pairs.columns)
    assert torch.equal(inputs["pixel_values"][0], drawn["pool_pixel_values"][pairs.columns[0] - 6])
    assert torch.equal(inputs["input_ids"], batch["input_ids"])
    assert module(batch | drawn)["repair"] > 0


def test_truth_reads_selected_words_one_layer_below_the_top(base, prepared):
    module, batch = parts(prepared, settings_of(base, arm="truth_only"))
    terms = module.eval()(batch)
    output = module.student(**module.inputs(batch))
    selected, weights = module.choose_tokens(batch, batch["scores"])
    p = batch["teacher_logits"].softmax(-1)
    certainty = certainty_weight(p, p, p.argmax(-1))
    assert float(terms["truth"]) == pytest.approx(float(certainty.mean()) * math.log(2), rel=1e-4)  # psi is 0
    torch.nn.init.normal_(module.repairing.psi.weight)
    told = module.repairing.psi(output.hidden_states[-2])[..., 0]
    text = (batch["target_spans"][..., 1] > batch["target_spans"][..., 0]) & selected
    w = weights * text
    w = w / w.sum(-1, keepdim=True)
    error = F.binary_cross_entropy_with_logits(told, p[..., None].expand_as(told), reduction="none")
    expected = (certainty[:, None] * (w * error).sum(-1)).mean()
    assert float(module(batch)["truth"]) == pytest.approx(float(expected), rel=1e-4)
    both, batch = parts(prepared, settings_of(base, arm="truth_only", repair_weight=1.0, repair_pool="own"))
    both.eval()  # the true pairs twice
    assert float(both(batch)["truth"]) == pytest.approx(2 * float(terms["truth"]), rel=1e-4)


def test_truth_is_asked_of_re_paired_pictures_too(base, prepared):
    """The words that were selected with the own picture say whether their statement is true of the other."""
    config = settings_of(base, arm="truth_only", repair_weight=1.0, repair_choice="disagreement")
    module, batch = parts(prepared, config)
    module.eval()
    torch.nn.init.normal_(module.repairing.psi.weight)
    found = float(module(batch)["truth"])
    output = module.student(**module.inputs(batch))
    pairs = module.repairing.pair(batch, output.logits)
    assert (batch["picture"][pairs.columns] != batch["picture"][pairs.rows]).all()
    other = module.student(
        **repaired_inputs(module.student, batch, pairs.rows, pairs.columns), output_hidden_states=True
    )
    selected, weights = module.choose_tokens(batch, batch["scores"])
    is_text = batch["target_spans"][..., 1] > batch["target_spans"][..., 0]
    w = weights * (selected & is_text)
    w = w / w.sum(-1, keepdim=True)
    expected = 0.0
    for told, logits in ((output, pairs.own), (other, pairs.teacher)):
        p = logits.softmax(-1)
        said = module.repairing.psi(told.hidden_states[-2])[..., 0]
        error = F.binary_cross_entropy_with_logits(said, p[..., None].expand_as(said), reduction="none")
        sure = certainty_weight(p, p, p.argmax(-1))
        expected += float((sure[:, None] * (w * error).sum(-1)).mean())
    assert found == pytest.approx(expected, rel=1e-4)
    assert not torch.allclose(pairs.own.softmax(-1), pairs.teacher.softmax(-1))


def test_one_map_serves_both_modalities(base, prepared):
    module, batch = parts(prepared, settings_of(base, arm="naive", shared_phi=True))
    assert list(module.phi) == ["text"] and module.token_maps["visual"] is module.token_maps["text"]
    before = float(module.eval()(batch)["distill"])
    module.fit_phi([batch])
    assert float(module.eval()(batch)["distill"]) < before


def test_runs_leave_the_baselines_student_and_record_lessons(base, prepared, tmp_path):
    config = settings_of(
        base, arm="clip_td_repaired", truth_weight=1.0, centred_targets=True, shared_phi=True,
        repair_pool="subset", repair_instance_weight="disagreement", repair_schedule="linear",
        probe_every=100,
    )  # fmt: skip
    metrics = train_run(config, prepared, tmp_path / "run")
    start = load_student(config, prepared).state_dict()
    stored = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {n: v.shape for n, v in start.items()}
    assert metrics["passes_per_update"] == 2
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert {"repair", "truth", "repair_certainty", "repair_agreement"} <= history[-1].keys()
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    whole = read_records(tmp_path / "run" / "selections.parquet")
    records = [record for record in whole if record.step == END]
    assert len(records) == 3 * 4 and len(whole) == 2 * len(records)
    for record in records:
        assert record.other_image is not None and record.other_image != record.image
        assert 0 <= record.lesson_weight <= 1
    for name in ("teacher_choice", "student_choice", "teacher_other", "student_other"):
        assert sum(getattr(record, name) for record in records[:4]) == pytest.approx(1, abs=1e-5)
    right = next(record for record in records[:4] if record.choice == record.label)
    assert right.teacher_choice == pytest.approx(right.teacher_probability, abs=1e-4)
    assert right.student_choice == pytest.approx(right.student_probability, abs=1e-4)
    (run,) = find_runs([tmp_path / "run"])
    view = show(ViewRequest(run, "val", right.example_id), "re-paired lesson")
    shown = view.table().set_index(["step", "picture", "choice"])
    assert len(shown) == 2 * 2 * 4 and problems(view.to_html()) == []
    assert shown.loc[(END, "the other picture", right.choice), "teacher"] == right.teacher_other
    drawn = view.arguments["table"].set_index(["who", "picture", "choice"])["probability"]
    before = next(r for r in whole if (r.example_id, r.choice, r.step) == (right.example_id, right.choice, 0))
    assert drawn["student before", "its own picture", right.choice] == before.student_choice
    assert drawn["student", "the other picture", right.choice] == right.student_other
    assert view.arguments["pictures"]["the other picture"] == right.other_image
    assert len(view.figure().axes) == 4


def test_a_lesson_can_be_seen_before_any_training(base, prepared):
    examples = [prepared.train[i] for i in range(4)]
    records = preview_targets(settings_of(base), prepared, examples)
    own = [record for record in records if record.example_id == examples[0].id]
    assert all(record.other_image not in (None, record.image) for record in own)
    view = lesson_view(own)
    assert set(view.arguments["table"]["who"]) == {"CLIP", "student"}
    with pytest.raises(ValueError, match="several examples"):
        lesson_view(records)
    (alone,) = {record.other_image for record in preview_targets(settings_of(base), prepared, examples[:1])}
    assert alone is None, "no other picture"
    control = preview_targets(settings_of(base, repair_pool="own"), prepared, examples)
    assert {record.other_image for record in control} == {None}, "its own is no other picture"


def test_a_pool_of_one_picture_teaches_the_examples_of_others(base, prepared):
    """The picture's own examples have no other one, and no weight; nothing is looked up outside the pool."""
    module, batch = parts(prepared, settings_of(base, repair_pool="subset"))
    first = low_shot(prepared.train, 0, 0)[:1]
    drawn = PicturePool([*first], prepared.encoder, prepared.cache, seed=0).draw([0], 6)
    module.eval()
    logits = module.student(**module.inputs(batch)).logits
    repaired = module.repairing.repair(module.student, batch | drawn, logits)
    own = batch["picture"] == batch["picture"][0]
    assert torch.equal(repaired.pairs.exists, ~own[repaired.pairs.rows])
    assert not repaired.weights[own[repaired.pairs.rows]].any()


def test_weights_of_zero_are_plain_finetuning_bit_for_bit(base, prepared, tmp_path):
    plain = settings_of(base, arm="finetune")
    other = RunConfig.from_parameters(
        **plain.model_dump()
        | {"repair_pool": "train", "repair_share": 0.5, "repair_choice": "changed", "centred_targets": True}
    )
    for name, config in (("plain", plain), ("other", other)):
        train_run(config, prepared, tmp_path / name)
    one, two = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("plain", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    double = settings_of(base, arm="finetune_double")
    metrics = train_run(double, prepared, tmp_path / "double")
    assert metrics["updates"] == 2 * json.loads((tmp_path / "plain/metrics.json").read_text())["updates"]


def test_an_interrupted_run_draws_the_same_pictures(base, prepared, tmp_path):
    config = settings_of(base)
    module, batch = parts(prepared, config)
    trainer = make_trainer(module, config, EncodedExamples([], prepared.encoder), tmp_path)
    module(batch)
    trainer.save_own(tmp_path)
    expected = module.repairing.pair(batch, torch.zeros(6, 4))
    fresh, _ = parts(prepared, config)
    later = make_trainer(fresh, config, EncodedExamples([], prepared.encoder), tmp_path)
    later.restore_own(tmp_path)
    found = fresh.repairing.pair(batch, torch.zeros(6, 4))
    assert torch.equal(found.columns, expected.columns)


# Tasks with a label set


def task_settings(worlds, teacher_folder, student_folder, task: str, **changes) -> RunConfig:
    return apply_arm(
        RunConfig.from_parameters(
            **{
                "task": task, "data_dir": str(worlds[task]), "student": str(student_folder),
                "teacher": f"local-dir:{teacher_folder}", "shots": 0.4, "epochs": 1, "batch_size": 4,
                "learning_rate": 5e-4, "head_learning_rate": 1e-3,
                "shift": "", "probe_examples": 2, "arm": "repair_only", "vocabulary_minimum": 1,
            } | changes
        )
    )  # fmt: skip


def test_entailment_is_judged_true_or_false_and_neutral_is_left_alone(
    worlds, teacher_folder, student_folder, own_cache, tmp_path
):
    config = task_settings(worlds, teacher_folder, student_folder, "snli_ve", truth_weight=1.0)
    ready = prepare(config, whole_splits=False)
    module, batch = parts(ready, config)
    neutral = ready.labels.index("neutral")
    assert batch["judged"].shape == (6, 2) and neutral not in batch["judged"][0].tolist()
    logits = torch.zeros(6, 3, requires_grad=True)
    module.eval()
    repaired = module.repairing.repair(module.student, batch, logits)
    repaired.output.logits.retain_grad()
    module.repairing.repair_loss(repaired, 1.0)["repair"].backward()
    assert not repaired.output.logits.grad[:, neutral].any() and repaired.output.logits.grad.any()
    train_run(config, ready, tmp_path / "run")
    records = read_records(tmp_path / "run" / "selections.parquet")
    assert all(0 <= record.teacher_other <= 1 for record in records)


def test_vqa_compares_the_frequent_answers_of_a_question_type(
    worlds, teacher_folder, student_folder, own_cache, tmp_path
):
    config = task_settings(worlds, teacher_folder, student_folder, "vqa_v2")
    ready = prepare(config, whole_splits=False)
    module, batch = parts(ready, config)
    subset = low_shot(ready.train, config.shots, config.seed)
    answers = AnswerPosterior(ready.cache, subset, ready.labels)
    judge, example = StatementJudge(ready.cache, answers), subset[0]
    statements, prior, outputs = judge(example)
    assert len(set(outputs.tolist())) == len(outputs) == min(32, len(ready.labels)) == len(statements)
    same = [e.label for e in subset if e.stratum == example.stratum and e.label is not None]
    assert outputs[0] in same and same.count(outputs[0]) == max(map(same.count, same))
    unlabelled = judge(replace(example, label=None, soft_label=(), annotators=()))
    for found, expected in zip(unlabelled, (statements, prior, outputs), strict=True):
        assert torch.equal(found, expected)
    cosine = ready.cache.pooled(f"{example.prompt.text.strip()} {ready.labels[outputs[1]]}")
    assert_close(statements[1], answers.sharpness * ready.cache.teacher.logit_scale * cosine.float())
    picture = ready.cache.picture(example.image).pooled.float()
    frequent = answers.log_prior(example)
    assert_close(statements @ picture + frequent, answers(example)[outputs])
    assert_close(prior, answers.log_prior(example, flat=True))
    assert module(batch)["repair"] > 0
    train_run(config, ready, tmp_path / "run")
    assert pd.read_parquet(tmp_path / "run" / "predictions.parquet")["score"].notna().any()
    told = RunConfig.from_parameters(**config.model_dump() | {"truth_weight": 1.0})
    with pytest.raises(ConfigError, match="neither true nor false"):
        train_run(told, ready, tmp_path / "told")


def test_shuffled_and_random_teachers_judge_pairs_wrongly(base, prepared):
    """The control shows the teacher another picture for each, true or re-paired."""
    from tdlib.training.prepare import shuffled_pictures

    subset = low_shot(prepared.train, 0, 0)[:6]
    shown = shuffled_pictures(subset, 0)
    cache, config = prepared.cache, settings_of(base, arm="repair_shuffled")
    feature_reader = TeacherFeatureReader(
        cache, prepared.idf, config, seen_as=lambda e: replace(e, image=shown[e.id, e.image]),
        judge=StatementJudge(cache),
    )  # fmt: skip
    feature_reader.prepare(subset)
    data = EncodedExamples(subset, prepared.encoder, feature_reader)
    batch = make_targets(collate([data[i] for i in range(6)], prepared.encoder), config)
    for row, example in enumerate(subset):
        assert batch["picture"][row] == picture_number(example.image)  # what the student sees
        assert_close(
            batch["image_global"][row, 0],
            prepared.cache.picture(shown[example.id, example.image]).pooled.float(),
        )


def test_centres_are_the_mean_tokens_of_each_modality(prepared):
    examples = prepared.train[:3]
    cache = prepared.cache
    cache.add([s.text for e in examples for s in e.statements()], [e.image for e in examples])
    text, picture = token_centres(cache, [*examples, *examples])
    pictures = {example.image for example in examples}
    expected = torch.cat([cache.picture(image).projected for image in sorted(pictures)]).mean(0)
    assert_close(picture, expected)
    assert text.shape == picture.shape and not torch.allclose(text, picture)
