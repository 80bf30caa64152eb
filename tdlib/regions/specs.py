"""Reads the parameter ``regions``: which paths a spec names. Loads no torch: plans of batches use it too."""

from pathlib import Path

from tdlib.core.paths import resolve

FILES = ("lmdb", "npz")  # folders of features that a detector has made: as large as a data set
COMPUTED = ("boxes", "grid", "boxes+grid")  # a backbone's weights


def listed_paths(where: str) -> list[str]:
    """Splits a list of paths at commas."""
    return [path.strip() for path in where.split(",") if path.strip()]


def backbone_parts(backbone: str) -> tuple[str, str]:
    """Returns MODEL and WEIGHTS of MODEL@WEIGHTS; "" and the whole for a mini detector's folder."""
    model, at, weights = backbone.partition("@")
    return (model, weights) if at and not Path(resolve(backbone)).is_dir() else ("", backbone)


def each_path(spec: str) -> list[str]:
    """Splits a spec that names several paths: "lmdb:A,B" into "lmdb:A" and "lmdb:B".

    Of "boxes:MODEL@WEIGHTS" "boxes:WEIGHTS" is left. Any other string, such as a plain path, stays as it is.
    """
    kind, _, where = spec.partition(":")
    if kind in FILES:
        return [f"{kind}:{path}" for path in listed_paths(where)]
    return [f"{kind}:{backbone_parts(where)[1]}"] if kind in COMPUTED else [spec]
