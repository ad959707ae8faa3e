"""The training loop.

The way to the gradient: `compile_train_steps` (execution) -> `train_steps` -> `train_step` ->
`jax.grad` (steps).

Order within an epoch: make all steps, evaluate, append the record, save the checkpoint. So every
record that a checkpoint holds is on disk before it, and a resumed run repeats at most the steps
after its checkpoint, with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

from cnn.augment import Augment
from cnn.config import check_config, to_json_dict
from cnn.data import Dataset
from cnn.divergence import DivergenceChecks
from cnn.errors import Interrupted, UserError
from cnn.evaluation import evaluate
from cnn.execution import compile_train_steps
from cnn.experiment import SECTIONS, Experiment, create_experiment, describe
from cnn.losses import LossFn, evaluation_loss
from cnn.members import is_group
from cnn.metrics import Metrics, MetricsAccumulator
from cnn.results import epoch_record, final_result, present_result
from cnn.resume import check_same_config, environments_of_parts, restore
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.devices import select_devices
from cnn.runtime.disk import describe_disk_error, is_disk_error
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.progress import Progress
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, waiting, warning_on_failure, width
from cnn.runtime.signals import GracefulShutdown
from cnn.runtime.writers import TensorBoardWriter, Writer, require_tensorboard
from cnn.steps import TrainState
from cnn.transfer import find_source, transfer


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
            "num_seeds and sweep make a group of runs, which train_group trains; train_and_evaluate "
            "trains one: set num_seeds=1 and no sweep"
        )
    given = {"model": model, "tx": tx, "loss_fn": loss_fn, "augment": augment, "dataset": dataset}
    replaced = [name for name, value in given.items() if value is not None]

    def create() -> Experiment:
        return create_experiment(config, devices_of(config), **given)

    return train_run(config, workdir, create, replaced=replaced, writers=writers)


def devices_of(config: Any) -> list[Any]:
    """The devices that a checked config names."""
    runtime = config.runtime
    with waiting("starting the devices"):
        return select_devices(
            runtime.platform, runtime.num_devices, deterministic=runtime.deterministic
        )


def train_run(
    config: Any,
    workdir: str | os.PathLike[str],
    create: Callable[[], Experiment],
    *,
    replaced: Sequence[str] = (),
    writers: Sequence[Writer] = (),
    presents: bool = True,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains or resumes the run of an experiment.

    Args:
      config: of the run, checked.
      workdir: the run directory.
      create: makes its experiment; called when config and directory fit each other.
      replaced: which arguments of `create_experiment` a script passes.
      writers: of the records.
      presents: whether experiment and result are printed, and pictures are drawn.

    Returns:
      As `train_and_evaluate`.

    Raises:
      UserError: as for `train_and_evaluate`.
      Interrupted: after a signal.
    """
    started = time.monotonic()
    runtime = config.runtime
    with RunDirectory(workdir) as run, pinned_settings(), explained_disk_errors(run):
        if run.is_group:
            raise UserError(
                f"{run.path} holds a group of runs, in {run.members}; choose another --workdir"
            )
        finished = run.check()
        if runtime.tensorboard:
            require_tensorboard()
        # Compared before the data is loaded; objects from a script are compared below.
        sections = [SECTIONS[name] for name in replaced]
        sections += ["schedule"] if "tx" in replaced else []
        source = find_source(config.init_from, run)
        check_same_config(run, to_json_dict(config), but=sections)
        experiment = create()
        recorded = {**to_json_dict(config), **experiment.given}
        with compilation_cache(runtime.compilation_cache):
            with waiting("initializing the model"):
                state, origin = experiment.initial_state(), None
            if source is not None:
                state, origin = transfer(experiment, state, source, recorded)
            if presents:
                log(describe(experiment, state.variables, width=width()))
            check_same_config(run, recorded)
            if finished is None:
                run.lock()
            with CheckpointManager(run.checkpoints) as checkpoints:
                state, saved = restore(experiment, run, checkpoints, state, recorded)
                # A run that stopped early has fewer steps than its config says.
                is_complete = finished is not None and int(state.step) == finished.get("num_steps")
                if not is_complete:
                    run.lock()  # a finished run whose last checkpoint is damaged is trained again
                    run.delete_result()
                    saved |= {"config": recorded, "dataset": experiment.dataset_record}
                    saved.setdefault("init_from", origin)
                    saved["environments"] = environments_of_parts(
                        experiment, int(state.step), saved
                    )
                    started -= saved.get("wall_seconds", 0.0)
                    state, records = _train(
                        experiment, run, checkpoints, state, saved, list(writers), started
                    )
                    augmented = _augmented_test(state, experiment)
                    seconds = time.monotonic() - started
                    finished = final_result(state, experiment, records, seconds) | augmented
                    finished |= {"init_from": saved["init_from"]} if config.init_from else {}
                    run.write("result.json", finished)
            assert finished is not None
            if presents:
                present_result(state, experiment, run, finished, is_new=not is_complete)
    return state, finished


