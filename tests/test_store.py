"""The store behind the caches: records come back as they were, nothing damaged is served."""

import json
import os
import pickle
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tdlib.core import store as module
from tdlib.core.files import file_digest
from tdlib.core.store import (
    EXACT,
    CacheError,
    Column,
    FileDigests,
    NotFiniteError,
    Store,
    fingerprint,
    record_key,
)

LAYOUT = {
    "cells": {"values": Column(), "places": EXACT, "mean": Column(ragged=False)},
    "numbers": {"count": Column(half=False, ragged=False)},
}


def record_of(number: int) -> dict[str, torch.Tensor]:
    """Of ``number`` rows."""
    values = torch.arange(number * 3.0).view(-1, 3) + number
    mean = torch.full((2,), float(number))
    return {"values": values, "places": torch.arange(number * 2).view(-1, 2), "mean": mean, "other": mean}


def fill(store: Store, numbers, kind: str = "cells") -> None:
    keys = [record_key(str(number)) for number in numbers]
    store.append(kind, keys, [record_of(number) for number in numbers], [f"made of {n}" for n in numbers])


def assert_stored(store: Store, numbers) -> None:
    for number in numbers:
        found, expected = store.read("cells", record_key(str(number))), record_of(number)
        assert found.keys() == LAYOUT["cells"].keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert found["values"].dtype == torch.float32 and found["places"].dtype == torch.int64


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "store", "me", LAYOUT)
    fill(store, [3, 0, 1])
    fill(store, [7])
    return store


def test_records_come_back_as_they_were(store):
    reopened = Store(store.folder, "me", LAYOUT)
    for view in (store, reopened, pickle.loads(pickle.dumps(reopened))):
        assert view.count("cells") == 4 and view.count("numbers") == 0
        assert_stored(view, [3, 0, 1, 7])
        assert view.read("cells", record_key("3"), ["mean"]).keys() == {"mean"}
        assert {source for _, source in view.sample("cells", 9)} == {f"made of {n}" for n in (3, 0, 1, 7)}
        assert all(record_key(source.split()[-1]) == key for key, source in view.sample("cells", 2))


def test_missing_keys_are_told_in_their_order(store):
    keys = [record_key(str(number)) for number in (9, 3, 8, 7, 2)]
    assert store.missing("cells", keys) == [keys[0], keys[2], keys[4]]
    assert store.missing("numbers", keys) == keys and store.missing("cells", []) == []
    with pytest.raises(KeyError):
        store.read("cells", keys[0])


def test_a_key_stored_twice_is_one_record(store):
    fill(store, [7, 9])
    for view in (store, Store(store.folder, "me", LAYOUT)):
        assert view.count("cells") == 5
        assert_stored(view, [7, 9])


def test_the_index_takes_32_bytes_a_record(tmp_path):
    store, number = Store(tmp_path, "me", LAYOUT), 20_000
    records = [{"count": torch.tensor(i)} for i in range(number)]
    for start in range(0, number, 5_000):
        part = range(start, start + 5_000)
        store.append("numbers", [record_key(str(i)) for i in part], [records[i] for i in part], list(part))
    index = store._index["numbers"]
    offsets = sum(shard.offsets.nbytes for shard in store._shards)
    assert index.keys.nbytes + index.places.nbytes + offsets <= 33 * number
    for i in (0, 4_999, 5_000, 19_999):
        assert store.read("numbers", record_key(str(i)))["count"] == i


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 3)
    store = Store(tmp_path, "me", LAYOUT)
    for number in range(8):
        fill(store, [number])
    for _ in range(2):
        assert_stored(store, range(8))
    assert len(store._files) == 3


# Numbers that are not finite


