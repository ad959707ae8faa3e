import importlib.metadata
import json
import os
import shutil
import subprocess

import jax
import pytest

import cnn
from cnn import data_mesh
from cnn.runtime.devices import usable_cores
from cnn.runtime.environment import begun_at, changes, environment


@pytest.fixture
def now():
    return environment(data_mesh(jax.devices()[:2], 8))


def test_it_names_what_bits_depend_on(now):
    assert now == json.loads(json.dumps(now))
    assert now["packages"]["jax"] == jax.__version__
    assert now["devices"] == ["cpu", "cpu"]
    assert now["settings"]["jax_enable_x64"] is False
    assert now["settings"]["jax_default_matmul_precision"] is None
    assert now["processor"]["model"] is not None
    assert changes(now, now) == []


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no /proc")
def test_it_names_the_instructions_of_the_processor(now):
    with open("/proc/cpuinfo") as file:
        has = "avx512f" in file.read()
    assert ("avx512f" in now["processor"]["instructions"].split()) == has


def test_settings_that_change_rounding_are_changes(monkeypatch, now):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_gpu_deterministic_ops=true --xla_a=1")
    with jax.default_matmul_precision("bfloat16"):
        other = environment(data_mesh(jax.devices()[:1], 8))
    before = {**now, "cores": 0, "settings": {**now["settings"], "XLA_FLAGS": ""}}
    assert changes(before, other) == [
        "1 x cpu (was 2 x cpu)",
        f"cores {usable_cores()} (was 0)",
        "jax_default_matmul_precision bfloat16 (was unset)",
        "XLA_FLAGS --xla_a=1 --xla_b=1 (was unset)",
    ]
    assert other["variables"]["XLA_FLAGS"].startswith("--xla_b=1")


@pytest.mark.parametrize("fault", [importlib.metadata.PackageNotFoundError("jax"), KeyError("x")])
def test_a_package_without_metadata(monkeypatch, fault):
    def version(name):
        raise fault

    monkeypatch.setattr(importlib.metadata, "version", version)
    packages = environment(data_mesh(jax.devices()[:1], 8))["packages"]
    assert packages["jax"] == jax.__version__
    assert packages["orbax-checkpoint"] is None


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_the_commit_is_that_of_the_repository_that_holds_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        return environment(data_mesh(jax.devices()[:1], 8))["commit"]

    file = tmp_path / "lib" / "environment.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr("cnn.runtime.environment.__file__", str(file))
    assert commit() is None, "there is no repository"
    git("init")
    git("commit", "--allow-empty", "-m", "one")
    git("tag", "v1")
    assert commit() is None, "the repository does not hold the file"
    git("add", "lib/environment.py")
    git("commit", "-m", "two")
    assert commit() == git("rev-parse", "HEAD")
    file.write_text("edited")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_parts_in_other_environments_are_kept():
    parts = []
    for step, version in [(0, 1), (0, 1), (5, 1), (9, 2), (12, 1)]:
        parts = begun_at(step, {"jax": version}, parts)
    assert parts == [
        {"jax": 1, "starts": [0, 5]},
        {"jax": 2, "starts": [9]},
        {"jax": 1, "starts": [12]},
    ]
    assert begun_at(20, None, parts)[-1] == {"starts": [20]}


def test_an_environment_that_cannot_be_determined_costs_no_result(
    config, tmp_path, monkeypatch, capsys, digits
):
    def fail(mesh):
        raise ValueError("no such processor\nat all")

    monkeypatch.setattr("cnn.resume.environment", fail)
    config.num_epochs = 1
    _, result = cnn.train_and_evaluate(config, tmp_path)
    assert result["num_steps"] == 14
    warning = r"warning: the environment is not recorded (no such processor\nat all)"
    assert capsys.readouterr().err.splitlines().count(warning) == 1
