"""Which object a script passed: its name and a digest of its source, as JSON values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MAX_DEPTH = 12  # of functions within functions
_OF_LINEN = ("parent", "name")  # fields of every linen module


def describe_object(value: Any) -> dict[str, Any]:
    """Tells objects apart as far as that can be done from outside.

    Args:
      value: a function, or an instance such as a linen module or an optimizer.

    Returns:
      `object`, the qualified name of the function or class; `source`, a digest of its source, or
      None if there is none to read; and `value`, what else can be seen of it: the fields of a
      dataclass, the arguments of a partial function, the variables of a closure, at any depth.

    >>> describe_object(functools.partial(round, ndigits=2))
    {'object': 'builtins.round', 'source': None, 'value': 'round(ndigits=2)'}
    """
    named = value.func if isinstance(value, functools.partial) else value
    if not isinstance(named, types.FunctionType | types.BuiltinFunctionType | type):
        named = type(named)
    return {
        "object": f"{named.__module__}.{named.__qualname__}",
        "source": _source_digest(named),
        "value": _text(value, 0),
    }


def _source_digest(named: Any) -> str | None:
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):  # typed at a prompt, or written in C
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _text(value: Any, depth: int) -> str:
    """A value without what differs from process to process; functions by what they close over."""
    inner = functools.partial(_text, depth=depth + 1)
    if depth > _MAX_DEPTH:
        return "..."
    if isinstance(value, functools.partial):
        arguments = {**{str(i): v for i, v in enumerate(value.args)}, **value.keywords}
        return f"{value.func.__name__}({_pairs(arguments, inner)})"
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        known = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        return f"{value.__qualname__}({_pairs(known, inner)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {n: getattr(value, n, None) for n in names if n not in _OF_LINEN}
        return f"{type(value).__name__}({_pairs(fields, inner)})"
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        fields = dict(zip(names, value, strict=True))
        return f"{type(value).__name__}({_pairs(fields, inner)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, Mapping):
        return f"{{{_pairs(value, inner)}}}"
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:8]}"
    return _ADDRESS.sub("", repr(value))


def _pairs(values: Mapping[Any, Any], text: Any) -> str:
    return ", ".join(f"{name}={text(value)}" for name, value in values.items())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not assigned yet
        return False
