"""Targeting measured: rankings against brute force, exact chance, overlap of areas, masking."""

import math
from dataclasses import replace
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.analysis import masking, targeting
from tdlib.analysis.statistics import bootstrap_interval
from tdlib.core.facts import ground_truth, relevant_tokens
from tdlib.core.records import TargetRecord, read_records, write_records
from tdlib.data.examples import TextPart
from tdlib.data.vcr import VcrReader
from tdlib.method.priors import Idf
from tdlib.students.registry import load_student
from tdlib.students.uniter import UniterConfig, UniterForClassification
from tdlib.students.vilt import ViltEncoder
from tdlib.training.data import EncodedExamples, collate
from tdlib.training.evaluation import predict
from tdlib.views.measures import quality_view

TEXT = "Why is Casey extraordinarily angry?"
SPANS = [(0, 3), (4, 6), (7, 12), (13, 28), (29, 34), (34, 35)]
PATCHES = [(c / 2, r / 2, (c + 1) / 2, (r + 1) / 2) for r in range(2) for c in range(2)]
SIZE = 2 + len(SPANS) + len(PATCHES)


def make_record(**changes) -> TargetRecord:
    """[CLS], six text tokens, [SEP], four patches; decisive: "angry" and the first patch."""
    spans = np.array([(0, 0), *SPANS, (0, 0), *[(0, 0)] * 4])
    score = np.zeros(SIZE)
    score[1:7] = (0.05, 0.05, 0.2, 0.1, 0.5, 0.1)
    score[8:] = (0.1, 0.4, 0.3, 0.2)
    selected = np.isin(np.arange(SIZE), (3, 5, 9, 10))
    record = TargetRecord(
        example_id="val-0", choice=0, label=0, prediction=0, text=TEXT, references=(),
        image=Path("one.png"), object_boxes=(), object_names=(),
        tokens=("", *(TEXT[a:b] for a, b in SPANS), "", *[""] * 4), spans=spans,
        boxes=np.array([(0.0, 0.0, 0.0, 0.0)] * 8 + PATCHES),
        distilled=~np.isin(np.arange(SIZE), (0, 7)), relevance=score, prior=np.linspace(0, 1, SIZE),
        score=score, selected=selected, weight=np.where(selected, score, 0) / score[selected].sum(),
        teacher_probability=0.5, student_probability=0.5, instance_weight=0.5,
        relevant_spans=((29, 34),), relevant_boxes=((0.0, 0.0, 0.5, 0.5),),
    )  # fmt: skip
    return replace(record, **changes)


# Rankings

rankings = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=7)


@given(rankings)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    scores, positive = (np.array(column) for column in zip(*pairs, strict=True))
    good, bad = scores[positive], scores[~positive]
    found = targeting.roc_auc(scores, positive)
    if not len(good) or not len(bad):
        assert math.isnan(found)
    else:
        won = [(a > b) + (a == b) / 2 for a, b in product(good, bad)]
        assert found == pytest.approx(np.mean(won))


@settings(deadline=None)
@given(rankings)
def test_expected_average_precision_is_the_mean_over_the_orders_of_ties(pairs):
    scores, positive = (np.array(column[:6]) for column in zip(*pairs, strict=True))
    found = targeting.expected_average_precision(scores, positive)
    if not positive.any():
        assert math.isnan(found)
        return
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    precisions = []  # of one order: the mean precision where a decisive token stands
    for order in orders:
        places = np.flatnonzero(positive[list(order)])
        precisions.append(np.mean((np.arange(len(places)) + 1) / (places + 1)))
    assert found == pytest.approx(np.mean(precisions))


@settings(deadline=None)
@given(rankings, st.integers(1, 7))
def test_precision_recall_and_pointing_are_means_over_the_orders_of_ties(pairs, size):
    scores, positive = (np.array(column) for column in zip(*pairs, strict=True))
    pairs, size = pairs[:5], min(size, len(pairs[:5]))
    scores, positive = scores[:5], positive[:5]
    precisions, firsts = [], []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            precisions.append(positive[list(order[:size])].mean())
            firsts.append(positive[order[0]])
    precision, recall = targeting.precision_recall(scores, positive, size)
    assert precision == pytest.approx(np.mean(precisions))
    assert (
        math.isnan(recall)
        if not positive.any()
        else recall * positive.sum() == pytest.approx(precision * size)
    )
    assert targeting.pointing(scores, positive) == pytest.approx(np.mean(firsts))


