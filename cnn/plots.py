"""Pictures of a run, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn.data import Split
from cnn.storage import local_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe & Ito's palette differ for every kind of colour vision, and in
# lightness; line style and marker differ too, for a print in grey.
_TRAIN = {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "train"}
_TEST = {"color": "#D55E00", "linestyle": "--", "marker": "s", "label": "test"}


def _new_figure(width: float, height: float) -> Figure:
    # Without pyplot: no window system, no global state, nothing for a script to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def plot_curves(
    records: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, title: str
) -> None:
    """Train and test accuracy and loss against the epoch.

    Args:
      records: of `metrics.jsonl`, one per epoch, in order.
      path: of the PNG.
      title: above both panels.
    """
    figure = _new_figure(8.0, 3.4)
    figure.suptitle(title, fontsize=11)
    epochs = [record["epoch"] for record in records]
    panels = (("accuracy", "accuracy (%)", 100.0), ("loss", "cross-entropy loss (nats)", 1.0))
    for axes, (name, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for part, style in (("train", _TRAIN), ("test", _TEST)):
            values = [scale * record[f"{part}_{name}"] for record in records]
            axes.plot(epochs, values, **style, markersize=4, linewidth=1.5)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(local_path(path))


def plot_samples(
    split: Split,
    predictions: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """A grid of images with their predicted class and, where it is another, the true one.

    Args:
      split: N images with their true labels.
      predictions: `int[N]`.
      class_names: by label.
      path: of the PNG.
      title: above the grid.
    """
    columns = 6
    rows = -(-len(split) // columns)
    figure = _new_figure(1.5 * columns, 1.9 * rows + 0.4)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, prediction in zip(
        grid, split.images, split.labels, predictions, strict=False
    ):
        grey = image.shape[-1] != 3
        axes.imshow(
            image[..., 0] if grey else image,
            cmap="gray" if grey else None,
            vmin=0,
            vmax=255,
            interpolation="nearest",
        )
        if label == prediction:
            text, style = class_names[prediction], {"color": "black"}
        else:
            text = f"{class_names[prediction]}\nnot {class_names[label]}"
            style = {"color": "#D55E00", "fontweight": "bold"}
        axes.set_title(text, fontsize=8, **style)
    figure.savefig(local_path(path))
