"""Every student with every arm, from configuration to a run folder that loads again."""

import json
import math
import re

import pandas as pd
import pytest
import torch

from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ConfigError
from tdlib.core.records import read_records
from tdlib.data.examples import low_shot
from tdlib.data.tasks import TASKS
from tdlib.make.vocabulary import train_wordpiece_tokenizer
from tdlib.method.selection import SELECTORS
from tdlib.method.tokens import Tokens
from tdlib.regions.backbones import MiniDetector, save_detector
from tdlib.students.base import student_inputs
from tdlib.students.registry import architecture, load_student
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.visual_bert import VisualBertForMultipleChoice
from tdlib.students.vlbert import VlBertConfig, VlBertForMultipleChoice
from tdlib.training import objective
from tdlib.training import prepare as experiments
from tdlib.training.adversarial import moved_words, symmetric_divergence
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import predict
from tdlib.training.objective import TargetedDistillation, term_weights
from tdlib.training.prepare import prepare
from tdlib.training.recording import preview_targets
from tdlib.training.run import compare, train_run
from tdlib.training.trainer import make_trainer

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
STUDENTS = ["vilt", "uniter", "vl-bert", "visual_bert"]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "detector"
    torch.manual_seed(0)
    save_detector(MiniDetector({"name": ["a", "b"]}, 32, 8), folder)
    return folder


@pytest.fixture(scope="module")
def folders(student_folder, captions_texts, tmp_path_factory):
    """A folder per architecture, of two layers with random weights."""
    from transformers import VisualBertConfig

    tokenizer = train_wordpiece_tokenizer(captions_texts, 300)
    words = {"vocab_size": len(tokenizer), **SIZES}
    torch.manual_seed(0)
    models = {
        "uniter": UniterForMultipleChoice(UniterConfig(**words, img_dim=8, type_vocab_size=4)),
        "vl-bert": VlBertForMultipleChoice(VlBertConfig(**words, visual_embedding_dim=8)),
        "visual_bert": VisualBertForMultipleChoice(VisualBertConfig(**words, visual_embedding_dim=8)),
    }
    home = tmp_path_factory.mktemp("students")
    for name, model in models.items():
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return {"vilt": student_folder} | {name: home / name for name in models}


@pytest.fixture(scope="module")
def settings(worlds, teacher_folder, folders, detector_folder, own_cache):
    """A function from student and task to the settings of a run of a second."""

    def of(student: str = "vilt", task: str = "vcr_qa", **changes) -> RunConfig:
        common = {
            "task": task, "data_dir": str(worlds[TASKS[task].data_set]), "student": str(folders[student]),
            "regions": f"boxes+grid:{detector_folder}", "teacher": f"local-dir:{teacher_folder}",
            "learning_rate": 5e-4, "head_learning_rate": 1e-3,  # so that a few updates show
            "shots": 0.3, "epochs": 1, "batch_size": 8, "probe_examples": 1, "vocabulary_minimum": 2,
            "shift": "",
        }  # fmt: skip
        return RunConfig.from_parameters(**{**common, **changes})

    return of


def batch_of(config, number: int = 5):
    """Prepared data of a run, and one batch of its training subset with targets."""
    prepared = prepare(config)
    module = TargetedDistillation(
        experiments.load_student(config, prepared), config, prepared.cache.teacher.dim
    )
    subset = low_shot(prepared.train, config.shots, config.seed)[:number]
    feature_reader = experiments.feature_reader_of(config, prepared, subset)
    dataset = EncodedExamples(
        subset,
        prepared.encoder,
        feature_reader,
        num_labels=len(prepared.labels),
        soft_labels=TASKS[config.task].has_soft_labels,
    )
    batch = collate([dataset[i] for i in range(number)], prepared.encoder)
    return prepared, module, dataset, module.with_targets(batch)


