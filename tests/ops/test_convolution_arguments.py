"""The operators are called like those of JAX and Flax, and answer wrong calls like them."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cnn.ops import convolution

conv_max_pool = functools.partial(convolution.conv_general_dilated, pool=2)
LAYOUT = ("NHWC", "HWIO", "NHWC")
IMAGES, KERNEL = (2, 6, 6, 5), (3, 3, 5, 4)
OWN = [name for name in convolution.IMPLEMENTATIONS if name != "native"]
each_own = pytest.mark.parametrize("implementation", OWN)


def zeros(*shapes, dtype="float32"):
    return [jnp.zeros(shape, dtype) for shape in shapes]


def parameters(fn):
    return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]


@pytest.mark.parametrize(
    ("own", "native"),
    [
        (convolution.conv_general_dilated, lax.conv_general_dilated),
        (convolution.dot_general, lax.dot_general),
        (convolution.max_pool, nn.max_pool),
    ],
)
def test_the_signature_is_that_of_the_native_function(own, native):
    known = [one for one in parameters(own) if one[0] not in ("implementation", "pool")]
    assert known == parameters(native)


WRONG = {
    "dtypes": {"rhs": np.zeros(KERNEL, np.float16)},
    "channels": {"rhs": np.zeros((3, 3, 6, 4), np.float32)},
    "number": {"padding": 1},
    "three pads": {"padding": ((1, 1), (1, 1), (1, 1))},
    "not pairs": {"padding": ((1,), (1,))},
    "unknown padding": {"padding": "WIDE"},
    "one stride": {"window_strides": (1,)},
    "zero stride": {"window_strides": (0, 1)},
    "three strides": {"window_strides": (1, 1, 1)},
    "rank": {"rhs": np.zeros((3, 5, 4), np.float32)},
    "image rank": {"lhs": np.zeros((6, 6, 5), np.float32)},
    "dilations": {"rhs_dilation": (1, 1, 1)},
    "layout": {"dimension_numbers": ("NHWC", "HWIO", "NHXC")},
    "groups": {"feature_group_count": 3},
    "precision": {"precision": "very high"},
    "result": {"preferred_element_type": "no dtype"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_gets_the_sentence_of_jax(case):
    lhs, rhs = zeros(IMAGES, KERNEL)
    arguments = {
        "lhs": lhs, "rhs": rhs, "window_strides": (1, 1), "padding": "SAME",
        "dimension_numbers": LAYOUT, **WRONG[case],
    }  # fmt: skip
    with pytest.raises(Exception) as expected:  # noqa: PT011 (the types are JAX's)
        lax.conv_general_dilated(**arguments)
    for implementation in OWN:
        for fn in (convolution.conv_general_dilated, conv_max_pool):
            with pytest.raises(type(expected.value)) as actual:
                fn(**arguments, implementation=implementation)
            assert str(actual.value)[:100] == str(expected.value)[:100]  # no line numbers


@each_own
def test_lists_and_lower_case_are_as_good_as_tuples_and_upper_case(implementation):
    x, w = np.random.default_rng(0).normal(size=(2, *IMAGES)).astype("f")[:, :1], np.ones(KERNEL)
    conv = functools.partial(
        convolution.conv_general_dilated, x[0], w.astype("f"), dimension_numbers=LAYOUT
    )
    expected = conv((1, 1), ((1, 1), (1, 1)), implementation=implementation)
    for padding in ("same", [[1, 1], np.array([1, 1])]):
        actual = conv([1, np.int64(1)], padding, lhs_dilation=[1, 1], implementation=implementation)
        np.testing.assert_array_equal(actual, expected)
    program = jax.make_jaxpr(lambda: convolution.max_pool(x[0], (2, 2), (2, 2), "valid"))()
    assert "reduce_window" not in str(program)


@each_own
def test_no_output_channels_and_no_images_are_no_error(implementation):
    for images, kernel in ((IMAGES, (3, 3, 5, 0)), ((0, 6, 6, 5), KERNEL), (IMAGES, (7, 7, 5, 4))):
        x, w = zeros(images, kernel)
        native, own = (
            convolution.conv_general_dilated(
                x, w, (1, 1), "VALID", dimension_numbers=LAYOUT, implementation=name
            )
            for name in ("native", implementation)
        )
        assert own.shape == native.shape


@each_own
def test_the_dtype_of_the_result_can_be_chosen(implementation):
    x, w = zeros(IMAGES, KERNEL, dtype="bfloat16")
    y = convolution.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=LAYOUT, preferred_element_type="float32",
        implementation=implementation,
    )  # fmt: skip
    assert y.dtype == jnp.float32
    numbers = (((1,), (0,)), ((), ()))
    product = convolution.dot_general(x[0, 0], w[0, 0], numbers, preferred_element_type="float32")
    assert product.dtype == jnp.float32


def test_integers_and_complex_numbers_are_native():
    for dtype in ("int32", "complex64"):
        x, w = zeros(IMAGES, KERNEL, dtype=dtype)
        conv = functools.partial(convolution.conv_general_dilated, implementation="winograd")
        program = jax.make_jaxpr(
            lambda x, w, conv=conv: conv(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)
        )(x, w)
        assert "conv_general_dilated" in str(program)


@pytest.mark.parametrize("fields", [{}, {"strides": 2}, {"preferred_element_type": jnp.float32}])
def test_the_layers_of_nnx_take_them(fields):
    x = jnp.arange(2 * 6 * 6 * 5, dtype=jnp.float32).reshape(IMAGES) / 99
    conv, own = (
        nnx.Conv(5, 4, (3, 3), rngs=nnx.Rngs(0), **fields, **own)
        for own in ({}, {"conv_general_dilated": convolution.conv_general_dilated})
    )
    np.testing.assert_allclose(own(x), conv(x), atol=2e-5)
    linear, own = (
        nnx.Linear(5, 4, rngs=nnx.Rngs(0), **own)
        for own in ({}, {"dot_general": convolution.dot_general})
    )
    np.testing.assert_allclose(own(x[0, 0]), linear(x[0, 0]), atol=1e-5)


def test_wrong_pooling_and_products_get_the_sentences_of_flax_and_jax():
    x, w = zeros((2, 6, 6, 5), (4, 3))
    calls = [
        (convolution.max_pool, nn.max_pool, (x, (2, 2), (2,))),
        (convolution.max_pool, nn.max_pool, (x, (2, 2), (2, 2), "WIDE")),
        (convolution.max_pool, nn.max_pool, (x, 2, 2)),
        (convolution.dot_general, lax.dot_general, (x[0, 0], w, (((1,), (0,)), ((), ())))),
    ]
    for own, native, arguments in calls:
        with pytest.raises(Exception) as expected:  # noqa: PT011 (the types are theirs)
            native(*arguments)
        with pytest.raises(type(expected.value)) as actual:
            own(*arguments)
        assert str(actual.value) == str(expected.value)


def test_strings_that_choose_are_checked():
    x, w = zeros(IMAGES, KERNEL)
    with pytest.raises(
        ValueError, match="unknown implementation 'patch'; known: auto, native, patches"
    ):
        convolution.max_pool(x, (2, 2), (2, 2), implementation="patch")
    with pytest.raises(ValueError, match="pool is 1 or 2, not 3"):
        convolution.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT, pool=3)
