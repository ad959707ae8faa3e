"""Functions of arrays that lie on a mesh with explicit axes, JAX's default.

On such a mesh the sharding of every intermediate array is part of its type. What a step computes
within has no user to state them, so these axes are automatic while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def with_automatic_axes(
    fn: Callable[..., Any], shardings: Callable[[AbstractMesh], Any], *args: Any
) -> Any:
    """`fn(*args)`, with the explicit axes of the arguments' mesh made automatic within.

    Args:
      fn: of arrays.
      shardings: from that mesh to the shardings of the results, a pytree prefix of them.
      *args: pytrees of arrays.
    """
    mesh = next(filter(_has_explicit_axes, map(_mesh, jax.tree.leaves(args))), None)
    if mesh is None:
        return fn(*args)
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    automatic = jax.sharding.auto_axes(fn, axes=axes, out_sharding=shardings(mesh))
    return automatic(*jax.tree.map(_as_array, args))


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
