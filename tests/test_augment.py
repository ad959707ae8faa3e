import jax
import numpy as np
import pytest

from cnn import UserError, batch_sharding, data_mesh, replicated_sharding
from cnn.augment import (
    AUGMENTATIONS,
    alternating_flip,
    apply_augment,
    create_augment,
    cutout,
    inner_cutout,
    random_crop,
    random_erasing,
    random_flip,
    random_translate,
)

KEY = jax.random.key(7)
both = create_augment(flip=True, translate=2)
# Compiling each operator by itself takes longer.
jit_both = jax.jit(both)
translate = jax.jit(random_translate, static_argnums=2)


def some_images(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def shifts_of(images, shifted, pixels):
    """Down and right, `int[B, 2]`, by trial: pads and crops with NumPy, image by image."""
    _, height, width, _ = images.shape
    found = []
    for image, result in zip(images, np.asarray(shifted), strict=True):
        padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (0, 1))
        same = (windows.transpose(0, 1, 3, 4, 2) == result).all((2, 3, 4))
        top, left = np.argwhere(same)[0]  # raises if no crop fits
        found.append((pixels - top, pixels - left))
    return np.array(found)


@pytest.mark.parametrize(
    ("shape", "pixels"), [((32, 32, 3), 4), ((28, 28, 1), 2), ((6, 9, 3), 4), ((2, 5, 3), 0)]
)
def test_every_shift_is_numpys_and_all_are_alike_likely(shape, pixels):
    images = some_images(1000, *shape)
    shifted = translate(KEY, images, pixels)
    assert shifted.dtype == np.uint8
    shifts, counts = np.unique(shifts_of(images, shifted, pixels), axis=0, return_counts=True)
    cells = (2 * pixels + 1) ** 2
    assert len(shifts) == cells, "each pair of shifts occurs"
    expected = 1000 / cells
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < cells + 4 * np.sqrt(2 * cells)


def test_the_farthest_shift():
    images = some_images(300, 3, 4, 3)
    shifts = shifts_of(images, translate(KEY, images, 2), 2)
    # Two pixels up are two down: the reflection of three rows repeats every four.
    assert {tuple(shift) for shift in shifts} == {
        (d, r) for d in (2, 1, 0, -1) for r in range(-2, 3)
    }


def test_half_of_the_images_are_mirrored():
    images = some_images(1000, 8, 6, 3)
    flipped = np.asarray(random_flip(KEY, images))
    assert flipped.dtype == np.uint8
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.sum() - 500) < 4 * np.sqrt(250)
    changes = (mirrored[1:] != mirrored[:-1]).sum()
    assert abs(changes - 499.5) < 4 * np.sqrt(250), "each by a throw of its own"


def test_flips_and_shifts_draw_apart():
    images = some_images(64, 9, 8, 3)
    flipped = np.asarray(jax.jit(create_augment(flip=True))(KEY, images))
    shifted = jax.jit(create_augment(translate=3))(KEY, images)
    together = jax.jit(create_augment(flip=True, translate=3))(KEY, images)
    assert (flipped != images).any()
    shifts = shifts_of(images, shifted, 3)
    np.testing.assert_array_equal(shifts_of(flipped, together, 3), shifts)


def test_another_key_draws_others():
    images = some_images(16, 8, 8, 3)
    first, again, other = (jit_both(key, images) for key in (KEY, KEY, jax.random.key(8)))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_off_is_the_same_images():
    images = jax.numpy.asarray(some_images(4, 8, 8, 3))
    assert create_augment(flip=False, translate=0) is None
    np.testing.assert_array_equal(random_translate(KEY, images, 0), images)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_other_dtypes_move_alike(dtype):
    images = some_images(16, 8, 8, 3)
    moved = jit_both(KEY, images.astype(dtype))
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved, np.asarray(jit_both(KEY, images)).astype(dtype))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_bits_do_not_depend_on_jit_or_devices(count):
    images = some_images(32, 16, 16, 3)
    expected = both(KEY, images)
    mesh = data_mesh(jax.devices()[:count], 32)
    placed = (
        jax.device_put(KEY, replicated_sharding(mesh)),
        jax.device_put(images, batch_sharding(mesh)),
    )
    compiled = jax.jit(both, out_shardings=batch_sharding(mesh)).lower(*placed).compile()
    result = compiled(*placed)
    assert len(result.sharding.device_set) == count
    np.testing.assert_array_equal(result, expected)
    text = compiled.as_text()
    assert "all-" not in text, "devices need nothing of each other"
    assert "collective-" not in text


