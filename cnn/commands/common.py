"""Flags and steps that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnn.data import Dataset
from cnn.errors import UserError
from cnn.evaluation import TEST_TIME_VIEWS
from cnn.experiment import load_config_dataset
from cnn.inference import TrainedModel, load_run
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.devices import PLATFORMS
from cnn.runtime.disk import resolve_path, write_error
from cnn.runtime.screen import log_warning, waiting


def add_run_arguments(parser: argparse.ArgumentParser, *, platform: str | None = None) -> None:
    """Adds the flags that select a checkpoint of a run and the devices.

    Args:
      parser: of a command.
      platform: the devices of a command that leaves no choice.
    """
    parser.add_argument("run", metavar="RUN", help="a run directory, such as checkpoints/baseline")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best (by test accuracy) or a step (default: latest)",
    )
    if platform is not None:
        parser.set_defaults(platform=platform)
        return
    parser.add_argument(
        "--platform", default="auto", choices=PLATFORMS, help="the devices (default: the fastest)"
    )


def add_tta_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of test-time augmentation."""
    parser.add_argument(
        "--tta",
        default="none",
        choices=TEST_TIME_VIEWS,
        help="test-time augmentation: the mean logits of several views (default: none)",
    )


@contextlib.contextmanager
def opened_run(arguments: argparse.Namespace) -> Iterator[TrainedModel]:
    """The run of `add_run_arguments`; compiled programs are cached within."""
    with compilation_cache(True):
        with waiting("loading the run"):
            run = load_run(arguments.run, arguments.checkpoint, platform=arguments.platform)
        yield run


def run_dataset(run: TrainedModel) -> Dataset:
    """Loads the dataset that a run was trained on.

    Raises:
      UserError: a script passed the dataset, or it cannot be loaded, or it has other classes.
    """
    if "object" in run.config["dataset"]:
        raise UserError(
            f"{run.path} was trained on {run.dataset['name']}, a dataset that a script passed: "
            f"score it there, with cnn.load_run and cnn.evaluate"
        )
    with waiting("loading the data"):
        dataset = load_config_dataset(run.config)
    if dataset.class_names != run.class_names or dataset.image_shape != run.image_shape:
        raise UserError(
            f"{dataset.name} has other classes or another image size now than when {run.path} was "
            f"trained on it"
        )
    if dataset.fingerprint != run.dataset["fingerprint"]:
        log_warning(f"the images of {dataset.name} are not those that the run was trained on")
    return dataset


def output_folder(given: str | Path) -> Path:
    """The folder for results that `--output` or a default names, if files can be written there.

    It is not created yet: `make_folder` does that once there is something to write.

    Raises:
      UserError: nothing can be written there.
    """
    folder = resolve_path(given)
    if (error := write_error(folder)) is not None:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output")
    return folder


def output_file(given: str | Path, *endings: str) -> Path:
    """The file that `--output` or a default names, if it can be written; as `output_folder`.

    Args:
      given: the name.
      *endings: of which the name must have one, such as ".png", in any case.

    Raises:
      UserError: it has another ending, is a folder, or cannot be written.
    """
    file = resolve_path(given)
    if file.suffix.lower() not in endings:
        raise UserError(
            f"--output {given} must be the name of a file that ends in {' or '.join(endings)}"
        )
    if os.path.isdir(file):  # Path's own raises where a name is too long
        raise UserError(f"--output {given} is a folder; give the name of a file in it")
    output_folder(file.parent)
    return file


def make_folder(folder: Path) -> None:
    """Creates a folder for results and its parents, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)


def print_json(value: Any) -> None:
    """Prints a JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
