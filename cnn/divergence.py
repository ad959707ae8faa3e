"""Runs that diverge: loss, gradients, parameters or test loss that are not finite."""

from __future__ import annotations

import math

import jax
import numpy as np

from cnn.errors import UserError
from cnn.experiment import Experiment
from cnn.metrics import Metrics, MetricsAccumulator
from cnn.runtime.checkpoints import CheckpointManager
from cnn.steps import TrainState


class DivergenceError(UserError):
    """A loss, gradients or parameters that are not finite ended a run."""


class DivergenceChecks:
    """Checks at the points of a run where the host already reads numbers.

    Each raises a DivergenceError that names the step, the learning rate and the last good
    checkpoint.

    Args:
      experiment: of the run.
      checkpoints: of the run.
    """

    def __init__(self, experiment: Experiment, checkpoints: CheckpointManager) -> None:
        self._experiment = experiment
        self._checkpoints = checkpoints

    def check_steps(self, state: TrainState, accumulator: MetricsAccumulator) -> None:
        """Refuses a step that was not finite, unless such steps are to be skipped."""
        if accumulator.skipped and self._experiment.config.runtime.on_nonfinite == "stop":
            step = accumulator.skipped[0]
            raise self._error(
                f"step {step:,} gave a loss or gradients that are not finite",
                state,
                step,
                "--config.runtime.on_nonfinite=skip leaves such steps out and resumes; else ",
            )

    def check_epoch(self, state: TrainState, trained: Metrics, tested: Metrics) -> None:
        """Refuses an epoch without a finite step, or with a test loss that is not finite."""
        if not trained.count:
            raise self._error("no step of the epoch gave a finite loss and gradients", state)
        if not math.isfinite(tested.loss):
            raise self._error(f"the test loss became {tested.loss}", state)

    def check_weights(self, state: TrainState) -> None:
        """Refuses a state with parameters or statistics that are not finite."""
        weights = jax.tree.leaves(jax.device_get((state.params, state.model_state)))
        if not all(np.isfinite(leaf).all() for leaf in weights):
            step = int(state.step)
            raise self._error(f"the parameters after step {step:,} are not finite", state)

    def _error(
        self, what: str, state: TrainState, step: int | None = None, remedy: str = ""
    ) -> DivergenceError:
        """The error for a step, by default that of the state."""
        self._checkpoints.wait_until_finished()
        step = int(state.step) if step is None else step
        rate = self._experiment.learning_rate(step, state.opt_state)
        at = "" if rate is None else f", at a learning rate of {rate:g}"
        epoch = -(-step // self._experiment.steps_per_epoch)
        return DivergenceError(
            f"{what}{at} in epoch {epoch}; the last good checkpoint is step "
            f"{self._checkpoints.latest_step()}; {remedy}lower the rate, or set "
            f"optimizer.grad_clip_norm or schedule.warmup_epochs, in another --workdir"
        )
