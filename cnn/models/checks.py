"""Checks of models' fields and image sizes, with one-line messages that name config fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from cnn.errors import UserError
from cnn.ops.convolution import IMPLEMENTATIONS
from cnn.registry import shown

# A larger number is a typing error that would exhaust the memory.
_MAX_WIDTH = 2**16
_CHOICES = {"padding": ("VALID", "SAME"), "conv_implementation": IMPLEMENTATIONS}


def check_fields(model: nn.Module, **lowest: int) -> None:
    """Checks the ranges of a module's fields; those named like `_CHOICES` hold one of these.

    Args:
      model: the module, in its `__post_init__`.
      **lowest: the smallest allowed value of each field that holds a number of channels or pixels,
        or a sequence of them.

    Raises:
      UserError: a value is impossible.
    """
    for name, low in lowest.items():
        value = getattr(model, name)
        if isinstance(value, Sequence):
            widths, must = value, f"hold whole numbers from {low} to {_MAX_WIDTH}"
        else:
            widths, must = (value,), f"lie between {low} and {_MAX_WIDTH}"
        if not all(_is_int(width) and low <= width <= _MAX_WIDTH for width in widths):
            raise UserError(f"model.{name}={shown(value)} must {must}")
    for name, choices in _CHOICES.items():
        if getattr(model, name, choices[0]) not in choices:
            value = shown(getattr(model, name))
            raise UserError(f"model.{name}={value} must be one of {', '.join(choices)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_image_rank(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raises UserError unless images are `[B, H, W, C]`."""
    if len(shape) != 4:
        title = type(model).__name__
        raise UserError(f"{title} takes images of shape [B, H, W, C], not {list(shape)}")


def check_blocks(model: Any, shape: tuple[int, ...], patch_size: int = 1) -> None:
    """Checks that images are large enough for blocks of convolution and 2x2 pooling.

    Args:
      model: has the fields `features`, `kernel_size` and `padding`.
      shape: of the images, (B, H, W, C).
      patch_size: the pixels a side that a stem before the blocks reduces to one.

    Raises:
      UserError: images are not `[B, H, W, C]`, a block has too few pixels for its pooling, or the
        kernel is larger than any part of the image that it could cover.
    """
    check_image_rank(model, shape)
    size = f"images of {shape[1]}x{shape[2]} pixels"
    largest = 2 * max(shape[1:3]) - 1
    if model.kernel_size > largest:
        raise UserError(
            f"model.kernel_size={model.kernel_size} is too much for {size}: beyond {largest} "
            f"no further pixel is covered"
        )
    side = min(shape[1:3]) // patch_size
    for block in range(len(model.features)):
        convolved = side if model.padding == "SAME" else side - model.kernel_size + 1
        if convolved < 2:
            raise UserError(
                f"{size} are too small for {type(model).__name__}: {side} pixels reach block "
                f"{block + 1}, {max(convolved, 0)} its pooling, which needs 2; use fewer "
                f"model.features, a smaller model.kernel_size"
                f"{' or model.patch_size' if patch_size > 1 else ''} or model.padding=SAME"
            )
        side = convolved // 2
