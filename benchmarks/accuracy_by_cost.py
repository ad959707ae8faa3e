"""Draws test accuracy against seconds and against FLOPs: docs/speed.png.

    python -m benchmarks.accuracy_by_cost

It trains nothing: the figures are those that `benchmarks.speedrun`, `benchmarks.accelerator` and,
for configs that speedrun has not measured, `benchmarks.whole_runs` have kept, beside published ones
(`benchmarks/published.py`).
"""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from benchmarks.command_line import Parser
from benchmarks.flops import run_flop
from benchmarks.published import PUBLISHED
from benchmarks.report import Mean
from benchmarks.workers import REPOSITORY
from cnn import UserError, load_config
from cnn.config import check_config, to_json_dict
from cnn.runtime import cli

_MODULE = "benchmarks.accuracy_by_cost"
_SPEEDRUNS = REPOSITORY / "benchmarks" / "speedrun" / "results"
_ACCELERATORS = REPOSITORY / "benchmarks" / "accelerator" / "results"
_WHOLE_RUNS = REPOSITORY / "benchmarks" / "whole_runs" / "results" / "whole_runs.json"
_CIFAR10 = {
    "class_names": list(range(10)),
    "image_shape": (32, 32, 3),
    "train_count": 50_000,
    "test_count": 10_000,
}
_ACCURACIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 0.95, 0.96, 0.97)
# Okabe & Ito's palette, whose colours differ for every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0568C", "#9A6B00", "#24292f")
_INK, _FAINT = "#24292f", "#8a919a"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train, with what its runs reached and cost.

    Attributes:
      name: of the config, or of what was published.
      device: that the seconds are of.
      accuracy: the mean at the end, a fraction, with test-time augmentation if it has any.
      error: half of the 95 % interval of that mean; 0 if it is not known.
      seconds: of a run.
      pflop: of a run, 1e15 operations; None if it is not known.
      path: (seconds, PFLOP, test accuracy) after each epoch.
      is_ours: or published by others.
      is_whole: whether the seconds are those of whole processes, with start and compilation.
      is_accelerated: whether the device is a GPU or a TPU.
    """

    name: str
    device: str
    accuracy: float
    error: float
    seconds: float
    pflop: float | None
    path: list[tuple[float, float, float]]
    is_ours: bool
    is_whole: bool = False
    is_accelerated: bool = False


def speedrun_method(found: Mapping[str, Any]) -> Method:
    """From a record of `benchmarks.speedrun`: the steps and the last evaluation.

    The accuracy is that of all seeds, the seconds those of the fastest version of the code.
    """
    seeds, evaluation = found["seeds"], found["evaluation"]
    views = [seed["tta_accuracy"] for seed in seeds]
    accuracy = Mean.of(views if None not in views else [seed["accuracy"] for seed in seeds])
    flop = seeds[0]["training_flop"], seeds[0]["evaluation_flop"]
    num_epochs, name = seeds[0]["epochs"][-1][0], found["config"]
    path = REPOSITORY / "configs" / f"{name}.py"
    # Not the whole recipe; epochs of whole batches are not quite those of the config.
    if path.exists() and abs(load_config(path).num_epochs - num_epochs) > 0.1:
        name = f"{name} ({num_epochs:g} epochs)"
    by_commit: dict[str, list[Any]] = {}
    for seed in seeds:
        by_commit.setdefault(seed["commit"], []).append(seed["epochs"])
    versions = [np.mean(one, axis=0) for one in by_commit.values()]
    epochs = min(versions, key=lambda one: one[-1][1])
    seconds = float(epochs[-1][1]) + (evaluation["seconds"] if evaluation else 0.0)
    return Method(
        name=name,
        device=" / ".join(dict.fromkeys(seed["device"] for seed in seeds)),
        accuracy=accuracy.mean,
        error=_half(accuracy),
        seconds=seconds,
        pflop=sum(flop) / 1e15,
        path=[(float(one[1]), float(one[3]) / 1e15, float(one[2])) for one in epochs],
        is_ours=True,
    )


def whole_run_methods(found: Mapping[str, Any], skip: Sequence[str]) -> list[Method]:
    """From the record of `benchmarks.whole_runs`: whole processes, so with start and compilation.

    Args:
      found: the record.
      skip: names of configs to leave out.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in found["runs"]:
        by_name.setdefault(run["name"], []).append(run)
    about = found["machine"]
    methods = []
    for name, runs in by_name.items():
        path = REPOSITORY / "configs" / f"{name}.py"
        if name in skip or not path.exists():
            continue
        flop = run_flop(to_json_dict(check_config(load_config(path))), _CIFAR10)
        accuracy = Mean.of([run["epochs"][-1][2] for run in runs])
        epochs = [np.mean(one, axis=0) for one in zip(*(r["epochs"] for r in runs), strict=True)]
        end = float(epochs[-1][0])
        methods.append(
            Method(
                name=name,
                device=f"{about['cores']} x cpu ({about['cpu']}, {about['cores']} cores)",
                accuracy=accuracy.mean,
                error=_half(accuracy),
                seconds=float(np.mean([run["wall_seconds"] for run in runs])),
                pflop=flop.total / 1e15,
                path=[
                    (float(one[1]), flop.training * float(one[0]) / end / 1e15, float(one[2]))
                    for one in epochs
                ],
                is_ours=True,
                is_whole=True,
            )
        )
    return methods


