"""From resident uint8 images to the batches a step sees, on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cnn.data.dataset import Dataset, Split
from cnn.errors import UserError
from cnn.ops import explicit_mesh

NORMALIZATIONS = ("scale", "standardize")


class DeviceSplit(struct.PyTreeNode):
    """A split that lives on the devices, with the constants that normalize it.

    Attributes:
      images: `uint8[N, H, W, C]`.
      labels: `int32[N]`.
      mean: `float32[C]`, subtracted from pixel / 255.
      std: `float32[C]`, divides the difference.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array

    @classmethod
    def place(
        cls, split: Split, dataset: Dataset, normalization: str, where: jax.sharding.Sharding | Any
    ) -> DeviceSplit:
        """Copies a split to the devices once.

        Args:
          split: `dataset.train` or `dataset.test`.
          dataset: whose train split gives mean and std.
          normalization: "standardize" (zero mean and unit variance per channel), or "scale"
            (pixel / 255, as in the seed).
          where: a sharding, or one device; None is JAX's default device.

        Raises:
          UserError: for an unknown normalization.
        """
        if normalization not in NORMALIZATIONS:
            raise UserError(
                f"unknown normalization {normalization!r}; known: {', '.join(NORMALIZATIONS)}"
            )
        mean, std = np.zeros_like(dataset.mean), np.ones_like(dataset.std)
        if normalization == "standardize":
            mean = dataset.mean
            std = np.where(dataset.std > 0, dataset.std, std)  # a channel may be constant
        return cls(*jax.device_put((split.images, split.labels, mean, std), where))

    def take(
        self, index: jax.Array, change: Callable[[jax.Array], jax.Array] | None = None
    ) -> dict[str, jax.Array]:
        """These examples, normalized: `int32[...]` -> `image` `[..., H, W, C]`, `label` `[...]`.

        Args:
          index: which ones.
          change: applied to the images, uint8[..., H, W, C], before: an augmentation.
        """

        def take(split: DeviceSplit, index: jax.Array) -> dict[str, jax.Array]:
            images = split.images[index]
            if change is not None:
                images = change(images)
            return {"image": normalize(images, split.mean, split.std), "label": split.labels[index]}

        def sharding(mesh: jax.sharding.AbstractMesh) -> Any:
            return explicit_mesh.rows_like(index, mesh, axes=jnp.ndim(index))

        return explicit_mesh.with_automatic_axes(take, sharding, self, index)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(pixel / 255 - mean) / std: `uint8[..., C]`, `float32[C]` twice -> `float32[..., C]`.

    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), jnp.array([0.5]), jnp.array([0.25]))
    Array([[[[2.]]]], dtype=float32)
    """
    scaled = images.astype(jnp.float32) / 255.0
    mean, std = (jnp.expand_dims(one, range(images.ndim - 1)) for one in (mean, std))
    return (scaled - mean) / std


def epoch_permutation(key: jax.Array, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """The order of one epoch: `int32[num_examples]`, a pure function of key and epoch.

    >>> order = epoch_permutation(jax.random.key(0), epoch=3, num_examples=5)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4]
    """
    return _epoch_permutation(key, epoch, num_examples)


# Compiled whole, not operator by operator.
@functools.partial(jax.jit, static_argnames="num_examples")
def _epoch_permutation(key: jax.Array, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    # Of an array of a known type: of a number the result would be int64 in JAX's 64-bit mode.
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)
