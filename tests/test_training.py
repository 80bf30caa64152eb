"""Training: plain finetuning where nothing is distilled, one order for all arms, windows, predictions."""

import math
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader
from training_helpers import (
    CLOSE,
    NOISE,
    TERMS,
    assert_same_bits,
    dataset_of,
    module_of,
    recorded,
    settings_of,
    trained,
)
from transformers import ViltConfig, get_cosine_schedule_with_warmup

from tdlib.config import apply_arm
from tdlib.core.paths import ConfigError
from tdlib.core.records import read_records, records_table
from tdlib.data.examples import low_shot
from tdlib.students.base import student_inputs
from tdlib.students.registry import load_student
from tdlib.students.vilt import ViltForMultipleChoice
from tdlib.training import evaluation, objective
from tdlib.training import prepare as experiments
from tdlib.training import run as training
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import Predictions, predict, prediction_table
from tdlib.training.prepare import read_split
from tdlib.training.recording import ProbeRecorder
from tdlib.training.reference import zero_shot
from tdlib.training.run import train_run
from tdlib.training.trainer import make_trainer


def test_finetuning_equals_a_plain_loop(base, prepared, tmp_path, monkeypatch):
    """The same batches through torch's own tools, without Trainer."""
    config = apply_arm(settings_of(base, arm="finetune", epochs=2, weight_decay=0.1))
    batches = recorded(monkeypatch)
    trainer = trained(prepared, config, tmp_path)
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


def test_all_arms_of_a_seed_start_alike_and_see_the_same(base, prepared, tmp_path, monkeypatch):
    """Also with dropout: neither the maps nor their start may use up the baseline's random numbers."""
    model = ViltForMultipleChoice(ViltConfig.from_pretrained(base.student, hidden_dropout_prob=0.2))
    model.save_pretrained(tmp_path / "student")
    seen = {}
    for arm in ("finetune", "clip_td", "naive", "clip_td_random"):
        config = apply_arm(settings_of(base, arm=arm, student=str(tmp_path / "student")))
        own = replace(prepared, config=config)  # of the same encoder
        with monkeypatch.context() as patch:
            batches, histories = recorded(patch), []
            patch.setattr(
                training, "write_jsonl", lambda _path, history, kept=histories: kept.extend(history)
            )
            patch.setattr(
                training, "make_trainer", lambda *args, **options: make_trainer(*args, **options, log_every=1)
            )
            patch.setattr(evaluation, "predict", lambda _student, data: np.full((len(data), 4), 0.25))
            train_run(config.model_copy(update={"probe_examples": 0}), own, tmp_path / arm)
        steps = math.ceil(len(low_shot(prepared.train, base.shots, 0)) / 4)
        seen[arm] = (
            [batch["input_ids"].tolist() for batch in batches[-steps:]],
            histories[0]["task"],
            len(histories),
        )
    assert all(value == seen["finetune"] for value in seen.values())


