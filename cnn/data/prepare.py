"""Finds or prepares the files of a dataset, in the directory layout of TFDS."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn.data import download
from cnn.errors import UserError
from cnn.runtime.checksums import write_checksums
from cnn.runtime.disk import is_file, is_writable
from cnn.runtime.screen import waiting

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_NAME = re.compile(r"(\w+)(?:/([\w.\-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class UnknownDatasetError(UserError):
    """A text is the name of no dataset."""


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """The parts of `name[/config][:version]`."""

    name: str
    config: str | None
    version: str | None

    @property
    def title(self) -> str:
        """The dataset's name in messages: without the version."""
        return f"{self.name}/{self.config}" if self.config else self.name

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """Parses `name[/config][:version]`; raises UnknownDatasetError for another form."""
        match = _NAME.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UnknownDatasetError(
                f"{text!r} is not a dataset name: write name, name/config or name:version, such "
                "as cifar10 or cifar10:3.0.2"
            )
        return cls(*match.groups())


def find(root: Path, spec: DatasetSpec) -> Path | None:
    """The newest prepared version under a TFDS data directory, without importing TFDS."""
    folder = root / spec.name
    default = folder / ".config" / "metadata.json"  # where TFDS records the default config
    if spec.config:
        folder /= spec.config
    elif is_file(default):
        # A damaged file counts as a dataset that is not prepared.
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            folder /= json.loads(default.read_text())["default_config_name"]
    versions = [spec.version] if spec.version else _versions(folder)
    prepared = [folder / v for v in versions if is_file(folder / v / "dataset_info.json")]
    return prepared[-1] if prepared else None


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """What is written beside a prepared dataset.

    Attributes:
      name: as `load_dataset` takes it.
      counts: of images, by split.
      num_classes: of the first feature that has classes; 0 if there is none.
      num_bytes: of the files.
    """

    name: str
    counts: dict[str, int]
    num_classes: int
    num_bytes: int


def list_prepared(root: Path) -> list[PreparedDataset]:
    """The datasets in a TFDS data directory, sorted, without importing TFDS.

    What cannot be read there is left out.
    """
    found = []
    for depth in ("*/*", "*/*/*"):  # name/version and name/config/version
        for folder in root.glob(depth):
            if _VERSION.fullmatch(folder.name):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                    found.append(_prepared(root, folder))
    return sorted(found, key=lambda dataset: dataset.name)


def _prepared(root: Path, folder: Path) -> PreparedDataset:
    info = json.loads((folder / "dataset_info.json").read_text())
    features = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]
    classes = [feature["classLabel"] for feature in features.values() if "classLabel" in feature]
    return PreparedDataset(
        name=f"{folder.parent.relative_to(root).as_posix()}:{folder.name}",
        counts={
            split["name"]: sum(int(number) for number in split["shardLengths"])
            for split in info["splits"]
        },
        num_classes=int(classes[0]["numClasses"]) if classes else 0,
        num_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
    )


def prepare(root: Path, spec: DatasetSpec) -> Path:
    """Downloads and prepares a dataset in a TFDS data directory.

    A failure leaves no partial files.

    Returns:
      The directory of the prepared files.

    Raises:
      UserError: the name, config or version is unknown; the directory cannot be written; there is
        no network; the archive is wrong; or only TensorFlow can prepare the dataset.
    """
    if not is_writable(root):
        raise UserError(
            f"{spec.name} is not in {root}, and that directory cannot be written to prepare it "
            "there: set TFDS_DATA_DIR (or data_dir) to another directory"
        )
    from cnn.data.builders import BUILDERS

    is_ours = spec.name in BUILDERS
    if is_ours and spec.config:
        raise UserError(f"{spec.title}: {spec.name} has no configs; name it without one")
    cls: Any = BUILDERS[spec.name] if is_ours else _stock_builder_class(spec.name)
    try:
        builder = cls(data_dir=root, config=spec.config, version=spec.version)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{spec.name}: {first_line(error)}") from error
    destination = Path(builder.data_dir)
    if destination.exists():  # TFDS would not prepare it again
        if (destination / "dataset_info.json").is_file():
            return destination
        raise UserError(
            f"{destination} is damaged (dataset_info.json is missing): delete it to have "
            f"{spec.name} prepared again"
        )
    _check_features(builder.info.features, spec.name)
    _ensure_archives(builder, root / "downloads", only_check=not is_ours)
    quiet = io.StringIO()  # TFDS reports the same at length
    try:
        with (
            waiting(f"preparing {spec.name} in {destination}", sys.stderr),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        if (found := find(root, spec)) is not None:
            return found  # another process has prepared it
        raise UserError(_why_not_prepared(spec.name, error)) from error
    write_checksums(destination)
    return destination


def check_label_names(names: Iterable[str], what: str) -> None:
    """Raises UserError for class names that a label file of TFDS cannot hold.

    >>> check_label_names(["cat", "polar bear"], "mine")

    Args:
      names: the names of all classes.
      what: the beginning of the message.
    """
    for index, name in enumerate(names):
        if name != name.strip() or not name or {"\n", "\r"} & set(name) or not _is_text(name):
            raise UserError(
                f"{what}: TFDS cannot keep the name {name!r} of class {index}: give each class a "
                "name without line breaks, and without blanks at its ends"
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_features(features: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    for feature in features.values() if isinstance(features, tfds.features.FeaturesDict) else ():
        if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes is not None:
            check_label_names(feature.names, name)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _versions(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    versions = [name for name in names if _VERSION.fullmatch(name)]
    return sorted(versions, key=lambda name: [int(part) for part in name.split(".")])


def _stock_builder_class(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    try:
        return tfds.builder_cls(name)
    except (registered.DatasetNotFoundError, ValueError) as error:
        from cnn.data.builders import BUILDERS

        known = {*BUILDERS, *tfds.list_builders(with_community_datasets=False)}
        near = difflib.get_close_matches(name.lower(), sorted(known), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets"
        raise UnknownDatasetError(f"there is no dataset {name!r} in TFDS: {hint}") from error


def _ensure_archives(
    builder: tfds.core.DatasetBuilder, downloads: Path, *, only_check: bool
) -> None:
    from tensorflow_datasets.core.download.resource import get_dl_fname

    for url, info in (builder.url_infos or {}).items():
        destination = downloads / "manual" / (info.filename or "")
        file = get_dl_fname(url, info.checksum)  # the name that TFDS's own downloader gives it
        cached = [downloads / builder.name / file, downloads / file]
        if not only_check:
            download.ensure_archive(
                url, size=info.size, sha256=info.checksum, destination=destination, cached=cached
            )
        elif not any(path.is_file() for path in (destination, *cached)):
            # Which of its archives a stock builder needs is unknown, so one answer is enough.
            return download.check_reachable(url, destination)


def _why_not_prepared(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        package = "tensorflow" if "tensorflow" in str(error) else error.name
        return (
            f"the TFDS builder of {name} needs {package}: pip install {package}, or prepare the "
            "dataset with file_format='array_record' elsewhere and set TFDS_DATA_DIR to it"
        )
    return f"cannot prepare {name}: {type(error).__name__}: {first_line(error)}"
