"""Pictures of a run, as PNG files, which appear when they are complete.

They depend only on their arguments and the installed fonts, and not on matplotlib's backend or any
of its settings.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cnn.runtime.disk import atomic_write, local_path

# Blue and vermilion of Okabe & Ito's palette differ for every kind of colour vision and in
# lightness. Line style and marker differ too, for a print in grey.
_TRAIN = {"color": "#0072B2", "linestyle": "-", "marker": "o"}
_TEST = {"color": "#D55E00", "linestyle": "--", "marker": "s"}
_FONT = "DejaVu Sans"  # comes with matplotlib
SAMPLE_COLUMNS = 6  # images in a row
_LINE_LENGTH = 22  # characters that fit above an image


def plot_curves(
    records: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str,
    label_smoothing: float = 0.0,
) -> None:
    """Plots loss and metrics, of training and of testing, against the epoch: a panel for each.

    Args:
      records: the records of `metrics.jsonl`, in order.
      path: the PNG file.
      title: shown above the panels.
      label_smoothing: named in the legend of the train loss if it is not zero.

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    last = records[-1] if records else {"train_accuracy": 0.0, "train_loss": 0.0}
    names = [name.removeprefix("train_") for name in last if name.startswith("train_")]
    names.sort(key=lambda name: name == "loss")  # the loss last
    with _figure(4.0 * len(names), 3.4, path, [title]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            is_fraction = name.endswith("accuracy")
            smoothed = label_smoothing and name == "loss"
            train = f"train (label smoothing {label_smoothing:g})" if smoothed else "train"
            for part, legend, style in (("train", train, _TRAIN), ("test", "test", _TEST)):
                known = [record for record in records if f"{part}_{name}" in record]
                epochs = [record["epoch"] for record in known]
                values = [
                    record[f"{part}_{name}"] * (100 if is_fraction else 1) for record in known
                ]
                axes.plot(epochs, values, **style, label=legend, markersize=4, linewidth=1.5)
            axes.set_xlabel("epoch")
            axes.set_ylabel(name.replace("_", " ") + (" (%)" if is_fraction else ""))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)


def plot_samples(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray | None,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
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

    Raises:
      ImportError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    columns = SAMPLE_COLUMNS
    rows = -(-len(images) // columns)
    predictions = labels if predictions is None else predictions
    shown = [class_names[int(label)] for label in (*labels, *predictions)]
    with _figure(1.5 * columns, 1.9 * rows + 0.4, path, [title, *shown]) as figure:
        figure.suptitle(title, fontsize=11, parse_math=False)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, image, label, prediction in zip(grid, images, labels, predictions, strict=False):
            axes.imshow(_pixels(image), interpolation="nearest")
            if label == prediction:
                text, style = f"{class_names[prediction]}", {"color": "black"}
            else:
                text = f"{class_names[prediction]}\nnot {class_names[label]}"
                style = {"color": "#D55E00", "fontweight": "bold"}
            axes.set_title(_folded(text), fontsize=8, parse_math=False, **style)


def _pixels(image: np.ndarray) -> np.ndarray:
    """Converts `uint8[H, W, C]` to red, green, blue and perhaps opacity."""
    channels = image.shape[-1]
    if channels in (3, 4):
        return image
    return image[..., [0, 0, 0, 1] if channels == 2 else [0, 0, 0]]


def _folded(text: str) -> str:
    """Wraps a text into lines that fit above an image, and escapes what cannot be encoded."""
    lines = text.encode("utf-8", "backslashreplace").decode().split("\n")
    fold = textwrap.TextWrapper(
        _LINE_LENGTH, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
    )
    return "\n".join(piece for line in lines for piece in fold.wrap(line) or [line])


@contextlib.contextmanager
def _figure(
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
    # Nobody can act on matplotlib's warnings here, such as a character that no font has.
    with warnings.catch_warnings(action="ignore"), _silent_logger("matplotlib"):
        matplotlib = _import_matplotlib()
        defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
        with matplotlib.rc_context({**defaults, "font.family": _families("".join(texts))}):
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            # Not by pyplot, which has a window system, global state, and figures to close.
            figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
            canvas = FigureCanvasAgg(figure)
            yield figure
            with atomic_write(target) as stream:
                canvas.print_figure(stream, format="png")


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
