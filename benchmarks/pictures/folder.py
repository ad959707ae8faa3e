"""Prepares, trains on and classifies a folder of mixed pictures, as a person with photographs does.

    python -m benchmarks.pictures.folder

Each step is a process: `python -m cnn data show` twice (the second finds the decoded pictures),
`train.py`, and `python -m cnn predict` on the same files. Time and peak memory are of whole
processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.command_line import Parser, positive
from benchmarks.pictures.made import make_mixture
from benchmarks.processes import timed
from benchmarks.report import table
from benchmarks.workers import REPOSITORY, command
from cnn.runtime import cli

_MODULE = "benchmarks.pictures.folder"
_SIZE = 64  # pixels


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(_MODULE, __doc__, Path(__file__).resolve().parent / "results")
    add = parser.add_argument
    add("--pictures", type=positive(int), default=5000, metavar="N", help="in the folder (5000)")
    add("--side", type=positive(int), default=1000, metavar="N", help="the largest one (1000)")
    add("--epochs", type=positive(int), default=5, metavar="N", help="of training (5)")
    return parser.parse_args(argv)


def _steps(flags: argparse.Namespace, folder: Path, run: Path) -> dict[str, list[str]]:
    """The command of each step, by its description."""
    size = str(_SIZE)
    show = command("cnn", "data", "show", folder, "--image-size", size)
    show += ["--output", str(run.with_suffix(".png"))]
    train = [sys.executable, str(REPOSITORY / "train.py"), f"--workdir={run}"]
    train += [f"--config.dataset.folder={folder}", f"--config.dataset.image_size={size}"]
    train += [f"--config.num_epochs={flags.epochs}"]
    return {
        "data show, first start": show,
        "data show, second start": show,
        f"train.py, {flags.epochs} epochs": train,
        "predict, all files": command("cnn", "predict", run, folder, "--csv"),
    }


def main(argv: Sequence[str]) -> None:
    """Makes the pictures, takes the steps and writes the table."""
    flags, about = _flags(argv), machine.describe()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = Path(scratch) / "photos", Path(scratch) / "run"
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        damaged = make_mixture(folder, flags.pictures, flags.side)
        size = sum(file.stat().st_size for file in folder.rglob("*.*")) / 1e6
        for name, words in _steps(flags, folder, run).items():
            # Files that cannot be read are reported by the exit code 1.
            seconds, peak = timed(words, may_exit=(0, 1) if "predict" in name else (0,))
            figures[name] = {"seconds": seconds, "peak_mib": peak}
            print(f"{name}: {seconds:.1f} s, {peak:.0f} MiB", flush=True)
        accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    words = f"python -m {_MODULE} --pictures={flags.pictures} --side={flags.side}"
    words += f" --epochs={flags.epochs}"
    rows = [
        [name, f"{one['seconds']:.1f}", f"{one['peak_mib']:,.0f}"] for name, one in figures.items()
    ]
    text = "\n".join(
        [
            f"`{words}`\n",
            f"{machine.sentence(about)}.\n",
            f"{flags.pictures:,} pictures in 12 forms, {size:,.0f} MB, {damaged} of them damaged; "
            f"at {_SIZE}x{_SIZE} pixels. Test accuracy {100 * accuracy:.2f} %. Whole processes, "
            "one after another, start included.\n",
            f"{table(['step', 'seconds', 'peak MiB'], rows)}\n",
        ]
    )
    record = {"command": words, "machine": about, "steps": figures, "megabytes": size}
    report.write(flags.out, "folder", text, {**record, "damaged": damaged, "accuracy": accuracy})
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="nothing was written")
