"""The training loop.

Order within an epoch: train all steps, evaluate, append the record, save the checkpoint. So a
checkpoint never knows of a record that is not on disk, and a resumed run repeats at most what
came after its checkpoint, with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cnn.augment import augment
from cnn.config import check_config, differences, resolved
from cnn.data.pipeline import DeviceSplit, epoch_permutation
from cnn.errors import Interrupted, UserError, one_line
from cnn.evaluation import evaluate
from cnn.experiment import Experiment, create_experiment
from cnn.metrics import Metrics, MetricsAccumulator
from cnn.models.summary import describe
from cnn.results import conclude, draw_pictures, result_text, see
from cnn.runtime.checkpoints import CheckpointManager, digest
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.devices import (
    batch_sharding,
    data_mesh,
    limit_in_flight,
    replicated_sharding,
    select_devices,
)
from cnn.runtime.disk import describe_disk_error, is_disk_error
from cnn.runtime.environment import begun_at, changes, environment
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.progress import Progress
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, log_warning, waiting, width
from cnn.runtime.signals import GracefulShutdown
from cnn.runtime.writers import TensorBoardWriter, require_tensorboard
from cnn.steps import CrossEntropy, TrainState, train_step, train_steps

_NO_EVENTS = "no more records are written for TensorBoard"


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike[str]
) -> tuple[TrainState, dict[str, Any]]:
    """Trains as a config says, or goes on where the same run stopped.

    In the main thread it takes Ctrl-C and SIGTERM while it trains: it saves before it stops.

    Args:
      config: a `ConfigDict` with all fields of `configs/baseline.py`.
      workdir: the run directory; made if it is not there.

    Returns:
      The final state, and what `result.json` holds: accuracies are fractions, losses in nats.

    Raises:
      UserError: if config, data or directory cannot give a run (nothing is written then), if the
        run cannot be saved, or if the loss or the gradients are not finite.
      Interrupted: after Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    config = check_config(config)
    with RunDirectory(workdir) as run, pinned_settings():
        try:
            return _run(config, run, started)
        except OSError as error:
            if not is_disk_error(error, run.path):
                raise
            raise UserError(
                f"the run cannot go on: {describe_disk_error(error, run.path)}"
                f"{CheckpointManager(run.checkpoints).resume_hint()}"
            ) from error


def _run(config: Any, run: RunDirectory, started: float) -> tuple[TrainState, dict[str, Any]]:
    """`train_and_evaluate` with a checked config; `started` is on the monotonic clock."""
    if (before := run.config()) is not None and (changed := differences(before, resolved(config))):
        raise UserError(
            f"{run.path} holds a run of another config ({'; '.join(changed)}); choose another "
            f"--workdir, or delete that one"
        )
    if (finished := run.result()) is None:
        run.check_writable()
        if run.exists:
            run.lock()
    run.records()  # raises if they are damaged
    if config.tensorboard:
        require_tensorboard()
    with waiting("starting the devices"):
        devices = select_devices(
            config.platform, config.num_devices, deterministic=config.deterministic
        )
    plan = create_experiment(config, data_mesh(devices, config.batch_size))
    with compilation_cache(config.compilation_cache):
        return _train(plan, run, finished, len(devices), started)


