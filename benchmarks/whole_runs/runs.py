"""Times whole processes from outside, and summarizes several runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arrays
from benchmarks.report import Spread, table
from benchmarks.workers import last_line
from cnn import UserError, load_dataset

TARGET = 0.6344
KERAS = "keras"
# Epoch, train loss, train accuracy, test loss, test accuracy.
_EPOCH_LINE = re.compile(r" *(\d+) +\S+ +[\d.]+ % +\S+ +([\d.]+) %")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished process.

    Attributes:
      name: "keras", or the name of a config.
      code: digest of the code that ran.
      warm_cache: whether JAX could find programs that an earlier process had compiled.
      wall_seconds: from the start of the process to its end.
      peak_mib: peak resident memory.
      epochs: (epoch, seconds since the start of the process, test accuracy) by epoch.
    """

    name: str
    seed: int
    code: str
    warm_cache: bool
    wall_seconds: float
    peak_mib: float
    epochs: list[tuple[int, float, float]]

    @property
    def seconds_to_target(self) -> float | None:
        """Until the first epoch with a test accuracy of `TARGET` or more."""
        return next((seconds for _, seconds, accuracy in self.epochs if accuracy >= TARGET), None)


def timed(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Runs a process to its end.

    Returns:
      `wall_seconds`, `peak_mib` and `epochs` of `Run`.

    Raises:
      UserError: the process fails; the message has the last line that it wrote.
    """
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
        ) as process:
            assert process.stdout
            epochs = [
                (int(found[1]), time.monotonic() - start, float(found[2]) / 100)
                for line in process.stdout
                if (found := _EPOCH_LINE.match(line))
            ]
            _, status, usage = os.wait4(process.pid, 0)
            wall_seconds = time.monotonic() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        line = last_line(log.read())
    if process.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {line}")
    if not epochs:
        raise UserError(f"{Path(command[1]).name} printed no line with a test accuracy")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "wall_seconds": wall_seconds,
        "peak_mib": usage.ru_maxrss * unit / 2**20,
        "epochs": epochs,
    }


def write_arrays(path: Path) -> None:
    """Writes CIFAR-10 as a NumPy archive, the form in which Keras caches its download."""
    arrays.write_arrays(path, load_dataset("cifar10"))


def load_runs(path: Path) -> list[Run]:
    """The runs that a file holds, of any version of the code."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Run(**json.loads(line)) for line in lines]


def finished(runs: Sequence[Run], name: str, seed: int, code: str, warm_cache: bool) -> Run | None:
    """The one of these runs that need not be repeated; None if there is none."""
    wanted = (name, seed, code, warm_cache)
    return next((r for r in runs if (r.name, r.seed, r.code, r.warm_cache) == wanted), None)


def summary(runs: Sequence[Run]) -> str:
    """A Markdown table with a row per name, and ratios to Keras if it took part."""
    head = ["run", "n", "test accuracy, last epoch", "whole process, s", "Keras / this"]
    head += [f"seconds to {TARGET:.2%}", "Keras / this", "peak MiB"]
    rows = []
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    whole = {name: [run.wall_seconds for run in same] for name, same in by_name.items()}
    reached = {
        name: [run.seconds_to_target for run in same if run.seconds_to_target is not None]
        for name, same in by_name.items()
    }
    for name, same in by_name.items():
        accuracies = [run.epochs[-1][2] for run in same]
        deviation = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(same) > 1 else ""
        cells = [
            name,
            str(len(same)),
            f"{100 * statistics.mean(accuracies):.2f}{deviation} %",
            Spread.of(whole[name]).text(1),
            _times(whole.get(KERAS, []), whole[name]),
            _reached(reached[name], len(same)),
            _times(reached.get(KERAS, []), reached[name]),
            f"{statistics.median(run.peak_mib for run in same):,.0f}",
        ]
        rows.append(cells)
    return table(head, rows)


def _times(keras: Sequence[float], mine: Sequence[float]) -> str:
    return f"{statistics.mean(keras) / statistics.mean(mine):.2f}" if keras and mine else "-"


def _reached(seconds: Sequence[float], total: int) -> str:
    missing = f", {len(seconds)} of {total} runs" if len(seconds) < total else ""
    return (Spread.of(seconds).text(1) if seconds else "never") + missing
