"""Regions: every reader on files of its official layout, RoIAlign, backbones, the cache."""

import base64
import io
import json
import multiprocessing
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from tdlib.core.store import CacheError, NotFiniteError
from tdlib.data.examples import DataError, Example, TextPart
from tdlib.method.tokens import grid_boxes
from tdlib.regions.backbones import (
    DetectorBackbone,
    MiniDetector,
    TorchvisionBackbone,
    load_detector,
    pool_regions,
    save_detector,
)
from tdlib.regions.computed import BackboneRegions, CachedRegions, ClipGridRegions, open_regions
from tdlib.regions.convert import convert
from tdlib.regions.convert import main as convert_command
from tdlib.regions.files import picture_keys
from tdlib.teacher.cache import TeacherCache

DIM, WIDTH, HEIGHT = 8, 640, 480
NAMES = {  # file name of the picture -> COCO's number
    "COCO_train2014_000000000009.jpg": 9,
    "COCO_train2014_000000123456.jpg": 123456,
    "COCO_train2014_000000581921.jpg": 581921,
}


def example_of(name: str, boxes=()) -> Example:
    return Example(
        f"id of {name}", Path("pictures") / name, tuple(boxes), ("person",) * len(boxes), TextPart("?"), (),
        None, "",
    )  # fmt: skip


