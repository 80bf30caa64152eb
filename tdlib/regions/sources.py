"""Opens the region features that a run's parameter ``regions`` names."""

from tdlib.data.examples import DataError
from tdlib.regions.backbones import open_backbone
from tdlib.regions.computed import BackboneRegions, ClipGridRegions, RegionSource
from tdlib.regions.files import NpzRegions
from tdlib.regions.lmdb import LmdbRegions
from tdlib.regions.specs import COMPUTED, listed_paths
from tdlib.teacher.cache import TeacherCache


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
    if kind in COMPUTED and where:
        return BackboneRegions(open_backbone(where), kind)
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
