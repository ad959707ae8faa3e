"""Image files as arrays: every colour mode and orientation that Pillow reads, at one size.

Pillow releases the interpreter lock while it decodes and resizes, so many images are decoded by
threads: 300 JPEG files of a megapixel took 0.45 s with two threads, 0.49 s with two processes and
0.84 s with one thread.

Pillow is imported within functions, so that `import cnn` stays light.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from cnn.errors import UserError, number_of, one_line
from cnn.runtime.cores import map_in_parts

if TYPE_CHECKING:
    from PIL import Image

ImageSource = str | os.PathLike[str] | IO[bytes] | bytes

RESIZE = ("crop", "stretch")
NAMES_SHOWN = 5  # in a message about many files
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels
# How many times larger than the result a picture may be reduced to by cheap means, before the
# Lanczos filter does the rest. Pillow's documentation calls 3 "almost indistinguishable" from the
# filter alone; a JPEG decoder's own reduction (by 2, 4 or 8) drops just the higher frequencies of
# the cosine transform, which the filter would remove too.
_GAP = 3.0
# Pillow knows these by name, but needs another program to read them, or cannot.
_UNSUPPORTED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class UnreadableImageError(Exception):
    """An image cannot be read; the message is a short reason, such as "truncated"."""


def to_array(
    image: Image.Image, *, size: tuple[int, int] | None, channels: int, resize: str = "crop"
) -> np.ndarray:
    """Converts a picture to `uint8[H, W, C]`.

    The picture is turned as its EXIF orientation says. Of an animation it is the first frame.
    Transparent pixels are shown over white where the result has no opacity. Values of 16 bits are
    scaled by 255 / 65535. Floating-point values that lie in 0..1 are scaled by 255, those in 0..255
    are rounded.

    Args:
      image: a picture that Pillow has opened; it may be loaded at a reduced size.
      size: height and width of the result; None keeps those of the picture.
      channels: 1 is grey, 2 grey and opacity, 3 RGB, 4 RGB and opacity.
      resize: "crop" takes the largest centred part that has the proportions of `size`; "stretch"
        takes the whole picture and changes its proportions. Both use a Lanczos filter.

    Raises:
      UnreadableImageError: the values lie in no range that is known.
      UserError: an argument is wrong.
    """
    from PIL import ExifTags, ImageOps

    _check_arguments(size, channels, resize)
    if image.tell():
        image.seek(0)
    extent = _reduce_while_decoding(image, size, resize)
    image.load()
    if not all(image.size):
        raise UnreadableImageError("it has no pixels")
    orientation = _orientation(image)  # Pillow has turned a TIFF file while loading it
    image = _converted(image, channels)
    if size is not None:
        image = _resized(image, _as_stored(size, orientation), resize, extent or image.size)
    if orientation != 1:
        image.info.clear()
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    return np.array(image).reshape(image.height, image.width, channels)


def read_image(
    source: ImageSource, *, size: tuple[int, int] | None, channels: int, resize: str = "crop"
) -> np.ndarray:
    """Reads an image file as `uint8[H, W, C]`.

    Args:
      source: a path, an open binary file, or the content of a file.
      size: as for `to_array`, as the arguments that follow are.
      channels: of the result.
      resize: "crop" or "stretch".

    Raises:
      UnreadableImageError: whatever keeps the image from being read.
      UserError: an argument is wrong.
    """
    _check_arguments(size, channels, resize)
    with _pillow_warnings():
        return _read(source, size=size, channels=channels, resize=resize)


def read_images(
    sources: Sequence[ImageSource],
    *,
    size: tuple[int, int] | None,
    channels: int,
    resize: str = "crop",
    progress: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray | UnreadableImageError]:
    """Reads image files on all cores that this process may use.

    Args:
      sources: as for `read_image`, as the arguments that follow are.
      size: of the results.
      channels: of the results.
      resize: "crop" or "stretch".
      progress: is called with the number of each image, from 1, before it is returned.

    Returns:
      For each source in order, its array or why it cannot be read. A few images for each core are
      decoded ahead.

    Raises:
      UserError: an argument is wrong.
    """
    _check_arguments(size, channels, resize)
    return _read_in_parts(sources, size, channels, resize, progress)


def is_image(content: bytes) -> bool:
    """Whether the content of a file is that of an image, as far as its beginning tells."""
    from PIL import Image

    try:
        with _pillow_warnings(), Image.open(io.BytesIO(content), formats=_formats()):
            return True
    except Exception:  # decoders raise errors of any type
        return False


def load_images(
    paths: Sequence[str | os.PathLike[str]],
    *,
    image_size: int | tuple[int, int],
    channels: int = 3,
    resize: str = "crop",
) -> np.ndarray:
    """Reads image files into one array, for `cnn.Split`.

    Args:
      paths: of the files.
      image_size: height and width of the result, or one number for both; 0 keeps the size of the
        files, which must be the same then.
      channels: 1 is grey, 2 grey and opacity, 3 RGB, 4 RGB and opacity.
      resize: "crop" or "stretch": see `docs/datasets.md`.

    Returns:
      uint8[N, H, W, C], in the order of the paths.

    Raises:
      UserError: files cannot be read, which the message names; there is none; they have several
        sizes and image_size is 0; or an argument is wrong.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise UserError(f"paths must be a list of paths, not the one path {os.fsdecode(paths)}")
    if not (paths := list(paths)):
        raise UserError("there are no images to load: give at least one path")
    size = parse_image_size(image_size)
    images, first, unreadable = None, paths[0], []
    found = read_images(paths, size=size, channels=channels, resize=resize)
    for index, (path, image) in enumerate(zip(paths, found, strict=True)):
        if isinstance(image, UnreadableImageError):
            unreadable.append((os.fsdecode(path), str(image)))
            continue
        if images is None:
            images, first = np.empty((len(paths), *image.shape), np.uint8), path
        if image.shape != images.shape[1:]:
            raise UserError(
                f"the images have several sizes, such as {size_text(images.shape[1:])} "
                f"({os.fsdecode(first)}) and {size_text(image.shape)} ({os.fsdecode(path)}): set "
                f"image_size to bring them to one"
            )
        images[index] = image
    if unreadable or images is None:
        raise UserError(f"{name_unreadable(unreadable)} cannot be read: remove or replace them")
    return images


