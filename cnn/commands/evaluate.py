"""Scores a run on all images of a split.

    python -m cnn evaluate checkpoints/baseline
    python -m cnn evaluate checkpoints/baseline --tta flip --checkpoint best --json

It prints accuracy with its 95 % interval, loss, precision, recall and F1 of each class, the
confusion matrix and the calibration error. It writes evaluation.json, predictions.csv,
predictions.npz, confusion.png, reliability.png and mistakes.png to a folder: see --output.
For a folder of pictures predictions.csv names the file of each image: grep ',0$' predictions.csv
lists those that are classified wrongly.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn.commands.common import (
    add_run_arguments,
    add_tta_argument,
    make_folder,
    opened_run,
    output_folder,
    print_json,
    run_dataset,
)
from cnn.data import Split
from cnn.errors import UserError
from cnn.inference import TrainedModel
from cnn.losses import probabilities
from cnn.metrics import wilson_interval
from cnn.runtime.disk import atomic_write
from cnn.runtime.plots import plot_confusion, plot_reliability, plot_samples
from cnn.runtime.screen import log, shown, waiting, warning_on_failure, width
from cnn.runtime.table import loss, percent, shortened
from cnn.scores import (
    Calibration,
    calibration,
    class_scores,
    confusion_matrix,
    most_confident_mistakes,
    top_k_accuracy,
)

_FILES = (
    "evaluation.json",
    "predictions.csv",
    "predictions.npz",
    "confusion.png",
    "reliability.png",
    "mistakes.png",
)
_NUM_MISTAKES = 24
_LEAST_NAME = 12  # characters of the names in a table that are kept on a narrow screen
_MOST_CONFUSED = 10  # pairs of classes, where the matrix does not fit the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_run_arguments(parser)
    parser.add_argument(
        "--split", default="test", choices=("test", "train"), help="(default: test)"
    )
    add_tta_argument(parser)
    parser.add_argument(
        "--top-k",
        default=5,
        type=int,
        metavar="K",
        help="also count the label among the K likeliest classes (default: 5)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="for the files (default: RUN/evaluation/SPLIT, with -CHECKPOINT and -TTA if given)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Scores the run, prints the figures and writes the files."""
    with opened_run(arguments) as model:
        if arguments.top_k < 1:
            raise UserError(f"--top-k={arguments.top_k} must be 1 or more")
        default = _default_output(model, arguments)
        folder = output_folder(default if arguments.output is None else arguments.output)
        split: Split = getattr(run_dataset(model), arguments.split)
        with waiting(f"classifying {len(split):,} images"):
            logits = model.logits(split.images, tta=arguments.tta)
        about = {"split": arguments.split, "tta": arguments.tta}
        figures, confusion, reliability = evaluation(model, split, logits, arguments.top_k)
        figures = {**about, **figures}
        _write(folder, model, figures, split, logits)
        with waiting("drawing the pictures"):
            _draw(folder, model, figures, split, logits, confusion, reliability)
    if arguments.json:
        print_json(figures)
    else:
        log(_text(figures, confusion, folder))


def _default_output(model: TrainedModel, arguments: argparse.Namespace) -> Path:
    """A folder for each split, checkpoint and augmentation, so that none replaces another's."""
    parts = [arguments.split]
    parts += [str(arguments.checkpoint)] if arguments.checkpoint != "latest" else []
    parts += [arguments.tta] if arguments.tta != "none" else []
    return model.path / "evaluation" / "-".join(parts)


