"""Reads what a report says of a run from its directory. Nothing there is changed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import PIL.Image

from cnn.config import SECTIONS
from cnn.errors import UserError, number_of
from cnn.metrics import wilson_interval
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log_warning

_EVALUATION = {"split": str, "tta": str, "step": int, "count": int, "accuracy": float,
               "loss": float, "calibration_error": float, "mean_confidence": float}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `python -m cnn evaluate` found on the test images.

    Attributes:
      figures: of `evaluation.json`.
      logits: `float32[N, K]`.
      labels: `int[N]`.
      confidence: `float[N]`, the probability of the predicted class.
      class_names: by label.
      fingerprint: of the dataset.
      mistakes: the picture `mistakes.png`, if there is one.
    """

    figures: dict[str, Any]
    logits: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    mistakes: bytes | None

    @property
    def predictions(self) -> np.ndarray:
        """The predicted classes, `int[N]`."""
        return self.logits.argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        """Which images were classified correctly, `bool[N]`."""
        return self.predictions == self.labels


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run with at least one record.

    Attributes:
      path: the run directory.
      config: with all fields, as JSON values.
      records: of the epochs, in order.
      result: the final figures; None while the run is not finished.
      environments: in which its parts were trained, in order; empty if that was not recorded.
      dataset: what it was trained on; None if that was not recorded.
      trainer: the process that trains it now, if any.
      evaluation: of the test images, if there is one.
      samples: the picture `samples.png`, if there is one.
    """

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None
    environments: list[dict[str, Any]]
    dataset: dict[str, Any] | None
    trainer: str | None
    evaluation: Evaluation | None
    samples: bytes | None

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last epoch."""
        return self.records[-1]

    @property
    def accuracy(self) -> float:
        """On the test images, after the last epoch so far."""
        return self.last["test_accuracy"]

    @property
    def best(self) -> dict[str, Any]:
        """The record of the epoch with the highest test accuracy, the latest of equal ones."""
        return max(self.records, key=lambda record: (record["test_accuracy"], record["step"]))

    @property
    def num_epochs(self) -> int | float:
        """The epochs of the config; a run that stopped early has fewer."""
        number = self.config["num_epochs"]
        return int(number) if number == int(number) else number

    @property
    def status(self) -> str:
        """`finished`, `running`, or `stopped` before its last epoch."""
        if self.result is not None:
            return "finished"
        return "stopped" if self.trainer is None else "running"

    @property
    def starts(self) -> list[int]:
        """The steps at which a process started to train it: the first, and where it resumed."""
        return [step for part in self.environments for step in part["starts"]]

    def summary(self) -> dict[str, Any]:
        """The headline figures as JSON values, up to the last record of an unfinished run."""
        last, result = self.last, self.result or {}
        count = int(last["test_count"])
        return {
            "run": str(self.path),
            "status": self.status,
            "epoch": last["epoch"],
            "num_epochs": self.num_epochs,
            "test_accuracy": self.accuracy,
            "test_accuracy_interval": list(wilson_interval(round(self.accuracy * count), count)),
            "test_count": count,
            "test_loss": last.get("test_loss"),
            "tta_test_accuracy": result.get("tta_test_accuracy"),
            "tta_test_loss": result.get("tta_test_loss"),
            "stopped_early": result.get("stopped_early"),
            "best_test_accuracy": self.best["test_accuracy"],
            "best_epoch": self.best["epoch"],
            "train_accuracy": last.get("train_accuracy"),
            "train_loss": last.get("train_loss"),
            "num_params": result.get("num_params"),
            "num_steps": last["step"],
            "skipped_steps": sum(record.get("skipped_steps", 0) for record in self.records),
            "seed": self.config["seed"],
            "wall_seconds": result.get("wall_seconds"),
            "digest": result.get("digest"),
            "starts": self.starts,
            "num_environments": len(self.environments),
        }

    @property
    def current_evaluation(self) -> Evaluation | None:
        """The evaluation, if it is of the last record's state."""
        found = self.evaluation
        return found if found and found.figures["step"] == self.last["step"] else None


