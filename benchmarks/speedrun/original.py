"""An original airbench script beside ours: its processes, and what its tables say."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import workers
from cnn import UserError

VARIANTS = ("eager", "channels_last", "compile")
_WORKER = "benchmarks.speedrun.original_worker"
# The scripts call the same figure by two names.
_SECONDS = ("time_seconds", "total_time_seconds")
_ENV = {
    # On a CPU, compile in the worker itself: a pool of processes would disturb the others.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


@dataclasses.dataclass(frozen=True)
class OriginalRun:
    """A finished run of the script, as its table has it.

    Attributes:
      seed: of PyTorch, set before the first of the runs of a process.
      variant: how it ran on a CPU; "gpu" on a GPU, where it runs as it is.
      accuracy: on the test images after the last epoch, without test-time augmentation.
      tta_accuracy: with it.
      seconds: what the script itself times: whitening, training steps, last evaluation.
    """

    seed: int
    variant: str
    accuracy: float
    tta_accuracy: float
    seconds: float


def check_script(path: str) -> Path:
    """The path of a script.

    Raises:
      UserError: there is no such file, or PyTorch is not installed.
    """
    if not os.path.isfile(path):
        raise UserError(f"--original={path} is not a file; give the path of an airbench script")
    missing = [name for name in ("torch", "torchvision") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--original needs {' and '.join(missing)}, not installed here")
    return Path(path).resolve()


def command(script: Path, data: Path, variant: str, *flags: object) -> list[str]:
    """The command of the script's worker; flags as `original_worker` takes them."""
    return workers.command(_WORKER, script, f"--data={data}", f"--variant={variant}", *flags)


def environment(variant: str = "") -> dict[str, str]:
    """The environment of a worker."""
    return workers.environment({} if variant == "gpu" else _ENV)


def run(script: Path, data: Path, *, variant: str, seed: int, runs: int = 1) -> list[OriginalRun]:
    """Runs a script to the end of so many of its runs.

    Args:
      script: the path.
      data: the images; see `benchmarks.arrays`.
      variant: of `VARIANTS` on a CPU; "gpu" where it runs as it is.
      seed: of PyTorch.
      runs: how many, in one process.

    Raises:
      UserError: the process fails, or prints another table.
    """
    words = command(script, data, variant, f"--seed={seed}", f"--runs={runs}")
    done = subprocess.run(words, capture_output=True, text=True, env=environment(variant))
    if done.returncode:
        raise UserError(f"{script.name} failed: {workers.last_line(done.stderr)}")
    found = list(read_table(done.stdout.splitlines(), seed, variant))
    if len(found) != runs:
        raise UserError(
            f"{script.name} printed {len(found)} of {runs} lines with tta_val_acc and "
            f"{_SECONDS[0]}; it is no airbench script, or another version"
        )
    return found


def read_table(lines: Iterable[str], seed: int, variant: str) -> Iterator[OriginalRun]:
    """The finished runs in what a script prints, as they appear.

    Its rows have the columns of its header, between bars. A run begins with a row that names it;
    the warm-up run does not count.

    >>> lines = ["|  run     |  epoch  |  val_acc  |  tta_val_acc  |  time_seconds  |",
    ...          "|  warmup  |  1  |  0.1  |  |  1.0  |", "|  |  eval  |  0.1  |  0.1  |  2.0  |",
    ...          "|  0  |  1  |  0.9  |  |  1.0  |", "|  |  eval  |  0.9  |  0.94  |  2.5  |"]
    >>> [(run.accuracy, run.tta_accuracy, run.seconds) for run in read_table(lines, 0, "gpu")]
    [(0.9, 0.94, 2.5)]
    """
    columns: list[str] = []
    name = ""
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "tta_val_acc" in cells:
            columns = cells
        elif columns and len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            name = row["run"] or name
            if row["tta_val_acc"] and name != "warmup":
                seconds = next(row[key] for key in _SECONDS if key in row)
                yield OriginalRun(
                    seed=seed,
                    variant=variant,
                    accuracy=float(row["val_acc"]),
                    tta_accuracy=float(row["tta_val_acc"]),
                    seconds=float(seconds),
                )
