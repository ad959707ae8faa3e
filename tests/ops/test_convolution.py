import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn import CNN, batch_sharding, data_mesh, replicated_sharding
from cnn.ops import convolution

# Largest difference from XLA's own convolution and its gradients, as a part of the largest sum
# of magnitudes of the products that make up a number: rounding grows with that, and the number
# itself may be near zero. Measured over 70 random shapes, of up to 200 channels, on x86: 2e-7 in
# float32 for "patches", 2.3e-6 for "winograd", which adds up multiples of its inputs. In bfloat16
# both may round to the other neighbour.
BOUNDS = {"patches": 5e-7, "winograd": 5e-6, "bfloat16": 2**-8}

# Kernels and gradients that are multiples of this keep all sums of "winograd" whole.
WHOLE = 24**2

NAMED = [name for name in convolution.IMPLEMENTATIONS if name != "auto"]
conv_max_pool = functools.partial(convolution.conv_general_dilated, pool=2)
LAYOUT = ("NHWC", "HWIO", "NHWC")
each_function = pytest.mark.parametrize("fn", [convolution.conv_general_dilated, conv_max_pool])
each_implementation = pytest.mark.parametrize("implementation", convolution.IMPLEMENTATIONS)
# Without shrinking: each attempt would compile anew, for longer than a test may take.
examples = functools.partial(
    hypothesis.settings,
    derandomize=True,
    deadline=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


# Compiling is most of the time of a property test, and with LLVM's optimizations twice as long.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@st.composite
def convolutions(draw, sides, steps):
    """Shapes of images and kernel, strides and padding, with outputs enough for pooling."""
    kernel, strides = (draw(st.tuples(each, each)) for each in (sides, steps))
    # Where zeros alone fill a window, XLA's image gradient is wrong: openxla/xla issue 48713.
    pads = st.tuples(*(st.tuples(*[st.integers(0, min(k - 1, 2))] * 2) for k in kernel))
    padding = draw(st.sampled_from(["VALID", "SAME"]) | pads)
    added = {"VALID": (0, 0), "SAME": [k - 1 for k in kernel]}.get(padding) or map(sum, padding)
    smallest = [max(1, k + s - a) for k, s, a in zip(kernel, strides, added, strict=True)]
    height, width = (size + draw(st.integers(0, 5)) for size in smallest)
    batch, features = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    channels = draw(st.integers(1, 8) | st.integers(9, 40))
    arguments = {"window_strides": strides, "padding": padding}
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    return (batch, height, width, channels), (*kernel, channels, features), arguments, dtype


KINDS = {
    "winograd": convolutions(st.just(3), st.just(1)),
    "patches": convolutions(st.integers(1, 5), st.just(1)),
    "strided": convolutions(st.integers(1, 5), st.integers(1, 3)),
}


def normal(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes]


def whole(*shapes, dtype="float32"):
    """-1, 0 and 1: sums of their products are exact in any order, and often equal."""
    rng = np.random.default_rng(0)
    return [rng.integers(-1, 2, shape).astype(jnp.dtype(dtype)) for shape in shapes]


def apply(fn, x, kernel, implementation="native", window_strides=(1, 1), padding="VALID"):
    return fn(
        x, kernel, window_strides, padding, dimension_numbers=LAYOUT, implementation=implementation
    )


def with_gradients(fn, names=convolution.IMPLEMENTATIONS, **arguments):
    """`(images, kernel, cotangent) -> {implementation: (result, gradients)}`, as one program."""

    def one(x, kernel, g, name):
        y, pull = jax.vjp(functools.partial(apply, fn, implementation=name, **arguments), x, kernel)
        return y, *pull(g)

    return lambda *operands: {name: one(*operands, name) for name in names}


def assert_close(actual, expected, scales, bound="winograd"):
    for a, e, scale in zip(*map(jax.tree.leaves, (actual, expected, scales)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        assert difference.max() <= BOUNDS[bound] * float(np.max(scale))


def assert_equal(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(a, e)


def variables_of(module, x):
    """Random parameters, without the seconds that compiling the initializers takes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(leaf.shape)[0] / np.float32(leaf.size**0.5), shapes)


def is_decided(y, margin):
    """Where the largest of a 2x2 window leads by more than rounding may change."""
    height, width = y.shape[1] // 2, y.shape[2] // 2
    y = np.asarray(y, np.float64)[:, : 2 * height, : 2 * width]
    parts = y.reshape(y.shape[0], height, 2, width, 2, y.shape[3]).transpose(2, 4, 0, 1, 3, 5)
    ranked = np.sort(parts.reshape(4, *parts.shape[2:]), axis=0)
    return ranked[3] - ranked[2] > margin


def operators(fn, *operands):
    """The text of the program of values and gradients."""
    return str(jax.make_jaxpr(lambda *args: jax.vjp(fn, *args)[1](fn(*args)))(*operands))


@each_function
@pytest.mark.parametrize("kind", KINDS)
@examples(max_examples=8)
@hypothesis.given(st.data())
def test_every_implementation_agrees_with_the_native_one(fn, kind, data):
    image, kernel, arguments, dtype = data.draw(KINDS[kind])
    conv = functools.partial(apply, convolution.conv_general_dilated, **arguments)
    everything = with_gradients(fn, NAMED, **arguments)
    run = quick(lambda x, w, g: (everything(x, w, g), conv(x, w)))
    out = jax.eval_shape(functools.partial(apply, fn, **arguments), *whole(image, kernel)).shape
    x, w, g = normal(image, kernel, out, dtype=dtype)
    (results, y), (magnitudes, magnitude) = run(x, w, g), run(abs(x), abs(w), abs(g))
    if fn is conv_max_pool:
        margin = 2 * BOUNDS.get(dtype, BOUNDS["winograd"]) * float(np.max(magnitude))
        g *= is_decided(y, margin)
        results, magnitudes = run(x, w, g)[0], run(abs(x), abs(w), abs(g))[0]
    for name, result in results.items():
        bound = dtype if dtype in BOUNDS else name if name in BOUNDS else "patches"
        assert_close(result, results["native"], magnitudes["native"], bound)
    # With whole numbers there is no rounding, and every tie is decided in the same way.
    x, w, g = whole(image, kernel, out, dtype=dtype)
    scale = WHOLE if dtype == "float32" else 1
    results, _ = run(x, scale * w, scale * g)
    for name, result in results.items():
        if (name, dtype) != ("winograd", "bfloat16"):  # computes fractions of such small kernels
            assert_equal(result, results["native"])


@each_function
def test_padding_wider_than_the_kernel(fn):
    padding = ((2, 0), (1, 3))
    x, w, g = whole((2, 4, 3, 7), (2, 1, 7, 4), (2, 5, 7, 4))
    g = g if fn is convolution.conv_general_dilated else g[:, :2, :3]
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    expected, dx, dw = quick(with_gradients(fn, ["native"]))(padded, w, g)["native"]
    result = quick(with_gradients(fn, ["patches"], padding=padding))(x, w, g)["patches"]
    assert_equal(result, (expected, dx[:, 2:, 1:4], dw))


@examples(max_examples=16)
@hypothesis.given(st.data())
def test_max_pool_is_that_of_flax_to_the_bit(data):
    sides = st.tuples(st.integers(1, 3), st.integers(1, 3))
    window = data.draw(sides)
    strides = data.draw(st.just(window) | sides | st.none())
    pads = st.tuples(*(st.tuples(*[st.integers(0, side - 1)] * 2) for side in window))
    padding = data.draw(st.just("VALID") | st.just("SAME") | pads)
    height, width = (side + data.draw(st.integers(0, 6)) for side in window)
    shape = (data.draw(st.integers(1, 3)), height, width, data.draw(st.integers(1, 9)))
    out = jax.eval_shape(lambda x: nn.max_pool(x, window, strides, padding), jnp.zeros(shape))

    @quick
    def run(x, g):
        pools = nn.max_pool, convolution.max_pool
        results = [jax.vjp(lambda x, p=p: p(x, window, strides, padding), x) for p in pools]
        return [(y, pull(g)) for y, pull in results]

    (g,) = whole(out.shape)
    for x in (*normal(shape), *whole(shape), np.ones(shape, np.float32)):
        expected, actual = run(x, g)
        assert_equal(actual, expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (1, 2), (17, 16)])
def test_the_max_pool_of_a_gpu_is_that_of_flax_to_the_bit(window, dtype):
    def pools(x, g):
        found = []
        for implementation in ("auto", "native"):
            pool = functools.partial(convolution.max_pool, implementation=implementation)
            y, pull = jax.vjp(lambda x, pool=pool: pool(x, window, window), x)
            found.append((y, pull(g)))
        return found

    shape = 3, 2 * window[0] + window[0] // 2, 2 * window[1], 5  # some rows are left over
    out = 3, 2, 2, 5
    (g,) = whole(out)
    for x in (*normal(shape), *whole(shape), np.ones(shape, np.float32)):
        own, native = jax.jit(lambda x, g: pools(x, g))(
            jnp.asarray(x, dtype), jnp.asarray(g, dtype)
        )
        assert_equal(own, native)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_convolution_on_a_gpu_is_native_and_its_pooling_is_not():
    x, w = normal((2, 9, 8, 4), (3, 3, 4, 5))
    pooled = functools.partial(apply, conv_max_pool)
    program = str(jax.make_jaxpr(jax.grad(lambda x: pooled(x, w, "auto").sum()))(x))
    assert "conv_general_dilated" in program
    assert "scatter" not in program
    np.testing.assert_allclose(pooled(x, w, "auto"), pooled(x, w, "native"), rtol=1e-5, atol=1e-5)
    assert "scatter" in str(jax.make_jaxpr(jax.grad(lambda x: pooled(x, w, "native").sum()))(x))


@each_implementation
def test_the_first_of_equal_elements_gets_the_gradient(implementation):
    same = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(WHOLE)  # the kernel that changes nothing

    def convolved(x):
        return apply(conv_max_pool, x, same, implementation, padding="SAME")

    def pooled(x):
        return convolution.max_pool(x, (2, 2), (2, 2), implementation=implementation)

    image = jnp.array([[1, 1, 0, 2], [1, 1, 2, 2], [3, 3, 0, 0], [4, 4, 0, 0]], jnp.float32)
    winners = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    for fn in (convolved, pooled):
        gradient = jax.jit(jax.grad(lambda x, fn=fn: fn(x).sum()))(image.reshape(1, 4, 4, 1))
        assert (gradient / gradient.max())[0, :, :, 0].tolist() == winners


def test_a_zero_kernel_and_a_constant_image_have_the_native_gradients():
    (w,) = whole((3, 3, 9, 4))
    image, g = np.ones((2, 8, 9, 9), np.float32), np.full((2, 3, 3, 4), WHOLE, np.float32)
    run = quick(with_gradients(conv_max_pool))
    for kernel in (WHOLE * w, np.zeros_like(w)):
        results = run(image, kernel, g)
        for result in results.values():
            assert_equal(result, results["native"])


@each_function
def test_a_nan_reaches_every_output_that_it_should_and_no_other_image(fn):
    x, w, g = normal((2, 9, 9, 3), (3, 3, 3, 4), (2, 7, 7, 4))
    g = g if fn is convolution.conv_general_dilated else g[:, :3, :3]
    run = quick(with_gradients(fn))
    clean = run(x, w, g)
    for row, column in ((0, 0), (4, 5), (7, 7)):
        dirty = x.copy()
        dirty[0, row, column, 1] = np.nan
        results = jax.device_get(run(dirty, w, g))
        hit = np.isnan(results["native"][0])
        assert hit.any()
        for name, (y, *_) in results.items():
            assert np.isnan(y[hit]).all()
            np.testing.assert_array_equal(y[1], clean[name][0][1])


@each_implementation
def test_a_nan_is_the_largest_of_its_pooling_window(implementation):
    x = jnp.zeros((1, 4, 6, 1)).at[0, (0, 3), (1, 4), 0].set(jnp.nan)
    y = convolution.max_pool(x, (2, 2), (2, 2), implementation=implementation)
    np.testing.assert_array_equal(jnp.isnan(y[0, :, :, 0]), [[1, 0, 0], [0, 0, 1]])


@each_implementation
@pytest.mark.parametrize(
    ("shape", "kernel_size", "fields"),
    [
        ((2, 9, 9, 4), (3, 3), {"kernel_dilation": 2}),
        ((2, 9, 9, 4), (3, 3), {"input_dilation": (2, 1), "padding": 1}),
        ((2, 9, 9, 4), (3, 3), {"feature_group_count": 2}),
        ((2, 9, 4), (3,), {"padding": "CAUSAL"}),
        ((2, 6, 5, 4, 3), (2, 3, 2), {"strides": 2}),
    ],
)
def test_what_no_implementation_covers_is_native(implementation, shape, kernel_size, fields):
    own = functools.partial(convolution.conv_general_dilated, implementation=implementation)
    plain = nn.Conv(4, kernel_size, **fields)
    layer = nn.Conv(4, kernel_size, conv_general_dilated=own, **fields)
    (x,) = normal(shape)
    variables = variables_of(plain, x)
    assert_equal(layer.apply(variables, x), plain.apply(variables, x))
    assert "dot_general" not in operators(layer.apply, variables, x)


@each_function
@each_implementation
@pytest.mark.parametrize("shape", [(2, 2, 9, 4), (2, 1, 1, 20), (0, 8, 8, 20)])
def test_there_may_be_nothing_to_compute(fn, implementation, shape):
    """An image smaller than the kernel, or no image."""
    x, w = np.zeros(shape, np.float32), np.zeros((3, 3, shape[3], 4), np.float32)
    y, pull = jax.vjp(functools.partial(apply, fn, implementation=implementation), x, w)
    expected = apply(fn, x, w)
    assert y.size == 0
    assert_equal((y, *pull(y)), (expected, x, w))


@each_implementation
@pytest.mark.parametrize(
    "arguments",
    [
        {"dimension_numbers": None},
        {"dimension_numbers": ("NCHW", "OIHW", "NHWC")},
        {"dimension_numbers": ("CWNH", "HWIO", "NHWC")},
        {"dimension_numbers": LAYOUT, "batch_group_count": 2},
    ],
)
def test_other_layouts_and_groups_of_the_batch_are_native(implementation, arguments):
    x, w = normal((4, 4, 4, 4), (4, 4, 4, 4))
    fields = {"window_strides": (1, 1), "padding": "SAME", **arguments}
    expected = lax.conv_general_dilated(x, w, **fields)
    assert_equal(
        convolution.conv_general_dilated(x, w, implementation=implementation, **fields), expected
    )
    pooled = conv_max_pool(x, w, implementation=implementation, **fields)
    assert_equal(pooled, nn.max_pool(expected, (2, 2), (2, 2)))


@each_implementation
@pytest.mark.parametrize(
    "fields", [{}, {"padding": "VALID", "strides": 2}, {"padding": "CIRCULAR", "use_bias": False}]
)
def test_a_flax_layer_has_the_same_parameters_and_result(implementation, fields):
    own = functools.partial(convolution.conv_general_dilated, implementation=implementation)
    (x,) = normal((2, 9, 8, 10))
    make = functools.partial(nn.Conv, 5, (3, 3), **fields)
    expected, variables = make().init_with_output(jax.random.key(0), x)
    actual, own_variables = make(conv_general_dilated=own).init_with_output(jax.random.key(0), x)
    assert jax.tree.structure(own_variables) == jax.tree.structure(variables)
    assert_equal(own_variables, variables)
    kernel = jax.tree.map(jnp.abs, variables)
    assert_close(actual, expected, make().apply(kernel, abs(x)))


@pytest.mark.parametrize("numbers", [normal, whole])
def test_pooling_before_bias_and_relu_is_pooling_after_them(numbers):
    """Values to the bit. Adding a bias may round two numbers to one, so gradients of whole ones."""
    x, w, b, g = numbers((2, 9, 9, 3), (3, 3, 3, 4), (1, 1, 1, 4), (2, 3, 3, 4))

    def after(x, w, b):
        y = apply(convolution.conv_general_dilated, x, w)
        return nn.max_pool(nn.relu(y + b), (2, 2), (2, 2))

    def before(x, w, b):
        return nn.relu(apply(conv_max_pool, x, w) + b)

    (expected, pull), (actual, own_pull) = (jax.vjp(fn, x, w, b) for fn in (after, before))
    assert_equal(actual, expected)
    if numbers is whole:
        assert_equal(own_pull(g), pull(g))


def test_vmap_over_kernels_agrees_with_each_kernel():
    x, w, g = normal((2, 8, 8, 9), (3, 3, 3, 9, 4), (2, 3, 3, 4))
    run = jax.jit(with_gradients(conv_max_pool))
    together = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))(x, w, g)
    magnitudes = run(abs(x), abs(w).max(0), abs(g))["native"]
    for seed in range(3):
        alone = run(x, w[seed], g)
        for name, result in together.items():
            assert_close([leaf[seed] for leaf in result], alone[name], magnitudes)


@each_implementation
def test_scan_over_steps_agrees_with_one_at_a_time(implementation):
    x, w = normal((2, 8, 8, 9), (3, 3, 9, 4))

    def step(w, _):
        y, pull = jax.vjp(lambda w: apply(conv_max_pool, x, w, implementation), w)
        return w - 1e-2 * pull(jnp.sign(y))[0], y

    scanned, results = jax.jit(lambda w: lax.scan(step, w, length=3))(w)
    one = jax.jit(step)
    for expected in results:
        scale = apply(convolution.conv_general_dilated, abs(x), abs(w))
        w, y = one(w, None)
        assert_close(expected, y, scale)
    assert_close(scanned, w, scale)


def test_a_sharded_batch_gives_the_same_and_twice_the_same_bits():
    operands = normal((8, 8, 8, 3), (3, 3, 3, 4), (8, 3, 3, 4))
    run = jax.jit(with_gradients(conv_max_pool))
    alone, magnitudes = run(*operands), run(*map(abs, operands))["native"]
    mesh = data_mesh(jax.devices(), 8)
    places = batch_sharding(mesh), replicated_sharding(mesh), batch_sharding(mesh)
    spread = run(*jax.device_put(tuple(operands), places))
    assert len(spread["auto"][0].sharding.device_set) == 4
    for name, result in spread.items():
        assert_close(result, alone[name], magnitudes)
    assert_equal(run(*operands), alone)
    assert_equal(run(*jax.device_put(tuple(operands), places)), spread)


def test_a_dense_layer_is_that_of_flax():
    x, g = whole((5, 12), (5, 7))
    dense = nn.Dense(7, dot_general=convolution.dot_general)
    variables = jax.tree.map(jnp.round, variables_of(nn.Dense(7), x))
    (expected, pull), (actual, own_pull) = (
        jax.vjp(module.apply, variables, x) for module in (nn.Dense(7), dense)
    )
    assert_equal((actual, own_pull(g)), (expected, pull(g)))
    numbers = (((2,), (0,)), ((), ()))
    y, w = whole((2, 3, 4), (4, 5))
    assert_equal(convolution.dot_general(y, w, numbers), y @ w)


@pytest.mark.parametrize("side", [3, 20])
def test_flattening_is_reshaping(side):
    x, g = normal((2, side, side, 5), (2, side * side * 5))
    y, pull = jax.vjp(convolution.flatten, x)
    assert_equal((y, *pull(g)), (x.reshape(2, -1), g.reshape(x.shape)))


@each_function
def test_an_unknown_implementation_is_refused_with_the_choices(fn):
    with pytest.raises(
        ValueError, match="unknown implementation 'nope'; known: auto, native, patches"
    ):
        apply(fn, jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)), "nope")


def test_the_network_has_the_same_parameters_and_logits_with_each_implementation():
    (x,) = normal((2, 18, 18, 3))
    models = [
        CNN(10, (8, 12), hidden_features=16, conv_implementation=name)
        for name in convolution.IMPLEMENTATIONS
    ]
    trees = [variables_of(model, x) for model in models]
    logits = jax.jit(lambda: [model.apply(trees[0], x) for model in models])()
    expected = logits[convolution.IMPLEMENTATIONS.index("native")]
    for tree, actual in zip(trees, logits, strict=True):
        assert jax.tree.structure(tree) == jax.tree.structure(trees[0])
        assert_equal(tree, trees[0])
        assert_close(actual, expected, np.abs(expected))


@each_function
@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_only_a_cpu_departs_from_the_native_program(monkeypatch, fn, channels, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, w = normal((1, 8, 8, channels), (3, 3, channels, 4))
    program = operators(functools.partial(apply, fn, implementation="auto"), x, w)
    assert ("conv_general_dilated" in program) == (backend != "cpu")
    assert ("dot_general" in program) == (backend == "cpu")
    pooling = operators(lambda x: convolution.max_pool(x, (2, 2), (2, 2)), x)
    assert ("reduce_window" in pooling) == (backend == "tpu")


def test_native_operators_are_those_of_a_gpu_on_any_backend():
    model = CNN(10, (4, 12), hidden_features=16)
    (x,) = normal((2, 18, 18, 3))
    variables = variables_of(model, x)

    def program(fn):
        return str(jax.make_jaxpr(lambda x: fn(x))(x))

    def network(x):
        return convolution.max_pool(model.apply(variables, x)[:, :, None, None], (1, 1), (1, 1))

    here = program(network)
    assert "conv_general_dilated" not in here
    with convolution.native_operators():
        native = program(network)
        named = program(lambda x: convolution.max_pool(x, (2, 2), (2, 2), implementation="patches"))
    assert native.count("conv_general_dilated") == 2
    assert native.count("reduce_window_max") == 3
    assert "concatenate" not in native
    assert "reduce_window" not in named
    assert program(network) == here


def test_winograd_is_for_3x3_kernels_without_strides_and_up_to_float32():
    x, w = normal((1, 8, 8, 3), (3, 3, 3, 4))
    own = functools.partial(apply, conv_max_pool, implementation="winograd")
    assert "conv_general_dilated" not in operators(own, x, w)
    strided = functools.partial(own, window_strides=(2, 1))
    narrow = x.astype("bfloat16"), w.astype("bfloat16")
    assert "conv_general_dilated" not in operators(own, *narrow)
    assert "conv_general_dilated" in operators(strided, x, w)
    assert "conv_general_dilated" in operators(own, x, w[:2])
    with jax.enable_x64(True):
        assert "conv_general_dilated" in operators(own, np.float64(x), np.float64(w))


@pytest.mark.parametrize(
    ("fn", "side", "products"),
    [
        # 12x12 outputs: nine tiles of 4x4, not 36 of 2x2; 6x6: nine of 2x2, not four of 4x4.
        (conv_max_pool, 14, 36),
        (conv_max_pool, 8, 16),
        (convolution.conv_general_dilated, 15, 36),
    ],
)
def test_winograd_takes_the_tiles_with_the_fewest_products(fn, side, products):
    x, w = normal((1, side, side, 12), (3, 3, 12, 4))
    program = jax.make_jaxpr(functools.partial(apply, fn, implementation="winograd"))(x, w)
    assert f"f32[{products},12,4]" in str(program)


@pytest.mark.parametrize(("images", "products"), [(1, 16), (10_000, 36)])
def test_winograd_takes_small_tiles_where_a_large_kernel_meets_few_images(images, products):
    """4x4 outputs: four tiles of 2x2 have a smaller transformed kernel than one of 4x4."""
    shapes = [(images, 6, 6, 128), (3, 3, 128, 128)]
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    fn = functools.partial(apply, convolution.conv_general_dilated, implementation="winograd")
    assert f"f32[{products},9]" in str(jax.make_jaxpr(fn)(x, w))  # the transform of the kernel


@pytest.mark.parametrize(("side", "stride", "chunks"), [(1, 1, False), (2, 2, False), (2, 1, True)])
def test_large_batches_are_in_chunks_where_their_images_are_copied(side, stride, chunks):
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((4096, 8, 8, 64), (side, side, 64, 8))
    )
    program = jax.make_jaxpr(
        lambda x, w: convolution.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=LAYOUT, implementation="patches"
        )
    )(x, w)
    assert ("scan" in str(program)) == chunks


def test_the_native_implementation_has_forward_mode_derivatives():
    x, w, dx, dw = whole((1, 6, 6, 2), (3, 3, 2, 3), (1, 6, 6, 2), (3, 3, 2, 3))
    fn = functools.partial(apply, conv_max_pool)
    y, slope = jax.jvp(fn, (x, w), (dx, dw))
    _, pull = jax.vjp(fn, x, w)
    back = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(slope.sum(), jnp.vdot(back[0], dx) + jnp.vdot(back[1], dw))
    pooled = functools.partial(convolution.max_pool, window_shape=(2, 2), strides=(2, 2))
    (moved,) = jax.jvp(functools.partial(pooled, implementation="native"), (x,), (dx,))[1:]
    np.testing.assert_array_equal(moved.sum(), jnp.vdot(jax.grad(lambda x: pooled(x).sum())(x), dx))
