"""Trains on arrays: an .npz file with images, labels and, if you like, class names.

    python examples/own_arrays.py arrays.npz

`images` is uint8[N, H, W, C] or [N, H, W], `labels` holds N whole numbers from 0, and `class_names`
a name for each. A part of each class is set aside for testing.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

import cnn
from cnn.data.holdout import hold_out
from cnn.runtime import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load_arrays(path: Path, test_fraction: float) -> cnn.Dataset:
    """The dataset in an .npz file."""
    try:
        with zipfile.ZipFile(path), np.load(path) as arrays:  # np.load takes other files too
            images, labels = arrays["images"], arrays["labels"].astype(np.int32)
            names = arrays.get("class_names", np.arange(labels.max() + 1).astype(str))
    except (ValueError, TypeError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise cnn.UserError(
            f"{path} is not an .npz file with numbers as images and labels: write it with "
            f"numpy.savez({path.stem!r}, images=..., labels=...)"
        ) from error
    if images.ndim == 3:  # grey
        images = images[..., None]
    is_test = hold_out(
        list(map(str, range(len(labels)))), labels, test_fraction=test_fraction, split_seed=0
    )
    return cnn.Dataset.from_splits(
        path.stem,
        train=cnn.Split(images[~is_test], labels[~is_test]),
        test=cnn.Split(images[is_test], labels[is_test]),
        class_names=names.tolist(),
    )


def main(argv: list[str]) -> None:
    """Flags -> arrays -> `train_and_evaluate`."""
    parser = cli.Parser("python examples/own_arrays.py", __doc__)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("--test-fraction", type=float, default=0.2)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workdir", default="checkpoints/own_arrays")
    arguments = parser.parse_args(argv)
    config = cnn.load_config(CONFIGS / "digits.py")
    config.num_epochs = arguments.epochs
    config.batch_size = arguments.batch_size
    dataset = load_arrays(arguments.arrays, arguments.test_fraction)
    _, result = cnn.train_and_evaluate(config, arguments.workdir, dataset=dataset)
    print(f"{result['test_accuracy']:.1%} of {result['test_count']} images")


if __name__ == "__main__":
    cli.run(main)
