"""Depthwise convolution as a sum of shifted images, each times one weight of every channel.

XLA computes a convolution with a group for each channel one number after the other on a CPU; sums
and products of whole images are vectorized over the channels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.layout import pad
from cnn.ops.linear_map import bilinear

# The gradients of so many weights are one program; of more, a loop, which is slower but compiles in
# a quarter of the time for 7x7 weights.
_FEW_WEIGHTS = 9
# Images whose gradients are added before their pixels are, in that program and in the loop.
_ADDED_IMAGES = 8, 16


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
        batch, channels = g.shape[0], g.shape[-1]
        kh, kw = (
            n - (m - 1) * s for n, m, s in zip(x.shape[1:3], g.shape[1:3], strides, strict=True)
        )
        is_loop = kh * kw > _FEW_WEIGHTS
        added = next(n for n in range(_ADDED_IMAGES[is_loop], 0, -1) if batch % n == 0)
        x, g = (one.reshape(-1, added, *one.shape[1:]) for one in (x, g))
        height = (g.shape[2] - 1) * strides[0] + 1
        ones = jnp.ones((1, g[:, 0, ..., 0].size), g.dtype)

        def row(i: jax.Array) -> jax.Array:
            rows = lax.dynamic_slice_in_dim(x, i, height, axis=2)
            views = [_views(rows[:, n], (1, kw), strides) for n in range(added)]
            terms = [sum(view(0, j) * g[:, n] for n, view in enumerate(views)) for j in range(kw)]
            taps = [jnp.reshape(one, (-1, channels)) for one in terms]
            return jnp.concatenate([ones @ lax.optimization_barrier(one) for one in taps])

        if is_loop:
            return lax.map(row, jnp.arange(kh))
        return jnp.stack([row(jnp.int32(i)) for i in range(kh)])

    return bilinear(product, gradient_x, gradient_w)


def _views(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> Any:
    """A function of (i, j): pixel (i, j) of each window of `[B, H, W, C]`."""
    (kh, kw), (high, wide) = window, strides
    last = x.shape[1] - kh, x.shape[2] - kw
    return lambda i, j: x[:, i : i + last[0] + 1 : high, j : j + last[1] + 1 : wide]
