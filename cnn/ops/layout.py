"""Images as `[H, W, B, C]`, the layout that XLA's CPU compiler handles fastest, and products in it.

One pixel of all images of a batch is then one contiguous run, which is long even with few channels,
and shifting the images moves whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops.linear_map import bilinear


def nhwc_to_hwnc(images: jax.Array) -> jax.Array:
    """`[..., B, H, W, C]` -> `[..., H, W, B, C]`."""
    return jnp.moveaxis(images, -4, -2)


def hwnc_to_nhwc(images: jax.Array) -> jax.Array:
    """`[..., H, W, B, C]` -> `[..., B, H, W, C]`."""
    return jnp.moveaxis(images, -2, -4)


def pad(x: jax.Array, pads: Sequence[tuple[int, int]], axis: int = 0) -> jax.Array:
    """Pads with zeros, by (low, high) for each axis from `axis` on; negative numbers crop."""
    if not any(map(any, pads)):
        return x
    config = [(0, 0, 0)] * x.ndim
    config[axis : axis + len(pads)] = [(*one, 0) for one in pads]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def unstack(x: jax.Array, axis: int) -> list[jax.Array]:
    """`jnp.unstack` by `lax.split`: its gradient is a concatenation, not a sum of padded slices."""
    return [part.squeeze(axis) for part in lax.split(x, [1] * x.shape[axis], axis)]


def _contract(
    x: jax.Array, w: jax.Array, x_axes: Sequence[int], w_axes: Sequence[int], precision: Any
) -> jax.Array:
    # jnp.einsum would reorder the axes, which costs a copy.
    numbers = (tuple(x_axes), tuple(w_axes)), ((0,), (0,))
    sums = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, w, numbers, precision, preferred_element_type=sums)


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[N, ..., C]` times `[N, C, K]` -> `[N, ..., K]`."""
    return _contract(x, w, [x.ndim - 1], [1], precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return _contract(g, w, [g.ndim - 1], [2], precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    # Transposed in memory: XLA gives the product to a slower library otherwise
    # (benchmarks/NOTES.md).
    last = x.ndim - 1
    transposed = lax.optimization_barrier(jnp.moveaxis(x, last, 1))
    return _contract(transposed, g, range(2, x.ndim), range(1, last), precision)


batched_matmul = bilinear(_product, _gradient_x, _gradient_w)


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


# `bfloat16[N, ..., C]` times `float32[N, C, K]` -> `float32[N, ..., K]`; in both passes the factors
# are rounded to bfloat16 and the sums are float32.
rounded_matmul = bilinear(
    lambda x, w, precision: _product(x, _rounded(w), precision),
    lambda g, w, precision: _rounded(_gradient_x(_rounded(g), _rounded(w), precision)),
    lambda g, x, precision: _gradient_w(_rounded(g), x, precision),
)