def evaluation(
    model: TrainedModel, split: Split, logits: np.ndarray, top_k: int
) -> tuple[dict[str, Any], np.ndarray, Calibration]:
    """The figures of `evaluation.json`, the confusion matrix and the calibration.

    Args:
      model: made the logits.
      split: the images and their labels.
      logits: `float32[N, K]`.
      top_k: is reduced to the number of classes.
    """
    names, labels = model.class_names, split.labels
    top_k = min(top_k, len(names))
    predictions = logits.argmax(-1)
    correct = predictions == labels
    confidence = _confidence(model, logits)
    confusion = confusion_matrix(labels, predictions, len(names))
    reliability = calibration(confidence, correct)
    low, high = wilson_interval(int(correct.sum()), len(labels))
    scores = class_scores(confusion)
    losses = model.state.loss_fn(jnp.asarray(logits), jnp.asarray(labels))
    figures = {
        "run": str(model.path),
        "step": model.step,
        "dataset": model.dataset["name"],
        "count": len(labels),
        "accuracy": float(correct.mean()),
        "accuracy_interval": [low, high],
        "loss": float(np.asarray(jax.device_get(losses), np.float64).mean()),
        f"top{top_k}_accuracy": top_k_accuracy(logits, labels, top_k),
        "calibration_error": reliability.error,
        "mean_confidence": float(confidence.mean(dtype=np.float64)),
        "classes": [
            {
                "name": name,
                "count": int(confusion[index].sum()),
                **{score: float(values[index]) for score, values in scores.items()},
            }
            for index, name in enumerate(names)
        ],
        "confusion": confusion.tolist(),
    }
    return figures, confusion, reliability


def _confidence(model: TrainedModel, logits: np.ndarray) -> np.ndarray:
    """The probability of the predicted class, `float32[N]`."""
    return np.asarray(probabilities(model.state.loss_fn, jnp.asarray(logits)).max(-1))


def _write(
    folder: Path,
    model: TrainedModel,
    figures: Mapping[str, Any],
    split: Split,
    logits: np.ndarray,
) -> None:
    """Writes the figures and the predictions, each file by one rename.

    The files of an older evaluation are removed before, `evaluation.json` first, and the new
    `evaluation.json` is the last: where it is, all others beside it belong to it.
    """
    names, predictions = model.class_names, logits.argmax(-1)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    paths = {} if split.paths is None else {"path": split.paths}
    rows.writerow(("index", *paths, "label", "prediction", "confidence", "correct"))
    for index, (label, prediction, confidence) in enumerate(
        zip(split.labels.tolist(), predictions.tolist(), _confidence(model, logits), strict=True)
    ):
        cells = (names[label], names[prediction], f"{confidence:.6g}", int(label == prediction))
        rows.writerow((index, *(values[index] for values in paths.values()), *cells))
    make_folder(folder)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    with atomic_write(folder / "predictions.csv") as stream:
        # A name that is not UTF-8 is escaped, so that the file is.
        stream.write(table.getvalue().encode(errors="backslashreplace"))
    arrays: dict[str, Any] = {
        "logits": logits,
        "labels": split.labels,
        "class_names": np.array(names),
        "fingerprint": np.array(model.dataset["fingerprint"]),
        **{f"{column}s": np.array(values) for column, values in paths.items()},
    }
    with atomic_write(folder / "predictions.npz") as stream:
        np.savez(stream, **arrays)
    with atomic_write(folder / "evaluation.json") as stream:
        stream.write(f"{json.dumps(figures, indent=2)}\n".encode())


def _draw(
    folder: Path,
    model: TrainedModel,
    figures: Mapping[str, Any],
    split: Split,
    logits: np.ndarray,
    confusion: np.ndarray,
    reliability: Calibration,
) -> None:
    """Draws the pictures; one that fails is a warning."""
    names, predictions = model.class_names, logits.argmax(-1)
    title = f"{model.path.name} on {figures['dataset']}, {figures['split']} images"
    with warning_on_failure("confusion.png is not drawn"):
        plot_confusion(confusion, names, folder / "confusion.png", title=title)
    with warning_on_failure("reliability.png is not drawn"):
        error = f"{title}: calibration error {percent(reliability.error)}"
        plot_reliability(reliability, folder / "reliability.png", title=error)
    confidence = _confidence(model, logits)
    worst = most_confident_mistakes(confidence, predictions == split.labels, _NUM_MISTAKES)
    if not len(worst):
        return
    with warning_on_failure("mistakes.png is not drawn"):
        plot_samples(
            split.images[worst],
            split.labels[worst],
            predictions[worst],
            names,
            folder / "mistakes.png",
            title=f"{title}: the most confident mistakes",
            confidence=confidence[worst],
        )


