"""Exact evaluation and prediction: every image of a split counts once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn.data.dataset import Split
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError
from cnn.metrics import Metrics
from cnn.ops import explicit_mesh
from cnn.registry import select
from cnn.runtime.devices import limit_in_flight
from cnn.steps import TrainState, check_batch, is_per_example_state, predict_step, score

View = Callable[[jax.Array], jax.Array]


def _same(image: jax.Array) -> jax.Array:
    return image


def _mirrored(image: jax.Array) -> jax.Array:
    return image[..., ::-1, :]


def _shifted(image: jax.Array, by: int) -> jax.Array:
    """Moved by some pixels down and to the right, or up and to the left; the border is mirrored."""
    height, width = image.shape[-3:-1]
    margin = abs(by)
    padding = [(0, 0)] * (image.ndim - 3) + [(margin, margin), (margin, margin), (0, 0)]
    first = margin - by
    padded = jnp.pad(image, padding, mode="reflect")
    return padded[..., first : first + height, first : first + width, :]


def _chain(*views: View) -> View:
    return lambda image: functools.reduce(lambda image, view: view(image), views, image)


_UP, _DOWN = functools.partial(_shifted, by=-1), functools.partial(_shifted, by=1)
# Test-time augmentation: views of an image, and the weights of their logits in the mean.
TEST_TIME_VIEWS: dict[str, tuple[tuple[View, float], ...]] = {
    "none": ((_same, 1.0),),
    "flip": ((_same, 0.5), (_mirrored, 0.5)),
    # Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.5 ("multi-crop").
    "flip_translate": (
        (_same, 0.25),
        (_mirrored, 0.25),
        (_UP, 0.125),
        (_chain(_UP, _mirrored), 0.125),
        (_DOWN, 0.125),
        (_chain(_DOWN, _mirrored), 0.125),
    ),
}


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh", "tta"))
def _eval_batch(
    state: TrainState,
    split: DeviceSplit,
    start: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh | None,
    tta: str,
) -> Metrics:
    """Scores `batch_size` images from `start` on; those beyond the last image do not count."""

    @explicit_mesh.automatic_axes(lambda mesh, *_: explicit_mesh.replicated_over(mesh))
    def run(state: TrainState, split: DeviceSplit, start: jax.Array) -> Metrics:
        return _score_batch(state, split, start, batch_size, mesh, tta)

    return run(state, split, start)


def _score_batch(
    state: TrainState,
    split: DeviceSplit,
    start: jax.Array,
    batch_size: int,
    mesh: Mesh | None = None,
    tta: str = "none",
) -> Metrics:
    batch, mask = _batch(split, start, batch_size, mesh)
    check_batch(batch, is_trained=False)
    return score(state, _logits(state, batch["image"], tta), {**batch, "mask": mask})


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _eval_batch_of_each(
    states: TrainState, split: DeviceSplit, start: jax.Array, *, batch_size: int, mesh: Mesh
) -> Metrics:
    """`_eval_batch` for each of a stack of states, which is split over the mesh."""

    def on_device(states: TrainState, split: DeviceSplit, start: jax.Array) -> Metrics:
        return jax.vmap(lambda state: _score_batch(state, split, start, batch_size))(states)

    stack, same = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(stack, same, same), out_specs=stack, check_vma=False
    )(states, split, start)


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh", "tta"))
def _predict_batch(
    state: TrainState,
    split: DeviceSplit,
    start: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh | None,
    tta: str,
) -> jax.Array:
    """The logits of `batch_size` images from `start` on; the last image is repeated at the end."""

    @explicit_mesh.automatic_axes(lambda mesh, *_: explicit_mesh.replicated_over(mesh))
    def predict(state: TrainState, split: DeviceSplit, start: jax.Array) -> jax.Array:
        return _logits(state, _batch(split, start, batch_size, mesh)[0]["image"], tta)

    return predict(state, split, start)


def _logits(state: TrainState, image: jax.Array, tta: str) -> jax.Array:
    """The weighted mean of the logits of several views of normalized images."""
    views = TEST_TIME_VIEWS[tta]
    return sum(weight * predict_step(state, view(image)) for view, weight in views)  # type: ignore


def _batch(
    split: DeviceSplit, start: jax.Array, batch_size: int, mesh: Mesh | None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The images from `start` on, normalized, and which of them are not beyond the last."""
    num_examples = split.labels.shape[0]
    index = start + jnp.arange(batch_size, dtype=jnp.int32)
    if mesh is not None and batch_size % mesh.size == 0:
        index = jax.lax.with_sharding_constraint(index, _over_all_axes(mesh))
    return split.get_batch(jnp.minimum(index, num_examples - 1)), index < num_examples


