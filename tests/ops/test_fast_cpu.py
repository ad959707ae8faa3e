"""Networks of plain layers: the same numbers by `fast_cpu`, and no native convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn.ops.fast_cpu import fast_cpu
from cnn.steps import has_native_convolution

SLOW = "conv_general_dilated", "reduce_window", "select_and_scatter"


class Residual(nn.Module):
    """A strided block with batch normalization, max pooling before it and average pooling after."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        y = nn.relu(norm()(nn.Conv(8, (3, 3), 2, use_bias=False)(x)))
        y = norm()(nn.Conv(8, (3, 3), use_bias=False)(y))
        x = nn.avg_pool(nn.relu(y + nn.Conv(8, (1, 1), 2)(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (2, 2), 2)(x)
        y = nn.Conv(6, (5, 5), feature_group_count=6)(x)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(y))))
        x = nn.Conv(6, (3, 3), 2, feature_group_count=6)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Repeated(nn.Module):
    """A convolution in a loop, one that is computed again for the gradient, and one in a branch."""

    @nn.compact
    def __call__(self, x, train=False):
        layer = functools.partial(nn.Conv, 4, (3, 3))
        loop = nn.scan(
            lambda module, x, _: (nn.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = loop(layer(name="loop"), layer()(x), None)
        x = nn.remat(nn.Conv)(4, (3, 3))(x)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 4, 4))

        def convolved(x):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        x = jax.lax.cond(x.sum() > -1e9, convolved, lambda x: x, x)
        return nn.Dense(10)(x.mean((1, 2)))


def images(size=4, side=10):
    return np.random.default_rng(0).normal(size=(size, side, side, 3)).astype(np.float32)


def created(model, **options):
    state = cnn.create_train_state(model, optax.sgd(0.1), jax.random.key(0), (10, 10, 3), **options)
    return state, state.replace(apply_fn=cnn.fast_cpu(state.apply_fn))


@pytest.mark.parametrize("model", [Residual(), Depthwise(), Repeated()])
def test_a_network_of_plain_layers_trains_alike_without_native_operators(model):
    native, fast = created(model)
    batch = {"image": images(), "label": np.arange(4, dtype=np.int32)}
    programs = [str(jax.make_jaxpr(cnn.train_step)(state, batch)) for state in (native, fast)]
    for name in SLOW[:1]:
        assert name in programs[0]
    for name in SLOW:
        assert name not in programs[1]
    assert has_native_convolution(native, batch["image"].shape)
    assert not has_native_convolution(fast, batch["image"].shape)
    step = jax.jit(cnn.train_step)
    for _ in range(2):
        native, before = step(native, batch)
        fast, now = step(fast, batch)
        np.testing.assert_allclose(now.loss, before.loss, rtol=1e-5)
    leaves = (jax.tree.leaves_with_path(state.arrays) for state in (native, fast))
    for (path, expected), (_, actual) in zip(*leaves, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=str(path))


def test_a_dense_layer_of_pixels_is_a_product_of_two_matrices():
    layer = nn.Dense(6)
    variables = layer.init(jax.random.key(0), images())
    fast = fast_cpu(layer.apply)
    program = str(jax.make_jaxpr(fast)(variables, images()))
    assert "(([1], [0]), ([], []))" in program
    assert "(([3], [0]), ([], []))" not in program
    np.testing.assert_allclose(
        fast(variables, images()), layer.apply(variables, images()), rtol=1e-5, atol=1e-6
    )
    assert fast(variables, images()[:0]).shape == (0, 10, 10, 6)


def test_what_is_not_covered_stays_native():
    def fn(x, w):
        x = nn.max_pool(x, (3, 3), (2, 2))  # windows overlap
        x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 2)
        )

    x, w = images(side=11), np.ones((3, 3, 3, 2), np.float32)
    program = str(jax.make_jaxpr(fast_cpu(fn))(x, w))
    for name in ("conv_general_dilated", "reduce_window_max", "reduce_window_sum"):
        assert name in program
    np.testing.assert_allclose(fast_cpu(fn)(x, w), fn(x, w), rtol=1e-6)


def test_a_gradient_of_its_author_is_kept():
    @jax.custom_vjp
    def layer(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    layer.defvjp(lambda x: (layer(x), x), lambda x, g: (jnp.full_like(x, g.sum()),))
    (gradient,) = {float(g) for g in jax.grad(lambda x: fast_cpu(layer)(x).sum())(images()).ravel()}
    assert gradient == layer(images()).size


def test_flags_and_names_are_arguments_too():
    def fn(x, *, train, names=("a",), scale=None):
        assert train is True
        assert names == ["b", "c"]
        return {"x": x * (1 if scale is None else scale), "train": x.sum()}

    found = fast_cpu(fn)(images(), train=True, names=["b", "c"])
    assert set(found) == {"x", "train"}
    np.testing.assert_array_equal(found["x"], images())


def test_equal_functions_are_compiled_once_and_attributes_are_reached():
    traced = []

    def fn(x):
        traced.append(x)
        return x

    fn.per_example = True
    run = jax.jit(lambda fn, x: fn(x), static_argnums=0)
    run(fast_cpu(fn), images())
    run(fast_cpu(fn), images())
    assert len(traced) == 1
    assert fast_cpu(fn).per_example
    assert fast_cpu(fn) != fast_cpu(lambda x: x)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_elsewhere_it_is_the_function_itself(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    variables = nn.Conv(4, (3, 3)).init(jax.random.key(0), images())
    apply = nn.Conv(4, (3, 3)).apply
    programs = [str(jax.make_jaxpr(fn)(variables, images())) for fn in (apply, fast_cpu(apply))]
    assert programs[0] == programs[1]
