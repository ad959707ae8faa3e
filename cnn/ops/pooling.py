"""Max-pooling with windows side by side, with a gradient that is cheap on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnn.ops.layout import from_rows, lines, to_rows


def max_pool(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H // h, W // w, C]`; what does not fill a window is dropped."""
    x, (h, w) = to_rows(images), window
    height, width = x.shape[0] // h, x.shape[1] // w
    x = x[: height * h, : width * w].reshape(height, h, width, w, *x.shape[2:])
    x = x.transpose(1, 3, 0, 2, 4, 5)
    return from_rows(largest(lines(x.reshape(h * w, *x.shape[2:]), 0)))


def largest(parts: Sequence[jax.Array]) -> jax.Array:
    """The elementwise maximum of arrays of one shape.

    Of equal elements the first gets the gradient.
    A tournament: the booleans of its matches are cheaper on a CPU than the index of the winner.
    """
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _larger(largest(parts[:half]), largest(parts[half:]))


@jax.custom_jvp
def _larger(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.maximum(left, right)


@_larger.defjvp
def _larger_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    left, right = primals
    return _larger(left, right), jnp.where(left >= right, *tangents)
