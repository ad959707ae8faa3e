"""Tables and a plot of the samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.peers.contenders.problem import FLOP
from benchmarks.peers.lineup import MATMUL
from benchmarks.peers.rotation import Series
from benchmarks.report import Spread, table

_ROW_HEAD = ("network", "phase", "batch", "dtype")
_PEERS = ("textbook", "keras", "pytorch")
_BAR_COLORS = {"ours": "#1b7837", "textbook": "#c51b7d", "keras": "#d6604d", "pytorch": "#f4a582"}


class Row(NamedTuple):
    """One comparison: a network, a phase, a batch size and a dtype."""

    network: str
    phase: str
    batch_size: int
    dtype: str

    def text(self) -> str:
        """For a heading."""
        return f"{self.network}, {self.phase}, batch {self.batch_size}, {self.dtype}"

    def cells(self) -> list[str]:
        """For a table."""
        return [self.network, self.phase, str(self.batch_size), self.dtype]


def rows(series: Sequence[Series]) -> dict[Row, list[Series]]:
    """The series by row, in order of appearance."""
    found: dict[Row, list[Series]] = {}
    for one in series:
        found.setdefault(Row(one.network, one.phase, one.batch_size, one.dtype), []).append(one)
    return found


def best(series: Sequence[Series], group: str) -> Series | None:
    """The variant of a group with the highest median, if the group took part."""
    members = [one for one in series if one.group == group]
    return max(members, key=lambda one: statistics.median(one.rates), default=None)


def ratio(mine: Series, other: Series) -> Spread:
    """How many times faster: the ratio of medians, and the extremes of single rounds."""
    by_round = [a / b for a, b in zip(mine.rates, other.rates, strict=True)]
    medians = statistics.median(mine.rates) / statistics.median(other.rates)
    return Spread(medians, min(by_round), max(by_round))


def matmul_share(one: Series, yardstick: Series) -> float:
    """Fraction of the matrix product's rate, counting the arithmetic of direct convolutions."""
    flop = FLOP[one.network, one.phase]
    return statistics.median(one.rates) * flop / 1e9 / statistics.median(yardstick.rates)


def comparison(series: Sequence[Series]) -> str:
    """A Markdown table with a line for each `Row`; the best variant of each peer.

    The last column compares our bfloat16 with our float32, if both were run.
    """
    head = [*_ROW_HEAD, "ours, images/s", "matmul, GFLOP/s", "ours / matmul"]
    cells, by_row = [], rows(series)
    for row, members in by_row.items():
        ours, yardstick = best(members, "ours"), best(members, MATMUL)
        share = matmul_share(ours, yardstick) if ours and yardstick else None
        others = [best(members, peer) for peer in _PEERS]
        in_float32 = row._replace(dtype="float32")
        others.append(best(by_row.get(in_float32, []), "ours") if row != in_float32 else None)
        cells.append(
            [
                *row.cells(),
                Spread.of(ours.rates).text() if ours else "-",
                Spread.of(yardstick.rates).text() if yardstick else "-",
                "-" if share is None else f"{share:.0%}",
                *(_ratio_cell(ours, other) if ours and other else "-" for other in others),
            ]
        )
    return table([*head, *(f"ours / {peer}" for peer in _PEERS), "ours / ours float32"], cells)


def _ratio_cell(ours: Series, other: Series) -> str:
    variant = other.contender.removeprefix(other.group).lstrip("-")
    return ratio(ours, other).text(2) + (f" {variant}" if variant else "")


def all_variants(series: Sequence[Series]) -> str:
    """A Markdown table with a row for each variant."""
    head = [*_ROW_HEAD, "contender", "median (lowest to highest)"]
    cells = []
    for row, members in rows(series).items():
        yardstick = best(members, MATMUL)
        for one in members:
            is_yardstick = one.group == MATMUL
            share = matmul_share(one, yardstick) if yardstick and not is_yardstick else None
            cells.append(
                [
                    *(*row.cells(), one.contender),
                    f"{Spread.of(one.rates).text()} {one.unit}",
                    "-" if share is None else f"{share:.0%}",
                    f"{one.peak_mib:,.0f}",
                ]
            )
    return table([*head, "of matmul", "peak MiB"], cells)


def plot(series: Sequence[Series], path: Path) -> None:
    """A panel per row, a bar per variant: the median, with the extremes as error bars."""
    panels = rows([one for one in series if one.group != MATMUL])
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.8 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flat
    for axis, (row, members) in zip(axes, panels.items(), strict=False):
        spreads = [Spread.of(one.rates) for one in members]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        axis.barh(
            [one.contender for one in members],
            [spread.median for spread in spreads],
            xerr=[below, above],
            color=[_BAR_COLORS.get(one.group, "gray") for one in members],
        )
        axis.invert_yaxis()
        axis.set_title(row.text())
        axis.set_xlabel("images/s")
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
