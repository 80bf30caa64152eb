"""UNITER's databases of region features: VCR's annotated and detected regions, cuts by confidence, damage."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from region_writers import HEIGHT, WIDTH, example_of, fields_of, packed, seen, write_lmdb, zipped
from torch.testing import assert_close

from tdlib.data.examples import DataError, Example
from tdlib.regions.sources import open_regions

VCR = "lsmdc_3015/3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0.jpg"


def vcr_world(folder: Path) -> tuple[Example, np.ndarray, np.ndarray]:
    """A VCR example whose annotated and detected regions are in two LMDBs, and their features."""
    stem, (annotated, boxes), (detected, other) = Path(VCR).stem, seen("gt", 3), seen("detected", 11)
    for split, record in (("vcr_gt_train", (annotated, boxes)), ("vcr_train", (detected, other))):
        name = "feat_numbb100" if "gt" in split else "feat_th0.2_max100_min10"
        write_lmdb(folder / split / name, {f"{split}_{stem}.npz": fields_of(*record)}, zipped)
    places = [tuple(box) for box in (boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()]
    return example_of(VCR, places), annotated, detected


def test_annotated_regions_of_vcr_come_first_and_are_its_objects(tmp_path):
    example, annotated, detected = vcr_world(tmp_path)
    regions = open_regions(f"lmdb:{tmp_path / 'vcr_train'},{tmp_path / 'vcr_gt_train'}")(example)
    assert regions.objects.tolist() == [0, 1, 2, *[-1] * 11]
    assert_close(regions.features, torch.tensor(np.concatenate([annotated, detected])), rtol=0, atol=2e-3)
    assert_close(regions.boxes[:3], torch.tensor(example.boxes), rtol=0, atol=1e-3)
    only = open_regions(f"lmdb:{tmp_path / 'vcr_gt_train'}")(example)
    assert only.objects.tolist() == [0, 1, 2]


def test_annotated_regions_of_other_objects_are_refused(tmp_path):
    example, _, _ = vcr_world(tmp_path)
    source = open_regions(f"lmdb:{tmp_path / 'vcr_gt_train'},{tmp_path / 'vcr_train'}")
    source.require([example])
    with pytest.raises(DataError, match=r"no regions of other\.jpg .*\(1 of 2 are missing\)"):
        source.require([example, replace(example, image=Path("other.jpg"))])
    turned = replace(example, boxes=example.boxes[::-1])
    for other in (turned, replace(example, boxes=example.boxes[:2]), replace(example, boxes=())):
        with pytest.raises(DataError, match=r"3 annotated boxes, which are not the \d objects of example"):
            source(other)
    with pytest.raises(DataError, match=r"looked for 'vcr_gt_train_.*', 'vcr_train_"):
        source(replace(example, image=Path("other@0.jpg")))


@pytest.mark.parametrize(("sure", "expected"), [(3, 10), (14, 14), (120, 100)])
@pytest.mark.parametrize("pack", [packed, zipped])
def test_a_database_of_all_regions_is_cut_by_confidence(tmp_path, sure, expected, pack):
    """num_bb = clip(#(conf > 0.2), 10, 100), as UNITER has it."""
    features, boxes = seen("x", 120)
    confidence = np.where(np.arange(120) < sure, 0.5, 0.1)
    fields = {"flickr30k_000000000123.npz": fields_of(features, boxes, confidence)}
    write_lmdb(tmp_path / "flickr30k/all", fields, pack)
    regions = open_regions(f"lmdb:{tmp_path / 'flickr30k'}")(example_of("123.jpg"))
    assert_close(regions.features, torch.tensor(features[:expected]), rtol=0, atol=2e-3)


def test_a_database_of_36_regions_is_cut_at_36(tmp_path):
    fields = {"flickr30k_000000000123.npz": fields_of(*seen("x", 40))}
    path = write_lmdb(tmp_path / "feat_numbb36", fields, packed)
    assert len(open_regions(f"lmdb:{path}")(example_of("123.jpg")).boxes) == 36


def test_a_database_that_was_replaced_is_opened_again(tmp_path):
    read = []
    for count in (12, 20):
        shutil.rmtree(tmp_path / "all", ignore_errors=True)
        fields = {"flickr30k_000000000123.npz": fields_of(*seen("x", count))}
        path = write_lmdb(tmp_path / "all", fields, packed)
        regions = open_regions(f"lmdb:{path}")
        read.append(len(regions(example_of("123.jpg")).boxes))
    assert read == [12, 20]
    shutil.rmtree(path)
    with pytest.raises(DataError, match=r"cannot be read"):
        regions(example_of("123.jpg"))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no LMDB"):
        open_regions(f"lmdb:{tmp_path}")
    record = {"coco_train2014_000000000009.npz": fields_of(*seen("x"))}
    for name in ("feat_numbb36", "all"):
        write_lmdb(tmp_path / "two" / name, record, packed)
    with pytest.raises(DataError, match=r"holds all, feat_numbb36; expected one LMDB"):
        open_regions(f"lmdb:{tmp_path / 'two'}")
    with pytest.raises(DataError, match=r"first key is b'000123'"):
        open_regions(f"lmdb:{write_lmdb(tmp_path / 'text', {'000123': {}}, packed)}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/data.mdb").write_bytes(b"no" * 9000)
    with pytest.raises(DataError, match=r"cannot be read"):
        open_regions(f"lmdb:{tmp_path / 'damaged'}")


def objects_packed(_fields) -> bytes:
    import msgpack

    array = {b"nd": True, b"type": b"|O", b"kind": b"O", b"shape": (1,), b"data": pickle.dumps([1])}
    return msgpack.packb({"features": array, "norm_bb": array}, use_bin_type=True)


@pytest.mark.parametrize(
    "pack",
    [
        lambda fields: zipped(fields)[:500],
        lambda fields: packed(fields)[:500],
        lambda fields: packed({"features": fields["features"]}),
        lambda _: b"",
        objects_packed,
    ],
)
def test_a_damaged_lmdb_record_is_refused(tmp_path, pack):
    path = write_lmdb(tmp_path / "all", {"flickr30k_000000000123.npz": fields_of(*seen("x"))}, pack)
    with pytest.raises(DataError, match=r"'flickr30k_000000000123\.npz': not a record"):
        open_regions(f"lmdb:{path}")
