"""Convolution and max-pooling, lowered well on every backend.

GPU and TPU have fast native convolutions. XLA's on a CPU is slow, its gradients and those of
max-pooling most of all, so there the same sums are written as matrix products:

- "patches": the shifted views of the image that a kernel meets side by side, times the kernel as a
  matrix (im2col; Chellapilla et al. 2006, "High performance convolutional neural networks for
  document processing"). See `cnn.patches`.
- "winograd": 3x3 kernels by minimal filtering, with a quarter of the multiplications. See
  `cnn.winograd`.

All are the same function of the same parameters, to rounding. Only "native" has forward-mode
derivatives. Choose with `lowering=`; "auto" decides by backend and shape, in `_choose`.
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

from cnn import patches, pooling, winograd
from cnn.rows import lines

LOWERINGS = ("auto", "native", "patches", "winograd")
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
    made while tracing, before the platform is known. A lowering that is named keeps its meaning.

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
    *,
    lowering: str = "auto",
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=...)` to call.

    Args:
      lhs: images, `float[B, H, W, C]` where a lowering is to apply.
      rhs: kernel, `float[kh, kw, C, O]`.
      window_strides: as those that follow, of `lax.conv_general_dilated`.
      padding: "SAME", "VALID", or (low, high) for each spatial dimension.
      lhs_dilation: other than 1 is native, as are groups and other layouts.
      rhs_dilation: likewise.
      dimension_numbers: likewise; `nn.Conv` gives those of NHWC and HWIO.
      feature_group_count: likewise.
      batch_group_count: likewise.
      precision: of the products.
      lowering: one of `LOWERINGS`. Where it does not apply the convolution is native.

    Returns:
      `float[B, H', W', O]`.
    """
    options = (
        lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
    )  # fmt: skip
    return _convolve(lhs, rhs, window_strides, padding, options, precision, lowering, pool=1)


def conv_max_pool(
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
    *,
    lowering: str = "auto",
) -> jax.Array:
    """`conv_general_dilated`, then 2x2 max-pooling with stride 2 and no padding, as one.

    A bias and a relu may follow instead of coming in between: pool(relu(x + b)) equals
    relu(pool(x) + b), and costs four times as much. Outputs that the pooling would drop are not
    computed. Of equal elements in a window the first, in row-major order, gets the gradient, as
    with `nn.max_pool`. But as that happens before the relu, a window without a positive element
    passes none back at all; and "winograd" may round apart what would be equal, though not on a
    flat part of an image.

    Args:
      lhs: as those that follow, of `conv_general_dilated`.
      rhs: likewise.
      window_strides: likewise.
      padding: likewise.
      lhs_dilation: likewise.
      rhs_dilation: likewise.
      dimension_numbers: likewise; the last dimension but one and the one before are pooled.
      feature_group_count: likewise.
      batch_group_count: likewise.
      precision: likewise.
      lowering: likewise.

    Returns:
      `float[B, H' // 2, W' // 2, O]`.
    """
    options = (
        lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
    )  # fmt: skip
    return _convolve(lhs, rhs, window_strides, padding, options, precision, lowering, pool=2)


def _convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    options: tuple[Any, Any, Any, int, int],
    precision: Any,
    lowering: str,
    pool: int,
) -> jax.Array:
    """The convolution, and with `pool=2` the pooling; options: dilations, layout, groups."""
    lowering = _choose(lowering, lhs, rhs, strides, _is_plain(lhs, rhs, *options))
    y = _as_products(lhs, rhs, strides, padding, precision, lowering, pool)
    if y is not None:
        return y
    y = lax.conv_general_dilated(lhs, rhs, strides, padding, *options, precision)
    return y if pool == 1 else nn.max_pool(y, (2, 2), (2, 2))


