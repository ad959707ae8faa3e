"""The leaves of a train state: their paths, their bytes on the host, and their way back.

A leaf is what JAX regards as one: an array, a typed random key, a NumPy or a Python number.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.errors import UserError, array_type


@dataclasses.dataclass(frozen=True)
class HostKey:
    """A typed random key on the host.

    Attributes:
      impl: the name of the generator, from `jax.random.key_impl`.
      data: the words of the key, from `jax.random.key_data`.
    """

    impl: str
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """The size of the data in bytes."""
        return self.data.nbytes


HostLeaf = np.ndarray | HostKey


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `params/Conv_0/kernel`.

    Fields of a named tuple, keys of a dictionary and indices look alike, so a tree of plain
    dictionaries and lists has the paths of the state it was made of.

    Raises:
      UserError: two leaves have the same path, because keys of a dictionary look alike.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for escaped in (False, True):  # a slash within a key is escaped only if two paths then agree
        named = {"/".join(_names(path, escaped)): leaf for path, leaf in leaves}
        if len(named) == len(leaves):
            return named
    raise UserError("two leaves of the state have the same path: rename one of them")


def _names(path: tuple[Any, ...], escaped: bool) -> list[str]:
    names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    return [n.replace("%", "%25").replace("/", "%2F") for n in names] if escaped else names


def digest(tree: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf: 64 hexadecimal digits.

    Raises:
      UserError: a leaf is neither an array, nor a key, nor a number.
    """
    sha = hashlib.sha256()
    for path, leaf in sorted(by_path(jax.device_get(tree)).items()):
        leaf = to_host(path, leaf)
        if isinstance(leaf, HostKey):
            dtype, data = f"key<{leaf.impl}>", leaf.data
        else:
            dtype, data = leaf.dtype, leaf
        sha.update(f"{path} {dtype} {data.shape}\n".encode(errors="surrogatepass"))
        sha.update(np.ascontiguousarray(data).tobytes())
    return sha.hexdigest()


def to_host(path: str, leaf: Any, *, copy: bool = False) -> HostLeaf:
    """Converts a leaf to NumPy, in the byte order of the machine.

    Args:
      path: names the leaf in the message.
      leaf: an array, a typed random key or a number.
      copy: whether the result must own its memory.

    Raises:
      UserError: the leaf is neither an array, nor a key, nor a number.
    """
    if isinstance(leaf, HostKey):
        return leaf
    if is_key(leaf):
        return HostKey(str(jax.random.key_impl(leaf)), np.array(jax.random.key_data(leaf)))
    value = np.array(leaf, order="C") if copy else np.asarray(leaf)
    if not (jnp.issubdtype(value.dtype, np.number) or value.dtype == np.bool_):
        raise UserError(
            f"{path} of the state is {type(leaf).__name__} ({value.dtype}): only arrays, random "
            f"keys and numbers can be saved; keep it outside the state"
        )
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaf_type(leaf: Any) -> str:
    """Dtype and shape of a leaf, such as `float32[3, 3]`; "nothing" for None."""
    if leaf is None:
        return "nothing"
    return array_type(leaf if hasattr(leaf, "dtype") else np.asarray(leaf))


def differences(theirs: Any, mine: Any) -> dict[str, str]:
    """The leaves of two trees that differ in dtype or shape, or that only one of them has.

    Returns:
      By path a line, "path: type in theirs -> type in mine", parameters first.
    """
    old, new = by_path(theirs), by_path(mine)
    return {
        path: f"{path}: {old_type} -> {new_type}"
        for path in sorted({*old, *new}, key=lambda path: (path[:6] != "params", path))
        if (old_type := leaf_type(old.get(path))) != (new_type := leaf_type(new.get(path)))
    }


def first_of(lines: Iterable[str]) -> str:
    """At most four lines in one, for a message.

    >>> first_of(list("abcdef"))
    'a; b; c; d and 2 more'
    """
    lines = list(lines)
    more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{'; '.join(lines[:4])}{more}"


def like(fresh: Any, value: Any) -> Any:
    """Makes a value that a compiled function accepts in place of the fresh leaf.

    A function is compiled again where dtype, weak type or sharding differ, or whether the array is
    committed to its devices.

    Args:
      fresh: a leaf of a state.
      value: an array of the same dtype and shape, or a typed key.
    """
    if not isinstance(fresh, jax.Array):
        scalar = isinstance(fresh, (np.generic, bool, int, float, complex))
        if not scalar:
            return np.array(value, fresh.dtype if isinstance(fresh, np.ndarray) else None)
        return np.asarray(value)[()] if isinstance(fresh, np.generic) else value.item()
    if not is_key(fresh) and fresh.weak_type:
        value = fresh.at[...].set(value)  # the one operation that keeps the bits and the weak type
    if fresh.committed:
        return jax.device_put(value, fresh.sharding)
    with jax.default_device(next(iter(fresh.devices()))):
        return jax.device_put(value)
