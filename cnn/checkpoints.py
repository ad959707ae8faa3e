"""Saving and restoring a run: all of Orbax lives here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from cnn.errors import InputError
from cnn.steps import TrainState

_ARRAYS = ("step", "params", "model_state", "opt_state")


def _arrays(state: TrainState) -> dict[str, Any]:
    """What is stored. The random key is not: it follows from the config's seed."""
    return {name: getattr(state, name) for name in _ARRAYS}


def digest(state: TrainState) -> str:
    """SHA-256 over step, parameters, model state and optimizer state.

    Covers every leaf's path, dtype, shape and bytes: two runs with the same digest are equal
    to the last bit.

    Returns:
      64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(_arrays(state))
    for (path, _), value in zip(leaves, jax.device_get([leaf for _, leaf in leaves]), strict=True):
        value = np.asarray(value)
        sha.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


class Checkpoints:
    """The checkpoints of one run: the latest, and the best by test accuracy.

    Saves go on in the background; use it as a context manager, which waits for them and so
    lets their errors out.

    Args:
      directory: made if it is not there.

    Raises:
      InputError: if it cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        # Costs most of a second to import, and scripts that only train need none of it.
        import orbax.checkpoint as ocp

        self._directory = Path(directory).absolute()
        self._ocp = ocp
        policy = ocp.checkpoint_managers

        def accuracy(metrics: Any) -> float:
            return metrics["test_accuracy"]

        options = ocp.CheckpointManagerOptions(
            # Orbax writes metrics to disk only for best_fn; a resumed run ranks by them.
            best_fn=accuracy,
            preservation_policy=policy.AnyPreservationPolicy(
                [
                    policy.LatestN(1),
                    # One without metrics was being deleted when its process was killed.
                    policy.BestN(
                        get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self._directory} cannot hold checkpoints ({error.strerror}); "
                f"choose another --workdir"
            ) from error
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint on disk; None without one."""
        self._manager.reload()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest test accuracy; None without one."""
        self._manager.reload()
        step = self._manager.best_step()
        return step if step is not None and "test_accuracy" in self.read_record(step) else None

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Starts saving a state under its step; raises what the save before it ran into.

        Args:
          state: copied before this returns, so the caller may donate it.
          record: JSON values kept beside it. `test_accuracy`, if there, ranks it for "best".
        """
        args = self._ocp.args
        # A copy: the caller's next step donates these buffers while they are being written.
        # On the host, as the digest needs them there, and copying there compiles nothing.
        arrays = jax.tree.map(np.array, jax.device_get(_arrays(state)))
        accuracy = record.get("test_accuracy")
        saved = self._manager.save(
            int(state.step),
            args=args.Composite(
                state=args.StandardSave(arrays),
                record=args.JsonSave({**record, "digest": digest(state)}),
            ),
            # A checkpoint within an epoch has no accuracy and must never be the best one.
            metrics={"test_accuracy": -1.0 if accuracy is None else accuracy},
        )
        if not saved:
            raise RuntimeError(f"step {int(state.step)} was not saved: a later one is there")

    def wait(self) -> None:
        """Returns when everything is on disk; raises if it is not."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def read_record(self, step: int) -> dict[str, Any]:
        """The JSON values saved with a step.

        Raises:
          InputError: if they cannot be read.
        """
        args = self._ocp.args
        try:
            composite = self._manager.restore(step, args=args.Composite(record=args.JsonRestore()))
        except Exception as error:
            raise self._damaged(step, error) from error
        if "digest" not in (record := dict(composite["record"])):
            raise self._damaged(step, "its record is incomplete")
        return record

    def restore(self, state: TrainState, step: int) -> TrainState:
        """Reads a checkpoint into the structure and onto the devices of `state`.

        Args:
          state: a fresh state of the same run; its arrays say shapes, dtypes and shardings.
          step: which checkpoint.

        Raises:
          InputError: if the checkpoint is damaged, or of another model or optimizer.
        """
        args = self._ocp.args
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            _arrays(state),
        )
        try:
            composite = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(abstract))
            )
        except Exception as error:  # what a damaged file raises depends on the file
            raise self._damaged(step, error) from error
        restored = state.replace(**composite["state"])
        if digest(restored) != self.read_record(step)["digest"]:
            raise self._damaged(step, "its digest does not match")
        return restored

    def _damaged(self, step: int, cause: object) -> InputError:
        first_line = (str(cause).splitlines() or [""])[0]
        return InputError(
            f"checkpoint {self._directory / str(step)} cannot be restored: {first_line}; "
            f"move that folder away to go on from an earlier one, or use another --workdir"
        )
