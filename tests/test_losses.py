import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import UserError, create_loss, create_train_state, train_step
from cnn.losses import (
    LOSSES,
    CrossEntropy,
    FocalLoss,
    SigmoidCrossEntropy,
    evaluation_loss,
    reduction_of,
)
from cnn.ops.microbatch import MicrobatchPlan, is_per_example

LOGITS = jax.random.normal(jax.random.key(0), (6, 4)) * 3
LABELS = jnp.array([0, 1, 2, 3, 0, 1])


def test_sigmoid_cross_entropy_is_one_binary_problem_per_class():
    p = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    onehot = np.eye(4)[LABELS]
    expected = -(onehot * np.log(p) + (1 - onehot) * np.log(1 - p)).sum(1)
    np.testing.assert_allclose(SigmoidCrossEntropy()(LOGITS, LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_the_papers(gamma):
    p = np.asarray(jax.nn.softmax(LOGITS), np.float64)[np.arange(6), LABELS]
    expected = -((1 - p) ** gamma) * np.log(p)
    np.testing.assert_allclose(FocalLoss(gamma)(LOGITS, LABELS), expected, rtol=1e-4)


def test_focal_loss_with_gamma_zero_is_cross_entropy():
    expected = CrossEntropy()(LOGITS, LABELS)
    np.testing.assert_array_equal(FocalLoss(0.0)(LOGITS, LABELS), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_gradient_is_finite_where_an_image_is_certain(gamma):
    slope = jax.grad(lambda x: FocalLoss(gamma)(x, jnp.array([0])).sum())
    for logits in ([[200.0, 0.0]], [[0.0, 200.0]], [[0.0, 0.0]]):
        assert np.isfinite(slope(jnp.array(logits))).all()


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_from_its_name(name, batch):
    """And equals itself, marks labels that are no class, and declares what it is."""
    loss_fn = create_loss(name)
    assert loss_fn == create_loss(name)
    assert is_per_example(loss_fn)
    assert jnp.isnan(loss_fn(LOGITS, LABELS.at[0].set(4))).tolist() == [True] + 5 * [False]
    model = cnn.CNN(4, features=(4,), hidden_features=8)
    state = create_train_state(
        model, optax.adam(1e-2), jax.random.key(0), (16, 16, 3), loss_fn=loss_fn
    )
    step, losses = jax.jit(train_step), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_smoothing_is_left_out_of_the_evaluation():
    assert evaluation_loss(CrossEntropy(0.1)) == CrossEntropy()
    assert evaluation_loss(FocalLoss(1.0)) == FocalLoss(1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "entropy"}, "unknown loss 'entropy'; "),
        ({"name": "focal", "gama": 1.0}, "unknown field loss.gama; did you mean gamma?"),
        ({"name": "focal", "gamma": -1.0}, "loss.gamma=-1.0 must be 0 or more"),
        ({"name": "focal", "gamma": "big"}, "loss.gamma='big' must be a number, not str"),
        ({"name": "focal", "reduction": "max"}, "loss.reduction='max' must be one of mean, sum"),
        ({"name": "cross_entropy", "label_smoothing": 1}, "at least 0 and below 1"),
    ],
)
def test_a_loss_that_cannot_be_built(fields, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        create_loss(**fields)


def recording():
    """Makes no update, and has for its state the value and the gradients that it was given."""

    def update(grads, state, params=None, *, value, **_):
        return jax.tree.map(jnp.zeros_like, grads), (value, grads)

    return optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), params), update)


def test_a_sum_has_the_batch_size_times_the_gradients_of_a_mean():
    """In two microbatches on each of two devices, and as the value that an optimizer is given."""
    mesh = cnn.data_mesh(jax.devices()[:2], 64)
    image = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    assert MicrobatchPlan.for_batch(image) == (4, 1)
    batch = jax.device_put({"image": image, "label": jnp.arange(64) % 4}, cnn.batch_sharding(mesh))
    model, found = cnn.CNN(4, features=(), hidden_features=0), {}
    with jax.set_mesh(mesh):
        assert MicrobatchPlan.for_batch(image) == (2, 2)
        for reduction in ("mean", "sum"):
            loss_fn = CrossEntropy(0.1, reduction=reduction)
            state = create_train_state(
                model, recording(), jax.random.key(0), (32, 32, 3), loss_fn=loss_fn
            )
            state = jax.device_put(state, cnn.replicated_sharding(mesh))
            after, metrics = jax.jit(train_step)(state, batch)
            found[reduction] = jax.device_get((after.opt_state, metrics.loss))
    (mean, mean_loss), (total, total_loss) = found["mean"], found["sum"]
    assert mean_loss == total_loss == pytest.approx(mean[0], rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 64 * b, rtol=1e-4, atol=1e-5), total, mean
    )
    assert float(np.abs(total[1]["Dense_0"]["kernel"]).max()) > 0.1


def test_a_declared_reduction():
    """Of any loss; what is unknown is refused."""

    def loss(logits, labels):
        return logits.sum(-1)

    assert reduction_of(loss) == "mean"
    loss.reduction = "sum"
    assert reduction_of(loss) == "sum"
    loss.reduction = "max"
    with pytest.raises(UserError, match="must be one of mean, sum, not 'max'"):
        reduction_of(loss)
