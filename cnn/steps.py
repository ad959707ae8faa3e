"""The pure training core: a state, a step that trains it and a step that scores it.

All that a step needs (the model's apply function, the optimizer, the loss) is a static field of the
state, so the steps close over nothing: jit, vmap, scan, differentiate or shard them like any
function of arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float

from cnn.arrays import AnyArray
from cnn.averaging import Averaging
from cnn.errors import UserError, array_type
from cnn.losses import CrossEntropy, LossFn, reduction_of
from cnn.metrics import (
    MetricFn,
    Metrics,
    accuracy,
    check_labels,
    check_logits,
    metric_names,
)
from cnn.ops import convolution, explicit_mesh, optax_update
from cnn.ops.linen_apply import (
    ModuleApply,
    as_before,
    carried_collections,
    hashable,
    random_streams,
    selected,
)
from cnn.ops.microbatch import (
    WHOLE,
    MicrobatchPlan,
    accumulate_microbatches,
    has_convolution,
    is_per_example,
    map_microbatches,
)
from cnn.ops.partial_grad import partial_grad

Batch = Mapping[str, AnyArray]
# (proxy, batch, step, key) -> (proxy, batch)
Selection = Callable[[Any, Batch, AnyArray, AnyArray], tuple[Any, Batch]]
# Of a batch of mixed images; all or none.
_MIXED = ("other_label", "label_weight")


class TrainState(struct.PyTreeNode):
    """All that a training run carries from one step to the next.

    Attributes:
      step: `int32[]`, the number of steps made.
      params: the model's parameters, float32.
      model_state: the model's other collections, such as `batch_stats`; empty for `CNN`.
      opt_state: the state of `tx`.
      key: the run's random key, from which the keys of a step are derived.
      apply_fn: called as `apply_fn(variables, image, train=...)`; see `cnn.ops.linen_apply`.
      tx: the optimizer.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`.
      metric_fns: (logits `float32[B, K]`, labels `int[B]`) -> values `[B]`, each.
      skip_nonfinite: whether a step changes nothing if its loss or gradients are not finite.
      averaging: keeps a running average of the weights; see `cnn.averaging`.
      averaged: that average, {"params": ..., "model_state": ...}; empty without `averaging`.
      selection: chooses the images of a batch that are trained on; see `cnn.selection`.
      proxy: what it chooses them with; empty without `selection`.
    """

    step: AnyArray
    params: Any
    model_state: Any
    opt_state: optax.OptState
    key: AnyArray
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    loss_fn: LossFn = struct.field(pytree_node=False)
    metric_fns: tuple[MetricFn, ...] = struct.field(pytree_node=False, default=(accuracy,))
    skip_nonfinite: bool = struct.field(pytree_node=False, default=False)
    averaging: Averaging | None = struct.field(pytree_node=False, default=None)
    averaged: Any = struct.field(default_factory=dict)
    selection: Selection | None = struct.field(pytree_node=False, default=None)
    proxy: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The first argument of `apply_fn` outside training: parameters and other collections.

        They are the averaged ones where the averaging is to be evaluated.
        """
        network = {"params": self.params, "model_state": self.model_state}
        if self.averaging is not None and self.averaging.is_evaluated:
            network = self.averaged
        return {"params": network["params"], **network["model_state"]}

    @property
    def arrays(self) -> dict[str, Any]:
        """What a checkpoint stores; the random key is not, as it follows from the config's seed."""
        return {
            "step": self.step,
            "params": self.params,
            "model_state": self.model_state,
            "opt_state": self.opt_state,
            **({"averaged": self.averaged} if self.averaging is not None else {}),
            **({"proxy": self.proxy} if self.selection is not None else {}),
        }


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: AnyArray,
    image_shape: tuple[int, int, int],
    *,
    loss_fn: LossFn = CrossEntropy(),
    metric_fns: tuple[MetricFn, ...] = (accuracy,),
    averaging: Averaging | None = None,
) -> TrainState:
    """Initializes a model and its optimizer. Pure: `vmap` it over `key` for many random seeds.

    Args:
      model: any linen module whose `__call__` takes `(image, train)`, or `(image)`, and returns
        logits. Running statistics, dropout and other random streams work; collections that it only
        sows are dropped. A class attribute `per_example = True` declares that its result for an
        image depends on no other image of the batch (apart from batch statistics in training); a
        CPU then trains and predicts faster, in microbatches.
      tx: any Optax optimizer; one that asks for `value`, `grad`, `value_fn`, `obj_fn` or `grad_fn`
        is given the loss of the batch (the mean, unless the loss declares a sum), its gradient, or
        functions of the parameters that compute them.
      key: from `jax.random.key(seed)`.
      image_shape: (H, W, C) of one image.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`, one for each image.
        It declares `per_example` like the model, and may declare `reduction = "sum"`.
      metric_fns: (logits `float32[B, K]`, labels `int[B]`) -> values `[B]`, each; see
        `cnn.metrics`.
      averaging: of the weights, such as `ExponentialMovingAverage(0.999)`; see `cnn.averaging`.

    Raises:
      UserError: if `train_step` cannot call the model or the optimizer, or the model does not
        return logits `[B, K]`.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (32, 32, 3))
    >>> sum(leaf.size for leaf in jax.tree.leaves(state.params))
    167562
    """
    static = static_arguments(model, tx, image_shape, loss_fn, metric_fns, averaging)
    return _jit_initialize(key, **static)


def static_arguments(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    loss_fn: LossFn,
    metric_fns: tuple[MetricFn, ...],
    averaging: Averaging | None = None,
) -> dict[str, Any]:
    """The arguments of `initialize` but for the key, in a form that `jit` can hash."""
    return {
        "apply_fn": ModuleApply(model),
        "tx": hashable(tx),
        "image_shape": tuple(image_shape),
        "loss_fn": hashable(loss_fn),
        "metric_fns": tuple(metric_fns),
        "averaging": averaging,
    }


def initialize(
    key: AnyArray,
    *,
    apply_fn: ModuleApply,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    loss_fn: LossFn,
    metric_fns: tuple[MetricFn, ...],
    averaging: Averaging | None,
) -> TrainState:
    """`create_train_state` for callers that jit it; `static_arguments` gives all but the key."""
    init_key, run_key = jax.random.split(key)
    image = jnp.zeros((1, *image_shape), jnp.float32)
    logits, collections = apply_fn.init(init_key, image)
    check_logits(logits, batch_size=1)
    params = collections.pop("params", {})
    if collections:
        pair = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        collections = carried_collections(apply_fn, params, collections, pair, run_key)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=collections,
        opt_state=optax_update.initial_state(tx, params),
        key=run_key,
        apply_fn=apply_fn,
        tx=tx,
        loss_fn=loss_fn,
        metric_fns=metric_fns,
        averaging=averaging,
    )
    return begin_averaging(as_before(state, state))  # strong types, as after a step


def begin_averaging(state: TrainState) -> TrainState:
    """The state with an average that begins with its present weights, where it averages at all."""
    if state.averaging is None:
        return state
    # Copies: a buffer that a state held twice could not be donated.
    copies = jax.tree.map(jnp.copy, {"params": state.params, "model_state": state.model_state})
    return state.replace(averaged=copies)


# Compiled whole: operator by operator takes longer, and draws the same numbers.
_jit_initialize = jax.jit(
    initialize,
    static_argnames=("apply_fn", "tx", "image_shape", "loss_fn", "metric_fns", "averaging"),
)


def _like_state(mesh: AbstractMesh, state: TrainState, _: Batch) -> Any:
    """The shardings of the next state and of metrics."""
    return explicit_mesh.like(state, mesh), explicit_mesh.replicated_over(mesh)


@explicit_mesh.automatic_axes(_like_state)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean loss of a batch, or the sum if the loss declares that.

    A CPU computes the gradients in microbatches where model and loss declare `per_example`, as
    `CNN` and `CrossEntropy` do: the same result up to rounding, see `cnn.ops.microbatch`.

    Args:
      state: from `create_train_state`, or the step before.
      batch: `image` float32[B, H, W, C] (normalized), `label` int32[B]. Of mixed images also
        `other_label` int32[B] and `label_weight` float32[B], w: the loss of an image is then w
        times that with `label` plus 1 - w times that with `other_label`. Metrics count `label`.

    Raises:
      UserError: while tracing, if labels are not `int[B]`, logits not `float[B, K]` or losses not
        `float[B]`; nothing is broadcast.

    Returns:
      The next state, and the metrics of this batch before the update. If the loss or the norm of
      the gradients is not finite, the metrics are zeros, `count` included, and with
      `state.skip_nonfinite` the state changes in nothing but its step.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> batch = {"image": jnp.ones((4, 28, 28, 1)), "label": jnp.arange(4)}
    >>> step = jax.jit(train_step)
    >>> state, before = step(state, batch)
    >>> state, after = step(state, batch)
    >>> int(state.step), bool(after.loss < before.loss)
    (2, True)
    """
    check_batch(batch)
    if state.selection is not None:
        proxy, batch = state.selection(state.proxy, batch, state.step, state.key)
        state = state.replace(proxy=proxy)
    batch_size = batch["label"].shape[0]

    divisor = _divisor(state, batch)

    def objective(params: Any, batch: Batch) -> tuple[jax.Array, tuple[Metrics, Any]]:
        losses, logits, model_state = forward_losses(state, params, batch)
        metrics = Metrics.from_logits(losses, logits, batch["label"], metric_fns=state.metric_fns)
        return losses.astype(jnp.float32).sum() / divisor, (metrics, model_state)

    grad = partial_grad(objective, state.tx, state.params, state.opt_state)

    def gradients(batch: Batch) -> tuple[Any, Metrics, Any]:
        grads, (metrics, model_state) = grad(batch)
        return grads, metrics, model_state

    # The whole batch at once, unless this is a CPU and model and loss declare `per_example`.
    plan = _gradient_plan(state, batch)
    index = jnp.arange(batch_size, dtype=jnp.int32)
    names = ("image", "label", *_MIXED)
    parts = {name: batch[name] for name in names if name in batch} | {"index": index}
    grads, metrics, model_state = accumulate_microbatches(gradients, parts, plan)
    finite = _is_finite(metrics.sums["loss"], grads, in_one_piece=plan != WHOLE)
    state = _apply_gradients(objective, state, batch, grads, metrics, model_state, where=finite)
    return state, jax.tree.map(lambda one: jnp.where(finite, one, 0), metrics)


