"""Pictures of a sweep: runs of one config with other values of some fields."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnn.runtime.plots import LEGEND_ABOVE, TEST, TRAIN, plot_mean, saved_figure
from cnn.runtime.table import percent, shortened, value_text

_WIDTH, _HEIGHT = 5.6, 3.8  # inches, without the legend of the lines
_MARGINS = 0.9  # of the width, beside the axes
# Inches of a tick's label: the width of a character, and the height of a line if it is oblique.
_CHARACTER, _LINE = 0.09, 0.22
_MOST_CHARACTERS = 24  # of a value
_MOST_ENTRIES = 8  # of the legend of the lines
_MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_sweep(
    points: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str
) -> None:
    """Plots the test accuracy of a sweep against a field, with the intervals of the means.

    The field with the most values is the axis, and each combination of the others is a line. Where
    the numbers of the axis span a factor of ten, it is logarithmic, with 0 a decade below the
    smallest. Values that are no numbers are spaced evenly, and their points are not joined. The
    highest mean is marked. Where all members diverged there is a cross at the bottom.

    Args:
      points: one or more with the same fields, each with its `settings` and with `statistics`,
        where the `test_accuracy` has `count`, `mean` and `interval` (None for one seed) and is
        missing if all members diverged.
      path: the PNG file.
      title: shown above.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    field = _axis_field([point["settings"] for point in points])
    values = {_key(point["settings"][field]): point["settings"][field] for point in points}
    places = dict(zip(values, _places(list(values.values())), strict=True))
    is_numeric = all(map(_is_number, values.values()))
    lines: dict[str, list[tuple[float, Mapping[str, Any] | None]]] = {}
    others: dict[str, Mapping[str, Any]] = {}
    for point in points:
        rest = {name: value for name, value in point["settings"].items() if name != field}
        others[_key(rest)] = rest
        lines.setdefault(_key(rest), []).append(
            (places[_key(point["settings"][field])], point["statistics"].get("test_accuracy"))
        )
    labels = [_label(value) for value in values.values()]
    legend = _Legend(list(others.values()))
    width = max(_WIDTH, _MARGINS + _LINE * len(values))
    texts = [title, field, *labels, *legend.texts]
    # Labels that are oblique need height.
    height = _HEIGHT + 0.6 * _CHARACTER * max(0, max(map(len, labels)) - 8)
    with saved_figure(width + legend.width, height, path, texts) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        axes = figure.subplots()
        step = _step(list(places.values()), len(lines), is_numeric)
        drawn, spots = [], []
        for index, line in enumerate(lines.values()):
            shift = (index - (len(lines) - 1) / 2) * step
            line = [(place + shift, spread) for place, spread in sorted(line, key=lambda p: p[0])]
            style = _style(index, len(lines)) | ({} if is_numeric else {"linestyle": "none"})
            drawn.append(_draw_line(axes, line, style))
            spots += [(*spot, legend.names[index]) for spot in line]
        _draw_marks(axes, spots)
        _set_ticks(axes, list(places.values()), labels, width - _MARGINS)
        axes.set_xlabel(field, parse_math=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        legend.draw(figure, drawn)


def plot_sweep_curves(
    points: Sequence[tuple[Mapping[str, Any], Sequence[Sequence[Mapping[str, Any]]]]],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Plots the test accuracy of each point of a sweep against the epoch.

    A line is the mean over the seeds that reached the epoch, in a band of one sample standard
    deviation to both sides.

    Args:
      points: the settings of each, with the same fields, and the records of its members.
      path: the PNG file.
      title: shown above.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    legend = _Legend([settings for settings, _ in points])
    with saved_figure(_WIDTH + legend.width, _HEIGHT, path, [title, *legend.texts]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        axes = figure.subplots()
        for index, (_, members) in enumerate(points):
            style = _style(index, len(points))
            plot_mean(axes, members, "test_accuracy", style, scale=100)
        if (most := max(len(members) for _, members in points)) > 1:
            axes.set_title(f"mean ± std of {most} seeds", fontsize=8, loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylabel("test accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        legend.draw(figure, axes.get_lines())


class _Legend:
    """The legend of lines that differ in settings, beside the axes.

    Of many lines it names some, evenly spaced.

    Args:
      settings: of each line, with the same fields. Without fields there is no legend.

    Attributes:
      names: of the lines.
      texts: all that it may show.
      width: that it needs, in inches.
    """

    def __init__(self, settings: Sequence[Mapping[str, Any]]) -> None:
        number = len(settings)
        self._shown = np.linspace(0, number - 1, min(number, _MOST_ENTRIES)).round().astype(int)
        self.names = [
            shortened(", ".join(map(value_text, each.values())), _MOST_CHARACTERS)
            for each in settings
        ]
        self._heading = list(settings[0])
        if number > len(self._shown):
            self._heading.append(f"({len(self._shown)} of {number})")
        self.texts = [*self._heading, *self.names] if settings[0] else []
        self.width = 0.4 + _CHARACTER * max(map(len, self.texts)) if self.texts else 0.0

    def draw(self, figure: Any, lines: Sequence[Any]) -> None:
        """Adds it to a figure with these lines."""
        if not self.texts:
            return
        legend = figure.legend(
            [lines[index] for index in self._shown],
            [self.names[index] for index in self._shown],
            title="\n".join(self._heading),
            loc="outside right upper",
            frameon=False,
            fontsize=9,
            title_fontsize=9,
            alignment="left",
        )
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)


def _key(value: Any) -> str:
    return json.dumps(value)


def _label(value: Any) -> str:
    """Of a tick."""
    text = f"{value:.4g}" if isinstance(value, float) else value_text(value)
    return shortened(text, _MOST_CHARACTERS)


def _axis_field(settings: Sequence[Mapping[str, Any]]) -> str:
    """The field with the most values, the first of them."""
    return max(settings[0], key=lambda name: len({_key(each[name]) for each in settings}))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _places(values: Sequence[Any]) -> list[float]:
    """Where different values are on an axis that is linear."""
    if not all(map(_is_number, values)):
        return [float(index) for index in range(len(values))]
    positive = [value for value in values if value > 0]
    if min(values) < 0 or not positive or max(positive) < 10 * min(positive):
        return list(values)
    zero = math.log10(min(positive)) - 1
    return [math.log10(value) if value else zero for value in values]


def _step(places: Sequence[float], number: int, is_numeric: bool) -> float:
    """By how much lines are moved sideways, so that their intervals do not cover each other."""
    gaps = np.diff(sorted(places))
    if not gaps.size:
        return 0.1
    widest = 0.5 * float(gaps.min()) / number
    return min(widest, 0.015 * float(gaps.sum())) if is_numeric else widest


def _style(index: int, number: int) -> dict[str, Any]:
    """Of a line; the colours go from dark to light, for a print in grey too."""
    from matplotlib import colormaps

    color = colormaps["viridis"](0.85 * index / (number - 1)) if number > 1 else TRAIN["color"]
    marker = _MARKERS[index % len(_MARKERS)]
    return {"color": color, "marker": marker, "linestyle": "-", "markersize": 4, "linewidth": 1.5}


def _draw_line(
    axes: Any, line: Sequence[tuple[float, Mapping[str, Any] | None]], style: Mapping[str, Any]
) -> Any:
    """Draws the means of spreads at their places, and their intervals; returns the line."""
    x, unknown = [place for place, _ in line], {"mean": math.nan, "interval": None}
    spreads = [spread or unknown for _, spread in line]
    means = np.array([spread["mean"] for spread in spreads])
    ends = np.array([spread["interval"] or (math.nan, math.nan) for spread in spreads])
    low, high = 100 * ends.T
    bars = {"fmt": "none", "color": style["color"], "capsize": 3, "elinewidth": 1}
    if not np.isnan(low).all():
        axes.errorbar(x, (low + high) / 2, (high - low) / 2, **bars)
    return axes.plot(x, 100 * means, **style, clip_on=False)[0]


def _draw_marks(axes: Any, spots: Sequence[tuple[float, Mapping[str, Any] | None, str]]) -> None:
    """Marks the best spot and those where all diverged, and says above the axes what is shown.

    Args:
      axes: of matplotlib, with the means and their intervals.
      spots: place, spread and the name of its line.
    """
    axes.set_ylabel("test accuracy (%)")
    axes.ticklabel_format(axis="y", useOffset=False)
    known = [(place, spread, name) for place, spread, name in spots if spread is not None]
    diverged = [place for place, spread, _ in spots if spread is None]
    low, high = axes.get_ylim() if known else (0.0, 100.0)
    low, high = max(low, 0.0), min(high, 100.0)
    handles = []
    if known:
        counts = sorted({spread["count"] for _, spread, _ in known})
        grey = {"color": "0.4", "fmt": "o", "markersize": 4}
        what, size = "one seed each", None
        if counts[-1] > 1:
            number = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
            what, size = f"mean of {number} seeds, 95 % interval", 1
        handles.append(axes.errorbar(math.nan, math.nan, size, label=what, capsize=3, **grey))
        place, best, name = max(known, key=lambda spot: spot[1]["mean"])
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6}
        label = f"best: {percent(best['mean'])}" + (f" ({name})" if name else "")
        style = {**ring, "color": TEST["color"], "linestyle": "none", "clip_on": False}
        handles += axes.plot(place, 100 * best["mean"], **style, label=label)
    if diverged:
        low -= 0.1 * (high - low)  # room for the crosses
        style = {"color": "0.2", "marker": "x", "markersize": 7, "linestyle": "none"}
        heights = [low + 0.04 * (high - low)] * len(diverged)
        handles += axes.plot(diverged, heights, **style, label="all diverged")
    axes.set_ylim(low, high)
    legend = axes.legend(**LEGEND_ABOVE, handles=handles, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _set_ticks(axes: Any, places: Sequence[float], labels: Sequence[str], width: float) -> None:
    """Labels the values, obliquely where they are close, and leaves out labels that cover others.

    Args:
      axes: of matplotlib.
      places: of the values.
      labels: of the same.
      width: of the axis, in inches.
    """
    ordered = sorted(zip(places, labels, strict=True))
    inch = (ordered[-1][0] - ordered[0][0]) / width or 1.0
    size = _CHARACTER * (1 + max(map(len, labels)))
    is_oblique = any(b[0] - a[0] < size * inch for a, b in itertools.pairwise(ordered))
    apart, last = (_LINE if is_oblique else size) * inch, -math.inf
    texts = []
    for place, label in ordered:
        is_free = place - last >= apart
        texts.append(label if is_free else "")
        last = place if is_free else last
    style = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_oblique else {}
    axes.set_xticks([place for place, _ in ordered], texts, parse_math=False, **style)
    if len(places) == 1:
        axes.set_xlim(places[0] - 1, places[0] + 1)
