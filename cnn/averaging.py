"""Running averages of a network's weights: functions of what `train_step` carries.

An averaging is called after each update as `(averaged, current, num_steps) -> (averaged, current)`:
the average so far, the variables after the update and the steps made, this one included. What it
returns takes their places. `is_evaluated` says whether the average is the network that is scored,
predicts and is exported. A row of `AVERAGINGS` makes one known to configs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from cnn.arrays import AnyArray
from cnn.errors import UserError
from cnn.registry import Schema, complete, schema, select


class Averaging(Protocol):
    """See the module."""

    is_evaluated: ClassVar[bool]

    def __call__(self, averaged: Any, current: Any, num_steps: AnyArray) -> tuple[Any, Any]:
        """See the module."""
        ...


@dataclasses.dataclass(frozen=True)
class ExponentialMovingAverage:
    """average = d * average + (1 - d) * current, with d = min(decay, (1 + n) / (10 + n)).

    Polyak & Juditsky 1992; at first, after n updates, the average is over a tenth of them or less,
    so that it forgets the initial weights soon. Running statistics are averaged too. The average is
    what is evaluated; training does not see it.

    Raises:
      UserError: the decay does not lie in [0, 1).
    """

    decay: float = 0.999
    is_evaluated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def __call__(self, averaged: Any, current: Any, num_steps: AnyArray) -> tuple[Any, Any]:
        """See the module."""
        n = jnp.asarray(num_steps, jnp.float32)
        return _mix(averaged, current, jnp.minimum(self.decay, (1 + n) / (10 + n))), current


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Every `period` steps the network moves to a slow average of itself, and goes on from there.

    After step n, a multiple of `period`, slow = d * slow + (1 - d) * current and current = slow,
    with d = decay**period * (n / num_steps)**3, so that the average is slower towards the end.
    After the last step current = slow, which drops the steps since the last multiple. Zhang et al.
    2019, "Lookahead Optimizer", with the schedule of Jordan 2024, arXiv:2404.00498, section 3.4.
    Running statistics move too; the optimizer's momentum does not.

    Attributes:
      num_steps: of the whole run.
      period: steps between two moves.
      decay: the part of the average that remains, a step, at the end of the run.

    Raises:
      UserError: the decay does not lie in [0, 1), or the period is less than 1.
    """

    num_steps: int
    period: int = 5
    decay: float = 0.95
    is_evaluated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if self.period < 1:
            raise UserError(f"averaging.period={self.period} must be 1 or more")

    def __call__(self, averaged: Any, current: Any, num_steps: AnyArray) -> tuple[Any, Any]:
        """See the module."""
        progress = jnp.asarray(num_steps, jnp.float32) / self.num_steps
        decay = self.decay**self.period * progress**3
        is_due, is_last = num_steps % self.period == 0, num_steps == self.num_steps
        slow = _where(is_due, _mix(averaged, current, decay), averaged)
        return slow, _where(is_due | is_last, slow, current)


def _mix(averaged: Any, current: Any, decay: AnyArray) -> Any:
    """The weighted mean, in a form that keeps the bits of what is equal in both."""
    return jax.tree.map(
        lambda old, new: (
            (new - decay * (new - old)).astype(old.dtype)
            if jnp.issubdtype(old.dtype, jnp.inexact)
            else new
        ),
        averaged,
        current,
    )


def _where(condition: AnyArray, this: Any, that: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), this, that)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise UserError(f"averaging.decay={decay} must be at least 0 and below 1")


def _none() -> None:
    """No averaging."""


AVERAGINGS: dict[str, Callable[..., Averaging | None]] = {
    "none": _none,
    "ema": ExponentialMovingAverage,
    "lookahead": Lookahead,
}


def averaging_schema(name: str) -> Schema:
    """The fields of an averaging; raises UserError for an unknown name."""
    return schema(select("averaging", AVERAGINGS, name), without=("num_steps",))


def create_averaging(name: str, *, num_steps: int, **fields: Any) -> Averaging | None:
    """Builds an averaging by its config name; None for "none".

    Args:
      name: a row of `AVERAGINGS`.
      num_steps: of the whole run.
      **fields: of the averaging.

    Raises:
      UserError: an unknown name or field, or a value out of its range.

    >>> create_averaging("ema", num_steps=100, decay=0.99)
    ExponentialMovingAverage(decay=0.99)
    """
    fields = complete("averaging", averaging_schema(name), fields)
    build = AVERAGINGS[name]
    if "num_steps" in inspect.signature(build).parameters:
        fields["num_steps"] = num_steps
    return build(**fields)


def evaluated_network(arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint that are scored, predict and are exported.

    Args:
      arrays: of the checkpoint: `TrainState.arrays`.
      settings: the section `averaging` of the run's config; empty for a run from before it.

    Returns:
      `params` and `model_state`: the averaged ones where the averaging is evaluated.
    """
    averaging = create_averaging(num_steps=1, **settings) if settings else None
    is_averaged = averaging is not None and averaging.is_evaluated
    network = arrays["averaged"] if is_averaged else arrays
    return {name: network[name] for name in ("params", "model_state")}