def _divisor(state: TrainState, batch: Batch) -> int:
    """By which the sum of a batch's losses is divided to give the objective."""
    return batch["label"].shape[0] if reduction_of(state.loss_fn) == "mean" else 1


def forward_losses(
    state: TrainState, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array, Any]:
    """Losses `float[B]` and logits `float32[B, K]` in training, and the collections after it."""
    logits, model_state = _forward(state, params, batch)
    return _losses(state, logits, batch), logits, model_state


def _forward(state: TrainState, params: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """Logits `float32[B, K]` in training, and the mutable collections after the call."""
    # Each microbatch has its own key, made from the index of its first image.
    first = batch["index"][0] if "index" in batch else 0
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), first)
    logits, model_state = state.apply_fn(
        {"params": params, **state.model_state},
        batch["image"],
        train=True,
        mutable=list(state.model_state),
        rngs=random_streams(key),
    )
    check_logits(logits, batch["label"].shape[0])
    return logits.astype(jnp.float32), selected(model_state, state.model_state)


def _losses(state: TrainState, logits: jax.Array, batch: Batch) -> jax.Array:
    """The losses of images `float[B]`; of mixed ones those of both labels, by their weights."""
    losses = state.loss_fn(logits, batch["label"])
    if "other_label" not in batch or getattr(losses, "shape", None) != batch["label"].shape:
        return losses  # those of another shape are refused by `Metrics.from_logits`
    weight = jnp.asarray(batch["label_weight"])
    return weight * losses + (1 - weight) * state.loss_fn(logits, batch["other_label"])


