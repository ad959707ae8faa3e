"""What a person sees while a run trains: the table of its epochs, the live line, the time left."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from cnn.metrics import Metrics
from cnn.runtime import screen
from cnn.runtime.table import epoch_number, epoch_table, loss, percent

_PLAIN_SECONDS = 30.0
_LIVE_SECONDS = 0.2
_ESTIMATE_SECONDS = 2.0  # of training, before the time of the whole run is estimated
_WORTH_ESTIMATING = 10.0  # seconds
# A training step computes a forward pass and two products of its size for the gradients.
_COST_OF_EVALUATION = 1 / 3


class Rows:
    """Prints the rows of a table, and its header above the first and where it changes."""

    def __init__(self) -> None:
        self._header = ""

    def log(self, header: str, row: str) -> None:
        """Prints a row, in which the figure with a star is green."""
        if header != self._header:
            screen.log(screen.styled(header, "bold"))
            self._header = header
        screen.log(re.sub(r"\S+ %\*", lambda mark: screen.styled(mark[0], "green"), row))


class Progress:
    """Prints a row per epoch, and where the run is in between.

    On a terminal one line is redrawn in place; elsewhere a plain line appears every half minute.

    Args:
      num_steps: of the whole run.
      steps_per_epoch: a run may end within an epoch.
      batch_size: images per step.
      test_count: images that are evaluated after each epoch.
      start_step: the step from which this process trains.
      best_accuracy: of the epochs before, a fraction; 0 without any.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        test_count: int,
        start_step: int,
        best_accuracy: float = 0.0,
    ) -> None:
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._evaluation_steps = _COST_OF_EVALUATION * test_count / batch_size
        self._start_step = start_step
        self._best_accuracy = best_accuracy
        self._period = _LIVE_SECONDS if screen.is_live() else _PLAIN_SECONDS
        self._is_estimated = False
        self._rows = Rows()
        self._rate = 0.0  # steps per second
        self._done: set[str] = set()
        self.begin_epoch(start_step)
        self._shown = self._lap_time

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        screen.live("")

    def begin_epoch(self, step: int) -> None:
        """Starts the clock of an epoch, of which nothing but training follows this step."""
        self._epoch_step, self._epoch_time = step, time.monotonic()
        self._lap_step, self._lap_time = self._epoch_step, self._epoch_time

    @contextlib.contextmanager
    def first_time(self, what: str, step: int) -> Iterator[None]:
        """Announces what takes longer when this process does it for the first time.

        It does not count for the speed.

        Args:
          what: such as "compiling the training step".
          step: the number of steps made when it is over.
        """
        if what in self._done:
            yield
            return
        with screen.waiting(what):
            yield
        self._done.add(what)
        self._lap_step, self._lap_time = step, time.monotonic()

    def images_per_second(self, step: int) -> float:
        """Images trained per second of this epoch until a step.

        Without compilation, unless all steps of the epoch came with it.
        """
        since_step, since = self._lap_step, self._lap_time
        if step > since_step:
            self._rate = (step - since_step) / max(time.monotonic() - since, 1e-9)
            return self._rate * self._batch_size
        seconds = max(time.monotonic() - self._epoch_time, 1e-9)
        return (step - self._epoch_step) * self._batch_size / seconds

    def due(self) -> bool:
        """Whether it is time to show something: asking is cheap, fetching metrics is not."""
        return time.monotonic() - self._shown >= self._period or self._may_estimate()

    def _may_estimate(self) -> bool:
        trained = time.monotonic() - self._lap_time
        return not self._is_estimated and trained >= _ESTIMATE_SECONDS

    def show(self, step: int, metrics: Metrics) -> None:
        """Shows where the run is.

        Args:
          step: steps made of the whole run.
          metrics: of the epoch so far, on the host.
        """
        is_timed = step > self._lap_step
        speed = self.images_per_second(step)
        if self._may_estimate():
            self._estimate(step)
        if time.monotonic() - self._shown < self._period:
            return
        self._shown = time.monotonic()
        if not metrics.count or not is_timed:
            return  # every step so far was skipped, or none is timed
        epoch = (step - 1) // self._steps_per_epoch
        part = (step - epoch * self._steps_per_epoch) / self._steps_per_epoch
        # In the order of the line, with their ranks: the least important go first.
        parts = [
            (0, self._title(step)),
            (2, f"{100 * part:.0f} %"),
            (4, f"train loss {loss(float(metrics.loss))}"),
            (3, f"accuracy {percent(float(metrics.accuracy))}"),
            (5, f"{speed:,.0f} images/s"),
            (1, f"{format_duration(self._seconds_left(step))} left"),
        ]
        screen.report(fitted(parts, screen.width()))

    def _title(self, step: int) -> str:
        return f"epoch {(step - 1) // self._steps_per_epoch + 1}/{self._num_epochs}"

    @property
    def _num_epochs(self) -> int:
        """Epochs of the run, the last of which may be a part."""
        return -(-self._num_steps // self._steps_per_epoch)

    def evaluating(self, step: int) -> None:
        """Shows on a terminal that the test images are being evaluated."""
        screen.live(f"{self._title(step)}  evaluating the test images")

    def _seconds_left(self, step: int) -> float:
        """Training and evaluation after this step, at the present rate."""
        if not self._rate:
            return math.inf
        evaluations = self._num_epochs - step // self._steps_per_epoch
        return (self._num_steps - step + evaluations * self._evaluation_steps) / self._rate

    def _estimate(self, step: int) -> None:
        """Prints how long this process trains, from its first step to the last."""
        if not self._rate:
            return
        self._is_estimated = True
        if self._seconds_left(step) >= _WORTH_ESTIMATING:
            epochs = self._num_epochs - self._start_step // self._steps_per_epoch
            seconds = self._seconds_left(self._start_step)
            number = "1 epoch takes" if epochs == 1 else f"{epochs:,} epochs take"
            screen.log(f"estimate: {number} about {format_duration(seconds)}")

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Prints the row of a finished epoch; above the first one, and if it changed, the header.

        Args:
          record: a line of `metrics.jsonl`.
        """
        if not self._is_estimated:
            self._estimate(record["step"])
        is_best = record["test_accuracy"] >= self._best_accuracy
        self._best_accuracy = max(record["test_accuracy"], self._best_accuracy)
        seconds = time.monotonic() - self._epoch_time
        header, row = epoch_table(
            {**record, "seconds": seconds, "is_best": is_best},
            num_epochs=self._num_epochs,
            width=screen.width(),
        )
        screen.live("")
        self._rows.log(header, row)
        if skipped := record["skipped_steps"]:
            steps = record["step"] - self._epoch_step
            screen.log(
                f"note: {skipped:,} of the {max(steps, skipped):,} steps of epoch "
                f"{epoch_number(record['epoch'])} were not finite and were skipped"
            )


def fitted(parts: Sequence[tuple[int, str]], width: int) -> str:
    """The parts of a line that fit a width, joined.

    Where they do not, "train loss" is shortened to "loss", and then the parts of the highest rank
    are left out.

    Args:
      parts: (rank, text), in the order of the line.
      width: the number of characters.

    >>> fitted(((0, "epoch 1/2"), (2, "train loss 1.2000"), (1, "0:05 left")), 33)
    'epoch 1/2  loss 1.2000  0:05 left'
    """
    kept = list(parts)
    if len("  ".join(text for _, text in kept)) > width:
        kept = [(rank, text.removeprefix("train ")) for rank, text in kept]
    while len(line := "  ".join(text for _, text in kept)) > width and len(kept) > 1:
        kept.remove(max(kept))
    return line


def format_duration(seconds: float) -> str:
    """Seconds for people.

    >>> format_duration(59.6), format_duration(3599), format_duration(7325)
    ('1:00', '59:59', '2:02:05')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
