"""What all contenders compute: networks, initial weights, batches, update rules. NumPy only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from benchmarks.peers.contenders import plain

# Of the computation; weights, their updates, images and the loss are float32.
DTYPES = ("float32", "bfloat16")
IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10

# At 1e-2 two updates of resnet18 turn rounding into 1e-3 of the loss, at 1e-3 into 1e-5.
LEARNING_RATE = {"baseline": 1e-3, "net94": 1e-2, "resnet18": 1e-3} | dict.fromkeys(
    plain.PLAIN, 1e-3
)
# The baseline trains with Adam. Keras adds epsilon before the bias correction, the others after it:
# at the usual 1e-8 that changes the fifth digit of the loss after three steps, at 1e-10 none.
ADAM_EPSILON = 1e-10
# The others train with SGD: net94 with Nesterov momentum, the rest with plain momentum.
MOMENTUM = {"net94": 0.85, "resnet18": 0.9} | dict.fromkeys(plain.PLAIN, 0.9)

# The 94 % network.
GROUPS = (64, 256, 256)
WHITENING_CHANNELS = 24
BATCH_NORM_DECAY = 0.6
BATCH_NORM_EPSILON = 1e-12
LOGIT_SCALE = 1 / 9

# ResNet-18 (He et al. 2016) for small images: a 3x3 stem without pooling, two basic blocks per
# stage, a projection where the shape changes. 3x3 kernels pad by 1 on each side, also with stride
# 2, where XLA's "SAME" would pad on one side only.
RESNET_WIDTHS = (64, 128, 256, 512)
RESNET_BLOCKS = 2
RESNET_DECAY = 0.9
RESNET_EPSILON = 1e-5

# Multiplications and additions per image. Training takes three times inference, less the input
# gradient of the first layer, and for net94 less the weight gradient of the frozen layer. The zeros
# of SAME padding are counted: a convolution that skips them can exceed the matrix product's rate.
FLOP = {
    ("baseline", "infer"): 8.08e6,
    ("baseline", "train"): 22.7e6,
    ("net94", "infer"): 236e6,
    ("net94", "train"): 709e6,
    ("resnet18", "train"): 3.329e9,
} | {(name, phase): flop for name in plain.PLAIN for phase, flop in plain.flop(name).items()}
NETWORKS = ("baseline", "net94", "resnet18", *plain.PLAIN)

# Enough different images that a sample neither overfits them (gradients so small that some
# processors slow down) nor finds them in the cache.
_MIN_IMAGES = 4096
_MIN_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network and the batches to train it on.

    Attributes:
      network: one of `NETWORKS`.
      weights: layer -> array name -> float32 array, named and laid out as in Flax, in the order in
        which the layers are applied.
      images: `float32[N, B, 32, 32, 3]`, N batches.
      labels: `int32[N, B]`.
      dtype: one of `DTYPES`.
    """

    network: str
    weights: dict[str, dict[str, np.ndarray]]
    images: np.ndarray
    labels: np.ndarray
    dtype: str = "float32"


def make_problem(network: str, batch_size: int, dtype: str = "float32") -> Problem:
    """Draws weights and batches, the same in every process."""
    rng = np.random.default_rng(0)
    draw = {
        "baseline": _baseline_weights,
        "net94": _net94_weights,
        "resnet18": _resnet18_weights,
    }
    weights = draw[network](rng) if network in draw else _plain_weights(rng, network)
    count = max(_MIN_BATCHES, math.ceil(_MIN_IMAGES / batch_size))
    return Problem(
        network=network,
        weights=weights,
        images=rng.random((count, batch_size, *IMAGE_SHAPE), dtype=np.float32),
        labels=rng.integers(NUM_CLASSES, size=(count, batch_size), dtype=np.int32),
        dtype=dtype,
    )


def _layer(rng: np.random.Generator, *shape: int, bias: bool) -> dict[str, np.ndarray]:
    """A kernel that keeps the variance under relu (He et al. 2015), and a small bias, not zero."""
    scale = math.sqrt(2 / math.prod(shape[:-1]))
    layer = {"kernel": scale * rng.standard_normal(shape, dtype=np.float32)}
    if bias:
        layer["bias"] = 0.1 * rng.standard_normal(shape[-1], dtype=np.float32)
    return {name: array.astype(np.float32) for name, array in layer.items()}


def _baseline_weights(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "Conv_0": _layer(rng, 3, 3, 3, 32, bias=True),
        "Conv_1": _layer(rng, 3, 3, 32, 64, bias=True),
        "Dense_0": _layer(rng, 6 * 6 * 64, 64, bias=True),
        "Dense_1": _layer(rng, 64, NUM_CLASSES, bias=True),
    }


def _net94_weights(rng: np.random.Generator) -> dict[str, Any]:
    """The kernel of `whiten` is frozen; each group has two convolutions and two norms."""
    weights = {"whiten": _layer(rng, 2, 2, 3, WHITENING_CHANNELS, bias=True)}
    channels = WHITENING_CHANNELS
    for group, width in enumerate(GROUPS):
        for half in range(2):
            weights[f"conv_{group}_{half}"] = _layer(rng, 3, 3, channels, width, bias=False)
            weights[f"norm_{group}_{half}"] = {"bias": _layer(rng, 1, width, bias=True)["bias"]}
            channels = width
    weights["head"] = _layer(rng, channels, NUM_CLASSES, bias=False)
    return weights


def _resnet18_weights(rng: np.random.Generator) -> dict[str, Any]:
    """Convolutions and norms by stage and block; "project" is the shortcut of a new shape."""
    weights: dict[str, Any] = {}

    def add(name: str, size: int, inputs: int, outputs: int) -> None:
        weights[f"conv_{name}"] = _layer(rng, size, size, inputs, outputs, bias=False)
        one, zero = np.ones(outputs, np.float32), np.zeros(outputs, np.float32)
        weights[f"norm_{name}"] = {"scale": one, "bias": zero}

    channels = RESNET_WIDTHS[0]
    add("stem", 3, 3, channels)
    for stage, width in enumerate(RESNET_WIDTHS):
        for block in range(RESNET_BLOCKS):
            add(f"{stage}_{block}_0", 3, channels, width)
            add(f"{stage}_{block}_1", 3, width, width)
            if channels != width:
                add(f"{stage}_{block}_project", 1, channels, width)
            channels = width
    weights["head"] = _layer(rng, channels, NUM_CLASSES, bias=True)
    return weights


def _plain_weights(rng: np.random.Generator, network: str) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for one in plain.sized_layers(network):
        if one.kernel:
            weights[one.name] = _layer(rng, *one.kernel, bias=plain.has_bias(network))
        else:
            scale, bias = np.ones(one.channels, np.float32), np.zeros(one.channels, np.float32)
            weights[one.name] = {"scale": scale, "bias": bias}
    return weights
