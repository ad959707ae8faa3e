"""The files by which a run directory explains itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType, UnionType
from typing import IO, Any

from cnn.errors import UserError, number_of
from cnn.runtime.disk import (
    atomic_write,
    describe_disk_error,
    nearest_existing,
    resolve_path,
    sync,
    write_error,
)

_CONFIG, _METRICS, _RESULT = "config.json", "metrics.jsonl", "result.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without locks


class RunDirectory:
    """A run's folder: `config.json`, `environment.json`, `metrics.jsonl`, `result.json`.

    Creating the object writes nothing: `lock` is the first to write. Leaving the context manager
    releases the lock.

    Args:
      path: the folder, which need not exist; `~` is the home directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = resolve_path(path)
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
    def has_begun(self) -> bool:
        """Whether `begin` was called, which requires a checkpoint."""
        return any((self.path / name).exists() for name in (_CONFIG, _METRICS, _RESULT))

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def members_folder(self) -> Path:
        """The folder of the runs of a group, which each have a directory there."""
        return self.path / "members"

    @property
    def is_group(self) -> bool:
        """Whether this is the directory of a group of runs, not of one run."""
        return os.path.isdir(self.members_folder)  # Path's own raises where a name is too long

    def members(self) -> list[Path]:
        """The run directories of a group's members, by name; empty of any other directory."""
        if not self.is_group:
            return []
        return sorted(path for path in self.members_folder.iterdir() if path.is_dir())

    def check_is_one(self) -> None:
        """Raises UserError if this is the directory of a group of runs."""
        if members := self.members():
            raise UserError(
                f"{self.path} is a group of {number_of(len(members), 'run')}; choose one, such as "
                f"{members[0]}"
            )

    def check_writable(self) -> None:
        """Raises UserError if the folder cannot be created or written, or is a file."""
        if (error := write_error(self.path)) is None:
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(describe_disk_error(error, self.path)) from error
        raise UserError(
            f"work directory {self.path} cannot be written ({nearest_existing(self.path)} is not a "
            f"writable directory); choose another --workdir"
        ) from error

    def check(self) -> dict[str, Any] | None:
        """Checks whether a run may start or resume here.

        Returns:
          The result of a finished run, else None.

        Raises:
          UserError: the folder cannot be written, a file of the run is damaged, or another process
            is training there.
        """
        if (finished := self.result()) is None:
            self.check_writable()
            if self._lock_file.exists():  # else there is no folder yet, and none is made in vain
                self.lock()
        self.records()
        return finished

    def lock(self) -> None:
        """Creates the folder, and excludes other processes until this one ends, however it ends.

        Raises:
          UserError: another process holds the lock, or the folder cannot be written.
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
            raise UserError(
                f"{self.path} is being trained in by {_holder(lock)}; "
                f"wait for it, stop it, or choose another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(OSError):  # a full disk; the lock does not need the name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())

    def begin(self, config: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Writes `config.json` and `metrics.jsonl` before the first step of a process.

        Args:
          config: the resolved config.
          records: the records stored in the checkpoint that is resumed. `metrics.jsonl` is
            rewritten to these: later or half-written lines are dropped, since the run writes them
            again.
        """
        self._replace(_METRICS, "".join(map(_line, records)))
        self.write(_CONFIG, config)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record to `metrics.jsonl`: JSON values, among them the numbers `step`, `epoch`."""
        file = self.path / _METRICS
        with file.open("a") as stream:
            stream.write(_line(record))
        sync(file)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file atomically: a reader finds the old file or the new one."""
        self._replace(name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def _replace(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as stream:
            stream.write(text.encode())

    def delete_result(self) -> None:
        """Deletes `result.json`, because the run is not finished, or no longer."""
        (self.path / _RESULT).unlink(missing_ok=True)

    def config(self) -> dict[str, Any] | None:
        """The resolved config of the run; None before `begin`.

        Raises:
          UserError: the file is damaged.
        """
        return self._read(_CONFIG)

    def result(self) -> dict[str, Any] | None:
        """The final figures, among them `digest`; None while the run is not finished.

        Raises:
          UserError: the file is damaged.
        """
        return self._read(_RESULT, digest=str)

    def records(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, in order, without a half-written last line.

        Raises:
          UserError: the file is damaged.
        """
        file = self.path / _METRICS
        if not file.exists():
            return []
        lines = file.read_bytes().split(b"\n")[:-1]
        return [_parse_object(line, file, step=int, epoch=int | float) for line in lines]

    def dataset(self) -> dict[str, Any] | None:
        """What the run is trained on; None if that is not recorded.

        Raises:
          UserError: the file is damaged.
        """
        return self._read("dataset.json", name=str, class_names=list, fingerprint=str)

    def environments(self) -> list[dict[str, Any]]:
        """The environments of the run's parts, the latest last; empty if they are not recorded.

        Raises:
          UserError: the file is damaged.
        """
        if (now := self._read("environment.json", starts=list)) is None:
            return []
        earlier = now.pop("earlier", [])
        return [*earlier, now] if isinstance(earlier, list) else [now]

    def trainer(self) -> str | None:
        """The process that trains the run now; None if there is none, or that is unknown."""
        try:
            with self._lock_file.open("rb", buffering=0) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _holder(lock)
        except OSError:  # there is no lock, or this file system has none
            return None
        return None

    def _read(self, name: str, /, **required: type) -> dict[str, Any] | None:
        path = self.path / name
        return _parse_object(path.read_bytes(), path, **required) if path.exists() else None


def _holder(lock: IO[bytes]) -> str:
    """The process that holds a lock, which writes its name a moment after it has the lock."""
    for _ in range(20):
        lock.seek(0)
        if name := lock.read().decode():
            return name
        time.sleep(0.05)
    return "another process"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _parse_object(text: bytes, path: Path, /, **required: type | UnionType) -> dict[str, Any]:
    """Parses a JSON object with the required names and types; UserError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(
        isinstance(value.get(name), kind) for name, kind in required.items()
    ):
        raise UserError(
            f"{path} is damaged: it is not the JSON of a run; delete it, and the next start "
            f"writes it again from the checkpoints"
        )
    return value
