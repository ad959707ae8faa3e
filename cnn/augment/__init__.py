"""Augmentations of training images, on the device, before the images are normalized.

An augmentation is a function `(key, images [B, H, W, C]) -> images` of the same shape and dtype,
uint8 as a rule. One that also takes any of these by keyword is given them:

- `epoch` int32[], counted from 0;
- `index` int32[B], each image's place in the train split;
- `run_key`, a key that is the same in every step of the run;
- `fill` uint8[C], the colour that normalization brings nearest to 0.

A row of `AUGMENTATIONS` makes one known to configs: `config.augment.NAME` is its one further
argument, annotated int or float, or true or false if it has none. `Mix` mixes the images of a batch
after they are normalized.

The result is a pure function of key and images, to the bit: jitted or not, vmapped over steps, or
sharded over devices. Images are moved by gathering: on a CPU, choosing between an image and its
mirror image by `where` is up to three times slower, as XLA fuses it with the gather of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, Num, PRNGKeyArray

from cnn.arrays import AnyArray
from cnn.augment.erasing import cutout, inner_cutout, random_erasing
from cnn.augment.mix import Mix
from cnn.augment.trivial import trivial_augment
from cnn.errors import UserError
from cnn.registry import Field, Schema, complete, schema

__all__ = [
    "AUGMENTATIONS",
    "Augment",
    "Mix",
    "alternating_flip",
    "apply_augment",
    "augment_schema",
    "create_augment",
    "create_augmentations",
    "cutout",
    "inner_cutout",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_translate",
    "trivial_augment",
]

Augment = Callable[..., jax.Array]
_GIVEN = ("key", "images", "epoch", "index", "run_key", "fill")


def random_flip(key: PRNGKeyArray, images: Num[AnyArray, "B H W C"]) -> Num[Array, "B H W C"]:
    """Mirrors each image left-right with probability 1/2.

    >>> images = jnp.tile(jnp.array([1, 2, 3], jnp.uint8).reshape(1, 1, 3, 1), (50, 1, 1, 1))
    >>> jnp.unique(random_flip(jax.random.key(0), images).reshape(50, 3), axis=0).tolist()
    [[1, 2, 3], [3, 2, 1]]
    """
    return _mirror(images, jax.random.bernoulli(key, jnp.float32(0.5), images.shape[:1]))


def alternating_flip(
    key: PRNGKeyArray,
    images: Num[AnyArray, "B H W C"],
    *,
    epoch: Integer[AnyArray, ""],
    index: Integer[AnyArray, " B"],
    run_key: PRNGKeyArray,
) -> Num[Array, "B H W C"]:
    """Mirrors each image left-right in every other epoch, half of the images in the first one.

    Which of the two orientations an image has in the first epoch is drawn once per run, from
    `run_key` and its index (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section
    3.6). `key` is not used.

    >>> images = jnp.tile(jnp.array([1, 2, 3], jnp.uint8).reshape(1, 1, 3, 1), (4, 1, 1, 1))
    >>> key, index = jax.random.key(0), jnp.arange(4)
    >>> for epoch in jnp.arange(3):
    ...     flipped = alternating_flip(key, images, epoch=epoch, index=index, run_key=key)
    ...     flipped[:, 0, 0, 0].tolist()
    [1, 3, 1, 3]
    [3, 1, 3, 1]
    [1, 3, 1, 3]
    """

    def is_mirrored_first(index: AnyArray) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(run_key, index), jnp.float32(0.5))

    return _mirror(images, jax.vmap(is_mirrored_first)(index) ^ (epoch % 2 == 1))


def random_translate(
    key: PRNGKeyArray, images: Num[AnyArray, "B H W C"], pixels: int
) -> Num[Array, "B H W C"]:
    """Shifts each image by -pixels to pixels in both directions, each shift with equal probability.

    The border is filled by reflection, as `np.pad(mode="reflect")` does: the edge itself is not
    repeated.

    Raises:
      UserError: if `pixels` is negative, or no less than height or width.

    >>> images = jnp.tile(jnp.array([1, 2, 3], jnp.uint8).reshape(1, 1, 3, 1), (50, 2, 1, 1))
    >>> jnp.unique(random_translate(jax.random.key(0), images, 1).reshape(100, 3), axis=0).tolist()
    [[1, 2, 3], [2, 1, 2], [2, 3, 2]]
    """
    batch, height, width, _ = images.shape
    if not 0 <= pixels < min(height, width):
        raise UserError(
            f"augment.translate={pixels} does not fit images of {height}x{width} pixels; "
            f"choose 0 to {min(height, width) - 1}"
        )
    down, right = jax.random.randint(key, (2, batch, 1), -pixels, pixels + 1, jnp.int32)
    images = _gather(images, _reflect(jnp.arange(height)[None] - down, height), axis=1)
    return _gather(images, _reflect(jnp.arange(width)[None] - right, width), axis=2)


def random_crop(
    key: PRNGKeyArray, images: Num[AnyArray, "B H W C"], padding: int
) -> Num[Array, "B H W C"]:
    """Pads each image by `padding` black pixels on all sides, and crops it to its size at random.

    He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, with 4 pixels.

    Raises:
      UserError: if `padding` is negative.

    >>> images = jnp.ones((50, 2, 2, 1), jnp.uint8)
    >>> sums = random_crop(jax.random.key(0), images, 1).sum((1, 2, 3))
    >>> sorted(set(sums.tolist()))
    [1, 2, 4]
    """
    if padding < 0:
        raise UserError(f"augment.crop={padding} must be 0 or more")
    batch, height, width, _ = images.shape
    top, left = jax.random.randint(key, (2, batch, 1), -padding, padding + 1, jnp.int32)
    row, column = jnp.arange(height)[None] + top, jnp.arange(width)[None] + left
    for axis, index, size in ((1, row, height), (2, column, width)):
        images = _gather(images, jnp.clip(index, 0, size - 1), axis)
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    return jnp.where(inside[..., None], images, 0).astype(images.dtype)


def _mirror(images: AnyArray, mirrored: Bool[AnyArray, " B"]) -> jax.Array:
    """Some of the images, mirrored left-right; the others as they are."""
    width = images.shape[2]
    column = jnp.arange(width, dtype=jnp.int32)[None]
    return _gather(images, jnp.where(mirrored[:, None], width - 1 - column, column), axis=2)


def _reflect(index: AnyArray, size: int) -> jax.Array:
    """Folds indices from -(size - 1) to 2 * (size - 1) back at both ends of an axis."""
    index = jnp.abs(index)
    return jnp.minimum(index, 2 * (size - 1) - index)


def _gather(images: AnyArray, index: AnyArray, axis: int) -> jax.Array:
    """Each image's rows (axis 1) or columns (axis 2) in an order of its own, `int[B, size]`."""
    others = tuple(other for other in (1, 2, 3) if other != axis)
    index = jnp.expand_dims(index, others)
    return jnp.take_along_axis(images, index, axis, mode="promise_in_bounds")


