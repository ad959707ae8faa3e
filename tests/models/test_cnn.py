import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import CNN, UserError, create_model
from cnn.models.cnn import cosine_filters


def count(model, image_shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_the_seed_network_has_the_parameters_of_the_keras_script():
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
        # 8x8 patches of 2 * 6 channels; the stem has running mean and variance only:
        # (3*3*12 + 1) * 8, (3*3*8 + 1) * 16, (16 + 1) * 10, and 2 * 6
        (
            {"features": (8,), "hidden_features": 16, "patch_size": 4, "patch_features": 6},
            (32, 32, 1),
            872 + 1_168 + 170 + 12,
        ),
        # bias, running mean and variance for each bias before: + 2 * (32 + 64 + 64)
        ({"batch_norm": True}, (32, 32, 3), 167_562 + 320),
    ],
)
def test_any_size_and_channels_that_the_layers_allow(fields, image_shape, expected):
    assert count(CNN(10, **fields), image_shape) == expected


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model = CNN(10, dtype=jnp.bfloat16)
    image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = model.init(jax.random.key(0), image)
    logits, inner = model.apply(variables, image, capture_intermediates=True, mutable=True)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))
    assert inner["intermediates"]["Conv_1"]["__call__"][0].dtype == jnp.bfloat16
    exact = CNN(10).apply(variables, image)
    assert not jnp.array_equal(logits, exact)
    assert jnp.allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize("side", [1, 3, 5, 8, 9])
def test_a_too_small_image_is_refused_with_the_ways_out(side):
    with pytest.raises(UserError, match=rf"{side}x32 pixels are too small.*model\.padding=SAME"):
        count(CNN(10), (side, 32, 3))


def test_the_smallest_image_works():
    assert CNN(3).init_with_output(jax.random.key(0), jnp.zeros((1, 10, 10, 1)))[0].shape == (1, 3)


def test_a_single_image_without_batch_axis_is_refused():
    with pytest.raises(UserError, match=r"\[B, H, W, C\]"):
        count(CNN(10), (32, 32))


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (4, 3), (3, 1)])
def test_all_cosine_filters_are_an_orthonormal_basis_and_the_first_is_the_mean(size, channels):
    values = size * size * channels
    filters = cosine_filters(size, channels, values).reshape(values, values)
    np.testing.assert_allclose(filters.T @ filters, np.eye(values), atol=1e-6)
    np.testing.assert_allclose(filters[:, 0], values**-0.5, rtol=1e-6)


def test_fewer_cosine_filters_are_the_first_of_all():
    every = cosine_filters(4, 3, 48)
    np.testing.assert_array_equal(cosine_filters(4, 3, 24), every[..., :24])


def test_the_stem_gives_whitened_patches_of_both_signs():
    model = CNN(4, features=(8,), patch_size=2, patch_features=5)
    image = jax.random.normal(jax.random.key(1), (16, 8, 12, 3)) * 3 + 2
    variables = model.init(jax.random.key(0), image)
    _, inner = model.apply(variables, image, train=True, capture_intermediates=True, mutable=True)
    stem = np.asarray(inner["intermediates"]["patch_norm"]["__call__"][0])
    assert stem.shape == (16, 4, 6, 5)
    np.testing.assert_allclose(stem.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(stem.std((0, 1, 2)), 1, atol=1e-4)
    # The brightness of the first patch, before the normalization of all.
    patches = np.asarray(image).reshape(16, 4, 2, 6, 2, 3).sum((2, 4, 5))
    expected = (patches - patches.mean()) / patches.std()
    np.testing.assert_allclose(stem[..., 0], expected, atol=1e-4)
    assert variables["params"]["Conv_0"]["kernel"].shape == (3, 3, 10, 8)
    assert "patch_norm" not in variables["params"]


def test_batch_statistics_move_in_training_only():
    model = CNN(
        4, features=(8,), hidden_features=6, patch_size=2, patch_features=5, batch_norm=True
    )
    image = jax.random.normal(jax.random.key(1), (16, 12, 12, 3)) + 1
    variables = model.init(jax.random.key(0), image)
    before = variables["batch_stats"]
    _, after = model.apply(variables, image, train=True, mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert set(moved) == {"patch_norm", "BatchNorm_0", "BatchNorm_1"}
    model.apply(variables, image)  # an error if it wanted to write them


def test_more_patch_features_than_values_are_refused():
    with pytest.raises(UserError, match=r"patch_features=24 .* 16 values in a patch of 4x4x1"):
        count(CNN(10, patch_size=4), (28, 28, 1))


def test_patches_that_leave_too_small_an_image_are_refused():
    with pytest.raises(UserError, match=r"2 pixels reach block 1.*model\.patch_size"):
        count(CNN(10, patch_size=16), (32, 32, 3))


def test_unknown_model():
    with pytest.raises(UserError, match="unknown model 'resnet'; known: cnn"):
        create_model("resnet", 10)
