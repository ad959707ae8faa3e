"""What `scaling.py` measures: axes, the points on them, and a process for each visit to a point."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from contenders import JAX_ENV

from cnn import UserError

CHANNELS = 3
NUM_CLASSES = 10
HIDDEN = 64
_KERNEL_SIZE = 3
_WORKER = Path(__file__).resolve().parent / "sweep_worker.py"


@dataclasses.dataclass(frozen=True)
class Point:
    """One training step to time: what of the network, the batch and the machine it uses.

    The rest is `cnn.CNN`'s default, that is, the seed's network.

    Attributes:
      cores: CPU cores that the process may use.
      devices: JAX devices on them.
      batch_size: images per step.
      features: output channels of each block.
      padding: of the convolutions.
      pixels: height and width of an image.
      num_images: in the dataset from which each step gathers its batch; 0: a few batches lie
        ready on the devices.
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
        """Multiplications and additions to train on one image, as `FLOP` of `peers.py` counts.

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
    """Points that differ in one thing.

    Attributes:
      title: what that is, for people.
      points: its value -> the point.
    """

    title: str
    points: dict[int, Point]


def make_axes(cores: int, *, quick: bool) -> dict[str, Axis]:
    """All axes by name; each is the same default point with one thing changed.

    Args:
      cores: of this machine.
      quick: two points of each axis, and a smaller batch.
    """
    seed = Point(cores, cores, batch_size=16 if quick else 128)
    deep = dataclasses.replace(seed, padding="SAME")  # else a fourth block would not fit
    some = sorted({2**n for n in range(cores.bit_length()) if 2**n < cores} | {cores})

    def batch(n: int) -> Point:
        return dataclasses.replace(seed, batch_size=n)

    def width(n: int) -> Point:
        return dataclasses.replace(seed, features=(n, 2 * n))

    def depth(n: int) -> Point:
        return dataclasses.replace(deep, features=(32,) * n)

    def pixels(n: int) -> Point:
        return dataclasses.replace(seed, pixels=n)

    def dataset(n: int) -> Point:
        return dataclasses.replace(seed, num_images=n)

    sizes = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
    axes = {
        "batch": Axis("images in a batch", {2**n: batch(2**n) for n in range(3, 12)}),
        "width": Axis(
            "features of block 1, half of block 2's",
            {n: width(n) for n in (8, 16, 32, 64, 128, 256)},
        ),
        "depth": Axis("blocks of 32 features, SAME padding", {n: depth(n) for n in (1, 2, 3, 4)}),
        # 10 is the least that two blocks without padding can take.
        "pixels": Axis(
            "height and width of the images", {n: pixels(n) for n in (10, 16, 24, 32, 48, 64, 128)}
        ),
        "devices": Axis(
            "JAX devices, on all cores",
            {n: dataclasses.replace(seed, devices=n) for n in some},
        ),
    }
    if hasattr(os, "sched_setaffinity"):  # Linux only
        axes["cores"] = Axis(
            "cores, a device on each",
            {n: dataclasses.replace(seed, cores=n, devices=n) for n in some},
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
    """What one process found at a point.

    Attributes:
      images_per_second: trained.
      start_mib: peak resident memory before the first array: Python, JAX and its threads.
      peak_mib: peak resident memory after the last step.
      lanes: parts of the batch that were computed side by side; see `cnn/ops/microbatch.py`.
      blocks: parts of a lane that were computed one after the other.
      place_ms: to copy the dataset to the devices.
      order_ms: to draw the order of an epoch.
    """

    images_per_second: float
    start_mib: float
    peak_mib: float
    lanes: int
    blocks: int
    place_ms: float = 0.0
    order_ms: float = 0.0


def visit(point: Point, seconds: float, cache: Path) -> Visit:
    """Measures a point once, in a process of its own.

    A process, because the number of devices is fixed in one, and its peak memory never falls.

    Args:
      point: to measure.
      seconds: of timed steps.
      cache: directory where processes leave what they have compiled.

    Raises:
      UserError: if the process fails, with the last line that it wrote.
    """
    env = {
        **os.environ,
        **JAX_ENV,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Else the last line of an error is advice on tracebacks.
        "JAX_TRACEBACK_FILTERING": "off",
        # Where it is one per core, `cnn.use_all_cpu_cores` sees to it.
        "JAX_NUM_CPU_DEVICES": None if point.devices == point.cores else str(point.devices),
    }
    done = subprocess.run(
        [sys.executable, str(_WORKER), json.dumps(dataclasses.asdict(point)), str(seconds)],
        capture_output=True,
        text=True,
        env={name: value for name, value in env.items() if value is not None},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{point} failed: {lines[-1]}")
    return Visit(**json.loads(done.stdout))
