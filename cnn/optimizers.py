"""Optax optimizers and learning-rate schedules, chosen by name.

A row of `OPTIMIZERS` or `SCHEDULES` makes one known to configs. The fields that a config may set
are the parameters of that function, and those that `create_optimizer` adds to every optimizer.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from cnn.errors import UserError
from cnn.registry import Schema, complete, schema, select

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Learning rates outside are 0 or infinite in float32.
_LEAST, _MOST = 1e-37, 1e38


def _cached(create: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes a function return the same object for equal arguments.

    Optimizers and schedules are closures, and closures compare by identity: with a new one for each
    of many runs, `jit` would compile the steps of each run anew.
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


def constant(learning_rate: float, num_updates: int) -> optax.Schedule:
    """The same learning rate for all updates."""
    del num_updates
    return optax.constant_schedule(learning_rate)


def linear(
    learning_rate: float, num_updates: int, final_lr_fraction: float = 0.0
) -> optax.Schedule:
    """Falls in a straight line to `final_lr_fraction * learning_rate` at `num_updates`."""
    return optax.linear_schedule(learning_rate, learning_rate * final_lr_fraction, num_updates)


def cosine(
    learning_rate: float, num_updates: int, final_lr_fraction: float = 0.0
) -> optax.Schedule:
    """Falls by half a cosine to `final_lr_fraction * learning_rate` at `num_updates`.

    Loshchilov & Hutter 2017, "SGDR", eq. 5.
    """
    return optax.cosine_decay_schedule(learning_rate, num_updates, alpha=final_lr_fraction)


def one_cycle(
    learning_rate: float,
    num_updates: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> optax.Schedule:
    """Rises by half a cosine, and falls by another to almost nothing.

    Smith & Topin 2019, "Super-convergence", with the shape and the defaults of PyTorch's
    `OneCycleLR`: the first update has `learning_rate / div_factor`, the last one that divided by
    `final_div_factor`. The peak is that of PyTorch where `pct_start * num_updates` is whole, and
    less than one update from it elsewhere. Momentum does not cycle.

    Args:
      learning_rate: the highest.
      num_updates: of the whole run.
      pct_start: the fraction of the updates until the peak.
      div_factor: the highest rate over that of the first update.
      final_div_factor: the rate of the first update over that of the last.

    Raises:
      UserError: a value out of its range.
    """
    if not 0 <= pct_start < 1:
        raise UserError(f"config field schedule.pct_start={pct_start} must be 0 or more, below 1")
    _check_range("schedule.div_factor", div_factor, 1, _MOST)
    _check_range("schedule.final_div_factor", final_div_factor, 1, _MOST)
    last = max(num_updates - 1, 1)  # counted from 0
    return optax.cosine_onecycle_schedule(
        last, learning_rate, pct_start, div_factor, final_div_factor
    )


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "one_cycle": one_cycle,
}


def schedule_schema(name: str) -> Schema:
    """The fields of a schedule; raises UserError for an unknown name."""
    return schema(select("schedule", SCHEDULES, name), without=("learning_rate", "num_updates"))


def schedule_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_schedule` takes of a config's section `schedule`: the name, and its own fields.

    Raises:
      UserError: an unknown name.
    """
    own = ("name", *schedule_schema(section["name"]))
    return {name: section[name] for name in own}


