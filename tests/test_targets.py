"""Targets: what the teacher's tokens become for a student, in every relevance variant."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tdlib.config import RunConfig
from tdlib.data.pictures import open_picture
from tdlib.method.priors import Idf
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.teacher.cache import CacheError, TeacherCache
from tdlib.teacher.towers import EXTRAS
from tdlib.training.pipeline import TeacherFeatureReader, teacher_tokens, token_centres
from tdlib.training.prepare import read_split
from tdlib.training.targets import make_targets, pack

HALF = {"rtol": 0, "atol": 3e-3}


@pytest.fixture(scope="module")
def examples(base):
    split = read_split(base, "train")
    return [split[0], split[1], split[2]]


@pytest.fixture(scope="module")
def idf(examples) -> Idf:
    return Idf.fit(statement.text for example in examples for statement in example.statements())


@pytest.fixture
def cache(tmp_path, teacher) -> TeacherCache:
    return TeacherCache(tmp_path, teacher)


def reader_of(cache, idf, relevance: str = "value", **options) -> TeacherFeatureReader:
    return TeacherFeatureReader(
        cache, idf, RunConfig().model_copy(update={"relevance": relevance}), **options
    )


def targets_of(feature_reader, example, spans, boxes) -> SimpleNamespace:
    """The targets of one example, as a batch of one."""
    batch = pack([feature_reader.features(example, spans, boxes)], spans.shape[1]) | {"spans": spans[None]}
    return SimpleNamespace(
        **{name: value[0] for name, value in make_targets(batch, feature_reader.config).items()}
    )


def as_the_teacher(teacher, example) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Records' spans, the same padded, and boxes: a student that sees what the teacher sees."""
    spans = [record.positions for record in teacher.encode_texts([s.text for s in example.statements()])]
    boxes = teacher.encode_pictures([open_picture(example.image)])[0].positions
    return spans, torch.nn.utils.rnn.pad_sequence(spans, batch_first=True), boxes


FIELDS = ("vectors", "relevance", "prior", "scores", "valid", "teacher_logits")


def assert_same(a: SimpleNamespace, b: SimpleNamespace, *names: str) -> None:
    for name in names or FIELDS:
        assert_close(getattr(a, name), getattr(b, name))


def test_the_cache_has_to_be_filled_for_the_default(cache, idf, examples, teacher):
    feature_reader = reader_of(cache, idf)
    _, spans, boxes = as_the_teacher(teacher, examples[0])
    with pytest.raises(CacheError, match="call add"):
        targets_of(feature_reader, examples[0], spans, boxes)
    feature_reader.prepare(examples)
    assert targets_of(feature_reader, examples[0], spans, boxes).valid.any()
    kinds = {file.name.rsplit("-", 1)[0] for file in cache.folder.glob("*.safetensors")}
    assert kinds == {"texts", "pictures"}


@pytest.mark.parametrize("variant", RELEVANCE)
def test_relevance_alone_differs_between_variants(variant, cache, idf, examples, teacher):
    default, other = reader_of(cache, idf), reader_of(cache, idf, variant)
    default.prepare(examples)
    other.prepare(examples)
    _, spans, boxes = as_the_teacher(teacher, examples[0])
    a, b = targets_of(default, examples[0], spans, boxes), targets_of(other, examples[0], spans, boxes)
    assert_same(a, b, "vectors", "prior", "valid", "teacher_logits")
    assert b.relevance.isfinite().all() and b.relevance[~b.valid].eq(0).all()
    assert ((a.relevance - b.relevance).abs().max() > 1e-3) == (variant != "value")


@pytest.mark.parametrize("variant", [*EXTRAS, "gradient"])
def test_what_was_not_prepared_is_added_when_asked_for(variant, cache, idf, examples, teacher, tmp_path):
    default, feature_reader = reader_of(cache, idf), reader_of(cache, idf, variant)
    default.prepare(examples)  # an older cache, without the signal
    _, spans, boxes = as_the_teacher(teacher, examples[1])
    late = targets_of(feature_reader, examples[1], spans, boxes)
    fresh = reader_of(TeacherCache(tmp_path / "fresh", teacher), idf, variant)
    fresh.prepare(examples)
    prepared = targets_of(fresh, examples[1], spans, boxes)
    for name in FIELDS:  # batches of other sizes round differently
        tolerance = {"rtol": 1e-3, "atol": 1e-1} if name == "teacher_logits" else {"rtol": 0.02, "atol": 2e-3}
        assert_close(getattr(late, name), getattr(prepared, name), **tolerance)


@pytest.mark.parametrize("variant", [*EXTRAS, "gradient"])
def test_prepared_signals_are_not_computed_again(variant, cache, idf, examples, teacher, monkeypatch):
    feature_reader = reader_of(cache, idf, variant)
    feature_reader.prepare(examples, part=2)
    targets = as_the_teacher(teacher, examples[2])[1:]
    for name in ("encode_texts", "encode_pictures", "pair_relevance"):
        monkeypatch.delattr(type(teacher), name)
    feature_reader.prepare(examples)
    assert targets_of(feature_reader, examples[2], *targets).valid.any()


