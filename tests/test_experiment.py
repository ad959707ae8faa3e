import jax
import jax.numpy as jnp
import pytest

from cnn.config import check_config, override
from cnn.experiment import create_experiment, describe, notes
from cnn.runtime.devices import select_devices


def plan_of(config, *flags):
    config = check_config(override(config, [f"--config.{flag}" for flag in flags]))
    return create_experiment(config, select_devices("cpu", 1))


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["optimizer.grad_accumulation_steps=8"], "without effect: 4 of 28, which do not fill"),
        (["schedule.warmup_epochs=0.01"], "schedule.warmup_epochs=0.01 has no effect: it is less"),
        (
            ["schedule.warmup_epochs=2", "schedule.name=cosine"],
            "schedule.name=cosine has no effect: schedule.warmup_epochs=2.0 takes the whole run",
        ),
        (["runtime.checkpoint_every_steps=28"], "checkpoint_every_steps=28 has no effect"),
    ],
)
def test_settings_without_effect_are_noted(config, digits, flags, note):
    (line,) = notes(plan_of(config, *flags))
    assert note in line


def test_settings_with_an_effect_are_not(config, digits):
    flags = [
        "optimizer.grad_accumulation_steps=7", "schedule.warmup_epochs=1", "schedule.name=linear",
        "runtime.checkpoint_every_steps=27",
    ]  # fmt: skip
    assert notes(plan_of(config, *flags)) == []


def test_the_start_says_how_many_images_are_left_out_and_fits(config, digits):
    plan = plan_of(config, "batch_size=800")
    image = jnp.zeros((1, *digits.image_shape))
    variables = jax.eval_shape(plan.model.init, jax.random.key(0), image)
    text = describe(plan, variables, width=79)
    assert "batches: 1 of 800 images in each epoch; 637 images left out" in text
    assert max(map(len, text.splitlines())) <= 79


def test_the_start_says_how_many_parameters_are_frozen(config, digits):
    plan = plan_of(config, "optimizer.freeze=('Conv_0', '*/bias')")
    image = jnp.zeros((1, *digits.image_shape))
    variables = jax.eval_shape(plan.model.init, jax.random.key(0), image)
    # 3*3*1*4 weights, and biases of 4, 8, 16 and 10.
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert f"frozen: 74 of {total:,} parameters" in describe(plan, variables, width=79)