@pytest.mark.parametrize("count", [1, 2, 4])
def test_bits_do_not_depend_on_vmap_over_steps(count):
    images, keys = some_images(3, 8, 16, 16, 3), jax.random.split(KEY, 3)
    mesh = data_mesh(jax.devices()[:count], 8)
    spread = jax.device_put(images, batch_sharding(mesh, axis=1))
    result = jax.jit(jax.vmap(both))(jax.device_put(keys, replicated_sharding(mesh)), spread)
    for step in range(3):
        np.testing.assert_array_equal(result[step], jit_both(keys[step], images[step]))


@pytest.mark.parametrize("pixels", [-1, 5, 8])
def test_a_shift_beyond_the_image(pixels):
    images = some_images(2, 8, 5, 3)
    with pytest.raises(UserError, match=f"^augment.translate={pixels} does not fit .* 0 to 4$"):
        random_translate(KEY, images, pixels)


@pytest.mark.parametrize(("shape", "padding"), [((32, 32, 3), 4), ((6, 9, 1), 2), ((3, 3, 1), 5)])
def test_every_crop_is_numpys(shape, padding):
    images = some_images(200, *shape)
    cropped = np.asarray(jax.jit(random_crop, static_argnums=2)(KEY, images, padding))
    assert cropped.dtype == np.uint8
    pad = ((padding, padding), (padding, padding), (0, 0))
    seen = set()
    for image, result in zip(images, cropped, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, pad), shape[:2], (0, 1))
        same = (windows.transpose(0, 1, 3, 4, 2) == result).all((2, 3, 4))
        assert same.any()
        seen.add(tuple(np.argwhere(same)[0]))
    assert len(seen) > 15


def test_cutout_blackens_one_square_of_each_image():
    images = np.full((500, 12, 10, 3), 7, np.uint8)
    cut = np.asarray(jax.jit(cutout, static_argnums=2)(KEY, images, 4)) == 0
    rows, columns = cut.any((2, 3)).sum(1), cut.any((1, 3)).sum(1)
    np.testing.assert_array_equal(cut.sum((1, 2, 3)), 3 * rows * columns)
    assert set(rows) == set(columns) == {2, 3, 4}, "it may extend beyond the image"


def test_inner_cutout_fills_a_whole_square_anywhere():
    images = np.full((500, 6, 5, 2), 7, np.uint8)
    fill = np.array([100, 200], np.uint8)
    cut = np.asarray(jax.jit(inner_cutout, static_argnums=2)(KEY, images, 3, fill=fill))
    changed = cut[..., 0] == 100
    np.testing.assert_array_equal(cut, np.where(changed[..., None], fill, images))
    corners = {tuple(np.argwhere(one)[0]) for one in changed}
    assert corners == {(row, column) for row in range(4) for column in range(3)}
    for one, (row, column) in ((one, np.argwhere(one)[0]) for one in changed):
        assert one.sum() == one[row : row + 3, column : column + 3].sum() == 9
    with pytest.raises(UserError, match=r"^augment.inner_cutout=6 does not fit .* 0 to 5$"):
        inner_cutout(KEY, images, 6)


