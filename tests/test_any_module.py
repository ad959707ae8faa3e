"""What `create_train_state` and the steps do with linen modules that are not ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import (
    CNN,
    UserError,
    create_train_state,
    eval_step,
    predict_step,
    train_step,
    train_steps,
)

SHAPE = (6, 6, 1)
BATCH = {
    "image": jax.random.normal(jax.random.key(1), (8, *SHAPE)),
    "label": jnp.arange(8) % 4,
}


def create(model, tx=None, **options):
    return create_train_state(model, tx or optax.sgd(0.1), jax.random.key(0), SHAPE, **options)


def two_steps(state):
    """Two steps by one compiled function: it must not be traced again for what it gave back."""
    traces = []

    @jax.jit
    def step(state, batch):
        traces.append(None)
        return train_step(state, batch)

    state, _ = step(state, BATCH)
    state, metrics = step(state, BATCH)
    assert len(traces) == 1
    return state, metrics


class Body(nn.Module):
    """Drops everything in training, so that its logits say how it was called."""

    def logits(self, image, train):
        x = nn.Dense(4, bias_init=nn.initializers.ones)(image.reshape(len(image), -1))
        return nn.Dropout(1.0, deterministic=not train)(x)


class Keyword(Body):
    @nn.compact
    def __call__(self, image, *, train):
        return self.logits(image, train)


class Third(Body):
    @nn.compact
    def __call__(self, image, scale=1.0, train=False):
        return self.logits(image, train)


class Training(Body):
    @nn.compact
    def __call__(self, image, training=False):
        return self.logits(image, training)


class Options(Body):
    @nn.compact
    def __call__(self, image, **options):
        return self.logits(image, options["train"])


Remat = nn.remat(Training, static_argnums=(2,))


@pytest.mark.parametrize(
    "model", [Keyword(), Third(), Training(), Options(), Remat(), nn.Sequential([Third()])]
)
def test_train_reaches_the_module(model):
    state = create(model)
    _, metrics = train_step(state, BATCH)
    assert float(metrics.loss) == pytest.approx(np.log(4)), "all was dropped"
    assert float(jnp.abs(predict_step(state, BATCH["image"])).min()) > 0


@pytest.mark.parametrize(
    "model", [nn.Sequential([jnp.tanh, lambda x: x.reshape(len(x), -1), nn.Dense(4)])]
)
def test_a_module_without_train_works(model):
    assert int(two_steps(create(model))[1].count) == 8


class Inverse(Body):
    @nn.compact
    def __call__(self, image, deterministic=True):
        return self.logits(image, not deterministic)


class Masked(Body):
    @nn.compact
    def __call__(self, image, mask, train):
        return self.logits(image, train)


class Pair(Body):
    @nn.compact
    def __call__(self, image, train=False):
        return self.logits(image, train), image


class Scalar(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dense(1)(image.reshape(len(image), -1)).squeeze(-1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Inverse(), r"Inverse.__call__.*'deterministic'"),
        (Masked(), r"Masked.__call__.*'mask'"),
        (Pair(), r"logits, float \[B, K\].*tuple"),
        (Scalar(), r"logits, float \[B, K\].*float32\[1\]"),
    ],
)
def test_what_cannot_work_is_refused_by_name_at_once(model, message):
    with pytest.raises(UserError, match=message):
        create(model)


class Fields(nn.Module):
    """Fields that cannot be hashed."""

    widths: list
    options: dict
    scale: jax.Array

    @nn.compact
    def __call__(self, image, train=False):
        x = image.reshape(len(image), -1) * self.scale[None]
        for width in self.widths:
            x = nn.Dense(width, **self.options)(x)
        return x


class Smoothed:
    """A loss with a field, equal to others with the same field, and so without a hash."""

    def __init__(self, weights):
        self.weights = weights

    def __eq__(self, other):
        return self.weights == other.weights

    def __call__(self, logits, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses * jnp.asarray(self.weights)[labels]


def test_lists_dictionaries_and_arrays_in_fields_work():
    model = Fields([5, 4], {"use_bias": False}, jnp.ones(36))
    _, metrics = two_steps(create(model, loss_fn=Smoothed([1.0, 2.0, 3.0, 4.0])))
    assert int(metrics.count) == 8
    assert int(two_steps(create(CNN(4, features=[4], hidden_features=4)))[1].count) == 8


def test_equal_modules_do_not_compile_twice_and_others_do():
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        return train_step(state, BATCH)

    tx = optax.sgd(0.1)
    for _ in range(2):
        step(create(CNN(4, features=(4,), hidden_features=4), tx))
    assert len(traces) == 1
    array = jnp.ones(36)
    for model in (Fields([4], {}, array), Fields([4], {}, 2 * array)):
        step(create(model, tx))
    assert len(traces) == 3


class Noise(nn.Module):
    """Draws from streams of its own names."""

    @nn.compact
    def __call__(self, image, train):
        x = nn.Dense(4)(image.reshape(len(image), -1))
        if not train:
            return x
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.5, rng_collection="path", deterministic=False)(x)


def test_random_streams_of_any_name_differ_from_step_to_step():
    state = create(Noise(), optax.sgd(0.0))
    _, first = train_step(state, BATCH)
    _, again = train_step(state, BATCH)
    _, later = train_step(state.replace(step=state.step + 1), BATCH)
    assert float(first.loss) == float(again.loss) != float(later.loss)


class Sown(nn.Module):
    """Sows in three ways, and keeps one running mean and a random key."""

    @nn.compact
    def __call__(self, image, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(image)
        x = nn.Dense(4)(x.reshape(len(x), -1))
        self.sow("losses", "l2", (x**2).mean())
        self.sow("sums", "l2", (x**2).mean(), init_fn=lambda: 0.0, reduce_fn=jnp.add)
        self.sow("batch_stats", "beside", x.mean())
        self.variable("draws", "key", lambda: jax.random.key(3))
        return self.perturb("logits", x)


def test_what_is_sown_is_not_carried_from_step_to_step():
    state = create(Sown())
    assert set(state.model_state) == {"batch_stats", "draws"}
    after, _ = two_steps(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    mean = after.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.75 * BATCH["image"].mean((0, 1, 2)), atol=1e-6)
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    looped, _ = jax.jit(train_steps)(state, batches, 2)
    np.testing.assert_allclose(
        looped.params["Dense_0"]["kernel"], after.params["Dense_0"]["kernel"], rtol=1e-5
    )


class Half(nn.Module):
    """Computes in 16 bits, parameters too."""

    dtype: str

    @nn.compact
    def __call__(self, image, train=False):
        x = image.reshape(len(image), -1).astype(self.dtype)
        return nn.Dense(10, dtype=self.dtype, param_dtype=self.dtype)(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("loss_fn", [None, optax.softmax_cross_entropy_with_integer_labels])
def test_losses_and_their_sums_are_float32_whatever_the_logits_are(dtype, loss_fn):
    images = jax.random.normal(jax.random.key(1), (4096, *SHAPE))
    batch = {"image": images, "label": jnp.arange(4096) % 10}
    state = create(Half(dtype), **({"loss_fn": loss_fn} if loss_fn else {}))
    logits = np.asarray(state.apply_fn(state.variables, images), np.float64)
    log_sum = np.log(np.exp(logits).sum(1))
    right = (log_sum - logits[np.arange(4096), batch["label"]]).mean()
    for metrics in (jax.jit(eval_step)(state, batch), jax.jit(train_step)(state, batch)[1]):
        assert metrics.sums["loss"].dtype == jnp.float32
        assert float(metrics.loss) == pytest.approx(right, rel=1e-5)
    assert predict_step(state, images).dtype == jnp.float32


def test_gradients_of_16_bits_whose_squares_overflow_are_finite():
    state = create(Half("float16"))
    batch = {**BATCH, "image": 400 * BATCH["image"]}
    after, metrics = train_step(state.replace(skip_nonfinite=True), batch)
    assert int(metrics.count) == 8
    assert not (after.params["Dense_0"]["kernel"] == state.params["Dense_0"]["kernel"]).all()
