"""A folder's `SHA256SUMS`, by which every changed bit of its files is noticed.

The format is that of coreutils, so `sha256sum -c SHA256SUMS` checks a folder too. The last line, a
comment to that program, is the digest of the lines above it. So damage to the list is not mistaken
for damage to a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cnn.runtime.disk import atomic_write

CHECKSUMS = "SHA256SUMS"

_LINE = rb"([0-9a-f]{64})  ([^\n]+)\n"
_WHOLE = re.compile(rb"((?:%s)+)# sha256 of the lines above: ([0-9a-f]{64})\n" % _LINE)


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of each file below a folder to its `SHA256SUMS`, atomically."""
    body = b"".join(
        b"%s  %s\n" % (_sha256(folder / path).encode(), os.fsencode(path))
        for path in _files(folder)
    )
    seal = b"# sha256 of the lines above: %s\n" % hashlib.sha256(body).hexdigest().encode()
    with atomic_write(folder / CHECKSUMS) as stream:
        stream.write(body + seal)


def verify_checksums(folder: Path, *, strict: bool) -> str | None:
    """Returns the first fault of a folder, or None if all files match its `SHA256SUMS`.

    A file whose content differs or that is missing is a fault; one that cannot be read is not.

    Args:
      folder: the argument of `write_checksums`.
      strict: whether a file that is not listed is a fault.

    Raises:
      OSError: a file exists but cannot be opened or read; `filename` names it.
    """
    try:
        whole = _WHOLE.fullmatch(read_bytes(folder / CHECKSUMS))
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except IsADirectoryError:
        return f"{CHECKSUMS} is a folder"
    if whole is None or hashlib.sha256(whole[1]).hexdigest().encode() != whole[4]:
        return f"{CHECKSUMS} is damaged"
    listed = {os.fsdecode(name): digest for digest, name in re.findall(_LINE, whole[1])}
    for path, digest in listed.items():
        try:
            if _sha256(folder / path).encode() != digest:
                return f"{path} was changed"
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        except IsADirectoryError:
            return f"{path} is a folder"
    extra = [name for name in _files(folder) if name not in listed] if strict else []
    return f"{extra[0]} is not listed in {CHECKSUMS}" if extra else None


def _files(folder: Path) -> list[str]:
    """All files below the folder, except `SHA256SUMS` and what a killed writer left of it."""
    found = [
        path.relative_to(folder).as_posix()
        for place, _, names in os.walk(folder, onerror=_reraise)
        for path in (Path(place, name) for name in names)
        if path.is_file()
    ]
    return sorted(name for name in found if not name.startswith(CHECKSUMS))


def _reraise(error: OSError) -> None:
    raise error


def read_bytes(path: Path) -> bytes:
    """Reads a file.

    Raises:
      OSError: it names the file even if reading fails and not opening.
    """
    with _named(path), open(path, "rb") as stream:
        return stream.read()


def read_through(path: Path) -> None:
    """Raises OSError, which names the file, unless all of it can be read."""
    _sha256(path)


def _sha256(path: Path) -> str:
    with _named(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
