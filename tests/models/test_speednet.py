"""The network of configs/speed94.py; its numbers are those of tests/test_recipes.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import SpeedNet, UserError
from cnn.models.initializers import whitening_kernel

NARROW = {"widths": (8, 8, 16)}


def shapes(model, size=32):
    image = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1_971_640),
        ({"widths": (128, 384, 384)}, 4_604_728),
        ({"widths": (128, 384, 512), "depth": 3}, 9_915_704),
        ({"widths": (32, 64, 64)}, 146_424),
    ],
)
def test_the_number_of_parameters(fields, expected):
    """Of the networks for 94, 95 and 96 % and of the small one that chooses images."""
    params = shapes(SpeedNet(10, **fields))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def filled(model, size=32):
    """Variables of random numbers, drawn without compiling anything."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), shapes(model, size))
    stats = jax.tree.map(np.abs, variables["batch_stats"])  # a variance is not negative
    return {**variables, "batch_stats": stats}


@pytest.fixture(scope="module")
def narrow():
    """A network, its variables, images, and in training what its layers give, and statistics."""
    model = SpeedNet(10, **NARROW, conv_implementation="native")
    image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = filled(model)

    @jax.jit
    def run(variables, image):
        return model.apply(variables, image, train=True, capture_intermediates=True, mutable=True)

    _, seen = run(variables, image)
    layers = {
        name: found["__call__"][0]
        for name, found in seen["intermediates"].items()
        if name.startswith(("whiten", "conv", "norm"))
    }
    return model, variables, image, layers, seen["batch_stats"]


def test_each_group_pools_before_its_first_normalization(narrow):
    """And without padding: 31, 15, 7 and 3 pixels."""
    _, _, _, layers, _ = narrow
    sides = {name: layer.shape[1:] for name, layer in layers.items()}
    assert sides == {
        "whiten": (31, 31, 24),
        "conv_0_0": (15, 15, 8), "norm_0_0": (15, 15, 8),
        "conv_0_1": (15, 15, 8), "norm_0_1": (15, 15, 8),
        "conv_1_0": (7, 7, 8), "norm_1_0": (7, 7, 8),
        "conv_1_1": (7, 7, 8), "norm_1_1": (7, 7, 8),
        "conv_2_0": (3, 3, 16), "norm_2_0": (3, 3, 16),
        "conv_2_1": (3, 3, 16), "norm_2_1": (3, 3, 16),
    }  # fmt: skip
    kernel = narrow[1]["params"]["conv_0_0"]["kernel"]
    x = nn.gelu(layers["whiten"], approximate=False)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layers["conv_0_0"], nn.max_pool(y, (2, 2), (2, 2)), rtol=1e-3)


def test_the_normalization_has_a_bias_and_no_scale(narrow):
    """And statistics of which 0.6 remains."""
    _, variables, _, layers, after = narrow
    norms = {name: set(p) for name, p in variables["params"].items() if name.startswith("norm")}
    assert all(names == {"bias"} for names in norms.values())
    assert len(norms) == 6
    x = np.asarray(layers["conv_1_0"], np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    normalized = (x - mean) / np.sqrt(var) + variables["params"]["norm_1_0"]["bias"]
    np.testing.assert_allclose(layers["norm_1_0"], normalized, atol=1e-4)
    before = variables["batch_stats"]["norm_1_0"]
    for name, value in (("mean", mean), ("var", var)):
        expected = 0.6 * before[name] + 0.4 * value
        np.testing.assert_allclose(after["norm_1_0"][name], expected, rtol=1e-4)


@pytest.mark.parametrize("is_recipe", [False, True])
def test_the_initial_parameters(is_recipe):
    """Convolutions that repeat their channels; the head and the bias of either recipe."""
    fields = {"normalize_head": is_recipe, "random_whitening_bias": is_recipe}
    model = SpeedNet(10, widths=(8, 8), **fields, conv_implementation="native")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = np.array(params["conv_1_0"]["kernel"])
    assert (kernel[1, 1] == np.eye(8)).all()
    assert np.abs(kernel).sum() == 8
    head = np.asarray(params["head"]["kernel"])
    if is_recipe:
        assert np.std(head, ddof=1) == pytest.approx(1, rel=1e-5)
    else:  # uniform, as PyTorch draws them
        assert 0.9 * 8**-0.5 < np.abs(head).max() <= 8**-0.5
    bias = np.abs(params["whiten"]["bias"]).max()
    assert 0.2 < bias <= 12**-0.5 if is_recipe else bias == 0


def test_the_whitening_kernel_comes_from_images(narrow):
    model, variables, image, _, _ = narrow
    params = model.init_from_images(variables["params"], image)
    np.testing.assert_array_equal(params["whiten"]["kernel"], whitening_kernel(image))
    np.testing.assert_array_equal(params["head"]["kernel"], variables["params"]["head"]["kernel"])
    assert params["whiten"]["bias"] is variables["params"]["whiten"]["bias"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 4}, "model.depth=4 must be 2 or 3"),
        ({"activation": "elu"}, "model.activation='elu' must be one of gelu, relu, silu"),
        ({"batch_norm_momentum": 1.0}, "model.batch_norm_momentum=1.0 must be at least 0 and"),
        ({"widths": (8, 0)}, r"model.widths=\(8, 0\) must hold whole numbers from 1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(UserError, match=message):
        SpeedNet(10, **fields)


def test_the_smallest_images():
    assert shapes(SpeedNet(10), size=9)["params"]["head"]["kernel"].shape == (256, 10)
    with pytest.raises(UserError, match="8x8 pixels are too small for SpeedNet with 3 groups, whi"):
        shapes(SpeedNet(10), size=8)


def test_the_logits_are_float32_in_bfloat16_too():
    model = SpeedNet(10, **NARROW, dtype=jnp.bfloat16)
    variables = shapes(model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, image).dtype == jnp.float32