@pytest.mark.parametrize("task", ["vcr_qa", "snli_ve", "vqa_v2"])
@pytest.mark.parametrize("student", STUDENTS[1:])
def test_each_region_student_trains_on_each_task_and_loads_again(settings, tmp_path, student, task):
    config = settings(student, task)
    prepared = prepare(config)
    metrics = train_run(config, prepared, tmp_path / "run")
    assert all(0 <= value <= 1 for value in metrics["accuracy"].values())
    stored = load_student(str(tmp_path / "run" / "student"), labels=prepared.labels)
    examples = next(iter(prepared.evaluated.values()))
    encoder = experiments.encoder_of(config, student=str(tmp_path / "run" / "student"))
    encoder.prepare(examples)
    again = predict(stored, EncodedExamples(examples, encoder, num_labels=len(prepared.labels)))
    rows = pd.read_parquet(tmp_path / "run" / "predictions.parquet").iloc[: len(examples)]
    assert (rows["prediction"] == again.argmax(1)).all()
    untrained = experiments.load_student(config, prepared)
    assert {n: p.shape for n, p in stored.named_parameters()} == {
        n: p.shape for n, p in untrained.named_parameters()
    }


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("clip_input", "clip_finetune")])
def test_each_arm_trains_and_changes_only_what_it_says(settings, tmp_path, arm):
    (folder,) = compare(settings("uniter"), [arm], [0], tmp_path)
    found = json.loads((folder / "config.json").read_text())
    base = settings("uniter").model_dump()
    changed = {name: value for name, value in found.items() if value != base[name] and name != "arm"}
    assert changed == {name: value for name, value in ARMS[arm].items() if value != base[name]}
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["loss"]) and ("distill" in last) == (found["distill_weight"] > 0)


def test_clip_input_gives_the_student_the_teachers_patches(settings, tmp_path, teacher):
    config = settings("uniter")
    (plain, clip) = compare(config, ["finetune", "clip_input"], [0], tmp_path)
    widths = [json.loads((f / "student" / "config.json").read_text())["img_dim"] for f in (plain, clip)]
    assert widths == [8, teacher.dim]
    # nothing else of the student is drawn anew
    runs = [apply_arm(config.model_copy(update={"arm": arm})) for arm in ("finetune", "clip_input")]
    one, other = (experiments.load_student(run, prepare(run)).state_dict() for run in runs)
    differing = {n for n in one if one[n].shape != other[n].shape or not torch.equal(one[n], other[n])}
    assert differing == {"uniter.img_embeddings.img_linear.weight"}
    # nor is what a run has trained
    again = runs[1].model_copy(update={"student": str(clip / "student")})
    continued, stored = experiments.load_student(again, prepare(again)), load_student(str(clip / "student"))
    assert all(torch.equal(p, stored.get_parameter(n)) for n, p in continued.named_parameters())


def test_a_control_of_the_teacher_leaves_what_the_student_sees(settings):
    """With CLIP's patches as regions, a teacher of random weights must not blind the student."""
    seen = []
    for arm in ("clip_td", "random_teacher"):
        config = apply_arm(settings("uniter", arm=arm, regions="clip"))
        prepared = prepare(config)
        seen.append(
            (prepared.encoder.visual(prepared.evaluated["val"][0]), prepared.cache.teacher.fingerprint)
        )
    (one, teacher), (other, random_teacher) = seen
    assert teacher != random_teacher and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("student", STUDENTS[1:])
def test_a_projection_that_is_drawn_anew_learns_as_the_head_does(settings, student, tmp_path):
    rates = {}
    for arm in ("finetune", "clip_input"):
        config = apply_arm(settings(student, arm=arm))
        prepared = prepare(config)
        module = TargetedDistillation(experiments.load_student(config, prepared), config, None)
        trainer = make_trainer(module, config, EncodedExamples(prepared.train, prepared.encoder), tmp_path)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        rates[arm] = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    faster = {name for name, rate in rates["clip_input"].items() if rate != rates["finetune"][name]}
    projection = {
        "uniter": "uniter.img_embeddings.img_linear", "visual_bert": "embeddings.visual_projection",
        "vl-bert": "image_feature_extractor.obj_downsample.1",
    }  # fmt: skip
    assert {name.rpartition(".")[2] for name in faster} == {"weight", "bias"}
    assert all(name.rpartition(".")[0].endswith(projection[student]) for name in faster)
    assert {rates["clip_input"][name] for name in faster} == {1e-3}


