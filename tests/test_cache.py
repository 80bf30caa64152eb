"""The cache of the teacher's features: the same as live, computed once, and never silently wrong."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tdlib.core.files import file_digest
from tdlib.core.paths import ROOT
from tdlib.data.examples import DataError
from tdlib.data.pictures import open_picture
from tdlib.teacher import cache as module
from tdlib.teacher.cache import CacheError, TeacherCache, text_key
from tdlib.teacher.model import Teacher
from tdlib.teacher.towers import EXTRAS, TeacherError

TEXTS = [
    "a red umbrella",
    "two dogs and a bench",
    "Casey holds a cup.",
    "  ",
    "a longer sentence about rain, a bus stop",
]
HALF = {"rtol": 0, "atol": 1e-3}


@pytest.fixture(scope="module")
def pictures(world) -> list[Path]:
    return sorted(path for path in (world / "vcr1images").rglob("*.*") if path.suffix != ".json")[:4]


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Shards of two texts or pictures."""
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    monkeypatch.setattr(module, "STEP", dict.fromkeys(module.STEP, 2))


@pytest.fixture
def filled(tmp_path, teacher, pictures) -> TeacherCache:
    cache = TeacherCache(tmp_path, teacher)
    cache.add(TEXTS, pictures)
    return cache


def assert_live(cache: TeacherCache, teacher: Teacher, texts, pictures) -> None:
    stored = [cache.text(text) for text in texts] + [cache.picture(path) for path in pictures]
    live = teacher.encode_texts(texts) + teacher.encode_pictures([open_picture(path) for path in pictures])
    for a, b in zip(stored, live, strict=True):
        assert a.projected.dtype == torch.float32
        assert_close(a.projected, b.projected, **HALF)
        assert_close(a.value, b.value, **HALF)
        assert_close(a.pooled, b.pooled, **HALF)
        assert torch.equal(a.positions, b.positions)


def counted(monkeypatch, teacher: Teacher) -> dict[str, list]:
    """What the teacher is asked for from here on."""
    asked: dict[str, list] = {"texts": [], "pictures": []}
    texts, pictures = teacher.encode_texts, teacher.encode_pictures
    monkeypatch.setattr(teacher, "encode_texts", lambda x, **o: asked["texts"].extend(x) or texts(x, **o))
    monkeypatch.setattr(
        teacher, "encode_pictures", lambda x, **o: asked["pictures"].extend(x) or pictures(x, **o)
    )
    return asked


def manifest_of(cache: TeacherCache) -> dict:
    return json.loads((cache.folder / "manifest.json").read_text())


def change_manifest(cache: TeacherCache, change) -> None:
    manifest = manifest_of(cache)
    change(manifest)
    (cache.folder / "manifest.json").write_text(json.dumps(manifest))


def shard_of(cache: TeacherCache, kind: str) -> Path:
    return cache.folder / next(
        entry["file"] for entry in manifest_of(cache)["shards"] if entry["kind"] == kind
    )


def refused(cache: TeacherCache, teacher: Teacher, name: str | Path) -> None:
    """Opening fails, names the file and tells what to do."""
    with pytest.raises(CacheError, match=re.escape(str(name))) as caught:
        TeacherCache(cache.folder.parent, teacher)
    assert f"delete {cache.folder}" in str(caught.value)


# What it holds


def test_cached_equals_live(filled, teacher, pictures):
    assert_live(filled, teacher, TEXTS, pictures)
    assert len(filled) == len(TEXTS) + len(pictures)


