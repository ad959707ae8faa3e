import errno
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import CNN, Checkpoints, InputError, create_train_state, digest, train_step

SHAPE = (16, 16, 3)


def new_state(seed=0, **fields):
    model = CNN(4, **{"features": (4, 8), "hidden": 16, **fields})
    return create_train_state(model, optax.adam(1e-3), jax.random.key(seed), SHAPE)


BATCH = {"image": jnp.ones((8, *SHAPE)), "label": jnp.arange(8) % 4}


@pytest.fixture(scope="module")
def trained():
    """The states of a short training, by step."""
    step = jax.jit(train_step)
    states = [new_state()]
    for _ in range(4):
        states.append(step(states[-1], BATCH)[0])
    return states


def names(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(trained[3], {"note": [1, 0.1]})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore(new_state(seed=9), 3)
        assert checkpoints.read(3)[1]["note"] == [1, 0.1]
    jax.tree.map(np.testing.assert_array_equal, restored.params, trained[3].params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, trained[3].opt_state)
    assert digest(restored) == digest(trained[3])


@pytest.mark.parametrize("restarts", [False, True])
def test_the_two_latest_and_the_best_are_kept(tmp_path, trained, restarts):
    saves = list(zip(trained, [0.1, 0.9, 0.5, None, 0.0], strict=True))
    for process in [[save] for save in saves] if restarts else [saves]:
        with Checkpoints(tmp_path) as checkpoints:
            for state, accuracy in process:
                checkpoints.save(state, {} if accuracy is None else {"test_accuracy": accuracy})
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, 1)
    assert names(tmp_path) == [1, 3, 4]


def test_two_damaged_ones_are_told_of_and_moved_aside(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        for state, accuracy in zip(trained[1:4], [0.9, 0.1, 0.2], strict=True):
            checkpoints.save(state, {"test_accuracy": accuracy})
    for step in (2, 3):
        (tmp_path / str(step) / "record.json").unlink()
    told = []
    with Checkpoints(tmp_path) as checkpoints:
        restored, record = checkpoints.restore_latest(new_state(seed=9), told.append)
        assert checkpoints.steps() == [1]
        checkpoints.save(trained[3], {})  # in the place of the one that was damaged
    assert digest(restored) == digest(trained[1])
    assert record["test_accuracy"] == 0.9
    assert [line.split(" is damaged")[0] for line in told] == [
        f"checkpoint {tmp_path / str(step)}" for step in (3, 2)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "2.damaged", "3.damaged"}


def test_of_another_model_or_optimizer(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait()
        with pytest.raises(InputError, match="of another model or optimizer") as error:
            checkpoints.restore(new_state(hidden=32), 1)
        assert "params/Dense_0/kernel: float32[32, 16] -> float32[32, 32]" in str(error.value)
        other = create_train_state(
            CNN(4, features=(4, 8), hidden=16), optax.sgd(0.1), jax.random.key(0), SHAPE
        )
        with pytest.raises(InputError, match=r"opt_state/0/count: int32\[\] -> nothing; .* more"):
            checkpoints.restore(other, 1)


class Small(nn.Module):
    """With batch statistics, and quickly compiled."""

    dtype: Any

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Dense(8, dtype=self.dtype)(image.reshape(image.shape[0], -1))
        x = nn.relu(nn.BatchNorm(not train, dtype=self.dtype)(x))
        return nn.Dense(4, dtype=self.dtype)(x).astype(jnp.float32)


OPTIMIZERS = {
    "sgd": {"name": "sgd"},
    "adamw": {"name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0},
    "accumulating": {"name": "adam", "weight_decay": 0.1, "accumulate_steps": 3},
}


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("sgd", jnp.bfloat16), ("adamw", jnp.float32), ("accumulating", jnp.bfloat16)],
)
def test_on_1_2_and_4_devices_and_as_plain_numpy(tmp_path, optimizer, dtype):
    """Saved on each number of devices, restored on each, and read without any model."""
    from cnn import batch_mesh, create_optimizer, replicated, sharded

    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    tx = create_optimizer(learning_rate=schedule, **OPTIMIZERS[optimizer])
    model = Small(dtype)
    meshes = [batch_mesh(jax.devices()[:count], 8) for count in (1, 2, 4)]
    fresh = create_train_state(model, tx, jax.random.key(0), SHAPE)
    for saved_on in meshes:
        state = jax.device_put(fresh, replicated(saved_on))
        batch = jax.device_put(BATCH, sharded(saved_on))
        state, _ = jax.jit(train_step)(state, batch)
        folder = tmp_path / str(saved_on.size)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(state, {})
        for restored_on in meshes:
            target = jax.device_put(fresh, replicated(restored_on))
            restored = Checkpoints(folder).restore(target, 1)
            assert digest(restored) == digest(state)
            for leaf in jax.tree.leaves(restored.params):
                assert len(leaf.sharding.device_set) == restored_on.size
        arrays, _ = Checkpoints(folder).read(1)
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(arrays))
        np.testing.assert_array_equal(
            arrays["params"]["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"]
        )
        np.testing.assert_array_equal(
            arrays["model_state"]["batch_stats"]["BatchNorm_0"]["var"],
            state.model_state["batch_stats"]["BatchNorm_0"]["var"],
        )


def test_what_fails_in_the_background_comes_out(tmp_path, trained, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_and_look(surface):
        with Checkpoints(tmp_path) as others:
            others.save(trained[2], {})
            while surface == "check":
                others.check()
            if surface == "wait":
                others.wait()
            elif surface == "save":
                others.save(trained[3], {})

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait()
        monkeypatch.setattr("cnn.checkpoints.write_manifest", full)
        for surface in ("check", "wait", "save", "the end"):
            with pytest.raises(InputError, match=r"step 2 .* No space left on device") as error:
                save_and_look(surface)
            assert "the same command then goes on from step 1" in str(error.value)
            assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_what_a_killed_process_left_goes(tmp_path, trained):
    """Neither what it was writing nor what it was deleting counts as a step."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
    shutil.copytree(tmp_path / "1", tmp_path / ".saving-2")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / ".deleting-0")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(trained[2], {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_an_older_step_is_not_dropped_silently(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained[3], {})
        with pytest.raises(InputError, match="step 2 is older than step 3"):
            checkpoints.save(trained[2], {})


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").touch()
    with (
        pytest.raises(InputError, match="File exists"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(new_state(), {})


def test_the_caller_may_donate_what_it_saved(tmp_path, trained):
    expected = digest(trained[2])
    step = jax.jit(train_step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, trained[2])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state, _ = step(state, BATCH)
        checkpoints.wait()
        assert digest(checkpoints.restore(new_state(), 2)) == expected


def test_restoring_onto_other_devices(tmp_path, trained):
    from cnn import batch_mesh, replicated

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait()
        mesh = batch_mesh(jax.devices()[:4], 4)
        restored = checkpoints.restore(jax.device_put(new_state(), replicated(mesh)), 1)
    assert len(restored.params["Conv_0"]["kernel"].sharding.device_set) == 4
    assert digest(restored) == digest(trained[1])


def test_the_digest_sees_every_bit(trained):
    state = trained[1]
    kernel = state.params["Dense_1"]["kernel"]
    flipped = np.array(kernel)
    flipped.view(np.uint32)[0, 0] ^= 1
    params = {**state.params, "Dense_1": {**state.params["Dense_1"], "kernel": flipped}}
    assert digest(state.replace(params=params)) != digest(state)
    assert digest(state.replace(params={**params, "Dense_1": state.params["Dense_1"]})) == digest(
        state
    )
    assert digest(state.replace(step=state.step + 1)) != digest(state)