@_cached
def create_schedule(
    name: str,
    learning_rate: float,
    *,
    num_updates: int,
    warmup_updates: int = 0,
    **fields: Any,
) -> optax.Schedule:
    """A learning rate as a function of the number of updates made.

    It rises linearly from 0 to `learning_rate` in `warmup_updates`, and then follows the schedule.
    "one_cycle" takes no warm-up.

    Args:
      name: a row of `SCHEDULES`.
      learning_rate: the highest.
      num_updates: of the whole run, warm-up included.
      warmup_updates: how many of these are warm-up.
      **fields: of the schedule.

    Raises:
      UserError: an unknown name or field, or a value out of its range.

    >>> schedule = create_schedule("linear", 1.0, num_updates=10, warmup_updates=2)
    >>> [round(float(schedule(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    fields = complete("schedule", schedule_schema(name), fields)
    _check_range("optimizer.learning_rate", learning_rate, _LEAST, _MOST)
    if "final_lr_fraction" in fields:
        _check_range("schedule.final_lr_fraction", fields["final_lr_fraction"], 0, 1)
    if warmup_updates and SCHEDULES[name] is one_cycle:
        raise UserError(
            "schedule.warmup_epochs must be 0 with schedule.name=one_cycle, which has a rise of "
            "its own: set schedule.pct_start"
        )
    after = SCHEDULES[name](learning_rate, max(num_updates - warmup_updates, 1), **fields)
    if not warmup_updates:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_updates)
    return optax.join_schedules([warmup, after], [warmup_updates])


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, nesterov: bool = True
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""
    return optax.sgd(learning_rate, momentum, nesterov=nesterov)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lamb": optax.lamb,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "sgd": sgd,
}
# Decay rates of moving averages: at 1 and above nothing of the gradient would enter.
_DECAY_RATES = ("b1", "b2", "decay", "momentum")
# Labels of parameters, for `optax.partition`.
_TRAINED, _FROZEN = "trained", "frozen"


def optimizer_schema(name: str) -> Schema:
    """The fields of an optimizer; raises UserError for an unknown name."""
    own = schema(select("optimizer", OPTIMIZERS, name), without=("learning_rate", "mask"))
    common = schema(create_optimizer, without=("name", "learning_rate"))
    return {**own, **common}


@_cached
def create_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    grad_clip_norm: float = 0.0,
    grad_accumulation_steps: int = 1,
    freeze: Sequence[str] = (),
    **fields: Any,
) -> optax.GradientTransformation:
    """Builds an optimizer.

    Args:
      name: a row of `OPTIMIZERS`.
      learning_rate: a number, or a schedule over updates.
      weight_decay: of kernels only, not of biases and norms. Decoupled where the optimizer has
        weight decay of its own, such as "adamw" (Loshchilov & Hutter 2019); for the others it is
        the L2 term added to the gradient, as in PyTorch.
      grad_clip_norm: gradients of a larger global norm are scaled down to it; 0 does not clip.
      grad_accumulation_steps: the number of calls whose mean gradient makes one update.
      freeze: the parameters that are not trained: see `frozen`. They keep their bits, and clipping,
        weight decay and moments are those of the others. Running statistics, as those of batch
        normalization, are no parameters: they still follow the images.
      **fields: further parameters of the optimizer, such as `b1`.

    Raises:
      UserError: an unknown name or field, or a value out of its range; when the optimizer meets the
        parameters, also what `frozen` raises.

    >>> tx = create_optimizer("sgd", 0.1, momentum=0.5, weight_decay=5e-4)
    >>> head_only = create_optimizer("adam", 1e-3, freeze=("Conv_*", "Dense_0"))
    """
    common = {
        "weight_decay": weight_decay,
        "grad_clip_norm": grad_clip_norm,
        "grad_accumulation_steps": grad_accumulation_steps,
        "freeze": freeze,
    }
    checked = complete("optimizer", optimizer_schema(name), {**fields, **common})
    fields = {field: checked[field] for field in fields}
    _check_fields(checked)
    if isinstance(learning_rate, float | int):
        _check_range("optimizer.learning_rate", learning_rate, _LEAST, _MOST)
    build = OPTIMIZERS[name]
    parts = []
    if grad_clip_norm:
        parts.append(optax.clip_by_global_norm(grad_clip_norm))
    own = inspect.signature(build).parameters
    if {"weight_decay", "mask"} <= own.keys():
        fields.update(weight_decay=weight_decay, mask=_kernels)
    elif weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=_kernels))
    try:
        parts.append(build(learning_rate, **fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {name} cannot be built: {error}") from error
    tx = optax.chain(*parts)
    if grad_accumulation_steps > 1:
        tx = optax.MultiSteps(tx, grad_accumulation_steps).gradient_transformation()
    if checked["freeze"]:
        labels = functools.partial(_labels, patterns=checked["freeze"])
        tx = optax.partition({_TRAINED: tx, _FROZEN: _unchanged()}, labels)
    return tx


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Which parameters are frozen: a tree of booleans, like the parameters.

    Args:
      params: nested dictionaries of parameters.
      patterns: each is the path of a parameter, such as `Conv_0/kernel`, or of a module, such as
        `Conv_0`, which stands for all parameters in it; or a shell pattern of one, such as
        `*/bias`. An asterisk also stands for slashes.

    Raises:
      UserError: a pattern matches no parameter, or all are frozen.

    >>> params = {"Conv_0": {"bias": 1.0, "kernel": 2.0}, "Dense_0": {"bias": 3.0, "kernel": 4.0}}
    >>> frozen(params, ["Conv_0", "*/bias"])
    {'Conv_0': {'bias': True, 'kernel': True}, 'Dense_0': {'bias': True, 'kernel': False}}
    """
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    matched = {pattern: [_covers(pattern, path) for path in paths] for pattern in patterns}
    for pattern, matches in matched.items():
        if not any(matches):
            raise UserError(
                f"optimizer.freeze: {pattern!r} matches no parameter; {_near(pattern, paths)}"
            )
    mask = [any(one) for one in zip(*matched.values(), strict=True)]
    if mask and all(mask):
        raise UserError(
            f"optimizer.freeze={tuple(patterns)} freezes every parameter: nothing would be "
            f"trained; leave some out"
        )
    return jax.tree.unflatten(jax.tree.structure(params), mask or [False] * len(paths))


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern is, or matches, a path or one of the modules above it."""
    names = path.split("/")
    above = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
    return any(one == pattern or fnmatch.fnmatchcase(one, pattern) for one in above)


def _near(pattern: str, paths: Sequence[str], most: int = 8) -> str:
    """The paths that a person may have meant, for a message."""
    modules = [path.rpartition("/")[0] for path in paths]
    known = list(dict.fromkeys(filter(None, [*modules, *paths])))
    if near := difflib.get_close_matches(pattern, known, n=3):
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"there are {', '.join(paths[:most])}{more}"


def _labels(params: Any, patterns: Sequence[str]) -> Any:
    mask = frozen(params, patterns)
    return jax.tree.map(lambda is_frozen: _FROZEN if is_frozen else _TRAINED, mask)


def _unchanged() -> optax.GradientTransformation:
    """Updates of -0.0, the one number that changes no bit where it is added.

    `optax.set_to_zero` would turn a parameter of -0.0, as pruning leaves them, into 0.0.
    """
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
    )


def _kernels(params: Any) -> Any:
    """True for matrices and convolution kernels, to which weight decay applies."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _check_fields(fields: dict[str, Any]) -> None:
    _check_range("optimizer.weight_decay", fields["weight_decay"], 0, _MOST)
    _check_range("optimizer.grad_clip_norm", fields["grad_clip_norm"], 0, _MOST)
    _check_range("optimizer.grad_accumulation_steps", fields["grad_accumulation_steps"], 1, 2**31)
    for pattern in fields["freeze"]:
        if not pattern:
            raise UserError(
                f"config field optimizer.freeze={fields['freeze']!r} must hold paths of "
                f'parameters, such as "Conv_0"'
            )
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config field optimizer.{name}={value} must be finite")
        in_range = isinstance(value, int | float) and 0 <= value < 1
        if name in _DECAY_RATES and value is not None and not in_range:
            raise UserError(
                f"config field optimizer.{name}={value!r} must be at least 0 and below 1"
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"config field {name}={value} must lie between {low:g} and {high:g}")
