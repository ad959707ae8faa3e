"""Saving and restoring a run.

A checkpoint is a folder named by its step. It holds the arrays (`cnn.runtime.checkpoint_arrays`),
JSON values (`record.json`) and the SHA-256 of each file. It is written under a temporary name, read
back, and renamed when all of it is on disk. So a folder named by a step is complete, whenever the
process dies.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import jax

from cnn.errors import UserError
from cnn.runtime import leaves
from cnn.runtime.checkpoint_arrays import host_tree, read_arrays, write_arrays
from cnn.runtime.checksums import read_bytes, verify_checksums, write_checksums
from cnn.runtime.disk import (
    describe_disk_error,
    describe_read_error,
    resolve_path,
    siblings,
    sync,
    system_error,
)

_MAX_TO_KEEP = 2  # of the newest: one to resume from, and one in case that is damaged
# Unfinished work has a dotted name, so listing the steps never sees it.
_SAVING, _DELETING = ".saving-", ".deleting-"
_STEP = re.compile(r"0|[1-9][0-9]*")
_READ_ATTEMPTS = 5  # of a checkpoint that another process replaces


class Checkpointable(Protocol):
    """A state that can be saved and restored, such as `cnn.TrainState`."""

    @property
    def arrays(self) -> dict[str, Any]:
        """What is saved: a pytree for each name, among them the integer `step`."""
        ...

    def replace(self, **arrays: Any) -> Any:
        """Returns a copy with other arrays."""
        ...


_State = TypeVar("_State", bound=Checkpointable)


def digest(state: Checkpointable | dict[str, Any]) -> str:
    """SHA-256 over step, parameters, model state and optimizer state.

    Covers the path, dtype, shape and bytes of every leaf: two states with the same digest are equal
    to the last bit.

    Args:
      state: a state, or the arrays that `CheckpointManager.read` returns.

    Returns:
      64 hexadecimal digits.

    Raises:
      UserError: a leaf is neither an array, nor a typed random key, nor a number.
    """
    return leaves.digest(state if isinstance(state, dict) else state.arrays)


class _DamagedError(UserError):
    """A checkpoint's bytes differ from those that were saved."""


class _GoneError(UserError):
    """A checkpoint was deleted, or never existed."""


_Found = TypeVar("_Found")
_Identity = tuple[int, ...]


class _Fault(Exception):  # noqa: N818 - caught below, never seen by a caller
    """What is wrong with a checkpoint."""


