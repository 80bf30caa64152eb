"""Opens pictures: every reader, model and view sees the same upright RGB picture of a file.

Data sets hold pictures of every kind. Pillow's own conversion to RGB cuts values off at 255, which
turns a 16-bit picture white and one with values in [0, 1] black, drops transparency so that colours
appear which nobody sees, and ignores the EXIF orientation. ``open_picture`` does none of this.

Boxes are xyxy normalised to the upright picture. Files state them in pixels of a width and a height;
``upright_boxes`` finds out from these two numbers which way up the picture was when they were measured.
Metadata and files of region features are read so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tdlib.data.examples import Box, DataError

_ORIENTATION = 0x0112  # EXIF tag: which transposition turns the stored pixels upright
_TURNED = (5, 6, 7, 8)  # the orientations that exchange width and height
_ASPECT_TOLERANCE = 0.05  # resized copies of a picture round their sides to whole pixels


@dataclass(frozen=True)
class PictureHeader:
    """Size in pixels as a picture file stores it, and its EXIF orientation (1: stored upright)."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as the picture is seen."""
        turned = self.orientation in _TURNED
        return (self.height, self.width) if turned else (self.width, self.height)


def _orientation(image: Image.Image) -> int:
    # Pillow has turned a TIFF already when it reports its size; it turns no other format.
    value = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    return value if value in range(2, 9) else 1


def read_header(path: Path) -> PictureHeader:
    """Reads size and orientation without decoding the picture."""
    try:
        with Image.open(path) as image:
            return PictureHeader(*image.size, _orientation(image))
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:  # Pillow lets through what its decoders raise
        raise DataError(f"{path}: not a picture that can be decoded ({error}); copy the file again") from None


def open_picture(path: Path) -> Image.Image:
    """Opens a picture upright, in RGB of 8 bits per channel, with transparent parts white.

    16-bit values are divided by 257 (RGB of 16 bits shows no transparency). Floats in [0, 1] are multiplied
    by 255, larger ones kept. Integers of 32 bits are kept too; if one is above 255, all are taken for 16-bit
    values.

    Raises:
        DataError: the file is missing, does not decode, or has values outside of these ranges.
    """
    try:
        # Of a file that it opens itself, Pillow may map the pixels of a turned TIFF by their upright size.
        with path.open("rb") as file, Image.open(file) as image:
            clear = image.info.get("transparency")
            if isinstance(clear, tuple) and any("16" in str(tile[3]) for tile in image.tile):
                del image.info["transparency"]  # of 16 bits, of which 8 are left: other colours look like it
            image.load()
            upright = image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
            return _rgb(upright, path)
    except FileNotFoundError:
        raise _missing(path) from None
    except DataError:
        raise
    except Exception as error:  # Pillow lets through what its decoders raise
        raise DataError(f"{path}: picture does not decode ({error}); copy the file again") from None


def _missing(path: Path) -> DataError:
    return DataError(f"{path}: picture is missing; unpack the data set's pictures again")


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return _grey(np.where(values == image.info.get("transparency"), 65535, values) / 257)
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        whole = image.mode == "I"
        if not (low >= 0 and high <= (65535 if whole else 255)):  # also false for NaN
            expected = "0 to 255 or 0 to 65535" if whole else "0 to 1 or 0 to 255"
            raise DataError(
                f"{path}: pixel values from {low:g} to {high:g}, expected {expected}; save it as an 8-bit "
                "picture"
            )
        if whole:
            return _grey(values / 257 if high > 255 else values)
        return _grey(values * 255 if high <= 1 else values)
    if image.has_transparency_data:
        seen = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(seen, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def upright_boxes(
    boxes: Sequence[Box], size: tuple[float, float], header: PictureHeader, where: str
) -> tuple[Box, ...]:
    """Boxes normalised by ``size``, moved to where their objects are in the upright picture.

    They turn with the picture if they refer to its stored pixels, see ``measured_as_stored``.
    """
    if not measured_as_stored(size, header, where):
        return tuple(boxes)
    return tuple(_turned(box, header.orientation) for box in boxes)


def upright_size(size: tuple[float, float], header: PictureHeader, where: str) -> tuple[float, float]:
    """The width and height that boxes were measured in, exchanged if the boxes turn by a quarter."""
    turned = header.orientation in _TURNED and measured_as_stored(size, header, where)
    return (size[1], size[0]) if turned else size


def measured_as_stored(size: tuple[float, float], header: PictureHeader, where: str) -> bool:
    """Finds out whether boxes measured in this width and height refer to stored pixels that stand otherwise.

    If the picture has this size (or a multiple of it) when upright, they do not. If the stored pixels
    have it, the boxes were measured without regard to the EXIF orientation. Where both have it (the
    orientation is half a turn or a mirror image, or the picture is square), the boxes refer to the
    stored pixels: the published loaders of VCR read pictures without turning them.

    Raises:
        DataError: the picture has neither shape, for instance because width and height are exchanged.
    """
    width, height = header.upright
    as_seen, exchanged = _difference(size, (width, height)), _difference(size, (height, width))
    if header.orientation != 1:
        as_stored = _difference(size, (header.width, header.height))
        if as_stored <= min(as_seen, _ASPECT_TOLERANCE):
            return True
    if as_seen <= min(exchanged, _ASPECT_TOLERANCE):
        return False
    remedy = "are these files of different releases? Copy both again"
    if exchanged <= _ASPECT_TOLERANCE:
        remedy = "width and height are exchanged: correct them, and see whether the boxes are right"
    raise DataError(
        f"{where}: width={size[0]:g}, height={size[1]:g}, but the picture has {width} x {height} pixels; "
        f"{remedy}"
    )


def _difference(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Returns |log| of the quotient of two ratios of width to height: 0 for a resized copy."""
    return abs(math.log(first[0] * second[1] / (first[1] * second[0])))


def _turned(box: Box, orientation: int) -> Box:
    """Moves a box of the stored pixels to the upright picture (EXIF 2.32, tag Orientation)."""
    corners = []
    for x, y in ((box[0], box[1]), (box[2], box[3])):
        corners.append(
            {
                2: (1 - x, y), 3: (1 - x, 1 - y), 4: (x, 1 - y), 5: (y, x),
                6: (1 - y, x), 7: (1 - y, 1 - x), 8: (y, 1 - x),
            }[orientation]
        )  # fmt: skip
    (x1, y1), (x2, y2) = corners
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