boxes = st.lists(
    st.tuples(*[st.integers(0, 8)] * 4).map(lambda b: (*np.minimum(b[:2], b[2:]), *np.maximum(b[:2], b[2:]))),
    max_size=4,
)


@given(boxes, boxes)
def test_iou_of_areas_equals_counting_cells(one, other):
    cells = []
    for part in (one, other):
        grid = np.zeros((8, 8), dtype=bool)
        for left, top, right, bottom in part:
            grid[top:bottom, left:right] = True
        cells.append(grid)
    union = (cells[0] | cells[1]).sum()
    found = targeting.area_iou(np.array(one).reshape(-1, 4) / 8, np.array(other).reshape(-1, 4) / 8)
    assert math.isnan(found) if not union else found == pytest.approx((cells[0] & cells[1]).sum() / union)


# Which tokens decide


def deciding(*relevant, patches=PATCHES, spans=((29, 34),)) -> list[int]:
    boxes = np.array([(0.0, 0.0, 0.0, 0.0)] * 8 + list(patches))
    size = len(boxes)
    record = make_record(
        boxes=boxes, spans=np.array([(0, 0), *SPANS, (0, 0), *[(0, 0)] * len(patches)]),
        tokens=("",) * size, distilled=np.arange(size) != 8, relevant_spans=spans,
        relevant_boxes=tuple(relevant),
    )  # fmt: skip
    found = relevant_tokens(record)
    assert list(targeting.decisive_tokens(record)) == list(found & record.distilled)
    truth = ground_truth(record)
    for i in range(size):  # views and measures agree on every token, and views say what is not known
        known = (record.is_text[i] and spans) or (record.is_visual[i] and relevant)
        assert truth[i] == (bool(found[i]) if known else None)
    return list(np.flatnonzero(found[8:]))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 0.5, 0.25), [0]),  # exactly half of it
        ((0.1, 0.1, 1.0, 0.5), [0, 1]),  # 64 % of the first, all of the second
        ((0.3, 0.0, 1.0, 0.5), [1]),  # 40 % of the first is too little where another is inside
        ((0.6, 0.6, 0.62, 0.62), [3]),  # far smaller than a patch
        ((0.45, 0.1, 0.6, 0.2), [1]),  # across two patches: the larger share
        ((0.4, 0.4, 0.6, 0.6), [0, 1, 2, 3]),  # one quarter in each
        ((0.2, 0.2, 0.2, 0.2), []),  # without an area
    ],
)
def test_patches_half_inside_decide_or_the_one_that_holds_most_of_a_small_box(box, expected):
    assert deciding(box) == expected
    assert deciding((0.0, 0.5, 0.5, 1.0), box) == sorted({2, *expected}), "each box by itself"


def test_of_nested_regions_the_one_that_fits_a_small_box_decides():
    small = (0.1, 0.1, 0.2, 0.2)
    assert deciding(small, patches=[(0, 0, 1, 1), *PATCHES]) == [1], "not the whole picture"
    assert deciding(small, patches=[(0, 0, 1, 1), *PATCHES, (0.09, 0.1, 0.2, 0.2)]) == [5]


def test_without_relevant_boxes_or_spans_nothing_decides_and_views_say_unknown():
    assert deciding() == []
    assert deciding((0.0, 0.0, 0.5, 0.5), spans=()) == [0]
    unknown = make_record(relevant_spans=(), relevant_boxes=())
    assert not relevant_tokens(unknown).any() and set(ground_truth(unknown)) == {None}


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=3))
def test_a_box_with_an_area_always_has_a_deciding_patch(corners):
    relevant = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    if any((right - left) * (bottom - top) > 1e-6 for left, top, right, bottom in relevant):
        assert deciding(*relevant)


# Against the ground truth


def scores_of(record, **options) -> pd.Series:
    table = targeting.targeting_scores([record], **options)
    return table.set_index(["modality", "metric", "source"])["value"]


