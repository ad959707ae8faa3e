"""A run directory as a trained model, on a machine that has neither its data nor its optimizer."""

import json
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

import cnn
from cnn.evaluation import TEST_TIME_VIEWS
from tests.helpers import REPOSITORY, short_config


def test_three_lines_predict_an_image(trained_run, digits):
    run = cnn.load_run(trained_run)
    probabilities = run.predict([PIL.Image.fromarray(digits.test.images[0, ..., 0])])
    name = run.class_names[probabilities[0].argmax()]
    assert probabilities.shape == (1, 10)
    assert name in digits.class_names
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)


def test_accuracy_is_that_of_the_run(trained_run, digits):
    run = cnn.load_run(trained_run)
    result = json.loads((trained_run / "result.json").read_text())
    logits = run.logits(digits.test.images)
    assert (logits.argmax(-1) == digits.test.labels).mean() == result["test_accuracy"]
    mean, std = run.normalization
    placed = cnn.DeviceSplit.from_split(
        digits.test, cnn.replicated_sharding(run.mesh), mean=mean, std=std
    )
    metrics = cnn.evaluate(run.state, placed)
    assert metrics.accuracy == result["test_accuracy"]
    assert metrics.loss == pytest.approx(result["test_loss"], rel=1e-6)


def test_logits_are_those_of_the_module(trained_run, digits):
    run = cnn.load_run(trained_run)
    mean, std = run.normalization
    image = (digits.test.images[:5] / np.float32(255) - mean) / std
    expected = run.model.apply(run.variables, image)
    np.testing.assert_allclose(run.logits(digits.test.images[:5]), expected, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 3, 1025])
def test_any_number_of_images(trained_run, digits, number):
    run = cnn.load_run(trained_run)
    images = np.resize(digits.test.images, (number, *digits.image_shape))
    logits = run.logits(images)
    assert logits.shape == (number, 10)
    if number:
        np.testing.assert_allclose(logits[-1:], run.logits(images[-1:]), atol=1e-5)


def test_images_come_in_many_forms(trained_run, digits):
    run = cnn.load_run(trained_run)
    array = digits.test.images[7]
    picture = PIL.Image.fromarray(array[..., 0])
    expected = run.logits(array[None])
    for images in (array, array[..., 0], [array], (picture,), picture, [picture.convert("RGB")]):
        np.testing.assert_allclose(run.logits(images), expected, atol=1e-5)
    large = picture.resize((80, 80), PIL.Image.Resampling.NEAREST)
    assert run.logits([large, np.asarray(large)]).shape == (2, 10)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 1), np.float32), "seven.png", [np.zeros(3, np.uint8)], 7, [None]],
    ids=["floats", "a path", "one axis", "a number", "None"],
)
def test_other_images_are_refused(trained_run, images):
    with pytest.raises(cnn.UserError, match=r"images must be uint8 arrays \(N, H, W, C\)"):
        cnn.load_run(trained_run).logits(images)


def test_a_picture_that_cannot_be_decoded_is_named(trained_run, digits, tmp_path):
    run = cnn.load_run(trained_run)
    picture = PIL.Image.fromarray(digits.test.images[0, ..., 0]).resize((64, 64))
    picture.save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    unknown = PIL.Image.fromarray(np.full((8, 8), -7, np.float32))
    with PIL.Image.open(tmp_path / "cut.jpg") as cut, pytest.raises(cnn.UserError) as error:
        run.predict([picture, cut])
    fault = "cannot be read: truncated; replace it or leave it out"
    assert str(error.value) == f"images[1] ({tmp_path / 'cut.jpg'}) {fault}"
    with pytest.raises(cnn.UserError, match=r"images\[0\] cannot be read: values from -7 to -7"):
        run.predict(unknown)
    with pytest.raises(cnn.UserError, match=r"not float32\[8, 8\] \(images\[1\]\)"):
        run.predict([picture, np.zeros((8, 8), np.float32)])


def test_two_channels_are_grey_and_opacity(trained_run):
    run = cnn.load_run(trained_run)
    image = np.zeros((1, 8, 8, 2), np.uint8)
    white = np.full((1, 8, 8, 1), 255, np.uint8)
    np.testing.assert_allclose(run.predict(image), run.predict(white), atol=1e-5)


