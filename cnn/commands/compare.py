"""Compares two configs: how their test accuracies differ, and how sure that is.

    python -m cnn compare checkpoints/a checkpoints/b
    python -m cnn compare runs/sweep/members/optimizer.learning_rate=0.001 runs/b --difference 0.2

A and B are each a run, a group of runs with several seeds (only its finished members count), or one
point of a sweep: the path of its members without `,seed=N`. Other seeds would give another
difference: that is what the interval over seeds says, and it needs two runs of each or more. Other
test images would, too: that is what the figures on the same images say, of the runs whose
predictions are stored (`python -m cnn evaluate RUN`).

The last line says how many seeds of each would show a true difference of --difference. It is as
rough as the standard deviation that it rests on: in 95 of 100 cases that of 5 seeds is 0.35 to 1.67
times the true one. `python -m cnn report` draws the same comparison, of any number of configs.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from cnn.commands.common import print_json
from cnn.errors import UserError, number_of
from cnn.report.comparison import Comparison, Group, Pair, as_groups, compare, group_runs
from cnn.report.comparison_page import difference_figures, group_figures
from cnn.report.runs import Run, check_distinct, point_of, read_runs
from cnn.report.texts import interval_text, p_text, points, spread_text, value_text
from cnn.runtime.screen import log, log_warning, shown
from cnn.runtime.table import epoch_number, percent
from cnn.statistics import LEVEL, POWER, detectable_difference, pooled_std, seeds_needed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("a", metavar="A", help="a run, a group of runs, or a point of a sweep")
    add("b", metavar="B", help="likewise; differences are B minus A")
    add(
        "--difference",
        type=float,
        default=0.1,
        metavar="POINTS",
        help="in percentage points, for the number of seeds that would show it (default: 0.1)",
    )
    add("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Reads the runs and prints how they differ."""
    if not 0 < arguments.difference <= 100:
        raise UserError(
            f"--difference={arguments.difference} must be more than 0, and at most 100 percentage "
            f"points"
        )
    sides = [_read(side) for side in (arguments.a, arguments.b)]
    check_distinct([run.path for side in sides for run in side])
    first, second = as_groups(*sides)
    found, power = compare(first, second), _power(first, second, arguments.difference / 100)
    if arguments.json:
        print_json(
            {
                "groups": [group_figures(group) for group in (first, second)],
                "comparison": difference_figures(found),
                "power": power,
            }
        )
        return
    log("\n".join(_text(found, power, [arguments.a, arguments.b])))


def _read(side: str) -> list[Run]:
    """The runs of a side, which are of one setting."""
    runs = read_runs([side])
    if (number := len(group_runs(runs))) > 1:
        choices = dict.fromkeys(shown(point_of(run.path)) for run in runs)
        raise UserError(
            f"{side} holds runs of {number} settings, and a side of a comparison is of one; "
            f"choose one of {', '.join(choices)}"
        )
    for run in runs:
        if run.status != "finished":
            log_warning(
                f"{shown(run.path)} is not finished: its accuracy is that after epoch "
                f"{epoch_number(run.last['epoch'])} of {epoch_number(run.num_epochs)}"
            )
    return runs


def _power(first: Group, second: Group, difference: float) -> dict[str, Any] | None:
    """What samples of other sizes would show; None if the spread over seeds is not known."""
    std = pooled_std(first.accuracy, second.accuracy)
    if not std:
        return None
    count = min(len(first.runs), len(second.runs))
    return {
        "std_test_accuracy": std,
        "power": POWER,
        "level": LEVEL,
        "difference": difference,
        "seeds_needed": seeds_needed(std, difference),
        "count": count,
        "detectable_difference": detectable_difference(std, count) if count > 1 else None,
    }


