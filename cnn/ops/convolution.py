"""Convolution, max pooling and dense products, computed well on every backend.

GPU and TPU have fast native convolutions; the gradient of XLA's max pooling is slow on a GPU, where
`cnn.ops.pooling.indexed_max_pool` replaces it. XLA's convolutions on a CPU are slow, and so are the
gradients of its convolutions and of max pooling; there the same sums are computed as matrix
products:

- "patches": the windows that the kernel covers, flattened, times the kernel as a matrix (im2col;
  Chellapilla et al. 2006, "High performance convolutional neural networks for document
  processing"). See `cnn.ops.im2col`.
- "winograd": 3x3 kernels by minimal filtering, with a quarter of the multiplications. It loses one
  decimal digit, turns gradients that are exactly zero into rounding noise, which sign-based
  optimizers notice, and spreads NaN and infinity to neighbouring pixels. See `cnn.ops.winograd`.

A depthwise convolution is a sum of shifted images with either: see `cnn.ops.depthwise`.

bfloat16 and float16 mean there what they mean on a GPU: the operands of a product are rounded, its
sums are float32, and the result is rounded, unless XLA fuses it with what follows. They are
convolved in float32, as XLA computes little else fast on a CPU. Processors with AVX512-BF16 or AMX
multiply bfloat16 twice as fast; there dense products have operands of bfloat16, and so have those
of "winograd" with many channels, which rounds its transformed operands too.

All implementations are the same function of the same parameters, to rounding, and are
differentiable to any order in any mode. `implementation=` chooses one; "auto" chooses by backend
and shape.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cnn.ops import depthwise, im2col, pooling, winograd
from cnn.ops.chunks import in_chunks
from cnn.ops.layout import nhwc_to_hwnc
from cnn.ops.linear_map import bilinear
from cnn.ops.precision import has_bfloat16_products, widened

IMPLEMENTATIONS = ("auto", "native", "patches", "winograd")
# Arrays of other dtypes are always convolved and pooled natively.
DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))
Padding = str | Sequence[tuple[int, int]]

_natively = contextvars.ContextVar("natively", default=False)
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to this number of input channels the products of "winograd" are too thin to be fast.
_FEW_CHANNELS = 3
# With so many pairs of an input and an output channel, products of bfloat16 save more than the
# smaller tiles of "winograd" cost that they need (benchmarks/NOTES.md).
_MANY_PAIRS = 128 * 128
# Flattening more pixels one by one takes long to compile.
_FEW_PIXELS = 64


@contextlib.contextmanager
def native_operators() -> Iterator[None]:
    """A context in which "auto" means "native", as on a GPU or TPU, whatever the default backend.

    Exporting a program from a CPU for other platforms needs this: "auto" is resolved while tracing,
    when the platform is not known. An implementation that is chosen by name is not affected.

    The context affects tracing only, and `jax.jit` reuses what it has traced regardless of it. To
    be sure, trace a function that was not traced before, such as a new lambda.
    """
    token = _natively.set(True)
    try:
        yield
    finally:
        _natively.reset(token)


def _is_for_cpu() -> bool:
    """Whether "auto" means the matrix products for a CPU."""
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
    """`jax.lax.conv_general_dilated` with a choice of implementation, and optional max pooling.

    It can be passed as `nn.Conv(conv_general_dilated=...)`. The arguments up to `out_sharding` and
    the errors for wrong ones are those of `lax.conv_general_dilated`: images `lhs` are
    `float[B, H, W, C]`, the kernel `rhs` is `float[kh, kw, C, K]`, and the result is
    `float[B, H', W', K]`. `implementation` is one of `IMPLEMENTATIONS`.

    The convolution is native, whatever `implementation` is, unless it is two-dimensional, has the
    layouts NHWC and HWIO, no dilation, and no groups or one for each channel, its operands and its
    result have one dtype out of `DTYPES`, and they are not sharded over explicit mesh axes.
    "winograd" is native too unless the kernel is 3x3, the strides are 1 and the dtype is not
    float64. Both compute bfloat16 and float16 in float32, and round the result. "winograd" also
    rounds the factors of its products to bfloat16 where the operands are bfloat16, `precision` is
    None, the kernel has 128 x 128 pairs of channels or more and the processor has such products.

    `pool=2` max-pools the result with 2x2 windows, stride 2 and no padding; outputs that the
    pooling drops are not computed. Bias and relu should follow the pooling: relu(pool(x) + b)
    equals pool(relu(x + b)) for a quarter of the work. Of equal elements in a window the first in
    row-major order gets the gradient, as with `nn.max_pool`, but here that is decided before the
    relu, and before bfloat16 and float16 are rounded: a window without a positive element passes no
    gradient back. "winograd" may round equal elements apart, though not on a flat part of an image.

    Raises:
      ValueError: `implementation` is unknown, or `pool` is neither 1 nor 2.
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
    choice = _resolve(implementation)
    if choice != "native":
        result = jax.eval_shape(native, lhs, rhs)  # raises the errors of lax for wrong arguments
        is_depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1] != 1 and pool == 1
        use_own = feature_group_count == 1 or is_depthwise
        use_own &= batch_group_count == 1 and out_sharding is None
        use_own &= not _are_explicitly_sharded(lhs, rhs)
        use_own &= all(d is None or tuple(d) == (1, 1) for d in (lhs_dilation, rhs_dilation))
        if use_own and _is_covered(lhs, rhs, result, dimension_numbers, pool):
            strides = window_strides[0], window_strides[1]
            pads = _pads(lhs, rhs, strides, padding)
            dtype, wide = lhs.dtype, jnp.promote_types(lhs.dtype, jnp.float32)
            fits_winograd = strides == (1, 1) and rhs.shape[:2] == (3, 3) and wide == jnp.float32
            if choice == "auto":
                use_winograd = fits_winograd and lhs.shape[-1] > _FEW_CHANNELS
                choice = "winograd" if use_winograd else "patches"
            fields = {"padding": pads, "precision": precision, "pool": pool}
            own: Any = None
            if is_depthwise:
                own = functools.partial(depthwise.convolve, strides=strides, padding=pads)
            elif choice == "patches":
                own = functools.partial(im2col.convolve, strides=strides, **fields)
            elif fits_winograd:
                fields["round_factors"] = precision is None and _is_fast_in_bfloat16(rhs)
                own = functools.partial(winograd.convolve, **fields)
            if own is not None:

                def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
                    return own(x.astype(wide), w).astype(dtype)

                # Sums of shifted images, and windows side by side, need no larger copies.
                copies = not is_depthwise and math.prod(rhs.shape[:2]) > math.prod(strides)
                rhs = rhs.astype(wide)  # the gradients are summed over the chunks in float32
                return in_chunks(convolve, lhs, rhs) if copies else convolve(lhs, rhs)
    y = native(lhs, rhs)
    if pool == 1:
        return y
    return max_pool(y, (2, 2), (2, 2), implementation="native" if _is_for_cpu() else implementation)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    implementation: str = "auto",
) -> jax.Array:
    """`nn.max_pool`, with a gradient that is cheap on a CPU or GPU where windows do not overlap.

    The arguments up to `padding` and the errors for wrong ones are those of `nn.max_pool`. Of equal
    elements the first in row-major order gets the gradient, as with `nn.max_pool`.

    Args:
      inputs: `float[B, H, W, C]`; native for another rank or a dtype not in `DTYPES`.
      window_shape: (height, width).
      strides: native unless equal to the window.
      padding: native unless "VALID".
      implementation: "native", or any other of `IMPLEMENTATIONS`, which all pool in the same way.
        "auto" is native on a TPU.

    Raises:
      ValueError: `implementation` is unknown.
    """
    # Flax accepts more paddings than its annotation states.
    arguments = window_shape, strides, cast(Any, padding)
    own = None if _resolve(implementation) == "native" else pooling.max_pool
    if implementation == "auto" and jax.default_backend() == "gpu" and not _natively.get():
        own = pooling.indexed_max_pool
    if own is not None:
        result = jax.eval_shape(lambda x: nn.max_pool(x, *arguments), inputs)
        is_valid = isinstance(padding, str) and padding.upper() == "VALID"
        non_overlapping = strides is not None and tuple(strides) == tuple(window_shape)
        use_own = inputs.ndim == 4 and len(window_shape) == 2 and inputs.dtype in DTYPES
        use_own &= is_valid and non_overlapping and 0 not in result.shape
        if use_own and not _are_explicitly_sharded(inputs):
            return own(inputs, (window_shape[0], window_shape[1]))
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
    """`jax.lax.dot_general`, with faster products of 16 bits and gradients of weights on a CPU.

    It can be passed as `nn.Dense(dot_general=...)`; arguments and errors are those of
    `lax.dot_general`. On a CPU a product of the last axis with a matrix is one of two matrices, and
    the gradient of a weight matrix is computed in the layout in which it is stored; the gradient
    that JAX derives is transposed. Products of bfloat16 and float16 have float32 sums there, which
    are rounded.
    """
    native = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    last = jnp.ndim(lhs) - 1
    if _is_for_cpu() and dimension_numbers == (((last,), (0,)), ((), ())) and out_sharding is None:
        result = jax.eval_shape(native, lhs, rhs)
        use_own = last >= 1 and jnp.ndim(rhs) == 2 and _have_one_dtype(lhs, rhs, result)
        # The rows of no elements could not be counted.
        use_own &= last == 1 or 0 not in jnp.shape(lhs)
        if use_own and not _are_explicitly_sharded(lhs, rhs):
            rows = lhs if last == 1 else lhs.reshape(-1, lhs.shape[last])
            product = _matmul(rows, rhs, precision)
            return product if last == 1 else product.reshape(result.shape)
    return native(lhs, rhs)


