"""How the cost of a training step grows: with batch, width, depth, image size, devices, dataset.

    python benchmarks/scaling.py

Each axis changes one thing of one default: the seed's network, batches of 128 images of 32x32x3, a
device per core. Each visit to a point has a process of its own, so that peak memory is that of
the point; a round visits every point once, each round begun by another, so that a slow minute
does not look like a bend. The figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cli
import machine
from sweep import Axis, Point, Visit, make_axes, visit
from sweep_report import Row, make_rows, plot, start_mib, table

_RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags."""

    axes: dict[str, Axis]
    rounds: int
    seconds: float
    compile_first: bool
    out: Path

    @property
    def points(self) -> dict[Point, str]:
        """Each point once, with what to call it."""
        found: dict[Point, str] = {}
        for name, axis in self.axes.items():
            for value, point in axis.points.items():
                found.setdefault(point, f"{name} {value:,}")
        return found


def _settings(argv: Sequence[str], cores: int) -> Settings:
    parser = cli.Parser("scaling.py", __doc__)
    known = ", ".join(make_axes(cores, quick=False))
    add = parser.add_argument
    add("--axes", type=cli.names, metavar="A,B", help=f"of {known.replace(' ', '')} (all)")
    add("--rounds", type=cli.positive(int), metavar="N", help="visits to each point (3)")
    add("--seconds", type=cli.positive(float), metavar="S", help="of timed steps in a visit (0.5)")
    add("--quick", action="store_true", help="two points of each axis; the figures mean little")
    add("--out", type=Path, default=_RESULTS, metavar="DIR", help="(benchmarks/results)")
    flags = parser.parse_args(argv)
    axes = make_axes(cores, quick=flags.quick)
    for name in flags.axes or ():
        if name not in axes:
            parser.error(f"unknown axis {name!r}; known: {known}")
    return Settings(
        axes={name: axes[name] for name in flags.axes or axes},
        rounds=flags.rounds or (2 if flags.quick else 3),
        seconds=flags.seconds or (0.05 if flags.quick else 0.5),
        compile_first=not flags.quick,
        out=flags.out,
    )


def _write(
    settings: Settings, about: dict[str, Any], rows: Mapping[str, Sequence[Row]], command: str
) -> str:
    """Writes `scaling.json` and `scaling.md`; returns the Markdown."""
    visits = sum(len(row.visits) for same in rows.values() for row in same)
    wanted = settings.rounds * sum(len(axis.points) for axis in settings.axes.values())
    text = "\n".join(
        [
            *(["**Not finished: points or rounds are missing.**\n"] if visits < wanted else []),
            f"`{command}`\n",
            f"{machine.sentence(about)}.\n",
            f"Medians of {settings.rounds} rounds of {settings.seconds:g} s, each visit in a "
            "process of its own; in brackets the lowest and highest round. "
            + (
                "What the processes compile was compiled before.\n"
                if settings.compile_first
                else "The first round compiles, which takes memory too.\n"
            ),
            "Each axis changes one thing of the seed's network on 32x32x3 images "
            "(depth also pads). GFLOP/s count direct convolutions; Winograd's need fewer. "
            "The cut is lanes x blocks x images, by `cnn/ops/microbatch.py`. Of the memory "
            f"{start_mib(rows):,.0f} MiB are there before the first array. "
            "Batches lie ready on the devices; on the dataset axis each step gathers its own.\n",
            "![time per image and peak memory](scaling.png)\n",
            "`benchmarks/NOTES.md`, section Bends, has a sentence on each bend.\n",
            *(f"{table(name, settings.axes[name], same)}\n" for name, same in rows.items() if same),
        ]
    )
    record = {
        "command": command,
        "machine": about,
        "finished": visits == wanted,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "axes": {
            name: [{**dataclasses.asdict(row), "flop": row.point.flop} for row in same]
            for name, same in rows.items()
        },
    }
    (settings.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    (settings.out / "scaling.md").write_text(text)
    return text


def main(argv: Sequence[str]) -> None:
    """Flags -> rounds of visits -> results, written after each visit."""
    about = machine.describe()
    settings = _settings(argv, about["cores"])
    settings.out.mkdir(parents=True, exist_ok=True)
    names = settings.points
    points = list(names)
    visits: dict[Point, list[Visit]] = {point: [] for point in points}
    rows: dict[str, list[Row]] = {}
    text = ""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        for done, point in enumerate(points if settings.compile_first else (), 1):
            visit(point, 0.0, cache)
            cli.log(f"compiled {done}/{len(points)}: {names[point]}")
        for turn in range(settings.rounds):
            # Far from the last one's, so that a slow minute never meets the same points.
            first = turn * len(points) // settings.rounds
            for point in (*points[first:], *points[:first]):
                one = visit(point, settings.seconds, cache)
                visits[point].append(one)
                cli.log(
                    f"round {turn + 1}/{settings.rounds}, {names[point]}: "
                    f"{one.images_per_second:,.0f} images/s, {one.peak_mib:,.0f} MiB"
                )
                rows = make_rows(settings.axes, visits)
                text = _write(settings, about, rows, cli.command("scaling.py", argv))
            plot(settings.axes, rows, settings.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="the points that were visited are written")
