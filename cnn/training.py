"""The training loop.

Order within an epoch: train all steps, evaluate, append the record, save the checkpoint. So a
checkpoint never knows of a record that is not on disk, and a resumed run repeats at most what
came after its checkpoint, with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cnn.checkpoints import Checkpoints, digest
from cnn.compilation import compilation_cache
from cnn.config import check_config, resolved
from cnn.data import Split
from cnn.data.batches import DeviceSplit, epoch_order
from cnn.devices import batch_mesh, find_devices, replicated, sharded, stay_close
from cnn.errors import InputError
from cnn.evaluation import evaluate
from cnn.metrics import Metrics, total
from cnn.plan import Plan, make_plan
from cnn.plots import plot_curves, plot_samples
from cnn.progress import Progress, describe, epoch_line, result_line, say
from cnn.report import RunDirectory, TensorBoard
from cnn.steps import TrainState, predict_step, train_step, train_steps

_NONE = Metrics(loss_sum=0.0, correct=0, count=0)
_SHOWN_SAMPLES = 24
_FINAL = ("test_accuracy", "test_loss", "test_count", "train_accuracy", "train_loss")


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike[str]
) -> tuple[TrainState, dict[str, Any]]:
    """Trains as a config says, or goes on where the same run stopped.

    Args:
      config: a `ConfigDict` with all fields of `configs/baseline.py`.
      workdir: the run directory; made if it is not there.

    Returns:
      The final state, and what `result.json` holds: accuracies are fractions, losses in nats.

    Raises:
      InputError: if config, data or directory cannot give a run; nothing is written then.
    """
    started = time.monotonic()
    check_config(config)
    with compilation_cache(config.compilation_cache):
        return _run(config, RunDirectory(workdir), started)


def _run(config: Any, run: RunDirectory, started: float) -> tuple[TrainState, dict[str, Any]]:
    """`train_and_evaluate` with a checked config; `started` is on the monotonic clock."""
    run.check_config(resolved(config))
    if (finished := run.result()) is None:
        run.check_writable()
    run.records()  # raises if they are damaged
    if config.tensorboard:
        TensorBoard.require()
    devices = find_devices(config.platform, config.num_devices)
    plan = make_plan(config, batch_mesh(devices, config.batch_size))
    state = plan.initial_state()
    say(describe(plan, state.variables, len(devices)))

    if finished is not None and not run.checkpoints.is_dir():
        raise InputError(f"{run.path} holds a result but no checkpoints; choose another --workdir")
    with Checkpoints(run.checkpoints) as checkpoints:
        state, before = _restore(state, plan, checkpoints)
        if finished is not None:
            if digest(state) != finished["digest"]:
                raise InputError(
                    f"the latest checkpoint of {run.path} is not the state of its result.json; "
                    f"choose another --workdir"
                )
            say(f"finished before: {result_line(finished)}; {run.path} is left as it is")
            return state, finished
        run.start(resolved(config), plan.mesh)
        started -= before.get("wall_seconds", 0.0)
        state = _train(state, plan, run, checkpoints, before, started)
    result = _finish(state, plan, run, started)
    say(f"finished: {result_line(result)}\ndigest: {result['digest']}")
    say(f"see {run.path}: curves.png, samples.png, result.json")
    return state, result


def _restore(
    state: TrainState, plan: Plan, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The latest checkpoint's state and record; the fresh state and {} without one."""
    step = checkpoints.latest_step()
    if step is None:
        return state, {}
    record = checkpoints.read_record(step)
    if record.get("dataset") != plan.dataset.fingerprint:
        raise InputError(
            f"the run was trained on other {plan.dataset.name} images than those found now; "
            f"restore the data or choose another --workdir"
        )
    state = checkpoints.restore(state, step)
    if step < plan.num_steps:
        say(f"resuming at step {step:,} of {plan.num_steps:,}")
    return state, record


