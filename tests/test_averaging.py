"""Averages of the weights: their formulas, and that what is averaged is what is used."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import ExponentialMovingAverage, Lookahead, UserError, digest
from cnn.averaging import create_averaging
from cnn.config import check_config, override
from cnn.experiment import create_experiment
from cnn.export.weights import named_arrays
from cnn.runtime.devices import select_devices
from cnn.transfer import transfer
from tests.helpers import short_config

VALUES = [np.array([3.0, -1.0]), np.array([5.0, 2.0]), np.array([-4.0, 0.5])]


def averages(averaging, values, begin=np.array([1.0, 2.0])):
    """What becomes of the average and of the weights, if each update leads to one of the values."""
    averaged = {"w": jnp.asarray(begin, jnp.float32)}
    found = []
    for n, value in enumerate(values, start=1):
        averaged, current = averaging(
            averaged, {"w": jnp.asarray(value, jnp.float32)}, jnp.int32(n)
        )
        found.append((np.asarray(averaged["w"]), np.asarray(current["w"])))
    return found


def test_the_moving_average_is_the_formula():
    """With a decay that begins at 2 / 11, and a network that does not see it."""
    expected = np.array([1.0, 2.0])
    found = averages(ExponentialMovingAverage(0.24), VALUES)
    for n, (value, (averaged, current)) in enumerate(zip(VALUES, found, strict=True), start=1):
        decay = min(0.24, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(averaged, expected, rtol=1e-6)
        np.testing.assert_array_equal(current, value.astype(np.float32))


def test_the_lookahead_is_the_formula_and_drops_the_last_steps():
    """The numbers of steps and of the decay are those of Jordan 2024: decay**period * (n / T)**3."""
    values = [VALUES[n % 3] + n for n in range(8)]
    found = averages(Lookahead(num_steps=8, period=3, decay=0.9), values)
    slow = np.array([1.0, 2.0])
    for n, (value, (averaged, current)) in enumerate(zip(values, found, strict=True), start=1):
        if n % 3 == 0:
            decay = 0.9**3 * (n / 8) ** 3
            slow = decay * slow + (1 - decay) * value
        np.testing.assert_allclose(averaged, slow, rtol=1e-6)
        # The network is moved at steps 3 and 6, and goes back to step 6 after the last.
        np.testing.assert_allclose(current, slow if n in (3, 6, 8) else value, rtol=1e-6)


@pytest.mark.parametrize("averaging", [ExponentialMovingAverage(0.3), Lookahead(3, period=1)])
def test_what_does_not_move_keeps_its_bits(averaging):
    """As frozen parameters do not, -0.0 among them."""
    still = np.concatenate([np.random.default_rng(0).normal(size=99), [-0.0]])
    for averaged, current in averages(averaging, [still] * 3, begin=still):
        assert averaged.tobytes() == current.tobytes() == still.astype(np.float32).tobytes()


class Small(nn.Module):
    """With batch statistics, and quickly compiled."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Dense(8)(image.reshape(image.shape[0], -1))
        return nn.Dense(4)(nn.relu(nn.BatchNorm(not train, momentum=0.5)(x)))


def new_state(averaging):
    tx = optax.sgd(0.1, momentum=0.9)
    return cnn.create_train_state(Small(), tx, jax.random.key(0), (16, 16, 3), averaging=averaging)


def network(state):
    return {"params": state.params, "model_state": state.model_state}


train_step = jax.jit(cnn.train_step)


@pytest.mark.parametrize(
    "averaging", [ExponentialMovingAverage(0.15), Lookahead(3, period=2, decay=0.9)]
)
def test_a_step_averages_parameters_and_statistics(batch, averaging):
    """By the function of the averaging; of the optimizer nothing changes but what it is given."""
    state = expected = new_state(averaging)
    plain = new_state(None)
    for n in (1, 2, 3):
        # The plain step from the same weights is the update.
        plain, _ = train_step(plain.replace(**network(expected), step=expected.step), batch)
        averaged, current = averaging(expected.averaged, network(plain), n)
        expected = plain.replace(**current, averaged=averaged)
        state, _ = train_step(state, batch)
        for ours, theirs in (
            (state.averaged, averaged),
            (network(state), current),
            (state.opt_state, plain.opt_state),
        ):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    mean = state.averaged["model_state"]["batch_stats"]["BatchNorm_0"]["mean"]
    last = plain.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert (mean != last).any()


