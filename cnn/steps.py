"""The pure training core: a state, a step that trains it and a step that scores it.

Everything a step needs (the model's apply function, the optimizer, the loss) rides in the
state as a static field, so the steps close over nothing: jit, vmap, scan, differentiate or
shard them as any function of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh

from cnn.errors import UserError
from cnn.metrics import Metrics, check_labels, check_logits, shown
from cnn.ops import convolution, explicit_mesh
from cnn.ops.linen_apply import (
    ModuleApply,
    as_before,
    carried_collections,
    hashable,
    random_streams,
    selected,
)
from cnn.ops.microbatch import Cut, has_convolution, is_per_example, map_blocks, sum_blocks

Batch = Mapping[str, jax.Array]
LossFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with integer labels, per example, in nats.

    With smoothing s over K classes the target is (1 - s) * onehot + s / K (Szegedy et al.
    2016, "Rethinking the Inception Architecture", section 7). A value, not a closure: equal
    settings compare equal, so `jit` does not compile twice.

    >>> CrossEntropy()(jnp.zeros((2, 10)), jnp.array([3, 7]))  # log(10)
    Array([2.3025851, 2.3025851], dtype=float32)
    """

    label_smoothing: float = 0.0
    per_example: ClassVar[bool] = True

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """`float[B, K]`, `int[B]` -> `float32[B]`. A label outside 0..K-1 gives NaN."""
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform
        # Indexing would take a negative label for a class counted from the end. K may be more than
        # a short type of labels holds.
        wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
        return jnp.where((wide >= 0) & (wide < logits.shape[-1]), losses, jnp.nan)


class TrainState(struct.PyTreeNode):
    """All that a training run carries from one step to the next.

    Attributes:
      step: `int32[]`, number of `train_step` calls so far.
      params: the model's parameters, float32.
      model_state: the model's other collections (say `batch_stats`); empty for `CNN`.
      opt_state: state of `tx`.
      key: the run's random key; that of step t, and on a CPU that of each part of the
        batch, are derived from it.
      apply_fn: the module's `apply`, called as `apply_fn(variables, image, train=...)`; see
        `cnn.ops.linen_apply.ModuleApply`.
      tx: the optimizer.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`.
      lanes: the number of devices over which batches are sharded, for `cnn.ops.microbatch`, which on a CPU
        cuts the batch where model and loss declare that they treat each image for itself. None:
        all devices that divide the batch; 0: never cut.
      skip_nonfinite: whether a step whose loss or gradients are not finite numbers is left out.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: optax.OptState
    key: jax.Array
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    loss_fn: LossFn = struct.field(pytree_node=False)
    lanes: int | None = struct.field(pytree_node=False, default=None)
    skip_nonfinite: bool = struct.field(pytree_node=False, default=False)

    @property
    def variables(self) -> dict[str, Any]:
        """What `apply_fn` takes first: the parameters and the other collections."""
        return {"params": self.params, **self.model_state}

    @property
    def arrays(self) -> dict[str, Any]:
        """What a checkpoint stores. The random key is not: it follows from the config's seed."""
        return {
            "step": self.step,
            "params": self.params,
            "model_state": self.model_state,
            "opt_state": self.opt_state,
        }


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    *,
    loss_fn: LossFn = CrossEntropy(),
) -> TrainState:
    """Initializes a model and its optimizer. Pure: `vmap` it over `key` for many seeds.

    Args:
      model: any linen module whose `__call__` takes `(image, train)`, or `(image)`, and returns
        logits. Running statistics, dropout and other random streams work; what it only sows is
        dropped. With an attribute `per_example = True` of its class it declares that its result for
        an image depends on no other image of the batch (apart from batch statistics in training);
        a CPU then trains and predicts faster, in blocks.
      tx: any Optax optimizer; those that ask for `value`, `grad`, `value_fn`, `obj_fn` or `grad_fn`
        are given the mean loss of the batch, its gradient, or functions of the parameters that
        compute them.
      key: from `jax.random.key(seed)`.
      image_shape: (height, width, channels) of one image.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`, one for each image.
        It declares `per_example` like the model.

    Raises:
      UserError: if `train_step` cannot call the model or the optimizer, or the model does not
        return logits `[B, K]`.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (32, 32, 3))
    >>> sum(leaf.size for leaf in jax.tree.leaves(state.params))
    167562
    """
    apply_fn, shape = ModuleApply(model), tuple(image_shape)
    return _create_train_state(apply_fn, hashable(tx), key, shape, hashable(loss_fn))


