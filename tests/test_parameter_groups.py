"""Groups of parameters with an optimizer of their own: `optimizer.groups`."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import cnn
from cnn import UserError, create_optimizer
from cnn.config import as_flags, check_config, config_diff, fields, override, to_json_dict
from cnn.experiment import create_experiment
from tests.helpers import REPOSITORY, short_config

PARAMS = {
    "Conv_0": {"bias": jnp.array([0.5, -0.0]), "kernel": jnp.array([[1.0, -2.0]])},
    "Dense_0": {"kernel": jnp.array([[3.0], [4.0]])},
}
GRADS = jax.tree.map(lambda p: 0.1 * p + 1, PARAMS)
BIASES = {"params": ("*/bias",), "name": "sgd", "learning_rate": 0.5, "weight_decay": 2.0}


def trained(tx, steps, grads=GRADS):
    """Parameters and optimizer state after each of some updates, from the beginning on."""

    def step(before, _):
        updates, opt_state = tx.update(grads, before[1], before[0])
        after = optax.apply_updates(before[0], updates), opt_state
        return after, after

    begin = PARAMS, tx.init(PARAMS)
    _, later = jax.jit(lambda: jax.lax.scan(step, begin, length=steps))()
    every = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), begin, later)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], every) for n in range(steps + 1)]


def test_a_group_is_optimized_as_if_it_were_alone():
    """Its weight decay applies to biases too; the others have the optimizer of the run."""
    tx = create_optimizer("adam", 0.01, groups={"biases": BIASES})
    found, _ = trained(tx, 3)[-1]
    alone, _ = trained(create_optimizer("adam", 0.01), 3)[-1]
    for layer in PARAMS:
        np.testing.assert_array_equal(found[layer]["kernel"], alone[layer]["kernel"])
    bias, momentum = np.array([0.5, 0.0]), 0
    for _ in range(3):  # the decay comes before the momentum
        slope = np.asarray(GRADS["Conv_0"]["bias"]) + 2.0 * bias
        momentum = slope + 0.9 * momentum
        bias = bias - 0.5 * (slope + 0.9 * momentum)
    np.testing.assert_allclose(found["Conv_0"]["bias"], bias, rtol=1e-5)


def test_a_group_that_is_frozen_keeps_its_bits_and_its_momentum():
    group = {**BIASES, "num_updates": 2}
    tx = create_optimizer("sgd", 0.01, groups={"biases": group})
    biases, kernels, states = [], [], []
    for params, opt_state in trained(tx, 4):
        biases.append(np.asarray(params["Conv_0"]["bias"]).tobytes())
        kernels.append(np.asarray(params["Conv_0"]["kernel"]).tobytes())
        states.append([leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(opt_state))])
    assert biases[0] != biases[1] != biases[2]
    assert biases[2] == biases[3] == biases[4]
    assert len(set(kernels)) == 5
    # Of the state only the momentum of the two kernels moves on.
    moved = [
        sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(states[2:])
    ]
    assert moved == [2, 2]


def test_a_frozen_parameter_is_in_no_group():
    groups = {"first": {**BIASES, "params": ("Conv_0",)}}
    tx = create_optimizer("sgd", 0.01, freeze=("*/bias",), groups=groups)
    (before, _), (after, _) = trained(tx, 1)
    assert before["Conv_0"]["bias"].tobytes() == after["Conv_0"]["bias"].tobytes()
    expected = before["Conv_0"]["kernel"] - 0.5 * 1.9 * (
        GRADS["Conv_0"]["kernel"] + 2.0 * before["Conv_0"]["kernel"]
    )
    np.testing.assert_allclose(after["Conv_0"]["kernel"], expected, rtol=1e-6)


def test_equal_groups_are_the_same_optimizer():
    """`jit` would compile a step anew for another."""
    first, second = (create_optimizer("adam", 0.1, groups={"a": dict(BIASES)}) for _ in range(2))
    assert first is second


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"a": {**BIASES, "params": ("*/bais",)}},
            r"optimizer.groups.a.params: '\*/bais' matches no parameter; there are Conv_0/bias",
        ),
        (
            {"a": BIASES, "b": {**BIASES, "params": ("Conv_0",)}},
            "optimizer.groups.a and optimizer.groups.b both hold Conv_0/bias: a parameter has one",
        ),
        ({"a": {**BIASES, "params": ()}}, "optimizer.groups.a.params is empty: it must name"),
        ({"a": {**BIASES, "params": ("",)}}, "optimizer.groups.a.params=.* must hold paths"),
        ({"a": {**BIASES, "momentun": 0.9}}, "optimizer.groups.a.momentun; did you mean momentum"),
        ({"a": {**BIASES, "momentum": 1.0}}, "optimizer.groups.a.momentum=1.0 must be at least 0"),
        ({"a": {**BIASES, "name": "sdg"}}, "unknown optimizer 'sdg'; did you mean sgd?"),
        ({"a": {**BIASES, "learning_rate": -1.0}}, "optimizer.groups.a.learning_rate=-1.0 must"),
    ],
)
def test_groups_that_cannot_be_meant(groups, message):
    with pytest.raises(UserError, match=message):
        create_optimizer("adam", 0.1, groups=groups).init(PARAMS)


NEW = ("groups.slow.params=Conv_*", "groups.slow.learning_rate=1e-4")


def with_flags(*flags, config=None):
    config = short_config() if config is None else config
    return override(config, [f"--config.optimizer.{flag}" for flag in flags])


def test_the_command_line_makes_a_group_and_changes_one():
    """It is that of "sgd" unless it is named; with another name it has the fields of that."""
    config = check_config(with_flags(*NEW))
    slow = config.optimizer.groups.slow
    assert (slow.params, slow.name, slow.learning_rate) == (("Conv_*",), "sgd", 1e-4)
    assert (slow.momentum, slow.freeze_after_epochs, slow.schedule_epochs) == (0.9, 0.0, 0.0)
    speed = cnn.load_config(REPOSITORY / "configs" / "speed94.py")
    changed = with_flags("groups.head.learning_rate=0.5", "groups.head.name=adamw", config=speed)
    head = check_config(changed).optimizer.groups.head
    assert (head.name, head.learning_rate, head.params) == ("adamw", 0.5, ("head",))
    assert "momentum" not in head
    kept = speed.optimizer.groups.norm_biases.to_dict()
    assert changed.optimizer.groups.norm_biases.to_dict() == kept
    # The flags that train.py prints make the same config.
    printed = as_flags(config, short_config())
    assert check_config(override(short_config(), printed)) == config


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (NEW[:1], "config field optimizer.groups.slow.learning_rate is missing"),
        (NEW[1:], "config field optimizer.groups.slow.params is missing"),
        ((*NEW, "groups.slow.momentun=0.5"), "did you mean optimizer.groups.slow.momentum?"),
        ((*NEW, "groups.slow.name=sdg"), "unknown optimizer 'sdg'; did you mean sgd?"),
        ((*NEW, "groups.slow.freeze_after_epochs=-1"), "freeze_after_epochs=-1.0 must be 0 or"),
        ((*NEW, "groups.slow.weight_decay=-1"), "groups.slow.weight_decay=-1.0 must lie between"),
        (("groups.slow=Conv_*",), "unknown config field optimizer.groups.slow"),
        (("groups=slow",), "unknown config field optimizer.groups"),
    ],
)
def test_flags_of_groups_that_cannot_be_meant(flags, complaint):
    with pytest.raises(UserError) as error:
        check_config(with_flags(*flags))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_with_groups_survives_json():
    """As a run that resumes compares it."""
    config = check_config(cnn.load_config(REPOSITORY / "configs" / "speed94.py"))
    stored = to_json_dict(config)
    assert check_config(ConfigDict(json.loads(json.dumps(stored)))) == config
    other = json.loads(json.dumps(stored))
    assert config_diff(stored, other) == []
    other["optimizer"]["groups"]["head"]["learning_rate"] = 0.5
    assert config_diff(stored, other) == ["optimizer.groups.head.learning_rate: 0.67 -> 0.5"]
    del other["optimizer"]["groups"]["head"]
    assert "optimizer.groups.head.name: sgd -> unset" in config_diff(stored, other)


def test_every_field_of_a_group_is_known():
    known = fields(cnn.load_config(REPOSITORY / "configs" / "speed94.py"))
    assert "optimizer.groups.norm_biases.freeze_after_epochs" in known
    assert "optimizer.groups.norm_biases.ns_steps" not in known
    assert known["optimizer.groups.norm_biases.params"].doc


@pytest.mark.parametrize(
    ("freeze", "schedule", "accumulation", "updates", "rates"),
    [
        (0.0, 0.0, 1, None, (0.5, 0.5 * 27 / 28)),
        (0.5, 0.5, 1, 7, (0.5, 0.5 * 6 / 7)),
        (0.5, 0.0, 2, 4, (0.5, 0.5 * 13 / 14)),
        (0.001, 0.001, 1, 1, (0.5, 0.0)),
    ],
)
def test_epochs_of_a_group_are_counted_in_updates(freeze, schedule, accumulation, updates, rates):
    """Of 14 steps an epoch; the rate falls to 0 at the end of the run or of its own schedule."""
    config = with_flags("groups.slow.params=*/bias", "groups.slow.learning_rate=0.5")
    config.optimizer.groups.slow.update(
        freeze_after_epochs=freeze, schedule_epochs=schedule, momentum=0.0
    )
    config.optimizer.grad_accumulation_steps = accumulation
    config.schedule.name = "linear"
    tx = create_experiment(check_config(config), jax.devices()[:1]).tx
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    found = [float(params["Conv_0"]["bias"][0]) for params, _ in trained(tx, 16, grads)]
    moved = -np.diff(found[::accumulation])
    np.testing.assert_allclose(moved[:2], [*rates[:updates], 0.0][:2], rtol=1e-5)
    assert (moved != 0).sum() == (updates if updates and updates < len(moved) else len(moved))
