"""What the implementations differ in: rounding, exact zeros, and what is not finite."""

import functools

import jax
import numpy as np
import pytest

from cnn.ops import convolution

# Largest error, as a part of the largest value of the exact result. Measured on x86 for results
# and both gradients: up to 1e-5 for "winograd", 9.5e-7 for the others (see cnn/ops/winograd.py).
BOUNDS = {"native": 2e-6, "patches": 2e-6, "winograd": 2e-5}
LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(
    jax.jit,
    static_argnames="implementation",
    compiler_options={"xla_backend_optimization_level": 0},
)
def run(x, w, g, implementation):
    """The convolution without padding, and the gradients of image and kernel."""

    def conv(x, w):
        fn = convolution.conv_general_dilated
        return fn(x, w, (1, 1), "VALID", dimension_numbers=LAYOUT, implementation=implementation)

    y, pull = jax.vjp(conv, x, w)
    return y, *pull(g)


def exact(x, w):
    """In float64."""
    windows = np.lib.stride_tricks.sliding_window_view(np.float64(x), w.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, np.float64(w), optimize=True)


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("side", "channels"), [(10, 4), (14, 64)])
def test_rounding_stays_within_its_bound(side, channels):
    x, w, g = normal(
        (2, side, side, channels), (3, 3, channels, channels), (2, side - 2, side - 2, channels)
    )
    padded = np.pad(g, ((0, 0), (2, 2), (2, 2), (0, 0)))
    of_image = exact(padded, w[::-1, ::-1].transpose(0, 1, 3, 2))
    of_kernel = exact(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)
    for implementation, bound in BOUNDS.items():
        for a, e in zip(
            run(x, w, g, implementation), (exact(x, w), of_image, of_kernel), strict=True
        ):
            assert abs(a - e).max() <= bound * abs(e).max(), implementation


def test_only_winograd_rounds_a_gradient_that_is_zero():
    x, w, g = normal((2, 8, 8, 4), (3, 3, 4, 2), (2, 6, 6, 2))
    x[:, :6] = 0  # whatever the upper row of the kernel sees
    gradients = {name: run(x, w, g, name)[2] for name in BOUNDS}
    assert not gradients["native"][0].any()
    assert not gradients["patches"][0].any()
    assert 0 < abs(gradients["winograd"][0]).max() < 1e-5 * abs(gradients["winograd"]).max()


def test_only_winograd_spreads_what_is_not_finite():
    x, w, g = normal((1, 10, 10, 4), (3, 3, 4, 2), (1, 8, 8, 2))
    for value in (np.nan, np.inf):
        x[0, 1, 1, 0] = value
        native, patches, winograd = (run(x, w, g, name)[0] for name in BOUNDS)
        np.testing.assert_array_equal(np.isfinite(patches), np.isfinite(native))
        np.testing.assert_array_equal(np.isnan(patches), np.isnan(native))
        hit, near = ~np.isfinite(native), ~np.isfinite(winograd)
        assert (hit <= near).all()
        assert near[0, :4, :4].all()
        assert not near[0, 4:].any()  # within a tile of 4x4 outputs
