"""PyTorch: eager or compiled, NCHW or channels-last ("nhwc") memory; bfloat16 by autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.contenders import plain
from benchmarks.peers.contenders import problem as shared


class _Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * shared.LOGIT_SCALE


def _baseline() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 6 * 64, 64),
        nn.ReLU(),
        nn.Linear(64, shared.NUM_CLASSES),
    )


def _net94() -> nn.Sequential:
    def norm(width: int) -> nn.BatchNorm2d:
        layer = nn.BatchNorm2d(
            width, eps=shared.BATCH_NORM_EPSILON, momentum=1 - shared.BATCH_NORM_DECAY
        )
        layer.weight.requires_grad_(False)
        return layer

    whiten = nn.Conv2d(3, shared.WHITENING_CHANNELS, 2)
    whiten.weight.requires_grad_(False)
    layers = [whiten, nn.GELU()]
    channels = shared.WHITENING_CHANNELS
    for width in shared.GROUPS:
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            norm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm(width),
            nn.GELU(),
        ]
        channels = width
    head = nn.Linear(channels, shared.NUM_CLASSES, bias=False)
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), head, _Scale())


def _to_torch(network: str, layer: str, name: str, array: np.ndarray) -> torch.Tensor:
    """Converts kernels from HWIO to OIHW, and from [in, out] to [out, in]."""
    if network == "baseline" and layer == "Dense_0" and name == "kernel":
        # Flax flattens (height, width, channel), PyTorch (channel, height, width).
        array = array.reshape(6, 6, 64, -1).transpose(2, 0, 1, 3).reshape(array.shape)
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_norm(inputs, width, stride=stride), nn.ReLU(), *_conv_norm(width, width)
        )
        project = stride > 1 or inputs != width
        self.shortcut = nn.Sequential(
            *(_conv_norm(inputs, width, size=1, stride=stride) if project else [])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _conv_norm(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs, shared.RESNET_EPSILON, momentum=1 - shared.RESNET_DECAY),
    ]


def _resnet18() -> nn.Sequential:
    channels = shared.RESNET_WIDTHS[0]
    layers = [*_conv_norm(3, channels), nn.ReLU()]
    for stage, width in enumerate(shared.RESNET_WIDTHS):
        for block in range(shared.RESNET_BLOCKS):
            layers.append(_BasicBlock(channels, width, stride=2 if stage and not block else 1))
            channels = width
    head = nn.Linear(channels, shared.NUM_CLASSES)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class _Tokens(nn.Module):
    """`[B, C, H, W]` -> `[B, H * W, C]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """`[B, T, 3 * C]`, queries, keys and values of all heads -> `[B, T, C]`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = x.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _Mean(nn.Module):
    """Over the pixels of `[B, C, H, W]` or the tokens of `[B, T, C]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if x.ndim == 3 else F.adaptive_avg_pool2d(x, 1).flatten(1)


