"""What the bits of a run depend on, apart from its config: versions, devices, settings."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

from cnn.runtime.devices import usable_cores
from cnn.runtime.jax_settings import PINNED

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
# JAX's options that change how numbers are rounded. A run does not change them.
_ROUNDING = (
    "jax_default_matmul_precision",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_disable_most_optimizations",
    "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp",
    "jax_use_direct_linearize",
    "jax_use_shardy_partitioner",
)
# Variables of the libraries below JAX. XLA_FLAGS is separate, as `cnn.runtime.devices` adds to it.
_XLA_FLAGS = "XLA_FLAGS"
_VARIABLES = (
    # The number of threads of a CPU device, which affects rounding; by default one per core.
    "PJRT_NPROC",
    "NPROC",
    "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "TF_CUDNN_DETERMINISTIC",
    "TF_XLA_FLAGS",
)
_OWN_FLAGS = ("--xla_gpu_deterministic_ops=true",)  # set because of the config
# The processor's features that matter to a compiler of numeric code, as Linux names them.
_INSTRUCTIONS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "bf16", "i8mm")
# A difference in one of these fields may change the bits of later steps.
_MATTERS = ("devices", "runtime", "processor", "cores", "packages", "settings", "commit")


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, devices, processor, commit and settings of this process, as JSON values.

    Args:
      mesh: over the devices of the run.
    """
    devices = mesh.devices.ravel()
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": usable_cores(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": devices[0].platform,
        "runtime": backend.get_backend(devices[0].platform).platform_version,
        "devices": [device.device_kind for device in devices],
        "commit": _commit(),
        "command": sys.argv,
        "settings": _settings(),
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("JAX_", "XLA_", "FLAX_")) or name in _VARIABLES
        },
    }


def begun_at(
    step: int, now: dict[str, Any] | None, before: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds the start of this process to the environments in which a run was trained.

    Args:
      step: the step from which this process trains.
      now: `environment` of this process; None if it is unknown.
      before: the result of this function for the previous process, from the checkpoint.

    Returns:
      For each part of the run that was trained in one environment: the fields of `environment`,
      and `starts`, the steps at which a process started in it.
    """
    parts, now = list(before), now or {}
    last = parts[-1] if parts else {}
    if last and {**last, "starts": None} == {**now, "starts": None}:
        starts = last["starts"]
        parts[-1] = {**now, "starts": starts if step in starts[-1:] else [*starts, step]}
    else:
        parts.append({**now, "starts": [step]})
    return parts


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two environments that may change bits, as "name new (was old)".

    Fields that only one of them has are ignored.

    >>> before = {"devices": ["cpu", "cpu"], "packages": {"jax": "0.10.1", "numpy": "2.4"}}
    >>> now = {"devices": ["cpu"], "packages": {"jax": "0.10.2", "numpy": "2.4"}}
    >>> changes(before, now)
    ['1 x cpu (was 2 x cpu)', 'jax 0.10.2 (was 0.10.1)']
    """
    old, new = _flat(before), _flat(now)
    return [
        f"{name} {new[name]} (was {old[name]})".removeprefix("devices ")
        for name in old
        if name in new and old[name] != new[name]
    ]


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in _MATTERS:
        value = environment.get(name)
        if name == "devices" and value:
            values[name] = f"{len(value)} x {value[0]}"
        elif isinstance(value, dict):
            values.update(value)
        elif name in environment:
            values[name] = value
    return {name: "unset" if value in (None, "") else value for name, value in values.items()}


def _settings() -> dict[str, Any]:
    """The settings on which random numbers and rounding depend, as they are during the run."""
    options = {name: getattr(jax.config, name, None) for name in (*PINNED, *_ROUNDING)}
    flags = os.environ.get(_XLA_FLAGS, "").split()
    return {
        **{name: value if _is_json(value) else str(value) for name, value in options.items()},
        _XLA_FLAGS: " ".join(sorted(flag for flag in flags if flag not in _OWN_FLAGS)),
        **{name: os.environ.get(name) for name in _VARIABLES},
    }


def _is_json(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _version(package: str) -> str | None:
    """The version of a package; None if it cannot be determined.

    The metadata may be missing, or belong to a package of another name, such as a nightly build.
    """
    version = None
    with contextlib.suppress(Exception):  # of many kinds, where the metadata is damaged
        version = importlib.metadata.version(package)
    module = sys.modules.get(package.replace("-", "_"))
    return version or getattr(module, "__version__", None)


def _processor() -> dict[str, Any]:
    """`model` and `instructions` of the processor for which XLA compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return {"model": platform.processor() or None, "instructions": None}
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""  # x86; ARM
    numeric = sorted(flag for flag in flags.split() if flag.startswith(_INSTRUCTIONS))
    model = fields.get("model name") or platform.processor() or None
    return {"model": model, "instructions": " ".join(numeric)}


def _commit() -> str | None:
    """The commit of this source tree, with "-dirty" if it was edited; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # Fails if the repository around this file does not hold it: an installed package, say.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
