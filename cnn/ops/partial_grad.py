"""Gradients that an optimizer does not use are not computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# (params, opt_state) -> a tree like the parameters
Unused = Callable[[Any, Any], Any]


class PartialOptimizer(optax.GradientTransformationExtraArgs):
    """An Optax optimizer that tells which gradients it does not use.

    Attributes:
      unused: (parameters, optimizer state) -> for each parameter True if no update uses its
        gradient, False if updates do, or `bool[]`: whether updates no longer do from this state on.
    """

    unused: Unused

    def __new__(cls, init: Any, update: Any, unused: Unused) -> PartialOptimizer:
        """`init` and `update` are those of Optax."""
        self = super().__new__(cls, init, update)
        self.unused = unused
        return self


def partial_grad(
    fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: optax.OptState,
) -> Callable[[Any], tuple[Any, Any]]:
    """`jax.grad(fn, has_aux=True)`, with zeros for gradients that the optimizer does not use.

    For what is used up to some state only, there are two programs, of which one runs.

    Args:
      fn: (parameters, batch) -> (`float[]`, any further results).
      tx: the optimizer; all gradients are computed for one that is no `PartialOptimizer`.
      params: where to differentiate.
      opt_state: the state of `tx` before the update.

    Returns:
      A function of the batch that returns the gradients and the further results.
    """
    if not isinstance(tx, PartialOptimizer):
        return lambda batch: jax.grad(fn, has_aux=True)(params, batch)

    def grad_but_for(skipped: Any) -> Callable[[Any], tuple[Any, Any]]:
        def held(params: Any, batch: Any) -> tuple[jax.Array, Any]:
            kept = jax.tree.map(
                lambda leaf, skip: jax.lax.stop_gradient(leaf) if skip else leaf, params, skipped
            )
            return fn(kept, batch)

        return lambda batch: jax.grad(held, has_aux=True)(params, batch)

    unused = tx.unused(params, opt_state)
    at_first = grad_but_for(jax.tree.map(lambda leaf: leaf is True, unused))
    ends = [leaf for leaf in jax.tree.leaves(unused) if not isinstance(leaf, bool)]
    if not ends:
        return at_first
    at_last = grad_but_for(jax.tree.map(lambda leaf: leaf is not False, unused))
    has_ended = _in_whole_stack(functools.reduce(jnp.logical_and, ends))
    return lambda batch: jax.lax.cond(has_ended, at_last, at_first, batch)


@jax.custom_batching.custom_vmap
def _in_whole_stack(flag: jax.Array) -> jax.Array:
    """`bool[]`; under `vmap` whether it holds for all: a `cond` by each would run both branches."""
    return flag


@_in_whole_stack.def_vmap
def _(axis_size: int, in_batched: Any, flag: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return flag.all(), False
