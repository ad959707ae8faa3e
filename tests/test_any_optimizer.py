"""Every optimizer and wrapper that Optax has, in `train_step`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from cnn import UserError, create_train_state, train_step, train_steps

SHAPE = (3, 3, 1)
BATCH = {
    "image": jax.random.normal(jax.random.key(1), (8, *SHAPE)),
    "label": jnp.arange(8) % 4,
}
RATE = 1e-2


class Dense(nn.Module):
    """Two layers: matrices and biases."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.relu(nn.Dense(6)(image.reshape(len(image), -1)))
        return nn.Dense(4)(x)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def kinds(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


def after_adam(*transformations):
    return lambda: optax.chain(optax.adam(RATE), *transformations)


def before_adam(*transformations):
    return lambda: optax.chain(*transformations, optax.adam(RATE))


BY_RATE = [
    "adabelief",
    "adadelta",
    "adan",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "amsgrad",
    "fromage",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "signum",
    "sm3",
    "yogi",
]
CONTRIB_BY_RATE = [
    "acprop",
    "ademamix",
    "adopt",
    "cocob",
    "dadapt_adamw",
    "dog",
    "dowg",
    "galore",
    "madgrad",
    "momo",
    "momo_adam",
    "muon",
    "prodigy",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "simplified_ademamix",
    "sophia",
]
OTHERS = {
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs with its line search": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(RATE), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
    "zoom": lambda: optax.chain(optax.sgd(RATE), optax.scale_by_zoom_linesearch(5)),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau()),
    "mechanize": lambda: contrib.mechanize(optax.adam(RATE)),
    "schedule_free": lambda: contrib.schedule_free(optax.adam(RATE), RATE),
    "sam": lambda: contrib.sam(optax.sgd(RATE), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "sam, opaque": lambda: contrib.sam(
        optax.sgd(RATE), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
    "MultiSteps itself": lambda: optax.MultiSteps(optax.polyak_sgd(), 2),
    "MultiSteps that skips": lambda: optax.MultiSteps(
        optax.adam(RATE), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "inject_hyperparams, a schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.cosine_decay_schedule(RATE, 10)
    ),
    "masked": lambda: optax.masked(optax.adam(RATE), matrices),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(RATE), "vector": optax.set_to_zero()}, kinds
    ),
    "selective": lambda: optax.transforms.selective_transform(
        optax.adam(RATE), freeze_mask=matrices
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "named_chain": lambda: optax.named_chain(
        ("a", optax.scale_by_adam()), ("b", optax.scale(-RATE))
    ),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.trace(0.9), lambda step: step > 1
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.scale(-1.0), lambda step: step > 1
    ),
    "trace": lambda: optax.chain(optax.trace(0.9), optax.scale(-RATE)),
    "ema": after_adam(optax.ema(0.9)),
    "keep_params_nonnegative": after_adam(optax.keep_params_nonnegative()),
    "apply_every": after_adam(optax.apply_every(2)),
    "clip": before_adam(optax.clip(1.0)),
    "clip_by_global_norm": before_adam(optax.clip_by_global_norm(1.0)),
    "clip_by_block_rms": before_adam(optax.clip_by_block_rms(1.0)),
    "adaptive_grad_clip": before_adam(optax.adaptive_grad_clip(0.1)),
    "add_noise": before_adam(optax.add_noise(0.1, 0.5, key=0)),
    "centralize": before_adam(optax.centralize()),
    "zero_nans": before_adam(optax.zero_nans()),
    "a schedule": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATE, 2, 10)),
}
OPTIMIZERS = {
    **{name: functools.partial(getattr(optax, name), RATE) for name in BY_RATE},
    **{name: functools.partial(getattr(contrib, name), RATE) for name in CONTRIB_BY_RATE},
    **OTHERS,
}


def types(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_the_types_of_the_state(name):
    """So that it is compiled once, and a loop can carry it. Traced only: this takes no time."""
    tx = OPTIMIZERS[name]()
    state = jax.eval_shape(
        lambda key: create_train_state(Dense(), tx, key, SHAPE), jax.random.key(0)
    )
    after, metrics = jax.eval_shape(train_step, state, BATCH)
    assert types(after) == types(state)
    assert metrics.sums["loss"].shape == ()
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    assert types(jax.eval_shape(train_steps, state, batches, 2)[0]) == types(state)


@pytest.mark.parametrize("name", ["polyak_sgd", "reduce_on_plateau", "zoom", "noisy_sgd"])
def test_those_that_want_more_than_gradients_train(name):
    state = create_train_state(Dense(), OPTIMIZERS[name](), jax.random.key(0), SHAPE)
    step, losses = jax.jit(train_step), []
    for _ in range(20):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    if name == "reduce_on_plateau":
        assert float(state.opt_state[1].best_value) == pytest.approx(min(losses), rel=1e-3)


def test_the_value_is_the_mean_loss_and_its_function_gives_the_same():
    seen = {}

    def update(updates, opt_state, params=None, *, value, value_fn, grad):
        seen.update(value=value, again=value_fn(params), norm=optax.tree.norm(grad))
        return updates, opt_state

    tx = optax.GradientTransformationExtraArgs(lambda _: (), update)
    state = create_train_state(Dense(), tx, jax.random.key(0), SHAPE)
    _, metrics = train_step(state, BATCH)
    assert float(seen["value"]) == pytest.approx(float(metrics.loss))
    assert float(seen["again"]) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert float(seen["norm"]) > 0


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.lookahead(optax.sgd(RATE), 5, 0.5), "lookahead"),
        (contrib.differentially_private_aggregate(1.0, 1.0, key=0), "per_example_global_norm_clip"),
        (
            optax.GradientTransformationExtraArgs(
                lambda _: (), lambda updates, opt_state, params=None: (updates, (opt_state, 1))
            ),
            "changes the structure",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_work_is_refused_by_name_at_once(tx, message):
    with pytest.raises(UserError, match=message):
        create_train_state(Dense(), tx, jax.random.key(0), SHAPE)
