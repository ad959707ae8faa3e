"""Losses and labels that are not ours: the textbook's update, or one clear error."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import (
    CNN,
    CrossEntropy,
    DeviceSplit,
    Metrics,
    UserError,
    create_train_state,
    eval_step,
    evaluate,
    predict_step,
    train_step,
    train_steps,
)
from cnn.ops.microbatch import MicrobatchPlan, is_per_example

SHAPE = (12, 12, 3)
MODEL = CNN(4, features=(4, 8), hidden_features=8)
PLAIN = CrossEntropy()
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def batch_of(size, shape=SHAPE):
    image = jax.random.normal(jax.random.key(1), (size, *shape))
    return {"image": image, "label": jnp.arange(size) % 4}


BATCH = batch_of(8, (8, 8, 3))


def small_state(loss_fn=PLAIN):
    model = CNN(4, features=(4,), hidden_features=4)
    return create_train_state(model, optax.sgd(0.1), jax.random.key(0), (8, 8, 3), loss_fn=loss_fn)


# Images that see each other.


def contrastive(logits, labels):
    unit = logits / jnp.sqrt((logits**2).sum(-1, keepdims=True) + 1e-6)
    same = (labels[:, None] == labels[None]) & ~jnp.eye(len(labels), dtype=bool)
    log_p = jax.nn.log_softmax(2 * unit @ unit.T - 1e9 * jnp.eye(len(labels)), axis=1)
    return -jnp.where(same, log_p, 0).sum(1) / jnp.maximum(same.sum(1), 1)


def hardest_half(logits, labels):
    losses = cross_entropy(logits, labels)
    return jnp.where(losses >= jnp.median(losses), losses, 0)


class CentredLoss(CrossEntropy):
    """Inherits from a loss that declares what this one does not keep."""

    def __call__(self, logits, labels):
        return super().__call__(logits - logits.mean(0, keepdims=True), labels)


class CentredNet(CNN):
    """Inherits from a network that declares what this one does not keep."""

    @nn.compact
    def __call__(self, image, train=False):
        return super().__call__(image - image.mean(0, keepdims=True), train)


@pytest.mark.parametrize(
    ("net", "loss_fn"),
    [(CNN, contrastive), (CNN, hardest_half), (CNN, CentredLoss()), (CentredNet, CrossEntropy())],
)
def test_the_update_is_the_textbooks_where_images_see_each_other(net, loss_fn):
    model, batch = net(4, features=(4,), hidden_features=8), batch_of(64)
    state = create_train_state(model, optax.sgd(1.0), jax.random.key(0), SHAPE, loss_fn=loss_fn)

    def mean_loss(params):
        return loss_fn(model.apply({"params": params}, batch["image"], True), batch["label"]).mean()

    expected, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    after, metrics = jax.jit(train_step)(state, batch)
    moved = jax.tree.map(jnp.subtract, state.params, after.params)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, moved, grads))
    assert float(error) < 1e-4 * float(optax.tree.norm(grads))
    assert float(metrics.loss) == pytest.approx(float(expected), rel=1e-5)
    logits = model.apply({"params": state.params}, batch["image"], False)
    np.testing.assert_allclose(predict_step(state, batch["image"]), logits, rtol=1e-4, atol=1e-5)


def test_evaluation_fills_the_last_batch_only_where_no_image_sees_it():
    images = jax.random.randint(jax.random.key(2), (10, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(10, dtype=jnp.int32) % 4
    split = DeviceSplit(images, labels, jnp.zeros(3), jnp.ones(3))
    state = small_state(contrastive)
    logits = predict_step(state, images.astype(jnp.float32) / 255)
    first, last = slice(0, 8), slice(8, 10)
    expected = sum(contrastive(logits[part], labels[part]).sum() for part in (first, last)) / 10
    metrics = evaluate(state, split, batch_size=8)
    assert metrics.count == 10
    assert metrics.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_declaration_is_an_objects_own():
    assert is_per_example(MODEL)
    assert is_per_example(CrossEntropy(0.1))
    for other in (contrastive, cross_entropy, CentredLoss(), CentredNet(4), nn.Dense(4), None):
        assert not is_per_example(other)

    def declared(logits, labels): ...

    declared.per_example = True

    @functools.wraps(declared)
    def wrapper(logits, labels): ...

    assert is_per_example(declared)
    assert not is_per_example(wrapper)


def test_a_strangers_declaration_is_believed():
    def declared(logits, labels):
        return cross_entropy(logits, labels)

    declared.per_example = True
    batch = batch_of(128, (32, 32, 3))
    assert MicrobatchPlan.for_batch(batch["image"]).num_microbatches > 1
    for loss_fn in (cross_entropy, declared):
        state = create_train_state(
            MODEL, optax.sgd(1.0), jax.random.key(0), (32, 32, 3), loss_fn=loss_fn
        )
        is_cut = "scan[" in str(jax.make_jaxpr(train_step)(state, batch))
        assert is_cut == (loss_fn is declared)


# Shapes.


def mean(logits, labels):
    return cross_entropy(logits, labels).mean()


def column(logits, labels):
    return cross_entropy(logits, labels)[:, None]


def counts(logits, labels):
    return labels


def pair(logits, labels):
    return cross_entropy(logits, labels), logits


def everything(state, batch):
    """Each public function that takes a batch, as a thunk."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    return [
        lambda: train_step(state, batch),
        lambda: jax.jit(train_step)(state, batch),
        lambda: jax.jit(train_steps)(state, stacked, 2),
        lambda: jax.jit(eval_step)(state, batch),
    ]


