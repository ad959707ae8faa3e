"""The in-memory dataset: two splits of images and labels, class names and statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from cnn.errors import UserError, array_type, number_of

_NAMES_SHOWN = 5  # of classes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The images and labels of one split, checked on construction.

    Attributes:
      images: uint8[N, H, W, C]; may be a read-only memory map.
      labels: int32[N].
      paths: of the files that the images were read from, if they come from files; the fingerprint
        of a dataset does not depend on them.

    Raises:
      UserError: an array has a wrong type, dtype or rank, the lengths differ, the paths are not a
        tuple of text, or no image is given.
    """

    images: np.ndarray
    labels: np.ndarray
    paths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_array("images", self.images, np.uint8, "[N, H, W, C]")
        _check_array("labels", self.labels, np.int32, "[N]")
        if not self.images.size:
            raise UserError(f"images are empty (shape {self.images.shape}): give at least one")
        if len(self.images) != len(self.labels):
            raise UserError(
                f"{number_of(len(self.images), 'image')} but "
                f"{number_of(len(self.labels), 'label')}: give one label per image"
            )
        _check_paths(self.paths, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        paths = "" if self.paths is None else f", paths {self.paths[0]!r} ..."
        return (
            f"Split(images {array_type(self.images)}, labels {self.labels.min()}.."
            f"{self.labels.max()}{paths})"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A train and a test split with class names, statistics and a fingerprint.

    `Dataset.from_splits` computes the statistics and the fingerprint for arrays of your own.

    Attributes:
      name: the name that messages use.
      train, test: the two splits; all images have the same shape.
      class_names: one name per class; labels are indices into it.
      mean, std: float32[C], per channel over the train split, in units of pixel / 255.
      fingerprint: SHA-256 of the images and labels of both splits, independent of the file format
        they were read from.

    Raises:
      UserError: the parts do not fit together, or a label is not in 0..K-1 for K classes.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    fingerprint: str

    def __post_init__(self) -> None:
        _check_parts(self.name, self.train, self.test, self.class_names)
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise UserError(
                f"{self.name}: train images are {self.train.images.shape[1:]} but test images "
                f"{self.test.images.shape[1:]}: bring them to one (height, width, channels)"
            )
        for title, split in (("train", self.train), ("test", self.test)):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"{self.name}: labels of the {title} split run from {low} to {high}, but with "
                    f"{self.num_classes} classes they must lie in 0..{self.num_classes - 1}"
                )
        for title, values in (("mean", self.mean), ("std", self.std)):
            _check_array(title, values, np.float32, "[C]")
            if values.shape != self.image_shape[-1:] or not np.isfinite(values).all():
                raise UserError(
                    f"{self.name}: {title} must be {self.image_shape[-1]} finite numbers, one per "
                    f"channel, not {values}"
                )

    def __repr__(self) -> str:
        more = ", ..." if self.num_classes > _NAMES_SHOWN else ""
        return (
            f"Dataset({self.name!r}, {len(self.train):,} train and {len(self.test):,} test images "
            f"of {'x'.join(map(str, self.image_shape))}, "
            f"{number_of(self.num_classes, 'class', 'classes')}: "
            f"{', '.join(map(repr, self.class_names[:_NAMES_SHOWN]))}{more})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, K, including those without images."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @classmethod
    def from_splits(
        cls, name: str, *, train: Split, test: Split, class_names: Sequence[str]
    ) -> Dataset:
        """Makes a `Dataset` from arrays; computes its statistics and fingerprint.

        >>> split = Split(np.full((2, 4, 4, 1), 51, np.uint8), np.array([0, 1], np.int32))
        >>> data = Dataset.from_splits("grey", train=split, test=split, class_names=("a", "b"))
        >>> data.image_shape, data.mean.item()
        ((4, 4, 1), 0.20000000298023224)

        Raises:
          UserError: as for `Dataset`.
        """
        _check_parts(name, train, test, class_names)
        mean, std = channel_statistics(train.images)
        return cls(name, train, test, tuple(class_names), mean, std, fingerprint(train, test))


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each channel of images uint8[N, H, W, C].

    Both are float32[C] in units of pixel / 255. They are computed from integer counts of the pixel
    values, so they do not depend on the order of summation.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 1024):  # in pieces: bincount converts to int64
        pixels = images[start : start + 1024].reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    values = np.arange(256)
    mean, std = [], []
    for total, square in zip(
        (counts @ values).tolist(), (counts @ values**2).tolist(), strict=True
    ):
        number = images.size // channels
        mean.append(total / number / 255)
        std.append(math.sqrt(number * square - total * total) / number / 255)
    return np.array(mean, np.float32), np.array(std, np.float32)


def fingerprint(train: Split, test: Split) -> str:
    """SHA-256 of dtype, shape and little-endian values of images and labels, train split first."""
    digest = hashlib.sha256()
    for split in (train, test):
        for array in (split.images, split.labels.astype("<i4", copy=False)):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_parts(name: object, train: object, test: object, class_names: object) -> None:
    if not isinstance(name, str):
        raise UserError(f"the name of a dataset must be text, not {name!r}")
    for title, split in (("train", train), ("test", test)):
        if not isinstance(split, Split):
            raise UserError(f"{name}: {title} must be a Split, not {type(split).__name__}")
    if not isinstance(class_names, tuple | list) or not all(
        isinstance(class_name, str) for class_name in class_names
    ):
        raise UserError(f"{name}: class_names must be a tuple of text, not {class_names!r}")


def _check_paths(paths: object, number: int) -> None:
    if paths is None:
        return
    if not isinstance(paths, tuple) or not all(isinstance(path, str) for path in paths):
        kind = type(paths).__name__
        raise UserError(f"paths must be a tuple of text, not {kind}: convert with tuple(map(str))")
    if len(paths) != number:
        raise UserError(
            f"{number_of(number, 'image')} but {number_of(len(paths), 'path')}: give one path per "
            f"image, or none"
        )


def _check_array(title: str, value: object, dtype: type[np.generic], shape: str) -> None:
    wanted = f"{title} must be a numpy array {np.dtype(dtype).name}{shape}"
    if not isinstance(value, np.ndarray):
        raise UserError(f"{wanted}, not {type(value).__name__}: convert with numpy.asarray")
    if value.dtype != dtype or value.ndim != shape.count(",") + 1:
        raise UserError(f"{wanted}, not {value.dtype.name}{list(value.shape)}: convert it first")
