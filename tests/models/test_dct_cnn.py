import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import UserError
from cnn.models import DctCNN
from cnn.models.dct_cnn import cosine_filters


def count(model, image_shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("fields", "image_shape", "expected"),
    [
        # 8x8 patches of 2 * 6 channels; the stem has running mean and variance only:
        # (3*3*12 + 1) * 8, (3*3*8 + 1) * 16, (16 + 1) * 10, and 2 * 6
        (
            {"features": (8,), "hidden_features": 16, "patch_features": 6, "batch_norm": False},
            (32, 32, 1),
            872 + 1_168 + 170 + 12,
        ),
        # the same with running mean and variance for each bias: + 2 * (8 + 16)
        (
            {"features": (8,), "hidden_features": 16, "patch_features": 6},
            (32, 32, 1),
            872 + 1_168 + 170 + 12 + 48,
        ),
    ],
)
def test_the_number_of_variables(fields, image_shape, expected):
    assert count(DctCNN(10, **fields), image_shape) == expected


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
    model = DctCNN(4, features=(8,), patch_size=2, patch_features=5, batch_norm=False)
    image = jax.random.normal(jax.random.key(1), (16, 8, 12, 3)) * 3 + 2
    variables = jax.jit(model.init)(jax.random.key(0), image)
    run = functools.partial(model.apply, train=True, capture_intermediates=True, mutable=True)
    _, inner = jax.jit(run)(variables, image)
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
    model = DctCNN(4, features=(8,), hidden_features=6, patch_size=2, patch_features=5)
    image = jax.random.normal(jax.random.key(1), (16, 12, 12, 3)) + 1
    variables = jax.jit(model.init)(jax.random.key(0), image)
    before = variables["batch_stats"]
    run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, after = jax.jit(run)(variables, image)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert set(moved) == {"patch_norm", "BatchNorm_0", "BatchNorm_1"}
    jax.jit(model.apply)(variables, image)  # an error if it wanted to write them


def test_more_patch_features_than_values_are_refused():
    with pytest.raises(UserError, match=r"patch_features=24 .* 16 values in a patch of 4x4x1"):
        count(DctCNN(10), (28, 28, 1))


def test_patches_that_leave_too_small_an_image_are_refused():
    with pytest.raises(UserError, match=r"2 pixels reach block 1.*model\.patch_size"):
        count(DctCNN(10, patch_size=16), (32, 32, 3))


def test_patches_larger_than_the_image_are_refused():
    with pytest.raises(UserError, match=r"model\.patch_size=9 is more than the 8 pixels"):
        count(DctCNN(10, patch_size=9, features=()), (8, 8, 3))


@pytest.mark.parametrize("fields", [{"patch_size": 0}, {"patch_features": 0}, {"padding": "FULL"}])
def test_impossible_fields_are_refused_when_the_module_is_made(fields):
    with pytest.raises(UserError, match=rf"model\.{next(iter(fields))}="):
        DctCNN(10, **fields)
