import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn import CNN, batch_mesh, layers, replicated, sharded

# Largest difference from XLA's own convolution, as a part of the largest sum of the magnitudes
# of the products that make a number. That is what rounding grows with; the number itself may be
# near zero. Measured over 300 shapes on x86 (float32): 2.1e-7, Winograd's 3.1e-7; its sums and
# differences round more. bfloat16: 4e-3, one rounding to 8 bits.
BOUNDS = {jnp.float32: 5e-7, jnp.bfloat16: 2**-7}
WINOGRAD_BOUND = 1e-6

FUNCTIONS = [layers.conv_general_dilated, layers.conv_max_pool]
LAYOUT = ("NHWC", "HWIO", "NHWC")
each_function = pytest.mark.parametrize("fn", FUNCTIONS)
each_lowering = pytest.mark.parametrize("lowering", layers.LOWERINGS)
# No shrinking: each attempt would compile anew, for longer than a test may take.
examples = functools.partial(
    hypothesis.settings,
    derandomize=True,
    deadline=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


@st.composite
def convolutions(draw):
    """Shapes of images and kernel, strides and padding, with outputs enough for pooling."""
    side = st.integers(1, 5)
    kernel = draw(st.just((3, 3)) | st.tuples(side, side))
    strides = draw(st.just((1, 1)) | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pad = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(st.sampled_from(["VALID", "SAME"]) | st.tuples(pad, pad))
    pads = {"VALID": (0, 0), "SAME": [k - 1 for k in kernel]}.get(padding) or map(sum, padding)
    smallest = [max(1, k + s - p) for k, s, p in zip(kernel, strides, pads, strict=True)]
    height, width = (size + draw(st.integers(0, 5)) for size in smallest)
    batch, features = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    channels = draw(st.integers(1, 8) | st.integers(9, 40))
    arguments = {"window_strides": strides, "padding": padding}
    return (batch, height, width, channels), (*kernel, channels, features), arguments


def normal(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def whole(*shapes, dtype=jnp.float32):
    """Small whole numbers: sums of their products are exact in any order, and often equal."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(-1, 2, size=shape), dtype) for shape in shapes]


def apply(fn, x, kernel, lowering="native", window_strides=(1, 1), padding="VALID"):
    return fn(x, kernel, window_strides, padding, dimension_numbers=LAYOUT, lowering=lowering)


def with_gradients(fn, names=layers.LOWERINGS, **arguments):
    """`(images, kernel, cotangent) -> {lowering: (result, its gradients)}`, as one program."""

    def one(x, kernel, g, lowering):
        y, pull = jax.vjp(lambda x, k: apply(fn, x, k, lowering, **arguments), x, kernel)
        return y, *pull(g)

    return jax.jit(lambda *operands: {name: one(*operands, name) for name in names})


def assert_close(actual, expected, scales, bound):
    for a, e, scale in zip(*map(jax.tree.leaves, (actual, expected, scales)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        assert difference.max() <= bound * float(scale.max())


def assert_equal(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def is_decided(y, margin):
    """Where the largest of a 2x2 window leads by more than rounding can change."""
    batch, height, width, features = y.shape
    y = np.asarray(y, np.float64)[:, : height // 2 * 2, : width // 2 * 2]
    y = y.reshape(batch, height // 2, 2, width // 2, 2, features)
    ranked = np.sort(y.transpose(0, 1, 3, 5, 2, 4).reshape(*y[:, :, 0, :, 0].shape, 4))
    return ranked[..., 3] - ranked[..., 2] > margin


def bound_of(lowering, dtype=jnp.float32):
    return WINOGRAD_BOUND if lowering != "patches" and dtype == jnp.float32 else BOUNDS[dtype]


@each_function
@examples(max_examples=14)
@hypothesis.given(convolutions(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_every_lowering_agrees_with_the_native_one(fn, convolution, dtype):
    image, kernel, arguments = convolution
    x, w = normal(image, kernel, dtype=dtype)
    y = apply(layers.conv_general_dilated, x, w, **arguments)
    run = with_gradients(fn, **arguments)
    if fn is layers.conv_max_pool:
        magnitude = apply(layers.conv_general_dilated, abs(x), abs(w), **arguments)
        y = is_decided(y, 2 * WINOGRAD_BOUND * float(magnitude.max()))
    x, w, g = normal(image, kernel, y.shape, dtype=dtype)
    results, magnitudes = run(x, w, g), run(abs(x), abs(w), abs(g))["native"]
    for lowering, result in results.items():
        assert_close(result, results["native"], magnitudes, bound_of(lowering, dtype))
    results = run(*whole(image, kernel, y.shape, dtype=dtype))
    for result in results.values():
        assert_equal(result, results["native"])
