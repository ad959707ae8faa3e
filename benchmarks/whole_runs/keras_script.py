"""The tutorial script that this repository rebuilds, in Keras, for `benchmarks.whole_runs`.

    python benchmarks/whole_runs/keras_script.py --data cifar10.npz --workdir /tmp/keras

The data file holds the arrays train_images, train_labels, test_images and test_labels. The script
trains ten epochs, each followed by an evaluation and a checkpoint, and plots the curves.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def build_model() -> keras.Model:
    """Two convolutions with max-pooling, two dense layers."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(32, (3, 3), activation="relu"),
            keras.layers.MaxPooling2D((2, 2)),
            keras.layers.Conv2D(64, (3, 3), activation="relu"),
            keras.layers.MaxPooling2D((2, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


class _EpochLine(keras.callbacks.Callback):
    """Prints a row per epoch with the columns of `train.py`."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        print(
            f"{epoch + 1:5}  {logs['loss']:.4f}  {100 * logs['accuracy']:.2f} %  "
            f"{logs['val_loss']:.4f}  {100 * logs['val_accuracy']:.2f} %",
            flush=True,
        )


def plot_curves(history: dict[str, list[float]], path: Path) -> None:
    """Accuracy and loss by epoch, on train and test."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        axis.plot(history[name], label="train")
        axis.plot(history[f"val_{name}"], label="test")
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.legend()
    figure.savefig(path)


def main() -> None:
    """Data, model, fit, test, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    flags = parser.parse_args()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(flags.seed)

    with np.load(flags.data) as arrays:
        train = arrays["train_images"] / np.float32(255), arrays["train_labels"]
        test = arrays["test_images"] / np.float32(255), arrays["test_labels"]
    model = build_model()
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        *train,
        batch_size=32,
        epochs=flags.epochs,
        validation_data=test,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(flags.workdir / "epoch-{epoch:02d}.keras"),
            _EpochLine(),
        ],
    )
    loss, accuracy = model.evaluate(*test, verbose=0)
    plot_curves(history.history, flags.workdir / "curves.png")
    print(f"test accuracy {100 * accuracy:.2f} %, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
