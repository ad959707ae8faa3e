"""Standard output and standard error that never end a program.

A closed terminal, a full disk behind `> log` or a reader that has gone must cost no result, and are
not the fault of the folder that a run writes to.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Within it, what cannot be written to standard output and standard error is dropped.

    That standard output fails is told once on standard error. A stream that was closed from the
    beginning is `/dev/null`, and so is its file descriptor, which the next file to be opened would
    get otherwise, and with it what libraries print. Characters that a stream cannot show are
    escaped. Streams that are not those of the process (a notebook's, a test's) stay as they are.
    """

    def tell(error: OSError) -> None:
        if sys.stderr is not None:
            reason = error.strerror or type(error).__name__
            print(f"warning: standard output cannot be written ({reason})", file=sys.stderr)

    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    sys.stdout = _lenient(sys.stdout, 1, tell)
    sys.stderr = _lenient(sys.stderr, 2, lambda error: None)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, AttributeError):  # closed or replaced meanwhile
                stream.flush()
        sys.stdout, sys.stderr = before


def _lenient(stream: Any, number: int, tell: Callable[[OSError], None]) -> Any:
    """A text stream to the same place; the stream itself if it is none of the process's."""
    if stream is None:
        raw = io.BufferedWriter(_Lenient(number, tell))
        return io.TextIOWrapper(raw, encoding="utf-8", line_buffering=True)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        number = stream.fileno()
    except ValueError:  # it writes to memory
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lenient(number, tell)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lenient(io.RawIOBase):
    """Writes to a file descriptor; the first failure is told, and what fails is dropped."""

    def __init__(self, number: int, tell: Callable[[OSError], None]) -> None:
        self._number = number
        self._tell: Callable[[OSError], None] | None = tell

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except OSError as error:
            tell, self._tell = self._tell, None
            if tell is not None:
                tell(error)
            return memoryview(data).nbytes
