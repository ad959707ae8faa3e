"""What the processor multiplies fast: a fact about the machine, as `jax.default_backend()` is."""

from __future__ import annotations

import functools
from pathlib import Path

# As Linux names them.
_BFLOAT16_PRODUCTS = frozenset(("avx512_bf16", "amx_bf16"))


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
