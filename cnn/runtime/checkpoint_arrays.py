"""A tree of arrays as a folder of files, written and read by Orbax.

Orbax, and TensorStore below it, have limits that a state or a path may exceed: they cannot hold
arrays of size zero and some dtypes, confuse a key "a.b" with a key "b" below "a", and lose what is
saved below a path with brackets or backslashes. So arrays are brought into a form that they hold,
what is needed to undo this is written to `arrays.json`, and unusual paths are reached by a link.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn.errors import UserError
from cnn.runtime.checksums import read_bytes
from cnn.runtime.disk import system_error
from cnn.runtime.leaves import HostKey, HostLeaf, to_host

_FORMAT = 2  # 1 had no arrays.json, names as they are, and no arrays of size zero
_ARRAYS, _FORMS = "state", "arrays.json"
_PLAIN_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
}
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")


def host_tree(tree: Any) -> Any:
    """A copy of a tree on the host, in nested dictionaries and lists.

    Named tuples and dataclasses become dictionaries, tuples become lists, and what has no leaves,
    such as None or an empty state of an optimizer, becomes None.

    Returns:
      A tree of `HostLeaf`; the caller may donate the buffers of the given one.

    Raises:
      UserError: a leaf is neither an array, nor a key, nor a number.
    """
    return _plain(jax.device_get(tree), ())


def _plain(node: Any, path: tuple[str, ...]) -> Any:
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if children and not children[0][0]:
        return to_host("/".join(path), node, copy=True)
    entries = [(entry, child) for (entry,), child in children]
    names = [jax.tree_util.keystr((entry,), simple=True) for entry, _ in entries]
    values = [_plain(child, (*path, n)) for n, (_, child) in zip(names, entries, strict=True)]
    if entries and isinstance(entries[0][0], jax.tree_util.SequenceKey):
        return values
    if entries or isinstance(node, dict):
        return dict(zip(names, values, strict=True))
    return None


def write_arrays(folder: Path, tree: Any) -> None:
    """Writes a tree to a folder that exists.

    Args:
      folder: where `state` and `arrays.json` are made.
      tree: from `host_tree`.

    Raises:
      UserError: the path needs a link, and none can be made.
      Exception: of many kinds, from Orbax.
    """
    forms: dict[str, dict[str, Any]] = {}

    def put(path: str, leaf: HostLeaf | None) -> np.ndarray | None:
        if leaf is None:
            return None
        form: dict[str, Any] = {}
        if isinstance(leaf, HostKey):
            form["key"], leaf = leaf.impl, leaf.data
        stored: np.ndarray | None = leaf
        if not leaf.size or leaf.dtype.name not in _PLAIN_DTYPES:
            form |= {"dtype": leaf.dtype.name, "shape": leaf.shape}
            stored = np.frombuffer(leaf.tobytes(), np.uint8) if leaf.size else None
        if form:
            forms[path] = form
        return stored

    stored = _map(put, _rename(_escape, tree))
    (folder / _FORMS).write_text(json.dumps({"format": _FORMAT, "forms": forms}))
    args, checkpointer = _orbax()
    with _plain_path(folder) as place:
        checkpointer.save(place / _ARRAYS, args=args.PyTreeSave(stored))


def read_arrays(folder: Path) -> Any:
    """Reads what `write_arrays` wrote, by this version or an earlier one.

    Returns:
      NumPy arrays, and typed keys as JAX has them, in nested dictionaries and lists.

    Raises:
      UserError: a later version wrote it, or the path needs a link and none can be made.
      OSError: a file cannot be opened or read.
      Exception: of many kinds, from Orbax.
    """
    try:
        content = json.loads(read_bytes(folder / _FORMS))
    except FileNotFoundError:
        content = {"format": 1, "forms": {}}
    if content["format"] > _FORMAT:
        raise UserError(f"{folder} was saved by a later version of cnn: install that version")
    forms: dict[str, dict[str, Any]] = content["forms"]

    def take(path: str, stored: Any) -> Any:
        form = forms.get(path, {})
        value = stored
        if "dtype" in form:
            stored = np.empty(0, np.uint8) if stored is None else stored
            value = stored.view(np.dtype(form["dtype"])).reshape(form["shape"])
        if value is not None and "key" in form:
            return jax.random.wrap_key_data(value, impl=form["key"])
        return value

    with _plain_path(folder) as place:
        try:
            stored = _orbax()[1].restore(place / _ARRAYS)
        except Exception as error:
            if (refused := system_error(error)) is not None:
                raise OSError(refused, os.strerror(refused), str(folder / _ARRAYS)) from error
            raise
    tree = _map(take, stored)
    return _rename(_unescape, tree) if content["format"] > 1 else tree


def _map(change: Callable[[str, Any], Any], node: Any, path: str = "") -> Any:
    """A tree of dictionaries and lists with other leaves, each made from its path and itself."""
    if isinstance(node, dict):
        return {name: _map(change, value, f"{path}/{name}") for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_map(change, value, f"{path}/{index}") for index, value in enumerate(node)]
    return change(path, node)


def _rename(change: Callable[[str], str], node: Any) -> Any:
    """The same tree with other keys in its dictionaries."""
    if isinstance(node, dict):
        return {change(name): _rename(change, value) for name, value in node.items()}
    return [_rename(change, value) for value in node] if isinstance(node, list) else node


def _escape(name: str) -> str:
    """A name in letters, digits, `_`, `-` and `%`.

    >>> _escape("Conv_0"), _escape("a.b/c"), _escape("")
    ('Conv_0', 'a%2Eb%2Fc', '%')
    """
    quoted = urllib.parse.quote(name, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E").replace("~", "%7E") or "%"


def _unescape(name: str) -> str:
    return "" if name == "%" else urllib.parse.unquote(name, errors="surrogatepass")


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path of the folder in characters that mean nothing to anybody."""
    if _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    link = _link(folder)
    try:
        yield link
    except OSError as error:
        error.filename = str(error.filename or folder).replace(str(link), str(folder))
        raise
    finally:
        with contextlib.suppress(OSError):
            link.unlink()


def _link(folder: Path) -> Path:
    places = ["/tmp", "/var/tmp", "/dev/shm"]
    with contextlib.suppress(FileNotFoundError):  # there is none that can be written
        places.insert(0, tempfile.gettempdir())
    for place in filter(_PLAIN_PATH.fullmatch, places):
        link = Path(place, f"cnn-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            link.symlink_to(folder)
            return link
    raise UserError(
        f"{folder} has characters in its path that need a link to it, and no folder for temporary "
        f"files can hold one: set TMPDIR to a folder that can be written, with letters, digits "
        f"and ._-/ in its path"
    )


@functools.cache
def _orbax() -> tuple[Any, Any]:
    """Orbax's `args`, and what writes and reads a tree of arrays."""
    import orbax.checkpoint as ocp  # takes most of a second, and scripts may do without

    return ocp.args, ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
