import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import UserError, create_model, create_train_state, train_step
from cnn.models.summary import model_summary


def tiny(**fields):
    return create_model("resnet18", 4, stage_sizes=(1, 2), features=8, **fields)


def test_resnet18_has_the_known_number_of_parameters():
    model = create_model("resnet18", 10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 11_173_962
    # Multiply-adds: stem 9*3*64*32**2, first stage 4 * 9*64**2*32**2, each further stage the same
    # number, (9*64*128 + 3 * 9*128**2 + 64*128) * 16**2, and 5,120; 555,422,720 in all.
    total = model_summary(model, variables, (32, 32, 3)).splitlines()[-1].split()
    assert total[-1] == "1110.85"


def test_stages_halve_the_image_and_double_the_channels():
    image = jnp.zeros((2, 9, 12, 3))
    model = tiny()

    def intermediates():
        _, variables = model.init_with_output(
            jax.random.key(0), image, capture_intermediates=True, mutable=True
        )
        return variables

    inner = jax.eval_shape(intermediates)
    shapes = {
        name: value["__call__"][0].shape
        for name, value in inner["intermediates"].items()
        if name.startswith("stage")
    }
    assert shapes == {
        "stage0_block0": (2, 9, 12, 8),
        "stage1_block0": (2, 5, 6, 16),
        "stage1_block1": (2, 5, 6, 16),
    }


def test_a_block_is_the_sum_of_its_convolutions_and_its_shortcut():
    """Against the formula of the paper, with running mean 0 and variance 1."""
    image = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    model = create_model("resnet18", 4, stage_sizes=(1,), features=5)
    variables = jax.jit(model.init)(jax.random.key(0), image)

    def conv(x, layer):
        kernel = layer["kernel"]
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) / np.sqrt(np.float32(1 + 1e-5))

    params = variables["params"]
    x = nn.relu(conv(image, params["Conv_0"]))
    block = params["stage0_block0"]
    x = nn.relu(x + conv(nn.relu(conv(x, block["Conv_0"])), block["Conv_1"]))
    expected = x.mean((1, 2)) @ params["Dense_0"]["kernel"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, image), expected, atol=1e-4)


def test_it_trains_by_train_step_and_moves_its_statistics():
    model = create_model("resnet18", 4, stage_sizes=(1, 1), features=4)
    state = create_train_state(model, optax.sgd(0.1), jax.random.key(0), (8, 8, 3))
    image = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    batch = {"image": image, "label": jnp.arange(8) % 4}
    step = jax.jit(train_step)
    losses = []
    for _ in range(5):
        before, (state, metrics) = state, step(state, batch)
        losses.append(float(metrics.means()["loss"]))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.model_state, state.model_state)
    assert all(jax.tree.leaves(moved))


def test_stochastic_depth_leaves_out_blocks_by_the_linear_rule():
    """Of 1,000 images each block leaves out its share, and divides what is left."""
    fields = {"stage_sizes": (1, 1), "features": 1, "conv_implementation": "native"}
    plain = create_model("resnet18", 2, **fields)
    model = plain.clone(stochastic_depth_rate=0.8)
    images = jax.random.normal(jax.random.key(0), (1000, 4, 4, 1))
    shapes = jax.eval_shape(plain.init, jax.random.key(0), images[:1])
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)

    def is_watched(module, _):
        return isinstance(module, nn.BatchNorm | nn.Dropout)

    @jax.jit
    def branches(key):
        """What each block computes, and what is left of it."""
        _, found = model.apply(
            variables, images, True, rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"], capture_intermediates=is_watched,
        )  # fmt: skip
        blocks = [found["intermediates"][f"stage{stage}_block0"] for stage in range(2)]
        return [(b["BatchNorm_1"]["__call__"][0], b["Dropout_0"]["__call__"][0]) for b in blocks]

    draws = [branches(jax.random.key(number)) for number in range(2)]
    for block, rate in enumerate((0.4, 0.8)):
        computed, left = map(np.asarray, draws[0][block])
        kept = (left != 0).any((1, 2, 3))
        assert 1 - kept.mean() == pytest.approx(rate, abs=0.06)
        np.testing.assert_allclose(left[kept], computed[kept] / (1 - rate), rtol=1e-5)
        assert (kept != (np.asarray(draws[1][block][1]) != 0).any((1, 2, 3))).any()
    logits = [jax.jit(one.apply)(variables, images[:2]) for one in (plain, model)]
    np.testing.assert_array_equal(*logits)


def test_impossible_fields_and_images_are_refused():
    with pytest.raises(UserError, match=r"stochastic_depth_rate=1.0 must be at least 0 and below"):
        tiny(stochastic_depth_rate=1.0)
    with pytest.raises(UserError, match=r"model\.stage_sizes=\(2, 0\) must hold whole numbers"):
        create_model("resnet18", 10, stage_sizes=(2, 0))
    with pytest.raises(UserError, match=r"ResNet takes images of shape \[B, H, W, C\]"):
        tiny().init(jax.random.key(0), jnp.zeros((8, 8, 3)))
