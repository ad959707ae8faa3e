"""`load_dataset`: finds or prepares a dataset, and decodes it once."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnn.data import cache
from cnn.data.dataset import Dataset, Split
from cnn.data.holdout import hold_out
from cnn.data.images import UnreadableImageError, read_images, to_array
from cnn.data.prepare import DatasetSpec, check_label_names, find, first_line, prepare
from cnn.data.settings import TEST_FRACTION, Settings, option
from cnn.errors import UserError
from cnn.runtime.checksums import CHECKSUMS, read_through, verify_checksums
from cnn.runtime.disk import (
    cache_directory,
    describe_read_error,
    is_file,
    is_writable,
    resolve_path,
)
from cnn.runtime.screen import counted, log_warning, waiting

_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FORMAT = 2
_TESTED = ("test", "validation")  # the names of a split for testing, the first comes first
_BATCH = 256  # records read at a time
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | tuple[int, int] = 0,
    resize: str = "crop",
    test_fraction: float = TEST_FRACTION,
    split_seed: int = 0,
) -> Dataset:
    """Loads an image-classification dataset into arrays, preparing it on the first call.

    >>> data = load_dataset("digits")
    >>> data.train.images.shape, data.test.images.shape, data.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)

    The first call downloads and prepares the dataset (cifar10, cifar100, mnist, fashion_mnist and
    digits do not need TensorFlow) and stores the decoded arrays in the user's cache folder. Later
    calls map them into memory. The test split is the one named "test" or, if there is none,
    "validation", or else a part of "train".

    Args:
      name: `name[/config][:version]` of a TFDS dataset, or "digits" (in scikit-learn, no download).
      data_dir: the directory of TFDS datasets; by default `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`. It may be read-only if it holds the dataset.
      image_size: height and width of the images, or one number for both; 0 keeps their size, which
        must be the same for all.
      resize: "crop" takes the largest centred part that has the proportions of image_size,
        "stretch" the whole picture.
      test_fraction: of each class, for a dataset without a test split.
      split_seed: another one puts other images into such a test split.

    Returns:
      A `Dataset` of images uint8[N, H, W, C] and labels int32[N], which are read-only.

    Raises:
      UserError: the name is unknown, there is no network, the archive is wrong, the directory
        cannot be written, TensorFlow is needed, images differ in size, or labels are out of range.
        The message is one line and says what to do.
    """
    spec = DatasetSpec.parse(name)
    how = Settings.checked(image_size, resize, test_fraction, split_seed)
    try:
        prepared = prepare_dataset(name, data_dir)
        identity = _identity(prepared, how)
        found = cache.load_or_decode(
            cache.Key(prepared, how.as_json()),
            spec.title,
            identity,
            lambda _: _decode(prepared, spec.title, how, identity),
        )
    except OSError as error:
        raise UserError(f"{name}: {error}") from error
    if found.details is not None:
        log_warning(found.details)
    elif unused := how.unused():
        log_warning(f"{name} has a test split; ignored: {', '.join(unused)}")
    return found.dataset


def prepare_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Downloads and prepares a dataset if it is not in the data directory yet.

    Args:
      name: as for `load_dataset`, as `data_dir` is.
      data_dir: the directory of TFDS datasets.

    Returns:
      The folder of the prepared files.

    Raises:
      UserError: as for `load_dataset`.
    """
    spec = DatasetSpec.parse(name)
    try:
        cache_directory()  # its errors come before anything is written
        return _find_or_prepare(data_directory(data_dir), spec)
    except OSError as error:
        raise UserError(f"{name}: {error}") from error


