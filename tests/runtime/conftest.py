"""A terminal of known width."""

import fcntl
import os
import select
import struct
import sys
import termios
import types

import pytest

from cnn.runtime import screen


class Terminal:
    """A pseudo-terminal as standard output."""

    def __init__(self, columns):
        self._reader, writer = os.openpty()
        os.set_blocking(self._reader, False)
        self.stream = os.fdopen(writer, "w")
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self):
        """What was written: the kernel passes it on in pieces, and a moment later."""
        pieces = []
        while select.select([self._reader], [], [], 0.05)[0]:
            pieces.append(os.read(self._reader, 1 << 16))
        return b"".join(pieces).decode().replace("\r\n", "\n")

    def close(self):
        self.stream.close()
        os.close(self._reader)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    one = Terminal(50)
    # Not `sys.stdout` itself, which pytest replaces between fixture and test.
    streams = types.SimpleNamespace(stdout=one.stream, stderr=sys.stderr)
    monkeypatch.setattr("cnn.runtime.screen.sys", streams)
    yield one
    screen.live("")
    monkeypatch.undo()
    one.close()
