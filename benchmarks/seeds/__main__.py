"""Times N seeds in one program, by layout, beside N processes of one seed each.

    python -m benchmarks.seeds --config digits --num-seeds 20
    python -m benchmarks.seeds --config fast_cpu --num-seeds 10

Whole processes from the outside, start included, one at a time. Each round makes all of them, in an
order that turns from round to round. Programs that an earlier process has compiled are found, as on
a user's machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.command_line import Parser, command, log, names, positive
from benchmarks.processes import timed
from benchmarks.report import Spread, table
from benchmarks.workers import REPOSITORY
from cnn import UserError
from cnn.runtime import cli

_MODULE = "benchmarks.seeds"
_RESULTS = Path(__file__).resolve().parent / "results"
_PROCESSES = "processes"
_LAYOUTS = ("per_device", "in_turn", "vmap")


def _flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--config", default="digits", metavar="CONFIG", help="(digits)")
    add("--num-seeds", type=positive(int), default=20, metavar="N", help="of each group (20)")
    add("--rounds", type=positive(int), default=3, metavar="N", help="(3)")
    add("--layouts", type=names, default=list(_LAYOUTS), metavar="A,B", help="(all)")
    flags, settings = parser.parse_known_args(argv)
    if unknown := set(flags.layouts) - set(_LAYOUTS):
        raise UserError(f"unknown layout {unknown.pop()}; known: {', '.join(_LAYOUTS)}")
    if others := [word for word in settings if not word.startswith("--config.")]:
        raise UserError(f"unknown flag {others[0]}; fields are set as --config.FIELD=VALUE")
    return flags, settings


def _train(flags: argparse.Namespace, *settings: str) -> tuple[float, float]:
    """Seconds and peak MiB of a process of `train.py`."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, str(REPOSITORY / "train.py"), "--config", flags.config]
        return timed([*words, "--workdir", f"{place}/run", *settings])


def _measure(flags: argparse.Namespace, kind: str, settings: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak MiB of all seeds, in one program or in as many processes."""
    if kind != _PROCESSES:
        group = f"--config.num_seeds={flags.num_seeds}"
        return _train(flags, group, f"--config.runtime.group_layout={kind}", *settings)
    each = [_train(flags, f"--config.seed={i}", *settings) for i in range(flags.num_seeds)]
    return sum(seconds for seconds, _ in each), max(peak for _, peak in each)


def main(argv: Sequence[str]) -> None:
    """Makes the rounds, and writes the table after each."""
    flags, settings = _flags(argv)
    about, kinds = machine.describe(), [_PROCESSES, *flags.layouts]
    rounds: list[dict[str, tuple[float, float]]] = []
    _train(flags, "--config.num_epochs=1", *settings)  # what is compiled and decoded once
    for turn in range(flags.rounds):
        place = turn % len(kinds)
        found: dict[str, tuple[float, float]] = {}
        for kind in (*kinds[place:], *kinds[:place]):
            found[kind] = _measure(flags, kind, settings)
            log(f"round {turn + 1}, {kind}: {found[kind][0]:.1f} s, {found[kind][1]:.0f} MiB")
        rounds.append(found)
        text = _write(flags, argv, kinds, rounds, about)
    print(text)


def _write(
    flags: argparse.Namespace,
    argv: Sequence[str],
    kinds: Sequence[str],
    rounds: Sequence[dict[str, tuple[float, float]]],
    about: dict[str, Any],
) -> str:
    rows = []
    for kind in kinds:
        seconds = [one[kind][0] for one in rounds]
        ratios = [one[kind][0] / one[_PROCESSES][0] for one in rounds]
        peak = statistics.median(one[kind][1] for one in rounds)
        cells = [Spread.of(seconds).text(1), Spread.of(ratios).text(2), f"{peak:,.0f}"]
        rows.append([kind, f"{statistics.median(seconds) / flags.num_seeds:.2f}", *cells])
    head = ["layout", "seconds a seed", "seconds of all", "/ processes", "peak MiB"]
    words = command(_MODULE, argv)
    text = "\n".join(
        [
            f"`{words}`\n",
            f"{machine.sentence(about)}.\n",
            f"{flags.num_seeds} seeds of `{flags.config}`, {len(rounds)} rounds in turns, whole "
            "processes: median (lowest to highest). Ratios are of the same round.\n",
            f"{table(head, rows)}\n",
        ]
    )
    record = {"command": words, "machine": about, "rounds": rounds}
    report.write(flags.out, Path(flags.config).stem, text, record)
    return text


if __name__ == "__main__":
    cli.run(main, interrupted="the rounds that are over are kept")