def _gradient_plan(state: TrainState, batch: Batch) -> MicrobatchPlan:
    """How a CPU splits a batch; batch statistics must come from the whole of it."""
    if state.model_state or not is_per_example_state(state):
        return WHOLE
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return _microbatch_plan(state, batch["image"], num_params)


def _is_finite(loss: AnyArray, grads: Any, *, in_one_piece: bool) -> jax.Array:
    """`bool[]`: whether the loss and the squared norm of the gradients are finite.

    On a CPU a dot product takes half the time of `isfinite` on each number. It overflows for a norm
    above 1.8e19, which no optimizer could use.

    Args:
      loss: `float32[]`.
      grads: pytree.
      in_one_piece: whether they are slices of one array, as `accumulate_microbatches` returns them:
        one product is then enough.
    """
    parts = [ravel_pytree(grads)[0]] if in_one_piece else jax.tree.leaves(grads)
    # As float32 at least: the square of a float16 overflows at 256.
    wide = [part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in parts]
    return jnp.isfinite(sum((jnp.vdot(part, part).real for part in wide), loss))


def _apply_gradients(
    objective: Callable[..., Any],
    state: TrainState,
    batch: Batch,
    grads: Any,
    metrics: Metrics,
    model_state: Any,
    *,
    where: AnyArray,
) -> TrainState:
    """The state after the optimizer's update; with `skip_nonfinite` the old one unless `where`."""

    def update(grads: Any) -> Any:
        updates, opt_state = optax_update.update(
            state.tx,
            grads,
            state.opt_state,
            state.params,
            metrics.sums["loss"] / _divisor(state, batch),
            lambda params: objective(params, batch)[0],
        )
        network = {"params": optax.apply_updates(state.params, updates), "model_state": model_state}
        averaged = state.averaged
        if state.averaging is not None:
            averaged, network = state.averaging(averaged, network, state.step + 1)
        return {**network, "opt_state": as_before(opt_state, state.opt_state), "averaged": averaged}

    changed = ("params", "model_state", "opt_state", "averaged")
    if state.skip_nonfinite:
        kept = {name: getattr(state, name) for name in changed}
        return state.replace(step=state.step + 1, **_select_update(where, update, grads, kept))
    return state.replace(step=state.step + 1, **update(grads))


