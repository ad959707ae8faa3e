"""Derivatives of the operators of any order and in any mode, and the transformations of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from cnn import CNN
from cnn.ops import convolution

conv_max_pool = functools.partial(convolution.conv_general_dilated, pool=2)
LAYOUT = ("NHWC", "HWIO", "NHWC")
P = jax.sharding.PartitionSpec
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The first convolution of the model is made of planes with "patches", the second of pixels.
MODEL = functools.partial(CNN, 3, features=(16, 5), hidden_features=6)


def normal(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, tree)


def example(size=2):
    images = normal(jax.ShapeDtypeStruct((size, 10, 11, 4), jnp.float32))
    variables = normal(jax.eval_shape(MODEL().init, jax.random.key(0), images))
    return variables, images


def loss(variables, images, implementation):
    logits = MODEL(conv_implementation=implementation).apply(variables, images)
    return jnp.sum(jnp.sin(logits))


def assert_close(actual, expected, tolerance=2e-5):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, atol=tolerance * float(jnp.abs(e).max()))


def forward_over_reverse(f, primals, tangents):
    return jax.jvp(jax.grad(f, (0, 1)), primals, tangents)


def reverse_over_reverse(f, primals, tangents):
    def slope(*primals):
        gradients = jax.grad(f, (0, 1))(*primals)
        return sum(map(jnp.vdot, jax.tree.leaves(gradients), jax.tree.leaves(tangents)))

    return jax.grad(slope, (0, 1))(*primals)


def reverse_over_forward(f, primals, tangents):
    return jax.grad(lambda *primals: jax.jvp(f, primals, tangents)[1], (0, 1))(*primals)


def batched(f, primals, tangents):
    def product(scale):
        return forward_over_reverse(f, jax.tree.map(lambda x: scale * x, primals), tangents)

    return jax.vmap(product)(jnp.array([1.0, 0.5]))


def in_a_loop(f, primals, tangents):
    def step(w, _):
        return w - 0.1 * jax.grad(jax.checkpoint(f), 1)(primals[0], w), None

    def last(w):
        return f(primals[0], lax.scan(step, w, length=2)[0])

    return jax.jvp(jax.grad(last), primals[1:], tangents[1:])


MODES = [forward_over_reverse, reverse_over_reverse, reverse_over_forward, batched, in_a_loop]
# Here "auto" is "winograd".
NAMED = [name for name in convolution.IMPLEMENTATIONS if name != "auto"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_that_of_the_native_operators(mode):
    primals = example()
    tangents = normal(primals, seed=1)

    @quick
    def run(primals, tangents):
        return {
            name: mode(functools.partial(loss, implementation=name), primals, tangents)
            for name in NAMED
        }

    results = run(primals, tangents)
    for result in results.values():
        assert_close(result, results["native"])


def test_the_hessian_of_a_dense_layer_is_that_of_a_product():
    x, w = normal((np.zeros((3, 4)), np.zeros((4, 2))))
    numbers = (((1,), (0,)), ((), ()))

    def curved(product):
        return lambda x, w: jnp.sum(jnp.sin(product(product(x, w), w.T)))

    own, native = (
        quick(jax.hessian(curved(functools.partial(fn, dimension_numbers=numbers)), (0, 1)))(x, w)
        for fn in (convolution.dot_general, lax.dot_general)
    )
    assert_close(own, native)


def test_shard_map_checks_how_everything_varies_and_finds_nothing():
    variables, images = example(size=4)
    mesh = jax.make_mesh((2,), ("devices",), (jax.sharding.AxisType.Auto,))

    def gradients(variables, images, implementation):
        # The gradients of what does not vary are summed over the devices.
        return jax.grad(functools.partial(loss, implementation=implementation), (0, 1))(
            variables, images
        )

    def product(variables, images, implementation):
        fn = functools.partial(gradients, implementation=implementation)
        return jax.jvp(fn, (variables, images), (variables, images))

    specs = P(), P("devices")
    for implementation in NAMED:
        spread = jax.shard_map(
            functools.partial(product, implementation=implementation),
            mesh=mesh, in_specs=specs, out_specs=(specs, specs),
        )  # fmt: skip
        expected = quick(functools.partial(product, implementation="native"))(variables, images)
        assert_close(quick(spread)(variables, images), expected)


@pytest.mark.parametrize("implementation", convolution.IMPLEMENTATIONS)
def test_arrays_that_are_explicitly_sharded_give_the_same(implementation):
    variables, images = example(size=4)
    mesh = jax.make_mesh((2,), ("devices",), (jax.sharding.AxisType.Explicit,))
    kernel = variables["params"]["Conv_0"]["kernel"]

    def pooled(images, kernel):
        conv = functools.partial(conv_max_pool, implementation=implementation)
        y = conv(images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        return convolution.flatten(
            convolution.max_pool(y, (2, 2), (2, 2), implementation=implementation)
        )

    expected = pooled(images, kernel)
    with jax.set_mesh(mesh):
        spread = jax.device_put(images, P("devices"))
        actual = jax.jit(pooled)(spread, jax.device_put(kernel, P()))
    assert actual.sharding.spec[0] == "devices"
    assert_close(actual, expected)


@pytest.mark.parametrize("implementation", ["patches", "winograd"])
def test_a_batch_size_can_be_left_open(implementation):
    variables, images = example(size=3)
    (size,) = export.symbolic_shape("b")
    gradients = quick(
        jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1))
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    program = export.export(gradients)(
        shapes, jax.ShapeDtypeStruct((size, *images.shape[1:]), jnp.float32)
    )
    assert_close(quick(program.call)(variables, images), gradients(variables, images))
