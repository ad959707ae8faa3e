"""Samples as medians with their spread, Markdown tables, and the files of a result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cnn.statistics


class Mean(NamedTuple):
    """Mean of some samples, how they vary, and how sure the mean is.

    Attributes:
      n: number of samples.
      mean: of the samples.
      std: sample standard deviation (n - 1); None of one sample.
      interval: 95 % confidence interval of the mean, by Student's t; None of one sample.
    """

    n: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Mean:
        """Of at least one sample.

        >>> found = Mean.of([1.0, 2.0, 3.0])
        >>> found.n, found.mean, found.std, [round(end, 3) for end in found.interval]
        (3, 2.0, 1.0, [-0.484, 4.484])
        """
        found = cnn.statistics.spread(samples)
        return cls(found.count, found.mean, found.std, found.interval)

    def cells(self, digits: int, scale: float = 1.0, unit: str = "") -> list[str]:
        """Of a Markdown table: n, mean, standard deviation, interval.

        >>> Mean.of([0.94, 0.95]).cells(2, 100, " %")
        ['2', '94.50 %', '0.71', '88.15 to 100.85']
        """
        low, high = self.interval or (None, None)
        std, low, high = (
            "-" if value is None else f"{scale * value:,.{digits}f}"
            for value in (self.std, low, high)
        )
        ends = "-" if self.interval is None else f"{low} to {high}"
        return [f"{self.n}", f"{scale * self.mean:,.{digits}f}{unit}", std, ends]


class Spread(NamedTuple):
    """Median and extremes of some samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(samples), min(samples), max(samples))

    def text(self, digits: int = 0) -> str:
        """Median, and the extremes in parentheses."""
        median, low, high = (f"{value:,.{digits}f}" for value in self)
        return f"{median} ({low} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["n", "n squared"], [["3", "9"]]))
    | n | n squared |
    | --- | --- |
    | 3 | 9 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(folder: Path, name: str, text: str, record: Mapping[str, Any]) -> None:
    """Writes the Markdown text and the JSON record of a result as `NAME.md` and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
