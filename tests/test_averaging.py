"""Averages of the weights: their formulas, and that what is averaged is what is used."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import cnn
from cnn import ExponentialMovingAverage, Lookahead, UserError, digest
from cnn.averaging import create_averaging
from cnn.config import check_config, to_json_dict
from cnn.experiment import create_experiment
from cnn.export.weights import named_arrays
from cnn.runtime.devices import select_devices
from cnn.steps import begin_averaging
from cnn.transfer import transfer
from tests.helpers import short_config

VALUES = [np.array([3.0, -1.0]), np.array([5.0, 2.0]), np.array([-4.0, 0.5])]


def averages(averaging, values, begin=(1.0, 2.0)):
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
    """The average has decay**period * (n / T)**3 of what it was (Jordan 2024)."""
    values = [VALUES[n % 3] + n for n in range(8)]
    found = averages(Lookahead(num_steps=8, period=3, decay=0.9), values)
    slow = np.array([1.0, 2.0])
    for n, (value, (averaged, current)) in enumerate(zip(values, found, strict=True), start=1):
        if n % 3 == 0:
            decay = 0.9**3 * (n / 8) ** 3
            slow = decay * slow + (1 - decay) * value
        np.testing.assert_allclose(averaged, slow, rtol=1e-5)
        # The network is moved at steps 3 and 6, and goes back to step 6 after the last.
        np.testing.assert_allclose(current, slow if n in (3, 6, 8) else value, rtol=1e-5)


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
        x = nn.BatchNorm(not train, momentum=0.5)(image.reshape(image.shape[0], -1))
        return nn.Dense(4)(x)


@pytest.fixture(scope="module")
def plain():
    """A state without an average."""
    tx = optax.sgd(0.1, momentum=0.9)
    return cnn.create_train_state(Small(), tx, jax.random.key(0), (2, 2, 3))


@pytest.fixture
def batch(batch):
    return {**batch, "image": batch["image"][:, :2, :2]}


def with_averaging(state, averaging):
    return begin_averaging(state.replace(averaging=averaging))


def network(state):
    return {"params": state.params, "model_state": state.model_state}


train_step = jax.jit(cnn.train_step)


@pytest.mark.parametrize(
    "averaging", [ExponentialMovingAverage(0.15), Lookahead(3, period=2, decay=0.9)]
)
def test_a_step_averages_parameters_and_statistics(batch, plain, averaging):
    """By the function of the averaging; the optimizer's state is left alone."""
    state = expected = with_averaging(plain, averaging)
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


def test_what_is_scored(batch, plain):
    """An exponential average; with a lookahead the network itself."""
    other = jax.tree.map(lambda leaf: 2 * leaf + 1, network(plain))
    average = with_averaging(plain, ExponentialMovingAverage()).replace(averaged=other)
    score = jax.jit(cnn.eval_step)
    assert float(score(average, batch).loss) == float(score(plain.replace(**other), batch).loss)
    assert float(score(average, batch).loss) != float(score(plain, batch).loss)
    assert average.replace(averaging=Lookahead(10)).variables["params"] is plain.params


def test_a_skipped_step_leaves_the_average(batch, plain):
    state = with_averaging(plain, ExponentialMovingAverage(0.15)).replace(skip_nonfinite=True)
    state, _ = train_step(state, batch)
    bad = {**batch, "image": batch["image"].at[3, 1, 1, 0].set(jnp.nan)}
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


def begin(averaging, **fields):
    """A config with an averaging, and the experiment and the first state of its run."""
    config = short_config()
    config.averaging = ConfigDict({"name": averaging})
    config.update(fields)
    config = check_config(config)
    experiment = create_experiment(config, select_devices("cpu", 2))
    return to_json_dict(config), experiment, experiment.initial_state()


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run directory with a checkpoint whose average is another network, and that average."""
    path = tmp_path_factory.mktemp("averaged")
    config, experiment, state = begin("ema")
    averaged = jax.tree.map(lambda leaf: leaf + 1, network(state))
    with cnn.CheckpointManager(path / "checkpoints") as checkpoints:
        record = {"config": config, "dataset": experiment.dataset_record}
        checkpoints.save(state.replace(averaged=averaged), record)
    return path, jax.device_get(averaged)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(other))


def test_load_run_and_the_export_take_the_average(run):
    path, averaged = run
    trained = cnn.load_run(path)
    assert_same(trained.variables["params"], averaged["params"])
    exported = named_arrays(trained)["params.Conv_0.kernel"]
    np.testing.assert_array_equal(exported, averaged["params"]["Conv_0"]["kernel"])


def test_a_run_from_these_weights_begins_with_the_average(run):
    """And so does its own average."""
    path, averaged = run
    config, experiment, fresh = begin("ema", init_from=str(path))
    state, _ = transfer(experiment, fresh, path, config)
    assert_same(state.params, averaged["params"])
    assert_same(state.averaged, network(state))
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True):
        assert (a.aval, a.sharding) == (b.aval, b.sharding)
    # A state that is donated holds each buffer once.
    leaves = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(network(state))]
    copies = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state.averaged)]
    buffers = [leaf.unsafe_buffer_pointer() for leaf in (*leaves, *copies)]
    assert len(set(buffers)) == len(buffers)
