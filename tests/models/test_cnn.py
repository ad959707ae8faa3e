import functools

import jax
import jax.numpy as jnp
import pytest

from cnn import CNN, UserError


def count(model, image_shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_the_baseline_has_the_parameters_of_the_keras_script():
    assert count(CNN(10), (32, 32, 3)) == 167_562


@pytest.mark.parametrize(
    ("fields", "image_shape", "expected"),
    [
        # (3*3*1 + 1) * 32, (3*3*32 + 1) * 64, (5*5*64 + 1) * 64, (64 + 1) * 10
        ({}, (28, 28, 1), 320 + 18_496 + 102_464 + 650),
        # SAME halves the sides only: 8 -> 4 -> 2
        ({"padding": "SAME"}, (8, 8, 1), 320 + 18_496 + 16_448 + 650),
        # 20x12 -> 16x8 -> 8x4: (5*5*2 + 1) * 8, (8*4*8 + 1) * 16, (16 + 1) * 10
        (
            {"features": (8,), "kernel_size": 5, "hidden_features": 16},
            (20, 12, 2),
            408 + 4_112 + 170,
        ),
        # no dense layer but the logits: (5*5*64 + 1) * 10
        ({"hidden_features": 0}, (28, 28, 1), 320 + 18_496 + 16_010),
    ],
)
def test_any_size_and_channels_that_the_layers_allow(fields, image_shape, expected):
    assert count(CNN(10, **fields), image_shape) == expected


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model = CNN(10, dtype=jnp.bfloat16)
    image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    run = functools.partial(model.apply, capture_intermediates=True, mutable=True)
    logits, inner = jax.jit(run)(variables, image)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))
    assert inner["intermediates"]["Conv_1"]["__call__"][0].dtype == jnp.bfloat16
    exact = jax.jit(CNN(10).apply)(variables, image)
    assert not jnp.array_equal(logits, exact)
    assert jnp.allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize("side", [1, 3, 5, 8, 9])
def test_a_too_small_image_is_refused_with_the_ways_out(side):
    with pytest.raises(UserError, match=rf"{side}x32 pixels are too small.*model\.padding=SAME"):
        count(CNN(10), (side, 32, 3))


def test_the_smallest_image_works():
    run = jax.jit(CNN(3).init_with_output)
    assert run(jax.random.key(0), jnp.zeros((1, 10, 10, 1)))[0].shape == (1, 3)


def test_a_single_image_without_batch_axis_is_refused():
    with pytest.raises(UserError, match=r"\[B, H, W, C\]"):
        count(CNN(10), (32, 32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": (8, 0)}, r"model.features=(8, 0) must hold whole numbers from 1 to 65536"),
        ({"features": (8, 1.5)}, "model.features=(8, 1.5) must hold whole numbers"),
        ({"features": (True,)}, "model.features=(True,) must hold whole numbers"),
        ({"features": ((1, 2),)}, "model.features=((1, 2),) must hold whole numbers"),
        ({"kernel_size": 0}, "model.kernel_size=0 must lie between 1 and 65536"),
        ({"hidden_features": -1}, "model.hidden_features=-1 must lie between 0 and 65536"),
        ({"hidden_features": 10**5000}, "a number too long to print must lie between"),
        ({"padding": "FULL"}, "model.padding='FULL' must be one of VALID, SAME"),
        ({"padding": 1}, "model.padding='1' must be one of VALID, SAME"),
        ({"conv_implementation": "fft"}, "model.conv_implementation='fft' must be one of auto"),
    ],
)
def test_impossible_fields_are_refused_when_the_module_is_made(fields, message):
    with pytest.raises(UserError) as error:
        CNN(10, **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_padding_has_one_spelling():
    assert CNN(10, padding="same") == CNN(10, padding="SAME")


def test_a_kernel_that_is_larger_than_all_it_can_cover_is_refused():
    with pytest.raises(UserError, match=r"model\.kernel_size=16 is too much for images of 8x8"):
        count(CNN(10, kernel_size=16, padding="SAME"), (8, 8, 3))
