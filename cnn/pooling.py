"""Max-pooling with windows side by side, with a gradient that is cheap on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnn.rows import from_rows, to_rows


def max_pool(images: jax.Array, window: tuple[int, int]) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H // h, W // w, C]`; what does not fill a window is dropped."""
    x, (h, w) = to_rows(images), window
    height, width = x.shape[0] // h, x.shape[1] // w
    x = x[: height * h, : width * w].reshape(height, h, width, w, *x.shape[2:])
    x = x.transpose(1, 3, 0, 2, 4, 5)
    return from_rows(largest(x.reshape(h * w, *x.shape[2:])))


@jax.custom_vjp
def largest(x: jax.Array) -> jax.Array:
    """`[N, ...]` -> `[...]`. Of equals the first gets the gradient."""
    return _largest_fwd(x)[0]


def _largest_fwd(x: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return winners(list(x))


def _largest_bwd(tree: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array]:
    return (jnp.stack(to_winner(tree, g)),)


largest.defvjp(_largest_fwd, _largest_bwd)


def winners(parts: Sequence[jax.Array]) -> tuple[jax.Array, tuple[Any, ...]]:
    """The largest of the parts, and who won: a tree of (left wins, left tree, right tree).

    Booleans of a knock-out tournament are cheaper on a CPU than an index; equals go left.
    """
    if len(parts) == 1:
        return parts[0], ()
    half = len(parts) // 2
    (left, left_tree), (right, right_tree) = winners(parts[:half]), winners(parts[half:])
    return jnp.maximum(left, right), (left >= right, left_tree, right_tree)


def to_winner(tree: tuple[Any, ...], g: jax.Array) -> list[jax.Array]:
    """The gradient for each part: g for the winner, zero for the others."""
    if not tree:
        return [g]
    left_wins, left, right = tree
    zero = jnp.zeros((), g.dtype)
    return [
        *to_winner(left, jnp.where(left_wins, g, zero)),
        *to_winner(right, jnp.where(left_wins, zero, g)),
    ]
