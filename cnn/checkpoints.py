"""Saving and restoring a run: all of Orbax lives here.

A checkpoint is a folder named by its step. It holds the arrays as Orbax writes them (`state`),
JSON values (`record.json`) and the SHA-256 of each file. It is written beside its place and
renamed when all of it is on disk, so a folder of that name is complete, whenever the process dies.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from cnn.errors import InputError
from cnn.manifest import verify_manifest, write_manifest
from cnn.steps import TrainState
from cnn.storage import trouble

_ARRAYS = ("step", "params", "model_state", "opt_state")
_KEPT = 2  # of the newest: one to go on from, one for when that is damaged
# A name that begins with a dot is none of a step.
_SAVING, _DELETING = ".saving-", ".deleting-"


def _arrays(state: TrainState) -> dict[str, Any]:
    """What is stored. The random key is not: it follows from the config's seed."""
    return {name: getattr(state, name) for name in _ARRAYS}


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree; a field of a named tuple and a key of a dictionary read alike."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(state: TrainState | dict[str, Any]) -> str:
    """SHA-256 over step, parameters, model state and optimizer state.

    Covers every leaf's path, dtype, shape and bytes: two runs with the same digest are equal
    to the last bit.

    Args:
      state: a state, or the arrays that `Checkpoints.read` gives.

    Returns:
      64 hexadecimal digits.
    """
    arrays = _arrays(state) if isinstance(state, TrainState) else state
    sha = hashlib.sha256()
    for path, value in sorted(_by_path(jax.device_get(arrays)).items()):
        value = np.asarray(value)
        sha.update(f"{path} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


class Checkpoints:
    """The checkpoints of one run: the two latest, and the best by test accuracy.

    Saves go on in the background; use it as a context manager, which waits for them and so
    lets their errors out. One process at a time may save (`RunDirectory` sees to it).

    Args:
      directory: made by the first save if it is not there.

    Attributes:
      directory: as an absolute path.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "save")
        self._saving: concurrent.futures.Future[None] | None = None
        self._accuracies: dict[int, float | None] = {}
        self._began = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def steps(self) -> list[int]:
        """The steps that are complete on disk, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest test accuracy; None without one."""
        ranking = self._ranking().items()
        ranked = [(accuracy, step) for step, accuracy in ranking if accuracy is not None]
        return max(ranked)[1] if ranked else None

    def _ranking(self) -> dict[int, float | None]:
        """The test accuracies of the steps on disk; None where there is none to be had."""

        def accuracy(step: int) -> float | None:
            if verify_manifest(self.directory / str(step), strict=True):
                return None  # damaged
            return self._record(step).get("test_accuracy")

        known = self._accuracies
        self._accuracies = {s: known[s] if s in known else accuracy(s) for s in self.steps()}
        return self._accuracies

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Starts saving a state under its step.

        Args:
          state: copied before this returns, so the caller may donate it.
          record: JSON values kept beside it. `test_accuracy`, if there, ranks it for "best".

        Raises:
          InputError: if the save before this one failed; or there is a later step, which would
            be taken for the latest.
        """
        self.wait()
        # A copy: the caller's next step donates these buffers while they are being written.
        arrays = jax.tree.map(np.array, jax.device_get(_arrays(state)))
        step, latest = int(arrays["step"]), self.latest_step()
        if latest is not None and step < latest:
            raise InputError(f"step {step} is older than step {latest} in {self.directory}")
        self._saving = self._thread.submit(self._save, step, arrays, record)

    def _save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """In the thread: writes a checkpoint, puts it in its place, deletes what is not kept."""
        try:
            self._write(step, arrays, {**record, "digest": digest(arrays)})
            self._accuracies[step] = record.get("test_accuracy")
            self._prune()
        except Exception as error:  # of many kinds, from Orbax
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
            raise InputError(
                f"the checkpoint of step {step:,} ({size / 1e6:.1f} MB) could not be written: "
                f"{trouble(error, self.directory)}{self.then()}"
            ) from error

    def _write(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        if not self._began:  # later on, a directory that is gone is an error
            self.directory.mkdir(parents=True, exist_ok=True)
            _sync(self.directory.parent)
            self._sweep()
            self._began = True
        new = self.directory / f"{_SAVING}{step}"
        try:
            new.mkdir()
            args, checkpointer = _orbax()
            checkpointer.save(new / "state", args=args.PyTreeSave(arrays))
            (new / "record.json").write_text(json.dumps(record))
            write_manifest(new)
            _sync(*new.rglob("*"), new, self.directory)
            self._drop(step)
            new.rename(self.directory / str(step))
            _sync(self.directory)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
            raise

    def _prune(self) -> None:
        steps = self.steps()
        for step in set(steps) - {*steps[-_KEPT:], self.best_step()}:
            self._drop(step)
        self._sweep()

    def _drop(self, step: int) -> None:
        """Takes a step away at once; `_sweep` deletes its files."""
        with contextlib.suppress(FileNotFoundError):
            (self.directory / str(step)).rename(self.directory / f"{_DELETING}{step}")

    def _sweep(self) -> None:
        for kind in (_SAVING, _DELETING):
            for path in self.directory.glob(f"{kind}*"):
                shutil.rmtree(path, ignore_errors=True)

    def then(self) -> str:
        """How a run goes on that could not save, for the end of a message; never raises."""
        with contextlib.suppress(OSError):
            if (step := self.latest_step()) is not None:
                return f"; the same command then goes on from step {step:,}"
        return ""

    def check(self) -> None:
        """Raises the InputError of a save that has failed; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk; raises InputError if it is not."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / "record.json").read_text())

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint as it is: for a program without the model, a machine without the device.

        Args:
          step: which one.

        Returns:
          NumPy arrays in nested dictionaries and lists: `step`, `params`, `model_state`,
          `opt_state`; and the record that was saved with them.

        Raises:
          InputError: if any bit of it is not as it was saved.
        """
        folder, (_, checkpointer) = self.directory / str(step), _orbax()
        if (fault := verify_manifest(folder, strict=True)) is None:
            try:
                arrays = checkpointer.restore(folder / "state")
                record = self._record(step)
                if digest(arrays) == record["digest"] and int(arrays["step"]) == step:
                    return arrays, record
                fault = "its digest does not match"
            except MemoryError:
                raise
            except Exception as error:  # of many kinds, from Orbax
                fault = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"checkpoint {folder} is damaged: {fault}")

    def restore(self, state: TrainState, step: int) -> TrainState:
        """Reads a checkpoint into the structure and onto the devices of `state`.

        Args:
          state: a fresh state of the same run; its arrays say shapes, dtypes and shardings.
          step: which checkpoint; on how many devices it was made does not matter.

        Raises:
          InputError: if the checkpoint is damaged, or of another model or optimizer.
        """
        return self._place(state, step, self.read(step)[0])

    def restore_latest(
        self, state: TrainState, tell: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole; None if there is no checkpoint at all.

        Those that are damaged are told of and moved aside, to be named "<step>.damaged".

        Args:
          state: as for `restore`.
          tell: takes a line for each damaged checkpoint, before it is moved.

        Returns:
          The state and its record.

        Raises:
          InputError: if all are damaged (they stay where they are), or the newest whole one is of
            another model or optimizer.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                arrays, record = self.read(step)
            except InputError as error:
                damaged[step] = str(error)
                continue
            restored = self._place(state, step, arrays)
            for other, fault in damaged.items():
                aside = self.directory / f"{other}.damaged"
                tell(f"{fault}; it is moved to {aside.name}, and the run goes on from step {step}")
                shutil.rmtree(aside, ignore_errors=True)  # the same step was damaged before
                (self.directory / str(other)).rename(aside)
            return restored, record
        if damaged:
            raise InputError(
                f"{'; '.join(damaged.values())}; no other is left: put a whole one back, or begin "
                f"anew in another --workdir"
            )
        return None

    def _place(self, state: TrainState, step: int, arrays: dict[str, Any]) -> TrainState:
        """The arrays of a step in the structure and on the devices of a state."""
        mine, theirs = _by_path(_arrays(state)), _by_path(arrays)
        wrong = [
            f"{path}: {_kind(theirs.get(path))} -> {_kind(mine.get(path))}"
            for path in sorted({*mine, *theirs}, key=lambda path: (path[:6] != "params", path))
            if _kind(mine.get(path)) != _kind(theirs.get(path))
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise InputError(
                f"checkpoint {self.directory / str(step)} is of another model or optimizer "
                f"({'; '.join(wrong[:4])}{more})"
            )
        leaves, structure = jax.tree.flatten(_arrays(state))
        values = jax.device_put([theirs[path] for path in mine], [leaf.sharding for leaf in leaves])
        return state.replace(**jax.tree.unflatten(structure, values))


@functools.cache
def _orbax() -> tuple[Any, Any]:
    """Orbax's `args`, and what writes and reads a tree of arrays."""
    import orbax.checkpoint as ocp  # takes most of a second, and scripts may do without

    return ocp.args, ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _kind(leaf: Any) -> str:
    """Dtype and shape of an array in words."""
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _sync(*paths: Path) -> None:
    """Sees to it that they survive a power failure."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
