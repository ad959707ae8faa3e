"""Files that appear whole or not at all, and that survive a power failure."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_ABANDONED_S = 24 * 3600  # a temporary file of this age belongs to a process that was killed
# What file systems answer that cannot sync at all, or not a folder (CIFS, some FUSE mounts, WSL 1).
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_CANNOT_OPEN = {*_CANNOT_SYNC, errno.EACCES, errno.EPERM, errno.EISDIR}


def sync(*paths: str | os.PathLike[str]) -> None:
    """Writes files and folders through to the disk; a folder's sync covers the names in it.

    A file system that offers no sync is accepted, because nothing more can be done there.

    Raises:
      OSError: the disk reports a failure (EIO, ENOSPC, EDQUOT and others), or a file is missing.
    """
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in _CANNOT_OPEN and os.path.isdir(path):
                continue
            raise
        try:
            os.fsync(handle)
        except OSError as error:
            is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            refusals = {*_CANNOT_OPEN, errno.EBADF} if is_folder else _CANNOT_SYNC
            if error.errno not in refusals:
                error.filename = os.fspath(path)  # fsync knows only a descriptor
                raise
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Yields a new file, which takes the target's place when the block ends.

    A reader finds the old file or the new one, also after a power failure. After an exception in
    the block the old file is as it was. Missing folders are not made.

    Args:
      target: the file; its permissions are those of any file that the process makes.
    """
    with contextlib.suppress(OSError):
        for old in siblings(target.parent, f"{target.name}."):
            if old.suffix == ".tmp" and time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()
    # Not of tempfile, whose files only their owner may read.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def siblings(folder: Path, prefix: str) -> list[Path]:
    """The entries of a folder whose names begin with a prefix, taken literally."""
    return [path for path in folder.iterdir() if path.name.startswith(prefix)]
