"""Networks of plain layers, as a list of layers that each framework builds in its own terms.

A small VGG (Simonyan & Zisserman 2015), a MobileNet (Howard et al. 2017: depthwise separable
convolutions), a ConvNeXt (Liu et al. 2022: 7x7 depthwise convolutions, layer normalization) and a
ViT (Dosovitskiy et al. 2021: self-attention of patches; here without positions, and with the mean
of the patches in place of a class token), each for 32x32 images. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Layer = tuple[Any, ...]


def _conv(features: int, size: int = 3, stride: int = 1) -> Layer:
    return ("conv", features, size, stride)


def _depthwise(size: int = 3, stride: int = 1) -> Layer:
    return ("depthwise", size, stride)


NORM, LAYER_NORM, RELU, GELU, POOL, TOKENS, MEAN = (
    (kind,) for kind in ("norm", "layer_norm", "relu", "gelu", "pool", "tokens", "mean")
)


def _separable(features: int, stride: int) -> list[Layer]:
    return [_depthwise(stride=stride), NORM, RELU, _conv(features, 1), NORM, RELU]


def _next(features: int) -> Layer:
    wide, back = ("dense", 4 * features), ("dense", features)
    return ("residual", (_depthwise(7), LAYER_NORM, wide, GELU, back))


def _transformer(features: int, heads: int) -> list[Layer]:
    """Queries, keys and values of all heads are one dense layer, in this order."""
    attention = ("dense", 3 * features), ("attention", heads), ("dense", features)
    mlp = ("dense", 4 * features), GELU, ("dense", features)
    return [("residual", (LAYER_NORM, *attention)), ("residual", (LAYER_NORM, *mlp))]


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
    "vit": (
        *(_conv(128, 4, 4), TOKENS),
        *(layer for _ in range(4) for layer in _transformer(128, 4)),
        *(LAYER_NORM, MEAN, ("dense", 10)),
    ),
}


class Sized(NamedTuple):
    """A layer and what comes out of it.

    Attributes:
      name: its kind; of a layer with parameters, its name in the weights.
      kernel: shape of its kernel, as in Flax; () if it has none.
      channels: of its output.
      side: of its output, in pixels or patches.
    """

    name: str
    kernel: tuple[int, ...]
    channels: int
    side: int


def sized_layers(network: str) -> list[Sized]:
    """The layers with parameters in the order in which they are applied."""
    found = [
        one for one in _walk(PLAIN[network]) if one.kernel or one.name in ("norm", "layer_norm")
    ]
    return [one._replace(name=f"{one.name}_{place}") for place, one in enumerate(found)]


def _walk(layers: Sequence[Layer], channels: int = 3, side: int = 32) -> Iterator[Sized]:
    """The layers in the order in which they are applied; a residual leaves the shape as it is."""
    for kind, *sizes in layers:
        kernel: tuple[int, ...] = ()
        if kind == "residual":
            yield from _walk(sizes[0], channels, side)
            continue
        if kind == "conv":
            kernel = (sizes[1], sizes[1], channels, sizes[0])
            channels, side = sizes[0], side // sizes[2]
        elif kind == "depthwise":
            kernel, side = (sizes[0], sizes[0], 1, channels), side // sizes[1]
        elif kind == "dense":
            kernel, channels = (channels, sizes[0]), sizes[0]
        elif kind == "attention":
            channels //= 3
        elif kind in ("pool", "mean"):
            side = side // 2 if kind == "pool" else 1
        yield Sized(kind, kernel, channels, side)


def has_bias(network: str) -> bool:
    """Whether kernels have one: before a batch normalization it would have no effect."""
    return NORM not in PLAIN[network]


def flop(network: str) -> dict[str, float]:
    """Multiplications and additions of an image, by phase; the first layer needs no input gradient.

    >>> {phase: round(value / 1e6, 1) for phase, value in flop("mobilenet").items()}
    {'infer': 33.1, 'train': 97.4}
    """
    of_layer = [_layer_flop(one) for one in _walk(PLAIN[network])]
    return {"infer": sum(of_layer), "train": 3 * sum(of_layer) - of_layer[0]}


def _layer_flop(one: Sized) -> float:
    if one.name == "attention":  # all queries with all keys, then their weights with all values
        return 2 * 2.0 * one.side**4 * one.channels
    return 2.0 * math.prod(one.kernel) * one.side**2 if one.kernel else 0.0
