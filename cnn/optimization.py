"""From a checked config to the arguments of its optimizers, in updates of a run of known length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import optax

from cnn.errors import UserError
from cnn.models import create_model, model_schema
from cnn.optimizers import covers, create_optimizer, create_schedule, schedule_arguments


def run_schedule(
    config: Any, num_steps: int, steps_per_epoch: int, group: Mapping[str, Any] | None = None
) -> tuple[optax.Schedule, int]:
    """The schedule of the run or of a group of parameters, and how many updates are its warm-up.

    It counts updates, not steps: an optimizer that accumulates gradients advances its schedule once
    per update.

    Args:
      config: with all fields.
      num_steps: of the run.
      steps_per_epoch: of the run.
      group: the fields of a group of parameters, which has a rate of its own.

    Raises:
      UserError: a value out of its range, or fewer steps than one update takes.
    """
    accumulation = config.optimizer.grad_accumulation_steps
    if accumulation > num_steps:
        raise UserError(
            f"optimizer.grad_accumulation_steps={accumulation} is more than the {num_steps:,} "
            f"steps of the run: nothing would be trained"
        )
    updates_per_epoch = steps_per_epoch / accumulation
    warmup_updates = round(updates_per_epoch * config.schedule.warmup_epochs)
    rate, num_updates = config.optimizer.learning_rate, num_steps // accumulation
    if group is not None:
        rate = group["learning_rate"]
        num_updates = _whole(updates_per_epoch * group["schedule_epochs"]) or num_updates
    schedule = create_schedule(
        learning_rate=rate,
        num_updates=num_updates,
        warmup_updates=warmup_updates,
        warmup_from=config.schedule.warmup_from,
        **schedule_arguments(config.schedule),
    )
    return schedule, warmup_updates


def optimizer_arguments(config: Any, num_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    """The arguments of `create_optimizer`, in updates, with schedules for learning rates.

    Args:
      config: with all fields.
      num_steps: of the run.
      steps_per_epoch: of the run.

    Raises:
      UserError: as for `run_schedule`.
    """
    fields = config.optimizer.to_dict()
    fields["learning_rate"], _ = run_schedule(config, num_steps, steps_per_epoch)
    for group in fields.get("groups", {}).values():
        group["learning_rate"], _ = run_schedule(config, num_steps, steps_per_epoch, group)
        del group["schedule_epochs"]
        updates = group.pop("freeze_after_epochs") * steps_per_epoch
        group["num_updates"] = _whole(updates / config.optimizer.grad_accumulation_steps)
    return fields


def _whole(updates: float) -> int:
    """Rounded; not to 0, which means something else."""
    return max(round(updates), int(updates > 0))


def create_proxy(
    config: Any, num_classes: int, num_steps: int, steps_per_epoch: int
) -> tuple[nn.Module, optax.GradientTransformation]:
    """The network that chooses images, and the optimizer of the config for its parameters.

    Its learning rates are those of the run's step: it makes an update every so many steps. Groups
    of parameters that it freezes are left out.

    Args:
      config: with all fields, whose `proxy.name` is that of a model.
      num_classes: number of logits.
      num_steps: of the run.
      steps_per_epoch: of the run.

    Raises:
      UserError: as for `create_model` and `create_optimizer`.
    """
    every, frozen = config.proxy.update_every, config.proxy.freeze
    model = {name: config.proxy[name] for name in ("name", *model_schema(config.proxy.name))}
    fields = optimizer_arguments(config, num_steps, steps_per_epoch)
    fields["freeze"] = config.proxy.freeze
    groups = fields.pop("groups", {}).items()
    groups = {
        name: group
        for name, group in groups
        if not all(covers(frozen, path) for path in group["params"])
    }
    for group in groups.values():
        group["num_updates"] = -(-group["num_updates"] // every)
    for one in (fields, *groups.values()):
        one["learning_rate"] = _every(one["learning_rate"], every)
    tx = create_optimizer(**fields, groups=groups)
    return create_model(num_classes=num_classes, **model), tx


def _every(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule by steps, for an optimizer that makes an update every `steps` steps."""
    return lambda count: schedule(count * steps)
