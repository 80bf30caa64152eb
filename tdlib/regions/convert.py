"""Converts other files of region features to a folder of NPZ, one per picture, for ``npz:FOLDER``.

``python -m tdlib.regions.convert tsv trainval_36.tsv FOLDER`` (bottom-up attention, Anderson et al. 2018),
``lxmert train2014_obj36.tsv`` (Tan and Bansal 2019), ``hdf5 train36.hdf5`` (bottom-up-attention-vqa). One
picture is in memory at a time. Regions are checked as when they are read; NPZ files that exist already, with
the same regions, are left alone, so that an interrupted conversion can be continued. Nothing is unpickled.
"""

import argparse
import base64
import codecs
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdlib.core.files import whole_path
from tdlib.core.paths import resolve
from tdlib.data.examples import DataError
from tdlib.data.json_files import parse_json
from tdlib.regions.files import UNREADABLE, NpzRegions, RawRegions, checked, library

# The files have no header; boxes are xyxy in pixels; boxes and features are base64 of float32.
COLUMNS = {
    "tsv": ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    "lxmert": (
        "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes",
        "boxes", "features",
    ),
}  # fmt: skip


def tsv_records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, RawRegions]]:
    """Iterates over the lines: the picture's name and its regions."""
    image = columns[0].removesuffix("_id")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            where, fields = f"{path}, line {number}", line.rstrip(b"\r\n").split(b"\t")
            if not fields[0].strip():
                raise DataError(f"{where}: no name of a picture in its first column; copy the file again")
            if len(fields) != len(columns):
                raise DataError(
                    f"{where}: {len(fields)} columns, expected {len(columns)} ({', '.join(columns)}); 6 "
                    "columns are bottom-up attention's layout (tsv), 10 are LXMERT's (lxmert). Copy the file "
                    "again if it was cut off"
                )
            row = dict(zip(columns, fields, strict=True))
            try:
                count, width, height = (int(row[n]) for n in ("num_boxes", f"{image}_w", f"{image}_h"))
                boxes, features = (
                    np.frombuffer(base64.b64decode(row[n], validate=True), "<f4").reshape(count, -1)
                    for n in ("boxes", "features")
                )
            except ValueError as error:  # binascii's errors are such
                raise DataError(
                    f"{where}: sizes are not integers, or boxes and features not base64 of float32, a row "
                    f"per box ({error}); copy the file again"
                ) from None
            yield (
                row[columns[0]].decode(errors="replace"),
                RawRegions(where, features, boxes, (width, height)),
            )


def hdf5_records(path: Path) -> Iterator[tuple[str, RawRegions]]:
    """Iterates over the rows of image_features (n, k, dim) and normalised spatial_features (n, k, 6).

    The picture of a row is named by the file's dataset ``image_ids``, or by a JSON file {image id: row}
    beside it, ``train36_imgid2idx.json`` of ``train36.hdf5``. (The official mapping is a pickle, which could
    run code.)
    """
    beside = path.with_name(f"{path.stem}_imgid2idx.json")
    try:
        file = library("h5py", "HDF5").File(path, "r")
        features, spatial = file["image_features"], file["spatial_features"]
        if features.ndim != 3 or spatial.shape != (*features.shape[:2], 6):
            raise ValueError(f"image_features {features.shape} and spatial_features {spatial.shape}")
        rows: Any
        if not beside.exists() and "image_ids" in file:
            ids = [i.decode() if isinstance(i, bytes) else str(i) for i in file["image_ids"][()].tolist()]
            if twice := [name for name, count in Counter(ids).items() if count > 1]:
                raise ValueError(f"image_ids holds {twice[0]} more than once")
            rows = {name: row for row, name in enumerate(ids)}
        else:
            rows = parse_json(beside.read_bytes())
        if not isinstance(rows, dict) or not all(
            type(row) is int and 0 <= row < len(features) for row in rows.values()
        ):
            raise ValueError(f"{beside} maps no image ids to rows 0 to {len(features) - 1}")
        for key, row in rows.items():
            yield key, RawRegions(f"{path}: image {key!r} in row {row}", features[row], spatial[row, :, :4])
    except FileNotFoundError:
        raise DataError(
            f"{path}: which row is which picture's? It has no dataset image_ids, and there is no {beside}. "
            f'If you trust the pickle, convert it: python -c "import json, pickle; '
            f"json.dump(pickle.load(open('{beside.stem}.pkl', 'rb')), open('{beside.name}', 'w'))\""
        ) from None
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not an HDF5 file of regions ({error}); expected image_features (n, k, dim) and "
            "spatial_features (n, k, 6), and for each picture its row"
        ) from None


def convert(kind: str, path: Path | str, folder: Path | str) -> int:
    """Writes ``folder/<picture>.npz`` for each picture of a file that has none yet; returns their number.

    Raises:
        DataError: the file is not of this kind, or two pictures, or two extractions of one, would get the
            same name, in this file or with what lies in the folder.
    """
    path, folder, dim, written = Path(resolve(str(path))), Path(folder), 0, 0
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected one of the kind {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, str] = {}  # of the pictures, by the name that each gets
    records = hdf5_records(path) if kind == "hdf5" else tsv_records(path, COLUMNS[kind])
    for key, record in records:
        target = folder / f"{Path(key).name}.npz"
        if (other := keys.setdefault(target.name, key)) != key:
            raise DataError(
                f"{record.where}: pictures {other!r} and {key!r} would both be {target.name}, because files "
                "of regions tell pictures apart by their names alone; give them names of their own"
            )
        if target.exists():
            _refuse_others(target, record)
        else:
            dim = dim or np.shape(record.features)[-1]
            checked(record, dim)
            width, height = record.size or (1, 1)
            with whole_path(target) as partial, partial.open("wb") as file:
                np.savez(
                    file, x=record.features, bbox=record.boxes, num_bbox=len(record.boxes), image_w=width,
                    image_h=height,
                )  # fmt: skip
            written += 1
    if not keys:
        raise DataError(f"{path}: holds no records of pictures; copy it again")
    return written


def _refuse_others(target: Path, record: RawRegions) -> None:
    """Refuses a file that holds other regions than the record's: another picture's, or another extraction."""
    try:
        with np.load(target, allow_pickle=False) as arrays:
            same = all(
                np.array_equal(arrays[name], value, equal_nan=True)
                for name, value in (("x", record.features), ("bbox", record.boxes))
            )
    except (*UNREADABLE, TypeError) as error:
        raise DataError(f"{target}: cannot be read ({error!r}); delete it and convert again") from None
    if not same:
        raise DataError(
            f"{record.where}: {target} holds other regions already, of another picture of that name or of "
            "another extraction; delete it, or give an empty folder"
        )


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Make a folder of NPZ of a file of region features.")
    parser.add_argument("kind", choices=[*COLUMNS, "hdf5"])
    parser.add_argument("file", help="may be called again with the next one; pictures have one file each")
    parser.add_argument("folder", help="where to write")
    options = parser.parse_args()
    try:
        written = convert(options.kind, options.file, options.folder)
        width = NpzRegions(Path(options.folder).resolve()).dim
    except (DataError, ImportError, OSError) as error:  # a full disk, or a folder that is a file
        raise SystemExit(f"convert: {error}") from None
    print(
        f"{written} pictures written; read them with regions=npz:{options.folder}. Features are "
        f"{width} wide; half or twice what the detector makes would mean that they were no float32"
    )


if __name__ == "__main__":
    main()
