import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn import CNN
from cnn.models.summary import model_summary


def test_the_summary_of_the_baseline():
    model = CNN(10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    lines = model_summary(model, variables, (32, 32, 3)).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    # 30*30 positions x (3*3*3*32 weights) x 2, and so on.
    assert rows["Conv_0"] == ["30x30x32", "896", "1.56"]
    assert rows["Conv_1"] == ["13x13x64", "18,496", "6.23"]
    assert rows["Dense_0"] == ["64", "147,520", "0.29"]
    assert rows["total"] == ["167,562", "8.08"]


class Nested(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = CNN(8, features=(4,))(image)
        scale = self.param("scale", nn.initializers.ones, (1, 8))
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x)) * scale[:, :2]


def test_the_summary_finds_layers_within_layers():
    model = Nested()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    text = model_summary(model, variables, (8, 8, 1))
    assert "CNN_0/Conv_0" in text
    assert "BatchNorm_0" in text
    assert f"{size:,}" in text.splitlines()[-1]


def test_long_names_of_layers_are_cut_at_their_beginnings():
    model = Nested()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    lines = model_summary(model, variables, (8, 8, 1), width=37).splitlines()
    assert max(map(len, lines)) == 37
    assert any(line.startswith("  ...onv_0  ") for line in lines)
