"""Finished runs of one recipe, read from their directories, and what their seconds include."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flops import run_flop, run_stages
from cnn import UserError, evaluate
from cnn.config import config_diff, to_json_dict
from cnn.experiment import Experiment
from cnn.report.runs import Run, read_runs
from cnn.runtime.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Seed:
    """A finished run.

    Attributes:
      seed: of the config.
      accuracy: on the test images after the last step, as they are.
      tta_accuracy: with test-time augmentation; None if the config asks for none.
      training_seconds: of all steps: batches gathered, augmented and normalized, gradients,
        updates. The images of each epoch divided by its speed; an epoch in which a process or
        images of another size began, and so something was compiled, counts with the median speed
        of the others with images of its size. Saves within an epoch, if the config asks for them,
        are in it.
      wall_seconds: of `cnn.train_and_evaluate`, up to the last evaluation: also devices, dataset,
        compilation, initial state, the test after each epoch, saves, the last evaluation.
      num_steps: made.
      num_processes: that trained it in turns; of more than one, what each made after its last
        save counts in none of the seconds.
      epochs: (epoch, training seconds until its end, test accuracy, FLOPs until its end).
      training_flop: see `benchmarks.flops`.
      evaluation_flop: of the last evaluation.
      digest: of the final state.
      commit: of the code; "-dirty" if it was edited.
      device: such as "2 x cpu (AMD EPYC, 2 cores)".
      versions: of the packages.
    """

    seed: int
    accuracy: float
    tta_accuracy: float | None
    training_seconds: float
    wall_seconds: float
    num_steps: int
    num_processes: int
    epochs: list[tuple[float, float, float, float]]
    training_flop: float
    evaluation_flop: float
    digest: str
    commit: str | None
    device: str
    versions: dict[str, str]


def read_seeds(paths: Sequence[str], config: Any) -> tuple[list[Seed], list[str]]:
    """Reads runs of a config that differ in their seeds only.

    Args:
      paths: run directories.
      config: checked, with any seed.

    Returns:
      The finished ones by seed, each seed once, and the paths of those that are not finished.

    Raises:
      UserError: a path is no run, or one of another config.
    """
    directories = [RunDirectory(path) for path in paths]
    unfinished = [str(one.path) for one in directories if one.has_begun and one.result() is None]
    seeds: dict[int, Seed] = {}
    for run in read_runs([str(one.path) for one in directories if str(one.path) not in unfinished]):
        if changed := config_diff({**run.config, "seed": config.seed}, to_json_dict(config)):
            raise UserError(
                f"{run.path} is a run of another config ({'; '.join(changed)}); leave it out"
            )
        seeds.setdefault(run.config["seed"], _seed(run))
    return [seeds[number] for number in sorted(seeds)], unfinished


def _seed(run: Run) -> Seed:
    result, now = run.result or {}, run.environments[-1] if run.environments else {}
    if run.dataset is None:
        raise UserError(f"{run.path} does not say what it was trained on; leave it out")
    epochs = _epochs(run)
    flop = run_flop(run.config, run.dataset, result["num_steps"])
    versions = {"python": now.get("python"), **now.get("packages", {})}
    return Seed(
        seed=run.config["seed"],
        accuracy=run.accuracy,
        tta_accuracy=result.get("tta_test_accuracy"),
        training_seconds=epochs[-1][1],
        wall_seconds=result["wall_seconds"],
        num_steps=result["num_steps"],
        num_processes=max(len(run.starts), 1),
        epochs=epochs,
        training_flop=flop.training,
        evaluation_flop=flop.evaluation,
        digest=result["digest"],
        commit=now.get("commit"),
        device=device_text(now),
        versions={name: version for name, version in versions.items() if version},
    )


def _epochs(run: Run) -> list[tuple[float, float, float, float]]:
    """As in `Seed`. What was compiled may be in the speed of an epoch, or hide a part of it.

    So an epoch in which something was compiled counts with the median speed of the others with
    images of the same size, if there are others.
    """
    ends = [record["step"] for record in run.records]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    speeds = [record["images_per_second"] for record in run.records]
    stages = run_stages(run.config, run.dataset, ends[-1])
    starts = [*(run.starts or [0]), *(stage.start for stage in stages)]
    compiled = [any(begin <= start < end for start in starts) for begin, end in spans]
    scales = [
        [stage.scale for stage in stages if stage.start < end and begin < stage.stop]
        for begin, end in spans
    ]
    clean = [i for i, mark in enumerate(compiled) if not mark]
    found: list[tuple[float, float, float, float]] = []
    seconds = 0.0
    for i, record in enumerate(run.records):
        others = [speeds[other] for other in clean if scales[other] == scales[i]]
        speed = statistics.median(others) if others and compiled[i] else speeds[i]
        begin, end = spans[i]
        seconds += (end - begin) * run.config["batch_size"] / speed
        flop = run_flop(run.config, run.dataset, end).training
        found.append((record["epoch"], seconds, record["test_accuracy"], flop))
    return found


def device_text(environment: dict[str, Any]) -> str:
    """The devices of `environment.json` in words; of CPUs also the processor.

    >>> processor = {"model": "AMD EPYC"}
    >>> device_text({"devices": ["cpu", "cpu"], "processor": processor, "cores": 2})
    '2 x cpu (AMD EPYC, 2 cores)'
    >>> device_text({"devices": ["NVIDIA H100"], "processor": processor, "cores": 16})
    '1 x NVIDIA H100'
    """
    devices = environment.get("devices") or ["unknown device"]
    text = f"{len(devices)} x {devices[0]}"
    if devices[0] != "cpu":
        return text
    model = (environment.get("processor") or {}).get("model")
    return f"{text} ({model}, {environment.get('cores')} cores)"


def evaluation_seconds(experiment: Experiment) -> float:
    """Seconds of the last evaluation of a run, with its views of each image, once it is compiled.

    They do not depend on the weights: these are fresh.
    """
    state, runtime = experiment.initial_state(), experiment.config.runtime
    for _ in range(2):
        begun = time.perf_counter()
        evaluate(
            state,
            experiment.pipeline.test,
            batch_size=runtime.eval_batch_size,
            tta=experiment.config.evaluation.tta,
        )
        seconds = time.perf_counter() - begun
    return seconds


def run_directory(workdir: Path, seed: int) -> Path:
    """Where the run of a seed is."""
    return workdir / f"seed-{seed}"
