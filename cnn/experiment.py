"""From a config to the objects of a run: data, model, optimizer, and how many steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cnn.data import Dataset, Split, load_dataset
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError
from cnn.models import create_model
from cnn.optimizers import create_optimizer, create_schedule
from cnn.runtime.devices import replicated_sharding
from cnn.runtime.screen import waiting
from cnn.steps import CrossEntropy, TrainState, create_train_state, has_native_convolution

# Streams of random keys, folded into the run's seed.
_INIT, _ORDER, _AUGMENT = 0, 1, 2
# Where compiling takes longer than running: a third of the time on a CPU, for the same numbers.
_RUNS_ONCE = {"xla_backend_optimization_level": 1}
# A call of half a second on two cores, and 50 MB of images.
_MOST_STEPS_PER_CALL, _VALUES_PER_CALL = 50, 4096 * 32 * 32 * 3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What stays the same during a run.

    Attributes:
      config: the checked `ConfigDict`; `Any`, as no type checker knows its fields.
      dataset: its splits, on the host.
      mesh: the devices.
      model: the network.
      schedule: learning rate by number of updates.
      steps_per_epoch: whole batches in the train split.
      warmup_updates: during which the learning rate rises.
    """

    config: Any
    dataset: Dataset
    mesh: Mesh
    model: nn.Module
    schedule: optax.Schedule
    steps_per_epoch: int
    warmup_updates: int

    @property
    def num_updates(self) -> int:
        """Updates of the whole run: an optimizer that accumulates makes fewer than steps."""
        return self.num_steps // self.config.optimizer.grad_accumulation_steps

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.config.num_epochs

    @property
    def shuffle_key(self) -> jax.Array:
        """The key from which each epoch's order follows."""
        return _stream_key(self.config.seed, _ORDER)

    @property
    def augment_key(self) -> jax.Array:
        """The key from which the augmentation of each step follows."""
        return _stream_key(self.config.seed, _AUGMENT)

    def place(self, split: Split) -> DeviceSplit:
        """A split of the dataset, on every device of the mesh."""
        normalization = self.config.dataset.normalization
        return DeviceSplit.place(split, self.dataset, normalization, replicated_sharding(self.mesh))

    def initial_state(self) -> TrainState:
        """The state before the first step, on every device of the mesh."""
        optimizer = {**self.config.optimizer.to_dict(), "learning_rate": self.schedule}
        create = self.jit_once(create_train_state, ("model", "tx", "image_shape", "loss_fn"))
        state = create(
            model=self.model,
            tx=create_optimizer(**optimizer),
            key=_stream_key(self.config.seed, _INIT),
            image_shape=tuple(self.dataset.image_shape),
            loss_fn=CrossEntropy(self.config.label_smoothing),
        )
        state = state.replace(
            lanes=self.mesh.size, skip_nonfinite=self.config.on_nonfinite == "skip"
        )
        return jax.device_put(state, replicated_sharding(self.mesh))

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are those of a CPU."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def jit_once(
        self, fn: Callable[..., Any], static_argnames: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """`jax.jit` for what runs once in a run.

        Args:
          fn: of a module: the compiled function is kept for later runs.
          static_argnames: as for `jax.jit`.
        """
        return _jit_once(fn, static_argnames, self.on_cpu)

    def steps_per_execution(self, state: TrainState) -> int:
        """Steps in one call of the compiled function: none passes an epoch's end or a save."""
        most = self.config.steps_per_execution
        if not most:
            shape = (self.config.batch_size, *self.dataset.image_shape)
            most = max(1, min(_MOST_STEPS_PER_CALL, _VALUES_PER_CALL // math.prod(shape)))
            if self.on_cpu and has_native_convolution(state, shape):
                most = 1
        return min(most, self.steps_per_epoch, self.config.checkpoint_every_steps or most)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the last update made when `step` steps are done."""
        update = max(step // self.config.optimizer.grad_accumulation_steps - 1, 0)
        return float(_scheduled(self.schedule, np.int32(update)))


@functools.cache
def _jit_once(
    fn: Callable[..., Any], static_argnames: tuple[str, ...], on_cpu: bool
) -> Callable[..., Any]:
    options = _RUNS_ONCE if on_cpu else None
    return jax.jit(fn, static_argnames=static_argnames, compiler_options=options)


@functools.partial(jax.jit, static_argnames="schedule")
def _scheduled(schedule: optax.Schedule, update: jax.Array) -> jax.Array:
    return jnp.asarray(schedule(update))


def _stream_key(seed: int, stream: int) -> jax.Array:
    """A typed key: what `jax.random.key(seed)` is by JAX's defaults, and the stream folded in.

    Made of its two words, so that no setting of JAX changes it (there is one that adds to seeds).
    """
    return _fold_in(np.array([0, seed], np.uint32), np.uint32(stream))


@jax.jit
def _fold_in(words: jax.Array, stream: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), stream)


def create_experiment(config: Any, mesh: Mesh) -> Experiment:
    """Loads the data and builds the model and schedule that a checked config names.

    Raises:
      UserError: if the dataset cannot be had, or is too small for the batch or the schedule.
    """
    with waiting(f"loading {config.dataset.name}"):
        dataset = load_dataset(config.dataset.name, config.dataset.data_dir or None)
    num_images = len(dataset.train.labels)
    steps_per_epoch = num_images // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {num_images:,} training images "
            f"of {dataset.name}"
        )
    side = min(dataset.image_shape[:2])
    if config.augment.translate >= side:
        raise UserError(
            f"augment.translate={config.augment.translate} is too much for images of {side} "
            f"pixels; choose 0 to {side - 1}"
        )
    # Updates, not steps: an optimizer that accumulates moves its schedule on once per update.
    accumulate, num_steps = (
        config.optimizer.grad_accumulation_steps,
        steps_per_epoch * config.num_epochs,
    )
    if accumulate > num_steps:
        raise UserError(
            f"optimizer.grad_accumulation_steps={accumulate} is more than the {num_steps:,} steps of the "
            f"run: nothing would be trained"
        )
    if num_steps >= 2**31:
        raise UserError(
            f"num_epochs={config.num_epochs} makes {num_steps:,} steps; a run has less than 2**31"
        )
    warmup_updates = round(steps_per_epoch * config.schedule.warmup_epochs / accumulate)
    schedule = create_schedule(
        config.schedule.name,
        config.optimizer.learning_rate,
        num_updates=num_steps // accumulate,
        warmup_updates=warmup_updates,
        final_lr_fraction=config.schedule.final_lr_fraction,
    )
    return Experiment(
        config=config,
        dataset=dataset,
        mesh=mesh,
        model=create_model(num_classes=dataset.num_classes, **config.model.to_dict()),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        warmup_updates=warmup_updates,
    )