# Compiled whole: operator by operator takes longer, and draws the same numbers.
@functools.partial(jax.jit, static_argnames=("apply_fn", "tx", "image_shape", "loss_fn"))
def _create_train_state(
    apply_fn: ModuleApply,
    tx: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    loss_fn: LossFn,
) -> TrainState:
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
        opt_state=_initial_opt_state(tx, params),
        key=run_key,
        apply_fn=apply_fn,
        tx=tx,
        loss_fn=loss_fn,
    )
    return as_before(state, state)  # strong types, as after a step


def _initial_opt_state(tx: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The optimizer's state; raises UserError if `train_step` could not go on with it."""

    def update(params: Any, opt_state: Any) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        loss = jnp.zeros((), jnp.float32)
        return _update(tx, grads, opt_state, params, loss, lambda _: loss)[1]

    try:
        opt_state = tx.init(params)
        after = jax.eval_shape(update, params, opt_state)
    except Exception as error:  # of any kind, from any optimizer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"train_step cannot use the optimizer {_title(tx)}: {reason}") from error
    if jax.tree.structure(opt_state) != jax.tree.structure(after):
        raise UserError(
            f"train_step cannot use the optimizer {_title(tx)}: an update changes the structure of "
            f"its state"
        )
    return opt_state


def _title(tx: optax.GradientTransformation) -> str:
    """What to call an optimizer in a message: the function that made it, as a rule."""
    return getattr(tx.update, "__qualname__", type(tx).__name__).partition(".<locals>")[0]


def _update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    params: Any,
    loss: jax.Array,
    loss_of: Callable[[Any], jax.Array],
) -> tuple[Any, optax.OptState]:
    """`tx.update`, with Optax's extra arguments for those that take them.

    Args:
      tx: the optimizer.
      grads: of the mean loss.
      opt_state: the state of `tx`.
      params: the parameters.
      loss: `float32[]`, the mean loss.
      loss_of: from parameters to the mean loss of this batch.
    """
    known = inspect.signature(tx.update).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())

    def value_fn(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        del obj_fn, grad_fn  # a line search passes on what it does not know itself
        return loss_of(params)

    extra: dict[str, Any] = {
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": loss_of,
        "grad_fn": lambda params, *_: jax.grad(loss_of)(params),
    }
    extra = {name: value for name, value in extra.items() if takes_all or name in known}
    return tx.update(grads, opt_state, params, **extra)


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean loss of a batch.

    On a CPU it works through the batch in blocks where model and loss declare that they treat each
    image for itself, as `CNN` and `CrossEntropy` do: see `cnn.ops.microbatch`. The result is the same, to
    rounding.

    Args:
      state: from `create_train_state`, or the step before.
      batch: `image` float32[B, H, W, C] (normalized), `label` int32[B].

    Raises:
      UserError: while tracing, if labels are not `int[B]`, logits not `float[B, K]` or losses not
        `float[B]`; nothing is broadcast.

    Returns:
      The next state, and the metrics of this batch before the update. If the loss or the norm of
      the gradients is not a finite number, the metrics are zeros (a `count` of 0 tells) and, with
      `state.skip_nonfinite`, nothing of the state changes but the step.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> batch = {"image": jnp.ones((4, 28, 28, 1)), "label": jnp.arange(4)}
    >>> step = jax.jit(train_step)
    >>> state, before = step(state, batch)
    >>> state, after = step(state, batch)
    >>> int(state.step), bool(after.loss < before.loss)
    (2, True)
    """
    _check_batch(batch)

    return explicit_mesh.with_automatic_axes(_train_step, _shardings(state), state, dict(batch))


def _shardings(state: TrainState) -> Callable[[AbstractMesh], Any]:
    """Of the next state, sharded as this one, and of the metrics, on a mesh."""
    return lambda mesh: (explicit_mesh.like(state, mesh), explicit_mesh.replicated_over(mesh))


def _train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    # Batch statistics are those of the whole batch, so a model that has any is not cut.
    is_cut = not state.model_state and is_per_example_state(state)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    cut = _cut(state, batch["image"], num_params) if is_cut else Cut(1, 1)
    image, label = batch["image"], batch["label"]
    batch_size = label.shape[0]
    places = jnp.arange(batch_size, dtype=jnp.int32)
    examples = ({"image": image, "label": label}, places)
    (grads, metrics), model_state = sum_blocks(
        functools.partial(_gradients, state, batch_size=batch_size), examples, cut
    )

    def mean_loss(params: Any) -> jax.Array:
        return _share_of_mean_loss(state, params, examples, batch_size)[0]

    def update(grads: Any) -> Any:
        loss = metrics.loss_sum / batch_size
        updates, opt_state = _update(
            state.tx, grads, state.opt_state, state.params, loss, mean_loss
        )
        params = optax.apply_updates(state.params, updates)
        return params, model_state, as_before(opt_state, state.opt_state)

    finite = _is_finite(metrics.loss_sum, grads, in_one_piece=cut != (1, 1))
    counted = jax.tree.map(lambda one: jnp.where(finite, one, 0), metrics)
    if state.skip_nonfinite:
        kept = (state.params, state.model_state, state.opt_state)
        params, model_state, opt_state = _if(finite, update, grads, kept)
    else:
        params, model_state, opt_state = update(grads)
    state = state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state
    )
    return state, counted


def _check_batch(batch: Batch, *, stacked: bool = False, is_trained: bool = True) -> None:
    """Raises UserError unless a batch, or several stacked ones, have images and labels [B]."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"a batch must be a dictionary with 'image' and 'label', not {type(batch).__name__}"
        )
    if missing := {"image", "label"} - batch.keys():
        raise UserError(f"the batch has no {missing.pop()!r}; it must have 'image' and 'label'")
    image, label = batch["image"], batch["label"]
    lead, letters = (2, "[S, B]") if stacked else (1, "[B]")
    if stacked and getattr(label, "ndim", None) != 2:
        raise UserError(f"labels of stacked batches must be integers [S, B], not {shown(label)}")
    check_labels(label[0] if stacked else label)
    if getattr(image, "shape", ())[:lead] != label.shape:
        raise UserError(
            f"images and labels must have the same leading axes {letters}, but are {shown(image)} "
            f"and {shown(label)}"
        )
    if 0 in label.shape:
        raise UserError(f"the batch is empty: images are {shown(image)}")
    if is_trained and "mask" in batch:
        raise UserError(
            "train_step trains on every image of a batch: it takes no 'mask', which eval_step does"
        )


