"""Folders of pictures: photographs of one size, and a mixture of all kinds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

_HEIGHT, _WIDTH = 896, 1152  # 1.03 megapixels


def make_photographs(folder: Path, number: int) -> None:
    """Writes JPEG files of about a megapixel and 300 kB, each another picture.

    Smooth shapes at several scales and a little noise: a camera's files have about that size.

    Args:
      folder: is created; the files are in one folder below it, as Keras wants it.
      number: of files.
    """
    place = folder / "photos"
    place.mkdir(parents=True)
    for index in range(number):
        rng = np.random.default_rng(index)
        picture = np.zeros((_HEIGHT, _WIDTH, 3), np.float32)
        for scale in (4, 16, 64, 256):
            grid = rng.normal(size=(scale, scale, 3)).astype(np.float32)
            low, high = grid.min(), grid.max()
            small = PIL.Image.fromarray(np.uint8(255 * (grid - low) / (high - low)))
            large = small.resize((_WIDTH, _HEIGHT), PIL.Image.Resampling.BICUBIC)
            picture += np.asarray(large, np.float32) / scale**0.5
        picture += rng.normal(scale=3, size=picture.shape).astype(np.float32)
        picture = 255 * (picture - picture.min()) / np.ptp(picture)
        image = PIL.Image.fromarray(picture.astype(np.uint8))
        image.save(place / f"{index:05}.jpg", quality=90)


# Colour mode, format and share of the files of a mixture.
_KINDS = (
    *[("RGB", "JPEG")] * 12,
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "PNG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("LA", "PNG"),
    ("I;16", "PNG"),
    ("1", "PNG"),
    ("RGB", "WEBP"),
    ("P", "GIF"),
    ("RGB", "BMP"),
    ("RGB", "TIFF"),
)
_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 88}, "PNG": {"compress_level": 1}}
_CLASSES = ("blue", "cyan", "green", "red", "yellow")
_TINTS = ((0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 0, 0), (255, 255, 0))
_CUT, _NO_PICTURE = 499, 13  # the places of the damaged files, in each thousand


def make_mixture(folder: Path, number: int, side: int = 1000) -> int:
    """Writes pictures of many formats, modes and sizes in a folder per class, some of them damaged.

    The classes differ in their tint, which half of a picture has.

    Args:
      folder: is created.
      number: of files.
      side: the largest width and height; the smallest is a fifth of it.

    Returns:
      How many files are damaged: cut in half, or no picture at all.
    """
    rng, damaged = np.random.default_rng(0), 0
    for index in range(number):
        label = index % len(_CLASSES)
        mode, kind = _KINDS[rng.integers(len(_KINDS))]
        width, height = rng.integers(side // 5, side + 1, 2).tolist()
        noise = rng.integers(0, 256, (12, 12, 3), np.uint8)
        pixels = np.uint8(noise / 2 + np.array(_TINTS[label]) / 2)
        image = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)
        if mode == "I;16":
            image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode != "RGB":
            image = image.convert(mode)
        stream = io.BytesIO()
        image.save(stream, kind, **_OPTIONS.get(kind, {}))
        content = stream.getvalue()
        if index % 1000 == _CUT:
            content, damaged = content[: len(content) // 2], damaged + 1
        if index % 1000 == _NO_PICTURE:
            content, damaged = b"<html>not found</html>", damaged + 1
        place = folder / _CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:06}.{kind.lower()}").write_bytes(content)
    return damaged
