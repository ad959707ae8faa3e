"""A run that starts from another run's weights."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

import cnn
from cnn import CheckpointManager, Split, UserError, train_and_evaluate
from cnn.config import check_config, override
from cnn.data import Dataset
from cnn.experiment import create_experiment
from cnn.runtime.devices import select_devices
from cnn.runtime.leaves import by_path
from cnn.transfer import find_source, fresh_leaves, transfer
from tests.helpers import Killed, kill_at, short_config, steps_in


def few_classes(digits, count):
    """The digits below a number."""

    def part(split):
        chosen = split.labels < count
        return Split(split.images[chosen], split.labels[chosen])

    names = digits.class_names[:count]
    return Dataset.from_splits(
        f"digits{count}", train=part(digits.train), test=part(digits.test), class_names=names
    )


def weights(arrays):
    tree = {name: arrays[name] for name in ("params", "model_state")}
    return {path: np.asarray(leaf) for path, leaf in by_path(jax.device_get(tree)).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory, digits):
    """A run on the digits 0 to 4."""
    run = tmp_path_factory.mktemp("source") / "run"
    train_and_evaluate(short_config(), run, dataset=few_classes(digits, 5))
    return run


@pytest.fixture
def config(config, source):
    return override(config, [f"--config.init_from={source}", "--config.num_epochs=1"])


def test_another_number_of_classes_is_a_new_head_on_the_old_layers(
    source, config, tmp_path, capsys
):
    """From five classes to ten, with the convolutions frozen."""
    config = override(config, ["--config.optimizer.freeze=('Conv_*',)"])
    run = tmp_path / "run"
    state, result = train_and_evaluate(config, run)
    out, err = capsys.readouterr()
    assert not err
    assert "new layers: Dense_1 (5 -> 10 classes)\n" in out
    assert f"frozen: {3 * 3 * 4 + 4 + 3 * 3 * 4 * 8 + 8:,} of " in out
    arrays, record = CheckpointManager(source / "checkpoints").read(steps_in(source)[-1])
    before = weights(arrays)
    first, first_record = CheckpointManager(run / "checkpoints").read(0)
    start, end = weights(first), weights(state.arrays)
    for path, leaf in start.items():
        if "Dense_1" in path:
            assert (before[path].shape[-1], leaf.shape[-1]) == (5, 10)
            continue
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
        assert (leaf.tobytes() == end[path].tobytes()) == ("Conv" in path), path
    assert int(first["step"]) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(first["opt_state"]))
    origin = {"run": str(source), "step": int(arrays["step"]), "digest": record["digest"]}
    assert result["init_from"] == first_record["init_from"] == origin
    assert json.loads((run / "result.json").read_text())["init_from"] == origin


def test_the_new_head_is_that_of_a_run_without_source(source, config, tmp_path, digits):
    def first_state(init_from):
        flags = [f"--config.init_from={init_from}"]
        checked = check_config(override(config, flags))
        experiment = create_experiment(checked, select_devices("cpu", 2))
        state = experiment.initial_state()
        if init_from:
            state, _ = transfer(experiment, state, source, checked.to_dict())
        return state

    plain, transferred = first_state(""), first_state(source)
    np.testing.assert_array_equal(
        plain.params["Dense_1"]["kernel"], transferred.params["Dense_1"]["kernel"]
    )
    assert (plain.params["Conv_0"]["kernel"] != transferred.params["Conv_0"]["kernel"]).any()
    assert jax.tree.structure(plain) == jax.tree.structure(transferred)
    # So the steps that were compiled for one are those of the other.
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(transferred), strict=True):
        assert (a.aval, a.sharding) == (b.aval, b.sharding)


def test_a_resumed_run_does_not_need_its_source(source, config, tmp_path):
    """With frozen layers, which the optimizer's state leaves out."""
    copy, whole = tmp_path / "source", tmp_path / "whole"
    shutil.copytree(source, copy)
    config = override(
        config,
        [
            f"--config.init_from={copy}",
            "--config.num_epochs=2",
            "--config.optimizer.freeze=('Conv_*',)",
        ],
    )
    _, expected = train_and_evaluate(config, whole)
    with pytest.raises(Killed):
        train_and_evaluate(config, tmp_path / "run", writers=[kill_at(28)])
    shutil.rmtree(copy)
    _, result = train_and_evaluate(config, tmp_path / "run")
    assert result["digest"] == expected["digest"]
    assert result["init_from"] == expected["init_from"]
    _, again = train_and_evaluate(config, tmp_path / "run")
    assert again == result


def test_statistics_come_along_and_the_same_classes_keep_their_head(tmp_path, capsys, digits):
    flags = ["model.name=dct_cnn", "model.features=(4,)", "model.patch_features=3",
             "model.patch_size=2", "num_epochs=1", "batch_size=480"]  # fmt: skip
    config = override(short_config(), [f"--config.{flag}" for flag in flags])
    train_and_evaluate(config, tmp_path / "a")
    config.init_from = str(tmp_path / "a")
    config.dataset.normalization = "standardize"
    capsys.readouterr()
    train_and_evaluate(config, tmp_path / "b")
    out = capsys.readouterr().out
    assert "new layers" not in out
    assert "with another dataset.normalization: scale -> standardize\n" in out
    step = steps_in(tmp_path / "a")[-1]
    before = weights(CheckpointManager(tmp_path / "a" / "checkpoints").read(step)[0])
    after = weights(CheckpointManager(tmp_path / "b" / "checkpoints").read(0)[0])
    assert any("batch_stats" in path for path in before)
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_an_optimizer_that_copies_the_parameters_copies_the_transferred_ones(
    source, config, tmp_path
):
    """Lookahead has slow weights, which would pull the fast ones back to the fresh ones."""

    def copying():
        return optax.GradientTransformation(
            lambda params: jax.tree.map(jax.numpy.array, params),
            lambda updates, state, params=None: (
                jax.tree.map(jax.numpy.zeros_like, updates),
                state,
            ),
        )

    state, _ = train_and_evaluate(config, tmp_path / "run", tx=copying())
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_head_that_is_new_and_frozen_is_noted(source, config, tmp_path, capsys):
    config.optimizer.freeze = ("Dense_1",)
    train_and_evaluate(config, tmp_path / "run")
    assert "note: new and frozen, so never trained: Dense_1\n" in capsys.readouterr().out


