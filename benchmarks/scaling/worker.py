"""One visit to a point of a sweep: trains, and prints a line of JSON.

Usage: python -m benchmarks.scaling.worker POINT SECONDS, with the fields of `Point` as JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

import cnn
from benchmarks.scaling.sweep import CHANNELS, NUM_CLASSES, Point, Visit
from benchmarks.workers import calibrate, peak_mib, steps_per_second
from cnn.ops.microbatch import MicrobatchPlan

_MIN_STEPS = 3
# Of batches on the devices: enough images that a sample does not overfit them (gradients so small
# that some processors slow down), and about the same memory at every point.
_READY_BYTES = 32 << 20
_MIN_READY = 2

Batch = dict[str, jax.Array]


def main(point: Point, seconds: float) -> Visit:
    """Measures a point."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point.cores])
    cnn.use_all_cpu_cores()
    devices = jax.devices()
    if len(devices) != point.devices:
        raise cnn.UserError(f"JAX made {len(devices)} devices instead of {point.devices}")
    start_mib = peak_mib()
    mesh = cnn.data_mesh(devices, point.batch_size)
    rng = np.random.default_rng(0)
    state = _state(point, mesh)
    if point.num_images:
        batches, once = _from_dataset(point, mesh, rng)
    else:
        batches, once = itertools.cycle(_ready(point, mesh, rng)), {}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    plan = MicrobatchPlan.for_batch(next(batches)["image"], num_params)
    run = _trainer(state, batches)
    steps = max(_MIN_STEPS, round(calibrate(run, seconds) * seconds))
    rate = steps_per_second(run, steps)
    return Visit(
        images_per_second=rate * point.batch_size,
        start_mib=start_mib,
        peak_mib=peak_mib(),
        num_shards=plan.num_shards,
        num_microbatches=plan.num_microbatches,
        **once,
    )


def _image_shape(point: Point) -> tuple[int, int, int]:
    return point.pixels, point.pixels, CHANNELS


def _state(point: Point, mesh: Mesh) -> cnn.TrainState:
    model = cnn.CNN(NUM_CLASSES, features=point.features, padding=point.padding)
    key = jax.random.key(0)
    state = cnn.create_train_state(model, optax.adam(1e-3), key, _image_shape(point))
    return jax.device_put(state, cnn.replicated_sharding(mesh))


def _trainer(state: cnn.TrainState, batches: Iterator[Batch]) -> Callable[[int], None]:
    """A function that trains a number of steps, to the end of the last."""
    step = jax.jit(cnn.train_step, donate_argnums=0)

    def run(steps: int) -> None:
        nonlocal state
        results = []
        for batch in itertools.islice(batches, steps):
            state, metrics = step(state, batch)
            results.append(metrics)
            cnn.limit_in_flight(results)
        jax.block_until_ready(state)

    return run


def _ready(point: Point, mesh: Mesh, rng: np.random.Generator) -> list[Batch]:
    """Batches on the devices."""
    shape = (point.batch_size, *_image_shape(point))
    count = max(_MIN_READY, _READY_BYTES // (4 * int(np.prod(shape))))
    return [
        jax.device_put(
            {
                "image": rng.random(shape, np.float32),
                "label": rng.integers(NUM_CLASSES, size=point.batch_size, dtype=np.int32),
            },
            cnn.batch_sharding(mesh),
        )
        for _ in range(count)
    ]


def _from_dataset(
    point: Point, mesh: Mesh, rng: np.random.Generator
) -> tuple[Iterator[Batch], dict[str, float]]:
    """Batches gathered on the devices, one per call, in the same order each epoch.

    Also returns the milliseconds for placing the dataset (once per run) and for drawing an order
    (once per epoch), which are not part of a step.
    """
    count, everywhere = point.num_images, cnn.replicated_sharding(mesh)
    split = cnn.Split(
        rng.integers(256, size=(count, *_image_shape(point)), dtype=np.uint8),
        rng.integers(NUM_CLASSES, size=count, dtype=np.int32),
    )
    placed, place_ms = _timed(
        lambda: cnn.DeviceSplit.from_split(split, everywhere, mean=0.5, std=0.5)
    )

    def draw(epoch: int) -> jax.Array:
        return jax.device_put(cnn.epoch_permutation(jax.random.key(1), epoch, count), everywhere)

    jax.block_until_ready(draw(0))  # compiles
    order, order_ms = _timed(lambda: draw(1))
    starts = range(0, count - point.batch_size + 1, point.batch_size)
    take = functools.partial(_take, size=point.batch_size, sharding=cnn.batch_sharding(mesh))
    batches = (take(placed, order, start) for start in itertools.cycle(starts))
    return batches, {"place_ms": place_ms, "order_ms": order_ms}


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _take(
    split: cnn.DeviceSplit, order: jax.Array, start: int, *, size: int, sharding: NamedSharding
) -> Batch:
    index = jax.lax.dynamic_slice_in_dim(order, start, size)
    return split.get_batch(jax.lax.with_sharding_constraint(index, sharding))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the milliseconds until it was computed."""
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    return result, 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    found = main(
        Point(**{**fields, "features": tuple(fields["features"])}), seconds=float(sys.argv[2])
    )
    print(json.dumps(vars(found)))
