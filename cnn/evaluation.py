"""Exact evaluation: every image of a split counts once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cnn.data.batches import DeviceSplit
from cnn.devices import stay_close
from cnn.metrics import Metrics, total
from cnn.steps import TrainState, eval_step


@functools.partial(jax.jit, static_argnames=("batch_size", "sharding"))
def _score_batch(
    state: TrainState, split: DeviceSplit, start: int, *, batch_size: int, sharding: NamedSharding
) -> Metrics:
    num_examples = split.labels.shape[0]
    index = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), sharding)
    batch = split.take(jnp.minimum(index, num_examples - 1))
    return eval_step(state, {**batch, "mask": index < num_examples})


def evaluate(state: TrainState, split: DeviceSplit, *, batch_size: int = 1000) -> Metrics:
    """Scores all images of a split, the last and partial batch included.

    Args:
      state: whose parameters to score.
      split: placed on the devices; the batch is sharded over the mesh it lies on, if any.
      batch_size: images per compiled call; rounded up to a multiple of the device count.

    Returns:
      Metrics on the host: `count` is the number of images of the split, whatever the batch
      size and the number of devices.
    """
    num_examples = split.labels.shape[0]
    sharding = split.labels.sharding
    batch_size = min(batch_size, num_examples)
    if isinstance(sharding, NamedSharding):
        devices = sharding.mesh.size
        batch_size = -(-batch_size // devices) * devices
        sharding = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
    parts: list[Metrics] = []
    for start in range(0, num_examples, batch_size):
        parts.append(_score_batch(state, split, start, batch_size=batch_size, sharding=sharding))
        stay_close(parts)
    return total(parts)
