"""Processes that answer: a line of JSON for each line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from benchmarks import workers


class WorkerProcess:
    """A process that says when it is ready, then answers; as a context manager it ends with it.

    Args:
      title: for messages.
      command: its words.
      env: all of its environment.
    """

    def __init__(self, title: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._title = title
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=dict(env),
        )

    def __enter__(self) -> Self:
        try:
            self._answer()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer.

        Raises:
          cnn.UserError: the worker died; the message has the last line that it wrote.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        from cnn import UserError  # not above: a worker may be without JAX

        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        line = workers.last_line(self._log.read())
        raise UserError(f"{self._title} failed: {line}")


def answering() -> Callable[[Mapping[str, Any]], None]:
    """For a worker: a function that sends an answer, on a stream that nothing else prints to."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=answers)


def commands() -> Iterator[dict[str, Any]]:
    """For a worker: the commands, until there are no more."""
    for line in sys.stdin:
        yield json.loads(line)