@pytest.mark.parametrize("arm", ["clip_td", "truth_only", "extra_only"])
def test_a_score_that_is_no_number_shows_in_every_term_that_reads_the_selection(settings, arm):
    _, module, _, batch = batch_of(apply_arm(settings(arm=arm)))
    module.eval()
    assert torch.isfinite(module(batch)["loss"])
    batch["scores"][0, 0, batch["valid"][0, 0].nonzero()[0]] = float("nan")
    assert not torch.isfinite(module(batch)["loss"])


def test_a_map_without_any_target_stays_as_it_was_drawn(settings):
    _, module, _, batch = batch_of(apply_arm(settings()))
    before = module.phi["text"].weight.clone()
    batch["valid"] = batch["valid"] & ~Tokens(batch["target_spans"], batch["target_boxes"]).is_text
    module.with_targets = lambda given: given
    module.fit_phi([batch])
    assert (
        torch.equal(module.phi["text"].weight, before) and torch.isfinite(module.phi["visual"].weight).all()
    )


def test_clip_itself_is_finetuned_adversarially_on_pictures(settings, tmp_path):
    config = settings(task="vcr_qa", adversarial_steps=2, adversarial_on="visual", epochs=1)
    (folder,) = compare(config, ["clip_finetune"], [0], tmp_path)
    table = pd.read_parquet(folder / "predictions.parquet")
    assert table["score"].notna().all()


@pytest.mark.parametrize("task", ["vcr_qa", "snli_ve", "vqa_v2"])
def test_clip_finetune_trains_both_towers_and_loads_again(settings, tmp_path, task):
    config = settings(task=task)
    (folder,) = compare(config, ["clip_finetune"], [0], tmp_path)
    run = apply_arm(config.model_copy(update={"arm": "clip_finetune"}))
    prepared = prepare(run)
    untrained = experiments.load_student(run, prepared)
    stored = load_student(str(folder / "student"), labels=prepared.labels)
    moved = {n for n, p in stored.named_parameters() if not torch.equal(p, untrained.get_parameter(n))}
    assert any("visual" in name for name in moved) and any("transformer" in name for name in moved)
    examples = next(iter(prepared.evaluated.values()))
    encoder = experiments.encoder_of(run, student=str(folder / "student"))
    again = predict(stored, EncodedExamples(examples, encoder, num_labels=len(prepared.labels)))
    rows = pd.read_parquet(folder / "predictions.parquet").iloc[: len(examples)]
    assert (rows["prediction"] == again.argmax(1)).all()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A teacher's cache that no other arm has filled."""
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "CACHE_ROOT", tmp_path / "cache")
        experiments.open_cache.cache_clear()
        yield
    experiments.open_cache.cache_clear()


def test_clip_input_needs_no_arm_before_it(settings, tmp_path, empty_cache):
    config = apply_arm(settings("uniter", arm="clip_input"))
    prepared = prepare(config, whole_splits=False)
    metrics = train_run(config, prepared, tmp_path / "run")
    assert 0 <= metrics["accuracy"]["val"] <= 1


def test_arms_without_a_teacher_open_no_cache(settings, tmp_path, empty_cache):
    compare(settings("uniter", "vqa_v2"), ["finetune", "label_smoothing"], [0], tmp_path / "without")
    common = settings("uniter", "vqa_v2", arm="finetune")
    config = apply_arm(common)
    prepared = prepare(config, whole_splits=False)
    train_run(config, prepared, tmp_path / "alone")
    assert not experiments.open_cache.cache_info().currsize
    example = prepared.evaluated["val2014"][0]
    (record,) = preview_targets(config, prepared, [example])  # what a teacher would have targeted
    assert record.example_id == example.id and record.weight.sum() > 0
    compare(common, ["finetune", "clip_td"], [0], tmp_path / "both")  # the first one prepares for both


def test_clip_input_needs_a_student_that_reads_regions(settings, tmp_path):
    with pytest.raises(ConfigError, match="regions"):
        compare(settings("vilt"), ["clip_input"], [0], tmp_path)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("on", ["text", "visual", "both"])
