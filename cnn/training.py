"""The training loop.

The way to the gradient: `compile_train_steps` (execution) -> `train_steps` -> `train_step` ->
`jax.grad` (steps). The way of a run around the loop: `open_run` and `Run.finish` (runs). What it
writes at the end of an epoch: `Ledger.end_epoch` (ledger).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import optax

from cnn.augment import Augment
from cnn.config import check_config
from cnn.data import Dataset
from cnn.errors import Interrupted, UserError
from cnn.execution import compile_train_steps
from cnn.experiment import Experiment, create_experiment, describe_given, devices_of
from cnn.losses import LossFn
from cnn.members import is_group
from cnn.metrics import MetricsAccumulator
from cnn.results import present_result
from cnn.runs import Run, open_run
from cnn.runtime.progress import Progress
from cnn.runtime.signals import GracefulShutdown
from cnn.runtime.writers import Writer
from cnn.steps import TrainState


def train_and_evaluate(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    augment: Augment | None = None,
    writers: Sequence[Writer] = (),
) -> tuple[TrainState, dict[str, Any]]:
    """Trains as a config says, or resumes the same run.

    In the main thread it handles Ctrl-C, SIGTERM and other signals while it trains: it saves before
    it stops. What is passed in place of what the config names is recorded by its name and a digest
    of its source; a run is not resumed with another object, as far as these tell them apart.

    Args:
      config: a `ConfigDict` with the fields of `configs/baseline.py`. A fresh run takes its weights
        from the run `config.init_from`, if that is set: see `cnn.transfer`.
      workdir: the run directory; made if it is not there.
      dataset: used instead of the one that the config names; so are the arguments up to `augment`.
      model: any linen module that returns logits; see `create_train_state`.
      tx: any Optax optimizer, with its own schedule, if any.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`.
      augment: (key, images `uint8[B, H, W, C]`) -> images; see `cnn.augment`.
      writers: each is called with the record of an epoch, a line of `metrics.jsonl`. One that
        raises an error is not called again: that is a warning.

    Returns:
      The final state, and what `result.json` holds: accuracies are fractions, and losses
      in the unit of the loss.

    Raises:
      UserError: if config, data or directory cannot give a run (nothing is written then), if the
        run cannot be saved, or if the loss or the gradients are not finite.
      Interrupted: after Ctrl-C or SIGTERM.
    """
    config = check_config(config)
    if is_group(config):
        raise UserError(
            "num_seeds and sweep make a group of runs, which train_group trains; "
            "train_and_evaluate trains one: set num_seeds=1 and no sweep"
        )
    given = {"model": model, "tx": tx, "loss_fn": loss_fn, "augment": augment, "dataset": dataset}
    described = describe_given(config, **given)

    def create() -> Experiment:
        return create_experiment(config, devices_of(config), **given)

    with open_run(config, workdir, create, described=described, writers=writers) as run:
        if run.result is None:
            train_run(run)
        assert run.result is not None
        present_result(run.state, run.experiment, run.directory, run.result, is_new=run.is_new)
    return run.state, run.result


def train_run(run: Run) -> None:
    """Trains a run that is not finished, from its state's step to the last or to an early stop."""
    experiment, checkpoints, ledger = run.experiment, run.checkpoints, run.ledger
    run.begin()
    pipeline, metrics, step = experiment.pipeline, ledger.metrics, int(run.state.step)
    train_steps = compile_train_steps(run.state, pipeline)
    progress = Progress(
        num_steps=experiment.num_steps,
        steps_per_epoch=experiment.steps_per_epoch,
        batch_size=pipeline.batch_size,
        test_count=len(experiment.dataset.test),
        start_step=step,
        best_accuracy=ledger.best_accuracy,
    )
    with progress, GracefulShutdown() as shutdown:
        while step < experiment.num_steps and experiment.early_stop(ledger.records) is None:
            if metrics is None:
                progress.begin_epoch(step)
            accumulator, signum = MetricsAccumulator(step, metrics), None
            for batches, num_steps in pipeline.batches(step, experiment.next_stop(step)):
                step += num_steps
                what = train_steps.what_compiles(batches, num_steps)
                with progress.first_time(what, step):
                    run.state, scores = train_steps(run.state, batches, num_steps)
                accumulator.add(scores, num_steps)
                checkpoints.check_for_errors()
                if progress.due() and len(accumulator.pending) > 1:
                    # All but the newest call: the devices compute it while the host reads.
                    so_far = ledger.fetch(run.state, accumulator, keep_newest=1)
                    progress.show(step - num_steps, so_far)
                if signum := shutdown.requested():
                    break
            metrics = ledger.fetch(run.state, accumulator)
            if step < experiment.num_steps and step % experiment.steps_per_epoch:
                if progress.due():
                    progress.show(step, metrics)
                ledger.save_within_epoch(run.state, metrics)
            else:
                speed = progress.images_per_second(step)
                progress.evaluating(step)
                with progress.first_time("compiling the evaluation", step):
                    tested = run.test()
                progress.epoch(ledger.end_epoch(run.state, metrics, tested, speed))
                metrics = None
            # A preemption notice is given once, so the answer is kept.
            if signum := signum or shutdown.requested():
                checkpoints.wait_until_finished()
                raise _interrupted(signum, experiment, step)
    run.finish()


def _interrupted(signum: int, experiment: Experiment, step: int) -> Interrupted:
    return Interrupted(
        f"stopped by {signal.Signals(signum).name} at step {step:,} of {experiment.num_steps:,}, "
        f"which is saved; the same command resumes there",
        signum,
    )
