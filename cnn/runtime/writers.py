"""Writers: any callable that takes a record, such as `TensorBoardWriter(...)`.

A record is one line of `metrics.jsonl`: numbers by name, among them `step` and `epoch`. A writer
that raises is called no more, and costs the run one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cnn.errors import UserError

Writer = Callable[[Mapping[str, Any]], None]

_PREFIX, _SUFFIX = "events.out.tfevents.", ".cnn"  # TensorBoard looks for the prefix


def require_tensorboard() -> None:
    """Raises UserError unless the package tensorboard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard=True needs the package tensorboard: pip install '.[tensorboard]'"
        )


class TensorBoardWriter:
    """Writes each record once to a TensorBoard event file, without TensorFlow.

    An event file can only grow. A resumed process that appended to it would repeat the records that
    a killed process wrote after its last checkpoint, and would lack those of epochs for which no
    event file was wanted. So each start writes all records to a new file and deletes its old ones.

    Each record is in the file when the call returns. (The `SummaryWriter` of tensorboardX 2.6.5
    writes in a thread: when the disk is full the thread ends, and the run then waits forever for
    room in its queue.)

    Args:
      directory: where `tensorboard --logdir` finds the file; created if it does not exist. Files of
        other programs in it are kept.
      records: the records of earlier epochs.

    Raises:
      ImportError: tensorboard is not installed, or does not work.
      OSError: the file cannot be written.
    """

    def __init__(self, directory: Path, records: Iterable[Mapping[str, Any]] = ()) -> None:
        # The classes are created at run time from protobuf descriptors: `Any` to a type checker.
        event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = event.Event, summary.Summary
        self._record_writer = writer.RecordWriter
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
            old.unlink()
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"{_PREFIX}{time.time():.6f}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
        self._path = directory / name
        self._append(
            {"file_version": "brain.Event:2"},
            # A running TensorBoard then forgets what it has read of the old file.
            {"session_log": event.SessionLog(status=event.SessionLog.START)},
            *map(self._scalars, records),
        )

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Appends the numbers of a record at its step."""
        self._append(self._scalars(record))

    def _scalars(self, record: Mapping[str, Any]) -> dict[str, Any]:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in record.items()
            if name != "step"
        ]
        return {"step": record["step"], "summary": self._summary(value=values)}

    def _append(self, *events: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            writer = self._record_writer(file)
            for fields in events:
                writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
