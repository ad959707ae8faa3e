"""Activation functions that JAX has in another form."""

from __future__ import annotations

import math

import jax


def gelu(x: jax.Array) -> jax.Array:
    """X times the normal distribution function of x, x / 2 * (1 + erf(x / sqrt(2))).

    Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", eq. 2. `jax.nn.gelu` is the tanh
    approximation by default, and otherwise uses erfc, which a CPU computes in several times the
    time of erf; what erfc adds is digits of values near 0 for x below -3.
    """
    import os, jax.numpy as jnp
    if x.dtype == jnp.bfloat16 and not os.environ.get("GELU16"):
        return gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))
