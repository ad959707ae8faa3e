"""Pictures of every mode as arrays; what cannot be read has a short reason."""

import io
import os
import struct
import threading
import warnings

import numpy as np
import PIL.Image
import pytest

from cnn.data import images as images_module
from cnn.data import load_images
from cnn.data.images import (
    UnreadableImageError,
    image_extensions,
    parse_image_size,
    read_image,
    read_images,
    to_array,
)
from cnn.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GREY = RGB[..., 0]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height, width):
    """A smooth picture, as photographs are."""
    small = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def read(content, channels=3, size=None, resize="crop"):
    return read_image(content, size=size, channels=channels, resize=resize)


def repeated(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def paletted():
    image = PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    return image


PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)
INDEX = np.arange(48).reshape(6, 8) % 4
BITS = GREY > 127
ALPHA = np.where(INDEX == 0, 0, 255).astype(np.uint8)
OVER_WHITE = np.where(ALPHA[..., None] == 0, 255, RGB).astype(np.uint8)
SIXTEEN = (GREY.astype(np.uint16) * 257) ^ 3  # within rounding of GREY * 257

MODES = {
    "RGB": (encoded(PIL.Image.fromarray(RGB)), RGB),
    "grey": (encoded(PIL.Image.fromarray(GREY)), repeated(GREY)),
    "1 bit": (encoded(PIL.Image.fromarray(BITS)), repeated(BITS.astype(np.uint8) * 255)),
    "palette": (encoded(paletted()), PALETTE[INDEX]),
    "palette with a transparent colour": (
        encoded(paletted(), transparency=0),
        np.where(INDEX[..., None] == 0, 255, PALETTE[INDEX]),
    ),
    "a transparent colour": (
        encoded(PIL.Image.fromarray(RGB), transparency=tuple(RGB[0, 0].tolist())),
        np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "RGBA": (encoded(PIL.Image.fromarray(np.dstack([RGB, ALPHA]))), OVER_WHITE),
    "LA": (
        encoded(PIL.Image.fromarray(np.dstack([GREY, ALPHA]))),
        np.where(ALPHA[..., None] == 0, 255, repeated(GREY)),
    ),
    "16 bits": (encoded(PIL.Image.fromarray(SIXTEEN)), repeated(GREY)),
    "16 bits in TIFF": (encoded(PIL.Image.fromarray(SIXTEEN), "TIFF"), repeated(GREY)),
    "32 bits": (encoded(PIL.Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), repeated(GREY)),
    "0 to 1": (
        encoded(PIL.Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        repeated(GREY),
    ),
    "0.0 to 255.0": (
        encoded(PIL.Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        repeated(GREY),
    ),
    "CMYK": (
        encoded(PIL.Image.fromarray(RGB).convert("CMYK"), "TIFF"),
        RGB,
    ),
    "the first frame": (
        encoded(
            PIL.Image.fromarray(GREY),
            "GIF",
            save_all=True,
            append_images=[PIL.Image.fromarray(255 - GREY)],
        ),
        repeated(GREY),
    ),
}


@pytest.mark.parametrize(("content", "expected"), MODES.values(), ids=MODES)
def test_pixels_of_every_mode(content, expected):
    found = read(content)
    assert (found.dtype, found.shape) == (np.uint8, (6, 8, 3))
    assert found.flags.writeable
    np.testing.assert_array_equal(found, expected)
    assert read(content, size=(4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "YCbCr", "HSV", "LAB", "La", "PA"])
def test_modes_that_few_files_have(mode):
    base = PIL.Image.fromarray(GREY)
    if mode.startswith("I;16"):
        dtype = ">u2" if mode.endswith("B") else "<u2"
        image = PIL.Image.frombytes(mode, (8, 6), SIXTEEN.astype(dtype).tobytes())
        tolerance = 0
    elif mode == "LAB":
        image = PIL.Image.new("LAB", (8, 6), (255, 128, 128))
        found = to_array(image, size=None, channels=3)
        assert found.min() > 250
        return
    elif mode == "La":
        image, tolerance = base.convert("LA").convert("La"), 0
    elif mode == "PA":
        image, tolerance = base.convert("P").convert("PA"), 0
    else:
        image, tolerance = base.convert("RGB").convert(mode), 3
    found = to_array(image, size=None, channels=3)
    assert np.abs(found.astype(int) - repeated(GREY)).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODES)
def test_channels(name, channels):
    content, _ = MODES[name]
    found = read(content, channels=channels)
    assert found.shape == (6, 8, channels)
    if channels in (2, 4):
        is_seen = found[..., -1] == 255
        assert is_seen.all() == (name not in (
            "palette with a transparent colour", "a transparent colour", "RGBA", "LA"
        ))  # fmt: skip


def test_opacity_is_kept_where_it_is_wanted():
    rgba = np.dstack([RGB, ALPHA])
    np.testing.assert_array_equal(read(encoded(PIL.Image.fromarray(rgba)), channels=4), rgba)
    la = np.dstack([GREY, ALPHA])
    np.testing.assert_array_equal(read(encoded(PIL.Image.fromarray(la)), channels=2), la)


def test_a_transparent_value_of_16_bits():
    content = encoded(PIL.Image.fromarray(SIXTEEN), transparency=int(SIXTEEN[0, 0]))
    found = read(content, channels=2)
    np.testing.assert_array_equal(found[..., 1] == 0, SIXTEEN[0, 0] == SIXTEEN)


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[-1, 3]]),
        np.float32([[0, 256]]),
        np.float32([[0, np.nan]]),
        np.int32([[0, 70000]]),
        np.int32([[-1, 3]]),
    ],
)
def test_values_of_no_known_range(values):
    with pytest.raises(UnreadableImageError, match=r"values from \S+ to \S+, not in 0\.\."):
        read(encoded(PIL.Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, kind):
    upright = np.zeros((96, 64, 3), np.uint8)
    upright[:48, :32] = 255  # the upper left
    turn = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(turn(upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(stored, kind, exif=exif, **options)
    whole = read(content)
    assert whole.shape == upright.shape
    assert np.abs(whole.astype(int) - upright).max() < 30
    small = read(content, size=(6, 4))
    assert (small[:2, :1] > 200).all()
    assert (small[:2, 3:] < 50).all()
    assert (small[4:] < 50).all()


def test_damaged_metadata_are_no_reason_to_refuse_the_pixels():
    content = encoded(picture(32, 32), "JPEG", exif=b"Exif\0\0nonsense")
    assert read(content).shape == (32, 32, 3)


def test_crop_and_stretch():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 255  # the middle third is white
    content = encoded(PIL.Image.fromarray(image))
    assert read(content, size=(10, 10)).min() > 230
    stretched = read(content, size=(9, 9), resize="stretch")
    assert (stretched[:, 4] > 240).all()
    assert (stretched[:, [0, 8]] < 15).all()
    tall = encoded(PIL.Image.fromarray(image.transpose(1, 0, 2)))
    assert read(tall, size=(10, 10)).min() > 230
    larger = read(content, size=(80, 80))
    assert larger.shape == (80, 80, 3)


def test_the_same_size_keeps_every_pixel():
    content, expected = MODES["RGB"]
    for resize in ("crop", "stretch"):
        np.testing.assert_array_equal(read(content, size=(6, 8), resize=resize), expected)


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 48)])
@pytest.mark.parametrize("shape", [(1000, 1000), (613, 1001), (1200, 401)])
def test_a_jpeg_that_is_reduced_while_decoding_looks_the_same(shape, size, resize, monkeypatch):
    content = encoded(picture(*shape), "JPEG", quality=90)
    fast = read(content, size=size, resize=resize).astype(int)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    full = read(content, size=size, resize=resize).astype(int)
    assert np.abs(fast - full).max() <= 4
    assert np.abs(fast - full).mean() < 0.5


