"""Smaller images in the first epochs of a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from cnn.arrays import AnyArray
from cnn.errors import UserError


class Stage(NamedTuple):
    """A part of a run in which all images have one size.

    Attributes:
      scale: by which height and width are multiplied.
      start: the first step.
      stop: the step after the last.
    """

    scale: float
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class ProgressiveResizing:
    """Trains on smaller images at first, which take fewer operations, and on whole ones at last.

    Tan & Le 2021, "EfficientNetV2: Smaller Models and Faster Training", section 4, without its
    change of regularization. It needs a model that takes images of several sizes, such as one that
    pools over all places before its head; the models `speednet` and `resnet18` do.

    Attributes:
      scales: by which height and width are multiplied, of each stage before the last one, which has
        whole images: more than 0 and less than 1.
      until_epochs: where each of these stages ends, in epochs from the start of the run.

    Raises:
      UserError: a scale outside its range, as many numbers in one as in the other are not given, or
        the ends do not rise.

    >>> resizing = ProgressiveResizing(scales=(0.5, 0.75), until_epochs=(1, 2.5))
    >>> resizing.stages(num_steps=40, steps_per_epoch=10)[1:]
    [Stage(scale=0.75, start=10, stop=25), Stage(scale=1.0, start=25, stop=40)]
    """

    scales: Sequence[float] = ()
    until_epochs: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("scales", "until_epochs"):  # hashable, for `jit`
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.scales) != len(self.until_epochs):
            raise UserError(
                f"resizing.scales={self.scales} and resizing.until_epochs={self.until_epochs} must "
                f"have as many numbers each: a scale, and the epoch up to which it holds"
            )
        if not all(0 < scale < 1 for scale in self.scales):
            raise UserError(
                f"resizing.scales={self.scales} must be more than 0 and less than 1; whole images "
                f"follow by themselves"
            )
        ends = (0.0, *self.until_epochs, math.inf)
        if not all(before < end for before, end in itertools.pairwise(ends)):
            raise UserError(
                f"resizing.until_epochs={self.until_epochs} must be more than 0, finite, and rise"
            )

    def stages(self, num_steps: int, steps_per_epoch: int) -> list[Stage]:
        """The stages of a run that have at least a step, in order."""
        ends = [min(round(end * steps_per_epoch), num_steps) for end in self.until_epochs]
        parts = zip((*self.scales, 1.0), [0, *ends], [*ends, num_steps], strict=True)
        return [Stage(*part) for part in parts if part[1] < part[2]]

    def stage(self, step: int, steps_per_epoch: int) -> Stage:
        """The stage that the step after `step` steps is in; the last one ends at 2**31."""
        stages = self.stages(2**31, steps_per_epoch)
        return next(stage for stage in stages if step < stage.stop)


WHOLE_IMAGES = ProgressiveResizing()


def resize_images(
    images: Float[AnyArray, "*batch H W C"], scale: float
) -> Float[Array, "*batch h w C"]:
    """Images with height and width times `scale`, rounded, one pixel at least.

    Each new pixel is a weighted mean of those that it covers (`jax.image.resize`, "linear").

    >>> import jax.numpy as jnp
    >>> print(resize_images(jnp.arange(8.0).reshape(1, 2, 4, 1), 0.5)[0, ..., 0].round(1))
    [[2.7 4.3]]
    """
    *batch, height, width, channels = images.shape
    size = scaled_size((height, width), scale)
    return jax.image.resize(images, (*batch, *size, channels), "linear")


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, rounded, one pixel at least.

    >>> scaled_size((32, 48), 0.75)
    (24, 36)
    """
    height, width = (max(round(side * scale), 1) for side in size)
    return height, width