def test_scores_of_one_record_by_hand():
    found = scores_of(make_record())
    text, visual = found["text"], found["visual"]
    assert text["auc"]["targeting"] == text["ap"]["targeting"] == text["pointing"]["targeting"] == 1
    assert text["precision"]["targeting"] == 0.5 and text["recall"]["targeting"] == 1
    assert text["precision"]["random"] == pytest.approx(1 / 6) and text["recall"]["random"] == pytest.approx(
        1 / 3
    )
    assert text["auc"]["random"] == 0.5
    assert text["pointing"]["longest words"] == 0, "the longest word is not decisive"
    assert visual["pointing"]["targeting"] == 0 and visual["recall"]["targeting"] == 0
    assert visual["auc"]["score"] == 0 and visual["auc"]["targeting"] == pytest.approx((0 + 0 + 0.5) / 3)
    assert visual["iou"]["targeting"] == 0
    for metric in ("auc", "ap", "pointing", "precision", "recall"):  # patches are alike
        for source in ("largest", "centre"):
            assert visual[metric][source] == pytest.approx(visual[metric]["random"])
    for source in ("random", "largest", "centre"):  # two of four patches, one of which is half the time right
        assert visual["iou"][source] == pytest.approx(0.25, abs=0.1)


def test_frequency_is_the_given_idf_or_the_records_prior():
    idf = Idf.fit(["why is casey extraordinarily", "why is casey extraordinarily"])
    assert scores_of(make_record(), idf=idf)["text"]["auc"]["frequency"] == 1, "only 'angry' is unseen"
    falling = make_record(prior=np.linspace(1, 0, SIZE))
    assert scores_of(falling)["text"]["auc"]["frequency"] == pytest.approx(1 / 5)


def test_perfect_and_opposite_targeting():
    best = np.zeros(SIZE, dtype=bool)
    best[[5, 8]] = True
    found = scores_of(make_record(selected=best, weight=best / 2, score=best / 1.0))
    own = found[found.index.get_level_values("source") == "targeting"]
    assert len(own) == 11 and (own == 1).all()
    nothing = np.zeros(SIZE, dtype=bool)
    found = scores_of(make_record(selected=nothing, weight=nothing / 1.0))
    assert found["visual"]["iou"]["targeting"] == found["text"]["precision"]["targeting"] == 0


def test_records_without_ground_truth_are_left_out():
    unknown = make_record(relevant_spans=(), relevant_boxes=())
    assert targeting.targeting_scores([unknown]).empty
    assert set(targeting.targeting_scores([make_record(relevant_boxes=())])["modality"]) == {"text"}
    with pytest.raises(ValueError, match="ground truth"):
        targeting.targeting_quality(targeting.targeting_scores([unknown]))


def test_truth_and_what_stands_in_for_it_are_never_averaged():
    true, proxy = make_record(), make_record(truth="referred objects")
    assert set(targeting.targeting_scores([proxy])["truth"]) == {"referred objects"}
    with pytest.raises(ValueError, match="ground truth and referred objects"):
        targeting.targeting_quality(targeting.targeting_scores([true, proxy]))
    quality = targeting.targeting_quality(targeting.targeting_scores([proxy]), resamples=20)
    assert set(quality["truth"]) == {"referred objects"}
    view = quality_view(quality)
    assert "referred objects" in view.to_html() and "referred objects" in repr(view)
    usual = quality_view(targeting.targeting_quality(targeting.targeting_scores([true]), resamples=20))
    assert "against" not in repr(usual)


def test_records_keep_what_their_truth_is(tmp_path):
    write_records([make_record(truth="highlights")], tmp_path / "records.parquet")
    (record,) = read_records(tmp_path / "records.parquet")
    assert record.truth == "highlights"


def test_quality_is_means_with_intervals_over_pictures():
    rng = np.random.default_rng(0)
    records = [
        make_record(
            example_id=f"val-{i}", image=Path(f"{i // 2}.png"),
            score=(score := rng.random(SIZE)), weight=score, selected=np.ones(SIZE, dtype=bool),
        )
        for i in range(8)
    ]  # fmt: skip
    table = targeting.targeting_scores(records)
    quality = targeting.targeting_quality(table, resamples=300).set_index(["modality", "metric", "source"])
    own = table[(table["modality"] == "text") & (table["metric"] == "auc")]
    values = own[own["source"] == "targeting"]["value"].to_numpy()
    row = quality.loc[("text", "auc", "targeting")]
    images = own[own["source"] == "targeting"]["image"].to_numpy()
    assert row["value"] == pytest.approx(values.mean()) and (row["n"], row["pictures"]) == (8, 4)
    assert (row["low"], row["high"]) == bootstrap_interval(values[None], images, resamples=300)
    gain = quality.loc[("text", "auc", "random")]
    assert gain["gain"] == pytest.approx(values.mean() - 0.5)
    assert gain["low"] == gain["high"] == 0.5, "chance of an auc is known exactly"
    assert gain["gain_low"] == pytest.approx(row["low"] - 0.5)
    again = targeting.targeting_quality(targeting.targeting_scores(records), resamples=300)
    pd.testing.assert_frame_equal(again.set_index(["modality", "metric", "source"]), quality)


