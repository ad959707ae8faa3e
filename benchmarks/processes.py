"""Whole processes: their time and their peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.workers import environment, last_line
from cnn import UserError


def timed(words: Sequence[str], *, may_exit: tuple[int, ...] = (0,)) -> tuple[float, float]:
    """Seconds and peak MiB of a process.

    Args:
      words: the command; what it prints is dropped.
      may_exit: the exit codes that are no failure.

    Raises:
      UserError: it fails; the message has the last line that it wrote.
    """
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=log, env=environment({})
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode not in may_exit:
            raise UserError(f"{' '.join(map(str, words[:4]))} failed: {last_line(log.read())}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20
