"""The yardstick: a large float32 matrix product, the fastest arithmetic of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 2048
FLOP = 2 * SIZE**3


class Matmul:
    """One step is one product of two `float32[2048, 2048]`.

    Args:
      variant: "jax" (one device, its own thread pool) or "numpy" (its BLAS).
    """

    def __init__(self, variant: str) -> None:
        rng = np.random.default_rng(0)
        left, right = rng.standard_normal((2, SIZE, SIZE), dtype=np.float32)
        self._product: Callable[[], Any] = {"jax": _jax, "numpy": _numpy}[variant](left, right)

    def train(self, steps: int) -> None:
        """Computes `steps` products."""
        for _ in range(steps):
            self._product()

    infer = train

    def reset(self) -> None:
        """Does nothing: a product has no state."""


def _jax(left: np.ndarray, right: np.ndarray) -> Callable[[], Any]:
    import jax

    a, b = jax.device_put((left, right))
    product = jax.jit(lambda a, b: jax.numpy.matmul(a, b, precision="highest"))
    return lambda: product(a, b).block_until_ready()


def _numpy(left: np.ndarray, right: np.ndarray) -> Callable[[], Any]:
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)
