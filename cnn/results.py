"""The end of a run: `result.json`, what a person reads of it, and pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.data import Split
from cnn.data.pipeline import DeviceSplit
from cnn.errors import one_line
from cnn.experiment import Experiment
from cnn.interval import wilson_interval
from cnn.runtime.checkpoints import digest
from cnn.runtime.plots import plot_curves, plot_samples
from cnn.runtime.progress import format_duration
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log_warning, shown, waiting
from cnn.runtime.table import percent
from cnn.steps import TrainState, predict_step

_SHOWN_SAMPLES = 24
_CURVES, _SAMPLES = "curves.png", "samples.png"
_FINAL = ("test_accuracy", "test_loss", "test_count", "train_accuracy", "train_loss")


def conclude(
    state: TrainState, plan: Experiment, run: RunDirectory, started: float
) -> dict[str, Any]:
    """Writes `result.json`, which marks the run as finished.

    Args:
      state: after the last step.
      plan: of the run.
      run: where its records are.
      started: when it began, on the monotonic clock.

    Returns:
      What `result.json` holds.
    """
    records = run.records()
    last, best = records[-1], max(records, key=lambda r: (r["test_accuracy"], r["step"]))
    result = {
        **{name: last[name] for name in _FINAL},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_epochs": plan.config.num_epochs,
        "num_steps": plan.num_steps,
        "skipped_steps": sum(record["skipped_steps"] for record in records),
        "seed": plan.config.seed,
        "dataset": plan.dataset.fingerprint,
        "digest": digest(state),
        "wall_seconds": time.monotonic() - started,
    }
    run.write("result.json", result)
    return result


def result_text(result: Mapping[str, Any], width: int) -> str:
    """The figures of a finished run, for people.

    Args:
      result: what `result.json` holds.
      width: columns that the screen has; on a narrow one the digest is cut.
    """
    accuracy, count = result["test_accuracy"], result["test_count"]
    low, high = wilson_interval(round(accuracy * count), count)
    best, epoch = percent(result["best_test_accuracy"]), result["best_epoch"]
    lines = (
        f"test accuracy {percent(accuracy)} of {count:,} images",
        f"95 % interval: {100 * low:.2f} to {percent(high)} (Wilson score; one run)",
        f"best: {best} after epoch {epoch:,}",
        f"time: {format_duration(result['wall_seconds'])}",
    )
    whole = f"digest: {result['digest']}"
    short = f"digest: {result['digest'][:12]}... (result.json)"
    return "\n  ".join(lines) + "\n" + (whole if len(whole) <= width else short)


def draw_pictures(
    state: TrainState, plan: Experiment, run: RunDirectory, *, only_missing: bool = False
) -> None:
    """Draws the pictures of a finished run; a failure costs a line of warning, never the result.

    Args:
      state: after the last step.
      plan: of the run.
      run: where its records are, and where the pictures go.
      only_missing: leave pictures that are there as they are.
    """
    names = [n for n in (_CURVES, _SAMPLES) if not (only_missing and (run.path / n).exists())]
    failed: dict[str, Exception] = {}
    if not names:
        return
    with waiting("drawing the pictures"):
        for name in names:
            try:
                _draw(run.path / name, state, plan, run)
            except Exception as error:  # whatever it is
                failed[name] = error
    if failed:
        error = next(iter(failed.values()))
        log_warning(
            f"{' and '.join(failed)} cannot be drawn ({type(error).__name__}: "
            f"{one_line(str(error), limit=200)}); the result is complete, and the same command "
            f"draws what is missing"
        )


def see(run: RunDirectory) -> str:
    """Where the files of a finished run are."""
    names = ("result.json", "metrics.jsonl", _CURVES, _SAMPLES)
    return f"see {shown(run.path)}: {', '.join(n for n in names if (run.path / n).exists())}"


def _draw(path: Path, state: TrainState, plan: Experiment, run: RunDirectory) -> None:
    """Draws a picture, which appears when it is whole."""
    title = f"{type(plan.model).__name__} on {plan.dataset.name}, seed {plan.config.seed}"
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.png")
    try:
        if path.name == _CURVES:
            plot_curves(
                run.records(), temporary, title=title, label_smoothing=plan.config.label_smoothing
            )
        else:
            test = plan.dataset.test
            shown = Split(test.images[:_SHOWN_SAMPLES], test.labels[:_SHOWN_SAMPLES])
            title = f"{title}: predicted class of the first test images"
            names = plan.dataset.class_names
            predictions = _predict(state, plan, shown)
            plot_samples(shown.images, shown.labels, predictions, names, temporary, title=title)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _predict(state: TrainState, plan: Experiment, split: Split) -> np.ndarray:
    """The predicted classes of a few images, `int[N]`."""
    return np.asarray(plan.jit_once(_classes)(state, plan.place(split)))


def _classes(state: TrainState, split: DeviceSplit) -> jax.Array:
    batch = split.take(jnp.arange(split.labels.shape[0]))
    return predict_step(state, batch["image"]).argmax(-1)
