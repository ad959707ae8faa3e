"""Exact evaluation: every image of a split counts once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn.data.dataset import Split
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError
from cnn.metrics import Metrics, total
from cnn.ops import explicit_mesh
from cnn.runtime.devices import limit_in_flight
from cnn.steps import TrainState, eval_step, is_per_example_state


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _score_batch(
    state: TrainState, split: DeviceSplit, start: int, *, batch_size: int, mesh: Mesh | None
) -> Metrics:
    """Scores `batch_size` images from `start` on; those behind the last image count nowhere."""

    def score(state: TrainState, split: DeviceSplit, start: jax.Array) -> Metrics:
        num_examples = split.labels.shape[0]
        index = start + jnp.arange(batch_size, dtype=jnp.int32)
        if mesh is not None and batch_size % mesh.size == 0:
            index = jax.lax.with_sharding_constraint(index, _over_all_axes(mesh))
        batch = split.take(jnp.minimum(index, num_examples - 1))
        return eval_step(state, {**batch, "mask": index < num_examples})

    first = jnp.asarray(start, jnp.int32)
    return explicit_mesh.with_automatic_axes(
        score, explicit_mesh.replicated_over, state, split, first
    )


def _over_all_axes(mesh: Mesh) -> NamedSharding:
    """The leading axis sharded over all devices of a mesh, whatever the types of its axes."""
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, PartitionSpec(mesh.axis_names))


def evaluate(state: TrainState, split: DeviceSplit | Split, *, batch_size: int = 1000) -> Metrics:
    """Scores all images of a split, the last and partial batch included.

    Args:
      state: whose parameters to score.
      split: placed on the devices; the batch is sharded over the mesh it lies on, if any. A split
        on the host is placed where the state is, and its images are divided by 255: a state that
        was trained on standardized images wants `DeviceSplit.place(..., "standardize", ...)`.
      batch_size: images per compiled call; rounded up to a multiple of the device count.

    Returns:
      Metrics on the host: `count` is the number of images of the split, whatever the batch
      size and the number of devices. Where model or loss do not declare that they treat each image
      for itself (see `create_train_state`), no image is put in to fill the last batch.

    Raises:
      UserError: if the split or the batch size is none, or labels, logits and losses have not the
        shapes that `train_step` asks for.
    """
    if isinstance(split, Split):
        split = _place(split, state)
    if not isinstance(split, DeviceSplit):
        raise UserError(
            f"evaluate takes a Split or a DeviceSplit, such as dataset.test, not "
            f"{type(split).__name__}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be 1 or more")
    num_examples = split.labels.shape[0]
    sharding = split.labels.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    batch_size = min(batch_size, num_examples)
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size
    padded = is_per_example_state(state)
    parts: list[Metrics] = []
    for start in range(0, num_examples, batch_size):
        size = batch_size if padded else min(batch_size, num_examples - start)
        parts.append(_score_batch(state, split, start, batch_size=size, mesh=mesh))
        limit_in_flight(parts)
    return total(parts)


def _place(split: Split, state: TrainState) -> DeviceSplit:
    """A split of the host beside the state, to be scaled to 0..1."""
    where = next((leaf.sharding for leaf in jax.tree.leaves(state.params)), None)
    where = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    channels = split.images.shape[-1]
    constants = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return DeviceSplit(*jax.device_put((split.images, split.labels, *constants), where))