def test_a_reopened_cache_reads_the_same_without_computing_it_anew(
    filled, teacher, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SAMPLE", 1)
    asked = counted(monkeypatch, teacher)
    again = TeacherCache(tmp_path, teacher)
    assert len(asked["texts"]) == len(asked["pictures"]) == 1  # the check
    again.add(TEXTS, pictures)
    assert len(asked["texts"]) == len(asked["pictures"]) == 1
    assert len(again) == len(filled)
    for text in TEXTS:
        assert torch.equal(again.text(text).projected, filled.text(text).projected)
    for path in pictures:
        assert torch.equal(again.picture(path).pooled, filled.picture(path).pooled)


def test_each_distinct_text_and_picture_is_computed_once(tmp_path, teacher, pictures, monkeypatch):
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(pictures[0].read_bytes())
    asked = counted(monkeypatch, teacher)
    cache = TeacherCache(tmp_path / "cache", teacher)
    cache.add([*TEXTS, *TEXTS], [pictures[0], copy, pictures[0]])
    cache.add(iter(TEXTS[:2]), iter([copy]))
    assert sorted(asked["texts"]) == sorted(TEXTS)
    assert len(asked["pictures"]) == 1
    assert torch.equal(cache.picture(copy).value, cache.picture(pictures[0]).value)


# Signals that only some relevance variants read


HOLD = """\
import fcntl, sys, time
from tdlib.core.store import Store
from tdlib.teacher.cache import text_key
store = Store.__new__(Store)
store.folder = __import__("pathlib").Path(sys.argv[1])
store.missing = lambda kind, keys: keys
with store.to_fill(["texts"], [text_key(text) for text in sys.argv[2:]]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_of_processes_that_lack_the_same_one_computes_it(tmp_path, teacher, monkeypatch):
    cache, other = TeacherCache(tmp_path, teacher), TeacherCache(tmp_path, teacher)
    words = [sys.executable, "-c", HOLD, str(cache.store.folder), *TEXTS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"held\n"
        waiting = Thread(target=cache.add, args=(TEXTS,))
        waiting.start()
        other.add(["quite another text"])  # nobody computes the same
        other._fill(["texts"], [text_key(text) for text in TEXTS], TEXTS)
        computed = counted(monkeypatch, teacher)
        assert waiting.is_alive()
        process.kill()
        waiting.join()
    assert not computed["texts"] and cache.text(TEXTS[0]) is not None


def extra_shards(cache: TeacherCache) -> list[str]:
    return sorted(entry["kind"] for entry in manifest_of(cache)["shards"] if ":" in entry["kind"])


def test_nobody_stores_what_was_not_asked_for(filled, pictures):
    assert extra_shards(filled) == []
    assert filled.text(TEXTS[0]).vv is filled.picture(pictures[0]).attention is None
    with pytest.raises(CacheError, match=r"no 'vv' of 'a red umbrella'.*extras=\('vv',\)"):
        filled.text(TEXTS[0], extras=("vv",))
    with pytest.raises(CacheError, match=r"no gradient relevance of 'a red umbrella' with .*add_pairs"):
        filled.pair(TEXTS[0], pictures[0])


def assert_extras_live(cache: TeacherCache, teacher: Teacher, texts, pictures) -> None:
    stored = [cache.text(text, EXTRAS) for text in texts] + [cache.picture(path, EXTRAS) for path in pictures]
    live = teacher.encode_texts(texts, extras=EXTRAS)
    live += teacher.encode_pictures([open_picture(path) for path in pictures], extras=EXTRAS)
    for a, b in zip(stored, live, strict=True):
        for name in ("projected", "value", "pooled", *EXTRAS):
            assert_close(getattr(a, name), getattr(b, name), **HALF)


def test_a_signal_asked_for_later_is_added_to_what_is_there(filled, teacher, pictures, tmp_path, monkeypatch):
    before = {path.name: file_digest(path) for path in filled.folder.glob("*.safetensors")}
    asked = counted(monkeypatch, teacher)
    filled.add(["new", *TEXTS], pictures, extras=("vv",))
    assert sorted(asked["texts"]) == sorted(["new", *TEXTS]) and len(asked["pictures"]) == len(pictures)
    filled.add(["new", *TEXTS], pictures, extras=("vv",))
    assert len(asked["texts"]) == 6  # nothing twice
    filled.add(TEXTS, pictures, extras=EXTRAS)
    assert (
        before.items()
        < {path.name: file_digest(path) for path in filled.folder.glob("*.safetensors")}.items()
    )
    assert len(filled) == len(TEXTS) + 1 + len(pictures)
    again = TeacherCache(tmp_path, teacher)
    assert_extras_live(again, teacher, TEXTS, pictures)
    assert again.text("new", ("vv",)).attention is None


def test_features_and_signals_of_a_new_text_are_computed_together(tmp_path, teacher, pictures, monkeypatch):
    asked = counted(monkeypatch, teacher)
    cache = TeacherCache(tmp_path, teacher)
    cache.add(TEXTS, pictures, extras=EXTRAS)
    assert sorted(asked["texts"]) == sorted(TEXTS) and len(asked["pictures"]) == len(pictures)
    assert_extras_live(cache, teacher, TEXTS, pictures)


@pytest.mark.parametrize("name", [*EXTRAS, "gradient"])
def test_stored_signals_that_differ_from_the_live_ones_are_refused(filled, teacher, pictures, name):
    filled.add(TEXTS, pictures, extras=EXTRAS)
    filled.add_pairs([(text, pictures[0]) for text in TEXTS])
    for entry in manifest_of(filled)["shards"]:
        if name in entry["kind"] or (name == "gradient" and entry["kind"] == "pairs"):
            tensors = load_file(filled.folder / entry["file"])
            tensors[name] = 1 - tensors[name]
            save_file(tensors, filled.folder / entry["file"])
    sign(filled)
    refused(filled, teacher, filled.folder)


def test_pairs_are_stored_once_and_read_back(tmp_path, teacher, pictures, monkeypatch):
    asked, real = [], teacher.pair_relevance
    monkeypatch.setattr(teacher, "pair_relevance", lambda texts, x: asked.extend(texts) or real(texts, x))
    cache = TeacherCache(tmp_path, teacher)
    pairs = [(text, path) for text in TEXTS[:3] for path in pictures[:2]]
    cache.add_pairs([*pairs, *pairs])
    cache.add_pairs(pairs[:2])
    assert len(asked) == 6
    again = TeacherCache(tmp_path, teacher)
    assert len(asked) == 6 + module.SAMPLE  # the check
    for text, path in pairs:
        ((words, patches),) = real([text], open_picture(path))
        assert_close(again.pair(text, path), torch.cat([words, patches]), rtol=0, atol=3e-3)
    pictures_alone = TeacherCache(tmp_path, teacher)
    assert len(pictures_alone) == 0
    with pytest.raises(CacheError, match="no features of"):
        pictures_alone.text(TEXTS[0])


def test_a_teacher_without_the_signal_stores_nothing(tmp_path, teacher, monkeypatch):
    def refuse(_extra):
        raise TeacherError("no attention here")

    monkeypatch.setattr(teacher, "check", refuse)
    cache = TeacherCache(tmp_path, teacher)
    with pytest.raises(TeacherError, match="no attention here"):
        cache.add(TEXTS, extras=("rollout",))
    assert len(cache) == 0


def test_a_shard_is_written_whenever_enough_is_in_memory(tmp_path, teacher, small_shards):
    cache = TeacherCache(tmp_path, teacher)
    cache.add(TEXTS)
    assert [entry["records"] for entry in manifest_of(cache)["shards"]] == [2, 2, 1]
    assert_live(TeacherCache(tmp_path, teacher), teacher, TEXTS, [])


def test_what_was_not_added_is_an_error(filled, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "new.png")
    with pytest.raises(CacheError, match=r"'not here'.*add\(texts="):
        filled.text("not here")
    with pytest.raises(CacheError, match=r"new\.png.*add\(pictures="):
        filled.picture(tmp_path / "new.png")
    with pytest.raises(DataError, match=r"gone\.png.*missing"):
        filled.picture(tmp_path / "gone.png")


def test_a_changed_picture_has_another_key(tmp_path, teacher):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(path)
    cache = TeacherCache(tmp_path / "cache", teacher)
    cache.add(pictures=[path])
    red, key = cache.picture(path), cache.picture_key(path)
    Image.linear_gradient("L").resize((40, 40)).save(path)
    assert cache.picture_key(path) != key
    with pytest.raises(CacheError, match=r"picture\.png"):
        cache.picture(path)
    cache.add(pictures=[path])
    assert (cache.picture(path).pooled - red.pooled).norm() > 1e-3
    TeacherCache(
        tmp_path / "cache", teacher
    )  # the old record's source is gone: it cannot be checked, and is kept


def test_caches_of_two_teachers_lie_apart(filled, teacher, teacher_folder, tmp_path):
    other = Teacher(f"local-dir:{teacher_folder}")
    other.model.logit_scale += 1
    other.fingerprint = other._fingerprint()
    cache = TeacherCache(tmp_path, other)
    assert cache.folder != filled.folder and len(cache) == 0


# Damage


def sign(cache: TeacherCache) -> None:
    """Makes the manifest's checksums those of the files as they are now."""

    def update(manifest):
        for entry in manifest["shards"]:
            entry["sha256"] = file_digest(cache.folder / entry["file"])

    change_manifest(cache, update)


@pytest.mark.parametrize("kind", ["texts", "pictures"])
@pytest.mark.parametrize("name", ["projected", "value", "pooled"])
def test_stored_features_that_differ_from_the_live_ones_are_refused(filled, teacher, kind, name):
    """Also where the checksum is right: a teacher whose code has changed, say."""
    path = shard_of(filled, kind)
    tensors = load_file(path)
    tensors[name] = tensors[name].roll(1, -1)
    save_file(tensors, path)
    sign(filled)
    refused(filled, teacher, filled.folder)


def test_records_under_each_others_keys_are_refused(filled, teacher):
    path = shard_of(filled, "texts")
    tensors = load_file(path)
    tensors["keys"] = tensors["keys"].flip(0).contiguous()
    save_file(tensors, path)
    sign(filled)
    refused(filled, teacher, filled.folder)


def test_an_undecodable_picture_is_named_and_stores_nothing(filled, teacher, tmp_path, pictures):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 nothing")
    before = (filled.folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=re.escape(str(broken))):
        filled.add(pictures=[broken])
    assert (filled.folder / "manifest.json").read_bytes() == before
    assert_live(TeacherCache(tmp_path, teacher), teacher, TEXTS, pictures)


# Numbers that are not finite


@pytest.fixture
def spoiling(teacher, monkeypatch):
    """The teacher makes of chosen texts and pictures what a damaged or overflowing model would."""
    texts, pictures, spoiled = teacher.encode_texts, teacher.encode_pictures, set()

    def spoil(records, sources):
        return [
            replace(record, projected=record.projected * torch.nan) if source in spoiled else record
            for record, source in zip(records, sources, strict=True)
        ]

    monkeypatch.setattr(teacher, "encode_texts", lambda x, **o: spoil(texts(x, **o), x))
    monkeypatch.setattr(
        teacher, "encode_pictures", lambda x, **o: spoil(pictures(x, **o), [picture.size for picture in x])
    )
    return spoiled


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_features_that_are_not_finite_are_refused_and_the_others_kept(tmp_path, teacher, spoiling, kind):
    path = tmp_path / "odd.png"
    Image.new("RGB", (31, 17), "red").save(path)
    spoiling.add((31, 17) if kind == "picture" else TEXTS[2])
    cache = TeacherCache(tmp_path / "cache", teacher)
    with pytest.raises(TeacherError) as caught:
        cache.add(TEXTS, [path])
    told = str(caught.value)
    assert f"teacher {teacher.name!r} in float32: 'projected' of the {kind} " in told
    assert repr(str(path) if kind == "picture" else TEXTS[2]) in told and "leave this out of the data" in told
    again = TeacherCache(tmp_path / "cache", teacher)
    assert len(again) == (len(TEXTS) if kind == "picture" else len(TEXTS) - 1)
    spoiling.clear()
    again.add(TEXTS, [path])
    assert_live(again, teacher, TEXTS, [path])


def test_weights_that_are_not_finite_are_named(tmp_path, teacher_folder):
    teacher = Teacher(f"local-dir:{teacher_folder}")
    teacher.model.text_projection[0, 0] = torch.nan
    with pytest.raises(TeacherError, match=r"1 of its weights are not either \(text_projection\)"):
        TeacherCache(tmp_path, teacher).add(TEXTS[:1])


def test_an_overflow_in_half_precision_is_named(tmp_path, teacher, spoiling, monkeypatch):
    spoiling.add(TEXTS[0])
    weights = [("weight", torch.zeros(2).half())]
    monkeypatch.setattr(teacher.model, "named_parameters", lambda: weights)
    with pytest.raises(TeacherError, match=r"in float16: .* load the weights in float32"):
        TeacherCache(tmp_path, teacher).add(TEXTS[:1])


# Texts beyond the context


def test_what_the_teacher_cuts_is_stored(tmp_path, teacher):
    long, longer = "word " * 44 + "a cup", "word " * 60 + "a cup"
    cache = TeacherCache(tmp_path, teacher)
    cache.add([*TEXTS, long, longer])
    for view in (cache, TeacherCache(tmp_path, teacher)):
        for text in (*TEXTS, long, longer):
            assert view.cut(text) == view.text(text).cut == teacher.encode_texts([text])[0].cut
        assert view.cut(TEXTS[0]) == 0 and view.cut(longer) - view.cut(long) > 15
    longest = "word " * 80
    cache.add_pooled([longest])  # without its tokens
    assert cache.cut("new") == 0 and cache.cut(longest) == teacher.encode_texts([longest])[0].cut > 0


def test_a_global_embedding_alone_is_stored_without_tokens(filled, teacher, tmp_path, monkeypatch):
    new = ["a cat on a table", "a red cat on a table"]
    filled.add_pooled([TEXTS[0], *new, new[0]])
    assert filled.store.count("texts_pooled") == 2 and filled.store.count("texts") == len(set(TEXTS))
    live = teacher.encode_texts([TEXTS[0], *new])
    for text, record in zip([TEXTS[0], *new], live, strict=True):
        assert filled.pooled(text).dtype == torch.float32
        assert_close(filled.pooled(text), record.pooled, **HALF)
    with pytest.raises(CacheError, match="no features"):
        filled.text(new[0])
    before = filled.pooled(new[0])
    filled.add(new)
    assert torch.equal(filled.pooled(new[0]), before) and filled.text(new[0]).projected.dim() == 2
    again = TeacherCache(tmp_path, teacher)  # opening checks it as all others
    asked = counted(monkeypatch, teacher)
    again.add_pooled(new)
    assert torch.equal(again.pooled(new[1]), filled.pooled(new[1])) and not asked["texts"]
    with pytest.raises(CacheError, match="no features of 'unknown'"):
        again.pooled("unknown")


@pytest.mark.parametrize("many", [1, 5, 6, 7, 100])
def test_more_embeddings_than_fit_into_memory_are_computed_in_the_same_batches(
    tmp_path, teacher, monkeypatch, many
):  # fmt: skip
    monkeypatch.setattr(module, "STEP", module.STEP | {"texts_pooled": 4})
    monkeypatch.setattr(module, "AT_ONCE", many)
    texts = [f"a cat and {number % 9} dogs" for number in range(12)]
    batches, real = [], teacher.encode_texts
    monkeypatch.setattr(teacher, "encode_texts", lambda x, **o: batches.append([*x]) or real(x, **o))
    cache = TeacherCache(tmp_path, teacher)
    cache.add_pooled(iter(texts))
    assert batches == [texts[:4], texts[4:8], texts[8:9]]
    assert all(torch.isfinite(cache.pooled(text)).all() for text in texts)
