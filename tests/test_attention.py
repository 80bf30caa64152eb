"""Attention and gradient relevance of students and teacher, against the stock models and the formulas."""

import math

import numpy as np
import pytest
import torch
from html_page import problems
from records import SIZE, SPANS, drawn_record
from training_helpers import dataset_of
from transformers import VisualBertConfig

from tdlib.core.records import TargetRecord
from tdlib.students import attention as student_attentions
from tdlib.students.base import FusedAttention
from tdlib.students.clip import open_teacher_as_student
from tdlib.students.registry import load_student
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.students.visual_bert import VisualBertForClassification
from tdlib.students.vlbert import VlBertConfig, VlBertForClassification, VlBertForMultipleChoice
from tdlib.teacher import attention as teacher_attentions
from tdlib.teacher.attention import AttentionError
from tdlib.training.data import collate
from tdlib.training.objective import TargetedDistillation
from tdlib.training.recording import ProbeRecorder
from tdlib.views import attention as attention_views
from tdlib.views import compare


@pytest.fixture(scope="module")
def base(base):
    return base.model_copy(update={"eval_splits": ["val"], "shift": "", "probe_examples": 3})


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
    return drawn_record(
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
        attention_views.relevance_view(found.record, relevance, "gradient, layers 0 to 1").to_html()
    )


@pytest.fixture(scope="module")
def vilt(base, prepared):
    student = load_student(base.student, seed=0).eval()
    example = prepared.evaluated["val"][0]
    data = dataset_of(prepared, base, [example])
    module = TargetedDistillation(student, base, prepared.cache.teacher.dim)
    record = ProbeRecorder(data, module).record()[1]
    return student, collate([data[0]], prepared.encoder), record, prepared.encoder


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
    with pytest.raises(AttentionError, match=r"heads 0 to \d+, but head=99"):
        attention_views.attention_view(found, head=99)
    with pytest.raises(AttentionError, match="layers 0 to 1"):
        student_attentions.student_attention(student, batch, record, layers=[2])
    with pytest.raises(AttentionError, match="record's encoder"):
        student_attentions.student_attention(student, batch, drawn_record(record.image))


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
    one = teacher_attentions.teacher_attention(teacher, record, "image", layers=[1])
    with pytest.raises(AttentionError, match="every layer from 0"):
        attention_views.rollout_view(one)


def test_a_student_without_such_attention_is_refused(teacher_folder, vilt):
    _, batch, record, _ = vilt
    student = open_teacher_as_student(f"local-dir:{teacher_folder}")
    with pytest.raises(AttentionError, match="teacher_attention"):
        student_attentions.student_attention(student, batch, record)


def test_values_must_be_one_per_token(image):
    record = drawn_record(image)
    for values in (np.zeros(3), np.full(SIZE, math.nan)):
        with pytest.raises(ValueError, match=f"{SIZE} tokens"):
            compare.values_view(record, values, "m", "")
    assert attention_views.name_layers([1, 3]) == "layers 1, 3"
    assert attention_views.name_layers([2]) == "layer 2"
