"""How much memory this process may still take."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # the limits of a container, where it sees them (version 2)


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not tell (Linux does).

    The limit of a container counts, where there is one.
    """
    known = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        known.append(_fields(_MEMINFO)["MemAvailable:"] * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        # Files that were read count as used, but are dropped when memory is needed.
        known.append(max(limit - used + _fields(_CGROUP / "memory.stat")["inactive_file"], 0))
    return min(known, default=None)


def _fields(file: Path) -> dict[str, int]:
    rows = [line.split() for line in file.read_text().splitlines()]
    return {row[0]: int(row[1]) for row in rows}
