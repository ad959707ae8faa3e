import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import (
    CNN,
    CrossEntropy,
    batch_sharding,
    create_optimizer,
    create_train_state,
    data_mesh,
    eval_step,
    replicated_sharding,
    train_step,
)

SHAPE = (16, 16, 3)
GOLDEN = {"loss": 2.341574, "loss_after": 2.212909, "param_norm": 13.794252}
MODEL = CNN(num_classes=4, features=(4, 8), hidden_features=16)


@pytest.fixture(scope="module")
def state():
    return create_train_state(MODEL, optax.adam(1e-3), jax.random.key(0), SHAPE)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_golden_numbers_of_one_step():
    """The seed's network and recipe, to the fifth digit.

    They may change only together with a deliberate change of the initialization, the loss or
    the optimizer; then say so in the changelog, since every published figure changes too.
    """
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((8, 32, 32, 3), np.float32)),
        "label": jnp.arange(8),
    }
    state = create_train_state(
        CNN(10), create_optimizer("adam", 1e-3), jax.random.key(0), (32, 32, 3)
    )
    state, metrics = jax.jit(train_step)(state, batch)
    after = jax.jit(eval_step)(state, batch)
    norm = float(optax.tree.norm(state.params))
    assert float(metrics.loss) == pytest.approx(GOLDEN["loss"], rel=1e-5)
    assert float(after.loss) == pytest.approx(GOLDEN["loss_after"], rel=1e-5)
    assert norm == pytest.approx(GOLDEN["param_norm"], rel=1e-5)


def test_jit_agrees_with_eager(batch):
    """One block, as each operation of an eager step is compiled by itself."""
    model = CNN(num_classes=4, features=(4,), hidden_features=8)
    state = create_train_state(model, optax.adam(1e-3), jax.random.key(0), SHAPE)
    plain, jitted = train_step(state, batch), jax.jit(train_step)(state, batch)
    assert_close(jitted[1], plain[1])
    assert_close(jitted[0].params, plain[0].params, atol=1e-5)


def test_the_step_is_pure(state, batch):
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    first, second = train_step(state, batch), train_step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    jax.tree.map(np.testing.assert_array_equal, first[0].params, second[0].params)


def test_scan_over_steps_agrees_with_one_at_a_time(state, batch):
    scanned, metrics = jax.lax.scan(lambda s, _: train_step(s, batch), state, length=3)
    step = jax.jit(train_step)
    for expected in metrics.loss:
        state, one = step(state, batch)
        assert float(one.loss) == pytest.approx(float(expected), rel=1e-4)
    assert int(scanned.step) == int(state.step) == 3


def test_vmap_over_seeds_agrees_with_each_seed(batch):
    tx = optax.sgd(0.1)
    create = functools.partial(create_train_state, MODEL, tx, image_shape=SHAPE)
    keys = jax.random.split(jax.random.key(5), 3)
    step = jax.jit(train_step)
    states, metrics = jax.jit(jax.vmap(train_step, in_axes=(0, None)))(
        jax.vmap(create)(keys), batch
    )
    assert metrics.loss.shape == (3,)
    for i, key in enumerate(keys):
        alone, _ = step(create(key), batch)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], states.params), alone.params)


def test_the_step_can_be_differentiated(state, batch):
    """The loss after one step, as a function of the images: a gradient through the update."""
    state = state.replace(tx=optax.sgd(0.1), opt_state=optax.sgd(0.1).init(state.params))

    def loss_after(scale):
        inputs = {**batch, "image": scale * batch["image"]}
        return eval_step(train_step(state, inputs)[0], batch).loss

    loss_after = jax.jit(loss_after)
    slope = jax.grad(loss_after)(1.0)
    numeric = (loss_after(1.0 + 1e-2) - loss_after(1.0 - 1e-2)) / 2e-2
    assert float(slope) == pytest.approx(float(numeric), rel=2e-2)


@pytest.mark.parametrize("count", [2, 4])
def test_a_sharded_batch_gives_the_same_step(state, batch, count):
    alone, metrics = jax.jit(train_step)(state, batch)
    mesh = data_mesh(jax.devices()[:count], 8)
    placed = (
        jax.device_put(state, replicated_sharding(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    spread, spread_metrics = jax.jit(train_step)(*placed)
    assert len(spread.params["Conv_0"]["kernel"].sharding.device_set) == count
    assert_close(spread.params, alone.params, atol=1e-5)
    assert int(spread_metrics.sums["accuracy"]) == int(metrics.sums["accuracy"])


def test_equal_settings_do_not_compile_twice(batch):
    traces = []

    @jax.jit
    def step(state, batch):
        traces.append(None)
        return train_step(state, batch)

    tx = optax.sgd(0.1)
    for seed in range(2):
        loss_fn = CrossEntropy(label_smoothing=0.1)
        step(create_train_state(MODEL, tx, jax.random.key(seed), SHAPE, loss_fn=loss_fn), batch)
    assert len(traces) == 1


class Noisy(nn.Module):
    """Batch statistics and dropout: what a user's own module may bring."""

    @nn.compact
    def __call__(self, image, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(image)
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(4)(x)


def test_batch_statistics_and_dropout_work(batch):
    state = create_train_state(Noisy(), optax.sgd(0.0), jax.random.key(0), SHAPE)
    step = jax.jit(train_step)
    once, first = step(state, batch)
    mean = once.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.5 * batch["image"].mean((0, 1, 2)), atol=1e-6)
    _, repeated = step(state, batch)
    assert float(repeated.loss) == float(first.loss), "the same step draws the same numbers"
    _, later = step(state.replace(step=state.step + 1), batch)
    assert float(later.loss) != float(first.loss), "another step draws others"
    assert float(eval_step(state, batch).loss) == float(eval_step(state, batch).loss)


def test_label_smoothing_is_the_loss_against_smoothed_targets(batch):
    logits = jax.random.normal(jax.random.key(0), (8, 4))
    targets = 0.9 * jax.nn.one_hot(batch["label"], 4) + 0.1 / 4
    expected = optax.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(CrossEntropy(0.1)(logits, batch["label"]), expected, rtol=1e-5)


def test_a_label_out_of_range_is_not_silently_a_class():
    assert jnp.isnan(CrossEntropy()(jnp.zeros((1, 4)), jnp.array([4]))).all()


def test_the_loss_falls(batch):
    state = create_train_state(MODEL, optax.adam(1e-2), jax.random.key(0), SHAPE)
    step = jax.jit(train_step)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
