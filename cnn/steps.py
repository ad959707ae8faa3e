"""The pure training core: a state, a step that trains it and a step that scores it.

Everything a step needs (the model's apply function, the optimizer, the loss) rides in the
state as a static field, so the steps close over nothing: jit, vmap, scan, differentiate or
shard them as any function of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from cnn.blocks import Cut, map_blocks, sum_blocks
from cnn.metrics import Metrics

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

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """`float[B, K]`, `int[B]` -> `float[B]`. A label of K or more gives NaN, not an error."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if not self.label_smoothing:
            return losses
        uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
        return (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform


class TrainState(struct.PyTreeNode):
    """All that a training run carries from one step to the next.

    Attributes:
      step: `int32[]`, number of `train_step` calls so far.
      params: the model's parameters, float32.
      model_state: the model's other collections (say `batch_stats`); empty for `CNN`.
      opt_state: state of `tx`.
      key: the run's random key; that of step t, and on a CPU that of each part of the
        batch, are derived from it.
      apply_fn: the module's `apply`, called as `apply_fn(variables, image, train=...)`.
      tx: the optimizer.
      loss_fn: (logits `[B, K]`, labels `[B]`) -> losses `[B]`.
      lanes: the devices over which batches are spread, for `cnn.blocks`, which on a CPU works
        through a batch in parts. None: all that divide the batch; 0: in one part, for a model or
        a loss in which the images of a batch see each other.
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
      model: any linen module whose `__call__` takes `(image, train)` and returns logits.
      tx: an Optax optimizer.
      key: from `jax.random.key(seed)`.
      image_shape: (height, width, channels) of one image.
      loss_fn: per-example loss.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (32, 32, 3))
    >>> sum(leaf.size for leaf in jax.tree.leaves(state.params))
    167562
    """
    return _create_train_state(model, tx, key, tuple(image_shape), loss_fn)


# Compiled whole: operator by operator takes longer, and draws the same numbers.
@functools.partial(jax.jit, static_argnames=("model", "tx", "image_shape", "loss_fn"))
def _create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    loss_fn: LossFn,
) -> TrainState:
    init_key, run_key = jax.random.split(key)
    variables = dict(model.init(init_key, jnp.zeros((1, *image_shape)), train=False))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=tx.init(params),
        key=run_key,
        apply_fn=model.apply,
        tx=tx,
        loss_fn=loss_fn,
    )


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean loss of a batch.

    On a CPU it works through the batch in parts, unless the model has other collections (batch
    statistics, say) or native convolutions: see `cnn.blocks` and `TrainState.lanes`.

    Args:
      state: from `create_train_state`, or the step before.
      batch: `image` float32[B, H, W, C] (normalized), `label` int32[B].

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
    cut = Cut(1, 1)
    if not state.model_state:  # the statistics of a batch say: of a block they would be others
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        cut = Cut.of(batch["image"], state.lanes, num_params)
    image, label = batch["image"], batch["label"]
    places = jnp.arange(label.shape[0])
    (grads, metrics), model_state = sum_blocks(
        functools.partial(_gradients, state, batch_size=len(places)),
        ({"image": image, "label": label}, places),
        cut,
    )

    def update(grads: Any) -> Any:
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), model_state, opt_state

    finite = _is_finite(metrics.loss_sum, grads, in_one_piece=cut != (1, 1))
    metrics = jax.tree.map(lambda one: jnp.where(finite, one, 0), metrics)
    if state.skip_nonfinite:
        kept = (state.params, state.model_state, state.opt_state)
        params, model_state, opt_state = _if(finite, update, grads, kept)
    else:
        params, model_state, opt_state = update(grads)
    state = state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state
    )
    return state, metrics


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
    return jnp.isfinite(sum((jnp.vdot(part, part) for part in parts), loss))


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
    batch, places = examples
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), places[0])

    def share_of_mean_loss(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        logits, model_state = state.apply_fn(
            {"params": params, **state.model_state},
            batch["image"],
            train=True,
            mutable=list(state.model_state),
            rngs={"dropout": key},
        )
        losses = state.loss_fn(logits, batch["label"])
        metrics = Metrics.of(losses, logits, batch["label"])
        return losses.sum() / batch_size, (metrics, model_state)

    grads, (metrics, model_state) = jax.grad(share_of_mean_loss, has_aux=True)(state.params)
    return (grads, metrics), model_state


def train_steps(
    state: TrainState, batches: Batch, count: jax.Array | int
) -> tuple[TrainState, Metrics]:
    """`train_step` for each of several batches in turn, in one call, without the host in between.

    The same results, to rounding at most. On a CPU pass `count` traced; elsewhere rather as a
    static argument, as a loop whose end is not known makes a GPU wait for the host at each turn.
    There should be no native convolution in it on a CPU: see `cnn.blocks.has_convolution`.

    Args:
      state: from `create_train_state`, or the step before.
      batches: as for `train_step`, stacked: `image` float32[S, B, H, W, C], `label` int32[S, B].
      count: train on the first so many, 0 to S. If it is traced, fewer steps than before need
        not be compiled anew.

    Returns:
      The state after the last step, and metrics with leaves `[S]`: of each step, and zeros for
      those behind `count`.
    """
    shapes = jax.eval_shape(train_step, state, jax.tree.map(lambda x: x[0], batches))[1]
    steps = batches["label"].shape[0]
    metrics = jax.tree.map(lambda one: jnp.zeros((steps, *one.shape), one.dtype), shapes)

    def step(i: jax.Array, before: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = before
        state, now = train_step(state, jax.tree.map(lambda x: x[i], batches))
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
    logits = predict_step(state, batch["image"])
    losses = state.loss_fn(logits, batch["label"])
    return Metrics.of(losses, logits, batch["label"], batch.get("mask"))


def predict_step(state: TrainState, image: jax.Array) -> jax.Array:
    """The logits of some images, `float32[B, H, W, C]` (normalized) -> `float32[B, K]`.

    >>> from cnn import CNN
    >>> state = create_train_state(CNN(10), optax.adam(1e-3), jax.random.key(0), (28, 28, 1))
    >>> jax.jit(predict_step)(state, jnp.ones((4, 28, 28, 1))).shape
    (4, 10)
    """

    def logits(image: jax.Array) -> jax.Array:
        return state.apply_fn(state.variables, image, train=False)

    return map_blocks(logits, image, Cut.of(image, state.lanes))
