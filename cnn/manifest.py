"""A folder's `SHA256SUMS`: what was written is what is read, down to the last bit.

The format is that of coreutils, so `sha256sum -c SHA256SUMS` checks a folder too. The last line, a
comment to that program, is the digest of the lines above it: a damaged list is no damaged file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

MANIFEST = "SHA256SUMS"

_LINE = rb"([0-9a-f]{64})  ([^\n]+)\n"
_WHOLE = re.compile(rb"((?:%s)+)# sha256 of the lines above: ([0-9a-f]{64})\n" % _LINE)


def write_manifest(folder: Path) -> None:
    """Lists the files below a folder with their SHA-256; the list is there whole or not at all."""
    body = b"".join(
        b"%s  %s\n" % (_sha256(folder / path).encode(), os.fsencode(path))
        for path in _files(folder)
    )
    seal = b"# sha256 of the lines above: %s\n" % hashlib.sha256(body).hexdigest().encode()
    # Not of tempfile, whose files only their owner may read.
    temporary = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(body + seal)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def verify_manifest(folder: Path, *, strict: bool) -> str | None:
    """The first fault of a folder in a few words, or None if it is as its manifest says.

    Args:
      folder: where `write_manifest` was called.
      strict: whether a file that is not listed is a fault.
    """
    path = MANIFEST
    try:
        whole = _WHOLE.fullmatch((folder / MANIFEST).read_bytes())
        if whole is None or hashlib.sha256(whole[1]).hexdigest().encode() != whole[4]:
            return f"{MANIFEST} is damaged"
        listed = {os.fsdecode(name): digest for digest, name in re.findall(_LINE, whole[1])}
        for path, digest in listed.items():
            if _sha256(folder / path).encode() != digest:
                return f"{path} was changed"
        path = "the folder"
        extra = [name for name in _files(folder) if name not in listed] if strict else []
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return f"{extra[0]} is not listed in {MANIFEST}" if extra else None


def _files(folder: Path) -> list[str]:
    """All files below the folder, save the manifest and what a killed writer left of one."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith(MANIFEST))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
