"""`load_dataset`: finds or prepares a dataset, and decodes it once."""

from __future__ import annotations

import errno
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
from cnn.data.prepare import DatasetSpec, check_label_names, find, first_line, prepare
from cnn.errors import UserError, one_line
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
_BATCH = 256  # records read at a time
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads an image-classification dataset into arrays, preparing it on the first call.

    >>> data = load_dataset("digits")
    >>> data.train.images.shape, data.test.images.shape, data.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)

    The first call downloads and prepares the dataset (cifar10, cifar100, mnist, fashion_mnist and
    digits do not need TensorFlow) and stores the decoded arrays in the user's cache folder. Later
    calls map them into memory. The test split is the one named "test" or, if there is none,
    "validation".

    Args:
      name: `name[/config][:version]` of a TFDS dataset, or "digits" (in scikit-learn, no download).
      data_dir: the directory of TFDS datasets; by default `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`. It may be read-only if it holds the dataset.

    Returns:
      A `Dataset` of images uint8[N, H, W, C] and labels int32[N], which are read-only.

    Raises:
      UserError: the name is unknown, there is no network, the archive is wrong, the directory
        cannot be written, TensorFlow is needed, images differ in size, or labels are out of range.
        The message is one line and says what to do.
    """
    spec = DatasetSpec.parse(name)
    try:
        cache_directory()  # its errors come before anything is written
        return _load_or_decode(_find_or_prepare(_data_dir(data_dir), spec), spec.title)
    except OSError as error:
        raise UserError(f"{name}: {error}") from error


def _load_or_decode(prepared: Path, name: str) -> Dataset:
    """Loads the arrays from the cache, or decodes the prepared files and writes the cache."""
    try:
        if (dataset := cache.load(prepared, name)) is not None:
            return dataset
        dataset = _decode(prepared, name)
        if cache.store(prepared, dataset):
            return cache.load(prepared, name) or dataset
    except cache.UnreadableError as error:
        folder, reason = error.args
        fault = f"the decoded images in {folder} cannot be read ({reason})"
        advice = "they are decoded again, and the folder is kept (XDG_CACHE_HOME moves the cache)"
        log_warning(one_line(f"{fault}; {advice}"))
        dataset = _decode(prepared, name)
    return dataset


def _data_dir(given: str | os.PathLike[str] | None) -> Path:
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


def _decode(prepared: Path, name: str) -> Dataset:
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
        test = "test" if "test" in splits else "validation"
        if "train" not in splits or test not in splits:
            raise UserError(
                f"{name} has the splits {', '.join(splits)}: train and test are needed (or train "
                "and validation); prepare it with both (docs/datasets.md), or read it with "
                "tfds.data_source, divide the images and pass them to cnn.Dataset.from_splits"
            )
        return Dataset.from_splits(
            name,
            train=_decode_split(builder, "train", image_key, label_key),
            test=_decode_split(builder, test, image_key, label_key),
            class_names=tuple(builder.info.features[label_key].names),
        )
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


def _decode_split(builder: Any, split: str, image_key: str, label_key: str) -> Split:
    number = builder.info.splits[split].num_examples
    examples = _examples(builder, split, image_key, label_key)
    labels = np.empty(number, np.int32)
    images = np.empty(0, np.uint8)
    index = -1
    with waiting(f"decoding {builder.name} {split}", sys.stderr) as task:
        for index, (image, label) in enumerate(counted(examples, task, number, "images")):
            if index == 0:
                images = np.empty((number, *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{builder.name} has images of several sizes ({images.shape[1:]} and "
                    f"{image.shape} in {split}): resize them first, or choose a dataset with one "
                    f"size"
                )
            images[index], labels[index] = image, label
    if index + 1 != number:
        raise ValueError(f"{index + 1} examples in {split}, {number} expected")
    for array in (images, labels):
        array.setflags(write=False)  # the mapped arrays of later calls are read-only too
    return Split(images, labels)


def _examples(
    builder: Any, split: str, image_key: str, label_key: str
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
        yield from _examples_through_tensorflow(builder, split, image_key, label_key)
        return
    too_large = PIL.Image.DecompressionBombWarning
    mode = _PIL_MODES[builder.info.features[image_key].shape[-1]]
    # Decoded here, not by TFDS: this is a third faster, and converts the colour mode.
    source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    if builder.info.file_format.value == "array_record":
        _check_number(builder.info.splits[split].filepaths, len(source))
    for start in range(0, len(source), _BATCH):
        for example in source.__getitems__(list(range(start, min(start + _BATCH, len(source))))):
            with (
                warnings.catch_warnings(action="error", category=too_large),
                PIL.Image.open(io.BytesIO(example[image_key])) as image,
            ):
                if image.mode.startswith(("I", "F")):
                    raise UserError(
                        f"{builder.name} has images of more than 8 bits a channel in {split}; "
                        f"convert them first, or choose another dataset"
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
    builder: Any, split: str, image_key: str, label_key: str
) -> Iterator[tuple[np.ndarray, int]]:
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
        yield example[image_key], int(example[label_key])