def test_neither_dataset_nor_optimizer_is_needed(trained_run, tmp_path):
    moved = shutil.copytree(trained_run, tmp_path / "copied")
    script = (
        "import sys, numpy, cnn, cnn.data.sources as sources, cnn.optimizers as optimizers\n"
        "sources.load_dataset = optimizers.create_optimizer = None\n"
        "run = cnn.load_run(sys.argv[1])\n"
        "print(run.predict(numpy.zeros((2, 8, 8, 1), numpy.uint8)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, moved],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("(2, 10)\n", 0), done.stderr


def test_checkpoints_by_name_and_step(trained_run):
    steps = cnn.CheckpointManager(trained_run / "checkpoints").all_steps()
    assert cnn.load_run(trained_run).step == steps[-1]
    assert cnn.load_run(trained_run, steps[0]).step == steps[0]
    assert cnn.load_run(trained_run, str(steps[0])).step == steps[0]
    assert cnn.load_run(trained_run, "best").step in steps
    with pytest.raises(cnn.UserError, match="no checkpoint 'bset'; there are"):
        cnn.load_run(trained_run, "bset")


def test_not_a_run(trained_run, tmp_path):
    with pytest.raises(cnn.UserError, match=r"is not a run directory: no checkpoint is in it"):
        cnn.load_run(tmp_path)
    with pytest.raises(cnn.UserError, match=f"did you mean {trained_run}\\?"):
        cnn.load_run(trained_run / "checkpoints")
    step = cnn.load_run(trained_run).step
    with pytest.raises(cnn.UserError, match=f"did you mean {trained_run}\\?"):
        cnn.load_run(trained_run / "checkpoints" / str(step))


def test_a_damaged_checkpoint_is_refused(trained_run, tmp_path):
    copied = shutil.copytree(trained_run, tmp_path / "copied")
    step = cnn.load_run(copied).step
    record = copied / "checkpoints" / str(step) / "record.json"
    record.write_text(record.read_text().replace('"batch_size"', '"batch_sise"'))
    other = cnn.CheckpointManager(copied / "checkpoints").all_steps()[0]
    advice = f"is damaged.*--checkpoint {other}, or in Python load_run\\(path, {other}\\)"
    with pytest.raises(cnn.UserError, match=advice):
        cnn.load_run(copied)
    assert cnn.load_run(copied, other).step == other
    shutil.rmtree(copied / "checkpoints" / str(other))
    with pytest.raises(cnn.UserError, match=r"is damaged(?!.*--checkpoint)"):
        cnn.load_run(copied)


class Noisy(nn.Module):
    """Batch statistics and dropout: it must be in evaluation mode."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, train):
        x = nn.Conv(4, (3, 3))(image)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x)


def test_a_model_that_a_script_passed(tmp_path, digits):
    config = short_config()
    config.num_epochs = 1
    state, _ = cnn.train_and_evaluate(config, tmp_path, model=Noisy(), tx=optax.sgd(0.1))
    with pytest.raises(cnn.UserError, match=r"Noisy, which a script passed: pass it to load_run"):
        cnn.load_run(tmp_path)
    with pytest.raises(cnn.UserError, match=r"of another model \(params/.*and \d+ more"):
        cnn.load_run(tmp_path, model=cnn.CNN(10, features=(4,)))
    run = cnn.load_run(tmp_path, model=Noisy())
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), run.variables, state.variables)
    )
    np.testing.assert_array_equal(
        run.logits(digits.test.images[:3]), run.logits(digits.test.images[:3])
    )


def test_probabilities_are_those_of_the_loss(tmp_path, digits):
    config = short_config()
    config.num_epochs = 1
    config.loss = {"name": "sigmoid_cross_entropy"}
    cnn.train_and_evaluate(config, tmp_path)
    run = cnn.load_run(tmp_path)
    expected = 1 / (1 + np.exp(-run.logits(digits.test.images)))
    np.testing.assert_allclose(run.predict(digits.test.images), expected, rtol=1e-5)


def test_views_are_weighted_means():
    image = jnp.arange(2 * 5 * 6 * 1, dtype=jnp.float32).reshape(2, 5, 6, 1)
    for views in TEST_TIME_VIEWS.values():
        assert sum(weight for _, weight in views) == 1
        assert all(view(image).shape == image.shape for view, _ in views)
    (_, _), (mirrored, _) = TEST_TIME_VIEWS["flip"]
    np.testing.assert_array_equal(mirrored(image), image[:, :, ::-1])
    up = TEST_TIME_VIEWS["flip_translate"][2][0](image)
    down = TEST_TIME_VIEWS["flip_translate"][4][0](image)
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(down, padded[:, :5, :6])  # the crop at the upper left
    np.testing.assert_array_equal(up, padded[:, 2:, 2:])


def test_test_time_augmentation_averages_logits(trained_run, digits):
    run, images = cnn.load_run(trained_run), digits.test.images[:8]
    flipped = (run.logits(images) + run.logits(images[:, :, ::-1])) / 2
    np.testing.assert_allclose(run.logits(images, tta="flip"), flipped, atol=1e-5)
    with pytest.raises(cnn.UserError, match=r"unknown test-time augmentation 'flop'; did you mean"):
        run.logits(images, tta="flop")