def test_a_large_jpeg_is_not_decoded_whole(monkeypatch):
    sizes = []
    load = PIL.Image.Image.convert
    monkeypatch.setattr(
        "PIL.Image.Image.convert",
        lambda self, *args: sizes.append(self.size) or load(self, *args),
    )
    read(encoded(picture(1000, 1000), "JPEG"), size=(32, 32))
    assert sizes == [(125, 125)]


def bomb(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = PIL.PngImagePlugin.putchunk
    buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    buffer.seek(0, io.SEEK_END)
    chunk(buffer, b"IHDR", header)
    chunk(buffer, b"IDAT", bytes(100))
    return buffer.getvalue()


PNG, _ = MODES["RGB"]
JPEG = encoded(picture(100, 100), "JPEG")
BROKEN = {
    "nothing": (b"", "not an image"),
    "a text": (b"<html>not found</html>", "not an image"),
    "a JPEG cut short": (JPEG[: len(JPEG) // 2], "truncated"),
    "a PNG cut short": (PNG[:-60], "truncated"),
    "a flipped bit": (PNG[:20] + bytes([PNG[20] ^ 1]) + PNG[21:], "not an image"),
    "a GIF header": (b"GIF89a" + bytes(9), ""),
    "a warning of a bomb": (bomb(10_000), "decompression bomb"),
    "a bomb": (bomb(20_000), "decompression bomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read(content, reason, tmp_path):
    (tmp_path / "file.png").write_bytes(content)
    for source in (content, io.BytesIO(content), tmp_path / "file.png"):
        with pytest.raises(UnreadableImageError) as error:
            read(source, size=(8, 8))
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fifo.png")
    for path, reason in (
        (tmp_path / "none.png", "no such file"),
        (str(tmp_path), "not a regular file"),
        (tmp_path / "fifo.png", "not a regular file"),
        (tmp_path / "link.png", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "damaged"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            read(path)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to("file.png")
    assert read(tmp_path / "link.png").shape == (6, 8, 3)


def test_warnings_of_the_caller_are_as_they_were():
    before = list(warnings.filters)
    found = read_images([PNG] * 100, size=None, channels=3)
    next(found)
    assert warnings.filters == before
    list(found)
    assert warnings.filters == before


def test_many_images_in_order_with_their_errors_and_a_bounded_look_ahead(monkeypatch):
    monkeypatch.setattr("cnn.runtime.cores.usable_cores", lambda: 2)
    decoded, threads, progress = [], set(), []
    real = images_module._read

    def watched(source, **options):
        decoded.append(source)
        threads.add(threading.get_ident())
        return real(source, **options)

    monkeypatch.setattr(images_module, "_read", watched)
    colours = [encoded(PIL.Image.new("RGB", (4, 4), (i, 0, 0))) for i in range(100)]
    colours[7] = b"no image"
    found = read_images(colours, size=(2, 2), channels=3, progress=progress.append)
    assert not decoded
    first = next(found)
    assert len(decoded) <= 32
    rest = [first, *found]
    assert str(rest[7]) == "not an image"
    assert [i for i, image in enumerate(rest) if i != 7 and image[0, 0, 0] != i] == []
    assert progress == list(range(1, 101))
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    "arguments",
    [{"channels": 5}, {"resize": "fit"}, {"size": (0, 3)}, {"size": 3}, {"size": (1, 2, 3)}],
)
def test_wrong_arguments(arguments):
    arguments = {"size": None, "channels": 3, **arguments}
    with pytest.raises(UserError):
        read_image(PNG, **arguments)
    with pytest.raises(UserError):
        read_images([PNG], **arguments)


@pytest.mark.parametrize("value", [-1, True, 1.5, "32", (1,), (1, 0), (1, 2, 3), None, ((1, 2), 3)])
def test_image_sizes_that_are_none(value):
    with pytest.raises(UserError, match="image_size="):
        parse_image_size(value)


def test_names_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif"} <= image_extensions()
    assert not {".eps", ".h5", ".txt", ".pdf", ""} & image_extensions()


def test_images_for_a_script(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        PIL.Image.new("RGB", (9 + i, 9), (i, 0, 0)).save(path)
    found = load_images(map(str, paths), image_size=(4, 6))
    assert found.shape == (8, 4, 6, 3)
    assert found[:, 0, 0, 0].tolist() == list(range(8))
    assert load_images(paths[:1], image_size=0, channels=1).shape == (1, 9, 9, 1)
    for i in range(1, 8):
        paths[i].write_bytes(b"no image")
    for arguments, telling in (
        ((paths,), r"7 images \(.*1.png: not an image; .*; and 2 more\) cannot be read"),
        (([tmp_path / "none.png"],), r"1 image \(.*none.png: no such file\) cannot be read"),
        (([],), "give at least one path"),
        (("a.png",), "a list of paths"),
    ):
        with pytest.raises(UserError, match=telling):
            load_images(*arguments, image_size=4)
    PIL.Image.new("RGB", (9, 10)).save(paths[1])
    with pytest.raises(UserError, match=r"several sizes, such as 9x9 .*0.png.* and 9x10 .*1.png"):
        load_images(paths[:2], image_size=0)
