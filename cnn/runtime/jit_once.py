"""`jax.jit` for programs that run seldom, for which compiling is most of the cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# For a CPU: they compile in a fifth of the time, for the same numbers (benchmarks/NOTES.md).
_QUICKLY = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def jit_once(
    fn: Callable[..., Any], static_argnames: tuple[str, ...] = (), *, on_cpu: bool
) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once in a run, or once in an epoch.

    Args:
      fn: a module-level function: the compiled program is kept for later runs.
      static_argnames: as for `jax.jit`.
      on_cpu: whether a CPU runs it.
    """
    plain = jax.jit(fn, static_argnames=static_argnames)
    if not on_cpu:
        return plain
    quick = jax.jit(fn, static_argnames=static_argnames, compiler_options=_QUICKLY)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return quick(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):  # else of an XLA that has one of them no longer
                raise
            return plain(*args, **kwargs)

    return call
