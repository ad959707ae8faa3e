"""Lists, prepares and shows datasets.

    python -m cnn data list               what can be trained on by its name
    python -m cnn data prepare cifar100   download and prepare it
    python -m cnn data show digits        counts, statistics and a picture
    python -m cnn data show photos/ --image-size 64 --output photos.png

`show` takes a folder that has a folder of pictures per class, or the name of a dataset; a folder
that exists comes first.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
from typing import Any

import numpy as np

from cnn.commands.common import make_folder, output_file, print_json
from cnn.data import Dataset, Split, load_dataset, load_folder
from cnn.data.folder import ON_UNREADABLE
from cnn.data.images import RESIZE
from cnn.data.prepare import PreparedDataset, UnknownDatasetError, list_prepared
from cnn.data.settings import TEST_FRACTION
from cnn.data.sources import data_directory, prepare_dataset
from cnn.errors import UserError, number_of, one_line
from cnn.runtime.cli import ActionParser
from cnn.runtime.disk import describe_disk_error
from cnn.runtime.plots import SAMPLE_COLUMNS, plot_samples
from cnn.runtime.screen import log, shown

_ACTIONS = {
    "list": "what can be trained on by its name, and what is prepared",
    "prepare": "download and prepare a dataset",
    "show": "counts, statistics and a picture of a dataset",
}
_MOST_SAMPLES = 72  # pictures on a sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    commands = parser.add_subparsers(
        dest="action", required=True, metavar="list|prepare|show", parser_class=ActionParser
    )
    listing, prepare, show = (
        commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        for name, what in _ACTIONS.items()
    )
    prepare.add_argument("name", metavar="NAME", help="such as cifar10 or cifar10:3.0.2")
    show.add_argument("name", metavar="NAME|FOLDER", help="a dataset, or a folder of pictures")
    for command in (listing, prepare, show):
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument(
            "--data-dir",
            metavar="DIR",
            help="of TFDS datasets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
        )
    show.add_argument(
        "--image-size",
        type=_image_size,
        default=0,
        metavar="N",
        help='side in pixels, or "(height, width)"; 0 keeps the size (default: 0)',
    )
    show.add_argument("--resize", choices=RESIZE, default=RESIZE[0], help="(default: %(default)s)")
    show.add_argument(
        "--test-fraction",
        type=float,
        default=TEST_FRACTION,
        metavar="X",
        help="of each class, where there is no test split (default: %(default)s)",
    )
    show.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="N",
        help="another one sets other images aside (default: %(default)s)",
    )
    show.add_argument(
        "--on-unreadable",
        choices=ON_UNREADABLE,
        default=ON_UNREADABLE[0],
        help="what to do about pictures that cannot be read (default: %(default)s)",
    )
    show.add_argument(
        "--split", choices=("train", "test"), default="train", help="drawn (default: %(default)s)"
    )
    show.add_argument(
        "--output",
        default="samples.png",
        metavar="FILE",
        help="the picture, a PNG file (default: %(default)s)",
    )


def _image_size(text: str) -> Any:
    """A number or a tuple; what else it is, the check of its value refuses."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def run(arguments: argparse.Namespace) -> None:
    """Does what the first word says."""
    if arguments.action == "list":
        _list(arguments)
    elif arguments.action == "prepare":
        _prepare(arguments)
    else:
        _show(arguments)


def _list(arguments: argparse.Namespace) -> None:
    from cnn.data.builders import BUILDERS

    root = data_directory(arguments.data_dir)
    prepared = list_prepared(root)
    if arguments.json:
        facts = [dataclasses.asdict(dataset) for dataset in prepared]
        print_json({"names": sorted(BUILDERS), "directory": str(root), "prepared": facts})
        return
    log("Without TensorFlow, prepared when they are first used:")
    for name in sorted(BUILDERS):
        log(f"  {name}")
    log(f"Prepared in {root}:")
    for dataset in prepared:
        log(f"  {_described(dataset)}")
    if not prepared:
        log("  none")


def _described(dataset: PreparedDataset) -> str:
    counts = ", ".join(f"{number:,} {split}" for split, number in dataset.counts.items())
    number = dataset.num_classes
    classes = number_of(number, "class", "classes") if number else "no classes"
    return one_line(f"{dataset.name}: {counts}; {classes}; {dataset.num_bytes / 1e6:,.0f} MB")


def _prepare(arguments: argparse.Namespace) -> None:
    prepared = prepare_dataset(arguments.name, arguments.data_dir)
    if arguments.json:
        print_json({"name": arguments.name, "directory": str(prepared)})
    else:
        log(f"{arguments.name} is prepared in {prepared}")


def _show(arguments: argparse.Namespace) -> None:
    target = output_file(arguments.output, ".png")
    dataset = _load(arguments)
    split = dataset.train if arguments.split == "train" else dataset.test
    chosen = _samples(split, dataset.num_classes)
    try:
        make_folder(target.parent)
        plot_samples(
            split.images[chosen],
            split.labels[chosen],
            None,
            dataset.class_names,
            target,
            title=f"{dataset.name}, {arguments.split}",
        )
    except OSError as error:
        raise UserError(
            f"the picture cannot be written: {describe_disk_error(error, target.parent)}"
        ) from error
    facts = _facts(dataset)
    if arguments.json:
        print_json({**facts, "samples": str(target)})
        return
    classes = zip(dataset.class_names, facts["train_counts"], facts["test_counts"], strict=True)
    log(f"name         {one_line(dataset.name)}")
    log(f"images       {'x'.join(map(str, dataset.image_shape))}")
    log(f"mean         {' '.join(f'{value:.4f}' for value in facts['mean'])}")
    log(f"std          {' '.join(f'{value:.4f}' for value in facts['std'])}")
    log(f"fingerprint  {dataset.fingerprint}")
    log(f"samples      {shown(target)}")
    log("   train     test  class")
    for name, train, test in classes:
        log(f"{train:8,} {test:8,}  {one_line(name)}")
    log(f"{len(dataset.train):8,} {len(dataset.test):8,}  all {dataset.num_classes:,} classes")


def _load(arguments: argparse.Namespace) -> Dataset:
    how = {
        "image_size": arguments.image_size,
        "resize": arguments.resize,
        "test_fraction": arguments.test_fraction,
        "split_seed": arguments.split_seed,
    }
    given = arguments.name
    if os.path.isdir(os.path.expanduser(given)) or given.startswith((".", "/", "~")):
        return load_folder(given, **how, on_unreadable=arguments.on_unreadable)
    try:
        return load_dataset(given, arguments.data_dir, **how)
    except UnknownDatasetError as error:
        fault = "is not a folder" if os.path.exists(given) else "is no folder here"
        raise UserError(f"{given} {fault}, and {error}") from error


def _samples(split: Split, num_classes: int) -> np.ndarray:
    """Indices of some images of each class, a class after the other."""
    number = max(1, min(SAMPLE_COLUMNS, _MOST_SAMPLES // num_classes))
    chosen = []
    for label in range(min(num_classes, _MOST_SAMPLES)):
        members = np.flatnonzero(split.labels == label)
        places = np.linspace(0, len(members) - 1, min(number, len(members)))
        chosen.append(members[places.astype(int)])
    return np.concatenate(chosen)


def _facts(dataset: Dataset) -> dict[str, Any]:
    def counts(split: Split) -> list[int]:
        return np.bincount(split.labels, minlength=dataset.num_classes).tolist()

    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "train_counts": counts(dataset.train),
        "test_counts": counts(dataset.test),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "fingerprint": dataset.fingerprint,
    }
