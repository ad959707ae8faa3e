"""What a researcher brings to `train_and_evaluate`: recorded, resumed, and told apart."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import UserError, digest, train_and_evaluate
from cnn.steps import has_native_convolution
from tests.helpers import Killed, kill_at, records_of


class Linear(nn.Module):
    """A network of one's own, quickly compiled."""

    num_classes: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dense(self.num_classes)(self.scale * image.reshape(image.shape[0], -1))


def half_cross_entropy(logits, labels):
    return 0.5 * optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def darken(key, images, *, epoch):
    return images // (1 + epoch).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 480).astype(np.int32)
    images = (80 * labels[:, None, None, None] + rng.integers(0, 40, (480, 4, 4, 1))).astype(
        np.uint8
    )
    train, test = (cnn.Split(images[part], labels[part]) for part in (slice(384), slice(384, 480)))
    return cnn.Dataset.from_splits("tiny", train=train, test=test, class_names=("a", "b", "c"))


def own_objects(dataset):
    return {
        "dataset": dataset,
        "model": Linear(3),
        "tx": optax.adam(1e-2),
        "loss_fn": half_cross_entropy,
        "augment": darken,
    }


def test_all_of_a_researchers_own_objects_are_used_and_recorded(config, tmp_path, tiny, capsys):
    state, result = train_and_evaluate(config, tmp_path, **own_objects(tiny))
    assert state.params["Dense_0"]["kernel"].shape == (16, 3)
    assert result["test_count"] == 96
    recorded = json.loads((tmp_path / "config.json").read_text())
    names = {name: recorded[name]["object"] for name in ("model", "loss", "optimizer", "augment")}
    assert names == {
        "model": "tests.test_own_objects.Linear",
        "loss": "tests.test_own_objects.half_cross_entropy",
        "augment": "tests.test_own_objects.darken",
        "optimizer": names["optimizer"],
    }
    assert "b1=0.9, b2=0.999" in recorded["optimizer"]["value"]
    assert recorded["dataset"] == {"object": "tiny", "normalization": "scale"}
    assert recorded["model"]["value"] == "Linear(num_classes=3, scale=1.0)"
    assert all(recorded[name]["source"] for name in names)
    first, second = records_of(tmp_path)
    assert "learning_rate" not in first  # that of another's optimizer is not known
    assert second["train_loss"] < first["train_loss"] < 0.5 * np.log(3) + 0.1
    assert "model: tests.test_own_objects.Linear, passed by the script" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "samples.png"}


def test_a_run_with_own_objects_resumes_to_the_same_bits(config, tmp_path, tiny):
    whole, _ = train_and_evaluate(config, tmp_path / "whole", **own_objects(tiny))
    with pytest.raises(Killed):
        train_and_evaluate(config, tmp_path / "run", **own_objects(tiny), writers=[kill_at(8)])
    again, _ = train_and_evaluate(config, tmp_path / "run", **own_objects(tiny))
    assert digest(again) == digest(whole)
    same, _ = train_and_evaluate(config, tmp_path / "run", **own_objects(tiny))
    assert digest(same) == digest(whole)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": Linear(3, scale=2.0)}, "scale=2.0"),
        ({"model": None}, "model.object: tests.test_own_objects.Linear -> unset"),
        ({"tx": optax.sgd(1e-2)}, "optimizer.value"),
        ({"tx": optax.adam(2e-2)}, "optimizer.value"),
        ({"loss_fn": optax.softmax_cross_entropy_with_integer_labels}, "loss.object"),
        ({"augment": lambda key, images: images}, "augment.object"),
        ({"augment": None}, "augment.object: tests.test_own_objects.darken -> unset"),
    ],
)
def test_a_run_is_not_resumed_with_another_object(config, tmp_path, tiny, change, complaint):
    config.num_epochs = 1
    shared = tmp_path.parent / "own-objects"
    if not shared.exists():
        train_and_evaluate(config, shared, **own_objects(tiny))
    shutil.copytree(shared, tmp_path / "run")
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, tmp_path / "run", **{**own_objects(tiny), **change})
    assert "holds a run of another config" in str(error.value)
    assert complaint in str(error.value)


def test_other_images_in_a_dataset_of_ones_own_are_refused(config, tmp_path, tiny):
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path, **own_objects(tiny))
    images = np.array(tiny.train.images)
    images[0, 0, 0, 0] ^= 1
    changed = cnn.Dataset.from_splits(
        "tiny",
        train=cnn.Split(images, tiny.train.labels),
        test=tiny.test,
        class_names=tiny.class_names,
    )
    with pytest.raises(UserError, match="other tiny images than those found now"):
        train_and_evaluate(config, tmp_path, **own_objects(changed))


def test_writers_get_each_record_and_a_failing_one_is_one_warning(config, tmp_path, digits, capsys):
    written = []

    def broken(record):
        written.append(f"broken {record['epoch']}")
        raise OSError("no network")

    train_and_evaluate(config, tmp_path, writers=[broken, written.append])
    records = records_of(tmp_path)
    assert written == ["broken 1", records[0], records[1]]
    err = capsys.readouterr().err
    assert err == "warning: the writer broken gets no more records (no network)\n"