def seen(name: str, count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Random features and boxes (pixels, xyxy) of a picture; the first box is the whole picture."""
    rng = np.random.default_rng(len(name) + sum(name.encode()))
    corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4) * ([WIDTH, HEIGHT] * 2)
    corners[0] = [0, 0, WIDTH, HEIGHT]
    return rng.standard_normal((count, DIM)).astype(np.float32), corners.astype(np.float32)


def encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def tsv_line(name: str, features: np.ndarray, boxes: np.ndarray) -> str:
    return "\t".join(
        [str(NAMES[name]), str(WIDTH), str(HEIGHT), str(len(boxes)), encoded(boxes), encoded(features)]
    )


def lxmert_line(name: str, features: np.ndarray, boxes: np.ndarray) -> str:
    number = len(boxes)
    ids, confidence = encoded(np.zeros(number, np.int64)), encoded(np.ones(number, np.float32))
    size = [str(HEIGHT), str(WIDTH)]
    return "\t".join(
        [
            Path(name).stem,
            *size,
            ids,
            confidence,
            ids,
            confidence,
            str(number),
            encoded(boxes),
            encoded(features),
        ]
    )


def write_lines(line, file: str):
    def write(folder: Path, records) -> Path:
        (folder / file).write_text("".join(f"{line(name, *record)}\n" for name, record in records.items()))
        return folder / file

    return write


def write_npz(folder: Path, records) -> Path:
    for name, (features, boxes) in records.items():
        np.savez_compressed(
            folder / f"{Path(name).stem}.npz", x=features, bbox=boxes, num_bbox=len(boxes), image_h=HEIGHT,
            image_w=WIDTH, info=np.array({"objects_id": [1]}, dtype=object),
        )  # fmt: skip
    return folder


def write_hdf5(folder: Path, records, mapping: bool = True) -> Path:
    h5py = pytest.importorskip("h5py")
    features, boxes = (np.stack(column) for column in zip(*records.values(), strict=True))
    places = boxes / np.array([WIDTH, HEIGHT] * 2, np.float32)
    with h5py.File(folder / "train36.hdf5", "w") as file:
        file["image_features"], file["image_bb"] = features, boxes
        file["spatial_features"] = np.concatenate([places, places[..., 2:] - places[..., :2]], -1)
    if mapping:
        rows = {str(NAMES[name]): row for row, name in enumerate(records)}
        (folder / "train36_imgid2idx.json").write_text(json.dumps(rows))
    return folder / "train36.hdf5"


def packed(fields: dict[str, np.ndarray]) -> bytes:
    """As msgpack_numpy writes a dictionary of arrays."""
    import msgpack

    return msgpack.packb(
        {
            name: {b"nd": True, b"type": v.dtype.str, b"kind": b"", b"shape": v.shape, b"data": v.tobytes()}
            for name, v in fields.items()
        },
        use_bin_type=True,
    )


def zipped(fields: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **fields, allow_pickle=True)
    return buffer.getvalue()


def write_lmdb(path: Path, records: dict[str, dict[str, np.ndarray]], pack) -> Path:
    lmdb, _ = pytest.importorskip("lmdb"), pytest.importorskip("msgpack")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, fields in records.items():
            transaction.put(key.encode(), pack(fields))
        transaction.put(b"__keys__", json.dumps(list(records)).encode())
    return path


def fields_of(features: np.ndarray, boxes: np.ndarray, confidence=None) -> dict[str, np.ndarray]:
    places = boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    confidence = np.full(len(boxes), 0.9) if confidence is None else confidence
    fields = {
        "features": features,
        "norm_bb": np.concatenate([places, places[:, 2:] - places[:, :2]], 1),
        "conf": confidence,
        "soft_labels": np.zeros((len(boxes), 3)),
    }
    return {name: value.astype(np.float16) for name, value in fields.items()}


def write_uniter(pack):
    def write(folder: Path, records) -> Path:
        fields = {f"{Path(n).stem.lower()}.npz": fields_of(*record) for n, record in records.items()}
        write_lmdb(folder / "coco_train2014/feat_th0.2_max100_min10", fields, pack)
        return folder / "coco_train2014"

    return write


WRITERS = {
    "tsv": write_lines(tsv_line, "trainval_36.tsv"),
    "lxmert": write_lines(lxmert_line, "train2014_obj36.tsv"),
    "npz": write_npz,
    "hdf5": write_hdf5,
    "lmdb": write_uniter(packed),
    "lmdb compressed": write_uniter(zipped),
}
CONVERTED = ("tsv", "lxmert", "hdf5")
each_kind = pytest.mark.parametrize("kind", WRITERS)


def opened(kind: str, folder: Path, records=None):
    path = WRITERS[kind](folder, records or {name: seen(name) for name in NAMES})
    if kind in CONVERTED:
        convert(kind, path, folder / "npz")
        return open_regions(f"npz:{folder / 'npz'}")
    return open_regions(f"{kind.split()[0]}:{path}")


# Files.


@each_kind
def test_a_reader_gives_what_the_detector_wrote(kind, tmp_path):
    source = opened(kind, tmp_path)
    again = pickle.loads(pickle.dumps(source))
    assert source.dim == again.dim == DIM
    half = {"rtol": 0, "atol": 2e-3} if "lmdb" in kind else {"rtol": 0, "atol": 1e-6}
    for name in reversed(NAMES):
        features, boxes = seen(name)
        expected = torch.tensor(boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]).float()
        for regions in (source(example_of(name)), again(example_of(name))):
            assert regions.features.dtype == regions.boxes.dtype == torch.float32
            assert_close(regions.features, torch.tensor(features), **half)
            assert_close(regions.boxes, expected, **half)
            assert regions.objects.tolist() == [-1] * len(boxes)


@each_kind
def test_a_reader_serves_forked_workers(kind, tmp_path):
    source, examples = opened(kind, tmp_path), [example_of(name) for name in NAMES]
    expected = [source(example).features for example in examples]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.map(source, examples)
    assert all(
        torch.equal(regions.features, features) for regions, features in zip(found, expected, strict=True)
    )
    assert torch.equal(source(examples[0]).features, expected[0])  # the parent's own is not disturbed


@each_kind
def test_a_picture_without_regions_is_named(kind, tmp_path):
    source = opened(kind, tmp_path)
    with pytest.raises(DataError, match=r"no regions of COCO_train2014_000000000010\.jpg .*Add a"):
        source(example_of("COCO_train2014_000000000010.jpg"))


@each_kind
def test_boxes_are_clipped_to_the_picture(kind, tmp_path):
    (name, *_), over = NAMES, 5
    features, boxes = seen(name)
    boxes[1] = [-over, 10, WIDTH + over, HEIGHT + over]
    regions = opened(kind, tmp_path, {name: (features, boxes)})(example_of(name))
    assert_close(regions.boxes[1], torch.tensor([0, 10 / HEIGHT, 1, 1]), rtol=0, atol=1e-3)


def nan(features, boxes):
    features[3, 2] = np.nan
    return features, boxes


def outside(features, boxes):
    boxes[4] = [10, 10, WIDTH * 1.5, 20]
    return features, boxes


def inverted(features, boxes):
    boxes[4] = [50, 10, 40, 20]
    return features, boxes


def narrow(features, boxes):
    return features[:, :5], boxes


BAD = {
    nan: r"features hold NaN",
    outside: r"box 4 is .*within the picture",
    inverted: r"box 4 is .*x1, y1, x2, y2",
    narrow: r"5 wide, expected 8",
}


@each_kind
@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_a_bad_record_is_refused_and_named(kind, damage, tmp_path):
    first, second, _ = NAMES
    if kind == "hdf5" and damage is narrow:
        pytest.skip("one array holds all pictures")
    bad = damage(*(array.copy() for array in seen(second)))
    with pytest.raises(DataError, match=BAD[damage]) as found:
        opened(kind, tmp_path, {first: seen(first), second: bad})(example_of(second))
    assert str(tmp_path) in str(found.value)
    assert str(NAMES[second]) in str(found.value) or "line 2" in str(found.value)
    if kind in CONVERTED:  # what was read before is there
        assert len(list((tmp_path / "npz").iterdir())) == 1


def test_folders_are_asked_in_turn(tmp_path):
    first, second, third = NAMES
    for folder, names in (("a", [first, second]), ("b", [second, third])):
        (tmp_path / folder).mkdir()
        write_npz(tmp_path / folder, {name: seen(name, 12 if folder == "a" else 5) for name in names})
    source = open_regions(f"npz:{tmp_path / 'a'},{tmp_path / 'b'}")
    assert [len(source(example_of(name)).boxes) for name in NAMES] == [12, 12, 5]


def test_a_comma_in_a_folders_name_does_not_split_it(tmp_path):
    records = {name: seen(name) for name in NAMES}
    first, *_ = records
    for folder, names in (("a,b", [first]), ("c , d", list(records)[1:])):
        (tmp_path / folder).mkdir()
        write_npz(tmp_path / folder, {name: records[name] for name in names})
    both = open_regions(f"npz:{tmp_path / 'a,b'}, {tmp_path / 'c , d'}")
    for name, (features, _) in records.items():
        assert_close(both(example_of(name)).features, torch.from_numpy(features))
    assert len(open_regions(f"npz:{tmp_path / 'a,b'}")(example_of(first)).boxes) == 12
    with pytest.raises(DataError, match="a: no such file"):
        open_regions(f"npz:{tmp_path / 'a'},{tmp_path / 'c , d'}")


def test_names_of_pictures():
    assert picture_keys(Path("x/COCO_val2014_000000000042.jpg")) == ["COCO_val2014_000000000042", "42"]
    assert picture_keys(Path("1000092795.jpg")) == ["1000092795"]
    assert picture_keys(Path("0000123.jpg")) == ["0000123", "123"]
    vcr = "3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0"
    assert picture_keys(Path(f"lsmdc/{vcr}.jpg")) == [vcr]


# Conversion


def test_a_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    first, second, _ = NAMES
    path = WRITERS["tsv"](tmp_path, {first: seen(first), second: seen(second)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    arguments = ["convert", "tsv", str(path), str(tmp_path / "npz")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match=rf"{path.name}, line 2: .*copy the file again"):
        convert_command()
    written = tmp_path / "npz" / f"{NAMES[first]}.npz"
    stamp = written.stat().st_mtime_ns
    path.write_bytes(whole)
    convert_command()
    assert "1 pictures written" in capsys.readouterr().out and written.stat().st_mtime_ns == stamp
    source = open_regions(f"npz:{tmp_path / 'npz'}")
    assert source(example_of(second)).size == (WIDTH, HEIGHT)
    with pytest.raises(DataError, match=r"python -m tdlib.regions.convert tsv .*tsv FOLDER; then give npz:"):
        open_regions(f"tsv:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id image_w image_h\n", r"line 1: 1 columns, expected 6 .*10 are LXMERT's"),
        ("", "holds no records"),
        ("image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures\n", "line 1: sizes are not integers"),
        ("1\t2\t3\t4\t5\n", r"5 columns"),
    ],
)
def test_a_tsv_of_another_layout_is_refused(tmp_path, text, message):
    (tmp_path / "file.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        convert("tsv", tmp_path / "file.tsv", tmp_path / "npz")
    with pytest.raises(DataError, match=r"nothing\.tsv: no such file"):
        convert("tsv", tmp_path / "nothing.tsv", tmp_path / "npz")


def test_hdf5_takes_its_rows_from_a_mapping_or_its_own_ids(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write_hdf5(tmp_path, {name: seen(name) for name in NAMES}, mapping=False)
    (tmp_path / "train36_imgid2idx.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match=r"no .*train36_imgid2idx\.json.*convert it: python -c"):
        convert("hdf5", path, tmp_path / "npz")
    with h5py.File(path, "a") as file:
        file["image_ids"] = list(NAMES.values())
    assert convert("hdf5", path, tmp_path / "npz") == len(NAMES)
    source = open_regions(f"npz:{tmp_path / 'npz'}")
    for name in NAMES:
        assert_close(source(example_of(name)).features, torch.tensor(seen(name)[0]))
        assert source(example_of(name)).size is None  # such files do not tell


@pytest.mark.parametrize("rows", ["[0, 1]", "{", '{"9": 3}', '{"9": "0"}', "{}"])
def test_a_bad_mapping_is_refused(rows, tmp_path):
    path = write_hdf5(tmp_path, {name: seen(name) for name in NAMES})
    (tmp_path / "train36_imgid2idx.json").write_text(rows)
    with pytest.raises(DataError, match="train36"):
        convert("hdf5", path, tmp_path / "npz")


def test_other_hdf5_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "text.hdf5").write_text("no")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["image_features"], file["spatial_features"] = np.zeros((3, 2, 8)), np.zeros((3, 2, 4))
    for name in ("text", "other"):
        with pytest.raises(DataError, match=rf"{name}\.hdf5: not an HDF5 file of regions"):
            convert("hdf5", tmp_path / f"{name}.hdf5", tmp_path / "npz")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    (tmp_path / "x.hdf5").write_bytes(b"")
    for package, ask in (
        ("lmdb", lambda: open_regions(f"lmdb:{tmp_path}")),
        ("h5py", lambda: convert("hdf5", tmp_path / "x.hdf5", tmp_path / "npz")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"clip-td-workbench\[regions\]"):
            ask()


# NPZ


@pytest.mark.parametrize("file", ["{name}.npz", "{number}.npz", "{stem}.npz"])
def test_npz_of_every_naming_and_orientation(file, tmp_path):
    """MCAN's files are called by the picture's whole name and hold features as (dim, regions)."""
    name = next(iter(NAMES))
    features, boxes = seen(name)
    path = tmp_path / file.format(name=name, number=NAMES[name], stem=Path(name).stem)
    with path.open("wb") as stream:
        np.savez(stream, x=features.T, bbox=boxes, num_bbox=len(boxes), image_h=HEIGHT, image_w=WIDTH)
    assert_close(open_regions(f"npz:{tmp_path}")(example_of(name)).features, torch.tensor(features))


def test_a_damaged_npz_is_refused_and_nothing_is_unpickled(tmp_path):
    name = next(iter(NAMES))
    source = opened("npz", tmp_path)
    path = tmp_path / f"{Path(name).stem}.npz"
    objects = np.array([{"a": 1}] * 2, dtype=object)
    for damage in (
        lambda: path.write_bytes(path.read_bytes()[:200]),
        lambda: path.write_bytes(b""),
        lambda: np.savez(path, x=np.zeros((1, DIM)), bbox=np.zeros((1, 4))),
        lambda: np.savez(path, x=objects, bbox=objects, num_bbox=2, image_h=1, image_w=1),
    ):
        damage()
        with pytest.raises(DataError, match=rf"{path.name}: not an NPZ of regions"):
            source(example_of(name))
    with pytest.raises(DataError, match=r"holds no \.npz"):
        (tmp_path / "empty").mkdir()
        open_regions(f"npz:{tmp_path / 'empty'}")


# LMDB

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
    with pytest.raises(DataError, match=r"not a readable LMDB"):
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


# RoIAlign


def test_roi_align_of_a_ramp_is_where_the_box_is():
    """Of a map that holds its own coordinates, a box's mean is its centre; cell centres are at halves."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    ramp = torch.stack([x + 0.5, y + 0.5])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.3, 0.25, 0.35, 0.3], [0.2, 0.5, 0.8, 0.75]])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 * torch.tensor([20.0, 12.0])
    for bins in (1, 3, 7):
        assert_close(pool_regions(ramp[None], [boxes], bins).mean((2, 3)), centres, rtol=0, atol=1e-4)
    bins = pool_regions(ramp[None], [boxes], 2)  # their order: rows, then columns
    assert bool((bins[:, 0, :, 0] < bins[:, 0, :, 1]).all() and (bins[:, 1, 0] < bins[:, 1, 1]).all())


def test_roi_align_of_cells_is_their_own_mean():
    feature_map = torch.rand(5, 12, 8)
    pooled = pool_regions(feature_map[None], [grid_boxes(3, 2)], 2).mean((2, 3))
    expected = feature_map.view(5, 3, 4, 2, 4).mean((2, 4)).flatten(1).T
    assert_close(pooled, expected)


def test_grid_boxes_tile_the_picture():
    boxes = grid_boxes(2, 3)
    assert_close(boxes[1], torch.tensor([1 / 3, 0, 2 / 3, 0.5]))
    assert_close(boxes[3], torch.tensor([0, 0.5, 1 / 3, 1]))
    assert_close((boxes[:, 2:] - boxes[:, :2]).prod(-1).sum(), torch.tensor(1.0))


# Backbones


@pytest.fixture(scope="module")
def example(world) -> Example:
    from tdlib.data.vcr import VcrReader

    return next(e for e in VcrReader(world, "train").read() if len(e.boxes) >= 3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_a_torchvision_backbone_reads_the_last_map(resnet):
    model, path = resnet
    backbone = TorchvisionBackbone("resnet18", path, size=224)
    assert backbone.dim == 512
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / deviation
    with torch.inference_mode():
        feature_map = torch.nn.Sequential(*list(model.children())[:-2])(pixels[None])[0]
    assert_close(backbone(picture, torch.tensor([[0.0, 0, 1, 1]]))[0], feature_map.mean((1, 2)))
    cells = backbone(picture, grid_boxes(7, 7))
    nearest = torch.cdist(cells, feature_map.flatten(1).T).argmin(1)
    assert (nearest == torch.arange(49)).float().mean() > 0.9  # row by row


@pytest.mark.parametrize(
    ("size", "expected"), [((500, 375), (288, 224)), ((100, 400), (96, 384)), ((900, 900), (224, 224))]
)
def test_pictures_keep_their_shape_up_to_a_stride(resnet, size, expected, monkeypatch):
    """The shorter side has 224 pixels unless the longer one would have more than 5/3 of that."""
    backbone, shapes = TorchvisionBackbone("resnet18", resnet[1], size=224), []
    monkeypatch.setattr(
        backbone, "feature_map", lambda pixels: shapes.append(pixels.shape) or pixels[:, :, ::32, ::32]
    )
    backbone(Image.new("RGB", size), grid_boxes(1, 1))
    assert shapes == [(1, 3, expected[1], expected[0])]


def test_weights_may_lack_the_classifier_and_nothing_else(resnet, tmp_path, example):
    model, path = resnet
    state = model.state_dict()
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "parallel.pth")
    random_numbers = torch.random.get_rng_state()
    a, b, c = (
        open_regions(f"boxes:resnet18@{file}")
        for file in (path, tmp_path / "body.safetensors", tmp_path / "parallel.pth")
    )
    assert a.fingerprint == b.fingerprint == c.fingerprint
    assert torch.equal(a(example).features, b(example).features)
    assert torch.equal(torch.random.get_rng_state(), random_numbers)
    save_file({k: v for k, v in body.items() if "layer4" not in k}, tmp_path / "less.safetensors")
    save_file(body | {"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no")
    torch.save({"state_dict": body, "path": Path("x")}, tmp_path / "objects.pth")
    for name, file, message in (
        ("resnet18", "less.safetensors", r"cannot be loaded into resnet18 .*\n?.*Missing key.*layer4"),
        ("resnet18", "other.safetensors", r"cannot be loaded into resnet18 .*\n?.*size mismatch for conv1"),
        ("resnet18", "damaged.pth", "cannot be loaded"),
        ("resnet18", "objects.pth", "could run any code and are not read"),
        ("resnet18", "nowhere.pth", "cannot be loaded"),
        ("resnet81", "body.safetensors", "one such as resnet18"),
        ("squeezenet1_1", "body.safetensors", "no map before an avgpool"),
    ):
        with pytest.raises(DataError, match=message):
            open_regions(f"boxes:{name}@{tmp_path / file}")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "detector"
    save_detector(MiniDetector({"name": ["person", "cup"], "shirt": ["red"]}, size=32, dim=16), folder)
    return folder


@pytest.mark.parametrize("layout", ["boxes", "grid", "boxes+grid"])
def test_the_whole_picture_comes_first_then_boxes_then_cells(detector_folder, example, layout):
    source = open_regions(f"{layout}:{detector_folder}", grid=(2, 3))
    regions = source(example)
    own, number = torch.tensor(example.boxes), len(example.boxes)
    expected, objects = [torch.tensor([[0.0, 0, 1, 1]])], [-1]
    if "boxes" in layout:
        expected, objects = [*expected, own], [*objects, *range(number)]
    if "grid" in layout:
        expected, objects = [*expected, grid_boxes(2, 3)], [*objects, *[-1] * 6]
    assert torch.equal(regions.boxes, torch.cat(expected)) and regions.objects.tolist() == objects
    assert regions.features.shape == (len(objects), source.dim)
    assert len({tuple(row) for row in regions.features.tolist()}) > len(objects) // 2  # they differ
    without = source(replace(example, boxes=(), names=()))
    assert len(without.boxes) == 1 + 6 * ("grid" in layout)
    assert_close(without.features[0], regions.features[0])
    assert not regions.features.is_inference()  # a student trains on them


@pytest.mark.parametrize("size", [(4000, 8), (1, 120), (1, 1)])
def test_the_longest_and_thinnest_pictures_have_regions(detector_folder, resnet, example, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    thin = replace(example, image=tmp_path / "thin.png")
    spec = f"boxes+grid:{detector_folder}"
    detected = open_regions(spec)(thin)
    seen_by_resnet = open_regions(f"boxes+grid:resnet18@{resnet[1]}")(thin)
    for regions in (detected, seen_by_resnet):
        assert regions.features.isfinite().all() and len(regions.features) == 1 + len(thin.boxes) + 36
        assert regions.size == size


def test_regions_are_what_their_boxes_show(detector_folder, example):
    """A region's features depend on its own box only, not on the order or on the others."""
    backbone = DetectorBackbone(load_detector(detector_folder))
    with Image.open(example.image) as picture:
        boxes = grid_boxes(3, 3)
        together = backbone(picture.convert("RGB"), boxes)
        order = torch.randperm(9)
        assert_close(backbone(picture.convert("RGB"), boxes[order]), together[order], rtol=0, atol=1e-5)
        assert_close(backbone(picture.convert("RGB"), boxes[4:5]), together[4:5], rtol=0, atol=1e-5)


def test_a_detector_is_saved_and_loaded(detector_folder, tmp_path):
    detector = load_detector(detector_folder)
    save_detector(detector, tmp_path)
    again = load_detector(tmp_path)
    pixels, boxes = torch.randint(0, 255, (2, 3, 32, 32)), [grid_boxes(2, 2), grid_boxes(1, 1)]
    with torch.no_grad():
        features = detector(pixels, boxes)
        assert features.shape == (5, 16) and torch.equal(features, again(pixels, boxes))
    assert {name: votes.shape[1] for name, votes in again.logits(features).items()} == {"name": 2, "shirt": 1}
    for damage in (
        lambda: (tmp_path / "model.safetensors").write_bytes(b"no"),
        lambda: (tmp_path / "config.json").write_text('{"model_type": "vilt"}'),
        lambda: (tmp_path / "config.json").unlink(),
    ):
        damage()
        with pytest.raises(DataError, match=r"not a mini detector .*MODEL@WEIGHTS"):
            open_regions(f"boxes:{tmp_path}")


def test_a_detector_learns_what_stands_in_its_boxes(tmp_path):
    from tdlib.make.detector import ATTRIBUTES, evaluate_detector, train_mini_detector

    losses = train_mini_detector(tmp_path, scenes=64, steps=20, batch=16, size=48)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    figures = evaluate_detector(tmp_path, scenes=20)
    assert figures.keys() == ATTRIBUTES.keys() and all(0 <= value <= 1 for value in figures.values())
    made = json.loads((tmp_path / "provenance.json").read_text())
    assert made["steps"] == 20 and made["corpus"] == "curated"


def test_labels_are_true_of_their_boxes():
    """The picture inside a person's box has the colour of the shirt that the label names; things likewise."""
    from tdlib.make.detector import ATTRIBUTES, labelled_boxes
    from tdlib.miniworld.drawing import COLOURS, draw
    from tdlib.miniworld.writers import scene_at

    for index in range(40):
        scene = scene_at(3, "curated", index)
        picture = draw(scene)
        found = labelled_boxes(scene, picture)
        assert found[0] == ((0, 0, 1, 1), {"place": scene.place, "weather": scene.weather or "indoors"})
        for box, said in found:
            assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
            assert all(value in ATTRIBUTES[name] for name, value in said.items())
            if "shirt" in said:
                inside = np.array(picture.image.crop(tuple(round(256 * side) for side in box))).reshape(-1, 3)
                colour = [int(COLOURS[said["shirt"]][i : i + 2], 16) for i in (1, 3, 5)]
                assert (np.abs(inside - colour).max(1) < 8).mean() > 0.05
        names = [said["name"] for _, said in found if "name" in said]
        held = [person.held for person in scene.people if person.held]
        assert sorted(names) == sorted(["person"] * len(scene.people) + held + list(scene.things))


# CLIP's grid


def test_the_teachers_patches_are_regions(teacher, example, tmp_path):
    cache = TeacherCache(tmp_path, teacher)
    cache.add(pictures=[example.image])
    source = open_regions("clip", cache=cache)
    assert isinstance(source, ClipGridRegions) and source.dim == teacher.dim
    regions, record = source(example), cache.picture(example.image)
    assert torch.equal(regions.features, record.projected) and torch.equal(regions.boxes, record.positions)
    assert regions.objects.eq(-1).all()
    with pytest.raises(DataError, match="teacher's cache"):
        open_regions("clip")


# The cache of computed regions


class Counting:
    """A source that says how often it was asked."""

    dim, fingerprint = 4, "f" * 64

    def __init__(self):
        self.asked = 0

    def __call__(self, example):
        from tdlib.regions.computed import Regions

        self.asked += 1
        boxes = torch.tensor(example.boxes).reshape(-1, 4)
        with Image.open(example.image) as picture:
            features = torch.full((len(boxes), 4), float(np.asarray(picture).mean())) + torch.arange(4) / 8
        return Regions(features, boxes, torch.arange(len(boxes)))


@pytest.fixture
def pictures(tmp_path) -> list[Example]:
    made = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number * 10,) * 3).save(path)
        boxes = tuple((0.0, 0.0, 0.5, 0.1 * (1 + row)) for row in range(number + 1))
        made.append(replace(example_of(path.name, boxes), image=path))
    return made


def test_cached_regions_are_the_sources_and_computed_once(pictures, tmp_path):
    source = Counting()
    cached = CachedRegions(source, tmp_path / "cache")
    cached.add([*pictures, pictures[0]])
    assert source.asked == len(cached) == 5 and cached.dim == 4
    reopened = CachedRegions(source, tmp_path / "cache")
    reopened.add(pictures)
    assert source.asked == 5
    expected = [source(example) for example in pictures]
    for view in (cached, reopened, pickle.loads(pickle.dumps(reopened))):
        for example, regions in zip(pictures, expected, strict=True):
            found = view(example)
            assert torch.equal(found.features, regions.features) and found.features.dtype == torch.float32
            assert torch.equal(found.boxes, regions.boxes) and torch.equal(found.objects, regions.objects)


def test_other_boxes_pictures_and_sources_are_other_records(pictures, tmp_path):
    cached = CachedRegions(Counting(), tmp_path / "cache")
    cached.add(pictures)
    fewer = replace(pictures[3], boxes=pictures[3].boxes[:2])
    with pytest.raises(CacheError, match=r"call add\(\)"):
        cached(fewer)
    cached.add([fewer])
    assert len(cached(fewer).boxes) == 2 and len(cached(pictures[3]).boxes) == 4
    Image.new("RGB", (8, 8), "white").save(pictures[0].image)
    with pytest.raises(CacheError, match=r"no regions of example"):
        cached(pictures[0])
    cached.add([pictures[0]])
    assert cached(pictures[0]).features[0, 0] == 255
    other = Counting()
    other.fingerprint = "e" * 64
    assert len(CachedRegions(other, tmp_path / "cache")) == 0
    pictures[1].image.unlink()
    with pytest.raises(DataError, match="picture is missing"):
        cached(pictures[1])


def test_features_that_are_not_finite_are_not_stored(pictures, tmp_path):
    source = Counting()
    cached = CachedRegions(source, tmp_path / "cache")
    source.__class__ = type("Infinite", (Counting,), {
        "__call__": lambda self, e: replace(Counting.__call__(self, e), features=torch.full((1, 4), 1e9)),
    })  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"0\.png"):
        cached.add(pictures[:1])
    assert len(CachedRegions(Counting(), tmp_path / "cache")) == 0


