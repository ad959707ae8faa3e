"""From a name to a directory of prepared files, in the layout and with the builders of TFDS."""

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
from cnn.runtime.checksums import write_manifest
from cnn.runtime.disk import is_file, is_writable
from cnn.runtime.screen import waiting

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_NAME = re.compile(r"(\w+)(?:/([\w.\-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Request:
    """`name[/config][:version]`, taken apart."""

    name: str
    config: str | None
    version: str | None

    @property
    def title(self) -> str:
        """What to call the dataset: its name without the version."""
        return f"{self.name}/{self.config}" if self.config else self.name

    @classmethod
    def parse(cls, text: str) -> Request:
        """Raises `UserError` if the text has another form."""
        match = _NAME.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UserError(
                f"{text!r} is not a dataset name: write name, name/config or name:version, such "
                "as cifar10 or cifar10:3.0.2"
            )
        return cls(*match.groups())


def find(root: Path, request: Request) -> Path | None:
    """The newest prepared version under a TFDS data directory, without importing TFDS."""
    folder = root / request.name
    default = folder / ".config" / "metadata.json"  # how TFDS notes the default config
    if request.config:
        folder /= request.config
    elif is_file(default):
        with contextlib.suppress(
            ValueError, KeyError, TypeError, RecursionError
        ):  # damaged: as if not prepared
            folder /= json.loads(default.read_text())["default_config_name"]
    versions = [request.version] if request.version else _versions(folder)
    prepared = [folder / v for v in versions if is_file(folder / v / "dataset_info.json")]
    return prepared[-1] if prepared else None


def prepare(root: Path, request: Request) -> Path:
    """Downloads and prepares a dataset under `root`; nothing half-made stays behind.

    Raises:
      UserError: an unknown name, config or version; a directory that cannot be written; no
        network; a wrong archive; or a dataset that only TensorFlow can prepare.
    """
    if not is_writable(root):
        raise UserError(
            f"{request.name} is not in {root}, and that directory cannot be written to prepare it "
            "there: set TFDS_DATA_DIR (or data_dir) to another directory"
        )
    from cnn.data.builders import BUILDERS

    ours = request.name in BUILDERS
    if ours and request.config:
        raise UserError(f"{request.title}: {request.name} has no configs; name it without one")
    cls: Any = BUILDERS[request.name] if ours else _stock_builder_class(request.name)
    try:
        builder = cls(data_dir=root, config=request.config, version=request.version)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{request.name}: {first_line(error)}") from error
    place = Path(builder.data_dir)
    if place.exists():  # TFDS would take it as it is
        if (place / "dataset_info.json").is_file():
            return place
        raise UserError(
            f"{place} is damaged (dataset_info.json is missing): delete it to have {request.name} "
            "prepared again"
        )
    _check_features(builder.info.features, request.name)
    _ensure_archives(builder, root / "downloads", only_check=not ours)
    quiet = io.StringIO()  # TFDS writes the same at length
    try:
        with (
            waiting(f"preparing {request.name} in {place}", sys.stderr),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        if (found := find(root, request)) is not None:
            return found  # another process was faster
        raise UserError(_why_not_prepared(request.name, error)) from error
    write_manifest(place)
    return place


def check_label_names(names: Iterable[str], what: str) -> None:
    """Raises UserError for class names that TFDS's label files cannot hold.

    >>> check_label_names(["cat", "polar bear"], "mine")

    Args:
      names: of the classes.
      what: begins the message.
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
    """What a library has to say, short enough to stand in a line of ours."""
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
        raise UserError(f"there is no dataset {name!r} in TFDS: {hint}") from error


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
            # Which archives a stock builder wants is not known: one answer is enough.
            return download.check_reachable(url, destination)


def _why_not_prepared(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        package = "tensorflow" if "tensorflow" in str(error) else error.name
        return (
            f"the TFDS builder of {name} needs {package}: pip install {package}, or prepare the "
            "dataset with file_format='array_record' elsewhere and set TFDS_DATA_DIR to it"
        )
    return f"cannot prepare {name}: {type(error).__name__}: {first_line(error)}"