def quality_rows(metric="auc", pictures=8, **gains) -> pd.DataFrame:
    """The targeting at 0.6 beside baselines with these (value, gain_low, gain_high)."""
    common = {"truth": "ground truth", "modality": "text", "metric": metric, "pictures": pictures}
    rows = [common | {"source": "targeting", "value": 0.6, "low": 0.5, "high": 0.7}]
    for source, (value, low, high) in gains.items():
        row = {"source": source, "value": value, "low": value, "high": value, "gain": 0.6 - value}
        rows.append(common | row | {"gain_low": low, "gain_high": high})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("metric", "gain", "star"),
    [
        ("auc", (0.05, 0.2), " *"),
        ("auc", (-0.05, 0.2), ""),
        ("deletion", (-0.2, -0.05), " *"),
        ("deletion", (0.05, 0.2), ""),
        ("sufficiency", (0.05, 0.2), ""),
    ],
)
def test_figures_have_a_star_where_chance_is_beaten(metric, gain, star):
    rows = quality_rows(metric, random=(0.5, *gain), longest=(0.55, 0.01, 0.02)).assign(setting="a")
    other = quality_rows(metric, random=(0.5, -1, 1)).assign(setting="b")
    table = targeting.quality_table(pd.concat([rows, other]), ["setting", "modality"])
    assert table.loc[("a", "text"), metric] == f"0.60 [0.50, 0.70]{star}"
    assert table.loc[("b", "text"), metric] == "0.60 [0.50, 0.70]" and len(table) == 2
    few = targeting.quality_table(rows.assign(pictures=5), ["setting", "modality"])
    assert few.loc[("a", "text"), metric] == "0.60 [0.50, 0.70]"
    whole = targeting.quality_table(rows, ["modality", "source"])
    assert list(whole[metric]) == [f"0.60 [0.50, 0.70]{star}", "0.50 [0.50, 0.50]", "0.55 [0.55, 0.55]"]


@pytest.mark.parametrize(
    ("metric", "baselines", "pictures", "strongest", "verdict"),
    [
        ("auc", {"random": (0.4, 0.1, 0.3), "frequency": (0.5, 0.05, 0.2)}, 8, "frequency 0.500", "better"),
        ("auc", {"random": (0.4, 0.1, 0.3), "frequency": (0.7, -0.2, -0.05)}, 8, "frequency 0.700", "worse"),
        (
            "auc",
            {"random": (0.4, 0.1, 0.3), "frequency": (0.5, -0.1, 0.2)},
            8,
            "frequency 0.500",
            "undecided",
        ),
        ("deletion", {"random": (0.5, 0.05, 0.2), "longest": (0.9, -1, -0.1)}, 8, "random 0.500", "worse"),
        ("deletion", {"random": (0.8, -0.3, -0.1), "longest": (0.9, -1, 1)}, 8, "random 0.800", "better"),
        ("auc", {"random": (0.4, 0.1, 0.3)}, 5, "random 0.400", "too few pictures"),
        ("pointing", {"random": (0.7, -0.1, -0.1)}, 32, "random 0.700", "undecided"),
        ("pointing", {"random": (0.7, -0.1, -0.1)}, 100, "random 0.700", "worse"),
    ],
)
def test_verdicts_are_about_the_strongest_baseline(metric, baselines, pictures, strongest, verdict):
    (row,) = targeting.verdicts(quality_rows(metric, pictures, **baselines)).to_dict("records")
    assert (row["strongest baseline"], row["verdict"]) == (strongest, verdict)
    assert (row["truth"], row["modality"], row["metric"]) == ("ground truth", "text", metric)


# Masking


def toy_scorer(worth):
    """A score that falls by each masked token's worth."""
    return lambda keep: np.asarray(keep, dtype=float) @ np.asarray(worth, dtype=float)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(2, 12))
