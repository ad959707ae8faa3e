"""Convolution as one matrix product: the window that the kernel covers at each position, flattened.

(im2col; Chellapilla et al. 2006, "High performance convolutional neural networks for document
processing".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.layout import batched_matmul, hwnc_to_nhwc, pad, unstack
from cnn.ops.linear_map import bilinear
from cnn.ops.pooling import max_pool, tournament_max

# From this number of channels on, a shifted NHWC view is copied in long contiguous runs.
_MANY_CHANNELS = 16


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    precision: Any,
    pool: int = 1,
) -> jax.Array:
    """Convolution, then max pooling over `pool` x `pool` windows that do not overlap.

    Outputs that the pooling drops are not computed.

    Args:
      images: `float[B, H, W, C]`.
      kernel: `float[kh, kw, C, K]`.
      strides: of the convolution, (vertical, horizontal).
      padding: (low, high) for height and width.
      precision: of the products, as in `lax.dot_general`.
      pool: side of a pooling window; 1 does not pool.

    Returns:
      `float[B, H', W', K]`.
    """
    kh, kw, channels, features = kernel.shape
    x = pad(images, padding, axis=1)
    size = [
        ((n - k) // stride + 1) // pool
        for n, k, stride in zip(x.shape[1:3], (kh, kw), strides, strict=True)
    ]
    matrix = kernel.reshape(-1, features)
    if channels >= _MANY_CHANNELS or kh * kw <= strides[0] * strides[1]:
        view = _shifted_views(x, strides, (kh, kw), [pool * n for n in size])
        columns = jnp.concatenate([view(i, j) for i in range(kh) for j in range(kw)], axis=-1)
        y: Any = batched_matmul(columns[None], matrix[None], precision)
        return y[0] if pool == 1 else max_pool(y[0], (pool, pool))
    # With few channels the batch axis comes last, so that each shifted view is a long contiguous
    # run. Axis 1 of `columns` counts the positions within a pooling window.
    sides = [(pool - 1) * strides[0] + kh, (pool - 1) * strides[1] + kw]
    view = _shifted_views(x, [pool * stride for stride in strides], sides, size)
    views = [view(i, j).transpose(3, 1, 2, 0) for i in range(sides[0]) for j in range(sides[1])]
    planes = jnp.stack(views).reshape(*sides, channels, *views[0].shape[1:])
    corners = [(i * strides[0], j * strides[1]) for i in range(pool) for j in range(pool)]
    windows = [planes[i : i + kh, j : j + kw] for i, j in corners]
    columns = jnp.stack([window.reshape(-1, *window.shape[3:]) for window in windows], axis=1)
    return hwnc_to_nhwc(tournament_max(unstack(_planes_matmul(columns, matrix, precision), 0)))


def _shifted_views(
    x: jax.Array, strides: Sequence[int], window: Sequence[int], size: Sequence[int]
) -> Callable[[int, int], jax.Array]:
    """A function of (i, j): pixel (i, j) of each window of `[B, H, W, C]`, as `[B, *size, C]`."""
    batch, *now, channels = x.shape
    height, width = size
    rows, columns = height + (window[0] - 1) // strides[0], width + (window[1] - 1) // strides[1]
    # A reshape by the strides makes every view a slice without strides.
    x = pad(x, [(0, rows * strides[0] - now[0]), (0, columns * strides[1] - now[1])], axis=1)
    x = x.reshape(batch, rows, strides[0], columns, strides[1], channels)

    def view(i: int, j: int) -> jax.Array:
        (row, i), (column, j) = divmod(i, strides[0]), divmod(j, strides[1])
        return x[:, row : row + height, i, column : column + width, j]

    return view


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[C, ...]` and `[C, K]` -> `[..., K]`."""
    # Transposed in memory as in cnn.ops.layout; the gradient of the kernel takes x as it is.
    x = lax.optimization_barrier(jnp.moveaxis(x, 0, -1))
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return lax.dot_general(w, g, (((1,), (g.ndim - 1,)), ((), ())), precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    positions = tuple(range(1, x.ndim)), tuple(range(g.ndim - 1))
    return lax.dot_general(x, g, (positions, ((), ())), precision)


_planes_matmul = bilinear(_product, _gradient_x, _gradient_w)