def test_random_erasing_draws_the_boxes_of_the_paper():
    size = 64
    images = np.full((2000, size, size, 1), 7, np.uint8)
    fill = np.array([100], np.uint8)
    erase = jax.jit(random_erasing, static_argnums=2)
    erased = np.asarray(erase(KEY, images, 1.0, fill=fill))[..., 0] == 100
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    np.testing.assert_array_equal(erased.sum((1, 2)), rows * columns)  # one box each
    assert rows.min() > 0

    random = np.random.default_rng(0)  # algorithm 1, literally: draws again until it fits
    area, aspect = random.uniform(0.02, 0.4, 40_000), random.uniform(0.3, 1 / 0.3, 40_000)
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    top, left = random.uniform(size=(2, 40_000))
    fits = (top + height <= 1) & (left + width <= 1)
    expected = np.stack([height, width, top + height / 2, left + width / 2])[:, fits]
    middle = [(erased.any(axis) * np.arange(0.5, size)).sum(1) for axis in (2, 1)]
    found = np.stack([rows, columns, middle[0] / rows, middle[1] / columns]) / size
    error = np.sqrt(expected.var(axis=1) * (1 / 2000 + 1 / fits.sum()))
    assert (abs(found.mean(axis=1) - expected.mean(axis=1)) < 4 * error).all()
    np.testing.assert_allclose(found.std(axis=1), expected.std(axis=1), rtol=0.1)
    some = np.asarray(erase(KEY, images, 0.25, fill=fill))[..., 0] == 100
    assert abs(some.any((1, 2)).sum() - 500) < 4 * np.sqrt(375)


def test_alternating_flip_depends_on_seed_epoch_and_example_alone():
    images, index = some_images(400, 4, 4, 1), np.arange(400)
    flip = jax.jit(alternating_flip)

    def mirrored(epoch, order, key=KEY, run_key=KEY):
        given = {"epoch": np.int32(epoch), "index": order, "run_key": run_key}
        result = np.asarray(flip(key, images[order], **given))
        is_mirrored = (result == images[order][:, :, ::-1]).all((1, 2, 3))
        np.testing.assert_array_equal(result[~is_mirrored], images[order][~is_mirrored])
        return is_mirrored[np.argsort(order)]

    other, order = jax.random.key(8), np.random.default_rng(0).permutation(index)
    first = mirrored(0, index)
    assert abs(first.sum() - 200) < 40
    np.testing.assert_array_equal(mirrored(2, order, key=other), first)
    np.testing.assert_array_equal(mirrored(3, order), ~first)
    assert 100 < (mirrored(0, index, run_key=other) != first).sum() < 300


def test_an_augmentation_keeps_its_random_numbers_when_others_are_added(monkeypatch):
    images = some_images(16, 8, 8, 3)
    before = create_augment(translate=2)(KEY, images)
    monkeypatch.setitem(AUGMENTATIONS, "another", lambda key, images: images)
    cut = create_augment(translate=2, another=True)(KEY, images)
    np.testing.assert_array_equal(cut, before)


def test_an_augmentation_may_ask_for_the_epoch_and_the_images():
    def alternating(key, images, *, epoch, index):
        return images + np.uint8(10) * epoch.astype(np.uint8) + index[:, None, None, None]

    images, index = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.uint8)
    given = {"epoch": jax.numpy.int32(2), "index": index}
    result = apply_augment(alternating, KEY, images, **given)
    assert result[:, 0, 0, 0].tolist() == [20, 21, 22]
    assert apply_augment(random_flip, KEY, images, **given).shape == images.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flp": True}, "unknown field augment.flp; did you mean flip"),
        ({"flip": 1}, "augment.flip=1 must be true or false"),
        ({"cutout": 1.5}, "augment.cutout=1.5 must be a whole number"),
        ({"crop": -1}, "augment.crop=-1 must be 0 or more"),
        ({"random_erasing": True}, "augment.random_erasing=True must be a number"),
        ({"flip": True, "alternating_flip": True}, "exclude each other; switch one of them off"),
    ],
)
def test_an_augmentation_that_cannot_be_built(settings, message):
    with pytest.raises(UserError, match=message):
        create_augment(**settings)
