"""Axes, the points on them, and a process for each visit to a point."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import workers
from cnn import UserError

CHANNELS = 3
NUM_CLASSES = 10
HIDDEN = 64
_KERNEL_SIZE = 3


@dataclasses.dataclass(frozen=True)
class Point:
    """One training step to time: network, batch and machine.

    Fields of `cnn.CNN` that are not named here have its defaults, those of the baseline.

    Attributes:
      cores: CPU cores that the process may use.
      devices: JAX devices on these cores.
      batch_size: images per step.
      features: output channels of each block.
      padding: of the convolutions.
      pixels: height and width of an image.
      num_images: size of the dataset from which each step gathers its batch; 0: each step takes
        one of a few batches that are on the devices before.
    """

    cores: int
    devices: int
    batch_size: int = 128
    features: tuple[int, ...] = (32, 64)
    padding: str = "VALID"
    pixels: int = 32
    num_images: int = 0

    @property
    def flop(self) -> int:
        """Multiplications and additions to train on one image.

        Three times the forward pass, less the input gradient of the first convolution.
        """
        total, side, channels = 0, self.pixels, CHANNELS
        for block, features in enumerate(self.features):
            side -= 0 if self.padding == "SAME" else _KERNEL_SIZE - 1
            passes = 3 if block else 2
            total += passes * side**2 * _KERNEL_SIZE**2 * channels * features
            side, channels = side // 2, features
        dense = side**2 * channels * HIDDEN + HIDDEN * NUM_CLASSES
        return 2 * (total + 3 * dense)


class Axis(NamedTuple):
    """Points that differ in one property.

    Attributes:
      title: of the property.
      points: value of the property -> point.
    """

    title: str
    points: dict[int, Point]


def make_axes(cores: int, *, quick: bool) -> dict[str, Axis]:
    """All axes by name; each varies one property of the same default point.

    Args:
      cores: of this machine.
      quick: take two points of each axis, and a smaller batch.
    """
    default = Point(cores, cores, batch_size=16 if quick else 128)
    deep = dataclasses.replace(default, padding="SAME")  # VALID has no pixels left for block 4
    some = sorted({2**n for n in range(cores.bit_length()) if 2**n < cores} | {cores})

    def batch(n: int) -> Point:
        return dataclasses.replace(default, batch_size=n)

    def width(n: int) -> Point:
        return dataclasses.replace(default, features=(n, 2 * n))

    def depth(n: int) -> Point:
        return dataclasses.replace(deep, features=(32,) * n)

    def pixels(n: int) -> Point:
        return dataclasses.replace(default, pixels=n)

    def dataset(n: int) -> Point:
        return dataclasses.replace(default, num_images=n)

    sizes = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
    axes = {
        "batch": Axis("images in a batch", {2**n: batch(2**n) for n in range(3, 12)}),
        "width": Axis(
            "features of block 1, half of block 2's",
            {n: width(n) for n in (8, 16, 32, 64, 128, 256)},
        ),
        "depth": Axis("blocks of 32 features, SAME padding", {n: depth(n) for n in (1, 2, 3, 4)}),
        # 10 is the smallest size for two blocks without padding.
        "pixels": Axis(
            "height and width of the images", {n: pixels(n) for n in (10, 16, 24, 32, 48, 64, 128)}
        ),
        "devices": Axis(
            "JAX devices, on all cores",
            {n: dataclasses.replace(default, devices=n) for n in some},
        ),
    }
    if hasattr(os, "sched_setaffinity"):  # Linux only
        axes["cores"] = Axis(
            "cores, a device on each",
            {n: dataclasses.replace(default, cores=n, devices=n) for n in some},
        )
    axes["dataset"] = Axis("images in the dataset", {n: dataset(n) for n in sizes})
    if quick:
        return {
            name: Axis(axis.title, dict(list(axis.points.items())[:2]))
            for name, axis in axes.items()
        }
    return axes


@dataclasses.dataclass(frozen=True)
class Visit:
    """The measurements of one process at a point.

    Attributes:
      images_per_second: of training.
      start_mib: peak resident memory before the first array: Python, JAX and its threads.
      peak_mib: peak resident memory after the last step.
      num_shards: parts of the batch that are computed in parallel; see `cnn.ops.microbatch`.
      num_microbatches: parts of a shard that are computed one after the other.
      place_ms: milliseconds to copy the dataset to the devices.
      order_ms: milliseconds to draw the order of an epoch.
    """

    images_per_second: float
    start_mib: float
    peak_mib: float
    num_shards: int
    num_microbatches: int
    place_ms: float = 0.0
    order_ms: float = 0.0


def visit(
    point: Point, seconds: float, cache: Path, changes: Mapping[str, str | None] | None = None
) -> Visit:
    """Measures a point once, in a process of its own.

    A process cannot change its number of devices, and its peak memory never falls.

    Args:
      point: to measure.
      seconds: of timed steps.
      cache: directory for compiled programs, which later visits find there.
      changes: environment variables of the process, such as `workers.QUICK_ENV`.

    Raises:
      UserError: the process fails; the message has the last line that it wrote.
    """
    env = {
        **workers.JAX_ENV,
        **(changes or {}),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Otherwise the last line of an error is advice on tracebacks.
        "JAX_TRACEBACK_FILTERING": "off",
        # `cnn.use_all_cpu_cores` makes one per core.
        "JAX_NUM_CPU_DEVICES": None if point.devices == point.cores else str(point.devices),
    }
    done = subprocess.run(
        workers.command(
            "benchmarks.scaling.worker", json.dumps(dataclasses.asdict(point)), seconds
        ),
        capture_output=True,
        text=True,
        env=workers.environment(env),
    )
    if done.returncode:
        raise UserError(f"{point} failed: {workers.last_line(done.stderr)}")
    return Visit(**json.loads(done.stdout))
