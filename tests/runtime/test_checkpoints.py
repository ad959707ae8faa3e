import builtins
import errno
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn import CNN, CheckpointManager, UserError, create_train_state, digest, train_step
from cnn.runtime import checkpoints as cnn_checkpoints

SHAPE = (16, 16, 3)


def new_state(seed=0, **fields):
    model = CNN(4, **{"features": (4, 8), "hidden_features": 16, **fields})
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
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(trained[3], {"note": [1, 0.1]})
    with CheckpointManager(tmp_path) as checkpoints:
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
        with CheckpointManager(tmp_path) as checkpoints:
            for state, accuracy in process:
                checkpoints.save(state, {} if accuracy is None else {"test_accuracy": accuracy})
    with CheckpointManager(tmp_path) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, 1)
    assert names(tmp_path) == [1, 3, 4]


def test_two_damaged_ones_are_reported_and_moved_aside(tmp_path, trained):
    with CheckpointManager(tmp_path) as checkpoints:
        for state, accuracy in zip(trained[1:4], [0.9, 0.1, 0.2], strict=True):
            checkpoints.save(state, {"test_accuracy": accuracy})
    for step in (2, 3):
        (tmp_path / str(step) / "record.json").unlink()
    warnings = []
    with CheckpointManager(tmp_path) as checkpoints:
        restored, record = checkpoints.restore_latest(new_state(seed=9), warnings.append)
        assert checkpoints.all_steps() == [1]
        checkpoints.save(trained[3], {})  # in the place of the one that was damaged
    assert digest(restored) == digest(trained[1])
    assert record["test_accuracy"] == 0.9
    assert [line.split(" is damaged")[0] for line in warnings] == [
        f"checkpoint {tmp_path / str(step)}" for step in (3, 2)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "2.damaged", "3.damaged"}


