"""`load_folder`: pictures in a folder per class, decoded once.

Later starts map the decoded arrays. What a file was is known by its size and times, and where these
differ by the SHA-256 of its content; only content that is new is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn.data import cache
from cnn.data.dataset import Dataset, Split
from cnn.data.holdout import hold_out
from cnn.data.images import (
    NAMES_SHOWN,
    UnreadableImageError,
    name_unreadable,
    read_images,
    size_text,
)
from cnn.data.layout import Layout, PictureFile, find_pictures
from cnn.data.settings import TEST_FRACTION, Settings, option
from cnn.errors import UserError, one_line
from cnn.runtime.cores import map_in_parts
from cnn.runtime.disk import cache_directory, describe_read_error, resolve_path
from cnn.runtime.memory import available_memory
from cnn.runtime.screen import counted, log_warning, waiting

ON_UNREADABLE = ("skip", "stop")
_FORMAT = 1
_CHANNELS = 3
_FEW = 10  # images of a class
_UNREADABLE = -1  # in place of the row of an image


def load_folder(
    folder: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] = 0,
    resize: str = "crop",
    test_fraction: float = TEST_FRACTION,
    split_seed: int = 0,
    on_unreadable: str = "skip",
) -> Dataset:
    """Loads pictures from a folder that has a folder per class, as RGB.

    The folders of the classes may be in `train` and `test` (or `val`, `validation`, `valid`);
    without a folder for testing, a part of each class is set aside. The first call decodes the
    pictures on all cores and stores the arrays in the user's cache folder; later calls map them
    into memory, and decode only pictures that are new or changed.

    Args:
      folder: the pictures.
      image_size: height and width of the images, or one number for both; 0 keeps their size, which
        must be the same for all.
      resize: "crop" takes the largest centred part that has the proportions of image_size,
        "stretch" the whole picture.
      test_fraction: of each class, if there is no folder for testing.
      split_seed: another one sets other pictures aside.
      on_unreadable: "skip" leaves pictures out that cannot be read, with a warning that names them;
        "stop" raises an error.

    Returns:
      A `Dataset` named after the folder, in the order of the paths, with read-only arrays. The
      `paths` of its splits are relative to the folder.

    Raises:
      UserError: the folder has another layout, cannot be read, has a class without pictures, or
        pictures of several sizes; they do not fit in memory; or an argument is wrong. The message
        is one line and says what to do.
    """
    how = Settings.checked(image_size, resize, test_fraction, split_seed)
    if on_unreadable not in ON_UNREADABLE:
        raise UserError(
            f"on_unreadable={on_unreadable!r} must be one of {', '.join(ON_UNREADABLE)}"
        )
    root = resolve_path(folder)
    name = root.name or str(root)
    try:
        cache_directory()  # its errors come before anything is decoded
        layout = find_pictures(root)
        files = [[file.path, *file.version] for file in layout.files]
        identity = [_FORMAT, hashlib.sha256(json.dumps(files).encode()).hexdigest()]
        found = cache.load_or_decode(
            cache.Key(root, ("folder", *how.as_json())),
            name,
            identity,
            lambda previous: _decode(root, layout, how, identity, previous),
        )
    except OSError as error:
        raise UserError(f"{name} cannot be read: {describe_read_error(error)}") from error
    unreadable = [tuple(pair) for pair in found.details["unreadable"]]
    if unreadable and on_unreadable == "stop":
        raise UserError(
            f"{name_unreadable(unreadable)} in {root} cannot be read: remove or replace them, or "
            f"leave them out with {option('on_unreadable', 'skip')}"
        )
    _report(root, layout, how, found.dataset, unreadable)
    return _with_paths(found)


def _with_paths(found: cache.Cached) -> Dataset:
    """The dataset, with the path of each image, which the details tell."""
    dataset, number = found.dataset, len(found.dataset.train)
    pairs = zip(found.details["rows"], found.details["files"], strict=True)
    paths = [path for row, (path, *_) in sorted(pairs) if row != _UNREADABLE]
    return dataclasses.replace(
        dataset,
        train=dataclasses.replace(dataset.train, paths=tuple(paths[:number])),
        test=dataclasses.replace(dataset.test, paths=tuple(paths[number:])),
    )


def _report(
    root: Path,
    layout: Layout,
    how: Settings,
    dataset: Dataset,
    unreadable: Sequence[tuple[str, str]],
) -> None:
    """Says what was left out or has no effect, and which classes have few images."""
    lines = list(layout.notes)
    if layout.files[0].is_test is not None and (unused := how.unused()):
        lines.append(f"{root} has a test split; ignored: {', '.join(unused)}")
    if unreadable:
        left_out = "is left out" if len(unreadable) == 1 else "are left out"
        lines.append(f"{name_unreadable(unreadable)} in {root} cannot be read and {left_out}")
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()
    few = [
        f"{name} {number}"
        for name, number in zip(dataset.class_names, counts, strict=True)
        if number < _FEW
    ]
    if few:
        shown = ", ".join(few[:NAMES_SHOWN]) + (" ..." if len(few) > NAMES_SHOWN else "")
        lines.append(
            f"classes with less than {_FEW} images to train on: {shown}; more pictures would help"
        )
    for line in lines:
        log_warning(one_line(line))


def _decode(
    root: Path,
    layout: Layout,
    how: Settings,
    identity: list[Any],
    previous: cache.Cached | None,
) -> cache.Cached:
    """Makes the dataset, with the pixels of an earlier one as far as their files are the same.

    The details are path and version of each file, the SHA-256 of its content and the row of its
    image (the test images follow the train images); and of unreadable files path and reason.
    """
    files = layout.files
    _check_classes(root, layout, [None] * len(files))
    known = _Known.of(previous)
    digests = _digests(root, files, known)
    order, num_train = _order(files, how)
    images, errors = _images(root, files, how, known, digests, order)
    if any(errors):
        _check_classes(root, layout, errors)
        # What cannot be read takes no part in the division.
        rows = _inverse(order, len(files))
        readable = np.array([index for index, error in enumerate(errors) if error is None])
        order, num_train = _order([files[index] for index in readable], how)
        order = readable[order]
        images = images[rows[order]]
    if num_train == len(order):
        raise UserError(
            f"{root} has one picture of each class, and none can be set aside for testing: add more"
        )
    labels = np.array([files[index].label for index in order], np.int32)
    for array in (images, labels):
        array.setflags(write=False)
    dataset = Dataset.from_splits(
        root.name or str(root),
        train=Split(images[:num_train], labels[:num_train]),
        test=Split(images[num_train:], labels[num_train:]),
        class_names=layout.class_names,
    )
    details = {
        "files": [[file.path, *file.version] for file in files],
        "digests": digests,
        "rows": _inverse(order, len(files)).tolist(),
        "unreadable": [
            (file.path, str(error))
            for file, error in zip(files, errors, strict=True)
            if error is not None
        ],
    }
    # A disk that fails may work again: what it refused is tried again at each start.
    is_final = not any(map(_is_refusal, errors))
    return cache.Cached(dataset, identity if is_final else None, details)


def _is_refusal(error: UnreadableImageError | None) -> bool:
    """Whether the operating system is the reason, and not the content of the file."""
    cause = error and error.__cause__
    return isinstance(cause, OSError) and cause.errno is not None


def _check_classes(
    root: Path, layout: Layout, errors: Sequence[UnreadableImageError | None]
) -> None:
    """Raises UserError if a class has no readable picture to train on, or none is for testing.

    Args:
      root: the folder.
      layout: what it holds.
      errors: why a file cannot be read, for each file; None if it can.
    """
    pairs = list(zip(layout.files, errors, strict=True))
    trained = {file.label for file, error in pairs if error is None and not file.is_test}
    missing = [name for i, name in enumerate(layout.class_names) if i not in trained]
    unreadable = [(file.path, str(error)) for file, error in pairs if error is not None]
    but = f"; {name_unreadable(unreadable)} cannot be read" if unreadable else ""
    if missing:
        names = ", ".join(missing[:NAMES_SHOWN]) + (" ..." if len(missing) > NAMES_SHOWN else "")
        raise UserError(
            f"{root} has no picture to train on of the class {names}: add some, or remove the "
            f"folder{but}"
        )
    if any(file.is_test for file in layout.files) and not any(
        file.is_test and error is None for file, error in pairs
    ):
        raise UserError(f"{root} has no picture to test on that can be read: add some{but}")


def _order(files: Sequence[PictureFile], how: Settings) -> tuple[np.ndarray, int]:
    """The files of the train images in order, then those of the test images; how many train."""
    if files[0].is_test is None:
        is_test = hold_out(
            [file.path for file in files],
            np.array([file.label for file in files]),
            test_fraction=how.test_fraction,
            split_seed=how.split_seed,
        )
    else:
        is_test = np.array([bool(file.is_test) for file in files])
    return np.argsort(is_test, kind="stable"), int((~is_test).sum())


def _inverse(order: np.ndarray, number: int) -> np.ndarray:
    """The place of each of a number of files in an order; `_UNREADABLE` if it is not there."""
    rows = np.full(number, _UNREADABLE)
    rows[order] = np.arange(len(order))
    return rows


def _digests(root: Path, files: Sequence[PictureFile], known: _Known) -> list[str | None]:
    """SHA-256 of the content of each file; None if it cannot be read."""

    def digest(file: PictureFile) -> str | None:
        if (digest := known.digests.get((file.path, *file.version))) is not None:
            return digest
        try:
            with open(root / file.path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return None

    with waiting(f"reading {root.name}", sys.stderr) as task:
        found = itertools.chain.from_iterable(map_in_parts(digest, files))
        return list(counted(found, task, len(files), "files"))


def _images(
    root: Path,
    files: Sequence[PictureFile],
    how: Settings,
    known: _Known,
    digests: Sequence[str | None],
    order: np.ndarray,
) -> tuple[np.ndarray, list[UnreadableImageError | None]]:
    """Pixels `uint8[N, H, W, 3]` in an order of the files, and why a file cannot be read."""
    errors: list[UnreadableImageError | None] = [None] * len(files)
    rows = _inverse(order, len(files))
    images, first = np.empty(0, np.uint8), 0
    if how.size is not None:
        _check_memory(root, (len(files), *how.size, _CHANNELS))
    new = [index for index, digest in enumerate(digests) if digest not in known.rows]
    with waiting(f"decoding {root.name}", sys.stderr) as task:
        decoded = read_images(
            [root / files[index].path for index in new],
            size=how.size,
            channels=_CHANNELS,
            resize=how.resize,
        )
        decoded = zip(new, counted(decoded, task, len(new), "pictures"), strict=True)
        for index, image in itertools.chain(_reused(known, digests), decoded):
            if isinstance(image, UnreadableImageError):
                errors[index] = image
                continue
            if not images.size:
                _check_memory(root, (len(files), *image.shape))
                images, first = np.empty((len(files), *image.shape), np.uint8), index
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{root} has pictures of several sizes, such as {size_text(images.shape[1:])} "
                    f"({files[first].path}) and {size_text(image.shape)} ({files[index].path}): "
                    f"bring them to one, say with {option('image_size', 64)}"
                )
            images[rows[index]] = image
    return images, errors


def _reused(known: _Known, digests: Sequence[str | None]) -> Iterator[tuple[int, np.ndarray]]:
    for index, digest in enumerate(digests):
        if digest in known.rows:
            yield index, known.pixels(known.rows[digest])


def _check_memory(root: Path, shape: tuple[int, ...]) -> None:
    needed, free = math.prod(shape), available_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{shape[0]:,} pictures of {size_text(shape[1:])} in {root} take "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: make them "
            f"smaller, say with {option('image_size', 64)}"
        )


@dataclasses.dataclass(frozen=True)
class _Known:
    """What an earlier dataset tells.

    Attributes:
      digests: SHA-256 of files, by path and version.
      rows: of images, by SHA-256.
      dataset: holds them.
    """

    digests: dict[tuple[Any, ...], str]
    rows: dict[str | None, int]
    dataset: Dataset | None

    @classmethod
    def of(cls, previous: cache.Cached | None) -> _Known:
        """What is in the cache, if anything is."""
        if previous is None:
            return cls({}, {}, None)
        files, digests, rows = (previous.details[key] for key in ("files", "digests", "rows"))
        return cls(
            {tuple(f): digest for f, digest in zip(files, digests, strict=True) if digest},
            {digest: row for digest, row in zip(digests, rows, strict=True) if row != _UNREADABLE},
            previous.dataset,
        )

    def pixels(self, row: int) -> np.ndarray:
        """An image; the test images follow the train images."""
        assert self.dataset is not None
        number = len(self.dataset.train)
        split = self.dataset.train if row < number else self.dataset.test
        return split.images[row if row < number else row - number]
