"""Standard output and standard error that never end a program.

A closed terminal, a full disk behind `> log` or a reader that has gone must not cost a result, and
must not be reported as a fault of the folder that a run writes to.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


def warn(error: OSError) -> None:
    """Says on standard error why standard output cannot be written."""
    if sys.stderr is not None:
        reason = error.strerror or type(error).__name__
        print(f"warning: standard output cannot be written ({reason})", file=sys.stderr)


@contextlib.contextmanager
def lenient_streams(report: Callable[[OSError], None] = warn) -> Iterator[None]:
    """Within it, text that cannot be written to standard output and standard error is dropped.

    A stream that was closed
    from the start becomes `/dev/null`, and so does its file descriptor: the next file to be opened
    would get it otherwise, and with it the output of libraries. Characters that a stream cannot
    encode are escaped. Streams other than those of the process (a notebook's, a test's) are not
    changed.

    Args:
      report: is called with the first failure of standard output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    before = sys.stdout, sys.stderr
    sys.stdout = _lenient(sys.stdout, 1, report)
    sys.stderr = _lenient(sys.stderr, 2, lambda error: None)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, AttributeError):  # closed or replaced meanwhile
                stream.flush()
        sys.stdout, sys.stderr = before


def _lenient(stream: Any, number: int, report: Callable[[OSError], None]) -> Any:
    """A lenient text stream to the same file; the stream itself if the process does not own it."""
    if stream is None:
        raw = io.BufferedWriter(_Lenient(number, report))
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
        io.BufferedWriter(_Lenient(number, report)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lenient(io.RawIOBase):
    """Writes to a file descriptor; drops what cannot be written, and reports the first failure."""

    def __init__(self, number: int, report: Callable[[OSError], None]) -> None:
        self._number = number
        self._report: Callable[[OSError], None] | None = report

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
            report, self._report = self._report, None
            if report is not None:
                report(error)
            return memoryview(data).nbytes
