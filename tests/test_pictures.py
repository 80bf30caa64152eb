"""Pictures of every kind are seen as people see them, and boxes stay on their objects."""

import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdlib.data.examples import DataError
from tdlib.data.pictures import PictureHeader, open_picture, read_header, upright_boxes

GREY = np.array([[0, 64, 128], [192, 230, 255]], dtype=np.uint8)


def stored(path, orientation: int, kind: str = "PNG", mode: str = "RGB"):
    """A 40 x 20 bitmap, black with a white corner where stored x and y are smallest."""
    picture = Image.new("RGB", (40, 20))
    picture.paste("white", (0, 0, 10, 5))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
    picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, kind, exif=exif)
    return path


def deep_png(path, pixels: list[tuple[int, int, int]], clear: tuple[int, int, int]) -> None:
    """Writes one row of RGB of 16 bits, which Pillow does not write, with a colour that is transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    row = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", len(pixels), 1, 16, 2, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">3H", *clear))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


def bright_box(path) -> tuple[float, ...]:
    values = np.asarray(open_picture(path).convert("L")) > 127
    rows, columns = np.flatnonzero(values.any(1)), np.flatnonzero(values.any(0))
    height, width = values.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "tiff"),
        (Image.fromarray(GREY.astype(np.int32) * 257), "tiff"),
        (Image.fromarray(GREY.astype(np.int32)), "tiff"),
        (Image.fromarray(GREY.astype(np.float32) / 255), "tiff"),
        (Image.fromarray(GREY.astype(np.float32)), "tiff"),
        (Image.fromarray(GREY), "png"),
        (Image.fromarray(GREY).convert("P"), "png"),
    ],
)
def test_every_number_format_shows_the_same_greys(tmp_path, image, suffix):
    path = tmp_path / f"picture.{suffix}"
    image.save(path)
    assert np.array_equal(np.asarray(open_picture(path)), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 300.0], [0.0, float("nan")]])
def test_values_of_an_unknown_range_are_refused(tmp_path, values):
    path = tmp_path / "picture.tiff"
    Image.fromarray(np.array([values], dtype=np.float32)).save(path)
    with pytest.raises(DataError, match=r"picture\.tiff: pixel values from"):
        open_picture(path)


def test_what_is_transparent_is_white(tmp_path):
    for mode, clear, solid in (("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), ("LA", (0, 0), (29, 255))):
        image = Image.new(mode, (2, 1), clear)
        image.putpixel((1, 0), solid)
        image.save(tmp_path / "picture.png")
        left, right = np.asarray(open_picture(tmp_path / "picture.png"))[0].tolist()
        assert left == [255, 255, 255] and right == [*((0, 0, 255) if mode == "RGBA" else (29,) * 3)]
    for values in ([[0, 1]], [[40_000, 257]]):  # Pillow reports 16-bit transparency as it is stored
        Image.fromarray(np.array(values, np.uint16)).save(tmp_path / "picture.png", transparency=values[0][0])
        found = np.asarray(open_picture(tmp_path / "picture.png"))[0].tolist()
        assert found == [[255] * 3, [values[0][1] // 257] * 3]
    deep_png(tmp_path / "picture.png", [(30_000, 40_000, 50_000), (0, 257, 65_535)], (30_000, 40_000, 50_000))
    # eight bits are left, in which other colours look like the transparent one
    assert np.asarray(open_picture(tmp_path / "picture.png"))[0].tolist() == [[117, 156, 195], [0, 1, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "picture.png", transparency=0)
    assert np.asarray(open_picture(tmp_path / "picture.png"))[0].tolist() == [[255] * 3, [0, 0, 255]]


def test_the_inks_of_a_printed_picture_are_colours(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK").save(path, quality=95)
    assert np.abs(np.asarray(open_picture(path)).astype(int) - (200, 30, 30)).max() <= 4


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"),
     *(("TIFF", mode) for mode in ("RGB", "L", "I;16", "CMYK", "RGBA"))],
)  # fmt: skip
def test_pictures_stand_upright_and_stored_boxes_turn_with_them(tmp_path, kind, mode):
    for orientation in range(1, 9):
        path = stored(tmp_path / f"picture.{kind.lower()}", orientation, kind, mode)
        size = open_picture(path).size
        assert size == ((20, 40) if orientation in (5, 6, 7, 8) else (40, 20)) == read_header(path).upright
        header = PictureHeader(40, 20, orientation)
        (turned,) = upright_boxes([(0, 0, 0.25, 0.25)], (40, 20), header, "here")
        assert turned == pytest.approx(bright_box(path), abs=0.03)


def test_boxes_measured_in_the_upright_picture_stay():
    box = (0.1, 0.2, 0.3, 0.6)
    for size, header in [
        ((20, 40), PictureHeader(40, 20, 6)), ((40, 20), PictureHeader(40, 20, 1)),
        ((80, 41), PictureHeader(40, 20, 1)), ((98, 100), PictureHeader(100, 98, 6)),
    ]:  # fmt: skip
        assert upright_boxes([box], size, header, "here") == (box,)


@pytest.mark.parametrize(("size", "stated"), [((40, 20), (20, 40)), ((100, 98), (98, 100))])
def test_exchanged_width_and_height_are_refused(size, stated):
    with pytest.raises(DataError, match=r"^here: width=.* width and height are exchanged"):
        upright_boxes([], stated, PictureHeader(*size, 1), "here")


def test_metadata_of_another_picture_are_refused():
    with pytest.raises(DataError, match="releases"):
        upright_boxes([], (40, 20), PictureHeader(30, 29, 1), "here")


# Damage


def noise(path, size: int = 64):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_whole_pictures_open_and_short_ones_are_named(tmp_path, suffix):
    whole, short = noise(tmp_path / f"whole.{suffix}"), noise(tmp_path / f"short.{suffix}")
    whole.write_bytes(whole.read_bytes() + b"\0" * 100)  # what some cameras append
    open_picture(whole)
    short.write_bytes(short.read_bytes()[:-1500])
    with pytest.raises(DataError, match=re.escape(str(short))):
        open_picture(short)
    with pytest.raises(DataError, match=r"no\.jpg: picture is missing"):
        open_picture(tmp_path / "no.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.data())
@settings(deadline=None, max_examples=120)
def test_damaged_pictures_give_a_picture_or_a_named_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(path, format=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert open_picture(path).mode == "RGB"
    except DataError as error:
        assert str(path) in str(error)
