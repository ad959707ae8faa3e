"""Convolution and max-pooling, lowered well on every backend.

GPU and TPU have fast native convolutions. XLA's on a CPU is slow, its gradients and those of
max-pooling most of all, so there the same sums are written as matrix products:

- "patches": the shifted views of the image that a kernel meets side by side, times the kernel as a
  matrix (im2col; Chellapilla et al. 2006, "High performance convolutional neural networks for
  document processing"). See `cnn.ops.im2col`.
- "winograd": 3x3 kernels by minimal filtering, with a quarter of the multiplications. It loses one
  decimal digit, rounds gradients that are exactly zero, which sign-based optimizers notice, and
  spreads NaN and infinities to neighbouring pixels. See `cnn.ops.winograd`.

All are the same function of the same parameters, to rounding, and have derivatives of any order in
any mode. Choose with `implementation=`; "auto" decides by backend and shape.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops import im2col, pooling, winograd
from cnn.ops.layout import lines
from cnn.ops.linear_map import bilinear

IMPLEMENTATIONS = ("auto", "native", "patches", "winograd")
# What the implementations compute other than natively.
DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))
Padding = str | Sequence[tuple[int, int]]

_natively = contextvars.ContextVar("natively", default=False)
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# With so few input channels, those of an image, the products of "winograd" are too slim.
_FEW_CHANNELS = 3
# More would take long to compile.
_FEW_PIXELS = 64


@contextlib.contextmanager
def native_operators() -> Iterator[None]:
    """Within it, every operator is traced as for a GPU or TPU, whatever the default backend.

    A program that is exported from a CPU for other platforms needs it: the choice of "auto" is
    made while tracing, before the platform is known. A implementation that is named keeps its meaning.

    Only tracing is affected. `jax.jit` keeps what it traced, without regard to this context: trace
    a function that was not traced before, such as a new lambda or `functools.partial`.
    """
    token = _natively.set(True)
    try:
        yield
    finally:
        _natively.reset(token)


def _is_for_cpu() -> bool:
    """Whether "auto" means the operators for a CPU."""
    return jax.default_backend() == "cpu" and not _natively.get()


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    implementation: str = "auto",
    pool: int = 1,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=...)` to call.

    The arguments up to `out_sharding` are those of `lax.conv_general_dilated`, and so are the
    errors for wrong ones. A convolution is native, whatever the implementation, unless it is
    two-dimensional with the layouts NHWC and HWIO, without dilation and groups, its operands and
    its result have one dtype, of `DTYPES`, and they are not sharded over explicit mesh axes.

    Args:
      lhs: images, `float[B, H, W, C]`.
      rhs: kernel, `float[kh, kw, C, O]`.
      window_strides: vertical and horizontal.
      padding: "SAME", "SAME_LOWER", "VALID", or (low, high) for each spatial dimension.
      lhs_dilation: of `lax.conv_general_dilated`.
      rhs_dilation: of `lax.conv_general_dilated`.
      dimension_numbers: of `lax.conv_general_dilated`.
      feature_group_count: of `lax.conv_general_dilated`.
      batch_group_count: of `lax.conv_general_dilated`.
      precision: of the products.
      preferred_element_type: of `lax.conv_general_dilated`.
      out_sharding: of `lax.conv_general_dilated`.
      implementation: one of `IMPLEMENTATIONS`.
      pool: 2 max-pools the result, as `conv_max_pool` explains.

    Returns:
      `float[B, H', W', O]`.

    Raises:
      ValueError: for an unknown implementation, or another `pool` than 1 and 2.
    """
    if pool not in (1, 2):
        raise ValueError(f"pool is 1 or 2, not {pool!r}")
    native = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    implementation = _resolve(implementation)
    if implementation != "native":
        result = jax.eval_shape(native, lhs, rhs)  # raises what `lax` has to say of the arguments
        plain = feature_group_count == batch_group_count == 1 and out_sharding is None
        plain &= not _are_explicitly_sharded(lhs, rhs)
        plain &= all(one is None or tuple(one) == (1, 1) for one in (lhs_dilation, rhs_dilation))
        if plain and _is_covered(lhs, rhs, result, dimension_numbers, pool):
            strides = window_strides[0], window_strides[1]
            pads = _pads(lhs, rhs, strides, padding)
            # The sums and differences of Winograd's transforms need the digits of float32.
            able = strides == (1, 1) and rhs.shape[:2] == (3, 3) and lhs.dtype == jnp.float32
            if implementation == "auto":
                many = lhs.shape[-1] > _FEW_CHANNELS
                implementation = "winograd" if able and many else "patches"
            if implementation == "patches":
                return im2col.convolve(lhs, rhs, strides, pads, precision, pool)
            if able:
                return winograd.convolve(lhs, rhs, pads, precision, pool)
    y = native(lhs, rhs)
    return y if pool == 1 else nn.max_pool(y, (2, 2), (2, 2))


