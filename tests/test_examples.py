"""The scripts of examples/, run as a person runs them."""

import csv
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.helpers import REPOSITORY


def run(script, *flags):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(REPOSITORY / "examples" / script), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    return done.returncode, done.stdout, done.stderr


def images(number):
    """Dark and bright ones, in turn."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (number, 16, 16, 3), np.uint8)
    pixels[1::2] += 150
    return pixels


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "files").mkdir()
    rows = []
    for i, image in enumerate(images(60)):
        PIL.Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
        split = "test" if i % 5 == 0 else "train"
        rows.append({"file": f"files/{i}.png", "kind": "ab"[i % 2], "split": split})
    return rows


SHORT = ("--epochs", 4, "--batch-size", 8)
COLUMNS = ("--path-column", "file", "--label-column", "kind")


def test_own_csv(rows, tmp_path):
    table = tmp_path / "pictures.csv"
    with open(table, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = (*COLUMNS, "--image-size", 8, "--split-column", "split", *SHORT)
    code, out, err = run("own_csv.py", table, *flags, "--workdir", tmp_path / "run")
    assert code == 0, err
    assert out.endswith("100.0% of 12 pictures\n")


def test_own_csv_of_parquet(rows, tmp_path):
    """The table is read; a picture that is missing is named, and nothing is trained."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "files" / "7.png").unlink()
    run_ = tmp_path / "run"
    code, out, err = run("own_csv.py", tmp_path / "t.parquet", *COLUMNS, "--workdir", run_)
    assert (code, out) == (2, "")
    assert err.startswith("error: 1 image (")
    assert "files/7.png: no such file" in err
    assert not run_.exists()


def test_own_arrays(tmp_path):
    labels = np.arange(60) % 2
    np.savez(tmp_path / "arrays.npz", images=images(60)[..., 0], labels=labels)
    flags = (*SHORT, "--workdir", tmp_path / "run")
    code, out, err = run("own_arrays.py", tmp_path / "arrays.npz", *flags)
    assert code == 0, err
    assert out.endswith("100.0% of 12 images\n")
