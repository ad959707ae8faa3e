"""Mixup and CutMix: each image of a batch is mixed with another one, and its loss as well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from cnn.arrays import AnyArray
from cnn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mix:
    """A function `(key, batch) -> batch` that mixes normalized images with their neighbours.

    The neighbour is the image before in the batch, whose order is random. One share per batch is
    drawn from Beta(alpha, alpha). Of both kinds, one is chosen for each batch with probability 1/2.

    - mixup: the images are averaged with that share (Zhang et al. 2018, "mixup: Beyond Empirical
      Risk Minimization", eq. 1).
    - CutMix: a box of that share of the area, whose centre is any pixel, comes from the neighbour;
      the part of it that lies outside the image does not count (Yun et al. 2019, "CutMix", section
      3.1).

    Args:
      mixup: alpha, 0 for none.
      cutmix: alpha, 0 for none.

    Raises:
      UserError: an alpha is negative or not finite, or both are 0.

    >>> batch = {"image": jnp.zeros((3, 4, 4, 1)), "label": jnp.arange(3)}
    >>> mixed = Mix(mixup=0.2)(jax.random.key(0), batch)
    >>> sorted(mixed)
    ['image', 'label', 'label_weight', 'other_label']
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, alpha in dataclasses.asdict(self).items():
            if not 0 <= alpha < math.inf:
                raise UserError(f"augment.{name}={alpha} must be 0 or more, and finite")
        if not (self.mixup or self.cutmix):
            raise UserError("augment.mixup and augment.cutmix are both 0; set one of them")

    def __call__(self, key: PRNGKeyArray, batch: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Mixes a batch.

        Args:
          key: of the batch.
          batch: `image` float32[B, H, W, C], `label` int32[B].

        Returns:
          `image`; `label` int32[B], of the image with the larger share; `other_label` int32[B], of
          the other one; `label_weight` float32[B], the share of `label`, 0.5 to 1.
        """
        image, label = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
        choice_key, key = jax.random.split(key)
        kinds = ((_mixup, self.mixup), (_cutmix, self.cutmix))
        shares = [share(key, alpha, *image.shape[1:3]) for share, alpha in kinds if alpha]
        if len(shares) == 2:
            is_first = jax.random.bernoulli(choice_key, jnp.float32(0.5))
            shares = [jax.tree.map(lambda one, two: jnp.where(is_first, one, two), *shares)]
        ((pixels, weight),) = shares
        pixels = pixels[None, :, :, None]
        labels, neighbour = (label, jnp.roll(label, 1)), jnp.roll(image, 1, axis=0)
        first, second = (jnp.where(weight < 0.5, *pair) for pair in (labels[::-1], labels))
        return {
            "image": pixels * image + (1 - pixels) * neighbour,
            "label": first,
            "other_label": second,
            "label_weight": jnp.full(label.shape, jnp.maximum(weight, 1 - weight)),
        }


def _mixup(key: AnyArray, alpha: float, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The share of an image in each pixel, `float32[H, W]`, and in all, `float32[]`."""
    share = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    return jnp.full((height, width), share), share


def _cutmix(key: AnyArray, alpha: float, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """As `_mixup`: 0 in a box, 1 elsewhere."""
    share_key, centre_key = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32))
    limits = jnp.array([height, width], jnp.int32)
    centre = jax.random.randint(centre_key, (2,), 0, limits, jnp.int32)

    def is_cut(size: int, centre: jax.Array) -> jax.Array:
        extent = jnp.round(size * side).astype(jnp.int32)
        place = jnp.arange(size, dtype=jnp.int32) - (centre - extent // 2)
        return (place >= 0) & (place < extent)

    cut = is_cut(height, centre[0])[:, None] & is_cut(width, centre[1])[None]
    return 1 - cut.astype(jnp.float32), 1 - cut.sum() / jnp.float32(height * width)