def _train(
    state: TrainState,
    plan: Plan,
    run: RunDirectory,
    checkpoints: Checkpoints,
    before: dict[str, Any],
    started: float,
) -> TrainState:
    """Trains from the state's step to the last, epoch by epoch."""
    config, data, step = plan.config, plan.dataset, int(state.step)
    train, test = _place(plan, data.train), _place(plan, data.test)
    for record in before.get("records", []):
        run.append(record)  # in case metrics.jsonl was lost
    board = TensorBoard(run.path / "tensorboard") if config.tensorboard else None

    def save(state: TrainState, **record: Any) -> None:
        always = {
            "config": resolved(config),
            "dataset": data.fingerprint,
            "wall_seconds": time.monotonic() - started,
            "records": run.records(),
        }
        checkpoints.save(state, {**always, **record})

    progress = Progress(
        num_epochs=config.num_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=config.batch_size,
        start_step=step,
    )
    metrics = Metrics(**before["epoch_metrics"]) if "epoch_metrics" in before else _NONE
    steps_per_call = plan.steps_per_call(state)
    with progress:
        for epoch in range(step // plan.steps_per_epoch, config.num_epochs):
            begun, first_step = time.monotonic(), int(state.step)
            state, metrics = _train_epoch(
                state, epoch, metrics, train, plan, steps_per_call, progress, save
            )
            rate = (int(state.step) - first_step) * config.batch_size / (time.monotonic() - begun)
            tested = evaluate(state, test, batch_size=config.eval_batch_size)
            record = _record(plan, epoch, metrics, tested, rate)
            if not math.isfinite(record["train_loss"]):
                raise InputError(
                    f"the training loss became {record['train_loss']} in epoch {epoch + 1}, at a "
                    f"learning rate of {record['learning_rate']:g}; lower it, or set "
                    f"optimizer.clip_norm or schedule.warmup_epochs, in another --workdir"
                )
            run.append(record)
            if board:
                board.write(record)
            save(state, test_accuracy=record["test_accuracy"])
            say(epoch_line(record, num_epochs=config.num_epochs))
            metrics = _NONE
    if board:
        board.close()
    return state


def _train_epoch(
    state: TrainState,
    epoch: int,
    metrics: Metrics,
    train: DeviceSplit,
    plan: Plan,
    steps_per_call: int,
    progress: Progress,
    save: Callable[..., None],
) -> tuple[TrainState, Metrics]:
    """Trains to the end of an epoch, from wherever in it the state is.

    `metrics`, on the host, are those of the epoch's steps that the state has behind it; those
    of the whole epoch come back.
    """
    config, step, end = plan.config, int(state.step), (epoch + 1) * plan.steps_per_epoch
    every = config.checkpoint_every_steps
    order = epoch_order(plan.order_key, epoch, len(plan.dataset.train.labels))
    order = jax.device_put(order, replicated(plan.mesh))
    how: Any = {
        "steps": steps_per_call,
        "batch_size": config.batch_size,
        "sharding": sharded(plan.mesh, axis=1),
    }
    pending: list[Metrics] = []
    while step < end:
        stop = min(end, (step // every + 1) * every) if every else end
        steps = min(steps_per_call, stop - step)
        batches = _batches(train, order, step, **how)
        if steps_per_call == 1:
            state, scores = _train_step(state, batches)
        elif plan.on_cpu:
            state, scores = _train_steps(state, batches, steps)
        else:
            state, scores = _train_known_steps(state, batches, steps)
        step += steps
        pending.append(scores)
        stay_close(pending, ahead=8 if steps_per_call == 1 else 2)
        if progress.due() and len(pending) > 1:
            # All but the newest call: the device goes on while the host reads.
            metrics, pending = total([metrics, *pending[:-1]]), pending[-1:]
            progress.show(step - steps, metrics)
        if step == stop < end:
            metrics, pending = total([metrics, *pending]), []
            if progress.due():
                progress.show(step, metrics)
            save(state, epoch_metrics=dataclasses.asdict(metrics))
    return state, total([metrics, *pending])


@functools.partial(jax.jit, donate_argnames="state")
def _train_step(state: TrainState, batches: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """On the first of some batches."""
    return train_step(state, jax.tree.map(lambda x: x[0], batches))


_train_steps = jax.jit(train_steps, donate_argnames="state")
_train_known_steps = jax.jit(train_steps, donate_argnames="state", static_argnames="count")


@functools.partial(jax.jit, static_argnames=("steps", "batch_size", "sharding"))
def _batches(
    train: DeviceSplit,
    order: jax.Array,
    step: jax.Array | int,
    *,
    steps: int,
    batch_size: int,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """Gathers and normalizes the batches of some steps: `image` float32[steps, B, H, W, C].

    Compiled by itself: XLA would repeat it for each of the overlapping patches of the first
    convolution on a CPU.
    """
    start = (step % (order.shape[0] // batch_size)) * batch_size
    # Behind the last batch of the epoch there may be fewer.
    index = order[jnp.minimum(start + jnp.arange(steps * batch_size), order.shape[0] - 1)]
    index = jax.lax.with_sharding_constraint(index.reshape(steps, batch_size), sharding)
    return train.take(index)


def _record(
    plan: Plan, epoch: int, trained: Metrics, tested: Metrics, images_per_second: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`.

    Training figures are running ones, from during the epoch. Losses, of the test images too, are
    those of the training objective: with label smoothing, if there is any.
    """
    step = (epoch + 1) * plan.steps_per_epoch
    return {
        "step": step,
        "epoch": epoch + 1,
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        "test_loss": tested.loss,
        "test_accuracy": tested.accuracy,
        "test_count": tested.count,
        "learning_rate": plan.learning_rate(step),
        "images_per_second": images_per_second,
    }


def _finish(state: TrainState, plan: Plan, run: RunDirectory, started: float) -> dict[str, Any]:
    """Draws the pictures, then writes `result.json`, which marks the run as finished."""
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
        "seed": plan.config.seed,
        "dataset": plan.dataset.fingerprint,
        "digest": digest(state),
        "wall_seconds": time.monotonic() - started,
    }
    run.write("result.json", result)
    return result


def _predict(state: TrainState, plan: Plan, split: Split) -> np.ndarray:
    """The predicted classes of a few images, `int[N]`."""
    return np.asarray(plan.jit_once(_classes)(state, _place(plan, split)))


def _classes(state: TrainState, split: DeviceSplit) -> jax.Array:
    batch = split.take(jnp.arange(split.labels.shape[0]))
    return predict_step(state, batch["image"]).argmax(-1)


def _place(plan: Plan, split: Split) -> DeviceSplit:
    normalization = plan.config.dataset.normalization
    return DeviceSplit.place(split, plan.dataset, normalization, replicated(plan.mesh))
