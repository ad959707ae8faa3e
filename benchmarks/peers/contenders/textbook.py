"""Flax as its guides show it: `nn.Conv`, `nn.max_pool`, a train step, one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from benchmarks.peers.contenders import problem as shared
from benchmarks.peers.contenders.flax_networks import JaxProgram, optimizer, textbook_model


class _State(train_state.TrainState):
    """Flax's train state with batch statistics."""

    batch_stats: Any


def program(problem: shared.Problem) -> JaxProgram:
    """JAX without settings: one CPU device, on which XLA uses its own thread pool."""
    model = textbook_model(problem.network, problem.dtype)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shared.IMAGE_SHAPE)))
    state = _State.create(
        apply_fn=model.apply,
        params=jax.device_put(problem.weights),
        tx=optimizer(problem.network),
        batch_stats=variables.get("batch_stats", {}),
    )
    return JaxProgram(
        initial=state,
        step=jax.jit(_step),
        loss=lambda loss: loss,
        forward=jax.jit(_forward),
        images=[jnp.asarray(image) for image in problem.images],
        labels=[jnp.asarray(label) for label in problem.labels],
    )


def _step(state: _State, image: jax.Array, label: jax.Array) -> tuple[_State, jax.Array]:
    def mean_loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(variables, image, train=True, mutable=["batch_stats"])
        logits = logits.astype(jnp.float32)  # those of a network in bfloat16 are not
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return losses.mean(), updated.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def _forward(state: _State, image: jax.Array) -> jax.Array:
    return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, image)
