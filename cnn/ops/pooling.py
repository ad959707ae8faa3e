"""Max pooling over windows that do not overlap, with a gradient that is cheap on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnn.ops.layout import hwnc_to_nhwc, nhwc_to_hwnc, unstack


def max_pool(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H // h, W // w, C]`; rows and columns left over are dropped."""
    x, (h, w) = nhwc_to_hwnc(images), window
    height, width = x.shape[0] // h, x.shape[1] // w
    x = x[: height * h, : width * w].reshape(height, h, width, w, *x.shape[2:])
    x = x.transpose(1, 3, 0, 2, 4, 5)
    return hwnc_to_nhwc(tournament_max(unstack(x.reshape(h * w, *x.shape[2:]), 0)))


def tournament_max(arrays: Sequence[jax.Array]) -> jax.Array:
    """The elementwise maximum of arrays of one shape.

    Of equal elements the first gets the gradient. The arrays are compared in pairs: on a CPU the
    results of the comparisons are cheaper to keep for the gradient than the index of the maximum.
    """
    if len(arrays) == 1:
        return arrays[0]
    half = len(arrays) // 2
    return _maximum(tournament_max(arrays[:half]), tournament_max(arrays[half:]))


@jax.custom_jvp
def _maximum(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.maximum(left, right)


@_maximum.defjvp
def _maximum_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    left, right = primals
    return _maximum(left, right), jnp.where(left >= right, *tangents)