def conv_max_pool(*args: Any, **options: Any) -> jax.Array:
    """`conv_general_dilated`, then 2x2 max-pooling with stride 2 and no padding, as one.

    A bias and a relu may follow instead of coming in between: pool(relu(x + b)) equals
    relu(pool(x) + b), and costs four times as much. Outputs that the pooling would drop are not
    computed. Of equal elements in a window the first, in row-major order, gets the gradient, as
    with `nn.max_pool`. But as that happens before the relu, a window without a positive element
    passes none back at all; and "winograd" may round apart what would be equal, though not on a
    flat part of an image.

    Args:
      *args: of `conv_general_dilated`. In layouts other than NHWC, too, the last dimension but one
        and the one before it are pooled.
      **options: of `conv_general_dilated`.

    Returns:
      `float[B, H' // 2, W' // 2, O]`.
    """
    return conv_general_dilated(*args, pool=2, **options)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    implementation: str = "auto",
) -> jax.Array:
    """`nn.max_pool`, with a cheap gradient on a CPU where windows do not overlap.

    The arguments up to `padding` are those of `nn.max_pool`, and so are the errors for wrong ones.
    Of equal elements the first in row-major order gets the gradient, as with `nn.max_pool`.

    Args:
      inputs: `float[B, H, W, C]`. Of another rank or dtype than `DTYPES` the pooling is native.
      window_shape: height and width.
      strides: native unless equal to the window.
      padding: "VALID", "SAME", or (low, high) for each spatial dimension; native unless "VALID".
      implementation: "native", or any other of `IMPLEMENTATIONS`, which all pool in the same way.

    Raises:
      ValueError: for an unknown implementation.
    """
    # Flax's annotation of the padding is narrower than what it takes.
    arguments = window_shape, strides, cast(Any, padding)
    if _resolve(implementation) != "native":
        result = jax.eval_shape(lambda x: nn.max_pool(x, *arguments), inputs)
        valid = isinstance(padding, str) and padding.upper() == "VALID"
        apart = strides is not None and tuple(strides) == tuple(window_shape)
        covered = inputs.ndim == 4 and len(window_shape) == 2 and inputs.dtype in DTYPES
        covered &= not _are_explicitly_sharded(inputs)
        if valid and apart and covered and 0 not in result.shape:
            return pooling.max_pool(inputs, (window_shape[0], window_shape[1]))
    return nn.max_pool(inputs, *arguments)


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general`, for `nn.Dense(dot_general=...)` to call.

    On a CPU the gradient of a matrix of weights is computed as it is stored, which XLA does not do.

    Args:
      lhs: array.
      rhs: array.
      dimension_numbers: of `lax.dot_general`.
      precision: of `lax.dot_general`.
      preferred_element_type: of `lax.dot_general`.
      out_sharding: of `lax.dot_general`.
    """
    native = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if _is_for_cpu() and dimension_numbers == (((1,), (0,)), ((), ())) and out_sharding is None:
        result = jax.eval_shape(native, lhs, rhs)
        plain = jnp.ndim(lhs) == jnp.ndim(rhs) == 2 and not _are_explicitly_sharded(lhs, rhs)
        if plain and _have_one_dtype(lhs, rhs, result):
            return _matmul(lhs, rhs, precision)
    return native(lhs, rhs)


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[B, K]` times `[K, O]`."""
    return jnp.matmul(x, w, precision=precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return jnp.matmul(g, w.T, precision=precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision)


_matmul = bilinear(_product, _gradient_x, _gradient_w)


def flatten(images: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H * W * C]`.

    On a CPU pixel by pixel: fused with a reshape, what comes before would be slow there.
    """
    batch, height, width, channels = images.shape
    if not _is_for_cpu() or not 0 < height * width <= _FEW_PIXELS:
        return images.reshape(batch, height * width * channels)
    pixels = [pixel for row in lines(images, 1) for pixel in lines(row, 1)]
    return jnp.concatenate(pixels, axis=-1)


def _resolve(implementation: str) -> str:
    """The implementation, with "native" for "auto" where it is not for a CPU."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    return "native" if implementation == "auto" and not _is_for_cpu() else implementation


def _is_covered(lhs: jax.Array, rhs: jax.Array, result: Any, numbers: Any, pool: int) -> bool:
    """Whether layout, dtypes and sizes are those of a convolution that we lower ourselves."""
    if lhs.ndim != 4 or not _have_one_dtype(lhs, rhs, result) or 0 in (*lhs.shape, *result.shape):
        return False
    layout, nhwc = (lax.conv_dimension_numbers(lhs.shape, rhs.shape, n) for n in (numbers, _LAYOUT))
    return layout == nhwc and min(result.shape[1:3]) >= pool


def _have_one_dtype(*arrays: Any) -> bool:
    return arrays[0].dtype in DTYPES and len({array.dtype for array in arrays}) == 1


def _are_explicitly_sharded(*arrays: Any) -> bool:
    """Whether the types of arrays tell how they are sharded, as on a mesh with explicit axes."""
    specs = [jax.typeof(array).sharding.spec for array in arrays]
    return any(axes is not None for spec in specs for axes in spec)


def _pads(
    lhs: jax.Array, rhs: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    return tuple((low, high) for low, high in padding)
