"""What a sitting at an accelerator found, as Markdown and as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.accelerator.peaks import Peak
from benchmarks.accelerator.timed import Part, Timed
from benchmarks.flops import RunFlop
from benchmarks.report import Mean, Spread, table
from benchmarks.speedrun.original import OriginalRun


@dataclasses.dataclass
class Precision:
    """What was measured with one precision.

    Attributes:
      dtype: of the network.
      steps_per_call: of train.py on this device.
      flop: of a run.
      images: that a run trains on.
      cold: the first run, which compiles.
      warm: the runs after it, each with a seed of its own.
      again: the first of `warm` once more.
      parts: of a run.
      lengths: steps in a call -> seconds of an epoch.
    """

    dtype: str
    steps_per_call: int
    flop: RunFlop
    images: int
    cold: Timed | None = None
    warm: list[Timed] = dataclasses.field(default_factory=list)
    again: Timed | None = None
    parts: list[Part] = dataclasses.field(default_factory=list)
    lengths: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a warm run: the median."""
        return Spread.of([run.seconds for run in self.warm]).median

    @property
    def is_repeatable(self) -> bool | None:
        """Whether the same seed gave the same bits twice; None before it ran twice."""
        return None if self.again is None else self.again.digest == self.warm[0].digest


@dataclasses.dataclass
class Sitting:
    """All that was measured.

    Attributes:
      device: what JAX calls it.
      num_devices: of them.
      peak: of one, if it is known.
      data: name of the images.
      has_labels: whether the accuracy means anything.
      precisions: in the order in which they were measured.
      originals: runs of an original script between ours.
      script: its name.
    """

    device: str
    num_devices: int
    peak: Peak | None
    data: str
    has_labels: bool
    precisions: list[Precision] = dataclasses.field(default_factory=list)
    originals: list[OriginalRun] = dataclasses.field(default_factory=list)
    script: str = ""

    def share(self, flop: float, seconds: float) -> str:
        """Achieved TFLOP/s, and the part of the peak if that is known."""
        rate = flop / seconds / 1e12
        text = f"{rate:,.3g}"
        if self.peak is None:
            return text
        return f"{text} ({rate / (self.peak.tflops * self.num_devices):.1%})"


def markdown(sitting: Sitting, line: str, machine: str) -> str:
    """The page.

    Args:
      sitting: so far.
      line: the command.
      machine: the sentence about the machine.
    """
    peak = "its peak is not in benchmarks/accelerator/peaks.py"
    if sitting.peak:
        total = sitting.peak.tflops * sitting.num_devices
        peak = f"bfloat16 peak {total:,.0f} TFLOP/s ({sitting.peak.source})"
    parts = [
        f"`{line}`\n",
        f"{sitting.num_devices} x {sitting.device}, {peak}; {machine}.\n",
        "A run is timed from before the initial weights and the whitening to the end of the last "
        "evaluation with test-time augmentation; the images are on the device before, and no other "
        "evaluation is made. The first run compiles (cold), the others do not (warm).\n",
    ]
    if not sitting.has_labels:
        parts.append(f"Trained on {sitting.data}: accuracy was not measured.\n")
    parts.append(_run_table(sitting) + "\n")
    for one in sitting.precisions:
        if one.parts:
            parts += [f"Where the time of a warm run goes, {one.dtype}:\n"]
            parts += [_part_table(sitting, one) + "\n"]
        if one.lengths:
            parts += [f"Steps in one call, {one.dtype}, an epoch with its batches:\n"]
            parts += [_length_table(one) + "\n"]
    return "\n".join(parts)


def _run_table(sitting: Sitting) -> str:
    head = ["program", "cold, s", "n", "warm, s", "accuracy", "images/s", "TFLOP/s (of peak)"]
    rows = []
    for one in (one for one in sitting.precisions if one.warm):
        same = {None: "-", True: "yes", False: "no"}[one.is_repeatable]
        rows.append(
            [
                f"ours, {one.dtype}",
                f"{one.cold.seconds:,.2f}" if one.cold else "-",
                str(len(one.warm)),
                Spread.of([run.seconds for run in one.warm]).text(3),
                _accuracy([run.accuracy for run in one.warm]) if sitting.has_labels else "-",
                f"{one.images / one.seconds:,.0f}",
                sitting.share(one.flop.total, one.seconds),
                same,
            ]
        )
    if sitting.originals:
        seconds = [run.seconds for run in sitting.originals]
        views = [run.tta_accuracy for run in sitting.originals]
        flop, images = sitting.precisions[0].flop.total, sitting.precisions[0].images
        median = Spread.of(seconds).median
        rows.append(
            [
                sitting.script,
                "-",
                str(len(seconds)),
                Spread.of(seconds).text(3),
                _accuracy(views) if sitting.has_labels else "-",
                f"{images / median:,.0f}",
                sitting.share(flop, median),
                "-",
            ]
        )
    return table([*head, "same bits twice"], rows)


def _accuracy(fractions: Sequence[float]) -> str:
    found = Mean.of(fractions)
    spread = "" if found.std is None else f" ± {100 * found.std:.2f}"
    return f"{100 * found.mean:.2f}{spread} %"


def _part_table(sitting: Sitting, one: Precision) -> str:
    rows = []
    for part in one.parts:
        total = part.seconds * part.count
        rows.append(
            [
                part.name,
                f"{1e3 * part.seconds:,.3f}",
                f"{part.count:,}",
                f"{total:,.3f}",
                f"{total / one.seconds:.1%}",
                sitting.share(part.flop, part.seconds) if part.flop else "-",
            ]
        )
    whole = sum(part.seconds * part.count for part in one.parts if not part.is_detail)
    gap = one.seconds - whole
    share, rate = f"{gap / one.seconds:.1%}", sitting.share(one.flop.total, one.seconds)
    rows.append(["the rest: waiting for the host", "", "", f"{gap:,.3f}", share, "-"])
    rows.append(["warm run", "", "", f"{one.seconds:,.3f}", "100.0%", rate])
    return table(["part", "ms", "times", "s", "of the run", "TFLOP/s (of peak)"], rows)


def _length_table(one: Precision) -> str:
    rows = [
        [
            f"{length}{' (train.py)' if length == one.steps_per_call else ''}",
            f"{1e3 * seconds:,.1f}",
        ]
        for length, seconds in one.lengths.items()
    ]
    return table(["steps in a call", "epoch, ms"], rows)


def record(sitting: Sitting) -> dict[str, Any]:
    """All samples, as JSON values."""
    return dataclasses.asdict(sitting)
