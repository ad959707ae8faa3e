"""Functions of arrays that lie on a mesh with explicit axes, JAX's default.

On such a mesh the sharding of every intermediate array is part of its type. Within a step there is
nobody to state these shardings, so the axes are automatic while it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def automatic_axes(shardings: Callable[..., Any]) -> Callable[[_Fn], _Fn]:
    """Decorates a function: the explicit axes of its arguments' mesh are automatic within it.

    Args:
      shardings: from that mesh and the arguments to the shardings of the results, a pytree prefix
        of them.
    """

    def decorate(fn: _Fn) -> _Fn:
        @functools.wraps(fn)
        def wrapped(*args: Any) -> Any:
            mesh = next(filter(_has_explicit_axes, map(_mesh, jax.tree.leaves(args))), None)
            if mesh is None:
                return fn(*args)
            axes = tuple(
                name
                for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if kind == AxisType.Explicit
            )
            out = shardings(mesh, *args)
            automatic = jax.sharding.auto_axes(fn, axes=axes, out_sharding=out)
            plain = [dict(arg) if isinstance(arg, Mapping) else arg for arg in args]
            return automatic(*jax.tree.map(_as_array, plain))

        return cast(_Fn, wrapped)

    return decorate


def _as_array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf)


def _mesh(leaf: Any) -> AbstractMesh | None:
    """The mesh of an array or tracer; None for a number or a NumPy array."""
    return jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None


def _has_explicit_axes(mesh: AbstractMesh | None) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def like(tree: Any, mesh: AbstractMesh) -> Any:
    """The shardings of arrays on a mesh; those that lie elsewhere are replicated over it."""

    def sharding(leaf: Any) -> NamedSharding:
        on_mesh = _has_explicit_axes(_mesh(leaf))
        return NamedSharding(mesh, jax.typeof(leaf).sharding.spec if on_mesh else PartitionSpec())

    return jax.tree.map(sharding, tree)


def replicated_over(mesh: AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_like(array: Any, mesh: AbstractMesh, axes: int = 1) -> NamedSharding:
    """The leading axes sharded as those of another array, all further ones not at all."""
    spec = jax.typeof(array).sharding.spec if _has_explicit_axes(_mesh(array)) else ()
    return NamedSharding(mesh, PartitionSpec(*spec[:axes]))
