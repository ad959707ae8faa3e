import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn.models.initializers import identity_first, whitening_kernel


@pytest.mark.parametrize(("channels", "features"), [(3, 5), (4, 4), (5, 3)])
def test_the_first_filters_repeat_the_channels(channels, features):
    """At the centre tap; the others are what they would have been."""

    def sevens(key, shape, dtype):
        return jnp.full(shape, 7, dtype)

    kernel = np.array(identity_first(sevens)(None, (3, 3, channels, features)))
    assert (kernel[..., channels:] == 7).all()
    same = np.arange(min(channels, features))
    assert (kernel[1, 1, same, same] == 1).all()
    kernel[1, 1, same, same] = 0
    assert (kernel[..., same] == 0).all()


def whitened(images, kernel):
    """The patches of images, through the filters: `[N, K]`."""
    result = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(result, np.float64).reshape(-1, kernel.shape[-1])


@pytest.fixture(scope="module")
def images():
    """Neighbours and channels are correlated, and the mean is not 0."""
    noise = np.random.default_rng(0).normal(size=(40, 13, 14, 3))
    smooth = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1]
    return jnp.asarray(
        smooth @ [[1.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]] + 2, jnp.float32
    )


def test_the_patches_come_out_white(images):
    """Their second moment, not their covariance, is the identity."""
    kernel = whitening_kernel(images)
    assert kernel.shape == (2, 2, 3, 24)
    first = whitened(images, kernel[..., :12])
    np.testing.assert_allclose(first.T @ first / len(first), np.eye(12), atol=1e-2)
    assert np.abs(np.cov(first.T) - np.eye(12)).max() > 0.5


def test_the_filters_come_with_both_signs_and_by_falling_variance(images):
    kernel = np.asarray(whitening_kernel(images))
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    norms = np.linalg.norm(kernel[..., :12].reshape(12, 12), axis=0)
    assert (np.diff(norms) > 0).all()  # the reciprocal of the standard deviation


def test_a_direction_without_variance_is_not_blown_up(images):
    kernel = whitening_kernel(images * jnp.array([1.0, 1.0, 0.0]).reshape(1, 1, 1, 3), epsilon=5e-4)
    norms = jnp.linalg.norm(kernel[..., :12].reshape(12, 12), axis=0)
    np.testing.assert_allclose(norms[-4:], 5e-4**-0.5, rtol=1e-2)
    # The longest: with variance l a filter has the norm 1 / sqrt(l + epsilon).
    strong = whitened(images, kernel[..., :1])
    assert (strong**2).mean() == pytest.approx(1, rel=1e-3)