def _as_products(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    precision: Any,
    lowering: str,
    pool: int,
) -> jax.Array | None:
    """The convolution as matrix products, and with `pool=2` the pooling; None if it is native."""
    if lowering == "native":
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], tuple(strides), padding)
    pads = tuple((low, high) for low, high in padding)
    sizes = [lhs.shape[d] + sum(pads[d - 1]) - rhs.shape[d - 1] for d in (1, 2)]
    if not lhs.size or any(n // s + 1 < pool for n, s in zip(sizes, strides, strict=True)):
        return None  # nothing to compute
    if lowering == "patches":
        return patches.convolve(lhs, rhs, (strides[0], strides[1]), pads, precision, pool)
    return winograd.convolve(lhs, rhs, pads, precision, pool)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    lowering: str = "auto",
) -> jax.Array:
    """`nn.max_pool`, with a cheap gradient on a CPU where windows do not overlap.

    Of equal elements the first in row-major order gets the gradient, as with `nn.max_pool`.

    Args:
      inputs: `float[B, H, W, C]`.
      window_shape: height and width.
      strides: equal to the window, with "VALID" padding, or the pooling is native.
      padding: "VALID", "SAME", or (low, high) for each spatial dimension.
      lowering: "native", or any other of `LOWERINGS`, which all pool in the same way.
    """
    apart = strides is not None and tuple(strides) == tuple(window_shape)
    own = lowering != "native" and (lowering != "auto" or _is_for_cpu())
    if own and apart and padding == "VALID" and inputs.ndim == 4 and len(window_shape) == 2:
        return pooling.max_pool(inputs, (window_shape[0], window_shape[1]))
    # Flax's annotation of the padding is narrower than what it takes.
    return nn.max_pool(inputs, tuple(window_shape), strides, cast(Any, padding))


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general`, for `nn.Dense(dot_general=...)` to call.

    The gradient of the weights comes as it is stored, which XLA's on a CPU does not.

    Args:
      lhs: as those that follow, of `lax.dot_general`.
      rhs: likewise.
      dimension_numbers: likewise.
      precision: likewise.
      preferred_element_type: likewise.
    """
    matrices = lhs.ndim == rhs.ndim == 2 and dimension_numbers == (((1,), (0,)), ((), ()))
    if matrices and preferred_element_type is None and _is_for_cpu():
        return _matmul(lhs, rhs, precision)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[B, K]` times `[K, O]`."""
    return jnp.matmul(x, w, precision=precision)


def _matmul_fwd(x: jax.Array, w: jax.Array, precision: Any) -> tuple[jax.Array, Any]:
    return _matmul(x, w, precision), (x, w)


def _matmul_bwd(precision: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dw = lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision)  # autodiff gives [O, K]
    return jnp.matmul(g, w.T, precision=precision), dw


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def flatten(images: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H * W * C]`.

    On a CPU pixel by pixel: fused with a reshape, what comes before would be slow there.
    """
    if not _is_for_cpu() or images.shape[1] * images.shape[2] > _FEW_PIXELS:
        return images.reshape(images.shape[0], -1)
    pixels = [pixel for row in lines(images, 1) for pixel in lines(row, 1)]
    return jnp.concatenate(pixels, axis=-1)


def _choose(
    lowering: str, lhs: jax.Array, rhs: jax.Array, strides: Sequence[int], plain: bool
) -> str:
    """The one place where backend and shape decide."""
    if lowering not in LOWERINGS:
        raise ValueError(f"unknown lowering {lowering!r}; known: {', '.join(LOWERINGS)}")
    if not plain or (lowering == "auto" and not _is_for_cpu()):
        return "native"
    # The sums and differences of Winograd's transforms need the digits of float32.
    able = tuple(strides) == (1, 1) and rhs.shape[:2] == (3, 3) and lhs.dtype == jnp.float32
    if lowering == "auto":
        return "winograd" if able and lhs.shape[-1] > _FEW_CHANNELS else "patches"
    return "native" if lowering == "winograd" and not able else lowering


def _is_plain(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
) -> bool:
    """Whether it is a two-dimensional NHWC convolution without dilation and groups."""
    if lhs.ndim != 4 or feature_group_count != 1 or batch_group_count != 1:
        return False
    if any(set(dilation or (1,)) != {1} for dilation in (lhs_dilation, rhs_dilation)):
        return False
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