def _select_update(condition: AnyArray, update: Callable[[Any], Any], grads: Any, kept: Any) -> Any:
    """`update(grads)` if the condition holds, else `kept`."""
    if jax.default_backend() != "cpu":  # a GPU would wait for the host to take a branch
        return jax.tree.map(lambda new, old: jnp.where(condition, new, old), update(grads), kept)
    # With `where`, XLA computes the moments of an optimizer twice. A `cond` on the flat gradient
    # leaves the program of the update unchanged, bit for bit.
    flat, unravel = ravel_pytree(grads)
    return jax.lax.cond(condition, lambda flat: update(unravel(flat)), lambda flat: kept, flat)


def train_steps(
    state: TrainState, batches: Batch, num_steps: AnyArray | int
) -> tuple[TrainState, Metrics]:
    """`train_step` for each of several batches in turn, in one call, without the host in between.

    The results are the same up to rounding. On a CPU pass `num_steps` traced, so that fewer steps
    need no new compilation; elsewhere as a static argument, since a loop whose end is not known
    makes a GPU wait for the host at each turn. On a CPU there should be no native convolution in
    it: see `cnn.ops.microbatch.has_convolution`. `cnn.compile_train_steps` does all of this.

    Args:
      state: from `create_train_state`, or the step before.
      batches: as for `train_step`, stacked: `image` float32[S, B, H, W, C], `label` int32[S, B],
        and so on.
      num_steps: how many of the batches to train on, from the first on, 0 to S. More are an error
        if it is a number, and end with the last batch if it is traced.

    Raises:
      UserError: as for `train_step`, and for such a number of steps.

    Returns:
      The state after the last step, and metrics with leaves `[S]`: of each step, and zeros for
      those that were not made.
    """
    check_batch(batches, stacked=True)
    size = batches["label"].shape[0]
    if isinstance(num_steps, int | np.integer):  # static: a loop with a known end
        if not 0 <= num_steps <= size:
            raise UserError(
                f"num_steps={num_steps} must lie between 0 and the number of batches, {size}"
            )
    else:
        num_steps = jnp.minimum(num_steps, size)

    @explicit_mesh.automatic_axes(_like_state)
    def run(state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        def batch(i: AnyArray | int) -> Batch:
            return jax.tree.map(lambda x: x[i], dict(batches))

        # Computed from the arguments, so that within `shard_map` it varies over devices as the
        # metrics do.
        zero = 0 * (state.step + batches["label"][0, 0].astype(jnp.int32))
        none = jnp.zeros(size, jnp.int32) + zero
        names = ("loss", *metric_names(state.metric_fns))
        metrics = Metrics(sums=dict.fromkeys(names, none.astype(jnp.float32)), count=none)

        def step(i: AnyArray, before: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = before
            state, now = train_step(state, batch(i))
            return state, jax.tree.map(lambda filled, one: filled.at[i].set(one), metrics, now)

        return jax.lax.fori_loop(0, num_steps, step, (state, metrics))

    return run(state, batches)


def _replicated(mesh: AbstractMesh, *_: Any) -> Any:
    return explicit_mesh.replicated_over(mesh)


@explicit_mesh.automatic_axes(_replicated)
def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Scores a batch without changing the state.

    Args:
      state: whose parameters to score.
      batch: `image` and `label` as for `train_step`; an optional `mask` bool[B] marks the images
        that count, so that a padded last batch counts each image once.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> batch = {
    ...     "image": jnp.ones((4, 28, 28, 1)),
    ...     "label": jnp.arange(4),
    ...     "mask": jnp.array([True, True, True, False]),
    ... }
    >>> int(jax.jit(eval_step)(state, batch).count)
    3
    """
    check_batch(batch, is_trained=False)
    return score(state, _predict(state, batch["image"]), batch)


def score(state: TrainState, logits: Float[AnyArray, "B K"], batch: Batch) -> Metrics:
    """The metrics of logits, however they were computed.

    Args:
      state: has the loss and the metrics.
      logits: of the images.
      batch: as for `eval_step`; its images do not matter.

    Raises:
      UserError: while tracing, if labels, logits or losses have other shapes.
    """
    losses = state.loss_fn(logits, batch["label"])
    return Metrics.from_logits(
        losses, logits, batch["label"], batch.get("mask"), metric_fns=state.metric_fns
    )


@explicit_mesh.automatic_axes(lambda mesh, _, image: explicit_mesh.rows_like(image, mesh))
def predict_step(state: TrainState, image: Float[AnyArray, "B H W C"]) -> Float[Array, "B K"]:
    """The logits of normalized images.

    `jax.export` takes it for any platform, whatever the present one, and with a symbolic B.

    Raises:
      UserError: while tracing, if the model does not return `float[B, K]`.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> jax.jit(predict_step)(state, jnp.ones((4, 28, 28, 1))).shape
    (4, 10)
    """
    return _predict(state, image)


def _predict(state: TrainState, image: Any) -> jax.Array:
    def logits(image: AnyArray) -> jax.Array:
        logits = state.apply_fn(state.variables, image, train=False)
        check_logits(logits, image.shape[0])
        return logits.astype(jnp.float32)

    def on_cpu(image: AnyArray) -> jax.Array:
        plan = _microbatch_plan(state, image) if _is_per_example_model(state) else WHOLE
        return map_microbatches(logits, image, plan)

    def elsewhere(image: AnyArray) -> jax.Array:
        with convolution.native_operators():
            return logits(image)

    if jax.default_backend() != "cpu":
        return logits(image)
    # `jax.export` may trace here for a GPU or a TPU; the file then has their native operators.
    return jax.lax.platform_dependent(image, cpu=on_cpu, default=elsewhere)


def check_batch(batch: Any, *, stacked: bool = False, is_trained: bool = True) -> None:
    """Raises UserError unless a batch, or several stacked ones, have images and labels [B].

    Args:
      batch: as for `train_step`; with `stacked` as for `train_steps`.
      stacked: whether there is an axis of several batches.
      is_trained: whether it is to be trained on: it may then have no `mask`, but the labels of
        mixed images.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"a batch must be a dictionary with 'image' and 'label', not {type(batch).__name__}"
        )
    if missing := {"image", "label"} - batch.keys():
        raise UserError(f"the batch has no {missing.pop()!r}; it must have 'image' and 'label'")
    image, label = batch["image"], batch["label"]
    lead, letters = (2, "[S, B]") if stacked else (1, "[B]")
    if stacked and getattr(label, "ndim", None) != 2:
        raise UserError(
            f"labels of stacked batches must be integers [S, B], not {array_type(label)}"
        )
    check_labels(label[0] if stacked else label)
    if getattr(image, "shape", ())[:lead] != label.shape:
        raise UserError(
            f"images and labels must have the same leading axes {letters}, but are "
            f"{array_type(image)} and {array_type(label)}"
        )
    if 0 in label.shape:
        raise UserError(f"the batch is empty: images are {array_type(image)}")
    if is_trained and "mask" in batch:
        raise UserError(
            "train_step trains on every image of a batch: it takes no 'mask', which eval_step does"
        )
    if mixed := [name for name in _MIXED if name in batch]:
        _check_mixed(batch, mixed, label, is_trained=is_trained)


def _check_mixed(batch: Batch, names: list[str], label: AnyArray, *, is_trained: bool) -> None:
    """Raises UserError unless a batch that has some of the keys of mixed images is one of these."""
    if not is_trained:
        raise UserError(
            f"eval_step scores images as they are: it takes no {names[0]!r}, which train_step does"
        )
    if len(names) < len(_MIXED):
        raise UserError(
            f"the batch has {names[0]!r} only; mixed images need both 'other_label' and "
            "'label_weight'"
        )
    for name, kind, title in zip(names, (jnp.integer, jnp.floating), ("int", "float"), strict=True):
        array = batch[name]
        has_shape = getattr(array, "shape", None) == label.shape
        if not (has_shape and jnp.issubdtype(array.dtype, kind)):
            raise UserError(
                f"{name!r} must be {title}{list(label.shape)}, one for each image, not "
                f"{array_type(array)}"
            )


def is_per_example_state(state: TrainState) -> bool:
    """Whether model and loss both declare that they compute each image independently."""
    loss_fn = getattr(state.loss_fn, "wrapped", state.loss_fn)
    return _is_per_example_model(state) and is_per_example(loss_fn)


def _is_per_example_model(state: TrainState) -> bool:
    # `ModuleApply`, or a bound `module.apply` in a state that a script made by itself.
    fn = state.apply_fn
    return is_per_example(getattr(fn, "module", getattr(fn, "__self__", None)))


def _microbatch_plan(state: TrainState, image: AnyArray, num_params: int = 0) -> MicrobatchPlan:
    plan = MicrobatchPlan.for_batch(image, num_params)
    if plan != WHOLE and has_native_convolution(state, image.shape):
        return WHOLE
    return plan


def has_native_convolution(state: TrainState, shape: tuple[int, ...]) -> bool:
    """Whether the model computes a convolution other than as matrix products: see `cnn.ops`.

    Args:
      state: of the model.
      shape: of a batch of images.
    """
    leaves, structure = jax.tree.flatten(state.variables)
    types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return _has_native_convolution(state.apply_fn, structure, types, (1, *shape[1:]))


# Needed each time that a step of the same model is traced.
@functools.lru_cache(maxsize=64)
def _has_native_convolution(
    apply_fn: Callable[..., Any], structure: Any, types: Any, shape: tuple[int, ...]
) -> bool:
    variables = structure.unflatten([jax.ShapeDtypeStruct(*one) for one in types])
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return has_convolution(functools.partial(apply_fn, train=False), variables, image)
