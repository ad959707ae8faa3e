"""The end of a run: pictures, and `result.json`."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.checkpoints import digest
from cnn.data import Split
from cnn.data.batches import DeviceSplit
from cnn.plan import Plan
from cnn.plots import plot_curves, plot_samples
from cnn.report import RunDirectory
from cnn.steps import TrainState, predict_step

_SHOWN_SAMPLES = 24
_FINAL = ("test_accuracy", "test_loss", "test_count", "train_accuracy", "train_loss")


def conclude(state: TrainState, plan: Plan, run: RunDirectory, started: float) -> dict[str, Any]:
    """Draws the pictures, then writes `result.json`, which marks the run as finished.

    Args:
      state: after the last step.
      plan: of the run.
      run: where its records are.
      started: when it began, on the monotonic clock.
    """
    records, test = run.records(), plan.dataset.test
    last, best = records[-1], max(records, key=lambda r: (r["test_accuracy"], r["step"]))
    title = f"{type(plan.model).__name__} on {plan.dataset.name}, seed {plan.config.seed}"
    plot_curves(records, run.path / "curves.png", title=title)
    shown = Split(test.images[:_SHOWN_SAMPLES], test.labels[:_SHOWN_SAMPLES])
    plot_samples(
        shown,
        _predict(state, plan, shown),
        plan.dataset.class_names,
        run.path / "samples.png",
        title=f"{title}: predicted class of the first test images",
    )
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


def _predict(state: TrainState, plan: Plan, split: Split) -> np.ndarray:
    """The predicted classes of a few images, `int[N]`."""
    return np.asarray(plan.jit_once(_classes)(state, plan.place(split)))


def _classes(state: TrainState, split: DeviceSplit) -> jax.Array:
    batch = split.take(jnp.arange(split.labels.shape[0]))
    return predict_step(state, batch["image"]).argmax(-1)
