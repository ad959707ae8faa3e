"""NaN and infinity in loss and gradients: found at their step, never in a checkpoint."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import UserError, create_train_state, digest, train_and_evaluate
from cnn.metrics import MetricsAccumulator
from tests.helpers import OPTIMIZED

SHAPE = (16, 16, 3)

train_step = jax.jit(cnn.train_step)


class Small(nn.Module):
    """With batch statistics, and quickly compiled."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Dense(8)(image.reshape(image.shape[0], -1))
        return nn.Dense(4)(nn.relu(nn.BatchNorm(not train)(x)))


def new_state(**kwargs):
    state = create_train_state(Small(), optax.adam(1e-3), jax.random.key(0), SHAPE, **kwargs)
    return state.replace(skip_nonfinite=True)


def infinite_slope(logits, labels):
    """A loss of 0 whose gradient is infinite, times 0."""
    return jnp.sqrt(0 * logits.sum(-1))


def assert_nothing_but_the_step_changed(before, after):
    assert int(after.step) == int(before.step) + 1
    assert digest(after.replace(step=before.step)) == digest(before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function])
def test_a_bad_image_changes_nothing(batch, value, jit):
    state = new_state()
    bad = {**batch, "image": batch["image"].at[3, 2, 1, 0].set(value)}
    after, metrics = jit(cnn.train_step)(state, bad)
    assert_nothing_but_the_step_changed(state, after)
    assert jax.tree.leaves(jax.device_get(metrics)) == [0, 0, 0]
    _, metrics = train_step(after, batch)
    assert int(metrics.count) == 8


def test_unless_it_is_told_to_skip_a_step_only_tells(batch):
    state = new_state().replace(skip_nonfinite=False)
    bad = {**batch, "image": batch["image"].at[3, 2, 1, 0].set(jnp.nan)}
    after, metrics = train_step(state, bad)
    assert jax.tree.leaves(jax.device_get(metrics)) == [0, 0, 0]
    assert jnp.isnan(metrics.loss)
    assert jnp.isnan(after.params["Dense_1"]["kernel"]).any()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_skipping_changes_no_other_step(batch, monkeypatch, backend):
    """On a CPU not a bit; elsewhere the update is another program."""
    plain = new_state().replace(skip_nonfinite=False)
    optimized = functools.partial(jax.jit, cnn.train_step, compiler_options=OPTIMIZED)
    expected, _ = optimized()(plain, batch)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    step = optimized()
    skipping, _ = step(new_state(), batch)
    if backend == "cpu":
        assert digest(skipping) == digest(expected)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(assert_close, skipping.params, expected.params)
    bad = {**batch, "image": batch["image"].at[3, 2, 1, 0].set(jnp.nan)}
    assert_nothing_but_the_step_changed(new_state(), step(new_state(), bad)[0])


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing(batch):
    state = new_state(loss_fn=infinite_slope)
    after, metrics = train_step(state, batch)
    assert_nothing_but_the_step_changed(state, after)
    assert int(metrics.count) == 0


def test_a_label_without_a_class_changes_nothing(batch):
    state = new_state()
    after, _ = train_step(state, {**batch, "label": batch["label"].at[0].set(4)})
    assert_nothing_but_the_step_changed(state, after)


def test_each_seed_of_a_vmap_for_itself(batch):
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), new_state())
    images = jnp.stack([batch["image"], batch["image"].at[0].set(jnp.nan)])
    batches = {"image": images, "label": jnp.stack([batch["label"]] * 2)}
    after, metrics = jax.jit(jax.vmap(cnn.train_step))(states, batches)
    assert metrics.count.tolist() == [8, 0]
    kernels = after.params["Dense_1"]["kernel"]
    assert not jnp.array_equal(kernels[0], states.params["Dense_1"]["kernel"][0])
    assert jnp.array_equal(kernels[1], states.params["Dense_1"]["kernel"][1])


