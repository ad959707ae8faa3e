"""Measures how the cost of a training step grows.

    python -m benchmarks.scaling

The axes are batch, width, depth, image size, devices, cores and dataset. Each varies one property
of a default: the baseline, batches of 128 images of 32x32x3, a device per core. Each visit to a
point has a process of its own, so that peak memory is that of the point. A round visits every point
once, and each round starts with another, so that a slow minute does not look like a bend. The
figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.command_line import Parser, command, log, names, positive
from benchmarks.scaling.report import Row, make_rows, plot, start_mib, table
from benchmarks.scaling.sweep import Axis, Point, Visit, make_axes, visit
from benchmarks.workers import QUICK_ENV
from cnn.runtime import cli

_MODULE = "benchmarks.scaling"
_RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags."""

    axes: dict[str, Axis]
    rounds: int
    seconds: float
    quick: bool
    out: Path

    @property
    def points(self) -> dict[Point, str]:
        """Each point once, with a name for the screen."""
        found: dict[Point, str] = {}
        for name, axis in self.axes.items():
            for value, point in axis.points.items():
                found.setdefault(point, f"{name} {value:,}")
        return found


def _settings(argv: Sequence[str], cores: int) -> Settings:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    known = ", ".join(make_axes(cores, quick=False))
    add = parser.add_argument
    add("--axes", type=names, metavar="A,B", help=f"of {known.replace(' ', '')} (all)")
    add("--rounds", type=positive(int), metavar="N", help="visits to each point (3)")
    add("--seconds", type=positive(float), metavar="S", help="of timed steps in a visit (0.5)")
    add("--quick", action="store_true", help="two points of each axis; the figures mean little")
    flags = parser.parse_args(argv)
    axes = make_axes(cores, quick=flags.quick)
    for name in flags.axes or ():
        if name not in axes:
            parser.error(f"unknown axis {name!r}; known: {known}")
    return Settings(
        axes={name: axes[name] for name in flags.axes or axes},
        rounds=flags.rounds or (2 if flags.quick else 3),
        seconds=flags.seconds or (0.05 if flags.quick else 0.5),
        quick=flags.quick,
        out=flags.out,
    )


def _write(
    settings: Settings, about: dict[str, Any], rows: Mapping[str, Sequence[Row]], line: str
) -> str:
    """Writes `scaling.json` and `scaling.md`; returns the Markdown."""
    visits = sum(len(row.visits) for same in rows.values() for row in same)
    wanted = settings.rounds * sum(len(axis.points) for axis in settings.axes.values())
    text = "\n".join(
        [
            *(["**Not finished: points or rounds are missing.**\n"] if visits < wanted else []),
            f"`{line}`\n",
            f"{machine.sentence(about)}.\n",
            f"Medians of {settings.rounds} rounds of {settings.seconds:g} s, each visit in a "
            "process of its own; in parentheses the lowest and highest round. "
            + (
                "The first round compiles, which takes memory too.\n"
                if settings.quick
                else "All programs were compiled before.\n"
            ),
            "Each axis varies one property of the baseline on 32x32x3 images (depth also pads). "
            "GFLOP/s count direct convolutions; Winograd's need fewer. Split: shards x "
            "microbatches x images (`cnn/ops/microbatch.py`). Of the memory "
            f"{start_mib(rows):,.0f} MiB are used before the first array. Batches are on the "
            "devices before; on the dataset axis each step gathers its own.\n",
            "![time per image and peak memory](scaling.png)\n",
            "`benchmarks/NOTES.md`, section Bends, has a sentence on each bend.\n",
            *(f"{table(name, settings.axes[name], same)}\n" for name, same in rows.items() if same),
        ]
    )
    record = {
        "command": line,
        "machine": about,
        "finished": visits == wanted,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "axes": {
            name: [{**dataclasses.asdict(row), "flop": row.point.flop} for row in same]
            for name, same in rows.items()
        },
    }
    report.write(settings.out, "scaling", text, record)
    return text


def main(argv: Sequence[str]) -> None:
    """Flags -> rounds of visits -> results, written after each visit."""
    about = machine.describe()
    settings = _settings(argv, about["cores"])
    titles = settings.points
    points = list(titles)
    visits: dict[Point, list[Visit]] = {point: [] for point in points}
    rows: dict[str, list[Row]] = {}
    text = ""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        for done, point in enumerate(() if settings.quick else points, 1):
            visit(point, 0.0, cache)
            log(f"compiled {done}/{len(points)}: {titles[point]}")
        for turn in range(settings.rounds):
            # Far from the last start, so that a slow minute never meets the same points.
            first = turn * len(points) // settings.rounds
            for point in (*points[first:], *points[:first]):
                one = visit(point, settings.seconds, cache, QUICK_ENV if settings.quick else None)
                visits[point].append(one)
                log(
                    f"round {turn + 1}/{settings.rounds}, {titles[point]}: "
                    f"{one.images_per_second:,.0f} images/s, {one.peak_mib:,.0f} MiB"
                )
                rows = make_rows(settings.axes, visits)
                text = _write(settings, about, rows, command(_MODULE, argv))
            plot(settings.axes, rows, settings.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="the points that were visited are written")
