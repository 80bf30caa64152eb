"""Records over training and views of several runs: what is drawn is what the records say, and is safe."""

import math
import re
from dataclasses import fields, replace
from html import unescape
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from test_views import EVIL, PATCHES, SPANS, TEXT, Page
from transformers import TrainerCallback, VisualBertConfig

from tdlib.analysis.masking import Curves
from tdlib.config import RunConfig
from tdlib.core.records import END, TargetRecord, read_records, records_table, write_records
from tdlib.data.examples import low_shot
from tdlib.students import attention as student_attentions
from tdlib.students.base import FusedAttention
from tdlib.students.clip import open_teacher_as_student
from tdlib.students.registry import load_student
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.visual_bert import VisualBertForClassification
from tdlib.students.vlbert import VlBertConfig, VlBertForClassification, VlBertForMultipleChoice
from tdlib.teacher import attention as teacher_attentions
from tdlib.teacher.attention import AttentionError
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.objective import TargetedDistillation
from tdlib.training.pipeline import TargetBuilder
from tdlib.training.prepare import prepare
from tdlib.training.recording import ProbeRecorder, preview_targets
from tdlib.training.trainer import make_trainer
from tdlib.views import alignment, compare, measures, training
from tdlib.views import attention as attention_views
from tdlib.views.view import View

SIZE = 1 + len(SPANS) + len(PATCHES)
STEPS = (0, 10, 20, END)