def parse_image_size(image_size: int | Sequence[int]) -> tuple[int, int] | None:
    """Height and width of images, or None for the size that they have.

    >>> parse_image_size(32), parse_image_size((24, 32)), parse_image_size(0)
    ((32, 32), (24, 32), None)

    Raises:
      UserError: it is another value.
    """
    if is_image_size(image_size):
        if isinstance(image_size, Sequence):
            height, width = image_size
            return int(height), int(width)
        return (int(image_size), int(image_size)) if image_size else None
    raise UserError(f"image_size={image_size!r} must {IMAGE_SIZE_MUST}")


IMAGE_SIZE_MUST = 'be a number of pixels, or height and width such as "(24, 32)"; 0 keeps the size'


def is_image_size(value: Any) -> bool:
    """Whether a value is one that `parse_image_size` takes."""
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(map(_is_side, value))
    return _is_side(value) or (type(value) is int and value == 0)


def _is_side(value: Any) -> bool:
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_number and bool(1 <= value < 2**16)


def size_text(shape: Sequence[int]) -> str:
    """A shape (height, width, ...) as people write it.

    >>> size_text((24, 32, 3))
    '32x24'
    """
    return f"{shape[1]}x{shape[0]}"


def name_unreadable(unreadable: Sequence[tuple[str, str]]) -> str:
    """How many files there are, and the first of them, each with its reason.

    >>> name_unreadable([("a.png", "truncated")])
    '1 image (a.png: truncated)'
    """
    shown = [f"{path}: {reason}" for path, reason in unreadable[:NAMES_SHOWN]]
    more = len(unreadable) - len(shown)
    names = "; ".join(shown) + (f"; and {more:,} more" if more else "")
    return f"{number_of(len(unreadable), 'image')} ({names})"


@functools.cache
def image_extensions() -> frozenset[str]:
    """How names of files end that can be read, in lower case: ".jpg" and others."""
    from PIL import Image

    formats = _formats()
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, name in known if name in formats)


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in _UNSUPPORTED)


def _check_arguments(size: tuple[int, int] | None, channels: int, resize: str) -> None:
    if size is not None and not (isinstance(size, Sequence) and is_image_size(size)):
        raise UserError(f"size={size!r} must be height and width in pixels, or None")
    if channels not in _MODES:
        raise UserError(f"channels={channels!r} must be one of {', '.join(map(str, _MODES))}")
    if resize not in RESIZE:
        raise UserError(f"resize={resize!r} must be one of {', '.join(RESIZE)}")


