"""What a person is told when a disk refuses."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from cnn.errors import InputError

# How TensorStore, which writes for Orbax, passes on what the operating system said.
_IN_TENSORSTORE = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "put it back",
}


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that does not depend on the current directory; `~` is the home directory.

    Raises:
      InputError: if there is no such home directory, or the path is not text.
    """
    try:
        found = Path(path).expanduser().absolute()
        os.fsdecode(found).encode()  # TensorStore takes no other
    except (RuntimeError, UnicodeEncodeError) as error:
        raise InputError(f"{os.fsencode(path)!r} is no path of a folder here: {error}") from error
    return found


def nearest(folder: Path) -> Path:
    """The folder, or else the nearest above it that is there: a file or a dangling link too."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def write_error(folder: Path) -> OSError | None:
    """Why no files can be made in the folder, nor the folder itself; None if they can."""
    try:  # os.access does not know of every reason, and says yes to root
        tempfile.TemporaryDirectory(dir=nearest(folder)).cleanup()
    except OSError as error:
        return error
    return None


def is_writable(folder: Path) -> bool:
    """Whether files can be made in the folder, or the folder itself be made."""
    return write_error(folder) is None


def is_trouble(error: OSError, folder: Path) -> bool:
    """Whether an error is one of the disk that holds the folder, not of another file or a pipe."""
    elsewhere = isinstance(error.filename, str) and not Path(error.filename).is_relative_to(folder)
    return not elsewhere and (error.errno in _ADVICE or error.errno == errno.EIO)


def trouble(error: BaseException, folder: Path) -> str:
    """Why something below a folder could not be read or written, and what to do, in half a line.

    >>> import errno
    >>> trouble(OSError(errno.EDQUOT, "Disk quota exceeded"), Path("/runs"))
    'Disk quota exceeded in /runs: free some space there, or raise the quota'
    """
    number = error.errno if isinstance(error, OSError) else None
    if match := _IN_TENSORSTORE.search(str(error)):
        number = int(match[1] or match[2])
    if number in (errno.ENOENT, None) and not folder.exists():
        return f"{folder} was removed: {_ADVICE[errno.ENOENT]}"
    if number is None:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{first_line[:200]} in {folder}: look at the disk"
    return f"{os.strerror(number)} in {folder}: {_ADVICE.get(number, 'look at the disk')}"
