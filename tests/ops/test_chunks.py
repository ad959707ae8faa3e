import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import batch_sharding, data_mesh, replicated_sharding
from cnn.ops.chunks import in_chunks

IMAGES = jax.random.normal(jax.random.key(0), (12, 6, 6, 3))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))


def convolve(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.jit, static_argnames="values")
def forward_and_gradients(images, kernel, values):
    """The result, and the gradients of images and kernel."""
    fn = convolve if values is None else functools.partial(in_chunks, convolve, values=values)
    result, pull = jax.vjp(fn, images, kernel)
    return result, *pull(jnp.cos(result))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_chunks_give_what_the_whole_gives(num_devices):
    """Of 3 of the 12 or 6 images of each device."""
    mesh = data_mesh(jax.devices()[:num_devices], 12)
    with jax.set_mesh(mesh):
        placed = jax.device_put(IMAGES, batch_sharding(mesh))
        kernel = jax.device_put(KERNEL, replicated_sharding(mesh))
        traced = jax.make_jaxpr(lambda x, w: in_chunks(convolve, x, w, 3 * x[0].size))
        assert "scan" in str(traced(placed, kernel))
        found = forward_and_gradients(placed, kernel, values=3 * IMAGES[0].size)
    expected = forward_and_gradients(IMAGES, KERNEL, values=None)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    assert found[0].sharding.device_set == set(mesh.devices.flat)


def test_few_images_are_not_cut():
    traced = jax.make_jaxpr(functools.partial(in_chunks, convolve))(IMAGES, KERNEL)
    assert "scan" not in str(traced)
