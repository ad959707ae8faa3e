"""What all contenders compute: networks, initial weights, batches, update rules. NumPy only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10

# Of both networks' updates.
LEARNING_RATE = {"seed": 1e-3, "net94": 1e-2}
# Keras adds epsilon before the bias correction, the others after it. At the usual 1e-8 that shows
# in the fifth digit of the loss after three steps; at 1e-10 nowhere.
ADAM_EPSILON = 1e-10
MOMENTUM = 0.85

# Of the 94 % network.
GROUPS = (64, 256, 256)
WHITENING_CHANNELS = 24
BATCH_NORM_DECAY = 0.6
BATCH_NORM_EPSILON = 1e-12
LOGIT_SCALE = 1 / 9

# Multiplications and additions per image. Training is three times inference, less the input
# gradient of the seed's first layer, and less the weight gradient of net94's frozen one. The zeros
# of net94's SAME padding count: who skips them can do more than a matrix product seems to allow.
FLOP = {
    ("seed", "infer"): 8.08e6,
    ("seed", "train"): 22.7e6,
    ("net94", "infer"): 236e6,
    ("net94", "train"): 709e6,
}
NETWORKS = ("seed", "net94")
PHASES = ("train", "infer")

# Enough different images that a sample neither learns them by heart (gradients so small that
# some processors slow down) nor finds them in the cache.
_MIN_IMAGES = 4096
_MIN_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network and the batches to train it on.

    Attributes:
      network: one of `NETWORKS`.
      weights: layer -> array name -> float32 array, named and laid out as in Flax.
      images: `float32[N, B, 32, 32, 3]`, N batches.
      labels: `int32[N, B]`.
    """

    network: str
    weights: dict[str, dict[str, np.ndarray]]
    images: np.ndarray
    labels: np.ndarray


def make_problem(network: str, batch_size: int) -> Problem:
    """The same weights and batches in every process."""
    rng = np.random.default_rng(0)
    draw = {"seed": _seed_weights, "net94": _net94_weights}[network]
    weights = draw(rng)
    count = max(_MIN_BATCHES, math.ceil(_MIN_IMAGES / batch_size))
    return Problem(
        network=network,
        weights=weights,
        images=rng.random((count, batch_size, *IMAGE_SHAPE), dtype=np.float32),
        labels=rng.integers(NUM_CLASSES, size=(count, batch_size), dtype=np.int32),
    )


def _layer(rng: np.random.Generator, *shape: int, bias: bool) -> dict[str, np.ndarray]:
    """A kernel that keeps the variance of relu's outputs, and a small bias that is not zero."""
    scale = math.sqrt(2 / math.prod(shape[:-1]))
    layer = {"kernel": scale * rng.standard_normal(shape, dtype=np.float32)}
    if bias:
        layer["bias"] = 0.1 * rng.standard_normal(shape[-1], dtype=np.float32)
    return {name: array.astype(np.float32) for name, array in layer.items()}


def _seed_weights(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "Conv_0": _layer(rng, 3, 3, 3, 32, bias=True),
        "Conv_1": _layer(rng, 3, 3, 32, 64, bias=True),
        "Dense_0": _layer(rng, 6 * 6 * 64, 64, bias=True),
        "Dense_1": _layer(rng, 64, NUM_CLASSES, bias=True),
    }


def _net94_weights(rng: np.random.Generator) -> dict[str, Any]:
    """`whiten` is frozen but for its bias; each group has two convolutions and two norms."""
    weights = {"whiten": _layer(rng, 2, 2, 3, WHITENING_CHANNELS, bias=True)}
    channels = WHITENING_CHANNELS
    for group, width in enumerate(GROUPS):
        for half in range(2):
            weights[f"conv_{group}_{half}"] = _layer(rng, 3, 3, channels, width, bias=False)
            weights[f"norm_{group}_{half}"] = {"bias": _layer(rng, 1, width, bias=True)["bias"]}
            channels = width
    weights["head"] = _layer(rng, channels, NUM_CLASSES, bias=False)
    return weights