def _text(figures: Mapping[str, Any], confusion: np.ndarray, folder: Path) -> str:
    """The figures for people."""
    low, high = figures["accuracy_interval"]
    top_k = next(name for name in figures if name.startswith("top"))
    tta = "" if figures["tta"] == "none" else f", test-time augmentation {figures['tta']}"
    lines = [
        f"{shown(Path(figures['run']))}, step {figures['step']:,}: {figures['count']:,} "
        f"{figures['split']} images of {figures['dataset']}{tta}",
        f"  accuracy: {percent(figures['accuracy'])}, 95 % interval {100 * low:.2f} to "
        f"{percent(high)} (Wilson score)",
        f"  loss: {loss(figures['loss'])}",
        f"  {top_k.replace('top', 'top-').replace('_', ' ')}: {percent(figures[top_k])}",
        f"  mean confidence: {percent(figures['mean_confidence'])}; calibration error: "
        f"{percent(figures['calibration_error'])} (ECE, 15 bins)",
        "",
        *_class_table(figures["classes"]),
        "",
        *_confusion_text([row["name"] for row in figures["classes"]], confusion),
        "",
        f"see {shown(folder)}: {', '.join(name for name in _FILES if (folder / name).exists())}",
    ]
    return "\n".join(lines)


def _class_table(classes: list[dict[str, Any]]) -> list[str]:
    """A row for each class; a narrow screen gets shorter names and fewer columns."""
    columns = {"images": 9, "precision": 11, "recall": 11, "F1": 11}  # with the gap before each
    size = min(max(len("class"), *(len(row["name"]) for row in classes)), 30)
    while 2 + min(size, _LEAST_NAME) + sum(columns.values()) > width() and len(columns) > 1:
        del columns[next(iter(columns))]
    size = max(min(size, width() - 2 - sum(columns.values())), len("class"))
    header = "".join(f"{name:>{columns[name]}}" for name in columns)
    lines = [f"  {'class':<{size}}{header}"]
    for row in classes:
        cells = {"images": f"{row['count']:,}"}
        cells |= {name: percent(row[name.lower()]) for name in columns if name != "images"}
        texts = "".join(f"{cells[name]:>{columns[name]}}" for name in columns)
        lines.append(f"  {shortened(row['name'], size):<{size}}{texts}")
    return lines


def _confusion_text(names: list[str], confusion: np.ndarray) -> list[str]:
    """The matrix, with numbers for long names; if it does not fit, the pairs confused most often.

    Args:
      names: of the classes.
      confusion: from `confusion_matrix`.
    """
    matrix = _matrix(names, names, confusion)
    if matrix is None and max(map(len, names)) > len(f"{len(names)}"):
        digits = len(f"{len(names)}")
        numbers = [f"{number}" for number in range(1, len(names) + 1)]
        rows = [f"{n:>{digits}} {name}" for n, name in zip(numbers, names, strict=True)]
        matrix = _matrix(rows, numbers, confusion)
    if matrix is not None:
        return ["confusion (rows: true class, columns: predicted class)", *matrix]
    wrong = np.where(np.eye(len(names), dtype=bool), 0, confusion)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    pairs = [np.unravel_index(index, wrong.shape) for index in order if wrong.flat[index]]
    return ["most confused (true class, predicted class, images)"] + [
        f"  {names[true]}, {names[predicted]}, {wrong[true, predicted]:,}"
        for true, predicted in pairs
    ]


def _matrix(rows: list[str], columns: list[str], confusion: np.ndarray) -> list[str] | None:
    """The lines of a confusion matrix with these names; None if they do not fit the screen."""
    cell = max(len(f"{confusion.max():,}"), 3, *(len(name) + 1 for name in columns)) + 1
    longest = min(max(map(len, rows)), 24)
    size = min(longest, width() - 4 - cell * len(columns))
    if size < min(longest, _LEAST_NAME):
        return None
    header = "".join(f"{name:>{cell}}" for name in columns)
    return [
        f"  {'':<{size}}  {header}",
        *(
            f"  {shortened(name, size):<{size}}  " + "".join(f"{n:>{cell},}" for n in counts)
            for name, counts in zip(rows, confusion, strict=True)
        ),
    ]
