import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

import cnn
from cnn.config import config_diff
from cnn.runtime.compile_cache import compilation_cache, prune
from tests.helpers import short_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, where JAX has no other one; compiled programs are forgotten.

    The tests share a cache of JAX's own (see `conftest.py`), which would take precedence.
    """
    own = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    jax.clear_caches()
    yield tmp_path / "cache" / "cnn" / "jax"
    jax.config.update("jax_compilation_cache_dir", own)
    jax_cache.reset_cache()


@pytest.fixture
def events():
    """The names of what JAX's cache does."""
    names = []

    def listen(event, **_):
        if event.startswith("/jax/compilation_cache/cache_"):
            names.append(event.rpartition("_")[2])

    jax.monitoring.register_event_listener(listen)
    yield names
    jax.monitoring.unregister_event_listener(listen)


def triple():
    """Compiles a function afresh, or loads it."""
    return jax.jit(lambda x: 3 * x)(jnp.arange(4)).tolist()


def compile_in_cache():
    jax.clear_caches()
    with compilation_cache(True):
        assert triple() == [0, 3, 6, 9]


def test_what_was_compiled_is_found_again(folder, events):
    compile_in_cache()
    assert set(events) == {"misses"}
    assert len(list(folder.iterdir())) == len(events)
    events.clear()
    compile_in_cache()
    assert set(events) == {"hits"}


def test_afterwards_jax_is_as_before(folder, events):
    settings = jax.config.jax_persistent_cache_min_compile_time_secs
    compile_in_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == settings
    events.clear()
    jax.clear_caches()
    triple()
    assert events == []


def test_a_cache_that_is_not_wanted_is_not_made(folder, events):
    with compilation_cache(False):
        triple()
    assert not folder.exists()
    assert events == []


def test_a_jax_that_prints_an_error_per_entry_keeps_none(folder, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    compile_in_cache()
    assert not folder.exists()


def test_a_path_that_xla_does_not_take(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / os.fsdecode(b"\xff")))
    compile_in_cache()
    assert "its path is not UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_may_go_on_with_or_without_it():
    assert (
        config_diff(
            {"runtime": {"compilation_cache": True}}, {"runtime": {"compilation_cache": False}}
        )
        == []
    )


def test_the_users_own_cache_goes_before(folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compile_in_cache()
    assert list((tmp_path / "own").iterdir())
    assert not folder.exists()


def test_a_damaged_entry_is_compiled_anew_and_replaced(folder, events, capfd):
    compile_in_cache()
    whole = {path: path.stat().st_size for path in folder.iterdir()}
    for path, size in whole.items():
        path.write_bytes(path.read_bytes()[: size // 2])
    events.clear()
    compile_in_cache()
    assert set(events) == {"misses"}
    events.clear()
    compile_in_cache()
    assert set(events) == {"hits"}
    assert whole.keys() == set(folder.iterdir())
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_made_costs_one_line(folder, capsys):
    folder.parent.parent.write_text("a file")
    compile_in_cache()
    line = capsys.readouterr().err
    assert line.startswith(f"warning: compiled programs cannot be cached in {folder} (")
    assert line.count("\n") == 1


def test_entries_that_cannot_be_written_cost_one_line(folder, capsys):
    with compilation_cache(True):
        triple()
        shutil.rmtree(folder)
        jax.clear_caches()
        assert triple() == [0, 3, 6, 9]
    line = capsys.readouterr().err
    assert line.startswith(
        f"warning: compiled programs cannot be cached in {folder} (FileNotFoundError"
    )
    assert line.count("\n") == 1


def test_the_users_own_cache_that_cannot_be_used_costs_one_line(folder, tmp_path, capsys):
    (tmp_path / "own").write_text("a file")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compilation_cache(False):
        triple()
        jax.clear_caches()
        triple()
    line = capsys.readouterr().err
    assert line.startswith(f"warning: compiled programs cannot be cached in {tmp_path / 'own'} (")
    assert line.endswith("(JAX_COMPILATION_CACHE_DIR moves the cache)\n")
    assert line.count("\n") == 1


def test_other_warnings_still_come_through(folder):
    with pytest.warns(UserWarning, match="mind the step"), compilation_cache(True):
        warnings.warn("mind the step", stacklevel=1)


def test_the_oldest_files_make_room(tmp_path):
    (tmp_path / "sub").mkdir()
    for age, name in enumerate(["new", "sub/middle", "old", "oldest"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    prune(tmp_path, 40)
    assert (tmp_path / "oldest").exists()
    prune(tmp_path, 25)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"new", "middle"}


def test_a_run_ends_in_the_same_bits_with_a_cold_a_warm_and_no_cache(
    folder, events, digits, tmp_path
):
    digests, found = [], []
    for name, wanted in [("cold", True), ("warm", True), ("none", False)]:
        jax.clear_caches()
        config = short_config()
        config.num_epochs, config.runtime.num_devices, config.runtime.compilation_cache = (
            1,
            1,
            wanted,
        )
        _, result = cnn.train_and_evaluate(config, tmp_path / name)
        digests.append(result["digest"])
        found.append(set(events))
        events.clear()
    assert digests == [digests[0]] * 3
    assert found == [{"misses"}, {"hits"}, set()]


def test_two_processes_share_one_folder(folder, tmp_path):
    code = (
        "import jax, jax.numpy as jnp\n"
        "from cnn.runtime.compile_cache import compilation_cache\n"
        "with compilation_cache(True):\n"
        "    for size in range(1, 9):\n"
        "        assert jax.jit(lambda x: 3 * x)(jnp.ones(size)).sum() == 3 * size\n"
    )
    variables = {name: value for name, value in os.environ.items() if name[:4] != "JAX_"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], env=variables, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    assert list(folder.iterdir())
