"""What a config builds by name, checked against the signature of what is built.

A registry maps names to functions or classes. `schema` reads from the one that a config selects
which fields it takes, so that a new model, loss or optimizer brings its own fields along.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cnn.errors import UserError

REQUIRED = inspect.Parameter.empty
_TYPES = {"bool": bool, "int": int, "float": float, "str": str}
_ENTRIES = re.compile(r"\[(bool|int|float|str)(, \.\.\.)?\]$")  # of an annotation, Sequence[str]
_DESCRIPTIONS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: "a tuple",
}
# By the type of the entries of a tuple; of strings a config holds the names of parameters mostly.
_TUPLES = {int: (16, 32), float: (0.5, 0.75), str: ("Conv_*",), bool: (True, False)}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", bool: "booleans"}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      type: bool, int, float, str or tuple; `object` takes any of them, and None.
      default: its value where a config does not set it; `REQUIRED` if there is none.
      doc: what it means, for `--help`.
      entries: the type of the entries of a tuple whose default is empty; None if it is not known.
    """

    type: type
    default: Any = REQUIRED
    doc: str = ""
    entries: type | None = None

    @property
    def entry_type(self) -> type | None:
        """Of a tuple: that of the default's first entry, if it has any; None if it is not known."""
        if self.type is tuple and self.default not in (REQUIRED, ()):
            return type(self.default[0])
        return self.entries

    @property
    def description(self) -> str:
        """What a value must be, for a message."""
        known = self.default if self.type is tuple and self.default is not REQUIRED else ()
        if example := known or _TUPLES.get(self.entries):
            return f'a tuple such as "{example}"'
        return _DESCRIPTIONS.get(self.type, "a number, a string, a boolean or a tuple")


Schema = dict[str, Field]


def schema(build: Callable[..., Any], *, without: Collection[str] = ()) -> Schema:
    """The fields that a function or a dataclass takes by keyword, in order.

    The type of a field is that of its annotation if it is bool, int, float or str, else that of its
    default: a dtype makes a field of dtype names, None a field of any type. A parameter whose
    default is something else, such as a function, is no field.

    Args:
      build: a function, or a class such as a linen module.
      without: parameters that the caller fills in.

    >>> def make(size: int, rate: float = 1, *, names=("a", "b"), key=None): ...
    >>> fields = schema(make, without=["key"])
    >>> {name: field.type.__name__ for name, field in fields.items()}
    {'size': 'int', 'rate': 'float', 'names': 'tuple'}
    """
    # A linen module is a dataclass with two fields of linen's own.
    own = {"self", "parent", "name"} if inspect.isclass(build) else {"self"}
    fields = {}
    for name, parameter in inspect.signature(build).parameters.items():
        is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_named and name not in own and name not in without and (field := _field(parameter)):
            fields[name] = field
    return fields


def _field(parameter: inspect.Parameter) -> Field | None:
    """None where no config can set the parameter: its default is a function, say."""
    annotation, default = parameter.annotation, parameter.default
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if name in _TYPES:
        return Field(_TYPES[name], default)
    if default is REQUIRED or default is None:
        return Field(object, default)
    if isinstance(default, bool | int | float | str):
        return Field(type(default), default)
    if isinstance(default, tuple | list):
        entries = _ENTRIES.search(str(annotation))
        return Field(tuple, tuple(default), entries=_TYPES[entries[1]] if entries else None)
    try:  # jnp.float32, for example
        dtype = np.dtype(default)
    except (TypeError, ValueError):
        return None
    return None if dtype.kind == "O" else Field(str, dtype.name)


def select(kind: str, registry: Mapping[str, Any], name: str) -> Any:
    """The entry of a registry.

    Args:
      kind: what the registry holds, such as "model".
      registry: by name.
      name: which.

    Raises:
      UserError: there is no such name; the message lists similar ones.
    """
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}; {hint(name, registry)}")
    return registry[name]


def hint(name: str, known: Iterable[str]) -> str:
    """What a person who mistyped a name may have meant.

    >>> hint("momentun", ["momentum", "nesterov"]), hint("x", ["momentum", "nesterov"])
    ('did you mean momentum?', 'known: momentum, nesterov')
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"


def complete(title: str, schema: Schema, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a schema: checked values where they are given, else the defaults.

    Args:
      title: what has these fields, such as "optimizer"; it precedes their names in messages.
      schema: of what is to be built.
      fields: by name.

    Raises:
      UserError: an unknown field, a missing one, or one of another type.
    """
    for name in fields:
        if name not in schema:
            raise UserError(f"unknown field {_join(title, name)}; {hint(name, schema)}")
    complete = {}
    for name, field in schema.items():
        if name not in fields and field.default is REQUIRED:
            raise UserError(f"field {_join(title, name)} is missing: it must be set")
        value = fields.get(name, field.default)
        complete[name] = check_type(_join(title, name), field, value) if name in fields else value
    return complete


def check_type(name: str, field: Field, value: Any) -> Any:
    """A value of a field: an int where a float is wanted becomes one, and a list a tuple.

    Raises:
      UserError: the value is of another type.
    """
    kinds = {float: (float, int), tuple: (tuple, list)}.get(field.type, (field.type,))
    is_bool = isinstance(value, bool) and field.type not in (bool, object)
    if not isinstance(value, kinds) or is_bool:
        raise UserError(
            f"config field {name}={shown(value)} must be {field.description}, "
            f"not {type(value).__name__}"
        )
    if isinstance(value, tuple | list) and field.type in (tuple, object):
        if field.type is tuple:
            _check_entries(name, field, value)
        return tuple(value)
    return value


def _check_entries(name: str, field: Field, values: Sequence[Any]) -> None:
    """Raises UserError unless all are of the type that the field's entries have, if it is known."""
    if (kind := field.entry_type) is None:
        return
    kinds = (int, float) if kind is float else (kind,)
    if not all(type(value) in kinds for value in values):
        raise UserError(
            f"config field {name}={shown(values)} must hold {_PLURALS.get(kind, 'other values')}, "
            f"as {field.default or _TUPLES[kind]} does"
        )


def shown(value: Any) -> str:
    """A value for a message."""
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number too long to print"


def _join(title: str, name: str) -> str:
    return f"{title}.{name}" if title else name
