"""The steps on meshes that are not ours, within `shard_map`, and in files of `jax.export`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn import (
    CNN,
    CrossEntropy,
    Dataset,
    DeviceSplit,
    Split,
    create_train_state,
    eval_step,
    evaluate,
    predict_step,
    train_step,
    train_steps,
)

SHAPE = (12, 12, 3)
MODEL = CNN(4, features=(4,), hidden_features=8)
BATCH = {"image": jax.random.normal(jax.random.key(1), (64, *SHAPE)), "label": jnp.arange(64) % 4}


@pytest.fixture(scope="module")
def state():
    return create_train_state(MODEL, optax.adam(1e-2), jax.random.key(0), SHAPE)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, *SHAPE), np.uint8)
    split = Split(images, rng.integers(0, 4, 37).astype(np.int32))
    return Dataset.from_splits("noise", train=split, test=split, class_names=tuple("abcd"))


MESHES = {
    "explicit": ((2,), ("batch",), (AxisType.Explicit,)),
    "both kinds": ((2, 2), ("batch", "model"), (AxisType.Explicit, AxisType.Auto)),
}


@pytest.fixture(params=MESHES)
def mesh(request):
    shape, names, kinds = MESHES[request.param]
    return jax.make_mesh(shape, names, kinds)


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_steps_are_the_same_on_any_mesh(mesh, state):
    here = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    spread, batch = here(state), jax.device_put(BATCH, rows)
    after, metrics = jax.jit(train_step)(spread, batch)
    expected, loss = jax.jit(train_step)(state, BATCH)
    assert_close((after.params, metrics), (expected.params, loss))
    again = jax.jit(train_step)(after, batch)[0]
    assert jax.tree.map(jax.typeof, again.params) == jax.tree.map(jax.typeof, spread.params)
    assert_close(jax.jit(eval_step)(spread, batch), jax.jit(eval_step)(state, BATCH))
    assert_close(jax.jit(predict_step)(spread, batch["image"]), predict_step(state, BATCH["image"]))
    stacked = jax.tree.map(lambda x: np.stack([x, x]), BATCH)
    stacked = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(None, "batch")))
    many, _ = jax.jit(train_steps)(spread, stacked, 2)
    assert_close(many.params, again.params)


def test_a_state_can_be_created_and_used_without_jit_where_an_explicit_mesh_is_set(state):
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Explicit,))
    image = jax.device_put(BATCH["image"], NamedSharding(mesh, PartitionSpec("batch")))
    with jax.set_mesh(mesh):
        inside = create_train_state(MODEL, optax.adam(1e-2), jax.random.key(0), SHAPE)
        logits = predict_step(inside, image)
    assert_close(logits, jax.jit(predict_step)(state, BATCH["image"]))


def test_evaluation_is_the_same_on_any_mesh(mesh, state, data):
    expected = evaluate(state, data.test)  # from the host
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = DeviceSplit.from_split(data.test, everywhere)
    for batch_size in (10, 1000):
        metrics = evaluate(jax.device_put(state, everywhere), split, batch_size=batch_size)
        assert (metrics.sums["accuracy"], metrics.count) == (expected.sums["accuracy"], 37)
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    from_host = evaluate(jax.device_put(state, everywhere), data.test)
    assert from_host.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("implementation", "check_vma"),
    [("native", True), ("patches", True), ("winograd", True), ("auto", True), ("auto", False)],
)
def test_the_step_works_within_shard_map(implementation, check_vma):
    """A state for each device, all on the same batch: many seeds."""
    mesh = jax.make_mesh((2,), ("seed",), (AxisType.Auto,))
    model = CNN(4, features=(4,), hidden_features=8, conv_implementation=implementation)
    create = functools.partial(create_train_state, model, optax.sgd(0.1), image_shape=SHAPE)
    states = jax.vmap(create)(jax.random.split(jax.random.key(0), 2))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)

    def one(states, batches):
        state = jax.tree.map(lambda x: x[0], states)
        state, metrics = train_steps(state, batches, 2)
        return jax.tree.map(lambda x: x[None], (state, metrics))

    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(PartitionSpec("seed"), PartitionSpec()),
        out_specs=PartitionSpec("seed"),
        check_vma=check_vma,
    )
    after, metrics = jax.jit(each)(states, stacked)
    for i in range(2):
        alone, expected = jax.jit(train_steps)(
            jax.tree.map(lambda x, i=i: x[i], states), stacked, 2
        )
        assert_close(jax.tree.map(lambda x, i=i: x[i], after.params), alone.params)
        assert_close(metrics.sums["loss"][i], expected.sums["loss"])


def test_a_batch_sharded_by_shard_map_gives_the_gradient_of_its_sum():
    """Replicated parameters, as JAX defines their gradient there: summed over the devices."""
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Auto,))
    state = create_train_state(MODEL, optax.sgd(0.1), jax.random.key(0), SHAPE)

    def step(state, batch):
        state, metrics = train_step(state, batch)
        return state.params, jax.tree.map(lambda x: jax.lax.psum(x, "batch"), metrics)

    rows, whole = PartitionSpec("batch"), PartitionSpec()
    both = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows), out_specs=(whole, whole))
    params, metrics = jax.jit(both)(state, BATCH)
    twice = state.replace(tx=optax.sgd(0.2))
    alone, expected = jax.jit(train_step)(twice, BATCH)
    assert_close((params, metrics), (alone.params, expected))


def test_prediction_exports_with_a_free_batch_size_for_any_platform(state):
    free = jax.ShapeDtypeStruct((export.symbolic_shape("b")[0], *SHAPE), jnp.float32)
    predict = jax.jit(functools.partial(predict_step, state))
    here = export.export(predict)(free)
    for size in (1, 7, 64):
        images = BATCH["image"][:size]
        np.testing.assert_allclose(
            here.call(images), predict_step(state, images), rtol=1e-4, atol=1e-5
        )
    for platform in ("cuda", "tpu"):
        text = export.export(predict, platforms=[platform])(free).mlir_module()
        assert text.count("stablehlo.convolution") == 1
        assert "reduce_window" in text
    assert "stablehlo.convolution" not in here.mlir_module()
    both = export.export(predict, platforms=["cpu", "cuda"])(free)
    np.testing.assert_allclose(
        both.call(BATCH["image"]), predict_step(state, BATCH["image"]), rtol=1e-4, atol=1e-5
    )


def test_prediction_is_one_program_on_a_cpu(state):
    """The branch for other platforms leaves nothing in what is compiled here."""
    text = jax.jit(predict_step).lower(state, BATCH["image"]).compile().as_text()
    assert "conditional" not in text
    assert " convolution(" not in text


def test_a_loss_declared_by_nobody_is_evaluated_on_a_mesh_of_two_devices(data):
    def loss_fn(logits, labels):
        return CrossEntropy()(logits - logits.mean(0, keepdims=True), labels)

    mesh = jax.make_mesh((2,), ("batch",))
    state = create_train_state(MODEL, optax.sgd(0.1), jax.random.key(0), SHAPE, loss_fn=loss_fn)
    expected = evaluate(state, data.test, batch_size=20)
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = DeviceSplit.from_split(data.test, everywhere)
    metrics = evaluate(jax.device_put(state, everywhere), split, batch_size=20)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