def _text(found: Comparison, power: dict[str, Any] | None, sides: Sequence[str]) -> list[str]:
    groups = found.first, found.second
    lines = [_group_text(group, side) for group, side in zip(groups, sides, strict=True)]
    names = dict.fromkeys(name for group in groups for name in group.settings)
    lines.append("config fields that differ:" if names else "the configs are the same")
    for name in names:
        values = [value_text(group.settings.get(name, "unset")) for group in groups]
        lines.append(f"  {name}: A {values[0]}, B {values[1]}")
    if found.means is None:
        return [*lines, "not compared: A and B were tested on different images"]
    return [*lines, *_seeds_text(found), *_images_text(found), *_power_text(power)]


def _group_text(group: Group, side: str) -> str:
    accuracy = group.accuracy
    text = f"{group.letter}: test accuracy {spread_text(accuracy)} (n = {accuracy.count}"
    if accuracy.interval:
        low, high = accuracy.interval
        text += f", 95 % interval {100 * low:.2f} to {percent(high)}"
    return f"{text}) of {side}"


def _seeds_text(found: Comparison) -> list[str]:
    assert found.means is not None
    text = f"over seeds: B - A = {points(found.means.difference)} percentage points"
    if found.means.interval is None or found.means.p_value is None:
        single = [g.letter for g in (found.first, found.second) if len(g.runs) == 1]
        return [
            f"{text}, and no interval: one run of {' and of '.join(single)} does not show how "
            f"seeds vary, and another seed may turn the sign; --config.num_seeds=5 trains five"
        ]
    low, high = found.means.interval
    if low == high:
        return [f"{text}, and no interval: the runs of each have the very same accuracy"]
    return [
        f"{text}, 95 % interval {interval_text((low, high))}, {_p(found.means.p_value)} "
        f"(Welch's t test)"
    ]


def _images_text(found: Comparison) -> list[str]:
    lines = []
    if found.images is not None:
        lines.append(
            f"on the same {found.images.count:,} images: B - A = "
            f"{points(found.images.difference)} percentage points, 95 % interval "
            f"{interval_text(found.images.interval)} (these trained models, other images)"
        )
        lines += [f"  {_pair_text(pair)}" for pair in found.pairs]
    runs = [*found.first.runs, *found.second.runs]
    if missing := [run for run in runs if run.current_evaluation is None]:
        paths = shlex.join(shown(run.path) for run in missing)
        command = f"python -m cnn evaluate {paths}"
        if len(missing) > 1:
            command = f'for run in {paths}; do python -m cnn evaluate "$run"; done'
        lines.append(
            f"no predictions of {number_of(len(missing), 'run')} to compare image by image; this "
            f"stores them:\n  {command}"
        )
    elif found.images is None:
        lines.append("no comparison image by image: the predictions are of different images")
    return lines


def _pair_text(pair: Pair) -> str:
    a, b = pair.first.config["seed"], pair.second.config["seed"]
    seeds = f"seed {a}" if a == b else f"seeds {a} and {b}"
    difference, disagreement = pair.difference, pair.disagreement
    return (
        f"{seeds}: {points(difference.difference)}, {interval_text(difference.interval)}; only A "
        f"right {disagreement.only_first:,}, only B right {disagreement.only_second:,}, McNemar's "
        f"{_p(disagreement.p_value)}"
    )


def _p(value: float) -> str:
    text = p_text(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _power_text(power: dict[str, Any] | None) -> list[str]:
    if power is None:
        return [
            "how many seeds would show a difference is not known: no spread over seeds was seen"
        ]
    text = (
        f"with this spread (std {100 * power['std_test_accuracy']:.2f}), "
        f"{power['seeds_needed']:,} seeds of each show a difference of "
        f"{100 * power['difference']:g} percentage points"
    )
    if power["detectable_difference"] is not None:
        least = 100 * power["detectable_difference"]
        text += f", and the {power['count']} of each that there are show one of {least:.2f}"
    return [f"{text} (power {100 * POWER:.0f} %, two-sided {100 * (1 - LEVEL):.0f} %)"]