@pytest.mark.parametrize(
    ("augment", "complaint"),
    [
        (lambda key, images: images[:, 1:], r"uint8\[96, 8, 8, 1\], not uint8\[96, 7, 8, 1\]"),
        (lambda key, images: images / 255, "must return images of the shape and dtype"),
    ],
)
def test_an_augmentation_that_changes_the_images_kind_is_refused(
    config, tmp_path, digits, augment, complaint
):
    with pytest.raises(UserError, match=complaint):
        train_and_evaluate(config, tmp_path / "run", augment=augment)
    assert not (tmp_path / "run").exists()


def test_a_run_may_end_within_an_epoch(config, tmp_path, digits):
    config.num_epochs = 1.5
    state, result = train_and_evaluate(config, tmp_path)
    assert int(state.step) == result["num_steps"] == 21
    assert [(record["step"], record["epoch"]) for record in records_of(tmp_path)] == [
        (14, 1),
        (21, 1.5),
    ]
    assert result["num_epochs"] == 1.5
    config.num_epochs = 0.001
    state, result = train_and_evaluate(config, tmp_path / "short")
    assert int(state.step) == 1


def test_more_metrics_are_in_the_record_the_result_and_the_table(config, tmp_path, digits, capsys):
    config.metrics = ("accuracy", "top5_accuracy")
    config.num_epochs = 1
    _, result = train_and_evaluate(config, tmp_path)
    (record,) = records_of(tmp_path)
    assert result["test_top5_accuracy"] == record["test_top5_accuracy"] > record["test_accuracy"]
    assert record["train_top5_accuracy"] > record["train_accuracy"]
    assert "top5 accuracy" in capsys.readouterr().out
    plain = config.copy_and_resolve_references()
    plain.metrics = ("accuracy",)
    state, _ = train_and_evaluate(plain, tmp_path / "plain")
    other, _ = train_and_evaluate(config, tmp_path)
    assert jax.tree.all(jax.tree.map(jnp.allclose, other.params, state.params))


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(10)(image.reshape(image.shape[0], -1))


@pytest.mark.parametrize(
    "model", [WithoutTrain(), nn.Sequential([lambda x: x[:, 0, :, 0], nn.Dense(10)])]
)
def test_a_model_without_train(config, tmp_path, digits, model):
    config.num_epochs = 0.1
    state, _ = train_and_evaluate(config, tmp_path, model=model)
    assert int(state.step) == 1


class PlainLayers(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(image)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_plain_layers_train_alike_and_fast_on_a_cpu(config, tmp_path, digits):
    config.num_epochs = 0.2
    ends = {}
    for name in ("plain", "fast"):
        config.runtime.fast_cpu = name == "fast"
        state, result = train_and_evaluate(config, tmp_path / name, model=PlainLayers())
        assert has_native_convolution(state, (1, 8, 8, 1)) == (name == "plain")
        ends[name] = state.params
        assert train_and_evaluate(config, tmp_path / name, model=PlainLayers())[1] == result
    for fast, plain in zip(*(jax.tree.leaves(ends[name]) for name in ends), strict=True):
        np.testing.assert_allclose(fast, plain, atol=1e-4)


def mean_loss(logits, labels):
    return half_cross_entropy(logits, labels).mean()


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"loss_fn": mean_loss}, r"the loss must return a float for each image, \[B\] with B=96"),
        ({"loss_fn": lambda logits: logits}, "a training step cannot be traced: .*argument"),
        ({"loss_fn": "mse"}, "loss_fn must be a function of .logits, labels., not 'mse'"),
        ({"model": Linear(5)}, "the model returns 5 logits for 10 classes"),
        ({"model": Linear}, "model must be a linen module, such as"),
        ({"tx": 1e-3}, "tx must be an Optax optimizer"),
        ({"tx": optax.adam}, "tx must be an Optax optimizer"),
        ({"augment": "flip"}, "augment must be a function of"),
        ({"dataset": "digits"}, "dataset must be a cnn.Dataset, not 'digits'"),
    ],
)
def test_a_mistake_in_what_is_passed_leaves_no_directory(config, tmp_path, digits, passed, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path / "run", **passed)
    assert not (tmp_path / "run").exists()


def test_a_writer_cannot_change_the_run(config, tmp_path, digits):
    config.num_epochs = 1
    _, result = train_and_evaluate(config, tmp_path, writers=[lambda record: record.clear()])
    assert result["test_accuracy"] == records_of(tmp_path)[0]["test_accuracy"]


def test_the_configs_schedule_is_not_that_of_an_optimizer_that_is_passed(config, tmp_path, digits):
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path, tx=optax.sgd(0.1))
    config.schedule.name = "cosine"
    _, again = train_and_evaluate(config, tmp_path, tx=optax.sgd(0.1))
    assert again["num_steps"] == 14
