"""Writes region features in the layouts in which others published them."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tdlib.data.examples import Example, TextPart
from tdlib.regions.convert import convert
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
