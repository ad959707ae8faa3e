"""Images as rows `[H, W, B, C]`: for CPUs, the layout in which XLA's loops are fast.

Whatever is done to a pixel is done to it in all images of the batch at once, which is a long row
of memory even where there are few channels, and shifting the images moves whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.linear_map import bilinear


def to_rows(images: jax.Array) -> jax.Array:
    """`[..., B, H, W, C]` -> `[..., H, W, B, C]`."""
    return jnp.moveaxis(images, -4, -2)


def from_rows(rows: jax.Array) -> jax.Array:
    """`[..., H, W, B, C]` -> `[..., B, H, W, C]`."""
    return jnp.moveaxis(rows, -2, -4)


def pad(x: jax.Array, pads: Sequence[tuple[int, int]], axis: int = 0) -> jax.Array:
    """Zeros before and behind, from an axis on; a negative number cuts."""
    if not any(map(any, pads)):
        return x
    config = [(0, 0, 0)] * x.ndim
    config[axis : axis + len(pads)] = [(*one, 0) for one in pads]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def lines(x: jax.Array, axis: int) -> list[jax.Array]:
    """The slices along an axis, whose gradients are put together and not added up."""
    return [line.squeeze(axis) for line in lax.split(x, [1] * x.shape[axis], axis)]


def _contract(
    x: jax.Array, w: jax.Array, of_x: Sequence[int], of_w: Sequence[int], precision: Any
) -> jax.Array:
    # jnp.einsum would change the order of the axes, and copy for it.
    return lax.dot_general(x, w, ((tuple(of_x), tuple(of_w)), ((0,), (0,))), precision)


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[N, ..., K]` times `[N, K, O]`, N times: `[N, ..., O]`."""
    return _contract(x, w, [x.ndim - 1], [1], precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return _contract(g, w, [g.ndim - 1], [2], precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    # Transposed in memory, or the product would go to a slower library (benchmarks/NOTES.md).
    last = x.ndim - 1
    transposed = lax.optimization_barrier(jnp.moveaxis(x, last, 1))
    return _contract(transposed, g, range(2, x.ndim), range(1, last), precision)


product = bilinear(_product, _gradient_x, _gradient_w)