def _find_runs(path: str) -> list[Path]:
    """The run directories that a path stands for.

    Those of a group are its members that have a result; a warning says how many have none. The path
    of a member without `,seed=N` stands for all members of that point of a sweep.

    Args:
      path: of a run, which is returned as it is; of a group; or of a point,
        GROUP/members/FIELD=VALUE.

    Raises:
      UserError: no member has a result.
    """
    directory = RunDirectory(path)
    members, place = directory.members(), directory.path
    if not members and place.parent.name == "members" and not os.path.exists(place):
        siblings = RunDirectory(place.parent.parent).members()
        members = [one for one in siblings if point_of(one) == place]
    if not members:
        return [place]
    finished = [one for one in members if RunDirectory(one).result() is not None]
    if not finished:
        raise UserError(f"no member of {place} has a result: wait for one, or train on")
    if missing := len(members) - len(finished):
        log_warning(
            f"{missing} of {number_of(len(members), 'member')} of {place} left out: without a "
            f"result, as they diverged or are not finished"
        )
    return finished


def point_of(member: Path) -> Path:
    """The path of a member of a group without the seed.

    >>> point_of(Path("group/members/optimizer.learning_rate=0.1,seed=3")).name
    'optimizer.learning_rate=0.1'
    """
    return member.with_name(member.name.rpartition(",seed=")[0] or member.name)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads runs; a group, or a point of a sweep, stands for its members that have a result.

    Raises:
      UserError: a path is not a run directory, or is given twice; a run has no records; a file is
        damaged; a group has no finished run.
    """
    runs = [run for path in paths for run in _find_runs(path)]
    check_distinct(runs)
    return [_read_run(RunDirectory(run)) for run in runs]


def check_distinct(paths: Iterable[Path]) -> None:
    """Raises UserError if two paths are of the same run."""
    seen: set[Path] = set()
    for path in paths:
        if (place := path.resolve()) in seen:
            raise UserError(f"the run {path} is given twice; give each run once")
        seen.add(place)


def _read_run(directory: RunDirectory) -> Run:
    path = directory.path
    if not path.is_dir():
        fault = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"{path} {fault}; give a run directory, such as checkpoints/baseline")
    if (config := directory.config()) is None:
        inside = next((p for p in path.parents if (p / "config.json").exists()), None)
        hint = f"did you mean {inside}?" if inside else "give the directory that train.py printed"
        raise UserError(f"{path} is not a run directory: it has no config.json; {hint}")
    if not _is_config(config):
        raise UserError(
            f"{path / 'config.json'} is damaged: it is not the config of a run; the command of the "
            f"run writes it again"
        )
    if not (records := directory.records()):
        raise UserError(
            f"{path} has no records yet: its first epoch is not complete; train on, and report then"
        )
    for record in records:
        if not _is_complete(record):
            raise UserError(
                f"{path / 'metrics.jsonl'} has no test accuracy at step {record['step']}, or no "
                f"number for another metric: it is damaged, or not of this version of cnn"
            )
    return Run(
        path=path,
        config=config,
        records=records,
        result=_checked_result(directory),
        environments=_checked_environments(directory),
        dataset=directory.dataset(),
        trainer=directory.trainer(),
        evaluation=_read_evaluation(path),
        samples=_read_picture(path / "samples.png", "python train.py with the run's flags"),
    )


def _is_config(config: dict[str, Any]) -> bool:
    return (
        _is_number(config.get("num_epochs"))
        and isinstance(config.get("seed"), int)
        and all(isinstance(config.get(name, {}), dict) for name in SECTIONS)
    )


def _is_complete(record: dict[str, Any]) -> bool:
    accuracy, count = record.get("test_accuracy"), record.get("test_count")
    metrics = [v for name, v in record.items() if name.startswith(("train_", "test_"))]
    return (
        _is_number(accuracy)
        and 0 <= accuracy <= 1
        and _is_number(count)
        and count >= 1
        # Other metrics may be NaN.
        and all(isinstance(value, int | float) for value in metrics)
        and isinstance(record.get("skipped_steps", 0), int)
    )


def _checked_result(directory: RunDirectory) -> dict[str, Any] | None:
    result = directory.result()
    numbers = ("num_params", "num_steps", "wall_seconds")
    if result is not None and not all(_is_number(result.get(name)) for name in numbers):
        raise UserError(
            f"{directory.path / 'result.json'} is damaged: it lacks one of {', '.join(numbers)}; "
            f"delete it, and the command of the run writes it again"
        )
    return result


def _checked_environments(directory: RunDirectory) -> list[dict[str, Any]]:
    parts = directory.environments()
    mappings = ("packages", "processor", "settings", "variables")
    for part in parts:
        if (
            not isinstance(part, dict)
            or not isinstance(part.get("starts"), list)
            or not all(isinstance(step, int) for step in part["starts"])
            or not all(isinstance(part.get(name) or {}, dict) for name in mappings)
            or not all(isinstance(part.get(name) or [], list) for name in ("devices", "command"))
        ):
            raise UserError(
                f"{directory.path / 'environment.json'} is damaged; delete it, and the page says "
                f"that the environment was not recorded"
            )
    return parts


def _read_evaluation(run: Path) -> Evaluation | None:
    folder = run / "evaluation" / "test"
    remedy = f"python -m cnn evaluate {run}"
    if not (folder / "evaluation.json").exists():
        return None
    figures = _read_figures(folder / "evaluation.json", remedy)
    arrays = _read_arrays(folder / "predictions.npz", remedy)
    confidence = _read_confidence(folder / "predictions.csv", remedy)
    if not len(arrays["labels"]) == len(confidence) == figures["count"]:
        raise UserError(f"the files in {folder} do not belong together; {remedy} writes them again")
    return Evaluation(
        figures=figures,
        logits=arrays["logits"],
        labels=arrays["labels"],
        confidence=confidence,
        class_names=tuple(map(str, arrays["class_names"])),
        fingerprint=str(arrays["fingerprint"]),
        mistakes=_read_picture(folder / "mistakes.png", remedy),
    )


def _damaged(path: Path, remedy: str) -> UserError:
    return UserError(f"{path} is damaged or missing; {remedy} writes it again")


def _read_figures(path: Path, remedy: str) -> dict[str, Any]:
    try:
        figures = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, remedy) from error
    if not isinstance(figures, dict) or not all(
        isinstance(figures.get(name), kind) for name, kind in _EVALUATION.items()
    ):
        raise _damaged(path, remedy)
    return figures


def _read_arrays(path: Path, remedy: str) -> Mapping[str, np.ndarray]:
    names = ("logits", "labels", "class_names", "fingerprint")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, remedy) from error
    logits, labels = arrays["logits"], arrays["labels"]
    classes = arrays["class_names"].size
    if (
        logits.shape != (labels.size, classes)
        or not (len(labels) and np.issubdtype(labels.dtype, np.integer))
        or not 0 <= labels.min() <= labels.max() < classes
    ):
        raise _damaged(path, remedy)
    return arrays


def _read_confidence(path: Path, remedy: str) -> np.ndarray:
    """The column of probabilities: the loss of the run, on which they depend, may be a script's."""
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        confidence = np.array([float(row["confidence"]) for row in rows])
    except (FileNotFoundError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _damaged(path, remedy) from error
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise _damaged(path, remedy)
    return confidence


def _read_picture(path: Path, remedy: str) -> bytes | None:
    if not path.exists():
        return None
    picture = path.read_bytes()
    try:
        with PIL.Image.open(io.BytesIO(picture), formats=("PNG",)) as image:
            image.load()
    except Exception as error:  # of any kind, where the bytes are at random
        raise UserError(f"{path} is damaged; delete it, and {remedy} draws it again") from error
    return picture


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