def test_adversarial_steps_climb_and_leave_no_hook_behind(settings, student, on):
    config = settings(student, adversarial_steps=3, adversarial_rate=0.5, adversarial_on=on)
    _, module, _, batch = batch_of(config)
    with torch.no_grad():
        for parameter in module.student.eval().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    module.training = True  # the option is on in training; the student's dropout stays off
    before = module.student(**student_inputs(module.student, batch)).logits
    output = module(batch)
    assert torch.equal(output["logits"], before)
    assert torch.equal(module.student(**student_inputs(module.student, batch)).logits, before)
    # mean over the steps of (task + w * divergence); the first is at the input itself
    assert output["adversarial"] > output["task"] * 1.0001
    output["loss"].backward()
    assert all(p.grad is not None for p in module.student.classifier.parameters())


def test_moved_words_move_the_embeddings_of_words_only(settings):
    _, module, _, batch = batch_of(settings("uniter"))
    student, seen = module.student.eval(), []
    hook = student.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2]))
    inputs = student_inputs(student, batch)
    delta = torch.randn(*batch["input_ids"].flatten(0, 1).shape, 32)
    student(**inputs)
    with moved_words(student, delta):
        hook.remove()
        hook = student.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2]))
        student(**inputs)
    hook.remove()
    assert torch.allclose(seen[1], seen[0] + delta)


def test_symmetric_divergence_is_the_sum_of_both():
    a, b = torch.randn(2, 6, 4)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)
    assert torch.allclose(symmetric_divergence(a, b), expected, atol=1e-5)
    assert torch.equal(symmetric_divergence(a, a), torch.zeros(6))


def test_learned_weights_of_terms_are_trained_and_dropped(settings, tmp_path):
    config = settings(distill_schedule="learned", epochs=3, head_learning_rate=0.05)
    _, module, dataset, _ = batch_of(config)
    trainer = make_trainer(module, config, dataset, tmp_path / "trainer")
    trainer.train()
    assert {name: value != 0 for name, value in module.log_variance.items()} == dict.fromkeys(
        ("task", "choice", "distill"), True
    )
    assert not any("variance" in name for name in module.student.state_dict())


def test_the_weight_of_re_pairing_can_be_learned_alone(settings, tmp_path):
    config = settings(arm="repair_only", repair_schedule="learned", epochs=2, head_learning_rate=0.05)
    (folder,) = compare(config, ["repair_only"], [0], tmp_path)
    (plain,) = compare(
        config.model_copy(update={"repair_schedule": "constant"}), ["repair_only"], [0], tmp_path / "b"
    )
    last, other = (json.loads((f / "history.jsonl").read_text().splitlines()[-1]) for f in (folder, plain))
    assert last["loss"] != pytest.approx(last["task"] + 3 * last["repair"], rel=1e-3)
    assert other["loss"] == pytest.approx(other["task"] + 3 * other["repair"], rel=1e-3)


@pytest.mark.parametrize("arm", ["naive_global", "repair_only", "truth_only"])
def test_arms_without_maps_of_tokens_need_no_relevance_of_the_student(settings, tmp_path, arm):
    """Their runs end and are recorded; where a term reads tokens by it they are refused before training."""
    config = settings(relevance="entropy")
    if arm == "truth_only":
        with pytest.raises(ConfigError, match=r"relevance='entropy'.*distill_weight=0"):
            compare(config, [arm], [0], tmp_path)
    else:
        (folder,) = compare(config, [arm], [0], tmp_path)
        records = read_records(folder / "selections.parquet")
        assert records and all((record.relevance == 0).all() for record in records)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [2, 2, 2]), ("linear", [2, 1, 0.5]), ("hold", [2, 2, 1])]
)
def test_the_schedule_weighs_the_distillation_term(settings, schedule, expected):
    _, module, _, batch = batch_of(settings(distill_schedule=schedule, distill_weight=2.0, choice_weight=0.0))
    for progress, weight in zip([0.0, 0.5, 0.75], expected, strict=True):
        module.progress = progress
        output = module(batch)
        assert torch.isclose(output["loss"], output["task"] + weight * output["distill"])


def test_training_follows_the_schedule(settings, tmp_path, monkeypatch):
    config = settings(distill_schedule="linear", epochs=2)
    _, module, dataset, _ = batch_of(config, 16)
    seen = []

    def noted(config, progress):
        seen.append(progress)
        return term_weights(config, progress)

    monkeypatch.setattr(objective, "term_weights", noted)
    make_trainer(module, config, dataset, tmp_path / "trainer").train()
    assert seen == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("relevance", ["entropy", "disagreement"])
