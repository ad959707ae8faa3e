"""The drawings of a report: SVG, once for light and once for dark pages."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from cnn.report.elements import picture
from cnn.runtime.plots import drawing
from cnn.scores import Calibration


@dataclasses.dataclass(frozen=True)
class _Theme:
    """The colours of a page."""

    ink: str
    faint: str
    series: tuple[str, ...]


# Okabe & Ito's palette, whose colours differ for every kind of colour vision. Each page has those
# with enough contrast to its ground; black and white change places.
_LIGHT = _Theme(
    "#24292f", "#b4bac2", ("#0072B2", "#D55E00", "#009E73", "#B0568C", "#24292f", "#9A6B00")
)
_DARK = _Theme(
    "#d5dae0", "#565d66", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#d5dae0", "#F0E442")
)
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "cnn", "font.size": 9}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Attributes:
      legend: its name.
      epochs: where it has values.
      values: `[S, E]`, a row for each run of it; the line is their mean.
    """

    legend: str
    epochs: Sequence[float]
    values: Sequence[Sequence[float]]


def is_fraction(metric: str) -> bool:
    """Whether a metric is shown in per cent."""
    return metric.endswith("accuracy")


def curve_panel(metric: str, curves: Sequence[Curve], alt: str, *, title: str = "") -> Element:
    """Curves against the epoch, with a band of one sample standard deviation over the runs."""

    def draw(figure: Any, theme: _Theme) -> None:
        axes = figure.subplots()
        scale = 100 if is_fraction(metric) else 1
        for index, curve in enumerate(curves):
            style = _style(index, theme)
            values = scale * np.array(curve.values, np.float64)
            mean = values.mean(axis=0)
            dense = {"marker": "none"} if len(mean) > 40 else {}
            axes.plot(curve.epochs, mean, **{**style, **dense}, label=curve.legend)
            if len(curve.values) > 1:
                std = values.std(axis=0, ddof=1)
                color = style["color"]
                axes.fill_between(
                    curve.epochs, mean - std, mean + std, color=color, alpha=0.22, linewidth=0
                )
        axes.set_title(title, loc="left", fontsize=10, parse_math=False, color=theme.ink)
        axes.set_xlabel("epoch")
        axes.set_ylabel(
            metric.replace("_", " ") + (" (%)" if scale == 100 else ""), parse_math=False
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.5, color=theme.faint, linewidth=0.6)
        legend = axes.legend(frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)

    return _twice(4.4, 3.1, draw, [metric, title, *(c.legend for c in curves)], alt)


def interval_panel(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]], alt: str, *, label: str
) -> Element:
    """Differences with their intervals, one below the other, and a line at zero.

    Args:
      rows: the name, the difference and its interval, as fractions.
      alt: describes the drawing.
      label: of the axis.
    """

    def draw(figure: Any, theme: _Theme) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=theme.ink, linewidth=0.8, linestyle=":")
        for place, (_, value, interval) in enumerate(rows):
            color = theme.series[0]
            if interval is not None:
                low, high = (100 * end for end in interval)
                axes.plot(
                    [low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt"
                )
            axes.plot([100 * value], [place], color=color, marker="o", markersize=6)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.5, color=theme.faint, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return _twice(5.4, 0.75 + 0.3 * len(rows), draw, [label, *(name for name, *_ in rows)], alt)


def reliability_panel(calibration: Calibration, alt: str) -> Element:
    """Accuracy against confidence in bins, above the number of images in each bin."""

    def draw(figure: Any, theme: _Theme) -> None:
        bins = len(calibration.counts)
        centres = 100 * (np.arange(bins) + 0.5) / bins
        known = calibration.counts > 0
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        accuracy = 100 * np.nan_to_num(calibration.accuracy)
        upper.bar(
            centres, accuracy, width=90 / bins, color=theme.series[0], alpha=0.75, label="accuracy"
        )
        upper.plot([0, 100], [0, 100], color=theme.ink, linestyle=":", label="perfectly calibrated")
        upper.plot(
            100 * calibration.confidence[known],
            accuracy[known],
            color=theme.series[1],
            marker="s",
            markersize=4,
            linestyle="none",
            clip_on=False,  # whole also at 0 and at 100 %
            label="at the mean confidence",
        )
        upper.set_ylabel("accuracy (%)")
        upper.set_ylim(0, 100)
        figure.legend(
            frameon=False,
            loc="outside upper left",
            ncols=3,
            fontsize=7.5,
            handlelength=1.4,
            columnspacing=1,
        )
        lower.bar(centres, calibration.counts, width=90 / bins, color=theme.ink, alpha=0.5)
        lower.set_ylabel("images")
        lower.set_xlabel("confidence (%)")
        lower.set_xlim(0, 100)

    return _twice(4.4, 3.9, draw, [], alt)


def _style(index: int, theme: _Theme) -> dict[str, Any]:
    """Colour, dashes and marker of a line; all three differ, for a print in grey."""
    return {
        "color": theme.series[index % len(theme.series)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def _twice(
    width: float,
    height: float,
    draw: Callable[[Any, _Theme], None],
    texts: Sequence[str],
    alt: str,
) -> Element:
    light, dark = (_svg(width, height, draw, theme, texts) for theme in (_LIGHT, _DARK))
    return picture(light, dark, alt)


def _svg(
    width: float,
    height: float,
    draw: Callable[[Any, _Theme], None],
    theme: _Theme,
    texts: Sequence[str],
) -> str:
    with drawing(width, height, texts, settings={**_SETTINGS, **_colours(theme)}) as figure:
        draw(figure, theme)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def _colours(theme: _Theme) -> Mapping[str, Any]:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(ink, theme.ink), "axes.spines.top": False, "axes.spines.right": False}