def test_maps_use_up_no_random_numbers_and_follow_the_seed(base, prepared):
    state = torch.random.get_rng_state()
    first, same, other = (module_of(prepared, settings_of(base, seed=seed)).phi for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_bits(first.state_dict(), same.state_dict())
    assert not torch.equal(first["text"].weight, other["text"].weight)


def test_the_seed_decides_the_order(base, prepared, tmp_path, monkeypatch):
    orders = []
    for seed in (0, 1, 0):
        config = apply_arm(settings_of(base, arm="finetune", seed=seed))
        dataset = EncodedExamples(prepared.train[:12], prepared.encoder)
        with monkeypatch.context() as patch:
            batches = recorded(patch)
            make_trainer(module_of(prepared, config), config, dataset, tmp_path).train()
        orders.append([batch["input_ids"].tolist() for batch in batches])
    assert orders[0] != orders[1] and orders[0] == orders[2]


def test_what_is_encoded_once_stays_the_same(base, prepared):
    kept = dataset_of(prepared, base)
    forgetful = EncodedExamples(kept.examples, kept.encoder, kept.feature_reader, memory=0)
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


def test_accumulated_batches_equal_one_large_batch(base, prepared, tmp_path):
    """Also in the last, smaller window, and with every term of the log."""
    large = trained(prepared, settings_of(base, batch_size=8), tmp_path)
    small = trained(prepared, settings_of(base, batch_size=4, accumulation=2), tmp_path)
    assert len(low_shot(prepared.train, base.shots, 0)) % 8 not in (0, 4)
    assert [entry["step"] for entry in large.history] == [entry["step"] for entry in small.history] == [1, 2]
    for one, two in zip(large.history, small.history, strict=True):
        assert one.keys() == two.keys() >= {*TERMS, "instance_weight", "selected_text", "selected_visual"}
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    for (name, a), b in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        if not name.endswith(NOISE):
            assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_fitted_maps_start_nearer_to_the_targets(base, prepared):
    config = settings_of(base, selector="all", instance_weight="uniform")
    module, dataset = module_of(prepared, config), dataset_of(prepared, config)
    batch = collate([dataset[index] for index in range(len(dataset))], dataset.encoder)
    before = module.eval()(batch)["distill"].item()
    student = {name: value.clone() for name, value in module.student.state_dict().items()}
    module.fit_phi(DataLoader(dataset, 4, collate_fn=partial(collate, encoder=dataset.encoder)))
    after = module.eval()(batch)["distill"].item()
    assert after < 0.5 * before
    assert_same_bits(module.student.state_dict(), student)


def test_fitted_maps_are_the_ridge_regression(base, prepared, monkeypatch):
    """The same as least squares with the penalty as further rows, one modality at a time."""
    module, dataset = module_of(prepared, base), dataset_of(prepared, base)
    batch = module.with_targets(collate([dataset[index] for index in range(4)], dataset.encoder))
    monkeypatch.setattr(objective, "PHI_RIDGE", 0.1)
    monkeypatch.setattr(objective, "PHI_BATCHES", 1)
    module.fit_phi(DataLoader(dataset, 4, collate_fn=partial(collate, encoder=dataset.encoder)))
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


def test_accumulated_batches_start_from_the_maps_of_large_ones(base, prepared, monkeypatch):
    monkeypatch.setattr(objective, "PHI_BATCHES", 1)
    starts = []
    for size, windows in ((4, 1), (2, 2), (2, 1)):
        config = settings_of(base, batch_size=size, accumulation=windows)
        module, dataset = module_of(prepared, config), dataset_of(prepared, config)
        module.fit_phi(DataLoader(dataset, size, collate_fn=partial(collate, encoder=dataset.encoder)))
        starts.append(module.phi["visual"].weight.detach())
    assert_close(starts[1], starts[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(starts[2], starts[0], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_the_student_lacks_are_refused(base, prepared, layer):
    with pytest.raises(ConfigError, match=rf"distill_layer={layer}.*-3 to 2"):
        module_of(prepared, settings_of(base, distill_layer=layer))


def test_new_layers_learn_at_their_own_rate(base, prepared, tmp_path):
    config = settings_of(base, learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.05)
    trainer = make_trainer(module_of(prepared, config), config, dataset_of(prepared, config), tmp_path)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], group["weight_decay"], parameter.ndim
    assert seen.keys() == set(names.values())
    for name, (rate, decay, ndim) in seen.items():
        assert rate == (1e-2 if name.startswith(("phi.", "student.classifier.")) else 1e-4)
        assert decay == (0.05 if ndim > 1 else 0)


def test_predictions_do_not_depend_on_the_batches(base, prepared):
    student, examples = load_student(base.student), prepared.train[:9]
    dataset = EncodedExamples(examples, prepared.encoder)
    one, many = predict(student, dataset, batch_size=1), predict(student, dataset, batch_size=4)
    assert_close(one, many, rtol=0, atol=1e-6)
    assert_close(one.sum(-1), np.ones(9, dtype=np.float32))
    backwards = predict(student, EncodedExamples(examples[::-1], prepared.encoder))
    assert_close(backwards[::-1].copy(), one, rtol=0, atol=1e-6)


def test_records_survive_the_file(base, prepared, tmp_path):
    """Field by field and type by type, for labelled and unlabelled examples in one table."""
    module = module_of(prepared, base)
    records = []
    for split in ("val", "test"):
        data = dataset_of(prepared, base, prepared.evaluated[split][:2])
        records += ProbeRecorder(data, module, split).record()
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


def test_zero_shot_equals_the_live_teacher(base, prepared):
    cache = prepared.cache
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


def test_prediction_table_of_labelled_and_unlabelled_examples(prepared):
    examples = [prepared.evaluated["val"][0], replace(prepared.evaluated["val"][1], label=None)]
    probabilities = np.eye(4, dtype=np.float32)[[examples[0].label, 2]]
    table = prediction_table("val", examples, Predictions.of(probabilities))
    assert table["score"][0] == 1 and math.isnan(table["score"][1])
    assert table["label"].isna().tolist() == [False, True] and table["prediction"].tolist() == [
        examples[0].label,
        2,
    ]