def test_relevance_of_the_student_changes_while_it_learns(settings, tmp_path, relevance):
    config = settings(relevance=relevance)
    _, module, _, batch = batch_of(config)
    module.eval()
    hidden = module.student(**student_inputs(module.student, batch), output_hidden_states=True).hidden_states[
        config.distill_layer
    ]
    before, scores = module.scores(batch, hidden)
    assert before[batch["valid"]].std() > 0 and torch.allclose(
        scores.sum(-1), torch.full(scores.shape[:-1], 2.0), atol=1e-4
    )
    with torch.no_grad():
        module.phi["text"].weight.normal_()
    assert not torch.equal(module.scores(batch, hidden)[0], before)
    train_run(config, prepare(config), tmp_path / "run")  # and the recorded selections hold it
    assert (tmp_path / "run" / "selections.parquet").is_file()


def test_shuffled_teacher_sees_other_pictures_and_random_teacher_is_another(settings):
    config = settings()
    prepared = prepare(config)
    shown = experiments.shuffled_pictures(prepared.train[:12], 0)
    assert all(shown[e.id, e.image] != e.image for e in prepared.train[:12])
    assert {e.image for e in prepared.train[:12]} == set(shown.values())
    with pytest.raises(ConfigError, match="one picture alone"):
        experiments.shuffled_pictures(prepared.train[:1], 0)
    drawn = prepare(settings(teacher_control="random_weights"))
    assert drawn.cache.teacher.fingerprint != prepared.cache.teacher.fingerprint


def test_diagnostics_record_gradients_and_change_nothing(settings, tmp_path):
    folders = []
    for every in (0, 2):
        config = settings("uniter", selector="sample", diagnostics_every=every)
        train_run(config, prepare(config), tmp_path / str(every))
        folders.append(tmp_path / str(every))
    plain, watched = (f / "student" / "model.safetensors" for f in folders)
    assert plain.read_bytes() == watched.read_bytes()
    assert not (folders[0] / "diagnostics.jsonl").exists()
    rows = [json.loads(line) for line in (folders[1] / "diagnostics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(0, 2 * len(rows), 2))
    for row in rows:
        assert row["task_gradient"] > 0 and row["distill_gradient"] > 0 and row["choice_gradient"] > 0
        assert -1 <= row["task_distill_cosine"] <= 1 and 0 <= row["teacher_agreement"] <= 1
        assert row["instance_weight_quartiles"] == sorted(row["instance_weight_quartiles"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_before_the_update(settings, tmp_path, where, monkeypatch):
    config = settings(epochs=1)
    _, module, dataset, _ = batch_of(config, 16)
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    if where == "loss":
        monkeypatch.setattr(
            "tdlib.training.objective.choice_distribution_loss", lambda *args: torch.tensor(float("inf"))
        )
        message = "choice not finite"
    else:
        module.student.classifier.weight.register_hook(lambda grad: grad * float("nan"))
        message = "gradient not finite"
    with pytest.raises(FloatingPointError, match=message) as error:
        make_trainer(module, config, dataset, tmp_path / "trainer").train()
    named = re.search("examples (.*); lower", str(error.value)).group(1).split(", ")
    assert len(named) == config.batch_size and set(named) <= {e.id for e in dataset.examples}
    assert all(torch.equal(value, before[name]) for name, value in module.student.state_dict().items())


def test_a_users_selector_is_used_by_name_and_kept_with_the_run(settings, tmp_path, monkeypatch):
    calls = []

    def every_other(scores, valid, options=None, generator=None):
        calls.append(1)
        keep = torch.arange(scores.shape[-1]) % 2 == 0
        return valid & keep

    monkeypatch.setitem(SELECTORS, "every_other", every_other)
    config = settings(selector="every_other")
    train_run(config, prepare(config), tmp_path / "run")
    assert calls
    kept = json.loads((tmp_path / "run" / "functions.json").read_text())
    assert kept["selector"]["name"] == "every_other" and "torch.arange" in kept["selector"]["source"]
    assert list(kept) == ["selector"]


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"is a bert; expected one of vilt, uniter"):
        architecture(str(tmp_path))