def is_per_example_state(state: TrainState) -> bool:
    """Whether model and loss declare that they treat each image for itself."""
    loss_fn = getattr(state.loss_fn, "wrapped", state.loss_fn)
    return _is_per_example_model(state) and is_per_example(loss_fn)


def _cut(state: TrainState, image: jax.Array, num_params: int = 0) -> Cut:
    """How to cut a batch for a model that treats each image for itself."""
    cut = Cut.of(image, state.lanes, num_params)
    if cut != (1, 1) and has_native_convolution(state, image.shape):
        return Cut(1, 1)
    return cut


def has_native_convolution(state: TrainState, shape: tuple[int, ...]) -> bool:
    """Whether the model computes a convolution other than as matrix products: see `cnn.ops.microbatch`.

    Args:
      state: whose model.
      shape: of a batch of images.
    """
    leaves, structure = jax.tree.flatten(state.variables)
    types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return _has_native_convolution(state.apply_fn, structure, types, (1, *shape[1:]))


# Asked for each time that a step is traced, of the same model.
@functools.lru_cache(maxsize=64)
def _has_native_convolution(
    apply_fn: Callable[..., Any], structure: Any, types: Any, shape: tuple[int, ...]
) -> bool:
    variables = structure.unflatten([jax.ShapeDtypeStruct(*one) for one in types])
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return has_convolution(functools.partial(apply_fn, train=False), variables, image)