def _contract(x: jax.Array, w: jax.Array, axis: int, precision: Any) -> jax.Array:
    """The product over `axis` of x and the first axis of w, with sums of at least float32."""
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    if dtype != jnp.bfloat16 or not has_bfloat16_products():
        x, w = x.astype(wide), w.astype(wide)
    numbers = ((axis,), (0,)), ((), ())
    return lax.dot_general(x, w, numbers, precision, preferred_element_type=wide).astype(dtype)


def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[B, C]` times `[C, K]` -> `[B, K]`."""
    return _contract(x, w, 1, precision)


def _gradient_x(g: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    return _contract(g, w.T, 1, precision)


def _gradient_w(g: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    return _contract(x, g, 0, precision)


_matmul = bilinear(_product, _gradient_x, _gradient_w)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`float[..., C]` and `float[C]`, rounded to the dtype of x -> their sum, in the dtype of x.

    On a CPU the sum of bfloat16 and float16 is computed in float32, and so is the bias's gradient.
    """
    bias = widened(bias.astype(x.dtype)).reshape(*[1] * (x.ndim - 1), -1)
    return (widened(x) + bias).astype(x.dtype)


def flatten(images: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H * W * C]`.

    On a CPU small images are copied pixel by pixel: XLA would fuse a reshape with the operation
    before it, and slow that down.
    """
    batch, height, width, channels = images.shape
    is_small = 0 < height * width <= _FEW_PIXELS
    if not _is_for_cpu() or not is_small or _are_explicitly_sharded(images):
        return images.reshape(batch, height * width * channels)
    return _flatten_by_pixel(images)


@jax.custom_jvp
def _flatten_by_pixel(images: jax.Array) -> jax.Array:
    batch, height, width, channels = images.shape
    pixels = nhwc_to_hwnc(images).reshape(height * width, batch, channels)

    # In a loop: a concatenation would be a kernel to compile for each pixel.
    def copy(state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        i, flat = state
        pixel = lax.dynamic_index_in_dim(pixels, i, keepdims=False)
        return i + 1, lax.dynamic_update_slice_in_dim(flat, pixel, i * channels, 1)

    zeros = jnp.zeros_like(images, shape=(batch, height * width * channels))
    return lax.while_loop(lambda state: state[0] < height * width, copy, (0, zeros))[1]


@_flatten_by_pixel.defjvp
def _flatten_by_pixel_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (images,), (tangent,) = primals, tangents
    return _flatten_by_pixel(images), tangent.reshape(images.shape[0], -1)


def _resolve(implementation: str) -> str:
    """The implementation, where "auto" becomes "native" unless tracing for a CPU."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    return "native" if implementation == "auto" and not _is_for_cpu() else implementation


