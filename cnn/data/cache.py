"""The decode-once cache: the arrays of a prepared dataset as .npy files, which later starts map.

A folder per prepared dataset holds the four arrays and `meta.json`. It is written beside its place
and appears by one rename. It is not synced to the disk: after a power failure its checksums show
whether it is whole.

Each start checks every byte. It does so by CRC-32 and not by `Dataset.fingerprint`, because CRC-32
needs 0.03 s for CIFAR-10 on two cores, and SHA-256 0.1 s, or 0.5 s on processors without
instructions for it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cnn.data.dataset import Dataset, Split
from cnn.errors import one_line
from cnn.runtime.disk import cache_directory
from cnn.runtime.screen import log_warning

_FORMAT = 2
_META = "meta.json"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CHUNK = 1 << 22
_ABANDONED_S = 24 * 3600  # a temporary folder of this age belongs to a process that was killed


class UnreadableError(Exception):
    """The cache exists but cannot be opened or read now; `args` are its folder and the reason."""


def load(prepared: Path, name: str) -> Dataset | None:
    """The decoded arrays of a prepared dataset, mapped read-only.

    Returns None if there is no cache, if the prepared files were changed since it was written, or
    if it is damaged, which a warning says. Every byte is checked.

    Raises:
      UnreadableError: the cache cannot be read for a reason other than damage and should be kept.
      OSError: the prepared files cannot be read.
    """
    folder, identity = _folder(prepared), _identity(prepared)
    try:
        return _read(folder, identity, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableError(str(folder), error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"the decoded images in {folder} are damaged ({error})"
        log_warning(one_line(f"{fault}; the dataset is decoded again"))
        return None


def _read(folder: Path, identity: list[Any], name: str) -> Dataset | None:
    """As `load`; raises ValueError or the like for damage."""
    meta = json.loads((folder / _META).read_bytes())
    if meta.pop("crc32") != _meta_checksum(meta):
        raise ValueError(f"{_META} was changed")
    if meta["identity"] != identity:
        return None
    arrays = []
    for array, checksums in zip(_ARRAYS, meta["checksums"], strict=True):
        file = folder / f"{array}.npy"
        if _checksums(file) != checksums:
            raise ValueError(f"{file.name} was changed")
        arrays.append(np.asarray(np.load(file, mmap_mode="r")))
    return Dataset(
        name=name,
        train=Split(*arrays[:2]),
        test=Split(*arrays[2:]),
        class_names=tuple(meta["class_names"]),
        mean=np.array(meta["mean"], np.float32),
        std=np.array(meta["std"], np.float32),
        fingerprint=meta["fingerprint"],
    )


def store(prepared: Path, dataset: Dataset) -> bool:
    """Writes the cache of a prepared dataset; a warning says if that is not possible."""
    folder, identity = _folder(prepared), _identity(prepared)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(folder)
        (temporary / "new").mkdir(parents=True)
        _write(temporary / "new", identity, dataset)
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


def _write(folder: Path, identity: list[Any], dataset: Dataset) -> None:
    splits = (dataset.train, dataset.test)
    arrays = [array for split in splits for array in (split.images, split.labels)]
    files = [folder / f"{name}.npy" for name in _ARRAYS]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    meta = {
        "identity": identity,
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


def _folder(prepared: Path) -> Path:
    resolved = prepared.resolve()
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    # One name per prepared dataset, so that a new cache replaces the stale one.
    name = re.sub(r"[^\w.]", "_", f"{resolved.parent.name}-{resolved.name}")
    return cache_directory() / "decoded" / f"{name}-{digest}"


def _identity(prepared: Path) -> list[Any]:
    """What must be unchanged for the cache of a prepared dataset to be current."""
    # Another process may be writing SHA256SUMS at this moment, as a temporary file.
    files = sorted(e for e in prepared.iterdir() if e.is_file() and e.suffix != ".tmp")
    return [
        _FORMAT,
        str(prepared.resolve()),
        hashlib.sha256((prepared / "dataset_info.json").read_bytes()).hexdigest(),
        [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    ]


def _checksums(file: Path) -> list[int]:
    """CRC-32 of each 4 MiB of a file, on all cores (zlib releases the interpreter lock)."""
    data = np.memmap(file, np.uint8, mode="r")
    chunks = [data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(zlib.crc32, chunks))
