"""Which images of each class are set aside for testing, where a dataset does not say it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from cnn.errors import UserError


def check_split(test_fraction: float, split_seed: int) -> None:
    """Raises UserError unless the fraction lies between 0 and 1, and the seed is a whole number."""
    number = isinstance(test_fraction, int | float) and not isinstance(test_fraction, bool)
    if not number or not 0 < test_fraction < 1:
        raise UserError(f"test_fraction={test_fraction!r} must be more than 0 and less than 1")
    if not isinstance(split_seed, int) or isinstance(split_seed, bool):
        raise UserError(f"split_seed={split_seed!r} must be a whole number")


def hold_out(
    names: Sequence[str], labels: np.ndarray, *, test_fraction: float, split_seed: int
) -> np.ndarray:
    """Chooses the images for testing: the same fraction of each class.

    Within a class the images are ranked by SHA-256 of seed and name, and the first ones are chosen.
    So another image in a class changes at most one of the others.

    >>> names = [f"cat/{i}.png" for i in range(10)]
    >>> is_test = hold_out(names, np.zeros(10, np.int32), test_fraction=0.2, split_seed=0)
    >>> is_test.sum().item()
    2

    Args:
      names: of the images, all different.
      labels: their classes, `int[N]`.
      test_fraction: of each class, rounded; but each class of two and more images has at least one
        image in each part. A single image is for training.
      split_seed: another seed chooses other images.

    Returns:
      `bool[N]`.
    """
    is_test = np.zeros(len(names), bool)
    ranks = [hashlib.sha256(os.fsencode(f"{split_seed}/{name}")).digest() for name in names]
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=ranks.__getitem__)
        most = len(members) - 1
        number = min(max(round(len(members) * test_fraction), 1), most)
        is_test[members[:number]] = True
    return is_test
