"""The decode-once cache: the arrays of a dataset as .npy files, which later starts map.

A folder per dataset and settings holds the four arrays and `meta.json`. It is written beside its
place and appears by one rename. It is not synced to the disk: after a power failure its checksums
show whether it is whole.

Each start checks every byte. It does so by CRC-32 and not by `Dataset.fingerprint`, because CRC-32
needs 0.03 s for CIFAR-10 on two cores, and SHA-256 0.1 s, or 0.5 s on processors without
instructions for it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnn.data.dataset import Dataset, Split
from cnn.errors import one_line
from cnn.runtime.disk import cache_directory
from cnn.runtime.screen import log_warning

_META = "meta.json"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CHUNK = 1 << 22
_ABANDONED_S = 24 * 3600  # a temporary folder of this age belongs to a process that was killed


class UnreadableError(Exception):
    """The cache exists but cannot be opened or read now; `args` are its folder and the reason."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What has a place of its own in the cache.

    Attributes:
      source: the folder that the images come from.
      settings: how the arrays are made of them, as JSON values; () is the usual way. Other settings
        have another place, so that they do not replace each other.
    """

    source: Path
    settings: tuple[Any, ...] = ()

    @property
    def folder(self) -> Path:
        """The place."""
        source = self.source.resolve()
        digest = hashlib.sha256(os.fsencode(source))
        if self.settings:
            digest.update(b"\0" + json.dumps(self.settings).encode())
        # One name per key, so that a new cache replaces the stale one.
        name = re.sub(r"[^\w.]", "_", f"{source.parent.name}-{source.name}")[-100:]
        return cache_directory() / "decoded" / f"{name}-{digest.hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class Cached:
    """What the cache holds for a key.

    Attributes:
      dataset: its arrays are mapped read-only.
      identity: what the source was when they were made, as JSON values.
      details: what else was stored with them, as JSON values.
    """

    dataset: Dataset
    identity: Any
    details: Any


def load_or_decode(
    key: Key, name: str, identity: Any, decode: Callable[[Cached | None], Cached]
) -> Cached:
    """Loads the arrays from the cache if they are current, else decodes and stores them.

    Args:
      key: their place.
      name: of the dataset.
      identity: what the source is now, as JSON values: with another one they are not current.
      decode: takes what is in the cache, which is not current, or None.
    """
    try:
        cached = load(key, name)
        if cached is not None and cached.identity == identity:
            return cached
        decoded = decode(cached)
        if store(key, decoded):
            return load(key, name) or decoded
    except UnreadableError as error:
        folder, reason = error.args
        fault = f"the decoded images in {folder} cannot be read ({reason})"
        advice = "they are decoded again, and the folder is kept (XDG_CACHE_HOME moves the cache)"
        log_warning(one_line(f"{fault}; {advice}"))
        decoded = decode(None)
    return decoded


def load(key: Key, name: str) -> Cached | None:
    """What the cache holds for a key, current or not.

    Returns None if there is nothing, or if it is damaged, which a warning says. Every byte is
    checked.

    Raises:
      UnreadableError: the cache cannot be read for a reason other than damage and should be kept.
    """
    folder = key.folder
    try:
        return _read(folder, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableError(str(folder), error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"the decoded images in {folder} are damaged ({error})"
        log_warning(one_line(f"{fault}; the dataset is decoded again"))
        return None


def _read(folder: Path, name: str) -> Cached:
    """As `load`; raises ValueError or the like for damage."""
    meta = json.loads((folder / _META).read_bytes())
    if meta.pop("crc32") != _meta_checksum(meta):
        raise ValueError(f"{_META} was changed")
    arrays = []
    for array, checksums in zip(_ARRAYS, meta["checksums"], strict=True):
        file = folder / f"{array}.npy"
        if _checksums(file) != checksums:
            raise ValueError(f"{file.name} was changed")
        arrays.append(np.asarray(np.load(file, mmap_mode="r")))
    dataset = Dataset(
        name=name,
        train=Split(*arrays[:2]),
        test=Split(*arrays[2:]),
        class_names=tuple(meta["class_names"]),
        mean=np.array(meta["mean"], np.float32),
        std=np.array(meta["std"], np.float32),
        fingerprint=meta["fingerprint"],
    )
    return Cached(dataset, meta["identity"], meta.get("details"))


def store(key: Key, cached: Cached) -> bool:
    """Writes what `load` returns; a warning says if that is not possible."""
    folder = key.folder
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(folder)
        (temporary / "new").mkdir(parents=True)
        _write(temporary / "new", cached)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(temporary / "old")  # stale or damaged
        try:
            (temporary / "new").rename(folder)
        except OSError as error:  # another process was faster: its arrays are the same
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        reason = error.strerror or "the disk did not take all bytes"  # np.save does not say why
        fault = f"cannot keep the decoded images in {folder.parent} ({reason})"
        advice = "every start decodes them again (XDG_CACHE_HOME moves the cache)"
        log_warning(one_line(f"{fault}; {advice}"))
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _write(folder: Path, cached: Cached) -> None:
    dataset = cached.dataset
    splits = (dataset.train, dataset.test)
    arrays = [array for split in splits for array in (split.images, split.labels)]
    files = [folder / f"{name}.npy" for name in _ARRAYS]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    meta = {
        "identity": cached.identity,
        "details": cached.details,
        "class_names": dataset.class_names,
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "fingerprint": dataset.fingerprint,
        "checksums": [_checksums(file) for file in files],
    }
    (folder / _META).write_text(json.dumps({**meta, "crc32": _meta_checksum(meta)}))


def _meta_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())


def _delete_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for temporary in folder.parent.glob(f"{folder.name}.*.tmp"):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(temporary, ignore_errors=True)


def _checksums(file: Path) -> list[int]:
    """CRC-32 of each 4 MiB of a file, on all cores (zlib releases the interpreter lock)."""
    data = np.memmap(file, np.uint8, mode="r")
    chunks = [data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(zlib.crc32, chunks))
