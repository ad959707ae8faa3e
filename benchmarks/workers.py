"""Worker processes: how they are started, and how they time what they run.

A worker imports this without JAX, which would count in the memory of other frameworks.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# JAX as one gets it without settings, on the CPU even where there is an accelerator.
JAX_ENV = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": None, "JAX_NUM_CPU_DEVICES": None}
# For --quick, where compiling takes longer than what is compiled.
QUICK_ENV = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
_WARM_STEPS = 2


def command(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this clone in a process of its own."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a worker: this process's own, with this clone first on the path.

    Args:
      changes: variables to set; None unsets one.
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in env.items() if value is not None}


def last_line(text: str) -> str:
    """The line of an error output that names the error."""
    return (text.strip().splitlines() or ["no message"])[-1]


def steps_per_second(run: Callable[[int], None], steps: int) -> float:
    """Times a number of steps, to the end of the last."""
    start = time.perf_counter()
    run(steps)
    return steps / (time.perf_counter() - start)


def warm_up(run: Callable[[int], None]) -> None:
    """Makes the first steps, which compile, wake threads and fill caches."""
    run(_WARM_STEPS)


def calibrate(run: Callable[[int], None], seconds: float) -> float:
    """Steps per second, from a trial that is doubled until it takes a quarter of a sample.

    Args:
      run: makes a number of steps.
      seconds: of a sample.
    """
    warm_up(run)
    steps = 1
    while (rate := steps_per_second(run, steps)) * seconds > 4 * steps:
        steps *= 2
    return rate


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage can report the parent's, from before the exec
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
