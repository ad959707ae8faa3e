"""Runs contenders in worker processes that take turns."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import dialogue, workers
from benchmarks.peers.contenders import matmul
from benchmarks.peers.lineup import MATMUL, REFERENCE, Contender
from cnn import UserError

# Thread pools spin for some milliseconds after their last work. This pause lets them go to sleep
# before the next sample, at no cost to any contender; a passive wait policy would cost some.
_PAUSE_SECONDS = 0.3
# Three losses show two updates. After more, Adam's first updates (the sign of a gradient, whatever
# its size) have turned the rounding of gradients near zero into 3e-4 of a loss. So do two updates
# in bfloat16, into 8 % of a loss between PyTorch and the others (baseline, batch 128).
_CHECKED_STEPS = {"float32": 3, "bfloat16": 2}
# Relative bounds on differences of these losses, and of the first logits, relative to the largest.
# Float32 in another order of summation gives 1e-5. Another weight layout or reduction, and for the
# baseline a learning rate 1 % off, give more than 1e-3. Bfloat16 rounded in other places gives up
# to 7e-3 of the losses and 1.3e-2 of the logits, a learning rate 10 % off 4e-2 of the losses, an
# absent bias 4e-2 of the logits.
TOLERANCE = {
    "float32": {"logits": 1e-4, "losses": 1e-4},
    "bfloat16": {"logits": 3e-2, "losses": 1.5e-2},
}


@dataclasses.dataclass
class Series:
    """The samples of one contender for one row of the table.

    Attributes:
      phase: "train" or "infer".
      batch_size: images per step.
      dtype: of the computation.
      contender: its name.
      unit: of the rates: images/s, or GFLOP/s for the matrix product.
      rates: one per round.
      peak_mib: resident memory of its process after the row's last sample.
    """

    network: str
    phase: str
    batch_size: int
    dtype: str
    contender: str
    group: str
    unit: str
    rates: list[float]
    peak_mib: float = 0.0


class WorkerProcess(dialogue.WorkerProcess):
    """The process of a contender; as a context manager it ends with the block."""

    def __init__(self, contender: Contender, network: str, batch_size: int, dtype: str) -> None:
        self.contender = contender
        self.dtype = dtype
        super().__init__(
            f"contender {contender.name} in {dtype}",
            workers.command(
                "benchmarks.peers.worker",
                *(contender.group, contender.variant, network, batch_size, dtype),
            ),
            workers.environment(contender.env),
        )


def check_agreement(
    answers: dict[str, dict[str, Any]], reference: str, dtype: str = "float32"
) -> float:
    """Checks that all contenders compute the same.

    Args:
      answers: contender -> its `logits` and `losses`.
      reference: the contender that the others are compared with.
      dtype: of their computation.

    Returns:
      The largest relative difference of a loss.

    Raises:
      UserError: a value differs by more than `TOLERANCE`, or is not finite.
    """
    largest = 0.0
    for name, answer in answers.items():
        for what, tolerance in TOLERANCE[dtype].items():
            mine, right = np.array(answer[what]), np.array(answers[reference][what])
            scale = np.abs(right).max() if what == "logits" else np.abs(right)
            difference = float(np.max(np.abs(mine - right) / scale))
            if not difference <= tolerance:
                raise UserError(
                    f"{name} computes something else than {reference} in {dtype}: its first "
                    f"{what} differ by {difference:.1e}, more than {tolerance:.0e}; nothing was "
                    f"compared"
                )
            if what == "losses":
                largest = max(largest, difference)
    return largest


def run_block(
    contenders: Sequence[Contender],
    network: str,
    batch_size: int,
    phases: Sequence[str],
    dtypes: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> list[Series]:
    """Starts workers, checks that they agree, and samples them in turns.

    Args:
      contenders: those that take part, each in a process for each dtype.
      network: of `problem.NETWORKS`.
      batch_size: images per step.
      phases: "train", "infer" or both.
      dtypes: of `problem.DTYPES`.
      rounds: samples per contender and phase; each round starts with another contender.
      seconds: of a sample.
      log: takes a line of progress.

    Raises:
      UserError: a contender fails or disagrees.
    """
    with contextlib.ExitStack() as stack:
        each = [(one, dtype) for dtype in dtypes for one in contenders if dtype in one.dtypes]
        log(f"{network}, batch {batch_size}: starting {len(each)} processes")
        processes = [
            stack.enter_context(WorkerProcess(contender, network, batch_size, dtype))
            for contender, dtype in each
        ]
        for dtype in dtypes:
            answers = {
                worker.contender.name: worker.ask("check", steps=_CHECKED_STEPS[dtype])
                for worker in processes
                if worker.dtype == dtype and worker.contender.group != MATMUL
            }
            reference = REFERENCE if REFERENCE in answers else next(iter(answers))
            largest = check_agreement(answers, reference, dtype)
            steps = _CHECKED_STEPS[dtype]
            log(f"{dtype}: the losses of {steps} steps agree within {largest:.1e}")
        series = []
        for phase in phases:
            taking_part = [worker for worker in processes if phase in worker.contender.phases]
            series += _run_phase(taking_part, network, batch_size, phase, rounds, seconds, log)
        return series


def _run_phase(
    processes: Sequence[WorkerProcess],
    network: str,
    batch_size: int,
    phase: str,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
) -> list[Series]:
    series = []
    for worker in processes:
        one = worker.contender
        unit = "GFLOP/s" if one.group == MATMUL else "images/s"
        row = network, phase, batch_size, worker.dtype
        series.append(Series(*row, one.name, one.group, unit, []))
    for turn in range(rounds):
        first = turn % len(processes)
        both = list(zip(processes, series, strict=True))
        for worker, one in (*both[first:], *both[:first]):
            time.sleep(_PAUSE_SECONDS)
            answer = worker.ask("sample", phase=phase, seconds=seconds)
            per_step = matmul.FLOP / 1e9 if one.group == MATMUL else batch_size
            one.rates.append(answer["steps_per_second"] * per_step)
        rates = ", ".join(f"{one.contender} {one.dtype} {one.rates[-1]:,.0f}" for one in series)
        log(f"{network}, {phase}, batch {batch_size}, round {turn + 1}/{rounds}: {rates}")
    for worker, one in zip(processes, series, strict=True):
        one.peak_mib = worker.ask("memory")["peak_mib"]
    return series
