"""A folder of JPEG files with the size and the content of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

_HEIGHT, _WIDTH = 896, 1152  # 1.03 megapixels


def make_pictures(folder: Path, number: int) -> None:
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