def _train(
    plan: Experiment,
    run: RunDirectory,
    finished: dict[str, Any] | None,
    num_devices: int,
    started: float,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains what is left; `finished` is the result if there is one, as the run may be over."""
    with waiting("initializing the model"):
        state = plan.initial_state()
    log(describe(plan, state.variables, num_devices, width=width()))

    if finished is None:
        run.lock()
    with CheckpointManager(run.checkpoints) as checkpoints:
        state, before = _restore(state, plan, run, checkpoints)
        if finished is not None and int(state.step) == plan.num_steps:
            if digest(state) != finished["digest"]:
                raise UserError(
                    f"the latest checkpoint of {run.path} is not the state of its result.json; "
                    f"choose another --workdir"
                )
            log(f"finished before: {result_text(finished, width())}")
            draw_pictures(state, plan, run, only_missing=True)
            if plan.config.tensorboard:  # it may be wanted only now
                with _at_most_a_warning(_NO_EVENTS):
                    TensorBoardWriter(run.path / "tensorboard", run.records())
            log(see(run))
            return state, finished
        parts = _begin_part(plan, int(state.step), before)
        run.lock()
        run.delete_result()
        loop = _Loop(plan, run, checkpoints, parts, started - before.get("wall_seconds", 0.0))
        state = loop.train(state, before)
    result = conclude(state, plan, run, loop.started)
    log(f"finished: {result_text(result, width())}")
    draw_pictures(state, plan, run)
    log(see(run))
    return state, result


def _restore(
    state: TrainState, plan: Experiment, run: RunDirectory, checkpoints: CheckpointManager
) -> tuple[TrainState, dict[str, Any]]:
    """The latest whole checkpoint's state and record; the fresh state and {} before the first."""

    def tell(line: str) -> None:
        run.lock()  # of a finished run, which is about to change
        log_warning(line)

    with waiting("restoring the latest checkpoint"):
        restored = checkpoints.restore_latest(state, tell)
    if restored is None:
        if run.has_begun:
            raise UserError(
                f"{run.path} holds a run, but {checkpoints.directory} no checkpoint of it; put "
                f"them back, or choose another --workdir"
            )
        return state, {}
    state, record = restored
    if changed := differences(record["config"], resolved(plan.config)):
        raise UserError(
            f"the checkpoints in {run.path} are of another config ({'; '.join(changed)}); choose "
            f"another --workdir"
        )
    if record["dataset"] != plan.dataset.fingerprint:
        raise UserError(
            f"the run was trained on other {plan.dataset.name} images than those found now; "
            f"restore the data or choose another --workdir"
        )
    return state, record


def _begin_part(plan: Experiment, step: int, before: dict[str, Any]) -> list[dict[str, Any]]:
    """The environments of the run's parts, that of this process last.

    Args:
      plan: of the run.
      step: from which this process trains.
      before: the record restored for it; {} at the beginning.
    """
    now, parts = None, before.get("environments", [])
    with _at_most_a_warning("the environment is not recorded"):
        now = environment(plan.mesh)
    if now and parts and (changed := changes(parts[-1], now)):
        log(
            f"note: resuming on {', '.join(changed)}: same state, but later steps may differ by "
            f"rounding"
        )
    if before and step < plan.num_steps:
        log(f"resuming at step {step:,} of {plan.num_steps:,}")
    return begun_at(step, now, parts)


@contextlib.contextmanager
def _at_most_a_warning(what: str) -> Iterator[None]:
    """Turns any error within it into a warning, for what is never worth a run."""
    try:
        yield
    except Exception as error:
        log_warning(one_line(f"{what} ({error or type(error).__name__})"))


class _Loop:
    """The part of a run that one process trains.

    Args:
      plan: of the run.
      run: where its files go.
      checkpoints: where its states go.
      parts: the environments of the run's parts, as `begun_at` gives them.
      started: when the run began, on the monotonic clock.
    """

    def __init__(
        self,
        plan: Experiment,
        run: RunDirectory,
        checkpoints: CheckpointManager,
        parts: list[dict[str, Any]],
        started: float,
    ) -> None:
        self.started = started
        self._parts = parts
        self._plan, self._config = plan, plan.config
        self._run, self._checkpoints = run, checkpoints
        self._steps_per_call = 1
        self._stop: int | None = None  # the signal that wants it
        self._done: set[str] = set()

    def train(self, state: TrainState, before: dict[str, Any]) -> TrainState:
        """Trains from the state's step to the last, epoch by epoch.

        Args:
          state: fresh, or restored.
          before: the record that was restored with it; {} for a fresh one.
        """
        plan, config, run = self._plan, self._config, self._run
        if not before:
            # What has a config has a checkpoint: none left is then known from none made yet.
            with waiting("saving the initial state"):
                self._save(state)
                self._checkpoints.wait_until_finished()
        run.begin(resolved(config), before.get("records", []))
        with _at_most_a_warning("environment.json is not written"):
            *earlier, now = self._parts
            run.write("environment.json", {**now, "earlier": earlier})
        with waiting("copying the images to the devices"):
            train, test = plan.place(plan.dataset.train), plan.place(plan.dataset.test)
        first_step = int(state.step)
        progress = Progress(
            num_epochs=config.num_epochs,
            steps_per_epoch=plan.steps_per_epoch,
            batch_size=config.batch_size,
            test_count=len(plan.dataset.test.labels),
            start_step=first_step,
            best_accuracy=max((record["test_accuracy"] for record in run.records()), default=0.0),
        )
        self._steps_per_call = plan.steps_per_execution(state)
        metrics = Metrics(**before["epoch_metrics"]) if "epoch_metrics" in before else None
        events = None
        if config.tensorboard:
            with _at_most_a_warning(_NO_EVENTS):
                events = TensorBoardWriter(run.path / "tensorboard", before.get("records", []))
        with progress, GracefulShutdown() as signals:
            for epoch in range(first_step // plan.steps_per_epoch, config.num_epochs):
                begun, before_step = time.monotonic(), int(state.step)
                progress.lap(before_step)
                state, metrics = self._train_epoch(state, epoch, metrics, train, progress, signals)
                step = int(state.step)
                # Without compilation, unless that came with all steps of the epoch.
                rate = progress.images_per_second(step) or (
                    (step - before_step) * config.batch_size / (time.monotonic() - begun)
                )
                progress.evaluating(epoch)
                with self._first("compiling the evaluation"):
                    # Without label smoothing, which belongs to the training objective only.
                    tested = evaluate(
                        state.replace(loss_fn=CrossEntropy()),
                        test,
                        batch_size=config.eval_batch_size,
                    )
                record = self._record(epoch, metrics, tested, rate)
                run.append(record)
                if events:
                    writer, events = events, None  # it is called no more if it fails
                    with _at_most_a_warning(_NO_EVENTS):
                        writer(record)
                        events = writer
                self._save(state, test_accuracy=record["test_accuracy"])
                progress.epoch(record, time.monotonic() - begun)
                self._stop = self._stop or signals.requested()
                self._leave_if_asked(step)
                metrics = None
        with waiting("saving the last checkpoint"):
            self._checkpoints.wait_until_finished()
        return state

    def _train_epoch(
        self,
        state: TrainState,
        epoch: int,
        metrics: Metrics | None,
        train: DeviceSplit,
        progress: Progress,
        signals: GracefulShutdown,
    ) -> tuple[TrainState, Metrics]:
        """Trains to the end of an epoch, from wherever in it the state is.

        `metrics`, on the host, are those of the epoch's steps that the state has behind it; those
        of the whole epoch come back.
        """
        plan, config = self._plan, self._config
        step, end = int(state.step), (epoch + 1) * plan.steps_per_epoch
        every = config.checkpoint_every_steps
        order = epoch_permutation(plan.shuffle_key, epoch, len(plan.dataset.train.labels))
        order = jax.device_put(order, replicated_sharding(plan.mesh))
        tally = MetricsAccumulator(step, metrics)
        while step < end:
            stop = min(end, (step // every + 1) * every) if every else end
            steps = min(self._steps_per_call, stop - step)
            with self._first(self._compiling(steps)) as is_first:
                batches = _batches(
                    train, order, plan.augment_key, step,
                    steps=self._steps_per_call, batch_size=config.batch_size,
                    flip=config.augment.flip, translate=config.augment.translate,
                    sharding=batch_sharding(plan.mesh, axis=1),
                )  # fmt: skip
                state, scores = self._call(state, batches, steps)
            step += steps
            if is_first:
                progress.lap(step)
            tally.add(scores, steps)
            limit_in_flight(tally.pending, ahead=8 if self._steps_per_call == 1 else 2)
            self._checkpoints.check_for_errors()
            if progress.due() and len(tally.pending) > 1:
                # All but the newest call: the device goes on while the host reads.
                progress.show(step - steps, self._collect(tally, keep=1))
            self._stop = signals.requested()
            if step < end and (step == stop or self._stop):
                metrics = self._collect(tally)
                if progress.due():
                    progress.show(step, metrics)
                self._save(state, epoch_metrics=dataclasses.asdict(metrics))
                self._leave_if_asked(step)
        return state, self._collect(tally)

    @contextlib.contextmanager
    def _first(self, what: str) -> Iterator[bool]:
        """Announces what takes longer when this process does it for the first time."""
        if what in self._done:
            yield False
            return
        with waiting(what):
            yield True
        self._done.add(what)

    def _compiling(self, steps: int) -> str:
        """What is compiled when this number of steps is made in one call for the first time."""
        known = self._steps_per_call > 1 and not self._plan.on_cpu
        return "compiling the training step" + (f" ({steps:,} in one call)" if known else "")

    def _call(
        self, state: TrainState, batches: dict[str, jax.Array], steps: int
    ) -> tuple[TrainState, Metrics]:
        if self._steps_per_call == 1:
            return _train_step(state, batches)
        if self._plan.on_cpu:
            return _train_steps(state, batches, steps)
        return _train_known_steps(state, batches, steps)

    def _collect(self, tally: MetricsAccumulator, keep: int = 0) -> Metrics:
        """`tally.collect`; raises UserError after a step that was not finite, if it is to stop."""
        metrics = tally.collect(keep)
        if tally.skipped and self._config.on_nonfinite == "stop":
            raise self._diverged(
                f"step {tally.skipped[0]:,} gave a loss or gradients that are not finite",
                tally.skipped[0],
                "--config.on_nonfinite=skip leaves such steps out and goes on from it; else ",
            )
        return metrics

    def _diverged(self, what: str, step: int, remedy: str = "") -> UserError:
        self._checkpoints.wait_until_finished()
        return UserError(
            f"{what}, at a learning rate of {self._plan.learning_rate(step):g} in epoch "
            f"{-(-step // self._plan.steps_per_epoch)}; the last good checkpoint is step "
            f"{self._checkpoints.latest_step()}; {remedy}lower the rate, or set "
            f"optimizer.grad_clip_norm or schedule.warmup_epochs, in another --workdir"
        )

    def _save(self, state: TrainState, **record: Any) -> None:
        """Starts saving the state, with all that the run needs to go on from it."""
        weights = jax.tree.leaves(jax.device_get((state.params, state.model_state)))
        if not all(np.isfinite(leaf).all() for leaf in weights):
            step = int(state.step)
            raise self._diverged(f"the parameters after step {step:,} are not finite", step)
        always = {
            "config": resolved(self._config),
            "dataset": self._plan.dataset.fingerprint,
            "environments": self._parts,
            "wall_seconds": time.monotonic() - self.started,
            "records": self._run.records(),
        }
        self._checkpoints.save(state, {**always, **record})

    def _leave_if_asked(self, step: int) -> None:
        """Raises Interrupted if a signal came; the state was saved before."""
        if self._stop:
            self._checkpoints.wait_until_finished()
            name = signal.Signals(self._stop).name
            raise Interrupted(
                f"stopped by {name} at step {step:,} of {self._plan.num_steps:,}, which is saved; "
                f"the same command goes on from there",
                self._stop,
            )

    def _record(
        self, epoch: int, trained: Metrics, tested: Metrics, images_per_second: float
    ) -> dict[str, Any]:
        """One line of `metrics.jsonl`.

        Training figures are means over the steps of the epoch, each before its update. The train
        loss is the training objective, with label smoothing; the test loss is plain cross-entropy.
        """
        plan = self._plan
        step = (epoch + 1) * plan.steps_per_epoch
        skipped = plan.steps_per_epoch - int(trained.count) // self._config.batch_size
        if not trained.count:
            raise self._diverged("no step of the epoch gave a finite loss and gradients", step)
        if not math.isfinite(tested.loss):
            raise self._diverged(f"the test loss became {tested.loss}", step)
        before = sum(record["skipped_steps"] for record in self._run.records()[:epoch])
        return {
            "step": step,
            "epoch": epoch + 1,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            "test_count": tested.count,
            "learning_rate": plan.learning_rate(step - before - skipped),
            "skipped_steps": skipped,
            "images_per_second": images_per_second,
        }


@functools.partial(jax.jit, donate_argnames="state")
def _train_step(state: TrainState, batches: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """On the first of some batches."""
    return train_step(state, jax.tree.map(lambda x: x[0], batches))


_train_steps = jax.jit(train_steps, donate_argnames="state")
_train_known_steps = jax.jit(train_steps, donate_argnames="state", static_argnames="count")


@functools.partial(
    jax.jit, static_argnames=("steps", "batch_size", "flip", "translate", "sharding")
)
def _batches(
    train: DeviceSplit,
    order: jax.Array,
    key: jax.Array,
    step: jax.Array | int,
    *,
    steps: int,
    batch_size: int,
    flip: bool,
    translate: int,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """Gathers, augments and normalizes the batches of some steps.

    Compiled by itself: XLA would repeat it for each of the overlapping patches of the first
    convolution on a CPU.

    Args:
      train: the split.
      order: of the epoch, `int32[N]`.
      key: of the run's augmentation; that of a step follows from it.
      step: steps done.
      steps: how many batches.
      batch_size: images in each.
      flip: as for `augment`.
      translate: as for `augment`.
      sharding: of `[steps, batch_size]`.

    Returns:
      `image` float32[steps, B, H, W, C], `label` int32[steps, B].
    """
    start = (step % (order.shape[0] // batch_size)) * batch_size
    # Behind the last batch of the epoch there may be fewer.
    index = order[jnp.minimum(start + jnp.arange(steps * batch_size), order.shape[0] - 1)]
    index = jax.lax.with_sharding_constraint(index.reshape(steps, batch_size), sharding)

    def change(images: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, step + i))(jnp.arange(steps))
        return jax.vmap(functools.partial(augment, flip=flip, translate=translate))(keys, images)

    return train.take(index, change if flip or translate else None)