def accelerator_method(found: Mapping[str, Any]) -> Method:
    """From a record of `benchmarks.accelerator`: its last precision, without compilation."""
    one = found["precisions"][-1]
    accuracy = Mean.of([run["accuracy"] for run in one["warm"]])
    return Method(
        name=found["config"],
        device=f"{found['num_devices']} x {found['device']}",
        accuracy=accuracy.mean,
        error=_half(accuracy),
        seconds=float(np.median([run["seconds"] for run in one["warm"]])),
        pflop=sum(one["flop"].values()) / 1e15,
        path=[],
        is_ours=True,
        is_accelerated=True,
    )


def published_methods() -> list[Method]:
    """Those of `benchmarks/published.py`."""
    return [
        Method(one.name, one.device, one.accuracy, 0.0, one.seconds, one.pflop, [], False)
        for one in PUBLISHED
    ]


def _half(mean: Mean) -> float:
    return 0.0 if mean.interval is None else (mean.interval[1] - mean.interval[0]) / 2


def draw(methods: Sequence[Method], path: Path) -> None:
    """Two panels with one axis of accuracy, in equal steps of the logarithm of the error."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ours = sorted((one for one in methods if one.is_ours), key=lambda one: one.accuracy)
    others = sorted((one for one in methods if not one.is_ours), key=lambda one: one.seconds)
    names = list(dict.fromkeys(one.name for one in ours))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    letters = {one.name: string.ascii_uppercase[i] for i, one in enumerate(others)}
    for axis, cost, unit in zip(axes, ("seconds", "pflop"), ("seconds", "PFLOP"), strict=True):
        _axes(axis, methods)
        _draw_others(axis, others, cost, letters)
        _draw_ours(axis, ours, cost, colours)
        axis.set_xlabel(f"{unit} of a run", color=_INK)
        axis.margins(x=0.2)
        _label_ours(axis, ours, cost, colours)
    axes[0].set_ylabel("test accuracy on CIFAR-10", color=_INK)
    marks = []
    for mark, is_accelerated in (("circles", False), ("squares", True)):
        found = [one.device for one in ours if one.is_accelerated == is_accelerated]
        if found:
            marks.append(f"{mark} on {', '.join(dict.fromkeys(found))}")
    title = f"The configs of this repository: {'; '.join(marks)}"
    if any(one.is_whole for one in ours):
        title += "\n*: whole processes, with start and compilation"
    figure.suptitle(title, color=_INK)
    handles = [
        Line2D([], [], linestyle="", marker=f"${letters[one.name]}$", color=_FAINT, markersize=7)
        for one in others
    ]
    names = [f"{one.name}: {one.seconds:,.3g} s on {one.device}" for one in others]
    title = "Diamonds: published means, with the time on their own device"
    figure.legend(
        handles, names, loc="outside lower center", ncols=4, title=title, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _axes(axis: Axes, methods: Sequence[Method]) -> None:
    """Scales, ticks and grid of a panel."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_yscale("function", functions=(_from_accuracy, _to_accuracy))
    low = min(min((one[2] for one in m.path), default=m.accuracy) for m in methods)
    ticks = [one for one in _ACCURACIES if one >= low - 0.1]
    axis.set_yticks(ticks, [f"{100 * one:.0f} %" for one in ticks])
    axis.set_ylim(max(low - 0.05, 0.1), 0.973)
    axis.grid(which="major", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", color=_FAINT, labelcolor=_INK)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_FAINT)


def _draw_others(
    axis: Axes, methods: Sequence[Method], cost: str, letters: Mapping[str, str]
) -> None:
    """Hollow diamonds, so that a point of ours shows within, and their letters."""
    shown = [method for method in methods if getattr(method, cost) is not None]
    before, is_above = None, False
    for method in sorted(shown, key=lambda one: (round(one.accuracy, 2), getattr(one, cost))):
        place = getattr(method, cost), method.accuracy
        is_close = before is not None and 1 <= place[0] / before < 1.5
        before, is_above = place[0], is_close and not is_above
        axis.plot(*place, "D", color="none", markeredgecolor=_FAINT, markersize=10)
        axis.annotate(
            letters[method.name],
            place,
            xytext=(0, 9 if is_above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if is_above else "top",
            fontsize=9,
            color=_FAINT,
        )


def _draw_ours(
    axis: Axes, methods: Sequence[Method], cost: str, colours: Mapping[str, str]
) -> None:
    """The means with their intervals, and the way to them."""
    for method in methods:
        colour, x = colours[method.name], getattr(method, cost)
        column = 0 if cost == "seconds" else 1
        points = [(one[column], one[2]) for one in method.path] + [(x, method.accuracy)]
        axis.plot(*zip(*points, strict=True), "-", color=colour, alpha=0.45, linewidth=1.5)
        mark = "s" if method.is_accelerated else "o"
        axis.errorbar(
            x, method.accuracy, yerr=method.error, fmt=mark, color=colour, markersize=7, capsize=3
        )


def _label_ours(
    axis: Axes, methods: Sequence[Method], cost: str, colours: Mapping[str, str]
) -> None:
    """Their names and accuracies; the limits of the axis are known."""
    named: set[str] = set()
    left, right = np.log(axis.get_xlim())
    for method in methods:
        colour, x = colours[method.name], getattr(method, cost)
        if cost == "pflop" and method.name in named:
            continue  # the same work on another device
        named.add(method.name)
        # Beside the published points there is room on the left only; below the others only for the
        # least accurate one.
        is_beside, up = method.accuracy > 0.9, method.name != methods[0].name
        if is_beside and any(
            getattr(other, cost) < x < 2 * getattr(other, cost)
            and abs(other.accuracy - method.accuracy) < 0.005
            for other in methods
            if other.name != method.name
        ):
            place, ha, va = (4, 10), "right", "bottom"  # above the label of its neighbour
        elif is_beside:
            place, ha, va = (-12, 0), "right", "center"
        elif np.log(x) > 0.3 * left + 0.7 * right:  # it would go beyond the right edge
            place, ha, va = (8, 13), "right", "bottom"
        else:
            place, ha, va = (0, 13 if up else -13), "center", "bottom" if up else "top"
        text = axis.annotate(
            f"{method.name}{'*' * method.is_whole}  {100 * method.accuracy:.2f} %",
            (x, method.accuracy),
            xytext=place,
            textcoords="offset points",
            ha=ha,
            va=va,
            fontsize=10,
            fontweight="bold",
            color=colour,
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _from_accuracy(accuracy: Any) -> Any:
    return -np.log10(np.clip(1 - np.asarray(accuracy, float), 1e-6, None))


def _to_accuracy(height: Any) -> Any:
    return 1 - 10.0 ** -np.asarray(height, float)


def main(argv: Sequence[str]) -> None:
    """Kept results -> the picture."""
    parser = Parser(_MODULE, __doc__, REPOSITORY / "docs")
    flags = parser.parse_args(argv)
    files = [file for file in _SPEEDRUNS.glob("speedrun_*.json") if "_steps" not in file.stem]
    methods = [speedrun_method(json.loads(file.read_text())) for file in sorted(files)]
    if _WHOLE_RUNS.exists():
        names = [method.name for method in methods]
        methods = whole_run_methods(json.loads(_WHOLE_RUNS.read_text()), names) + methods
    accelerated = sorted(_ACCELERATORS.glob("*.json"))
    methods += [accelerator_method(json.loads(file.read_text())) for file in accelerated]
    if not methods:
        raise UserError("there are no results yet; python -m benchmarks.speedrun makes some")
    methods.sort(key=lambda method: method.accuracy)
    draw([*methods, *published_methods()], flags.out / "speed.png")
    print(f"{flags.out / 'speed.png'}: {', '.join(method.name for method in methods)}")


if __name__ == "__main__":
    cli.run(main)
