"""A batch in blocks, so that on a CPU what is computed with an image is still in the cache.

A batch is cut into lanes, one for each device, which work side by side (`vmap`), and each lane into
blocks of some images, which it works through one after the other (`scan`). The result is that of
the whole batch, to rounding, for whatever treats each image for itself; so a batch is cut only
where model and loss declare that they do: see `is_per_example`. Nothing is cut on GPU and TPU, nor
where there are native convolutions: see `has_convolution`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

from cnn.runtime.devices import num_shards

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
            that divide it, as `data_mesh` has it; 0: do not cut.
          num_params: of which gradients are summed over the blocks: that is work of its own for
            each block, so the more there are, the larger the blocks.
        """
        batch_size = image.shape[0]
        if lanes == 0 or jax.default_backend() != "cpu" or not isinstance(batch_size, int):
            return cls(1, 1)  # a symbolic size, of `jax.export`, cannot be divided
        # Within `shard_map` the batch is one device's part already.
        in_shard_map = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
        if in_shard_map or not math.prod(image.shape):
            return cls(1, 1)
        lanes = num_shards(lanes or jax.local_device_count(), batch_size)
        most = (
            max(_BLOCK_VALUES, num_params // _PARAMS_PER_VALUE)
            * batch_size
            // math.prod(image.shape)
        )
        blocks = _blocks(batch_size // lanes, max(most, 1))
        return cls(lanes, blocks)


def is_per_example(fn: Any) -> bool:
    """Whether a model or a loss declares that its result for an image depends on no other image.

    It does so by an attribute `per_example` that is True, of its own or of its very class. What a
    subclass inherits, or `functools.wraps` copies to a wrapper, does not count, since it may
    compute something else.

    Args:
      fn: a linen module, or a loss of (logits, labels).

    >>> def loss(logits, labels): ...
    >>> is_per_example(loss)
    False
    >>> loss.per_example = True
    >>> is_per_example(loss)
    True
    """
    own = getattr(fn, "__dict__", {})
    if isinstance(fn, types.FunctionType) and "__wrapped__" in own:
        return False  # `functools.wraps` copies attributes to what may compute something else
    return own.get("per_example", vars(type(fn)).get("per_example")) is True


def _blocks(images: int, most: int) -> int:
    """Blocks of equal size and at most so many images; one, where they would be far smaller."""
    size = next(n for n in range(min(images, most), 0, -1) if images % n == 0)
    return images // size if 2 * size >= min(images, most) else 1


def has_convolution(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a function has one that is not written as matrix products, by `cnn.ops.convolution` say.

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
    if (blocks := _in_blocks(batch, cut)) is None:
        return fn(batch)
    results = jax.lax.map(jax.vmap(lambda block: fn(_images_first(block))), blocks)
    return results.swapaxes(0, 1).reshape(-1, *results.shape[3:])


def sum_blocks(fn: Callable[[Any], Any], batch: Any, cut: Cut) -> Any:
    """The sum of `fn` over all blocks, with one all-reduce of one array between the devices.

    (XLA's all-reduce on CPU devices waits for all of them once per array.)

    Args:
      fn: from a pytree of arrays `[n, ...]` to a pytree of sums over these images.
      batch: pytree of arrays `[B, ...]`.
      cut: whose lanes and blocks divide B.
    """
    if (blocks := _in_blocks(batch, cut)) is None:
        return fn(batch)
    in_lanes = jax.vmap(lambda block: fn(_images_first(block)))

    def add(sums: Any, block: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda total, one: total + one, sums, in_lanes(block)), None

    first = jax.tree.map(lambda x: x[0], blocks)
    if cut.blocks == 1:
        sums = in_lanes(first)
    else:
        shapes = jax.eval_shape(in_lanes, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _sum_dtype(x.dtype)), shapes)
        sums, _ = jax.lax.scan(add, zeros, blocks)
        sums = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, shapes)
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), sums))[1]
    return unravel(jax.vmap(lambda lane: ravel_pytree(lane)[0])(sums).sum(axis=0))


def _sum_dtype(dtype: Any) -> Any:
    """float32 for shorter floats, whose digits would be lost in a sum over many blocks."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if is_float else dtype


def _in_blocks(batch: Any, cut: Cut) -> Any | None:
    """The batch as `[blocks, lanes, ..., n]`; None where it is not cut.

    The images of a block lie side by side in memory, as the first convolution wants them (see
    `cnn.ops.im2col`): they are moved once for all blocks.
    """
    if cut == (1, 1):
        return None

    images = jax.tree.leaves(batch)[0].shape[0] // (cut.lanes * cut.blocks)

    def in_blocks(x: jax.Array) -> jax.Array:
        cut_up = x.reshape(*cut, images, -1).transpose(1, 0, 3, 2)
        return cut_up.reshape(cut.blocks, cut.lanes, *x.shape[1:], images)

    return jax.tree.map(in_blocks, batch)


def _images_first(block: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), block)
