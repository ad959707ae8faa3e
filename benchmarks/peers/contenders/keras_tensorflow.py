"""Keras 3 on TensorFlow through `train_on_batch`: `jit_compile` off ("graph") or on ("xla")."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.peers.contenders import problem as shared


def _baseline() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(shared.IMAGE_SHAPE),
            keras.layers.Conv2D(32, 3, activation="relu", name="Conv_0"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(64, 3, activation="relu", name="Conv_1"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="Dense_0"),
            keras.layers.Dense(shared.NUM_CLASSES, name="Dense_1"),
        ]
    )


def _gelu() -> Any:
    return keras.layers.Activation(lambda x: keras.ops.gelu(x, approximate=False))


def _norm(name: str) -> Any:
    return keras.layers.BatchNormalization(
        momentum=shared.BATCH_NORM_DECAY,
        epsilon=shared.BATCH_NORM_EPSILON,
        scale=False,
        name=name,
    )


class _FrozenKernel(keras.layers.Conv2D):
    """A convolution that trains its bias only."""

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self._kernel.trainable = False


def _net94() -> keras.Model:
    layers = [
        keras.Input(shared.IMAGE_SHAPE),
        _FrozenKernel(shared.WHITENING_CHANNELS, 2, name="whiten"),
        _gelu(),
    ]
    for group, width in enumerate(shared.GROUPS):
        for half in range(2):
            name = f"conv_{group}_{half}"
            layers.append(keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=name))
            if half == 0:
                layers.append(keras.layers.MaxPooling2D(2))
            layers += [_norm(f"norm_{group}_{half}"), _gelu()]
    layers += [
        keras.layers.MaxPooling2D(3),
        keras.layers.Flatten(),
        keras.layers.Dense(shared.NUM_CLASSES, use_bias=False, name="head"),
        keras.layers.Rescaling(shared.LOGIT_SCALE),
    ]
    return keras.Sequential(layers)


def _optimizer(network: str) -> Any:
    rate = shared.LEARNING_RATE[network]
    if network == "baseline":
        return keras.optimizers.Adam(rate, epsilon=shared.ADAM_EPSILON)
    return keras.optimizers.SGD(rate, momentum=shared.MOMENTUM[network], nesterov=True)


class KerasProgram:
    """A compiled Keras model and the batches as TensorFlow tensors.

    Args:
      variant: "graph" or "xla".
    """

    def __init__(self, problem: shared.Problem, variant: str) -> None:
        self._model = _baseline() if problem.network == "baseline" else _net94()
        for name, arrays in problem.weights.items():
            layer = self._model.get_layer(name)
            for key, array in arrays.items():
                variable = layer.beta if name.startswith("norm") else getattr(layer, key)
                variable.assign(array)
        self._model.compile(
            optimizer=_optimizer(problem.network),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=variant == "xla",
        )
        self._model.optimizer.build(self._model.trainable_variables)
        self._variables = [*self._model.variables, *self._model.optimizer.variables]
        self._initial = [np.array(variable) for variable in self._variables]
        self._images = [tf.constant(image) for image in problem.images]
        self._labels = [tf.constant(label) for label in problem.labels]

    def reset(self) -> None:
        """Restores the initial weights and optimizer state."""
        for variable, value in zip(self._variables, self._initial, strict=True):
            variable.assign(value)

    def losses(self, count: int) -> list[float]:
        """Of the first steps. The metrics are reset, else Keras returns a running mean."""
        found = []
        for image, label in itertools.islice(zip(self._images, self._labels, strict=True), count):
            self._model.reset_metrics()
            found.append(float(np.asarray(self._model.train_on_batch(image, label)).ravel()[0]))
        return found

    def logits(self) -> np.ndarray:
        """Of the first batch."""
        return np.asarray(self._model.predict_on_batch(self._images[0]))

    def train(self, steps: int) -> None:
        """`train_on_batch` returns the loss as a number, hence after the step."""
        for step in range(steps):
            batch = step % len(self._images)
            self._model.train_on_batch(self._images[batch], self._labels[batch])

    def infer(self, steps: int) -> None:
        """`predict_on_batch` returns NumPy logits, hence after the step."""
        for step in range(steps):
            self._model.predict_on_batch(self._images[step % len(self._images)])
