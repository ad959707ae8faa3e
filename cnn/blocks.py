"""A batch in blocks, so that on a CPU what is computed with an image is still in the cache.

A batch is cut into lanes, one for each device, which work side by side (`vmap`), and each lane into
blocks of some images, which it works through one after the other (`scan`). The result is that of
the whole batch, to rounding, of whatever treats each image for itself. Nothing is cut on GPU and
TPU, nor where there are native convolutions: see `has_convolution`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from cnn.devices import num_shards

# Values in the images of a block: 16 images of CIFAR-10, with which the activations of the seed's
# network and their gradients stay within 2 MiB (benchmarks/NOTES.md).
_BLOCK_VALUES = 16 * 32 * 32 * 3
# Adding up the gradients of so many parameters takes little of the time of an image's value.
_PARAMS_PER_VALUE = 16


class Cut(NamedTuple):
    """How a batch is cut.

    Attributes:
      lanes: parts of the batch that are computed side by side.
      blocks: parts of a lane that are computed one after the other.
    """

    lanes: int
    blocks: int

    @classmethod
    def of(cls, image: jax.Array, lanes: int | None = None, num_params: int = 0) -> Cut:
        """By the backend and the shape of a batch of images `[B, H, W, C]`.

        Args:
          image: any array of that shape, traced or not.
          lanes: the devices over which the batch is spread. None: the most of this process's
            that divide it, as `batch_mesh` has it; 0: do not cut.
          num_params: of which gradients are summed over the blocks: that is work of its own for
            each block, so the more there are, the larger the blocks.
        """
        if lanes == 0 or jax.default_backend() != "cpu" or not image.size:
            return cls(1, 1)
        batch_size = image.shape[0]
        lanes = num_shards(lanes or jax.local_device_count(), batch_size)
        most = max(_BLOCK_VALUES, num_params // _PARAMS_PER_VALUE) * batch_size // image.size
        blocks = _blocks(batch_size // lanes, max(most, 1))
        return cls(lanes, blocks)


def _blocks(images: int, most: int) -> int:
    """Blocks of equal size and at most so many images; one, where they would be far smaller."""
    size = next(n for n in range(min(images, most), 0, -1) if images % n == 0)
    return images // size if 2 * size >= min(images, most) else 1


def has_convolution(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a function has one that is not written as matrix products, by `cnn.layers` say.

    The gradients of such a one are ten times slower in a loop than outside, as XLA's CPU compiler
    rewrites convolutions for its library in a program's entry only.

    Args:
      fn: of arrays.
      *args: pytrees of arrays or their shapes.
    """
    return "conv_general_dilated[" in str(jax.make_jaxpr(fn)(*args))


def map_blocks(fn: Callable[[Any], jax.Array], batch: Any, cut: Cut) -> jax.Array:
    """`fn(batch)`, block by block.

    Args:
      fn: from a pytree of arrays `[n, ...]` to `[n, ...]`, each image for itself.
      batch: pytree of arrays `[B, ...]`.
      cut: whose lanes and blocks divide B.
    """
    if (blocks := _in_blocks(fn, batch, cut)) is None:
        return fn(batch)
    results = jax.vmap(lambda lane: jax.lax.map(fn, lane))(blocks)
    return results.reshape(-1, *results.shape[3:])


def sum_blocks(fn: Callable[[Any], Any], batch: Any, cut: Cut) -> Any:
    """The sum of `fn` over all blocks, with one all-reduce of one array between the devices.

    (XLA's all-reduce on CPU devices waits for all of them once per array.)

    Args:
      fn: from a pytree of arrays `[n, ...]` to a pytree of sums over these images.
      batch: pytree of arrays `[B, ...]`.
      cut: whose lanes and blocks divide B.
    """
    if (blocks := _in_blocks(fn, batch, cut)) is None:
        return fn(batch)
    shapes = jax.eval_shape(fn, _first(blocks))
    zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)

    def lane(blocks: Any) -> jax.Array:
        def add(sums: Any, block: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, fn(block)), None

        if cut.blocks == 1:
            return ravel_pytree(fn(jax.tree.map(lambda x: x[0], blocks)))[0]
        return ravel_pytree(jax.lax.scan(add, zeros, blocks)[0])[0]

    return ravel_pytree(zeros)[1](jax.vmap(lane)(blocks).sum(axis=0))


def _in_blocks(fn: Callable[[Any], Any], batch: Any, cut: Cut) -> Any | None:
    """The batch with leading axes of lanes and blocks; None where `fn` takes it whole."""
    if cut == (1, 1):
        return None
    blocks = jax.tree.map(lambda x: x.reshape(*cut, -1, *x.shape[1:]), batch)
    return None if has_convolution(fn, _first(blocks)) else blocks


def _first(blocks: Any) -> Any:
    """The shapes of one block."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), blocks)
