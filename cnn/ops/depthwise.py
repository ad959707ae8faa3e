"""Depthwise convolution as a sum of shifted images, each times one weight of every channel.

XLA computes a convolution with a group for each channel one number after the other on a CPU; sums
and products of whole images are vectorized over the channels.
"""

from __future__ import annotations

import functools
import math
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
        view = _views(x, (kh, kw), strides)
        terms = [view(i, j) * w[None, None, i, j, None] for i in range(kh) for j in range(kw)]
        return functools.reduce(jnp.add, terms)

    def gradient_x(g: jax.Array, w: jax.Array, _: Any) -> jax.Array:
        kh, kw = w.shape[:2]
        edges = ((kh - 1, kh - 1, strides[0] - 1), (kw - 1, kw - 1, strides[1] - 1))
        apart = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
        return _product_with((1, 1))(apart, w[::-1, ::-1], None)

    def gradient_w(g: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        batch, *size, channels = g.shape
        sides = [(n - 1) * stride + 1 for n, stride in zip(size, strides, strict=True)]
        kh, kw = (n - side + 1 for n, side in zip(x.shape[1:3], sides, strict=True))
        # Some images of one device are added, then their pixels, by a product; what is left are
        # sums of several devices, which meet once, after the loop.
        images = batch // MicrobatchPlan.for_batch(g).num_shards
        added = next(n for n in range(_ADDED_IMAGES, 0, -1) if images % n == 0)
        x, g = (one.reshape(-1, added, *one.shape[1:]) for one in (x, g))
        groups = g.shape[0]
        ones = jnp.ones((groups, 1, math.prod(size)), g.dtype)

        def weight(place: jax.Array) -> jax.Array:
            def view(n: int) -> jax.Array:
                start = 0, n, place // kw, place % kw, 0
                part = lax.dynamic_slice(
                    x, start, (groups, 1, *sides, channels), allow_negative_indices=False
                )
                return part[:, 0, :: strides[0], :: strides[1]]

            terms = functools.reduce(jnp.add, [view(n) * g[:, n] for n in range(added)])
            terms = lax.optimization_barrier(terms.reshape(groups, -1, channels))
            return lax.dot_general(ones, terms, (((2,), (1,)), ((0,), (0,))))

        # A loop: a program of all weights takes longer, to run and to compile.
        sums = lax.map(weight, jnp.arange(kh * kw))
        return sums.sum((1, 2)).reshape(kh, kw, channels)

    return bilinear(product, gradient_x, gradient_w)


def _views(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> Any:
    """A function of (i, j): pixel (i, j) of each window of `[B, H, W, C]`."""
    (kh, kw), (high, wide) = window, strides
    last = x.shape[1] - kh, x.shape[2] - kw
    return lambda i, j: x[:, i : i + last[0] + 1 : high, j : j + last[1] + 1 : wide]
