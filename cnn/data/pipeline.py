"""From images in memory to the batches that a step sees: order, gather, augment, normalize.

The order of epoch e is a pure function of (key, e), and the random numbers of step t are one of
(key, t), so training continues at any step with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8

from cnn.arrays import AnyArray
from cnn.augment import Augment, Mix, apply_augment
from cnn.augment.resizing import WHOLE_IMAGES, ProgressiveResizing, Stage, resize_images
from cnn.data.dataset import Dataset, Split
from cnn.errors import UserError, array_type
from cnn.ops import explicit_mesh
from cnn.ops.linen_apply import hashable
from cnn.ops.threefry import fold_in
from cnn.runtime.devices import (
    batch_sharding,
    data_mesh,
    is_on_cpu,
    replicated_sharding,
    select_devices,
)
from cnn.runtime.jit_once import jit_once

NORMALIZATIONS = ("scale", "standardize")
# Limits of one call on a CPU: 50 steps, half a second on two cores, and 50 MB of images.
_MAX_STEPS_PER_EXECUTION, _VALUES_PER_EXECUTION = 50, 4096 * 32 * 32 * 3
# On a GPU or TPU, where the host is to stay out of the way: an epoch, or 1 GiB of images.
_VALUES_ON_ACCELERATOR = 2**28
# Streams of random keys, folded into the run's seed.
_SHUFFLE, _AUGMENT, _MIX = 1, 2, 3
# Folded into the key of the augmentation as each step is; no step has this number.
_WHOLE_RUN = 2**32 - 1


class DeviceSplit(struct.PyTreeNode):
    """A split on the devices, with the constants that normalize it.

    Attributes:
      images: `uint8[N, H, W, C]`.
      labels: `int32[N]`.
      mean: `float32[C]`, subtracted from pixel / 255.
      std: `float32[C]`, by which the difference is divided.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array

    @classmethod
    def from_split(
        cls,
        split: Split,
        where: jax.sharding.Sharding | Any = None,
        *,
        mean: np.ndarray | float = 0.0,
        std: np.ndarray | float = 1.0,
    ) -> DeviceSplit:
        """Copies a split to the devices.

        Args:
          split: such as `dataset.train`.
          where: a sharding, or one device; None is JAX's default device.
          mean: `float32[C]`, or one number for all channels.
          std: like `mean`. A channel whose std is 0 is not divided.
        """
        channels = split.images.shape[-1]
        mean, std = (np.broadcast_to(np.float32(x), channels) for x in (mean, std))
        std = np.where(std > 0, std, np.float32(1))
        return cls(*jax.device_put((split.images, split.labels, mean, std), where))

    def get_batch(
        self, index: AnyArray, transform: Callable[[jax.Array], jax.Array] | None = None
    ) -> dict[str, jax.Array]:
        """Gathers and normalizes images: `int32[...]` -> `image` `[..., H, W, C]`, `label` `[...]`.

        Args:
          index: places in the split.
          transform: applied to the images, uint8[..., H, W, C], before they are normalized.
        """

        def shardings(mesh: jax.sharding.AbstractMesh, *_: Any) -> Any:
            return explicit_mesh.rows_like(index, mesh, axes=jnp.ndim(index))

        @explicit_mesh.automatic_axes(shardings)
        def get(split: DeviceSplit, index: AnyArray) -> dict[str, jax.Array]:
            images = split.images[index]
            if transform is not None:
                images = transform(images)
            return {"image": normalize(images, split.mean, split.std), "label": split.labels[index]}

        return get(self, index)


def normalize(
    images: UInt8[AnyArray, "*leading C"], mean: Float[AnyArray, " C"], std: Float[AnyArray, " C"]
) -> Float[Array, "*leading C"]:
    """(pixel / 255 - mean) / std.

    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), jnp.array([0.5]), jnp.array([0.25]))
    Array([[[[2.]]]], dtype=float32)
    """
    scaled = jnp.asarray(images).astype(jnp.float32) / 255.0
    mean, std = (jnp.expand_dims(one, range(images.ndim - 1)) for one in (mean, std))
    return (scaled - mean) / std


