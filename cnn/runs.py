"""A run from the opening of its directory to its result, without the loop in between."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from cnn.config import to_json_dict
from cnn.errors import UserError
from cnn.evaluation import evaluate
from cnn.experiment import Experiment, describe
from cnn.ledger import Ledger
from cnn.losses import evaluation_loss
from cnn.metrics import Metrics
from cnn.results import final_result
from cnn.resume import check_same_config, environments_of_parts, restore
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.disk import describe_disk_error, is_disk_error
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, waiting, width
from cnn.runtime.writers import Writer, require_tensorboard
from cnn.steps import TrainState
from cnn.transfer import find_source, transfer


@dataclasses.dataclass
class Run:
    """A run that is fresh, restored, or finished.

    Attributes:
      experiment: what stays the same.
      directory: where its files go.
      checkpoints: where its states go.
      state: the latest.
      ledger: what it writes while it trains.
      result: what `result.json` holds; None while it is not finished.
      is_new: whether this process has finished it.
    """

    experiment: Experiment
    directory: RunDirectory
    checkpoints: CheckpointManager
    state: TrainState
    ledger: Ledger
    result: dict[str, Any] | None
    origin: Any
    started: float
    is_new: bool = False

    def begin(self) -> None:
        """Writes the first files of this process's part, and copies the images to the devices."""
        self.ledger.begin(self.state)
        pipeline = self.experiment.pipeline
        with waiting("copying the images to the devices"):
            jax.block_until_ready((pipeline.train, pipeline.test))

    def test(self, tta: str = "none") -> Metrics:
        """Scores the test images by the loss without label smoothing."""
        return evaluate(
            self.state.replace(loss_fn=evaluation_loss(self.experiment.loss_fn)),
            self.experiment.pipeline.test,
            batch_size=self.experiment.config.runtime.eval_batch_size,
            tta=tta,
        )

    def finish(self) -> dict[str, Any]:
        """Waits for the last checkpoint, and writes the result."""
        with waiting("saving the last checkpoint"):
            self.checkpoints.wait_until_finished()
        augmented: dict[str, Any] = {}
        if (tta := self.experiment.config.evaluation.tta) != "none":
            with waiting("evaluating with test-time augmentation"):
                means = self.test(tta).means()
            augmented = {f"tta_test_{name}": value for name, value in means.items()}
        seconds = time.monotonic() - self.started
        result = final_result(self.state, self.experiment, self.ledger.records, seconds)
        result |= augmented
        result |= {"init_from": self.origin} if self.experiment.config.init_from else {}
        self.directory.write("result.json", result)
        self.result, self.is_new = result, True
        return result


@contextlib.contextmanager
def open_run(
    config: Any,
    workdir: str | os.PathLike[str],
    create: Callable[[], Experiment],
    *,
    described: Mapping[str, Any],
    writers: Sequence[Writer] = (),
    announces: bool = True,
) -> Iterator[Run]:
    """Opens a run directory, and restores the latest state.

    Within it, settings of JAX are those of a run, and no other process trains in the directory.

    Args:
      config: of the run, checked.
      workdir: the run directory.
      create: makes the experiment; called when config and directory fit each other.
      described: what a script passes to `create_experiment`, from `describe_given`.
      writers: of the records.
      announces: whether data, devices and layers are printed.

    Raises:
      UserError: as for `train_and_evaluate`.
    """
    started = time.monotonic()
    with RunDirectory(workdir) as run, pinned_settings(), explained_disk_errors(run):
        if run.is_group:
            raise UserError(
                f"{run.path} holds a group of runs; choose another --workdir, or train more of "
                f"them with num_seeds and sweep"
            )
        finished = run.check()
        if config.runtime.tensorboard:
            require_tensorboard()
        source = find_source(config.init_from, run)
        recorded = {**to_json_dict(config), **described}
        check_same_config(run, recorded)  # before the data is loaded
        experiment = create()
        with compilation_cache(config.runtime.compilation_cache):
            with waiting("initializing the model"):
                state, origin = experiment.initial_state(), None
            if source is not None:
                state, origin = transfer(experiment, state, source, recorded)
            if announces:
                log(describe(experiment, state.variables, width=width()))
            if finished is None:
                run.lock()
            with CheckpointManager(run.checkpoints) as checkpoints:
                state, saved = restore(experiment, run, checkpoints, state, recorded)
                # A run that stopped early has fewer steps than its config says.
                if finished is not None and int(state.step) != finished.get("num_steps"):
                    finished = None
                if finished is None:
                    run.lock()  # a finished run whose last checkpoint is damaged is trained again
                    run.delete_result()
                    saved |= {"config": recorded, "dataset": experiment.dataset_record}
                    saved.setdefault("init_from", origin)
                    saved["environments"] = environments_of_parts(
                        experiment, int(state.step), saved
                    )
                    started -= saved.get("wall_seconds", 0.0)
                ledger = Ledger(experiment, run, checkpoints, saved, writers, started)
                yield Run(
                    experiment,
                    run,
                    checkpoints,
                    state,
                    ledger,
                    result=finished,
                    origin=saved.get("init_from"),
                    started=started,
                )


@contextlib.contextmanager
def explained_disk_errors(run: RunDirectory) -> Iterator[None]:
    """Turns errors of the disk that holds the run into one line."""
    try:
        yield
    except OSError as error:
        if not is_disk_error(error, run.path):
            raise
        raise UserError(
            f"the run cannot continue: {describe_disk_error(error, run.path)}"
            f"{CheckpointManager(run.checkpoints).resume_hint()}"
        ) from error
