import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from cnn import UserError, data_mesh, limit_in_flight, select_devices


@pytest.mark.parametrize(
    ("batch_size", "available", "used"), [(32, 4, 4), (30, 4, 3), (7, 4, 1), (2, 4, 2), (33, 2, 1)]
)
def test_the_mesh_takes_the_most_devices_that_divide_the_batch(batch_size, available, used):
    assert data_mesh(jax.devices()[:available], batch_size).size == used


def test_a_limit_on_devices():
    assert len(select_devices("cpu", 3)) == 3


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_missing_platform_is_an_error_and_never_the_cpu(platform):
    with pytest.raises(UserError, match=f"platform={platform}: JAX finds no {platform.upper()}"):
        select_devices(platform)


def test_an_unknown_platform():
    with pytest.raises(UserError, match="unknown platform 'npu'; known: auto, cpu"):
        select_devices("npu")


def in_new_process(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


COUNT = "import jax, os, cnn; cnn.use_all_cpu_cores(); print(len(jax.devices()) "


def test_each_core_is_a_device():
    assert in_new_process(COUNT + "== len(os.sched_getaffinity(0)))") == "True"


@pytest.mark.parametrize(
    "variables",
    [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}],
)
def test_the_users_own_setting_stands(variables):
    assert in_new_process(COUNT + ")", **variables) == "3"


FLAG = "--xla_gpu_deterministic_ops"
DETERMINISTIC = (
    "import os, cnn; cnn.select_devices(deterministic=True); print(os.environ['XLA_FLAGS']); "
    "cnn.select_devices(deterministic=True)"
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{FLAG}=true"),
        (f"{FLAG}=false", f"{FLAG}=false"),
        ("--xla_cpu_enable_fast_math=false", f"--xla_cpu_enable_fast_math=false {FLAG}=true"),
    ],
)
def test_deterministic_asks_xla_before_it_starts(before, after):
    assert in_new_process(DETERMINISTIC, XLA_FLAGS=before) == after


def test_flags_may_be_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=false\n")
    flags = in_new_process(DETERMINISTIC, XLA_FLAGS=str(tmp_path / "flags"))
    assert flags == f"--xla_cpu_enable_fast_math=false {FLAG}=true"


def test_deterministic_too_late_is_an_error_on_a_gpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert jax.devices()  # from here on XLA does not look at its flags
    select_devices("cpu", deterministic=True)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(platform="gpu")])
    select_devices("gpu")
    with pytest.raises(UserError, match=rf"XLA_FLAGS={FLAG}=true, or set deterministic=False"):
        select_devices("gpu", deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=true")
    select_devices("gpu", deterministic=True)


def test_stay_close_waits_for_the_older_results(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    results = [jnp.full((), i) for i in range(20)]
    limit_in_flight(results[:8])
    assert waited == []
    limit_in_flight(results)
    assert [int(result) for result in waited] == [11]
