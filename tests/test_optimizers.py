import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import UserError, create_optimizer, create_schedule
from cnn.optimizers import OPTIMIZERS, frozen

PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}
GRADS = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([0.0])}


def updates(tx, grads=GRADS, steps=1):
    opt_state = tx.init(PARAMS)
    for _ in range(steps):
        result, opt_state = tx.update(grads, opt_state, PARAMS)
    return jax.tree.map(np.asarray, result)


def test_adam_moves_by_the_learning_rate_at_first():
    result = updates(create_optimizer("adam", 1e-2))
    np.testing.assert_allclose(result["kernel"], [[-1e-2, 1e-2]], rtol=1e-5)


def test_adam_is_exactly_optax_adam():
    import optax

    ours, theirs = create_optimizer("adam", 1e-3), optax.adam(1e-3)
    for a, b in zip(*(jax.tree.leaves(updates(tx, steps=5)) for tx in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sgd_has_nesterov_momentum():
    # v1 = g, v2 = g + m v1; the Nesterov step is g + m v.
    result = updates(create_optimizer("sgd", 0.1, momentum=0.5), steps=2)
    np.testing.assert_allclose(result["kernel"], -0.1 * 1.75 * GRADS["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_pulls_on_kernels_only(name):
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    result = updates(create_optimizer(name, 0.1, weight_decay=0.01), zero)
    assert (np.sign(result["kernel"]) == -np.sign(PARAMS["kernel"])).all()
    assert (result["bias"] == 0).all()


def test_adamw_decay_is_decoupled():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    result = updates(create_optimizer("adamw", 0.1, weight_decay=0.01), zero)
    np.testing.assert_allclose(result["kernel"], -0.1 * 0.01 * PARAMS["kernel"], rtol=1e-6)


def test_clipping_scales_the_global_norm_down():
    result = updates(create_optimizer("sgd", 1.0, momentum=0.0, grad_clip_norm=1.0))
    np.testing.assert_allclose(result["kernel"], [[-0.6, 0.8]], rtol=1e-6)


def test_accumulation_updates_once_with_the_mean_gradient():
    tx = create_optimizer("sgd", 1.0, momentum=0.0, grad_accumulation_steps=2)
    opt_state = tx.init(PARAMS)
    first, opt_state = tx.update(GRADS, opt_state, PARAMS)
    second, _ = tx.update(jax.tree.map(lambda g: 3 * g, GRADS), opt_state, PARAMS)
    assert (first["kernel"] == 0).all()
    np.testing.assert_allclose(second["kernel"], -2 * GRADS["kernel"], rtol=1e-6)


@pytest.mark.parametrize(("shape", "scale"), [((2, 2, 3, 5), 1.0), ((3, 12), 2.0)])
def test_muon_moves_a_kernel_along_a_nearby_orthogonal_matrix(shape, scale):
    """And further where it has more columns than rows; from a norm of sqrt(columns) if so told."""
    rng = np.random.default_rng(0)
    kernel, grads = ({"w": jnp.asarray(rng.normal(size=shape), jnp.float32)} for _ in range(2))
    u, _, v = np.linalg.svd(np.reshape(grads["w"], (-1, shape[-1])), full_matrices=False)
    for normalizes in (False, True):
        tx = create_optimizer("muon", 0.1, momentum=0.9, normalize_weights=normalizes)
        change, _ = jax.jit(tx.update)(grads, tx.init(kernel), kernel)
        begin = np.asarray(kernel["w"])
        begin = begin * shape[-1] ** 0.5 / np.linalg.norm(begin) if normalizes else begin
        moved = np.reshape(kernel["w"] + change["w"] - begin, (-1, shape[-1]))
        values = np.diag(u.T @ moved @ v.T) / (-0.1 * scale)
        assert (values > 0.6).all()
        assert (values < 1.3).all()
        np.testing.assert_allclose(u @ np.diag(-0.1 * scale * values) @ v, moved, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
        ("cosine", [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_schedules_at_their_corners(name, expected):
    end = {} if name == "constant" else {"final_lr_fraction": 0.1}
    schedule = create_schedule(name, 1.0, num_updates=14, warmup_updates=4, **end)
    values = [float(schedule(step)) for step in (0, 2, 4, 9, 14, 99)]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_cosine_is_above_the_line_early_and_below_it_late():
    cosine, line = (create_schedule(name, 1.0, num_updates=100) for name in ("cosine", "linear"))
    assert cosine(25) > line(25)
    assert cosine(75) < line(75)


@pytest.mark.parametrize(
    ("num_updates", "expected"),
    [
        (10, {0: 0.04, 1: 0.52, 2: 1.0, 5: 0.61126202, 8: 0.04951937, 9: 4e-6}),
        (100, {0: 0.04, 10: 0.29516395, 29: 1.0, 64: 0.500002, 98: 5.0746e-4, 99: 4e-6}),
    ],
)
def test_one_cycle_is_that_of_pytorch(num_updates, expected):
    """The numbers are those of torch.optim.lr_scheduler.OneCycleLR(max_lr=1), torch 2.13."""
    schedule = create_schedule("one_cycle", 1.0, num_updates=num_updates)
    found = {update: float(schedule(update)) for update in expected}
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_warm_up_may_begin_above_zero():
    schedule = create_schedule("linear", 2.0, num_updates=8, warmup_updates=4, warmup_from=0.2)
    values = [float(schedule(step)) for step in (0, 2, 4, 6, 8)]
    np.testing.assert_allclose(values, [0.4, 1.2, 2.0, 1.0, 0.0], atol=1e-6)


def test_one_cycle_without_a_rise_and_of_a_single_update():
    assert float(create_schedule("one_cycle", 1.0, num_updates=5, pct_start=0.0)(0)) == 1.0
    for update in (0, 1):
        rate = float(create_schedule("one_cycle", 1.0, num_updates=1)(update))
        assert 0 < rate <= 1


def test_the_schedule_drives_the_optimizer():
    schedule = create_schedule("linear", 1.0, num_updates=2)
    tx = create_optimizer("sgd", schedule, momentum=0.0)
    np.testing.assert_allclose(updates(tx, steps=2)["kernel"], -0.5 * GRADS["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [create_optimizer, lambda n, r: create_schedule(n, r, num_updates=1)]
)
def test_unknown_names(make):
    with pytest.raises(UserError, match=r"unknown .* 'adaam'; "):
        make("adaam", 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_goes_downhill(name):
    tx = create_optimizer(name, 0.02)
    params, opt_state = {"kernel": jnp.array([[1.0, -2.0]])}, None
    opt_state = tx.init(params)
    for _ in range(100):
        change, opt_state = tx.update(params, opt_state, params)  # of half the squared norm
        params = optax.apply_updates(params, change)
    assert float(optax.tree.norm(params)) < 1.8


def test_an_optimizers_own_parameters_are_optaxs():
    ours = create_optimizer("lion", 1e-3, b1=0.8, weight_decay=0.1)
    theirs = optax.lion(
        1e-3, b1=0.8, weight_decay=0.1, mask=lambda p: {"kernel": True, "bias": False}
    )
    for a, b in zip(*(jax.tree.leaves(updates(tx, steps=3)) for tx in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adma"}, "unknown optimizer 'adma'; did you mean adam"),
        ({"name": "adam", "momentum": 0.5}, "unknown field optimizer.momentum"),
        ({"name": "sgd", "momentum": 1.0}, "optimizer.momentum=1.0 must be at least 0 and below 1"),
        ({"name": "sgd", "weight_decay": "much"}, "must be a number, not str"),
        ({"name": "adam", "grad_accumulation_steps": 0}, "grad_accumulation_steps=0 must lie"),
    ],
)
def test_an_optimizer_that_cannot_be_built(fields, message):
    with pytest.raises(UserError, match=message):
        create_optimizer(learning_rate=0.1, **fields)


LAYERS = {
    "Block_0": {"Conv_0": {"bias": 1.0, "kernel": 2.0}},
    "Block_1": {"Conv_0": {"bias": 3.0, "kernel": 4.0}},
    "scale": 5.0,
}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), ()),
        (("Block_0",), (1.0, 2.0)),
        (("Block_1/Conv_0",), (3.0, 4.0)),
        (("*/bias",), (1.0, 3.0)),
        (("*/Conv_0/kernel", "scale"), (2.0, 4.0, 5.0)),
        (("Block_[1-9]", "*bias"), (1.0, 3.0, 4.0)),
    ],
)
def test_a_frozen_path_covers_all_below_it(patterns, expected):
    mask = frozen(LAYERS, patterns)
    leaves = zip(jax.tree.leaves(LAYERS), jax.tree.leaves(mask), strict=True)
    assert tuple(leaf for leaf, is_frozen in leaves if is_frozen) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("Block_0", "Blok_1"), "'Blok_1' matches no parameter; did you mean Block_1"),
        (("Conv_0",), "'Conv_0' matches no parameter; "),
        (("xyz",), "'xyz' matches no parameter; there are Block_0/Conv_0/bias, Block_0/Conv_0/k"),
        (("block_0",), "matches no parameter"),
        (("*",), r"optimizer.freeze=\('\*',\) freezes every parameter: nothing would be trained"),
        (("Block_*", "scale"), "freezes every parameter"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns, message):
    with pytest.raises(UserError, match=message):
        frozen(LAYERS, patterns)
    params = jax.tree.map(jnp.asarray, LAYERS)
    with pytest.raises(UserError, match=message):
        create_optimizer("adam", 0.1, freeze=patterns).init(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state(name):
    """With decay, clipping and accumulation, and a -0.0, to which 0.0 must not be added."""
    tx = create_optimizer(
        name,
        0.1,
        weight_decay=0.1,
        grad_clip_norm=1.0,
        grad_accumulation_steps=2,
        freeze=["kernel"],
    )
    before = {"kernel": jnp.array([[1.0, -0.0]]), "bias": jnp.array([0.5])}
    params, opt_state = before, tx.init(before)
    assert all(leaf.shape in ((), (1,)) for leaf in jax.tree.leaves(opt_state))
    for _ in range(4):
        change, opt_state = tx.update(before, opt_state, params)
        params = optax.apply_updates(params, change)
    assert np.asarray(params["kernel"]).tobytes() == np.asarray(before["kernel"]).tobytes()
    assert params["bias"] != before["bias"]


def test_the_rest_is_optimized_as_if_it_were_alone():
    """The clipped norm is that of the trained parameters."""
    options = {"momentum": 0.0, "grad_clip_norm": 1.0}
    tx = create_optimizer("sgd", 1.0, **options, freeze=("bias",))
    grads = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([1000.0])}
    np.testing.assert_allclose(updates(tx, grads)["kernel"], [[-0.6, 0.8]], rtol=1e-6)


class Normalized(nn.Module):
    """Too few layers to take long to compile."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Dense(3)(image.reshape(len(image), -1))
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("model", "kept"),
    [(cnn.CNN(4, features=(4,), hidden_features=0), "Conv_0"), (Normalized(), "BatchNorm_0")],
)
def test_a_step_leaves_frozen_layers_and_moves_their_statistics(model, kept, skip):
    """In microbatches, which the baseline uses, and with batch normalization."""
    batch = {"image": jnp.linspace(0, 1, 512).reshape(8, 8, 8, 1), "label": jnp.arange(8) % 4}
    tx = create_optimizer("adamw", 0.1, weight_decay=0.1, freeze=(kept,))
    state = cnn.create_train_state(model, tx, jax.random.key(0), (8, 8, 1))
    state = state.replace(skip_nonfinite=skip)
    after, _ = jax.jit(cnn.train_step)(state, batch)
    for layer, params in state.params.items():
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(after.params[layer]), strict=True)
        assert all((a == b).all() for a, b in pairs) == (layer == kept), layer
    if state.model_state:
        mean, moved = (s.model_state["batch_stats"][kept]["mean"] for s in (state, after))
        assert (mean != moved).any()


def test_a_mistyped_layer_is_named_when_the_state_is_created():
    tx = create_optimizer("adam", 0.1, freeze=("Conv_7",))
    with pytest.raises(UserError, match=r"^optimizer.freeze: 'Conv_7' .*; did you mean Conv_[01]"):
        cnn.create_train_state(cnn.CNN(10), tx, jax.random.key(0), (32, 32, 3))
