"""The files by which a run directory explains itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cnn.config import differences
from cnn.errors import UserError
from cnn.runtime.disk import (
    atomic_write,
    describe_disk_error,
    nearest_existing,
    resolve_path,
    sync,
    write_error,
)

RECORD_FIELDS = (
    "step",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "test_count",
    "learning_rate",
    "skipped_steps",
    "images_per_second",
)
_RESULT_FIELDS = (
    "digest",
    "test_accuracy",
    "test_count",
    "best_test_accuracy",
    "best_epoch",
    "wall_seconds",
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has none


class RunDirectory:
    """A run's folder: `config.json`, `environment.json`, `metrics.jsonl`, `result.json`.

    Making the object only looks; `lock` is the first to write. Use it as a context manager, which
    lets go of the lock.

    Args:
      path: the folder; it need not exist. `~` is the home directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = resolve_path(path)
        self._metrics = self.path / "metrics.jsonl"
        self._lock_file = self.path / ".lock"
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self._lock_file.exists()

    def lock(self) -> None:
        """Makes the folder, and keeps other processes out until this one ends, however it does.

        Raises:
          UserError: if another process is in it, or it cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock = self._lock_file.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"work directory {self.path} cannot be written ({error.strerror}); "
                f"choose another --workdir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"{self.path} is being trained in by {lock.read().decode() or 'another process'}; "
                f"wait for it, stop it, or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(OSError):  # a full disk; the lock holds without a name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())

    def check_writable(self) -> None:
        """Raises UserError if the folder cannot be made or written, or is a file."""
        if (error := write_error(self.path)) is None:
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(describe_disk_error(error, self.path)) from error
        raise UserError(
            f"work directory {self.path} cannot be written ({nearest_existing(self.path)} is not a "
            f"writable directory); choose another --workdir"
        ) from error

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def check_config(self, config: dict[str, Any]) -> None:
        """Refuses to go on with a run of another config.

        Args:
          config: resolved.

        Raises:
          UserError: names the fields that differ.
        """
        if (before := self._read("config.json")) is None:
            return
        if changed := differences(before, config):
            raise UserError(
                f"{self.path} holds a run of another config ({'; '.join(changed)}); "
                f"choose another --workdir, or delete that one"
            )

    def begin(self, config: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Writes what is known before the next step.

        Args:
          config: resolved.
          records: those that the checkpoint knows, from which the run goes on. Others, and what is
            left of one that a killed process did not finish, make way: it will make them again.
        """
        self._replace(self._metrics.name, "".join(map(_line, records)))
        self.write("config.json", config)

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called: not before there was a checkpoint."""
        names = ("config.json", self._metrics.name, "result.json")
        return any((self.path / name).exists() for name in names)

    def delete_result(self) -> None:
        """Deletes `result.json`: the run is not finished, or no longer."""
        (self.path / "result.json").unlink(missing_ok=True)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file so that a reader finds the old one or the new one, never half."""
        self._replace(name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def _replace(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as stream:
            stream.write(text.encode())

    def _read(self, name: str, *fields: str) -> dict[str, Any] | None:
        path = self.path / name
        return _parse_object(path.read_bytes(), path, *fields) if path.exists() else None

    def result(self) -> dict[str, Any] | None:
        """The final figures, if the run is finished."""
        return self._read("result.json", *_RESULT_FIELDS)

    def records(self) -> list[dict[str, Any]]:
        """All records of `metrics.jsonl`, in order; one that was not finished is left out.

        Raises:
          UserError: if the file is damaged.
        """
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_bytes().split(b"\n")[:-1]
        return [_parse_object(line, self._metrics, *RECORD_FIELDS) for line in lines]

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record.

        Args:
          record: JSON values, all `RECORD_FIELDS`.
        """
        with self._metrics.open("a") as file:
            file.write(_line(record))
        sync(self._metrics)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _parse_object(text: bytes, path: Path, *names: str) -> dict[str, Any]:
    """A JSON object with these names; UserError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(names):
        raise UserError(
            f"{path} is damaged: not the JSON of a run; delete it, and the next start makes it "
            f"again from the checkpoints"
        )
    return value
