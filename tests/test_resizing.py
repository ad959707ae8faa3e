"""Smaller images in the first epochs."""

import jax
import numpy as np
import PIL.Image
import pytest

import cnn
from benchmarks.flops import run_flop
from cnn import ProgressiveResizing, UserError
from cnn.augment.resizing import Stage, resize_images
from cnn.config import check_config, override, to_json_dict
from cnn.experiment import create_experiment, devices_of
from tests.helpers import Killed, kill_at, records_of, short_config

RESIZING = ProgressiveResizing((0.5, 0.75), (0.5, 1.5))  # 7 steps, then up to 21, of 14 an epoch


@pytest.fixture
def config():
    """A network that pools over all places, on the digits."""
    flags = ["--config.model.name=resnet18", "--config.model.stage_sizes=(1,)"]
    flags += ["--config.model.features=4", "--config.resizing.scales=(0.5, 0.75)"]
    flags += ["--config.resizing.until_epochs=(0.5, 1.5)", "--config.evaluation.tta=none"]
    return override(short_config(), flags)


def test_pixels_are_those_of_pillow():
    """Which weighs the pixels that a new one covers by a triangle, as JAX does."""
    image = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    small = np.asarray(PIL.Image.fromarray(image).resize((36, 24), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_allclose(
        resize_images(image[None, ..., None], 0.75)[0, ..., 0], small, atol=1e-5
    )
    assert resize_images(np.ones((2, 3, 8, 8, 1), np.float32), 0.01).shape == (2, 3, 1, 1, 1)


@pytest.mark.parametrize(
    ("scales", "until_epochs", "reason"),
    [
        ((0.5,), (), "as many numbers each"),
        ((1.0,), (2.0,), "less than 1"),
        ((0.0,), (2.0,), "more than 0"),
        ((float("nan"),), (2.0,), "more than 0"),
        ((0.5,), (0.0,), "more than 0, finite, and rise"),
        ((0.5, 0.75), (3.0, 3.0), "more than 0, finite, and rise"),
        ((0.5,), (float("nan"),), "more than 0, finite, and rise"),
        ((0.5,), (float("inf"),), "more than 0, finite, and rise"),
    ],
)
def test_what_is_no_schedule_is_refused(config, scales, until_epochs, reason):
    with pytest.raises(UserError, match=reason):
        ProgressiveResizing(scales, until_epochs)
    config.resizing.scales, config.resizing.until_epochs = scales, until_epochs
    with pytest.raises(UserError, match=reason):
        check_config(config)


def test_a_run_has_the_stages_that_it_reaches():
    assert RESIZING.stages(28, 14) == [Stage(0.5, 0, 7), Stage(0.75, 7, 21), Stage(1.0, 21, 28)]
    assert RESIZING.stages(10, 14) == [Stage(0.5, 0, 7), Stage(0.75, 7, 10)]
    assert ProgressiveResizing((0.5,), (1e-9,)).stages(10, 14) == [Stage(1.0, 0, 10)]
    assert ProgressiveResizing().stages(10, 14) == [Stage(1.0, 0, 10)]
    assert RESIZING.stage(21, 14) == Stage(1.0, 21, 2**31)


@pytest.mark.parametrize("steps_per_execution", [1, 5, 14])
def test_batches_are_the_whole_ones_made_smaller(digits, steps_per_execution):
    common = {"batch_size": 96, "normalization": "standardize"}
    whole = cnn.Pipeline(digits, **common, steps_per_execution=1)
    pipeline = cnn.Pipeline(
        digits, **common, steps_per_execution=steps_per_execution, resizing=RESIZING
    )
    resize = jax.jit(resize_images, static_argnames="scale")
    step = 0
    for batches, num_steps in pipeline.batches(0, 28):
        side = {0.5: 4, 0.75: 6, 1.0: 8}[RESIZING.stage(step, 14).scale]
        assert batches["image"].shape == (steps_per_execution, 96, side, side, 1)
        for i in range(num_steps):
            assert RESIZING.stage(step, 14).scale == side / 8
            one, _ = next(whole.batches(step))
            np.testing.assert_array_equal(batches["label"][i], one["label"][0])
            smaller = resize(one["image"], side / 8)
            np.testing.assert_allclose(batches["image"][i], smaller[0], atol=1e-6)
            step += 1
    assert step == 28


def test_a_killed_run_ends_in_the_same_bits_whatever_the_length_of_a_call(config, tmp_path, capsys):
    _, whole = cnn.train_and_evaluate(config, tmp_path / "whole")
    out = capsys.readouterr().out
    assert "sizes: 4x4 up to epoch 0.5, 6x6 up to epoch 1.5, 8x8 up to epoch 2" in out
    config.runtime.steps_per_execution = 5
    with pytest.raises(Killed):
        cnn.train_and_evaluate(config, tmp_path / "killed", writers=[kill_at(14)])
    config.runtime.checkpoint_every_steps = 3
    _, resumed = cnn.train_and_evaluate(config, tmp_path / "killed")
    assert resumed["digest"] == whole["digest"]
    capsys.readouterr()
    config.resizing.scales = config.resizing.until_epochs = ()
    _, other = cnn.train_and_evaluate(config, tmp_path / "other")
    assert "sizes:" not in capsys.readouterr().out
    assert other["digest"] != whole["digest"]


def test_seeds_side_by_side_see_the_same_sizes(config, tmp_path):
    _, single = cnn.train_and_evaluate(config, tmp_path / "single")
    config.num_seeds, config.runtime.group_layout = 2, "vmap"
    group = cnn.train_group(config, tmp_path / "group")
    assert group["members"][0]["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)
    assert group["members"][0]["test_loss"] == pytest.approx(single["test_loss"], rel=1e-4)


def test_a_model_that_takes_one_size_is_refused_before_anything_is_written(config, tmp_path):
    config = override(config, ["--config.model.name=cnn", "--config.model.padding=SAME"])
    with pytest.raises(UserError, match=r"CNN takes images of 8x8 pixels but none of 4x4; choose"):
        cnn.train_and_evaluate(config, tmp_path / "run")
    config = override(config, ["--config.model.name=speednet", "--config.model.widths=(4, 4)"])
    with pytest.raises(UserError, match="images of 4x4 pixels are too small for SpeedNet"):
        cnn.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_whole_images_is_noted(config, tmp_path, capsys):
    config.num_epochs = 1
    cnn.train_and_evaluate(config, tmp_path)
    out = capsys.readouterr().out
    assert "note: resizing.until_epochs=(0.5, 1.5): the run ends before" in out
    assert len(records_of(tmp_path)) == 1


def test_operations_are_counted_at_each_size(config):
    """Convolutions that keep the size: their operations go by the number of pixels."""
    config = check_config(config)
    experiment = create_experiment(config, devices_of(config))
    found = run_flop(to_json_dict(config), experiment.dataset_record)
    config.resizing.scales = config.resizing.until_epochs = ()
    whole = run_flop(to_json_dict(config), experiment.dataset_record)
    head = 28 * 96 * 3 * 2 * 4 * 10
    expected = (7 * 0.25 + 14 * 0.75**2 + 7) / 28 * (whole.training - head) + head
    assert found.training == pytest.approx(expected)
    assert found.evaluation == whole.evaluation
