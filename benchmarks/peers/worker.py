"""A contender's process: reads a command per line, answers a line. Started by `peers.py`.

    python worker.py GROUP VARIANT NETWORK BATCH_SIZE

Commands: {"do": "check", "steps": n}, {"do": "sample", "phase": p, "seconds": t},
{"do": "memory"}. An end of input ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The directory of the package `contenders`, instead of that of this script.
sys.path[0] = str(Path(__file__).resolve().parents[1])

_CHECKED_IMAGES = 32
_WARM_STEPS = 2
_MIN_STEPS = 3


def load(group: str, variant: str, network: str, batch_size: int) -> Any:
    """Imports one framework, and builds a contender's program in it."""
    if group == "matmul":
        from contenders import matmul

        return matmul.Matmul(variant)
    from contenders.problem import make_problem

    problem = make_problem(network, batch_size)
    if group == "ours":
        from contenders import ours

        return ours.program(problem, variant)
    if group == "textbook":
        from contenders import textbook

        return textbook.program(problem)
    if group == "pytorch":
        from contenders import pytorch

        return pytorch.TorchProgram(problem, variant)
    from contenders import keras_tensorflow

    return keras_tensorflow.KerasProgram(problem, variant)


def steps_per_second(run: Callable[[int], None], steps: int) -> float:
    """Times so many steps, to the end of the last."""
    start = time.perf_counter()
    run(steps)
    return steps / (time.perf_counter() - start)


def calibrate(run: Callable[[int], None], seconds: float) -> float:
    """Compiles, then doubles the steps until they take a quarter of a sample."""
    run(_WARM_STEPS)
    steps = 1
    while (rate := steps_per_second(run, steps)) * seconds > 4 * steps:
        steps *= 2
    return rate


class Worker:
    """Keeps a program and the rates seen so far."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._rates: dict[str, float] = {}

    def check(self, steps: int) -> dict[str, Any]:
        """Logits before training and the losses of the first steps."""
        self._program.reset()
        logits = self._program.logits()[:_CHECKED_IMAGES]
        return {"logits": logits.tolist(), "losses": self._program.losses(steps)}

    def sample(self, phase: str, seconds: float) -> dict[str, Any]:
        """Steps per second over about so many seconds, from the initial weights."""
        run = self._program.train if phase == "train" else self._program.infer
        self._program.reset()
        if phase not in self._rates:
            self._rates[phase] = calibrate(run, seconds)
        self._program.reset()
        run(_WARM_STEPS)  # wakes threads and warms caches
        steps = max(_MIN_STEPS, round(seconds * self._rates[phase]))
        self._rates[phase] = steps_per_second(run, steps)
        return {"steps": steps, "steps_per_second": self._rates[phase]}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory so far."""
        return {"peak_mib": peak_mib()}


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage can report the parent's, from before the exec
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(group: str, variant: str, network: str, batch_size: str) -> None:
    """Serves commands until there are no more."""
    # Whatever a framework prints goes to standard error; the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(load(group, variant, network, int(batch_size)))
    actions = {"check": worker.check, "sample": worker.sample, "memory": worker.memory}
    print(json.dumps({"ready": True}), file=channel)
    for line in sys.stdin:
        command = json.loads(line)
        answer = actions[command.pop("do")](**command)
        print(json.dumps(answer), file=channel)


if __name__ == "__main__":
    main(*sys.argv[1:])
