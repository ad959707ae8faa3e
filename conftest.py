"""Every test and doctest: four fake devices, no broadcasting by accident, a home of its own."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is most of what the tests do, and takes a seventh of the time like this. The XLA of JAX
# 0.12 does not know the second flag.
QUICK = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def compile_quickly():
    """Has XLA take `QUICK` for this process alone: those that tests start compile as a user's do.

    XLA reads its flags once, when the backend starts, and ends the process at one that it does not
    know; so another process tries them first.
    """
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    for flags in (" ".join(QUICK), QUICK[0]):
        tried = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        if subprocess.run(command, env=tried, capture_output=True).returncode == 0:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XLA_FLAGS", flags)
                jax.devices()
            return


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """Keeps datasets and caches of the tests away from the user's."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops the compiled programs of a process that has many.

    Linux gives a process 65,530 mappings. XLA makes several for each program, and dies at the
    limit.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def pytest_configure(config):
    """Compiles each function once for all tests, and for the processes that they start."""
    # Under `nohup ... &` it is ignored, and would be in these processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not is_controller and "XLA_FLAGS" not in os.environ:
        compile_quickly()
    if not hasattr(config, "cache"):  # pytest -p no:cacheprovider
        return
    directory = str(config.cache.mkdir("jax"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
