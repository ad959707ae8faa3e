import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import (
    CNN,
    Pipeline,
    batch_sharding,
    create_train_state,
    data_mesh,
    execution,
    predict_step,
    replicated_sharding,
    train_step,
)
from cnn.ops.microbatch import (
    WHOLE,
    MicrobatchPlan,
    accumulate_microbatches,
    has_convolution,
    map_microbatches,
)


def images(count, size=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "num_params", "devices", "cut"),
    [
        ((32, 32, 32, 3), 0, 2, (2, 1)),
        ((128, 32, 32, 3), 0, 2, (2, 4)),
        ((1000, 32, 32, 3), 0, 2, (2, 50)),  # 500 per lane: 10 divides it, 16 does not
        ((128, 32, 32, 3), 2_000_000, 2, (2, 2)),  # more gradients to add up: larger blocks
        ((127, 32, 32, 3), 0, 2, (1, 1)),  # a prime number: blocks of one image would be slow
        ((32, 8, 8, 1), 0, 2, (2, 1)),
        ((4, 256, 256, 3), 0, 1, (1, 4)),  # one image is more than a block
        ((96, 32, 32, 3), 0, 4, (4, 2)),
        ((0, 32, 32, 3), 0, 2, (1, 1)),
    ],
)
def test_the_cut(monkeypatch, shape, num_params, devices, cut):
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert (
        MicrobatchPlan.for_batch(jax.ShapeDtypeStruct(shape, jnp.float32), num_params=num_params)
        == cut
    )


def test_the_devices_are_those_of_the_current_mesh():
    image = jax.ShapeDtypeStruct((96, 32, 32, 3), jnp.float32)
    with jax.set_mesh(data_mesh(jax.devices()[:3], 96)):
        assert MicrobatchPlan.for_batch(image) == (3, 2)


def test_nothing_is_cut_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert MicrobatchPlan.for_batch(jax.ShapeDtypeStruct((512, 32, 32, 3), jnp.float32)) == WHOLE


@pytest.mark.parametrize("cut", [(1, 1), (1, 6), (2, 1), (2, 3), (12, 1)])
def test_blocks_cover_each_example_once_and_in_order(cut):
    batch = {"a": jnp.arange(12.0), "b": jnp.arange(24.0).reshape(12, 2)}
    doubled = jax.jit(lambda b: map_microbatches(lambda b: 2 * b["b"], b, MicrobatchPlan(*cut)))(
        batch
    )
    np.testing.assert_array_equal(doubled, 2 * batch["b"])
    sums = jax.jit(
        lambda b: accumulate_microbatches(
            lambda b: (b["a"].sum(), {"n": jnp.int32(b["a"].size)}), b, MicrobatchPlan(*cut)
        )
    )(batch)
    assert (float(sums[0]), int(sums[1]["n"])) == (66.0, 12)
    assert sums[1]["n"].dtype == jnp.int32