class _LastAxis(nn.Module):
    """Applies a layer to the channels of `[B, C, H, W]`, together in channels-last memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:
            return self.layer(x)
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Residual(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _plain(network: str) -> nn.Sequential:
    bias = plain.has_bias(network)
    sized = iter(plain.sized_layers(network))

    def build(layers: tuple[plain.Layer, ...]) -> list[nn.Module]:
        return [layer for one in layers for layer in build_one(*one)]

    def build_one(kind: str, *sizes: Any) -> list[nn.Module]:
        if kind == "residual":
            return [_Residual(build(sizes[0]))]
        if kind == "attention":
            return [_Attention(*sizes)]
        if kind in _UNSIZED:
            return [_UNSIZED[kind]()]
        channels, kernel = (one := next(sized)).channels, one.kernel
        if kind == "norm":
            momentum = 1 - shared.RESNET_DECAY
            return [nn.BatchNorm2d(channels, shared.RESNET_EPSILON, momentum)]
        if kind == "layer_norm":
            return [_LastAxis(nn.LayerNorm(channels, shared.RESNET_EPSILON))]
        if kind == "dense":
            return [_LastAxis(nn.Linear(*kernel, bias=bias))]
        size, stride = kernel[0], sizes[-1]
        groups, padding = channels if kind == "depthwise" else 1, size // 2 if size % 2 else 0
        inputs = groups * kernel[2]
        return [nn.Conv2d(inputs, channels, size, stride, padding, groups=groups, bias=bias)]

    return nn.Sequential(*build(plain.PLAIN[network]))


_UNSIZED: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "pool": lambda: nn.MaxPool2d(2),
    "tokens": _Tokens,
    "mean": _Mean,
}


class TorchProgram:
    """A module, its fused optimizer and the batches.

    Args:
      variant: "eager" or "compile", "-", "nchw" or "nhwc".
    """

    def __init__(self, problem: shared.Problem, variant: str) -> None:
        mode, layout = variant.split("-")
        memory: Any = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        self._network = problem.network
        self._autocast = functools.partial(
            torch.autocast, "cpu", torch.bfloat16, enabled=problem.dtype == "bfloat16"
        )
        named = {"baseline": _baseline, "net94": _net94, "resnet18": _resnet18}
        build = named.get(problem.network, functools.partial(_plain, problem.network))
        self._module = build().to(memory_format=memory)
        self._load(problem)
        self._initial = {name: array.clone() for name, array in self._module.state_dict().items()}
        images = torch.from_numpy(problem.images).permute(0, 1, 4, 2, 3)
        self._images = [image.contiguous(memory_format=memory) for image in images]
        self._labels = list(torch.from_numpy(problem.labels.astype(np.int64)))

        def loss(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self._module(image), label)

        compiled: Callable[..., Any] = torch.compile if mode == "compile" else lambda fn: fn
        self._loss = compiled(loss)
        self._forward = compiled(self._module)
        self.reset()

    def _load(self, problem: shared.Problem) -> None:
        holders = [one for one in self._module.modules() if list(one.parameters(recurse=False))]
        with torch.no_grad():
            for layer, (name, arrays) in zip(holders, problem.weights.items(), strict=True):
                for key, array in arrays.items():
                    parameter = layer.bias if key == "bias" else layer.weight
                    parameter.copy_(_to_torch(self._network, name, key, array))

    def reset(self) -> None:
        """Restores the initial weights; a new optimizer, fused, which is the fastest kind."""
        self._module.load_state_dict(self._initial)
        trained = [array for array in self._module.parameters() if array.requires_grad]
        rate = shared.LEARNING_RATE[self._network]
        self._optimizer: torch.optim.Optimizer
        if self._network == "baseline":
            self._optimizer = torch.optim.Adam(trained, rate, eps=shared.ADAM_EPSILON, fused=True)
        else:
            self._optimizer = torch.optim.SGD(
                trained,
                rate,
                momentum=shared.MOMENTUM[self._network],
                nesterov=self._network == "net94",
                fused=True,
            )

    def losses(self, count: int) -> list[float]:
        """Of the first steps, from the current weights."""
        return [float(self._run(1, start)) for start in range(count)]

    def logits(self) -> np.ndarray:
        """Of the first batch."""
        self._module.eval()
        with torch.inference_mode(), self._autocast():
            return self._forward(self._images[0]).float().numpy()

    def train(self, steps: int) -> None:
        """On a CPU a step has ended when its last call returns, compiled or not."""
        float(self._run(steps))

    def infer(self, steps: int) -> None:
        """Computes `steps` batches in inference mode."""
        self._module.eval()
        with torch.inference_mode(), self._autocast():
            for step in range(steps):
                self._forward(self._images[step % len(self._images)])

    def _run(self, steps: int, start: int = 0) -> torch.Tensor:
        self._module.train()
        loss = torch.zeros(())
        for step in range(start, start + steps):
            batch = step % len(self._images)
            with self._autocast():
                loss = self._loss(self._images[batch], self._labels[batch])
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()
