"""Pictures of a run, as PNG files, which appear when they are complete.

They depend only on their arguments and the installed fonts, and not on matplotlib's backend or any
of its settings.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import logging
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cnn.runtime.disk import atomic_write, local_path
from cnn.scores import Calibration

# Blue and vermilion of Okabe & Ito's palette differ for every kind of colour vision and in
# lightness. Line style and marker differ too, for a print in grey.
TRAIN = {"color": "#0072B2", "linestyle": "-", "marker": "o"}
TEST = {"color": "#D55E00", "linestyle": "--", "marker": "s"}
LEGEND_ABOVE: dict[str, Any] = {
    "frameon": False,
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 3,
    "handlelength": 1.4,
    "columnspacing": 1.2,
}
_FONT = "DejaVu Sans"  # comes with matplotlib
SAMPLE_COLUMNS = 6  # images in a row
_LINE_LENGTH = 22  # characters that fit above an image


def plot_curves(
    members: Sequence[Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    title: str,
    label_smoothing: float = 0.0,
) -> None:
    """Plots loss and metrics, of training and of testing, against the epoch: a panel for each.

    Of several runs that differ in their seed it plots the mean. A band reaches one sample standard
    deviation to both sides. The mean of an epoch is over the members that reached it; where that
    is one, there is no band.

    Args:
      members: the records of `metrics.jsonl` of each, in order.
      path: the PNG file.
      title: shown above the panels.
      label_smoothing: named in the legend of the train loss if it is not zero.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    trained = [records for records in members if records]
    last = trained[0][-1] if trained else {"train_accuracy": 0.0, "train_loss": 0.0}
    names = [name.removeprefix("train_") for name in last if name.startswith("train_")]
    names.sort(key=lambda name: name == "loss")  # the loss last
    with saved_figure(4.0 * len(names), 3.4, path, [title]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            scale = 100 if name.endswith("accuracy") else 1
            smoothed = label_smoothing and name == "loss"
            train = f"train (label smoothing {label_smoothing:g})" if smoothed else "train"
            for part, legend, style in (("train", train, TRAIN), ("test", "test", TEST)):
                style = {**style, "label": legend, "markersize": 4, "linewidth": 1.5}
                plot_mean(axes, trained, f"{part}_{name}", style, scale=scale)
            axes.set_xlabel("epoch")
            axes.set_ylabel(name.replace("_", " ") + (" (%)" if scale == 100 else ""))
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            what = f"mean ± std of {len(trained)} seeds" if len(trained) > 1 else None
            axes.legend(frameon=False, title=what, title_fontsize="small", alignment="left")


def plot_mean(
    axes: Any,
    members: Sequence[Sequence[Mapping[str, Any]]],
    field: str,
    style: Mapping[str, Any],
    *,
    scale: float = 1.0,
) -> None:
    """Adds a line to axes: the mean of a field at each epoch, in a band of mean ± std.

    Args:
      axes: of matplotlib.
      members: records of each run; those without the field are left out.
      field: of the records.
      style: of the line, with a colour.
      scale: multiplies the values.
    """
    values: dict[float, list[float]] = {}
    for record in itertools.chain.from_iterable(members):
        if field in record:
            values.setdefault(record["epoch"], []).append(record[field] * scale)
    epochs = sorted(values)
    samples = [values[epoch] for epoch in epochs]
    mean = np.array([np.mean(sample) for sample in samples])
    axes.plot(epochs, mean, **style)
    if len(members) > 1:
        std = np.array([np.std(x, ddof=1) if len(x) > 1 else np.nan for x in samples])
        # A band of one epoch is only its edge.
        axes.fill_between(
            epochs, mean - std, mean + std, color=style["color"], alpha=0.22, linewidth=1.5
        )


def plot_learning_rates(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    path: str | os.PathLike[str],
    *,
    title: str,
    suggestion: float | None,
) -> None:
    """Plots the loss of a learning-rate range test against the rate.

    Args:
      rates: ascending.
      losses: at these rates.
      smoothed: the same, averaged.
      path: the PNG file.
      title: shown above.
      suggestion: a rate to mark, if there is one.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    with saved_figure(5.5, 3.6, path, [title]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        axes = figure.subplots()
        axes.plot(rates, losses, color="#999999", linewidth=0.8, label="loss of a batch")
        axes.plot(rates, smoothed, color=TRAIN["color"], linewidth=1.8, label="smoothed")
        if suggestion is not None:
            label = f"suggestion: {suggestion:g}"
            axes.axvline(suggestion, color=TEST["color"], linestyle="--", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("train loss")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(smoothed):  # the last batches of a divergence would hide the rest
            low, high = min(losses), max(smoothed)
            axes.set_ylim(low - 0.05 * (high - low + 1e-9), high + 0.05 * (high - low + 1e-9))
        axes.legend(frameon=False)


def plot_samples(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray | None,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
    confidence: np.ndarray | None = None,
) -> None:
    """Draws a grid of images with their predicted class and, where it differs, the true class.

    Args:
      images: `uint8[N, H, W, C]`. One channel is grey, two are grey and opacity, three are colour,
        four are colour and opacity; of more channels the first is shown in grey.
      labels: `int[N]`, the true classes.
      predictions: `int[N]`, the predicted classes; None shows the true ones alone.
      class_names: by label; shown as they are, without any markup.
      path: the PNG file.
      title: shown above the grid.
      confidence: `float[N]`, the probabilities of the predicted classes; shown if given.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    columns = SAMPLE_COLUMNS
    rows = -(-len(images) // columns)
    predictions = labels if predictions is None else predictions
    shown = [class_names[int(label)] for label in (*labels, *predictions)]
    with saved_figure(1.5 * columns, 1.9 * rows + 0.4, path, [title, *shown]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for index, (axes, image) in enumerate(zip(grid, images, strict=False)):
            label, prediction = labels[index], predictions[index]
            axes.imshow(_pixels(image), interpolation="nearest")
            text, style = f"{class_names[prediction]}", {"color": "black"}
            if confidence is not None:
                text += f" {100 * confidence[index]:.0f} %"
            if label != prediction:
                text += f"\nnot {class_names[label]}"
                style = {"color": "#D55E00", "fontweight": "bold"}
            axes.set_title(_folded(text), fontsize=8, parse_math=False, **style)


def plot_confusion(
    confusion: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str], *, title: str
) -> None:
    """Draws a confusion matrix: colours are fractions of the true class, numbers are images.

    Args:
      confusion: `int[K, K]`, rows are true classes, columns are predicted ones.
      class_names: by label. Beyond 40 classes neither names nor numbers are shown.
      path: the PNG file.
      title: shown above.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    number = len(class_names)
    has_text = number <= 40
    size = 3 + 0.42 * number if has_text else 8
    with saved_figure(size + 0.6, size, path, [title, *class_names]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        axes = figure.subplots()
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.8)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if not has_text:
            return
        names = [_folded(name) for name in class_names]
        axes.set_xticks(range(number), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(number), names, parse_math=False)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=color, size=7)


def plot_reliability(calibration: Calibration, path: str | os.PathLike[str], *, title: str) -> None:
    """Draws accuracy against confidence in bins, and how many images each bin has.

    Args:
      calibration: of the predictions.
      path: the PNG file.
      title: shown above.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    bins = len(calibration.counts)
    edges = 100 * (np.arange(bins) + 0.5) / bins
    bar = {"width": 100 / bins, "edgecolor": "white"}
    with saved_figure(5.0, 5.5, path, [title]) as figure:
        figure.suptitle(_folded(title, 60), fontsize=11, parse_math=False)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        accuracy = 100 * np.nan_to_num(calibration.accuracy)
        upper.bar(edges, accuracy, color=TRAIN["color"], label="accuracy", **bar)
        upper.plot([0, 100], [0, 100], color="black", linestyle=":", label="perfectly calibrated")
        known = calibration.counts > 0
        marks = {"color": TEST["color"], "marker": "s", "linestyle": "none", "markersize": 4}
        confidence = 100 * calibration.confidence[known]
        # Whole also at 0 and at 100 %.
        upper.plot(
            confidence, accuracy[known], label="at the mean confidence", clip_on=False, **marks
        )
        upper.set_ylabel("accuracy (%)")
        upper.set_ylim(0, 100)
        upper.legend(**LEGEND_ABOVE, fontsize=7.5)
        lower.bar(edges, calibration.counts, color="0.6", **bar)
        lower.set_ylabel("images")
        lower.set_xlabel("confidence (%)")
        lower.set_xlim(0, 100)
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)


def _pixels(image: np.ndarray) -> np.ndarray:
    """Converts `uint8[H, W, C]` to red, green, blue and perhaps opacity."""
    channels = image.shape[-1]
    if channels in (3, 4):
        return image
    return image[..., [0, 0, 0, 1] if channels == 2 else [0, 0, 0]]


def _folded(text: str, length: int = _LINE_LENGTH) -> str:
    """Wraps a text into lines that fit above an image, and escapes what cannot be encoded."""
    lines = text.encode("utf-8", "backslashreplace").decode().split("\n")
    fold = textwrap.TextWrapper(
        length, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
    )
    return "\n".join(piece for line in lines for piece in fold.wrap(line) or [line])


@contextlib.contextmanager
def saved_figure(
    width: float, height: float, path: str | os.PathLike[str], texts: Sequence[str]
) -> Iterator[Any]:
    """Yields a figure to draw into, and saves it as a PNG file at the end.

    Args:
      width: in inches.
      height: in inches.
      path: the PNG file.
      texts: all texts in the figure, by whose characters the fonts are chosen.
    """
    target = local_path(path)
    with drawing(width, height, texts) as figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        yield figure
        with atomic_write(target) as stream:
            canvas.print_figure(stream, format="png")


@contextlib.contextmanager
def drawing(
    width: float, height: float, texts: Sequence[str], settings: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Yields a figure to draw into and to save within the block.

    Args:
      width: in inches.
      height: in inches.
      texts: all texts in the figure, by whose characters the fonts are chosen.
      settings: of matplotlib, by its names, in place of its defaults.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    # Nobody can act on matplotlib's warnings here, such as a character that no font has.
    with warnings.catch_warnings(action="ignore"), _silent_logger("matplotlib"):
        matplotlib = _import_matplotlib()
        defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
        families = {"font.family": _families("".join(texts))}
        with matplotlib.rc_context({**defaults, **families, **(settings or {})}):
            from matplotlib.figure import Figure

            # Not by pyplot, which has a window system, global state, and figures to close.
            yield Figure(figsize=(width, height), dpi=150, layout="constrained")


def _import_matplotlib() -> Any:
    """Imports the package, even where that fails because a setting cannot be read."""
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise
    except Exception:  # a variable, or a matplotlibrc here or at home, is at fault
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        found = importlib.util.find_spec("matplotlib")
        assert found is not None  # it was imported in part
        assert found.origin is not None
        own = os.path.join(os.path.dirname(found.origin), "mpl-data", "matplotlibrc")
        variables = {"MPLBACKEND": "agg", "MATPLOTLIBRC": own}
        kept = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
                return importlib.import_module("matplotlib")
        finally:
            for name, value in kept.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextlib.contextmanager
def _silent_logger(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _families(text: str) -> list[str]:
    """Font families that together cover the characters of a text, as far as installed fonts do."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    def known(path: str) -> set[str]:
        try:
            font = get_font(path)
            return {c for c in missing if font.scalable and font.get_char_index(ord(c))}
        except (OSError, RuntimeError):  # matplotlib cannot draw with this font
            return set()

    families, missing = [_FONT], {c for c in text if c.isprintable() and not c.isspace()}
    missing -= known(findfont(FontProperties(family=_FONT)))
    if missing:
        fonts = sorted({(font.name, font.fname) for font in fontManager.ttflist})
        found = {name: known(path) for name, path in fonts}
        while missing and (best := max(found, key=lambda name: len(found[name] & missing))):
            if not found[best] & missing:
                break
            families.append(best)
            missing -= found[best]
    return families
