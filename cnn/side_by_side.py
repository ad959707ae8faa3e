"""Runs side by side: one program trains a stack of states, one for each of several seeds.

For a GPU or a TPU that one small network does not fill. On a CPU it is slower than one run on each
core: products of small matrices in batches take longer than one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from cnn.augment import Augment, Mix
from cnn.augment.resizing import resize_images
from cnn.data.pipeline import DeviceSplit, make_batches, mix_batches
from cnn.divergence import DivergenceError
from cnn.errors import Interrupted
from cnn.evaluation import evaluate_each
from cnn.losses import evaluation_loss
from cnn.metrics import Metrics, MetricsAccumulator
from cnn.runs import Run
from cnn.runtime.devices import batch_sharding, data_mesh, limit_in_flight, replicated_sharding
from cnn.runtime.progress import Progress
from cnn.runtime.signals import GracefulShutdown
from cnn.steps import Batch, TrainState, train_steps


@functools.partial(
    jax.jit, static_argnames=("num_steps", "batch_size", "augment", "scale", "mix", "mesh")
)
def _batches_of_each(
    train: DeviceSplit,
    orders: jax.Array,
    augment_keys: jax.Array,
    mix_keys: jax.Array,
    step: jax.Array | int,
    *,
    num_steps: int,
    batch_size: int,
    augment: Augment | None,
    scale: float,
    mix: Mix | None,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    """`make_batches` for the order and the keys of each run."""

    def of_one(
        train: DeviceSplit, order: Any, augment_key: Any, mix_key: Any, step: Any
    ) -> dict[str, jax.Array]:
        batches = make_batches(
            train,
            order,
            augment_key,
            step,
            num_steps=num_steps,
            batch_size=batch_size,
            augment=augment,
        )
        batches["image"] = resize_images(batches["image"], scale)
        return batches if mix is None else mix_batches(batches, mix_key, step, mix=mix)

    of_each = jax.vmap(of_one, in_axes=(None, 0, 0, 0, None))
    stack, same = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (same, stack, stack, stack, same)
    return jax.shard_map(of_each, mesh=mesh, in_specs=specs, out_specs=stack, check_vma=False)(
        train, orders, augment_keys, mix_keys, step
    )


@functools.partial(jax.jit, static_argnames=("num_steps", "mesh"), donate_argnames="states")
def _train_steps_of_each(
    states: TrainState, batches: Batch, *, num_steps: int, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """`train_steps` for each run."""
    of_each = jax.vmap(functools.partial(train_steps, num_steps=num_steps))
    stack = PartitionSpec(mesh.axis_names)
    return jax.shard_map(of_each, mesh=mesh, in_specs=stack, out_specs=stack, check_vma=False)(
        states, batches
    )


def train_side_by_side(runs: Sequence[Run], devices: Sequence[Any]) -> dict[int, DivergenceError]:
    """Trains runs that are at the same step and differ in their seeds only.

    A run that diverges or stops early stays in the stack, and is no longer looked at.

    Args:
      runs: none of them finished.
      devices: over which the stack is split: the largest number of them that divides it.

    Returns:
      What ended runs that diverged, by their place. The others are finished.

    Raises:
      UserError: a run cannot be saved.
      Interrupted: after a signal.
    """
    first = runs[0].experiment
    mesh = data_mesh(list(devices), len(runs))
    for run in runs:
        run.ledger.begin(run.state)
    pipelines = [run.experiment.pipeline for run in runs]
    stacked, copied = batch_sharding(mesh), replicated_sharding(mesh)
    train, test = jax.device_put((first.pipeline.train, first.pipeline.test), copied)
    states = jax.device_put(_stack([run.state for run in runs]), stacked)
    augment_keys, mix_keys = jax.device_put(
        (
            _stack([one.augment_key for one in pipelines]),
            _stack([one.mix_key for one in pipelines]),
        ),
        stacked,
    )
    step, per_epoch = int(runs[0].state.step), first.steps_per_epoch
    accumulators = [MetricsAccumulator(step, run.ledger.metrics) for run in runs]
    diverged: dict[int, DivergenceError] = {}
    active = list(range(len(runs)))
    progress = Progress(
        num_steps=first.num_steps,
        steps_per_epoch=per_epoch,
        batch_size=first.pipeline.batch_size * len(runs),
        test_count=len(first.dataset.test) * len(runs),
        start_step=step,
    )
    in_flight: list[Any] = []

    def take_states() -> None:
        host = jax.device_get(states.arrays)
        for i in active:
            arrays = jax.tree.map(lambda leaf, i=i: leaf[i], host)
            runs[i].state = runs[i].state.replace(**arrays)

    def for_each(record: Any) -> None:
        """Calls `record(i)` for each active run; one that has diverged is active no longer."""
        for i in list(active):
            try:
                record(i)
            except DivergenceError as error:
                diverged[i] = error
                active.remove(i)

    def end_epoch(i: int, tested: list[Metrics], speed: float) -> None:
        run = runs[i]
        metrics = run.ledger.fetch(run.state, accumulators[i])
        run.ledger.end_epoch(run.state, metrics, tested[i], speed)
        accumulators[i] = MetricsAccumulator(step)
        if step >= first.num_steps or first.early_stop(run.ledger.records) is not None:
            run.finish()
            active.remove(i)

    def save_within_epoch(i: int) -> None:
        run = runs[i]
        run.ledger.save_within_epoch(run.state, run.ledger.fetch(run.state, accumulators[i]))

    with progress, GracefulShutdown() as shutdown:
        while active:
            if step % per_epoch == 0:
                progress.begin_epoch(step)
            orders = _stack([one.order(step // per_epoch) for one in pipelines])
            orders, stop, signum = jax.device_put(orders, stacked), first.next_stop(step), None
            scores: list[tuple[Metrics, int]] = []
            while step < stop and signum is None:
                most = first.pipeline.steps_per_execution
                stage = first.pipeline.stage(step)
                num_steps = min(most, stop - step, stage.stop - step)
                batches = _batches_of_each(
                    train,
                    orders,
                    augment_keys,
                    mix_keys,
                    step,
                    num_steps=most,
                    batch_size=first.pipeline.batch_size,
                    augment=first.pipeline.augment,
                    scale=stage.scale,
                    mix=first.pipeline.mix,
                    mesh=mesh,
                )
                step += num_steps
                what = f"compiling the training step of {len(runs)} runs ({num_steps} in one call)"
                if stage.scale != 1:
                    height, width = batches["image"].shape[-3:-1]
                    what += f" for images of {height}x{width}"
                with progress.first_time(what, step):
                    states, metrics = _train_steps_of_each(
                        states, batches, num_steps=num_steps, mesh=mesh
                    )
                scores.append((metrics, num_steps))
                in_flight = [*in_flight[-2:], metrics]
                limit_in_flight(in_flight, 2)
                signum = shutdown.requested()
            for metrics, num_steps in scores:
                for i, one in enumerate(Metrics.unstack(metrics)):
                    accumulators[i].add(one, num_steps)
            take_states()
            if step < first.num_steps and step % per_epoch:
                for_each(save_within_epoch)
            else:
                speed = progress.images_per_second(step) / len(runs)
                progress.evaluating(step)
                with progress.first_time("compiling the evaluation", step):
                    scored = states.replace(loss_fn=evaluation_loss(first.loss_fn))
                    batch_size = first.config.runtime.eval_batch_size
                    tested = evaluate_each(scored, test, mesh, batch_size=batch_size)
                for_each(lambda i, tested=tested, speed=speed: end_epoch(i, tested, speed))
            if signum := signum or shutdown.requested():
                for i in active:
                    runs[i].checkpoints.wait_until_finished()
                raise Interrupted(f"stopped at step {step:,}, which is saved", signum)
    return diverged


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