def test_a_backbone_and_its_layout_are_part_of_the_fingerprint(detector_folder, tmp_path, example):
    sources = [
        open_regions(f"boxes:{detector_folder}"), open_regions(f"grid:{detector_folder}"),
        open_regions(f"grid:{detector_folder}", grid=(2, 2)),
    ]  # fmt: skip
    changed = load_detector(detector_folder)
    with torch.no_grad():
        changed.region.bias[0] += 1
    sources.append(BackboneRegions(DetectorBackbone(changed)))
    assert len({source.fingerprint for source in sources}) == 4
    assert open_regions(f"boxes:{detector_folder}").fingerprint == sources[0].fingerprint
    cached = CachedRegions(sources[0], tmp_path)
    cached.add([example])
    assert cached(example).size == sources[0](example).size == Image.open(example.image).size
    assert_close(cached(example).features, sources[0](example).features, rtol=1e-3, atol=1e-3)


# Specs


@pytest.mark.parametrize("spec", ["", "lmdb", "lmdb:", "butd:x", "clip:x", "boxes:", "/some/file.tsv"])
def test_an_unknown_spec_lists_what_is_accepted(spec):
    with pytest.raises(DataError, match=r"lmdb:FOLDER.*npz:.*boxes:BACKBONE.*clip"):
        open_regions(spec)


@pytest.mark.parametrize("kind", ["lmdb", "npz"])
def test_a_path_that_is_not_there_is_named(kind):
    with pytest.raises(DataError, match=r"nowhere/x: no such file or folder; expected an? "):
        open_regions(f"{kind}:nowhere/x")
    with pytest.raises(DataError, match="no file of regions given"):
        open_regions(f"{kind}:,")


def test_a_bad_layout_is_refused(detector_folder):
    backbone = DetectorBackbone(load_detector(detector_folder))
    for options in ({"layout": "cells"}, {"layout": "grid", "grid": (0, 3)}):
        with pytest.raises(ValueError, match="expected 'boxes', 'grid' or 'boxes\\+grid'"):
            BackboneRegions(backbone, **options)
