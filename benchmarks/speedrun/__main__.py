"""Trains whole seeds of a recipe and states the result as speed runs are published.

    python -m benchmarks.speedrun --config speed94 --seeds 5
    python -m benchmarks.speedrun --config speed94 --runs RUN [RUN ...]

The loop is that of train.py; each seed has a run directory in --workdir, so the same command
continues where it was stopped. --runs takes directories of runs that train.py made, and trains
none unless --seeds is given too. Fields of the config are set as for train.py.

--original SCRIPT runs an original airbench script, given by its path, in turns with ours, seed by
seed: on a GPU as it is, else on the CPU in float32. With --steps N both only train N steps a
sample, of the same batches, in processes that take turns; the figures are images per second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import arrays, machine, report
from benchmarks.command_line import Parser, command, log, positive
from benchmarks.speedrun import claim, original, steps
from benchmarks.speedrun.original import OriginalRun
from benchmarks.speedrun.runs import (
    Seed,
    device_text,
    evaluation_seconds,
    read_seeds,
    run_directory,
)
from benchmarks.workers import REPOSITORY
from cnn import load_config, select_devices, train_and_evaluate
from cnn.config import check_config, find_config, override, split_settings
from cnn.experiment import Experiment, create_experiment
from cnn.runtime import cli
from cnn.runtime.environment import environment
from cnn.runtime.jax_settings import pinned_settings

_MODULE = "benchmarks.speedrun"
_RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags.

    Attributes:
      name: of the config.
      config: checked.
      seeds: to train, if they are not among `runs`.
      runs: directories of finished runs.
      workdir: of the runs that are made here.
      original: the path of a script, if any.
      variant: of it.
      num_steps: of a sample of `--steps`; 0 trains whole seeds.
      rounds: of `--steps`.
      out: for the results.
      line: the command.
    """

    name: str
    config: Any
    seeds: list[int]
    runs: list[str]
    workdir: Path
    original: Path | None
    variant: str
    num_steps: int
    rounds: int
    out: Path
    line: str


def _settings(argv: Sequence[str]) -> Settings:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--config", default="speed94", metavar="NAME", help="a config, by name or path (speed94)")
    add("--seeds", type=positive(int), metavar="N", help="seeds 0 to N-1 (5; none with --runs)")
    add("--runs", nargs="+", default=[], metavar="RUN", help="directories of runs of this config")
    add("--workdir", type=Path, metavar="DIR", help="of the runs (checkpoints/speedrun/NAME)")
    add("--original", metavar="SCRIPT", help="path of an airbench script to run beside ours")
    add("--variant", choices=original.VARIANTS, default="channels_last", help="of it, on a CPU")
    add("--steps", type=positive(int), default=0, metavar="N", help="only time N steps a sample")
    add("--rounds", type=positive(int), default=5, metavar="N", help="samples of --steps (5)")
    fields, words = split_settings(argv)
    flags = parser.parse_args(words)
    path = find_config(flags.config, REPOSITORY / "configs")
    config = check_config(override(load_config(path), fields))
    workdir = flags.workdir or REPOSITORY / "checkpoints" / "speedrun" / path.stem
    return Settings(
        name=path.stem,
        config=config,
        seeds=list(range(flags.seeds or (0 if flags.runs else 5))),
        runs=flags.runs,
        workdir=workdir,
        original=original.check_script(flags.original) if flags.original else None,
        variant=flags.variant,
        num_steps=flags.steps,
        rounds=flags.rounds,
        out=flags.out,
        line=_line(flags, fields, path.stem),
    )


def _line(flags: argparse.Namespace, fields: Sequence[str], name: str) -> str:
    """The command, with names for the paths of this machine."""
    words = ["--config", name, *fields]
    words += ["--seeds", str(flags.seeds)] if flags.seeds else []
    words += ["--runs", *(Path(run).name for run in flags.runs)] if flags.runs else []
    if flags.original:
        words += ["--original", Path(flags.original).name, "--variant", flags.variant]
    words += ["--steps", str(flags.steps), "--rounds", str(flags.rounds)] if flags.steps else []
    return command(_MODULE, words)


