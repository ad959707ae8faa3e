"""Which object a script passed: its name and a digest of its source, as JSON values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe_object(value: Any) -> dict[str, Any]:
    """Tells objects apart as far as that can be done from outside.

    Args:
      value: a function, or an instance such as a linen module or an optimizer.

    Returns:
      `object`, the qualified name of the function or class; `source`, a digest of its source, or
      None if there is none to read; and `value`, what else can be seen of it: the fields of a
      dataclass, the arguments of a partial function, the variables of a closure.

    >>> describe_object(functools.partial(round, ndigits=2))["value"]
    "{'ndigits': 2}"
    """
    named = value if isinstance(value, types.FunctionType | type) else type(value)
    if isinstance(value, functools.partial):
        inner = describe_object(value.func)
        return {**inner, "value": _text({**dict(enumerate(value.args)), **value.keywords})}
    if hasattr(value, "update") and hasattr(value, "init"):  # an optimizer: two closures
        named = getattr(value, "update")  # noqa: B009 - for the type checker
    return {
        "object": f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', named)}",
        "source": _source_digest(named),
        "value": _value(value, named),
    }


def _source_digest(named: Any) -> str | None:
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):  # typed at a prompt, or written in C
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _value(value: Any, named: Any) -> str | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.repr]
        return _text({name: getattr(value, name, None) for name in names})
    closure = getattr(named, "__closure__", None) or ()
    names = named.__code__.co_freevars if closure else ()
    return _text(dict(zip(names, map(_content, closure), strict=True))) if closure else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _text(values: dict[Any, Any]) -> str:
    """Of values, without what differs from process to process."""
    return _ADDRESS.sub("", repr(values))[:1000]
