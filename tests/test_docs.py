"""The scripts of docs/, as they are printed."""

import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import cnn
from tests.helpers import REPOSITORY

DATASETS = (REPOSITORY / "docs" / "datasets.md").read_text()
(PREPARE,) = re.findall(r"```python\n(.*?)```", DATASETS, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", DATASETS, re.DOTALL)
EXTENDING = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL
)


def test_a_dataset_of_ones_own(tmp_path, monkeypatch):
    """Prepared where TensorFlow cannot be imported, and then loaded by its name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for red, name in ((250, "cat"), (5, "polar bear")):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for index in range(10):
            image = PIL.Image.new("RGB", (40, 30 + index), (red, index, 0))
            image.save(folder / f"{index}.png")
    (tmp_path / "blocked" / "tensorflow").mkdir(parents=True)
    blocked = tmp_path / "blocked" / "tensorflow" / "__init__.py"
    blocked.write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, "-c", PREPARE], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'blocked'}:{REPOSITORY}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = cnn.load_dataset("photos", tmp_path / "datasets", image_size=32)
    assert data.class_names == ("cat", "polar bear")
    assert data.train.images.shape == (16, 32, 32, 3)
    assert data.test.images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(data.train.images[:, 0, 0, 0] < 128, data.train.labels == 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_those_of_train_py(command):
    words = command.replace("\\\n", " ").split()
    assert words[:2] == ["python", "train.py"]
    config = cnn.load_config(REPOSITORY / words[3])
    for flag in words[4:]:
        if flag.startswith("--config."):
            section, field = flag.removeprefix("--config.").split("=")[0].split(".")
            assert field in config[section]


def test_what_a_script_may_bring(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(EXTENDING)],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"(?m)^test accuracy ([\d.]+)%", done.stdout)
    assert float(accuracy) > 80
    lines = (tmp_path / "digits.csv").read_text().splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("step,epoch,train_")
