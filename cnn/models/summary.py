"""A table of the layers of a model, with shapes, parameters and FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.models.conv_pool import ConvPool
from cnn.ops.linen_apply import ModuleApply


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module with parameters of its own.

    Attributes:
      name: its path.
      output: the shape of its output for one image; of a `ConvPool`, before the pooling.
      parameters: how many.
      flops: of its kernel in the forward pass for one image, two per multiply-add.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    flops: float


def model_layers(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> list[Layer]:
    """The layers that hold parameters, in natural order of their names.

    Args:
      model: a linen module of images `[B, H, W, C]`.
      variables: its parameters and other collections, as arrays or as their shapes and dtypes.
      image_shape: (H, W, C).
    """
    outputs = _output_shapes(model, variables, image_shape)
    layers = []
    for path, layer in _layers(variables["params"]):
        shape = outputs[path]
        # Each weight of a kernel is multiplied and added once at each output position.
        weights = layer["kernel"].size if "kernel" in layer else 0
        layers.append(
            Layer(
                name="/".join(path),
                output=shape,
                parameters=sum(leaf.size for leaf in layer.values()),
                flops=2.0 * weights * math.prod(shape[:-1]),
            )
        )
    return layers


def model_summary(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int], *, width: int = 79
) -> str:
    """A table of the layers that hold parameters.

    FLOPs are those of the forward pass for one image, two per multiply-add, in convolutions and
    dense layers only; biases, activations and pooling add a few per cent at most. The output of a
    `ConvPool` is shown as it is before the pooling.

    Args:
      model: a linen module of images `[B, H, W, C]`.
      variables: its parameters and other collections, as arrays or as their shapes and dtypes.
      image_shape: (H, W, C).
      width: columns that the table may have; long names of layers are cut at their beginnings.
    """
    layers = model_layers(model, variables, image_shape)
    rows = [("layer", "output", "parameters", "MFLOP"), ("input", _by(image_shape), "", "")]
    rows += [
        (one.name, _by(one.output), f"{one.parameters:,}", f"{one.flops / 1e6:.2f}")
        for one in layers
    ]
    total_size = sum(one.parameters for one in layers)
    total_flops = sum(one.flops for one in layers)
    rows.append(("total", "", f"{total_size:,}", f"{total_flops / 1e6:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    # Names of nested modules are long and differ at their ends.
    widths[0] = min(widths[0], max(width - sum(widths[1:]) - 8, 8))
    rows = [(_end_of(name, widths[0]), *cells) for name, *cells in rows]
    return "\n".join(
        f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip()
        for a, b, c, d in rows
    )


def _end_of(name: str, length: int) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _layers(params: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and parameters of the modules that have parameters of their own."""
    own = {name: value for name, value in params.items() if not isinstance(value, Mapping)}
    layers = [(path, own)] if own else []
    for name in params.keys() - own.keys():
        layers += _layers(params[name], (*path, name))
    return sorted(layers, key=lambda layer: [_natural(name) for name in layer[0]])


def _natural(name: str) -> tuple[str, int]:
    """Sorts Conv_2 before Conv_10."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _output_shapes(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Output shape of each module for one image, without the batch axis, by path."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__":
            is_pooled = isinstance(module, ConvPool)
            shapes[module.path] = (
                module.convolved_shape(args[0].shape) if is_pooled else jnp.shape(y)[1:]
            )
        return y

    with nn.intercept_methods(record):
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        jax.eval_shape(ModuleApply(model), variables, image)
    return shapes
