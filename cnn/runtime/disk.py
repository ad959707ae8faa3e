"""What a person is told when a disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from pathlib import Path

import platformdirs

from cnn.errors import UserError

# How TensorStore, which writes for Orbax, passes on what the operating system said.
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
# "s3://bucket", and what pathlib makes of it: "s3:/bucket".
# An address, also one that `pathlib` made of it, with one slash.
_SCHEME = re.compile(r"[^/]+://|[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path as it was given, if it can be one of this machine.

    Raises:
      UserError: the path is an address such as `s3://bucket`, or empty, or no text.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise UserError(f"a path is needed, not {path!r} ({type(path).__name__})") from error
    if _SCHEME.match(text):
        raise UserError(
            f"{text} is an address, not a path of this machine: mount or copy what is there and "
            f"give its path (of a local folder with such a name, the absolute path)"
        )
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a path: it {'holds a NUL' if text else 'is empty'}")
    return Path(text)


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """A path that does not depend on the current directory; `~` is the home directory.

    Raises:
      UserError: as for `local_path`, or there is no such home directory.
    """
    try:
        return local_path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user; the current directory is gone
        raise UserError(f"{os.fsdecode(path)} is not a path of this machine: {error}") from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; raises OSError where that cannot be known."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def nearest_existing(folder: Path) -> Path:
    """The folder, or else the nearest above it that is there: a file or a dangling link too."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def write_error(folder: Path) -> OSError | None:
    """Why no files can be made in the folder, nor the folder itself; None if they can."""
    try:  # os.access does not know of every reason, and says yes to root
        tempfile.TemporaryDirectory(dir=nearest_existing(folder)).cleanup()
    except OSError as error:
        return error
    return None


def is_writable(folder: Path) -> bool:
    """Whether files can be made in the folder, or the folder itself be made."""
    return write_error(folder) is None


def is_disk_error(error: OSError, folder: Path) -> bool:
    """Whether an error is one of the disk that holds the folder, not of another file or a pipe."""
    return not _elsewhere(error, folder) and (error.errno in _TO_WRITE or error.errno == errno.EIO)


def _elsewhere(error: BaseException, folder: Path) -> bool:
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, str) and not Path(name).is_relative_to(folder)


def system_error(error: BaseException) -> int | None:
    """The number that the operating system gave an error, also one that passed TensorStore."""
    if isinstance(error, OSError):
        return error.errno
    match = _IN_TENSORSTORE.search(str(error))
    return int(match[1] or match[2]) if match else None


def unreadable(error: OSError) -> str:
    """Why a file could not be read, and what to do, in half a line.

    >>> import errno
    >>> unreadable(OSError(errno.EIO, "Input/output error", "/runs/a"))
    '/runs/a (Input/output error): nothing was changed; look at the disk'
    """
    advice = _TO_READ.get(error.errno or 0, "look at the disk")
    return f"{error.filename} ({error.strerror}): nothing was changed; {advice}"


def describe_disk_error(error: BaseException, folder: Path) -> str:
    """Why something below a folder could not be read or written, and what to do, in half a line.

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
