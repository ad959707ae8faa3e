"""TrivialAugment: one random operation of random strength on each image.

Operations that move pixels are one gather, those that change each value of a pixel by itself are
one table for each channel. All arithmetic is in integers, so that the bits do not depend on how and
for what device it is compiled.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray, UInt8

from cnn.arrays import AnyArray
from cnn.errors import UserError

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
STRENGTHS = 31
# Strength 30 of the Wide space.
_LARGEST_ANGLE, _LARGEST_SHIFT = 135, 32
_ONE = 2**16  # the unit of the matrices that move pixels
_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_BLENDED = tuple(map(OPERATIONS.index, ("brightness", "color", "contrast", "sharpness")))


def trivial_augment(
    key: PRNGKeyArray, images: UInt8[AnyArray, "B H W C"]
) -> UInt8[Array, "B H W C"]:
    """Applies one random operation of random strength to each image (TrivialAugment).

    Operation, strength and direction are uniform (Müller & Hutter 2021, "TrivialAugment:
    Tuning-free Yet State-of-the-Art Data Augmentation", algorithm 1, with the Wide space).

    Raises:
      UserError: if images have neither 1 nor 3 channels.

    >>> images = jnp.full((2, 4, 4, 3), 9, jnp.uint8)
    >>> jax.eval_shape(trivial_augment, jax.random.key(0), images)
    ShapeDtypeStruct(shape=(2, 4, 4, 3), dtype=uint8)
    """
    count = len(OPERATIONS) * STRENGTHS * 2
    draw = jax.random.randint(key, images.shape[:1], 0, count, jnp.int32)
    return transform(images, draw // (STRENGTHS * 2), draw // 2 % STRENGTHS, draw % 2 == 1)


def transform(
    images: UInt8[AnyArray, "B H W C"], operation: AnyArray, strength: AnyArray, negative: AnyArray
) -> UInt8[Array, "B H W C"]:
    """Applies an operation to each image, as Pillow does; what comes from outside is black.

    Args:
      images: of 1 or 3 channels.
      operation: `int32[B]`, a place in `OPERATIONS`.
      strength: `int32[B]`, 0 to 30; without meaning for identity, autocontrast and equalize.
      negative: `bool[B]`, whether to shear, move, rotate or change colours the other way.

    Raises:
      UserError: if images have neither 1 nor 3 channels.
    """
    if images.shape[-1] not in (1, 3):
        raise UserError(
            f"augment.trivial_augment needs images of 1 or 3 channels, not {images.shape[-1]}"
        )
    images = _stored(jnp.asarray(images), operation)
    factor = _factor(operation, strength, negative)
    wide = images.astype(jnp.int32)
    channel = jnp.arange(images.shape[-1], dtype=jnp.int32)[None, None, None]
    table = _stored(_table(images, operation, strength, factor), operation)
    return _choose(
        operation,
        _take(table.reshape(len(images), -1), 256 * channel + wide),
        **dict.fromkeys(_MOVES, _move(images, operation, strength, negative)),
        color=_blend(wide, factor, _gray(wide)).astype(jnp.uint8),
        sharpness=_blend(wide, factor, _blur(wide)).astype(jnp.uint8),
    )


def _stored(x: jax.Array, operation: AnyArray) -> jax.Array:
    """The same array `[B, ...]`, in memory.

    XLA's CPU compiler would compute it again for each use of one of its values: it ignores
    `optimization_barrier`, but puts the result of a scatter into memory. The place where each row
    is put is 0, which must not be a constant.
    """
    if jax.default_backend() != "cpu":
        return x

    def store(row: jax.Array, place: jax.Array) -> jax.Array:
        return jnp.zeros_like(row)[None].at[place].set(row, mode="promise_in_bounds")[0]

    return jax.vmap(store)(x, jnp.minimum(operation, 0))


def _matrices() -> np.ndarray:
    """From the place of a pixel of the result to that in the image, for all that may be drawn.

    Returns:
      `int32[operation, strength, negative, 6]` in units of 1 / `_ONE`: a, b, c, d, e, f of
      `x = a * x + b * y + c`, `y = d * x + e * y + f`. The origin is the centre of the image for a
      rotation, and its corner else.
    """
    table = np.zeros((len(OPERATIONS), STRENGTHS, 2, 6))
    table[..., 0] = table[..., 4] = 1
    for strength in range(STRENGTHS):
        for negative, sign in enumerate((1, -1)):
            shear = sign * 0.033 * strength
            shift = -sign * (_LARGEST_SHIFT * strength // (STRENGTHS - 1))
            angle = math.radians(sign * _LARGEST_ANGLE * strength / (STRENGTHS - 1))
            cos, sin = math.cos(angle), math.sin(angle)
            for name, matrix in (
                ("shear_x", (1, shear, 0, 0, 1, 0)),
                ("shear_y", (1, 0, 0, shear, 1, 0)),
                ("translate_x", (1, 0, shift, 0, 1, 0)),
                ("translate_y", (1, 0, 0, 0, 1, shift)),
                ("rotate", (cos, -sin, 0, sin, cos, 0)),
            ):
                table[OPERATIONS.index(name), strength, negative] = matrix
    return np.round(table * _ONE).astype(np.int32)


_MATRICES = _matrices()


def _move(
    images: AnyArray, operation: AnyArray, strength: AnyArray, negative: AnyArray
) -> jax.Array:
    """Shears, translations and rotations: each pixel becomes the nearest one of the image."""
    batch, height, width, channels = images.shape
    matrix = jnp.asarray(_MATRICES)[operation, strength, negative.astype(jnp.int32)]
    a, b, c, d, e, f = (matrix[:, i, None, None] for i in range(6))
    is_rotated = (operation == OPERATIONS.index("rotate"))[:, None, None]
    # In halves of a pixel, so that the centres of pixels and of the image are whole numbers.
    middle_x, middle_y = (jnp.where(is_rotated, size, 0) for size in (width, height))
    x = 2 * jnp.arange(width, dtype=jnp.int32)[None, None] + 1 - middle_x
    y = 2 * jnp.arange(height, dtype=jnp.int32)[None, :, None] + 1 - middle_y
    column = (a * x + b * y + 2 * c + middle_x * _ONE) // (2 * _ONE)
    row = (d * x + e * y + 2 * f + middle_y * _ONE) // (2 * _ONE)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = jnp.where(inside, row * width + column, 0)[..., None] * channels
    place = place + jnp.arange(channels, dtype=jnp.int32)[None, None, None]
    return jnp.where(inside[..., None], _take(images.reshape(batch, -1), place), 0)


def _factor(operation: AnyArray, strength: AnyArray, negative: AnyArray) -> jax.Array:
    """The weight of an image in a weighted sum with another one, `int32[B]` in thousandths."""
    change = jnp.where(jnp.isin(operation, jnp.array(_BLENDED)), 33 * strength, 0)
    return 1000 + jnp.where(negative, -change, change)


def _blend(images: AnyArray, factor: AnyArray, other: AnyArray) -> jax.Array:
    """The weighted sum of values and others, which have the rest of the weight."""
    factor = jnp.expand_dims(factor, range(1, images.ndim))
    total = factor * images + (1000 - factor) * other
    return jnp.minimum(jax.lax.div(jnp.maximum(total, 0), jnp.int32(1000)), 255)


def _gray(images: Int32[Array, "B H W C"]) -> Int32[Array, "B H W 1"]:
    """The luma of ITU-R BT.601, rounded as Pillow does."""
    if images.shape[-1] == 1:
        return images
    weights = jnp.array([19595, 38470, 7471], jnp.int32)[None, None, None]
    return ((images * weights).sum(axis=-1, keepdims=True) + 2**15) // 2**16


def _blur(images: Int32[Array, "B H W C"]) -> Int32[Array, "B H W C"]:
    """The mean of 3 x 3 pixels, of which the middle one counts five times; the border is kept."""
    height, width = images.shape[1:3]
    if min(height, width) < 3:
        return images
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (total + 4 * images[:, 1:-1, 1:-1] + 6) // 13
    return images.at[:, 1:-1, 1:-1].set(inner)


def _table(
    images: UInt8[Array, "B H W C"], operation: AnyArray, strength: AnyArray, factor: AnyArray
) -> UInt8[Array, "B C 256"]:
    """What the operation of an image makes of each value of a pixel."""
    gray = _gray(images.astype(jnp.int32))
    pixels = images.shape[1] * images.shape[2]
    mean = (gray.sum(axis=(1, 2, 3)) + pixels // 2) // pixels
    counts = _counts(images)
    has_value = counts > 0
    low = jnp.argmax(has_value, axis=-1)[..., None]
    high = 255 - jnp.argmax(has_value[..., ::-1], axis=-1)[..., None]
    value = jnp.arange(256, dtype=jnp.int32)[None, None]
    value = jnp.broadcast_to(value, counts.shape)
    strength = strength[:, None, None]
    dropped = (strength + 2) // 5  # bits, rounded to the nearest number
    above = jnp.clip(value - low, 0, high - low)
    stretched = jax.lax.div(above * 255, jnp.broadcast_to(jnp.maximum(high - low, 1), value.shape))
    return _choose(
        operation,
        value,
        brightness=_blend(value, factor, jnp.zeros_like(value)),
        contrast=_blend(value, factor, mean[:, None, None]),
        posterize=value >> dropped << dropped,
        solarize=jnp.where(2 * value < 510 - 17 * strength, value, 255 - value),
        autocontrast=jnp.where(high > low, stretched, value),
        equalize=_equalized(counts, value, high),
    ).astype(jnp.uint8)


def _counts(images: UInt8[Array, "B H W C"]) -> Int32[Array, "B C 256"]:
    """How many pixels of each channel have each value."""
    channels = images.shape[-1]

    def count(image: jax.Array) -> jax.Array:
        place = 256 * jnp.arange(channels, dtype=jnp.int32)[None, None] + image
        return jnp.zeros(channels * 256, jnp.int32).at[place.reshape(-1)].add(1)

    return jax.vmap(count)(images).reshape(-1, channels, 256)


def _equalized(counts: jax.Array, value: jax.Array, high: jax.Array) -> Int32[Array, "B C 256"]:
    """The table that makes the values of a channel alike frequent, with Pillow's rounding."""
    # Of all pixels but those of the largest value.
    below = jnp.cumsum(counts, axis=-1) - counts
    step = jnp.take_along_axis(below, high, axis=-1) // 255
    divisor = jnp.broadcast_to(jnp.maximum(step, 1), value.shape)
    mapped = jnp.minimum(jax.lax.div(below + step // 2, divisor), 255)
    return jnp.where(step > 0, mapped, value)


def _take(values: AnyArray, index: AnyArray) -> jax.Array:
    """Values `[B, N]` at the places `int[B, H, W, C]` of each image."""
    flat = index.reshape(len(values), -1)
    taken = jnp.take_along_axis(values, flat, axis=1, mode="promise_in_bounds")
    return taken.reshape(index.shape)


def _choose(operation: AnyArray, otherwise: jax.Array, **results: jax.Array) -> jax.Array:
    """By the operation of each image one of several results, which it names."""
    for name, result in results.items():
        is_it = jnp.expand_dims(operation == OPERATIONS.index(name), range(1, otherwise.ndim))
        otherwise = jnp.where(is_it, result, otherwise)
    return otherwise
