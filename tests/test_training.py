"""Training: plain finetuning where nothing is distilled, losses that padding does not change, run folders."""

import json
import math
import os
import shutil
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import ViltConfig, get_cosine_schedule_with_warmup

from tdlib.analysis.compare import summarise
from tdlib.analysis.scores import read_predictions
from tdlib.analysis.statistics import bootstrap_interval
from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ConfigError
from tdlib.core.records import read_records, records_table
from tdlib.data.examples import DataError, low_shot
from tdlib.students.base import student_inputs
from tdlib.students.registry import load_student
from tdlib.students.vilt import ViltEncoder, ViltForMultipleChoice
from tdlib.teacher.probe import count_cut
from tdlib.training import prepare as experiments
from tdlib.training import run as training
from tdlib.training import trainer as trainer_module
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import predict, prediction_table
from tdlib.training.judging import StatementJudge
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TargetBuilder
from tdlib.training.prepare import prepare, read_split
from tdlib.training.recording import ProbeRecorder
from tdlib.training.reference import zero_shot
from tdlib.training.run import compare, train_run
from tdlib.training.targets import make_targets
from tdlib.training.trainer import DistillationTrainer, make_trainer

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# A softmax does not see them: their gradient is rounding error, which Adam scales up.
NOISE = ("classifier.bias", "key.bias")
TERMS = ("loss", "task", "choice", "distill")


@pytest.fixture(scope="module")
def base(world, student_folder, teacher_folder, own_cache):
    """Settings of a run of a few seconds; the cache lies in a temporary folder."""
    return RunConfig.from_parameters(
        data_dir=str(world), student=str(student_folder), teacher=f"local-dir:{teacher_folder}",
        learning_rate=5e-4, head_learning_rate=1e-3,  # so that a few updates show
        shots=0.2, epochs=1, batch_size=4, eval_splits=["val", "test"], probe_examples=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def materials(base):
    return prepare(base, seeds=[0, 1], whole_splits=False)


@pytest.fixture(scope="module")
def folders(base, materials, tmp_path_factory):
    """Run folders of two arms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", lambda *_args: materials)
        return compare(base, ["finetune", "clip_td"], [0], tmp_path_factory.mktemp("runs"))


def settings_of(base: RunConfig, **changes) -> RunConfig:
    return RunConfig.from_parameters(**{**base.model_dump(), **changes})


def dataset_of(materials, config: RunConfig, examples=None) -> EncodedExamples:
    builder = TargetBuilder(materials.builder.cache, materials.builder.idf, config)
    examples = low_shot(materials.train, config.shots, config.seed) if examples is None else examples
    return EncodedExamples(examples, materials.encoder, builder)


def module_of(materials, config: RunConfig) -> TargetedDistillation:
    student = load_student(config.student, seed=config.seed)
    return TargetedDistillation(student, config, materials.builder.cache.teacher.dim)


def trained(materials, config: RunConfig, folder, log_every: int = 1) -> DistillationTrainer:
    module, dataset = module_of(materials, config), dataset_of(materials, config)
    trainer = make_trainer(module, config, dataset, folder, log_every=log_every)
    trainer.train()
    return trainer


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Without a teacher it is finetuning


def test_weights_of_zero_are_plain_finetuning_bit_for_bit(base, materials, folders, tmp_path):
    config = settings_of(
        base, arm="clip_td", distill_weight=0.0, choice_weight=0.0, selector="random", mass=0.9
    )
    train_run(config, materials, tmp_path / "zero")
    assert_same_bits(weights_of(tmp_path / "zero"), weights_of(folders[0]))
    assert (tmp_path / "zero/history.jsonl").read_text() == (folders[0] / "history.jsonl").read_text()
    start = load_student(base.student).state_dict()
    assert not torch.equal(start["classifier.weight"], weights_of(folders[0])["classifier.weight"])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights_of(folders[0]).values(), weights_of(folders[1]).values(), strict=True)
    )


def recorded(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """All batches that are made from here on."""
    batches, real = [], trainer_module.collate
    monkeypatch.setattr(
        trainer_module,
        "collate",
        lambda *args, **options: batches.append(real(*args, **options)) or batches[-1],
    )
    return batches


def test_finetuning_equals_a_plain_loop(base, materials, tmp_path, monkeypatch):
    """The same batches through torch's own tools, without Trainer."""
    config = apply_arm(settings_of(base, arm="finetune", epochs=2, weight_decay=0.1))
    batches = recorded(monkeypatch)
    trainer = trained(materials, config, tmp_path)
    student = load_student(config.student).train()
    groups = []
    for name, parameter in student.named_parameters():
        rate = config.head_learning_rate if name.startswith("classifier.") else config.learning_rate
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.1 if parameter.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * len(batches)), len(batches))
    losses = []
    for batch in batches:
        output = student(**student_inputs(student, batch))
        loss = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_close([entry["task"] for entry in trainer.history], losses, **CLOSE)
    for (name, ours), plain in zip(
        trainer.model.student.named_parameters(), student.parameters(), strict=True
    ):
        if not name.endswith(NOISE):
            assert_close(ours, plain, rtol=1e-4, atol=2e-6, msg=name)


