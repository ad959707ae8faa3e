"""Reads a config file, sets fields of it, and checks it once, before anything is loaded."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnn.data.pipeline import NORMALIZATIONS
from cnn.errors import UserError
from cnn.models import MODEL_NAMES
from cnn.ops.convolution import IMPLEMENTATIONS
from cnn.optimizers import OPTIMIZER_NAMES, SCHEDULE_NAMES
from cnn.runtime.devices import PLATFORMS
from cnn.runtime.disk import local_path

# Where the data lies, what is compiled anew and what is recorded beside the run do not change its
# result; on which devices it goes on does by rounding, and what to do about steps that are not
# finite only after the first of them.
_FREE_TO_CHANGE = (
    "dataset.data_dir",
    "platform",
    "num_devices",
    "on_nonfinite",
    "compilation_cache",
    "tensorboard",
)
_ON_NONFINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class _Field:
    """The type of a field, what its value must satisfy, that in words, and its one spelling."""

    kind: type
    valid: Callable[[Any], bool] = lambda _: True
    words: str = ""
    canonical: Callable[[Any], Any] = lambda value: value


def _choice(*names: str) -> _Field:
    return _Field(str, lambda value: value in names, f"be one of {', '.join(names)}")


_MAX_WIDTH = 2**16  # more is a slip of the hand, and would only exhaust the memory
_WIDTH = _Field(int, lambda value: 1 <= value <= _MAX_WIDTH, f"lie between 1 and {_MAX_WIDTH}")

_WIDTH_OR_NONE = _Field(
    int, lambda value: 0 <= value <= _MAX_WIDTH, f"lie between 0 and {_MAX_WIDTH}"
)


def _at_least(low: int) -> _Field:
    return _Field(int, lambda value: low <= value < 2**31, f"be {low} or more, and below 2**31")


# What becomes 0 or infinite as a float32 is refused.
_LEAST, _MOST = 1e-37, 1e38
_NOT_NEGATIVE = _Field(float, lambda value: 0 <= value <= _MOST, f"be 0 or more, at most {_MOST}")
_POSITIVE = _Field(
    float,
    lambda value: _LEAST <= value <= _MOST,
    f"be positive and finite, from {_LEAST} to {_MOST}",
)
_BELOW_ONE = _Field(float, lambda value: 0 <= value < 1, "be at least 0 and below 1")
_FRACTION = _Field(float, lambda value: 0 <= value <= 1, "lie between 0 and 1")
_WIDTHS = _Field(
    tuple,
    lambda value: all(type(width) is int and 1 <= width <= _MAX_WIDTH for width in value),
    f"hold whole numbers from 1 to {_MAX_WIDTH}",
    tuple,
)
_PADDINGS = ("VALID", "SAME")

FIELDS: dict[str, _Field] = {
    "seed": _Field(int, lambda value: 0 <= value < 2**32, "lie between 0 and 2**32 - 1"),
    "dataset.name": _Field(str, bool, "name a dataset"),
    "dataset.data_dir": _Field(str),
    "dataset.normalization": _choice(*NORMALIZATIONS),
    "model.name": _choice(*MODEL_NAMES),
    "model.features": _WIDTHS,
    "model.kernel_size": _WIDTH,
    "model.padding": _Field(
        str,
        lambda value: value.upper() in _PADDINGS,
        f"be one of {', '.join(_PADDINGS)}",
        str.upper,
    ),
    "model.hidden_features": _WIDTH_OR_NONE,
    "model.patch_size": _WIDTH_OR_NONE,
    "model.patch_features": _WIDTH,
    "model.batch_norm": _Field(bool),
    "model.dtype": _choice("float32", "bfloat16"),
    "model.conv_implementation": _choice(*IMPLEMENTATIONS),
    "augment.flip": _Field(bool),
    "augment.translate": _WIDTH_OR_NONE,
    "batch_size": _at_least(1),
    "num_epochs": _at_least(1),
    "label_smoothing": _BELOW_ONE,
    "optimizer.name": _choice(*OPTIMIZER_NAMES),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.momentum": _BELOW_ONE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.grad_clip_norm": _NOT_NEGATIVE,
    "optimizer.grad_accumulation_steps": _at_least(1),
    "schedule.name": _choice(*SCHEDULE_NAMES),
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.final_lr_fraction": _FRACTION,
    "on_nonfinite": _choice(*_ON_NONFINITE),
    "eval_batch_size": _at_least(1),
    "checkpoint_every_steps": _at_least(0),
    "platform": _choice(*PLATFORMS),
    "num_devices": _at_least(0),
    "steps_per_execution": _at_least(0),
    "deterministic": _Field(bool),
    "compilation_cache": _Field(bool),
    "tensorboard": _Field(bool),
}


def find_config(name: str, folder: Path) -> Path:
    """The config file that a person means: the path of one, or the name of one in a folder.

    Args:
      name: such as "mine/config.py", "digits" or "digits.py". A path to a file comes first.
      folder: of the named configs.

    Raises:
      UserError: if there is none; it names configs with a similar name.
    """
    path = local_path(name)
    # Path's own methods raise where a name is too long.
    for place in (path, folder / name, folder / f"{name}.py"):
        if os.path.isfile(place):
            return place
    fault = "is a directory" if os.path.isdir(path) else "is not a file"
    fault = fault if os.path.exists(path) else "does not exist"
    known = sorted(place.stem for place in folder.glob("*.py"))
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean --config {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"config file {path} {fault}; {hint}")


def load_config(path: str | os.PathLike[str]) -> ConfigDict:
    """Calls `get_config()` of a Python file. A config is code: run only what you trust.

    Args:
      path: of the file; or of the `config.json` of a run.

    Raises:
      UserError: if there is no such file, or it does not give a config.
    """
    path = local_path(path)
    if not os.path.isfile(path):  # Path's own raises where a name is too long
        fault = "is a directory" if os.path.isdir(path) else "is not a file"
        fault = fault if os.path.exists(path) else "does not exist"
        raise UserError(f"config file {path} {fault}")
    # A config may import its neighbours as `from configs import baseline`.
    search = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        if path.suffix == ".json":
            get_config = functools.partial(_read_json, path)
        else:
            get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
        if isinstance(config, ConfigDict):
            flatten(config)  # raises where a section holds itself, or a field awaits its value
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"config file {path} is broken: {type(error).__name__}: {reason}"
        ) from error
    finally:
        sys.path[:] = search
    if not callable(get_config):
        raise UserError(f"config file {path} must define get_config()")
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} must return an ml_collections.ConfigDict, "
            f"not {type(config).__name__}"
        )
    return config


def _read_json(path: Path) -> Any:
    value = json.loads(path.read_text())
    return ConfigDict(value) if isinstance(value, dict) else value


def override(config: ConfigDict, flags: Sequence[str]) -> ConfigDict:
    """Sets fields from the command line.

    Args:
      config: left as it is.
      flags: `--config.field=value` or `--config.field value`; tuples as `"(16, 32)"`; a
        boolean alone means true.

    Raises:
      UserError: for anything else, an unknown field, or a value not of the field's type.

    >>> override(ConfigDict({"seed": 0}), ["--config.seed=7"]).seed
    7
    """
    flat, rest = flatten(config), list(flags)
    while rest:
        flag = rest.pop(0)
        prefix, _, setting = flag.partition("--config.")
        name, equals, text = setting.partition("=")
        if prefix or not name:
            hint = "" if flag.startswith("-") or not flag else f"did you mean --config {flag}? "
            raise UserError(f"unknown flag {flag!r}; {hint}python train.py --help lists the flags")
        _check_known(name)
        if name not in flat:
            raise UserError(f"config field {name} is missing; configs/baseline.py shows it")
        kind = FIELDS[name].kind
        if not equals:
            # `--config.field value`, as other flags have it; a bare boolean is true.
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif kind is bool:
                text = "true"
            else:
                raise UserError(f"--config.{name} needs a value: --config.{name}=value")
        flat[name] = _parse(name, text, kind)
    return _unflatten(flat)


def _unflatten(flat: dict[str, Any]) -> ConfigDict:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        holder = nested
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[leaf] = value
    return ConfigDict(nested)


def _parse(name: str, text: str, kind: type) -> Any:
    """The value of a field's type that a text means."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is not tuple:
            return kind(text)
        with warnings.catch_warnings(action="ignore"):  # of Python, about the text
            value = ast.literal_eval(text)
        if not isinstance(value, tuple | list):
            raise ValueError(text)
        return tuple(value)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"--config.{name}: {_shown(text)} is not {_IN_WORDS[kind]}") from error


