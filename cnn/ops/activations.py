"""Activation functions that JAX has in another form."""

from __future__ import annotations

import math

import jax

from cnn.ops.precision import widened


def gelu(x: jax.Array) -> jax.Array:
    """X times the normal distribution function of x, x / 2 * (1 + erf(x / sqrt(2))).

    Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", eq. 2. `jax.nn.gelu` is the tanh
    approximation by default, and otherwise uses erfc, which a CPU computes in several times the
    time of erf; what erfc adds is digits of values near 0 for x below -3.

    On a CPU bfloat16 and float16 are computed in float32, and rounded once.
    """
    x, dtype = widened(x), x.dtype
    return (0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))).astype(dtype)
