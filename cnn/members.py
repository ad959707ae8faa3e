"""The runs of a group: the swept values of a config, crossed, each with several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

from ml_collections import ConfigDict

from cnn.config import SWEEP, check_config, flatten, override
from cnn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a group.

    Attributes:
      name: of its directory, such as "seed=3" or "optimizer.learning_rate=0.01,seed=3".
      seed: of the run.
      settings: the values of the swept fields, by dotted name.
      config: of the run, checked. It is that of a single run.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    config: Any


def is_group(config: Any) -> bool:
    """Whether a checked config asks for several runs."""
    return config.num_seeds > 1 or bool(_swept(config))


def group_members(config: Any) -> list[Member]:
    """The runs of a config: for each point of its sweep those of all seeds.

    The fields are in alphabetical order, and the last one varies fastest. The seeds are `seed`,
    `seed` + 1 and so on, `num_seeds` of them.

    Args:
      config: a `ConfigDict` from `check_config`.

    Raises:
      UserError: a field has no value or twice the same, or a run's config is refused.

    >>> from cnn.config import load_config
    >>> config = check_config(override(load_config("configs/digits.py"), ["--config.num_seeds=2"]))
    >>> [member.name for member in group_members(config)]
    ['seed=0', 'seed=1']
    """
    swept = _swept(config)
    for name, values in swept.items():
        if not values or len({*map(str, values)}) < len(values):
            fault = "has twice the same value" if values else "has no value"
            raise UserError(f"config field {SWEEP}{name}={values!r} {fault}; list different ones")
    groups = ("num_seeds", "sweep")
    base = ConfigDict({name: one for name, one in config.to_dict().items() if name not in groups})
    members = []
    for values in itertools.product(*swept.values()):
        settings = dict(zip(swept, values, strict=True))
        for seed in range(config.seed, config.seed + config.num_seeds):
            one = {**settings, "seed": seed}
            flags = [f"--config.{field}={value}" for field, value in one.items()]
            title = ",".join(f"{field}={value}" for field, value in one.items())
            members.append(
                Member(
                    name=re.sub(r"[^\w.,=()+-]", "_", title),
                    seed=seed,
                    settings=settings,
                    config=check_config(override(base, flags)),
                )
            )
    return members


def _swept(config: Any) -> dict[str, tuple[Any, ...]]:
    """The values of the fields that are swept, in alphabetical order."""
    return {
        name.removeprefix(SWEEP): value
        for name, value in flatten(config).items()
        if name.startswith(SWEEP)
    }
