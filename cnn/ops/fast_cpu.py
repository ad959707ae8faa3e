"""Any function of arrays, with its convolutions and poolings computed well on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from cnn.ops import convolution, pooling

_Arrays = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class FastCpu:
    """A function whose convolutions, poolings and products are those of `cnn.ops.convolution`.

    It is traced, and each native operator that `cnn.ops.convolution` has in a form for a CPU is
    replaced before anything is differentiated: convolutions without dilation and without groups or
    with one for each channel, max and average pooling over windows that do not overlap, products
    with a matrix. What else the function does stays as it is, also within `jax.custom_jvp` and
    `jax.custom_vjp`, whose gradient is their author's. So the result is the same function up to
    rounding; what "winograd" does to digits, zeros and NaN is in `cnn.ops.convolution`. On other
    backends nothing is replaced.

    Equal functions make equal objects, so that `jit` compiles them once. Attributes of the function
    are reached through this object.

    Attributes:
      fn: a pure function of pytrees of arrays, which may hold other values too, such as flags.
    """

    fn: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        if name == "fn":  # of an object that is not made yet, as `copy` makes them
            raise AttributeError(name)
        return getattr(self.fn, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        if jax.default_backend() != "cpu":
            return self.fn(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

        def of_arrays(*arrays: Any) -> Any:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            args, kwargs = jax.tree.unflatten(structure, filled)
            return self.fn(*args, **kwargs)

        arrays = [leaves[place] for place in places]
        traced, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        results = _evaluate(traced, arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)


def fast_cpu(fn: Callable[..., Any]) -> FastCpu:
    """`fn`, computed well on a CPU too: for networks of plain layers.

    XLA's convolutions and the gradients of its poolings are slow on a CPU. Pass a model's `apply`,
    of Flax or any other library, and differentiate or `jit` the result; or the `apply_fn` of a
    state, whose steps then compute in that way.

    Args:
      fn: a pure function of pytrees of arrays; see `FastCpu`.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> layer, images = nn.Conv(8, (3, 3)), jnp.ones((2, 8, 8, 3))
    >>> variables = layer.init(jax.random.key(0), images)
    >>> fast = fast_cpu(layer.apply)
    >>> bool(jnp.allclose(fast(variables, images), layer.apply(variables, images), atol=1e-5))
    True
    >>> "conv_general_dilated" in str(jax.make_jaxpr(fast)(variables, images))
    False
    """
    return FastCpu(fn)


def _evaluate(program: Any, arrays: _Arrays) -> list[Any]:
    """The results of a program with its constants, with its operators replaced."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, arrays, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        one = _Equation(jaxpr, eqn)
        results = _REPLACEMENTS.get(eqn.primitive, _Equation.unchanged)(one, *map(read, eqn.invars))
        several = eqn.primitive.multiple_results
        values.update(zip(eqn.outvars, results if several else [results], strict=True))
    return list(map(read, jaxpr.outvars))


class _Equation(NamedTuple):
    """An operator, its parameters, inputs and outputs, of a program."""

    jaxpr: Any
    eqn: Any

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    def unchanged(self, *arrays: Any, **changes: Any) -> Any:
        """What the operator returns, perhaps with some of its parameters changed."""
        eqn = self.eqn.replace(params={**self.params, **changes})
        # Evaluated as a program of one operator: how operators are called differs between versions.
        given = {
            atom: array
            for atom, array in zip(eqn.invars, arrays, strict=True)
            if not isinstance(atom, core.Literal)
        }
        alone = self.jaxpr.replace(
            constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn]
        )
        results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
        return results if eqn.primitive.multiple_results else results[0]


def _inlined(one: _Equation, *arrays: Any) -> list[Any]:
    return _evaluate(one.params["jaxpr"], arrays)


def _rematerialized(one: _Equation, *arrays: Any) -> list[Any]:
    """`jax.checkpoint`, as `nn.remat` uses it."""
    program = core.ClosedJaxpr(one.params["jaxpr"], ())
    options = {name: one.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *arrays: _evaluate(program, arrays), **options)(*arrays)


def _with_programs(name: str) -> Callable[..., Any]:
    """Replaces in what an operator holds: the body of a loop, the ways of a branch."""

    def replace(one: _Equation, *arrays: Any) -> Any:
        held = one.params[name]
        changed = tuple(map(_replaced, held)) if isinstance(held, tuple) else _replaced(held)
        return one.unchanged(*arrays, **{name: changed})

    return replace


def _replaced(program: Any) -> Any:
    types = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in program.in_avals
    ]
    return jax.make_jaxpr(lambda *arrays: _evaluate(program, arrays))(*types)


def _convolution(one: _Equation, images: Any, kernel: Any) -> jax.Array:
    return convolution.conv_general_dilated(images, kernel, **one.params)


def _product(one: _Equation, left: Any, right: Any) -> jax.Array:
    return convolution.dot_general(left, right, **one.params)


def _pooling_window(one: _Equation, images: Any) -> tuple[int, int] | None:
    """(height, width) if windows lie side by side over the pixels of `[B, H, W, C]`; else None."""
    params = one.params
    window = params["window_dimensions"]
    plain = all(set(params[name]) == {1} for name in ("base_dilation", "window_dilation"))
    plain &= not np.any(params["padding"]) and params["window_strides"] == window
    if not plain or len(window) != 4 or (window[0], window[3]) != (1, 1) or 0 in images.shape:
        return None
    fits = images.shape[1] >= window[1] and images.shape[2] >= window[2]
    return window[1:3] if fits else None


def _max_pooling(one: _Equation, images: Any) -> jax.Array:
    window = _pooling_window(one, images)
    return one.unchanged(images) if window is None else convolution.max_pool(images, window, window)


def _sum_pooling(one: _Equation, images: Any) -> jax.Array:
    window = _pooling_window(one, images)
    if window is None:
        return one.unchanged(images)
    return pooling.windows_apart(images, window).sum((2, 4))


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    primitives.conv_general_dilated_p: _convolution,
    primitives.dot_general_p: _product,
    primitives.reduce_window_max_p: _max_pooling,
    primitives.reduce_window_sum_p: _sum_pooling,
    primitives.jit_p: _inlined,
    primitives.remat_p: _rematerialized,
    primitives.scan_p: _with_programs("jaxpr"),
    primitives.while_p: _with_programs("body_jaxpr"),
    primitives.cond_p: _with_programs("branches"),
}
