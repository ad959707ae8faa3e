"""Reads a config file, sets fields of it, and checks it once, before anything is loaded.

The table `_RUN_FIELDS` has the fields of every run. Model, loss, optimizer, schedule and
augmentations add their own parameters: see `cnn.registry`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnn.augment import augment_schema, create_augmentations, mix_schema
from cnn.augment.resizing import ProgressiveResizing
from cnn.averaging import AVERAGINGS, averaging_schema, create_averaging
from cnn.data.folder import ON_UNREADABLE
from cnn.data.images import IMAGE_SIZE_MUST, RESIZE, is_image_size
from cnn.data.pipeline import NORMALIZATIONS
from cnn.data.settings import TEST_FRACTION
from cnn.early_stopping import check_monitor
from cnn.errors import UserError
from cnn.evaluation import TEST_TIME_VIEWS
from cnn.losses import LOSSES, create_loss, loss_schema
from cnn.metrics import find_metrics
from cnn.models import MODELS, create_model, model_schema
from cnn.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    create_optimizer,
    create_schedule,
    group_schema,
    optimizer_schema,
    schedule_arguments,
    schedule_schema,
)
from cnn.registry import REQUIRED, Field, Schema, check_type, shown
from cnn.runtime.devices import PLATFORMS
from cnn.runtime.disk import local_path, resolve_path


@dataclasses.dataclass(frozen=True)
class _RunField(Field):
    """A field of a run, with what its value must satisfy, as a function and for a message."""

    valid: Callable[[Any], bool] = lambda _: True
    must: str = ""


def _choice(default: Any, *names: str) -> _RunField:
    return _RunField(
        str,
        default,
        valid=lambda value: value in names,
        must=f"be one of {', '.join(names)}",
    )


def _at_least(low: int, default: Any = REQUIRED) -> _RunField:
    return _RunField(
        int,
        default,
        valid=lambda value: low <= value < 2**31,
        must=f"be {low} or more, and below 2**31",
    )


_RUN_FIELDS: dict[str, _RunField] = {
    "seed": _RunField(
        int, 0, valid=lambda value: 0 <= value < 2**32, must="lie between 0 and 2**32 - 1"
    ),
    "num_seeds": _at_least(1, 1),
    "dataset.name": _RunField(str, valid=bool, must="name a dataset"),
    "dataset.folder": _RunField(str, ""),
    "dataset.image_size": _RunField(object, 0, valid=is_image_size, must=IMAGE_SIZE_MUST),
    "dataset.resize": _choice("crop", *RESIZE),
    "dataset.test_fraction": _RunField(
        float,
        TEST_FRACTION,
        valid=lambda value: 0 < value < 1,
        must="be more than 0 and less than 1",
    ),
    "dataset.split_seed": _at_least(0, 0),
    "dataset.on_unreadable": _choice("skip", *ON_UNREADABLE),
    "dataset.normalization": _choice("scale", *NORMALIZATIONS),
    "batch_size": _at_least(1),
    "num_epochs": _RunField(
        float, valid=lambda value: 0 < value < 2**31, must="be more than 0, and below 2**31"
    ),
    "metrics": _RunField(
        tuple, ("accuracy",), valid=lambda value: "accuracy" in value, must='hold "accuracy"'
    ),
    "init_from": _RunField(str, ""),
    "proxy.keep": _at_least(0, 0),
    "proxy.update_every": _at_least(1, 4),
    "proxy.freeze": _RunField(tuple, (), entries=str),
    "schedule.warmup_epochs": _RunField(
        float, 0.0, valid=lambda value: 0 <= value < 2**31, must="be 0 or more, and below 2**31"
    ),
    "schedule.warmup_from": _RunField(
        float, 0.0, valid=lambda value: 0 <= value <= 1, must="lie between 0 and 1"
    ),
    "schedule.plateau_patience": _at_least(0, 0),
    "schedule.plateau_factor": _RunField(
        float,
        0.1,
        valid=lambda value: 0 < value < 1,
        must="be more than 0 and less than 1",
    ),
    "schedule.plateau_min_scale": _RunField(
        float, 0.0, valid=lambda value: 0 <= value < 1, must="be at least 0 and below 1"
    ),
    "optimizer.learning_rate": _RunField(float),
    "resizing.scales": _RunField(tuple, (), entries=float),
    "resizing.until_epochs": _RunField(tuple, (), entries=float),
    "evaluation.tta": _choice("none", *TEST_TIME_VIEWS),
    "early_stopping.patience": _at_least(0, 0),
    "early_stopping.monitor": _RunField(str, "test_loss"),
    "early_stopping.min_delta": _RunField(
        float, 0.0, valid=lambda value: 0 <= value < math.inf, must="be 0 or more"
    ),
    # They change the result by rounding at most (but for "skip", once a step is not finite), so a
    # run may be resumed with other values.
    "runtime.data_dir": _RunField(str, ""),
    "runtime.platform": _choice("auto", *PLATFORMS),
    "runtime.num_devices": _at_least(0, 0),
    "runtime.steps_per_execution": _at_least(0, 0),
    "runtime.eval_batch_size": _at_least(1, 1000),
    "runtime.checkpoint_every_steps": _at_least(0, 0),
    "runtime.on_nonfinite": _choice("stop", "stop", "skip"),
    "runtime.deterministic": _RunField(bool, True),
    "runtime.fast_cpu": _RunField(bool, False),
    "runtime.compilation_cache": _RunField(bool, True),
    "runtime.group_layout": _choice("auto", "auto", "in_turn", "per_device", "vmap"),
    "runtime.tensorboard": _RunField(bool, False),
}
# In the order of a config file.
SECTIONS = (
    *("dataset", "model", "proxy", "loss", "optimizer", "schedule", "averaging", "augment"),
    *("resizing", "evaluation", "early_stopping", "runtime"),
)
# What a config builds by name: the names, the default one, and the fields of what has a name.
_BUILT: dict[str, tuple[Iterable[str], Any, Callable[[str], Schema]]] = {
    "model": (MODELS, REQUIRED, model_schema),
    "proxy": (("none", *MODELS), "none", lambda name: {} if name == "none" else model_schema(name)),
    "loss": (LOSSES, "cross_entropy", loss_schema),
    "optimizer": (OPTIMIZERS, REQUIRED, optimizer_schema),
    "schedule": (SCHEDULES, "constant", schedule_schema),
    "averaging": (AVERAGINGS, "none", averaging_schema),
}
_EPOCHS = _RUN_FIELDS["schedule.warmup_epochs"]
# Of each group of parameters, beside its name and the fields of its optimizer.
_GROUP_FIELDS = {
    "learning_rate": _RunField(float),
    # The epochs after which its parameters are frozen, and over which its schedule runs; 0: of the
    # whole run.
    "freeze_after_epochs": _EPOCHS,
    "schedule_epochs": _EPOCHS,
}
_GROUPS = "optimizer.groups"
SWEEP = "sweep."  # before the name of a field whose values are swept
# Fields that make a group of runs, or change nothing but rounding.
_NOT_SWEPT = ("seed", "num_seeds", "runtime", "sweep")


def fields(config: ConfigDict) -> Schema:
    """All fields that a config may have, by dotted name, in the order of `configs/baseline.py`.

    Args:
      config: selects by name what is built.

    Raises:
      UserError: an unknown name.
    """
    flat = flatten(config)
    known: Schema = {}
    for section, (names, default, schema) in _BUILT.items():
        known[f"{section}.name"] = Field(str, default, f"One of {', '.join(names)}.")
        name = flat.get(f"{section}.name", default)
        if isinstance(name, str):  # else it is missing, or the check of types refuses it
            known.update({f"{section}.{key}": field for key, field in schema(name).items()})
    for group in dict.fromkeys(name.split(".")[2] for name in flat if _is_of_group(name)):
        title = f"{_GROUPS}.{group}"
        known[f"{title}.name"] = Field(str, "sgd", f"One of {', '.join(OPTIMIZERS)}.")
        name = flat.get(f"{title}.name", "sgd")
        own = group_schema(name) if isinstance(name, str) else {}
        known.update({f"{title}.{key}": field for key, field in {**own, **_GROUP_FIELDS}.items()})
    augment = augment_schema() | mix_schema()
    known.update({f"augment.{key}": field for key, field in augment.items()})
    everything = {**_RUN_FIELDS, **known}
    for name in flat:
        swept = everything.get(name.removeprefix(SWEEP)) if name.startswith(SWEEP) else None
        if swept is not None and name.split(".")[1] not in _NOT_SWEPT:
            entries = swept.type if swept.type in (bool, int, float, str) else None
            everything[name] = Field(tuple, (), "Its values, one for each run.", entries)
    order = ("seed", "num_seeds", "sweep", "dataset", "batch_size", "num_epochs", "metrics")
    order += ("init_from", *SECTIONS[1:])
    return dict(sorted(everything.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _is_of_group(name: str) -> bool:
    """Whether a field belongs to a group of parameters: `optimizer.groups.GROUP.FIELD`."""
    return name.startswith(f"{_GROUPS}.") and name.count(".") == 3


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

    Another `name`, such as that of a model, replaces what is built. Fields that both have, with the
    same type, keep their values; the others have the defaults of the new one.

    Args:
      config: left as it is.
      flags: `--config.field=value` or `--config.field value`; tuples as `"(16, 32)"`, or a bare
        word for a tuple of one string; a boolean alone means true.

    Raises:
      UserError: any other flag, an unknown field, or a value of another type than the field's.

    >>> override(ConfigDict({"seed": 0}), ["--config.seed=7"]).seed
    7
    """
    flat, given = flatten(config), _settings(flags)
    groups = dict.fromkeys(name.rpartition(".")[0] for name, _ in given if _is_of_group(name))
    for group in groups:  # one that the config lacks begins here
        if not any(name.startswith(f"{group}.") for name in flat):
            flat[f"{group}.name"] = "sgd"
    for section in (*_BUILT, *groups):
        name = f"{section}.name"
        if (text := dict(given).get(name)) is not None:
            before = fields(_unflatten(flat))
            flat[name] = text
            known = fields(_unflatten(flat))
            flat = {
                key: value
                for key, value in flat.items()
                if not key.startswith(f"{section}.")
                or (key in known and known[key].type is before.get(key, known[key]).type)
            }
    swept = {name: () for name, _ in given if name.startswith(SWEEP)}
    known = fields(_unflatten({**swept, **flat}))
    for name, text in given:
        _check_known(name, known)
        if text is None:
            if known[name].type is not bool:
                raise UserError(f"--config.{name} needs a value: --config.{name}=value")
            text = "true"
        flat[name] = _parse(name, text, known[name])
    return _unflatten(flat)


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides a command line into the flags that `override` takes and the other words.

    A word after a `--config.FIELD` without a value is its value, unless it begins with two dashes.

    >>> split_settings(["digits", "--config.seed", "3", "--config.augment.flip", "--json"])
    (['--config.seed', '3', '--config.augment.flip'], ['digits', '--json'])
    """
    settings, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        is_setting = word.startswith("--config.")
        (settings if is_setting else others).append(word)
        if is_setting and "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return settings, others


def _settings(flags: Sequence[str]) -> list[tuple[str, str | None]]:
    """Names and texts of flags; None for a flag without a value."""
    given, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        prefix, _, setting = flag.partition("--config.")
        name, equals, text = setting.partition("=")
        if prefix or not name:
            remedy = "" if flag.startswith("-") or not flag else f"did you mean --config {flag}? "
            raise UserError(
                f"unknown flag {flag!r}; {remedy}python train.py --help lists the flags"
            )
        if not equals:
            # `--config.field value`, as other flags have it.
            text = rest.pop(0) if rest and not rest[0].startswith("--") else None
        given.append((name, text))
    return given


_WORD = re.compile(r"[^\s\[(,'\"][^\s(),'\"]*")  # what is not meant as a tuple of Python


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


def _parse(name: str, text: str, field: Field) -> Any:
    """The value of a field's type that a text means."""
    try:
        if field.type is bool:
            return {"true": True, "false": False}[text.lower()]
        if field.type in (int, float, str):
            return field.type(text)
        try:
            with warnings.catch_warnings(action="ignore"):  # of Python, about the text
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if field.type is not tuple:
                return text
            if field.entry_type is not str or not _WORD.fullmatch(text):
                raise
            return (text,)
        if field.type is not tuple:
            return value
        if isinstance(value, str) and field.entry_type is str:
            return (value,)
        if not isinstance(value, tuple | list):
            raise ValueError(text)
        return tuple(value)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"--config.{name}: {shown(text)} is not {field.description}") from error