@pytest.mark.parametrize(
    ("column", "value"), [("values", torch.nan), ("values", 1e5), ("mean", torch.inf), ("mean", -1e5)]
)
def test_a_record_that_is_not_finite_as_it_is_stored_is_refused(store, column, value):
    record = record_of(5)
    record[column].view(-1)[-1] = value
    before = sorted(path.name for path in store.folder.iterdir())
    with pytest.raises(NotFiniteError, match=f"{column} of 'made of 5' is not finite") as caught:
        store.append("cells", [record_key("4"), record_key("5")], [record_of(4), record], ["", "made of 5"])
    assert (caught.value.rows, caught.value.source, caught.value.column) == ([1], "made of 5", column)
    assert sorted(path.name for path in store.folder.iterdir()) == before
    assert len(store.missing("cells", [record_key("4"), record_key("5")])) == 2


def signed(store: Store, change) -> None:
    """Changes the first shard's tensors and signs them."""
    manifest = json.loads((store.folder / "manifest.json").read_text())
    entry = manifest["shards"][0]
    path = store.folder / entry["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    entry["sha256"] = file_digest(path)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))


# Damage


def test_another_owner_or_format_is_refused(store):
    with pytest.raises(CacheError, match=rf"owner are .*'me'.*delete {re.escape(str(store.folder))}"):
        Store(store.folder, "you", LAYOUT)
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(CacheError, match="format and owner"):
        Store(store.folder, "me", LAYOUT)


SPOILED = {
    "a column is missing": lambda tensors: tensors.pop("mean"),
    "fewer rows than records": lambda tensors: tensors.update(mean=tensors["mean"][:1]),
    "more rows than records": lambda tensors: tensors.update(values=torch.zeros(9, 3).half()),
    "offsets go back": lambda tensors: tensors.update(offsets=torch.tensor([0, 5, 3, 4])),
    "fewer keys": lambda tensors: tensors.update(keys=tensors["keys"][:2]),
    "another type": lambda tensors: tensors.update(mean=tensors["mean"].double()),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_signed_shard_that_does_not_hold_its_records_is_refused(store, case):
    signed(store, SPOILED[case])
    with pytest.raises(CacheError, match=r"cells-.*not a readable shard.*delete"):
        Store(store.folder, "me", LAYOUT)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty"])
def test_a_damaged_shard_is_named(store, damage):
    path = max(store.folder.glob("cells-*"))
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flip": flipped, "cut": whole[:-10], "empty": b""}[damage])
    with pytest.raises(CacheError, match=rf"{path.name}.*delete {re.escape(str(store.folder))}"):
        Store(store.folder, "me", LAYOUT)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"format": 2, "owner": "x"}', "\xff"])
def test_a_malformed_manifest_is_named(store, content):
    path = store.folder / "manifest.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(CacheError, match=rf"{re.escape(str(path))}.*delete"):
        Store(store.folder, "me", LAYOUT)


BROKEN_ENTRIES = {
    "no list": lambda manifest: manifest.update(shards=None),
    "no entry": lambda manifest: manifest["shards"].append(3),
    "no checksum": lambda manifest: manifest["shards"][0].pop("sha256"),
    "file no name": lambda manifest: manifest["shards"][0].update(file=5),
    "unknown kind": lambda manifest: manifest["shards"][0].update(kind="sounds"),
    "other records": lambda manifest: manifest["shards"][0].update(records=9),
}


@pytest.mark.parametrize("case", BROKEN_ENTRIES)
def test_a_manifest_with_a_broken_entry_is_refused(store, case):
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    BROKEN_ENTRIES[case](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="delete"):
        Store(store.folder, "me", LAYOUT)


# Interruptions


@pytest.mark.parametrize("moment", ["save_file", "file_digest", "sync", "os.replace", "json.dumps"])
def test_an_exception_while_writing_leaves_the_store_as_it_was(store, monkeypatch, moment):
    names = {path.name for path in store.folder.iterdir()}
    before = (store.folder / "manifest.json").read_bytes()

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"tdlib.core.store.{moment}", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(store, [4])
    assert (store.folder / "manifest.json").read_bytes() == before
    left = {path.name for path in store.folder.iterdir()} - {*names, ".lock"}
    assert all(name.endswith(".safetensors") for name in left)  # a whole, unlisted shard at most
    fill(store, [4])
    assert_stored(Store(store.folder, "me", LAYOUT), [3, 0, 1, 7, 4])


def kill_writer(store: Store, moment: str, call: int, after: bool) -> None:
    """A child process writes two shards and is killed around one call of a function of the store's."""
    owner, name = (os, "replace") if moment == "replace" else (module, moment)
    real, calls = getattr(owner, name), []

    def kill(*args, **options):
        calls.append(name)
        if len(calls) < call:
            return real(*args, **options)
        if after:
            real(*args, **options)
        if moment == "save_file" and after:  # half written
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            setattr(owner, name, kill)
            fill(store, [10, 11])
            fill(store, [12, 13])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("moment", "call", "after", "stored"),
    [
        ("save_file", 1, True, 0),
        ("save_file", 2, False, 2),
        ("replace", 1, False, 0),
        ("replace", 1, True, 0),  # the shard is there, the manifest does not list it
        ("replace", 2, False, 0),
        ("replace", 2, True, 2),
        ("replace", 4, True, 4),
        ("sync", 4, False, 2),
    ],
)
def test_a_killed_writer_leaves_a_store_that_can_be_completed(store, moment, call, after, stored):
    kill_writer(store, moment, call, after)
    again = Store(store.folder, "me", LAYOUT)
    assert again.count("cells") == 4 + stored
    fill(again, [10, 11, 12, 13])
    assert_stored(Store(store.folder, "me", LAYOUT), [3, 0, 1, 7, 10, 11, 12, 13])


