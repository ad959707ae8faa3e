"""Kills a training process again and again, and compares its outcome with an undisturbed run.

    python -m benchmarks.reliability.kills --kills 100

`train.py` with shuffling, augmentation, batch statistics, two CPU devices and a save every few
steps gets SIGKILL at random moments: at any time, while it starts, while a checkpoint is written or
deleted, after a record, while it draws the last pictures. The same command starts it again, until
it finishes. Then digest, records and final figures must equal those of the undisturbed run, to the
last bit. Further runs follow until all kills are done.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.command_line import Parser, command, log, positive
from benchmarks.report import table, write
from benchmarks.workers import REPOSITORY
from cnn import CheckpointManager, UserError
from cnn.runtime import cli

_MODULE = "benchmarks.reliability.kills"
_TIMING = ("images_per_second", "wall_seconds")
_FLAGS = (
    f"--config={REPOSITORY / 'configs' / 'digits.py'}",
    "--config.num_epochs=4",
    "--config.runtime.checkpoint_every_steps=5",
    "--config.model.name=dct_cnn",  # with batch statistics
    "--config.model.patch_size=2",
    "--config.model.patch_features=4",
    "--config.augment.flip=true",
    "--config.augment.translate=1",
)
# Also on a machine with one core: the batch is to be sharded.
_TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
_LIMIT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill, and the state of the run directory after it.

    Attributes:
      moment: one of `MOMENTS`.
      seconds: after the start of the process.
      step: of the newest complete checkpoint; None before the first.
      saving: whether a checkpoint is half-written.
      deleting: whether a checkpoint is half-deleted.
    """

    moment: str
    seconds: float
    step: int | None
    saving: bool
    deleting: bool


def _appears(pattern: str) -> Callable[[Path], Callable[[], bool]]:
    """The moment when something new in the run directory matches a pattern."""

    def watch(run: Path) -> Callable[[], bool]:
        before = {*run.glob(pattern)}
        return lambda: not before >= {*run.glob(pattern)}

    return watch


def _next_record(run: Path) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"

    def size() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    before = size()
    return lambda: size() > before


MOMENTS: dict[str, Callable[[Path], Callable[[], bool]]] = {
    "start": lambda run: lambda: True,
    "time": lambda run: lambda: True,
    "saving": _appears("checkpoints/.saving-*"),
    "deleting": _appears("checkpoints/.deleting-*"),
    "record": _next_record,
    "pictures": _appears("curves.png"),
}


def train_command(run: Path) -> list[str]:
    """The command that trains, and that resumes, the run in a directory."""
    return [sys.executable, str(REPOSITORY / "train.py"), *_FLAGS, "--workdir", str(run)]


def finish(run: Path) -> str:
    """Runs the command to its end; returns its output.

    Raises:
      UserError: it fails.
    """
    done = subprocess.run(
        train_command(run), env={**os.environ, **_TWO_DEVICES}, capture_output=True, text=True,
        timeout=_LIMIT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"the run failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def kill(run: Path, moment: str, delay: float) -> Kill | None:
    """Starts the command and kills it; None if it finishes before.

    Args:
      run: the run directory.
      moment: one of `MOMENTS`.
      delay: seconds from that moment to the kill.

    Raises:
      UserError: the run fails by itself.
    """
    reached, began, come = MOMENTS[moment](run), time.monotonic(), None
    with subprocess.Popen(
        train_command(run), env={**os.environ, **_TWO_DEVICES}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while process.poll() is None:
            if come is None and reached():
                come = time.monotonic()
            if come is not None and time.monotonic() - come >= delay:
                process.kill()
                break
            time.sleep(0.001)
        _, stderr = process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode > 0:
        raise UserError(f"the run failed with exit code {process.returncode}: {stderr.strip()}")
    folder = run / "checkpoints"
    return Kill(
        moment,
        round(time.monotonic() - began, 3),
        CheckpointManager(folder).latest_step(),
        any(folder.glob(".saving-*")),
        any(folder.glob(".deleting-*")),
    )


def outcome(run: Path) -> dict[str, Any]:
    """Result, records and checkpoints of a run, without its timing."""
    result = json.loads((run / "result.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for values in (result, *records):
        for name in _TIMING:
            values.pop(name, None)
    steps = CheckpointManager(run / "checkpoints").all_steps()
    return {"result": result, "records": records, "steps": steps}


def torture(
    folder: Path, moments: Sequence[tuple[str, float]], log: Callable[[str], None]
) -> list[Kill]:
    """Kills runs at these moments, one after the other, and checks each run that finishes.

    Args:
      folder: for the run directories.
      moments: moment and delay of each kill; if a run finishes before, the next run gets the kill.
      log: takes a line of progress.

    Raises:
      UserError: a run fails, or its outcome differs from that of the undisturbed run.
    """
    finish(folder / "whole")
    expected, kills, left, number = outcome(folder / "whole"), [], list(moments), 0
    while left:
        run, number = folder / f"killed-{number}", number + 1
        survived = 0
        while left:
            one = kill(run, *left[0])
            if one is None:
                break
            kills.append(one)
            left.pop(0)
            survived += 1
            log(f"kill {len(kills)}/{len(moments)}: {one}")
        finish(run)
        if (found := outcome(run)) != expected:
            raise UserError(f"a run killed {survived} times ends in {found}, not in {expected}")
        log(f"run {number} survived {survived} kills: digest {expected['result']['digest'][:16]}")
    return kills


def draw(count: int, seed: int, whole_seconds: float) -> list[tuple[str, float]]:
    """Draws moments and delays; half of them at any time of a run of `whole_seconds`."""
    rng = random.Random(seed)
    others = [name for name in MOMENTS if name != "time"]
    drawn = []
    for _ in range(count):
        moment = "time" if rng.random() < 0.5 else rng.choice(others)
        longest = {"time": whole_seconds, "start": 1.0}.get(moment, 0.05)
        drawn.append((moment, rng.uniform(0.0, longest)))
    return drawn


def report(kills: Sequence[Kill], where: dict[str, Any], command_line: str) -> str:
    """A page in Markdown."""
    counts = collections.Counter(one.moment for one in kills)
    rows = [[name, str(counts[name])] for name in MOMENTS]
    return "\n".join(
        [
            f"`{command_line}`: {len(kills)} kills with SIGKILL survived; every run ended in the "
            f"digest, records and figures of the undisturbed run.",
            "",
            machine.sentence(where),
            "",
            table(["moment", "kills"], rows),
            "",
            f"{sum(one.saving for one in kills)} left a checkpoint half-written, "
            f"{sum(one.deleting for one in kills)} one half-deleted, "
            f"{sum(one.step is None for one in kills)} came before the first checkpoint.",
            "",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Draws the moments, kills, and writes `kills.json` and `kills.md`."""
    parser = Parser(_MODULE, __doc__, Path(__file__).resolve().parent / "results")
    add = parser.add_argument
    add("--kills", type=positive(int), default=100, metavar="N", help="(100)")
    add("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    flags = parser.parse_args(argv)
    where = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        finish(Path(folder) / "warm-up")  # compiles, so that the next is as fast as the others
        began = time.monotonic()
        finish(Path(folder) / "timed")
        seconds = time.monotonic() - began
        moments = draw(flags.kills, flags.seed, seconds)
        kills = torture(Path(folder), moments, log)
    line = command(_MODULE, argv)
    text = report(kills, where, line)
    found = {"command": line, "machine": where, "kills": [dataclasses.asdict(k) for k in kills]}
    write(flags.out, "kills", text, found)
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, interrupted="nothing was kept")
