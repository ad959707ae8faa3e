"""This repository's public API, used as the README says for a script of one's own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

import cnn
from cnn.ops import convolution
from contenders import problem as shared
from contenders.flax_networks import JaxProgram, Net94, optimizer


def _model(network: str) -> nn.Module:
    if network == "seed":
        return cnn.CNN(shared.NUM_CLASSES)
    return Net94(
        conv=convolution.conv_general_dilated,
        conv_max_pool=functools.partial(convolution.conv_general_dilated, pool=2),
        max_pool=convolution.max_pool,
    )


def program(problem: shared.Problem, variant: str) -> JaxProgram:
    """The batch sharded over one device per core, the state on each.

    Args:
      problem: what to compute.
      variant: "step", a plain `jax.jit` of `train_step`, called for each batch; or "loop",
        `train_steps` with many batches in one call, as `train.py` trains.
    """
    cnn.use_all_cpu_cores()
    mesh = cnn.data_mesh(jax.devices(), problem.images.shape[1])
    state = cnn.create_train_state(
        _model(problem.network),
        optimizer(problem.network),
        jax.random.key(0),
        shared.IMAGE_SHAPE,
    ).replace(params=problem.weights)
    train_step = jax.jit(cnn.train_step, donate_argnums=0)

    def step(
        state: cnn.TrainState, image: jax.Array, label: jax.Array
    ) -> tuple[cnn.TrainState, cnn.Metrics]:
        return train_step(state, {"image": image, "label": label})

    parts: dict[str, Any] = {
        "initial": jax.device_put(state, cnn.replicated_sharding(mesh)),
        "step": step,
        "loss": lambda metrics: metrics.loss,
        "forward": jax.jit(cnn.predict_step),
        "images": [jax.device_put(image, cnn.batch_sharding(mesh)) for image in problem.images],
        "labels": [jax.device_put(label, cnn.batch_sharding(mesh)) for label in problem.labels],
        "settle": cnn.limit_in_flight,
    }
    if variant == "step":
        return JaxProgram(**parts)
    batches = {"image": problem.images, "label": problem.labels}
    parts |= {"images": parts["images"][:1], "labels": parts["labels"][:1]}  # for the logits
    return _Loop(**parts, batches=jax.device_put(batches, cnn.batch_sharding(mesh, axis=1)))


@dataclasses.dataclass
class _Loop(JaxProgram):
    """Trains on many batches in a call.

    Attributes:
      batches: all, stacked.
    """

    batches: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._train_steps = jax.jit(cnn.train_steps, donate_argnums=0)
        self._most, self._batch_size = self.batches["label"].shape

    def train(self, steps: int) -> None:
        """Goes through the batches in turn, from the first."""
        results: list[cnn.Metrics] = []
        for start in range(0, steps, self._most):
            count = min(self._most, steps - start)
            self._state, metrics = self._train_steps(self._state, self.batches, count)
            results.append(metrics)
            self.settle(results)
        jax.block_until_ready(self._state)

    def losses(self, count: int) -> list[float]:
        """Of the first steps, from the first batch on."""
        found: list[float] = []
        while len(found) < count:
            some = min(self._most, count - len(found))
            self._state, metrics = self._train_steps(self._state, self.batches, some)
            found += [float(loss) for loss in metrics.sums["loss"][:some] / self._batch_size]
        return found