def test_a_step_in_blocks_is_the_step_of_the_whole_batch(monkeypatch):
    """On one device and spread over two, with a momentum that keeps every gradient visible."""
    batch = {"image": images(96), "label": jnp.arange(96) % 4}
    model = CNN(4, features=(4, 8), hidden_features=8)
    state = create_train_state(model, optax.sgd(0.1, 0.9), jax.random.key(0), (32, 32, 3))
    assert MicrobatchPlan.for_batch(batch["image"]).num_microbatches > 1
    blocks, metrics = jax.jit(train_step)(state, batch)
    logits = jax.jit(predict_step)(state, batch["image"])
    mesh = data_mesh(jax.devices()[:2], 96)
    placed = (
        jax.device_put(state, replicated_sharding(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    spread, _ = jax.jit(train_step)(*placed)
    monkeypatch.setattr(MicrobatchPlan, "for_batch", lambda *_, **__: WHOLE)
    whole, expected = jax.jit(lambda *a: train_step(*a))(state, batch)
    for one in (blocks, spread):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert (int(metrics.sums["accuracy"]), int(metrics.count)) == (
        int(expected.sums["accuracy"]),
        96,
    )
    whole = jax.jit(lambda *a: predict_step(*a))(state, batch["image"])
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)


def test_the_devices_meet_once_per_step():
    """One all-reduce of one array: XLA's CPU devices wait for each other once per array."""
    mesh = data_mesh(jax.devices()[:4], 128)
    state = create_train_state(CNN(4), optax.adam(1e-3), jax.random.key(0), (32, 32, 3))
    batch = {"image": images(128), "label": jnp.arange(128) % 4}
    placed = (
        jax.device_put(state, replicated_sharding(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(train_step).lower(*placed).compile().as_text()
    met = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(met) == 1
    assert "= f32[" in met[0], "one array, not a tuple"
    assert not [word for word in ("all-gather(", "all-to-all(", "permute(") if word in text]


class Native(nn.Module):
    """Flax as its guides show it."""

    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(4)(nn.Conv(4, (3, 3))(image).reshape(image.shape[0], -1))


def test_a_native_convolution_is_never_in_a_loop(digits):
    """Its gradients would be ten times slower there, in the step and in the training loop."""
    batch = {"image": images(96), "label": jnp.arange(96) % 4}
    state = create_train_state(Native(), optax.sgd(0.1), jax.random.key(0), (32, 32, 3))
    assert has_convolution(train_step, state, batch)
    ours = create_train_state(CNN(4), optax.sgd(0.1), jax.random.key(0), (32, 32, 3))
    for one, is_looped in ((ours, True), (state, False)):
        for step, argument in ((train_step, batch), (predict_step, batch["image"])):
            assert ("scan[" in str(jax.make_jaxpr(step)(one, argument))) == is_looped
    pipeline = Pipeline(digits, batch_size=480)
    programs = {}
    for implementation in ("auto", "native"):
        model = CNN(10, features=(4,), padding="SAME", conv_implementation=implementation)
        state = create_train_state(model, optax.sgd(0.1), jax.random.key(0), digits.image_shape)
        with pytest.MonkeyPatch.context() as patch:
            looped, single = [], []
            patch.setattr(execution, "_train_steps", noted(execution._train_steps, looped))
            patch.setattr(execution, "_train_one_step", noted(execution._train_one_step, single))
            train = execution.compile_train_steps(state, pipeline)
            for batches, num_steps in pipeline.epoch(0):
                state, metrics = train(state, batches, num_steps)
        assert metrics.count.tolist() == [480, 480]
        programs[implementation] = (len(looped), len(single))
    assert programs == {"auto": (1, 0), "native": (0, 2)}


def noted(fn, calls):
    def call(*args):
        calls.append(args)
        return fn(*args)

    return call


class Dropped(nn.Module):
    """Says which of its outputs were dropped."""

    @nn.compact
    def __call__(self, image, train):
        ones = self.param("ones", nn.initializers.ones, (4,))
        return nn.Dropout(0.5, deterministic=not train)(jnp.tile(ones, (image.shape[0], 1)))


@pytest.mark.parametrize("cut", [(2, 1), (1, 2)])
def test_dropout_differs_from_part_to_part(monkeypatch, cut):
    state = create_train_state(Dropped(), optax.sgd(0.0), jax.random.key(0), (4, 4, 1))
    batch = {"image": jnp.zeros((64, 4, 4, 1)), "label": jnp.zeros(64, jnp.int32)}
    first = {name: array[:32] for name, array in batch.items()}
    monkeypatch.setattr(
        MicrobatchPlan,
        "for_batch",
        lambda image, *_: MicrobatchPlan(*cut) if len(image) == 64 else WHOLE,
    )
    step = jax.jit(lambda *arguments: train_step(*arguments))  # traced with this cut
    both, half = (step(state, one)[1].sums["loss"] for one in (batch, first))
    assert float(both) != pytest.approx(2 * float(half), rel=1e-3)