def test_the_accumulator_names_the_steps(batch):
    images = jnp.stack([batch["image"]] * 4).at[2, 0].set(jnp.nan)
    batches = {"image": images, "label": jnp.stack([batch["label"]] * 4)}
    state, scores = cnn.train_steps(new_state(), batches, 3)
    tally = MetricsAccumulator(step=10)
    tally.add(scores, 3)
    tally.add(train_step(state, {**batch, "image": images[2]})[1], 1)
    tally.add(train_step(state, batch)[1], 1)
    assert tally.fetch(keep_newest=1).count == 16
    assert tally.skipped == [13, 14]
    assert tally.fetch().count == 24


@pytest.fixture
def poisoned(monkeypatch):
    """NaN in an image of step 18, in the second epoch."""
    poison(monkeypatch, lambda step: step == 17)


def poison(monkeypatch, when):
    """NaN in an image of the batches before which a function of the steps made is true."""
    original = cnn.Pipeline.batches

    def batches(pipeline, start, stop=None):
        for batches, num_steps in original(pipeline, start, stop):
            if when(start):
                batches["image"] = batches["image"].at[:, 5].set(jnp.nan)
            start += num_steps
            yield batches, num_steps

    monkeypatch.setattr(cnn.Pipeline, "batches", batches)


@pytest.fixture
def config(config):
    config.runtime.steps_per_execution = 1
    return config


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("every", "good"), [(0, 14), (5, 15), (1, 17)])
def test_a_run_stops_and_names_the_step(config, tmp_path, poisoned, every, good):
    config.runtime.checkpoint_every_steps = every
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("step 18 gave a loss or gradients that are not finite")
    assert "at a learning rate of 0.001 in epoch 2" in message
    assert f"the last good checkpoint is step {good};" in message
    assert "--config.runtime.on_nonfinite=skip" in message
    checkpoints = cnn.CheckpointManager(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == good
    for step in checkpoints.all_steps():
        arrays, _ = checkpoints.read(step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays))
    assert not (tmp_path / "result.json").exists()


def test_a_stopped_run_goes_on_by_skipping(config, tmp_path, poisoned, capsys):
    """To the same bits as one that skipped from the start."""
    with pytest.raises(UserError, match="step 18"):
        train_and_evaluate(config, tmp_path / "stopped")
    config.runtime.on_nonfinite = "skip"
    state, result = train_and_evaluate(config, tmp_path / "stopped")
    assert (
        "1 of the 14 steps of epoch 2 were not finite and were skipped" in capsys.readouterr().out
    )
    assert [record["skipped_steps"] for record in records(tmp_path / "stopped")] == [0, 1]
    assert result["skipped_steps"] == 1
    assert int(state.step) == 28
    assert int(state.opt_state[0][0].count) == 27
    other, _ = train_and_evaluate(config, tmp_path / "skipped")
    assert digest(other) == digest(state)


def test_a_run_that_diverges(config, tmp_path):
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e30
    with pytest.raises(UserError, match=r"step 2 .* last good checkpoint is step 0"):
        train_and_evaluate(config, tmp_path)
    config.runtime.on_nonfinite = "skip"
    with pytest.raises(UserError, match="the test loss became nan"):
        train_and_evaluate(config, tmp_path)
    assert cnn.CheckpointManager(tmp_path / "checkpoints").all_steps() == [0]


def test_an_epoch_without_a_finite_step(config, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: True)
    config.runtime.on_nonfinite = "skip"
    with pytest.raises(UserError, match="no step of the epoch gave a finite loss"):
        train_and_evaluate(config, tmp_path)


def test_parameters_that_overflow_are_not_saved(config, tmp_path):
    """The loss and its gradients are still finite; what the optimizer makes of them is not."""
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e30
    config.optimizer.weight_decay = 1e30
    config.runtime.checkpoint_every_steps = 1
    with pytest.raises(UserError, match=r"parameters after step 1 are not finite"):
        train_and_evaluate(config, tmp_path)
    assert cnn.CheckpointManager(tmp_path / "checkpoints").all_steps() == [0]


def test_nobody_waits_for_the_device_at_each_step(config, tmp_path, monkeypatch):
    fetched = []
    original = MetricsAccumulator.fetch
    monkeypatch.setattr(
        MetricsAccumulator,
        "fetch",
        lambda tally, keep=0: fetched.append(keep) or original(tally, keep),
    )
    train_and_evaluate(config, tmp_path)
    assert len(fetched) == 2  # once an epoch
