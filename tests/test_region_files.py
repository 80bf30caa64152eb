"""Region features that others made: every reader on files of its official layout, conversion, damage."""

import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from region_writers import (
    CONVERTED,
    DIM,
    HEIGHT,
    NAMES,
    WIDTH,
    WRITERS,
    each_kind,
    example_of,
    opened,
    seen,
    write_hdf5,
    write_npz,
)
from torch.testing import assert_close

from tdlib.data.examples import DataError
from tdlib.regions.convert import convert
from tdlib.regions.convert import main as convert_command
from tdlib.regions.files import picture_keys
from tdlib.regions.sources import open_regions

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


def test_another_extraction_or_picture_does_not_hide_behind_a_name(tmp_path):
    first, second, _ = NAMES
    path = WRITERS["tsv"](tmp_path, {first: seen(first)})
    assert convert("tsv", path, tmp_path / "npz") == 1 and convert("tsv", path, tmp_path / "npz") == 0
    features, boxes = seen(first)
    whole = path.read_bytes()
    WRITERS["tsv"](tmp_path, {first: (features + 1, boxes)})
    with pytest.raises(DataError, match=rf"{NAMES[first]}\.npz holds other regions already"):
        convert("tsv", path, tmp_path / "npz")
    path.write_bytes(whole + path.read_bytes())
    with pytest.raises(DataError, match=r"line 2: .*npz holds other regions already"):
        convert("tsv", path, tmp_path / "other")
    h5py = pytest.importorskip("h5py")
    file = write_hdf5(tmp_path, {name: seen(name) for name in (first, second)}, mapping=False)
    with h5py.File(file, "a") as stored:
        stored["image_ids"] = [NAMES[first]] * 2
    with pytest.raises(DataError, match="more than once"):
        convert("hdf5", file, tmp_path / "third")


@pytest.mark.parametrize("rows", ["[0, 1]", "{", '{"9": 0, "9": 1}', '{"9": 3}', '{"9": "0"}', "{}"])
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


def test_padded_features_of_either_orientation_are_the_same_regions(tmp_path):
    name = next(iter(NAMES))
    features, boxes = seen(name)
    most = len(boxes) + 5
    padded = np.pad(features, ((0, 5), (0, 0))), np.pad(boxes, ((0, 5), (0, 0)))
    assert most != features.shape[1]
    for number, x in enumerate((padded[0], padded[0].T)):
        (tmp_path / str(number)).mkdir()
        with (tmp_path / str(number) / f"{Path(name).stem}.npz").open("wb") as stream:
            np.savez(stream, x=x, bbox=padded[1], num_bbox=len(boxes), image_h=HEIGHT, image_w=WIDTH)
        found = open_regions(f"npz:{tmp_path / str(number)}")(example_of(name)).features
        assert_close(found, torch.tensor(features))


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