def test_the_average_is_scored_and_predicts(batch):
    state, _ = train_step(new_state(ExponentialMovingAverage(0.999)), batch)
    averaged = new_state(None).replace(**state.averaged)
    assert float(cnn.eval_step(state, batch).loss) == float(cnn.eval_step(averaged, batch).loss)
    logits = cnn.predict_step(state, batch["image"])
    np.testing.assert_array_equal(logits, cnn.predict_step(averaged, batch["image"]))
    assert (logits != cnn.predict_step(averaged.replace(**network(state)), batch["image"])).any()


def test_the_lookahead_scores_the_network(batch):
    state, _ = train_step(new_state(Lookahead(10)), batch)
    assert state.variables["params"] is state.params


@pytest.mark.parametrize("averaging", [ExponentialMovingAverage(0.15), Lookahead(5, period=1)])
def test_a_skipped_step_leaves_the_average(batch, averaging):
    state = new_state(averaging).replace(skip_nonfinite=True)
    state, _ = train_step(state, batch)
    bad = {**batch, "image": batch["image"].at[3, 2, 1, 0].set(jnp.nan)}
    after, metrics = train_step(state, bad)
    assert int(metrics.count) == 0
    assert digest(after.replace(step=state.step)) == digest(state)
    later, _ = train_step(after, batch)
    assert digest(later.averaged) != digest(state.averaged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "swa"}, "unknown averaging 'swa'; known: none, ema, lookahead"),
        ({"name": "none", "decay": 0.9}, "unknown field averaging.decay"),
        ({"name": "ema", "decay": 1.0}, "averaging.decay=1.0 must be at least 0 and below 1"),
        ({"name": "lookahead", "decay": -0.1}, "averaging.decay=-0.1 must be at least 0"),
        ({"name": "lookahead", "period": 0}, "averaging.period=0 must be 1 or more"),
        ({"name": "lookahead", "period": 2.5}, "averaging.period=2.5 must be a whole number"),
    ],
)
def test_an_averaging_that_cannot_be_built(fields, message):
    with pytest.raises(UserError, match=message):
        create_averaging(num_steps=9, **fields)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run whose average is scored: its directory, state and result."""
    flags = ["averaging.name=ema", "averaging.decay=0.98", "optimizer.learning_rate=0.01"]
    config = override(short_config(), [f"--config.{flag}" for flag in flags])
    path = tmp_path_factory.mktemp("averaged") / "run"
    return path, *cnn.train_and_evaluate(config, path)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(other))


def test_a_run_scores_its_average_and_load_run_loads_it(run, digits):
    path, state, result = run
    trained = cnn.load_run(path)
    assert_same(trained.variables["params"], state.averaged["params"])
    assert (
        trained.variables["params"]["Conv_0"]["kernel"] != state.params["Conv_0"]["kernel"]
    ).any()
    accuracy = (trained.logits(digits.test.images).argmax(-1) == digits.test.labels).mean()
    assert accuracy == result["test_accuracy"]
    exported = named_arrays(trained)["params.Conv_0.kernel"]
    np.testing.assert_array_equal(exported, state.averaged["params"]["Conv_0"]["kernel"])


def test_a_run_from_these_weights_begins_with_the_average(run, digits):
    """And so does its own average."""
    path, source, _ = run
    flags = [f"--config.init_from={path}", "--config.averaging.name=lookahead"]
    config = check_config(override(short_config(), flags))
    experiment = create_experiment(config, select_devices("cpu", 2))
    fresh = experiment.initial_state()
    state, _ = transfer(experiment, fresh, path, json.loads(config.to_json()))
    assert_same(state.params, source.averaged["params"])
    assert_same(state.averaged, network(state))
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True):
        assert (a.aval, a.sharding) == (b.aval, b.sharding)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in map(local, jax.tree.leaves(state))]
    assert len(set(buffers)) == len(buffers), "a state that is donated holds each buffer once"


def local(leaf):
    return leaf.addressable_shards[0].data
