"""Settings of a run that have no effect, or less effect than their names promise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cnn.experiment import Experiment


def notes(plan: Experiment) -> list[str]:
    """What a person should know about a run before it begins, a line each."""
    config, optimizer, schedule = plan.config, plan.config.optimizer, plan.config.schedule
    lines = []
    accumulate, num_steps = optimizer.grad_accumulation_steps, plan.num_steps
    if rest := num_steps % accumulate:
        lines.append(
            f"steps at the end without effect: {rest:,} of {num_steps:,}, which do not fill "
            f"optimizer.grad_accumulation_steps={accumulate}"
        )
    if schedule.warmup_epochs and not plan.warmup_updates:
        lines.append(
            f"schedule.warmup_epochs={schedule.warmup_epochs} has no effect: it is less than one "
            f"update"
        )
    if plan.warmup_updates >= plan.num_updates and schedule.name != "constant":
        lines.append(
            f"schedule.name={schedule.name} has no effect: schedule.warmup_epochs="
            f"{schedule.warmup_epochs} takes the whole run"
        )
    if config.checkpoint_every_steps >= num_steps:
        lines.append(
            f"checkpoint_every_steps={config.checkpoint_every_steps} has no effect: the run has "
            f"{num_steps:,} steps"
        )
    return lines


# A field -> what it belongs to, and whether a config uses that.
_BELONGS_TO = {
    "optimizer.momentum": ("optimizer.name=sgd", lambda c: c["optimizer.name"] == "sgd"),
    "schedule.final_lr_fraction": (
        "schedule.name=cosine and linear",
        lambda c: c["schedule.name"] != "constant",
    ),
    "model.patch_features": ("a positive model.patch_size", lambda c: c["model.patch_size"] > 0),
}


def without_effect(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Notes on those of some fields that a config does not use, a line each.

    Args:
      config: flat, as `flatten` returns it.
      names: of fields that a person set.

    >>> without_effect({"optimizer.name": "adam"}, ["seed", "optimizer.momentum"])
    ['optimizer.momentum has no effect: it belongs to optimizer.name=sgd']
    """
    return [
        f"{name} has no effect: it belongs to {_BELONGS_TO[name][0]}"
        for name in names
        if name in _BELONGS_TO and not _BELONGS_TO[name][1](config)
    ]