def test_all_arms_of_a_seed_start_alike_and_see_the_same(base, materials, tmp_path, monkeypatch):
    """Also with dropout: neither the maps nor their start may use up the baseline's random numbers."""
    model = ViltForMultipleChoice(ViltConfig.from_pretrained(base.student, hidden_dropout_prob=0.2))
    model.save_pretrained(tmp_path / "student")
    seen = {}
    for arm in ("finetune", "clip_td", "naive", "clip_td_random"):
        config = apply_arm(settings_of(base, arm=arm, student=str(tmp_path / "student")))
        with monkeypatch.context() as patch:
            batches, histories = recorded(patch), []
            patch.setattr(
                training, "write_jsonl", lambda _path, history, kept=histories: kept.extend(history)
            )
            patch.setattr(
                training, "make_trainer", lambda *args, **options: make_trainer(*args, **options, log_every=1)
            )
            patch.setattr(training, "predict", lambda _student, data: np.full((len(data), 4), 0.25))
            train_run(config.model_copy(update={"probe_examples": 0}), materials, tmp_path / arm)
        steps = math.ceil(len(low_shot(materials.train, base.shots, 0)) / 4)
        seen[arm] = (
            [batch["input_ids"].tolist() for batch in batches[-steps:]],
            histories[0]["task"],
            len(histories),
        )
    assert all(value == seen["finetune"] for value in seen.values())


