"""Mixup and CutMix: the images, their two labels, and the loss of both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn.config import check_config, fields
from cnn.experiment import create_experiment
from configs import digits as recipe

KEY = jax.random.key(3)


class Linear(nn.Module):
    per_example = True

    @nn.compact
    def __call__(self, image):
        return nn.Dense(5)(image.reshape(len(image), -1))


def a_batch(size=6, shape=(5, 7, 2)):
    random = np.random.default_rng(0)
    images = random.normal(size=(size, *shape)).astype(np.float32)
    return {"image": images, "label": np.arange(size, dtype=np.int32) % 5}


def own_shares(mixed, batch):
    """By the labels, the share of each image at its own place, `[N]`; they are all different."""
    weight = mixed["label_weight"]
    assert (weight == weight[:, :1]).all()
    assert weight.min() >= 0.5
    own, other = batch["label"], np.roll(batch["label"], 1)
    kept = (mixed["label"] == own).all(1)
    np.testing.assert_array_equal(mixed["label"], np.where(kept[:, None], own, other))
    np.testing.assert_array_equal(mixed["other_label"], np.where(kept[:, None], other, own))
    return np.where(kept, weight[:, 0], 1 - weight[:, 0])


@pytest.fixture(scope="module")
def many():
    """A batch, 800 that are mixed with a key each, and which of these are CutMix."""
    batch, keys = a_batch(5), jax.random.split(KEY, 800)
    mixed = jax.jit(jax.vmap(cnn.Mix(mixup=1.0, cutmix=1.0), (0, None)))(keys, batch)
    mixed = jax.tree.map(np.asarray, mixed)
    image, before = batch["image"], np.roll(batch["image"], 1, axis=0)
    is_copied = (mixed["image"] == image) | (mixed["image"] == before)
    return batch, mixed, is_copied.all((1, 2, 3, 4))


def test_of_both_one_is_chosen_for_each_batch(many):
    _, _, is_cutmix = many
    assert abs(is_cutmix.sum() - 400) < 4 * np.sqrt(200)


def test_mixup_averages_neighbours_with_a_share_from_the_beta_distribution(many):
    batch, mixed, is_cutmix = many
    mixed = jax.tree.map(lambda x: x[~is_cutmix], mixed)
    share = own_shares(mixed, batch)
    image, before = batch["image"], np.roll(batch["image"], 1, axis=0)
    s = share[:, None, None, None, None]
    np.testing.assert_allclose(mixed["image"], s * image + (1 - s) * before, atol=1e-6)
    quantiles = np.quantile(share, [0.1, 0.3, 0.5, 0.7, 0.9])  # of Beta(1, 1)
    np.testing.assert_allclose(quantiles, [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.1)


def test_cutmix_takes_a_box_from_the_neighbour_and_weighs_by_its_area(many):
    batch, mixed, is_cutmix = many
    mixed = jax.tree.map(lambda x: x[is_cutmix], mixed)
    image, before = batch["image"], np.roll(batch["image"], 1, axis=0)
    is_own = (mixed["image"] == image).all(-1)
    np.testing.assert_array_equal(mixed["image"], np.where(is_own[..., None], image, before))
    assert (is_own == is_own[:, :1]).all(), "one box for all images of a batch"
    cut = ~is_own[:, 0]
    np.testing.assert_allclose(own_shares(mixed, batch), 1 - cut.mean((1, 2)), atol=1e-6)
    rows, columns = cut.any(2), cut.any(1)
    np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None])
    for lines in (rows, columns):
        ends = np.diff(lines, axis=1, prepend=False, append=False)
        assert set(ends.sum(1)) == {0, 2}, "in one piece, or none"
    areas = set(cut.sum((1, 2)))
    assert {0, 1, 35} <= areas, "from nothing to the whole image"
    assert len(areas) > 12
    assert cut.mean(0).min() > 0.1, "anywhere"


@pytest.mark.parametrize(
    ("loss_fn", "targets_loss"),
    [
        (cnn.CrossEntropy(), lambda logits, soft: optax.softmax_cross_entropy(logits, soft)),
        (
            cnn.create_loss("sigmoid_cross_entropy"),
            lambda logits, soft: optax.sigmoid_binary_cross_entropy(logits, soft).sum(-1),
        ),
    ],
)
def test_the_loss_is_that_of_soft_labels_in_microbatches_too(loss_fn, targets_loss):
    batch = cnn.Mix(mixup=1.0)(KEY, a_batch(64, (32, 32, 3)))
    weight = np.linspace(0.5, 1, 64, dtype=np.float32)  # of each image its own
    batch = {**batch, "label_weight": jnp.asarray(weight)}
    state = cnn.create_train_state(
        Linear(), optax.sgd(1e-3), jax.random.key(0), (32, 32, 3), loss_fn=loss_fn
    )

    def mean_loss(params):
        logits = state.apply_fn({"params": params}, batch["image"], train=True)
        one, two = (jax.nn.one_hot(batch[name], 5) for name in ("label", "other_label"))
        soft = weight[:, None] * one + (1 - weight[:, None]) * two
        return targets_loss(logits, soft).mean(), logits

    (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    after, metrics = jax.jit(cnn.train_step)(state, batch)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert metrics.accuracy == (logits.argmax(-1) == batch["label"]).mean()
    expected = jax.tree.map(lambda p, g: p - 1e-3 * g, state.params, grads)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    stacked = jax.tree.map(lambda x: x[None], batch)
    same, _ = jax.jit(cnn.train_steps, static_argnums=2)(state, stacked, 1)
    for a, b in zip(jax.tree.leaves(same.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_pipeline_mixes_its_normalized_batches(digits):
    def batches(num_devices, steps_per_execution, **options):
        mesh = cnn.data_mesh(jax.devices()[:num_devices], 48)
        pipeline = cnn.Pipeline(
            digits,
            48,
            5,
            "standardize",
            mesh=mesh,
            steps_per_execution=steps_per_execution,
            **options,
        )
        parts = list(pipeline.batches(0, 3))
        for part, _ in parts:
            assert len({len(leaf.sharding.device_set) for leaf in part.values()}) == 1
            assert len(part["image"].sharding.device_set) == num_devices
        return {
            name: np.concatenate([np.asarray(part[name])[:count] for part, count in parts])
            for name in parts[0][0]
        }

    mix = cnn.Mix(cutmix=1.0)
    plain, mixed = batches(2, 3), batches(2, 3, mix=mix)
    for name, array in batches(1, 2, mix=mix).items():
        np.testing.assert_array_equal(array, mixed[name])
    assert len(set(mixed["label_weight"][:, 0])) == 3, "each step draws its own share"
    image, before = plain["image"], np.roll(plain["image"], 1, axis=1)
    is_copied = (mixed["image"] == image) | (mixed["image"] == before)
    assert is_copied.all()
    assert (mixed["image"] != image).any()


def test_a_config_switches_mixing_on(digits):
    config = recipe.get_config()
    config.augment.cutmix, config.augment.flip = 1.0, True
    config = check_config(config)
    assert fields(config)["augment.mixup"].doc.startswith("Alpha of the Beta distribution")
    pipeline = create_experiment(config, jax.devices(), dataset=digits).pipeline
    assert pipeline.mix == cnn.Mix(cutmix=1.0)
    assert pipeline.augment == cnn.create_augment(flip=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_weight": None}, "has 'other_label' only; mixed images need both"),
        ({"other_label": None}, "has 'label_weight' only; mixed images need both"),
        ({"label_weight": np.ones(3, np.float32)}, r"'label_weight' must be float\[6\]"),
        ({"other_label": np.zeros(6, np.float32)}, r"'other_label' must be int\[6\]"),
    ],
)
def test_batches_that_are_mixed_wrongly(change, message):
    batch = {**cnn.Mix(mixup=1.0)(KEY, a_batch()), **change}
    batch = {name: array for name, array in batch.items() if array is not None}
    state = cnn.create_train_state(Linear(), optax.sgd(0.1), KEY, (5, 7, 2))
    with pytest.raises(cnn.UserError, match=message):
        jax.eval_shape(cnn.train_step, state, batch)


def test_evaluation_takes_no_mixed_images_and_no_loss_is_broadcast():
    batch = cnn.Mix(mixup=1.0)(KEY, a_batch())
    state = cnn.create_train_state(Linear(), optax.sgd(0.1), KEY, (5, 7, 2))
    with pytest.raises(cnn.UserError, match="it takes no 'other_label'"):
        jax.eval_shape(cnn.eval_step, state, batch)
    state = state.replace(loss_fn=lambda logits, labels: cnn.CrossEntropy()(logits, labels).mean())
    with pytest.raises(cnn.UserError, match="the loss must return a float for each image"):
        jax.eval_shape(cnn.train_step, state, batch)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ({"mixup": -1.0}, "augment.mixup=-1.0 must be 0 or more"),
        ({"cutmix": float("inf")}, "augment.cutmix=inf must be 0 or more, and finite"),
        ({}, "augment.mixup and augment.cutmix are both 0"),
    ],
)
def test_alphas_that_make_no_sense(alphas, message):
    with pytest.raises(cnn.UserError, match=message):
        cnn.Mix(**alphas)
