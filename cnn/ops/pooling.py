"""Max pooling over windows that do not overlap, with gradients that are cheap on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.ops.layout import hwnc_to_nhwc, nhwc_to_hwnc, unstack


def max_pool(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H // h, W // w, C]`; rows and columns left over are dropped.

    By comparisons of whole rows, for a CPU.
    """
    x, (h, w) = nhwc_to_hwnc(images), window
    height, width = x.shape[0] // h, x.shape[1] // w
    x = x[: height * h, : width * w].reshape(height, h, width, w, *x.shape[2:])
    x = x.transpose(1, 3, 0, 2, 4, 5)
    return hwnc_to_nhwc(tournament_max(unstack(x.reshape(h * w, *x.shape[2:]), 0)))


def indexed_max_pool(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """The same as `max_pool`, for a GPU: what is kept for the gradient is a byte for each output.

    The gradient of XLA's own pooling there is a scatter, which takes longer than a convolution.
    """
    return _max_of_windows(windows_apart(images, window))


def windows_apart(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H // h, h, W // w, w, C]`; what is left over is dropped."""
    batch, height, width, channels = images.shape
    (h, w), rows, columns = window, height // window[0], width // window[1]
    x = images[:, : rows * h, : columns * w]
    return x.reshape(batch, rows, h, columns, w, channels)


@jax.custom_jvp
def _max_of_windows(x: jax.Array) -> jax.Array:
    """`[B, H, h, W, w, C]` -> `[B, H, W, C]`."""
    return x.max((2, 4))


@_max_of_windows.defjvp
def _max_of_windows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    h, w = x.shape[2], x.shape[4]
    kind = np.min_scalar_type(h * w - 1)
    best, index = x[:, :, 0, :, 0], jnp.zeros(x.shape[:2] + x.shape[3:4] + x.shape[5:], kind)
    for place in range(1, h * w):
        one = x[:, :, place // w, :, place % w]
        stays = best >= one
        best = jnp.maximum(best, one)
        index = jnp.where(stays, index, jnp.asarray(place, kind))
    places = jnp.arange(h * w, dtype=kind).reshape(1, 1, h, 1, w, 1)
    is_best = index[:, :, None, :, None] == places
    return best, jnp.where(is_best, tangent, jnp.zeros((), x.dtype)).sum((2, 4))


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
