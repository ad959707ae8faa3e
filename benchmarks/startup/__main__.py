"""Times the first seconds of `train.py`: to its first line, and by part to its first steps.

    python -m benchmarks.startup

Each round makes three processes for each config, one after the other: `train.py` on a terminal, to
its first line; a start with an empty cache of compiled programs; and one with what that left there.
The two starts run the functions of `train.py` up to the end of the first call of the training step,
which makes one step or several, and say when each part was over. The images have been decoded
before. Linux only, where XDG_CACHE_HOME moves the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report, workers
from benchmarks.command_line import Parser, command, log, names, positive
from benchmarks.report import Spread, table
from benchmarks.startup.worker import PARTS
from cnn import UserError
from cnn.runtime import cli
from cnn.runtime.disk import cache_directory

_MODULE = "benchmarks.startup"
_RESULTS = Path(__file__).resolve().parent / "results"


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--configs", type=names, default=["baseline", "fast_cpu"], help="(baseline,fast_cpu)")
    add("--rounds", type=positive(int), default=5, metavar="N", help="(5)")
    add("--quick", action="store_true", help="one round of digits, to see that it runs")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.configs, flags.rounds = ["digits"], 1
    return flags


def first_line(config: str, place: Path) -> float:
    """Seconds until `train.py` shows anything on a terminal; it is stopped then."""
    words = [sys.executable, str(workers.REPOSITORY / "train.py"), *_arguments(config, place)]
    reader, terminal = pty.openpty()
    begun = time.monotonic()
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=_environment(place)
    )
    os.close(terminal)
    try:
        os.read(reader, 1)
        return time.monotonic() - begun
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def parts(config: str, place: Path) -> dict[str, Any]:
    """What the worker found: seconds by part, and CPU seconds of the process.

    Raises:
      UserError: it failed.
    """
    words = workers.command("benchmarks.startup.worker", time.monotonic())
    done = subprocess.run(
        [*words, *_arguments(config, place)],
        env=_environment(place),
        capture_output=True,
        text=True,
    )
    line = workers.last_line(done.stderr)
    if done.returncode or not line.startswith("{"):
        raise UserError(f"a start with {config} failed: {line}")
    return json.loads(line)


def _arguments(config: str, place: Path) -> list[str]:
    # A directory of its own for each run, which none resumes.
    return ["--config", config, "--workdir", tempfile.mkdtemp(dir=place)]


def _environment(place: Path) -> dict[str, str]:
    changes = {"XDG_CACHE_HOME": str(place), "JAX_COMPILATION_CACHE_DIR": None}
    return workers.environment({**changes, "PYTHONDONTWRITEBYTECODE": None})  # as for most users


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """A cache without compiled programs, with the decoded images of the user's own."""
    own = cache_directory()
    (own / "decoded").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / own.name).mkdir()
        (place / own.name / "decoded").symlink_to(own / "decoded")
        yield place


def _summary(starts: Sequence[dict[str, Any]]) -> str:
    head = ["config", "compiled before", "n", "first line", "first steps", "CPU seconds", *PARTS]
    rows = []
    for config, compiled in dict.fromkeys((one["config"], one["compiled"]) for one in starts):
        same = [one for one in starts if (one["config"], one["compiled"]) == (config, compiled)]
        spreads = [
            Spread.of(samples).text(2)
            for samples in (
                [one["first_line"] for one in same],
                [sum(one["parts"].values()) for one in same],
                [one["cpu"] for one in same],
            )
        ]
        medians = [Spread.of([one["parts"][name] for one in same]).median for name in PARTS]
        cells = [config, "yes" if compiled else "no", str(len(same)), *spreads]
        rows.append([*cells, *(f"{median:.2f}" for median in medians)])
    return table(head, rows)


def _write(flags: argparse.Namespace, argv: Sequence[str], about: Any, starts: Any) -> str:
    text = "\n".join(
        [
            f"`{command(_MODULE, argv)}`\n",
            f"{machine.sentence(about)}.\n",
            "Seconds since the command, and of CPU: median (lowest to highest), of the parts the "
            "median. The images were decoded before. The load average was "
            f"{about['load_average_at_start']:.1f} at the start.\n",
            f"{_summary(starts)}\n",
        ]
    )
    record = {"command": command(_MODULE, argv), "machine": about, "starts": starts}
    report.write(flags.out, "startup", text, record)
    return text


def main(argv: Sequence[str]) -> None:
    """Makes the rounds, and writes the table after each."""
    flags = _flags(argv)
    about, starts, text = machine.describe(), [], ""
    for config in () if flags.quick else flags.configs:
        with _cache() as place:
            parts(config, place)  # decodes the images
    for number in range(flags.rounds):
        for config in flags.configs:
            with _cache() as place:
                seconds = first_line(config, place)
                for compiled in (False, True):
                    start = {"config": config, "compiled": compiled, "first_line": seconds}
                    starts.append({**start, **parts(config, place)})
            whole = [f"{sum(one['parts'].values()):.2f} s" for one in starts[-2:]]
            log(f"round {number + 1}, {config}: {', then '.join(whole)}")
        text = _write(flags, argv, about, starts)
    print(text)


if __name__ == "__main__":
    cli.run(main)
