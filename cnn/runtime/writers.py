"""The records of a run as a TensorBoard event file, written without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cnn.errors import UserError, one_line

_PREFIX, _SUFFIX = "events.out.tfevents.", ".cnn"  # TensorBoard looks for the prefix


def require_tensorboard() -> None:
    """Raises UserError unless the package tensorboard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard=True needs the package tensorboard: pip install '.[tensorboard]'"
        )


class EventFile:
    """Each record of a run once: one file, which every start of the run writes anew.

    A file of TensorBoard's can only grow. A process that continued the file of another one would
    repeat what that one recorded behind its last checkpoint, and would lack what was recorded
    while no event files were wanted.

    Nothing here raises: after the first failure, which is one warning, nothing more is written.

    Args:
      directory: where `tensorboard --logdir` finds it; made if it is not there. Files of other
        programs in it stay.
      records: those of the epochs before.
      warn: takes the warning.
    """

    def __init__(
        self, directory: Path, records: Sequence[dict[str, Any]], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._path: Path | None = None
        with self._failure_is_a_warning():
            # The classes are made at run time from protobuf descriptors: `Any` to a type checker.
            event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
            summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
            writer: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
            self._event, self._summary = event.Event, summary.Summary
            self._writer = writer.RecordWriter
            directory.mkdir(parents=True, exist_ok=True)
            for old in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
                old.unlink()
            host = socket.gethostname()
            # TensorBoard reads files in the order of their names.
            name = f"{_PREFIX}{time.time():.6f}.{host}.{os.getpid()}{_SUFFIX}"
            path = directory / name
            self._append(
                path,
                {"file_version": "brain.Event:2"},
                # A TensorBoard that is running forgets what it has read of the file before.
                {"session_log": event.SessionLog(status=event.SessionLog.START)},
                *map(self._scalars, records),
            )
            self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record's numbers at its step."""
        if self._path is not None:
            with self._failure_is_a_warning():
                self._append(self._path, self._scalars(record))

    def _scalars(self, record: dict[str, Any]) -> dict[str, Any]:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in record.items()
            if name != "step"
        ]
        return {"step": record["step"], "summary": self._summary(value=values)}

    def _append(self, path: Path, *events: dict[str, Any]) -> None:
        with path.open("ab") as file:
            writer = self._writer(file)
            for fields in events:
                writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _failure_is_a_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, from the package and from the disk
            self._path = None
            reason = str(error) or type(error).__name__
            self._warn(one_line(f"no more records are written for TensorBoard ({reason})"))


class TensorBoardWriter:
    """Temporary."""

    def __init__(self, directory: Path, records: Sequence[dict[str, Any]]) -> None:
        self._file = EventFile(directory, records, print)

    def __call__(self, record: Any) -> None:
        """Adds a record."""
        self._file.write(record)