def test_two_writers_lose_nothing(store):
    first, second = Store(store.folder, "me", LAYOUT), Store(store.folder, "me", LAYOUT)
    fill(first, [4])
    fill(second, [5])
    fill(first, [6])
    assert_stored(Store(store.folder, "me", LAYOUT), [3, 0, 1, 7, 4, 5, 6])


# Digests and fingerprints


def test_what_another_process_has_stored_is_not_missing(store):
    other = Store(store.folder, "me", LAYOUT)
    fill(other, [5])
    assert store.missing("cells", [record_key("5"), record_key("6")]) == [record_key("6")]
    assert_stored(store, [5, 7])
    assert store.count("cells") == other.count("cells") == 5


def test_a_files_digest_is_computed_again_when_it_has_changed(tmp_path, monkeypatch):
    path, digests, asked = tmp_path / "file", FileDigests(), []
    monkeypatch.setattr(module, "file_digest", lambda path: asked.append(path) or file_digest(path))
    path.write_text("one")
    assert digests(path) == digests(path) == file_digest(path) and len(asked) == 1
    path.write_text("three")
    assert digests(path) == file_digest(path) and len(asked) == 2
    with pytest.raises(FileNotFoundError):
        digests(tmp_path / "nothing")


def test_a_fingerprint_tells_weights_and_settings_but_not_precision():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.weight.data = layer.weight.data.half().float()
    layer.bias.data = layer.bias.data.half().float()
    first = fingerprint(layer, size=3)
    assert first == fingerprint(layer, size=3) != fingerprint(layer, size=4)
    assert first == fingerprint(layer.half(), size=3)
    layer.bias.data[1] += 1
    assert first != fingerprint(layer, size=3)
    assert fingerprint(layer, "bias") == fingerprint(nn.Sequential(layer)[0], "bias")
    layer.bias.data[1] += 1
    assert len({fingerprint(layer, "bias"), fingerprint(layer)}) == 2


def test_keys_are_digests_of_strings_even_of_broken_ones():
    assert len({record_key("a"), record_key("b"), record_key("a", "b"), record_key("\ud800")}) == 4
    assert np.frombuffer(record_key("a"), "S32").shape == (1,)
