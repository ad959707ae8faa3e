"""3x3 convolution by minimal filtering, with up to four times fewer multiplications.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4. F(m x m, 3x3):
the image is cut into windows of m + 2 pixels both ways, m apart. With window d and kernel g, the
m x m outputs are A^T [(G g G^T) * (B^T d B)] A: for m = 4, 36 products in place of 144. The sums
and differences of the transforms need the digits of float32, of which they lose about one:

- The largest error against float64, as a part of the largest value, is up to 1.0e-5 for the result
  and 7.6e-6 for the gradients; 9.5e-7 for native and direct products. (Measured on x86 with normal
  numbers, 8 and 14 pixels with 4 to 256 channels, 32 pixels with 4 and 16.)
- A gradient that is exactly zero comes out as rounding noise, up to some 1e-6 of the largest
  gradient. An optimizer that takes the sign of a gradient, or divides by its size, moves such a
  weight by whole steps.
- What is not finite spreads to all outputs of the tiles that see it, up to three pixels farther
  than the kernel reaches, and an infinity may become NaN.

Where this matters use "patches" or "native": they have exact zeros, and spread nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn.ops.layout import from_rows, lines, pad, product, to_rows
from cnn.ops.linear_map import linear_map
from cnn.ops.pooling import largest

# A^T by m; for m = 2 with the points 0, 1, -1 and infinity, for m = 4 with 2 and -2 too.
_OUTPUT = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}
# G, times 2 and times 24.
_KERNEL = {
    2: [[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]],
    4: [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
}
_KERNEL_SCALE = {2: 2, 4: 24}


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    padding: tuple[tuple[int, int], ...],
    precision: Any,
    pool: int = 1,
) -> jax.Array:
    """Convolution, then max-pooling with windows of `pool` x `pool` side by side.

    Outputs that the pooling drops are not computed.

    Args:
      images: `float32[B, H, W, C]`.
      kernel: `float32[3, 3, C, O]`.
      padding: (low, high) for height and width.
      precision: of the products.
      pool: 1 is none; or 2.

    Returns:
      `float32[B, H', W', O]`.
    """
    x = pad(to_rows(images), padding)
    height, width = ((n - 2) // pool for n in x.shape[:2])
    side = min(_OUTPUT, key=lambda m: _count(m, height * pool, width * pool))
    tiles = -(-height * pool // side), -(-width * pool // side)
    y: Any = _largest_outputs(_products(x, kernel, precision, side, tiles), side, pool)
    # [windows in a tile, tiles down, tiles across, B, O], side by side.
    windows = side // pool
    y = y.reshape(windows, windows, *y.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    y = y.reshape(tiles[0] * windows, tiles[1] * windows, *y.shape[4:])
    return from_rows(y[:height, :width])


def _count(m: int, height: int, width: int) -> int:
    """Number of products that the tiles of an output need."""
    return (m + 2) ** 2 * -(-height // m) * -(-width // m)


def _products(
    x: jax.Array, kernel: jax.Array, precision: Any, m: int, tiles: tuple[int, int]
) -> jax.Array:
    """The products of each tile, `[(m + 2)**2 (column, row), *tiles, B, O]`."""
    (down, across), (_, _, batch, channels) = tiles, x.shape
    # One tile more, for the two pixels that the last window sees of it.
    wide = m * (across + 1)
    x = pad(x, ((0, m * (down + 1) - x.shape[0]), (0, wide - x.shape[1])))
    x = x.reshape(down + 1, m, wide, batch, channels)
    x = _input_transform(lines(x, 1), axis=0)
    x = x.reshape(m + 2, down, across + 1, m, batch, channels)
    x = _input_transform(lines(x, 3), axis=2)
    x = x.reshape(-1, down, across, batch, channels)
    kernel = _kernel_transform(kernel.reshape(9, -1), m)
    return product(x, kernel.reshape(x.shape[0], channels, -1), precision)


def _kernel_transform(kernel: jax.Array, m: int) -> jax.Array:
    """G g G^T: `[9, ...]` -> `[(m + 2)**2 (column, row), ...]`."""
    scale = _KERNEL_SCALE[m] ** 2

    def forward(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
        return matrix @ kernel / scale  # divided last, so that whole numbers stay whole

    def transpose(matrix: jax.Array, g: jax.Array) -> jax.Array:
        return matrix.T @ g / scale

    return linear_map(forward, transpose, jnp.asarray(_kernel_matrix(m)), kernel)


def _kernel_matrix(m: int) -> np.ndarray:
    """G in both dimensions, times the square of its scale."""
    g = np.array(_KERNEL[m], np.float32)
    return np.einsum("hi,wj->whij", g, g).reshape(-1, 9)


def _input_transform(every: Sequence[jax.Array], axis: int) -> jax.Array:
    """B^T d, stacked in front; from every first, every second, ... of m lines along the axis.

    As differences, so that on a flat part of an image all but one are exactly zero, and outputs
    that are equal stay equal.
    """
    last = every[0].shape[axis] - 1
    d = [lax.slice_in_dim(line, 0, last, axis=axis) for line in every]
    d += [lax.slice_in_dim(line, 1, last + 1, axis=axis) for line in every[:2]]
    if len(every) == 2:
        return jnp.stack((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]))
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    even_2, odd_2 = d[4] - d[2], 2 * (d[3] - d[1])
    first, last = 4 * (d[0] - d[2]) + even_2, 4 * (d[1] - d[3]) + (d[5] - d[3])
    return jnp.stack((first, even + odd, even - odd, even_2 + odd_2, even_2 - odd_2, last))


def _largest_outputs(products: jax.Array, m: int, pool: int) -> jax.Array:
    """`[(m + 2)**2, ...]` -> `[(m // pool)**2, ...]`: of each window of a tile's outputs."""

    def forward(matrix: jax.Array, products: jax.Array) -> jax.Array:
        return jnp.tensordot(matrix, products, 1)

    def transpose(matrix: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.tensordot(matrix.T, g, 1)

    matrix = jnp.asarray(_output_matrix(m, pool))
    outputs = linear_map(forward, transpose, matrix, products)
    windows = (m // pool) ** 2
    return largest(lax.split(outputs, [windows] * pool**2, axis=0))


def _output_matrix(m: int, pool: int) -> np.ndarray:
    """A^T in both dimensions, `[m * m (place in the window, window), (m + 2)**2 (column, row)]`."""
    a = np.array(_OUTPUT[m], np.float32)
    both = np.einsum("ih,jw->ijwh", a, a).reshape(m // pool, pool, m // pool, pool, -1)
    return both.transpose(1, 3, 0, 2, 4).reshape(m * m, -1)
