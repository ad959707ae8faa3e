"""Counted FLOPs against published ones, and against counts by hand."""

import functools

import flax.linen as nn
import pytest

import cnn
from benchmarks.flops import network_flop, run_flop
from benchmarks.peers.contenders.problem import FLOP
from cnn import UserError
from cnn.config import check_config, to_json_dict
from tests.helpers import REPOSITORY

CIFAR10 = {
    "class_names": list("0123456789"),
    "image_shape": [32, 32, 3],
    "train_count": 50_000,
    "test_count": 10_000,
}


def config_of(name):
    return to_json_dict(check_config(cnn.load_config(REPOSITORY / "configs" / f"{name}.py")))


@functools.cache
def speednet_flop(**fields):
    model = cnn.create_model("speednet", num_classes=10, **fields)
    return network_flop(model, (32, 32, 3), ("whiten/kernel",))


# MFLOP forward, PFLOP of training and of the test with six views, of the recipes' own counts, which
# take three times the forward pass; their whitening layer gets two of three passes less, 0.2 %.
@pytest.mark.parametrize(
    ("fields", "forward", "images", "training", "evaluation"),
    [
        ({}, 236.3, 476 * 1024, 0.3455, 0.0142),
        ({}, 236.3, 200 * 2000, 0.2836, 0.0142),
        ({"widths": (128, 384, 384)}, 603.1, 720 * 1024, 1.334, 0.0362),
        ({"widths": (128, 384, 512), "depth": 3}, 903.9, 1776 * 1024, 4.932, 0.0542),
        ({"widths": (128, 384, 512), "depth": 3}, 903.9, 2160 * 512, 2.999, 0.0542),
        ({"widths": (32, 64, 64)}, 34.2, 2160 * 1024, 0.227, None),
    ],
)
def test_networks_of_the_speed_recipes(fields, forward, images, training, evaluation):
    flop = speednet_flop(**fields)
    assert flop.forward == pytest.approx(forward * 1e6, rel=1e-3)
    whitening = 2 * 31 * 31 * 12 * 24
    assert flop.training == pytest.approx(3 * flop.forward - 2 * whitening)
    assert images * flop.training == pytest.approx(training * 1e15, rel=0.012)
    if evaluation:
        assert 60_000 * flop.forward == pytest.approx(evaluation * 1e15, rel=3e-3)


def test_a_run_counts_its_steps_and_the_views_of_its_test():
    config = config_of("speed94")
    flop = run_flop(config, CIFAR10)
    assert flop.training == pytest.approx(0.2836e15, rel=2e-3)
    assert flop.evaluation == pytest.approx(0.0142e15, rel=2e-3)
    assert flop.total == flop.training + flop.evaluation
    assert run_flop(config, CIFAR10, num_steps=50).training == pytest.approx(flop.training / 4)
    plain = {**config, "evaluation": {"tta": "none"}}
    assert run_flop(plain, CIFAR10).evaluation == pytest.approx(flop.evaluation / 6)


def test_a_proxy_counts_forward_at_every_step_and_backward_at_some():
    config = config_of("speed96")
    flop = run_flop(config, CIFAR10)
    whole = 45 * 48 * 1024 * 34.2e6
    assert flop.training == pytest.approx(2.999e15 + whole + 2 * whole / 4, rel=3e-3)


def test_other_networks_against_counts_by_hand():
    for name, network in {"baseline": "baseline", "resnet18": "resnet18"}.items():
        config = config_of(name)
        images = round(config["num_epochs"]) * (50_000 // config["batch_size"])
        images *= config["batch_size"]
        training = run_flop(config, CIFAR10).training / images
        assert training == pytest.approx(FLOP[network, "train"], rel=2e-3)


class Unsorted(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Dense(4, name="zeroth")(image.reshape(image.shape[0], -1))
        return nn.Dense(3, name="last")(nn.Dense(5, name="between")(x))


def test_the_first_layer_is_the_one_called_first_whatever_its_name():
    flop = network_flop(Unsorted(), (2, 2, 3), ("between",))
    assert flop.forward == 2 * (12 * 4 + 4 * 5 + 5 * 3)
    assert flop.training == 2 * (2 * 12 * 4 + 2 * 4 * 5 + 3 * 5 * 3)


def test_a_model_of_a_script_is_refused():
    config = {**config_of("speed94"), "model": {"object": "mine.Net"}}
    with pytest.raises(UserError, match="FLOPs cannot be counted"):
        run_flop(config, CIFAR10)
