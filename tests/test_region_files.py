"""Region features that others made: every reader on files of its official layout, conversion, damage."""

import base64
import io
import json
import multiprocessing
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tdlib.data.examples import DataError, Example, TextPart
from tdlib.regions.convert import convert
from tdlib.regions.convert import main as convert_command
from tdlib.regions.files import picture_keys
from tdlib.regions.sources import open_regions

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
    numbers = (NAMES[name], WIDTH, HEIGHT, len(boxes))
    return "\t".join([*map(str, numbers), encoded(boxes), encoded(features)])


def lxmert_line(name: str, features: np.ndarray, boxes: np.ndarray) -> str:
    number = len(boxes)
    ids, confidence = encoded(np.zeros(number, np.int64)), encoded(np.ones(number, np.float32))
    size = [str(HEIGHT), str(WIDTH)]
    found = [ids, confidence, ids, confidence, str(number), encoded(boxes), encoded(features)]
    return "\t".join([Path(name).stem, *size, *found])


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
    for regions, features in zip(found, expected, strict=True):
        assert torch.equal(regions.features, features)
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


def damaged(what: str, features: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if what == "NaN":
        features[3, 2] = np.nan
    elif what == "outside":
        boxes[4] = [10, 10, WIDTH * 1.5, 20]
    elif what == "inverted":
        boxes[4] = [50, 10, 40, 20]
    else:
        features = features[:, :5]
    return features, boxes


BAD = {
    "NaN": r"features hold NaN",
    "outside": r"box 4 is .*within the picture",
    "inverted": r"box 4 is .*x1, y1, x2, y2",
    "narrow": r"5 wide, expected 8",
}


@each_kind
@pytest.mark.parametrize("damage", BAD)
def test_a_bad_record_is_refused_and_named(kind, damage, tmp_path):
    first, second, _ = NAMES
    if kind == "hdf5" and damage == "narrow":
        pytest.skip("one array holds all pictures")
    bad = damaged(damage, *seen(second))
    with pytest.raises(DataError, match=BAD[damage]) as caught:
        opened(kind, tmp_path, {first: seen(first), second: bad})(example_of(second))
    assert str(tmp_path) in str(caught.value)
    assert str(NAMES[second]) in str(caught.value) or "line 2" in str(caught.value)
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
