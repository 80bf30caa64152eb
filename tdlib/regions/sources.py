"""Opens the region features that a run's parameter ``regions`` names."""

from pathlib import Path

from tdlib.core.paths import resolve
from tdlib.data.examples import DataError
from tdlib.regions.backbones import open_backbone
from tdlib.regions.computed import BackboneRegions, ClipGridRegions, RegionSource
from tdlib.regions.files import NpzRegions
from tdlib.regions.lmdb import LmdbRegions
from tdlib.teacher.cache import TeacherCache


def listed_paths(where: str) -> list[str]:
    """Splits a list of paths at commas, but not inside the name of a path that exists."""
    parts, paths = where.split(","), []
    while parts:
        joined = (",".join(parts[:length]).strip() for length in range(len(parts), 1, -1))
        path = next((path for path in joined if Path(resolve(path)).exists()), parts[0].strip())
        del parts[: path.count(",") + 1]
        paths += [path] if path else []
    return paths


def open_regions(spec: str, cache: TeacherCache | None = None) -> RegionSource:
    """Opens the region source that a spec "KIND:WHERE" names.

    Files of a detector: "lmdb:FOLDER[,FOLDER]" (UNITER's), "npz:FOLDER[,FOLDER]"; other files become NPZ by
    ``python -m tdlib.regions.convert``. Computed here: "boxes:BACKBONE", "grid:BACKBONE",
    "boxes+grid:BACKBONE", where BACKBONE is the folder of a ``MiniDetector`` or MODEL@WEIGHTS, a model of
    torchvision's with its local file. "clip": the teacher's patches.

    Args:
        spec: see above.
        cache: of the teacher, for "clip".

    Raises:
        DataError: the spec is malformed, or what it names is not there or not in its layout.
        ImportError: the kind needs a package of the extra ``regions``.
    """
    kind, _, where = spec.partition(":")
    readers = {"lmdb": LmdbRegions, "npz": NpzRegions}
    if kind in readers and where:
        return readers[kind](*listed_paths(where))
    if kind in ("boxes", "grid", "boxes+grid") and where:
        return BackboneRegions(open_backbone(where), kind)  # type: ignore[arg-type]
    if kind == "clip" and not where:
        if cache is None:
            raise DataError("regions='clip' are read from the teacher's cache, and none is given")
        return ClipGridRegions(cache)
    if kind in ("tsv", "lxmert", "hdf5"):
        raise DataError(
            f"regions={spec!r}: make a folder of NPZ files of it, once: python -m tdlib.regions.convert "
            f"{kind} {where or 'FILE'} FOLDER; then give npz:FOLDER"
        )
    raise DataError(
        f"regions={spec!r}; expected lmdb:FOLDER[,FOLDER], npz:FOLDER[,FOLDER], boxes:BACKBONE, "
        "grid:BACKBONE, boxes+grid:BACKBONE (BACKBONE: a mini detector's folder, or MODEL@WEIGHTS such as "
        "resnet50@resnet50.pth), or clip"
    )