def _orientation(image: Image.Image) -> int:
    from PIL import ExifTags

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata are no reason to refuse the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _as_stored(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height, before the picture is turned, of what has a (height, width) afterwards."""
    height, width = size
    return (height, width) if orientation >= 5 else (width, height)


def _part(
    whole: tuple[float, float], target: tuple[int, int], resize: str
) -> tuple[float, float, float, float]:
    """The part of a picture that is shown: left, top, right, bottom."""
    width, height = whole
    if resize == "stretch":
        return 0, 0, width, height
    scale = min(width / target[0], height / target[1])
    left, top = (width - scale * target[0]) / 2, (height - scale * target[1]) / 2
    return max(left, 0), max(top, 0), min(width - left, width), min(height - top, height)


def _reduce_while_decoding(
    image: Image.Image, size: tuple[int, int] | None, resize: str
) -> tuple[float, float] | None:
    """Has a JPEG file decoded at a half, a quarter or an eighth, if that is large enough.

    Returns:
      The exact width and height of the picture in the units of its reduced pixels, the last of
      which may be incomplete; None if nothing is reduced.
    """
    if size is None:
        return None
    target = _as_stored(size, _orientation(image))
    left, top, right, bottom = _part(image.size, target, resize)
    # In the whole picture, so many pixels are as large as one of the result.
    across, down = (right - left) / target[0], (bottom - top) / target[1]
    wanted = image.width / across * _GAP, image.height / down * _GAP
    drafted = image.draft(None, (int(np.ceil(wanted[0])), int(np.ceil(wanted[1]))))
    return drafted[1][2:] if drafted else None


def _resized(
    image: Image.Image, target: tuple[int, int], resize: str, extent: tuple[float, float]
) -> Image.Image:
    from PIL import Image

    box = _part(extent, target, resize)
    return image.resize(target, Image.Resampling.LANCZOS, box=box, reducing_gap=_GAP)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """The picture in the mode that has so many channels of 8 bits."""
    from PIL import Image

    mode = _MODES[channels]
    image = _eight_bits(image)
    if image.mode in ("La", "RGBa"):  # colours multiplied by opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    is_whole = image.mode.startswith("I")
    if not (low >= 0 and high <= (65535 if is_whole else 255)):  # also if it is not a number
        kind = "0..65535" if is_whole else "0..1 or 0..255"
        raise UnreadableImageError(f"values from {low:g} to {high:g}, not in {kind}")
    if is_whole:
        grey = (values.astype(np.int32) + 128) // 257
    else:
        grey = np.rint(values * (255 if high <= 1 else 1))
    converted = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")  # one of the values, in a PNG file
    if isinstance(transparent, int):
        opacity = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        converted = Image.merge("LA", (converted, opacity))
    return converted


@contextlib.contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Makes the warning of a decompression bomb an error, and hides all others.

    It is a setting of the process, not of a thread: the thread that waits for others sets it.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _read(
    source: ImageSource, *, size: tuple[int, int] | None, channels: int, resize: str
) -> np.ndarray:
    from PIL import Image

    try:
        if isinstance(source, str | os.PathLike):
            _check_regular(source)
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=_formats()) as image:
            return to_array(image, size=size, channels=channels, resize=resize)
    except Exception as error:  # decoders raise errors of any type for damaged files
        raise UnreadableImageError(describe_fault(error)) from error


def _check_regular(path: str | os.PathLike[str]) -> None:
    """Refuses what is no regular file: to open a FIFO, say, may wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImageError("not a regular file")


def describe_fault(error: Exception) -> str:
    """Why an image cannot be read, in a few words, from whatever error a decoder raised."""
    from PIL import Image, UnidentifiedImageError

    text = one_line(str(error) or type(error).__name__, limit=120)
    match error:
        case UnreadableImageError():
            return text
        case UnidentifiedImageError():
            return "not an image"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return "decompression bomb"
        case MemoryError():
            return "too large for the memory"
        case FileNotFoundError():
            return "no such file"
        case OSError() if error.errno:
            return one_line(error.strerror or text).lower()
    return "truncated" if "truncated" in text.lower() else f"damaged: {text}"


def _read_in_parts(
    sources: Sequence[ImageSource],
    size: tuple[int, int] | None,
    channels: int,
    resize: str,
    progress: Callable[[int], None] | None,
) -> Iterator[np.ndarray | UnreadableImageError]:
    def read(source: ImageSource) -> np.ndarray | UnreadableImageError:
        try:
            return _read(source, size=size, channels=channels, resize=resize)
        except UnreadableImageError as error:
            return error

    _formats()  # not by several threads at once
    parts, number = map_in_parts(read, sources), 0
    while True:
        # While a part is read, the caller does not run, whose warnings must be as they were.
        with _pillow_warnings():
            part = next(parts, None)
        if part is None:
            return
        for image in part:
            number += 1
            if progress is not None:
                progress(number)
            yield image