@pytest.mark.parametrize("loss_fn", [mean, column, counts, pair, lambda *_: 1.0])
def test_a_loss_that_is_not_one_float_for_each_image_is_an_error(loss_fn):
    state = small_state(loss_fn)
    split = DeviceSplit(
        jnp.zeros((8, 8, 8, 3), jnp.uint8), BATCH["label"], jnp.zeros(3), jnp.ones(3)
    )
    for call in (*everything(state, BATCH), lambda: evaluate(state, split)):
        with pytest.raises(UserError, match=r"the loss must return .* \[B\] with B=8"):
            call()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (jax.nn.one_hot(jnp.arange(8) % 4, 4), "labels .*must be integers"),
        (jnp.arange(8)[:, None], "labels .*must be integers"),
        (jnp.arange(8.0), r"labels must be integers \[B\].* float32\[8\]"),
        (jnp.arange(8) > 3, r"labels must be integers \[B\].* bool\[8\]"),
        (jnp.arange(1), "same leading axes"),
        (jnp.arange(7), "same leading axes"),
    ],
)
def test_labels_that_are_not_one_integer_for_each_image_are_an_error(label, message):
    state, batch = small_state(), {**BATCH, "label": label}
    for call in everything(state, batch):
        with pytest.raises(UserError, match=message):
            call()


def test_one_label_for_many_images_is_not_broadcast_in_the_metrics():
    with pytest.raises(UserError, match=r"logits, float \[B, K\] with B=1"):
        Metrics.from_logits(jnp.ones(8), jnp.ones((8, 4)), jnp.zeros(1, int))
    with pytest.raises(UserError, match=r"mask must be bool \[B\] with B=8"):
        eval_step(small_state(), {**BATCH, "mask": jnp.ones((8, 1), bool)})
    with pytest.raises(UserError, match="no 'label'"):
        train_step(small_state(), {"image": BATCH["image"]})
    with pytest.raises(UserError, match=r"must be a dictionary .* not tuple"):
        train_step(small_state(), (BATCH["image"], BATCH["label"]))
    with pytest.raises(UserError, match="the batch is empty"):
        train_step(small_state(), jax.tree.map(lambda x: x[:0], BATCH))
    with pytest.raises(UserError, match="takes no 'mask'"):
        train_step(small_state(), {**BATCH, "mask": jnp.ones(8, bool)})


def test_more_steps_than_batches_are_an_error_or_end_with_the_last_batch():
    state, stacked = small_state(), jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    with pytest.raises(UserError, match="num_steps=3"):
        train_steps(state, stacked, 3)
    assert int(jax.jit(train_steps)(state, stacked, 3)[0].step) == 2


# Labels that are no class.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-100, -5, -4, -1, 4, 5, 2**31 - 1])
def test_a_label_outside_the_classes_marks_the_step(label, smoothing):
    loss_fn = CrossEntropy(smoothing)
    losses = loss_fn(jnp.zeros((2, 4)), jnp.array([label, 3]))
    assert jnp.isnan(losses).tolist() == [True, False]
    state = small_state(loss_fn).replace(skip_nonfinite=True)
    after, metrics = train_step(state, {**BATCH, "label": BATCH["label"].at[0].set(label)})
    assert int(metrics.count) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32])
def test_labels_of_any_integer_type_are_classes(dtype):
    losses = CrossEntropy()(jnp.eye(4), jnp.arange(4).astype(dtype))
    np.testing.assert_allclose(losses, CrossEntropy()(jnp.eye(4), jnp.arange(4)))
    # More classes than the type can count.
    losses = jax.jit(CrossEntropy())(jnp.ones((2, 70_000)), jnp.array([0, 100]).astype(dtype))
    np.testing.assert_allclose(losses, np.log(70_000), rtol=1e-6)
