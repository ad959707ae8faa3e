"""The figures of a group of runs, over seeds and for each point of a sweep, and its pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cnn.config import to_json_value
from cnn.group_texts import group_text, points_table
from cnn.members import Member
from cnn.runtime.plots import plot_curves
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, shown, waiting, warning_on_failure, width
from cnn.runtime.sweep_plots import plot_sweep, plot_sweep_curves
from cnn.statistics import spread

_CURVES, _SWEEP = "curves.png", "sweep.png"


def group_result(
    members: Sequence[Member], outcomes: Mapping[str, Mapping[str, Any]], wall_seconds: float
) -> dict[str, Any]:
    """What `result.json` of a group holds.

    Args:
      members: the runs, in order.
      outcomes: by name, what `result.json` of a run holds; or the `error` by which it diverged.
      wall_seconds: of the process that finished the group.
    """
    every = [{**about(one), **outcomes[one.name]} for one in members]
    finished = [one for one in every if "error" not in one]
    points = []
    for settings in _points(members):
        own = [one for one in every if one["settings"] == settings]
        results = [one for one in own if "error" not in one]
        points.append(
            {
                "settings": settings,
                "num_diverged": len(own) - len(results),
                "statistics": _statistics(results),
            }
        )
    digests = "\n".join(f"{one['name']} {one['digest']}" for one in finished)
    result = {
        "members": finished,
        "diverged": [one for one in every if "error" in one],
        "points": points,
        "digest": hashlib.sha256(digests.encode()).hexdigest(),
        "wall_seconds": wall_seconds,
    }
    if members[0].settings:
        result["num_points"] = len(points)
        known = [one for one in points if one["statistics"]]
        best = max(known, key=lambda one: one["statistics"]["test_accuracy"]["mean"], default=None)
        result["best"] = best
    return result


def about(member: Member) -> dict[str, Any]:
    """Name, seed and settings of a run, as JSON values."""
    fields = {"name": member.name, "seed": member.seed, "settings": member.settings}
    return to_json_value(fields)


def _points(members: Sequence[Member]) -> list[dict[str, Any]]:
    """The settings of a sweep, in order; one without any where there is none."""
    points: list[dict[str, Any]] = []
    for member in members:
        if (settings := about(member)["settings"]) not in points:
            points.append(settings)
    return points


def _statistics(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and interval of each figure that all results have."""
    if not results:
        return {}
    names = [
        name
        for name in results[0]
        if name.startswith(("test_", "train_", "best_test_", "tta_test_")) and name != "test_count"
    ]
    values = {name: [one[name] for one in results if name in one] for name in names}
    known = {name: own for name, own in values.items() if len(own) == len(results)}
    return to_json_value({name: dataclasses.asdict(spread(own)) for name, own in known.items()})


def present_group(
    run: RunDirectory,
    result: Mapping[str, Any],
    *,
    title: str,
    label_smoothing: float,
    is_new: bool,
) -> None:
    """Prints the result of a group, and draws its pictures.

    Args:
      run: the directory of the group.
      result: what its `result.json` holds.
      title: of the pictures.
      label_smoothing: of the training loss.
      is_new: whether a run was finished or added; else only pictures that are missing are drawn.
    """
    if "best" in result:
        log(points_table(result, width()))
    log(f"finished{'' if is_new else ' before'}: {group_text(result)}")
    log(f"digest: {result['digest']}")
    with waiting("drawing the pictures"):
        if is_new or not (run.path / _CURVES).exists():
            with warning_on_failure(f"{_CURVES} cannot be drawn"):
                _draw_curves(run, result, title, label_smoothing)
        if "best" in result and (is_new or not (run.path / _SWEEP).exists()):
            with warning_on_failure(f"{_SWEEP} cannot be drawn"):
                plot_sweep(result["points"], run.path / _SWEEP, title=title)
    names = ("result.json", _CURVES, _SWEEP, "members/")
    log(f"see {shown(run.path)}: {', '.join(n for n in names if (run.path / n).exists())}")


def _draw_curves(
    run: RunDirectory,
    result: Mapping[str, Any],
    title: str,
    label_smoothing: float,
) -> None:
    points: list[tuple[dict[str, Any], list[list[dict[str, Any]]]]] = [
        (point["settings"], []) for point in result["points"]
    ]
    for one in (*result["members"], *result["diverged"]):
        records = RunDirectory(run.members_folder / one["name"]).records()
        next(own for settings, own in points if settings == one["settings"]).append(records)
    path = run.path / _CURVES
    if "best" in result:
        plot_sweep_curves(points, path, title=title)
    else:
        plot_curves(points[0][1], path, title=title, label_smoothing=label_smoothing)
