"""3x3 convolution by minimal filtering, with up to four times fewer multiplications.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4. F(m x m, 3x3)
computes tiles of m x m outputs, each from a window d of m + 2 pixels a side; the windows are m
pixels apart. With kernel g, a tile is A^T [(G g G^T) * (B^T d B)] A: for m = 4, 36 products in
place of 144. The transforms need float32 and lose about one of its decimal digits:

- The largest error against float64, relative to the largest value, is 1.0e-5 for the result and
  7.6e-6 for the gradients; it is 9.5e-7 for native convolution and for im2col. (Measured on x86
  with normally distributed values, for 8 and 14 pixels a side with 4 to 256 channels and for 32
  pixels with 4 and 16.)
- A gradient that is exactly zero becomes rounding noise of about 1e-6 of the largest gradient.
  An optimizer that takes the sign of a gradient, or divides by its size, moves such a weight by
  whole steps.
- A NaN or infinity reaches all outputs of the tiles whose windows contain it, up to three pixels
  farther than the kernel reaches, and an infinity may become NaN.

Where this matters use "patches" or "native": they keep exact zeros and spread nothing.

For a network that computes in bfloat16 the products themselves may have operands of bfloat16, with
float32 sums, but for m = 2 only. The root mean square error of the result and of both gradients is
then 0.4 to 0.5 % of the root mean square value, where that of rounding to bfloat16 is 0.17 %; with
m = 4 it would be 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn.ops.layout import (
    batched_matmul,
    hwnc_to_nhwc,
    nhwc_to_hwnc,
    pad,
    rounded_matmul,
    unstack,
)
from cnn.ops.linear_map import linear_map
from cnn.ops.microbatch import MicrobatchPlan
from cnn.ops.pooling import tournament_max

# A^T by m: interpolation points 0, 1, -1 and infinity for m = 2; also 2 and -2 for m = 4.
_OUTPUT = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}
# G times `_KERNEL_SCALE`, so that its entries are exact.
_KERNEL = {
    2: [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    4: [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
}
_KERNEL_SCALE = {2: 1, 4: 24}
# To transform a large kernel and its gradient, and to read them from memory, takes as long as the
# products of so many tiles (benchmarks/NOTES.md). Kernels of fewer pairs of channels stay in the
# caches.
_TILES_PER_KERNEL = 80
_LARGE_KERNEL = 128 * 128


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    padding: tuple[tuple[int, int], ...],
    precision: Any,
    pool: int = 1,
    *,
    round_factors: bool = False,
) -> jax.Array:
    """Convolution, then max pooling over `pool` x `pool` windows that do not overlap.

    Outputs that the pooling drops are not computed.

    Args:
      images: `float32[B, H, W, C]`.
      kernel: `float32[3, 3, C, K]`.
      padding: (low, high) for height and width.
      precision: of the products, as in `lax.dot_general`.
      pool: side of a pooling window, 1 or 2; 1 does not pool.
      round_factors: whether the factors of the products are rounded to bfloat16, in both passes.

    Returns:
      `float32[B, H', W', K]`.
    """
    x = pad(nhwc_to_hwnc(images), padding)
    height, width = ((n - 2) // pool for n in x.shape[:2])
    sizes = (2,) if round_factors else _OUTPUT
    overhead = _overhead(images, kernel)
    m = min(sizes, key=lambda m: _num_products(m, height * pool, width * pool, overhead))
    tiles = -(-height * pool // m), -(-width * pool // m)
    x, kernel = _factors(x, kernel, m, tiles)
    if round_factors:
        products = rounded_matmul(x.astype(jnp.bfloat16), kernel, precision)
    else:
        products = batched_matmul(x, kernel, precision)
    y: Any = _pooled_output_transform(products, m, pool)
    # From [pooling windows of a tile, tiles down, tiles across, B, K] to the plane of outputs.
    windows = m // pool
    y = y.reshape(windows, windows, *y.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    y = y.reshape(tiles[0] * windows, tiles[1] * windows, *y.shape[4:])
    return hwnc_to_nhwc(y[:height, :width])


def _overhead(images: jax.Array, kernel: jax.Array) -> float:
    """The tiles, per image, whose products take as long as what a kernel costs in itself."""
    batch = images.shape[0]
    if math.prod(kernel.shape[2:]) < _LARGE_KERNEL or not isinstance(batch, int):
        return 0  # a symbolic size, of `jax.export`, may be any
    return _TILES_PER_KERNEL * MicrobatchPlan.for_batch(images).num_shards / batch


def _num_products(m: int, height: int, width: int, overhead: float) -> float:
    """Number of products, per image and channel pair, for tiles that cover height x width."""
    return (m + 2) ** 2 * (-(-height // m) * -(-width // m) + overhead)


def _factors(
    x: jax.Array, kernel: jax.Array, m: int, tiles: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """B^T d B: `[(m + 2)**2 (column, row), *tiles, B, C]`, and G g G^T: `[(m + 2)**2, C, K]`."""
    (down, across), (_, _, batch, channels) = tiles, x.shape
    # One more tile, since the last window reaches two pixels into it.
    wide = m * (across + 1)
    x = pad(x, ((0, m * (down + 1) - x.shape[0]), (0, wide - x.shape[1])))
    x = x.reshape(down + 1, m, wide, batch, channels)
    x = _input_transform(unstack(x, 1), axis=0)
    x = x.reshape(m + 2, down, across + 1, m, batch, channels)
    x = _input_transform(unstack(x, 3), axis=2)
    x = x.reshape(-1, down, across, batch, channels)
    kernel = _kernel_transform(kernel.reshape(9, -1), m)
    return x, kernel.reshape(x.shape[0], channels, -1)


def _kernel_transform(kernel: jax.Array, m: int) -> jax.Array:
    """G g G^T: `[9, ...]` -> `[(m + 2)**2 (column, row), ...]`."""
    scale = _KERNEL_SCALE[m] ** 2

    def forward(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
        return matrix @ kernel / scale  # divides last: whole numbers stay exact

    def transpose(matrix: jax.Array, g: jax.Array) -> jax.Array:
        return matrix.T @ g / scale

    return linear_map(forward, transpose, jnp.asarray(_kernel_matrix(m)), kernel)


def _kernel_matrix(m: int) -> np.ndarray:
    """G for both dimensions, times the square of its scale: `[(m + 2)**2 (column, row), 9]`."""
    g = np.array(_KERNEL[m], np.float32)
    return np.einsum("hi,wj->whij", g, g).reshape(-1, 9)


def _input_transform(columns: Sequence[jax.Array], axis: int) -> jax.Array:
    """B^T d along one axis, stacked as the leading axis of the result.

    Written as differences: on a flat part of an image all but one are exactly zero, so that equal
    outputs stay equal.

    Args:
      columns: m arrays; array i holds line i of every tile, with the tiles along `axis`.
      axis: of the tiles, the last of which only completes the window of the one before.
    """
    last = columns[0].shape[axis] - 1
    d = [lax.slice_in_dim(column, 0, last, axis=axis) for column in columns]
    d += [lax.slice_in_dim(column, 1, last + 1, axis=axis) for column in columns[:2]]
    if len(columns) == 2:
        return jnp.stack((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]))
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    even_2, odd_2 = d[4] - d[2], 2 * (d[3] - d[1])
    first, last = 4 * (d[0] - d[2]) + even_2, 4 * (d[1] - d[3]) + (d[5] - d[3])
    return jnp.stack((first, even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, last))


def _pooled_output_transform(products: jax.Array, m: int, pool: int) -> jax.Array:
    """A^T [products] A, max-pooled: `[(m + 2)**2, ...]` -> `[(m // pool)**2, ...]`."""

    def forward(matrix: jax.Array, products: jax.Array) -> jax.Array:
        return jnp.tensordot(matrix, products, 1)

    def transpose(matrix: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.tensordot(matrix.T, g, 1)

    matrix = jnp.asarray(_output_matrix(m, pool))
    outputs = linear_map(forward, transpose, matrix, products)
    windows = (m // pool) ** 2
    return tournament_max(lax.split(outputs, [windows] * pool**2, axis=0))


def _output_matrix(m: int, pool: int) -> np.ndarray:
    """A^T for both dimensions: `[m * m (position in window, window), (m + 2)**2 (column, row)]`."""
    a = np.array(_OUTPUT[m], np.float32)
    both = np.einsum("ih,jw->ijwh", a, a).reshape(m // pool, pool, m // pool, pool, -1)
    return both.transpose(1, 3, 0, 2, 4).reshape(m * m, -1)
