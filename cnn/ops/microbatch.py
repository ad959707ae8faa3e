"""Microbatching for the CPU: parts small enough that their activations stay in the L2 cache.

A batch is split into shards, one for each device, which are computed in parallel (`vmap`), and each
shard into microbatches, which are computed one after the other (`scan`). The result equals that of
the whole batch up to rounding if each image is computed independently of the others; so a batch is
split only where model and loss declare that: see `is_per_example`. GPUs and TPUs compute the whole
batch at once, and so does a CPU where a model has native convolutions: see `has_convolution`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

# Values in the images of a microbatch: 16 images of CIFAR-10, with which the activations of the
# baseline network and their gradients stay within 2 MiB (benchmarks/NOTES.md).
_MICROBATCH_VALUES = 16 * 32 * 32 * 3
# A microbatch has at least one image value per 16 parameters, so that summing gradients over
# microbatches stays cheap.
_PARAMS_PER_VALUE = 16


class MicrobatchPlan(NamedTuple):
    """How a batch is split.

    Attributes:
      num_shards: parts of the batch that are computed in parallel.
      num_microbatches: parts of a shard that are computed one after the other.
    """

    num_shards: int
    num_microbatches: int

    @classmethod
    def for_batch(
        cls, image: Any, num_params: int = 0, values: int = _MICROBATCH_VALUES
    ) -> MicrobatchPlan:
        """By the backend, the devices and the shape of a batch of images.

        The devices are those of the mesh that `jax.set_mesh` has made current, else all of this
        process; of these the most that divide the batch, as `data_mesh` takes them.

        Args:
          image: `float[B, H, W, C]`, or any object with that `shape`.
          num_params: the number of parameters of which gradients are summed.
          values: that the images of a microbatch should have.
        """
        batch_size = image.shape[0]
        if jax.default_backend() != "cpu" or not isinstance(batch_size, int):
            return WHOLE  # a symbolic size, of `jax.export`, cannot be divided
        mesh = jax.sharding.get_abstract_mesh()
        # Within `shard_map` the batch is one device's part already.
        if AxisType.Manual in mesh.axis_types or not math.prod(image.shape):
            return WHOLE
        shards = num_shards(jax.local_device_count() if mesh.empty else mesh.size, batch_size)
        values = max(values, num_params // _PARAMS_PER_VALUE)
        most = max(values * batch_size // math.prod(image.shape), 1)
        return cls(shards, _num_microbatches(batch_size // shards, most))


WHOLE = MicrobatchPlan(num_shards=1, num_microbatches=1)


def num_shards(num_devices: int, batch_size: int) -> int:
    """The largest number of devices that divides a batch evenly.

    >>> num_shards(8, batch_size=36)
    6
    """
    return max(n for n in range(1, num_devices + 1) if batch_size % n == 0)


def _num_microbatches(images: int, most: int) -> int:
    """Of equal size and at most `most` images; 1 where they would be far smaller than that."""
    size = next(n for n in range(min(images, most), 0, -1) if images % n == 0)
    return images // size if 2 * size >= min(images, most) else 1


def is_per_example(fn: Any) -> bool:
    """Whether a model or a loss declares that its result for an image depends on no other image.

    The declaration is an attribute `per_example` that is True, of the object or of its very class.
    One that a subclass inherits, or that `functools.wraps` copies to a wrapper, does not count,
    since subclass and wrapper may compute something else.

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
        return False
    return own.get("per_example", vars(type(fn)).get("per_example")) is True


def has_convolution(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a function computes a convolution that is not written as matrix products.

    The gradients of such a convolution are ten times slower in a loop than outside: XLA's CPU
    compiler rewrites convolutions for its library in the entry computation of a program only.

    Args:
      fn: of arrays.
      *args: pytrees of arrays or their shapes.
    """
    return _convolves(jax.make_jaxpr(fn)(*args))


def _convolves(jaxpr: Any) -> bool:  # closed or not
    return any(
        eqn.primitive is jax.lax.conv_general_dilated_p
        or any(map(_convolves, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def map_microbatches(fn: Callable[[Any], jax.Array], batch: Any, plan: MicrobatchPlan) -> jax.Array:
    """`fn(batch)`, one microbatch after the other.

    Args:
      fn: from a pytree of arrays `[n, ...]` to `[n, ...]`, each image independently.
      batch: pytree of arrays `[B, ...]`.
      plan: whose numbers divide B.
    """
    if (parts := _split(batch, plan)) is None:
        return fn(batch)
    results = jax.lax.map(jax.vmap(lambda part: fn(_images_first(part))), parts)
    return results.swapaxes(0, 1).reshape(-1, *results.shape[3:])


def accumulate_microbatches(fn: Callable[[Any], Any], batch: Any, plan: MicrobatchPlan) -> Any:
    """The sum of `fn` over all microbatches, with one all-reduce of one array between the devices.

    XLA's all-reduce on CPU devices waits for all of them once per array.

    Args:
      fn: from a pytree of arrays `[n, ...]` to a pytree of sums over these images.
      batch: pytree of arrays `[B, ...]`.
      plan: whose numbers divide B.
    """
    if (parts := _split(batch, plan)) is None:
        return fn(batch)
    in_shards = jax.vmap(lambda part: fn(_images_first(part)))

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda total, one: total + one, sums, in_shards(part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    if plan.num_microbatches == 1:
        sums = in_shards(first)
    else:
        shapes = jax.eval_shape(in_shards, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _sum_dtype(x.dtype)), shapes)
        sums, _ = jax.lax.scan(add, zeros, parts)
        sums = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, shapes)
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), sums))[1]
    return unravel(jax.vmap(lambda shard: ravel_pytree(shard)[0])(sums).sum(axis=0))


def _sum_dtype(dtype: Any) -> Any:
    """float32 for shorter floats, whose digits would be lost in a sum over many microbatches."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if is_float else dtype


def _split(batch: Any, plan: MicrobatchPlan) -> Any | None:
    """The batch as `[num_microbatches, num_shards, ..., n]`; None where it is not split.

    The batch axis is moved last, once for all microbatches, as the first convolution wants it (see
    `cnn.ops.im2col`).
    """
    if plan == WHOLE:
        return None

    images = jax.tree.leaves(batch)[0].shape[0] // (plan.num_shards * plan.num_microbatches)

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(*plan, images, -1).transpose(1, 0, 3, 2)
        return parts.reshape(plan.num_microbatches, plan.num_shards, *x.shape[1:], images)

    return jax.tree.map(split, batch)


def _images_first(part: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), part)
