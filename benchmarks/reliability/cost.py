"""Measures what safety costs: the guard against non-finite steps, checkpoints, digests.

    python -m benchmarks.reliability.cost

All in one process on the CPU. What can be left out is timed with and without it, in pairs of short
samples whose order alternates; the figure is the median over these pairs.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import cnn
from benchmarks import machine
from benchmarks.command_line import Parser, command, log, positive
from benchmarks.report import table, write
from benchmarks.workers import REPOSITORY
from cnn.config import to_json_dict
from cnn.runtime import cli

_MODULE = "benchmarks.reliability.cost"
_IMAGE_SHAPE, _NUM_CLASSES = (32, 32, 3), 10
_BATCH_SIZE, _NUM_EPOCHS = 32, 10  # of the baseline
_OPTIMIZER = optax.adam(1e-3)
_MOST_STEPS_PER_CALL = 50  # of train.py

Sampler = Callable[[], float]


class Sizes(NamedTuple):
    """Sizes of the measurements.

    Attributes:
      batches: images per step for the guard: few, then the baseline's, then others.
      sample: images in a sample of the guard.
      train: training images.
      test: images of an evaluation.
      piece: steps in a sample of the saves; a save should take less time.
      features: of the network's convolutions.
      hidden: width of its dense layer, and of that of the large network.
      times: samples where there are no pairs; of a whole epoch three or fewer.
    """

    batches: tuple[int, ...]
    sample: int
    train: int
    test: int
    piece: int
    features: tuple[int, ...]
    hidden: tuple[int, int]
    times: int


_FULL = Sizes((2, 32, 128, 512), 1024, 50_000, 10_000, 100, (32, 64), (64, 4300), 20)
_QUICK = Sizes((2, 4), 40, 640, 100, 20, (2,), (8, 16), 2)


class Pairs(NamedTuple):
    """Seconds with and without something, by round."""

    on: list[float]
    off: list[float]

    def overheads(self) -> list[float]:
        """Extra seconds as fractions of the time without.

        >>> Pairs([3.0, 2.0], [2.0, 2.0]).overheads()
        [0.5, 0.0]
        """
        return [on / off - 1 for on, off in zip(self.on, self.off, strict=True)]

    def differences(self) -> list[float]:
        """Extra seconds.

        >>> Pairs([3.0, 2.0], [2.0, 2.5]).differences()
        [1.0, -0.5]
        """
        return [on - off for on, off in zip(self.on, self.off, strict=True)]


class Summary(NamedTuple):
    """Median of some samples, and its confidence interval.

    Attributes:
      median: of the samples.
      sure: 95 % confidence interval of the median, from the ranks of the samples; their extremes if
        there are fewer than six, which is too few for such an interval.
      middle: first and third quartile.
      n: number of samples.
    """

    median: float
    sure: tuple[float, float]
    middle: tuple[float, float]
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Of at least two samples.

        >>> Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
        Summary(median=3.0, sure=(1.0, 5.0), middle=(2.0, 4.0), n=5)
        """
        ranked, count = sorted(samples), len(samples)
        # The number of samples below the true median is binomial, hence nearly normal.
        below = max(int(count / 2 - 0.98 * count**0.5) - 1, 0)
        low, median, high = statistics.quantiles(ranked, n=4, method="inclusive")
        return cls(median, (ranked[below], ranked[-1 - below]), (low, high), count)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      what: the quantity.
      unit: "%", "us", "ms" or "s".
      found: in that unit.
      goal: the largest acceptable median; None if there is no goal.
    """

    what: str
    unit: str
    found: Summary
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median is within the goal."""
        return None if self.goal is None else self.found.median <= self.goal

    def cells(self) -> list[str]:
        """Of a Markdown table."""
        digits = 3 if self.unit == "s" else 2
        low, high = (f"{value:,.{digits}f}" for value in self.found.sure)
        first, third = (f"{value:,.{digits}f}" for value in self.found.middle)
        return [
            self.what,
            f"{self.found.median:,.{digits}f} {self.unit}",
            f"{low} to {high}" if self.found.n > 5 else "",
            f"{first} to {third}" if self.found.n > 1 else "",
            f"{self.found.n}",
            "" if self.goal is None else f"<= {self.goal:g} {self.unit}",
            {None: "", True: "yes", False: "no"}[self.met],
        ]


