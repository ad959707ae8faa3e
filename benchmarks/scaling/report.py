"""Markdown tables of a sweep, and a plot with a panel per axis."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks import report
from benchmarks.report import Spread
from benchmarks.scaling.sweep import Axis, Point, Visit

_TIME_COLOR, _MEMORY_COLOR, _WORK_COLOR = "#1b7837", "#762a83", "0.6"
# A panel spans at least this factor of time, so that noise does not look like a bend.
_LEAST_SPAN = 8.0
_COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """All visits to a point of an axis.

    Attributes:
      value: of the property that the axis varies.
      point: at this value.
      visits: one per round; at least one.
    """

    value: int
    point: Point
    visits: Sequence[Visit]

    @property
    def rate(self) -> Spread:
        """Images per second."""
        return Spread.of([visit.images_per_second for visit in self.visits])

    @property
    def microseconds(self) -> Spread:
        """Per image."""
        return Spread.of([1e6 / visit.images_per_second for visit in self.visits])

    @property
    def peak_mib(self) -> Spread:
        """Peak resident memory of the process."""
        return Spread.of([visit.peak_mib for visit in self.visits])

    @property
    def gflops(self) -> float:
        """Multiplications and additions of direct convolutions, in GFLOP/s."""
        return self.rate.median * self.point.flop / 1e9

    def split(self) -> str:
        """How the batch is split: shards x microbatches x images."""
        shards, microbatches = self.visits[-1].num_shards, self.visits[-1].num_microbatches
        return f"{shards} x {microbatches} x {self.point.batch_size // (shards * microbatches)}"


def make_rows(
    axes: Mapping[str, Axis], visits: Mapping[Point, Sequence[Visit]]
) -> dict[str, list[Row]]:
    """The rows of each axis whose points have been visited."""
    return {
        name: [
            Row(value, point, visits[point])
            for value, point in axis.points.items()
            if visits.get(point)
        ]
        for name, axis in axes.items()
    }


def start_mib(rows: Mapping[str, Sequence[Row]]) -> float:
    """Median peak memory of the processes before their first array."""
    return statistics.median(
        visit.start_mib for same in rows.values() for row in same for visit in row.visits
    )


def table(name: str, axis: Axis, rows: Sequence[Row]) -> str:
    """A Markdown table of an axis, under a heading."""
    head = [name, "images/s", "us per image", "x row before", "ms per step", "GFLOP/s", "split"]
    head.append("peak MiB")
    once = any(row.point.num_images for row in rows)
    if once:
        head += ["ms to place", "ms to order"]
    rows_of_cells = []
    before: Row | None = None
    for row in rows:
        microseconds = row.microseconds.median
        cells = [f"{row.value:,}", row.rate.text(), row.microseconds.text(1)]
        cells.append(f"{microseconds / before.microseconds.median:.2f}" if before else "-")
        cells.append(f"{microseconds * row.point.batch_size / 1e3:,.1f}")
        cells += [f"{row.gflops:,.0f}", row.split(), row.peak_mib.text()]
        if once:
            cells.append(Spread.of([visit.place_ms for visit in row.visits]).text(1))
            cells.append(Spread.of([visit.order_ms for visit in row.visits]).text(1))
        rows_of_cells.append(cells)
        before = row
    return f"### {name}: {axis.title}\n\n{report.table(head, rows_of_cells)}"


def plot(axes: Mapping[str, Axis], rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel per axis: time per image, measured and at constant FLOP/s, and peak memory."""
    shown = {name: same for name, same in rows.items() if same}
    cells = len(shown) + 1  # the last is for the legend
    columns = min(_COLUMNS, cells)
    height = -(-cells // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * height), layout="constrained")
    panels = list(
        figure.subplots(height, columns, squeeze=False, gridspec_kw={"wspace": 0.05}).flat
    )
    most = max(row.peak_mib.high for same in shown.values() for row in same)
    handles: dict[str, Any] = {}
    for panel, (name, same) in zip(panels, shown.items(), strict=False):
        memory = panel.twinx()
        handles |= _draw_time(panel, same)
        handles |= _draw_memory(memory, same, start_mib(rows), most)
        panel.set_zorder(memory.get_zorder() + 1)  # time before memory
        panel.patch.set_visible(False)
        panel.set_title(name)
        panel.set_xlabel(axes[name].title)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    panels[len(shown)].legend(handles.values(), handles.keys(), loc="center", frameon=False)
    figure.savefig(path, dpi=120)


def _draw_time(panel: Axes, rows: Sequence[Row]) -> dict[str, Any]:
    values = [row.value for row in rows]
    times = [row.microseconds for row in rows]
    medians = [time.median for time in times]
    # Through the point of highest speed: the gap above this line is lost speed.
    fastest = max(row.gflops for row in rows)
    work = [row.point.flop / 1e3 / fastest for row in rows]
    work_line = panel.plot(values, work, color=_WORK_COLOR, linestyle="--")[0]
    time_line = panel.errorbar(
        values,
        medians,
        yerr=[
            [time.median - time.low for time in times],
            [time.high - time.median for time in times],
        ],
        color=_TIME_COLOR,
        marker="o",
        markersize=4,
        capsize=3,
    )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [_short(value) for value in values], fontsize="small")
    panel.xaxis.set_minor_locator(NullLocator())
    low, high = min(work + medians), max(work + medians)
    margin = max(1.25, (_LEAST_SPAN * low / high) ** 0.5)
    panel.set_ylim(low / margin, high * margin)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("us per image", color=_TIME_COLOR)
    panel.grid(axis="y", color="black", alpha=0.1)
    return {
        "time per image, lowest to highest round": time_line,
        "at the FLOP/s of the fastest point": work_line,
    }


def _short(value: int) -> str:
    """Short, for an axis with many values."""
    return f"{value // 1000}k" if value % 1000 == 0 else str(value)


def _draw_memory(panel: Axes, rows: Sequence[Row], before: float, most: float) -> dict[str, Any]:
    values = [row.value for row in rows]
    line = panel.plot(
        values,
        [row.peak_mib.median for row in rows],
        color=_MEMORY_COLOR,
        marker="s",
        markersize=3,
        linewidth=1,
    )[0]
    start = panel.axhline(before, color=_MEMORY_COLOR, linestyle=":", linewidth=1)
    panel.set_ylim(0, 1.05 * most)  # the same in all panels
    panel.set_ylabel("peak MiB", color=_MEMORY_COLOR)
    return {"peak memory": line, "before the first array": start}
