"""A depthwise convolution on a CPU against XLA's own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import batch_sharding, data_mesh, replicated_sharding
from cnn.ops import convolution

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x, w, strides, padding, implementation):
    return convolution.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=LAYOUT, feature_group_count=x.shape[-1],
        implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "padding"),
    [
        ((4, 6, 5, 3), (3, 3), (1, 1), "SAME"),
        ((3, 7, 9, 4), (3, 2), (2, 3), "VALID"),  # pixels are left over
        ((2, 9, 8, 2), (5, 7), (1, 2), "SAME"),
        ((11 * jax.device_count(), 4, 3, 2), (3, 3), (1, 1), "SAME"),  # several groups of images
        ((1, 4, 4, 5), (1, 1), (3, 1), ((2, 0), (1, 3))),
    ],
)
def test_it_is_the_native_one_with_all_derivatives(shape, kernel, strides, padding):
    rng = np.random.default_rng(0)
    # Whole numbers: their sums are exact in any order.
    x = rng.integers(-3, 4, shape).astype(np.float32)
    w = rng.integers(-3, 4, (*kernel, 1, shape[-1])).astype(np.float32)

    def everything(x, w, name):
        fn = functools.partial(convolve, strides=strides, padding=padding, implementation=name)
        y, pull = jax.vjp(fn, x, w)
        forward = jax.jvp(fn, (x, w), (x + 1, w - 1))[1]
        second = jax.grad(lambda w: (jax.grad(lambda x: (fn(x, w) ** 2).sum())(x) ** 2).sum())(w)
        return y, pull(y), forward, second

    run = jax.jit(lambda x, w: [everything(x, w, name) for name in ("auto", "native")])
    own, native = run(x, w)
    for actual, expected in zip(jax.tree.leaves(own), jax.tree.leaves(native), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    program = jax.make_jaxpr(lambda x, w: convolve(x, w, strides, padding, "auto"))(x, w)
    assert "conv_general_dilated" not in str(program)


def test_devices_meet_once_for_the_gradient_of_the_weights():
    mesh = data_mesh(jax.devices()[:2], 4)
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32)
    w = np.ones((3, 3, 1, 2), np.float32)

    def gradient(x, w, name="auto"):
        fn = functools.partial(convolve, strides=(1, 1), padding="SAME", implementation=name)
        return jax.grad(lambda w: jnp.sin(fn(x, w)).sum())(w)

    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(x, batch_sharding(mesh)),
            jax.device_put(w, replicated_sharding(mesh)),
        )
        program = jax.jit(gradient).lower(*placed).compile()
        found = program(*placed)
    np.testing.assert_allclose(found, gradient(x, w, "native"), rtol=1e-4, atol=1e-5)
    # Within the loop over the weights they would meet for each of them.
    (meeting,) = re.findall(r".* all-reduce\(.*", program.as_text())
    assert "while" not in meeting


def test_images_of_a_stack_are_convolved_alike():
    x, w = np.random.default_rng(0).normal(size=(2, 3, 5, 5, 2)), np.ones((3, 3, 1, 2))
    x, w = x.astype(np.float32), w.astype(np.float32)
    stacked = jax.vmap(lambda x: convolve(x, w, (1, 1), "SAME", "auto"))(x)
    alone = jnp.stack([convolve(one, w, (1, 1), "SAME", "native") for one in x])
    np.testing.assert_allclose(stacked, alone, rtol=1e-5, atol=1e-6)


def test_several_outputs_of_a_channel_are_native():
    x, w = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 1, 4), np.float32)
    program = jax.make_jaxpr(lambda x, w: convolve(x, w, (1, 1), "SAME", "auto"))(x, w)
    assert "conv_general_dilated" in str(program)
