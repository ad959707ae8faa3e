"""A recipe's run by the clock of the published ones, and the parts of its time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.flops import RunFlop, network_flop, run_flop
from cnn import Dataset, compile_train_steps, digest, evaluate, limit_in_flight
from cnn.augment.resizing import WHOLE_IMAGES
from cnn.config import to_json_dict
from cnn.experiment import Experiment, create_experiment
from cnn.steps import TrainState, forward_losses

_REPEATS = 10  # calls in a sample of a part


@dataclasses.dataclass(frozen=True)
class Timed:
    """One run.

    Attributes:
      seed: of the run.
      seconds: from before the initial weights and the whitening to the end of the last evaluation
        with test-time augmentation; the images are on the devices before.
      accuracy: by that evaluation.
      digest: of the final state.
    """

    seed: int
    seconds: float
    accuracy: float
    digest: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run, measured alone after it has been compiled.

    Attributes:
      name: of the part.
      seconds: of one.
      count: how many a run has.
      flop: of one; 0 where it has no products with weights.
      is_detail: whether it is within another part, so that it does not count in the sum.
    """

    name: str
    seconds: float
    count: int
    flop: float = 0.0
    is_detail: bool = False


def make_experiment(config: Any, devices: list[Any], data: Dataset, dtype: str) -> Experiment:
    """The recipe with a precision.

    Args:
      config: checked.
      devices: to use.
      data: the images.
      dtype: of the network, and of the proxy if there is one.
    """
    one = config.copy_and_resolve_references()
    one.model.dtype = dtype
    if one.proxy.name != "none":
        one.proxy.dtype = dtype
    # Without `given` nothing is traced once more in the timed part.
    return dataclasses.replace(create_experiment(one, devices, dataset=data), given={})


def flop_of(experiment: Experiment) -> RunFlop:
    """The FLOPs of a run."""
    return run_flop(
        to_json_dict(experiment.config), experiment.dataset_record, experiment.num_steps
    )


def timed_run(experiment: Experiment, seed: int) -> Timed:
    """Trains a seed from the start to the last evaluation; compiles what is not compiled yet."""
    config = experiment.config.copy_and_resolve_references()
    config.seed = seed
    pipeline = dataclasses.replace(experiment.pipeline, seed=seed)
    one = dataclasses.replace(experiment, config=config, pipeline=pipeline)
    jax.block_until_ready((pipeline.train, pipeline.test))
    begun = time.perf_counter()
    state = one.initial_state()
    train = compile_train_steps(state, pipeline)
    for batches, num_steps in pipeline.batches(0, one.num_steps):
        state, _ = train(state, batches, num_steps)
    accuracy = _test(one, state, config.evaluation.tta)
    seconds = time.perf_counter() - begun
    return Timed(seed, seconds, accuracy, digest(state))


def epoch_seconds(experiment: Experiment, steps_per_call: int) -> float:
    """Seconds of an epoch, batches and steps, by calls of a length, once they are compiled."""
    state = experiment.initial_state()
    pipeline = dataclasses.replace(experiment.pipeline, steps_per_execution=steps_per_call)
    train = compile_train_steps(state, pipeline)
    jax.block_until_ready(pipeline.train)
    for epoch in range(2):
        begun = time.perf_counter()
        for batches, num_steps in pipeline.epoch(epoch):
            state, _ = train(state, batches, num_steps)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begun
    return seconds


def profile(experiment: Experiment) -> list[Part]:
    """The parts of a run, each timed alone: the devices are never without work, apart from starts.

    So what is left of the time of a run is what the devices wait for the host. All images are whole
    here, also where the config has smaller ones at first.
    """
    config = experiment.config.copy_and_resolve_references()
    config.resizing.scales = config.resizing.until_epochs = ()
    pipeline = dataclasses.replace(experiment.pipeline, resizing=WHOLE_IMAGES)
    experiment = dataclasses.replace(experiment, config=config, pipeline=pipeline)
    steps = experiment.num_steps
    state = experiment.initial_state()
    flop = network_flop(experiment.model, experiment.dataset.image_shape, experiment.freeze)
    count = config.batch_size if config.proxy.name == "none" else config.proxy.keep
    run = flop_of(experiment)

    def batches() -> Any:
        for last, _ in pipeline.epoch(0):
            limit_in_flight([last])
        return last

    stacked, most = next(pipeline.epoch(0))
    batch = jax.tree.map(lambda x: x[0, :count], stacked)
    train = compile_train_steps(state, pipeline)
    own = [jax.tree.map(lambda x: x.copy(), state)]  # `train` consumes what it is given

    def call() -> Any:
        own[0], metrics = train(own[0], stacked, most)
        return metrics

    per_epoch = experiment.steps_per_epoch
    initial = _seconds(experiment.initial_state, repeats=1)
    seconds = _seconds(batches, repeats=1) / per_epoch
    forward = _seconds(lambda: _forward(state, batch))
    gradients = _seconds(lambda: _gradients(state, batch))
    step = _seconds(call, repeats=max(1, _REPEATS // most)) / most
    views, plain = config.evaluation.tta, "none"
    return [
        Part("initial weights, whitening", initial, 1),
        Part("batches: gather, augment, normalize", seconds, steps),
        Part("training step", step, steps, run.training / steps),
        Part("... forward pass", forward, steps, count * flop.forward, is_detail=True),
        Part("... forward pass and gradients", gradients, steps, count * flop.training, True),
        Part("last evaluation", _evaluation(experiment, state, views), 1, run.evaluation),
        Part("... without augmentation", _evaluation(experiment, state, plain), 1, is_detail=True),
    ]


def _evaluation(experiment: Experiment, state: TrainState, tta: str) -> float:
    return _seconds(lambda: _test(experiment, state, tta), repeats=1)


def _test(experiment: Experiment, state: TrainState, tta: str) -> float:
    """The accuracy on the test images, on the host."""
    size = experiment.config.runtime.eval_batch_size
    return evaluate(state, experiment.pipeline.test, batch_size=size, tta=tta).accuracy


def _seconds(work: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Seconds of one call, of several that follow each other, after a first one."""
    jax.block_until_ready(work())
    begun = time.perf_counter()
    results: list[Any] = []
    for _ in range(repeats):
        results.append(work())
        limit_in_flight(results)
    jax.block_until_ready(results)
    return (time.perf_counter() - begun) / repeats


@jax.jit
def _forward(state: TrainState, batch: Any) -> jax.Array:
    return forward_losses(state, state.params, batch)[0].sum()


@jax.jit
def _gradients(state: TrainState, batch: Any) -> Any:
    def objective(params: Any) -> tuple[jax.Array, Any]:
        losses, _, model_state = forward_losses(state, params, batch)
        return losses.astype(np.float32).sum(), model_state

    return jax.grad(objective, has_aux=True)(state.params)
