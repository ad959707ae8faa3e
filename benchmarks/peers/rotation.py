"""Runs contenders in processes of their own, one at a time, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from contenders import MATMUL, Contender, matmul

from cnn import UserError

# Thread pools spin for some milliseconds after their last work. Waiting them out before the
# next sample costs no contender anything; a passive wait policy would.
_PAUSE_SECONDS = 0.3
# Two updates show in three losses. After more, Adam's first ones (a sign, whatever the size of a
# gradient) have turned the rounding of gradients near zero into 3e-4 of a loss.
_CHECKED_STEPS = 3
# Of these losses, relative, and of the first logits, relative to the largest. Float32 in another
# order of summation gives 1e-5; another weight layout or reduction, and in the seed's network a
# learning rate 1 % off, gives more than 1e-3.
TOLERANCE = 1e-4
_WORKER = Path(__file__).resolve().parent / "contenders" / "worker.py"


@dataclasses.dataclass
class Series:
    """What one contender did in one row of the table.

    Attributes:
      network: of the row.
      phase: "train" or "infer".
      batch_size: images per step.
      contender: its name.
      group: its group.
      unit: of the rates: images/s, for the matrix product GFLOP/s.
      rates: one per round.
      peak_mib: resident memory of its process after the row's last sample.
    """

    network: str
    phase: str
    batch_size: int
    contender: str
    group: str
    unit: str
    rates: list[float]
    peak_mib: float = 0.0


class WorkerProcess:
    """A contender's process; a context manager, so that none is left behind."""

    def __init__(self, contender: Contender, network: str, batch_size: int) -> None:
        self.contender = contender
        env = {**os.environ, **contender.env}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [
                *(sys.executable, str(_WORKER)),
                *(contender.group, contender.variant, network, str(batch_size)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={name: value for name, value in env.items() if value is not None},
        )

    def __enter__(self) -> WorkerProcess:
        try:
            self._answer()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer.

        Raises:
          UserError: if the worker died, with the last line that it wrote.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["no message"]
        raise UserError(f"contender {self.contender.name} failed: {lines[-1]}")


def check_agreement(answers: dict[str, dict[str, Any]], reference: str) -> float:
    """Whether all contenders compute the same.

    Args:
      answers: contender -> its `logits` and `losses`.
      reference: the contender that the others are held against.

    Returns:
      The largest relative difference of a loss.

    Raises:
      UserError: if one differs by more than `TOLERANCE`, or is not finite.
    """
    largest = 0.0
    for name, answer in answers.items():
        for what in ("logits", "losses"):
            mine, right = np.array(answer[what]), np.array(answers[reference][what])
            scale = np.abs(right).max() if what == "logits" else np.abs(right)
            difference = float(np.max(np.abs(mine - right) / scale))
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{name} computes something else than {reference}: its first {what} differ "
                    f"by {difference:.1e}, more than {TOLERANCE:.0e}; nothing was compared"
                )
            if what == "losses":
                largest = max(largest, difference)
    return largest


def run_block(
    contenders: Sequence[Contender],
    network: str,
    batch_size: int,
    phases: Sequence[str],
    *,
    reference: str,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> list[Series]:
    """Starts fresh workers, checks that they agree, and lets them run in turns.

    Args:
      contenders: who takes part.
      network: which network.
      batch_size: images per step.
      phases: of "train" and "infer".
      reference: the contender that the others must agree with.
      rounds: samples per contender and phase; each round begins with another contender.
      seconds: of a sample.
      log: takes a line of progress.

    Raises:
      UserError: if a contender fails or disagrees.
    """
    with contextlib.ExitStack() as stack:
        log(f"{network}, batch {batch_size}: starting {len(contenders)} processes")
        workers = [
            stack.enter_context(WorkerProcess(contender, network, batch_size))
            for contender in contenders
        ]
        answers = {
            worker.contender.name: worker.ask("check", steps=_CHECKED_STEPS)
            for worker in workers
            if worker.contender.group != MATMUL
        }
        largest = check_agreement(answers, reference)
        log(f"the losses of {_CHECKED_STEPS} steps agree within {largest:.1e}")
        series = []
        for phase in phases:
            taking_part = [worker for worker in workers if phase in worker.contender.phases]
            series += _run_phase(taking_part, network, batch_size, phase, rounds, seconds, log)
        return series


def _run_phase(
    workers: Sequence[WorkerProcess],
    network: str,
    batch_size: int,
    phase: str,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> list[Series]:
    series = {}
    for worker in workers:
        one = worker.contender
        unit = "GFLOP/s" if one.group == MATMUL else "images/s"
        series[one.name] = Series(network, phase, batch_size, one.name, one.group, unit, [])
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in (*workers[first:], *workers[:first]):
            time.sleep(_PAUSE_SECONDS)
            answer = worker.ask("sample", phase=phase, seconds=seconds)
            per_step = matmul.FLOP / 1e9 if worker.contender.group == MATMUL else batch_size
            series[worker.contender.name].rates.append(answer["steps_per_second"] * per_step)
        rates = ", ".join(f"{name} {one.rates[-1]:,.0f}" for name, one in series.items())
        log(f"{network}, {phase}, batch {batch_size}, round {turn + 1}/{rounds}: {rates}")
    for worker in workers:
        series[worker.contender.name].peak_mib = worker.ask("memory")["peak_mib"]
    return list(series.values())