class CheckpointManager:
    """The checkpoints of one run: the two latest, and the best by test accuracy.

    Saves run in a background thread. Leaving the context manager waits for them and raises their
    errors. Only one process at a time may save, which `RunDirectory.lock` ensures. Any number of
    processes may read meanwhile; reading changes nothing on disk.

    Args:
      directory: created by the first save if it does not exist; `~` is the home directory.

    Attributes:
      directory: the absolute path.

    Raises:
      UserError: `directory` is an address such as `s3://bucket`, or is not a path.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = resolve_path(directory)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "save")
        self._saving: concurrent.futures.Future[None] | None = None
        self._accuracies: dict[int, tuple[_Identity | None, float | None]] = {}
        self._damaged: dict[int, _Identity | None] = {}  # the next save renames them
        self._has_saved = False

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait_until_finished()

    def all_steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending, without those found damaged before.

        Raises:
          UserError: the directory cannot be read.
        """
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(
                f"the checkpoints cannot be listed: {describe_read_error(error)}"
            ) from error
        steps = sorted(int(name) for name in names if _STEP.fullmatch(name))
        return [step for step in steps if not self._is_known_as_damaged(step)]

    def _is_known_as_damaged(self, step: int) -> bool:
        identity = self._damaged.get(step)
        return identity is not None and identity == _identity(self._folder(step))

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest test accuracy; None if there is none.

        Ignores checkpoints that are damaged, and those that another process deletes meanwhile.

        Raises:
          UserError: a checkpoint cannot be read for another reason.
        """
        ranked = []
        for step in self.all_steps():
            with contextlib.suppress(_GoneError):
                ranked.append((self._accuracy(step), step))
        return _best(ranked)

    def _accuracy(self, step: int) -> float | None:
        """The test accuracy of a step; None if it has none, or is damaged."""
        identity = _identity(self._folder(step))
        before, accuracy = self._accuracies.get(step, (None, None))
        if identity is None or before != identity:
            try:
                accuracy = self._look(step, _checked_record).get("test_accuracy")
            except _DamagedError:
                accuracy = None
            self._accuracies[step] = identity, accuracy
        return accuracy

    def save(self, state: Checkpointable, record: dict[str, Any]) -> None:
        """Starts saving a state under its step.

        An earlier checkpoint of the same step is replaced, and older ones are deleted, only after
        the new one was read back and found equal.

        Args:
          state: its arrays are copied before this returns, so the caller may donate them.
          record: JSON values, stored beside the arrays. `test_accuracy` ranks the checkpoint.

        Raises:
          UserError: the previous save failed; or there is a later step, which would be resumed
            instead; or a leaf of the state or a value of the record cannot be saved.
        """
        self.wait_until_finished()
        # The caller's next step donates these buffers while they are being written.
        arrays = host_tree(state.arrays)
        step, latest = int(arrays["step"]), self.latest_step()
        if latest is not None and step < latest:
            raise UserError(f"step {step} is older than step {latest} in {self.directory}")
        try:
            record = json.loads(json.dumps(record))  # a copy, like that of the arrays
        except (TypeError, ValueError) as error:
            raise UserError(f"the record of step {step} is not JSON: {error}") from error
        self._saving = self._thread.submit(self._save, step, arrays, record)

    def _save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """In the thread: writes and renames a checkpoint, then deletes what is not kept."""
        try:
            self._write(step, arrays, {**record, "digest": digest(arrays)})
            accuracy = record.get("test_accuracy")
            self._accuracies[step] = _identity(self._folder(step)), accuracy
            self._prune()
        except Exception as error:  # of many kinds, from Orbax
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
            is_ours = isinstance(error, UserError)
            reason = error if is_ours else describe_disk_error(error, self.directory)
            raise UserError(
                f"the checkpoint of step {step:,} ({size / 1e6:.1f} MB) could not be written: "
                f"{reason}{self.resume_hint()}"
            ) from error

    def _write(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        if not self._has_saved:  # if the directory disappears later, that is an error
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            self._delete_retired()
            self._has_saved = True
        new = self.directory / f"{_SAVING}{step}"
        try:
            new.mkdir()
            write_arrays(new, arrays)
            (new / "record.json").write_text(json.dumps(record))
            write_checksums(new)
            sync(*new.rglob("*"), new, self.directory)
            _read_back(new, step)
            self._set_damaged_aside()
            self._retire(step)
            new.rename(self._folder(step))
            sync(self.directory)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
            raise

    def _set_damaged_aside(self) -> None:
        """Renames the checkpoints that `restore_latest` found damaged."""
        for step in list(self._damaged):
            if self._is_known_as_damaged(step):
                aside = self.directory / _aside(step)
                shutil.rmtree(aside, ignore_errors=True)  # the same step was damaged before
                self._folder(step).rename(aside)
            del self._damaged[step]

    def _prune(self) -> None:
        steps = self.all_steps()
        kept, ranked = set(steps[-_MAX_TO_KEEP:]), []
        for step in steps:
            try:
                ranked.append((self._accuracy(step), step))
            except UserError:  # it cannot be read now, and may be the best
                kept.add(step)
        for step in set(steps) - kept - {_best(ranked)}:
            self._retire(step)
        self._delete_retired()

    def _retire(self, step: int) -> None:
        """Removes a step from the listing by one rename; `_delete_retired` deletes its files."""
        with contextlib.suppress(FileNotFoundError):
            self._folder(step).rename(self.directory / f"{_DELETING}{step}")

    def _delete_retired(self) -> None:
        for prefix in (_SAVING, _DELETING):
            for path in siblings(self.directory, prefix):
                shutil.rmtree(path, ignore_errors=True)

    def resume_hint(self) -> str:
        """The end of a message about a failed save: where the run will resume; never raises."""
        with contextlib.suppress(OSError, UserError):
            if (step := self.latest_step()) is not None:
                return f"; the same command then resumes from step {step:,}"
        return ""

    def check_for_errors(self) -> None:
        """Raises the UserError of a save that has failed; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait_until_finished()

    def wait_until_finished(self) -> None:
        """Waits until the last save is on disk; raises UserError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint without its model, on any machine.

        Another process may be training meanwhile: a checkpoint that it replaces is read again.

        Returns:
          NumPy arrays in nested dictionaries and lists (`step`, `params`, `model_state`,
          `opt_state`), and the record that was saved with them. Typed random keys are JAX arrays.

        Raises:
          UserError: any bit differs from what was saved ("is damaged"); or there is no such
            checkpoint, or no longer ("is gone"); or a file cannot be read for another reason.
        """
        return self._look(step, functools.partial(_load, step=step))

    def _look(self, step: int, look: Callable[[Path], _Found]) -> _Found:
        """Calls `look` on the folder of a step, again if another process replaced it meanwhile."""
        folder = self._folder(step)
        for _ in range(_READ_ATTEMPTS):
            try:
                status = os.stat(folder)
            except FileNotFoundError as error:
                raise _GoneError(
                    f"checkpoint {folder} is gone: it was deleted, or never saved; "
                    f"CheckpointManager.all_steps() lists those that exist"
                ) from error
            except OSError as error:
                raise UserError(
                    f"a checkpoint cannot be read: {describe_read_error(error)}"
                ) from error
            if not stat.S_ISDIR(status.st_mode):
                raise _DamagedError(f"checkpoint {folder} is damaged: it is not a folder")
            try:
                return look(folder)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # of many kinds, from Orbax
                if _identity(folder) == _identity_of(status):
                    raise _explained(error, folder) from error
        raise UserError(f"checkpoint {folder} is being replaced again and again: read it later")

    def restore(self, state: _State, step: int) -> _State:
        """Reads a checkpoint into the structure and onto the devices of `state`.

        A function that was compiled for `state` accepts the result without compiling again.

        Args:
          state: a fresh state of the same run: it gives shapes, dtypes and shardings.
          step: the checkpoint; the number of devices that saved it does not matter.

        Raises:
          UserError: as for `read`, or the checkpoint is of another model or optimizer.
        """
        return self._into(state, step, self.read(step)[0])

    def restore_latest(
        self, state: _State, warn: Callable[[str], None]
    ) -> tuple[_State, dict[str, Any]] | None:
        """Restores the newest undamaged checkpoint; None if there is no checkpoint at all.

        Changes nothing on disk. Damaged checkpoints are skipped, here and by `all_steps`, and the
        next save renames them to "<step>.damaged": so only a process that saves moves them.

        Args:
          state: as for `restore`.
          warn: called with one line for each damaged checkpoint.

        Returns:
          The state and its record.

        Raises:
          UserError: all are damaged, or the newest undamaged one is of another model or
            optimizer, or a file cannot be read for another reason than damage.
        """
        for _ in range(_READ_ATTEMPTS):
            # Another process deletes a step only when there is a newer one.
            with contextlib.suppress(_GoneError):
                return self._restore_latest(state, warn)
        raise UserError(f"{self.directory} is changing again and again: read it later")

    def _restore_latest(
        self, state: _State, warn: Callable[[str], None]
    ) -> tuple[_State, dict[str, Any]] | None:
        damaged: dict[int, tuple[_Identity | None, str]] = {}
        for step in reversed(self.all_steps()):
            identity = _identity(self._folder(step))
            try:
                arrays, record = self.read(step)
            except _DamagedError as error:
                damaged[step] = identity, str(error)
                continue
            restored = self._into(state, step, arrays)
            for other, (identity, fault) in damaged.items():
                warn(
                    f"{fault}; the run resumes from step {step}, and its next save renames the "
                    f"damaged one to {_aside(other)}"
                )
                self._damaged[other] = identity
            return restored, record
        if damaged:
            raise UserError(
                f"{'; '.join(fault for _, fault in damaged.values())}; no other is left: restore "
                f"one from a backup, or start again in another --workdir"
            )
        return None

    def _into(self, state: _State, step: int, arrays: dict[str, Any]) -> _State:
        """The state with the arrays of a step, in its structure and on its devices."""
        if wrong := leaves.differences(arrays, state.arrays):
            raise UserError(
                f"checkpoint {self._folder(step)} is of another model or optimizer "
                f"({leaves.first_of(wrong.values())})"
            )
        mine, theirs = leaves.by_path(state.arrays), leaves.by_path(arrays)
        structure = jax.tree.structure(state.arrays)
        values = [leaves.like(leaf, theirs[path]) for path, leaf in mine.items()]
        return state.replace(**jax.tree.unflatten(structure, values))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)


