"""Convolution and max-pooling, lowered well on every backend.

GPU and TPU have fast native convolutions. XLA's on a CPU is slow, its gradients and those of
max-pooling most of all, so there the same sums are written as matrix products:

- "patches": the kh * kw shifted views of the image side by side, times the kernel as a matrix
  (im2col; Chellapilla et al. 2006, "High performance convolutional neural networks for document
  processing").
- "winograd": 3x3 kernels by the minimal filtering F(2x2, 3x3) of Lavin and Gray 2016, "Fast
  algorithms for convolutional neural networks", section 4.1: 16 products make four outputs, in
  place of 36.
- "blocks": with a 2x2 max-pooling behind it, one patch for each pooling window; the kernel
  matrix holds the four placements of the kernel. More products, but far fewer and longer copies:
  for images of few channels.

All are the same function of the same parameters, to rounding. Only "native" has forward-mode
derivatives. Choose with `lowering=`; "auto" decides by backend and shape, in `_choose`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LOWERINGS = ("auto", "native", "patches", "blocks", "winograd")
Padding = str | Sequence[tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many input channels "blocks" beats "winograd" (benchmarks/NOTES.md).
_FEW_CHANNELS = 8
# F(2x2, 3x3): inputs d -> B^T d B, kernels g -> G g G^T, products m -> A^T m A.
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)  # A^T
# Both dimensions at once: four outputs (row, column) from 16 products (column, row).
_OUTPUT_2D = np.einsum("rh,cw->rcwh", _OUTPUT, _OUTPUT).reshape(4, 16)


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
    plain = _is_plain(
        lhs, rhs, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count,
    )  # fmt: skip
    lowering = _choose(lowering, lhs, rhs, window_strides, plain, pooled=False)
    if lowering == "native":
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count, precision,
        )  # fmt: skip
    x = _pad(lhs, rhs, window_strides, padding)
    if lowering == "winograd":
        return _winograd(x, rhs, precision)
    return _patches(x, rhs, window_strides, precision)


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
    with `nn.max_pool`; but as that happens before the relu, a window without a positive element
    passes none back at all.

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
    plain = _is_plain(
        lhs, rhs, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count,
    )  # fmt: skip
    lowering = _choose(lowering, lhs, rhs, window_strides, plain, pooled=True)
    if lowering == "native":
        y = lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count, precision,
        )  # fmt: skip
        return nn.max_pool(y, (2, 2), (2, 2))
    x = _pad(lhs, rhs, window_strides, padding)
    if lowering == "winograd":
        return _winograd_pooled(x, rhs, precision)
    if lowering == "blocks":
        return _blocks_pooled(x, rhs, precision)
    return _pool(_patches(x, rhs, window_strides, precision, even=True), (2, 2))


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
    own = lowering != "native" and (lowering != "auto" or jax.default_backend() == "cpu")
    if own and apart and padding == "VALID" and inputs.ndim == 4 and len(window_shape) == 2:
        return _pool(inputs, (window_shape[0], window_shape[1]))
    # Flax's annotation of the padding is narrower than what it takes.
    return nn.max_pool(inputs, tuple(window_shape), strides, cast(Any, padding))


def _choose(
    lowering: str,
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    plain: bool,
    pooled: bool,
) -> str:
    """The one place where backend and shape decide."""
    if lowering not in LOWERINGS:
        raise ValueError(f"unknown lowering {lowering!r}; known: {', '.join(LOWERINGS)}")
    if not plain or (lowering == "auto" and jax.default_backend() != "cpu"):
        return "native"
    steps_by_one = tuple(strides) == (1, 1)
    # The sums and differences of Winograd's transforms need the digits of float32.
    winograd = steps_by_one and rhs.shape[:2] == (3, 3) and lhs.dtype == jnp.float32
    blocks = pooled and steps_by_one
    if lowering == "auto":
        if blocks and lhs.shape[-1] <= _FEW_CHANNELS:
            return "blocks"
        return "winograd" if winograd and lhs.shape[-1] > _FEW_CHANNELS else "patches"
    if lowering == "winograd" and not winograd:
        return "native"
    if lowering == "blocks" and not blocks:
        return "native"
    return lowering


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


def _pad(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding) -> jax.Array:
    """The image with which a "VALID" convolution gives what was asked for."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], tuple(strides), padding)
    return _fit(x, *((low, size + low + high) for (low, high), size in zip(
        padding, x.shape[1:3], strict=True)))  # fmt: skip