def _train(
    experiment: Experiment,
    run: RunDirectory,
    checkpoints: CheckpointManager,
    state: TrainState,
    saved: dict[str, Any],
    writers: list[Writer],
    started: float,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains from the state's step to the last, or to that of an early stop.

    Args:
      experiment: of the run.
      run: where its files go.
      checkpoints: where its states go.
      state: fresh, or restored.
      saved: what a checkpoint holds beside the state; without `records` for a fresh one.
      writers: of the records.
      started: when the run began, on the monotonic clock.

    Returns:
      The final state, and one record per epoch.
    """
    config, pipeline = experiment.config, experiment.pipeline
    checks = DivergenceChecks(experiment, checkpoints)
    records = list(saved.get("records", []))
    # Of the epoch in which the checkpoint was saved; None at its beginning.
    metrics = Metrics(**saved["epoch_metrics"]) if "epoch_metrics" in saved else None

    def save(**about: Any) -> None:
        checks.check_weights(state)
        kept = {name: saved[name] for name in ("config", "dataset", "environments", "init_from")}
        kept |= {"wall_seconds": time.monotonic() - started}
        checkpoints.save(state, {**kept, "records": records, **about})

    def fetch(accumulator: MetricsAccumulator, keep_newest: int = 0) -> Metrics:
        metrics = accumulator.fetch(keep_newest)
        checks.check_steps(state, accumulator)
        return metrics

    if "records" not in saved:
        # Step 0 is saved before config.json exists. A directory with a config but without
        # checkpoints has then lost them, and is not taken for a fresh one.
        with waiting("saving the initial state"):
            save()
            checkpoints.wait_until_finished()
    run.begin(saved["config"], records)
    run.write("dataset.json", saved["dataset"])
    with warning_on_failure("environment.json is not written"):
        *earlier, now = saved["environments"]
        run.write("environment.json", {**now, "earlier": earlier})
    if config.runtime.tensorboard:
        with warning_on_failure("no records are written for TensorBoard"):
            writers.append(TensorBoardWriter(run.path / "tensorboard", records))
    with waiting("copying the images to the devices"):
        jax.block_until_ready((pipeline.train, pipeline.test))
    train_steps = compile_train_steps(state, pipeline)
    step = int(state.step)
    progress = Progress(
        num_steps=experiment.num_steps,
        steps_per_epoch=experiment.steps_per_epoch,
        batch_size=config.batch_size,
        test_count=len(experiment.dataset.test),
        start_step=step,
        best_accuracy=max((record["test_accuracy"] for record in records), default=0.0),
    )
    with progress, GracefulShutdown() as shutdown:
        while step < experiment.num_steps and experiment.early_stop(records) is None:
            if metrics is None:
                progress.begin_epoch(step)
            accumulator, signum = MetricsAccumulator(step, metrics), None
            for batches, num_steps in pipeline.batches(step, experiment.next_stop(step)):
                step += num_steps
                with progress.first_time(train_steps.what_compiles(num_steps), step):
                    state, scores = train_steps(state, batches, num_steps)
                accumulator.add(scores, num_steps)
                checkpoints.check_for_errors()
                if progress.due() and len(accumulator.pending) > 1:
                    # All but the newest call: the devices compute it while the host reads.
                    progress.show(step - num_steps, fetch(accumulator, keep_newest=1))
                if signum := shutdown.requested():
                    break
            metrics = fetch(accumulator)
            if step < experiment.num_steps and step % experiment.steps_per_epoch:
                if progress.due():
                    progress.show(step, metrics)
                save(epoch_metrics=dataclasses.asdict(metrics))
            else:
                speed = {"images_per_second": progress.images_per_second(step)}
                progress.evaluating(step)
                with progress.first_time("compiling the evaluation", step):
                    tested = _test(state, experiment)
                checks.check_epoch(state, metrics, tested)
                record = epoch_record(experiment, state, metrics, tested, records) | speed
                records.append(record)
                run.append(record)
                _write(record, writers)
                save(test_accuracy=record["test_accuracy"])
                progress.epoch(record)
                metrics = None
            # A preemption notice is given once, so the answer is kept.
            if signum := signum or shutdown.requested():
                checkpoints.wait_until_finished()
                raise _interrupted(signum, experiment, step)
    with waiting("saving the last checkpoint"):
        checkpoints.wait_until_finished()
    return state, records


def _test(state: TrainState, experiment: Experiment, tta: str = "none") -> Metrics:
    """Scores the test images by the loss without label smoothing."""
    return evaluate(
        state.replace(loss_fn=evaluation_loss(experiment.loss_fn)),
        experiment.pipeline.test,
        batch_size=experiment.config.runtime.eval_batch_size,
        tta=tta,
    )


def _augmented_test(state: TrainState, experiment: Experiment) -> dict[str, Any]:
    """What `result.json` has of test-time augmentation; nothing if it is off."""
    if (tta := experiment.config.evaluation.tta) == "none":
        return {}
    with waiting("evaluating with test-time augmentation"):
        means = _test(state, experiment, tta).means()
    return {f"tta_test_{name}": value for name, value in means.items()}


def _write(record: dict[str, Any], writers: list[Writer]) -> None:
    """Passes a record to the writers; one that fails is dropped with a warning."""
    for writer in list(writers):
        name = getattr(writer, "__name__", type(writer).__name__)
        with warning_on_failure(f"the writer {name} gets no more records"):
            writers.remove(writer)
            writer(dict(record))  # what a writer changes is its own
            writers.append(writer)


def _interrupted(signum: int, experiment: Experiment, step: int) -> Interrupted:
    return Interrupted(
        f"stopped by {signal.Signals(signum).name} at step {step:,} of {experiment.num_steps:,}, "
        f"which is saved; the same command resumes there",
        signum,
    )


@contextlib.contextmanager
def explained_disk_errors(run: RunDirectory) -> Iterator[None]:
    """Turns errors of the disk that holds the run into one line."""
    try:
        yield
    except OSError as error:
        if not is_disk_error(error, run.path):
            raise
        raise UserError(
            f"the run cannot continue: {describe_disk_error(error, run.path)}"
            f"{CheckpointManager(run.checkpoints).resume_hint()}"
        ) from error