def test_maps_use_up_no_random_numbers_and_follow_the_seed(base, materials):
    state = torch.random.get_rng_state()
    first, same, other = (module_of(materials, settings_of(base, seed=seed)).phi for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_bits(first.state_dict(), same.state_dict())
    assert not torch.equal(first["text"].weight, other["text"].weight)


def test_the_seed_decides_the_order(base, materials, tmp_path, monkeypatch):
    orders = []
    for seed in (0, 1, 0):
        config = apply_arm(settings_of(base, arm="finetune", seed=seed))
        dataset = EncodedExamples(materials.train[:12], materials.encoder)
        with monkeypatch.context() as patch:
            batches = recorded(patch)
            make_trainer(module_of(materials, config), config, dataset, tmp_path).train()
        orders.append([batch["input_ids"].tolist() for batch in batches])
    assert orders[0] != orders[1] and orders[0] == orders[2]


# Losses


@pytest.fixture(scope="module")
def mixed(base, materials, tmp_path_factory):
    """Encoded examples whose texts and pictures differ in size."""
    chosen = sorted(materials.train[:20], key=lambda example: len(example.prompt.text))[::4]
    for number, size in enumerate([(256, 256), (384, 256), (256, 350)]):
        path = tmp_path_factory.mktemp("pictures") / f"{number}.png"
        Image.open(chosen[number].image).resize(size).save(path)
        chosen[number] = replace(chosen[number], image=path)
    experiments.add_to_cache(materials.builder.cache, chosen)
    dataset = dataset_of(materials, base, chosen)
    items = [dataset[index] for index in range(len(dataset))]
    assert len({item["visual"]["pixels"].shape for item in items}) == 3
    assert len({item["input_ids"].shape[1] for item in items}) > 2
    return items


@pytest.mark.parametrize("selector", ["nucleus", "all", "top_k"])
@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_longer_texts_and_larger_pictures_in_the_batch_change_no_loss(
    base, materials, mixed, selector, distance
):
    config = settings_of(base, selector=selector, distance=distance)
    module = module_of(materials, config).eval()
    window = len(mixed)
    with torch.no_grad():
        together = module(collate(mixed, materials.encoder))
        alone = [module(collate([item], materials.encoder), window) for item in mixed]
    for name in together:
        if name == "logits":
            assert_close(together[name], torch.cat([terms[name] for terms in alone]), **CLOSE)
        else:
            assert_close(together[name], sum(terms[name] for terms in alone), **CLOSE)
    assert together["distill"] > 0 and together["choice"] > 0


def test_the_loss_is_its_weighted_terms(base, materials, mixed):
    config = settings_of(base, distill_weight=0.7, choice_weight=0.3)
    with torch.no_grad():
        terms = module_of(materials, config).eval()(collate(mixed, materials.encoder))
    assert_close(terms["loss"], terms["task"] + 0.3 * terms["choice"] + 0.7 * terms["distill"])


def test_the_teachers_distribution_can_count_where_the_teacher_is_right(base, materials, mixed):
    batch = collate(mixed, materials.encoder)
    right = torch.arange(len(mixed)) < 2
    best = batch["teacher_logits"].argmax(-1)
    batch["labels"] = torch.where(right, best, (best + 1) % batch["teacher_logits"].shape[-1])
    with torch.no_grad():
        found = {
            name: float(
                module_of(materials, settings_of(base, choice_instance_weight=name)).eval()(batch)["choice"]
            )
            for name in ("uniform", "correct", "ratio")
        }
        batch["teacher_logits"][~right] = 0  # no opinion, so another divergence
        again = module_of(materials, settings_of(base, choice_instance_weight="correct")).eval()(batch)
    assert float(again["choice"]) == pytest.approx(found["correct"])
    assert found["correct"] < found["uniform"] and found["ratio"] < found["uniform"]


def test_a_distribution_over_texts_cut_short_is_not_distilled(base, materials, mixed):
    """A question beyond the teacher's context makes all statements one text, and all choices alike."""
    example = materials.train[0]
    question = " ".join(["Why is it that the person in the red coat waits there?"] * 6)
    long = replace(example, prompt=replace(example.prompt, text=question, references=()))
    experiments.add_to_cache(materials.builder.cache, [long])
    config = settings_of(base, choice_temperature=1.0)
    (item,) = [dataset_of(materials, config, [long])[0]]
    assert item["teacher"].logits.unique().numel() == 1 and item["teacher"].knows == 0
    batch = collate([*mixed, item], materials.encoder)
    assert batch["teacher_knows"].tolist() == [1.0] * len(mixed) + [0.0]
    for weighing in ("uniform", "ratio"):
        module = module_of(materials, settings_of(base, choice_instance_weight=weighing)).eval()
        with torch.no_grad():
            with_it = module(batch)["choice"] * (len(mixed) + 1)
            without = module(collate(mixed, materials.encoder))["choice"] * len(mixed)
        assert_close(with_it, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arm", ["clip_td", "naive_global", "clip_td_selection", "repair_only", "truth_only"])
def test_what_a_cut_text_would_falsify_is_left_out_of_every_term(base, materials, mixed, arm):
    """Marking one example as cut is the same as giving it no part in any term of the teacher."""
    config = settings_of(base, arm=arm, repair_choice="disagreement", repair_weight=1.0, truth_weight=1.0)
    config = apply_arm(config)
    experiments.add_to_cache(materials.builder.cache, materials.train[:4])
    judge = StatementJudge(materials.builder.cache, materials.train)
    builder = TargetBuilder(materials.builder.cache, materials.builder.idf, config, judge=judge)
    data = EncodedExamples([materials.train[i] for i in range(4)], materials.encoder, builder)
    module = module_of(materials, config).eval()
    batch = module.with_targets(collate([data[i] for i in range(4)], materials.encoder))
    batch["teacher_knows"][0] = 0
    names = [name for name in ("choice", "distill", "repair", "truth") if name in module(batch)]
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


def test_the_tokens_that_are_left_of_a_cut_text_are_right(base, materials, mixed):
    module = module_of(materials, apply_arm(settings_of(base, arm="naive"))).eval()
    batch = collate(mixed, materials.encoder)
    before = float(module(batch)["distill"])
    batch["teacher_knows"][0] = 0
    assert float(module(batch)["distill"]) == before > 0


def test_examples_that_the_teacher_cuts_are_counted(base, materials, folders):
    first = materials.train[0]
    long = replace(first, prompt=replace(first.prompt, text="word " * 60, references=()))
    experiments.add_to_cache(materials.builder.cache, [first, long])
    cut = materials.builder.cache.cut(long.statements()[0].text)
    counted = count_cut([first, long], materials.builder.cache.cut)
    assert (counted.examples, counted.cut_examples) == (2, 1) and counted.most >= cut > 0
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [found.get("teacher_cut_examples") for found in metrics] == [None, 0]
    assert "1 of 2 examples have texts beyond" in str(counted) and long.id in str(counted)


def test_distillation_follows_the_formula(base, materials, mixed):
    """mean over examples and choices of c * sum of w * (1 - cos(phi(h), u)), token by token."""
    module = module_of(materials, base).eval()
    batch = make_targets(collate(mixed, materials.encoder), base)
    with torch.no_grad():
        terms = module(batch)
        output = module.student(**student_inputs(module.student, batch), output_hidden_states=True)
        selected, weights = module.choose_tokens(batch)
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


def test_targets_lie_where_the_student_has_its_tokens(base, materials, mixed):
    batch = make_targets(collate(mixed, materials.encoder), base)
    student = module_of(materials, base).eval().student
    with torch.no_grad():
        output = student(**student_inputs(student, batch), output_hidden_states=True)
    assert torch.equal(output.spans, batch["target_spans"])
    assert_close(output.boxes, batch["target_boxes"], rtol=0, atol=1e-6)
    assert not (batch["valid"] & (output.attention_mask == 0)).any()
    assert_close(batch["vectors"].norm(dim=-1), batch["valid"].float())


def test_no_gradient_reaches_the_teacher(base, materials, mixed):
    module = module_of(materials, base)
    batch = module.with_targets(collate(mixed, materials.encoder))
    teachers = [batch[name].requires_grad_() for name in ("vectors", "scores", "teacher_logits")]
    module(batch)["loss"].backward()
    assert all(tensor.grad is None for tensor in teachers)
    assert all(parameter.grad is not None for parameter in module.phi.parameters())
    assert not any(p.requires_grad for p in materials.builder.cache.teacher.model.parameters())


def test_what_is_encoded_once_stays_the_same(base, materials):
    kept = dataset_of(materials, base)
    forgetful = EncodedExamples(kept.examples, kept.encoder, kept.builder, memory=0)
    for index in range(3):
        first = kept[index]
        assert kept[index] is first and forgetful[index] is not forgetful[index]
        again = forgetful[index]
        for name in ("input_ids", "spans"):
            assert torch.equal(first[name], again[name])
        assert torch.equal(first["visual"]["pixels"], again["visual"]["pixels"])
        one, two = first["teacher"], again["teacher"]
        assert (one.text_keys, one.picture_key) == (two.text_keys, two.picture_key)
        for name in ("boxes", "text_prior", "logits", "knows"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        for a, b in zip((*one.texts, one.picture), (*two.texts, two.picture), strict=True):
            assert a.value.dtype == torch.float16
            assert torch.equal(a.projected, b.projected) and torch.equal(a.value, b.value)


def test_accumulated_batches_equal_one_large_batch(base, materials, tmp_path):
    """Also in the last, smaller window, and with every term of the log."""
    large = trained(materials, settings_of(base, batch_size=8), tmp_path)
    small = trained(materials, settings_of(base, batch_size=4, accumulation=2), tmp_path)
    assert len(low_shot(materials.train, base.shots, 0)) % 8 not in (0, 4)
    assert [entry["step"] for entry in large.history] == [entry["step"] for entry in small.history] == [1, 2]
    for one, two in zip(large.history, small.history, strict=True):
        assert one.keys() == two.keys() >= {*TERMS, "instance_weight", "selected_text", "selected_visual"}
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    for (name, a), b in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        if not name.endswith(NOISE):
            assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_fitted_maps_start_nearer_to_the_targets(base, materials):
    config = settings_of(base, selector="all", instance_weight="uniform")
    module, dataset = module_of(materials, config), dataset_of(materials, config)
    batch = collate([dataset[index] for index in range(len(dataset))], dataset.encoder)
    before = module.eval()(batch)["distill"].item()
    student = {name: value.clone() for name, value in module.student.state_dict().items()}
    module.fit_phi(DataLoader(dataset, 4, collate_fn=partial(collate, encoder=dataset.encoder)))
    after = module.eval()(batch)["distill"].item()
    assert after < 0.5 * before
    assert_same_bits(module.student.state_dict(), student)


def test_fitted_maps_are_the_ridge_regression(base, materials):
    """The same as least squares with the penalty as further rows, one modality at a time."""
    module, dataset = module_of(materials, base), dataset_of(materials, base)
    batch = module.with_targets(collate([dataset[index] for index in range(4)], dataset.encoder))
    module.fit_phi(
        DataLoader(dataset, 4, collate_fn=partial(collate, encoder=dataset.encoder)), ridge=0.1, batches=1
    )
    with torch.no_grad():
        output = module.student(**student_inputs(module.student, batch), output_hidden_states=True)
        for name, has_span in (("text", True), ("visual", False)):
            chosen = batch["valid"] & (output.spans.any(-1) == has_span)
            x = torch.cat(
                [output.hidden_states[-2][chosen], torch.ones(int(chosen.sum()), 1)], dim=1
            ).double()
            y = batch["vectors"][chosen].double()
            penalty = torch.eye(x.shape[1]).double() * (0.1 * (x.T @ x).diagonal().mean()).sqrt()
            stacked = torch.cat([x, penalty]), torch.cat([y, torch.zeros(x.shape[1], y.shape[1]).double()])
            solution = torch.linalg.lstsq(*stacked).solution
            assert_close(module.phi[name].weight.double(), solution[:-1].T, rtol=1e-3, atol=1e-4)
            assert_close(module.phi[name].bias.double(), solution[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_the_student_lacks_are_refused(base, materials, layer):
    with pytest.raises(ConfigError, match=rf"distill_layer={layer}.*-3 to 2"):
        module_of(materials, settings_of(base, distill_layer=layer))


def test_new_layers_learn_at_their_own_rate(base, materials, tmp_path):
    config = settings_of(base, learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.05)
    trainer = make_trainer(module_of(materials, config), config, dataset_of(materials, config), tmp_path)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], group["weight_decay"], parameter.ndim
    assert seen.keys() == set(names.values())
    for name, (rate, decay, ndim) in seen.items():
        assert rate == (1e-2 if name.startswith(("phi.", "student.classifier.")) else 1e-4)
        assert decay == (0.05 if ndim > 1 else 0)


# Runs


def test_a_run_folder_is_complete(folders, base, materials):
    expected = {
        "config.json", "manifest.json", "history.jsonl", "metrics.json", "predictions.parquet",
        "environment.json", "identity.json", "student",
    }  # fmt: skip
    for folder, own in zip(folders, (set(), {"selections.parquet"}), strict=True):
        assert {path.name for path in folder.iterdir()} - {"trainer"} == expected | own
    assert [folder.name for folder in folders] == ["finetune-seed0", "clip_td-seed0"]
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["clip_td-seed0", "finetune-seed0"]
    subset = low_shot(materials.train, base.shots, 0)
    for folder, arm in zip(folders, ("finetune", "clip_td"), strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert RunConfig.from_parameters(**config) == apply_arm(settings_of(base, arm=arm))
        assert json.loads((folder / "manifest.json").read_text())["ids"] == [example.id for example in subset]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["updates"] == math.ceil(len(subset) / 4) and metrics["train_examples"] == len(subset)
        assert metrics["accuracy"].keys() == {"val"}  # the test split has no labels


def test_the_history_covers_every_update_of_a_short_run(folders):
    for folder in folders:
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert history[-1]["step"] == json.loads((folder / "metrics.json").read_text())["updates"]
        assert all(math.isfinite(value) for entry in history for value in entry.values())
    assert {*TERMS, "instance_weight"} <= history[-1].keys()


def test_the_finished_student_is_the_baseline_and_predicts_what_is_recorded(folders, base, materials):
    start = load_student(base.student).state_dict()
    for folder in folders:
        student = load_student(str(folder / "student"))
        again = ViltForMultipleChoice.from_pretrained(folder / "student")
        assert {n: v.shape for n, v in weights_of(folder).items()} == {n: v.shape for n, v in start.items()}
        assert sum(p.numel() for p in student.parameters()) == sum(
            p.numel() for p in load_student(base.student).parameters()
        )
        assert_same_bits(student.state_dict(), dict(again.state_dict()))
        encoder = ViltEncoder(str(folder / "student"))
        table = pd.read_parquet(folder / "predictions.parquet")
        for split, examples in materials.evaluated.items():
            own = table[table["split"] == split]
            assert own["id"].tolist() == [example.id for example in examples]  # none left out
            found = predict(student, EncodedExamples(examples, encoder))
            assert_close(
                torch.tensor(np.stack(own["probabilities"])), torch.tensor(found).double(), rtol=0, atol=1e-6
            )
            assert own["prediction"].tolist() == found.argmax(-1).tolist()


def test_predictions_do_not_depend_on_the_batches(base, materials):
    student, examples = load_student(base.student), materials.train[:9]
    dataset = EncodedExamples(examples, materials.encoder)
    one, many = predict(student, dataset, batch_size=1), predict(student, dataset, batch_size=4)
    assert_close(one, many, rtol=0, atol=1e-6)
    assert_close(one.sum(-1), np.ones(9, dtype=np.float32))
    backwards = predict(student, EncodedExamples(examples[::-1], materials.encoder))
    assert_close(backwards[::-1].copy(), one, rtol=0, atol=1e-6)


def test_the_same_settings_give_the_same_run(folders, base, materials, tmp_path):
    train_run(apply_arm(settings_of(base, arm="clip_td")), materials, tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), weights_of(folders[1]))
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "again" / name), pd.read_parquet(folders[1] / name)
        )
    for name in ("config.json", "manifest.json", "history.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (folders[1] / name).read_text()
    found, known = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "again", folders[1]))
    for metrics in (found, known):
        assert metrics.pop("seconds") >= metrics.pop("train_seconds") >= 0
        assert metrics.pop("seconds_per_update") >= 0
    assert found == known


def test_half_precision_is_the_students_alone(base, materials, folders, tmp_path, monkeypatch):
    """Its layers compute in it; losses and evaluation do not, and weights stay single."""
    seen, terms = set(), set()
    loss = training.TargetedDistillation.forward

    def computed(layer, given, output):
        if isinstance(layer, torch.nn.Linear) and output.ndim == 3:  # of the encoder
            seen.add((output.dtype, torch.is_grad_enabled()))

    def lost(self, *args, **options):
        output = loss(self, *args, **options)
        terms.update(value.dtype for value in output.values() if value.is_floating_point())
        return output

    monkeypatch.setattr(training.TargetedDistillation, "forward", lost)
    with register_module_forward_hook(computed):
        train_run(apply_arm(settings_of(base, arm="clip_td", precision="bf16")), materials, tmp_path / "run")
    assert seen == {(torch.bfloat16, True), (torch.float32, False)} and terms == {torch.float32}
    assert {value.dtype for value in weights_of(tmp_path / "run").values()} == {torch.float32}
    first, known = (
        json.loads((f / "history.jsonl").read_text().splitlines()[0]) for f in (tmp_path / "run", folders[1])
    )
    for name in TERMS:
        assert first[name] != known[name] and first[name] == pytest.approx(known[name], rel=0.05), name


def test_half_precision_needs_hardware(base, materials, tmp_path):
    with pytest.raises(ConfigError, match="precision='fp16' needs a GPU"):
        config = apply_arm(settings_of(base, arm="finetune", precision="fp16"))
        train_run(config, materials, tmp_path / "run")


def test_settings_must_be_those_of_their_arm(base, materials, tmp_path):
    with pytest.raises(ConfigError, match=r"arm='naive' sets .*selector='all'.*use apply_arm"):
        train_run(settings_of(base, arm="naive"), materials, tmp_path / "run")


def test_a_run_of_other_settings_is_not_lost(base, materials, tmp_path, caplog):
    config, folder = apply_arm(settings_of(base, arm="finetune")), tmp_path / "run"
    other = settings_of(config, seed=1)
    for changed in (config, config, other, settings_of(other, loader_workers=1)):
        train_run(changed, materials, folder)
    (kept,) = set(tmp_path.iterdir()) - {folder}
    found = [json.loads((place / "config.json").read_text())["seed"] for place in (kept, folder)]
    assert found == [0, 1] and kept.name.startswith("run-") and kept.name in caplog.text


@pytest.mark.parametrize("moment", ["write_json", "write_jsonl", "save_manifest"])
def test_an_error_leaves_no_folder_and_the_old_one_as_it_was(base, materials, tmp_path, monkeypatch, moment):
    config = apply_arm(settings_of(base, arm="finetune"))
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.json").write_text("old")

    def fail(*_args, **_options):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(training, moment, fail)
    monkeypatch.setattr(DistillationTrainer, "train", lambda self: None)
    for folder in (old, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="in the middle"):
            train_run(config, materials, folder)
    assert sorted(os.listdir(tmp_path)) == ["old"]
    assert (old / "metrics.json").read_text() == "old"


def test_a_failed_evaluation_keeps_the_student_and_is_repeated_without_training(
    base, materials, folders, tmp_path, monkeypatch
):
    config, folder = apply_arm(settings_of(base, arm="clip_td")), tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text("of an older run")

    def fail(*_args, **_options):
        raise OSError("disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(training, "predict", fail)
        with pytest.raises(OSError, match="disk is gone") as failure:
            train_run(config, materials, folder)
    assert any(str(folder) in note and "again" in note for note in failure.value.__notes__)
    (aside,) = set(tmp_path.iterdir()) - {folder}
    assert (aside / "metrics.json").read_text() == "of an older run"
    assert_same_bits(weights_of(folder), weights_of(folders[1]))
    assert "disk is gone" in (folder / "unevaluated.json").read_text()
    assert not {"metrics.json", "predictions.parquet"} & {path.name for path in folder.iterdir()}

    monkeypatch.setattr(DistillationTrainer, "train", fail)  # whoever trains now fails
    metrics = train_run(config, materials, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in folders[1].iterdir()}
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name), pd.read_parquet(folders[1] / name))
    expected = json.loads((folders[1] / "metrics.json").read_text())
    for found in (metrics, json.loads((folder / "metrics.json").read_text())):
        assert found["accuracy"] == expected["accuracy"] and found["updates"] == expected["updates"]
    with pytest.raises(OSError, match="disk is gone"):  # it is finished, so that this call trains anew
        train_run(config, materials, folder)
    with monkeypatch.context() as patch:
        patch.undo()
        patch.setattr(training, "predict", fail)
        with pytest.raises(OSError):
            train_run(config, materials, tmp_path / "other")
    monkeypatch.setattr(DistillationTrainer, "train", fail)
    with pytest.raises(OSError):  # a student of other settings is none of this run's
        train_run(settings_of(config, seed=1), materials, tmp_path / "other")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bad_picture_of_an_evaluated_split_is_found_before_training(base, world, tmp_path, damage):
    data = tmp_path / "vcr"
    shutil.copytree(world, data)
    config = settings_of(base, data_dir=str(data), eval_splits=["val"], probe_examples=1)
    picture = read_split(config, "val")[len(read_split(config, "val")) - 1].image
    content = picture.read_bytes()
    picture.unlink() if damage == "missing" else picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=picture.name):
        prepare(config, whole_splits=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(base, materials, tmp_path, monkeypatch, bad):
    real = TargetedDistillation.forward

    def forward(self, batch, window=None):
        terms = real(self, batch, window)
        return {**terms, "loss": terms["loss"] * bad}

    monkeypatch.setattr(TargetedDistillation, "forward", forward)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_run(apply_arm(settings_of(base, arm="finetune")), materials, tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_a_teacher_is_needed_where_something_is_distilled(base, materials, tmp_path):
    bare = replace(materials, builder=None)
    with pytest.raises(ConfigError, match="needs a teacher"):
        train_run(settings_of(base, arm="clip_td"), bare, tmp_path / "run")
    train_run(apply_arm(settings_of(base, arm="finetune")), bare, tmp_path / "plain")
    assert not (tmp_path / "run").exists() and (tmp_path / "plain").is_dir()


# Records


def test_selections_can_be_read_and_their_weights_sum_to_one(folders, base, materials):
    records = read_records(folders[1] / "selections.parquet")
    assert len(records) == 2 * 2 * 4  # splits, probes, choices
    assert {record.split for record in records} == {"val", "test"}
    table = pd.read_parquet(folders[1] / "predictions.parquet").set_index("id")
    chance = zero_shot(materials.builder.cache, materials.evaluated["val"][:2])
    for record in records:
        assert record.selected.any() and record.weight.sum() == pytest.approx(1, abs=1e-5)
        assert not record.weight[~record.selected].any() and not (record.selected & ~record.distilled).any()
        assert record.prediction == table.loc[record.example_id, "prediction"]
        for chosen in (record.is_text, record.is_visual):
            assert record.score[chosen & record.distilled].sum() == pytest.approx(1, abs=1e-5)
        words = [record.text[start:end] for start, end in record.spans]
        assert list(record.tokens) == words
        if record.split == "test":
            assert record.label is record.teacher_probability is record.instance_weight is None
        else:
            assert isinstance(record.label, int)
            student = table.loc[record.example_id, "probabilities"][record.label]
            position = [example.id for example in materials.evaluated["val"]].index(record.example_id)
            teacher = chance[position, record.label]
            assert record.student_probability == pytest.approx(student, abs=1e-6)
            assert record.teacher_probability == pytest.approx(teacher, abs=1e-5)
            assert record.instance_weight == pytest.approx(teacher / (teacher + student), abs=1e-5)


def test_records_survive_the_file(base, materials, tmp_path):
    """Field by field and type by type, for labelled and unlabelled examples in one table."""
    module = module_of(materials, base)
    records = []
    for split in ("val", "test"):
        data = EncodedExamples(materials.evaluated[split][:2], materials.encoder, materials.builder)
        records += ProbeRecorder(data, partial(collate, encoder=data.encoder), module, split).record()
    assert {record.label is None for record in records} == {True, False}
    for part in (records, records[:4], records[-4:]):
        records_table(part).to_parquet(tmp_path / "selections.parquet", index=False)
        for own, read in zip(part, read_records(tmp_path / "selections.parquet"), strict=True):
            for field in fields(own):
                a, b = getattr(own, field.name), getattr(read, field.name)
                if isinstance(a, np.ndarray):
                    assert a.shape == b.shape and a.dtype.kind == b.dtype.kind
                    np.testing.assert_allclose(a, b)
                else:
                    assert type(a) is type(b) and a == b, field.name


# Comparisons


def test_an_arms_own_targets_are_used(base, materials, tmp_path, monkeypatch):
    """An arm that changes only the prior must not train on the common settings' targets."""
    monkeypatch.setitem(ARMS, "no_prior", {"prior": "uniform"})
    monkeypatch.setitem(ARMS, "raw", {"relevance": "projected", "temperature": 0.01})
    monkeypatch.setattr(training, "prepare", lambda *_args: materials)
    monkeypatch.setattr(DistillationTrainer, "train", lambda self: None)
    own = {}
    for folder in compare(base, ["clip_td", "no_prior", "raw"], [0], tmp_path):
        own[folder.name.split("-")[0]] = read_records(folder / "selections.parquet")[0]
    assert own["clip_td"].prior[own["clip_td"].is_text].std() > 0
    assert (own["no_prior"].prior[own["no_prior"].is_text] == 1).all()
    assert np.abs(own["raw"].relevance - own["clip_td"].relevance).max() > 1e-3


def test_comparisons_that_cannot_be_fair_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "more", {"shots": 0.5})
    for arms, problem in ((["more"], "'more' changes shots"), (["nonesuch", "finetune"], "unknown nonesuch")):
        with pytest.raises(ConfigError, match=problem):
            compare(base, arms, [0], tmp_path)
    assert not os.listdir(tmp_path)


def test_summary_equals_direct_figures(folders):
    table = read_predictions(folders)
    assert set(table["arm"]) == {"finetune", "clip_td"} and set(table["seed"]) == {0}
    rng = np.random.default_rng(0)
    other = table.assign(
        seed=1, score=[math.nan if math.isnan(s) else float(rng.random() < 0.5) for s in table["score"]]
    )
    both = pd.concat(
        [table, other.sample(frac=1, random_state=0)], ignore_index=True
    )  # order does not matter
    summary = summarise(both)
    assert set(summary["split"]) == {"val"}  # the test split has no labels
    images = table[(table["split"] == "val") & (table["arm"] == "finetune")]["image"].to_numpy()
    ids = table[(table["split"] == "val") & (table["arm"] == "finetune")]["id"].tolist()
    right = {}
    for arm in ("finetune", "clip_td"):
        part = both[(both["arm"] == arm) & (both["split"] == "val")]
        right[arm] = np.array(
            [
                [bool(part[(part["seed"] == s) & (part["id"] == i)]["score"].item()) for i in ids]
                for s in (0, 1)
            ]
        )
    for row in summary.to_dict("records"):
        values = right[row["arm"]].astype(float)
        assert row["n"] == 2 and row["mean"] == pytest.approx(values.mean())
        order = np.argsort(ids)  # the summary sorts by id; resampling depends on the clusters alone
        low, high = bootstrap_interval(values[:, order], images[order])
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    row = summary[summary["arm"] == "clip_td"].iloc[0]
    gain = right["clip_td"].astype(float) - right["finetune"]
    assert row["difference"] == pytest.approx(gain.mean())
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert summary[summary["arm"] == "finetune"]["difference"].isna().all()


def test_zero_shot_equals_the_live_teacher(base, materials):
    cache = materials.builder.cache
    examples = read_split(base, "val")[:2]
    experiments.add_to_cache(cache, examples)
    found = zero_shot(cache, examples)
    teacher = cache.teacher
    for row, example in zip(found, examples, strict=True):
        pixels = teacher.preprocess(Image.open(example.image).convert("RGB"))[None]
        ids = teacher.tokenize.tokenizer([statement.text for statement in example.statements()])
        with torch.inference_mode():
            expected = teacher.model.get_logits(pixels, ids)[0].softmax(-1)[0]
        assert_close(torch.tensor(row), expected, rtol=0, atol=2e-3)


def test_prediction_table_of_labelled_and_unlabelled_examples(materials):
    examples = [materials.evaluated["val"][0], replace(materials.evaluated["val"][1], label=None)]
    probabilities = np.eye(4, dtype=np.float32)[[examples[0].label, 2]]
    table = prediction_table("val", examples, probabilities)
    assert table["score"][0] == 1 and math.isnan(table["score"][1])
    assert table["label"].isna().tolist() == [False, True] and table["prediction"].tolist() == [
        examples[0].label,
        2,
    ]


def test_the_students_card_says_what_the_run_reached_and_with_what(folders):
    for folder in folders:
        card = ModelCard.load(folder / "student" / "README.md")
        metrics = json.loads((folder / "metrics.json").read_text())
        stated = {result.dataset_split: result.metric_value for result in card.data.eval_results}
        assert stated == {split: round(value, 4) for split, value in metrics["accuracy"].items()}
        assert card.data.library_name == "transformers"
        assert f"{metrics['train_examples']:,} examples" in card.text and "`seed=0`" in card.text
        distilled = metrics["arm"] == "clip_td"
        assert ("`selector='nucleus'`" in card.text) == distilled == ("No teacher." not in card.text)
