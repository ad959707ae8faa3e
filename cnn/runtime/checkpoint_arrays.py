"""A tree of arrays as a folder of files, written and read by Orbax.

Orbax and TensorStore have limits that a state or a path may exceed: they cannot store arrays of
size zero and some dtypes, confuse a key "a.b" with a key "b" below "a", and lose what is saved
below a path with brackets or backslashes. So arrays are converted to a form that they can store,
`arrays.json` holds what is needed to convert them back, and unusual paths are reached by a link.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import tempfile
import threading
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

_FORMAT = 2
_ARRAYS, _FORMS = "state", "arrays.json"
_PLAIN_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
}
# Runs of a group save from threads of their own, and Orbax does not say that it allows that.
_one_at_a_time = threading.Lock()
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")


def host_tree(tree: Any) -> Any:
    """Copies a tree to the host, into nested dictionaries and lists.

    Named tuples and dataclasses become dictionaries, tuples become lists, and a node without
    leaves, such as None or an empty optimizer state, becomes None.

    Returns:
      A tree of `HostLeaf`; the caller may donate the buffers of the given tree.

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
    """Writes a tree of `host_tree` to `state` and `arrays.json` in a folder that exists.

    Raises:
      UserError: the path needs a link, and none can be created.
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
    with _plain_path(folder) as place, _one_at_a_time:
        checkpointer.save(place / _ARRAYS, args=args.PyTreeSave(stored))


def read_arrays(folder: Path) -> Any:
    """Reads what `write_arrays` wrote.

    Returns:
      NumPy arrays, and JAX's typed keys, in nested dictionaries and lists.

    Raises:
      UserError: another version wrote it, or the path needs a link and none can be created.
      OSError: a file cannot be opened or read.
      Exception: of many kinds, from Orbax.
    """
    content = json.loads(read_bytes(folder / _FORMS))
    if content["format"] != _FORMAT:
        raise UserError(f"{folder} was saved by another version of cnn: install that version")
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

    checkpointer = _orbax()[1]
    with _plain_path(folder) as place, _one_at_a_time:
        try:
            stored = checkpointer.restore(place / _ARRAYS)
        except Exception as error:
            if (refused := system_error(error)) is not None:
                raise OSError(refused, os.strerror(refused), str(folder / _ARRAYS)) from error
            raise
    return _rename(_unescape, _map(take, stored))


def _map(change: Callable[[str, Any], Any], node: Any, path: str = "") -> Any:
    """Applies `change(path, leaf)` to the leaves of a tree of dictionaries and lists."""
    if isinstance(node, dict):
        return {name: _map(change, value, f"{path}/{name}") for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_map(change, value, f"{path}/{index}") for index, value in enumerate(node)]
    return change(path, node)


def _rename(change: Callable[[str], str], node: Any) -> Any:
    """Applies `change` to the keys of all dictionaries in a tree."""
    if isinstance(node, dict):
        return {change(name): _rename(change, value) for name, value in node.items()}
    return [_rename(change, value) for value in node] if isinstance(node, list) else node


def _escape(name: str) -> str:
    """Encodes a name in letters, digits, `_`, `-` and `%`.

    >>> _escape("Conv_0"), _escape("a.b/c"), _escape("")
    ('Conv_0', 'a%2Eb%2Fc', '%')
    """
    quoted = urllib.parse.quote(name, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E").replace("~", "%7E") or "%"


def _unescape(name: str) -> str:
    return "" if name == "%" else urllib.parse.unquote(name, errors="surrogatepass")


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Yields a path of the folder without characters that Orbax or TensorStore interpret."""
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
    with contextlib.suppress(FileNotFoundError):  # there is no writable one
        places.insert(0, tempfile.gettempdir())
    for place in filter(_PLAIN_PATH.fullmatch, places):
        link = Path(place, f"cnn-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            link.symlink_to(folder)
            return link
    raise UserError(
        f"the path of {folder} has characters that need a link to it, and no folder for temporary "
        f"files can hold one: set TMPDIR to a writable folder whose path has only letters, digits "
        f"and ._-/"
    )


@functools.cache
def _orbax() -> tuple[Any, Any]:
    """Orbax's `args`, and its checkpointer of a pytree."""
    import orbax.checkpoint as ocp  # takes most of a second, and not every script needs it

    return ocp.args, ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
