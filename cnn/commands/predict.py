"""Classifies image files with a trained run.

    python -m cnn predict checkpoints/baseline cat.jpg dog.png
    python -m cnn predict checkpoints/baseline photos/ --csv > predictions.csv
    find photos -name '*.jpg' -print0 | python -m cnn predict checkpoints/baseline -

An argument is an image file, a folder (with all image files below it), or - for standard input,
which is one image or a list of paths, one per line or separated by NUL characters. Images may have
any size and colour mode; they are resized as those of the run were. A file that cannot be read is
reported on standard error, the others are classified, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cnn.commands.common import add_run_arguments, add_tta_argument, opened_run
from cnn.data.images import UnreadableImageError, is_image, read_images
from cnn.data.layout import picture_files
from cnn.errors import UserError, number_of, one_line
from cnn.inference import TrainedModel
from cnn.runtime.screen import counted, is_live, log, log_warning, waiting, width
from cnn.runtime.table import percent, shortened

_STDIN = "-"
_STDIN_DESCRIPTOR = 0
_FOR_CLASSES = 44  # columns of a terminal beside the paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_run_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE|FOLDER|-", nargs="+", help="what to classify; - is standard input"
    )
    parser.add_argument(
        "--top-k", default=3, type=int, metavar="K", help="likeliest classes to show (default: 3)"
    )
    add_tta_argument(parser)
    parser.add_argument(
        "--batch-size", default=256, type=int, metavar="N", help="images per call (default: 256)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list, an object per image")
    form.add_argument("--csv", action="store_true", help="print CSV with a header")


def run(arguments: argparse.Namespace) -> int:
    """Classifies the images; the exit code is 1 if one could not be read."""
    for flag in ("top_k", "batch_size"):
        if getattr(arguments, flag) < 1:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}={getattr(arguments, flag)} must be 1 or more")
    sources = list(_sources(arguments.images))
    if not sources:
        raise UserError(f"there is no image file in {', '.join(arguments.images)}")
    with opened_run(arguments) as model:
        top_k = min(arguments.top_k, len(model.class_names))
        kind = _Json if arguments.json else _Csv if arguments.csv else _Table
        writer, failed = kind(top_k, [name for name, _ in sources]), 0
        for name, answer in _classified(model, sources, arguments):
            if isinstance(answer, UnreadableImageError):
                failed += 1
                log_warning(one_line(f"{name} cannot be read: {answer}"))
                writer.failure(name, str(answer))
                continue
            best = np.argsort(-answer, kind="stable")[:top_k]
            writer.row(name, [(model.class_names[i], float(answer[i])) for i in best])
        writer.end()
    if failed:
        log_warning(f"{failed:,} of {number_of(len(sources), 'file')} could not be read")
    return 1 if failed else 0


def _sources(arguments: Sequence[str]) -> Iterator[tuple[str, Path | bytes]]:
    """Name and file of each image, or its bytes if it came through standard input."""
    for argument in arguments:
        if argument == _STDIN:
            content = sys.stdin.buffer.read()
            if is_image(content):
                yield _STDIN, content
                continue
            for path in _listed_paths(content):
                yield path, Path(path)
        elif _is_standard_input(argument):
            raise UserError(f"{argument} is standard input: give - to have it read")
        elif Path(argument).is_dir():
            for path in picture_files(Path(argument)):
                yield str(path), path
        else:
            yield argument, Path(argument)


def _listed_paths(content: bytes) -> list[str]:
    """The paths in a list: separated by NUL characters if it has any, else one per line."""
    if b"\0" in content:
        paths = [os.fsdecode(path) for path in content.removesuffix(b"\0").split(b"\0")]
    else:
        lines = os.fsdecode(content).splitlines()
        paths = list(filter(None, map(str.strip, lines)))
    # Names need not be UTF-8, but what is neither text nor begins with a file is something else.
    if not all(paths) or not (_is_text(content) or os.path.lexists(paths[0])):
        raise UserError(
            "standard input is neither an image nor a list of paths: write one per line, or "
            "separate them by NUL characters"
        )
    return paths


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_standard_input(path: str) -> bool:
    """Whether a path, such as /dev/stdin, names the pipe or terminal of standard input."""
    try:
        status = os.stat(path)
        return not stat.S_ISREG(status.st_mode) and os.path.samestat(
            status, os.fstat(_STDIN_DESCRIPTOR)
        )
    except (OSError, ValueError):  # no such file, standard input is closed, or a NUL in the path
        return False


def _classified(
    model: TrainedModel, sources: list[tuple[str, Path | bytes]], arguments: argparse.Namespace
) -> Iterator[tuple[str, np.ndarray | UnreadableImageError]]:
    """Name and probabilities of each image, or why it could not be read, in order."""
    *size, channels = model.image_shape
    images = read_images(
        [source for _, source in sources],
        size=(size[0], size[1]),
        channels=channels,
        resize=model.dataset["resize"],
    )
    batch: list[tuple[str, np.ndarray | UnreadableImageError]] = []
    with waiting("classifying") as task:
        for (name, _), image in counted(
            zip(sources, images, strict=True), task, len(sources), "images"
        ):
            batch.append((name, image))
            if len(batch) == arguments.batch_size:
                yield from _answers(model, batch, arguments.tta)
                batch = []
        yield from _answers(model, batch, arguments.tta)


def _answers(
    model: TrainedModel, batch: list[tuple[str, np.ndarray | UnreadableImageError]], tta: str
) -> Iterator[tuple[str, np.ndarray | UnreadableImageError]]:
    pixels = [image for _, image in batch if isinstance(image, np.ndarray)]
    answers = iter(model.predict(np.stack(pixels), tta=tta) if pixels else ())
    for name, image in batch:
        yield name, next(answers) if isinstance(image, np.ndarray) else image


Best = list[tuple[str, float]]  # class and probability, the likeliest first


class _Writer(Protocol):
    def __init__(self, top_k: int, names: Sequence[str]) -> None: ...
    def row(self, name: str, best: Best) -> None: ...
    def failure(self, name: str, reason: str) -> None: ...
    def end(self) -> None: ...


class _Table:
    """Columns for people: file, and class and probability of each.

    A terminal gets as many classes as fit beside the end of the path, and one at least.
    """

    def __init__(self, top_k: int, names: Sequence[str]) -> None:
        del top_k
        self._columns = width() if is_live() else None
        most = 40 if self._columns is None else min(max(self._columns - _FOR_CLASSES, 12), 40)
        self._width = min(max(map(len, names)), most)

    def row(self, name: str, best: Best) -> None:
        short = name if len(name) <= self._width else f"...{name[3 - self._width :]}"
        line = one_line(f"{short:<{self._width}}")
        for place, (title, chance) in enumerate(best):
            title, chance = one_line(title), percent(chance)
            if self._columns is not None:
                left = self._columns - len(line) - len(f"   {chance}")
                if place and left < len(title):
                    break
                title = shortened(title, max(left, 1))
            line += f"  {title} {chance}"
        log(line)

    def failure(self, name: str, reason: str) -> None:
        """The warning on standard error says it."""

    def end(self) -> None:
        """Nothing is left."""


class _Csv:
    """A row per image: path, class_1, probability_1, ...; a file that failed has an error only."""

    def __init__(self, top_k: int, names: Sequence[str]) -> None:
        del names
        self._top_k = top_k
        ranks = range(1, top_k + 1)
        columns = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
        self._print(["path", *columns, "error"])

    def row(self, name: str, best: Best) -> None:
        self._print([name, *(x for title, chance in best for x in (title, f"{chance:.6g}")), ""])

    def failure(self, name: str, reason: str) -> None:
        self._print([name, *[""] * (2 * self._top_k), reason])

    def end(self) -> None:
        """Nothing is left."""

    def _print(self, cells: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        sys.stdout.write(line.getvalue())


class _Json:
    """A list with an object per image: path and predictions, or path and error."""

    def __init__(self, top_k: int, names: Sequence[str]) -> None:
        del top_k, names
        self._separator = "["

    def row(self, name: str, best: Best) -> None:
        found = [{"class": title, "probability": chance} for title, chance in best]
        self._print({"path": name, "predictions": found})

    def failure(self, name: str, reason: str) -> None:
        self._print({"path": name, "error": reason})

    def end(self) -> None:
        sys.stdout.write("\n]\n")

    def _print(self, value: dict[str, Any]) -> None:
        sys.stdout.write(f"{self._separator}\n  {json.dumps(value)}")
        self._separator = ","
