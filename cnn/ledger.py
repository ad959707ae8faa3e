"""What a run writes while it trains: its records and its checkpoints.

Order at the end of an epoch: append the record, save the checkpoint. So every record that a
checkpoint holds is on disk before it, and a resumed run repeats at most the steps after its
checkpoint, with the same bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from cnn.divergence import DivergenceChecks
from cnn.experiment import Experiment
from cnn.metrics import Metrics, MetricsAccumulator
from cnn.results import epoch_record
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import waiting, warning_on_failure
from cnn.runtime.writers import TensorBoardWriter, Writer
from cnn.steps import TrainState


class Ledger:
    """The records and checkpoints of a run, which is checked for divergence as it is recorded.

    Args:
      experiment: of the run.
      run: where its files go.
      checkpoints: where its states go.
      saved: what a checkpoint holds beside the state; without `records` for a fresh run.
      writers: of the records.
      started: when the run began, on the monotonic clock.

    Attributes:
      records: one for each epoch.
      metrics: of the epoch in which the checkpoint was saved; None at its beginning.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: RunDirectory,
        checkpoints: CheckpointManager,
        saved: dict[str, Any],
        writers: Sequence[Writer],
        started: float,
    ) -> None:
        self.records: list[dict[str, Any]] = list(saved.get("records", []))
        self.metrics = Metrics(**saved["epoch_metrics"]) if "epoch_metrics" in saved else None
        self._experiment, self._run, self._checkpoints = experiment, run, checkpoints
        self._saved, self._started = saved, started
        self._writers = list(writers)
        self._checks = DivergenceChecks(experiment, checkpoints)

    @property
    def best_accuracy(self) -> float:
        """The highest test accuracy so far, as a fraction; 0 without any."""
        return max((record["test_accuracy"] for record in self.records), default=0.0)

    def begin(self, state: TrainState) -> None:
        """Writes the files by which the directory explains itself, before the first step."""
        run, saved = self._run, self._saved
        if "records" not in saved:
            # Step 0 is saved before config.json exists. A directory with a config but without
            # checkpoints has then lost them, and is not taken for a fresh one.
            with waiting("saving the initial state"):
                self._save(state)
                self._checkpoints.wait_until_finished()
        run.begin(saved["config"], self.records)
        run.write("dataset.json", saved["dataset"])
        with warning_on_failure("environment.json is not written"):
            *earlier, now = saved["environments"]
            run.write("environment.json", {**now, "earlier": earlier})
        if self._experiment.config.runtime.tensorboard:
            with warning_on_failure("no records are written for TensorBoard"):
                self._writers.append(TensorBoardWriter(run.path / "tensorboard", self.records))

    def fetch(
        self, state: TrainState, accumulator: MetricsAccumulator, keep_newest: int = 0
    ) -> Metrics:
        """Waits for the metrics of an epoch's steps, and refuses what is not finite."""
        metrics = accumulator.fetch(keep_newest)
        self._checks.check_steps(state, accumulator)
        return metrics

    def save_within_epoch(self, state: TrainState, metrics: Metrics) -> None:
        """Saves a state with the metrics of its epoch so far."""
        self._save(state, epoch_metrics=dataclasses.asdict(metrics))

    def end_epoch(
        self, state: TrainState, metrics: Metrics, tested: Metrics, images_per_second: float
    ) -> dict[str, Any]:
        """Appends the record of an epoch, and saves the state after it.

        Args:
          state: after the epoch.
          metrics: of its steps.
          tested: of all test images.
          images_per_second: trained.
        """
        self._checks.check_epoch(state, metrics, tested)
        record = epoch_record(self._experiment, state, metrics, tested, self.records)
        record["images_per_second"] = images_per_second
        self.records.append(record)
        self._run.append(record)
        self._write(record)
        self._save(state, test_accuracy=record["test_accuracy"])
        return record

    def _save(self, state: TrainState, **about: Any) -> None:
        self._checks.check_weights(state)
        names = ("config", "dataset", "environments", "init_from")
        kept = {name: self._saved[name] for name in names}
        kept |= {"wall_seconds": time.monotonic() - self._started}
        self._checkpoints.save(state, {**kept, "records": self.records, **about})

    def _write(self, record: dict[str, Any]) -> None:
        """Passes a record to the writers; one that fails is dropped with a warning."""
        for writer in list(self._writers):
            name = getattr(writer, "__name__", type(writer).__name__)
            with warning_on_failure(f"the writer {name} gets no more records"):
                self._writers.remove(writer)
                writer(dict(record))  # what a writer changes is its own
                self._writers.append(writer)
