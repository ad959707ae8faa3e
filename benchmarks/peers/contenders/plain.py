"""Networks of plain layers, as a list of layers that each framework builds in its own terms.

A small VGG (Simonyan & Zisserman 2015), a MobileNet (Howard et al. 2017: depthwise separable
convolutions) and a ConvNeXt (Liu et al. 2022: 7x7 depthwise convolutions, layer normalization),
each for 32x32 images. NumPy only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

Layer = tuple[Any, ...]


def _conv(features: int, size: int = 3, stride: int = 1) -> Layer:
    return ("conv", features, size, stride)


def _depthwise(size: int = 3, stride: int = 1) -> Layer:
    return ("depthwise", size, stride)


NORM, LAYER_NORM, RELU, GELU, POOL, MEAN = (
    (kind,) for kind in ("norm", "layer_norm", "relu", "gelu", "pool", "mean")
)


def _separable(features: int, stride: int) -> list[Layer]:
    return [_depthwise(stride=stride), NORM, RELU, _conv(features, 1), NORM, RELU]


def _next(features: int) -> Layer:
    wide, back = ("dense", 4 * features), ("dense", features)
    return ("residual", (_depthwise(7), LAYER_NORM, wide, GELU, back))


_WIDTHS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))
PLAIN: dict[str, tuple[Layer, ...]] = {
    "vgg": (
        *(_conv(64), RELU, POOL, _conv(128), RELU, POOL),
        *(_conv(256), RELU, _conv(256), RELU, POOL, _conv(512), RELU, _conv(512), RELU, POOL),
        *(MEAN, ("dense", 512), RELU, ("dense", 10)),
    ),
    "mobilenet": (
        *(_conv(32), NORM, RELU),
        *(layer for width, stride in _WIDTHS for layer in _separable(width, stride)),
        *(MEAN, ("dense", 10)),
    ),
    "convnext": (
        *(_conv(64, 2, 2), LAYER_NORM, _next(64), _next(64), LAYER_NORM),
        *(_conv(128, 2, 2), _next(128), _next(128), MEAN, LAYER_NORM, ("dense", 10)),
    ),
}


class Sized(NamedTuple):
    """A layer with parameters, and what it is applied to.

    Attributes:
      name: in the weights.
      kernel: shape of its kernel, as in Flax; () for a normalization.
      channels: of its output.
      side: of its output, in pixels.
    """

    name: str
    kernel: tuple[int, ...]
    channels: int
    side: int


def sized_layers(network: str, channels: int = 3, side: int = 32) -> list[Sized]:
    """The layers with parameters in the order in which they are applied."""
    found: list[Sized] = []

    def add(layers: tuple[Layer, ...], channels: int, side: int) -> tuple[int, int]:
        for layer in layers:
            kind, kernel = layer[0], ()
            if kind == "residual":
                channels, side = add(layer[1], channels, side)
                continue
            if kind == "conv":
                kernel, channels = (layer[2], layer[2], channels, layer[1]), layer[1]
                side = side // layer[3]
            elif kind == "depthwise":
                kernel, side = (layer[1], layer[1], 1, channels), side // layer[2]
            elif kind == "dense":
                kernel, channels = (channels, layer[1]), layer[1]
            elif kind in ("pool", "mean"):
                side = side // 2 if kind == "pool" else 1
            if kernel or kind in ("norm", "layer_norm"):
                found.append(Sized(f"{kind}_{len(found)}", kernel, channels, side))
        return channels, side

    add(PLAIN[network], channels, side)
    return found


def has_bias(network: str) -> bool:
    """Whether kernels have one: before a batch normalization it would have no effect."""
    return NORM not in PLAIN[network]


def flop(network: str) -> dict[str, float]:
    """Multiplications and additions of an image, by phase; the first layer needs no input gradient.

    >>> {phase: round(value / 1e6, 1) for phase, value in flop("mobilenet").items()}
    {'infer': 33.1, 'train': 97.4}
    """
    layers = [one for one in sized_layers(network) if one.kernel]
    of_layer = [2.0 * math.prod(one.kernel) * one.side**2 for one in layers]
    return {"infer": sum(of_layer), "train": 3 * sum(of_layer) - of_layer[0]}