def _aside(step: int) -> str:
    return f"{step}.damaged"


def _best(ranked: list[tuple[float | None, int]]) -> int | None:
    """The step of the highest accuracy, the latest of equal ones."""
    known = [(accuracy, step) for accuracy, step in ranked if accuracy is not None]
    return max(known)[1] if known else None


def _identity(folder: Path) -> _Identity | None:
    """Distinguishes a folder from another that replaces it; None if it does not exist."""
    try:
        return _identity_of(os.stat(folder))
    except OSError:
        return None


def _identity_of(status: os.stat_result) -> _Identity:
    # The inode of a deleted folder may be used again; the time of the rename then differs.
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _checked_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint, after a check of all its files.

    Raises:
      _Fault: a file differs from what was saved.
      OSError: a file cannot be read.
    """
    if (fault := verify_checksums(folder, strict=True)) is not None:
        raise _Fault(fault)
    try:
        record = json.loads(read_bytes(folder / "record.json"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or "digest" not in record:
        raise _Fault("record.json is not that of a checkpoint")
    return record


def _load(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the record, with every bit checked; raises as `_checked_record`."""
    record = _checked_record(folder)
    arrays = read_arrays(folder)
    if digest(arrays) != record["digest"] or int(arrays["step"]) != step:
        raise _Fault("its digest does not match")
    return arrays, record


def _read_back(folder: Path, step: int) -> None:
    """Raises UserError or OSError unless what was just written can be read."""
    try:
        _load(folder, step)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds, from Orbax
        if system_error(error) is not None:
            raise
        raise UserError(
            f"it was read back and is not what was saved ({_first_line(error)}); it is deleted"
        ) from error


def _explained(error: Exception, folder: Path) -> UserError:
    """The error to raise for a checkpoint that was not replaced while reading it failed."""
    if isinstance(error, _Fault):
        return _DamagedError(f"checkpoint {folder} is damaged: {error}")
    if isinstance(error, OSError) and system_error(error) is not None:
        return UserError(f"a checkpoint cannot be read: {describe_read_error(error)}")
    return UserError(
        f"checkpoint {folder} cannot be read, although its SHA256SUMS match: {_first_line(error)}; "
        f"nothing was changed; try the versions of cnn and Orbax that saved it"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