def _is_covered(lhs: jax.Array, rhs: jax.Array, result: Any, numbers: Any, pool: int) -> bool:
    """Whether `cnn.ops` can compute a convolution of these layouts, dtypes and sizes itself."""
    if lhs.ndim != 4 or not _have_one_dtype(lhs, rhs, result) or 0 in (*lhs.shape, *result.shape):
        return False
    layout, nhwc = (lax.conv_dimension_numbers(lhs.shape, rhs.shape, n) for n in (numbers, _LAYOUT))
    return layout == nhwc and min(result.shape[1:3]) >= pool


def _is_fast_in_bfloat16(kernel: jax.Array) -> bool:
    """Whether "winograd" is faster with factors that are rounded to bfloat16."""
    is_bfloat16 = kernel.dtype == jnp.bfloat16
    return is_bfloat16 and has_bfloat16_products() and math.prod(kernel.shape[2:]) >= _MANY_PAIRS


def _have_one_dtype(*arrays: Any) -> bool:
    return arrays[0].dtype in DTYPES and len({array.dtype for array in arrays}) == 1


def _are_explicitly_sharded(*arrays: Any) -> bool:
    """Whether an array is sharded over explicit mesh axes, which are part of its type."""
    specs = [jax.typeof(array).sharding.spec for array in arrays]
    return any(axes is not None for spec in specs for axes in spec)


def _pads(
    lhs: jax.Array, rhs: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    return tuple((low, high) for low, high in padding)
