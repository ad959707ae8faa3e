import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn.models import ConvPool
from cnn.ops.convolution import conv_general_dilated


class Wrapped(nn.Module):
    """One layer of a fixed name."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make(name="layer")(x)


@pytest.mark.parametrize("fields", [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_it_has_the_parameters_and_bits_of_a_flax_layer_with_pooling(padding, fields):
    x = jax.random.normal(jax.random.key(1), (2, 9, 8, 5))
    pooled = functools.partial(conv_general_dilated, pool=2)
    plain = functools.partial(nn.Conv, 4, (3, 3), padding=padding, **fields)
    expected, variables = Wrapped(
        functools.partial(plain, conv_general_dilated=pooled)
    ).init_with_output(jax.random.key(0), x)
    layer = Wrapped(functools.partial(ConvPool, 4, padding=padding, **fields))
    actual, own = layer.init_with_output(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_the_shape_before_the_pooling_is_that_of_the_convolution(padding):
    image = jax.ShapeDtypeStruct((2, 9, 8, 5), jnp.float32)
    plain = nn.Conv(4, (5, 5), padding=padding)
    expected, _ = jax.eval_shape(plain.init_with_output, jax.random.key(0), image)
    assert ConvPool(4, 5, padding).convolved_shape(image.shape) == expected.shape[1:]
