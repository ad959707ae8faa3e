"""Convolution as one matrix product, of what the kernel sees in each place with the kernel.

(im2col; Chellapilla et al. 2006, "High performance convolutional neural networks for document
processing".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.layout import from_rows, lines, pad, product
from cnn.ops.linear_map import bilinear
from cnn.ops.pooling import largest, max_pool

# With so many channels the pieces of memory that a view is made of are long enough.
_MANY_CHANNELS = 16


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    precision: Any,
    pool: int = 1,
) -> jax.Array:
    """Convolution, then max-pooling with windows of `pool` x `pool` side by side.

    Outputs that the pooling drops are not computed.

    Args:
      images: `float[B, H, W, C]`.
      kernel: `float[kh, kw, C, O]`.
      strides: of the convolution.
      padding: (low, high) for height and width.
      precision: of the products.
      pool: 1 is none.

    Returns:
      `float[B, H', W', O]`.
    """
    kh, kw, channels, features = kernel.shape
    x = pad(images, padding, axis=1)
    size = [
        ((n - k) // stride + 1) // pool
        for n, k, stride in zip(x.shape[1:3], (kh, kw), strides, strict=True)
    ]
    matrix = kernel.reshape(-1, features)
    if channels >= _MANY_CHANNELS or kh * kw <= strides[0] * strides[1]:
        view = _views(x, strides, (kh, kw), [pool * n for n in size])
        views = jnp.concatenate([view(i, j) for i in range(kh) for j in range(kw)], axis=-1)
        y: Any = product(views[None], matrix[None], precision)
        return y[0] if pool == 1 else max_pool(y[0], (pool, pool))
    # Many views of few channels: with the images last they are long pieces of memory too. The
    # places in a pooling window lie one behind the other.
    sides = [(pool - 1) * strides[0] + kh, (pool - 1) * strides[1] + kw]
    view = _views(x, [pool * stride for stride in strides], sides, size)
    views = [view(i, j).transpose(3, 1, 2, 0) for i in range(sides[0]) for j in range(sides[1])]
    planes = jnp.stack(views).reshape(*sides, channels, *views[0].shape[1:])
    corners = [(i * strides[0], j * strides[1]) for i in range(pool) for j in range(pool)]
    seen = [planes[i : i + kh, j : j + kw] for i, j in corners]
    windows = jnp.stack([one.reshape(-1, *one.shape[3:]) for one in seen], axis=1)
    return from_rows(largest(lines(_product_of_planes(windows, matrix, precision), 0)))


def _views(
    x: jax.Array, steps: Sequence[int], sides: Sequence[int], size: Sequence[int]
) -> Callable[[int, int], jax.Array]:
    """Function of (i, j): pixel (i, j) of each window of `[B, H, W, C]`, `[B, *size, C]`.

    The windows have `sides` pixels and are `steps` apart.
    """
    batch, *now, channels = x.shape
    height, width = size
    rows, columns = height + (sides[0] - 1) // steps[0], width + (sides[1] - 1) // steps[1]
    # So that no view has a stride.
    x = pad(x, [(0, rows * steps[0] - now[0]), (0, columns * steps[1] - now[1])], axis=1)
    x = x.reshape(batch, rows, steps[0], columns, steps[1], channels)

    def view(i: int, j: int) -> jax.Array:
        (row, i), (column, j) = divmod(i, steps[0]), divmod(j, steps[1])
        return x[:, row : row + height, i, column : column + width, j]

    return view


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[K, ...]` and `[K, O]` -> `[..., O]`."""
    # As in cnn.ops.layout; the gradient of the kernel wants it as it is.
    x = lax.optimization_barrier(jnp.moveaxis(x, 0, -1))
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return lax.dot_general(w, g, (((1,), (g.ndim - 1,)), ((), ())), precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    places = tuple(range(1, x.ndim)), tuple(range(g.ndim - 1))
    return lax.dot_general(x, g, (places, ((), ())), precision)


_product_of_planes = bilinear(_product, _gradient_x, _gradient_w)
