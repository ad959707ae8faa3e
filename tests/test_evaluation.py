import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cnn import (
    CNN,
    Dataset,
    DeviceSplit,
    Pipeline,
    Split,
    UserError,
    create_train_state,
    data_mesh,
    evaluate,
    replicated_sharding,
)

NUM_IMAGES = 103  # a prime: nothing divides it


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, 12, 12, 1), np.uint8)
    split = Split(images, rng.integers(0, 5, NUM_IMAGES).astype(np.int32))
    return Dataset.from_splits("noise", train=split, test=split, class_names=tuple("abcde"))


def place(data, num_devices, normalization="standardize"):
    mesh = data_mesh(jax.devices()[:num_devices], num_devices)
    pipeline = Pipeline(data, batch_size=1, normalization=normalization, mesh=mesh)
    return pipeline.test, replicated_sharding(mesh)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 10, 103, 1000])
def test_every_image_counts_once(data, num_devices, batch_size):
    model = CNN(5, features=(4,), hidden_features=8)
    state = create_train_state(model, optax.sgd(0.1), jax.random.key(0), data.image_shape)
    split, everywhere = place(data, num_devices)
    metrics = evaluate(jax.device_put(state, everywhere), split, batch_size=batch_size)

    images = (data.test.images / np.float32(255) - data.mean) / data.std
    logits = np.asarray(model.apply({"params": state.params}, images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.test.labels)
    assert metrics.count == NUM_IMAGES
    assert metrics.sums["accuracy"] == int((logits.argmax(-1) == data.test.labels).sum())
    assert metrics.loss == pytest.approx(float(losses.mean()), rel=1e-5)


class Constant(nn.Module):
    """Says the same of every image."""

    @nn.compact
    def __call__(self, image, train):
        logits = self.param("logits", lambda _: jnp.array([0.0, 0.0, 3.0, 0.0, 0.0]))
        return jnp.tile(logits[None], (image.shape[0], 1))


def test_a_constant_model_has_the_metrics_one_computes_by_hand(data):
    state = create_train_state(Constant(), optax.sgd(0.1), jax.random.key(0), data.image_shape)
    split, everywhere = place(data, 2)
    metrics = evaluate(jax.device_put(state, everywhere), split, batch_size=10)
    threes = int((data.test.labels == 2).sum())
    assert (metrics.sums["accuracy"], metrics.count) == (threes, NUM_IMAGES)
    expected = np.log(np.exp(3) + 4) - 3 * threes / NUM_IMAGES
    assert metrics.loss == pytest.approx(expected, rel=1e-6)


def test_a_split_on_one_device_without_a_mesh_works(data):
    state = create_train_state(Constant(), optax.sgd(0.1), jax.random.key(0), data.image_shape)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    split = DeviceSplit.from_split(data.test, sharding)
    assert evaluate(state, split, batch_size=10).count == NUM_IMAGES


def test_a_mesh_of_two_axes_works(data):
    mesh = jax.make_mesh((2, 2), ("batch", "model"), (jax.sharding.AxisType.Auto,) * 2)
    state = create_train_state(Constant(), optax.sgd(0.1), jax.random.key(0), data.image_shape)
    split = DeviceSplit.from_split(data.test, replicated_sharding(mesh))
    assert evaluate(jax.device_put(state, replicated_sharding(mesh)), split).count == NUM_IMAGES


def test_normalizations(data):
    scaled = place(data, 1, "scale")[0].get_batch(jnp.arange(NUM_IMAGES))["image"]
    np.testing.assert_allclose(scaled, data.test.images / 255, rtol=1e-6)
    standard = place(data, 1)[0].get_batch(jnp.arange(NUM_IMAGES))["image"]
    assert float(standard.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standard.std()) == pytest.approx(1, abs=1e-5)


def test_a_constant_channel_does_not_become_nan():
    split = Split(np.full((4, 6, 6, 1), 7, np.uint8), np.zeros(4, np.int32))
    data = Dataset.from_splits("flat", train=split, test=split, class_names=("a",))
    np.testing.assert_allclose(place(data, 1)[0].get_batch(jnp.arange(4))["image"], 0, atol=1e-6)


class Linear(nn.Module):
    """Has a weight for each pixel."""

    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(5)(image.reshape(len(image), -1))


def views(images, tta):
    """Images and the weights of their logits: beside the whole, crops of a border that mirrors."""
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    crops = [wide[:, by : by + 12, by : by + 12] for by in (0, 2)]
    shown = {
        "flip": [(images, 1.0)],
        "flip_translate": [(images, 0.5), *((c, 0.25) for c in crops)],
    }
    for view, weight in shown[tta]:
        yield from ((view, weight / 2), (view[:, :, ::-1], weight / 2))


@pytest.mark.parametrize("tta", ["flip", "flip_translate"])
def test_test_time_augmentation_scores_the_mean_of_the_views(data, tta):
    """Those that fill up the last batch do not count."""
    state = create_train_state(Linear(), optax.sgd(0.1), jax.random.key(0), data.image_shape)
    split, everywhere = place(data, 2, "scale")
    metrics = evaluate(jax.device_put(state, everywhere), split, batch_size=60, tta=tta)
    images = data.test.images / np.float32(255)
    layer = jax.device_get(state.params["Dense_0"])
    logits = layer["bias"] + sum(
        weight * view.reshape(NUM_IMAGES, -1) @ layer["kernel"]
        for view, weight in views(images, tta)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.test.labels)
    assert metrics.count == NUM_IMAGES
    assert metrics.sums["accuracy"] == int((logits.argmax(-1) == data.test.labels).sum())
    assert metrics.loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_an_unknown_test_time_augmentation(data):
    split, _ = place(data, 1)
    with pytest.raises(UserError, match="unknown test-time augmentation 'flop'; did you mean flip"):
        evaluate(None, split, tta="flop")
