"""The leaves of a train state: their names, their bytes on the host, and their way back.

A leaf is what JAX takes for one: an array, a typed random key, a NumPy or a Python number.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.errors import UserError


@dataclasses.dataclass(frozen=True)
class HostKey:
    """A typed random key on the host.

    Attributes:
      impl: name of the generator, as `jax.random.key_impl` gives it.
      data: as `jax.random.key_data` gives it.
    """

    impl: str
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.data.nbytes


HostLeaf = np.ndarray | HostKey


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `params/Conv_0/kernel`.

    A field of a named tuple, a key of a dictionary and an index read alike, so a tree of plain
    dictionaries and lists has the paths of the state it was made of.

    Raises:
      UserError: two leaves have one path, because keys of a dictionary read alike.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for escaped in (False, True):  # a slash within a key matters only if two paths then agree
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
            sha.update(
                f"{path} key<{leaf.impl}> {leaf.data.shape}\n".encode(errors="surrogatepass")
            )
            leaf = leaf.data
        else:
            sha.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode(errors="surrogatepass"))
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def to_host(path: str, leaf: Any, *, copy: bool = False) -> HostLeaf:
    """A leaf as NumPy has it, in the byte order of the machine.

    Args:
      path: for the message.
      leaf: from a tree.
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


def kind(leaf: Any) -> str:
    """Dtype and shape of a leaf, such as `float32[3, 3]`; "nothing" for None."""
    if leaf is None:
        return "nothing"
    if is_key(leaf):
        return f"key<{jax.random.key_impl(leaf)}>{list(leaf.shape)}"
    value = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{value.dtype.newbyteorder('=')}{list(value.shape)}"


def like(fresh: Any, value: Any) -> Any:
    """A value made such that a compiled function takes it as it took the fresh leaf.

    A compiled function looks at dtype, weak type, sharding, and whether the array is committed to
    its devices: where one of them differs it is compiled again.

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