_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: 'a tuple such as "(16, 32)"',
}


def as_flags(config: ConfigDict, base: ConfigDict) -> list[str]:
    """The flags by which `override` makes one config of another, in order.

    Args:
      config: wanted.
      base: has the same fields.

    >>> base = ConfigDict({"model": {"features": (8,)}, "num_epochs": 3, "seed": 0})
    >>> as_flags(ConfigDict({"model": {"features": (4,)}, "num_epochs": 3, "seed": 1}), base)
    ['--config.model.features=(4,)', '--config.seed=1']
    """
    before = flatten(base)
    return [f"--config.{n}={v}" for n, v in flatten(config).items() if v != before[n]]


def comments(source: str) -> dict[str, str]:
    r"""What a config file says of each field, in the comment lines above its assignment.

    Args:
      source: of the file.

    >>> comments("# Of everything\n# random.\nconfig.seed = 0")
    {'seed': 'Of everything random.'}
    """
    found, above = {}, []
    for line in map(str.strip, source.splitlines()):
        if line.startswith("# "):
            above.append(line[2:])
            continue
        if assignment := re.match(r"config\.([\w.]+) = (?!ConfigDict)", line):
            found[assignment[1]] = " ".join(above)
        above = []
    return found


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as one level of dotted names, in order.

    >>> flatten({"model": {"name": "cnn"}, "seed": 0})
    {'model.name': 'cnn', 'seed': 0}
    """
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_config(config: ConfigDict) -> ConfigDict:
    """Refuses a config with an unknown, missing, mistyped or impossible field.

    Returns:
      The same fields in one spelling: a config that was JSON in between, with lists for tuples, is
      then equal to what it was.

    Raises:
      UserError: names the field, its value and what it should be.
    """
    flat = flatten(config)
    for name in flat:
        _check_known(name)
    for name, field in FIELDS.items():
        if name not in flat:
            raise UserError(f"config field {name} is missing; configs/baseline.py shows it")
        _check_field(name, flat[name], field)
    if flat["schedule.warmup_epochs"] > flat["num_epochs"]:
        raise UserError(
            f"schedule.warmup_epochs={flat['schedule.warmup_epochs']} is longer than "
            f"num_epochs={flat['num_epochs']}"
        )
    if flat["batch_size"] == 1 and flat["model.batch_norm"]:
        raise UserError(
            "batch_size=1 with model.batch_norm=True: the statistics of one image say nothing of "
            "others, and nothing would be learned; choose batch_size=2 or more, or "
            "model.batch_norm=False"
        )
    return _unflatten({name: FIELDS[name].canonical(value) for name, value in flat.items()})


def _check_known(name: str) -> None:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "configs/baseline.py lists all fields"
        raise UserError(f"unknown config field {name}; {hint}")


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number too long to print"


def _check_field(name: str, value: Any, field: _Field) -> None:
    kinds = {float: (float, int), tuple: (tuple, list)}.get(field.kind, (field.kind,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and field.kind is not bool):
        raise UserError(
            f"config field {name}={_shown(value)} must be {_IN_WORDS[field.kind]}, "
            f"not {type(value).__name__}"
        )
    if not field.valid(value):
        raise UserError(f"config field {name}={_shown(value)} must {field.words}")


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as nested JSON values: what `config.json` holds."""
    return json.loads(json.dumps(config.to_dict()))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields in which two resolved configs would give different results.

    >>> differences({"seed": 0, "tensorboard": True}, {"seed": 1, "tensorboard": False})
    ['seed: 0 -> 1']
    """
    old, new = flatten(before), flatten(after)
    return [
        f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in {**old, **new}
        if name not in _FREE_TO_CHANGE and old.get(name) != new.get(name)
    ]