def _fit(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Zeros before, and zeros or a cut behind: each of (zeros before, size in the end)."""
    pads = [(0, 0, 0)]
    for (before, size), now in zip((rows, columns), x.shape[1:3], strict=True):
        pads.append((before, size - before - now, 0))
    pads.append((0, 0, 0))
    return x if not any(map(any, pads)) else lax.pad(x, jnp.zeros((), x.dtype), pads)


def _patches(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], precision: Any, even: bool = False
) -> jax.Array:
    """A "VALID" convolution; with `even`, without an odd last row and column."""
    kh, kw, channels, features = kernel.shape
    (sh, sw), batch = strides, x.shape[0]
    height, width = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    if even:
        height, width = height // 2 * 2, width // 2 * 2
    views = [
        x[:, i : i + sh * (height - 1) + 1 : sh, j : j + sw * (width - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    patches = jnp.concatenate(views, axis=-1).reshape(-1, kh * kw * channels)
    y = jnp.matmul(patches, kernel.reshape(-1, features), precision=precision)
    return y.reshape(batch, height, width, features)


def _blocks_pooled(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """One product gives the four convolution outputs of a pooling window, side by side."""
    batch, channels, features = x.shape[0], x.shape[3], kernel.shape[-1]
    height, width = ((x.shape[d] - kernel.shape[d - 1] + 1) // 2 for d in (1, 2))
    # The window of a 2x2 block of outputs is one larger than the kernel, and cut into 2x2 pixels.
    kernel = jnp.pad(kernel, [(0, int(size % 2 == 0)) for size in kernel.shape[:2]] + [(0, 0)] * 2)
    rows, columns = (size // 2 + 1 for size in kernel.shape[:2])
    x = _fit(x, (0, 2 * (height + rows - 1)), (0, 2 * (width + columns - 1)))
    x = x.reshape(batch, height + rows - 1, 2, width + columns - 1, 2, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], 4 * channels)
    patches = jnp.concatenate(
        [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)], axis=-1
    )
    placed = jnp.stack(
        [
            jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)))
            for i in range(2)
            for j in range(2)
        ],
        axis=3,
    )
    placed = placed.reshape(rows, 2, columns, 2, channels, 4 * features).transpose(0, 2, 1, 3, 4, 5)
    depth = 4 * rows * columns * channels
    y: Any = _product(patches.reshape(1, -1, depth), placed.reshape(1, depth, -1), precision)
    y = _max_of_groups(y.reshape(-1, 4 * features), 4)
    return y.reshape(batch, height, width, features)


def _pool(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Max-pooling with windows side by side; what does not fill one is dropped."""
    (kh, kw), (batch, _, _, channels) = window, x.shape
    height, width = x.shape[1] // kh, x.shape[2] // kw
    x = x[:, : height * kh, : width * kw].reshape(-1, kw * channels)
    # Columns before rows: so the first of equals in row-major order wins.
    y: Any = _max_of_groups(x, kw)
    y = _max_of_groups(y.reshape(batch * height, -1), kh)
    return y.reshape(batch, height, width, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_groups(x: jax.Array, groups: int) -> jax.Array:
    """`[N, groups * C]` -> `[N, C]`."""
    return x.reshape(x.shape[0], groups, -1).max(1)


def _max_of_groups_fwd(x: jax.Array, groups: int) -> tuple[jax.Array, tuple[Any, ...]]:
    return _max_of_groups(x, groups), _winners(jnp.split(x, groups, axis=-1))[1]


def _max_of_groups_bwd(groups: int, winners: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array]:
    return (jnp.concatenate(_to_winner(winners, g), axis=-1),)


_max_of_groups.defvjp(_max_of_groups_fwd, _max_of_groups_bwd)


def _winners(parts: Sequence[jax.Array]) -> tuple[jax.Array, tuple[Any, ...]]:
    """The largest of the parts, and who won: a tree of (left wins, left tree, right tree).

    Booleans of a knock-out tournament are cheaper on a CPU than an index; equals go left.
    """
    if len(parts) == 1:
        return parts[0], ()
    half = len(parts) // 2
    (left, left_tree), (right, right_tree) = _winners(parts[:half]), _winners(parts[half:])
    return jnp.maximum(left, right), (left >= right, left_tree, right_tree)


def _to_winner(tree: tuple[Any, ...], g: jax.Array) -> list[jax.Array]:
    """The gradient for each part: g for the winner, zero for the others."""
    if not tree:
        return [g]
    left_wins, left, right = tree
    zero = jnp.zeros((), g.dtype)
    return [
        *_to_winner(left, jnp.where(left_wins, g, zero)),
        *_to_winner(right, jnp.where(left_wins, zero, g)),
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """`[N, M, K]` times `[N, K, O]`, N times.

    Autodiff asks for the weight gradient transposed, `[N, O, K]`, which XLA's CPU products give
    at two thirds of the speed.
    """
    return jnp.einsum("nmk,nko->nmo", x, w, precision=precision)


def _product_fwd(x: jax.Array, w: jax.Array, precision: Any) -> tuple[jax.Array, Any]:
    return _product(x, w, precision), (x, w)


def _product_bwd(precision: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    # Transposed in memory, or the product would go to a slower library (benchmarks/NOTES.md).
    transposed = lax.optimization_barrier(x.swapaxes(1, 2))
    return (
        jnp.einsum("nmo,nko->nmk", g, w, precision=precision),
        jnp.einsum("nkm,nmo->nko", transposed, g, precision=precision),
    )


_product.defvjp(_product_fwd, _product_bwd)


def _winograd(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """A "VALID" 3x3 convolution."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    tiles = _winograd_products(x, kernel, precision, ((height + 1) // 2, (width + 1) // 2))
    shape = tiles.shape[2:]
    y = (jnp.asarray(_OUTPUT_2D) @ tiles.reshape(16, -1)).reshape(2, 2, *shape)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(shape[0], 2 * shape[1], 2 * shape[2], shape[3])
    return y[:, :height, :width]


def _winograd_pooled(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """The same, and the four outputs of a tile are a pooling window."""
    size = (x.shape[1] - 2) // 2, (x.shape[2] - 2) // 2
    return _max_of_tiles(_winograd_products(x, kernel, precision, size))


def _winograd_products(
    x: jax.Array, kernel: jax.Array, precision: Any, size: tuple[int, int]
) -> jax.Array:
    """The 16 products of each tile, `[4 (column), 4 (row), B, *size, O]`."""
    (height, width), (batch, channels) = size, (x.shape[0], x.shape[3])
    x = _fit(x, (0, 2 * height + 2), (0, 2 * width + 2))
    # Rows first, then columns; each in pairs, so that no slice has a stride.
    x = x.reshape(batch, height + 1, 2, 2 * width + 2, channels)
    x = _input_transform(x[:, :, 0], x[:, :, 1], axis=1)
    x = x.reshape(4, batch, height, width + 1, 2, channels)
    x = _input_transform(x[:, :, :, :, 0], x[:, :, :, :, 1], axis=3)
    kernel = _kernel_transform(*_kernel_transform(*kernel).swapaxes(0, 1))
    products: Any = _product(
        x.reshape(16, -1, channels), kernel.reshape(16, channels, -1), precision
    )
    return products.reshape(4, 4, batch, height, width, -1)


def _input_transform(even: jax.Array, odd: jax.Array, axis: int) -> jax.Array:
    """B^T d, stacked in front: windows of four, two apart, of interleaved even and odd lines."""
    last = even.shape[axis] - 1
    d0, d2 = (lax.slice_in_dim(even, i, last + i, axis=axis) for i in (0, 1))
    d1, d3 = (lax.slice_in_dim(odd, i, last + i, axis=axis) for i in (0, 1))
    return jnp.stack((d0 - d2, d1 + d2, d2 - d1, d1 - d3))


def _kernel_transform(g0: jax.Array, g1: jax.Array, g2: jax.Array) -> jax.Array:
    """G g, stacked in front."""
    ends, middle = 0.5 * (g0 + g2), 0.5 * g1
    return jnp.stack((g0, ends + middle, ends - middle, g2))


@jax.custom_vjp
def _max_of_tiles(products: jax.Array) -> jax.Array:
    """`[4, 4, B, H, W, O]` -> `[B, H, W, O]`: the largest of the four outputs of each tile."""
    return _max_of_tiles_fwd(products)[0]


def _max_of_tiles_fwd(products: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    outputs = jnp.asarray(_OUTPUT_2D) @ products.reshape(16, -1)
    return _winners(list(outputs.reshape(4, *products.shape[2:])))


def _max_of_tiles_bwd(winners: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array]:
    a, b, c, d = _to_winner(winners, g)
    columns = zip(_spread(a, b), _spread(c, d), strict=True)
    return (jnp.stack([jnp.stack(_spread(top, bottom)) for top, bottom in columns]),)


def _spread(first: jax.Array, second: jax.Array) -> tuple[jax.Array, ...]:
    """A g: the gradients of four products from those of two outputs."""
    return first, first + second, first - second, -second


_max_of_tiles.defvjp(_max_of_tiles_fwd, _max_of_tiles_bwd)
