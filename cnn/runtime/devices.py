"""The devices of a run, and how its arrays are sharded over them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn.errors import UserError
from cnn.ops.microbatch import num_shards

PLATFORMS = ("auto", "cpu", "gpu", "tpu")
Device = Any  # jax.Device, which is a variable to type checkers
# Options of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_FAKE_CPUS_FLAG = "xla_force_host_platform_device_count"
_NUM_CPUS = "jax_num_cpu_devices"
_XLA_FLAGS = "XLA_FLAGS"
_DETERMINISTIC_FLAG = "xla_gpu_deterministic_ops"


def use_all_cpu_cores() -> None:
    """Makes each CPU core that this process may use a JAX device, and keeps freed memory.

    A batch sharded over the cores trains faster than on one device with a thread pool. Call this
    before creating the first array. After that, or if `jax_num_cpu_devices` or `XLA_FLAGS` already
    set the number of devices, it does not change them. It does not affect other platforms. A
    training loop over several CPU devices must also call `limit_in_flight`.

    By default glibc returns the memory of a step's temporary arrays to the kernel after each step,
    which zeroes it page by page in the next: a third of the time at batch 128.
    """
    _keep_freed_memory()
    chosen = getattr(jax.config, _NUM_CPUS) > 0
    if chosen or _FAKE_CPUS_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # too late: the backend has started
        jax.config.update(_NUM_CPUS, usable_cores())


def usable_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects cpusets and taskset; Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Makes glibc, if it is the C library, reuse large blocks (`man 3 mallopt`)."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never: a step of a large batch frees more than an int says
    # The heaps of other arenas are too small for such blocks, and would map them each time.
    mallopt(_M_ARENA_MAX, 1)


def select_devices(
    platform: str = "auto", limit: int = 0, *, deterministic: bool = False
) -> list[Device]:
    """Returns the devices of a platform, and never those of another.

    Args:
      platform: one of `PLATFORMS`; "auto" selects the fastest available platform.
      limit: the largest number of devices; 0 for all.
      deterministic: whether XLA may use only GPU kernels that give the same bits each time (its
        flag --xla_gpu_deterministic_ops, if `XLA_FLAGS` does not set it). CPUs and TPUs always do.

    Raises:
      UserError: the platform is unknown or not available, or XLA rejects `XLA_FLAGS`, or a GPU was
        in use before it could be made deterministic.
    """
    if platform not in PLATFORMS:
        raise UserError(f"unknown platform {platform!r}; known: {', '.join(PLATFORMS)}")
    in_time = _settle_xla_flags(deterministic=deterministic)
    use_all_cpu_cores()
    if platform == "cpu":
        # Otherwise JAX starts a GPU as well, and reserves its memory.
        jax.config.update("jax_platforms", "cpu")
    try:
        devices = jax.devices(None if platform == "auto" else platform)
    except (RuntimeError, AssertionError) as error:  # the latter for JAX_PLATFORMS=cuda
        what = "device" if platform == "auto" else platform.upper()
        reason = (str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}").splitlines()[0]
        raise UserError(
            f"platform={platform}: JAX finds no {what} here ({reason}); install the jax build "
            f"for it (see the README) or choose another --config.runtime.platform"
        ) from error
    if devices[0].platform == "gpu" and not in_time:
        raise UserError(
            f"deterministic=True comes too late, as JAX uses the GPU already: start it with "
            f"XLA_FLAGS=--{_DETERMINISTIC_FLAG}=true, or set deterministic=False"
        )
    return devices[:limit] if limit else devices


def _settle_xla_flags(*, deterministic: bool) -> bool:
    """Checks `XLA_FLAGS`, and adds XLA's flag for deterministic kernels unless it is set.

    Without this check XLA ends the process at a flag that it does not know.

    Returns:
      False if kernels should be deterministic, but XLA has already read its flags.

    Raises:
      UserError: XLA rejects the flags.
    """
    flags = os.environ.get(_XLA_FLAGS, "").strip()
    # No public function says whether a backend has started. This option does: JAX rejects
    # a new value for it from then on. So set another value, and the old one again.
    try:
        jax.config.update(_NUM_CPUS, getattr(jax.config, _NUM_CPUS) + 1)
        jax.config.update(_NUM_CPUS, getattr(jax.config, _NUM_CPUS) - 1)
    except RuntimeError:
        return not deterministic or _DETERMINISTIC_FLAG in flags
    if flags and not flags.startswith("-"):  # the name of a file with flags
        try:
            flags = " ".join(Path(flags).read_text().split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{_XLA_FLAGS}={flags} is neither a list of flags, which begin with --, nor a file "
                f"with flags ({error})"
            ) from error
    if flags and (reason := _refusal(flags)):
        raise UserError(f"XLA rejects {_XLA_FLAGS}={flags} ({reason})")
    if deterministic and _DETERMINISTIC_FLAG not in flags:
        flags = f"{flags} --{_DETERMINISTIC_FLAG}=true".strip()
    if flags:
        os.environ[_XLA_FLAGS] = flags
    return True


def _refusal(flags: str) -> str | None:
    """XLA's message if it rejects the flags, from a new process on a CPU."""
    variables = {**os.environ, _XLA_FLAGS: flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stderr.decode(errors="replace").splitlines()
    messages = [line.rpartition("] ")[2] for line in lines if "flag" in line]
    return messages[0] if done.returncode and messages else None


def data_mesh(devices: list[Device], batch_size: int) -> Mesh:
    """A mesh with one axis, "batch", over the largest number of devices that divides the batch.

    >>> data_mesh(jax.devices(), batch_size=32).axis_names
    ('batch',)
    """
    count = num_shards(len(devices), batch_size)
    return jax.make_mesh(
        (count,), ("batch",), (jax.sharding.AxisType.Auto,), devices=devices[:count]
    )


def is_on_cpu(mesh: Mesh) -> bool:
    """Whether the devices are those of a CPU."""
    return mesh.devices.flat[0].platform == "cpu"


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding by which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding that splits one axis, that of the batch, over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch"))


def limit_in_flight(results: Sequence[Any], ahead: int = 8) -> None:
    """Waits until at most `ahead` of the results are still being computed.

    A host that dispatches steps without waiting gets ahead of its devices. With several CPU devices
    that is a deadlock (observed with jaxlib 0.10.2 on 2 cores): with 32 executions in flight a
    device accepts no more, its launcher blocks the thread that another device needs to reach the
    all-reduce, and XLA aborts the process after 40 s. Eight suffice to keep the devices busy.

    Args:
      results: a pytree for each call, in the order of dispatch.
      ahead: the number of results; choose fewer if each needs much memory.
    """
    if len(results) > ahead:
        jax.block_until_ready(results[-ahead - 1])
