"""Depthwise convolution as a sum of shifted images, each times one weight of every channel.

XLA computes a convolution with a group for each channel one number after the other on a CPU; sums
and products of whole images are vectorized over the channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.layout import pad
from cnn.ops.linear_map import bilinear
from cnn.ops.microbatch import MicrobatchPlan

# Images whose products with a gradient are added before their pixels are (benchmarks/NOTES.md).
_ADDED_IMAGES = 8


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Convolves each channel with a kernel of its own.

    Args:
      images: `float[B, H, W, C]`.
      kernel: `float[kh, kw, 1, C]`.
      strides: (vertical, horizontal).
      padding: (low, high) for height and width.

    Returns:
      `float[B, H', W', C]`.
    """
    kh, kw = kernel.shape[:2]
    x = pad(images, padding, axis=1)
    used = [
        (n - k) // stride * stride + k
        for n, k, stride in zip(x.shape[1:3], (kh, kw), strides, strict=True)
    ]
    return _product_with(strides)(x[:, : used[0], : used[1]], kernel[:, :, 0], None)


@functools.cache
def _product_with(strides: tuple[int, int]) -> Any:
    """`[B, H, W, C]` times `[kh, kw, C]`, without padding and without pixels left over."""

    def product(x: jax.Array, w: jax.Array, _: Any) -> jax.Array:
        kh, kw = w.shape[:2]
        high, wide = x.shape[1] - kh + 1, x.shape[2] - kw + 1

        def term(i: int, j: int) -> jax.Array:
            view = x[:, i : i + high : strides[0], j : j + wide : strides[1]]
            return view * w[None, None, i, j, None]

        return functools.reduce(jnp.add, [term(i, j) for i in range(kh) for j in range(kw)])

    def gradient_x(g: jax.Array, w: jax.Array, _: Any) -> jax.Array:
        kh, kw = w.shape[:2]
        edges = ((kh - 1, kh - 1, strides[0] - 1), (kw - 1, kw - 1, strides[1] - 1))
        apart = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
        return _product_with((1, 1))(apart, w[::-1, ::-1], None)

    def gradient_w(g: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        batch, *size, channels = g.shape
        sides = [(n - 1) * stride + 1 for n, stride in zip(size, strides, strict=True)]
        kh, kw = (n - side + 1 for n, side in zip(x.shape[1:3], sides, strict=True))
        # A few images of each device after the other, which stay in its cache for all weights; the
        # products with a gradient are added, then their pixels, by a product with ones. The sums
        # of several devices meet once, after the loop.
        shards = MicrobatchPlan.for_batch(g).num_shards
        added = next(n for n in range(_ADDED_IMAGES, 0, -1) if batch // shards % n == 0)
        x, g = (one.reshape(shards, -1, added, *one.shape[1:]) for one in (x, g))
        groups = g.shape[1]
        ones = jnp.ones((shards, 1, math.prod(size)), g.dtype)

        def weight(place: jax.Array) -> jax.Array:
            group, i, j = place // (kh * kw), place // kw % kh, place % kw

            def part(of: jax.Array, n: int, i: Any, j: Any, sides: Sequence[int]) -> jax.Array:
                one = lax.dynamic_slice(
                    of,
                    (0, group, n, i, j, 0),
                    (shards, 1, 1, *sides, channels),
                    allow_negative_indices=False,
                )
                return one[:, 0, 0]

            def term(n: int) -> jax.Array:
                view = part(x, n, i, j, sides)[:, :: strides[0], :: strides[1]]
                return view * part(g, n, 0, 0, size)

            terms = functools.reduce(jnp.add, map(term, range(added)))
            terms = lax.optimization_barrier(terms.reshape(shards, -1, channels))
            return lax.dot_general(ones, terms, (((2,), (1,)), ((0,), (0,))))

        sums = lax.map(weight, jnp.arange(groups * kh * kw))
        return sums.reshape(groups, kh, kw, shards, channels).sum((0, 3))

    return bilinear(product, gradient_x, gradient_w)
