"""Shows layers, memory and time of a config, without training.

    python -m cnn summary digits
    python -m cnn summary resnet18 --config.batch_size=64 --no-measure

The time of a step is measured in one call of the compiled training steps, on this machine, after
one that warms up. Nothing is written but the decoded dataset and compiled programs in the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from cnn.augment.resizing import Stage
from cnn.commands.common import print_json
from cnn.commands.prepare import prepared
from cnn.execution import compile_train_steps
from cnn.experiment import Experiment, describe, num_frozen
from cnn.models.summary import model_layers
from cnn.runtime.progress import format_duration
from cnn.runtime.screen import log, waiting, width
from cnn.steps import TrainState

TAKES_CONFIG = True
_MEASURED_SECONDS = 1.0  # that the measured call should take, if a call has as many steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="compile and measure nothing: no temporaries and no times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Prints the summary."""
    with prepared(arguments.chosen.config) as experiment:
        state = experiment.initial_shapes()
        figures = _figures(experiment, state)
        if not arguments.json:
            log(describe(experiment, state.variables, width=width()))
        if not arguments.no_measure:
            figures |= _measure(experiment)
    if arguments.json:
        print_json({"config": arguments.chosen.name, **figures})
    else:
        log(_text(figures))


def _figures(experiment: Experiment, state: TrainState) -> dict[str, Any]:
    """What follows from shapes.

    Args:
      experiment: to be summarized.
      state: its first state, as shapes and dtypes.
    """
    data = experiment.dataset
    layers = model_layers(experiment.model, state.variables, data.image_shape)
    return {
        "dataset": data.name,
        "image_shape": list(data.image_shape),
        "num_classes": data.num_classes,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "batch_size": experiment.pipeline.batch_size,
        "devices": [device.device_kind for device in experiment.mesh.devices.flat],
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_frozen": num_frozen(experiment, state.params),
        "flops_per_image": sum(layer.flops for layer in layers),
        "memory_bytes": {
            "parameters": _size(state.params),
            "other_collections": _size(state.model_state),
            "averages": _size(state.averaged),
            "optimizer_state": _size(state.opt_state),
            "dataset": sum(
                array.nbytes
                for split in (data.train, data.test)
                for array in (split.images, split.labels)
            ),
        },
        "steps_per_epoch": experiment.steps_per_epoch,
        "num_epochs": experiment.epoch(experiment.num_steps),
        "num_steps": experiment.num_steps,
        "num_images": experiment.num_steps * experiment.pipeline.batch_size,
    }


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _measure(experiment: Experiment) -> dict[str, Any]:
    """Temporaries of the compiled step, and times; the state that is trained is thrown away."""
    with waiting("initializing the model"):
        state = experiment.initial_state()
    parts = []
    for stage in experiment.stages:
        state, part = _measure_stage(experiment, state, stage)
        parts.append((stage.stop - stage.start, part))

    def mean(name: str) -> float:
        return sum(steps * part[name] for steps, part in parts) / experiment.num_steps

    known = [found for _, part in parts if (found := part["temporary_bytes"]) is not None]
    step_seconds, batch_seconds = mean("step_seconds"), mean("batch_seconds")
    seconds = step_seconds + batch_seconds
    return {
        "temporary_bytes": max(known, default=None),
        "measured_steps": sum(part["measured_steps"] for _, part in parts),
        "step_seconds": step_seconds,
        "batch_seconds": batch_seconds,
        "images_per_second_estimate": experiment.pipeline.batch_size / seconds,
        "epoch_seconds_estimate": seconds * experiment.steps_per_epoch,
        "run_seconds_estimate": seconds * experiment.num_steps,
    }


def _measure_stage(
    experiment: Experiment, state: TrainState, stage: Stage
) -> tuple[TrainState, dict[str, Any]]:
    """With images of one size: the state after some steps, and what they took."""
    pipeline = experiment.pipeline
    most = pipeline.steps_per_execution
    train_steps = compile_train_steps(state, pipeline)

    def make_batches() -> Any:
        batches, _ = next(pipeline.batches(stage.start, stage.stop))
        return batches

    batches = jax.block_until_ready(make_batches())
    with waiting(train_steps.what_compiles(batches, most)):
        temporaries = _temporaries(train_steps.lower(state, batches, most).compile())

        def train(num_steps: int) -> Any:
            nonlocal state
            state, metrics = train_steps(state, batches, num_steps)
            return state, metrics

        # A CPU takes any number of steps without compiling again, and may take long for many.
        num_steps = most if train_steps.compiles_each_length else 1
        _seconds(train, num_steps)
    with waiting("measuring"):
        if num_steps < most:
            num_steps = min(most, max(1, int(_MEASURED_SECONDS / _seconds(train, num_steps))))
        step_seconds = _seconds(train, num_steps) / num_steps
        batch_seconds = _seconds(make_batches) / most
    return state, {
        "temporary_bytes": temporaries,
        "measured_steps": num_steps,
        "step_seconds": step_seconds,
        "batch_seconds": batch_seconds,
    }


def _seconds(call: Callable[..., Any], *args: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - begun


def _temporaries(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on each device; None where the backend does not tell them."""
    try:
        analysis = compiled.memory_analysis()
    except Exception:  # of many kinds, from backends without an analysis
        return None
    return getattr(analysis, "temp_size_in_bytes", None)


def _text(figures: dict[str, Any]) -> str:
    memory = figures["memory_bytes"]
    lines = [
        f"run: {figures['steps_per_epoch']:,} steps in each epoch, {figures['num_steps']:,} in "
        f"{figures['num_epochs']:g} epochs, {figures['num_images']:,} images",
        "memory on each device:",
    ]
    parts = [(name.replace("_", " "), size) for name, size in memory.items() if size]
    if (temporaries := figures.get("temporary_bytes")) is not None:
        parts.append(("temporaries of the compiled step", temporaries))
    elif "step_seconds" in figures:
        lines.append("  temporaries of the compiled step: not known on this backend")
    longest = max(len(name) for name, _ in parts)
    lines += [f"  {name:<{longest}}  {size / 1e6:>10,.2f} MB" for name, size in parts]
    if "step_seconds" not in figures:
        return "\n".join(lines)
    lines += [
        f"step: {1e3 * figures['step_seconds']:.2f} ms, measured over "
        f"{figures['measured_steps']:,} in one call; its batch: "
        f"{1e3 * figures['batch_seconds']:.2f} ms",
        f"estimate: {figures['images_per_second_estimate']:,.0f} images/s, "
        f"{_duration(figures['epoch_seconds_estimate'])} an epoch, "
        f"{_duration(figures['run_seconds_estimate'])} the run, without compilation, "
        f"evaluation and saving",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else format_duration(seconds)