# Applied in this order. Add rows at the end: the random numbers depend on the place.
AUGMENTATIONS: dict[str, Augment] = {
    "flip": random_flip,
    "translate": random_translate,
    "crop": random_crop,
    "cutout": cutout,
    "alternating_flip": alternating_flip,
    "inner_cutout": inner_cutout,
    "random_erasing": random_erasing,
    "trivial_augment": trivial_augment,
}


def augment_schema() -> Schema:
    """A field for each augmentation; its default, False or 0, switches the augmentation off."""
    fields = {}
    for name, fn in AUGMENTATIONS.items():
        own = list(schema(fn, without=_GIVEN).values())
        kind = own[0].type if own else bool
        fields[name] = Field(kind, kind(), (fn.__doc__ or "").partition("\n")[0])
    return fields


def mix_schema() -> Schema:
    """The fields of `Mix`, for the same section of a config."""
    doc = "Alpha of the Beta distribution, of which {} draws the share of an image; 0: off."
    return {
        name: dataclasses.replace(field, doc=doc.format(name))
        for name, field in schema(Mix).items()
    }


def create_augmentations(**settings: Any) -> tuple[Augment | None, Mix | None]:
    """Builds all that a config's section `augment` names: `create_augment`, and `Mix` or None.

    Raises:
      UserError: as for `create_augment` and `Mix`.
    """
    settings = complete("augment", augment_schema() | mix_schema(), settings)
    alphas = {name: settings.pop(name) for name in mix_schema()}
    return create_augment(**settings), Mix(**alphas) if any(alphas.values()) else None


def create_augment(**settings: Any) -> Augment | None:
    """Builds what is applied to the images of a batch; None if it would change nothing.

    The random numbers of one augmentation do not depend on whether another is switched on.

    Args:
      **settings: by name; False and 0 switch an augmentation off.

    Raises:
      UserError: an unknown name, a value of another type, a negative one, or both flips.

    >>> augment = create_augment(flip=True, translate=2)
    >>> augment(jax.random.key(0), jnp.zeros((2, 8, 8, 3), jnp.uint8)).dtype
    dtype('uint8')
    """
    settings = complete("augment", augment_schema(), settings)
    for name, value in settings.items():
        if value < 0:
            raise UserError(f"config field augment.{name}={value} must be 0 or more")
    if settings["flip"] and settings["alternating_flip"]:
        raise UserError(
            "augment.flip and augment.alternating_flip exclude each other; switch one of them off"
        )
    used = tuple((name, value) for name, value in settings.items() if value)
    return _create_augment(used) if used else None


@functools.cache  # equal settings give the same function, so that `jit` does not compile twice
def _create_augment(settings: tuple[tuple[str, Any], ...]) -> Augment:
    names = list(AUGMENTATIONS)

    def augment(key: AnyArray, images: Any, *, run_key: Any = None, **given: Any) -> jax.Array:
        # A prefix of the split stays the same when augmentations are added behind it.
        keys = jax.random.split(key, len(names))
        run_keys = None if run_key is None else jax.random.split(run_key, len(names))
        for name, value in settings:
            place = names.index(name)
            arguments = () if value is True else (value,)
            if run_keys is not None:
                given["run_key"] = run_keys[place]
            images = apply_augment(AUGMENTATIONS[name], keys[place], images, *arguments, **given)
        return images

    return augment


def apply_augment(
    fn: Augment, key: AnyArray, images: AnyArray, *arguments: Any, **given: Any
) -> jax.Array:
    """Calls an augmentation, with those of the `given` that it takes by keyword."""
    known = inspect.signature(getattr(fn, "wrapped", fn)).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    return fn(
        key,
        images,
        *arguments,
        **{name: value for name, value in given.items() if takes_all or name in known},
    )
