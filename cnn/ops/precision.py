"""Which dtype a CPU computes fast in, for networks of 16-bit numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

# As Linux names them.
_BFLOAT16_PRODUCTS = frozenset(("avx512_bf16", "amx_bf16"))


def widened(x: jax.Array) -> jax.Array:
    """On a CPU bfloat16 and float16 as float32; anything else, and on other backends, as it is.

    XLA's CPU compiler computes other operations than products in float32 anyway, but rounds after
    each, and sums in 16 bits.
    """
    if jax.default_backend() == "cpu" and x.dtype in (jnp.bfloat16, jnp.float16):
        return x.astype(jnp.float32)
    return x


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether products of bfloat16 numbers with float32 sums are twice as fast as float32's.

    With AVX512-BF16 or AMX they are. False where Linux does not say so: on other systems and on
    ARM, where nothing was measured.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _BFLOAT16_PRODUCTS.isdisjoint(flags.split())
