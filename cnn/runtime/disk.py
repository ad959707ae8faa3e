"""Paths, files that are replaced atomically, and what to do when a disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import platformdirs

from cnn.errors import UserError

# An address such as "s3://bucket", also after pathlib has reduced the two slashes to one.
_SCHEME = re.compile(r"[^/]+://|[A-Za-z][A-Za-z0-9+.-]+:/")
# How TensorStore, with which Orbax writes, reports the operating system's error number.
_IN_TENSORSTORE = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
_TO_WRITE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "put it back",
}
_TO_READ = {
    errno.EACCES: "make it readable",
    errno.EPERM: "make it readable",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close some files of other programs",
    errno.ENOENT: "put it back",
}
_ABANDONED_S = 24 * 3600  # a temporary file of this age was left by a killed process
# How file systems answer that cannot sync at all, or not a folder (CIFS, some FUSE mounts, WSL 1).
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_CANNOT_OPEN = {*_CANNOT_SYNC, errno.EACCES, errno.EPERM, errno.EISDIR}


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path unchanged if it can be a path of this machine.

    Raises:
      UserError: the path is an address such as `s3://bucket`, is empty, or is not text.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise UserError(f"a path is needed, not {path!r} ({type(path).__name__})") from error
    if _SCHEME.match(text):
        raise UserError(
            f"{text} is an address, not a path of this machine: mount or copy it and give that "
            f"path (for a local folder of this name, give the absolute path)"
        )
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path: it {'holds a NUL' if text else 'is empty'}")
    return Path(text)


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """Makes a path independent of the current directory; `~` is the home directory.

    Raises:
      UserError: as for `local_path`, or there is no such home directory.
    """
    try:
        return local_path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user; the current directory is gone
        raise UserError(f"{os.fsdecode(path)} is not a path of this machine: {error}") from error


def is_file(path: Path) -> bool:
    """Whether the path is a regular file; raises OSError where that cannot be determined."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def siblings(folder: Path, prefix: str) -> list[Path]:
    """Lists the entries of a folder whose names begin with a prefix, which is not a pattern."""
    return [path for path in folder.iterdir() if path.name.startswith(prefix)]


def nearest_existing(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists: a file or a dangling link too."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def write_error(folder: Path) -> OSError | None:
    """Returns why the folder, or a file in it, cannot be created; None if it can."""
    try:  # os.access does not know of every reason, and always allows root
        tempfile.TemporaryDirectory(dir=nearest_existing(folder)).cleanup()
    except OSError as error:
        return error
    return None


def is_writable(folder: Path) -> bool:
    """Whether the folder, or a file in it, can be created."""
    return write_error(folder) is None


def cache_directory() -> Path:
    """The folder for files that this program can make again (`XDG_CACHE_HOME` is respected).

    For a user without a home directory it is a private folder among the temporary files.

    Raises:
      UserError: `XDG_CACHE_HOME` is not a path of this machine.
      PermissionError: other users can write to that folder among the temporary files.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        local_path(given)  # platformdirs ignores a path that is not absolute
    with contextlib.suppress(RuntimeError):
        found = platformdirs.user_cache_dir("cnn")
        if not found.startswith("~"):  # older versions of platformdirs do not raise
            return resolve_path(found)
    folder = Path(tempfile.gettempdir()) / f"cnn-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # Whoever can write there could make this process load compiled code of theirs.
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if status.st_uid != os.getuid() or not private:
        raise PermissionError(errno.EACCES, "this folder should be yours alone", str(folder))
    return folder


def sync(*paths: str | os.PathLike[str]) -> None:
    """Flushes files and folders to the disk; the sync of a folder covers the names in it.

    A file system that cannot sync is accepted, because nothing more can be done there.

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
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """Yields a new file, which replaces the target when the block ends.

    A reader finds the old file or the new one, also after a power failure. After an exception in
    the block the old file is unchanged. The folder of the target must exist.
    """
    with contextlib.suppress(OSError):
        for old in siblings(target.parent, f"{target.name}."):
            if old.suffix == ".tmp" and time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()
    # Not a file of tempfile: those are readable for their owner only.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def system_error(error: BaseException) -> int | None:
    """The operating system's number of an error, also of one that TensorStore passed on."""
    if isinstance(error, OSError):
        return error.errno
    match = _IN_TENSORSTORE.search(str(error))
    return int(match[1] or match[2]) if match else None


def is_disk_error(error: OSError, folder: Path) -> bool:
    """Whether the disk that holds the folder is at fault, not another file or a pipe."""
    return not _elsewhere(error, folder) and (error.errno in _TO_WRITE or error.errno == errno.EIO)


def _elsewhere(error: BaseException, folder: Path) -> bool:
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, str) and not Path(name).is_relative_to(folder)


def describe_read_error(error: OSError) -> str:
    """Why a file could not be read, and what to do.

    >>> import errno
    >>> describe_read_error(OSError(errno.EIO, "Input/output error", "/runs/a"))
    '/runs/a (Input/output error): nothing was changed; look at the disk'
    """
    advice = _TO_READ.get(error.errno or 0, "look at the disk")
    return f"{error.filename} ({error.strerror}): nothing was changed; {advice}"


def describe_disk_error(error: BaseException, folder: Path) -> str:
    """Why a path below the folder could not be read or written, and what to do.

    >>> import errno
    >>> describe_disk_error(OSError(errno.EDQUOT, "Disk quota exceeded"), Path("/runs"))
    'Disk quota exceeded in /runs: free some space there, or raise the quota'
    """
    number = system_error(error)
    if number in (errno.ENOENT, None) and not folder.exists():
        return f"{folder} was removed: {_TO_WRITE[errno.ENOENT]}"
    if number is None:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{first_line[:200]} in {folder}: look at the disk"
    place = error.filename if isinstance(error, OSError) and _elsewhere(error, folder) else folder
    return f"{os.strerror(number)} in {place}: {_TO_WRITE.get(number, 'look at the disk')}"
