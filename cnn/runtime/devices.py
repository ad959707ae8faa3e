"""Which devices a run uses, and how its arrays lie on them."""

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
Device = Any  # jax.Device, which type checkers take for a variable
# Options of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_FAKE_CPUS_FLAG = "xla_force_host_platform_device_count"
_NUM_CPUS = "jax_num_cpu_devices"
_XLA_FLAGS = "XLA_FLAGS"
_DETERMINISTIC_FLAG = "xla_gpu_deterministic_ops"


def use_all_cpu_cores() -> None:
    """Makes each CPU core this process may use a JAX device, and lets it keep freed memory.

    A batch sharded over the cores trains faster than one device with a thread pool. Call it
    before the first array is made: afterwards, or if `jax_num_cpu_devices` or `XLA_FLAGS` say
    already how many there are, the devices stay as they are. Other platforms are untouched.
    In a loop of your own over several CPU devices, call `limit_in_flight` too.

    The memory of a step's temporary arrays is, with glibc's defaults, given back to the kernel
    after each step and zeroed page by page in the next: a third of the time at batch 128.
    """
    _keep_freed_memory()
    chosen = getattr(jax.config, _NUM_CPUS) > 0
    if chosen or _FAKE_CPUS_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # too late: the backend has started
        jax.config.update(_NUM_CPUS, usable_cores())


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects cpusets and taskset; Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Asks glibc, where that is the C library, to reuse large blocks (`man 3 mallopt`)."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # The heaps of further arenas are too small for such blocks, and would map them anew.
    mallopt(_M_ARENA_MAX, 1)


def select_devices(
    platform: str = "auto", limit: int = 0, *, deterministic: bool = False
) -> list[Device]:
    """The devices of a platform; of the fastest one there is for "auto".

    Args:
      platform: one of `PLATFORMS`.
      limit: take so many at most; 0 takes all.
      deterministic: have XLA take only such kernels on a GPU that give the same bits each time
        (its flag --xla_gpu_deterministic_ops, which `XLA_FLAGS` may set otherwise). CPUs and TPUs
        do by themselves.

    Raises:
      UserError: if the platform is unknown or not there (it never falls back to another one), if
        XLA does not take what `XLA_FLAGS` holds, or if a GPU was in use before it could be made
        deterministic.
    """
    if platform not in PLATFORMS:
        raise UserError(f"unknown platform {platform!r}; known: {', '.join(PLATFORMS)}")
    in_time = _settle_xla_flags(deterministic=deterministic)
    use_all_cpu_cores()
    if platform == "cpu":
        # Keeps a GPU that is there from being started, and its memory from being taken.
        jax.config.update("jax_platforms", "cpu")
    try:
        devices = jax.devices(None if platform == "auto" else platform)
    except (RuntimeError, AssertionError) as error:  # the latter for JAX_PLATFORMS=cuda
        what = "device" if platform == "auto" else platform.upper()
        reason = (str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}").splitlines()[0]
        raise UserError(
            f"platform={platform}: JAX finds no {what} here ({reason}); install the jax build "
            f"for it (see the README) or choose another --config.platform"
        ) from error
    if devices[0].platform == "gpu" and not in_time:
        raise UserError(
            f"deterministic=True comes too late, as JAX uses the GPU already: start it with "
            f"XLA_FLAGS=--{_DETERMINISTIC_FLAG}=true, or set deterministic=False"
        )
    return devices[:limit] if limit else devices


def _settle_xla_flags(*, deterministic: bool) -> bool:
    """Checks `XLA_FLAGS`, and adds XLA's flag for deterministic kernels unless that is set.

    XLA itself ends the process when it meets a flag that it does not know.

    Returns:
      False if kernels should be deterministic, but XLA has read its flags already.

    Raises:
      UserError: if XLA refuses the flags.
    """
    flags = os.environ.get(_XLA_FLAGS, "").strip()
    try:  # to set it again is refused once a backend has started
        jax.config.update(_NUM_CPUS, getattr(jax.config, _NUM_CPUS) + 1)
        jax.config.update(_NUM_CPUS, getattr(jax.config, _NUM_CPUS) - 1)
    except RuntimeError:
        return not deterministic or _DETERMINISTIC_FLAG in flags
    if flags and not flags.startswith("-"):  # the name of a file that holds them
        try:
            flags = " ".join(Path(flags).read_text().split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{_XLA_FLAGS}={flags} is neither flags, which begin with --, nor a file of such "
                f"({error})"
            ) from error
    if flags and (reason := _refusal(flags)):
        raise UserError(f"XLA does not take {_XLA_FLAGS}={flags} ({reason})")
    if deterministic and _DETERMINISTIC_FLAG not in flags:
        flags = f"{flags} --{_DETERMINISTIC_FLAG}=true".strip()
    if flags:
        os.environ[_XLA_FLAGS] = flags
    return True


def _refusal(flags: str) -> str | None:
    """What XLA, started in a process of its own on a CPU, says of flags that it does not take."""
    variables = {**os.environ, _XLA_FLAGS: flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    said = done.stderr.decode(errors="replace").splitlines()
    about = [line.rpartition("] ")[2] for line in said if "flag" in line]
    return about[0] if done.returncode and about else None


def data_mesh(devices: list[Device], batch_size: int) -> Mesh:
    """A one-axis mesh, "batch", over the most devices that divide the batch evenly.

    >>> data_mesh(jax.devices(), batch_size=32).axis_names
    ('batch',)
    """
    count = num_shards(len(devices), batch_size)
    return jax.make_mesh(
        (count,), ("batch",), (jax.sharding.AxisType.Auto,), devices=devices[:count]
    )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, that of the batch, is cut into one piece per device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch"))


def limit_in_flight(results: Sequence[Any], ahead: int = 8) -> None:
    """Waits until at most so many of these results are still being computed.

    A host that dispatches steps without ever waiting gets ahead of its devices. With several
    CPU devices that is a deadlock (seen with jaxlib 0.10.2 on 2 cores): at 32 executions in
    flight a device takes no more, its launcher keeps the thread that another device needs to
    reach the all-reduce, and XLA aborts the process after 40 s. Eight are plenty to keep
    devices busy.

    Args:
      results: of calls in the order of dispatch, any pytree each.
      ahead: how many; fewer where each holds much memory.
    """
    if len(results) > ahead:
        jax.block_until_ready(results[-ahead - 1])