@pytest.fixture
def refused(config, tmp_path, capsys):
    """Checks that a run is refused before anything is written."""

    def check(*flags, telling, init_from=None, workdir="target"):
        flags = [f"--config.{flag}" for flag in flags]
        flags += [f"--config.init_from={init_from}"] if init_from is not None else []
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(UserError) as error:
            train_and_evaluate(override(config, flags), tmp_path / workdir)
        assert telling in str(error.value)
        assert len(str(error.value)) < 1200
        assert "new layers" not in capsys.readouterr().out
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (
            ["model.features=(4, 9)"],
            "params/Conv_1/bias: float32[8] -> float32[9]; params/Conv_1/kernel: float32[3, 3, 4, "
            "8] -> float32[3, 3, 4, 9]; params/Dense_0/kernel: float32[32, 16] -> float32[36, 16];",
        ),
        (["model.features=(4,)"], "params/Conv_1/bias: float32[8] -> nothing; "),
        (["model.features=(4, 8, 8)"], "params/Conv_2/bias: nothing -> float32[8]; "),
        (["model.hidden_features=0"], "-> nothing; choose the same model and image size"),
        (["model.hidden_features=17"], "params/Dense_1/kernel: float32[16, 5] -> float32[17, 10]"),
        (["model.features=()"], " and 1 more; choose the same model and image size"),
    ],
)
def test_another_network_is_refused_with_the_first_leaves(refused, flags, telling):
    refused(*flags, telling=telling)


def test_what_is_no_run_is_refused(refused, source, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, telling in (
        ("none", "none does not exist; give the run directory"),
        ("file", "file is not a folder"),
        ("empty", "empty is not a run directory; give a folder with config.json"),
        ("begun", "begun holds no checkpoint"),
        ("target", "is the run directory of this run"),
        ("x" * 5000, "does not exist"),
    ):
        refused(init_from=tmp_path / name, telling=telling)
    refused(init_from=source / "checkpoints", telling="is not a run directory")


def test_a_damaged_source_is_refused(refused, source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints" / str(steps_in(source)[-1])
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused(init_from=tmp_path / "copy", telling="is damaged: ")


def test_a_finished_run_is_not_its_own_source(source, digits):
    config = override(short_config(), [f"--config.init_from={source}"])
    with pytest.raises(UserError, match="is the run directory of this run"):
        train_and_evaluate(config, source, dataset=few_classes(digits, 5))


def test_a_run_that_has_begun_does_not_look_at_its_source(source, config, tmp_path):
    run = cnn.runtime.run_directory.RunDirectory(source)
    assert find_source(str(tmp_path / "nowhere"), run) is None
    assert find_source("") is None
    assert find_source(str(source)) == source


def test_a_source_that_trains_meanwhile_is_read_again(source, config, tmp_path, monkeypatch):
    """Its newest checkpoint is deleted after it was found, because there are newer ones."""
    steps = iter([3, 14, 14])
    monkeypatch.setattr(CheckpointManager, "latest_step", lambda self: next(steps))
    checked = check_config(config)
    experiment = create_experiment(checked, select_devices("cpu", 1))
    _, origin = transfer(experiment, experiment.initial_state(), source, checked.to_dict())
    assert origin["step"] == 14


SHAPES = {"params/Dense_1/kernel": (16, 5), "params/Dense_1/bias": (5,)}


@pytest.mark.parametrize(
    ("shapes", "classes", "fits"),
    [
        ({"params/Dense_1/kernel": (16, 3), "params/Dense_1/bias": (3,)}, 3, True),
        ({"params/Dense_1/kernel": (16, 3), "params/Dense_1/bias": (3,)}, 4, False),
        ({"params/Dense_1/kernel": (3, 3), "params/Dense_1/bias": (3,)}, 3, False),
        ({"params/Dense_1/kernel": (3, 16), "params/Dense_1/bias": (3,)}, 3, False),
        ({"params/Dense_1/kernel": (16, 3)}, 3, False),
    ],
)
def test_only_the_axis_of_the_classes_may_differ(tmp_path, shapes, classes, fits):
    theirs = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    mine = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    names = "abcdefgh"
    if fits:
        assert fresh_leaves(mine, theirs, names[:5], names[:classes], tmp_path) == sorted(SHAPES)
    else:
        with pytest.raises(UserError, match="has another network"):
            fresh_leaves(mine, theirs, names[:5], names[:classes], tmp_path)
    with pytest.raises(UserError, match="did not record its classes"):
        fresh_leaves(mine, theirs, None, names[:classes], tmp_path)
    assert fresh_leaves(theirs, theirs, None, names[:5], tmp_path) == []


def test_a_kill_before_the_first_checkpoint_reads_the_source_again(
    source, config, tmp_path, monkeypatch
):
    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", kill)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path / "run")
    assert not steps_in(tmp_path / "run")
    _, result = train_and_evaluate(config, tmp_path / "run")
    assert result["init_from"]["step"] == 14
