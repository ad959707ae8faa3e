"""Whether and where a run resumes: its config, its latest checkpoint, its environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnn.config import config_diff
from cnn.data import Dataset
from cnn.errors import UserError
from cnn.experiment import Experiment
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.environment import begun_at, changes, environment
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, log_warning, waiting, warning_on_failure
from cnn.steps import TrainState


def check_same_config(run: RunDirectory, config: dict[str, Any], but: Sequence[str] = ()) -> None:
    """Refuses to resume a run of another config.

    Args:
      run: the directory.
      config: with all fields.
      but: sections that are not compared.
    """
    if (before := run.config()) is None:
        return
    kept = ({k: v for k, v in one.items() if k not in but} for one in (before, config))
    if changed := config_diff(*kept):
        raise UserError(
            f"{run.path} holds a run of another config ({'; '.join(changed)}); "
            f"choose another --workdir, or delete that one"
        )


def restore(
    experiment: Experiment,
    run: RunDirectory,
    checkpoints: CheckpointManager,
    state: TrainState,
    config: dict[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """The latest whole checkpoint's state and record; the fresh state and {} before the first."""
    with waiting("restoring the latest checkpoint"):
        restored = checkpoints.restore_latest(state, log_warning)
    if restored is None:
        if run.has_begun:
            raise UserError(
                f"{run.path} holds a run, but {checkpoints.directory} holds no checkpoint of it; "
                f"put the checkpoints back, or choose another --workdir"
            )
        return state, {}
    state, saved = restored
    if changed := config_diff(saved["config"], config):
        raise UserError(
            f"the checkpoints in {run.path} are of another config ({'; '.join(changed)}); choose "
            f"another --workdir"
        )
    dataset = saved["dataset"]  # earlier versions recorded the fingerprint only
    fingerprint = dataset["fingerprint"] if isinstance(dataset, dict) else dataset
    if fingerprint != experiment.dataset.fingerprint:
        raise UserError(
            f"the run was trained on other {experiment.dataset.name} images than those found now; "
            f"restore the data or choose another --workdir"
        )
    return state, saved


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint records of the data that it was trained on."""
    return {"fingerprint": dataset.fingerprint, "class_names": list(dataset.class_names)}


def environments_of_parts(
    experiment: Experiment, step: int, saved: dict[str, Any]
) -> list[dict[str, Any]]:
    """The environments of the run's parts, that of this process last."""
    now, parts = None, saved.get("environments", [])
    with warning_on_failure("the environment is not recorded"):
        now = environment(experiment.mesh)
    if now and parts and (changed := changes(parts[-1], now)):
        log(
            f"note: resuming on {', '.join(changed)}: same state, but later steps may differ by "
            f"rounding"
        )
    if "records" in saved and step < experiment.num_steps:
        log(f"resuming at step {step:,} of {experiment.num_steps:,}")
    return begun_at(step, now, parts)
