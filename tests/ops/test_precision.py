"""Networks of bfloat16 and float16 on a CPU: rounded operands, float32 sums, rounded results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn.ops import convolution, precision
from cnn.ops.activations import gelu

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Compiling is most of the time of these tests.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rounded(dtype, *shapes):
    """Normally distributed numbers that the dtype holds, in float32."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)).astype("f") for shape in shapes]


def both(fn, dtype, *operands):
    """Result and gradients in a dtype, as float32, and those of the same numbers in float32."""

    @quick
    def run(g, *operands):
        y, pull = jax.vjp(fn, *operands)
        return y, *pull(g.astype(y.dtype))

    (g,) = rounded(dtype, jax.eval_shape(fn, *operands).shape)
    narrow = run(g, *(x.astype(jnp.dtype(dtype)) for x in operands))
    assert {x.dtype for x in narrow} == {jnp.dtype(dtype)}
    return [np.float32(x) for x in narrow], run(g, *operands)


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))


def conv(x, w, **arguments):
    fields = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT}
    return convolution.conv_general_dilated(x, w, **fields | arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (conv, [(2, 6, 6, 9), (3, 3, 9, 4)]),
        (functools.partial(conv, window_strides=(2, 2)), [(2, 6, 6, 9), (3, 3, 9, 4)]),
        (functools.partial(conv, pool=2), [(2, 6, 6, 20), (3, 3, 20, 4)]),
        (
            lambda x, w: convolution.dot_general(x, w, (((1,), (0,)), ((), ()))),
            [(5, 300), (300, 7)],
        ),
        (convolution.add_bias, [(40, 50, 3), (3,)]),
        (gelu, [(99,)]),
    ],
    ids=["winograd", "patches", "pooled", "dense", "bias", "gelu"],
)
def test_the_result_and_the_gradients_are_those_of_float32_rounded_once(fn, shapes, dtype):
    found, expected = both(fn, dtype, *rounded(dtype, *shapes))
    for actual, exact in zip(found, expected, strict=True):
        # Half a unit of the last place, and the rounding of float32.
        bound = float(jnp.finfo(dtype).eps) / 2 * abs(exact) + 1e-5 * abs(exact).max()
        assert (abs(actual - exact) <= bound).all()


@pytest.mark.parametrize("has_products", [True, False])
def test_factors_are_rounded_where_products_of_bfloat16_are_fast(monkeypatch, has_products):
    monkeypatch.setattr(convolution, "has_bfloat16_products", lambda: has_products)

    def network(x, w, v):
        y = conv(x, w)  # with many channels
        return convolution.dot_general(y.reshape(y.shape[0], -1), v, (((1,), (0,)), ((), ())))

    operands = rounded("bfloat16", (2, 4, 4, 128), (3, 3, 128, 128), (16 * 128, 5))
    found, expected = both(network, "bfloat16", *operands)
    for actual, exact in zip(found, expected, strict=True):
        error = root_mean_square(actual - exact) / root_mean_square(exact)
        assert error < (8e-3 if has_products else 4e-3)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in operands]
    _, slope = quick(lambda x: jax.jvp(network, x, x))(tuple(narrow))
    np.testing.assert_allclose(slope, 3 * found[0], rtol=2e-2, atol=2e-2 * abs(found[0]).max())
    program = str(jax.make_jaxpr(network)(*narrow))
    assert ("bf16[16,128,128]" in program) == has_products


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fma avx512_bf16 sse\n\nflags: x", True),
        ("flags: fma amx_bf16", True),
        ("flags: fma avx512f\n\nflags: avx512_bf16", False),
        ("Features: asimd bf16", False),
        (None, False),
    ],
)
def test_the_processor_is_asked_for_its_products(monkeypatch, text, expected):
    def read(path, errors):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(precision.Path, "read_text", read)
    assert precision.has_bfloat16_products.__wrapped__() == expected
