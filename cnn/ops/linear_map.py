"""Linear and bilinear functions whose gradients are computed by functions of our own.

XLA computes what it is given, in the order of axes in which it is given. JAX's own transpose of a
product yields the gradient of the right operand transposed, which is slow on a CPU
(benchmarks/NOTES.md). What is defined here has every derivative, of any order and in any mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Product = Callable[[jax.Array, jax.Array, Any], jax.Array]


def linear_map(
    forward: Callable[[jax.Array, jax.Array], jax.Array],
    transpose: Callable[[jax.Array, jax.Array], jax.Array],
    residual: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """`forward(residual, x)`, whose transpose is computed by `transpose`.

    `jax.custom_vjp` has no forward mode, and `jax.custom_derivatives.linear_call` no `vmap` and no
    derivative by its residual. `lax.custom_linear_solve` has all of it, so the function is put as
    the solution (a, b) = (x, forward(x)) of the system (a, b - forward(a)) = (x, 0). The transposed
    system (a - transpose(b), b) = (0, g) is solved by (transpose(g), g). What this adds to the
    program are zeros, which XLA removes.

    Args:
      forward: function of (residual, x), linear in x and differentiable.
      transpose: function of (residual, g), where g is shaped as the result of `forward`. Returns
        the cotangent of x.
      residual: array on which the linear function depends.
      x: array.
    """
    residual, x = _vary_alike(residual, x)

    def system(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        zero = _zero(residual)
        return a + zero * _zero(a), b + zero * _zero(b) - forward(residual, a)

    def solve(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a, b + forward(residual, a)

    def solve_transposed(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a + transpose(residual, b), b

    result = jax.eval_shape(forward, residual, x)
    right = x, jnp.broadcast_to(_zero(x), result.shape)
    a, b = lax.custom_linear_solve(system, right, solve, solve_transposed)
    return b + _zero(a)


def bilinear(product: Product, gradient_x: Product, gradient_w: Product) -> Product:
    """The product, with gradients of our own.

    Args:
      product: function of (x, w, precision), linear in x and in w.
      gradient_x: function of (g, w, precision), with g shaped as the product. Returns the gradient
        of x.
      gradient_w: function of (g, x, precision). Returns the gradient of w.

    Returns:
      Function of (x, w, precision).
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
    def multiply(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
        return product(x, w, precision)

    @functools.partial(multiply.defjvp, symbolic_zeros=True)
    def jvp(precision: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x, w), (dx, dw) = primals, tangents
        y = tangent = multiply(x, w, precision)
        terms = []
        if not isinstance(dx, SymbolicZero):
            terms.append(linear_map(
                lambda w, dx: product(dx, w, precision),
                lambda w, g: gradient_x(g, w, precision), w, dx,
            ))  # fmt: skip
        if not isinstance(dw, SymbolicZero):
            terms.append(linear_map(
                lambda x, dw: product(x, dw, precision),
                lambda x, g: gradient_w(g, x, precision), x, dw,
            ))  # fmt: skip
        tangent = functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)
        return y, tangent

    return multiply


def _zero(x: jax.Array) -> jax.Array:
    """A scalar zero that depends on x for JAX.

    JAX transposes a linear solve only if every part of its right side depends on what is
    differentiated.
    """
    return lax.slice_in_dim(x, 0, 0).sum()  # indexing would be constant for a symbolic batch size


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Within `jax.shard_map`, the arrays as varying over the axes over which any of them varies.

    The transpose of this sums the cotangent of one that did not vary over the devices.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset[Any]().union(*varying)
    return [
        lax.pcast(array, tuple(sorted(every - own)), to="varying")
        for array, own in zip(arrays, varying, strict=True)
    ]
