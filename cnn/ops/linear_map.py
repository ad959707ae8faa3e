"""Linear and bilinear functions with custom transposes, differentiable to any order in any mode.

XLA keeps the order of axes in which a program states a product. JAX's own transpose of a product
states the gradient of the right operand transposed, which is slow on a CPU (benchmarks/NOTES.md).
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
    """`forward(residual, x)`, with `transpose` as its transpose.

    `jax.custom_vjp` has no forward mode; `jax.custom_derivatives.linear_call` has no `vmap` and no
    derivative with respect to its residual. `lax.custom_linear_solve` has all three, so the
    function is stated as the solution (a, b) = (x, forward(x)) of the system
    (a, b - forward(a)) = (x, 0). The transposed system (a - transpose(b), b) = (0, g) has the
    solution (transpose(g), g). This adds only zeros to the program, and XLA removes them.

    Args:
      forward: function of (residual, x), linear in x and differentiable.
      transpose: function of (residual, g) that returns the cotangent of x; g has the shape of the
        result of `forward`.
      residual: array on which the linear function depends.
      x: argument of the linear function.
    """
    residual, x = _vary_alike(residual, x)

    def system(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        zero = _zero(residual)
        zero_a, zero_b = (zero.astype(each.dtype) * _zero(each) for each in pair)
        return a + zero_a, b + zero_b - forward(residual, a)

    def solve(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a, b + forward(residual, a)

    def solve_transposed(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b = pair
        return a + transpose(residual, b), b

    result = jax.eval_shape(forward, residual, x)
    right = x, jnp.broadcast_to(_zero(x).astype(result.dtype), result.shape)
    a, b = lax.custom_linear_solve(system, right, solve, solve_transposed)
    return b + _zero(a).astype(b.dtype)


def bilinear(product: Product, gradient_x: Product, gradient_w: Product) -> Product:
    """`product`, with custom gradients.

    Args:
      product: function of (x, w, precision), linear in x and in w.
      gradient_x: function of (g, w, precision) that returns the gradient of x; g has the shape of
        the product.
      gradient_w: function of (g, x, precision) that returns the gradient of w.

    Returns:
      A function of (x, w, precision).
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
    """A scalar zero that JAX takes to depend on x.

    JAX transposes a linear solve only if every part of its right side depends on the variable of
    differentiation.
    """
    # Indexing would give a constant where the batch size is symbolic.
    return lax.slice_in_dim(x, 0, 0).sum()


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Within `jax.shard_map`, marks every array as varying over the axes of any of them.

    The transpose sums the cotangent of an array that did not vary over the devices.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[Any]().union(*varying)
    return [
        lax.pcast(array, tuple(sorted(union - axes)), to="varying")
        for array, axes in zip(arrays, varying, strict=True)
    ]
