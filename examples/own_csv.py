"""Trains on pictures that a table lists: a CSV or Parquet file of paths and labels.

    python examples/own_csv.py pictures.csv --image-size 32

The table has a column of paths, which are relative to its folder, and a column of labels. With a
third column, of "train" and "test" (--split-column), it says which pictures are for testing; else a
part of each class is set aside.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

import cnn
from cnn.data.holdout import hold_out
from cnn.runtime import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV or Parquet file, by column."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise cnn.UserError(
                f"{path} is a Parquet file, which pyarrow reads: pip install pyarrow, or give a CSV"
            ) from error
        table = parquet.read_table(path).to_pylist()
        return [{name: str(value) for name, value in row.items()} for row in table]
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise cnn.UserError(f"{path} is not a CSV file in UTF-8: {error}") from error


def column(rows: list[dict[str, str]], name: str, path: Path) -> list[str]:
    """The values of a column."""
    if not rows:
        raise cnn.UserError(f"{path} has no rows: give a table with a header and a row per picture")
    if name not in rows[0]:
        raise cnn.UserError(f"{path} has no column {name!r}; it has {', '.join(rows[0])}")
    for number, row in enumerate(rows, 1):
        if row[name] is None:
            raise cnn.UserError(f"row {number} of {path} is too short: it has no {name!r}")
    return [row[name] for row in rows]


def load_table(arguments: argparse.Namespace) -> cnn.Dataset:
    """The pictures that the table lists."""
    table: Path = arguments.table
    rows = read_table(table)
    paths = column(rows, arguments.path_column, table)
    classes, labels = np.unique(column(rows, arguments.label_column, table), return_inverse=True)
    labels = labels.astype(np.int32)
    if arguments.split_column:
        is_test = np.array(column(rows, arguments.split_column, table)) == "test"
    else:
        is_test = hold_out(paths, labels, test_fraction=0.2, split_seed=0)
    images = cnn.load_images(
        [table.parent / path for path in paths], image_size=arguments.image_size
    )
    train, test = (
        cnn.Split(images[part], labels[part], tuple(np.array(paths)[part].tolist()))
        for part in (~is_test, is_test)
    )
    return cnn.Dataset.from_splits(
        table.stem,
        train=train,
        test=test,
        class_names=classes.tolist(),
    )


def main(argv: list[str]) -> None:
    """Flags -> arrays -> `train_and_evaluate`."""
    parser = cli.Parser("python examples/own_csv.py", __doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--path-column", default="path")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--split-column", help="of train and test")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workdir", default="checkpoints/own_csv")
    arguments = parser.parse_args(argv)
    config = cnn.load_config(CONFIGS / "digits.py")
    config.num_epochs = arguments.epochs
    config.batch_size = arguments.batch_size
    dataset = load_table(arguments)
    _, result = cnn.train_and_evaluate(config, arguments.workdir, dataset=dataset)
    print(f"{result['test_accuracy']:.1%} of {result['test_count']} pictures")


if __name__ == "__main__":
    cli.run(main)