def in_turns(pairs: Mapping[str, tuple[Sampler, Sampler]], rounds: int) -> dict[str, Pairs]:
    """Takes one sample of each (with, without) per round, one right after the other."""
    found = {name: Pairs([], []) for name in pairs}
    for turn in range(rounds):
        for name, samplers in pairs.items():
            for which in (0, 1) if turn % 2 else (1, 0):
                found[name][which].append(samplers[which]())
        if (turn + 1) % 20 == 0 or turn + 1 == rounds:
            log(f"{', '.join(pairs)}: round {turn + 1}/{rounds}")
    return found


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds until the result is computed."""
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _state(mesh: Mesh, sizes: Sizes, *, large: bool = False) -> cnn.TrainState:
    """The first state of a run with Adam."""
    model = cnn.CNN(_NUM_CLASSES, features=sizes.features, hidden_features=sizes.hidden[large])
    state = cnn.create_train_state(model, _OPTIMIZER, jax.random.key(0), _IMAGE_SHAPE)
    return jax.device_put(state, cnn.replicated_sharding(mesh))


def _num_params(state: cnn.TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def trainer(guard: bool) -> Callable[..., tuple[cnn.TrainState, cnn.Metrics]]:
    """`cnn.train_steps`, compiled as `train.py` does, with or without the guard."""

    def no_guard(loss: jax.Array, grads: Any, *, in_one_piece: bool) -> jax.Array:
        return jnp.array(True)  # XLA removes what depends on it

    # A new function each time: JAX caches traces by function.
    def steps(
        state: cnn.TrainState, batches: Any, count: jax.Array | int
    ) -> tuple[cnn.TrainState, cnn.Metrics]:
        if guard:
            return cnn.train_steps(state, batches, count)
        with mock.patch("cnn.steps._is_finite", no_guard):  # while tracing
            return cnn.train_steps(state, batches, count)

    return jax.jit(steps, donate_argnames="state")


def guard_samplers(
    devices: list[Any], sizes: Sizes, batch_size: int, steps: int
) -> tuple[Sampler, Sampler]:
    """Times some steps from the initial state, with and without the guard."""
    mesh, rng = cnn.data_mesh(devices, batch_size), np.random.default_rng(0)
    batches = jax.device_put(
        {
            "image": rng.random((steps, batch_size, *_IMAGE_SHAPE), np.float32),
            "label": rng.integers(_NUM_CLASSES, size=(steps, batch_size), dtype=np.int32),
        },
        cnn.batch_sharding(mesh, axis=1),
    )
    initial = _state(mesh, sizes)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def sampler(guard: bool) -> Sampler:
        train = trainer(guard)

        def sample() -> float:
            state = jax.block_until_ready(copy(initial))  # it is donated
            with jax.set_mesh(mesh):
                return _seconds(lambda: train(state, batches, steps))

        sample()  # compiles
        return sample

    return sampler(True), sampler(False)


class Training:
    """The baseline's training and its saves, on random images."""

    def __init__(
        self, devices: list[Any], sizes: Sizes, checkpoints: cnn.CheckpointManager
    ) -> None:
        self._sizes, self._checkpoints, self._step = sizes, checkpoints, 0
        train, test = (
            _random_split(count, seed) for seed, count in enumerate((sizes.train, sizes.test))
        )
        data = cnn.Dataset.from_splits(
            "random", train=train, test=test, class_names=[*map(str, range(_NUM_CLASSES))]
        )
        self.mesh = cnn.data_mesh(devices, _BATCH_SIZE)
        self._pipeline = cnn.Pipeline(data, _BATCH_SIZE, mesh=self.mesh)
        self.steps_per_epoch = self._pipeline.steps_per_epoch
        self.state = _state(self.mesh, sizes)
        self._train_steps = cnn.compile_train_steps(self.state, self._pipeline)
        self._config = to_json_dict(cnn.load_config(REPOSITORY / "configs" / "baseline.py"))

    def advance(self, steps: int) -> None:
        """Trains a number of steps, and returns when the last is done."""
        last = self._step + steps
        for batches, count in self._pipeline.batches(self._step, last):
            self.state, _ = self._train_steps(self.state, batches, count)
        self._step = last
        jax.block_until_ready(self.state)

    def epoch(self) -> None:
        """Trains the steps of one epoch, and evaluates."""
        self.advance(self.steps_per_epoch)
        cnn.evaluate(self.state, self._pipeline.test)

    def save(self) -> None:
        """Starts a save as `cnn.training` does: it checks the parameters and has ten records."""
        weights = jax.tree.leaves(jax.device_get((self.state.params, self.state.model_state)))
        if not all(np.isfinite(leaf).all() for leaf in weights):
            raise cnn.UserError("the parameters are not finite")
        line = {
            "step": self._step, "epoch": _NUM_EPOCHS, "train_loss": 2 / 3, "train_accuracy": 2 / 3,
            "test_loss": 2 / 3, "test_accuracy": 2 / 3, "test_count": self._sizes.test,
            "learning_rate": 1e-3, "skipped_steps": 0, "images_per_second": 1e4 / 3,
        }  # fmt: skip
        record = {
            "config": self._config,
            "dataset": "0" * 64,
            "environments": [],
            "wall_seconds": time.monotonic(),
            "records": [line] * _NUM_EPOCHS,
            "test_accuracy": line["test_accuracy"],
        }
        self._checkpoints.save(self.state, record)

    def save_alone(self) -> None:
        """Saves, and waits until the checkpoint is written."""
        self.save()
        self._checkpoints.wait_until_finished()

    def with_save(self) -> None:
        """Saves, trains a piece while the checkpoint is written, and waits for both."""
        self.save()
        self.advance(self._sizes.piece)
        self._checkpoints.wait_until_finished()

    def without_save(self) -> None:
        """Trains a piece."""
        self.advance(self._sizes.piece)

    def restore(self) -> cnn.TrainState:
        """The state of the latest checkpoint, verified."""
        directory = self._checkpoints.directory
        if (found := cnn.CheckpointManager(directory).restore_latest(self.state, log)) is None:
            raise cnn.UserError(f"there is no checkpoint in {directory}")
        return found[0]


