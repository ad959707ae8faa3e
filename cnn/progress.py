"""What a person sees while a run goes on."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from cnn.metrics import Metrics
from cnn.plan import Plan
from cnn.summary import model_summary

_PLAIN_SECONDS = 10.0
_LIVE_SECONDS = 0.2


def say(line: str) -> None:
    """Prints a line to standard output, above a live bar if there is one; never fails."""
    _print(line, sys.stdout)


def warn(line: str) -> None:
    """Prints a line to standard error, above a live bar if there is one; never fails."""
    _print(f"warning: {line}", sys.stderr)


def _print(line: str, stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # full, or closed
        if stream is not None:
            tqdm.write(line, file=stream)
            stream.flush()


class Progress:
    """Epoch, step, loss, accuracy, images/s and time left, while training.

    On a terminal one line that is redrawn; elsewhere a plain line every ten seconds.

    Args:
      num_epochs: of the whole run.
      steps_per_epoch: optimizer steps.
      batch_size: images per step.
      start_step: where this process takes up the run.
    """

    def __init__(
        self, *, num_epochs: int, steps_per_epoch: int, batch_size: int, start_step: int
    ) -> None:
        self._num_epochs = num_epochs
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._period = _LIVE_SECONDS if self._live else _PLAIN_SECONDS
        self._start_step = self._step = start_step
        self._start_time = self._shown = time.monotonic()
        self._bar = tqdm(
            total=num_epochs * steps_per_epoch,
            initial=start_step,
            bar_format="{bar:12} {desc}",
            disable=not self._live,
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def due(self) -> bool:
        """Whether it is time to show something: asking is cheap, fetching metrics is not."""
        return time.monotonic() - self._shown >= self._period

    def show(self, step: int, metrics: Metrics) -> None:
        """Shows where the run is.

        Args:
          step: steps done of the whole run.
          metrics: of the epoch so far, on the host.
        """
        self._shown = now = time.monotonic()
        if not metrics.count:
            return  # every step so far was skipped
        rate = (step - self._start_step) / max(now - self._start_time, 1e-9)
        total = self._num_epochs * self._steps_per_epoch
        left = (total - step) / rate if rate else math.inf
        epoch = (step - 1) // self._steps_per_epoch
        where = (
            f"epoch {epoch + 1}/{self._num_epochs}  "
            f"step {step - epoch * self._steps_per_epoch:,}/{self._steps_per_epoch:,}"
        )
        what = (
            f"loss {metrics.loss:.4f}  accuracy {_percent(float(metrics.accuracy))}  "
            f"{rate * self._batch_size:,.0f} images/s  ETA {duration(left)}"
        )
        if self._live:
            self._bar.set_description_str(f"{where}  {what}", refresh=False)
            self._bar.update(step - self._step)
            self._bar.refresh()
        else:
            say(f"{where}  {what}")
        self._step = step


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(59.6), duration(3599), duration(7325)
    ('1:00', '59:59', '2:02:05')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def epoch_line(record: Mapping[str, Any], *, num_epochs: int) -> str:
    """One finished epoch in words."""
    parts = (
        f"{part}: loss {record[f'{part}_loss']:.4f}, {_percent(record[f'{part}_accuracy'])} right"
        for part in ("train", "test")
    )
    skipped = record["skipped_steps"]
    return (
        f"epoch {record['epoch']}/{num_epochs}  {'  '.join(parts)} "
        f"of {record['test_count']:,}  ({record['images_per_second']:,.0f} images/s"
        f"{f'; {skipped:,} steps were not finite, and skipped' if skipped else ''})"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def result_line(result: Mapping[str, Any]) -> str:
    """A finished run in words."""
    return (
        f"test accuracy {_percent(result['test_accuracy'])} of {result['test_count']:,} images "
        f"(best {_percent(result['best_test_accuracy'])}, epoch {result['best_epoch']}) "
        f"in {duration(result['wall_seconds'])}"
    )


def describe(plan: Plan, variables: Any, num_devices: int) -> str:
    """What is about to be trained: data, devices, layers.

    Args:
      plan: of the run.
      variables: the model's, parameters and all.
      num_devices: how many devices there are; the plan's mesh may use fewer.
    """
    data, used, batch_size = plan.dataset, plan.mesh.size, plan.config.batch_size
    height, width, channels = data.image_shape
    kind = plan.mesh.devices.flat[0].device_kind
    lines = [
        f"data: {data.name}, {len(data.train):,} train and {len(data.test):,} test images of "
        f"{height}x{width}x{channels}, {data.num_classes} classes",
        f"devices: {used} x {kind}, {batch_size // used} images each per step",
    ]
    if used < num_devices:
        lines.append(
            f"note: batch_size={batch_size} does not divide evenly over {num_devices} devices; "
            f"{num_devices - used} stay idle"
        )
    return "\n".join([*lines, model_summary(plan.model, variables, data.image_shape)])