def test_curves_of_a_planted_scorer(worth, points):
    order = np.argsort(-np.array(worth), kind="stable")
    curves = masking.perturbation_curves(toy_scorer(worth), order, len(worth), points)
    assert curves.fraction[0] == 0 and curves.fraction[-1] == 1 and (np.diff(curves.fraction) > 0).all()
    assert (np.diff(curves.deletion) <= 0).all() and (np.diff(curves.insertion) >= 0).all()
    assert curves.deletion[0] == curves.insertion[-1] == sum(worth)
    assert curves.deletion[-1] == curves.insertion[0] == 0
    other = masking.perturbation_curves(toy_scorer(worth), order[::-1], len(worth), points)
    assert curves.deletion_area <= other.deletion_area + 1e-9
    assert curves.insertion_area >= other.insertion_area - 1e-9


def test_faithfulness_by_hand():
    chosen, candidates = np.array([1, 0, 0, 1], bool), np.array([1, 1, 0, 1], bool)
    needed, enough = masking.faithfulness(toy_scorer([4, 2, 1, 3]), chosen, candidates)
    assert needed == 4 + 3 and enough == 2, "a token that is no candidate is never masked"


def test_targeting_that_finds_the_planted_token_beats_chance():
    worth = np.zeros(SIZE)
    worth[[5, 9]] = 1.0
    table = masking.faithfulness_scores([make_record()], lambda _: toy_scorer(worth), draws=16)
    found = table.set_index(["modality", "metric", "source"])["value"]
    for modality in ("text", "visual"):
        assert found[modality, "comprehensiveness", "targeting"] == 1
        assert found[modality, "sufficiency", "targeting"] == 0
        assert found[modality, "comprehensiveness", "random"] < 1
        assert found[modality, "deletion", "targeting"] < found[modality, "deletion", "random"]
        assert found[modality, "insertion", "targeting"] > found[modality, "insertion", "random"]
    quality = targeting.targeting_quality(table, resamples=50)
    assert set(quality["metric"]) == {"comprehensiveness", "sufficiency", "deletion", "insertion"}
    assert masking.faithfulness_scores(
        [make_record(selected=np.zeros(SIZE, dtype=bool))], lambda _: toy_scorer(worth)
    ).empty


@pytest.fixture(scope="module")
def setting(student_folder, world):
    student, encoder = load_student(str(student_folder)).eval(), ViltEncoder(str(student_folder), 40)
    example = VcrReader(world, "train").read()[0]
    data = EncodedExamples([example], encoder)
    batch = collate([data[0]], encoder)
    choice, texts = 2, batch["input_ids"].shape[2]
    boxes = encoder.visual_boxes(data[0]["visual"]).numpy()
    size = texts + len(boxes)
    zeros = np.zeros(size)
    record = make_record(
        example_id=example.id, choice=choice, label=example.label, text=example.statements()[choice].text,
        spans=np.concatenate([batch["spans"][0, choice], np.zeros((len(boxes), 2), dtype=int)]),
        boxes=np.concatenate([np.zeros((texts, 4)), boxes]), tokens=("",) * size,
        distilled=zeros == 0, relevance=zeros, prior=zeros, score=zeros, selected=zeros > 0, weight=zeros,
    )  # fmt: skip
    return student, encoder, example, data, batch, record


