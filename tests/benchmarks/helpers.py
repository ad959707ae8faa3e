"""Processes of the benchmarks."""

import subprocess

from benchmarks import workers


def run_benchmark(name, *flags):
    """Runs a benchmark as a person does; gives the finished process."""
    return subprocess.run(
        workers.command(f"benchmarks.{name}", *flags),
        capture_output=True,
        text=True,
        timeout=240,
        # Compiled as fast as possible: the figures mean nothing here.
        env=workers.environment({"XLA_FLAGS": "--xla_backend_optimization_level=0"}),
    )