def as_flags(config: ConfigDict, base: ConfigDict) -> list[str]:
    """The flags by which `override` makes one config of another, in order.

    Args:
      config: wanted.
      base: fields that it lacks have their defaults.

    >>> as_flags(ConfigDict({"num_epochs": 3, "seed": 1}), ConfigDict({"num_epochs": 3}))
    ['--config.seed=1']
    """
    defaults = {name: field.default for name, field in fields(config).items()}
    before = {**defaults, **flatten(base)}
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
      All fields, with defaults where the config has none, and `init_from` as an absolute path. A
      config that is read back from JSON, with lists for tuples, equals the original.

    Raises:
      UserError: names the field, its value and what it should be.
    """
    flat, known = flatten(config), fields(config)
    for section, (_, default, _) in _BUILT.items():
        if default is REQUIRED and f"{section}.name" not in flat:
            raise _missing(f"{section}.name")
    for name, value in flat.items():
        if not isinstance(value, ConfigDict):  # an empty section
            _check_known(name, known)
    checked = {}
    for name, field in known.items():
        if name not in flat and field.default is REQUIRED:
            raise _missing(name)
        value = check_type(name, field, flat[name]) if name in flat else field.default
        if isinstance(field, _RunField) and not field.valid(value):
            raise UserError(f"config field {name}={shown(value)} must {field.must}")
        checked[name] = value
    for name in ("init_from", "dataset.folder"):  # the same wherever the run is resumed from
        if checked[name]:
            checked[name] = str(resolve_path(checked[name]))
    complete = _unflatten(checked)
    _check_built(complete)
    return complete


def _missing(name: str) -> UserError:
    return UserError(f"config field {name} is missing; configs/baseline.py shows it")


def _check_built(config: Any) -> None:
    """Builds what can be built without data, for its own checks.

    A model's own spelling of a string, such as that of `padding`, becomes the config's.
    """
    model = create_model(num_classes=2, **config.model.to_dict())
    for name, value in config.model.items():
        if name != "name" and isinstance(own := getattr(model, name), str) and own != value:
            config.model[name] = own
    if (proxy := config.proxy).name != "none":
        own = {name: proxy[name] for name in ("name", *model_schema(proxy.name))}
        create_model(num_classes=2, **own)
        if not 1 <= proxy.keep <= config.batch_size:
            raise UserError(
                f"config field proxy.keep={proxy.keep} must lie between 1 and "
                f"batch_size={config.batch_size}: the images of a batch that are trained on"
            )
        if config.optimizer.grad_accumulation_steps > 1:
            raise UserError(
                f"proxy.name={proxy.name} and optimizer.grad_accumulation_steps="
                f"{config.optimizer.grad_accumulation_steps} do not go together: a proxy chooses "
                f"for one step; set one of them back"
            )
    create_loss(**config.loss.to_dict())
    create_augmentations(**config.augment.to_dict())
    ProgressiveResizing(**config.resizing.to_dict())
    find_metrics(config.metrics)
    check_monitor(config.early_stopping.monitor, config.metrics)
    optimizer = config.optimizer.to_dict()
    for group in optimizer.get("groups", {}).values():
        del group["freeze_after_epochs"], group["schedule_epochs"]
    create_optimizer(**optimizer)
    create_averaging(num_steps=1, **config.averaging.to_dict())
    warmup_epochs = config.schedule.warmup_epochs
    create_schedule(
        learning_rate=config.optimizer.learning_rate,
        num_updates=1,
        warmup_updates=int(warmup_epochs > 0),
        warmup_from=config.schedule.warmup_from,
        **schedule_arguments(config.schedule),
    )
    if warmup_epochs > config.num_epochs:
        raise UserError(
            f"schedule.warmup_epochs={warmup_epochs} is longer than num_epochs={config.num_epochs}"
        )


def _check_known(name: str, known: Schema) -> None:
    if name in known:
        return
    if name.startswith(SWEEP):
        swept = name.removeprefix(SWEEP)
        if swept.split(".")[0] in _NOT_SWEPT:
            raise UserError(
                f"{swept} cannot be swept; num_seeds trains several seeds, and any field but those "
                f"of runtime can be swept"
            )
        _check_known(swept, known)
    section, _, leaf = name.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if section and (near := difflib.get_close_matches(leaf, siblings, n=1)):
        remedy = f"did you mean {section}.{near[0]}?"
    elif section in _BUILT:
        remedy = f"the {section} that is chosen has {', '.join(s for s in siblings if s != 'name')}"
    elif near := difflib.get_close_matches(name, known, n=1):
        remedy = f"did you mean {near[0]}?"
    else:
        remedy = "python train.py --help lists all fields"
    raise UserError(f"unknown config field {name}; {remedy}")


def to_json_value(value: Any) -> Any:
    """A value as it is when it was read from JSON: a tuple becomes a list."""
    return json.loads(json.dumps(value))


def to_json_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as nested JSON values: what `config.json` holds."""
    return to_json_value(config.to_dict())


def used(flat: dict[str, Any]) -> dict[str, Any]:
    """The fields of a flat config that have an effect: a folder takes the place of a dataset name.

    >>> used({"dataset.name": "cifar10", "dataset.folder": "/photos"})
    {'dataset.folder': '/photos'}
    """
    return {k: v for k, v in flat.items() if k != "dataset.name" or not flat.get("dataset.folder")}


def config_diff(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields in which two resolved configs would give different results: all but `runtime`.

    >>> before = {"seed": 0, "runtime": {"platform": "cpu"}}
    >>> config_diff(before, {"seed": 1, "runtime": {"platform": "gpu"}})
    ['seed: 0 -> 1']
    """
    old, new = flatten(before), flatten(after)
    # A field that was added since then had no other value than its default.
    for name, field in fields(ConfigDict(after)).items():
        if name in new and field.default is not REQUIRED:
            old.setdefault(name, to_json_value(field.default))
    # Where one of the two has a folder, the difference between their folders says it all.
    folder = old.get("dataset.folder") or new.get("dataset.folder")
    return [
        f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in used({**old, **new, "dataset.folder": folder})
        if not name.startswith("runtime.") and old.get(name) != new.get(name)
    ]
