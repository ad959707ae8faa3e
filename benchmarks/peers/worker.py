"""The process of a contender: reads a command per line, and answers with a line.

    python -m benchmarks.peers.worker GROUP VARIANT NETWORK BATCH_SIZE DTYPE

Commands: {"do": "check", "steps": n}, {"do": "sample", "phase": p, "seconds": t},
{"do": "memory"}. The process ends with its input.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.dialogue import answering, commands
from benchmarks.workers import calibrate, peak_mib, steps_per_second, warm_up

_CHECKED_IMAGES = 32
_MIN_STEPS = 3


def load(group: str, variant: str, network: str, batch_size: int, dtype: str) -> Any:
    """Imports one framework, and builds the program of a contender in it."""
    if group == "matmul":
        from benchmarks.peers.contenders import matmul

        return matmul.Matmul(variant)
    from benchmarks.peers.contenders.problem import make_problem

    problem = make_problem(network, batch_size, dtype)
    if group == "ours":
        from benchmarks.peers.contenders import ours

        return ours.program(problem, variant)
    if group == "textbook":
        from benchmarks.peers.contenders import textbook

        return textbook.program(problem)
    if group == "pytorch":
        from benchmarks.peers.contenders import pytorch

        return pytorch.TorchProgram(problem, variant)
    from benchmarks.peers.contenders import keras_tensorflow

    return keras_tensorflow.KerasProgram(problem, variant)


class Worker:
    """Answers commands about a program, and remembers its rates."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._rates: dict[str, float] = {}

    def check(self, steps: int) -> dict[str, Any]:
        """Logits before training, and the losses of the first steps."""
        self._program.reset()
        logits = self._program.logits()[:_CHECKED_IMAGES]
        return {"logits": logits.tolist(), "losses": self._program.losses(steps)}

    def sample(self, phase: str, seconds: float) -> dict[str, Any]:
        """Steps per second over about `seconds`, from the initial weights."""
        run = self._program.train if phase == "train" else self._program.infer
        self._program.reset()
        if phase not in self._rates:
            self._rates[phase] = calibrate(run, seconds)
        self._program.reset()
        warm_up(run)
        steps = max(_MIN_STEPS, round(seconds * self._rates[phase]))
        self._rates[phase] = steps_per_second(run, steps)
        return {"steps": steps, "steps_per_second": self._rates[phase]}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory so far."""
        return {"peak_mib": peak_mib()}


def main(group: str, variant: str, network: str, batch_size: str, dtype: str) -> None:
    """Serves commands until there are no more."""
    answer = answering()  # what a framework prints goes to standard error
    worker = Worker(load(group, variant, network, int(batch_size), dtype))
    actions = {"check": worker.check, "sample": worker.sample, "memory": worker.memory}
    answer({"ready": True})
    for command in commands():
        answer(actions[command.pop("do")](**command))


if __name__ == "__main__":
    main(*sys.argv[1:])
