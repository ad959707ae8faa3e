"""Augmentations that fill a box of each image with one colour."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Num, PRNGKeyArray, UInt8

from cnn.arrays import AnyArray
from cnn.errors import UserError

# Of a random box, relative to the image: its area, and rows over columns.
_AREAS, _ASPECTS = (0.02, 0.4), (0.3, 1 / 0.3)
# A random box lies within the image with probability 0.27: of so many, one almost surely does.
_PROPOSALS = 32


def cutout(
    key: PRNGKeyArray,
    images: Num[AnyArray, "B H W C"],
    size: int,
    *,
    fill: UInt8[AnyArray, " C"] | None = None,
) -> Num[Array, "B H W C"]:
    """Fills a square of `size` x `size` pixels of each image, whose centre is any pixel.

    Each centre has equal probability, and the square may extend beyond the image (DeVries & Taylor
    2017, "Improved Regularization of Convolutional Neural Networks with Cutout", section 3.2).

    Args:
      key: of the batch.
      images: to be cut.
      size: of the square.
      fill: the colour of the square; black without one. The paper sets normalized images to 0.

    Raises:
      UserError: if `size` is negative.

    >>> images = jnp.ones((50, 8, 8, 1), jnp.uint8)
    >>> int(cutout(jax.random.key(0), images, 4).sum((1, 2, 3)).min())
    48
    """
    if size < 0:
        raise UserError(f"augment.cutout={size} must be 0 or more")
    batch, height, width, _ = images.shape
    limits = jnp.array([[height], [width]], jnp.int32)
    corner = jax.random.randint(key, (2, batch), 0, limits, jnp.int32) - size // 2
    return _fill_boxes(images, corner, size, fill)


def inner_cutout(
    key: PRNGKeyArray,
    images: Num[AnyArray, "B H W C"],
    size: int,
    *,
    fill: UInt8[AnyArray, " C"] | None = None,
) -> Num[Array, "B H W C"]:
    """Fills a square of `size` x `size` pixels of each image, which lies within the image.

    Each such place has equal probability. It is the Cutout of airbench96
    (github.com/KellerJordan/cifar10-airbench).

    Args:
      key: of the batch.
      images: to be cut.
      size: of the square.
      fill: the colour of the square; black without one.

    Raises:
      UserError: if `size` is negative, or larger than the image.

    >>> images = jnp.ones((50, 8, 8, 1), jnp.uint8)
    >>> jnp.unique(inner_cutout(jax.random.key(0), images, 4).sum((1, 2, 3))).tolist()
    [48]
    """
    batch, height, width, _ = images.shape
    if not 0 <= size <= min(height, width):
        raise UserError(
            f"augment.inner_cutout={size} does not fit images of {height}x{width} pixels; "
            f"choose 0 to {min(height, width)}"
        )
    limits = jnp.array([[height - size + 1], [width - size + 1]], jnp.int32)
    corner = jax.random.randint(key, (2, batch), 0, limits, jnp.int32)
    return _fill_boxes(images, corner, size, fill)


def random_erasing(
    key: PRNGKeyArray,
    images: Num[AnyArray, "B H W C"],
    probability: float,
    *,
    fill: UInt8[AnyArray, " C"] | None = None,
) -> Num[Array, "B H W C"]:
    """Fills a box of random size and proportions in each image with this probability.

    Zhong et al. 2020, "Random Erasing Data Augmentation", algorithm 1, with areas of 0.02 to 0.4 of
    the image and proportions of 0.3 to 1 / 0.3, both uniform. The paper draws size and place again
    until the box lies within the image, as a box of given size does at a fraction
    (1 - height) * (1 - width) of the places. Here 32 sizes are drawn at once, each is accepted with
    that probability, and the first accepted one gets a uniform place within the image: the same
    distribution. One image in 24,000 has no accepted size, and stays as it is.

    Args:
      key: of the batch.
      images: to be erased.
      probability: for each image, 0 to 1.
      fill: the colour of the box; black without one.

    Raises:
      UserError: if `probability` does not lie in 0 to 1.

    >>> images = jnp.ones((500, 8, 8, 1), jnp.uint8)
    >>> erased = jax.jit(random_erasing, static_argnums=2)(jax.random.key(0), images, 0.5) == 0
    >>> bool(abs(erased.any((1, 2, 3)).mean() - 0.5) < 0.1)
    True
    """
    if not 0 <= probability <= 1:
        raise UserError(f"augment.random_erasing={probability} must lie between 0 and 1")
    batch, height, width, _ = images.shape
    size_key, place_key = jax.random.split(key)
    draws = jax.random.uniform(size_key, (3, _PROPOSALS, batch), jnp.float32)
    area, aspect = (
        low + (high - low) * draw
        for (low, high), draw in zip((_AREAS, _ASPECTS), draws[:2], strict=True)
    )
    sides = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
    accepted = draws[2] < jnp.prod(jnp.maximum(1 - sides, 0), axis=0)
    first = jnp.argmax(accepted, axis=0)[None]
    sides = jnp.take_along_axis(sides, first[None], axis=1)[:, 0]
    places = jax.random.uniform(place_key, (3, batch), jnp.float32)
    start = places[:2] * (1 - sides)
    pixels = jnp.array([[height], [width]], jnp.float32)
    corner, end = (jnp.round(edge * pixels).astype(jnp.int32) for edge in (start, start + sides))
    erased = accepted.any(axis=0) & (places[2] < probability)
    return _fill_boxes(images, corner, jnp.where(erased[None], end - corner, 0), fill)


def _fill_boxes(
    images: AnyArray,
    corner: Integer[AnyArray, "2 B"],
    size: Integer[AnyArray, "2 B"] | int,
    fill: AnyArray | None,
) -> jax.Array:
    """Fills a box of each image.

    Args:
      images: `[B, H, W, C]`.
      corner: the first row and the first column; may be negative.
      size: the numbers of rows and columns, or one for both.
      fill: the colour, `[C]`; None is black.
    """
    sizes = jnp.broadcast_to(jnp.asarray(size, jnp.int32), corner.shape)

    def is_inside(axis: int) -> jax.Array:
        place = jnp.arange(images.shape[axis + 1])[None] - corner[axis][:, None]
        return (place >= 0) & (place < sizes[axis][:, None])

    box = is_inside(0)[:, :, None, None] & is_inside(1)[:, None, :, None]
    colour = 0 if fill is None else jnp.asarray(fill)[None, None, None]
    return jnp.where(box, colour, images).astype(images.dtype)
