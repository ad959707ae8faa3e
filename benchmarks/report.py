"""Samples as medians with their spread, Markdown tables, and the files of a result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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