def _is_per_example_model(state: TrainState) -> bool:
    # `ModuleApply`, or a bound `module.apply` in a state that somebody made without us.
    fn = state.apply_fn
    return is_per_example(getattr(fn, "module", getattr(fn, "__self__", None)))


def _is_finite(loss: jax.Array, grads: Any, *, in_one_piece: bool) -> jax.Array:
    """`bool[]`: whether the loss and the norm of the gradients are finite numbers.

    The squared norm, as a product: on a CPU half the time of looking at each number. It is infinite
    for a finite gradient of more than 1.8e19, with which no optimizer could do anything.

    Args:
      loss: `float32[]`.
      grads: pytree.
      in_one_piece: whether it was cut from one array, as by `sum_blocks`: one product does.
    """
    parts = [ravel_pytree(grads)[0]] if in_one_piece else jax.tree.leaves(grads)
    # As float32 at least: the square of a float16 overflows at 256.
    wide = [part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in parts]
    return jnp.isfinite(sum((jnp.vdot(part, part).real for part in wide), loss))


def _if(condition: jax.Array, update: Callable[[Any], Any], grads: Any, kept: Any) -> Any:
    """`update(grads)` if the condition holds, else `kept`."""
    if jax.default_backend() != "cpu":  # a GPU would wait for the host to take a branch
        return jax.tree.map(lambda new, old: jnp.where(condition, new, old), update(grads), kept)
    # To choose between arrays, XLA would compute an optimizer's moments twice; with a branch on one
    # flat gradient the update is the same program as without, to the bit.
    flat, unravel = ravel_pytree(grads)
    return jax.lax.cond(condition, lambda flat: update(unravel(flat)), lambda flat: kept, flat)


def _gradients(
    state: TrainState, examples: tuple[Batch, jax.Array], *, batch_size: int
) -> tuple[tuple[Any, Metrics], Any]:
    """What some examples of a batch, and their places in it, add to its gradients and metrics.

    Other collections, as the module changed them, come back too.
    """

    def share(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        return _share_of_mean_loss(state, params, examples, batch_size)

    grads, (metrics, model_state) = jax.grad(share, has_aux=True)(state.params)
    return (grads, metrics), model_state


def _share_of_mean_loss(
    state: TrainState, params: Any, examples: tuple[Batch, jax.Array], batch_size: int
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """The sum of the losses of some examples over the batch size, their metrics, and statistics."""
    batch, places = examples
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), places[0])
    logits, model_state = state.apply_fn(
        {"params": params, **state.model_state},
        batch["image"],
        train=True,
        mutable=list(state.model_state),
        rngs=random_streams(key),
    )
    check_logits(logits, batch["label"].shape[0])
    logits = logits.astype(jnp.float32)
    losses = state.loss_fn(logits, batch["label"])
    metrics = Metrics.of(losses, logits, batch["label"])
    losses = losses.astype(jnp.float32)
    return losses.sum() / batch_size, (metrics, selected(model_state, state.model_state))


