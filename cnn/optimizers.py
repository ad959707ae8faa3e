"""Optax optimizers and learning-rate schedules, chosen by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from cnn.errors import UserError

OPTIMIZER_NAMES = ("adam", "adamw", "sgd")
SCHEDULE_NAMES = ("constant", "cosine", "linear")

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reused(create: Callable[_P, _T]) -> Callable[_P, _T]:
    """Has a function give the same object for equal arguments.

    Optimizers and schedules are closures, and closures compare by identity: a new one for each of
    many runs would have `jit` compile each run's steps anew.
    """
    cached = functools.lru_cache(maxsize=64, typed=True)(create)

    @functools.wraps(create)
    def reusing(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            hash((args, tuple(kwargs.items())))
        except TypeError:  # a learning rate that is an array
            return create(*args, **kwargs)
        return cached(*args, **kwargs)

    return reusing


@_reused
def create_schedule(
    name: str,
    learning_rate: float,
    *,
    num_updates: int,
    warmup_updates: int = 0,
    final_lr_fraction: float = 0.0,
) -> optax.Schedule:
    """A learning rate as a function of the number of updates done.

    Rises linearly from 0 to `learning_rate` in `warmup_updates`, then: "constant" stays,
    "linear" falls in a straight line and "cosine" by half a cosine (Loshchilov & Hutter 2017,
    "SGDR", eq. 5) to `final_lr_fraction * learning_rate` at `num_updates`.

    Raises:
      UserError: for an unknown name.

    >>> schedule = create_schedule("linear", 1.0, num_updates=10, warmup_updates=2)
    >>> [round(float(schedule(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    decay_updates = max(num_updates - warmup_updates, 1)
    end = learning_rate * final_lr_fraction
    if name == "constant":
        after = optax.constant_schedule(learning_rate)
    elif name == "linear":
        after = optax.linear_schedule(learning_rate, end, decay_updates)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, decay_updates, alpha=final_lr_fraction)
    else:
        raise UserError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULE_NAMES)}")
    if not warmup_updates:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_updates)
    return optax.join_schedules([warmup, after], [warmup_updates])


def _kernels(params: Any) -> Any:
    """True for matrices and convolution kernels: what weight decay applies to."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


@_reused
def create_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    grad_clip_norm: float = 0.0,
    grad_accumulation_steps: int = 1,
) -> optax.GradientTransformation:
    """Builds an optimizer.

    Args:
      name: "adam" (Kingma & Ba 2015), "adamw" (Loshchilov & Hutter 2019) or "sgd" with
        Nesterov momentum (Sutskever et al. 2013).
      learning_rate: a number, or a schedule over updates.
      momentum: of "sgd"; the others ignore it.
      weight_decay: on kernels only, never on biases or norms. Decoupled for "adamw"; for
        "adam" and "sgd" it is the L2 term added to the gradient, as in PyTorch.
      grad_clip_norm: if positive, gradients of a larger global norm are scaled down to it.
      grad_accumulation_steps: the update uses the mean gradient of so many calls.

    Raises:
      UserError: for an unknown name.
    """
    parts = []
    if grad_clip_norm:
        parts.append(optax.clip_by_global_norm(grad_clip_norm))
    if name == "adamw":
        parts.append(optax.adamw(learning_rate, weight_decay=weight_decay, mask=_kernels))
    elif name in ("adam", "sgd"):
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, mask=_kernels))
        adam = name == "adam"
        parts.append(
            optax.adam(learning_rate) if adam else optax.sgd(learning_rate, momentum, nesterov=True)
        )
    else:
        raise UserError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZER_NAMES)}")
    tx = optax.chain(*parts)
    if grad_accumulation_steps > 1:
        tx = optax.MultiSteps(tx, grad_accumulation_steps).gradient_transformation()
    return tx
