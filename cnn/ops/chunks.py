"""Convolutions of large batches on a CPU, a few images at a time.

The matrix products of `im2col` and `winograd` work on rearranged copies of the images, several
times as large as these. Of a whole batch they would go through the memory; those of a few images
stay in the caches. The result is the same to rounding, and so are the gradients: that of the kernel
is summed over the chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cnn.ops.microbatch import MicrobatchPlan

# Of so many values for each device, the copies of a batch are worth computing in chunks: what comes
# before and after is then no longer fused with them (benchmarks/NOTES.md).
_MANY_VALUES = 1_200_000
# The copies of so many values stay in the cache of a core. Each chunk transforms the kernel and
# adds to its gradient, which is to be little beside its products.
_LEAST_VALUES = 200_000
_VALUES_PER_WEIGHT = 7


def in_chunks(
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    kernel: jax.Array,
    values: int | None = None,
) -> jax.Array:
    """`convolve(images, kernel)`, one chunk of each device's images after the other.

    Args:
      convolve: each image independently.
      images: `float[B, H, W, C]`.
      kernel: `float[kh, kw, C, K]`.
      values: that the images of a chunk should have; by default as many as suit the kernel.
    """
    if values is None:
        values = _suiting_values(images, kernel)
    plan = MicrobatchPlan.for_batch(images, values=values)
    if plan.num_microbatches == 1:
        return convolve(images, kernel)
    parts = images.reshape(plan.num_shards, plan.num_microbatches, -1, *images.shape[1:])
    # Each device sums the gradient of a kernel of its own, so that they meet once, after the loop.
    kernels = jnp.broadcast_to(kernel, (plan.num_shards, *kernel.shape))
    results = jax.lax.map(lambda part: jax.vmap(convolve)(part, kernels), parts.swapaxes(0, 1))
    return results.swapaxes(0, 1).reshape(images.shape[0], *results.shape[3:])


def _suiting_values(images: jax.Array, kernel: jax.Array) -> int:
    """The values of a chunk that suit the kernel; all that there are where these are not many."""
    if MicrobatchPlan.for_batch(images, values=_MANY_VALUES).num_microbatches == 1:
        return images.size
    return max(_LEAST_VALUES, _VALUES_PER_WEIGHT * kernel.size)
