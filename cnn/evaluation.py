"""Exact evaluation: every image of a split counts once."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn.data.dataset import Split
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError
from cnn.metrics import Metrics
from cnn.ops import explicit_mesh
from cnn.runtime.devices import limit_in_flight
from cnn.steps import TrainState, eval_step, is_per_example_state


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _eval_batch(
    state: TrainState, split: DeviceSplit, start: jax.Array, *, batch_size: int, mesh: Mesh | None
) -> Metrics:
    """Scores `batch_size` images from `start` on; those beyond the last image do not count."""

    @explicit_mesh.automatic_axes(lambda mesh, *_: explicit_mesh.replicated_over(mesh))
    def score(state: TrainState, split: DeviceSplit, start: jax.Array) -> Metrics:
        num_examples = split.labels.shape[0]
        index = start + jnp.arange(batch_size, dtype=jnp.int32)
        if mesh is not None and batch_size % mesh.size == 0:
            index = jax.lax.with_sharding_constraint(index, _over_all_axes(mesh))
        batch = split.get_batch(jnp.minimum(index, num_examples - 1))
        return eval_step(state, {**batch, "mask": index < num_examples})

    return score(state, split, start)


def _over_all_axes(mesh: Mesh) -> NamedSharding:
    """The leading axis sharded over all devices of a mesh, whatever the types of its axes."""
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, PartitionSpec(mesh.axis_names))


def evaluate(state: TrainState, split: DeviceSplit | Split, *, batch_size: int = 1000) -> Metrics:
    """Scores all images of a split, the last and partial batch included.

    Args:
      state: whose parameters to score.
      split: on the devices, such as `pipeline.test`; the batch is sharded over its mesh, if any. A
        split on the host, such as `dataset.test`, is placed beside the state and its images are
        divided by 255, which is wrong for a state that was trained on standardized images.
      batch_size: images per compiled call; rounded up to a multiple of the device count.

    Returns:
      Metrics on the host: `count` is the number of images of the split, whatever the batch size and
      the number of devices. The last batch is filled up with images that do not count only where
      model and loss declare `per_example` (see `create_train_state`).

    Raises:
      UserError: if `split` is no split, `batch_size` is less than 1, or labels, logits or losses
        have shapes that `train_step` refuses.
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
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        for start in range(0, num_examples, batch_size):
            size = batch_size if padded else min(batch_size, num_examples - start)
            first = jnp.asarray(start, jnp.int32)
            parts.append(_eval_batch(state, split, first, batch_size=size, mesh=mesh))
            limit_in_flight(parts)
    return Metrics.merge(parts)


def _place(split: Split, state: TrainState) -> DeviceSplit:
    """A split of the host beside the state, to be scaled to 0..1."""
    where = next((leaf.sharding for leaf in jax.tree.leaves(state.params)), None)
    where = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    return DeviceSplit.from_split(split, where)