def test_masked_scores_are_the_students_own(setting):
    student, encoder, _, data, batch, record = setting
    scorer = masking.masked_scorer(student, batch, record, encoder.tokenizer.mask_token_id, batch_size=2)
    texts = batch["input_ids"].shape[2]
    before = {name: value.clone() for name, value in batch.items()}
    keep = np.ones((4, len(record.tokens)), dtype=bool)
    words = np.flatnonzero(record.spans[:, 1])
    keep[1, words[:2]] = False
    keep[2, texts:] = False
    keep[3, texts + 1 + 4] = False  # one patch
    found = scorer(keep)
    assert found[0] == pytest.approx(predict(student, data)[0, record.choice], abs=1e-6)

    masked = {name: batch[name].clone() for name in student.inputs}
    masked["input_ids"][0, record.choice, words[:2]] = encoder.tokenizer.mask_token_id
    grey = {name: batch[name].clone() for name in student.inputs}
    grey["pixel_values"].zero_()
    patch = {name: batch[name].clone() for name in student.inputs}
    side, columns = 16, batch["pixel_values"].shape[-1] // 16
    row, column = divmod(4, columns)
    patch["pixel_values"][..., row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
    with torch.inference_mode():
        for value, inputs in zip(found[1:], (masked, grey, patch), strict=True):
            assert value == pytest.approx(
                float(student(**inputs).logits.softmax(-1)[0, record.choice]), abs=1e-6
            )
    for name, value in batch.items():
        assert torch.equal(value, before[name]), "the batch is left as it was"


def test_a_batch_of_other_tokens_is_refused(setting):
    student, encoder, example, data, _, record = setting
    mask = encoder.tokenizer.mask_token_id
    with pytest.raises(ValueError, match="batch of 2 examples"):
        masking.masked_scorer(student, collate([data[0], data[0]], encoder), record, mask)
    short = replace(example, prompt=TextPart("Why?"), choices=(TextPart("a"),) * 4)
    other = collate([EncodedExamples([short], encoder)[0]], encoder)
    with pytest.raises(ValueError, match="the record others"):
        masking.masked_scorer(student, other, record, mask)


def test_the_lift_is_what_it_was():
    record = make_record()
    lift = targeting.targeting_lift([record])
    assert lift["text_lift"] == pytest.approx((0.5 / 0.7) / (1 / 6)) and lift["text_n"] == 1
    assert lift["visual_lift"] == 0 and lift["visual_n"] == 1
    assert np.flatnonzero(targeting.decisive_tokens(record)).tolist() == [5, 8]


def test_a_record_without_any_selection_counts_as_one_that_selects_nothing_decisive():
    record = make_record()
    empty = replace(record, selected=np.zeros(SIZE, bool), weight=np.zeros(SIZE))
    lift = targeting.targeting_lift([record, empty])
    assert lift["text_n"] == 2 and lift["text_lift"] == targeting.targeting_lift([record])["text_lift"] / 2


def test_curves_of_a_record_are_those_of_its_order():
    worth = np.arange(SIZE, dtype=float)
    curves = masking.record_curves(make_record(), toy_scorer(worth), "text", points=4, draws=8)
    assert set(curves) == {"targeting", "random", "longest words", "frequency"}
    order = [5, 3, 4, 6, 1, 2]  # selected by weight, then by score, the earlier of equals first
    expected = masking.perturbation_curves(toy_scorer(worth), order, SIZE, 4)
    np.testing.assert_array_equal(curves["targeting"].deletion, expected.deletion)
    np.testing.assert_array_equal(curves["frequency"].fraction, expected.fraction)
    with pytest.raises(ValueError, match="no text token"):
        masking.record_curves(make_record(distilled=np.zeros(SIZE, dtype=bool)), toy_scorer(worth), "text")


def test_regions_are_masked_by_their_features():
    torch.manual_seed(0)
    config = UniterConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, type_vocab_size=4, img_dim=3, id2label={0: "a", 1: "b"},
    )  # fmt: skip
    student = UniterForClassification(config).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.tensor([[[2, 7, 8, 3]]])
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
        "region_features": torch.randn(1, 2, 3), "region_mask": torch.ones(1, 2, dtype=torch.long),
        "region_boxes": torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]]),
        "spans": torch.tensor([[[(0, 0), (0, 3), (4, 6), (0, 0)]]]),
    }  # fmt: skip
    spans = np.concatenate([batch["spans"][0, 0].numpy(), np.zeros((2, 2), dtype=int)])
    boxes = np.concatenate([np.zeros((4, 4)), batch["region_boxes"][0].numpy()])
    record = make_record(label=1, spans=spans, boxes=boxes, tokens=("",) * 6)
    keep = np.ones((2, 6), dtype=bool)
    keep[1, [2, 5]] = False
    found = masking.masked_scorer(student, batch, record, mask_token_id=4)(keep)
    with torch.inference_mode():
        whole = student(**batch).logits.softmax(-1)[0, 1]
        batch["input_ids"][0, 0, 2] = 4
        batch["region_features"][0, 1] = 0
        masked = student(**batch).logits.softmax(-1)[0, 1]
    assert found == pytest.approx([float(whole), float(masked)], abs=1e-6) and abs(whole - masked) > 1e-4