def epoch_permutation(
    key: PRNGKeyArray, epoch: AnyArray | int, num_examples: int
) -> Int32[Array, " N"]:
    """The order of the images in an epoch, a pure function of key and epoch.

    >>> order = epoch_permutation(jax.random.key(0), epoch=3, num_examples=5)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4]
    """
    return _epoch_permutation(key, epoch, num_examples)


# Compiled whole, not operator by operator.
@functools.partial(jax.jit, static_argnames="num_examples")
def _epoch_permutation(key: AnyArray, epoch: AnyArray | int, num_examples: int) -> jax.Array:
    # Of an array of a known type: of a number the result would be int64 in JAX's 64-bit mode.
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def stream_key(seed: int, stream: int) -> PRNGKeyArray:
    """The key of one stream of random numbers: `jax.random.key(seed)` with the stream folded in.

    It is made of its two words, so that no setting of JAX changes it (`jax_random_seed_offset` adds
    to seeds).
    """
    words: Any = np.array(fold_in((0, seed), stream), np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A dataset on all devices, and the batches of its epochs.

    On a CPU each core is a device. `compile_train_steps` makes the function that takes what
    `batches` yields.

    Args:
      dataset: whose train split has at least one batch.
      batch_size: images in a step, over all devices. The last, incomplete batch of an epoch is left
        out; which images these are changes from epoch to epoch.
      seed: of the order and of the augmentation, 0 to 2**32 - 1.
      normalization: "scale" (pixel / 255), or "standardize" (mean 0 and variance 1 per channel of
        the train split).
      augment: of the training images; see `cnn.augment`.
      resizing: of the normalized batches, in the first epochs.
      mix: of the normalized batches, mixup or CutMix.
      mesh: the devices, by default the largest number of them that divides the batch.
      steps_per_execution: how many batches are made, and trained on, in one call. 0: those of an
        epoch, or fewer where their images take more than 1 GiB; on a CPU 50, or fewer where their
        images take more than 50 MB. It changes no bit of the result.

    Raises:
      UserError: an unknown normalization, a batch that is larger than the train split, or an
        augmentation that does not fit the images.
    """

    dataset: Dataset
    batch_size: int
    seed: int = 0
    normalization: str = "scale"
    augment: Augment | None = None
    resizing: ProgressiveResizing = WHOLE_IMAGES
    mix: Mix | None = None
    mesh: Mesh = None  # type: ignore[assignment] - never None after initialization
    steps_per_execution: int = 0

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise UserError(
                f"unknown normalization {self.normalization!r}; known: {', '.join(NORMALIZATIONS)}"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        if self.steps_per_execution < 0:
            raise UserError(f"steps_per_execution={self.steps_per_execution} must be 0 or more")
        num_images = len(self.dataset.train)
        if not isinstance(self.batch_size, int) or not 1 <= self.batch_size <= num_images:
            raise UserError(
                f"batch_size={self.batch_size} must lie between 1 and {num_images:,}, the number "
                f"of training images of {self.dataset.name}"
            )
        if self.mesh is None:
            object.__setattr__(self, "mesh", data_mesh(select_devices(), self.batch_size))
        if not self.steps_per_execution:
            values = self.batch_size * math.prod(self.dataset.image_shape)
            if is_on_cpu(self.mesh):
                most = max(1, min(_MAX_STEPS_PER_EXECUTION, _VALUES_PER_EXECUTION // values))
            else:
                most = max(1, _VALUES_ON_ACCELERATOR // values)
            object.__setattr__(self, "steps_per_execution", min(most, self.steps_per_epoch))
        if self.augment is not None:
            self._check_augment(self.augment)
            object.__setattr__(self, "augment", hashable(self.augment))

    def _check_augment(self, augment: Augment) -> None:
        """Raises UserError if the augmentation changes shape or dtype of the images."""
        images = jax.ShapeDtypeStruct((self.batch_size, *self.dataset.image_shape), jnp.uint8)
        index = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        epoch = jax.ShapeDtypeStruct((), jnp.int32)
        fill = jax.ShapeDtypeStruct((self.dataset.image_shape[-1],), jnp.uint8)
        apply = functools.partial(apply_augment, augment)
        key = stream_key(self.seed, _AUGMENT)
        given = {"epoch": epoch, "index": index, "run_key": key, "fill": fill}
        result = jax.eval_shape(apply, key, images, **given)
        if (getattr(result, "shape", None), getattr(result, "dtype", None)) != (
            images.shape,
            images.dtype,
        ):
            raise UserError(
                f"an augmentation must return images of the shape and dtype that it is given, "
                f"uint8{list(images.shape)}, not {array_type(result)}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the train split."""
        return len(self.dataset.train) // self.batch_size

    @functools.cached_property
    def train(self) -> DeviceSplit:
        """The train split, on every device of the mesh."""
        return self.place(self.dataset.train)

    @functools.cached_property
    def test(self) -> DeviceSplit:
        """The test split, on every device of the mesh."""
        return self.place(self.dataset.test)

    def place(self, split: Split) -> DeviceSplit:
        """A split of the dataset, on every device of the mesh, with its normalization."""
        where = replicated_sharding(self.mesh)
        if self.normalization == "scale":
            return DeviceSplit.from_split(split, where)
        dataset = self.dataset
        return DeviceSplit.from_split(split, where, mean=dataset.mean, std=dataset.std)

    def with_seed(self, seed: int) -> Pipeline:
        """The same images, placed once, in another order and augmented otherwise."""
        other = dataclasses.replace(self, seed=seed)
        other.share_images(self)
        return other

    def share_images(self, other: Pipeline) -> None:
        """Takes the placed images of another pipeline where they are the same, on the same mesh."""
        same = self.dataset is other.dataset and self.normalization == other.normalization
        if same and self.mesh == other.mesh:
            self.__dict__.update(train=other.train, test=other.test)

    def batches(
        self, start: int, stop: int | None = None
    ) -> Iterator[tuple[dict[str, jax.Array], int]]:
        """The batches of steps `start` to `stop` of the run, several at a time.

        Args:
          start: the number of steps made before.
          stop: the number of steps made after; None is the end of the epoch that `start` is in.

        Yields:
          `image` float32[S, B, H, W, C] and `label` int32[S, B], sharded over axis 1, where S is
          `steps_per_execution`; and how many of the S batches count. With `mix` also `other_label`
          int32[S, B] and `label_weight` float32[S, B]: see `cnn.train_step`. With `resizing` H and
          W are smaller at first.
        """
        per_epoch = self.steps_per_epoch
        stop = (start // per_epoch + 1) * per_epoch if stop is None else stop
        while start < stop:
            epoch = start // per_epoch
            end = min(stop, (epoch + 1) * per_epoch)
            order = jax.device_put(self.order(epoch), replicated_sharding(self.mesh))
            while start < end:
                stage = self.stage(start)
                num_steps = min(self.steps_per_execution, end - start, stage.stop - start)
                yield self._make_batches(order, start, stage.scale), num_steps
                start += num_steps

    def epoch(self, epoch: int) -> Iterator[tuple[dict[str, jax.Array], int]]:
        """The batches of an epoch, counted from 0: see `batches`."""
        return self.batches(epoch * self.steps_per_epoch)

    def stage(self, step: int) -> Stage:
        """The part of the run with images of one size that the step after `step` steps is in."""
        return self.resizing.stage(step, self.steps_per_epoch)

    def order(self, epoch: int) -> jax.Array:
        """The places of the training images in an epoch's order, `int32[N]`."""
        permutation = jit_once(epoch_permutation, ("num_examples",), on_cpu=is_on_cpu(self.mesh))
        return permutation(self._shuffle_key, epoch, num_examples=len(self.dataset.train))

    @functools.cached_property
    def _shuffle_key(self) -> jax.Array:
        return stream_key(self.seed, _SHUFFLE)

    @functools.cached_property
    def augment_key(self) -> jax.Array:
        """Of the augmentation; each step is folded into it."""
        return stream_key(self.seed, _AUGMENT)

    @functools.cached_property
    def mix_key(self) -> jax.Array:
        """Of the mixing; each step is folded into it."""
        return stream_key(self.seed, _MIX)

    def _make_batches(self, order: AnyArray, step: int, scale: float) -> dict[str, jax.Array]:
        sharding = batch_sharding(self.mesh, axis=1)
        batches = _gather(
            self.train,
            order,
            self.augment_key,
            step,
            num_steps=self.steps_per_execution,
            batch_size=self.batch_size,
            augment=self.augment,
            sharding=sharding,
        )
        if scale != 1:
            batches["image"] = _resize(batches["image"], scale)
        if self.mix is None:
            return batches
        return _mix(batches, self.mix_key, step, mix=self.mix, sharding=sharding)


def make_batches(
    train: DeviceSplit,
    order: AnyArray,
    key: AnyArray,
    step: AnyArray | int,
    *,
    num_steps: int,
    batch_size: int,
    augment: Augment | None,
    sharding: NamedSharding | None = None,
) -> dict[str, jax.Array]:
    """Gathers, augments and normalizes the batches of some steps.

    Args:
      train: the split.
      order: of the epoch, `int32[N]`.
      key: of the augmentation, into which each step is folded.
      step: the number of steps made before.
      num_steps: how many batches; those beyond the end of the epoch repeat its last image.
      batch_size: images in each.
      augment: of the images, if any.
      sharding: of `[num_steps, batch_size]`, if there is to be one.
    """
    steps_per_epoch = order.shape[0] // batch_size
    start = (step % steps_per_epoch) * batch_size
    index = order[jnp.minimum(start + jnp.arange(num_steps * batch_size), order.shape[0] - 1)]
    index = index.reshape(num_steps, batch_size)
    if sharding is not None:
        index = jax.lax.with_sharding_constraint(index, sharding)
    if augment is None:
        return train.get_batch(index)

    def transform(images: AnyArray) -> jax.Array:
        keys = _step_keys(key, step, num_steps)
        apply = functools.partial(
            apply_augment,
            augment,
            epoch=step // steps_per_epoch,
            run_key=jax.random.fold_in(key, jnp.uint32(_WHOLE_RUN)),
            fill=jnp.round(train.mean * 255).astype(jnp.uint8),
        )
        return jax.vmap(lambda key, images, index: apply(key, images, index=index))(
            keys, images, index
        )

    return train.get_batch(index, transform)


# Compiled by itself: on a CPU, XLA would otherwise repeat it for each of the overlapping patches of
# the first convolution.
_gather = jax.jit(make_batches, static_argnames=("num_steps", "batch_size", "augment", "sharding"))


def mix_batches(
    batches: dict[str, jax.Array],
    key: AnyArray,
    step: AnyArray | int,
    *,
    mix: Mix,
    sharding: NamedSharding | None = None,
) -> dict[str, jax.Array]:
    """Mixes the images of each batch.

    Args:
      batches: of `make_batches`.
      key: of the mixing, into which each step is folded.
      step: the number of steps made before.
      mix: how.
      sharding: of `[num_steps, batch_size]`, if there is to be one.
    """
    keys = _step_keys(key, step, len(batches["label"]))
    mixed: Any = jax.vmap(mix)(keys, batches)
    return mixed if sharding is None else jax.lax.with_sharding_constraint(mixed, sharding)


# Compiled by themselves: on a CPU, XLA would otherwise make each image twice.
_resize = jax.jit(resize_images, static_argnames="scale")
_mix = jax.jit(mix_batches, static_argnames=("mix", "sharding"))


def _step_keys(key: AnyArray, step: AnyArray | int, num_steps: int) -> PRNGKeyArray:
    """A key for each of some steps."""
    return jax.vmap(lambda i: jax.random.fold_in(key, step + i))(jnp.arange(num_steps))