def _over_all_axes(mesh: Mesh) -> NamedSharding:
    """The leading axis sharded over all devices of a mesh, whatever the types of its axes."""
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, PartitionSpec(mesh.axis_names))


def evaluate(
    state: TrainState,
    split: DeviceSplit | Split,
    *,
    batch_size: int = 1000,
    tta: str = "none",
) -> Metrics:
    """Scores all images of a split, the last and partial batch included.

    Args:
      state: whose parameters to score.
      split: on the devices, such as `pipeline.test`; the batch is sharded over its mesh, if any. A
        split on the host, such as `dataset.test`, is placed beside the state and its images are
        divided by 255, which is wrong for a state that was trained on standardized images.
      batch_size: images per compiled call; rounded up to a multiple of the device count.
      tta: test-time augmentation, a key of `TEST_TIME_VIEWS`: what is scored is the weighted mean
        of the logits of several views of each image.

    Returns:
      Metrics on the host: `count` is the number of images of the split, whatever the batch size and
      the number of devices. The last batch is filled up with images that do not count only where
      model and loss declare `per_example` (see `create_train_state`).

    Raises:
      UserError: if `split` is no split, `batch_size` is less than 1, `tta` is unknown, or labels,
        logits or losses have shapes that `train_step` refuses.
    """
    select("test-time augmentation", TEST_TIME_VIEWS, tta)
    if isinstance(split, Split):
        split = _place(split, state)
    if not isinstance(split, DeviceSplit):
        raise UserError(
            f"evaluate takes a Split or a DeviceSplit, such as dataset.test, not "
            f"{type(split).__name__}"
        )
    mesh, parts = _mesh(split), []
    with _within(mesh):
        for start, size in _calls(state, split, batch_size):
            parts.append(_eval_batch(state, split, start, batch_size=size, mesh=mesh, tta=tta))
            limit_in_flight(parts)
    return Metrics.merge(parts)


def evaluate_each(
    states: TrainState, split: DeviceSplit, mesh: Mesh, *, batch_size: int = 1000
) -> list[Metrics]:
    """`evaluate` for each of a stack of states.

    Args:
      states: with a leading axis, split over the mesh.
      split: on every device of the mesh.
      mesh: whose size divides the stack.
      batch_size: images of each call.

    Returns:
      Metrics on the host, for each state.
    """
    parts = []
    for start, size in _calls(states, split, batch_size):
        parts.append(_eval_batch_of_each(states, split, start, batch_size=size, mesh=mesh))
        limit_in_flight(parts)
    each = zip(*map(Metrics.unstack, parts), strict=True)
    return [Metrics.merge(parts) for parts in each]


def predict(
    state: TrainState, split: DeviceSplit, *, batch_size: int = 1000, tta: str = "none"
) -> np.ndarray:
    """The logits of all images of a split, `float32[N, K]`, on the host and in order.

    Args:
      state: of the model.
      split: on the devices; its labels do not matter.
      batch_size: as for `evaluate`.
      tta: as for `evaluate`.

    Raises:
      UserError: an unknown `tta`, or a `batch_size` below 1.
    """
    select("test-time augmentation", TEST_TIME_VIEWS, tta)
    mesh, parts = _mesh(split), []
    with _within(mesh):
        for start, size in _calls(state, split, batch_size):
            parts.append(_predict_batch(state, split, start, batch_size=size, mesh=mesh, tta=tta))
            limit_in_flight(parts)
    return np.concatenate(jax.device_get(parts))[: split.labels.shape[0]]


def _mesh(split: DeviceSplit) -> Mesh | None:
    sharding = split.labels.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None  # type: ignore


def _within(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


def _calls(
    state: TrainState, split: DeviceSplit, batch_size: int
) -> Iterator[tuple[jax.Array, int]]:
    """First image and size of each compiled call."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be 1 or more")
    num_examples, mesh = split.labels.shape[0], _mesh(split)
    batch_size = min(batch_size, num_examples)
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size
    padded = is_per_example_state(state)
    for start in range(0, num_examples, batch_size):
        size = batch_size if padded else min(batch_size, num_examples - start)
        yield jnp.asarray(start, jnp.int32), size


def _place(split: Split, state: TrainState) -> DeviceSplit:
    """A split of the host beside the state, to be scaled to 0..1."""
    where = next((leaf.sharding for leaf in jax.tree.leaves(state.params)), None)
    where = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    return DeviceSplit.from_split(split, where)
