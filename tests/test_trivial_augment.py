"""Each operation of TrivialAugment, against Pillow."""

import jax
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest

from cnn import UserError, batch_sharding, create_augment, data_mesh, replicated_sharding
from cnn.augment import trivial

NAMES = trivial.OPERATIONS
COUNT = len(NAMES) * 62
# Where the exact result is a whole number, Pillow's floats may lie below.
ROUNDED = ("brightness", "color", "contrast", "sharpness", "autocontrast")
# Operation, strength and direction: all that may be drawn.
OPERATION = np.repeat(np.arange(len(NAMES), dtype=np.int32), 62)
STRENGTH = np.tile(np.repeat(np.arange(31, dtype=np.int32), 2), len(NAMES))
NEGATIVE = np.tile([False, True], COUNT // 2)


def moved(image, *matrix):
    how = PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.NEAREST
    return image.transform(image.size, *how)


def by_pillow(image, name, strength, sign):
    """As torchvision's `TrivialAugmentWide` does it, with what it takes from Pillow."""
    shear, shift = sign * 0.033 * strength, sign * (32 * strength // 30)
    enhance = {
        "brightness": PIL.ImageEnhance.Brightness,
        "color": PIL.ImageEnhance.Color,
        "contrast": PIL.ImageEnhance.Contrast,
        "sharpness": PIL.ImageEnhance.Sharpness,
    }
    if name in enhance:
        return enhance[name](image).enhance(1 + shear)
    return {
        "identity": lambda: image,
        "shear_x": lambda: moved(image, 1, shear, 0, 0, 1, 0),
        "shear_y": lambda: moved(image, 1, 0, 0, shear, 1, 0),
        "translate_x": lambda: moved(image, 1, 0, -shift, 0, 1, 0),
        "translate_y": lambda: moved(image, 1, 0, 0, 0, 1, -shift),
        "rotate": lambda: image.rotate(sign * 4.5 * strength),
        "posterize": lambda: PIL.ImageOps.posterize(image, 8 - round(strength / 5)),
        "solarize": lambda: PIL.ImageOps.solarize(image, 255 - 8.5 * strength),
        "autocontrast": lambda: PIL.ImageOps.autocontrast(image),
        "equalize": lambda: PIL.ImageOps.equalize(image),
    }[name]()


@pytest.mark.parametrize("shape", [(32, 26, 3), (20, 24, 1)])
def test_every_operation_is_pillows(shape):
    height, width, channels = shape
    random = np.random.default_rng(0)
    # Smooth and dark, so that channels have room for contrast and several pixels a value.
    small = PIL.Image.fromarray(random.integers(20, 200, (7, 6, 3)).astype(np.uint8))
    image = np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC))[..., :channels]
    transform = jax.jit(trivial.transform)
    results = transform(np.tile(image, (COUNT, 1, 1, 1)), OPERATION, STRENGTH, NEGATIVE)
    picture = PIL.Image.fromarray(image.squeeze())
    changed = dict.fromkeys(NAMES, False)
    wrong = dict.fromkeys(NAMES, 0.0)
    for place, result in enumerate(np.asarray(results).astype(int)):
        name, sign = NAMES[OPERATION[place]], -1 if NEGATIVE[place] else 1
        expected = np.asarray(by_pillow(picture, name, STRENGTH[place], sign)).reshape(shape)
        changed[name] |= (result != image).any()
        if name in ROUNDED:
            assert abs(result - expected).max() <= 1
        wrong[name] += (result != expected).mean() / 62
    assert {name: share for name, share in wrong.items() if share > 0.005} == {}
    assert {name for name, share in wrong.items() if share} <= {"rotate", *ROUNDED}
    assert [name for name in NAMES if not changed[name]] == (
        ["identity"] if channels == 3 else ["identity", "color"]
    )


def test_each_image_gets_an_operation_of_its_own_whatever_the_batch_is_sharded_over():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * np.array([3, 2, 1], np.uint8)
    images, keys = np.tile(ramp, (2, 128, 1, 1, 1)), jax.random.split(jax.random.key(7), 2)
    augment = create_augment(trivial_augment=True)
    sharding = batch_sharding(data_mesh(jax.devices()[:2], 128), axis=1)
    placed = jax.device_put((keys, images), (replicated_sharding(sharding.mesh), sharding))
    compiled = jax.jit(jax.vmap(augment), out_shardings=sharding).lower(*placed).compile()
    text = compiled.as_text()
    assert "all-" not in text, "devices need nothing of each other"
    assert "collective-" not in text
    result, jitted = np.asarray(compiled(*placed)), jax.jit(augment)
    for step in range(2):
        np.testing.assert_array_equal(result[step], jitted(keys[step], images[step]))
        assert len(np.unique(result[step], axis=0)) > 50


def test_two_channels_are_refused():
    with pytest.raises(UserError, match=r"^augment.trivial_augment needs .* not 2$"):
        trivial.trivial_augment(jax.random.key(0), np.zeros((1, 4, 4, 2), np.uint8))