def make_record(image, seed: int = 0, **changes) -> TargetRecord:
    """[CLS], 11 text tokens, 9 patches; a selection drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    score = rng.random(SIZE)
    selected = (rng.random(SIZE) < 0.4) & (np.arange(SIZE) > 0)
    selected[4] = True
    weight = np.where(selected, score, 0) / score[selected].sum()
    record = TargetRecord(
        example_id="val-3", choice=1, label=1, prediction=0, text=TEXT, references=(), image=image,
        object_boxes=(), object_names=(), tokens=("", *(TEXT[a:b] for a, b in SPANS), *[""] * 9),
        spans=np.array([(0, 0), *SPANS, *[(0, 0)] * 9]),
        boxes=np.array([(0.0, 0.0, 0.0, 0.0)] * 12 + PATCHES),
        distilled=np.arange(SIZE) > 0, relevance=score, prior=score, score=score, selected=selected,
        weight=weight, teacher_probability=0.7, student_probability=float(rng.random()),
        instance_weight=float(rng.random()), relevant_spans=((13, 18),),
        relevant_boxes=((0.0, 0.0, 0.3, 0.3),), split="val",
    )  # fmt: skip
    return replace(record, **changes)


@pytest.fixture
def history(image) -> list[TargetRecord]:
    """Two statements of two examples at four steps, the end first in the file."""
    return [
        make_record(image, seed=10 * place + example, step=step, example_id=f"val-{example}")
        for place, step in enumerate((END, 0, 10, 20))
        for example in (3, 4)
    ]


def problems(html: str) -> list[str]:
    """What JupyterLab would drop of a page, or could be an injection."""
    return Page(html).problems


# Records


def test_a_file_of_an_older_run_is_still_read(image, tmp_path):
    records = [make_record(image), make_record(image, seed=1)]
    table = records_table(records)
    assert list(table)[: len(fields(TargetRecord)) - 1] == [f.name for f in fields(TargetRecord)][:-1]
    table.drop(columns="step").to_parquet(tmp_path / "old.parquet", index=False)
    read = read_records(tmp_path / "old.parquet")
    assert [record.step for record in read] == [END, END]
    np.testing.assert_array_equal(read[1].weight, records[1].weight)


def test_steps_survive_the_file_and_can_be_chosen(history, tmp_path):
    path = tmp_path / "selections.parquet"
    write_records(history, path)
    read = read_records(path)
    assert [record.step for record in read] == [record.step for record in history]
    for own, other in zip(history, read, strict=True):
        for field in fields(own):
            a, b = getattr(own, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else None
            assert isinstance(a, np.ndarray) or a == b, field.name
    assert {record.step for record in read_records(path, steps=[0, END])} == {0, END}
    assert read_records(path, steps=[7]) == []
    records_table(history).drop(columns="step").to_parquet(path)
    assert len(read_records(path, steps=[END])) == len(history) and not read_records(path, steps=[0])


def test_one_example_is_read_without_decoding_the_others(image, tmp_path, monkeypatch):
    """Small row groups with narrow ranges of ids, so that most are left out; the same records either way."""
    monkeypatch.setattr("tdlib.core.records.EXAMPLES_PER_GROUP", 4)
    many = [
        make_record(image, seed=seed, example_id=f"val-{seed}", step=step, choice=choice, split=split)
        for step in (0, END)
        for split in ("val", "shifted")
        for seed in range(9)
        for choice in range(3)
    ]
    path = tmp_path / "selections.parquet"
    write_records(many, path)
    whole = read_records(path)
    for asked in ([("val", "val-0")], [("val", "val-4"), ("shifted", "val-7")]):
        found = read_records(path, examples=asked)
        own = [record for record in whole if (record.split, record.example_id) in asked]
        assert len(found) == len(own) == 6 * len(asked)
        for a, b in zip(found, own, strict=True):
            assert (a.split, a.example_id, a.choice, a.step) == (b.split, b.example_id, b.choice, b.step)
            np.testing.assert_array_equal(a.weight, b.weight)
    file = pq.read_metadata(path)
    names = [file.schema.column(i).name for i in range(file.num_columns)]
    ranges = [file.row_group(i).column(names.index("example_id")).statistics for i in range(5)]
    assert file.num_row_groups == 5
    assert [(r.min, r.max) for r in ranges] == [
        ("val-0", "val-3"), ("val-4", "val-7"), ("val-0", "val-8"), ("val-3", "val-6"), ("val-7", "val-8")
    ]  # fmt: skip
    assert [r.step for r in read_records(path, steps=[0], examples=[("val", "val-8")])] == [0] * 3
    assert read_records(path, examples=[("val", "val-99")]) == []


def test_further_steps_cost_little(image, tmp_path):
    one = [make_record(image, seed=seed, example_id=f"val-{seed}") for seed in range(20)]
    many = [replace(record, step=step) for step in range(10) for record in one]
    sizes = []
    for part in (one, many):
        write_records(part, tmp_path / "x.parquet")
        sizes.append((tmp_path / "x.parquet").stat().st_size)
    assert sizes[1] < 1.3 * sizes[0]
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 200


@pytest.fixture(scope="module")
def base(world, student_folder, teacher_folder, own_cache):
    return RunConfig.from_parameters(
        data_dir=str(world), student=str(student_folder), teacher=f"local-dir:{teacher_folder}",
        shots=0.2, epochs=1, batch_size=4, eval_splits=["val"], shift="", probe_examples=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def materials(base):
    return prepare(base, whole_splits=False)


def setting(materials, config, folder, every: int = 0):
    """A trainer and its recorder, called before the first and after every ``every`` updates."""
    builder = TargetBuilder(materials.builder.cache, materials.builder.idf, config)
    subset = low_shot(materials.train, config.shots, config.seed)
    module = TargetedDistillation(
        load_student(config.student, seed=config.seed), config, materials.builder.cache.teacher.dim
    )
    trainer = make_trainer(module, config, EncodedExamples(subset, materials.encoder, builder), folder)
    probes = EncodedExamples(materials.evaluated["val"][:3], materials.encoder, builder)
    recorder = ProbeRecorder(probes, module, split="val", batch_size=2)

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            recorder.record(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0:
                recorder.record(state.global_step)

    if every:
        trainer.add_callback(Record())
    return trainer, recorder


@pytest.mark.parametrize(
    "changes", [{}, {"relevance": "disagreement", "selector": "sample"}], ids=["value", "disagreement"]
)
def test_recording_changes_nothing(base, materials, tmp_path, changes):
    config = RunConfig.from_parameters(**{**base.model_dump(), **changes})
    plain, _ = setting(materials, config, tmp_path / "a")
    plain.train()
    watched, recorder = setting(materials, config, tmp_path / "b", every=1)
    watched.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert watched.model.training == plain.model.training
    steps = list(dict.fromkeys(record.step for record in recorder.records))
    assert steps == [*range(watched.state.global_step + 1)]
    assert len(recorder.records) == len(steps) * 3 * 4
    moved = [record.student_probability for record in recorder.records[:: 3 * 4]]
    assert len(set(moved)) > 1
    if changes:
        first, last = recorder.records[0], recorder.records[-12]
        assert np.abs(first.relevance - last.relevance).max() > 1e-3, "relevance follows the student"


@pytest.mark.parametrize("relevance", ["value", "disagreement"])
def test_a_preview_records_what_the_recorder_does_before_training(base, materials, tmp_path, relevance):
    config = RunConfig.from_parameters(**{**base.model_dump(), "relevance": relevance})
    _, recorder = setting(materials, config, tmp_path)
    found = recorder.record(5)
    assert found == recorder.records and all(record.step == 5 for record in found)
    expected = preview_targets(config, materials, recorder.probes.examples)
    assert len(found) == len(expected) == 12
    for own, other in zip(found, expected, strict=True):
        for field in fields(own):
            a, b = getattr(own, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype.kind == b.dtype.kind
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            elif isinstance(a, float):
                assert a == pytest.approx(b, abs=1e-5)
            elif field.name not in ("step", "split"):
                assert a == b, field.name


# Two runs


def test_the_difference_of_a_run_with_itself_is_zero(image):
    record = make_record(image)
    view = compare.difference_view(record, replace(record, step=3))
    data = view.table()
    assert not data["difference"].any() and set(data["change"]) == {"both", ""}
    assert "0 gained, 0 lost; 0.0 % of the weight moved" in repr(view)


def test_a_difference_is_second_minus_first_and_turns_its_sign(image):
    a, b = make_record(image), make_record(image, seed=1)
    data = compare.difference_view(a, b).table()
    np.testing.assert_allclose(data["difference"], b.weight - a.weight)
    np.testing.assert_array_equal(data["change"] == "gained", b.selected & ~a.selected)
    np.testing.assert_array_equal(data["change"] == "lost", a.selected & ~b.selected)
    turned = compare.difference_view(b, a).table()
    np.testing.assert_allclose(turned["difference"], -data["difference"])
    html = compare.difference_view(a, b, names=("naive", "clip_td")).to_html()
    for row in data[(data["kind"] == "text") & (data["change"] != "")].itertuples():
        sign = "+" if row.difference > 0 else "−"
        assert f"{sign}{100 * abs(row.difference):.1f}" in html
    assert "clip_td − naive" in html


def test_what_cannot_be_compared_is_refused(image):
    record = make_record(image)
    with pytest.raises(ValueError, match="different statements"):
        compare.difference_view(record, replace(record, choice=2))
    with pytest.raises(ValueError, match="different tokens"):
        compare.difference_view(record, replace(record, boxes=record.boxes * 0.9))
    with pytest.raises(ValueError, match="1 names"):
        compare.difference_view(record, record, names=("a",))


# Training


@given(arrays(bool, 6), arrays(bool, 6))
def test_turnover_is_a_distance_in_the_unit_interval(a, b):
    found = training.turnover(a, b)
    assert 0 <= found <= 1 and found == training.turnover(b, a)
    assert (found == 0) == np.array_equal(a, b)
    if (a | b).any():
        assert found == pytest.approx(1 - len({*np.flatnonzero(a)} & {*np.flatnonzero(b)})
                                      / len({*np.flatnonzero(a)} | {*np.flatnonzero(b)}))  # fmt: skip


def test_the_heat_map_is_the_records(history):
    own = training.of_statement(history, "val-3")
    assert [record.step for record in own] == list(STEPS)
    data = training.evolution_view(own).table()
    assert len(data) == len(STEPS) * SIZE
    for order, record in enumerate(own):
        part = data[data["order"] == order]
        assert set(part["step"]) == {record.step}
        np.testing.assert_array_equal(part["weight"], record.weight)
        np.testing.assert_array_equal(part["selected"], record.selected)
    figure = training.evolution_view(own).figure()
    images = [image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    words = next(image for image in images if image.get_array().shape == (len(SPANS), len(STEPS)))
    drawn = words.get_array()
    for column, record in enumerate(own):
        chosen = record.selected[1:12]
        np.testing.assert_array_equal(~np.ma.getmaskarray(drawn)[:, column], chosen)
        np.testing.assert_allclose(drawn[chosen, column], 100 * record.weight[1:12][chosen])
    numbers = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {f"{100 * w:.1f}" for r in own for w in r.weight[1:12][r.selected[1:12]]} <= numbers
    highlights = [replace(record, truth="e-SNLI highlights") for record in own]
    below = [axes.get_xlabel() for axes in training.evolution_view(highlights).figure().axes]
    assert "training step (updates); * decides the answer (e-SNLI highlights)" in below


def test_turnover_compares_each_step_with_the_one_before(history):
    data = training.turnover_table(history).set_index(["example_id", "step"])
    for example in ("val-3", "val-4"):
        own = training.of_statement(history, example)
        assert math.isnan(data.loc[(example, 0), "turnover"])
        for before, after in pairwise(own):
            row = data.loc[(example, after.step)]
            assert row["turnover"] == training.turnover(before.selected, after.selected)
            text = training.turnover(before.selected[:12], after.selected[:12])
            assert row["turnover_text"] == text and row["selected_text"] == after.selected[:12].sum()
            assert row["selected_visual"] == after.selected[12:].sum()
            assert row["p_S"] == after.student_probability and row["c"] == after.instance_weight


def test_records_of_two_runs_are_not_one_evolution(history, image):
    for view in (training.evolution_view, training.turnover_table):
        with pytest.raises(ValueError, match="two records of"):
            view([*training.of_statement(history, "val-3"), make_record(image, step=10)])
    with pytest.raises(ValueError, match="no records"):
        training.evolution_view([])
    with pytest.raises(ValueError, match="different statements"):
        training.evolution_view(history)
    with pytest.raises(ValueError, match="there are val-3, val-4"):
        training.of_statement(history, "val-9")


def test_instance_weights_are_the_records(history):
    unlabelled = replace(history[0], label=None, instance_weight=None, example_id="val-5")
    view = training.instance_view([*history, unlabelled], "val-4")
    data = view.table()
    assert len(data) == len(history)
    for record in history:
        row = data[(data["example_id"] == record.example_id) & (data["step"] == record.step)].iloc[0]
        assert (row["p_T"], row["p_S"], row["c"]) == (0.7, record.student_probability, record.instance_weight)
    assert data.groupby("step")["order"].first().to_dict() == {0: 0, 10: 1, 20: 2, END: 3}
    assert "c of val-4" in view.to_html()
    with pytest.raises(ValueError, match="no record has an instance weight"):
        training.instance_view([unlabelled])
    with pytest.raises(ValueError, match="'val-9'; there are val-3, val-4"):
        training.instance_view(history, "val-9")


# Alignment

TEACHER_SPANS = np.array(
    [(0, 3), (4, 6), (7, 9), (9, 12), (13, 18), (18, 19), (20, 23), (24, 28), (29, 31), (32, 42)]
)
TEACHER_BOXES = np.array([(c / 2, r / 2, (c + 1) / 2, (r + 1) / 2) for r in range(2) for c in range(2)])


def test_alignment_says_which_tokens_overlap(image):
    record = make_record(image)
    view = alignment.alignment_view(record, TEACHER_SPANS, TEACHER_BOXES)
    data = view.table()
    sums = data.groupby("position")["share"].sum()
    assert np.allclose(sums, 1) and set(sums.index) == {*range(1, 11), *range(12, 21)}, "'.' has no target"
    casey = data[data["token"] == "Casey"].set_index("teacher_token")["share"]
    assert casey.to_dict() == pytest.approx({"Ca": 0.4, "sey": 0.6})
    for part in ("un", "bearable"):
        assert data[data["token"] == part]["teacher_token"].tolist() == ["unbearable"]
    corner = data[data["position"] == 12]
    assert corner["teacher_position"].tolist() == [10] and set(corner["kind"]) == {"visual"}
    middle = data[data["position"] == 16]
    assert middle["share"].tolist() == pytest.approx([0.25] * 4)
    html = unescape(view.to_html())
    assert "Ca 40 %, sey 60 %" in html and "1 of the student's without a target" in html
    with pytest.raises(ValueError, match="no visual token"):
        alignment.alignment_view(record, TEACHER_SPANS, TEACHER_BOXES, token=3)


# Every view


def evil(record: TargetRecord) -> TargetRecord:
    text = f"{EVIL} $x$ {EVIL}" + " " * 10
    text = text + "." * (43 - len(text)) if len(text) < 43 else text
    spans = record.spans.copy()
    spans[1] = (0, len(EVIL))
    return replace(
        record, text=text, spans=spans, tokens=(EVIL,) * SIZE, example_id=f"{EVIL}$y$ {record.example_id}"
    )


def quality(source: str) -> pd.DataFrame:
    numbers = {"value": 0.5, "low": 0.4, "high": 0.7, "n": 8, "pictures": 4}
    rows = [
        {"modality": "text", "metric": metric, "source": name, **numbers}
        for metric in ("auc", "ap")
        for name in ("targeting", source)
    ]
    return pd.DataFrame(rows).assign(gain=[np.nan, 0.1] * 2, gain_low=-0.1, gain_high=0.3)


def test_measures_are_shown_as_they_are(image):
    view = measures.quality_view(quality("random"))
    pd.testing.assert_frame_equal(view.table(), quality("random"))
    assert "0.500 [0.400, 0.700]" in view.to_html() and "+0.100 [-0.100, +0.300]" in view.to_html()
    curve = np.array([1.0, 0.5, 0.0])
    curves = measures.curves_view(
        make_record(image), {"targeting": Curves(np.array([0, 0.5, 1]), curve, curve)}
    )
    assert curves.table()["deletion"].tolist() == [1.0, 0.5, 0.0]
    assert re.search(r"targeting +0\.5 +0\.5", repr(curves))
    with pytest.raises(ValueError, match="no rows"):
        measures.quality_view(quality("random")[:0])


def all_views(history: list[TargetRecord]) -> dict[str, View]:
    own = [record for record in history if record.example_id == history[0].example_id]
    ordered = training.in_order(own)
    record = own[0]
    maps = np.full((2, 3, SIZE, SIZE), 1 / SIZE)
    attention = teacher_attentions.Attention(maps, (0, 1), record, 0, EVIL)
    return {
        "difference": compare.difference_view(ordered[0], ordered[-1], names=(EVIL, "b")),
        "evolution": training.evolution_view(ordered),
        "instances": training.instance_view(history, record.example_id),
        "alignment": alignment.alignment_view(record, TEACHER_SPANS, TEACHER_BOXES),
        "attention": attention_views.attention_view(attention),
        "rollout": attention_views.rollout_view(attention),
        "heads": attention_views.heads_view(attention),
        "relevance": attention_views.relevance_view(record, np.arange(SIZE), EVIL),
        "quality": measures.quality_view(quality(EVIL), EVIL),
        "curves": measures.curves_view(record, {EVIL: Curves(*[np.linspace(0, 1, 5)] * 3)}),
    }


def test_every_view_is_safe_html_figure_and_table(history):
    """With markup in every string of the data."""
    for name, view in all_views([evil(record) for record in history]).items():
        html = view.to_html()
        assert not problems(html), name
        assert "<script" not in html.lower() and "&lt;script&gt;" in html
        assert isinstance(view.table(), pd.DataFrame) and len(view.table())
        assert set(view._repr_mimebundle_()) == {"text/plain", "text/html"} and EVIL in repr(view)
        if name in ("difference", "heads"):
            assert view.to_png(dpi=30).startswith(b"\x89PNG") and view.to_svg().startswith("<?xml")


def test_records_without_picture_tokens_or_selection_can_be_viewed(history):
    nothing = [
        replace(r, selected=r.selected & False, weight=r.weight * 0, relevant_boxes=(), relevant_spans=())
        for r in history
    ]
    blind = [replace(r, boxes=r.boxes * 0) for r in history]
    for records in (nothing, blind):
        own = training.of_statement(records, "val-3")
        difference = compare.difference_view(own[0], own[-1])
        assert not problems(difference.to_html()) and difference.to_png(dpi=20)
        assert not problems(training.evolution_view(own).to_html())
        aligned = alignment.alignment_view(own[0], TEACHER_SPANS, TEACHER_BOXES)
        assert not problems(aligned.to_html())


# Attention


def region_inputs(student, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (1, 2, 7), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, 0, 5:] = 0
    corners = torch.rand(1, 4, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    every = {
        "input_ids": ids * attention, "attention_mask": attention, "token_type_ids": torch.zeros_like(ids),
        "region_features": torch.randn(1, 4, 6, generator=generator), "region_boxes": corners,
        "region_mask": torch.tensor([[1, 1, 1, 0]]), "region_objects": torch.tensor([[-1, 0, 1, -1]]),
        "objects": torch.full_like(ids, -1), "spans": torch.zeros(1, 2, 7, 2, dtype=torch.long),
    }  # fmt: skip
    return {name: every[name] for name in {*student.inputs, "attention_mask"}}


def small(kind, config_kind, **settings):
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    student = kind(config_kind(**sizes | settings)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return student


STUDENTS = {
    "UNITER": lambda: small(UniterForMultipleChoice, UniterConfig, img_dim=6, type_vocab_size=4),
    "VL-BERT": lambda: small(VlBertForMultipleChoice, VlBertConfig, visual_embedding_dim=6),
    "VL-BERT, labels": lambda: small(
        VlBertForClassification, VlBertConfig, visual_embedding_dim=6, id2label={0: "a", 1: "b", 2: "c"}
    ),
    "VisualBERT, labels": lambda: small(
        VisualBertForClassification, VisualBertConfig, visual_embedding_dim=6, id2label={0: "a", 1: "b"}
    ),
}


def region_record(image, inputs) -> TargetRecord:
    length = inputs["input_ids"].shape[2]
    spans = np.zeros((length + 4, 2), dtype=int)
    spans[1:4] = SPANS[:3]
    boxes = np.concatenate([np.zeros((length, 4)), inputs["region_boxes"][0].numpy()])
    zeros = np.zeros(length + 4)
    return make_record(
        image, choice=0, label=0, spans=spans, boxes=boxes, tokens=("",) * len(zeros), relevance=zeros,
        distilled=zeros == 0, prior=zeros, score=zeros, selected=zeros > 0, weight=zeros,
    )  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS)
def test_recomputed_attention_is_eager_attention(name, image):
    student = STUDENTS[name]()
    kernel = "eager" if "VisualBERT" in name else "sdpa"  # the latter keeps no weights
    assert student.config._attn_implementation == kernel
    inputs = region_inputs(student)
    if "labels" in name:
        inputs = {k: v[:, :1] if v.shape[:2] == (1, 2) else v for k, v in inputs.items()}
    record = region_record(image, inputs)
    found = student_attentions.student_attention(student, inputs, record)
    own = {key: inputs[key] for key in student.inputs}
    with torch.inference_mode():
        logits = student(**own).logits
        assert not any("forward" in module.__dict__ for module in student.modules()), "left as it was"

    eager = STUDENTS[name]()
    eager.set_attn_implementation("eager")
    for module in eager.modules():
        if isinstance(module, FusedAttention):  # computes no weights; the stock module does
            module.__class__ = type(module).__mro__[2]
    maps = []
    for module in student_attentions.attention_modules(eager):
        if kernel == "eager":  # returns weights only where asked to, and adds its mask to the scores
            module.register_forward_pre_hook(
                lambda _m, args: (args[0], torch.where(args[1], 0.0, -torch.inf), True)
            )
        module.register_forward_hook(lambda _m, _a, output: maps.append(output[1]))
    with torch.inference_mode():
        torch.testing.assert_close(eager(**own).logits, logits, rtol=1e-4, atol=1e-5)
    expected = torch.stack([part[0] for part in maps]).numpy()
    np.testing.assert_allclose(found.maps, expected, atol=1e-5)
    np.testing.assert_allclose(found.maps.sum(-1), 1, atol=1e-5)
    assert not found.maps[..., 5:7].any() and not found.maps[..., 10].any(), "padding gets nothing"
    last = student_attentions.student_attention(student, inputs, record, layers=[-1])
    assert last.layers == (1,) and last.maps.shape[0] == 1
    np.testing.assert_allclose(last.maps[0], found.maps[1], atol=1e-6)
    assert found.readout == (3 if "labels" in name else 0)
    assert found.record.tokens[-1] == ("[END]" if "VL-BERT" in name else "")

    relevance = student_attentions.gradient_relevance(student, inputs, record)
    assert relevance.shape == (found.maps.shape[-1],) and relevance.max() == pytest.approx(1)
    assert relevance.min() >= 0 and not relevance[5:7].any()
    assert not problems(
        attention_views.relevance_view(record, relevance, "gradient, layers 0 to 1").to_html()
    )


@pytest.fixture(scope="module")
def vilt(base, materials):
    student = load_student(base.student, seed=0).eval()
    example = materials.evaluated["val"][0]
    data = EncodedExamples([example], materials.encoder, materials.builder)
    module = TargetedDistillation(student, base, materials.builder.cache.teacher.dim)
    record = ProbeRecorder(data, module).record()[1]
    return student, collate([data[0]], materials.encoder), record, materials.encoder


def test_attention_of_vilt_is_the_stock_models(vilt):
    student, batch, record, encoder = vilt
    found = student_attentions.student_attention(student, batch, record, tokenizer=encoder.tokenizer)
    stock: list[torch.Tensor] = []
    forward = student.vilt.forward

    def with_attentions(**options):
        output = forward(**options, output_attentions=True)
        stock.extend(output.attentions)
        return output

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(student.vilt, "forward", with_attentions)
        student(**{name: batch[name] for name in student.inputs})
    np.testing.assert_allclose(found.maps, torch.stack([part[1] for part in stock]).numpy(), atol=1e-6)
    names = found.record.tokens
    assert names[0] == "[CLS]" and "[SEP]" in names and names[batch["input_ids"].shape[2]] == "[IMG]"
    view = attention_views.attention_view(found, head=1)
    np.testing.assert_allclose(view.table()["value"], found.maps[:, 1, 0].mean(0), atol=1e-7)
    assert "layers 0 to 1, head 1; query [CLS]" in repr(view)
    heads = attention_views.heads_view(found).table()
    texts = found.record.is_text
    share = found.maps[1, 0][texts][:, found.record.is_visual].sum(1).mean()
    assert heads.iloc[2]["text_to_picture"] == pytest.approx(share, abs=1e-6)
    with pytest.raises(AttentionError, match="layers 0 to 1"):
        student_attentions.student_attention(student, batch, record, layers=[2])
    with pytest.raises(AttentionError, match="record's encoder"):
        student_attentions.student_attention(student, batch, make_record(record.image))


def test_rollout_is_the_product_of_the_layers():
    maps = np.random.default_rng(0).dirichlet(np.ones(5), size=(3, 2, 5))
    product = np.eye(5)
    for layer in maps.mean(1):
        product = (layer + np.eye(5)) / 2 @ product
    for query in range(5):
        found = teacher_attentions.rollout(maps, query)
        np.testing.assert_allclose(found, product[query])
        assert found.sum() == pytest.approx(1)


def test_gradient_relevance_is_the_published_product(vilt):
    """One forward by hand: R = I; R += mean_heads((gradient * A)+) R."""
    student, batch, record, _ = vilt
    found = student_attentions.gradient_relevance(student, batch, record)
    modules = student_attentions.attention_modules(student)
    with student_attentions._explicit(modules) as maps:
        logits = student(**{name: batch[name] for name in student.inputs}).logits
    gradients = torch.autograd.grad(logits[0, record.choice], maps)
    relevancy = torch.eye(maps[0].shape[-1])
    for attention, gradient in zip(maps, gradients, strict=True):
        relevancy = relevancy + (gradient * attention)[record.choice].clamp_min(0).mean(0) @ relevancy
    row = relevancy[0].detach().clone()
    row[0] -= 1
    np.testing.assert_allclose(found, (row / row.max()).numpy(), atol=1e-5)
    frozen = load_student(student.name_or_path).requires_grad_(False)
    with pytest.raises(AttentionError, match="requires_grad_"):
        student_attentions.gradient_relevance(frozen, batch, record)


def test_attention_of_the_teacher(teacher, vilt):
    _, _, record, _ = vilt
    image = teacher_attentions.teacher_attention(teacher, record, "image")
    text = teacher_attentions.teacher_attention(teacher, record, "text")
    for found in (image, text):
        np.testing.assert_allclose(found.maps.sum(-1), 1, atol=1e-5)
        assert found.maps.shape[0] == 2 and len(found.record.tokens) == found.maps.shape[-1]
        assert not problems(attention_views.attention_view(found).to_html())
        assert not problems(attention_views.heads_view(found).to_html())
    assert not np.triu(text.maps[0, 0], 1).any(), "the text tower is causal"
    assert text.readout == len(text.record.tokens) - 1 and image.readout == 0

    cached = teacher.encode_texts([record.text], extras=["attention", "rollout"])[0]
    real = text.record.is_text
    last = text.maps[-1].mean(0)[text.readout][real]
    np.testing.assert_allclose(last / last.max(), cached.attention.numpy(), atol=1e-5)
    rolled = teacher_attentions.rollout(text.maps, text.readout)[real]
    np.testing.assert_allclose(rolled / rolled.max(), cached.rollout.numpy(), atol=1e-5)

    values, placed = teacher_attentions.teacher_relevance(teacher, record)
    assert values.max() == pytest.approx(1) and values.min() >= 0 and len(values) == len(placed.tokens)
    assert not problems(attention_views.relevance_view(placed, values, "gradient").to_html())
    with pytest.raises(AttentionError, match="'text' or 'image'"):
        teacher_attentions.teacher_attention(teacher, record, "both")
    one = teacher_attentions.teacher_attention(teacher, record, "image", layers=[1])
    with pytest.raises(AttentionError, match="every layer from 0"):
        attention_views.rollout_view(one)


def test_a_student_without_such_attention_is_refused(teacher_folder, vilt):
    _, batch, record, _ = vilt
    student = open_teacher_as_student(f"local-dir:{teacher_folder}")
    with pytest.raises(AttentionError, match="teacher_attention"):
        student_attentions.student_attention(student, batch, record)


def test_values_must_be_one_per_token(image):
    record = make_record(image)
    for values in (np.zeros(3), np.full(SIZE, math.nan)):
        with pytest.raises(ValueError, match=f"{SIZE} tokens"):
            compare.values_view(record, values, "m", "")
    assert attention_views.name_layers([1, 3]) == "layers 1, 3"
    assert attention_views.name_layers([2]) == "layer 2"