@pytest.mark.parametrize("variant", ["attention", "rollout", "gradient"])
def test_a_student_with_the_teachers_tokens_gets_the_teachers_scalars(variant, cache, idf, examples, teacher):
    example, feature_reader = examples[0], reader_of(cache, idf, variant)
    lengths, spans, boxes = as_the_teacher(teacher, example)
    relevance = targets_of(feature_reader, example, spans, boxes).relevance
    texts, picture = [s.text for s in example.statements()], open_picture(example.image)
    if variant == "gradient":
        expected = teacher.pair_relevance(texts, picture)
    else:
        (patches,) = teacher.encode_pictures([picture], extras=(variant,))
        words = teacher.encode_texts(texts, extras=(variant,))
        expected = [(getattr(record, variant), getattr(patches, variant)) for record in words]
    for row, own, (words, patches) in zip(relevance, lengths, expected, strict=True):
        assert_close(row[: len(own)], words, **HALF)
        assert_close(row[spans.shape[1] :], patches, **HALF)


def test_a_control_shows_the_teacher_another_picture(cache, idf, examples, teacher):
    first, second = examples[0], next(e for e in examples[1:] if e.image != examples[0].image)
    feature_reader = reader_of(
        cache, idf, seen_as=lambda example: dataclasses.replace(example, image=second.image)
    )
    feature_reader.prepare([first])
    assert len(cache) == len(first.statements()) + 1
    reader_of(cache, idf).prepare([first])
    _, spans, boxes = as_the_teacher(teacher, first)
    shuffled, own = (
        targets_of(feature_reader, first, spans, boxes),
        targets_of(reader_of(cache, idf), first, spans, boxes),
    )
    swapped = targets_of(reader_of(cache, idf), dataclasses.replace(first, image=second.image), spans, boxes)
    assert_same(shuffled, swapped)
    text = slice(0, spans.shape[1])
    assert_close(shuffled.vectors[:, text], own.vectors[:, text])
    assert (shuffled.vectors - own.vectors).abs().max() > 1e-3
    assert (shuffled.relevance[:, text] - own.relevance[:, text]).abs().max() > 1e-4


@pytest.mark.parametrize("variant", STUDENT_RELEVANCE)
def test_relevance_that_depends_on_the_student_is_left_to_training(variant, cache, idf, examples, teacher):
    feature_reader = reader_of(cache, idf, variant)
    feature_reader.prepare(examples)
    _, spans, boxes = as_the_teacher(teacher, examples[0])
    targets = targets_of(feature_reader, examples[0], spans, boxes)
    assert targets.relevance.eq(0).all()
    assert_same(
        targets, targets_of(reader_of(cache, idf), examples[0], spans, boxes), "vectors", "valid", "prior"
    )


def test_teacher_tokens_stand_behind_each_other_and_are_padded_with_zeros(teacher, examples):
    texts = teacher.encode_texts(["two dogs", "a red cup on a bench"], extras=("vv",))
    (picture,) = teacher.encode_pictures([open_picture(examples[0].image)], extras=("vv",))
    short, long = (len(text.positions) for text in texts)
    tokens = teacher_tokens(texts, picture)
    for name in ("projected", "value", "vv"):
        vectors = getattr(tokens, name)
        assert vectors.shape == (2, long + 16, teacher.dim)
        assert torch.equal(vectors[0, :short], getattr(texts[0], name))
        assert torch.equal(vectors[1, :long], getattr(texts[1], name))
        assert torch.equal(vectors[0, long:], getattr(picture, name))
        assert vectors[0, short:long].eq(0).all()
    assert torch.equal(tokens.tokens.spans[0, :short], texts[0].positions)
    assert tokens.tokens.is_visual.sum(-1).tolist() == [16, 16]
    plain = teacher_tokens(
        [dataclasses.replace(text, vv=None) for text in texts], dataclasses.replace(picture, vv=None)
    )
    assert plain.vv is plain.saliency is None


def test_centres_hold_the_tokens_of_one_record_at_a_time(cache, examples, monkeypatch):
    """Those of all of VCR are many times larger than memory."""
    cache.add([s.text for e in examples for s in e.statements()], [e.image for e in examples])
    read, most = [], []

    def watched(reads):
        def watch(of):
            record = reads(of)
            read.append(weakref.ref(record.projected))
            most.append(sum(alive() is not None for alive in read))
            return record

        return watch

    for name in ("text", "picture"):
        monkeypatch.setattr(cache, name, watched(getattr(cache, name)))
    token_centres(cache, examples)
    assert len(read) > 4 and max(most) <= 2
