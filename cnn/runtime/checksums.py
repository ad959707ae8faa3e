"""A folder's `SHA256SUMS`: what was written is what is read, down to the last bit.

The format is that of coreutils, so `sha256sum -c SHA256SUMS` checks a folder too. The last line, a
comment to that program, is the digest of the lines above it: a damaged list is no damaged file.
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
    """Lists the files below a folder with their SHA-256; the list is there whole or not at all."""
    body = b"".join(
        b"%s  %s\n" % (_sha256(folder / path).encode(), os.fsencode(path))
        for path in _files(folder)
    )
    seal = b"# sha256 of the lines above: %s\n" % hashlib.sha256(body).hexdigest().encode()
    with atomic_write(folder / CHECKSUMS) as stream:
        stream.write(body + seal)


def verify_checksums(folder: Path, *, strict: bool) -> str | None:
    """The first fault of a folder in a few words, or None if it is as its manifest says.

    Only what was read and is wrong is a fault, and a listed file that does not exist.

    Args:
      folder: where `write_checksums` was called.
      strict: whether a file that is not listed is a fault.

    Raises:
      OSError: a file exists and cannot be opened or read now; its `filename` says which.
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
    """All files below the folder, save the manifest and what a killed writer left of one."""
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
    """The content of a file.

    Raises:
      OSError: with the file's name also where reading fails, not only where opening does.
    """
    with _named(path), open(path, "rb") as stream:
        return stream.read()


def read_through(path: Path) -> None:
    """Raises OSError, with the file's name, unless all of a file can be read."""
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
