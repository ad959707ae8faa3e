"""Gradients of frozen parameters are not computed, and nothing else changes."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import cnn
from cnn import create_optimizer
from cnn.plateau import reduce_on_plateau

BATCH = {"image": jnp.linspace(0, 1, 96).reshape(6, 4, 4, 1), "label": jnp.arange(6) % 3}
# The biases of the first layer are frozen after two updates.
BIASES = {"params": ("Dense_0/bias",), "name": "sgd", "learning_rate": 0.1, "num_updates": 2}
KERNELS = {"params": ("Dense_1/kernel",), "name": "sgd", "learning_rate": 0.1, "num_updates": 3}


class Counted(nn.Module):
    """Two dense layers; calls `backward` when the gradient of the first one is computed."""

    backward: Callable[..., None]

    @nn.compact
    def __call__(self, image):
        @jax.custom_vjp
        def count(x):
            return x

        def of_gradient(_, grad):
            jax.debug.callback(self.backward, grad.ravel()[0])
            return (grad,)

        count.defvjp(lambda x: (x, None), of_gradient)
        x = nn.relu(count(nn.Dense(4)(image.reshape(len(image), -1))))
        return nn.Dense(3)(x)


class Dense(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, image):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(image.reshape(len(image), -1))))


def plateau(tx):
    options = {"steps_per_epoch": 2, "patience": 1, "factor": 0.5, "min_scale": 0.0}
    return reduce_on_plateau(tx, **options)


def trained(model, tx, steps=5):
    """The states after some steps, and the losses."""
    state = cnn.create_train_state(model, tx, jax.random.key(0), (4, 4, 1))
    step, states = jax.jit(cnn.train_step), [state]
    losses = []
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        states.append(state)
        losses.append(float(metrics.loss))
    jax.effects_barrier()
    return states, losses


@pytest.mark.parametrize(
    ("options", "wrap"),
    [
        ({"freeze": ("Dense_0",)}, lambda tx: tx),
        ({"groups": {"biases": BIASES}, "grad_accumulation_steps": 2}, plateau),
        ({"groups": {"biases": BIASES, "kernels": KERNELS}, "grad_clip_norm": 1e-2}, lambda tx: tx),
        ({"groups": {"kernels": KERNELS}, "freeze": ("Dense_0/bias",)}, lambda tx: tx),
    ],
)
def test_the_rest_is_trained_as_with_all_gradients(options, wrap):
    """Clipping counts what no longer moves; updates are fewer than steps; a plateau lies above."""
    tx = wrap(create_optimizer("adam", 0.05, **options))
    plain = optax.GradientTransformationExtraArgs(*tx)
    (found, losses), (expected, plain_losses) = trained(Dense(), tx), trained(Dense(), plain)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            (one.params, one.opt_state),
            (other.params, other.opt_state),
        )


@pytest.mark.parametrize(
    ("options", "wrap", "expected"),
    [
        ({}, lambda tx: tx, 5),
        ({"freeze": ("Dense_0",)}, lambda tx: tx, 0),
        ({"freeze": ("Dense_0",)}, plateau, 0),
        ({"freeze": ("Dense_0/kernel",)}, lambda tx: tx, 5),
        ({"freeze": ("Dense_0/kernel",), "groups": {"biases": BIASES}}, lambda tx: tx, 2),
        ({"freeze": ("Dense_0/kernel",), "groups": {"biases": BIASES}}, plateau, 2),
    ],
)
def test_what_no_update_uses_is_not_computed(options, wrap, expected):
    backward = []
    trained(Counted(backward.append), wrap(create_optimizer("adam", 0.05, **options)))
    assert len(backward) == expected


def test_a_stack_of_runs_takes_one_branch():
    """By `vmap`: the shorter one, once all of them have ended."""
    backward = []
    tx = create_optimizer("sgd", 0.05, freeze=("Dense_0/kernel",), groups={"biases": BIASES})
    (*_, alone), _ = trained(Counted([].append), tx)
    model = Counted(backward.append)
    state = cnn.create_train_state(model, tx, jax.random.key(0), (4, 4, 1))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
    step = jax.jit(jax.vmap(cnn.train_step, in_axes=(0, None)))
    for _ in range(5):
        states, _ = step(states, BATCH)
    jax.effects_barrier()
    assert len(backward) == 2 * 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), states.params, alone.params
    )


def test_a_step_with_branches_within_shard_map_and_differentiated():
    options = {"momentum": 0.0, "freeze": ("Dense_1/bias",), "groups": {"biases": BIASES}}
    tx = create_optimizer("sgd", 0.05, **options)
    states, _ = trained(Dense(), tx, steps=3)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)

    def params_after(state, batch):
        return cnn.train_step(state, batch)[0].params

    both = jax.shard_map(params_after, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    # Two shards of half the images each: the sum of two equal mean gradients.
    for before, after in ((states[0], states[1]), (states[2], states[3])):
        found = jax.jit(both)(before, batch)["Dense_0"]["kernel"]
        moved = after.params["Dense_0"]["kernel"] - before.params["Dense_0"]["kernel"]
        expected = before.params["Dense_0"]["kernel"] + 2 * moved
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

    def loss_after(state, image):
        return cnn.train_step(cnn.train_step(state, {**BATCH, "image": image})[0], BATCH)[1].loss

    slope = jax.jit(jax.grad(loss_after, argnums=1))(states[0], BATCH["image"])
    assert np.isfinite(slope).all()
    assert np.any(slope)
