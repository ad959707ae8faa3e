"""The figures of a run, for files and for people, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.data import Split
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError, one_line
from cnn.experiment import Experiment
from cnn.metrics import Metrics, wilson_interval
from cnn.runtime.checkpoints import digest
from cnn.runtime.plots import plot_curves, plot_samples
from cnn.runtime.progress import format_duration
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import (
    log,
    log_warning,
    shown,
    waiting,
    warning_on_failure,
    width,
)
from cnn.runtime.table import epoch_number, loss, percent
from cnn.runtime.writers import TensorBoardWriter
from cnn.steps import TrainState, predict_step

_NUM_SAMPLES = 24
_CURVES, _SAMPLES = "curves.png", "samples.png"


def epoch_record(
    experiment: Experiment,
    state: TrainState,
    trained: Metrics,
    tested: Metrics,
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One line of `metrics.jsonl`, but for the speed.

    Training figures are means over the steps of the epoch, each before its update. The train loss
    is the training objective; the test loss is without label smoothing.

    Args:
      experiment: of the run.
      state: after the epoch.
      trained: of the epoch's steps.
      tested: of all test images.
      records: of the epochs before.
    """
    step, begun = int(state.step), records[-1]["step"] if records else 0
    skipped = step - begun - int(trained.count) // experiment.images_per_step
    before = sum(record["skipped_steps"] for record in records)
    rate = experiment.learning_rate(step - before - skipped, state.opt_state)
    return {
        "step": step,
        "epoch": experiment.epoch(step),
        **{f"train_{name}": value for name, value in trained.means().items()},
        **{f"test_{name}": value for name, value in tested.means().items()},
        "test_count": tested.count,
        **({} if rate is None else {"learning_rate": rate}),
        "skipped_steps": skipped,
    }


def final_result(
    state: TrainState,
    experiment: Experiment,
    records: Sequence[Mapping[str, Any]],
    wall_seconds: float,
) -> dict[str, Any]:
    """What `result.json` holds.

    Args:
      state: after the last step.
      experiment: of the run.
      records: one per epoch, in order.
      wall_seconds: of the run, earlier processes included.
    """
    last, best = records[-1], max(records, key=lambda r: (r["test_accuracy"], r["step"]))
    is_early = last["step"] < experiment.num_steps
    return {
        **{name: last[name] for name in last if name.startswith(("test_", "train_"))},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_epochs": last["epoch"],
        "num_steps": last["step"],
        **({"stopped_early": experiment.early_stop(records)} if is_early else {}),
        "skipped_steps": sum(record["skipped_steps"] for record in records),
        "seed": experiment.config.seed,
        "dataset": experiment.dataset.fingerprint,
        "digest": digest(state),
        "wall_seconds": wall_seconds,
    }


def options_text(figures: Mapping[str, Any]) -> list[str]:
    """A line each about test-time augmentation and an early stop, if there was any.

    Args:
      figures: what `result.json` holds.
    """
    lines = []
    if (accuracy := figures.get("tta_test_accuracy")) is not None:
        lines.append(f"with test-time augmentation: {percent(accuracy)}")
    if (stop := figures.get("stopped_early")) is not None:
        value = (loss if stop["monitor"].endswith("_loss") else percent)(stop["best"])
        lines.append(
            f"stopped early after epoch {epoch_number(stop['epoch'])}: best {stop['monitor']} "
            f"{value} after epoch {epoch_number(stop['best_epoch'])}"
        )
    return lines


def _result_text(result: Mapping[str, Any], width: int) -> str:
    """The figures of a finished run, for people.

    Args:
      result: what `result.json` holds.
      width: columns that the screen has; on a narrow one the digest is cut.
    """
    accuracy, count = result["test_accuracy"], result["test_count"]
    low, high = wilson_interval(round(accuracy * count), count)
    best, epoch = percent(result["best_test_accuracy"]), epoch_number(result["best_epoch"])
    lines = (
        f"test accuracy {percent(accuracy)} of {count:,} images",
        f"95 % interval: {100 * low:.2f} to {percent(high)} (Wilson score; one run)",
        *options_text(result),
        f"best: {best} after epoch {epoch}",
        f"time: {format_duration(result['wall_seconds'])}",
    )
    whole = f"digest: {result['digest']}"
    short = f"digest: {result['digest'][:12]}... (result.json)"
    return "\n  ".join(lines) + "\n" + (whole if len(whole) <= width else short)


def present_result(
    state: TrainState,
    experiment: Experiment,
    run: RunDirectory,
    result: Mapping[str, Any],
    *,
    is_new: bool,
) -> None:
    """Prints the result of a finished run and draws its pictures.

    Args:
      state: after the last step.
      experiment: of the run.
      run: its directory.
      result: what `result.json` holds.
      is_new: whether this process has finished the run; else only what is missing is drawn.

    Raises:
      UserError: the state is not the one of the result.
    """
    if not is_new and digest(state) != result["digest"]:
        raise UserError(
            f"the latest checkpoint of {run.path} is not the state of its result.json; "
            f"choose another --workdir"
        )
    log(f"finished{'' if is_new else ' before'}: {_result_text(result, width())}")
    _draw_pictures(state, experiment, run, only_missing=not is_new)
    if not is_new and experiment.config.runtime.tensorboard:  # it may be wanted only now
        with warning_on_failure("no records are written for TensorBoard"):
            TensorBoardWriter(run.path / "tensorboard", run.records())
    names = ("result.json", "metrics.jsonl", _CURVES, _SAMPLES)
    log(f"see {shown(run.path)}: {', '.join(n for n in names if (run.path / n).exists())}")


def _draw_pictures(
    state: TrainState, experiment: Experiment, run: RunDirectory, *, only_missing: bool = False
) -> None:
    """Draws the pictures of a finished run. A failure is a warning: it never costs the result.

    Args:
      state: after the last step.
      experiment: of the run.
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
                _draw(run.path / name, state, experiment, run)
            except Exception as error:  # of any kind, from fonts to the disk
                failed[name] = error
    if failed:
        error = next(iter(failed.values()))
        log_warning(
            f"{' and '.join(failed)} cannot be drawn ({type(error).__name__}: "
            f"{one_line(str(error), limit=200)}); the result is complete, and the same command "
            f"draws what is missing"
        )


def _draw(path: Path, state: TrainState, experiment: Experiment, run: RunDirectory) -> None:
    """Draws a picture, which appears when it is complete."""
    dataset = experiment.dataset
    title = f"{type(experiment.model).__name__} on {dataset.name}, seed {experiment.config.seed}"
    if path.name == _CURVES:
        smoothing = getattr(experiment.loss_fn, "label_smoothing", 0.0)
        plot_curves([run.records()], path, title=title, label_smoothing=smoothing)
        return
    first = Split(dataset.test.images[:_NUM_SAMPLES], dataset.test.labels[:_NUM_SAMPLES])
    plot_samples(
        first.images,
        first.labels,
        _predict(state, experiment, first),
        dataset.class_names,
        path,
        title=f"{title}: predicted class of the first test images",
    )


def _predict(state: TrainState, experiment: Experiment, split: Split) -> np.ndarray:
    """The predicted classes of a few images, `int[N]`."""
    return np.asarray(experiment.jit_once(_classes)(state, experiment.pipeline.place(split)))


def _classes(state: TrainState, split: DeviceSplit) -> jax.Array:
    batch = split.get_batch(jnp.arange(split.labels.shape[0]))
    return predict_step(state, batch["image"]).argmax(-1)
