"""The decode-once cache: the arrays of a prepared dataset in one file that later starts map.

Layout: one line `crc32-of-the-rest-of-the-line SPACE json`, then each array at the next multiple
of 64 bytes, zeros between. One file, so that a rename publishes or replaces all of it at once.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cnn.data.dataset import Dataset, Split
from cnn.errors import one_line
from cnn.runtime.disk import cache_directory
from cnn.runtime.files import replacing

_FORMAT = 1
_ALIGN = 64
_CHUNK = 1 << 22


class UnreadableError(Exception):
    """The cache exists and cannot be opened or read now; `args` say which file and why."""


def load(prepared: Path, name: str) -> Dataset | None:
    """The decoded arrays of the prepared directory, mapped read-only.

    None when there is no cache, when the prepared files were changed since, or when it is damaged,
    which a line on stderr tells. Every byte is checked, so a flipped bit costs a new decoding, not
    a result.

    Raises:
      UnreadableError: for another reason than damage; the cache should stay as it is.
      OSError: the prepared files cannot be read.
    """
    file, identity = _file(prepared), _identity(prepared)
    try:
        return _read(file, identity, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableError(str(file), error.strerror) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        line = f"cnn: the decoded images in {file} are damaged ({error}); decoding them anew"
        print(one_line(line), file=sys.stderr)
        return None


def _read(file: Path, identity: list[Any], name: str) -> Dataset | None:
    """As `load`; raises ValueError or the like for damage."""
    data = np.memmap(file, np.uint8, mode="r")
    line = bytes(data[:_CHUNK]).partition(b"\n")[0]
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("its first line")
    header = json.loads(text)
    if header["identity"] != identity:
        return None
    arrays, position = [], len(line) + 1
    for shape, dtype in header["arrays"]:
        start = position + -position % _ALIGN
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        if end > len(data):
            raise ValueError("cut short")
        if data[position:start].any():
            raise ValueError("bytes between the arrays")
        arrays.append(np.asarray(data[start:end]).view(dtype).reshape(shape))
        position = end
    if position != len(data):
        raise ValueError("too long")
    if _checksums(arrays) != header["checksums"]:
        raise ValueError("a checksum differs")
    return Dataset(
        name=name,
        train=Split(arrays[0], arrays[1]),
        test=Split(arrays[2], arrays[3]),
        class_names=tuple(header["class_names"]),
        mean=np.array(header["mean"], np.float32),
        std=np.array(header["std"], np.float32),
        fingerprint=header["fingerprint"],
    )


def store(prepared: Path, dataset: Dataset) -> bool:
    """Writes the cache of a prepared directory; tells on stderr, in a line, if it cannot."""
    target = _file(prepared)
    arrays = [
        np.ascontiguousarray(array)
        for split in (dataset.train, dataset.test)
        for array in (split.images, split.labels)
    ]
    header = {
        "identity": _identity(prepared),
        "class_names": dataset.class_names,
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "fingerprint": dataset.fingerprint,
        "arrays": [[array.shape, array.dtype.str] for array in arrays],
        "checksums": _checksums(arrays),
    }
    text = json.dumps(header).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as stream:
            stream.write(b"%08x %s\n" % (zlib.crc32(text), text))
            for array in arrays:
                stream.write(bytes(-stream.tell() % _ALIGN))
                stream.write(array.data)
    except OSError as error:
        line = (
            f"cnn: cannot keep the decoded images in {target.parent} ({error.strerror}); "
            "every start will decode them anew (XDG_CACHE_HOME moves the cache)"
        )
        print(one_line(line), file=sys.stderr)
        return False
    return True


def _file(prepared: Path) -> Path:
    resolved = prepared.resolve()
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    # One name per prepared directory: a new cache replaces the stale one.
    name = re.sub(r"[^\w.]", "_", f"{resolved.parent.name}-{resolved.name}")
    return cache_directory() / "decoded" / f"{name}-{digest}.cache"


def _identity(prepared: Path) -> list[Any]:
    """What must be unchanged for a cache of this directory to be current."""
    # A temporary file is another process's, writing SHA256SUMS at this moment.
    files = sorted(e for e in prepared.iterdir() if e.is_file() and e.suffix != ".tmp")
    return [
        _FORMAT,
        str(prepared.resolve()),
        hashlib.sha256((prepared / "dataset_info.json").read_bytes()).hexdigest(),
        [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    ]


def _checksums(arrays: list[np.ndarray]) -> list[int]:
    """CRC-32 of the chunks of each array, on all cores (zlib lets go of the interpreter lock)."""
    chunks = [
        flat[start : start + _CHUNK]
        for flat in (array.reshape(-1).view(np.uint8) for array in arrays)
        for start in range(0, flat.size, _CHUNK)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(zlib.crc32, chunks))
