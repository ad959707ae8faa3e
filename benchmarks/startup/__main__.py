"""Times the first seconds of `train.py`: to its first line, to "data:", and to its first steps.

    python -m benchmarks.startup

Each round starts whole processes for each config, one at a time: one without compiled programs, and
one with those of a start before. The images have been decoded before. The first lines are those of
`train.py` on a terminal. The parts are timed in a process of its own, which runs the same functions
up to the end of the first call of the training step: one step or several, which the call makes.
Linux only, where XDG_CACHE_HOME moves the cache.
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
from collections.abc import Sequence
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
_CACHES = ("empty", "warm")
_FACTS = b"data:"


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


def first_lines(config: str, place: Path) -> dict[str, float]:
    """Seconds until `train.py` shows anything on a terminal, and until it shows "data:".

    Raises:
      UserError: it ends before.
    """
    words = [sys.executable, str(workers.REPOSITORY / "train.py"), *_arguments(config, place)]
    reader, terminal = pty.openpty()
    begun = time.monotonic()
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=_environment(place)
    )
    os.close(terminal)
    text, first = b"", 0.0
    try:
        while _FACTS not in text:
            with contextlib.suppress(OSError):  # the end of a terminal
                part = os.read(reader, 4096)
                first = first or time.monotonic() - begun
                text += part
                continue
            raise UserError(f"train.py failed: {workers.last_line(text.decode())}")
        return {"first line": first, "data": time.monotonic() - begun}
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
    return workers.environment({"XDG_CACHE_HOME": str(place), "JAX_COMPILATION_CACHE_DIR": None})


@contextlib.contextmanager
def _cache() -> Any:
    """A cache without compiled programs, with the decoded images of the user's own."""
    own = cache_directory()
    (own / "decoded").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / own.name).mkdir()
        (place / own.name / "decoded").symlink_to(own / "decoded")
        yield place


def measure(config: str, place: Path) -> dict[str, Any]:
    """A start with the compiled programs in a cache, which another start follows."""
    found = parts(config, place)
    return {**found, "lines": first_lines(config, place)}


def _summary(starts: Sequence[dict[str, Any]]) -> str:
    head = ["config", "compiled before", "n", "first line", '"data:"', "first steps"]
    head += ["CPU seconds", *PARTS]
    rows = []
    for config, cache in dict.fromkeys((one["config"], one["cache"]) for one in starts):
        same = [one for one in starts if (one["config"], one["cache"]) == (config, cache)]
        samples = [[one["lines"]["first line"] for one in same]]
        samples += [[one["lines"]["data"] for one in same]]
        samples += [[sum(one["parts"].values()) for one in same], [one["cpu"] for one in same]]
        spreads = [Spread.of(sample).text(2) for sample in samples]
        medians = [f"{Spread.of([one['parts'][name] for one in same]).median:.2f}" for name in PARTS]
        rows.append([config, "no" if cache == "empty" else "yes", str(len(same)), *spreads, *medians])
    return table(head, rows)


def _write(flags: argparse.Namespace, argv: Sequence[str], about: Any, starts: Any) -> str:
    text = "\n".join(
        [
            f"`{command(_MODULE, argv)}`\n",
            f"{machine.sentence(about)}.\n",
            "Seconds since the command: median (lowest to highest), of the parts the median. The "
            "images were decoded before.\n",
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
    with contextlib.ExitStack() as opened:
        warm = {config: opened.enter_context(_cache()) for config in flags.configs}
        for config, place in warm.items():
            parts(config, place)  # decodes the images and compiles
        for number in range(flags.rounds):
            for config in flags.configs:
                for cache in _CACHES:
                    with _cache() as empty:
                        found = measure(config, empty if cache == "empty" else warm[config])
                    starts.append({"config": config, "cache": cache, **found})
                    seconds = sum(found["parts"].values())
                    log(f"round {number + 1}, {config}, {cache}: {seconds:.2f} s")
            text = _write(flags, argv, about, starts)
    print(text)


if __name__ == "__main__":
    cli.run(main)
