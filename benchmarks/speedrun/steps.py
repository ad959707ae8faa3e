"""Training steps of ours and of an original script, in processes that take turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arrays, machine, report, workers
from benchmarks.command_line import log
from benchmarks.dialogue import WorkerProcess
from benchmarks.report import Spread
from benchmarks.speedrun import original
from cnn.config import to_json_dict
from cnn.experiment import load_config_dataset

# Thread pools spin for some milliseconds after their last work: see `benchmarks.peers.rotation`.
_PAUSE_SECONDS = 0.3
_WARM_STEPS = 2
_NUM_IMAGES = 5000  # from which the whitening layers are computed
OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program that trains steps on command.

    Attributes:
      name: in the table.
      command: of its process.
      env: of its process, all of it.
    """

    name: str
    command: list[str]
    env: Mapping[str, str]


def contenders(
    config: Any, script: Path | None, scratch: Path, *, on_gpu: bool, batch_size: int
) -> list[Contender]:
    """Ours, and each variant of the original.

    Args:
      config: checked.
      script: of the original, if it takes part.
      scratch: a folder for what they read.
      on_gpu: the original then runs as it is.
      batch_size: images of a step.
    """
    data = load_config_dataset(config.to_dict())
    count = max(_NUM_IMAGES, 4 * batch_size)
    archive = scratch / "images.npz"
    arrays.write_arrays(archive, arrays.first_images(data, count))
    (scratch / "config.json").write_text(json.dumps(to_json_dict(config)))
    words = workers.command("benchmarks.speedrun.steps_worker", scratch / "config.json", archive)
    found = [Contender(OURS, words, workers.environment({}))]
    if script is not None:
        flags = ("--steps", f"--batch-size={batch_size}")
        found += [
            Contender(
                f"{script.name}, {variant}",
                original.command(script, archive, variant, *flags),
                original.environment(),
            )
            for variant in (("gpu",) if on_gpu else original.VARIANTS)
        ]
    return found


def measure(
    taking_part: Sequence[Contender], batch_size: int, num_steps: int, rounds: int
) -> dict[str, list[float]]:
    """Images per second of each contender, a sample a round; each round starts with another one.

    Raises:
      UserError: a process fails.
    """
    rates: dict[str, list[float]] = {one.name: [] for one in taking_part}
    with contextlib.ExitStack() as stack:
        processes = []
        for one in taking_part:
            log(f"starting {one.name}")
            process = stack.enter_context(WorkerProcess(one.name, one.command, one.env))
            process.ask("sample", steps=_WARM_STEPS)  # compiles
            processes.append((one.name, process))
        for turn in range(rounds):
            first = turn % len(processes)
            for name, process in (*processes[first:], *processes[:first]):
                time.sleep(_PAUSE_SECONDS)
                answer = process.ask("sample", steps=num_steps)
                rates[name].append(num_steps * batch_size / answer["seconds"])
            shown = ", ".join(f"{name} {one[-1]:,.0f}" for name, one in rates.items())
            log(f"round {turn + 1}/{rounds}: {shown}")
    return rates


def table(rates: Mapping[str, Sequence[float]]) -> str:
    """A Markdown table; ratios are of the medians, and the extremes of single rounds.

    >>> print(table({"ours": [200.0, 300.0, 400.0], "theirs, eager": [100.0, 200.0, 100.0]}))
    | program | images/s | ours / this |
    | --- | --- | --- |
    | ours | 300 (200 to 400) | 1.00 (1.00 to 1.00) |
    | theirs, eager | 100 (100 to 200) | 3.00 (1.50 to 4.00) |
    """
    ours = rates[OURS]
    rows = []
    for name, one in rates.items():
        by_round = [mine / other for mine, other in zip(ours, one, strict=True)]
        ratio = Spread.of(ours).median / Spread.of(one).median
        spread = Spread(ratio, min(by_round), max(by_round))
        rows.append([name, Spread.of(one).text(), spread.text(2)])
    return report.table(["program", "images/s", "ours / this"], rows)


def write(
    out: Path, name: str, line: str, rates: Mapping[str, Sequence[float]], **settings: int
) -> str:
    """Writes `speedrun_NAME_steps.md` and `.json`; returns the former.

    Args:
      out: the folder.
      name: of the config.
      line: the command.
      rates: from `measure`.
      **settings: the batch size, the steps of a sample and the rounds.
    """
    about = machine.describe()
    text = "\n".join(
        [
            f"`{line}`\n",
            f"{machine.sentence(about)}.\n",
            "Training steps of {batch_size:,} images, network and optimizer without augmentation; "
            "medians of {rounds} rounds of {num_steps} steps, in turns; in parentheses the lowest "
            "and highest round.\n".format(**settings),
            f"{table(rates)}\n",
        ]
    )
    record = {"command": line, "machine": about, **settings, "rates": dict(rates)}
    report.write(out, f"speedrun_{name}_steps", text, record)
    return text
