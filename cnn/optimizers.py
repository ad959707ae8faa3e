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
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from cnn.errors import UserError
from cnn.ops.partial_grad import PartialOptimizer
from cnn.registry import REQUIRED, Field, Schema, complete, schema, select

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
        named: Any = {name: _as_pairs(value) for name, value in kwargs.items()}
        try:
            hash((args, tuple(named.items())))
        except TypeError:  # a learning rate that is an array
            return create(*args, **kwargs)
        return cached(*args, **named)

    return reusing


def _as_pairs(value: Any) -> Any:
    """Dictionaries, also nested ones, as tuples of pairs, which can be hashed."""
    if not isinstance(value, Mapping):
        return value
    return tuple((name, _as_pairs(inner)) for name, inner in value.items())


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
    warmup_from: float = 0.0,
    **fields: Any,
) -> optax.Schedule:
    """A learning rate as a function of the number of updates made.

    It rises linearly from `warmup_from * learning_rate` to `learning_rate` in `warmup_updates`, and
    then follows the schedule. "one_cycle" takes no warm-up.

    Args:
      name: a row of `SCHEDULES`.
      learning_rate: the highest.
      num_updates: of the whole run, warm-up included.
      warmup_updates: how many of these are warm-up.
      warmup_from: the fraction of the highest rate that the first update has.
      **fields: of the schedule.

    Raises:
      UserError: an unknown name or field, or a value out of its range.

    >>> schedule = create_schedule("linear", 1.0, num_updates=10, warmup_updates=2)
    >>> [round(float(schedule(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    fields = complete("schedule", schedule_schema(name), fields)
    _check_range("optimizer.learning_rate", learning_rate, _LEAST, _MOST)
    _check_range("schedule.warmup_from", warmup_from, 0, 1)
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
    warmup = optax.linear_schedule(warmup_from * learning_rate, learning_rate, warmup_updates)
    return optax.join_schedules([warmup, after], [warmup_updates])


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, nesterov: bool = True
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""
    return optax.sgd(learning_rate, momentum, nesterov=nesterov)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    normalize_weights: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Momentum of which each matrix is replaced by a nearby orthogonal one.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A kernel
    `[..., K]` is a matrix with a column for each of K outputs; it moves by `learning_rate * max(1,
    K / rest) ** 0.5` times `orthogonalized(momentum)`. Parameters of one axis move as with "sgd".

    `optax.contrib.muon` differs from the CIFAR-10 recipe (KellerJordan/cifar10-airbench): its
    momentum is a mean corrected for its bias, in place of a sum, and it does not normalize weights.

    Args:
      learning_rate: a number, or a schedule.
      momentum: the part of the sum of gradients that remains.
      nesterov: whether the momentum looks ahead by one step.
      ns_steps: of `orthogonalized`.
      normalize_weights: whether each kernel is scaled to a norm of sqrt(K) before each update.
      weight_decay: decoupled.
      mask: of the parameters that decay.
    """

    def orthogonalize(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: orthogonalized(x, ns_steps) if x.ndim > 1 else x, updates)

    parts = [
        optax.trace(momentum, nesterov=nesterov),
        optax.stateless(orthogonalize),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(*parts, *([optax.stateless(_normalizing)] if normalize_weights else []))


def orthogonalized(x: jax.Array, num_iterations: int = 5) -> jax.Array:
    """U V^T, about, for a kernel U S V^T, times max(1, K / rest) ** 0.5: `float[..., K]`.

    Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T, whose coefficients raise
    small singular values fast and leave them between 0.7 and 1.2, in place of at 1 (Jordan et al.
    2024). The same as Optax's own, which is not public.

    >>> jnp.linalg.svd(orthogonalized(jnp.diag(jnp.array([0.1, 1.0, 2.0]))))[1].round(1)
    Array([1.1, 0.8, 0.7], dtype=float32)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    columns = x.shape[-1]
    matrix = x.reshape(-1, columns)
    rows = matrix.shape[0]
    scale = max(1.0, columns / rows) ** 0.5
    matrix = matrix.T if columns < rows else matrix  # the product A is of the shorter side
    matrix /= jnp.linalg.norm(matrix) + 1e-7
    for _ in range(num_iterations):
        square = matrix @ matrix.T
        matrix = a * matrix + (b * square + c * square @ square) @ matrix
    return scale * (matrix.T if columns < rows else matrix).reshape(x.shape)


def _normalizing(updates: Any, params: Any) -> Any:
    """Updates after which a kernel is what it would be if its norm had been sqrt(K) before."""

    def normalize(update: jax.Array, weight: jax.Array) -> jax.Array:
        if weight.ndim < 2:
            return update
        scale = weight.shape[-1] ** 0.5 / jnp.linalg.norm(weight.ravel())
        return update + (scale - 1) * weight

    return jax.tree.map(normalize, updates, params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lamb": optax.lamb,
    "lion": optax.lion,
    "muon": muon,
    "rmsprop": optax.rmsprop,
    "sgd": sgd,
}
# Decay rates of moving averages: at 1 and above nothing of the gradient would enter.
_DECAY_RATES = ("b1", "b2", "decay", "momentum")
# Labels of parameters, for `optax.partition`. A group of a config cannot have these names.
_TRAINED, _FROZEN, _OTHERS = "/trained", "/frozen", "/others"


def optimizer_schema(name: str) -> Schema:
    """The fields of an optimizer; raises UserError for an unknown name."""
    common = schema(create_optimizer, without=("name", "learning_rate", "groups"))
    return {**_own_schema(name), **common}


def group_schema(name: str) -> Schema:
    """The fields of a group of parameters with an optimizer of its own, but for name and rate.

    Raises:
      UserError: an unknown name.
    """
    common = schema(_create_group, without=("group", "name", "learning_rate", "num_updates"))
    params = Field(tuple, REQUIRED, "Patterns of their paths, as for `freeze`.", entries=str)
    return {**_own_schema(name), **common, "params": params}


def _own_schema(name: str) -> Schema:
    return schema(select("optimizer", OPTIMIZERS, name), without=("learning_rate", "mask"))


@_cached
def create_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    grad_clip_norm: float = 0.0,
    grad_accumulation_steps: int = 1,
    freeze: Sequence[str] = (),
    groups: Mapping[str, Mapping[str, Any]] | Sequence[Any] = (),
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
      groups: parameters with an optimizer of their own, by the name of the group. Of each the
        fields `params` (patterns, as for `freeze`), `name`, `learning_rate` and those of the
        optimizer; its `weight_decay` applies to all its parameters; with `num_updates` above 0
        they are frozen after so many.
      **fields: further parameters of the optimizer, such as `b1`.

    Raises:
      UserError: an unknown name or field, or a value out of its range; when the optimizer meets the
        parameters, also what `frozen` raises, and if two groups claim one parameter.

    >>> tx = create_optimizer("sgd", 0.1, momentum=0.5, weight_decay=5e-4)
    >>> head_only = create_optimizer("adam", 1e-3, freeze=("Conv_*", "Dense_0"))
    >>> slow = {"params": ("*/bias",), "name": "sgd", "learning_rate": 0.01}
    >>> slow_biases = create_optimizer("adam", 1e-3, groups={"biases": slow})
    """
    groups = {group: dict(fields) for group, fields in dict(groups).items()}
    common = {
        "weight_decay": weight_decay,
        "grad_clip_norm": grad_clip_norm,
        "grad_accumulation_steps": grad_accumulation_steps,
        "freeze": freeze,
    }
    checked = complete("optimizer", optimizer_schema(name), {**fields, **common})
    fields = {field: checked[field] for field in fields}
    _check_fields("optimizer", checked)
    parts = [optax.clip_by_global_norm(grad_clip_norm)] if grad_clip_norm else []
    own = _chain_of("optimizer", name, learning_rate, weight_decay, fields, mask=_kernels)
    if groups:
        built: dict[Any, optax.GradientTransformation] = {_OTHERS: optax.chain(*own)}
        built |= {group: _create_group(group, **fields) for group, fields in groups.items()}
        patterns = {group: fields["params"] for group, fields in groups.items()}
        own = [optax.partition(built, functools.partial(_group_labels, patterns=patterns))]
    tx = optax.chain(*parts, *own)
    if grad_accumulation_steps > 1:
        tx = optax.MultiSteps(tx, grad_accumulation_steps).gradient_transformation()
    if checked["freeze"]:
        labels = functools.partial(_labels, patterns=checked["freeze"])
        tx = optax.partition({_TRAINED: tx, _FROZEN: _unchanged()}, labels)
    # Clipping takes the norm of all gradients, of groups that no longer move too.
    ending = {} if grad_clip_norm else {k: g for k, g in groups.items() if g.get("num_updates")}
    if not checked["freeze"] and not ending:
        return tx
    unused = functools.partial(_unused, freeze=checked["freeze"], groups=ending)
    return PartialOptimizer(*optax.with_extra_args_support(tx), unused)


def _create_group(
    group: str,
    *,
    params: Sequence[str],
    name: str,
    learning_rate: float | optax.Schedule,
    weight_decay: float = 0.0,
    num_updates: int = 0,
    **fields: Any,
) -> optax.GradientTransformation:
    """The optimizer of a group: see `create_optimizer`."""
    title = f"optimizer.groups.{group}"
    given = {"params": params, "weight_decay": weight_decay, **fields}
    checked = complete(title, group_schema(name), given)
    _check_fields(title, checked)
    if not params:
        raise UserError(f"config field {title}.params is empty: it must name parameters")
    fields = {field: checked[field] for field in fields}
    tx = optax.chain(*_chain_of(title, name, learning_rate, weight_decay, fields, mask=None))
    return _until(tx, num_updates) if num_updates else tx


def _chain_of(
    title: str,
    name: str,
    learning_rate: float | optax.Schedule,
    weight_decay: float,
    fields: dict[str, Any],
    mask: Any,
) -> list[optax.GradientTransformation]:
    """An optimizer, after the L2 term where it has no weight decay of its own.

    Args:
      title: of the section, for messages.
      name: a row of `OPTIMIZERS`.
      learning_rate: a number, or a schedule.
      weight_decay: see `create_optimizer`.
      fields: of the optimizer.
      mask: of the parameters that decay.
    """
    if isinstance(learning_rate, float | int):
        _check_range(f"{title}.learning_rate", learning_rate, _LEAST, _MOST)
    build, parts = OPTIMIZERS[name], []
    if {"weight_decay", "mask"} <= inspect.signature(build).parameters.keys():
        fields = {**fields, "weight_decay": weight_decay, "mask": mask}
    elif weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
    try:
        return [*parts, build(learning_rate, **fields)]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {name} cannot be built: {error}") from error


class _UntilState(NamedTuple):
    num_updates: jax.Array
    inner: optax.OptState


def _is_until_state(node: Any) -> bool:
    return isinstance(node, _UntilState)


def _until(tx: optax.GradientTransformation, num_updates: int) -> optax.GradientTransformation:
    """An optimizer that makes some updates, and then changes neither parameters nor its state."""

    def init(params: Any) -> Any:
        return _UntilState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        after, inner = optax.with_extra_args_support(tx).update(
            updates, state.inner, params, **extra
        )
        is_trained = state.num_updates < num_updates
        after = jax.tree.map(lambda new: jnp.where(is_trained, new, -0.0), after)
        inner = jax.tree.map(lambda a, b: jnp.where(is_trained, a, b), inner, state.inner)
        return after, _UntilState(jnp.minimum(state.num_updates + 1, num_updates), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _unused(
    params: Any, opt_state: Any, *, freeze: Sequence[str], groups: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Which gradients updates do not use: see `PartialOptimizer`.

    Args:
      params: the parameters.
      opt_state: holds the states of the groups, somewhere within.
      freeze: the patterns of parameters that are never trained.
      groups: those that are frozen after some updates.
    """
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_until_state)
    has_ended = {
        group: node.num_updates >= fields["num_updates"]
        for group, fields in groups.items()
        for path, node in nodes
        if _is_until_state(node) and jax.tree_util.DictKey(group) in path
    }

    def of(path: str) -> bool | jax.Array:
        if covers(freeze, path):
            return True
        own = (group for group, fields in groups.items() if covers(fields["params"], path))
        return next((has_ended[group] for group in own), False)

    return jax.tree.unflatten(jax.tree.structure(params), [of(path) for path in _paths(params)])


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
    mask = _matches("optimizer.freeze", patterns, _paths(params))
    if mask and all(mask):
        raise UserError(
            f"optimizer.freeze={tuple(patterns)} freezes every parameter: nothing would be "
            f"trained; leave some out"
        )
    return jax.tree.unflatten(jax.tree.structure(params), mask)


def _group_labels(params: Any, patterns: Mapping[str, Sequence[str]]) -> Any:
    """The name of each parameter's group."""
    paths = _paths(params)
    labels = [_OTHERS] * len(paths)
    for group, own in patterns.items():
        for place, is_in in enumerate(_matches(f"optimizer.groups.{group}.params", own, paths)):
            if is_in and labels[place] != _OTHERS:
                raise UserError(
                    f"optimizer.groups.{labels[place]} and optimizer.groups.{group} both hold "
                    f"{paths[place]}: a parameter has one optimizer"
                )
            labels[place] = group if is_in else labels[place]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _paths(params: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def _matches(field: str, patterns: Sequence[str], paths: Sequence[str]) -> list[bool]:
    """Which paths a field's patterns cover; raises UserError for a pattern that covers none."""
    covered = {pattern: [covers([pattern], path) for path in paths] for pattern in patterns}
    for pattern, matches in covered.items():
        if not any(matches):
            raise UserError(f"{field}: {pattern!r} matches no parameter; {_near(pattern, paths)}")
    return [any(one) for one in zip(*covered.values(), strict=True)] or [False] * len(paths)


def covers(patterns: Sequence[str], path: str) -> bool:
    """Whether one of the patterns is, or matches, a path or one of the modules above it."""
    names = path.split("/")
    above = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
    return any(
        one == pattern or fnmatch.fnmatchcase(one, pattern) for pattern in patterns for one in above
    )


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


def _check_fields(title: str, fields: dict[str, Any]) -> None:
    """Raises UserError for a value out of its range.

    Args:
      title: the section that has the fields.
      fields: with all that the optimizer has.
    """
    limits = {
        "weight_decay": (0, _MOST),
        "grad_clip_norm": (0, _MOST),
        "grad_accumulation_steps": (1, 2**31),
        "ns_steps": (1, 100),
    }
    for name, (low, high) in limits.items():
        if name in fields:
            _check_range(f"{title}.{name}", fields[name], low, high)
    for name in ("freeze", "params"):
        if not all(fields.get(name, ())):
            raise UserError(
                f"config field {title}.{name}={fields[name]!r} must hold paths of parameters, "
                f'such as "Conv_0"'
            )
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config field {title}.{name}={value} must be finite")
        in_range = isinstance(value, int | float) and 0 <= value < 1
        if name in _DECAY_RATES and value is not None and not in_range:
            raise UserError(f"config field {title}.{name}={value!r} must be at least 0 and below 1")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"config field {name}={value} must lie between {low:g} and {high:g}")
