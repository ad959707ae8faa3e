"""How `train_steps` is compiled and dispatched, for each backend the way that is fastest there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cnn.data.pipeline import Pipeline
from cnn.errors import UserError
from cnn.metrics import Metrics
from cnn.runtime.devices import is_on_cpu, limit_in_flight, replicated_sharding
from cnn.steps import Batch, TrainState, has_native_convolution, train_step, train_steps

_train_steps = jax.jit(train_steps, donate_argnames="state")
_train_known_steps = jax.jit(train_steps, donate_argnames="state", static_argnames="num_steps")


@functools.partial(jax.jit, donate_argnames="state")
def _train_one_step(state: TrainState, batches: Batch, i: jax.Array) -> tuple[TrainState, Metrics]:
    """`train_step` on one of several batches."""
    return train_step(state, jax.tree.map(lambda x: x[i], batches))


class TrainSteps:
    """`train_steps`, compiled for a state and a pipeline: see `compile_train_steps`."""

    def __init__(self, state: TrainState, pipeline: Pipeline) -> None:
        self._mesh = pipeline.mesh
        self._image_shape = pipeline.dataset.image_shape
        on_cpu = is_on_cpu(self._mesh)
        shape = (pipeline.batch_size, *pipeline.dataset.image_shape)
        # A native convolution is slow in a loop on a CPU: see `cnn.ops.microbatch`.
        self._is_looped = not (on_cpu and has_native_convolution(state, shape))
        self._compiles_each_length = self._is_looped and not on_cpu
        self._in_flight: list[Any] = []

    def what_compiles(self, batches: Batch, num_steps: int) -> str:
        """What the first call with such batches and `num_steps` compiles, for the screen."""
        length = f" ({num_steps:,} in one call)" if self._compiles_each_length else ""
        height, width, _ = shape = batches["image"].shape[2:]
        size = "" if shape == self._image_shape else f" for images of {height}x{width}"
        return f"compiling the training step{size}{length}"

    def __call__(
        self, state: TrainState, batches: Batch, num_steps: int
    ) -> tuple[TrainState, Metrics]:
        """Trains on the first `num_steps` of some batches; the state that is passed is consumed.

        Returns:
          The state, and metrics with leaves `[num_steps]` or longer; those beyond are zeros.
        """
        num_steps = min(num_steps, batches["label"].shape[0])
        if num_steps < 1:
            raise UserError(f"num_steps={num_steps} must be 1 or more")
        replicated = replicated_sharding(self._mesh)
        if getattr(state.step, "sharding", None) != replicated:
            state = jax.device_put(state, replicated)
        with jax.set_mesh(self._mesh):
            if self._is_looped:
                call = _train_known_steps if self._compiles_each_length else _train_steps
                state, metrics = call(state, batches, num_steps)
                self._wait(metrics, ahead=2)
                return state, metrics
            parts = []
            for i in range(num_steps):
                state, one = _train_one_step(state, batches, i)
                parts.append(one)
                self._wait(one, ahead=8)
            return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    @property
    def compiles_each_length(self) -> bool:
        """Whether each number of steps in a call is a program of its own."""
        return self._compiles_each_length

    def lower(self, state: TrainState, batches: Batch, num_steps: int) -> jax.stages.Lowered:
        """The program that a call would compile, which is only a step where steps are not looped.

        Args:
          state: as for a call; it is not consumed.
          batches: as for a call.
          num_steps: as for a call.
        """
        with jax.set_mesh(self._mesh):
            if not self._is_looped:
                return _train_one_step.lower(state, batches, 0)
            call = _train_known_steps if self._compiles_each_length else _train_steps
            return call.lower(state, batches, num_steps)

    def _wait(self, metrics: Metrics, ahead: int) -> None:
        self._in_flight = [*self._in_flight[-ahead:], metrics]
        limit_in_flight(self._in_flight, ahead)


def compile_train_steps(state: TrainState, pipeline: Pipeline) -> TrainSteps:
    """`train_steps` for what a pipeline yields, compiled at the first call.

    On GPUs, TPUs and, where that is fast, CPUs, the steps of a call are one program; on a CPU with
    native convolutions each step is a program of its own. The host is kept at most a few calls
    ahead of the devices: more calls in flight would deadlock several CPU devices.

    Args:
      state: to be trained; only shapes and static fields matter.
      pipeline: whose devices the state is replicated over.

    Returns:
      A function `(state, batches, num_steps) -> (state, metrics)`; the state that is passed to it
      is donated.

    >>> import cnn, optax
    >>> data = cnn.load_dataset("digits")
    >>> pipeline = cnn.Pipeline(data, batch_size=96)
    >>> model = cnn.CNN(data.num_classes, features=(4,))
    >>> state = cnn.create_train_state(
    ...     model, optax.adam(1e-2), jax.random.key(0), data.image_shape
    ... )
    >>> train = compile_train_steps(state, pipeline)
    >>> for batches, num_steps in pipeline.epoch(0):
    ...     state, metrics = train(state, batches, num_steps)
    >>> int(state.step), cnn.evaluate(state, pipeline.test).count
    (14, 360)
    """
    return TrainSteps(state, pipeline)
