"""The machine of a benchmark: processor, memory, versions; no path and no host name."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "pillow",
    "torch",
    "timm",
    "tensorflow",
    "keras",
)
_VECTOR_UNITS = ("avx512f", "avx2", "avx")


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, load, versions and date."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "vector_unit": _vector_unit(),
        "cores": cores,
        "memory_gib": round(memory, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def sentence(machine: dict[str, Any]) -> str:
    """What `describe` found, as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    unit = f" ({machine['vector_unit']})" if machine["vector_unit"] else ""
    return (
        f"{machine['cores']} cores of {machine['cpu']}{unit}, {machine['memory_gib']:.0f} GiB, "
        f"{machine['system']}; {versions}; {machine['date'][:10]}"
    )


def _cpu_field(name: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _vector_unit() -> str:
    flags = _cpu_field("flags").split()
    return next((unit for unit in _VECTOR_UNITS if unit in flags), "")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    # TensorFlow's CPU build is the distribution tensorflow-cpu.
    found = {}
    for package in packages:
        for distribution in (package, f"{package}-cpu"):
            try:
                found[package] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
    return found