def _identity(prepared: Path, how: Settings) -> list[Any]:
    """What must be unchanged for the cache of a prepared dataset to be current."""
    # Another process may be writing SHA256SUMS at this moment, as a temporary file.
    files = sorted(e for e in prepared.iterdir() if e.is_file() and e.suffix != ".tmp")
    return [
        _FORMAT,
        str(prepared.resolve()),
        hashlib.sha256((prepared / "dataset_info.json").read_bytes()).hexdigest(),
        [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        *how.as_json(),
    ]


def data_directory(given: str | os.PathLike[str] | None = None) -> Path:
    """The directory of TFDS datasets: the given one, `$TFDS_DATA_DIR` or the default.

    Raises:
      UserError: it is not a path of this machine, or not UTF-8.
    """
    root = resolve_path(given or os.environ.get("TFDS_DATA_DIR") or _default_data_dir())
    try:
        os.fspath(root).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data_dir {root} is not UTF-8, and TFDS takes no other path") from error
    return root


def _default_data_dir() -> Path:
    """The default of TFDS, or a folder beside the cache for a user without a home directory."""
    try:
        return Path.home() / "tensorflow_datasets"
    except RuntimeError:
        return cache_directory() / "prepared"


def _find_or_prepare(root: Path, spec: DatasetSpec) -> Path:
    roots = [root]
    if spec.name == "digits":  # needs no download, so it works without a writable data directory
        roots.append(cache_directory() / "prepared")
    for candidate in roots:
        if (found := find(candidate, spec)) is not None:
            return found
    return prepare(next(filter(is_writable, roots), root), spec)


def _decode(prepared: Path, name: str, how: Settings, identity: list[Any]) -> cache.Cached:
    """Decodes the prepared files into arrays, which takes seconds per 10,000 images."""
    import PIL.Image
    import tensorflow_datasets as tfds

    try:
        damage = _damage(prepared)
    except OSError as error:
        raise UserError(
            f"the prepared {name} cannot be read: {describe_read_error(error)}"
        ) from error
    if damage is not None:
        raise UserError(
            f"the prepared {name} is damaged ({damage}): delete {prepared} to have it prepared "
            "again"
        )
    too_large = PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError
    try:
        _check_class_names(prepared, name)
        builder: Any = tfds.builder_from_directory(prepared)
        splits = builder.info.splits
        image_key, label_key = _supervised_keys(builder, name)
        if "train" not in splits:
            raise UserError(
                f"{name} has the splits {', '.join(splits)}: train is needed; prepare it with that "
                "(docs/datasets.md), or read it with tfds.data_source, divide the images and pass "
                "them to cnn.Dataset.from_splits"
            )
        note = None
        train = _decode_split(builder, "train", image_key, label_key, how)
        if (tested := next((name for name in _TESTED if name in splits), None)) is not None:
            shape = train.images.shape[1:]
            test = _decode_split(builder, tested, image_key, label_key, how, shape)
        else:
            train, test = _divide(train, name, how)
            note = f"{name} has no test split: {len(test):,} of its train images are set aside"
        dataset = Dataset.from_splits(
            name,
            train=train,
            test=test,
            class_names=tuple(builder.info.features[label_key].names),
        )
        return cache.Cached(dataset, identity, note)
    except UserError:
        raise
    except too_large as error:
        raise UserError(
            f"{name} has an image that Pillow takes for a decompression bomb ({first_line(error)}):"
            " choose another dataset"
        ) from error
    except MemoryError as error:
        raise UserError(f"{name} does not fit in memory: choose a smaller dataset") from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno not in _MISSING:
            raise UserError(
                f"the prepared {name} cannot be read: {describe_read_error(error)}"
            ) from error
        raise UserError(
            f"cannot read the prepared {name} ({first_line(error)}): delete {prepared} to have it "
            "prepared again"
        ) from error


def _damage(prepared: Path) -> str | None:
    """Describes damage to the files; raises OSError if one of them cannot be opened or read."""
    if is_file(prepared / CHECKSUMS):
        return verify_checksums(prepared, strict=False)
    # Datasets that stock TFDS prepared have no manifest and rely on the checks of the file format.
    # Those report an unreadable file as damage, so each file is read here first.
    for path in filter(is_file, sorted(prepared.iterdir())):
        read_through(path)
    return None


def _check_class_names(prepared: Path, name: str) -> None:
    """Raises UserError unless each line of a label file is the name of one class.

    TFDS writes one name per line, and strips and skips blank lines when it reads them. So a line
    break in a name, or an empty name, would give later classes the names of other classes.
    """
    import tensorflow_datasets as tfds

    description = json.loads((prepared / "features.json").read_text())
    features: Any = tfds.features.FeatureConnector.from_json(description)
    for key, feature in features.items():
        file = prepared / f"{key}.labels.txt"
        if isinstance(feature, tfds.features.ClassLabel) and is_file(file):
            lines = file.read_bytes().decode().replace("\r\n", "\n").split("\n")[:-1]
            check_label_names(lines, f"{name}: {file}")
            if len(lines) != feature.num_classes:
                raise UserError(
                    f"{name}: {file} has {len(lines)} lines for {feature.num_classes} classes: "
                    f"prepare it with names without line breaks"
                )


def _supervised_keys(builder: Any, name: str) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    match keys:
        case (str(image), str(label)):
            is_classification = (
                isinstance(features[image], tfds.features.Image)
                and isinstance(features[label], tfds.features.ClassLabel)
                and features[image].np_dtype == np.uint8
                and features[image].shape[-1] in _PIL_MODES
            )
            if is_classification:
                return image, label
    raise UserError(
        f"{name} is not a dataset of 8-bit images with one class each (its supervised keys are "
        f"{keys}): choose an image-classification dataset"
    )


def _divide(train: Split, name: str, how: Settings) -> tuple[Split, Split]:
    """Sets a part of the train split aside for testing."""
    is_test = hold_out(
        list(map(str, range(len(train)))),
        train.labels,
        test_fraction=how.test_fraction,
        split_seed=how.split_seed,
    )
    if not is_test.any():
        raise UserError(
            f"{name} has only the train split, and one image of each class: none can be set aside "
            "for testing; choose a larger dataset"
        )
    first, second = (
        Split(_read_only(train.images[chosen]), _read_only(train.labels[chosen]))
        for chosen in (~is_test, is_test)
    )
    return first, second


def _decode_split(
    builder: Any,
    split: str,
    image_key: str,
    label_key: str,
    how: Settings,
    shape: tuple[int, ...] | None = None,
) -> Split:
    """Decodes the images of a split.

    Args:
      builder: of the dataset.
      split: which.
      image_key: the feature that is the image.
      label_key: the feature that is the class.
      how: the size of the images.
      shape: of the images of another split, which these must have too.
    """
    number = builder.info.splits[split].num_examples
    examples = _examples(builder, split, image_key, label_key, how)
    labels = np.empty(number, np.int32)
    images = np.empty(0, np.uint8)
    index = -1
    with waiting(f"decoding {builder.name} {split}", sys.stderr) as task:
        for index, (image, label) in enumerate(counted(examples, task, number, "images")):
            if index == 0:
                shape = shape or image.shape
                images = np.empty((number, *shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{builder.name} has images of several sizes (such as {images.shape[1:]} and "
                    f"{image.shape} in {split}): resize them, for example with "
                    f"{option('image_size', _suggested_side(images.shape))}"
                )
            images[index], labels[index] = image, label
    if index + 1 != number:
        raise ValueError(f"{index + 1} examples in {split}, {number} expected")
    return Split(_read_only(images), _read_only(labels))


def _suggested_side(shape: tuple[int, ...]) -> int:
    return min(*shape[1:3], 64)


def _read_only(array: np.ndarray) -> np.ndarray:
    """The array, which cannot be written, as the mapped ones of later calls."""
    array.setflags(write=False)
    return array


def _examples(
    builder: Any, split: str, image_key: str, label_key: str, how: Settings
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields image uint8[H, W, C] and label of each example, in the order of the files."""
    import PIL.Image
    import tensorflow_datasets as tfds

    if builder.info.file_format.value == "parquet":
        raise UserError(
            f"{builder.data_dir} holds parquet files, which are not read here: prepare the dataset "
            "with file_format='array_record' (docs/datasets.md), or set TFDS_DATA_DIR to another "
            "directory to have it prepared there"
        )
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        yield from _examples_through_tensorflow(builder, split, image_key, label_key, how)
        return
    too_large = PIL.Image.DecompressionBombWarning
    mode = _PIL_MODES[builder.info.features[image_key].shape[-1]]
    # Decoded here, not by TFDS: this is a third faster, and converts the colour mode.
    source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    if builder.info.file_format.value == "array_record":
        _check_number(builder.info.splits[split].filepaths, len(source))
    for start in range(0, len(source), _BATCH):
        batch = source.__getitems__(list(range(start, min(start + _BATCH, len(source)))))
        if how.size is not None:
            records = [example[image_key] for example in batch]
            images = read_images(records, size=how.size, channels=len(mode), resize=how.resize)
            for index, (example, image) in enumerate(zip(batch, images, strict=True), start):
                if isinstance(image, UnreadableImageError):
                    raise ValueError(f"image {index} of {split}: {image}")
                yield image, int(example[label_key])
            continue
        for example in batch:
            with (
                warnings.catch_warnings(action="error", category=too_large),
                PIL.Image.open(io.BytesIO(example[image_key])) as image,
            ):
                if image.mode.startswith(("I", "F")):
                    raise UserError(
                        f"{builder.name} has images of more than 8 bits a channel in {split}: set "
                        f"{option('image_size', 64)}, which converts them, or choose another "
                        f"dataset"
                    )
                pixels = np.asarray(image.convert(mode))
            yield pixels.reshape(*pixels.shape[:2], -1), int(example[label_key])


def _check_number(files: list[Path], expected: int) -> None:
    """Raises ValueError if dataset_info.json, which may be damaged, misses or adds examples."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource(list(map(str, files))) as records:
        if len(records) != expected:
            raise ValueError(f"the files hold {len(records)} examples, not {expected}")


def _examples_through_tensorflow(
    builder: Any, split: str, image_key: str, label_key: str, how: Settings
) -> Iterator[tuple[np.ndarray, int]]:
    import PIL.Image
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{builder.data_dir} holds {builder.info.file_format.value} files, which only "
            "TensorFlow reads: pip install tensorflow, or set TFDS_DATA_DIR to another directory "
            "to have the dataset prepared there without it"
        )
    one_file_after_another = tfds.ReadConfig(interleave_cycle_length=1)
    examples = builder.as_dataset(split=split, read_config=one_file_after_another)
    for example in tfds.as_numpy(examples):
        pixels = example[image_key]
        if how.size is not None:
            channels = pixels.shape[-1]
            picture = PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            pixels = to_array(picture, size=how.size, channels=channels, resize=how.resize)
        yield pixels, int(example[label_key])
