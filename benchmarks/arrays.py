"""Datasets as NumPy archives, as Keras caches CIFAR-10, for programs and machines without TFDS."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from cnn import Dataset, Split, UserError

_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def write_arrays(path: Path, data: Dataset) -> None:
    """Writes images `uint8[N, H, W, C]` and labels `int32[N]` of both splits."""
    splits = (data.train.images, data.train.labels, data.test.images, data.test.labels)
    np.savez(path, **dict(zip(_NAMES, splits, strict=True)))


def read_arrays(path: str | os.PathLike[str]) -> Dataset:
    """The dataset of an archive, with numbers for names of classes.

    Raises:
      UserError: the file is not such an archive.
    """
    try:
        with np.load(path) as held:
            train, labels, test, answers = (held[name] for name in _NAMES)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a NumPy archive of {', '.join(_NAMES)} ({error}); give one, or leave "
            f"--data out"
        ) from error
    return Dataset.from_splits(
        Path(path).stem,
        train=Split(train.astype(np.uint8), labels.astype(np.int32).ravel()),
        test=Split(test.astype(np.uint8), answers.astype(np.int32).ravel()),
        class_names=tuple(map(str, range(1 + max(int(labels.max()), int(answers.max()))))),
    )


def random_dataset(num_train: int, num_test: int) -> Dataset:
    """Noise in the shape of CIFAR-10, the same each time: for timing only."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        return Split(images, rng.integers(10, size=count, dtype=np.int32))

    return Dataset.from_splits(
        "random images",
        train=split(num_train),
        test=split(num_test),
        class_names=tuple(map(str, range(10))),
    )


def first_images(data: Dataset, count: int) -> Dataset:
    """The dataset with the first training images only, and as many test images or fewer."""

    def first(split: Split) -> Split:
        return Split(split.images[:count], split.labels[:count])

    return Dataset.from_splits(
        data.name, train=first(data.train), test=first(data.test), class_names=data.class_names
    )