def train_steps(
    state: TrainState, batches: Batch, count: jax.Array | int
) -> tuple[TrainState, Metrics]:
    """`train_step` for each of several batches in turn, in one call, without the host in between.

    The same results, to rounding at most. On a CPU pass `count` traced; elsewhere rather as a
    static argument, as a loop whose end is not known makes a GPU wait for the host at each turn.
    There should be no native convolution in it on a CPU: see `cnn.ops.microbatch.has_convolution`.

    Args:
      state: from `create_train_state`, or the step before.
      batches: as for `train_step`, stacked: `image` float32[S, B, H, W, C], `label` int32[S, B].
      count: the number of batches to train on, 0 to S, from the first on. More are an error if it
        is a number, and end with the last batch if it is traced. If it is traced, fewer steps than
        before need not be compiled anew.

    Raises:
      UserError: as for `train_step`, and for such a count.

    Returns:
      The state after the last step, and metrics with leaves `[S]`: of each step, and zeros for
      those behind `count`.
    """
    _check_batch(batches, stacked=True)
    steps = batches["label"].shape[0]
    if isinstance(count, int | np.integer):  # static: a loop with a known end
        if not 0 <= count <= steps:
            raise UserError(f"count={count} must lie between 0 and the number of batches, {steps}")
    else:
        count = jnp.minimum(count, steps)

    run = functools.partial(_train_steps, count=count)
    return explicit_mesh.with_automatic_axes(run, _shardings(state), state, dict(batches))


def _train_steps(
    state: TrainState, batches: Batch, *, count: jax.Array | int
) -> tuple[TrainState, Metrics]:
    def batch(i: jax.Array | int) -> Batch:
        return jax.tree.map(lambda x: x[i], batches)

    steps = batches["label"].shape[0]
    # Made of the arguments: within `shard_map` it varies over the devices, as the metrics will.
    zero = 0 * (state.step + batches["label"][0, 0].astype(jnp.int32))
    none = jnp.zeros(steps, jnp.int32) + zero
    metrics = Metrics(loss_sum=none.astype(jnp.float32), correct=none, count=none)

    def step(i: jax.Array, before: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = before
        state, now = _train_step(state, batch(i))
        return state, jax.tree.map(lambda filled, one: filled.at[i].set(one), metrics, now)

    return jax.lax.fori_loop(0, count, step, (state, metrics))


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Scores a batch without changing the state.

    Args:
      state: whose parameters to score.
      batch: as for `train_step`; an optional `mask` bool[B] marks the examples that count,
        so that a padded last batch counts each image once.

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
    _check_batch(batch, is_trained=False)

    def score(state: TrainState, batch: Batch) -> Metrics:
        logits = _predict_step(state, batch["image"])
        losses = state.loss_fn(logits, batch["label"])
        return Metrics.of(losses, logits, batch["label"], batch.get("mask"))

    return explicit_mesh.with_automatic_axes(
        score, explicit_mesh.replicated_over, state, dict(batch)
    )


def predict_step(state: TrainState, image: jax.Array) -> jax.Array:
    """The logits of some images, `float32[B, H, W, C]` (normalized) -> `float32[B, K]`.

    `jax.export` takes it for any platform, whatever the present one, and with a symbolic B.

    Raises:
      UserError: while tracing, if the model does not return `float[B, K]`.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> jax.jit(predict_step)(state, jnp.ones((4, 28, 28, 1))).shape
    (4, 10)
    """

    def shardings(mesh: AbstractMesh) -> Any:
        return explicit_mesh.rows_like(image, mesh)

    return explicit_mesh.with_automatic_axes(_predict_step, shardings, state, image)


def _predict_step(state: TrainState, image: jax.Array) -> jax.Array:
    def logits(image: jax.Array) -> jax.Array:
        logits = state.apply_fn(state.variables, image, train=False)
        check_logits(logits, image.shape[0])
        return logits.astype(jnp.float32)

    def on_cpu(image: jax.Array) -> jax.Array:
        cut = _cut(state, image) if _is_per_example_model(state) else Cut(1, 1)
        return map_blocks(logits, image, cut)

    def elsewhere(image: jax.Array) -> jax.Array:
        with convolution.native_operators():
            return logits(image)

    if jax.default_backend() != "cpu":
        return logits(image)
    # The file that `jax.export` makes here for a GPU or a TPU is to hold their operators.
    return jax.lax.platform_dependent(image, cpu=on_cpu, default=elsewhere)
