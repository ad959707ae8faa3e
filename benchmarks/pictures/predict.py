"""Times `python -m cnn predict` on a folder of photographs, beside Keras and timm.

    pip install -e '.[bench]'
    python -m benchmarks.pictures.predict --timm-script inference.py

The peers are a script of Keras's `image_dataset_from_directory` and `predict`, and timm's
`inference.py`, which is in timm's repository, not in its package; without --timm-script it is left
out. Each is a process of its own, in turns, with the same network, 32x32 pixels and batches of 256.
The pictures are JPEG files of about a megapixel. A second folder has one of them: the difference
between the two times is what the other pictures take, and the ratio compares that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from benchmarks.command_line import Parser, positive
from benchmarks.pictures.made import make_photographs
from benchmarks.processes import timed
from benchmarks.report import Spread, table
from benchmarks.workers import REPOSITORY, command
from cnn import Dataset, Split, UserError, load_config, train_and_evaluate
from cnn.runtime import cli

_MODULE = "benchmarks.pictures.predict"
_HERE = Path(__file__).resolve().parent
OURS, KERAS, TIMM = "python -m cnn predict", "Keras", "timm inference.py"


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(_MODULE, __doc__, _HERE / "results")
    add = parser.add_argument
    add("--pictures", type=positive(int), default=1000, metavar="N", help="in the folder (1000)")
    add("--rounds", type=positive(int), default=5, metavar="N", help="times in turn (5)")
    add("--timm-script", type=Path, metavar="FILE", help="inference.py of timm's repository")
    add("--without-peers", action="store_true", help="only what this repository has")
    flags = parser.parse_args(argv)
    if flags.pictures < 2:
        parser.error(f"--pictures={flags.pictures} must be 2 or more")
    if flags.timm_script and not flags.timm_script.is_file():
        raise UserError(f"--timm-script {flags.timm_script} is not a file")
    return flags


def _make_run(path: Path) -> None:
    """A run of the baseline network on noise: only its speed matters."""
    config = load_config(REPOSITORY / "configs" / "baseline.py")
    config.num_epochs = 1
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 32, 3), np.uint8)
    split = Split(images, rng.integers(0, 10, 32).astype(np.int32))
    names = tuple(map(str, range(10)))
    data = Dataset.from_splits("noise", train=split, test=split, class_names=names)
    train_and_evaluate(config, path, dataset=data)


def _command_of(name: str, flags: argparse.Namespace, run: Path, folder: Path) -> list[str]:
    if name == OURS:
        return command("cnn", "predict", run, folder, "--csv")
    if name == KERAS:
        return [sys.executable, str(_HERE / "keras_script.py"), str(folder)]
    script = str(_HERE / "timm_script.py")
    return [sys.executable, script, str(flags.timm_script), str(folder), str(run.parent)]


def _summary(samples: dict[str, list[dict[str, float]]], number: int) -> str:
    """A row per program; ratios are those of single rounds, the peer's time over ours."""
    head = ["program", f"{number:,} pictures, s", "one picture, s", "pictures/s", "time / ours"]
    rows = []
    for name, rounds in samples.items():
        rates = [(number - 1) / (one["many"] - one["single"]) for one in rounds]
        ratios = [
            (one["many"] - one["single"]) / (mine["many"] - mine["single"])
            for one, mine in zip(rounds, samples[OURS], strict=True)
        ]
        rows.append(
            [
                name,
                Spread.of([one["many"] for one in rounds]).text(2),
                Spread.of([one["single"] for one in rounds]).text(2),
                Spread.of(rates).text(0),
                Spread.of(ratios).text(2),
                f"{max(one['peak_mib'] for one in rounds):,.0f}",
            ]
        )
    return table([*head, "peak MiB"], rows)


def main(argv: Sequence[str]) -> None:
    """Makes pictures and a run, times the programs in turns, and writes the table."""
    flags = _flags(argv)
    about: dict[str, Any] = machine.describe()
    names = [OURS] if flags.without_peers else [OURS, KERAS, *([TIMM] * bool(flags.timm_script))]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run, many, single = place / "run", place / "many", place / "single"
        _make_run(run)
        make_photographs(many, flags.pictures)
        make_photographs(single, 1)
        for folder in (many, single):  # the first start compiles, which later ones need not
            timed(_command_of(OURS, flags, run, folder))
        for turn in range(flags.rounds):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                alone, _ = timed(_command_of(name, flags, run, single))
                seconds, peak = timed(_command_of(name, flags, run, many))
                samples[name].append({"many": seconds, "single": alone, "peak_mib": peak})
                print(f"round {turn + 1}, {name}: {seconds:.1f} s, {alone:.1f} s", flush=True)
    words = f"python -m {_MODULE} --pictures={flags.pictures} --rounds={flags.rounds}"
    words += " --timm-script=inference.py" * bool(flags.timm_script)
    text = "\n".join(
        [
            f"`{words}`\n",
            f"{machine.sentence(about)}.\n",
            "Whole processes in turns, start included; JPEG files of 1152x896 pixels. Medians, in "
            "brackets lowest and highest. Pictures/s: of all but the first, from the difference of "
            "the two times; time / ours: of these differences, round by round.\n",
            f"{_summary(samples, flags.pictures)}\n",
        ]
    )
    report.write(flags.out, "predict", text, {"command": words, "machine": about, **samples})
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="nothing was written")
