"""Batches: each image once an epoch, in an order of its own, wherever one begins."""

import jax
import numpy as np
import pytest

import cnn


@pytest.fixture(scope="module")
def numbered():
    """Images that tell their place in the split: 103, of which a batch of 10 leaves 3 out."""
    place = np.arange(103)
    images = np.stack([place, place // 2], axis=-1).astype(np.uint8).reshape(103, 1, 1, 2)
    split = cnn.Split(images, (place % 5).astype(np.int32))
    return cnn.Dataset.from_splits("numbered", train=split, test=split, class_names=tuple("abcde"))


def places(batches, num_steps):
    return np.round(np.asarray(batches["image"])[:num_steps, :, 0, 0, 0] * 255).astype(int)


def places_of(pipeline, start, stop=None):
    return np.concatenate([places(*pair) for pair in pipeline.batches(start, stop)])


@pytest.mark.parametrize("steps_per_execution", [0, 1, 3, 10])
def test_each_epoch_has_every_image_at_most_once_and_an_order_of_its_own(
    numbered, steps_per_execution
):
    pipeline = cnn.Pipeline(numbered, 10, seed=4, steps_per_execution=steps_per_execution)
    first, second = (places_of(pipeline, 10 * epoch) for epoch in (0, 1))
    for epoch in (first, second):
        assert epoch.shape == (10, 10)
        assert len(np.unique(epoch)) == 100
    assert not np.array_equal(first, second)
    assert set(first.flat) != set(second.flat), "other images are left out"
    reference = cnn.Pipeline(numbered, 10, seed=4)
    np.testing.assert_array_equal(places_of(reference, 0, 20), np.concatenate([first, second]))


def test_batches_begin_and_end_anywhere(numbered):
    pipeline = cnn.Pipeline(numbered, 10, steps_per_execution=4)
    whole = places_of(pipeline, 0, 30)
    for start, stop in ((0, 7), (7, 13), (9, 10), (10, 30), (29, 30)):
        np.testing.assert_array_equal(places_of(pipeline, start, stop), whole[start:stop])
    assert len(list(pipeline.epoch(2))) == 3  # 4 + 4 + 2 steps


def test_another_seed_is_another_order(numbered):
    orders = [places_of(cnn.Pipeline(numbered, 10, seed=seed), 0) for seed in (0, 1)]
    assert not np.array_equal(*orders)


def test_labels_belong_to_their_images_and_the_batch_is_sharded(numbered):
    mesh = cnn.data_mesh(jax.devices(), 10)
    pipeline = cnn.Pipeline(numbered, 10, mesh=mesh)
    for batches, num_steps in pipeline.epoch(0):
        np.testing.assert_array_equal(batches["label"][:num_steps], places(batches, num_steps) % 5)
        assert len(batches["image"].sharding.device_set) == mesh.size == 2


def test_an_augmentation_knows_epoch_and_images(numbered):
    def place_and_epoch(key, images, *, epoch, index):
        changed = images.at[:, 0, 0, 0].set(index.astype(images.dtype))
        return changed.at[:, 0, 0, 1].set(epoch.astype(images.dtype))

    pipeline = cnn.Pipeline(numbered, 10, augment=place_and_epoch)
    plain = cnn.Pipeline(numbered, 10)
    for epoch in (0, 2):
        (batches, num_steps), = pipeline.epoch(epoch)  # fmt: skip
        np.testing.assert_array_equal(places(batches, num_steps), places_of(plain, 10 * epoch))
        assert np.unique(np.round(np.asarray(batches["image"][..., 1]) * 255)) == epoch


@pytest.mark.parametrize(("normalization", "fill"), [("scale", [0, 0]), ("standardize", [51, 25])])
def test_an_augmentation_knows_the_colour_that_becomes_zero(numbered, normalization, fill):
    augment = cnn.create_augment(inner_cutout=1)  # the whole image
    pipeline = cnn.Pipeline(numbered, 10, normalization=normalization, augment=augment)
    ((batches, _),) = pipeline.epoch(0)
    expected = (np.array(fill) / 255 - np.asarray(pipeline.train.mean)) / pipeline.train.std
    np.testing.assert_allclose(batches["image"][0, 3, 0, 0], expected, atol=1e-6)
    assert (abs(expected) < 0.5 / 255 / pipeline.train.std).all()


def test_each_image_is_flipped_in_every_other_epoch():
    images = np.zeros((40, 1, 2, 2), np.uint8)
    images[:, 0, 0] = [[place, 1] for place in range(40)]
    images[:, 0, 1] = [[place, 0] for place in range(40)]
    split = cnn.Split(images, np.zeros(40, np.int32))
    data = cnn.Dataset.from_splits("pairs", train=split, test=split, class_names=("a",))
    augment = cnn.create_augment(alternating_flip=True)

    def is_plain(batch_size, epoch):
        pipeline = cnn.Pipeline(data, batch_size, seed=3, augment=augment, steps_per_execution=3)
        found = {}
        for batches, num_steps in pipeline.epoch(epoch):
            values = np.round(np.asarray(batches["image"])[:num_steps] * 255).astype(int)
            found |= {int(one[0, 0, 0]): int(one[0, 0, 1]) for one in values.reshape(-1, 1, 2, 2)}
        return np.array([found[place] for place in range(40)])

    first = is_plain(8, 0)
    assert 8 < first.sum() < 32
    np.testing.assert_array_equal(is_plain(20, 1), 1 - first)
    np.testing.assert_array_equal(is_plain(20, 2), first)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 104}, "batch_size=104 must lie between 1 and 103"),
        ({"batch_size": 10.0}, "batch_size=10.0 must lie between"),
        ({"seed": -1}, "seed=-1 must lie between"),
        ({"steps_per_execution": -1}, "steps_per_execution=-1 must be 0 or more"),
        ({"normalization": "none"}, "unknown normalization 'none'"),
    ],
)
def test_a_pipeline_that_cannot_work(numbered, fields, message):
    with pytest.raises(cnn.UserError, match=message):
        cnn.Pipeline(numbered, **{"batch_size": 10, **fields})


def test_the_compiled_steps_take_what_there_is(digits):
    import optax

    pipeline = cnn.Pipeline(digits, batch_size=480)
    for implementation in ("auto", "native"):
        model = cnn.CNN(10, (4,), padding="SAME", conv_implementation=implementation)
        state = cnn.create_train_state(model, optax.sgd(0.1), jax.random.key(0), digits.image_shape)
        train_steps = cnn.compile_train_steps(state, pipeline)
        ((batches, num_steps),) = pipeline.epoch(0)
        assert num_steps == 2
        state, _ = train_steps(state, batches, 5)
        assert int(state.step) == 2
        with pytest.raises(cnn.UserError, match="num_steps=0 must be 1 or more"):
            train_steps(state, batches, 0)