class Originals:
    """The finished runs of an original script, kept in a file, a line each.

    Args:
      settings: with a script.
      platform: "gpu" if it runs as it is.
      data: the archive of its images.
    """

    def __init__(self, settings: Settings, platform: str, data: Path) -> None:
        assert settings.original
        self._script, self._data = settings.original, data
        self._variant = "gpu" if platform == "gpu" else settings.variant
        self._file = settings.workdir / f"{self._script.stem}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.runs = [OriginalRun(**json.loads(line)) for line in lines]

    def add(self, seed: int) -> None:
        """Runs a seed unless it is there."""
        if any((run.seed, run.variant) == (seed, self._variant) for run in self.runs):
            return
        log(f"{self._script.name}, {self._variant}: seed {seed}")
        found = original.run(self._script, self._data, variant=self._variant, seed=seed)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(run)) + "\n" for run in found)
        self.runs += found

    def by_variant(self) -> dict[str, Sequence[OriginalRun]]:
        """The runs by how the script is called in the table."""
        found: dict[str, list[OriginalRun]] = {}
        for run in self.runs:
            found.setdefault(f"{self._script.name}, {run.variant}", []).append(run)
        return dict(found)


class Page:
    """The result, written anew after each seed."""

    def __init__(self, settings: Settings, experiment: Experiment) -> None:
        self._settings, self._experiment = settings, experiment
        self._machine = machine.describe()
        self._here = device_text(environment(experiment.mesh))
        before = settings.out / f"speedrun_{settings.name}.json"
        kept = json.loads(before.read_text())["evaluation"] if before.exists() else None
        self._evaluation = kept if kept and kept["device"] == self._here else None

    def write(self, seeds: Sequence[Seed], originals: Originals | None) -> str:
        """Writes `speedrun_NAME.md` and `.json`; returns the former."""
        # That of another device says nothing of these runs.
        is_here = all(seed.device == self._here for seed in seeds)
        if is_here and self._evaluation is None:
            log("timing the last evaluation")
            seconds = evaluation_seconds(self._experiment)
            self._evaluation = {"device": self._here, "seconds": seconds}
        evaluation = self._evaluation if is_here else None
        seconds = evaluation["seconds"] if evaluation else None
        beside = {} if originals is None else originals.by_variant()
        settings = self._settings
        text = claim.text(
            settings.name, settings.line, seeds, seconds, beside, machine.sentence(self._machine)
        )
        record = {
            "command": settings.line,
            "config": settings.name,
            "machine": self._machine,
            "evaluation": evaluation,
            "figures": claim.record(seeds, seconds),
            "seeds": [dataclasses.asdict(seed) for seed in seeds],
            "originals": {
                name: [dataclasses.asdict(run) for run in runs] for name, runs in beside.items()
            },
        }
        report.write(settings.out, f"speedrun_{settings.name}", text, record)
        return text


def _whole(settings: Settings, scratch: Path) -> str:
    """Trains what is missing, in turns with the original."""
    config = settings.config
    paths = list(settings.runs)
    devices = select_devices(
        config.runtime.platform,
        config.runtime.num_devices,
        deterministic=config.runtime.deterministic,
    )
    experiment = create_experiment(config, devices)
    page, originals = Page(settings, experiment), None
    if settings.original:
        arrays.write_arrays(scratch / "images.npz", experiment.dataset)
        originals = Originals(settings, devices[0].platform, scratch / "images.npz")
    seeds, unfinished = read_seeds(paths, config)
    for path in unfinished:
        log(f"{path} is not finished: left out")
    given = {seed.seed for seed in seeds}
    text = page.write(seeds, originals) if seeds else ""
    for number in settings.seeds:
        if originals is not None and number % 2:
            originals.add(number)
        if number not in given:
            one = config.copy_and_resolve_references()
            one.seed = number
            train_and_evaluate(one, run_directory(settings.workdir, number))
            paths.append(str(run_directory(settings.workdir, number)))
        if originals is not None:
            originals.add(number)
        seeds, _ = read_seeds(paths, config)
        text = page.write(seeds, originals)
    return text


def _steps(settings: Settings, scratch: Path) -> str:
    """Times steps."""
    config = settings.config
    platform = select_devices(config.runtime.platform)[0].platform
    given = {
        "batch_size": config.batch_size,
        "num_steps": settings.num_steps,
        "rounds": settings.rounds,
    }
    taking_part = steps.contenders(
        config,
        settings.original,
        scratch,
        on_gpu=platform == "gpu",
        batch_size=config.batch_size,
    )
    rates = steps.measure(taking_part, **given)
    return steps.write(settings.out, settings.name, settings.line, rates, **given)


def main(argv: Sequence[str]) -> None:
    """Flags -> whole seeds, or steps -> results."""
    settings = _settings(argv)
    if settings.original:
        # Else JAX would take most of a GPU's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as scratch, pinned_settings():
        if settings.num_steps:
            text = _steps(settings, Path(scratch))
        else:
            text = _whole(settings, Path(scratch))
    print(text or "no run is finished yet")


if __name__ == "__main__":
    cli.run(main, interrupted="the same command continues")