def _random_split(count: int, seed: int) -> cnn.Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, *_IMAGE_SHAPE), dtype=np.uint8)
    return cnn.Split(images, rng.integers(_NUM_CLASSES, size=count, dtype=np.int32))


def saves_share(first: float, each: float, epoch: float) -> float:
    """Share of the saves in the time of a run, in percent.

    Args:
      first: seconds of the save before the first epoch, for which the run waits.
      each: seconds that a save after an epoch costs.
      epoch: seconds of an epoch without a save.
    """
    saves = first + _NUM_EPOCHS * each
    return 100 * saves / (saves + _NUM_EPOCHS * epoch)


def measure_guard(devices: list[Any], sizes: Sizes, rounds: int) -> Iterator[tuple[Row, Any]]:
    """The rows of the guard, each with its samples.

    The cost does not depend on the batch, and is largest relative to steps of few images.
    """
    steps = {
        size: min(_MOST_STEPS_PER_CALL, max(1, sizes.sample // size)) for size in sizes.batches
    }
    found = in_turns(
        {str(size): guard_samplers(devices, sizes, size, steps[size]) for size in sizes.batches},
        rounds,
    )
    few, usual = sizes.batches[:2]
    costs = [cost / steps[few] for cost in found[str(few)].differences()]
    step = statistics.median(found[str(usual)].off) / steps[usual]
    name = f"guard, a step (from steps of {few} images)"
    yield Row(name, "us", Summary.of([1e6 * cost for cost in costs])), None
    name = f"... of a step of {usual} images ({1e3 * step:.2f} ms)"
    yield Row(name, "%", Summary.of([100 * cost / step for cost in costs]), goal=1.0), None
    for size in sizes.batches:
        pairs = found[str(size)]
        overheads = Summary.of([100 * overhead for overhead in pairs.overheads()])
        yield Row(f"... steps of {size} images, in turns", "%", overheads), pairs._asdict()


def measure_saves(training: Training, sizes: Sizes, rounds: int) -> Iterator[tuple[Row, Any]]:
    """The rows of the checkpoints, each with its samples."""
    first = _seconds(training.save_alone)
    yield Row("first save of the process, which loads Orbax", "ms", _single(1e3 * first)), [first]
    training.epoch()  # compiles
    epochs = [_seconds(training.epoch) for _ in range(min(sizes.times, 3))]
    name = f"epoch: {training.steps_per_epoch:,} steps of {_BATCH_SIZE}, {sizes.test:,} evaluated"
    yield Row(name, "s", Summary.of(epochs)), epochs
    alone = [_seconds(training.save_alone) for _ in range(sizes.times)]
    yield Row("save, waited for", "ms", Summary.of([1e3 * one for one in alone])), alone
    name = f"save during {sizes.piece} steps"
    samplers = (
        functools.partial(_seconds, training.with_save),
        functools.partial(_seconds, training.without_save),
    )
    found = in_turns({name: samplers}, rounds)[name]
    costs, epoch = found.differences(), statistics.median(epochs)
    yield Row(name, "ms", Summary.of([1e3 * cost for cost in costs])), found._asdict()
    yield Row("... of an epoch", "%", Summary.of([100 * cost / epoch for cost in costs])), None
    name = f"all {_NUM_EPOCHS + 1} saves of a run of {_NUM_EPOCHS} epochs"
    shares = [saves_share(first, cost, epoch) for cost in costs]
    yield Row(name, "%", Summary.of(shares), goal=3.0), None


def measure_rest(training: Training, sizes: Sizes) -> Iterator[tuple[Row, list[float]]]:
    """The rows of digests and of restoring, each with its samples."""
    for state in (training.state, _state(training.mesh, sizes, large=True)):
        found = [_seconds(functools.partial(cnn.digest, state)) for _ in range(sizes.times)]
        name = f"digest, {_num_params(state):,} parameters and Adam's moments"
        yield Row(name, "s", Summary.of(found), goal=1.0), found
    found = [_seconds(training.restore) for _ in range(sizes.times)]
    yield Row("restore of the newest checkpoint, verified", "s", Summary.of(found)), found


def _single(value: float) -> Summary:
    """Of one sample."""
    return Summary(value, (value, value), (value, value), 1)


def report(rows: Sequence[Row], about: dict[str, Any], line: str) -> str:
    """A page in Markdown."""
    head = ["what", "median", "95 % interval of the median", "middle half", "n", "goal", "met"]
    return "\n".join(
        [
            f"`{line}`\n",
            f"{machine.sentence(about)}.\n",
            "The baseline, Adam. Guard and saves: differences between neighbouring samples with "
            "and without, in turns, in one process. Goals apply to the median.\n",
            "Guard: each sample trains the same steps from the same state in one call. The guard "
            "does the same work for any batch, so steps of few images show it best. Saves: a "
            "sample is a piece of the baseline's training on random images of CIFAR-10's size; "
            "with a save, the piece is trained while the checkpoint is written, and the sample "
            "ends after both. The share of a run is this cost for each epoch, and the first save, "
            "relative to whole epochs without saves.\n",
            table(head, [row.cells() for row in rows]),
            "",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Measures, and writes `cost.json` and `cost.md`."""
    parser = Parser(_MODULE, __doc__, Path(__file__).resolve().parent / "results")
    add = parser.add_argument
    add("--rounds", type=positive(int), metavar="N", help="pairs of samples, 2 or more (120)")
    add("--quick", action="store_true", help="small sizes; the figures mean little")
    flags = parser.parse_args(argv)
    rounds, sizes = flags.rounds or (2 if flags.quick else 120), _QUICK if flags.quick else _FULL
    if rounds < 2:
        parser.error("--rounds is 2 or more")
    about = machine.describe()
    devices = cnn.select_devices("cpu")
    flags.out.mkdir(parents=True, exist_ok=True)
    # Beside the results, where there is a disk; the folder for temporary files may be in memory.
    with (
        tempfile.TemporaryDirectory(prefix=".reliability-", dir=flags.out) as folder,
        cnn.CheckpointManager(folder) as checkpoints,
    ):
        training = Training(devices, sizes, checkpoints)
        found = [
            *measure_guard(devices, sizes, rounds),
            *measure_saves(training, sizes, rounds),
            *measure_rest(training, sizes),
        ]
    line = command(_MODULE, argv)
    record = {
        "command": line,
        "machine": about,
        "rows": [
            {**row._asdict(), "found": row.found._asdict(), "met": row.met, "seconds": samples}
            for row, samples in found
        ],
    }
    text = report([row for row, _ in found], about, line)
    write(flags.out, "cost", text, record)
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, interrupted="nothing was kept")
