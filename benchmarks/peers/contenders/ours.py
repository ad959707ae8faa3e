"""This repository's public API, used as the README shows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import cnn
from benchmarks.peers.contenders import problem as shared
from benchmarks.peers.contenders.flax_networks import JaxProgram, optimizer, textbook_model

_TUNED = {"baseline": cnn.CNN, "net94": cnn.SpeedNet}  # the others are plain, with `fast_cpu`


def program(problem: shared.Problem, variant: str) -> JaxProgram:
    """Shards the batch over one device per core, and replicates the state.

    Args:
      problem: the network and its batches.
      variant: "step", a plain `jax.jit` of `train_step`, called for each batch; or "loop",
        `train_steps` with many batches in one call, as `train.py` trains.
    """
    cnn.use_all_cpu_cores()
    mesh = cnn.data_mesh(jax.devices(), problem.images.shape[1])
    model: nn.Module
    if problem.network in _TUNED:
        model = _TUNED[problem.network](shared.NUM_CLASSES, dtype=jnp.dtype(problem.dtype))
    else:
        model = textbook_model(problem.network, problem.dtype)
    state = cnn.create_train_state(
        model,
        optimizer(problem.network),
        jax.random.key(0),
        shared.IMAGE_SHAPE,
    )
    state = state.replace(params=place(problem.weights, model))
    if problem.network not in _TUNED:
        state = state.replace(apply_fn=cnn.fast_cpu(state.apply_fn))
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


def place(weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The shared weights under the names that a model gives to its parameters.

    Kernels and biases of one shape are assigned in the order in which the model creates them, so
    its layers may have any names.

    Raises:
      UserError: the model has not the same parameters.
    """
    paths: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def init(key: jax.Array, image: jax.Array) -> Any:
        params: Any = model.init(key, image)["params"]
        leaves: dict[Any, Any] = flatten_dict(params)
        paths.extend((path, leaf.shape) for path, leaf in leaves.items())
        return params

    jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *shared.IMAGE_SHAPE)))
    waiting: dict[Any, list[np.ndarray]] = {}
    for arrays in weights.values():
        for name, array in arrays.items():
            waiting.setdefault((name, array.shape), []).append(array)
    try:
        placed = {path: waiting[path[-1], shape].pop(0) for path, shape in paths}
    except (KeyError, IndexError) as error:
        raise cnn.UserError(f"the model has other parameters than its peers: {error}") from error
    if left := [key for key, arrays in waiting.items() if arrays]:
        raise cnn.UserError(f"the model has no parameters for {left}")
    return unflatten_dict(placed)


@dataclasses.dataclass
class _Loop(JaxProgram):
    """Trains on many batches in a call.

    Attributes:
      batches: `{"image": float[N, B, H, W, C], "label": int[N, B]}`.
    """

    batches: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._train_steps = jax.jit(cnn.train_steps, donate_argnums=0)
        self._most, self._batch_size = self.batches["label"].shape

    def train(self, steps: int) -> None:
        """Takes the batches in turn, from the first."""
        results: list[cnn.Metrics] = []
        for start in range(0, steps, self._most):
            count = min(self._most, steps - start)
            self._state, metrics = self._train_steps(self._state, self.batches, count)
            results.append(metrics)
            self.settle(results)
        jax.block_until_ready(self._state)

    def losses(self, count: int) -> list[float]:
        """Of the first steps, starting with the first batch."""
        found: list[float] = []
        while len(found) < count:
            some = min(self._most, count - len(found))
            self._state, metrics = self._train_steps(self._state, self.batches, some)
            found += [float(loss) for loss in metrics.sums["loss"][:some] / self._batch_size]
        return found