def test_of_another_model_or_optimizer(tmp_path, trained):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait_until_finished()
        with pytest.raises(UserError, match="of another model or optimizer") as error:
            checkpoints.restore(new_state(hidden_features=32), 1)
        assert "params/Dense_0/kernel: float32[32, 16] -> float32[32, 32]" in str(error.value)
        other = create_train_state(
            CNN(4, features=(4, 8), hidden_features=16), optax.sgd(0.1), jax.random.key(0), SHAPE
        )
        with pytest.raises(UserError, match=r"opt_state/0/count: int32\[\] -> nothing; .* more"):
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
    "adamw": {"name": "adamw", "weight_decay": 0.1, "grad_clip_norm": 1.0},
    "accumulating": {"name": "adam", "weight_decay": 0.1, "grad_accumulation_steps": 3},
}


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("sgd", jnp.bfloat16), ("adamw", jnp.float32), ("accumulating", jnp.bfloat16)],
)
def test_on_1_2_and_4_devices_and_as_plain_numpy(tmp_path, optimizer, dtype):
    """Saved on each number of devices, restored on each, and read without any model."""
    from cnn import batch_sharding, create_optimizer, data_mesh, replicated_sharding

    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    tx = create_optimizer(learning_rate=schedule, **OPTIMIZERS[optimizer])
    model = Small(dtype)
    meshes = [data_mesh(jax.devices()[:count], 8) for count in (1, 2, 4)]
    fresh = create_train_state(model, tx, jax.random.key(0), SHAPE)
    for saved_on in meshes:
        state = jax.device_put(fresh, replicated_sharding(saved_on))
        batch = jax.device_put(BATCH, batch_sharding(saved_on))
        state, _ = jax.jit(train_step)(state, batch)
        folder = tmp_path / str(saved_on.size)
        with CheckpointManager(folder) as checkpoints:
            checkpoints.save(state, {})
        for restored_on in meshes:
            target = jax.device_put(fresh, replicated_sharding(restored_on))
            restored = CheckpointManager(folder).restore(target, 1)
            assert digest(restored) == digest(state)
            for leaf in jax.tree.leaves(restored.params):
                assert len(leaf.sharding.device_set) == restored_on.size
        arrays, _ = CheckpointManager(folder).read(1)
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
        with CheckpointManager(tmp_path) as others:
            others.save(trained[2], {})
            while surface == "check":
                others.check_for_errors()
            if surface == "wait":
                others.wait_until_finished()
            elif surface == "save":
                others.save(trained[3], {})

    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait_until_finished()
        monkeypatch.setattr("cnn.runtime.checkpoints.write_checksums", full)
        for surface in ("check", "wait", "save", "the end"):
            with pytest.raises(UserError, match=r"step 2 .* No space left on device") as error:
                save_and_look(surface)
            assert "the same command then resumes from step 1" in str(error.value)
            assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_what_a_killed_process_left_goes(tmp_path, trained):
    """Neither what it was writing nor what it was deleting counts as a step."""
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
    shutil.copytree(tmp_path / "1", tmp_path / ".saving-2")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / ".deleting-0")
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
        checkpoints.save(trained[2], {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_an_older_step_is_not_dropped_silently(tmp_path, trained):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[3], {})
        with pytest.raises(UserError, match="step 2 is older than step 3"):
            checkpoints.save(trained[2], {})


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").touch()
    with (
        pytest.raises(UserError, match="File exists"),
        CheckpointManager(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(new_state(), {})


def test_the_caller_may_donate_what_it_saved(tmp_path, trained):
    expected = digest(trained[2])
    step = jax.jit(train_step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, trained[2])
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state, _ = step(state, BATCH)
        checkpoints.wait_until_finished()
        assert digest(checkpoints.restore(new_state(), 2)) == expected


def test_restoring_onto_other_devices(tmp_path, trained):
    from cnn import data_mesh, replicated_sharding

    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
        checkpoints.wait_until_finished()
        mesh = data_mesh(jax.devices()[:4], 4)
        restored = checkpoints.restore(jax.device_put(new_state(), replicated_sharding(mesh)), 1)
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


# Each has what a library takes for a pattern, an address, an escape or a variable.
PATHS = [
    "sweep[lr=0.1]",
    "a*b?c{d}|e",
    "back\\slash",
    "%41#;,:'\"&$HOME~ \n",
    "gs:/b",
    os.fsdecode(b"\xff\xfe"),
    "\u00fc" * 120,
]


@pytest.mark.parametrize("name", PATHS)
def test_no_path_breaks_a_checkpoint(tmp_path, trained, name, monkeypatch):
    (tmp_path / "tmp [x]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp [x]"))
    folder = tmp_path / name / "run"
    with CheckpointManager(folder) as checkpoints:
        checkpoints.save(trained[1], {"test_accuracy": 0.5})
        checkpoints.save(trained[2], {})
    again = CheckpointManager(folder)
    assert (again.all_steps(), again.best_step()) == ([1, 2], 1)
    assert digest(again.restore(new_state(), 2)) == digest(trained[2])
    (tmp_path / name).rename(tmp_path / "plain")
    assert digest(CheckpointManager(tmp_path / "plain" / "run").read(1)[0]) == digest(trained[1])
    assert {path.name for path in tmp_path.iterdir()} <= {"plain", "tmp [x]", "gs:"}
    links = [os.readlink(path) for path in Path("/tmp").iterdir() if path.is_symlink()]
    assert not [target for target in links if target.startswith(str(tmp_path))]


NAMES = ["a.b", "a/b", "a[0]", "", " ", "\n", "%", "%41", "\u00fc", "..", ".zarray", "0", "x" * 300]
LEAVES = {
    "names": {**dict.fromkeys(NAMES, 1), "a": {"b": 2.5}},
    "integers as keys": {10: jnp.ones(1), 9: jnp.zeros(1)},
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(3, impl="rbg"), (2, 3)),
    "no keys": jax.random.split(jax.random.key(3), 0),
    "empty": jnp.zeros((0, 3), jnp.bfloat16),
    "nothing": (None, jnp.ones(2), (), {}),
    "weak": jnp.asarray(2.0),
    "weak array": jnp.full((2, 3), 2.0),
    "NaNs": jax.lax.bitcast_convert_type(
        jnp.array([0x7FC00001, 0xFFC12345], jnp.uint32), "float32"
    ),
    "numbers": [3, 2.5, True, 1j, np.float32(2), np.array(3.0), np.arange(3, dtype=">i4")],
} | {
    name: jnp.arange(3).astype(name)
    for name in (
        *("bool", "int4", "uint4", "int8", "uint16", "bfloat16", "float16", "complex64"),
        *("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    )
}


def test_every_kind_of_leaf_comes_back(tmp_path, trained):
    state = trained[1].replace(opt_state=LEAVES)
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    arrays, _ = checkpoints.read(1)
    restored = checkpoints.restore(state, 1)
    assert digest(restored) == digest(arrays) == digest(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert type(old) is type(new)
        for name in ("dtype", "weak_type", "committed", "sharding"):
            assert getattr(old, name, None) == getattr(new, name, None)
    read = arrays["opt_state"]
    assert read["names"].keys() == LEAVES["names"].keys()
    assert set(read["integers as keys"]) == {"9", "10"}
    assert read["keys"].dtype == LEAVES["keys"].dtype
    assert read["nothing"][0] is None
    assert read["nothing"][1].tolist() == [1, 1]


def test_the_digest_tells_paths_apart(trained):
    def of(**leaves):
        return digest(trained[1].replace(opt_state=leaves))

    first, second = of(**{"a/b": 1, "a": {"b": 2}}), of(**{"a/b": 2, "a": {"b": 1}})
    assert first != second
    assert of(key=jax.random.key(0)) != of(key=jax.random.key(1))
    assert of(key=jax.random.key(0)) != of(key=jax.random.key_data(jax.random.key(0)))


@pytest.mark.parametrize("leaf", ["text", object(), np.array(["a"]), np.array(0, "M8[s]")])
def test_a_leaf_that_cannot_be_saved_is_named(tmp_path, trained, leaf):
    state = trained[1].replace(opt_state={"odd": leaf})
    for act in (digest, lambda state: CheckpointManager(tmp_path).save(state, {})):
        with pytest.raises(UserError, match="opt_state/odd of the state is "):
            act(state)
    with pytest.raises(UserError, match="the record of step 1 is not JSON"):
        CheckpointManager(tmp_path).save(trained[1], {"odd": object()})


# The reads that outlive the first failed one find no event loop any more; TensorStore prints that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_read_back_does_not_count(tmp_path, trained, monkeypatch):
    """As Orbax lost what was below a path with brackets; the sums then fit what is left."""
    with CheckpointManager(tmp_path) as checkpoints:
        for state, accuracy in zip(trained[:3], [0.9, 0.1, 0.2], strict=True):
            checkpoints.save(state, {"test_accuracy": accuracy})
    before = names(tmp_path)

    from cnn.runtime.checksums import write_checksums

    def lose(pattern, folder):
        for file in (folder / "state").glob(pattern):
            file.unlink()
        write_checksums(folder)

    for pattern in ("manifest.ocdbt", "_METADATA", "d/*"):
        lossy = functools.partial(lose, pattern)
        monkeypatch.setattr("cnn.runtime.checkpoints.write_checksums", lossy)
        with (
            pytest.raises(UserError, match=r"step 3 .* read back and is not .* from step 2"),
            CheckpointManager(tmp_path) as checkpoints,
        ):
            checkpoints.save(trained[3], {"test_accuracy": 1.0})
        assert names(tmp_path) == before == [0, 1, 2]
        assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_version(tmp_path, trained):
    from cnn.runtime.checksums import write_checksums

    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})
    (tmp_path / "1" / "arrays.json").write_text(json.dumps({"format": 3}))
    write_checksums(tmp_path / "1")
    with pytest.raises(UserError, match="saved by another version of cnn"):
        checkpoints.restore_latest(new_state(), print)
    assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_the_digest_of_a_state_is_that_of_earlier_versions(trained):
    """SHA-256 over "path dtype shape", a line feed, and the bytes of each leaf, by path."""
    import hashlib

    sha = hashlib.sha256()
    state = {
        "params": {"b": np.float32([1, 2]), "a": np.zeros((2, 0), np.int8)},
        "step": np.int32(7),
    }
    sha.update(b"params/a int8 (2, 0)\nparams/b float32 (2,)\n" + np.float32([1, 2]).tobytes())
    sha.update(b"step int32 ()\n" + np.int32(7).tobytes())
    assert digest(state) == sha.hexdigest()


@pytest.mark.parametrize("placed", [False, True])
def test_restoring_does_not_compile_the_step_again(tmp_path, placed):
    from cnn import batch_sharding, data_mesh, replicated_sharding

    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)  # has a leaf of weak type
    state = create_train_state(Small(jnp.float32), tx, jax.random.key(0), SHAPE)
    batch = BATCH
    if placed:
        mesh = data_mesh(jax.devices()[:2], 8)
        state, batch = (
            jax.device_put(state, replicated_sharding(mesh)),
            jax.device_put(batch, batch_sharding(mesh)),
        )
    compiled = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    step = jax.jit(train_step)
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    restored = checkpoints.restore(state, 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first, _ = step(state, batch)
        assert compiled
        compiled.clear()
        second, _ = step(restored, batch)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert digest(first) == digest(second)


def everything(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", ["record.json", "SHA256SUMS", "state/_METADATA"])
def test_what_cannot_be_opened_is_no_damage(tmp_path, trained, monkeypatch, number, name):
    with CheckpointManager(tmp_path) as checkpoints:
        for state in trained[1:3]:
            checkpoints.save(state, {"test_accuracy": 0.5})
    before, refused = everything(tmp_path), str(tmp_path / "2" / name)

    def open_(path, *args, _open=open, **kwargs):
        if str(path) == refused:
            raise OSError(number, os.strerror(number), str(path))
        return _open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_)
    checkpoints, warnings = CheckpointManager(tmp_path), []
    for act in (
        lambda: checkpoints.restore_latest(new_state(), warnings.append),
        lambda: checkpoints.read(2),
        checkpoints.best_step,
    ):
        with pytest.raises(UserError) as error:
            act()
        assert f"{refused} ({os.strerror(number)}): nothing was changed" in str(error.value)
        assert "damaged" not in str(error.value)
    assert not warnings
    assert everything(tmp_path) == before
    with checkpoints:  # what may be the best is not deleted
        checkpoints.save(trained[3], {})
        checkpoints.save(trained[4], {})
    assert names(tmp_path) == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_listed(tmp_path, trained, monkeypatch):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(trained[1], {})

    def listdir(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", listdir)
    for act in (checkpoints.all_steps, checkpoints.latest_step, checkpoints.best_step):
        with pytest.raises(UserError, match=r"Permission denied.*make it readable"):
            act()


@pytest.fixture
def meanwhile(monkeypatch):
    """Has something done by another process while a checkpoint is read, once."""

    def patch(act):
        original = cnn_checkpoints.read_arrays

        def read(folder):
            monkeypatch.setattr(cnn_checkpoints, "read_arrays", original)
            act()
            return original(folder)

        monkeypatch.setattr(cnn_checkpoints, "read_arrays", read)

    return patch


def test_a_step_that_is_deleted_while_it_is_read(tmp_path, trained, meanwhile):
    with CheckpointManager(tmp_path) as writer:
        for state in trained[1:3]:
            writer.save(state, {"test_accuracy": 0.5})
        writer.wait_until_finished()
        reader = CheckpointManager(tmp_path)

        def save():
            for state in trained[3:5]:
                writer.save(state, {"test_accuracy": 0.6})
            writer.wait_until_finished()

        meanwhile(save)
        with pytest.raises(UserError, match=r"checkpoint .*/2 is gone"):
            reader.read(2)
        with pytest.raises(UserError, match=r"checkpoint .*/1 is gone"):
            reader.restore(new_state(), 1)
        meanwhile(lambda: shutil.rmtree(tmp_path / "4"))
        restored, _ = reader.restore_latest(new_state(), print)
        assert digest(restored) == digest(trained[3])
        assert reader.best_step() == 3


def test_a_step_that_is_replaced_while_it_is_read(tmp_path, trained, meanwhile):
    with CheckpointManager(tmp_path) as writer:
        writer.save(trained[1], {"which": 1})
        writer.wait_until_finished()
        other = trained[2].replace(step=trained[1].step)

        def save():
            writer.save(other, {"which": 2})
            writer.wait_until_finished()

        meanwhile(save)
        arrays, record = CheckpointManager(tmp_path).read(1)
    assert digest(arrays) == digest(other)
    assert record["which"] == 2


def test_a_reader_moves_nothing(tmp_path, trained):
    with CheckpointManager(tmp_path) as checkpoints:
        for state in trained[1:4]:
            checkpoints.save(state, {"test_accuracy": 0.5})
    (tmp_path / "3" / "record.json").unlink()
    before, warnings = everything(tmp_path), []
    reader = CheckpointManager(tmp_path)
    reader.restore_latest(new_state(), warnings.append)
    assert len(warnings) == 1
    assert (reader.latest_step(), reader.best_step()) == (2, 2)
    assert everything(tmp_path) == before
    with CheckpointManager(tmp_path) as writer:
        writer.restore_latest(new_state(), warnings.append)
        writer.save(trained[3], {"test_accuracy": 0.7})
    assert (reader.latest_step(), reader.best_step()) == (3, 3), "it is whole again"
